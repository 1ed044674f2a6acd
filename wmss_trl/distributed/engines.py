"""The engine that distributes a run. What can run on it, and how a frozen model is prepared for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from ..compatibility import checkpointing_kwargs, checkpointing_option

if TYPE_CHECKING:
    from ..config import WMSSConfig


T = TypeVar("T")


def engine_name(accelerator: Accelerator) -> str:
    """`"replicated"` (one process or DDP), `"fsdp1"`, `"fsdp2"`, or `"zero0"` to `"zero3"`."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp2" if accelerator.is_fsdp2 else "fsdp1"
    return "replicated"


def checkpoint_form(args: "WMSSConfig", accelerator: Accelerator) -> str:
    """The engine, and where it matters the number of processes, that a checkpoint can only be resumed with."""
    engine = engine_name(accelerator)
    splits_files = engine.startswith("zero") or (engine == "fsdp2" and args.weak_refresh == "epoch")
    return f"{engine}, {accelerator.num_processes} processes" if splits_files else engine


def on_main_process(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call a function on the main process alone and return its result on all. All processes must call this together.
    An error of the function is raised on each of them, so that none waits for the others."""
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

    TRL's DPOTrainer prepares its reference model in the same way, with one difference. Here FSDP2 shards each layer by
    itself. As one unit, the whole model would be gathered at once.
    """
    engine = engine_name(accelerator)
    if engine.startswith("zero"):
        from trl.models import prepare_deepspeed

        return prepare_deepspeed(model, accelerator)
    if engine != "fsdp2":
        return accelerator.prepare_model(model, evaluation_mode=True)
    # Accelerate keeps the layer classes of the first model that it sees. That must be the strong one
    plugin = accelerator.state.fsdp_plugin
    policy, layers = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    plugin.transformer_cls_names_to_wrap = None
    try:
        return fsdp2_prepare_model(accelerator, model).eval()
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = policy, layers


def add_unit(strong: nn.Module, branch: nn.Module, accelerator: Accelerator) -> None:
    """Let FSDP2 make units of a branch of the strong model and of its layers, so that the branch can run alone."""
    classes = {*branch._no_split_modules, type(branch).__name__}
    strong._no_split_modules = {*strong._no_split_modules, *classes}
    if engine_name(accelerator) == "fsdp2":
        plugin = accelerator.state.fsdp_plugin
        if plugin.transformer_cls_names_to_wrap is not None:
            plugin.transformer_cls_names_to_wrap = [*{*plugin.transformer_cls_names_to_wrap, *classes}]
