"""NaN and infinities: where they must show, and where they must not."""

import math

import pytest
import torch

import reference
from adasplash import entmax_attn
from common import gathers, gradients, normal_like

BAD = (torch.nan, torch.inf, -torch.inf)
SHAPE = dict(batch=2, heads=4, m=70, n=90, kv_heads=2)


@pytest.fixture(params=(1.25, 1.5, 2.0))
def alpha(request):
    return request.param


def same_bits_elsewhere(clean, dirty, touched):
    """Equal to the bit outside `touched`, where everything is finite. Where keys are gathered, rows of one block of 64
    queries are sums over one list, and nearly equal."""
    near = touched
    if gathers():
        rows = touched.shape[-1]
        blocks = torch.nn.functional.pad(touched, (0, -rows % 64)).unflatten(-1, (-1, 64))
        near = blocks.any(-1, keepdim=True).expand_as(blocks).flatten(-2)[..., :rows]
    assert torch.equal(clean[~near], dirty[~near]) and clean.isfinite().all()
    close = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[clean.dtype]
    torch.testing.assert_close(clean[near & ~touched], dirty[near & ~touched], atol=close, rtol=close)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("row", (0, 33, 69))
def test_in_a_query(make_inputs, row, is_causal, bad, alpha, dtype):
    inputs = make_inputs(**SHAPE, dtype=dtype)
    clean = entmax_attn(*inputs, alpha, is_causal)
    inputs.query[1, 2, row, 5] = bad
    dirty = entmax_attn(*inputs, alpha, is_causal)
    touched = torch.zeros(2, 4, 70, dtype=torch.bool)
    touched[1, 2, row] = True
    same_bits_elsewhere(clean, dirty, touched)
    if math.isnan(bad):
        assert dirty[1, 2, row].isnan().all()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("key", (0, 50, 89))
def test_in_a_key(make_inputs, key, is_causal, bad, alpha, dtype):
    """Only the rows that see the key may notice, and with NaN all of them do, however little weight it would get."""
    inputs = make_inputs(**SHAPE, dtype=dtype)
    clean = entmax_attn(*inputs, alpha, is_causal)
    inputs.key[0, 1, key, 3] = bad
    dirty = entmax_attn(*inputs, alpha, is_causal)
    touched = torch.zeros(2, 4, 70, dtype=torch.bool)
    touched[0, 2:] = reference.visible(70, 90, is_causal)[0, 0, :, key]
    same_bits_elsewhere(clean, dirty, touched)
    if math.isnan(bad):
        assert dirty[touched].isnan().all()


@pytest.mark.parametrize("count", (1, 64, 65))
def test_in_several_keys_at_once(make_inputs, count, alpha):
    """A whole block of NaN keys is skipped by no shortcut."""
    inputs = make_inputs(1, 2, 70, 200)
    inputs.key[0, 0, 64 : 64 + count] = torch.nan
    out = entmax_attn(*inputs, alpha)
    assert out[0, 0].isnan().all() and out[0, 1].isfinite().all()


@pytest.mark.parametrize("key", (0, 650, 699))
def test_in_a_key_of_rows_with_much_support(make_inputs, key, alpha, dtype):
    """Such rows keep no list of candidates, but notice a NaN all the same."""
    inputs = make_inputs(1, 2, 70, 700, sigma=0.01, dtype=dtype)
    clean = entmax_attn(*inputs, alpha, is_causal=True)
    inputs.key[0, 0, key] = torch.nan
    dirty = entmax_attn(*inputs, alpha, is_causal=True)
    touched = torch.zeros(1, 2, 70, dtype=torch.bool)
    touched[0, 0] = reference.visible(70, 700, is_causal=True)[0, 0, :, key]
    same_bits_elsewhere(clean, dirty, touched)
    assert dirty[touched].isnan().all()


def test_in_every_key(make_inputs, alpha):
    inputs = make_inputs(1, 2, 70, 90)
    inputs.key[0, 0] = torch.nan
    out = entmax_attn(*inputs, alpha)
    assert out[0, 0].isnan().all() and out[0, 1].isfinite().all()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
def test_in_a_value(make_inputs, is_causal, bad, alpha, dtype):
    """It shows in the rows that give it weight; no other head or batch entry hears of it."""
    inputs = make_inputs(**SHAPE, dtype=dtype)
    clean = entmax_attn(*inputs, alpha, is_causal)
    weights = reference.attention(*inputs, alpha, is_causal).weights
    key = int((weights[0, 2:] > 0.01).sum((0, 1)).argmax())
    inputs.value[0, 1, key, 4] = bad
    dirty = entmax_attn(*inputs, alpha, is_causal)
    head = torch.zeros(2, 4, 70, dtype=torch.bool, device=dirty.device)
    head[0, 2:] = True
    same_bits_elsewhere(clean, dirty, head)
    weighty = head & (weights[..., key] > 0.01)
    assert weighty.any()
    assert not dirty[weighty][:, 4].isfinite().any()


