"""What the forward keeps for the backward: shapes by formula, and their content."""

import math

import pytest
import torch

import common
import reference
from common import Inputs, normal_like
from options import resolved
from packing import packed

forward = torch.ops.adasplash._entmax_attn_forward
backward = torch.ops.adasplash._entmax_attn_backward


def tiles_of(length):
    return math.ceil(length / 64)


def tiles_shape(batch, heads, m, n):
    return batch, heads, 2 * math.ceil(m / 128), 2 * math.ceil(n / 4096)


def unpacked(tiles, m, n):
    """Bits (B, H, rows, words) int32 -> bool (B, H, query tiles, key tiles)."""
    bits = (tiles[..., None] >> torch.arange(32, device=tiles.device)) & 1
    bits = bits.flatten(-2).bool()
    rows, columns = tiles_of(m), tiles_of(n)
    assert not bits[..., columns:].any() and not bits[..., rows:, :].any(), "a bit beyond the last tile"
    return bits[..., :rows, :columns]


@pytest.mark.parametrize("capacity", (-1, 0, 64, 7))
@pytest.mark.parametrize("m, n", ((1, 1), (64, 64), (65, 129), (130, 70), (3, 64 * 33 + 1)))
def test_shapes(make_inputs, m, n, capacity, dtype, backend):
    if capacity > 0 and backend.support_capacity == 0:
        pytest.skip(f"the {backend.name} backend keeps no support lists")
    inputs = make_inputs(3, 4, m, n, size=8, kv_heads=2, value_size=5, dtype=dtype)
    for tensors in (inputs, [x.to("meta") for x in inputs]):
        out, row_state, support, tiles = forward(*tensors, *resolved(inputs), capacity)
        assert out.shape == (3, 4, m, 5) and out.dtype == dtype
        state_type = torch.float64 if dtype == torch.float64 else torch.float32
        assert (row_state.dtype, support.dtype, tiles.dtype) == (state_type, torch.int32, torch.int32)
        if capacity < 0:
            assert row_state.shape == support.shape == tiles.shape == (0,)
        else:
            assert row_state.shape == (3, 4, m, 2)
            assert support.shape == (3, 4, m, capacity)
            assert tiles.shape == tiles_shape(3, 4, m, n)


