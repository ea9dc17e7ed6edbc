# ADASPLASH_ARCHS: GPU architectures to compile kernels for, of those below, also written sm_90, 9.0 or 90a; `all` of
# them; `none` for a library without GPU kernels; `auto` for the machine's GPUs, and 80 and 90 where there is none.
# Sets ADASPLASH_BUILT_ARCHS: `none`, or a list of numbers.
set(ADASPLASH_ARCHS auto CACHE STRING "GPU architectures to compile for")
set(_known 80 86 89 90 100 103 120)
string(TOLOWER "${ADASPLASH_ARCHS}" _wanted)
string(REGEX MATCHALL "[^, ;]+" _wanted "${_wanted}")
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
elseif(_wanted STREQUAL "all")
  set(_wanted ${_known})
elseif(NOT _wanted STREQUAL "none")
  list(TRANSFORM _wanted REPLACE "^(sm_|compute_)" "")
  list(TRANSFORM _wanted REPLACE "^([0-9]+)\\.([0-9])" "\\1\\2")
  list(TRANSFORM _wanted REPLACE "^([0-9]+)[af]$" "\\1")
  list(REMOVE_DUPLICATES _wanted)
  set(_unknown ${_wanted})
  list(REMOVE_ITEM _unknown ${_known})
  if(_unknown)
    list(JOIN _known " " _known)
    list(JOIN _unknown " " _unknown)
    message(FATAL_ERROR "AdaSplash: ADASPLASH_ARCHS is '${ADASPLASH_ARCHS}', of which ${_unknown} is no architecture that "
      "there are kernels for: give some of ${_known}, or all, none or auto")
  endif()
endif()
set(ADASPLASH_BUILT_ARCHS "${_wanted}")
