"""Which argument of a public function is of the wrong kind, in one sentence that names both.

Eager code asks before a call for what torch's own parser would take for something else (None for False, True for 1, 5
for (5, 5)), and after one that failed for what made it fail. TorchScript's types leave nothing to ask.
"""

import numbers
import re
from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor

NUMBER = "a number"
NUMBER_OR_TENSOR = "a number or a tensor"
INTEGER = "an integer"
BOOL = "True or False"
TENSOR = "a tensor"
OPTIONAL_TENSOR = "a tensor or None"
SCALE = "a number, a tensor of one element or None"
WINDOW = "two integers (left, right), -1 for no limit"
LENGTH = "an integer or a tensor of one"


def describe(value: object) -> str:
    """A value in an error message."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of sizes {list(value.shape)}"
    text = repr(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return text
    return f"{type(value).__name__} {text if len(text) <= 60 and text.isprintable() else ''}".strip()


def refuse(function: str, name: str, wanted: str, value: object) -> NoReturn:
    raise TypeError(f"{function}: {name} must be {wanted}, got {describe(value)}")


def check(function: str, name: str, wanted: str, value: object) -> None:
    """Raises TypeError unless `value` is of the kind `wanted`, one of the names above."""
    if not _fits(wanted, value):
        refuse(function, name, wanted, value)


def explain(
    function: str,
    error: Exception,
    given: Mapping[str, tuple[str, object]],
    op: str,
    names: Mapping[str, str] | None = None,
) -> NoReturn:
    """Raises what `error`, of a call of `op`, means to the caller of `function`.

    Args:
        given: by the op's name for an argument, of which kind it must be and what it was.
        names: the function's names for arguments, by the op's, where they differ.
    """
    names = names or {}
    for name, (wanted, value) in given.items():
        if not _fits(wanted, value):
            raise TypeError(f"{function}: {names.get(name, name)} must be {wanted}, got {describe(value)}") from None
    message = str(error)
    found = re.match(rf"_?{op}(_forward|_summary)?: ", message)
    if not found or (function == op and not found.group(1) and not names):
        raise error
    said = message[found.end() :]
    if names:
        said = re.sub(r"\b(" + "|".join(names) + r")\b", lambda name: names[name.group()], said)
    raise type(error)(f"{function}: {said}") from None


def _fits(wanted: str, value: object) -> bool:
    if isinstance(value, Tensor):
        if wanted == SCALE:
            return value.numel() == 1 and value.dtype != torch.bool and not value.is_complex()
        if wanted == LENGTH:
            return value.numel() == 1 and not value.is_floating_point() and value.dtype != torch.bool
        return wanted in (TENSOR, OPTIONAL_TENSOR, NUMBER_OR_TENSOR)
    # What has __torch_function__ stands for something else, while a graph is recorded. That is asked last: torch 2.11
    # cannot compile the question for the class of None.
    return _is_of_kind(wanted, value) or hasattr(type(value), "__torch_function__")


def _is_of_kind(wanted: str, value: object) -> bool:
    """Of what is no tensor."""
    if value is None:
        return wanted in (OPTIONAL_TENSOR, SCALE)
    if isinstance(value, (bool, torch.SymBool)):
        return wanted == BOOL
    if wanted in (INTEGER, LENGTH):
        return _is_integer(value)
    if wanted in (NUMBER, NUMBER_OR_TENSOR, SCALE):
        return isinstance(value, (float, int, numbers.Real, torch.SymFloat, torch.SymInt))
    if wanted == WINDOW:
        sides = isinstance(value, (tuple, list)) and len(value) == 2 and all(_is_integer(side) for side in value)
        return sides and all(not isinstance(side, int) or abs(side) < 2**63 for side in value)
    return False


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, numbers.Integral, torch.SymInt)) and not isinstance(value, bool)
