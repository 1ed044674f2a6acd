"""Loss and calibration of the strong model and of the mixture on held-out data."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from ..losses.entropy import next_token_targets
from ..losses.mixed import mixed_loss
from ..modeling.modes import evaluating


def evaluate_mixture(
    strong: nn.Module,
    weak: nn.Module,
    dataset: Dataset,
    data_collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    mixing_lambda: float,
    batch_size: int = 8,
) -> dict[str, float]:
    """
    Compare a model with its mixture with a weak model under teacher forcing.

    If the mixture is much better than the strong model alone, that is the sign of burden sharing. The strong model
    then leans on the weak one, but it is used without it.

    Args:
        strong (`torch.nn.Module`):
            Model whose forward returns `.logits`.
        weak (`torch.nn.Module`):
            Weak model with the same vocabulary.
        dataset (`datasets.Dataset`):
            Tokenized data set with `input_ids` and, optionally, `labels`.
        data_collator (`Callable`):
            Turns a list of examples into a padded batch with `labels`.
        mixing_lambda (`float`):
            Weight of the strong logits in the mix.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of examples in a forward pass.

    Returns:
        `dict[str, float]`: averages over the supervised tokens. `nll`, `entropy` and `wrong_mass` (probability of all
        wrong tokens, `1 - P(y)`, which is the size of SFT's gradient on them) of the strong model; `mixed_nll` and
        `mixed_wrong_mass` of the mixture; `amplification`, the ratio of the two masses; `mixed_strong_gradient`,
        `lambda * (1 - P_mix(y))`, the part of the mixture's gradient that reaches the strong model. Entropy and NLL in
        nats.
    """
    device = next(strong.parameters()).device
    sums = np.zeros(5)
    num_items = 0
    with evaluating(strong), evaluating(weak):
        for start in range(0, len(dataset), batch_size):
            examples = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            batch = {key: value.to(device) for key, value in data_collator(examples).items()}
            targets = next_token_targets(batch.pop("labels"))
            z_strong, z_weak = (model(**batch, use_cache=False).logits.flatten(0, 1) for model in (strong, weak))
            output = mixed_loss(z_strong, z_weak, targets, mixing_lambda)
            num_items += int(output.mask.sum())
            sums += [
                -output.strong_log_probs.sum().item(),
                output.strong_entropy.sum().item(),
                -torch.expm1(output.strong_log_probs).sum().item(),
                -output.mixed_log_probs.sum().item(),
                -torch.expm1(output.mixed_log_probs).sum().item(),
            ]
    nll, entropy, wrong_mass, mixed_nll, mixed_wrong_mass = (sums / max(num_items, 1)).tolist()
    return {
        "nll": nll,
        "entropy": entropy,
        "wrong_mass": wrong_mass,
        "mixed_nll": mixed_nll,
        "mixed_wrong_mass": mixed_wrong_mass,
        "amplification": mixed_wrong_mass / wrong_mass,
        "mixed_strong_gradient": mixing_lambda * mixed_wrong_mass,
    }
