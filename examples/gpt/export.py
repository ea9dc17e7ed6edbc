"""Saves a trained model for use outside its Python code: as TorchScript and as an AOTInductor package."""

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from generate import Predict
from model import GPT
from train import Checkpoint


@dataclass(frozen=True)
class Exported:
    """The two files that a model was saved to."""

    torchscript: Path
    aoti: Path


def export_torchscript(model: GPT, path: Path) -> None:
    """Writes a file for `torch.jit.load` in Python and `torch::jit::load` in C++."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch recommends export, which the other function does
        torch.jit.script(model.eval()).save(path)


def export_program(model: GPT) -> torch.export.ExportedProgram:
    """The model as a graph that takes tokens (1, N) of any length N from 2 up to the model's context."""
    tokens = torch.zeros(1, model.context // 2 + 1, dtype=torch.long, device=next(model.parameters()).device)
    length = torch.export.Dim("length", min=2, max=model.context)
    return torch.export.export(model.eval(), (tokens,), dynamic_shapes=({1: length},))


def export_aoti(model: GPT, path: Path) -> None:
    """Compiles the model ahead of time into a package for `torch._inductor.aoti_load_package` and its C++ loader.

    The path must end in .pt2. The package's metadata tells the model's context to whom it may concern.
    """
    program = export_program(model)
    configs = {"aot_inductor.metadata": {"context": str(model.context)}}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own code
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)


def export(model: GPT, folder: Path) -> Exported:
    """Writes both into the folder, which is created if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    exported = Exported(folder / "gpt.torchscript.pt", folder / "gpt.aoti.pt2")
    export_torchscript(model, exported.torchscript)
    export_aoti(model, exported.aoti)
    return exported


def load(path: Path) -> Predict:
    """The exported model as a function from tokens (1, N) to logits (1, N, 256)."""
    if path.suffix == ".pt2":
        return torch._inductor.aoti_load_package(str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="what train.py wrote")
    parser.add_argument("--attention", choices=("entmax", "softmax"), default="entmax", help="which of its two models")
    parser.add_argument("--out", type=Path, default=Path("exported"), help="folder to write to (default: %(default)s)")
    options = parser.parse_args()
    model = Checkpoint.load(options.checkpoint).models[options.attention]
    exported = export(model, options.out)
    print(f"TorchScript: {exported.torchscript}\nAOTInductor: {exported.aoti}")


if __name__ == "__main__":
    main()
