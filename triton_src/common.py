"""What every kernel shares: products and casts, which keys a row sees, what a score weighs, lists of tiles.

Names follow the mathematics: z = (alpha - 1) * scale * q.k, m is a row's largest z, t = tau - m its threshold relative
to that, p a weight and u = p^(2 - alpha). Key tiles are TILE = 64 keys wide, as the tile bits of the op are.
"""

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice

TILE = tl.constexpr(64)  # side of the tiles that the op's tile bits speak of
WORD = tl.constexpr(32)  # tile bits in a word
CHUNK = tl.constexpr(128)  # tiles of a row or column that are looked at together
GROUP = tl.constexpr(16)  # rows of one warp in the matrix units' layout: what is kept for each group, none waits for
PROBED = tl.constexpr(16)  # one of so many blocks of rows is probed, at about so many tiles of it
LISTED = tl.constexpr(32)  # tiles whose marked rows are listed together
ROOM = tl.constexpr(2560)  # rows that a list of marked ones has room for
# A window bound that never binds, small enough that adding a row index does not overflow; as a row it is beyond all.
UNLIMITED = tl.constexpr(1 << 30)

# How lengths are given (`Lengths` in csrc/cuda/kernels.h says the same).
LENGTHS_NONE = tl.constexpr(0)
LENGTHS_PADDED = tl.constexpr(1)  # (B,) length of every sequence of a right-padded batch
LENGTHS_PACKED = tl.constexpr(2)  # (B + 1,) offsets into a packed batch

# How alpha is known: two values have code of their own, everything else goes through powers at run time.
ALPHA_ANY = tl.constexpr(0)
ALPHA_1_5 = tl.constexpr(1)
ALPHA_2 = tl.constexpr(2)

# Where alpha is (`AlphaFrom` in csrc/cuda/kernels.h says the same).
ALPHA_NUMBER = tl.constexpr(0)
ALPHA_SHARED = tl.constexpr(1)
ALPHA_PER_HEAD = tl.constexpr(2)

LEAST_ALPHA = tl.constexpr(1.0078125)  # 1.01 as bfloat16 rounds it, which a tensor of that type holds

LN_2 = tl.constexpr(0.6931471805599453)

# The interpreter keeps bfloat16 as integers: products of them are garbage and casts cut bits off.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc=None):
    """a @ b (+ acc) in fp32. fp32 operands are split into three bf16 each, whose six largest products keep all digits,
    and take as long as three tf32 products, which lose two bits."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc=acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc=acc, input_precision="bf16x6" if a.dtype == tl.float32 else "tf32")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x (fp32) in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def max_or_nan(x, axis: tl.constexpr):
    """Maximum along an axis; unlike tl.max it does not lose a NaN."""
    if INTERPRETED:  # a reduction with its own combine function is a Python loop there
        return tl.where(tl.sum((x != x).to(tl.int32), axis) > 0, float("nan"), tl.max(x, axis))
    else:
        return tl.reduce(x, axis, _larger_or_nan)


@triton.jit
def program(blocks, heads):
    """(block, head, batch) of this program in a grid of one dimension; the others end at 65535. Head and batch are 64
    bits wide, and so is every offset that begins with one of them."""
    index = tl.program_id(0)
    head = index // blocks
    return index % blocks, (head % heads).to(tl.int64), (head // heads).to(tl.int64)


@triton.jit
def numbers_of(first, ROWS: tl.constexpr):
    """The numbers of a block's rows: `first` itself if it is a vector of them, else first, first + 1, ..."""
    return first if len(first.shape) > 0 else first + tl.arange(0, ROWS)


