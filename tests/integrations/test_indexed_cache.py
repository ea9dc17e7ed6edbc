"""A static cache that keeps an index of its keys, against one that keeps none: no bit differs, and the index is there,
right, and handed to attention."""

import copy
from inspect import signature

import pytest
import torch

pytest.importorskip("transformers")

from transformers import StaticCache, masking_utils
from transformers.cache_utils import StaticSlidingWindowLayer

from adasplash.integrations.transformers import IndexedStaticCache, attention
from adasplash.integrations.transformers.indexed_cache import IndexedStaticLayer, index_of
from dense_models import build, draw_ids, masks
from key_indexes import Parts, check_entries

IDS, MASKS = draw_ids(), masks()
NEW, ROOM = 6, 30


@pytest.fixture
def handed(monkeypatch):
    """The index that each call of attention was given."""
    given, theirs = [], attention.entmax_attn

    def entmax_attn(*arguments, key_index=None, **options):
        given.append(key_index)
        return theirs(*arguments, key_index=key_index, **options)

    monkeypatch.setattr(attention, "entmax_attn", entmax_attn)
    return given


def generate(model, cache, **options):
    """Tokens and logits."""
    given = dict(pad_token_id=0, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True) | options
    out = model.generate(IDS, past_key_values=cache, **given)
    return out.sequences, torch.stack(out.logits)


