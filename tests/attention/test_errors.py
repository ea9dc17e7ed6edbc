"""Bad input: one clear sentence that names the op, the argument, what came and what is accepted."""

import functools

import pytest
import torch

import adasplash
from common import make_inputs

refused = functools.partial(pytest.raises, (RuntimeError, ValueError, TypeError, NotImplementedError))

# What is done to good inputs (query (2, 4, 5, 8), key and value (2, 2, 7, 8)) -> words of the message.
TENSORS = {
    "query of 3 dimensions": (dict(query=lambda x: x[0]), "query 4 3 [4, 5, 8]"),
    "key of 5 dimensions": (dict(key=lambda x: x[None]), "key 4 5"),
    "value of 3 dimensions": (dict(value=lambda x: x[0]), "value 4 3"),
    "scalar query": (dict(query=lambda x: x.sum()), "query 4 0"),
    "batch of key": (dict(key=lambda x: x[:1]), "key batch 2 1"),
    "batch of value": (dict(value=lambda x: x[:1]), "value batch 2 1"),
    "heads of value": (dict(value=lambda x: x[:, :1]), "value heads 2 1"),
    "length of value": (dict(value=lambda x: x[:, :, :6]), "value keys 7 6"),
    "size of key": (dict(key=lambda x: x[..., :7]), "key query 8 7"),
    "heads not divisible": (dict(query=lambda x: x[:, :3]), "query heads multiple 3 2"),
    "more heads of key than of query": (dict(query=lambda x: x[:, :1]), "query heads multiple 1 2"),
    "no heads of key": (dict(key=lambda x: x[:, :0], value=lambda x: x[:, :0]), "query heads 4 0"),
    "size 0": (dict(query=lambda x: x[..., :0], key=lambda x: x[..., :0]), "query 1 256 0"),
    "size 257": (
        dict(query=lambda x: x.repeat(1, 1, 1, 33)[..., :257], key=lambda x: x.repeat(1, 1, 1, 33)[..., :257]),
        "query 1 256 257",
    ),
    "value size 0": (dict(value=lambda x: x[..., :0]), "value 1 256 0"),
    "value size 257": (dict(value=lambda x: x.repeat(1, 1, 1, 33)[..., :257]), "value 1 256 257"),
    "int": (dict(query=lambda x: x.int(), key=lambda x: x.int(), value=lambda x: x.int()), "query float32 Int"),
    "bool query": (dict(query=lambda x: x.bool()), "query float32 Bool"),
    "complex": (dict(query=lambda x: x + 0j, key=lambda x: x + 0j, value=lambda x: x + 0j), "query float32 omplex"),
    "float8": (dict(query=lambda x: x.to(torch.float8_e4m3fn)), "query float32 Float8_e4m3fn"),
    "key of another type": (dict(key=lambda x: x.bfloat16()), "key query Float BFloat16"),
    "value of another type": (dict(value=lambda x: x.double()), "value query Float Double"),
    "key on another device": (dict(key=lambda x: x.to("meta")), "key query cpu meta"),
    "value on another device": (dict(value=lambda x: x.to("meta")), "value query cpu meta"),
    "query on another device": (dict(query=lambda x: x.to("meta")), "key query cpu meta"),
    "sparse key": (dict(key=lambda x: x.to_sparse()), "key dense Sparse"),
    "sparse query": (dict(query=lambda x: x.to_sparse()), "query dense Sparse"),
    "sparse value": (dict(value=lambda x: x.to_sparse_csr() if x.dim() < 3 else x.to_sparse()), "value dense Sparse"),
}

OPTIONS = {
    "alpha 0.5": (dict(alpha=0.5), "alpha 1.01 2 0.5"),
    "alpha 0": (dict(alpha=0), "alpha 1.01 2 0"),
    "alpha -1.5": (dict(alpha=-1.5), "alpha 1.01 2 -1.5"),
    "alpha 1.005": (dict(alpha=1.005), "alpha 1.01 2 1.005"),
    "alpha 2.5": (dict(alpha=2.5), "alpha 1.01 2 2.5"),
    "alpha NaN": (dict(alpha=float("nan")), "alpha 1.01 2 nan"),
    "alpha inf": (dict(alpha=float("inf")), "alpha 1.01 2 inf"),
    "scale NaN": (dict(scale=float("nan")), "scale finite nan"),
    "scale inf": (dict(scale=float("inf")), "scale finite inf"),
}

