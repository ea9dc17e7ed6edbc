"""attention_stats and attention_weights: what the reference's dense matrix says, without building one."""

import pytest
import torch
from torch import Tensor

import reference
from adasplash import attention_stats, attention_weights, entmax_attn
from common import HALF, Inputs, assert_same_bits
from work import peak_mebibytes

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")

ALPHAS = {
    **{str(alpha): alpha for alpha in (1.05, 1.25, 1.5, 2.0)},
    "of each head": torch.tensor([1.1, 1.5, 1.8, 2.0]),
    "one tensor": torch.tensor(1.3),
    "softmax": 1.0,
    "softmax in some heads": torch.tensor([1.0, 1.5, 1.0, 2.0]),
}
STATE = {torch.float64: torch.float64}  # everything else: float32
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}

# 4 heads, 2 of key and value, 2 x 3 tiles.
SHAPE = dict(batch=2, heads=4, m=70, n=130, kv_heads=2)
LENGTHS = dict(q_seqlens=torch.tensor([70, 33]), kv_seqlens=torch.tensor([65, 130]))
SLOPES = torch.tensor([0.5, 0.1, 0.02, 0.0])
OPTIONS = {
    "full": {},
    "causal": dict(is_causal=True),
    "scale": dict(scale=0.6),
    "lengths": LENGTHS,
    "lengths, causal": dict(**LENGTHS, is_causal=True),
    "lengths, window": dict(**LENGTHS, window=(20, 5)),
    "a length of zero": dict(kv_seqlens=torch.tensor([0, 130])),
    "window": dict(window=(20, 5)),
    "window to the left, causal": dict(window=(30, -1), is_causal=True),
    "ALiBi": dict(alibi_slopes=SLOPES),
    "ALiBi of each batch entry": dict(alibi_slopes=torch.stack([SLOPES, SLOPES + 0.2])),
    "all": dict(**LENGTHS, is_causal=True, window=(40, 9), alibi_slopes=SLOPES, scale=0.4),
}


def on(device: str, **options) -> dict:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}


def dense(weights: Tensor, inputs: Inputs) -> Tensor:
    return weights.to_dense().reshape(*inputs.query.shape[:3], inputs.key.shape[2])


def check_stats(inputs: Inputs, **options) -> None:
    """Against the reference."""
    stats = attention_stats(*inputs, **options)
    exact = reference.attention(*inputs, **options)
    alpha = torch.as_tensor(options.get("alpha", 1.5), dtype=torch.float64, device=exact.scores.device)
    alpha = alpha.reshape(-1, 1, 1)
    softmax = alpha == 1
    z = torch.where(softmax, 1, alpha - 1) * exact.scores
    maximum, gap = reference.threshold(z, torch.where(softmax, 1.5, alpha))
    sees = z > -torch.inf
    log_sum = (z - maximum).exp().sum(-1, keepdim=True).log()
    gap = torch.where(softmax & sees.any(-1, keepdim=True), log_sum, gap)
    above = torch.where(softmax, torch.where(sees, 1.0, -1.0), z - maximum - gap)
    tau = torch.where(softmax & (gap < torch.inf), -torch.inf, maximum + gap)
    dtype = STATE.get(inputs.query.dtype, torch.float32)
    tolerance = TOLERANCE[dtype] * max(1, z[z.isfinite()].abs().amax())
    expected = {
        "tau": tau,
        "maximum": maximum,
        "gap": gap,
        "largest_weight": exact.weights.amax(-1, keepdim=True),
    }
    for name, value in expected.items():
        actual = getattr(stats, name)
        assert actual.dtype == dtype and actual.shape == inputs.query.shape[:3], name
        # A power of 1 / (alpha - 1) of the gap, and on a GPU the gap is as near as the type asks.
        times = 5 if name == "largest_weight" else 1
        torch.testing.assert_close(actual.double(), value[..., 0], atol=times * tolerance, rtol=0, msg=name)
    # Keys at the edge of the support may fall on either side of it; weights that float32 cannot hold are none.
    at_least = (above > tolerance) & ((exact.weights > 1e-37) | softmax)
    at_most = above > -tolerance
    assert stats.support_size.dtype == torch.int64
    assert (at_least.sum(-1) <= stats.support_size).all() and (stats.support_size <= at_most.sum(-1)).all()
    assert (stats.support_size > 1).any()


