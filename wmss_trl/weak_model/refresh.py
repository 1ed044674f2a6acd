"""Iterated rounds: each weak-driven epoch mixes with the strong model of one round before."""

from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from ..distributed.sharding import is_sharded, local_part, named_state, reshard, set_local_part_, whole_shape
from ..modeling.adapters import adapter_state, sibling
from .adapters import NamedAdapter
from .base import WeakModel
from .frozen import InitialModel

REFRESH_DEVICES = ("cpu", "same", "disk")


class WeakRefresh(TrainerCallback):
    """
    Callback that replaces the weak model at the start of each weak-driven epoch but the first. In round `t` the weak
    model is the strong model of the start of round `t - 1` (paper, iterated form).

    Args:
        weak_reference ([`~wmss_trl.weak_model.base.WeakModel`]):
            The weak model, of the same architecture as the strong one.
        strong (`Callable[[], torch.nn.Module]`):
            Returns the strong model as it is now: the engine may have wrapped it.
        first_epoch (`int`):
            First weak-driven epoch, counted from 0.
        device (`str`, *optional*, defaults to `"cpu"`):
            Where the strong weights of the start of a round are kept until the next round, when they become the weak
            ones: `"cpu"`, `"same"` (the model's device) or `"disk"`.
        folder (`str` or `Path`, *optional*):
            Folder for `"disk"`, with a file for each process.

    Raises:
        ValueError: If the weak model cannot take the strong model's weights.
    """

    FILE_NAME = "refresh.safetensors"

    def __init__(
        self,
        weak_reference: WeakModel,
        strong: Callable[[], nn.Module],
        first_epoch: int,
        device: str = "cpu",
        folder: str | Path | None = None,
    ):
        self.weak_reference = weak_reference
        self.strong = strong
        self.first_epoch = first_epoch
        self.device = device
        self.path = Path(folder or ".") / f"rank_{PartialState().process_index}.safetensors"
        self.epoch: int | None = None
        self.round_epoch: int | None = None
        self.snapshot: dict[str, Tensor] | None = None
        self.resume_from: Path | None = None
        ours, theirs = (
            {name: whole_shape(tensor) for name, tensor in state.items()}
            for state in (self._weak_state(), self._strong_state())
        )
        if ours != theirs:
            raise ValueError(
                "`weak_refresh='epoch'` replaces the weak model by later states of the strong one, but the parameters "
                "of `weak_model` have other names or shapes (another architecture, an adapter, quantised "
                "weights). Use a checkpoint of the same kind of model, or `weak_refresh='never'`."
            )

    def on_train_begin(self, args, state, control, **kwargs):
        if self.resume_from is not None:  # the engine has prepared the models by now, as it had when they were saved
            self.load(self.resume_from)
            self.resume_from = None
        self.epoch = int(state.epoch or 0) - 1  # `on_epoch_begin` comes next, in a resumed epoch too

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epoch += 1
        if self.epoch >= self.first_epoch and self.round_epoch != self.epoch:
            self.start_round(self.epoch)

    def start_round(self, epoch: int) -> None:
        if epoch > self.first_epoch:
            self._set_weak_state(self._read_snapshot())
        self.snapshot = None  # makes room for the next one
        self._keep_snapshot(self._copy_of_parts(self._strong_state(), self.device))
        self.round_epoch = epoch

    def _strong_state(self) -> dict[str, Tensor]:
        if isinstance(self.weak_reference, InitialModel):
            return {}
        if isinstance(self.weak_reference, NamedAdapter):
            strong = self.strong()
            reshard(strong)
            return adapter_state(strong, strong.active_adapter)
        return _state(self.strong())

    def _weak_state(self) -> dict[str, Tensor]:
        reference = self.weak_reference
        if isinstance(reference, InitialModel):
            return {}
        if isinstance(reference, NamedAdapter):
            strong = self.strong()
            reshard(strong)
            state = adapter_state(strong, reference.name)
            return {sibling(name, reference.name, strong.active_adapter): value for name, value in state.items()}
        return _state(extract_model_from_parallel(reference.model))

    @staticmethod
    def _copy_of_parts(state: dict[str, Tensor], device: str) -> dict[str, Tensor]:
        parts = {name: local_part(tensor).detach() for name, tensor in state.items()}
        if device == "same":
            return {name: part.clone() for name, part in parts.items()}
        return {name: part.to("cpu", copy=True) for name, part in parts.items()}

    def _set_weak_state(self, parts: dict[str, Tensor]) -> None:
        for name, tensor in self._weak_state().items():
            set_local_part_(tensor, parts[name])

    def _keep_snapshot(self, state: dict[str, Tensor]) -> None:
        if self.device == "disk":
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(state, self.path)
        else:
            self.snapshot = state

    def _read_snapshot(self) -> dict[str, Tensor]:
        return load_file(self.path) if self.device == "disk" else self.snapshot

    def _path_in(self, folder: Path) -> Path:
        return folder / (self.path.name if is_sharded(self.strong()) else self.FILE_NAME)

    def file_in(self, folder: Path) -> Path | None:
        """Where this process saves its part of the round, or finds it; `None` before the first round."""
        return None if self.round_epoch is None else self._path_in(folder)

    def save(self, folder: Path) -> None:
        """Write the weak weights and the snapshot of the round, if one has begun, into `folder`: each process its
        part where they are sharded, or else the main process."""
        path = self.file_in(folder)
        if path is None or not (is_sharded(self.strong()) or PartialState().is_main_process):
            return
        folder.mkdir(parents=True, exist_ok=True)
        states = {"weak": self._copy_of_parts(self._weak_state(), "cpu"), "strong": self._read_snapshot()}
        tensors = {f"{key}.{name}": tensor for key, state in states.items() for name, tensor in state.items()}
        save_file(tensors, path, metadata={"epoch": str(self.round_epoch)})

    def load(self, folder: Path) -> None:
        """
        Take up the round that was saved in `folder`.

        Raises:
            ValueError: If the part of this process is missing.
        """
        path = self._path_in(folder)
        if not path.exists():
            raise ValueError(
                f"Cannot resume: {path}, which holds the weak model of the round, is missing. Resume from another "
                "checkpoint."
            )
        with safe_open(path, framework="pt") as file:
            self.round_epoch = int(file.metadata()["epoch"])
        tensors = load_file(path)
        weak, strong = (
            {name.removeprefix(f"{key}."): tensor for name, tensor in tensors.items() if name.startswith(f"{key}.")}
            for key in ("weak", "strong")
        )
        self._set_weak_state(weak)
        if self.device == "same":
            devices = {name: local_part(tensor).device for name, tensor in self._strong_state().items()}
            strong = {name: tensor.to(devices[name]) for name, tensor in strong.items()}
        self._keep_snapshot(strong)


def _state(model: nn.Module) -> dict[str, Tensor]:
    reshard(model)
    return named_state(model)