@pytest.mark.parametrize("where", ("query", "key", "value"))
@pytest.mark.parametrize("bad", BAD)
def test_gradients_of_other_heads_and_batch_entries(make_inputs, where, bad, alpha):
    inputs = make_inputs(**SHAPE)
    grad = normal_like(inputs.query)
    clean = gradients(inputs, grad, entmax_attn, alpha)
    getattr(inputs, where)[1, 0, 40] = bad
    dirty = gradients(inputs, grad, entmax_attn, alpha)
    for one, other in zip(clean, dirty, strict=True):
        of_head = torch.zeros(one.shape[:3], dtype=torch.bool, device=one.device)
        of_head[1, : one.shape[1] // 2] = True
        same_bits_elsewhere(one, other, of_head)


def test_gradients_of_nan_rows_are_nan(make_inputs, alpha):
    """Never silently finite: a NaN query leads to a NaN gradient of that query and of the keys it saw."""
    inputs = make_inputs(1, 1, 70, 90)
    inputs.query[0, 0, 40] = torch.nan
    out, dq, dk, dv = gradients(inputs, normal_like(inputs.query), entmax_attn, alpha)
    assert out[0, 0, 40].isnan().all() and dq[0, 0, 40].isnan().all()
    assert dk.isnan().any() and dv.isnan().any()


def test_in_the_incoming_gradient(make_inputs, alpha):
    inputs = make_inputs(**SHAPE)
    grad = normal_like(inputs.query)
    clean = gradients(inputs, grad, entmax_attn, alpha)
    grad[1, 2, 40] = torch.nan
    dirty = gradients(inputs, grad, entmax_attn, alpha)
    row = torch.zeros(2, 4, 70, dtype=torch.bool)
    row[1, 2, 40] = True
    same_bits_elsewhere(clean[1], dirty[1], row)
    assert dirty[1][row].isnan().all()


@pytest.mark.parametrize("bad", BAD)
def test_of_a_row_that_sees_no_key(make_inputs, bad, alpha, dtype):
    """Its query may hold anything: the row is zero, and so is its gradient."""
    inputs = make_inputs(2, 2, 60, 40, dtype=dtype)
    inputs.query[:, :, :20] = bad
    out, dq, dk, dv = gradients(inputs, normal_like(inputs.query), entmax_attn, alpha, is_causal=True)
    assert not out[:, :, :20].any() and not dq[:, :, :20].any()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv)) and dk.any()


@pytest.mark.backends("cpu")
def test_nan_is_seen_where_the_scale_is_zero(make_inputs):
    """BLAS does not read its operands when their product is scaled by zero."""
    inputs = make_inputs(1, 1, 3, 5)
    inputs.query[0, 0, 1, 0] = float("nan")
    rows = entmax_attn(*inputs, scale=0.0)[0, 0]
    assert rows[1].isnan().all() and rows[[0, 2]].isfinite().all()


# Rows with lists of their support, and rows that go by products of blocks, in which 0 * NaN is NaN.
KINDS = {"lists": dict(sigma=2.0), "products": dict(sigma=0.01)}
EVERY_ALPHA = pytest.mark.parametrize("every_alpha", (1.0, 1.5))
EXACTLY = pytest.mark.backends("cpu")  # products on a GPU are of tiles


def poison(inputs, grad, where, bad):
    """The same with bad numbers, and where they are."""
    inputs, grad = inputs.detached(), grad.clone()
    for name, *place in where:
        (grad if name == "grad" else getattr(inputs, name).data)[tuple(place)] = bad
    return inputs, grad


def changed(one, other):
    """Rows (B, H, rows) that differ in a bit."""
    return ((one != other) | (one.isnan() != other.isnan())).any(-1)


