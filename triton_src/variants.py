"""Which specialisations exist. The one place that says so; the table from which C++ picks a variant at run time is
generated from it. Their tile shapes, warps and stages are data, in tiles.json.

A variant is (kernel, element type, padded head size, code for an alpha), and of those that may gather whether they walk
tiles or gather what is marked. Everything else is a run-time value: causal, window, lengths, grouped queries, scale, M
and N, head sizes below the padded one; and, in the code for any alpha, alpha itself, its gradient, ALiBi and dropout,
all of which the code for one alpha leaves out to stay short. All take rows that start at multiples of ALIGNMENT, which
the host sees to.
"""

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from .activation import ACTIVATE, ACTIVATE_GRAD
from .attention.count import COUNT_SUPPORT
from .attention.few import (
    JOIN_FEW,
    SCORE_FEW,
    SCORE_FEW_EVEN,
    SCORE_FEW_PAGED,
    SOLVE_FEW,
    SOLVE_FEW_PAGED,
    WEIGH_FEW,
    WEIGH_FEW_EVEN,
    WEIGH_FEW_PAGED,
)
from .attention.few_indexed import SCAN_INDEX, SCAN_INDEX_EVEN, SCORE_FOUND, SCORE_FOUND_EVEN, TURN_QUERIES
from .attention.forward import ATTEND, ATTEND_PAGED
from .attention.grad_key_value import GRAD_KEY_VALUE
from .attention.grad_query import GRAD_QUERY
from .attention.mark import MARK
from .cache import APPEND, INDEX_KEYS
from .lib.entmax import ALPHA_1_5, ALPHA_2, ALPHA_ANY
from .spec import ATTENTION_TYPES, Spec

DEFAULT_ARCHS = (80, 90)

# Shared memory that a block may ask for, in KiB (CUDA C++ programming guide, compute capabilities).
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
ARCHS = tuple(SHARED_KIB)

ALPHAS = {"any": ALPHA_ANY.value, "1_5": ALPHA_1_5.value, "2": ALPHA_2.value}

ATTENTION = {
    spec.name: spec
    for spec in (
        *(ATTEND, MARK, GRAD_QUERY, GRAD_KEY_VALUE, COUNT_SUPPORT),
        *(SCORE_FEW, SOLVE_FEW, WEIGH_FEW, JOIN_FEW),
        *(ATTEND_PAGED, SCORE_FEW_PAGED, SOLVE_FEW_PAGED, WEIGH_FEW_PAGED),
        *(SCORE_FEW_EVEN, WEIGH_FEW_EVEN),
        *(TURN_QUERIES, SCAN_INDEX, SCAN_INDEX_EVEN, SCORE_FOUND, SCORE_FOUND_EVEN),
    )
}
CACHE = {spec.name: spec for spec in (APPEND, INDEX_KEYS)}
ACTIVATION = {spec.name: spec for spec in (ACTIVATE, ACTIVATE_GRAD)}
KERNELS: dict[str, Spec] = ATTENTION | CACHE | ACTIVATION

LARGEST_HEAD = 256
HEADS = (64, 128, LARGEST_HEAD)  # padded head sizes
LONGEST_ROW = 1 << 30  # places in a row are 32 bits wide, with room for a block
TILES = Path(__file__).resolve().parent / "tiles.json"


@dataclass(frozen=True)
class Shape:
    """How a program goes about its work."""

    block_m: int  # rows at a time
    block_n: int  # keys, or numbers of a row, at a time
    warps: int
    stages: int = 1
    registers: int | None = None  # at most so many a thread, so that more programs fit a multiprocessor; None: no limit
    step_d: int | None = None  # head dimensions at a time in q.k, see lib.matrices.products
    scan_n: int | None = None  # keys that are scanned at a time
    ahead: bool = False  # products of a step begin before the step before is finished, see sum_inner in forward.py


@dataclass(frozen=True)
class Variant:
    kernel: str
    dtype: str
    block_d: int  # head size that registers and shared memory are laid out for; of an activation, its longest row
    alpha: str  # a key of ALPHAS
    shape: Shape
    gather: bool = False  # gathers what is marked; else whole tiles
    hot: bool = False  # most used: has limits of its own in limits.json

    @property
    def spec(self) -> Spec:
        return KERNELS[self.kernel]

    @property
    def name(self) -> str:
        if self.kernel in ATTENTION:
            return f"{self.kernel}_{self.dtype}_d{self.block_d}_a{self.alpha}{'_marked' if self.gather else ''}"
        if self.kernel in CACHE:
            return f"{self.kernel}_{self.dtype}_d{self.block_d}"
        rows = "long" if self.block_d == LONGEST_ROW else f"n{self.block_d}"
        return f"{self.kernel}_{self.dtype}_{rows}" + (f"_a{self.alpha}" if len(self.spec.alphas) > 1 else "")

    @property
    def entry(self) -> str:
        """What limits.json calls the kernel's code: that which gathers has a name of its own."""
        return f"{self.kernel}_marked" if self.gather else self.kernel

    def constants(self, arch: int) -> dict:
        known = dict(
            BLOCK_M=self.shape.block_m,
            BLOCK_N=self.shape.block_n,
            BLOCK_D=self.block_d,
            STEP_D=self.shape.step_d,
            SCAN_N=self.shape.scan_n,
            AHEAD=self.shape.ahead,
            STAGES=self.shape.stages,
            ALPHA=ALPHAS[self.alpha],
            GATHER=self.gather,
            LONG=self.block_d == LONGEST_ROW,
            ARCH=arch,
        )
        return {name: known[name] for name in self.spec.constants}

    def arguments(self) -> list[tuple[str, str]]:
        """[(name, Triton's type)] of the run-time arguments, flat and in order."""
        return [(leaf.name, leaf.type.replace("T", self.dtype)) for leaf in self.spec.leaves()]

    def divisibility(self) -> dict[str, int]:
        """{name: divisor} of what is a multiple of ALIGNMENT."""
        return {leaf.name: leaf.divisor(self.dtype) for leaf in self.spec.leaves() if leaf.aligned}


