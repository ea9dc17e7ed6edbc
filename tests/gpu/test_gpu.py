"""What only a real GPU can show: graphs, streams and threads, repeats, and long contexts."""

import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch

from adasplash import entmax_attn, entmax_attn_summary, make_key_index
from common import ROOT, Inputs, assert_same_bits, gradients, make_inputs, normal_like

pytestmark = pytest.mark.backends("cuda")


def half_inputs(length: int, heads: int = 4, **options) -> Inputs:
    return make_inputs(1, heads, length, length, size=64, sigma=1.0, dtype=torch.bfloat16, device="cuda", **options)


def capture(step: Callable):
    """A graph of what `step` does, after it has run once on a stream of its own, and what it returned in the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


@pytest.mark.parametrize("alpha", (1.0, 1.3, 1.5, "heads"))
def test_a_graph_of_forward_and_backward(backend, alpha):
    """Captured once, replayed over other numbers: nothing is synchronised or allocated on the way."""
    inputs = half_inputs(700, requires_grad=True)
    alpha = torch.tensor([1.0, 1.2, 1.5, 1.8], device="cuda") if alpha == "heads" else alpha
    options = dict(is_causal=True, alpha=alpha, window=(600, 0))
    grad = normal_like(inputs.query)

    def step():
        out = entmax_attn(*inputs, **options)
        return out, *torch.autograd.grad(out, inputs, grad)

    graph, captured = capture(step)
    with torch.no_grad():
        for x, other in zip(inputs, half_inputs(700, seed=5), strict=True):
            x.copy_(other)
    graph.replay()
    assert_same_bits(captured, step())


@pytest.mark.parametrize("queries", (1, 60), ids=("decoding", "chunks"))
@pytest.mark.parametrize("alpha", (1.0, 1.5, 1.3))
def test_a_graph_of_a_step_on_a_paged_cache(backend, alpha, queries):
    """Captured once, with more tokens than a program of append compares; replayed over other tokens, slots, lengths and
    tables, it gives what calls of their own give."""
    page, room, sequences = 16, 40, 3
    heads, kv_heads, size = 8, 2, 64
    tokens = 1500 if queries > 1 else sequences

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, page * room + 1, (sequences,), generator=generator)
        counts = torch.randint(1, queries + 1, (sequences,), generator=generator)
        drawn = dict(
            query=torch.randn(sequences * queries, heads, size, generator=generator).bfloat16(),
            key=torch.randn(tokens, kv_heads, size, generator=generator).bfloat16(),
            value=torch.randn(tokens, kv_heads, size, generator=generator).bfloat16(),
            slots=torch.randint(-1, sequences * room * page, (tokens,), generator=generator),
            block_table=torch.randperm(sequences * room, generator=generator).view(sequences, room).int(),
            kv_seqlens=lengths.int(),
            cu_seqlens_q=torch.cat((torch.zeros(1), counts.cumsum(0))).int(),
        )
        return {name: x.cuda() for name, x in drawn.items()}

    caches = torch.randn(2, sequences * room, page, kv_heads, size, device="cuda", dtype=torch.bfloat16)
    given = draw(0)

    def step():
        torch.ops.adasplash.entmax_cache_append(given["key"], given["value"], *caches, given["slots"])
        return torch.ops.adasplash.entmax_attn_paged(
            given["query"], *caches, given["block_table"], given["kv_seqlens"], alpha,
            cu_seqlens_q=given["cu_seqlens_q"], max_seqlen_q=queries,
        )  # fmt: skip

    graph, captured = capture(step)
    for seed in (1, 2):
        for name, x in draw(seed).items():
            given[name].copy_(x)
        before = caches.clone()
        graph.replay()
        replayed = captured.clone(), caches.clone()
        caches.copy_(before)
        assert_same_bits(replayed, (step(), caches))
        assert replayed[0].isfinite().all() and not torch.equal(caches, before)


def test_a_graph_drops_other_weights_at_every_replay(backend):
    """The seed comes from torch's generator, which a captured graph moves on."""
    inputs = half_inputs(300)
    graph, captured = capture(lambda: entmax_attn(*inputs, dropout_p=0.5))
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(captured.clone())
    assert replays[0].isfinite().all() and not torch.equal(*replays)


