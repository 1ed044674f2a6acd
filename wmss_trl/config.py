import copy
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import TrainingArguments
from trl import SFTConfig

from .config_checks import TERM_WEIGHTS, WEAK_DTYPES, check_options
from .curriculum.weights import CURRICULUM_VARIANTS, VARIANT_WEIGHTS
from .losses.schedules import LambdaSchedule, schedule_name
from .option_types import check_option_types
from .user_warnings import warn

if TYPE_CHECKING:
    ScheduleOption = str | LambdaSchedule
else:  # what a command line can give
    ScheduleOption = str

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def convert_arguments(args: TrainingArguments, cls: type[Arguments], **overrides: Any) -> Arguments:
    """
    Arguments of another class with the same values, as far as that class has the options.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Arguments of any class.
        cls (`type`):
            Class to convert to.
        overrides:
            Options that get another value.
    """
    options = args.to_dict()  # which hides the value of every `..._token` option
    # A function is a name there
    hidden = [option for option in options if option.endswith("_token") or option == "lambda_schedule"]
    options |= {option: getattr(args, option) for option in hidden}
    names = {f.name for f in fields(cls) if f.init}
    return cls(**{option: value for option, value in options.items() if option in names} | overrides)


def own_arguments(args: Arguments) -> Arguments:
    """A copy of arguments that a trainer may write into. What it holds of the running process (devices, engines) is
    shared; dicts, lists and the options of Accelerate are copied, since TRL and transformers write into them."""
    own = copy.copy(args)
    for name, value in vars(own).items():
        if isinstance(value, (dict, list)) or name == "accelerator_config":
            setattr(own, name, copy.copy(value))
    return own


