import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import sums
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer, pack_dataset

from wmss_trl import WMSSTrainer
from wmss_trl.curriculum.packing import best_fit_decreasing, pack_prefix


@pytest.fixture
def make_packed(make_model, make_args, tokenizer, dataset):
    def make(cls=WMSSTrainer, train_dataset=None, **kwargs):
        options = {"packing": True, "max_length": 40, "per_device_train_batch_size": 2, "num_train_epochs": 2}
        config = {"cls": SFTConfig} if cls is SFTTrainer else {}
        return cls(
            make_model(dropout=0.0),
            make_args(**config, **options | kwargs),
            train_dataset=train_dataset or dataset,
            processing_class=tokenizer,
        )

    return make


def random_lengths(count, longest, seed=0):
    return np.random.default_rng(seed).integers(1, longest + 1, size=count)


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_as_full_as_those_of_trl(seed):
    lengths = random_lengths(300, 64, seed)
    rows = best_fit_decreasing(lengths, 64)
    assert sorted(document for row in rows for document in row) == list(range(300))
    assert max(lengths[row].sum() for row in rows) <= 64
    packed = pack_dataset(Dataset.from_dict({"input_ids": [[1] * n for n in lengths]}), 64, "bfd")
    assert len(rows) == len(packed)
    assert sorted(lengths[row].sum() for row in rows) == sorted(map(len, packed["input_ids"]))


@pytest.mark.parametrize("num_rows", [1, 7, 500, 900])
def test_the_longest_prefix_of_the_draw_that_fits_is_packed(num_rows):
    lengths = random_lengths(2500, 64)
    order = np.random.default_rng(1).permutation(2500)[:2300]
    rows = pack_prefix(order, lengths, 64, num_rows)
    packed = np.concatenate(rows)
    assert sorted(packed) == sorted(order[: len(packed)])
    assert len(rows) == num_rows
    block = len(packed) // 1000 * 1000
    with_one_more = best_fit_decreasing(lengths[order[block : len(packed) + 1]], 64)
    full_blocks = sum(len(best_fit_decreasing(lengths[order[i : i + 1000]], 64)) for i in range(0, block, 1000))
    assert full_blocks + len(with_one_more) > num_rows


def test_fewer_rows_if_the_documents_do_not_fill_them():
    assert len(pack_prefix(np.arange(10), np.full(10, 5), 10, 20)) == 5


