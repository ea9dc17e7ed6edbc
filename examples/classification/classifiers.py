"""The models that are compared, of one shape and one start, and their tokenizer."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ModernBertConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    set_seed,
)

import adasplash.integrations.transformers  # noqa: F401  registers the word
from shared import debian

#: softmax; entmax with a fixed α; α of each head learned; softmax that is taken to entmax while it is trained.
ATTENTION = ("softmax", "entmax", "learned", "scheduled")
SHAPES = ("roberta", "modernbert")


@dataclass(frozen=True)
class Size:
    """Of a model that is made from nothing."""

    layers: int
    heads: int
    width: int
    length: int  # tokens of a text at most
    vocabulary: int
    dropout: float = 0.0  # of what layers compute; attention has none


def attention_keys(attention: str, alpha: float) -> dict[str, Any]:
    """The keys of a config that choose the attention. One that is scheduled begins as softmax."""
    if attention == "softmax":
        return {"attn_implementation": "sdpa"}
    start = 1.0 if attention == "scheduled" else alpha
    keys = {"attn_implementation": "adasplash", "adasplash_alpha": start}
    return keys | {"adasplash_learn_alpha": True} if attention == "learned" else keys


def attention_name(attention: str, alpha: float) -> str:
    """As results have it."""
    return {"entmax": f"entmax {alpha:g}", "scheduled": f"softmax → entmax {alpha:g}"}.get(attention, attention)


def build(
    name: str, classes: list[str], tokenizer: PreTrainedTokenizerBase, size: Size, seed: int, **keys: Any
) -> PreTrainedModel:
    """A classifier: of one of SHAPES with random weights, or a checkpoint of the hub or of a folder.

    Args:
        name: "roberta", "modernbert", or what from_pretrained takes.
        keys: see `attention_keys`. Models of the same seed start with the same weights whatever these are.
    """
    set_seed(seed)
    labels = {"id2label": dict(enumerate(classes)), "label2id": {c: place for place, c in enumerate(classes)}}
    if name not in SHAPES:
        return AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=len(classes), ignore_mismatched_sizes=True, **labels, **keys
        )
    implementation = keys.pop("attn_implementation")
    common = dict(
        # A projection keeps the size of what it is given; with the usual 0.02 so small a model starts all but closed.
        initializer_range=size.width**-0.5,
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        num_labels=len(classes),
        **labels,
        **keys,
    )
    if name == "roberta":
        # Positions count on from the number of the padding token.
        positions = size.length + tokenizer.pad_token_id + 1
        config = RobertaConfig(
            **common,
            intermediate_size=4 * size.width,
            max_position_embeddings=positions,
            type_vocab_size=1,
            hidden_dropout_prob=size.dropout,
            attention_probs_dropout_prob=0.0,
        )
    else:
        config = ModernBertConfig(
            **common,
            intermediate_size=2 * size.width,
            max_position_embeddings=size.length,
            local_attention=64,
            global_attn_every_n_layers=2,
            cls_token_id=tokenizer.bos_token_id,
            sep_token_id=tokenizer.eos_token_id,
            mlp_dropout=size.dropout,
            classifier_pooling="mean",
        )
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=implementation)
    if name == "roberta":
        # Positions begin at zero: at random they would be half of what a token is, before words mean anything.
        torch.nn.init.zeros_(model.roberta.embeddings.position_embeddings.weight)
    return model


def tokenizer_for(name: str, texts: Iterable[str], size: Size) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, or one that is trained on texts (and kept for the next time)."""
    if name not in SHAPES:
        return AutoTokenizer.from_pretrained(name, model_max_length=size.length)
    texts = list(texts)
    facts = hashlib.sha256(f"{size.vocabulary}\n".encode())
    for text in texts:
        facts.update(text.encode())
    file = debian.cache_folder() / f"tokenizer-{facts.hexdigest()[:16]}.json"
    if file.exists():
        trained = Tokenizer.from_file(str(file))
    else:
        trained = _train(texts, size.vocabulary)
        trained.save(str(file))
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        model_max_length=size.length,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        cls_token="<s>",
        sep_token="</s>",
    )


def _train(texts: list[str], vocabulary: int) -> Tokenizer:
    """Pairs of bytes that are frequent, as RoBERTa has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def load(folder: str, **keys: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A classifier and its tokenizer as `train_classifier.py` saved them."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, **keys)
    return model.eval(), AutoTokenizer.from_pretrained(folder)
