"""The engine that distributes a run: what can run on it, and how a frozen model is prepared for it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import TrainerCallback

from .compatibility import checkpointing_kwargs, checkpointing_option

if TYPE_CHECKING:
    from .config import WMSSConfig


T = TypeVar("T")


def engine_name(accelerator: Accelerator) -> str:
    """`"replicated"` (one process or DDP), `"fsdp1"`, `"fsdp2"`, or `"zero0"` to `"zero3"`."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp2" if accelerator.is_fsdp2 else "fsdp1"
    return "replicated"


def checkpoint_form(args: "WMSSConfig", accelerator: Accelerator) -> str:
    """What a checkpoint can only be resumed with."""
    engine = engine_name(accelerator)
    splits_files = engine.startswith("zero") or (engine == "fsdp2" and args.weak_refresh == "epoch")
    return f"{engine}, {accelerator.num_processes} processes" if splits_files else engine


def on_main_process(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """What a function returns that the main process alone calls. All processes must call this together; an error of
    the function's is raised on each, so that none waits for the others."""
    result, error = None, None
    if accelerator.is_main_process:
        try:
            result = function()
        except (OSError, ValueError) as raised:
            error = raised
    result, error = broadcast_object_list([result, error])
    if error is not None:
        raise error
    return result


@contextmanager
def whole_state_dict(accelerator: Accelerator) -> Iterator[None]:
    """Let FSDP2 gather the state dict of a model while the context lasts."""
    if engine_name(accelerator) != "fsdp2":
        yield
        return
    plugin = accelerator.state.fsdp_plugin
    before = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.set_state_dict_type(before)


def check_engine(args: "WMSSConfig", accelerator: Accelerator, has_adapter: bool) -> None:
    """
    Check that a run can be distributed as it is launched.

    Raises:
        ValueError: If it cannot; the message says why and names an alternative.
    """
    parallelism = accelerator.parallelism_config
    if parallelism is not None and (parallelism.tp_enabled or parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            f"`tp_size={parallelism.tp_size}`, `cp_size={parallelism.cp_size}`, `sp_size={parallelism.sp_size}`: "
            "tensor, context and sequence parallelism would split the weak model, its hidden states and the entropy "
            "of an example over processes, which WMSSTrainer does not do. Set all of them to 1; for long sequences "
            "use FSDP2 or ZeRO-3 with activation checkpointing and `weak_cache='hidden'`."
        )
    engine = engine_name(accelerator)
    if engine == "fsdp1":
        raise ValueError(
            "`fsdp_version: 1` flattens the parameters of several layers into one, so that the weak model cannot be "
            "compared, refreshed or trained beside the strong one. Set `fsdp_version: 2` (`accelerate to-fsdp2` "
            "converts a configuration), or use ZeRO-3."
        )
    if engine.startswith("zero"):
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        steps = config.get("gradient_accumulation_steps", "auto")
        if steps not in ("auto", args.gradient_accumulation_steps):
            raise ValueError(
                f"The DeepSpeed configuration has `gradient_accumulation_steps: {steps}`, but the arguments have "
                f"`gradient_accumulation_steps={args.gradient_accumulation_steps}`. Set it to 'auto' there (in a JSON "
                "file that does not name it, it is 1)."
            )
        if args.train_weak and args.sft_epochs and "optimizer" in config:
            raise ValueError(
                "`train_weak=True` starts the weak model's optimizer states after phase 1, which the optimizer of the "
                "DeepSpeed configuration cannot do. Remove `optimizer` there and set `optim`, or set `sft_epochs=0`."
            )
    if args.train_weak and has_adapter and checkpointing_kwargs(args).get("use_reentrant"):
        raise ValueError(
            "`train_weak=True` recomputes a layer with the adapter that ran it, which "
            f"`{checkpointing_option()}_kwargs={{'use_reentrant': True}}` cannot do. Set it to False, or "
            f"`{checkpointing_option()}=False` under ZeRO-3 before transformers 5.23, where TRL sets it."
        )
    if engine == "fsdp2" and args.train_weak:
        plugin = accelerator.state.fsdp_plugin
        if plugin.auto_wrap_policy is not transformer_auto_wrap_policy and not has_adapter:
            raise ValueError(
                "`train_weak=True` makes the weak model an FSDP unit, since it is also run alone. Set "
                "`fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP`."
            )
        if args.torch_compile and not has_adapter:
            raise ValueError(
                "`train_weak=True` makes the weak model an FSDP unit inside the strong one, which "
                "`torch_compile=True` hides. Set it to False."
            )
        if plugin.activation_checkpointing and has_adapter:
            raise ValueError(
                "`train_weak=True` recomputes a layer with the adapter that ran it, which "
                "`fsdp_activation_checkpointing: true` cannot do. Set it to false and the argument "
                f"`{checkpointing_option()}=True`."
            )
        if plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT and has_adapter:
            raise ValueError(
                "`fsdp_state_dict_type: SHARDED_STATE_DICT` keeps one adapter of a model, but `train_weak=True` "
                "trains two. Set it to FULL_STATE_DICT: adapters are small."
            )


def check_goes_on_from_sft(checkpoint: Path, args: "WMSSConfig", accelerator: Accelerator) -> None:
    """
    Check that a run can take up a checkpoint of plain SFT.

    Raises:
        ValueError: If it trains two branches under an engine that loads the states of both or of none.
    """
    engine = engine_name(accelerator)
    if args.train_weak and engine != "replicated":
        raise ValueError(
            f"`train_weak=True` cannot go on from {checkpoint}, a checkpoint of plain SFT, under {engine}, which "
            "loads the states of both branches or of none. Start a new run from its model with `sft_epochs=0` and, as "
            "`weak_model`, what SFT started from; or do SFT and this run on one process or with DDP."
        )


def prepare_frozen(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """
    Prepare a frozen model for the engine of a run: sharded by ZeRO-3 and FSDP2, replicated otherwise.

    As TRL's DPOTrainer prepares its reference model, except that FSDP2 shards each layer for itself: as one unit the
    whole model would be gathered at once.
    """
    engine = engine_name(accelerator)
    if engine.startswith("zero"):
        from trl.models import prepare_deepspeed

        return prepare_deepspeed(model, accelerator)
    if engine != "fsdp2":
        return accelerator.prepare_model(model, evaluation_mode=True)
    # Accelerate keeps the layer classes of the first model that it sees, which is to be the strong one
    plugin = accelerator.state.fsdp_plugin
    policy, layers = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    plugin.transformer_cls_names_to_wrap = None
    try:
        return fsdp2_prepare_model(accelerator, model).eval()
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = policy, layers


def add_unit(strong: nn.Module, branch: nn.Module, accelerator: Accelerator) -> None:
    """Let FSDP2 make units of a branch of the strong model and of its layers: it can be run without the strong one."""
    classes = {*branch._no_split_modules, type(branch).__name__}
    strong._no_split_modules = {*strong._no_split_modules, *classes}
    if engine_name(accelerator) == "fsdp2":
        plugin = accelerator.state.fsdp_plugin
        if plugin.transformer_cls_names_to_wrap is not None:
            plugin.transformer_cls_names_to_wrap = [*{*plugin.transformer_cls_names_to_wrap, *classes}]


class LateParameters(TrainerCallback):
    """
    Callback for parameters that an optimizer is given long before they are trained.

    A parameter without a gradient is skipped where it is stepped for itself. But DeepSpeed flattens each parameter
    group and steps it with zero gradients: weights decay, and Adam's step count, which corrects the bias of its
    moments, runs ahead of them. And FSDP2 cannot load a checkpoint in which a parameter has no state.

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
        """Train the parameters in the steps to come, the `first` of which begins with fresh states."""
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
