# The tests: one program per tests/*_test.cc, the style checks, the Python test of the operators; and the examples, which have to build and run.

file(GLOB test_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/tests/*_test.cc")
foreach(source IN LISTS test_sources)
  get_filename_component(name "${source}" NAME_WE)
  if(name MATCHES "_gpu_test$" AND NOT VERNIER_WITH_CUDA)
    continue()
  endif()
  add_executable(${name} "${source}")
  target_link_libraries(${name} PRIVATE vernier vernier_dependencies GTest::gtest_main)
  target_compile_definitions(${name} PRIVATE VERNIER_SOURCE_DIR="${PROJECT_SOURCE_DIR}"
                             VERNIER_PROGRAM="${PROJECT_BINARY_DIR}/bin/vernier")
  vernier_use_pch(${name})
  set_target_properties(${name} PROPERTIES BUILD_RPATH "${torch_rpath}" RUNTIME_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/tests")
  if(name MATCHES "^cli_" AND TARGET vernier_cli)
    add_dependencies(${name} vernier_cli)
  endif()
  add_test(NAME ${name} COMMAND ${name} WORKING_DIRECTORY "${PROJECT_BINARY_DIR}/tests")
  set_tests_properties(${name} PROPERTIES TIMEOUT 600)
  if(name MATCHES "_gpu_test$")
    set_tests_properties(${name} PROPERTIES LABELS gpu RESOURCE_LOCK gpu)  # timings, and memory, of one test at a time
  else()
    set_tests_properties(${name} PROPERTIES LABELS unit)
  endif()
endforeach()

file(GLOB example_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/examples/*.cc" "${PROJECT_SOURCE_DIR}/examples/digits/*.cc"
     "${PROJECT_SOURCE_DIR}/examples/transformer/*.cc")
foreach(source IN LISTS example_sources)
  get_filename_component(name "${source}" NAME_WE)
  add_executable(example_${name} "${source}")
  target_link_libraries(example_${name} PRIVATE vernier vernier_options)
  vernier_use_pch(example_${name})
  set_target_properties(example_${name} PROPERTIES OUTPUT_NAME ${name} BUILD_RPATH "${torch_rpath}"
                        RUNTIME_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/examples")
  set(example_arguments "")
  if(name STREQUAL "digits")
    set(example_arguments "${PROJECT_SOURCE_DIR}/examples/digits/data/digits.h5" "${PROJECT_BINARY_DIR}/examples/digits.svg")
    # Its picture is drawn as those of the benchmarks are.
    target_sources(example_digits PRIVATE "${PROJECT_SOURCE_DIR}/cli/charts.cc" "${PROJECT_SOURCE_DIR}/cli/console.cc")
    target_link_libraries(example_digits PRIVATE nlohmann_json::nlohmann_json)
  endif()
  add_test(NAME example_${name} COMMAND example_${name} ${example_arguments})
  set_tests_properties(example_${name} PROPERTIES LABELS example TIMEOUT 600)
endforeach()

# A project of its own that uses the installed package, compiled without the precompiled header: minutes on a slow machine.
add_test(NAME example_consumer
         COMMAND "${CMAKE_COMMAND}" -D "BUILD=${PROJECT_BINARY_DIR}" -D "SOURCE=${PROJECT_SOURCE_DIR}/examples/consumer"
                 -D "WORK=${PROJECT_BINARY_DIR}/consumer" -D "GENERATOR=${CMAKE_GENERATOR}" -D "FLAGS=${CMAKE_CXX_FLAGS}"
                 -D "LAUNCHER=${VERNIER_CCACHE}" -P "${PROJECT_SOURCE_DIR}/tools/cmake/ConsumerTest.cmake")
set_tests_properties(example_consumer PROPERTIES LABELS example TIMEOUT 1200)

# 77 is "skipped" by custom.
add_test(NAME style_format COMMAND "${PROJECT_SOURCE_DIR}/tools/check_format.sh")
set_tests_properties(style_format PROPERTIES LABELS style SKIP_RETURN_CODE 77)
find_package(Python3 COMPONENTS Interpreter)
if(Python3_FOUND)
  add_test(NAME style_includes COMMAND Python3::Interpreter "${PROJECT_SOURCE_DIR}/tools/check_includes.py")
  add_test(NAME style_consumer COMMAND Python3::Interpreter "${PROJECT_SOURCE_DIR}/tools/check_consumer.py")
  set_tests_properties(style_includes style_consumer PROPERTIES LABELS style)
endif()

# The Python tests, which skip themselves where they miss a package.
set(venv_python "${PROJECT_SOURCE_DIR}/.deps/venv/bin/python")
if(EXISTS "${venv_python}")
  add_test(NAME text_to_tokens_test COMMAND "${venv_python}" "${PROJECT_SOURCE_DIR}/tests/text_to_tokens_test.py")
  set_tests_properties(text_to_tokens_test PROPERTIES LABELS python SKIP_RETURN_CODE 77 TIMEOUT 600)
  if(TARGET vernier_cli)
    add_test(NAME reference_perplexity_test COMMAND "${venv_python}" "${PROJECT_SOURCE_DIR}/tests/reference_perplexity_test.py")
    set_tests_properties(reference_perplexity_test PROPERTIES LABELS python SKIP_RETURN_CODE 77 TIMEOUT 3600
                         ENVIRONMENT "VERNIER_PROGRAM=$<TARGET_FILE:vernier_cli>")
  endif()
  # torch.ops.vernier. `import torch` loads all of CUDA's libraries, which a machine without nvcc does not get.
  add_test(NAME python_ops_test
           COMMAND sh -c "\"$0\" -c 'import torch' 2>/dev/null || { echo 'skipped: Python cannot import torch here'; exit 77; }; exec \"$0\" \"$@\""
           "${venv_python}" "${PROJECT_SOURCE_DIR}/tests/python_ops_test.py")
  set_tests_properties(python_ops_test PROPERTIES LABELS python SKIP_RETURN_CODE 77 TIMEOUT 600
                       ENVIRONMENT "VERNIER_LIBRARY=$<TARGET_FILE:vernier>")
  # What transformers makes of folders that the program writes.
  add_test(NAME compressed_tensors_test
           COMMAND "${venv_python}" "${PROJECT_SOURCE_DIR}/tests/compressed_tensors_test.py")
  set_tests_properties(compressed_tensors_test PROPERTIES LABELS python SKIP_RETURN_CODE 77 TIMEOUT 1200
                       ENVIRONMENT "VERNIER_PROGRAM=$<TARGET_FILE:vernier_cli>")
endif()