# Options that are tensors, and the window. What lengths and alpha hold is another matter, of the tests of each.
MORE_OPTIONS = {
    "alpha of 3 heads": (dict(alpha=torch.full((3,), 1.5)), "alpha heads 4 3"),
    "alpha of one head": (dict(alpha=torch.full((1,), 1.5)), "alpha heads 4 1"),
    "alpha of 2 dimensions": (dict(alpha=torch.full((2, 4), 1.5)), "alpha 1 2"),
    "alpha of ints": (dict(alpha=torch.tensor([1, 2, 1, 2])), "alpha float32 float64 Long"),
    "alpha of bfloat16": (dict(alpha=torch.full((4,), 1.5).bfloat16()), "alpha float32 float64 BFloat16"),
    "alpha elsewhere": (dict(alpha=torch.full((4,), 1.5, device="meta")), "alpha cpu meta"),
    "sparse alpha": (dict(alpha=torch.full((4,), 1.5).to_sparse()), "alpha dense Sparse"),
    "q_seqlens of 3": (dict(q_seqlens=torch.tensor([5, 4, 3])), "q_seqlens batch 2 3"),
    "kv_seqlens of 1": (dict(kv_seqlens=torch.tensor([5])), "kv_seqlens batch 2 1"),
    "q_seqlens of 2 dimensions": (dict(q_seqlens=torch.ones(2, 1).int()), "q_seqlens 1 2"),
    "one length for all": (dict(kv_seqlens=torch.tensor(5)), "kv_seqlens 1 0"),
    "kv_seqlens of floats": (dict(kv_seqlens=torch.ones(2)), "kv_seqlens int32 int64 Float"),
    "q_seqlens of bytes": (dict(q_seqlens=torch.ones(2).byte()), "q_seqlens int32 int64 Byte"),
    "q_seqlens elsewhere": (dict(q_seqlens=torch.ones(2, device="meta").int()), "q_seqlens cpu meta"),
    "window": (dict(window=(-2, 3)), "window 0 -1 (-2, 3)"),
    "slopes of 2 heads": (dict(alibi_slopes=torch.ones(2)), "alibi_slopes heads 4 2"),
    "slopes of a batch of 3": (dict(alibi_slopes=torch.ones(3, 4)), "alibi_slopes batch 2 3"),
    "slopes of 3 dimensions": (dict(alibi_slopes=torch.ones(2, 4, 1)), "alibi_slopes 1 3"),
    "one slope": (dict(alibi_slopes=torch.tensor(1.0)), "alibi_slopes 1 0"),
    "slopes of doubles": (dict(alibi_slopes=torch.ones(4).double()), "alibi_slopes float32 Double"),
    "slopes elsewhere": (dict(alibi_slopes=torch.ones(4, device="meta")), "alibi_slopes cpu meta"),
}


def good():
    return make_inputs(2, 4, 5, 7, 8, kv_heads=2)


def assert_one_sentence(error, op, words):
    message = str(error.value)
    assert "\n" not in message, message
    assert message.startswith(op), message
    for word in words.split():
        assert word in message, f"{word!r} is not in: {message}"


@pytest.fixture(params=("python", "op"))
def entmax_attn(request):
    return {"python": adasplash.entmax_attn, "op": torch.ops.adasplash.entmax_attn}[request.param]


@pytest.mark.parametrize("requires_grad", (False, True), ids=("inference", "training"))
@pytest.mark.parametrize("case", TENSORS)
def test_tensors(entmax_attn, case, requires_grad):
    changes, words = TENSORS[case]
    tensors = {name: changes.get(name, lambda x: x)(x) for name, x in good()._asdict().items()}
    for x in tensors.values():
        x.requires_grad_(requires_grad and x.dtype.is_floating_point and x.dtype.itemsize > 1)
    with refused() as error:
        entmax_attn(**tensors)
    assert_one_sentence(error, "entmax_attn", words)


@pytest.mark.parametrize("inference", (False, True), ids=("plain", "inference mode"))
@pytest.mark.parametrize("case", OPTIONS)
def test_options(entmax_attn, case, inference):
    options, words = OPTIONS[case]
    with torch.inference_mode(inference), refused() as error:
        entmax_attn(*good(), **options)
    assert_one_sentence(error, "entmax_attn", words)


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_the_private_op(case):
    options, words = {"alpha": 1.5, "scale": None} | OPTIONS[case][0], OPTIONS[case][1]
    with refused() as error:
        torch.ops.adasplash._entmax_attn_forward(
            *good(), None, options["alpha"], False, options["scale"], *[None] * 4, 5, 7, [-1, -1], None, 64
        )
    assert_one_sentence(error, "_entmax_attn_forward", words)


@pytest.mark.parametrize("inference", (False, True), ids=("plain", "inference mode"))
@pytest.mark.parametrize("case", MORE_OPTIONS)
def test_more_options(entmax_attn, case, inference):
    options, words = MORE_OPTIONS[case]
    with torch.inference_mode(inference), refused() as error:
        entmax_attn(*good(), **options)
    assert_one_sentence(error, "entmax_attn", words)


@pytest.mark.parametrize(
    "arguments",
    (
        lambda q, k, v: (q, k),
        lambda q, k, v: (q, k, None),
        lambda q, k, v: (q, k, [1.0]),
        lambda q, k, v: (q, k, v, "1.5"),
    ),
    ids=("value missing", "value None", "value a list", "alpha a string"),
)
def test_not_even_tensors(entmax_attn, arguments):
    with refused(match=r"entmax_attn.*(value|alpha)"):
        entmax_attn(*arguments(*good()))


BACKWARD_OPTIONS = (None, 1.5, False, None, *[None] * 4, 5, 7, [-1, -1], None)


