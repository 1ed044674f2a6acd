"""
What the package relies on that is private in other libraries, and whether it is still there.

If transformers renames a method, our override is silently no longer called. If it renames an attribute, that is
silently no longer read. So all of them are listed here, and checked when the package is imported.
"""

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import CodeType
from typing import Any

from packaging.version import Version

from .user_warnings import warn

# The lowest and the highest release of each library that the test suite was run with
CHECKED_WITH = {
    "transformers": ("5.16.1", "5.24"),
    "trl": ("1.16", "1.16"),
    "accelerate": ("1.14", "1.15"),
    "datasets": ("4.7", "5.2"),
    "peft": ("0.21", "0.21"),
    "torch": ("2.11", "2.13"),
    "bitsandbytes": ("0.50", "0.50"),
    "deepspeed": ("0.19", "0.19"),
}

# Those that no run can do without, and PEFT, which TRL imports wherever it is installed
_ALWAYS_IMPORTED = ("transformers", "trl", "accelerate", "datasets", "peft", "torch")


@dataclass(frozen=True)
class Reliance:
    """
    One thing that is not public and yet relied on.

    Args:
        name (`str`):
            `module:object`, a function, class or attribute.
        used_by (`str`):
            Module of this package that overrides, calls or reads it.
        parameters (`str`, *optional*):
            Names of all parameters of the function, in their order.
        mentions (`str`, *optional*):
            Names that its code must contain: attributes of instances, which exist only at run time, and keywords.
    """

    name: str
    used_by: str
    parameters: str | None = None
    mentions: str = ""


_TRAINER = "transformers.trainer:Trainer"
_SFT = "trl.trainer.sft_trainer:SFTTrainer"
_CALLBACKS = "transformers.integrations.integration_utils"
_FSDP = "accelerate.utils.dataclasses:FullyShardedDataParallelPlugin"
_ZERO = "deepspeed.runtime.zero"

