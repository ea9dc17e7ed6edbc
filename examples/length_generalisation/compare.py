"""Trains small transformers on short sequences and tests them on sequences up to 64 times as long.

For each task (maximum retrieval, associative recall, copying) and each kind of attention (softmax, α-entmax with
α = 1.5 and with a learned α, each with scores that are scaled by length and without) it trains one model for each seed.
All else is the same for all. Each model is a row of examples/results; plot.py draws them.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))

from model_stack import Attention, Sizes, Stack
from shared.results import FOLDER, Result, append
from tasks import NONE, TASKS, Batch, Task

EXPERIMENT = Path(__file__).resolve().parent.name
ATTENTIONS = {
    "softmax": Attention(alpha=1.0),
    "entmax": Attention(alpha=1.5),
    "learned": Attention(alpha=1.5, learned=True),
    "softmax-scaled": Attention(alpha=1.0, scaled=True),
    "entmax-scaled": Attention(alpha=1.5, scaled=True),
    "learned-scaled": Attention(alpha=1.5, learned=True, scaled=True),
}
TIMES = (1, 2, 4, 8, 16, 32, 64)  # the trained length
TOKENS_AT_ONCE = 1 << 18  # in tests, of all models together
QUICK = dict(
    tasks=["copying"],
    attentions=["softmax", "entmax", "softmax-scaled", "entmax-scaled"],
    seeds=[0],
    length=32,
    steps=1000,
    batch=16,
    sequences=32,
)
LOOK = 20  # steps between two looks at the clock, each of which waits for the device


@dataclass
class Training:
    """How long, and what was seen of it. Losses are means over the models."""

    losses: list[float]  # one for each look
    seconds_a_step: float  # the median


def loss_of(stack: Stack, batch: Batch) -> Tensor:
    """The sum of the mean losses of the models, so that each has the gradient of its own."""
    logits = stack(batch.tokens, batch.sizes)
    return len(logits) * F.cross_entropy(logits.flatten(0, 2), batch.answers.flatten(), ignore_index=NONE)


def train(stack: Stack, task: Task, *, length: int, steps: int, batch: int, rate: float, seed: int) -> Training:
    """Trains on sequences of even lengths, from half of `length` to all of it: `batch` a step for each model."""
    device, models = stack.embedding.device, len(stack.embedding)
    optimizer = torch.optim.AdamW(stack.parameters(), lr=rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    generator = torch.Generator(device).manual_seed(seed)
    halves = torch.randint(length // 4, length // 2 + 1, (steps,), generator=torch.Generator().manual_seed(seed))
    losses, seconds, started = [], [], time.perf_counter()
    bar = tqdm(halves.tolist(), leave=False, mininterval=0.2 if sys.stderr.isatty() else 10)
    for step, half in enumerate(bar, 1):
        loss = loss_of(stack, task.make((models, batch, 2 * half), generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % LOOK == 0 or step == steps:
            losses.append(loss.item() / models)
            seconds.append((time.perf_counter() - started) / ((step - 1) % LOOK + 1))
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
            started = time.perf_counter()
    return Training(losses, median(seconds))


@torch.no_grad()
def accuracy(stack: Stack, task: Task, *, length: int, sequences: int, seed: int) -> list[float]:
    """The share of right answers of each model in the last eighth of sequences of this length."""
    generator = torch.Generator(stack.embedding.device).manual_seed(seed)
    models, last = len(stack.embedding), length // 8
    at_once = max(1, TOKENS_AT_ONCE // (models * length))
    right = asked = torch.zeros(models, dtype=torch.long, device=generator.device)
    for start in range(0, sequences, at_once):
        batch = task.make((models, min(at_once, sequences - start), length), generator)
        answers = batch.answers[..., -last:]
        given = stack(batch.tokens, batch.sizes)[..., -last:, :].argmax(-1)
        right = right + (given == answers).sum((1, 2))
        asked = asked + (answers != NONE).sum((1, 2))
    return (right / asked).tolist()


def compare(options: argparse.Namespace) -> list[Result]:
    """Trains and tests the models of all tasks and attentions that are asked for; prints and gives their results."""
    sizes = Sizes(options.layers, options.heads, options.width)
    results = []
    for name in options.tasks:
        task = TASKS[name]
        trained = options.length or task.trained_length
        steps = options.steps or task.steps
        lengths = [times * trained for times in options.times]
        print(f"\n{name}: right answers in percent, after training at {trained}\n{'length':<26}", end="")
        print("".join(f"{length:7d}" for length in lengths), flush=True)
        for attention in (ATTENTIONS[each] for each in options.attentions):
            stack = Stack(task.inputs, task.outputs, sizes, attention, options.seeds).to(options.device)
            schedule = dict(steps=steps, batch=options.batch, rate=options.rate)
            training = train(stack, task, length=trained, seed=options.seeds[0], **schedule)
            tests = dict(sequences=options.sequences, seed=2**31 + options.seeds[0])  # no sequence that was trained on
            right = [accuracy(stack, task, length=length, **tests) for length in lengths]
            for model, seed in enumerate(options.seeds):
                shares = [each[model] for each in right]
                print(
                    f"{attention.name:<19}seed {seed:<2}" + "".join(f"{100 * share:7.1f}" for share in shares),
                    flush=True,
                )
                metrics = {"length": lengths, "accuracy": shares, "losses": training.losses}
                if attention.learned:
                    metrics["alpha"] = stack.alphas()[model].tolist()
                results.append(
                    Result(
                        experiment=EXPERIMENT,
                        model=f"{sizes.layers} layers, {sizes.heads} heads, width {sizes.width}",
                        attention=attention.name,
                        seed=seed,
                        metrics=metrics,
                        device=options.device,
                        setting={"task": name, "trained_length": trained, **schedule},
                        seconds_a_step=training.seconds_a_step,
                    )
                )
    return results


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is compared")
    what.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(default: all)")
    some = [name for name in ATTENTIONS if name != "learned-scaled"]
    what.add_argument("--attentions", nargs="+", choices=ATTENTIONS, default=some, help=f"(default: {' '.join(some)})")
    what.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="a model each (default: 0 1 2)")
    model = parser.add_argument_group("model")
    model.add_argument("--layers", type=int, default=2, help="(default: %(default)s)")
    model.add_argument("--heads", type=int, default=4, help="of each layer, an even number (default: %(default)s)")
    model.add_argument("--width", type=int, default=64, help="features a token (default: %(default)s)")
    training = parser.add_argument_group("training")
    training.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    training.add_argument("--length", type=int, help="of the longest sequences (default: the task's own, 16 to 64)")
    training.add_argument("--steps", type=int, help="(default: as many as the task takes)")
    training.add_argument("--batch", type=int, default=64, help="sequences a step (default: %(default)s)")
    training.add_argument("--rate", type=float, default=3e-3, help="the highest learning rate (default: %(default)s)")
    tests = parser.add_argument_group("tests")
    tests.add_argument(
        "--times", nargs="+", type=int, default=list(TIMES), help="the trained length (default: 1 2 4 … 64)"
    )
    tests.add_argument("--sequences", type=int, default=256, help="of each length (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of results (default: examples/results)")
    parser.add_argument("--quick", action="store_true", help="copying alone, one seed, in a minute on two cores")
    if "--quick" in (sys.argv[1:] if arguments is None else arguments):
        parser.set_defaults(**QUICK)
    return parser.parse_args(arguments)


def main() -> None:
    options = options_of()
    started = time.perf_counter()
    for path in append(*compare(options), folder=options.out):
        print(f"\n{path}")
    print(f"({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    main()
