import copy
import gc
import inspect
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import StopAt, losses, sums
from datasets import Dataset
from loss_cases import cross_entropy
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from wmss_trl import WMSSConfig, WMSSTrainer
from wmss_trl.compatibility import checkpointing_option
from wmss_trl.data.tiny import build_tokenizer


def assert_same_weights(model, other):
    for (name, parameter), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, expected), name


class WeightsAt(TrainerCallback):
    """Keeps a copy of the model as it is after some steps."""

    def __init__(self, *steps):
        self.steps, self.models = steps, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            self.models[state.global_step] = copy.deepcopy(model.state_dict())


@pytest.fixture
def make_trainer(make_model, make_args, tokenizer, dataset):
    def make(model=None, train_dataset=None, weak_model=None, peft_config=None, callbacks=None, **kwargs):
        return WMSSTrainer(
            make_model() if model is None else model,
            make_args(**kwargs),
            train_dataset=dataset if train_dataset is None else train_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=callbacks,
            weak_model=weak_model,
        )

    return make


@pytest.fixture
def sft_run(make_model, make_args, tokenizer, dataset):
    def run(model=None, callbacks=None, train_dataset=None, **kwargs):
        trainer = SFTTrainer(
            make_model() if model is None else model,
            make_args(SFTConfig, **kwargs),
            train_dataset=dataset if train_dataset is None else train_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        trainer.train()
        return trainer

    return run


# Phase 1


@pytest.mark.parametrize("accumulation", [1, 3])
def test_phase_1_is_sft_bit_for_bit(make_trainer, sft_run, accumulation):
    """10 batches of 4 an epoch; the learning rate is constant, since the two runs differ in length."""
    options = {"gradient_accumulation_steps": accumulation, "lr_scheduler_type": "constant"}
    phase_1_steps = 2 * -(-10 // accumulation)
    weights = WeightsAt(phase_1_steps)
    trainer = make_trainer(callbacks=[weights], sft_epochs=2, num_train_epochs=3, **options)
    trainer.train()
    sft = sft_run(num_train_epochs=2, **options)
    assert sft.state.global_step == phase_1_steps
    assert losses(trainer)[:phase_1_steps] == losses(sft)
    for name, value in sft.model.state_dict().items():
        assert torch.equal(weights.models[phase_1_steps][name], value), name
    keys = ("entropy", "mean_token_accuracy", "num_tokens", "grad_norm")
    for ours, theirs in zip(trainer.state.log_history, sft.state.log_history[:phase_1_steps], strict=False):
        assert {key: ours[key] for key in keys} == {key: theirs[key] for key in keys}


def test_a_loaded_weak_model_does_not_disturb_phase_1(make_trainer, make_model, sft_run, tmp_path, tokenizer):
    make_model(seed=5).save_pretrained(tmp_path / "weak")
    tokenizer.save_pretrained(tmp_path / "weak")
    trainer = make_trainer(weak_model=str(tmp_path / "weak"), sft_epochs=1, num_train_epochs=1.0)
    trainer.train()
    assert losses(trainer) == losses(sft_run(num_train_epochs=1))


def test_lambda_1_without_curriculum_is_sft_and_has_no_weak_model(make_trainer, make_model, sft_run):
    with pytest.warns(UserWarning, match="`weak_model` is not used"):
        trainer = make_trainer(weak_model=make_model(seed=1), mixing_lambda=1.0, curriculum=False, sft_epochs=1)
    assert trainer.weak_reference is None
    trainer.train()
    sft = sft_run()
    assert losses(trainer) == losses(sft)
    assert_same_weights(trainer.model, sft.model)


@pytest.mark.parametrize("own_weak_model", [False, True])
def test_lambda_1_with_curriculum_never_trains_against_the_weak_model(make_trainer, make_model, own_weak_model):
    """The paper's "selection only" ablation: the weak model is scored, its logits never enter a step."""
    trainer = make_trainer(mixing_lambda=1.0, weak_model=make_model(seed=5) if own_weak_model else None)
    if own_weak_model:
        forwards = []
        trainer.weak_reference.model.register_forward_hook(lambda *_: forwards.append(trainer.state.global_step))
    else:  # M0's entropies are the strong model's before its first step: no second model is in memory
        assert not hasattr(trainer.weak_reference, "model")
    trainer.train()
    if own_weak_model:
        assert set(forwards) == {10}  # the scoring at the start of the first weak-driven epoch
    else:
        expected = make_trainer(output_dir=trainer.args.output_dir + "2")
        expected.train()
        sampler = expected.curriculum_sampler
        np.testing.assert_array_equal(trainer.curriculum_sampler.weak_entropy, sampler.weak_entropy)
    assert "mixed_nll" not in trainer.state.log_history[-2]


def test_entropies_of_m0_come_from_the_strong_model_before_its_first_step(make_trainer, make_model):
    trainer = make_trainer(num_train_epochs=2)
    forwards = []
    trainer.weak_reference.model.register_forward_hook(lambda *_: forwards.append(trainer.model.training))
    trainer.train()
    assert forwards
    assert all(forwards)  # only beside a training step
    weak_entropy = trainer.curriculum_sampler.weak_entropy
    # The frozen copy says the same
    again = make_trainer(weak_model=make_model(), num_train_epochs=2, output_dir=trainer.args.output_dir + "2")
    again.train()
    np.testing.assert_allclose(again.curriculum_sampler.weak_entropy, weak_entropy, atol=1e-6)
    assert losses(again) == pytest.approx(losses(trainer), rel=1e-6)


def test_m0_that_has_changed_before_training_is_still_the_weak_model(make_trainer, make_model):
    trainer = make_trainer(num_train_epochs=2)
    trainer.model.load_state_dict(make_model(seed=9).state_dict())
    trainer.train()
    expected = make_trainer(num_train_epochs=2, output_dir=trainer.args.output_dir + "2")
    expected.train()
    weak_entropy = expected.curriculum_sampler.weak_entropy
    np.testing.assert_allclose(trainer.curriculum_sampler.weak_entropy, weak_entropy, atol=1e-6)
    trainer = make_trainer(num_train_epochs=2, mixing_lambda=1.0, output_dir=trainer.args.output_dir + "3")
    trainer.model.load_state_dict(make_model(seed=9).state_dict())
    with pytest.raises(ValueError, match=r"it has changed since the trainer was made. Pass a `weak_model`"):
        trainer.train()


@pytest.mark.parametrize("cls", [SFTConfig, TrainingArguments])
def test_arguments_of_sft_scripts_are_accepted(make_model, make_args, tokenizer, dataset, cls):
    options = {"hub_token": "secret", "learning_rate": 1e-4}
    if cls is SFTConfig:
        options["eos_token"] = "<|im_start|>"
    trainer = WMSSTrainer(make_model(), make_args(cls, **options), train_dataset=dataset, processing_class=tokenizer)
    assert isinstance(trainer.args, WMSSConfig)
    assert (trainer.args.mixing_lambda, trainer.args.sft_epochs) == (0.5, 1)
    assert {key: getattr(trainer.args, key) for key in options} == options


@pytest.mark.gpu
def test_no_arguments_name_the_output_after_the_model(make_model, tokenizer, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_model()
    model.config._name_or_path = "someone/tiny"
    trainer = WMSSTrainer(model, train_dataset=dataset, processing_class=tokenizer)
    assert trainer.args.output_dir == "tiny-WMSS"


# Weak-driven steps


def reference_run(model, weak, trainer, order):
    """The weak-driven epochs as a plain PyTorch loop on full float32 logits."""
    args = trainer.args
    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate)  # Adam would magnify rounding
    history = []
    for batch in order:
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in batch])
        labels = inputs.pop("labels")[:, 1:].flatten()
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        with torch.no_grad():
            weak_logits = weak(**inputs).logits[:, :-1].flatten(0, 1)
        mix = args.mixing_lambda * logits + (1 - args.mixing_lambda) * weak_logits
        anchor, mixed = (cross_entropy(z, labels, args.loss_type) for z in (logits, mix))
        loss = args.anchor_weight * anchor + (1 - args.anchor_weight) * mixed
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        history.append(loss.item())
    return history