TABLE = (
    # Epochs of two lengths: overridden
    Reliance(f"{_TRAINER}.set_initial_training_values", "loop.two_phase", "self args dataloader"),
    Reliance(
        f"{_TRAINER}._init_training_state",
        "loop.two_phase",
        "self max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
    ),
    Reliance(
        f"{_TRAINER}._run_epoch",
        "loop.two_phase",
        "self model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval "
        "start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
    ),
    Reliance(
        f"{_TRAINER}._inner_training_loop",
        "trainer",
        mentions="set_initial_training_values _init_training_state _run_epoch epoch train_dataloader steps_in_epoch "
        "num_update_steps_per_epoch",
    ),
    # Checkpoints: overridden, and read by what is
    Reliance(f"{_TRAINER}.save_model", "loop.two_phase", "self output_dir _internal_call"),
    Reliance(f"{_TRAINER}._save_checkpoint", "loop.two_phase", "self model trial"),
    Reliance(f"{_SFT}._save_checkpoint", "loop.two_phase", "self model trial"),
    Reliance(f"{_TRAINER}._load_from_checkpoint", "loop.two_phase", "self resume_from_checkpoint model"),
    Reliance(f"{_TRAINER}._load_best_model", "loop.two_phase", "self"),
    Reliance(f"{_TRAINER}._load_optimizer_and_scheduler", "loop.two_phase", "self checkpoint"),
    Reliance(f"{_TRAINER}._get_output_dir", "loop.two_phase", "self trial"),
    # Data
    Reliance(
        f"{_TRAINER}._get_dataloader",
        "trainer",
        "self dataset description batch_size sampler_fn is_training dataloader_key",
        mentions="data_collator",
    ),
    Reliance(f"{_TRAINER}.__init__", "trainer", mentions="_train_batch_size _signature_columns"),
    Reliance(f"{_TRAINER}._set_signature_columns_if_needed", "loop.two_phase", "self", mentions="_signature_columns"),
    Reliance(f"{_SFT}._set_signature_columns_if_needed", "loop.two_phase", "self", mentions="_signature_columns"),
    Reliance(f"{_TRAINER}._prepare_inputs", "trainer", "self inputs"),
    Reliance(f"{_TRAINER}._remove_unused_columns", "trainer", "self dataset description"),
    Reliance(
        f"{_SFT}._prepare_dataset",
        "loop.two_phase",
        "self dataset processing_class args packing formatting_func dataset_name",
    ),
    Reliance(
        "trl.trainer.sft_trainer:DataCollatorForLanguageModeling", "loop.selection, cli.rank_weak, weak_model.ranking"
    ),
    Reliance(
        "transformers.trainer_pt_utils:get_length_grouped_indices",
        "curriculum.sampler",
        "lengths batch_size mega_batch_mult generator",
    ),
    # Losses and metrics
    Reliance(
        f"{_SFT}.compute_loss",
        "trainer",
        "self model inputs return_outputs num_items_in_batch",
        mentions="_metrics _total_train_tokens aux_loss_enabled router_aux_loss_coef "
        "current_gradient_accumulation_steps",
    ),
    Reliance(f"{_SFT}.log", "trainer", "self logs start_time", mentions="_metrics"),
    Reliance(f"{_SFT}.__init__", "trainer", mentions="_is_vision_dataset add_model_tags _tag_names"),
    Reliance(
        "transformers.models.mixtral.modeling_mixtral:load_balancing_loss_func",
        "modeling.lm_head",
        "gate_logits num_experts top_k attention_mask",
    ),
    # Model card, arguments and reporters
    Reliance(f"{_SFT}._tag_names", "trainer"),
    Reliance(f"{_SFT}._name", "trainer"),
    Reliance("trl.trainer.base_trainer:_BaseTrainer._paper", "trainer"),
    Reliance(
        "trl.trainer.base_trainer:_BaseTrainer.create_model_card",
        "trainer",
        "self model_name dataset_name tags",
        mentions="_tag_names _name _paper",
    ),
    Reliance("trl.trainer.utils:get_config_model_id", "trainer, weak_model.factory", "config"),
    Reliance("trl.trainer.sft_config:SFTConfig._VALID_DICT_FIELDS", "config"),
    Reliance("transformers.training_args:TrainingArguments.__post_init__", "config", mentions="_VALID_DICT_FIELDS"),
    Reliance(f"{_CALLBACKS}:TensorBoardCallback", "reports.figures", mentions="tb_writer"),
    Reliance(f"{_CALLBACKS}:WandbCallback", "reports.figures", mentions="_wandb"),
    Reliance(f"{_CALLBACKS}:TrackioCallback", "reports.figures", mentions="_trackio"),
    # Models
    Reliance(
        "transformers.configuration_utils:PreTrainedConfig",
        "loop.selection, weak_model.loading",
        mentions="_attn_implementation",
    ),
    Reliance("transformers.models.auto.auto_factory:_BaseAutoModelClass._model_mapping", "weak_model.loading"),
    Reliance("transformers.modeling_utils:PreTrainedModel._no_split_modules", "distributed.engines"),
    Reliance("transformers.modeling_utils:PreTrainedModel._keep_in_fp32_modules", "weak_model.factory"),
    Reliance("transformers.modeling_utils:PreTrainedModel._keep_in_fp32_modules_strict", "weak_model.factory"),
    Reliance(
        "transformers.modeling_utils:PreTrainedModel._set_gradient_checkpointing",
        "modeling.adapters",
        mentions="gradient_checkpointing _gradient_checkpointing_func",
    ),
    Reliance(
        "transformers.modeling_layers:GradientCheckpointingLayer",
        "modeling.adapters",
        mentions="gradient_checkpointing _gradient_checkpointing_func",
    ),
    Reliance(
        "transformers.utils.generic:is_flash_attention_requested",
        "loop.selection",
        "config requested_attention_implementation version",
    ),
    Reliance(
        "transformers.utils.peft_utils:find_adapter_config_file",
        "modeling.adapters",
        mentions="revision token cache_dir",
    ),
    Reliance("transformers.models.auto.modeling_auto:AutoModelForCausalLM._model_mapping", "weak_model.loading"),
    Reliance("trl.trainer.utils:create_model_from_path", "weak_model.factory", "model_id architecture kwargs"),
    Reliance("torch.nn.modules.module:Module.add_module", "weak_model.frozen, weak_model.joint", mentions="_modules"),
    # Adapters and quantised layers
    Reliance("peft.tuners.tuners_utils:BaseTunerLayer._active_adapter", "modeling.adapters"),
    Reliance("peft.tuners.tuners_utils:BaseTunerLayer._disable_adapters", "modeling.adapters"),
    Reliance(
        "peft.utils.other:AuxiliaryTrainingWrapper",
        "modeling.adapters",
        mentions="_active_adapter _disable_adapters _adapters",
    ),
    Reliance(
        "peft.peft_model:PeftModel.save_pretrained",
        "weak_model.adapters, weak_model.joint",
        mentions="selected_adapters",
    ),
    Reliance("bitsandbytes.nn.modules:Linear4bit.forward", "modeling.adapters", mentions="support_avx512bf16_for_cpu"),
    # Engines
    Reliance(
        "accelerate.accelerator:Accelerator.prepare_model",
        "distributed.engines, modeling.lm_head",
        "self model device_placement evaluation_mode",
        mentions="_is_accelerate_prepared",
    ),
    Reliance("accelerate.hooks:add_hook_to_module", "weak_model.factory", mentions="_old_forward"),
    Reliance("accelerate.utils.fsdp_utils:fsdp2_prepare_model", "distributed.engines", "accelerator model"),
    Reliance(f"{_FSDP}.transformer_cls_names_to_wrap", "distributed.engines"),
    Reliance(f"{_FSDP}.auto_wrap_policy", "distributed.engines"),
    Reliance(f"{_FSDP}.set_state_dict_type", "distributed.engines", "self state_dict_type"),
    Reliance("torch.distributed.fsdp.wrap:transformer_auto_wrap_policy", "distributed.engines"),
    Reliance(
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper:ActivationWrapper",
        "distributed.sharding",
        mentions="_checkpoint_wrapped_module",
    ),
    Reliance("torch._dynamo.eval_frame:OptimizedModule", "distributed.sharding", mentions="_orig_mod"),
    Reliance("accelerate.big_modeling:dispatch_model", "modeling.checks", mentions="hf_device_map"),
    Reliance("transformers.modeling_utils:PreTrainedModel._device_mesh", "modeling.checks"),
    Reliance(
        "transformers.modeling_utils:PreTrainedModel.maybe_distribute_model",
        "modeling.checks",
        mentions="_device_mesh",
    ),
    Reliance("trl.models.utils:prepare_deepspeed", "distributed.engines", "model accelerator"),
    Reliance(f"{_ZERO}.partition_parameters:ZeroParamStatus.AVAILABLE", "distributed.sharding"),
    Reliance(
        f"{_ZERO}.partition_parameters:Init",
        "distributed.sharding",
        mentions="ds_id ds_status ds_shape ds_tensor partition",
    ),
    Reliance(
        f"{_ZERO}.stage3:DeepSpeedZeroOptimizer_Stage3",
        "distributed.engines",
        mentions="optimizer fp32_partitioned_groups_flat sub_group_to_group_id",
    ),
)

