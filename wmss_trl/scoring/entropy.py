"""Per-example predictive entropy of models over a data set (phase 2 of arXiv 2602.08222)."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..curriculum.weights import checked_entropy
from ..losses.entropy import linear_entropy, next_token_targets, token_entropy
from ..modeling.lm_head import LMHead, whole_lm_head
from ..modeling.modes import evaluating, unwrap_adapter
from .collation import (
    DataCollator,
    collate,
    collator_name,
    rows_per_example,
    supervised_tokens,
    undisturbed_random_state,
)
from .dataset import example_lengths, length_batches

# Forwards per process between two gatherings of the results. An interrupted pass keeps what has been gathered
_ROUNDS_PER_SHARD = 64


def score_entropy(
    model: nn.Module,
    dataset: Dataset,
    data_collator: DataCollator,
    batch_size: int = 8,
    *,
    tokens_per_batch: int | None = None,
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
            Turns a list of examples into a batch with `labels`: one padded row per example, or all of them in one row
            without padding as TRL's collator does with `padding_free=True`.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of examples in a forward pass. The result does not depend on it beyond float rounding.
        tokens_per_batch (`int`, *optional*):
            Number of tokens in a forward pass, padding included. Replaces `batch_size`. A longer example has a forward
            pass of its own.
        accelerator ([`~accelerate.Accelerator`], *optional*):
            If given, its processes share the batches and all get the whole result.
        description (`str`, *optional*, defaults to `"Scoring"`):
            Label of the progress bar.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to hide the progress bar.
        buffer_bytes (`int`, *optional*, defaults to 256 MiB):
            Memory for the logits of a model patched by [`~wmss_trl.modeling.lm_head.add_head_access`], as the
            trainer's are. Any other model builds the full logits of each batch.

    Returns:
        `np.ndarray` of shape `(n,)`: float32 entropies in nats, in data-set order.

    Raises:
        ValueError: If an entropy is NaN or infinite (with the example indices), or the collator leaves an example
            without a supervised token or makes a batch whose tokens cannot be given to the examples.
    """
    return score_models(
        {"model": lambda: nullcontext(model)},
        dataset,
        data_collator,
        batch_size,
        tokens_per_batch=tokens_per_batch,
        accelerator=accelerator,
        description=description,
        disable_tqdm=disable_tqdm,
        buffer_bytes=buffer_bytes,
    )["model"]


