"""What PyTorch puts around the ops on a paged cache: compile, export, AOTInductor, TorchScript, autocast, fake tensors.
The cache changes in place in all of them."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import adasplash
from adasplash import (
    entmax_attn_paged,
    entmax_attn_with_kvcache,
    entmax_cache_append,
    entmax_key_index_update,
    make_key_index,
)
from adasplash.cache import slots_of
from common import assert_same_bits

pytestmark = pytest.mark.backends("cpu", "emulated", "cuda")

HEADS, KV_HEADS, SIZE, PAGE, BLOCKS, PAGES = 4, 2, 16, 8, 20, 6


class Step(torch.nn.Module):
    """A step of decoding: new keys and values go to the cache, and all of it is attended to."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        block_table: torch.Tensor,
        held: torch.Tensor,
    ) -> torch.Tensor:
        out = entmax_attn_with_kvcache(query, key_cache, value_cache, key, value, held, block_table, window=(30, -1))
        return out * 2


class IndexedStep(torch.nn.Module):
    """The same with an index of the keys."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        key_index: torch.Tensor,
        block_table: torch.Tensor,
        held: torch.Tensor,
    ) -> torch.Tensor:
        out = entmax_attn_with_kvcache(
            query, key_cache, value_cache, key, value, held, block_table, window=(30, -1), key_index=key_index
        )
        return out * 2


class Prompt(torch.nn.Module):
    """Keys that are written otherwise, an index that is made of them here, and attention over a padded batch."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        key_index: torch.Tensor,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        key_cache.index_copy_(1, rows, key)
        value_cache.index_copy_(1, rows, value)
        blocks, page = key_cache.shape[0], key_cache.shape[1]
        slots = torch.arange(blocks * page, device=rows.device).view(blocks, page)[:, rows].flatten()
        entmax_key_index_update(key_cache, slots, key_index)
        anew = make_key_index(key_cache)
        entmax_key_index_update(key_cache, slots, anew)
        query, key, value = query.transpose(1, 2), key_cache.transpose(1, 2), value_cache.transpose(1, 2)
        out = adasplash.entmax_attn(query, key, value, key_index=key_index)
        return out + adasplash.entmax_attn(query, key, value, torch.full([4], 1.25, device=rows.device), key_index=anew)


class Chunks(torch.nn.Module):
    """Chunks of prompts and single tokens in one batch, by the ops themselves, with one α for each head."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slots: torch.Tensor,
        block_table: torch.Tensor,
        kv_seqlens: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        alpha: torch.Tensor,
    ) -> torch.Tensor:
        entmax_cache_append(key, value, key_cache, value_cache, slots)
        out = entmax_attn_paged(
            query, key_cache, value_cache, block_table, kv_seqlens, alpha, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=30
        )
        return out * 2


def tensors(device: str, tokens: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    """query, key and value of some tokens, and a cache."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(*tokens, HEADS, SIZE), (*tokens, KV_HEADS, SIZE), (*tokens, KV_HEADS, SIZE)]
    sizes += [(BLOCKS, PAGE, KV_HEADS, SIZE)] * 2
    return [(torch.randn(size, generator=generator) * 1.5).to(device) for size in sizes]


def table(device: str, seed: int = 0) -> torch.Tensor:
    order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(seed))
    return order[: 3 * PAGES].view(3, PAGES).int().to(device)


def step_arguments(device: str, held=(0, 7, 20), new: int = 1, seed: int = 0) -> tuple[torch.Tensor, ...]:
    lengths = torch.tensor(held, dtype=torch.int32, device=device)
    return (*tensors(device, (3, new), seed), table(device, seed), lengths)