def backward_arguments():
    inputs = make_inputs(2, 4, 5, 7, 8, kv_heads=2)
    out, *saved = torch.ops.adasplash._entmax_attn_forward(*inputs, *BACKWARD_OPTIONS, 64)
    names = ("grad_out", *inputs._fields, "row_state", "support", "tiles")
    tensors = dict(zip(names, (torch.ones_like(inputs.query), *inputs, *saved), strict=True))
    return {**tensors, "out": out}


def backward(*, out, **tensors):
    return torch.ops.adasplash._entmax_attn_backward(*tensors.values(), *BACKWARD_OPTIONS, out=out)


# The backward op trusts nothing it is handed: a wrong tensor is an error and never a stray access.
SAVED = {
    "grad_out of another shape": ("grad_out", lambda x: x[..., :7], "grad_out 7"),
    "grad_out of another type": ("grad_out", lambda x: x.double(), "grad_out Double"),
    "row_state of another shape": ("row_state", lambda x: x[..., :1], "row_state 1"),
    "row_state of another type": ("row_state", lambda x: x.double(), "row_state Double"),
    "support of inference": ("support", lambda x: x.new_empty(0), "support"),
    "support of other rows": ("support", lambda x: x[:, :, :4], "support 4"),
    "support of another type": ("support", lambda x: x.long(), "support Long"),
    "tiles of other keys": ("tiles", lambda x: x.repeat(1, 1, 1, 2), "tiles 2"),
    "tiles on another device": ("tiles", lambda x: x.to("meta"), "tiles meta"),
    "out of another shape": ("out", lambda x: x[..., :7], "out 7"),
    "out of another type": ("out", lambda x: x.double(), "out Double"),
    "key of another length": ("key", lambda x: x[:, :, :5], "value 5"),
}


@pytest.mark.parametrize("case", SAVED)
def test_backward_op(case):
    name, change, words = SAVED[case]
    tensors = backward_arguments()
    tensors[name] = change(tensors[name])
    with refused() as error:
        backward(**tensors)
    assert_one_sentence(error, "_entmax_attn_backward", words)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("entry", (7, 1000, -5, 2**31 - 1))
def test_support_entries_out_of_range_are_no_stray_access(entry):
    """A support list from a damaged file: an error or a wrong gradient, but no access outside the tensors."""
    tensors = backward_arguments()
    tensors["support"] = torch.full_like(tensors["support"], entry)
    try:
        backward(**tensors)
    except RuntimeError as error:
        assert "support" in str(error)


@pytest.mark.backends("cpu")
def test_an_index_of_packed_keys():
    tokens, ends = torch.randn(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    options = (None, 1.5, False, None, None, None, ends, ends, 4, 4, [-1, -1], None)
    with pytest.raises(RuntimeError, match="key_index goes with padded keys or a paged cache, got packed keys"):
        torch.ops.adasplash._entmax_attn_indexed(
            tokens, tokens, tokens, *options, torch.zeros(2, 64, dtype=torch.uint8)
        )


@pytest.mark.parametrize("window", ([], [-1], [-1, -1, -1]))
def test_window_of_another_length(make_inputs, window):
    """torch.ops takes a list of any length where the schema says int[2]."""
    with pytest.raises(RuntimeError, match=r"window must be two numbers \(left, right\), got"):
        torch.ops.adasplash.entmax_attn(*make_inputs(1, 1, 2, 2), window=window)


def test_alpha_just_above_1_is_said_in_full(make_inputs):
    with pytest.raises(RuntimeError, match=r"alpha must be 1 or from 1.01 to 2, got 1.0000001$"):
        torch.ops.adasplash.entmax_attn(*make_inputs(1, 1, 2, 2), alpha=1.0000001)


@pytest.mark.parametrize("capacity", (-2, -(2**63)))
def test_support_capacity_below_inference(make_inputs, capacity):
    options = (None, 1.5, False, None, None, None, None, None, 0, 0, [-1, -1], None)
    with pytest.raises(RuntimeError, match="support_capacity must be -1"):
        torch.ops.adasplash._entmax_attn_forward(*make_inputs(1, 1, 2, 2), *options, capacity)


@pytest.mark.backends("cpu")
def test_more_keys_than_an_index_can_count():
    one = torch.ones(1, 1, 1, 1)
    many = one.expand(1, 1, 2**31, 1)
    with pytest.raises(RuntimeError, match="key must hold at most 2147483647 keys, got 2147483648"):
        torch.ops.adasplash.entmax_attn(one, many, many)


@pytest.mark.parametrize("scale", (1e39, -1e300))
def test_a_scale_that_float32_cannot_hold(make_inputs, scale):
    with pytest.raises(RuntimeError, match="scale must be finite in Float, got"):
        torch.ops.adasplash.entmax_attn(*make_inputs(1, 1, 2, 2), scale=scale)


@pytest.mark.backends("cpu")
def test_functorch_is_refused(make_inputs):
    inputs = make_inputs(1, 1, 2, 2)
    with pytest.raises(RuntimeError, match=r"cannot use C\+\+ torch::autograd::Function with functorch"):
        torch.func.grad(lambda query: torch.ops.adasplash.entmax_attn(query, *inputs[1:]).sum())(inputs.query)
