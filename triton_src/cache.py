"""What writes to a paged cache: each token's rows are copied to the slot that is its own. And to an index of its keys:
the codes of those in some slots."""

import triton
import triton.language as tl

from .lib.codes import code_of
from .lib.matrices import Matrix
from .spec import KEY_INDEX, Spec


@triton.jit
def append(
    key, value, key_cache, value_cache, slots, compared, heads, head_dim, value_dim, page_size, blocks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The rows of BLOCK_M heads of a token, unless its slot is none of the cache's, or a later token's too: which of
    several programs writes last is not known. Later ones are looked for among `compared` tokens, up to BLOCK_N; where
    there are more the host has seen to it, and compares none."""
    head_blocks = tl.cdiv(heads, BLOCK_M)
    token = tl.program_id(0).to(tl.int64) // head_blocks
    head = tl.program_id(0) % head_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = tl.load(slots + token)
    if (slot < 0) | (slot >= blocks.to(tl.int64) * page_size):
        return
    other = tl.arange(0, BLOCK_N)
    others = tl.load(slots + other, mask=(other < compared) & (other > token), other=-1)
    if tl.max((others == slot).to(tl.int32), 0) > 0:
        return
    copy_rows(key, key_cache, token, slot, head, heads, head_dim, page_size, BLOCK_D)
    copy_rows(value, value_cache, token, slot, head, heads, value_dim, page_size, BLOCK_D)


@triton.jit
def copy_rows(source, cache, token, slot, head, heads, columns, page_size, BLOCK_D: tl.constexpr):
    block = slot // page_size
    row = slot - block * page_size
    column = tl.arange(0, BLOCK_D)
    mask = (head < heads)[:, None] & (column < columns)[None, :]
    head = head.to(tl.int64)[:, None]
    start = source.data + token * source.row_stride
    x = tl.load(start + head * source.head_stride + column[None, :], mask=mask, other=0.0)
    start = cache.data + block * cache.batch_stride + row * cache.row_stride
    tl.store(start + head * cache.head_stride + column[None, :], x, mask=mask)


# Rows start anywhere: a cache is only to be read from aligned ones. A batch entry of the cache is a block.
ROWS = Matrix(data="*T", batch_stride="i64", head_stride="i64", row_stride="i64")
APPEND = Spec(
    append,
    arguments=dict(
        key=ROWS, value=ROWS, key_cache=ROWS, value_cache=ROWS, slots="*i64", compared="i32",
        heads="i32", head_dim="i32", value_dim="i32", page_size="i32", blocks="i32",
    ),
    writes=("key_cache", "value_cache"),
    constants=("BLOCK_M", "BLOCK_N", "BLOCK_D"),
    programs="a token and BLOCK_M heads",
    shapes="cache",
    alphas=("any",),
)  # fmt: skip


@triton.jit
def index_keys(key_cache, slots, index, BLOCK_D: tl.constexpr):
    """The code of one head's key in a slot, unless that is none of the cache's. Whoever has the same slot writes the
    same."""
    token = tl.program_id(0).to(tl.int64) // index.kv_heads
    head = (tl.program_id(0) % index.kv_heads).to(tl.int64)
    slot = tl.load(slots + token)
    if (slot < 0) | (slot >= index.blocks.to(tl.int64) * index.page_size):
        return
    block = slot // index.page_size
    row = slot - block * index.page_size
    key = key_cache.data + block * key_cache.batch_stride + head * key_cache.head_stride + row * key_cache.row_stride
    code, scale, error = code_of(key, index.head_dim, BLOCK_D)
    chunk = block * index.page_stride + head * index.head_stride
    tl.store(index.codes + chunk + row * BLOCK_D + tl.arange(0, BLOCK_D), code)
    norms = index.norms + chunk // 4 + row
    tl.store(norms, scale)
    tl.store(norms + index.page_size, error)


INDEX_KEYS = Spec(
    index_keys,
    arguments=dict(key_cache=ROWS, slots="*i64", index=KEY_INDEX),
    writes=("index",),
    constants=("BLOCK_D",),
    programs="a key head of a slot",
    shapes="cache",
    alphas=("any",),
)  # fmt: skip
