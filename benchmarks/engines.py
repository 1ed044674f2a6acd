"""
Time, memory and traffic of a training step on several processes: WMSS against SFT under the same engine.

    python benchmarks/engines.py                    # CPU: 2 processes, a Qwen3 of 4 layers, hidden 256, float32
    python benchmarks/engines.py --device cuda --processes 8 --preset qwen3-0.6b --batch_size 4 --tokens 1024
    python benchmarks/engines.py --device cuda --processes 1 --engines fsdp2 zero3 --offload [--compile]

Each engine is one `accelerate launch` with its recipe, in which real trainers run one after the other, each alone in
memory, in rounds of rotating order. Times are medians over the rounds of the median step (of the slowest process),
ratios are taken within a round. Bytes of weights, gradients and optimizer states are those of the tensors that a
process holds before an optimizer step, and bytes sent are counted from the collectives of a step; both stand beside
`wmss_trl.estimate.costs`. The peak (CUDA only) is all that PyTorch has allocated during the timed steps.

A variant that fails is reported with its error, and the others are launched again without it.
"""

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from measure import earlier_adapter, environment, save
from peft import LoraConfig
from results import Measurement, one_line, ratios, table, with_heading, with_quartiles
from step import PRESETS, FullLogitSFTTrainer, build_qwen3
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from wmss_trl import WMSSConfig, WMSSTrainer
from wmss_trl.data.tiny import build_tokenizer
from wmss_trl.distributed.engines import engine_name
from wmss_trl.distributed.sharding import in_zero3, is_sharded, local_part, parameters_at_rest
from wmss_trl.estimate import ENGINES, Memory, ModelSize, Setup, communication, memory
from wmss_trl.modeling.adapters import WEAK_ADAPTER

RECIPES = Path(__file__).parents[1] / "recipes" / "accelerate"
PARTS = ("weights", "gradients", "optimizer", "weak_model")
LORA_RANK = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Variant:
    """
    One way of training.

    Args:
        label (`str`):
            Name in the tables.
        weak (`str`, *optional*, defaults to `"none"`):
            Its weak model in the words of [`wmss_trl.estimate.memory.Setup`].
        options (`dict`, *optional*):
            Options of `WMSSConfig`; `None` is TRL's SFTTrainer.
        own_weak_model (`bool`, *optional*, defaults to `False`):
            Whether a second model is passed as the weak one.
        full_logits (`bool`, *optional*, defaults to `False`):
            Whether SFT computes its loss from whole logits.
        lora (`bool`, *optional*, defaults to `False`):
            Whether an adapter is trained instead of all parameters.
    """

    label: str
    weak: str = "none"
    options: dict[str, Any] | None = field(default_factory=dict)
    own_weak_model: bool = False
    full_logits: bool = False
    lora: bool = False

    @property
    def references(self) -> tuple[str, str]:
        """The variants that its time is compared with: TRL's tiled head, and on a CPU faster, full logits."""
        return ("lora-sft", "lora-sft-full") if self.lora else ("sft", "sft-full")


# The cache is written in the scoring pass of a curriculum
CACHED = {"weak_cache": "hidden", "curriculum": True, "active_fraction": 1.0, "plot_curriculum": False}
VARIANTS = {
    "sft": Variant("SFTTrainer", options=None),
    "sft-full": Variant("SFT, full logits", options=None, full_logits=True),
    "lambda1": Variant("WMSS, lambda = 1", options={"mixing_lambda": 1.0}),
    "frozen": Variant("WMSS, frozen weak model", "model", own_weak_model=True),
    "cached": Variant("WMSS, cached hidden states", "cached", CACHED),
    "joint": Variant("WMSS, joint", "joint", {"train_weak": True}, own_weak_model=True),
    "lora-sft": Variant("LoRA, SFTTrainer", options=None, lora=True),
    "lora-sft-full": Variant("LoRA, SFT, full logits", options=None, full_logits=True, lora=True),
    "lora-base": Variant("LoRA, WMSS, weak = base", "adapter-off", lora=True),
    "lora-cached": Variant("LoRA, WMSS, cached hidden states", "cached", CACHED, lora=True),
    "lora-joint": Variant("LoRA, WMSS, joint", "joint", {"train_weak": True}, lora=True),
}


