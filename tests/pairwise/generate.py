"""
Makes what the pairwise suite is run from: `python tests/pairwise/generate.py`.

1. Tries every pair of values, the rest at its defaults: what the trainer refuses at construction is a refusal.
2. Generates rows in which every other pair meets at least once. A row that is refused has three or more options that
   do not go together: they become a refusal too, and the rows are generated again.
3. Writes the table of refusals into `docs/compatibility.md`.

`--rows` begins with the refusals that are known.
"""

import logging
import random
import sys
import tempfile
import warnings
from pathlib import Path

import datasets
import transformers
from allpairspy import AllPairs
from factors import (
    DEFAULTS,
    FACTORS,
    Row,
    all_pairs,
    pairs_of,
    read_refusals,
    write_refusals,
    write_rows,
)
from judge import write_score_file
from rows import head_that_cannot_be_reached, make_trainer
from tqdm import tqdm
from world import World

DOCS = Path(__file__).parents[2] / "docs" / "compatibility.md"
MARK = "<!-- the table below is written by tests/pairwise/generate.py -->"
# Not known to a trainer that is only constructed, in one process
_OF_A_RUN = {"stopped", "length", "processes"}
Refusals = dict[frozenset[tuple[str, str]], str]


def refusal_of(row: Row, folder: Path) -> str | None:
    """What the trainer says to a row at construction, if it refuses it."""
    place = folder / f"{row['architecture']}-{row['train_weak']}-{row['data']}-{row['layout']}"
    world = World(row, place)
    if not place.exists():
        World.build(row, place)
        write_score_file(world)
    with head_that_cannot_be_reached(row["head"] == "full-logits"):
        try:
            make_trainer(world)
        except ValueError as error:
            return str(error).replace(str(place), "FOLDER")
    return None


def find_refusals(folder: Path) -> Refusals:
    """What is refused of the pairs, the rest at its defaults."""
    rows: dict[frozenset[tuple[str, str]], Row] = {}
    for pair in all_pairs():
        options = frozenset((factor, value) for factor, value in pair if DEFAULTS[factor] != value)
        if options and not any(factor in _OF_A_RUN for factor, _ in options):
            rows[options] = DEFAULTS | dict(options)
    refusals: Refusals = {}
    for options in tqdm(sorted(rows, key=len), desc="Constructing trainers", unit=" pairs"):
        if not any(known < options for known in refusals):
            message = refusal_of(rows[options], folder)
            if message is not None:
                refusals |= with_defaults_that_matter(options, message, folder)
    return refusals


def with_defaults_that_matter(options: frozenset[tuple[str, str]], message: str, folder: Path) -> Refusals:
    """A refusal, or those of which it is one where another value of a third factor makes the options possible."""
    for factor in FACTORS.keys() - dict(options).keys() - _OF_A_RUN:
        row = DEFAULTS | dict(options)
        others = {
            value: refusal_of(row | {factor: value}, folder) for value in FACTORS[factor] if value != row[factor]
        }
        if None in others.values():
            refused = {value: said for value, said in others.items() if said is not None} | {row[factor]: message}
            return {options | {(factor, value)}: said for value, said in refused.items()}
    return {options: message}


def smallest_refusal(row: Row, folder: Path) -> Refusals:
    """The options of a row that is refused without which it is not; empty if it is not refused."""
    if refusal_of(row, folder) is None:
        return {}
    for factor in FACTORS:
        without = row | {factor: DEFAULTS[factor]}
        if refusal_of(without, folder) is not None:
            row = without
    options = frozenset((factor, value) for factor, value in row.items() if value != DEFAULTS[factor])
    return with_defaults_that_matter(options, refusal_of(row, folder), folder)


def refused(row: Row, refusals: Refusals) -> bool:
    options = set(row.items())
    return any(known <= options for known in refusals)


