"""Jagged nested tensors: entmax_attn takes them as the packed form."""

import re

import pytest
import torch

import adasplash
from common import assert_same_bits

Q_LENGTHS, K_LENGTHS = [5, 0, 1, 9], [7, 3, 2, 4]


def nested(lengths, *sizes, dtype=torch.float32):
    """(batch, ragged, *sizes), the layout that projections give."""
    values = torch.randn(sum(lengths), *sizes, dtype=dtype)
    return torch.nested.as_nested_tensor(list(values.split(lengths)), layout=torch.jagged).requires_grad_()


@pytest.fixture
def tensors():
    """Query, key and value, (batch, ragged, heads, size); query is ragged in its own way."""
    torch.manual_seed(0)
    query, key = nested(Q_LENGTHS, 4, 8), nested(K_LENGTHS, 2, 8)
    value = torch.nested.nested_tensor_from_jagged(torch.randn(sum(K_LENGTHS), 2, 6), key.offsets())
    return query, key, value.requires_grad_()


def attend(query, key, value, **options):
    return adasplash.entmax_attn(*(x.transpose(1, 2) for x in (query, key, value)), **options)


def packed(query, key, value, **options):
    lengths = max(Q_LENGTHS), max(K_LENGTHS)
    tensors = (query.values(), key.values(), value.values(), query.offsets(), key.offsets())
    return adasplash.entmax_attn_varlen(*tensors, *lengths, **options)


def results(function, tensors, **options):
    leaves = [x.detach().requires_grad_() for x in tensors]
    alpha = options.get("alpha")
    out = function(*leaves, **options)
    out = out.transpose(1, 2).values() if out.is_nested else out
    out.backward(torch.ones_like(out))
    gradients = [x.grad.values() for x in leaves]
    return [out.detach(), *gradients, *([alpha.grad] if isinstance(alpha, torch.Tensor) else [])]


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"alpha": 1.2, "is_causal": True, "scale": 0.7},
        {"window": (3, 1), "alibi_slopes": torch.rand(4)},
        {"alibi_slopes": torch.rand(len(Q_LENGTHS), 4)},
    ),
    ids=lambda options: "+".join(options) or "plain",
)
def test_is_the_packed_form(tensors, options):
    assert_same_bits(results(attend, tensors, **options), results(packed, tensors, **options))


def test_alpha_per_head_gets_its_gradient(tensors):
    def alpha():
        return torch.tensor([1.2, 1.5, 1.7, 2.0]).requires_grad_()

    assert_same_bits(results(attend, tensors, alpha=alpha()), results(packed, tensors, alpha=alpha()))


def test_layout_of_the_result(tensors):
    query, key, value = tensors
    out = attend(query, key, value)
    assert out.layout == torch.jagged and out.shape[:2] == (4, 4) and out.shape[3] == 6
    assert out.shape[2] == query.shape[1]  # ragged as query is, and not only equally long
    assert (attend(query, key, key) + query.transpose(1, 2)).shape == query.transpose(1, 2).shape


def test_made_with_heads_before_the_rows():
    """Values (heads, tokens, size), ragged in their second dimension."""
    values = torch.randn(4, sum(Q_LENGTHS), 8)
    offsets = torch.tensor([0, *torch.tensor(Q_LENGTHS).cumsum(0)])
    query = torch.nested.nested_tensor_from_jagged(values, offsets, jagged_dim=2)
    out = adasplash.entmax_attn(query, query, query)
    rows = values.transpose(0, 1)
    expected = adasplash.entmax_attn_varlen(rows, rows, rows, offsets, offsets, 9, 9)
    assert torch.equal(out.transpose(1, 2).values(), expected)


def test_key_and_value_made_apart(tensors):
    query, key, _ = tensors
    again = nested(K_LENGTHS, 2, 8)
    assert attend(query, key, again).shape[2] == query.shape[1]
    with pytest.raises(RuntimeError, match="entmax_attn: key and value must be ragged in the same way"):
        attend(query, key, nested(K_LENGTHS[::-1], 2, 8))


