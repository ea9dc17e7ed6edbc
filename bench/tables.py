"""Markdown tables from rows of result files."""

import math
from collections.abc import Callable, Iterable, Sequence

from bench.case import BACKWARD, BOTH, FORWARD, Case
from bench.peers import OURS, PEERS
from bench.results import PEAK_MEMORY, Row, case_of

Table = list[list[str]]  # the first row is the head


def markdown(table: Table, left: int = 1) -> str:
    """The first `left` columns stand on the left, the others on the right."""
    head, *rows = table
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def heading(rows: Sequence[Row]) -> str:
    """What was measured where, in one sentence."""
    row = rows[0]
    extra = [f"torch {row['torch']}"]
    if row["device"] == "cuda":
        extra += [f"CUDA {row['cuda']}", f"driver {row['driver']}", f"Triton {row['triton']}"]
    else:
        extra = [f"{row['cores']} cores", row["instructions"], *extra]
    return f"{row['processor']}, {', '.join(extra)}, commit {row['commit']}, {row['date'][:10]}."


def _by_entry(rows: Iterable[Row]) -> list[tuple[Case, list[Row]]]:
    """The rows that were measured together. A case may come several times, with other peers."""
    entries: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        entries.setdefault((row["date"], row["entry"]), []).append(row)
    return [(case_of(of_entry[0]), of_entry) for of_entry in entries.values()]


def _differences(case: Case, base: Case) -> str:
    """The fields in which a case differs from another, for people."""
    names: dict[str, Callable] = {
        "input": input_name,
        "batch": lambda x: f"B = {x}",
        "heads": lambda x: f"{x} head{'s' * (x > 1)}",
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
    return f"structured, {float(value):.0%} empty" if kind == "structured" else "captured"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def ratio_text(row: Row) -> str:
    return f"{_number(row['ratio'])} ({_number(row['ratio_low'])} – {_number(row['ratio_high'])})"


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
            own, theirs = (f"{_number(r['median'])} {r['unit']}" for r in (ours[row["what"]], row))
            ratio = ratio_text(row) if row["ratio"] is not None else ""
            goal = f"≤ {row['goal']:g}" + (" MiB" if row["peer"] == OURS else "")
            against = "" if row["peer"] == OURS else PEERS[row["peer"]].label
            theirs = "" if row["peer"] == OURS else theirs
            name = _differences(case, base)
            table.append([name, f"{row['support']:.3g}", row["what"], against, own, theirs, ratio, goal, mark])
    return markdown(table, left=4) if len(table) > 1 else ""


def summary(rows: Sequence[Row], peer: str) -> str:
    """ours / peer for forward and forward + backward, one line a case with a goal: the README's table."""
    table: Table = [["case", "keys a query", "forward", "goal", "forward + backward", "goal"]]
    base = base_case(rows)
    for case, of_case in _by_entry(rows):
        found = {row["what"]: row for row in of_case if row["peer"] == peer and row["what"] in (FORWARD, BOTH)}
        if all(row["goal"] is None for row in found.values()):
            continue
        cells = [_differences(case, base), f"{of_case[0]['support']:.3g}"]
        for what in (FORWARD, BOTH):
            row = found[what]
            missed = row["goal"] is not None and not row["reached"]
            text = _number(row["ratio"])
            cells += [f"**{text}**" if missed else text, "" if row["goal"] is None else f"≤ {row['goal']:g}"]
        table.append(cells)
    return markdown(table)


def times(rows: Sequence[Row]) -> str:
    """Every case and peer: medians in ms with ratios, and peak memory."""
    head = ["case", "keys a query", "empty tiles", "of", "forward", "backward", "forward + backward", "peak MiB"]
    table: Table = [head]
    base = base_case(rows)
    for case, of_case in _by_entry(rows):
        peers = list(dict.fromkeys(row["peer"] for row in of_case))
        for peer in peers:
            found = {row["what"]: row for row in of_case if row["peer"] == peer}
            first = peer == peers[0]
            name, support, empty = _differences(case, base), of_case[0]["support"], of_case[0]["empty_tiles"]
            cells = [name, f"{support:.3g}", f"{empty:.0%}"] if first else ["", "", ""]
            cells.append(PEERS[peer].label)
            for what in (FORWARD, BACKWARD, BOTH):
                row = found.get(what)
                text = "" if row is None else f"{_number(row['median'])} ms"
                cells.append(text + (f" ({_number(row['ratio'])})" if row and row["ratio"] is not None else ""))
            row = found.get(PEAK_MEMORY)
            cells.append("" if row is None else _number(row["median"]))
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
