"""The kernels run by Triton's interpreter on CPU tensors, launched from Python as the portable implementation
(csrc/cuda/portable) launches them, with any tile shapes."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # Triton decides when it is imported

import math
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch

# The first launch would import it, but cannot once a test has imported triton_src.compile, which ends interpretation.
import triton.experimental.gluon  # noqa: F401
from torch import Tensor

from common import ROOT, Inputs
from emulated.interpreter import patched_once

sys.path.append(str(ROOT))
from triton_src import variants
from triton_src.attention import few, few_indexed
from triton_src.cache import INDEX_KEYS
from triton_src.lib import codes, entmax, marks, visibility
from triton_src.lib.call import Call, Few
from triton_src.lib.codes import KeyIndex
from triton_src.lib.dropout import Dropout
from triton_src.lib.entmax import Alpha
from triton_src.lib.matrices import EvenPagedMatrix, Matrix, PagedMatrix
from triton_src.lib.scores import Scores
from triton_src.lib.tile_lists import count_tile_rows, count_tile_words
from triton_src.lib.visibility import Sequences

TILE = visibility.TILE.value
NOT_LISTED = -2  # in support: kSupportOverflow in csrc/ops/attention.h
UNMARKED = -1
UNTOUCHED = 12345  # a number that results and scratch hold before


@dataclass(frozen=True)
class Tiles:
    """Keys that attend scans at a time, whether its products go ahead, the side along which kernels walk tiles, and
    head dimensions at a time (None: all)."""

    scan_n: int = 64
    ahead: bool = False
    walk: int = 64
    step_d: int | None = None


class Summary(NamedTuple):
    support_size: Tensor
    largest_weight: Tensor
    tile_counts: Tensor


class Result(NamedTuple):
    out: Tensor
    row_state: Tensor
    tiles: Tensor
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    alpha_terms: Tensor | None = None  # of each row; empty where alpha is a number
    summary: Summary | tuple = ()
    remaining: Tensor | tuple = ()  # of each tile row: candidates whose keys the forward gathered, or -1
    support: Tensor | tuple = ()
    key_marks: Tensor | tuple = ()  # that the backward made itself; UNMARKED elsewhere


def matrix(x: Tensor) -> Matrix:
    """A tensor as the kernels take it; packed (tokens, heads, size) ones have no batch."""
    return Matrix(x, 0, x.stride(1), x.stride(0)) if x.dim() == 3 else Matrix(x, *x.stride()[:3])


def paged_matrix(cache: Tensor, table: Tensor) -> PagedMatrix:
    """A cache (blocks, heads, page, size) and its table (sequences, pages) as the kernels take them: paged_matrix_of in
    csrc/cuda/portable/call.cpp."""
    blocks, _, page_size, _ = cache.shape
    shift = (page_size - 1).bit_length()
    inverse = -(-(1 << 30 + shift) // page_size)
    return PagedMatrix(cache, *cache.stride()[:3], table, table.stride(0), blocks, page_size, inverse, shift)


def is_even(page: int) -> bool:
    """Whether pages of so many rows are those of an EvenPagedMatrix."""
    return page >= 16 and page & (page - 1) == 0


def even_paged_matrix(cache: Tensor, table: Tensor) -> EvenPagedMatrix:
    blocks, _, page_size, _ = cache.shape
    return EvenPagedMatrix(cache, *cache.stride()[:3], table, table.stride(0), blocks, page_size.bit_length() - 1)


def padded_dim(head_dim: int) -> int:
    return max(64, 1 << (head_dim - 1).bit_length())


def key_index_argument(index: Tensor, cache: Tensor) -> KeyIndex:
    """A key index (csrc/ops/key_index.h) of a cache (blocks, heads, page, size) as the kernels take it."""
    blocks, heads, page, head_dim = cache.shape
    chunk = -(-page * (padded_dim(head_dim) + 8) // 16) * 16
    element = {torch.float32: 6, torch.float16: 5, torch.bfloat16: 15}[cache.dtype]
    norms = index.view(torch.float32)[1][page * padded_dim(head_dim) // 4 :]
    header = index[0].view(torch.int32)
    return KeyIndex(index[1], norms, header, index.stride(0), chunk, blocks, page, heads, head_dim, element)


def make_index(cache: Tensor, slots: Tensor | None = None) -> Tensor:
    """The key index of a cache (blocks, heads, page, size), of all of it or of some slots; the rest was not written."""
    blocks, heads, page, head_dim = cache.shape
    chunk = -(-page * (padded_dim(head_dim) + 8) // 16) * 16
    index = torch.full((1 + blocks, max(64, heads * chunk)), 0x7F, dtype=torch.uint8)
    argument = key_index_argument(index, cache)
    errors = index[1:, : heads * chunk].view(blocks, heads, chunk)[..., page * (padded_dim(head_dim) + 4) :]
    errors[..., : 4 * page].view(torch.float32).fill_(torch.inf)
    header = [codes.MAGIC.value, codes.VERSION.value, *argument[5:]]
    argument.header[: len(header)] = torch.tensor(header, dtype=torch.int32)
    slots = torch.arange(blocks * page) if slots is None else slots
    with patched_once():
        INDEX_KEYS.kernel[(len(slots) * heads,)](matrix(cache), slots, argument, BLOCK_D=padded_dim(head_dim))
    return index


def alpha_argument(alpha: float | Tensor) -> Alpha:
    if isinstance(alpha, Tensor):
        return Alpha(alpha.float(), entmax.ALPHA_PER_HEAD.value, 0.0)
    return Alpha(torch.zeros(1), entmax.ALPHA_NUMBER.value, alpha)


def dropout_argument(p: float, seed: int, first: tuple[int, int], origins: Tensor | None) -> Dropout:
    threshold = min(round(p * 2**32), 2**32 - 1)
    bits = threshold - (threshold >> 31 << 32)
    given = torch.zeros(4, dtype=torch.int32) if origins is None else origins.int()
    return Dropout(torch.tensor([seed]), bits, 1 / (1 - p), *first, given, int(origins is not None))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor = 1.5,
    is_causal: bool = False,
    *,
    grad: Tensor | None = None,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    lengths: tuple[Tensor | None, Tensor | None] = (None, None),
    offsets: tuple[Tensor, Tensor | None, int, int | None] | None = None,
    positions: Tensor | None = None,
    table: Tensor | None = None,
    dropout: tuple[float, int] = (0.0, 0),
    first: tuple[int, int] = (0, 0),
    origins: Tensor | None = None,
    alpha_code: str | None = None,
    tiles: Tiles | None = None,
    gather_below: int = 101,
    gather_from: int = 1,
    keeps: bool = True,
    summary: bool = False,
    few_queries: int = -1,
    sharers: int = 2,
    index: Tensor | None = None,
) -> Result:
    """Forward, and with `grad` backward, over the keys that weigh where less than `gather_below` per cent of the probed
    ones do (0: nothing is probed), else over tiles; sequences shorter than `gather_from` are not probed. If it
    `keeps` them the backward finds the forward's marks. Padded tensors
    (B, H, M, D), with `lengths` of queries and keys, (B,) lengths or (B, 2) first rows and ends; or packed ones
    (tokens, H, D) with `offsets` (cu_seqlens_q, cu_seqlens_k, longest query, longest key). alpha as a number, or (H,)
    of heads, which asks for its gradient.
    Sequences of up to `few_queries` queries go the way of attention/few.py, where `sharers` programs share the keys.
    An `index` of the keys is used there. With a `table` (B, W) key and value are a paged cache, (blocks, H_kv, page,
    D); queries may still be packed.
    `positions` (B,) are the places of first queries. `dropout` is (p, seed), and `first` the first batch entry and head
    among those of the whole call, or `origins` (B, 4) what each sequence is counted from."""
    if scale is not None and scale < 0:
        query = -query  # as PreparedCall (csrc/cuda/portable/call.cpp) does
    stored = Stored.of(query, key, value, lengths, offsets, table)
    none = torch.zeros(1)  # where there are no alphas, slopes or positions in memory
    left, right = (visibility.UNLIMITED.value if bound < 0 else bound for bound in window)
    call = Call(
        queries=stored.queries,
        keys=stored.keys,
        alpha=alpha_argument(alpha),
        scores=Scores(
            slopes=none,
            slopes_batch_stride=0,
            has_slopes=0,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            window_left=left,
            window_right=0 if is_causal else right,
            q_positions=none.int() if positions is None else positions,
            has_positions=int(positions is not None),
        ),
        dropout=dropout_argument(*dropout, first, origins),
        state_batch_stride=0 if offsets else stored.heads * stored.queries.max_seqlen,
        heads=stored.heads,
        group=stored.heads // key.shape[1],
        tile_words=count_tile_words(stored.keys.max_seqlen),
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        few_queries=few_queries,
    )
    special = not isinstance(alpha, Tensor) and not dropout[0]
    alpha_code = alpha_code or ({1.5: "1_5", 2.0: "2"}.get(alpha, "any") if special else "any")
    run = Run(Inputs(query, key, value), stored, call, tiles or Tiles(), alpha_code, gather_below, gather_from)
    run.forward(keeps and grad is not None)
    if few_queries >= 0:
        run.forward_of_few(sharers, index)
    found = run.count_support() if summary else ()
    if grad is None:
        return Result(run.out, run.row_state, run.bits, summary=found, remaining=run.remaining)
    return run.backward(grad, isinstance(alpha, Tensor))._replace(summary=found)


class Stored(NamedTuple):
    """How the sequences of a call lie in its tensors: StoredSide in csrc/cuda/sides.h."""

    queries: Sequences
    keys: Sequences
    batch: int
    heads: int
    packed: bool  # queries are
    table: Tensor | None

    @classmethod
    def of(cls, query, key, value, lengths, offsets, table):
        if offsets is None:
            batch, heads, longest_q, _ = query.shape
            rows_q = longest_q
        else:
            rows_q, heads, _ = query.shape
            batch, longest_q = len(offsets[0]) - 1, offsets[2]
        packed_keys = offsets is not None and table is None
        if packed_keys:
            rows_k, longest_k = key.shape[0], offsets[3]
        else:
            rows_k = longest_k = key.shape[2] * (1 if table is None else table.shape[1])

        def side(given, packed, rows, longest):
            if packed:
                kind = visibility.LENGTHS_PACKED
            elif given is None:
                kind = visibility.LENGTHS_NONE
            else:
                kind = visibility.LENGTHS_PADDED if given.dim() == 1 else visibility.LENGTHS_BOUNDS
            tile_rows = count_tile_rows(rows, batch if packed else None)
            given = torch.zeros(1, dtype=torch.int32) if given is None else given
            return Sequences(given, kind.value, rows, longest, tile_rows)

        queries = side(offsets[0] if offsets else lengths[0], offsets is not None, rows_q, longest_q)
        keys = side(offsets[1] if packed_keys else lengths[1], packed_keys, rows_k, longest_k)
        return cls(queries, keys, batch, heads, offsets is not None, table)

    @property
    def many(self) -> tuple[int, ...]:
        """What tensors of queries' tile rows begin with."""
        return () if self.packed else (self.batch,)


