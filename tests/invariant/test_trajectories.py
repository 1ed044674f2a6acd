"""Runs go as they have gone: what changes a trajectory says so by committing it anew."""

import json

import numpy as np
import pytest
from trajectories import CONFIGURATIONS, FILE, trajectory

COMMITTED = json.loads(FILE.read_text())


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_first_20_steps_are_as_committed(name, tmp_path):
    ours, committed = trajectory(str(tmp_path), **CONFIGURATIONS[name]), COMMITTED[name]
    assert len(committed["loss"]) == 20
    assert ours["active_sets"] == committed["active_sets"]
    assert len(committed["active_sets"]) >= 1
    np.testing.assert_allclose(ours["loss"], committed["loss"], rtol=1e-5)
    np.testing.assert_allclose(ours["grad_norm"], committed["grad_norm"], rtol=1e-4)
