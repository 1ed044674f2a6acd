import contextlib
import copy
import json
import warnings
import weakref
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalPrediction, TrainOutput, has_length
from transformers.utils import ModelOutput
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import get_config_model_id

from .activation import DataActivation
from .adapters import keep_trainable_on_cpu
from .checkpoints import find_checkpoint, how_to_resume, load_renamed_weights, without_parameters
from .checks import check_call, check_examples, check_lm_heads, check_model, check_replicated, check_whole
from .collation import undisturbed_random_state
from .compatibility import warn_of_changes
from .config import WMSSConfig, convert_arguments, own_arguments
from .curriculum import CurriculumSampler
from .diagnostics import crossover_lambda, log_image, plot_redraw
from .engines import (
    LateParameters,
    check_engine,
    check_goes_on_from_sft,
    checkpoint_form,
    engine_name,
    whole_state_dict,
)
from .epochs import EpochPlan, batches_per_process
from .lm_head import HeadOutput, LMHead, add_head_access, evaluating, unwrap_adapter, whole_lm_head
from .losses import MixedLossOutput, linear_mixed_cross_entropy, mixed_loss, next_token_targets
from .phases import Phases
from .ranking import AUTO, markdown_ranking, rank_checkpoints
from .refresh import WeakRefresh
from .run_state import (
    FORMAT,
    STATE_FILE,
    WEAK_FOLDER,
    check_same_order,
    check_same_place,
    check_same_run,
    check_same_steps,
    migrated,
    read_state,
)
from .schedules import LambdaSchedule, make_lambda_schedule, schedule_name
from .score_files import ScoreTable
from .weak import WeakReference, keep_initial_model, make_weak_reference
from .weak_cache import INDEX_COLUMN, CachedHiddenCollator, check_positions

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