# ---- tile shapes -----------------------------------------------------------------------------------------------------
# Those of sm_90 were the fastest on a GPU, those of sm_80 are the ones that spill little. `python -m triton_src.tune`
# tries shapes. A program of attention takes a tile of rows (grad_key_value: of keys), and along the other side a tile
# or part of one at a time; what attend scans at a time are whole tiles.


@functools.cache
def shapes() -> dict:
    """tiles.json: "attention" is tables, each for some architectures, types and alphas; "cache" is by kernel
    and head size; "activation" is by the longest row that a program takes, of any length where that is null."""
    return json.loads(TILES.read_text())


def format_shapes(data: dict) -> str:
    """The text of tiles.json, a shape a line."""
    lines = ["{"]
    for part, tables in data.items():
        lines.append(f' "{part}": [')
        for table in tables:
            if "shapes" not in table:
                lines.append(f"  {json.dumps(table)},")
                continue
            lines.append(f'  {json.dumps({k: v for k, v in table.items() if k != "shapes"})[:-1]}, "shapes": [')
            lines += [f"   {json.dumps(shape)}," for shape in table["shapes"]]
            lines[-1] = lines[-1][:-1]
            lines.append("  ]},")
        lines[-1] = lines[-1][:-1]
        lines.append(" ],")
    lines[-1] = lines[-1][:-1]
    return "\n".join([*lines, "}", ""])


def shape_table(data: dict, arch: int, dtype: str, alpha: str) -> dict:
    """The table of attention's shapes that is for a variant."""
    for table in data["attention"]:
        if arch in table["archs"] and dtype in table["types"] and alpha in table["alphas"]:
            return table
    raise LookupError(f"{TILES}: no table for sm_{arch}, {dtype}, alpha {alpha}")


def attention_shape(arch: int, kernel: str, dtype: str, block_d: int, alpha: str, gather: bool) -> Shape:
    place = dict(kernel=kernel, gather=gather, block_d=block_d)
    for line in shape_table(shapes(), arch, dtype, alpha)["shapes"]:
        if place.items() <= line.items():
            return Shape(**{name: value for name, value in line.items() if name not in place})
    raise LookupError(f"{TILES}: no shape for sm_{arch}, {dtype}, alpha {alpha}, {place}")


def put_shape(data: dict, arch: int, variant: Variant) -> None:
    """Puts a variant's shape into the table that it is from."""
    place = dict(kernel=variant.kernel, gather=variant.gather, block_d=variant.block_d)
    for line in shape_table(data, arch, variant.dtype, variant.alpha)["shapes"]:
        if place.items() <= line.items():
            line.pop("ahead", None)  # only lines of shapes that go ahead have it
            line.update({name: value for name, value in asdict(variant.shape).items() if name in line or value is True})
            return
    raise LookupError(f"{TILES}: no shape for sm_{arch}, {variant.name}")


# ---- what exists -----------------------------------------------------------------------------------------------------


def specialisations():
    """Yields (dtype, block_d, alpha) of attention. Fast code for alpha = 1.5 and 2 exists where it pays: half types up
    to head size 128. Above, and for fp32, matrix products weigh more than the powers."""
    for dtype in ATTENTION_TYPES:
        for block_d in HEADS:
            for alpha in ALPHAS if dtype != "fp32" and block_d < LARGEST_HEAD else ("any",):
                yield dtype, block_d, alpha


def attention_variants(arch: int):
    for dtype, block_d, alpha in specialisations():
        hot = arch in DEFAULT_ARCHS and block_d <= 128 and alpha in ("1_5", "2")
        for kernel, spec in ATTENTION.items():
            if alpha not in spec.alphas or dtype not in spec.types:
                continue
            for gather in (False, True) if spec.gathers else (False,):
                shape = attention_shape(arch, kernel, dtype, block_d, alpha, gather)
                yield Variant(kernel, dtype, block_d, alpha, shape, gather, hot)


def cache_variants():
    """Rows are copied as they are, so one code serves all head sizes; that which makes codes of keys is laid out for
    theirs."""
    for dtype in ATTENTION_TYPES:
        for line in shapes()["cache"]:
            shape = Shape(**{name: value for name, value in line.items() if name not in ("kernel", "block_d")})
            yield Variant(line["kernel"], dtype, line["block_d"], "any", shape)


def activation_variants():
    """The gradient reads and writes more than it computes, so one code serves all alphas there."""
    for dtype in ATTENTION_TYPES:
        for line in shapes()["activation"]:
            shape = Shape(**{name: value for name, value in line.items() if name != "longest_row"})
            for kernel, spec in ACTIVATION.items():
                for alpha in spec.alphas:
                    yield Variant(kernel, dtype, line["longest_row"] or LONGEST_ROW, alpha, shape)


def variants(arch: int) -> list[Variant]:
    """All variants of an architecture, in a fixed order."""
    return [*attention_variants(arch), *cache_variants(), *activation_variants()]
