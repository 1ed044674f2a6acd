"""A tokenizer and a Qwen3 model small enough to be trained from scratch on a CPU."""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

_PAD, _TURN, _EOS = "<|pad|>", "<|im_start|>", "<|im_end|>"
# The generation block lets `assistant_only_loss=True` find the assistant's tokens.
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else -%}{{ message['content'] + '<|im_end|>' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def build_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """
    Trains a byte-level BPE tokenizer in which every digit is a token of its own.

    Args:
        texts (`Iterable[str]`):
            Texts whose frequent byte sequences become tokens.
        vocab_size (`int`, *optional*, defaults to `512`):
            Largest size of the vocabulary, special tokens included. At least 259: 256 bytes and 3 special tokens.

    Returns:
        `PreTrainedTokenizerFast` with the end-of-sequence token `<|im_end|>`, the padding token `<|pad|>`, right
        padding and a ChatML chat template.
    """
    special_tokens = [_PAD, _TURN, _EOS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special_tokens):
        raise ValueError(f"`vocab_size` must be at least {len(alphabet) + len(special_tokens)}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_EOS,
        padding_side="right",
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 128,
    intermediate_size: int = 256,
    num_layers: int = 2,
    num_heads: int = 4,
    num_key_value_heads: int = 2,
    max_length: int = 1024,
    seed: int = 0,
) -> Qwen3ForCausalLM:
    """
    Builds a randomly initialised Qwen3 model with tied embeddings for a tokenizer.

    Args:
        tokenizer (`PreTrainedTokenizerFast`):
            Tokenizer that gives the vocabulary size and the padding and end-of-sequence ids.
        hidden_size (`int`, *optional*, defaults to `128`):
            Width of the hidden states, a multiple of `num_heads`.
        intermediate_size (`int`, *optional*, defaults to `256`):
            Width of the MLPs.
        num_layers (`int`, *optional*, defaults to `2`):
            Number of decoder layers.
        num_heads (`int`, *optional*, defaults to `4`):
            Number of attention heads.
        num_key_value_heads (`int`, *optional*, defaults to `2`):
            Number of key and value heads, a divisor of `num_heads`.
        max_length (`int`, *optional*, defaults to `1024`):
            Longest sequence, in tokens.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. PyTorch's own random state is left as it was.

    Returns:
        `Qwen3ForCausalLM`.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # The model's generation config takes the padding and end-of-sequence ids from this config.
        return Qwen3ForCausalLM(config)
