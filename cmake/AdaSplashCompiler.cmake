# A C++ compiler, or one sentence that says which is needed.
include(CheckLanguage)
check_language(CXX)
if(NOT CMAKE_CXX_COMPILER)
  message(FATAL_ERROR "AdaSplash: no C++ compiler found (CXX, if set, names none): install one that knows C++20, such as "
    "g++ 11 or newer")
endif()
enable_language(CXX)
if((CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 11)
    OR (CMAKE_CXX_COMPILER_ID STREQUAL "Clang" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 14)
    OR NOT "cxx_std_20" IN_LIST CMAKE_CXX_COMPILE_FEATURES)
  message(FATAL_ERROR "AdaSplash: ${CMAKE_CXX_COMPILER} is ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}, too "
    "old for its C++20: install g++ 11 or clang 14, or newer, and name it in CXX if it is not the default")
endif()
