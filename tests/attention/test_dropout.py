"""Dropout of attention weights: which ones go follows from the seed and from where a weight is, on every backend."""

import os

import pytest
import torch

import adasplash
import reference
from adasplash import entmax_attn, entmax_attn_varlen
from common import Inputs, assert_same_bits, check_gradients, gradients, run_python, scored_inputs
from packing import check_packed, packed

SEED = 0x1234_5678_9ABC_DEF0


@pytest.fixture
def seed(backend):
    return torch.tensor(SEED, device=backend.device)


def kept_weights(entries, heads, m, n, **options):
    """Which weights stay, (entries, heads, m, n), seen through the op: all weights are equal, values an identity."""
    zeros = torch.zeros(entries, heads, m, 1, device=options["dropout_seed"].device)
    key = zeros.new_zeros(entries, heads, n, 1)
    value = torch.eye(n, device=zeros.device).expand(entries, heads, n, n)
    return entmax_attn(zeros, key, value, **options) * n


@pytest.mark.parametrize("alpha", (1.0, 1.3, 1.5, 2.0))
@pytest.mark.parametrize("p", (0.1, 0.5, 0.9))
def test_the_generator(backend, seed, alpha, p):
    found = kept_weights(2, 3, 40, 100, alpha=alpha, dropout_p=p, dropout_seed=seed)
    expected = reference.dropout_factors(seed, p, 2, 3, 40, 100).to(found.dtype)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_known_numbers():
    """Philox4x32-10 as its authors give it (Random123's known answers), and the first words of a mask."""
    counter = [torch.tensor(word) for word in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    words = reference._philox((0xA4093822, 0x299F31D0), counter)
    assert [int(word) for word in words] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("seed_number", (0, 1, -1, 2**63 - 1, -(2**63)))
def test_seeds(backend, seed_number):
    seed = torch.tensor([seed_number], device=backend.device)
    found = kept_weights(1, 1, 10, 70, dropout_p=0.5, dropout_seed=seed)
    expected = reference.dropout_factors(seed, 0.5, 1, 1, 10, 70).to(found.dtype)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_shares_and_independence(seed):
    """Of many weights the share that is asked for goes, and no two rows, heads, entries or seeds have related masks."""
    kept = reference.dropout_factors(seed.cpu(), 0.3, 2, 3, 60, 4000) > 0
    rows = kept.reshape(-1, 4000).double()
    share = rows.mean().item()
    assert abs(share - 0.7) < 4 * (0.3 * 0.7 / rows.numel()) ** 0.5
    deviations = (rows.mean(1) - 0.7) * (4000 / 0.21) ** 0.5
    assert deviations.abs().max() < 4.5 and 0.8 < deviations.std() < 1.2
    centred = (rows - 0.7) / 0.21**0.5
    related = (centred @ centred.T / 4000**0.5).fill_diagonal_(0)
    assert related.abs().max() < 5.5
    neighbours = (centred[:, 1:] * centred[:, :-1]).sum() / centred.numel() ** 0.5
    assert abs(neighbours) < 4.5
    other = reference.dropout_factors(seed.cpu() + 1, 0.3, 2, 3, 60, 4000) > 0
    assert abs((kept == other).double().mean().item() - (0.49 + 0.09)) < 0.005


CASES = {
    "plain": dict(),
    "causal": dict(is_causal=True),
    "lengths": dict(q_seqlens=[30, 37], kv_seqlens=[20, 53], is_causal=True),
    "starts": dict(kv_starts=[7, 0], kv_seqlens=[40, 53], is_causal=True),
    "window": dict(window=(5, 3)),
    "ALiBi": dict(alibi_slopes=[0.3, 0.1]),
}


@pytest.mark.parametrize("alpha", (1.0, 1.3, 1.5, 2.0, "heads"))
@pytest.mark.parametrize("case", CASES)
def test_gradients(make_inputs, backend, dtype, seed, case, alpha):
    options = {
        name: torch.tensor(x, device=backend.device) if isinstance(x, list) else x for name, x in CASES[case].items()
    }
    alpha = torch.tensor([1.0, 1.4], device=backend.device) if alpha == "heads" else alpha
    inputs = make_inputs(m=37, n=53, dtype=dtype)
    check_gradients(entmax_attn, inputs, alpha=alpha, dropout_p=0.3, dropout_seed=seed, **options)


@pytest.mark.parametrize("sigma", (0.05, 0.5, 3.0), ids=("all keys", "some keys", "few keys"))
@pytest.mark.parametrize("alpha", (1.0, 1.5))
def test_many_keys_and_grouped_queries(make_inputs, seed, alpha, sigma):
    inputs = make_inputs(batch=1, heads=4, kv_heads=2, m=70, n=700, size=8, sigma=sigma)
    check_gradients(entmax_attn, inputs, alpha=alpha, dropout_p=0.4, dropout_seed=seed)


def test_packed(backend, seed):
    inputs, lengths = packed([70, 0, 5, 33], [90, 4, 0, 33], device=backend.device)
    for alpha in (1.0, 1.5, 2.0):
        check_packed(inputs, lengths, alpha=alpha, is_causal=True, dropout_p=0.3, dropout_seed=seed)


def test_same_bits_padded_and_packed_and_with_starts(backend, seed):
    """The mask is of places in a sequence: where the sequence lies changes nothing."""
    lengths = [20, 33]
    inputs, offsets = packed(lengths, lengths, device=backend.device)
    options = dict(is_causal=True, dropout_p=0.3, dropout_seed=seed)
    out = entmax_attn_varlen(*inputs, *offsets, **options)
    ends = torch.tensor(lengths, device=backend.device)

    def padded(x, before):
        result = x.new_full((2, x.shape[1], 40 + before, x.shape[2]), torch.nan)
        result[0, :, before : before + 20] = x[:20].transpose(0, 1)
        result[1, :, before : before + 33] = x[20:].transpose(0, 1)
        return result

    for before in (0, 3):
        query, (key, value) = padded(inputs.query, 0), (padded(x, before) for x in inputs[1:])
        starts = {"kv_starts": torch.full_like(ends, before)} if before else {}
        same = entmax_attn(query, key, value, q_seqlens=ends, kv_seqlens=ends + before, **starts, **options)
        assert_same_bits(out, torch.cat([same[0, :, :20], same[1, :, :33]], 1).transpose(0, 1).contiguous())


def test_an_entry_does_not_depend_on_the_others(make_inputs, seed):
    """Its number in the batch counts, its neighbours do not."""
    inputs = make_inputs(3, m=20, n=30)
    other = Inputs(*(x.clone() for x in inputs))
    for x in other:
        x[[0, 2]] = x[[2, 0]]
    options = dict(dropout_p=0.5, dropout_seed=seed)
    assert_same_bits(entmax_attn(*inputs, **options)[1], entmax_attn(*other, **options)[1])


def test_what_it_does_not_change(make_inputs, seed):
    """The threshold, the support and the tiles know nothing of it; 0 changes no bit of anything."""
    inputs = make_inputs(m=70, n=90)
    options = (None, 1.5, False, None, None, None, None, None, 0, 0, [-1, -1], None, 64)
    forward = torch.ops.adasplash._entmax_attn_forward
    assert_same_bits(forward(*inputs, *options)[1:], forward(*inputs, *options, None, 0.5, seed)[1:])
    assert_same_bits(entmax_attn(*inputs), entmax_attn(*inputs, dropout_p=0.0, dropout_seed=seed))


@pytest.mark.backends("cpu")  # a GPU's products are of whole tiles
@pytest.mark.parametrize("alpha", (1.0, 1.5, 2.0))
@pytest.mark.parametrize("keys", (4, 600))
def test_dropped_values_and_gradients_may_hold_anything(keys, alpha):
    """A weight that is dropped reads no value, and its key gets nothing of the row's gradient."""
    seed = torch.tensor(SEED)
    kept = reference.dropout_factors(seed, 0.5, 1, 1, 40, keys)[0, 0] > 0
    inputs = scored_inputs(torch.zeros(40, keys), torch.ones(keys, 3))
    inputs.value[0, 0, 2] = torch.nan
    options = dict(alpha=torch.tensor(alpha), dropout_p=0.5, dropout_seed=seed)
    out = entmax_attn(*inputs, **options)
    assert torch.equal(out[0, 0].isnan().all(-1), kept[:, 2]) and torch.equal(out[0, 0].isnan().any(-1), kept[:, 2])
    inputs.value[0, 0, 2] = 1.0
    grad = torch.ones(1, 1, 40, 3)
    grad[0, 0, 7] = torch.nan
    dv = gradients(inputs, grad, entmax_attn, **options)[3]
    assert torch.equal(dv[0, 0].isnan().all(-1), kept[7]) and torch.equal(dv[0, 0].isnan().any(-1), kept[7])


def test_seeds_that_are_drawn(make_inputs, backend):
    """By torch's generator: one seed there, one result; a new one with every call."""
    inputs = make_inputs(m=30, n=40)
    torch.manual_seed(5)
    first, second = (entmax_attn(*inputs, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert_same_bits(first, entmax_attn(*inputs, dropout_p=0.5))
    assert not torch.equal(first, second)
    before = torch.get_rng_state() if backend.device == "cpu" else torch.cuda.get_rng_state()
    entmax_attn(*inputs)
    after = torch.get_rng_state() if backend.device == "cpu" else torch.cuda.get_rng_state()
    assert torch.equal(before, after)


def test_the_mean_over_seeds_is_the_output(make_inputs, backend):
    if backend.name == "emulated":
        pytest.skip("emulation is too slow for as many")
    inputs = make_inputs(1, 2, 10, 40, sigma=0.5)
    mean = sum(entmax_attn(*inputs, dropout_p=0.2) for _ in range(800)) / 800
    torch.testing.assert_close(mean, entmax_attn(*inputs), atol=0.05, rtol=0)


def test_checkpointing_drops_the_same(make_inputs):
    inputs = make_inputs(m=30, n=40, requires_grad=True)

    def attend(*tensors):
        return entmax_attn(*tensors, dropout_p=0.5)

    def run(function):
        torch.manual_seed(3)
        for x in inputs:
            x.grad = None
        function(*inputs).square().sum().backward()
        return [x.grad for x in inputs]

    checkpointed = run(lambda *x: torch.utils.checkpoint.checkpoint(attend, *x, use_reentrant=False))
    assert_same_bits(run(attend), checkpointed)


@pytest.mark.parametrize(
    "options, words",
    (
        (dict(dropout_p=-0.1), "dropout_p must be 0 or more and less than 1, got -0.1"),
        (dict(dropout_p=1.0), "dropout_p must be 0 or more and less than 1, got 1"),
        (dict(dropout_p=float("nan")), "dropout_p must be 0 or more and less than 1, got nan"),
        (dict(dropout_p=0.5, dropout_seed=torch.tensor(3, dtype=torch.int32)), "dropout_seed must be int64, got"),
        (dict(dropout_p=0.5, dropout_seed=torch.tensor([3, 4])), "dropout_seed must have one number's size 1, got 2"),
        (dict(dropout_seed=torch.zeros(1, 1, dtype=torch.long)), "dropout_seed must have 1 dimension"),
    ),
)
def test_errors(make_inputs, backend, options, words):
    options = {name: x.to(backend.device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    inputs = make_inputs(m=5, n=5)
    for alpha in (1.0, 1.5):
        with pytest.raises(RuntimeError, match=f"entmax_attn: {words}") as caught:
            entmax_attn(*inputs, alpha, **options)
        assert "\n" not in str(caught.value)


def test_the_op_needs_a_seed(make_inputs):
    with pytest.raises(
        RuntimeError, match="dropout_p above 0 needs dropout_seed, one int64 on query's device, got none"
    ):
        torch.ops.adasplash.entmax_attn(*make_inputs(m=5, n=5), dropout_p=0.5)


@pytest.mark.parametrize("given", (None, True, "0.5", torch.tensor(0.5)))
def test_p_of_another_kind(make_inputs, given):
    with pytest.raises(TypeError, match="entmax_attn: dropout_p must be a number, got"):
        entmax_attn(*make_inputs(m=5, n=5), dropout_p=given)
    with pytest.raises(TypeError, match="entmax_attn: dropout_seed must be a tensor or None, got 3"):
        entmax_attn(*make_inputs(m=5, n=5), dropout_p=0.5, dropout_seed=3)


class Model(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return adasplash.entmax_attn(query, key, value, dropout_p=0.5)


def test_fx_traces_it(make_inputs):
    inputs = make_inputs(m=20, n=30)
    traced = torch.fx.symbolic_trace(Model())
    torch.manual_seed(1)
    first = traced(*inputs)
    torch.manual_seed(1)
    assert_same_bits(first, Model()(*inputs))


def test_torchscript_draws_too(make_inputs):
    inputs = make_inputs(m=20, n=30)
    scripted = torch.jit.script(Model())
    torch.manual_seed(1)
    first = scripted(*inputs)
    torch.manual_seed(1)
    assert_same_bits(first, Model()(*inputs))
    assert not torch.equal(first, scripted(*inputs))


@pytest.mark.slow
def test_compiled_it_draws_anew_with_every_call(make_inputs, backend):
    if backend.name == "emulated":
        pytest.skip("inductor wants a real GPU")
    inputs = make_inputs(m=20, n=30, requires_grad=True)
    compiled = torch.compile(Model(), fullgraph=True)
    first, second = compiled(*inputs), compiled(*inputs)
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


@pytest.mark.backends("cpu")
def test_threads_change_no_bit():
    program = """
import sys, torch, adasplash
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
q, k, v = (torch.randn(2, 3, 200, 16, requires_grad=True) for _ in range(3))
out = adasplash.entmax_attn(q, k, v, torch.tensor([1.0, 1.5, 2.0]), dropout_p=0.3)
out.square().sum().backward()
print(*(hash(x.detach().numpy().tobytes()) for x in (out, q.grad, k.grad, v.grad)))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    found = {run_python(program, threads, env=environment) for threads in (1, 2, 3)}
    assert len(found) == 1
