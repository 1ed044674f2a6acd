"""Holds what a run recorded against the reference loop."""

from collections import Counter
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from reference import ReferenceRun, Settings, Step, draw, order_of_epoch, sampling_weights
from rows import PROBE, logits_of
from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer
from world import GLOBAL_BATCH, NUM_EXAMPLES, PACKED_LENGTH, World, learning_rate, make_collator, make_dataset

Record = dict[str, Any]

# fp32: as close as rounding lets two orders of summation be. bf16: both run under autocast, but a batch is rounded
# elsewhere than an example alone; about twice the largest that was seen in any row.
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
ENTROPY_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
WEIGHT_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}


def sft_dataset(world: World, num_examples: int, seed: int, packing: bool = False) -> Dataset:
    """Data of a row as SFTTrainer prepares it."""
    data = world.row["data"]
    args = SFTConfig(
        output_dir=str(world.folder / "prepared"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        packing=packing,
        max_length=PACKED_LENGTH[data] if world.row["layout"] == "packed" else None,
        assistant_only_loss=data == "messages",
    )
    dataset = make_dataset(data, num_examples, seed)
    return SFTTrainer(world.base(), args, train_dataset=dataset, processing_class=world.tokenizer).train_dataset


def prepared_examples(world: World, num_examples: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels as SFTTrainer prepares them and the row's collator hands them on."""
    collate = make_collator(world.row["collator"], world.tokenizer)
    examples = []
    for example in sft_dataset(world, num_examples, seed):
        batch = collate([{name: example[name] for name in ("input_ids", "labels")}])
        length = len(example["input_ids"])
        examples.append(tuple(batch[name][0, :length].tolist() for name in ("input_ids", "labels")))
    assert len({tuple(ids) for ids, _ in examples}) == num_examples
    return examples


def write_score_file(world: World) -> None:
    """The score file of a row, whose token counts are those of the data set (before the collator)."""
    plain = World(world.row | {"collator": "trl"}, world.folder)
    counts = [sum(label != -100 for label in labels[1:]) for _, labels in prepared_examples(plain, NUM_EXAMPLES, 0)]
    world.write_score_file(counts)


def settings_of(world: World, record: Record) -> Settings:
    row = world.row
    mixing_lambda = 1.0 if row["schedule"] == "lambda-1" else 0.4
    scores = np.load(world.folder / "scores.npz")
    return Settings(
        sft_epochs=world.sft_epochs,
        total_steps=record["max_steps"],
        learning_rate=learning_rate(row),
        mixing_lambda=mixing_lambda,
        final_lambda=0.8 if row["schedule"] == "linear" else mixing_lambda,
        schedule=row["schedule"],
        anchor=float(row["anchor"]),
        dft=row["loss_type"] == "dft",
        train_weak=row["train_weak"] == "yes",
        refresh=row["weak_refresh"] == "epoch",
        curriculum=row["curriculum"] != "off",
        variant=row["curriculum"] if row["curriculum"] in ("v1", "v2") else "released",
        term_weights=(0.8, 0.1, 0.1) if row["curriculum"] in ("v1", "v2") else (0.1, 0.8, 0.1),
        replacement=row["curriculum"] == "replacement",
        sampling=row["sampling"].replace("-", "_"),
        group_size=GLOBAL_BATCH,
        score_file=(scores["weak"], scores["strong"]) if row["curriculum"] == "score-file" else None,
        bf16=row["precision"] == "bf16",
    )


def expected_steps(world: World) -> list[int]:
    """Number of optimizer steps of each epoch."""
    row = world.row
    rows = len(sft_dataset(world, NUM_EXAMPLES, 0, packing=True)) if row["layout"] == "packed" else NUM_EXAMPLES
    active = rows if row["curriculum"] == "off" else max(1, round(0.63 * rows))
    return [-(-size // GLOBAL_BATCH) for size in [rows] * world.sft_epochs + [active] * 2]


def steps_of(world: World, records: list[Record], index: dict[tuple[int, ...], int]) -> list[Step]:
    """The optimizer steps of a run with the epoch of each, from the batches of all processes."""
    batches: dict[int, list[list[int]]] = {}
    for items in zip(*(record["batches"] for record in records), strict=True):
        for step, examples in items:
            batches.setdefault(step, []).append([index[tuple(ids)] for ids in examples])
    assert sorted(batches) == list(range(records[0]["global_step"])), "a step is missing"
    epochs = [epoch for epoch, count in enumerate(expected_steps(world)) for _ in range(count)]
    if world.row["length"] == "max-steps":
        epochs = epochs[: world.options("run")["max_steps"]]
    assert len(epochs) == len(batches), f"{len(batches)} steps, not {len(epochs)}"
    return [Step(epoch, batches[step]) for step, epoch in enumerate(epochs)]


def check_draws(world: World, settings: Settings, record: Record, steps: list[Step], lengths: list[int]) -> None:
    """Each epoch trains on what the logged scores, the formula of the weights and the seed give."""
    row = world.row
    for epoch in range(steps[-1].epoch + 1):
        seen = list(chain.from_iterable(b for step in steps if step.epoch == epoch for b in step.micro_batches))
        whole = epoch < steps[-1].epoch or row["length"] == "epochs"
        if epoch < settings.sft_epochs or not settings.curriculum:
            if whole:
                assert set(seen) == set(range(NUM_EXAMPLES)), f"epoch {epoch} leaves examples out"
            assert len(seen) < NUM_EXAMPLES + GLOBAL_BATCH
            continue
        logged = record["draws"][epoch]
        number = epoch - settings.sft_epochs
        weights = sampling_weights(logged["weak_entropy"], logged["strong_entropy"], settings)
        drawn = draw(weights, number, settings)
        if row["layout"] == "packed":
            num_drawn = len(logged["indices"])
            assert set(logged["indices"].tolist()) == set(drawn[:num_drawn].tolist())
            ends = np.concatenate([[0], logged["row_sizes"].cumsum()])
            sizes = [sum(lengths[i] for i in logged["indices"][a:b]) for a, b in pairwise(ends)]
            assert max(sizes) <= PACKED_LENGTH[row["data"]]
            expected = logged["indices"].tolist()
        else:
            drawn = drawn[: round(settings.active_fraction * NUM_EXAMPLES)]
            expected = order_of_epoch(drawn, number, lengths, settings)
        assert logged["indices"].tolist() == expected, f"epoch {epoch} has another draw than its scores and seed give"
        if row["processes"] == "1" and whole:
            assert seen == expected, f"epoch {epoch} trains on something else than its draw"
        else:  # processes are filled up with examples from the beginning
            assert not Counter(expected) - Counter(seen) or not whole
            assert set(seen) <= set(expected)


def assert_close(name: str, ours: Any, expected: Any, tolerance: float) -> None:
    """In fp32 each number is within the tolerance; in bf16, where an expert may flip, their mean distance is."""
    ours, expected = np.asarray(ours, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert ours.shape == expected.shape, f"{name}: {ours.shape} values, not {expected.shape}"
    error = np.abs(ours - expected) / np.maximum(1, np.abs(expected))
    distance = error.max(initial=0) if tolerance < 1e-3 else error.mean()
    assert distance <= tolerance, f"{name} differ by up to {error.max():.2g}: {ours} and {expected}"


def assert_same_state(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    ours = {name: value for name, value in ours.items() if "weak" not in name}
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            assert_close(name, ours[name], value, tolerance)


def models_of(world: World, record: Record) -> tuple[nn.Module, nn.Module]:
    """Both models as the trainer began: an adapter that it made new has its random start from the record."""
    strong = world.strong()
    start = {name: value for name, value in record["start"].items() if "weak" not in name}
    strong.load_state_dict(start)
    with torch.no_grad():
        torch.testing.assert_close(strong.eval()(PROBE).logits, world.handed_in()(PROBE).logits)
    if world.row["weak"] != "m0":
        return strong, world.weak()
    weak = world.strong() if world.row["train_weak"] == "yes" else world.weak()
    if world.row["train_weak"] == "yes":
        weak.load_state_dict(start)
    return strong, weak


def judge(world: World, records: list[Record]) -> dict[str, float]:
    """Check a run; returns how far it was from the reference."""
    for record in records:
        assert "error" not in record, record["error"]
    row, record = world.row, records[0]
    examples = prepared_examples(world, NUM_EXAMPLES, 0)
    eval_examples = prepared_examples(world, 8, 1)
    index = {tuple(ids): i for i, (ids, _) in enumerate(examples)}
    settings, steps = settings_of(world, record), steps_of(world, records, index)
    check_draws(world, settings, record, steps, [len(ids) for ids, _ in examples])

    loss_tolerance, weight_tolerance = LOSS_TOLERANCE[row["precision"]], WEIGHT_TOLERANCE[row["precision"]]
    strong, weak = models_of(world, record)
    if record["weak_before"] is not None and row["weak"] != "4-bit":
        expected = logits_of(weak, row["precision"])
        assert_close("weak logits at the start", record["weak_before"], expected, weight_tolerance)
    reference = ReferenceRun(settings, strong, weak, examples, eval_examples)
    result = reference.run(steps, save_every=3)

    entropy_tolerance = ENTROPY_TOLERANCE[row["precision"]]
    for epoch, pair in result.entropies.items():
        for name, expected in zip(("weak_entropy", "strong_entropy"), pair, strict=True):
            assert_close(f"{name} of epoch {epoch}", record["draws"][epoch][name], expected, entropy_tolerance)
    logs = [entry for entry in record["logs"] if "loss" in entry]
    assert [entry["step"] for entry in logs] == list(range(1, len(steps) + 1))
    assert_close("losses", [entry["loss"] for entry in logs], result.losses, loss_tolerance)
    assert_close("gradient norms", [entry["grad_norm"] for entry in logs], result.grad_norms, 10 * loss_tolerance)
    lambdas = [1.0 if lam is None else lam for lam in result.lambdas]
    assert_close("lambda", [entry.get("mixing_lambda", 1.0) for entry in logs], lambdas, loss_tolerance)
    evaluated = {entry["step"]: entry["eval_loss"] for entry in record["logs"] if "eval_loss" in entry}
    final_step = len(steps)
    if row["evaluation"] == "load-best":
        assert evaluated.keys() == result.eval_losses.keys()
        assert_close("evaluation", list(evaluated.values()), list(result.eval_losses.values()), loss_tolerance)
        final_step = min(evaluated, key=evaluated.get)
    for other in records:
        assert_same_state(other["end"], result.states[final_step], weight_tolerance)
    if row["train_weak"] == "no" and row["weak_refresh"] == "never" and record.get("weak_after") is not None:
        torch.testing.assert_close(record["weak_after"], record["weak_before"], rtol=0, atol=1e-7)
    elif record.get("weak_after") is not None and row["weak"] != "4-bit":
        expected = logits_of(reference.weak, row["precision"])
        assert_close("weak logits at the end", record["weak_after"], expected, 10 * weight_tolerance)

    assert record["saved_names"]
    assert not [name for name in record["saved_names"] if "weak" in name]
    assert_close("logits of the saved model", record["saved_logits"], record["logits"], weight_tolerance)
    # Where nothing happens at the end of an epoch, a run may go on with another global batch, as SFTTrainer's may
    mixes = row["schedule"] != "lambda-1"
    has_phases = settings.curriculum or (mixes and (settings.sft_epochs > 0 or settings.refresh))
    if row["stopped"] != "no" and has_phases:
        assert "per_device_train_batch_size" in record["refused"], "a resume with another global batch was not refused"
    return {
        "loss": float(np.abs(np.array([e["loss"] for e in logs]) - result.losses).max()),
        "steps": len(steps),
    }
