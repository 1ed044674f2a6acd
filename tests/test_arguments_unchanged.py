"""What the caller passes is as it was after a run: two trainers can be made from the same arguments."""

import copy

import pytest
import torch
from peft import LoraConfig
from trl import SFTConfig

from wmss_trl import WMSSConfig, WMSSTrainer

INPUTS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def checkpoints(make_model, tokenizer, tmp_path):
    """A strong model, and in one folder two flatter ones to choose from."""
    for name, factor in (("strong", 3), ("run/checkpoint-3", 1), ("run/checkpoint-9", 2)):
        model = make_model(seed=int(factor), dropout=0.0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def state(args):
    """Values of arguments; objects that have some of their own, with those."""
    values = {key: copy.deepcopy(getattr(value, "__dict__", value)) for key, value in vars(args).items()}
    return {key: value for key, value in values.items() if key not in ("distributed_state", "_device")}


def test_two_trainers_from_one_config_have_the_same_weak_model(checkpoints, make_args, dataset, tokenizer):
    args = make_args(sft_epochs=0, num_train_epochs=1, weak_model_name_or_path=f"auto:{checkpoints / 'run'}")
    logits = []
    for _ in range(2):
        trainer = WMSSTrainer(str(checkpoints / "strong"), args, train_dataset=dataset, processing_class=tokenizer)
        with trainer.weak_reference.activated() as weak:
            logits.append(weak(INPUTS).logits)
    assert not torch.allclose(logits[0], trainer.model(INPUTS).logits, atol=1e-3)
    assert torch.equal(*logits)


@pytest.mark.parametrize("cls", [WMSSConfig, SFTConfig])
@pytest.mark.parametrize("train_weak", [False, True])
def test_arguments_are_unchanged_by_a_run(checkpoints, make_args, dataset, tokenizer, cls, train_weak):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    options |= {"model_init_kwargs": {"dtype": "float32"}, "lr_scheduler_kwargs": {}}
    if cls is WMSSConfig:
        options |= {"weak_model_name_or_path": str(checkpoints / "run/checkpoint-3"), "train_weak": train_weak}
        options |= {"weak_model_init_kwargs": {"dtype": "float32"}}
    elif train_weak:
        pytest.skip("no option of SFTConfig")
    args = make_args(cls, num_train_epochs=2, **options)
    before = state(args)
    trainer = WMSSTrainer(str(checkpoints / "strong"), args, train_dataset=dataset, processing_class=tokenizer)
    assert trainer.args is not args
    assert state(args) == before
    trainer.train()
    assert state(args) == before


def test_adapter_configuration_is_unchanged_by_a_run(checkpoints, make_args, dataset, tokenizer):
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    before = copy.deepcopy(vars(peft_config))
    args = make_args(num_train_epochs=2)
    trainer = WMSSTrainer(
        str(checkpoints / "strong"), args, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config
    )
    trainer.train()
    assert vars(peft_config) == before


@pytest.mark.parametrize("bf16", [False, True])
def test_model_that_is_passed_as_weak_model_stays_itself(make_model, make_args, dataset, tokenizer, bf16):
    """It is frozen and in eval mode, and can serve for another run."""
    weak, losses = make_model(seed=3, dropout=0.0), []
    expected = copy.deepcopy(weak)
    for _ in range(2):
        trainer = WMSSTrainer(
            make_model(dropout=0.0),
            make_args(num_train_epochs=2, bf16=bf16),
            train_dataset=dataset,
            processing_class=tokenizer,
            weak_model=weak,
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert not any(parameter.requires_grad for parameter in weak.parameters())
    assert not any(module.training for module in weak.modules())
    for name, value in expected.state_dict().items():
        assert torch.equal(weak.state_dict()[name], value), name
    output, own = weak(INPUTS), expected.eval()(INPUTS)
    assert type(output) is type(own)
    torch.testing.assert_close(output.logits, own.logits, rtol=0, atol=2e-2 if bf16 else 0)
