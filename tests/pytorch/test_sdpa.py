"""scaled_dot_product_attention with α-entmax: alone against a dense float64 one and, at α = 1, against torch's; then in
the models that call torch's."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as imported_before
from torch.utils.checkpoint import checkpoint

import adasplash
import reference
from adasplash import EntmaxMultiheadAttention, patch_sdpa, replace_sdpa, scaled_dot_product_attention, unpatch_sdpa

NAME = "scaled_dot_product_attention"
#: Sizes of query, key and value, and what else the call needs.
SHAPES = {
    "two dimensions": ((7, 8), (11, 8), (11, 5), {}),
    "three": ((3, 7, 8), (3, 11, 8), (3, 11, 8), {}),
    "four": ((2, 4, 7, 8), (2, 4, 11, 8), (2, 4, 11, 5), {}),
    "five": ((2, 3, 4, 7, 8), (2, 3, 4, 11, 8), (2, 3, 4, 11, 8), {}),
    "square": ((2, 4, 9, 8), (2, 4, 9, 8), (2, 4, 9, 8), dict(scale=0.7)),
    "more queries than keys": ((2, 4, 11, 8), (2, 4, 7, 8), (2, 4, 7, 8), {}),
    "one query": ((2, 4, 1, 8), (2, 4, 9, 8), (2, 4, 9, 8), {}),
    "grouped": ((2, 6, 7, 8), (2, 2, 11, 8), (2, 2, 11, 8), dict(enable_gqa=True)),
    "grouped, three": ((6, 7, 8), (2, 11, 8), (2, 11, 8), dict(enable_gqa=True)),
    "broadcast": ((2, 4, 7, 8), (1, 4, 11, 8), (11, 8), {}),
    "one head of keys": ((2, 4, 7, 8), (2, 1, 11, 8), (2, 1, 11, 8), {}),
    "heads above 256": ((1, 2, 7, 8), (1, 2, 11, 8), (1, 2, 11, 300), {}),
}


def lengths(batch: int, keys: int) -> torch.Tensor:
    """(B, N), True for keys 2 to 4 + b."""
    places = torch.arange(keys)
    return (places >= 2) & (places < 5 + torch.arange(batch)[:, None])


def by_entry(shape: list[int]) -> torch.Tensor:
    """Other lengths in each entry of the first dimension, (B, 1, …, N) for weights of this shape."""
    return lengths(shape[0], shape[-1]).view(-1, *[1] * (len(shape) - 2), shape[-1])


def above(shape: list[int], diagonal: int) -> torch.Tensor:
    return torch.ones(shape[-2:]).triu(diagonal + 1).bool()


def draw(*shape, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed), dtype=torch.float64).to(dtype)


#: By name, what makes a mask for weights of a shape (…, M, N).
MASKS = {
    "none": lambda shape: None,
    "all": lambda shape: torch.ones(shape[-2:], dtype=torch.bool),
    "lengths": lambda shape: by_entry(shape) if len(shape) > 2 else lengths(1, shape[-1]),
    "lengths for all": lambda shape: lengths(1, shape[-1]),
    "floats that are lengths": lambda shape: torch.zeros(1, shape[-1]).masked_fill(~lengths(1, shape[-1]), -torch.inf),
    "holes": lambda shape: torch.arange(shape[-1])[None] % 3 != 1,
    "biases of keys": lambda shape: draw(1, shape[-1]).masked_fill(torch.arange(shape[-1]) < 2, -torch.inf),
    "nothing is seen": lambda shape: torch.zeros(1, shape[-1], dtype=torch.bool),
    "triangle": lambda shape: ~above(shape, 0),
    "triangle bottom right": lambda shape: ~above(shape, shape[-1] - shape[-2]),
    "triangle below": lambda shape: torch.zeros(shape[-2:]).masked_fill(above(shape, -2), -torch.inf),
    "expanded lengths": lambda shape: lengths(1, shape[-1]).expand(shape),
    "matrix": lambda shape: draw(*shape[-2:]) < 0.8,
    "biases": lambda shape: draw(*shape),
    "least number": lambda shape: draw(*shape).clamp(max=0).sign() * torch.finfo(torch.float64).max,
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr("adasplash.masked._warned", set())


def exact(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, alpha=1.5):
    """Dense, in float64."""
    query, key, value = (x.double() for x in (query, key, value))
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // key.shape[-3], -3) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:]).tril().bool()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        hidden = attn_mask <= torch.finfo(attn_mask.dtype).min / 2
        scores = (scores + attn_mask.masked_fill(hidden, 0)).masked_fill(hidden, -torch.inf)
    return reference.entmax(scores, alpha) @ value


def inputs(name: str, dtype=torch.float64) -> tuple[list[torch.Tensor], dict, list[int]]:
    """Query, key and value, options and the shape of the weights."""
    *sizes, options = SHAPES[name]
    tensors = [(draw(*size, seed=i) * 1.5).to(dtype).requires_grad_() for i, size in enumerate(sizes)]
    query, key, _ = tensors
    lead = query.shape[:-2] if options.get("enable_gqa") else torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    return tensors, options, [*lead, query.shape[-2], key.shape[-2]]


def with_gradients(function, tensors, *args, **options):
    out = function(*tensors, *args, **options)
    return [out, *torch.autograd.grad(out, tensors, draw(*out.shape).to(out.dtype))]


def assert_close(actual, expected, tolerance=1e-7):
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), atol=tolerance * max(1, y.abs().max().item()), rtol=0)


@pytest.mark.filterwarnings("ignore:scaled_dot_product_attention. an attn_mask|.* a head above 256")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_gradients(shape, mask):
    """And at α = 1 they are torch's."""
    tensors, options, sizes = inputs(shape)
    mask = MASKS[mask](sizes)
    mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    found = with_gradients(scaled_dot_product_attention, tensors, mask, **options)
    assert_close(found, with_gradients(exact, tensors, mask, **options))
    softmax = with_gradients(scaled_dot_product_attention, tensors, mask, alpha=1.0, **options)
    sees = torch.ones(sizes).bool() if mask is None else mask if mask.dtype == torch.bool else mask > -1e300
    if sees.expand(sizes).any(-1).all():  # otherwise torch's kernels differ from each other
        assert_close(softmax, with_gradients(F.scaled_dot_product_attention, tensors, mask, **options))


