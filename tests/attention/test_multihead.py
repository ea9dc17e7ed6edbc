"""EntmaxMultiheadAttention: nn.MultiheadAttention with another normalisation, alone and inside of torch's layers."""

import copy
import warnings

import pytest
import torch
from torch import nn

import reference
from adasplash import EntmaxAttention, EntmaxMultiheadAttention

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors"
)

KINDS = {
    "plain": {},
    "no bias": dict(bias=False),
    "own sizes of key and value": dict(kdim=10, vdim=7),
    "batch first": dict(batch_first=True),
    "sparser": dict(batch_first=True, alpha=1.9),
    "double": dict(batch_first=True, dtype=torch.float64),
}
LEFT = torch.tensor([[1] * 4 + [0] * 8, [0] * 12, [1] * 11 + [0]]).bool()
MASKS = {
    "none": None,
    "right": LEFT.flip(1),
    "left": LEFT,
    "holes": torch.arange(36).view(3, 12) % 5 % 2 > 0,
    "all of one": torch.tensor([[0] * 12, [1] * 12, [0] * 12]).bool(),
    "floats": torch.linspace(-3, 3, 36).view(3, 12).sin().masked_fill(LEFT, -torch.inf),
}


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr("adasplash.masked._warned", set())


def draw(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def make(**options) -> EntmaxMultiheadAttention:
    """16 wide, 4 heads, with weights large enough for sparse rows."""
    torch.manual_seed(0)
    module = EntmaxMultiheadAttention(16, 4, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return module


def arguments(module, batch=3, m=12, n=12) -> list[torch.Tensor]:
    dtype = module.out_proj.weight.dtype
    query = draw(batch, m, 16, dtype=dtype)
    given = [query, query, query]
    if m != n or module.kdim != 16:
        given = [query, draw(batch, n, module.kdim, dtype=dtype), draw(batch, n, module.vdim, dtype=dtype)]
    if module.batch_first:
        return given
    query, key, value = (x.transpose(0, 1) for x in given)
    return [query, query, query] if given[0] is given[2] else [query, key, value]


def by_hand(module, query, key, value, key_padding_mask=None, attn_mask=None, causal=False):
    """Result and weights in float64, batch first, with every mask added to dense scores."""
    if not module.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    q, k, v = (
        nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        .unflatten(-1, (4, -1))
        .transpose(1, 2)
        for x, (weight, bias) in zip((query, key, value), module._projections(), strict=True)
    )
    scores = q @ k.transpose(-2, -1) / 2
    for mask in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None]):
        if mask is not None:
            mask = mask.unflatten(0, (-1, 4)) if mask.dim() == 3 else mask
            mask = torch.zeros(mask.shape).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
            scores = scores + mask
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
    weights = reference.entmax(scores, module.alpha).nan_to_num(0.0)
    out = (weights @ v).transpose(1, 2).flatten(2)
    bias = module.out_proj.bias
    out = nn.functional.linear(out, module.out_proj.weight.double(), None if bias is None else bias.double())
    return out if module.batch_first else out.transpose(0, 1), weights


