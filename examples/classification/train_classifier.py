"""Trains the same text classifier with softmax and with α-entmax attention: same seed, same batches, same steps."""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

sys.path.append(str(Path(__file__).resolve().parents[1]))

from adasplash.integrations.transformers import AlphaSchedule, configure, record
from classifiers import ATTENTION, SHAPES, Size, attention_keys, attention_name, build, tokenizer_for
from labelled_texts import LabelledTexts, load
from shared import results
from shared.steps import StepTimes
from shared.table import table

#: What the program does if told nothing: on a GPU, and with --quick.
FULL = {
    "layers": 6,
    "heads": 6,
    "width": 384,
    "length": 192,
    "vocabulary": 16_000,
    "dropout": 0.1,
    "train_texts": None,
    "test_texts": None,
    "batch": 160,
    "epochs": 3.0,
    "learning_rate": 5e-4,
    "seeds": [0],
}
QUICK = {
    "layers": 2,
    "heads": 2,
    "width": 64,
    "length": 48,
    "vocabulary": 4_000,
    "dropout": 0.0,
    "train_texts": 6_400,
    "test_texts": 1_000,
    "batch": 32,
    "epochs": 1.0,
    "learning_rate": 3e-3,
    "seeds": [0],
}
#: Of the training of a scheduled model, until it is all entmax.
_SCHEDULE = 0.6
#: How much faster than weights an α is learned: Adam moves a parameter by its rate a step, and that of weights would
#: leave α where it began.
_FASTER_ALPHA = 20
#: Texts whose attention is looked at.
_RECORDED = 256


class Tokens(Dataset):
    """Texts as token ids, with their classes."""

    def __init__(self, texts: list[tuple[str, int]], tokenizer: PreTrainedTokenizerBase):
        self.ids = tokenizer([text for text, _ in texts], truncation=True)["input_ids"]
        self.labels = [label for _, label in texts]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> dict:
        return {"input_ids": self.ids[place], "labels": self.labels[place]}


class ClassifierTrainer(Trainer):
    """A Trainer that learns α faster than weights."""

    def create_optimizer(self, *arguments) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*arguments)
        logits = [value for name, value in self.model.named_parameters() if name.endswith("alpha_logit")]
        if logits:
            for group in optimizer.param_groups:
                group["params"] = [value for value in group["params"] if all(value is not logit for logit in logits)]
            rate = _FASTER_ALPHA * self.args.learning_rate
            optimizer.add_param_group({"params": logits, "lr": rate, "weight_decay": 0.0})
        return optimizer


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_set: Tokens,
    test_set: Tokens,
    attention: str,
    seed: int,
    options: argparse.Namespace,
) -> tuple[dict[str, float], StepTimes]:
    """Trains `model` in place.

    Returns:
        metrics on the texts held out, and how long steps took.
    """
    times = StepTimes()
    on_gpu = options.device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=2 * options.batch,
            num_train_epochs=options.epochs,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,  # a share
            weight_decay=0.01,
            optim="adamw_torch_fused" if on_gpu else "adamw_torch",
            seed=seed,
            data_seed=seed,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            dataloader_num_workers=4 if on_gpu else 0,
            dataloader_persistent_workers=on_gpu,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
        )
        trainer = ClassifierTrainer(
            model,
            arguments,
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=train_set,
            callbacks=[times],
        )
        if attention == "scheduled":
            trainer.add_callback(AlphaSchedule(end=options.alpha, over=_SCHEDULE))
        trainer.train()
        predicted = trainer.predict(test_set)
    logits = torch.from_numpy(predicted.predictions)
    labels = torch.tensor(test_set.labels)
    metrics = {
        "accuracy": (logits.argmax(-1) == labels).float().mean().item(),
        "loss": torch.nn.functional.cross_entropy(logits, labels).item(),
    }
    return metrics, times


@torch.no_grad()
def attended(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, test_set: Tokens) -> dict[str, float]:
    """What the layers of `model` attend to in some texts held out, as `record` has it. Softmax goes by α = 1."""
    if model.config._attn_implementation != "adasplash":
        model = configure(model, alpha=1.0)
    model.eval()
    items = [{"input_ids": ids} for ids in test_set.ids[:_RECORDED]]
    with record(model) as seen:
        for start in range(0, len(items), 32):
            model(**tokenizer.pad(items[start : start + 32], return_tensors="pt").to(model.device))
    numbers = seen.numbers(prefix="")
    alpha = torch.stack([layer.alpha for layer in seen.layers.values()])
    return {"keys": numbers["/support"], "alpha least": alpha.min().item(), "alpha most": alpha.max().item()}


