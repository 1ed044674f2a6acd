"""Runs that go on from a checkpoint: with their batches split otherwise, from plain SFT, after a kill."""

import numpy as np
import pytest
import torch
from conftest import sums
from datasets import Dataset

from wmss_trl import WMSSTrainer
from wmss_trl.epochs import EpochPlan
from wmss_trl.run_state import check_same_order, check_same_steps


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_ends_the_same(trainer, whole):
    assert trainer.state.global_step == trainer.state.max_steps == whole.state.max_steps
    np.testing.assert_allclose(losses(trainer), losses(whole), rtol=1e-5)
    for (name, parameter), expected in zip(trainer.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-6, msg=name)


@pytest.fixture
def make_trainer(make_model, make_args, tokenizer, dataset, tmp_path):
    """Without dropout, whose masks depend on how a step is split into batches; SGD, since Adam turns a rounding
    difference of a gradient near 0 into a whole step."""

    def make(folder="run", train_dataset=None, data_collator=None, **options):
        return WMSSTrainer(
            make_model(dropout=0.0),
            make_args(**{"optim": "sgd", "learning_rate": 0.1, "output_dir": str(tmp_path / folder), **options}),
            data_collator=data_collator,
            train_dataset=dataset if train_dataset is None else train_dataset,
            processing_class=tokenizer,
        )

    return make


SPLIT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, (5, 16)),  # epochs of 10, 6 and 6 steps: in phase 1, between two weak-driven epochs
        ({"curriculum": False}, (12,)),
        ({"train_sampling_strategy": "group_by_length", "max_steps": 15}, (5, 12)),
        ({"weak_refresh": "epoch"}, (18,)),
    ],
)
def test_a_global_batch_that_is_split_otherwise_continues_exactly(make_trainer, tmp_path, options, steps):
    whole = make_trainer("whole", save_strategy="steps", save_steps=1, **options)
    whole.train()
    for step in steps:
        resumed = make_trainer("resumed", **options, **SPLIT)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_ends_the_same(resumed, whole)


@pytest.mark.parametrize("curriculum", [True, False])
def test_another_global_batch_is_refused_with_the_list(make_trainer, tmp_path, curriculum):
    make_trainer(max_steps=12, save_strategy="steps", save_steps=4, curriculum=curriculum).train()
    resumed = make_trainer("resumed", per_device_train_batch_size=2, curriculum=curriculum)
    message = (
        r"`per_device_train_batch_size`: 4 in the checkpoint, 2 now; examples per step: 4 in .*, 2 now; steps per "
        r"epoch of phase 1: 10 in the checkpoint, 19 now; .* processes = 4\."
    )
    for step in (4, 12):
        with pytest.raises(ValueError, match=message):
            resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))


def test_another_number_of_steps_per_epoch_is_refused_with_the_reason(make_trainer, tmp_path):
    """Of 38 examples, 2 are dropped from batches of 4 and none from batches of 2."""
    options = {"dataloader_drop_last": True, "train_dataset": Dataset.from_list(sums(38))}
    make_trainer(max_steps=12, save_strategy="steps", save_steps=12, **options).train()
    resumed = make_trainer("resumed", **options, **SPLIT)
    with pytest.raises(ValueError, match=r"steps per epoch of phase 1: 9 in .*, 10 now.*`dataloader_drop_last=True`"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-12"))


def test_the_middle_of_an_epoch_whose_order_depends_on_the_split_is_refused(tmp_path):
    """transformers groups by length what one process sees in a step."""
    one = EpochPlan(1, full_batches=10, active_batches=6, accumulation=1, batch_size=4)
    accumulated = EpochPlan(1, full_batches=19, active_batches=12, accumulation=2, batch_size=2)
    two = EpochPlan(1, full_batches=10, active_batches=6, accumulation=1, batch_size=2, num_processes=2)
    for plan in (accumulated, two):
        check_same_steps(tmp_path, one, plan)
        check_same_order(tmp_path, "random", one, plan)
    check_same_order(tmp_path, "group_by_length", one, accumulated)
    with pytest.raises(ValueError, match=r"`train_sampling_strategy='group_by_length'`.* from the end of an epoch"):
        check_same_order(tmp_path, "group_by_length", one, two)
