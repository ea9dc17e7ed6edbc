"""ALiBi: scores fall with the distance of key and query."""

import pytest
import torch

from adasplash import entmax_attn
from common import assert_same_bits, check_gradients, gradients, normal_like

SLOPES = {
    "per head": lambda: torch.tensor([0.5, 0.25, 0.125, 0.0625]),
    "per batch entry and head": lambda: torch.rand(2, 4, generator=torch.Generator().manual_seed(0)),
    "steep": lambda: torch.tensor([8.0, 4.0, 100.0, 0.0]),
    "negative": lambda: torch.tensor([-0.05, 0.1, 0.0, -0.01]),
}


@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("m, n", ((60, 60), (40, 130), (130, 40), (1, 90)))
@pytest.mark.parametrize("slopes", SLOPES)
def test_against_the_reference(make_inputs, backend, slopes, m, n, is_causal):
    inputs = make_inputs(heads=4, kv_heads=2, m=m, n=n)
    check_gradients(entmax_attn, inputs, is_causal=is_causal, alibi_slopes=SLOPES[slopes]().to(backend.device))


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0, "per head"))
@pytest.mark.parametrize("sigma, slope", ((1.5, 0.1), (0.05, 1e-3)), ids=("little support", "much support"))
def test_types_and_alphas(make_inputs, backend, sigma, slope, alpha, dtype):
    """In the rows with a list of their support, and in those that are rebuilt."""
    inputs = make_inputs(heads=4, m=70, n=130, sigma=sigma, dtype=dtype)
    alpha = torch.tensor([1.1, 1.4, 1.6, 2.0], device=backend.device) if alpha == "per head" else alpha
    slopes = slope * torch.tensor([1.0, 0.5, 2.0, 0.1], device=backend.device)
    check_gradients(entmax_attn, inputs, alpha=alpha, is_causal=True, alibi_slopes=slopes)


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_across_blocks_of_keys(make_inputs, backend, alpha):
    inputs = make_inputs(1, 2, 150, 1300)
    inputs.query[:, :, ::3] *= 0.01
    slopes = torch.tensor([0.02, 1e-4], device=backend.device)
    check_gradients(entmax_attn, inputs, alpha=alpha, window=(700, -1), alibi_slopes=slopes)


def test_slopes_of_zero_change_nothing(make_inputs, backend, dtype):
    """No bit, where the code is the same: the GPU's code for alpha = 1.5 alone has no slopes."""
    inputs = make_inputs(m=70, n=130, dtype=dtype)
    grad = normal_like(inputs.query)
    zeros = torch.zeros(2, device=backend.device)
    with_slopes = check_gradients(entmax_attn, inputs, alibi_slopes=zeros)
    if backend.name == "cpu":
        assert_same_bits(gradients(inputs, grad, entmax_attn), with_slopes)


def test_slopes_belong_to_their_head_and_batch_entry(make_inputs, backend):
    inputs = make_inputs(batch=3, heads=2, m=40, n=50)
    slopes = torch.rand(3, 2, generator=torch.Generator().manual_seed(1)).to(backend.device)
    together = entmax_attn(*inputs, alibi_slopes=slopes)
    strided = entmax_attn(*inputs, alibi_slopes=slopes.T.contiguous().T)
    assert torch.equal(together, strided)
    for b in range(3):
        alone = entmax_attn(*(x[b, None] for x in inputs), alibi_slopes=slopes[b])
        assert torch.equal(together[b, None], alone)


def test_the_scale_does_not_touch_the_slopes(make_inputs, backend):
    """The slope counts in the unit of the scaled score."""
    inputs = make_inputs(m=30, n=40)
    slopes = torch.tensor([0.3, 0.2], device=backend.device)
    scaled = inputs._replace(query=inputs.query * 4)
    one = entmax_attn(*inputs, scale=1.0, alibi_slopes=slopes)
    other = entmax_attn(*scaled, scale=0.25, alibi_slopes=slopes)
    assert torch.equal(one, other)


def test_a_nan_slope_makes_the_rows_of_its_head_nan(make_inputs, backend):
    inputs = make_inputs(m=30, n=40)
    out = entmax_attn(*inputs, alibi_slopes=torch.tensor([torch.nan, 0.5], device=backend.device))
    assert out[:, 0].isnan().all() and out[:, 1].isfinite().all()


def test_slopes_have_no_gradient(make_inputs, backend):
    inputs = make_inputs(requires_grad=True)
    slopes = torch.tensor([0.3, 0.2], device=backend.device, requires_grad=True)
    with pytest.raises(RuntimeError, match="entmax_attn: alibi_slopes have no gradient; detach them"):
        entmax_attn(*inputs, alibi_slopes=slopes)
    with torch.no_grad():
        assert torch.equal(
            entmax_attn(*inputs, alibi_slopes=slopes), entmax_attn(*inputs, alibi_slopes=slopes.detach())
        )