@pytest.mark.filterwarnings("ignore:scaled_dot_product_attention. a head above 256")
@pytest.mark.parametrize("shape", SHAPES)
def test_causal_is_aligned_top_left(shape):
    tensors, options, _ = inputs(shape)
    found = with_gradients(scaled_dot_product_attention, tensors, is_causal=True, **options)
    assert_close(found, with_gradients(exact, tensors, is_causal=True, **options))
    softmax = scaled_dot_product_attention(*tensors, is_causal=True, alpha=1.0, **options)
    assert_close([softmax], [F.scaled_dot_product_attention(*tensors, is_causal=True, **options)])


@pytest.mark.parametrize("alpha", (1.3, 2.0, torch.tensor(1.4), torch.tensor([1.0, 1.2, 1.5, 2.0])), ids=str)
@pytest.mark.parametrize("mask", ("none", "lengths", "holes", "matrix"))
@pytest.mark.filterwarnings("ignore:scaled_dot_product_attention. an attn_mask")
def test_alpha(alpha, mask):
    tensors, options, sizes = inputs("four")
    by_head = alpha.view(-1, 1, 1) if isinstance(alpha, torch.Tensor) else alpha
    mask = MASKS[mask](sizes)
    found = with_gradients(scaled_dot_product_attention, tensors, mask, alpha=alpha, **options)
    assert_close(found, with_gradients(exact, tensors, mask, alpha=by_head, **options))


def test_alpha_by_head_of_three_dimensions():
    query, key, value = (draw(4, 7, 8, seed=i) for i in range(3))
    alpha = torch.tensor([1.0, 1.2, 1.5, 2.0])
    out = scaled_dot_product_attention(query, key, value, alpha=alpha)
    assert_close([out], [exact(query, key, value, alpha=alpha.view(-1, 1, 1))])


