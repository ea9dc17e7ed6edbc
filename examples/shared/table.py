"""Results as a table: a line for each model and attention, with means over seeds."""

from statistics import mean, stdev

from shared.results import Result


def table(rows: list[Result], metrics: dict[str, str]) -> str:
    """Markdown, in the order of the rows.

    Args:
        metrics: which of the rows' metrics are shown, by the format of each, such as {"accuracy": ".1%"}. Where there
            are several seeds, what they differ by (the standard deviation) stands behind.
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for row in rows:
        groups.setdefault((row.model, row.attention), []).append(row)
    lines = [
        "| model | attention | " + " | ".join(metrics) + " | ms a step | keys a query | seeds |",
        "| --- | --- |" + " ---: |" * (len(metrics) + 3),
    ]
    for (model, attention), group in groups.items():
        cells = [_cell([row.metrics[name] for row in group if name in row.metrics], f) for name, f in metrics.items()]
        cells.append(_cell([row.seconds_a_step * 1000 for row in group if row.seconds_a_step is not None], ".1f"))
        cells.append(_cell([row.keys_a_query for row in group if row.keys_a_query is not None], ".1f"))
        lines.append(f"| {model} | {attention} | " + " | ".join(cells) + f" | {len(group)} |")
    return "\n".join(lines)


def _cell(values: list[float], form: str) -> str:
    if not values:
        return "–"
    spread = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{spread}"
