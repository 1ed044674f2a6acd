"""Training on the weak model's cached hidden states."""

import errno
import os
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import losses
from peft import LoraConfig

from wmss_trl import WMSSTrainer
from wmss_trl.scoring.hidden_cache import HiddenCache

LORA = LoraConfig(r=4)


@pytest.fixture
def make_trainer(make_model, make_args, tokenizer, dataset):
    def make(model=None, peft_config=None, weak_model=None, **kwargs):
        return WMSSTrainer(
            make_model(dropout=0.0) if model is None else model,
            make_args(**{"weak_cache": "hidden", **kwargs}),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            weak_model=weak_model,
        )

    return make


def refuse_forward(inputs, positions):
    pytest.fail("ran the weak model in training")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sft_epochs": 0, "num_train_epochs": 2, "own_weak_model": True},
        {"lora": True},
        {"gradient_accumulation_steps": 3, "train_sampling_strategy": "group_by_length"},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"padding_free": True, "max_length": None},
        {"lambda_schedule": "crossover"},
        {"curriculum_replacement": True, "active_fraction": 1.0},
    ],
    ids=lambda options: " ".join(options) or "default",
)
def test_losses_are_those_without_the_cache(make_trainer, make_model, options, tmp_path):
    options = dict(options)
    lora, own = options.pop("lora", False), options.pop("own_weak_model", False)
    runs = []
    for weak_cache in (None, "hidden"):
        torch.manual_seed(0)
        trainer = make_trainer(
            peft_config=LORA if lora else None,
            weak_model=make_model(seed=3, dropout=0.0) if own else None,
            weak_cache=weak_cache,
            output_dir=str(tmp_path / str(weak_cache)),
            **options,
        )
        if weak_cache is not None:
            trainer.weak_reference.before_forward = refuse_forward
        trainer.train()
        runs.append(trainer)
    np.testing.assert_allclose(losses(runs[1]), losses(runs[0]), rtol=1e-5)
    entropies = [[entry.get("weak_entropy") for entry in trainer.state.log_history] for trainer in runs]
    assert entropies[0][-2] == pytest.approx(entropies[1][-2], rel=1e-5)


