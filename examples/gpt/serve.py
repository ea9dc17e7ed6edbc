"""Builds the C++ programs in ../libtorch and holds what they write against what Python computes."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import adasplash
from export import Exported, load
from generate import continue_greedily, gaps_to_likeliest
from model import GPT

SOURCES = Path(__file__).resolve().parent.parent / "libtorch"

# Two logits nearer than this are a tie. The compiled model sums in another order than the eager one, which moves logits
# by some 1e-6; where two bytes are as near as that, either is a right answer.
TIE = 1e-4


class Failure(Exception):
    """The C++ programs could not be built or run."""


class Mismatch(Failure):
    """C++ and Python disagree."""


@dataclass(frozen=True)
class Verdict:
    """What a C++ program wrote, and at how many of its bytes the eager model had a tie and took the other one."""

    continuation: bytes
    ties: int

    def __str__(self) -> str:
        text = f"These {len(self.continuation)} bytes equal those of Python running the same file"
        if not self.ties:
            return f"{text}, and those of the eager model."
        return (
            f"{text}. The eager model chose otherwise at {self.ties} of them, where two bytes tie: their logits are "
            f"less than {TIE:g} apart, which is within rounding."
        )


def build(folder: Path) -> Path:
    """Builds the programs through the installed CMake package; returns the folder that holds them."""
    if not shutil.which("cmake"):
        raise Failure("cmake is needed to build the C++ programs, and was not found")
    prefix = f"{adasplash.cmake_prefix_path};{torch.utils.cmake_prefix_path}"
    # -U forgets where the package was found when this folder was last built in.
    options = ["-UAdaSplash_DIR", "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_PREFIX_PATH={prefix}"]
    configure = ["cmake", "-S", str(SOURCES), "-B", str(folder), *options]
    for command in (configure, ["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1)]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if done.returncode:
            raise Failure(f"{' '.join(command)} failed:\n{done.stdout}")
    return folder


def continue_in_cpp(program: Path, model: Path, prompt: bytes, count: int) -> bytes:
    """Runs one of the programs on a prompt; returns the bytes that it wrote."""
    # As many threads as here: another number of them may round otherwise.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [str(program), str(model), str(count)]
    done = subprocess.run(command, input=prompt, capture_output=True, env=environment)
    if done.returncode:
        raise Failure(f"{' '.join(command)} failed:\n{done.stderr.decode(errors='replace')}")
    return done.stdout


def verify(program: Path, artifact: Path, model: GPT, prompt: bytes, count: int, eager: bytes) -> Verdict:
    """Lets C++ continue the prompt from the saved model, and checks its bytes twice.

    They must equal, byte for byte, what Python gets from the same saved model: the arithmetic is the same. And they
    must equal what the eager model gives (`eager`), unless each byte that it would have chosen otherwise, after the
    very bytes that C++ wrote, is a tie (see TIE). Raises Mismatch if not.
    """
    device = next(model.parameters()).device
    written = continue_in_cpp(program, artifact, prompt, count)
    expected = continue_greedily(load(artifact), prompt, count, model.context, device)
    if written != expected:
        at = next((i for i in range(count) if written[i : i + 1] != expected[i : i + 1]), count)
        raise Mismatch(
            f"{program.name} and Python continue {artifact.name} differently from byte {at} on:\n"
            f"  C++:    {written[at:]!r}\n  Python: {expected[at:]!r}"
        )
    if written == eager:
        return Verdict(written, ties=0)
    deficits = gaps_to_likeliest(model, prompt, written, model.context, device)
    if max(deficits) > TIE:
        at = next(i for i, deficit in enumerate(deficits) if deficit > TIE)
        raise Mismatch(
            f"{artifact.name} does not compute what the model does: it chose {written[at : at + 1]!r} as byte {at}, "
            f"whose logit in the eager model is {deficits[at]:.2e} below the highest"
        )
    return Verdict(written, ties=sum(deficit > 0 for deficit in deficits))


def verify_all(programs: Path, exported: Exported, model: GPT, prompt: bytes, count: int) -> dict[str, Verdict]:
    """Both saved forms of the model, each with its program."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one short sequence is too little work for more
    try:
        eager = continue_greedily(model, prompt, count, model.context, next(model.parameters()).device)
        rest = (model, prompt, count, eager)
        return {
            "TorchScript": verify(programs / "generate_torchscript", exported.torchscript, *rest),
            "AOTInductor": verify(programs / "generate_aoti", exported.aoti, *rest),
        }
    finally:
        torch.set_num_threads(threads)


def check_gradients(programs: Path) -> str:
    """Runs the program that calls the operator from C++ and checks its gradients; returns what it printed."""
    done = subprocess.run([str(programs / "gradients")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Mismatch(f"gradients failed:\n{done.stdout}")
    return done.stdout
