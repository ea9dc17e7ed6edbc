"""Launches as the driver sees them: what is loaded when, where it goes, and what becomes of errors."""

import threading

import pytest
import torch

import adasplash
import reference
from common import MANY, Inputs, assert_same_bits, gather, gradients, make_inputs, run_python

pytestmark = pytest.mark.backends("emulated")
FORWARD, BACKWARD = ["attend"], ["grad_query", "grad_key_value"]
FEW = ["score_few", "solve_few", "weigh_few", "join_few"]
PAGED, FEW_PAGED = ["attend_paged"], ["score_few_paged", "solve_few_paged", "weigh_few_paged", "join_few"]
GATHERING = ["mark", "mark", "grad_query", "grad_query", "grad_key_value", "grad_key_value"]


@pytest.fixture
def driver(backend):
    from emulated import install

    driver = install()
    driver.reset()
    driver.set_place()
    gather(MANY)
    yield driver
    driver.reset()
    driver.set_place()
    driver.run_kernels = True


def attend(inputs, alpha=1.5, **options):
    return torch.ops.adasplash.entmax_attn(*inputs, alpha, **options)


def kernels(driver):
    return [launch.variant["kernel"] for launch in driver.launches]


def test_what_a_call_launches(driver):
    inputs = make_inputs(1, 2, 70, 90, requires_grad=True)
    out = attend(inputs)
    assert kernels(driver) == FORWARD
    out.sum().backward()
    assert kernels(driver) == FORWARD + BACKWARD
    with torch.no_grad():
        attend(inputs)
    assert kernels(driver) == FORWARD + BACKWARD + FORWARD


@torch.no_grad()
def test_which_way_few_queries_go(driver):
    """By the tensors' sizes where there are no lengths, else the GPU sees to it."""
    few, lengths = dict(heads=4, kv_heads=1, m=16, n=90), torch.tensor([3, 70])
    for inputs, options, expected in (
        (make_inputs(**few), {}, FEW),
        (make_inputs(**few | dict(m=17)), {}, FORWARD),
        (make_inputs(**few | dict(heads=5)), {}, FORWARD),
        (make_inputs(**few), dict(kv_seqlens=lengths), FEW),
        (make_inputs(**few | dict(m=70)), dict(q_seqlens=lengths), FORWARD + FEW),
        (make_inputs(**few), dict(dropout_p=0.5, dropout_seed=torch.tensor([1])), FORWARD),
    ):
        driver.launches.clear()
        attend(inputs, **options)
        assert kernels(driver) == expected


def paged_inputs(lengths=(40, 5), page=16, queries=1, heads=4, kv_heads=2, size=16, room=4, dtype=torch.float32):
    """The arguments of entmax_attn_paged, by name; as many queries of each sequence, and room for more pages each."""
    generator = torch.Generator().manual_seed(0)
    blocks = len(lengths) * room
    cache = (blocks, page, kv_heads, size)
    query, *caches = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((len(lengths) * queries, heads, size), cache, cache)
    )
    table = torch.randperm(blocks, generator=generator).view(len(lengths), room).int()
    return dict(
        query=query,
        key_cache=caches[0],
        value_cache=caches[1],
        block_table=table,
        kv_seqlens=torch.tensor(lengths, dtype=torch.int32),
        max_seqlen_q=queries,
    )


def attend_paged(given, **changes):
    return torch.ops.adasplash.entmax_attn_paged(**given | changes)


def test_which_way_paged_queries_go(driver):
    """By the most queries that a sequence has, and packed by those that it has, which the GPU sees to."""
    offsets = torch.tensor([0, 3, 34], dtype=torch.int32)
    for given, options, expected in (
        (paged_inputs(), {}, FEW_PAGED),
        (paged_inputs(queries=17), {}, PAGED),
        (paged_inputs(queries=17), dict(cu_seqlens_q=offsets, max_seqlen_q=31), PAGED + FEW_PAGED),
        (paged_inputs(queries=17), dict(cu_seqlens_q=offsets, max_seqlen_q=16), FEW_PAGED),
    ):
        driver.launches.clear()
        attend_paged(given, **options)
        assert kernels(driver) == expected