def test_inference_mode():
    with torch.inference_mode():
        query = torch.nested.nested_tensor([torch.randn(n, 2, 8) for n in Q_LENGTHS], layout=torch.jagged)
        out = attend(query, query, query).transpose(1, 2).values()
        values, offsets = query.values(), query.offsets()
        assert torch.equal(out, adasplash.entmax_attn_varlen(values, values, values, offsets, offsets, 9, 9))


def test_autocast(tensors):
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(*tensors).dtype == torch.bfloat16


def test_a_layer(tensors):
    layer = adasplash.EntmaxAttention(16, 4, 2, is_causal=True)
    x = nested(Q_LENGTHS, 16)
    out = layer(x, x, x)
    for one, whole in zip(x.unbind(), out.unbind(), strict=True):
        if len(one):
            torch.testing.assert_close(layer(*[one[None]] * 3)[0], whole)


@pytest.mark.slow
@pytest.mark.parametrize("known", (True, False), ids=("longest known", "longest unknown"))
def test_compiled_in_one_graph(tensors, known):
    torch.compiler.reset()
    if not known:
        query, key, value = tensors
        tensors = [torch.nested.nested_tensor_from_jagged(x.values().detach(), x.offsets()) for x in (query, key)]
        tensors.append(torch.nested.nested_tensor_from_jagged(value.values().detach(), tensors[1].offsets()))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_same_bits(results(compiled, tensors, is_causal=True), results(attend, tensors, is_causal=True))


def with_holes():
    rows = torch.nested.narrow(torch.randn(2, 9, 2, 8), 1, torch.tensor([0, 2]), torch.tensor([3, 5]), torch.jagged)
    assert attend(*[rows.contiguous()] * 3).shape[:2] == (2, 2)
    return [rows.transpose(1, 2)] * 3


def strided():
    return [torch.nested.nested_tensor([torch.randn(2, n, 8) for n in (3, 4)], layout=torch.strided)] * 3


SHAPE = "query, key and value must be jagged nested tensors of shape (batch, heads, ragged, head_dim), got a "
REFUSED = {
    "strided": (strided, {}, f"{SHAPE}query of layout torch.strided"),
    "mixed": (
        lambda: [nested(Q_LENGTHS, 2, 8).transpose(1, 2), torch.randn(4, 2, 9, 8), torch.randn(4, 2, 9, 8)],
        {},
        f"{SHAPE}key that is not nested",
    ),
    "dense query": (
        lambda: [torch.randn(4, 2, 9, 8), *[nested(Q_LENGTHS, 2, 8).transpose(1, 2)] * 2],
        {},
        f"{SHAPE}query that is not nested",
    ),
    "not transposed": (
        lambda: [nested(Q_LENGTHS, 2, 8)] * 3,
        {},
        f"{SHAPE}query of 4 dimensions, ragged in dimension 1",
    ),
    "holes": (
        with_holes,
        {},
        "query must have its sequences one behind the other, and this nested tensor has holes between them, as "
        "torch.nested.narrow leaves; call contiguous() on it first",
    ),
    "lengths": (
        lambda: [nested(Q_LENGTHS, 2, 8).transpose(1, 2)] * 3,
        {"kv_seqlens": torch.tensor(K_LENGTHS)},
        "kv_seqlens goes with padded tensors; nested tensors know their lengths",
    ),
    "index": (
        lambda: [nested(Q_LENGTHS, 2, 8).transpose(1, 2)] * 3,
        {"key_index": torch.zeros(2, 64, dtype=torch.uint8)},
        "key_index goes with padded tensors, whose keys have slots; got nested ones",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_sentence(what):
    make, options, sentence = REFUSED[what]
    with pytest.raises(RuntimeError, match=f"^{re.escape('entmax_attn: ' + sentence)}$"):
        adasplash.entmax_attn(*make(), **options)
