"""``EntmaxAttention``, a multi-head attention layer over ``entmax_attn``."""

import math
from typing import Final, Optional, Tuple  # noqa: UP035  (TorchScript knows these names on every torch we support)

import torch
from torch import Tensor, nn

from adasplash._arguments import BOOL, INTEGER, NUMBER, OPTIONAL_TENSOR, TENSOR, WINDOW, check
from adasplash.functional import draw_seed, entmax_attn


class EntmaxAttention(nn.Module):
    """Multi-head α-entmax attention with its projections, for models that are written with it.

    Names and initialisation are those of ``nn.MultiheadAttention`` with ``batch_first=True``: Xavier-uniform
    projections of the inputs, biases of zero. It takes lengths, not masks, and returns no weights;
    :func:`adasplash.attention_weights` gives those. :class:`adasplash.EntmaxMultiheadAttention` takes the place of an
    ``nn.MultiheadAttention`` in a model that has one.

    Tensor parallelism: a plan splits q_proj, k_proj and v_proj column-wise, in whole heads and alike (with one head of
    key and value, k_proj and v_proj may stay whole), and out_proj row-wise. ``alpha_logit`` may stay whole: each rank
    takes the part of its heads and gets the gradient of all.

    Args:
        embed_dim: size E of query and of the result.
        num_heads: query heads.
        num_kv_heads: heads of key and value, a divisor of num_heads, each shared by num_heads / num_kv_heads
            neighbouring query heads (grouped queries); num_heads unless given.
        head_dim: size of a head, from 1 to 256; embed_dim / num_heads unless given.
        bias: whether the four projections have biases.
        kdim: size of key; embed_dim unless given.
        vdim: size of value; embed_dim unless given.
        is_causal, window: as in :func:`adasplash.entmax_attn`.
        alpha: a number, 1 or from 1.01 to 2; larger is sparser. With learn_alpha it is where learning starts, inside
            (1.05, 2).
        learn_alpha: whether every head learns its own α = 1.05 + 0.95 · sigmoid(``alpha_logit``).
        device, dtype: of the parameters.
        dropout: the share of attention weights that become zero in training, 0 or more and below 1. Under a
            tensor-parallel plan every rank drops other ones.

    Shape:
        query (B, M, E), key (B, N, kdim), value (B, N, vdim) → (B, M, E).

    Raises:
        TypeError: an argument is of another kind than said here.
        ValueError: sizes do not fit each other, or α is out of range or cannot be learned from where it starts.
    """

    lowest_alpha: Final[float] = 1.05  # what learned α stay above and below; full accuracy ends there
    highest_alpha: Final[float] = 2.0

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: Optional[int] = None,  # noqa: UP045
        head_dim: Optional[int] = None,  # noqa: UP045
        bias: bool = True,
        kdim: Optional[int] = None,  # noqa: UP045
        vdim: Optional[int] = None,  # noqa: UP045
        is_causal: bool = False,
        window: Tuple[int, int] = (-1, -1),  # noqa: UP006
        alpha: float = 1.5,
        learn_alpha: bool = False,
        device=None,
        dtype=None,
        dropout: float = 0.0,
    ):
        super().__init__()
        for name, kind, given in (
            ("embed_dim", INTEGER, embed_dim), ("num_heads", INTEGER, num_heads), ("bias", BOOL, bias),
            ("num_kv_heads", INTEGER, num_kv_heads), ("head_dim", INTEGER, head_dim), ("kdim", INTEGER, kdim),
            ("vdim", INTEGER, vdim), ("is_causal", BOOL, is_causal), ("window", WINDOW, window),
            ("alpha", NUMBER, alpha), ("learn_alpha", BOOL, learn_alpha), ("dropout", NUMBER, dropout),
        ):  # fmt: skip
            if given is not None or name not in ("num_kv_heads", "head_dim", "kdim", "vdim"):
                check("EntmaxAttention", name, kind, given)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, size in (("embed_dim", embed_dim), ("kdim", kdim), ("vdim", vdim)):
            if size is not None and size < 1:
                raise ValueError(f"EntmaxAttention: {name} must be 1 or more, got {size}")
        if window[0] < -1 or window[1] < -1:
            raise ValueError(f"EntmaxAttention: window must be 0 or more each, or -1 for no limit, got {window}")
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads != 0:
            raise ValueError(
                f"EntmaxAttention: num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
            )
        if head_dim is None:
            if embed_dim % num_heads != 0:
                raise ValueError(
                    f"EntmaxAttention: embed_dim must be a multiple of num_heads where head_dim is not given, got "
                    f"{embed_dim} and {num_heads}"
                )
            head_dim = embed_dim // num_heads
        if not 1 <= head_dim <= 256:
            raise ValueError(f"EntmaxAttention: head_dim must be from 1 to 256, got {head_dim}")
        if alpha != 1 and not 1.01 <= alpha <= 2:
            raise ValueError(f"EntmaxAttention: alpha must be 1 or from 1.01 to 2, got {alpha}")
        if not 0 <= dropout < 1:
            raise ValueError(f"EntmaxAttention: dropout must be 0 or more and less than 1, got {dropout}")
        if learn_alpha and not self.lowest_alpha < alpha < self.highest_alpha:
            raise ValueError(
                f"EntmaxAttention: alpha must be above {self.lowest_alpha} and below {self.highest_alpha} to be "
                f"learned, got {alpha}"
            )
        self.embed_dim, self.kdim, self.vdim = embed_dim, kdim or embed_dim, vdim or embed_dim
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.is_causal, self.window, self.alpha = is_causal, (window[0], window[1]), float(alpha)
        self.dropout = float(dropout)
        self.context = None  # see attend_over

        options = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(self.embed_dim, num_heads * head_dim, **options)
        self.k_proj = nn.Linear(self.kdim, num_kv_heads * head_dim, **options)
        self.v_proj = nn.Linear(self.vdim, num_kv_heads * head_dim, **options)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, **options)
        logit = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype)) if learn_alpha else None
        self.register_parameter("alpha_logit", logit)
        self.reset_parameters()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("dropout", 0.0)  # pickled before there was one
        self.__dict__.setdefault("context", None)

    def reset_parameters(self) -> None:
        """Starts anew, learned α included."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight)
        self.out_proj.reset_parameters()
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.alpha_logit is not None:
            share = (self.alpha - self.lowest_alpha) / (self.highest_alpha - self.lowest_alpha)
            nn.init.constant_(self.alpha_logit, math.log(share / (1 - share)))

    def head_alpha(self) -> Tensor:
        """α of each head, (num_heads,), differentiable in what learns it; float32, or float64 for a float64 module."""
        logit = self.alpha_logit
        if logit is None:
            return torch.full((self.num_heads,), self.alpha, device=self.q_proj.weight.device)
        if logit.dtype != torch.float64:
            logit = logit.float()  # half types cannot tell apart what training changes
        return self.lowest_alpha + (self.highest_alpha - self.lowest_alpha) * torch.sigmoid(logit)

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor] = None,  # noqa: UP045
        value: Optional[Tensor] = None,  # noqa: UP045
        q_seqlens: Optional[Tensor] = None,  # noqa: UP045
        kv_seqlens: Optional[Tensor] = None,  # noqa: UP045
        kv_starts: Optional[Tensor] = None,  # noqa: UP045
    ) -> Tensor:
        """Attends from query to key and value.

        Args:
            query: (B, M, E).
            key: (B, N, kdim); query unless given (self-attention).
            value: (B, N, vdim); key unless given.
            q_seqlens: (B,) int32 or int64 on query's device: how many positions of each batch entry are no padding, for
                batches padded on the right.
            kv_seqlens: the same for key and value. In self-attention one of the two stands for both.
            kv_starts: (B,), the first key of each batch entry, for batches padded on the left; as in ``entmax_attn``.

        Returns:
            (B, M, E). For padding it is out_proj's bias.

        Raises:
            TypeError: an argument is no tensor.
            ValueError: value is given and key is not, or a tensor-parallel plan splits heads of key and value otherwise
                than those of query.
            RuntimeError: an argument does not fit; the message names it.
        """
        if not torch.jit.is_scripting():
            if not isinstance(query, Tensor):
                check("EntmaxAttention", "query", TENSOR, query)
            for name, given in (
                ("key", key), ("value", value),
                ("q_seqlens", q_seqlens), ("kv_seqlens", kv_seqlens), ("kv_starts", kv_starts),
            ):  # fmt: skip
                if given is not None and not isinstance(given, Tensor):
                    check("EntmaxAttention", name, OPTIONAL_TENSOR, given)
        if query.dim() != 3:
            raise ValueError("EntmaxAttention: query must have 3 dimensions (B, M, E), got " + str(query.dim()))
        if key is None:
            if value is not None:
                raise ValueError("EntmaxAttention: value goes with key, got value alone")
            key = query
            q_seqlens = kv_seqlens if q_seqlens is None else q_seqlens
            kv_seqlens = q_seqlens if kv_seqlens is None else kv_seqlens
        if value is None:
            value = key
        # As many heads as the projections give: of a tensor-parallel one, those of this rank.
        q = self.q_proj(query).unflatten(-1, [-1, self.head_dim]).transpose(1, 2)
        k = self.k_proj(key).unflatten(-1, [-1, self.head_dim]).transpose(1, 2)
        v = self.v_proj(value).unflatten(-1, [-1, self.head_dim]).transpose(1, 2)
        if q.size(1) * self.num_kv_heads != k.size(1) * self.num_heads and self.num_kv_heads != 1:
            raise ValueError(
                "EntmaxAttention: k_proj and v_proj must be split into heads as q_proj is, got " + str(q.size(1))
                + " of " + str(self.num_heads) + " query heads and " + str(k.size(1)) + " of " + str(self.num_kv_heads)
                + " heads of key and value"
            )  # fmt: skip
        if not torch.jit.is_scripting() and q.size(1) != self.num_heads and self.num_kv_heads == 1:
            k, v = self._shared_by_ranks(k), self._shared_by_ranks(v)
        dropout_p = self.dropout if self.training else 0.0
        seed: Optional[Tensor] = None  # noqa: UP045
        if dropout_p > 0.0 and not torch.jit.is_scripting():
            seed = self._seed_of_these_heads(q)
        if not torch.jit.is_scripting() and self.context is not None:
            out = self._attend_over_context(q, k, v, q_seqlens, kv_seqlens, kv_starts, dropout_p, seed)
        elif self.alpha_logit is None:
            out = entmax_attn(
                q, k, v, self.alpha, self.is_causal, None, q_seqlens, kv_seqlens, self.window, None, kv_starts,
                dropout_p, seed,
            )  # fmt: skip
        else:
            alpha = self.head_alpha()
            if not torch.jit.is_scripting():
                alpha = self._of_these_heads(alpha, q)
            out = entmax_attn(
                q, k, v, alpha, self.is_causal, None, q_seqlens, kv_seqlens, self.window, None, kv_starts, dropout_p,
                seed,
            )  # fmt: skip
        return self.out_proj(out.transpose(1, 2).flatten(2))

    @torch.jit.unused
    def attend_over(self, group, method: str) -> None:
        """From now on tokens are shards over a process group or a mesh, which ``adasplash.distributed`` attends over:
        what its ``ContextParallel`` does."""
        self.context = (group, method)

    def _attend_over_context(self, q, k, v, q_seqlens, kv_seqlens, kv_starts, dropout_p, seed) -> Tensor:
        from adasplash.distributed import entmax_attn_context_parallel

        group, method = self.context
        alpha = self.alpha if self.alpha_logit is None else self._of_these_heads(self.head_alpha(), q)
        return entmax_attn_context_parallel(
            q, k, v, alpha, self.is_causal, q_seqlens=q_seqlens, kv_seqlens=kv_seqlens, kv_starts=kv_starts,
            window=self.window, dropout_p=dropout_p, dropout_seed=seed, method=method, sum_gradients=False, group=group,
        )  # fmt: skip

    def _of_these_heads(self, alpha: Tensor, q: Tensor) -> Tensor:
        """The part of `alpha` that belongs to the heads of q, where a tensor-parallel plan has split q_proj."""
        split = hasattr(alpha, "to_local")
        if not split and alpha.size(0) == q.size(1):
            return alpha
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if isinstance(q, DTensor):
            return alpha
        weight = self.q_proj.weight
        if not isinstance(weight, DTensor):
            raise ValueError(
                f"EntmaxAttention: q_proj gives {q.size(1)} heads and alpha_logit has {alpha.size(0)}; only a plan "
                "that makes q_proj's weight a DTensor says which of them these are"
            )
        mesh = weight.device_mesh
        if not split:
            alpha = DTensor.from_local(alpha, mesh, [Replicate()] * mesh.ndim, run_check=False)
        # Backward, this gathers the gradients of all heads, so that a whole alpha_logit stays the same everywhere.
        heads = [Shard(0) if placement.is_shard(0) else Replicate() for placement in weight.placements]
        return alpha.redistribute(mesh, heads).to_local()

    def _seed_of_these_heads(self, q: Tensor) -> Tensor:
        """A seed for dropout: where a tensor-parallel plan has split q_proj, another one on each rank, as ranks count
        their heads from 0."""
        seed = draw_seed(q)
        weight = self.q_proj.weight
        if q.size(1) == self.num_heads or not hasattr(weight, "device_mesh") or hasattr(q, "to_local"):
            return seed
        for placement, number in zip(weight.placements, weight.device_mesh.get_coordinate(), strict=True):
            if placement.is_shard(0):
                seed = seed * 6364136223846793005 + number + 1  # Knuth's multiplier: neighbours come far apart
        return seed

    def _shared_by_ranks(self, x: Tensor) -> Tensor:
        """A key or value that all ranks computed, each for a part of the query heads: gradients are those of all."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        weight = self.q_proj.weight
        if not isinstance(weight, DTensor) or isinstance(x, DTensor):
            return x
        split = [placement.is_shard(0) for placement in weight.placements]
        mesh, everywhere = weight.device_mesh, [Replicate()] * len(split)
        x = DTensor.from_local(x, mesh, everywhere, run_check=False)
        return x.to_local(grad_placements=[Partial() if here else Replicate() for here in split])

    def extra_repr(self) -> str:
        alpha = "learned" if self.alpha_logit is not None else str(self.alpha)
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, is_causal={self.is_causal}, window={self.window}, alpha={alpha}"
            + (f", dropout={self.dropout}" if self.dropout > 0 else "")
        )
