"""
Every pair of options, through all three phases, against an independent loop.

A few rows in which every value occurs are run by `make test`, all of them by `make test-ci`.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import mutations
import pytest
import torch
from factors import DEFAULTS, FACTORS, all_pairs, pairs_of, read_refusals, read_rows, short_name
from generate import DOCS, MARK, markdown_table, refusal_of, refused, smallest_subset
from judge import judge, write_score_file
from rows import run_row
from world import World

FOLDER = Path(__file__).parent
RECIPE = FOLDER.parents[1] / "recipes" / "accelerate" / "ddp.yaml"
ROWS, REFUSALS = read_rows(), read_refusals()
SUBSET = smallest_subset(ROWS)


def marks_of(number):
    marks = [] if number in SUBSET else [pytest.mark.ci]
    return [*marks, pytest.mark.launched] if ROWS[number]["processes"] == "2" else marks


PARAMETERS = [pytest.param(i, id=f"{i}-{short_name(row)}", marks=marks_of(i)) for i, row in enumerate(ROWS)]


def build(number, folder):
    world = World.build(ROWS[number], folder)
    if ROWS[number]["curriculum"] == "score-file":
        write_score_file(world)
    return world


@pytest.fixture(scope="session")
def launched(request, tmp_path_factory):
    """The selected rows of two processes, run in one launch."""
    numbers = [
        item.callspec.params["number"]
        for item in request.session.items
        if item.name.startswith("test_row[") and ROWS[item.callspec.params["number"]]["processes"] == "2"
    ]
    folder = tmp_path_factory.mktemp("launched")
    worlds = {number: build(number, folder / str(number)) for number in numbers}
    command = ["-m", "accelerate.commands.launch", "--config_file", str(RECIPE), "--num_processes", "2"]
    command += ["--main_process_port", "0", "--mixed_precision", "no", str(FOLDER / "rows.py")]
    rows = json.dumps({number: ROWS[number] for number in numbers})
    process = subprocess.run(
        [sys.executable, *command, rows, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    return worlds, process.stderr


@pytest.mark.parametrize("number", PARAMETERS)
def test_row(number, request, tmp_path):
    if ROWS[number]["processes"] == "1":
        world = build(number, tmp_path)
        judge(world, [run_row(ROWS[number], tmp_path)])
        return
    worlds, errors = request.getfixturevalue("launched")
    world = worlds[number]
    paths = [world.folder / f"record.{rank}.pt" for rank in range(2)]
    assert all(path.exists() for path in paths), errors[-5000:]
    judge(world, [torch.load(path, weights_only=False) for path in paths])


def test_every_pair_of_values_is_run_or_refused():
    run = set().union(*map(pairs_of, ROWS))
    missing = [pair for pair in all_pairs() if pair not in run and not refused(dict(pair), REFUSALS)]
    assert not missing
    assert not [row for row in ROWS if refused(row, REFUSALS)]


def test_the_short_suite_has_every_value():
    values = {(factor, ROWS[i][factor]) for i in SUBSET for factor in FACTORS}
    assert values == {(factor, value) for factor, names in FACTORS.items() for value in names}


def test_the_judge_shares_no_code_with_the_package():
    source = (FOLDER / "reference.py").read_text()
    nodes = list(ast.walk(ast.parse(source)))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert "torch" in imported
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names | {"numpy", "torch", "transformers"}
    assert len(source.splitlines()) < 250


def test_the_table_of_refusals_is_that_of_the_suite():
    assert DOCS.read_text().split(MARK)[1].strip() == markdown_table(REFUSALS)


@pytest.mark.ci
def test_refusals_come_at_construction(tmp_path):
    for options, message in REFUSALS.items():
        assert refusal_of(DEFAULTS | dict(options), tmp_path) == message


@pytest.mark.ci
@pytest.mark.parametrize("name", mutations.MUTATIONS)
def test_mutation_turns_a_row_red(name, tmp_path):
    number = mutations.read_rows_that_see_them()[name]
    world = build(number, tmp_path)
    with mutations.MUTATIONS[name](), pytest.raises((AssertionError, ValueError, RuntimeError)):
        judge(world, [run_row(ROWS[number], tmp_path)])
