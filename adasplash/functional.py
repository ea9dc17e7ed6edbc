"""The ops as Python functions, with the same arguments as in ``torch.ops.adasplash``. What an option means stands in
the docstring of ``entmax_attn``, and there alone.

Annotations are real types, and options are not keyword-only, so that TorchScript compiles modules that call these.
"""

import warnings
from typing import Optional, Tuple, Union  # noqa: UP035  (TorchScript knows these names on every torch we support)

import torch
from torch import Tensor

from adasplash._arguments import (
    BOOL,
    LENGTH,
    NUMBER,
    NUMBER_OR_TENSOR,
    OPTIONAL_TENSOR,
    SCALE,
    TENSOR,
    WINDOW,
    check,
    explain,
)
from adasplash.nested import any_is_nested, entmax_attn_jagged

_PADDED = {"query": TENSOR, "key": TENSOR, "value": TENSOR}
_PACKED = {
    **_PADDED,
    "cu_seqlens_q": TENSOR,
    "cu_seqlens_k": TENSOR,
    "max_seqlen_q": LENGTH,
    "max_seqlen_k": LENGTH,
}


def call_attention(
    op, function, kinds, tensors, alpha, is_causal, scale, window, options, dropout_p=0.0, dropout_seed=None,
    names=None, numbers=None,
):  # fmt: skip
    """An eager call of an op (``OpOverloadPacket``), by the overload that takes this alpha and with the options that
    say something: torch tries overloads that are not named in turn and reads all options, which on small tensors takes
    as long as the op does.

    Errors name `function`; `names` are its names for arguments, where they are not the op's. What the op takes in
    silence for something else is refused before, all the rest only where the op has failed.

    `options` are those that are tensors or None, `numbers` others that are to be handed on, which the caller has
    checked."""
    options = {**options, "dropout_seed": dropout_seed}
    given = {name: option for name, option in options.items() if option is not None}
    given.update(numbers or {})
    if type(is_causal) is not bool:
        check(function, "is_causal", BOOL, is_causal)
    if type(window) is not tuple or len(window) != 2 or type(window[0]) is not int or type(window[1]) is not int:
        check(function, "window", WINDOW, window)
        given["window"] = window
    elif window != (-1, -1):
        given["window"] = window
    if scale is not None:
        if type(scale) is not float:
            check(function, "scale", SCALE, scale)
            if isinstance(scale, Tensor):
                tensors, scale = (scaled(tensors[0], scale), *tensors[1:]), 1.0
        given["scale"] = scale
    if type(dropout_p) is not float:
        check(function, "dropout_p", NUMBER, dropout_p)
    if dropout_p != 0:
        given["dropout_p"] = dropout_p
        # A tensor, or what stands for one while a graph is recorded.
        if dropout_seed is None and hasattr(type(tensors[0]), "__torch_function__"):
            given["dropout_seed"] = draw_seed(tensors[0])
    if isinstance(alpha, Tensor):
        overload = op.per_head
    else:
        if type(alpha) is not float:
            check(function, "alpha", NUMBER_OR_TENSOR, alpha)
        overload = op.default
    if torch.compiler.is_compiling():
        return overload(*tensors, alpha, is_causal, **given)
    try:
        return overload(*tensors, alpha, is_causal, **given)
    except (RuntimeError, TypeError) as error:
        values = {name: (kind, value) for (name, kind), value in zip(kinds.items(), tensors, strict=True)}
        values |= {name: (OPTIONAL_TENSOR, value) for name, value in options.items()} | {"window": (WINDOW, window)}
        explain(function, error, values, op.__name__.removesuffix("_summary"), names)


def scaled(query: Tensor, scale: Tensor) -> Tensor:
    """Query times a scale, which gives the scale its gradient. As a number, no type of its own."""
    return query * scale.reshape(()) if isinstance(query, Tensor) else query


def draw_seed(query: Tensor) -> Tensor:
    """A seed for dropout, from torch's generator for query's device."""
    return torch.randint_like(query.new_empty([], dtype=torch.int64), 9223372036854775807)