@pytest.mark.parametrize("page", (1, 3, 16, 64))
def test_what_a_paged_launch_is_given(driver, page):
    """The cache and the table where they are: nothing of them is copied."""
    given = paged_inputs(lengths=(3, 2), page=page, queries=17)
    wide = torch.full((2, 9), -1, dtype=torch.int32)
    wide[:, 3:7] = given["block_table"]
    given["block_table"] = wide[:, 3:7]
    given["value_cache"] = given["value_cache"].transpose(1, 2).contiguous().transpose(1, 2)  # heads before rows
    attend_paged(given)
    (launch,) = driver.launches
    for name in ("key", "value"):
        cache = given[f"{name}_cache"]
        found = {
            part.removeprefix(f"{name}."): v for part, v in launch.arguments.items() if part.startswith(f"{name}.")
        }
        block, row, head, _ = cache.stride()
        inverse, shift = found.pop("page_inverse"), found.pop("page_shift")
        assert all(row * inverse >> 30 + shift == row // page for row in [*range(500), (1 << 30) - 1])
        assert 0 < inverse < 1 << 31
        assert found == dict(
            data=cache.data_ptr(), block_stride=block, head_stride=head, row_stride=row if page > 1 else 0,
            table=given["block_table"].data_ptr(), table_stride=9, blocks=8, page_size=page,
        )  # fmt: skip
    assert launch.arguments["call.keys.rows"] == launch.arguments["call.keys.max_seqlen"] == 4 * page
    assert launch.arguments["call.tile_words"] == 0


def test_a_table_that_is_not_as_the_kernels_take_it(driver):
    """Of int64, where what is out of range must not wrap into it, or with columns apart: a copy."""
    given = paged_inputs()
    expected = attend_paged(given)
    table = given["block_table"]
    for other in (table.long(), table.t().contiguous().t()):
        assert_same_bits(attend_paged(given, block_table=other), expected)
        assert driver.launches[-4].arguments["key.table"] != other.data_ptr()
    first, wrapped = table.clone(), table.long()
    first[0, 0], wrapped[0, 0] = 0, -(1 << 32) + 5
    assert_same_bits(attend_paged(given, block_table=wrapped), attend_paged(given, block_table=first))


@pytest.mark.parametrize("name", ("key_cache", "value_cache"))
def test_a_cache_off_16_bytes_is_an_error(driver, name):
    """Where queries would be copied."""
    given = paged_inputs()
    cache = given[name]
    shifted = torch.cat((cache[..., :1], cache), -1)[..., 1:]
    apart = torch.stack((cache, cache), -1)[..., 0]
    for other in (shifted, apart):
        words = (
            rf"entmax_attn_paged: on the GPU rows of {name} must be dense and start at multiples of 16 bytes: .*4 elem"
        )
        with pytest.raises(RuntimeError, match=words):
            attend_paged(given, **{name: other})
    assert not driver.launches
    expected, query = attend_paged(given), given["query"]
    assert_same_bits(attend_paged(given, query=torch.cat((query[..., :1], query), -1)[..., 1:]), expected)


@pytest.mark.parametrize("form", ("padded", "packed"))
def test_a_paged_call_goes_in_parts(driver, form):
    """Of key heads, and where queries are padded of sequences: each has its rows of the table, and all of the cache."""
    given = paged_inputs(queries=17) | dict(alpha=torch.tensor([1.2, 1.4, 1.5, 2.0]), alibi_slopes=torch.rand(2, 4))
    if form == "packed":
        given |= dict(cu_seqlens_q=torch.tensor([0, 3, 34], dtype=torch.int32), max_seqlen_q=31)
    expected, whole = attend_paged(given), len(driver.launches)
    before = driver.limit_scratch(1)
    try:
        assert_same_bits(attend_paged(given), expected)
    finally:
        driver.limit_scratch(before)
    assert len(driver.launches) == whole * (1 + (4 if form == "padded" else 2))


FOUND = ["turn_queries", "scan_index{}", "score_found{}"]


@pytest.mark.parametrize("page, even, dtype", ((16, True, torch.bfloat16), (12, False, torch.bfloat16),
                                               (16, True, torch.float16), (16, False, torch.float32)))  # fmt: skip
def test_keys_are_found_by_an_index_where_that_is_asked_for(driver, monkeypatch, page, even, dtype):
    """And where there is code for the type and the pages; by either way, whole or in parts, to the same bits."""
    given = paged_inputs(page=page, dtype=dtype)
    index = adasplash.make_key_index(given["key_cache"])
    adasplash.entmax_key_index_update(given["key_cache"], torch.arange(index.shape[0] * page - page), index)
    assert kernels(driver) == ["index_keys"]
    suffix = "_even" if even else "_paged"
    rest = ["solve_few_paged", f"weigh_few{suffix}", "join_few"]
    read = even and dtype == torch.bfloat16
    found = [name.format(suffix) for name in FOUND] if read else [f"score_few{suffix}"]
    for wanted, expected in ((None, [f"score_few{suffix}"]), ("leave", [f"score_few{suffix}"]), ("read", found)):
        monkeypatch.setenv("ADASPLASH_KEY_INDEX", wanted) if wanted else monkeypatch.delenv("ADASPLASH_KEY_INDEX")
        driver.launches.clear()
        out = attend_paged(given, key_index=index)
        assert kernels(driver) == [*expected, *rest]
        assert_same_bits(out, attend_paged(given))
        before = driver.limit_scratch(1)
        try:
            assert_same_bits(attend_paged(given, key_index=index), out)
        finally:
            driver.limit_scratch(before)
        driver.launches.clear()
        attend_paged(given, key_index=index, alpha=1.0)
        assert "scan_index_even" not in kernels(driver)


@pytest.mark.parametrize("pages, wanted, read", ((4096, None, True), (4096, "leave", False), (4095, None, False)))
def test_an_index_of_many_keys_is_read(driver, monkeypatch, pages, wanted, read):
    """Many by what there is room for: the host does not know how many there are."""
    driver.run_kernels = False
    monkeypatch.setenv("ADASPLASH_KEY_INDEX", wanted) if wanted else monkeypatch.delenv("ADASPLASH_KEY_INDEX")
    given = paged_inputs(page=16, dtype=torch.bfloat16)
    given["block_table"] = given["block_table"][:, :1].expand(-1, pages).contiguous()
    attend_paged(given, key_index=adasplash.make_key_index(given["key_cache"]))
    assert ("scan_index_even" in kernels(driver)) == read


def test_variants_over_a_paged_cache(driver):
    """Of attend there is code for alpha = 1.5, of solve_few for 2 as well."""
    driver.run_kernels = False
    for alpha, attend, solve in ((1.5, "1_5", "1_5"), (2.0, "any", "2"), (1.3, "any", "any")):
        driver.launches.clear()
        for queries in (17, 1):
            attend_paged(paged_inputs(queries=queries, size=64, dtype=torch.bfloat16), alpha=alpha)
        names = [launch.variant["name"] for launch in driver.launches]
        assert names[0] == f"attend_paged_bf16_d64_a{attend}" and names[2] == f"solve_few_paged_bf16_d64_a{solve}"


def test_programs_that_score_follow_from_the_room(driver):
    """One for each tile where these are few, and several thousand at most where there is room for very many."""
    driver.run_kernels = False
    for lengths, room, page, expected in (((1, 1), 4, 64, 4), ((1,) * 8, 1024, 64, 64), ((1,) * 2, 1 << 14, 64, 512)):
        given = paged_inputs(lengths, page=1, room=1)
        given["block_table"] = torch.zeros(1, dtype=torch.int32).expand(len(lengths), room * page)
        driver.launches.clear()
        attend_paged(given)
        score = driver.launches[0]
        assert score.arguments["few.scorers"] == expected
        assert score.programs == expected * len(lengths) * 2


@pytest.mark.parametrize("count", (5, 1100))
def test_what_is_appended(driver, count):
    """Of equal slots the last token's rows, also where there are more tokens than a program compares."""
    slots = torch.randint(-1, 40, (count,), generator=torch.Generator().manual_seed(0))
    key, value = torch.randn(2, count, 2, 8)
    caches = [torch.zeros(10, 4, 2, 8) for _ in range(2)]
    expected = [x.clone() for x in caches]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            for cache, new in zip(expected, (key, value), strict=True):
                cache[slot // 4, slot % 4] = new[token]
    assert torch.ops.adasplash.entmax_cache_append(key, value, *caches, slots.int()) is None
    assert_same_bits(caches, expected)
    (launch,) = driver.launches
    assert launch.arguments["compared"] == (5 if count == 5 else 0)


def test_what_append_refuses_on_a_gpu(driver):
    new, slots = torch.zeros(1, 1, 8), torch.zeros(1, dtype=torch.int64)
    apart, dense = torch.zeros(2, 4, 1, 8, 2)[..., 0], torch.zeros(2, 4, 1, 8)
    append = torch.ops.adasplash.entmax_cache_append
    with pytest.raises(RuntimeError, match="entmax_cache_append: the last dimension of value_cache must be dense"):
        append(new, new, dense, apart, slots)
    with pytest.raises(RuntimeError, match="entmax_cache_append: float64 runs on the CPU only"):
        append(*(x.double() for x in (new, new, dense, dense)), slots)
    assert not driver.launches


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
@pytest.mark.parametrize("length", (90, 5000))
def test_content_of_an_activation(driver, length, alpha):
    x = torch.randn(3, length, generator=torch.Generator().manual_seed(0)).requires_grad_()
    exact = x.detach().double().requires_grad_()
    reference.entmax(exact, alpha).square().sum().backward()
    p = torch.ops.adasplash.entmax(x, alpha)
    p.square().sum().backward()
    assert kernels(driver) == ["activate", "activate_grad"]
    torch.testing.assert_close(p.detach().double(), reference.entmax(exact.detach(), alpha), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=1e-6, rtol=1e-4)


def every_option(form):
    """A call with every option that has an entry a head or a sequence: (op, inputs, lengths, options)."""
    alpha, slopes = torch.tensor([1.2, 1.4, 1.5, 2.0]).requires_grad_(), torch.rand(3, 4)
    if form == "packed":
        ends = torch.tensor([0, 70, 75, 140], dtype=torch.int32), torch.tensor([0, 20, 90, 160], dtype=torch.int32)
        shapes = (140, 4, 16), (160, 2, 16), (160, 2, 9)
        inputs = Inputs(*(torch.randn(shape, requires_grad=True) for shape in shapes))
        return torch.ops.adasplash.entmax_attn_varlen, inputs, (*ends, 70, 70), dict(alpha=alpha, alibi_slopes=slopes)
    inputs = make_inputs(3, 4, 70, 90, kv_heads=2, value_size=9, requires_grad=True)
    lengths = dict(q_seqlens=torch.tensor([70, 3, 66]), kv_seqlens=torch.tensor([90, 64, 1]))
    return torch.ops.adasplash.entmax_attn, inputs, (), dict(alpha=alpha, alibi_slopes=slopes, **lengths)


@pytest.mark.parametrize("gathered", (False, True), ids=("tiles", "gathered"))
@pytest.mark.parametrize(
    "form, limit, walking, gathering",
    (
        ("padded", 1, (6, 6), (6, 6)),
        pytest.param("padded", 400, (6, 1), (6, 6), marks=pytest.mark.builds),
        pytest.param("padded", 600_000, (3, 1), (6, 1), marks=pytest.mark.builds),
        ("padded", 1_200_000, (2, 1), (3, 1)),
        ("packed", 1, (2, 2), (2, 2)),
    ),
)
def test_heads_go_in_parts_where_scratch_is_large(driver, form, limit, walking, gathering, gathered):
    """A key head of an entry takes 282,720 bytes here forward, as any may have few queries, backward 32, and in both
    thousands more to gather. No bit depends on it, nor does the gradient of alpha."""
    op, inputs, lengths, options = every_option(form)
    gather(1 if gathered else MANY)
    attend, backward = (2 * FORWARD, GATHERING) if gathered else (FORWARD, BACKWARD)

    def run(of_forward, of_backward):
        driver.launches.clear()
        out = op(*inputs, *lengths, is_causal=True, **options)
        results = out, *torch.autograd.grad(out.square().sum(), (*inputs, options["alpha"]))
        assert kernels(driver) == (attend + FEW) * of_forward + backward * of_backward
        return results

    whole = run(1, 1)
    before = driver.limit_scratch(limit)
    try:
        assert_same_bits(whole, run(*(gathering if gathered else walking)))
    finally:
        driver.limit_scratch(before)


def test_heads_that_weigh_few_keys_gather(driver):
    """Of two key heads, with two query heads each, one weighs few keys of a tile and the other all."""
    inputs = make_inputs(1, 4, 130, 140, size=16, kv_heads=2)
    few = inputs.query.clone()
    few[:, :2] *= 30
    few[:, 2:] *= 0.01
    inputs = Inputs(few.requires_grad_(), *(x.requires_grad_() for x in inputs[1:]))
    grad = torch.randn(few.shape, generator=torch.Generator().manual_seed(1))

    def run(length, below):
        gather(length, below)
        driver.launches.clear()
        return gradients(inputs, grad, torch.ops.adasplash.entmax_attn, is_causal=True)

    walked = run(MANY, 101)
    assert kernels(driver) == FORWARD + BACKWARD
    gathered = run(1, 101)
    assert kernels(driver) == 2 * FORWARD + GATHERING
    chosen = run(130, 60)
    assert kernels(driver) == 2 * FORWARD + GATHERING
    for mine, by_keys, by_tiles in zip(chosen, gathered, walked, strict=True):
        half = mine.shape[1] // 2
        assert_same_bits([mine[:, :half], mine[:, half:]], [by_keys[:, :half], by_tiles[:, half:]])
    run(131, 101)
    assert kernels(driver) == 2 * FORWARD + BACKWARD  # the forward goes by the number of keys, the backward by both
    assert_same_bits(run(141, 101), walked)


@torch.no_grad()
def test_scratch_to_gather_keys_follows_the_queries(driver):
    """And not the keys, of which there are many more: 21 KiB of lists a head, so that all heads are one part."""
    gather(1)
    inputs = make_inputs(1, 4, 20, 2000, size=16)
    before = driver.limit_scratch(4 * 30_000)
    driver.launches.clear()
    try:
        attend(inputs)
    finally:
        driver.limit_scratch(before)
    assert kernels(driver) == 2 * FORWARD


@pytest.mark.parametrize("is_causal", (True, False))
def test_marks_of_the_forward_are_kept_for_the_backward(driver, is_causal):
    """In places of support that the shapes ask for. Half as many keys suffice where queries see both sides."""

    def places(m, n, **options):
        inputs = make_inputs(1, 1, m, n, size=16, requires_grad=True)
        driver.launches.clear()
        driver.run_kernels = False
        attend(inputs, is_causal=is_causal, **options).sum().backward()
        (given,) = {launch.arguments.get("support_capacity") for launch in driver.launches} - {None}
        return given

    gather(1)
    assert [places(64, n) for n in (64, 2048, 2049, 65536)] == [3, 3, 4, 34]
    assert places(64, 65537) == 0
    assert places(64, 65537, kv_seqlens=torch.tensor([70])) == 34
    gather(100)
    assert [places(m, 120) for m in (49, 50, 99, 100)] == ([0, 0, 0, 3] if is_causal else [0, 3, 3, 3])
    assert places(120, 140, window=(98, 0)) == 0 and places(120, 140, window=(99, 0)) == 3
    assert places(120, 140, window=(20, 28)) == 0 and places(120, 140, window=(20, 29)) == (0 if is_causal else 3)


def test_the_backward_visits_the_keys_that_are_marked(driver):
    """Whatever the marks say: more keys weigh nothing, those behind the last are not read, and without marks nothing is
    visited."""
    gather(1)
    inputs, options = make_inputs(1, 1, 64, 70, size=16), (None, 1.5, False, *[None] * 5, 0, 0, [-1, -1], None)
    out, row_state, support, tiles = torch.ops.adasplash._entmax_attn_forward(*inputs, *options, 3)
    assert (support[..., 0] == -2).all() and 0 < support[0, 0, 0, 1] <= 70
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))

    def backward():
        saved = row_state, support, tiles
        return torch.ops.adasplash._entmax_attn_backward(grad, *inputs, *saved, *options, out=out)[:3]

    expected = backward()
    support[..., 2] = -1
    torch.testing.assert_close(backward(), expected, atol=3e-6, rtol=3e-6)
    support[..., 2] = 0
    assert not any(x.any() for x in backward())
    support[0, 0, 0, 1] = -2  # nothing was kept, so the backward marks keys itself
    torch.testing.assert_close(backward(), expected, atol=3e-6, rtol=3e-6)


