"""The benchmark measures what it says: inputs, checks, pairs, processes of their own, goals, tables, solvers."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import common
import reference
from adasplash import attention_weights
from bench import (
    activation,
    attention,
    capture,
    context_parallel,
    decoding,
    overhead,
    report,
    scaling,
    solver,
    support_pages,
    training_step,
)
from bench.context_parallel import DIFFERENCE, WEAK_SCALING
from bench.lib import blocks, results, tables
from bench.lib.case import BOTH, FORWARD, PASSES, Case
from bench.lib.inputs import Inputs, make_grad, make_inputs
from bench.lib.presets import PRESETS, SHORT_CASE, TRAINED_CASE, Entry, Goal, entries_of
from bench.lib.reference import empty_tiles, keys_of_block, make_check
from bench.lib.remote import RemoteRunner
from bench.lib.runner import LocalRunner, Seconds
from bench.lib.timing import Effort, measure
from bench.peers import OURS, PEERS, fa3
from model import GPTConfig

pytestmark = pytest.mark.backends("cpu")
SMALL = Case(length=128, heads=2, head_dim=16, input="gaussian:1.5")


def dense_empty_tiles(case: Case, inputs: Inputs) -> float:
    weights = reference.attention(*inputs, case.alpha, case.causal).weights
    tiles = weights.unflatten(-1, (-1, 64)).unflatten(-3, (-1, 64)).amax((-3, -1))
    side = tiles.shape[-1]
    visible = side * (side + 1) / 2 if case.causal else side * side
    return 1 - (tiles > 0).sum().item() / visible / case.batch / case.heads


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("empty", [0.0, 0.5, 0.8])
def test_the_dial_of_empty_tiles(empty, causal):
    case = Case(length=1024, heads=2, input=f"structured:{empty}", causal=causal)
    inputs = make_inputs(case)
    assert empty_tiles(case, inputs) == pytest.approx(empty, abs=0.05)
    assert empty_tiles(case, inputs) == pytest.approx(dense_empty_tiles(case, inputs), abs=1e-9)


def test_inputs_are_what_their_name_says():
    query, key, value = make_inputs(replace(SMALL, length=2048, input="gaussian:3"))
    assert query.std().item() == pytest.approx(3, rel=0.02)
    assert key.std().item() == pytest.approx(3, rel=0.02)
    assert value.std().item() == pytest.approx(1, rel=0.02)
    flat = replace(SMALL, length=1024, input="flat")
    inputs = make_inputs(flat)
    assert inputs.query.std().item() == pytest.approx(0.02, rel=0.02)
    assert make_check(flat, inputs, make_grad(flat), count=16).support > 1024 / 4  # of 512 that a query sees
    for name in ("gaussian:1", "structured:0.5"):
        case = replace(SMALL, input=name)
        assert all(torch.equal(x, y) for x, y in zip(make_inputs(case), make_inputs(case), strict=True))
    with pytest.raises(ValueError, match="gaussian:σ, structured:share, flat, trained or captured:file"):
        make_inputs(replace(SMALL, input="round:1"))


def test_captured_inputs(tmp_path):
    file = tmp_path / "captured.pt"
    tensors = [torch.randn(3, 2, 100, 16) for _ in range(3)]
    torch.save({**dict(zip(("query", "key", "value"), tensors, strict=True)), "alpha": 1.25}, file)
    options = attention.parse(["--inputs", f"captured:{file}"])
    (entry,) = attention._entries(options)
    case = entry.case
    assert (case.batch, case.heads, case.length, case.head_dim, case.alpha) == (3, 2, 100, 16, 1.25)
    assert all(torch.equal(x, y) for x, y in zip(make_inputs(case), tensors, strict=True))
    with pytest.raises(ValueError, match="but the case asks for"):
        make_inputs(replace(case, length=200))


def test_a_model_is_trained_and_its_heads_captured(tmp_path, monkeypatch):
    """In small, on the CPU, as bench.capture does it on a GPU; heads are those of the model's own attention."""
    file = tmp_path / "folder" / "trained.pt"
    config = GPTConfig(layers=2, heads=2, width=32, context=128)
    capture.make(file, Path(capture.__file__).parents[1] / "README.md", config, steps=3, device=torch.device("cpu"))
    monkeypatch.setattr("bench.lib.inputs.TRAINED", file)
    (entry,) = attention._entries(attention.parse(["--inputs", "trained"]))
    case = replace(entry.case, dtype="bf16")
    assert (case.batch, case.heads, case.length, case.head_dim, case.alpha) == (2, 2, 128, 16, 1.5)
    inputs = make_inputs(case)
    assert all(x.dtype == torch.bfloat16 and x.std() > 0 for x in inputs)
    weights = reference.attention(*(x.double() for x in inputs), case.alpha, case.causal).weights
    assert keys_of_block(case, inputs, blocks=2) == pytest.approx(dense_keys_of_block(weights), abs=1e-3)


