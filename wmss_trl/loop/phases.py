"""The two phases of a run: how they are announced, and whether the weak-driven one took place."""

import math

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState

from ..compatibility import versions
from ..config import WMSSConfig
from ..curriculum.sampler import CurriculumSampler
from ..losses.schedules import schedule_name
from ..user_warnings import warn


class Phases(TrainerCallback):
    """
    Callback that announces the phases of a run and counts its weak-driven steps. Such a step has a mixed loss. With a
    curriculum it also trains on the active set of its epoch.

    The trainer's private overrides say what they have done (`reached`, `loss_was_mixed`). A public callback counts
    the steps, so the count does not depend on the overrides.

    Args:
        args ([`WMSSConfig`]):
            Arguments of the run.
        weak_model (`str`):
            What the weak model is, for the announcement.
        sampler ([`CurriculumSampler`], *optional*):
            Sampler of the curriculum.
        counts_mixed_losses (`bool`):
            Whether a step counts only if `loss_was_mixed`.
        sft_steps (`int`):
            Number of optimizer steps of phase 1, as far as it is known before the data loader is made.
    """

    BEFORE_TRAINING = ("set_initial_training_values", "_init_training_state")

    def __init__(
        self,
        args: WMSSConfig,
        weak_model: str,
        sampler: CurriculumSampler | None,
        counts_mixed_losses: bool,
        sft_steps: int,
    ):
        self.args = args
        self.weak_model = weak_model
        self.sampler = sampler
        self.counts_mixed_losses = counts_mixed_losses
        self.sft_steps = sft_steps
        self.reached: set[str] = set()
        self.loss_was_mixed = False
        self.first_step = 0
        self.weak_driven_steps = 0
        self.epoch: int | None = None
        self.has_weak_driven = args.num_train_epochs > args.sft_epochs if args.max_steps <= 0 else self._lasts_longer()

    def _lasts_longer(self) -> bool:
        """Whether `max_steps` goes beyond phase 1."""
        if self.args.max_steps > self.sft_steps:
            return True
        if self.args.process_index == 0:
            warn(
                f"`max_steps={self.args.max_steps}` ends the run within its {_steps(self.sft_steps, 'SFT')} "
                f"(`sft_epochs={self.args.sft_epochs}`), before any weak-driven one: it is plain SFT. Raise "
                f"`max_steps` above {self.sft_steps} or lower `sft_epochs`.",
                stacklevel=5,
            )
        return False

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if self.args.sft_epochs:
            steps_per_epoch = max(1, math.ceil(len(train_dataloader) / self.args.gradient_accumulation_steps))
            self.sft_steps = self.args.sft_epochs * steps_per_epoch
        if self.has_weak_driven and self.args.max_steps > 0:
            self.has_weak_driven = self._lasts_longer()
        self.check_reached(*self.BEFORE_TRAINING)
        self.reached.clear()
        self.first_step, self.weak_driven_steps = state.global_step, 0
        self.epoch = int(state.epoch or 0) - 1  # `on_epoch_begin` comes next, in a resumed epoch too
        self._say(self._outlook(state))

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epoch += 1
        if self.sampler is None and self.epoch == self.args.sft_epochs > 0:
            self._say(f"Epoch {self.epoch + 1}: the loss is now that of the mixed logits.")

    def on_step_end(self, args, state, control, **kwargs):
        self.check_reached("_run_epoch")
        on_active_set = self.sampler is None or self.sampler.served_epoch == self.sampler.epoch
        self.weak_driven_steps += on_active_set and (self.loss_was_mixed or not self.counts_mixed_losses)
        self.loss_was_mixed = False

    def announce_redraw(self, metrics: dict[str, float]) -> None:
        """
        Say what an active set was drawn from.

        Args:
            metrics (`dict[str, float]`):
                Those of [`CurriculumSampler.metrics`].
        """
        sampler = self.sampler
        line = (
            f"Epoch {sampler.drawn_epoch + 1}: {metrics['curriculum/active_examples']:.0f} of {len(sampler.weights)} "
            f"examples drawn; mean entropy {metrics['curriculum/weak_entropy']:.4g} -> "
            f"{metrics['curriculum/strong_entropy']:.4g} nats (weak -> strong)"
        )
        if self.args.mixes_logits and sampler.drawn_epoch == self.args.sft_epochs > 0:
            line += "; the loss is now that of the mixed logits"
        self._say(f"{line}.")

    def check(self, state: TrainerState) -> None:
        """
        Check a run that has ended.

        Raises:
            RuntimeError: If it went beyond phase 1 and yet none of its steps was weak-driven.
        """
        went_beyond = state.global_step > self.first_step and state.epoch > self.args.sft_epochs
        # With `dispatch_batches` only the main process iterates over the sampler
        if went_beyond and not self.weak_driven_steps and self.args.process_index == 0:
            raise RuntimeError(
                f"No weak-driven step was done, although the run went on to epoch {state.epoch:.2f} with "
                f"`sft_epochs={self.args.sft_epochs}`: the model is one of plain SFT. Likely the Trainer has changed "
                f"({versions('transformers', 'trl', 'accelerate')}). Install a version that was checked."
            )

    def check_reached(self, *overrides: str) -> None:
        """
        Check that the Trainer has called what WMSSTrainer overrides.

        Raises:
            RuntimeError: If it has not, in a run that is to have weak-driven steps.
        """
        missing = [f"`{name}`" for name in overrides if name not in self.reached]
        if missing and self.has_weak_driven:
            raise RuntimeError(
                f"The weak-driven phase needs {', '.join(missing)} of WMSSTrainer, which the Trainer did not call: "
                "the run would be another one than asked for. Likely a version of transformers has renamed them "
                f"({versions('transformers', 'trl')}), or a subclass overrides them without `super()`. Install a "
                "version that was checked."
            )

    def _outlook(self, state: TrainerState) -> str:
        sft_steps = min(self.sft_steps, state.max_steps)
        counts = [(sft_steps, "SFT"), (state.max_steps - sft_steps, "weak-driven")]
        line = ", then ".join(_steps(number, kind) for number, kind in counts if number)
        if state.global_step:
            line = f"Going on after step {state.global_step} of {state.max_steps} (epoch {state.epoch:.2f}): {line}"
        if state.max_steps == sft_steps:
            return f"{line}, none weak-driven."
        return f"{line}; weak model = {self.weak_model}, {self._lambda()}."

    def _lambda(self) -> str:
        args = self.args
        if not args.mixes_logits:
            return "whose logits are not mixed into the loss (lambda 1)"
        if args.lambda_schedule == "constant":
            return f"lambda {args.mixing_lambda:g}"
        if args.lambda_schedule in ("linear", "cosine"):
            return f"lambda {args.mixing_lambda:g} -> {args.final_mixing_lambda:g} ({args.lambda_schedule})"
        return f"lambda by {schedule_name(args.lambda_schedule)}"

    def _say(self, line: str) -> None:
        if self.args.process_index == 0 and not self.args.disable_tqdm:
            tqdm.write(line)  # which leaves the progress bar whole


def _steps(number: int, kind: str) -> str:
    return f"{number} {kind} step{'' if number == 1 else 's'}"
