"""AlphaSchedule, record and LogAttention, alone and in Trainer."""

import json
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import adasplash
from adasplash.integrations.transformers import AlphaSchedule, LogAttention, record
from dense_models import build, draw_ids, eager, masks, softmax_is_entmax

IDS = draw_ids()


def alphas(model) -> list:
    return [module.entmax_norm.value() for module in model.modules() if hasattr(module, "entmax_norm")]


def small(**options):
    return build("gpt2", "ForCausalLM", torch.float32, **options)


def arguments(path, steps, **options) -> TrainingArguments:
    return TrainingArguments(
        path, max_steps=steps, per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True,
        **dict(learning_rate=1e-3, report_to=[], save_strategy="no") | options,
    )  # fmt: skip


DATA = [{"input_ids": ids, "labels": ids} for ids in draw_ids(8, 12)]


@pytest.mark.parametrize(
    "options, expected",
    (
        (dict(), (1.0, 1.125, 1.25, 1.375, 1.5)),
        (dict(shape="cosine"), (1.0, 1.0732, 1.25, 1.4268, 1.5)),
        (dict(shape="polynomial"), (1.0, 1.03125, 1.125, 1.28125, 1.5)),
        (dict(shape="polynomial", power=1), (1.0, 1.125, 1.25, 1.375, 1.5)),
        (dict(shape="stepwise", levels=2), (1.0, 1.0, 1.25, 1.25, 1.5)),
        (dict(over=0.5), (1.0, 1.25, 1.5, 1.5, 1.5)),
        (dict(after=0.5, over=0.5), (1.0, 1.0, 1.0, 1.25, 1.5)),
        (dict(start=2.0, end=1.0), (2.0, 1.75, 1.5, 1.25, 1.0)),
        (dict(end=1.02), (1.0, 1.01, 1.01, 1.015, 1.02)),
        (dict(shape="exponential"), tuple(1 + 0.5 * (1 - math.exp(-5 * t / 4)) / (1 - math.exp(-5)) for t in range(5))),
    ),
    ids=str,
)
def test_shapes(options, expected):
    """Quarter by quarter; between 1 and 1.01 there is nothing."""
    model = build("llama")
    schedule = AlphaSchedule(**options)
    schedule.begin(model)
    for quarter, alpha in enumerate(expected):
        schedule.set(quarter / 4)
        torch.testing.assert_close(torch.stack(alphas(model)), torch.full((2,), alpha), atol=1e-4, rtol=0)
        torch.testing.assert_close(model.config.adasplash_alpha, alpha, atol=1e-4, rtol=0)


@pytest.mark.parametrize("alpha", (1.0, 1.01, 1.3))
def test_a_model_under_a_schedule_computes_what_its_config_says(alpha):
    """Densely too."""
    model, mask = build("llama"), masks()["left"]
    schedule = AlphaSchedule(start=alpha)
    schedule.begin(model)
    schedule.set(0.0)
    fixed = build("llama", adasplash_alpha=alpha)
    for given in (dict(attention_mask=mask), dict(attention_mask=mask, output_attentions=True)):
        out, expected = model(IDS, **given), fixed(IDS, **given)
        torch.testing.assert_close(out.last_hidden_state, expected.last_hidden_state, atol=2e-5, rtol=1e-5)


def test_by_layer_and_head_and_local_layers():
    model = build("bert")
    schedule = AlphaSchedule(end=[1.5, [1.2, 1.4, 1.6, 1.8]])
    schedule.begin(model)
    schedule.set(0.5)
    first, second = alphas(model)
    torch.testing.assert_close(first, torch.tensor(1.25))
    torch.testing.assert_close(second, torch.tensor([1.1, 1.2, 1.3, 1.4]))
    assert model.config.adasplash_alpha == pytest.approx([1.25, pytest.approx([1.1, 1.2, 1.3, 1.4])])

    for local, expected in ((False, (1.5, 1.9)), (True, (1.5, 1.5))):
        model = build("modernbert", adasplash_local_alpha=1.9)
        schedule = AlphaSchedule(local=local)
        schedule.begin(model)
        schedule.set(1.0)
        assert [float(alpha) for alpha in alphas(model)] == pytest.approx(expected)


@pytest.mark.parametrize(
    "options, message",
    (
        (dict(end=3), "end must be 1 or from 1.01 to 2, got 3"),
        (dict(start=[1.0]), r"start must be a number, got \[1.0\]"),
        (dict(shape="step"), "shape must be one of"),
        (dict(over=0.0), "after and over must be shares of the training, got 0.0 and 0.0"),
        (dict(over=0.6, after=0.5), "after and over"),
        (dict(power=0), "power must be above 0"),
    ),
)
def test_wrong_arguments(options, message):
    with pytest.raises((ValueError, TypeError), match=f"^adasplash: {message}"):
        AlphaSchedule(**options)


def test_models_without_an_alpha_to_schedule():
    with pytest.raises(ValueError, match="adasplash_learn_alpha must be False where α is scheduled"):
        AlphaSchedule().begin(build("bert", adasplash_learn_alpha=True))
    with pytest.raises(ValueError, match='AlphaSchedule needs a model with attn_implementation="adasplash"'):
        AlphaSchedule().begin(build("bert", attn_implementation="sdpa"))


