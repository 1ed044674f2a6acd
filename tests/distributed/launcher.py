"""Launches the worker as a user launches a script: with a recipe of `recipes/accelerate`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

WORKER = Path(__file__).with_name("worker.py")
RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"


def launch(folder, engine, runs, processes=2, mixed_precision="no", environment=(), recipe=None):
    """Launch the worker for one run after the other and return the results of the ranks of each."""
    result = folder / f"result{len(list(folder.glob('result*')))}"
    result.touch()
    launcher = [sys.executable]
    if engine != "one":
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(RECIPES / f"{recipe or engine}.yaml")]
        launcher += ["--num_processes", str(processes), "--mixed_precision", mixed_precision]
        launcher += ["--main_process_port", "0"]
    runs = [{"engine": engine, "dataloader_drop_last": True, "plot_curriculum": False} | run for run in runs]
    process = subprocess.run(
        [*launcher, str(WORKER), json.dumps(runs), str(result)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | dict(environment),
        capture_output=True,
        text=True,
        timeout=300,
    )
    ranks = range(1 if engine == "one" else processes)
    paths = [[Path(f"{result}.{i}.{rank}.npz") for rank in ranks] for i in range(len(runs))]
    assert all(path.exists() for ranks in paths for path in ranks), process.stderr[-5000:]
    return [[dict(np.load(path)) for path in ranks] for ranks in paths]
