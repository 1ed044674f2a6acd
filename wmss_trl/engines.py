"""The engine that distributes a run: what can run on it, and how a frozen model is prepared for it."""

from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model
from torch import nn

if TYPE_CHECKING:
    from .config import WMSSConfig


def engine_name(accelerator: Accelerator) -> str:
    """`"replicated"` (one process or DDP), `"fsdp1"`, `"fsdp2"`, or `"zero0"` to `"zero3"`."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp2" if accelerator.is_fsdp2 else "fsdp1"
    return "replicated"


def check_engine(args: "WMSSConfig", accelerator: Accelerator) -> None:
    """
    Check that a run can be distributed as it is launched.

    Raises:
        ValueError: If it cannot; the message says why and names an alternative.
    """
    parallelism = accelerator.parallelism_config
    if parallelism is not None and (parallelism.tp_enabled or parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            f"`tp_size={parallelism.tp_size}`, `cp_size={parallelism.cp_size}`, `sp_size={parallelism.sp_size}`: tensor, "
            "context and sequence parallelism would split the weak model, its hidden states and the entropy of an "
            "example over processes, which WMSSTrainer does not do. Set all of them to 1; for long sequences use "
            "FSDP2 or ZeRO-3 with activation checkpointing and `weak_cache='hidden'`."
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
                f"`gradient_accumulation_steps={args.gradient_accumulation_steps}`. Remove it from the configuration, "
                "or set it to 'auto'."
            )
        if args.train_weak and args.sft_epochs and "optimizer" in config:
            raise ValueError(
                "`train_weak=True` starts the weak model's optimizer states after phase 1, which the optimizer of the "
                "DeepSpeed configuration cannot do. Remove `optimizer` there and set `optim`, or set `sft_epochs=0`."
            )
    if engine == "fsdp2" and args.train_weak:
        plugin = accelerator.state.fsdp_plugin
        if plugin.auto_wrap_policy is None:
            raise ValueError(
                "`train_weak=True` needs FSDP units, since the weak model is also run alone. Set "
                "`fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP`."
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