def dense_keys_of_block(weights) -> float:
    """Of two blocks of 64 queries, the first and the last of 128."""
    first, last = weights[..., :64, :64], weights[..., 64:, :]
    return sum((block > 0).any(-2).double().mean().item() for block in (first, last)) / 2


def local(name: str, case: Case) -> LocalRunner:
    return LocalRunner(PEERS[name], case, make_inputs(case), make_grad(case))


@pytest.mark.parametrize("name", [OURS, "sdpa", "sdpa-flash", "sdpa-math", "entmax-exact", "entmax-bisect"])
@pytest.mark.parametrize("causal", [True, False])
def test_peers_pass_the_check(name, causal):
    case = replace(SMALL, causal=causal)
    check = make_check(case, make_inputs(case), make_grad(case), count=16)
    errors = check.errors(PEERS[name].weights, local(name, case).results(check.grad))
    assert max(errors.values()) < 1e-4


@pytest.mark.parametrize("name", [OURS, "sdpa", "sdpa-flash", "sdpa-math"])
@pytest.mark.parametrize("causal", [True, False])
def test_peers_pass_the_check_with_grouped_heads(name, causal):
    case = replace(SMALL, heads=4, kv_heads=2, causal=causal)
    inputs = make_inputs(case)
    check = make_check(case, inputs, make_grad(case), count=16)
    errors = check.errors(PEERS[name].weights, local(name, case).results(check.grad))
    assert max(errors.values()) < 1e-4
    weights = reference.attention(*inputs, case.alpha, causal).weights
    seen = 1 if causal else 2  # blocks of keys that the first block of rows sees
    blocks_of = (weights[..., :64, : 64 * seen], weights[..., 64:, :])
    shares = [(block > 0).any(-2).double().mean().item() for block in blocks_of]
    assert keys_of_block(case, inputs, blocks=2) == pytest.approx(sum(shares) / 2, abs=1e-3)


@pytest.mark.parametrize("name", ["entmax-exact", "entmax-bisect", "pypi-v1", "pypi-v2"])
def test_peers_that_know_no_grouped_heads_say_so(name, monkeypatch):
    monkeypatch.setenv("ADASPLASH_PYPI", "somewhere")
    case = replace(SMALL, device="cuda", heads=4)
    assert PEERS[name].refuses(case) is None
    assert PEERS[name].refuses(replace(case, kv_heads=2)) == "as many heads of keys as of queries only"


def test_flash_attention_3_is_left_out_where_it_cannot_run(monkeypatch):
    refuses, case = PEERS["fa3"].refuses, replace(SMALL, device="cuda", dtype="bf16")
    assert refuses(replace(case, device="cpu")) == "a GPU only"
    monkeypatch.setattr(fa3, "installed", lambda: None)
    assert "pip install --no-deps fa3-fwd" in refuses(case)
    monkeypatch.setattr(fa3, "installed", lambda: fa3.WHEEL)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert refuses(case) == "Hopper GPUs only"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert refuses(case) is None
    assert "bf16 only" in refuses(replace(case, dtype="fp16"))
    assert "head sizes" in refuses(replace(case, head_dim=36))


