"""Training away from the CPU, on a device that is pretended: every tensor must be where it is used."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from pretended_device import RUNS


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("device") / "results.json"
    script = Path(__file__).with_name("pretended_device.py")  # a device stays registered as long as its process lives
    run = subprocess.run([sys.executable, script, path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", RUNS)
def test_training_on_another_device_equals_training_on_the_cpu(results, name):
    assert "error" not in results[name], results[name]["error"]
    cpu, device = results[name]["cpu"], results[name]["pretended"]
    assert device["weak_driven_steps"] > 0
    assert device["losses"] == pytest.approx(cpu["losses"], abs=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_a_weak_driven_step_makes_a_gpu_wait_twice(results, name):
    """To find the positions with targets and to log; SFTTrainer waits for five figures of its log."""
    run = results[name]["pretended"]
    waits = Counter(wait for wait in run["waits"] if wait.startswith("wmss_trl"))
    positions = "mix_logits" if RUNS[name].get("full_logits") else "_mixed_loss"
    assert waits == dict.fromkeys((f"wmss_trl: {positions}", "wmss_trl: _record"), run["weak_driven_steps"])
    if "gradient_accumulation_steps" not in RUNS[name]:
        assert sum(wait.startswith("trl:") for wait in run["waits"]) == 5 * run["sft_steps"]


def test_tensors_of_two_devices_must_not_meet(results):
    assert "meets one on the pretended device" in results["tensors of two devices"]["error"]
