"""Trains the language model of examples/language_modelling with each sequence sharded over processes.

    torchrun --nproc-per-node 2 examples/long_context/train.py

Every process has the same windows of text and computes a part of the tokens of each; attention reaches the others by
adasplash.distributed. Losses are those of one process to rounding: `--nproc-per-node 1` shows it. On the CPU processes
talk by gloo; with --device cuda each has a GPU of its own, and they talk by NCCL.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.append(str(Path(__file__).resolve().parents[1] / "language_modelling"))

import sharded_attention
from adasplash.distributed import shard
from byte_tokenizer import VOCABULARY
from token_windows import bytes_of_files

DEFAULTS = {
    "cpu": dict(context=2048, layers=4, heads=4, width=128, steps=200, batch=1),
    "cuda": dict(context=131_072, layers=8, heads=8, width=512, steps=200, batch=1),
}
QUICK = dict(context=256, layers=2, heads=2, width=32, steps=10, batch=2)
IGNORED = -100


def build_model(options: argparse.Namespace) -> GPT2LMHeadModel:
    """A GPT-2 from scratch, the same on every process."""
    torch.manual_seed(options.seed)
    sharded_attention.register()
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=options.context,
            n_embd=options.width,
            n_layer=options.layers,
            n_head=options.heads,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=options.dropout,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation=sharded_attention.NAME,
        )
    )


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """This process' part of the mean loss of a batch of whole windows (B, N): the parts of all sum to it."""
    # Labels are shifted before the tokens are dealt out: a chunk's last token is followed by another process'.
    labels = F.pad(windows[:, 1:], (0, 1), value=IGNORED)
    positions = torch.arange(windows.shape[1], device=windows.device)[None]
    tokens, labels, positions = (shard(x, 1) for x in (windows, labels, positions))
    logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def sum_gradients(model: nn.Module) -> None:
    """Each process has gradients of its tokens; all get the sum, in one collective."""
    gradients = [parameter.grad for parameter in model.parameters()]
    flat = torch.cat([x.flatten() for x in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([x.numel() for x in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def train(model: nn.Module, windows: DataLoader, options: argparse.Namespace, device: torch.device) -> list[float]:
    """The losses of all steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.1)
    losses = []
    half = torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")
    first = dist.get_rank() == 0
    with tqdm(total=options.steps, disable=not first, desc=f"{dist.get_world_size()} processes") as bar:
        while len(losses) < options.steps:
            for batch in windows:
                with half:
                    loss = loss_of(model, batch["input_ids"].to(device))
                loss.backward()
                sum_gradients(model)
                optimizer.step()
                optimizer.zero_grad()
                whole = loss.detach()
                dist.all_reduce(whole)
                losses.append(whole.item())
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
                bar.update()
                if len(losses) == options.steps:
                    break
    return losses


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, for seconds on two cores")
    parser.add_argument("--device", choices=DEFAULTS, default="cpu", help="(default: %(default)s)")
    parser.add_argument("--data", type=Path, help="a file or a folder (Python's sources)")
    parser.add_argument("--losses", type=Path, metavar="FILE", help="where to write the loss of each step, as JSON")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    parser.add_argument("--layers", type=int, help="(%(default)s)")
    parser.add_argument("--heads", type=int, help="of each layer (%(default)s)")
    parser.add_argument("--width", type=int, help="features a token (%(default)s)")
    parser.add_argument(
        "--context", type=int, help="tokens of a window, a multiple of twice the processes (%(default)s)"
    )
    parser.add_argument("--dropout", type=float, default=0.0, help="of attention weights (%(default)s)")
    parser.add_argument("--steps", type=int, help="(%(default)s)")
    parser.add_argument("--batch", type=int, help="windows a step (%(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate (%(default)s)")
    given = sys.argv[1:] if arguments is None else arguments
    known, _ = parser.parse_known_args([each for each in given if each not in ("-h", "--help")])
    parser.set_defaults(**DEFAULTS[known.device] | (QUICK if known.quick else {}))
    return parser.parse_args(arguments)


def main() -> None:
    options = options_of()
    if "RANK" not in os.environ:
        sys.exit("error: start it by torchrun --nproc-per-node 2 examples/long_context/train.py")
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        texts = bytes_of_files(options.data, options.context, with_packages=False)
        order = torch.Generator().manual_seed(options.seed)  # the same on every process
        windows = DataLoader(texts.training, options.batch, shuffle=True, generator=order, drop_last=True)
        losses = train(build_model(options).to(device), windows, options, device)
        if dist.get_rank() == 0:
            print(f"{options.context:,} tokens a window, loss {losses[0]:.3f} to {losses[-1]:.3f}")
            if options.losses:
                options.losses.write_text(json.dumps(losses))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
