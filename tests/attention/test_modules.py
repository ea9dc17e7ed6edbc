"""EntmaxAttention: the layer that its parts make up, in every form in which torch runs a module."""

import pytest
import torch
from torch import nn

import adasplash
import reference
from adasplash import EntmaxAttention
from saving import reloaded_script

OPTIONS = {
    "plain": {},
    "causal": dict(is_causal=True),
    "grouped, own head_dim, no bias": dict(num_kv_heads=2, head_dim=5, bias=False, alpha=1.25),
    "cross": dict(kdim=10, vdim=7),
    "window": dict(window=(9, 2), alpha=2.0),
    "learned": dict(learn_alpha=True, is_causal=True),
    "all": dict(
        num_kv_heads=1, head_dim=6, kdim=10, vdim=7, window=(20, -1), is_causal=True, learn_alpha=True, alpha=1.3
    ),
}


@pytest.fixture(params=OPTIONS)
def options(request) -> dict:
    return OPTIONS[request.param]


def make(backend, dtype=torch.float32, **options) -> EntmaxAttention:
    """16 wide, 4 heads; weights large enough for sparse rows, no two heads with the same learned alpha."""
    torch.manual_seed(0)
    module = EntmaxAttention(16, 4, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return module.to(backend.device, dtype)


def draw(backend, *shape, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(backend.device, dtype)


def arguments(backend, module, m=30, n=41, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    """Of self-attention, or of cross-attention where key and value have sizes of their own."""
    query = draw(backend, 2, m, module.embed_dim, dtype=dtype)
    if module.kdim == module.vdim == module.embed_dim:
        return (query,)
    return query, draw(backend, 2, n, module.kdim, dtype=dtype), draw(backend, 2, n, module.vdim, dtype=dtype)


def by_hand(module, query, key=None, value=None, **lengths) -> torch.Tensor:
    """The same with the reference in the middle, in fp64."""
    key = query if key is None else key
    value = key if value is None else value

    def heads(projection, x, count):
        weight, bias = (None if p is None else p.double() for p in (projection.weight, projection.bias))
        return nn.functional.linear(x.double(), weight, bias).unflatten(-1, (count, -1)).transpose(1, 2)

    q = heads(module.q_proj, query, module.num_heads)
    k, v = (heads(p, x, module.num_kv_heads) for p, x in ((module.k_proj, key), (module.v_proj, value)))
    alpha = module.alpha if module.alpha_logit is None else 1.05 + 0.95 * module.alpha_logit.double().sigmoid()
    out = reference.attention(q, k, v, alpha, module.is_causal, window=module.window, **lengths).out
    weight, bias = (None if p is None else p.double() for p in (module.out_proj.weight, module.out_proj.bias))
    return nn.functional.linear(out.transpose(1, 2).flatten(2), weight, bias)


def parameter_gradients(module, out) -> list[torch.Tensor]:
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.device, out.dtype)
    return torch.autograd.grad(out, list(module.parameters()), grad)


def test_result_and_gradients(backend, options):
    module = make(backend, **options)
    given = arguments(backend, module)
    out, expected = module(*given), by_hand(module, *given)
    assert out.shape == given[0].shape and out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-5)
    for (name, _), *pair in zip(
        module.named_parameters(), parameter_gradients(module, out), parameter_gradients(module, expected), strict=True
    ):
        torch.testing.assert_close(*pair, atol=2e-5 * max(1, pair[1].abs().max().item()), rtol=0, msg=name)


@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
def test_takes_the_place_of_multihead_attention(backend, is_causal):
    """At α = 1 and with its weights it is torch's layer."""
    theirs = nn.MultiheadAttention(16, 4, batch_first=True).to(backend.device)
    module = EntmaxAttention(16, 4, alpha=1.0, is_causal=is_causal).to(backend.device)
    weights, biases = theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)
    state = {f"{x}_proj.weight": w for x, w in zip("qkv", weights, strict=True)}
    state |= {f"{x}_proj.bias": b for x, b in zip("qkv", biases, strict=True)}
    state |= {f"out_proj.{name}": p for name, p in theirs.out_proj.named_parameters()}
    module.load_state_dict(state)
    x = draw(backend, 2, 30, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(30, device=x.device) if is_causal else None
    expected, _ = theirs(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)


def test_starts_as_multihead_attention_does():
    torch.manual_seed(0)
    module = EntmaxAttention(256, 4, num_kv_heads=2)
    for projection in (module.q_proj, module.k_proj, module.v_proj):
        rows, columns = projection.weight.shape
        assert projection.weight.abs().max() <= (6 / (rows + columns)) ** 0.5
        assert projection.weight.std().item() == pytest.approx((2 / (rows + columns)) ** 0.5, rel=0.02)
    assert not any(p.any() for name, p in module.named_parameters() if name.endswith("bias"))


def test_two_forms_of_cross_attention(backend):
    module = make(backend)
    query, memory = draw(backend, 2, 30, 16), draw(backend, 2, 41, 16)
    assert torch.equal(module(query, memory), module(query, memory, memory))
    assert not torch.allclose(module(query, memory), module(query, memory, 2 * memory))
    assert torch.equal(module(query), module(query, query, query))
    with pytest.raises(ValueError, match="value goes with key"):
        module(query, None, memory)


@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
def test_lengths(backend, is_causal):
    """A padded batch gives what each sequence gives alone, and out_proj's bias for padding."""
    module = make(backend, is_causal=is_causal, window=(25, -1))
    x = draw(backend, 3, 30, 16)
    lengths = torch.tensor([30, 13, 0], device=x.device)
    out = module(x, q_seqlens=lengths)
    for entry, length in enumerate(lengths.tolist()):
        alone = module(x[entry : entry + 1, :length])
        torch.testing.assert_close(out[entry, :length], alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out[entry, length:], module.out_proj.bias.expand(30 - length, 16))
    for same in (dict(kv_seqlens=lengths), dict(q_seqlens=lengths, kv_seqlens=lengths)):
        assert torch.equal(out, module(x, **same))


def test_lengths_in_cross_attention(backend):
    module = make(backend, kdim=10, vdim=7, is_causal=True)
    given = arguments(backend, module)
    lengths = dict(
        q_seqlens=torch.tensor([30, 11], device=backend.device),
        kv_seqlens=torch.tensor([40, 12], device=backend.device),
    )
    torch.testing.assert_close(
        module(*given, **lengths).double(), by_hand(module, *given, **lengths), atol=2e-5, rtol=1e-5
    )
    only_keys = dict(kv_seqlens=lengths["kv_seqlens"])
    torch.testing.assert_close(
        module(*given, **only_keys).double(), by_hand(module, *given, **only_keys), atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("alpha", (1.06, 1.3, 1.95))
def test_learned_alpha_starts_where_told(backend, alpha):
    module = EntmaxAttention(16, 4, alpha=alpha, learn_alpha=True).to(backend.device)
    torch.testing.assert_close(module.head_alpha(), torch.full((4,), alpha, device=backend.device))
    fixed = EntmaxAttention(16, 4, alpha=alpha).to(backend.device)
    assert torch.equal(fixed.head_alpha(), torch.full((4,), alpha, device=backend.device))
    fixed.load_state_dict({k: v for k, v in module.state_dict().items() if k != "alpha_logit"})
    x = draw(backend, 2, 30, 16)
    torch.testing.assert_close(module(x), fixed(x), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_learned_alpha_stays_in_range(backend):
    """Whatever training does to it, results stay finite."""
    module = make(backend, learn_alpha=True)
    for extreme in (-1e4, -20.0, 20.0, 1e4):
        with torch.no_grad():
            module.alpha_logit.fill_(extreme)
        alpha = module.head_alpha()
        assert (alpha >= 1.0499999).all() and (alpha <= 2).all()
        out = module(draw(backend, 2, 30, 16))
        assert out.isfinite().all() and all(g.isfinite().all() for g in parameter_gradients(module, out))


@pytest.mark.slow
def test_learned_alpha_learns(backend):
    """A head is taught to attend as one with another alpha does."""
    teacher = make(backend, alpha=1.9)
    module = make(backend, alpha=1.9, learn_alpha=True)
    module.load_state_dict(teacher.state_dict(), strict=False)
    with torch.no_grad():
        module.alpha_logit.fill_(-1.0)
    optimizer = torch.optim.Adam([module.alpha_logit], lr=0.3)
    x = draw(backend, 2, 30, 16)
    target, before = teacher(x).detach(), module.head_alpha().detach()
    for _ in range(20):
        optimizer.zero_grad()
        (module(x) - target).square().mean().backward()
        optimizer.step()
    after = module.head_alpha().detach()
    assert ((after - 1.9).abs() < 0.5 * (before - 1.9).abs()).all()


def test_state_dict(backend, options):
    module = make(backend, **options)
    names = {f"{x}_proj.{part}" for x in ("q", "k", "v", "out") for part in ("weight", "bias")}
    if not options.get("bias", True):
        names = {name for name in names if not name.endswith("bias")}
    assert set(module.state_dict()) == names | ({"alpha_logit"} if options.get("learn_alpha") else set())
    other = EntmaxAttention(16, 4, **options).to(backend.device)
    given = arguments(backend, module)
    assert not torch.equal(other(*given), module(*given))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(*given), module(*given))


def test_types(backend, dtype):
    module = make(backend, dtype, learn_alpha=True, is_causal=True)
    given = arguments(backend, module, dtype=dtype)
    out = module(*given)
    assert out.dtype == dtype
    assert module.head_alpha().dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5}.get(dtype, 0.1)
    torch.testing.assert_close(out.double(), by_hand(module, *given), atol=tolerance, rtol=tolerance)
    assert all(g.dtype == dtype and g.any() for g in parameter_gradients(module, out))


@pytest.mark.slow
def test_scripted_saved_and_loaded(backend, options):
    module = make(backend, **options)
    loaded = reloaded_script(module)
    for m, n in ((30, 41), (70, 65)):
        given = arguments(backend, module, m, n)
        for _ in range(3):  # the profiling executor rewrites the graph after its first runs
            out = loaded(*given)
            torch.testing.assert_close(out, module(*given))
            for pair in zip(parameter_gradients(loaded, out), parameter_gradients(module, module(*given)), strict=True):
                torch.testing.assert_close(*pair)


def test_scripted_with_lengths(backend):
    module = make(backend, is_causal=True)
    x, lengths = draw(backend, 2, 30, 16), torch.tensor([30, 9], device=backend.device)
    torch.testing.assert_close(torch.jit.script(module)(x, q_seqlens=lengths), module(x, q_seqlens=lengths))


@pytest.mark.slow
@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("options", ("plain", "all"), indirect=True)
def test_compiled(backend, options):
    """In one graph, which serves all lengths."""
    module = make(backend, **options)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    compiled(*arguments(backend, module))
    with torch.compiler.set_stance("fail_on_recompile"):
        for m, n in ((30, 41), (70, 65), (131, 150)):
            given = arguments(backend, module, m, n)
            out, expected = compiled(*given), module(*given)
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
            for pair in zip(parameter_gradients(module, out), parameter_gradients(module, expected), strict=True):
                torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-4)
    torch.compiler.reset()


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("options", ("causal", "all"), indirect=True)
def test_exported(backend, options):
    module = make(backend, **options).eval()
    given = arguments(backend, module)
    m, n = torch.export.Dim("m"), torch.export.Dim("n")
    program = torch.export.export(module, given, dynamic_shapes=({1: m}, {1: n}, {1: n})[: len(given)])
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("adasplash.entmax_attn" in target for target in targets) == 1
    for lengths in ((30, 41), (70, 65)):
        other = arguments(backend, module, *lengths)
        torch.testing.assert_close(program.module()(*other), module(*other))


