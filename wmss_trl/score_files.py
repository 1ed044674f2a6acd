"""Scores on disk: the cache of a run, and the table that people read, select from and start a run with."""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator
from datasets import Dataset
from torch import nn

from .collation import DataCollator
from .curriculum import checked_entropy, draw_active_set, sampling_weights
from .engines import on_main_process
from .files import replacing
from .scoring import score_models
from .weak_cache import HiddenCache

Activated = Callable[[], AbstractContextManager[nn.Module]]


class ScoreCache:
    """
    Scores the models of a run on its data set and keeps the results: nothing is scored twice, and an interrupted pass
    goes on where it was.

    One file per model holds its entropies, NaN where there are none yet. Its name is a hash of the data set, the model
    and the settings: what changes a score changes the file.

    Args:
        folder (`str` or `Path`):
            Where the files are. Only the main process reads and writes them.
        identity (`dict[str, Any]`):
            What the scores depend on besides the model, in JSON types: the data set's fingerprint, the precision.
        dataset, data_collator, accelerator, score_options:
            See [`~wmss_trl.scoring.score_models`].
    """

    def __init__(
        self,
        folder: str | Path,
        identity: Mapping[str, Any],
        dataset: Dataset,
        data_collator: DataCollator,
        accelerator: Accelerator,
        **score_options: Any,
    ):
        self.folder = Path(folder)
        self.identity = dict(identity)
        self.dataset = dataset
        self.data_collator = data_collator
        self.accelerator = accelerator
        self.score_options = score_options
        self._writable = True

    def score(
        self,
        models: Mapping[str, Activated],
        fingerprints: Mapping[str, str],
        hidden_caches: Mapping[str, HiddenCache] | None = None,
        description: str | None = None,
    ) -> dict[str, np.ndarray]:
        """
        Entropies of the models, read as far as they are on disk and computed in one pass where they are not.

        Args:
            models (`dict[str, Callable]`):
                See [`~wmss_trl.scoring.score_models`].
            fingerprints (`dict[str, str]`):
                Identity of each model, see [`~wmss_trl.weak.fingerprint`].
            hidden_caches (`dict[str, HiddenCache]`, *optional*):
                Where to keep the hidden states of some of the models.
            description (`str`, *optional*):
                Label of the progress bar. Defaults to the names of the models.

        Returns:
            `dict[str, np.ndarray]`: float32 entropies in nats, each of shape `(n,)`.
        """
        paths = {name: self._path(fingerprints[name]) for name in models}
        hidden_caches = hidden_caches or {}

        def prepare() -> dict[str, np.ndarray]:
            for cache in hidden_caches.values():
                cache.create(self.accelerator.print)
            return {name: entropy for name, path in paths.items() if (entropy := self._read(path)) is not None}

        known = on_main_process(self.accelerator, prepare)
        for name, cache in hidden_caches.items():
            if name in known:
                known[name] = np.where(cache.done, known[name], np.nan)
        missing = {name: model for name, model in models.items() if name not in known or np.isnan(known[name]).any()}
        if not missing:
            return known

        def save(entropies: dict[str, np.ndarray]) -> None:
            for name, cache in hidden_caches.items():
                cache.flush(~np.isnan(entropies[name]))
            if self.accelerator.is_main_process:
                for name, entropy in entropies.items():
                    self._write(paths[name], entropy, fingerprints[name])

        computed = score_models(
            missing,
            self.dataset,
            self.data_collator,
            accelerator=self.accelerator,
            description=description or f"Scoring, {' and '.join(missing)} model{'s' if len(missing) > 1 else ''}",
            known={name: known[name] for name in missing if name in known},
            on_progress=save,
            on_hidden={name: cache.write for name, cache in hidden_caches.items()},
            **self.score_options,
        )
        if hidden_caches:
            self.accelerator.wait_for_everyone()  # until each process has flushed what it has written
        return known | computed

    def holds(self, fingerprint: str) -> bool:
        """Whether there are scores of a model, all or some."""
        return self._path(fingerprint).exists()

    def has_any(self) -> bool:
        """Whether there are scores of any model in the folder."""
        return any(self.folder.glob("*.npz"))

    def _path(self, fingerprint: str) -> Path:
        key = json.dumps(self.identity | {"model": fingerprint}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"

    def _read(self, path: Path) -> np.ndarray | None:
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as saved:
                entropy = saved["entropy"]
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            warnings.warn(f"The scores in {path} cannot be read ({error}) and are computed anew.", stacklevel=2)
            return None
        return entropy if len(entropy) == len(self.dataset) else None

    def _write(self, path: Path, entropy: np.ndarray, fingerprint: str) -> None:
        if not self._writable:
            return
        try:
            with replacing(path) as partial:
                np.savez(partial, entropy=entropy, identity=json.dumps(self.identity | {"model": fingerprint}))
        except OSError as error:
            self._writable = False
            warnings.warn(
                f"Scores cannot be kept in {self.folder} ({error}): the run goes on without. If it is interrupted, "
                "scoring starts anew. Free some space, or set `score_cache_dir`.",
                stacklevel=2,
            )


@dataclass
class ScoreTable:
    """
    Scores of a data set as a table of one row per example, which Parquet keeps.

    | column | |
    |---|---|
    | `index` | position of the example in the prepared data set |
    | `tokens` | number of its supervised tokens |
    | `weak_entropy`, `strong_entropy` | entropy under the weak and the strong model, nats |
    | `delta_entropy` | `strong_entropy - weak_entropy` |
    | `weight` | sampling weight, all sum to 1 |
    | `drawn` | how many times the example is in the active set |

    Args:
        tokens (`np.ndarray` of shape `(n,)`):
            Number of supervised tokens of each example.
        weak_entropy, strong_entropy (`np.ndarray` of shape `(n,)`):
            Float32 entropies in nats.
        identity (`dict[str, str]`):
            Fingerprints of the data set (`train_dataset`) and of the models (`weak_model`, `strong_model`). Empty if
            the file was written by another program.
        weight (`np.ndarray` of shape `(n,)`, *optional*), drawn (`np.ndarray` of shape `(n,)`, *optional*):
            Result of the draw.
    """

    tokens: np.ndarray
    weak_entropy: np.ndarray
    strong_entropy: np.ndarray
    identity: dict[str, str]
    weight: np.ndarray | None = None
    drawn: np.ndarray | None = None

    @classmethod
    def read(cls, path: str | Path) -> "ScoreTable":
        """
        Read a Parquet file, in whatever order its rows are.

        Raises:
            ValueError: If it is no such file, a column is missing, or the indices are not 0 to n-1, each once.
        """
        try:
            table = pq.read_table(path)
        except FileNotFoundError as error:
            raise ValueError(f"{path} does not exist. Write it with `wmss-trl score`.") from error
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not a Parquet file ({error}). Write one with `wmss-trl score`.") from error
        required = ("index", "tokens", "weak_entropy", "strong_entropy")
        lacking = [column for column in required if column not in table.column_names]
        if lacking:
            raise ValueError(
                f"{path} has no column {lacking}; it has {table.column_names}. Write it with `wmss-trl score`."
            )
        index, *columns = (table[column].to_numpy() for column in required)
        found, counts = np.unique(index, return_counts=True)
        missing = np.setdiff1d(np.arange(len(index)), found)
        if len(missing):
            repeated = found[counts > 1]
            raise ValueError(
                f"The `index` column of {path} must hold 0 to {len(index) - 1}, each once, but {_some(missing)} are "
                f"missing{f' and {_some(repeated)} are repeated' if len(repeated) else ''}. Score the data set again."
            )
        tokens, weak_entropy, strong_entropy = (column[np.argsort(index)] for column in columns)
        weak_entropy = checked_entropy(f"weak_entropy in {path}", weak_entropy)
        strong_entropy = checked_entropy(f"strong_entropy in {path}", strong_entropy)
        identity = json.loads((table.schema.metadata or {}).get(b"wmss_trl", b"{}"))
        return cls(tokens, weak_entropy.astype(np.float32), strong_entropy.astype(np.float32), identity)

    def check_dataset(self, path: str | Path, fingerprint: str, token_counts: np.ndarray) -> None:
        """Raise a `ValueError` unless the table, read from `path`, is that of the data set."""
        same = self.identity.get("train_dataset", fingerprint) == fingerprint
        if not same or not np.array_equal(self.tokens, token_counts):
            raise ValueError(
                f"`score_file={str(path)!r}` holds the scores of another data set ({len(self.tokens)} examples with "
                f"{self.tokens.sum()} supervised tokens; here {len(token_counts)} with {token_counts.sum()}). Score "
                "this one with the same tokenizer, `max_length` and masks as the run."
            )

    def draw(self, active_fraction: float = 0.63, *, replacement: bool = False, seed: int = 42, **term_options: Any):
        """
        Fill in `weight` and `drawn` as the first weak-driven epoch of a run with `seed` would.

        Args:
            active_fraction, replacement, seed, term_options:
                See [`~wmss_trl.CurriculumSampler`].
        """
        self.weight = sampling_weights(self.weak_entropy, self.strong_entropy, **term_options)
        num_active = max(1, round(active_fraction * len(self.tokens)))
        drawn = draw_active_set(self.weight, num_active, replacement=replacement, seed=(seed, 0))
        self.drawn = np.bincount(drawn, minlength=len(self.tokens))

    def to_dataset(self) -> Dataset:
        """The table as a [`~datasets.Dataset`]."""
        return Dataset(self._arrow())

    def write(self, path: str | Path) -> None:
        """Write a Parquet file; an interrupted write leaves what was there."""
        with replacing(Path(path)) as partial:
            pq.write_table(self._arrow(), partial)

    def _arrow(self) -> pa.Table:
        columns = {
            "index": np.arange(len(self.tokens)),
            "tokens": self.tokens,
            "weak_entropy": self.weak_entropy,
            "strong_entropy": self.strong_entropy,
            "delta_entropy": self.strong_entropy.astype(np.float64) - self.weak_entropy,
            "weight": self.weight,
            "drawn": self.drawn,
        }
        table = pa.table({name: values for name, values in columns.items() if values is not None})
        return table.replace_schema_metadata({"wmss_trl": json.dumps(self.identity)})


def _some(values: np.ndarray) -> str:
    return f"{values[:10].tolist()}{' and more' if len(values) > 10 else ''}"
