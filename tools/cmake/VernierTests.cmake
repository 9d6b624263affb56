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

file(GLOB example_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/examples/*.cc")
foreach(source IN LISTS example_sources)
  get_filename_component(name "${source}" NAME_WE)
  add_executable(example_${name} "${source}")
  target_link_libraries(example_${name} PRIVATE vernier vernier_options)
  vernier_use_pch(example_${name})
  set_target_properties(example_${name} PROPERTIES OUTPUT_NAME ${name} BUILD_RPATH "${torch_rpath}"
                        RUNTIME_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/examples")
  add_test(NAME example_${name} COMMAND example_${name})
  set_tests_properties(example_${name} PROPERTIES LABELS example TIMEOUT 600)
endforeach()

# 77 is "skipped" by custom.
add_test(NAME style_format COMMAND "${PROJECT_SOURCE_DIR}/tools/check_format.sh")
set_tests_properties(style_format PROPERTIES LABELS style SKIP_RETURN_CODE 77)
find_package(Python3 COMPONENTS Interpreter)
if(Python3_FOUND)
  add_test(NAME style_includes COMMAND Python3::Interpreter "${PROJECT_SOURCE_DIR}/tools/check_includes.py")
  set_tests_properties(style_includes PROPERTIES LABELS style)
endif()

# The Python tests, which skip themselves where they miss a package.
set(venv_python "${PROJECT_SOURCE_DIR}/.deps/venv/bin/python")
if(EXISTS "${venv_python}")
  add_test(NAME text_to_tokens_test COMMAND "${venv_python}" "${PROJECT_SOURCE_DIR}/tests/text_to_tokens_test.py")
  set_tests_properties(text_to_tokens_test PROPERTIES LABELS python SKIP_RETURN_CODE 77 TIMEOUT 600)
  # torch.ops.vernier. `import torch` loads all of CUDA's libraries, which a machine without nvcc does not get.
  add_test(NAME python_ops_test
           COMMAND sh -c "\"$0\" -c 'import torch' 2>/dev/null || { echo 'skipped: Python cannot import torch here'; exit 77; }; exec \"$0\" \"$@\""
           "${venv_python}" "${PROJECT_SOURCE_DIR}/tests/python_ops_test.py")
  set_tests_properties(python_ops_test PROPERTIES LABELS python SKIP_RETURN_CODE 77 TIMEOUT 600
                       ENVIRONMENT "VERNIER_LIBRARY=$<TARGET_FILE:vernier>")
endif()
