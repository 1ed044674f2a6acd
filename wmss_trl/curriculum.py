"""
Curriculum-enhanced data activation: which examples the next weak-driven epoch trains on (arXiv 2602.08222, phase 2).

    ΔH_i = H(M_strong; x_i) - H(M_weak; x_i)                    change of entropy, nats
    p_i  ∝ difficulty + consolidation [-ΔH_i]+ + repair [ΔH_i]+

    active set = draw(p), without replacement unless asked otherwise
"""

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback

CURRICULUM_VARIANTS = ("released", "v1", "v2")


def sampling_weights(
    weak_entropy: np.ndarray,
    strong_entropy: np.ndarray,
    *,
    difficulty_weight: float = 0.1,
    consolidation_weight: float = 0.8,
    repair_weight: float = 0.1,
    variant: str = "released",
) -> np.ndarray:
    """
    Sampling weight of each example from its entropy under both models.

    | variant | formula, then normalised to sum 1 | source |
    |---|---|---|
    | `"released"` | `d Hw/Σ Hw + c [-ΔH]+/Σ [-ΔH]+ + r [ΔH]+/Σ [ΔH]+` | the paper's code |
    | `"v1"` | `d Hw + c [-ΔH]+ + r [ΔH]+` | paper v1 |
    | `"v2"` | `d Hs + c [-ΔH]+ + r [ΔH]+` | paper v2 |

    `Hw`, `Hs` are the weak and the strong entropy, `ΔH = Hs - Hw`, and `d`, `c`, `r` the three weights. In
    `"released"` a term whose sum is 0 contributes 0.

    Args:
        weak_entropy (`np.ndarray` of shape `(n,)`):
            Token-averaged entropy of each example under the weak model, nats.
        strong_entropy (`np.ndarray` of shape `(n,)`):
            The same under the strong model.
        difficulty_weight (`float`, *optional*, defaults to `0.1`):
            Weight of the difficulty term (still uncertain).
        consolidation_weight (`float`, *optional*, defaults to `0.8`):
            Weight of the consolidation term (entropy fell: learnt, keep it).
        repair_weight (`float`, *optional*, defaults to `0.1`):
            Weight of the regression-repair term (entropy rose).
        variant (`str`, *optional*, defaults to `"released"`):
            One of `"released"`, `"v1"` and `"v2"`.

    Returns:
        `np.ndarray` of shape `(n,)`: float64 weights that sum to 1; uniform, with a warning, if all are 0.

    Raises:
        ValueError: If the entropies differ in shape, or are negative, NaN or infinite (with the example indices), or
            the variant is unknown.
    """
    weak, strong = np.asarray(weak_entropy, dtype=np.float64), np.asarray(strong_entropy, dtype=np.float64)
    if weak.ndim != 1 or weak.shape != strong.shape or not len(weak):
        raise ValueError(
            f"`weak_entropy` {weak.shape} and `strong_entropy` {strong.shape} must be vectors of the same length >= 1."
        )
    for name, entropy in (("weak_entropy", weak), ("strong_entropy", strong)):
        check_finite(name, entropy)
    delta = strong - weak
    difficulty = strong if variant == "v2" else weak
    terms = (
        (difficulty_weight, difficulty),
        (consolidation_weight, np.maximum(-delta, 0)),
        (repair_weight, np.maximum(delta, 0)),
    )
    if variant == "released":
        weights = sum(weight * term / (term.sum() or 1) for weight, term in terms)
    elif variant in ("v1", "v2"):
        weights = sum(weight * term for weight, term in terms)
    else:
        raise ValueError(f"`variant` must be one of {list(CURRICULUM_VARIANTS)}, got {variant!r}.")
    total = weights.sum()
    if total == 0:
        warnings.warn("Every sampling weight is 0: drawing uniformly.", stacklevel=2)
        return np.full(len(weights), 1 / len(weights))
    return weights / total