@EXACTLY
@EVERY_ALPHA
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", (370, 399))
def test_a_value_reaches_the_rows_that_weigh_it_and_no_other(make_inputs, kind, key, bad, every_alpha):
    """Causal, so that it is in the future of rows of its own block."""
    inputs = make_inputs(1, 2, 400, 400, 8, **KINDS[kind])
    grad = normal_like(inputs.query)
    options = dict(alpha=torch.tensor([every_alpha] * 2), is_causal=True)  # softmax by kernels of ours too
    clean = gradients(inputs, grad, entmax_attn, **options)
    dirty_inputs, _ = poison(inputs, grad, [("value", 0, 0, key, 2)], bad)
    dirty = gradients(dirty_inputs, grad, entmax_attn, **options)
    identity = torch.eye(400).expand(1, 2, 400, 400)
    weights = torch.cat(
        [entmax_attn(*inputs[:2], identity[..., part], **options) for part in torch.arange(400).split(200)],
        -1,
    )
    weighty = weights[..., key] > 0
    weighty[:, 1] = False
    assert not dirty[0][weighty][:, 2].isfinite().any()
    others = torch.arange(8) != 2
    assert dirty[0][weighty][:, others].isfinite().all()
    assert not changed(clean[0], dirty[0])[~weighty].any()
    # Their ds are NaN wherever they have weight, those of other rows as before.
    assert not changed(clean[1], dirty[1])[~weighty].any() and not dirty[1][weighty].isfinite().any()
    touched = (weights * weighty[..., None] > 0).any(2)
    assert (~dirty[2].isfinite()).all(-1).equal(touched) and dirty[2][~touched].isfinite().all()
    torch.testing.assert_close(clean[2][~touched], dirty[2][~touched])
    assert not changed(clean[3], dirty[3]).any()  # dv does not read it


@EXACTLY
@EVERY_ALPHA
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ("query", "key"))
def test_queries_and_keys_reach_what_they_see(make_inputs, kind, name, bad, every_alpha):
    place = 370
    inputs = make_inputs(1, 2, 400, 400, 8, **KINDS[kind])
    grad = normal_like(inputs.query)
    options = dict(alpha=torch.tensor([every_alpha] * 2), is_causal=True)
    clean = gradients(inputs, grad, entmax_attn, **options)
    dirty = gradients(*poison(inputs, grad, [(name, 0, 0, place)], bad)[:1], grad, entmax_attn, **options)
    rows = torch.zeros(1, 2, 400, dtype=torch.bool)
    if name == "query":
        rows[0, 0, place] = True
    else:
        rows[0, 0, place:] = True
    for before, now in zip(clean[:2], dirty[:2], strict=True):
        assert not changed(before, now)[~rows].any()
    if math.isnan(bad):
        assert dirty[0][rows].isnan().all() and dirty[1][rows].isnan().all()
    keys = torch.zeros(1, 2, 400, dtype=torch.bool)
    keys[0, 0, : place + 1 if name == "query" else 400] = True
    for before, now in zip(clean[2:4], dirty[2:4], strict=True):
        assert now[~keys].isfinite().all()
        torch.testing.assert_close(before[~keys], now[~keys])
    if math.isnan(bad):
        assert dirty[2][keys].isnan().all() and dirty[3][keys].isnan().all()


@EXACTLY
@EVERY_ALPHA
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("kind", KINDS)
def test_an_incoming_gradient_reaches_the_keys_that_its_row_weighs(make_inputs, kind, bad, every_alpha):
    inputs = make_inputs(1, 2, 400, 400, 8, **KINDS[kind])
    grad = normal_like(inputs.query)
    options = dict(alpha=torch.tensor([every_alpha] * 2), is_causal=True)
    clean = gradients(inputs, grad, entmax_attn, **options)
    dirty = gradients(inputs, poison(inputs, grad, [("grad", 0, 0, 370, 2)], bad)[1], entmax_attn, **options)
    identity = torch.eye(400).expand(1, 2, 400, 400)
    weights = torch.cat(
        [entmax_attn(*inputs[:2], identity[..., part], **options) for part in torch.arange(400).split(200)], -1
    )
    row = torch.zeros(1, 2, 400, dtype=torch.bool)
    row[0, 0, 370] = True
    assert not changed(clean[0], dirty[0]).any()
    assert not changed(clean[1], dirty[1])[~row].any() and dirty[1][row].isnan().all()
    touched = (weights * row[..., None] > 0).any(2)
    assert dirty[2].isnan().all(-1).equal(touched)
    assert dirty[2][~touched].isfinite().all() and dirty[3][~touched].isfinite().all()
    torch.testing.assert_close(clean[2][~touched], dirty[2][~touched])
    torch.testing.assert_close(clean[3][~touched], dirty[3][~touched])
    others = torch.arange(8) != 2
    torch.testing.assert_close(clean[3][..., others], dirty[3][..., others])
    assert not dirty[3][touched][:, 2].isfinite().any()


@EXACTLY
def test_a_value_in_the_future_of_rows_in_its_block(make_inputs):
    """As it was reported: rows 576 to 598 were NaN."""
    inputs = make_inputs(1, 1, 600, 600, 4)
    inputs.query.zero_()
    inputs.key.zero_()
    inputs.value[:, :, 599] = torch.nan
    out = entmax_attn(*inputs, is_causal=True)
    assert out[:, :, :599].isfinite().all() and out[:, :, 599].isnan().all()
