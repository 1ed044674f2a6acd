"""Curriculum-enhanced data activation of a run: its training set, the scores of its two models, and the sampler."""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.utils.data
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers.utils.generic import is_flash_attention_requested
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..curriculum.packing import PackedDocuments, pack_prefix
from ..curriculum.sampler import CurriculumSampler
from ..distributed.engines import on_main_process
from ..distributed.sharding import parameters_at_rest, whole_shape
from ..losses.buffer import MIN_BUFFER_BYTES
from ..modeling.fingerprint import fingerprint
from ..scoring.collation import DataCollator, collated_sample, collator_name, supervised_tokens
from ..scoring.dataset import dataset_fingerprint, example_lengths, supervised_token_counts
from ..scoring.hidden_cache import HiddenCache
from ..scoring.score_cache import ScoreCache
from ..scoring.table import ScoreTable
from ..user_warnings import warn
from ..weak_model.base import WeakModel
from ..weak_model.ranking import MIN_RELATIVE_GAP, relative_gap

if TYPE_CHECKING:
    from ..config import WMSSConfig

# Examples from which a user's data collator is recognised and checked
_COLLATOR_SAMPLE = 256


class Selection:
    """
    Phase 2 of a run: scores its training set under the weak and the strong model and draws the active sets.

    Args:
        args ([`WMSSConfig`]):
            Arguments of the run.
        strong (`Callable[[], torch.nn.Module]`):
            Returns the strong model as it is now: the engine may have wrapped it.
        weak_reference ([`~wmss_trl.weak_model.base.WeakModel`]):
            The weak model.
        train_dataset (`datasets.Dataset`):
            What phase 1 trains on.
        documents (`datasets.Dataset`, *optional*):
            The documents of a `train_dataset` that is packed.
        data_collator (`Callable`):
            Data collator of the run.
        columns (`list[str]`, *optional*):
            Columns of the data set that it gets; all of them if `None`.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator of the run.
        num_given (`int`):
            Number of examples before the data set was prepared.
        weak_is_initial (`bool`):
            Whether the weak model is the strong one as it is now (M0).
        steps_done (`Callable[[], int]`):
            Returns the number of optimizer steps of the run so far.
        on_redraw (`Callable`):
            See [`CurriculumSampler`].

    Attributes:
        sampler ([`CurriculumSampler`]):
            Sampler over the active set.
        dataset_of_rows (`torch.utils.data.Dataset`):
            Maps what the sampler yields to examples, or to rows of packed documents.
        fingerprint (`str`):
            Identity of the data set that is scored.

    Raises:
        ValueError: If the data set cannot be scored, or its active set has no batch that is not dropped.
    """

    def __init__(
        self,
        args: "WMSSConfig",
        strong: Callable[[], nn.Module],
        weak_reference: WeakModel,
        train_dataset: Dataset,
        documents: Dataset | None,
        data_collator: DataCollator,
        columns: list[str] | None,
        accelerator: Accelerator,
        *,
        num_given: int,
        weak_is_initial: bool,
        steps_done: Callable[[], int],
        on_redraw: Callable[[dict[str, float]], None],
    ):
        self.args = args
        self.strong = strong
        self.weak_reference = weak_reference
        self.accelerator = accelerator
        self.dataset = train_dataset if documents is None else documents
        self.token_counts = self._count_tokens(documents)
        self.fingerprint = dataset_fingerprint(self.dataset)
        # As long as the strong model still is M0, M0's entropies are its own
        self.initial_model = self._model_fingerprint() if weak_is_initial else None
        self.starts_initial = weak_is_initial
        self.steps_done = steps_done

        lengths = example_lengths(self.dataset)
        self.dataset_of_rows: torch.utils.data.Dataset = train_dataset
        pack, num_rows = None, None
        if documents is not None:
            self.dataset_of_rows = PackedDocuments(documents)
            num_rows = max(1, round(args.active_fraction * min(len(train_dataset), len(documents))))
            pack = partial(pack_prefix, lengths=lengths, row_length=args.max_length, num_rows=num_rows)
        this = weakref.proxy(self)  # A data loader in a reference cycle waits for its workers in vain when it is freed
        self.sampler = CurriculumSampler(
            len(self.dataset),
            lambda: this.score(),
            first_epoch=args.sft_epochs,
            active_fraction=args.active_fraction,
            replacement=args.curriculum_replacement,
            rescore_epochs=args.rescore_epochs,
            shuffle=args.train_sampling_strategy != "sequential",
            lengths=lengths if args.train_sampling_strategy == "group_by_length" else None,
            group_size=args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes,
            pack=pack,
            num_rows=num_rows,
            seed=args.draw_seed,
            on_redraw=on_redraw,
            **args.term_options,
        )
        batch_size = args.per_device_train_batch_size * accelerator.num_processes
        if args.dataloader_drop_last and len(self.sampler) < batch_size:
            lost = num_given - len(self.dataset)
            cut = (
                f" {lost} of the {num_given} examples given were dropped, since `max_length={args.max_length}` leaves"
            )
            raise ValueError(
                f"The active set (`active_fraction={args.active_fraction}` of {len(train_dataset)} examples) has "
                f"{len(self.sampler)} examples, less than one batch of {batch_size}, of which "
                "`dataloader_drop_last=True` leaves nothing. Set it to False, or use more data, a larger "
                "`active_fraction` or a smaller `per_device_train_batch_size`."
                f"{f'{cut} them no supervised token.' if lost > 0 else ''}"
            )
        if args.plot_curriculum and find_spec("matplotlib") is None:
            warn(
                "`plot_curriculum=True` needs matplotlib. Install `wmss_trl[plots]`, or set `plot_curriculum=False`.",
                stacklevel=3,
            )
        collator = self._scoring_collator(data_collator)
        plain = type(collator) is DataCollatorForLanguageModeling
        columns = ["input_ids", "labels"] if plain else columns
        scored = self.dataset.select_columns([c for c in self.dataset.column_names if columns is None or c in columns])
        identity = {
            "train_dataset": self.fingerprint,
            "precision": accelerator.mixed_precision,
            "attention": self.strong().config._attn_implementation,
        }
        if not plain:
            identity["collator"] = self._inspect_collator(collator, scored, lengths)
        self.hidden_cache = self._make_hidden_cache(identity) if args.weak_cache is not None else None
        self.score_cache = self._make_score_cache(identity, scored, collator, lengths)
        self.score_file = self._read_score_file() if args.score_file is not None else None

    def _count_tokens(self, documents: Dataset | None) -> np.ndarray:
        args = self.args
        if "input_ids" not in self.dataset.column_names:
            raise ValueError(
                f"`curriculum=True` needs a tokenized `train_dataset` to score, but its columns are "
                f"{self.dataset.column_names}. Let the trainer prepare the data set, or set `curriculum=False`."
            )
        if args.packing and args.packing_strategy == "bfd" and documents is None:
            raise ValueError(
                "`packing=True` with `skip_prepare_dataset` leaves packed rows, but the curriculum scores and draws "
                "documents. Let the trainer prepare the data set, or set `curriculum=False`."
            )
        token_counts = supervised_token_counts(self.dataset)
        empty = np.flatnonzero(token_counts == 0)
        if len(empty):
            raise ValueError(
                f"`train_dataset` has {len(empty)} examples without a supervised token, which have no entropy: "
                f"indices {empty[:10].tolist()}{' ...' if len(empty) > 10 else ''}. Remove them, or check the labels "
                f"and `max_length={args.max_length}`."
            )
        return token_counts

    def _scoring_collator(self, collator: DataCollator) -> DataCollator:
        """What collates the examples that are scored: a user's collator as it is, since it may change the labels, or
        TRL's with its settings (checked with TRL 1.16)."""
        if type(collator) is not DataCollatorForLanguageModeling:
            return collator
        # Without padding only where the attention kernels then skip the other examples
        return replace(collator, padding_free=is_flash_attention_requested(self.strong().config))

    def _inspect_collator(self, collator: DataCollator, dataset: Dataset, lengths: np.ndarray) -> str:
        """Identity of a user's collator by what it makes of a sample, which must be right for `weak_cache`."""
        size = min(len(dataset), _COLLATOR_SAMPLE)
        sample = np.linspace(0, len(dataset) - 1, size).round().astype(int)
        batch_size = self.args.per_device_eval_batch_size
        digest, batches = collated_sample(collator, dataset, sample, batch_size, seed=0)
        name = collator_name(collator)
        if self.args.weak_cache is not None:
            remedy = "Set `weak_cache=None`, or leave `data_collator` to the trainer."
            if digest != collated_sample(collator, dataset, sample, batch_size, seed=1)[0]:
                raise ValueError(
                    f"`weak_cache='hidden'` keeps one hidden state per supervised token, but `data_collator` ({name}) "
                    f"makes another batch of the same examples each time. {remedy}"
                )
            parts = [sample[start : start + batch_size] for start in range(0, size, batch_size)]
            counts = np.concatenate(
                [
                    supervised_tokens(batch, lengths[part], part, collator)
                    for batch, part in zip(batches, parts, strict=True)
                ]
            )
            expected = self.token_counts[sample]
            if len(other := np.flatnonzero(counts != expected)):
                shown = ", ".join(f"{sample[i]} ({counts[i]}, not {expected[i]})" for i in other[:5])
                raise ValueError(
                    f"`weak_cache='hidden'` keeps one hidden state per supervised token of `train_dataset`, but "
                    f"`data_collator` ({name}) changes their number: examples {shown}"
                    f"{' and more' if len(other) > 5 else ''}. {remedy}"
                )
        return f"{name} {digest}"

    def _make_score_cache(
        self, identity: dict[str, str], dataset: Dataset, collator: DataCollator, lengths: np.ndarray
    ) -> ScoreCache:
        args = self.args
        # No more than training and evaluation can hold: scoring has no backward pass
        batch_size = min(args.per_device_train_batch_size, args.per_device_eval_batch_size)
        tokens_per_batch = args.scoring_tokens_per_batch
        if tokens_per_batch is None and args.scoring_batch_size is None:
            tokens_per_batch = batch_size * int(lengths.max())
        return ScoreCache(
            args.score_cache_dir or Path(args.output_dir) / "_scores",
            identity,
            dataset,
            collator,
            self.accelerator,
            batch_size=args.scoring_batch_size or batch_size,
            tokens_per_batch=tokens_per_batch,
            disable_tqdm=args.disable_tqdm,
            buffer_bytes=args.buffer_bytes or MIN_BUFFER_BYTES,
        )

    def _make_hidden_cache(self, identity: dict[str, str]) -> HiddenCache:
        args = self.args
        weight = self.weak_reference.lm_head().weight
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}  # in which the LM head multiplies anyway
        cache = HiddenCache(
            args.weak_cache_dir or Path(args.output_dir) / "_weak_cache",
            identity | {"model": self.weak_reference.fingerprint},
            self.token_counts,
            whole_shape(weight)[1],
            dtypes.get(self.accelerator.mixed_precision, weight.dtype),
        )
        cache.done = on_main_process(self.accelerator, cache.find_whole)
        if not cache.complete:
            cache.check_room()
        return cache

    def has_scores(self) -> bool:
        """Whether a run has left scores on disk; in a folder that runs may share, those of the models this one begins
        with. Only the main process needs to ask."""
        if self.args.score_cache_dir is None:
            return self.score_cache.has_any()
        return any(map(self.score_cache.holds, {self.initial_model, self.weak_reference.fingerprint} - {None}))

    def _read_score_file(self) -> ScoreTable:
        path = self.args.score_file
        table = ScoreTable.read(path)
        table.check_dataset(path, self.fingerprint, self.token_counts)
        for name, expected in self._identity().items():
            if table.identity.get(name, expected) != expected:
                warn(
                    f"`score_file={path!r}` was made with another {name.replace('_', ' ')} (or in another dtype) than "
                    "this run's.",
                    stacklevel=4,
                )
        return table

    def _model_fingerprint(self) -> str:
        return fingerprint(parameters_at_rest(self.strong()))

    def _identity(self) -> dict[str, str]:
        return {
            "train_dataset": self.fingerprint,
            "weak_model": self.weak_reference.fingerprint,
            "strong_model": self._model_fingerprint(),
        }

    def score(self) -> tuple[np.ndarray, np.ndarray]:
        """Entropies of the data set under the weak and under the strong model, nats."""
        if self.score_file is not None and self.sampler.strong_entropy is None:  # for the first draw of the run
            self.fill_hidden_cache()
            return self.score_file.weak_entropy, self.score_file.strong_entropy
        weak_entropy = self.sampler.weak_entropy
        if self.weak_reference.trained and self.sampler.strong_entropy is not None:
            weak_entropy = None  # has changed since the last draw
        if self.args.weak_refresh == "epoch" and (self.sampler.epoch or 0) > self.args.sft_epochs:
            # The weak model is what the strong one was at the draw before, unless it is rounded
            known = self.args.rescore_epochs == 1 and self.args.weak_dtype is None
            weak_entropy = self.sampler.strong_entropy if known else None
        fill_cache = self.hidden_cache is not None and not self.hidden_cache.complete
        if fill_cache:
            weak_entropy = None
        models = {"strong": lambda: nullcontext(self.strong())}
        fingerprints = {"strong": self._model_fingerprint()}
        description = None
        if weak_entropy is None and self._strong_is_initial():
            is_first_draw = self.args.sft_epochs == 0
            description = f"Scoring, weak {'and strong ' if is_first_draw else ''}model (M0)"
        elif weak_entropy is None:
            models["weak"] = self.weak_reference.activated
            changes = self.args.changes_weak_model
            fingerprints["weak"] = (
                self.weak_reference.current_fingerprint() if changes else self.weak_reference.fingerprint
            )
        with self.accelerator.autocast():
            name = "weak" if "weak" in models else "strong"
            hidden_caches = {name: self.hidden_cache} if fill_cache else None
            entropies = self.score_cache.score(models, fingerprints, hidden_caches, description)
        if weak_entropy is None:
            weak_entropy = entropies.get("weak", entropies["strong"])
        return weak_entropy, entropies["strong"]

    def fill_hidden_cache(self) -> None:
        """Write what the cache of the weak model's hidden states still lacks."""
        if self.hidden_cache is None or self.hidden_cache.complete:
            return
        with self.accelerator.autocast():
            self.score_cache.score(
                {"weak": self.weak_reference.activated},
                {"weak": self.weak_reference.fingerprint},
                {"weak": self.hidden_cache},
            )

    def compare_with_initial_model(self) -> None:
        """See whether the strong model still is M0, before an engine prepares it, which may change its dtype."""
        self.starts_initial = self.initial_model is not None and self._model_fingerprint() == self.initial_model

    def _strong_is_initial(self) -> bool:
        return self.starts_initial and self.steps_done() == 0

    def score_initial_model(self) -> None:
        """Take M0's entropies from the strong model, if it is M0 and has not changed yet."""
        if self.sampler.weak_entropy is None and self._strong_is_initial():
            self.sampler.weak_entropy, _ = self.score()

    def warn_if_too_close(self) -> None:
        """Say so before the first weak-driven epoch if the weak model can hardly help, or looks better."""
        weak_entropy, strong_entropy = self.sampler.weak_entropy.mean(), self.sampler.strong_entropy.mean()
        gap = relative_gap(weak_entropy, strong_entropy)
        if gap >= MIN_RELATIVE_GAP or not self.accelerator.is_main_process:
            return
        figures = f"mean entropy {weak_entropy:.4f} nats against {strong_entropy:.4f}, a relative gap of {gap:.1%}"
        if gap > -MIN_RELATIVE_GAP:
            message = (
                f"The weak model is close to the strong one: {figures} (below {MIN_RELATIVE_GAP:.0%}). The paper "
                "reports losses then. Use an earlier checkpoint (`wmss-trl rank-weak` compares them), or more SFT "
                "epochs."
            )
        else:
            message = (
                f"The weak model is more certain than the strong one: {figures}. It looks like the better of the two: "
                "perhaps `model` and `weak_model` are swapped. The weak model should be an earlier checkpoint."
            )
        warn(message, stacklevel=2)

    def table(self) -> ScoreTable:
        """Scores, weights and draw of the first weak-driven epoch, with the strong model as it is now."""
        self.compare_with_initial_model()
        sampler, identity = self.sampler, self._identity()
        sampler.redraw(sampler.first_epoch)
        drawn = np.bincount(sampler.indices, minlength=len(self.dataset))
        return ScoreTable(
            self.token_counts, sampler.weak_entropy, sampler.strong_entropy, identity, sampler.weights, drawn
        )