@torch.no_grad()
@pytest.mark.parametrize("sides", ((1, 0), (1, 1), (0, 1)))
def test_a_window_too_wide_to_hide_a_key_changes_nothing(driver, sides):
    """A sequence is computed as if it were alone, where callers leave such a window out."""
    gather(100)
    driver.run_kernels = False
    for n in (49, 50, 99, 100):
        inputs, found = make_inputs(1, 1, n, n, size=16), []
        for width in (n, 3 * n, -1):
            driver.launches.clear()
            attend(inputs, window=tuple(width if side else 0 for side in sides))
            found.append(kernels(driver))
        assert found[0] == found[1] == found[2] == (2 if n >= (50 if all(sides) else 100) else 1) * FORWARD


def test_support_of_another_capacity_keeps_no_marks(driver):
    """It may hold lists: those of the CPU are no marks."""
    gather(1)
    inputs, options = make_inputs(1, 1, 64, 70, size=16), (None, 1.5, False, *[None] * 5, 0, 0, [-1, -1], None)
    forward, backward = (getattr(torch.ops.adasplash, f"_entmax_attn_{name}") for name in ("forward", "backward"))
    out, row_state, support, tiles = forward(*inputs, *options, 128)
    assert (support == -2).all()
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    lists = torch.arange(128, dtype=torch.int32).expand_as(support)
    expected, found = (
        backward(grad, *inputs, row_state, given, tiles, *options, out=out)[:3] for given in (support, lists)
    )
    assert_same_bits(expected, found)