@triton.jit
def load_rows(
    base, first, limit, stride, width, ROWS: tl.constexpr, PAD: tl.constexpr, MASKED: tl.constexpr, start=None
):  # fmt: skip
    """Rows of a matrix as a (ROWS, PAD) block: first, first + 1, ..., or those that a vector `first` names. Zeros right
    of `width` and, if MASKED, before row `start` and from row `limit` on. A row's place is 64 bits wide; offsets inside
    a block of neighbours are 32, which the host sees to (kLongestRow in csrc/cuda/call.cpp)."""
    column = tl.arange(0, PAD)
    mask = (column < width)[None, :]
    if MASKED:
        row = numbers_of(first, ROWS)
        mask = mask & (row < limit)[:, None]
        if start is not None:
            mask = mask & (row >= start)[:, None]
    if len(first.shape) > 0:  # both factors fit 32 bits: one instruction
        place = (base + column)[None, :] + (first.to(tl.int64) * stride.to(tl.int32).to(tl.int64))[:, None]
    else:
        offset = tl.arange(0, ROWS)[:, None] * stride.to(tl.int32) + column[None, :]
        place = base + first.to(tl.int64) * stride + offset
    return tl.load(place, mask=mask, other=0.0)


@triton.jit
def products(
    a, a_base, a_first, a_limit, a_stride, b_base, b_first, b_limit, b_stride, width,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, PAD: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr,
    b_start=None,
):  # fmt: skip
    """a_i.b_j of two blocks of rows. `a` is the block itself if STEP == PAD; else (large fp32 heads, which fit neither
    registers nor shared memory) both go by STEP columns at a time and are read again. Rows as in load_rows."""
    if STEP == PAD:
        b = load_rows(b_base, b_first, b_limit, b_stride, width, B_ROWS, PAD, MASKED, b_start)
        s = dot(a, tl.trans(b))
    else:
        s = tl.zeros([A_ROWS, B_ROWS], tl.float32)
        for column in range(0, width, STEP):
            a_part = load_rows(a_base + column, a_first, a_limit, a_stride, width - column, A_ROWS, STEP, True)
            b_part = load_rows(
                b_base + column, b_first, b_limit, b_stride, width - column, B_ROWS, STEP, MASKED, b_start
            )
            s = dot(a_part, tl.trans(b_part), s)
    return s


@triton.jit
def load_factor(base, first, limit, stride, width, ROWS: tl.constexpr, PAD: tl.constexpr, STEP: tl.constexpr):
    """The block `a` of `products`, which matrix products read from shared memory: as it was loaded, since what is
    computed first goes through registers again in every product."""
    return load_rows(base, first, limit, stride, width, ROWS, PAD, True) if STEP == PAD else 0


