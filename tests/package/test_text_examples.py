"""The parts of examples/shared, examples/classification and examples/retrieval: data, results, and tiny trainings."""

import gzip
import hashlib
import io
import lzma
import random
import shutil
import subprocess
import sys
import tarfile

import pytest
import torch

import adasplash
from common import ROOT

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import labelled_texts
import pairs
import report
import train_classifier
from shared import debian, descriptions, results, table
from shared.descriptions import Description

pytestmark = pytest.mark.backends("cpu")

WORDS = {
    "games": ["play", "level", "score", "puzzle", "player", "board", "monster", "castle", "sword", "arcade"],
    "net": ["server", "packet", "router", "protocol", "socket", "address", "firewall", "proxy", "client", "host"],
    "sound": ["audio", "music", "synthesizer", "note", "mixer", "sample", "tempo", "guitar", "song", "volume"],
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def made_up(count=120):
    """Descriptions of which a model can learn the section; their fourth words differ for all of them."""
    draw, found = random.Random(0), []
    for section, words in WORDS.items():
        for number in range(count):
            name = f"{section}-{LETTERS[number // 26]}{LETTERS[number % 26]}"
            about = draw.choices(words, k=12)
            long = f"this package called {name.replace('-', '')} is about " + " ".join(about)
            short = f"{' '.join(about[:4])} of {name}"
            found.append(Description(name, name, section, short, long))
    return found


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("ADASPLASH_DATA", str(tmp_path / "cache"))
    descriptions.save(made_up(), tmp_path / "descriptions.jsonl.gz")
    return tmp_path / "descriptions.jsonl.gz"


# Results


def test_a_later_row_takes_the_place_of_an_earlier_one(tmp_path):
    def row(seed, accuracy, **setting):
        return results.Result("some", "model", "softmax", seed, {"accuracy": accuracy}, setting=setting)

    assert results.read("some", "cpu", tmp_path) == []
    results.append(row(0, 0.1), row(1, 0.2), row(0, 0.3, length=8), folder=tmp_path)
    (path,) = results.append(row(0, 0.4), folder=tmp_path)
    assert path.name == "some-cpu.jsonl" and len(path.read_text().splitlines()) == 3
    read = results.read("some", torch.device("cpu"), tmp_path)
    assert [(each.seed, each.metrics["accuracy"]) for each in read] == [(0, 0.4), (1, 0.2), (0, 0.3)]
    assert read[0] == row(0, 0.4) and read[0].versions["torch"] == torch.__version__
    assert "2 threads" in results.device_name("cpu").replace(str(torch.get_num_threads()), "2")


def test_a_table_has_means_over_seeds():
    rows = [
        results.Result("some", "model", "softmax", seed, {"accuracy": value}, seconds_a_step=0.01, keys_a_query=7.0)
        for seed, value in enumerate((0.5, 0.7))
    ]
    rows.append(results.Result("some", "model", "learned", 0, {"accuracy": 0.9, "loss": 1.0}))
    lines = table.table(rows, {"accuracy": ".1%", "loss": ".2f"}).splitlines()
    assert lines[2] == "| model | softmax | 60.0% ± 14.1% | – | 10.0 ± 0.0 | 7.0 ± 0.0 | 2 |"
    assert lines[3] == "| model | learned | 90.0% | 1.00 | – | – | 1 |"


def test_lines_are_of_one_setting_and_columns_have_something():
    rows = [results.Result("some", "model", "softmax", 0, {"a_b": n}, setting={"steps": n}) for n in (1, 2)]
    assert table.table(rows, {"a_b": "d", "c": ".1%"}).splitlines() == [
        "| model | attention | a b | seeds |",
        "| --- | --- | ---: | ---: |",
        "| model | softmax | 1 | 1 |",
        "| model | softmax | 2 | 1 |",
    ]


def test_a_report_writes_blocks_and_pictures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    made = dict(seed=0, command="python a.py --quick --out /some/folder", commit="abc", date="2026-01-01")
    setting = {"task": "copying", "trained_length": 1000}
    metrics = {"length": [1000, 2000], "accuracy": [1.0, 0.25], "losses": [1.0]}
    row = results.Result("length_generalisation", "m", "softmax", metrics=metrics, setting=setting, **made)
    results.append(row, folder=tmp_path)
    page = tmp_path / "models.md"
    page.write_text("".join(f"<!-- results:{n} -->\n<!-- /results:{n} -->\nafter\n" for n in report.EXPERIMENTS))
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "PICTURES", tmp_path / "images")
    monkeypatch.setattr(sys, "argv", ["report.py", "--write", "--results", str(tmp_path)])
    report.main()
    written = page.read_text()
    assert "\n### On a CPU\n\n*task copying; trained length 1,000; seed 0*\n" in written
    assert "(images/length_generalisation.png)" in written
    assert (tmp_path / "images/length_generalisation.png").stat().st_size > 1000
    assert "| m | softmax | 100.0% | 25.0% | 1 |" in written and "| 1,000 | 2,000 | seeds |" in written
    assert "```sh\npython a.py --quick\n```" in written and "2026-01-01 (commit abc):" in written
    assert written.count("after") == len(report.EXPERIMENTS) and written.count("No results yet.") == 3
    report.main()
    assert page.read_text() == written, "a second time, something was added"


