"""triton_src.compare: what counts as the same machine code."""

import sys

import pytest

from common import ROOT

sys.path.append(str(ROOT))
from triton_src.compare import current_name, normalised

pytestmark = pytest.mark.backends("cpu")

OLD = {
    "name": "old",
    "symbol": "adasplash_old",
    "arguments": [["query", "*bf16"], ["query_row", "i64"], ["heads", "i32"]],
}
NEW = {
    "name": "new",
    "symbol": "adasplash_new",
    "arguments": [["call.heads", "i32"], ["query.data", "*bf16"], ["query.row_stride", "i64"]],
}
# Twice the same kernel: parameters in another order, which moves their loads, renumbers registers and turns operands.
BEFORE = """
.visible .entry adasplash_old(
	.param .u64 adasplash_old_param_0,
	.param .u64 adasplash_old_param_1,
	.param .u32 adasplash_old_param_2
)
{
	.reg .b32 	%r<5>;
	ld.param.b64 	%rd1, [adasplash_old_param_0]; // a comment
	ld.param.b32 	%r1, [adasplash_old_param_2];
	add.s32 	%r2, %r1, 63;
	mul.lo.s32 	%r3, %r1, %r2;
	sub.s32 	%r4, %r3, %r1;
	st.global.b32 	[%rd1], %r4;
}
"""
AFTER = """
.visible .entry adasplash_new(
	.param .u32 adasplash_new_param_0,
	.param .u64 adasplash_new_param_1,
	.param .u64 adasplash_new_param_2
)
{
	.reg .b32 	%r<6>;
	ld.param.b32 	%r2, [adasplash_new_param_0];
	add.s32 	%r3, %r2, 63;
	mul.lo.s32 	%r5, %r3, %r2;
	sub.s32 	%r1, %r5, %r2;
	ld.param.b64 	%rd7, [adasplash_new_param_1];
	st.global.b32 	[%rd7], %r1;
}
"""


def test_names_and_the_order_of_parameters_do_not_count():
    assert normalised(BEFORE, OLD) == normalised(AFTER, NEW)


@pytest.mark.parametrize(
    "old, new",
    (
        ("sub.s32 	%r1, %r5, %r2", "sub.s32 	%r1, %r2, %r5"),  # which does not commute
        ("sub.s32", "add.s32"),
        ("%r2, 63", "%r2, 64"),
        ("_param_1];", "_param_2];"),  # another argument of the same type
        ("mul.lo.s32 	%r5, %r3, %r2", "mul.lo.s32 	%r5, %r3, %r3"),
        ("	st.global.b32 	[%rd7], %r1;\n", ""),
    ),
)
def test_all_else_counts(old, new):
    assert old in AFTER
    assert normalised(BEFORE, OLD) != normalised(AFTER.replace(old, new), NEW)


def test_the_order_of_instructions_counts():
    lines = AFTER.splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if "sub.s32" in line)
    swapped = [*lines[: first - 1], lines[first], lines[first - 1], *lines[first + 1 :]]
    assert normalised(BEFORE, OLD) != normalised("".join(swapped), NEW)


def test_what_it_does_not_know_is_an_error():
    with pytest.raises(ValueError, match="in a way that this does not know"):
        normalised(AFTER.replace("ld.param.b32 	%r2", "ld.param.v2.b32 	{%r2, %r9}"), NEW)


def test_names_of_arguments():
    names = ["query", "query_row", "slopes", "slopes_batch", "alpha", "heads"]
    expected = ["query.data", "query.row_stride", "call.scores.slopes", "call.scores.slopes_batch_stride"]
    assert [current_name(name, names) for name in names] == [*expected, "call.alpha.number", "call.heads"]
    activation = ["input", "alpha"]
    assert [current_name(name, activation) for name in activation] == activation