@triton.jit
def store_rows(base, x, first, limit, stride, width, ROWS: tl.constexpr, PAD: tl.constexpr):
    """Stores the (ROWS, PAD) block x as rows first, first + 1, ... below `limit`, columns below `width`."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, PAD)
    mask = (column < width)[None, :] & (first + row < limit)[:, None]
    offset = row[:, None] * stride.to(tl.int32) + column[None, :]
    tl.store(base + first.to(tl.int64) * stride + offset, x, mask=mask)


@triton.constexpr_function
def stages(EDGE, ALPHA):
    """How deep a loop over tiles is pipelined; None: as the variant says. Over edges it is mostly a step or two, and a
    deeper one only begins and ends for longer. For any alpha all candidates count as edges."""
    return 2 if EDGE and ALPHA != ALPHA_ANY else None


# ---- which keys a row sees -------------------------------------------------------------------------------------------


@triton.jit
def sequence(lengths, kind, batch, rows, limit):
    """(offset, length, extent) of one sequence among `rows` rows of storage: where it starts, how many rows it has (at
    most `limit`), how many rows there are its to write. Lengths come from the user's GPU memory unchecked, so they are
    clamped: wrong ones give wrong rows, never a stray access. Offsets never fall, which the host sees to."""
    given = tl.load(lengths + batch, mask=kind != LENGTHS_NONE, other=limit)
    end = tl.load(lengths + batch + 1, mask=kind == LENGTHS_PACKED, other=rows)
    packed = kind == LENGTHS_PACKED
    offset = tl.where(packed, tl.minimum(tl.maximum(given, 0), rows), 0)
    length = tl.where(packed, tl.minimum(end, rows) - offset, given)
    length = tl.minimum(tl.maximum(length, 0), limit)
    return offset.to(tl.int64), length, tl.where(packed, length, limit)


@triton.jit
def first_tile_row(kind, batch, heads, head, offset, tile_rows):
    """Where the tile rows of a sequence start among those of all. Those of a packed batch stand as close as they can be
    placed by lengths alone (`packed_tile_row` in csrc/attention.h)."""
    packed = head * tile_rows + offset // TILE + batch
    return tl.where(kind == LENGTHS_PACKED, packed, (batch * heads + head) * tile_rows)


@triton.jit
def visible_keys(row, length_q, length_k, window_left, window_right):
    """Row i sees keys first <= j < end. Causal order, window and lengths are known here, and solved for the row in
    `first_row_that_sees`; everything else asks these two."""
    diagonal = row + length_k - length_q
    first = tl.maximum(diagonal - window_left, 0)
    end = tl.minimum(diagonal + window_right + 1, length_k)
    return first, tl.where(row < length_q, end, 0)


@triton.jit
def first_row_that_sees(length_q, length_k, window_right):
    """The first row that sees a key, if there is one: what `visible_keys` says, solved for the row. All after it do."""
    return tl.maximum(length_q - length_k - window_right, 0)


@triton.jit
def visible_tiles(row, rows, length_q, length_k, window_left, window_right):
    """The key tiles that a block of query rows sees: `inner` of them, from `inner_first` on, seen whole by all rows,
    and `edge` more around them, from `first` on (see ordered_tile)."""
    last_row = tl.minimum(row + rows, length_q) - 1
    first_key, end_low = visible_keys(row, length_q, length_k, window_left, window_right)
    first_high, end_key = visible_keys(last_row, length_q, length_k, window_left, window_right)
    first = first_key // TILE
    end = tl.where(row < length_q, tl.maximum(tl.cdiv(tl.maximum(end_key, 0), TILE), first), first)
    inner_first = tl.minimum(tl.cdiv(first_high, TILE), end)
    inner = tl.maximum(tl.minimum(tl.maximum(end_low, 0) // TILE, end) - inner_first, 0)
    return first, inner_first, inner, end - first - inner


@triton.jit
def ordered_tile(index, first, inner_first, inner):
    """The visible tiles in the order of visit: the inner ones, then those left of them, then those right of them."""
    tile = first + index - inner
    return tl.where(index < inner, inner_first + index, tl.where(tile >= inner_first, tile + inner, tile))


@triton.jit
def keys_of_block(row, rows, length_q, length_k, window_left, window_right):
    """(first, end) of the keys that some row of a block sees. What others hold, NaN too, must not get into sums over
    the block."""
    first, _end = visible_keys(row, length_q, length_k, window_left, window_right)
    last_row = tl.minimum(row + rows, length_q) - 1
    _first, end = visible_keys(last_row, length_q, length_k, window_left, window_right)
    return first, end


@triton.jit
def hide(s, first, end, row_axis: tl.constexpr, key):
    """-inf for the scores of keys that their row does not see. `first`, `end` belong to the rows along `row_axis`.
    One comparison for both ends: as an unsigned number what is before the first is above all."""
    other: tl.constexpr = 1 - row_axis
    place = tl.expand_dims(key, row_axis) - tl.expand_dims(first, other)
    count = tl.expand_dims(tl.maximum(end - first, 0), other)
    return tl.where(place.to(tl.uint32, bitcast=True) < count.to(tl.uint32, bitcast=True), s, float("-inf"))


# ---- what a score weighs ---------------------------------------------------------------------------------------------


@triton.jit
def alpha_or_nan(alpha):
    """alpha, NaN where it is out of its range, which only the GPU can see of a tensor; so is all that comes of it."""
    return tl.where((alpha >= LEAST_ALPHA) & (alpha <= 2.0), alpha, float("nan"))


@triton.jit
def alpha_of(alphas, kind, head, alpha, ALPHA: tl.constexpr):
    """A head's alpha. Code for one alpha does not look."""
    if ALPHA == ALPHA_1_5 or ALPHA == ALPHA_2:  # noqa: SIM109
        return alpha
    else:
        place = tl.where(kind == ALPHA_PER_HEAD, head, 0)
        return alpha_or_nan(tl.load(alphas + place, mask=kind != ALPHA_NUMBER, other=alpha))


