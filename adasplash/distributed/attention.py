"""`entmax_attn_context_parallel`, by gathering keys and values and by exchanging heads for tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from adasplash._arguments import (
    BOOL,
    INTEGER,
    NUMBER,
    NUMBER_OR_TENSOR,
    OPTIONAL_TENSOR,
    SCALE,
    TENSOR,
    WINDOW,
    check,
    describe,
)
from adasplash.distributed.agreement import compare
from adasplash.distributed.collectives import (
    Place,
    SumOfGradients,
    exchanged,
    from_rank_0,
    gathered,
    place_in,
    process_group,
)
from adasplash.distributed.layout import chunks_of, in_order
from adasplash.functional import attend, attend_packed, draw_seed

_FUNCTION = "entmax_attn_context_parallel"
METHODS = ("gather", "exchange", "both")


def entmax_attn_context_parallel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor = 1.5,
    is_causal: bool = False,
    *,
    scale: float | Tensor | None = None,
    q_seqlens: Tensor | None = None,
    kv_seqlens: Tensor | None = None,
    kv_starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    method: str = "gather",
    sum_gradients: bool = True,
    group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    """``entmax_attn`` of a sequence that is sharded over the processes of a group, as ``shard`` lays it out; or, with
    `cu_seqlens`, ``entmax_attn_varlen`` of a packed batch whose tokens are.

    The result and all gradients are those of one process with the whole sequence, to rounding. Every process of the
    group makes the same call, forward and backward, with tensors of the same shapes.

    Args:
        query: (B, H, N / W, D): this process' tokens of N, over W processes; types as in ``entmax_attn``. Of a packed
            batch (T / W, H, D), its tokens of T, which ``shard(x, 0)`` lays out; sequences may cross chunks.
        key: (B, H_kv, N / W, D); packed (T / W, H_kv, D).
        value: (B, H_kv, N / W, D_v); packed (T / W, H_kv, D_v).
        alpha: as in ``entmax_attn``. As a tensor, the same on every process.
        is_causal: query i of the whole sequence sees keys up to i.
        scale: as in ``entmax_attn``. As a tensor, the same on every process.
        q_seqlens, kv_seqlens, kv_starts: (B,), as in ``entmax_attn``, of the whole sequences, the same on every
            process. Self-attention gives one tensor as both lengths; then a causal mask and windows fetch as without
            any, otherwise every process gets all keys.
        cu_seqlens: (B + 1,) int32 or int64, of a packed batch: sequence b has the tokens cu_seqlens[b] to
            cu_seqlens[b + 1] − 1 of all T; the same on every process.
        max_seqlen: the longest length, or more, of a packed batch; T unless given.
        window: (left, right), inclusive, −1 for no limit: query i of the whole sequence sees keys i − left to
            i + right.
        alibi_slopes: (H,) or (B, H), as in ``entmax_attn``; of all H heads.
        dropout_p: as in ``entmax_attn``. What is dropped is what one process would drop for the seed.
        dropout_seed: as in ``entmax_attn``. That of the group's first process counts, drawn from its generator unless
            given.
        method: "gather": keys and values are gathered on every process, and their gradients summed by a
            reduce-scatter. Where the window leaves keys that no process needs all of, each gets the chunks that its
            windows reach, and no others. "exchange": an all-to-all gives every process the whole sequence of H / W
            heads, and another one takes the result back (Jacobs et al., "DeepSpeed Ulysses", 2023, arXiv 2309.14509).
            "both": over a mesh of two dimensions, heads are exchanged for tokens over the second, and then keys and
            values gathered over the first.
        sum_gradients: the gradients of alpha and of scale, where they are tensors, are summed over the group, so that
            every process has the whole gradient. Say False where something else sums them as it does for all other
            parameters of a model (DistributedDataParallel or FSDP over this group, or an all-reduce of your own): each
            process then has the gradient of what it computed, a part of the sum.
        group: the W processes: a process group, a mesh of one dimension (``mesh["context"]``), or one of two with names
            (``mesh["hosts", "gpus"]``), which is taken row by row; the default group unless given.

    Returns:
        (B, H, N / W, D_v), packed (T / W, H, D_v), in query's type, laid out as query is. Differentiable once in query,
        key, value and, where they are tensors, alpha and scale. For the same number of processes the same bits every
        time, wherever the backend's reduce-scatter adds in a fixed order.

    Raises:
        TypeError: an argument is of another kind than said here.
        RuntimeError: an argument does not fit; there is no process group; or processes were called with different
            arguments, which is one error on all of them. That is compared at the first call of each set of shapes,
            types and options; in every call if the environment variable ADASPLASH_COMPARE_RANKS is 1; and never inside
            compiled graphs.
    """
    everyone = process_group(_FUNCTION, group)
    place = place_in(_FUNCTION, everyone)
    call = _Call(
        alpha, is_causal, scale, q_seqlens, kv_seqlens, kv_starts, cu_seqlens, max_seqlen, window, alibi_slopes,
        dropout_p, dropout_seed,
    )  # fmt: skip
    tensors = {"query": query, "key": key, "value": value}
    compare(
        _FUNCTION,
        everyone,
        {
            **tensors, "alpha": alpha, "is_causal": is_causal, "scale": scale, "q_seqlens": q_seqlens,
            "kv_seqlens": kv_seqlens, "kv_starts": kv_starts, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen,
            "window": window, "alibi_slopes": alibi_slopes, "dropout_p": dropout_p, "dropout_seed": dropout_seed,
            "method": method, "sum_gradients": sum_gradients,
            "(q_seqlens is kv_seqlens)": q_seqlens is kv_seqlens,  # which decides what is fetched
        },
    )  # fmt: skip
    _check(call, query, key, value, sum_gradients, place.world)
    if method not in METHODS:
        raise RuntimeError(f'{_FUNCTION}: method must be "gather", "exchange" or "both", got {describe(method)}')
    if method == "both" and not (isinstance(group, DeviceMesh) and group.ndim == 2):
        raise RuntimeError(f'{_FUNCTION}: method="both" needs a mesh of two dimensions as its group')
    if dropout_p > 0:
        call.dropout_seed = from_rank_0(draw_seed(query) if dropout_seed is None else dropout_seed, place.name)
    if query.numel() == 0 or key.numel() == 0:  # nothing to send, and the op has the errors
        return call.attend(query, key, value, call.of_all())
    if sum_gradients:
        call.alpha, call.scale = (
            SumOfGradients.apply(x, place.world, place.name) if isinstance(x, Tensor) and x.requires_grad else x
            for x in (alpha, scale)
        )
    if method == "gather":
        return _gather(call, place, query, key, value)
    if method == "exchange":
        return _exchange(call, place, query, key, value)
    hosts, within = (place_in(_FUNCTION, group.get_group(dimension)) for dimension in range(2))
    return _exchange(call, within, query, key, value, lambda *tensors: _gather(call, hosts, *tensors))


@dataclass
class _Call:
    """A call's arguments but for its tensors, its method and its group."""

    alpha: float | Tensor
    is_causal: bool
    scale: float | Tensor | None
    q_seqlens: Tensor | None
    kv_seqlens: Tensor | None
    kv_starts: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    window: tuple[int, int]
    alibi_slopes: Tensor | None
    dropout_p: float
    dropout_seed: Tensor | None
    first_head: int = 0  # of those that this process computes

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def dim(self) -> int:
        """Of tokens."""
        return 0 if self.packed else 2

    def has_lengths(self) -> bool:
        return not (self.q_seqlens is None and self.kv_seqlens is None and self.kv_starts is None)

    def is_aligned(self) -> bool:
        """Whether query i stands beside key i, whatever the lengths hold."""
        return self.packed or (self.kv_starts is None and self.q_seqlens is self.kv_seqlens)

    def counts_places(self) -> bool:
        """Whether anything depends on where among the keys a query stands. Where nothing does the op is not told, which
        for alpha = 1 then may call torch's attention."""
        return self.is_causal or tuple(self.window) != (-1, -1) or self.alibi_slopes is not None

    def of_all(self) -> "_Part":
        """The options of a call with all tokens."""
        if self.packed:
            return _Part(cu_seqlens_q=self.cu_seqlens, cu_seqlens_k=self.cu_seqlens)
        return _Part(q_seqlens=self.q_seqlens, kv_seqlens=self.kv_seqlens, kv_starts=self.kv_starts)

    def of_part(self, query: Tensor, first: int, start: int, end: int, total: int) -> "_Part":
        """The options of a call with the queries of a chunk, from token `first` on, and keys `start` to before `end` of
        `total`: lengths of what of each sequence is there, and where its first query stands among its keys."""
        length = query.shape[self.dim]
        if self.packed:
            begins = self.cu_seqlens[:-1]
            of_query, of_key = (first - begins).clamp(min=0), (start - begins).clamp(min=0)
            return _Part(
                cu_seqlens_q=(self.cu_seqlens - first).clamp(0, length),
                cu_seqlens_k=(self.cu_seqlens - start).clamp(0, end - start),
                q_positions=of_query - of_key if self.counts_places() else None,
                first_query=of_query,
                first_key=of_key,
            )
        part = _Part(first_query=first, first_key=start)
        if not self.has_lengths():
            # The op takes the last query to stand beside the last key.
            if self.counts_places() and first + length != end:
                part.q_positions = torch.full((query.shape[0],), first - start, device=query.device)
            return part
        everyone = torch.full((query.shape[0],), total, device=query.device)
        queries, ends = (everyone if x is None else x.long() for x in (self.q_seqlens, self.kv_seqlens))
        begins = torch.zeros_like(everyone) if self.kv_starts is None else self.kv_starts.long()
        part.q_seqlens = (queries - first).clamp(0, length)
        part.kv_starts = (begins - start).clamp(0, end - start)
        part.kv_seqlens = (ends - start).clamp(0, end - start)
        part.first_key = part.kv_starts + start - begins  # of those that are there, among those of its sequence
        if self.counts_places():
            part.q_positions = first + (ends - begins).clamp(min=0) - queries - part.first_key
        return part

    def attend(self, query: Tensor, key: Tensor, value: Tensor, part: "_Part") -> Tensor:
        origin = part.origin(self, query) if self.dropout_p > 0 else None
        if not self.packed:
            return attend(
                _FUNCTION, query, key, value, self.alpha, self.is_causal, self.scale, part.q_seqlens, part.kv_seqlens,
                self.window, self.alibi_slopes, part.kv_starts, self.dropout_p, self.dropout_seed,
                q_positions=part.q_positions, dropout_origin=origin,
            )  # fmt: skip
        longest = [x.shape[0] if self.max_seqlen is None else min(self.max_seqlen, x.shape[0]) for x in (query, key)]
        return attend_packed(
            _FUNCTION, query, key, value, part.cu_seqlens_q, part.cu_seqlens_k, *longest, self.alpha, self.is_causal,
            self.scale, self.window, self.alibi_slopes, self.dropout_p, self.dropout_seed,
            torch.ops.adasplash.entmax_attn_varlen, part.q_positions, origin,
        )  # fmt: skip