def resolve(
    query: Tensor,
    scale: Union[float, Tensor, None],  # noqa: UP007
    dropout_p: float,
    dropout_seed: Optional[Tensor],  # noqa: UP045
) -> Tuple[Tensor, Optional[float], Optional[Tensor]]:  # noqa: UP006, UP045
    """What scripted code gives an op for these: query times a scale that is a tensor, the scale that is left, and a
    seed where dropout wants one."""
    if dropout_p > 0.0 and dropout_seed is None:
        dropout_seed = draw_seed(query)
    factor: Optional[float] = None  # noqa: UP045
    if isinstance(scale, Tensor):
        query, factor = query * scale.reshape([]), 1.0
    elif scale is not None:
        factor = scale
    return query, factor, dropout_seed


def attend(
    function, query, key, value, alpha, is_causal, scale, q_seqlens, kv_seqlens, window, alibi_slopes, kv_starts=None,
    dropout_p=0.0, dropout_seed=None, key_index=None, names=None, op=None, q_positions=None,
    dropout_origin=None,
):  # fmt: skip
    """``entmax_attn``, or another op that takes its arguments, in eager code, on behalf of a public function."""
    options = {
        "q_seqlens": q_seqlens, "kv_seqlens": kv_seqlens, "alibi_slopes": alibi_slopes, "kv_starts": kv_starts,
        "key_index": key_index,
        "q_positions": q_positions, "dropout_origin": dropout_origin,
    }  # fmt: skip
    op = torch.ops.adasplash.entmax_attn if op is None else op
    out = call_attention(
        op, function, _PADDED, (query, key, value), alpha, is_causal, scale, window, options, dropout_p, dropout_seed,
        names,
    )  # fmt: skip
    one_sided = (q_seqlens is None) != (kv_seqlens is None) and kv_starts is None and q_positions is None
    if is_causal and one_sided and not torch.compiler.is_compiling():
        _warn_of_one_sided_lengths(function, query, key, "q_seqlens" if kv_seqlens is None else "kv_seqlens")
    return out


def attend_packed(
    function, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alpha, is_causal, scale,
    window, alibi_slopes, dropout_p, dropout_seed, op, q_positions=None, dropout_origin=None,
):  # fmt: skip
    """``entmax_attn_varlen``, or another op that takes its arguments, likewise."""
    if type(max_seqlen_q) is bool or type(max_seqlen_k) is bool:  # the op takes True for 1
        check(function, "max_seqlen_q", LENGTH, max_seqlen_q)
        check(function, "max_seqlen_k", LENGTH, max_seqlen_k)
    tensors = (query, key, value, cu_seqlens_q, cu_seqlens_k, _number(max_seqlen_q), _number(max_seqlen_k))
    options = {"alibi_slopes": alibi_slopes, "q_positions": q_positions, "dropout_origin": dropout_origin}
    return call_attention(
        op, function, _PACKED, tensors, alpha, is_causal, scale, window, options, dropout_p, dropout_seed
    )  # fmt: skip


_warned: set[str] = set()


def _warn_of_one_sided_lengths(function: str, query: Tensor, key: Tensor, given: str) -> None:
    if function in _warned or torch.jit.is_tracing() or not isinstance(query, Tensor):
        return
    if query.shape[2] == key.shape[2] > 1:
        _warned.add(function)
        missing = "q_seqlens" if given == "kv_seqlens" else "kv_seqlens"
        warnings.warn(
            f"{function}: {given} without {missing} in a causal call with as many queries as keys: the mask is aligned "
            f"with the last of {query.shape[2]} {'queries' if missing == 'q_seqlens' else 'keys'}, padding or not; "
            "self-attention over a right-padded batch gives its lengths as q_seqlens and as kv_seqlens",
            stacklevel=4,
        )


def _number(length):
    """A length that may be a tensor of one number, read here: an op reads it itself, but not while it is compiled."""
    return length.item() if isinstance(length, Tensor) and length.numel() == 1 else length


