"""What a run says of its phases, and that it never passes plain SFT off as weak-driven training."""

import warnings

import pytest
from conftest import StopAt
from trl import SFTTrainer

from wmss_trl import WMSSTrainer

HOOKS = ("set_initial_training_values", "_init_training_state", "_run_epoch")


@pytest.fixture
def make_trainer(make_model, make_args, tokenizer, dataset):
    def make(cls=WMSSTrainer, model=None, weak_model=None, callbacks=None, **kwargs):
        return cls(
            make_model() if model is None else model,
            make_args(**kwargs),
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            weak_model=weak_model,
        )

    return make


def renamed(*names):
    """A trainer as after transformers has renamed methods that WMSSTrainer overrides: only its own are called."""
    return type("Renamed", (WMSSTrainer,), {name: getattr(SFTTrainer, name) for name in names})


# A run that is not what it says


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize(
    "options",
    [
        {"num_train_epochs": 2},
        {"num_train_epochs": 2, "mixing_lambda": 1.0},
        {"max_steps": 12},
        {"curriculum": False, "num_train_epochs": 2},
        {"sft_epochs": 0, "num_train_epochs": 1},
    ],
)
def test_a_renamed_hook_ends_in_an_error(make_trainer, name, options):
    trainer = make_trainer(renamed(name), **options)
    with pytest.raises(
        RuntimeError, match=rf"needs `{name}` .*installed: transformers 5.*checked: transformers 5\.16\.1 to"
    ):
        trainer.train()
    assert trainer.state.global_step <= 1  # not after hours


@pytest.mark.parametrize("name", HOOKS)
def test_a_renamed_hook_ends_a_resumed_run_in_an_error(make_trainer, name, tmp_path):
    make_trainer(save_strategy="steps", save_steps=4, max_steps=12).train()
    for step in (4, 12):
        with pytest.raises(RuntimeError, match=f"needs `{name}`"):
            make_trainer(renamed(name), output_dir=str(tmp_path / "resumed")).train(
                resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}")
            )


class ForgetsThePhase(WMSSTrainer):
    """A Trainer that calls every hook, and yet never reaches the mixed loss."""

    @property
    def _weak_driven(self):
        return False


class ForgetsTheActiveSet(WMSSTrainer):
    """A Trainer that calls every hook, and yet goes on with the data loader of phase 1."""

    def set_initial_training_values(self, args, dataloader):
        values = super().set_initial_training_values(args, dataloader)
        self._active_dataloader = dataloader
        return values


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (ForgetsThePhase, {"curriculum": False}),
        (ForgetsThePhase, {}),
        (ForgetsTheActiveSet, {}),
        (ForgetsTheActiveSet, {"mixing_lambda": 1.0}),
        (ForgetsTheActiveSet, {"sft_epochs": 0, "num_train_epochs": 1}),
    ],
)
def test_a_run_without_the_weak_driven_steps_that_were_due_ends_in_an_error(make_trainer, cls, options):
    trainer = make_trainer(cls, **{"num_train_epochs": 2, "active_fraction": 1.0, **options})
    with pytest.raises(RuntimeError, match=r"No weak-driven step was done.*plain SFT.*installed: transformers 5"):
        trainer.train()


@pytest.mark.parametrize("cls", [WMSSTrainer, renamed("_run_epoch"), renamed(*HOOKS)])
@pytest.mark.parametrize(
    ("options", "steps"), [({"max_steps": 10}, 10), ({"num_train_epochs": 1}, 10), ({"max_steps": 3}, 3)]
)
@pytest.mark.filterwarnings("ignore:`max_steps:UserWarning", "ignore:`sft_epochs:UserWarning")
def test_a_run_that_has_no_weak_driven_step_is_no_error(make_trainer, cls, options, steps):
    trainer = make_trainer(cls, **options)
    trainer.train()
    assert trainer.state.global_step == steps
    assert not any("mixed_nll" in entry for entry in trainer.state.log_history)


def test_a_subclass_with_a_loss_of_its_own_is_no_error(make_trainer):
    own_loss = type("OwnLoss", (WMSSTrainer,), {"compute_loss": SFTTrainer.compute_loss})
    trainer = make_trainer(own_loss, sft_epochs=0, num_train_epochs=1)
    trainer.train()
    assert trainer.state.global_step == 6


def test_a_run_that_is_stopped_early_is_no_error(make_trainer):
    trainer = make_trainer(callbacks=[StopAt(7)])
    trainer.train()
    assert trainer.state.global_step == 7


def test_a_resumed_run_counts_its_own_steps(make_trainer, tmp_path):
    make_trainer(save_strategy="steps", save_steps=4, max_steps=12).train()
    for step, stop, expected in ((4, 8, 0), (4, 13, 3), (12, 14, 2)):
        trainer = make_trainer(callbacks=[StopAt(stop)], output_dir=str(tmp_path / "resumed"))
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert trainer._phases.weak_driven_steps == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_train_epochs": 2}, 6),
        ({"num_train_epochs": 2, "mixing_lambda": 1.0}, 6),
        ({"num_train_epochs": 2, "curriculum": False}, 10),
        ({"num_train_epochs": 2, "gradient_accumulation_steps": 4}, 2),
        ({"max_steps": 13}, 3),
    ],
)
def test_weak_driven_steps_are_counted(make_trainer, options, expected):
    trainer = make_trainer(**options)
    trainer.train()
    assert trainer._phases.weak_driven_steps == expected