def test_phase_1_is_that_of_sft(make_packed):
    options = {"lr_scheduler_type": "constant"}
    ours, theirs = make_packed(**options), make_packed(SFTTrainer, num_train_epochs=1, **options)
    ours.train()
    theirs.train()
    steps = theirs.state.global_step
    ours, theirs = ([entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (ours, theirs))
    assert steps > 3
    assert ours[:steps] == theirs


def test_loss_of_an_active_set_does_not_depend_on_packing(make_packed, make_model):
    """The whole active set in one batch, at a learning rate of 0: its loss is that of its documents, one by one."""
    trainer = make_packed(sft_epochs=0, num_train_epochs=1, per_device_train_batch_size=11, learning_rate=0.0)
    trainer.train()
    sampler = trainer.curriculum_sampler
    assert len(sampler) == len(sampler.row_sizes) == 11
    assert max(sampler.row_sizes) > 1
    assert len(set(sampler.indices)) == len(sampler.indices) > 11
    documents = trainer._documents
    model = make_model(dropout=0.0).eval()  # as both the weak and the strong one, so that the mixture is the model
    total, count = 0.0, 0
    for index in sampler.indices.tolist():
        ids, labels = (torch.tensor(documents[index][key]) for key in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1].double()
        total += F.cross_entropy(logits, labels[1:], reduction="sum").item()
        count += (labels[1:] != -100).sum().item()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["loss"] == pytest.approx(total / count, rel=1e-5)
    assert entry["curriculum/active_examples"] == len(sampler.indices)


def test_documents_are_scored_as_they_are_packed(make_packed, tokenizer):
    """Cut to the row length from the start, and without those of which nothing supervised is left."""
    examples = sums(37)
    examples[3]["prompt"] = "1 + " * 30 + "1 ="  # longer than a row: only its prompt is left
    trainer = make_packed(train_dataset=Dataset.from_list(examples), truncation_mode="keep_end")
    assert len(trainer._documents) == 36
    assert max(map(len, trainer._documents["input_ids"])) <= 40
    trainer.train()
    assert len(trainer.curriculum_sampler.weak_entropy) == 36


def test_the_set_is_packed_anew_in_each_round_and_the_number_of_steps_stays(make_packed):
    trainer = make_packed(num_train_epochs=4)
    rounds, redraw = [], trainer.curriculum_sampler.redraw

    def keep(epoch):
        redraw(epoch)
        rounds.append(list(trainer.curriculum_sampler))

    trainer.curriculum_sampler.redraw = keep
    trainer.train()
    num_rows = round(0.63 * len(trainer.train_dataset))
    assert [len(rows) for rows in rounds] == [num_rows] * 3
    assert rounds[0] != rounds[1] != rounds[2]
    assert trainer.state.global_step == trainer.state.max_steps
    assert trainer.lr_scheduler.get_last_lr()[0] == 0


def test_whole_data_set_keeps_its_number_of_rows(make_packed):
    """The order of a draw may pack more tightly than that of the data set: some row is cut in two then."""
    trainer = make_packed(active_fraction=1.0, num_train_epochs=2)
    sampler = trainer.curriculum_sampler
    trainer.train()
    assert len(list(sampler)) == len(sampler) == len(trainer.train_dataset)
    tight = sampler.pack(np.arange(37))
    sampler.num_active = len(tight) + 3
    sampler.pack = lambda order: list(tight)
    sampler.redraw(1)
    assert len(list(sampler)) == len(tight) + 3
    assert sorted(sampler.indices) == sorted(np.concatenate(tight))


@pytest.mark.parametrize("prepared", [True, False])
def test_wrapped_rows_are_scored_drawn_and_trained_on_as_they_are(make_packed, make_model, prepared):
    """They cut documents anywhere, so the row is the example, to SFTTrainer's model as well."""
    options = {"packing_strategy": "wrapped", "lr_scheduler_type": "constant", "optim": "sgd"}
    sft = make_packed(SFTTrainer, num_train_epochs=1, **options)
    rows = sft.train_dataset
    if not prepared:
        options |= {"train_dataset": rows, "dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer = make_packed(**options)
    assert trainer.train_dataset["input_ids"] == rows["input_ids"]
    sft.train()
    trainer.train()
    ours, theirs = ([entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (trainer, sft))
    assert ours[: len(theirs)] == theirs
    strong, weak, sampler = sft.model.eval(), make_model(dropout=0.0).eval(), trainer.curriculum_sampler
    assert len(sampler) == len(set(sampler)) == round(0.63 * len(rows))
    losses = []
    for index, row in enumerate(rows):
        ids, labels = (torch.tensor(row[key]) for key in ("input_ids", "labels"))
        with torch.no_grad():
            z_strong, z_weak = (model(input_ids=ids[None]).logits[0, :-1].double() for model in (strong, weak))
        for logits, scores in ((z_strong, sampler.strong_entropy), (z_weak, sampler.weak_entropy)):
            entropy = torch.distributions.Categorical(logits=logits).entropy()[labels[1:] != -100].mean()
            assert scores[index] == pytest.approx(entropy.item(), rel=1e-5)
        losses.append(F.cross_entropy(0.5 * (z_strong + z_weak), labels[1:], reduction="none"))
    first = torch.cat([losses[index][losses[index] != 0] for index in list(sampler)[:2]])
    assert ours[len(theirs)] == pytest.approx(first.mean().item(), rel=1e-5)


def test_wrapped_rows_without_a_target_are_left_out(make_packed):
    documents = [{"input_ids": [5] * 30, "labels": [-100] * 20 + [5] * 10}] * 3  # rows 1 and 4: prompt only
    documents += [{"input_ids": [6] * 31, "labels": [6] * 31}]  # row 7: one token
    trainer = make_packed(train_dataset=Dataset.from_list(documents), packing_strategy="wrapped", max_length=20)
    assert list(map(len, trainer.train_dataset["labels"])) == [20] * 4
    trainer.train()
    assert np.isfinite(trainer.curriculum_sampler.strong_entropy).all()


def test_packed_rows_without_their_documents_are_refused(make_packed):
    rows = {"input_ids": [[5, 6, 7, 8]] * 20, "labels": [[5, 6, 7, 8]] * 20, "seq_lengths": [[2, 2]] * 20}
    with pytest.raises(ValueError, match=r"`packing=True` with `skip_prepare_dataset`.*`curriculum=False`"):
        make_packed(train_dataset=Dataset.from_dict(rows), dataset_kwargs={"skip_prepare_dataset": True})


def test_saved_model_of_a_packed_run_loads(make_packed, tmp_path):
    trainer = make_packed()
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    for parameter, expected in zip(loaded.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)
