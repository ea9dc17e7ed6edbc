"""Which specialisations exist. The one place that says so: tile shapes, warps and stages are data here, and the table
from which C++ picks a variant at run time is generated from it.

A variant is (kernel, element type, padded head size, kind of alpha), and of two kernels whether they walk tiles or
gather what is marked. Everything else is a run-time value: causal, window, lengths, grouped queries, scale, M and N,
head sizes below the padded one; and, in the code for any alpha, alpha itself, its gradient and ALiBi, which the code
for one alpha leaves out to stay short. All take rows that start at multiples of ALIGNMENT, which the host sees to.
"""

from dataclasses import dataclass

from . import activation, backward, forward
from .common import ALPHA_1_5, ALPHA_2, ALPHA_ANY

DEFAULT_ARCHS = (80, 90)

# Shared memory that a block may ask for, in KiB (CUDA C++ programming guide, compute capabilities).
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
ARCHS = tuple(SHARED_KIB)

# Triton's name for an element type: (its size, the C++ enumerator of torch's type).
TYPES = {"bf16": (2, "at::kBFloat16"), "fp16": (2, "at::kHalf"), "fp32": (4, "at::kFloat")}

ALPHAS = {"any": ALPHA_ANY.value, "1_5": ALPHA_1_5.value, "2": ALPHA_2.value}

# Bytes that the rows of tensors start at multiples of (kAlignment in csrc/cuda/call.cpp): one load of a thread.
ALIGNMENT = 16

ATTENTION = {
    "attend": forward.attend,
    "mark": backward.mark,
    "grad_query": backward.grad_query,
    "grad_key_value": backward.grad_key_value,
}
MARKED = ("grad_query", "grad_key_value")  # kernels with code for what `mark` marked as well
KERNELS = ATTENTION | {
    "activate": activation.activate,
    "activate_grad": activation.activate_grad,
}

TENSORS = ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value")
# What the names of kernel arguments mean, with `T` for the variant's element type. Names not listed here are found by
# their ending (strides) or are 32-bit integers.
ARGUMENT_TYPES = {
    **dict.fromkeys(TENSORS, "*T"),
    **dict.fromkeys(("input", "output", "grad_input"), "*T"),
    **dict.fromkeys(("row_state", "terms", "alpha_terms", "alphas", "slopes", "row_alpha", "grad_alpha"), "*fp32"),
    **dict.fromkeys(("rows", "own_alphas"), "i64"),
    **dict.fromkeys(("numbers", "row_marks"), "*i16"),
    **dict.fromkeys(("tiles", "lists", "key_marks", "marks", "chosen", "shares", "lengths_q", "lengths_k"), "*i32"),
    **dict.fromkeys(("scale", "alpha"), "fp32"),
    **dict.fromkeys(("slopes_batch", "state_batch"), "i64"),
}
# What each kernel writes; all other pointers are const in C++.
WRITTEN = {
    "attend": ("out", "row_state", "tiles", "numbers", "lists"),
    "mark": ("lists", "key_marks", "row_marks", "shares"),
    "grad_query": ("grad_query", "terms", "alpha_terms", "lists", "chosen"),
    "grad_key_value": ("grad_key", "grad_value", "lists", "chosen"),
    "activate": ("out",),
    "activate_grad": ("grad_input", "grad_alpha"),
}
STRIDE_ENDINGS = ("_batch", "_head", "_row")
# Pointers that Triton appends to every kernel; no variant needs the memory, so they are null.
APPENDED = (("global_scratch", "*i8"), ("profile_scratch", "*i8"))


def entry(kernel, marked):
    """What the tables below and limits.json call a kernel's code: that which gathers has a name of its own."""
    return f"{kernel}_marked" if marked else kernel


