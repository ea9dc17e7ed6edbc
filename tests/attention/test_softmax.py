"""alpha = 1 is torch's scaled_dot_product_attention where that means the same, and refused elsewhere."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from adasplash import entmax_attn
from common import assert_same_bits, check_gradients, gradients, normal_like

SAME = {
    "square": (dict(m=40, n=40), dict()),
    "square, causal": (dict(m=40, n=40), dict(is_causal=True)),
    "more keys": (dict(m=20, n=50), dict()),
    "more queries": (dict(m=50, n=20), dict()),
    "scale": (dict(m=40, n=40), dict(is_causal=True, scale=0.3)),
    "grouped queries": (dict(heads=6, kv_heads=2, m=40, n=40), dict(is_causal=True)),
}


@pytest.mark.parametrize("alpha", (1, 1.0))
@pytest.mark.parametrize("case", SAME)
def test_equals_torch(make_inputs, case, alpha, dtype):
    shape, options = SAME[case]
    inputs = make_inputs(**shape, dtype=dtype)
    grad = normal_like(inputs.query)
    ours = gradients(inputs, grad, entmax_attn, alpha=alpha, **options)
    torchs = gradients(inputs, grad, scaled_dot_product_attention, enable_gqa="kv_heads" in shape, **options)
    assert_same_bits(ours, torchs)
    assert ours[0].is_contiguous()
    with torch.inference_mode():
        torch.testing.assert_close(entmax_attn(*inputs, alpha, **options), ours[0], atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
def test_against_the_reference(make_inputs, is_causal):
    check_gradients(entmax_attn, make_inputs(m=60, n=60), alpha=1.0, is_causal=is_causal)


@pytest.mark.parametrize(
    "shape, options, words",
    (
        (dict(m=20, n=30), dict(is_causal=True), "is_causal 20 30"),
        (dict(m=30, n=20), dict(is_causal=True), "is_causal 30 20"),
        (dict(m=20, n=20, size=8, value_size=5), dict(), "value 8 5"),
        (dict(m=20, n=20), dict(window=(3, -1)), "window"),
        (dict(m=20, n=20), dict(q_seqlens=torch.tensor([5, 20])), "q_seqlens"),
        (dict(m=20, n=20), dict(kv_seqlens=torch.tensor([5, 20])), "kv_seqlens"),
        (dict(m=20, n=20), dict(alibi_slopes=torch.ones(2)), "alibi_slopes"),
    ),
    ids=("fewer queries, causal", "more queries, causal", "value size", "window", "q_seqlens", "kv_seqlens", "ALiBi"),
)
def test_refused_where_torch_means_something_else(make_inputs, backend, shape, options, words):
    options = {name: x.to(backend.device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    with pytest.raises(RuntimeError) as caught:
        entmax_attn(*make_inputs(**shape), alpha=1.0, **options)
    message = str(caught.value)
    assert all(word in message for word in ("entmax_attn", "alpha", *words.split())) and "\n" not in message


def test_output_is_contiguous_for_heads_beside_features():
    """(B, M, H, D) in memory, as projections leave it, on which torch's own attention returns the same layout."""
    inputs = [torch.randn(2, 50, 4, 64).transpose(1, 2) for _ in range(3)]
    out = entmax_attn(*inputs, alpha=1.0, is_causal=True)
    assert out.is_contiguous()
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True))
