"""Scores of a run on disk, so that nothing is scored twice."""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from accelerate import Accelerator
from datasets import Dataset
from torch import nn

from ..distributed.engines import on_main_process
from ..files import replacing
from .collation import DataCollator
from .entropy import score_models
from .hidden_cache import HiddenCache

Activated = Callable[[], AbstractContextManager[nn.Module]]


class ScoreCache:
    """
    Scores the models of a run on its data set and keeps the results. Nothing is scored twice. An interrupted pass goes
    on where it was.

    One file per model holds its entropies, NaN where there are none yet. Its name is a hash of the data set, the model
    and the settings. Whatever changes a score also changes the name.

    Args:
        folder (`str` or `Path`):
            Where the files are. Only the main process reads and writes them.
        identity (`dict[str, Any]`):
            What the scores depend on besides the model, in JSON types: the data set's fingerprint, the precision.
        dataset, data_collator, accelerator, score_options:
            See [`~wmss_trl.scoring.entropy.score_models`].
    """

    def __init__(
        self,
        folder: str | Path,
        identity: Mapping[str, Any],
        dataset: Dataset,
        data_collator: DataCollator,
        accelerator: Accelerator,
        **score_options: Any,
    ):
        self.folder = Path(folder)
        self.identity = dict(identity)
        self.dataset = dataset
        self.data_collator = data_collator
        self.accelerator = accelerator
        self.score_options = score_options
        self._writable = True

    def score(
        self,
        models: Mapping[str, Activated],
        fingerprints: Mapping[str, str],
        hidden_caches: Mapping[str, HiddenCache] | None = None,
        description: str | None = None,
    ) -> dict[str, np.ndarray]:
        """
        Entropies of the models. Those on disk are read. The others are computed in one pass.

        Args:
            models (`dict[str, Callable]`):
                See [`~wmss_trl.scoring.entropy.score_models`].
            fingerprints (`dict[str, str]`):
                Identity of each model, see [`~wmss_trl.modeling.fingerprint.fingerprint`].
            hidden_caches (`dict[str, HiddenCache]`, *optional*):
                Where to keep the hidden states of some of the models.
            description (`str`, *optional*):
                Label of the progress bar. Defaults to the names of the models.

        Returns:
            `dict[str, np.ndarray]`: float32 entropies in nats, each of shape `(n,)`.
        """
        paths = {name: self._path(fingerprints[name]) for name in models}
        hidden_caches = hidden_caches or {}

        def prepare() -> dict[str, np.ndarray]:
            for cache in hidden_caches.values():
                cache.create(self.accelerator.print)
            return {name: entropy for name, path in paths.items() if (entropy := self._read(path)) is not None}

        known = on_main_process(self.accelerator, prepare)
        for name, cache in hidden_caches.items():
            if name in known:
                known[name] = np.where(cache.done, known[name], np.nan)
        missing = {name: model for name, model in models.items() if name not in known or np.isnan(known[name]).any()}
        if not missing:
            return known

        def save(entropies: dict[str, np.ndarray]) -> None:
            for name, cache in hidden_caches.items():
                cache.flush(~np.isnan(entropies[name]))
            if self.accelerator.is_main_process:
                for name, entropy in entropies.items():
                    self._write(paths[name], entropy, fingerprints[name])

        computed = score_models(
            missing,
            self.dataset,
            self.data_collator,
            accelerator=self.accelerator,
            description=description or f"Scoring, {' and '.join(missing)} model{'s' if len(missing) > 1 else ''}",
            known={name: known[name] for name in missing if name in known},
            on_progress=save,
            on_hidden={name: cache.write for name, cache in hidden_caches.items()},
            **self.score_options,
        )
        if hidden_caches:
            self.accelerator.wait_for_everyone()  # until each process has flushed what it has written
        return known | computed

    def holds(self, fingerprint: str) -> bool:
        """Whether there are scores of a model, all or some."""
        return self._path(fingerprint).exists()

    def has_any(self) -> bool:
        """Whether there are scores of any model in the folder."""
        return any(self.folder.glob("*.npz"))

    def _path(self, fingerprint: str) -> Path:
        key = json.dumps(self.identity | {"model": fingerprint}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"

    def _read(self, path: Path) -> np.ndarray | None:
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as saved:
                entropy = saved["entropy"]
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            warnings.warn(f"The scores in {path} cannot be read ({error}) and are computed anew.", stacklevel=2)
            return None
        return entropy if len(entropy) == len(self.dataset) else None

    def _write(self, path: Path, entropy: np.ndarray, fingerprint: str) -> None:
        if not self._writable:
            return
        try:
            with replacing(path) as partial:
                np.savez(partial, entropy=entropy, identity=json.dumps(self.identity | {"model": fingerprint}))
        except OSError as error:
            self._writable = False
            warnings.warn(
                f"Scores cannot be kept in {self.folder} ({error}): the run goes on without. If it is interrupted, "
                "scoring starts anew. Free some space, or set `score_cache_dir`.",
                stacklevel=2,
            )
