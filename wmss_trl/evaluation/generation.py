"""Greedy generation for a list of prompts."""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def _tokenize(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]]) -> torch.Tensor:
    if isinstance(prompt, str):
        token_ids = tokenizer(prompt)["input_ids"]
    else:
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        # The template has written the special tokens already.
        token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(token_ids)


@torch.no_grad()
def greedy_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, str]]],
    max_new_tokens: int = 512,
    batch_size: int = 8,
    show_progress: bool = False,
) -> list[str]:
    """
    Completes every prompt greedily, whatever decoding the model's own generation config asks for.

    Args:
        model (`PreTrainedModel`):
            Causal language model. It generates in eval mode; every module gets its own mode back.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the model. Its padding side is neither used nor changed: prompts are padded on the left here.
        prompts (`Sequence[str | list[dict[str, str]]]`):
            Texts, or conversations that end before the assistant's turn (`role` and `content` per message).
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Longest completion, in tokens.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of prompts per batch.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar over the prompts.

    Returns:
        `list[str]` with one completion per prompt, in the order of the prompts, without prompt and special tokens.
    """
    token_ids = [_tokenize(tokenizer, prompt) for prompt in prompts]
    eos_token_id = model.generation_config.eos_token_id
    if eos_token_id is None:
        eos_token_id = tokenizer.eos_token_id
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # Options left out here would be filled in from the model's generation config.
    generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    training_modules = [module for module in model.modules() if module.training]
    completions = [""] * len(token_ids)
    # Longest first: a batch that does not fit in memory fails at once, and neighbours need little padding.
    order = sorted(range(len(token_ids)), key=lambda index: -len(token_ids[index]))
    model.eval()
    try:
        with tqdm(total=len(order), desc="Generating", disable=not show_progress) as progress:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                input_ids = pad_sequence(
                    [token_ids[index] for index in batch],
                    batch_first=True,
                    padding_value=pad_token_id,
                    padding_side="left",
                )
                attention_mask = pad_sequence(
                    [torch.ones_like(token_ids[index]) for index in batch], batch_first=True, padding_side="left"
                )
                output_ids = model.generate(
                    input_ids=input_ids.to(model.device),
                    attention_mask=attention_mask.to(model.device),
                    generation_config=generation_config,
                )
                texts = tokenizer.batch_decode(output_ids[:, input_ids.shape[1] :], skip_special_tokens=True)
                for index, text in zip(batch, texts, strict=True):
                    completions[index] = text
                progress.update(len(batch))
    finally:
        for module in training_modules:
            module.training = True
    return completions
