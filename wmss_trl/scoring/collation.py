"""What a data collator makes of examples. Which tokens belong to which example, and whether it is always the same."""

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..losses.entropy import next_token_targets

DataCollator = Callable[[list[dict[str, Any]]], dict[str, Any]]


def collator_name(data_collator: DataCollator) -> str:
    """What to call a data collator, be it an object or a function."""
    return getattr(data_collator, "__qualname__", type(data_collator).__qualname__)


def collate(data_collator: DataCollator, dataset: Dataset, indices: np.ndarray) -> dict[str, Any]:
    """Batch of some examples of a data set."""
    columns = dataset[indices.tolist()]
    return data_collator([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])


def rows_per_example(values: Tensor, labels: Tensor, lengths: np.ndarray) -> Tensor:
    """
    Give each example of a batch a row of its own.

    Args:
        values (`torch.Tensor` of shape `(B * L,)`):
            One value per token of the batch.
        labels (`torch.Tensor` of shape `(B, L)`):
            Labels of the batch: one row per example, or one row of all examples without padding between them.
        lengths (`np.ndarray` of shape `(n,)`):
            Number of tokens of each example.

    Returns:
        `torch.Tensor` of shape `(n, width)`: the values, 0 after the end of an example.
    """
    if len(labels) == len(lengths):
        return values.view(labels.shape)
    sizes = lengths.tolist()  # `pad_to_multiple_of` may have made the row longer than their sum
    return pad_sequence(values[: sum(sizes)].split(sizes), batch_first=True)


def supervised_tokens(
    batch: dict[str, Any], lengths: np.ndarray, indices: np.ndarray, data_collator: DataCollator
) -> np.ndarray:
    """
    Number of tokens of each example of a batch that carry loss.

    Args:
        batch (`dict[str, Any]`):
            What the collator has returned.
        lengths (`np.ndarray` of shape `(n,)`):
            Number of tokens of each example in the data set.
        indices (`np.ndarray` of shape `(n,)`):
            The examples.
        data_collator (`Callable`):
            The collator.

    Returns:
        `np.ndarray` of shape `(n,)`: int64 token counts.

    Raises:
        ValueError: If the tokens of a row without padding cannot be given to the examples.
    """
    labels = batch["labels"]
    if len(labels) != len(lengths) and not _is_row_of(batch, lengths):
        raise ValueError(
            f"The data collator {collator_name(data_collator)} makes labels of shape {tuple(labels.shape)} from the "
            f"{len(lengths)} examples {indices[:10].tolist()}{' ...' if len(indices) > 10 else ''} of {lengths.sum()} "
            "tokens, so their entropies cannot be told apart. Let it return one padded row per example, or all tokens "
            "in one row with `position_ids`, or set `curriculum=False`."
        )
    return rows_per_example((next_token_targets(labels) != -100).cpu(), labels, lengths).sum(-1).numpy()


def _is_row_of(batch: dict[str, Any], lengths: np.ndarray) -> bool:
    """Whether a batch is one row of examples of these lengths, and maybe padding at its end."""
    labels, num_tokens = batch["labels"], int(lengths.sum())
    if len(labels) != 1 or labels.size(1) < num_tokens:
        return False
    if (position_ids := batch.get("position_ids")) is None:
        return labels.size(1) == num_tokens
    starts = (position_ids.flatten()[:num_tokens] == 0).nonzero().flatten().cpu()
    return np.array_equal(starts.numpy(), lengths.cumsum() - lengths)


def collated_sample(
    data_collator: DataCollator, dataset: Dataset, indices: np.ndarray, batch_size: int, seed: int
) -> tuple[str, list[dict[str, Any]]]:
    """
    Collate some examples with a random state of its own.

    Args:
        data_collator (`Callable`):
            The collator.
        dataset (`datasets.Dataset`):
            The data set.
        indices (`np.ndarray`):
            The examples.
        batch_size (`int`):
            Number of examples in a batch.
        seed (`int`):
            Seed that Python's, NumPy's and PyTorch's global generators get for this.

    Returns:
        `tuple[str, list[dict[str, Any]]]`: a hash of the batches, and the batches.
    """
    with undisturbed_random_state():
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        batches = [
            collate(data_collator, dataset, indices[start : start + batch_size])
            for start in range(0, len(indices), batch_size)
        ]
    digest = hashlib.sha256()
    for batch in batches:
        for key, value in sorted(batch.items()):
            if isinstance(value, Tensor):
                digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            else:
                digest.update(f"{key} {value!r}".encode())
    return digest.hexdigest()[:16], batches


@contextmanager
def undisturbed_random_state() -> Iterator[None]:
    """Restore every random generator that training may use. A collator may draw from them."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
