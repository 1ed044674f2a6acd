import numpy as np
import pytest
import torch
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from wmss_trl import score_entropy
from wmss_trl.lm_head import add_head_access
from wmss_trl.scoring import supervised_token_counts


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
