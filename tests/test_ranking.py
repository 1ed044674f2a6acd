import copy
import json

import numpy as np
import pytest
import torch
from conftest import sums
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from wmss_trl import WMSSTrainer
from wmss_trl.cli.main import main
from wmss_trl.weak_model.ranking import Separation, expand_candidates, markdown_ranking, rank_weak_models, separation


def scaled(model, factor):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


@pytest.fixture
def checkpoints(make_model, tokenizer, tmp_path):
    """A strong model and, in one folder, a copy of it and two flatter ones."""
    models = {"strong": scaled(make_model(), 3)}
    for step, model in ((20, copy.deepcopy(models["strong"])), (3, make_model()), (100, scaled(make_model(), 2))):
        models[f"run/checkpoint-{step}"] = model
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return {name: model.eval() for name, model in models.items()}


@pytest.fixture
def tokenized(make_model, make_args, tokenizer, dataset):
    return WMSSTrainer(make_model(), make_args(), train_dataset=dataset, processing_class=tokenizer).train_dataset


@pytest.mark.parametrize("buffer_bytes", [1, 2**28])
def test_separation_equals_token_by_token_float64(checkpoints, tokenized, tokenizer, buffer_bytes):
    strong, weak = checkpoints["strong"], checkpoints["run/checkpoint-100"]
    entropies, norms, hard, count = ([], []), [0.0, 0.0], 0.0, 0
    for example in tokenized:
        ids = torch.tensor([example["input_ids"]])
        with torch.no_grad():
            z = [model(ids).logits[0].double() for model in (strong, weak)]
        positions = [t for t in range(1, ids.size(1)) if example["labels"][t] != -100]
        for i in range(2):
            rows = [z[i][t - 1] for t in positions]
            entropies[i].append(np.mean([torch.distributions.Categorical(logits=row).entropy() for row in rows]))
            norms[i] += sum((row - row.mean()).norm().item() for row in rows)
        for t in positions:
            y = example["labels"][t]
            margins = [z[i][t - 1][y] - z[i][t - 1] for i in range(2)]
            smaller = (margins[1] < margins[0]).sum().item()  # the target's own margin is 0 in both
            hard += smaller / (len(margins[0]) - 1)
            count += 1
    collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id)
    columns = tokenized.select_columns(["input_ids", "labels"])
    result = separation(strong, weak, columns, collator, tokens_per_batch=100, buffer_bytes=buffer_bytes)
    delta = np.array(entropies[0]) - np.array(entropies[1])
    assert result.strong_entropy == pytest.approx(np.mean(entropies[0]), rel=1e-5)
    assert result.weak_entropy == pytest.approx(np.mean(entropies[1]), rel=1e-5)
    assert (result.learnt_share, result.regressed_share) == (np.mean(delta < 0), np.mean(delta > 0))
    assert result.hard_negative_share == pytest.approx(hard / count, rel=1e-3)
    assert result.crossover == pytest.approx(1 / (1 + norms[0] / norms[1]), rel=1e-5)
    assert result.relative_gap == pytest.approx(1 - result.strong_entropy / result.weak_entropy)


def test_a_copy_is_too_close_and_comes_last(checkpoints, tokenized, tokenizer, tmp_path):
    results = rank_weak_models(
        checkpoints["strong"],
        [str(tmp_path / "run")],
        tokenized.select_columns(["input_ids", "labels"]),
        DataCollatorForLanguageModeling(tokenizer.pad_token_id),
        tokenizer,
    )
    assert [result.too_close for result in results] == [False, False, True]
    copy_of_strong = results[-1]
    assert copy_of_strong.name.endswith("checkpoint-20")
    assert copy_of_strong.relative_gap == 0
    assert (copy_of_strong.learnt_share, copy_of_strong.crossover) == (0, 0.5)
    assert results[0].hard_negative_share >= results[1].hard_negative_share
    text = markdown_ranking(results)
    assert f"Recommended: {results[0].name}." in text
    assert text.count("too close") == 1


def test_no_candidate_far_enough_is_said():
    result = Separation("a", 1.0, 0.99, 0.6, 0.4, 0.5, 0.5)
    assert "Every candidate is too close" in markdown_ranking([result])