def check_weights(inputs: Inputs, **options) -> None:
    """Against the reference, and the layout that is promised."""
    with torch.sparse.check_sparse_tensor_invariants():
        weights = attention_weights(*inputs, **options)
    exact = reference.attention(*inputs, **options).weights
    dtype = STATE.get(inputs.query.dtype, torch.float32)
    rows, (_, _, _, n) = exact.shape[:3].numel(), exact.shape
    assert weights.layout == torch.sparse_csr and weights.shape == (rows, n) and weights.dtype == dtype
    assert weights.crow_indices().dtype == weights.col_indices().dtype == torch.int64
    assert (weights.values() > 0).all()
    row = torch.arange(rows, device=weights.device).repeat_interleave(weights.crow_indices().diff())
    assert ((row * n + weights.col_indices()).diff() > 0).all(), "columns do not ascend"
    torch.testing.assert_close(dense(weights, inputs).double(), exact, atol=TOLERANCE[dtype], rtol=0)
    total = dense(weights, inputs).double().sum(-1)
    torch.testing.assert_close(total, exact.sum(-1).round(), atol=1e-6 if dtype == torch.float32 else 1e-14, rtol=0)
    count = (weights.to_dense() > 0).sum(-1)
    assert torch.equal(weights.crow_indices().diff(), count)
    # One rounds scores as the kernel does, the other does not, and leaves out what float32 cannot hold.
    stats = attention_stats(*inputs, **options)
    assert (count <= stats.support_size.flatten() + 1).all()
    torch.testing.assert_close(stats.largest_weight, dense(weights, inputs).amax(-1), atol=0, rtol=1e-4)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("check", (check_stats, check_weights))
def test_options(make_inputs, backend, check, options, alpha):
    check(make_inputs(**SHAPE), **on(backend.device, alpha=ALPHAS[alpha], **OPTIONS[options]))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("length", (0, 4))
@pytest.mark.parametrize("check", (check_stats, check_weights))
def test_rows_with_and_without_a_list(make_inputs, monkeypatch, check, length, options):
    """The CPU lists the keys of rows that have few; nothing may depend on how many that is."""
    monkeypatch.setattr("adasplash.inspect._LIST_LENGTH", length)
    check(make_inputs(**SHAPE), alpha=1.7, **OPTIONS[options])


@pytest.mark.parametrize("check", (check_stats, check_weights))
def test_types(make_inputs, check, dtype):
    check(make_inputs(**SHAPE, dtype=dtype), is_causal=True)


@pytest.mark.parametrize("check", (check_stats, check_weights))
@pytest.mark.parametrize("m, n", ((1, 1), (64, 64), (65, 63), (130, 20), (20, 130)))
def test_lengths_and_rows_that_see_nothing(make_inputs, check, m, n):
    inputs = make_inputs(1, 2, m, n, value_size=3)
    check(inputs, is_causal=True) if n > 1 else attention_weights(*inputs)
    stats = attention_stats(*inputs, is_causal=True)
    blind = slice(0, max(m - n, 0))
    assert (stats.tau[..., blind] == torch.inf).all() and (stats.gap[..., blind] == torch.inf).all()
    for x in (stats.maximum, stats.support_size, stats.largest_weight):
        assert not x[..., blind].any()


@pytest.mark.parametrize("sigma", (1e-3, 1.5, 20.0))
def test_however_the_scores_look(make_inputs, sigma):
    """All keys have weight, few have, one has."""
    inputs = make_inputs(1, 2, 70, 140, sigma=sigma)
    weights = dense(attention_weights(*inputs, alpha=2.0), inputs).double()
    exact = reference.attention(*inputs, alpha=2.0).weights
    torch.testing.assert_close(weights, exact, atol=1e-5 * max(1, sigma**2), rtol=0)


def test_equal_keys_share_a_row_equally(make_inputs):
    """Scores round by more than the threshold is below them, and in another way than the kernel's did."""
    inputs = make_inputs(1, 1, 3, 30000, size=64, sigma=30.0)
    inputs.key[:] = inputs.key[:, :, :1].clone()
    weights = attention_weights(*inputs, alpha=2.0)
    torch.testing.assert_close(weights.to_dense(), torch.full_like(weights.to_dense(), 1 / 30000), atol=0, rtol=1e-6)
    stats = attention_stats(*inputs, alpha=2.0)
    assert (stats.support_size == 30000).all()
    torch.testing.assert_close(stats.largest_weight, torch.full_like(stats.gap, 1 / 30000), atol=0, rtol=2e-5)


