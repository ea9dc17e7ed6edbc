"""Attention on a paged cache: torch.ops.adasplash.entmax_attn_paged."""

import pytest
import torch

import reference
from adasplash import entmax_attn, entmax_attn_varlen
from common import assert_accurate, assert_same_bits
from paging import LAYOUTS, make_paged, page_of

entmax_attn_paged = torch.ops.adasplash.entmax_attn_paged

# Queries and keys of each sequence.
LENGTHS = {
    "single tokens": ([1, 1, 1], [40, 1, 130]),
    "chunks and single tokens": ([1, 70, 5, 33, 1], [90, 70, 64, 130, 17]),
    "more queries than keys": ([9, 20], [3, 17]),
    "without keys or queries": ([3, 0, 1, 2], [0, 20, 0, 33]),
    "many queries": ([130], [140]),
}
PAGES = (1, 3, 16, 17, 200)
OPTIONS = {
    "causal": dict(is_causal=True),
    "full": dict(is_causal=False),
    "window": dict(is_causal=True, window=(20, -1)),
    "both ways": dict(is_causal=False, window=(3, 30), scale=-0.3),
    "ALiBi": dict(is_causal=True, alibi_slopes="per sequence"),
}
ALPHAS = (1.0, 1.25, 1.5, 2.0, "per head")


def options_of(name, sequences, heads, device):
    options = dict(OPTIONS[name])
    if "alibi_slopes" in options:
        slopes = torch.rand(sequences, heads, generator=torch.Generator().manual_seed(0))
        options["alibi_slopes"] = slopes.to(device)
    return options


def alpha_of(alpha, heads, device):
    return torch.linspace(1.0, 2.0, heads).to(device) if alpha == "per head" else alpha


def attend(paged, lengths, **options):
    return entmax_attn_paged(*paged, cu_seqlens_q=lengths[0], max_seqlen_q=lengths[2], **options)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_against_the_reference(backend, lengths, options, alpha, dtype):
    shape = dict(heads=4, kv_heads=2, value_size=24, dtype=dtype)
    inputs, ends, paged = make_paged(*LENGTHS[lengths], 16, backend.device, **shape)
    options = options_of(options, len(ends[0]) - 1, 4, backend.device)
    alpha = alpha_of(alpha, 4, backend.device)
    out = attend(paged, ends, alpha=alpha, **options)
    assert out.is_contiguous() and out.device == paged.query.device
    exact, composed = (
        reference.attention_varlen(*inputs, *ends, alpha, **options, dtype=type) for type in (torch.float64, dtype)
    )
    assert_accurate("out", out, exact, composed, times=2 if backend.name == "cpu" else 3)


def by_head(alpha, heads, device):
    """The same alpha as a tensor, which is never torch's own attention, and on a GPU the code for any alpha: that
    for one alpha is not there for all kernels, and rounds otherwise."""
    return alpha if isinstance(alpha, torch.Tensor) else torch.full((heads,), alpha, device=device)


def is_served(backend, *caches):
    """On a GPU rows of a cache must be dense and start at multiples of 16 bytes."""
    return backend.name == "cpu" or all(
        x.stride(3) == 1 and all(n * x.element_size() % 16 == 0 for n in (x.shape[3], *x.stride()[:3])) for x in caches
    )


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_where_keys_lie_changes_no_bit(backend, lengths, page, options, alpha, dtype):
    """Pages of all sizes against the same keys behind each other."""
    inputs, ends, paged = make_paged(*LENGTHS[lengths], page, backend.device, heads=6, kv_heads=2, dtype=dtype)
    options = options_of(options, len(ends[0]) - 1, 6, backend.device)
    alpha = by_head(alpha_of(alpha, 6, backend.device), 6, backend.device)
    out = attend(paged, ends, alpha=alpha, **options)
    assert_same_bits(out, entmax_attn_varlen(*inputs, *ends, alpha=alpha, **options))


