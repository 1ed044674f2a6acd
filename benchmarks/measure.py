"""
Interleaved timing and peak memory, shared by the benchmarks.

    python benchmarks/measure.py --device cuda      # what figures would be measured on, and its free memory
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from results import Measurement, with_heading, write_json
from torch import nn

if TYPE_CHECKING:
    from peft import LoraConfig

PACKAGES = ("transformers", "trl", "accelerate", "peft", "triton")


@cache
def environment(device: str) -> dict[str, Any]:
    """What figures are measured on."""
    versions = {"torch": torch.__version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    common = {"versions": versions, "date": time.strftime("%Y-%m-%d")}
    if not device.startswith("cuda"):
        return {"hardware": f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads", **common}
    return {"hardware": torch.cuda.get_device_name(), "driver": driver_version(), **common}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def save(args: argparse.Namespace, candidates: dict[str, Measurement], **more: Any) -> dict[str, Any]:
    """Write what a benchmark has measured so far to `args.json`, if that is given, and return it."""
    script = Path(sys.argv[0])
    command = [word for word, before in zip(sys.argv[1:], sys.argv, strict=False) if "--json" not in (word, before)]
    result = {
        "benchmark": script.stem,
        "command": shlex.join(["python", f"benchmarks/{script.name}", *command]),
        "environment": more.pop("environment", None) or environment(args.device),
        "arguments": vars(args),
        **more,
        "candidates": {name: measurement.as_dict() for name, measurement in candidates.items()},
    }
    if args.json:
        write_json(args.json, result)
    return result


def finish(result: dict[str, Any]) -> None:
    """Print the table of a benchmark, and end with an error if a candidate has failed."""
    print(with_heading(result))
    failed = [name for name, candidate in result["candidates"].items() if "error" in candidate]
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}; the tracebacks are above.")


def earlier_adapter(model: nn.Module, config: "LoraConfig") -> str:
    """Folder of an adapter for the base `model`, as the weak model of a joint run that begins with its mixed loss."""
    from peft import get_peft_model

    folder = tempfile.mkdtemp()
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def failure(error: BaseException) -> str:
    """Print the traceback of an error that the other candidates outlive, and return it as a line."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def interleaved(
    candidates: dict[str, Callable[[], None]],
    rounds: int,
    device: str,
    gradient_bytes: int = 0,
    report: Callable[[dict[str, Measurement]], Any] = lambda results: None,
) -> dict[str, Measurement]:
    """
    Run every candidate once per round, after one round for warming up and one for the memory. A candidate that fails
    is left out of the following rounds.

    Args:
        candidates (`dict[str, Callable[[], None]]`):
            What to run, by name.
        rounds (`int`):
            Number of timed rounds.
        device (`str`):
            Where the candidates run.
        gradient_bytes (`int`, *optional*, defaults to `0`):
            Memory of the gradients, which every candidate must allocate, to be left out of its peak.
        report (`Callable`, *optional*):
            Is handed the results after each round.
    """
    results = {name: Measurement([]) for name in candidates}

    def warm_up(name: str) -> None:
        candidates[name]()

    def memory(name: str) -> None:
        results[name].peak_bytes = peak_memory(candidates[name], device) - gradient_bytes

    def timed(name: str) -> None:
        synchronize(device)
        start = time.perf_counter()
        candidates[name]()
        synchronize(device)
        results[name].seconds.append(time.perf_counter() - start)

    for measure in (warm_up, memory, *[timed] * rounds):
        for name, result in results.items():
            if result.error is None:
                try:
                    measure(name)
                except Exception as error:
                    result.error = failure(error)
        report(results)
    return results


class PeakMemory:
    """
    Context that measures the most memory allocated in it beyond what was there before, in `bytes`. On a CPU it sees
    what the thread that opened it allocates, and slows it down.

    Args:
        device (`str`):
            Where the memory is.
    """

    def __init__(self, device: str):
        self.on_gpu = device.startswith("cuda")
        self.bytes = 0

    def __enter__(self) -> "PeakMemory":
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            activities = [torch.profiler.ProfilerActivity.CPU]
            self.profile = torch.profiler.profile(activities=activities, profile_memory=True).__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self.before
            return
        self.profile.__exit__(*error)
        current = 0
        for event in sorted(self.profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                current += event.nbytes()
                self.bytes = max(self.bytes, current)


def peak_memory(run: Callable[[], None], device: str) -> int:
    """Peak of the memory that a call allocates, in bytes."""
    with PeakMemory(device) as peak:
        run()
    return peak.bytes


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default=None, help="File for it.")
    args = parser.parse_args()
    found = dict(environment(args.device))
    if args.device.startswith("cuda"):
        found["free_bytes"] = torch.cuda.mem_get_info()[0]
    print(json.dumps(found, indent=1))
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
