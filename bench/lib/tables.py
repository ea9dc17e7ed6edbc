"""Markdown tables from rows of result files."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from bench.lib.case import BACKWARD, BOTH, FORWARD, Case
from bench.lib.inputs import is_captured
from bench.lib.results import PEAK_MEMORY, Row, case_of
from bench.peers import OURS, PEERS

Table = list[list[str]]  # the first row is the head


def markdown(table: Table, left: int = 1) -> str:
    """The first `left` columns stand on the left, the others on the right."""
    head, *rows = table
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def heading(rows: Sequence[Row]) -> str:
    """What was measured where, in one sentence. What other machines or days measured is named with them."""
    measured: dict[str, list[Row]] = {}
    for row in rows:
        measured.setdefault(_where(row), []).append(row)
    first, *others = measured
    return "; ".join([first, *(f"some of it ({_which(measured[where])}): {where}" for where in others)]) + "."


def _which(rows: Sequence[Row]) -> str:
    """What some rows measured: if it is time, of which peers, at which head sizes, and at which length if it is one."""
    if all(row["what"] not in (FORWARD, BACKWARD, BOTH) for row in rows):
        return ", ".join(sorted({row["what"] for row in rows}))
    sizes: dict[tuple[int, ...], list[str]] = {}
    for peer in dict.fromkeys(row["peer"] for row in rows if row["peer"] != OURS):
        found = tuple(sorted({row["head_dim"] for row in rows if row["peer"] == peer}))
        sizes.setdefault(found, []).append(PEERS[peer].label)
    named = [f"{', '.join(peers)} at D = {' and '.join(map(str, found))}" for found, peers in sizes.items()]
    lengths = {row["length"] for row in rows}
    return "; ".join(named) + (f"; N = {lengths.pop():,}" if len(lengths) == 1 else "")


def _where(row: Row) -> str:
    extra = [f"torch {row['torch']}"]
    if row["device"] == "cuda":
        extra += [f"CUDA {row['cuda']}", f"driver {row['driver']}", f"Triton {row['triton']}"]
    else:
        extra = [f"{row['cores']} cores", row["instructions"], *extra]
    return f"{row['processor']}, {', '.join(extra)}, commit {row['commit']}, {row['date'][:10]}"


def _by_entry(rows: Iterable[Row]) -> list[tuple[Case, list[Row]]]:
    """The rows that were measured together. A case may come several times, with other peers; runs on several GPUs may
    have begun in the same second."""
    entries: dict[tuple, list[Row]] = {}
    for row in rows:
        entries.setdefault((case_of(row), row["date"], row["preset"], row["entry"]), []).append(row)
    return [(case, of_entry) for (case, *_), of_entry in entries.items()]


def _differences(case: Case, base: Case) -> str:
    """The fields in which a case differs from another, for people."""
    names: dict[str, Callable] = {
        "input": input_name,
        "batch": lambda x: f"B = {x}",
        "heads": lambda x: f"{x} head{'s' * (x > 1)}",
        "kv_heads": lambda x: f"{x or 'as many'} of keys",
        "length": lambda x: f"N = {x:,}",
        "head_dim": lambda x: f"D = {x}",
        "dtype": str,
        "alpha": lambda x: f"α = {x:g}",
        "causal": lambda x: "causal" if x else "not causal",
        "threads": lambda x: "all threads" if not x else f"{x} thread{'s' * (x > 1)}",
    }
    different = [name for name in names if name != "input" and getattr(case, name) != getattr(base, name)]
    return ", ".join(names[name](getattr(case, name)) for name in ("input", *different))


def input_name(text: str) -> str:
    kind, _, value = text.partition(":")
    if kind == "gaussian":
        return f"σ = {value}"
    return f"structured {float(value):.0%} empty" if kind == "structured" else kind


def number(value: float) -> str:
    """Three digits, or all of them before the point."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def ratio_text(row: Row) -> str:
    return f"{number(row['ratio'])} ({number(row['ratio_low'])} – {number(row['ratio_high'])})"


def base_case(rows: Iterable[Row]) -> Case:
    """The setting that most cases share, field by field."""
    cases = list(dict.fromkeys(case for case, _ in _by_entry(rows)))
    names = Case.__dataclass_fields__
    return Case(**{name: max(values := [getattr(c, name) for c in cases], key=values.count) for name in names})


def goals(rows: Sequence[Row]) -> str:
    """Every goal of the rows, and whether it was reached."""
    head = ["case", "keys a query", "what", "against", "ours", "theirs", "ours / theirs (quartiles)", "goal", ""]
    table: Table = [head]
    base = base_case(rows)
    for case, of_case in _by_entry(rows):
        ours = {row["what"]: row for row in of_case if row["peer"] == OURS}
        for row in of_case:
            if row["goal"] is None:
                continue
            mark = "reached" if row["reached"] else "**missed**"
            own, theirs = (f"{number(r['median'])} {r['unit']}" for r in (ours[row["what"]], row))
            ratio = ratio_text(row) if row["ratio"] is not None else ""
            goal = f"≤ {row['goal']:g}" + (" MiB" if row["peer"] == OURS else "")
            against = "" if row["peer"] == OURS else PEERS[row["peer"]].label
            theirs = "" if row["peer"] == OURS else theirs
            name = _differences(case, base)
            table.append([name, number(row["support"]), row["what"], against, own, theirs, ratio, goal, mark])
    return markdown(table, left=4) if len(table) > 1 else ""