def test_cache_is_written_in_the_scoring_pass_and_the_model_let_go(make_trainer, make_model, tokenizer, tmp_path):
    make_model(seed=3, dropout=0.0).save_pretrained(tmp_path / "weak")
    tokenizer.save_pretrained(tmp_path / "weak")
    trainer = make_trainer(weak_model=str(tmp_path / "weak"), num_train_epochs=2)
    forwards = []
    trainer.weak_reference.model.register_forward_hook(lambda *_: forwards.append(1))
    counts, cache = [], trainer._selection.score_cache
    collate = cache.data_collator
    cache.data_collator = lambda examples: counts.append(len(examples)) or collate(examples)
    trainer.train()
    assert sum(counts) == 37  # both models in one pass
    assert len(forwards) == len(counts)
    assert {parameter.device.type for parameter in trainer.weak_reference.model.parameters()} == {"meta"}
    head = trainer.weak_reference.lm_head()
    torch.testing.assert_close(head.weight, make_model(seed=3).lm_head.weight)
    (path,) = (tmp_path / "run" / "_weak_cache").glob("*.hidden")
    hidden_size = head.weight.size(1)
    assert path.stat().st_size == trainer._selection.token_counts.sum() * hidden_size * 4
    stored = trainer._selection.hidden_cache.read([5, 2])
    model, expected = make_model(seed=3, dropout=0.0).eval(), []
    for index in (5, 2):
        ids, labels = (torch.tensor(trainer.train_dataset[index][key]) for key in ("input_ids", "labels"))
        with torch.no_grad():
            expected.append(model.model(ids[None]).last_hidden_state[0, :-1][labels[1:] != -100])
    torch.testing.assert_close(stored, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_a_model_of_the_users_is_left_alone(make_trainer, make_model):
    weak = make_model(seed=3)
    make_trainer(weak_model=weak, num_train_epochs=2).train()
    for parameter, expected in zip(weak.parameters(), make_model(seed=3).parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_m0_is_cached_by_the_strong_model_before_phase_1(make_trainer):
    trainer = make_trainer(num_train_epochs=1)
    trainer.train()
    assert trainer._selection.hidden_cache.complete
    assert trainer.weak_reference.model.lm_head.weight.device.type == "meta"


@pytest.mark.parametrize("keep_cache", [True, False])
def test_resumed_run_ends_the_same(make_trainer, keep_cache, tmp_path):
    whole = make_trainer(save_strategy="steps", save_steps=1, output_dir=str(tmp_path / "whole"))
    whole.train()
    for step in (4, 10, 13, 18):
        output_dir = str(tmp_path / f"resumed-{step}")
        folder = str(tmp_path / "whole" / "_weak_cache") if keep_cache else None
        resumed = make_trainer(output_dir=output_dir, weak_cache_dir=folder)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        np.testing.assert_allclose(losses(resumed), losses(whole), rtol=0 if keep_cache else 1e-6)


def test_half_precision_is_stored_as_it_is_multiplied(make_trainer, tmp_path):
    runs = []
    for weak_cache in (None, "hidden"):
        options = {"active_fraction": 1.0, "train_sampling_strategy": "sequential"}  # whatever the scores are
        trainer = make_trainer(bf16=True, weak_cache=weak_cache, output_dir=str(tmp_path / str(weak_cache)), **options)
        trainer.train()
        runs.append(losses(trainer))
    assert trainer._selection.hidden_cache.dtype == torch.bfloat16
    np.testing.assert_allclose(runs[1], runs[0], rtol=2e-3)


def test_a_run_on_the_same_data_and_model_finds_the_cache(make_trainer, make_model, tmp_path):
    first = make_trainer(weak_model=make_model(seed=3))
    first.train()
    again = make_trainer(weak_model=make_model(seed=3))
    assert again._selection.hidden_cache.complete
    again.train()
    assert losses(again) == losses(first)
    shutil.rmtree(tmp_path / "run" / "_scores")  # the weak model must be kept until it has been scored
    without_scores = make_trainer(weak_model=make_model(seed=3))
    without_scores.train()
    assert losses(without_scores) == pytest.approx(losses(first), rel=1e-6)
    other = make_trainer(weak_model=make_model(seed=4))
    assert not other._selection.hidden_cache.complete


def test_score_file_does_not_replace_the_cache(make_trainer, make_model, tmp_path):
    options = {"weak_model": make_model(seed=3), "sft_epochs": 0, "num_train_epochs": 1, "weak_cache": None}
    make_trainer(**options).score_table().write(tmp_path / "scores.parquet")
    runs = []
    for weak_cache in (None, "hidden"):
        options |= {"weak_model": make_model(seed=3), "weak_cache": weak_cache}
        trainer = make_trainer(
            **options, score_file=str(tmp_path / "scores.parquet"), output_dir=str(tmp_path / str(weak_cache))
        )
        trainer.train()
        runs.append(losses(trainer))
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-5)


def test_interrupted_writing_goes_on(make_trainer, make_model, monkeypatch):
    monkeypatch.setattr("wmss_trl.scoring.entropy._ROUNDS_PER_SHARD", 1)
    trainer = make_trainer(weak_model=make_model(seed=3), scoring_batch_size=4)
    write, cache = trainer._selection.hidden_cache.write, trainer._selection.hidden_cache

    def killed(indices, hidden):
        if cache.done.sum() >= 20:
            raise KeyboardInterrupt
        write(indices, hidden)

    cache.write = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    again = make_trainer(weak_model=make_model(seed=3), scoring_batch_size=4)
    assert again._selection.hidden_cache.done.sum() == 20
    again.train()
    assert again._selection.hidden_cache.complete


def make_cache(folder, token_counts=(2, 1, 3)):
    return HiddenCache(folder, {}, np.array(token_counts), 3, torch.float32)


def rows_of(cache, index):
    """Something to keep for an example."""
    return (torch.arange(3.0 * cache.token_counts[index]) + 100 * (index + 1)).view(-1, 3)


def write(cache, *indices):
    cache.write(np.array(indices), [rows_of(cache, index) for index in indices])
    done = cache.done.copy()
    done[list(indices)] = True
    cache.flush(done)


def test_a_worker_maps_the_file_itself(tmp_path):
    cache = make_cache(tmp_path)
    cache.create(lambda message: None)
    write(cache, 1, 0, 2)
    assert cache.complete
    copied = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copied.read([0, 2]), torch.cat([rows_of(cache, 0), rows_of(cache, 2)]))


def test_the_file_has_its_room_on_the_disk_from_the_start(tmp_path):
    cache = make_cache(tmp_path, [10_000, 50_000])
    cache.create(lambda message: None)
    assert cache.path.stat().st_size == 60_000 * 12
    assert cache.path.stat().st_blocks * 512 >= 60_000 * 12


