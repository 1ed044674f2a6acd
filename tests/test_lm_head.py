import copy
import inspect

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from trl import SFTTrainer

from wmss_trl import WMSSTrainer
from wmss_trl.baselines.uniform import UniformModel
from wmss_trl.losses import linear_mixed_cross_entropy, mixed_cross_entropy
from wmss_trl.modeling.lm_head import add_head_access

SIZES = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# What their heads do: nothing special, tied; soft caps; scales; a bias
ARCHITECTURES = {
    "Qwen3ForCausalLM": {"head_dim": 8, "tie_word_embeddings": True},
    "LlamaForCausalLM": {},
    "Gemma2ForCausalLM": {"head_dim": 8, "final_logit_softcapping": 0.5},
    "Gemma3ForCausalLM": {"head_dim": 8, "final_logit_softcapping": 0.3},
    "GraniteForCausalLM": {"logits_scaling": 8.0},
    "CohereForCausalLM": {"logit_scale": 0.0625},
    "PhiForCausalLM": {},
    "GPTNeoXForCausalLM": {},
}


def build(architecture, seed=0):
    cls = getattr(transformers, architecture)
    torch.manual_seed(seed)
    model = cls(cls.config_class(**SIZES | ARCHITECTURES[architecture])).eval()
    with torch.no_grad():  # larger than at initialisation, so that caps and scales matter
        for parameter in model.parameters():
            parameter.mul_(2)
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            model.get_output_embeddings().bias.normal_()
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fused_loss_equals_the_models_own_logits(architecture):
    strong, weak = build(architecture), build(architecture, seed=1)
    inputs = {"input_ids": torch.randint(261, (3, 9), generator=torch.Generator().manual_seed(0))}
    targets = torch.randint(261, (27,), generator=torch.Generator().manual_seed(1))
    targets[::5] = -100
    with torch.no_grad():
        weak_logits = weak(**inputs).logits
    expected = mixed_cross_entropy(strong(**inputs).logits.flatten(0, 1), weak_logits.flatten(0, 1), targets, 0.4)
    parameters = list(strong.parameters())
    expected_grads = torch.autograd.grad(expected, parameters, allow_unused=True)

    for model in (strong, weak):
        assert add_head_access(model) is None
    positions = (targets != -100).nonzero().squeeze(-1)
    with torch.no_grad():
        weak_hidden, weak_head = weak(**inputs, positions=positions, with_lm_head=lambda hidden, head: (hidden, head))[
            "value"
        ]
    assert len(weak_hidden) == len(positions)

    def loss(hidden, head):
        return linear_mixed_cross_entropy(
            hidden,
            head.weight,
            weak_hidden,
            weak_head.weight,
            targets[positions],
            0.4,
            head.bias,
            weak_head.bias,
            strong_scale=head.scale,
            weak_scale=weak_head.scale,
            strong_softcap=head.softcap,
            weak_softcap=weak_head.softcap,
        ).loss

    fused = strong(**inputs, positions=positions, with_lm_head=loss)["value"]
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-6)
    for grad, other in zip(torch.autograd.grad(fused, parameters, allow_unused=True), expected_grads, strict=True):
        if other is not None:
            torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-5)


def test_forward_without_the_argument_is_the_models_own(make_model):
    model = make_model(dropout=0.0).eval()
    inputs = torch.tensor([[5, 6, 7]])
    expected, signature = model(inputs).logits, inspect.signature(model.forward)
    add_head_access(model)
    assert torch.equal(model(inputs).logits, expected)
    assert inspect.signature(model.forward) == signature
    assert model.generate(inputs, max_new_tokens=3, do_sample=False).shape[1] <= 6


