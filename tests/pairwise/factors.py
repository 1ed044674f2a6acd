"""
The options of a run as factors with their values, which pairs of values are refused, and the rows that are run.

`rows.json` and `refusals.json` are made by `generate.py`. Every pair of values is in a row or is refused.
"""

import json
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path

FACTORS: dict[str, list[str]] = {
    "architecture": ["qwen3-tied", "llama-untied", "gemma3-softcap", "qwen3-moe", "granite-moe", "gpt-neox-biases"],
    "adapter": ["none", "lora", "lora-biases", "dora", "trained"],
    "weak": ["m0", "folder", "object", "smaller", "adapter", "auto", "4-bit"],
    "train_weak": ["no", "yes"],
    "weak_refresh": ["never", "epoch"],
    "weak_cache": ["none", "hidden"],
    "curriculum": ["off", "released", "v1", "v2", "replacement", "score-file"],
    "layout": ["padded", "padding-free", "packed"],
    "sampling": ["random", "sequential", "group-by-length"],
    "accumulation": ["1", "2"],
    "checkpointing": ["no", "yes"],
    "precision": ["fp32", "bf16"],
    "data": ["prompt-completion", "text", "messages"],
    "collator": ["trl", "subclass", "own"],
    "schedule": ["constant", "linear", "crossover", "lambda-1"],
    "anchor": ["0", "0.3"],
    "loss_type": ["nll", "dft"],
    "head": ["fused", "full-logits"],
    "workers": ["0", "1"],
    "evaluation": ["none", "load-best"],
    "stopped": ["no", "resumed", "resumed-in-other-batches"],
    "length": ["epochs", "max-steps"],
    "processes": ["1", "2"],
}
# What a pair is tried with. The first value of a factor, unless that needs another value than its own first one.
DEFAULTS = {factor: values[0] for factor, values in FACTORS.items()} | {"curriculum": "released"}

Row = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]

_FOLDER = Path(__file__).parent


def all_pairs() -> Iterator[Pair]:
    """Every pair of values of two factors."""
    for (first, first_values), (second, second_values) in combinations(FACTORS.items(), 2):
        for one, other in product(first_values, second_values):
            yield (first, one), (second, other)


def pairs_of(row: Row) -> set[Pair]:
    return set(combinations(((factor, row[factor]) for factor in FACTORS), 2))


def read_refusals() -> dict[frozenset[tuple[str, str]], str]:
    """The refused combinations of two values or more, with what each says."""
    entries = json.loads((_FOLDER / "refusals.json").read_text())
    return {frozenset(entry["options"].items()): entry["message"] for entry in entries}


def write_refusals(refusals: dict[frozenset[tuple[str, str]], str]) -> None:
    order = {value: number for number, value in enumerate((f, v) for f, values in FACTORS.items() for v in values)}
    entries = [(sorted(options, key=order.get), message) for options, message in refusals.items()]
    entries.sort(key=lambda entry: [order[option] for option in entry[0]])
    text = json.dumps([{"options": dict(options), "message": message} for options, message in entries], indent=1)
    (_FOLDER / "refusals.json").write_text(text + "\n")


def read_rows() -> list[Row]:
    return json.loads((_FOLDER / "rows.json").read_text())


def write_rows(rows: list[Row]) -> None:
    (_FOLDER / "rows.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def short_name(row: Row) -> str:
    """The values in which a row differs from the defaults."""
    return ",".join(value for factor, value in row.items() if value != DEFAULTS[factor]) or "defaults"
