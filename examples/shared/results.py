"""Results of experiments: a row for each trained model, in files of JSON lines, with what training it again takes."""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

EXAMPLES = Path(__file__).resolve().parents[1]
FOLDER = EXAMPLES / "results"
_PACKAGES = ("torch", "torch-adasplash", "transformers", "sentence-transformers")


def _versions() -> dict[str, str]:
    """Of Python, and of what is installed of the packages that results may depend on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _command() -> str:
    """As it would be typed in the project's folder."""
    program = Path(sys.argv[0]).resolve()
    if program.is_relative_to(EXAMPLES.parent):
        program = program.relative_to(EXAMPLES.parent)
    return shlex.join(["python", str(program), *sys.argv[1:]])


def _commit() -> str | None:
    """The one that is checked out, with a + where files differ from it; None outside of a checkout."""
    git = ["git", "-C", str(EXAMPLES)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def device_name(device: str | torch.device) -> str:
    """What a device is called: the GPU's name, or the processor's with the number of threads that torch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {torch.get_num_threads()} threads"


@dataclasses.dataclass
class Result:
    """What came of one trained model, or of one that was looked at as it is.

    `experiment`, `model`, `attention`, `setting`, `seed` and the kind of `device` say which row this is; a later one of
    the same replaces it.
    """

    experiment: str  # the name of its folder in examples/
    model: str
    attention: str  # "softmax", "entmax 1.5", "learned", …
    seed: int
    metrics: dict[str, Any]  # numbers, or lists of them where something was measured on the way
    device: str = "cpu"  # "cpu" or "cuda"
    setting: dict[str, Any] = dataclasses.field(default_factory=dict)  # whatever else was chosen: data, task, form, …
    seconds_a_step: float | None = None  # the median
    keys_a_query: float | None = None  # with weight, in the mean over layers, heads and queries
    device_name: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=_versions)
    command: str = dataclasses.field(default_factory=_command)
    date: str = dataclasses.field(default_factory=lambda: datetime.date.today().isoformat())
    commit: str | None = dataclasses.field(default_factory=_commit)

    def __post_init__(self) -> None:
        self.device = torch.device(self.device).type
        self.device_name = self.device_name or device_name(self.device)

    @property
    def key(self) -> str:
        which = self.experiment, self.model, self.attention, self.setting, self.seed, self.device
        return json.dumps(which, sort_keys=True)


def path_of(experiment: str, device: str | torch.device, folder: Path = FOLDER) -> Path:
    """The file that has the results of an experiment on a kind of device."""
    return folder / f"{experiment}-{torch.device(device).type}.jsonl"


def read(experiment: str, device: str | torch.device, folder: Path = FOLDER) -> list[Result]:
    """All rows of an experiment on a kind of device, in the order in which they were first written."""
    path = path_of(experiment, device, folder)
    if not path.exists():
        return []
    return [Result(**json.loads(line)) for line in path.read_text().splitlines() if line]


def append(*results: Result, folder: Path = FOLDER) -> list[Path]:
    """Writes rows into the files that they belong to, each in the place of an earlier one of the same key.

    Returns:
        the files.
    """
    paths = []
    for result in results:
        rows = {row.key: row for row in read(result.experiment, result.device, folder)}
        rows[result.key] = result
        path = path_of(result.experiment, result.device, folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(".part")
        written.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows.values()))
        written.replace(path)  # whoever reads meanwhile has the old file whole
        paths.append(path)
    return list(dict.fromkeys(paths))
