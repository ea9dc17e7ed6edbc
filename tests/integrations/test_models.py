"""Logits, gradients and generated tokens of tiny models against the same models with dense float64 entmax."""

import warnings
from inspect import signature

import pytest
import torch

pytest.importorskip("transformers")

from transformers import masking_utils

import adasplash.integrations.transformers  # noqa: F401
import dense_models
from dense_models import build, draw_ids, eager, masks, softmax_is_entmax

IDS, MASKS = draw_ids(), masks()


def assert_close(actual, expected, atol=1e-5):
    """Many of the models compute norms in float32 whatever their type is."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)


def seen(mask) -> torch.Tensor:
    return torch.ones_like(IDS).bool() if mask is None else mask.bool()


def without_cache(name: str) -> dict:
    return {} if name == "modernbert" else {"use_cache": False}


ALL_WAYS = ("modernbert", "llama", "mistral")
CASES = [(name, mask) for name in dense_models.MODELS for mask in (MASKS if name in ALL_WAYS else ("right", "left"))]


@pytest.mark.parametrize("name, mask", CASES)
def test_hidden_states_and_gradients(name, mask):
    """Padding in front, behind, both and in between; in the last case with a warning, in all others without."""
    model, mask_name, mask = build(name), mask, MASKS[mask]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if mask_name == "holes" else "error")
        out = model(IDS, attention_mask=mask, **without_cache(name)).last_hidden_state[seen(mask)]
    other = eager(model)
    with softmax_is_entmax(1.5):
        expected = other(IDS, attention_mask=mask, **without_cache(name)).last_hidden_state[seen(mask)]
        expected.pow(2).sum().backward()
    softmax = other(IDS, attention_mask=mask, **without_cache(name)).last_hidden_state[seen(mask)]
    assert_close(out, expected)
    assert not torch.allclose(out, softmax, atol=1e-2)
    out.pow(2).sum().backward()
    for (where, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        if theirs.grad is not None:
            largest = theirs.grad.abs().max().clamp(min=1)
            torch.testing.assert_close(ours.grad / largest, theirs.grad / largest, atol=1e-5, rtol=0, msg=where)


@pytest.mark.parametrize("alpha", (1.0, 1.25, 2.0, [1.0, 1.7], [[1.1, 1.3, 1.5, 1.9], 2.0]), ids=str)
@pytest.mark.parametrize("name", ("bert", "llama", "mistral"))
def test_alpha_of_the_config(name, alpha):
    """A number, by layer, by layer and head; 1 is softmax."""
    model = build(name, adasplash_alpha=alpha)
    out = model(IDS, attention_mask=MASKS["right"], use_cache=False).last_hidden_state[seen(MASKS["right"])]
    calls = iter(alpha) if isinstance(alpha, list) else alpha
    with softmax_is_entmax(calls):
        expected = eager(model)(IDS, attention_mask=MASKS["right"], use_cache=False).last_hidden_state
    assert_close(out, expected[seen(MASKS["right"])])


def test_local_layers_have_an_alpha_of_their_own():
    for name, order in (("modernbert", (1.3, 1.8)), ("qwen2", (1.3, 1.8))):
        model = build(name, adasplash_alpha=1.3, adasplash_local_alpha=1.8)
        with softmax_is_entmax(iter(order)):
            expected = eager(model)(IDS, **without_cache(name)).last_hidden_state
        assert_close(model(IDS, **without_cache(name)).last_hidden_state, expected)


def test_scale_multiplies_the_models_own():
    model = build("bert", adasplash_scale=0.5)
    out = model(IDS).last_hidden_state
    other = eager(model)
    for layer in other.encoder.layer:
        layer.attention.self.scaling *= 0.5
    with softmax_is_entmax(1.5):
        assert_close(out, other(IDS).last_hidden_state, 1e-12)


@pytest.mark.parametrize("weights", (False, True))
def test_scales_of_gpt2(weights):
    model = build("gpt2", scale_attn_weights=weights, scale_attn_by_inverse_layer_idx=True)
    with softmax_is_entmax(1.5):
        expected = eager(model)(IDS, use_cache=False).last_hidden_state
    assert_close(model(IDS, use_cache=False).last_hidden_state, expected, 1e-10)


@pytest.mark.parametrize("mask", ("none", "right", "left"))
@pytest.mark.parametrize("name", ("bert", "gpt2"))
def test_cross_attention(name, mask):
    """Of as many queries as keys, too: nothing there is causal."""
    model = build(name, is_decoder=True, add_cross_attention=True)
    for length in (9, 17):
        memory = torch.randn(3, 17, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        given = dict(encoder_hidden_states=memory, encoder_attention_mask=MASKS[mask], use_cache=False)
        out = model(IDS[:, :length], **given).last_hidden_state
        with softmax_is_entmax(1.5):
            expected = eager(model)(IDS[:, :length], **given).last_hidden_state
        assert_close(out, expected, 1e-10)


@pytest.mark.parametrize("mask", ("none", "right"))
def test_encoder_and_decoder(mask):
    """BART: encoder, causal decoder and what lies between, with and without a cache."""
    from transformers import BartConfig, BartModel

    sizes = dict(vocab_size=50, d_model=32, max_position_embeddings=64, pad_token_id=0, dropout=0.0)
    layers = {
        f"{side}_{key}": n
        for side in ("encoder", "decoder")
        for key, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 40))
    }
    torch.manual_seed(0)
    config = BartConfig(**sizes, **layers, attn_implementation="adasplash")
    model = dense_models.enlarge(BartModel(config).double().eval())
    given = dict(input_ids=IDS, attention_mask=MASKS[mask], decoder_input_ids=IDS[:, :11])
    with softmax_is_entmax(1.5):
        expected = eager(model)(**given, use_cache=False).last_hidden_state
    for use_cache in (False, True):
        assert_close(model(**given, use_cache=use_cache).last_hidden_state, expected, 1e-10)


@pytest.mark.parametrize("mask", ("none", "right", "left"))
def test_windows_that_only_the_mask_has(mask):
    """Phi-MoE does not tell its layers of its window."""
    from transformers import PhimoeConfig, PhimoeModel

    sizes = dense_models.SIZES | dense_models.GROUPED
    out = {}
    for window in (5, None):
        config = PhimoeConfig(**sizes, num_local_experts=2, num_experts_per_tok=1, sliding_window=window)
        torch.manual_seed(0)
        model = dense_models.enlarge(PhimoeModel(config).double().eval())
        assert not hasattr(model.layers[0].self_attn, "sliding_window")
        given = dict(attention_mask=MASKS[mask], use_cache=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out[window] = model(IDS, **given).last_hidden_state[seen(MASKS[mask])]
        with softmax_is_entmax(1.5):
            expected = eager(model)(IDS, **given).last_hidden_state[seen(MASKS[mask])]
        assert_close(out[window], expected)
    assert not torch.allclose(out[5], out[None], atol=1e-2)


WAYS = {
    "greedy": {},
    "beams": dict(num_beams=3),
    "sampling": dict(do_sample=True, top_k=5),
    "static": dict(cache_implementation="static", disable_compile=True),
    "static, beams": dict(cache_implementation="static", num_beams=2, disable_compile=True),
    "no cache": dict(use_cache=False),
    "prefill in chunks": dict(prefill_chunk_size=4),
}


SOME_WAYS = ("greedy", "static")


@pytest.mark.parametrize(
    "name, way",
    [(name, way) for name in ("gpt2", "llama", "mistral") for way in WAYS if name != "gpt2" or way in SOME_WAYS]
    + [("qwen2_moe", way) for way in SOME_WAYS],
)
def test_generated_tokens(name, way):
    """Past the window, padded on the left."""
    if way == "prefill in chunks" and "q_length" not in signature(masking_utils.sdpa_mask).parameters:
        pytest.skip("an older transformers, which has it wrong with windows")
    model = build(name, "ForCausalLM")
    mask = None if name == "gpt2" else MASKS["left"][:, :9].clone()
    if mask is not None:
        mask[:, -1] = 1
    given = dict(attention_mask=mask, max_new_tokens=7, pad_token_id=0, **WAYS[way])
    torch.manual_seed(0)
    tokens = model.generate(IDS[:, :9], **given)
    torch.manual_seed(0)
    with softmax_is_entmax(1.5):
        expected = eager(model).generate(IDS[:, :9], **given)
    assert torch.equal(tokens, expected)
    assert tokens.shape == (3, 16)


@pytest.mark.parametrize("name", ("llama", "mistral"))
def test_a_step_after_a_right_padded_prompt(name):
    """The padding is then in between."""
    model = build(name)
    mask = torch.cat([MASKS["right"], torch.ones(3, 1, dtype=torch.long)], 1)
    results = []
    for each, alpha in ((model, None), (eager(model), 1.5)):
        with softmax_is_entmax(alpha) if alpha else warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cache = each(IDS, attention_mask=MASKS["right"], use_cache=True).past_key_values
            results.append(each(IDS[:, :1], attention_mask=mask, past_key_values=cache).last_hidden_state)
    assert_close(*results)


def test_half_types():
    for dtype in (torch.bfloat16, torch.float16):
        model = build("llama", "ForCausalLM", dtype=dtype)
        out = model(IDS, attention_mask=MASKS["left"]).logits
        assert out.dtype == dtype and out.isfinite().all()