@pytest.mark.parametrize(("anchor_weight", "loss_type"), [(0.0, "nll"), (0.4, "nll"), (0.0, "dft"), (0.4, "dft")])
@pytest.mark.parametrize("full_logits", [False, True])
def test_weak_driven_epoch_equals_a_plain_loop(make_trainer, make_model, anchor_weight, loss_type, full_logits):
    strong, weak = make_model(seed=1, dropout=0.0), make_model(seed=2, dropout=0.0)
    expected_model, expected_weak = copy.deepcopy(strong), copy.deepcopy(weak)
    trainer = make_trainer(
        strong,
        weak_model=weak,
        sft_epochs=0,
        num_train_epochs=1,
        lr_scheduler_type="constant",
        optim="sgd",
        learning_rate=0.5,
        mixing_lambda=0.4,
        anchor_weight=anchor_weight,
        loss_type=loss_type,
    )
    trainer._full_logits = full_logits
    trainer.train()
    order = list(trainer.curriculum_sampler)
    batches = [order[i : i + 4] for i in range(0, len(order), 4)]
    history = reference_run(expected_model, expected_weak, trainer, batches)
    np.testing.assert_allclose(losses(trainer), history, rtol=1e-5)
    for parameter, expected in zip(trainer.model.parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)
    assert_same_weights(weak, expected_weak)


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 64}])
def test_dft_at_a_lambda_of_1_is_that_of_sft_trainer(make_trainer, make_model, make_args, tokenizer, dataset, options):
    """In phase 1 and, with a schedule that stays at 1, through the mixed loss; batches are accumulated."""
    options = options | {"loss_type": "dft", "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    sft = SFTTrainer(
        make_model(dropout=0.0), make_args(SFTConfig, **options), train_dataset=dataset, processing_class=tokenizer
    )
    sft.train()
    ones = {"lambda_schedule": "linear", "mixing_lambda": 1.0, "final_mixing_lambda": 1.0}
    weak = make_model(seed=3, dropout=0.0)
    trainer = make_trainer(make_model(dropout=0.0), weak_model=weak, curriculum=False, **ones, **options)
    trainer.train()
    assert "mixed_nll" not in trainer.state.log_history[0]
    assert "mixed_nll" in trainer.state.log_history[-2]
    np.testing.assert_allclose(losses(trainer), losses(sft), rtol=1e-6)
    for parameter, expected in zip(trainer.model.parameters(), sft.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weak_driven", [False, True])
def test_loss_of_a_global_batch_does_not_depend_on_its_split(make_trainer, make_model, weak_driven):
    """Examples of unequal length, so a mean of means would differ. SFTTrainer's own loss is held to the same."""
    gradients, logged = [], []
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        trainer = make_trainer(
            make_model(dropout=0.0),
            weak_model=make_model(seed=3, dropout=0.0),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            sft_epochs=0 if weak_driven else 1,
            curriculum=False,
            num_train_epochs=1,
            max_steps=1,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            optim="sgd",
            learning_rate=1.0,
        )
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        logged.append(losses(trainer)[0])
        gradients.append({name: before[name] - value for name, value in trainer.model.state_dict().items()})
    assert ("mixed_nll" in trainer.state.log_history[0]) == weak_driven
    np.testing.assert_allclose(logged, logged[0], rtol=1e-6)
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


def test_weak_model_is_the_model_as_handed_in_and_stays_untouched(make_trainer, make_model):
    start = make_model()
    trainer = make_trainer(make_model())
    trainer.train()
    weak = trainer.weak_reference.model
    assert_same_weights(weak, start)
    assert not any(parameter.requires_grad for parameter in weak.parameters())
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in weak.parameters()}
    inputs = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():  # the copy runs its own weights, not those of the model it was copied from
        torch.testing.assert_close(weak(inputs).logits, start.eval()(inputs).logits)
        assert not torch.allclose(weak(inputs).logits, trainer.model.eval()(inputs).logits)


