"""An index of a cache's keys: what its entries promise, that they are kept, and that attention has the same bits with
it."""

import pytest
import torch

import adasplash
from adasplash import entmax_attn, entmax_attn_paged, entmax_cache_append, entmax_key_index_update, make_key_index
from common import assert_same_bits
from key_indexes import Parts, check_entries
from paging import LAYOUTS, empty_caches, make_paged

BLOCKS, PAGE, HEADS = 5, 6, 2
SIZES = (1, 3, 16, 64, 80, 96, 128, 200, 255, 256)


def all_slots(key_cache):
    return torch.arange(key_cache.shape[0] * key_cache.shape[1], device=key_cache.device)


def indexed(key_cache, slots=None):
    index = make_key_index(key_cache)
    entmax_key_index_update(key_cache, all_slots(key_cache) if slots is None else slots, index)
    return index


def drawn(shape, dtype, device, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def outlier(keys):
    keys[..., keys.shape[-1] // 3] *= 50


def large_mean(keys):
    keys += 30


def flat(keys):
    keys *= 0.02


def equal(keys):
    keys[:] = keys[:1, :1]


def one_channel(keys):
    keys[..., 1:] = 0


def zeros(keys):
    keys[::2] = 0


def small(keys):
    """From what the type can just hold to what has a scale."""
    info = torch.finfo(keys.dtype)
    sizes = torch.logspace(-70, -50, keys.shape[0] * keys.shape[1], base=2.0, dtype=torch.float64)
    keys *= sizes.view(*keys.shape[:2], 1, 1).to(keys)
    keys[0, 0] = info.smallest_normal
    keys[0, 1] = info.smallest_normal * info.eps


def large(keys):
    """On both sides of the norm from which on keys have no code, where the type has such numbers."""
    most = min(torch.finfo(keys.dtype).max / 16, 2.0**61)
    sizes = torch.linspace(0.01, 1, keys.shape[0] * keys.shape[1], dtype=torch.float64) * most
    keys /= keys.double().square().sum(-1, keepdim=True).sqrt().to(keys)
    keys *= sizes.view(*keys.shape[:2], 1, 1).to(keys)


def not_finite(keys):
    keys[0, 0, 0, 0] = torch.nan
    keys[0, 1, :, -1] = torch.inf
    keys[1, 0, 1, 0] = -torch.inf
    keys[1, 2] = torch.inf


KINDS = (outlier, large_mean, flat, equal, one_channel, zeros, small, large, not_finite)


@pytest.mark.parametrize("size", SIZES)
def test_entries_bound_every_score(backend, size, dtype):
    keys = drawn((BLOCKS, PAGE, HEADS, size), dtype, backend.device)
    check_entries(indexed(keys), keys, all_slots(keys))


@pytest.mark.parametrize("size", (16, 80, 128))
@pytest.mark.parametrize("kind", KINDS)
def test_entries_of_unusual_keys(backend, kind, size, dtype):
    keys = drawn((BLOCKS, PAGE, HEADS, size), dtype, backend.device)
    kind(keys)
    check_entries(indexed(keys), keys, all_slots(keys))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_caches_of_any_strides(backend, layout, dtype):
    keys = drawn((BLOCKS, PAGE, HEADS, 24), dtype, backend.device)
    cache, _ = empty_caches(BLOCKS, PAGE, HEADS, (24, 24), layout, keys)
    cache[:] = keys
    if layout == "a head apart" and backend.name != "cpu":
        with pytest.raises(RuntimeError, match="the last dimension of key_cache must be dense on the GPU"):
            indexed(cache)
        return
    assert_same_bits(indexed(cache), indexed(keys))


def smaller_errors(parts, keys):
    parts.errors.mul_(0.99)


def no_room(parts, keys):
    parts.errors.sub_(keys.float().square().sum(-1).sqrt().transpose(1, 2) * 2.0**-11)


def stale_codes(parts, keys):
    parts.codes.copy_(parts.codes.roll(1, dims=2))


def coarser_codes(parts, keys):
    parts.codes.bitwise_and_(~1)


def swapped_halves(parts, keys):
    parts.codes.copy_(torch.cat(parts.codes.chunk(2, dim=-1)[::-1], dim=-1))


def larger_errors(parts, keys):
    parts.errors.mul_(1.01)


def another_key(parts, keys):
    parts.errors[-1, -1, -1] = torch.inf


def larger_scales(parts, keys):
    parts.scales.mul_(1.0001)


@pytest.mark.parametrize("size", (64, 80, 128, 256))
@pytest.mark.parametrize(
    "fault",
    (smaller_errors, no_room, stale_codes, coarser_codes, swapped_halves, larger_errors, another_key, larger_scales),
)
def test_a_wrong_index_is_noticed(backend, fault, size, dtype):
    """By the checks above."""
    keys = drawn((BLOCKS, PAGE, HEADS, size), dtype, backend.device)
    index = indexed(keys)
    check_entries(index, keys, all_slots(keys))
    fault(Parts.of(index, keys), keys)
    with pytest.raises(AssertionError):
        check_entries(index, keys, all_slots(keys))


def test_an_empty_index_says_nothing(backend, dtype):
    keys = drawn((BLOCKS, PAGE, HEADS, 24), dtype, backend.device)
    index = make_key_index(keys)
    assert index.dtype == torch.uint8 and index.device == keys.device and index.is_contiguous()
    check_entries(index, keys, all_slots(keys)[:0])
    number = {torch.float32: 6, torch.float64: 7, torch.float16: 5, torch.bfloat16: 15}[dtype]
    header = Parts.of(index, keys).header.tolist()
    assert header[:7] == [0x494B6441, 2, BLOCKS, PAGE, HEADS, 24, number] and not any(header[7:])


@pytest.mark.parametrize("int_type", (torch.int32, torch.int64), ids=str)
def test_slots(backend, int_type, dtype):
    """Those that are named, once or often, and no other entry changes."""
    keys = drawn((BLOCKS, PAGE, HEADS, 24), dtype, backend.device)
    index = make_key_index(keys)
    slots = torch.tensor([3, -1, 17, 3, 8, -1, 29], dtype=int_type, device=backend.device)
    entmax_key_index_update(keys, slots, index)
    check_entries(index, keys, slots[slots >= 0].long().unique())
    entmax_key_index_update(keys, slots[:0], index)
    entmax_key_index_update(keys, torch.full_like(slots, -1), index)
    check_entries(index, keys, slots[slots >= 0].long().unique())


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_append_keeps_the_index(backend, layout, dtype):
    """Tokens are overwritten, sequences rolled back, slots used again, also twice in a call: the index is that of what
    the cache holds, and so it is bit for bit."""
    caches = empty_caches(BLOCKS, PAGE, HEADS, (24, 8), layout, drawn((1,), dtype, backend.device))
    index, written = make_key_index(caches[0]), set()
    calls = ([0, 1, 2, 3], [4], [3, 4], [29, -1, 12, 29, 29], [0], [-1], [], [12, 13, 12])
    for number, slots in enumerate(calls):
        new = [drawn((len(slots), HEADS, size), dtype, backend.device, seed=number) for size in (24, 8)]
        entmax_cache_append(*new, *caches, torch.tensor(slots, dtype=torch.int64, device=backend.device), index)
        written |= {slot for slot in slots if slot >= 0}
        places = torch.tensor(sorted(written), device=backend.device)
        check_entries(index, caches[0], places)
        assert_same_bits(index, indexed(caches[0], places))


@pytest.mark.backends("cpu")
def test_threads_change_nothing(threads, dtype):
    keys = drawn((40, 16, 3, 80), dtype, "cpu")
    slots = torch.randint(-1, 40 * 16, (3000,), generator=torch.Generator().manual_seed(0))
    made = []
    for count in (1, 3):
        threads(count)
        made.append(indexed(keys, slots))
    assert_same_bits(*made)


LENGTHS = {
    "single tokens": ([1, 1, 1], [40, 1, 130]),
    "chunks and single tokens": ([1, 70, 5, 33, 1], [90, 70, 64, 130, 17]),
    "without keys or queries": ([3, 0, 1, 2], [0, 20, 0, 33]),
}
OPTIONS = {
    "causal": dict(is_causal=True),
    "full": dict(is_causal=False, scale=-0.3),
    "window": dict(is_causal=True, window=(20, -1)),
    "ALiBi": dict(is_causal=False, alibi_slopes=torch.linspace(0.1, 0.5, 4)),
}
ALPHAS = (1.0, 1.2, 1.5, 2.0, "per head")


def alpha_of(alpha, device):
    return torch.tensor([1.0, 1.25, 1.5, 2.0], device=device) if alpha == "per head" else alpha


def options_of(name, device):
    return {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in OPTIONS[name].items()}


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("page", (1, 16, 200))
@pytest.mark.parametrize("lengths", LENGTHS)
def test_an_index_changes_no_bit_of_pages(backend, lengths, page, options, alpha, dtype):
    """In a random order, with NaN in all rows that no sequence has."""
    shape = dict(heads=4, kv_heads=2, value_size=24, dtype=dtype)
    _, ends, paged = make_paged(*LENGTHS[lengths], page, backend.device, **shape)
    call = dict(cu_seqlens_q=ends[0], max_seqlen_q=ends[2], alpha=alpha_of(alpha, backend.device))
    call |= options_of(options, backend.device)
    expected = entmax_attn_paged(*paged, **call)
    for index in (make_key_index(paged.key_cache), indexed(paged.key_cache)):
        assert_same_bits(entmax_attn_paged(*paged, **call, key_index=index), expected)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("limits", ("all", "lengths", "starts"))
@pytest.mark.parametrize("m, n", ((1, 130), (4, 77), (33, 40)))
def test_an_index_changes_no_bit_of_padded_calls(backend, make_inputs, m, n, limits, options, alpha, dtype):
    inputs = make_inputs(2, 4, m, n, kv_heads=2, dtype=dtype)
    call = dict(alpha=alpha_of(alpha, backend.device)) | options_of(options, backend.device)
    numbers = dict(device=backend.device, dtype=torch.int32)
    if limits != "all":
        call["kv_seqlens"] = torch.tensor([n, n // 2], **numbers)
    if limits == "lengths":
        call["q_seqlens"] = torch.tensor([m // 2, m], **numbers)
    if limits == "starts":
        call["kv_starts"] = torch.tensor([n // 3, n // 2], **numbers)
    expected = entmax_attn(*inputs, **call)
    for keys in (inputs.key, inputs.key.transpose(1, 2).contiguous().transpose(1, 2)):
        index = indexed(keys.transpose(1, 2))
        assert_same_bits(entmax_attn(inputs.query, keys, inputs.value, **call, key_index=index), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_changes_no_bit_of_unusual_keys(backend, kind, dtype):
    query, key, value = (drawn((2, 70, heads, 16), dtype, backend.device, heads) for heads in (4, 2, 2))
    kind(key)
    inputs = [x.transpose(1, 2) for x in (query[:, :3], key, value)]
    expected = entmax_attn(*inputs)
    out = entmax_attn(*inputs, key_index=indexed(key))
    assert torch.equal(out.isnan(), expected.isnan())
    assert_same_bits(out.nan_to_num(-7), expected.nan_to_num(-7))


def best_first(keys, query):
    keys[:, :, 0] = query[:, ::2, 0]


def best_last(keys, query):
    keys[:, :, -1] = query[:, ::2, 0]


def best_at_borders(keys, query):
    keys[:, :, 63:] = keys[:, :, 63:].clone() * 0.1
    keys[:, :, 63], keys[:, :, 64] = query[:, ::2, 0], query[:, 1::2, 0]


def alike(keys, query):
    keys[:] = query[:, ::2] * 0.5


def far(keys, query):
    keys[:, :, keys.shape[2] // 2] *= 1000


def in_clusters(keys, query):
    keys[:, :, ::7] += 3 * query[:, ::2]


@pytest.mark.parametrize("alpha", (1.2, 1.5, 2.0))
@pytest.mark.parametrize("change", (best_first, best_last, best_at_borders, alike, far, in_clusters))
@pytest.mark.parametrize("n", (100, 5000))
def test_the_best_keys_anywhere(backend, make_inputs, n, change, alpha, dtype):
    """Of few queries, which need not read most keys."""
    inputs = make_inputs(2, 4, 1, n, size=64, kv_heads=2, dtype=dtype)
    change(inputs.key, inputs.query)
    expected = entmax_attn(*inputs, alpha)
    index = indexed(inputs.key.transpose(1, 2))
    assert_same_bits(entmax_attn(*inputs, alpha, key_index=index), expected)
    # Half of the keys are none that the index knows: all of these are read.
    known = torch.arange(0, 2 * n, 2, device=backend.device)
    assert_same_bits(entmax_attn(*inputs, alpha, key_index=indexed(inputs.key.transpose(1, 2), known)), expected)


def test_bytes_of_any_kind_are_no_stray_access(backend, make_inputs, dtype):
    """An index that knows nothing of its keys' changes may give wrong weights, and no more."""
    inputs = make_inputs(2, 4, 1, 130, kv_heads=2, dtype=dtype)
    index = make_key_index(inputs.key.transpose(1, 2))
    random = torch.randint(0, 256, index[1:].shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    index[1:] = random.to(index.device)
    out = entmax_attn(*inputs, key_index=index)
    if backend.name == "cpu":  # which reads the keys
        assert_same_bits(out, entmax_attn(*inputs))
    assert_same_bits(entmax_attn(*inputs, key_index=index).isnan(), out.isnan())


def test_pages_are_copied_with_their_rows(backend, dtype):
    """A common start that a second sequence is given as a copy."""
    _, _, paged = make_paged([1, 1], [48, 16], 16, backend.device, heads=2, dtype=dtype)
    index = indexed(paged.key_cache)
    table = paged.block_table.clone()
    free = torch.tensor([b for b in range(paged.key_cache.shape[0]) if b not in table.tolist()[0] + table.tolist()[1]])
    start, copies = table[0, :2].long(), free[:2].to(backend.device)
    for cache in (paged.key_cache, paged.value_cache):
        cache[copies] = cache[start]
    index[1 + copies] = index[1 + start]
    assert_same_bits(index, indexed(paged.key_cache))
    table[1, 2], table[1, :2] = table[1, 0].clone(), copies.to(table.dtype)
    call = (*paged[:3], table, torch.tensor([48, 48], device=backend.device))
    assert_same_bits(entmax_attn_paged(*call, key_index=index), entmax_attn_paged(*call))


def test_a_step_keeps_and_reads_the_index(backend):
    caches = [torch.zeros(2, 40, HEADS, 16, device=backend.device) for _ in range(2)]
    expected, index = [x.clone() for x in caches], make_key_index(caches[0])
    for held, new in ((0, 5), (5, 1), (6, 1), (4, 3)):
        query, key, value = (drawn((2, new, n, 16), torch.float32, backend.device, held + n) for n in (4, 2, 2))
        out = adasplash.entmax_attn_with_kvcache(query, *caches, key, value, held, key_index=index)
        assert_same_bits(out, adasplash.entmax_attn_with_kvcache(query, *expected, key, value, held))
    assert_same_bits(caches, expected)
    written = torch.cat([torch.arange(7), 40 + torch.arange(7)]).to(backend.device)
    assert_same_bits(index, indexed(caches[0], written))


def test_calls_that_do_without(backend, make_inputs):
    """An index of nothing shows where it would be read: calls that record gradients, with dropout, with softmax."""
    inputs = make_inputs(2, 4, 3, 40, kv_heads=2)
    index = make_key_index(inputs.key.transpose(1, 2))
    options = dict(dropout_p=0.5, dropout_seed=torch.tensor(3, device=backend.device))
    for call in (dict(alpha=1.0), options):
        assert_same_bits(entmax_attn(*inputs, **call, key_index=index), entmax_attn(*inputs, **call))
    gradients = []
    for key_index in (None, index):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = entmax_attn(*leaves, key_index=key_index)
        gradients.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    assert_same_bits(*gradients)
    summary = torch.ops.adasplash.entmax_attn_summary
    assert_same_bits(summary(*inputs, key_index=index), summary(*inputs))


@pytest.mark.parametrize("blocks, page, heads", ((0, 6, 2), (5, 0, 2), (5, 6, 0), (0, 0, 0)))
def test_nothing_there(backend, blocks, page, heads):
    keys = torch.zeros(blocks, page, heads, 24, device=backend.device)
    index = indexed(keys, torch.tensor([-1], device=backend.device))
    assert index.shape[0] == 1 + blocks
    entmax_cache_append(keys.new_zeros(0, heads, 24), keys.new_zeros(0, heads, 24), keys, keys.clone(),
                        torch.zeros(0, dtype=torch.int64, device=backend.device), index)  # fmt: skip
    query = torch.zeros(2, 1, 0 if heads == 0 else 4, 24, device=backend.device)
    table = torch.zeros(2, 0, dtype=torch.int32, device=backend.device)
    lengths = torch.zeros(2, dtype=torch.int32, device=backend.device)
    out = entmax_attn_paged(query.flatten(0, 1), keys, keys, table, lengths, key_index=index)
    assert out.shape == (2, query.shape[2], 24) and not out.any()


UNFIT = {
    "fewer pages": (lambda x: x[:-1], "sizes"),
    "one of wider pages": (lambda x: torch.cat((x, x), dim=1), "sizes"),
    "floats": (lambda x: x.float(), "uint8"),
    "flat": (lambda x: x.flatten(), "two dimensions"),
    "not contiguous": (lambda x: x.T.contiguous().T, "contiguous"),
    "not aligned": (lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape), "16 bytes"),
}


def calls(keys, index):
    """Every op that takes an index, over one cache."""
    blocks, _, heads, size = keys.shape
    slots, table = torch.tensor([0, 1], device=keys.device), torch.zeros(1, 1, dtype=torch.int32, device=keys.device)
    token, caches = keys.new_zeros(2, heads, size), (keys.clone(), keys.clone())
    query, lengths = keys.new_zeros(blocks, 1, heads, size), torch.ones(1, dtype=torch.int32, device=keys.device)
    return {
        "entmax_key_index_update": lambda: entmax_key_index_update(keys, slots, index),
        "entmax_cache_append": lambda: entmax_cache_append(token, token, *caches, slots, index),
        "entmax_attn_paged": lambda: entmax_attn_paged(query[:1, 0], *caches, table, lengths, key_index=index),
        "entmax_attn": lambda: entmax_attn(*(x.transpose(1, 2) for x in (query, *caches)), key_index=index),
    }


@pytest.mark.parametrize("op", ("entmax_key_index_update", "entmax_cache_append", "entmax_attn_paged", "entmax_attn"))
@pytest.mark.parametrize("case", UNFIT)
def test_indexes_of_other_sizes(backend, op, case):
    change, words = UNFIT[case]
    keys = torch.ones(BLOCKS, PAGE, HEADS, 24, device=backend.device)
    with pytest.raises(RuntimeError) as error:
        calls(keys, change(make_key_index(keys)))[op]()
    message = str(error.value)
    assert message.startswith(f"{op}: key_index must") and words in message and "\n" not in message


@pytest.mark.parametrize("op", ("entmax_key_index_update", "entmax_cache_append", "entmax_attn_paged", "entmax_attn"))
def test_indexes_on_other_devices(backend, op):
    keys = torch.ones(BLOCKS, PAGE, HEADS, 24, device=backend.device)
    with pytest.raises((RuntimeError, NotImplementedError), match="device"):
        calls(keys, make_key_index(keys).to("meta"))[op]()


HEADER = {
    0: "be what make_key_index gave, got a tensor of something else",
    1: "have version 1, got 2",
    2: "have the keys' number of pages 5, got 6",
    3: "have the keys' page size 6, got 7",
    4: "have the keys' number of heads 2, got 3",
    5: "have the keys' head_dim 24, got 25",
    6: "be of keys of dtype Float, got one of another",
}


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("op", ("entmax_key_index_update", "entmax_cache_append", "entmax_attn_paged", "entmax_attn"))
@pytest.mark.parametrize("word", HEADER)
def test_headers_of_other_caches(op, word):
    """On the CPU, before anything is written."""
    keys = torch.ones(BLOCKS, PAGE, HEADS, 24)
    index = make_key_index(keys)
    Parts.of(index, keys).header[word] += 1
    before = index.clone()
    with pytest.raises(RuntimeError) as error:
        calls(keys, index)[op]()
    assert str(error.value) == f"{op}: key_index must {HEADER[word]}"
    assert torch.equal(index, before)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("slot", (-2, 30, 2**40))
def test_slots_out_of_range(slot):
    keys = drawn((BLOCKS, PAGE, HEADS, 24), torch.float32, "cpu")
    index = make_key_index(keys)
    before, caches = index.clone(), (keys.clone(), keys.clone())
    token, slots = drawn((3, HEADS, 24), torch.float32, "cpu", 1), torch.tensor([1, slot, 2])
    for op, call in {
        "entmax_key_index_update": lambda: entmax_key_index_update(keys, slots, index),
        "entmax_cache_append": lambda: entmax_cache_append(token, token, *caches, slots, index),
    }.items():
        with pytest.raises(RuntimeError) as error:
            call()
        assert str(error.value) == f"{op}: slots must be -1 or from 0 to 29, got {slot} at [1]"
    assert_same_bits((index, *caches), (before, keys, keys))


@pytest.mark.backends("emulated", "cuda")
@pytest.mark.parametrize("slot", (-2, 30, 2**40))
def test_slots_out_of_range_are_skipped(backend, slot):
    keys = drawn((BLOCKS, PAGE, HEADS, 24), torch.float32, backend.device)
    index = make_key_index(keys)
    entmax_key_index_update(keys, torch.tensor([1, slot, 2], device=backend.device), index)
    check_entries(index, keys, torch.tensor([1, 2], device=backend.device))


@pytest.mark.parametrize("changes, words", (
    (dict(key_cache=lambda x: x[0]), "key_cache must have 4 dimensions"),
    (dict(key_cache=lambda x: x.int()), "key_cache must be float32, float16, bfloat16 or float64"),
    (dict(slots=lambda x: x.float()), "slots must be int32 or int64"),
    (dict(slots=lambda x: x[None]), "slots must have 1 dimension"),
    (dict(key_cache=lambda x: x.new_zeros(BLOCKS, PAGE, HEADS, 257)), "must have a head_dim from 1 to 256, got 257"),
    (dict(key_cache=lambda x: x[..., :0]), "must have a head_dim from 1 to 256, got 0"),
))  # fmt: skip
def test_arguments_of_an_update(backend, changes, words):
    keys = torch.ones(BLOCKS, PAGE, HEADS, 24, device=backend.device)
    given = dict(key_cache=keys, slots=torch.tensor([1], device=backend.device), key_index=make_key_index(keys))
    with pytest.raises(RuntimeError, match=f"^entmax_key_index_update: .*{words}"):
        entmax_key_index_update(**{name: changes.get(name, lambda x: x)(x) for name, x in given.items()})


@pytest.mark.backends("cpu")
def test_wrong_kinds():
    keys = torch.ones(BLOCKS, PAGE, HEADS, 24)
    with pytest.raises(TypeError, match="make_key_index: key_cache must be a tensor, got 3"):
        make_key_index(3)
    with pytest.raises(RuntimeError, match="make_key_index: key_cache must have 4 dimensions"):
        make_key_index(keys[0])
    for op, call in calls(keys, 5).items():
        with pytest.raises(TypeError, match=f"{op}: key_index must be a tensor.*, got 5"):
            call()
    with pytest.raises(TypeError, match="entmax_attn_with_kvcache: key_index must be a tensor or None, got 5"):
        adasplash.entmax_attn_with_kvcache(keys, keys, keys, key_index=5)


def test_versions(backend):
    """An index that was changed is another one to autograd, one that was read is not."""
    keys = torch.ones(BLOCKS, PAGE, HEADS, 24, device=backend.device)
    index = make_key_index(keys)
    before = index._version
    for count, (op, call) in enumerate(calls(keys, index).items(), 1):
        call()
        assert index._version == before + min(count, 2), op


def test_indexes_of_inference_mode(backend):
    keys = torch.ones(BLOCKS, PAGE, HEADS, 24, device=backend.device)
    with torch.inference_mode():
        index = indexed(keys)
        assert_same_bits(indexed(keys.clone()), index)
    for op in ("entmax_key_index_update", "entmax_cache_append"):
        with pytest.raises(RuntimeError, match=f"{op}: key_index was made in inference mode"):
            calls(keys, index)[op]()


@pytest.mark.backends("cpu")
def test_negated_views():
    """A cache that is one is read as what it stands for; an index that changes must be none."""
    keys = drawn((BLOCKS, PAGE, HEADS, 24), torch.float32, "cpu")
    assert_same_bits(indexed(torch._neg_view(-keys)), indexed(keys))
    for op in ("entmax_key_index_update", "entmax_cache_append"):
        with pytest.raises(RuntimeError, match=f"{op}: key_index must not be a negated view"):
            calls(keys, torch._neg_view(make_key_index(keys)))[op]()


def test_no_gradient(backend):
    keys = drawn((BLOCKS, PAGE, HEADS, 24), torch.float32, backend.device).requires_grad_()
    index = make_key_index(keys)
    with pytest.raises(RuntimeError, match="entmax_key_index_update has no gradient, and key_cache requires one"):
        entmax_key_index_update(keys, all_slots(keys), index)
    with torch.no_grad():
        entmax_key_index_update(keys, all_slots(keys), index)
    assert_same_bits(index, indexed(keys.detach()))


def test_double_keys_on_the_gpu_are_refused(backend):
    if backend.name == "cpu":
        pytest.skip("the CPU has float64")
    keys = torch.ones(BLOCKS, PAGE, HEADS, 24, dtype=torch.float64, device=backend.device)
    with pytest.raises(RuntimeError, match="on the CPU only"):
        indexed(keys)
