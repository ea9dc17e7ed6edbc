"""What the forward computes, against the fp64 reference."""

import pytest
import torch

import reference
from adasplash import entmax_attn
from common import ALPHAS, SHAPES, assert_same_bits, check_forward, gradients, normal_like, scored_inputs


@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(make_inputs, shape, is_causal, dtype):
    check_forward(entmax_attn, make_inputs(**SHAPES[shape], dtype=dtype), is_causal=is_causal)


@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("sigma", (0.3, 1.0, 2.0))
@pytest.mark.parametrize("alpha", ALPHAS)
def test_alphas(make_inputs, alpha, sigma, is_causal, dtype):
    check_forward(entmax_attn, make_inputs(m=75, n=130, sigma=sigma, dtype=dtype), alpha=alpha, is_causal=is_causal)


@pytest.mark.parametrize("alpha", (1.01, 1.02))
def test_alpha_close_to_one_stays_finite(make_inputs, alpha, dtype):
    out = entmax_attn(*make_inputs(m=40, n=70, dtype=dtype), alpha=alpha)
    exact = reference.attention(*make_inputs(m=40, n=70, dtype=dtype), alpha=alpha).out
    torch.testing.assert_close(out.double(), exact, atol=0.03, rtol=0)


@pytest.mark.parametrize("scale", (0.05, 1.0, 3, -0.5, 0.0))
def test_scale(make_inputs, scale, dtype):
    check_forward(entmax_attn, make_inputs(dtype=dtype), scale=scale)


def test_scale_defaults_to_one_over_the_root_of_the_size(make_inputs):
    inputs = make_inputs(size=9)
    assert torch.equal(entmax_attn(*inputs), entmax_attn(*inputs, scale=1 / 3))
    assert not torch.equal(entmax_attn(*inputs), entmax_attn(*inputs, scale=1 / 4))


def test_arguments_by_position_and_by_name(make_inputs):
    inputs = make_inputs(m=20, n=20)
    expected = entmax_attn(*inputs, alpha=1.25, is_causal=True, scale=0.4)
    assert torch.equal(entmax_attn(*inputs, 1.25, True, 0.4), expected)
    assert torch.equal(torch.ops.adasplash.entmax_attn(*inputs, 1.25, True, scale=0.4), expected)
    assert torch.equal(entmax_attn(*inputs), entmax_attn(*inputs, 1.5, False))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_large_scores_give_one_key_everything(make_inputs, alpha, dtype):
    """Gaps of several units between the best and the second: the row is its best key's value."""
    inputs = make_inputs(m=60, n=100, size=4, sigma=30, dtype=dtype)
    scores = inputs.query.double() @ inputs.key.double().transpose(-1, -2)
    best = scores.topk(2, dim=-1)
    clear = (best.values[..., 0] - best.values[..., 1]) * (alpha - 1) > 2
    assert clear.float().mean() > 0.8
    out = entmax_attn(*inputs, alpha=alpha, scale=1.0)
    winner = inputs.value.gather(2, best.indices[..., :1].expand_as(out))
    torch.testing.assert_close(out[clear], winner[clear], atol=1e-6, rtol=1e-5)
    check_forward(entmax_attn, inputs, alpha=alpha, scale=1.0)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("n", (64, 65, 130, 1000, 6001))