@dataclass(frozen=True)
class Variant:
    kernel: str
    dtype: str
    pad: int  # head size that registers and shared memory are laid out for
    alpha: str  # a key of ALPHAS
    block_m: int
    block_n: int
    step: int  # columns at a time in q.k, see common.products
    warps: int
    stages: int
    registers: int | None  # at most so many a thread, so that more programs fit a multiprocessor; None: no limit
    scan_n: int | None = None  # keys that attend scans at a time
    marked: bool = False  # gathers what `mark` marked; else whole tiles
    hot: bool = False  # most used: has limits of its own in limits.json

    @property
    def name(self):
        return f"{self.kernel}_{self.dtype}_d{self.pad}_a{self.alpha}{'_marked' if self.marked else ''}"

    @property
    def constants(self):
        found = dict(BLOCK_M=self.block_m, BLOCK_N=self.block_n, PAD=self.pad, STEP=self.step, ALPHA=ALPHAS[self.alpha])
        if self.scan_n is not None:
            found["SCAN_N"] = self.scan_n
        if self.kernel in MARKED:
            found["MARKED"] = self.marked
        return found

    def arguments(self):
        """[(name, Triton's type)] of the run-time arguments, in order."""
        found = []
        for name in KERNELS[self.kernel].arg_names:
            if name in self.constants:
                continue
            kind = ARGUMENT_TYPES.get(name, "i64" if name.endswith(STRIDE_ENDINGS) else "i32")
            found.append((name, kind.replace("T", self.dtype)))
        return found

    def divisibility(self):
        """{name: divisor} of what is a multiple of ALIGNMENT: addresses, strides and widths of the tensors that matrix
        products read or make."""
        divisors = {}
        for name, _kind in self.arguments():
            if name in TENSORS:
                divisors[name] = ALIGNMENT  # bytes
            elif name in ("width", "width_v") or (name.endswith(STRIDE_ENDINGS) and name not in ARGUMENT_TYPES):
                divisors[name] = ALIGNMENT // TYPES[self.dtype][0]  # elements
        return divisors


# (BLOCK_M, BLOCK_N, columns at a time, warps, stages, registers; for attend also how many keys it scans at a time).
# Those of sm_90 were the fastest on a GPU, those of sm_80 are the ones that spill little. `python -m triton_src.tune`
# tries shapes. A program takes a tile of rows (grad_key_value: of keys), and along the other side a tile or part of one
# at a time; what attend scans at a time are whole tiles. Code that gathers has the shape of the kernel's other code
# where it has no entry of its own.
HALF_90 = {  # sm_90, sm_100, sm_103: matrix products that read shared memory, 227 KiB of it
    ("attend", 64): (64, 64, 64, 4, 3, 168, 128),
    ("attend", 128): (64, 64, 128, 4, 3, None, 128),
    ("attend", 256): (64, 32, 256, 8, 2, None, 128),
    ("mark", 64): (64, 64, 64, 4, 3, None),
    ("mark", 128): (64, 64, 128, 4, 3, None),
    ("mark", 256): (64, 32, 256, 8, 2, None),
    ("grad_query", 64): (64, 64, 64, 4, 3, None),
    ("grad_query", 128): (64, 32, 128, 4, 3, None),
    ("grad_query", 256): (64, 32, 128, 8, 1, None),
    ("grad_key_value", 64): (64, 64, 64, 4, 3, None),
    ("grad_key_value", 128): (32, 64, 128, 4, 3, None),
    ("grad_key_value", 256): (32, 64, 128, 8, 1, None),
    ("grad_query_marked", 64): (64, 32, 64, 4, 3, 168),
    ("grad_key_value_marked", 64): (32, 64, 64, 4, 3, 168),
}
HALF_80 = {  # sm_80: operands of matrix products are registers
    **HALF_90,
    ("attend", 64): (64, 64, 64, 4, 2, None, 64),
    ("attend", 128): (64, 32, 128, 8, 2, None, 128),
    ("mark", 64): (64, 64, 64, 4, 2, None),
    ("mark", 128): (64, 64, 128, 4, 2, None),
    ("grad_query", 64): (64, 64, 64, 4, 2, None),
    ("grad_query", 128): (64, 64, 128, 8, 2, None),
    ("grad_key_value", 64): (32, 64, 64, 4, 2, None),
    ("grad_key_value", 128): (32, 64, 128, 8, 2, None),
    ("grad_query_marked", 64): (64, 64, 64, 4, 2, None),
    ("grad_key_value_marked", 64): (32, 64, 64, 4, 2, None),
}
HALF_SMALL = {  # sm_86, sm_89, sm_120: as sm_80, with 99 KiB of shared memory
    **HALF_80,
    ("attend", 256): (64, 32, 128, 8, 1, None, 64),
    ("mark", 256): (64, 32, 128, 8, 1, None),
}
HALF = dict.fromkeys((90, 100, 103), HALF_90) | {80: HALF_80} | dict.fromkeys((86, 89, 120), HALF_SMALL)
ANY_90 = {  # half types and any alpha: powers want registers
    ("attend", 64): (64, 32, 64, 4, 3, 168, 128),
    ("attend", 128): (64, 32, 128, 4, 3, 168, 64),
    ("mark", 64): (64, 64, 64, 4, 3, None),
    ("mark", 128): (64, 64, 128, 4, 3, None),
    ("grad_query", 64): (64, 32, 64, 4, 3, None),
    ("grad_query", 128): (64, 32, 128, 4, 3, None),
    ("grad_key_value", 64): (32, 64, 64, 4, 3, None),
    ("grad_key_value", 128): (32, 64, 128, 4, 3, None),
}
ANY_80 = {
    **ANY_90,
    ("attend", 64): (64, 32, 64, 8, 2, None, 64),
    ("attend", 128): (64, 32, 128, 8, 2, None, 64),
    ("mark", 64): (64, 64, 64, 4, 2, None),
    ("mark", 128): (64, 64, 128, 4, 2, None),
    ("grad_query", 128): (64, 32, 64, 8, 2, None),
    ("grad_key_value", 128): (32, 64, 128, 8, 2, None),
}
ANY = dict.fromkeys((90, 100, 103), ANY_90) | dict.fromkeys((80, 86, 89, 120), ANY_80)
FP32 = {  # six bf16 products for one: large code and many registers, so small blocks
    (kernel, pad): {
        "attend": (64, 32, 32, 8, 1, None, 64),
        "mark": (64, 32, 32, 8, 1, None),
        "grad_query": (64, 32, 32, 8, 1, None),
        "grad_key_value": (32, 64, 32, 8, 1, None),
    }[kernel]
    for kernel in ATTENTION
    for pad in (64, 128, 256)
}


