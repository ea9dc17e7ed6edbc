"""Trains the same GPT with α-entmax and with softmax attention, side by side: same seed, same batches, same steps."""

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import Corpus, load_corpus
from model import GPT, GPTConfig
from support import mean_support, sparsity

KINDS = ("entmax", "softmax")
#: Softmax gives every key weight; those above this are counted.
NOTICEABLE = 1e-3


@dataclass
class History:
    """What was measured on the way. Lists of one entry a step, but the `measured` ones, which belong to their steps."""

    loss: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    seconds: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    measured_steps: list[int] = field(default_factory=list)
    measured_loss: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    measured_support: list[Tensor] = field(default_factory=list)  # of entmax, (layers, heads) each
    measured_noticeable: list[Tensor] = field(default_factory=list)  # softmax's keys above NOTICEABLE, the same

    @property
    def steps(self) -> int:
        return len(self.loss["entmax"])


@dataclass
class Checkpoint:
    """Both trained models and how they came to be. `config` is that of the entmax model."""

    config: GPTConfig
    models: dict[str, GPT]
    history: History

    def save(self, path: Path) -> None:
        states = {kind: model.state_dict() for kind, model in self.models.items()}
        torch.save({"config": asdict(self.config), "models": states, "history": asdict(self.history)}, path)

    @staticmethod
    def load(path: Path, device: str | torch.device = "cpu") -> "Checkpoint":
        saved = torch.load(path, map_location=device, weights_only=True)
        config = GPTConfig(**saved["config"])
        models = {}
        for kind, state in saved["models"].items():
            models[kind] = GPT(replace(config, attention=kind)).to(device).eval()
            models[kind].load_state_dict(state)
        return Checkpoint(config, models, History(**saved["history"]))


class StopOnInterrupt:
    """Within it, a first Ctrl-C only sets `requested`, so that a step can be finished; a second one interrupts."""

    def __enter__(self) -> "StopOnInterrupt":
        self.requested = False
        self._before = signal.signal(signal.SIGINT, self._request)
        return self

    def _request(self, *_: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)


class Trainer:
    """One model and its optimiser."""

    def __init__(self, config: GPTConfig, device: torch.device, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = GPT(config).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.98), weight_decay=0.1, fused=True)

    def step(self, inputs: Tensor, targets: Tensor, learning_rate: float) -> tuple[float, float]:
        """One step of training; returns the loss (in nats a byte) and how many seconds it took."""
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item(), time.perf_counter() - started  # .item() waits for the device too


@torch.no_grad()
def evaluate(model: GPT, windows: tuple[Tensor, Tensor], batch: int = 16) -> float:
    """Mean loss in nats a byte on (inputs, targets), both (count, context)."""
    device = next(model.parameters()).device
    total = 0.0
    for inputs, targets in zip(*(w.to(device).split(batch) for w in windows), strict=True):
        total += F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum").item()
    return total / windows[1].numel()


def learning_rate_at(progress: float, peak: float) -> float:
    """Rises over the first twentieth, then falls along a cosine to a twentieth of the peak."""
    if progress < 0.05:
        return peak * (progress + 0.001) / 0.051
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95)))


