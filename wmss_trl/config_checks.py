"""What options may be, alone and together, as a table."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from .curriculum.weights import CURRICULUM_VARIANTS
from .losses.schedules import make_lambda_schedule, schedule_name

if TYPE_CHECKING:
    from .config import WMSSConfig

WEAK_DTYPES = ("auto", "float32", "bfloat16", "float16")
_DTYPE_KWARGS = {"dtype", "torch_dtype", "quantization_config"}
TERM_WEIGHTS = ("difficulty_weight", "consolidation_weight", "repair_weight")


class Check(NamedTuple):
    """
    Args:
        options (`str`):
            The options that it is about, separated by spaces.
        fails (`Callable`):
            Whether a configuration fails it. The earlier checks have passed.
        message (`str`):
            What the error says; `{option}` stands for a value.
    """

    options: str
    fails: Callable[["WMSSConfig"], bool]
    message: str


def check_options(args: "WMSSConfig") -> None:
    """
    Check the options of a run, each of which has its type.

    Raises:
        ValueError: If one is out of range or cannot be combined with another; the message names the remedy.
    """
    for check in CHECKS:
        if check.fails(args):
            values = vars(args) | {"lambda_schedule": schedule_name(args.lambda_schedule)}
            raise ValueError(check.message.format_map(values))
    if args.lambda_schedule not in ("linear", "cosine", "crossover"):
        make_lambda_schedule(args.lambda_schedule, args.mixing_lambda)  # raises an error if there is no such function


def _weight_check(option: str) -> Check:
    return Check(
        option,
        lambda args: not 0 <= getattr(args, option) < math.inf,
        f"`{option}` must be a finite number >= 0, got {{{option}}}.",
    )


def _scoring_check(option: str) -> Check:
    return Check(
        option,
        lambda args: getattr(args, option) is not None and getattr(args, option) < 1,
        f"`{option}` must be >= 1, got {{{option}}}. Leave it unset to score as many tokens at a time as a training "
        "batch of {per_device_train_batch_size} or an evaluation batch of {per_device_eval_batch_size} examples may "
        "have.",
    )


def _cache_check(options: str, fails: Callable[["WMSSConfig"], bool], reason: str) -> Check:
    return Check(
        f"weak_cache {options}",
        lambda args: args.weak_cache is not None and fails(args),
        f"`weak_cache='hidden'` cannot be used: {reason}. Remove one of them.",
    )


CHECKS = [
    Check(
        "mixing_lambda",
        lambda args: not 0 < args.mixing_lambda <= 1,
        "`mixing_lambda` must be in (0, 1], got {mixing_lambda}. At 0 the strong model gets no gradient; 1 is plain "
        "SFT; the paper uses 0.5.",
    ),
    Check(
        "lambda_schedule final_mixing_lambda",
        lambda args: args.lambda_schedule in ("linear", "cosine") and not 0 < (args.final_mixing_lambda or 0) <= 1,
        "`lambda_schedule={lambda_schedule!r}` needs a `final_mixing_lambda` in (0, 1], got {final_mixing_lambda}. "
        "Set it to the value of the last step.",
    ),
    Check(
        "lambda_schedule final_mixing_lambda",
        lambda args: args.lambda_schedule not in ("linear", "cosine") and args.final_mixing_lambda is not None,
        "`final_mixing_lambda={final_mixing_lambda}` is for the schedules 'linear' and 'cosine', but "
        "`lambda_schedule` is {lambda_schedule!r}. Remove one of them.",
    ),
    Check(
        "lambda_schedule mixing_lambda",
        lambda args: args.lambda_schedule == "crossover" and args.mixing_lambda != type(args).mixing_lambda,
        "`mixing_lambda={mixing_lambda}` is not used with `lambda_schedule='crossover'`, which measures it. Remove "
        "one of them.",
    ),
    Check(
        "anchor_weight",
        lambda args: not 0 <= args.anchor_weight < 1,
        "`anchor_weight` must be in [0, 1), got {anchor_weight}. For plain SFT set `mixing_lambda=1.0`.",
    ),
    Check(
        "weak_refresh",
        lambda args: args.weak_refresh not in ("never", "epoch"),
        "`weak_refresh` must be 'never' or 'epoch', got {weak_refresh!r}.",
    ),
    Check(
        "weak_refresh_device",
        lambda args: args.weak_refresh_device not in ("cpu", "same", "disk"),
        "`weak_refresh_device` must be 'cpu', 'same' or 'disk', got {weak_refresh_device!r}.",
    ),
    Check(
        "weak_refresh weak_refresh_device",
        lambda args: args.weak_refresh == "never" and args.weak_refresh_device != "cpu",
        "`weak_refresh_device={weak_refresh_device!r}` is for `weak_refresh='epoch'`, but that is 'never'. Remove "
        "one of them.",
    ),
    Check(
        "weak_refresh train_weak",
        lambda args: args.weak_refresh == "epoch" and args.train_weak,
        "`weak_refresh='epoch'` cannot be combined with `train_weak=True`: a weak model that is replaced in each "
        "epoch need not be trained. Keep one of them.",
    ),
    Check(
        "weak_refresh mixing_lambda rescore_epochs",
        lambda args: args.weak_refresh == "epoch" and not args.mixes_logits and args.rescore_epochs > 1,
        "`weak_refresh='epoch'` with `mixing_lambda=1.0` and `rescore_epochs={rescore_epochs}` would need scores of "
        "a model that is not kept. Set `rescore_epochs=1`.",
    ),
    Check(
        "weak_cache weak_cache_dir",
        lambda args: args.weak_cache is None and args.weak_cache_dir is not None,
        "`weak_cache_dir={weak_cache_dir!r}` is for `weak_cache='hidden'`, but that is None. Set it, or remove "
        "`weak_cache_dir`.",
    ),
    Check(
        "weak_cache",
        lambda args: args.weak_cache not in (None, "hidden"),
        "`weak_cache` must be None or 'hidden', got {weak_cache!r}.",
    ),
    _cache_check("train_weak", lambda args: args.train_weak, "`train_weak=True` changes the weak model in each step"),
    _cache_check(
        "weak_refresh",
        lambda args: args.weak_refresh != "never",
        "`weak_refresh={weak_refresh!r}` changes the weak model in each epoch",
    ),
    _cache_check(
        "mixing_lambda",
        lambda args: not args.mixes_logits,
        "`mixing_lambda=1.0` needs no weak model in training",
    ),
    _cache_check(
        "curriculum",
        lambda args: not args.curriculum,
        "`curriculum=False` has no scoring pass in which it is written",
    ),
    _cache_check("packing", lambda args: args.packing, "`packing=True` is not supported with it in this version"),
    Check(
        "weak_dtype",
        lambda args: args.weak_dtype not in (None, *WEAK_DTYPES),
        f"`weak_dtype` must be one of {list(WEAK_DTYPES)} or None, got {{weak_dtype!r}}.",
    ),
    Check(
        "weak_dtype train_weak",
        lambda args: args.weak_dtype is not None and args.train_weak,
        "`weak_dtype={weak_dtype!r}` is for a weak model that is not trained, but `train_weak=True`. Remove one of "
        "them.",
    ),
    Check(
        "weak_dtype weak_model_init_kwargs",
        lambda args: args.weak_dtype is not None and bool(_DTYPE_KWARGS & {*(args.weak_model_init_kwargs or ())}),
        "Both `weak_dtype={weak_dtype!r}` and `weak_model_init_kwargs` (`dtype`, `quantization_config`) say in which "
        "precision the weak model is loaded. Remove one of them.",
    ),
    Check(
        "train_weak mixing_lambda",
        lambda args: args.train_weak and not args.mixes_logits,
        "`train_weak=True` with `mixing_lambda=1.0` gives the weak model no gradient. Lower `mixing_lambda`, or set "
        "`train_weak=False`.",
    ),
    Check(
        "sft_epochs",
        lambda args: args.sft_epochs < 0,
        "`sft_epochs` must be a whole number >= 0, got {sft_epochs}. Use 0 to start from a model that is already "
        "fine-tuned.",
    ),
    Check(
        "curriculum_variant",
        lambda args: args.curriculum_variant not in CURRICULUM_VARIANTS,
        f"`curriculum_variant` must be one of {list(CURRICULUM_VARIANTS)}, got {{curriculum_variant!r}}.",
    ),
    *map(_weight_check, TERM_WEIGHTS),
    Check(
        " ".join(TERM_WEIGHTS),
        lambda args: not any(getattr(args, option) for option in TERM_WEIGHTS),
        f"{', '.join(f'`{option}`' for option in TERM_WEIGHTS)} are all 0, so no example could be drawn. Make one of "
        "them positive, or set `curriculum=False` to train on the whole data set.",
    ),
    Check(
        "active_fraction",
        lambda args: not 0 < args.active_fraction <= 1,
        "`active_fraction` must be in (0, 1], got {active_fraction}. Use 1.0 to keep as many examples as the data set "
        "has.",
    ),
    _scoring_check("scoring_batch_size"),
    _scoring_check("scoring_tokens_per_batch"),
    Check(
        "scoring_batch_size scoring_tokens_per_batch",
        lambda args: args.scoring_batch_size is not None and args.scoring_tokens_per_batch is not None,
        "Both `scoring_batch_size={scoring_batch_size}` and `scoring_tokens_per_batch={scoring_tokens_per_batch}` are "
        "set. Keep one of them.",
    ),
    Check(
        "rescore_epochs",
        lambda args: args.rescore_epochs < 1,
        "`rescore_epochs` must be a whole number >= 1, got {rescore_epochs}.",
    ),
    Check(
        "score_file curriculum",
        lambda args: args.score_file is not None and not args.curriculum,
        "`score_file={score_file!r}` is for the curriculum, but `curriculum=False`. Remove one of them.",
    ),
    Check(
        "score_file sft_epochs",
        lambda args: args.score_file is not None and args.sft_epochs > 0,
        "`score_file={score_file!r}` holds the strong entropies of the model that the run starts with, but "
        "`sft_epochs={sft_epochs}` changes it before the first draw. Set `sft_epochs=0` and start from the fine-tuned "
        "model, or remove `score_file`.",
    ),
    Check(
        "logits_buffer_mb",
        lambda args: args.logits_buffer_mb is not None and args.logits_buffer_mb < 1,
        "`logits_buffer_mb` must be >= 1, got {logits_buffer_mb}. Leave it unset for a size that fits the device.",
    ),
    Check(
        "label_smoothing_factor",
        lambda args: args.mixes_logits and args.label_smoothing_factor != 0,
        "`label_smoothing_factor={label_smoothing_factor}` cannot be combined with the mixed loss. Set it to 0.0.",
    ),
    Check(
        "packing_strategy curriculum",
        lambda args: args.curriculum and args.packing and args.packing_strategy not in ("bfd", "wrapped"),
        "`packing_strategy={packing_strategy!r}` cannot be combined with `curriculum=True`: it cuts documents, which "
        "are scored and drawn whole. Use 'bfd', 'wrapped' (whose rows are scored and drawn), or set "
        "`curriculum=False`.",
    ),
    Check(
        "curriculum_replacement packing",
        lambda args: (
            args.curriculum and args.packing and args.packing_strategy == "bfd" and args.curriculum_replacement
        ),
        "`curriculum_replacement=True` cannot be combined with `packing=True`: a document would be packed beside its "
        "own copy. Set one of them to False.",
    ),
    Check(
        "train_sampling_strategy curriculum",
        lambda args: (
            args.curriculum and args.train_sampling_strategy not in ("random", "sequential", "group_by_length")
        ),
        "`train_sampling_strategy={train_sampling_strategy!r}` cannot be combined with `curriculum=True`. Use "
        "'random', 'sequential' or 'group_by_length', or set `curriculum=False`.",
    ),
]
