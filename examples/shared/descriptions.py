"""Descriptions of Debian's packages: a line and some paragraphs in English, and the section that each was put in."""

import argparse
import gzip
import hashlib
import json
import re
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared import debian

#: A paragraph that more sources share says what kind of package it is, not what it is about.
_MOST_SOURCES = 20
_LEAST_LETTERS = 80


@dataclass
class Description:
    """What a package says about itself."""

    package: str
    source: str  # the source package, of which several are built
    section: str
    short: str
    long: str  # paragraphs, with an empty line between


def join(packages: str, translations: str) -> list[Description]:
    """From two indices: sections stand in that of packages, long descriptions in that of translations."""
    known = {}
    for entry in debian.stanzas(packages):
        # Source may have a version behind it.
        source = entry.get("Source", entry["Package"]).split()[0]
        known[entry["Package"], entry.get("Description-md5")] = source, entry.get("Section", "")
    found = []
    for entry in debian.stanzas(translations):
        key = entry["Package"], entry["Description-md5"]
        if key in known:
            short, _, long = entry["Description-en"].partition("\n")
            paragraphs = re.split(r"^ \.$", long, flags=re.MULTILINE)
            long = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
            found.append(Description(key[0], *known[key], short.strip(), long.strip()))
    return found


def load(file: Path | None = None) -> list[Description]:
    """All descriptions of the release.

    Args:
        file: what `save` wrote, for a machine without network; else they are fetched once, and kept.
    """
    file = file or debian.cache_folder() / f"descriptions-{debian.RELEASE}.jsonl.gz"
    if not file.exists():
        source = debian.source()
        save(join(source.index(debian.PACKAGES), source.index(debian.DESCRIPTIONS)), file)
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [Description(**json.loads(line)) for line in lines]


def save(found: list[Description], file: Path) -> None:
    """Writes descriptions for `load`."""
    unfinished = file.with_suffix(".part")
    with gzip.open(unfinished, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in found)
    unfinished.replace(file)


def words(text: str) -> str:
    """A text as it is compared: numbers, signs and capitals make no difference."""
    return " ".join(re.findall(r"[^\W\d_]+", text.lower()))


def families(found: list[Description]) -> list[str]:
    """The family of each description. All packages of a source are of one, and all sources that share a paragraph
    which few have: gcc-11 and gcc-12. What is learned of one is known of the others, so a family is never split."""
    parents: dict[str, str] = {}

    def oldest(source: str) -> str:
        while parents.setdefault(source, source) != source:
            parents[source] = source = parents[parents[source]]
        return source

    sources_of = defaultdict(dict)
    for each in found:
        for paragraph in each.long.split("\n\n"):
            compared = words(paragraph)
            if len(compared) >= _LEAST_LETTERS:
                sources_of[compared][each.source] = True
    for sources in sources_of.values():
        if len(sources) <= _MOST_SOURCES:
            first, *others = sources
            for other in others:
                parents[oldest(other)] = oldest(first)
    return [oldest(each.source) for each in found]


def is_held_out(family: str, share: float) -> bool:
    """Whether a family is for tests: always the same ones, so that nothing ever trained on them."""
    number = int.from_bytes(hashlib.sha256(family.encode()).digest()[:8])
    return number < share * 2**64


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes all descriptions to a file, for a machine without network.")
    parser.add_argument("out", type=Path, help="such as descriptions.jsonl.gz; programs take it as --data")
    options = parser.parse_args()
    found = load()
    save(found, options.out)
    print(f"{len(found):,} descriptions: {options.out}")


if __name__ == "__main__":
    main()