@pytest.mark.parametrize("name", report.EXPERIMENTS)
def test_the_page_of_models_says_what_the_rows_say(name):
    block = report.PAGE.read_text().partition(f"<!-- results:{name} -->")[2].partition(f"<!-- /results:{name} -->")[0]
    for device in report.DEVICES:
        rows = results.read(name, device)
        assert not rows or report.tables(name, rows) in block, "python examples/report.py --write was not run"


# Debian

PACKAGES = """Package: one
Source: several (1.2)
Section: games
Description-md5: aa
Filename: pool/one.deb
SHA256: {sha}
Depends: x,
 y

Package: other
Section: net
Description-md5: bb
Filename: pool/one.deb
SHA256: wrong
"""
TRANSLATIONS = """Package: one
Description-md5: aa
Description-en: A line: of it
 First paragraph that
 goes on.
 .
 Second.

Package: other
Description-md5: of another version
Description-en: Not this one
 Text.
"""


def test_descriptions_are_joined_from_two_indices():
    assert next(debian.stanzas(PACKAGES))["Depends"] == "x,\n y"
    (found,) = descriptions.join(PACKAGES, TRANSLATIONS)
    assert found == Description("one", "several", "games", "A line: of it", "First paragraph that goes on.\n\nSecond.")


def package_with(path, content):
    """A .deb by hand: an ar archive of members with even lengths."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as archive:
        entry = tarfile.TarInfo(path)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    control = io.BytesIO()
    with tarfile.open(fileobj=control, mode="w:xz"):
        pass
    deb = b"!<arch>\n"
    members = (("debian-binary", b"2.0\n"), ("control.tar.xz", control.getvalue()), ("data.tar.xz", inner.getvalue()))
    for name, data in members:
        deb += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return deb


@pytest.mark.parametrize("with_dpkg", (True, False))
def test_a_package_comes_from_a_mirror_without_apt(with_dpkg, tmp_path, monkeypatch):
    if with_dpkg and shutil.which("dpkg-deb") is None:
        pytest.skip("no dpkg-deb here")
    deb = package_with("./usr/share/text", b"words" * 7)
    mirror = tmp_path / "mirror"
    indices = mirror / f"dists/{debian.RELEASE}/main"
    for name in (debian.PACKAGES, debian.DESCRIPTIONS):
        (indices / name).parent.mkdir(parents=True)
    index = PACKAGES.format(sha=hashlib.sha256(deb).hexdigest())
    (indices / f"{debian.PACKAGES}.xz").write_bytes(lzma.compress(index.encode()))
    (indices / f"{debian.DESCRIPTIONS}.xz").write_bytes(lzma.compress(TRANSLATIONS.encode()))
    (mirror / "pool").mkdir()
    (mirror / "pool/one.deb").write_bytes(deb)

    monkeypatch.setenv("ADASPLASH_DATA", str(tmp_path / "cache"))
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: which(name) if with_dpkg and name == "dpkg-deb" else None)
    monkeypatch.setattr(debian, "MIRROR", mirror.as_uri())
    folder = debian.unpack("one")
    assert (folder / "usr/share/text").read_bytes() == b"words" * 7
    shutil.rmtree(mirror / "pool")
    assert debian.unpack("one") == folder, "what is there was fetched again"
    (mirror / "pool").mkdir()
    (mirror / "pool/one.deb").write_bytes(deb)
    with pytest.raises(OSError, match="not what the index says"):
        debian.source().package("other")
    with pytest.raises(LookupError, match="no package 'third'"):
        debian.source().package("third")
    assert [each.package for each in descriptions.load()] == ["one"]
    assert (tmp_path / "cache" / f"descriptions-{debian.RELEASE}.jsonl.gz").exists()


def test_families_are_sources_that_share_a_paragraph():
    paragraph = "the compiler collection version {} translates programs of many languages into code for many machines"
    found = [
        Description("gcc-1", "gcc-1", "devel", "", paragraph.format(1)),
        Description("gcc-2", "gcc-2", "devel", "", "Another.\n\n" + paragraph.format(2)),
        Description("gcc-2-doc", "gcc-2", "doc", "", "Manuals."),
        Description("other", "other", "doc", "", "Manuals."),  # too short to tell
    ]
    first, second, manual, other = descriptions.families(found)
    assert first == second == manual != other
    boilerplate = "this sentence of no meaning stands in what every package of a certain language says about itself"
    many = [Description(f"p{n}", f"p{n}", "perl", "", boilerplate) for n in range(descriptions._MOST_SOURCES + 1)]
    assert len(set(descriptions.families(many))) == len(many)
    share = sum(descriptions.is_held_out(str(number), 0.2) for number in range(2000)) / 2000
    assert 0.17 < share < 0.23


def test_texts_have_classes_and_no_kin_in_training(file):
    found = made_up()
    twin = Description("twin", "games-aa", "games", "", found[0].long + " ??? 42")
    small = Description("small", "small", "tiny", "", "A section of one text.")
    symbols = [Description(f"s{n}", f"s{n}", "debug", "", f"symbols {LETTERS[n // 26]}{n % 26}") for n in range(120)]
    descriptions.save([*found, twin, small, *symbols], file)
    texts = labelled_texts.load(str(file))
    assert texts.classes == ["games", "net", "sound"]
    everything = [text for text, _ in texts.train + texts.test]
    assert len(everything) == 360 and twin.long not in everything
    assert 15 < len(texts.test) < 70 and 1 / 3 <= texts.chance < 0.6
    by_text = {each.long: each for each in found}
    assert all(texts.classes[label] == by_text[text].section for text, label in texts.train)
    part = texts.part(10, 5)
    assert (len(part.train), len(part.test)) == (10, 5) and part == texts.part(10, 5)


# Retrieval's data


def test_a_dictionary_is_read_by_its_index(tmp_path):
    first = "Aloha\n\n   <network> A {system} of\n   contention. (1999-01-02)\n"
    second = "B\n\n   Short.\n"
    content = ("x" * 70 + first + second).encode()
    # 70 is BG in base 64
    index = f"00-database-info\tA\tBG\nb\t{written(70 + len(first))}\t{written(len(second))}\n"
    index += f"aloha\tBG\t{written(len(first))}\nalohanet\tBG\t{written(len(first))}\n"
    entries = pairs.dictionary(index, content)
    assert entries == [("B", "Short."), ("Aloha", "<network> A system of contention.")]


def written(number):
    digits = ""
    while number:
        digits, number = pairs._DIGITS[number % 64] + digits, number // 64
    return digits


def test_pairs_are_split_and_queries_have_one_answer(file, tmp_path):
    loaded = pairs.load("descriptions", file)
    queries = [query for query, _ in loaded.train + loaded.test]
    assert len(set(queries)) == len(queries) == 360 and 40 < len(loaded.test) < 110
    lines = "".join(
        f'{{"term": "{term}", "text": "{"word " * count}"}}\n'
        for term, count in (("A", 9), ("a", 20), ("B", 8), ("C", 2))
    )
    (tmp_path / "foldoc.gz").write_bytes(gzip.compress(lines.encode()))
    loaded = pairs.load("foldoc", tmp_path / "foldoc.gz")
    assert sorted(query for query, _ in loaded.train + loaded.test) == ["A", "B"]
    with pytest.raises(ValueError, match="data must be descriptions, foldoc or hub:NAME, got 'else'"):
        pairs.load("else")


def test_data_sets_of_the_hub(tmp_path, monkeypatch):
    """By the same call as one of the hub, one in a folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [("first text", "b"), ("second text", "a"), ("third text", "b")]
    for split, part in (("train", rows), ("test", rows[:1])):
        lines = "".join(f'{{"said": "{text}", "kind": "{kind}"}}\n' for text, kind in part)
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / f"set/{split}.jsonl").write_text(lines)
    name = f"hub:{tmp_path / 'set'}"
    texts = labelled_texts.load(name, "said", "kind")
    assert texts.classes == ["a", "b"] and texts.test == [("first text", 1)]
    assert texts.train == [("first text", 1), ("second text", 0), ("third text", 1)]
    loaded = pairs.load(name, columns=("kind", "said"))
    assert loaded.test == [("b", "first text")] and len(loaded.train) == 3


