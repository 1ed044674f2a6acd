import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from wmss_trl.data.arithmetic import generate_problems
from wmss_trl.data.tiny import build_model, build_tokenizer
from wmss_trl.evaluation.generation import greedy_generate

MAX_NEW_TOKENS = 16


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(generate_problems(200)["question"], vocab_size=320)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    model = build_model(tokenizer, hidden_size=32, num_layers=2)
    # Weights this large make the next token depend on the whole prompt.
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8)
    return model


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return generate_problems(9, seed=1)["question"][:]


@torch.no_grad()
def greedy_without_padding(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """Appends the most likely token to the unpadded prompt, over and over, without a cache."""
    token_ids = tokenizer(prompt)["input_ids"]
    completion_ids: list[int] = []
    while len(completion_ids) < MAX_NEW_TOKENS and tokenizer.eos_token_id not in completion_ids:
        logits = model(torch.tensor([token_ids + completion_ids])).logits
        completion_ids.append(int(logits[0, -1].argmax()))
    return completion_ids


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_batches_agree_with_one_prompt_at_a_time(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], batch_size: int
) -> None:
    token_ids = [greedy_without_padding(model.eval(), tokenizer, prompt) for prompt in prompts]
    expected = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    assert len(set(expected)) == len(prompts)
    assert greedy_generate(model, tokenizer, prompts, MAX_NEW_TOKENS, batch_size) == expected


def test_stops_at_every_end_of_sequence_token_of_the_model(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> None:
    token_ids = [greedy_without_padding(model.eval(), tokenizer, prompt) for prompt in prompts]
    stop = token_ids[0][3]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, stop]
    stopped = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in token_ids]
    expected = tokenizer.batch_decode(stopped, skip_special_tokens=True)
    assert greedy_generate(model, tokenizer, prompts, MAX_NEW_TOKENS, batch_size=4) == expected


def test_is_greedy_whatever_the_generation_config_says(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> None:
    expected = greedy_generate(model, tokenizer, prompts, MAX_NEW_TOKENS)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, num_beams=2, top_k=5)
    assert greedy_generate(model, tokenizer, prompts, MAX_NEW_TOKENS) == expected


def test_leaves_model_and_tokenizer_as_they_were(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> None:
    model.train()
    model.model.norm.eval()
    padding_side = tokenizer.padding_side
    greedy_generate(model, tokenizer, prompts[:2], 2)
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.norm.training
    assert tokenizer.padding_side == padding_side


def test_conversations_and_texts(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "user", "content": "2 + 3?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    by_chat, by_text = greedy_generate(model, tokenizer, [chat, text], MAX_NEW_TOKENS)
    assert by_chat == by_text
    assert greedy_generate(model, tokenizer, []) == []
