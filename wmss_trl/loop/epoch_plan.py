"""Epochs of two lengths in one run: the whole data set in phase 1, the active set in the weak-driven epochs."""

import math
import operator
from dataclasses import dataclass


@dataclass
class EpochPlan:
    """
    Number of batches and optimizer steps of each epoch of a run.

    Args:
        sft_epochs (`int`):
            Number of epochs over the whole data set at the start of the run.
        full_batches (`int`):
            Batches per process in such an epoch.
        active_batches (`int`):
            Batches per process in each later epoch.
        accumulation (`int`):
            Gradient accumulation steps.
        batch_size (`int`, *optional*, defaults to `1`):
            Examples per batch and process.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of processes.
    """

    sft_epochs: int
    full_batches: int
    active_batches: int
    accumulation: int
    batch_size: int = 1
    num_processes: int = 1

    @property
    def examples_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.num_processes

    def batches(self, epoch: int) -> int:
        return self.full_batches if epoch < self.sft_epochs else self.active_batches

    def steps(self, epoch: int) -> int:
        return max(1, math.ceil(self.batches(epoch) / self.accumulation))

    def total_steps(self, num_epochs: float) -> int:
        """Optimizer steps in `num_epochs` epochs. A fraction counts as that share of the last epoch."""
        whole = math.floor(num_epochs)
        return math.ceil(sum(map(self.steps, range(whole))) + (num_epochs - whole) * self.steps(whole))

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch of optimizer step `step` (counted from 0), and the number of steps before it in that epoch."""
        full, active = self.steps(self.sft_epochs - 1), self.steps(self.sft_epochs)
        if step < self.sft_epochs * full:
            return divmod(step, full)
        epoch, within = divmod(step - self.sft_epochs * full, active)
        return self.sft_epochs + epoch, within

    def agrees(self, step: int, epoch: float) -> bool:
        """Whether a run with these steps per epoch can have been at `epoch` after `step` steps. A part of an epoch is
        counted in batches, and the last step of an epoch may have fewer of them."""
        whole, within = self.locate(step)
        return math.floor(epoch) == whole and math.floor((epoch - whole) * self.steps(whole) + 1e-6) == within

    def num_epochs(self, max_steps: int) -> int:
        """Number of epochs that `max_steps` optimizer steps touch."""
        epoch, within = self.locate(max_steps)
        return epoch + (within > 0)


def batches_per_process(num_examples: int, batch_size: int, num_processes: int, drop_last: bool) -> int:
    """Length of the data loader that each process will have. The Trainer fills up the last batches, or drops them."""
    divide = operator.floordiv if drop_last else lambda a, b: math.ceil(a / b)
    return divide(divide(num_examples, batch_size), num_processes)
