"""`make gpu` with the GPU replaced: by processes that fail and overrun, and by the CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import measure  # noqa: E402
import step as step_benchmark  # noqa: E402

BENCHMARK = """
import json, sys, time
sys.path.insert(0, "benchmarks")
from results import write_json
candidates = {
    "(a) SFTTrainer": {"seconds": [1.0, 2.0, 4.0, 2.5], "peak_bytes": 3 * 2**20},
    "(c) WMSS, frozen weak": {"seconds": [1.28, 2.4, 5.6, 3.5], "peak_bytes": 2**20},
}
environment = {"hardware": "a GPU", "driver": "1.2", "versions": {"torch": "2.11"}, "date": "2026-01-01"}
result = {"benchmark": "step", "command": "step.py", "environment": environment, "candidates": candidates}
write_json(sys.argv[sys.argv.index("--json") + 1], result)
"""
# A child in a session of its own, which ending the process or its group would not reach
OVERRUN = """
import subprocess, sys, time
child = [sys.executable, "-c", "import time; time.sleep(300)", sys.argv[1]]
subprocess.Popen(child, start_new_session=True)
print("waiting", flush=True)
time.sleep(300)
"""


def read(folder):
    return json.loads((folder / "results.json").read_text())


def tables(*files):
    command = [sys.executable, "benchmarks/tables.py", *map(str, files)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def cells(output, name):
    """The cells of the first line of a table that begins with `name`."""
    line = next(line for line in output.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def expected(values, digits=2):
    low, median, high = np.percentile(values, [25, 50, 75])
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def check_table(output, candidates):
    """Against NumPy, from the times of every round."""
    baseline = np.array(candidates["(a) SFTTrainer"]["seconds"])
    for name, candidate in candidates.items():
        seconds = np.array(candidate["seconds"])
        memory = f"{candidate['peak_bytes'] / 2**20:.0f}"
        assert cells(output, name)[:2] == [expected(1000 * seconds, 0), memory]
        assert cells(output, name)[-1] == expected(seconds / baseline)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of four steps: one fails, one does what it should, two overrun, the last of them with a result."""
    folder = tmp_path_factory.mktemp("out")
    marker = f"child of {folder}"
    report = gpu.Report(folder)
    start = time.monotonic()
    failing = gpu.Step("fails", ["-c", "raise ValueError('broken')"], 10)
    report.run([failing, gpu.Step("step", ["-c", BENCHMARK], 20, is_benchmark=True)], start + 30)
    report.run([gpu.Step("overruns", ["-c", OVERRUN, marker], 2)], time.monotonic() + 2)
    assert [step["name"] for step in read(folder)["steps"]] == ["fails", "step", "overruns"]  # written at once
    assert not any(marker.encode() in path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline"))
    slow = gpu.Step("step, checkpointing", ["-c", f"{BENCHMARK}time.sleep(300)"], 2, is_benchmark=True)
    report.run([slow], time.monotonic() + 2)
    assert time.monotonic() - start < 20
    return report


def test_goes_on_after_a_failure_and_keeps_what_was_measured(report):
    result = read(report.folder)
    steps = {step["name"]: step for step in result["steps"]}
    assert list(steps) == ["fails", "step", "overruns", "step, checkpointing"]
    assert [step["returncode"] for step in steps.values()] == [1, 0, None, None]
    assert [step["timed_out"] for step in steps.values()] == [False, False, True, True]
    assert steps["fails"]["limit"] == pytest.approx(10, abs=1)
    assert steps["step"]["limit"] > 25  # its own 20, and what the step before has left
    assert steps["fails"]["output"][-1] == "ValueError: broken"
    assert steps["overruns"]["output"] == ["waiting"]
    assert steps["step, checkpointing"]["result"]["candidates"] == steps["step"]["result"]["candidates"]
    met = {(target["step"], target["label"]): target["met"] for target in result["targets"]}
    label = "time of a step, x SFTTrainer"  # 1.34 in the median
    assert met == dict.fromkeys(met) | {("step", label): True, ("step, checkpointing", label): False}
    assert sorted(path.name for path in report.folder.iterdir()) == ["log.txt", "results.json"]


def test_what_failed_is_printed_first(report):
    lines = [line for line in gpu.summary(report).splitlines() if line]
    assert lines[0] == "3 of 4 steps failed."
    assert lines[1].startswith("fails: FAILED after")
    assert "broken" in "".join(lines[: lines.index("Targets:")])
    assert lines.index("overruns: FAILED: no end after 2 s") < lines.index("Targets:")
    assert "    MISSED step, checkpointing: time of a step, x SFTTrainer: 1.34 (at most 1.27)" in lines


def test_tables_of_the_results_and_the_range_over_machines(report, tmp_path):
    path = report.folder / "results.json"
    other = read(report.folder)["steps"][1]["result"]
    output = tables(path)
    check_table(output, other["candidates"])
    assert "a GPU, driver 1.2; torch 2.11; 2026-01-01" in output
    other["candidates"]["(c) WMSS, frozen weak"]["seconds"] = [2.0, 4.0, 8.0, 5.0]
    (tmp_path / "other.json").write_text(json.dumps(other))
    ranges = tables(path, tmp_path / "other.json").split("Range over 3 runs of `step.py`")[1]
    assert cells(ranges, "(c) WMSS, frozen weak") == ["1.34 to 2.00"]


class Steps:
    """Stands in for a trainer: steps that do nothing, or fail at the third."""

    def __init__(self, fails):
        self.fails = fails

    def add_callback(self, callback):
        self.callback = callback

    def train(self):
        for number in range(5):
            self.callback.on_step_begin(None, None, None)
            if self.fails and number == 2:
                raise MemoryError("too large")
            self.callback.on_step_end(None, None, None)


def test_a_candidate_that_fails_does_not_stop_the_others(capfd):
    def fails(*_):
        raise MemoryError("too large")

    rounds = []
    results = measure.interleaved({"fails": fails, "runs": lambda: None}, 3, "cpu", report=rounds.append)
    assert len(rounds) == 5  # warming up and the memory come first
    builders = {"builds": fails, "fails": lambda: Steps(True), "runs": lambda: Steps(False)}
    turns = step_benchmark.take_turns(builders, 3, "cpu")
    for found in (results, turns):
        assert len(found["runs"].seconds) == 3
        assert found["runs"].error is None
    assert {results["fails"].error, turns["builds"].error, turns["fails"].error} == {"MemoryError: too large"}
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize("free_gib", [0, 22, 30, 45, 79, 140])
def test_the_plan_fits_the_budget(free_gib):
    steps = gpu.plan("cuda", free_gib * 2**30)
    assert [step.name for step in steps] == ["tests", "loss", "step", "step, checkpointing", "scoring", "engine"]
    assert sum(step.limit for step in steps) < gpu.BUDGET - 10
    assert {target.step for target in gpu.TARGETS} <= {step.name for step in steps}
    assert all((ROOT / word).exists() for step in steps for word in step.command if word.endswith(".py"))
    assert ("qwen3-4b" in steps[1].command) == (free_gib > 24)


def test_the_benchmarks_know_the_options_of_the_plan():
    for step in gpu.plan("cuda", 80 * 2**30) + gpu.plan("cpu"):
        if step.is_benchmark:
            source = (ROOT / step.command[0]).read_text()
            assert all(f'"{option}"' in source for option in step.command if option.startswith("--")), step


@pytest.mark.ci
def test_on_a_cpu(tmp_path):
    """The whole command, with real benchmarks of tiny models, without the package being installed."""
    environment = os.environ | {"OUT": str(tmp_path / "out")}
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    result = read(tmp_path / "out")
    assert run.returncode == 0, run.stdout
    assert [(step["name"], step["returncode"]) for step in result["steps"]] == [
        (name, 0) for name in ("environment", "tests", "loss", "step", "step, checkpointing", "scoring", "engine")
    ]
    by_name = {step["name"]: step.get("result") for step in result["steps"]}
    assert all(target["value"] > 0 for target in result["targets"])
    output = tables(tmp_path / "out" / "results.json")
    check_table(output[output.index("`python benchmarks/step.py") :], by_name["step"]["candidates"])
    assert "| fsdp2 | WMSS, frozen weak model |" in output
    assert "| score_entropy," in output