def test_logged_metrics_equal_an_independent_computation(make_trainer, make_model):
    strong, weak = make_model(seed=1, dropout=0.0), make_model(seed=2, dropout=0.0)
    with torch.no_grad():
        for model in (strong, weak):
            for parameter in model.parameters():
                parameter.mul_(3)
    start = copy.deepcopy(strong)
    trainer = make_trainer(strong, weak_model=weak, sft_epochs=0, num_train_epochs=1, mixing_lambda=0.3, max_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]
    sampler = trainer.curriculum_sampler
    batch = trainer.data_collator([trainer.train_dataset[i] for i in list(sampler)[:4]])
    labels = batch.pop("labels")[:, 1:]
    valid = labels != -100
    with torch.no_grad():
        z_strong, z_weak = (model.eval()(**batch).logits[:, :-1][valid].double() for model in (start, weak))
    y = labels[valid]
    rows = torch.arange(len(y))
    distributions = {
        "": torch.distributions.Categorical(logits=z_strong),
        "weak_": torch.distributions.Categorical(logits=z_weak),
        "mixed_": torch.distributions.Categorical(logits=0.3 * z_strong + 0.7 * z_weak),
    }
    strong_p, mixed_p = (distributions[key].probs[rows, y] for key in ("", "mixed_"))
    expected = {f"{key}entropy": d.entropy().mean().item() for key, d in distributions.items()}
    expected |= {
        "loss": -mixed_p.log().mean().item(),
        "mixed_nll": -mixed_p.log().mean().item(),
        "strong_nll": -strong_p.log().mean().item(),
        "mean_token_accuracy": (z_strong.argmax(-1) == y).double().mean().item(),
        "wrong_mass": (1 - strong_p).mean().item(),
        "mixed_wrong_mass": (1 - mixed_p).mean().item(),
        "amplification": ((1 - mixed_p).mean() / (1 - strong_p).mean()).item(),
        "mixing_lambda": 0.3,
        "num_tokens": batch["attention_mask"].sum().item(),
        "curriculum/active_examples": round(0.63 * 37),
        "curriculum/delta_entropy": (sampler.strong_entropy - sampler.weak_entropy).mean(),
    }
    for key, value in expected.items():
        assert entry[key] == pytest.approx(value, rel=1e-5), key


