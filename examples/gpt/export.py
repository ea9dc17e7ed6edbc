"""Saves a trained model for use outside its Python code: as TorchScript and as an AOTInductor package, both with a
cache of keys and values that lives outside of them, and an index of its keys if that is wanted."""

import argparse
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cached import CachedGPT
from engine import PAGE, Shape, Step
from model import GPT
from train import Checkpoint


@dataclass(frozen=True)
class Exported:
    """The two files that a model was saved to."""

    torchscript: Path
    aoti: Path


def export_torchscript(model: CachedGPT, path: Path) -> None:
    """Writes a file for `torch.jit.load` in Python and `torch::jit::load` in C++."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch recommends export, which the other function does
        torch.jit.script(model.eval()).save(path)


def export_program(model: CachedGPT) -> torch.export.ExportedProgram:
    """The model as a graph that takes any number of tokens, sequences and pages, from 2 on of each."""
    device = next(model.parameters()).device
    integers = dict(dtype=torch.int32, device=device)
    tokens, sequences, width, pages = 7, 3, 4, 5
    arguments = (
        *(torch.zeros(tokens, dtype=torch.long, device=device) for _ in range(3)),
        torch.tensor([0, 1, 2, tokens], **integers),
        torch.zeros(sequences, width, **integers),
        torch.full((sequences,), tokens, **integers),
        *shape_of(model).caches(pages, PAGE, device),
    )
    dynamic = torch.export.Dim.DYNAMIC
    lists = [{0: dynamic}] * model.layers
    shapes = ({0: dynamic},) * 4 + (
        {0: dynamic, 1: dynamic},
        {0: dynamic},
        lists,
        lists,
        lists if model.indexed else [],
    )
    with torch.no_grad():  # a cache has no gradient
        return torch.export.export(model.eval(), arguments, dynamic_shapes=shapes)


def compile_aoti(program: torch.export.ExportedProgram, path: Path, facts: dict[str, int]) -> None:
    """Compiles a program ahead of time into a package for `torch._inductor.aoti_load_package` and its C++ loader.

    The path must end in .pt2. The package's metadata tells the facts to whom they may concern.
    """
    configs = {"aot_inductor.metadata": {name: str(int(fact)) for name, fact in facts.items()}}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own code
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)


def shape_of(model: CachedGPT) -> Shape:
    return Shape(model.layers, model.heads, model.head_size, model.indexed)


def export(model: GPT, folder: Path, indexed: bool = False) -> Exported:
    """Writes both into the folder, which is created if need be. Files that take an index have names of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "gpt.indexed" if indexed else "gpt"
    exported = Exported(folder / f"{name}.torchscript.pt", folder / f"{name}.aoti.pt2")
    cached = CachedGPT(model, indexed)
    export_torchscript(cached, exported.torchscript)
    compile_aoti(export_program(cached), exported.aoti, asdict(shape_of(cached)))
    return exported


def load(path: Path) -> Step:
    """The exported model as a function, which takes what CachedGPT.forward does."""
    if path.suffix == ".pt2":
        return torch._inductor.aoti_load_package(str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="what train.py wrote")
    parser.add_argument("--attention", choices=("entmax", "softmax"), default="entmax", help="which of its two models")
    parser.add_argument("--index", action="store_true", help="whoever serves it keeps an index of the keys")
    parser.add_argument("--out", type=Path, default=Path("exported"), help="folder to write to (default: %(default)s)")
    options = parser.parse_args()
    model = Checkpoint.load(options.checkpoint).models[options.attention]
    exported = export(model, options.out, options.index)
    print(f"TorchScript: {exported.torchscript}\nAOTInductor: {exported.aoti}")


if __name__ == "__main__":
    main()
