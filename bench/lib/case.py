"""What is measured: one attention problem, as plain data that also travels to other processes and into result files."""

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
PASSES = (FORWARD, BACKWARD, BOTH)


@dataclass(frozen=True)
class Case:
    """One self-attention problem: query, key and value are (batch, heads, length, head_dim).

    kv_heads: of key and value; 0 is as many as of query.
    input: where query and key come from, see `bench.lib.inputs`.
    threads: CPU threads; 0 is all of them.
    """

    device: str = "cpu"
    input: str = "gaussian:1.5"
    batch: int = 1
    heads: int = 4
    length: int = 4096
    head_dim: int = 64
    dtype: str = "fp32"
    alpha: float = 1.5
    causal: bool = True
    threads: int = 0
    seed: int = 0
    kv_heads: int = 0

    @property
    def heads_of_key(self) -> int:
        return self.kv_heads or self.heads

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def title(self) -> str:
        mask = "causal" if self.causal else "non-causal"
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.threads else ""
        heads = f"{self.heads}/{self.kv_heads}" if self.kv_heads else self.heads
        return (
            f"{self.input}, N={self.length}, D={self.head_dim}, B={self.batch}, H={heads}, {self.dtype}, "
            f"α={self.alpha:g}, {mask}{threads}"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def grid(**values: list[Any]) -> list[Case]:
    """The cases of a sweep: every combination of the listed values, the first name varying slowest."""
    return [Case(**dict(zip(values, combination, strict=True))) for combination in product(*values.values())]
