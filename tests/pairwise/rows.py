"""
Runs rows through the trainer and records what it did: `rows.py ROWS_JSON FOLDER` in each process of a launch.

The record is what the judge needs: the batches, draws, logs and weights, and what was there before and after.
"""

import copy
import json
import os
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import is_peft_model
from factors import Row
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from transformers import AutoModelForCausalLM, TrainerCallback
from world import World, copy_of, make_collator, make_dataset

import wmss_trl.modeling.lm_head
from wmss_trl import WMSSConfig, WMSSTrainer

# Under DDP on a CPU, transformers before 5.18 restores the optimizer to "cpu:0", which PyTorch does not know
torch.serialization.register_package(
    0, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)

PROBE = torch.tensor([[5, 60, 7, 80, 9, 10, 100, 12]])


class Recorder(WMSSTrainer):
    """A trainer that writes down which examples its steps see, and its draws."""

    batches: list[tuple[int, list[list[int]]]]
    draws: dict[int, dict[str, Any]]

    def training_step(self, model, inputs, num_items_in_batch=None):
        ids = inputs["input_ids"]
        if "attention_mask" in inputs:
            examples = [row[mask.bool()].tolist() for row, mask in zip(ids, inputs["attention_mask"], strict=True)]
        else:
            starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
            ends = [*starts[1:], ids.size(1)]
            examples = [ids[0, start:end].tolist() for start, end in zip(starts, ends, strict=True)]
        self.batches.append((self.state.global_step, examples))
        sampler = self.curriculum_sampler
        if sampler is not None and sampler.drawn_epoch is not None:
            names = ("weak_entropy", "strong_entropy", "indices", "row_sizes")
            self.draws[sampler.drawn_epoch] = {name: copy.copy(getattr(sampler, name)) for name in names}
        return super().training_step(model, inputs, num_items_in_batch)


class StopAfter(TrainerCallback):
    """Stops a run after a step from which it has a checkpoint."""

    def __init__(self, step: int):
        self.step = step

    def on_train_begin(self, args, state, control, **kwargs):
        while self.step >= state.max_steps:
            self.step -= 3

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@contextmanager
def head_that_cannot_be_reached(forced: bool):
    original = wmss_trl.modeling.lm_head._head_problem
    if forced:
        wmss_trl.modeling.lm_head._head_problem = lambda model: "it is to be so in this row"
    try:
        yield
    finally:
        wmss_trl.modeling.lm_head._head_problem = original


def make_trainer(world: World, output: str = "run", **changed: Any) -> tuple[Recorder, WMSSConfig, Any]:
    """The trainer of a row, its arguments and the weak model that it is given as an object."""
    row = world.row
    resplit = changed.pop("resplit", False)
    args = WMSSConfig(**world.options(output, resplit) | changed)
    before = copy_of(args)
    tokenizer = world.tokenizer
    weak_model = world.weak() if row["weak"] == "object" else None
    trainer = Recorder(
        world.handed_in(),
        args,
        data_collator=None if row["collator"] == "trl" else make_collator(row["collator"], tokenizer),
        train_dataset=make_dataset(row["data"]),
        eval_dataset=make_dataset(row["data"], 8, seed=1) if row["evaluation"] != "none" else None,
        processing_class=tokenizer,
        peft_config=world.adapter_config(),
        weak_model=weak_model,
    )
    trainer.batches, trainer.draws = [], {}
    assert_unchanged(before, args)
    return trainer, args, weak_model


def assert_unchanged(before: dict[str, Any], args: WMSSConfig) -> None:
    changed = [name for name, value in copy_of(args).items() if before.get(name) != value]
    assert not changed, f"the caller's arguments {changed} were changed"


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def logits_of(model: torch.nn.Module, precision: str) -> torch.Tensor:
    training = model.training
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return model.eval()(PROBE).logits.float().clone()
    finally:
        model.train(training)