_not_yet_checked = list(TABLE)


def check_versions() -> None:
    """
    Check the versions that are installed, before anything of them is imported.

    Raises:
        ImportError: If one is older than what the test suite was run with. A newer one gives a warning.
    """
    newer = []
    for package in _ALWAYS_IMPORTED:
        try:
            installed = Version(version(package))
        except PackageNotFoundError:
            continue
        lowest, highest = map(Version, CHECKED_WITH[package])
        if installed < lowest:
            raise ImportError(
                f"wmss_trl needs {package} {lowest} or later, but {package} {installed} is installed. "
                f"Run `pip install --upgrade '{package}>={lowest}'`."
            )
        if installed.release[: len(highest.release)] > highest.release:
            newer.append(f"{package} {installed} (checked: {_checked(package)})")
    if newer:
        warn(
            f"wmss_trl was not checked with {', '.join(newer)}. It builds on private parts of these libraries, so "
            "results may be wrong: install a version that was checked.",
            stacklevel=2,
        )


def checkpointing_option() -> str:
    """What the installed transformers calls the training argument for activation checkpointing. Its older name,
    `gradient_checkpointing`, can be read under all versions: newer ones keep it as an alias until version 6."""
    from transformers import TrainingArguments

    new = "activation_checkpointing"
    return new if hasattr(TrainingArguments, new) else "gradient_checkpointing"


