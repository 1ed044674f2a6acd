"""A weak model that knows nothing. As a control it shows what the knowledge of a real weak model is worth."""

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput


class _NoStates(nn.Module):
    def forward(self, input_ids: torch.Tensor, **kwargs) -> BaseModelOutput:
        return BaseModelOutput(torch.zeros(*input_ids.shape, 1, device=input_ids.device))


class UniformModel(nn.Module):
    """
    Causal language model whose logits are all 0.

    As `weak_model` it turns the mixed loss into `CE(lambda * z_strong)`, the cross-entropy at temperature `1 /
    lambda`: gradients come back without any weak model. Combine it with `curriculum=False`: its entropies say nothing.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the strong model, for its vocabulary size.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.base_model = _NoStates()
        # One column of zeros: a head of the right size for next to no memory
        self.lm_head = nn.Linear(1, config.get_text_config().vocab_size, bias=False)
        nn.init.zeros_(self.lm_head.weight)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor, **kwargs) -> CausalLMOutput:
        zero = self.lm_head.weight.new_zeros(())
        return CausalLMOutput(logits=zero.expand(*input_ids.shape, self.lm_head.out_features))
