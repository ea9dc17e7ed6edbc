"""entmax_attn_summary and entmax_attn_varlen_summary: the op's own output, and facts that inspection finds the long way
(test_inspect.py has them against the reference)."""

import pytest
import torch

import adasplash
import reference
from adasplash import entmax_attn, entmax_attn_summary, entmax_attn_varlen, entmax_attn_varlen_summary
from common import assert_same_bits, gradients, normal_like
from packing import alone, packed

ALPHAS = (1.0, 1.05, 1.5, 2.0, "heads")


def alpha_of(alpha, device, heads=2):
    return torch.tensor([1.0, 1.3, 1.5, 2.0][:heads], device=device) if alpha == "heads" else alpha


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("case", ("plain", "causal", "window"))
def test_output_and_gradients_are_the_ops(make_inputs, backend, dtype, alpha, case):
    options = {"plain": {}, "causal": dict(is_causal=True), "window": dict(window=(20, 3))}[case]
    inputs = make_inputs(m=70, n=70, dtype=dtype)
    grad = normal_like(inputs.query)
    alpha = alpha_of(alpha, backend.device)

    def summarised(*arguments, **keywords):
        out, stats = entmax_attn_summary(*arguments, **keywords)
        assert out.requires_grad and not any(x.requires_grad for x in stats)
        return out

    expected = gradients(inputs, grad, entmax_attn, alpha=alpha, **options)
    assert_same_bits(gradients(inputs, grad, summarised, alpha=alpha, **options), expected)
    with torch.inference_mode():
        out, stats = entmax_attn_summary(*inputs, alpha, **options)
        assert_same_bits(out, entmax_attn(*inputs, alpha, **options))
    assert_same_bits(tuple(stats), tuple(adasplash.attention_stats(*inputs, alpha, **options)))


@pytest.mark.slow
@pytest.mark.parametrize("alpha", ALPHAS)
def test_packed_says_what_each_sequence_says_alone(backend, alpha):
    inputs, lengths = packed([70, 0, 5, 140], [90, 4, 0, 130], device=backend.device)
    alpha = alpha_of(alpha, backend.device)
    out, stats = entmax_attn_varlen_summary(*inputs, *lengths, alpha, is_causal=True)
    assert_same_bits(out, entmax_attn_varlen(*inputs, *lengths, alpha, is_causal=True))
    heads = inputs.query.shape[1]
    assert stats.empty_tiles.shape == (4, heads)
    assert all(x.shape == (heads, inputs.query.shape[0]) for x in stats[:-1])
    for b in range(4):
        sequence, (rows, _) = alone(inputs, lengths, b)
        # By ours, where torch would serve: a window of everything.
        own = entmax_attn_summary(*sequence, alpha, is_causal=True, window=(1000, 1000))[1]
        assert_same_bits(stats.empty_tiles[b], own.empty_tiles[0])
        for name in ("tau", "maximum", "gap", "support_size", "largest_weight"):
            assert_same_bits(getattr(stats, name)[:, rows], getattr(own, name)[0])


@pytest.mark.parametrize("sigma", (0.01, 0.5, 3.0), ids=("all keys", "some keys", "few keys"))
@pytest.mark.parametrize("alpha", (1.0, 1.5, 2.0))
def test_sizes_of_supports(make_inputs, alpha, sigma):
    """Rows with a list and without; over several blocks of keys."""
    inputs = make_inputs(1, 2, 70, 1100, size=8, sigma=sigma, dtype=torch.float32)
    stats = entmax_attn_summary(*inputs, alpha)[1]
    weights = reference.attention(*inputs, alpha).weights
    size, expected = stats.support_size, (weights > 0).sum(-1)
    assert ((size - expected).abs() <= 0.002 * expected + 1).all()
    torch.testing.assert_close(stats.largest_weight.double(), weights.amax(-1), atol=1e-5, rtol=1e-4)


def test_dropout_is_of_the_output_alone(make_inputs, backend):
    inputs = make_inputs(m=40, n=50)
    options = dict(dropout_p=0.5, dropout_seed=torch.tensor(7, device=backend.device))
    for alpha in (1.0, 1.5):
        out, stats = entmax_attn_summary(*inputs, alpha, window=(40, 40), **options)
        assert_same_bits(out, entmax_attn(*inputs, alpha, window=(40, 40), **options))
        assert_same_bits(tuple(stats), tuple(entmax_attn_summary(*inputs, alpha, window=(40, 40))[1]))


def test_memory_of_the_backward_is_not_shared(make_inputs):
    """Facts may be changed in place; the backward has its own."""
    inputs = make_inputs(m=40, n=50, requires_grad=True)
    out, stats = entmax_attn_summary(*inputs)
    grad = normal_like(out)
    for x in stats:
        x.zero_()
    out.backward(grad)
    assert_same_bits(inputs.query.grad, gradients(inputs, grad, entmax_attn)[1])