def checkpointing_kwargs(args: Any) -> dict[str, Any]:
    """The keyword arguments of activation checkpointing that transformers goes by. TRL 1.16 writes into those of the
    older name, which transformers reads before 5.23 only."""
    return getattr(args, f"{checkpointing_option()}_kwargs") or {}


def warn_of_changes() -> None:
    """Check what the modules that are imported by now have to provide, and warn of what has changed. Each entry of the
    table is checked once, and nothing is imported for it."""
    entries = [entry for entry in _not_yet_checked if entry.name.split(":")[0] in sys.modules]
    for entry in entries:
        _not_yet_checked.remove(entry)
    changed = changes(entries)
    if changed:
        packages = sorted({change.split(".")[0].strip("`") for change in changed})
        warn(
            f"wmss_trl relies on private parts of other libraries, which have changed: {'; '.join(changed)} "
            f"({versions(*packages)}). Results may be wrong: install a version that was checked.",
            stacklevel=2,
        )


def changes(entries: Sequence[Reliance] = TABLE) -> list[str]:
    """What is no longer as the table says, of entries whose modules are imported."""
    found = ((entry, _change(entry)) for entry in entries)
    return [f"`{entry.name.replace(':', '.')}` (for {entry.used_by}) {change}" for entry, change in found if change]


def versions(*packages: str) -> str:
    """The versions of imported packages and those that were checked, for a message."""
    installed = ", ".join(f"{name} {getattr(sys.modules[name], '__version__', 'unknown')}" for name in packages)
    checked = ", ".join(f"{name} {_checked(name)}" for name in packages)
    return f"installed: {installed}; checked: {checked}"


def _checked(package: str) -> str:
    return " to ".join(dict.fromkeys(CHECKED_WITH[package]))


def _change(entry: Reliance) -> str | None:
    module, _, path = entry.name.partition(":")
    found = sys.modules[module]
    for name in path.split("."):
        if not hasattr(found, name):
            return "is gone"
        found = getattr(found, name)
    if entry.parameters is not None:
        try:
            parameters = list(inspect.signature(found).parameters)
        except (TypeError, ValueError):
            return "is no function any more"
        if parameters != entry.parameters.split():
            return f"takes ({', '.join(parameters)}), not ({', '.join(entry.parameters.split())})"
    missing = [name for name in entry.mentions.split() if name not in set(_names(found))]
    return f"does not use {', '.join(f'`{name}`' for name in missing)} any more" if missing else None


def _names(found: Any) -> Iterator[str]:
    """Names and strings in the code of a function, or of the methods of a class."""
    if inspect.isclass(found):
        for member in vars(found).values():
            if not inspect.isclass(member):
                yield from _names(member)
        return
    if isinstance(found, property):
        found = found.fget
    code = found if isinstance(found, CodeType) else getattr(inspect.unwrap(found), "__code__", None)
    if code is None:
        return
    yield from (*code.co_names, *code.co_varnames, *code.co_cellvars)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        else:
            yield from (
                value for value in (constant if isinstance(constant, tuple) else (constant,)) if isinstance(value, str)
            )
