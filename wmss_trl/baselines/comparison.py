"""WMSS beside its baselines: from the same M1, with the same optimizer state and the same number of steps."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..config import WMSSConfig, convert_arguments
from ..curriculum.sampler import CurriculumSampler
from ..reports.mixture import evaluate_mixture
from ..trainer import WMSSTrainer
from .uniform import UniformModel

WMSS, TEMPERATURE = "WMSS", "temperature only"


def sft_name(factor: float) -> str:
    return f"SFT, lr x {factor:g}"


@dataclass
class Result:
    """
    One row of a comparison.

    Args:
        name (`str`):
            What was trained.
        correct (`np.ndarray` of shape `(num_problems,)`):
            Which held-out problems the model alone solves.
        metrics (`dict[str, float]`):
            Held-out token averages of [`~wmss_trl.reports.mixture.evaluate_mixture`], always with M0 as the weak
            model.
        loss (`list[tuple[int, float]]`):
            Optimizer steps and the training loss logged there. Mixed losses and SFT's are not on one scale.
        accuracy (`list[tuple[int, float]]`):
            Optimizer steps and the held-out accuracy measured there.
    """

    name: str
    correct: np.ndarray
    metrics: dict[str, float]
    loss: list[tuple[int, float]] = field(default_factory=list)
    accuracy: list[tuple[int, float]] = field(default_factory=list)


class _SaveAfterPhase1(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        if round(state.epoch) == args.sft_epochs:
            self.step = state.global_step
            control.should_save = True


class _ScaleLearningRate(TrainerCallback):
    """Scales the schedule that a resumed run takes from its checkpoint."""

    def __init__(self, factor: float):
        self.factor = factor

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        lr_scheduler.base_lrs = [self.factor * lr for lr in lr_scheduler.base_lrs]
        for group in optimizer.param_groups:
            group["lr"] *= self.factor


class _AccuracyCurve(TrainerCallback):
    def __init__(self, evaluate: Callable[[PreTrainedModel], np.ndarray], points: int):
        self.evaluate, self.num_points, self.points = evaluate, points, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        every = max(1, state.max_steps // self.num_points)
        if state.global_step % every == 0 and state.global_step < state.max_steps:
            self.points.append((state.global_step, float(self.evaluate(model).mean())))


def compare_with_baselines(
    make_model: Callable[[], PreTrainedModel],
    args: WMSSConfig,
    train_dataset: Dataset,
    eval_dataset: Dataset,
    processing_class: PreTrainedTokenizerBase,
    evaluate: Callable[[PreTrainedModel], np.ndarray],
    learning_rate_factors: tuple[float, ...] = (0.5, 1.0, 2.0),
    curve_points: int = 6,
) -> tuple[list[Result], CurriculumSampler]:
    """
    Train WMSS from M0, then its baselines from the checkpoint at the end of its phase 1 (M1).

    Every run goes on with M1's optimizer and schedule for as many steps as WMSS. The baselines are continued SFT at
    several multiples of the learning rate (WMSS has only the one in `args`), and the mixed loss without a weak model.
    The latter is a temperature. A baseline trains on the whole data set, and WMSS on its active sets.

    Args:
        make_model (`Callable[[], PreTrainedModel]`):
            Returns a new copy of M0.
        args ([`WMSSConfig`]):
            Arguments of the WMSS run; the baselines' differ where they must.
        train_dataset, eval_dataset (`datasets.Dataset`):
            Data sets that [`WMSSTrainer`] accepts.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        evaluate (`Callable[[PreTrainedModel], np.ndarray]`):
            Returns which held-out problems a model solves.
        learning_rate_factors (`tuple[float, ...]`, *optional*, defaults to `(0.5, 1.0, 2.0)`):
            Multiples of the learning rate for continued SFT.
        curve_points (`int`, *optional*, defaults to `6`):
            Number of points at which accuracy is measured during a run.

    Returns:
        `tuple[list[Result], CurriculumSampler]`: the results of M0, M1, WMSS and its baselines, and the sampler of the
        WMSS run with its last redraw.
    """
    folder = Path(args.output_dir)

    def train(name: str, trainer_class: type[Trainer], run_args: SFTConfig, **kwargs: Any) -> tuple[Trainer, Result]:
        resume, callbacks = kwargs.pop("resume", None), kwargs.pop("callbacks", [])
        curve = _AccuracyCurve(evaluate, curve_points)
        trainer = trainer_class(
            make_model(),
            run_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[curve, *callbacks],
            **kwargs,
        )
        PartialState().print(f"Training {name}", flush=True)
        trainer.train(resume_from_checkpoint=resume)
        result = measure(name, trainer.model, trainer)
        result.loss = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        result.accuracy = [*curve.points, (trainer.state.global_step, float(result.correct.mean()))]
        return trainer, result

    def measure(name: str, model: PreTrainedModel, trainer: Trainer) -> Result:
        model, weak = model.to(args.device), make_model().to(args.device)
        metrics = evaluate_mixture(
            model,
            weak,
            trainer.eval_dataset,
            trainer.data_collator,
            args.mixing_lambda,
            args.per_device_eval_batch_size,
        )
        return Result(name, evaluate(model), metrics)

    wmss_args = convert_arguments(args, WMSSConfig, output_dir=str(folder / "wmss"), save_strategy="no")
    phase_1 = _SaveAfterPhase1()
    trainer, wmss = train(WMSS, WMSSTrainer, wmss_args, callbacks=[phase_1])
    checkpoint = f"{wmss_args.output_dir}/checkpoint-{phase_1.step}"
    if PartialState().is_main_process:  # make it a checkpoint of plain SFT: the baselines go on from it
        for name in (WMSSTrainer.STATE_FILE, CurriculumSampler.FILE_NAME):
            (Path(checkpoint) / name).unlink()
    PartialState().wait_for_everyone()
    m0 = measure("M0", make_model(), trainer)
    m1 = measure("M1", AutoModelForCausalLM.from_pretrained(checkpoint), trainer)

    baseline_options = {
        "output_dir": str(folder / "baselines"),
        "max_steps": trainer.state.max_steps,
        "save_strategy": "no",
    }
    sft_args = convert_arguments(args, SFTConfig, **baseline_options)
    baselines = [
        train(sft_name(factor), SFTTrainer, sft_args, callbacks=[_ScaleLearningRate(factor)], resume=checkpoint)
        for factor in learning_rate_factors
    ]
    temperature_args = convert_arguments(args, WMSSConfig, curriculum=False, **baseline_options)
    uniform = UniformModel(trainer.model.config)
    baselines.append(train(TEMPERATURE, WMSSTrainer, temperature_args, weak_model=uniform, resume=checkpoint))

    start = [(0, float(m0.correct.mean())), (phase_1.step, float(m1.correct.mean()))]
    results = [wmss, *(result for _, result in baselines)]
    for result in results:
        result.accuracy = sorted({*start, *result.accuracy})
    return [m0, m1, *results], trainer.curriculum_sampler
