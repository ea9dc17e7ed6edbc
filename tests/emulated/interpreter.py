"""Triton's interpreter, faster."""

import contextlib
import dataclasses
import warnings

import numpy as np


@contextlib.contextmanager
def patched_once():
    """Within this, the interpreter swaps the language's functions for its own once a launch, and swaps them back. Left
    to itself it does so at every call of a helper, around what is swapped already, and leaves part of it behind: that
    takes most of the time, and ever more of it. Nor does it work out whether integers overflow, which
    it does even where assertions are off. And a row's products do not depend on the rows beside it."""
    import triton.language as tl
    from triton.runtime import interpreter

    swap, scopes = interpreter._patch_lang, {}

    def swap_once(function):
        modules = tuple(id(x) for x in (tl, tl.core) if any(x is value for value in function.__globals__.values()))
        if modules not in scopes:
            scopes[modules] = swap(function)
            tl.core.tensor.__index__ = lambda self: self.handle.data.item()  # NumPy 2.4 refuses what Triton 3.6 does
        return interpreter._LangPatchScope()  # nothing for the caller to swap back

    def dot(a, b, accumulator, *precision):
        """In float64, then rounded: in float32, the order in which NumPy's library sums follows, on some processors,
        from the number of rows and a row's place among them, and with it the last bits."""
        kind = accumulator.data.dtype
        wide = np.float64 if kind == np.float32 else kind
        sums = np.matmul(a.data, b.data, dtype=wide) + accumulator.data
        return interpreter.TensorHandle(sums.astype(kind), accumulator.dtype.scalar)

    builder = interpreter.interpreter_builder
    options, create_dot = builder.options, builder.create_dot
    builder.options = dataclasses.replace(options, sanitize_overflow=False)
    builder.create_dot = dot
    interpreter._patch_lang = swap_once
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():  # infinities and NaN are part of the kernels' work
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        interpreter._patch_lang = swap
        builder.options = options
        builder.create_dot = create_dot
        for scope in reversed(scopes.values()):
            scope.restore()
