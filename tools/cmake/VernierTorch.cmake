# LibTorch as one imported target, `vernier_torch`.
#
# find_package(Torch) is not used: it insists on the CUDA toolkit whenever the LibTorch at hand was built with CUDA, even for a
# program that runs on the CPU only, and it sets GPU architectures that recent nvcc versions reject.
#
#   vernier_find_torch([HINTS dir...])   looks for a LibTorch of at least VERNIER_TORCH_MINIMUM and sets in the caller
#       VERNIER_TORCH_DIR           its root, the directory with include/ and lib/
#       VERNIER_TORCH_VERSION       its version
#       VERNIER_TORCH_CUDA_MAJOR    the CUDA it was built with, empty without
#       VERNIER_TORCH_LIBRARY_DIRS  where its libraries and theirs are, for the run path
#   vernier_add_torch_target(CUDA)       makes the target; CUDA: whether the CUDA half is linked as well
#
# The search: VERNIER_TORCH_ROOT, then CMAKE_PREFIX_PATH (an unpacked LibTorch, a site-packages folder, a Python prefix, or what
# torch.utils.cmake_prefix_path prints), then the hints.

set(VERNIER_TORCH_MINIMUM 2.11)

# Sets `out` to the LibTorch root that `dir` stands for, or to the empty string.
function(_vernier_torch_root dir out)
  set(${out} "" PARENT_SCOPE)
  file(GLOB candidates LIST_DIRECTORIES true "${dir}/lib/python3*/site-packages/torch")
  foreach(root IN ITEMS "${dir}" "${dir}/torch" "${dir}/../.." LISTS candidates)
    if(EXISTS "${root}/lib/libtorch_cpu.so" AND EXISTS "${root}/include/ATen/ATen.h")
      get_filename_component(root "${root}" ABSOLUTE)
      set(${out} "${root}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
endfunction()

# Sets `out` to the version that a LibTorch root says it is.
function(_vernier_torch_version root out)
  set(${out} "" PARENT_SCOPE)
  foreach(header IN ITEMS torch/headeronly/version.h torch/csrc/api/include/torch/version.h)
    if(EXISTS "${root}/include/${header}")
      file(STRINGS "${root}/include/${header}" line REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
      string(REGEX MATCHALL "[0-9]+" numbers "${line}")
      if(numbers)
        string(JOIN "." version ${numbers})
        set(${out} "${version}" PARENT_SCOPE)
        return()
      endif()
    endif()
  endforeach()
endfunction()

function(vernier_find_torch)
  cmake_parse_arguments(PARSE_ARGV 0 arg "" "" "HINTS")
  set(prefixes ${CMAKE_PREFIX_PATH})
  if(DEFINED ENV{CMAKE_PREFIX_PATH})
    string(REPLACE ":" ";" from_environment "$ENV{CMAKE_PREFIX_PATH}")
    list(APPEND prefixes ${from_environment})
  endif()
  set(root "")
  if(VERNIER_TORCH_ROOT)
    _vernier_torch_root("${VERNIER_TORCH_ROOT}" root)
    if(NOT root)
      message(FATAL_ERROR "VERNIER_TORCH_ROOT=${VERNIER_TORCH_ROOT} holds no lib/libtorch_cpu.so with include/ATen/ATen.h")
    endif()
  else()
    foreach(dir IN LISTS prefixes arg_HINTS)
      _vernier_torch_root("${dir}" root)
      if(root)
        break()
      endif()
    endforeach()
  endif()
  if(NOT root)
    message(FATAL_ERROR "LibTorch was not found: run tools/setup.sh build, or point CMAKE_PREFIX_PATH or VERNIER_TORCH_ROOT at one")
  endif()

  _vernier_torch_version("${root}" version)
  if(version VERSION_LESS VERNIER_TORCH_MINIMUM)
    message(FATAL_ERROR "LibTorch in ${root} is ${version}; ${VERNIER_TORCH_MINIMUM} or later is needed")
  endif()

  # The CUDA runtime that libc10_cuda.so names is the one that everything in this process has to share.
  set(cuda_major "")
  if(EXISTS "${root}/lib/libtorch_cuda.so" AND EXISTS "${root}/lib/libc10_cuda.so")
    file(STRINGS "${root}/lib/libc10_cuda.so" soname REGEX "^libcudart[-.0-9a-f]*\\.so\\.[0-9]+" LIMIT_COUNT 1)
    if(soname MATCHES "\\.so\\.([0-9]+)")
      set(cuda_major "${CMAKE_MATCH_1}")
    endif()
  endif()

  # In the PyPI wheel the CUDA libraries come from packages beside torch.
  set(library_dirs "${root}/lib")
  get_filename_component(site_packages "${root}" DIRECTORY)
  file(GLOB nvidia LIST_DIRECTORIES true "${site_packages}/nvidia/*/lib")
  list(APPEND library_dirs ${nvidia})

  set(VERNIER_TORCH_DIR "${root}" PARENT_SCOPE)
  set(VERNIER_TORCH_VERSION "${version}" PARENT_SCOPE)
  set(VERNIER_TORCH_CUDA_MAJOR "${cuda_major}" PARENT_SCOPE)
  set(VERNIER_TORCH_LIBRARY_DIRS "${library_dirs}" PARENT_SCOPE)
endfunction()

function(vernier_add_torch_target cuda)
  if(TARGET vernier_torch)
    return()
  endif()
  add_library(vernier_torch INTERFACE IMPORTED GLOBAL)
  set(root "${VERNIER_TORCH_DIR}")
  target_include_directories(vernier_torch SYSTEM INTERFACE "${root}/include" "${root}/include/torch/csrc/api/include")
  # What LibTorch itself was built with, for its headers have to agree with its libraries.
  target_compile_definitions(vernier_torch INTERFACE _GLIBCXX_USE_CXX11_ABI=1 USE_DISTRIBUTED)
  # torch_cuda registers its kernels when it is loaded; nothing refers to it by name, so that --as-needed would drop it.
  target_link_options(vernier_torch INTERFACE "LINKER:--no-as-needed")
  target_link_libraries(vernier_torch INTERFACE "${root}/lib/libc10.so" "${root}/lib/libtorch_cpu.so")
  if(cuda)
    target_compile_definitions(vernier_torch INTERFACE USE_C10D_NCCL)
    target_link_libraries(vernier_torch INTERFACE "${root}/lib/libtorch.so" "${root}/lib/libc10_cuda.so" "${root}/lib/libtorch_cuda.so")
    get_filename_component(site_packages "${root}" DIRECTORY)
    if(EXISTS "${site_packages}/nvidia/nccl/include/nccl.h")
      target_include_directories(vernier_torch SYSTEM INTERFACE "${site_packages}/nvidia/nccl/include")
    endif()
  endif()
  # So that the linker finds the libraries that LibTorch's libraries need.
  foreach(dir IN LISTS VERNIER_TORCH_LIBRARY_DIRS)
    target_link_options(vernier_torch INTERFACE "LINKER:-rpath-link,${dir}")
  endforeach()
endfunction()