@triton.jit
def slope_of(slopes, given, slopes_batch, batch, head, factor, alpha, ALPHA: tl.constexpr):
    """A head's ALiBi slope, in units of q.k. Code for one alpha has none: its time is short."""
    if ALPHA == ALPHA_1_5 or ALPHA == ALPHA_2:  # noqa: SIM109
        return 0.0
    else:
        slope = tl.load(slopes + batch * slopes_batch + head, mask=given != 0, other=0.0)
        return slope * (alpha - 1.0) / factor


@triton.jit
def visible_scores(
    q, query, first_row, limit_q, query_row, key, first_j, limit_k, key_row, width,
    first_key, end_key, diagonal, slope,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAD: tl.constexpr, STEP: tl.constexpr, ALPHA: tl.constexpr,
    EDGE: tl.constexpr, start_k=None,
):  # fmt: skip
    """Scores q.k of a block of rows and the keys from first_j on, or those that a vector first_j names, lowered by
    ALiBi; -inf where an EDGE hides keys."""
    s = products(
        q, query, first_row, limit_q, query_row, key, first_j, limit_k, key_row, width,
        BLOCK_M, BLOCK_N, PAD, STEP, EDGE, start_k,
    )  # fmt: skip
    key_index = numbers_of(first_j, BLOCK_N)
    s = far_away(s, slope, diagonal, key_index, 0, ALPHA)
    return hide(s, first_key, end_key, 0, key_index) if EDGE else s


@triton.jit
def far_away(s, slope, diagonal, key, row_axis: tl.constexpr, ALPHA: tl.constexpr):
    """ALiBi: scores of keys lowered by slope * |diagonal - key|, where `diagonal` is a row's own place among keys."""
    if ALPHA == ALPHA_1_5 or ALPHA == ALPHA_2:  # noqa: SIM109
        return s
    else:
        other: tl.constexpr = 1 - row_axis
        place = tl.expand_dims(diagonal.to(tl.float32), other) - tl.expand_dims(key.to(tl.float32), row_axis)
        return s - slope * tl.abs(place)


@triton.jit
def score_scale(scale, alpha):
    """|scale| * (alpha - 1), by which q.k becomes z: for a negative scale the kernels are given -query, so that q.k
    orders keys as z does. Never quite zero, so that the -inf of a hidden key stays -inf."""
    return tl.maximum(tl.abs(scale) * (alpha - 1.0), 1e-30)


@triton.jit
def threshold_pair(m, t, EXACT: tl.constexpr):
    """What `excess` takes: (tau, unused), or (m, t) if EXACT, as fp32 is: near the maximum z - m is exact, where
    tau = m + t would be rounded."""
    return (m, t) if EXACT else (m + t, t)


@triton.jit
def excess(s, factor, m, t, EXACT: tl.constexpr):
    """[z - tau]+ of scores q.k: how far they are above the threshold, from 0 to 1 as t >= -1. It is written so that the
    compiler makes one instruction of it, a multiply-add that saturates, where it is not EXACT. NaN gives 0: rows that
    see one are marked by their maximum."""
    y = (s * factor - m) - t if EXACT else s * factor - m
    return tl.minimum(tl.maximum(y, 0.0), 1.0)


@triton.jit
def log2(x, EXACT: tl.constexpr):
    """log2 x, x >= 0; if not EXACT by the one instruction that is right to 22 bits, where the other takes fifteen."""
    if EXACT or INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def weights(x, alpha, ALPHA: tl.constexpr, EXACT: tl.constexpr):
    """(p, u) of an excess x: p = x^(1/(alpha-1)) and u = p^(2-alpha)."""
    if ALPHA == ALPHA_1_5:
        return x * x, x
    elif ALPHA == ALPHA_2:
        return x, is_positive(x)
    else:
        exponent = 1.0 / (alpha - 1.0)  # on its own, so that the one division leaves the loop
        log = log2(x, EXACT) * exponent
        return tl.exp2(log), tl.where(x > 0.0, tl.exp2((2.0 - alpha) * log), 0.0)


