// For headers that are compiled once for every instruction set: a function there that is not inlined would be shared by
// all of them, in whichever version the linker keeps.
#pragma once

#define ADASPLASH_INLINE [[gnu::always_inline]] inline
#define ADASPLASH_INLINE_LAMBDA __attribute__((always_inline))