@pytest.mark.filterwarnings("ignore:scaled_dot_product_attention. an attn_mask")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("mask", ("none", "lengths", "holes", "biases of keys", "biases"))
@pytest.mark.parametrize("autocast", (False, True), ids=("", "autocast"))
def test_types(dtype, mask, autocast):
    tensors, options, sizes = inputs("four", torch.float32 if autocast else dtype)
    mask = MASKS[mask](sizes)
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(tensors[0].dtype)
    with torch.autocast("cpu", dtype, enabled=autocast and dtype != torch.float32):
        out = scaled_dot_product_attention(*tensors, mask, **options)
    assert out.dtype == dtype
    assert_close([out], [exact(*tensors, mask, **options)], 1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("mask", ("none", "lengths", "lengths for all", "floats that are lengths", "triangle"))
def test_what_lengths_say_takes_no_mask(mask, monkeypatch):
    monkeypatch.setattr("adasplash.sdpa.attend_by_keys", None)
    monkeypatch.setattr("adasplash.sdpa.attend_densely", None)
    tensors, options, sizes = inputs("square")
    mask = MASKS[mask](sizes)
    assert_close([scaled_dot_product_attention(*tensors, mask, **options)], [exact(*tensors, mask, **options)])


@pytest.mark.parametrize("mask", ("holes", "biases of keys"))
def test_masks_of_keys_are_not_dense(mask, monkeypatch):
    monkeypatch.setattr("adasplash.sdpa.attend_densely", None)
    tensors, options, sizes = inputs("four")
    mask = MASKS[mask](sizes)
    assert_close([scaled_dot_product_attention(*tensors, mask, **options)], [exact(*tensors, mask, **options)])


def test_a_mask_gets_its_gradient():
    tensors, options, sizes = inputs("four")
    for size in (sizes, (1, sizes[-1])):
        mask = draw(*size).requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours, theirs = (
                torch.autograd.grad(f(*tensors, mask, **options).square().sum(), mask)
                for f in (scaled_dot_product_attention, exact)
            )
        assert_close(ours, theirs)


def test_a_mask_is_read_once(monkeypatch):
    """Through whatever view; again where it was changed; and no longer remembered than it lives."""
    from adasplash import sdpa

    read, find = [], sdpa._find
    monkeypatch.setattr(sdpa, "_find", lambda mask: read.append(mask) or find(mask))
    query = draw(2, 4, 9, 8)
    mask = lengths(2, 9)
    with torch.inference_mode():
        scaled_dot_product_attention(query, query, query, mask[:, None, None])
    leaf = query.clone().requires_grad_()
    for _ in range(3):
        scaled_dot_product_attention(leaf, query, query, mask[:, None, None]).sum().backward()
    assert len(read) == 1
    mask[1, 8] = True
    out = scaled_dot_product_attention(query, query, query, mask[:, None, None])
    assert len(read) == 2
    assert_close([out], [exact(query, query, query, mask[:, None, None])])
    remembered = len(sdpa._looked_at)
    read.clear()
    del mask
    assert len(sdpa._looked_at) == remembered - 1


@pytest.mark.parametrize("copied", (1 << 22, 0), ids=("small", "large"))
@pytest.mark.parametrize("way", ("numpy", ".data"))
def test_a_mask_that_changes_behind_torchs_back(monkeypatch, way, copied):
    monkeypatch.setattr("adasplash.sdpa._MOST_COPIED", copied)
    values = torch.ones(1, 9, dtype=torch.bool).numpy()
    mask = torch.from_numpy(values)
    query = draw(1, 2, 9, 8)
    for last in (9, 5, 3):
        if way == "numpy":
            values[:, last:] = False
        else:
            mask.data[:, last:] = False
        out = scaled_dot_product_attention(query, query, query, mask)
        assert_close([out], [exact(query, query, query, mask)])


def test_hidden_keys_stay_hidden_at_any_scale():
    """In fp16 two more channels can put keys only so far away."""
    query, key, value = (draw(1, 2, 4, 8, seed=seed, dtype=torch.float16) for seed in range(3))
    mask = torch.tensor([True, False, True, False])
    for scale in (1e-10, 1e-6, 1.0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = scaled_dot_product_attention(query, key, value, mask, scale=scale)
        assert_close([out], [exact(query, key, value, mask, scale=scale)], 1e-2)


@pytest.mark.filterwarnings("ignore:scaled_dot_product_attention. an attn_mask")
def test_no_heads_under_a_dense_mask():
    x = torch.zeros(1, 0, 4, 8)
    assert scaled_dot_product_attention(x, x, x, torch.eye(4).bool().flip(0)).shape == x.shape


def test_meta_tensors():
    x = torch.empty(2, 4, 9, 8, device="meta")
    assert scaled_dot_product_attention(x, x, x, is_causal=True).shape == x.shape


def test_dense_masks_say_so_once():
    query, mask = draw(2, 4, 9, 8), draw(9, 9) > 0
    with pytest.warns(UserWarning, match=f"^{NAME}: an attn_mask other than .* a tensor of all weights") as said:
        scaled_dot_product_attention(query, query, query, mask)
    assert len(said) == 1 and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaled_dot_product_attention(query, query, query, mask)


def test_too_many_weights(monkeypatch):
    monkeypatch.setattr("adasplash.masked.MOST_WEIGHTS", 600)
    query, mask = draw(2, 4, 9, 8), draw(9, 9) > 0
    with pytest.raises(NotImplementedError, match=f"^{NAME}: an attn_mask other .* 648 are too many .* at most 600"):
        scaled_dot_product_attention(query, query, query, mask)
    scaled_dot_product_attention(query, query, query, lengths(2, 9)[:, None, None])


@pytest.mark.filterwarnings("ignore:scaled_dot_product_attention. an attn_mask")
@pytest.mark.parametrize("mask", ("none", "lengths", "holes", "triangle", "matrix"))
def test_dropout_wherever_it_is_given(mask):
    tensors, options, sizes = inputs("square", torch.float32)
    mask = MASKS[mask](sizes)
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = [scaled_dot_product_attention(*tensors, mask, 0.3, **options) for _ in range(400)]
    assert not torch.equal(drawn[0], drawn[1])
    assert_close([sum(drawn) / len(drawn)], [exact(*tensors, mask, **options)], 0.15)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors():
    rows = [(draw(length, 4, 8), draw(length, 4, 8), draw(length, 4, 8)) for length in (5, 1, 9)]
    query, key, value = (
        torch.nested.nested_tensor([row[i] for row in rows], layout=torch.jagged).transpose(1, 2) for i in range(3)
    )
    key, value = (
        torch.nested.nested_tensor_from_jagged(x.transpose(1, 2).values(), query.offsets()).transpose(1, 2)
        for x in (key, value)
    )
    for causal in (False, True):
        out = scaled_dot_product_attention(query, key, value, is_causal=causal)
        for found, row in zip(out.transpose(1, 2).unbind(), rows, strict=True):
            assert_close([found], [exact(*(x.transpose(0, 1) for x in row), is_causal=causal).transpose(0, 1)])
    with pytest.raises(ValueError, match="attn_mask must be None where query is a nested tensor"):
        scaled_dot_product_attention(query, key, value, torch.ones(9, 9).bool())
    strided = torch.nested.nested_tensor([row[0] for row in rows])
    with pytest.raises(RuntimeError, match="must be jagged nested tensors"):
        scaled_dot_product_attention(strided, strided, strided)


@pytest.mark.parametrize(
    "options, message",
    (
        (dict(query=None), "query must be a tensor, got None"),
        (dict(query=torch.zeros(8)), "query must have 2 dimensions or more, got 1"),
        (dict(attn_mask=3), "attn_mask must be a tensor or None, got 3"),
        (dict(attn_mask=torch.ones(9, 9).bool(), is_causal=True), "attn_mask must be None where is_causal is True"),
        (dict(attn_mask=torch.ones(9, 9).int()), "attn_mask must be Boolean or floating point, got torch.int32"),
        (dict(attn_mask=torch.ones(8, 9).bool()), r"attn_mask must broadcast to \[2, 4, 9, 9\], got \[1, 1, 8, 9\]"),
        (dict(attn_mask=torch.ones(1, 2, 4, 9, 9).bool()), "attn_mask must have at most 4 dimensions"),
        (dict(key=torch.zeros(2, 2, 9, 8)), "the heads of query, key and value must broadcast .* got 4, 2 and 4"),
        (dict(key=torch.zeros(2, 3, 9, 8), enable_gqa=True), "query's heads must be a multiple .* got 4, 3 and 4"),
        (dict(key=torch.zeros(3, 4, 9, 8)), r"the batches of query, key and value must broadcast, got \[2\], \[3\]"),
        (dict(key=torch.zeros(2, 4, 9, 7)), "key .*8"),
        (dict(alpha=3), "alpha must be 1 or from 1.01 to 2, got 3"),
        (dict(alpha="1"), "alpha must be a number or a tensor, got '1'"),
        (dict(dropout_p=1.0), "dropout_p"),
        (dict(is_causal=None), "is_causal must be True or False, got None"),
    ),
)
def test_wrong_arguments(options, message):
    x = torch.zeros(2, 4, 9, 8)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=f"^{NAME}: {message}"):
        scaled_dot_product_attention(**dict(query=x, key=x, value=x) | options)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ("none", "causal", "lengths", "holes", "biases of keys", "triangle", "biases"))
