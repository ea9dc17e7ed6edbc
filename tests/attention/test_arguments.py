"""Arguments of another kind than documented: each public function works as it says, or says in one sentence that names
it and the argument what it wanted. What torch's parser would take for something else counts as well: None for False,
True for 1, 5 for (5, 5)."""

import pytest
import torch

import adasplash
from common import make_inputs

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
ENDS = torch.tensor([0, 3, 7])
WRONG = {
    "tensor": (None, True, 3, 2.5, "text", [1.0]),
    "tensor or none": (True, 3, 2.5, "text", [1]),
    "number or tensor": (None, True, "1.5", [1.5]),
    "scale": (True, "1.5", [1.5], torch.ones(4), torch.tensor(True), torch.ones(()) + 0j),
    "bool": (None, 1, 0.0, "text", torch.tensor(True)),
    "window": (None, True, 5, 2.5, "text", (), (1,), (1, 2, 3), (1.0, 2), (None, 1), (True, 1), (2**64, 0), X[0]),
    "integer": (None, True, 2.5, "text", torch.tensor(1)),
    "length": (None, True, 2.5, "text", torch.tensor([1, 2])),
}


def padded() -> dict:
    return make_inputs(2, 4, 5, 5, 8, kv_heads=2)._asdict()


def packed() -> dict:
    tensors = {name: x[0].transpose(0, 1) for name, x in make_inputs(1, 4, 7, 7, 8)._asdict().items()}
    return {**tensors, "cu_seqlens_q": ENDS, "cu_seqlens_k": ENDS, "max_seqlen_q": 4, "max_seqlen_k": 4}


def compat() -> dict:
    return dict(zip("qkv", padded().values(), strict=True))


TENSORS = dict.fromkeys(("query", "key", "value"), "tensor")
OPTIONS = {"alpha": "number or tensor", "is_causal": "bool", "scale": "scale", "window": "window"}
PADDED = {**TENSORS, **OPTIONS, **dict.fromkeys(("q_seqlens", "kv_seqlens", "alibi_slopes"), "tensor or none")}
PACKED = {
    **TENSORS,
    **OPTIONS,
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), "tensor"),
    **dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), "length"),
    "alibi_slopes": "tensor or none",
}
SHORT = {**dict.fromkeys("qkv", "tensor"), "varlen": "tensor or none"}
LONG = {**SHORT, "alpha": "number or tensor", "is_causal": "bool"}

# Name -> (good arguments, the kind of each argument)
FUNCTIONS = {
    "entmax_attn": (padded, PADDED),
    "attention_stats": (padded, PADDED),
    "attention_weights": (padded, PADDED),
    "entmax_attn_varlen": (packed, PACKED),
    "adasplash": (compat, LONG),
    "adasplash_v1": (compat, LONG),
    "adasplash_no_block_mask": (compat, LONG),
    "adasplash_v2": (compat, SHORT),
    "entmax": (lambda: {"input": X}, {"input": "tensor", "alpha": "number or tensor", "dim": "integer"}),
    "sparsemax": (lambda: {"input": X}, {"input": "tensor", "dim": "integer"}),
    "entmax15": (lambda: {"input": X}, {"input": "tensor", "dim": "integer"}),
    "triton_entmax": (lambda: {"x": X}, {"x": "tensor", "alpha": "number or tensor"}),
    "triton_entmax_v1": (lambda: {"x": X}, {"x": "tensor", "alpha": "number or tensor"}),
}
CASES = [(function, name) for function, (_, kinds) in FUNCTIONS.items() for name in kinds]


@pytest.mark.parametrize("function, name", CASES, ids=map(" ".join, CASES))
def test_wrong_kinds(function, name):
    good, kinds = FUNCTIONS[function]
    getattr(adasplash, function)(**good())
    for value in WRONG[kinds[name]]:
        with pytest.raises((TypeError, RuntimeError)) as error:
            getattr(adasplash, function)(**good() | {name: value})
        message = str(error.value)
        assert message.startswith(f"{function}: {name} must be ") and "\n" not in message, message
        assert error.value.__cause__ is None


@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_values_name_the_function_too(function):
    """Checks of the op itself, in the words of who was called."""
    good, kinds = FUNCTIONS[function]
    first = next(iter(kinds))
    with pytest.raises((TypeError, RuntimeError)) as error:
        getattr(adasplash, function)(**good() | {first: X.int()})
    message = str(error.value)
    assert message.startswith(f"{function}: {first} must be ") and "\n" not in message, message
    if "alpha" in kinds:
        with pytest.raises(RuntimeError, match=rf"^{function}: alpha must be (1 or )?from 1.01 to 2, got 3"):
            getattr(adasplash, function)(**good(), alpha=3.0)
    if "varlen" in kinds:
        with pytest.raises(RuntimeError, match=rf"^{function}: varlen must be from 0 to .* got 9"):
            getattr(adasplash, function)(**good(), varlen=torch.tensor([5, 9]))


def test_what_stays_accepted():
    """Numbers of any kind for a number, a list for the window, integers of NumPy."""
    numpy = pytest.importorskip("numpy")
    inputs = make_inputs(2, 4, 5, 5, 8)
    expected = adasplash.entmax_attn(*inputs, 2.0, scale=1.0, window=(2, 1))
    for two, one in ((2, 1), (numpy.float64(2), numpy.float32(1)), (numpy.int64(2), numpy.int32(1))):
        assert torch.equal(adasplash.entmax_attn(*inputs, two, scale=one, window=[2, 1]), expected)
    assert torch.equal(adasplash.entmax_attn(*inputs, 2.0, scale=1.0, window=(numpy.int64(2), 1)), expected)
    assert torch.equal(adasplash.sparsemax(X, numpy.int64(0)), adasplash.sparsemax(X, 0))


def test_fx_traces_through():
    """What stands for a tensor while a graph is recorded is none of a wrong kind."""

    class Attention(torch.nn.Module):
        def forward(self, query, key, value, lengths):
            return adasplash.entmax_attn(query, key, value, q_seqlens=lengths)

    inputs, lengths = make_inputs(2, 4, 5, 5, 8), torch.tensor([5, 3])
    traced = torch.fx.symbolic_trace(Attention())
    assert torch.equal(traced(*inputs, lengths), Attention()(*inputs, lengths))


@pytest.mark.slow
def test_a_symbolic_bool_compiles():
    """Whether there is more than one query, under dynamic shapes."""

    def attend(query, key, value):
        return adasplash.entmax_attn(query, key, value, is_causal=query.shape[2] > 1)

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="eager")
    for m in (5, 7, 1):
        inputs = make_inputs(2, 4, m, 9, 8)
        assert torch.equal(compiled(*inputs), attend(*inputs))
    torch.compiler.reset()