@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("alpha", (1.1, 1.5, 1.75, 2.0))
def test_content(make_inputs, backend, alpha, is_causal):
    m, n, capacity = 130, 140, backend.support_capacity
    inputs = make_inputs(2, 4, m, n, kv_heads=2, size=8)
    inputs.query[:, :, ::5] *= 0.01  # every fifth row has more support than a list holds
    options = dict(alpha=alpha, is_causal=is_causal)
    _, row_state, support, tiles = forward(*inputs, *resolved(inputs, **options), capacity)
    exact = reference.attention(*inputs, **options)
    z = (alpha - 1) * exact.scores
    maximum, gap = (x[..., 0] for x in reference.threshold(z, torch.tensor(alpha)))
    torch.testing.assert_close(row_state[..., 0].double(), maximum, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(row_state[..., 1].double(), gap, atol=1e-5, rtol=0)

    distance = z - (maximum + gap)[..., None]
    surely, possibly = distance > 1e-5, distance > -1e-5  # fp32 may decide otherwise on a key at the threshold itself
    padded = [
        torch.nn.functional.pad(x, (0, -n % 64, 0, -m % 64)) for x in (surely & (exact.weights > 1e-30), possibly)
    ]
    for_sure, at_all = (x.unflatten(-1, (-1, 64)).unflatten(-3, (-1, 64)).any(-1).any(-2) for x in padded)
    marked = unpacked(tiles, m, n)
    assert marked[for_sure].all() and not marked[~at_all].any()

    for row in [(b, h, i) for b in range(2) for h in range(4) for i in range(m)] if capacity else ():
        entries = support[row].tolist()
        if entries[0] == -2:
            assert possibly[row].sum() > capacity
            continue
        entries = entries[: entries.index(-1)] if -1 in entries else entries
        assert entries == sorted(set(entries))
        kept = torch.zeros(n, dtype=torch.bool)
        kept[entries] = True
        assert kept[(surely & (exact.weights > 1e-30))[row]].all() and possibly[row][kept].all()


@pytest.mark.parametrize("lengths", ([64, 64], [65, 1, 63, 130], [0, 5, 0, 0, 60, 64], [1] * 40), ids=str)
def test_packed(backend, lengths):
    """What is saved of a packed sequence is what is saved of it alone, from tile row floor(start / 64) + index on."""
    inputs, (ends, _, longest, _) = packed(lengths, lengths, backend.device, heads=3, size=8, sigma=0.7)
    options = (None, 1.5, True, None, None, None, ends, ends, longest, longest, [-1, -1], None)
    capacity, tokens = backend.support_capacity, sum(lengths)
    _, row_state, support, tiles = forward(*inputs, *options, capacity)
    assert row_state.shape == (3, tokens, 2) and support.shape == (3, tokens, capacity)
    assert tiles.shape == (3, 2 * math.ceil((tokens // 64 + len(lengths)) / 2), 2 * math.ceil(longest / 4096))
    used = torch.zeros(tiles.shape[1], dtype=torch.bool, device=tiles.device)
    for b, length in enumerate(lengths):
        rows = slice(int(ends[b]), int(ends[b + 1]))
        alone = [x[rows].transpose(0, 1)[None] for x in inputs]
        _, *expected = forward(*alone, *resolved(Inputs(*alone), is_causal=True), capacity)
        assert torch.equal(row_state[:, rows], expected[0][0]) and torch.equal(support[:, rows], expected[1][0])
        tile_rows = slice(rows.start // 64 + b, rows.start // 64 + b + tiles_of(length))
        if length:
            assert torch.equal(tiles[:, tile_rows], expected[2][0, :, : tiles_of(length)])
        assert not used[tile_rows].any()
        used[tile_rows] = True
    assert not tiles[:, ~used].any()


def test_tiles_say_where_the_weight_is(make_inputs, backend):
    """Queries of one direction and keys of two: whole tiles without weight, whose bits stay clear."""
    m = n = 64 * 40 if backend.max_length > 64 * 40 else 128
    inputs = make_inputs(1, 1, m, n, size=4)
    band = torch.arange(n, device=backend.device) // 64
    hot = torch.nn.functional.one_hot(band % 3, 4).to(inputs.query) * 10
    inputs = inputs._replace(query=hot[None, None], key=hot[None, None])
    *_, tiles = forward(*inputs, *resolved(inputs), backend.support_capacity)
    tile = torch.arange(n // 64, device=backend.device) % 3
    assert torch.equal(unpacked(tiles, m, n)[0, 0], tile[:, None] == tile)


def test_rows_without_a_visible_key_and_nan_rows(make_inputs, backend):
    inputs = make_inputs(1, 1, 5, 3, size=4)
    inputs.query[0, 0, 4] = torch.nan
    _, row_state, support, _ = forward(*inputs, *resolved(inputs, is_causal=True), backend.support_capacity)
    assert row_state[0, 0, :2].tolist() == [[0, torch.inf]] * 2
    assert row_state[0, 0, 2:4].isfinite().all()
    assert row_state[0, 0, 4].isnan().any()
    assert not backend.support_capacity or (support[0, 0, :2, 0] == -1).all()


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
def test_the_backward_takes_any_capacity(make_inputs, is_causal, alpha):
    """Lists, lists that overflow, and no lists at all lead to the same gradients."""
    inputs = make_inputs(2, 4, 70, 90, kv_heads=2, dtype=torch.float64)
    options = resolved(inputs, alpha, is_causal)
    grad = normal_like(inputs.query)
    results = []
    for capacity in (0, 1, 3, 64, 90):
        out, *saved = forward(*inputs, *options, capacity)
        results.append((out, *backward(grad, *inputs, *saved, *options)))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, atol=1e-12, rtol=1e-12)
    assert results[0][4].shape == (0,)


@pytest.mark.parametrize("gathers", (False, True), ids=("tiles", "gathers"))
def test_training_asks_for_what_the_contract_says(make_inputs, backend, gathers):
    """The autograd kernel saves row_state, support and tiles beside the inputs, and nothing of M x N. Where a GPU may
    gather keys it asks for room for their marks too: a place for 2,048 of them."""
    capacity = backend.support_capacity
    if backend.name != "cpu":
        common.gather(1 if gathers else common.MANY)
        capacity = 2 + 1 if gathers else 0
    inputs = make_inputs(1, 2, 70, 90, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        torch.ops.adasplash.entmax_attn(*inputs)
    shapes = {tuple(x.shape) for x in saved} - {tuple(x.shape) for x in inputs} - {(0,)}
    assert shapes == {(1, 2, 70, 2), (1, 2, 70, capacity), tiles_shape(1, 2, 70, 90)}


def test_an_output_that_is_changed_in_place(make_inputs, backend):
    """The GPU's backward needs the output, and autograd notices that it is gone; the CPU's does not."""
    inputs = make_inputs(1, 2, 20, 30, requires_grad=True)
    out = torch.ops.adasplash.entmax_attn(*inputs)
    out.mul_(2)
    if backend.support_capacity:
        changed = torch.autograd.grad(out.sum(), inputs)
        expected = torch.autograd.grad(2 * torch.ops.adasplash.entmax_attn(*inputs).sum(), inputs)
        torch.testing.assert_close(changed, expected)
    else:
        with pytest.raises(RuntimeError, match="inplace"):
            torch.autograd.grad(out.sum(), inputs)
