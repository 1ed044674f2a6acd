"""Table, plot and verdict of a comparison."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..curriculum.sampler import CurriculumSampler
from ..reports.figures import plot_active_set
from .comparison import TEMPERATURE, WMSS, Result

# One comparison per seed
Runs = Sequence[Sequence[Result]]


def mean_and_standard_error(values: Sequence[float]) -> tuple[float, float]:
    values = np.asarray(values, dtype=np.float64)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def accuracies(runs: Runs, name: str) -> Sequence[float]:
    """Accuracy per seed; for one seed the outcome per problem, so that a standard error can be given."""
    rows = [next(result for result in run if result.name == name) for run in runs]
    return rows[0].correct.astype(float) if len(runs) == 1 else [row.correct.mean() for row in rows]


def paired_difference(runs: Runs, name: str, baseline: str) -> tuple[float, float]:
    """
    Difference in accuracy between two rows and its standard error, paired by seed (by problem for a single seed).

    Args:
        runs (`Sequence[Sequence[Result]]`):
            The results of each seed.
        name, baseline (`str`):
            Names of the rows.

    Returns:
        `tuple[float, float]`: percentage points.
    """
    difference = np.subtract(accuracies(runs, name), accuracies(runs, baseline))
    mean, error = mean_and_standard_error(difference)
    return 100 * mean, 100 * error


def best_sft(runs: Runs) -> str:
    """The SFT row of highest accuracy: its learning rate is chosen on the held-out problems, in SFT's favour."""
    names = [result.name for result in runs[0] if result.name.startswith("SFT")]
    return max(names, key=lambda name: np.mean(accuracies(runs, name)))


def format_table(runs: Runs) -> str:
    """Markdown table of averages over the seeds; `±` is the standard error over seeds, or problems for one seed."""
    lines = [
        "| run | accuracy % | NLL | entropy | NLL of the mixture with M0 | amplification |",
        "|---|---|---|---|---|---|",
    ]
    for row, result in enumerate(runs[0]):
        mean, error = mean_and_standard_error(accuracies(runs, result.name))
        metrics = {key: np.mean([run[row].metrics[key] for run in runs]) for key in result.metrics}
        lines.append(
            f"| {result.name} | {100 * mean:.1f} ± {100 * error:.1f} | {metrics['nll']:.3f} | "
            f"{metrics['entropy']:.3f} | {metrics['mixed_nll']:.3f} | {metrics['amplification']:.2f} |"
        )
    return "\n".join(lines)


def format_verdict(runs: Runs) -> str:
    """The paired differences, and in the last sentence what they say."""
    sft = best_sft(runs)
    unit = f"{len(runs[0][0].correct)} problems" if len(runs) == 1 else f"{len(runs)} seeds"
    differences = {baseline: paired_difference(runs, WMSS, baseline) for baseline in (sft, TEMPERATURE)}
    lines = [
        f"{WMSS} minus {baseline}: {mean:+.1f} ± {error:.1f} points (paired over {unit})"
        for baseline, (mean, error) in differences.items()
    ]
    (mean, error), (control_mean, control_error) = differences.values()
    if mean < -2 * error:
        sentence = f"On this task WMSS is worse than continued SFT at its best learning rate ({sft})."
    elif mean <= 2 * error:
        sentence = (
            f"On this task WMSS and continued SFT at its best learning rate ({sft}) are within two standard errors: "
            "neither a gain nor a loss is shown."
        )
    elif control_mean > 2 * control_error:
        sentence = f"On this task WMSS is better than continued SFT ({sft}) and than the control without a weak model."
    else:
        sentence = (
            f"On this task WMSS is better than continued SFT ({sft}), but not clearly better than the control without "
            "a weak model, so the gain is not shown to come from the weak model."
        )
    return "\n".join([*lines, sentence])


def save_results(path: str | Path, runs: Runs) -> None:
    """Write the results of every seed as JSON."""
    rows = [[asdict(result) | {"correct": result.correct.tolist()} for result in run] for run in runs]
    Path(path).write_text(json.dumps(rows))


def plot_comparison(path: str | Path, results: Sequence[Result], sampler: CurriculumSampler) -> None:
    """
    Save a figure: held-out accuracy and training loss over the run, and the last redraw of the active set.

    Args:
        path (`str` or `Path`):
            File to write.
        results (`Sequence[Result]`):
            The results of one seed.
        sampler ([`~wmss_trl.CurriculumSampler`]):
            The sampler of the WMSS run.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    accuracy_ax, loss_ax, scatter_ax = figure.subplots(1, 3)
    for result in results:
        if result.accuracy:
            width = 2.5 if result.name == WMSS else 1
            steps, values = zip(*result.accuracy, strict=True)
            accuracy_ax.plot(steps, [100 * value for value in values], marker="o", linewidth=width, label=result.name)
            loss_ax.plot(*zip(*result.loss, strict=True), linewidth=width, label=result.name)
    accuracy_ax.set(xlabel="optimizer step", ylabel="held-out exact match (%)", title="Accuracy of the model alone")
    loss_ax.set(xlabel="optimizer step", ylabel="loss (nats)", title="Training loss (each run's own)")
    accuracy_ax.legend()
    plot_active_set(scatter_ax, sampler.weak_entropy, sampler.strong_entropy, sampler.indices)
    scatter_ax.set_title("Last redraw of the active set")
    figure.savefig(path, dpi=120)
