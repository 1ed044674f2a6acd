"""Two real processes under `accelerate launch` against one, at the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).with_name("worker.py")
CONFIG = Path(__file__).parents[2] / "recipes" / "accelerate" / "cpu2.yaml"


def launch(folder, num_processes, **options):
    """Run the worker and return the results of its ranks."""
    result = folder / f"result{len(list(folder.glob('result*')))}"
    options = json.dumps({"expected_processes": num_processes, "output_dir": str(folder / "run"), **options})
    launcher = [sys.executable]
    if num_processes > 1:
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [*launcher, str(WORKER), options, str(result)], env=environment, capture_output=True, text=True, timeout=300
    )
    paths = [Path(f"{result}.{rank}.npz") for rank in range(num_processes)]
    assert all(path.exists() for path in paths), run.stderr[-3000:]
    result.touch()
    return [dict(np.load(path)) for path in paths]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def whole_run(folder):
    return launch(
        folder, 2, per_device_train_batch_size=2, save_strategy="steps", save_steps=1, dataloader_drop_last=True
    )


def test_two_processes_equal_one_at_the_same_global_batch(folder, whole_run):
    (single,) = launch(
        folder, 1, per_device_train_batch_size=4, save_strategy="no", dataloader_drop_last=True, output_dir="unused"
    )
    for ours in whole_run:
        np.testing.assert_allclose(ours["losses"], single["losses"], rtol=1e-5)
        np.testing.assert_allclose(ours["mixed_nll"], single["mixed_nll"], rtol=1e-5)
        np.testing.assert_array_equal(ours["num_tokens"], single["num_tokens"])
        np.testing.assert_allclose(ours["weak_entropy"], single["weak_entropy"], atol=1e-5)
        np.testing.assert_allclose(ours["strong_entropy"], single["strong_entropy"], atol=1e-5)
        np.testing.assert_array_equal(ours["indices"], single["indices"])
        np.testing.assert_allclose(ours["weights"], single["weights"], atol=1e-5)


def test_ranks_agree_exactly(whole_run):
    first, second = whole_run
    for key in first:
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)


@pytest.mark.parametrize("step", [4, 9, 11, 16])  # in phase 1, on its end, in both weak-driven epochs
def test_resume_on_two_processes_ends_the_same(folder, whole_run, step):
    """In the middle of an epoch accelerate's SkipBatchSampler hides a custom sampler from `set_epoch`."""
    resumed = launch(
        folder,
        2,
        per_device_train_batch_size=2,
        save_strategy="no",
        dataloader_drop_last=True,
        resume=str(folder / "run" / f"checkpoint-{step}"),
        output_dir=str(folder / "resumed"),
    )
    for ours, whole in zip(resumed, whole_run, strict=True):
        np.testing.assert_array_equal(ours["indices"], whole["indices"])
        np.testing.assert_allclose(ours["losses"], whole["losses"], rtol=1e-6)
        np.testing.assert_allclose(ours["weights"], whole["weights"], atol=1e-6)