class Seen(TrainerCallback):
    """α of every step."""

    def __init__(self):
        self.alphas: list[float] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.alphas.append(float(model.transformer.h[0].attn.entmax_norm.alpha))


def test_in_trainer(tmp_path):
    """From softmax to entmax; checkpoints have the α of their step, and a training goes on from one."""
    model, seen = small(adasplash_alpha=1.0), Seen()
    saving = dict(save_strategy="steps", save_steps=2)
    trainer = Trainer(model, arguments(tmp_path, 4, **saving), train_dataset=DATA, callbacks=[AlphaSchedule(1.5), seen])
    trainer.train()
    assert seen.alphas == pytest.approx([1.125, 1.25, 1.375, 1.5])
    middle = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert middle.config.adasplash_alpha == pytest.approx(1.25)
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4").eval()
    assert alphas(last) == [1.5, 1.5]
    torch.testing.assert_close(last(IDS).logits, model.eval()(IDS).logits)

    again, seen = small(adasplash_alpha=1.0), Seen()
    trainer = Trainer(again, arguments(tmp_path, 4), train_dataset=DATA, callbacks=[AlphaSchedule(1.5), seen])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert seen.alphas == pytest.approx([1.375, 1.5])
    torch.testing.assert_close(again.eval()(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_alpha_is_learned_in_trainer(tmp_path):
    model = small(adasplash_learn_alpha=True)
    options = dict(learning_rate=0.05, bf16=True)
    Trainer(model, arguments(tmp_path, 3, **options), train_dataset=DATA).train()
    for alpha in alphas(model):
        assert alpha.dtype == torch.float32 and (alpha != 1.5).all()


def expected_facts(model, mask):
    """By dense weights: keys, largest weight; each (layers, H)."""
    with softmax_is_entmax(1.5):
        weights = eager(model)(IDS, attention_mask=mask, output_attentions=True, use_cache=False).attentions
    rows = (torch.ones_like(IDS) if mask is None else mask).bool()[:, None].expand(-1, 4, -1)
    rows = rows.double()

    def mean(of_rows):
        return torch.stack([(each * rows).sum((0, 2)) / rows.sum((0, 2)) for each in of_rows])

    keys, largest = mean([(w > 0).sum(-1) for w in weights]), mean([w.amax(-1) for w in weights])
    return keys, largest


@pytest.mark.parametrize("mask", ("none", "left"))
@pytest.mark.parametrize("dense", (False, True), ids=("", "dense"))
def test_what_is_recorded(mask, dense):
    model, mask = build("llama"), masks()[mask]
    keys, largest = expected_facts(model, mask)
    plain = model(IDS, attention_mask=mask, use_cache=False).last_hidden_state
    with record(model) as seen:
        out = model(IDS, attention_mask=mask, use_cache=False, output_attentions=dense).last_hidden_state
    torch.testing.assert_close(out, plain, atol=1e-5, rtol=0)
    assert list(seen.layers) == ["layers.0.self_attn", "layers.1.self_attn"]
    for layer, facts in enumerate(seen.layers.values()):
        torch.testing.assert_close(facts.support, keys[layer].float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(facts.largest_weight, largest[layer].float(), atol=1e-5, rtol=1e-5)
        assert facts.empty_tiles.shape == (4,) and (facts.alpha == 1.5).all()
    numbers = seen.numbers()
    assert numbers["adasplash/support"] == pytest.approx(keys.mean().item(), rel=1e-5)
    assert numbers["adasplash/layer_1/largest_weight"] == pytest.approx(largest[1].mean().item(), rel=1e-5)
    model(IDS)
    assert seen.numbers() == numbers  # nothing is added behind the context


def test_recordings_that_overlap():
    """Each has all forwards in its context."""
    model, numbers = build("llama"), []
    for row in IDS:
        with record(model) as alone:
            model(row[None])
        numbers.append(alone.numbers()["adasplash/support"])
    assert numbers[0] != numbers[1]
    with record(model) as outer:
        model(IDS[:1])
        with record(model) as inner:
            model(IDS[1:2])
        model(IDS[2:])
    assert inner.numbers()["adasplash/support"] == numbers[1]
    assert outer.numbers()["adasplash/support"] == pytest.approx(sum(numbers) / 3)
    assert_nothing_is_recorded(model)


def test_empty_tiles_are_those_of_the_op():
    """With and without a matrix of weights, packed too."""
    model = build("bert", max_position_embeddings=256)
    ids = draw_ids(1, 200)
    seen = []
    for options in ({}, dict(output_attentions=True)):
        with record(model) as recording:
            model(ids, **options)
        seen.append(torch.stack([facts.empty_tiles for facts in recording.layers.values()]))
    torch.testing.assert_close(*seen)
    with record(model) as recording:
        model(ids, position_ids=torch.cat([torch.arange(130), torch.arange(70)])[None])
    assert all(facts.support.min() >= 1 for facts in recording.layers.values())


def test_a_recording_of_nothing():
    message = 'record needs a model with attn_implementation="adasplash"'
    with pytest.raises(ValueError, match=message), record(build("bert", attn_implementation="sdpa")):
        pass
    with record(build("bert")) as seen:
        assert not seen.layers
    assert seen.layers == {} and seen.numbers() == {}
    with pytest.raises(ValueError, match="every must be 1 or more, got 0"):
        LogAttention(print, every=0)


def test_logging_in_trainer(tmp_path):
    """Through Trainer's own loggers: what is in its history is what TensorBoard gets."""
    model = small()
    schedule = AlphaSchedule(start=1.2, end=1.6)
    trainer = Trainer(model, arguments(tmp_path, 4, logging_steps=2), train_dataset=DATA, callbacks=[schedule])
    trainer.add_callback(LogAttention(trainer.log))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "adasplash/support" in entry]
    assert [entry["step"] for entry in logged] == [1, 3]
    assert {"adasplash/layer_0/support", "adasplash/layer_1/alpha", "adasplash/empty_tiles"} <= set(logged[0])
    assert 1 <= logged[0]["adasplash/support"] <= 12
    assert [entry["adasplash/alpha"] for entry in logged] == pytest.approx([1.2, 1.4])  # of the step's forward
    assert json.dumps(logged)
    assert_nothing_is_recorded(model)
    assert adasplash.__version__


def assert_nothing_is_recorded(model):
    """And compiled code is compiled again."""
    assert not any(module.entmax_norm.recorders for module in model.modules() if hasattr(module, "entmax_norm"))
    assert "forward" not in vars(model)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert len(compiled) == 1


class Broken(Trainer):
    """Its second step raises."""

    where, error = "", RuntimeError

    def training_step(self, model, inputs, *others):
        if self.state.global_step == 1:
            if self.where == "before":
                raise self.error("broken")
            if self.where == "forward":
                model.transformer.h[1].register_forward_hook(self.fail)
            if self.where == "backward":
                model.transformer.wte.weight.register_hook(self.fail)
        return super().training_step(model, inputs, *others)

    def fail(self, *_):
        raise self.error("broken")


@pytest.mark.parametrize("error", (RuntimeError, KeyboardInterrupt))
@pytest.mark.parametrize("where", ("before", "forward", "backward"))
def test_a_logged_step_that_raises(tmp_path, where, error):
    """Nothing is left behind: the model is not recorded, and what is compiled runs compiled."""
    model, logged = small(), []
    trainer = Broken(
        model, arguments(tmp_path, 3), train_dataset=DATA, callbacks=[LogAttention(logged.append, every=1)]
    )
    trainer.where, trainer.error = where, error
    with pytest.raises(error, match="broken"):
        trainer.train()
    assert len(logged) == 1
    if where == "before":  # the forward that was to be recorded comes later
        assert not any(module.entmax_norm.recorders for module in model.modules() if hasattr(module, "entmax_norm"))
        model(IDS)
    assert_nothing_is_recorded(model)


@pytest.mark.builds
@pytest.mark.parametrize("checkpointing", (False, True), ids=("", "checkpointing"))
def test_logging_of_a_compiled_model(tmp_path, checkpointing):
    """Steps that are logged run eagerly; nothing more is compiled for them, and results are the same."""
    compiled, logged, runs = [], [], []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    for callbacks in ([], [LogAttention(logged.append, every=2)]):
        torch.compiler.reset()
        compiled.clear()
        model = small()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.compile(backend=backend)
        trainer = Trainer(model, arguments(tmp_path, 4), train_dataset=DATA, callbacks=callbacks)
        loss = trainer.train().training_loss
        runs.append((loss, len(compiled)))
    (loss, graphs), (logged_loss, logged_graphs) = runs
    assert graphs == logged_graphs > 0
    assert logged_loss == pytest.approx(loss, rel=1e-4)
    assert len(logged) == 2 and logged[0]["adasplash/support"] >= 1


def test_logging_to_tensorboard(tmp_path):
    """What its event file holds."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers.integrations import TensorBoardCallback

    pytest.importorskip("torch.utils.tensorboard")
    options = dict(logging_steps=2, report_to=[], logging_strategy="steps")
    trainer = Trainer(small(), arguments(tmp_path, 4, **options), train_dataset=DATA)
    writer = torch.utils.tensorboard.SummaryWriter(tmp_path / "board")
    trainer.add_callback(TensorBoardCallback(writer))
    trainer.add_callback(LogAttention(trainer.log))
    trainer.train()
    writer.close()
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    logged = [entry for entry in trainer.state.log_history if "adasplash/support" in entry]
    names = [name for name in logged[0] if name.startswith("adasplash/")]
    assert "adasplash/layer_1/support" in names
    for name in names:
        (tag,) = (tag for tag in board.Tags()["scalars"] if tag.endswith(name))
        written = {event.step: event.value for event in board.Scalars(tag)}
        assert written == pytest.approx({entry["step"]: entry[name] for entry in logged})