def test_what_the_weights_are_for(make_inputs):
    """Their product with the values is what the op returns."""
    inputs = make_inputs(1, 1, 100, 140)
    out = attention_weights(*inputs, is_causal=True) @ inputs.value[0, 0]
    torch.testing.assert_close(out, entmax_attn(*inputs, is_causal=True)[0, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "seen, visible, empty",
    (
        ({}, 9, 6),
        (dict(is_causal=True), 6, 3),
        (dict(window=(10, 0)), 5, 2),
        (dict(window=(0, 64)), 5, 2),
        (dict(q_seqlens=torch.tensor([64])), 3, 2),
        (dict(kv_seqlens=torch.tensor([0])), 0, 0),
    ),
    ids=("full", "causal", "window", "window to the right", "lengths", "nothing"),
)
def test_empty_tiles(make_inputs, backend, seen, visible, empty):
    """Queries find their keys in the tile with their own number, and only there."""
    inputs = make_inputs(1, 2, 130, 130)
    for x in (inputs.query, inputs.key):
        for tile in range(3):
            x[:, :, 64 * tile : 64 * tile + 64, tile] += 30
    share = attention_stats(*inputs, **on(backend.device, **seen)).empty_tiles
    expected = empty / visible if visible else 0.0
    assert share.dtype == torch.float64
    torch.testing.assert_close(share, torch.full_like(share, expected))


def test_nan_rows(make_inputs):
    """NaN where there is no number to give, one NaN in the matrix, and nothing anywhere else."""
    inputs = make_inputs(2, 2, 70, 90)
    clean = attention_stats(*inputs), attention_weights(*inputs).to_dense()
    inputs.query[1, 0, 40] = torch.nan
    stats, weights = attention_stats(*inputs), attention_weights(*inputs)
    row = torch.zeros(2, 2, 70, dtype=torch.bool)
    row[1, 0, 40] = True
    for name in ("tau", "maximum", "gap", "largest_weight"):
        before, now = getattr(clean[0], name), getattr(stats, name)
        assert now[row].isnan().all() and torch.equal(now[~row], before[~row]), name
    assert stats.support_size[row] == 0 and torch.equal(stats.support_size[~row], clean[0].support_size[~row])
    flat = row.flatten()
    index = flat.nonzero().item()
    first, last = weights.crow_indices()[index : index + 2]
    assert last - first == 1 and weights.values()[first].isnan() and weights.col_indices()[first] == 0
    assert torch.equal(weights.to_dense()[~flat], clean[1][~flat])


def test_nan_rows_are_marked_where_they_see(make_inputs):
    inputs = make_inputs(1, 1, 70, 90)
    inputs.key[0, 0, 50] = torch.nan
    weights = attention_weights(*inputs, is_causal=True)
    nan_rows = reference.visible(70, 90, is_causal=True)[0, 0, :, 50].to(weights.device)
    assert torch.equal(weights.to_dense().isnan().any(-1), nan_rows)


def test_padding_may_hold_anything(make_inputs, backend):
    lengths = on(backend.device, **LENGTHS)
    inputs = make_inputs(**SHAPE)
    clean = attention_weights(*inputs, **lengths)
    inputs.query[1, :, 33:] = torch.nan
    inputs.key[0, :, 65:] = torch.inf
    inputs.value[0, :, 65:] = torch.nan
    dirty = attention_weights(*inputs, **lengths)
    for part in ("crow_indices", "col_indices", "values"):
        assert torch.equal(getattr(clean, part)(), getattr(dirty, part)())


@pytest.mark.parametrize("empty", (dict(batch=0), dict(heads=0), dict(m=0), dict(n=0), dict(m=0, n=0)), ids=str)
def test_empty(make_inputs, empty):
    inputs = make_inputs(**{**dict(batch=2, heads=3, m=5, n=6, size=4), **empty})
    rows = inputs.query.shape[:3]
    weights = attention_weights(*inputs)
    assert weights.shape == (rows.numel(), inputs.key.shape[2]) and weights.values().numel() == 0
    stats = attention_stats(*inputs)
    assert all(x.shape == rows for x in stats[:-1]) and stats.empty_tiles.shape == rows[:2]
    assert not stats.empty_tiles.any()


def test_strides_and_gradients_do_not_matter(make_inputs):
    inputs = make_inputs(2, 2, 70, 90, requires_grad=True)
    strided = Inputs(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs))
    weights = attention_weights(*strided)
    assert torch.equal(weights.to_dense(), attention_weights(*inputs).to_dense())
    assert not weights.requires_grad and not any(x.requires_grad for x in attention_stats(*strided))
    with torch.inference_mode():
        assert torch.equal(weights.to_dense(), attention_weights(*strided).to_dense())


