"""The word and the keys of a config: set, saved, loaded, changed, refused."""

import inspect
import json
import logging
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BertModel

import common
import dense_models
from adasplash.integrations.transformers import configure
from dense_models import build, config_of, draw_ids, eager, softmax_is_entmax

IDS = draw_ids()


def word(model) -> str:
    return model.config._attn_implementation


def written(path) -> dict:
    return json.loads((path / "config.json").read_text())


def test_importing_the_library_does_not_import_transformers():
    code = "import sys, adasplash; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=common.ROOT)


def test_a_softmax_checkpoint_becomes_entmax(tmp_path):
    softmax = build("llama", "ForCausalLM", torch.float32, attn_implementation="sdpa")
    softmax.save_pretrained(tmp_path)
    assert not any("adasplash" in key or "attn_implementation" in key for key in written(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="adasplash", adasplash_alpha=1.25)
    assert word(model) == "adasplash"
    with softmax_is_entmax(1.25):
        expected = eager(model)(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-3, rtol=1e-3)


def test_a_checkpoint_remembers(tmp_path):
    """The word and the keys, saved and loaded twice, into other classes too; and softmax if it is asked for."""
    keys = dict(adasplash_alpha=[1.25, [1.1, 1.2, 1.3, 1.4]], adasplash_scale=0.5)
    first = build("bert", dtype=torch.float32, **keys)
    expected = first(IDS).last_hidden_state
    first.save_pretrained(tmp_path / "first")
    assert written(tmp_path / "first")["attn_implementation"] == "adasplash"
    assert "adasplash_learn_alpha" not in written(tmp_path / "first")
    second = AutoModel.from_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    assert written(tmp_path / "second") == written(tmp_path / "first")
    third = AutoModel.from_pretrained(tmp_path / "second")
    assert word(third) == "adasplash" and third.config.adasplash_alpha == keys["adasplash_alpha"]
    assert torch.equal(third(IDS).last_hidden_state, expected)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "second")
    assert word(other) == "adasplash" and word(other.bert) == "adasplash"

    softmax = AutoModel.from_pretrained(tmp_path / "second", attn_implementation="sdpa")
    assert word(softmax) == "sdpa"
    softmax.save_pretrained(tmp_path / "softmax")
    assert "attn_implementation" not in written(tmp_path / "softmax")
    third.set_attn_implementation("sdpa")
    third.save_pretrained(tmp_path / "switched")
    assert word(AutoModel.from_pretrained(tmp_path / "switched")) == "sdpa"


def test_a_checkpoint_is_not_softmax_without_the_import(tmp_path, monkeypatch):
    build("gpt2", "ForCausalLM", torch.float32).save_pretrained(tmp_path)
    monkeypatch.delitem(transformers.AttentionInterface._global_mapping, "adasplash")
    with pytest.raises(ValueError, match='`attn_implementation="adasplash"` is not supported'):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_generation_config_does_not_get_the_word(tmp_path):
    build("gpt2", "ForCausalLM", torch.float32).save_pretrained(tmp_path)
    assert "adasplash" not in (tmp_path / "generation_config.json").read_text()


def test_a_model_of_several(tmp_path):
    """Keys go down to the configs inside, and words are kept where they differ."""
    from transformers import CLIPConfig, CLIPModel

    layers = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    texts = layers | dict(vocab_size=50, max_position_embeddings=64, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    config = CLIPConfig(
        text_config=texts, vision_config=layers | dict(image_size=16, patch_size=4), projection_dim=32,
        adasplash_alpha=1.25, attn_implementation="adasplash",
    )  # fmt: skip
    model = CLIPModel(config).eval()
    assert model.config.text_config.adasplash_alpha == model.config.vision_config.adasplash_alpha == 1.25
    images = torch.randn(2, 3, 16, 16)
    expected = model.get_image_features(images), model.get_text_features(IDS)
    model.save_pretrained(tmp_path / "all")
    again = CLIPModel.from_pretrained(tmp_path / "all")
    found = again.get_image_features(images), again.get_text_features(IDS)
    for x, y in zip(found, expected, strict=True):
        x, y = (getattr(each, "pooler_output", each) for each in (x, y))
        assert torch.equal(x, y)

    model.set_attn_implementation({"": "sdpa", "text_config": "adasplash", "vision_config": "sdpa"})
    model.save_pretrained(tmp_path / "some")
    again = CLIPModel.from_pretrained(tmp_path / "some")
    assert again.config.text_config._attn_implementation == "adasplash"
    assert again.config.vision_config._attn_implementation == "sdpa"


def test_configure_a_model_in_hand():
    model = build("llama", "ForCausalLM", attn_implementation="sdpa")
    assert configure(model, alpha=1.25, scale=2.0) is model
    assert word(model) == "adasplash" and model.config.adasplash_alpha == 1.25
    other = build("llama", "ForCausalLM", adasplash_alpha=1.25, adasplash_scale=2.0)
    assert torch.equal(model(IDS).logits, other(IDS).logits)
    configure(model, alpha=[1.1, 1.9])
    assert [layer.self_attn.entmax_norm.value() for layer in model.model.layers] == [1.1, 1.9]


@pytest.mark.parametrize("before", ("sdpa", "adasplash"))
@pytest.mark.parametrize(
    "changes",
    (
        dict(alpha=3),
        dict(alpha=1.25, scale="2"),
        dict(alpha=[1.25]),
        dict(alpha=[1.25, [1.5] * 3]),
        dict(alpha=1.0, learn_alpha=True),
        dict(local_alpha=0, learn_alpha=True),
    ),
    ids=str,
)
def test_configure_changes_nothing_where_it_raises(before, changes):
    model = build("bert", attn_implementation=before)
    written, expected = model.config.to_dict(), model(IDS).last_hidden_state
    modules, parameters = list(model.modules()), list(model.parameters())
    with pytest.raises((TypeError, ValueError), match="adasplash: "):
        configure(model, **changes)
    assert word(model) == before and model.config.to_dict() == written
    assert all(x is y for x, y in zip(model.modules(), modules, strict=True))
    assert all(x is y for x, y in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model(IDS).last_hidden_state, expected)


def test_set_attn_implementation():
    model = build("bert", attn_implementation="sdpa")
    model.set_attn_implementation("adasplash")
    assert torch.equal(model(IDS).last_hidden_state, build("bert")(IDS).last_hidden_state)


def deberta(**options):
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40)
    return transformers.DebertaV2Config(**sizes, **options)


