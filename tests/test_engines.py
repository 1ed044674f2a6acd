"""What can run under which engine, without starting one; `tests/distributed` starts them."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from wmss_trl import WMSSTrainer
from wmss_trl.distributed.engines import check_engine, check_goes_on_from_sft, checkpoint_form, engine_name
from wmss_trl.distributed.late_parameters import LateParameters
from wmss_trl.loop.run_state import check_same_run
from wmss_trl.modeling.adapters import active_adapter, copy_adapter


def fsdp(version=2, **options):
    options = {"auto_wrap_policy": transformer_auto_wrap_policy, "reshard_after_forward": True} | options
    if version == 1:
        options["reshard_after_forward"] = "FULL_SHARD"
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version, **options)
    return SimpleNamespace(
        distributed_type=DistributedType.FSDP,
        is_fsdp2=version == 2,
        parallelism_config=None,
        num_processes=4,
        state=SimpleNamespace(fsdp_plugin=plugin),
    )


def deepspeed(stage, processes=4, **config):
    return SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        parallelism_config=None,
        num_processes=processes,
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage, deepspeed_config=config)),
    )


def parallel(**sizes):
    return SimpleNamespace(
        distributed_type=DistributedType.MULTI_GPU, parallelism_config=ParallelismConfig(**sizes), num_processes=4
    )


@pytest.mark.parametrize(
    ("accelerator", "options", "has_adapter", "message"),
    [
        (fsdp(version=1), {}, False, "Set `fsdp_version: 2`"),
        (deepspeed(3, gradient_accumulation_steps=4), {"gradient_accumulation_steps": 2}, False, "steps: 4`.*'auto'"),
        (
            deepspeed(2, optimizer={"type": "AdamW"}),
            {"train_weak": True},
            False,
            "Remove `optimizer` there and set `optim`, or set `sft_epochs=0`",
        ),
        (fsdp(auto_wrap_policy="NO_WRAP"), {"train_weak": True}, False, "TRANSFORMER_BASED_WRAP"),
        (fsdp(), {"train_weak": True, "torch_compile": True}, False, "Set it to False"),
        (fsdp(activation_checkpointing=True), {"train_weak": True}, True, "_checkpointing=True`"),
        (fsdp(state_dict_type="SHARDED_STATE_DICT"), {"train_weak": True}, True, "Set it to FULL_STATE_DICT"),
        (
            deepspeed(3),
            {"train_weak": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            True,
            "Set it to False",
        ),
        (parallel(tp_size=2), {}, False, "`tp_size=2`.*Set all of them to 1"),
        (parallel(cp_size=2), {}, False, "`cp_size=2`.*Set all of them to 1"),
    ],
)
def test_what_cannot_run_is_refused_with_a_remedy(make_args, accelerator, options, has_adapter, message):
    with pytest.raises(ValueError, match=message):
        check_engine(make_args(**options), accelerator, has_adapter)


@pytest.mark.parametrize("has_adapter", [False, True])
@pytest.mark.parametrize(
    ("accelerator", "name"),
    [
        (fsdp(state_dict_type="FULL_STATE_DICT"), "fsdp2"),
        (deepspeed(3, gradient_accumulation_steps="auto"), "zero3"),
        (deepspeed(2), "zero2"),
        (parallel(), "replicated"),
    ],
)
def test_what_can_run_is_not_refused(make_args, accelerator, name, has_adapter):
    check_engine(make_args(train_weak=True, gradient_accumulation_steps=2), accelerator, has_adapter)
    assert engine_name(accelerator) == name


def test_a_checkpoint_of_another_engine_or_number_of_processes_is_refused(make_args, tmp_path):
    forms = [checkpoint_form(make_args(), engine) for engine in (parallel(), fsdp(), deepspeed(3), deepspeed(3, 8))]
    assert len(set(forms)) == 4
    assert checkpoint_form(make_args(weak_refresh="epoch"), fsdp()) == "fsdp2, 4 processes"
    check_same_run(tmp_path / "state", {"engine": forms[2]}, {"engine": forms[2]})
    for other in (forms[0], forms[1], forms[3]):
        with pytest.raises(ValueError, match=r"'zero3, 4 processes' in the checkpoint.*form of their engine"):
            check_same_run(tmp_path / "state", {"engine": forms[2]}, {"engine": other})


def test_joint_training_goes_on_from_plain_sft_only_without_an_engine(make_args, tmp_path):
    check_goes_on_from_sft(tmp_path, make_args(train_weak=True), parallel())
    for engine in (fsdp(), deepspeed(2), deepspeed(3)):
        check_goes_on_from_sft(tmp_path, make_args(), engine)
        with pytest.raises(ValueError, match=r"`train_weak=True` cannot go on from .* under .*`sft_epochs=0`"):
            check_goes_on_from_sft(tmp_path, make_args(train_weak=True), engine)


def test_whole_models_on_each_process_are_refused_under_an_engine(
    make_model, make_args, tokenizer, dataset, tmp_path, monkeypatch
):
    def make(**kwargs):
        return WMSSTrainer(make_model(), make_args(), train_dataset=dataset, processing_class=tokenizer, **kwargs)

    trainer = make()
    monkeypatch.setattr("wmss_trl.loop.checks.engine_name", lambda accelerator: "zero3")
    with pytest.raises(ValueError, match=r"launched with zero3.*ddp\.yaml"):
        trainer.score_table()
    with pytest.raises(ValueError, match=r"launched with zero3.*wmss-trl rank-weak"):
        make(weak_model=f"auto:{tmp_path}")


@pytest.mark.parametrize("name", ["model", "weak_model"])
@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [  # what `from_pretrained` leaves on a model that it has put on two GPUs or split over two processes
        (
            "hf_device_map",
            {"model.embed_tokens": 0, "model.layers": 1, "lm_head": 1},
            r"`{}` is split over the devices 0, 1 .*accelerate launch.*CUDA_VISIBLE_DEVICES=0",
        ),
        ("_device_mesh", object(), r"`{}` was split .*`distributed_config`.*fsdp2\.yaml"),
    ],
)
def test_a_model_that_was_split_when_it_was_loaded_is_refused(
    make_model, make_args, tokenizer, dataset, name, attribute, value, message
):
    models = {"model": make_model(), "weak_model": make_model(seed=1)}
    setattr(models[name], attribute, value)
    with pytest.raises(ValueError, match=message.format(name)):
        WMSSTrainer(**models, args=make_args(), train_dataset=dataset, processing_class=tokenizer)


@pytest.mark.parametrize("device_map", [{"": 0}, {"model.embed_tokens": 0, "model.layers": "cpu", "lm_head": 0}])
def test_a_weak_model_on_one_device_is_not_refused(make_model, make_args, tokenizer, dataset, device_map):
    weak_model = make_model(seed=1)
    weak_model.hf_device_map = device_map
    models = {"model": make_model(), "weak_model": weak_model}
    trainer = WMSSTrainer(**models, args=make_args(), train_dataset=dataset, processing_class=tokenizer)
    assert trainer.weak_reference.model is weak_model


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_late_parameters_train_as_if_the_optimizer_had_not_known_them_before(optimizer_class):
    """DeepSpeed steps a parameter group as a whole, with zeros for gradients that are missing."""
    torch.manual_seed(0)
    options = {"lr": 0.1, "weight_decay": 0.3}
    if optimizer_class is torch.optim.SGD:
        options["momentum"] = 0.9
    early, late = (torch.nn.Parameter(torch.randn(5)) for _ in range(2))
    start = late.detach().clone()
    expected_early, expected = (torch.nn.Parameter(value.detach().clone()) for value in (early, late))
    optimizer, reference = optimizer_class([early, late], **options), optimizer_class([expected_early], **options)
    parameters = LateParameters(optimizer, [late])
    parameters.wait(optimizer)
    for _ in range(3):
        early.grad = expected_early.grad = torch.randn(5)
        late.grad = torch.zeros(5)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(late.detach(), start, rtol=0, atol=0)
    parameters.train(optimizer, first=True)
    late_reference = optimizer_class([expected], **options)
    for _ in range(3):
        early.grad, late.grad = torch.randn(5), torch.randn(5)
        expected_early.grad, expected.grad = early.grad.clone(), late.grad.clone()
        optimizer.step()
        reference.step()
        late_reference.step()
        parameters.train(optimizer, first=False)
    torch.testing.assert_close(early, expected_early, rtol=0, atol=0)
    torch.testing.assert_close(late, expected, rtol=0, atol=0)


def test_late_parameters_have_states_from_the_first_step_on():
    early, late = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizer = torch.optim.AdamW([early, late], weight_decay=0.1)
    parameters = LateParameters(optimizer, [late])
    parameters.wait(optimizer)
    for _ in range(2):
        early.grad = torch.ones(5)
        parameters.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.state[late]["step"] == 1  # what FSDP2's checkpoint asks for, once
    assert (late == 1).all()


@torch.no_grad()
def test_switching_adapters_is_what_peft_does_without_touching_requires_grad(make_model):
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(make_model(dropout=0.0), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn_like(parameter)
    copy_adapter(model)
    for name, parameter in model.named_parameters():
        if "wmss_weak" in name:
            parameter += 0.1 * torch.randn_like(parameter)
    inputs = torch.tensor([[5, 6, 7, 8]])
    strong, flags = model(inputs).logits, {name: p.requires_grad for name, p in model.named_parameters()}
    reference = copy.deepcopy(model)
    with reference.disable_adapter():
        disabled = reference(inputs).logits
    reference.set_adapter("wmss_weak")
    weak = reference(inputs).logits
    for name, expected in ((None, disabled), ("wmss_weak", weak)):
        assert not torch.allclose(expected, strong)
        with active_adapter(model, name):
            torch.testing.assert_close(model(inputs).logits, expected, rtol=0, atol=0)
            assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        torch.testing.assert_close(model(inputs).logits, strong, rtol=0, atol=0)
