"""What a mask function of transformers says, read without calling it for every query and key.

transformers builds masks of nested Python functions. In eager code their closures tell all. While code is compiled
closures cannot be read; then the arguments beside the function tell which of transformers' functions built it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils


@dataclass(frozen=True)
class Pattern:
    """Which keys a query may see, padding aside."""

    #: None of the later ones.
    causal: bool
    #: How far it sees, to the left if causal, else both ways; None for no limit.
    window: int | None = None
    #: Keys of its own sequence only, of several packed into a row: which sequence each position belongs to, (B, M), or
    #: in compiled code the function that can be asked.
    packed: Tensor | Callable | None = None


def read(mask_function: Callable, reach: int, arguments: dict[str, Any]) -> Pattern | None:
    """The pattern, None for one that is neither of these.

    Args:
        reach: no key that is asked about is at this position or behind it.
        arguments: what transformers hands to a mask function beside these.
    """
    if arguments.get("use_vmap"):  # or_mask_function, and_mask_function: anything
        return None
    if torch.compiler.is_compiling():
        return _read_compiled(mask_function, arguments)
    found = _Parts(reach)
    found.visit(mask_function)
    return found.pattern()


def _read_compiled(mask_function: Callable, arguments: dict[str, Any]) -> Pattern | None:
    window, name = arguments.get("local_size"), mask_function.__name__
    if "allow_is_bidirectional_skip" in arguments:
        simple = name == ("bidirectional_mask_function" if window is None else "and_mask")
        return Pattern(causal=False, window=window) if simple else None
    if window is not None and window == getattr(arguments.get("config"), "attention_chunk_size", None):
        return None
    if name == "causal_mask_function":
        return Pattern(causal=True)
    if name != "and_mask":
        return None
    # Packed or, with a window, perhaps not; that one position after the other is not hidden says which.
    return Pattern(causal=True, window=None if window is None else window - 1, packed=mask_function)


class _Parts:
    """What a mask function is made of."""

    def __init__(self, reach: int):
        self.reach = reach
        self.causal = self.known = False
        self.window: int | None = None
        self.both_ways: int | None = None
        self.packed: Tensor | None = None
        self.strange = False

    def pattern(self) -> Pattern | None:
        if self.strange or not self.known:
            return None
        if self.causal and self.both_ways is None:
            return Pattern(True, self.window, self.packed)
        if not self.causal and self.window is None and self.packed is None:
            return Pattern(False, self.both_ways)
        return None

    def visit(self, function: Callable) -> None:
        closure = _closure(function)
        built_by = getattr(function, "__qualname__", "").partition(".")[0]
        if function is masking_utils.causal_mask_function:
            self.causal = self.known = True
        elif function is masking_utils.bidirectional_mask_function:
            self.known = True
        elif getattr(function, "__module__", None) != masking_utils.__name__:
            self.strange = True
        elif built_by == "and_masks":
            for part in closure["mask_functions"]:
                self.visit(part)
        elif built_by == "sliding_window_overlay":
            self.window = closure["sliding_window"] - 1
        elif built_by == "sliding_window_bidirectional_overlay":
            self.both_ways = closure["sliding_window"]
        elif built_by == "chunked_overlay":
            self.strange |= self.reach > closure["chunk_size"]
        elif built_by == "remap_positions_for_packed_sequence":
            self.visit(closure["mask_function"])
        elif built_by == "packed_sequence_mask_function":
            self.packed = closure["packed_sequence_mask"]
        else:
            self.strange = True


def _closure(function: Callable) -> dict[str, Any]:
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return {name: cell.cell_contents for name, cell in zip(names, function.__closure__ or (), strict=True)}
