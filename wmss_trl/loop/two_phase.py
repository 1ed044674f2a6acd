"""
Two phases in one run of the Trainer: the only place that overrides its private methods.

transformers has one data loader and one epoch length for the whole run. The overrides give the weak-driven epochs
their own, keep in a checkpoint what a run needs to go on in the middle of one, and leave the weak model out of what is
saved.
"""

import contextlib
import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length
from trl import SFTTrainer

from ..config import WMSSConfig
from ..distributed.engines import check_goes_on_from_sft, checkpoint_form, engine_name, whole_state_dict
from ..losses.schedules import Crossover, schedule_name
from ..scoring.hidden_cache import INDEX_COLUMN, CachedHiddenCollator
from ..user_warnings import warn
from .checkpoints import load_renamed_weights, without_parameters
from .epoch_plan import EpochPlan
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


class TwoPhaseTrainer(SFTTrainer):
    """
    [`~trl.SFTTrainer`] with the private methods that a run in two phases overrides.

    What it relies on is listed in `compatibility`, with the versions that were checked.
    """

    @property
    def _weak_driven(self) -> bool:
        """Whether this epoch is a weak-driven one; before training, whether the first one is."""
        epoch = None if self._phases is None else self._phases.epoch
        return self.args.sft_epochs == 0 if epoch is None else epoch >= self.args.sft_epochs

    @property
    def _crossover(self) -> tuple[int, float] | None:
        """Of the schedule "crossover": the epoch and the value that was measured at its start."""
        return getattr(self._lambda_schedule, "measured", None)

    @_crossover.setter
    def _crossover(self, measured: tuple[int, float] | None) -> None:
        if isinstance(self._lambda_schedule, Crossover):
            self._lambda_schedule.measured = measured

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
        dataset, collator, cache = self._selection.dataset_of_rows, self.data_collator, self._selection.hidden_cache
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
            self._selection.compare_with_initial_model()
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
                warn(
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
            identity["train_dataset"] = self._selection.fingerprint
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
        weak_driven = epoch >= self.args.sft_epochs
        sampler = self.curriculum_sampler
        if sampler is not None:
            if weak_driven:
                train_dataloader = self._active_dataloader
                steps_in_epoch, num_update_steps_per_epoch = self._plan.batches(epoch), self._plan.steps(epoch)
                self._selection.fill_hidden_cache()
            else:
                self._selection.score_initial_model()
            cache = self._selection.hidden_cache
            if cache is not None and cache.complete and sampler.weak_entropy is not None:
                self.weak_reference.keep_only_lm_head()
        if weak_driven and self.args.lambda_schedule == "crossover" and (self._crossover or [None])[0] != epoch:
            self._crossover = epoch, self._measure_crossover()
        if self._late_parameters is not None and weak_driven:
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
