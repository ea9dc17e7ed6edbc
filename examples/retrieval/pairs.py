"""Queries with the document that answers each: from Debian's descriptions, the dictionary FOLDOC, or the hub."""

import argparse
import gzip
import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared import debian, descriptions

_HELD_OUT = 0.2
#: What is shorter refers to another entry.
_LEAST_WORDS = 8


@dataclass
class Pairs:
    """(query, document) to train on, and others held out."""

    name: str
    train: list[tuple[str, str]]
    test: list[tuple[str, str]]

    def part(self, train: int | None, test: int | None) -> "Pairs":
        """At most so many of each, always the same ones."""
        return Pairs(self.name, _some(self.train, train), _some(self.test, test))


def load(data: str, file: Path | None = None, columns: tuple[str, str] = ("query", "document")) -> Pairs:
    """Pairs of a source.

    Args:
        data: "descriptions", "foldoc", or "hub:NAME" for a data set with splits "train" and "test".
        file: with the first two, for a machine without network: what shared/descriptions.py or this program wrote.
        columns: of a data set, query and document.
    """
    if data == "descriptions":
        return from_descriptions(descriptions.load(file))
    if data == "foldoc":
        return from_entries("FOLDOC", _load_entries(file) if file else foldoc())
    if data.startswith("hub:"):
        from datasets import load_dataset  # needed for this only

        loaded = load_dataset(data.removeprefix("hub:"))
        splits = (list(zip(*(loaded[split][c] for c in columns), strict=True)) for split in ("train", "test"))
        return Pairs(data.removeprefix("hub:"), *splits)
    raise ValueError(f"data must be descriptions, foldoc or hub:NAME, got {data!r}")


def from_descriptions(found: list[descriptions.Description]) -> Pairs:
    """A package's line as the query and its paragraphs as the document, one package of each family."""
    kept = {}
    for each, family in zip(found, descriptions.families(found), strict=True):
        if len(each.long.split()) >= _LEAST_WORDS:
            kept.setdefault(family, (each.short, each.long))
    return _split("Debian descriptions", list(kept.items()))


def from_entries(name: str, entries: list[tuple[str, str]]) -> Pairs:
    """Terms as queries and their definitions as documents."""
    return _split(name, [(term, (term, text)) for term, text in entries if len(text.split()) >= _LEAST_WORDS])


def _split(name: str, keyed: list[tuple[str, tuple[str, str]]]) -> Pairs:
    """By keys. Queries that were met before are left out: each has one answer."""
    seen, parts = set(), {True: [], False: []}
    for key, (query, document) in keyed:
        compared = query.lower()
        if compared not in seen:
            seen.add(compared)
            parts[descriptions.is_held_out(key, _HELD_OUT)].append((query, document))
    return Pairs(name, parts[False], parts[True])


def foldoc() -> list[tuple[str, str]]:
    """Terms and definitions of the Free On-line Dictionary of Computing, out of Debian's package dict-foldoc."""
    folder = debian.unpack("dict-foldoc") / "usr/share/dictd"
    content = gzip.decompress((folder / "foldoc.dict.dz").read_bytes())
    return dictionary((folder / "foldoc.index").read_text("utf-8"), content)


def dictionary(index: str, content: bytes) -> list[tuple[str, str]]:
    """The entries of a dictionary in dictd's form.

    Args:
        index: lines of a term, where its text begins and how long it is, both in base 64.
        content: all texts. Each begins with its headword, which is the term here; the braces of cross-references and
            the dates go.
    """
    places = {}
    for line in index.splitlines():
        term, start, length = line.split("\t")[:3]
        if not term.startswith("00-database"):  # the dictionary about itself
            places[_number(start)] = _number(length)
    entries = []
    for start, length in places.items():
        headword, _, text = content[start : start + length].decode("utf-8", "replace").partition("\n")
        text = re.sub(r"\(\d{4}-\d\d-\d\d\)", "", text).replace("{", "").replace("}", "")
        entries.append((headword.strip(), " ".join(text.split())))
    return entries


_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def _number(written: str) -> int:
    number = 0
    for digit in written:
        number = 64 * number + _DIGITS.index(digit)
    return number


def _load_entries(file: Path) -> list[tuple[str, str]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [(entry["term"], entry["text"]) for entry in map(json.loads, lines)]


def _some(pairs: list, most: int | None) -> list:
    return pairs if most is None or most >= len(pairs) else random.Random(0).sample(pairs, most)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes FOLDOC to a file, for a machine without network.")
    parser.add_argument("out", type=Path, help="such as foldoc.jsonl.gz; train_retriever.py takes it as --file")
    options = parser.parse_args()
    with gzip.open(options.out, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps({"term": term, "text": text}, ensure_ascii=False) + "\n" for term, text in foldoc())
    print(options.out)


if __name__ == "__main__":
    main()
