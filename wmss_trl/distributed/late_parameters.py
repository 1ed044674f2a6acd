"""Parameters that are trained only from some epoch on."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import TrainerCallback


class LateParameters(TrainerCallback):
    """
    Callback for parameters that an optimizer is given long before they are trained.

    Most optimizers skip a parameter that has no gradient. DeepSpeed does not: it flattens each parameter group and
    steps it with zero gradients. Then weights decay, and Adam's step count grows while its moments are zero. FSDP2
    cannot load a checkpoint in which a parameter has no state.

    Args:
        optimizer (`torch.optim.Optimizer`):
            An optimizer without states. The parameters get groups of their own.
        parameters (`Iterable[torch.nn.Parameter]`):
            The parameters that are trained later.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]):
        late = {id(parameter) for parameter in parameters}
        groups, self.weight_decays = [], {}
        for group in optimizer.param_groups:
            for is_late in (False, True):
                members = [parameter for parameter in group["params"] if (id(parameter) in late) == is_late]
                if members and is_late:
                    self.weight_decays[len(groups)] = group.get("weight_decay", 0.0)
                if members:
                    groups.append(group | {"params": members})
        optimizer.param_groups[:] = groups

    def wait(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave the parameters as they are in the steps to come."""
        for index in self.weight_decays:
            optimizer.param_groups[index]["weight_decay"] = 0.0

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        for index in self.weight_decays:
            for parameter in optimizer.param_groups[index]["params"]:
                if parameter.grad is None and parameter not in optimizer.state:
                    parameter.grad = torch.zeros_like(parameter)

    def train(self, optimizer: torch.optim.Optimizer, first: bool) -> None:
        """Train the parameters in the steps to come. If these are the `first` ones, they begin with fresh states."""
        for index, weight_decay in self.weight_decays.items():
            optimizer.param_groups[index]["weight_decay"] = weight_decay
        for parameter in self._stepped_parameters(optimizer) if first else ():
            state = optimizer.state.get(parameter, {})
            if "step" in state:  # the moments are still those of zero gradients
                state["step"] = 0 * state["step"]

    def _stepped_parameters(self, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        """The parameters as the optimizer knows them. Private to DeepSpeed, checked with 0.19: ZeRO-3 keeps its flat
        parts of a group outside of the groups."""
        zero3 = getattr(optimizer, "optimizer", None)
        if hasattr(zero3, "fp32_partitioned_groups_flat"):
            parts = enumerate(zero3.fp32_partitioned_groups_flat)
            return [part for number, part in parts if zero3.sub_group_to_group_id[number] in self.weight_decays]
        return [parameter for index in self.weight_decays for parameter in optimizer.param_groups[index]["params"]]