@pytest.mark.parametrize("int_type", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("sigma", (0.05, 1.5), ids=("much support", "little support"))
@pytest.mark.parametrize("size, value_size", ((16, 16), (33, 7), (1, 64), (128, 128)))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_sizes_change_no_bit(backend, layout, size, value_size, sigma, int_type, dtype):
    shape = dict(heads=4, kv_heads=2, size=size, value_size=value_size, sigma=sigma, dtype=dtype)
    lengths = LENGTHS["chunks and single tokens"]
    inputs, ends, paged = make_paged(*lengths, 16, backend.device, layout, int_type, **shape)
    if not is_served(backend, *paged[1:3]):
        with pytest.raises(RuntimeError, match=r"on the GPU rows of (key|value)_cache must be dense and start at"):
            attend(paged, ends, alpha=1.5, is_causal=True)
        return
    out = attend(paged, ends, alpha=1.5, is_causal=True)
    assert_same_bits(out, entmax_attn_varlen(*inputs, *ends, alpha=1.5, is_causal=True))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("count", (1, 4, 20))
def test_as_many_queries_of_each_sequence(backend, count, alpha, dtype):
    """Without cu_seqlens_q: as a padded batch whose keys end where kv_seqlens says."""
    keys = [60, 3, 17]
    inputs, _, paged = make_paged([count] * 3, keys, 16, backend.device, heads=4, kv_heads=2, dtype=dtype)
    alpha = by_head(alpha_of(alpha, 4, backend.device), 4, backend.device)
    out = entmax_attn_paged(*paged, alpha=alpha, max_seqlen_q=count)
    padded = [inputs.query.unflatten(0, (3, count)).transpose(1, 2)]
    for x in inputs[1:]:
        padded.append(x.new_zeros(3, 2, 60, 16))
        for b, part in enumerate(x.split(keys)):
            padded[-1][b, :, : keys[b]] = part.transpose(0, 1)
    expected = entmax_attn(*padded, alpha=alpha, is_causal=True, kv_seqlens=paged.kv_seqlens)
    assert_same_bits(out, expected.transpose(1, 2).flatten(0, 1))


def test_pages_that_sequences_share(backend, dtype):
    """As of a common start: the second sequence has the first one's pages, and one of its own."""
    inputs, _, paged = make_paged([1, 1], [48, 16], 16, backend.device, heads=2, dtype=dtype)
    table = paged.block_table.clone()
    own = table[1, 0].clone()
    table[1, :3], table[1, 3] = table[0, :3], own
    paged = paged._replace(block_table=table, kv_seqlens=torch.tensor([48, 64], device=backend.device))
    ends = (torch.tensor([0, 1, 2]), torch.tensor([0, 48, 112]))
    query, key, value = inputs
    both = (query, *(torch.cat((x[:48], x)) for x in (key, value)))
    expected = entmax_attn_varlen(*both, *(x.int().to(backend.device) for x in ends), 1, 64, is_causal=True)
    assert_same_bits(entmax_attn_paged(*paged), expected)


@pytest.mark.parametrize("number", (-1, -(2**31), 2**31 - 1))
def test_entries_that_no_key_needs_may_be_anything(backend, number):
    _, ends, paged = make_paged(*LENGTHS["without keys or queries"], 16, backend.device, heads=2)
    expected = attend(paged, ends)
    table = paged.block_table.masked_fill(paged.block_table == -1, number)
    assert_same_bits(attend(paged._replace(block_table=table), ends), expected)
    assert expected.isfinite().all()


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("left", (100, 2**62, 2**63 - 1))
def test_windows_of_any_size_check_pages(backend, left):
    query, cache = torch.randn(10, 2, 8), torch.randn(4, 4, 2, 8)
    table, lengths = torch.tensor([[2**40]]), torch.tensor([3])
    with pytest.raises(RuntimeError, match="block_table must name pages"):
        entmax_attn_paged(query, cache, cache, table, lengths, max_seqlen_q=10, window=(left, -1))


@pytest.mark.parametrize("queries", (0, 1, 20))
def test_pages_behind_a_window_may_be_given_away(backend, queries):
    lengths = (90, 33)
    _, ends, paged = make_paged([queries] * 2, lengths, 16, backend.device, heads=2)
    expected = attend(paged, ends, window=(10, -1))
    table = paged.block_table.clone()
    for b, keys in enumerate(lengths):
        table[b, : max(0, keys - queries - 10) // 16 if queries else None] = -1
    assert (table[0, 0] == -1) and not torch.equal(table, paged.block_table)
    assert_same_bits(attend(paged._replace(block_table=table), ends, window=(10, -1)), expected)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_keys_that_are_not_finite(backend, value):
    """One that is seen breaks its row, and no row that does not see it."""
    inputs, ends, _ = make_paged([2, 1], [40, 40], 16, backend.device, heads=2)
    inputs.key[39] = value  # the first sequence's last key, which in a causal call its last query sees alone
    out = attend(page_of(inputs, [40, 40], 16), ends)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    "queries, keys, page",
    (([], [], 16), ([0, 0], [5, 0], 16), ([1, 2], [0, 0], 16), ([1], [0], 0)),
    ids=("no sequence", "no query", "no key", "pages of no rows"),
)
def test_nothing_there(backend, queries, keys, page):
    inputs, ends, paged = make_paged(queries, keys, max(page, 1), backend.device, heads=4, kv_heads=2)
    if page == 0:
        paged = paged._replace(key_cache=paged.key_cache[:, :0], value_cache=paged.value_cache[:, :0])
    out = attend(paged, ends)
    assert out.shape == inputs.query.shape and not out.any()


@pytest.mark.backends("cpu")
def test_threads_change_no_bit(threads, dtype):
    _, ends, paged = make_paged(*LENGTHS["chunks and single tokens"], 16, "cpu", heads=4, kv_heads=2, dtype=dtype)
    results = []
    for count in (1, 3):
        threads(count)
        results.append(attend(paged, ends))
    assert_same_bits(*results)


# What lengths and tables must not hold: an error on the CPU, no stray access on a GPU.
CONTRADICTIONS = {
    "negative length": (
        dict(kv_seqlens=[-1, 20]),
        "kv_seqlens must be from 0 to the room in a row of block_table, 80, got -1 at [0]",
    ),
    "more keys than room": (
        dict(kv_seqlens=[40, 81]),
        "kv_seqlens must be from 0 to the room in a row of block_table, 80, got 81 at [1]",
    ),
    "negative page": (
        dict(block_table=[[0, 1, 2, -1], [-3, 4, -1, -1]]),
        "block_table must name pages from 0 to 7 where keys of a sequence are, got -3 at [1, 0]",
    ),
    "page beyond the cache": (
        dict(block_table=[[0, 1, 8, -1], [3, 4, -1, -1]]),
        "block_table must name pages from 0 to 7 where keys of a sequence are, got 8 at [0, 2]",
    ),
    "start of queries": (dict(cu_seqlens_q=[1, 3, 5]), "cu_seqlens_q must start at 0, got 1"),
    "decreasing": (
        dict(cu_seqlens_q=[0, 6, 5], max_seqlen_q=6),
        "cu_seqlens_q must not decrease, got 5 after 6 at [2]",
    ),
    "end of queries": (dict(cu_seqlens_q=[0, 3, 4]), "cu_seqlens_q must end at query's number of tokens 5, got 4"),
    "longest query": (
        dict(max_seqlen_q=2),
        "max_seqlen_q must be the longest sequence's length or more, got 2 for a sequence of 3 at [0]",
    ),
}


def arguments(device="cpu", **changes):
    _, _, paged = make_paged([3, 2], [40, 20], 16, device, heads=4, kv_heads=2, size=8)
    given = paged._asdict() | dict(cu_seqlens_q=torch.tensor([0, 3, 5], device=device).int(), max_seqlen_q=3)
    for name in ("key_cache", "value_cache"):
        given[name] = given[name].nan_to_num(0.5)
    for name, x in changes.items():
        given[name] = torch.tensor(x, device=device) if isinstance(x, list) else x
    return given


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_an_error(case):
    changes, words = CONTRADICTIONS[case]
    with pytest.raises(RuntimeError) as error:
        entmax_attn_paged(**arguments(**changes))
    assert str(error.value) == f"entmax_attn_paged: {words}"


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("case", ("negative length", "more keys than room"))
def test_lengths_are_looked_at_without_a_query(case):
    changes, words = CONTRADICTIONS[case]
    nobody = arguments(**changes) | dict(cu_seqlens_q=torch.zeros(3).int())
    nobody["query"] = nobody["query"][:0]
    with pytest.raises(RuntimeError) as error:
        entmax_attn_paged(**nobody)
    assert str(error.value) == f"entmax_attn_paged: {words}"


@pytest.mark.backends("emulated", "cuda")
@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_no_stray_access(backend, case):
    """Wrong rows, but every element is written and the process lives."""
    given = arguments(backend.device, **CONTRADICTIONS[case][0])
    out = entmax_attn_paged(**given)
    assert out.isfinite().all() and torch.equal(out, entmax_attn_paged(**given))


SIZES = {
    "padded query": (dict(query=lambda x: x[None]), "query 3 4"),
    "caches of other types": (dict(key_cache=lambda x: x.double()), "key_cache query Float Double"),
    "cache of three dimensions": (dict(key_cache=lambda x: x[0]), "key_cache 4 3"),
    "keys of another size": (dict(key_cache=lambda x: x[..., :7]), "key_cache head_dim 8 7"),
    "fewer pages of values": (dict(value_cache=lambda x: x[:5]), "value_cache pages 8 5"),
    "smaller pages of values": (dict(value_cache=lambda x: x[:, :5]), "value_cache page 16 5"),
    "values of other heads": (dict(value_cache=lambda x: x[:, :, :1]), "value_cache heads 2 1"),
    "heads not divisible": (dict(query=lambda x: x[:, :3]), "query heads multiple 3 2"),
    "table of floats": (dict(block_table=lambda x: x.float()), "block_table int32 int64 Float"),
    "flat table": (dict(block_table=lambda x: x[0]), "block_table 2 1"),
    "lengths of another batch": (dict(kv_seqlens=lambda x: x[:1]), "kv_seqlens batch 2 1"),
    "lengths of floats": (dict(kv_seqlens=lambda x: x.float()), "kv_seqlens int32 int64 Float"),
    "offsets of another batch": (dict(cu_seqlens_q=lambda x: x[:2]), "cu_seqlens_q 3 2"),
    "queries without offsets": (dict(cu_seqlens_q=lambda x: None), "query max_seqlen_q 3 2 5"),
    "negative max_seqlen_q": (dict(max_seqlen_q=lambda x: -1), "max_seqlen_q 0 -1"),
    "alpha": (dict(alpha=lambda x: 2.5), "alpha 2 2.5"),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_and_types(backend, case):
    changes, words = SIZES[case]
    given = dict(alpha=1.5) | arguments(backend.device)
    with pytest.raises(RuntimeError) as error:
        entmax_attn_paged(**{name: changes.get(name, lambda x: x)(x) for name, x in given.items()})
    message = str(error.value)
    assert message.startswith("entmax_attn_paged: ") and "\n" not in message
    assert all(word in message for word in words.split()), message


@pytest.mark.parametrize("name", ("query", "key_cache", "value_cache", "alpha", "alibi_slopes"))
def test_no_gradient(backend, name):
    """Refused where one is asked for, so that none is lost in silence; not under no_grad."""
    device = backend.device
    options = dict(alpha=torch.tensor([1.5] * 4, device=device), alibi_slopes=torch.zeros(4, device=device))
    given = arguments(device) | options
    expected = entmax_attn_paged(**given)
    given[name] = given[name].detach().clone().requires_grad_()
    words = f"entmax_attn_paged has no gradient, and {name} requires one"
    with pytest.raises(RuntimeError, match=words):
        entmax_attn_paged(**given)
    with torch.no_grad():
        assert_same_bits(entmax_attn_paged(**given), expected)
