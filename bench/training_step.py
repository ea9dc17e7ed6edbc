"""Times a training step of a whole trained model with this attention, beside the same with torch's softmax attention.

    python -m bench.training_step --device cuda    the model of `bench.capture`, which trains it first if it has not yet
    python -m bench.training_step --quick          a small one after a few steps on the CPU, to see that all of it runs

What this attention takes depends on which keys weigh, so the model is one that was trained, and stays as it is: a step
is forward, backward, clipping and AdamW, with a learning rate of 0. All have the same weights; what softmax takes does
not depend on them. The text is held out, the type bfloat16 by autocast. Peers run in turn, as in `bench.attention`.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from adasplash import attention_stats
from bench import capture
from bench.attention import line_of
from bench.lib import machine, results
from bench.lib.case import BOTH, Case
from bench.lib.inputs import TRAINED, Inputs
from bench.lib.reference import empty_tiles, keys_of_block
from bench.lib.results import NO_RATIO, TRAINING_STEP, TRAINING_STEP_PRESET, Row
from bench.lib.runner import Seconds
from bench.lib.timing import Effort, measure
from bench.peers import OURS, PEERS, Peer
from data import load_corpus  # of examples/gpt, which bench.capture puts on the path
from model import GPT, GPTConfig
from train import Trainer

BACKENDS = ("sdpa-flash", "sdpa-cudnn")
BATCH = 4
GOAL = 0.75  # of the best backend's, for the model of bench.capture in batches of BATCH
QUICK = GPTConfig(layers=2, heads=2, width=32, context=128)
QUICK_STEPS = 5


class StepRunner:
    """A copy of the model with one peer's attention."""

    def __init__(self, peer: Peer, trained: GPT, config: GPTConfig, tokens: tuple[Tensor, Tensor]) -> None:
        self.peer = peer
        self._tokens = tokens
        self._trainer = Trainer(replace(config, attention=peer.weights), tokens[0].device, seed=0)
        self.model = self._trainer.model
        self.model.load_state_dict(trained.state_dict())

    def sample(self, calls: int) -> Seconds:
        spent = 0.0
        with self.peer.within():
            for _ in range(calls):
                with torch.autocast(self._tokens[0].device.type, torch.bfloat16):
                    spent += self._trainer.step(*self._tokens, learning_rate=0.0)[1]
        return Seconds(None, None, spent / calls)


def case_of(config: GPTConfig, device: str, batch: int) -> Case:
    """What each of the model's layers gives attention."""
    return Case(
        device=device,
        input="trained",
        batch=batch,
        heads=config.heads,
        length=config.context,
        head_dim=config.width // config.heads,
        dtype="bf16",
        alpha=config.alpha,
    )


def state_of(model: GPT, case: Case, tokens: Tensor) -> Row:
    """What its heads are like on one window: the fields that say so in all rows of the benchmarks."""
    with torch.autocast(case.device, torch.bfloat16):
        captured = capture.capture(model, tokens[:1])
    inputs = Inputs(*(captured[name].to(case.device, case.torch_dtype) for name in Inputs._fields))
    layers = replace(case, batch=len(inputs.query))
    support = attention_stats(*inputs, case.alpha, case.causal).support_size.double().mean().item()
    return {
        "support": round(support, 2),
        "keys_of_block": round(keys_of_block(layers, inputs), 4),
        "empty_tiles": round(empty_tiles(layers, inputs), 4),
    }


def bench(runners: list[StepRunner], effort: Effort, goal: float | None) -> Iterator[Row]:
    """A row for each. Whoever keeps to the goal beside every backend keeps to it beside the best."""
    first_calls = [runner.sample(1).spent for runner in runners]
    timings = measure(runners, effort, first_calls)
    ours = timings[[runner.peer.name for runner in runners].index(OURS)]
    for runner, timing in zip(runners, timings, strict=True):
        ratio = None if runner.peer.name == OURS else ours.ratio_to(timing, BOTH)
        yield {
            "peer": runner.peer.name,
            "what": TRAINING_STEP,
            "unit": "ms",
            **timing.milliseconds(BOTH).fields(),
            "samples": len(timing.seconds[BOTH]),
            **(ratio.fields("ratio") if ratio else NO_RATIO),
            "goal": goal if ratio else None,
            "reached": None if ratio is None or goal is None else ratio.median <= goal,
        }


def trained(options: argparse.Namespace) -> tuple[GPT, GPTConfig]:
    """The model, trained first where that was not done yet."""
    device = torch.device(options.device)
    if options.quick:
        return capture.train(load_corpus(options.text, QUICK.context), QUICK, QUICK_STEPS, device), QUICK
    file = options.model or capture.model_file(TRAINED)
    if not file.exists() and options.model is None:
        print(f"Training a model, once: {file}", flush=True)
        capture.main(["--device", options.device, *(["--text", str(options.text)] if options.text else [])])
    return capture.load_model(file, device)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small model; writes no file unless --out")
    parser.add_argument("--model", type=Path, help="that bench.capture wrote (default: of the input trained)")
    parser.add_argument("--text", type=Path, help="file or folder to read (default: Python's own library)")
    parser.add_argument("--batch", type=int, default=BATCH, help="windows a step (default: %(default)s)")
    parser.add_argument("--peers", nargs="+", choices=BACKENDS, default=BACKENDS, metavar="PEER")
    parser.add_argument("--seconds", type=float, default=10, help="of rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="result file (default: bench/results/DATE-DEVICE-training-step.jsonl)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device here")
    model, config = trained(options)
    tokens = load_corpus(options.text, config.context).validation_windows(options.batch, config.context)
    tokens = tuple(x.to(options.device) for x in tokens)
    case = case_of(config, options.device, len(tokens[0]))
    peers = [PEERS[OURS]]
    for peer in (PEERS[name] for name in options.peers):
        if reason := peer.refuses(case):
            print(f"  ({peer.name} is left out: {reason})", file=sys.stderr)
        else:
            peers.append(peer)
    facts = machine.facts(options.device)
    model_facts = {"layers": config.layers, "width": config.width, **state_of(model, case, tokens[0])}
    print(f"{config.layers} layers, {config.width} wide; {case.title}: {model_facts['support']:g} keys a query")
    runners = [StepRunner(peer, model, config, tokens) for peer in peers]
    goal = GOAL if (config, case.batch) == (capture.CONFIG, BATCH) else None
    effort = Effort(options.seconds, fewest=3) if not options.quick else Effort(0, fewest=3, most=3)
    rows = list(bench(runners, effort, goal))
    for row in rows:
        print(line_of(row))
    file = options.out or (None if options.quick else results.path_of(facts, TRAINING_STEP_PRESET))
    if file:
        common = {"preset": TRAINING_STEP_PRESET, "entry": 0, **case.to_dict(), **model_facts}
        results.append(file, [{**facts, **common, **row} for row in rows])
        print(f"Written to {file}")


if __name__ == "__main__":
    main()
