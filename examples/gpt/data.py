"""Text as bytes: where it comes from, how it is split, and the batches that are drawn from it."""

import os
import random
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VALIDATION_SHARE = 0.1
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}  # what else lies in its folder


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes held out. Both are 1-d uint8 tensors."""

    name: str
    train: Tensor
    validation: Tensor

    def batches(self, size: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless random training batches: inputs and the bytes that follow them, both (size, context) int64."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(self.train) - context, (size,), generator=generator)
            yield _windows(self.train, starts, context)

    def validation_windows(self, count: int, context: int) -> tuple[Tensor, Tensor]:
        """At most `count` windows, spread evenly over the held-out bytes: two (count, context) int64."""
        last = len(self.validation) - context - 1
        starts = torch.linspace(0, last, min(count, last + 1), dtype=torch.float64).long()
        return _windows(self.validation, starts, context)


def _windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    windows = text[starts[:, None] + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def load_corpus(text: Path | None, context: int, max_bytes: int = 64 << 20, *, with_packages: bool = False) -> Corpus:
    """Reads the text to train on and holds the last tenth of it out for validation.

    text: a file, taken as it is; a folder, of which every text file is read (a folder's files are shuffled first, so
        that the held-out files are of every kind); or None for the Python standard library's own source files.
    context: length of the windows that will be drawn; both parts must be long enough to hold one.
    max_bytes: reading stops there.
    with_packages: beside the standard library's, the source files of all installed packages.
    Raises ValueError if there is too little text, OSError if it cannot be read.
    """
    name, files = _find_files(text, with_packages)
    content = bytearray()
    for file in files:
        try:
            content += _read(file, max_bytes - len(content), skip_binary=file != text)
        except OSError:
            if file == text:
                raise  # the one file that was asked for; in a folder, what cannot be read is left out
        if len(content) >= max_bytes:
            break
    held_out = int(len(content) * VALIDATION_SHARE)
    if held_out < context + 1:
        needed = -(-(context + 1) // VALIDATION_SHARE)
        raise ValueError(
            f"too little text: {name} holds {len(content):,} bytes, but at least {needed:,.0f} are needed for a "
            f"context of {context} (a tenth is held out for validation)"
        )
    everything = torch.frombuffer(content, dtype=torch.uint8)
    return Corpus(name, everything[:-held_out], everything[-held_out:])


def _find_files(text: Path | None, with_packages: bool) -> tuple[str, list[Path]]:
    if text is None:
        paths = sysconfig.get_paths()
        name, ending, skipped = "the Python standard library", ".py", NOT_LIBRARY
        files = _files_in(Path(paths["stdlib"]), ending, skipped)
        if with_packages:
            name += " and the installed packages"
            for folder in {paths["purelib"], paths["platlib"]}:
                files += _files_in(Path(folder), ending, skipped)
    elif text.is_dir():
        name, files = str(text), _files_in(text)
    elif text.exists():
        return str(text), [text]
    else:
        raise FileNotFoundError(f"no such file or folder: {text}")
    files = sorted(f for f in files if f.is_file())
    random.Random(0).shuffle(files)
    return name, files


def _files_in(folder: Path, ending: str = "", skipped: Collection[str] = ()) -> list[Path]:
    files = []
    for where, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if f not in skipped and not f.startswith(".")]
        files += [Path(where, n) for n in names if n.endswith(ending) and not n.startswith(".")]
    return files


def _read(file: Path, limit: int, skip_binary: bool) -> bytes:
    with file.open("rb") as stream:
        content = stream.read(limit)
    return b"" if skip_binary and b"\0" in content[:4096] else content