@dataclass
class _Part:
    """Options of the op for a part of a call: lengths of what is there, and what of each sequence the first query and
    key are in the whole one; one number for all or (B,)."""

    q_seqlens: Tensor | None = None
    kv_seqlens: Tensor | None = None
    kv_starts: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    q_positions: Tensor | None = None
    first_query: int | Tensor = 0
    first_key: int | Tensor = 0

    def origin(self, call: _Call, query: Tensor) -> Tensor:
        """dropout_origin (B, 4)."""
        batch = len(call.cu_seqlens) - 1 if call.packed else query.shape[0]
        entries = torch.arange(batch, device=query.device)
        numbers = (call.first_head, self.first_query, self.first_key)
        return torch.stack([entries, *(torch.zeros_like(entries) + number for number in numbers)], 1)


def _check(call: _Call, query, key, value, sum_gradients, world: int):
    """What this module relies on before it calls the op, which has all other errors."""
    for name, kind, given in (
        ("query", TENSOR, query), ("key", TENSOR, key), ("value", TENSOR, value),
        ("alpha", NUMBER_OR_TENSOR, call.alpha), ("is_causal", BOOL, call.is_causal), ("scale", SCALE, call.scale),
        ("window", WINDOW, call.window), ("dropout_p", NUMBER, call.dropout_p), ("sum_gradients", BOOL, sum_gradients),
        *((name, OPTIONAL_TENSOR, getattr(call, name)) for name in (*_LENGTHS, "alibi_slopes", "dropout_seed")),
    ):  # fmt: skip
        check(_FUNCTION, name, kind, given)
    if call.max_seqlen is not None:
        check(_FUNCTION, "max_seqlen", INTEGER, call.max_seqlen)
    if call.packed and call.has_lengths():
        raise RuntimeError(
            f"{_FUNCTION}: q_seqlens, kv_seqlens and kv_starts go with padded tensors; cu_seqlens says the lengths of "
            "a packed batch"
        )
    words = "3 dimensions (tokens, heads, channels)" if call.packed else "4 dimensions (batch, heads, tokens, channels)"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.is_nested or tensor.dim() != (3 if call.packed else 4):
            raise RuntimeError(
                f"{_FUNCTION}: {name} must have {words}, got "
                f"{'a nested tensor' if tensor.is_nested else list(tensor.shape)}"
            )
        if tensor.dtype != query.dtype:
            raise RuntimeError(f"{_FUNCTION}: {name} must have query's type {query.dtype}, got {tensor.dtype}")
        if not call.packed and tensor.shape[0] != query.shape[0]:
            raise RuntimeError(f"{_FUNCTION}: {name} must have query's batch {query.shape[0]}, got {tensor.shape[0]}")
        if tensor.shape[call.dim] != query.shape[call.dim]:
            raise RuntimeError(
                f"{_FUNCTION}: {name} must have as many tokens as query, {query.shape[call.dim]}, got "
                f"{tensor.shape[call.dim]}"
            )
    if value.shape[1] != key.shape[1]:
        raise RuntimeError(f"{_FUNCTION}: value must have as many heads as key, {key.shape[1]}, got {value.shape[1]}")
    if query.shape[call.dim] % 2:
        raise RuntimeError(
            f"{_FUNCTION}: a process has two chunks of one length, so the tokens of query must be even in number, got "
            f"{query.shape[call.dim]}"
        )
    if call.window[0] < -1 or call.window[1] < -1:
        raise RuntimeError(
            f"{_FUNCTION}: window (left, right) must be 0 or more each, or -1 for no limit, got {tuple(call.window)}"
        )
    _check_lengths(call, query, world)


