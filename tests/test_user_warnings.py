import warnings

import pytest
import torch.distributed as dist

from wmss_trl.user_warnings import warn


def test_the_main_process_warns_from_where_it_is_called(recwarn, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    warn("something")
    assert [(str(warning.message), warning.filename) for warning in recwarn] == [("something", __file__)]


@pytest.mark.parametrize("connected", [False, True])
def test_the_other_processes_are_silent(recwarn, monkeypatch, connected):
    monkeypatch.setenv("RANK", "0" if connected else "1")
    monkeypatch.setattr(dist, "is_initialized", lambda: connected)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    warn("something")
    assert not recwarn.list


def test_repeating_a_warning_shows_it_once():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            warn("the same again")
    assert len(shown) == 1
