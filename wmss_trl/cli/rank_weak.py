"""`wmss-trl rank-weak`: which of several weak models fits."""

from dataclasses import dataclass, field

from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..config import WMSSConfig, convert_arguments
from ..losses.buffer import MIN_BUFFER_BYTES
from ..weak_model.ranking import Separation, expand_candidates, rank_weak_models
from .score import load_examples


@dataclass
class RankArguments:
    """
    Arguments of `wmss-trl rank-weak`.

    Args:
        model (`str`):
            Hub id or folder of the strong model.
        candidates (`list[str]`):
            Hub ids (`org/name@revision`), checkpoints, or folders that hold checkpoints.
        dataset, dataset_config, dataset_split:
            See [`ScoreArguments`].
        sample (`int`, *optional*, defaults to `256`):
            Number of examples that are compared.
    """

    model: str = field(metadata={"help": "Hub id or folder of the strong model.", "aliases": ["--model_name_or_path"]})
    candidates: list[str] = field(metadata={"help": "Hub ids, checkpoints, or folders that hold checkpoints."})
    dataset: str = field(metadata={"help": "Hub id, file or folder.", "aliases": ["--dataset_name"]})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the data set."})
    sample: int = field(default=256, metadata={"help": "Number of examples that are compared."})


def rank_weak(arguments: RankArguments, config: WMSSConfig) -> list[Separation]:
    """Compare candidates for the weak model with the strong one, on a sample of the data."""
    expand_candidates(arguments.candidates)
    examples = load_examples(arguments.dataset, arguments.dataset_config, arguments.dataset_split)
    examples = examples.shuffle(seed=config.draw_seed).select(range(min(arguments.sample, len(examples))))
    # SFTTrainer prepares the data as a run does
    trainer = SFTTrainer(arguments.model, convert_arguments(config, SFTConfig), train_dataset=examples)
    return rank_weak_models(
        trainer.model,
        arguments.candidates,
        trainer.train_dataset.select_columns(["input_ids", "labels"]),
        DataCollatorForLanguageModeling(trainer.data_collator.pad_token_id),
        trainer.processing_class,
        trust_remote_code=config.trust_remote_code,
        buffer_bytes=config.buffer_bytes or MIN_BUFFER_BYTES,
    )