def test_compiled(mask):
    """A mask has no values there."""
    tensors, options, sizes = inputs("four", torch.float32)
    causal = mask == "causal"
    mask = None if causal else MASKS[mask](sizes)
    mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    torch.compiler.reset()
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    found = with_gradients(compiled, tensors, mask, is_causal=causal, **options)
    assert_close(found, with_gradients(exact, tensors, mask, is_causal=causal, **options), 1e-4)


def helper(query, key, value):
    return imported_before(query, key, value)


class Attention(nn.Module):
    """As people write it."""

    def __init__(self, how: str = "functional"):
        super().__init__()
        self.how = how
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def attend(self, query, key, value):
        if self.how == "functional":
            return F.scaled_dot_product_attention(query, key, value)
        if self.how == "aten":
            return torch.ops.aten.scaled_dot_product_attention(query, key, value)
        if self.how == "helper":
            return helper(query, key, value)
        return imported_before(query, key, value)

    def forward(self, x):
        heads = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.attend(*heads).transpose(1, 2).flatten(2))

    def by_hand(self, x, alpha):
        query, key, value = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        out = exact(query, key, value, alpha=alpha).to(x.dtype)
        return self.proj(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, how: str = "functional", checkpointing: bool | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Attention(how) for _ in range(2))
        self.checkpointing = checkpointing
        with torch.no_grad():
            for layer in self.layers:
                layer.qkv.weight.mul_(4)

    def forward(self, x):
        for layer in self.layers:
            if self.checkpointing is None:
                x = x + layer(x)
            else:
                x = x + checkpoint(layer, x, use_reentrant=self.checkpointing)
        return x

    def by_hand(self, x, alpha=1.5):
        for layer in self.layers:
            x = x + layer.by_hand(x, alpha)
        return x


X = draw(3, 12, 16, dtype=torch.float32)
WAYS = ("functional", "imported", "aten", "helper")


def gradients_of(model, out) -> list[torch.Tensor]:
    return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("patched", (False, True), ids=("in a context", "patched"))
def test_in_a_model(how, patched):
    model = Model(how)
    softmax = model(X)
    expected = gradients_of(model, model.by_hand(X))
    if patched:
        assert patch_sdpa(model) is model
        out = model(X)
        unpatch_sdpa(model)
    else:
        with replace_sdpa():
            out = model(X)
    assert_close(gradients_of(model, out), expected, 1e-4)
    assert (out - softmax).abs().max() > 1e-2
    assert torch.equal(model(X), softmax)
    assert all(type(layer) is Attention for layer in model.layers)


