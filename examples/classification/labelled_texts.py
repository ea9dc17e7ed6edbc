"""Texts with classes: descriptions of Debian's packages and their sections, or a data set of the Hugging Face hub."""

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from shared import descriptions

#: Sections that say what a package is for the others (symbols, names of old, bundles, translations), not its subject.
_NO_SUBJECT = ("debug", "oldlibs", "metapackages", "localization")
#: Sections with fewer texts are left out.
_LEAST_TEXTS = 100
_HELD_OUT = 0.1


@dataclass
class LabelledTexts:
    """Texts to train on and texts held out, each with the number of its class."""

    name: str
    classes: list[str]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]

    def part(self, train: int | None, test: int | None) -> "LabelledTexts":
        """At most so many of each, always the same ones."""
        return LabelledTexts(self.name, self.classes, _some(self.train, train), _some(self.test, test))

    @property
    def chance(self) -> float:
        """The accuracy of whoever always says the most frequent class."""
        return Counter(label for _, label in self.test).most_common(1)[0][1] / len(self.test)


def load(data: str | None, text_column: str = "text", label_column: str = "label") -> LabelledTexts:
    """Texts of a source.

    Args:
        data: "hub:NAME" for a data set of the hub, with splits "train" and "test"; else a file of descriptions for a
            machine without network, or None to fetch them.
        text_column, label_column: of a data set.
    """
    if data is not None and data.startswith("hub:"):
        return from_hub(data.removeprefix("hub:"), text_column, label_column)
    return from_descriptions(descriptions.load(Path(data) if data else None))


def from_descriptions(found: list[descriptions.Description], least: int = _LEAST_TEXTS) -> LabelledTexts:
    """Long descriptions and sections. Of those that only numbers or signs tell apart one is kept, and a family is held
    out whole: a text's kin is not in training."""
    distinct = list({descriptions.words(each.long): each for each in reversed(found) if each.long}.values())[::-1]
    count = Counter(each.section for each in distinct)
    classes = sorted(name for name in count if count[name] >= least and name not in _NO_SUBJECT)
    split: dict[bool, list[tuple[str, int]]] = {True: [], False: []}
    for each, family in zip(distinct, descriptions.families(distinct), strict=True):
        if each.section in classes:
            held_out = descriptions.is_held_out(family, _HELD_OUT)
            split[held_out].append((each.long, classes.index(each.section)))
    return LabelledTexts("Debian descriptions", classes, split[False], split[True])


def from_hub(name: str, text_column: str, label_column: str) -> LabelledTexts:
    """A data set whose labels are a ClassLabel or can be numbered."""
    from datasets import load_dataset  # needed for this only

    data = load_dataset(name)
    missing = {"train", "test"} - set(data)
    if missing:
        raise ValueError(f"{name} must have splits train and test; it lacks {sorted(missing)}")
    label = data["train"].features[label_column]
    classes = getattr(label, "names", None) or [str(value) for value in sorted(set(data["train"][label_column]))]
    number = {value: place for place, value in enumerate(classes)} | {place: place for place in range(len(classes))}

    def pairs(split: str) -> list[tuple[str, int]]:
        rows = zip(data[split][text_column], data[split][label_column], strict=True)
        return [(text, number[value if hasattr(label, "names") else str(value)]) for text, value in rows]

    return LabelledTexts(name, list(classes), pairs("train"), pairs("test"))


def _some(texts: list, most: int | None) -> list:
    return texts if most is None or most >= len(texts) else random.Random(0).sample(texts, most)
