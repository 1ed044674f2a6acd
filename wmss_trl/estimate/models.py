"""Shapes and sizes of models, from their configuration alone."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

_SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Published shapes, in the order of _SHAPE, and whether the embeddings are tied; all have 8 key-value heads of size 128
PRESETS = {
    "qwen3-0.6b": (1024, 3072, 28, 16, 151_936, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, 151_936, True),
    "qwen3-4b": (2560, 9728, 36, 32, 151_936, True),
    "qwen3-8b": (4096, 12_288, 36, 32, 151_936, False),
    "qwen3-32b": (5120, 25_600, 64, 64, 151_936, False),
    "llama-3-8b": (4096, 14_336, 32, 32, 128_256, False),
    "llama-3-70b": (8192, 28_672, 80, 64, 128_256, False),
}


def load_config(model: str) -> PreTrainedConfig:
    """Configuration of a preset (built here, nothing is downloaded), of a folder or of a model on the Hub."""
    if model in PRESETS:
        *shape, tied = PRESETS[model]
        cls = Qwen3Config if model.startswith("qwen3") else LlamaConfig
        shape = dict(zip(_SHAPE, shape, strict=True))
        return cls(**shape, num_key_value_heads=8, head_dim=128, tie_word_embeddings=tied)
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model={model!r}` is neither a preset ({', '.join(PRESETS)}) nor the folder or hub id of a model. Use "
            "one of these."
        ) from error


@dataclass(frozen=True)
class ModelSize:
    """
    What the estimates need to know of a model. Parameters are counted, each once.

    Args:
        total, layers, head (`int`):
            Parameters of the whole model, of all decoder layers, and of the LM head. A tied head is the embedding.
        num_layers, hidden, intermediate, query, key_value, vocab (`int`):
            Number of layers, and widths of hidden states, MLP, queries (all heads), keys (all heads) and logits.
        qk_norm (`bool`):
            Whether queries and keys are normalised, as in Qwen3.
        linear_features (`int`):
            Inputs plus outputs of the linear layers, summed over those of the decoder layers.
    """

    total: int
    layers: int
    head: int
    num_layers: int
    hidden: int
    intermediate: int
    query: int
    key_value: int
    vocab: int
    qk_norm: bool
    linear_features: int

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> "ModelSize":
        """Count the parameters of a dense decoder by building it on the meta device."""
        if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
            raise ValueError(
                f"`model` is a mixture of experts ({config.model_type}), which activates only some of its parameters. "
                "The estimates are for dense decoders: use one of these."
            )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        layers = next(module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        key_value_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return cls(
            total=sum(parameter.numel() for parameter in model.parameters()),
            layers=sum(parameter.numel() for parameter in layers.parameters()),
            head=model.get_output_embeddings().weight.numel(),
            num_layers=len(layers),
            hidden=config.hidden_size,
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            query=config.num_attention_heads * head_dim,
            key_value=key_value_heads * head_dim,
            vocab=config.vocab_size,
            qk_norm=any(name.endswith("q_norm") for name, _ in layers.named_modules()),
            linear_features=sum(sum(m.weight.shape) for m in layers.modules() if isinstance(m, nn.Linear)),
        )

    def forward_flops(self, tokens: int, length: int) -> int:
        """FLOPs of a forward over `tokens` tokens in examples of `length`: 2 per parameter of the matrix products
        (Kaplan et al., arXiv 2001.08361), and causal attention. That sees half of the example on average."""
        return 2 * tokens * (self.layers + self.head + length * self.query * self.num_layers)