def weak_logits_of(trainer: Recorder, precision: str) -> torch.Tensor | None:
    """Logits of the weak model, where there is one that can be run."""
    reference = trainer.weak_reference
    if not hasattr(reference, "model"):
        return None
    with reference.activated() as weak:
        return logits_of(weak, precision)


def run_row(row: Row, folder: Path) -> dict[str, Any]:
    world = World(row, folder)
    with head_that_cannot_be_reached(row["head"] == "full-logits"):
        trainer, args, weak_object = make_trainer(world)
        before = copy_of(args)
        record: dict[str, Any] = {
            "start": state_of(trainer.model),
            "weak_before": weak_logits_of(trainer, row["precision"]),
        }
        weak_state = None if weak_object is None else state_of(weak_object)
        batches, draws = trainer.batches, trainer.draws
        if row["stopped"] == "no":
            trainer.train()
        else:
            stop = StopAfter({"text": 3, "prompt-completion": 6, "messages": 9}[row["data"]])
            trainer.add_callback(stop)
            trainer.train()
            checkpoint = str(folder / "run" / f"checkpoint-{stop.step}")
            record["refused"] = refused_resume(world, checkpoint)
            draws_before = trainer.draws
            trainer, args, weak_object = make_trainer(world, resplit=row["stopped"] == "resumed-in-other-batches")
            before = copy_of(args)
            weak_state = None if weak_object is None else state_of(weak_object)
            trainer.train(resume_from_checkpoint=checkpoint)
            for epoch in draws_before.keys() & trainer.draws.keys():
                assert np.array_equal(draws_before[epoch]["indices"], trainer.draws[epoch]["indices"])
            batches, draws = batches + trainer.batches, draws_before | trainer.draws
        assert_unchanged(before, args)
        if weak_state is not None and row["train_weak"] == "no" and row["weak_refresh"] == "never":
            after = weak_object.state_dict()
            assert all(torch.equal(after[name], value) for name, value in weak_state.items())
        if row["weak_cache"] == "none":  # or only its LM head may be left
            record["weak_after"] = weak_logits_of(trainer, row["precision"])
        record |= {"batches": batches, "draws": draws, "logs": trainer.state.log_history}
        record |= {"global_step": trainer.state.global_step, "max_steps": trainer.state.max_steps}
        record |= {"end": state_of(trainer.model), "logits": logits_of(trainer.model, row["precision"])}
        trainer.save_model(str(folder / "final"))
        trainer.accelerator.wait_for_everyone()
        assert not torch.is_autocast_enabled("cpu"), "autocast is still on after the run"
        record |= saved(folder / "final", is_peft_model(trainer.model), row["precision"])
    return record


def refused_resume(world: World, checkpoint: str) -> str:
    """What is said to a resume with another global batch."""
    options = world.options("run")
    other = make_trainer(world, per_device_train_batch_size=2 * options["per_device_train_batch_size"])[0]
    try:
        other.train(resume_from_checkpoint=checkpoint)
    except ValueError as error:
        return str(error)
    return ""


def saved(folder: Path, is_adapter: bool, precision: str) -> dict[str, Any]:
    """What plain transformers and PEFT make of the saved model, and the names of the tensors in it."""
    names = []
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    cls = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
    return {"saved_names": names, "saved_logits": logits_of(cls.from_pretrained(folder), precision)}


def main() -> None:
    """Run rows one after the other and leave a record of each per process."""
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", 0))
    for name, row in json.loads(sys.argv[1]).items():
        folder = Path(sys.argv[2]) / name
        AcceleratorState._reset_state()  # which keeps the precision of the first row
        try:
            record = run_row(row, folder)
        except BaseException as error:
            traceback.print_exc()
            record = {"error": f"{type(error).__name__}: {error}"}
        partial = folder / f"record.{rank}.partial"
        torch.save(record, partial)
        partial.rename(folder / f"record.{rank}.pt")
        print(f"{name} done", flush=True)
    os._exit(0)  # gloo sometimes aborts while the interpreter shuts down, after all work is done


if __name__ == "__main__":
    main()
