"""The oracle itself: against the `entmax` package, torch's softmax, finite differences, and masks drawn by hand."""

import entmax
import pytest
import torch

import reference
from common import assert_same_bits

ALPHAS = (1.05, 1.25, 1.5, 1.75, 2.0)


def package_entmax(scores, alpha):
    exact = {1.5: entmax.entmax15, 2.0: entmax.sparsemax}
    return exact[alpha](scores, dim=-1) if alpha in exact else entmax.entmax_bisect(scores, alpha, dim=-1, n_iter=80)


def rows(*shape, sigma=1.0):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64, generator=generator) * sigma


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("sigma", (1e-3, 1.0, 30.0))
@pytest.mark.parametrize("n", (1, 2, 17, 300))
def test_entmax_and_its_gradient_equal_the_package(n, sigma, alpha):
    ours, theirs = (rows(20, n, sigma=sigma).requires_grad_() for _ in range(2))
    weights, expected = reference.entmax(ours, alpha), package_entmax(theirs, alpha)
    grad = rows(20, n) + 3
    weights.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(weights, expected, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-10, rtol=1e-7)
    assert (weights.sum(-1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("alpha", (1.05, 1.3, 1.7))
def test_gradient_of_alpha_equals_the_package(alpha):
    alphas = [torch.full((20, 1), alpha, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    grad = rows(20, 33)
    reference.entmax(rows(20, 33), alphas[0]).backward(grad)
    entmax.entmax_bisect(rows(20, 33), alphas[1], n_iter=80).backward(grad)
    torch.testing.assert_close(alphas[0].grad, alphas[1].grad, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("shape", ((), (3, 1, 1)))
def test_gradients_agree_with_finite_differences(shape):
    alpha = torch.full(shape, 1.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reference.entmax, (rows(3, 4, 9).requires_grad_(), alpha))


@pytest.mark.parametrize("alpha", (1.5, 2.0))
def test_closed_forms_equal_bisection(alpha):
    z = (alpha - 1) * rows(50, 100, sigma=3)
    closed, bisected = (reference.threshold(z, torch.tensor(alpha), by_bisection) for by_bisection in (False, True))
    torch.testing.assert_close(closed.gap, bisected.gap, atol=1e-14, rtol=1e-12)


def test_rows_without_a_visible_key_get_no_weight_and_no_gradient():
    for alpha in (1.0, 1.3, 1.5, 2.0):
        scores = rows(3, 5)
        scores[1] = -torch.inf
        scores.requires_grad_()
        weights = reference.entmax(scores, alpha)
        weights.backward(rows(3, 5))
        assert weights.sum(-1).tolist() == pytest.approx([1, 0, 1])
        assert scores.grad.isfinite().all() and not scores.grad[1].any() and scores.grad[0].any()


def test_a_nan_score_makes_its_row_nan_and_no_other():
    for alpha in (1.3, 1.5, 2.0):
        scores = rows(3, 5)
        scores[1, 2] = torch.nan
        weights = reference.entmax(scores, alpha)
        assert weights[1].isnan().all() and weights[[0, 2]].isfinite().all()


@pytest.mark.parametrize("is_causal", (False, True))
def test_alpha_one_is_softmax_attention(is_causal):
    query, key, value = rows(2, 4, 7, 8), rows(2, 2, 7, 8), rows(2, 2, 7, 5)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, scale=0.3, enable_gqa=True
    )
    actual = reference.attention(query, key, value, 1.0, is_causal, scale=0.3)
    torch.testing.assert_close(actual.out, expected)


MASKS = {
    "causal, fewer queries": (dict(m=2, n=5, is_causal=True), ["11110", "11111"]),
    "causal, more queries": (dict(m=5, n=2, is_causal=True), ["00", "00", "00", "10", "11"]),
    "window": (dict(m=3, n=5, window=(1, 1)), ["01110", "00111", "00011"]),
    "window, causal": (dict(m=3, n=5, window=(1, 2), is_causal=True), ["01100", "00110", "00011"]),
    "left window": (dict(m=3, n=3, window=(0, -1)), ["111", "011", "001"]),
    "lengths": (
        dict(m=3, n=4, is_causal=True, q_seqlens=torch.tensor([2]), kv_seqlens=torch.tensor([3])),
        ["1100", "1110", "0000"],
    ),
    "lengths, window": (
        dict(m=3, n=4, window=(0, 0), q_seqlens=torch.tensor([3]), kv_seqlens=torch.tensor([2])),
        ["0000", "1000", "0100"],
    ),
    "no keys": (dict(m=2, n=3, kv_seqlens=torch.tensor([0])), ["000", "000"]),
}


@pytest.mark.parametrize("case", MASKS)
def test_visibility(case):
    arguments, expected = MASKS[case]
    drawn = ["".join(str(int(sees)) for sees in row) for row in reference.visible(**arguments)[0, 0]]
    assert drawn == expected


def test_alibi_counts_from_the_diagonal_that_ends_bottom_right():
    slopes = torch.tensor([0.5, 0.25])
    query, key, value = torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 3, 4), torch.ones(1, 2, 3, 4)
    scores = reference.attention(query, key, value, alibi_slopes=slopes).scores
    assert scores[0, 0].tolist() == [[-0.5, 0, -0.5], [-1, -0.5, 0]]
    assert scores[0, 1].tolist() == [[-0.25, 0, -0.25], [-0.5, -0.25, 0]]


def test_padding_reaches_nothing():
    inputs = [rows(2, 2, 5, 4).requires_grad_() for _ in range(3)]
    padded = [x.detach().clone() for x in inputs]
    lengths = dict(q_seqlens=torch.tensor([3, 5]), kv_seqlens=torch.tensor([4, 0]))
    for x, length in zip(padded, (3, 4, 4), strict=True):
        x[0, :, length:] = torch.nan
    padded[1][1], padded[2][1] = torch.nan, torch.nan
    padded = [x.requires_grad_() for x in padded]
    clean, dirty = (reference.attention(*x, is_causal=True, **lengths).out for x in (inputs, padded))
    assert torch.equal(clean, dirty) and clean[0, :, :3].any() and not clean[0, :, 3:].any() and not clean[1].any()
    grad = rows(*clean.shape)
    gradients = torch.autograd.grad(clean, inputs, grad)
    assert_same_bits(gradients, torch.autograd.grad(dirty, padded, grad))
    assert all(gradient[0, :, :3].any() for gradient in gradients)


def test_alpha_per_head_is_each_head_alone():
    query, key, value = (rows(2, 3, 6, 4) for _ in range(3))
    alpha = torch.tensor([1.1, 1.5, 2.0], dtype=torch.float64)
    together = reference.attention(query, key, value, alpha).out
    for head in range(3):
        alone = reference.attention(*(x[:, head, None] for x in (query, key, value)), alpha[head].item()).out
        torch.testing.assert_close(together[:, head, None], alone, atol=1e-12, rtol=1e-10)