@pytest.mark.slow
@pytest.mark.parametrize("how", ("imported", "aten"))
def test_compiled_models(how):
    """The context from outside and inside of compiled code; α of patched modules in a tensor is compiled once."""
    torch.compiler.reset()
    model = Model(how)
    softmax = model(X)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close([run(X)], [softmax], 1e-5)
    for alpha in (1.5, 1.2):
        with replace_sdpa(alpha):
            assert_close(gradients_of(model, run(X)), gradients_of(model, model.by_hand(X, alpha)), 1e-4)
    assert_close([run(X)], [softmax], 1e-5)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def inside(x):
        with replace_sdpa(1.5):
            return model(x)

    assert_close([inside(X)], [model.by_hand(X)], 1e-4)
    alpha = torch.tensor(1.3)
    run = torch.compile(patch_sdpa(Model(how), alpha), fullgraph=True, backend="aot_eager")
    for step in range(3):
        alpha.fill_(1.3 + step / 10)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            assert_close([run(X)], [model.by_hand(X, 1.3 + step / 10)], 1e-4)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", (False, True))
def test_exported(strict):
    model = patch_sdpa(Model())
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(model, (X,), dynamic_shapes=({1: length},), strict=strict)
    for x in (X, draw(3, 30, 16, dtype=torch.float32)):
        assert_close([program.module()(x)], [model.by_hand(x)], 1e-4)


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing(reentrant):
    """A patched module that is run again in the backward is patched still; a context would be left by then."""
    model = Model(checkpointing=reentrant)
    expected = gradients_of(model, model.by_hand(X))[1:]
    leaf = X.clone().requires_grad_()  # reentrant checkpoints need one
    patch_sdpa(model)(leaf).square().sum().backward()
    assert_close([each.grad for each in model.parameters()], expected, 1e-4)
    unpatch_sdpa(model)
    with (
        pytest.raises(NotImplementedError, match=r"^replace_sdpa: checkpointing would compute softmax"),
        replace_sdpa(),
    ):
        model(leaf)

    def inside(x):
        with replace_sdpa():
            return model.layers[0](x)

    leaf.grad = None
    checkpoint(inside, leaf, use_reentrant=reentrant).sum().backward()  # entered again with it
    assert_close([leaf.grad], torch.autograd.grad(model.layers[0].by_hand(leaf, 1.5).sum(), leaf), 1e-4)


def test_copies_pickles_and_state_dicts(tmp_path):
    model = patch_sdpa(Model(), alpha=1.3)
    assert set(model.state_dict()) == set(Model().state_dict())
    model.layers[0].register_forward_hook(lambda module, inputs, out: seen.append(type(module).__name__))
    seen: list[str] = []
    expected = model(X)
    assert seen == ["Attention"]
    copied = copy.deepcopy(model)
    model.layers[0]._forward_hooks.clear()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for same in (copied, loaded):
        assert torch.equal(same(X), expected)
        assert isinstance(same.layers[1], Attention)
        assert all(type(layer) is Attention for layer in unpatch_sdpa(same).layers)
    held = patch_sdpa(Model(), alpha=torch.tensor(1.3))
    assert set(held.state_dict()) == set(Model().state_dict())
    assert_close([copy.deepcopy(held)(X)], [expected], 1e-5)
    assert_close([patch_sdpa(held, alpha=1.7)(X)], [held.by_hand(X, 1.7)], 1e-4)


def test_torchs_own_layers():
    """nn.MultiheadAttention has a class of the library's for it, and their fast paths are not taken."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), 2).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.in_proj_weight.mul_(4)
        softmax = model(X)
        other = copy.deepcopy(model)
        for layer in other.layers:
            layer.self_attn = EntmaxMultiheadAttention.from_torch(layer.self_attn, 1.5)
        expected = other(X)
        patch_sdpa(model)
        assert_close([model(X)], [expected], 1e-5)
        assert_close([copy.deepcopy(model)(X)], [expected], 1e-5)
        unpatch_sdpa(model)
        assert_close([model(X)], [softmax], 1e-5)
        message = r"replace_sdpa: nn.MultiheadAttention .* adasplash.patch_sdpa"
        with pytest.raises(NotImplementedError, match=message), replace_sdpa():
            model(X)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    with pytest.raises(ValueError, match=r"layers.0.self_attn \(MultiheadAttention\) takes a number as alpha"):
        patch_sdpa(model, alpha=torch.tensor(1.5))


class OwnSoftmax(nn.Module):
    def forward(self, x):
        heads = x[:, None]
        return ((heads @ heads.transpose(-2, -1)).softmax(-1) @ heads)[:, 0]


class SoftmaxAttention(OwnSoftmax):
    pass


class EitherAttention(OwnSoftmax):
    """As timm's: one way or the other."""

    fused_attn = True
    other_way = False

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x) if not self.other_way else super().forward(x)


def flash_attn_func(query, key, value):
    raise AssertionError


class FlashAttention(nn.Module):
    def forward(self, x):
        return flash_attn_func(x, x, x)


