import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from wmss_trl import WMSSTrainer, score_entropy
from wmss_trl.modeling.lm_head import add_head_access
from wmss_trl.scoring.dataset import dataset_fingerprint, length_batches, supervised_token_counts
from wmss_trl.scoring.entropy import score_models


def tokenized(num_examples=23, seed=0):
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(num_examples):
        ids = rng.integers(3, 200, size=rng.integers(3, 40)).tolist()
        prompt = int(rng.integers(1, len(ids)))
        examples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(examples)


@pytest.fixture
def collator(tokenizer):
    return DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)


def brute_force_entropy(model, example):
    """One example without padding, token by token, in float64."""
    ids = torch.tensor([example["input_ids"]])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[0].double()
    entropies = [
        torch.distributions.Categorical(logits=logits[t - 1]).entropy().item()
        for t in range(1, ids.size(1))
        if example["labels"][t] != -100
    ]
    return sum(entropies) / len(entropies)


def make_scaled(make_model):
    """An untrained model is uniform everywhere, which would hide a wrong alignment."""
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_score_is_the_mean_entropy_of_the_supervised_tokens(make_model, collator, batch_size, tiled):
    model, dataset = make_scaled(make_model), tokenized()
    if tiled:
        add_head_access(model)
        model.lm_head.register_forward_hook(lambda *_: pytest.fail("built full logits"))
    scores = score_entropy(model, dataset, collator, batch_size, disable_tqdm=True, buffer_bytes=2 * 261 * 4 * 10)
    model = make_scaled(make_model)
    expected = [brute_force_entropy(model, example) for example in dataset]
    assert scores.dtype == np.float32
    assert np.std(expected) > 0.01
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("tokens_per_batch", [1, 70, 10_000])
@pytest.mark.parametrize("pad_to_multiple_of", [None, 16])
def test_padding_free_batches_give_the_same_scores(make_model, tokenizer, tokens_per_batch, tiled, pad_to_multiple_of):
    model, dataset = make_scaled(make_model), tokenized()
    if tiled:
        add_head_access(model)
    collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id, True, pad_to_multiple_of=pad_to_multiple_of)
    scores = score_entropy(model, dataset, collator, tokens_per_batch=tokens_per_batch, disable_tqdm=True)
    expected = [brute_force_entropy(make_scaled(make_model), example) for example in dataset]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens_per_batch", [5, 100, 1000])
def test_batches_keep_their_budget_and_cover_every_example(tokens_per_batch):
    lengths = np.random.default_rng(0).integers(1, 60, size=200)
    batches = length_batches(lengths, tokens_per_batch=tokens_per_batch)
    assert sorted(np.concatenate(batches)) == list(range(200))
    sizes = [len(batch) * lengths[batch].max() for batch in batches]
    assert all(size <= tokens_per_batch or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True))
    first = [lengths[batch].max() for batch in batches]
    assert first == sorted(first, reverse=True)


def test_padding_wastes_less_than_5_percent_on_a_log_normal_length_mix():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1, size=20_000), 8, 4096).astype(int)
    batches = length_batches(lengths, tokens_per_batch=8 * 4096)
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded / lengths.sum() < 1.05


def test_several_models_share_the_batches(make_model, tokenizer):
    dataset, calls = tokenized(), []
    weak, strong = make_model(seed=1), make_scaled(make_model)
    pad = DataCollatorForLanguageModeling(tokenizer.pad_token_id)

    def collator(examples):
        calls.append(len(examples))
        return pad(examples)

    models = {"weak": lambda: nullcontext(weak), "strong": lambda: nullcontext(strong)}
    scores = score_models(models, dataset, collator, 4, disable_tqdm=True)
    assert sum(calls) == len(dataset)
    for name, model in (("weak", weak), ("strong", strong)):
        expected = score_entropy(model, dataset, pad, 4, disable_tqdm=True)
        np.testing.assert_array_equal(scores[name], expected)


def test_an_interrupted_pass_goes_on_from_its_last_shard(make_model, collator, monkeypatch):
    monkeypatch.setattr("wmss_trl.scoring.entropy._ROUNDS_PER_SHARD", 2)
    model, dataset = make_scaled(make_model), tokenized()
    expected = score_entropy(model, dataset, collator, 3, disable_tqdm=True)
    kept, collated = [], []

    def stop_after_the_second(entropies):
        kept.append(entropies["model"].copy())
        if len(kept) == 2:
            raise KeyboardInterrupt

    models = {"model": lambda: nullcontext(model)}
    with pytest.raises(KeyboardInterrupt):
        score_models(models, dataset, collator, 3, disable_tqdm=True, on_progress=stop_after_the_second)
    assert np.isnan(kept[-1]).sum() == 23 - 2 * 2 * 3
    scores = score_models(
        models,
        dataset,
        lambda examples: collated.extend(examples) or collator(examples),
        3,
        disable_tqdm=True,
        known={"model": kept[-1]},
    )
    assert len(collated) == np.isnan(kept[-1]).sum()
    np.testing.assert_array_equal(scores["model"], expected)