@triton.jit
def alpha_term(p, log, alpha):
    """(e^L (1 - L) - 1) / (alpha - 1)^2 with L = (alpha - 1) ln p; near L = 0 by its series, which starts at -L^2/2.
    With log = log2 p. Times dS_j, the gradient of a score, it is what that key adds to the gradient of alpha."""
    rate = alpha - 1.0
    x = rate * LN_2 * tl.where(p == 0.0, 0.0, tl.maximum(log, -150.0))  # the log of a denormal number may be -inf
    series = 1 / 2 + x * (1 / 3 + x * (1 / 8 + x * (1 / 30 + x * (1 / 144 + x * (1 / 840 + x * (1 / 5760))))))
    closed = tl.exp2(x / LN_2) * (1.0 - x) - 1.0
    return tl.where(tl.abs(x) < 0.5, -x * x * series, closed) / (rate * rate)


@triton.jit
def column_counts(x):
    """Counts of x > 0 over the columns that `column_sums` adds, for x >= +0. As integers: the lesser of the bits and 1,
    three of which one instruction adds."""
    return column_sums(tl.minimum(x.to(tl.int32, bitcast=True), 1))


@triton.jit
def is_positive(x):
    """1 where x > 0, else 0, for x >= 0: one saturating multiplication instead of a comparison and a selection."""
    return tl.minimum(tl.maximum(x * 1e30, 0.0), 1.0)


