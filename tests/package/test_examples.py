"""The parts of examples/gpt: text, model, support, training, serving."""

import itertools
from pathlib import Path

import pytest
import torch

import adasplash
import pictures
import serve
import train
from cached import CachedGPT
from data import load_corpus
from engine import PAGE, Engine, continue_all, gaps_to_likeliest
from export import export_program, export_torchscript, load, shape_of
from generate import continue_greedily
from generate import export_program as export_program_of_tokens
from generate import gaps_to_likeliest as gaps_of_tokens
from key_indexes import check_entries
from model import GPT, GPTConfig
from shared import style
from support import attention_weights, mean_support, model_attention, sparsity
from train import KINDS, Checkpoint, evaluate

pytestmark = pytest.mark.backends("cpu")

SMALL = GPTConfig(layers=2, heads=2, width=32, context=64)
CPU = torch.device("cpu")


def small_model(attention="entmax", seed=0):
    torch.manual_seed(seed)
    config = GPTConfig(SMALL.layers, SMALL.heads, SMALL.width, SMALL.context, attention)
    return GPT(config).eval()


def tokens(batch=1, length=SMALL.context):
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(1))


# Text


def test_a_file_is_split_as_it_is(text):
    corpus = load_corpus(text, context=64)
    content = text.read_bytes()
    assert bytes(corpus.train.tolist()) == content[:18_000]
    assert bytes(corpus.validation.tolist()) == content[18_000:]


def test_a_folder_is_read_whole_but_for_binary_and_hidden_files(tmp_path):
    for i in range(50):
        (tmp_path / f"sub{i % 3}").mkdir(exist_ok=True)
        (tmp_path / f"sub{i % 3}" / f"file{i}").write_bytes(b"%02d" % i * 100)
    (tmp_path / ".hidden").write_bytes(b"h" * 500)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/config").write_bytes(b"g" * 500)
    (tmp_path / "binary").write_bytes(b"\0b" * 500)
    (tmp_path / "broken link").symlink_to(tmp_path / "nowhere")
    corpus = load_corpus(tmp_path, context=32)
    content = bytes(torch.cat((corpus.train, corpus.validation)).tolist())
    assert len(content) == 50 * 200 and set(content) <= set(b"0123456789")
    assert content != bytes(sorted(content)), "the files were not shuffled"
    again = load_corpus(tmp_path, context=32)
    assert torch.equal(corpus.train, again.train)


def test_the_standard_library_is_the_default():
    corpus = load_corpus(None, context=256, max_bytes=300_000)
    assert len(corpus.train) + len(corpus.validation) == 300_000
    assert b"import " in bytes(corpus.train.tolist())


def test_too_little_text_is_said_clearly(tmp_path):
    file = tmp_path / "short"
    file.write_bytes(b"x" * 2569)
    with pytest.raises(ValueError, match=r"too little text: .*short holds 2,569 bytes, but at least 2,570 are needed"):
        load_corpus(file, context=256)
    file.write_bytes(b"x" * 2570)
    corpus = load_corpus(file, context=256)
    assert corpus.validation_windows(8, 256)[0].shape == (1, 256)
    with pytest.raises(ValueError, match="holds 0 bytes"):
        (tmp_path / "empty").mkdir()
        load_corpus(tmp_path / "empty", context=256)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_corpus(tmp_path / "missing", context=256)


def test_batches_are_bytes_and_those_that_follow(text):
    corpus = load_corpus(text, context=64)
    for inputs, targets in (next(corpus.batches(5, 64, seed=3)), corpus.validation_windows(5, 64)):
        assert inputs.shape == targets.shape == (5, 64) and inputs.dtype == targets.dtype == torch.long
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(next(corpus.batches(5, 64, seed=3))[0], next(corpus.batches(5, 64, seed=3))[0])
    assert not torch.equal(next(corpus.batches(5, 64, seed=3))[0], next(corpus.batches(5, 64, seed=4))[0])


# Model


def test_default_size():
    config = GPTConfig()
    assert config.context >= 256
    assert 1_000_000 <= sum(p.numel() for p in GPT(config).parameters()) <= 2_000_000


