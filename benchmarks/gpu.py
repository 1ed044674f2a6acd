"""
All that this project claims of a GPU, measured in at most 9 minutes.

    OUT=gpu_results make gpu                        # or: python benchmarks/gpu.py --out gpu_results
    python benchmarks/tables.py gpu_results/results.json
    python benchmarks/gpu.py --device cpu           # the same road with tiny models, to try it out

The tests that need a GPU, then the benchmarks at the presets that fit its free memory, then a launch of an engine:
each in a process of its own with a time limit. Nothing needs to be installed but PyTorch and the dependencies of this
package, importable by this Python; what is not there (pytest, say) makes its step fail, and the next one runs.

The folder gets `results.json`, rewritten after each step, and `log.txt` with all output. While a benchmark runs, what
it has measured so far is in `running.json` beside them; of a benchmark that is ended at its limit that much is kept.
"""

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from results import description, ratios, write_json

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 530  # seconds in all; ending a step may take some more
GIB = 2**30


@dataclass
class Step:
    """
    One process.

    Args:
        name (`str`):
            Name in the results.
        command (`list[str]`):
            Arguments of Python, run in the root of the repository.
        limit (`int`):
            Seconds that it has. What the steps before it leave of theirs is added.
        is_benchmark (`bool`, *optional*, defaults to `False`):
            Whether it takes `--json` and writes figures.
    """

    name: str
    command: list[str]
    limit: int
    is_benchmark: bool = False


class Target(NamedTuple):
    """A ratio of two candidates' medians within a round, or of their peak memory."""

    step: str
    label: str
    candidate: str
    baseline: str
    quantity: str
    at_most: float | None = None
    at_least: float | None = None


FUSED, PLAIN = "(c) WMSS, frozen weak", "(d) WMSS, full logits, plain autograd"
TARGETS = [
    Target("loss", "time of the fused loss, x TRL's head", FUSED, "(a) TRL's fused SFT head", "seconds", 1.15),
    Target("loss", "the same loss on full logits, x its time", PLAIN, FUSED, "seconds", at_least=1.5),
    Target("loss", "the same loss on full logits, x its memory", PLAIN, FUSED, "peak_bytes", at_least=3.0),
    Target("step", "time of a step, x SFTTrainer", FUSED, "(a) SFTTrainer", "seconds", 1.35),
    Target("step, checkpointing", "time of a step, x SFTTrainer", FUSED, "(a) SFTTrainer", "seconds", 1.27),
]


def plan(device: str, free_bytes: int = 0) -> list[Step]:
    """The steps, at presets that fit into the free memory of a GPU; the limits of all add up to no more than
    `BUDGET`."""
    # Only files that have such tests, so that nothing else must be importable; launches come last
    files = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    files.sort(key=lambda path: (len(path.parts), path))
    pytest = ["-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "gpu and not slow"]
    tests = Step("tests", [*pytest, *map(str, files)], 210)

    def benchmark(name: str, script: str, options: str, limit: int) -> Step:
        return Step(name, [f"benchmarks/{script}.py", "--device", device, *options.split()], limit, is_benchmark=True)

    if device == "cpu":
        step = "--preset tiny --tokens 32 --batch_size 2 --rounds 2 --only a c"
        engine = "--processes 1 --tokens 16 --batch_size 2 --rounds 1 --steps 1 --warmup 1"
        return [
            tests,
            benchmark("loss", "loss", "--tokens 64 --rounds 2", 50),
            benchmark("step", "step", step, 60),
            benchmark("step, checkpointing", "step", f"{step} --checkpointing", 60),
            benchmark("scoring", "scoring", "--preset tiny --examples 16 --max_length 32 --rounds 2", 60),
            benchmark("engine", "engines", f"{engine} --engines fsdp2 --variants sft frozen", 90),
        ]

    def largest(*presets: tuple[int, str]) -> str:
        """The first that fits: needed memory in GiB (estimated) and options."""
        return next((options for needed, options in presets if free_bytes >= needed * GIB), presets[-1][1])

    small = "--preset qwen3-0.6b --tokens 1024"
    step = largest(
        (52, "--batch_size 4 --only a a2 c"), (32, "--batch_size 4 --only a c"), (0, "--batch_size 1 --only a c")
    )
    loss = largest((24, "--preset qwen3-4b"), (0, "--preset qwen3-0.6b"))
    scoring = largest((40, "--preset qwen3-4b"), (0, "--preset qwen3-0.6b"))
    engine = f"{small} {largest((32, '--batch_size 4'), (0, '--batch_size 1'))} --processes 1"
    return [
        tests,
        benchmark("loss", "loss", f"{loss} --tokens 4096 --dtype bfloat16", 45),
        benchmark("step", "step", f"{small} --bf16 {step}", 60),
        benchmark("step, checkpointing", "step", f"{small} --bf16 {step} --checkpointing", 50),
        benchmark("scoring", "scoring", f"{scoring} --examples 64 --max_length 2048 --rounds 3 --bf16", 55),
        benchmark(
            "engine",
            "engines",
            f"{engine} --engines fsdp2 --variants sft sft-full frozen --rounds 2 --steps 3 --timeout 80",
            90,
        ),
    ]


@dataclass
class Report:
    """
    What has been found so far.

    Args:
        folder (`Path`):
            Where it is written.
        steps (`list[dict[str, Any]]`, *optional*):
            The record of each step.
    """

    folder: Path
    steps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, Any]:
        return next((step.get("result", {}) for step in self.steps if step["name"] == "environment"), {})

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [step for step in self.steps if step["returncode"] != 0]

    def run(self, steps: list[Step], deadline: float) -> None:
        """Run steps one after the other, whatever becomes of each, until a time of the monotonic clock."""
        for number, step in enumerate(steps):
            reserved = sum(later.limit for later in steps[number + 1 :])
            self.steps.append(run_step(step, self.folder, max(1.0, deadline - time.monotonic() - reserved)))
            content = {"environment": self.environment, "steps": self.steps, "targets": targets(self.steps)}
            write_json(self.folder / "results.json", content)