def test_a_candidate_that_is_more_certain_than_the_strong_model_is_not_called_close():
    swapped, close, good = (
        Separation(n, h, 1.0, 0.6, 0.4, s, 0.5) for n, h, s in (("a", 0.4, 0.9), ("b", 1.01, 0.8), ("c", 2.0, 0.1))
    )
    assert [result.verdict for result in (swapped, close, good)] == ["more certain", "too close", ""]
    text = markdown_ranking([swapped])
    assert "| more certain |" in text
    assert "too close" not in text
    assert "more certain than the strong model" in text.splitlines()[-1]
    assert "swapped" in text.splitlines()[-1]
    both = markdown_ranking([close, swapped]).splitlines()[-1]
    assert "too close" in both
    assert "more certain" in both


def test_candidates_are_checkpoints_in_the_order_of_their_steps(tmp_path):
    for name in ("checkpoint-100", "checkpoint-20", "other"):
        (tmp_path / name).mkdir()
    expanded = expand_candidates([str(tmp_path), "org/base"])
    assert [name.rpartition("/")[2] for name in expanded] == ["checkpoint-20", "checkpoint-100", "base"]
    with pytest.raises(ValueError, match="no candidate for the weak model"):
        expand_candidates([])


def test_command_prints_the_table(checkpoints, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, sums(37))))
    arguments = ["--model", tmp_path / "strong", "--dataset", tmp_path / "train.jsonl"]
    arguments += ["--candidates", tmp_path / "run", "--use_cpu", "true", "--bf16", "false", "--sample", "20"]
    main(["rank-weak", *map(str, arguments)])
    output = capsys.readouterr().out
    assert output.count("checkpoint-") == 4  # three rows and the recommendation
    assert "Recommended: " in output


def test_auto_takes_the_recommended_checkpoint(checkpoints, make_args, tokenizer, dataset, tmp_path, capsys):
    def make(**kwargs):
        weak_model = kwargs.pop("weak_model", None)
        args = make_args(**{"sft_epochs": 0, "num_train_epochs": 1, **kwargs})
        return WMSSTrainer(
            str(tmp_path / "strong"),
            args,
            train_dataset=dataset,
            processing_class=tokenizer,
            weak_model=weak_model,
        )

    chosen = make(weak_model=f"auto:{tmp_path / 'run'}")
    recommended = capsys.readouterr().out.rpartition("Recommended: ")[2].strip().rstrip(".")
    assert recommended.startswith(str(tmp_path / "run"))
    assert chosen.weak_reference.fingerprint == make(weak_model=recommended).weak_reference.fingerprint
    by_option = make(weak_model_name_or_path=f"auto:{tmp_path / 'run'}")
    assert by_option.weak_reference.fingerprint == chosen.weak_reference.fingerprint
    by_option.train()
    sampler = by_option.curriculum_sampler
    assert np.abs(sampler.weak_entropy - sampler.strong_entropy).max() > 0.01
    chosen.train()
    with pytest.raises(ValueError, match=r"`weak_model='auto:.*` compares checkpoints .* Set `sft_epochs=0`"):
        make(weak_model=f"auto:{tmp_path / 'run'}", sft_epochs=1, num_train_epochs=2)


def test_a_weak_model_that_is_too_close_gets_a_warning(
    checkpoints, make_model, make_args, tokenizer, dataset, recwarn
):
    def train(weak):
        args = make_args(sft_epochs=0, num_train_epochs=1)
        strong = scaled(make_model(), 3)
        WMSSTrainer(strong, args, train_dataset=dataset, processing_class=tokenizer, weak_model=weak).train()

    with pytest.warns(UserWarning, match=r"close to the strong one: mean entropy .* a relative gap of 0.0%"):
        train(checkpoints["run/checkpoint-20"])
    recwarn.clear()
    train(checkpoints["run/checkpoint-100"])
    assert not [warning for warning in recwarn if "close to the strong one" in str(warning.message)]


def test_swapped_models_get_a_warning_of_their_own(checkpoints, make_model, make_args, tokenizer, dataset, recwarn):
    args = make_args(sft_epochs=0, num_train_epochs=1)
    options = {"train_dataset": dataset, "processing_class": tokenizer}
    with pytest.warns(UserWarning, match=r"weak model is more certain than the strong one: .* gap of -\d+.*swapped"):
        WMSSTrainer(make_model(), args, weak_model=checkpoints["strong"], **options).train()
    assert not [warning for warning in recwarn if "is close" in str(warning.message)]