def score_models(
    models: Mapping[str, Callable[[], AbstractContextManager[nn.Module]]],
    dataset: Dataset,
    data_collator: DataCollator,
    batch_size: int = 8,
    *,
    tokens_per_batch: int | None = None,
    accelerator: Accelerator | None = None,
    description: str = "Scoring",
    disable_tqdm: bool = False,
    buffer_bytes: int = 256 * 2**20,
    known: Mapping[str, np.ndarray] | None = None,
    on_progress: Callable[[dict[str, np.ndarray]], None] | None = None,
    on_hidden: Mapping[str, Callable[[np.ndarray, tuple[Tensor, ...]], None]] | None = None,
) -> dict[str, np.ndarray]:
    """
    [`score_entropy`] of several models in one pass over the data set. Each example is collated once.

    Args:
        models (`dict[str, Callable]`):
            For each name a function that returns a context manager which gives the model.
        known (`dict[str, np.ndarray]`, *optional*):
            Results of an interrupted pass, NaN where there are none. Only what is missing is computed.
        on_progress (`Callable`, *optional*):
            Receives the results so far, NaN where there are none, every few batches and on every process.
        on_hidden (`dict[str, Callable]`, *optional*):
            A function for some of the models. It receives the indices of a batch's examples, and for each example the
            hidden states of its supervised positions, of shape `(tokens, H)`. It is called on the process that has
            computed them. Needs [`~wmss_trl.modeling.lm_head.add_head_access`].
        dataset, data_collator, batch_size, tokens_per_batch, accelerator, description, disable_tqdm, buffer_bytes:
            See [`score_entropy`].

    Returns:
        `dict[str, np.ndarray]`: the float32 entropies of each model in nats, each of shape `(n,)`.
    """
    lengths = example_lengths(dataset)
    entropies = {name: np.full(len(dataset), np.nan, dtype=np.float32) for name in models}
    for name, values in (known or {}).items():
        entropies[name][:] = values
    unknown = np.any([np.isnan(values) for values in entropies.values()], axis=0)
    batches = [batch for batch in length_batches(lengths, batch_size, tokens_per_batch) if unknown[batch].any()]

    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    progress = tqdm(
        total=len(dataset),
        initial=len(dataset) - sum(map(len, batches)),
        desc=description,
        unit=" examples",
        disable=disable_tqdm or rank != 0,
        dynamic_ncols=True,
    )
    with progress, undisturbed_random_state():
        for first in range(0, len(batches), world_size * _ROUNDS_PER_SHARD):
            shard = batches[first : first + world_size * _ROUNDS_PER_SHARD]
            rounds = [shard[start : start + world_size] for start in range(0, len(shard), world_size)]
            # Every rank runs the same number of forwards, or sharded models would hang. In the last round some ranks
            # may have no batch. They repeat one and drop the result.
            collated = []
            for share in rounds:
                indices = share[min(rank, len(share) - 1)]
                batch = collate(data_collator, dataset, indices)
                counts = supervised_tokens(batch, lengths[indices], indices, data_collator)
                if not counts.all():
                    raise ValueError(
                        f"The data collator {collator_name(data_collator)} leaves the examples "
                        f"{indices[counts == 0].tolist()} without a supervised token, so they have no entropy. Remove "
                        "them, or let it keep some of their labels."
                    )
                collated.append((batch, counts))
            scores = []
            for number, (name, activated) in enumerate(models.items()):
                with activated() as model, evaluating(model):
                    device = accelerator.device if accelerator else next(model.parameters()).device
                    results = torch.zeros(sum(map(len, shard)), device=device)
                    position = 0
                    for share, (batch, counts) in zip(rounds, collated, strict=True):
                        indices = share[min(rank, len(share) - 1)]
                        keep = (on_hidden or {}).get(name) if rank < len(share) else None
                        keep_hidden = None if keep is None else partial(_keep_by_example, keep, indices, counts)
                        entropy = _batch_entropy(model, batch, lengths[indices], device, buffer_bytes, keep_hidden)
                        if rank < len(share):
                            start = position + sum(map(len, share[:rank]))
                            results[start : start + len(share[rank])] = entropy
                        position += sum(map(len, share))
                        if number == len(models) - 1:
                            progress.update(sum(map(len, share)))
                    scores.append(results)
            scores = torch.stack(scores)
            if accelerator is not None:
                scores = accelerator.reduce(scores, reduction="sum")
            indices = np.concatenate(shard)
            for name, values in zip(models, scores.cpu().numpy(), strict=True):
                entropies[name][indices] = checked_entropy(f"entropy ({description}, {name})", values, indices)
            if on_progress is not None:
                on_progress(entropies)
    return entropies


def _keep_by_example(
    keep: Callable[[np.ndarray, tuple[Tensor, ...]], None], indices: np.ndarray, counts: np.ndarray, hidden: Tensor
) -> None:
    keep(indices, hidden.split(counts.tolist()))


def _batch_entropy(
    model: nn.Module,
    batch: dict[str, Any],
    lengths: np.ndarray,
    device: torch.device,
    buffer_bytes: int,
    keep_hidden: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Entropy of each example of a batch. The examples have `lengths` tokens."""
    batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    labels = batch.pop("labels")
    mask = next_token_targets(labels) != -100
    if getattr(unwrap_adapter(model), "has_head_access", False):
        positions = mask.nonzero().squeeze(-1)
        per_token = torch.zeros(len(mask), device=device)

        def entropy(hidden: Tensor, head: LMHead) -> None:  # not returned: FSDP2 rounds what a forward returns
            if keep_hidden is not None:
                keep_hidden(hidden)
            with whole_lm_head(head) as head:
                hidden = hidden.to(head.weight.device)
                values = linear_entropy(hidden, head.weight, head.bias, head.scale, head.softcap, buffer_bytes)
            per_token[positions] = values.float().to(per_token.device)

        model(**batch, positions=positions, with_lm_head=entropy)
    else:
        per_token = token_entropy(model(**batch, use_cache=False).logits.flatten(0, 1), mask)
    per_token, mask = (rows_per_example(values, labels, lengths) for values in (per_token, mask))
    return per_token.sum(-1) / mask.sum(-1)