class Run:
    """One call: what its launches write, and which there are. Memory is filled with what must not stay."""

    def __init__(self, inputs, stored, call, tiles, alpha_code, gather_below, gather_from):
        query, key, value = self.inputs = inputs
        self.stored, self.call, self.shape, self.alpha_code = stored, call, tiles, alpha_code
        self.gather_below, self.gather_from = gather_below, gather_from
        self.block_d = max(16, 1 << (max(call.head_dim, call.value_dim) - 1).bit_length())
        many, heads, tile_rows = stored.many, stored.heads, stored.queries.tile_rows
        self.key_tiles = math.ceil(stored.keys.max_seqlen / TILE)
        self.out = query.new_full((*query.shape[:-1], call.value_dim), UNTOUCHED)
        rows = (heads, stored.queries.rows) if stored.packed else (stored.batch, heads, stored.queries.max_seqlen)
        self.row_state = torch.full((*rows, 2), float(UNTOUCHED))
        self.tile_lists = torch.full((*many, heads, tile_rows, self.key_tiles), 1 << 30, dtype=torch.int32)
        self.bits = torch.full((*many, heads, tile_rows, call.tile_words), -1, dtype=torch.int32)
        if stored.packed or tile_rows != math.ceil(stored.queries.max_seqlen / TILE):
            self.bits.zero_()  # as forward (csrc/cuda/attention.cpp) does: attend does not write all of it
        paged = stored.table is not None
        key_value = [paged_matrix(x, stored.table) if paged else matrix(x) for x in (key, value)]
        self.arguments = dict(query=matrix(query), key=key_value[0], value=key_value[1])
        self.remaining: Tensor | tuple = ()

    def launch(self, name, block_m=TILE, block_n=None, every=1, constants=None, **arguments):
        block_n = block_n or self.shape.walk
        by_keys = name == "grad_key_value"
        longest, block = (self.stored.keys, block_n) if by_keys else (self.stored.queries, block_m)
        heads = self.call.heads // self.call.group if by_keys else self.call.heads
        programs = math.ceil(math.ceil(longest.max_seqlen / block) / every) * heads * self.stored.batch
        shape = dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=self.block_d, STEP_D=self.shape.step_d or self.block_d)
        if "BLOCK_N" not in variants.KERNELS[name].constants:
            del shape["BLOCK_N"]
        name += suffix_of(name, arguments)
        code = self.alpha_code if self.alpha_code in variants.KERNELS[name].alphas else "any"
        constants = shape | dict(ALPHA=variants.ALPHAS[code]) | (constants or {})
        with patched_once():
            variants.KERNELS[name].kernel[(programs,)](**arguments, call=self.call, **constants)

    def forward(self, keeps: bool) -> None:
        """Sequences of many queries. If it `keeps` marks of keys there is room for them in `support`."""
        capacity = marks.PLACES_BEFORE_MARKS.value + math.ceil(self.key_tiles / 32) if keeps else 0
        self.support = torch.full((*self.row_state.shape[:-1], capacity), NOT_LISTED, dtype=torch.int32)
        self.kept = dict(support=self.support, support_capacity=capacity)
        if self.stored.queries.max_seqlen <= self.call.few_queries:
            return
        *_, key_tiles = lists = self.tile_lists.shape
        # The upper half of -inf: a tile that the scan forgets is lost.
        tile_margins = torch.full((*lists[:-2], 4 * lists[-2], key_tiles), -128, dtype=torch.int16)
        gathers, blocks = self.gather_below > 0, self.tile_lists[..., 0].numel()
        marked = dict(
            remaining=torch.full((blocks, 2), UNTOUCHED, dtype=torch.int32),
            gathered=torch.full((blocks, marks.GATHER_ROOM.value), -1, dtype=torch.int32),
            gather_from=self.gather_from if gathers else visibility.UNLIMITED.value,
            gather_below=self.gather_below,
        )
        for gather in (False, True) if gathers else (False,):
            self.launch(
                "attend",
                **self.arguments,
                out=matrix(self.out),
                row_state=self.row_state,
                tiles=self.bits,
                tile_margins=tile_margins,
                tile_lists=self.tile_lists,
                **self.kept,
                **marked,
                constants=dict(SCAN_N=self.shape.scan_n, AHEAD=self.shape.ahead, GATHER=gather),
            )
        if gathers:
            self.remaining = marked["remaining"][:, 0].view(lists[:-1])

    def forward_of_few(self, sharers: int, index: Tensor | None) -> None:
        if self.stored.queries.max_seqlen <= self.call.few_queries:
            self.bits.zero_()  # as the portable forward does
        _, key, value = self.inputs
        table = self.stored.table
        even = table is not None and is_even(key.shape[2]) and key.dtype != torch.float32
        pages = [
            even_paged_matrix(x, table) if even else self.arguments[name]
            for name, x in (("key", key), ("value", value))
        ]
        indexed = None if index is None else key_index_argument(index, key)
        known = dict(self.arguments, out=matrix(self.out), row_state=self.row_state, tiles=self.bits, index=indexed)
        few_launches(known, pages, self.call, self.stored.batch, self.block_d, self.alpha_code, sharers)

    def count_support(self) -> Summary:
        sizes, largest = (
            torch.full(self.row_state.shape[:-1], UNTOUCHED, dtype=x) for x in (torch.int32, torch.float32)
        )
        found = Summary(sizes, largest, torch.zeros(self.stored.batch, self.stored.heads, 2, dtype=torch.int64))
        self.tile_lists.fill_(1 << 30)
        self.launch(
            "count_support",
            query=self.arguments["query"],
            key=self.arguments["key"],
            row_state=self.row_state,
            tiles=self.bits,
            tile_lists=self.tile_lists,
            **found._asdict(),
            counts_batch_stride=2 * self.stored.heads,
        )
        return found

    def backward(self, grad: Tensor, has_alpha_terms: bool) -> Result:
        stored, keys = self.stored, self.stored.keys
        kv_heads = self.call.heads // self.call.group
        dq, dk, dv = (torch.full_like(x, UNTOUCHED) for x in self.inputs)
        if keys.lengths_kind == visibility.LENGTHS_BOUNDS.value:  # the host zeroes rows before the first
            dk.zero_(), dv.zero_()
        rows = self.row_state.shape[:-1]
        row_terms, row_seeds = torch.full((*rows, 4), float(UNTOUCHED)), torch.full(rows, UNTOUCHED)
        alpha_terms = torch.full(rows if has_alpha_terms else (0,), float(UNTOUCHED))
        self.tile_lists.fill_(1 << 30)
        key_marks = torch.full((*self.tile_lists.shape, 2), UNMARKED, dtype=torch.int32)
        row_marks = torch.full((*self.tile_lists.shape, 4), -1, dtype=torch.int16)
        probe = dict(
            probe_counts=torch.zeros(stored.batch * kv_heads, 2, dtype=torch.int32), gather_below=self.gather_below
        )
        known = dict(row_state=self.row_state, tiles=self.bits, **self.kept, tile_lists=self.tile_lists, **probe)
        for probe_from in (self.gather_from, 0) if self.gather_below else ():
            self.launch(
                "mark",
                every=marks.PROBE_EVERY.value if probe_from else 1,
                query=self.arguments["query"],
                key=self.arguments["key"],
                **known,
                key_marks=key_marks,
                row_marks=row_marks,
                probe_from=probe_from,
            )
        many, tile_rows = stored.many, max(stored.queries.tile_rows, keys.tile_rows)
        gathered = torch.full((*many, stored.heads, tile_rows, marks.GATHER_ROOM.value), -1, dtype=torch.int32)
        query_tiles = math.ceil(stored.queries.max_seqlen / TILE)
        key_lists = torch.full((*many, kv_heads, keys.tile_rows, query_tiles), 1 << 30, dtype=torch.int32)
        of_rows = dict(row_terms=row_terms, row_seeds=row_seeds)
        for gather in (False, True) if self.gather_below else (False,):
            self.launch(
                "grad_query",
                **self.arguments,
                grad_out=matrix(grad),
                out=matrix(self.out),
                grad_query=matrix(dq),
                **of_rows,
                alpha_terms=alpha_terms,
                **known,
                key_marks=key_marks,
                row_marks=row_marks.view(torch.int32),
                gathered=gathered,
                constants=dict(GATHER=gather),
            )
            self.launch(
                "grad_key_value",
                block_m=self.shape.walk,
                block_n=TILE,
                **self.arguments,
                grad_out=matrix(grad),
                grad_key=matrix(dk),
                grad_value=matrix(dv),
                **of_rows,
                tiles=self.bits,
                tile_lists=key_lists,
                marks=row_marks.view(torch.int32),
                gathered=gathered,
                **probe,
                constants=dict(GATHER=gather),
            )
        return Result(
            self.out, self.row_state, self.bits, dq, dk, dv, alpha_terms, (), self.remaining, self.support, key_marks
        )


