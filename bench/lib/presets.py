"""Named lists of what to run.

targets      the table of goals for the CPU, in one run; each goal is marked reached or missed
lengths      time and memory against the length, for the plot
sweep        every setting varied around the base case, on the CPU (hours)
gpu-targets  the table of goals for a GPU
gpu-lengths  the same inputs from 2,048 to 131,072 tokens, with heads enough to fill the GPU
gpu-shares   every share of empty tiles, and other alphas
gpu-models   what models give a GPU, with goals: trained heads, flat ones as at initialisation, short, grouped and not
             causal, beside FlashAttention-3 and cuDNN; peak memory
gpu-peers    FlexAttention and the adasplash package at other lengths (which compile and tune for minutes a case)
quick        tiny, for continuous integration
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from bench.lib.case import BOTH, FORWARD, Case
from bench.lib.results import INFERENCE_MEMORY, PEAK_MEMORY
from bench.lib.timing import Effort
from bench.peers import OURS

USUAL = Effort()


@dataclass(frozen=True)
class Goal:
    """ours / peer's is to be `at_most`; for our own peak memory, that many MiB."""

    peer: str
    what: str
    at_most: float


@dataclass(frozen=True)
class Entry:
    """One case, whom to run it with besides ourselves, and what is hoped for."""

    case: Case
    peers: tuple[str, ...] = ("sdpa",)
    goals: tuple[Goal, ...] = ()
    effort: Effort = USUAL
    memory: bool = False
    timed: bool = True


SIGMA_GOALS = {1.0: (1.0, 0.45), 1.5: (0.80, 0.30), 3.0: (0.75, 0.22), 0.05: (6.0, 6.0)}
BASE = Case()
SLOW = Effort(seconds=20, fewest=3)


def _sigma_entry(sigma: float, slack: float = 1.0, effort: Effort = USUAL, **changes) -> Entry:
    forward, both = (round(goal * slack, 3) for goal in SIGMA_GOALS[sigma])
    goals = (Goal("sdpa", FORWARD, forward), Goal("sdpa", BOTH, both))
    return Entry(replace(BASE, input=f"gaussian:{sigma:g}", **changes), goals=goals, effort=effort)


def targets() -> list[Entry]:
    entries = [_sigma_entry(sigma) for sigma in SIGMA_GOALS]
    entries.append(Entry(replace(BASE, dtype="bf16"), goals=(Goal("sdpa", BOTH, 1.0),)))
    for changes in ({"head_dim": 128}, {"length": 512}, {"causal": False}):
        entries += [_sigma_entry(sigma, 1.2, Effort(seconds=8), **changes) for sigma in SIGMA_GOALS]
    entries += [_sigma_entry(sigma, 1.2, SLOW, length=16384) for sigma in SIGMA_GOALS]
    dense = Effort(seconds=30, fewest=3)
    entries.append(Entry(BASE, ("entmax-exact",), (Goal("entmax-exact", BOTH, 0.02),), dense))
    long = replace(BASE, length=65536, heads=1)
    entries.append(Entry(long, (), (Goal(OURS, PEAK_MEMORY, 64),), memory=True, timed=False))
    return entries


def lengths() -> list[Entry]:
    entries = []
    for length in (256, 512, 1024, 2048, 4096, 8192, 16384):
        peers = ("sdpa", "entmax-exact") if length <= 2048 else ("sdpa",)
        effort = Effort(seconds=5, fewest=3)
        entries.append(Entry(replace(BASE, length=length), peers, effort=effort, memory=True))
    return entries


def sweep() -> list[Entry]:
    """One setting at a time, around the base case."""
    variations: list[dict] = [{"input": f"gaussian:{sigma:g}"} for sigma in (0.05, 0.5, 1, 1.5, 2, 3)]
    variations += [{"input": f"structured:{share:g}"} for share in (0, 0.25, 0.5, 0.8, 0.9, 0.95)]
    variations += [{"length": 2**k} for k in range(8, 15)]
    variations += [{"length": 2**k, "heads": 1} for k in (14, 15, 16)]
    variations += [{"head_dim": 128}, {"heads": 1}, {"heads": 16}, {"batch": 4}, {"causal": False}]
    variations += [{"threads": 1}, {"threads": 1, "length": 1024}, {"alpha": 1.25}, {"alpha": 2.0}]
    variations += [{"dtype": "bf16"}, {"dtype": "bf16", "head_dim": 128}, {"dtype": "bf16", "alpha": 1.25}]
    return [Entry(replace(BASE, **changes), ("sdpa",), effort=SLOW, memory=True) for changes in variations]


