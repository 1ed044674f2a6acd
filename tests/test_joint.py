"""Training of both branches (the paper's Algorithm 1)."""

import copy

import numpy as np
import pytest
import torch
from conftest import losses
from loss_cases import cross_entropy
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from wmss_trl import WMSSTrainer
from wmss_trl.weak_model.joint import TrainedAdapter, TrainedModel

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
INPUTS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def make_trainer(make_model, make_args, tokenizer, dataset):
    def make(model=None, peft_config=None, weak_model=None, **kwargs):
        options = {"sft_epochs": 0, "num_train_epochs": 1, "train_weak": True, "optim": "sgd", "learning_rate": 0.1}
        return WMSSTrainer(
            make_model(dropout=0.0) if model is None else model,
            make_args(**{"lr_scheduler_type": "constant", **options, **kwargs}),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=copy.deepcopy(peft_config),
            weak_model=weak_model,
        )

    return make


@pytest.fixture
def earlier_adapter(make_model, tmp_path):
    """An adapter that says something, for the same base, and its folder."""
    torch.manual_seed(0)
    model = get_peft_model(make_model(dropout=0.0), copy.deepcopy(LORA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "earlier")
    return model, str(tmp_path / "earlier")


@torch.no_grad()
def logits(model):
    training = model.training
    try:
        return model.eval()(INPUTS).logits
    finally:
        model.train(training)


def weak_logits(trainer):
    with trainer.weak_reference.activated() as weak:
        return weak(INPUTS).logits


def two_model_loop(strong, weak, trainer, trainable, mixing_lambda, anchor_weight, steps, loss_type="nll"):
    """Algorithm 1 as a plain PyTorch loop on full float32 logits."""
    args = trainer.args
    parameters = [p for model in (strong, weak) for name, p in model.named_parameters() if trainable(name)]
    optimizer = torch.optim.SGD(parameters, lr=args.learning_rate)
    order, history = list(trainer.curriculum_sampler or range(37)), []
    for start in range(0, 4 * steps, 4):
        batch = trainer.data_collator([trainer.train_dataset[i] for i in order[start : start + 4]])
        labels = batch.pop("labels")[:, 1:].flatten()
        z_strong, z_weak = (model(**batch).logits[:, :-1].flatten(0, 1) for model in (strong, weak))
        mix = mixing_lambda * z_strong + (1 - mixing_lambda) * z_weak
        anchor, mixed = (cross_entropy(logits, labels, loss_type) for logits in (z_strong, mix))
        loss = anchor_weight * anchor + (1 - anchor_weight) * mixed
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        history.append(loss.item())
    return history


@pytest.mark.parametrize(("anchor_weight", "loss_type"), [(0.0, "nll"), (0.3, "nll"), (0.3, "dft")])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_full_models_equal_a_plain_loop(make_trainer, make_model, anchor_weight, loss_type, activation_checkpointing):
    strong, weak = make_model(seed=1, dropout=0.0), make_model(seed=2, dropout=0.0)
    expected_strong, expected_weak = copy.deepcopy(strong), copy.deepcopy(weak)
    trainer = make_trainer(
        strong,
        weak_model=weak,
        mixing_lambda=0.4,
        anchor_weight=anchor_weight,
        loss_type=loss_type,
        curriculum=False,
        train_sampling_strategy="sequential",
        gradient_checkpointing=activation_checkpointing,
    )
    trainer.train()
    steps = trainer.state.global_step
    history = two_model_loop(
        expected_strong, expected_weak, trainer, lambda name: True, 0.4, anchor_weight, steps, loss_type
    )
    assert len(history) == 10
    np.testing.assert_allclose(losses(trainer), history, rtol=1e-6)
    with trainer.weak_reference.detached():
        pairs = ((trainer.model, expected_strong), (trainer.weak_reference.model, expected_weak))
        for model, expected in pairs:
            for (name, parameter), value in zip(model.named_parameters(), expected.parameters(), strict=True):
                torch.testing.assert_close(parameter, value, rtol=1e-5, atol=1e-6, msg=name)


DORA_ELSEWHERE = LoraConfig(r=2, target_modules=["k_proj", "v_proj", "up_proj"], use_dora=True)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("strong_config", [LORA, DORA_ELSEWHERE])
def test_two_adapters_on_one_base_equal_a_plain_loop(
    make_trainer, make_model, earlier_adapter, strong_config, activation_checkpointing
):
    """Under activation checkpointing the weak layers run a second time when the strong adapter is active again. The
    earlier adapter may be of another kind and in other layers."""
    model = get_peft_model(make_model(dropout=0.0), copy.deepcopy(strong_config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    expected_weak, folder = earlier_adapter
    expected_strong = copy.deepcopy(model)
    trainer = make_trainer(
        model,
        weak_model=folder,
        mixing_lambda=0.4,
        curriculum=False,
        train_sampling_strategy="sequential",
        gradient_checkpointing=activation_checkpointing,
    )
    assert isinstance(trainer.weak_reference, TrainedAdapter)
    trainer.train()
    steps = trainer.state.global_step
    history = two_model_loop(expected_strong, expected_weak, trainer, lambda name: "lora_" in name, 0.4, 0.0, steps)
    np.testing.assert_allclose(losses(trainer), history, rtol=1e-6)
    torch.testing.assert_close(logits(trainer.model), logits(expected_strong), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weak_logits(trainer), logits(expected_weak), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits(trainer.model), weak_logits(trainer), atol=1e-4)
    base = {name: p for name, p in expected_strong.named_parameters() if "lora_" not in name}
    for name, value in base.items():
        assert torch.equal(trainer.model.get_parameter(name), value), name


@pytest.mark.parametrize("lora", [False, True])
def test_phase_1_leaves_the_weak_branch_alone(make_trainer, make_model, lora):
    trainer = make_trainer(peft_config=LORA if lora else None, sft_epochs=1, optim="adamw_torch", learning_rate=1e-2)
    before = weak_logits(trainer)
    torch.testing.assert_close(before, logits(make_model(dropout=0.0)))
    trainer.train()  # weight decay or stale gradients would change it
    assert trainer.state.global_step == 10
    assert torch.equal(weak_logits(trainer), before)


@pytest.mark.parametrize("lora", [False, True])
def test_resumed_run_ends_the_same(make_trainer, lora, tmp_path):
    options = {
        "peft_config": LORA if lora else None,
        "sft_epochs": 1,
        "num_train_epochs": 3,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
    }
    torch.manual_seed(0)
    whole = make_trainer(**options, save_strategy="steps", save_steps=1, output_dir=str(tmp_path / "whole"))
    whole.train()
    assert len(losses(whole)) == 22
    for step in (5, 10, 13, 16, 18):
        torch.manual_seed(0)
        resumed = make_trainer(**options, output_dir=str(tmp_path / "resumed"))
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert losses(resumed) == losses(whole), step
        assert torch.equal(logits(resumed.model), logits(whole.model))
        assert torch.equal(weak_logits(resumed), weak_logits(whole))


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_goes_on_from_a_checkpoint_of_plain_sft(
    make_trainer, make_model, make_args, tokenizer, dataset, lora, tmp_path
):
    """The weak branch is the model as handed in, and its optimizer states begin with the first weak-driven step."""
    peft_config = LORA if lora else None
    options = {"optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "constant", "weight_decay": 0.1}
    torch.manual_seed(0)
    sft = SFTTrainer(
        make_model(dropout=0.0),
        make_args(SFTConfig, **options, num_train_epochs=1, save_strategy="epoch", output_dir=str(tmp_path / "sft")),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=copy.deepcopy(peft_config),
    )
    sft.train()
    runs = []
    for checkpoint in (None, str(tmp_path / "sft" / "checkpoint-10")):
        torch.manual_seed(0)
        run = make_trainer(**options, peft_config=peft_config, sft_epochs=1, num_train_epochs=2, save_strategy="epoch")
        run.train(resume_from_checkpoint=checkpoint)
        runs.append(run)
    whole, resumed = runs
    assert len(losses(whole)) == 16
    assert losses(resumed) == losses(whole)
    assert torch.equal(logits(resumed.model), logits(whole.model))
    assert torch.equal(weak_logits(resumed), weak_logits(whole))
    assert not torch.equal(weak_logits(whole), logits(make_model(dropout=0.0)))
    # With its state file deleted, a checkpoint of such a run still has the states of both branches
    checkpoint = tmp_path / "run" / "checkpoint-10"
    for name in ("wmss_state.json", "curriculum.npz"):
        (checkpoint / name).unlink()
    torch.manual_seed(0)
    options["mixing_lambda"] = 0.4
    make_trainer(**options, peft_config=peft_config, sft_epochs=1, num_train_epochs=2).train(str(checkpoint))


def test_saved_model_is_the_strong_one_and_checkpoints_hold_both(make_trainer, make_model, tmp_path):
    trainer = make_trainer(weak_model=make_model(seed=2, dropout=0.0), save_strategy="epoch")
    trainer.train()
    trainer.save_model()
    trainer.model.save_pretrained(tmp_path / "direct")
    assert not torch.allclose(logits(trainer.model), weak_logits(trainer), atol=1e-4)
    checkpoint = tmp_path / "run" / "checkpoint-6"
    for folder in (tmp_path / "run", checkpoint, tmp_path / "direct"):
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["unexpected_keys"]
        torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=0, atol=0)
        assert [path.name for path in folder.iterdir() if "weak" in path.name] == (
            ["weak_model"] if folder == checkpoint else []
        )
    weak = AutoModelForCausalLM.from_pretrained(checkpoint / "weak_model")
    torch.testing.assert_close(logits(weak), weak_logits(trainer), rtol=0, atol=0)
    assert hasattr(trainer.model, "weak_branch")  # it is back after saving


def test_saved_adapter_is_the_strong_one_and_checkpoints_hold_both(
    make_trainer, make_model, tokenizer, earlier_adapter, tmp_path
):
    base = tmp_path / "base"
    make_model(dropout=0.0).save_pretrained(base)
    tokenizer.save_pretrained(base)
    trainer = make_trainer(str(base), LORA, earlier_adapter[1], save_strategy="epoch")
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-6"):
        loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
        assert list(loaded.peft_config) == ["default"]
        torch.testing.assert_close(logits(loaded), logits(trainer.model))
    weak = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-6" / "weak_model" / "wmss_weak")
    torch.testing.assert_close(logits(weak), weak_logits(trainer))


def test_both_branches_are_scored_anew_before_each_draw(make_trainer):
    trainer = make_trainer(sft_epochs=1, num_train_epochs=3)
    rounds, score = [], trainer.curriculum_sampler.score

    def keep():
        rounds.append((*score(), weak_logits(trainer)))
        return rounds[-1][:2]

    trainer.curriculum_sampler.score = keep
    trainer.train()
    (weak_1, strong_1, logits_1), (weak_2, strong_2, logits_2) = rounds
    assert not torch.allclose(logits_1, logits_2, atol=1e-4)
    assert np.abs(weak_2 - weak_1).max() > 1e-4
    assert np.abs(strong_2 - strong_1).max() > 1e-4


def test_optimizer_and_clipping_cover_both(make_trainer, make_model):
    trainer = make_trainer(weak_model=make_model(seed=2), max_grad_norm=1e-3, learning_rate=1.0, max_steps=1)
    strong, weak = (copy.deepcopy(m.state_dict()) for m in (trainer.model, trainer.weak_reference.model))
    trainer.train()
    moved = 0.0
    with trainer.weak_reference.detached():
        for model, before in ((trainer.model, strong), (trainer.weak_reference.model, weak)):
            change = sum((p.detach() - before[n]).pow(2).sum().item() for n, p in model.named_parameters())
            assert change > 0
            moved += change
    assert moved**0.5 == pytest.approx(1e-3, rel=1e-3)
    assert isinstance(trainer.weak_reference, TrainedModel)


@pytest.mark.parametrize("lora", [False, True])
def test_bf16_autocast_covers_both(make_trainer, make_model, earlier_adapter, lora):
    runs, dtypes = [], set()
    for bf16 in (False, True):
        torch.manual_seed(0)
        peft_config, weak_model = (LORA, earlier_adapter[1]) if lora else (None, make_model(seed=2, dropout=0.0))
        trainer = make_trainer(None, peft_config, weak_model, bf16=bf16, mixing_lambda=0.3, active_fraction=1.0)
        if bf16:
            base = trainer.weak_reference.model.get_base_model() if lora else trainer.weak_reference.model
            base.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: dtypes.add(args[2].dtype))
        trainer.train()
        runs.append(losses(trainer))
    assert dtypes == {torch.bfloat16}
    assert runs[0] != runs[1]
    np.testing.assert_allclose(runs[1], runs[0], rtol=2e-2)


@pytest.mark.parametrize("full_logits", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_autocast_ends_with_each_step(make_trainer, make_model, earlier_adapter, lora, full_logits, monkeypatch):
    """A weak branch runs inside the strong model's forward, whose autocast context must not be entered twice."""
    if full_logits:
        monkeypatch.setattr("wmss_trl.modeling.lm_head._head_problem", lambda model: "of the test")
    peft_config, weak_model = (LORA, earlier_adapter[1]) if lora else (None, make_model(seed=2, dropout=0.0))
    trainer = make_trainer(None, peft_config, weak_model, bf16=True, max_steps=2)
    try:
        trainer.train()
        assert not torch.is_autocast_enabled("cpu")
    finally:
        torch.set_autocast_enabled("cpu", False)  # for the tests to come


# Bad input


def test_what_cannot_be_trained_jointly_is_refused(make_trainer, make_model, make_args):
    with pytest.raises(
        ValueError, match=r"`train_weak=True` with `mixing_lambda=1.0` gives the weak model no gradient"
    ):
        make_args(train_weak=True, mixing_lambda=1.0)
    with pytest.raises(ValueError, match=r"second adapter beside the model's own, but `weak_model` is a whole model"):
        make_trainer(peft_config=LORA, weak_model=make_model(seed=1))
    with pytest.raises(ValueError, match=r"`ddp_find_unused_parameters=False` cannot be combined with `train_weak"):
        make_trainer(sft_epochs=1, ddp_find_unused_parameters=False)
    bias = get_peft_model(make_model(), LoraConfig(r=4, bias="all"))
    with pytest.raises(
        ValueError, match=r"needs a second adapter beside the model's own, but .* Set `train_weak=False`"
    ):
        make_trainer(bias, sft_epochs=1, num_train_epochs=2)
    for peft_config in (None, LORA):
        with pytest.raises(ValueError, match=r"`train_weak=True` with `sft_epochs=0` and no `weak_model`.* one is as"):
            make_trainer(peft_config=peft_config)
