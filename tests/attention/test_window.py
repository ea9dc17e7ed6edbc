"""Sliding windows: (left, right), inclusive, aligned bottom right."""

import pytest
import torch

from adasplash import entmax_attn
from common import assert_same_bits, assert_same_values, check_gradients, gradients, normal_like
from work import count_products

WINDOWS = ((0, 0), (5, -1), (-1, 5), (3, 7), (70, 2), (0, 64), (64, 63), (1000, 1000), (2**62, 2**62))
LENGTHS = {
    "square": (90, 90),
    "more keys": (50, 130),
    "more queries": (130, 50),
    "one query": (1, 90),
    "one key": (90, 1),
}


@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_against_the_reference(make_inputs, window, lengths, is_causal):
    m, n = LENGTHS[lengths]
    check_gradients(entmax_attn, make_inputs(m=m, n=n), window=window, is_causal=is_causal)


@pytest.mark.parametrize("window", ((3, 7), (70, 2), (20, -1)), ids=str)
@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0, "per head"))
@pytest.mark.parametrize("sigma", (0.05, 1.5), ids=("much support", "little support"))
def test_types_and_alphas(make_inputs, backend, sigma, alpha, window, dtype):
    inputs = make_inputs(heads=4, kv_heads=2, m=100, n=130, sigma=sigma, dtype=dtype)
    alpha = torch.tensor([1.1, 1.4, 1.6, 2.0], device=backend.device) if alpha == "per head" else alpha
    check_gradients(entmax_attn, inputs, alpha=alpha, window=window)


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_across_blocks_of_keys(make_inputs, alpha):
    """Windows that begin and end inside blocks, with lists and without."""
    inputs = make_inputs(1, 2, 700, 1300)
    inputs.query[:, :, ::3] *= 0.01
    check_gradients(entmax_attn, inputs, alpha=alpha, window=(300, 41))


@pytest.mark.parametrize("window", ((-1, -1), (1000, 1000), (89, 89)), ids=str)
def test_a_window_that_binds_nothing_changes_no_bit(make_inputs, window, dtype):
    inputs = make_inputs(m=90, n=90, dtype=dtype)
    grad = normal_like(inputs.query)
    plain = gradients(inputs, grad, entmax_attn)
    assert_same_bits(plain, gradients(inputs, grad, entmax_attn, window=window))


@pytest.mark.parametrize("right", (0, 3, -1))
def test_causal_caps_the_window_on_the_right(make_inputs, right):
    inputs = make_inputs(m=90, n=100)
    grad = normal_like(inputs.query)
    causal = gradients(inputs, grad, entmax_attn, is_causal=True, window=(20, right))
    assert_same_bits(causal, gradients(inputs, grad, entmax_attn, window=(20, 0)))


def test_the_window_of_one_key_returns_its_value(make_inputs, dtype):
    inputs = make_inputs(m=70, n=90, dtype=dtype)
    out = entmax_attn(*inputs, window=(0, 0))
    assert_same_values(out, inputs.value[:, :, 20:])


def test_what_is_outside_reaches_nothing(make_inputs, dtype):
    """Keys that no query sees may hold anything, and get zero gradients."""
    inputs = make_inputs(m=30, n=140, dtype=dtype)
    grad = normal_like(inputs.query)
    clean = gradients(inputs, grad, entmax_attn, window=(10, -1))
    inputs.key[:, :, :100], inputs.value[:, :, :100] = torch.nan, torch.inf
    dirty = gradients(inputs, grad, entmax_attn, window=(10, -1))
    assert_same_bits(clean, dirty)
    assert not dirty[2][:, :, :100].any() and dirty[2].any()


@pytest.mark.parametrize("window", ((-2, 0), (0, -2), (-(2**62), 5)), ids=str)
def test_below_minus_one_is_an_error(make_inputs, window):
    with pytest.raises(RuntimeError) as error:
        entmax_attn(*make_inputs(), window=window)
    expected = f"entmax_attn: window (left, right) must be 0 or more each, or -1 for no limit, got {window}"
    assert str(error.value) == expected


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("sigma", (0.02, 1.5), ids=("much support", "little support"))
def test_work_grows_linearly(sigma):
    """Four times the length takes four times the work, where it would be sixteen times without a window."""
    short, long = count_products(
        """
def train(length):
    query, key, value = (torch.randn(1, 1, length, 32) * s for s in (float(sys.argv[1]),) * 2 + (1,))
    out = adasplash.entmax_attn(query.requires_grad_(), key, value, is_causal=True, window=(128, -1))
    out.sum().backward()
for length in (1024, 4096):
    print(products(lambda: train(length)))
""",
        sigma,
    )
    assert 0 < short < long < 8 * short
