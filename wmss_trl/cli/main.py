"""
Command line: scores, active set, choice of the weak model and needs of a run, without training.

    wmss-trl score --model CHECKPOINT --weak_model_name_or_path BASE --dataset DATA --output scores.parquet
    wmss-trl select --scores scores.parquet --output selected.parquet --active_fraction 0.5
    wmss-trl rank-weak --model CHECKPOINT --candidates FOLDER_WITH_CHECKPOINTS BASE --dataset DATA
    wmss-trl estimate --model qwen3-8b --gpus 8 64 --engine fsdp2 zero3 --weak none model cached

The first three take the options of `WMSSConfig` and, as `--config`, a recipe with them: a run with the same recipe
uses the same numbers. On several GPUs: `accelerate launch -m wmss_trl.cli score ...`. The last one loads no weights.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available
from trl import TrlParser

from ..config import WMSSConfig
from ..weak_model.ranking import markdown_ranking
from .estimate import EstimateArguments, estimate_needs, markdown_estimate
from .rank_weak import RankArguments, rank_weak
from .score import DrawConfig, ScoreArguments, SelectArguments, score, select


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
