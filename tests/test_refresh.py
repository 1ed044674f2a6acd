"""Rounds: the weak model of each weak-driven epoch is the strong one of the epoch before."""

import copy
import itertools

import numpy as np
import pytest
import torch
from conftest import losses
from peft import AutoPeftModelForCausalLM, LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, TrainerCallback

from wmss_trl import WMSSTrainer, score_entropy
from wmss_trl.weak_model.adapters import NamedAdapter

LORA = LoraConfig(r=4, lora_dropout=0.1)
INPUTS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def make_trainer(make_model, make_args, tokenizer, dataset):
    def make(model=None, peft_config=None, weak_model=None, callbacks=None, **kwargs):
        options = {"sft_epochs": 1, "num_train_epochs": 4, "weak_refresh": "epoch", "learning_rate": 1e-2}
        return WMSSTrainer(
            make_model() if model is None else model,
            make_args(**{**options, **kwargs}),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=copy.deepcopy(peft_config),
            weak_model=weak_model,
            callbacks=callbacks,
        )

    return make


@torch.no_grad()
def logits(model):
    training = model.training
    try:
        return model.eval()(INPUTS).logits
    finally:
        model.train(training)


class Rounds(TrainerCallback):
    """Logits of both models at the start of each epoch's training."""

    def __init__(self):
        self.weak, self.strong = [], []

    def watch(self, trainer):
        self.trainer = trainer
        trainer.add_callback(self)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.strong.append(logits(self.trainer.model))
        with self.trainer.weak_reference.activated() as weak:
            self.weak.append(weak(INPUTS).logits)


@pytest.mark.parametrize("curriculum", [True, False])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("device", ["cpu", "same", "disk"])
def test_round_t_mixes_with_the_strong_model_of_the_start_of_round_t_minus_1(make_trainer, lora, device, curriculum):
    trainer = make_trainer(peft_config=LORA if lora else None, weak_refresh_device=device, curriculum=curriculum)
    m0, rounds = logits(trainer.model), Rounds()
    rounds.watch(trainer)
    trainer.train()
    assert isinstance(trainer.weak_reference, NamedAdapter) == lora
    _, m1, m2, _ = rounds.strong
    assert not torch.allclose(m1, m2, atol=1e-3)
    for weak, expected in zip(rounds.weak, (m0, m0, m1, m2), strict=True):
        torch.testing.assert_close(weak, expected)


@pytest.mark.parametrize("rescore_epochs", [1, 2])
@pytest.mark.parametrize("lora", [False, True])
def test_weak_entropies_are_those_of_the_refreshed_model(make_trainer, lora, rescore_epochs):
    trainer = make_trainer(peft_config=LORA if lora else None, rescore_epochs=rescore_epochs, num_train_epochs=4)
    sampler, rounds = trainer.curriculum_sampler, []
    score = sampler.score

    def keep():
        weak_entropy, strong_entropy = score()
        cache = trainer._selection.score_cache
        with trainer.weak_reference.activated() as weak:
            expected = score_entropy(weak, cache.dataset, cache.data_collator, disable_tqdm=True)
        rounds.append((sampler.epoch, weak_entropy, expected))
        return weak_entropy, strong_entropy

    sampler.score = keep
    trainer.train()
    assert [epoch for epoch, _, _ in rounds] == ([1, 2, 3] if rescore_epochs == 1 else [1, 3])
    for _, weak_entropy, expected in rounds:
        np.testing.assert_allclose(weak_entropy, expected, atol=1e-6)
    assert np.abs(rounds[0][1] - rounds[-1][1]).max() > 1e-4


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_resumed_run_ends_the_same(make_trainer, lora, device, tmp_path):
    def make(**options):
        torch.manual_seed(0)
        return make_trainer(peft_config=LORA if lora else None, weak_refresh_device=device, **options)

    whole = make(save_strategy="steps", save_steps=1, output_dir=str(tmp_path / "whole"))
    whole.train()
    assert len(losses(whole)) == 28
    for step in (10, 12, 16, 25):  # the end of phase 1 and of the first round, and within rounds
        resumed = make(output_dir=str(tmp_path / f"resumed-{step}"))
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert losses(resumed) == losses(whole), step
        assert torch.equal(logits(resumed.model), logits(whole.model))


class Clones(TorchDispatchMode):
    """Counts the elements that are copied to where they are, which on a GPU takes its memory."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.clone.default:
            self.elements += args[0].numel()
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("device", ["cpu", "disk", "same"])
def test_a_round_is_not_copied_on_the_device_first(make_trainer, device, tmp_path):
    trainer = make_trainer(weak_refresh_device=device)
    refresh = trainer._refresh
    state = dict(trainer.model.named_parameters(remove_duplicate=False)) | dict(trainer.model.named_buffers())
    with Clones() as clones:
        refresh.start_round(1)
        refresh.start_round(2)
        refresh.save(tmp_path)
        refresh.load(tmp_path)
    assert clones.elements == (2 * sum(tensor.numel() for tensor in state.values()) if device == "same" else 0)


@pytest.mark.parametrize("lora", [False, True])
def test_saved_model_is_the_strong_one(make_trainer, make_model, tokenizer, lora, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = make_trainer(str(tmp_path / "base"), LORA if lora else None, save_strategy="epoch")
    trainer.train()
    trainer.save_model()
    loader = AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-28"):
        torch.testing.assert_close(logits(loader.from_pretrained(folder)), logits(trainer.model))


def test_selection_alone_keeps_no_second_model(make_trainer):
    trainer = make_trainer(mixing_lambda=1.0, save_strategy="epoch")
    assert not hasattr(trainer.weak_reference, "model")
    entropies = []
    sampler, score = trainer.curriculum_sampler, trainer.curriculum_sampler.score
    sampler.score = lambda: entropies.append(score()) or entropies[-1]
    trainer.train()
    for (_, strong_before), (weak, _) in itertools.pairwise(entropies):
        np.testing.assert_array_equal(weak, strong_before)
    resumed = make_trainer(mixing_lambda=1.0, output_dir=trainer.args.output_dir + "-resumed")
    resumed.train(resume_from_checkpoint=trainer.args.output_dir + "/checkpoint-16")
    assert losses(resumed) == losses(trainer)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weak_refresh": "step"}, r"`weak_refresh` must be 'never' or 'epoch', got 'step'"),
        ({"weak_refresh_device": "tape"}, r"`weak_refresh_device` must be .* got 'tape'"),
        ({"weak_refresh": "never", "weak_refresh_device": "disk"}, r"`weak_refresh_device='disk'` is for"),
        ({"train_weak": True}, r"`weak_refresh='epoch'` cannot be combined with `train_weak=True`"),
        ({"mixing_lambda": 1.0, "rescore_epochs": 2}, r"`rescore_epochs=2` would need .* Set `rescore_epochs=1`"),
    ],
)
def test_bad_options_are_refused(make_args, options, message):
    with pytest.raises(ValueError, match=message):
        make_args(**{"weak_refresh": "epoch", **options})


def test_weak_model_of_another_architecture_is_refused(make_trainer, tokenizer):
    from wmss_trl.data.tiny import build_model

    weak = build_model(tokenizer, hidden_size=16, intermediate_size=32, num_layers=1)
    with pytest.raises(ValueError, match=r"`weak_refresh='epoch'` .* of `weak_model` have other names or shapes"):
        make_trainer(weak_model=weak)


def test_training_again_without_the_first_weak_model_is_refused(make_trainer):
    trainer = make_trainer()
    trainer.train()
    with pytest.raises(ValueError, match="no longer the one that the trainer began with"):
        trainer.train()