def test_half_precision_scores_are_close(make_model, collator):
    """The tolerance that docs/curriculum.md gives for bfloat16."""
    dataset = tokenized(100)
    exact = score_entropy(make_scaled(make_model), dataset, collator, disable_tqdm=True)
    model = make_scaled(make_model)
    add_head_access(model)
    for batch_size in (1, 16):
        with torch.autocast("cpu", torch.bfloat16):
            scores = score_entropy(model, dataset, collator, batch_size, disable_tqdm=True)
        np.testing.assert_allclose(scores, exact, rtol=0.005)
        assert np.abs(scores - exact).max() > 1e-5


def test_fingerprint_follows_the_tokens_and_the_labels():
    dataset = tokenized()
    same = Dataset.from_list(list(dataset)).add_column("text", ["x"] * 23)
    assert dataset_fingerprint(same) == dataset_fingerprint(dataset)
    changed = [
        dataset.select(range(22)),
        dataset.select(reversed(range(23))),
        dataset.map(lambda example: {"labels": [*example["labels"][:-1], 7]}),
        dataset.map(lambda example: {"labels": example["input_ids"]}),
        dataset.map(lambda example: {"input_ids": example["input_ids"][:20], "labels": example["labels"][:20]}),
        # The same tokens in examples of other lengths
        Dataset.from_dict({"input_ids": [[1, 2], [3]]}),
        Dataset.from_dict({"input_ids": [[1], [2, 3]]}),
    ]
    assert len({dataset_fingerprint(other) for other in [dataset, *changed]}) == 8


class ScoreEveryStep(TrainerCallback):
    """Scores with a collator that uses every random generator there is."""

    def __init__(self, dataset, collator):
        self.dataset, self.collator = dataset, collator

    def on_step_end(self, args, state, control, model=None, **kwargs):
        def collate(examples):
            random.random(), np.random.rand(), torch.rand(1)
            return self.collator(examples)

        score_entropy(model, self.dataset, collate, disable_tqdm=True)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_training_with_scoring_passes_equals_training_without(
    make_model, make_args, tokenizer, dataset, collator, activation_checkpointing
):
    runs = []
    for callbacks in ([], [ScoreEveryStep(tokenized(), collator)]):
        args = make_args(
            num_train_epochs=1, curriculum=False, sft_epochs=0, gradient_checkpointing=activation_checkpointing
        )
        model = make_model(dropout=0.3)
        trainer = WMSSTrainer(
            model,
            args,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            weak_model=make_model(1),
        )
        trainer.train()
        runs.append(trainer)
    assert [entry.get("loss") for entry in runs[0].state.log_history] == [
        entry.get("loss") for entry in runs[1].state.log_history
    ]
    for parameter, expected in zip(runs[1].model.parameters(), runs[0].model.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_scoring_leaves_no_trace(make_model, collator):
    model = make_model(dropout=0.5)
    model.train()
    model.model.layers[0].eval()  # a submodule with a mode of its own
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    score_entropy(model, tokenized(), collator, disable_tqdm=True)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_modes_come_back_after_an_error(make_model, collator):
    model = make_model().train()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"examples 0 \(nan\), 1 \(nan\)"):
        score_entropy(model, tokenized(2), collator, disable_tqdm=True)
    assert model.training


def test_token_counts_follow_the_causal_shift():
    dataset = Dataset.from_list(
        [
            {"input_ids": [1, 2, 3], "labels": [1, 2, 3]},  # the first label is never predicted
            {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]},
            {"input_ids": [1, 2], "labels": [1, -100]},
            {"input_ids": [], "labels": []},
            {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4]},
        ]
    )
    assert supervised_token_counts(dataset).tolist() == [2, 1, 0, 0, 2]
    assert supervised_token_counts(dataset.select([4, 0])).tolist() == [2, 2]
    assert supervised_token_counts(dataset.remove_columns("labels")).tolist() == [2, 2, 1, 0, 3]
