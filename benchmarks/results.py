"""What the benchmarks write, and how it is printed. Needs nothing but Python."""

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass
class Measurement:
    """
    Args:
        seconds (`list[float]`):
            Wall-clock time of each round.
        peak_bytes (`int`, *optional*, defaults to `0`):
            Largest memory allocated during a call, beyond what was there before and beyond gradients that every
            candidate must allocate; 0 where it was not measured.
        error (`str`, *optional*):
            Why the candidate failed.
    """

    seconds: list[float]
    peak_bytes: int = 0
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def write_json(path: str | Path, content: Any) -> None:
    """Write a file that is never there in part, whenever the process is killed."""
    part = Path(f"{path}.part")
    part.write_text(json.dumps(content, indent=1))
    os.replace(part, path)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def with_quartiles(values: Sequence[float], digits: int = 2) -> str:
    if not values:
        return "-"
    low, median, high = (f"{value:.{digits}f}" for value in quartiles(values))
    return f"{median} ({low}-{high})"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ratios within a round. A run that was ended in a round has not got all of its last one."""
    return [a / b for a, b in zip(ours, theirs, strict=False)]


def description(environment: dict[str, Any]) -> str:
    """One line that says what figures were measured on."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    driver = f", driver {environment['driver']}" if environment.get("driver") else ""
    return f"{environment['hardware']}{driver}; {versions}; {environment['date']}"


def baselines(result: dict[str, Any]) -> list[str]:
    """The candidates that the others are compared with."""
    names = list(result["candidates"])
    return names[:2] if result["benchmark"] == "scoring" else [name for name in names if name.startswith("(a")]


def tables(result: dict[str, Any]) -> str:
    """The tables of the file that a benchmark writes."""
    if result["benchmark"] == "engines":
        from engines import tables as engine_tables

        return engine_tables(result["engines"])
    return throughput_table(result) if result["benchmark"] == "scoring" else time_table(result)


def with_heading(result: dict[str, Any]) -> str:
    return f"`{result['command']}`\n\n{description(result['environment'])}\n\n{tables(result)}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def time_table(result: dict[str, Any]) -> str:
    """Median time with its quartiles, peak memory, and the median ratio to each baseline within a round."""
    candidates, rows = result["candidates"], []
    for name, candidate in candidates.items():
        if "error" in candidate:
            rows.append([name, f"failed: {one_line(candidate['error'])}", "", *([""] * len(baselines(result)))])
            continue
        seconds, peak = candidate["seconds"], candidate["peak_bytes"]
        rows.append(
            [
                name,
                with_quartiles([1000 * x for x in seconds], digits=0),
                f"{peak / 2**20:.0f}" if peak else "not measured",
                *(with_quartiles(ratios(seconds, candidates[other]["seconds"])) for other in baselines(result)),
            ]
        )
    columns = ["candidate", "time (quartiles), ms", "peak memory, MB", *(f"x {name}" for name in baselines(result))]
    return table(columns, rows)


def throughput_table(result: dict[str, Any]) -> str:
    """Median throughput, and its median ratio to that of both baselines within a round."""
    candidates, rows = result["candidates"], []
    for name, candidate in candidates.items():
        seconds = candidate["seconds"]
        speed = f"{result['tokens'] / statistics.median(seconds):.0f}" if seconds else "-"
        compared = [with_quartiles(ratios(candidates[other]["seconds"], seconds)) for other in baselines(result)]
        rows.append([name, speed, *compared])
    padding = f"{result['tokens']:,} tokens; padding adds {result['padding']:.1%}."
    columns = ["candidate", "tokens per second", "throughput, x backbone", "x model with logits"]
    return f"{padding}\n\n{table(columns, rows)}"


def range_table(results: Sequence[dict[str, Any]]) -> str:
    """The lowest and the highest median ratio of each candidate over several runs of one command."""
    rows = []
    for name in results[0]["candidates"]:
        cells = [name]
        for baseline in baselines(results[0]):
            pairs = [[r["candidates"].get(key, {}).get("seconds") for key in (name, baseline)] for r in results]
            if results[0]["benchmark"] == "scoring":
                pairs = [pair[::-1] for pair in pairs]
            medians = [statistics.median(ratios(*pair)) for pair in pairs if all(pair)]
            cells.append(f"{min(medians):.2f} to {max(medians):.2f}" if medians else "-")
        rows.append(cells)
    machines = "\n".join(f"- {description(r['environment'])}" for r in results)
    columns = ["candidate", *(f"x {name}" for name in baselines(results[0]))]
    return f"{machines}\n\n{table(columns, rows)}"


def one_line(error: str) -> str:
    """An error that fits the cell of a table."""
    return error.replace("|", "/").replace("\n", " ")[:300]