@pytest.mark.parametrize(
    "wrong",
    (dict(attention="linear"), dict(alpha=1.0), dict(alpha=2.1), dict(width=130), dict(layers=0), dict(context=1)),
)
def test_wrong_configurations(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GPTConfig(**wrong)


@pytest.mark.parametrize("attention", KINDS)
def test_shapes_and_causality(attention):
    model = small_model(attention)
    x = tokens(3)
    logits = model(x)
    assert logits.shape == (3, SMALL.context, 256)
    changed = x.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 256
    after = model(changed)
    torch.testing.assert_close(after[:, :40], logits[:, :40])
    assert not torch.allclose(after[:, 40:], logits[:, 40:])
    for length in (1, 2, 17):
        torch.testing.assert_close(model(x[:, :length]), logits[:, :length], atol=1e-4, rtol=1e-4)


def test_the_switch_is_the_only_difference():
    entmax, softmax = small_model("entmax"), small_model("softmax")
    for a, b in zip(entmax.parameters(), softmax.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(entmax(tokens()), softmax(tokens()))


@pytest.mark.parametrize("attention", KINDS)
def test_export_equals_the_eager_model(attention):
    model = small_model(attention)
    program = export_program_of_tokens(model)
    nodes = [node.target for node in program.graph.nodes]
    assert nodes.count(torch.ops.adasplash.entmax_attn.default) == (SMALL.layers if attention == "entmax" else 0)
    for length in (2, 17, 33, SMALL.context):
        torch.testing.assert_close(program.module()(tokens(length=length)), model(tokens(length=length)))


PROMPTS = [b"a prompt of some length, which is more than a page", b"ab", bytes(range(100, 180)) * 2, b"\n\0\xff"]


def form_of(cached, form, folder):
    """The model as it is, or saved and loaded."""
    if form == "scripted":
        export_torchscript(cached, folder / "model.pt")
        return load(folder / "model.pt")
    return export_program(cached).module() if form == "exported" else cached


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("form", ("eager", "scripted", "exported"))
def test_the_cached_model_continues_as_the_model_does(attention, form, tmp_path):
    """As long as a text is within the context, and by gaps of nothing but rounding: the keys of a cache saw more of a
    longer one."""
    model = small_model(attention)
    cached = CachedGPT(model).eval()
    step = form_of(cached, form, tmp_path)
    for prompt, written in zip(PROMPTS, continue_all(step, shape_of(cached), PROMPTS, 9, "cpu"), strict=True):
        assert len(written) == 9
        assert max(gaps_to_likeliest(cached, shape_of(cached), prompt, written, "cpu")) < serve.TIE
        if len(prompt) + 9 <= SMALL.context:
            assert max(gaps_of_tokens(model, prompt, written, SMALL.context)) < serve.TIE
        wrong = bytes([written[0] ^ 1]) + written[1:]
        assert gaps_to_likeliest(cached, shape_of(cached), prompt, wrong, "cpu")[0] > serve.TIE


@pytest.mark.parametrize("form", ("eager", "scripted", "exported"))
def test_an_index_is_kept_and_changes_no_byte(form, tmp_path):
    """Pages are used again, and what is left in them has the entries that it should have."""
    pages, written = max(PAGE, *map(len, PROMPTS)) // PAGE + 2, []
    for indexed in (False, True):
        cached = CachedGPT(small_model(), indexed).eval()
        engine = Engine(form_of(cached, form, tmp_path), shape_of(cached), pages, 2)
        for number, prompt in enumerate(PROMPTS):
            engine.add(number, prompt, 9)
        written.append(list(engine.run()))
    assert written[0] == written[1]
    keys, _, indexes = engine.caches
    assert len(indexes) == SMALL.layers
    for cache, index in zip(keys, indexes, strict=True):
        slots = cache.flatten(0, 1).any(-1).all(-1).nonzero()[:, 0]
        assert len(slots) > len(PROMPTS[2])
        check_entries(index, cache, slots)


def test_requests_wait_for_pages_and_give_them_back():
    """With room for one or two at a time, each is written as it would be alone."""
    cached = CachedGPT(small_model()).eval()
    shape, most = shape_of(cached), max(map(len, PROMPTS)) + 9
    engine = Engine(cached, shape, -(-most // PAGE), 2, "cpu")
    for number, prompt in enumerate(PROMPTS):
        engine.add(number, prompt, 9)
    written = [bytearray() for _ in PROMPTS]
    for number, byte in engine.run():
        written[number].append(byte)
        assert len(engine.running) <= 2
    assert sorted(engine.free) == list(range(engine.width))
    for prompt, text in zip(PROMPTS, written, strict=True):
        assert max(gaps_to_likeliest(cached, shape, prompt, bytes(text), "cpu")) < serve.TIE
    with pytest.raises(ValueError, match="needs more pages than the cache has"):
        engine.add(9, bytes(range(1, 200)), 9)
    with pytest.raises(ValueError, match="a prompt and a count"):
        engine.add(9, b"", 9)


# Support


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_weights_are_those_of_the_operator(alpha):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 70, 16) * scale for scale in (2, 2, 1))
    weights = attention_weights(query, key, value, alpha)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 70))
    torch.testing.assert_close(weights @ value, adasplash.entmax_attn(query, key, value, alpha, True))
    assert torch.equal(weights.triu(1), torch.zeros_like(weights))
    assert 0.3 < (weights == 0).tril().sum() / torch.ones_like(weights).tril().sum() < 1