_LENGTHS = ("q_seqlens", "kv_seqlens", "kv_starts", "cu_seqlens")


def _check_lengths(call: _Call, query, world: int):
    """Shapes and types; and on the CPU what they hold, as the op sees parts of sequences, whose lengths always fit."""
    total = query.shape[call.dim] * world
    for name in _LENGTHS:
        given = getattr(call, name)
        if given is None:
            continue
        wanted = "(batch + 1,)" if name == "cu_seqlens" else "(batch,)"
        if given.dim() != 1 or given.dtype not in (torch.int32, torch.int64) or given.device != query.device:
            raise RuntimeError(
                f"{_FUNCTION}: {name} must be of shape {wanted}, int32 or int64, and on query's device {query.device}, "
                f"got {describe(given)} on {given.device}"
            )
        size = max(len(given), 1) if name == "cu_seqlens" else query.shape[0]
        if len(given) != size:
            raise RuntimeError(f"{_FUNCTION}: {name} must be of shape {wanted} with {size} numbers, got {len(given)}")
        if given.device.type != "cpu" or torch.compiler.is_compiling():
            continue
        numbers = given.tolist()
        if name == "cu_seqlens":
            if numbers != sorted(numbers) or numbers[0] != 0 or numbers[-1] != total:
                raise RuntimeError(
                    f"{_FUNCTION}: cu_seqlens must start at 0, never decrease, and end at the number of tokens of all "
                    f"processes {total}, got {numbers if len(numbers) < 10 else f'{numbers[:9]} and more'}"
                )
        elif not all(0 <= number <= total for number in numbers):
            raise RuntimeError(
                f"{_FUNCTION}: {name} must be from 0 to the length {total} of all processes together, got {numbers}"
            )