@torch.no_grad()
def test_a_narrow_window_gathers_no_keys(driver):
    """However long the sequence: what a query may see decides."""
    gather(100)
    attend(make_inputs(1, 1, 120, 120, size=16), is_causal=True, window=(98, 5))
    assert kernels(driver) == FORWARD
    driver.launches.clear()
    attend(make_inputs(1, 1, 120, 120, size=16), is_causal=True, window=(99, 5))
    assert kernels(driver) == 2 * FORWARD


@torch.no_grad()
def test_parts_are_as_large_as_each_other(driver):
    """Scratch for three of four heads, of 48 bytes each, makes two parts of two heads."""
    inputs = make_inputs(1, 4, 70, 90)
    whole = attend(inputs)
    driver.launches.clear()
    before = driver.limit_scratch(150)
    try:
        assert_same_bits(whole, attend(inputs))
    finally:
        driver.limit_scratch(before)
    assert [launch.programs for launch in driver.launches] == [4, 4]


def test_code_is_loaded_once(driver):
    inputs = make_inputs(1, 1, 20, 6, size=8, dtype=torch.float16)
    attend(inputs)
    before = driver.calls("cuLibraryLoadData")
    attend(inputs)
    driver.set_place(device=1, stream=3)
    attend(inputs)
    assert driver.calls("cuLibraryLoadData") == before
    assert driver.calls("cuLaunchKernelEx") == 3


