"""Tokens written to a paged cache: torch.ops.adasplash.entmax_cache_append."""

import pytest
import torch

import adasplash  # noqa: F401 - the ops
from common import assert_same_bits
from paging import LAYOUTS, empty_caches

append = torch.ops.adasplash.entmax_cache_append

BLOCKS, PAGE, HEADS = 5, 4, 2


def tokens(count, dtype, device, size=8, value_size=8, heads=HEADS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, heads, x, generator=generator).to(device, dtype) for x in (size, value_size)]


def expected_caches(caches, new, slots):
    """Token by token."""
    expected = [x.clone() for x in caches]
    for t, slot in enumerate(slots):
        if slot >= 0:
            for cache, x in zip(expected, new, strict=True):
                cache[slot // PAGE, slot % PAGE] = x[t]
    return expected


def check(caches, new, slots, int_type=torch.int64):
    """Appends, and compares all of the caches, NaN as a number like others."""
    expected = expected_caches(caches, new, slots)
    assert append(*new, *caches, torch.tensor(slots, dtype=int_type, device=caches[0].device)) is None
    assert_same_bits([x.nan_to_num(-7) for x in caches], [x.nan_to_num(-7) for x in expected])


SLOTS = {
    "one": [13],
    "several": [0, 19, 6, 7, 8],
    "some skipped": [-1, 3, -1, 4, -1],
    "all skipped": [-1, -1],
    "none": [],
    "equal ones": [9, 2, 9, 9, 2, 5],
}


@pytest.mark.parametrize("int_type", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slots", SLOTS)
def test_values(backend, slots, layout, int_type, dtype):
    slots = SLOTS[slots]
    new = tokens(len(slots), dtype, backend.device, value_size=5)
    caches = empty_caches(BLOCKS, PAGE, HEADS, (8, 5), layout, new[0])
    if layout == "a head apart" and backend.name != "cpu":
        with pytest.raises(RuntimeError, match="the last dimension of key_cache must be dense on the GPU"):
            check(caches, new, slots, int_type)
        return
    check(caches, new, slots, int_type)


@pytest.mark.parametrize("size, value_size, heads", ((1, 1, 1), (3, 7, 1), (128, 128, 3), (255, 64, 2)))
def test_sizes(backend, size, value_size, heads, dtype):
    new = tokens(6, dtype, backend.device, size, value_size, heads)
    check(empty_caches(BLOCKS, PAGE, heads, (size, value_size), "pages", new[0]), new, SLOTS["equal ones"])


def test_tokens_of_any_strides(backend, dtype):
    """As a projection of queries, keys and values together gives them, with heads first, and one key for all."""
    together = torch.randn(5, 3 * HEADS, 8, generator=torch.Generator().manual_seed(0)).to(backend.device, dtype)
    _, key, value = together.split(HEADS, dim=1)
    heads_first = key.transpose(0, 1).contiguous().transpose(0, 1)
    for new in ((key, value), (heads_first, value), (key[:1].expand(5, -1, -1), value.flip(2).flip(2))):
        check(empty_caches(BLOCKS, PAGE, HEADS, (8, 8), "pages", key), new, SLOTS["several"])


@pytest.mark.backends("cpu")
def test_threads_change_nothing(threads, dtype):
    """The last of equal slots stays however many write."""
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(-1, BLOCKS * PAGE, (3000,), generator=generator).tolist()
    for count in (1, 3):
        threads(count)
        new = tokens(3000, dtype, "cpu", size=64, value_size=64)
        check(empty_caches(BLOCKS, PAGE, HEADS, (64, 64), "pages", new[0]), new, slots)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("slot", (-2, 20, 2**40))
def test_slots_out_of_range(slot):
    """An error before anything is written."""
    new = tokens(3, torch.float32, "cpu")
    caches = empty_caches(BLOCKS, PAGE, HEADS, (8, 8), "pages", new[0])
    with pytest.raises(RuntimeError) as error:
        append(*new, *caches, torch.tensor([1, slot, 2]))
    assert str(error.value) == f"entmax_cache_append: slots must be -1 or from 0 to 19, got {slot} at [1]"
    assert all(x.isnan().all() for x in caches)


@pytest.mark.backends("emulated", "cuda")
@pytest.mark.parametrize("slot", (-2, 20, 2**40))
def test_slots_out_of_range_are_skipped(backend, slot):
    new = tokens(3, torch.float32, backend.device)
    caches = empty_caches(BLOCKS, PAGE, HEADS, (8, 8), "pages", new[0])
    expected = expected_caches(caches, new, [1, -1, 2])
    append(*new, *caches, torch.tensor([1, slot, 2], device=backend.device))
    assert_same_bits([x.nan_to_num(-7) for x in caches], [x.nan_to_num(-7) for x in expected])


SIZES = {
    "padded keys": (dict(key=lambda x: x[None]), "key 3 4"),
    "fewer values": (dict(value=lambda x: x[:2]), "value tokens 3 2"),
    "values of other types": (dict(value=lambda x: x.double()), "value key Float Double"),
    "caches of other types": (dict(value_cache=lambda x: x.double()), "value_cache key Float Double"),
    "keys of other heads": (dict(key=lambda x: x[:, :1]), "key heads 2 1"),
    "values of another size": (dict(value=lambda x: x[..., :7]), "value 8 7"),
    "fewer pages of values": (dict(value_cache=lambda x: x[:3]), "value_cache pages 5 3"),
    "smaller pages of values": (dict(value_cache=lambda x: x[:, :3]), "value_cache page 4 3"),
    "flat cache": (dict(key_cache=lambda x: x[0]), "key_cache 4 3"),
    "fewer slots": (dict(slots=lambda x: x[:2]), "slots 3 2"),
    "slots of floats": (dict(slots=lambda x: x.float()), "slots int32 int64 Float"),
}


def arguments(device):
    key, value = tokens(3, torch.float32, device)
    key_cache, value_cache = empty_caches(BLOCKS, PAGE, HEADS, (8, 8), "pages", key)
    slots = torch.tensor([1, 2, 3], device=device)
    return dict(key=key, value=value, key_cache=key_cache, value_cache=value_cache, slots=slots)


@pytest.mark.parametrize("case", SIZES)
def test_sizes_and_types(backend, case):
    changes, words = SIZES[case]
    given = arguments(backend.device)
    with pytest.raises(RuntimeError) as error:
        append(**{name: changes.get(name, lambda x: x)(x) for name, x in given.items()})
    message = str(error.value)
    assert message.startswith("entmax_cache_append: ") and "\n" not in message
    assert all(word in message for word in words.split()), message
    assert given["key_cache"].isnan().all() and given["value_cache"].isnan().all()


def test_caches_that_overlap_themselves(backend):
    """Rows that share memory would hold whichever was written last."""
    given = arguments(backend.device)
    given["key_cache"] = given["key_cache"][:1].expand(BLOCKS, -1, -1, -1)
    with torch.no_grad(), pytest.raises(RuntimeError, match="key_cache must not have several rows in one place"):
        append(**given)


@pytest.mark.parametrize("from_values", (False, True))
def test_tokens_that_are_a_part_of_a_cache(backend, from_values):
    """They are read before anything is written: a page moves on by a place."""
    given = arguments(backend.device)
    caches = [torch.randn_like(given[name]) for name in ("key_cache", "value_cache")]
    before = [x.clone() for x in caches]
    slots = torch.arange(1, 4, device=backend.device)
    sources = caches[::-1] if from_values else caches
    with torch.no_grad():
        append(*(x.flatten(0, 1)[:3] for x in sources), *caches, slots)
    for cache, old in zip(caches, before[::-1] if from_values else before, strict=True):
        assert torch.equal(cache.flatten(0, 1)[1:4], old.flatten(0, 1)[:3])


@pytest.mark.backends("cpu", "emulated")
def test_negated_views(backend):
    """Lazily negated tokens are what they stand for; a cache must be no such view."""
    given = arguments("cpu")
    negated = torch.complex(torch.zeros_like(given["key"]), given["key"]).conj().imag
    expected, found = (given["key_cache"].clone() for _ in range(2))
    assert negated.is_neg()
    with torch.no_grad():
        append(**given | {"key": -given["key"], "key_cache": expected})
        append(**given | {"key": negated, "key_cache": found})
        assert torch.equal(found.nan_to_num(-7), expected.nan_to_num(-7))
        cache = torch.zeros(given["key_cache"].shape, dtype=torch.cfloat).conj().imag
        with pytest.raises(RuntimeError, match="key_cache must not be a negated view"):
            append(**given | {"key_cache": cache})


def test_slots_that_are_negated(backend):
    """As torch's own ops take them: what they stand for."""
    given = arguments("cpu")
    caches = [given["key_cache"].clone() for _ in range(2)]
    with torch.no_grad():
        append(**given | {"key_cache": caches[0]})
        append(**given | {"key_cache": caches[1], "slots": torch._neg_view(-given["slots"])})
    assert torch.equal(*(cache.nan_to_num(-7) for cache in caches))


def test_caches_of_inference_mode(backend):
    given = arguments(backend.device)
    with torch.inference_mode():
        inside = given["key_cache"].clone()
        append(**given | {"key_cache": inside})
    before = inside.clone()
    with torch.no_grad(), pytest.raises(RuntimeError, match="key_cache was made in inference mode"):
        append(**given | {"key_cache": inside})
    assert torch.equal(inside.nan_to_num(-7), before.nan_to_num(-7))


def test_versions(backend):
    """A cache that was written to is another one to autograd, one that was attended to is not."""
    given = arguments(backend.device)
    caches = given["key_cache"], given["value_cache"]
    for times in (1, 2):
        with torch.no_grad():
            append(**given)
        assert [x._version for x in caches] == [times, times]
    table = torch.zeros(1, 1, dtype=torch.int32, device=backend.device)
    torch.ops.adasplash.entmax_attn_paged(given["key"][:1], *caches, table, table[0] + 4)
    assert [x._version for x in caches] == [2, 2]
    squares = (given["key_cache"].requires_grad_() ** 2).sum()
    with torch.no_grad():
        append(**given)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


@pytest.mark.parametrize("name", ("key", "value", "key_cache", "value_cache"))
def test_no_gradient(backend, name):
    given = arguments(backend.device)
    given[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"entmax_cache_append has no gradient, and {name} requires one"):
        append(**given)
    assert given["key_cache"].isnan().all()
    with torch.no_grad():
        append(**given)
    assert torch.equal(given["key_cache"][0, 1:], given["key"])
