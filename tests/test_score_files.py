import json
import os
import re

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from conftest import losses, sums
from datasets import Dataset, load_dataset

from wmss_trl import WMSSTrainer, draw_active_set, sampling_weights
from wmss_trl.files import replacing
from wmss_trl.scoring.score_cache import ScoreCache
from wmss_trl.scoring.table import ScoreTable


@pytest.fixture
def make_trainer(make_model, make_args, tokenizer, dataset):
    def make(model=None, train_dataset=None, weak_model=None, **kwargs):
        return WMSSTrainer(
            make_model() if model is None else model,
            make_args(**{"num_train_epochs": 2, **kwargs}),
            train_dataset=dataset if train_dataset is None else train_dataset,
            processing_class=tokenizer,
            weak_model=weak_model,
        )

    return make


def count_examples(trainer):
    """Number of examples that the scoring collates from now on."""
    counts, cache = [], trainer._selection.score_cache
    collate = cache.data_collator
    cache.data_collator = lambda examples: counts.append(len(examples)) or collate(examples)
    return counts


# The cache


def test_a_second_run_on_the_same_data_scores_m0_and_m1_no_more(make_trainer, tmp_path):
    first = make_trainer()
    counts = count_examples(first)
    first.train()
    assert sum(counts) == 2 * 37  # M0 before the first step, M1 after phase 1
    again = make_trainer()
    counts = count_examples(again)
    again.train()
    assert not counts
    assert losses(again) == losses(first)
    assert len(list((tmp_path / "run" / "_scores").iterdir())) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 20},
        {"completion_only_loss": False},
        {"bf16": True},
        {"train_dataset": Dataset.from_list(sums(37, seed=1))},
        {"model": 7},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_scores_invalidates_them(make_trainer, make_model, change):
    make_trainer(sft_epochs=0, num_train_epochs=1).train()
    if "model" in change:
        change = {"model": make_model(seed=7)}
    trainer = make_trainer(sft_epochs=0, num_train_epochs=1, **change)
    counts = count_examples(trainer)
    trainer.train()
    assert sum(counts) == len(trainer.train_dataset)


def test_what_does_not_change_the_scores_keeps_them(make_trainer, tmp_path):
    folder = str(tmp_path / "scores")
    make_trainer(sft_epochs=0, num_train_epochs=1, score_cache_dir=folder).train()
    changes = {"scoring_tokens_per_batch": 100, "mixing_lambda": 0.3, "active_fraction": 0.5, "seed": 3}
    trainer = make_trainer(
        sft_epochs=0, num_train_epochs=1, score_cache_dir=folder, output_dir=str(tmp_path / "other"), **changes
    )
    counts = count_examples(trainer)
    trainer.train()
    assert not counts
    assert not (tmp_path / "other" / "_scores").exists()


def test_a_neighbouring_checkpoint_is_another_model(make_trainer):
    """One value of one parameter differs by one unit in the last place."""
    make_trainer(sft_epochs=0, num_train_epochs=1).train()
    trainer = make_trainer(sft_epochs=0, num_train_epochs=1)
    weight = trainer.model.model.layers[1].mlp.down_proj.weight.data
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(1.0))
    counts = count_examples(trainer)
    trainer.train()
    assert sum(counts) == 37


def test_a_killed_scoring_pass_goes_on_where_it_was(make_trainer, monkeypatch, tmp_path):
    monkeypatch.setattr("wmss_trl.scoring.entropy._ROUNDS_PER_SHARD", 2)
    options = {"scoring_batch_size": 4}
    whole = make_trainer(**options, output_dir=str(tmp_path / "whole"), score_cache_dir="/dev/null/nowhere")
    with pytest.warns(UserWarning, match="Scores cannot be kept in /dev/null/nowhere"):
        whole.train()
    trainer = make_trainer(**options)
    cache = trainer._selection.score_cache
    collate, counts = cache.data_collator, []

    def killed(examples):
        if len(counts) == 10 + 5:  # M0 has 10 batches; in the third shard of M1
            raise KeyboardInterrupt
        counts.append(len(examples))
        return collate(examples)

    cache.data_collator = killed
    trainer.args.save_strategy = "epoch"
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = make_trainer(**options)
    counts = count_examples(resumed)
    resumed.train(resume_from_checkpoint=trainer.args.output_dir + "/checkpoint-10")
    assert sum(counts) == 37 - 4 * 4  # two shards of two batches of four were finished
    assert losses(resumed) == losses(whole)