def test_launches_go_to_the_current_stream_and_device(driver):
    inputs = make_inputs(1, 1, 20, 6, size=8)
    places = [(0, 0), (0, 0x1234), (1, 0x5678), (2, 1 << 40)]
    for device, stream in places:
        driver.set_place(device, stream)
        attend(inputs)
    seen = [(launch.device, launch.stream) for launch in driver.launches]
    assert seen == [place for place in places for _ in FORWARD]


def test_shared_memory_is_asked_for_once_a_device(driver):
    driver.run_kernels = False
    inputs = make_inputs(1, 1, 20, 6, size=128, dtype=torch.bfloat16)  # whose kernels need more than 48 KiB
    driver.set_place(0)
    attend(inputs)
    driver.reset()
    for device, expected in ((0, 0), (1, 1), (1, 1), (0, 1)):
        driver.set_place(device)
        attend(inputs)
        assert driver.calls("cuKernelSetAttribute") == expected, device
    assert all(launch.variant["shared"] > 48 * 1024 for launch in driver.launches)


@pytest.mark.parametrize("device, arch, ptx", ((0, 90, False), (2, 80, False), (3, 80, False), (4, 80, True)))
def test_the_code_that_a_device_runs(driver, device, arch, ptx):
    """sm_90: its own; sm_86: that of sm_80; sm_120: PTX."""
    driver.set_place(device)
    attend(make_inputs(1, 1, 20, 6, size=8))
    assert {(launch.variant["arch"], launch.variant["ptx"]) for launch in driver.launches} == {(arch, ptx)}


