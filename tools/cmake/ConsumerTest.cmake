# Installs a build tree into an empty prefix, builds examples/consumer against it and runs both of its programs:
#   cmake -D BUILD=build -D SOURCE=examples/consumer -D WORK=build/consumer -D GENERATOR=Ninja [-D FLAGS=...] [-D LAUNCHER=ccache]
#         -P ConsumerTest.cmake
function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
endfunction()

if(NOT LAUNCHER)
  set(LAUNCHER "")
endif()
file(REMOVE_RECURSE "${WORK}")
file(COPY "${SOURCE}/" DESTINATION "${WORK}/source")
run("${CMAKE_COMMAND}" --install "${BUILD}" --prefix "${WORK}/prefix")
run("${CMAKE_COMMAND}" -G "${GENERATOR}" -S "${WORK}/source" -B "${WORK}/build" "-DCMAKE_PREFIX_PATH=${WORK}/prefix" "-DCMAKE_CXX_FLAGS=${FLAGS}"
    "-DCMAKE_CXX_COMPILER_LAUNCHER=${LAUNCHER}")
run("${CMAKE_COMMAND}" --build "${WORK}/build")
foreach(program IN ITEMS before after)
  run("${CMAKE_COMMAND}" -E chdir "${WORK}" "${WORK}/build/${program}")
endforeach()