def run_step(step: Step, folder: Path, limit: float) -> dict[str, Any]:
    """Run a step and end all that it has started."""
    running, log = folder / "running.json", folder / "log.txt"
    running.unlink(missing_ok=True)
    command = [*step.command, *(["--json", str(running.resolve())] if step.is_benchmark else [])]
    shown = shlex.join(["python", *step.command])
    print(f"{step.name}: {shown}", flush=True)
    tag = f"WMSS_GPU_STEP={uuid.uuid4()}"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n=== {step.name}: {shown}\n".encode())
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment | dict([tag.split("=")]),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            returncode = process.wait(limit)
        except subprocess.TimeoutExpired:
            returncode = None
        finally:
            end_all(tag, process)
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").splitlines()
    record = {
        "name": step.name,
        "command": shown,
        "limit": round(limit, 1),
        "seconds": round(time.monotonic() - start, 1),
        "returncode": returncode,
        "timed_out": returncode is None,
        "passed_tests": sum(" PASSED " in line for line in lines),
        "output": lines[-60:],
    }
    if step.is_benchmark and running.exists():
        record["result"] = json.loads(running.read_text())
        running.unlink()
    print(f"    {outcome(record)}", flush=True)
    return record


def end_all(tag: str, process: subprocess.Popen) -> None:
    """End every process that has inherited the tag: those that a launcher starts are in sessions of their own."""
    deadline = time.monotonic() + 5
    while alive := tagged(tag):
        for pid in alive:
            try:
                os.kill(pid, signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.2)
        if time.monotonic() > deadline + 5:  # in the driver, maybe
            break
    process.kill()
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:
        print(f"    process {process.pid} does not end", flush=True)


def tagged(tag: str) -> list[int]:
    """Living processes with this variable in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if tag.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def targets(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target with its value, and whether it is met; `None` where it was not measured."""
    candidates = {step["name"]: step.get("result", {}).get("candidates", {}) for step in steps}
    found = []
    for target in TARGETS:
        measured = candidates.get(target.step, {})
        pair = [measured.get(name, {}) for name in (target.candidate, target.baseline)]
        value = met = None
        if all(one.get(target.quantity) for one in pair):
            values = [one[target.quantity] for one in pair]
            value = statistics.median(ratios(*values)) if target.quantity == "seconds" else values[0] / values[1]
            met = value <= target.at_most if target.at_most else value >= target.at_least
        found.append({**target._asdict(), "value": value, "met": met})
    return found


def outcome(record: dict[str, Any]) -> str:
    """A step in a line."""
    if record["timed_out"]:
        passed = f", {record['passed_tests']} tests had passed" if record["passed_tests"] else ""
        return f"FAILED: no end after {record['limit']:.0f} s{passed}"
    if record["returncode"]:
        return f"FAILED after {record['seconds']:.0f} s, exit code {record['returncode']}"
    summary = record["output"][-1].strip("= ") if "pytest" in record["command"] and record["output"] else "done"
    return f"{summary} ({record['seconds']:.0f} s)"


def summary(report: Report) -> str:
    """What failed, then the targets, then the rest."""
    failed = report.failed
    lines = ["", f"{len(failed)} of {len(report.steps)} steps failed." if failed else "No step failed."]
    for step in failed:
        lines += ["", f"{step['name']}: {outcome(step)}", *(f"    {line}" for line in step["output"][-12:])]
    lines += ["", "Targets:"]
    for target in targets(report.steps):
        bound = f"at most {target['at_most']}" if target["at_most"] else f"at least {target['at_least']}"
        value = "not measured" if target["value"] is None else f"{target['value']:.2f}"
        met = {None: "-", True: "met", False: "MISSED"}[target["met"]]
        lines.append(f"    {met:6} {target['step']}: {target['label']}: {value} ({bound})")
    lines += ["", "Steps:", *(f"    {step['name']}: {outcome(step)}" for step in report.steps)]
    if report.environment:
        lines += ["", description(report.environment)]
    results = report.folder / "results.json"
    return "\n".join([*lines, "", f"Figures: {results}; tables: python benchmarks/tables.py {results}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu_results"), help="Folder.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    # One GPU: with more of them in a process, Trainer would split batches
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through `run_step`, which ends what it has started
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "log.txt").unlink(missing_ok=True)
    report, deadline = Report(args.out), time.monotonic() + BUDGET
    probe = Step("environment", ["benchmarks/measure.py", "--device", args.device], 60, is_benchmark=True)
    report.run([probe], time.monotonic() + probe.limit)
    report.run(plan(args.device, report.environment.get("free_bytes", 0)), deadline)
    print(summary(report))
    sys.exit(bool(report.failed))


if __name__ == "__main__":
    main()