@pytest.fixture
def stand_in_for_fa3(tmp_path, monkeypatch):
    """A module with the wheel's names and layout; as the wheel, without a backward."""
    if importlib.util.find_spec(fa3.OWN):
        pytest.skip("FlashAttention's own package is here, which comes before the wheel")
    (tmp_path / "fa3_fwd_config.py").write_text("CONFIG = {}\n")
    (tmp_path / f"{fa3.WHEEL}.py").write_text(
        "import torch\n"
        "from flash_attn_config import CONFIG\n"
        "def flash_attn_func(q, k, v, causal=False):\n"
        "    assert not torch.is_grad_enabled() and q.shape[1] == k.shape[1] > q.shape[2] >= k.shape[2]\n"
        "    q, k, v = (x.transpose(1, 2) for x in (q, k, v))\n"
        "    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))\n"
        "    scores = q @ k.mT * q.shape[-1] ** -0.5\n"
        "    if causal:\n"
        "        scores += torch.full(scores.shape[-2:], -torch.inf).triu(1)\n"
        "    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous()\n"
    )
    for name in (fa3.WHEEL, "fa3_fwd_config", "flash_attn_config"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PEERS, "fa3", replace(PEERS["fa3"], refuses=lambda case: None))
    yield
    for name in (fa3.WHEEL, "fa3_fwd_config", "flash_attn_config"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("kv_heads", [0, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention_3_has_its_layout_and_its_forward_alone(stand_in_for_fa3, kv_heads, causal):
    case = replace(SMALL, heads=4, kv_heads=kv_heads, causal=causal)
    check = make_check(case, make_inputs(case), make_grad(case), count=16)
    runner = local("fa3", case)
    (out,) = runner.results(check.grad)
    assert check.errors("softmax", (out,)).keys() == {"out"}
    torch.testing.assert_close(out, local("sdpa", case).results(check.grad)[0])
    sample = runner.sample(2)
    assert sample.forward > 0 and sample.backward is None and sample.both is None and sample.spent == sample.forward
    assert runner.memory(results.INFERENCE_MEMORY) < 64  # MiB; it runs without gradients, which the stand-in asserts


class Bar:
    """What the benchmark asks of a progress bar."""

    n = 0

    def set_postfix_str(self, text): ...

    def refresh(self): ...


def test_a_peer_without_a_backward_beside_others(stand_in_for_fa3):
    goals = (Goal("fa3", FORWARD, 1e9), Goal("sdpa", BOTH, 0))
    effort = Effort(seconds=0, fewest=3)
    bench = attention.Bench(Bar())
    rows = bench.run(Entry(SMALL, ("sdpa", "fa3"), goals, effort))
    assert not bench.problems
    found = {(row["peer"], row["what"]): row for row in rows}
    assert {what for peer, what in found if peer == "fa3"} == {FORWARD}
    assert {what for peer, what in found if peer == "sdpa"} == set(PASSES)
    assert found["fa3", FORWARD]["reached"] is True and found["sdpa", BOTH]["reached"] is False
    assert found["fa3", FORWARD]["errors"].keys() == {"out"}
    assert "FlashAttention-3" in tables.times(rows_with_facts(rows))


def rows_with_facts(rows):
    return [{"date": "2026-01-02", "preset": "own", "entry": 0, **row} for row in rows]


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_the_check_knows_the_truth(alpha):
    case = replace(SMALL, alpha=alpha, dtype="fp64")
    inputs, grad = make_inputs(case), make_grad(case)
    check = make_check(case, inputs, grad, count=16)
    leaves = Inputs(*(x.requires_grad_() for x in inputs))
    exact = reference.attention(*leaves, alpha, True)
    results = [exact.out, *torch.autograd.grad(exact.out, leaves, check.grad)]
    check.errors("entmax", tuple(x.detach() for x in results))
    assert check.support == pytest.approx((exact.weights > 0)[:, :, check.rows].sum(-1).double().mean().item())
    for i, what in enumerate(("out", "dq", "dk", "dv")):
        wrong = [x.detach().clone() for x in results]
        wrong[i] *= 1.01
        with pytest.raises(AssertionError, match=what):
            check.errors("entmax", tuple(wrong))


def test_runners_take_turns_and_ratios_are_of_pairs():
    log = []

    class Fake:
        def __init__(self, name, seconds):
            self.name, self.seconds = name, seconds

        def sample(self, calls):
            log.append(self.name)
            return Seconds(self.seconds * len(log), 1.0, 2.0)  # the machine gets slower and slower

    timings = measure([Fake("a", 1.0), Fake("b", 2.0)], Effort(seconds=0, fewest=4, most=9), (0.1, 0.1))
    assert log[2:] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    ratio = timings[0].ratio_to(timings[1], FORWARD)
    assert ratio.low < 0.5 < ratio.high
    assert timings[0].ratio_to(timings[1], BOTH).median == 1


def test_a_process_of_its_own_gives_the_same():
    here, check = local(OURS, SMALL), make_grad(SMALL)
    there = RemoteRunner(PEERS[OURS], replace(SMALL, threads=torch.get_num_threads()))
    try:
        assert all(torch.equal(x, y) for x, y in zip(here.results(check), there.results(check), strict=True))
        assert there.sample(1).both > 0
        with pytest.raises(RuntimeError, match="adasplash: "):
            there.results(check[..., :3])
    finally:
        there.close()


def test_a_package_of_the_same_name(tmp_path, monkeypatch):
    package = tmp_path / "adasplash"
    package.mkdir()
    (package / "__init__.py").write_text("def adasplash_v2(q, k, v): return q + k + v\n")
    monkeypatch.setenv(PEERS["pypi-v2"].package_path, str(tmp_path))
    runner = RemoteRunner(PEERS["pypi-v2"], SMALL)
    try:
        out, *_ = runner.results(make_grad(SMALL))
    finally:
        runner.close()
    query, key, value = make_inputs(SMALL)
    assert torch.equal(out, query + key + value)


@pytest.mark.builds
def test_peak_memory_sees_the_matrix_of_weights():
    case = replace(SMALL, length=1024, heads=1)
    peaks = {}
    for name in (OURS, "entmax-exact"):
        runner = RemoteRunner(PEERS[name], case)
        peaks[name] = {what: runner.memory(what) for what in (results.PEAK_MEMORY, results.INFERENCE_MEMORY)}
        runner.close()
    ours, dense = (peaks[name] for name in (OURS, "entmax-exact"))
    assert ours[results.PEAK_MEMORY] < 4 < 3 * 4 < dense[results.PEAK_MEMORY]  # 4 MiB: one matrix
    assert ours[results.INFERENCE_MEMORY] < 4 < dense[results.INFERENCE_MEMORY]


def test_the_goals_are_those_that_were_set():
    found = {(entry.case, goal.peer, goal.what): goal.at_most for entry in PRESETS["targets"]() for goal in entry.goals}
    base = Case(length=4096, heads=4, head_dim=64)
    for sigma, forward, both in ((1, 1.0, 0.45), (1.5, 0.8, 0.3), (3, 0.75, 0.22), (0.05, 6, 6)):
        case = replace(base, input=f"gaussian:{sigma}")
        assert found[case, "sdpa", FORWARD] == forward
        assert found[case, "sdpa", BOTH] == both
        for changes in ({"head_dim": 128}, {"length": 512}, {"length": 16384}, {"causal": False}):
            assert found[replace(case, **changes), "sdpa", BOTH] == pytest.approx(1.2 * both)
    assert found[replace(base, dtype="bf16"), "sdpa", BOTH] == 1
    assert found[base, "entmax-exact", BOTH] == 1 / 50
    assert found[replace(base, length=65536, heads=1), OURS, results.PEAK_MEMORY] == 64


def test_the_goals_for_models_are_those_that_were_set():
    entries = PRESETS["gpu-models"]()
    found = {(entry.case, goal.peer, goal.what): goal.at_most for entry in entries for goal in entry.goals}
    assert found[TRAINED_CASE, "fa3", FORWARD] == 1 and found[TRAINED_CASE, "sdpa-cudnn", BOTH] == 0.45
    assert found[SHORT_CASE, "sdpa-flash", FORWARD] == 1 and found[SHORT_CASE, "sdpa-cudnn", BOTH] == 0.9
    by_input = {}
    for (case, peer, what), goal in found.items():
        if (case.length, case.heads) == (16384, 16):
            by_input[case.input, case.head_dim, peer, what] = goal
    cudnn = {("structured:0", 64): 1.2, ("structured:0", 128): 1.1, ("gaussian:1.5", 64): 0.75}
    cudnn["gaussian:1.5", 128] = 0.75
    forward = {
        "structured:0": (2, 2.2),
        "structured:0.5": (1.15, 1.3),
        "structured:0.85": (0.7, 0.8),
        "gaussian:1.5": (1.7, 2),
    }
    expected = {(*key, "sdpa-cudnn", BOTH): goal for key, goal in cudnn.items()}
    for name, goals in forward.items():
        expected |= {(name, size, "fa3", FORWARD): goal for size, goal in zip((64, 128), goals, strict=True)}
    assert by_input == expected
    others = {(entry.case.input, entry.case.length, entry.case.causal): entry for entry in entries}
    grouped, flat = others["gaussian:1.5", 8192, True], others["flat", 8192, True]
    assert (grouped.case.heads, grouped.case.kv_heads, grouped.case.head_dim) == (32, 8, 128)
    assert grouped.goals == (Goal("sdpa-cudnn", BOTH, 0.8),) and flat.goals == (Goal("sdpa-cudnn", BOTH, 1.3),)
    assert others["gaussian:1.5", 4096, False].goals == ()
    memory = others["gaussian:1.5", 32768, True]
    assert memory.memory and not memory.timed
    assert {(goal.what, goal.at_most) for goal in memory.goals} == {
        (results.INFERENCE_MEMORY, 1.05),
        (results.PEAK_MEMORY, 0.85),
    }
    # The page shows what is measured.
    assert {entry.case for entry in entries} == set(blocks.BLOCKS[blocks.MODELS].cases)


def test_every_preset_can_be_read():
    for name in PRESETS:
        entries = entries_of([name])
        assert len({(entry.case, entry.peers) for entry in entries}) == len(entries)
        assert all(peer in PEERS for entry in entries for peer in entry.peers)


def test_from_the_command_to_the_report(tmp_path, capsys):
    file = tmp_path / "quick.jsonl"
    assert attention.main(["--quick", "--out", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        assert row["support"] > 0
        assert 0 <= row["empty_tiles"] < 1
        assert row["median"] > 0 or row["what"] in (results.PEAK_MEMORY, results.INFERENCE_MEMORY)
        assert (row["ratio"] is None) == (row["peer"] == OURS)
        assert {"date", "processor", "torch", "commit", "threads_used"} <= set(row)
    of_memory = {row["what"] for row in rows if row["unit"] == "MiB"}
    assert of_memory == {results.PEAK_MEMORY, results.INFERENCE_MEMORY}
    report.main([str(file)])
    text = capsys.readouterr().out
    assert "| reached |" in text
    assert "entmax package, dense, exact" in text
    report.main([str(file), "--plots", str(tmp_path / "plots")])
    assert (tmp_path / "plots" / "cpu-overview.png").stat().st_size > 10_000


def test_parts_that_began_in_the_same_second_stay_apart():
    row = {**Case().to_dict(), "date": "2026-01-01T00:00:00+00:00", "preset": "own", "entry": 0, "peer": OURS}
    rows = [{**row, "head_dim": size} for size in (64, 128, 64)]
    assert [(case.head_dim, len(found)) for case, found in tables._by_entry(rows)] == [(64, 2), (128, 1)]


def test_a_part_of_a_preset():
    options = attention.parse(["--preset", "targets", "--head-dims", "128"])
    assert {entry.case.head_dim for entry in attention._entries(options)} == {128}
    with pytest.raises(SystemExit, match="no such case"):
        attention.main(["--preset", "targets", "--head-dims", "32"])


def test_the_block_alone_is_replaced():
    text = "before\n<!-- bench:cpu -->\nold\n<!-- /bench:cpu -->\nafter"
    new = report.replace_block(text, "bench:cpu", "new")
    assert new == "before\n<!-- bench:cpu -->\nnew\n<!-- /bench:cpu -->\nafter"
    assert report.replace_block(new, "bench:cpu", "new") == new
    with pytest.raises(ValueError, match="bench:cuda"):
        report.replace_block(text, "bench:cuda", "new")


def test_the_page_shows_a_few_cases_of_what_was_measured():
    facts = dict(device="cpu", processor="one", cores=2, instructions="AVX2", torch="2.13.0", commit="a")
    facts |= dict(date="2026-01-02", preset="own", entry=0, support=6.73, median=12.34)
    cases = (Case(), replace(Case(), head_dim=32))
    rows = [
        {**facts, **case.to_dict(), "what": what, "peer": peer, "ratio": None if peer == OURS else ratio}
        for case in cases
        for what, ratio in ((FORWARD, 0.614), (BOTH, 0.00872))
        for peer in (OURS, "sdpa")
    ]
    table = [line for line in blocks.block(rows, "every.md").splitlines() if line.startswith("|")]
    assert table[2:] == ["| random vectors | 6.7 of 4,096 | 12.3 / 12.3 | 0.61 / 0.009 | – |"]
    with pytest.raises(ValueError, match="no case that it shows"):
        blocks.block(rows[4:], "every.md")


def model_rows(ratios: dict[tuple[Case, str, str], tuple[float, float | None]]) -> list[results.Row]:
    """Rows of a GPU by case, peer and what; each has a ratio and a goal, and ours has a time for each."""
    facts = dict(device="cuda", processor="H", torch="2", commit="a", cuda="13", driver="5", triton="3", preset="own")
    facts |= dict(date="2026-01-02", entry=0, support=6.73, median=12.34, empty_tiles=0.5, keys_of_block=0.05)
    none = dict(ratio=None, goal=None, reached=None)
    rows = []
    for (case, peer, what), (ratio, goal) in ratios.items():
        row = {**facts, **case.to_dict(), "what": what}
        rows.append({**row, "peer": OURS, **none})
        reached = None if goal is None else ratio <= goal
        rows.append({**row, "peer": peer, "ratio": ratio, "goal": goal, "reached": reached})
    return rows


def test_the_page_says_which_goals_were_reached():
    memory = next(entry.case for entry in PRESETS["gpu-models"]() if entry.memory)
    step = replace(TRAINED_CASE, batch=4)
    rows = model_rows(
        {
            (TRAINED_CASE, "fa3", FORWARD): (1.97, 1.0),
            (TRAINED_CASE, "sdpa-cudnn", FORWARD): (1.69, None),
            (TRAINED_CASE, "sdpa-cudnn", BOTH): (0.45, 0.45),
            (memory, "sdpa-flash", results.PEAK_MEMORY): (0.83, 0.85),
            (memory, "sdpa-flash", results.INFERENCE_MEMORY): (1.26, 1.05),
            (step, "sdpa-flash", results.TRAINING_STEP): (0.7, 0.75),
            (step, "sdpa-cudnn", results.TRAINING_STEP): (0.9, 0.75),
        }
    )
    text = blocks.block(rows, "every.md", blocks.MODELS)
    (line,) = [line for line in text.splitlines() if line.startswith("|")][2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:6] == ["12.3 / 12.3", "–", "1.69 / 0.45", "1.97"]
    assert cells[6] == "cuDNN, training, 0.45: reached; FlashAttention-3, forward, 1: **missed by 97 %**"
    assert "gradients included: 0.83 of FlashAttention-2's at 32,768 tokens (goal 0.85: reached)." in text
    assert "output included: 1.26 of FlashAttention-2's at 32,768 tokens (goal 1.05: **missed by 20 %**)." in text
    assert (
        "A training step of the whole trained GPT, 4 × 8,192 tokens, takes 12.3 ms, 0.70 of that with "
        "FlashAttention-2, 0.90 of that with cuDNN (goal 0.75: **missed by 20 %**)." in text
    )


def test_the_page_shows_what_models_give_a_gpu():
    shown = f"<!-- bench:{blocks.MODELS} -->\n{report.models(report.models_files())}\n<!-- /bench:{blocks.MODELS} -->"
    assert shown in report.BENCHMARKS.read_text()


def test_before_anything_was_measured_the_page_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert report.models_files() == []
    assert report.models([]).startswith("Nothing was measured yet.")
    step = tmp_path / f"20260101-0000-cuda-{results.TRAINING_STEP_PRESET}.jsonl"
    step.touch()
    assert report.models_files() == []  # not without the table
    first = tmp_path / f"20260101-0000-cuda-{blocks.MODELS}.jsonl"
    first.touch()
    assert report.models_files() == [first, step]


def test_a_training_step_is_timed_and_leaves_the_model_as_it_is(tmp_path, capsys):
    text = capture.__file__
    out = tmp_path / "rows.jsonl"
    training_step.main(["--quick", "--text", text, "--out", str(out)])
    assert "sdpa-cudnn is left out: not on cpu" in capsys.readouterr().err
    rows = results.read([out])
    assert [row["peer"] for row in rows] == [OURS, "sdpa-flash"]
    for row in rows:
        assert row["what"] == results.TRAINING_STEP and row["median"] > 0 and row["samples"] == 3
        assert (row["ratio"] is None) == (row["peer"] == OURS)
        assert row["goal"] is None  # which is that of another model
        assert (row["layers"], row["width"], row["length"]) == (2, 32, 128)
        assert 1 <= row["support"] <= 128 and 0 < row["keys_of_block"] <= 1 and 0 <= row["empty_tiles"] < 1


def test_what_a_training_step_is_of(tmp_path):
    """The model that bench.capture wrote, with the same weights for all, before and after."""
    config = GPTConfig(layers=1, heads=2, width=32, context=64)
    out = tmp_path / "some.pt"
    capture.make(out, Path(capture.__file__), config, steps=2, device=torch.device("cpu"))
    model, loaded = capture.load_model(capture.model_file(out), torch.device("cpu"))
    assert loaded == config
    tokens = capture.load_corpus(Path(capture.__file__), 64).validation_windows(2, 64)
    runners = [training_step.StepRunner(PEERS[name], model, config, tokens) for name in (OURS, "sdpa-flash")]
    assert [runner.model.blocks[0].attention.entmax for runner in runners] == [True, False]
    rows = list(training_step.bench(runners, Effort(0, fewest=3, most=3), goal=0.0))
    assert [row["reached"] for row in rows] == [None, False]
    for runner in runners:
        for name, weight in runner.model.state_dict().items():
            assert torch.equal(weight, model.state_dict()[name])
        assert any(weight.grad.abs().max() > 0 for weight in runner.model.parameters())
    saved = torch.load(out, weights_only=True)
    with torch.autocast("cpu", torch.bfloat16):
        again = capture.capture(model, capture.load_corpus(Path(capture.__file__), 64).validation_windows(1, 64)[0])
    assert torch.equal(saved["query"], again["query"].bfloat16())


def test_exponents():
    assert tables.exponent([(n, 3 * n**1.5) for n in (256, 1024, 8192)]) == pytest.approx(1.5)


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0])
@pytest.mark.parametrize("scores", solver.KINDS)
def test_solvers_reach_the_threshold(scores, alpha):
    rows = {row["method"]: row for row in solver.measure(scores, 700, alpha, rows=3)}
    assert set(rows) == {name for name in solver.METHODS if solver.offered(name, alpha)}
    for name, row in rows.items():
        assert row["failed"] == 0, name
        assert row["error"] < 1e-5, name
    assert rows["candidates"]["steps"] < rows["bisection"]["steps"]


def test_the_activation_is_timed_against_its_peers(tmp_path):
    options = ["--shapes", "16x100", "8x300", "--alphas", "1.5", "1.25", "--seconds", "0.1"]
    activation.main([*options, "--out", str(tmp_path / "rows.jsonl")])
    rows = results.read([tmp_path / "rows.jsonl"])
    cases = {(row["rows"], row["length"], row["alpha"]) for row in rows}
    assert cases == {(16, 100, 1.5), (8, 300, 1.5), (16, 100, 1.25), (8, 300, 1.25)}
    for case in cases:
        of_case = [row for row in rows if (row["rows"], row["length"], row["alpha"]) == case]
        assert {row["what"] for row in of_case} == {FORWARD, BOTH}
        assert {"adasplash", "torch softmax", "entmax"} <= {row["peer"] for row in of_case}
        assert all(row["median"] > 0 and (row["peer"] == "adasplash") == (row["ratio"] is None) for row in of_case)


@pytest.mark.backends("cuda")
def test_what_calls_take_beside_their_kernels(backend):
    small = replace(overhead.SMALL, length=64)
    assert all(x > 0 for pair in overhead.first_calls(small) for x in pair)
    assert all(x > 0 for x in overhead.host_times(OURS, small, calls=20))
    assert overhead.inference_memory(OURS, small) > 0


def test_the_heading_names_every_machine():
    row = dict(device="cpu", processor="one", cores=2, instructions="AVX2", torch="2.13.0", commit="a")
    row["date"] = "2026-01-02"
    rows = [{**row, "what": "forward"}, {**row, "what": "peak memory", "processor": "other"}]
    assert tables.heading(rows[:1]) == "one, 2 cores, AVX2, torch 2.13.0, commit a, 2026-01-02."
    assert "; some of it (peak memory): other, 2 cores" in tables.heading(rows)


def test_decoding_is_timed_against_its_peers(tmp_path):
    options = [
        "--cases",
        "2x128",
        "--heads",
        "4",
        "2",
        "--head-dim",
        "16",
        "--seconds",
        "0",
        "--inputs",
        "scores:1",
        "flat",
    ]
    decoding.main([*options, "--out", str(tmp_path / "rows.jsonl")])
    rows = results.read([tmp_path / "rows.jsonl"])
    forms = ("", ", pages", ", append and pages")
    peers = {f"adasplash{index}{form}" for index in ("", ", index") for form in forms} | {"sdpa"}
    assert {row["peer"] for row in rows} == peers and len(rows) == 2 * 2 * len(peers)
    assert all(row["median"] > 0 and (row["ratio"] is None) == row["peer"].startswith("adasplash") for row in rows)
    supports = {row["input"]: row["support"] for row in rows}
    assert 1 <= supports["scores:1"] < supports["flat"] == 128


def test_the_page_shows_decoding():
    rows = results.read(sorted(decoding.results.FOLDER.glob("*-decoding.jsonl")))
    assert f"<!-- bench:decoding -->\n{decoding.block(rows)}\n<!-- /bench:decoding -->" in report.BENCHMARKS.read_text()


def test_what_decoding_reads_is_the_same_in_pages():
    cache = decoding.Cache("cpu", 2, 128, (4, 2), 16, "fp32", "scores:1.5")
    steps = decoding.peers(cache, 1.5)
    with torch.no_grad():
        out = steps["adasplash"]()
        assert torch.equal(steps["adasplash, pages"]()[:, :, None], out)
        assert torch.equal(steps["adasplash, index"](), out)
        assert torch.equal(steps["adasplash, index, pages"]()[:, :, None], out)
        steps["adasplash, append and pages"]()
    places = cache.table.long()
    assert torch.equal(cache.key_pages[places[:, -1], -1], cache.new[0])


@pytest.mark.builds
@pytest.mark.slow
def test_sharded_sequences_are_timed_beside_one_process(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    shape = ["--lengths", 256, 128, "--heads", 4, "--kv-heads", 1, 2, "--head-dim", 16, "--seconds", 0]
    rows = tmp_path / "rows.jsonl"
    done = common.run(*torchrun, "-m", "bench.context_parallel", *shape, "--out", rows, cwd=common.ROOT)
    said = done.stderr + done.stdout
    assert "structured:0.5, N=256" in said
    assert "left out: heads of keys are 1, which cannot be dealt out" in said
    assert "left out: torch passes keys round on GPUs only" in said
    found = results.read([rows])
    kinds = {(2, BOTH), (1, BOTH), (2, WEAK_SCALING), (2, results.PEAK_MEMORY), (1, results.PEAK_MEMORY)}
    expected = {
        (length, kv_heads, peer, *kind)
        for length in (256, 128)
        for kv_heads, peer in ((1, "gather"), (2, "gather"), (2, "exchange"))
        for kind in kinds | ({(2, DIFFERENCE)} if length == 128 else set())
    }
    names = ("length", "kv_heads", "peer", "processes", "what")
    assert {tuple(row[name] for name in names) for row in found} == expected
    assert all(row["median"] >= 0 and row["goal"] is None for row in found)
    assert all(row["median"] < 1e-5 for row in found if row["what"] == DIFFERENCE)
    table = scaling.table_of_two(found).splitlines()[2:]
    assert len(table) == 2 + 6 and all(line.count("|") == table[0].count("|") for line in table)


def test_what_of_sharded_sequences_is_measured():
    options = context_parallel.options_of(["--device", "cuda", "--only", "131072", "gather", "32/8"])
    ((case, peer),) = context_parallel.cases_of(options)
    assert (case.length, case.heads, case.kv_heads, peer) == (131_072, 32, 8, "gather")


def test_costs_of_many_gpus():
    """Bytes by hand for 8 GPUs and for 16, and the page has what the program computes."""
    keys = 2**20 * 8 * 256 * 2
    assert scaling.gather(8).forward == keys * 7 / 8
    assert scaling.exchange(8).forward == 2**20 * 40 * 256 * 2 * 7 / 64 and scaling.exchange(16) is None
    assert scaling.ring(8).received == 1.5 * scaling.gather(8).received
    assert scaling.both(8) is None
    assert scaling.both(16).between == keys / 8 / 2
    assert scaling.both(16).exchanged == 2**20 / 16 * 40 * 256 * 2 * 7 / 8
    for gpus in scaling.GPUS:
        for cost in filter(None, (scaling.gather(gpus), scaling.both(gpus))):
            low, high = (scaling.efficiency(cost, gpus, hides) for hides in (False, True))
            assert 0 < low <= high < 1
    assert scaling.table() in scaling.PAGE.read_text() and scaling.two_gpus() in scaling.PAGE.read_text()


def test_pages_that_other_processes_would_ask_for():
    """Against a dense mask: chunks of queries by process, pages of the others' keys."""
    case = Case(input="gaussian:2", heads=4, kv_heads=2, length=256, head_dim=8)
    inputs = make_inputs(case)
    found = support_pages.weighed(case, inputs)
    weights = attention_weights(*inputs, case.alpha, case.causal).to_dense().view(4, 256, 256) > 0
    whole = weights.view(2, 2, 256, 256).any(1).view(2, support_pages.CHUNKS, -1, 256).any(2)
    assert torch.equal(found[0], whole)
    # Two processes: the first has chunks 0 and 3 of 4, and of the keys between them asks for those that they weigh.
    mine = weights.view(2, 2, 4, 64, 256)[:, :, [0, 3]].any(3).any(2).any(1)[:, 64:192]
    assert support_pages.shares(found, 2, 1)[0] == pytest.approx(mine.double().mean().item())
    assert support_pages.shares(found, 2, 16)[0] == pytest.approx(mine.view(2, 8, 16).any(-1).double().mean().item())


def test_inputs_of_grouped_heads():
    """As many heads of keys as asked for, whose topics are those of their group of queries."""
    case = Case(input="structured:0.9", heads=4, kv_heads=2, length=1024, head_dim=32)
    inputs = make_inputs(case)
    assert [tuple(x.shape[1:]) for x in inputs] == [(4, 1024, 32), (2, 1024, 32), (2, 1024, 32)]
    assert empty_tiles(case, inputs) == pytest.approx(0.9, abs=0.05)