def generate_rows(refusals: Refusals) -> list[Row]:
    factors = list(FACTORS)

    def allowed(values: list[str]) -> bool:
        return not refused(dict(zip(factors, values, strict=False)), refusals)

    rows = [
        dict(zip(factors, values, strict=True)) for values in AllPairs(list(FACTORS.values()), filter_func=allowed)
    ]
    covered = set().union(*map(pairs_of, rows))
    generator = random.Random(0)
    for pair in all_pairs():  # what the generator has missed because of the filter
        if pair in covered or refused(dict(pair), refusals):
            continue
        for _ in range(2000):
            row = {factor: generator.choice(values) for factor, values in FACTORS.items()} | dict(pair)
            if not refused(row, refusals):
                rows.append(row)
                covered |= pairs_of(row)
                break
        else:
            raise ValueError(f"No row has {pair} without a refused combination.")
    return without_needless_rows(rows)


def without_needless_rows(rows: list[Row]) -> list[Row]:
    """Drop rows whose pairs are all in others."""
    counts: dict = {}
    for row in rows:
        for pair in pairs_of(row):
            counts[pair] = counts.get(pair, 0) + 1
    kept = []
    for row in rows:
        if all(counts[pair] > 1 for pair in pairs_of(row)):
            for pair in pairs_of(row):
                counts[pair] -= 1
        else:
            kept.append(row)
    return kept


def smallest_subset(rows: list[Row]) -> list[int]:
    """A few rows in which every value occurs, those of one process first."""
    missing = {(factor, value) for factor, values in FACTORS.items() for value in values}
    chosen: list[int] = []
    while missing:
        gains = [len(missing & set(row.items())) for row in rows]
        best = max(range(len(rows)), key=lambda i: (gains[i], rows[i]["processes"] == "1"))
        chosen.append(best)
        missing -= set(rows[best].items())
    return sorted(chosen)


def markdown_table(refusals: Refusals) -> str:
    order = {value: number for number, value in enumerate((f, v) for f, values in FACTORS.items() for v in values)}
    entries = [(sorted(options, key=order.get), message) for options, message in refusals.items()]
    entries.sort(key=lambda entry: [order[option] for option in entry[0]])
    merged = [({factor: [value] for factor, value in options}, message) for options, message in entries]
    for factor in reversed(FACTORS):  # a line for all values of it with the same message and the same other options
        groups: dict[str, tuple[dict[str, list[str]], str]] = {}
        for options, message in merged:
            key = repr((message, [item if item[0] != factor else factor for item in options.items()]))
            first, _ = groups.setdefault(key, (options, message))
            if first is not options and factor in options:
                first[factor] += options[factor]
        merged = list(groups.values())
    lines = ["| options | what the error says |", "|---|---|"]
    for options, message in merged:
        names = ", ".join(f"{factor} = {' or '.join(values)}" for factor, values in options.items())
        lines.append(f"| {names} | {message.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def without_larger_ones(refusals: Refusals) -> Refusals:
    return {options: said for options, said in refusals.items() if not any(known < options for known in refusals)}


def write_table(refusals: Refusals) -> None:
    text = DOCS.read_text()
    DOCS.write_text(f"{text[: text.index(MARK)]}{MARK}\n\n{markdown_table(refusals)}\n")


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        refusals = read_refusals() if "--rows" in sys.argv else find_refusals(folder)
        while True:  # until no row has three options that are refused together
            rows = generate_rows(refusals)
            found: Refusals = {}
            for row in tqdm(rows, desc="Constructing trainers", unit=" rows"):
                if not refused(row, found):
                    found |= smallest_refusal(row, folder)
            refusals = without_larger_ones(refusals | found)
            write_refusals(refusals)
            if not found:
                break
    write_rows(rows)
    write_table(refusals)
    refused_pairs = sum(refused(dict(pair), refusals) for pair in all_pairs())
    print(f"{sum(1 for _ in all_pairs())} pairs, {refused_pairs} of them refused; {len(rows)} rows")


if __name__ == "__main__":
    main()