def test_a_summary_waits_for_nothing(backend):
    """Captured, so nothing is read on the host on the way."""
    inputs = half_inputs(300)
    expected = entmax_attn_summary(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, stats = entmax_attn_summary(*inputs)
    graph.replay()
    assert_same_bits((out, *stats), (expected[0], *expected[1]))


def test_streams_and_threads(backend):
    work = [half_inputs(500 + 10 * i, seed=i) for i in range(8)]
    expected = [gradients(x, normal_like(x.query), entmax_attn, is_causal=True) for x in work]
    torch.cuda.synchronize()
    found, barrier = {}, threading.Barrier(len(work))

    def run(index):
        with torch.cuda.stream(torch.cuda.Stream()):
            barrier.wait()
            for _ in range(20):
                found[index] = gradients(work[index], normal_like(work[index].query), entmax_attn, is_causal=True)
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, tensors in enumerate(expected):
        assert_same_bits(tensors, found[index])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_device_than_the_current_one(backend):
    """Kernels run where the tensors are, each device with code of its own, and the current device stays what it was."""
    inputs = half_inputs(600)
    expected = gradients(inputs, normal_like(inputs.query), entmax_attn, is_causal=True)
    for index in range(1, torch.cuda.device_count()):
        there = Inputs(*(x.to(f"cuda:{index}") for x in inputs))
        found = gradients(there, normal_like(there.query), entmax_attn, is_causal=True)
        assert torch.cuda.current_device() == 0
        assert all(x.device.index == index for x in found)
        assert_same_bits(expected, [x.to("cuda:0") for x in found])
    with pytest.raises(RuntimeError, match="device"):
        entmax_attn(inputs.query, there.key, inputs.value)


def test_repeats_are_equal_to_the_bit(backend):
    inputs = half_inputs(4000)
    first = gradients(inputs, normal_like(inputs.query), entmax_attn, is_causal=True)
    for _ in range(5):
        assert_same_bits(first, gradients(inputs, normal_like(inputs.query), entmax_attn, is_causal=True))


@pytest.mark.slow
def test_a_long_context(backend):
    """131,072 tokens, forward and backward, in less than twice the memory of inputs, output and gradients."""
    inputs = half_inputs(131072, heads=8, requires_grad=True)
    grad = normal_like(inputs.query)
    tensors = 8 * inputs.query.numel() * 2
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = entmax_attn(*inputs, is_causal=True)
    gradients_of = torch.autograd.grad(out, inputs, grad)
    used = torch.cuda.max_memory_allocated() - before
    assert all(x.isfinite().all() for x in (out, *gradients_of))
    assert used < 2 * tensors, f"{used / 2**20:.0f} MiB"
    rows = slice(-100, None)
    exact = entmax_attn(inputs.query[:, :, rows].float(), inputs.key.float(), inputs.value.float(), is_causal=True)
    torch.testing.assert_close(out[:, :, rows].float(), exact, atol=0.02, rtol=0.02)


@pytest.mark.slow
def test_scratch_grows_no_further(backend):
    """All pairs of tiles of these heads would take 3 GiB."""
    inputs = half_inputs(262144, heads=16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = entmax_attn(*inputs, is_causal=True)
    used = torch.cuda.max_memory_allocated() - before
    assert used < 2**29 + out.nbytes, f"{used / 2**20:.0f} MiB"
    head = slice(5, 6)
    assert torch.equal(out[:, head], entmax_attn(*(x[:, head] for x in inputs), is_causal=True))


@pytest.mark.parametrize("indexed", (False, True), ids=("every key read", "by an index"))
def test_a_step_takes_at_most_8_bytes_a_key_and_query_head(backend, indexed, monkeypatch):
    monkeypatch.setenv("ADASPLASH_KEY_INDEX", "read")
    keys, heads, kv_heads = 65536, 32, 8
    cache = torch.randn(1, keys, kv_heads, 64, device=backend.device, dtype=torch.bfloat16)
    query = torch.randn(1, heads, 1, 64, device=backend.device, dtype=torch.bfloat16)
    key = cache.transpose(1, 2)
    index = make_key_index(cache) if indexed else None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    entmax_attn(query, key, key, key_index=index)
    assert torch.cuda.max_memory_allocated() - before <= 8 * keys * heads


# In a process of its own, as a failed assertion on the device is the end of CUDA there.
HOLES = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests/support")!r})
import torch
import adasplash.integrations.transformers
from dense_models import build, draw_ids, masks

model = build("bert", dtype=torch.float32).cuda()
run = torch.compile(model, fullgraph=True, backend="aot_eager")
ids = draw_ids().cuda()
left = masks()["left"].cuda()
out = run(ids, attention_mask=left).last_hidden_state
expected = model(ids, attention_mask=left).last_hidden_state
torch.testing.assert_close(out[left.bool()], expected[left.bool()], atol=1e-4, rtol=1e-4)
torch.cuda.synchronize()
print("padding is served", flush=True)
run(ids, attention_mask=masks()["holes"].cuda())
torch.cuda.synchronize()
print("holes went through", flush=True)
"""


@pytest.mark.slow
def test_holes_in_a_mask_of_a_compiled_model_are_an_assertion(backend):
    """On the CPU an error says so (test_compiled_models.py); a GPU's kernels look at no lengths."""
    pytest.importorskip("transformers")
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "padding is served" in done.stdout, done.stdout + done.stderr
    assert "holes went through" not in done.stdout
    assert "assert" in done.stderr.lower(), done.stderr
