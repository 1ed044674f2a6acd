"""Two real processes under `accelerate launch` against one at the same global batch, and resumed runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).with_name("worker.py")
CONFIG = Path(__file__).parents[2] / "recipes" / "accelerate" / "cpu2.yaml"


def launch(folder, num_processes, *runs, **options):
    """Launch the worker for one run after the other and return the results of the ranks of each."""
    result = folder / f"result{len(list(folder.glob('result*')))}"
    common = {"expected_processes": num_processes, "output_dir": str(folder / "run"), **options}
    launcher = [sys.executable]
    if num_processes > 1:
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [*launcher, str(WORKER), json.dumps([common | run for run in runs or ({},)]), str(result)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    paths = [[Path(f"{result}.{i}.{rank}.npz") for rank in range(num_processes)] for i in range(len(runs) or 1)]
    assert all(path.exists() for ranks in paths for path in ranks), process.stderr[-3000:]
    result.touch()
    return [[dict(np.load(path)) for path in ranks] for ranks in paths]


OPTIONS = {"per_device_train_batch_size": 2, "dataloader_drop_last": True}
ONE = {"per_device_train_batch_size": 4}
PACKED = {"packing": True, "max_length": 40, "per_device_train_batch_size": 1}


OTHERS = {
    "packed": PACKED,
    "joint": {"train_weak": True, "mixing_lambda": 0.4},
    "joint-lora": {"train_weak": True, "mixing_lambda": 0.4, "lora": True, "activation_checkpointing": True},
    "lora": {"lora": True},
    "rounds": {"weak_refresh": "epoch"},
    "cached": {"weak_cache": "hidden"},
}
RUNS = ["full", *OTHERS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def whole_runs(folder):
    """Runs of each kind, with a checkpoint of every step."""
    others = [{"output_dir": str(folder / name), **options} for name, options in OTHERS.items()]
    return launch(folder, 2, {}, *others, save_strategy="steps", save_steps=1, **OPTIONS)


@pytest.fixture(scope="module")
def single_runs(folder):
    one = ONE | {"output_dir": str(folder / "one"), "save_strategy": "steps", "save_steps": 1}
    others = [
        options
        | {"output_dir": str(folder / f"one-{name}"), "per_device_train_batch_size": 2 if name == "packed" else 4}
        for name, options in OTHERS.items()
    ]
    return launch(folder, 1, one, *others, **OPTIONS)


@pytest.mark.parametrize("run", range(len(RUNS)), ids=RUNS)
def test_two_processes_equal_one_at_the_same_global_batch(whole_runs, single_runs, run):
    (single,) = single_runs[run]
    for ours in whole_runs[run]:
        np.testing.assert_allclose(ours["losses"], single["losses"], rtol=1e-5)
        np.testing.assert_allclose(ours["mixed_nll"], single["mixed_nll"], rtol=1e-5)
        np.testing.assert_array_equal(ours["num_tokens"], single["num_tokens"])
        np.testing.assert_allclose(ours["weak_entropy"], single["weak_entropy"], atol=1e-5)
        np.testing.assert_allclose(ours["strong_entropy"], single["strong_entropy"], atol=1e-5)
        np.testing.assert_array_equal(ours["indices"], single["indices"])
        np.testing.assert_allclose(ours["weights"], single["weights"], atol=1e-5)


@pytest.mark.parametrize("run", range(len(RUNS)), ids=RUNS)
def test_ranks_agree_exactly(whole_runs, run):
    first, second = whole_runs[run]
    for key in first.keys() - {"last_epoch"}:
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)


def test_ranks_share_the_active_set(whole_runs):
    """Each example of the list is visited on one rank, once; `drop_last` leaves out the last incomplete batch."""
    parts = [json.loads(str(ours["last_epoch"])) for ours in whole_runs[0]]
    active_set = json.loads(str(whole_runs[0][0]["active_set"]))
    assert len(parts[0]) == len(parts[1]) == 10
    assert sorted(parts[0] + parts[1]) == sorted(active_set[:20])


def test_a_run_on_two_processes_stopped_after_any_step_and_resumed_ends_the_same(folder, whole_runs):
    """In new processes. In the middle of an epoch accelerate's SkipBatchSampler hides a custom sampler."""
    resumptions, expected = [], []
    for name, run in zip(("run", *OTHERS), whole_runs, strict=True):
        options, steps = OTHERS.get(name, {}), len(run[0]["losses"])
        for step in range(1, steps) if name == "run" else (steps // 2 + 1, steps - 2):
            checkpoint = str(folder / name / f"checkpoint-{step}")
            resumptions.append({"resume": checkpoint, **options})
            expected.append(run)
    assert len(expected) == 18 + 2 * len(OTHERS)
    resumed = launch(
        folder,
        2,
        *resumptions,
        save_strategy="no",
        output_dir=str(folder / "resumed"),
        plot_curriculum=False,
        **OPTIONS,
    )
    for resumption, ranks, whole_ranks in zip(resumptions, resumed, expected, strict=True):
        for ours, whole in zip(ranks, whole_ranks, strict=True):
            where = resumption["resume"]
            np.testing.assert_array_equal(ours["indices"], whole["indices"], err_msg=where)
            np.testing.assert_allclose(ours["losses"], whole["losses"], rtol=1e-6, err_msg=where)
            np.testing.assert_allclose(ours["weights"], whole["weights"], atol=1e-6, err_msg=where)


def test_a_run_stopped_after_any_step_and_resumed_in_a_new_process_ends_bit_for_bit_the_same(folder, single_runs):
    (whole,) = single_runs[0]
    resumptions = [{"resume": str(folder / "one" / f"checkpoint-{step}")} for step in range(1, 19)]
    options = OPTIONS | ONE | {"output_dir": str(folder / "one-resumed"), "save_strategy": "no"}
    resumed = launch(folder, 1, *resumptions, **options)
    assert len(whole["losses"]) == 19
    for resumption, (ours,) in zip(resumptions, resumed, strict=True):
        for key in ("indices", "losses", "weights"):
            np.testing.assert_array_equal(ours[key], whole[key], err_msg=resumption["resume"])