def test_an_architecture_that_was_not_built(driver):
    driver.set_place(5)
    with pytest.raises(RuntimeError, match=r"no GPU kernels for the architecture of device 5, sm_75.*sm_80, sm_90"):
        attend(make_inputs(1, 1, 20, 6, size=8))


@pytest.mark.parametrize(
    "size, dtype, alpha, name",
    (
        (64, torch.bfloat16, 1.5, "attend_bf16_d64_a1_5"),
        (8, torch.bfloat16, 2.0, "attend_bf16_d64_a2"),
        (72, torch.float16, 1.25, "attend_fp16_d128_aany"),
        (72, torch.float16, 1.5, "attend_fp16_d128_a1_5"),
        (9, torch.float16, 1.5, "attend_fp16_d64_a1_5"),
        (136, torch.bfloat16, 1.5, "attend_bf16_d256_aany"),
        (255, torch.bfloat16, 2.0, "attend_bf16_d256_aany"),
        (64, torch.float32, 1.5, "attend_fp32_d64_aany"),
        (256, torch.float32, 2.0, "attend_fp32_d256_aany"),
    ),
)
def test_the_variant_that_a_call_runs(driver, size, dtype, alpha, name):
    driver.run_kernels = False
    attend(make_inputs(1, 1, 20, 6, size=size, dtype=dtype), alpha)
    assert driver.launches[-1].variant["name"] == name


