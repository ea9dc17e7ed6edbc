"""Trains the same GPT-2 with softmax and with α-entmax attention: loss, tokens a second, and sparsity over training.

Through Hugging Face's Trainer, with the same seed, batches and steps for each kind of attention. By default a small
model learns the bytes of Python's own source files; --model and --data take a checkpoint and a data set from the hub
instead. Each model is saved, and is a row of examples/results, which plot.py draws.
"""

import argparse
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

sys.path.append(str(Path(__file__).resolve().parents[1]))

from adasplash.integrations.transformers import AlphaSchedule, LogAttention, record
from byte_tokenizer import VOCABULARY, byte_tokenizer
from shared.results import FOLDER, Result, append
from token_windows import Texts, bytes_of_files, tokens_of_hub

EXPERIMENT = Path(__file__).resolve().parent.name
ALPHA = 1.5


@dataclass(frozen=True)
class Attention:
    """A kind of attention: what it is called in results, transformers' word for it, which of torch's kernels softmax is
    to run in, and whether the model begins with softmax and is taken to entmax in the first half of its training."""

    name: str
    word: str
    backend: SDPBackend | None = None
    scheduled: bool = False

    def chosen(self):
        """A context in which it is so."""
        return sdpa_kernel(self.backend) if self.backend else nullcontext()


ATTENTIONS = {
    "softmax": Attention("softmax", "sdpa"),
    "flash": Attention("softmax, FlashAttention-2", "sdpa", SDPBackend.FLASH_ATTENTION),
    "cudnn": Attention("softmax, cuDNN", "sdpa", SDPBackend.CUDNN_ATTENTION),
    "entmax": Attention(f"entmax {ALPHA:g}", "adasplash"),
    "scheduled": Attention(f"softmax to entmax {ALPHA:g}", "adasplash", scheduled=True),
}
DEFAULTS = {
    "cpu": dict(attentions=["softmax", "entmax", "scheduled"], context=1024, layers=4, heads=4, width=128, steps=300),
    "cuda": dict(
        attentions=["flash", "cudnn", "entmax", "scheduled"], context=8192, layers=8, heads=8, width=512, steps=700
    ),
}
QUICK = dict(context=256, layers=3, width=96, steps=160, every=40, windows=8)


class Progress(ProgressCallback):
    """Trainer's bar, which tells the latest losses instead of writing a line whenever something is logged."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        losses = {name: f"{float(logs[name]):.3f}" for name in ("loss", "eval_loss") if name in (logs or {})}
        if losses and self.training_bar is not None:
            self.training_bar.set_postfix(losses)

    def on_prediction_step(self, *args, **kwargs) -> None:
        """Evaluations are short."""


class Clock(TrainerCallback):
    """Seconds of each step, without what is done between steps, and after how many of them the model was evaluated."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[float] = []
        self.at_evaluations: list[float] = []

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._started = self._now()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.steps.append(self._now() - self._started)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self.at_evaluations.append(sum(self.steps))


def build_model(options: argparse.Namespace, attention: Attention) -> PreTrainedModel:
    """A GPT-2 from scratch, the same for each kind of attention, or a checkpoint of the hub."""
    torch.manual_seed(options.seed)
    if options.model:
        alpha = {"adasplash_alpha": 1.0} if attention.word == "adasplash" else {}  # a schedule takes it from there
        return AutoModelForCausalLM.from_pretrained(options.model, attn_implementation=attention.word, **alpha)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=options.context,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=options.heads,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, in one kernel
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        loss_type="ForCausalLM",
        attn_implementation=attention.word,
    )
    if attention.word == "adasplash":
        config.adasplash_alpha = ALPHA
    return GPT2LMHeadModel(config)


def train(
    model: PreTrainedModel, attention: Attention, texts: Texts, options: argparse.Namespace
) -> tuple[Trainer, Clock]:
    """Trains it and gives what did so, whose log has the losses and what layers attended to."""
    device = torch.device(options.device)
    arguments = TrainingArguments(
        output_dir=str(options.out / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        learning_rate=options.rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, options.steps // 20),
        weight_decay=0.1,
        adam_beta2=0.98,
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        logging_steps=options.every,
        logging_first_step=True,
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=options.every,
        save_strategy="no",
        report_to=[],
        seed=options.seed,
        remove_unused_columns=False,
    )
    clock = Clock(device)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=texts.training,
        eval_dataset=texts.held_out.spread(options.windows),
        callbacks=[clock],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress)
    if attention.word == "adasplash":
        trainer.add_callback(LogAttention(trainer.log))
        if options.model or attention.scheduled:
            trainer.add_callback(AlphaSchedule(end=ALPHA, over=0.5))
    with attention.chosen():
        trainer.train()
    return trainer, clock


def logged(trainer: Trainer, fact: str) -> tuple[list[int], list[float]]:
    """The steps at which Trainer logged something, and what it was."""
    entries = [(entry["step"], entry[fact]) for entry in trainer.state.log_history if fact in entry]
    return [step for step, _ in entries], [value for _, value in entries]


def keys_a_query(model: PreTrainedModel, texts: Texts) -> float:
    """In the mean over layers, heads and the queries of a held-out window."""
    window = texts.held_out[0]["input_ids"][None].to(model.device)
    half = torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda")  # as in training
    with torch.no_grad(), half, record(model) as seen:
        model(window)
    return seen.numbers()["adasplash/support"]


