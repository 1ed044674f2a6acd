"""The example script as a user runs it, on data and models of a few kilobytes."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import sums
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
SMALL = [
    "--disable_tqdm",
    "true",
    "--max_new_tokens",
    "8",
    "--per_device_train_batch_size",
    "8",
    "--logging_steps",
    "1",
]


SCRIPT = ROOT / "examples" / "train_math.py"


def run(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture
def run_here(monkeypatch, capfd):
    """Without the seconds that a process takes to import everything."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capfd.readouterr().out

    return run


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_problems(form, num_rows, seed):
    for example in sums(num_rows, seed):
        question, answer = example["prompt"], example["completion"].strip()
        if form == "solution":
            yield {"question": question, "solution": f"The sum is {answer}.", "answer": answer}
        elif form == "prompt":
            yield {"prompt": question, "completion": f" #### {answer}"}
        else:
            yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_embedded_default_prints_the_table_and_a_sentence(tmp_path):
    sizes = ["--num_train", 40, "--num_test", 10, "--num_pretrain", 40, "--hidden_size", 32, "--num_layers", 1]
    epochs = ["--num_train_epochs", 2, "--sft_epochs", 1, "--seeds", 2]
    output = run(*SMALL, *sizes, *epochs, "--output_dir", tmp_path)
    for row in ("M0", "M1", "WMSS", "SFT, lr x 0.5", "SFT, lr x 1", "SFT, lr x 2", "temperature only"):
        assert f"| {row} | " in output
    assert output.strip().splitlines()[-1].startswith("On this task ")
    assert (tmp_path / "seed0" / "plot.png").stat().st_size > 10_000
    runs = json.loads((tmp_path / "results.json").read_text())
    assert len(runs) == 2
    steps = {result["loss"][-1][0] for result in runs[0][2:]}
    assert len(steps) == 1  # every baseline went as far as WMSS
    assert [len(result["correct"]) for result in runs[0]] == [10] * 7


@pytest.mark.parametrize("form", ["solution", "prompt", "messages"])
def test_local_data_and_a_local_model(tmp_path, make_model, tokenizer, form, run_here):
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    train = write_jsonl(tmp_path / "train.jsonl", as_problems(form, 37, seed=0))
    test = write_jsonl(tmp_path / "test.jsonl", as_problems(form, 9, seed=1))
    (tmp_path / "run.yaml").write_text("use_cpu: true\nnum_train_epochs: 2\nbf16: false\nsave_strategy: 'no'\n")
    lora = ["--use_peft", "--lora_r", 4] if form == "prompt" else []
    output = run_here(
        *SMALL,
        *lora,
        "--config",
        tmp_path / "run.yaml",
        "--model_name_or_path",
        tmp_path / "base",
        "--dataset_path",
        train,
        "--test_path",
        test,
        "--output_dir",
        tmp_path / "out",
    )
    assert "mixed_nll" in output
    assert "Greedy exact match on 9 held-out problems" in output
    assert (tmp_path / "out" / "adapter_model.safetensors").exists() == bool(lora)
    if not lora:
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "a", "--dataset_path", "b"], "Both `dataset_name='a'` and `dataset_path='b'` are set"),
        (["--push_to_hub", "true"], "`push_to_hub=True` needs a model of your own"),
        (["--model_name_or_path", "m", "--dataset_path", "d", "--seeds", 2, "--use_cpu", "true"], "`seeds=2` repeats"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path, run_here, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run_here(*arguments, "--output_dir", tmp_path)
