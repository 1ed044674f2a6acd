"""Packing the active set: several documents in a row. A padding-free forward keeps them apart."""

from bisect import bisect_left, insort
from itertools import chain
from typing import Any

import numpy as np
import torch
from datasets import Dataset

# Like TRL's packing: the search for room stays short
_DOCUMENTS_PER_BLOCK = 1000


def best_fit_decreasing(lengths: np.ndarray, row_length: int) -> list[list[int]]:
    """
    Pack documents into rows: the longest first, each into the row that it fills best.

    Args:
        lengths (`np.ndarray` of shape `(n,)`):
            Number of tokens of each document, at most `row_length`.
        row_length (`int`):
            Number of tokens that fit into a row.

    Returns:
        `list[list[int]]`: positions of the documents in each row.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # free tokens and number of each row, sorted
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        best = bisect_left(spaces, (length,))
        if best < len(spaces):
            space, row = spaces.pop(best)
            rows[row].append(document)
        else:
            space, row = row_length, len(rows)
            rows.append([document])
        insort(spaces, (space - length, row))
    return rows


def pack_prefix(order: np.ndarray, lengths: np.ndarray, row_length: int, num_rows: int) -> list[np.ndarray]:
    """
    Pack the longest prefix of a draw that fits into `num_rows` rows.

    Args:
        order (`np.ndarray`):
            Indices of documents in the order of the draw.
        lengths (`np.ndarray` of shape `(n,)`):
            Number of tokens of each document of the data set, at most `row_length`.
        row_length (`int`):
            Number of tokens that fit into a row.
        num_rows (`int`):
            Number of rows.

    Returns:
        `list[np.ndarray]`: document indices of each row; fewer than `num_rows` rows if the documents do not fill them.
    """
    rows: list[np.ndarray] = []
    for start in range(0, len(order), _DOCUMENTS_PER_BLOCK):
        block, room = order[start : start + _DOCUMENTS_PER_BLOCK], num_rows - len(rows)
        packed = best_fit_decreasing(lengths[block], row_length)
        if len(packed) > room:
            fits, too_many = 0, len(block)
            while too_many - fits > 1:
                middle = (fits + too_many) // 2
                if len(best_fit_decreasing(lengths[block[:middle]], row_length)) <= room:
                    fits = middle
                else:
                    too_many = middle
            return rows + [block[row] for row in best_fit_decreasing(lengths[block[:fits]], row_length)]
        rows += [block[row] for row in packed]
    return rows


class PackedDocuments(torch.utils.data.Dataset):
    """
    Rows of documents, put together when they are asked for.

    Args:
        documents (`datasets.Dataset`):
            Tokenized documents with the columns `input_ids` and `labels`.
    """

    def __init__(self, documents: Dataset):
        self.documents = documents.select_columns(["input_ids", "labels"])

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, row: tuple[int, ...]) -> dict[str, Any]:
        """The documents of `row` one after the other, with their lengths as `seq_lengths`, like TRL's packed rows."""
        documents = self.documents[list(row)]
        return {
            "input_ids": list(chain.from_iterable(documents["input_ids"])),
            "labels": list(chain.from_iterable(documents["labels"])),
            "seq_lengths": [len(ids) for ids in documents["input_ids"]],
        }
