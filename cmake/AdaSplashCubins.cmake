# The CUDA half of libadasplash: its host code, and the kernels, which Triton compiles ahead of time. Needs no CUDA
# toolkit and no GPU, only a Python with Triton; nothing of either at run time.
#
# ADASPLASH_ARCHS: GPU architectures to compile for, of 80 86 89 90 100 103 120; `none` for a library without GPU kernels;
# `auto` for the machine's GPUs, and 80 and 90 where there is none.
set(ADASPLASH_ARCHS auto CACHE STRING "GPU architectures to compile for")
string(REGEX REPLACE "[, ]+" ";" _wanted "${ADASPLASH_ARCHS}")
if(NOT _wanted OR _wanted STREQUAL "auto")
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE _wanted OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE _failed)
  string(REPLACE "." "" _wanted "${_wanted}")
  string(REGEX REPLACE "[\r\n ]+" ";" _wanted "${_wanted}")
  list(REMOVE_DUPLICATES _wanted)
  list(FILTER _wanted INCLUDE REGEX "^(80|86|89|90|100|103|120)$")  # the others run PTX, if anything
  if(_failed OR NOT _wanted)
    set(_wanted 80 90)
  endif()
endif()

target_sources(adasplash PRIVATE
  csrc/cuda/activation.cpp
  csrc/cuda/attention.cpp
  csrc/cuda/cache.cpp
  csrc/cuda/driver.cpp
  csrc/cuda/embedded.cpp
  csrc/cuda/implementation.cpp
  csrc/cuda/few.cpp
  csrc/cuda/key_index.cpp
  csrc/cuda/part.cpp
  csrc/cuda/register.cpp
  csrc/cuda/summary.cpp
  csrc/cuda/portable/backward.cpp
  csrc/cuda/portable/call.cpp
  csrc/cuda/portable/few.cpp
  csrc/cuda/portable/forward.cpp
  csrc/cuda/portable/portable.cpp
  csrc/cuda/portable/summary.cpp)
target_link_libraries(adasplash PRIVATE ${CMAKE_DL_LIBS})

set(ADASPLASH_BUILT_ARCHS "${_wanted}")  # none, or a list
if(_wanted STREQUAL "none")
  message(STATUS "AdaSplash without GPU kernels (ADASPLASH_ARCHS=none)")
  target_sources(adasplash PRIVATE csrc/cuda/no_embedded.cpp)
  # A manifest may be left from a build that had some.
  install(CODE "file(REMOVE \"\${CMAKE_INSTALL_PREFIX}/${CMAKE_INSTALL_LIBDIR}/adasplash/manifest.json\")")
  return()
endif()

find_package(Python COMPONENTS Interpreter REQUIRED)
execute_process(COMMAND "${Python_EXECUTABLE}" -c "import triton; print(triton.__version__)"
  OUTPUT_VARIABLE _triton OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE _failed)
if(_failed)
  message(FATAL_ERROR "AdaSplash: ${Python_EXECUTABLE} has no Triton, which compiles the GPU kernels: install it "
    "(pip install triton), or set ADASPLASH_ARCHS=none for a library without GPU kernels")
endif()
message(STATUS "AdaSplash GPU kernels for ${_wanted}, compiled by Triton ${_triton}")

set(_out "${CMAKE_CURRENT_BINARY_DIR}/cubins")
file(GLOB_RECURSE _kernels CONFIGURE_DEPENDS triton_src/*.py triton_src/*.json)
# What was asked for, as a file: when it changes the kernels are looked at again, and the cache has those that stay.
file(CONFIGURE OUTPUT "${_out}/archs.txt" CONTENT "${_wanted} ${_triton}\n")
add_custom_command(
  OUTPUT "${_out}/done"
  BYPRODUCTS "${_out}/cubins.bin" "${_out}/manifest.json" "${_out}/resources.txt" "${_out}/variants.cpp"
  COMMAND "${Python_EXECUTABLE}" -m triton_src.compile --arch ${_wanted} --out "${_out}"
  COMMAND "${CMAKE_COMMAND}" -E touch "${_out}/done"
  DEPENDS ${_kernels} "${_out}/archs.txt"
  WORKING_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}"
  COMMENT "Compiling the GPU kernels"
  USES_TERMINAL VERBATIM)
add_custom_target(adasplash_cubins DEPENDS "${_out}/done")

# The assembler embeds the file as it is.
enable_language(ASM)
file(CONFIGURE OUTPUT "${_out}/cubins.S" CONTENT [[
.section .rodata
.balign 64
.globl adasplash_cubins
.hidden adasplash_cubins
adasplash_cubins:
.incbin "@_out@/cubins.bin"
.section .note.GNU-stack, "", %progbits
]] @ONLY)
set_source_files_properties("${_out}/cubins.S" PROPERTIES OBJECT_DEPENDS "${_out}/cubins.bin")
target_sources(adasplash PRIVATE "${_out}/cubins.S" "${_out}/variants.cpp")
add_dependencies(adasplash adasplash_cubins)
install(FILES "${_out}/manifest.json" DESTINATION "${CMAKE_INSTALL_LIBDIR}/adasplash")
