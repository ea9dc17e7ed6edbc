"""What is said of a kernel beside it, for all that is not Triton: the compiler, the generated C++, tests, the tuner.

An argument is a type, or a named tuple of arguments with a type for each of its parts. A type is a word of Triton's, as
"*i32" or "fp32", with T for the element type that a variant is compiled for.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from .lib.call import Call, Few
from .lib.codes import KeyIndex
from .lib.dropout import Dropout
from .lib.entmax import Alpha
from .lib.matrices import EvenPagedMatrix, Matrix, PagedMatrix
from .lib.scores import Scores
from .lib.visibility import Sequences

# Bytes that rows of tensors start at multiples of (kAlignment in csrc/cuda/portable/call.cpp): one load of a thread.
ALIGNMENT = 16
# Sizes of element types, by Triton's names: those of attention, and that of codes.
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "u8": 1}
ATTENTION_TYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Aligned:
    """A type whose values are multiples of ALIGNMENT bytes: an address, or a number of elements."""

    type: str


MATRIX = Matrix(data=Aligned("*T"), batch_stride=Aligned("i64"), head_stride=Aligned("i64"), row_stride=Aligned("i64"))
PAGED_MATRIX = PagedMatrix(
    data=Aligned("*T"), block_stride=Aligned("i32"), head_stride=Aligned("i64"), row_stride=Aligned("i64"),
    table="*i32", table_stride="i64", blocks="i32", page_size="i32", page_inverse="i32", page_shift="i32",
)  # fmt: skip
EVEN_PAGED_MATRIX = EvenPagedMatrix(
    data=Aligned("*T"), block_stride=Aligned("i32"), head_stride=Aligned("i64"), row_stride=Aligned("i64"),
    table="*i32", table_stride="i64", blocks="i32", page_bits="i32",
)  # fmt: skip
KEY_INDEX = KeyIndex(
    codes=Aligned("*u8"), norms="*fp32", header="*i32", page_stride=Aligned("i64"), head_stride=Aligned("i64"),
    blocks="i32", page_size="i32", kv_heads="i32", head_dim="i32", element="i32",
)  # fmt: skip
SEQUENCES = Sequences(lengths="*i32", lengths_kind="i32", rows="i32", max_seqlen="i32", tile_rows="i32")
CALL = Call(
    queries=SEQUENCES,
    keys=SEQUENCES,
    alpha=Alpha(per_head="*fp32", source="i32", number="fp32"),
    scores=Scores(
        slopes="*fp32",
        slopes_batch_stride="i64",
        has_slopes="i32",
        scale="fp32",
        window_left="i32",
        window_right="i32",
        q_positions="*i32",
        has_positions="i32",
    ),
    dropout=Dropout(
        seed="*i64",
        threshold="i32",
        scale="fp32",
        first_batch="i32",
        first_head="i32",
        origins="*i32",
        has_origins="i32",
    ),
    state_batch_stride="i64",
    heads="i32",
    group="i32",
    tile_words="i32",
    head_dim=Aligned("i32"),
    value_dim=Aligned("i32"),
    few_queries="i32",
)
FEW = Few(queries="i32", rows="i32", row_tiles="i64", scorers="i32", weighers="i32", marks_tiles="i32")
# Pointers that Triton appends to every kernel; no variant needs the memory, so they are null.
APPENDED = (("global_scratch", "*i8"), ("profile_scratch", "*i8"))


@dataclass(frozen=True)
class Leaf:
    """A scalar among a kernel's arguments."""

    path: tuple[int, ...]  # of indices, from the argument down
    name: str  # as call.queries.lengths
    type: str
    aligned: bool

    def divisor(self, dtype: str) -> int | None:
        """What its values are multiples of, in code for an element type."""
        if not self.aligned:
            return None
        return ALIGNMENT if self.type.startswith("*") else ALIGNMENT // ELEMENT_BYTES[dtype]


def is_group(argument: Any) -> bool:
    return hasattr(argument, "_fields")


@dataclass(frozen=True)
class Spec:
    kernel: Any  # the function
    arguments: dict[str, Any]  # at run time, in order
    writes: tuple[str, ...]  # the arguments that it writes to; all other memory is only read
    constants: tuple[str, ...]  # the parameters that a variant decides
    programs: str  # what one of them works on, and how many there are
    shapes: str  # the part of tiles.json that has its tile shapes
    gathers: bool = False  # whether there is also code, with GATHER, for what is marked
    alphas: tuple[str, ...] = ("any", "1_5", "2")  # that code may be made for; "any" serves those that have none
    types: tuple[str, ...] = ATTENTION_TYPES  # of elements that code is made for
    scratch: dict[str, str] = field(default_factory=dict)  # memory the caller lends it, and what of it
    suffix: str = ""  # of the name, where a function is compiled over arguments of other types too

    def __post_init__(self):
        if [*self.arguments, *self.constants] != self.kernel.arg_names:
            raise ValueError(f"{self.name}: the spec's arguments and constants are not the kernel's parameters")
        if not {*self.writes, *self.scratch} <= set(self.arguments):
            raise ValueError(f"{self.name}: writes or scratch of what is no argument")

    @property
    def name(self) -> str:
        return self.kernel.__name__ + self.suffix

    def over_pages(self, **changes) -> "Spec":
        """The spec of the same function over keys and values in a paged cache."""
        return self._over(PAGED_MATRIX, suffix="_paged", **changes)

    def over_even_pages(self, **changes) -> "Spec":
        """… in one whose pages are even (EvenPagedMatrix)."""
        return self._over(EVEN_PAGED_MATRIX, suffix="_even", **changes)

    def _over(self, matrix, **changes) -> "Spec":
        arguments = {
            name: matrix if name in ("key", "value") else argument for name, argument in self.arguments.items()
        }
        return replace(self, arguments=arguments, **changes)

    def leaves(self) -> list[Leaf]:
        """All scalars, in the order in which they are passed."""
        found = []

        def visit(path, name, argument):
            if is_group(argument):
                for index, part in enumerate(argument._fields):
                    visit((*path, index), f"{name}.{part}", argument[index])
            elif isinstance(argument, Aligned):
                found.append(Leaf(path, name, argument.type, True))
            else:
                found.append(Leaf(path, name, argument, False))

        for index, (name, argument) in enumerate(self.arguments.items()):
            visit((index,), name, argument)
        return found

    def build(self, values: dict[str, Any]) -> dict[str, Any]:
        """The arguments, named tuples where they are, of values by the leaves' names."""

        def made(name, argument):
            if is_group(argument):
                return type(argument)(*(made(f"{name}.{part}", getattr(argument, part)) for part in argument._fields))
            return values[name]

        return {name: made(name, argument) for name, argument in self.arguments.items()}
