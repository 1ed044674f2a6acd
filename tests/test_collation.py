"""Data collators of the user's, in scoring and with the cache of hidden states."""

import random

import numpy as np
import pytest
import torch
from conftest import losses
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from wmss_trl import WMSSTrainer, score_entropy
from wmss_trl.scoring.collation import collated_sample


class MaskingCollator(DataCollatorForLanguageModeling):
    """Supervises the last two tokens of each example only."""

    masking = True

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        if self.masking:
            for row, example in zip(batch["labels"], examples, strict=True):
                row[: len(example["input_ids"]) - 2] = -100
        return batch


class RandomCollator(DataCollatorForLanguageModeling):
    """Replaces some tokens by others and leaves the labels as they are."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        noise = torch.rand(batch["input_ids"].shape) < 0.3
        batch["input_ids"][noise] = torch.randint(3, 200, (int(noise.sum()),))
        return batch


class SameCollator(DataCollatorForLanguageModeling):
    """Changes nothing."""


@pytest.fixture
def make_trainer(make_model, make_args, tokenizer, dataset):
    def make(collator, **kwargs):
        return WMSSTrainer(
            make_model(dropout=0.0),
            make_args(**{"num_train_epochs": 1, "sft_epochs": 0, **kwargs}),
            data_collator=collator,
            train_dataset=dataset,
            processing_class=tokenizer,
            weak_model=make_model(seed=3, dropout=0.0),
        )

    return make


def brute_force_entropy(model, ids, positions):
    with torch.no_grad():
        logits = model.double().eval()(input_ids=torch.tensor([ids])).logits[0]
    entropies = [torch.distributions.Categorical(logits=logits[t - 1]).entropy().item() for t in positions]
    return sum(entropies) / len(entropies)


def test_scores_are_of_the_tokens_that_the_collator_supervises(make_trainer, make_model, tokenizer):
    trainer = make_trainer(MaskingCollator(tokenizer.pad_token_id))
    table = trainer.score_table()
    for entropies, seed in ((table.strong_entropy, 0), (table.weak_entropy, 3)):
        model = make_model(seed=seed)
        for i in (0, 7, 36):
            ids = trainer.train_dataset[i]["input_ids"]
            expected = brute_force_entropy(model, ids, (len(ids) - 2, len(ids) - 1))
            assert entropies[i] == pytest.approx(expected, abs=1e-5)


def test_scores_of_another_collator_are_not_taken_from_the_disk(make_trainer, tokenizer):
    plain = make_trainer(None).score_table().strong_entropy
    masked = make_trainer(MaskingCollator(tokenizer.pad_token_id)).score_table().strong_entropy
    assert np.abs(masked - plain).max() > 1e-4
    np.testing.assert_allclose(make_trainer(SameCollator(tokenizer.pad_token_id)).score_table().strong_entropy, plain)


@pytest.mark.parametrize("lambda_schedule", ["constant", "crossover"])
def test_a_collator_of_transformers_gets_the_columns_that_training_gives_it(make_trainer, tokenizer, lambda_schedule):
    """Those of text, which no collator can pad, are not among them."""
    runs = []
    for collator in (DataCollatorForSeq2Seq(tokenizer), None):
        trainer = make_trainer(collator, lambda_schedule=lambda_schedule)
        assert "prompt" in trainer.train_dataset.column_names
        trainer.train()
        runs.append(losses(trainer))
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-5)


def test_a_collator_sees_the_columns_that_training_keeps(make_trainer, tokenizer):
    seen = set()

    class Collator(DataCollatorForLanguageModeling):
        def torch_call(self, examples):
            seen.update(examples[0])
            return super().torch_call(examples)

    make_trainer(Collator(tokenizer.pad_token_id), remove_unused_columns=False).score_table()
    assert {"prompt", "completion", "input_ids", "labels"} <= seen


def test_the_cache_with_a_collator_that_changes_nothing(make_trainer, tokenizer, tmp_path):
    runs = []
    for weak_cache in (None, "hidden"):
        collator = SameCollator(tokenizer.pad_token_id)
        trainer = make_trainer(collator, weak_cache=weak_cache, output_dir=str(tmp_path / str(weak_cache)))
        trainer.train()
        runs.append(losses(trainer))
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-5)


def test_the_cache_refuses_a_collator_that_changes_the_labels(make_trainer, tokenizer):
    with pytest.raises(
        ValueError, match=r"`data_collator` \(MaskingCollator\) changes their number: .*`weak_cache=None`"
    ):
        make_trainer(MaskingCollator(tokenizer.pad_token_id), weak_cache="hidden")


def test_the_cache_refuses_a_collator_that_draws_at_random(make_trainer, tokenizer):
    with pytest.raises(
        ValueError, match=r"`data_collator` \(RandomCollator\) makes another batch .*`weak_cache=None`"
    ):
        make_trainer(RandomCollator(tokenizer.pad_token_id), weak_cache="hidden")
    make_trainer(RandomCollator(tokenizer.pad_token_id)).train()


@pytest.mark.parametrize("changes_in", ["scoring", "training"])
def test_a_collator_that_changes_later_is_found_out(make_trainer, tokenizer, changes_in):
    collator = MaskingCollator(tokenizer.pad_token_id)
    collator.masking = False
    trainer = make_trainer(collator, weak_cache="hidden")
    if changes_in == "training":
        trainer._selection.fill_hidden_cache()
        trainer._selection.score()
    collator.masking = True
    with pytest.raises(ValueError, match=r"hidden states for .* supervised positions: `data_collator` has changed"):
        trainer.train()


def test_examples_that_the_collator_leaves_without_a_label_are_named(make_trainer, tokenizer):
    class Collator(DataCollatorForLanguageModeling):
        def torch_call(self, examples):
            batch = super().torch_call(examples)
            batch["labels"][batch["attention_mask"].sum(-1) == 28] = -100
            return batch

    trainer = make_trainer(Collator(tokenizer.pad_token_id))
    empty = [i for i, ids in enumerate(trainer.train_dataset["input_ids"]) if len(ids) == 28]
    assert empty
    with pytest.raises(
        ValueError, match=r"The data collator .*Collator leaves the examples \[\d+.* without a supervised"
    ):
        trainer.train()


def test_rows_without_padding_must_be_those_of_the_examples(make_model, tokenizer):
    class Truncating(DataCollatorForLanguageModeling):
        def torch_call(self, examples):
            return super().torch_call([{"input_ids": example["input_ids"][:-1]} for example in examples])

    class Longer(DataCollatorForLanguageModeling):
        def torch_call(self, examples):
            return super().torch_call([{"input_ids": [5, *example["input_ids"]]} for example in examples])

    class TwoRows(DataCollatorForLanguageModeling):
        def torch_call(self, examples):
            return super().torch_call(
                [{"input_ids": row} for example in examples for row in [example["input_ids"]] * 2]
            )

    dataset = Dataset.from_dict({"input_ids": [[3, 4, 5, 6], [7, 8, 9], [3, 5, 7]]})
    for collator in (
        Truncating(tokenizer.pad_token_id, padding_free=True),
        Longer(tokenizer.pad_token_id, padding_free=True),
        TwoRows(tokenizer.pad_token_id),
    ):
        with pytest.raises(ValueError, match=r"makes labels of shape .* from the 3 examples .* cannot be told apart"):
            score_entropy(make_model(), dataset, collator, disable_tqdm=True)


def test_packing_with_a_collator_is_refused_as_by_sfttrainer(make_trainer, tokenizer):
    with pytest.raises(ValueError, match="custom data collator is not supported when using padding-free"):
        make_trainer(SameCollator(tokenizer.pad_token_id), packing=True, max_length=40)


def test_looking_at_a_collator_leaves_the_random_state(tokenizer):
    dataset = Dataset.from_dict({"input_ids": [[3, 4, 5, 6], [7, 8, 9], [3, 5, 7]]})
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    collator = RandomCollator(tokenizer.pad_token_id)
    hashes = [collated_sample(collator, dataset, np.arange(3), 2, seed)[0] for seed in (0, 1, 0)]
    assert hashes[0] == hashes[2] != hashes[1]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    np.testing.assert_array_equal(np.random.get_state()[1], states[2])