def suffix_of(kernel: str, arguments: dict) -> str:
    """What the name of a kernel that is given these arguments ends with."""
    reads = [arguments[name] for name in ("key", "value") if name in variants.KERNELS[kernel].arguments]
    return "_paged" if any(isinstance(x, PagedMatrix) for x in reads) else ""


def few_launches(known, pages, call: Call, batch: int, block_d: int, alpha_code: str, sharers: int) -> None:
    """What csrc/cuda/portable/few.cpp launches. `pages` are key and value for the kernels that have code for even
    pages; others take them from what is `known`, as all arguments."""
    queries, keys = call.queries, call.keys
    packed = keys.lengths_kind == visibility.LENGTHS_PACKED.value
    kv_heads = call.heads // call.group
    most = min(call.few_queries, queries.max_seqlen)
    rows, stored = most * call.group, kv_heads * (1 if packed else batch)
    tiles = math.ceil(keys.max_seqlen / TILE)
    splits = math.ceil(tiles / few.SPLIT.value)
    shared = Few(most, rows, stored * keys.tile_rows, min(sharers, tiles), sharers, 1)
    row_blocks, all_rows = math.ceil(rows / 16), batch * kv_heads * rows
    numbers = dict(
        scores=torch.tensor([torch.nan, 1e4]).repeat(rows * shared.row_tiles * TILE // 2),
        tile_max=torch.full((rows * shared.row_tiles,), torch.nan),
        tile_lists=torch.full((rows * shared.row_tiles,), 1 << 30, dtype=torch.int32),
        listed_scores=torch.full((all_rows * few.LISTED.value,), torch.nan),
        listed_keys=torch.full((all_rows * few.LISTED.value,), 1 << 30, dtype=torch.int32),
        is_long=torch.full((all_rows,), 1, dtype=torch.int32),
        weighted=torch.full((all_rows * splits * block_d,), torch.nan),
        weight_sums=torch.full((all_rows * splits,), torch.nan),
    )
    programs = dict(score_few=shared.scorers * row_blocks * kv_heads * batch)
    indexed = known["index"] is not None
    if indexed:
        width = padded_dim(call.head_dim)
        numbers |= dict(
            planes=torch.full((all_rows * few_indexed.PLANES.value * width,), 99, dtype=torch.int8),
            terms=torch.full((all_rows * few_indexed.TERMS.value,), torch.nan),
            tile_bounds=torch.full((rows * shared.row_tiles,), torch.nan),
            floors=torch.full((all_rows * shared.scorers,), torch.nan),
            found=torch.full((batch * kv_heads * row_blocks * keys.rows,), 1 << 30, dtype=torch.int32),
        )
        programs.pop("score_few")
        scanned = shared.scorers * math.ceil(rows / 8) * kv_heads * batch
        together = math.ceil(shared.scorers / few_indexed.SCORERS_TOGETHER.value)
        programs |= dict(
            turn_queries=most * call.heads * batch,
            scan_index=scanned,
            score_found=together * row_blocks * kv_heads * batch,
        )
    programs |= dict(
        solve_few=most * call.heads * batch,
        weigh_few=shared.weighers * row_blocks * kv_heads * batch,
        join_few=most * call.heads * batch,
    )
    even = isinstance(pages[0], EvenPagedMatrix)
    known = known | numbers
    for name, count in programs.items():
        if even and f"{name}_even" in variants.KERNELS:
            name += "_even"
            given = known | dict(zip(("key", "value"), pages, strict=True))
        else:
            name += suffix_of(name, known)
            given = known
        spec = variants.KERNELS[name]
        given = {argument: given[argument] for argument in spec.arguments if argument in given}
        code = variants.ALPHAS[alpha_code if alpha_code in spec.alphas else "any"]
        size = padded_dim(call.head_dim) if indexed and name.startswith(("turn", "scan")) else block_d
        constants = dict(
            BLOCK_M=8 if name.startswith("scan") else 16, BLOCK_N=TILE, BLOCK_D=size, STAGES=3, ALPHA=code, ARCH=90
        )
        used = {name: value for name, value in constants.items() if name in spec.constants}
        if count:
            with patched_once():
                spec.kernel[(count,)](**given, call=call, few=shared, **used)
