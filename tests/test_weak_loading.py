"""Loading weak models by name: their class, their tokenizer, and names that lead nowhere."""

import re
import shutil

import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, Qwen3_5Config, Qwen3_5ForConditionalGeneration
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from wmss_trl import WMSSTrainer
from wmss_trl.data.tiny import build_tokenizer
from wmss_trl.weak_model.loading import load_weak_model
from wmss_trl.weak_model.ranking import rank_weak_models

INPUTS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def make_trainer(make_args, dataset, tokenizer):
    def make(model, weak_model=None, **kwargs):
        return WMSSTrainer(
            model, make_args(**kwargs), train_dataset=dataset, processing_class=tokenizer, weak_model=weak_model
        )

    return make


@pytest.fixture
def base(make_model, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def multimodal(tokenizer, tmp_path):
    """A model that also sees images, which `AutoModelForCausalLM` would load without."""
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    text |= {"layer_types": ["full_attention"] * 2}
    torch.manual_seed(0)
    config = Qwen3_5Config(text_config=text, vision_config=vision | {"num_position_embeddings": 16})
    Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path / "multimodal")
    tokenizer.save_pretrained(tmp_path / "multimodal")
    return str(tmp_path / "multimodal")


def test_weak_model_is_of_the_class_that_trl_loads_the_strong_one_with(make_trainer, multimodal):
    """Only then can it be replaced by the strong model, whose names have to be the same."""
    trainer = make_trainer(multimodal, multimodal, weak_refresh="epoch", num_train_epochs=2)
    assert type(trainer.weak_reference.model) is type(trainer.model) is Qwen3_5ForConditionalGeneration
    with trainer.weak_reference.activated() as weak:
        torch.testing.assert_close(weak(INPUTS).logits, trainer.model.eval()(INPUTS).logits)
    trainer.train()
    assert "mixed_nll" in trainer.state.log_history[-2]


def test_text_model_has_a_text_model_as_weak_model(multimodal):
    strong = AutoModelForCausalLM.from_pretrained(multimodal)
    assert not isinstance(strong, Qwen3_5ForConditionalGeneration)
    assert type(load_weak_model(multimodal, strong)) is type(strong)


def put_on_the_hub(folder, name, revision, cache):
    """The files of a repository as `huggingface_hub` keeps those that it has downloaded."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(revision)


def test_cache_dir_holds_for_the_tokenizer_too(make_trainer, make_model, base, tokenizer, tmp_path):
    other = build_tokenizer(["something else than sums " * 3], vocab_size=len(tokenizer))
    make_model().save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    put_on_the_hub(tmp_path / "other", "org/other", "v1", tmp_path / "cache")
    options = {"weak_model_init_kwargs": {"cache_dir": str(tmp_path / "cache")}}
    with pytest.raises(ValueError, match=r"`weak_model` has another tokenizer: \d+ token ids"):
        make_trainer(base, weak_model_name_or_path="org/other@v1", **options)


def test_missing_tokenizer_is_said(make_trainer, make_model, base, tmp_path):
    make_model().save_pretrained(tmp_path / "bare")
    with pytest.warns(UserWarning, match=r"tokenizer of `weak_model='.*bare'` cannot be loaded .* only the sizes"):
        make_trainer(base, str(tmp_path / "bare"))


def test_ranking_knows_revisions(make_model, base, tokenizer, monkeypatch, tmp_path):
    for seed in (1, 2):
        make_model(seed=seed).save_pretrained(tmp_path / str(seed))
        tokenizer.save_pretrained(tmp_path / str(seed))
        put_on_the_hub(tmp_path / str(seed), "org/weak", f"v{seed}", tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    examples = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 3)
    strong, collator = AutoModelForCausalLM.from_pretrained(base), DataCollatorForLanguageModeling(0)
    found = rank_weak_models(strong, ["org/weak@v1", "org/weak@v2"], examples, collator, tokenizer)
    folders = rank_weak_models(strong, [str(tmp_path / "1"), str(tmp_path / "2")], examples, collator, tokenizer)
    by_name = {result.name[-1]: result.weak_entropy for result in folders}
    assert {result.name for result in found} == {"org/weak@v1", "org/weak@v2"}
    for result in found:
        assert result.weak_entropy == by_name[result.name[-1]]


# Bad input


@pytest.mark.parametrize("place", ["missing_folder", "runs/missing/folder", "/missing/folder", "./missing"])
def test_missing_folder_is_named(make_trainer, base, place):
    message = re.escape(f"`weak_model={place!r}` is not a folder here, nor can it be had from the Hub")
    with pytest.raises(ValueError, match=message + r".*Pass the folder of a checkpoint or a hub id"):
        make_trainer(base, weak_model_name_or_path=place)


def test_folder_without_a_model_is_named(make_trainer, base, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"`weak_model='.*empty'` is not the folder of a model or of an adapter"):
        make_trainer(base, str(tmp_path / "empty"))


@pytest.mark.parametrize("weak_model", [5, ["a"], True])
def test_something_else_than_a_model_is_named(make_trainer, base, weak_model):
    message = re.escape(f"`weak_model={weak_model!r}` is neither a name nor a model")
    with pytest.raises(ValueError, match=message):
        make_trainer(base, weak_model)