def run(texts: LabelledTexts, options: argparse.Namespace) -> list[results.Result]:
    """Trains every model with every attention and seed; rows are written as they come."""
    # With cuDNN's attention softmax became NaN in ModernBERT's local layers, on torch 2.11 and in bfloat16.
    torch.backends.cuda.enable_cudnn_sdp(False)
    size = Size(options.layers, options.heads, options.width, options.length, options.vocabulary, options.dropout)
    rows = []
    for name in options.model:
        tokenizer = tokenizer_for(name, (text for text, _ in texts.train), size)
        train_set, test_set = Tokens(texts.train, tokenizer), Tokens(texts.test, tokenizer)
        for seed in options.seeds:
            for attention in options.attention:
                label = attention_name(attention, options.alpha)
                print(f"{name}, {label}, seed {seed}", flush=True)
                model = build(name, texts.classes, tokenizer, size, seed, **attention_keys(attention, options.alpha))
                metrics, times = train(model, tokenizer, train_set, test_set, attention, seed, options)
                if options.save:
                    folder = options.save / f"{Path(name).name}-{attention}-{seed}"
                    model.save_pretrained(folder)
                    tokenizer.save_pretrained(folder)
                seen = attended(model, tokenizer, test_set)
                if attention == "learned":
                    metrics |= {"alpha least": seen["alpha least"], "alpha most": seen["alpha most"]}
                row = results.Result(
                    "classification",
                    name,
                    label,
                    seed,
                    metrics,
                    device=options.device,
                    setting={
                        "data": texts.name,
                        "form": "quick" if options.quick else "full",
                        "classes": len(texts.classes),
                        "train texts": len(texts.train),
                        "test texts": len(texts.test),
                        "epochs": options.epochs,
                        "batch": options.batch,
                        "learning rate": options.learning_rate,
                        "layers": model.config.num_hidden_layers,
                        "width": model.config.hidden_size,
                        "length": options.length,
                    },
                    seconds_a_step=times.median,
                    keys_a_query=seen["keys"],
                )
                results.append(row, folder=options.results)
                rows.append(row)
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, with what is not given filled in for the quick or the full form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models on a part of the texts: a minute on a CPU")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--data", metavar="FILE|hub:NAME",
        help="a file that shared/descriptions.py wrote, or a data set of the hub "
        "(default: descriptions of Debian's packages, fetched once)",
    )  # fmt: skip
    parser.add_argument("--text-column", default="text", help="of a data set of the hub (default: %(default)s)")
    parser.add_argument("--label-column", default="label", help="of a data set of the hub (default: %(default)s)")
    parser.add_argument(
        "--model", nargs="+", default=list(SHAPES), metavar="NAME",
        help=f"{' or '.join(SHAPES)}, with random weights, or a checkpoint of the hub (default: {' '.join(SHAPES)})",
    )  # fmt: skip
    parser.add_argument(
        "--attention", nargs="+", choices=ATTENTION, default=["softmax", "entmax", "learned"],
        help="what is compared; scheduled is softmax that is taken to entmax while it is trained "
        "(default: softmax entmax learned)",
    )  # fmt: skip
    parser.add_argument("--alpha", type=float, default=1.5, help="1.01 … 2 (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", help="one training for each")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep the models there, for picture.py")
    parser.add_argument(
        "--results", type=Path, default=results.FOLDER, metavar="FOLDER", help="for rows (default: %(default)s)"
    )
    sizes = parser.add_argument_group("size (defaults: full, quick)")
    for name, full in FULL.items():
        if name != "seeds":
            kind = type(QUICK[name])
            shown = "all" if full is None else full
            sizes.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"(default: {shown}, {QUICK[name]})")
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    options = parse()
    texts = load(options.data, options.text_column, options.label_column).part(options.train_texts, options.test_texts)
    print(
        f"{texts.name}: {len(texts.train):,} texts to train on and {len(texts.test):,} held out, of "
        f"{len(texts.classes)} classes; the most frequent is {texts.chance:.1%}"
    )
    rows = run(texts, options)
    print("\n" + table(rows, {"accuracy": ".1%", "loss": ".3f"}))


if __name__ == "__main__":
    main()