GPU_BASE = Case(device="cuda", dtype="bf16", heads=16, length=16384)
TRAINED_CASE = replace(GPU_BASE, input="trained", batch=8, heads=8, length=8192)
GPU_PEERS = ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flex", "pypi-v2")


def gpu_targets() -> list[Entry]:
    goals = {
        "structured:0.5": (
            Goal("pypi-v2", FORWARD, 0.6),
            Goal("sdpa-flash", FORWARD, 1.0),
            Goal("sdpa-flash", BOTH, 0.75),
            Goal("sdpa-flash", PEAK_MEMORY, 1.1),
        ),
        "structured:0.8": (Goal("pypi-v2", FORWARD, 0.33), Goal("sdpa-flash", FORWARD, 1.0)),
        "structured:0.85": (
            Goal("sdpa-flash", FORWARD, 1.0),
            Goal("sdpa-flash", BOTH, 0.33),
            Goal("sdpa-cudnn", BOTH, 0.60),
        ),
        "gaussian:1.5": (Goal("sdpa-flash", BOTH, 1.5), Goal("sdpa-flash", PEAK_MEMORY, 1.1)),
    }
    trained = (Goal("sdpa-cudnn", BOTH, 0.45),)
    return [Entry(TRAINED_CASE, GPU_PEERS, trained)] + [
        Entry(
            replace(GPU_BASE, input=name, head_dim=head_dim),
            GPU_PEERS,
            wanted,
            memory=any(goal.what == PEAK_MEMORY for goal in wanted),
        )
        for name, wanted in goals.items()
        for head_dim in (64, 128)
    ]


FLAT_CASE = replace(GPU_BASE, input="flat", batch=2, length=8192)
GROUPED_CASE = replace(GPU_BASE, heads=32, kv_heads=8, head_dim=128, length=8192)
BOTH_WAYS_CASE = replace(GPU_BASE, batch=8, length=4096, causal=False)
SHORT_CASE = replace(GPU_BASE, input="gaussian:1", batch=64, heads=12, length=512, causal=False)
MEMORY_CASE = replace(GPU_BASE, length=32768)


def _of_models(
    case: Case, flash2: float | None = None, flash3: float | None = None, cudnn: float | None = None
) -> Entry:
    """Goals: of the forward pass beside FlashAttention-2 and 3, of forward and backward beside cuDNN."""
    wanted = (("sdpa-flash", FORWARD, flash2), ("fa3", FORWARD, flash3), ("sdpa-cudnn", BOTH, cudnn))
    goals = tuple(Goal(*goal) for goal in wanted if goal[2] is not None)
    return Entry(case, ("sdpa-flash", "sdpa-cudnn", "fa3"), goals, Effort(seconds=2.0))


def gpu_models() -> list[Entry]:
    by_head_dim = {  # flash3 and cudnn at 64, and at 128
        "structured:0": ((2.0, 1.2), (2.2, 1.1)),
        "structured:0.5": ((1.15, None), (1.3, None)),
        "structured:0.85": ((0.7, None), (0.8, None)),
        "gaussian:1.5": ((1.7, 0.75), (2.0, 0.75)),
    }
    memory = (Goal("sdpa-flash", INFERENCE_MEMORY, 1.05), Goal("sdpa-flash", PEAK_MEMORY, 0.85))
    return [
        _of_models(TRAINED_CASE, flash3=1.0, cudnn=0.45),
        *(
            _of_models(replace(GPU_BASE, input=name, head_dim=head_dim), flash3=flash3, cudnn=cudnn)
            for name, goals in by_head_dim.items()
            for head_dim, (flash3, cudnn) in zip((64, 128), goals, strict=True)
        ),
        _of_models(GROUPED_CASE, cudnn=0.8),
        _of_models(SHORT_CASE, flash2=1.0, cudnn=0.9),
        _of_models(FLAT_CASE, cudnn=1.3),
        _of_models(BOTH_WAYS_CASE),
        Entry(MEMORY_CASE, ("sdpa-flash",), memory, memory=True, timed=False),
    ]


