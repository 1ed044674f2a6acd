"""
Mistakes that the pairwise suite must see: `python tests/pairwise/mutations.py` looks for a row that each turns red.

The first four are defects that the package had.
"""

import contextlib
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from factors import read_rows
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import wmss_trl.loop.selection
import wmss_trl.loop.step
import wmss_trl.loop.two_phase
import wmss_trl.modeling.adapters
import wmss_trl.scoring.hidden_cache
import wmss_trl.scoring.score_cache
import wmss_trl.trainer
import wmss_trl.weak_model.adapters
import wmss_trl.weak_model.factory
from wmss_trl.curriculum import CurriculumSampler
from wmss_trl.trainer import WMSSTrainer
from wmss_trl.weak_model.refresh import WeakRefresh

MUTATIONS: dict[str, Callable[[], AbstractContextManager[Any]]] = {}
_FILE = Path(__file__).with_name("mutations.json")


def mutation(function: Callable[[], Iterator[None]]) -> Callable[[], AbstractContextManager[None]]:
    MUTATIONS[function.__name__] = contextmanager(function)
    return MUTATIONS[function.__name__]


def replaced(owner: Any, name: str, make: Callable[[Callable], Callable]) -> AbstractContextManager[Any]:
    """Replace a function by what `make` makes of it."""
    original = getattr(owner, name)
    return patch.object(owner, name, wraps(original)(make(original)))


@mutation
def a_resume_does_not_ask_for_the_global_batch():
    with patch.object(wmss_trl.loop.two_phase, "check_same_steps", lambda *args: None):
        yield


@mutation
def scores_come_from_the_plain_collator():
    def make(original):
        return lambda self, collator: original(self, DataCollatorForLanguageModeling(0))

    with replaced(wmss_trl.loop.selection.Selection, "_scoring_collator", make):
        yield


@mutation
def an_adapter_switched_off_is_m0_whatever_it_trains():
    with (
        patch.object(wmss_trl.weak_model.factory, "effect_on_base", lambda config: "none"),
        patch.object(wmss_trl.weak_model.factory, "trains_base", lambda model: False),
    ):
        yield


@mutation
def the_arguments_of_the_caller_are_used_and_changed():
    with patch.object(WMSSTrainer, "_as_wmss_config", staticmethod(lambda args, model: args)):
        yield


@mutation
def targets_are_not_shifted():
    with patch.object(
        wmss_trl.trainer, "next_token_targets", lambda labels, ignore_index=-100: labels.reshape(-1).clone()
    ):
        yield


@mutation
def scale_and_softcap_of_the_weak_logits_are_forgotten():
    def make(original):
        return lambda *args, **kwargs: original(*args, **kwargs | {"weak_scale": 1.0, "weak_softcap": None})

    with replaced(wmss_trl.loop.step, "linear_mixed_cross_entropy", make):
        yield


@mutation
def the_weak_model_is_in_train_mode():
    @contextmanager
    def activated(self):
        with torch.no_grad():
            yield self.model.train()

    with patch.object(wmss_trl.weak_model.frozen.FrozenModel, "activated", activated):
        yield


@mutation
def micro_batches_are_averaged_each_for_itself():
    def make(original):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = original(self, model, inputs, return_outputs, None)
            return loss / self.current_gradient_accumulation_steps

        return compute_loss

    with replaced(WMSSTrainer, "compute_loss", make):
        yield


@mutation
def scores_are_those_of_the_first_redraw():
    def make(original):
        kept = {}

        def score(self):
            kept.setdefault(id(self), original(self))
            return kept[id(self)]

        return score

    with replaced(wmss_trl.loop.selection.Selection, "score", make):
        yield


@mutation
def the_draw_is_that_of_the_first_redraw():
    def make(original):
        def redraw(self, epoch):
            indices = self.indices
            original(self, epoch)
            if indices is not None:
                self.indices = indices

        return redraw

    with replaced(CurriculumSampler, "redraw", make):
        yield


@mutation
def lambda_weighs_the_weak_model():
    def make(original):
        return lambda *args, mixing_lambda, **kwargs: original(*args, mixing_lambda=1 - mixing_lambda, **kwargs)

    with replaced(wmss_trl.loop.step, "linear_mixed_cross_entropy", make):
        yield


@mutation
def the_anchor_is_forgotten_on_full_logits():
    def make(original):
        return lambda *args, **kwargs: original(*args, **kwargs | {"anchor_weight": 0.0})

    with replaced(wmss_trl.trainer, "mixed_loss", make):
        yield


@mutation
def a_round_mixes_with_the_strong_model_as_it_is():
    def make(original):
        def start_round(self, epoch):
            original(self, epoch)
            if epoch > self.first_epoch:
                self._set_weak_state(self._read_snapshot())

        return start_round

    with replaced(WeakRefresh, "start_round", make):
        yield


@mutation
def the_adapter_stays_on_for_the_weak_logits():
    @contextmanager
    def active_adapter(model, name):
        yield

    with patch.object(wmss_trl.weak_model.adapters, "active_adapter", active_adapter):
        yield


@mutation
def cached_hidden_states_come_in_another_order():
    def make(original):
        return lambda self, indices: original(self, indices[::-1])

    with replaced(wmss_trl.scoring.hidden_cache.HiddenCache, "read", make):
        yield


@mutation
def a_trained_weak_model_gets_no_gradient():
    def make(original):
        def loss(*args, **kwargs):
            args = list(args)
            args[2] = args[2].detach()
            return original(*args, **kwargs)

        return loss

    with replaced(wmss_trl.loop.step, "linear_mixed_cross_entropy", make):
        yield


@mutation
def the_router_loss_is_forgotten_in_weak_driven_steps():
    def make(original):
        def mixed_loss(*args, **kwargs):
            mixed, outputs = original(*args, **kwargs)
            if outputs["aux_loss"] is not None:
                outputs["aux_loss"] = 0 * outputs["aux_loss"]
            return mixed, outputs

        return mixed_loss

    with replaced(WMSSTrainer, "_mixed_loss", make):
        yield


@mutation
def a_resumed_run_forgets_its_draw():
    with patch.object(CurriculumSampler, "load", lambda self, *args, **kwargs: None):
        yield


@mutation
def a_weak_branch_is_saved_with_the_model():
    @contextmanager
    def detached(self):
        yield

    with patch.object(wmss_trl.weak_model.joint.TrainedModel, "detached", detached):
        yield


def read_rows_that_see_them() -> dict[str, int]:
    return json.loads(_FILE.read_text())


def main() -> None:
    from judge import judge, write_score_file
    from rows import run_row
    from world import World

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows, found = read_rows(), {}
    for name, mutate in MUTATIONS.items():
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        for number, row in enumerate(rows):
            if row["processes"] == "2":
                continue
            with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
                world = World.build(row, Path(folder))
                if row["curriculum"] == "score-file":
                    write_score_file(world)
                stack.enter_context(mutate())
                try:
                    judge(world, [run_row(row, Path(folder))])
                except (AssertionError, ValueError, RuntimeError) as error:
                    found[name] = number
                    print(f"{name}: row {number}, {str(error)[:150]!r}", flush=True)
                    break
        else:
            print(f"{name}: NO ROW SEES IT", flush=True)
    if len(sys.argv) == 1:
        _FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
