"""
Command line: scores, active set, choice of the weak model and needs of a run, without training.

    wmss-trl score --model CHECKPOINT --weak_model_name_or_path BASE --dataset DATA --output scores.parquet
    wmss-trl select --scores scores.parquet --output selected.parquet --active_fraction 0.5
    wmss-trl rank-weak --model CHECKPOINT --candidates FOLDER_WITH_CHECKPOINTS BASE --dataset DATA
    wmss-trl estimate --model qwen3-8b --gpus 8 64 --engine fsdp2 zero3 --weak none model cached

The first three take the options of `WMSSConfig` and, as `--config`, a recipe with them: a run with the same recipe
uses the same numbers. On several GPUs: `accelerate launch -m wmss_trl.cli score ...`. The last one loads no weights.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset, load_from_disk
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available
from trl import SFTConfig, SFTTrainer, TrlParser
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from . import estimate
from .config import WMSSConfig, convert_arguments
from .ranking import Separation, expand_candidates, markdown_ranking, rank_weak_models
from .score_files import ScoreTable
from .trainer import WMSSTrainer

_TABLES = ("memory", "communication", "time")
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
        self._check_weak_driven_options()


@dataclass
class EstimateArguments:
    """
    Arguments of `wmss-trl estimate`.

    Args:
        model (`str`):
            Preset, folder or hub id of the strong model. Only its configuration is read. The presets are those of
            [`~wmss_trl.estimate.PRESETS`].
        weak_model (`str`, *optional*):
            The same for a weak model of another size.
        gpus (`list[int]`, *optional*, defaults to `[8]`), engine (`list[str]`, *optional*, defaults to `["fsdp2"]`), \