def test_support_counts_keys_with_weight():
    model = small_model()
    weights = model_attention(model, tokens(2))
    assert [w.shape for w in weights] == [(2, SMALL.heads, SMALL.context, SMALL.context)] * SMALL.layers
    softmax = model_attention(small_model("softmax"), tokens(2))
    assert softmax[0].shape == weights[0].shape
    assert torch.equal(softmax[0] > 0, torch.ones_like(softmax[0], dtype=torch.bool).tril())
    above = mean_support(small_model("softmax"), tokens(2), above=0.02)
    assert above[0, 1] == (softmax[0][:, 1] > 0.02).sum() / (2 * SMALL.context)
    support = mean_support(model, tokens(2))
    assert support.shape == (SMALL.layers, SMALL.heads)
    assert support[1, 1] == (weights[1][:, 1] > 0).sum() / (2 * SMALL.context)
    visible = SMALL.context * (SMALL.context + 1) / 2
    zeros = sum(visible - (w > 0).sum(-1).sum(-1).double().mean() for w in weights) / (SMALL.layers * visible)
    assert sparsity(support, SMALL.context) == pytest.approx(zeros.item())
    assert not model.blocks[0].attention._forward_pre_hooks


# Training


def test_training_is_side_by_side_and_repeatable(text, tmp_path):
    corpus = load_corpus(text, SMALL.context)
    first, second = (
        train.train(corpus, SMALL, device=CPU, steps=25, minutes=None, batch=2, measure_every=10) for _ in range(2)
    )
    history = first.history
    assert history.steps == 25 and history.measured_steps == [0, 10, 20, 25]
    assert {len(x) for x in history.loss.values()} == {25} == {len(x) for x in history.seconds.values()}
    assert history.loss == second.history.loss
    windows = corpus.validation_windows(8, SMALL.context)
    for kind in KINDS:
        assert history.loss[kind][-1] < history.loss[kind][0] - 0.5
        assert evaluate(first.models[kind], windows) == pytest.approx(history.measured_loss[kind][-1])

    first.save(tmp_path / "gpt.pt")
    loaded = Checkpoint.load(tmp_path / "gpt.pt")
    assert loaded.config == SMALL and loaded.history.loss == history.loss
    for kind in KINDS:
        assert torch.equal(loaded.models[kind](tokens()), first.models[kind](tokens()))
    noticed = mean_support(first.models["softmax"], windows[0][:2], above=train.NOTICEABLE)
    torch.testing.assert_close(history.measured_noticeable[-1], noticed)
    for picture in pictures.draw_all(loaded, b"a passage\n\0\xff of bytes", tmp_path):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_pictures_by_their_names(tmp_path, monkeypatch):
    """Those that are asked for, of the layer and head that are asked for."""
    models = {kind: small_model(kind) for kind in KINDS}
    Checkpoint(SMALL, models, train.History()).save(tmp_path / "gpt.pt")
    (tmp_path / "passage").write_bytes(b"some bytes of a passage")
    figures = {}
    monkeypatch.setattr(style, "save", lambda figure, path: figures.update({path.name: figure}))
    chosen = ["--only", "heads", "zeros", "--layer", "1", "--head", "2"]
    pictures.main([str(tmp_path / "gpt.pt"), str(tmp_path / "passage"), "--out", str(tmp_path), *chosen])
    assert list(figures) == ["heads.png", "zeros.png"]
    panels = [axes for axes in figures["heads.png"].axes if axes.get_title(loc="left")]
    assert len(panels) == 2 * SMALL.heads and "layer 1 of 2" in figures["heads.png"].get_suptitle()
    weights = model_attention(models["entmax"], torch.tensor([list(b"some bytes of a passage")]))[0][0, 1]
    drawn = figures["zeros.png"].axes[1].get_images()[1].get_array()
    assert (drawn.mask == (weights == 0).numpy()).all()
    assert torch.equal(torch.from_numpy(drawn.filled(0)), weights)