class Derived(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Pooling(nn.Module):
    def forward(self, x):
        return F.multi_head_attention_forward(x, x, x, 16, 4)


class Unfused(EitherAttention):
    fused_attn = False


@pytest.mark.parametrize(
    "module, message",
    (
        (SoftmaxAttention(), r"1 \(SoftmaxAttention\) computes softmax itself"),
        (FlashAttention(), r"1 \(FlashAttention\) asks flash_attn, which cannot be replaced"),
        (Derived(16, 4), r"1 \(Derived\) derives from nn.MultiheadAttention"),
        (Pooling(), r"1 \(Pooling\) asks multi_head_attention_forward, which cannot be replaced"),
        (Unfused(), r"1 \(Unfused\) does not call scaled_dot_product_attention while its fused_attn is False"),
        (torch.jit.script(nn.Linear(2, 2)), "1 .* is TorchScript"),
        (nn.MultiheadAttention(16, 4, add_zero_attn=True), "1 .* has add_bias_kv or add_zero_attn"),
    ),
    ids=lambda value: type(value).__name__,
)
def test_what_would_go_on_with_softmax_is_refused(module, message):
    model = nn.Sequential(Attention(), module)
    with pytest.raises(ValueError, match=f"^patch_sdpa: {message}"):
        patch_sdpa(model)
    assert type(model[0]) is Attention  # nothing is changed then


def called_by_dotted_path(query):
    return torch.nn.functional.scaled_dot_product_attention(query, query, query)


class Callable:
    def __call__(self, x):
        return imported_before(x, x, x)


class Held(nn.Module):
    """Calls what it is given, which no name in its code leads to."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend

    def forward(self, x):
        return self.attend(x)


class AsAttribute(nn.Module):
    attend = staticmethod(F.scaled_dot_product_attention)

    def forward(self, x):
        return self.attend(x, x, x)


class AsProperty(nn.Module):
    @property
    def attended(self):
        return F.scaled_dot_product_attention(self.x, self.x, self.x)

    def forward(self, x):
        self.x = x.detach()
        return self.attended


class ByName(nn.Module):
    def forward(self, x):
        return getattr(F, "scaled_dot" + "_product_attention")(x, x, x)


class ImportedInside(nn.Module):
    def forward(self, x):
        from torch.nn import functional

        return called_by_dotted_path(x) if functional is F else None


class PlainAttention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class BySuper(PlainAttention):
    def forward(self, x):
        return super().forward(x)


class ByParent(PlainAttention):
    def forward(self, x):
        return PlainAttention.forward(self, x)


class InAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain = [PlainAttention()]

    def forward(self, x):
        return self.plain[0](x)


TABLE = {"sdpa": F.scaled_dot_product_attention}


class ByTable(nn.Module):
    def forward(self, x):
        return TABLE["sdpa"](x, x, x)


def hooked() -> nn.Module:
    module = nn.Identity()
    module.register_forward_hook(lambda module, inputs, out: imported_before(out, out, out))
    return module


def of_a_closure() -> nn.Module:
    attend = F.scaled_dot_product_attention
    return Held(lambda x: attend(x, x, x))


#: Modules of x that call the function in ways of which most cannot be read from their classes.
OTHER_WAYS = {
    "super": BySuper,
    "parent": ByParent,
    "dotted path": lambda: Held(called_by_dotted_path),
    "imported inside": ImportedInside,
    "closure": of_a_closure,
    "partial": lambda: Held(functools.partial(lambda attend, x: attend(x, x, x), F.scaled_dot_product_attention)),
    "table": ByTable,
    "getattr": ByName,
    "attribute": AsAttribute,
    "callable": lambda: Held(Callable()),
    "property": AsProperty,
    "hook": hooked,
    "list": InAList,
    "graph": lambda: torch.fx.symbolic_trace(PlainAttention()),
    "exported": lambda: torch.export.export(PlainAttention(), (X,)).module(),
}


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.parametrize("way", OTHER_WAYS)
def test_whatever_is_reached_in_the_models_forward(way):
    """Beside a module whose code names the function, and no longer once it is undone."""
    model = nn.Sequential(Attention(), OTHER_WAYS[way]())
    softmax = model(X)
    between = model[0].by_hand(X, 1.3)
    expected = exact(between, between, between, alpha=1.3)
    assert (expected - softmax).abs().max() > 1e-2
    patch_sdpa(model, 1.3)
    assert_close([model(X)], [expected], 1e-4)
    assert_close([copy.deepcopy(model)(X)], [expected], 1e-4)
    assert torch.equal(unpatch_sdpa(model)(X), softmax)
    assert type(model) is nn.Sequential


@pytest.mark.parametrize("way", ("super", "parent"))
def test_what_a_class_takes_from_its_parent_is_known_by_its_code(way):
    """So it may be called alone."""
    model = patch_sdpa(nn.Sequential(OTHER_WAYS[way]()))
    assert_close([model[0](X)], [exact(X, X, X)], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("way", ("super", "closure", "getattr", "attribute", "graph"))
def test_other_ways_compiled_and_exported(way):
    torch.compiler.reset()
    model = nn.Sequential(Attention(), OTHER_WAYS[way]())
    between = model[0].by_hand(X, 1.5)
    expected = exact(between, between, between)
    patch_sdpa(model)
    assert_close([torch.compile(model, fullgraph=True, backend="aot_eager")(X)], [expected], 1e-4)
    assert_close([torch.export.export(model, (X,), strict=False).module()(X)], [expected], 1e-4)
    torch.compiler.reset()


class Broken(nn.Module):
    """Compiled in two parts."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Attention(), ByName()

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


@pytest.mark.slow
@pytest.mark.parametrize("before", (False, True), ids=("patched before", "compiled before"))
def test_compiled_with_a_graph_break(before):
    torch.compiler.reset()
    model = Broken()
    between = model.first.by_hand(X, 1.5)
    if before:
        run = patch_sdpa(torch.compile(model, backend="aot_eager"))
    else:
        run = torch.compile(patch_sdpa(model), backend="aot_eager")
    for _ in range(2):
        assert_close([run(X)], [exact(between, between, between)], 1e-4)
    assert type(unpatch_sdpa(run)._orig_mod) is Broken
    torch.compiler.reset()


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing_what_is_only_known_from_outside(reentrant):
    """It would be softmax when it is computed again, where the model's forward is left."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = PlainAttention(), ByName()

        def forward(self, x):
            return checkpoint(self.second, self.first(x), use_reentrant=reentrant)

    leaf = X.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=r"^Checkpointed: checkpointing would compute softmax"):
        patch_sdpa(Checkpointed())(leaf)


@pytest.mark.slow
def test_checkpointing_in_compiled_code():
    """Which computes again by itself: nothing is left by then. A context from outside cannot get into it: an error."""
    torch.compiler.reset()
    model = Model(checkpointing=False)
    run = torch.compile(patch_sdpa(model), fullgraph=True, backend="aot_eager")
    assert_close(gradients_of(model, run(X)), gradients_of(model, model.by_hand(X)), 1e-4)
    leaf, inner = X.clone().requires_grad_(), ByName()
    model = patch_sdpa(nn.Sequential(PlainAttention(), Held(lambda x: checkpoint(inner, x, use_reentrant=False))))
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    between = exact(leaf, leaf, leaf)
    assert_close(with_gradients(run, [leaf]), with_gradients(lambda _: exact(between, between, between), [leaf]), 1e-4)
    run = torch.compile(unpatch_sdpa(model), fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported), replace_sdpa():
        run(leaf)
    torch.compiler.reset()


def test_a_part_has_its_own_alpha():
    model = patch_sdpa(nn.Sequential(PlainAttention(), PlainAttention()), 1.5)
    patch_sdpa(model[1], 1.2)
    between = exact(X, X, X)
    assert_close([model(X)], [exact(between, between, between, alpha=1.2)], 1e-5)
    assert_close([model[:1](X)], [between], 1e-5)


@pytest.mark.parametrize("patched_first", (False, True))
def test_parametrizations(patched_first):
    """They make classes in torch; those that come after stand in the way of undoing."""
    model = nn.Sequential(Attention())
    model[0].register_parameter("gain", nn.Parameter(torch.ones(1)))
    if patched_first:
        patch_sdpa(model)
    nn.utils.parametrize.register_parametrization(model[0], "gain", nn.Identity())
    if not patched_first:
        patch_sdpa(model)
    assert_close([model[0](X)], [model[0].by_hand(X, 1.5)], 1e-4)
    if patched_first:
        with pytest.raises(ValueError, match=r"^unpatch_sdpa: 0 \(ParametrizedAttention\) has got another class"):
            unpatch_sdpa(model)
        nn.utils.parametrize.remove_parametrizations(model[0], "gain")
    unpatch_sdpa(model)
    assert type(model[0]).__name__ == ("Attention" if patched_first else "ParametrizedAttention")
    assert (model[0](X) - model[0].by_hand(X, 1.5)).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("patched_first", (False, True))
def test_fully_shard(patched_first):
    from torch import distributed
    from torch.distributed.fsdp import FSDPModule, fully_shard

    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = nn.Sequential(Attention(), Attention())
        expected = model[1].by_hand(model[0].by_hand(X, 1.5), 1.5)
        if patched_first:
            patch_sdpa(model)
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        if not patched_first:
            patch_sdpa(model)
        assert_close([model(X)], [expected], 1e-4)
        if patched_first:
            with pytest.raises(ValueError, match=r"^unpatch_sdpa: .* has got another class"):
                unpatch_sdpa(model)
        else:
            unpatch_sdpa(model)
        assert isinstance(model[0], FSDPModule)
    finally:
        distributed.destroy_process_group()


def test_a_forward_that_is_not_its_classs():
    """As accelerate's hooks give it."""
    for at in (0, None):
        model = nn.Sequential(Attention())
        module = model if at is None else model[at]
        module.forward = functools.partial(type(module).forward, module)
        with pytest.raises(ValueError, match=r"^patch_sdpa: .* has a forward that is not its class's, as accelerate's"):
            patch_sdpa(model)
        assert type(model[0]) is Attention
        del module.forward
        patch_sdpa(model)
        module.forward = functools.partial(type(module).forward, module)
        assert_close([model(X)], [model[0].by_hand(X, 1.5)], 1e-4)
        with pytest.raises(ValueError, match=r"^unpatch_sdpa: .* has got another class or forward"):
            unpatch_sdpa(model)


def test_a_graph_alone_is_refused():
    graph = torch.fx.symbolic_trace(PlainAttention())
    with pytest.raises(ValueError, match=r"^patch_sdpa: the model \(PlainAttention\) is a graph; patch the model that"):
        patch_sdpa(graph)
    with replace_sdpa():
        assert_close([graph(X)], [exact(X, X, X)], 1e-5)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_a_graph_whose_attention_was_decomposed():
    heads = X[:, None]
    program = torch.export.export(PlainAttention(), (heads,)).run_decompositions()
    model = patch_sdpa(nn.Sequential(PlainAttention(), program.module()))
    with pytest.raises(
        NotImplementedError, match=r"^Sequential: a softmax over the last dimension of sizes \[3, 1, 12"
    ):
        model(heads)


def test_alpha_keeps_its_type():
    alpha = torch.tensor(1.333)
    model = patch_sdpa(Model(), alpha).bfloat16()
    assert model.layers[0].qkv.weight.dtype == torch.bfloat16
    assert all(layer.entmax_alpha is alpha for layer in model.layers)
    assert alpha.dtype == torch.float32 and alpha == torch.tensor(1.333)
    assert model.to("meta").layers[0].entmax_alpha.device.type == "meta"


def test_softmax_by_keyword():
    with replace_sdpa():
        assert_close([torch.softmax(input=X, dim=1), F.softmax(input=X, dim=1)], [X.softmax(1)] * 2)
        with pytest.raises(NotImplementedError, match=r"^replace_sdpa: a softmax"):
            torch.softmax(input=X[None], dim=-1)


@pytest.mark.parametrize("model", (None, [nn.Linear(2, 2)], Model), ids=str)
def test_what_is_no_module(model):
    for function in (patch_sdpa, unpatch_sdpa):
        with pytest.raises(TypeError, match=f"^{function.__name__}: model must be a module, got "):
            function(model)


def test_nothing_to_patch():
    with pytest.raises(ValueError, match=f"no module of Linear names {NAME}; adasplash.replace_sdpa"):
        patch_sdpa(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"patch_sdpa: alpha must be 1 or from 1.01 to 2, got 3"):
        patch_sdpa(Model(), alpha=3)
    with pytest.raises(ValueError, match=r"replace_sdpa: alpha must be 1 or from 1.01 to 2, got 3"):
        replace_sdpa(3)


def test_softmax_that_is_computed_after_all():
    """What a class mentions does not say which way it goes."""
    model = patch_sdpa(EitherAttention())
    assert_close([model(X)], [exact(X, X, X)], 1e-5)
    model.other_way = True
    with pytest.raises(
        NotImplementedError, match=r"^EitherAttention: a softmax over the last dimension of sizes \[3, 1"
    ):
        model(X)
    with pytest.raises(NotImplementedError, match=r"^replace_sdpa: a softmax"), replace_sdpa():
        OwnSoftmax()(X)
    with replace_sdpa():  # of classes, or of channels
        F.softmax(X, -1), F.softmax(X[None], 1)


@pytest.fixture
def vit():
    """A tiny Vision Transformer of timm's, with weights so large that rows are sparse."""
    timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))  # torchvision may not fit this torch
    torch.manual_seed(0)
    made = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5
    ).eval()
    with torch.no_grad():
        for block in made.blocks:
            block.attn.qkv.weight.mul_(30)
    return made