def test_autocast(make_inputs, backend):
    inputs = make_inputs(m=40, n=50)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        out, stats = entmax_attn_summary(*inputs)
        assert_same_bits(out, entmax_attn(*inputs))
    assert out.dtype == torch.bfloat16 and stats.gap.dtype == torch.float32


class Padded(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, alpha: torch.Tensor):
        out, stats = adasplash.entmax_attn_summary(query, key, value, alpha, True, window=(30, -1))
        return out, stats.support_size, stats.tau, stats.empty_tiles


class Packed(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor):
        out, stats = adasplash.entmax_attn_varlen_summary(query, key, value, ends, ends, 40, 40, 1.5, True)
        return out, stats.support_size, stats.tau, stats.empty_tiles


def arguments(backend):
    inputs, lengths = packed([40, 30], [40, 30], device=backend.device)
    padded = [x.transpose(0, 1)[None].contiguous() for x in inputs]
    return (Padded(), (*padded, torch.tensor([1.0, 1.5], device=backend.device))), (Packed(), (*inputs, lengths[0]))


def test_torchscript_and_export(backend):
    for module, given in arguments(backend):
        expected = module(*given)
        assert_same_bits(torch.jit.script(module)(*given), expected)
        with torch.no_grad():
            assert_same_bits(torch.export.export(module, given).module()(*given), expected)


@pytest.mark.slow
def test_compiled(backend):
    if backend.name == "emulated":
        pytest.skip("inductor wants a real GPU")
    for module, given in arguments(backend):
        given = [x.requires_grad_(x.is_floating_point()) for x in given]
        compiled = torch.compile(module, fullgraph=True)(*given)
        expected = module(*given)
        for x, y in zip(compiled, expected, strict=True):
            torch.testing.assert_close(x, y)
        compiled[0].sum().backward()


@pytest.mark.backends("cpu")
def test_opcheck(make_inputs):
    inputs = make_inputs(m=40, n=50, requires_grad=True)
    ops = torch.ops.adasplash
    torch.library.opcheck(ops.entmax_attn_summary.default, inputs, {"window": [20, 3]})
    saved = ops._entmax_attn_forward(*inputs, None, 1.5, True, None, None, None, None, None, 0, 0, [-1, -1], None, 20)[
        1:
    ]
    saved = [x.detach() for x in saved]
    query, key = inputs.query.detach(), inputs.key.detach()
    options = (None, 1.5, True, None, None, None, None, None, 0, 0, [-1, -1], None)
    torch.library.opcheck(ops._entmax_attn_summary.default, (query, key, *saved, *options))


@pytest.mark.parametrize("name, value", (("alpha", 3.0), ("window", 5), ("dropout_p", True), ("is_causal", None)))
def test_errors_name_the_function(make_inputs, name, value):
    inputs = make_inputs(m=5, n=5)
    with pytest.raises((RuntimeError, TypeError)) as caught:
        entmax_attn_summary(*inputs, **{name: value})
    assert str(caught.value).startswith(f"entmax_attn_summary: {name} must ") and "\n" not in str(caught.value)


def test_saved_tensors_of_wrong_shapes(make_inputs, backend):
    inputs = make_inputs(m=40, n=50)
    ops = torch.ops.adasplash
    options = (None, 1.5, False, None, None, None, None, None, 0, 0, [-1, -1], None)
    saved = ops._entmax_attn_forward(*inputs, *options, 20)[1:]
    for place, name in enumerate(("row_state", "support", "tiles")):
        wrong = list(saved)
        wrong[place] = wrong[place][:, :1].contiguous()
        with pytest.raises(RuntimeError, match=f"_entmax_attn_summary: {name} must have sizes"):
            ops._entmax_attn_summary(*inputs[:2], *wrong, *options)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("capacity", (0, 1, 2, 64, 300))
def test_supports_that_no_list_holds(make_inputs, capacity):
    """The forward says how many keys there are; what a list without room for that, or an older one, does not say is
    counted."""
    inputs = make_inputs(1, 2, 70, 700, size=8, sigma=0.3)
    options = (None, 1.5, False, None, None, None, None, None, 0, 0, [-1, -1], None)
    ops = torch.ops.adasplash
    saved = ops._entmax_attn_forward(*inputs, *options, capacity)[1:]
    expected = entmax_attn_summary(*inputs)[1].support_size
    size = ops._entmax_attn_summary(*inputs[:2], *saved, *options)[0]
    assert torch.equal(size.long(), expected)
    row_state, support, tiles = saved
    support = torch.where(support[..., :1] == -2, -1, support)
    support[..., :1] = torch.where(saved[1][..., :1] == -2, -2, support[..., :1])
    older = ops._entmax_attn_summary(*inputs[:2], row_state, support, tiles, *options)[0]
    assert torch.equal(older.long(), expected)
