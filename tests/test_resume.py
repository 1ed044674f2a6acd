"""Runs that go on from a checkpoint: with their batches split otherwise, from plain SFT, after a kill."""

import copy
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import losses, sums
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from wmss_trl import WMSSTrainer
from wmss_trl.loop.checkpoints import problems_of
from wmss_trl.loop.epoch_plan import EpochPlan
from wmss_trl.loop.run_state import check_same_order, check_same_steps


def assert_ends_the_same(trainer, whole):
    assert trainer.state.global_step == trainer.state.max_steps == whole.state.max_steps
    np.testing.assert_allclose(losses(trainer), losses(whole), rtol=1e-5)
    for (name, parameter), expected in zip(trainer.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-6, msg=name)


@pytest.fixture
def make_trainer(make_model, make_args, tokenizer, dataset, tmp_path):
    """Without dropout, whose masks depend on how a step is split into batches; SGD, since Adam turns a rounding
    difference of a gradient near 0 into a whole step."""

    def make(folder="run", train_dataset=None, weak_model=None, **options):
        return WMSSTrainer(
            make_model(dropout=0.0),
            make_args(**{"optim": "sgd", "learning_rate": 0.1, "output_dir": str(tmp_path / folder), **options}),
            train_dataset=dataset if train_dataset is None else train_dataset,
            processing_class=tokenizer,
            weak_model=weak_model,
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


@pytest.mark.parametrize("batch_size", [4, 8])
def test_a_checkpoint_of_plain_sft_with_other_batches_goes_on_with_a_warning(
    make_trainer, make_model, make_args, tokenizer, dataset, tmp_path, batch_size
):
    """Its 5 steps are half an epoch here, where SFTTrainer would go on too."""
    options = {"optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": batch_size, "max_steps": 5}
    args = make_args(SFTConfig, **options, save_strategy="steps", save_steps=5, output_dir=str(tmp_path / "sft"))
    SFTTrainer(make_model(dropout=0.0), args, train_dataset=dataset, processing_class=tokenizer).train()
    trainer = make_trainer()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=str(tmp_path / "sft" / "checkpoint-5"))
    messages = [str(warning.message) for warning in caught if "plain SFT" in str(warning.message)]
    assert len(messages) == (batch_size == 8)
    assert all("at epoch 1.00. With the batches of this run, its 5 steps are 0.50 epochs" in text for text in messages)
    assert trainer.state.global_step == 22
    assert trainer.curriculum_sampler.epoch == trainer.curriculum_sampler.drawn_epoch == 2


# Files of a checkpoint


