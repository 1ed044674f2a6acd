"""Which earlier checkpoint should be the weak model. Measures how far each candidate is from the strong model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..losses.buffer import MIN_BUFFER_BYTES
from ..losses.entropy import next_token_targets
from ..losses.schedules import crossover_lambda
from ..modeling.lm_head import LMHead, add_head_access
from ..modeling.modes import evaluating, unwrap_adapter
from ..scoring.collation import DataCollator
from ..scoring.dataset import example_lengths, length_batches
from .loading import check_same_vocabulary, load_tokenizer, load_weak_model, naming_weak_model, split_revision

if TYPE_CHECKING:
    from ..config import WMSSConfig

# Below this relative entropy gap a weak model is called too close. The paper (v2) finds no gain at a gap of about 0,
# and no further gain beyond a sufficient gap. It gives no number. This one is ours.
MIN_RELATIVE_GAP = 0.05
# Prefix of a `weak_model` that is to be chosen among the checkpoints in a folder
AUTO = "auto:"


@dataclass
class Separation:
    """
    How far a weak model is from a strong one, over the supervised tokens of some examples.

    Args:
        name (`str`):
            The weak model.
        weak_entropy, strong_entropy (`float`):
            Mean entropy of the examples under each model, nats.
        learnt_share, regressed_share (`float`):
            Share of the examples whose entropy is lower under the strong model, and of those where it is higher.
        hard_negative_share (`float`):
            Share of the wrong tokens whose margin is smaller under the weak model. If it is 1, mixing raises the
            gradient on wrong tokens for sure (paper, Theorem 1).
        crossover (`float`):
            Crossover of `mixing_lambda`, see [`~wmss_trl.losses.schedules.crossover_lambda`].
    """

    name: str
    weak_entropy: float
    strong_entropy: float
    learnt_share: float
    regressed_share: float
    hard_negative_share: float
    crossover: float

    @property
    def relative_gap(self) -> float:
        """`1 - H_strong / H_weak` of the mean entropies."""
        return relative_gap(self.weak_entropy, self.strong_entropy)

    @property
    def too_close(self) -> bool:
        return abs(self.relative_gap) < MIN_RELATIVE_GAP

    @property
    def more_certain(self) -> bool:
        """Whether the weak model is the more certain of the two: perhaps they are swapped."""
        return self.relative_gap <= -MIN_RELATIVE_GAP

    @property
    def verdict(self) -> str:
        """What speaks against this weak model, or nothing."""
        return "too close" if self.too_close else "more certain" if self.more_certain else ""


def relative_gap(weak_entropy: float, strong_entropy: float) -> float:
    """`1 - H_strong / H_weak`; 0 if neither model has any entropy left."""
    return 1 - strong_entropy / weak_entropy if weak_entropy else 0.0


def separation(
    strong: PreTrainedModel,
    weak: PreTrainedModel,
    dataset: Dataset,
    data_collator: DataCollator,
    *,
    name: str = "weak model",
    tokens_per_batch: int = 4096,
    buffer_bytes: int = 256 * 2**20,
) -> Separation:
    """
    Compare two models on a sample of data.

    Args:
        strong, weak ([`~transformers.PreTrainedModel`]):
            Models with the same vocabulary whose logits come from a linear LM head.
        dataset (`datasets.Dataset`):
            Tokenized examples with `input_ids` and, optionally, `labels`.
        data_collator (`Callable`):
            Turns a list of examples into a padded batch with `labels`.
        name (`str`, *optional*, defaults to `"weak model"`):
            Name of the weak model in the result.
        tokens_per_batch (`int`, *optional*, defaults to `4096`):
            Number of tokens in a forward pass, padding included.
        buffer_bytes (`int`, *optional*, defaults to 256 MiB):
            Memory for the logits.

    Returns:
        [`Separation`]

    Raises:
        ValueError: If the logits of a model are not those of its LM head.
    """
    for model in (strong, weak):
        base = unwrap_adapter(model)
        problem = None if getattr(base, "has_head_access", False) else add_head_access(base)
        if problem is not None:
            raise ValueError(f"{model.name_or_path or type(model).__name__} cannot be compared: {problem}.")
    entropies: list[list[Tensor]] = [[], []]
    norms, hard_negatives, num_tokens = [0.0, 0.0], 0.0, 0
    lengths = example_lengths(dataset)
    with evaluating(strong), evaluating(weak):
        for indices in length_batches(lengths, tokens_per_batch=tokens_per_batch):
            batch = data_collator([dataset[int(i)] for i in indices])
            labels = batch.pop("labels")
            targets = next_token_targets(labels)
            positions = (targets != -100).nonzero().squeeze(-1)
            heads = [_hidden_states(model, batch, positions) for model in (strong, weak)]
            per_token = _compare(*heads, targets[positions].to(heads[0][0].device), buffer_bytes)
            per_token = per_token.double().cpu()
            for i in range(2):
                sums = torch.zeros(labels.numel(), dtype=torch.float64).index_copy(0, positions, per_token[i])
                counts = (targets != -100).view(labels.shape).sum(-1)
                entropies[i].append(sums.view(labels.shape).sum(-1) / counts)
                norms[i] += per_token[2 + i].sum().item()
            hard_negatives += per_token[4].sum().item()
            num_tokens += len(positions)
    strong_entropy, weak_entropy = (torch.cat(values).numpy() for values in entropies)
    delta = strong_entropy - weak_entropy
    return Separation(
        name=name,
        weak_entropy=float(weak_entropy.mean()),
        strong_entropy=float(strong_entropy.mean()),
        learnt_share=float(np.mean(delta < 0)),
        regressed_share=float(np.mean(delta > 0)),
        hard_negative_share=hard_negatives / num_tokens,
        crossover=crossover_lambda(*norms),
    )


def _hidden_states(model: nn.Module, batch: dict[str, Any], positions: Tensor) -> tuple[Tensor, LMHead]:
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in batch.items()}
    output = model(**inputs, positions=positions.to(device), with_lm_head=lambda hidden, head: (hidden, head))
    return output["value"]


def _compare(strong: tuple[Tensor, LMHead], weak: tuple[Tensor, LMHead], targets: Tensor, buffer_bytes: int) -> Tensor:
    """Strong and weak entropy, strong and weak centered norm, and hard-negative share of each token."""
    rows = max(1, buffer_bytes // (3 * 4 * len(strong[1].weight)))
    parts = [torch.zeros(5, 0, device=targets.device)]
    for start in range(0, len(targets), rows):
        y = targets[start : start + rows].unsqueeze(-1)
        z_strong, z_weak = (
            head.logits(hidden[start : start + rows].to(head.weight.dtype)).to(y.device)
            for hidden, head in (strong, weak)
        )
        entropies = [torch.special.entr(z.softmax(-1)).sum(-1) for z in (z_strong, z_weak)]
        norms = [(z - z.mean(-1, keepdim=True)).norm(dim=-1) for z in (z_strong, z_weak)]
        # m_k(z_weak) < m_k(z_strong), where m_k(z) = z[y] - z[k]
        advantage = z_strong.sub_(z_weak)
        hard = (advantage < advantage.gather(-1, y)).sum(-1) / (advantage.size(-1) - 1)
        parts.append(torch.stack([*entropies, *norms, hard]))
    return torch.cat(parts, dim=1)


def expand_candidates(candidates: Iterable[str]) -> list[str]:
    """
    Names of weak models, with a folder that holds checkpoints replaced by these, in the order of their steps.

    Raises:
        ValueError: If there is no candidate.
    """
    found = []
    for candidate in candidates:
        checkpoints = [path for path in Path(candidate).glob("checkpoint-*") if path.is_dir()]
        checkpoints.sort(key=lambda path: int(path.name.rpartition("-")[2]))
        found += [str(path) for path in checkpoints] or [candidate]
    if not found:
        raise ValueError("There is no candidate for the weak model. Name checkpoints, or a folder that holds them.")
    return found


def rank_weak_models(
    strong: PreTrainedModel,
    candidates: Sequence[str],
    dataset: Dataset,
    data_collator: DataCollator,
    processing_class: PreTrainedTokenizerBase | None = None,
    on_result: Callable[[Separation], None] | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> list[Separation]:
    """
    Compare candidates for the weak model with a strong model, loading one at a time.

    Args:
        strong ([`~transformers.PreTrainedModel`]):
            The strong model.
        candidates (`list[str]`):
            Hub ids (`org/name@revision`) and folders of checkpoints, see [`expand_candidates`].
        dataset, data_collator, options:
            See [`separation`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the strong model, which the candidates' must agree with.
        on_result (`Callable[[Separation], None]`, *optional*):
            Receives each result as soon as it is there.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether a candidate may bring its own code.

    Returns:
        `list[Separation]`: the best first. Candidates that are too close or more certain than the strong model come
        last. Within each group the one with the most hard negatives comes first.
    """
    results = []
    for name in expand_candidates(candidates):
        init_kwargs = {"trust_remote_code": trust_remote_code}
        place = split_revision(name, init_kwargs)
        with naming_weak_model(place):
            weak = load_weak_model(place, strong, **init_kwargs).to(next(strong.parameters()).device)
        check_same_vocabulary(strong, weak, processing_class, load_tokenizer(place, init_kwargs))
        results.append(separation(strong, weak, dataset, data_collator, name=name, **options))
        if on_result is not None:
            on_result(results[-1])
        del weak
    return sorted(results, key=lambda result: (bool(result.verdict), -result.hard_negative_share))


def rank_checkpoints(
    name: str,
    strong: PreTrainedModel,
    train_dataset: Dataset,
    processing_class: PreTrainedTokenizerBase,
    args: "WMSSConfig",
    device: torch.device,
) -> list[Separation]:
    """
    Rank the checkpoints of `auto:FOLDER` for a run that begins with `strong`, on up to 256 of its examples.

    Raises:
        ValueError: If the weak-driven epochs will not begin with `strong`, its LM head cannot be reached, or the data
            set is not tokenized.
    """
    if args.sft_epochs:
        raise ValueError(
            f"`weak_model={name!r}` compares checkpoints with the model that the weak-driven epochs begin with, but "
            f"`sft_epochs={args.sft_epochs}` changes it before. Set `sft_epochs=0` and start from the fine-tuned "
            "model."
        )
    columns = getattr(train_dataset, "column_names", None) or []
    if not isinstance(train_dataset, Dataset) or "input_ids" not in columns:
        raise ValueError(f"`weak_model={name!r}` needs a tokenized `train_dataset` that is not streaming.")
    if not unwrap_adapter(strong).has_head_access:
        raise ValueError(
            f"`weak_model={name!r}` compares checkpoints by the logits of their LM heads, but the model's logits are "
            "not those of its LM head. Pass the folder of a checkpoint."
        )
    sample = train_dataset.shuffle(seed=args.draw_seed).select(range(min(256, len(train_dataset))))
    return rank_weak_models(
        strong.to(device),
        [name.removeprefix(AUTO)],
        sample.select_columns([column for column in ("input_ids", "labels") if column in columns]),
        DataCollatorForLanguageModeling(processing_class.pad_token_id),
        processing_class,
        trust_remote_code=args.trust_remote_code,
        buffer_bytes=args.buffer_bytes or MIN_BUFFER_BYTES,
    )


def markdown_ranking(results: Sequence[Separation]) -> str:
    """Table of a ranking, with a sentence that recommends."""
    lines = [
        "| weak model | H weak | H strong | relative gap | dH < 0 | dH > 0 | hard negatives | crossover lambda | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        lines.append(
            f"| {result.name} | {result.weak_entropy:.4f} | {result.strong_entropy:.4f} | {result.relative_gap:.1%} | "
            f"{result.learnt_share:.1%} | {result.regressed_share:.1%} | {result.hard_negative_share:.1%} | "
            f"{result.crossover:.3f} | {result.verdict} |"
        )
    if results[0].verdict:
        more_certain = any(result.more_certain for result in results)
        reasons = ["too close to the strong model"] if any(result.too_close for result in results) else []
        reasons += ["more certain than the strong model"] if more_certain else []
        advice = (
            f"Every candidate is {' or '.join(reasons)} (relative entropy gap below {MIN_RELATIVE_GAP:.0%}). "
            f"{'Perhaps the strong model and a candidate are swapped. ' if more_certain else ''}"
            "Look for an earlier checkpoint, or take the base model."
        )
    else:
        advice = f"Recommended: {results[0].name}."
    return "\n".join([*lines, "", advice])
