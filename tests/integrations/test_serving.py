"""Answers of transformers' continuous batching against the same model's, one prompt after the other."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import CompileConfig, GenerationConfig, PhimoeConfig, PhimoeForCausalLM
from transformers.generation import continuous_batching

import adasplash.integrations.transformers  # noqa: F401
import dense_models
from adasplash.integrations.transformers import attention, construction, record, serving
from dense_models import build, draw_ids

needs_newer = pytest.mark.skipif(not serving.can_serve(), reason="an older transformers, where it is refused")

#: Longer than a forward, than a page and than a window, and one that begins as another does.
PROMPTS = [draw_ids(1, length)[0].tolist() for length in (1, 21, 4, 9, 13, 30)]
PROMPTS.append([*PROMPTS[-1][:22], 7, 8])
NEW = 6


def serve(model, prompts=PROMPTS, **options):
    """In forwards of at most 16 tokens, so that prompts come in chunks beside single tokens of others."""
    room = dict(page_size=4, num_blocks=64, max_batch_tokens=16, return_logprobs=True)
    answers = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=continuous_batching.continuous_api.ContinuousBatchingConfig(**room | options),
    )
    assert len(answers) == len(prompts)
    return list(answers.values())


def assert_as_alone(model, **options):
    for prompt, answer in zip(PROMPTS, serve(model, **options), strict=True):
        assert answer.error is None
        given = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0, output_logits=True)
        alone = model.generate(torch.tensor([prompt]), return_dict_in_generate=True, **given)
        assert answer.generated_tokens == alone.sequences[0, len(prompt) :].tolist()
        expected = torch.cat(alone.logits).float().log_softmax(-1).amax(-1)
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def calls(monkeypatch):
    """Whether pages were attended to, how many queries each request had, and the window."""
    seen = []
    paged, packed = serving.entmax_attn_paged, serving.entmax_attn_varlen

    def attend_to_pages(query, key_cache, value_cache, table, lengths, *others, **options):
        offsets = options.get("cu_seqlens_q", torch.arange(table.shape[0] + 1))
        seen.append((True, offsets.diff().tolist(), options.get("window")))
        return paged(query, key_cache, value_cache, table, lengths, *others, **options)

    def attend_packed(query, key, value, cu_seqlens_q, *others, **options):
        seen.append((False, cu_seqlens_q.diff().tolist(), options.get("window")))
        return packed(query, key, value, cu_seqlens_q, *others, **options)

    monkeypatch.setattr(serving, "entmax_attn_paged", attend_to_pages)
    monkeypatch.setattr(serving, "entmax_attn_varlen", attend_packed)
    return seen


CASES = {
    "llama": ("llama", {}),
    "softmax": ("llama", dict(adasplash_alpha=1.0)),
    "alpha by layer and head": ("llama", dict(adasplash_alpha=[[1.2, 1.4, 1.6, 1.8], 1.3])),
    "learned alpha": ("qwen3", dict(adasplash_learn_alpha=True)),
    "scale": ("gpt2", dict(adasplash_scale=0.5)),
    "windows": ("mistral", {}),
    "windows in some layers": ("qwen2", dict(adasplash_local_alpha=1.3)),
    "windows in some layers of gemma2": ("gemma2", {}),
}


@needs_newer
@pytest.mark.parametrize("case", CASES)
def test_answers(case):
    name, options = CASES[case]
    assert_as_alone(build(name, "ForCausalLM", **options))


@needs_newer
def test_a_window_that_layers_do_not_know(calls):
    config = PhimoeConfig(
        **dense_models.SIZES, num_key_value_heads=2, sliding_window=5, num_local_experts=2, num_experts_per_tok=1
    )
    torch.manual_seed(0)
    assert_as_alone(dense_models.enlarge(PhimoeForCausalLM(config).double().eval()))
    assert {(pages, window) for pages, _, window in calls} == {(False, (4, 0))}


@needs_newer
def test_a_cache_that_is_too_small_for_all():
    assert_as_alone(build("llama", "ForCausalLM"), num_blocks=18)


@needs_newer
@pytest.mark.parametrize("name", ("llama", "mistral"))
def test_padded_forwards(name, calls):
    """As for CUDA graphs and compiled code, tokens of no request are behind the others."""
    with torch.compiler.set_stance("force_eager"):
        sizes = dict(q_padding_interval_size=16, max_requests_per_batch=16)
        assert_as_alone(build(name, "ForCausalLM"), varlen_compile_config=CompileConfig(), **sizes)
    assert any(len(lengths) > 1 and lengths[-1] > 0 == lengths[-2] for _, lengths, _ in calls)


@needs_newer
@pytest.mark.slow
@pytest.mark.builds
def test_compiled():
    config = CompileConfig(backend="aot_eager", dynamic=True, fullgraph=False)
    model = build("llama", "ForCausalLM", torch.float32)
    assert_as_alone(model, varlen_compile_config=config, decode_compile_config=config)


@needs_newer
def test_keys_stay_in_their_pages(calls):
    """Of layers that see all keys, once there are any in the cache."""
    serve(build("llama", "ForCausalLM"))
    paged = [lengths for pages, lengths, _ in calls if pages]
    assert any(max(lengths) > 1 == min(lengths) for lengths in paged)
    assert any(len(lengths) > 1 == max(lengths) for lengths in paged)
    assert sum(not pages for pages, *_ in calls) == 2  # the first forward, by its two layers


@needs_newer
def test_single_tokens_are_told_by_a_table(monkeypatch):
    """There, transformers makes no lists of all keys."""
    made, theirs = [], serving._table_of
    monkeypatch.setattr(serving, "_table_of", lambda *given: made.append(given[0].shape[0]) or theirs(*given))
    model = build("llama", "ForCausalLM")
    serve(model, PROMPTS[2:3])
    assert not made
    serve(model, PROMPTS[2:3], max_blocks_per_request=0)
    assert made == [n for n in range(len(PROMPTS[2]) + 1, len(PROMPTS[2]) + NEW) for _ in range(2)]


@needs_newer
def test_windows(calls):
    serve(build("qwen2", "ForCausalLM"))
    assert {window for pages, _, window in calls if pages} == {None}
    assert {window for pages, _, window in calls if not pages} == {None, (4, 0)}


@needs_newer
def test_the_word_stays(monkeypatch):
    """Also where flash-attn could be had, with which transformers would run softmax."""
    api = continuous_batching.continuous_api
    for version in (2, 3):
        monkeypatch.setattr(api, f"is_flash_attn_{version}_available", lambda **_: True)
    model = build("llama", "ForCausalLM")
    manager = model.init_continuous_batching(generation_config=GenerationConfig(eos_token_id=-1))
    assert model.config._attn_implementation == "adasplash"
    manager.destroy()


@needs_newer
def test_other_words_are_served_as_before(calls):
    model = build("llama", "ForCausalLM")
    model.set_attn_implementation("sdpa")
    assert_as_alone(model)
    assert not calls


@needs_newer
def test_what_is_not_served():
    (answer,) = serve(build("gemma2", "ForCausalLM", attn_logit_softcapping=20.0), PROMPTS[:1])
    assert "Gemma2Attention: softcap is not served in continuous batching" in answer.error
    model = build("llama", "ForCausalLM")
    with record(model):
        (answer,) = serve(model, PROMPTS[:1])
    assert "LlamaAttention: record is not served in continuous batching" in answer.error


def test_the_word_with_a_prefix(monkeypatch):
    model = build("llama", "ForCausalLM")
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(construction, "can_serve", lambda: True)
    model.set_attn_implementation("paged|adasplash")
    assert model.config._attn_implementation == "adasplash"
    monkeypatch.setattr(construction, "can_serve", lambda: False)
    with pytest.raises(NotImplementedError, match="must be that of a newer transformers"):
        model.set_attn_implementation("paged|adasplash")


STEPS = {
    ("llama", "dynamic"): [10, 11, 12],
    ("llama", "static"): [12, 12, 12],
    ("mistral", "dynamic"): [5, 5, 5],
    ("mistral", "static"): [5, 5, 5],
}


@pytest.mark.parametrize("name, cache", STEPS)
def test_a_step_of_generate_is_one_query_with_a_cache(monkeypatch, name, cache):
    """For which the op has a way of its own."""
    shapes, theirs = [], attention.entmax_attn

    def attend(query, key, *others, **options):
        shapes.append((query.shape[2], key.shape[2]))
        return theirs(query, key, *others, **options)

    monkeypatch.setattr(attention, "entmax_attn", attend)
    given = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, disable_compile=True)
    build(name, "ForCausalLM").generate(draw_ids(2, 9), cache_implementation=cache, **given)
    assert shapes[-6:] == [(1, keys) for keys in STEPS[name, cache] for _ in range(2)]