def draw_active_set(
    weights: np.ndarray, num_draws: int, *, replacement: bool = False, seed: int | tuple[int, ...]
) -> np.ndarray:
    """
    Draw the active set with probability proportional to the weights.

    Without replacement this is the published "draw with replacement, drop repeats" continued until `num_draws`
    distinct examples are found, computed in one pass: the `num_draws` smallest of `Exp(1) / weight`
    (Efraimidis & Spirakis, 2006). Examples of weight 0 are drawn, uniformly and with a warning, only when all the
    others already are.

    Args:
        weights (`np.ndarray` of shape `(n,)`):
            Sampling weights; any positive scale.
        num_draws (`int`):
            Number of indices to return.
        replacement (`bool`, *optional*, defaults to `False`):
            Whether an example can be drawn more than once.
        seed (`int` or `tuple[int, ...]`):
            Seed of the draw. The same seed gives the same indices on every rank and machine.

    Returns:
        `np.ndarray` of shape `(num_draws,)`: int64 indices in the order of the draw.

    Raises:
        ValueError: If a weight is negative, NaN or infinite, all are 0, or more distinct examples are asked for than
            there are.
    """
    weights = np.asarray(weights, dtype=np.float64)
    check_finite("weights", weights)
    if not weights.any():
        raise ValueError("`weights` are all 0: nothing can be drawn.")
    if num_draws < 1 or (num_draws > len(weights) and not replacement):
        raise ValueError(
            f"`num_draws={num_draws}` must be between 1 and the number of examples ({len(weights)}) when drawing "
            "without replacement."
        )
    generator = np.random.Generator(np.random.PCG64(seed))
    if replacement:
        return generator.choice(len(weights), size=num_draws, p=weights / weights.sum())

    candidates = np.flatnonzero(weights)
    arrival = generator.standard_exponential(len(candidates)) / (weights[candidates] / weights.max())
    if num_draws <= len(candidates):
        first = np.argpartition(arrival, num_draws - 1)[:num_draws]
        return candidates[first[np.argsort(arrival[first], kind="stable")]]
    warnings.warn(
        f"Only {len(candidates)} of {len(weights)} examples have a positive sampling weight, fewer than the "
        f"{num_draws} to draw: the rest is drawn uniformly among the others.",
        stacklevel=2,
    )
    others = generator.permutation(np.flatnonzero(weights == 0))
    return np.concatenate([candidates[np.argsort(arrival, kind="stable")], others])[:num_draws]


