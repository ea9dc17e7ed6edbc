"""``EntmaxNormaliser``, the α of one attention layer: a number, a tensor that a schedule fills, or a parameter."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adasplash.modules import EntmaxAttention


class EntmaxNormaliser(nn.Module):
    """What the weights of one attention layer are made with. It is ``entmax_norm`` of the attention module; a parameter
    of that path ends in ``_norm.alpha_logit``, which Trainer, like biases and norms, leaves out of weight decay.

    α is float32 whatever type the model is moved to, as half types cannot tell apart what training changes.

    Args:
        heads: of query.
        alpha: a number, or one for each head.
        learn: α of each head is a parameter, ``alpha_logit`` as in :class:`adasplash.EntmaxAttention`.
        scheduled: α is a tensor for its number too, so that compiled code serves every value.
    """

    def __init__(self, heads: int, alpha: float | list[float], learn: bool = False, scheduled: bool = False):
        super().__init__()
        if isinstance(alpha, list) and len(alpha) != heads:
            raise ValueError(f"adasplash: alpha must have a number for each of {heads} heads, got {len(alpha)}")
        self.heads, self.start = heads, alpha
        self.recorders: list[Any] = []  # while record() looks on
        self.number = alpha if isinstance(alpha, float) and not learn and not scheduled else None
        logit = nn.Parameter(torch.empty(heads, dtype=torch.float32)) if learn else None
        self.register_parameter("alpha_logit", logit)
        shape = [heads] if isinstance(alpha, list) else []
        held = None if learn or self.number is not None else torch.empty(shape, dtype=torch.float32)
        self.register_buffer("alpha", held, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to what the config says, α that are learned included."""
        numbers = self.start if isinstance(self.start, list) else [self.start]
        if self.alpha_logit is not None:
            low, high = EntmaxAttention.lowest_alpha, EntmaxAttention.highest_alpha
            shares = [(number - low) / (high - low) for number in numbers]
            logits = [math.log(share / (1 - share)) for share in shares]
            logits = torch.tensor(logits, dtype=torch.float64, device="cpu")
            self.alpha_logit.copy_(logits.expand(self.heads))
        if self.alpha is not None:
            numbers = torch.tensor(numbers, dtype=torch.float64, device="cpu")
            self.alpha.copy_(numbers.reshape(self.alpha.shape))

    def forward(self) -> float | Tensor:
        """α as ``entmax_attn`` takes it. Layers call the module, so that what gathers its parameter does."""
        return self.value()

    def value(self) -> float | Tensor:
        """α of this moment: a number, () or (heads,)."""
        if self.number is not None:
            return self.number
        if self.alpha_logit is None:
            return self.alpha
        logit = self.alpha_logit
        if logit.dtype != torch.float64:
            logit = logit.float()
        low, high = EntmaxAttention.lowest_alpha, EntmaxAttention.highest_alpha
        return low + (high - low) * torch.sigmoid(logit)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EntmaxNormaliser":
        def keeping_its_type(x: Tensor) -> Tensor:
            moved = fn(x)
            narrower = moved.dtype != x.dtype and moved.is_floating_point() and moved.dtype.itemsize < x.dtype.itemsize
            return x.to(moved.device) if narrower else moved

        return super()._apply(keeping_its_type, recurse)

    def extra_repr(self) -> str:
        kind = "learned" if self.alpha_logit is not None else "in a tensor" if self.number is None else self.number
        return f"heads={self.heads}, alpha={kind}"