def test_minutes_end_training(text, monkeypatch):
    """By a clock that goes on by a second whenever somebody looks at it."""
    clock = itertools.count()
    monkeypatch.setattr(train.time, "perf_counter", lambda: float(next(clock)))
    corpus = load_corpus(text, SMALL.context)
    history = train.train(corpus, SMALL, device=CPU, steps=10**9, minutes=1, batch=2).history
    looks_a_step = 5  # two for each of the models, and one for the budget
    assert history.steps == 60 // looks_a_step


# Serving


def test_greedy_continuation_sees_the_last_context_bytes():
    model = small_model()
    prompt = bytes(range(100, 180))
    written = continue_greedily(model, prompt, 5, model.context)
    assert written[:1] == bytes([model(torch.tensor([list(prompt[-model.context :])]))[0, -1].argmax()])
    assert written == continue_greedily(model, prompt, 2, model.context) + written[2:]
    assert gaps_of_tokens(model, prompt, written, model.context) == [0] * 5
    wrong = bytes([written[0] ^ 1]) + written[1:]
    assert gaps_of_tokens(model, prompt, wrong, model.context)[0] > 0


class Alternate(torch.nn.Module):
    """A cached model of no layers that takes turns between two bytes, whose logits are `gap` apart: the second is the
    better by it."""

    layers, heads, head_size, indexed = 0, 1, 1, False

    def __init__(self, gap):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(256))
        self.logits.data[[65, 66]] = torch.tensor([10.0, 10.0 + gap])

    def forward(self, tokens, *rest):
        return self.logits.expand(len(tokens), 256)


def test_disagreement_fails_loudly_and_ties_are_told(monkeypatch):
    def verify(written, python, eager_model):
        monkeypatch.setattr(serve, "run_in_cpp", lambda *_: written)
        monkeypatch.setattr(serve, "load", lambda _: Alternate(python))
        eager = continue_all(eager_model, shape_of(eager_model), [b"prompt"], 4, "cpu")
        return serve.verify(Path("program"), Path("model.pt"), eager_model, [b"prompt"], 4, eager)[0]

    assert verify(b"BBBB", 1.0, Alternate(1.0)) == serve.Verdict(b"BBBB", 0)
    for written in (b"BBBA", b"BBB", b"BBBBB", b""):
        with pytest.raises(serve.Mismatch, match="differently from byte"):
            verify(written, 1.0, Alternate(1.0))
    with pytest.raises(serve.Mismatch, match="logit in the eager model is 1"):
        verify(b"AAAA", -1.0, Alternate(1.0))
    tie = verify(b"AAAA", -1e-5, Alternate(1e-5))
    assert tie == serve.Verdict(b"AAAA", 4) and "tie" in str(tie)
    served = Path("program"), Path("model.pt"), [b"prompt"], 4
    serve.verify_index(*served, [tie])
    with pytest.raises(serve.Mismatch, match="differently than without an index from byte 3"):
        serve.verify_index(*served, [serve.Verdict(b"AAAB", 0)])
