"""What a run depends on, and whether a resumed one is the same."""

from pathlib import Path
from typing import Any

from .curriculum import CurriculumSampler
from .epochs import EpochPlan


def check_same_run(state: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """
    Refuse to resume a run whose data or options have changed.

    Args:
        state (`Path`):
            State file of the checkpoint.
        before, now (`dict[str, Any]`):
            What the run that saved the checkpoint depended on, and this one does, in JSON types.

    Raises:
        ValueError: If they differ, with the list of what has changed.
    """
    changed = [
        f"`{key}`: {before.get(key)!r} in the checkpoint, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if not changed:
        return
    message = (
        f"Cannot resume from {state.parent}, which was saved by another run: {'; '.join(changed)}. Restore these. "
        f"To go on from a checkpoint of phase 1 with other options, delete {state.name} and "
        f"{CurriculumSampler.FILE_NAME} in a copy of it; from a later one, start a new run from the model with "
        "`sft_epochs=0` and a `weak_model`."
    )
    if before.get("weak_model") != now.get("weak_model"):
        message += (
            " If the run had no `weak_model`, pass as `model` what it started from (M0), not the checkpoint: the "
            "trainer loads that itself."
        )
    if before.get("engine") != now.get("engine"):
        message += (
            " The states of the optimizer are saved in the form of their engine, with DeepSpeed also of its number of "
            "processes."
        )
    raise ValueError(message)


def check_same_steps(checkpoint: Path, before: EpochPlan, now: EpochPlan) -> None:
    """
    Refuse to resume a run whose steps, of which the checkpoint only holds the number, are no longer the same. A step
    may be split otherwise into batches and processes.

    Args:
        checkpoint (`Path`):
            Folder of the checkpoint.
        before, now ([`~wmss_trl.epochs.EpochPlan`]):
            Epochs of the run that saved it, and of this one.

    Raises:
        ValueError: If a step has another number of examples or an epoch another number of steps, with the list of
            what differs.
    """
    old, new = _describe(before), _describe(now)
    if all(old[key] == new[key] for key in old if key.startswith(("examples", "steps"))):
        return
    changed = [f"{key}: {old[key]} in the checkpoint, {new[key]} now" for key in old if old[key] != new[key]]
    remedy = (
        "Choose `per_device_train_batch_size` x `gradient_accumulation_steps` x processes = "
        f"{before.examples_per_step}."
        if before.examples_per_step != now.examples_per_step
        else "Restore these, and the data set if it has changed: with `dataloader_drop_last=True` it depends on the "
        "split of a step how many examples are dropped."
    )
    raise ValueError(
        f"Cannot resume from {checkpoint}, since its steps would be taken for others, and with them its epoch and "
        f"phase: {'; '.join(changed)}. {remedy}"
    )


def check_same_order(checkpoint: Path, strategy: str, before: EpochPlan, now: EpochPlan) -> None:
    """
    Refuse to resume in the middle of an epoch over the whole data set whose order depends on the split of a step.

    Args:
        checkpoint, before, now:
            See [`check_same_steps`].
        strategy (`str`):
            The `train_sampling_strategy` of the run. What its samplers depend on is private to transformers, checked
            with 5.23.

    Raises:
        ValueError: If the order is another one.
    """
    old, new = (
        {
            "group_by_length": plan.batch_size * plan.accumulation,
            "batch_rebalance": (plan.batch_size, plan.accumulation, plan.num_processes),
        }.get(strategy)
        for plan in (before, now)
    )
    if old != new:
        raise ValueError(
            f"Cannot resume from {checkpoint}, in the middle of an epoch whose order depends, with "
            f"`train_sampling_strategy={strategy!r}`, on the split of a step: `per_device_train_batch_size` "
            f"{before.batch_size}, `gradient_accumulation_steps` {before.accumulation} and {before.num_processes} "
            f"processes in the checkpoint, {now.batch_size}, {now.accumulation} and {now.num_processes} now. Restore "
            "these, or resume from the end of an epoch."
        )


def _describe(plan: EpochPlan) -> dict[str, int]:
    phase_1 = {"steps per epoch of phase 1": plan.steps(plan.sft_epochs - 1)} if plan.sft_epochs else {}
    return {
        "`per_device_train_batch_size`": plan.batch_size,
        "`gradient_accumulation_steps`": plan.accumulation,
        "processes": plan.num_processes,
        "examples per step": plan.examples_per_step,
        **phase_1,
        "steps per weak-driven epoch": plan.steps(plan.sft_epochs),
    }
