"""
Command line: scores, active set and choice of the weak model, without training.

    wmss-trl score --model CHECKPOINT --weak_model_name_or_path BASE --dataset DATA --output scores.parquet
    wmss-trl select --scores scores.parquet --output selected.parquet --active_fraction 0.5
    wmss-trl rank-weak --model CHECKPOINT --candidates FOLDER_WITH_CHECKPOINTS BASE --dataset DATA

They take the options of `WMSSConfig` and, as `--config`, a recipe with them: a run with the same recipe uses the same
numbers. On several GPUs: `accelerate launch -m wmss_trl.cli score ...`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, load_dataset, load_from_disk
from trl import SFTConfig, SFTTrainer, TrlParser
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .config import WMSSConfig, convert_arguments
from .ranking import Separation, expand_candidates, markdown_ranking, rank_weak_models
from .score_files import ScoreTable
from .trainer import WMSSTrainer

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclass
class ScoreArguments:
    """
    Arguments of `wmss-trl score`.

    Args:
        model (`str`):
            Hub id or folder of the strong model.
        dataset (`str`):
            Hub id, file (JSON, CSV, Parquet or text) or folder (of such files or of `save_to_disk`) with the examples.
        output (`str`):
            Parquet file to write.
        dataset_config (`str`, *optional*):
            Configuration of a data set on the Hub.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split of the data set.
    """

    model: str = field(metadata={"help": "Hub id or folder of the strong model.", "aliases": ["--model_name_or_path"]})
    dataset: str = field(metadata={"help": "Hub id, file or folder.", "aliases": ["--dataset_name"]})
    output: str = field(metadata={"help": "Parquet file to write."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the data set."})


@dataclass
class RankArguments:
    """
    Arguments of `wmss-trl rank-weak`.

    Args:
        model (`str`):
            Hub id or folder of the strong model.
        candidates (`list[str]`):
            Hub ids, checkpoints, or folders that hold checkpoints.
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


@dataclass
class SelectArguments:
    """
    Arguments of `wmss-trl select`.

    Args:
        scores (`str`):
            Parquet file of `wmss-trl score`.
        output (`str`):
            Parquet file to write: the same scores with the weights and the draw of these options.
    """

    scores: str = field(metadata={"help": "Parquet file of `wmss-trl score`."})
    output: str = field(metadata={"help": "Parquet file to write."})


def load_examples(dataset: str, config: str | None = None, split: str = "train") -> Dataset:
    """Load a data set from the Hub, a file or a folder."""
    path = Path(dataset)
    if path.is_file():
        if path.suffix not in _FORMATS:
            raise ValueError(f"`dataset={dataset!r}` must be one of {sorted(_FORMATS)}, or a folder or hub id.")
        return load_dataset(_FORMATS[path.suffix], data_files={split: dataset}, split=split)
    if (path / "state.json").exists():
        return load_from_disk(dataset)
    return load_dataset(dataset, config, split=split)


def score(arguments: ScoreArguments, config: WMSSConfig) -> ScoreTable:
    """Score a data set under two models, weigh it and draw from it; the result is written to `arguments.output`."""
    if config.weak_model_name_or_path is None:
        raise ValueError(
            "`weak_model_name_or_path` is not set, and the entropy of one model alone does not change. Set it to an "
            "earlier checkpoint of `model`, such as the base model that it was fine-tuned from."
        )
    config.score_cache_dir = config.score_cache_dir or str(Path(arguments.output).parent / "_scores")
    trainer = WMSSTrainer(
        arguments.model,
        config,
        train_dataset=load_examples(arguments.dataset, arguments.dataset_config, arguments.dataset_split),
    )
    table = trainer.score_table()
    if trainer.is_world_process_zero():
        table.write(arguments.output)
    return table


def select(arguments: SelectArguments, config: WMSSConfig) -> ScoreTable:
    """Weigh the examples of a score file and draw from them anew; the result is written to `arguments.output`."""
    table = ScoreTable.read(arguments.scores)
    table.draw(
        config.active_fraction,
        replacement=config.curriculum_replacement,
        seed=config.draw_seed,
        **config.term_options,
    )
    table.write(arguments.output)
    return table


def rank_weak(arguments: RankArguments, config: WMSSConfig) -> list[Separation]:
    """Compare candidates for the weak model with the strong one, on a sample of the data."""
    expand_candidates(arguments.candidates)
    examples = load_examples(arguments.dataset, arguments.dataset_config, arguments.dataset_split)
    examples = examples.shuffle(seed=config.draw_seed).select(range(min(arguments.sample, len(examples))))
    # Whose data preparation is that of a run
    trainer = SFTTrainer(arguments.model, convert_arguments(config, SFTConfig), train_dataset=examples)
    return rank_weak_models(
        trainer.model,
        arguments.candidates,
        trainer.train_dataset.select_columns(["input_ids", "labels"]),
        DataCollatorForLanguageModeling(trainer.data_collator.pad_token_id),
        trainer.processing_class,
        buffer_bytes=config.logits_buffer_mb * 2**20,
    )


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    commands = {
        "score": (ScoreArguments, score),
        "select": (SelectArguments, select),
        "rank-weak": (RankArguments, rank_weak),
    }
    if not argv or argv[0] not in commands:
        print(__doc__.strip())
        sys.exit(0 if argv in (["-h"], ["--help"]) else 2)
    arguments_class, command = commands[argv[0]]
    parser = TrlParser((arguments_class, WMSSConfig), prog=f"wmss-trl {argv[0]}")
    arguments, config = parser.parse_args_and_config(argv[1:])
    result = command(arguments, config)
    if argv[0] == "rank-weak":
        PartialState().print(markdown_ranking(result))
        return
    table = result
    delta = table.strong_entropy - table.weak_entropy
    PartialState().print(
        f"{arguments.output}: {len(table.tokens)} examples, {(table.drawn > 0).sum()} of them drawn. Mean entropy "
        f"{table.weak_entropy.mean():.4f} nats under the weak model, {table.strong_entropy.mean():.4f} under the "
        f"strong one; it fell for {(delta < 0).mean():.1%} of the examples."
    )


if __name__ == "__main__":
    main()