@pytest.mark.parametrize(
    "sizes, message",
    (
        (dict(embed_dim=15, num_heads=4), "embed_dim must be a multiple of num_heads .* got 15 and 4"),
        (dict(embed_dim=16, num_heads=4, num_kv_heads=3), "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        (dict(embed_dim=16, num_heads=0), "num_heads must be a multiple of num_kv_heads, got 0 and 0"),
        (
            dict(embed_dim=16, num_heads=4, alpha=2.0, learn_alpha=True),
            "above 1.05 and below 2.0 to be learned, got 2.0",
        ),
        (
            dict(embed_dim=16, num_heads=4, alpha=1.0, learn_alpha=True),
            "above 1.05 and below 2.0 to be learned, got 1.0",
        ),
    ),
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        EntmaxAttention(**sizes)


def test_device_and_dtype(backend):
    module = EntmaxAttention(16, 4, learn_alpha=True, device=backend.device, dtype=torch.float64)
    assert {(p.dtype, p.device.type) for p in module.parameters()} == {(torch.float64, backend.device)}
    assert module.head_alpha().dtype == torch.float64


def test_says_what_it_is():
    text = repr(EntmaxAttention(16, 4, num_kv_heads=2, learn_alpha=True, window=(5, 0)))
    for part in ("num_heads=4", "num_kv_heads=2", "head_dim=4", "window=(5, 0)", "alpha=learned", "q_proj", "out_proj"):
        assert part in text
    assert "alpha=1.25" in repr(adasplash.EntmaxAttention(16, 4, alpha=1.25))


WRONG = {
    "integer": (None, True, 2.5, "text", torch.tensor(4)),
    "integer or none": (True, 2.5, "text", torch.tensor(4)),
    "bool": (None, 1, "text", torch.tensor(True)),
    "window": (None, True, 5, (5,), (1.0, 2), (None, 0), torch.tensor([1, 2])),
    "number": (None, True, "text", torch.tensor(1.5, requires_grad=True)),
}
KINDS = {
    "embed_dim": "integer",
    "num_heads": "integer",
    **dict.fromkeys(("num_kv_heads", "head_dim", "kdim", "vdim"), "integer or none"),
    **dict.fromkeys(("bias", "is_causal", "learn_alpha"), "bool"),
    "window": "window",
    "alpha": "number",
}


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("name", KINDS)
def test_wrong_kinds(name):
    """None is not False, 5 not (5, 5), and an alpha with a gradient no number."""
    for value in WRONG[KINDS[name]]:
        with pytest.raises(TypeError, match=rf"^EntmaxAttention: {name} must be [^\n]*$"):
            EntmaxAttention(**dict(embed_dim=16, num_heads=4) | {name: value})


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("value", (True, 3, "text", [1]), ids=str)
@pytest.mark.parametrize("name", ("query", "key", "value", "q_seqlens", "kv_seqlens"))
def test_wrong_kinds_of_a_call(name, value):
    x = torch.randn(2, 5, 16)
    with pytest.raises(TypeError, match=rf"^EntmaxAttention: {name} must be a tensor[^\n]*$"):
        EntmaxAttention(16, 4)(**dict(query=x, key=x) | {name: value})
    with pytest.raises(TypeError, match=r"^EntmaxAttention: query must be a tensor, got None"):
        EntmaxAttention(16, 4)(None)


@pytest.mark.backends("cpu")
def test_no_batch_and_no_such_alpha():
    with pytest.raises(ValueError, match=r"^EntmaxAttention: query must have 3 dimensions \(B, M, E\), got 2"):
        EntmaxAttention(16, 4)(torch.randn(5, 16))
    with pytest.raises(ValueError, match=r"^EntmaxAttention: alpha must be 1 or from 1.01 to 2, got 3"):
        EntmaxAttention(16, 4, alpha=3)


@pytest.mark.backends("cpu")
def test_as_many_heads_as_the_projections_give():
    """Half of them, as on a rank of a tensor-parallel plan, but by hand."""
    whole = EntmaxAttention(16, 4, num_kv_heads=2, is_causal=True)
    half = EntmaxAttention(16, 4, num_kv_heads=2, is_causal=True)
    x, parts = torch.randn(2, 5, 16), []
    for rank in range(2):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear, given = getattr(half, name), getattr(whole, name)
            dim = 1 if name == "out_proj" else 0
            linear.weight = nn.Parameter(given.weight.chunk(2, dim)[rank])
            if dim == 0:
                linear.bias = nn.Parameter(given.bias.chunk(2)[rank])
        parts.append(half(x))
    torch.testing.assert_close(sum(parts), whole(x))
    learned = EntmaxAttention(16, 4, learn_alpha=True)
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(learned, name).weight = nn.Parameter(getattr(learned, name).weight[:8])
        getattr(learned, name).bias = nn.Parameter(getattr(learned, name).bias[:8])
    with pytest.raises(ValueError, match="only a plan that makes q_proj's weight a DTensor says which"):
        learned(x)


@pytest.mark.parametrize("options", (dict(), dict(learn_alpha=True), dict(alpha=1.0), dict(is_causal=True)), ids=str)
def test_dropout(backend, options):
    """Of weights, in training alone; drawn by torch's generator, in TorchScript too."""
    module = make(backend, dropout=0.4, **options)
    plain = make(backend, **options)
    x = draw(backend, 2, 30, 16)
    assert torch.equal(module.eval()(x), plain(x))
    module.train()
    outcomes = []
    for each in (module, module, torch.jit.script(module)):
        torch.manual_seed(3)
        outcomes.append(each(x))
    assert torch.equal(outcomes[0], outcomes[1]) and torch.equal(outcomes[0], outcomes[2])
    assert not torch.equal(outcomes[0], plain(x)) and not torch.equal(outcomes[0], module(x))
    assert "dropout=0.4" in repr(module) and "dropout" not in repr(plain)


@pytest.mark.parametrize("dropout", (-0.1, 1.0))
def test_dropout_out_of_range(dropout):
    with pytest.raises(ValueError, match="EntmaxAttention: dropout must be 0 or more and less than 1, got"):
        EntmaxAttention(16, 4, dropout=dropout)


@pytest.mark.parametrize(
    "options, name",
    (
        (dict(embed_dim=0), "embed_dim"),
        (dict(kdim=0), "kdim"),
        (dict(head_dim=0), "head_dim"),
        (dict(head_dim=300), "head_dim"),
        (dict(window=(-2, 0)), "window"),
        (dict(num_kv_heads=3), "num_heads"),
    ),
    ids=str,
)
def test_sizes_out_of_range(options, name):
    with pytest.raises(ValueError, match=f"^EntmaxAttention: {name} must be "):
        EntmaxAttention(**dict(embed_dim=16, num_heads=4) | options)


def test_pickled_before_there_was_dropout():
    module = EntmaxAttention(16, 4)
    state = module.__dict__.copy()
    del state["dropout"]
    older = EntmaxAttention.__new__(EntmaxAttention)
    older.__setstate__(state)
    x = torch.randn(2, 5, 16)
    assert torch.equal(older(x), module(x))
