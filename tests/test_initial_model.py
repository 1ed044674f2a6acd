"""The weak model by default is the model as it was handed in, whatever PEFT does to that when it wraps it."""

import copy

import numpy as np
import peft
import pytest
import torch
from conftest import sums
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, KasaConfig, LoraGAConfig
from transformers import LlamaConfig, LlamaForCausalLM

from wmss_trl import WMSSTrainer
from wmss_trl.weak_model.adapters import DisabledAdapter, NamedAdapter
from wmss_trl.weak_model.frozen import FrozenModel

INPUTS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
PROJECTIONS = ["q_proj", "v_proj"]
EQUALS = 260  # the token " =", which all examples have


def lora(**options):
    return LoraConfig(**{"r": 4, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM", **options})


def tuner(name, **options):
    config = getattr(peft, f"{name}Config")
    return config(**{"target_modules": PROJECTIONS, "task_type": "CAUSAL_LM", **options})


# What PEFT makes of each option, in the order of `effect_on_base`; functions, since LoftQ's asks for SciPy
UNTOUCHED = {
    "lora": lora,
    "no initialisation": lambda: lora(init_lora_weights=False),
    "gaussian": lambda: lora(init_lora_weights="gaussian"),
    "orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "eva": lambda: lora(init_lora_weights="eva"),
    "mica": lambda: lora(init_lora_weights="mica"),
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "lora bias": lambda: lora(lora_bias=True),
    "alora": lambda: lora(alora_invocation_tokens=[EQUALS]),
    "target parameters": lambda: lora(target_parameters=["mlp.gate_proj.weight"]),
    "layers": lambda: lora(layers_to_transform=[1]),
    "saved norm": lambda: lora(modules_to_save=["input_layernorm"]),
    "saved head": lambda: lora(modules_to_save=["lm_head"]),
    "saved head and embeddings": lambda: lora(modules_to_save=["lm_head", "embed_tokens"]),
    "saved tied head": lambda: lora(modules_to_save=["lm_head"], ensure_weight_tying=True),
    "trainable tokens": lambda: lora(trainable_token_indices={"embed_tokens": [5, 6, 7, EQUALS]}),
    "AdaLora": lambda: tuner("AdaLora", total_step=10, tinit=1, tfinal=2),
    "BOFT": lambda: tuner("BOFT", boft_block_size=4),
    "Beft": lambda: tuner("Beft"),
    "C3A": lambda: tuner("C3A", block_size=4),
    "Deft": lambda: tuner("Deft", r=4),
    "Delora": lambda: tuner("Delora", r=4),
    "FourierFT": lambda: tuner("FourierFT", n_frequency=20),
    "HRA": lambda: tuner("HRA", r=4),
    "IA3": lambda: tuner("IA3", feedforward_modules=[]),
    "LNTuning": lambda: tuner("LNTuning", target_modules=["input_layernorm"]),
    "LoHa": lambda: tuner("LoHa", r=4),
    "LoKr": lambda: tuner("LoKr", r=4),
    "Miss": lambda: tuner("Miss", r=4),
    "OFT": lambda: tuner("OFT", oft_block_size=4),
    "OSF": lambda: tuner("OSF"),
    "RandLora": lambda: tuner("RandLora", r=4),
    "Road": lambda: tuner("Road", group_size=4),
    "Shira": lambda: tuner("Shira", r=4),
    "TrainableTokens": lambda: tuner(
        "TrainableTokens", target_modules=["embed_tokens"], token_indices=[5, 6, 7, EQUALS]
    ),
    "VBLoRA": lambda: tuner("VBLoRA", r=4, vector_length=8, num_vectors=16, topk=2),
    "Vera": lambda: tuner("Vera", target_modules=["q_proj"], r=4),
}
MOVED = {
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "pissa_niter": lambda: lora(init_lora_weights="pissa_niter_4"),
    "pissa dora": lambda: lora(init_lora_weights="pissa", use_dora=True),
    "olora": lambda: lora(init_lora_weights="olora"),
    "corda": lambda: lora(init_lora_weights="corda", corda_config=CordaConfig()),
    "lora_ga": lambda: lora(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()),
}
COPIED = {
    "all biases": lambda: lora(bias="all"),
    "biases beside the adapter": lambda: lora(bias="lora_only"),
    "biases of another method": lambda: tuner("Vera", target_modules=["q_proj"], r=4, bias="all"),
    "biases without initialisation": lambda: lora(bias="all", init_lora_weights=False),
    "loftq": lambda: lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4)),
    "replicated layers": lambda: lora(layer_replication=[(0, 2), (1, 2)]),
    "kasa": lambda: lora(kasa_config=KasaConfig()),
}


def skip_what_peft_cannot_do(option):
    pytest.importorskip({"loftq": "scipy", "corda": "attr"}.get(option, "peft"))
    if option == "loftq" and not torch.cuda.is_available():
        pytest.skip("PEFT quantises for LoftQ on a GPU")