def summary(rows: Sequence[Row], peer: str) -> str:
    """ours / peer for forward and for forward + backward, at a glance. On the CPU of the cases with a goal.

    A line for each input and type (on a GPU head size too), a column for each other setting; goals beside the first.
    """
    base = base_case(rows)
    of_line = ("input", "dtype", "head_dim") if base.device == "cuda" else ("input", "dtype")
    cells: dict[tuple, dict[str, str]] = {}  # of lines: of columns
    supports: dict[tuple, float] = {}
    orders: dict[tuple, tuple] = {}  # structured inputs by their share of empty tiles, others after them
    goals_of: dict[tuple, str] = {}
    for case, of_case in _by_entry(rows):
        found = {row["what"]: row for row in of_case if row["peer"] == peer and row["what"] in (FORWARD, BOTH)}
        if not found or (case.device == "cpu" and all(row["goal"] is None for row in found.values())):
            continue
        if is_captured(case.input):  # of sizes of its own
            continue
        line = tuple(getattr(case, name) for name in of_line)
        column = _differences(replace(case, **{name: getattr(base, name) for name in of_line}), base)
        column = column.partition(", ")[2]
        kind, _, value = case.input.partition(":")
        orders[line] = (case.head_dim, float(value)) if kind == "structured" else (case.head_dim, math.inf)
        cells.setdefault(line, {})[column] = " / ".join(_marked(found[what]) for what in (FORWARD, BOTH))
        if not column:
            supports[line] = of_case[0]["support"]
            goals_of[line] = " / ".join(_goal(found[what]) for what in (FORWARD, BOTH))
    columns = list(dict.fromkeys(column for line in cells.values() for column in line))
    first, *others = sorted(columns, key=bool)  # the base case, which differs in nothing, first
    table: Table = [["input", "keys a query", first or f"N = {base.length:,}", "goal", *others]]
    for line, found in sorted(cells.items(), key=lambda item: orders[item[0]]):
        name = _differences(replace(base, **dict(zip(of_line, line, strict=True))), base)
        support = number(supports[line]) if line in supports else ""
        start = [name, support, found.get(first, ""), goals_of.get(line, "")]
        table.append(start + [found.get(column, "") for column in others])
    return markdown(table)


def _marked(row: Row) -> str:
    text = number(row["ratio"])
    return f"**{text}**" if row["goal"] is not None and not row["reached"] else text


def _goal(row: Row) -> str:
    return "–" if row["goal"] is None else f"{row['goal']:g}"


def times(rows: Sequence[Row]) -> str:
    """Every case and peer: medians in ms with ratios, and peak memory."""
    inputs = ["case", "keys a query", "keys of 64 queries", "empty tiles"]
    table: Table = [[*inputs, "of", "forward", "backward", "forward + backward", "peak MiB"]]
    base = base_case(rows)
    for case, of_case in _by_entry(rows):
        peers = list(dict.fromkeys(row["peer"] for row in of_case))
        for peer in peers:
            found = {row["what"]: row for row in of_case if row["peer"] == peer}
            first = peer == peers[0]
            name, support, empty = _differences(case, base), of_case[0]["support"], of_case[0]["empty_tiles"]
            shared = of_case[0].get("keys_of_block")
            keys = "" if shared is None else f"{shared:.1%}"
            cells = [name, number(support), keys, f"{empty:.0%}"] if first else ["", "", "", ""]
            cells.append(PEERS[peer].label)
            for what in (FORWARD, BACKWARD, BOTH):
                row = found.get(what)
                text = "" if row is None else f"{number(row['median'])} ms"
                cells.append(text + (f" ({number(row['ratio'])})" if row and row["ratio"] is not None else ""))
            row = found.get(PEAK_MEMORY)
            cells.append("" if row is None else number(row["median"]))
            table.append(cells)
    return markdown(table, left=1)


def series(rows: Sequence[Row], what: str) -> dict[tuple[Case, str], list[tuple[int, float]]]:
    """Medians against the length, of every peer and of every setting that was run at three lengths or more."""
    found: dict[tuple[Case, str], dict[int, float]] = {}
    for row in rows:
        if row["what"] == what:
            setting = Case(**{**case_of(row).to_dict(), "length": 0})
            found.setdefault((setting, row["peer"]), {})[row["length"]] = row["median"]
    return {key: sorted(points.items()) for key, points in found.items() if len(points) >= 3}


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Slope of the line through (log N, log value) by least squares, without values that are not above 0."""
    logs = [(math.log(n), math.log(value)) for n, value in points if value > 0]
    if len(logs) < 2:
        return math.nan
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def growth(rows: Sequence[Row], shortest: int = 1024) -> str:
    """Exponents of N fitted to time and peak memory, from `shortest` on."""
    table: Table = [["case", "of", "what", "lengths", "grows as"]]
    base = base_case(rows)
    for what in (FORWARD, BOTH, PEAK_MEMORY):
        for (setting, peer), points in series(rows, what).items():
            points = [point for point in points if point[0] >= shortest]
            if len(points) >= 2:
                name = _differences(Case(**{**setting.to_dict(), "length": base.length}), base)
                lengths = f"{points[0][0]:,} – {points[-1][0]:,}"
                table.append([name, PEERS[peer].label, what, lengths, f"N^{exponent(points):.2f}"])
    return markdown(table, left=4) if len(table) > 1 else ""
