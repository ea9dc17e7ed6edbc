# Finds torch's headers and libraries and makes the target AdaSplash::torch of them. find_package(Torch) is not used:
# against a CUDA build of torch it stops where there is no CUDA toolkit, and nothing here needs one. Serves both our
# own build and the installed package.
#
# Looks in Torch_DIR, CMAKE_PREFIX_PATH (torch.utils.cmake_prefix_path, or the folder of an unpacked libtorch), beside
# this package in site-packages, where ADASPLASH_TORCH_HINT says, and last asks the python3 on the path.
# Sets ADASPLASH_TORCH_ROOT, ADASPLASH_TORCH_LIB_DIR and ADASPLASH_TORCH_VERSION.
find_path(ADASPLASH_TORCH_CONFIG_DIR TorchConfig.cmake
  HINTS "${Torch_DIR}" PATH_SUFFIXES Torch cmake/Torch share/cmake/Torch NO_CACHE)
if(NOT ADASPLASH_TORCH_CONFIG_DIR)
  find_path(ADASPLASH_TORCH_CONFIG_DIR TorchConfig.cmake
    PATHS "${CMAKE_CURRENT_LIST_DIR}/../../../../torch" "${ADASPLASH_TORCH_HINT}"
    PATH_SUFFIXES share/cmake/Torch NO_CACHE NO_DEFAULT_PATH)
endif()
if(NOT ADASPLASH_TORCH_CONFIG_DIR)
  execute_process(COMMAND python3 -c "import torch; print(torch.utils.cmake_prefix_path)"
    OUTPUT_VARIABLE _torch_prefix OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(_torch_prefix)
    set(ADASPLASH_TORCH_CONFIG_DIR "${_torch_prefix}/Torch")
  endif()
endif()
if(NOT ADASPLASH_TORCH_CONFIG_DIR)
  message(FATAL_ERROR "AdaSplash: torch not found; pass -DCMAKE_PREFIX_PATH=$(python -c "
    "'import torch; print(torch.utils.cmake_prefix_path)') or the folder of an unpacked libtorch")
endif()

# <root>/share/cmake/Torch/TorchConfig.cmake
get_filename_component(ADASPLASH_TORCH_ROOT "${ADASPLASH_TORCH_CONFIG_DIR}/../../.." ABSOLUTE)
set(ADASPLASH_TORCH_LIB_DIR "${ADASPLASH_TORCH_ROOT}/lib")
set(ADASPLASH_TORCH_VERSION "unknown")
if(EXISTS "${ADASPLASH_TORCH_ROOT}/share/cmake/Torch/TorchConfigVersion.cmake")
  file(STRINGS "${ADASPLASH_TORCH_ROOT}/share/cmake/Torch/TorchConfigVersion.cmake" _line REGEX "set\\(PACKAGE_VERSION ")
  string(REGEX REPLACE ".*\"([^\"]+)\".*" "\\1" ADASPLASH_TORCH_VERSION "${_line}")
endif()

if(TARGET AdaSplash::torch)
  return()
endif()

set(_torch_libraries "")
foreach(_name torch torch_cpu c10)
  set(_file "${ADASPLASH_TORCH_LIB_DIR}/${CMAKE_SHARED_LIBRARY_PREFIX}${_name}${CMAKE_SHARED_LIBRARY_SUFFIX}")
  if(NOT EXISTS "${_file}")
    message(FATAL_ERROR "AdaSplash: ${_file} is missing, is torch in ${ADASPLASH_TORCH_ROOT} complete?")
  endif()
  list(APPEND _torch_libraries "${_file}")
endforeach()

find_package(Threads REQUIRED)
add_library(AdaSplash::torch_headers INTERFACE IMPORTED GLOBAL)
target_include_directories(AdaSplash::torch_headers SYSTEM INTERFACE
  "${ADASPLASH_TORCH_ROOT}/include" "${ADASPLASH_TORCH_ROOT}/include/torch/csrc/api/include")
target_compile_features(AdaSplash::torch_headers INTERFACE cxx_std_20)
add_library(AdaSplash::torch INTERFACE IMPORTED GLOBAL)
# libtorch.so itself holds no symbols; it pulls in the CUDA half where torch has one, so it must not be dropped. One item
# with its flags, because CMake moves flags about; quoted, because paths may have spaces.
list(GET _torch_libraries 0 _libtorch)
target_link_libraries(AdaSplash::torch INTERFACE AdaSplash::torch_headers
  "-Wl,--push-state,--no-as-needed,\"${_libtorch}\",--pop-state" ${_torch_libraries} Threads::Threads)
