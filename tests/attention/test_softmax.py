"""alpha = 1 is softmax: torch's scaled_dot_product_attention where that means the same, kernels of this library
elsewhere, and in both the limit of what alpha above 1 gives."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import reference
from adasplash import entmax_attn
from common import ALPHAS, SHAPES, assert_same_bits, check_gradients, gradients, normal_like, scored_inputs
from packing import check_packed, packed

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


def test_one_query_sees_every_key(make_inputs):
    """Torch's causal mask, aligned top left, would show it the first one."""
    inputs = make_inputs(m=1, n=30)
    assert_same_bits(entmax_attn(*inputs, 1.0, is_causal=True), scaled_dot_product_attention(*inputs))


@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
def test_against_the_reference(make_inputs, is_causal):
    check_gradients(entmax_attn, make_inputs(m=60, n=60), alpha=1.0, is_causal=is_causal)


OPTIONS = {
    "q_seqlens": dict(q_seqlens=[3, 37]),
    "kv_seqlens": dict(kv_seqlens=[50, 0]),
    "self-attention, padded": dict(q_seqlens=[30, 37], kv_seqlens=[20, 53], is_causal=True),
    "starts": dict(kv_starts=[7, 53], is_causal=True),
    "starts and lengths": dict(kv_starts=[7, 10], kv_seqlens=[40, 53]),
    "window": dict(window=(5, 3)),
    "window, causal": dict(window=(9, -1), is_causal=True),
    "ALiBi": dict(alibi_slopes=[0.3, 0.1]),
    "fewer queries, causal": dict(is_causal=True),
    "everything": dict(
        q_seqlens=[30, 37], kv_seqlens=[40, 53], kv_starts=[3, 0], is_causal=True, window=(20, -1), scale=-0.3,
        alibi_slopes=[[0.3, 0.1], [0.2, 0.4]],
    ),
}  # fmt: skip


def tensors(options, device):
    kinds = {"alibi_slopes": torch.float32}
    return {
        name: torch.tensor(x, dtype=kinds.get(name, torch.int32), device=device) if isinstance(x, list) else x
        for name, x in options.items()
    }