class Shifted(transformers.Qwen3ForCausalLM):
    """A head that no option of the config tells of."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * torch.linspace(0.5, 1.5, outputs.logits.size(-1))
        return outputs


def test_unknown_head_is_found_out_and_trained_on_full_logits(make_model, make_args, tokenizer, dataset):
    model = make_model(dropout=0.0)
    model.__class__ = Shifted
    weak = make_model(seed=1, dropout=0.0)
    weak.__class__ = Shifted
    expected = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="because of the model: its logits are not those of its LM head"):
        trainer = WMSSTrainer(
            model,
            make_args(sft_epochs=0, curriculum=False, max_steps=1, train_sampling_strategy="sequential"),
            train_dataset=dataset,
            processing_class=tokenizer,
            weak_model=weak,
        )
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    labels = batch.pop("labels")[:, 1:].flatten()
    with torch.no_grad():
        strong_logits, weak_logits = (m.eval()(**batch).logits[:, :-1].flatten(0, 1) for m in (expected, weak))
    loss = torch.nn.functional.cross_entropy(0.5 * strong_logits + 0.5 * weak_logits, labels)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_model_without_a_backbone_of_its_own_is_found_out(make_model):
    model = make_model()
    model.base_model_prefix = "nothing"
    assert add_head_access(model) == "it has no base model that returns hidden states"
    assert not model.has_head_access


@pytest.mark.parametrize("bf16", [False, True])
def test_known_heads_train_without_full_logits(make_model, make_args, tokenizer, dataset, recwarn, bf16):
    trainer = WMSSTrainer(
        make_model(),
        make_args(num_train_epochs=2, logits_buffer_mb=1, bf16=bf16),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    assert not [warning for warning in recwarn if "full logits" in str(warning.message)]
    projected = []
    for model in (trainer.model, trainer.weak_reference.model):
        model.lm_head.register_forward_hook(lambda module, inputs, output: projected.append(output.shape))
    trainer.train()
    assert projected == []


def test_full_logits_and_fused_runs_agree(make_model, make_args, tokenizer, dataset):
    runs = []
    for full_logits in (False, True):
        trainer = WMSSTrainer(
            make_model(), make_args(num_train_epochs=2), train_dataset=dataset, processing_class=tokenizer
        )
        trainer._full_logits = full_logits
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-5)


def test_uniform_model_has_a_head(make_model):
    weak = UniformModel(make_model().config)
    assert add_head_access(weak) is None


def test_trl_patches_the_forward_of_the_base_model():
    """`add_head_access` goes on top of TRL's fused head, and `frozen_copy` takes both off again."""
    source = inspect.getsource(SFTTrainer.__init__)
    assert "self.model.get_base_model() if is_peft_model(self.model) else self.model" in source
    assert "add_fused_lm_head(" in source


MIXTURE_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "moe_k": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Before transformers 5.18 the loss of these is 0, and Doge does not run
RIGHT_SINCE_5_18 = ("Dbrx", "Doge", "GraniteMoe")
FULL_ATTENTION = {"layer_types": ["full_attention"] * 2}
# The causal language models of transformers 5.23 with router losses, and what their tiny forms need; without Flint,
# GLM 5 and Qwen 4, which share Mixtral's function with most of these
MIXTURES = {
    "DbrxForCausalLM": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "rope_theta": 1e4,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    },
    "DeepseekV4ForCausalLM": {"mlp_layer_types": ["moe"] * 2, "layer_types": ["sliding_attention"] * 2},
    "DogeForCausalLM": {"is_moe": True, "num_experts": 16},
    "Ernie4_5_MoeForCausalLM": {},
    "FlexOlmoForCausalLM": {},
    "GptOssForCausalLM": {},
    "GraniteMoeForCausalLM": {},
    "GraniteMoeHybridForCausalLM": {"mamba_n_heads": 4, "layer_types": ["attention"] * 2},
    "GraniteMoeSWAForCausalLM": {},
    "GraniteMoeSharedForCausalLM": {},
    "JambaForCausalLM": {
        "attn_layer_period": 1,
        "attn_layer_offset": 0,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
    },
    "JetMoeForCausalLM": {},
    "LagunaForCausalLM": {},
    "MellumForCausalLM": {},
    "MiniMaxForCausalLM": {},
    "MiniMaxM2ForCausalLM": {},
    "MixtralForCausalLM": {},
    "OlmoeForCausalLM": {},
    "PhimoeForCausalLM": {},
    "Qwen2MoeForCausalLM": {},
    "Qwen3MoeForCausalLM": {},
    "Qwen3NextForCausalLM": FULL_ATTENTION,
    "Qwen3_5MoeForCausalLM": FULL_ATTENTION,
    "Qwen3_5MoeForConditionalGeneration": FULL_ATTENTION,
    "Qwen3VLMoeForConditionalGeneration": {},
}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
VISION |= {"num_position_embeddings": 16, "deepstack_visual_indexes": []}


def build_mixture(architecture):
    cls = getattr(transformers, architecture)
    options = cls.config_class().get_text_config().to_dict()
    sizes = {option: size for option, size in MIXTURE_SIZES.items() if option in options} | MIXTURES[architecture]
    if cls.config_class().get_text_config().model_type == cls.config_class.model_type:
        config = cls.config_class(**sizes)
    else:
        config = cls.config_class(text_config=sizes, vision_config=VISION)
    torch.manual_seed(0)
    return cls(config).eval()


@pytest.mark.parametrize("architecture", MIXTURES)
def test_router_loss_is_the_models_own(architecture):
    if Version(transformers.__version__) < Version("5.18") and architecture.startswith(RIGHT_SINCE_5_18):
        pytest.skip("has no router loss in this version of transformers")
    model = build_mixture(architecture)
    inputs = {"input_ids": torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))}
    if architecture != "DogeForCausalLM":  # whose own function cannot take a mask
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, 5:] = 0
    with torch.no_grad():
        expected = model(**inputs, output_router_logits=True).aux_loss
        assert expected > 0.1
        assert add_head_access(model) is None
        output = model(**inputs, output_router_logits=True, positions=torch.arange(3))
    torch.testing.assert_close(output["aux_loss"], expected, rtol=0, atol=1e-6)
