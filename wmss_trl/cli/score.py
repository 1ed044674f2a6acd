"""`wmss-trl score` and `wmss-trl select`: scores of a data set, and what would be drawn by them."""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset, load_from_disk

from ..config import WMSSConfig
from ..config_checks import check_options
from ..scoring.table import ScoreTable
from ..trainer import WMSSTrainer

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


@dataclass
class DrawConfig(WMSSConfig):
    """The options of a run, of which those of the draw are used: no device or engine is set up for the others."""

    def __post_init__(self):
        self._set_weights_of_variant()
        check_options(self)


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


def select(arguments: SelectArguments, config: DrawConfig) -> ScoreTable:
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
