"""A tokenizer for which every byte is a token, and its value the token's id."""

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

VOCABULARY = 256


def characters() -> list[str]:
    """The printable character that `tokenizers` writes for each byte: itself for most that are printable, and one from
    256 on for each of the others in turn."""
    kept = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(VOCABULARY) if byte not in kept)
    moved = {byte: VOCABULARY + place for place, byte in enumerate(others)}
    return [chr(moved.get(byte, byte)) for byte in range(VOCABULARY)]


def byte_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """For text of any kind, with no special tokens: it adds nothing, and gives back what it was given."""
    tokenizer = Tokenizer(BPE(vocab={each: byte for byte, each in enumerate(characters())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=context, clean_up_tokenization_spaces=False
    )
