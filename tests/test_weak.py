"""Adapters as weak model: what is in memory, what is trained, what is saved."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from conftest import losses
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from wmss_trl import WMSSTrainer
from wmss_trl.data.tiny import build_model
from wmss_trl.weak_model.adapters import DisabledAdapter, NamedAdapter
from wmss_trl.weak_model.frozen import FrozenModel
from wmss_trl.weak_model.loading import split_revision

PROJECTIONS = ["q_proj", "v_proj"]
METHODS = {
    "lora": LoraConfig(r=4, lora_dropout=0.2),
    "dora": LoraConfig(r=4, use_dora=True),
    "rslora": LoraConfig(r=4, use_rslora=True),
    "pissa": LoraConfig(r=4, init_lora_weights="pissa"),
    "modules_to_save": LoraConfig(r=4, modules_to_save=["input_layernorm"]),
    "trainable_token_indices": LoraConfig(r=4, trainable_token_indices={"embed_tokens": [5, 6, 7]}),
    "ia3": IA3Config(target_modules=PROJECTIONS, feedforward_modules=[]),
    "loha": LoHaConfig(r=4, target_modules=PROJECTIONS),
    "vera": VeraConfig(r=4, target_modules=["q_proj"]),
}
INPUTS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def base(make_model, tokenizer, tmp_path):
    """Embeddings are not tied: TRL's fused head cannot take PEFT's trainable tokens in a tied one."""
    folder = tmp_path / "base"
    model = make_model()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_trainer(make_args, dataset, tokenizer):
    def make(model, peft_config=None, weak_model=None, **kwargs):
        options = {"sft_epochs": 1, "num_train_epochs": 2, "learning_rate": 1e-2, **kwargs}
        return WMSSTrainer(
            model,
            make_args(**options),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=copy.deepcopy(peft_config),
            weak_model=weak_model,
        )

    return make


def trained_adapter(base, config, folder=None):
    """A PEFT model whose adapter says something."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if folder is not None:
        model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model):
    training = model.training
    try:
        return model.eval()(INPUTS).logits
    finally:
        model.train(training)


