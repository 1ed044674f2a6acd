import json
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.data_loader import get_sampler
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
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalPrediction
from transformers.utils import ModelOutput
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import get_config_model_id

from .config import WMSSConfig, convert_arguments
from .curriculum import CurriculumSampler
from .epochs import EpochPlan
from .lm_head import HeadOutput, LMHead, add_head_access, unwrap_adapter
from .losses import MixedLossOutput, linear_mixed_cross_entropy, mixed_loss, next_token_targets
from .scoring import score_entropy, supervised_token_counts
from .weak import WeakReference, make_weak_reference

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
            The weak reference: a hub id, a checkpoint folder or a model with the vocabulary of `model`. If `None`,
            `args.weak_model_name_or_path` or else `model` as it is handed in: a frozen copy of it or, when
            `peft_config` puts a new adapter on it, the same weights with the adapter switched off.
        kwargs:
            All other arguments of [`~trl.SFTTrainer`], in its order.

    Raises:
        ValueError: If the options, the data set or the weak model cannot be used; the message names the remedy.
    """

    _tag_names = ["trl", "sft", "wmss"]  # noqa: RUF012
    _name = "WMSS"
    _STATE_FILE = "wmss_state.json"
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
        args = self._as_wmss_config(args, model)
        if weak_model is not None and weak_model is model and not isinstance(weak_model, str):
            raise ValueError(
                "`weak_model` and `model` are the same object. Omit `weak_model` to mix with the model as it is "
                "handed in: the trainer keeps its own copy."
            )
        if args.uses_weak_model and compute_loss_func is not None:
            raise ValueError("`compute_loss_func` cannot be combined with the mixed loss. Remove it.")
        streaming = isinstance(train_dataset, IterableDataset)
        if args.uses_weak_model and streaming and (args.curriculum or args.sft_epochs):
            raise ValueError(
                f"A streaming `train_dataset` cannot be scored and has no epochs, but `curriculum={args.curriculum}` "
                f"and `sft_epochs={args.sft_epochs}`. Load the data set without `streaming=True`, or set "
                "`curriculum=False` and `sft_epochs=0`."
            )
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
        # A step outside `train` uses the loss that the run starts with
        self._weak_driven = args.sft_epochs == 0
        self._plan: EpochPlan | None = None
        self.weak_reference: WeakReference | None = None
        self.curriculum_sampler: CurriculumSampler | None = None
        if not args.uses_weak_model:
            if weak_model is not None:
                warnings.warn(
                    "`weak_model` is not used: `mixing_lambda=1.0` with `curriculum=False` is plain SFT.", stacklevel=2
                )
            return
        self._check_supported()
        head_problem = add_head_access(unwrap_adapter(self.model))
        self.weak_reference = make_weak_reference(
            weak_model, self.model, self.args, self.processing_class, self.accelerator, peft_config
        )
        problems = {"model": head_problem, "weak model": self.weak_reference.head_problem}
        self._full_logits = any(problems.values())
        if self._full_logits:
            because = "; ".join(f"because of the {name}: {problem}" for name, problem in problems.items() if problem)
            warnings.warn(f"Loss and scores need the full logits, which take more memory, {because}.", stacklevel=2)
        if args.curriculum:
            self.curriculum_sampler = self._make_curriculum_sampler()
            self.add_callback(self.curriculum_sampler)

    @staticmethod
    def _as_wmss_config(args: TrainingArguments | None, model: "str | PreTrainedModel") -> WMSSConfig:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            return WMSSConfig(f"{name.split('/')[-1]}-WMSS")
        if isinstance(args, WMSSConfig):
            return args
        return convert_arguments(args, WMSSConfig)

    def _check_supported(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "DeepSpeed and FSDP are not supported in this version of WMSSTrainer. Launch with plain data "
                "parallelism (DDP): `accelerate launch --multi_gpu`."
            )
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.tp_enabled or parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "Tensor, context and sequence parallelism are not supported in this version of WMSSTrainer: set "
                "`tp_size`, `cp_size` and `sp_size` to 1."
            )
        if self._is_vision_dataset:
            raise ValueError("WMSSTrainer supports text data sets only, but `train_dataset` has images.")
        if is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"`peft_config` of type {self.model.active_peft_config.peft_type.value} adds virtual tokens, which "
                "the weak model does not have. Use a method that keeps the sequence, such as LoRA."
            )

    def _make_curriculum_sampler(self) -> CurriculumSampler:
        args = self.args
        if "input_ids" not in self.train_dataset.column_names:
            raise ValueError(
                f"`curriculum=True` needs a tokenized `train_dataset` to score, but its columns are "
                f"{self.train_dataset.column_names}. Let the trainer prepare the data set, or set `curriculum=False`."
            )
        token_counts = supervised_token_counts(self.train_dataset)
        empty = np.flatnonzero(token_counts == 0)
        if len(empty):
            raise ValueError(
                f"`train_dataset` has {len(empty)} examples without a supervised token, which have no entropy: "
                f"indices {empty[:10].tolist()}{' ...' if len(empty) > 10 else ''}. Remove them, or check the labels "
                f"and `max_length={args.max_length}`."
            )
        sampler = CurriculumSampler(
            len(self.train_dataset),
            self._score,
            first_epoch=args.sft_epochs,
            active_fraction=args.active_fraction,
            replacement=args.curriculum_replacement,
            variant=args.curriculum_variant,
            difficulty_weight=args.difficulty_weight,
            consolidation_weight=args.consolidation_weight,
            repair_weight=args.repair_weight,
            shuffle=args.train_sampling_strategy == "random",
            seed=args.seed if args.data_seed is None else args.data_seed,
            identity={
                "sft_epochs": args.sft_epochs,
                "train_dataset": f"{zlib.crc32(token_counts.tobytes()):08x}",
                "weak_model": self.weak_reference.fingerprint,
            },
            log=lambda metrics: [self._metrics["train"][key].append(value) for key, value in metrics.items()],
        )
        batch_size = args.per_device_train_batch_size * self.accelerator.num_processes
        if sampler.num_active < batch_size:
            raise ValueError(
                f"The active set (`active_fraction={args.active_fraction}` of {len(self.train_dataset)} examples) has "
                f"{sampler.num_active} examples, less than one batch of {batch_size}. Use more data, a larger "
                "`active_fraction` or a smaller `per_device_train_batch_size`."
            )
        return sampler

    def _score(self) -> tuple[np.ndarray, np.ndarray]:
        """Entropies of the training set under the weak and the strong model."""
        collator = self.data_collator
        if self.padding_free:  # which merges the examples of a batch into one row
            collator = DataCollatorForLanguageModeling(collator.pad_token_id)
        score = partial(
            score_entropy,
            dataset=self.train_dataset,
            data_collator=collator,
            batch_size=self.args.scoring_batch_size or self.args.per_device_eval_batch_size,
            accelerator=self.accelerator,
            disable_tqdm=self.args.disable_tqdm,
            buffer_bytes=self.args.logits_buffer_mb * 2**20,
        )
        weak_entropy = self.curriculum_sampler.weak_entropy
        if weak_entropy is None:  # the weak model is frozen: once is enough
            with self.weak_reference.activated() as weak:
                weak_entropy = score(weak, description="Scoring, weak model")
        return weak_entropy, score(self.model, description="Scoring, strong model")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The loss of `SFTTrainer` in phase 1 and in evaluation, the mixed loss in a weak-driven epoch."""
        mixing_lambda = self.args.mixing_lambda
        if not self.model.training or not self._weak_driven or mixing_lambda == 1:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        targets = next_token_targets(inputs["labels"])
        model_inputs = {key: value for key, value in inputs.items() if key != "labels"} | {"use_cache": False}
        if self._full_logits or return_outputs:
            mixed, outputs = self._mixed_loss_on_full_logits(model, model_inputs, targets, num_items_in_batch)
        else:
            mixed, outputs = self._mixed_loss(model, model_inputs, targets, num_items_in_batch)
        # As in SFTTrainer: the items are counted over all processes, whose gradients DDP averages, and the auxiliary
        # loss of a mixture of experts is a mean over one batch
        loss = mixed.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
            self._metrics["train"]["aux_loss"].append(self.accelerator.gather(outputs.aux_loss.detach()).mean().item())
        self._record(mixed, mixing_lambda, inputs)
        return (loss, outputs) if return_outputs else loss

    def _mixed_loss(
        self, model: nn.Module, inputs: dict[str, Any], targets: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> tuple[MixedLossOutput, HeadOutput]:
        """The fused form, on the hidden states of the positions that have a target."""
        positions = (targets != -100).nonzero().squeeze(-1)
        with self.weak_reference.activated() as weak:
            weak_hidden, weak_head = weak(
                **inputs, positions=positions, with_lm_head=lambda hidden, head: (hidden, head)
            ).value

        def fused_loss(hidden: torch.Tensor, head: LMHead) -> MixedLossOutput:
            return linear_mixed_cross_entropy(
                hidden,
                head.weight,
                weak_hidden,
                weak_head.weight,
                targets[positions],
                self.args.mixing_lambda,
                head.bias,
                weak_head.bias,
                num_items=num_items,
                ignore_index=None,
                anchor_weight=self.args.anchor_weight,
                strong_scale=head.scale,
                weak_scale=weak_head.scale,
                strong_softcap=head.softcap,
                weak_softcap=weak_head.softcap,
                buffer_bytes=self.args.logits_buffer_mb * 2**20,
            )

        if self.aux_loss_enabled:
            inputs = inputs | {"output_router_logits": True}
        outputs = model(**inputs, positions=positions, with_lm_head=fused_loss)
        return outputs.value, outputs

    def _mixed_loss_on_full_logits(
        self, model: nn.Module, inputs: dict[str, Any], targets: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> tuple[MixedLossOutput, ModelOutput]:
        """For a model whose logits are not those of a linear head."""
        with self.weak_reference.activated() as weak:
            weak_logits = weak(**inputs).logits.flatten(0, 1)
        if self.aux_loss_enabled:
            inputs = inputs | {"output_router_logits": True}
        outputs = model(**inputs)
        logits = outputs.logits.flatten(0, 1)
        lam, anchor = self.args.mixing_lambda, self.args.anchor_weight
        return mixed_loss(logits, weak_logits, targets, lam, num_items=num_items, anchor_weight=anchor), outputs

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
        means["amplification"] = means["mixed_wrong_mass"] / max(means["wrong_mass"], torch.finfo(torch.float32).tiny)
        means["mixing_lambda"] = mixing_lambda
        for key, value in means.items():
            self._metrics["train"][key].append(value)
        self._total_train_tokens += int(num_tokens)
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    # The three overrides below let the weak-driven epochs be shorter than those of phase 1; with `active_fraction=1.0`
    # they change nothing. Private to transformers, checked with 5.23: one epoch length serves the whole run there.

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple:
        values = super().set_initial_training_values(args, dataloader)
        epochs, steps_per_epoch, num_examples, num_samples, batch_size, full_batches, max_steps = values
        active_batches = full_batches
        if self.curriculum_sampler is not None:
            active_batches = self._count_batches(dataloader, len(self.curriculum_sampler))
        self._plan = EpochPlan(args.sft_epochs, full_batches, active_batches, args.gradient_accumulation_steps)
        if active_batches == full_batches:
            return values
        if args.max_steps > 0:
            epochs = self._plan.num_epochs(max_steps)
        else:
            max_steps = self._plan.total_steps(args.num_train_epochs)
            num_samples = max_steps * batch_size
        return epochs, steps_per_epoch, num_examples, num_samples, batch_size, full_batches, max_steps

    @staticmethod
    def _count_batches(dataloader: DataLoader, num_examples: int) -> int:
        """Length that `dataloader` would have over `num_examples` examples."""
        sampler = get_sampler(dataloader)
        dataloader.set_sampler(range(num_examples))
        try:
            return len(dataloader)
        finally:
            dataloader.set_sampler(sampler)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        epoch, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if self.curriculum_sampler is not None:
            self.curriculum_sampler.drawn_epoch = None
            if resume_from_checkpoint is not None:
                self.curriculum_sampler.load(resume_from_checkpoint)
                epoch, steps = self._plan.locate(self.state.global_step)
                batches = 0 if self.args.ignore_data_skip else steps * self.args.gradient_accumulation_steps
        if self.weak_reference is not None and resume_from_checkpoint is not None:
            self._check_same_weak_model(Path(resume_from_checkpoint))
        return epoch, batches

    def _check_same_weak_model(self, checkpoint: Path) -> None:
        """A run that is resumed from the model in the checkpoint would take that for M0."""
        state = checkpoint / self._STATE_FILE
        if not state.exists() or json.loads(state.read_text())["weak_model"] == self.weak_reference.fingerprint:
            return
        message = (
            f"The weak model is not the one of the run that saved {checkpoint}. Pass the same `weak_model`; if there "
            "was none, pass as `model` what the run started from (M0), not the checkpoint."
        )
        if self.state.global_step > self._plan.total_steps(self.args.sft_epochs):
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)  # no step has used a weak model yet

    def _run_epoch(self, *, epoch: int, steps_in_epoch: int, num_update_steps_per_epoch: int, **kwargs: Any) -> None:
        self._weak_driven = epoch >= self.args.sft_epochs
        if self.curriculum_sampler is not None:
            steps_in_epoch, num_update_steps_per_epoch = self._plan.batches(epoch), self._plan.steps(epoch)
        super()._run_epoch(
            epoch=epoch,
            steps_in_epoch=steps_in_epoch,
            num_update_steps_per_epoch=num_update_steps_per_epoch,
            **kwargs,
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.weak_reference is not None and self.args.should_save and not self.args.save_only_model:
            # Before the rest, so that a checkpoint with a trainer state always has its draw
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / self._STATE_FILE).write_text(json.dumps({"weak_model": self.weak_reference.fingerprint}))
            if self.curriculum_sampler is not None:
                self.curriculum_sampler.save(folder)
        super()._save_checkpoint(model, trial)

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
