"""The parts of examples/length_generalisation and examples/language_modelling, and both at a tiny size."""

import importlib.util
import math
import random
import shlex
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import adasplash
from common import ROOT

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from model_stack import Attention, SelfAttention, Sizes, Stack, length_factor
from shared import results, style
from tasks import KEYS, NONE, SYMBOLS, TASKS

LENGTHS, LANGUAGE = ROOT / "examples/length_generalisation", ROOT / "examples/language_modelling"
pytestmark = pytest.mark.backends("cpu")


def program(folder, name):
    """A module of that name, which other examples have too."""
    spec = importlib.util.spec_from_file_location(f"{folder.name}.{name}", folder / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Length generalisation: tasks


def answers_of_maximum(tokens, sizes):
    return [tokens[max(range(end), key=lambda place: sizes[place])] for end in range(1, len(tokens) + 1)]


def answers_of_recall(tokens, sizes):
    pairs = len(tokens) // 2 - 8
    known = dict(zip(tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
    assert len(known) == pairs and max(known) < KEYS
    asked = tokens[2 * pairs :: 2]
    assert tokens[2 * pairs + 1 :: 2] == [known[key] for key in asked]
    return [NONE] * 2 * pairs + [answer for key in asked for answer in (known[key] - KEYS, NONE)]


def answers_of_copying(tokens, sizes):
    half = len(tokens) // 2
    assert tokens[half] == SYMBOLS and tokens[half + 1 :] == tokens[: half - 1]
    return [NONE] * half + tokens[:half]


@pytest.mark.parametrize(
    ("task", "answers"),
    (("maximum", answers_of_maximum), ("recall", answers_of_recall), ("copying", answers_of_copying)),
)
def test_answers_are_right(task, answers):
    for length in (32, 66):
        batch = TASKS[task].make((2, 3, length), generator(length))
        assert batch.tokens.shape == batch.answers.shape == (2, 3, length)
        assert batch.tokens.min() >= 0 and batch.tokens.max() < TASKS[task].inputs
        assert batch.answers.max() < TASKS[task].outputs
        for row in range(6):
            sizes = batch.sizes.flatten(0, 1)[row].tolist() if batch.sizes is not None else None
            expected = answers(batch.tokens.flatten(0, 1)[row].tolist(), sizes)
            assert batch.answers.flatten(0, 1)[row].tolist() == expected
        assert not torch.equal(batch.tokens[0], batch.tokens[1])


# Length generalisation: models


def test_the_factor_of_a_length():
    for beta, gamma, keys in ((0.3, -0.8, 1), (-2.0, 1.5, 64), (1.0, 0.2, 4096)):
        expected = 1 + math.log(1 + math.exp(beta)) * math.log(1 + keys) ** (2 * math.tanh(gamma))
        factor = length_factor(torch.tensor(beta), torch.tensor(gamma), torch.tensor(keys))
        assert factor.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("alpha", (1.0, 1.5))
def test_scaled_attention_is_what_the_formula_says(alpha):
    sizes, length = Sizes(layers=1, heads=4, width=16), 12
    layer = SelfAttention(1, sizes, Attention(alpha, scaled=True))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator())
    x = torch.randn(1, 2 * length, 16, generator=generator(1))
    given = layer(x, length).view(2, length, 16)
    beta_gamma = layer.beta_gamma(x).view(2, length, 2, 2)  # the last two: which of the two, heads
    query, key, value = layer.query_key_value(x).view(2, length, 3, 4, 4).unbind(2)
    mixed = torch.zeros(2, length, 4, 4)
    for row in range(2):
        for head in range(4):
            for place in range(length):
                scores = key[row, : place + 1, head] @ query[row, place, head] / 2
                if head < 2:
                    beta = layer.beta[0, head, 0, 0] + beta_gamma[row, place, 0, head]
                    scores = scores * length_factor(beta, beta_gamma[row, place, 1, head], torch.tensor(place + 1))
                else:
                    scores = scores - torch.arange(place, -1, -1) / (head - 1)  # slopes 1 and 1/2
                weights = scores.softmax(-1) if alpha == 1 else adasplash.entmax(scores, alpha)
                mixed[row, place, head] = weights @ value[row, : place + 1, head]
    torch.testing.assert_close(given, layer.output(mixed.view(1, -1, 16)).view(2, length, 16))


@pytest.mark.parametrize("attention", (Attention(1.0), Attention(1.5, learned=True, scaled=True)))
def test_models_of_a_stack_are_those_alone(attention):
    sizes = Sizes(layers=2, heads=2, width=8)
    both, alone = (Stack(10, 10, sizes, attention, seeds) for seeds in ([3, 5], [5]))
    batch = TASKS["maximum"].make((2, 3, 20), generator())
    logits = both(batch.tokens, batch.sizes)
    torch.testing.assert_close(logits[1:], alone(batch.tokens[1:], batch.sizes[1:]))
    assert not torch.allclose(logits[0], both(batch.tokens.flip(0), batch.sizes.flip(0))[1])
    compare = program(LENGTHS, "compare")
    compare.loss_of(both, batch).backward()
    F.cross_entropy(alone(batch.tokens[1:], batch.sizes[1:]).flatten(0, 2), batch.answers[1].flatten()).backward()
    for together, parameter in zip(both.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(together.grad.flatten()[-parameter.numel() :], parameter.grad.flatten())


def test_lengths_are_compared_and_drawn(tmp_path):
    compare, plot = program(LENGTHS, "compare"), program(LENGTHS, "plot")
    small = shlex.split(
        "--layers 1 --heads 2 --width 32 --batch 16 --rate 0.01 --sequences 64 --times 1 4 --steps 101 --seeds 0 7"
    )
    options = compare.options_of([*small, "--tasks", "maximum", "--attentions", "softmax", "learned-scaled"])
    results = compare.compare(options)
    assert [(each.attention, each.seed) for each in results] == [
        ("softmax", 0), ("softmax", 7), ("learned, scaled", 0), ("learned, scaled", 7)
    ]  # fmt: skip
    for each in results:
        assert each.metrics["length"] == [16, 64]
        assert each.metrics["losses"][-1] < each.metrics["losses"][0] and len(each.metrics["losses"]) == 6
        assert 0.3 < each.metrics["accuracy"][0] <= 1  # one in ten would be right by chance
    assert torch.tensor(results[-1].metrics["alpha"]).shape == (1, 2)
    compare.append(*results, folder=tmp_path)
    plot.draw(plot.read("length_generalisation", "cpu", tmp_path), tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_learned_alphas_are_drawn(tmp_path, monkeypatch):
    """Each as a dot where it is, in the row of its head."""
    plot = program(LENGTHS, "plot")
    kinds = (("learned", [[1.2, 1.4], [1.6, 1.8]]), ("learned, scaled", [[1.9, 1.9], [1.9, 1.9]]))
    rows = [
        results.Result("length_generalisation", "m", attention, 0, {"alpha": alpha}, setting={"task": "copying"})
        for attention, alpha in kinds
    ]
    results.append(*rows, folder=tmp_path)
    figures = []
    monkeypatch.setattr(style, "save", lambda figure, path: figures.append(figure))
    monkeypatch.setattr(sys, "argv", ["plot.py", "--alphas", "--results", str(tmp_path)])
    plot.main()
    (panel,) = figures[0].axes
    dots = [line.get_xydata().tolist() for line in panel.get_lines()[:-1]]  # the last is where α began
    assert [[alpha for alpha, _ in layer] for layer in dots] == [[1.2, 1.4], [1.6, 1.8]]
    heights = [height for layer in dots for _, height in layer]
    assert heights == sorted(heights) and len(set(heights)) == 4


def test_quick_options_give_way_to_what_is_said():
    compare = program(LENGTHS, "compare")
    assert compare.options_of(["--quick"]).seeds == [0]
    assert compare.options_of(["--quick", "--seeds", "4", "5"]).seeds == [4, 5]
    assert compare.options_of([]).tasks == list(TASKS)


# Language modelling

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def tokenizer():
    from byte_tokenizer import byte_tokenizer

    return byte_tokenizer(64)


def test_every_byte_is_a_token(tokenizer, tmp_path):
    every = [chr(code) for code in (*range(0x250), *range(0x2190, 0x2200), *range(0x1F600, 0x1F640))]
    texts = ["".join(random.Random(seed).choices(every, k=60)) for seed in range(20)]
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        assert len(each) == 256
        for text in (*texts, "a  b\t\r\n  c ,.", " "):
            tokens = each(text)["input_ids"]
            assert bytes(tokens) == text.encode()
            assert each.decode(tokens) == text


def test_windows_are_the_text(text, tmp_path):
    from token_windows import bytes_of_files

    texts = bytes_of_files(text, 64, with_packages=False)
    content = text.read_bytes()
    windows = texts.training
    assert len(windows) == 18_000 // 64
    for place in (0, 100, len(windows) - 1):
        item = windows[place]
        assert bytes(item["input_ids"].tolist()) == content[64 * place : 64 * place + 64]
        assert torch.equal(item["input_ids"], item["labels"])
    few = texts.held_out.spread(3)
    assert [bytes(few[place]["input_ids"].tolist()) for place in (0, 2)] == [
        content[18_000:18_064], content[18_000 + 64 * (len(texts.held_out) - 1) :][:64]
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A GPT-2 of each kind, trained for a few steps: the folder, and the rows of results."""
    compare, folder = program(LANGUAGE, "compare"), tmp_path_factory.mktemp("language")
    (folder / "text").write_bytes(b"".join(b"line %d of a text\n" % i for i in range(4000)))
    small = shlex.split("--context 64 --layers 2 --heads 2 --width 16 --steps 10 --every 5 --windows 4 --rate 0.01")
    paths = ["--data", str(folder / "text"), "--out", str(folder), "--results", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["compare.py", *small, *paths])
        compare.main()
    return folder, program(LANGUAGE, "plot").read("language_modelling", "cpu", folder)


def test_language_models_are_compared(trained):
    folder, results = trained
    assert [each.attention for each in results] == ["softmax", "entmax 1.5", "softmax to entmax 1.5"]
    for each in results:
        metrics = each.metrics
        assert metrics["steps"] == [0, 5, 10] and len(metrics["seconds"]) == 3
        assert metrics["held_out_loss"][-1] < metrics["held_out_loss"][0] - 0.5
        assert metrics["bits_a_byte"] == pytest.approx(metrics["held_out_loss"][-1] / math.log(2))
        assert metrics["seconds"] == sorted(metrics["seconds"]) and metrics["seconds"][0] == 0
    assert results[0].keys_a_query == 32.5 and 1 <= results[1].keys_a_query <= 32.5
    support = results[1].metrics["support_of_layers"]
    assert len(support) == 2 and {len(each) for each in support} == {len(results[1].metrics["recorded_steps"])}
    # From the same weights and batches: the first loss, before which attention is flat, differs little.
    first = [each.metrics["held_out_loss"][0] for each in results]
    assert first == pytest.approx(first[:1] * 3, abs=0.01)
    assert transformers.AutoConfig.from_pretrained(folder / "scheduled").adasplash_alpha == 1.5


def test_language_models_are_drawn(trained):
    folder, results = trained
    program(LANGUAGE, "plot").draw(results, folder / "language.png")
    assert (folder / "language.png").read_bytes().startswith(b"\x89PNG")


def test_a_saved_model_continues_a_text(trained):
    from continue_text import continue_text

    folder, _ = trained
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "entmax").eval()
    assert model.config._attn_implementation == "adasplash" and model.config.adasplash_alpha == 1.5
    tokens = transformers.AutoTokenizer.from_pretrained(folder / "entmax")
    prompt = "line 12 of"
    written = continue_text(model, tokens, prompt, 12)
    text = list(prompt.encode())
    with torch.no_grad():
        for _ in range(12):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    assert written == tokens.decode(text[len(prompt) :])


def test_what_is_exported_for_cpp_is_the_model(trained):
    from generate import export_program
    from serve_in_cpp import Logits

    folder, _ = trained
    logits = Logits(transformers.AutoModelForCausalLM.from_pretrained(folder / "entmax").eval())
    exported = export_program(logits)
    targets = [node.target for node in exported.graph.nodes]
    assert targets.count(torch.ops.adasplash.entmax_attn.default) == 2
    for length in (2, 17, 64):
        tokens = torch.randint(256, (1, length), generator=generator(length))
        torch.testing.assert_close(exported.module()(tokens), logits(tokens))
    with pytest.raises(ValueError, match="300 tokens"):
        Logits(transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1)))


class Column(list):
    """As `datasets` has them, in as far as it is needed here: a data set of one column."""

    def __getitem__(self, place):
        return list(self) if place == "text" else super().__getitem__(place)

    def train_test_split(self, test_size, shuffle):
        assert not shuffle
        end = len(self) - round(test_size * len(self))
        return {"train": Column(self[:end]), "test": Column(self[end:])}


def test_a_checkpoint_goes_on_with_a_data_set_of_the_hub(trained, tmp_path, monkeypatch, tokenizer):
    from token_windows import tokens_of_hub

    texts = [f"täxt {place}. " * 9 for place in range(100)]
    asked = []
    sets = {"train": Column(texts)}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *name: asked.append(name) or sets))
    loaded = tokens_of_hub("owner/name:part", 32, tokenizer)
    assert asked == [("owner/name", "part")] and loaded.bytes_a_token == 1
    first, held_out = (bytes(each[0]["input_ids"].tolist()) for each in (loaded.training, loaded.held_out))
    assert first == "".join(texts).encode()[:32] and held_out == "".join(texts[90:]).encode()[:32]
    sets["test"] = Column(texts[:3])
    assert bytes(tokens_of_hub("name", 32, tokenizer).held_out[0]["input_ids"].tolist()) == first

    compare = program(LANGUAGE, "compare")
    small = shlex.split("--data hub:name --attentions entmax --steps 8 --every 4 --context 64")
    options = compare.options_of([*small, "--model", str(trained[0] / "softmax"), "--out", str(tmp_path)])
    model = compare.build_model(options, compare.ATTENTIONS["entmax"])
    assert model.config.adasplash_alpha == 1
    before = model.state_dict()["transformer.wte.weight"].clone()
    softmax = transformers.AutoModelForCausalLM.from_pretrained(options.model)
    assert torch.equal(before, softmax.state_dict()["transformer.wte.weight"])
    trainer, _ = compare.train(model, compare.ATTENTIONS["entmax"], compare.load_texts(options), options)
    assert trainer.model.config.adasplash_alpha == 1.5, "the schedule did not get there"
    assert not torch.equal(before, model.state_dict()["transformer.wte.weight"])


def test_what_does_not_fit_a_checkpoint(trained):
    compare, checkpoint = program(LANGUAGE, "compare"), str(trained[0] / "softmax")
    with pytest.raises(ValueError, match="--model goes with --data hub:NAME"):
        compare.load_texts(compare.options_of(["--model", checkpoint, "--context", "64"]))
    with pytest.raises(ValueError, match=r"--context must be at most 64 for .*, got 1024"):
        compare.load_texts(compare.options_of(["--model", checkpoint, "--data", "hub:name"]))
