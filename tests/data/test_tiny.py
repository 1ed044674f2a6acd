from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from wmss_trl.data.arithmetic import generate_problems
from wmss_trl.data.tiny import build_model, build_tokenizer

CHAT = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(generate_problems(200)["question"], vocab_size=320)


def test_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 320
    assert None not in (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    with pytest.raises(ValueError, match="259"):
        build_tokenizer([], vocab_size=100)


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    # Even numbers that fill the training text do not become one token.
    often = build_tokenizer(["2024 2024"] * 100, vocab_size=320)
    for tokens in (tokenizer.tokenize("2024 - 7 = 2017"), often.tokenize("2024 - 7 = 2017")):
        assert [token for token in tokens if any(map(str.isdigit, token))] == list("202472017")


@pytest.mark.parametrize(
    "text", ["Ada has 3 + 4 = 7 apples.", "  two  spaces\n\tand\ttabs ", "naïve π ≈ 3,14 苹果 🍎", ""]
)
def test_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_training_is_deterministic(tokenizer: PreTrainedTokenizerFast) -> None:
    again = build_tokenizer(generate_problems(200)["question"], vocab_size=320)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    full = tokenizer.apply_chat_template(CHAT, tokenize=False)
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\n2 + 3?<|im_end|><|im_start|>assistant\n"
    assert full == f"{prompt}5{tokenizer.eos_token}"


def test_model_is_seeded_and_leaves_the_random_state_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second, other = (build_model(tokenizer, hidden_size=32, num_layers=1, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_model_saves_and_loads(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = build_model(tokenizer, hidden_size=32, num_layers=2).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for config in (loaded.config, loaded.generation_config):
        assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded_tokenizer.chat_template == tokenizer.chat_template
    inputs = loaded_tokenizer("Ada has 3 apples.", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("assistant_only_loss", [False, True])
def test_trainer_takes_chat_data(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, assistant_only_loss: bool
) -> None:
    args = SFTConfig(
        output_dir=str(tmp_path),
        assistant_only_loss=assistant_only_loss,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        use_cpu=True,
    )
    trainer = SFTTrainer(
        build_model(tokenizer, hidden_size=32, num_layers=1),
        args,
        train_dataset=Dataset.from_list([{"messages": CHAT}]),
        processing_class=tokenizer,
    )
    labels = [token for token in trainer.train_dataset[0]["labels"] if token != -100]
    expected = (
        f"5{tokenizer.eos_token}" if assistant_only_loss else tokenizer.apply_chat_template(CHAT, tokenize=False)
    )
    assert tokenizer.decode(labels) == expected