def tile(arch, kernel, dtype, pad, alpha, marked):
    if dtype == "fp32":
        return FP32[kernel, pad]
    table = (ANY if alpha == "any" and pad <= 128 else HALF)[arch]
    return table.get((entry(kernel, marked), pad), table[kernel, pad])


def specialisations():
    """Yields (dtype, pad, alpha). Fast code for alpha = 1.5 and 2 exists where it pays: half types up to head size 128.
    Above, and for fp32, matrix products weigh more than the powers."""
    for dtype in TYPES:
        for pad in (64, 128, 256):
            for alpha in ALPHAS if dtype != "fp32" and pad < 256 else ("any",):
                yield dtype, pad, alpha


@dataclass(frozen=True)
class ActivationVariant(Variant):
    """`pad` is the longest row; a program does block_m rows, block_n numbers of each at a time."""

    @property
    def name(self):
        alpha = f"_a{self.alpha}" if self.kernel == "activate" else ""
        return f"{self.kernel}_{self.dtype}_{'long' if self.pad == LONGEST_ROW else f'n{self.pad}'}{alpha}"

    @property
    def constants(self):
        constants = dict(BLOCK_M=self.block_m, BLOCK_N=self.block_n, LONG=self.pad == LONGEST_ROW)
        return {**constants, "ALPHA": ALPHAS[self.alpha]} if self.kernel == "activate" else constants

    def divisibility(self):
        return {}  # rows of any length, one behind the other


LONGEST_ROW = 1 << 30  # places in a row are 32 bits wide, with room for a block
# Longest row: (rows of a program, numbers of a row at a time, warps).
ACTIVATIONS = {128: (8, 128, 4), 1024: (2, 1024, 4), 4096: (1, 4096, 8), LONGEST_ROW: (1, 4096, 8)}


def activations():
    """The gradient reads and writes more than it computes, so one code serves all alphas there."""
    for dtype in TYPES:
        for longest, (rows, block, warps) in ACTIVATIONS.items():
            for kernel, alphas in (("activate", ("any", "1_5", "2")), ("activate_grad", ("any",))):
                for alpha in alphas:
                    yield ActivationVariant(kernel, dtype, longest, alpha, rows, block, block, warps, 1, None)


def variants(arch):
    """All variants of an architecture, without repetition, in a fixed order."""
    found = {}
    for dtype, pad, alpha in specialisations():
        hot = arch in DEFAULT_ARCHS and pad <= 128 and alpha in ("1_5", "2")
        for kernel in ATTENTION:
            for marked in (False, True) if kernel in MARKED else (False,):
                shape = tile(arch, kernel, dtype, pad, alpha, marked)
                variant = Variant(kernel, dtype, pad, alpha, *shape, marked=marked, hot=hot)
                found[variant.name] = variant
    return [*found.values(), *activations()]