def test_a_full_disk_does_not_stop_the_run(make_trainer, tmp_path, monkeypatch):
    written = []

    def savez(path, **arrays):
        written.append(path)
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    trainer = make_trainer(output_dir=str(tmp_path / "full"))
    monkeypatch.setattr(np, "savez", savez)
    with pytest.warns(UserWarning, match=r"cannot be kept in .*_scores .*No space left.*`score_cache_dir`"):
        trainer.train()
    assert len(written) == 1
    assert not list((tmp_path / "full" / "_scores").iterdir())
    expected = make_trainer(output_dir=str(tmp_path / "fine"))
    monkeypatch.undo()
    expected.train()
    assert losses(trainer) == losses(expected)


def test_a_damaged_cache_is_computed_anew(make_trainer, tmp_path):
    first = make_trainer()
    first.train()
    for path in (tmp_path / "run" / "_scores").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    again = make_trainer()
    with pytest.warns(UserWarning, match="cannot be read .* and are computed anew"):
        again.train()
    assert losses(again) == losses(first)


@pytest.mark.parametrize(
    ("sft_epochs", "own_weak_model", "labels"),
    [
        (1, False, ["weak model (M0)", "strong model"]),
        (0, False, ["weak and strong model (M0)", "strong model"]),
        (1, True, ["strong and weak models", "strong model"]),
    ],
)
def test_progress_bars_say_what_is_scored(make_trainer, make_model, capsys, sft_epochs, own_weak_model, labels):
    trainer = make_trainer(
        weak_model=make_model(seed=1) if own_weak_model else None,
        sft_epochs=sft_epochs,
        num_train_epochs=sft_epochs + (2 if own_weak_model or not sft_epochs else 1),
        disable_tqdm=False,
    )
    trainer.train()
    shown = re.findall(r"Scoring, ([^:]*):", capsys.readouterr().err)
    assert list(dict.fromkeys(shown)) == labels


