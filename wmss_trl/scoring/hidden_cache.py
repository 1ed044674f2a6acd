"""Hidden states of the frozen weak model on disk. Training reads them instead of running the model."""

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

# Column that tells the collator which examples a batch holds
INDEX_COLUMN = "example_index"
# An example's mark on disk, 0 for none
_MARK = np.dtype("<u8")
_ZEROS_AT_ONCE = 2**24


class HiddenCache:
    """
    Last hidden states of a model at the supervised positions of a data set, in a file.

    Every process writes the examples that it has scored into the same file, so all need the same folder. Several runs
    may share it. A second file holds a checksum of each example that has been written. After an interrupted run or a
    crash of the machine, a later run can tell from it which examples are whole.

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

    Attributes:
        done (`np.ndarray` of shape `(n,)`):
            Whether this run knows that the hidden states of an example are in the file. The same on every process.
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
        self.marks_path = Path(folder) / f"{key}.marks"
        self.token_counts = token_counts
        self.offsets = np.concatenate([[0], token_counts.cumsum()])
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.done = np.zeros(len(token_counts), dtype=bool)
        self._row_bytes = hidden_size * dtype.itemsize
        self._written: dict[int, int] = {}  # marks of the examples that may not be on the disk yet
        self._file: BinaryIO | None = None
        self._rows: np.ndarray | None = None

    @property
    def num_bytes(self) -> int:
        return int(self.offsets[-1]) * self._row_bytes

    @property
    def complete(self) -> bool:
        return bool(self.done.all())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "_rows": None}  # a worker maps the file itself

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
        existing = next(folder for folder in self.path.absolute().parents if folder.exists())
        free = shutil.disk_usage(existing).free
        if self.num_bytes - _size(self.path) > free:
            raise self._too_little(f"only {free / 2**30:.2f} GiB are free")

    def _too_little(self, problem: str) -> ValueError:
        return ValueError(
            f"`weak_cache='hidden'` needs {self._need} in {self.path.parent}, but {problem}. Free some space, put "
            "`weak_cache_dir` on another disk, or set `weak_cache=None`."
        )

    @contextmanager
    def _disk_errors_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise self._too_little(f"the disk is full ({error})") from error

    def create(self, log: Callable[[str], None]) -> None:
        """
        Make the files with all of their room on the disk, unless they are there. The main process calls this before
        the others go on.

        Raises:
            ValueError: If the disk has less room than they need.
        """
        sizes = {self.path: self.num_bytes, self.marks_path: _MARK.itemsize * len(self.done)}
        if all(_size(path) >= size for path, size in sizes.items()):
            return
        self.check_room()
        log(f"The weak model's hidden states take {self._need} in {self.path.parent}.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path, size in sizes.items():
            is_new = not path.exists()
            try:
                # Not truncated: another run may just have made it and be writing into it
                with self._disk_errors_explained(), path.open("ab") as file:
                    _allocate(file, size)
            except BaseException:
                if is_new:
                    path.unlink(missing_ok=True)
                raise

    def find_whole(self) -> np.ndarray:
        """Which examples an earlier run has left whole. Reads both files. For the main process."""
        whole = np.zeros_like(self.done)
        if _size(self.path) < self.num_bytes or _size(self.marks_path) < _MARK.itemsize * len(whole):
            return whole
        marks, rows = np.fromfile(self.marks_path, _MARK, count=len(whole)), self._mapped_rows()
        for index in np.flatnonzero(marks):
            whole[index] = marks[index] == _mark(rows[self.offsets[index] : self.offsets[index + 1]])
        self._rows = None
        return whole

    def write(self, indices: np.ndarray, hidden: Sequence[Tensor]) -> None:
        """
        Write the hidden states of some examples; [`flush`] brings them to the disk.

        Args:
            indices (`np.ndarray`):
                The examples.
            hidden (`list[torch.Tensor]`):
                For each of them the hidden states at its supervised positions, of shape `(tokens, hidden_size)`.

        Raises:
            ValueError: If an example has another number of supervised positions than the data set gives it.
        """
        if self._file is None:
            self._file = self.path.open("r+b")
        for index, rows in zip(indices.tolist(), hidden, strict=True):
            check_positions(int(self.token_counts[index]), len(rows), f"example {index}")
            # Not through a memory map. On a full disk that would end the process. On a disk shared with another
            # machine it would write the rows of neighbouring examples too
            data = rows.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
            with self._disk_errors_explained():
                self._file.seek(int(self.offsets[index]) * self._row_bytes)
                self._file.write(data)
            self._written[index] = _mark(data)

    def flush(self, done: np.ndarray) -> None:
        """
        Bring to the disk what this process has written, and mark it only after that.

        Args:
            done (`np.ndarray` of shape `(n,)`):
                The examples that all processes together have written.
        """
        if self._file is not None:
            with self._disk_errors_explained():
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
            self._file = None
            with self.marks_path.open("r+b") as file:
                for index, mark in self._written.items():
                    file.seek(_MARK.itemsize * index)
                    file.write(np.array(mark, _MARK).tobytes())
            self._written.clear()
        self._rows = None
        self.done = done.copy()

    def read(self, indices: list[int]) -> Tensor:
        """Hidden states of some examples, one after the other, of shape `(tokens, hidden_size)`."""
        rows = self._mapped_rows()
        parts = [rows[self.offsets[index] : self.offsets[index + 1]] for index in indices]
        return torch.from_numpy(np.concatenate(parts)).view(self.dtype)

    def _mapped_rows(self) -> np.ndarray:
        if self._rows is None:
            shape = (int(self.offsets[-1]), self._row_bytes)
            self._rows = np.memmap(self.path, np.uint8, mode="r", shape=shape)
        return self._rows


def _mark(rows: np.ndarray) -> int:
    """The mark of an example that has been written: its checksum, and one bit so that it is never 0."""
    return 1 << 32 | zlib.crc32(np.ascontiguousarray(rows))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _allocate(file: BinaryIO, size: int) -> None:
    """Make a file that is opened for appending at least `size` bytes long, all on the disk. Its content stays."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:  # a file system that cannot
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    for start in range(file.seek(0, os.SEEK_END), size, _ZEROS_AT_ONCE):
        file.write(bytes(min(_ZEROS_AT_ONCE, size - start)))


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