def entmax_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Union[float, Tensor] = 1.5,  # noqa: UP007
    is_causal: bool = False,
    scale: Union[float, Tensor, None] = None,  # noqa: UP007
    q_seqlens: Optional[Tensor] = None,  # noqa: UP045
    kv_seqlens: Optional[Tensor] = None,  # noqa: UP045
    window: Tuple[int, int] = (-1, -1),  # noqa: UP006
    alibi_slopes: Optional[Tensor] = None,  # noqa: UP045
    kv_starts: Optional[Tensor] = None,  # noqa: UP045
    dropout_p: float = 0.0,
    dropout_seed: Optional[Tensor] = None,  # noqa: UP045
    key_index: Optional[Tensor] = None,  # noqa: UP045
    q_positions: Optional[Tensor] = None,  # noqa: UP045
    dropout_origin: Optional[Tensor] = None,  # noqa: UP045
) -> Tensor:
    """Attention whose weights are the α-entmax of the scaled scores: exactly zero for most keys.

    For one query with scores s_j = scale · q·k_j over the keys it sees, the weights are
    p_j = [(α−1) s_j − τ]₊^(1/(α−1)), with τ such that they sum to one (Peters, Niculae and Martins, "Sparse
    Sequence-to-Sequence Models", 2019, equation 6), and the result is Σ p_j v_j. No M×N tensor is ever built, but of up
    to 16 queries.

    Self-attention over a batch that is padded on the right gives its lengths twice::

        out = adasplash.entmax_attn(q, k, v, is_causal=True, q_seqlens=lengths, kv_seqlens=lengths)

    Annealing: ``torch.compile`` takes numbers for constants. An α or a scale that changes from step to step as a Python
    float is compiled anew for each value, and from the ninth on not at all: the call then runs eagerly. A tensor on
    query's device is an input like others, in one compilation for all values::

        alpha = torch.tensor(1.1)  # () or (H,); a buffer of the model, for instance
        attend = torch.compile(lambda q, k, v: adasplash.entmax_attn(q, k, v, alpha))
        for step in range(steps):
            alpha.fill_(1.1 + 0.4 * step / steps)
            out = attend(q, k, v)

    Args:
        query: (B, H, M, D), float32, float16, bfloat16, or float64 on the CPU. Query, key and value may also be jagged
            nested tensors, ragged in M and N; they go to ``entmax_attn_varlen``, and the result is ragged as query is.
        key: (B, H_kv, N, D), of query's type and device; H is a multiple of H_kv, and H / H_kv neighbouring query
            heads share one head of key and value.
        value: (B, H_kv, N, D_v). D and D_v are from 1 to 256.
        alpha: a number, or a tensor of shape (H,) or () for α per head, through which gradients flow too. Values are 1
            or from 1.01 to 2; larger is sparser. 2 is sparsemax. 1 is softmax: as a number and without options that
            torch lacks it goes to torch's ``scaled_dot_product_attention``; docs/contract.md says when. Between 1 and
            1.01 there is nothing, and a schedule steps over it. A tensor is float32, float64 or of query's type, on
            query's device; values out of range are an error on the CPU and NaN on the GPU.
        is_causal: query i sees the keys up to i + N − M: the mask is aligned bottom right, as in flash-attn, so that
            the last query sees every key.
        scale: factor of the scores, 1/√D unless given: a number, or a tensor of one element, () or (1,), through which
            gradients flow too. A tensor is multiplied into query before the op (``torch.ops`` takes numbers only), and
            the product is rounded to query's type.
        q_seqlens: (B,) int32 or int64, on query's device: the lengths of a right-padded batch, each from 0 to M. Then M
            in what is said here is the batch entry's own length. Padded queries give zeros. Padding may hold anything:
            it reaches no result and no gradient, and its own gradients are zeros. Lengths out of range are an error on
            the CPU and wrong rows on the GPU.
        kv_seqlens: (B,), the same for key and value, each from 0 to N. One of the two alone shifts the mask of
            is_causal and window, as N − M is then a length less a padded length; where M = N, an eager causal call
            warns of that, once.
        window: (left, right), inclusive, −1 for no limit: query i sees the keys from i + N − M − left to
            i + N − M + right. Time grows with the window, not with N.
        alibi_slopes: (H,) or (B, H), float32, on query's device: takes ``slope · |i + N − M − j|`` off the scaled score
            of key j (Press, Smith and Lewis, "Train Short, Test Long", 2022). They get no gradient.
        kv_starts: (B,) int32 or int64, on query's device: the first key of each batch entry, each from 0 to N, for
            batches that are padded on the left and for static caches. ``kv_seqlens`` then says where its keys end (N
            without it) and is no count: N in what is said here is their difference, and j is counted from the start, so
            that entry b gives what a call with its keys kv_starts[b] to kv_seqlens[b] − 1 alone gives. Keys before it
            may hold anything: nothing reads them, and their gradients are zeros. An entry whose start is not before its
            end sees nothing. Queries have no start: what their rows in front give, where those are padding, is the
            caller's to ignore.
        dropout_p: the share of weights that become zero, 0 or more and below 1; the others are divided by
            1 − dropout_p. It is applied whenever it is given: in evaluation give 0.
        dropout_seed: one int64, () or (1,), on query's device, from which alone it follows which weights those are: the
            same for the same seed, batch entry, query head, query and key, counted from the start of its sequence, on
            every device and in the packed form too. Drawn from torch's generator (``torch.manual_seed``) unless given;
            the ops in ``torch.ops`` draw none and need it where dropout_p is not 0.
        key_index: an index of the keys, for a few queries over a static cache: what :func:`adasplash.make_key_index`
            made for ``key.transpose(1, 2)``, whose slot b · N + j is key j of batch entry b, and
            :func:`adasplash.entmax_key_index_update` has filled. The result has the same bits. Calls that record
            gradients, with dropout, with α = 1 as a number, or whose keys autocast casts, do without.
        q_positions: (B,) int32 or int64, on query's device: where the first query of each batch entry stands, counted
            as its keys are, for queries that are a part of a sequence. It takes the place of N − M above: query i is at
            q_positions[b] + i for is_causal, window and alibi_slopes. From −(2²⁹ − 1) to 2²⁹ − 1, before the keys or
            behind them too; a query that then sees no key gives zeros. Out of range is an error on the CPU and is
            clamped on the GPU. Dropout goes on counting queries from 0.
        dropout_origin: (B, 4) int32 or int64, on query's device: what dropout counts each batch entry itself as, and
            its first head, first query and first key, so that parts of a call drop the weights that the whole call
            does. Entry b is counted as (b, 0, 0, 0) without it; numbers count modulo 2³².

    Returns:
        (B, H, M, D_v), contiguous, in query's type. A query that sees no key gives zeros. Differentiable once in
        query, key, value and, where they are tensors, alpha and scale.

    Raises:
        TypeError: an argument is of another kind than said here, None for False for instance.
        RuntimeError: an argument does not fit. The message names it.
        NotImplementedError: double backward, forward-mode AD. It is a RuntimeError too.
    """
    if not torch.jit.is_scripting():
        if any_is_nested(query, key, value):
            return entmax_attn_jagged(
                query,
                key,
                value,
                alpha=alpha,
                is_causal=is_causal,
                scale=scale,
                q_seqlens=q_seqlens,
                kv_seqlens=kv_seqlens,
                window=window,
                alibi_slopes=alibi_slopes,
                kv_starts=kv_starts,
                dropout_p=dropout_p,
                dropout_seed=dropout_seed,
                key_index=key_index,
                q_positions=q_positions,
                dropout_origin=dropout_origin,
            )
        return attend(
            "entmax_attn",
            query,
            key,
            value,
            alpha,
            is_causal,
            scale,
            q_seqlens,
            kv_seqlens,
            window,
            alibi_slopes,
            kv_starts,
            dropout_p,
            dropout_seed,
            key_index,
            q_positions=q_positions,
            dropout_origin=dropout_origin,
        )
    query, factor, dropout_seed = resolve(query, scale, dropout_p, dropout_seed)
    # TorchScript knows no overload by name; it chooses one for each branch by the type that alpha has there.
    if isinstance(alpha, Tensor):
        return torch.ops.adasplash.entmax_attn(
            query,
            key,
            value,
            alpha,
            is_causal,
            scale=factor,
            q_seqlens=q_seqlens,
            kv_seqlens=kv_seqlens,
            window=list(window),
            alibi_slopes=alibi_slopes,
            kv_starts=kv_starts,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            key_index=key_index,
            q_positions=q_positions,
            dropout_origin=dropout_origin,
        )
    else:
        return torch.ops.adasplash.entmax_attn(
            query,
            key,
            value,
            alpha,
            is_causal,
            scale=factor,
            q_seqlens=q_seqlens,
            kv_seqlens=kv_seqlens,
            window=list(window),
            alibi_slopes=alibi_slopes,
            kv_starts=kv_starts,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            key_index=key_index,
            q_positions=q_positions,
            dropout_origin=dropout_origin,
        )