class CurriculumSampler(Sampler[int], TrainerCallback):
    """
    Sampler over the active set that, as a callback, rescores the data set and redraws the set at the start of each
    weak-driven epoch.

    Before `first_epoch` the data loader keeps its own sampler, so that phase 1 sees the data in SFT's order. From then
    on the callback puts itself into the data loader: through `set_sampler`, because on several processes a loader
    that skips batches to resume hides its sampler from `set_epoch`.

    Args:
        num_examples (`int`):
            Size `n` of the data set.
        score (`Callable[[], tuple[np.ndarray, np.ndarray]]`):
            Returns the entropies of the data set under the weak and under the strong model, each of shape `(n,)`, in
            nats.
        first_epoch (`int`, *optional*, defaults to `0`):
            First weak-driven epoch, counted from 0.
        active_fraction (`float`, *optional*, defaults to `0.63`):
            The active set has `round(active_fraction * n)` examples, at least one.
        replacement (`bool`, *optional*, defaults to `False`):
            Whether to draw with replacement and keep the repeats.
        variant, difficulty_weight, consolidation_weight, repair_weight:
            See [`sampling_weights`].
        shuffle (`bool`, *optional*, defaults to `True`):
            Whether an epoch visits the active set in random order, or else in data-set order.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the draws and of the order. Every rank must use the same.
        identity (`dict[str, Any]`, *optional*):
            What else a draw depends on (data, weak model), in JSON types. Saved with the draw: a checkpoint of another
            identity or other settings is refused.
        log (`Callable[[dict[str, float]], None]`, *optional*):
            Receives the metrics of each redraw.

    Attributes:
        weak_entropy, strong_entropy, weights (`np.ndarray` of shape `(n,)`):
            Scores and sampling weights of the last redraw; `None` before.
        indices (`np.ndarray` of shape `(num_active,)`):
            The active set in the order of the epoch; `None` before the first redraw.
    """

    FILE_NAME = "curriculum.npz"

    def __init__(
        self,
        num_examples: int,
        score: Callable[[], tuple[np.ndarray, np.ndarray]],
        *,
        first_epoch: int = 0,
        active_fraction: float = 0.63,
        replacement: bool = False,
        variant: str = "released",
        difficulty_weight: float = 0.1,
        consolidation_weight: float = 0.8,
        repair_weight: float = 0.1,
        shuffle: bool = True,
        seed: int = 42,
        identity: dict[str, Any] | None = None,
        log: Callable[[dict[str, float]], None] | None = None,
    ):
        self.first_epoch = first_epoch
        self.num_active = max(1, round(active_fraction * num_examples))
        self.shuffle = shuffle
        self.score = score
        self.log = log
        self.settings = {
            "num_examples": num_examples,
            "active_fraction": active_fraction,
            "replacement": replacement,
            "variant": variant,
            "difficulty_weight": difficulty_weight,
            "consolidation_weight": consolidation_weight,
            "repair_weight": repair_weight,
            "seed": seed,
            **(identity or {}),
        }
        self.epoch: int | None = None
        self.drawn_epoch: int | None = None
        self.weak_entropy: np.ndarray | None = None
        self.strong_entropy: np.ndarray | None = None
        self.weights: np.ndarray | None = None
        self.indices: np.ndarray | None = None

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices.tolist())

    def __len__(self) -> int:
        return self.num_active

    def on_train_begin(self, args, state, control, **kwargs):
        self.epoch = int(state.epoch or 0) - 1  # `on_epoch_begin` comes next, in a resumed epoch too

    def on_epoch_begin(self, args, state, control, train_dataloader: DataLoader | None = None, **kwargs):
        self.epoch += 1
        if self.epoch < self.first_epoch:
            return
        if self.drawn_epoch != self.epoch:
            self.redraw(self.epoch)
        train_dataloader.set_sampler(self)

    def redraw(self, epoch: int) -> None:
        """Score the data set and draw the active set of `epoch`."""
        settings = self.settings
        self.weak_entropy, self.strong_entropy = self.score()
        self.weights = sampling_weights(
            self.weak_entropy,
            self.strong_entropy,
            difficulty_weight=settings["difficulty_weight"],
            consolidation_weight=settings["consolidation_weight"],
            repair_weight=settings["repair_weight"],
            variant=settings["variant"],
        )
        seed = (settings["seed"], epoch - self.first_epoch)
        drawn = draw_active_set(self.weights, self.num_active, replacement=settings["replacement"], seed=seed)
        # The order of the draw puts large weights first
        shuffled = np.random.Generator(np.random.PCG64((*seed, 1))).permutation(drawn)
        self.indices = shuffled if self.shuffle else np.sort(drawn)
        self.drawn_epoch = epoch
        if self.log is not None:
            delta = self.strong_entropy - self.weak_entropy
            self.log(
                {
                    "curriculum/active_examples": len(np.unique(drawn)),
                    "curriculum/weak_entropy": float(self.weak_entropy.mean()),
                    "curriculum/strong_entropy": float(self.strong_entropy.mean()),
                    "curriculum/delta_entropy": float(delta.mean()),
                    "curriculum/active_delta_entropy": float(delta[drawn].mean()),
                }
            )

    def save(self, folder: str | Path) -> None:
        """Write the last draw, if there was one, to `curriculum.npz` in `folder`."""
        if self.drawn_epoch is None:
            return
        target = Path(folder) / self.FILE_NAME
        partial = target.with_suffix(".partial.npz")
        np.savez(
            partial,
            epoch=self.drawn_epoch,
            settings=json.dumps(self.settings),
            weak_entropy=self.weak_entropy,
            strong_entropy=self.strong_entropy,
            weights=self.weights,
            indices=self.indices,
        )
        partial.replace(target)

    def load(self, folder: str | Path) -> None:
        """
        Take up the draw saved in `folder`; without one (phase 1) the first redraw is still to come.

        Raises:
            ValueError: If the draw was made with other settings or for another data set or weak model.
        """
        path = Path(folder) / self.FILE_NAME
        if not path.exists():
            return
        with np.load(path, allow_pickle=False) as saved:
            before = json.loads(str(saved["settings"]))
            changed = [
                f"`{key}`: {before.get(key)!r} in the checkpoint, {self.settings.get(key)!r} now"
                for key in sorted(before.keys() | self.settings.keys())
                if before.get(key) != self.settings.get(key)
            ]
            if changed:
                raise ValueError(
                    f"Cannot resume from {folder}, whose active set was drawn with other settings: "
                    f"{'; '.join(changed)}. Restore them, or start a new run from the saved model."
                )
            self.drawn_epoch = int(saved["epoch"])
            self.weak_entropy, self.strong_entropy = saved["weak_entropy"], saved["strong_entropy"]
            self.weights, self.indices = saved["weights"], saved["indices"]


def check_finite(name: str, values: np.ndarray) -> None:
    """Raise a `ValueError` with the example indices if a value is NaN, infinite or negative."""
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(bad):
        shown = ", ".join(f"{index} ({values[index]})" for index in bad[:10])
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ValueError(f"`{name}` must be finite and >= 0, but examples {shown}{more} are not.")
