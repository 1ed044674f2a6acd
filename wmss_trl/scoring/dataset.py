"""What scoring asks of a data set: lengths, supervised tokens, identity, batches of similar lengths."""

import hashlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from datasets import Dataset


def length_batches(lengths: np.ndarray, batch_size: int = 8, tokens_per_batch: int | None = None) -> list[np.ndarray]:
    """
    Batches of examples of similar length, so that there is little padding. The longest come first, so that a lack of
    memory shows at once.

    Args:
        lengths (`np.ndarray` of shape `(n,)`):
            Number of tokens of each example.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of examples in a batch.
        tokens_per_batch (`int`, *optional*):
            Number of tokens in a batch, padding included. Replaces `batch_size`.

    Returns:
        `list[np.ndarray]`: the indices of each batch's examples.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = batch_size if tokens_per_batch is None else tokens_per_batch // max(1, lengths[order[start]])
        batches.append(order[start : start + max(1, size)])
        start += max(1, size)
    return batches


def example_lengths(dataset: Dataset) -> np.ndarray:
    """Number of tokens of each example of a tokenized data set."""
    lengths = (ids.value_lengths().to_numpy() for ids in _list_arrays(dataset, "input_ids"))
    return np.concatenate([np.zeros(0, dtype=np.int64), *lengths])


def supervised_token_counts(dataset: Dataset) -> np.ndarray:
    """
    Number of tokens of each example that carry loss under the causal shift (the first label is never predicted).

    Args:
        dataset (`datasets.Dataset`):
            Tokenized data set with an `input_ids` column and, optionally, `labels` (`-100` on unsupervised tokens).

    Returns:
        `np.ndarray` of shape `(n,)`: int64 token counts.
    """
    column = "labels" if "labels" in dataset.column_names else "input_ids"
    counts = [np.zeros(0, dtype=np.int64)]
    for labels in _list_arrays(dataset, column):
        lengths = labels.value_lengths().to_numpy()
        supervised = labels.flatten().to_numpy() != -100
        ends = lengths.cumsum()
        supervised[(ends - lengths)[lengths > 0]] = False
        running = np.concatenate([[0], supervised.cumsum()])
        counts.append(running[ends] - running[ends - lengths])
    return np.concatenate(counts)


def dataset_fingerprint(dataset: Dataset) -> str:
    """Hash of the tokens and labels of a tokenized data set. Another tokenizer, `max_length` or mask changes it.
    Another way to the same tokens does not."""
    digest = hashlib.sha256()
    for column in ("input_ids", "labels"):
        if column in dataset.column_names:
            for values in _list_arrays(dataset, column):
                for array in (values.value_lengths(), values.flatten()):
                    digest.update(array.to_numpy().astype(np.int32).tobytes())
    return digest.hexdigest()[:16]


def _list_arrays(dataset: Dataset, column: str) -> Iterator[pa.ListArray]:
    """The lists of a column as Arrow arrays. Python lists of every token would take minutes on a large data set."""
    for table in dataset.select_columns(column).with_format("arrow").iter(batch_size=10_000):
        yield table[column].combine_chunks()