def entmax_attn_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    alpha: Union[float, Tensor] = 1.5,  # noqa: UP007
    is_causal: bool = False,
    scale: Union[float, Tensor, None] = None,  # noqa: UP007
    window: Tuple[int, int] = (-1, -1),  # noqa: UP006
    alibi_slopes: Optional[Tensor] = None,  # noqa: UP045
    dropout_p: float = 0.0,
    dropout_seed: Optional[Tensor] = None,  # noqa: UP045
    q_positions: Optional[Tensor] = None,  # noqa: UP045
    dropout_origin: Optional[Tensor] = None,  # noqa: UP045
) -> Tensor:
    """``entmax_attn`` for a batch of sequences of different lengths, packed behind each other without padding.

    Arguments are those of flash-attn's varlen functions. On the CPU the result is, bit for bit, that of every sequence
    alone.

    Args:
        query: (T_q, H, D): the queries of all B sequences.
        key: (T_k, H_kv, D).
        value: (T_k, H_kv, D_v).
        cu_seqlens_q: (B + 1,) int32 or int64, on query's device: sequence b has the queries cu_seqlens_q[b] to
            cu_seqlens_q[b + 1] − 1. Starts at 0, never decreases, ends at T_q. What contradicts that is an error on
            the CPU and gives wrong rows on the GPU.
        cu_seqlens_k: (B + 1,), the same for key and value, up to T_k.
        max_seqlen_q: the number of queries of the longest sequence, or more. An int, or (not in TorchScript) a tensor
            of one integer, which is then read on the host; torch.compile breaks the graph there unless
            ``torch._dynamo.config.capture_scalar_outputs`` is set.
        max_seqlen_k: the number of keys of the longest sequence, or more; likewise.
        alpha: as in ``entmax_attn``.
        is_causal: as in ``entmax_attn``, where M and N are the lengths of the sequence; so for the options below.
        scale: as in ``entmax_attn``.
        window: (left, right), inclusive, −1 for no limit.
        alibi_slopes: (H,) or (B, H), float32, on query's device.
        dropout_p, dropout_seed: as in ``entmax_attn``; a batch entry is a sequence here.
        q_positions: (B,), as in ``entmax_attn``, of each sequence.
        dropout_origin: (B, 4), likewise.

    Returns:
        (T_q, H, D_v), contiguous, in query's type. Differentiable once in query, key, value and, where they are
        tensors, alpha and scale.

    Raises:
        TypeError, RuntimeError, NotImplementedError: as in ``entmax_attn``.
    """
    if not torch.jit.is_scripting():
        return attend_packed(
            "entmax_attn_varlen", query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alpha,
            is_causal, scale, window, alibi_slopes, dropout_p, dropout_seed, torch.ops.adasplash.entmax_attn_varlen,
            q_positions, dropout_origin,
        )  # fmt: skip
    query, factor, dropout_seed = resolve(query, scale, dropout_p, dropout_seed)
    if isinstance(alpha, Tensor):  # as above
        return torch.ops.adasplash.entmax_attn_varlen(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            alpha,
            is_causal,
            scale=factor,
            window=list(window),
            alibi_slopes=alibi_slopes,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            q_positions=q_positions,
            dropout_origin=dropout_origin,
        )
    else:
        return torch.ops.adasplash.entmax_attn_varlen(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            alpha,
            is_causal,
            scale=factor,
            window=list(window),
            alibi_slopes=alibi_slopes,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            q_positions=q_positions,
            dropout_origin=dropout_origin,
        )
