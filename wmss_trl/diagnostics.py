"""What the mixture does to a model: amplification and burden sharing on held-out data, and plots of a run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from .curriculum import CurriculumSampler
from .lm_head import evaluating
from .losses import mixed_loss, next_token_targets

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def evaluate_mixture(
    strong: nn.Module,
    weak: nn.Module,
    dataset: Dataset,
    data_collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    mixing_lambda: float,
    batch_size: int = 8,
) -> dict[str, float]:
    """
    Compare a model with its mixture with a weak model under teacher forcing.

    A mixture much better than the strong model alone is the sign of burden sharing: the strong model leans on what
    the weak one supplies, and is used without it.

    Args:
        strong (`torch.nn.Module`):
            Model whose forward returns `.logits`.
        weak (`torch.nn.Module`):
            Weak reference with the same vocabulary.
        dataset (`datasets.Dataset`):
            Tokenized data set with `input_ids` and, optionally, `labels`.
        data_collator (`Callable`):
            Turns a list of examples into a padded batch with `labels`.
        mixing_lambda (`float`):
            Weight of the strong logits in the mix.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of examples in a forward pass.

    Returns:
        `dict[str, float]`: averages over the supervised tokens. `nll`, `entropy` and `wrong_mass` (probability of all
        wrong tokens, `1 - P(y)`, which is the size of SFT's gradient on them) of the strong model; `mixed_nll` and
        `mixed_wrong_mass` of the mixture; `amplification`, the ratio of the two masses; `mixed_strong_gradient`,
        `lambda * (1 - P_mix(y))`, the part of the mixture's gradient that reaches the strong model. Entropy and NLL in
        nats.
    """
    device = next(strong.parameters()).device
    sums = np.zeros(5)
    num_items = 0
    with evaluating(strong), evaluating(weak):
        for start in range(0, len(dataset), batch_size):
            examples = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            batch = {key: value.to(device) for key, value in data_collator(examples).items()}
            targets = next_token_targets(batch.pop("labels"))
            z_strong, z_weak = (model(**batch, use_cache=False).logits.flatten(0, 1) for model in (strong, weak))
            output = mixed_loss(z_strong, z_weak, targets, mixing_lambda)
            num_items += int(output.mask.sum())
            sums += [
                -output.strong_log_probs.sum().item(),
                output.strong_entropy.sum().item(),
                -torch.expm1(output.strong_log_probs).sum().item(),
                -output.mixed_log_probs.sum().item(),
                -torch.expm1(output.mixed_log_probs).sum().item(),
            ]
    nll, entropy, wrong_mass, mixed_nll, mixed_wrong_mass = (sums / max(num_items, 1)).tolist()
    return {
        "nll": nll,
        "entropy": entropy,
        "wrong_mass": wrong_mass,
        "mixed_nll": mixed_nll,
        "mixed_wrong_mass": mixed_wrong_mass,
        "amplification": mixed_wrong_mass / wrong_mass,
        "mixed_strong_gradient": mixing_lambda * mixed_wrong_mass,
    }


def crossover_lambda(strong_norm: float, weak_norm: float) -> float:
    """
    Mixing weight above which the strong branch dominates the update: `1 / (1 + sqrt(a))` with `a = (||z_strong|| /
    ||z_weak||)^2`, a heuristic of paper v2.

    Args:
        strong_norm, weak_norm (`float`):
            Norms of the centered logits, as in [`~wmss_trl.losses.MixedLossOutput`].

    Returns:
        `float`: the crossover, in (0, 1).
    """
    return weak_norm / (weak_norm + strong_norm)


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
