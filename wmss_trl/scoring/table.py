"""The table of scores, weights and draws that a run can start from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..curriculum.weights import checked_entropy, draw_active_set, sampling_weights
from ..files import replacing


@dataclass
class ScoreTable:
    """
    Scores of a data set as a table of one row per example. It is kept as a Parquet file.

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
        Read a Parquet file. Its rows may be in any order.

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
        """Write a Parquet file. If that is interrupted, the old file stays."""
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