def result_of(
    attention: Attention, trainer: Trainer, clock: Clock, texts: Texts, options: argparse.Namespace
) -> Result:
    """What came of a training, as a row."""
    entmax = attention.word == "adasplash"
    at, losses = logged(trainer, "eval_loss")
    bits = losses[-1] / math.log(2) / texts.bytes_a_token
    seconds = median(clock.steps)
    tokens = options.batch * options.context
    late = tokens / median(clock.steps[-max(1, len(clock.steps) // 10) :])
    keys = keys_a_query(trainer.model, texts) if entmax else (options.context + 1) / 2
    metrics = {
        "bits_a_byte": bits,
        "tokens_a_second": tokens / seconds,
        "tokens_a_second_late": late,  # in the last tenth of the training: what is sparser is faster
        "steps": at,
        "seconds": clock.at_evaluations,
        "held_out_loss": losses,
        "training_loss": logged(trainer, "loss")[1],
    }
    if entmax:
        metrics["recorded_steps"], metrics["support"] = logged(trainer, "adasplash/support")
        metrics["empty_tiles"] = logged(trainer, "adasplash/empty_tiles")[1]
        metrics["support_of_layers"] = [
            logged(trainer, f"adasplash/layer_{layer}/support")[1]
            for layer in range(trainer.model.config.num_hidden_layers)
        ]
    print(
        f"{attention.name:<26}{bits:7.3f} bits a byte held out,{tokens / seconds:9,.0f} tokens/s "
        f"({late:,.0f} in the last tenth),{keys:7.1f} keys a query",
        flush=True,
    )
    return Result(
        experiment=EXPERIMENT,
        model=options.model or f"GPT-2 of {options.layers} layers, {options.heads} heads, width {options.width}",
        attention=attention.name,
        seed=options.seed,
        metrics=metrics,
        device=options.device,
        setting={
            "text": texts.name,
            "context": options.context,
            "batch": options.batch,
            "steps": options.steps,
            "rate": options.rate,
        },
        seconds_a_step=seconds,
        keys_a_query=keys,
    )


def load_texts(options: argparse.Namespace) -> Texts:
    """What --data says, in the tokens of the model. Raises ValueError where the two do not fit, or the context."""
    name = options.data or ""
    if options.model:
        longest = AutoConfig.from_pretrained(options.model).max_position_embeddings
        if options.context > longest:
            raise ValueError(f"--context must be at most {longest} for {options.model}, got {options.context}")
    if name.startswith("hub:"):
        tokenizer = AutoTokenizer.from_pretrained(options.model) if options.model else byte_tokenizer(options.context)
        return tokens_of_hub(name.removeprefix("hub:"), options.context, tokenizer)
    if options.model:
        raise ValueError("a checkpoint has tokens of its own: --model goes with --data hub:NAME")
    return bytes_of_files(Path(name) if name else None, options.context, with_packages=options.device == "cuda")


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, for a minute on two cores")
    parser.add_argument("--device", choices=DEFAULTS, default="cpu", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build") / EXPERIMENT, help="folder of models (%(default)s)")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of results (examples/results)")
    what = parser.add_argument_group("what is compared, on what")
    what.add_argument("--attentions", nargs="+", choices=ATTENTIONS, help="(those that the device has)")
    what.add_argument("--data", metavar="PATH", help="a file, a folder, hub:NAME or hub:NAME:CONFIG (Python's sources)")
    what.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="NAME", help="a checkpoint of the hub or a folder, instead of a GPT-2")
    model.add_argument("--layers", type=int, help="(%(default)s)")
    model.add_argument("--heads", type=int, help="of each layer (%(default)s)")
    model.add_argument("--width", type=int, help="features a token (%(default)s)")
    model.add_argument("--context", type=int, help="tokens that it sees (%(default)s)")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, help="(%(default)s)")
    training.add_argument("--batch", type=int, default=4, help="windows a step (%(default)s)")
    training.add_argument("--rate", type=float, default=1e-3, help="the highest learning rate (%(default)s)")
    training.add_argument("--every", type=int, default=50, help="steps between two evaluations (%(default)s)")
    training.add_argument("--windows", type=int, default=16, help="of held-out text in one (%(default)s)")
    given = sys.argv[1:] if arguments is None else arguments
    known, _ = parser.parse_known_args([each for each in given if each not in ("-h", "--help")])
    parser.set_defaults(**DEFAULTS[known.device] | (QUICK if known.quick else {}))
    return parser.parse_args(arguments)


def main() -> None:
    options = options_of()
    started = time.perf_counter()
    try:
        texts = load_texts(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{texts.name}: {len(texts.training):,} windows to train on, {len(texts.held_out):,} held out", flush=True)
    results = []
    for name in options.attentions:
        attention = ATTENTIONS[name]
        trainer, clock = train(build_model(options, attention), attention, texts, options)
        trainer.save_model(str(options.out / name))
        texts.tokenizer.save_pretrained(options.out / name)
        results.append(result_of(attention, trainer, clock, texts, options))
    print(f"models: {', '.join(str(options.out / name) for name in options.attentions)}")
    for path in append(*results, folder=options.results):
        print(f"{path}  ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    main()