def test_amplification_is_the_ratio_of_the_means_of_a_logging_window(make_trainer, make_model):
    """A constructed batch that the strong model knows by heart would rule a mean of ratios."""
    trainer = make_trainer(weak_model=make_model(seed=2), sft_epochs=0, num_train_epochs=1, logging_steps=3)
    windows, window, record = [], [], trainer._record

    def spy(mixed, mixing_lambda, inputs):
        if len(window) == 1:
            mixed.strong_log_probs = torch.full_like(mixed.strong_log_probs, -1e-30)
        record(mixed, mixing_lambda, inputs)
        masses = [(-torch.expm1(p.double())).mean() for p in (mixed.strong_log_probs, mixed.mixed_log_probs)]
        window.append(torch.stack(masses))
        if len(window) == 3:
            windows.append(torch.stack(window).mean(0).tolist())
            window.clear()

    trainer._record = spy
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "mixed_nll" in entry]
    assert len(entries) == len(windows) == 2
    for entry, (wrong_mass, mixed_wrong_mass) in zip(entries, windows, strict=True):
        assert entry["amplification"] == pytest.approx(entry["mixed_wrong_mass"] / entry["wrong_mass"], rel=1e-12)
        assert entry["amplification"] == pytest.approx(mixed_wrong_mass / wrong_mass, rel=1e-5)


def test_amplification_is_left_out_of_a_window_without_wrong_mass(make_trainer):
    trainer = make_trainer(sft_epochs=0, num_train_epochs=1, logging_steps=3)
    record, steps = trainer._record, []

    def spy(mixed, mixing_lambda, inputs):
        if len(steps) < 3:
            mixed.strong_log_probs = torch.zeros_like(mixed.strong_log_probs)
        steps.append(None)
        record(mixed, mixing_lambda, inputs)

    trainer._record = spy
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "mixed_nll" in entry]
    assert first["wrong_mass"] == 0
    assert "amplification" not in first
    assert "amplification" in second


def test_evaluation_uses_the_strong_model_alone(make_trainer, sft_run, dataset, make_model, make_args, tokenizer):
    trainer = make_trainer(num_train_epochs=2)
    trainer.train()
    sft = SFTTrainer(
        copy.deepcopy(trainer.model), make_args(SFTConfig), train_dataset=dataset, processing_class=tokenizer
    )
    ours, theirs = (t.evaluate(dataset.select(range(10))) for t in (trainer, sft))
    for key in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert ours[key] == theirs[key]


# Length and resume of the run


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"num_train_epochs": 3}, 10 + 6 + 6),  # 23 of 37 examples, in batches of 4
        ({"num_train_epochs": 3, "gradient_accumulation_steps": 4}, 3 + 2 + 2),
        ({"num_train_epochs": 3, "dataloader_drop_last": True}, 9 + 5 + 5),
        ({"num_train_epochs": 2.5}, 10 + 6 + 3),
        ({"num_train_epochs": 3, "active_fraction": 1.0}, 30),
        ({"num_train_epochs": 3, "curriculum": False}, 30),
        ({"max_steps": 13}, 13),
        ({"num_train_epochs": 2, "sft_epochs": 0}, 12),
    ],
)
def test_the_schedule_ends_on_the_last_step(make_trainer, options, steps):
    trainer = make_trainer(**{"lr_scheduler_type": "linear", **options})
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == steps
    assert trainer.lr_scheduler.get_last_lr()[0] == 0
    if "max_steps" not in options:
        assert trainer.state.epoch == pytest.approx(trainer.args.num_train_epochs)


class VisitedExamples(TrainerCallback):
    """Pairs what each epoch's batches held with the sampler's active set of that epoch."""

    def __init__(self):
        self.batches, self.epochs = [], []

    def watch(self, trainer):
        self.trainer, collate = trainer, trainer.data_collator
        trainer.data_collator = lambda examples: self.batches.append(examples) or collate(examples)
        trainer.add_callback(self)

    def on_epoch_end(self, args, state, control, **kwargs):
        visited = [example["input_ids"] for batch in self.batches for example in batch]
        self.epochs.append((self.trainer.curriculum_sampler.indices, visited))

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.batches.clear()  # added after the sampler's callback, so this drops the batches of the scoring


def test_each_weak_driven_epoch_visits_its_active_set_once(make_trainer):
    trainer, visits = make_trainer(num_train_epochs=3), VisitedExamples()
    visits.watch(trainer)
    trainer.train()
    (phase_1, first), (active_2, second), (active_3, third) = visits.epochs
    assert phase_1 is None
    assert sorted(first) == sorted(trainer.train_dataset["input_ids"])
    assert second == [trainer.train_dataset[int(i)]["input_ids"] for i in active_2]
    assert third == [trainer.train_dataset[int(i)]["input_ids"] for i in active_3]
    assert set(active_2) != set(active_3)


