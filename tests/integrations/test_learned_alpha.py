"""α as parameters of a model of transformers."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from torch import nn
from transformers import AutoModel, Trainer, TrainingArguments

from adasplash.integrations.transformers import EntmaxNormaliser, configure
from dense_models import build, draw_ids, eager, softmax_is_entmax

IDS = draw_ids()


def logits(model) -> dict[str, nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if name.endswith("alpha_logit")}


def learning(name="bert", head="Model", dtype=torch.float32, **options):
    return build(name, head, dtype, adasplash_learn_alpha=True, **options)


def test_parameters_and_their_gradients():
    model = learning(dtype=torch.float64, adasplash_alpha=[1.3, [1.2, 1.4, 1.6, 1.8]])
    found = logits(model)
    assert list(found) == [f"encoder.layer.{i}.attention.self.entmax_norm.alpha_logit" for i in (0, 1)]
    alphas = [layer.attention.self.entmax_norm.value().detach() for layer in model.encoder.layer]
    torch.testing.assert_close(alphas[0], torch.full((4,), 1.3, dtype=torch.float64))
    torch.testing.assert_close(alphas[1], torch.tensor([1.2, 1.4, 1.6, 1.8], dtype=torch.float64))
    other, starts = eager(model), [alpha.clone().requires_grad_() for alpha in alphas]
    model(IDS).last_hidden_state.pow(2).sum().backward()
    with softmax_is_entmax(iter(starts)):
        other(IDS).last_hidden_state.pow(2).sum().backward()
    for logit, alpha in zip(found.values(), starts, strict=True):
        slope = (alpha.detach() - 1.05) * (2 - alpha.detach()) / 0.95
        torch.testing.assert_close(logit.grad, alpha.grad * slope, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_logit_stays_float32(dtype, tmp_path):
    model = learning()
    with torch.no_grad():
        for logit in logits(model).values():
            logit.add_(torch.randn(4) * 0.3)
    before = copy.deepcopy(logits(model))
    moved = model.to(dtype)
    for name, logit in logits(moved).items():
        assert logit.dtype == torch.float32 and torch.equal(logit, before[name])
    assert moved(IDS).last_hidden_state.dtype == dtype
    moved.save_pretrained(tmp_path)
    for options in ({}, dict(dtype=dtype), dict(dtype="auto")):
        again = AutoModel.from_pretrained(tmp_path, **options)
        for name, logit in logits(again).items():
            assert logit.dtype == torch.float32 and torch.equal(logit, before[name])


def test_moving_and_converting():
    norm = EntmaxNormaliser(4, 1.5, learn=True)
    assert norm.half().alpha_logit.dtype == torch.float32
    assert norm.to("meta", torch.bfloat16).alpha_logit.dtype == torch.float32
    assert norm.to_empty(device="cpu").alpha_logit.device.type == "cpu"
    assert norm.double().alpha_logit.dtype == torch.float64
    held = EntmaxNormaliser(4, [1.1, 1.2, 1.3, 1.4]).bfloat16()
    assert held.alpha.dtype == torch.float32 and held.state_dict() == {}


def test_over_a_softmax_checkpoint(tmp_path):
    softmax = build("bert", dtype=torch.float32, attn_implementation="sdpa")
    softmax.save_pretrained(tmp_path / "softmax")
    options = dict(attn_implementation="adasplash", adasplash_learn_alpha=True, adasplash_alpha=1.3)
    model = AutoModel.from_pretrained(tmp_path / "softmax", **options)
    assert len(logits(model)) == 2
    for layer in model.encoder.layer:
        torch.testing.assert_close(layer.attention.self.entmax_norm.value(), torch.full((4,), 1.3))
    assert torch.equal(model.embeddings.word_embeddings.weight, softmax.embeddings.word_embeddings.weight)
    with torch.no_grad():
        for logit in logits(model).values():
            logit.copy_(torch.randn(4))
    model.save_pretrained(tmp_path / "entmax")
    again = AutoModel.from_pretrained(tmp_path / "entmax")
    assert torch.equal(again.eval()(IDS).last_hidden_state, model.eval()(IDS).last_hidden_state)
    assert all(torch.equal(x, y) for x, y in zip(logits(again).values(), logits(model).values(), strict=True))


@pytest.mark.parametrize("how", ("config", "configure"))
def test_no_weight_decay(how, tmp_path):
    """In Trainer's own groups."""
    if how == "config":
        model = learning()
    else:
        model = configure(build("bert", dtype=torch.float32, attn_implementation="sdpa"), learn_alpha=True)
    trainer = Trainer(model, TrainingArguments(tmp_path, weight_decay=0.1, report_to=[], use_cpu=True))
    groups = trainer.create_optimizer().param_groups
    mine = {id(logit) for logit in logits(model).values()}
    decays = {each["weight_decay"] for each in groups for parameter in each["params"] if id(parameter) in mine}
    assert len(mine) == 2 and decays == {0.0}
    assert any(each["weight_decay"] == 0.1 for each in groups)


def test_configure_starts_anew():
    model = build("llama", dtype=torch.float32)
    configure(model, learn_alpha=True)
    assert len(logits(model)) == 2
    configure(model, scale=0.5)  # keeps them
    kept = logits(model)
    configure(model, alpha=1.2)
    for name, logit in logits(model).items():
        assert logit is not kept[name]
    torch.testing.assert_close(model.layers[0].self_attn.entmax_norm.value(), torch.full((4,), 1.2))
    configure(model, learn_alpha=False)
    assert not logits(model) and model.layers[0].self_attn.entmax_norm.value() == 1.2
    with pytest.raises(ValueError, match=r"adasplash_alpha must be above 1.05 and below 2.0 .* got 2"):
        configure(model, learn_alpha=True, alpha=2)


def test_a_model_that_was_not_seen_at_construction():
    model = build("llama", dtype=torch.float32, adasplash_alpha=[[1.1, 1.2, 1.3, 1.4], 1.5])
    expected = model(IDS).last_hidden_state
    for layer in model.layers:
        del layer.self_attn.entmax_norm
    torch.testing.assert_close(model(IDS).last_hidden_state, expected)
    model.config.adasplash_learn_alpha = True
    with pytest.raises(RuntimeError, match="LlamaAttention has no α to learn; call"):
        model(IDS)


def test_part_of_the_heads_is_refused():
    model = learning("llama")
    layer = model.layers[0].self_attn
    layer.q_proj = nn.Linear(32, 16, bias=False)
    layer.k_proj = layer.v_proj = nn.Linear(32, 8, bias=False)
    with pytest.raises(RuntimeError, match="α of 4 heads and a query of 2"):
        model(IDS)
