"""The experiments' results as tables: printed, or with --write put into docs/models.md with their pictures.

    python examples/report.py --write                            from the rows in examples/results
    python examples/report.py --results build/examples/results   prints those of `make examples`

In docs/models.md the tables of an experiment lie between the lines <!-- results:NAME --> and <!-- /results:NAME -->.
"""

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path += [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from bench.report import replace_block
from shared.results import EXAMPLES, FOLDER, Result, read
from shared.table import table

PAGE = EXAMPLES.parent / "docs/models.md"
PICTURES = PAGE.parent / "images"
DEVICES = {"cuda": "On a GPU", "cpu": "On a CPU"}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """How the rows of an experiment are shown."""

    #: The columns of a row's metrics, by their formats.
    columns: Callable[[Sequence[Result]], dict[str, str]]
    #: A row with those metrics.
    shown: Callable[[Result], Result] = lambda row: row
    #: What its plot.py draws; None if it has none.
    picture: str | None = None
    #: Facts of a setting that differ within a table: the models' names tell them.
    told_by_names: tuple[str, ...] = ()


def _by_length(row: Result) -> Result:
    shares = zip(row.metrics["length"], row.metrics["accuracy"], strict=True)
    return dataclasses.replace(row, metrics={f"{length:,}": share for length, share in shares})


def _at_the_end(row: Result) -> Result:
    """What was recorded on the way gives its last number."""
    last = {name: value[-1] if isinstance(value, list) else value for name, value in row.metrics.items()}
    return dataclasses.replace(row, metrics=last)


EXPERIMENTS = {
    "length_generalisation": Experiment(
        columns=lambda rows: dict.fromkeys(rows[0].metrics, ".1%"),
        shown=_by_length,
        picture="Right answers by length of the sequence, for softmax and α-entmax",
    ),
    "language_modelling": Experiment(
        columns=lambda rows: {
            "bits_a_byte": ".3f",
            "tokens_a_second": ",.0f",
            "tokens_a_second_late": ",.0f",
            "empty_tiles": ".1%",
        },
        shown=_at_the_end,
        picture="Held-out loss by time and by steps, and how many keys have weight",
    ),
    "classification": Experiment(
        columns=lambda rows: {"accuracy": ".1%", "loss": ".3f", "alpha least": ".2f", "alpha most": ".2f"}
    ),
    "retrieval": Experiment(
        columns=lambda rows: {"recall@1": ".1%", "recall@10": ".1%", "MRR@10": ".1%"},
        told_by_names=("train pairs", "epochs"),
    ),
}


def tables(name: str, rows: Sequence[Result]) -> str:
    """Everything that the rows of an experiment on one kind of device say: a table for each setting, with its seeds,
    then what ran where, and the commands."""
    experiment, groups = EXPERIMENTS[name], {}
    for row in rows:
        setting = {fact: value for fact, value in row.setting.items() if fact not in experiment.told_by_names}
        groups.setdefault(json.dumps(setting), []).append(experiment.shown(row))
    parts = []
    for setting, group in groups.items():
        facts = [f"{fact.replace('_', ' ')} {_written(value)}" for fact, value in json.loads(setting).items()]
        seeds = sorted({row.seed for row in group})
        facts.append(f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")
        parts += [f"*{'; '.join(facts)}*", table(group, experiment.columns(group))]
    commands = "\n".join(dict.fromkeys(portable(row.command) for row in rows))
    return "\n\n".join([*parts, f"{_machines(rows)}:", f"```sh\n{commands}\n```"])


def _written(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _machines(rows: Sequence[Result]) -> str:
    """Where, with what and when rows were measured."""
    ran: dict[str, dict[str, None]] = {}  # what ran, by where and with what
    for row in rows:
        packages = (f"{package} {version}" for package, version in row.versions.items() if package != "python")
        when = f"{row.date} (commit {row.commit})" if row.commit else row.date
        ran.setdefault(", ".join([row.device_name, *packages]), {})[when] = None
    return "Measured on: " + "; ".join(", ".join([where, *when]) for where, when in ran.items())


def portable(command: str) -> str:
    """A command without options that name absolute paths, which are of the machine it ran on. Without them, programs
    fetch the same data and models, and write below the project."""
    words, kept = shlex.split(command), []
    for word in words:
        if word.startswith("/") and kept[-1].startswith("--"):
            kept.pop()
        else:
            kept.append(word)
    return shlex.join(kept)


def draw(name: str, device: str, folder: Path, pictures: Path) -> Path:
    """The experiment's picture, by its own plot.py."""
    path = pictures / f"{name}.png"
    plot = EXAMPLES / name / "plot.py"
    subprocess.run([sys.executable, plot, "--device", device, "--results", folder, "--out", path], check=True)
    return path


def block(name: str, folder: Path, pictures: Path | None) -> str:
    """The tables of an experiment on all devices, and above them the picture of the first that has results: it is drawn
    into `pictures`, where that is not None."""
    found = {device: rows for device in DEVICES if (rows := read(name, device, folder))}
    if not found:
        return "No results yet."
    parts = [f"### {DEVICES[device]}\n\n{tables(name, rows)}" for device, rows in found.items()]
    title = EXPERIMENTS[name].picture
    if title and pictures:
        path = draw(name, next(iter(found)), folder, pictures)
        parts.insert(0, f"![{title}]({path.parent.name}/{path.name})")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of rows (default: examples/results)")
    parser.add_argument("--pictures", type=Path, help="folder to draw into (default: none, with --write docs/images)")
    parser.add_argument("--write", action="store_true", help="write the blocks of docs/models.md and its pictures")
    options = parser.parse_args()
    pictures = PICTURES if options.write else options.pictures
    blocks = {name: block(name, options.results, pictures) for name in EXPERIMENTS}
    if not options.write:
        for name, text in blocks.items():
            print(f"\n## {name.replace('_', ' ').capitalize()}\n\n{text}")
        return
    page = PAGE.read_text()
    for name, text in blocks.items():
        page = replace_block(page, f"results:{name}", text)
    PAGE.write_text(page)
    print(PAGE)


if __name__ == "__main__":
    main()
