"""Which checkpoint a run goes on from, and whether that checkpoint is whole."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from zipfile import is_zipfile

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from ..user_warnings import warn
from .run_state import STATE_FILE, read_state


def find_checkpoint(resume: str | Path | bool | None, output_dir: str | Path, has_scores: bool) -> str | None:
    """
    The checkpoint that a run goes on from. The main process looks, and all processes must call it together.

    Args:
        resume (`str`, `Path` or `bool`, *optional*):
            A checkpoint, or `True` for the newest in `output_dir` that is whole.
        output_dir (`str` or `Path`):
            Folder of the run.
        has_scores (`bool`):
            Whether the run was stopped in a scoring pass. The scores are kept then, and it need not have a checkpoint.

    Returns:
        `str`: its folder; `None` to start from the beginning.

    Raises:
        ValueError: If there is none, or it is not whole; the message says what is missing.
    """
    found, error = None, None
    if PartialState().is_main_process:
        try:
            found = _find(resume, Path(output_dir), has_scores)
        except ValueError as raised:
            error = raised
    found, message = broadcast_object_list([found, error and str(error)])
    if message is not None:
        raise ValueError(message) from error
    return found


def _find(resume: str | Path | bool | None, output_dir: Path, has_scores: bool) -> str | None:
    if resume is None or resume is False:
        return None
    if resume is not True:
        if not Path(resume).is_dir():
            raise ValueError(
                f"`resume_from_checkpoint={str(resume)!r}` is not a folder. Pass that of a checkpoint, or `True` for "
                "the newest in `output_dir`."
            )
        if problems := problems_of(Path(resume)):
            raise ValueError(
                f"Cannot resume from {resume}, which is not a whole checkpoint: {'; '.join(problems)}. Resume from "
                "another one; `resume_from_checkpoint=True` takes the newest that is whole."
            )
        return str(resume)
    found, broken = newest_whole_checkpoint(output_dir)
    listed = ". ".join(f"{folder}: {'; '.join(problems)}" for folder, problems in broken.items())
    if found is not None:
        if broken:
            warn(f"Resuming from {found}, since newer checkpoints are not whole. {listed}.", stacklevel=2)
        return str(found)
    if broken:
        raise ValueError(
            f"No checkpoint in {output_dir} is whole. {listed}. Remove them, and set `resume_from_checkpoint=None` to "
            "start from the beginning; scores that are already computed are kept."
        )
    if has_scores:
        warn(
            f"{output_dir} has no checkpoint, but scores of a run that was stopped before its first one: starting "
            "from the beginning, with these scores.",
            stacklevel=2,
        )
        return None
    raise ValueError(
        f"No valid checkpoint found in output directory ({output_dir}). Check `output_dir`, or set "
        "`resume_from_checkpoint=None` to start from the beginning."
    )


def newest_whole_checkpoint(output_dir: Path) -> tuple[Path | None, dict[Path, list[str]]]:
    """
    The newest checkpoint of a run that is whole.

    Returns:
        `tuple[Path | None, dict[Path, list[str]]]`: its folder, or `None`, and what is wrong with each newer one.
    """
    folders = output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    steps = {folder: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name) for folder in folders}
    steps = {folder: int(match[1]) for folder, match in steps.items() if match and folder.is_dir()}
    broken: dict[Path, list[str]] = {}
    for folder in sorted(steps, key=steps.get, reverse=True):
        problems = problems_of(folder)
        if not problems:
            return folder, broken
        broken[folder] = problems
    return None, broken


def problems_of(checkpoint: Path) -> list[str]:
    """
    Why a run cannot be resumed from a checkpoint. Files are missing or cut off if the run was killed while it wrote or
    removed them.

    What the Trainer and accelerate write was checked with transformers 5.23, accelerate 1.15 and DeepSpeed 0.19.

    Raises:
        ValueError: If it was written by a later version of this package.
    """
    problems, states = [], {}
    for name in (TRAINER_STATE_NAME, STATE_FILE):
        path = checkpoint / name
        try:
            states[name] = json.loads(path.read_text()) if path.exists() else None
        except (OSError, ValueError):
            problems.append(f"{name} cannot be read")
    if TRAINER_STATE_NAME in states and states[TRAINER_STATE_NAME] is None:  # which is written last
        problems.append(f"{TRAINER_STATE_NAME} is missing")
    problems += _problems_of_weights(checkpoint)
    if states.get(STATE_FILE) is not None:
        state = read_state(checkpoint)
        files = state.get("files", [])
        if state["run"].get("engine") == "replicated":  # other engines save their optimizer in another form
            files = [*files, OPTIMIZER_NAME, SCHEDULER_NAME]
        problems += [f"{name} is missing" for name in files if not (checkpoint / name).exists()]
        archives = [checkpoint / name for name in files if name.endswith((".pt", ".npz"))]
        problems += [f"{path.name} is cut off" for path in archives if path.exists() and not is_zipfile(path)]
    return problems


def _problems_of_weights(checkpoint: Path) -> list[str]:
    problems, files = [], []
    for name in (WEIGHTS_NAME, SAFE_WEIGHTS_NAME):
        files += checkpoint.glob(name)
    for name in (ADAPTER_WEIGHTS_NAME, ADAPTER_SAFE_WEIGHTS_NAME):  # an adapter may have a folder of its own
        files += [*checkpoint.glob(name), *checkpoint.glob(f"*/{name}")]
    for name in (WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_INDEX_NAME):
        for index in checkpoint.glob(name):
            files.append(index)
            try:
                shards = {*json.loads(index.read_text())["weight_map"].values()}
            except (OSError, ValueError, KeyError):
                problems.append(f"{name} cannot be read")
            else:
                problems += [f"{shard} is missing" for shard in sorted(shards) if not (checkpoint / shard).exists()]
    for path in checkpoint.glob(f"{FSDP_MODEL_NAME}*"):
        files.append(path)
        if path.is_dir() and not (path / ".metadata").exists():  # which torch writes last
            problems.append(f"{path.name}/.metadata is missing")
    if any(checkpoint.glob("global_step*")):  # DeepSpeed
        files.append(latest := checkpoint / "latest")
        if not latest.exists() or not (checkpoint / latest.read_text().strip()).is_dir():
            problems.append("`latest` does not name a folder of DeepSpeed's states")
    if not files:
        problems.append("the weights of the model are missing")
    for path in checkpoint.rglob("*.safetensors"):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError):
            problems.append(f"{path.relative_to(checkpoint)} is cut off")
    return problems


def how_to_resume(output_dir: str | Path, scores: Path | None) -> str:
    """
    What to tell a user who has interrupted a run.

    Args:
        output_dir (`str` or `Path`):
            Folder of the run.
        scores (`Path`, *optional*):
            Folder that holds scores of the run.
    """
    checkpoint = None
    with suppress(OSError, ValueError):
        checkpoint, _ = newest_whole_checkpoint(Path(output_dir))
    if checkpoint is not None:
        return f"Interrupted. `train(resume_from_checkpoint=True)` goes on from {checkpoint}."
    if scores is not None:
        return (
            "Interrupted before the first checkpoint: the next run starts from the beginning, also with "
            f"`train(resume_from_checkpoint=True)`. The scores computed so far are kept in {scores}."
        )
    return "Interrupted before the first checkpoint: the next run starts from the beginning."


def load_renamed_weights(model: nn.Module, checkpoint: str | Path) -> bool:
    """
    Load a checkpoint whose weights are not named like the model's parameters. transformers saves mixtures of experts
    expert by expert, and GPT-NeoX with its old names. Its Trainer (checked with 5.23) does not translate them back: it
    leaves the parameters of such a model as they are, with a warning of missing keys.

    Args:
        model (`torch.nn.Module`):
            The model. A model with an adapter is left alone, because its base is not saved.
        checkpoint (`str` or `Path`):
            Folder with the weights of a model that is not sharded.

    Returns:
        `bool`: whether the weights had other names and have been loaded.
    """
    files = list(Path(checkpoint).glob("model*.safetensors"))  # not those of an adapter
    if not isinstance(model, PreTrainedModel) or not files:
        return False
    names: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    if names <= model.state_dict().keys():
        return False
    with torch.random.fork_rng(devices=[]):
        saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
    return True


@contextmanager
def without_parameters(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let the optimizer load states that were saved without some of its parameters. These start with fresh states."""
    absent = {id(parameter) for parameter in parameters}
    whole = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in absent]
    try:
        yield
    finally:
        for group, members in zip(optimizer.param_groups, whole, strict=True):  # loading has made new groups
            group["params"] = members
