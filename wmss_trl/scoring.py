"""Per-example predictive entropy of a model over a data set (phase 2 of arXiv 2602.08222)."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

from .curriculum import check_finite
from .lm_head import LMHead, evaluating, unwrap_adapter
from .losses import linear_entropy, next_token_targets, token_entropy


def _list_arrays(dataset: Dataset, column: str) -> Iterator[pa.ListArray]:
    """The lists of a column as Arrow arrays, since Python lists of every token take minutes on a large data set."""
    for table in dataset.select_columns(column).with_format("arrow").iter(batch_size=10_000):
        yield table[column].combine_chunks()


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


def score_entropy(
    model: nn.Module,
    dataset: Dataset,
    data_collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    batch_size: int = 8,
    *,
    accelerator: Accelerator | None = None,
    description: str = "Scoring",
    disable_tqdm: bool = False,
    buffer_bytes: int = 256 * 2**20,
) -> np.ndarray:
    """
    Predictive entropy of each example, averaged over its supervised tokens, under teacher forcing:

        H(M; x_i) = -(1/|T_i|) sum_{t in T_i} sum_v P(v | x_<t) log P(v | x_<t)

    Args:
        model (`torch.nn.Module`):
            Causal language model whose forward returns `.logits`. Scored in eval mode, restored afterwards.
        dataset (`datasets.Dataset`):
            Tokenized data set with an `input_ids` column and, optionally, `labels` (`-100` on unsupervised tokens).
        data_collator (`Callable`):
            Turns a list of examples into a padded batch with `labels` of shape `(batch, sequence)`, one row per
            example.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of examples in a forward pass. The result does not depend on it beyond float rounding.
        accelerator ([`~accelerate.Accelerator`], *optional*):
            If given, its processes share the batches and all get the whole result.
        description (`str`, *optional*, defaults to `"Scoring"`):
            Label of the progress bar.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to hide the progress bar.
        buffer_bytes (`int`, *optional*, defaults to 256 MiB):
            Memory for the logits of a model patched by [`~wmss_trl.lm_head.add_head_access`], as the trainer's are.
            Any other model builds the full logits of each batch.

    Returns:
        `np.ndarray` of shape `(n,)`: float32 entropies in nats, in data-set order.

    Raises:
        ValueError: If an entropy is NaN or infinite (with the example indices), or an example has no supervised token.
    """
    lengths = np.concatenate([ids.value_lengths().to_numpy() for ids in _list_arrays(dataset, "input_ids")])
    # Examples of similar length share a batch, so little is padded; the longest come first, so a lack of memory shows
    # at once
    order = np.argsort(-lengths, kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)

    device = next(model.parameters()).device
    entropy = torch.zeros(len(dataset), dtype=torch.float32, device=device)
    progress = tqdm(
        total=len(dataset), desc=description, unit=" examples", disable=disable_tqdm or rank != 0, dynamic_ncols=True
    )
    with progress, evaluating(model):
        for first in range(0, len(batches), world_size):
            share = batches[first : first + world_size]
            # Every rank runs the same number of forwards (sharded models would hang otherwise): the ranks that the
            # last round leaves without a batch repeat one and drop the result.
            indices = share[min(rank, len(share) - 1)]
            scores = _batch_entropy(model, data_collator([dataset[int(i)] for i in indices]), device, buffer_bytes)
            if rank < len(share):
                entropy[torch.from_numpy(indices).to(device)] = scores
            progress.update(sum(map(len, share)))
    if accelerator is not None:
        entropy = accelerator.reduce(entropy, reduction="sum")
    entropy = entropy.cpu().numpy()
    check_finite(f"entropy ({description})", entropy)
    return entropy


def _batch_entropy(
    model: nn.Module, batch: dict[str, torch.Tensor], device: torch.device, buffer_bytes: int
) -> torch.Tensor:
    batch = {key: value.to(device) for key, value in batch.items()}
    labels = batch.pop("labels")
    mask = next_token_targets(labels) != -100
    if getattr(unwrap_adapter(model), "has_head_access", False):

        def entropy(hidden: torch.Tensor, head: LMHead) -> torch.Tensor:
            return linear_entropy(hidden, head.weight, head.bias, head.scale, head.softcap, buffer_bytes)

        positions = mask.nonzero().squeeze(-1)
        per_token = torch.zeros(len(mask), device=device)
        per_token[positions] = model(**batch, positions=positions, with_lm_head=entropy).value.float()
    else:
        per_token = token_entropy(model(**batch, use_cache=False).logits.flatten(0, 1), mask)
    # 0 / 0 is NaN, which the caller reports
    return per_token.view(labels.shape).sum(-1) / mask.view(labels.shape).sum(-1)
