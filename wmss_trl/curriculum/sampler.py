"""
Curriculum-enhanced data activation: which examples the next weak-driven epoch trains on (arXiv 2602.08222, phase 2).

    ΔH_i = H(M_strong; x_i) - H(M_weak; x_i)                    change of entropy, nats
    p_i  ∝ difficulty + consolidation [-ΔH_i]+ + repair [ΔH_i]+

    active set = draw(p), without replacement unless asked otherwise
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..files import replacing
from .weights import draw_active_set, sampling_weights, weight_terms


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