def test_a_disk_that_is_full_is_explained_and_leaves_no_file(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"needs 6 tokens x 3 x 4 bytes = .* the disk is full .*`weak_cache_dir`"):
        make_cache(tmp_path).create(lambda message: None)
    assert not list(tmp_path.iterdir())


def test_zeros_are_written_where_the_system_cannot_allocate(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr("wmss_trl.scoring.hidden_cache._ZEROS_AT_ONCE", 1000)
    cache = make_cache(tmp_path, [10_000, 50_000])
    cache.create(lambda message: None)
    assert cache.path.stat().st_size == 60_000 * 12
    assert cache.path.stat().st_blocks * 512 >= 60_000 * 12


@pytest.mark.parametrize("damage", ["zeros", "bit"])
def test_rows_that_did_not_reach_the_disk_are_written_again(tmp_path, damage):
    """A crash of the machine may leave marks of rows that it has not."""
    cache = make_cache(tmp_path)
    cache.create(lambda message: None)
    write(cache, 0, 1, 2)
    content = bytearray(cache.path.read_bytes())
    first = 2 * 12  # of example 1
    if damage == "zeros":
        content[first : first + 12] = bytes(12)
    else:
        content[first + 5] ^= 1
    cache.path.write_bytes(content)
    again = make_cache(tmp_path)
    again.done = again.find_whole()
    assert again.done.tolist() == [True, False, True]
    write(again, 1)
    assert make_cache(tmp_path).find_whole().all()


def test_two_runs_share_a_folder(tmp_path):
    """The second begins to make the files just when the first has made them and writes."""
    first, second = make_cache(tmp_path), make_cache(tmp_path)

    def meanwhile(message):
        first.create(lambda message: None)
        write(first, 0)

    second.create(meanwhile)
    second.done = second.find_whole()
    write(second, 1)
    write(first, 1, 2)
    write(second, 2)
    second.done |= second.find_whole()
    for cache in (first, second, make_cache(tmp_path)):
        assert torch.equal(cache.read([0, 1, 2]), torch.cat([rows_of(cache, index) for index in range(3)]))
    assert first.complete
    assert second.complete


@pytest.mark.parametrize("lost", ["path", "marks_path"])
def test_lost_hidden_states_are_not_taken_for_zeros(tmp_path, lost):
    cache = make_cache(tmp_path)
    cache.create(lambda message: None)
    write(cache, 0, 1, 2)
    getattr(cache, lost).unlink()
    again = make_cache(tmp_path)
    assert not again.find_whole().any()
    again.create(lambda message: None)
    assert not again.find_whole().any()


def test_too_little_disk_is_refused_with_the_figures(tmp_path):
    cache = HiddenCache(tmp_path, {}, np.array([10**12]), 4096, torch.bfloat16)
    with pytest.raises(ValueError, match=r"needs 1,000,000,000,000 tokens x 4096 x 2 bytes = .* GiB .* are free"):
        cache.create(lambda message: None)
    assert not list(tmp_path.iterdir())


def test_too_little_disk_is_found_out_at_construction(make_trainer, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"`weak_cache='hidden'` needs .* only 0.00 GiB are free"):
        make_trainer()


def test_the_need_is_said_before_writing(tmp_path):
    messages = []
    HiddenCache(tmp_path, {}, np.array([3, 4]), 8, torch.bfloat16).create(messages.append)
    assert "7 tokens x 8 x 2 bytes" in messages[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_weak": True}, r"`train_weak=True` changes the weak model in each step"),
        ({"weak_refresh": "epoch"}, r"`weak_refresh='epoch'` changes the weak model in each epoch"),
        ({"mixing_lambda": 1.0}, r"`mixing_lambda=1.0` needs no weak model"),
        ({"curriculum": False}, r"`curriculum=False` has no scoring pass"),
        ({"packing": True}, r"`packing=True` is not supported with it"),
        ({"weak_cache": "logits"}, r"`weak_cache` must be None or 'hidden', got 'logits'"),
        ({"weak_cache": None, "weak_cache_dir": "x"}, r"`weak_cache_dir='x'` is for `weak_cache='hidden'`"),
    ],
)
def test_combinations_that_cannot_work_are_refused(make_args, options, message):
    with pytest.raises(ValueError, match=message):
        make_args(**{"weak_cache": "hidden", **options})


def test_outputs_in_a_training_step_are_refused(make_trainer):
    trainer = make_trainer(sft_epochs=0, num_train_epochs=1)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    with pytest.raises(ValueError, match=r"`return_outputs=True` .* `weak_cache='hidden'`"):
        trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
