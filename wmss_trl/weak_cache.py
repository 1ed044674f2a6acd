"""Hidden states of the frozen weak model on disk, so that training reads them instead of running it."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Column that tells the collator which examples a batch holds
INDEX_COLUMN = "example_index"


class HiddenCache:
    """
    Last hidden states of a model at the supervised positions of a data set, in a memory-mapped file.

    Every process maps the same file and writes the examples that it has scored, so all need the same folder.

    Args:
        folder (`str` or `Path`):
            Where the files are.
        identity (`dict[str, Any]`):
            What the hidden states depend on, in JSON types: data set, model, precision.
        token_counts (`np.ndarray` of shape `(n,)`):
            Number of supervised tokens of each example.
        hidden_size (`int`):
            Width of the hidden states.
        dtype (`torch.dtype`):
            Their dtype on disk.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: Mapping[str, Any],
        token_counts: np.ndarray,
        hidden_size: int,
        dtype: torch.dtype,
    ):
        self.identity = {**identity, "hidden_size": hidden_size, "dtype": str(dtype)}
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        self.path = Path(folder) / f"{key}.hidden"
        self.done_path = Path(folder) / f"{key}.done"
        self.token_counts = token_counts
        self.offsets = np.concatenate([[0], token_counts.cumsum()])
        self.hidden_size = hidden_size
        self.dtype = dtype
        self._hidden: Tensor | None = None
        self._done: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return int(self.offsets[-1]) * self.hidden_size * self.dtype.itemsize

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_hidden": None, "_done": None}  # a worker maps the files itself

    @property
    def _need(self) -> str:
        return (
            f"{self.offsets[-1]:,} tokens x {self.hidden_size} x {self.dtype.itemsize} bytes = "
            f"{self.num_bytes / 2**30:.2f} GiB"
        )

    def check_room(self) -> None:
        """
        Check that the files are there or fit onto the disk.

        Raises:
            ValueError: If the disk has less room than they need.
        """
        if self.done_path.exists() and self.path.exists():
            return
        existing = next(folder for folder in self.path.absolute().parents if folder.exists())
        free = shutil.disk_usage(existing).free
        if self.num_bytes > free:
            raise ValueError(
                f"`weak_cache='hidden'` needs {self._need} in {self.path.parent}, but only {free / 2**30:.2f} GiB are "
                "free. Free some space, put `weak_cache_dir` on another disk, or set `weak_cache=None`."
            )

    def create(self, log: Callable[[str], None]) -> None:
        """Make the files, unless they are there. For the main process, before the others go on."""
        if self.done_path.exists() and self.path.exists():
            return
        self.check_room()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        log(f"The weak model's hidden states take {self._need} in {self.path.parent}.")
        for path, size in ((self.path, self.num_bytes), (self.done_path, len(self.token_counts))):
            with path.open("wb") as file:
                file.truncate(size)

    def done(self) -> np.ndarray:
        """Whether each example's hidden states have been written."""
        if self._done is None:
            self._done = torch.from_file(
                str(self.done_path), shared=True, size=len(self.token_counts), dtype=torch.bool
            )
        return self._done.numpy()

    @property
    def complete(self) -> bool:
        return self.done_path.exists() and self.path.exists() and bool(self.done().all())

    def write(self, indices: np.ndarray, hidden: Sequence[Tensor]) -> None:
        """
        Keep the hidden states of some examples.

        Args:
            indices (`np.ndarray`):
                The examples.
            hidden (`list[torch.Tensor]`):
                For each of them the hidden states at its supervised positions, of shape `(tokens, hidden_size)`.

        Raises:
            ValueError: If an example has another number of supervised positions than the data set gives it.
        """
        for index, rows in zip(indices.tolist(), hidden, strict=True):
            check_positions(int(self.token_counts[index]), len(rows), f"example {index}")
            self._rows()[self.offsets[index] : self.offsets[index + 1]] = rows
        self.done()[indices] = True

    def read(self, indices: list[int]) -> Tensor:
        """Hidden states of some examples, one after the other, of shape `(tokens, hidden_size)`."""
        rows = self._rows()
        return torch.cat([rows[self.offsets[index] : self.offsets[index + 1]] for index in indices])

    def _rows(self) -> Tensor:
        if self._hidden is None:
            size = int(self.offsets[-1]) * self.hidden_size
            self._hidden = torch.from_file(str(self.path), shared=True, size=size, dtype=self.dtype)
        return self._hidden.view(-1, self.hidden_size)


def check_positions(num_hidden: int, num_positions: int, where: str = "a training batch") -> None:
    """Raise a `ValueError` unless there are as many cached hidden states as supervised positions."""
    if num_hidden != num_positions:
        raise ValueError(
            f"`weak_cache='hidden'` has {num_hidden} hidden states for {where}, which has {num_positions} supervised "
            "positions: `data_collator` has changed its tokens or labels. Set `weak_cache=None`, or leave "
            "`data_collator` to the trainer."
        )


class CachedHiddenCollator:
    """
    Data collator that adds the weak model's hidden states to a batch as `weak_hidden`.

    Args:
        data_collator (`Callable`):
            Makes the rest of the batch.
        cache ([`HiddenCache`]):
            The hidden states.
    """

    def __init__(self, data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]], cache: HiddenCache):
        self.data_collator = data_collator
        self.cache = cache

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        indices = [example[INDEX_COLUMN] for example in examples]
        rest = [{key: value for key, value in example.items() if key != INDEX_COLUMN} for example in examples]
        return {**self.data_collator(rest), "weak_hidden": self.cache.read(indices)}
