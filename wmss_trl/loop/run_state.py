"""What a run depends on, and whether a resumed one is the same."""

import json
from pathlib import Path
from typing import Any

from ..curriculum.sampler import CurriculumSampler
from ..user_warnings import warn
from .epoch_plan import EpochPlan

STATE_FILE = "wmss_state.json"
WEAK_FOLDER = "weak_model"
# 2 (November 2026): batches per epoch and split of a step (`epochs`), files that belong to the checkpoint (`files`)
FORMAT = 2


def read_state(checkpoint: Path) -> dict[str, Any] | None:
    """
    The state of a run in a checkpoint. `None` in a checkpoint of plain SFT.

    Raises:
        ValueError: If it was written by a later version of this package.
    """
    path = checkpoint / STATE_FILE
    if not path.exists():
        return None
    state = json.loads(path.read_text())
    if state.get("format", 1) > FORMAT:
        raise ValueError(
            f"{path} has format {state['format']}, and this version of wmss_trl reads formats up to {FORMAT}. Resume "
            "with the version that saved it, or a later one."
        )
    return state


def migrated(checkpoint: Path, state: dict[str, Any], run: dict[str, Any], is_phase_1: bool) -> dict[str, Any]:
    """
    A state of format 1 in today's format. What cannot be known of its run is taken from the run that resumes.

    Args:
        checkpoint (`Path`):
            Folder of the checkpoint.
        state (`dict[str, Any]`):
            What [`read_state`] has read.
        run (`dict[str, Any]`):
            What the run that resumes depends on.
        is_phase_1 (`bool`):
            Whether the checkpoint was saved before the first draw and the first round.

    Raises:
        ValueError: If a file is missing.
    """
    if state.get("format", 1) == FORMAT:
        return state
    lacking = [f"`{key}`" for key in run if key not in state["run"]]
    warn(
        f"{checkpoint / STATE_FILE} was written by an earlier version of wmss_trl (format 1). What it does not hold "
        f"is taken to be as in this run: {', '.join([*lacking, 'the global batch'])}.",
        stacklevel=2,
    )
    files = [CurriculumSampler.FILE_NAME] if run["curriculum"] else []
    if run["weak_refresh"] == "epoch" or (run["train_weak"] and run["engine"] == "replicated"):
        files.append(WEAK_FOLDER)
    missing = [name for name in files if not (checkpoint / name).exists()]
    if missing and not is_phase_1:
        raise ValueError(f"Cannot resume from {checkpoint}: {missing[0]} is missing. Resume from another checkpoint.")
    files = [name for name in files if name not in missing]
    return {"crossover": None, "epochs": None, "files": files, **state, "run": run | state["run"]}


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
    Refuse to resume a run whose steps are no longer the same. A checkpoint holds only the number of steps done. A step
    may be split in another way into batches and processes.

    Args:
        checkpoint (`Path`):
            Folder of the checkpoint.
        before, now ([`~wmss_trl.loop.epoch_plan.EpochPlan`]):
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


def check_same_place(checkpoint: Path, plan: EpochPlan, step: int, epoch: float) -> None:
    """
    [`check_same_steps`] for a checkpoint of format 1. Only its step and epoch are known.

    Raises:
        ValueError: If the step lies in another epoch of this run.
    """
    if not plan.agrees(step, epoch):
        raise ValueError(
            f"Cannot resume from {checkpoint}: step {step} was saved at epoch {epoch:.2f}, which is another place in "
            "this run. Restore `per_device_train_batch_size`, `gradient_accumulation_steps`, the number of processes "
            "and the data set."
        )


def check_same_order(checkpoint: Path, strategy: str, before: EpochPlan, now: EpochPlan) -> None:
    """
    Refuse to resume in the middle of an epoch over the whole data set, if the order of that epoch depends on the split
    of a step and the split has changed.

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