@pytest.mark.parametrize("case", OPTIONS)
def test_with_options(make_inputs, backend, dtype, case):
    options = tensors(OPTIONS[case], backend.device)
    check_gradients(entmax_attn, make_inputs(m=37, n=53, dtype=dtype), alpha=1.0, **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(make_inputs, shape):
    """A window wider than all keys changes nothing but who serves."""
    inputs = make_inputs(**SHAPES[shape])
    check_gradients(entmax_attn, inputs, alpha=1.0, window=(2000, 2000))


def test_packed(backend):
    inputs, lengths = packed([70, 0, 5, 33], [90, 4, 0, 33], device=backend.device)
    check_packed(inputs, lengths, alpha=1.0, is_causal=True)
    check_packed(inputs, lengths, alpha=torch.tensor([1.0, 1.5], device=backend.device), is_causal=True)


@pytest.mark.parametrize("sigma", (0.05, 1.5, 6.0), ids=("flat", "usual", "peaked"))
@pytest.mark.parametrize("alpha", ((1.0, 1.5, 1.0, 2.0), (1.0,), 1.0), ids=("some heads", "all heads", "one number"))
def test_entries_of_exactly_one(make_inputs, backend, sigma, alpha):
    heads = 4 if isinstance(alpha, tuple) else 3
    given = torch.tensor(alpha * (heads // len(alpha)) if isinstance(alpha, tuple) else alpha, device=backend.device)
    inputs = make_inputs(heads=heads, kv_heads=heads // 2 if heads == 4 else 1, m=70, n=150, sigma=sigma)
    check_gradients(entmax_attn, inputs, alpha=given, is_causal=True)


def test_many_keys(make_inputs, backend):
    """Over several blocks of keys, with maxima that grow on the way."""
    inputs = make_inputs(batch=1, m=70, n=1300, size=8)
    rising = inputs._replace(key=inputs.key * torch.linspace(0.1, 3, 1300, device=backend.device)[:, None])
    check_gradients(entmax_attn, rising, alpha=torch.ones(2, device=backend.device))


@pytest.mark.parametrize("what", ("out", "dq", "dk", "dv", "dalpha"))
def test_the_limit_of_alpha(make_inputs, backend, what):
    """The distance to alpha = 1 falls in line with alpha - 1, down to the least alpha there is."""
    inputs = make_inputs(m=30, n=60, sigma=1.0)
    grad = normal_like(inputs.query)

    def at(alpha):
        per_head = torch.full((2,), alpha, device=backend.device)
        found = gradients(inputs, grad, entmax_attn, alpha=per_head)
        return dict(zip(("out", "dq", "dk", "dv", "dalpha"), found, strict=True))[what].double()

    softmax = at(1.0)
    assert softmax.isfinite().all()
    steps = (0.08, 0.04, 0.02, 0.01)
    slopes = [((at(1 + step) - softmax) / step).norm().item() for step in steps]
    assert max(slopes) < 1.25 * min(slopes), slopes


def test_values_between_are_refused(make_inputs, backend):
    inputs = make_inputs(m=5, n=5)
    for alpha in (1.0001, 1.005, 0.999):
        with pytest.raises(RuntimeError, match=r"entmax_attn: alpha must be 1 or from 1\.01 to 2, got"):
            entmax_attn(*inputs, alpha)
    if backend.name == "cpu":
        with pytest.raises(RuntimeError, match=r"alpha as a tensor must be 1 or from 1\.01 to 2, got 1\.005"):
            entmax_attn(*inputs, torch.tensor([1.0, 1.005]))
    else:
        out = entmax_attn(*inputs, torch.tensor([1.0, 1.005], device=backend.device))
        assert out[:, 0].isfinite().all() and out[:, 1].isnan().all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_one_in_every_type_of_alpha(make_inputs, backend, dtype):
    alpha = torch.ones(2, dtype=dtype, device=backend.device)
    inputs = make_inputs(m=20, n=30, dtype=torch.float32 if dtype == torch.float64 else dtype)
    out = entmax_attn(*inputs, alpha)
    assert_same_bits(out, entmax_attn(*inputs, torch.ones(2, device=backend.device)))


def test_what_is_saved(make_inputs, backend):
    """Of each row the maximum of its scores and the log of the sum above it; every visible key and tile has weight."""
    inputs = make_inputs(batch=1, m=100, n=120)
    slopes = torch.tensor([0.1, 0.0], device=backend.device)
    alpha = torch.tensor([1.0, 1.5], device=backend.device)
    _, row_state, support, tiles = torch.ops.adasplash._entmax_attn_forward(
        *inputs, alpha, 1.5, True, None, None, None, None, None, 0, 0, [10, -1], slopes, 50
    )
    scores = reference.attention(*inputs, alpha, is_causal=True, window=(10, -1), alibi_slopes=slopes).scores[0, 0]
    maximum = scores.amax(-1)
    torch.testing.assert_close(row_state[0, 0, :, 0].double(), maximum, atol=1e-5, rtol=1e-5)
    log_sum = (scores - maximum[:, None]).exp().sum(-1).log()
    torch.testing.assert_close(row_state[0, 0, :, 1].double(), log_sum, atol=1e-5, rtol=1e-5)
    sees = scores > -torch.inf
    seen = torch.nn.functional.pad(sees, (0, 8, 0, 28)).reshape(2, 64, 2, 64).any(3).any(1)
    assert tiles[0, 0, :2, 0].tolist() == [sum(int(bit) << t for t, bit in enumerate(row)) for row in seen]
    assert not seen.all()
    if backend.name == "cpu":
        for row, keys in zip(support[0, 0], sees, strict=True):
            expected = keys.nonzero().squeeze(1).tolist()
            assert row[row >= 0].tolist() == expected and row[len(expected) :].eq(-1).all()


def test_lists_that_do_not_fit(make_inputs, backend):
    inputs = make_inputs(batch=1, m=4, n=60)
    options = (None, 1.0, True, None, None, None, None, None, 0, 0, [-1, -1], None)
    support = torch.ops.adasplash._entmax_attn_forward(*inputs, *options, 58)[2]
    expected = (-2, -2, -2, -2) if backend.name != "cpu" else (0, 0, -2, -2)
    assert support[0, 0, :, 0].tolist() == list(expected)


def test_nothing_to_see(make_inputs, backend):
    inputs = make_inputs(m=40, n=10, requires_grad=True)
    alpha = torch.ones(2, device=backend.device, requires_grad=True)
    out = entmax_attn(*inputs, alpha, is_causal=True)
    assert (out[:, :, :30] == 0).all() and (out[:, :, 30:] != 0).any()
    out.sum().backward()
    assert (inputs.query.grad[:, :, :30] == 0).all() and alpha.grad.isfinite().all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_head_gives_the_same_beside_softmax_heads(make_inputs, backend, alpha):
    inputs = make_inputs(heads=3, m=70, n=70)
    with_softmax = torch.tensor([1.0, alpha, 1.0], device=backend.device)
    alone = torch.full((3,), alpha, device=backend.device)
    assert_same_bits(entmax_attn(*inputs, with_softmax)[:, 1], entmax_attn(*inputs, alone)[:, 1])


def test_output_is_contiguous_for_heads_beside_features():
    """(B, M, H, D) in memory, as projections leave it, on which torch's own attention returns the same layout."""
    inputs = [torch.randn(2, 50, 4, 64).transpose(1, 2) for _ in range(3)]
    out = entmax_attn(*inputs, alpha=1.0, is_causal=True)
    assert out.is_contiguous()
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True))


@pytest.mark.parametrize("far", (-1e25, -torch.inf))
@pytest.mark.parametrize("keys", (3, 600))
def test_the_gradient_of_alpha_where_scores_are_far_apart(backend, far, keys):
    """Of a key without weight ln p is infinite."""
    scores = torch.zeros(1, keys)
    scores[0, 1], scores[0, 2] = 0.1, far
    inputs = scored_inputs(scores, torch.randn(keys, 3, generator=torch.Generator().manual_seed(0)), backend.device)
    alpha = torch.ones(1, device=backend.device)
    found = gradients(inputs, normal_like(inputs.query.new_empty(1, 1, 1, 3)), entmax_attn, alpha=alpha, scale=1.0)
    assert all(x.isfinite().all() for x in (found[0], found[4])) and found[4] != 0


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("place", (1, 1000))
def test_a_value_without_weight_whichever_block_it_is_in(place):
    """exp(-200) is 0 in float32: before the maximum is seen too."""
    scores = torch.zeros(1, 1030)
    scores[0, place] = 200.0
    value = torch.ones(1030, 2)
    value[0] = torch.nan
    out = entmax_attn(*scored_inputs(scores, value), torch.tensor(1.0), scale=1.0)
    torch.testing.assert_close(out, torch.ones_like(out))