def test_a_streaming_run_goes_on(make_trainer, make_model, dataset):
    """It has no length that an epoch could be told by."""
    options = {"train_dataset": dataset.to_iterable_dataset(), "curriculum": False, "sft_epochs": 0, "max_steps": 6}
    options |= {"weak_model": make_model(seed=1, dropout=0.0), "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(**options)
    whole.train()
    resumed = make_trainer("resumed", **options)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    assert_ends_the_same(resumed, whole)


@pytest.fixture
def saved_run(make_trainer):
    """A run of 22 steps and its folder: saved after steps 5, 10, 15, 20 and 22."""

    def save(**options):
        trainer = make_trainer(save_strategy="steps", save_steps=5, **options)
        trainer.train()
        return trainer, Path(trainer.args.output_dir)

    return save


def edit_state(checkpoint, change):
    path = checkpoint / "wmss_state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))


def make_format_1(state):
    """What the versions before November 2026 wrote, the first of them without `anchor_weight`."""
    for key in ("format", "epochs", "files"):
        del state[key]
    del state["run"]["anchor_weight"]


@pytest.mark.filterwarnings("ignore:.*written by an earlier version of wmss_trl")
def test_a_state_of_format_1_goes_on_with_one_warning(make_trainer, saved_run):
    whole, folder = saved_run()
    for step in (5, 15):
        edit_state(folder / f"checkpoint-{step}", make_format_1)
        resumed = make_trainer("resumed")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        (message,) = [str(warning.message) for warning in caught if "format 1" in str(warning.message)]
        assert message.endswith("taken to be as in this run: `anchor_weight`, the global batch.")
        assert_ends_the_same(resumed, whole)
        other = make_trainer("resumed", per_device_train_batch_size=2)
        with pytest.raises(ValueError, match=rf"step {step} was saved at epoch \d\.\d+, which is another place"):
            other.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    (folder / "checkpoint-15" / "curriculum.npz").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-15: curriculum.npz is missing. Resume from another"):
        make_trainer("resumed").train(resume_from_checkpoint=str(folder / "checkpoint-15"))


def test_a_state_of_a_later_format_is_refused(make_trainer, saved_run):
    _, folder = saved_run(max_steps=5)
    edit_state(folder / "checkpoint-5", lambda state: state.update(format=3))
    for resume in (True, str(folder / "checkpoint-5")):
        with pytest.raises(ValueError, match=r"wmss_state.json has format 3, .* reads formats up to 2"):
            make_trainer().train(resume_from_checkpoint=resume)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_a_checkpoint_that_is_not_whole_is_recognised(saved_run, tmp_path):
    _, folder = saved_run(weak_refresh="epoch", max_steps=20)
    for step in (5, 10, 15, 20):
        assert problems_of(folder / f"checkpoint-{step}") == []
    damages = {
        "trainer_state.json is missing": lambda path: (path / "trainer_state.json").unlink(),
        "trainer_state.json cannot be read": lambda path: truncate(path / "trainer_state.json"),
        "wmss_state.json cannot be read": lambda path: truncate(path / "wmss_state.json"),
        "the weights of the model are missing": lambda path: (path / "model.safetensors").rename(
            path / "weak_model" / "model.safetensors"
        ),
        "model.safetensors is cut off": lambda path: truncate(path / "model.safetensors"),
        "curriculum.npz is missing": lambda path: (path / "curriculum.npz").unlink(),
        "curriculum.npz is cut off": lambda path: truncate(path / "curriculum.npz"),
        "weak_model/refresh.safetensors is missing": lambda path: (path / "weak_model/refresh.safetensors").unlink(),
        "weak_model/refresh.safetensors is cut off": lambda path: truncate(path / "weak_model/refresh.safetensors"),
        "optimizer.pt is missing": lambda path: (path / "optimizer.pt").unlink(),
        "optimizer.pt is cut off": lambda path: truncate(path / "optimizer.pt"),
        "scheduler.pt is missing": lambda path: (path / "scheduler.pt").unlink(),
    }
    for number, (problem, damage) in enumerate(damages.items()):
        broken = shutil.copytree(folder / "checkpoint-20", tmp_path / f"{number}")
        damage(broken)
        assert problems_of(broken) == [problem]


def test_a_model_in_several_files_and_the_forms_of_the_engines_are_recognised(make_model, tmp_path):
    (tmp_path / "trainer_state.json").write_text("{}")
    for name, damage, problem in (
        ("sharded", "model-00002-of-*", "model-00002-of-.* is missing"),
        ("fsdp", "pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/.metadata is missing"),
        ("fsdp_full", "pytorch_model_fsdp.bin", "weights of the model are missing"),
        ("deepspeed", "latest", "`latest` does not name"),
    ):
        checkpoint = tmp_path / name
        if name == "sharded":
            make_model().save_pretrained(checkpoint, max_shard_size="50KB")
        else:
            for file, text in {
                "fsdp": {"pytorch_model_fsdp_0/.metadata": "", "pytorch_model_fsdp_0/__0_0.distcp": ""},
                "fsdp_full": {"pytorch_model_fsdp.bin": ""},
                "deepspeed": {"global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt": "", "latest": "global_step5"},
            }[name].items():
                (checkpoint / file).parent.mkdir(parents=True, exist_ok=True)
                (checkpoint / file).write_text(text)
        shutil.copy(tmp_path / "trainer_state.json", checkpoint)
        assert problems_of(checkpoint) == []
        next(checkpoint.glob(damage)).unlink()
        (found,) = problems_of(checkpoint)
        assert re.search(problem, found)


def test_the_newest_whole_checkpoint_is_taken_and_the_others_are_named(make_trainer, saved_run, tmp_path):
    whole, folder = saved_run()
    (folder / "checkpoint-22" / "trainer_state.json").unlink()
    truncate(folder / "checkpoint-20" / "model.safetensors")
    (folder / "checkpoint-100.tmp").mkdir()
    message = r"from .*checkpoint-15, since .*checkpoint-22: trainer_state.json is missing\. .*checkpoint-20: model"
    with pytest.raises(ValueError, match=r"checkpoint-20, which is not a whole checkpoint: model.safetensors is cut"):
        make_trainer().train(resume_from_checkpoint=str(folder / "checkpoint-20"))
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint='nowhere'` is not a folder"):
        make_trainer().train(resume_from_checkpoint="nowhere")
    resumed = make_trainer()
    with pytest.warns(UserWarning, match=message):
        resumed.train(resume_from_checkpoint=True)
    assert_ends_the_same(resumed, whole)
    for step in (5, 10, 15):
        (folder / f"checkpoint-{step}" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"No checkpoint in .* is whole\. .*checkpoint-22: .*checkpoint-5: "):
        make_trainer().train(resume_from_checkpoint=True)


@pytest.mark.filterwarnings("ignore:The weak model is more certain than the strong one")
def test_scores_that_an_earlier_run_left_in_the_folder_are_not_taken_up(make_trainer, make_model):
    """A weak model of its own is not scored in phase 1, so that this checkpoint has no scores."""
    weak = make_model(seed=3)
    weak.lm_head.weight.data *= 20  # sure of itself, so that other examples are drawn
    make_trainer(sft_epochs=0, num_train_epochs=1, save_strategy="steps", save_steps=5).train()
    whole = make_trainer(weak_model=copy.deepcopy(weak), save_strategy="steps", save_steps=5)
    whole.train()
    resumed = make_trainer("resumed", weak_model=weak)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-5")
    assert_ends_the_same(resumed, whole)


# Interrupted runs


class Killed(DataCollatorForLanguageModeling):
    """Raises after some batches, as Ctrl-C does."""

    left = 10**9

    def __call__(self, examples, return_tensors=None):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().__call__(examples, return_tensors)


@pytest.mark.parametrize("shared", [False, True])
def test_a_run_killed_in_its_first_scoring_pass_starts_over_with_its_scores(
    make_trainer, tokenizer, tmp_path, capsys, shared
):
    options = {"sft_epochs": 0, "num_train_epochs": 1, "scoring_batch_size": 1, "save_strategy": "epoch"}
    options["train_dataset"] = Dataset.from_list(sums(80))
    if shared:
        options["score_cache_dir"] = str(tmp_path / "scores")

    def start(folder, num_batches=10**9):
        trainer = make_trainer(folder, **options)
        collator = trainer._selection.score_cache.data_collator = Killed(tokenizer.pad_token_id)
        collator.left = num_batches
        return trainer, collator

    with pytest.raises(ValueError, match=r"No valid checkpoint found in output directory \(.*run\)"):
        start("run")[0].train(resume_from_checkpoint=True)
    with pytest.raises(KeyboardInterrupt):
        start("run", num_batches=70)[0].train()  # scores are kept after 64 batches
    scores = tmp_path / "scores" if shared else tmp_path / "run" / "_scores"
    assert f"The scores computed so far are kept in {scores}" in capsys.readouterr().out
    resumed, collator = start("run")
    with pytest.warns(UserWarning, match="has no checkpoint, but scores of a run that was stopped"):
        resumed.train(resume_from_checkpoint=True)
    assert 10**9 - collator.left == 80 - 64
    if not shared:
        whole, _ = start("whole")
        with pytest.raises(ValueError, match="No valid checkpoint"):
            whole.train(resume_from_checkpoint=True)
        whole.train()
        assert_ends_the_same(resumed, whole)


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [2, 7])
def test_an_interrupted_run_says_how_to_resume(make_trainer, tmp_path, capsys, step):
    trainer = make_trainer(save_strategy="steps", save_steps=5, sft_epochs=3, curriculum=False)
    trainer.add_callback(Interrupt(step))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    (message,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Interrupted")]
    if step == 2:
        assert message == "Interrupted before the first checkpoint: the next run starts from the beginning."
    else:
        assert message.endswith(
            f"`train(resume_from_checkpoint=True)` goes on from {tmp_path / 'run' / 'checkpoint-5'}."
        )


MOE = {"num_experts_per_tok": 2, "num_key_value_heads": 2, "router_aux_loss_coef": 0.0}
# What transformers saves under other names than those of the model's parameters
RENAMED = {
    "qwen3_moe": MOE | {"num_experts": 4, "moe_intermediate_size": 16},
    "mixtral": MOE | {"num_local_experts": 4},
    "granitemoe": MOE | {"num_local_experts": 4},
    "gpt_neox": {},
}


@pytest.mark.parametrize("model_type", RENAMED)
@pytest.mark.parametrize("weak_is_trained", [False, True])
def test_weights_that_are_saved_under_other_names_are_restored(
    make_args, tokenizer, dataset, tmp_path, model_type, weak_is_trained
):
    """Resumed, and of the best checkpoint at the end. transformers 5.23 leaves them as they are."""

    def make(folder, **options):
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **sizes, **RENAMED[model_type])
        torch.manual_seed(0)
        return WMSSTrainer(
            AutoModelForCausalLM.from_config(config),
            make_args(
                **{"output_dir": str(tmp_path / folder), "learning_rate": 1e-2, "num_train_epochs": 2} | options
            ),
            train_dataset=dataset,
            eval_dataset=dataset.select(range(4)),
            processing_class=tokenizer,
        )

    options = {"save_strategy": "steps", "save_steps": 4, "train_weak": weak_is_trained}
    whole = make("whole", **options)
    whole.train()
    resumed = make("resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-12"))
    assert_ends_the_same(resumed, whole)

    options |= {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "loss", "greater_is_better": True}  # so that the best is not the last
    best = make("best", **options)
    best.train()
    assert best.state.best_global_step < best.state.max_steps
    expected = AutoModelForCausalLM.from_pretrained(best.state.best_model_checkpoint).state_dict()
    state = {name: value for name, value in best.model.state_dict().items() if not name.startswith("weak_branch.")}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