@dataclass(frozen=True)
class Plan:
    """What one launch measures; the fields are the options of the command."""

    engine: str
    variants: list[str]
    processes: int
    preset: str
    batch_size: int
    tokens: int
    device: str
    dtype: str
    rounds: int
    steps: int
    warmup: int
    checkpointing: bool
    compile: bool
    offload: bool
    timeout: int

    @property
    def offloads(self) -> bool:
        return self.offload or self.engine == "zero3_offload"

    def setup(self, variant: Variant) -> Setup:
        """The same for the estimator, without offloading."""
        with torch.device("meta"):
            config = build_qwen3(self.preset, 0, self.tokens).config
        return Setup(
            ModelSize.from_config(config),
            gpus=self.processes,
            engine=self.engine.removesuffix("_offload"),
            weak=variant.weak,
            lora=LORA_RANK if variant.lora else None,
            tokens=self.batch_size * self.tokens,
            length=self.tokens,
            activation_checkpointing=self.checkpointing,
            dtype=self.dtype,
            bf16=self.device == "cuda",
            logits_buffer_mb=None if self.device == "cuda" else 256,
        )


class SentBytes(TorchDispatchMode):
    """Bytes that this process sends by ring collectives while the mode is active, as `estimate.communication` counts
    them."""

    def __init__(self, processes: int):
        super().__init__()
        self.processes, self.total = processes, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if name.startswith("c10d.") and any(kind in name for kind in ("allgather", "reduce_scatter", "allreduce")):
            # Inputs and outputs; the larger of them is the whole tensor
            whole = max(num_bytes(x for x in tree_leaves(arg) if isinstance(x, Tensor)) for arg in args)
            self.total += (2 if "allreduce" in name else 1) * whole * (self.processes - 1) // self.processes
        return function(*args, **(kwargs or {}))


class Recorder(TrainerCallback):
    """
    Times the steps of a trainer, and looks at one more: its collectives and what the process holds before the update.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer, which must run `plan.warmup + plan.steps + 1` steps.
        plan ([`Plan`]):
            What is measured.
    """

    def __init__(self, trainer: Trainer, plan: Plan):
        self.trainer, self.plan, self.cuda = trainer, plan, plan.device == "cuda"
        self.seconds: list[float] = []
        self.peak, self.sent, self.tensors = 0, None, None
        self.observing = ExitStack()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.plan.warmup + self.plan.steps:
            self.observe()
        if self.cuda:
            torch.cuda.synchronize()
            if state.global_step == self.plan.warmup:
                torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()

    def observe(self) -> None:
        engine = self.trainer.deepspeed
        optimizer = self.trainer.optimizer.optimizer if engine is None else engine.optimizer
        step = optimizer.step

        def observed_step(*args, **kwargs):
            optimizer.step = step
            self.tensors = tensor_bytes(self.trainer)
            return step(*args, **kwargs)

        optimizer.step = observed_step
        if not self.plan.compile:  # which would compile once more for the mode
            self.sent = self.observing.enter_context(SentBytes(self.plan.processes))

    def on_step_end(self, args, state, control, **kwargs):
        self.observing.close()
        if self.cuda:
            torch.cuda.synchronize()
        if self.plan.warmup < state.global_step <= self.plan.warmup + self.plan.steps:
            self.seconds.append(time.perf_counter() - self.start)
            self.peak = torch.cuda.max_memory_allocated() if self.cuda else 0

    def record(self) -> dict[str, Any]:
        sent = None if self.sent is None else self.sent.total
        return {"seconds": self.seconds, "peak": self.peak, "sent": sent, "tensors": self.tensors}


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def tensor_bytes(trainer: Trainer) -> dict[str, int]:
    """Bytes that this process holds, by the parts of `estimate.Memory`. `kept_whole` are small parameters that ZeRO-3
    keeps gathered beside their parts."""
    strong, weak = split_parameters(trainer)
    gradients, states = plain_state(trainer) if trainer.deepspeed is None else deepspeed_state(trainer)
    parts = [local_part(parameter) for parameter in strong + weak]
    at_rest = {part.untyped_storage().data_ptr() for part in parts}
    # The float32 weights of DeepSpeed, if they are the model's own
    states = [tensor for tensor in states if tensor.untyped_storage().data_ptr() not in at_rest]
    kept_whole = [p for p in strong + weak if in_zero3(p) and p.numel()]
    return {
        "weights": num_bytes(parts[: len(strong)]),
        "weak_model": num_bytes(parts[len(strong) :]),
        "gradients": num_bytes(gradients),
        "optimizer": num_bytes(states),
        "kept_whole": num_bytes(kept_whole),
    }