def test_tiny_scores_give_every_key_weight(make_inputs, n, alpha):
    """More keys in the support than any list holds."""
    inputs = make_inputs(batch=1, m=5, n=n, sigma=1e-3)
    weights = reference.attention(*inputs, alpha=alpha).weights
    assert (weights > 0).all() or n > 1000
    check_forward(entmax_attn, inputs, alpha=alpha)
    flat = entmax_attn(inputs.query * 0, inputs.key, inputs.value, alpha=alpha)
    torch.testing.assert_close(flat, inputs.value.mean(2, keepdim=True).expand_as(flat), atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype_of_half", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
def test_tiny_scores_in_half_types(make_inputs, dtype_of_half):
    check_forward(entmax_attn, make_inputs(batch=1, m=20, n=3000, sigma=1e-2, dtype=dtype_of_half))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_tied_keys_share_evenly(backend, alpha):
    """Every score three times, whole numbers: each of three gets what the others get, the losers exactly nothing."""
    scores = torch.randint(-6, 7, (40, 30), generator=torch.Generator().manual_seed(3)).repeat(1, 3)
    weights = entmax_attn(*scored_inputs(scores, torch.eye(90), backend.device), alpha=alpha, scale=1.0)[0, 0]
    exact = reference.entmax(scores.double(), alpha)
    torch.testing.assert_close(weights.cpu().double(), exact, atol=2e-6, rtol=0)
    one, two, three = weights.reshape(40, 3, 30).unbind(1)
    assert torch.equal(one, two) and torch.equal(one, three)
    assert not weights.cpu()[exact == 0].any()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_weights_one_by_one(backend, alpha):
    """Values of an identity matrix return the weights: each one right, and exactly zero outside the support."""
    scores = torch.randn(64, 200, generator=torch.Generator().manual_seed(2)) * 2
    backend.needs(length=200)
    weights = entmax_attn(*scored_inputs(scores, torch.eye(200), backend.device), alpha=alpha, scale=1.0)[0, 0].cpu()
    exact = reference.entmax(scores.double(), alpha)
    torch.testing.assert_close(weights.double(), exact, atol=3e-6, rtol=0)
    z = (alpha - 1) * scores.double()
    maximum, gap = reference.threshold(z, torch.tensor(alpha))
    assert not weights[z < maximum + gap - 1e-5].any()
    assert weights[exact > 1e-6].all()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("around, spread", ((30.0, 0.05), (5.3, 1e-4), (-200.0, 0.5), (0.0, 1.0)))
@pytest.mark.parametrize("n", (130, 4096))
def test_weights_sum_to_one(backend, n, around, spread, alpha):
    """Many nearly equal large scores: a threshold kept as one fp32 number would be off by 4e-5 to 1e-3 here."""
    backend.needs(length=n)
    scores = around + spread * torch.randn(7, n, generator=torch.Generator().manual_seed(1))
    inputs = scored_inputs(scores, torch.ones(n, 1), backend.device)
    total = entmax_attn(*inputs, alpha=alpha, scale=1.0)
    assert (total - 1).abs().max().item() <= 1e-5
    inputs = inputs._replace(value=normal_like(inputs.value))
    exact = reference.attention(*inputs, alpha=alpha, scale=1.0).out
    of_score = torch.finfo(torch.float32).eps * scores.abs().max().item()
    out = entmax_attn(*inputs, alpha=alpha, scale=1.0)
    torch.testing.assert_close(out.double(), exact, atol=2e-6 + 4 * of_score, rtol=0)


@pytest.mark.parametrize(
    "alpha, n, gap", ((2.0, 4096, 0.9), (2.0, 65536, 0.9), (1.9, 65536, 0.5), (1.75, 4096, 0.5), (1.5, 40000, 1 - 5e-5))
)
def test_weights_sum_to_one_far_below_the_maximum(backend, alpha, n, gap):
    """One key far above all others, whose weights together move by up to 1e-3 with the threshold's last bit."""
    backend.needs(length=n)
    scores = torch.full((1, n + 1), -gap / (alpha - 1))
    scores[0, 0] = 0
    inputs = scored_inputs(scores, torch.ones(n + 1, 1), backend.device)
    # Matrix units add a thousand equal products with as many equal roundings.
    most = 1e-4 if backend.name == "cuda" and n > 40000 else 1e-5
    assert abs(entmax_attn(*inputs, alpha=alpha, scale=1.0).item() - 1) <= most
    value = inputs.value.clone().requires_grad_()
    entmax_attn(inputs.query, inputs.key, value, alpha=alpha, scale=1.0).sum().backward()
    assert abs(value.grad.double().sum().item() - 1) <= most


@pytest.mark.parametrize("alpha", ALPHAS)
def test_values_with_a_large_mean(make_inputs, alpha, dtype):
    check_forward(entmax_attn, make_inputs(m=70, n=130, mean=16, dtype=dtype), alpha=alpha)


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_scores_beyond_the_range_of_half(make_inputs, alpha):
    """Products of 1e6 are ordinary fp32 scores though fp16 ends at 65504; so are their gradients, forward and back."""
    inputs = make_inputs(m=40, n=60, size=64, sigma=150, dtype=torch.float16)
    exact = reference.attention(*inputs, alpha=alpha).out
    torch.testing.assert_close(entmax_attn(*inputs, alpha=alpha).double(), exact, atol=2e-3, rtol=1e-3)
    tensors = [x.requires_grad_() for x in inputs]
    grads = torch.autograd.grad(entmax_attn(*tensors, alpha=alpha).sum(), tensors)
    assert all(x.isfinite().all() for x in grads)


def test_half_scores_are_not_rounded_to_half(backend):
    """Scores 64 and 64.2 are one number in bf16 and differ by 0.2 here; their products are sums over two dimensions."""
    query = torch.tensor([[[[1.0, 1.0]]]], dtype=torch.bfloat16, device=backend.device)
    key = torch.tensor([[[[64.0, 0.0], [64.0, 0.19921875]]]], dtype=torch.bfloat16, device=backend.device)
    value = torch.eye(2, dtype=torch.bfloat16, device=backend.device)[None, None]
    exact = reference.entmax(torch.tensor([[64.0, 64.19921875]], dtype=torch.float64), 2.0)
    out = entmax_attn(query, key, value, alpha=2.0, scale=1.0)
    torch.testing.assert_close(out[0, 0].double().cpu(), exact, atol=2e-3, rtol=0)


LAYOUTS = {
    "heads last but one": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "part of a joint projection": lambda x: torch.cat([x, x + 1, x - 1], dim=-1)[..., : x.shape[-1]],
    "every second token": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "every second head": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "last dimension apart": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second entry": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "offset into its storage": lambda x: torch.cat([x[:1] * torch.nan, x])[1:],
    "heads last": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),  # torch's channels_last
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_no_bit(make_inputs, layout, is_causal, dtype):
    inputs = make_inputs(m=70, n=70, size=20, value_size=12, dtype=dtype)
    laid_out = [LAYOUTS[layout](x) for x in inputs]
    assert (
        all(torch.equal(x, y) and x.stride() != y.stride() for x, y in zip(inputs, laid_out, strict=True))
        or "offset" in layout
    )
    grad = normal_like(inputs.query[..., :12])
    assert_same_bits(
        gradients(inputs, grad, entmax_attn, is_causal=is_causal),
        gradients(laid_out, LAYOUTS[layout](grad), entmax_attn, is_causal=is_causal),
    )


@pytest.mark.parametrize("stride", (2**23, 2**23 + 8))
def test_rows_far_apart(make_inputs, stride):
    """At, and just above, what offsets of 32 bits reach inside a block of 256 rows. Nothing between is touched."""
    inputs = make_inputs(1, 1, 5, 300, dtype=torch.bfloat16)
    far = [x.new_empty(299 * stride + 16).as_strided(x.shape, (0, 0, stride, 1)).copy_(x) for x in inputs[1:]]
    assert torch.equal(entmax_attn(*inputs), entmax_attn(inputs.query, *far))


def test_expanded_inputs_change_no_bit(make_inputs, dtype):
    """Stride 0 over batch, heads or tokens."""
    inputs = make_inputs(batch=1, heads=1, m=30, n=40, dtype=dtype)
    expanded = [x.expand(3, 2, -1, -1) for x in inputs]
    out = entmax_attn(*expanded)
    assert torch.equal(out, entmax_attn(*(x.contiguous() for x in expanded)))
    check_forward(entmax_attn, type(inputs)(*expanded))
    same_query = inputs.query[:, :, :1].expand(-1, -1, 30, -1)
    out = entmax_attn(same_query, *inputs[1:])
    assert torch.equal(out, entmax_attn(same_query.contiguous(), *inputs[1:]))


def test_inference_and_training_give_the_same_bits(make_inputs, dtype):
    inputs = make_inputs(m=70, n=130, sigma=0.5, dtype=dtype)
    training = entmax_attn(*(x.requires_grad_() for x in inputs))
    assert training.requires_grad
    with torch.inference_mode():
        assert torch.equal(entmax_attn(*inputs), training)