@dataclass
class WMSSConfig(SFTConfig):
    """
    Configuration class for the [`WMSSTrainer`].

    This class includes only the parameters that are specific to Weak-Driven Learning (WMSS, arXiv 2602.08222). For a
    full list of training arguments, please refer to the [`~transformers.TrainingArguments`] and [`~trl.SFTConfig`]
    documentation.

    `loss_type="dft"` holds for the mixed loss too, as this project defines it: each token's cross-entropy is weighted
    by the probability of its target, detached: the mixed one by `P_mix(y)`, the one of `anchor_weight` by
    `P_strong(y)`. With `mixing_lambda=1.0` it is [`~trl.SFTConfig`]'s.

    Args:
        mixing_lambda (`float`, *optional*, defaults to `0.5`):
            Weight of the strong model in the mixed logits `lambda * z_strong + (1 - lambda) * z_weak`, in `(0, 1]`. At
            `1.0` the loss is SFT's and no training step runs the weak model, which is then needed only to score the
            data for the curriculum. The paper reports a plateau of 0.42-0.50.
        anchor_weight (`float`, *optional*, defaults to `0.0`):
            Weight `a` in `[0, 1)` of the strong model's own cross-entropy: the loss is `a * CE(z_strong) + (1 - a) *
            CE(z_mix)`. `0.0` is the published method. An insurance against losing to SFT, not an improvement (see the
            study in the documentation).
        lambda_schedule (`str` or `Callable[[float], float]`, *optional*, defaults to `"constant"`):
            How `mixing_lambda` changes over the weak-driven steps: `"constant"`, `"linear"` or `"cosine"` from
            `mixing_lambda` to `final_mixing_lambda`, `"crossover"` (paper v2: `1 / (1 + sqrt(a))` with `a` the squared
            ratio of the centered logit norms of strong and weak model, measured at the start of each weak-driven epoch
            on a sample of the data), or a function of the progress in `[0, 1]`, itself or as `"package.module:name"`.
        final_mixing_lambda (`float`, *optional*):
            `mixing_lambda` at the last step of a `"linear"` or `"cosine"` schedule, in `(0, 1]`.
        sft_epochs (`int`, *optional*, defaults to `1`):
            Number of epochs of plain SFT (phase 1) before the weak-driven epochs. `0` starts from a model that is
            already fine-tuned.
        train_weak (`bool`, *optional*, defaults to `False`):
            Whether the weak model is trained on the mixed loss as well (the paper's Algorithm 1). It then needs the
            memory of a second model that is trained, or with LoRA of a second adapter. Only the strong model is
            evaluated and saved; checkpoints hold the weak one in `weak_model`.
        weak_refresh (`str`, *optional*, defaults to `"never"`):
            When the weak model is replaced by a later state of the strong model: `"never"`, or `"epoch"` for the
            paper's iterated form, in which each weak-driven epoch mixes with the strong model as it was at the start
            of the weak-driven epoch before (the first one with the weak model that the run began with).
        weak_refresh_device (`str`, *optional*, defaults to `"cpu"`):
            Where the weights that will be the next weak model wait with `weak_refresh="epoch"`: `"cpu"`, `"same"` (the
            model's device) or `"disk"` (`_weak_refresh` in `output_dir`). With LoRA only the adapter is kept.
        curriculum (`bool`, *optional*, defaults to `True`):
            Whether each weak-driven epoch trains on an active set drawn by the change of entropy. If `False`, it
            trains on the whole data set and no scoring is done.
        curriculum_variant (`str`, *optional*, defaults to `"released"`):
            Formula of the sampling weights, see [`~wmss_trl.curriculum.weights.sampling_weights`]. Possible values are
            `"released"` (the paper's code), `"v1"` and `"v2"` (the two versions of the paper). It brings the three
            weights that are not set. In a configuration that is made they all have values, which a copy keeps,
            whatever its variant.
        difficulty_weight (`float`, *optional*, defaults to `0.1`, with `"v2"` to `0.8`):
            Weight of the difficulty term: examples that are still uncertain.
        consolidation_weight (`float`, *optional*, defaults to `0.8`, with `"v2"` to `0.1`):
            Weight of the consolidation term: examples whose entropy fell.
        repair_weight (`float`, *optional*, defaults to `0.1`):
            Weight of the regression-repair term: examples whose entropy rose.
        active_fraction (`float`, *optional*, defaults to `0.63`):
            Size of the active set as a fraction of the data set, in `(0, 1]`: each weak-driven epoch trains on
            `round(active_fraction * n)` examples. The default is `1 - 1/e`, the share that the published "n draws
            with replacement, drop repeats" keeps under uniform weights; the paper's math run kept 0.56.
        curriculum_replacement (`bool`, *optional*, defaults to `False`):
            Whether the active set is drawn with replacement and keeps its repeats, as in the paper's code (which
            draws `n` examples: set `active_fraction=1.0`).
        rescore_epochs (`int`, *optional*, defaults to `1`):
            The data set is scored in every `rescore_epochs`-th weak-driven epoch; the epochs between draw a new active
            set from the last scores.
        scoring_tokens_per_batch (`int`, *optional*):
            Number of tokens per device in a forward pass of the scoring, padding included. Defaults to what a training
            or an evaluation batch of the longest examples has, whichever is less: `min(per_device_train_batch_size,
            per_device_eval_batch_size)` times the longest, so that scoring needs no more memory than either.
        scoring_batch_size (`int`, *optional*):
            Number of examples per device in a forward pass of the scoring, in place of `scoring_tokens_per_batch`.
        score_cache_dir (`str`, *optional*):
            Folder in which scores are kept, so that an interrupted scoring pass goes on where it was and a model is
            scored only once on the same data. Defaults to `_scores` in `output_dir`, which is not pushed to the Hub.
        score_file (`str`, *optional*):
            Parquet file of `wmss-trl score` or [`WMSSTrainer.score_table`]. Its entropies serve for the first draw
            instead of a scoring pass, and its weak entropies for all draws. Needs `sft_epochs=0`: the strong entropies
            are those of the model that the run starts with.
        plot_curriculum (`bool`, *optional*):
            Whether to draw a figure of each active set into the folder `curriculum` of `output_dir` and to send it to
            TensorBoard, Weights & Biases or Trackio, if they are reported to. By default it is drawn if matplotlib is
            installed (the extra `plots`).
        logits_buffer_mb (`int`, *optional*):
            Memory in MiB for the tiles of logits from which the mixed loss and the scores are computed. The full
            logits of a batch are never held. Defaults to 256; for the loss on a GPU to what three tiles need, if that
            is more, up to 1/16 of its memory (see [`~wmss_trl.losses.buffer.default_buffer_bytes`]).
        weak_cache (`str`, *optional*):
            `"hidden"` writes the frozen weak model's last hidden states at the supervised positions to disk while it
            is scored, and training reads them instead of running it; only its LM head stays in memory. Takes
            supervised tokens x hidden size x 2 bytes in bfloat16.
        weak_cache_dir (`str`, *optional*):
            Folder for the cache, the same for all processes; runs may share it. Defaults to `_weak_cache` in
            `output_dir`.
        weak_model_name_or_path (`str`, *optional*):
            Hub id or checkpoint folder of the weak model. Used when the trainer gets no `weak_model`. If neither is
            given, the weak model is the model as it was handed in (the paper's M0).
        weak_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`] when the weak model is loaded
            by name or path.
        weak_dtype (`str`, *optional*):
            Precision of the weights of a frozen weak model that is a copy or is loaded by name or path: `"float32"`,
            `"bfloat16"`, `"float16"`, or `"auto"` for that of the checkpoint (a copy stays as it is). Defaults to the
            strong model's. A weak model on the strong model's own base has the precision of that.

    Raises:
        ValueError: If an option is of another type, out of range or not supported in this version.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "weak_model_init_kwargs"]  # noqa: RUF012

    mixing_lambda: float = field(
        default=0.5,
        metadata={"help": "Weight of the strong model in the mixed logits, in (0, 1]. 1.0 is plain SFT."},
    )
    anchor_weight: float = field(
        default=0.0,
        metadata={"help": "Weight in [0, 1) of the strong model's own cross-entropy beside the mixed one."},
    )
    lambda_schedule: ScheduleOption = field(
        default="constant",
        metadata={
            "help": "How mixing_lambda changes over the weak-driven steps: constant, linear, cosine, crossover, or a "
            "function `package.module:name` of the progress."
        },
    )
    final_mixing_lambda: float | None = field(
        default=None,
        metadata={"help": "mixing_lambda at the last step of a linear or cosine schedule, in (0, 1]."},
    )
    sft_epochs: int = field(
        default=1,
        metadata={"help": "Number of epochs of plain SFT before the weak-driven epochs."},
    )
    train_weak: bool = field(
        default=False,
        metadata={"help": "Whether the weak model is trained too, as in the paper's Algorithm 1."},
    )
    weak_refresh: str = field(
        default="never",
        metadata={
            "help": "When the weak model is replaced by a later state of the strong one.",
            "choices": ["never", "epoch"],
        },
    )
    weak_refresh_device: str = field(
        default="cpu",
        metadata={"help": "Where the next weak model's weights wait.", "choices": ["cpu", "same", "disk"]},
    )
    curriculum: bool = field(
        default=True,
        metadata={"help": "Whether weak-driven epochs train on an active set drawn by the change of entropy."},
    )
    curriculum_variant: str = field(
        default="released",
        metadata={"help": "Formula of the sampling weights.", "choices": list(CURRICULUM_VARIANTS)},
    )
    difficulty_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the difficulty term (still uncertain examples). Default: 0.1, with v2 0.8."},
    )
    consolidation_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the consolidation term (whose entropy fell). Default: 0.8, with v2 0.1."},
    )
    repair_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the regression-repair term (whose entropy rose). Default: 0.1."},
    )
    active_fraction: float = field(
        default=0.63,
        metadata={"help": "Size of the active set as a fraction of the data set, in (0, 1]."},
    )
    curriculum_replacement: bool = field(
        default=False,
        metadata={"help": "Whether the active set is drawn with replacement and keeps its repeats."},
    )
    rescore_epochs: int = field(
        default=1,
        metadata={"help": "Score the data set in every so many weak-driven epochs."},
    )
    scoring_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per device in a scoring forward, padding included. Defaults to the length of the longest "
            "example times the smaller of per_device_train_batch_size and per_device_eval_batch_size."
        },
    )
    scoring_batch_size: int | None = field(
        default=None,
        metadata={"help": "Examples per device in a scoring forward, in place of scoring_tokens_per_batch."},
    )
    score_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder in which scores are kept. Defaults to `_scores` in output_dir."},
    )
    score_file: str | None = field(
        default=None,
        metadata={"help": "Parquet file of `wmss-trl score`, whose entropies serve for the first draw."},
    )
    plot_curriculum: bool | None = field(
        default=None,
        metadata={"help": "Whether to draw a figure of each active set. Default: if matplotlib is installed."},
    )
    logits_buffer_mb: int | None = field(
        default=None,
        metadata={
            "help": "Memory in MiB for the tiles of logits from which the mixed loss is computed. Defaults to 256, on "
            "a GPU to what three tiles need."
        },
    )
    weak_cache: str | None = field(
        default=None,
        metadata={
            "help": "Whether to keep the frozen weak model's hidden states on disk instead of running it.",
            "choices": ["hidden"],
        },
    )
    weak_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for the cache. Defaults to `_weak_cache` in output_dir."},
    )
    weak_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of the weak model. Defaults to the model as handed in (M0)."},
    )
    weak_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for `from_pretrained` when the weak model is loaded by name or path."},
    )

    weak_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of a frozen weak model that is a copy or is loaded. Defaults to the strong model's.",
            "choices": list(WEAK_DTYPES),
        },
    )

    def __post_init__(self):
        super().__post_init__()
        check_option_types(self, WMSSConfig)
        self._set_weights_of_variant()
        check_options(self)
        if self.max_steps <= 0 and self.sft_epochs >= self.num_train_epochs and self.uses_weak_model:
            warn(
                f"`sft_epochs={self.sft_epochs}` with `num_train_epochs={self.num_train_epochs}` leaves no "
                "weak-driven epoch: the run is plain SFT. Raise `num_train_epochs` or lower `sft_epochs`.",
                stacklevel=2,
            )

    def _set_weights_of_variant(self) -> None:
        weights = VARIANT_WEIGHTS.get(self.curriculum_variant, VARIANT_WEIGHTS["released"])
        for option, weight in zip(TERM_WEIGHTS, weights, strict=True):
            if getattr(self, option) is None:
                setattr(self, option, weight)

    @property
    def uses_weak_model(self) -> bool:
        """Whether any part of the method (mixed loss or curriculum) asks for a weak model."""
        return self.curriculum or self.mixes_logits

    @property
    def mixes_logits(self) -> bool:
        """Whether training steps use weak logits: not with a `mixing_lambda` of 1 throughout."""
        return self.lambda_schedule != "constant" or self.mixing_lambda < 1

    @property
    def changes_weak_model(self) -> bool:
        """Whether the weak model's weights change during the run."""
        return self.train_weak or self.weak_refresh != "never"

    def to_dict(self) -> dict[str, Any]:
        options = super().to_dict()
        if "lambda_schedule" in options:
            options["lambda_schedule"] = schedule_name(self.lambda_schedule)
        return options

    @property
    def buffer_bytes(self) -> int | None:
        """`logits_buffer_mb` in bytes."""
        return None if self.logits_buffer_mb is None else self.logits_buffer_mb * 2**20

    @property
    def draw_seed(self) -> int:
        """Seed of the draws of the curriculum."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def term_options(self) -> dict[str, Any]:
        """Options of [`~wmss_trl.curriculum.weights.sampling_weights`]."""
        return {"variant": self.curriculum_variant} | {option: getattr(self, option) for option in TERM_WEIGHTS}