class WMSSTrainer(SFTTrainer):
    """
    Trainer for Weak-Driven Learning (WMSS, arXiv 2602.08222): SFT that goes on learning after it has saturated.

    One `train()` is one run with one optimizer and one scheduler. Its first `sft_epochs` epochs are exactly those of
    [`~trl.SFTTrainer`]. Each later epoch scores the data set under the weak and the strong model, draws an active set
    by the change of entropy, and trains on it with the cross-entropy of the mixed logits `lambda * z_strong + (1 -
    lambda) * z_weak`. The weak model is frozen; only the strong model is evaluated, saved and pushed.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from wmss_trl import WMSSConfig, WMSSTrainer

    >>> trainer = WMSSTrainer(
    ...     model="Qwen/Qwen3-0.6B-Base",
    ...     args=WMSSConfig(num_train_epochs=2, sft_epochs=1),
    ...     train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, see [`~trl.SFTTrainer`].
        args ([`WMSSConfig`], *optional*):
            Configuration for this trainer. A plain [`~trl.SFTConfig`] or [`~transformers.TrainingArguments`] gets the
            defaults of [`WMSSConfig`].
        weak_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The weak reference: a hub id (`org/name@revision`), a checkpoint folder, the folder of an adapter for the
            same base, `"auto:FOLDER"` (the best checkpoint in a folder, see [`~wmss_trl.ranking.rank_weak_models`]),
            or a model with the vocabulary of `model`. If `None`, `args.weak_model_name_or_path` or else `model` as it
            is handed in: a frozen copy of it (of the adapter alone, if it is a PEFT model) or, when `peft_config` puts
            a new adapter on it, the same weights with the adapter switched off (copied only if the adapter changes
            them).
        kwargs:
            All other arguments of [`~trl.SFTTrainer`], in its order.

    Raises:
        ValueError: If the options, the data set or the weak model cannot be used; the message names the remedy.
    """

    _tag_names = ["trl", "sft", "wmss"]  # noqa: RUF012
    _name = "WMSS"
    STATE_FILE = STATE_FILE
    WEAK_FOLDER = WEAK_FOLDER
    _paper = {  # noqa: RUF012
        "title": "Weak-Driven Learning: How Weak Agents make Strong Agents Stronger",
        "id": "2602.08222",
        # docstyle-ignore
        "citation": """\
@article{chen2026weakdriven,
    title   = {{Weak-Driven Learning: How Weak Agents make Strong Agents Stronger}},
    author  = {Zehao Chen and Gongxun Li and Tianxiang Ai and Yifei Li and Zixuan Huang and Wang Zhou and
               Fuzhen Zhuang and Xianglong Liu and Jianxin Li and Deqing Wang and Yikun Ban},
    year    = 2026,
    eprint  = {arXiv:2602.08222}
}""",
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: WMSSConfig | SFTConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        formatting_func: Callable[[dict], str] | None = None,
        weak_model: str | PreTrainedModel | None = None,
    ):
        warn_of_changes()  # in what has been imported since, such as an engine
        args = self._as_wmss_config(args, model)
        check_call(args, model, weak_model, train_dataset, compute_loss_func)
        if args.train_weak and args.sft_epochs:
            args.ddp_find_unused_parameters = True
        peft_config = copy.deepcopy(peft_config)  # TRL and PEFT write into it
        self._documents: Dataset | None = None
        # Until it is known that a weak-driven step is due, see `_plan_phases`
        self._tag_names = [tag for tag in self._tag_names if tag != "wmss"]
        self._name, self._paper = SFTTrainer._name, SFTTrainer._paper
        self._phases: Phases | None = None
        initial_model = None
        if args.uses_weak_model and weak_model is None and args.weak_model_name_or_path is None:
            initial_model = keep_initial_model(model, args, peft_config, quantization_config)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        check_examples(args, train_dataset, self.train_dataset if self._documents is None else self._documents)
        # A step outside `train` uses the loss that the run starts with
        self._weak_driven = args.sft_epochs == 0
        self._plan: EpochPlan | None = None
        self._lambda_schedule: LambdaSchedule | None = None
        # Of the schedule "crossover": the epoch and the value that was measured at its start
        self._crossover: tuple[int, float] | None = None
        if args.lambda_schedule != "crossover":
            self._lambda_schedule = make_lambda_schedule(
                args.lambda_schedule, args.mixing_lambda, args.final_mixing_lambda
            )
        self._activation: DataActivation | None = None
        self.weak_reference: WeakReference | None = None
        self._late_parameters: LateParameters | None = None
        self._refresh: WeakRefresh | None = None
        self.curriculum_sampler: CurriculumSampler | None = None
        if not args.uses_weak_model:
            if weak_model is not None:
                warnings.warn(
                    "`weak_model` is not used: `mixing_lambda=1.0` with `curriculum=False` is plain SFT.", stacklevel=2
                )
            return
        check_engine(args, self.accelerator, is_peft_model(self.model))
        check_model(self.model, self._is_vision_dataset)
        check_whole(self.model, "model", "model_init_kwargs")
        keep_trainable_on_cpu(self.model)
        head_problem = add_head_access(unwrap_adapter(self.model))
        name = args.weak_model_name_or_path if weak_model is None else weak_model
        if isinstance(name, str) and name.startswith(AUTO):
            remedy = "Rank them on one process (`wmss-trl rank-weak`) and pass the folder of the best."
            check_replicated(self.accelerator, f"`weak_model={name!r}` compares checkpoints with", remedy)
            weak_model, args.weak_model_name_or_path = self._choose_weak_model(name), None

        this = weakref.proxy(self)  # In a reference cycle it would be freed late

        def strong() -> nn.Module:  # not the model itself, which FSDP2 wraps when training starts
            return this.model

        self.weak_reference = make_weak_reference(
            weak_model,
            strong,
            self.args,
            self.processing_class,
            self.accelerator,
            peft_config,
            initial_model,
        )
        if args.weak_refresh == "epoch":  # added before the curriculum's callback, which scores the new weak model
            folder = Path(args.output_dir) / "_weak_refresh"
            self._refresh = WeakRefresh(self.weak_reference, strong, args.sft_epochs, args.weak_refresh_device, folder)
            self.add_callback(self._refresh)
        problems = {"model": head_problem, "weak model": self.weak_reference.head_problem}
        self._full_logits = any(problems.values())
        check_lm_heads(args, problems, train_dataset, self.accelerator)
        if args.curriculum:
            self._activation = DataActivation(
                args,
                strong,
                self.weak_reference,
                self.train_dataset,
                self._documents,
                self.data_collator,
                self._used_columns(),
                self.accelerator,
                num_given=len(train_dataset),
                weak_is_initial=weak_model is None
                and args.weak_model_name_or_path is None
                and self.weak_reference.starts_as_strong,
                steps_done=lambda: this.state.global_step,
                on_redraw=lambda metrics: this._report_redraw(metrics),
            )
            self.curriculum_sampler = self._activation.sampler
            self.add_callback(self.curriculum_sampler)
        self._plan_phases(weak_model)

    def _plan_phases(self, weak_model: PreTrainedModel | str | None) -> None:
        """See what the run is going to be, and tag the model as one of WMSS unless it is plain SFT."""
        args, sft_steps = self.args, 0
        if args.sft_epochs:
            batches = batches_per_process(
                len(self.train_dataset),
                args.train_batch_size,
                self.accelerator.num_processes,
                args.dataloader_drop_last,
            )
            plan = EpochPlan(args.sft_epochs, batches, batches, args.gradient_accumulation_steps)
            sft_steps = plan.total_steps(args.sft_epochs)
        weak_model = args.weak_model_name_or_path if weak_model is None else weak_model
        if weak_model is None:
            weak_model = "M0 (the model as handed in)"
        elif not isinstance(weak_model, str):
            weak_model = f"the {type(weak_model).__name__} handed in"
        # A subclass that has its own loss has its own idea of mixing
        counts_mixed_losses = args.mixes_logits and type(self).compute_loss is WMSSTrainer.compute_loss
        self._phases = Phases(args, weak_model, self.curriculum_sampler, counts_mixed_losses, sft_steps)
        self.add_callback(self._phases)
        if self._phases.has_weak_driven:
            del self._tag_names, self._name, self._paper
            self.model.add_model_tags(self._tag_names)

    @staticmethod
    def _as_wmss_config(args: TrainingArguments | None, model: "str | PreTrainedModel") -> WMSSConfig:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            return WMSSConfig(f"{name.split('/')[-1]}-WMSS")
        return own_arguments(args if isinstance(args, WMSSConfig) else convert_arguments(args, WMSSConfig))

    def _choose_weak_model(self, name: str) -> str:
        ranking = rank_checkpoints(
            name, self.model, self.train_dataset, self.processing_class, self.args, self.accelerator.device
        )
        self.accelerator.print(markdown_ranking(ranking))
        return ranking[0].name

    def score_table(self) -> ScoreTable:
        """
        Score the training set, weigh it and draw from it what the first weak-driven epoch would train on, without
        training.

        Returns:
            [`~wmss_trl.score_files.ScoreTable`]: one row per example. It can be written to a Parquet file, from which
            a run with `score_file` starts.
        """
        if self._activation is None:
            raise ValueError("There is nothing to score without a curriculum. Set `curriculum=True`.")
        remedy = "Launch it on one process or with DDP (`recipes/accelerate/ddp.yaml`)."
        check_replicated(self.accelerator, "Scoring without training runs", remedy)
        return self._activation.table()

    def _report_redraw(self, metrics: dict[str, float]) -> None:
        """Announce a redraw, log it with the next step, and draw it."""
        self._phases.announce_redraw(metrics)
        if self.curriculum_sampler.drawn_epoch == self.args.sft_epochs:
            self._activation.warn_if_too_close()
        for key, value in metrics.items():
            self._metrics["train"][key].append(value)
        if self.args.plot_curriculum and self.is_world_process_zero() and find_spec("matplotlib") is not None:
            sampler = self.curriculum_sampler
            path = Path(self.args.output_dir) / "curriculum" / f"epoch_{sampler.drawn_epoch}.png"
            try:
                plot_redraw(path, sampler)
                log_image("curriculum/active_set", path, self.callback_handler.callbacks, self.state.global_step)
            except OSError as error:  # such as a full disk, which is no reason to lose the run
                warnings.warn(f"The figure {path} cannot be written ({error}).", stacklevel=2)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Train as [`~trl.SFTTrainer`] does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Checkpoint to go on from. `True` takes the newest in `output_dir` that is whole; a run that was stopped
                in a scoring pass before its first checkpoint starts from the beginning, with the scores it has.
            trial, ignore_keys_for_eval:
                See [`~transformers.Trainer.train`].

        Raises:
            ValueError: If there is no such checkpoint, it is not whole, or another run has saved it.
            RuntimeError: If the run went beyond phase 1 and yet did no weak-driven step.
        """
        has_scores = resume_from_checkpoint is True and self._activation is not None and self._activation.has_scores()
        checkpoint = find_checkpoint(resume_from_checkpoint, self.args.output_dir, has_scores)
        try:
            output = super().train(checkpoint, trial, ignore_keys_for_eval)
        except KeyboardInterrupt:
            if self.is_world_process_zero():
                kept = self._activation is not None and self._activation.has_scores()
                folder = self._activation.score_cache.folder if kept else None
                print(f"\n{how_to_resume(self.args.output_dir, folder)}", flush=True)  # below the progress bar
            raise
        if self._phases is not None:
            self._phases.check(self.state)
        return output

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The loss of `SFTTrainer` in phase 1 and in evaluation, the mixed loss in a weak-driven epoch."""
        if not self.model.training or not self._weak_driven or not self.args.mixes_logits:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        mixing_lambda = self._mixing_lambda()
        targets = next_token_targets(inputs["labels"])
        model_inputs = {key: value for key, value in inputs.items() if key != "labels"} | {"use_cache": False}
        if return_outputs and self.args.weak_cache is not None:
            raise ValueError(
                "`return_outputs=True` in a training step needs the weak model's logits, of which "
                f"`weak_cache={self.args.weak_cache!r}` keeps the hidden states only. Remove one of them."
            )
        if self._full_logits or return_outputs:
            mixed, outputs = self._mixed_loss_on_full_logits(
                model, model_inputs, targets, mixing_lambda, num_items_in_batch
            )
        else:
            mixed, outputs = self._mixed_loss(model, model_inputs, targets, mixing_lambda, num_items_in_batch)
        # As in SFTTrainer: the items are counted over all processes, whose gradients DDP averages, and the auxiliary
        # loss of a mixture of experts is a mean over one batch
        loss = mixed.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            aux_loss = outputs["aux_loss"]
            loss = loss + self.router_aux_loss_coef * aux_loss / steps
            self._metrics["train"]["aux_loss"].append(self.accelerator.gather(aux_loss.detach()).mean().item())
        self._record(mixed, mixing_lambda, inputs)
        self._phases.loss_was_mixed = True
        return (loss, outputs) if return_outputs else loss

    def _mixing_lambda(self) -> float:
        """The weight of the strong model at the current step."""
        if self.args.lambda_schedule == "crossover":
            _, value = self._crossover
            return value
        if self._plan is None:
            return self._lambda_schedule(0.0)
        first = self._plan.total_steps(self.args.sft_epochs)
        progress = (self.state.global_step - first) / max(1, self.state.max_steps - 1 - first)
        return self._lambda_schedule(min(progress, 1.0))

    def _measure_crossover(self) -> float:
        """Crossover of both models' logits over the supervised tokens of up to 256 examples (paper v2)."""
        dataset, collator = self._remove_unused_columns(self.train_dataset), self.data_collator
        if self._activation is not None:
            dataset, collator = self._activation.score_cache.dataset, self._activation.score_cache.data_collator
            if (cache := self._activation.hidden_cache) is not None:
                dataset = dataset.add_column(INDEX_COLUMN, np.arange(len(dataset)))
                collator = CachedHiddenCollator(collator, cache)
        sample = dataset.shuffle(seed=self.args.draw_seed).select(range(min(256, len(dataset))))
        norms = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        batch_size = min(self.args.per_device_train_batch_size, self.args.per_device_eval_batch_size)
        with undisturbed_random_state(), evaluating(self.model), self.accelerator.autocast():
            for start in range(0, len(sample), batch_size):
                batch = self._prepare_inputs(
                    collator([*sample.select(range(start, min(start + batch_size, len(sample))))])
                )
                targets = next_token_targets(batch.pop("labels"))
                mixed, _ = self._mixed_loss(self.model, batch, targets, 0.5, None, logit_statistics=True)
                norms += torch.stack([mixed.strong_logit_norm.sum(), mixed.weak_logit_norm.sum()])
        strong_norm, weak_norm = self.accelerator.reduce(norms, reduction="sum").tolist()
        return crossover_lambda(strong_norm, weak_norm)

    def _mixed_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        targets: torch.Tensor,
        mixing_lambda: float,
        num_items: torch.Tensor | int | None,
        logit_statistics: bool = False,
    ) -> tuple[MixedLossOutput, HeadOutput]:
        """The fused form, on the hidden states of the positions that have a target."""
        positions = (targets != -100).nonzero().squeeze(-1)
        weak_hidden = inputs.pop("weak_hidden", None)
        if weak_hidden is not None:
            check_positions(len(weak_hidden), len(positions))
        weak_states = self.weak_reference.states(inputs, positions, weak_hidden)
        mixed: MixedLossOutput | None = None

        def fused_loss(hidden: torch.Tensor, head: LMHead) -> torch.Tensor:
            def mix(weak_hidden: torch.Tensor, weak_head: LMHead) -> torch.Tensor:
                nonlocal mixed
                with whole_lm_head(head) as strong, whole_lm_head(weak_head) as weak:
                    if not self.weak_reference.trained:
                        weak = weak.detach()
                    mixed = linear_mixed_cross_entropy(
                        hidden.to(strong.weight.device),
                        strong.weight,
                        weak_hidden.to(weak.weight.device),
                        weak.weight,
                        targets[positions],
                        mixing_lambda,
                        strong.bias,
                        weak.bias,
                        num_items=num_items,
                        ignore_index=None,
                        anchor_weight=self.args.anchor_weight,
                        strong_scale=strong.scale,
                        weak_scale=weak.scale,
                        strong_softcap=strong.softcap,
                        weak_softcap=weak.softcap,
                        buffer_bytes=self.args.logits_buffer_mb * 2**20,
                        logit_statistics=logit_statistics,
                        loss_type=self.args.loss_type,
                    )
                return mixed.loss

            return weak_states(mix)

        if self.aux_loss_enabled:
            inputs = inputs | {"output_router_logits": True}
        outputs = model(**inputs, positions=positions, with_lm_head=fused_loss)
        # The gradient must pass through what the forward returns, but FSDP2 rounds that under mixed precision
        loss = outputs["value"]
        mixed.loss = mixed.loss.detach() + (loss - loss.detach())
        return mixed, outputs

    def _mixed_loss_on_full_logits(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        targets: torch.Tensor,
        mixing_lambda: float,
        num_items: torch.Tensor | int | None,
    ) -> tuple[MixedLossOutput, ModelOutput]:
        """For a model whose logits are not those of a linear head."""
        strong_inputs = inputs | ({"output_router_logits": True} if self.aux_loss_enabled else {})
        if self.weak_reference.trained:  # DDP knows only what a forward of the model that it wraps has used
            result = model(**strong_inputs, beside=lambda: self.weak_reference.logits(inputs))
            outputs, weak_logits = result["outputs"], result["beside"]
        else:
            weak_logits = self.weak_reference.logits(inputs)
            outputs = model(**strong_inputs)
        logits, weak_logits = outputs.logits.flatten(0, 1), weak_logits.flatten(0, 1)
        mixed = mixed_loss(
            logits,
            weak_logits,
            targets,
            mixing_lambda,
            num_items=num_items,
            anchor_weight=self.args.anchor_weight,
            loss_type=self.args.loss_type,
        )
        return mixed, outputs

    @torch.no_grad()
    def _record(self, mixed: MixedLossOutput, mixing_lambda: float, inputs: dict[str, Any]) -> None:
        """Add the token averages of a step to the trainer's metrics, under SFTTrainer's names where it has one."""
        # Padding-free batches have no attention mask and no padding
        num_tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        wrong_mass, mixed_wrong_mass = (
            (-torch.expm1(log_probs)).sum() for log_probs in (mixed.strong_log_probs, mixed.mixed_log_probs)
        )
        sums = {
            "num_tokens": torch.as_tensor(num_tokens, device=mixed.loss.device),
            "items": mixed.mask.sum(),
            "entropy": mixed.strong_entropy.sum(),
            "weak_entropy": mixed.weak_entropy.sum(),
            "mixed_entropy": mixed.mixed_entropy.sum(),
            "strong_nll": -mixed.strong_log_probs.sum(),
            "mixed_nll": -mixed.mixed_log_probs.sum(),
            "mean_token_accuracy": mixed.is_top1.sum(),
            "wrong_mass": wrong_mass,
            "mixed_wrong_mass": mixed_wrong_mass,
        }
        # One reduction and one host sync for all of them
        totals = self.accelerator.reduce(torch.stack([value.float() for value in sums.values()]), reduction="sum")
        num_tokens, items, *totals = totals.tolist()
        means = dict(zip(list(sums)[2:], (total / max(items, 1) for total in totals), strict=True))
        means["mixing_lambda"] = mixing_lambda
        for key, value in means.items():
            self._metrics["train"][key].append(value)
        self._total_train_tokens += int(num_tokens)
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the amplification: of the means since the last log, since a batch with hardly any wrong mass would rule
        a mean of ratios."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        if (wrong_mass := sum(metrics.get("wrong_mass", []))) > 0:
            metrics["amplification"] = [sum(metrics["mixed_wrong_mass"]) / wrong_mass]
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        late = self.args.train_weak and self.args.sft_epochs > 0 and engine_name(self.accelerator) != "replicated"
        if late and self._late_parameters is None:
            self._late_parameters = LateParameters(optimizer, self.weak_reference.trained_parameters())
            if self.is_fsdp_enabled:
                self.add_callback(self._late_parameters)
        return optimizer

    # The overrides below give the weak-driven epochs their own data loader and length. Private to transformers,
    # checked with 5.23: one data loader and one epoch length serve the whole run there.

    def _reached(self, override: str) -> None:
        """Note that the Trainer has called an override, which it would not do under another name."""
        if self._phases is not None:
            self._phases.reached.add(override)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple:
        values = super().set_initial_training_values(args, dataloader)
        self._reached("set_initial_training_values")
        epochs, steps_per_epoch, num_examples, num_samples, batch_size, full_batches, max_steps = values
        active_batches = full_batches
        if self.curriculum_sampler is not None:
            self._active_dataloader = self._make_active_dataloader()
            active_batches = len(self._active_dataloader)
        num_processes = self.accelerator.num_processes
        self._plan = EpochPlan(
            args.sft_epochs,
            full_batches,
            active_batches,
            args.gradient_accumulation_steps,
            self._train_batch_size // (num_processes if self.accelerator.split_batches else 1),
            num_processes,
        )
        if active_batches == full_batches:
            return values
        if args.max_steps > 0:
            epochs = self._plan.num_epochs(max_steps)
        else:
            max_steps = self._plan.total_steps(args.num_train_epochs)
            num_samples = max_steps * batch_size
        return epochs, steps_per_epoch, num_examples, num_samples, batch_size, full_batches, max_steps

    def _make_active_dataloader(self) -> DataLoader:
        dataset, collator, cache = self._activation.dataset_of_rows, self.data_collator, self._activation.hidden_cache
        if cache is not None:
            dataset = dataset.add_column(INDEX_COLUMN, np.arange(len(dataset)))
            self.data_collator = CachedHiddenCollator(collator, cache)
        try:
            return self._get_dataloader(
                dataset=dataset,
                description="Weak-driven training",
                batch_size=self._train_batch_size,
                sampler_fn=lambda _: self.curriculum_sampler,
                is_training=True,
            )
        finally:
            self.data_collator = collator

    def _used_columns(self) -> list[str] | None:
        """The columns that the data collator gets in training; `None` stands for all."""
        self._set_signature_columns_if_needed()
        return self._signature_columns if self.args.remove_unused_columns else None

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if INDEX_COLUMN not in self._signature_columns:
            self._signature_columns.append(INDEX_COLUMN)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        epoch, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self._reached("_init_training_state")
        self._crossover = None
        if self.curriculum_sampler is not None:
            self._activation.compare_with_initial_model()
            self.curriculum_sampler.drawn_epoch = None
        if self._refresh is not None and self._refresh.round_epoch is not None and resume_from_checkpoint is None:
            raise ValueError(
                "The weak model is no longer the one that the trainer began with, since `weak_refresh='epoch'` has "
                "replaced it. Make a new trainer to train again, or pass `resume_from_checkpoint`."
            )
        if resume_from_checkpoint is not None and self.weak_reference is not None:
            self._phases.check_reached("set_initial_training_values")  # which makes the plan
            epoch, steps = self._plan.locate(self.state.global_step)
            batches = 0 if self.args.ignore_data_skip else steps * self.args.gradient_accumulation_steps
            self._take_up(Path(resume_from_checkpoint), epoch, steps)
        return epoch, batches

    def _take_up(self, checkpoint: Path, epoch: int, steps: int) -> None:
        """Go on with what a checkpoint holds, after some steps of an epoch."""
        step, saved_epoch = self.state.global_step, self.state.epoch or 0.0
        # For the callbacks: that of the checkpoint may come from a run whose epochs had other lengths
        self.state.epoch = epoch + steps / self._plan.steps(epoch)
        saved = read_state(checkpoint)
        if saved is None:  # a checkpoint of plain SFT, from which any run may go on
            check_goes_on_from_sft(checkpoint, self.args, self.accelerator)
            if self._depends_on_epochs() and not self._plan.agrees(step, saved_epoch):
                warnings.warn(
                    f"{checkpoint} was saved by plain SFT at epoch {saved_epoch:.2f}. With the batches of this run, "
                    f"its {step} steps are {self.state.epoch:.2f} epochs, from where training goes on.",
                    stacklevel=2,
                )
            return
        run = self._identity()
        is_phase_1 = step <= self._plan.total_steps(self.args.sft_epochs)
        saved = migrated(checkpoint, saved, run, is_phase_1)
        check_same_run(checkpoint / STATE_FILE, saved["run"], run)
        if self._depends_on_epochs() and saved["epochs"] is None:
            check_same_place(checkpoint, self._plan, step, saved_epoch)
        elif self._depends_on_epochs():
            before = EpochPlan(**saved["epochs"])
            check_same_steps(checkpoint, before, self._plan)
            if steps and (self.curriculum_sampler is None or epoch < self.args.sft_epochs):
                check_same_order(checkpoint, self.args.train_sampling_strategy, before, self._plan)
        self._crossover = saved["crossover"]
        if self._refresh is not None and any(name.startswith(WEAK_FOLDER) for name in saved["files"]):
            self._refresh.resume_from = checkpoint / WEAK_FOLDER
        if self.curriculum_sampler is not None and self.curriculum_sampler.FILE_NAME in saved["files"]:
            self.curriculum_sampler.load(checkpoint)

    def _depends_on_epochs(self) -> bool:
        """Whether anything happens at the end of an epoch that SFTTrainer does not know."""
        if self.curriculum_sampler is not None:
            return True
        # Without a length there is one epoch to transformers, or as many as it takes
        return has_length(self.train_dataset) and (self.args.sft_epochs > 0 or self._refresh is not None)

    def _identity(self) -> dict[str, Any]:
        """What a run depends on and a resumed one must not change, in JSON types."""
        options = ["mixing_lambda", "final_mixing_lambda", "anchor_weight", "sft_epochs", "curriculum"]
        identity = {
            "weak_model": self.weak_reference.fingerprint,
            "lambda_schedule": schedule_name(self.args.lambda_schedule),
            "train_weak": self.args.train_weak,
            "weak_refresh": self.args.weak_refresh,
            "engine": checkpoint_form(self.args, self.accelerator),
        }
        if self.curriculum_sampler is not None:
            identity["train_dataset"] = self._activation.fingerprint
            options += [
                "curriculum_variant",
                "difficulty_weight",
                "consolidation_weight",
                "repair_weight",
                "active_fraction",
                "curriculum_replacement",
                "rescore_epochs",
                "train_sampling_strategy",
                "packing",
                "seed",
                "data_seed",
            ]
        return {option: getattr(self.args, option) for option in options} | identity

    def _run_epoch(
        self,
        *,
        epoch: int,
        train_dataloader: DataLoader,
        steps_in_epoch: int,
        num_update_steps_per_epoch: int,
        **kwargs: Any,
    ) -> None:
        self._reached("_run_epoch")
        self._weak_driven = epoch >= self.args.sft_epochs
        sampler = self.curriculum_sampler
        if sampler is not None:
            if self._weak_driven:
                train_dataloader = self._active_dataloader
                steps_in_epoch, num_update_steps_per_epoch = self._plan.batches(epoch), self._plan.steps(epoch)
                self._activation.fill_hidden_cache()
            else:
                self._activation.score_initial_model()
            cache = self._activation.hidden_cache
            if cache is not None and cache.complete and sampler.weak_entropy is not None:
                self.weak_reference.keep_only_lm_head()
        if self._weak_driven and self.args.lambda_schedule == "crossover" and (self._crossover or [None])[0] != epoch:
            self._crossover = epoch, self._measure_crossover()
        if self._late_parameters is not None and self._weak_driven:
            first = self.state.global_step == self._plan.total_steps(self.args.sft_epochs)
            self._late_parameters.train(self.optimizer, first)
        elif self._late_parameters is not None:
            self._late_parameters.wait(self.optimizer)
        super()._run_epoch(
            epoch=epoch,
            train_dataloader=train_dataloader,
            steps_in_epoch=steps_in_epoch,
            num_update_steps_per_epoch=num_update_steps_per_epoch,
            **kwargs,
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Before the rest, so that a checkpoint with a trainer state, which comes last, is whole
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.weak_reference is not None and self.args.should_save and not self.args.save_only_model:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # of an earlier run
            files = []
            if self.curriculum_sampler is not None and self.curriculum_sampler.save(folder):
                files.append(folder / self.curriculum_sampler.FILE_NAME)
            if self.weak_reference.trained and engine_name(self.accelerator) == "replicated":
                self.weak_reference.save(folder / WEAK_FOLDER)
                files += [path for path in (folder / WEAK_FOLDER).rglob("*") if path.is_file()]
            if self._refresh is not None and (path := self._refresh.file_in(folder / WEAK_FOLDER)) is not None:
                files.append(path)
            state = {
                "format": FORMAT,
                "run": self._identity(),
                "epochs": asdict(self._plan),
                "crossover": self._crossover,
                "files": [path.relative_to(folder).as_posix() for path in files],
            }
            (folder / STATE_FILE).write_text(json.dumps(state, indent=1))
        if self._refresh is not None and not self.args.save_only_model:
            self._refresh.save(folder / WEAK_FOLDER)
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # With SHARDED_STATE_DICT the Trainer (checked with transformers 5.23) writes checkpoints, but no final model
        in_checkpoint = _internal_call and output_dir is not None
        with contextlib.nullcontext() if in_checkpoint else whole_state_dict(self.accelerator):
            super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        weak = self.weak_reference
        if self.is_fsdp_enabled:  # whose checkpoint has both models
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with self._without_weak_branch():
            if not load_renamed_weights(self.model, resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint) / WEAK_FOLDER
        if weak is not None and weak.trained and folder.exists():  # not in a checkpoint of plain SFT
            weak.load(folder)

    def _load_best_model(self) -> None:
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        with contextlib.nullcontext() if sharded else self._without_weak_branch():
            if sharded or not load_renamed_weights(self.model, self.state.best_model_checkpoint):
                super()._load_best_model()

    def _without_weak_branch(self) -> contextlib.AbstractContextManager[None]:
        weak = self.weak_reference
        return weak.detached() if weak is not None and weak.trained else contextlib.nullcontext()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Private to transformers, checked with 5.23."""
        weak = self.weak_reference
        of_plain_sft = checkpoint is not None and not (Path(checkpoint) / WEAK_FOLDER).exists()
        if weak is None or not weak.trained or engine_name(self.accelerator) != "replicated" or not of_plain_sft:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with without_parameters(self.optimizer, weak.trained_parameters()):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: WMSSConfig,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        """Keeps the documents of a packed training set for the curriculum. Private to TRL, checked with 1.16."""
        if not (packing and args.curriculum and dataset_name == "train" and self._documents is None):
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if args.packing_strategy == "wrapped":
            rows = super()._prepare_dataset(dataset, processing_class, args, True, formatting_func, dataset_name)
            # Cut anywhere, a row may hold no target: it adds nothing to a loss and has no entropy
            return rows.filter(lambda labels: any(y != -100 for y in labels[1:]), input_columns="labels")
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        dataset = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        # What packing does to documents that are too long
        cut = copy.copy(args)
        cut.truncation_mode, cut.shuffle_dataset = "keep_start", False
        self._documents = super()._prepare_dataset(dataset, processing_class, cut, False, None, dataset_name)
        return super()._prepare_dataset(dataset, processing_class, args, True, None, dataset_name)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        super().create_model_card(model_name, dataset_name, tags)
        card = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero() and card.exists():
            # TRL leaves "None" where a model has no hub id of its own or of its base (checked with TRL 1.16)
            base = Path(get_config_model_id(self.model.config) or "a model built from its configuration").name
            text = card.read_text().replace("[None](https://huggingface.co/None)", base)
            card.write_text(text.replace('model="None"', f'model="{model_name or self.args.output_dir}"'))
