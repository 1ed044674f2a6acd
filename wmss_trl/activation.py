"""Curriculum-enhanced data activation of a run: its training set, the scores of its two models, and the sampler."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
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

from .curriculum import CurriculumSampler
from .packing import PackedDocuments, pack_prefix
from .ranking import MIN_RELATIVE_GAP, relative_gap
from .score_files import ScoreCache, ScoreTable
from .scoring import DataCollator, dataset_fingerprint, example_lengths, supervised_token_counts
from .sharding import parameters_at_rest, whole_shape
from .weak import WeakReference, fingerprint
from .weak_cache import HiddenCache

if TYPE_CHECKING:
    from .config import WMSSConfig


class DataActivation:
    """
    Phase 2 of a run: scores its training set under the weak and the strong model and draws the active sets.

    Args:
        args ([`WMSSConfig`]):
            Arguments of the run.
        model (`torch.nn.Module`):
            The strong model.
        weak_reference ([`~wmss_trl.weak.WeakReference`]):
            The weak model.
        train_dataset (`datasets.Dataset`):
            What phase 1 trains on.
        documents (`datasets.Dataset`, *optional*):
            The documents of a `train_dataset` that is packed.
        data_collator (`Callable`):
            Data collator of the run.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator of the run.
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
        ValueError: If the data set cannot be scored, or its active set is smaller than a batch.
    """

    def __init__(
        self,
        args: "WMSSConfig",
        model: nn.Module,
        weak_reference: WeakReference,
        train_dataset: Dataset,
        documents: Dataset | None,
        data_collator: DataCollator,
        accelerator: Accelerator,
        *,
        weak_is_initial: bool,
        steps_done: Callable[[], int],
        on_redraw: Callable[[dict[str, float]], None],
    ):
        self.args = args
        self.model = model
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
        self.sampler = CurriculumSampler(
            len(self.dataset),
            self.score,
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
        if len(self.sampler) < batch_size:
            raise ValueError(
                f"The active set (`active_fraction={args.active_fraction}` of {len(train_dataset)} examples) has "
                f"{len(self.sampler)} examples, less than one batch of {batch_size}. Use more data, a larger "
                "`active_fraction` or a smaller `per_device_train_batch_size`."
            )
        if args.plot_curriculum and find_spec("matplotlib") is None:
            warnings.warn(
                "`plot_curriculum=True` needs matplotlib. Install `wmss_trl[plots]`, or set `plot_curriculum=False`.",
                stacklevel=3,
            )
        self.hidden_cache = self._make_hidden_cache() if args.weak_cache is not None else None
        self.score_cache = self._make_score_cache(data_collator, lengths)
        self.score_file = self._read_score_file() if args.score_file is not None else None

    def _count_tokens(self, documents: Dataset | None) -> np.ndarray:
        args = self.args
        if "input_ids" not in self.dataset.column_names:
            raise ValueError(
                f"`curriculum=True` needs a tokenized `train_dataset` to score, but its columns are "
                f"{self.dataset.column_names}. Let the trainer prepare the data set, or set `curriculum=False`."
            )
        if args.packing and documents is None:
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

    def _make_score_cache(self, collator: DataCollator, lengths: np.ndarray) -> ScoreCache:
        args, config, dataset = self.args, self.model.config, self.dataset
        if isinstance(collator, DataCollatorForLanguageModeling):
            # Without padding only where the attention kernels then skip the other examples
            padding_free = is_flash_attention_requested(config)
            collator = DataCollatorForLanguageModeling(collator.pad_token_id, padding_free=padding_free)
            dataset = dataset.select_columns([c for c in ("input_ids", "labels") if c in dataset.column_names])
        tokens_per_batch = args.scoring_tokens_per_batch
        if tokens_per_batch is None and args.scoring_batch_size is None:
            tokens_per_batch = args.per_device_eval_batch_size * int(lengths.max())
        return ScoreCache(
            args.score_cache_dir or Path(args.output_dir) / "_scores",
            {
                "train_dataset": self.fingerprint,
                "precision": self.accelerator.mixed_precision,
                "attention": config._attn_implementation,
            },
            dataset,
            collator,
            self.accelerator,
            batch_size=args.scoring_batch_size or args.per_device_eval_batch_size,
            tokens_per_batch=tokens_per_batch,
            disable_tqdm=args.disable_tqdm,
            buffer_bytes=args.logits_buffer_mb * 2**20,
        )

    def _make_hidden_cache(self) -> HiddenCache:
        args, precision = self.args, self.accelerator.mixed_precision
        weight = self.weak_reference.lm_head().weight
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}  # in which the LM head multiplies anyway
        identity = {
            "train_dataset": self.fingerprint,
            "model": self.weak_reference.fingerprint,
            "precision": precision,
            "attention": self.model.config._attn_implementation,
        }
        cache = HiddenCache(
            args.weak_cache_dir or Path(args.output_dir) / "_weak_cache",
            identity,
            self.token_counts,
            whole_shape(weight)[1],
            dtypes.get(precision, weight.dtype),
        )
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
                warnings.warn(
                    f"`score_file={path!r}` was made with another {name.replace('_', ' ')} (or in another dtype) than "
                    "this run's.",
                    stacklevel=4,
                )
        return table

    def _model_fingerprint(self) -> str:
        return fingerprint(parameters_at_rest(self.model))

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
            # The weak model is what the strong one was at the draw before
            weak_entropy = self.sampler.strong_entropy if self.args.rescore_epochs == 1 else None
        fill_cache = self.hidden_cache is not None and not self.hidden_cache.complete
        if fill_cache:
            weak_entropy = None
        strong = self._model_fingerprint()
        models, fingerprints = {"strong": lambda: nullcontext(self.model)}, {"strong": strong}
        if weak_entropy is None and not self._strong_is_initial():
            models["weak"] = self.weak_reference.activated
            changes = self.args.changes_weak_model
            fingerprints["weak"] = (
                self.weak_reference.current_fingerprint() if changes else self.weak_reference.fingerprint
            )
        with self.accelerator.autocast():
            name = "weak" if "weak" in models else "strong"
            hidden_caches = {name: self.hidden_cache} if fill_cache else None
            entropies = self.score_cache.score(models, fingerprints, hidden_caches)
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
        """Say so before the first weak-driven epoch if the weak model can hardly help."""
        weak_entropy, strong_entropy = self.sampler.weak_entropy.mean(), self.sampler.strong_entropy.mean()
        gap = relative_gap(weak_entropy, strong_entropy)
        if gap < MIN_RELATIVE_GAP and self.accelerator.is_main_process:
            warnings.warn(
                f"The weak model is close to the strong one: mean entropy {weak_entropy:.4f} nats against "
                f"{strong_entropy:.4f}, a relative gap of {gap:.1%} (below {MIN_RELATIVE_GAP:.0%}). The paper reports "
                "losses then. Use an earlier checkpoint (`wmss-trl rank-weak` compares them), or more SFT epochs.",
                stacklevel=2,
            )

    def table(self) -> ScoreTable:
        """Scores, weights and draw of the first weak-driven epoch, with the strong model as it is now."""
        self.compare_with_initial_model()
        sampler, identity = self.sampler, self._identity()
        sampler.redraw(sampler.first_epoch)
        drawn = np.bincount(sampler.indices, minlength=len(self.dataset))
        return ScoreTable(
            self.token_counts, sampler.weak_entropy, sampler.strong_entropy, identity, sampler.weights, drawn
        )