@pytest.mark.parametrize(
    "length, dtype, alpha, name",
    (
        (1, torch.bfloat16, 1.5, "bf16_n128_a1_5"),
        (128, torch.float32, 2.0, "fp32_n128_a2"),
        (129, torch.float16, 1.25, "fp16_n1024_aany"),
        (4096, torch.float16, 1.5, "fp16_n4096_a1_5"),
        (4097, torch.float32, 2.0, "fp32_long_a2"),
        (200, torch.float32, torch.tensor(1.5), "fp32_n1024_aany"),
    ),
)
def test_the_variants_of_an_activation(driver, length, dtype, alpha, name):
    driver.run_kernels = False
    x = torch.zeros(9, length, dtype=dtype, requires_grad=True)
    torch.ops.adasplash.entmax(x, alpha).sum().backward()
    forward, backward = driver.launches
    assert forward.variant["name"] == f"activate_{name}"
    assert backward.variant["name"] == "activate_grad_" + name.rsplit("_a", 1)[0]
    assert forward.programs == backward.programs == {128: 2, 1024: 5}.get(forward.variant["constants"]["BLOCK_N"], 9)
    assert forward.arguments["own_alphas"] == (9 if isinstance(alpha, torch.Tensor) else 0)


@pytest.mark.parametrize("size, value_size", ((17, 24), (16, 3), (1, 1)))
def test_rows_off_16_bytes_are_copied(driver, size, value_size):
    """The stand-in refuses addresses, strides and sizes that are not multiples of 16 bytes."""
    grad = torch.randn(1, 2, 20, value_size).bfloat16()
    inputs = make_inputs(1, 2, 20, 30, size=size, value_size=value_size, dtype=torch.bfloat16)
    expected = gradients(inputs, grad, torch.ops.adasplash.entmax_attn)
    shifted = [torch.cat((x[..., :1], x), -1)[..., 1:] for x in inputs]
    assert not any(x.data_ptr() % 16 == 0 and x.stride(-2) % 8 == 0 for x in shifted)
    assert_same_bits(expected, gradients(Inputs(*shifted), grad, torch.ops.adasplash.entmax_attn))
    for x, computed in zip((inputs.value, *inputs), expected, strict=True):
        assert computed.shape[-1] == x.shape[-1] and computed.is_contiguous()