def _full(k: int, **changes) -> Case:
    """2^k tokens, and heads enough to fill the GPU."""
    return replace(GPU_BASE, length=2**k, heads=max(GPU_BASE.heads, 2 ** (18 - k)), **changes)


def gpu_lengths() -> list[Entry]:
    return [
        Entry(
            _full(k, input=name, head_dim=head_dim),
            ("sdpa-flash", "sdpa-cudnn"),
            effort=Effort(seconds=2.0),
            memory=k == 17,
        )
        for head_dim in (64, 128)
        for k in (11, 12, 13, 15, 16, 17)  # 14 is among the goals
        for name in ("gaussian:1.5", "structured:0.5", "structured:0.85")
    ]


def gpu_peers() -> list[Entry]:
    peers = ("flex", "pypi-v2", "pypi-v1")
    return [
        Entry(
            replace(GPU_BASE, length=2**k, heads=2 ** (18 - k), input=name, head_dim=head_dim),
            peers,
            effort=Effort(seconds=2.0),
        )
        for head_dim in (64, 128)
        for k in (11, 12, 13, 16)
        for name in ("structured:0.5", "structured:0.8", "gaussian:1.5")
    ]


def gpu_shares() -> list[Entry]:
    variations: list[dict] = [{"input": f"structured:{share:g}"} for share in (0, 0.25, 0.6, 0.7, 0.9, 0.95)]
    variations += [{"alpha": alpha, "input": "structured:0.8"} for alpha in (1.25, 2.0)]
    peers = ("sdpa-flash", "sdpa-cudnn")
    return [Entry(replace(GPU_BASE, **changes), peers, effort=Effort(seconds=2.0)) for changes in variations]


def quick() -> list[Entry]:
    effort = Effort(seconds=0.1, fewest=3, most=3)
    dense = ("sdpa", "entmax-exact", "entmax-bisect")
    structured = replace(BASE, length=512, heads=1, input="structured:0.5", dtype="bf16", alpha=2.0)
    flat = replace(BASE, length=200, heads=1, input="gaussian:0.05", alpha=1.25, causal=False)
    return [
        Entry(replace(BASE, length=256, heads=2), goals=(Goal("sdpa", BOTH, 1e9),), effort=effort, memory=True),
        Entry(structured, dense, effort=effort),
        Entry(flat, dense, effort=effort),
    ]


PRESETS: dict[str, Callable[[], list[Entry]]] = {
    "targets": targets,
    "lengths": lengths,
    "sweep": sweep,
    "gpu-targets": gpu_targets,
    "gpu-models": gpu_models,
    "gpu-lengths": gpu_lengths,
    "gpu-shares": gpu_shares,
    "gpu-peers": gpu_peers,
    "quick": quick,
}


def goals_of(case: Case) -> tuple[Goal, ...]:
    """What the tables of goals ask of a case, whoever lists it."""
    entries = entries_of(["targets"] if case.device == "cpu" else ["gpu-targets", "gpu-models"])
    return tuple(dict.fromkeys(goal for entry in entries if entry.case == case for goal in entry.goals))


def entries_of(names: list[str]) -> list[Entry]:
    """The presets' entries, one after another, those of equal case and peers merged."""
    merged: dict[tuple, Entry] = {}
    for entry in (entry for name in names for entry in PRESETS[name]()):
        same = merged.get((entry.case, entry.peers))
        if same is not None:
            goals = (*same.goals, *(goal for goal in entry.goals if goal not in same.goals))
            entry = replace(same, goals=goals, memory=same.memory or entry.memory, timed=same.timed or entry.timed)
        merged[entry.case, entry.peers] = entry
    return list(merged.values())