def test_what_cannot_be_switched_is_refused():
    """DeBERTa takes every word and runs softmax."""
    message = "DebertaV2Model must ask transformers' AttentionInterface"
    with pytest.raises(ValueError, match=message):
        transformers.DebertaV2Model(deberta(attn_implementation="adasplash"))
    with pytest.raises(ValueError, match=message):
        AutoModel.from_config(deberta(), attn_implementation="adasplash")
    model = transformers.DebertaV2Model(deberta())
    for switch in (configure, lambda model: model.set_attn_implementation("adasplash")):
        with pytest.raises(ValueError, match=message):
            switch(model)
    assert word(model) != "adasplash"


@pytest.mark.parametrize("name", ("DebertaModel", "XLNetModel", "BloomModel", "LongformerModel", "GPTNeoModel"))
def test_others_that_cannot_be(name):
    kind = getattr(transformers, name)
    with torch.device("meta"), pytest.raises(ValueError, match="AttentionInterface"):
        kind(kind.config_class(attn_implementation="adasplash"))


@pytest.mark.parametrize(
    "keys, message",
    (
        (dict(adasplash_alpha=3), "adasplash_alpha must be 1 or from 1.01 to 2, got 3"),
        (dict(adasplash_alpha=1.005), "adasplash_alpha must be 1 or from 1.01 to 2, got 1.005"),
        (dict(adasplash_alpha="1.5"), "adasplash_alpha must be a number, a list"),
        (dict(adasplash_alpha=[1.5]), "adasplash_alpha must have a value for each layer, got 1 and a layer 1"),
        (dict(adasplash_alpha=[[1.5] * 3, 1.5]), "alpha must have a number for each of 4 heads, got 3"),
        (dict(adasplash_local_alpha=0), "adasplash_local_alpha must be 1 or from 1.01 to 2, got 0"),
        (dict(adasplash_scale="2"), "adasplash_scale must be a number, got '2'"),
        (dict(adasplash_learn_alpha=1), "adasplash_learn_alpha must be True or False, got 1"),
        (dict(adasplash_learn_alpha=True, adasplash_alpha=1), "adasplash_alpha must be above 1.05 and below 2.0 where"),
    ),
)
def test_values_that_do_not_fit(keys, message):
    with pytest.raises((TypeError, ValueError), match=f"^adasplash: {message}"):
        BertModel(config_of("bert", **keys))