@pytest.fixture
def base(tokenizer):
    """A model with biases; its embeddings are not tied, since TRL's fused head cannot take trainable tokens then."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), attention_bias=True, mlp_bias=True, pad_token_id=0, **sizes)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.fixture
def make_trainer(make_args, tokenizer):
    def make(model, peft_config=None, weak_model=None, **kwargs):
        options = {"num_train_epochs": 2, "learning_rate": 1e-2, "active_fraction": 1.0, "plot_curriculum": False}
        return WMSSTrainer(
            model,
            make_args(**options | kwargs),
            train_dataset=Dataset.from_list(sums(8)),
            processing_class=tokenizer,
            peft_config=peft_config,
            weak_model=weak_model,
        )

    return make


def prepare(model, config):
    """What two initialisations need to be done before."""
    if config.peft_type == "LORA" and config.init_lora_weights == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(model, config, run_model=lambda: model(INPUTS))
    if config.peft_type == "LORA" and config.init_lora_weights == "lora_ga":
        for name, module in model.named_modules():
            if name.endswith(tuple(PROJECTIONS)):
                module._peft_loraga_grad = torch.randn_like(module.weight)


@torch.no_grad()
def entropies(model, dataset):
    values = []
    for example in dataset:
        labels = torch.tensor(example["labels"])
        log_probs = model(torch.tensor([example["input_ids"]])).logits[0].double().log_softmax(-1)
        per_token = -(log_probs.exp() * log_probs).sum(-1)
        values.append(per_token[:-1][labels[1:] != -100].mean())
    return torch.stack(values).numpy()


def weak_logits(trainer):
    with trainer.weak_reference.activated() as weak:
        return weak(input_ids=INPUTS).logits


@pytest.mark.parametrize("option", [*UNTOUCHED, *MOVED, *COPIED])
def test_weak_logits_are_those_of_the_model_as_it_was_handed_in(make_trainer, base, option, recwarn):
    skip_what_peft_cannot_do(option)
    config = (UNTOUCHED | MOVED | COPIED)[option]()
    reference = copy.deepcopy(base)
    prepare(base, config)
    with torch.no_grad():
        expected = reference(INPUTS).logits
    trainer = make_trainer(base, config)
    kind = DisabledAdapter if option in UNTOUCHED else NamedAdapter if option in MOVED else FrozenModel
    assert type(trainer.weak_reference) is kind
    torch.testing.assert_close(weak_logits(trainer), expected, rtol=0, atol=1e-5)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    torch.testing.assert_close(weak_logits(trainer), expected, rtol=0, atol=1e-5)
    assert any(not torch.equal(trainer.model.get_parameter(name), value) for name, value in before.items())
    weak_entropy = trainer.curriculum_sampler.weak_entropy
    np.testing.assert_allclose(weak_entropy, entropies(reference, trainer.train_dataset), rtol=1e-5)
    assert option in COPIED or not [w for w in recwarn if "memory of a second base" in str(w.message)]


@pytest.mark.parametrize("option", COPIED)
def test_model_that_is_handed_in_by_name_is_kept_too(make_trainer, base, tokenizer, option, tmp_path):
    skip_what_peft_cannot_do(option)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        expected = base(INPUTS).logits
    with pytest.warns(UserWarning, match="`peft_config` replaces or trains weights of the base"):
        trainer = make_trainer(str(tmp_path / "base"), COPIED[option]())
    torch.testing.assert_close(weak_logits(trainer), expected, rtol=0, atol=1e-5)


def trained_adapter(base, option, folder=None):
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), (UNTOUCHED | MOVED | COPIED)[option]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if folder is not None:
        model.save_pretrained(folder)
    return model.eval()


@pytest.mark.filterwarnings("ignore:The adapter cannot be kept beside itself")
@pytest.mark.parametrize("option", ["trainable tokens", "pissa", *COPIED])
def test_trained_adapter_that_is_handed_in_is_kept(make_trainer, base, option):
    skip_what_peft_cannot_do(option)
    model = trained_adapter(base, option)
    with torch.no_grad():
        expected = model(INPUTS).logits
    trainer = make_trainer(model)
    torch.testing.assert_close(model.eval()(INPUTS).logits, expected, rtol=0, atol=1e-5)
    trainer.train()
    torch.testing.assert_close(weak_logits(trainer), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(model.eval()(INPUTS).logits, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("earlier", "option"), [("all biases", "lora"), ("lora", "all biases"), ("lora", "pissa"), ("pissa", "lora")]
)
def test_earlier_adapter_keeps_a_base_of_its_own_if_one_of_them_changes_it(
    make_trainer, base, tokenizer, earlier, option, tmp_path
):
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        expected = trained_adapter(base, earlier, tmp_path / "earlier")(INPUTS).logits
    trainer = make_trainer(str(tmp_path / "base"), (UNTOUCHED | MOVED | COPIED)[option](), str(tmp_path / "earlier"))
    with torch.no_grad():
        torch.testing.assert_close(trainer.model.eval()(INPUTS).logits, base(INPUTS).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(weak_logits(trainer), expected, rtol=0, atol=1e-5)
    trainer.train()
    torch.testing.assert_close(weak_logits(trainer), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{"train_weak": True}, {"weak_refresh": "epoch"}])
def test_weak_model_that_changes_starts_as_the_model_that_was_handed_in(make_trainer, base, changes):
    with torch.no_grad():
        expected = base(INPUTS).logits
    for option in ("lora", "pissa", "LoHa", "orthogonal"):
        trainer = make_trainer(copy.deepcopy(base), (UNTOUCHED | MOVED)[option](), **changes)
        torch.testing.assert_close(weak_logits(trainer), expected, rtol=0, atol=1e-5)
    for option in ("no initialisation", "FourierFT", "replicated layers"):
        with pytest.raises(ValueError, match=r"needs a weak model that starts as the model that was handed in, but"):
            make_trainer(copy.deepcopy(base), (UNTOUCHED | COPIED)[option](), **changes)