def test_many_threads_load_each_kernel_once(driver):
    inputs = make_inputs(1, 1, 40, 50, size=24, dtype=torch.float16)
    exact = reference.attention(*inputs, 1.75).out
    outs = {}
    barrier = threading.Barrier(8)

    def work(index):
        driver.set_place(index % 2, stream=index)
        barrier.wait()
        outs[index] = attend(inputs, 1.75)

    before = driver.calls("cuLibraryLoadData")
    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert driver.calls("cuLibraryLoadData") - before <= 1
    assert sorted(launch.stream for launch in driver.launches) == list(range(8))
    assert all(launch.device == launch.stream % 2 for launch in driver.launches)
    for out in outs.values():
        assert torch.equal(out, outs[0])
        torch.testing.assert_close(out.double(), exact, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("call", ("cuLaunchKernelEx", "cuCtxGetCurrent"))
def test_an_error_of_a_launch_names_call_and_kernel(driver, call):
    inputs = make_inputs(1, 1, 20, 6, size=8)
    attend(inputs)
    driver.fail(call, 2)
    with pytest.raises(RuntimeError, match=rf"{call} failed for .*CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
        attend(inputs)
    attend(inputs)  # nothing is left broken


PRELUDE = """
import sys, torch
sys.path.insert(0, {tests!r})
import adasplash
from emulated import install
driver = install()
inputs = [torch.randn(1, 1, 20, 128).bfloat16() for _ in range(3)]
def attend():
    return torch.ops.adasplash.entmax_attn(*inputs)
def message():
    try:
        attend()
    except RuntimeError as error:
        return str(error)
    return ""
"""


def in_new_process(code, **options):
    from emulated.driver import HERE

    return run_python(PRELUDE.format(tests=str(HERE.parent)) + code, **options)


def test_errors_of_the_first_launch(backend):
    """Each call on the way to the first launch fails once; the next attempt goes through."""
    calls = (
        ("cuDriverGetVersion", "adasplash"),
        ("cuInit", "adasplash"),
        ("cuDeviceGet", "attend on device 0"),
        ("cuDeviceGetAttribute", "attend on device 0"),
        ("cuCtxGetCurrent", "attend_bf16_d128_a1_5 on device 0"),
        ("cuDevicePrimaryCtxRetain", "attend_bf16_d128_a1_5 on device 0"),
        ("cuCtxSetCurrent", "attend_bf16_d128_a1_5 on device 0"),
        ("cuLibraryLoadData", "attend_bf16_d128"),
        ("cuLibraryGetKernel", "attend_bf16_d128"),
        ("cuKernelSetAttribute", "attend_bf16_d128"),
        ("cuLaunchKernelEx", "attend_bf16_d128"),
    )
    code = f"""
driver.sets_context = False  # as in a thread that torch's runtime never met
for call, about in {calls}:
    driver.fail(call)
    text = message()
    assert call + " failed" in text and about in text and "CUDA_ERROR_INVALID_VALUE (1)" in text, text
assert attend().isfinite().all()
"""
    in_new_process(code)


def test_no_driver(backend):
    code = """
import os
os.environ["ADASPLASH_LIBCUDA"] = "/nowhere/libcuda.so.1"
text = message()
assert "no CUDA driver" in text and "/nowhere/libcuda.so.1" in text, text
"""
    in_new_process(code)


def test_too_old_a_driver(backend):
    code = """
import os
driver.reset(version=11080)
text = message()
assert "too old: it serves CUDA 11.8" in text and "driver 525 or newer" in text, text
os.environ["ADASPLASH_LIBCUDA"] = "libm.so.6"  # has none of the functions
text = message()
assert "too old" in text and "has no cuInit" in text, text
"""
    in_new_process(code)