def assert_same(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def check_index(layer, keys: int):
    """That there are entries of the first keys of every row, and no others."""
    cache = layer.keys.transpose(1, 2)
    slots = torch.arange(cache.shape[0])[:, None] * ROOM + torch.arange(keys)
    check_entries(index_of(layer.keys), cache, slots.flatten())


WAYS = {
    "greedy": {},
    "beams": dict(num_beams=3),
    "sampling": dict(do_sample=True, top_k=5),
    "prefill in chunks": dict(prefill_chunk_size=4),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name, dtype",
    [("gpt2", torch.float32), ("llama", torch.float32), ("llama", torch.bfloat16), ("qwen2", torch.float32)],
)
def test_no_bit_of_generate_differs(name, dtype, way, handed):
    """Padded on the left, over groups of heads; the second layer of Qwen 2 has a window."""
    if way == "prefill in chunks" and "q_length" not in signature(masking_utils.sdpa_mask).parameters:
        pytest.skip("an older transformers, which has it wrong with windows")
    model = build(name, "ForCausalLM", dtype)
    results = []
    for kind in (StaticCache, IndexedStaticCache):
        handed.clear()
        cache = kind(config=model.config, max_cache_len=ROOM)
        torch.manual_seed(0)
        given = dict(attention_mask=MASKS["left"], disable_compile=True) | WAYS[way]
        results.append(generate(model, cache, **given))
        assert len(handed) >= (NEW - 1) * len(cache.layers)  # prompts are dense in older versions
        if kind is StaticCache:
            assert set(handed) == {None}
    assert_same(*reversed(results))
    indexed = [isinstance(layer, IndexedStaticLayer) for layer in cache.layers]
    assert indexed == [True, name != "qwen2"]
    assert [each is not None for each in handed[-2:]] == indexed
    for layer in cache.layers[: sum(indexed)]:
        check_index(layer, IDS.shape[1] + NEW - 1)


def test_a_cache_is_used_again():
    """After a reset no key of before has an entry."""
    model = build("llama", "ForCausalLM", torch.float32)
    cache = IndexedStaticCache(config=model.config, max_cache_len=ROOM)
    expected = generate(model, cache, disable_compile=True)
    before = [index_of(layer.keys) for layer in cache.layers]
    cache.reset()
    for layer, index in zip(cache.layers, before, strict=True):
        assert index_of(layer.keys) is index  # where a captured graph knows it
        check_index(layer, 0)
    assert_same(generate(model, cache, disable_compile=True), expected)


def test_a_copied_cache(handed):
    """Keys and index go on together, apart from those that they were copied from."""
    model = build("llama", "ForCausalLM", torch.float32)
    results = []
    for kind in (StaticCache, IndexedStaticCache):
        prompt = kind(config=model.config, max_cache_len=ROOM)
        with torch.no_grad():
            model(IDS[:, :-1], past_key_values=prompt, use_cache=True)
        copied = copy.deepcopy(prompt)
        results.append(generate(model, copied, disable_compile=True))
    assert_same(*results)
    assert handed[-1] is index_of(copied.layers[-1].keys)
    for layer, theirs in zip(copied.layers, prompt.layers, strict=True):
        check_index(layer, IDS.shape[1] + NEW - 1)
        check_index(theirs, IDS.shape[1] - 1)


def test_an_index_goes_where_its_keys_go():
    """Rows in another order, and another device."""
    model = build("llama", "ForCausalLM", torch.float32)
    cache = IndexedStaticCache(config=model.config, max_cache_len=ROOM)
    with torch.no_grad():
        model(IDS, past_key_values=cache, use_cache=True)
    layer = cache.layers[0]
    keys, codes = layer.keys, Parts.of(index_of(layer.keys), layer.keys.transpose(1, 2)).codes
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    assert torch.equal(layer.keys, keys[order])
    assert torch.equal(Parts.of(index_of(layer.keys), layer.keys.transpose(1, 2)).codes, codes[order])
    check_index(layer, IDS.shape[1])
    layer.device = torch.device("meta")
    layer.prefetch()
    assert layer.keys.is_meta and index_of(layer.keys).is_meta


def test_gradients_are_recorded_as_without(handed):
    model = build("llama", "ForCausalLM", torch.float32)
    results = []
    for kind in (StaticCache, IndexedStaticCache):
        cache = kind(config=model.config, max_cache_len=ROOM)
        with torch.no_grad():
            model(IDS[:, :-1], past_key_values=cache, use_cache=True)
        out = model(IDS[:, -1:], past_key_values=cache, use_cache=True).logits
        out.square().mean().backward()
        results.append([out, *(each.grad for each in model.parameters())])
        model.zero_grad()
    assert handed[-1] is not None
    assert_same(*results)
    check_index(cache.layers[-1], IDS.shape[1])


def test_what_has_no_index():
    with pytest.raises(ValueError, match="every layer here has a window"):
        IndexedStaticCache(config=build("mistral").config, max_cache_len=ROOM)
    with pytest.raises(ValueError, match='attn_implementation="adasplash", got "sdpa"'):
        IndexedStaticCache(config=build("llama", attn_implementation="sdpa").config, max_cache_len=ROOM)
    layers = IndexedStaticCache(config=build("gemma2").config, max_cache_len=ROOM).layers
    assert [type(each) for each in layers] == [StaticSlidingWindowLayer, IndexedStaticLayer]


@pytest.mark.parametrize("name", ("gpt2", "llama"))
def test_compiled_steps(name):
    """Prompt and steps are a graph each, in which attention is given the index that was updated there."""
    model = build(name, "ForCausalLM", torch.float32)
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return graph

    results, eagerly = [], model.forward
    for kind in (StaticCache, IndexedStaticCache):
        torch.compiler.reset()
        graphs.clear()
        model.forward = torch.compile(eagerly, fullgraph=True, backend=backend)
        cache = kind(config=model.config, max_cache_len=ROOM)
        results.append(generate(model, cache, attention_mask=MASKS["left"]))
    assert_same(*results)
    assert len(graphs) == 2
    called = [node for node in graphs[-1].graph.nodes if node.op == "call_function"]
    updated = [node.kwargs["key_index"] for node in called if "entmax_key_index_update" in str(node.target)]
    attended = [node.kwargs["key_index"] for node in called if str(node.target) == "adasplash.entmax_attn.default"]
    assert len(updated) == len(cache.layers) and attended == updated
    for layer in cache.layers:
        check_index(layer, IDS.shape[1] + NEW - 1)


@pytest.mark.builds
@pytest.mark.slow
def test_the_real_compiler():
    """Steps of a cache that was filled eagerly."""
    model = build("llama", "ForCausalLM", torch.float32)
    torch.compiler.reset()
    step = torch.compile(model.forward, fullgraph=True)
    results = []
    for kind in (StaticCache, IndexedStaticCache):
        cache = kind(config=model.config, max_cache_len=ROOM)
        with torch.no_grad():
            model(IDS, past_key_values=cache, use_cache=True)
            places = torch.arange(IDS.shape[1], IDS.shape[1] + 3)
            logits = [
                step(IDS[:, :1], position_ids=place.view(1, 1), past_key_values=cache, use_cache=True).logits
                for place in places
            ]
        results.append(logits)
    assert_same(*results)
    for layer in cache.layers:
        check_index(layer, IDS.shape[1] + 3)
