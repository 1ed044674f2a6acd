"""`wmss-trl estimate`: memory, communication and time of a run, estimated."""

import json
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from .. import estimate

_TABLES = ("memory", "communication", "time")


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
    logits_buffer_mb: int | None = field(
        default=None, metadata={"help": "Memory in MiB for the tiles of logits. Default: as in a run."}
    )
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


def estimate_needs(arguments: EstimateArguments) -> list[dict[str, Any]]:
    """Memory, communication and time of each combination of engine, weak model and number of GPUs."""
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
