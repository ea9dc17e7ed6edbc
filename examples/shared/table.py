"""Results as a table: a line for each model, attention and setting, with means over seeds."""

import json
from collections.abc import Sequence
from statistics import mean, stdev

from shared.results import Result

NOTHING = "–"


def table(rows: Sequence[Result], metrics: dict[str, str]) -> str:
    """Markdown, in the order of the rows.

    Args:
        metrics: which of the rows' metrics are shown, by the format of each, such as {"accuracy": ".1%"}. Where there
            are several seeds, what they differ by (the standard deviation) stands behind. A column that no row has
            anything for is left out.
    """
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for row in rows:
        groups.setdefault((row.model, row.attention, json.dumps(row.setting)), []).append(row)
    columns = {
        name.replace("_", " "): [_cell([row.metrics.get(name) for row in group], form) for group in groups.values()]
        for name, form in metrics.items()
    }
    columns["ms a step"] = [_cell([_milliseconds(row) for row in group], ".1f") for group in groups.values()]
    columns["keys a query"] = [_cell([row.keys_a_query for row in group], ",.1f") for group in groups.values()]
    columns = {name: cells for name, cells in columns.items() if any(cell != NOTHING for cell in cells)}
    columns["seeds"] = [str(len(group)) for group in groups.values()]
    lines = [["model", "attention", *columns], ["---", "---", *["---:"] * len(columns)]]
    lines += [[*which[:2], *cells] for which, *cells in zip(groups, *columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _milliseconds(row: Result) -> float | None:
    return None if row.seconds_a_step is None else 1000 * row.seconds_a_step


def _cell(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return NOTHING
    spread = f" ± {stdev(known):{form}}" if len(known) > 1 else ""
    return f"{mean(known):{form}}{spread}"
