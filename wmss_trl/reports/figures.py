"""What the mixture does to a model: amplification and burden sharing on held-out data, and plots of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..curriculum.sampler import CurriculumSampler

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_redraw(path: str | Path, sampler: CurriculumSampler) -> None:
    """
    Figure of the active set of a redraw: the entropies of all examples, and what the three terms of the sampling
    weights contribute to the data set and to the active set.

    Args:
        path (`str` or `Path`):
            PNG file to write.
        sampler ([`~wmss_trl.CurriculumSampler`]):
            A sampler that has drawn.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    scatter_ax, share_ax = figure.subplots(1, 2, width_ratios=(3, 2))
    plot_active_set(scatter_ax, sampler.weak_entropy, sampler.strong_entropy, sampler.indices)
    scatter_ax.set_title(f"active set of epoch {sampler.drawn_epoch}")
    metrics = sampler.metrics()
    terms = ("difficulty", "consolidation", "repair")
    for offset, prefix, color, label in ((-0.2, "", "0.7", "data set"), (0.2, "active_", "tab:orange", "active set")):
        shares = [metrics[f"curriculum/{prefix}{term}_share"] for term in terms]
        bars = share_ax.bar(np.arange(3) + offset, shares, width=0.4, color=color, label=label)
        share_ax.bar_label(bars, fmt="%.2f")
    share_ax.set(xticks=range(3), xticklabels=terms, ylim=(0, 1.1), title="share of the sampling weight")
    share_ax.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def log_image(name: str, path: str | Path, callbacks: Sequence[TrainerCallback], step: int) -> None:
    """
    Send an image to the reporters of a run that take images: TensorBoard, Weights & Biases and Trackio.

    Args:
        name (`str`):
            Name of the image there.
        path (`str` or `Path`):
            PNG file.
        callbacks (`list[TrainerCallback]`):
            Callbacks of the trainer, among them those of its reporters.
        step (`int`):
            Optimizer step.
    """
    for callback in callbacks:
        # Attributes that are private to transformers, checked with 5.23
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            from matplotlib.image import imread

            pixels = (255 * imread(path)[..., :3]).astype(np.uint8)
            callback.tb_writer.add_image(name, pixels, step, dataformats="HWC")
        elif isinstance(callback, WandbCallback) and callback._wandb is not None:
            callback._wandb.log({name: callback._wandb.Image(str(path)), "train/global_step": step})
        elif isinstance(callback, TrackioCallback) and callback._trackio is not None:
            callback._trackio.log({name: callback._trackio.Image(str(path)), "train/global_step": step})


def plot_active_set(ax: "Axes", weak_entropy: np.ndarray, strong_entropy: np.ndarray, indices: np.ndarray) -> None:
    """
    Scatter of the examples' entropies under both models, with the active set marked.

    Args:
        ax (`matplotlib.axes.Axes`):
            Where to draw.
        weak_entropy, strong_entropy (`np.ndarray` of shape `(n,)`):
            Scores of a redraw, in nats.
        indices (`np.ndarray`):
            The active set.
    """
    active = np.zeros(len(weak_entropy), dtype=bool)
    active[indices] = True
    # More points than this are slow to draw and hide each other
    shown = np.zeros(len(weak_entropy), dtype=bool)
    shown[:: max(1, len(weak_entropy) // 20_000)] = True
    for chosen, color, label in ((~active, "0.7", "left out"), (active, "tab:orange", "active set")):
        ax.scatter(
            weak_entropy[chosen & shown],
            strong_entropy[chosen & shown],
            s=4,
            alpha=0.6,
            color=color,
            label=f"{label} ({chosen.sum()})",
        )
    both = np.concatenate([weak_entropy, strong_entropy])
    limits = [both.min(), both.max()]
    ax.plot(limits, limits, color="black", linewidth=0.8, label="no change of entropy")
    ax.set(xlabel="entropy under the weak model (nats)", ylabel="entropy under the strong model (nats)")
    ax.legend(markerscale=3)
