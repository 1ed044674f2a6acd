import numpy as np
import pytest
import torch
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import wmss_trl.loop.selection
import wmss_trl.trainer
from wmss_trl import WMSSTrainer
from wmss_trl.losses.schedules import crossover_lambda
from wmss_trl.reports.figures import plot_active_set
from wmss_trl.reports.mixture import evaluate_mixture


def test_mixture_statistics_equal_token_by_token_float64(make_model, tokenizer):
    strong, weak = make_model(seed=1), make_model(seed=2)
    with torch.no_grad():
        for parameter in (*strong.parameters(), *weak.parameters()):
            parameter.mul_(3)
    dataset = Dataset.from_list(
        [
            {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]},
            {"input_ids": [9, 10], "labels": [9, 10]},
            {"input_ids": [11, 12, 13], "labels": [-100, -100, 13]},
        ]
    )
    collator = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    result = evaluate_mixture(strong, weak, dataset, collator, mixing_lambda=0.3, batch_size=2)
    rows = []
    for example in dataset:
        ids = torch.tensor([example["input_ids"]])
        with torch.no_grad():
            z_strong, z_weak = (model.eval()(ids).logits[0].double() for model in (strong, weak))
        for t in range(1, ids.size(1)):
            if example["labels"][t] != -100:
                p = z_strong[t - 1].softmax(-1)
                q = (0.3 * z_strong[t - 1] + 0.7 * z_weak[t - 1]).softmax(-1)
                y = example["labels"][t]
                entropy = torch.distributions.Categorical(p).entropy()
                rows.append([-p[y].log(), entropy, 1 - p[y], -q[y].log(), 1 - q[y]])
    nll, entropy, wrong, mixed_nll, mixed_wrong = np.mean(rows, axis=0)
    expected = {
        "nll": nll,
        "entropy": entropy,
        "wrong_mass": wrong,
        "mixed_nll": mixed_nll,
        "mixed_wrong_mass": mixed_wrong,
        "amplification": mixed_wrong / wrong,
        "mixed_strong_gradient": 0.3 * mixed_wrong,
    }
    assert len(rows) == 5
    assert result == pytest.approx(expected, rel=1e-5)


def test_crossover_is_the_number_reported_by_the_paper():
    assert crossover_lambda(1240.10, 1191.33) == pytest.approx(0.490, abs=5e-4)


def test_active_set_is_marked():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    _, ax = plt.subplots()
    plot_active_set(ax, np.array([1.0, 2.0, 3.0]), np.array([0.5, 2.5, 1.0]), np.array([2, 0]))
    left_out, active = ax.collections
    assert left_out.get_offsets().tolist() == [[2.0, 2.5]]
    assert active.get_offsets().tolist() == [[1.0, 0.5], [3.0, 1.0]]
    plt.close()


def test_a_large_data_set_is_thinned_out():
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    entropies = np.random.default_rng(0).random((2, 100_000))
    plot_active_set(ax, *entropies, np.arange(60_000))
    points = [len(collection.get_offsets()) for collection in ax.collections]
    assert points == [8_000, 12_000]
    assert [text.get_text() for text in ax.get_legend().get_texts()][:2] == ["left out (40000)", "active set (60000)"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_each_redraw_leaves_a_figure_and_is_reported(make_model, make_args, tokenizer, dataset, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    args = make_args(report_to="tensorboard", num_train_epochs=3, plot_curriculum=True)
    trainer = WMSSTrainer(make_model(), args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    folder = tmp_path / "run" / "curriculum"
    assert sorted(path.name for path in folder.iterdir()) == ["epoch_1.png", "epoch_2.png"]
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    images = events.Images("curriculum/active_set")
    assert [image.step for image in images] == [10, 16]
    assert images[0].width > images[0].height > 100
    # The same numbers are in the logs
    entries = [entry for entry in trainer.state.log_history if "curriculum/active_examples" in entry]
    assert [entry["step"] for entry in entries] == [11, 17]
    metrics = trainer.curriculum_sampler.metrics()
    assert metrics.items() <= entries[-1].items()
    assert "curriculum/consolidation_share" in metrics


def test_figures_can_be_switched_off(make_model, make_args, tokenizer, dataset, tmp_path):
    args = make_args(plot_curriculum=False, num_train_epochs=2)
    WMSSTrainer(make_model(), args, train_dataset=dataset, processing_class=tokenizer).train()
    assert not (tmp_path / "run" / "curriculum").exists()


def test_figures_are_the_default_where_matplotlib_is(make_model, make_args, tokenizer, dataset, tmp_path):
    args = make_args(plot_curriculum=None, num_train_epochs=2)
    WMSSTrainer(make_model(), args, train_dataset=dataset, processing_class=tokenizer).train()
    assert (tmp_path / "run" / "curriculum" / "epoch_1.png").exists()


@pytest.mark.parametrize("plot", [None, True])
def test_without_matplotlib_only_who_asks_for_figures_is_warned(
    make_model, make_args, tokenizer, dataset, tmp_path, monkeypatch, recwarn, plot
):
    for module in (wmss_trl.trainer, wmss_trl.loop.selection):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    args = make_args(plot_curriculum=plot, num_train_epochs=2)
    WMSSTrainer(make_model(), args, train_dataset=dataset, processing_class=tokenizer).train()
    assert sum("matplotlib" in str(warning.message) for warning in recwarn) == (plot is True)
    assert not (tmp_path / "run" / "curriculum").exists()
