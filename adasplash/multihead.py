"""``EntmaxMultiheadAttention``, an ``nn.MultiheadAttention`` whose weights are α-entmax and not softmax."""

import torch
from torch import Tensor, nn

from adasplash._arguments import BOOL, INTEGER, NUMBER, OPTIONAL_TENSOR, TENSOR, check
from adasplash.functional import entmax_attn
from adasplash.masked import MOST_CHANNELS, attend_by_keys, attend_densely, parts, warn_of_dense
from adasplash.modules import EntmaxAttention

_NAME = "EntmaxMultiheadAttention"


class EntmaxMultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` with α-entmax in the place of softmax: the same parameters and state_dict, the
    same call, the same results at α = 1. It goes where that class does, ``nn.TransformerEncoderLayer`` for instance::

        layer = nn.TransformerEncoderLayer(512, 8, batch_first=True)
        layer.self_attn = EntmaxMultiheadAttention.from_torch(layer.self_attn)

    What takes which way, with ``need_weights=False``:

    - no mask, ``key_padding_mask`` (Boolean or floating point, with padding anywhere), and the causal mask of as many
      queries as keys where ``is_causal=True`` says that it is that one: :func:`adasplash.entmax_attn`, without an M×N
      tensor. No mask is read on the host. A padding mask costs up to two channels more in each head, so where batches
      are padded on the right, :class:`adasplash.EntmaxAttention` with lengths is faster.
    - any other ``attn_mask``, and a padding mask with heads of 255 channels or more: scores and weights are M×N
      tensors. An ``attn_mask`` that leads there warns of it once.

    With ``need_weights=True``, torch's default, weights are an M×N tensor in any case.

    A query that sees no key attends to nothing (torch's gives NaN), so its result is out_proj's bias. Inside of
    ``nn.TransformerEncoder`` torch's own fast path is not taken: it computes softmax without asking this class.

    Args:
        embed_dim, num_heads, bias, kdim, vdim, batch_first, device, dtype: as in ``nn.MultiheadAttention``. Of key and
            value it has as many heads as of query.
        dropout: of attention weights in training, 0 or more and below 1.
        add_bias_kv, add_zero_attn: must be False.
        alpha: a number, 1 or from 1.01 to 2; larger is sparser.

    Raises:
        TypeError, ValueError: an argument is not as said here; the message names it.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
        alpha: float = 1.5,
    ):
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads), ("kdim", kdim), ("vdim", vdim)):
            if size is not None or name in ("embed_dim", "num_heads"):
                check(_NAME, name, INTEGER, size)
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads != 0:
            raise ValueError(f"{_NAME}: embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        check(_NAME, "alpha", NUMBER, alpha)
        check(_NAME, "dropout", NUMBER, dropout)
        for name, given in (
            ("bias", bias),
            ("add_bias_kv", add_bias_kv),
            ("add_zero_attn", add_zero_attn),
            ("batch_first", batch_first),
        ):
            check(_NAME, name, BOOL, given)
        if add_bias_kv or add_zero_attn:
            raise ValueError(
                f"{_NAME}: add_bias_kv and add_zero_attn must be False, got {add_bias_kv}, {add_zero_attn}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"{_NAME}: dropout must be 0 or more and less than 1, got {dropout}")
        if alpha != 1 and not 1.01 <= alpha <= 2:
            raise ValueError(f"{_NAME}: alpha must be 1 or from 1.01 to 2, got {alpha}")
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        self.alpha = float(alpha)
        # nn.TransformerEncoderLayer and nn.TransformerEncoder ask this before they take their fast path.
        self._qkv_same_embed_dim = False

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, alpha: float = 1.5) -> "EntmaxMultiheadAttention":
        """One with the parameters of `module`, which it shares, in its mode."""
        if not isinstance(module, nn.MultiheadAttention):
            raise TypeError(f"{_NAME}: module must be an nn.MultiheadAttention, got {type(module).__name__}")
        if module.bias_k is not None or module.add_zero_attn:
            raise ValueError(f"{_NAME}: add_bias_kv and add_zero_attn must be False in the module that is given")
        sizes = module.embed_dim, module.num_heads, module.dropout, module.in_proj_bias is not None
        made = cls(
            *sizes, kdim=module.kdim, vdim=module.vdim, batch_first=module.batch_first, device="meta", alpha=alpha
        )
        for name, parameter in module._parameters.items():
            made._parameters[name] = parameter
        made.out_proj = module.out_proj
        return made.train(module.training)

    def to_entmax_attention(self, **options) -> EntmaxAttention:
        """An :class:`adasplash.EntmaxAttention` with copies of the parameters, which computes the same without masks.

        Args:
            options: of EntmaxAttention, is_causal, window, alpha or learn_alpha.
        """
        weight = self.out_proj.weight
        made = EntmaxAttention(
            self.embed_dim,
            self.num_heads,
            bias=self.in_proj_bias is not None,
            kdim=self.kdim,
            vdim=self.vdim,
            device=weight.device,
            dtype=weight.dtype,
            **{"alpha": self.alpha, "dropout": self.dropout, **options},
        )
        with torch.no_grad():
            made.out_proj.load_state_dict(self.out_proj.state_dict())
            for name, (weight, bias) in zip("qkv", self._projections(), strict=True):
                projection = getattr(made, f"{name}_proj")
                projection.weight.copy_(weight)
                if bias is not None:
                    projection.bias.copy_(bias)
        return made.train(self.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from query to key and value.

        Args:
            query: (B, M, E) with batch_first, else (M, B, E); without a batch (M, E).
            key: (B, N, kdim), (N, B, kdim) or (N, kdim).
            value: (B, N, vdim), (N, B, vdim) or (N, vdim).
            key_padding_mask: (B, N), without a batch (N,). Boolean: True hides a key. Floating point: is added to the
                scores.
            need_weights: whether to return the weights.
            attn_mask: (M, N) or (B · H, M, N), without a batch (H, M, N), Boolean or floating point likewise.
            average_attn_weights: whether weights are averaged over the heads.
            is_causal: says that attn_mask is the causal one, with which query i sees the keys up to i. It can be left
                away then.

        Returns:
            The result, in query's layout, and None or the weights, (B, M, N), or (B, H, M, N) if they are not averaged;
            without a batch they have no B. Weights are differentiable too.

        Raises:
            TypeError, ValueError, RuntimeError: an argument does not fit; the message names it.
        """
        for name, given in (("query", query), ("key", key), ("value", value)):
            check(_NAME, name, TENSOR, given)
        for name, given in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            check(_NAME, name, OPTIONAL_TENSOR, given)
        for name, given in (
            ("need_weights", need_weights),
            ("average_attn_weights", average_attn_weights),
            ("is_causal", is_causal),
        ):
            check(_NAME, name, BOOL, given)
        if query.is_nested:
            return self._nested(query, key, value, key_padding_mask, need_weights, attn_mask)

        batched = query.dim() == 3
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            raise ValueError(
                f"{_NAME}: query, key and value must have 3 dimensions, or 2 without a batch, got {query.dim()}, "
                f"{key.dim()} and {value.dim()}"
            )
        same = query is key and key is value
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))

        q, k, v = self._projected(query, key, value, same)
        padding = _checked_padding(key_padding_mask, k)
        mask = _checked_mask(attn_mask, q, k)
        causal = is_causal and q.shape[2] == k.shape[2]
        if is_causal and not causal and mask is None:
            raise ValueError(
                f"{_NAME}: is_causal without attn_mask needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}"
            )
        served = causal or mask is None
        if not need_weights and not served:
            hint = "; if it is the causal one, is_causal=True says so"
            warn_of_dense(_NAME, "attn_mask", stacklevel=5, hint=hint)  # for whoever calls the module
        if padding is not None and self.head_dim > MOST_CHANNELS - 2:
            served = False
        if need_weights or not served:
            out, weights = self._dense(q, k, v, padding, None if causal else mask, causal)
        else:
            out, weights = self._sparse(q, k, v, padding, causal), None

        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None and not need_weights:
            weights = None
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def _projections(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias for query, key and value."""
        if self.in_proj_weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return list(zip(weights, biases, strict=True))

    def _projected(self, query: Tensor, key: Tensor, value: Tensor, same: bool) -> list[Tensor]:
        """Heads (B, H, rows, head_dim) of query, key and value, which are one tensor if `same`."""
        linear = nn.functional.linear
        if same and self.in_proj_weight is not None:
            all_three = linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            inputs = query, key, value
            all_three = [linear(x, *parts) for x, parts in zip(inputs, self._projections(), strict=True)]
        return [x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in all_three]

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, causal: bool) -> Tensor:
        """Through entmax_attn."""
        dropout_p = self._dropout_p()
        if padding is None:
            return entmax_attn(q, k, v, self.alpha, causal, dropout_p=dropout_p)
        return attend_by_keys(q, k, v, self.alpha, padding, causal, self.head_dim**-0.5, dropout_p)

    def _dense(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Result and weights (B, H, M, N) through adasplash.entmax."""
        masks = [mask]
        if causal:
            masks.append(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril())
        if padding is not None:
            masks.append(padding[:, None, None, :])
            hidden, _ = parts(padding)
            k, v = (x.masked_fill(hidden[:, None, :, None], 0.0) for x in (k, v))  # they may hold anything
        return attend_densely(q, k, v, self.alpha, self.head_dim**-0.5, masks, self._dropout_p())

    def _nested(self, query, key, value, key_padding_mask, need_weights, attn_mask) -> tuple[Tensor, None]:
        """The nested tensors (strided) that nn.TransformerEncoder makes of padded ones."""
        if query is not key or key is not value or query.layout != torch.strided:
            raise ValueError(f"{_NAME}: query must be key and value where it is a nested tensor, and strided")
        if key_padding_mask is not None or attn_mask is not None or need_weights:
            raise ValueError(f"{_NAME}: a nested query takes no key_padding_mask, no attn_mask and need_weights=False")
        lengths = [len(x) for x in query.unbind()]
        x = query.to_padded_tensor(0.0)
        ends = torch.tensor(lengths, device=x.device)
        q, k, v = self._projected(x, x, x, same=True)
        out = entmax_attn(q, k, v, self.alpha, q_seqlens=ends, kv_seqlens=ends, dropout_p=self._dropout_p())
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return torch.nested.as_nested_tensor([row[:length] for row, length in zip(out, lengths, strict=True)]), None

    def _reset_parameters(self) -> None:
        """As in nn.MultiheadAttention, which takes _qkv_same_embed_dim at its word."""
        projections = self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        for weight in projections:
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def extra_repr(self) -> str:
        sizes = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"
        return f"{sizes}, batch_first={self.batch_first}, alpha={self.alpha}"


def _checked_padding(mask: Tensor | None, k: Tensor) -> Tensor | None:
    if mask is None:
        return None
    sizes = [k.shape[0], k.shape[2]]
    mask = _seen("key_padding_mask", mask, k)
    if list(mask.shape) != sizes:
        raise ValueError(
            f"{_NAME}: key_padding_mask must have sizes {sizes}, a place for each key, got {list(mask.shape)}"
        )
    return mask


def _checked_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """As (1 or B, 1 or H, M, N)."""
    if mask is None:
        return None
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    mask = _seen("attn_mask", mask, k)
    if list(mask.shape) == [queries, keys]:
        return mask[None, None]
    if list(mask.shape) == [batch * heads, queries, keys]:
        return mask.unflatten(0, (batch, heads))
    raise ValueError(
        f"{_NAME}: attn_mask must have sizes {[queries, keys]} or {[batch * heads, queries, keys]}, got "
        f"{list(mask.shape)}"
    )


def _seen(name: str, mask: Tensor, k: Tensor) -> Tensor:
    """A mask as the rest of the library has them: Boolean, with True where a key is seen, or floating point."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"{_NAME}: {name} must be Boolean or floating point, got {mask.dtype}")
    if mask.device != k.device:
        raise ValueError(f"{_NAME}: {name} must be on query's device {k.device}, got {mask.device}")
    return ~mask if mask.dtype == torch.bool else mask