def train(
    corpus: Corpus,
    config: GPTConfig,
    *,
    device: torch.device,
    steps: int | None,
    minutes: float | None,
    batch: int = 4,
    learning_rate: float = 2e-3,
    seed: int = 0,
    measure_every: int = 20,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Checkpoint:
    """Trains both kinds of model until `steps` or `minutes` are used up, or a stop is requested; at least one step."""
    trainers = {kind: Trainer(replace(config, attention=kind), device, seed) for kind in KINDS}
    models = {kind: trainer.model for kind, trainer in trainers.items()}
    batches = corpus.batches(batch, config.context, seed)
    windows = corpus.validation_windows(8, config.context)
    history = History()
    progress = 0.0
    started = time.perf_counter()

    def measure() -> None:
        history.measured_steps.append(history.steps)
        looked_at = windows[0][:2].to(device)
        history.measured_support.append(mean_support(models["entmax"], looked_at))
        history.measured_noticeable.append(mean_support(models["softmax"], looked_at, above=NOTICEABLE))
        for kind, model in models.items():
            history.measured_loss[kind].append(evaluate(model, windows))

    layout = "{desc} {percentage:3.0f}%|{bar:12}| {elapsed}{postfix}"
    pause = 0.2 if sys.stderr.isatty() else 10
    with tqdm(total=1.0, bar_format=layout, mininterval=pause) as bar:
        while history.steps == 0 or (progress < 1 and not stop_requested()):
            if history.steps % measure_every == 0:
                measure()
            inputs, targets = (b.to(device) for b in next(batches))
            for kind, trainer in trainers.items():
                loss, seconds = trainer.step(inputs, targets, learning_rate_at(progress, learning_rate))
                history.loss[kind].append(loss)
                history.seconds[kind].append(seconds)
            progress = _progress(history.steps, steps, time.perf_counter() - started, minutes)
            bar.set_description_str(f"step {history.steps}", refresh=False)
            bar.set_postfix_str(_status(history, inputs.numel(), config.context), refresh=False)
            bar.update(progress - bar.n)
        measure()
    if stop_requested():
        print(f"Stopped by Ctrl-C after {history.steps} steps; going on with what there is.", flush=True)
    return Checkpoint(config, {kind: model.eval() for kind, model in models.items()}, history)


def _progress(step: int, steps: int | None, seconds: float, minutes: float | None) -> float:
    return min(1.0, max(step / steps if steps else 0.0, seconds / (60 * minutes) if minutes else 0.0))


def _status(history: History, tokens: int, context: int) -> str:
    recent = {kind: sum(losses[-20:]) / len(losses[-20:]) for kind, losses in history.loss.items()}
    rate = {kind: tokens / median(seconds[-20:]) for kind, seconds in history.seconds.items()}
    zeros = sparsity(history.measured_support[-1], context)
    return (
        f"loss {recent['entmax']:.3f} (softmax {recent['softmax']:.3f}), "
        f"{rate['entmax']:,.0f} tokens/s (softmax {rate['softmax']:,.0f}), {zeros:.1%} of attention is zero"
    )


def report(checkpoint: Checkpoint, corpus: Corpus, device: torch.device) -> str:
    """Validation losses, time per step and average support per layer and head, as text for people."""
    config, history = checkpoint.config, checkpoint.history
    windows = corpus.validation_windows(64, config.context)
    lines = [f"After {history.steps} steps:", ""]
    lines.append(f"{'attention':<12}{'validation loss':>28}{'time per step':>16}")
    for kind, model in checkpoint.models.items():
        name = f"entmax {config.alpha:g}" if kind == "entmax" else kind
        loss = evaluate(model, windows)
        milliseconds = 1000 * median(history.seconds[kind])
        bits = f"({loss / math.log(2):.3f} bits)"
        lines.append(f"{name:<12}{f'{loss:.4f} nats a byte {bits}':>28}{f'{milliseconds:.1f} ms':>16}")
    support = mean_support(checkpoint.models["entmax"], windows[0][:8].to(device))
    visible = (config.context + 1) / 2
    lines += ["", f"Average support (keys with weight, of {visible:g} visible ones on average):", ""]
    lines.append("         " + "".join(f"{f'head {h + 1}':>9}" for h in range(config.heads)))
    lines += [f"layer {i + 1:<3}" + "".join(f"{n:9.1f}" for n in row) for i, row in enumerate(support.tolist())]
    lines += ["", f"{sparsity(support, config.context):.1%} of the visible keys got no weight at all."]
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser, minutes: float) -> None:
    """Everything that training can be told, for this program and for the demo. It takes `minutes` if told nothing."""
    parser.set_defaults(default_minutes=minutes)
    text = parser.add_argument_group("text")
    text.add_argument(
        "--text",
        type=lambda value: Path(value) if value else None,
        metavar="PATH",
        help="file or folder to train on (default: the Python standard library's own source files)",
    )
    budget = parser.add_argument_group("budget (training ends with the first that is used up)")
    unless = f"(default: {minutes:g}, unless --steps is given)"
    budget.add_argument("--minutes", type=_positive(float), help=f"of training, both models together {unless}")
    budget.add_argument("--steps", type=_positive(int), help="of training, for each of the models")
    model = parser.add_argument_group("model")
    defaults = GPTConfig()
    model.add_argument("--alpha", type=float, default=defaults.alpha, help="1.01 … 2 (default: %(default)s)")
    sizes = {
        "layers": "transformer blocks",
        "heads": "attention heads a layer",
        "width": "features a token",
        "context": "bytes that the model sees at most",
    }
    for name, what in sizes.items():
        default = getattr(defaults, name)
        model.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: %(default)s)")
    training = parser.add_argument_group("training")
    training.add_argument("--batch", type=_positive(int), default=4, help="windows a step (default: %(default)s)")
    training.add_argument("--learning-rate", type=_positive(float), default=2e-3, help="peak (default: %(default)s)")
    training.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    training.add_argument("--device", type=_device, default="cpu", help="cpu, cuda or cuda:1, … (default: %(default)s)")


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(value: str) -> float:
        number = kind(value)
        if not number > 0:
            raise argparse.ArgumentTypeError(f"must be above zero, got {value}")
        return number

    parse.__name__ = kind.__name__  # argparse names it when the text is no number
    return parse


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"no such device: {name!r}; choose cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("this machine has no CUDA device that torch can use; choose cpu")
    return device


def train_from_options(options: argparse.Namespace) -> tuple[Checkpoint, Corpus]:
    """Reads the text, says what will be trained on what, trains, and reports. Ends the program on unusable options."""
    try:
        config = GPTConfig(options.layers, options.heads, options.width, options.context, alpha=options.alpha)
        corpus = load_corpus(options.text, config.context)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    parameters = sum(p.numel() for p in GPT(config).parameters())
    with StopOnInterrupt() as stop:  # from before people are told of it until they see that training is over
        print(
            f"Text: {corpus.name}, {len(corpus.train):,} bytes to train on and {len(corpus.validation):,} held out.\n"
            f"Two models of {parameters:,} parameters, one with α-entmax (α = {config.alpha:g}) and one with softmax "
            f"attention, see the same batches on {options.device}.\nCtrl-C ends training early.",
            flush=True,
        )
        checkpoint = train(
            corpus,
            config,
            device=options.device,
            steps=options.steps,
            minutes=options.minutes or (None if options.steps else options.default_minutes),
            batch=options.batch,
            learning_rate=options.learning_rate,
            seed=options.seed,
            stop_requested=lambda: stop.requested,
        )
        print("\n" + report(checkpoint, corpus, options.device), flush=True)
    return checkpoint, corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpt.pt"), help="checkpoint to write (default: %(default)s)")
    add_options(parser, minutes=10)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint, _ = train_from_options(options)
    checkpoint.save(options.out)
    print(f"\nSaved both models: {options.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted.")