def base_weights(model):
    """Weights of the base, wherever the adapters have moved them to."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if ".base_layer." in name or ".original_module." in name or "norm." in name or "mlp" in name
    }


def assert_frozen_weak_adapter(trainer, expected, before):
    """After training: the weak model says what it said, the strong one has learnt, the base is untouched."""
    with trainer.weak_reference.activated() as weak:
        torch.testing.assert_close(weak(INPUTS).logits, expected, rtol=0, atol=0)
    assert not torch.allclose(logits(trainer.model), expected, atol=1e-4)
    after = base_weights(trainer.model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        if "modules_to_save" not in name:
            assert torch.equal(after[name], value), name
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    names = {name for name, parameter in trainer.model.named_parameters() if id(parameter) in optimized}
    assert names
    assert all(".default" in name for name in names)


@pytest.mark.parametrize("method", METHODS)
def test_new_adapter_has_its_base_as_weak_model(make_trainer, base, method):
    expected = logits(AutoModelForCausalLM.from_pretrained(base))
    trainer = make_trainer(base, METHODS[method])
    before = base_weights(trainer.model)
    trainer.train()
    if method == "pissa":  # its base is not the model as it was handed in
        assert isinstance(trainer.weak_reference, NamedAdapter)
        torch.testing.assert_close(expected, weak_logits(trainer))
        expected = weak_logits(trainer)
    else:
        assert isinstance(trainer.weak_reference, DisabledAdapter)
    assert_frozen_weak_adapter(trainer, expected, before)


def weak_logits(trainer):
    with trainer.weak_reference.activated() as weak:
        return weak(INPUTS).logits


@pytest.mark.parametrize("method", METHODS)
def test_trained_adapter_that_is_handed_in_is_copied_beside_itself(make_trainer, base, method):
    model = trained_adapter(base, METHODS[method])
    expected = logits(model)
    assert not torch.allclose(expected, logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-3)
    trainer = make_trainer(model)
    assert isinstance(trainer.weak_reference, NamedAdapter)
    before = base_weights(trainer.model)
    trainer.train()
    assert_frozen_weak_adapter(trainer, expected, before)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "pissa"])
def test_earlier_adapter_of_the_same_base_is_loaded_beside(make_trainer, base, method, tmp_path):
    expected = logits(trained_adapter(base, METHODS[method], tmp_path / "earlier"))
    trainer = make_trainer(base, METHODS[method], weak_model=str(tmp_path / "earlier"))
    assert isinstance(trainer.weak_reference, NamedAdapter)
    before = base_weights(trainer.model)
    trainer.train()
    assert_frozen_weak_adapter(trainer, expected, before)


@pytest.mark.parametrize("form", ["base", "handed in", "earlier"])
def test_saved_folder_holds_the_strong_adapter_alone(make_trainer, base, form, tmp_path):
    model, options = base, {}
    if form == "handed in":
        model = trained_adapter(base, METHODS["lora"])
    else:
        options["peft_config"] = METHODS["lora"]
    if form == "earlier":
        trained_adapter(base, METHODS["lora"], tmp_path / "earlier")
        options["weak_model"] = str(tmp_path / "earlier")
    trainer = make_trainer(model, **options, save_strategy="epoch")
    trainer.train()
    trainer.save_model()
    trainer.model.save_pretrained(tmp_path / "direct")
    expected = logits(trainer.model)
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-16", tmp_path / "direct"):
        assert not [path for path in folder.iterdir() if "weak" in path.name]
        loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
        assert list(loaded.peft_config) == ["default"]
        torch.testing.assert_close(logits(loaded), expected)


@pytest.mark.parametrize("form", ["base", "handed in", "earlier"])
def test_adapter_run_stopped_anywhere_and_resumed_ends_the_same(make_trainer, base, form, tmp_path):
    trained_adapter(base, METHODS["lora"], tmp_path / "earlier")

    def make(**options):
        if form == "handed in":
            return make_trainer(trained_adapter(base, METHODS["lora"]), **options)
        weak_model = str(tmp_path / "earlier") if form == "earlier" else None
        return make_trainer(base, METHODS["lora"], weak_model=weak_model, **options)

    torch.manual_seed(0)
    whole = make(save_strategy="steps", save_steps=1, output_dir=str(tmp_path / "whole"))
    whole.train()
    for step in (3, 10, 13):
        torch.manual_seed(0)
        resumed = make(output_dir=str(tmp_path / "resumed"))
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert losses(resumed) == losses(whole), step
        torch.testing.assert_close(weak_logits(resumed), weak_logits(whole), rtol=0, atol=0)


class Flags(TrainerCallback):
    """What can require a gradient during training, and whether a weak forward has dropout."""

    def __init__(self):
        self.trainable = set()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.trainable.add(frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad))


@pytest.mark.parametrize("form", ["base", "handed in"])
def test_switching_adapters_leaves_no_trace(make_trainer, base, form):
    """Even what PEFT itself would unfreeze: here the A matrices are frozen, as in LoRA-FA."""
    if form == "base":
        trainer = make_trainer(base, METHODS["lora"], sft_epochs=0, num_train_epochs=1)
    else:
        trainer = make_trainer(trained_adapter(base, METHODS["lora"]), sft_epochs=0, num_train_epochs=1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad = False
    expected = frozenset(n for n, parameter in trainer.model.named_parameters() if parameter.requires_grad)
    assert expected
    assert all("lora_B.default" in name for name in expected)
    flags = Flags()
    trainer.add_callback(flags)
    trainer.train()
    assert flags.trainable == {expected}
    trainer.model.train()
    with trainer.weak_reference.activated() as weak:
        assert not any(module.training for module in weak.modules())
    with pytest.raises(RuntimeError, match="in the weak forward"), trainer.weak_reference.activated():
        raise RuntimeError("in the weak forward")
    assert {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad} == expected
    assert trainer.model.active_adapter == "default"
    assert trainer.model.training
    status = trainer.model.get_model_status()
    assert (status.enabled, status.active_adapters) == (True, ["default"])


def test_weak_adapter_does_not_disturb_phase_1(make_trainer, base, tmp_path):
    trained_adapter(base, METHODS["lora"], tmp_path / "earlier")
    runs = []
    for weak_model in (None, str(tmp_path / "earlier")):
        trainer = make_trainer(base, METHODS["lora"], weak_model=weak_model)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0][:10] == runs[1][:10]
    assert runs[0][10:] != runs[1][10:]


def test_adapter_that_can_only_be_there_once_is_copied_with_its_base(make_trainer, base):
    model = trained_adapter(base, LoraConfig(r=4, bias="all"))
    expected = logits(model)
    with pytest.warns(UserWarning, match=r"cannot be kept beside itself .* the whole model is copied"):
        trainer = make_trainer(model)
    assert type(trainer.weak_reference) is FrozenModel
    trainer.train()
    torch.testing.assert_close(weak_logits(trainer), expected)
    assert not torch.allclose(logits(trainer.model), expected, atol=1e-4)


@pytest.fixture
def wide_base(tokenizer, tmp_path):
    """As wide as a block of the 4-bit format."""
    build_model(tokenizer, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    return str(tmp_path / "wide")


@pytest.mark.parametrize("form", ["base", "cached", "joint"])
def test_4_bit_base(make_args, dataset, tokenizer, wide_base, form):
    """QLoRA: the base is quantised, the adapters are not."""
    quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base_logits = logits(AutoModelForCausalLM.from_pretrained(wide_base, quantization_config=quantization_config))
    options = {"joint": {"train_weak": True, "mixing_lambda": 0.3}, "cached": {"weak_cache": "hidden"}}.get(form, {})
    trainer = WMSSTrainer(
        wide_base,
        make_args(sft_epochs=1, num_train_epochs=2, learning_rate=1e-2, **options),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=copy.deepcopy(METHODS["lora"]),
        quantization_config=quantization_config,
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" not in name}
    assert torch.uint8 in {parameter.dtype for parameter in before.values()}
    expected = weak_logits(trainer)
    torch.testing.assert_close(expected, base_logits, rtol=0, atol=0.02)  # bitsandbytes multiplies those in bfloat16
    trainer.train()
    for name, value in before.items():
        assert torch.equal(trainer.model.get_parameter(name), value), name
    assert "mixed_nll" in trainer.state.log_history[-2]
    # Scoring must not end the training of the layers below a 4-bit one
    trained = [p for name, p in trainer.model.named_parameters() if "lora_B.default" in name]
    assert all(parameter.abs().max() > 0 for parameter in trained)
    changed = not torch.allclose(weak_logits(trainer), expected, atol=1e-4)
    assert changed == (form == "joint")
    assert not torch.allclose(logits(trainer.model), expected, atol=1e-4)


def test_quantised_weak_model_of_a_full_run(make_trainer, wide_base):
    quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    expected = logits(AutoModelForCausalLM.from_pretrained(wide_base, quantization_config=quantization_config))
    init_kwargs = {"quantization_config": quantization_config}
    trainer = make_trainer(wide_base, weak_model_name_or_path=wide_base, weak_model_init_kwargs=init_kwargs)
    trainer.train()
    assert torch.uint8 in {parameter.dtype for parameter in trainer.weak_reference.model.parameters()}
    torch.testing.assert_close(weak_logits(trainer), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"`train_weak=True` cannot train a quantised `weak_model`"):
        make_trainer(wide_base, weak_model_name_or_path=wide_base, weak_model_init_kwargs=init_kwargs, train_weak=True)


def test_quantised_weak_model_gives_its_memory_back_when_it_is_cached(make_trainer, wide_base):
    init_kwargs = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    options = {"weak_model_name_or_path": wide_base, "weak_model_init_kwargs": init_kwargs}
    plain = make_trainer(wide_base, **options)
    plain.train()
    trainer = make_trainer(wide_base, weak_cache="hidden", **options)
    weak = trainer.weak_reference.model
    backbone = weakref.ref(weak.model.layers[0].self_attn.q_proj.weight)
    assert backbone().dtype == torch.uint8
    trainer.train()
    gc.collect()
    assert backbone() is None
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-5)


def test_adapter_that_is_not_trainable_is_said(make_trainer, base, tmp_path):
    trained_adapter(base, METHODS["lora"], tmp_path / "adapter")
    for is_trainable in (False, True):
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", is_trainable=is_trainable
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(model)
        said = [str(entry.message) for entry in caught if "is_trainable=True" in str(entry.message)]
        assert len(said) == (not is_trainable)


# Bad input


def test_adapter_for_another_base_is_refused(make_trainer, make_model, base, tokenizer, tmp_path):
    other = str(tmp_path / "other")
    make_model(seed=1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    trained_adapter(other, METHODS["lora"], tmp_path / "earlier")
    with pytest.raises(ValueError, match=r"is an adapter for '.*other', but the model is one for '.*base'. To use it"):
        make_trainer(base, METHODS["lora"], weak_model=str(tmp_path / "earlier"))


def test_adapter_of_another_method_is_refused(make_trainer, base, tmp_path):
    trained_adapter(base, METHODS["ia3"], tmp_path / "earlier")
    with pytest.raises(ValueError, match=r"cannot be put beside the model's own adapter.*merge it into its base"):
        make_trainer(base, METHODS["lora"], weak_model=str(tmp_path / "earlier"))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_adapter_on_the_lm_head_is_refused(make_trainer, base, tmp_path):
    trained_adapter(base, LoraConfig(r=4, target_modules=["q_proj", "lm_head"]), tmp_path / "earlier")
    with pytest.raises(ValueError, match=r"weak_model=.* has an adapter on the LM head.*merge it into its base"):
        make_trainer(base, METHODS["lora"], weak_model=str(tmp_path / "earlier"))
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):  # SFTTrainer's own
        make_trainer(base, LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))


def test_prompt_learning_as_weak_model_is_refused(make_trainer, base, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "earlier")
    with pytest.raises(ValueError, match="of type PROMPT_TUNING, which adds virtual tokens"):
        make_trainer(base, METHODS["lora"], weak_model=str(tmp_path / "earlier"))


def test_loading_options_that_an_adapter_has_no_use_for_are_refused(make_trainer, base, tmp_path):
    trained_adapter(base, METHODS["lora"], tmp_path / "earlier")
    options = {"weak_model_name_or_path": str(tmp_path / "earlier"), "weak_model_init_kwargs": {"dtype": "bfloat16"}}
    with pytest.raises(ValueError, match=r"`weak_model_init_kwargs` \['dtype'\] do not apply to an adapter"):
        make_trainer(base, METHODS["lora"], **options)


def test_revision_in_a_hub_id(tmp_path):
    for given, expected in ((None, "v2"), ("v2", "v2")):
        init_kwargs = {} if given is None else {"revision": given}
        assert split_revision("org/name@v2", init_kwargs) == "org/name"
        assert init_kwargs == {"revision": expected}
    with pytest.raises(ValueError, match=r"revision 'v2' in its name and 'v1' in `weak_model_init_kwargs`"):
        split_revision("org/name@v2", {"revision": "v1"})
    folder = tmp_path / "run@home"
    folder.mkdir()
    init_kwargs = {}
    assert split_revision(str(folder), init_kwargs) == str(folder)
    assert init_kwargs == {}


def test_full_weak_model_for_an_adapter_run(make_trainer, make_model, base, tokenizer, tmp_path):
    make_model(seed=5).save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    trainer = make_trainer(base, METHODS["lora"], weak_model=str(tmp_path / "full"))
    trainer.train()
    assert not isinstance(trainer.weak_reference.model, PeftModel)
    torch.testing.assert_close(weak_logits(trainer), logits(make_model(seed=5)))
