"""Makes the benchmark's input "trained": query, key and value of all heads of a GPT trained with this attention.

    python -m bench.capture                                  trains for about two minutes on a GPU
    python -m bench.capture --checkpoint gpt.pt --out own.pt takes a model that the demo trained
    python -m bench.attention --device cuda --dtypes bf16 --inputs trained captured:own.pt

The model is that of examples/gpt: 8 layers of 8 heads of size 64, rotary positions, bytes of Python sources, 8,192 at
once. The file holds query, key and value, (layers × windows, heads, N, D) with rotary positions in them, and alpha.
Windows come from the held-out part of the text. The trained model itself is written beside the file.
"""

import argparse
import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import trange

from bench.lib.inputs import TRAINED

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "gpt"))  # programs, not a package

from data import Corpus, load_corpus
from model import GPT, GPTConfig
from train import Checkpoint, Trainer, evaluate, learning_rate_at

CONFIG = GPTConfig(layers=8, heads=8, width=512, context=8192)


def train(
    corpus: Corpus, config: GPTConfig, steps: int, device: torch.device, learning_rate: float = 1e-3, seed: int = 0
) -> GPT:
    """Trains on a window a step, in bfloat16 by autocast, as such models usually are."""
    trainer = Trainer(config, device, seed)
    batches = corpus.batches(1, config.context, seed)
    with trange(steps, desc="training", mininterval=1) as bar:
        for step in bar:
            inputs, targets = (each.to(device) for each in next(batches))
            with torch.autocast(device.type, torch.bfloat16):  # anew each step: it keeps weights that it has cast
                loss, seconds = trainer.step(inputs, targets, learning_rate_at(step / steps, learning_rate))
            bar.set_postfix_str(f"{loss / math.log(2):.3f} bits a byte, {1000 * seconds:.0f} ms", refresh=False)
    with torch.autocast(device.type, torch.bfloat16):
        held_out = evaluate(trainer.model.eval(), corpus.validation_windows(16, config.context), batch=1)
    print(f"{held_out / math.log(2):.3f} bits a byte on text held out", flush=True)
    return trainer.model


@torch.no_grad()
def capture(model: GPT, tokens: Tensor) -> dict[str, Tensor | float]:
    """Runs the model over tokens, (windows, N), and keeps what its attention layers are given."""
    layers: list[tuple[Tensor, Tensor, Tensor]] = []
    hooks = [
        block.attention.register_forward_pre_hook(lambda module, inputs: layers.append(module.project(*inputs)))
        for block in model.blocks
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    query, key, value = (torch.cat([layer[i] for layer in layers]).contiguous().cpu() for i in range(3))
    return {"query": query, "key": key, "value": value, "alpha": model.blocks[0].attention.alpha}


def model_file(out: Path) -> Path:
    """Where the model lies whose heads are in `out`."""
    return out.with_name(f"{out.stem}-model.pt")


def load_model(file: Path, device: torch.device) -> tuple[GPT, GPTConfig]:
    saved = torch.load(file, map_location=device, weights_only=True)
    config = GPTConfig(**saved["config"])
    model = GPT(config).to(device)
    model.load_state_dict(saved["model"])
    return model, config


def make(out: Path, text: Path | None, config: GPTConfig = CONFIG, **training) -> None:
    """Trains a model and writes what its heads are given, in bfloat16, and the model."""
    corpus = load_corpus(text, config.context)
    model = train(corpus, config, **training)
    tokens, _ = corpus.validation_windows(1, config.context)
    device = model.embedding.weight.device
    with torch.autocast(device.type, torch.bfloat16):
        captured = capture(model, tokens.to(device))
    _write(out, {name: x.bfloat16() if isinstance(x, Tensor) else x for name, x in captured.items()})
    torch.save({"config": asdict(config), "model": model.state_dict()}, model_file(out))


def _write(out: Path, captured: dict[str, Tensor | float]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(captured, out)
    print(f"{out}: query, key, value {tuple(captured['query'].shape)}, α = {captured['alpha']:g}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.capture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=TRAINED, help="file to write (default: %(default)s)")
    parser.add_argument("--text", type=Path, help="file or folder to train on (default: Python's own library)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3000, help="of training (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="at its highest (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="of examples/gpt/train.py or the demo, instead of training")
    parser.add_argument("--windows", type=int, default=1, help="of a checkpoint, a layer (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.checkpoint is None:
        training = {name: getattr(options, name) for name in ("steps", "device", "learning_rate", "seed")}
        return make(options.out, options.text, **training)
    trained = Checkpoint.load(options.checkpoint)
    context = trained.config.context
    tokens, _ = load_corpus(options.text, context).validation_windows(options.windows, context)
    _write(options.out, capture(trained.models["entmax"], tokens))


if __name__ == "__main__":
    main()
