"""Interleaved timing and peak memory, shared by the benchmarks."""

import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import accelerate
import torch
import transformers
import trl
from peft import LoraConfig, get_peft_model
from torch import nn


@dataclass
class Measurement:
    """
    Args:
        seconds (`list[float]`):
            Wall-clock time of each round.
        peak_bytes (`int`):
            Largest memory allocated during a call, beyond what was there before and beyond `gradient_bytes`.
    """

    seconds: list[float]
    peak_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def environment(device: str) -> str:
    """One line that says what the figures were measured on."""
    if device.startswith("cuda"):
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"
    return f"{hardware}; {versions}, accelerate {accelerate.__version__}; {time.strftime('%Y-%m-%d')}"


def earlier_adapter(model: nn.Module, config: LoraConfig) -> str:
    """Folder of an adapter for the base `model`, as the weak model of a joint run that begins with its mixed loss."""
    folder = tempfile.mkdtemp()
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def interleaved(
    candidates: dict[str, Callable[[], None]], rounds: int, device: str, gradient_bytes: int = 0
) -> dict[str, Measurement]:
    """
    Run every candidate once per round, after one round for warming up and one for the memory.

    Args:
        candidates (`dict[str, Callable[[], None]]`):
            What to run, by name.
        rounds (`int`):
            Number of timed rounds.
        device (`str`):
            Where the candidates run.
        gradient_bytes (`int`, *optional*, defaults to `0`):
            Memory of the gradients, which every candidate must allocate, to be left out of its peak.
    """
    for run in candidates.values():
        run()
    peaks = {name: peak_memory(run, device) - gradient_bytes for name, run in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: Measurement(seconds[name], peaks[name]) for name in candidates}


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


def markdown_table(results: dict[str, Measurement], baselines: Sequence[str]) -> str:
    """Median time with its quartiles, peak memory, and the median ratio to each baseline within a round."""
    lines = [
        f"| candidate | time (quartiles), ms | peak memory, MB | {' | '.join(f'x {name}' for name in baselines)} |",
        "|---|---|---|" + "---|" * len(baselines),
    ]
    for name, result in results.items():
        low, median, high = quartiles([1000 * seconds for seconds in result.seconds])
        ratios = []
        for baseline in baselines:
            pairs = zip(result.seconds, results[baseline].seconds, strict=True)
            ratio_low, ratio, ratio_high = quartiles([ours / theirs for ours, theirs in pairs])
            ratios.append(f"{ratio:.2f} ({ratio_low:.2f}-{ratio_high:.2f})")
        memory = f"{result.peak_bytes / 2**20:.0f}" if result.peak_bytes else "not measured"
        lines.append(f"| {name} | {median:.0f} ({low:.0f}-{high:.0f}) | {memory} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
