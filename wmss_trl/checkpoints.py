"""What is taken up of a checkpoint."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def without_parameters(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let the optimizer load states that were saved without some of its parameters, which start with fresh ones."""
    absent = {id(parameter) for parameter in parameters}
    whole = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in absent]
    try:
        yield
    finally:
        for group, members in zip(optimizer.param_groups, whole, strict=True):  # groups that loading has replaced
            group["params"] = members