@triton.jit
def column_sums(x):
    """Sums over the columns of (rows, columns) that are equal modulo 8: in the matrix units' layout a thread holds
    these itself. A row's sum, which threads share, is then taken once, after a loop."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 8, 8]), 1)


@triton.jit
def add(total, lost, x, EXACT: tl.constexpr):
    """(total + x, what that rounds away, to be given to the next addition if EXACT), after Kahan. A plain sum of
    thousands of equal numbers is off by as many equal roundings. Adding 0 changes nothing, so that no bits depend on
    which tiles without weight are visited."""
    if EXACT:
        y = x - lost
        grown = total + y
        return tl.where(x == 0.0, total, grown), tl.where(x == 0.0, lost, (grown - total) - y)
    else:
        return total + x, lost


@triton.jit
def threshold_step(sum_p, sum_u, t, near, alpha, ALPHA: tl.constexpr):
    """(how far t should rise or, if negative, fall; the sum of u there as a + b P of the sum P of p there: a, b), from
    sums over the row at t.

    For alpha = 1.5 and n keys that keep their weight sum p is a polynomial of the second degree in t, whose root is
    taken. Counting n would be a quarter of the instructions. Excesses spread as (1 - x/L)^b, b > -1, between 0 and the
    largest, L = -t, as equal, uniform and exponential ones are, number n = 2 (sum u)^2 / sum p - (sum u) / L. That is
    for rows that are `near`; for the others it is (sum u)^2 / sum p, which n never is below, and the step
    `newton_step`. What P becomes tells the slope between, -2 times the mean of both sums of u; after small steps n does
    better. For alpha = 2 the polynomial is of the first degree, and its root that step."""
    if ALPHA == ALPHA_1_5:
        least = sum_u * sum_u / sum_p
        count = tl.where(near, 2.0 * least + sum_u / t, least)
        root = tl.sqrt(tl.maximum(sum_u * sum_u - count * (sum_p - 1.0), 0.0))
        step = (sum_p - 1.0) / (sum_u + root)
        large = tl.abs(sum_p - 1.0) > 0.01
        there = tl.where(large, sum_p / step - sum_u, sum_u - count * step)
        some = sum_u > 0.0
        return tl.where(some, step, 0.0), tl.where(some, there, 0.0), tl.where(some & large, -1.0 / step, 0.0)
    else:
        return newton_step(sum_p, sum_u, alpha, ALPHA), sum_u, tl.zeros(sum_u.shape, tl.float32)


@triton.jit
def newton_step(sum_p, sum_u, alpha, ALPHA: tl.constexpr):
    """How far t may rise. Newton's step for ||[y - t]+|| = 1 in the norm of exponent e = 1/(alpha-1), which is
    convex, decreasing and nearly straight: it never passes the solution and needs neither a bracket nor a third sum.
    ||x||_e = sum_p^(alpha-1), so the step is (sum_p - sum_p^(2-alpha)) / sum_u."""
    if ALPHA == ALPHA_1_5:
        power = tl.sqrt(sum_p)
    elif ALPHA == ALPHA_2:
        power = tl.full(sum_p.shape, 1.0, tl.float32)
    else:
        power = tl.exp2((2.0 - alpha) * tl.log2(sum_p))
    return tl.where(sum_u > 0.0, (sum_p - power) / sum_u, 0.0)


# ---- lists of tiles --------------------------------------------------------------------------------------------------


@triton.jit
def append(listed, count, entry, wanted, STEP: tl.constexpr = 1):
    """Appends the wanted ones of a vector of entries to a list in global memory, upwards or downwards; returns its new
    length. Loops over a list have a known trip count and no branch, which is what keeps them pipelined."""
    place = count + tl.cumsum(wanted.to(tl.int32), 0) - 1
    tl.store(listed + place * STEP, entry, mask=wanted)
    return count + tl.sum(wanted.to(tl.int32), 0)


@triton.jit
def list_weighing(listed, tiles, first, inner_first, inner, edge, ANY: tl.constexpr, every=1):
    """Lists the visible tiles whose bit is set, or of `every` so many only one: (inner ones, all), inner first; all are
    edges for ANY alpha."""
    count = 0
    inner_count = 0
    for start in range(0, inner + edge, CHUNK):
        index = start + tl.arange(0, CHUNK)
        tile = ordered_tile(index, first, inner_first, inner)
        wanted = tile_bit(tiles, tile, index < inner + edge) & (index % every == 0)
        count = append(listed, count, tile, wanted)
        inner_count += tl.sum((wanted & (index < inner)).to(tl.int32), 0)
    tl.debug_barrier()  # what other threads wrote is read from here on
    return 0 if ANY else inner_count, count


@triton.jit
def listed_tile(listed, index, end, PARTS: tl.constexpr):
    """The entry for the index-th step of a loop over a list, 0 from `end` on, where none is wanted. Loops read it a
    step ahead: waiting for what addresses come from took a fifth of their time."""
    return tl.load(listed + index // PARTS, mask=index < end, other=0)


@triton.jit
def part_of(index, PARTS: tl.constexpr):
    """Which part of its tile the index-th step of a loop over a list works on, if a tile takes PARTS steps."""
    return index - index // PARTS * PARTS  # the interpreter's loop indices know no %


@triton.jit
def tile_bit(words, tile, mask):
    """Whether the tile's bit is set in a row of words."""
    word = tl.load(words + tile // WORD, mask=mask, other=0)
    return ((word >> (tile % WORD)) & 1) != 0


# ---- marks: which keys of a tile weigh, and for whom -----------------------------------------------------------------


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def any_bits(x, axis: tl.constexpr):
    """The bits that are set in any number along an axis."""
    if INTERPRETED:  # as in max_or_nan
        bit = tl.arange(0, WORD)
        return tl.sum(tl.max((tl.expand_dims(x, len(x.shape)) >> bit) & 1, axis) << bit, len(x.shape) - 1)
    else:
        return tl.reduce(x, axis, _or)


@triton.jit
def bits_set(x):
    """How many bits of a number are set."""
    if INTERPRETED:
        return tl.sum((tl.expand_dims(x, len(x.shape)) >> tl.arange(0, WORD)) & 1, len(x.shape))
    else:
        return libdevice.popc(x)


@triton.jit
def marks_of(s, factor, high, low, weighs_all, EXACT: tl.constexpr):
    """Of a block of rows and keys with scores s: ((groups of rows, words) bits of the keys that a row of the group
    weighs, (groups,) bits of the rows that weigh a key). What `excess` takes the positive part of is negated here, so
    that its sign is the mark: a key weighs by these bits if and only if it does by `excess`."""
    ROWS: tl.constexpr = s.shape[0]
    WORDS: tl.constexpr = s.shape[1] // WORD
    below = (high[:, None] - s * factor) + low[:, None] if EXACT else high[:, None] - s * factor
    bit = tl.full([s.shape[1]], 1, tl.int32) << (tl.arange(0, s.shape[1]) % WORD)
    weighs = (below.to(tl.int32, bitcast=True) >> 31) & bit[None, :]
    words = any_bits(tl.reshape(weighs, [ROWS, WORDS, WORD]), 2)
    row_bit = tl.full([ROWS], 1, tl.int32) << (tl.arange(0, ROWS) % GROUP)
    rows = tl.where((any_bits(words, 1) != 0) | weighs_all, row_bit, 0)
    groups = tl.reshape(words, [ROWS // GROUP, GROUP, WORDS])
    return any_bits(groups, 1), any_bits(tl.reshape(rows, [ROWS // GROUP, GROUP]), 1)


@triton.jit
def gathers(shares, head, below):
    """Whether of the probed keys of a key head less than `below` per cent weigh, so that to gather them pays. 0 per
    cent: nothing was probed."""
    weigh = tl.load(shares + 2 * head, mask=below > 0, other=0)
    probed = tl.load(shares + 2 * head + 1, mask=below > 0, other=0)
    return weigh.to(tl.int64) * 100 < probed.to(tl.int64) * below


@triton.jit
def list_marked(chosen, listed, gap, marks, stride, start, inner, count):
    """Lists in `chosen` the marked rows of the tiles listed from the start-th on, as long as there is room: (how many,
    how many of them in the `inner` tiles, which come first, the tile to go on with). The list of tiles has a `gap`
    after the inner ones. `marks` of a tile are two words, `stride` pairs of words apart from tile to tile."""
    n = 0
    inner_n = 0
    bit = tl.arange(0, WORD)
    below = (tl.full([WORD], 1, tl.int32) << bit) - 1
    half = tl.arange(0, TILE // WORD)
    tl.debug_barrier()  # the old list may still be read
    while (start < count) & (n <= ROOM - LISTED * TILE):
        index = start + tl.arange(0, LISTED)
        known = index < count
        tile = tl.load(listed + index + tl.where(index < inner, 0, gap), mask=known, other=0)
        place = (tile.to(tl.int64) * stride)[:, None] * (TILE // WORD) + half[None, :]
        words = tl.reshape(tl.load(marks + place, mask=known[:, None], other=0), [LISTED * TILE // WORD])
        first = tl.reshape(tile[:, None] * TILE + half[None, :] * WORD, [LISTED * TILE // WORD])
        counts = bits_set(words)
        before = n + tl.cumsum(counts, 0) - counts
        row_place = before[:, None] + bits_set(words[:, None] & below[None, :])
        tl.store(chosen + row_place, first[:, None] + bit[None, :], mask=((words[:, None] >> bit[None, :]) & 1) != 0)
        of_tile = tl.sum(tl.reshape(counts, [LISTED, TILE // WORD]), 1)
        inner_n += tl.sum(tl.where(index < inner, of_tile, 0), 0)
        n += tl.sum(of_tile, 0)
        start += LISTED
    tl.debug_barrier()  # what other threads wrote is read from here on
    return n, inner_n, start


@triton.jit
def listed_step(chosen, listed, index, n, ROWS: tl.constexpr, MARKED: tl.constexpr):
    """What the index-th step of a loop over n rows takes: the entries of ROWS chosen ones, far beyond all rows where
    there is none, or of the tile that they are in. Read a step ahead, as in listed_tile."""
    first = index * ROWS
    if MARKED:
        place = tl.arange(0, ROWS)
        return tl.load(chosen + first + place, mask=place < n - first, other=UNLIMITED)
    else:
        return tl.load(listed + index // (TILE // ROWS), mask=first < n, other=0)


@triton.jit
def rows_of_step(entry, index, ROWS: tl.constexpr, MARKED: tl.constexpr):
    """The rows of that step as load_rows takes them."""
    return entry if MARKED else entry * TILE + part_of(index, TILE // ROWS) * ROWS
