import json
import subprocess
import sys

import numpy as np
import pandas
import pytest
import torch
from conftest import sums
from datasets import Dataset

from wmss_trl import WMSSTrainer
from wmss_trl.cli.main import main
from wmss_trl.cli.score import load_examples
from wmss_trl.scoring.table import ScoreTable

OPTIONS = ["--bf16", "false", "--use_cpu", "true", "--disable_tqdm", "true", "--max_length", "64"]


@pytest.fixture
def folders(make_model, tokenizer, tmp_path):
    for name, seed in (("base", 0), ("tuned", 1)):
        make_model(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, sums(37))))
    return tmp_path


def score(folders, *options, output="scores.parquet"):
    arguments = ["--model", folders / "tuned", "--dataset", folders / "train.jsonl", "--output", folders / output]
    main(["score", *map(str, [*arguments, *OPTIONS, *options])])
    return pandas.read_parquet(folders / output)


def test_score_writes_what_a_run_uses(folders, make_args, capsys):
    # The batch size of the run, on which the last digits of the scores depend
    frame = score(folders, "--weak_model_name_or_path", folders / "base", "--per_device_train_batch_size", "4")
    assert "37 examples, 23 of them drawn" in capsys.readouterr().out
    trainer = WMSSTrainer(
        str(folders / "tuned"),
        make_args(sft_epochs=0, num_train_epochs=1, max_length=64, weak_model_name_or_path=str(folders / "base")),
        train_dataset=load_examples(str(folders / "train.jsonl")),
    )
    trainer.train()
    sampler = trainer.curriculum_sampler
    np.testing.assert_array_equal(frame["weak_entropy"], sampler.weak_entropy)
    np.testing.assert_array_equal(frame["strong_entropy"], sampler.strong_entropy)
    assert sorted(frame["index"][frame["drawn"] > 0]) == sorted(sampler)


def test_select_draws_anew_with_other_options(folders):
    scores = score(folders, "--weak_model_name_or_path", folders / "base")
    recipe = folders / "recipe.yaml"
    recipe.write_text("active_fraction: 0.3\ncurriculum_variant: v2\nseed: 5\nuse_cpu: true\nbf16: false\n")
    output = folders / "selected.parquet"
    main(["select", "--scores", str(folders / "scores.parquet"), "--output", str(output), "--config", str(recipe)])
    selected = pandas.read_parquet(output)
    assert selected["drawn"].sum() == 11
    for column in ("index", "tokens", "weak_entropy", "strong_entropy", "delta_entropy"):
        np.testing.assert_array_equal(selected[column], scores[column])
    assert not np.allclose(selected["weight"], scores["weight"])
    # It still is a score file of that data set
    metadata = Dataset.from_parquet(str(output))
    assert metadata.num_rows == 37


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about a machine without one")
@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_commands_run_on_a_machine_without_a_gpu(folders, capsys, precision):
    data = ["--model", folders / "tuned", "--dataset", folders / "train.jsonl", "--disable_tqdm", "true"]
    data += [] if precision == "bf16" else ["--bf16", "false"]
    scores = ["--weak_model_name_or_path", folders / "base", "--output", folders / "scores.parquet"]
    main(["score", *map(str, [*data, *scores])])
    assert f"no GPU: on the CPU in {precision}" in capsys.readouterr().out
    main(["rank-weak", *map(str, [*data, "--candidates", folders / "base", "--sample", "10"])])
    assert f"no GPU: on the CPU in {precision}" in capsys.readouterr().out
    expected = score(folders, "--weak_model_name_or_path", folders / "base", "--bf16", str(precision == "bf16"))
    scores = pandas.read_parquet(folders / "scores.parquet")
    np.testing.assert_array_equal(scores["strong_entropy"], expected["strong_entropy"])


def test_select_needs_no_options_of_a_model_but_checks_its_own(folders):
    """A recipe for a run on a GPU that this machine has not, or of an engine that is not installed."""
    scores = ScoreTable(np.ones(20, dtype=int), np.linspace(1, 2, 20), np.ones(20), {})
    scores.write(folders / "scores.parquet")
    recipe = folders / "recipe.yaml"
    recipe.write_text("active_fraction: 0.5\nfp16: true\ntf32: true\ndeepspeed: none.json\nlearning_rate: 1.0e-5\n")
    arguments = ["--scores", folders / "scores.parquet", "--output", folders / "selected.parquet", "--config", recipe]
    main(["select", *map(str, arguments)])
    assert pandas.read_parquet(folders / "selected.parquet")["drawn"].sum() == 10
    with pytest.raises(ValueError, match=r"`active_fraction` must be in \(0, 1\], got 2.0"):
        main(["select", *map(str, arguments), "--active_fraction", "2"])
    recipe.write_text("active_fractoin: 0.5\n")
    with pytest.raises(ValueError, match="active_fractoin"):
        main(["select", *map(str, arguments)])


def test_score_without_a_weak_model_is_refused(folders):
    with pytest.raises(ValueError, match=r"`weak_model_name_or_path` is not set.*earlier checkpoint"):
        score(folders)


def test_data_sets_are_loaded_from_files_and_folders(tmp_path):
    examples = Dataset.from_list(sums(5))
    examples.to_json(tmp_path / "a.jsonl")
    examples.to_parquet(tmp_path / "b.parquet")
    examples.to_csv(tmp_path / "c.csv")
    examples.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    examples.to_json(tmp_path / "files" / "train.jsonl")
    for name in ("a.jsonl", "b.parquet", "c.csv", "saved", "files"):
        assert load_examples(str(tmp_path / name))["prompt"] == examples["prompt"]
    (tmp_path / "d.xml").touch()
    with pytest.raises(ValueError, match=r"d.xml'` must be one of \['.csv'"):
        load_examples(str(tmp_path / "d.xml"))


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["unknown"], 2), (["--help"], 0)])
def test_usage(arguments, code, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == code
    assert "wmss-trl score --model" in capsys.readouterr().out


def test_command_is_installed():
    result = subprocess.run([sys.executable, "-m", "wmss_trl.cli", "score", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert "--active_fraction" in result.stdout
