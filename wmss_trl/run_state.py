"""What a run depends on, and whether a resumed one is the same."""

from pathlib import Path
from typing import Any

from .curriculum import CurriculumSampler


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
