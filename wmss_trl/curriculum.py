"""
Curriculum-enhanced data activation: which examples the next weak-driven epoch trains on (arXiv 2602.08222, phase 2).

    ΔH_i = H(M_strong; x_i) - H(M_weak; x_i)                    change of entropy, nats
    p_i  ∝ difficulty + consolidation [-ΔH_i]+ + repair [ΔH_i]+

    active set = draw(p), without replacement unless asked otherwise
"""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from .files import replacing

CURRICULUM_VARIANTS = ("released", "v1", "v2")
# Nats below 0 that the entropy of a certain prediction may have by rounding
_ENTROPY_ROUNDING = 1e-6


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
        ValueError: If the entropies differ in shape, or are negative (beyond rounding: from -1e-6 up they count as 0),
            NaN or infinite (with the example indices), or the variant is unknown.
    """
    weights = sum(
        weight_terms(
            weak_entropy,
            strong_entropy,
            difficulty_weight=difficulty_weight,
            consolidation_weight=consolidation_weight,
            repair_weight=repair_weight,
            variant=variant,
        ).values()
    )
    total = weights.sum()
    if total == 0:
        warnings.warn("Every sampling weight is 0: drawing uniformly.", stacklevel=2)
        return np.full(len(weights), 1 / len(weights))
    return weights / total


def weight_terms(
    weak_entropy: np.ndarray,
    strong_entropy: np.ndarray,
    *,
    difficulty_weight: float = 0.1,
    consolidation_weight: float = 0.8,
    repair_weight: float = 0.1,
    variant: str = "released",
) -> dict[str, np.ndarray]:
    """
    The three terms of [`sampling_weights`] before their sum is normalised.

    Returns:
        `dict[str, np.ndarray]`: `"difficulty"`, `"consolidation"` and `"repair"`, float64 of shape `(n,)`.
    """
    weak, strong = np.asarray(weak_entropy, dtype=np.float64), np.asarray(strong_entropy, dtype=np.float64)
    if weak.ndim != 1 or weak.shape != strong.shape or not len(weak):
        raise ValueError(
            f"`weak_entropy` {weak.shape} and `strong_entropy` {strong.shape} must be vectors of the same length >= 1."
        )
    if variant not in CURRICULUM_VARIANTS:
        raise ValueError(f"`variant` must be one of {list(CURRICULUM_VARIANTS)}, got {variant!r}.")
    weak, strong = checked_entropy("weak_entropy", weak), checked_entropy("strong_entropy", strong)
    terms = {
        "difficulty": (difficulty_weight, strong if variant == "v2" else weak),
        "consolidation": (consolidation_weight, np.maximum(weak - strong, 0)),
        "repair": (repair_weight, np.maximum(strong - weak, 0)),
    }
    return {
        name: weight * term / ((term.sum() or 1) if variant == "released" else 1)
        for name, (weight, term) in terms.items()
    }


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
    candidates = np.flatnonzero(weights)
    if replacement:
        # Sorted, because looking up millions of random values in a long array misses the cache each time
        cumulative = weights.cumsum()
        values = np.sort(generator.random(num_draws)) * cumulative[-1]
        drawn = np.minimum(cumulative.searchsorted(values, side="right"), candidates[-1])
        return generator.permutation(drawn)

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


class CurriculumSampler(Sampler[Any], TrainerCallback):
    """
    Sampler over the active set that, as a callback, rescores the data set and redraws the set at the start of each
    weak-driven epoch.

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
        rescore_epochs (`int`, *optional*, defaults to `1`):
            The data set is scored in every `rescore_epochs`-th weak-driven epoch. The epochs between draw a new active
            set from the last scores.
        variant, difficulty_weight, consolidation_weight, repair_weight:
            See [`sampling_weights`].
        shuffle (`bool`, *optional*, defaults to `True`):
            Whether an epoch visits the active set in random order, or else in data-set order.
        lengths (`np.ndarray` of shape `(n,)`, *optional*):
            Number of tokens of each example, to shuffle so that examples of similar length share a batch.
        group_size (`int`, *optional*, defaults to `1`):
            Number of examples in such a group.
        pack (`Callable[[np.ndarray], list[np.ndarray]]`, *optional*):
            Packs the examples, taken in the order of the draw, into at most `num_rows` rows.
        num_rows (`int`, *optional*):
            Number of rows of an active set that is packed, in place of `active_fraction`.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the draws and of the order. Every rank must use the same.
        on_redraw (`Callable[[dict[str, float]], None]`, *optional*):
            Receives the metrics of each redraw.

    Attributes:
        weak_entropy, strong_entropy, weights (`np.ndarray` of shape `(n,)`):
            Scores and sampling weights of the last redraw; `None` before.
        indices (`np.ndarray`):
            The examples of the active set in the order of the epoch; `None` before the first redraw.
        row_sizes (`np.ndarray` of shape `(num_rows,)`):
            Number of consecutive `indices` that share a row; `None` unless the active set is packed.
        served_epoch (`int`):
            The epoch whose active set was iterated over last; `None` before.
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
        rescore_epochs: int = 1,
        variant: str = "released",
        difficulty_weight: float = 0.1,
        consolidation_weight: float = 0.8,
        repair_weight: float = 0.1,
        shuffle: bool = True,
        lengths: np.ndarray | None = None,
        group_size: int = 1,
        pack: Callable[[np.ndarray], list[np.ndarray]] | None = None,
        num_rows: int | None = None,
        seed: int = 42,
        on_redraw: Callable[[dict[str, float]], None] | None = None,
    ):
        self.first_epoch = first_epoch
        self.num_active = num_rows or max(1, round(active_fraction * num_examples))
        self.replacement = replacement
        self.rescore_epochs = rescore_epochs
        self.term_options = {
            "difficulty_weight": difficulty_weight,
            "consolidation_weight": consolidation_weight,
            "repair_weight": repair_weight,
            "variant": variant,
        }
        self.shuffle = shuffle
        self.lengths = lengths
        self.group_size = group_size
        self.pack = pack
        self.seed = seed
        self.score = score
        self.on_redraw = on_redraw
        self.epoch: int | None = None
        self.drawn_epoch: int | None = None
        self.served_epoch: int | None = None
        self.weak_entropy: np.ndarray | None = None
        self.strong_entropy: np.ndarray | None = None
        self.weights: np.ndarray | None = None
        self.indices: np.ndarray | None = None
        self.row_sizes: np.ndarray | None = None

    def __iter__(self) -> Iterator[int | tuple[int, ...]]:
        """The indices of the active set, or tuples of those that share a row."""
        self.served_epoch = self.drawn_epoch
        if self.row_sizes is None:
            return iter(self.indices.tolist())
        return (tuple(row.tolist()) for row in np.split(self.indices, self.row_sizes.cumsum()[:-1]))

    def __len__(self) -> int:
        return self.num_active

    def on_train_begin(self, args, state, control, **kwargs):
        self.epoch = int(state.epoch or 0) - 1  # `on_epoch_begin` comes next, in a resumed epoch too

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epoch += 1
        if self.epoch >= self.first_epoch and self.drawn_epoch != self.epoch:
            self.redraw(self.epoch)
            if self.on_redraw is not None:
                self.on_redraw(self.metrics())

    def redraw(self, epoch: int) -> None:
        """Score the data set, unless an earlier epoch's scores serve, and draw the active set of `epoch`."""
        number = epoch - self.first_epoch
        if self.strong_entropy is None or number % self.rescore_epochs == 0:
            self.weak_entropy, self.strong_entropy = self.score()
            self.weights = sampling_weights(self.weak_entropy, self.strong_entropy, **self.term_options)
        seed = (self.seed, number)
        generator = np.random.Generator(np.random.PCG64((*seed, 1)))
        if self.pack is None:
            drawn = draw_active_set(self.weights, self.num_active, replacement=self.replacement, seed=seed)
            self.indices = self._arrange(drawn, generator)
        else:
            rows = self._draw_rows(seed)
            rows = [rows[i] for i in (generator.permutation(len(rows)) if self.shuffle else range(len(rows)))]
            self.indices, self.row_sizes = np.concatenate(rows), np.array([len(row) for row in rows])
        self.drawn_epoch = epoch

    def _arrange(self, drawn: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The order of the epoch; that of the draw puts large weights first."""
        if not self.shuffle:
            return np.sort(drawn)
        if self.lengths is None:
            return generator.permutation(drawn)
        torch_generator = torch.Generator().manual_seed(int(generator.integers(2**63)))
        order = get_length_grouped_indices(self.lengths[drawn], self.group_size, generator=torch_generator)
        return drawn[np.array(order)]

    def _draw_rows(self, seed: tuple[int, ...]) -> list[np.ndarray]:
        """As many examples as fit into the rows, by the order of the draw; those of weight 0 only if room is left."""
        for num_draws in (np.count_nonzero(self.weights), len(self.weights)):
            rows = self.pack(draw_active_set(self.weights, num_draws, seed=seed))
            if len(rows) == self.num_active:
                return rows
        # Packed more tightly than the whole data set: its last rows are cut, so that the number of steps stays
        while len(rows) < self.num_active:
            longest = max(range(len(rows)), key=lambda i: len(rows[i]))
            half = len(rows[longest]) // 2
            rows.append(rows[longest][half:])
            rows[longest] = rows[longest][:half]
        return rows

    def metrics(self) -> dict[str, float]:
        """Size and mean entropies in nats of the last redraw, and the share of each term in the sampling weights."""
        delta = self.strong_entropy - self.weak_entropy
        active = np.unique(self.indices)
        terms = weight_terms(self.weak_entropy, self.strong_entropy, **self.term_options)
        metrics = {
            "active_examples": len(active),
            "weak_entropy": self.weak_entropy.mean(),
            "strong_entropy": self.strong_entropy.mean(),
            "delta_entropy": delta.mean(),
            "active_delta_entropy": delta[active].mean(),
        }
        for prefix, rows in (("", slice(None)), ("active_", active)):
            sums = {name: term[rows].sum() for name, term in terms.items()}
            total = sum(sums.values()) or 1
            metrics |= {f"{prefix}{name}_share": value / total for name, value in sums.items()}
        return {f"curriculum/{name}": float(value) for name, value in metrics.items()}

    def save(self, folder: str | Path) -> bool:
        """Write the scores and the last draw to `curriculum.npz` in `folder`. Returns whether there are any."""
        arrays = {
            name: value
            for name in ("weak_entropy", "strong_entropy", "weights", "indices", "row_sizes")
            if (value := getattr(self, name)) is not None
        }
        if not arrays:
            return False
        if self.drawn_epoch is not None:
            arrays["epoch"] = np.array(self.drawn_epoch)
        with replacing(Path(folder) / self.FILE_NAME) as partial:
            np.savez(partial, **arrays)
        return True

    def load(self, folder: str | Path) -> None:
        """Take up the scores and the draw saved in `folder`; what its file does not hold is still to come."""
        path = Path(folder) / self.FILE_NAME
        with np.load(path, allow_pickle=False) as saved:
            for name in ("weak_entropy", "strong_entropy", "weights", "indices", "row_sizes"):
                setattr(self, name, saved.get(name))
            self.drawn_epoch = int(saved["epoch"]) if "epoch" in saved else None


def checked_entropy(name: str, entropy: np.ndarray, indices: np.ndarray | None = None) -> np.ndarray:
    """Entropies with 0 for what rounding has made negative, see [`check_finite`]."""
    entropy = np.where((entropy < 0) & (entropy > -_ENTROPY_ROUNDING), 0, entropy)
    check_finite(name, entropy, indices)
    return entropy


def check_finite(name: str, values: np.ndarray, indices: np.ndarray | None = None) -> None:
    """Raise a `ValueError` with the indices (positions unless given) of values that are NaN, infinite or negative."""
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(bad):
        indices = np.arange(len(values)) if indices is None else indices
        bad = bad[np.argsort(indices[bad])]
        shown = ", ".join(f"{indices[i]} ({values[i]})" for i in bad[:10])
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ValueError(f"`{name}` must be finite and >= 0, but examples {shown}{more} are not.")
