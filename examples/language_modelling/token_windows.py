"""What a language model is trained on and tested on: windows of tokens, of Python's own sources or of a data set."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpt"))

from byte_tokenizer import byte_tokenizer
from data import load_corpus


class Windows(Dataset):
    """Tokens (T,) cut into windows of `context`, as Trainer takes them; what is left at the end is left out."""

    def __init__(self, tokens: Tensor, context: int) -> None:
        self.windows = tokens[: len(tokens) // context * context].view(-1, context)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        window = self.windows[place].long()
        return {"input_ids": window, "labels": window}  # the model shifts labels itself

    def spread(self, count: int) -> "Windows":
        """At most so many of them, evenly spread."""
        places = torch.linspace(0, len(self) - 1, min(count, len(self)), dtype=torch.float64).long()
        return Windows(self.windows[places].flatten(), self.windows.shape[1])


@dataclass(frozen=True)
class Texts:
    """Windows to train on and windows held out, and the tokenizer whose tokens they are."""

    name: str
    training: Windows
    held_out: Windows
    bytes_a_token: float  # of the held-out text
    tokenizer: PreTrainedTokenizerBase


def bytes_of_files(path: Path | None, context: int, with_packages: bool) -> Texts:
    """Every byte a token. path: a file or a folder, or None for Python's own sources (and those of the installed
    packages). Raises ValueError for too little text, OSError if it cannot be read."""
    corpus = load_corpus(path, context, max_bytes=120 << 20, with_packages=with_packages)
    windows = (Windows(part, context) for part in (corpus.train, corpus.validation))
    return Texts(corpus.name, *windows, bytes_a_token=1.0, tokenizer=byte_tokenizer(context))


def tokens_of_hub(name: str, context: int, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """The column `text` of a data set of the Hugging Face hub, NAME or NAME:CONFIG, whose test or validation split, or
    if there is none the last tenth, is held out."""
    from datasets import load_dataset

    data = load_dataset(*name.split(":", 1))
    training = data["train"]
    held_out = next((data[split] for split in ("test", "validation") if split in data), None)
    if held_out is None:
        training, held_out = training.train_test_split(test_size=0.1, shuffle=False).values()

    def tokens(texts: list[str]) -> Tensor:
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return torch.tensor([token for each in encoded for token in each])

    held_out_texts = list(held_out["text"])
    held_out_tokens = tokens(held_out_texts)
    size = sum(len(text.encode()) for text in held_out_texts)
    windows = Windows(tokens(list(training["text"])), context), Windows(held_out_tokens, context)
    return Texts(name, *windows, bytes_a_token=size / len(held_out_tokens), tokenizer=tokenizer)
