"""alpha = 1 in the code for any alpha: heads of softmax among others, what is saved of them, the gradient of alpha."""

import pytest
import torch
from checked import BIG, PARTS, SMALL, check
from interpreted import attention

import reference
from common import assert_same_bits, make_inputs, normal_like

pytestmark = pytest.mark.backends("cpu")
TILES = pytest.mark.parametrize("tiles", (SMALL, BIG, PARTS), ids=("small", "big", "parts"))


@pytest.mark.parametrize("m, n, tiles", ((1, 1, SMALL), (65, 193, BIG), (130, 1, SMALL), (65, 80, PARTS)), ids=str)
def test_shapes(m, n, tiles):
    check(make_inputs(1, 2, m, n, size=24, value_size=40, kv_heads=1), 1.0, True, tiles=tiles)


@TILES
@pytest.mark.parametrize("window", ((10, 5), (70, -1)))
def test_windows_and_bounds(window, tiles):
    inputs = make_inputs(3, 1, 130, 200, size=16)
    bounds = dict(kv_starts=torch.tensor([3, 64, 0]), kv_seqlens=torch.tensor([200, 127, 0]))
    check(inputs, 1.0, False, tiles=tiles, window=window, **bounds)


@pytest.mark.parametrize("scale", (0.0, -0.4, 2.0))
def test_scale(scale):
    check(make_inputs(1, 2, 70, 90, size=16), 1.0, True, scale=scale)


def test_what_is_saved():
    """The largest score and the logarithm of the sum, (0, inf) of rows that see nothing, and a bit for every tile that
    is seen."""
    inputs = make_inputs(1, 1, 260, 200, size=16)
    result = attention(*inputs, 1.0, True, window=(70, 0))
    scores = reference.attention(*inputs, 1.0, True, window=(70, 0)).scores[0, 0]
    row_max = scores.amax(-1)
    gap = (scores - row_max[:, None]).logsumexp(-1)
    assert torch.equal(result.row_state[0, 0, :60], torch.tensor([0.0, torch.inf]).expand(60, 2))
    torch.testing.assert_close(
        result.row_state[0, 0, 60:].double(), torch.stack((row_max, gap), -1)[60:], atol=1e-5, rtol=0
    )
    seen = torch.nn.functional.pad(scores > -torch.inf, (0, 56, 0, 60)).reshape(5, 64, 4, 64).any(3).any(1)
    bits = (result.tiles[0, 0, :5, 0, None] >> torch.arange(4)) & 1
    assert torch.equal(bits.bool(), seen)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_rows_are_broken_as_for_other_alphas(dtype):
    inputs = make_inputs(1, 1, 150, 150, size=16, dtype=dtype)
    inputs.query[0, 0, 77, 3] = torch.nan
    inputs.query[0, 0, 80] = torch.inf
    inputs.key[0, 0, :, 0] = 1.0
    inputs.query[0, 0, 90] = 0
    inputs.query[0, 0, 90, 0] = -torch.inf  # all scores are -inf
    result = attention(*inputs, 1.0)
    broken = torch.zeros(150, dtype=torch.bool).index_fill(0, torch.tensor([77, 80, 90]), True)
    for x in (result.out[0, 0], result.row_state[0, 0]):
        assert x[broken].isnan().all() and x[~broken].isfinite().all()


def gradient_of_alpha(p, value, grad):
    """At alpha = 1, of each row: -sum p (ln p)^2 (dp - delta) / 2, to which the derivative of entmax goes."""
    dp = grad @ value.transpose(-1, -2)
    squares = torch.where(p > 0, p.log().square(), 0)
    return -0.5 * (p * squares * (dp - (p * dp).sum(-1, keepdim=True))).sum(-1)


@pytest.mark.parametrize("dtype, is_causal", ((torch.float32, False), (torch.bfloat16, True)), ids=str)
def test_heads_of_every_kind(dtype, is_causal):
    """A key head is shared by heads of alpha = 1 and of others, whether keys are gathered or not. Every head has the
    bits that it has with its alpha as a number, and the gradient of alpha is right."""
    alphas = torch.tensor([1.0, 1.5, 1.0, 1.25, 2.0, 1.0])
    inputs = make_inputs(1, 6, 90, 150, size=16, kv_heads=2, dtype=dtype)
    grad = normal_like(inputs.query)
    for below in (0, 101):
        actual = attention(*inputs, alphas, is_causal, grad=grad, gather_below=below)
        dk, dv = torch.zeros(2, *inputs.key.shape, dtype=torch.float64)
        for head, alpha in enumerate(alphas.tolist()):
            shared = slice(head // 3, head // 3 + 1)
            own = (inputs.query[:, head, None], inputs.key[:, shared], inputs.value[:, shared])
            alone = attention(*own, alpha, is_causal, grad=grad[:, head, None], alpha_code="any", gather_below=below)
            for what in ("out", "row_state", "tiles", "dq"):
                assert_same_bits(getattr(actual, what)[:, head, None], getattr(alone, what))
            leaves = [x.double().requires_grad_() for x in own]
            exact = reference.attention(*leaves, alpha, is_causal)
            exact.out.backward(grad[:, head, None].double())
            dk[:, shared] += leaves[1].grad
            dv[:, shared] += leaves[2].grad
            if alpha == 1 and dtype == torch.float32:
                expected = gradient_of_alpha(exact.weights.detach(), leaves[2].detach(), grad[:, head, None].double())
                terms = actual.alpha_terms[:, head, None].double()
                torch.testing.assert_close(terms, expected, atol=2e-5, rtol=2e-5)
        close = dict(atol=2e-5, rtol=2e-5) if dtype == torch.float32 else dict(atol=0.2, rtol=0.02)
        torch.testing.assert_close(actual.dk.double(), dk, **close)
        torch.testing.assert_close(actual.dv.double(), dv, **close)


@pytest.mark.parametrize("sigma", (0.03, 0.3, 3.0))
def test_gradient_of_alpha(sigma):
    """Also where weights are nearly equal, so that of large terms little would be left."""
    inputs = make_inputs(1, 1, 70, 300, size=16, sigma=sigma)
    grad = normal_like(inputs.query)
    found = attention(*inputs, torch.ones(1), grad=grad).alpha_terms.double()
    doubles = [x.double() for x in inputs]
    exact = gradient_of_alpha(reference.attention(*doubles, 1.0).weights, doubles[2], grad.double())
    torch.testing.assert_close(found, exact, atol=2e-6 * exact.abs().max().item() + 1e-7, rtol=1e-4)
    # The derivative itself, by what entmax is just above.
    above = torch.full((1, 1, 70, 1), 1.001, dtype=torch.float64, requires_grad=True)
    reference.attention(*doubles, above).out.backward(grad.double())
    torch.testing.assert_close(exact, above.grad[..., 0], atol=1e-2 * exact.abs().max().item(), rtol=0)


def test_alphas_just_above_one_are_out_of_range():
    inputs = make_inputs(1, 3, 70, 90, size=16)
    result = attention(*inputs, torch.tensor([1.0, 1.001, 0.999]))
    assert result.out[:, 0].isfinite().all() and result.out[:, 1:].isnan().all()
