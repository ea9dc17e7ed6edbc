# The GPU kernels, which Triton compiles ahead of time. Needs no CUDA toolkit and no GPU, only a Python with Triton;
# nothing of either at run time.
include(cmake/AdaSplashArchs.cmake)

if(NOT TARGET adasplash_kernels)
  return()  # they were built before, for another torch
endif()
if(ADASPLASH_BUILT_ARCHS STREQUAL "none")
  message(STATUS "AdaSplash without GPU kernels (ADASPLASH_ARCHS=none)")
  target_sources(adasplash_kernels PRIVATE csrc/cuda/no_embedded.cpp)
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
if(_triton VERSION_LESS 3.6)
  message(FATAL_ERROR "AdaSplash: ${Python_EXECUTABLE} has Triton ${_triton}, which is too old to compile the GPU "
    "kernels: install 3.6 or newer (pip install 'triton>=3.6'), or set ADASPLASH_ARCHS=none for a library without them")
endif()
message(STATUS "AdaSplash GPU kernels for ${ADASPLASH_BUILT_ARCHS}, compiled by Triton ${_triton}")

set(_out "${CMAKE_CURRENT_BINARY_DIR}/cubins")
file(GLOB_RECURSE _kernels CONFIGURE_DEPENDS triton_src/*.py triton_src/*.json)
# What was asked for, as a file: when it changes the kernels are looked at again, and the cache has those that stay.
file(CONFIGURE OUTPUT "${_out}/archs.txt" CONTENT "${ADASPLASH_BUILT_ARCHS} ${_triton}\n")
add_custom_command(
  OUTPUT "${_out}/done"
  BYPRODUCTS "${_out}/cubins.bin" "${_out}/manifest.json" "${_out}/resources.txt" "${_out}/variants.cpp"
  COMMAND "${Python_EXECUTABLE}" -m triton_src.compile --arch ${ADASPLASH_BUILT_ARCHS} --out "${_out}"
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
.globl adasplash_cubins
.type adasplash_cubins, %object
adasplash_cubins:
.incbin "@_out@/cubins.bin"
.size adasplash_cubins, .-adasplash_cubins
.section .note.GNU-stack, "", %progbits
]] @ONLY)
set_source_files_properties("${_out}/cubins.S" PROPERTIES OBJECT_DEPENDS "${_out}/cubins.bin")
target_sources(adasplash_kernels PRIVATE "${_out}/cubins.S" "${_out}/variants.cpp")
add_dependencies(adasplash_kernels adasplash_cubins)
install(FILES "${_out}/manifest.json" DESTINATION "${CMAKE_INSTALL_LIBDIR}/adasplash")
