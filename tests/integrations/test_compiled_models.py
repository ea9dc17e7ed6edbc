"""torch.compile, torch.export and AOTInductor of models of transformers. Most of it stops at the graph that a compiler
is given, which is where things break; the compiler behind it knows nothing of these models."""

import pytest
import torch

pytest.importorskip("transformers")

from adasplash.integrations.transformers import AlphaSchedule, record
from dense_models import build, draw_ids, masks

IDS, MASKS = draw_ids(), masks()


@pytest.fixture(autouse=True)
def anew():
    torch.compiler.reset()


def compiled(model, **options):
    return torch.compile(model, fullgraph=True, **dict(backend="aot_eager") | options)


CASES = (("bert", "right"), ("modernbert", "left"), ("gpt2", "none"), ("llama", "left"), ("mistral", "both"))


@pytest.mark.parametrize("name, mask", CASES)
def test_training(name, mask):
    """α learned, so that it gets its gradient too."""
    model, mask = build(name, dtype=torch.float32, adasplash_learn_alpha=True).train(), MASKS[mask]
    given = dict(attention_mask=mask) | ({} if name == "modernbert" else dict(use_cache=False))
    seen = torch.ones_like(IDS).bool() if mask is None else mask.bool()
    results = []
    for each in (model, compiled(model)):
        out = each(IDS, **given).last_hidden_state
        out[seen].pow(2).sum().backward()
        grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in model.parameters()]
        results.append([out[seen].detach(), *grads])
        model.zero_grad()
    for eagerly, x in zip(*results, strict=True):
        torch.testing.assert_close(x, eagerly, atol=1e-4 * max(1, eagerly.abs().max()), rtol=0)


@pytest.mark.parametrize("name", ("bert", "mistral"))
def test_packed_sequences(name):
    model = build(name, dtype=torch.float32)
    positions = torch.cat([torch.arange(7), torch.arange(10)])[None].expand(3, -1)
    given = dict(position_ids=positions, use_cache=False)
    out = compiled(model)(IDS, **given).last_hidden_state
    torch.testing.assert_close(out, model(IDS, **given).last_hidden_state)


@pytest.mark.parametrize("name", ("gpt2", "mistral"))
def test_decoding_with_a_static_cache(name):
    """Prompt and steps, past the window; no step compiles anew."""
    model = build(name, "ForCausalLM", torch.float32)
    mask = None if name == "gpt2" else MASKS["left"]
    given = dict(attention_mask=mask, pad_token_id=0, max_new_tokens=6)
    expected = model.generate(IDS, **given)
    model.forward = compiled(model.forward)
    torch._dynamo.utils.counters.clear()
    tokens = model.generate(IDS, cache_implementation="static", **given)
    assert torch.equal(tokens, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.slow
def test_the_real_compiler():
    model = build("llama", dtype=torch.float32)
    given = dict(attention_mask=MASKS["left"], use_cache=False)
    out = compiled(model, backend="inductor")(IDS, **given).last_hidden_state
    torch.testing.assert_close(out, model(IDS, **given).last_hidden_state, atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match=r"kv_seqlens must be from 0 .* got -1"):
        compiled(model, backend="inductor")(IDS, attention_mask=MASKS["holes"], use_cache=False)


@pytest.mark.parametrize("name", ("bert", "mistral"))
def test_holes_in_a_mask_do_not_pass(name):
    """In eager code they are served; compiled code cannot know them beforehand."""
    model = build(name, dtype=torch.float32)
    run = compiled(model)
    run(IDS, attention_mask=MASKS["left"], use_cache=False)
    model(IDS, output_attentions=True)  # transformers sees to what is captured, and compiled code cannot
    with pytest.raises(RuntimeError, match="got -1"):
        run(IDS, attention_mask=MASKS["holes"], use_cache=False)
    out = compiled(model)(IDS, attention_mask=MASKS["holes"], use_cache=False, output_attentions=True)
    assert out.last_hidden_state.isnan().all()


def test_output_attentions():
    model = build("llama", dtype=torch.float32)
    given = dict(attention_mask=MASKS["left"], use_cache=False, output_attentions=True)
    expected = model(IDS, **given)
    out = compiled(model)(IDS, **given)
    for weights, theirs in zip(out.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(weights, theirs)


def test_a_schedule_is_compiled_once():
    model = build("bert", dtype=torch.float32)
    schedule = AlphaSchedule()
    schedule.begin(model)
    run = compiled(model)
    for quarter in range(5):
        schedule.set(quarter / 4)
        with torch._dynamo.config.patch(error_on_recompile=quarter > 0):
            out = run(IDS, attention_mask=MASKS["right"]).last_hidden_state
        fixed = build("bert", dtype=torch.float32, adasplash_alpha=1 + quarter / 8)
        expected = fixed(IDS, attention_mask=MASKS["right"]).last_hidden_state
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_recording_a_compiled_model():
    """Runs eagerly, and the compiled code is there again behind it."""
    model = build("bert", dtype=torch.float32)
    run = compiled(model)
    expected = run(IDS).last_hidden_state
    with record(model) as seen:
        run(IDS)
    assert len(seen.layers) == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(run(IDS).last_hidden_state, expected)


def exported(name: str):
    model = build(name, dtype=torch.float32)
    rows, length = torch.export.Dim("rows", min=1, max=64), torch.export.Dim("length", min=5, max=64)
    shapes = {each: {0: rows, 1: length} for each in ("input_ids", "attention_mask")}
    return model, torch.export.export(model, (IDS, MASKS["right"]), dynamic_shapes=shapes, strict=False)


@pytest.mark.parametrize("name", ("bert", "modernbert"))
def test_export_of_encoders(name):
    """For every batch and length; tests/package/test_libtorch.py has AOTInductor and C++ behind it."""
    model, program = exported(name)
    run = program.module()
    for ids, mask in ((IDS, MASKS["left"]), (IDS, MASKS["ones"]), (draw_ids(2, 40), torch.ones(2, 40).long())):
        expected = model(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(run(ids, mask).last_hidden_state[mask.bool()], expected[mask.bool()])
    with pytest.raises(RuntimeError, match="got -1"):
        run(IDS, MASKS["holes"])
