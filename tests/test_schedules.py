import copy
import math

import numpy as np
import pytest
import torch
from trl import SFTConfig, SFTTrainer

from wmss_trl import WMSSConfig, WMSSTrainer
from wmss_trl.config import convert_arguments
from wmss_trl.losses.schedules import make_lambda_schedule


def square_root(progress: float) -> float:
    return 0.2 + 0.7 * math.sqrt(progress)


def too_far(progress: float) -> float:
    return 0.5 - progress


@pytest.fixture
def make_trainer(make_model, make_args, tokenizer, dataset):
    def make(cls=WMSSTrainer, model=None, weak_model=None, **kwargs):
        options = {"sft_epochs": 1, "num_train_epochs": 3, **kwargs}
        if cls is SFTTrainer:
            args, weak = make_args(SFTConfig, num_train_epochs=3), {}
        else:
            args, weak = make_args(**options), {"weak_model": weak_model}
        model = make_model(dropout=0.0) if model is None else model
        return cls(model, args, train_dataset=dataset, processing_class=tokenizer, **weak)

    return make


def lambdas(trainer):
    return [entry["mixing_lambda"] for entry in trainer.state.log_history if "mixing_lambda" in entry]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.8, 0.8, 0.8]),
        ("linear", [0.8, 0.5, 0.2]),
        ("cosine", [0.8, 0.5, 0.2]),
        (square_root, [0.2, 0.2 + 0.7 * math.sqrt(0.5), 0.9]),
    ],
)
def test_values_at_the_start_the_middle_and_the_end(schedule, expected):
    function = make_lambda_schedule(schedule, 0.8, 0.2)
    assert [function(progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx(expected)


def test_cosine_is_flat_at_both_ends():
    function = make_lambda_schedule("cosine", 0.8, 0.2)
    assert function(0.1) == pytest.approx(0.2 + 0.3 * (1 + math.cos(0.1 * math.pi)))
    assert function(0.1) > make_lambda_schedule("linear", 0.8, 0.2)(0.1)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_schedule_spans_the_weak_driven_steps_and_is_logged(make_trainer, accumulation):
    trainer = make_trainer(
        mixing_lambda=0.3, final_mixing_lambda=1.0, lambda_schedule="linear", gradient_accumulation_steps=accumulation
    )
    trainer.train()
    steps = 12 if accumulation == 1 else 6
    np.testing.assert_allclose(lambdas(trainer)[-steps:], np.linspace(0.3, 1.0, steps), rtol=1e-6)
    assert len(lambdas(trainer)) == steps  # none in phase 1


def test_a_schedule_that_stays_at_one_is_sft(make_trainer, make_model):
    model = make_model(dropout=0.0)
    ours = make_trainer(
        model=copy.deepcopy(model), lambda_schedule=lambda progress: 1.0, curriculum=False, weak_model=make_model(3)
    )
    theirs = make_trainer(SFTTrainer, model=model)
    for trainer in (ours, theirs):
        trainer.train()
    ours, theirs = ([entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (ours, theirs))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_function_by_its_path(make_args):
    args = make_args(lambda_schedule="test_schedules:square_root")
    assert make_lambda_schedule(args.lambda_schedule, 0.5)(1.0) == pytest.approx(0.9)


def test_function_in_the_arguments_can_be_logged_and_converted(make_args):
    args = make_args(lambda_schedule=square_root)
    assert "test_schedules:square_root" in args.to_json_string()
    assert convert_arguments(args, WMSSConfig).lambda_schedule is square_root


@pytest.mark.parametrize("schedule", ["cosine", "crossover"])
def test_resumed_run_follows_the_schedule(make_trainer, schedule, tmp_path):
    options = {"lambda_schedule": schedule}
    if schedule == "cosine":
        options |= {"mixing_lambda": 0.9, "final_mixing_lambda": 0.3}
    whole = make_trainer(**options, save_strategy="steps", save_steps=1, output_dir=str(tmp_path / "whole"))
    whole.train()
    for step in (4, 10, 13, 16, 19):
        resumed = make_trainer(**options, output_dir=str(tmp_path / "resumed"))
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert lambdas(resumed) == lambdas(whole), step
        for parameter, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(parameter, expected)


def test_crossover_is_that_of_the_full_logits(make_trainer, make_model):
    strong, weak = make_model(seed=1, dropout=0.0), make_model(seed=2, dropout=0.0)
    with torch.no_grad():
        for parameter in strong.parameters():
            parameter.mul_(2)
    start = copy.deepcopy(strong).eval()
    trainer = make_trainer(
        model=strong, weak_model=weak, lambda_schedule="crossover", sft_epochs=0, num_train_epochs=2, learning_rate=0.1
    )
    trainer.train()
    totals = np.zeros(2)
    for example in trainer.train_dataset:
        ids, labels = (torch.tensor(example[key]) for key in ("input_ids", "labels"))
        for i, model in enumerate((start, weak)):
            with torch.no_grad():
                logits = model(ids[None]).logits[0, :-1].double()[labels[1:] != -100]
            totals[i] += (logits - logits.mean(-1, keepdim=True)).norm(dim=-1).sum().item()
    ratio = (totals[0] / totals[1]) ** 2
    first, second = sorted(set(lambdas(trainer)), key=lambdas(trainer).index)  # measured anew in the second epoch
    assert first == pytest.approx(1 / (1 + math.sqrt(ratio)), rel=1e-5)
    assert first < 0.45
    assert abs(second - first) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_schedule": "lienar"}, r"must be one of \['constant', .* got 'lienar'"),
        ({"lambda_schedule": "nowhere:at_all"}, r"`lambda_schedule='nowhere:at_all'` cannot be imported"),
        ({"lambda_schedule": "math:pi"}, r"must be one of .* got 'math:pi'"),
        ({"lambda_schedule": "linear"}, r"`lambda_schedule='linear'` needs a `final_mixing_lambda`"),
        ({"lambda_schedule": "cosine", "final_mixing_lambda": 0.0}, r"in \(0, 1\], got 0.0"),
        ({"final_mixing_lambda": 0.3}, r"`final_mixing_lambda=0.3` is for the schedules .* 'constant'"),
        ({"lambda_schedule": "crossover", "mixing_lambda": 0.3}, r"`mixing_lambda=0.3` is not used with .*crossover"),
    ],
)
def test_bad_schedules_are_refused(make_args, options, message):
    with pytest.raises(ValueError, match=message):
        make_args(**options)


def test_values_out_of_range_stop_the_run(make_trainer):
    trainer = make_trainer(lambda_schedule=too_far)
    with pytest.raises(ValueError, match=r"`lambda_schedule='test_schedules:too_far'` gave -\d.* at progress 0\.\d"):
        trainer.train()


def test_crossover_of_streaming_data_is_refused(make_model, make_args, tokenizer, dataset):
    args = make_args(lambda_schedule="crossover", curriculum=False, sft_epochs=0, max_steps=3)
    with pytest.raises(ValueError, match=r"`lambda_schedule='crossover'` measures"):
        WMSSTrainer(make_model(), args, train_dataset=dataset.to_iterable_dataset(), processing_class=tokenizer)