def split_parameters(trainer: Trainer) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of the strong and of the weak model, which may be a part of it."""
    parameters = parameters_at_rest(trainer.model)
    weak = {name: p for name, p in parameters.items() if "weak_branch." in name or f".{WEAK_ADAPTER}." in name}
    strong = [parameter for name, parameter in parameters.items() if name not in weak]
    model = getattr(getattr(trainer, "weak_reference", None), "model", None)
    separate = [] if model is None else list(parameters_at_rest(model).values())
    if separate and separate[0].is_meta:  # of which only the LM head is left
        separate = [trainer.weak_reference.lm_head().weight]
    known = {id(parameter) for parameter in parameters.values()}
    return strong, [*weak.values(), *(parameter for parameter in separate if id(parameter) not in known)]


def plain_state(trainer: Trainer) -> tuple[list[Tensor], list[Tensor]]:
    """What a process holds of gradients and optimizer states."""
    states = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    gradients = [local_part(p.grad) for p in trainer.model.parameters() if p.grad is not None]
    return gradients, [local_part(tensor) for tensor in states if isinstance(tensor, Tensor) and tensor.ndim]


def deepspeed_state(trainer: Trainer) -> tuple[list[Tensor], list[Tensor]]:
    """The same with the float32 copies of the weights among the states. Private to DeepSpeed, checked with 0.19.8."""
    zero = trainer.deepspeed.optimizer
    weights = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
    gradients = [x for x in tree_leaves(list(zero.averaged_gradients.values())) if isinstance(x, Tensor)]
    gradients += [weight.grad for weight in weights if weight.grad is not None]  # where they are offloaded
    states = [x for state in zero.optimizer.state.values() for x in state.values() if isinstance(x, Tensor) and x.ndim]
    return gradients, [*weights, *states]


def check_engine_is_on(trainer: Trainer, plan: Plan) -> None:
    """FSDP on a CPU is silently plain DDP, and DDP no wrapper at all, where something is off."""
    name = plan.engine.removesuffix("_offload")
    assert trainer.accelerator.num_processes == plan.processes
    assert engine_name(trainer.accelerator) == ("replicated" if name == "ddp" else name)
    wrapped = getattr(trainer.model_wrapped, "_orig_mod", trainer.model_wrapped)
    if name.startswith("zero"):
        assert type(wrapped).__name__ == "DeepSpeedEngine"
        assert wrapped.zero_optimization_stage() == int(name[-1])
        assert bool(wrapped.zero_cpu_offload()) == plan.offloads
    elif name == "fsdp2":
        assert any(isinstance(module, FSDPModule) for module in wrapped.modules())
    elif plan.processes > 1:
        assert isinstance(wrapped, DistributedDataParallel), type(wrapped)
    assert is_sharded(trainer.model) == (name in ("fsdp2", "zero3"))
    weak_model = getattr(getattr(trainer, "weak_reference", None), "model", None)
    assert weak_model is None or is_sharded(weak_model) == is_sharded(trainer.model)


def build_trainer(plan: Plan, variant: Variant, folder: Path) -> Trainer:
    """A trainer for one block of steps."""
    max_steps = plan.warmup + plan.steps + 1
    generator = torch.Generator().manual_seed(0)
    shape = (max_steps * plan.batch_size * plan.processes, plan.tokens)
    ids = torch.randint(3, PRESETS[plan.preset][-2], shape, generator=generator).tolist()
    is_wmss = variant.options is not None
    arguments = (WMSSConfig if is_wmss else SFTConfig)(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=plan.batch_size,
        max_length=None,
        bf16=plan.device == "cuda",
        use_cpu=plan.device == "cpu",
        gradient_checkpointing=plan.checkpointing,
        torch_compile=plan.compile,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **({"sft_epochs": 0, "curriculum": False} | variant.options if is_wmss else {}),
    )
    if plan.engine == "fsdp2" and plan.device == "cpu":  # which Accelerate does not start on a CPU
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    def model(seed: int) -> nn.Module:
        return build_qwen3(plan.preset, seed, plan.tokens, arguments.device).to(DTYPES[plan.dtype])

    def adapter() -> LoraConfig:
        return LoraConfig(r=LORA_RANK, target_modules="all-linear")

    weak = {"weak_model": model(1)} if variant.own_weak_model else {}
    if variant.lora and "train_weak" in (variant.options or {}):
        weak = {"weak_model": earlier_adapter(model(0), adapter())}
    sft_trainer = FullLogitSFTTrainer if variant.full_logits else SFTTrainer
    trainer = (WMSSTrainer if is_wmss else sft_trainer)(
        model(0),
        arguments,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=build_tokenizer(["a"], vocab_size=300),
        peft_config=adapter() if variant.lora else None,
        **weak,
    )
    trainer.log = lambda *_, **__: None
    return trainer


def run_block(plan: Plan, variant: Variant, folder: Path) -> dict[str, Any]:
    """Train for some steps and give everything back."""
    before = torch.cuda.memory_allocated() if plan.device == "cuda" else 0  # what an engine may have left behind
    trainer = build_trainer(plan, variant, folder)
    recorder = Recorder(trainer, plan)
    trainer.add_callback(recorder)
    trainer.train()
    check_engine_is_on(trainer, plan)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_deepspeed_enabled:
        trainer.deepspeed.destroy()
    trainer.accelerator.free_memory()
    record = recorder.record() | {"before": before}
    del trainer, recorder
    gc.collect()
    if plan.device == "cuda":
        torch.cuda.empty_cache()
    if plan.compile:
        torch._dynamo.reset()
    return record


def work(folder: Path) -> None:
    """Measure all variants of a plan in rounds; after each event a line is written."""
    plan = Plan(**json.loads((folder / "plan.json").read_text()))
    rank = int(os.environ.get("RANK", 0))

    def write(**event: Any) -> None:
        with (folder / f"events.{rank}.jsonl").open("a") as file:
            file.write(json.dumps(event | {"time": time.time()}) + "\n")

    datasets.disable_progress_bars()
    if plan.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // plan.processes))
    if "ACCELERATE_USE_DEEPSPEED" in os.environ and plan.device == "cpu":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled now
    order = deque(plan.variants)
    for number in range(plan.rounds):
        for name in order:
            write(event="started", variant=name, round=number)
            try:
                record = run_block(plan, VARIANTS[name], folder / f"{name}-{number}")
            except BaseException as error:
                message = f"{type(error).__name__}: {error}"
                write(event="failed", variant=name, round=number, error=message, details=traceback.format_exc())
                os._exit(1)  # the other processes may wait in a collective
            write(event="finished", variant=name, round=number, **record)
        order.rotate(-1)
    write(event="done", environment=environment(plan.device))
    os._exit(0)  # gloo sometimes aborts while the interpreter shuts down, after all work is done


def launch(plan: Plan, folder: Path) -> tuple[list[list[dict[str, Any]]], str | None]:
    """Launch a plan. Returns the events of each process, and what went wrong."""
    (folder / "plan.json").write_text(json.dumps(asdict(plan)))
    options = {
        "config_file": RECIPES / f"{plan.engine}.yaml",
        "num_processes": plan.processes,
        "mixed_precision": "bf16" if plan.device == "cuda" else "no",
        "main_process_port": 0,
    }
    if plan.offload and plan.engine == "fsdp2":
        options["fsdp_offload_params"] = "true"
    elif plan.offload:
        options["offload_optimizer_device"] = "cpu"
        options["offload_param_device"] = "cpu" if plan.engine == "zero3" else "none"
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // plan.processes)))
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [*command, __file__, "--worker", str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        problem = wait(process, plan.timeout)
    paths = [folder / f"events.{rank}.jsonl" for rank in range(plan.processes)]
    events = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths if path.exists()]
    if len(events) == plan.processes and all(rank[-1]["event"] == "done" for rank in events):
        return events, None
    output_end = "\n".join((folder / "output").read_text(errors="replace").splitlines()[-80:])
    return events, f"{problem or 'the processes ended early'}\n{output_end}"


def wait(process: subprocess.Popen, timeout: int) -> str | None:
    """Wait for a launch and end it in time. Its launcher ends the workers when it is told to terminate."""
    try:
        try:
            code = process.wait(timeout)
            return f"exit code {code}" if code else None
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        return f"no end after {timeout} s"


def culprit(events: list[list[dict[str, Any]]], problem: str) -> tuple[str | None, str, str]:
    """The variant in which a launch failed first, its error, and the traceback or the last lines of the output."""
    last = sorted((rank[-1] for rank in events if rank), key=lambda event: event["time"])
    failed = [event for event in last if event["event"] == "failed"]
    if failed:
        return failed[0]["variant"], failed[0]["error"], failed[0]["details"]
    started = [event for event in last if event["event"] == "started"]
    return (started[0]["variant"] if started else None), problem.splitlines()[0], problem


def measure(plan: Plan) -> tuple[list[list[dict[str, Any]]], dict[str, str]]:
    """Launch a plan, again without a variant that fails. Returns the events of each process, and errors."""
    errors: dict[str, str] = {}
    while left := [name for name in plan.variants if name not in errors]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            events, problem = launch(Plan(**asdict(plan) | {"variants": left}), Path(folder))
        if problem is None:
            return events, errors
        name, error, details = culprit(events, problem)
        print(f"{plan.engine}, {name or 'before any variant'} failed: {details}", file=sys.stderr)
        errors |= dict.fromkeys(left if name is None else [name], error)
    return [], errors


def summarise(plan: Plan, name: str, events: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """What all processes have measured of a variant, beside the estimates."""
    finished = [[e for e in rank if e["event"] == "finished" and e["variant"] == name] for rank in events]
    blocks = list(zip(*finished, strict=True))  # per round the processes
    # Steps are those of the slowest process
    seconds = [[max(step) for step in zip(*(e["seconds"] for e in block), strict=True)] for block in blocks]
    setup = plan.setup(VARIANTS[name])
    account = memory(setup)
    peak = max(event["peak"] - event["before"] for block in blocks for event in block)
    sent = [event["sent"] for block in blocks for event in block if event["sent"] is not None]
    return {
        "seconds": seconds,
        "measurement": Measurement([statistics.median(steps) for steps in seconds], peak).as_dict(),
        "sent": max(sent, default=None),
        "sent_estimate": sum(communication(setup).values()),
        "tensors": {
            part: max(event["tensors"][part] for block in blocks for event in block) for part in (*PARTS, "kept_whole")
        },
        "tensors_estimate": {part: getattr(account, part) for part in PARTS},
        "peak_estimate": peak_estimate(plan, account, setup),
    }


def peak_estimate(plan: Plan, account: Memory, setup: Setup) -> int | None:
    """Estimated bytes on the GPU; the estimator knows one form of offloading."""
    if not plan.offloads:
        return account.total
    if setup.engine != "zero3":
        return None
    return memory(Setup(**{**vars(setup), "engine": "zero3_offload"})).total


def mebibytes(size: int | None) -> str:
    if not size:
        return "-" if size is None else "0"
    return f"{size / 2**20:.0f}" if size >= 100 * 2**20 else f"{size / 2**20:.2f}"


def ratio(result: dict[str, Any], reference: dict[str, Any]) -> str:
    """Median of the ratios within a round, and their quartiles."""
    if "measurement" not in reference:
        return "-"
    return with_quartiles(ratios(result["measurement"]["seconds"], reference["measurement"]["seconds"]))


def row(engine: str, name: str, results: dict[str, dict[str, Any]]) -> list[str]:
    """A line of the table of times."""
    result, variant = results.get(name, {}), VARIANTS[name]
    if "error" in result:
        return [engine, variant.label, f"failed: {one_line(result['error'])}", "", "", "", ""]
    peak = result["measurement"]["peak_bytes"]
    return [
        engine,
        variant.label,
        with_quartiles([1000 * seconds for seconds in result["measurement"]["seconds"]], digits=0),
        *(ratio(result, results.get(reference, {})) for reference in variant.references),
        f"{mebibytes(result['sent'])} / {mebibytes(result['sent_estimate'])}",
        f"{mebibytes(peak)} / {mebibytes(result['peak_estimate'])}" if peak else "not measured",
    ]


def memory_row(engine: str, name: str, result: dict[str, Any]) -> list[str]:
    """A line of the table of tensors."""
    sizes, estimate = result["tensors"], result["tensors_estimate"]
    cells = [f"{mebibytes(sizes[part])} / {mebibytes(estimate[part])}" for part in PARTS]
    return [engine, VARIANTS[name].label, *cells, mebibytes(sizes["kept_whole"])]


def tables(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Times with traffic and peak, and the tensors, of all engines; MB are 2^20 bytes."""
    compared = ["x SFTTrainer", "x SFT, full logits", "sent / estimate, MB", "peak / estimate, MB"]
    times = table(
        ["engine", "variant", "step (quartiles), ms", *compared],
        [row(engine, name, variants) for engine, variants in results.items() for name in variants],
    )
    tensors = table(
        ["engine", "variant", "weights", "gradients", "optimizer", "weak model", "kept whole"],
        [
            memory_row(engine, name, result)
            for engine, variants in results.items()
            for name, result in variants.items()
            if "error" not in result
        ],
    )
    return f"{times}\n\nTensors of a process, measured / estimated, MB:\n\n{tensors}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["ddp", "fsdp2", "zero2", "zero3"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--batch_size", type=int, default=4, help="Examples per process.")
    parser.add_argument("--tokens", type=int, default=64, help="Tokens per example.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="Dtype in which models are handed in.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="Timed steps of a variant in a round.")
    parser.add_argument("--warmup", type=int, default=2, help="Steps before them.")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="`torch_compile=True`; bytes sent are not counted.")
    parser.add_argument("--offload", action="store_true", help="Optimizer (and sharded weights) in CPU memory.")
    parser.add_argument("--timeout", type=int, default=3600, help="Seconds for the launch of an engine.")
    parser.add_argument("--json", default="engines.json", help="File for the raw figures.")
    args = parser.parse_args()
    if args.offload and "ddp" in args.engines:
        parser.error("`--offload` is not possible with DDP. Remove `ddp` from `--engines`.")
    return args


def main() -> None:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through `wait`, which ends the launch
    options = {name: value for name, value in vars(args).items() if name not in ("engines", "json")}
    results: dict[str, dict[str, dict[str, Any]]] = {}
    found = None
    for engine in args.engines:
        plan = Plan(engine=engine, **options)
        events, errors = measure(plan)
        results[engine] = {
            name: {"error": errors[name]} if name in errors else summarise(plan, name, events)
            for name in plan.variants
        }
        found = events[0][-1]["environment"] if events else found
        result = save(args, {}, engines=results, environment=found)
    print(with_heading(result))
    if failed := [
        f"{name} ({engine})" for engine, variants in results.items() for name, x in variants.items() if "error" in x
    ]:
        sys.exit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]))
    else:
        main()