@pytest.mark.parametrize("every_step", [False, pytest.param(True, marks=pytest.mark.ci)])
@pytest.mark.parametrize(
    ("changes", "total"),
    [
        ({}, 22),
        ({"gradient_accumulation_steps": 2}, 11),
        ({"train_sampling_strategy": "group_by_length", "rescore_epochs": 2}, 22),
        ({"mixing_lambda": 1.0, "dataloader_drop_last": True}, 19),
        ({"packing": True, "max_length": 40, "per_device_train_batch_size": 2}, 21),  # 18 rows, 11 active
    ],
)
def test_a_run_stopped_after_any_step_and_resumed_ends_the_same(make_trainer, changes, total, every_step, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path / "whole"), **changes}
    whole = make_trainer(**options)
    whole.train()
    assert whole.state.global_step == total
    # Otherwise a step of phase 1, its last one, the first weak-driven one, and one in the last epoch
    boundaries = (total // 5, total * 10 // 22, total * 10 // 22 + 1, total - 3)
    for step in range(1, total) if every_step else boundaries:
        resumed = make_trainer(**options | {"output_dir": str(tmp_path / "resumed"), "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.state.global_step == total
        assert losses(resumed) == losses(whole), step
        assert_same_weights(resumed.model, whole.model)


@pytest.mark.parametrize("step", [5, 10, 12])  # in phase 1, at its end and later
def test_resume_with_other_data_or_options_is_refused_with_the_list(make_trainer, tmp_path, step):
    make_trainer(save_strategy="steps", save_steps=1, max_steps=12).train()
    checkpoint = str(tmp_path / "run" / f"checkpoint-{step}")
    other_data = Dataset.from_list(sums(37, seed=1))
    for options, message in (
        ({"consolidation_weight": 0.5}, r"`consolidation_weight`: 0.8 in the checkpoint, 0.5 now"),
        ({"active_fraction": 0.5, "rescore_epochs": 2}, r"`active_fraction`: 0.63 .*`rescore_epochs`: 1 in"),
        ({"train_sampling_strategy": "sequential", "mixing_lambda": 0.4}, r"`mixing_lambda`: .*`train_sampling_str"),
        ({"train_dataset": other_data}, r"`train_dataset`: '\w+' in the checkpoint, '\w+' now"),
        ({"curriculum": False}, r"`curriculum`: True in the checkpoint, False now"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(**options).train(resume_from_checkpoint=checkpoint)


def test_any_run_may_go_on_from_phase_1_once_the_state_of_the_other_is_deleted(make_trainer, tmp_path):
    options = {"save_strategy": "epoch"}
    make_trainer(**options).train()
    checkpoint = tmp_path / "run" / "checkpoint-10"
    for name in ("wmss_state.json", "curriculum.npz"):
        (checkpoint / name).unlink()
    resumed = make_trainer(consolidation_weight=0.5, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    whole = make_trainer(consolidation_weight=0.5, output_dir=str(tmp_path / "whole"))
    whole.train()
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6)


@pytest.mark.parametrize("curriculum", [False, True])
def test_resuming_with_the_checkpoint_as_m0_is_noticed(make_trainer, tmp_path, curriculum):
    options = {"curriculum": curriculum, "num_train_epochs": 2}
    make_trainer(save_strategy="steps", save_steps=4, **options).train()
    for step in (4, 12):
        checkpoint = str(tmp_path / "run" / f"checkpoint-{step}")
        with pytest.raises(ValueError, match=r"`weak_model`: .* pass as `model` what it started from \(M0\)"):
            make_trainer(build_like(checkpoint), **options).train(resume_from_checkpoint=checkpoint)


def build_like(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint)


def test_interrupted_training_keeps_what_was_saved(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[StopAt(12)], save_strategy="steps", save_steps=12)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-12"
    with np.load(checkpoint / "curriculum.npz") as saved:
        assert int(saved["epoch"]) == 1
        assert sorted(saved["indices"]) == sorted(trainer.curriculum_sampler)


# Saving


def test_saved_model_is_the_strong_model_alone(make_trainer, tmp_path):
    trainer = make_trainer(num_train_epochs=2, save_strategy="epoch")
    trainer.train()
    trainer.save_model()
    inputs = torch.tensor([[5, 6, 7, 8]])
    expected = trainer.model.eval()(inputs).logits
    names = {name for name, _ in trainer.model.named_parameters()}
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-16"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(loaded(inputs).logits, expected, rtol=0, atol=0)
        assert set(load_file(folder / "model.safetensors")) <= names
        assert list(folder.glob("*.safetensors")) == [folder / "model.safetensors"]
        assert not [path for path in folder.rglob("*") if "weak" in path.name]


def test_model_card(make_trainer, make_model, tmp_path, tokenizer):
    make_model().save_pretrained(tmp_path / "local-base")
    tokenizer.save_pretrained(tmp_path / "local-base")
    trainer = make_trainer(str(tmp_path / "local-base"))
    trainer.create_model_card(model_name="my-model")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "None" not in card
    assert "local-base" in card
    assert str(tmp_path) not in card
    assert "- wmss" in card
    assert "https://huggingface.co/papers/2602.08222" in card
    assert "@article{chen2026weakdriven" in card


# Weak models


def test_weak_model_from_a_path_object_or_config_are_the_same(make_trainer, make_model, tmp_path, tokenizer):
    weak = make_model(seed=7)
    weak.save_pretrained(tmp_path / "weak")
    tokenizer.save_pretrained(tmp_path / "weak")
    path = str(tmp_path / "weak")
    runs = []
    for options in ({"weak_model": path}, {"weak_model_name_or_path": path}, {"weak_model": weak}):
        trainer = make_trainer(num_train_epochs=2, **options)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1] == runs[2]
    assert runs[0][10:] != losses_of_default(make_trainer)[10:]


def losses_of_default(make_trainer):
    trainer = make_trainer(num_train_epochs=2)
    trainer.train()
    return losses(trainer)


def test_adapter_folder_is_a_weak_model_with_its_base(make_trainer, make_model, tmp_path, tokenizer):
    from peft import LoraConfig, PeftModel

    base = tmp_path / "base"
    make_model().save_pretrained(base)
    tokenizer.save_pretrained(base)
    earlier = make_trainer(str(base), peft_config=LoraConfig(r=4), num_train_epochs=2)
    earlier.train()
    earlier.save_model(str(tmp_path / "adapter"))
    expected = PeftModel.from_pretrained(make_model(), tmp_path / "adapter").eval()
    trainer = make_trainer(str(base), weak_model=str(tmp_path / "adapter"), num_train_epochs=2)
    trainer.train()
    inputs = torch.tensor([[5, 6, 7, 8]])
    with trainer.weak_reference.activated() as weak:
        torch.testing.assert_close(weak(inputs).logits, expected(inputs).logits)
        assert not torch.allclose(weak(inputs).logits, make_model().eval()(inputs).logits)


@pytest.mark.parametrize(("lora", "option"), [(False, checkpointing_option()), (True, "gradient_checkpointing")])
def test_activation_checkpointing_changes_nothing(make_trainer, lora, option):
    from peft import LoraConfig

    runs = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            peft_config=LoraConfig(r=4, lora_dropout=0.1) if lora else None,
            num_train_epochs=2,
            **{option: checkpointing},
        )
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == checkpointing
        runs.append(losses(trainer))
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-5)


def test_bf16_autocast_covers_both_models(make_trainer, make_model):
    runs = []
    for bf16 in (False, True):
        trainer = make_trainer(make_model(dropout=0.0), bf16=bf16, num_train_epochs=2, active_fraction=1.0)
        trainer.train()
        runs.append(losses(trainer))
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-2)
    assert runs[1] != runs[0]
    dtypes = set()
    options = {"weak_model": make_model(seed=3), "sft_epochs": 0, "mixing_lambda": 1.0, "num_train_epochs": 1}
    trainer = make_trainer(bf16=True, **options)
    layer = trainer.weak_reference.model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    trainer.train()  # at lambda = 1 only the scoring runs the weak model
    assert dtypes == {torch.bfloat16}


def test_mixture_of_experts_keeps_its_auxiliary_loss(make_args, tokenizer, dataset):
    """A weak model of equal weights leaves the strong logits as they are, so the loss is SFT's, auxiliary part too."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            output_router_logits=True,
            router_aux_loss_coef=0.5,
        )
    )
    options = {"max_steps": 1, "gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"}
    entries = []
    for cls, extra in ((SFTTrainer, {"cls": SFTConfig}), (WMSSTrainer, {"sft_epochs": 0, "curriculum": False})):
        trainer = cls(
            copy.deepcopy(model), make_args(**options, **extra), train_dataset=dataset, processing_class=tokenizer
        )
        trainer.train()
        entries.append(trainer.state.log_history[0])
    assert entries[0]["aux_loss"] > 0.1
    for key in ("loss", "aux_loss", "entropy"):
        assert entries[1][key] == pytest.approx(entries[0][key], rel=1e-5), key


def test_sequences_without_padding(make_trainer, make_model):
    """Padding-free batches hold the same loss as padded ones."""
    options = {"num_train_epochs": 2, "max_length": None, "sft_epochs": 0}
    runs = []
    for padding_free in (False, True):
        trainer = make_trainer(make_model(dropout=0.0), padding_free=padding_free, **options)
        trainer.train()
        runs.append(losses(trainer))
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-4)


def test_data_loader_workers_follow_the_curriculum(make_trainer, make_model):
    runs = []
    for options in ({}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}):
        trainer = make_trainer(
            make_model(dropout=0.0), **options
        )  # the loaders draw from the random state differently
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]


# Bad input


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"train_weak": True},
        {"weak_refresh": "epoch"},
        {"weak_cache": "hidden"},
        {"lambda_schedule": "crossover"},
        {"peft_config": LoraConfig(r=4)},
        {"peft_config": LoraConfig(r=4), "train_weak": True, "gradient_checkpointing": True},
    ],
)
def test_a_trainer_is_freed_without_the_garbage_collector(make_trainer, options):
    """As SFTTrainer is. Otherwise its data loaders wait 5 seconds for each of their workers."""
    trainer = make_trainer(num_train_epochs=2, **options)
    trainer.train()
    freed = weakref.ref(trainer), weakref.ref(trainer._active_dataloader)
    gc.disable()
    try:
        del trainer
        assert [reference() for reference in freed] == [None, None]
    finally:
        gc.enable()


def test_two_weak_models_are_refused(make_trainer, make_model):
    with pytest.raises(ValueError, match="Both `weak_model` and `weak_model_name_or_path='somewhere'`"):
        make_trainer(weak_model=make_model(seed=1), weak_model_name_or_path="somewhere")


def test_keyword_arguments_for_a_weak_model_that_is_not_loaded_are_refused(make_trainer):
    with pytest.raises(ValueError, match=r"`weak_model_init_kwargs=.*dtype.*Set `weak_model_name_or_path`"):
        make_trainer(weak_model_init_kwargs={"dtype": "bfloat16"})


def test_weak_model_must_be_another_object(make_trainer, make_model):
    model = make_model()
    with pytest.raises(ValueError, match="same object"):
        make_trainer(model, weak_model=model)


def test_weak_model_must_not_share_parameters(make_trainer, make_model):
    model, weak = make_model(), make_model(seed=1)
    weak.model.norm.weight = model.model.norm.weight
    with pytest.raises(ValueError, match="shares parameters"):
        make_trainer(model, weak_model=weak)


def test_weak_model_must_have_the_same_vocabulary_size(make_trainer, make_model):
    weak = make_model()
    weak.resize_token_embeddings(weak.config.vocab_size + 5)
    with pytest.raises(ValueError, match=r"`weak_model` has a vocabulary of 266 tokens and the model one of 261"):
        make_trainer(weak_model=weak)


def test_weak_model_must_have_the_same_tokenizer(make_trainer, make_model, tokenizer, tmp_path):
    other = build_tokenizer(["ab ab"] * 5, vocab_size=len(tokenizer))
    make_model().save_pretrained(tmp_path / "weak")
    other.save_pretrained(tmp_path / "weak")
    assert AutoTokenizer.from_pretrained(tmp_path / "weak").get_vocab() == other.get_vocab() != tokenizer.get_vocab()
    for weak_model in (str(tmp_path / "weak"), AutoModelForCausalLM.from_pretrained(tmp_path / "weak")):
        with pytest.raises(ValueError, match=r"another tokenizer: \d+ token ids mean something else"):
            make_trainer(weak_model=weak_model)


def test_streaming_data_is_refused_with_the_curriculum(make_trainer, dataset):
    with pytest.raises(ValueError, match=r"streaming.*`curriculum=True`"):
        make_trainer(train_dataset=dataset.to_iterable_dataset(), max_steps=5)


def test_streaming_data_without_curriculum_or_phase_1(make_trainer, dataset):
    trainer = make_trainer(
        train_dataset=dataset.to_iterable_dataset(), max_steps=3, curriculum=False, sft_epochs=0, num_train_epochs=1
    )
    trainer.train()
    assert all("mixed_nll" in entry for entry in trainer.state.log_history[:3])


def test_examples_that_truncation_leaves_empty_are_dropped_and_scores_stay_aligned(make_trainer):
    examples = sums(37)
    examples[3]["prompt"] = examples[20]["prompt"] = "1 + " * 30 + "1 ="
    trainer = make_trainer(train_dataset=Dataset.from_list(examples), max_length=40, num_train_epochs=2)
    assert len(trainer.train_dataset) == 35
    trainer.train()
    sampler = trainer.curriculum_sampler
    assert len(sampler.weak_entropy) == 35
    model = trainer.weak_reference.model
    for i in (0, 3, 20, 34):
        ids, labels = (torch.tensor([trainer.train_dataset[i][key]]) for key in ("input_ids", "labels"))
        with torch.no_grad():
            entropy = torch.distributions.Categorical(logits=model(ids).logits[0, :-1]).entropy()
        assert sampler.weak_entropy[i] == pytest.approx(entropy[labels[0, 1:] != -100].mean().item(), abs=1e-5)


def test_examples_without_supervised_tokens_are_named(make_trainer):
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]} for _ in range(10)]
    rows[4]["labels"] = [5, -100, -100]  # only the first token, which no position predicts
    with pytest.raises(ValueError, match=r"1 examples without a supervised token.*\[4\]"):
        make_trainer(train_dataset=Dataset.from_list(rows))


@pytest.mark.parametrize("options", [{}, {"curriculum": False}, {"packing": True, "per_device_train_batch_size": 1}])
def test_a_max_length_that_cuts_every_completion_off_is_named(make_trainer, options):
    with pytest.raises(ValueError, match=r"`max_length=4` leaves none of the 37 examples .* Raise `max_length`"):
        make_trainer(max_length=4, **options)


def test_what_max_length_has_cut_off_is_said_with_a_small_active_set(make_trainer):
    examples = sums(37)
    for example in examples[3:]:
        example["prompt"] = "1 + " * 30 + "1 ="
    with pytest.raises(ValueError, match=r"of 3 examples.*34 of the 37 examples .* `max_length=40`"):
        make_trainer(train_dataset=Dataset.from_list(examples), max_length=40, dataloader_drop_last=True)


def test_an_active_set_of_which_drop_last_leaves_nothing_is_refused(make_trainer, dataset):
    with pytest.raises(ValueError, match=r"3 examples, less than one batch of 4.*`dataloader_drop_last=True` leaves"):
        make_trainer(train_dataset=dataset.select(range(5)), dataloader_drop_last=True)
    make_trainer(train_dataset=dataset.select(range(6)), dataloader_drop_last=True)  # 4 examples


def test_data_smaller_than_a_batch_goes_through_all_phases(make_trainer, make_model, dataset):
    """Five rows in batches of eight: a step of SFT on all, then weak-driven ones on the three of each draw."""
    weak = make_model(seed=2, dropout=0.0)
    options = {"per_device_train_batch_size": 8, "lr_scheduler_type": "constant", "optim": "sgd", "learning_rate": 0.5}
    steps = WeightsAt(1)
    trainer = make_trainer(
        make_model(dropout=0.0), dataset.select(range(5)), weak_model=weak, callbacks=[steps], **options
    )
    draws, redraw = [], trainer.curriculum_sampler.redraw
    trainer.curriculum_sampler.redraw = lambda epoch: (redraw(epoch), draws.append(list(trainer.curriculum_sampler)))
    trainer.train()
    assert [len(draw) for draw in draws] == [3, 3]
    assert trainer.state.global_step == trainer.state.max_steps == 3
    assert ["mixed_nll" in entry for entry in trainer.state.log_history[:3]] == [False, True, True]
    expected = make_model(dropout=0.0)
    expected.load_state_dict(steps.models[1])
    np.testing.assert_allclose(losses(trainer)[1:], reference_run(expected, weak, trainer, draws), rtol=1e-5)
    for parameter, value in zip(trainer.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, value, rtol=1e-5, atol=1e-6)
    sft = make_trainer(
        make_model(dropout=0.0), dataset.select(range(5)), mixing_lambda=1.0, curriculum=False, max_steps=1, **options
    )
    sft.train()
    assert losses(trainer)[0] == losses(sft)[0]


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({}, 3),
        ({"gradient_accumulation_steps": 4}, 3),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}, 3),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, 3 + 2 + 2),
        ({"train_sampling_strategy": "group_by_length"}, 3),
        ({"packing": True, "max_length": 200}, 3),  # one row
        ({"max_steps": 4}, 4),
        ({"active_fraction": 0.1, "lambda_schedule": "crossover"}, 3),
        ({"weak_refresh": "epoch"}, 3),
    ],
)
def test_runs_on_data_smaller_than_a_batch_resume_exactly(make_trainer, dataset, options, total, tmp_path):
    options = {"per_device_train_batch_size": 8, "train_dataset": dataset.select(range(5)), **options}
    whole = make_trainer(**options, save_strategy="steps", save_steps=1, output_dir=str(tmp_path / "whole"))
    whole.train()
    assert whole.state.global_step == whole.state.max_steps == total
    for step in range(1, total):
        resumed = make_trainer(**options, output_dir=str(tmp_path / "resumed"))
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert losses(resumed) == losses(whole), step
        assert_same_weights(resumed.model, whole.model)


def test_entropy_that_is_not_a_number_stops_with_the_indices(make_trainer, make_model):
    weak = make_model(seed=1)
    weak.model.norm.weight.data.fill_(float("nan"))
    trainer = make_trainer(weak_model=weak, sft_epochs=0)
    with pytest.raises(ValueError, match=r"weak model.*examples 0 \(nan\)"):
        trainer.train()


def test_prompt_learning_is_refused(make_trainer):
    from peft import PromptTuningConfig

    with pytest.raises(ValueError, match="PROMPT_TUNING adds virtual tokens"):
        make_trainer(peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def test_loss_functions_are_refused(make_model, make_args, tokenizer, dataset):
    with pytest.raises(ValueError, match="`compute_loss_func`"):
        WMSSTrainer(
            make_model(),
            make_args(),
            train_dataset=dataset,
            processing_class=tokenizer,
            compute_loss_func=lambda *args, **kwargs: 0,
        )


# What the trainer relies on in TRL and transformers (what is private there: test_compatibility.py)


def test_signature_is_sft_trainers_plus_weak_model():
    ours, theirs = (list(inspect.signature(cls.__init__).parameters) for cls in (WMSSTrainer, SFTTrainer))
    assert ours == [*theirs, "weak_model"]


def test_log_history_survives_json(make_trainer, tmp_path):
    make_trainer(save_strategy="epoch").train()
    state = json.loads(Path(tmp_path / "run" / "checkpoint-22" / "trainer_state.json").read_text())
    assert any("curriculum/delta_entropy" in entry for entry in state["log_history"])