# Trainings

SMALL = {"layers": 2, "heads": 2, "width": 32, "length": 24, "vocabulary": 400, "batch": 16, "learning-rate": 5e-3}


def options_of(**options):
    """As a command line has them."""
    parts = []
    for name, value in options.items():
        parts += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return parts


@pytest.mark.builds
def test_classifiers_learn_with_every_attention(file, tmp_path, monkeypatch):
    """The same texts in the same order for all, well over chance with each, and a picture of one."""
    pytest.importorskip("matplotlib")
    batches = []
    collate = train_classifier.DataCollatorWithPadding.__call__

    def collate_and_keep(self, features):
        batch = collate(self, features)
        batches[-1].append(batch["input_ids"])
        return batch

    train = train_classifier.train

    def train_and_keep(*arguments):
        batches.append([])
        return train(*arguments)

    monkeypatch.setattr(train_classifier.DataCollatorWithPadding, "__call__", collate_and_keep)
    monkeypatch.setattr(train_classifier, "train", train_and_keep)
    chosen = options_of(
        **SMALL,
        data=file,
        epochs=3,
        seeds=1,
        attention=("softmax", "entmax", "learned", "scheduled"),
        results=tmp_path / "rows",
        save=tmp_path / "saved",
    )
    options = train_classifier.parse(["--quick", *chosen])
    rows = train_classifier.run(labelled_texts.load(options.data), options)
    assert [row.attention for row in rows] == ["softmax", "entmax 1.5", "learned", "softmax → entmax 1.5"] * 2
    assert len(batches) == 8
    for half in (batches[:4], batches[4:]):
        assert all(torch.equal(a, b) for other in half[1:] for a, b in zip(half[0], other, strict=True))
    read = results.read("classification", "cpu", tmp_path / "rows")
    assert [row.key for row in read] == [row.key for row in rows] and len(read) == 8
    for row in rows:
        assert row.metrics["accuracy"] > 0.6, (row.model, row.attention, row.metrics)
        assert row.seconds_a_step > 0 and 1 <= row.keys_a_query <= options.length
        assert row.setting["form"] == "quick" and row.setting["classes"] == 3
    for row in rows[1], rows[5]:
        assert row.keys_a_query < rows[0].keys_a_query - 1
    learned = rows[2].metrics
    assert 1.05 < learned["alpha least"] < learned["alpha most"] < 2
    assert learned["alpha most"] - learned["alpha least"] > 0.1, "α was hardly learned"

    import classifiers
    import picture

    model, tokenizer = classifiers.load(str(tmp_path / "saved/roberta-entmax-1"))
    ids = tokenizer(made_up()[0].long, return_tensors="pt", truncation=True).input_ids
    softmax, entmax = picture.weights_of(model, ids, layer=1)
    assert softmax.min() > 0 and (entmax == 0).any()
    torch.testing.assert_close(adasplash.entmax15(softmax.log()), entmax, atol=1e-4, rtol=1e-3)
    pieces = picture.pieces_of(ids[0].tolist(), tokenizer)
    assert "".join(pieces[1:-1]).strip().startswith("this package called")
    picture.main([str(tmp_path / "saved/modernbert-learned-1"), made_up()[0].long, "--out", str(tmp_path / "head.png")])
    assert (tmp_path / "head.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="has softmax"):
        picture.main([str(tmp_path / "saved/roberta-softmax-1"), "text"])


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_is_taken_to_entmax(file, tmp_path):
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("datasets")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    import train_retriever

    folder = tmp_path / "bert"
    words = sorted({word for each in made_up() for word in f"{each.short} {each.long}".replace("-", " ").split()})
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "-", *words]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    encoder = SentenceTransformer(modules=[Transformer(str(folder)), Pooling(32)])
    encoder.save(str(tmp_path / "encoder"))

    chosen = options_of(
        file=file,
        model=tmp_path / "encoder",
        epochs=2,
        learning_rate=5e-3,
        attention=("softmax", "scheduled", "entmax"),
        results=tmp_path / "rows",
        save=tmp_path / "saved",
    )
    options = train_retriever.parse(["--quick", *chosen])
    loaded = pairs.load(options.data, options.file).part(options.train_pairs, 50)
    rows = train_retriever.run(loaded, options)
    assert [(row.model, row.attention) for row in rows] == [
        ("encoder", "softmax"),
        ("encoder", "entmax 1.5"),
        ("encoder", "entmax 1.25, scores halved"),
        ("encoder, fine-tuned", "softmax"),
        ("encoder, fine-tuned", "softmax → entmax 1.5"),
        ("encoder, fine-tuned", "entmax 1.5"),
    ]
    for row in rows[3:]:
        assert row.metrics["MRR@10"] > rows[0].metrics["MRR@10"] + 0.05
    assert all(0 <= row.metrics["recall@1"] <= row.metrics["MRR@10"] <= row.metrics["recall@10"] <= 1 for row in rows)
    assert rows[4].keys_a_query < rows[3].keys_a_query
    saved = train_retriever.build(str(tmp_path / "saved/scheduled-0"), 48, torch.device("cpu"), None)
    assert saved[0].auto_model.config.adasplash_alpha == 1.5


@pytest.mark.parametrize("program", ("classification/train_classifier", "shared/descriptions", "retrieval/pairs"))
def test_programs_say_what_they_take(program, tmp_path):
    command = [sys.executable, str(ROOT / f"examples/{program}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