def _gather(call: _Call, place: Place, query, key, value):
    length = query.shape[call.dim] // 2
    chunks = 2 * place.world
    seen = [_seen(call, chunk, length, chunks * length) for chunk in range(chunks)]
    needed = [
        [*range(start // length, (end - 1) // length + 1)] for start, end in seen
    ]  # the chunks that hold what each one sees
    of_process = [
        sorted({c for mine in chunks_of(process, place.world) for c in needed[mine]}) for process in range(place.world)
    ]
    # Where one process needs every chunk, the others wait for it whatever they fetch themselves, and all gather.
    everything = max(map(len, of_process)) == chunks
    # Where the first half of the sequence sees none of the second, that may come while the first is computed.
    halves = all(chunk < place.world for mine in needed[: place.world] for chunk in mine)
    waves = [range(place.world), range(place.world, chunks)] if halves else [range(chunks)]
    waiting = [_fetch(call, place, key, value, wave, None if everything else of_process) for wave in waves]
    try:
        return _attend_to_waves(call, place, query, waiting, seen, needed if halves else None, of_process[place.rank])
    except Exception:
        for finish in waiting:  # torch remembers what nobody has waited for
            finish()
        raise


def _attend_to_waves(
    call: _Call,
    place: Place,
    query: Tensor,
    waiting: list[Callable[[], dict[int, tuple[Tensor, Tensor]]]],
    seen: list[tuple[int, int]],
    needed: list[list[int]] | None,
    of_process: list[int],
):
    """The attention of both chunks of queries, as soon as the chunks of keys that each has `needed` are there, or all
    of this process."""
    length = query.shape[call.dim] // 2
    parts: dict[int, tuple[Tensor, Tensor]] = {}
    joined: dict[tuple[int, ...], list[Tensor]] = {}
    outputs = []
    for chunk, queries in zip(chunks_of(place.rank, place.world), query.chunk(2, dim=call.dim), strict=True):
        chosen = tuple(of_process if needed is None else needed[chunk])
        while any(number not in parts for number in chosen):
            parts.update(waiting.pop(0)())
        if chosen not in joined:
            joined[chosen] = [torch.cat([parts[number][side] for number in chosen], dim=call.dim) for side in range(2)]
        start, end = seen[chunk]
        first = chosen.index(start // length) * length + start % length
        keys, values = (x.narrow(call.dim, first, end - start) for x in joined[chosen])
        part = call.of_part(queries, chunk * length, start, end, 2 * place.world * length)
        outputs.append(call.attend(queries, keys, values, part))
    return torch.cat(outputs, dim=call.dim)


def _seen(call: _Call, chunk: int, length: int, total: int) -> tuple[int, int]:
    """From which key to before which one the queries of a chunk may see."""
    if not call.is_aligned():  # lengths move the diagonal, and nothing on the host knows how far
        return 0, total
    left, right = call.window
    first, end = chunk * length, (chunk + 1) * length
    start = max(0, first - left) if left >= 0 else 0
    if call.is_causal:
        return start, end
    return start, min(total, end + right) if right >= 0 else total


def _fetch(
    call: _Call, place: Place, key, value, wave: range, of_process: list[list[int]] | None
) -> Callable[[], dict[int, tuple[Tensor, Tensor]]]:
    """Begins to fetch the chunks of a wave that this process needs, or all of them where nobody says what each process
    needs. Returns what waits for them: key and value of each, by its number."""
    world, dim = place.world, call.dim
    halves = zip(key.chunk(2, dim=dim), value.chunk(2, dim=dim), strict=True)
    own = dict(zip(chunks_of(place.rank, world), halves, strict=True))
    sizes = [x.numel() // 2 for x in (key, value)]
    of_wave = [[chunk for chunk in chunks_of(process, world) if chunk in wave] for process in range(world)]
    if of_process is None:
        received = of_wave
        flat = torch.cat([x.reshape(-1) for chunk in of_wave[place.rank] for x in own[chunk]])
        wait = gathered(flat, world, place.name)
    else:
        sent = [[chunk for chunk in of_wave[place.rank] if chunk in needs] for needs in of_process]
        received = [[chunk for chunk in theirs if chunk in of_process[place.rank]] for theirs in of_wave]
        flat = torch.cat([x.reshape(-1) for to in sent for chunk in to for x in own[chunk]])
        wait = exchanged(
            flat, *([len(chunks) * sum(sizes) for chunks in each] for each in (received, sent)), place.name
        )
    shapes = [(*x.shape[:dim], x.shape[dim] // 2, *x.shape[dim + 1 :]) for x in (key, value)]

    def finish():
        rows = wait().split(sum(sizes))
        chunks = [chunk for each in received for chunk in each]
        return {
            chunk: tuple(x.view(shape) for x, shape in zip(row.split(sizes), shapes, strict=True))
            for chunk, row in zip(chunks, rows, strict=True)
        }

    return finish


def _exchange(call: _Call, place: Place, query, key, value, attend: Callable[..., Tensor] | None = None):
    """`attend`: to tokens of the heads that this process then has, where the group's are not all of a sequence."""
    world, dim = place.world, call.dim
    heads, key_heads = query.shape[1], key.shape[1]
    if heads % world or key_heads % world:
        method = "exchange" if attend is None else "both"
        raise RuntimeError(
            f'{_FUNCTION}: method="{method}" gives each of {world} processes as many heads, so those of query and of '
            f'key must be multiples of {world}, got {heads} and {key_heads}: use method="gather"'
        )
    # Checked here, as the op sees a part of the heads and would take a tensor of as many numbers as that.
    alpha, slopes = call.alpha, call.alibi_slopes
    first, mine = place.rank * heads // world, heads // world
    call.first_head = first
    if isinstance(alpha, Tensor) and alpha.dim() > 0:
        if alpha.shape != (heads,):
            raise RuntimeError(
                f"{_FUNCTION}: alpha must be of shape () or (heads,) with {heads} heads, got {list(alpha.shape)}"
            )
        call.alpha = alpha.narrow(0, first, mine)
    if slopes is not None:
        if slopes.dim() not in (1, 2) or slopes.shape[-1] != heads:
            raise RuntimeError(
                f"{_FUNCTION}: alibi_slopes must be of shape (heads,) or (batch, heads) with {heads} heads, got "
                f"{list(slopes.shape)}"
            )
        call.alibi_slopes = slopes.narrow(-1, first, mine)
    # (W, …): what goes to each process, in one collective for all three.
    tensors = [x.unflatten(1, (world, -1)).transpose(0, 1) for x in (query, key, value)]
    rows = _to_each(place, torch.cat([x.flatten(1) for x in tensors], dim=1))
    whole = [
        torch.cat(in_order([row.view(x.shape[1:]).chunk(2, dim=dim) for row in rows_of_x.unbind(0)]), dim=dim)
        for x, rows_of_x in zip(tensors, rows.split([x[0].numel() for x in tensors], dim=1), strict=True)
    ]
    out = call.attend(*whole, call.of_all()) if attend is None else attend(*whole)
    chunks = out.chunk(2 * world, dim=dim)
    sent = [torch.cat([chunks[c] for c in chunks_of(process, world)], dim=dim) for process in range(world)]
    back = _to_each(place, torch.stack(sent).flatten(1))
    return torch.cat([x.view_as(sent[0]) for x in back.unbind(0)], dim=1)


def _to_each(place: Place, rows):
    """(W, n): row p goes to process p, and what comes from it takes its place."""
    lengths = [rows.shape[1]] * place.world
    return exchanged(rows.flatten(), lengths, lengths, place.name)().view_as(rows)