@pytest.mark.parametrize("function", (attention_stats, attention_weights))
def test_errors_name_the_argument(make_inputs, function):
    inputs = make_inputs(1, 1, 5, 5)
    with pytest.raises(RuntimeError, match=r"alpha must be 1 or from 1\.01 to 2, got 1\.001"):
        function(*inputs, alpha=1.001)
    with pytest.raises(RuntimeError, match="key must have"):
        function(inputs.query, inputs.key[..., :3], inputs.value)


PROGRAM = """
function = getattr(adasplash, sys.argv[2])
def step(n):
    return function(*(torch.randn(1, 1, n, 16) * s for s in (3, 3, 1)), is_causal=True)
"""


@pytest.mark.slow
@pytest.mark.backends("cpu")
@pytest.mark.parametrize("function", ("attention_stats", "attention_weights"))
def test_memory_does_not_grow_with_queries_times_keys(function):
    length = 24576
    extra = peak_mebibytes(PROGRAM, length, function)
    assert extra < length**2 / 2**23, f"{extra:.1f} MiB: a bit for every entry of the matrix"


FUNCTIONS = pytest.mark.parametrize("function", (attention_stats, attention_weights))


def parts(result) -> list[Tensor]:
    """Of both results, to compare their bits."""
    if isinstance(result, Tensor):
        return [result.crow_indices(), result.col_indices(), result.values()]
    return list(result)


@FUNCTIONS
@pytest.mark.parametrize("lower", HALF, ids=("bfloat16", "float16"))
def test_autocast_is_what_it_is_for_entmax_attn(make_inputs, backend, function, lower):
    """A description of another call than the one made there would be of no use; nor would one that refuses it."""
    inputs = make_inputs(**SHAPE)
    options = on(backend.device, **OPTIONS["all"], alpha=ALPHAS["of each head"])
    lowered = Inputs(*(x.to(lower) for x in inputs))
    with torch.autocast(backend.device, dtype=lower):
        single = function(*inputs, **options)
        mixed = function(lowered.query, inputs.key, lowered.value, **options)
        assert entmax_attn(lowered.query, inputs.key, lowered.value, **options).dtype == lower
    for result in (single, mixed):
        assert_same_bits(parts(result), parts(function(*lowered, **options)))
    assert not torch.equal(parts(single)[-1], parts(function(*inputs, **options))[-1]) or function is attention_stats


@pytest.mark.backends("cpu")
@FUNCTIONS
def test_autocast_leaves_doubles_alone(make_inputs, function):
    inputs = make_inputs(**SHAPE, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = function(*inputs)
    assert_same_bits(parts(result), parts(function(*inputs)))


@FUNCTIONS
@pytest.mark.parametrize("shape", ((), (1,)), ids=str)
def test_a_scale_as_a_tensor(make_inputs, backend, function, shape):
    inputs = make_inputs(**SHAPE)
    result = function(*inputs, scale=torch.full(shape, 0.6, device=backend.device, requires_grad=True))
    scaled = Inputs(inputs.query * 0.6, inputs.key, inputs.value)
    assert_same_bits(parts(result), parts(function(*scaled, scale=1.0)))


@FUNCTIONS
@pytest.mark.parametrize(
    "options, name",
    (
        (dict(alpha=3.0), "alpha"),
        (dict(alpha=None), "alpha"),
        (dict(is_causal=None), "is_causal"),
        (dict(window=5), "window"),
        (dict(window=None), "window"),
        (dict(scale=True), "scale"),
        (dict(q_seqlens=70), "q_seqlens"),
        (dict(key=None), "key"),
        (dict(key=torch.zeros(2, 2, 130, 15)), "key"),
        (dict(kv_seqlens=torch.tensor([1])), "kv_seqlens"),
    ),
    ids=str,
)
def test_errors_name_the_function(make_inputs, backend, function, options, name):
    inputs = make_inputs(**SHAPE)._asdict()
    with pytest.raises((TypeError, RuntimeError)) as error:
        function(**inputs | on(backend.device, **options))
    message = str(error.value)
    assert message.startswith(f"{function.__name__}: {name} must ") and "\n" not in message