# A run that is plain SFT says so


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 10}, 10),
        ({"max_steps": 2, "gradient_accumulation_steps": 4}, 3),
        ({"max_steps": 5, "dataloader_drop_last": True}, 9),
        ({"max_steps": 5, "sft_epochs": 2}, 20),
    ],
)
def test_max_steps_within_phase_1_warns(make_trainer, options, steps):
    message = (
        rf"`max_steps={options['max_steps']}` ends the run within its {steps} SFT steps .* above {steps} or lower"
    )
    with pytest.warns(UserWarning, match=message):
        trainer = make_trainer(**options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="`max_steps")  # once is enough
        trainer.train()
        make_trainer(**options | {"max_steps": steps + 1})


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 10},
        {"num_train_epochs": 1},
        {"mixing_lambda": 1.0, "curriculum": False},
    ],
)
@pytest.mark.filterwarnings("ignore:`max_steps:UserWarning", "ignore:`sft_epochs:UserWarning")
def test_plain_sft_is_tagged_as_such(make_trainer, tmp_path, options):
    trainer = make_trainer(**options, save_strategy="epoch")
    trainer.train()
    assert trainer.model.model_tags == SFTTrainer._tag_names
    trainer.create_model_card(model_name="my-model")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "wmss" not in card.lower()
    assert "2602.08222" not in card
    assert "- sft" in card


def test_a_weak_driven_run_is_tagged(make_trainer):
    from peft import LoraConfig, get_peft_model

    assert make_trainer(max_steps=11).model.model_tags == ["trl", "sft", "wmss"]
    adapter = make_trainer(model=get_peft_model(make_trainer().model, LoraConfig(r=4)))
    assert adapter.model.model_tags == ["trl", "sft", "wmss"]


# What a run says


def lines(capsys):
    out = capsys.readouterr().out
    return [line for line in out.splitlines() if "weak-driven" in line or "Epoch" in line]


def test_a_run_announces_its_phases(make_trainer, capsys):
    trainer = make_trainer(disable_tqdm=False)
    trainer.train()
    start, first, second = lines(capsys)
    assert start == "10 SFT steps, then 12 weak-driven steps; weak model = M0 (the model as handed in), lambda 0.5."
    assert first.startswith("Epoch 2: 23 of 37 examples drawn; mean entropy ")
    assert first.endswith(" nats (weak -> strong); the loss is now that of the mixed logits.")
    assert second.startswith("Epoch 3: 23 of 37 examples drawn; mean entropy ")
    assert second.endswith(" nats (weak -> strong).")
    sampler = trainer.curriculum_sampler
    assert f"{sampler.weak_entropy.mean():.4g} -> {sampler.strong_entropy.mean():.4g} nats" in second


def test_a_run_without_a_curriculum_announces_its_phases(make_trainer, make_model, capsys):
    options = {"curriculum": False, "lambda_schedule": "cosine", "final_mixing_lambda": 0.9}
    make_trainer(disable_tqdm=False, weak_model=make_model(seed=1), num_train_epochs=2, **options).train()
    start, switch = lines(capsys)
    assert start == (
        "10 SFT steps, then 10 weak-driven steps; weak model = the Qwen3ForCausalLM handed in, lambda 0.5 -> 0.9 "
        "(cosine)."
    )
    assert switch == "Epoch 2: the loss is now that of the mixed logits."


def test_a_resumed_run_says_where_it_goes_on(make_trainer, capsys, tmp_path):
    make_trainer(save_strategy="steps", save_steps=12, max_steps=12).train()
    assert lines(capsys) == []  # `disable_tqdm=True` is meant to be quiet
    trainer = make_trainer(disable_tqdm=False, num_train_epochs=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-12"))
    (start,) = lines(capsys)
    assert start.startswith("Going on after step 12 of 16 (epoch 1.33): 10 SFT steps, then 6 weak-driven steps; weak")


@pytest.mark.filterwarnings("ignore:`max_steps:UserWarning")
def test_plain_sft_and_the_curriculum_alone_are_called_so(make_trainer, capsys):
    make_trainer(disable_tqdm=False, max_steps=1).train()
    assert lines(capsys) == ["1 SFT step, none weak-driven."]
    make_trainer(disable_tqdm=False, sft_epochs=0, num_train_epochs=1, mixing_lambda=1.0).train()
    start, draw = lines(capsys)
    assert start.startswith("6 weak-driven steps; weak model = M0")
    assert start.endswith("whose logits are not mixed into the loss (lambda 1).")
    assert "mixed logits" not in draw
