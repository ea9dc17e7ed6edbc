"""Makes the files beside it: models as users saved them, and what they computed, which later versions load and repeat.

They were made by the library of commit 9f88dbc under torch 2.11.0, the oldest that is supported, and stay as they are.
Files of a later commit go to a folder of their own: `python make.py FOLDER`.
"""

import io
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.export.experimental import _export_forward_backward

import adasplash

HEADS, SIZE = 4, 8
ALPHAS = [1.1, 1.5, 1.7, 2.0]
Q_LENGTHS, K_LENGTHS = (9, 0, 14), (20, 6, 11)


class Project(torch.nn.Module):
    """Queries of (..., tokens, 16) for four heads, keys and values for two."""

    def __init__(self):
        super().__init__()
        self.query, self.value = torch.nn.Linear(16, HEADS * SIZE), torch.nn.Linear(16, 2 * SIZE)
        self.key = torch.nn.Linear(16, 2 * SIZE, bias=False)  # a bias would have a gradient of nothing but rounding

    def heads(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., tokens, heads, 8) each."""
        query, key, value = self.query(x), self.key(y), self.value(y)
        return query.unflatten(-1, [4, 8]), key.unflatten(-1, [2, 8]), value.unflatten(-1, [2, 8])


class Padded(Project):
    def forward(self, x: Tensor, y: Tensor, q_seqlens: Tensor, kv_seqlens: Tensor, slopes: Tensor) -> Tensor:
        query, key, value = self.heads(x, y)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return adasplash.entmax_attn(
            query, key, value, 1.25, True, 0.9, q_seqlens, kv_seqlens, window=(7, -1), alibi_slopes=slopes
        )


class PaddedPerHead(Project):
    def __init__(self):
        super().__init__()
        self.alpha = torch.nn.Parameter(torch.tensor(ALPHAS))

    def forward(self, x: Tensor, y: Tensor, q_seqlens: Tensor, kv_seqlens: Tensor, slopes: Tensor) -> Tensor:
        query, key, value = self.heads(x, y)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return adasplash.entmax_attn(
            query, key, value, self.alpha, True, 0.9, q_seqlens, kv_seqlens, window=(7, -1), alibi_slopes=slopes
        )


class Packed(Project):
    def forward(self, x: Tensor, y: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, slopes: Tensor) -> Tensor:
        query, key, value = self.heads(x, y)
        return adasplash.entmax_attn_varlen(
            query, key, value, cu_seqlens_q, cu_seqlens_k, 14, 20, 1.5, False, 0.9, window=(30, 5), alibi_slopes=slopes
        )


class PackedPerHead(Project):
    def __init__(self):
        super().__init__()
        self.alpha = torch.nn.Parameter(torch.tensor(ALPHAS))

    def forward(self, x: Tensor, y: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, slopes: Tensor) -> Tensor:
        query, key, value = self.heads(x, y)
        return adasplash.entmax_attn_varlen(
            query, key, value, cu_seqlens_q, cu_seqlens_k, 14, 20, self.alpha, True, 0.9, alibi_slopes=slopes
        )


class Activation(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(16, 12)
        self.alpha = torch.nn.Parameter(torch.tensor([[1.2], [1.5], [1.8]]))

    def forward(self, x: Tensor) -> Tensor:
        y = 3 * self.project(x)
        return adasplash.entmax(y, self.alpha) + adasplash.entmax(y, 1.3, 0) + adasplash.sparsemax(y)


class Loss(torch.nn.Module):
    """A step of training without its optimiser: what a training graph is exported of."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        return (self.model(*inputs).square().sum(),)


def padded_inputs() -> tuple[Tensor, ...]:
    slopes = torch.linspace(0.0, 0.3, 3 * HEADS).reshape(3, HEADS)
    lengths = (torch.tensor(x, dtype=torch.int32) for x in (Q_LENGTHS, K_LENGTHS))
    return 2 * torch.randn(3, max(Q_LENGTHS), 16), 2 * torch.randn(3, max(K_LENGTHS), 16), *lengths, slopes


def packed_inputs() -> tuple[Tensor, ...]:
    slopes = torch.linspace(0.0, 0.3, HEADS)
    ends = (torch.tensor((0, *x)).cumsum(0).to(torch.int32) for x in (Q_LENGTHS, K_LENGTHS))
    return 2 * torch.randn(sum(Q_LENGTHS), 16), 2 * torch.randn(sum(K_LENGTHS), 16), *ends, slopes


CASES = {
    "padded": (Padded, padded_inputs),
    "padded_per_head": (PaddedPerHead, padded_inputs),
    "packed": (Packed, packed_inputs),
    "packed_per_head": (PackedPerHead, packed_inputs),
    "activation": (Activation, lambda: (torch.randn(3, 16),)),
}


def save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names files of the machine
    torch.export.save(program, path)


def save_script(model: torch.nn.Module, path: Path) -> None:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    reader, writer = torch._C.PyTorchFileReader(file), torch._C.PyTorchFileWriter(str(path))
    for name in reader.get_all_records():
        if not name.endswith(".debug_pkl") and name not in ("version", "byteorder", ".data/serialization_id"):
            content = reader.get_record(name)  # without .debug_pkl, which names files of the machine
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()


def make(folder: Path) -> None:
    values = {}
    for seed, (name, (model, inputs)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        model, inputs = model(), inputs()
        out = model(*inputs)
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = dict(zip(names, torch.autograd.grad(out.square().sum(), parameters), strict=True))
        values[name] = {"inputs": inputs, "out": out.detach(), "gradients": gradients}

        save_script(model, folder / f"{name}.torchscript.pt")
        program = torch.export.export(model, inputs)
        save_program(program, folder / f"{name}.pt2")
        save_program(program.run_decompositions(), folder / f"{name}.decomposed.pt2")
        training = _export_forward_backward(torch.export.export(Loss(model), inputs))
        save_program(training, folder / f"{name}.training.pt2")
    torch.save(values, folder / "values.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    make(Path(sys.argv[1]))