def assert_close(actual, expected, atol=2e-5):
    torch.testing.assert_close(actual.double(), expected, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("need_weights", (False, True), ids=("", "weights"))
@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_result_and_gradients(kind, mask, causal, need_weights):
    """Padding anywhere, in all rows: exact, without a word of warning, and with masked keys that hold anything."""
    module, padding = make(**KINDS[kind]), MASKS[mask]
    given = arguments(module)
    expected, expected_weights = by_hand(module, *given, padding, causal=causal)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attn_mask = nn.Transformer.generate_square_subsequent_mask(12, dtype=torch.float32) if causal else None
        out, weights = module(*given, padding, need_weights, attn_mask, average_attn_weights=False, is_causal=causal)
    assert_close(out, expected)
    assert (weights is None) == (not need_weights)
    if need_weights:
        assert_close(weights, expected_weights)
    grad = draw(*out.shape)
    ours, theirs = (torch.autograd.grad(x, list(module.parameters()), grad.to(x.dtype)) for x in (out, expected))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4 * max(1, y.abs().max().item()), rtol=0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("mask", ("left", "floats", "all of one"))
def test_half_types(dtype, mask):
    module = make(batch_first=True, dtype=dtype)
    given = arguments(module)
    out, _ = module(*given, MASKS[mask], need_weights=False)
    assert out.dtype == dtype
    assert_close(out, by_hand(module, *given, MASKS[mask])[0], atol=0.3)


def test_masked_keys_may_hold_anything():
    module = make(batch_first=True, kdim=10, vdim=7)
    query, key, value = arguments(module)
    for need_weights in (False, True):
        clean, _ = module(query, key, value, LEFT, need_weights)
        dirty = [x.masked_fill(LEFT[..., None], torch.nan) for x in (key, value)]
        torch.testing.assert_close(module(query, *dirty, LEFT, need_weights)[0], clean)


def test_masks_are_not_read():
    """On a GPU that would wait for it."""
    module = make(batch_first=True).to("meta")
    x = torch.empty(3, 12, 16, device="meta")
    for causal in (False, True):
        for mask in (LEFT, MASKS["floats"]):
            out, _ = module(x, x, x, mask.to("meta"), need_weights=False, is_causal=causal)
            assert out.shape == x.shape


def test_no_matrix_of_queries_and_keys(monkeypatch):
    monkeypatch.setattr("adasplash.multihead.attend_densely", None)
    module = make(batch_first=True)
    given = arguments(module)
    for causal in (False, True):
        module(*given, LEFT, need_weights=False, is_causal=causal)
        module(*given, need_weights=False, is_causal=causal)


@pytest.mark.parametrize("batch_first", (False, True))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("sizes", ({}, dict(kdim=10, vdim=7)), ids=("", "own sizes"))
def test_at_alpha_one_it_is_torchs(batch_first, bias, sizes):
    """With its state_dict, in all that it returns."""
    theirs = nn.MultiheadAttention(16, 4, bias=bias, batch_first=batch_first, **sizes)
    module = EntmaxMultiheadAttention(16, 4, bias=bias, batch_first=batch_first, alpha=1, **sizes)
    module.load_state_dict(theirs.state_dict())
    assert set(module.state_dict()) == set(theirs.state_dict())
    future = nn.Transformer.generate_square_subsequent_mask(12)
    for options in (
        {},
        dict(need_weights=False),
        dict(average_attn_weights=False),
        dict(key_padding_mask=MASKS["left"]),
        dict(key_padding_mask=MASKS["floats"], need_weights=False),
        dict(attn_mask=future, is_causal=True),
        dict(attn_mask=future, is_causal=True, need_weights=False),
        dict(attn_mask=draw(12, 12)),
        dict(attn_mask=draw(12, 12, 12) > 1, average_attn_weights=False),
    ):
        given = arguments(module)
        ours, expected = module(*given, **options), theirs(*given, **options)
        for x, y in zip(ours, expected, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    alone = [x[:, 0] if not batch_first else x[0] for x in arguments(module)]
    for options in ({}, dict(average_attn_weights=False), dict(key_padding_mask=LEFT[0], attn_mask=draw(4, 12, 12))):
        for x, y in zip(module(*alone, **options), theirs(*alone, **options), strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", ({}, dict(key_padding_mask=LEFT[0])), ids=("", "mask"))
@pytest.mark.parametrize("need_weights", (False, True))
def test_without_a_batch(options, need_weights):
    module = make()
    x = draw(12, 16)
    out, weights = module(x, x, x, need_weights=need_weights, **options)
    batched = {name: mask[None] for name, mask in options.items()}
    expected, expected_weights = by_hand(module, *[x[:, None]] * 3, **batched)
    assert_close(out, expected[:, 0])
    if need_weights:
        assert_close(weights, expected_weights.mean(1)[0])


@pytest.mark.parametrize("shape", ((12, 17), (12, 12, 17)), ids=str)
@pytest.mark.parametrize("boolean", (False, True), ids=("floats", "boolean"))
def test_other_masks_are_dense_with_one_warning(shape, boolean):
    module = make(batch_first=True)
    given = arguments(module, n=17)
    mask = draw(*shape) > 0.5 if boolean else draw(*shape)
    padding = MASKS["left"].new_zeros(3, 17).index_fill(1, torch.tensor([0, 5]), True)
    message = "^EntmaxMultiheadAttention: attn_mask is not served without a tensor of all weights"
    with pytest.warns(UserWarning, match=message) as said:
        out, _ = module(*given, padding, need_weights=False, attn_mask=mask)
    assert len(said) == 1 and said[0].filename == __file__
    assert_close(out, by_hand(module, *given, padding, mask)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(*given, padding, need_weights=False, attn_mask=mask)


def test_the_hint_is_not_taken_where_it_cannot_mean_the_mask():
    """torch's causal mask of fewer queries than keys is aligned top left, that of entmax_attn bottom right."""
    module = make(batch_first=True)
    given = arguments(module, m=5, n=9)
    mask = torch.full((5, 9), -torch.inf).triu(1)
    with pytest.warns(UserWarning, match="attn_mask"):
        out, _ = module(*given, need_weights=False, attn_mask=mask, is_causal=True)
    assert_close(out, by_hand(module, *given, attn_mask=mask)[0])
    with pytest.raises(ValueError, match="is_causal without attn_mask needs as many queries as keys, got 5 and 9"):
        module(*given, need_weights=False, is_causal=True)


@pytest.mark.parametrize("kind", KINDS)
def test_becomes_the_other_layer(kind):
    module = make(**KINDS[kind])
    other = module.to_entmax_attention()
    assert isinstance(other, EntmaxAttention) and other.alpha == module.alpha
    given = arguments(module)
    out, _ = module(*given, need_weights=False)
    if not module.batch_first:
        given, out = [x.transpose(0, 1) for x in given], out.transpose(0, 1)
    torch.testing.assert_close(other(*given), out)
    assert module.to_entmax_attention(is_causal=True, learn_alpha=True).alpha_logit is not None


@pytest.mark.parametrize("sizes", ({}, dict(kdim=10, vdim=7), dict(bias=False, batch_first=True)), ids=str)
def test_from_torch_shares_parameters(sizes):
    theirs = nn.MultiheadAttention(16, 4, **sizes).eval()
    module = EntmaxMultiheadAttention.from_torch(theirs, alpha=1.0)
    assert not module.training and module.alpha == 1
    pairs = zip(module.named_parameters(), theirs.named_parameters(), strict=True)
    assert all(one == other and x is y for (one, x), (other, y) in pairs)
    given = arguments(module)
    torch.testing.assert_close(module(*given)[0], theirs(*given)[0], atol=1e-5, rtol=1e-5)


def test_starts_as_torchs_does():
    for sizes in ({}, dict(kdim=10, vdim=7)):
        torch.manual_seed(0)
        theirs = nn.MultiheadAttention(16, 4, **sizes)
        torch.manual_seed(0)
        ours = EntmaxMultiheadAttention(16, 4, **sizes)
        again = make(**sizes)
        torch.manual_seed(0)
        EntmaxMultiheadAttention(16, 4, **sizes)  # out_proj draws too
        for name, parameter in theirs.named_parameters():
            assert torch.equal(parameter, ours.get_parameter(name))
        again._reset_parameters()
        assert again.in_proj_bias.abs().max() == 0


def layer(**options) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    made = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, **options)
    with torch.no_grad():
        for parameter in made.self_attn.parameters():
            parameter.mul_(3)
    return made


def with_entmax(module: nn.TransformerEncoderLayer, alpha: float = 1.5) -> nn.TransformerEncoderLayer:
    module.self_attn = EntmaxMultiheadAttention.from_torch(module.self_attn, alpha)
    return module


def run_by_hand(layers, x, padding=None, causal=False) -> torch.Tensor:
    for each in layers:
        out, _ = by_hand(each.self_attn, x, x, x, padding, causal=causal)
        x = each.norm1(x + out.to(x.dtype))
        x = each.norm2(x + each.linear2(each.activation(each.linear1(x))))
    return x


MODES = {"training": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", ("none", "right", "left"))
@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("built", ("layer", "encoder", "encoder, then its layers"))
def test_torchs_layers_run_entmax(built, causal, mask, mode):
    """And not their fast path, which asks the layer for its weights and computes softmax. An encoder that was built
    with torch's attention packs padded batches into nested tensors, too."""
    if built == "layer":
        module = with_entmax(layer())
        layers = [module]
    elif built == "encoder":
        module = nn.TransformerEncoder(with_entmax(layer()), 2)
        layers = module.layers
    else:
        module = nn.TransformerEncoder(layer(), 2)
        for each in module.layers:
            with_entmax(each)
        layers = module.layers
    module.train(mode == "training")
    x, padding = draw(3, 12, 16), MASKS[mask]
    future = nn.Transformer.generate_square_subsequent_mask(12) if causal else None
    with MODES[mode]():
        hint = dict(is_causal=causal) if built == "layer" else {}  # an encoder looks for itself
        out = module(x, future, padding, **hint)
        expected = run_by_hand(layers, x, padding, causal)
        seen = torch.ones(3, 12).bool() if padding is None else ~padding
        torch.testing.assert_close(out[seen], expected[seen], atol=1e-4, rtol=1e-4)
        softmax = run_by_hand([with_entmax(copy.deepcopy(each), 1.0) for each in layers], x, padding, causal)
        assert (out[seen] - softmax[seen]).abs().max() > 1e-2


@pytest.mark.parametrize("alpha", (1.0, 1.5))
def test_decoder_layer(alpha):
    torch.manual_seed(0)
    module = nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True).eval()
    x, memory, mask = draw(3, 12, 16), draw(3, 9, 16), LEFT[:, 3:] & LEFT[:, :9]
    options = dict(
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(12),
        tgt_is_causal=True,
        memory_key_padding_mask=mask,
    )
    expected = module(x, memory, **options)
    for name in ("self_attn", "multihead_attn"):
        setattr(module, name, EntmaxMultiheadAttention.from_torch(getattr(module, name), alpha))
    close = torch.allclose(module(x, memory, **options), expected, atol=1e-5)
    assert close == (alpha == 1)


def test_copies_pickles_and_state_dicts(tmp_path):
    module = make(batch_first=True, alpha=1.3)
    torch.save(module, tmp_path / "module.pt")
    other = EntmaxMultiheadAttention(16, 4, batch_first=True, alpha=1.3)
    other.load_state_dict(module.state_dict())
    given = arguments(module)
    for same in (copy.deepcopy(module), torch.load(tmp_path / "module.pt", weights_only=False), other):
        assert torch.equal(same(*given)[0], module(*given)[0])
    assert "alpha=1.3" in repr(module)


@pytest.mark.parametrize(
    "options, message",
    (
        (dict(add_bias_kv=True), "add_bias_kv and add_zero_attn must be False"),
        (dict(add_zero_attn=True), "add_bias_kv and add_zero_attn must be False"),
        (dict(alpha=3), "alpha must be 1 or from 1.01 to 2, got 3"),
        (dict(alpha=None), "alpha must be a number, got None"),
        (dict(alpha=torch.tensor(1.5)), "alpha must be a number, got a float32 tensor"),
        (dict(batch_first=None), "batch_first must be True or False, got None"),
    ),
)
def test_what_it_is_not_made_of(options, message):
    with pytest.raises((TypeError, ValueError), match=f"^EntmaxMultiheadAttention: {message}"):
        EntmaxMultiheadAttention(16, 4, **options)


@pytest.mark.parametrize(
    "options, message",
    (
        (dict(query=None), "query must be a tensor, got None"),
        (dict(query=torch.zeros(16)), "query, key and value must have 3 dimensions, or 2"),
        (dict(key_padding_mask=3), "key_padding_mask must be a tensor or None, got 3"),
        (dict(key_padding_mask=LEFT[:2]), r"key_padding_mask must have sizes \[3, 12\]"),
        (dict(key_padding_mask=LEFT.int()), "key_padding_mask must be Boolean or floating point"),
        (dict(attn_mask=LEFT), r"attn_mask must have sizes \[12, 12\] or \[12, 12, 12\]"),
        (dict(need_weights=None), "need_weights must be True or False, got None"),
        (dict(is_causal=1), "is_causal must be True or False, got 1"),
        (dict(average_attn_weights=None), "average_attn_weights must be True or False, got None"),
    ),
)
def test_wrong_arguments(options, message):
    x = draw(3, 12, 16)
    with pytest.raises((TypeError, ValueError), match=f"^EntmaxMultiheadAttention: {message}"):
        make(batch_first=True)(**dict(query=x, key=x, value=x) | options)


@pytest.mark.parametrize("alpha", (1.0, 1.5))
@pytest.mark.parametrize("mask", (None, LEFT), ids=("no mask", "padding"))
@pytest.mark.parametrize("need_weights", (False, True), ids=("without weights", "with weights"))
def test_dropout_in_training(mask, need_weights, alpha):
    """By both ways, in the mean over draws as without."""
    torch.manual_seed(0)
    module = EntmaxMultiheadAttention(16, 4, dropout=0.3, batch_first=True, alpha=alpha)
    x = draw(3, 12, 16)
    expected = module.eval()(x, x, x, mask, need_weights=need_weights)[0]
    module.train()
    with torch.no_grad():
        drawn = [module(x, x, x, mask, need_weights=need_weights)[0] for _ in range(500)]
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(sum(drawn) / len(drawn), expected, atol=0.05, rtol=0)
    module(x, x, x, mask, need_weights=need_weights)[0].sum().backward()
    assert module.in_proj_weight.grad.isfinite().all()


def test_an_encoder_layer_trains_with_torchs_own_dropout():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    layer.self_attn = EntmaxMultiheadAttention.from_torch(layer.self_attn)
    assert layer.self_attn.dropout == 0.1 and layer.self_attn.to_entmax_attention().dropout == 0.1
    layer(draw(3, 12, 16), src_key_padding_mask=LEFT).sum().backward()


@pytest.mark.parametrize("dropout", (-0.1, 1.0, float("nan")))
def test_dropout_out_of_range(dropout):
    with pytest.raises(ValueError, match="EntmaxMultiheadAttention: dropout must be 0 or more and less than 1, got"):
        EntmaxMultiheadAttention(16, 4, dropout=dropout)


@pytest.mark.slow
@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
def test_compiled(causal):
    module = make(batch_first=True)
    x = draw(3, 12, 16)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for mask in (None, LEFT, MASKS["floats"]):
        out, _ = compiled(x, x, x, mask, need_weights=False, is_causal=causal)
        torch.testing.assert_close(out, module(x, x, x, mask, need_weights=False, is_causal=causal)[0])
    torch.compiler.reset()


@pytest.mark.parametrize("alpha", (1.0, 1.5))
@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
def test_a_mask_of_the_least_number(alpha, causal):
    """As Hugging Face's models make theirs: both ways agree, also where all of an entry is padding."""
    module = make(batch_first=True, alpha=alpha)
    x = draw(3, 12, 16)
    mask = torch.zeros(3, 12)
    mask[0, :4] = mask[1, 7:] = torch.finfo(torch.float32).min
    sparse, _ = module(x, x, x, mask, need_weights=False, is_causal=causal)
    dense, _ = module(x, x, x, mask, need_weights=True, is_causal=causal)
    assert sparse.isfinite().all() and dense.isfinite().all()
    rows = slice(4, None) if causal else slice(None)  # before that an entry sees nothing but padding
    torch.testing.assert_close(sparse[:, rows], dense[:, rows], atol=1e-5, rtol=1e-4)


def test_softmax_that_sees_nothing_gives_the_bias():
    module = make(batch_first=True, alpha=1.0)
    x = draw(3, 12, 16)
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[1] = True
    for need_weights in (False, True):
        out, _ = module(x, x, x, mask, need_weights=need_weights)
        torch.testing.assert_close(out[1], module.out_proj.bias.expand(12, 16))


@pytest.mark.parametrize(
    "options, message",
    (
        (dict(num_heads=None), "num_heads must be an integer, got None"),
        (dict(num_heads=True), "num_heads must be an integer, got True"),
        (dict(num_heads=torch.tensor(0.5)), "num_heads must be an integer, got a float32 tensor"),
        (dict(embed_dim=5), "embed_dim must be a multiple of num_heads, got 5 and 4"),
        (dict(kdim=2.5), "kdim must be an integer, got 2.5"),
    ),
    ids=str,
)
def test_wrong_sizes(options, message):
    with pytest.raises((TypeError, ValueError), match=f"^EntmaxMultiheadAttention: {message}"):
        EntmaxMultiheadAttention(**dict(embed_dim=16, num_heads=4) | options)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("alpha", (1.0, 1.5))
def test_large_biases_of_keys_keep_their_digits(alpha):
    """In bfloat16, whose numbers near 100 are half of one apart."""
    from adasplash.masked import attend_by_keys

    query, key = torch.zeros(1, 1, 1, 4).bfloat16(), torch.zeros(1, 1, 4, 4).bfloat16()
    biases = torch.tensor([[100.3, 100.0, 99.9, 100.1]])
    weights = attend_by_keys(query, key, torch.eye(4).bfloat16()[None, None], alpha, biases, False, 1.0, 0.0)
    torch.testing.assert_close(
        weights.flatten().double(), reference.entmax(biases.double()[0], alpha), atol=5e-3, rtol=0
    )