def chunk_arguments(device: str, held=(3, 30, 0), new=(1, 2, 25), seed: int = 0) -> tuple[torch.Tensor, ...]:
    pages = table(device, seed).cpu()
    slots = [
        pages[b, place // PAGE] * PAGE + place % PAGE
        for b, (before, count) in enumerate(zip(held, new, strict=True))
        for place in range(before, before + count)
    ]
    ends = torch.tensor([0, *new]).cumsum(0).int().to(device)
    kv_seqlens = torch.tensor(held, device=device) + torch.tensor(new, device=device)
    alpha = torch.tensor([1.0, 1.25, 1.5, 2.0], device=device)
    all_tensors = tensors(device, (sum(new),), seed)
    return (*all_tensors, torch.stack(slots).to(device), pages.to(device), kv_seqlens, ends, alpha)


def with_index(key_cache: torch.Tensor) -> torch.Tensor:
    index = make_key_index(key_cache)
    entmax_key_index_update(key_cache, torch.arange(BLOCKS * PAGE, device=key_cache.device), index)
    return index


def indexed_step_arguments(device: str, **how) -> tuple[torch.Tensor, ...]:
    *tokens, key_cache, value_cache, block_table, held = step_arguments(device, **how)
    return (*tokens, key_cache, value_cache, with_index(key_cache), block_table, held)


def prompt_arguments(device: str, held=(0, 7, 20), seed: int = 0) -> tuple[torch.Tensor, ...]:
    """As many sequences as there are blocks, in whose rows new keys go."""
    rows = torch.tensor(held, device=device) % PAGE
    query, key, value, key_cache, value_cache = tensors(device, (BLOCKS, len(rows)), seed)
    return query, key, value, key_cache, value_cache, with_index(key_cache), rows


MODULES = {
    "step": (Step, step_arguments),
    "chunks": (Chunks, chunk_arguments),
    "indexed step": (IndexedStep, indexed_step_arguments),
    "prompt": (Prompt, prompt_arguments),
}
CACHES = slice(3, 5)


INDEXED = ("indexed step", "prompt")


@pytest.fixture(params=MODULES)
def form(request, backend):
    if backend.name == "emulated" and request.param == "prompt":
        pytest.skip("a program for each key of a prompt is most of a minute; the indexed step has the same ops")
    return request.param


def changed(form: str, arguments) -> tuple[torch.Tensor, ...]:
    """Those of a form's arguments that it changes."""
    return arguments[3:6] if form in INDEXED else arguments[CACHES]


def copies(arguments):
    return tuple(x.clone() for x in arguments)


def assert_same_step(function, arguments, form) -> None:
    """`function` returns what the form's module does in eager code, and changes what it is given as that does."""
    eager, given = copies(arguments), copies(arguments)
    with torch.no_grad():
        wanted, found = MODULES[form][0]()(*eager), function(*given)
    assert_same_bits((found, *changed(form, given)), (wanted, *changed(form, eager)))
    for before, after in zip(changed(form, arguments), changed(form, given), strict=True):
        assert not torch.equal(before, after)


@pytest.mark.slow
def test_compiled(backend, form):
    """In one graph; other lengths, tables and caches are no reason to compile again."""
    module, arguments = MODULES[form]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(module(), backend=counter, fullgraph=True)
    assert_same_step(compiled, arguments(backend.device), form)
    held = dict(held=(40, 1, 12), seed=1)
    assert_same_step(compiled, arguments(backend.device, **held), form)
    assert counter.frame_count == 1


@pytest.mark.parametrize("decomposed", (False, True), ids=("one node", "decomposed"))
def test_exported(backend, form, decomposed, tmp_path):
    module, arguments = MODULES[form]
    given = arguments(backend.device)
    with torch.no_grad():
        program = torch.export.export(module(), given)
    if decomposed:
        program = program.run_decompositions()
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert_same_step(loaded, given, form)
    assert_same_step(loaded, arguments(backend.device, held=(40, 1, 12), seed=1), form)


@pytest.mark.builds
@pytest.mark.backends("cpu", "cuda")
def test_ahead_of_time(backend, form, tmp_path):
    """AOTInductor, with the cache as an input."""
    module, arguments = MODULES[form]
    with torch.no_grad():
        program = torch.export.export(module(), arguments(backend.device))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    assert_same_step(loaded, arguments(backend.device, held=(40, 1, 12), seed=1), form)


@pytest.mark.slow
@pytest.mark.parametrize("way", ("scripted", "traced", "frozen"))
def test_torchscript(backend, form, way, tmp_path):
    module, arguments = MODULES[form]
    given = arguments(backend.device)
    with torch.no_grad():
        if way == "traced":
            script = torch.jit.trace(module(), copies(given), check_trace=False)
        else:
            script = torch.jit.script(module().eval())
        if way == "frozen":
            script = torch.jit.freeze(script)
    script.save(tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    assert_same_step(loaded, given, form)
    assert_same_step(loaded, arguments(backend.device, held=(40, 1, 12), seed=1), form)


@pytest.mark.backends("cpu", "cuda")
def test_a_cache_that_is_the_models_own(backend, form):
    """Buffers that change in a compiled and in an exported model."""
    module, arguments = MODULES[form]

    class Owner(torch.nn.Module):
        def __init__(self, *own):
            super().__init__()
            for number, tensor in enumerate(own):
                self.register_buffer(f"own_{number}", tensor)

        def forward(self, query, key, value, *rest):
            return module()(query, key, value, *self.buffers(), *rest)

    given = arguments(backend.device)
    own = changed(form, given)
    tokens, rest = given[:3], given[3 + len(own) :]
    models = [Owner(*copies(own)) for _ in range(3)]
    with torch.no_grad():
        expected = models[0](*tokens, *rest)
        compiled = torch.compile(models[1], fullgraph=True)(*tokens, *rest)
        exported = torch.export.export(models[2], (*tokens, *rest)).module()
        assert_same_bits((compiled, *models[1].buffers()), (expected, *models[0].buffers()))
        assert_same_bits((exported(*tokens, *rest), *exported.buffers()), (expected, *models[0].buffers()))


@pytest.mark.slow
def test_opcheck(backend):
    query, key, value, key_cache, value_cache, slots, pages, kv_seqlens, ends, alpha = chunk_arguments(backend.device)
    # The ops have no gradient, so how autograd is registered is not asked.
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    ops = torch.ops.adasplash
    opcheck(ops.entmax_cache_append, (key, value, key_cache, value_cache, slots), test_utils=utils)
    for given in (alpha, 1.5):
        arguments = (query, key_cache, value_cache, pages, kv_seqlens, given)
        op = ops.entmax_attn_paged.per_head if isinstance(given, torch.Tensor) else ops.entmax_attn_paged.default
        opcheck(op, arguments, dict(cu_seqlens_q=ends, max_seqlen_q=30), test_utils=utils)


@pytest.mark.backends("cpu", "cuda")  # emulated, a program for each key of the cache is most of a minute
def test_opcheck_of_an_index(backend):
    key, value, key_cache, value_cache, slots = chunk_arguments(backend.device)[1:6]
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    ops, index = torch.ops.adasplash, with_index(key_cache)
    appended = (key, value, key_cache, value_cache, slots)
    padded = tuple(x.transpose(1, 2) for x in (torch.cat((key_cache, key_cache), 2), key_cache, value_cache))
    opcheck(ops.entmax_make_key_index, (key_cache,), test_utils=utils)
    opcheck(ops.entmax_key_index_update, (key_cache, slots, index), test_utils=utils)
    opcheck(ops.entmax_cache_append, appended, dict(key_index=index), test_utils=utils)
    opcheck(ops.entmax_attn.default, padded, dict(key_index=index), test_utils=utils)


@pytest.mark.parametrize("cache_type", (torch.bfloat16, torch.float32))
def test_autocast_leaves_the_cache_as_it_is(backend, cache_type):
    """What meets it goes to its type, whatever autocast's own is."""
    query, key, value, key_cache, value_cache, pages, held = step_arguments(backend.device)
    key_cache, value_cache = key_cache.to(cache_type), value_cache.to(cache_type)
    given, expected = copies((key_cache, value_cache)), copies((key_cache, value_cache))
    kind = "cuda" if backend.device == "cuda" else "cpu"
    with torch.no_grad(), torch.autocast(kind, dtype=torch.bfloat16):
        out = entmax_attn_with_kvcache(query.half(), *given, key, value.bfloat16(), held, pages)
    with torch.no_grad():
        same = [x.to(cache_type) for x in (query.half(), key, value.bfloat16())]
        wanted = entmax_attn_with_kvcache(same[0], *expected, *same[1:], held, pages)
    assert out.dtype == cache_type
    assert_same_bits((out, *given), (wanted, *expected))


@pytest.mark.parametrize("cache_type", (torch.bfloat16, torch.float32))
def test_autocast_leaves_the_index_as_it_is(backend, cache_type):
    """A step keeps that of a cache of any type. A call over keys that autocast casts does without: the index is of
    others, and says so."""
    query, key, value, key_cache, value_cache, pages, held = step_arguments(backend.device)
    caches = [key_cache.to(cache_type), value_cache.to(cache_type)]
    index = with_index(caches[0])
    kept, same = copies((*caches, index)), copies((*caches, index))
    with torch.no_grad(), torch.autocast(backend.device, dtype=torch.bfloat16):
        entmax_attn_with_kvcache(query, *kept[:2], key, value, held, pages, key_index=kept[2])
        padded = [x.transpose(1, 2) for x in (query[:1].expand(BLOCKS, -1, -1, -1), *caches)]
        out, expected = adasplash.entmax_attn(*padded, key_index=index), adasplash.entmax_attn(*padded)
    with torch.no_grad():
        entmax_cache_append(key[:, 0].to(cache_type), value[:, 0].to(cache_type), *same[:2],
                            slots_of(pages, held, 1, PAGE, BLOCKS)[:, 0], same[2])  # fmt: skip
    assert_same_bits(kept, same)
    assert out.dtype == torch.bfloat16
    assert_same_bits(out, expected)


@pytest.mark.backends("cpu")
def test_indexes_without_values():
    """Sizes and errors are those of the CPU, on Meta and as fake tensors; also where a size is a symbol."""
    _, key, value, *caches, _, _ = step_arguments("cpu")
    slots = torch.arange(3)
    for change in (lambda x: x.to("meta"), FakeTensorMode().from_tensor):
        key_cache, value_cache, *new, places = (change(x) for x in (*caches, key[:, 0], value[:, 0], slots))
        index = make_key_index(key_cache)
        assert index.shape == make_key_index(caches[0]).shape and index.dtype == torch.uint8
        entmax_key_index_update(key_cache, places, index)
        entmax_cache_append(*new, key_cache, value_cache, places, index)
        padded = [x.transpose(1, 2) for x in (key_cache.repeat(1, 1, 2, 1), key_cache, value_cache)]
        assert adasplash.entmax_attn(*padded, key_index=index).shape == padded[0].shape
        with pytest.raises(RuntimeError, match="key_index must have sizes"):
            adasplash.entmax_attn(*padded, key_index=index[1:])
        with pytest.raises(RuntimeError, match="key_index must have sizes"):
            entmax_key_index_update(key_cache, places, index[1:])


def test_inference_mode(backend):
    given = step_arguments(backend.device)
    expected = copies(given)
    with torch.no_grad():
        wanted = Step()(*expected)
    with torch.inference_mode():
        inside = copies(given)
        assert_same_bits((Step()(*inside), *inside[CACHES]), (wanted, *expected[CACHES]))
    outside = copies(given)
    with torch.inference_mode():
        Step()(*outside)
    assert_same_bits(outside[CACHES], expected[CACHES])


def test_floating_point_operations():
    """Of the sequences' own lengths, as torch counts attention."""
    *_, key_cache, value_cache, pages, held = step_arguments("cpu", held=(10, 0, 25))
    query = torch.randn(6, HEADS, SIZE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        entmax_attn_paged(query, key_cache, value_cache, pages, held, max_seqlen_q=2)
    assert counter.get_total_flops() == 2 * 2 * HEADS * 2 * (10 + 0 + 25) * SIZE


def test_as_flash_attn_has_it(backend):
    """Without a table, with one number for all lengths, and with a cache that is full."""
    query, key, value, *_ = step_arguments(backend.device, new=3)
    caches = torch.randn(2, 3, 40, KV_HEADS, SIZE, device=backend.device)
    expected = caches.clone()
    expected[:, :, 12:15] = torch.stack([key, value])
    with torch.no_grad():
        out = entmax_attn_with_kvcache(query, *caches, key, value, 12)
        assert_same_bits((caches,), (expected,))
        padded = [x.transpose(1, 2) for x in (query, *expected[:, :, :15])]
        assert_same_bits((out.transpose(1, 2),), (adasplash.entmax_attn(*padded, is_causal=True),))
        full = entmax_attn_with_kvcache(query, *caches, is_causal=False)
        padded = [x.transpose(1, 2) for x in (query, *expected)]
        assert_same_bits((full.transpose(1, 2),), (adasplash.entmax_attn(*padded),))


ERRORS = {
    "no room": (dict(cache_seqlens=38), "cache_seqlens must be from 0 to 37, so that there is room for 3 more, got 38"),
    "less than none": (dict(cache_seqlens=-1), "cache_seqlens must be from 0 to 37, .* got -1"),
    "a share": (dict(cache_seqlens=2.7), "cache_seqlens must be an integer, got 2.7"),
    "lengths that are true": (dict(cache_seqlens=torch.ones(3).bool()), "cache_seqlens must be int32 or int64"),
    "alpha": (dict(alpha=5.0), "alpha must be 1 or from"),
    "alpha in a tensor": (dict(alpha=torch.tensor(3.0)), "alpha as a tensor must be 1 or from"),
    "a page that there is none of": (
        dict(block_table=torch.tensor([[0], [1], [3]])),
        r"block_table must name pages from 0 to 2 where keys of a sequence are, got 3 at \[2, 0\]",
    ),
    "a page below the first": (
        dict(block_table=torch.tensor([[0], [-1], [2]])),
        r"block_table must name pages from 0 to 2 where keys of a sequence are, got -1 at \[1, 0\]",
    ),
    "query's heads": (dict(query=torch.randn(3, 3, 3, SIZE)), "query's number of heads must be a multiple"),
    "query's type": (dict(query=torch.randn(3, 3, HEADS, SIZE).half()), "key_cache must have query's dtype"),
    "table's type": (dict(block_table=torch.zeros(3, 1)), "block_table must be int32 or int64"),
    "lengths missing": (dict(cache_seqlens=None), "cache_seqlens must be given with key"),
    "value missing": (dict(value=None), "key and value go together"),
    "lengths of another batch": (
        dict(cache_seqlens=torch.tensor([1, 2])),
        "cache_seqlens must have query's batch size 3",
    ),
    "table of another batch": (dict(block_table=torch.zeros(2, 4).int()), "block_table must have query's batch size 3"),
    "cache of another batch": (dict(key_cache=torch.randn(2, 40, KV_HEADS, SIZE)), "key_cache, without a block_table,"),
    "no tensor": (dict(key_cache=5), "key_cache must be a tensor, got 5"),
    "query of three dimensions": (dict(query=torch.randn(3, HEADS, SIZE)), "query must have 4 dimensions"),
    "kind of a table": (dict(block_table=[[0]]), "block_table must be a tensor or None"),
}


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("page, given_away", ((0, True), (1, False)))
def test_a_step_needs_no_page_behind_its_window(backend, page, given_away):
    """Of nine keys in pages of four, the last query's window has those from the sixth on."""
    query, key, value = (torch.randn(1, 1, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
    caches, table = torch.randn(2, 3, 4, KV_HEADS, SIZE), torch.arange(3)[None]
    arguments = (query, *caches, key, value, torch.tensor([8]))
    with torch.no_grad():
        expected = entmax_attn_with_kvcache(*arguments, table, window=(3, 0))
        table[0, page] = -7
        if given_away:
            assert_same_bits(entmax_attn_with_kvcache(*arguments, table, window=(3, 0)), expected)
            return
        caches[0][2, 0] = 7  # what the step would write
        before = caches.clone()
        with pytest.raises(RuntimeError, match=r"block_table must name pages .* got -7 at \[0, 1\]"):
            entmax_attn_with_kvcache(*arguments, table, window=(3, 0))
        assert torch.equal(caches, before)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("case", ERRORS)
def test_steps_that_do_not_fit(backend, case):
    query, key, value, *_ = step_arguments("cpu", new=3)
    caches = torch.randn(2, 3, 40, KV_HEADS, SIZE)
    changed, message = ERRORS[case]
    arguments = dict(query=query, key_cache=caches[0], value_cache=caches[1], key=key, value=value, cache_seqlens=12)
    before = caches.clone()
    with torch.no_grad(), pytest.raises((RuntimeError, TypeError), match=message):
        entmax_attn_with_kvcache(**arguments | changed)
    assert torch.equal(caches, before)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(
    "name, value, wanted",
    [("kv_seqlens", [3], "a tensor"), ("max_seqlen_q", 1.5, "an integer"), ("alpha", None, "a number"),
     ("is_causal", 1, "True or False"), ("window", 5, "two integers"), ("cu_seqlens_q", 3, "a tensor or None")],
)  # fmt: skip
def test_wrong_kinds(backend, name, value, wanted):
    query, _, _, key_cache, value_cache, pages, held = step_arguments("cpu")
    given = dict(
        query=query[:, 0], key_cache=key_cache, value_cache=value_cache, block_table=pages, kv_seqlens=held
    ) | {name: value}
    with torch.no_grad(), pytest.raises(TypeError, match=f"entmax_attn_paged: {name} must be {wanted}"):
        entmax_attn_paged(**given)