weak (`list[str]`, *optional*, defaults to `["none", "model"]`):
            Each combination is a row.
        lora, tokens, length, scoring_tokens, activation_checkpointing, dtype, bf16, logits_buffer_mb:
            See [`~wmss_trl.estimate.Setup`].
        active_fraction (`float`, *optional*, defaults to `0.63`):
            See [`WMSSConfig`].
        peak_flops, mfu, node_bandwidth, network_bandwidth, gpus_per_node:
            See [`~wmss_trl.estimate.Hardware`].
        tables (`list[str]`, *optional*, defaults to `["memory", "communication", "time"]`):
            What to print.
        json (`str`, *optional*):
            File for the figures in bytes, FLOPs and seconds.
    """

    model: str = field(metadata={"help": f"Folder, hub id, or one of {', '.join(estimate.PRESETS)}."})
    weak_model: str | None = field(default=None, metadata={"help": "The same for a weak model of another size."})
    gpus: list[int] = field(default_factory=lambda: [8], metadata={"help": "Numbers of GPUs."})
    engine: list[str] = field(
        default_factory=lambda: ["fsdp2"], metadata={"help": f"Any of {', '.join(estimate.ENGINES)}."}
    )
    weak: list[str] = field(
        default_factory=lambda: ["none", "model"],
        metadata={"help": f"Any of {', '.join(estimate.WEAK_REFERENCES)}; none is SFT."},
    )
    lora: int | None = field(default=None, metadata={"help": "Rank of a LoRA adapter on all linear layers."})
    tokens: int = field(default=4096, metadata={"help": "Tokens per GPU and step."})
    length: int | None = field(default=None, metadata={"help": "Tokens per example. Defaults to `tokens`."})
    scoring_tokens: int | None = field(
        default=None, metadata={"help": "Tokens per GPU in a scoring forward. Defaults to `tokens`."}
    )
    activation_checkpointing: bool = field(default=True, metadata={"help": "Recompute activations."})
    dtype: str = field(default="float32", metadata={"help": "Dtype in which models are loaded: float32 or bfloat16."})
    bf16: bool = field(default=True, metadata={"help": "Mixed precision in bfloat16."})
    logits_buffer_mb: int = field(default=256, metadata={"help": "Memory in MiB for the tiles of logits."})
    active_fraction: float = field(default=0.63, metadata={"help": "Size of the active set, a fraction in (0, 1]."})
    peak_flops: float = field(default=989e12, metadata={"help": "FLOP/s of a GPU. Default: H100 SXM, dense bf16."})
    mfu: float = field(default=0.4, metadata={"help": "Share of it that is reached: an assumption."})
    node_bandwidth: float = field(default=450e9, metadata={"help": "Bytes/s per GPU and direction within a node."})
    network_bandwidth: float = field(default=50e9, metadata={"help": "Bytes/s per GPU and direction between nodes."})
    gpus_per_node: int = field(default=8, metadata={"help": "GPUs in a node."})
    tables: list[str] = field(
        default_factory=lambda: [*_TABLES], metadata={"help": f"What to print: any of {', '.join(_TABLES)}."}
    )
    json: str | None = field(default=None, metadata={"help": "File for the raw figures."})


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
        trust_remote_code=config.trust_remote_code,
        buffer_bytes=config.logits_buffer_mb * 2**20,
    )


def estimate_needs(arguments: EstimateArguments) -> list[dict[str, Any]]:
    """Memory, communication and time of each combination of engine, weak reference and number of GPUs."""
    if not 0 < arguments.active_fraction <= 1:
        raise ValueError(f"`active_fraction={arguments.active_fraction}` must be in (0, 1]. Change it.")
    for table in arguments.tables:
        if table not in _TABLES:
            raise ValueError(f"`tables` has {table!r}, which is unknown. Use any of {', '.join(_TABLES)}.")
    options = asdict(arguments)
    varied = ("model", "gpus", "engine", "weak", "weak_model")
    shared = {f.name: options[f.name] for f in fields(estimate.Setup) if f.name not in varied}
    hardware = estimate.Hardware(**{f.name: options[f.name] for f in fields(estimate.Hardware)})
    model, weak_model = (
        name and estimate.ModelSize.from_config(estimate.load_config(name))
        for name in (arguments.model, arguments.weak_model)
    )
    rows = []
    for engine, weak, gpus in product(arguments.engine, arguments.weak, arguments.gpus):
        own = None if weak == "none" else weak_model
        setup = estimate.Setup(model, gpus, engine, weak, own, **shared)
        memory = estimate.memory(setup)
        row = {"engine": engine, "weak": weak, "gpus": gpus, "parameters": model.total}
        row["memory"] = asdict(memory) | {"total": memory.total}
        row["communication"] = estimate.communication(setup)
        row["flops"] = estimate.compute(setup)
        row["time"] = estimate.times(setup, hardware, arguments.active_fraction)
        row["communication_bound_from"] = estimate.communication_bound_from(setup, hardware)
        rows.append(row)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"arguments": options, "rows": rows}, indent=1))
    return rows


def markdown_estimate(rows: list[dict[str, Any]], table: str) -> str:
    """A Markdown table of estimates: `"memory"` or `"communication"` in GiB per GPU, or `"time"`."""
    lines = []
    for row in rows:
        cells = {"engine": row["engine"], "weak": row["weak"], "GPUs": row["gpus"]}
        if table == "time":
            seconds = row["time"]
            for name in ("compute", "communication", "serial", "overlapped"):
                cells[f"{name} s"] = f"{seconds[name]:.2f}"
            for epoch in ("first", "later"):
                cells[f"{epoch} epoch / SFT"] = f"{seconds[f'epoch_ratio_{epoch}']:.2f}"
                cells[f"of it scoring ({epoch})"] = f"{seconds[f'scoring_share_{epoch}']:.0%}"
            cells["network-bound from"] = row["communication_bound_from"] or "-"
        else:
            numbers = dict(row[table])
            if table == "communication":
                numbers["total"] = sum(numbers.values())
            cells |= {name.replace("lm_", "LM-").replace("_", " "): f"{n / 2**30:.2f}" for name, n in numbers.items()}
        lines.append(cells)
    header = list(lines[0])
    body = [header, ["---"] * len(header), *(line.values() for line in lines)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in body)


def _machine_defaults() -> dict[str, Any]:
    """What makes the defaults of `WMSSConfig`, bfloat16 on a GPU, run on this machine."""
    if is_torch_bf16_gpu_available() or is_torch_xla_available():
        return {}
    return {"bf16": False} if torch.accelerator.is_available() else {"use_cpu": True}


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    commands = {
        "score": ((ScoreArguments, WMSSConfig), score),
        "select": ((SelectArguments, DrawConfig), select),
        "rank-weak": ((RankArguments, WMSSConfig), rank_weak),
        "estimate": ((EstimateArguments,), estimate_needs),
    }
    if not argv or argv[0] not in commands:
        print(__doc__.strip())
        sys.exit(0 if argv in (["-h"], ["--help"]) else 2)
    classes, command = commands[argv[0]]
    parser = TrlParser(classes, prog=f"wmss-trl {argv[0]}")
    defaults = _machine_defaults() if WMSSConfig in classes else {}
    parser.set_defaults(**defaults)  # which a recipe and the command line override
    parsed = parser.parse_args_and_config(argv[1:])
    if defaults:
        config = parsed[1]
        lacking = "no GPU: on the CPU" if "use_cpu" in defaults else "no GPU with bfloat16:"
        precision = "bf16" if config.bf16 else "fp16" if config.fp16 else "float32"
        PartialState().print(f"This machine has {lacking} in {precision}.")
    result, arguments = command(*parsed), parsed[0]
    if argv[0] == "estimate":
        print("\n\n".join(markdown_estimate(result, table) for table in arguments.tables))
        return
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
