import copy
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import EvalPrediction, TrainOutput
from transformers.utils import ModelOutput
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import get_config_model_id

from .compatibility import warn_of_changes
from .config import WMSSConfig, convert_arguments, own_arguments
from .curriculum.sampler import CurriculumSampler
from .distributed.engines import check_engine, engine_name
from .distributed.late_parameters import LateParameters
from .loop.checkpoints import find_checkpoint, how_to_resume
from .loop.checks import check_call, check_examples, check_lm_heads, check_replicated
from .loop.epoch_plan import EpochPlan, batches_per_process
from .loop.phases import Phases
from .loop.run_state import (
    STATE_FILE,
    WEAK_FOLDER,
)
from .loop.selection import Selection
from .loop.step import MixedHead, token_sums
from .loop.two_phase import TwoPhaseTrainer
from .losses.entropy import next_token_targets
from .losses.mixed import MixedLossOutput, mixed_loss
from .losses.schedules import crossover_lambda, make_lambda_schedule
from .modeling.adapters import keep_trainable_on_cpu
from .modeling.checks import check_model, check_whole
from .modeling.lm_head import HeadOutput, add_head_access
from .modeling.modes import evaluating, unwrap_adapter
from .reports.figures import log_image, plot_redraw
from .scoring.collation import undisturbed_random_state
from .scoring.hidden_cache import INDEX_COLUMN, CachedHiddenCollator, check_positions
from .scoring.table import ScoreTable
from .user_warnings import warn
from .weak_model.base import WeakModel
from .weak_model.factory import keep_initial_model, make_weak_reference
from .weak_model.ranking import AUTO, markdown_ranking, rank_checkpoints
from .weak_model.refresh import WeakRefresh

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


class WMSSTrainer(TwoPhaseTrainer):
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
            same base, `"auto:FOLDER"` (the best checkpoint in a folder, see
            [`~wmss_trl.weak_model.ranking.rank_weak_models`]), or a model with the vocabulary of `model`. If `None`,
            `args.weak_model_name_or_path` or else `model` as it is handed in: a frozen copy of it (of the adapter
            alone, if it is a PEFT model) or, when `peft_config` puts a new adapter on it, the same weights with the
            adapter switched off (copied only if the adapter changes them).
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
        self._plan: EpochPlan | None = None
        self._lambda_schedule = make_lambda_schedule(
            args.lambda_schedule, args.mixing_lambda, args.final_mixing_lambda
        )
        self._selection: Selection | None = None
        self.weak_reference: WeakModel | None = None
        self._late_parameters: LateParameters | None = None
        self._refresh: WeakRefresh | None = None
        self.curriculum_sampler: CurriculumSampler | None = None
        if not args.uses_weak_model:
            if weak_model is not None:
                warn(
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
            self._selection = Selection(
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
            self.curriculum_sampler = self._selection.sampler
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
            [`~wmss_trl.scoring.ScoreTable`]: one row per example. It can be written to a Parquet file, from which
            a run with `score_file` starts.
        """
        if self._selection is None:
            raise ValueError("There is nothing to score without a curriculum. Set `curriculum=True`.")
        remedy = "Launch it on one process or with DDP (`recipes/accelerate/ddp.yaml`)."
        check_replicated(self.accelerator, "Scoring without training runs", remedy)
        return self._selection.table()

    def _report_redraw(self, metrics: dict[str, float]) -> None:
        """Announce a redraw, log it with the next step, and draw it."""
        self._phases.announce_redraw(metrics)
        if self.curriculum_sampler.drawn_epoch == self.args.sft_epochs:
            self._selection.warn_if_too_close()
        for key, value in metrics.items():
            self._metrics["train"][key].append(value)
        plots = self.args.plot_curriculum is not False and find_spec("matplotlib") is not None
        if plots and self.is_world_process_zero():
            sampler = self.curriculum_sampler
            path = Path(self.args.output_dir) / "curriculum" / f"epoch_{sampler.drawn_epoch}.png"
            try:
                plot_redraw(path, sampler)
                log_image("curriculum/active_set", path, self.callback_handler.callbacks, self.state.global_step)
            except OSError as error:  # such as a full disk, which is no reason to lose the run
                warn(f"The figure {path} cannot be written ({error}).", stacklevel=2)

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
        has_scores = resume_from_checkpoint is True and self._selection is not None and self._selection.has_scores()
        checkpoint = find_checkpoint(resume_from_checkpoint, self.args.output_dir, has_scores)
        try:
            output = super().train(checkpoint, trial, ignore_keys_for_eval)
        except KeyboardInterrupt:
            if self.is_world_process_zero():
                kept = self._selection is not None and self._selection.has_scores()
                folder = self._selection.score_cache.folder if kept else None
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
        if self._plan is None:
            return self._lambda_schedule(0.0)
        first = self._plan.total_steps(self.args.sft_epochs)
        progress = (self.state.global_step - first) / max(1, self.state.max_steps - 1 - first)
        return self._lambda_schedule(min(progress, 1.0))

    def _measure_crossover(self) -> float:
        """Crossover of both models' logits over the supervised tokens of up to 256 examples (paper v2)."""
        dataset, collator = self._remove_unused_columns(self.train_dataset), self.data_collator
        if self._selection is not None:
            dataset, collator = self._selection.score_cache.dataset, self._selection.score_cache.data_collator
            if (cache := self._selection.hidden_cache) is not None:
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
        if weak_hidden is None:
            weak_hidden = self.weak_reference.before_forward(inputs, positions)
        else:
            check_positions(len(weak_hidden), len(positions))
        head = MixedHead(
            self.weak_reference,
            inputs,
            positions,
            weak_hidden,
            targets=targets[positions],
            mixing_lambda=mixing_lambda,
            num_items=num_items,
            anchor_weight=self.args.anchor_weight,
            buffer_bytes=self.args.buffer_bytes,
            logit_statistics=logit_statistics,
            loss_type=self.args.loss_type,
        )
        if self.aux_loss_enabled:
            inputs = inputs | {"output_router_logits": True}
        outputs = model(**inputs, positions=positions, with_lm_head=head)
        return head.output_of(outputs["value"]), outputs

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

    def _record(self, mixed: MixedLossOutput, mixing_lambda: float, inputs: dict[str, Any]) -> None:
        """Add the token averages of a step to the trainer's metrics."""
        sums = token_sums(mixed, inputs)
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