def test_options_that_are_dense_say_so_once():
    model = build("gemma2", attn_logit_softcapping=5.0)
    with pytest.warns(UserWarning, match="Gemma2Attention: softcap is not served without") as said:
        out = model(IDS, use_cache=False).last_hidden_state
    assert len(said) == 1
    with softmax_is_entmax(1.5):
        expected = eager(model)(IDS, use_cache=False).last_hidden_state
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:adasplash")
def test_attention_sinks():
    from transformers import GptOssConfig, GptOssModel

    sizes = (
        dense_models.SIZES
        | dense_models.GROUPED
        | dict(head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=5)
    )
    torch.manual_seed(0)
    model = dense_models.enlarge(GptOssModel(GptOssConfig(**sizes)).double().eval())
    mask = dense_models.masks()["left"]
    out = model(IDS, attention_mask=mask, use_cache=False).last_hidden_state
    with softmax_is_entmax(1.5):
        expected = eager(model)(IDS, attention_mask=mask, use_cache=False).last_hidden_state
    torch.testing.assert_close(out[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:adasplash")
@pytest.mark.parametrize("alpha", (1.0, 1.5))
def test_position_bias(alpha):
    from transformers import T5Config, T5Model

    sizes = dict(vocab_size=50, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, dropout_rate=0.0)
    if not T5Model._can_set_attn_implementation():
        pytest.skip("an older transformers")
    torch.manual_seed(0)
    model = T5Model(T5Config(**sizes, adasplash_alpha=alpha, attn_implementation="adasplash")).double().eval()
    mask = dense_models.masks()["right"]
    given = dict(input_ids=IDS, attention_mask=mask, decoder_input_ids=IDS[:, :7])
    with softmax_is_entmax(alpha):
        expected = eager(model)(**given).last_hidden_state
    torch.testing.assert_close(model(**given).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ("bert", "gpt2", "llama", "modernbert"))
def test_output_attentions(name):
    """Weights of every layer, exact zeros among them; results stay what they are. Models that do not tell their layers
    included."""
    model = build(name, adasplash_alpha=[1.5, 1.25])
    if name == "gpt2" and "OutputRecorder" not in inspect.getsource(sys.modules[type(model).__module__]):
        pytest.skip("an older transformers, whose GPT-2 does not ask the function for weights")
    out = model(IDS, output_attentions=True)
    with softmax_is_entmax(iter((1.5, 1.25))):
        expected = eager(model)(IDS, output_attentions=True)
    assert len(out.attentions) == 2
    for weights, theirs in zip(out.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(weights, theirs, atol=1e-5, rtol=1e-5)
        assert (weights == 0).any()
    torch.testing.assert_close(out.last_hidden_state, model(IDS).last_hidden_state, atol=1e-5, rtol=1e-5)
    assert not model(IDS).get("attentions")


def test_weights_of_packed_and_cached_rows():
    model = build("llama")
    positions = torch.cat([torch.arange(7), torch.arange(10)])[None].expand(3, -1)
    first = model(IDS, position_ids=positions, output_attentions=True, use_cache=False).attentions[0]
    assert first[:, :, 7:, :7].sum() == 0 and torch.allclose(first.sum(-1), torch.ones(()).double())
    cache = model(IDS[:, :16], use_cache=True).past_key_values
    last = model(IDS[:, 16:], past_key_values=cache, output_attentions=True).attentions[0]
    assert last.shape == (3, 4, 1, 17)
    torch.testing.assert_close(last.sum(-1), torch.ones(3, 4, 1).double())


def test_keys_that_a_layer_chooses_itself():
    layer = build("llama").layers[0].self_attn
    x = torch.zeros(1, 4, 3, 8)
    from adasplash.integrations.transformers.attention import attention

    with pytest.raises(NotImplementedError, match="LlamaAttention chooses keys by indices"):
        attention(layer, x, x, x, None, indices=torch.zeros(1))


@pytest.mark.parametrize("alpha", (1.0, 1.5))
@pytest.mark.parametrize("name", ("bert", "gpt2", "llama"))
def test_dropout_of_the_config(name, alpha):
    """In training, another one in each call, and the same for the same seed; not in evaluation."""
    option = {"bert": "attention_probs_dropout_prob", "gpt2": "attn_pdrop", "llama": "attention_dropout"}[name]
    model, without = (build(name, adasplash_alpha=alpha, **{option: p}) for p in (0.5, 0.0))
    expected = without(IDS).last_hidden_state
    torch.testing.assert_close(model(IDS).last_hidden_state, expected)
    model.train()
    first, second = model(IDS).last_hidden_state, model(IDS).last_hidden_state
    assert not torch.allclose(first, expected) and not torch.allclose(first, second)
    torch.manual_seed(5)
    first = model(IDS).last_hidden_state
    torch.manual_seed(5)
    assert torch.equal(model(IDS).last_hidden_state, first)


def test_gradient_checkpointing_is_exact():
    """Dropout included."""
    grads = []
    for checkpointing in (False, True):
        model = build("llama", attention_dropout=0.3, adasplash_learn_alpha=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(IDS, use_cache=False).last_hidden_state.pow(2).sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


def test_nothing_is_logged_of_loading(tmp_path, caplog):
    """Learned α that a softmax checkpoint does not have are not worth a word."""
    build("bert", dtype=torch.float32, attn_implementation="sdpa").save_pretrained(tmp_path)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level("WARNING"):
        AutoModel.from_pretrained(tmp_path, attn_implementation="adasplash", adasplash_learn_alpha=True)
    assert "alpha_logit" not in caplog.text