def test_timm(vit, monkeypatch):
    """Forward and gradients against dense float64, patched, in a context, compiled and with its checkpointing."""
    images = draw(2, 3, 32, 32, dtype=torch.float32)
    softmax = vit(images)
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", lambda *a, **b: exact(*a, **b).to(a[0].dtype))
        expected = gradients_of(vit, vit(images))
    assert (expected[0] - softmax).abs().max() > 1e-2
    with replace_sdpa():
        assert_close(gradients_of(vit, vit(images)), expected, 1e-4)
    patch_sdpa(vit)
    assert_close(gradients_of(vit, vit(images)), expected, 1e-4)
    torch.compiler.reset()
    run = torch.compile(vit, fullgraph=True, backend="aot_eager")
    assert_close(gradients_of(vit, run(images)), expected, 1e-4)
    vit.set_grad_checkpointing()
    vit(images).square().sum().backward()
    assert_close([each.grad for each in vit.parameters()], expected[1:], 1e-4)
    assert torch.equal(unpatch_sdpa(vit)(images), softmax)


def test_timm_that_computes_softmax_itself(vit):
    vit.blocks[1].attn.fused_attn = False
    with pytest.raises(
        ValueError, match=r"^patch_sdpa: blocks.1.attn \(Attention\) does not call .* fused_attn is False"
    ):
        patch_sdpa(vit)
    with pytest.raises(NotImplementedError, match=r"^replace_sdpa: a softmax"), replace_sdpa():
        vit(draw(2, 3, 32, 32, dtype=torch.float32))


def test_they_are_public():
    assert {"patch_sdpa", "replace_sdpa", "unpatch_sdpa", NAME} <= set(adasplash.__all__)