@pytest.mark.parametrize(("train_batch_size", "eval_batch_size"), [(1, 8), (8, 2)])
def test_scoring_needs_no_more_tokens_than_training_or_evaluation(make_trainer, train_batch_size, eval_batch_size):
    trainer = make_trainer(
        sft_epochs=0,
        num_train_epochs=1,
        per_device_train_batch_size=train_batch_size,
        per_device_eval_batch_size=eval_batch_size,
    )
    longest = max(map(len, trainer.train_dataset["input_ids"]))
    tokens, model = [], trainer.model
    model.register_forward_pre_hook(
        lambda _, args, inputs: tokens.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    trainer.score_table()
    assert max(tokens) <= min(train_batch_size, eval_batch_size) * longest


def test_scoring_pads_as_training_does(make_trainer):
    trainer = make_trainer(sft_epochs=0, num_train_epochs=1, pad_to_multiple_of=16)
    widths, model = set(), trainer.model
    model.register_forward_pre_hook(
        lambda _, args, inputs: widths.add(inputs["input_ids"].size(1) % 16), with_kwargs=True
    )
    trainer.train()
    assert widths == {0}


# The table


def test_table_is_what_the_first_weak_driven_epoch_uses(make_trainer, make_model, tmp_path):
    options = {"weak_model": make_model(seed=1), "sft_epochs": 0, "num_train_epochs": 1}
    trainer = make_trainer(**options)
    table = trainer.score_table()
    table.write(tmp_path / "scores.parquet")
    frame = pandas.read_parquet(tmp_path / "scores.parquet")
    assert list(frame.columns) == [
        "index",
        "tokens",
        "weak_entropy",
        "strong_entropy",
        "delta_entropy",
        "weight",
        "drawn",
    ]
    assert load_dataset("parquet", data_files=str(tmp_path / "scores.parquet"))["train"].num_rows == 37
    trainer.train()
    sampler = trainer.curriculum_sampler
    np.testing.assert_array_equal(frame["weak_entropy"], sampler.weak_entropy)
    np.testing.assert_array_equal(frame["strong_entropy"], sampler.strong_entropy)
    np.testing.assert_allclose(frame["delta_entropy"], sampler.strong_entropy - sampler.weak_entropy, atol=1e-6)
    np.testing.assert_array_equal(frame["weight"], sampler.weights)
    assert sorted(frame["index"][frame["drawn"] == 1]) == sorted(sampler)
    labels = [row["labels"] for row in trainer.train_dataset]
    assert list(frame["tokens"]) == [sum(label != -100 for label in row[1:]) for row in labels]
    assert table.to_dataset()[3]["weak_entropy"] == frame["weak_entropy"][3]


def test_a_run_starts_from_a_score_file_without_scoring(make_trainer, make_model, tmp_path, recwarn):
    weak = make_model(seed=1)
    options = {"weak_model": weak, "sft_epochs": 0, "num_train_epochs": 2}
    whole = make_trainer(**options, output_dir=str(tmp_path / "whole"))
    path = tmp_path / "scores.parquet"
    whole.score_table().write(path)
    whole.train()
    trainer = make_trainer(**options, score_file=str(path), output_dir=str(tmp_path / "started"))
    counts = count_examples(trainer)
    trainer.train()
    assert sum(counts) == 37  # the strong model before the second epoch
    assert losses(trainer) == losses(whole)
    assert not [warning for warning in recwarn if "score_file" in str(warning.message)]
    resumed = make_trainer(
        **options, score_file=str(path), save_strategy="epoch", output_dir=str(tmp_path / "resumed")
    )
    resumed.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-6"))
    assert losses(resumed) == losses(whole)
    # As another program may write it, in another order and without its metadata
    pandas.read_parquet(path).sample(frac=1, random_state=0).to_parquet(path)
    trainer = make_trainer(**options, score_file=str(path), output_dir=str(tmp_path / "pandas"))
    trainer.train()
    assert losses(trainer) == losses(whole)


def test_another_weak_model_than_that_of_the_score_file_is_noticed(make_trainer, make_model, tmp_path):
    path = str(tmp_path / "scores.parquet")
    make_trainer(weak_model=make_model(seed=1), sft_epochs=0).score_table().write(path)
    with pytest.warns(UserWarning, match="was made with another weak model"):
        make_trainer(weak_model=make_model(seed=2), sft_epochs=0, score_file=path)


@pytest.mark.parametrize("metadata", [True, False])
def test_scores_of_another_data_set_are_refused(make_trainer, tmp_path, metadata):
    path = str(tmp_path / "scores.parquet")
    make_trainer(sft_epochs=0).score_table().write(path)
    if not metadata:
        pandas.read_parquet(path).to_parquet(path)
    for other in (Dataset.from_list(sums(37, seed=1)), Dataset.from_list(sums(30))):
        with pytest.raises(ValueError, match=r"`score_file=.*holds the scores of another data set \(37 examples"):
            make_trainer(train_dataset=other, sft_epochs=0, score_file=path)


def test_missing_and_repeated_indices_and_columns_are_refused(make_trainer, tmp_path):
    path = tmp_path / "scores.parquet"
    make_trainer(sft_epochs=0).score_table().write(path)
    frame = pandas.read_parquet(path)
    frame.loc[5, "index"] = 6
    frame.to_parquet(path)
    with pytest.raises(ValueError, match=r"0 to 36, each once, but \[5\] are missing and \[6\] are repeated"):
        ScoreTable.read(path)
    frame.drop(index=[2, 5]).to_parquet(path)
    with pytest.raises(ValueError, match=r"\[2, 5\] are missing"):
        ScoreTable.read(path)
    frame.drop(columns="weak_entropy").to_parquet(path)
    with pytest.raises(ValueError, match=r"no column \['weak_entropy'\].*`wmss-trl score`"):
        ScoreTable.read(path)
    frame.loc[5, "index"] = 5
    frame.loc[7, "strong_entropy"] = np.nan
    frame.to_parquet(path)
    with pytest.raises(ValueError, match=r"strong_entropy .*examples 7 \(nan\)"):
        ScoreTable.read(path)


def test_scores_that_rounding_has_made_negative_are_read_as_zero(tmp_path):
    columns = {"index": [0, 1], "tokens": [3, 3], "weak_entropy": [1.0, -1e-8], "strong_entropy": [0.5, 0.5]}
    pandas.DataFrame(columns).to_parquet(tmp_path / "scores.parquet")
    assert ScoreTable.read(tmp_path / "scores.parquet").weak_entropy.tolist() == [1, 0]


def test_a_score_file_that_is_missing_or_no_parquet_is_refused(make_trainer, tmp_path):
    missing, text = str(tmp_path / "none.parquet"), str(tmp_path / "text")
    (tmp_path / "text").write_text("no table")
    with pytest.raises(ValueError, match=r"none.parquet does not exist.*`wmss-trl score`"):
        ScoreTable.read(missing)
    with pytest.raises(ValueError, match=r"text is not a Parquet file.*`wmss-trl score`"):
        make_trainer(sft_epochs=0, score_file=text)
    with pytest.raises(ValueError, match=r"`score_file=.*none.parquet'` does not exist.*`wmss-trl score`"):
        make_trainer("no/such-model", sft_epochs=0, score_file=missing)  # said before it is loaded


def test_draw_of_a_table_follows_its_options():
    rng = np.random.default_rng(0)
    table = ScoreTable(np.ones(50, dtype=int), rng.random(50), rng.random(50), {})
    table.draw(0.4, replacement=True, seed=7, repair_weight=0.5, variant="v1")
    weights = sampling_weights(table.weak_entropy, table.strong_entropy, repair_weight=0.5, variant="v1")
    drawn = draw_active_set(weights, 20, replacement=True, seed=(7, 0))
    np.testing.assert_array_equal(table.weight, weights)
    assert [index for index, count in enumerate(table.drawn) for _ in range(count)] == sorted(drawn)


def test_interrupted_write_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "scores.parquet"
    table = ScoreTable(np.ones(3, dtype=int), np.ones(3), np.ones(3), {"train_dataset": "a"})
    table.write(path)
    before = path.read_bytes()

    def write_table(table, target):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", write_table)
    with pytest.raises(OSError, match="No space left"):
        ScoreTable(np.ones(4, dtype=int), np.ones(4), np.ones(4), {}).write(path)
    assert path.read_bytes() == before
    assert json.loads(pq.read_schema(path).metadata[b"wmss_trl"]) == {"train_dataset": "a"}


def test_writers_of_one_file_do_not_meet(tmp_path):
    """A second run begins to write before the first has put its file in place."""
    target = tmp_path / "scores.npz"
    with replacing(target) as first:
        first.write_bytes(b"first")
        with replacing(target) as second:
            second.write_bytes(b"second")
        assert target.read_bytes() == b"second"
    assert target.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_writer_has_left_is_removed(tmp_path):
    old, recent, other = (tmp_path / f"{name}.partial.npz" for name in ("scores.1", "scores.2", "else.1"))
    for path in (old, recent, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    with replacing(tmp_path / "scores.npz") as partial:
        partial.touch()
    assert not old.exists()
    assert recent.exists()  # somebody may still be writing it
    assert other.exists()


def test_scores_of_another_number_of_examples_are_not_read(tmp_path):
    dataset = Dataset.from_dict({"input_ids": [[1, 2]] * 3})
    cache = ScoreCache(tmp_path, {}, dataset, None, Accelerator(cpu=True))
    np.savez(tmp_path / "a.npz", entropy=np.zeros(4))
    assert cache._read(tmp_path / "a.npz") is None
