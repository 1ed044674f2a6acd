"""Two real processes under `accelerate launch`, with each engine's recipe, against one at the same global batch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sums
from launcher import RECIPES, launch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from wmss_trl.data.tiny import build_model, build_tokenizer

# Too long for `make test`, in which the rows of tests/pairwise with two processes are launched
pytestmark = [pytest.mark.ci, pytest.mark.launched]

ENGINES = ["ddp", "fsdp2", "zero2", "zero3"]

# What is run under every engine. Runs of LoRA need a large learning rate, or the entropies hardly change and the draw
# hangs on their last digit.
JOINT = {"train_weak": True, "mixing_lambda": 0.4, "weight_decay": 0.1}
MATRIX = {"frozen": {}, "lora": {"lora": True, "learning_rate": 0.01}, "joint": JOINT}
OTHERS = {
    "joint-lora": JOINT | {"lora": True, "learning_rate": 0.01, "gradient_checkpointing": True},
    "rounds": {"weak_refresh": "epoch", "num_train_epochs": 3},
    "cached": {"weak_cache": "hidden", "gradient_accumulation_steps": 2},
    "other-model": {
        "own_weak_model": True,
        "lambda_schedule": "crossover",
        "train_sampling_strategy": "group_by_length",
    },
    "curriculum-only": {"mixing_lambda": 1.0},
    "packed": {"packing": True, "max_length": 40, "per_device_train_batch_size": 1},
    "evaluated": {
        "sft_epochs": 0,
        "num_train_epochs": 1,
        "model": "untied",
        "weak_model": "model",
        "evaluate": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 4,
    },
    # Scored in 5 batches by 2 processes: the last one is for one of them
    "few": {"num_examples": 9, "active_fraction": 1.0, "scoring_batch_size": 2},
}
# Where an engine has something to go wrong that another has not. What else DDP does is in tests/pairwise.
WHOLE = {"frozen": MATRIX["frozen"], "joint": MATRIX["joint"], "few": OTHERS["few"]}
KINDS = {"ddp": WHOLE, "fsdp2": MATRIX | OTHERS, "zero2": WHOLE, "zero3": MATRIX | OTHERS}
KINDS["ddp"] = KINDS["ddp"] | {
    "joint-full-logits": JOINT | {"full_logits": True},
    "joint-lora-full-logits": JOINT | {"lora": True, "learning_rate": 0.01, "full_logits": True},
}
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}
KINDS["fsdp2"] = KINDS["fsdp2"] | {
    "sparing": {"sparing_load": True},
    "compiled": COMPILED,
    "compiled-lora": COMPILED | MATRIX["lora"],
    "compiled-scored-first": COMPILED | {"sft_epochs": 0},
    "compiled-lora-scored-first": COMPILED | MATRIX["lora"] | {"sft_epochs": 0},
    "compiled-rounds": COMPILED | OTHERS["rounds"],
    "sparing-joint": JOINT | {"sparing_load": True, "own_weak_model": True},
    "full-logits": {"own_weak_model": True, "full_logits": True},
    "sharded-files": JOINT | {"state_dict_type": "SHARDED_STATE_DICT"},
}
KINDS["zero3"] = KINDS["zero3"] | {
    "split-at-loading": {"model": "model"},
    "full-logits": {"own_weak_model": True, "full_logits": True},
}
CASES = [(engine, kind) for engine in ENGINES for kind in KINDS[engine]]
# A step of phase 1, and one in the middle of the last epoch
RESUMED = dict.fromkeys((*MATRIX, "joint-lora", "sharded-files"), (3, 12)) | {"rounds": (12, 18), "cached": (6,)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    tokenizer = build_tokenizer([row["prompt"] + row["completion"] for row in sums(37)], vocab_size=300)
    torch.manual_seed(0)
    build_model(tokenizer, hidden_size=32, intermediate_size=64, num_layers=2).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    config = AutoConfig.from_pretrained(folder / "model", tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "untied")
    tokenizer.save_pretrained(folder / "untied")
    return folder


def options_of(folder, engine, kind):
    options = {"per_device_train_batch_size": 2} | KINDS[engine][kind]
    return options | {key: str(folder / options[key]) for key in ("model", "weak_model") if key in options}


@pytest.fixture(scope="module")
def single_runs(folder):
    """Each kind of run on one process, at the global batch of two."""
    kinds = {kind: (options_of(folder, engine, kind)) for engine in ENGINES for kind in KINDS[engine]}
    runs = [
        {name: value for name, value in options.items() if not name.startswith("torch_compile")}
        | {name: 2 * value for name, value in options.items() if name.endswith("batch_size")}
        | {
            "output_dir": str(folder / "one" / kind),
            "save_strategy": "steps" if kind == "frozen" else "no",
            "save_steps": 1,
        }
        for kind, options in kinds.items()
    ]
    return dict(zip(kinds, launch(folder, "one", runs), strict=True))


@pytest.fixture(scope="module")
def whole_runs(folder):
    """Each kind of run under an engine, saved after the steps from which it is resumed and at the end."""
    results = {}

    def whole_runs_of(engine):
        if engine not in results:
            results[engine] = None  # a launch that has failed is not tried again for each test
            runs = [
                options_of(folder, engine, kind)
                | {
                    "output_dir": str(folder / engine / kind),
                    "save_strategy": "steps" if kind in RESUMED else "no",
                    "save_steps": 1 if kind == "frozen" else 3 if 3 in RESUMED.get(kind, ()) else 6,
                    "save": True,
                }
                for kind in KINDS[engine]
            ]
            results[engine] = dict(zip(KINDS[engine], launch(folder, engine, runs), strict=True))
        if results[engine] is None:
            pytest.fail(f"the launch with {engine} failed in a test before this one")
        return results[engine]

    return whole_runs_of


@pytest.mark.parametrize(("engine", "kind"), CASES)
def test_two_processes_equal_one_at_the_same_global_batch(whole_runs, single_runs, engine, kind):
    (single,) = single_runs[kind]
    for ours in whole_runs(engine)[kind]:
        np.testing.assert_allclose(ours["loss"], single["loss"], rtol=1e-5)
        np.testing.assert_allclose(ours["mixed_nll"], single["mixed_nll"], rtol=1e-5)
        np.testing.assert_allclose(ours["grad_norm"], single["grad_norm"], rtol=1e-4)
        # Of other batches, of whose means transformers takes the mean
        np.testing.assert_allclose(ours["eval_loss"], single["eval_loss"], rtol=1e-3)
        np.testing.assert_array_equal(ours["num_tokens"], single["num_tokens"])
        np.testing.assert_allclose(ours["weak_entropy"], single["weak_entropy"], atol=1e-5)
        np.testing.assert_allclose(ours["strong_entropy"], single["strong_entropy"], atol=1e-5)
        np.testing.assert_array_equal(ours["indices"], single["indices"])
        np.testing.assert_array_equal(ours["names"], single["names"])
        np.testing.assert_allclose(ours["weights"], single["weights"], atol=1e-5)


@pytest.mark.parametrize(("engine", "kind"), CASES)
def test_ranks_agree_exactly(whole_runs, engine, kind):
    first, second = whole_runs(engine)[kind]
    for key in first.keys() - {"last_epoch"}:
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)


@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_share_the_active_set(whole_runs, engine):
    """Each example of the list is visited on one rank, once; `drop_last` leaves out the last incomplete batch."""
    ranks = whole_runs(engine)["frozen"]
    parts = [json.loads(str(ours["last_epoch"])) for ours in ranks]
    active_set = json.loads(str(ranks[0]["active_set"]))
    assert len(parts[0]) == len(parts[1]) == 10
    assert sorted(parts[0] + parts[1]) == sorted(active_set[:20])


@pytest.mark.parametrize(("engine", "kind"), CASES)
def test_the_strong_model_alone_is_saved_and_loads_with_plain_transformers(folder, whole_runs, engine, kind):
    result = whole_runs(engine)[kind][0]
    saved = folder / engine / kind
    if "lora" in kind:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), saved)
    else:
        model = AutoModelForCausalLM.from_pretrained(saved)
    trained = dict(zip(result["names"], np.split(result["weights"], result["sizes"].cumsum()[:-1]), strict=True))
    trained = {name: value for name, value in trained.items() if "weak_branch" not in name and "wmss_weak" not in name}
    weights = {name: parameter.detach().numpy().ravel() for name, parameter in model.named_parameters()}
    assert weights.keys() == trained.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(value, trained[name], err_msg=name)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_stopped_and_resumed_in_new_processes_ends_the_same(folder, whole_runs, engine):
    """In the middle of an epoch accelerate's SkipBatchSampler hides a custom sampler."""
    resumptions, expected = [], []
    for kind, results in whole_runs(engine).items():
        every_step = engine == "ddp" and kind == "frozen"
        for step in range(1, 14) if every_step else RESUMED.get(kind, ()):
            checkpoint = folder / engine / kind / f"checkpoint-{step}"
            resumptions.append({"resume": str(checkpoint), **options_of(folder, engine, kind)})
            expected.append(results)
    assert len(expected) >= 4
    common = {"save_strategy": "no", "output_dir": str(folder / engine / "resumed")}
    resumed = launch(folder, engine, [common | run for run in resumptions])
    for resumption, ranks, whole_ranks in zip(resumptions, resumed, expected, strict=True):
        for ours, whole in zip(ranks, whole_ranks, strict=True):
            where = resumption["resume"]
            np.testing.assert_array_equal(ours["indices"], whole["indices"], err_msg=where)
            np.testing.assert_allclose(ours["loss"], whole["loss"], rtol=1e-6, err_msg=where)
            np.testing.assert_allclose(ours["weights"], whole["weights"], atol=1e-6, err_msg=where)


def test_a_run_stopped_after_any_step_and_resumed_in_a_new_process_ends_bit_for_bit_the_same(folder, single_runs):
    (whole,) = single_runs["frozen"]
    common = {"per_device_train_batch_size": 4, "save_strategy": "no", "output_dir": str(folder / "one" / "resumed")}
    checkpoints = [folder / "one" / "frozen" / f"checkpoint-{step}" for step in range(1, 14)]
    resumed = launch(folder, "one", [common | {"resume": str(checkpoint)} for checkpoint in checkpoints])
    assert len(whole["loss"]) == 14
    for checkpoint, (ours,) in zip(checkpoints, resumed, strict=True):
        for key in ("indices", "loss", "weights"):
            np.testing.assert_array_equal(ours[key], whole[key], err_msg=checkpoint)


@pytest.mark.parametrize(("engine", "resumed_with"), [("ddp", "one"), ("fsdp2", "fsdp2")])
def test_a_run_of_two_processes_goes_on_on_one(folder, whole_runs, engine, resumed_with):
    """The draw does not depend on the number of processes."""
    whole = whole_runs(engine)["frozen"][0]
    common = {"per_device_train_batch_size": 4, "save_strategy": "no", "output_dir": str(folder / "fewer" / engine)}
    checkpoints = [str(folder / engine / "frozen" / f"checkpoint-{step}") for step in (3, 12)]
    runs = [common | {"resume": checkpoint} for checkpoint in checkpoints]
    for (ours,) in launch(folder, resumed_with, runs, processes=1):
        np.testing.assert_array_equal(ours["indices"], whole["indices"])
        np.testing.assert_allclose(ours["loss"], whole["loss"], rtol=1e-5)
        np.testing.assert_allclose(ours["weights"], whole["weights"], atol=1e-5)


def test_a_run_of_one_process_goes_on_on_two(folder, single_runs):
    (whole,) = single_runs["frozen"]
    common = {"per_device_train_batch_size": 2, "save_strategy": "no", "output_dir": str(folder / "more")}
    checkpoints = [str(folder / "one" / "frozen" / f"checkpoint-{step}") for step in (3, 12)]
    for ranks in launch(folder, "ddp", [common | {"resume": checkpoint} for checkpoint in checkpoints]):
        for ours in ranks:
            np.testing.assert_array_equal(ours["indices"], whole["indices"])
            np.testing.assert_allclose(ours["loss"], whole["loss"], rtol=1e-5)
            np.testing.assert_allclose(ours["weights"], whole["weights"], atol=1e-5)


@pytest.mark.parametrize(
    ("engine", "form"), [("ddp", "replicated"), ("fsdp2", "fsdp2"), ("zero3", "zero3, 2 processes")]
)
def test_a_checkpoint_tells_what_it_can_be_resumed_with(folder, whole_runs, engine, form):
    whole_runs(engine)
    state = json.loads((folder / engine / "frozen" / "checkpoint-12" / "wmss_state.json").read_text())
    assert state["run"]["engine"] == form


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles its Adam for the CPU")
def test_zero3_with_parameters_and_optimizer_in_host_memory(folder, single_runs):
    kinds = {"frozen": {}, "joint": JOINT}
    common = {"per_device_train_batch_size": 2, "output_dir": str(folder / "offload"), "save_strategy": "no"}
    for kind, ranks in zip(
        kinds, launch(folder, "zero3_offload", [common | options for options in kinds.values()]), strict=True
    ):
        (single,) = single_runs[kind]
        for ours in ranks:
            np.testing.assert_allclose(ours["loss"], single["loss"], rtol=1e-5)
            np.testing.assert_array_equal(ours["indices"], single["indices"])
            np.testing.assert_allclose(ours["weights"], single["weights"], atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles its communication for the CPU")
def test_the_example_runs_under_zero3_and_evaluates_the_model_that_it_saved(folder):
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in sums(80)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {
        "model_name_or_path": folder / "model",
        "dataset_path": folder / "problems.jsonl",
        "num_test": 4,
        "max_new_tokens": 4,
        "use_cpu": True,
        "bf16": False,
        "num_train_epochs": 2,
        "output_dir": folder / "example",
        "report_to": "none",
    }
    script = Path(__file__).parents[2] / "examples" / "train_math.py"
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    recipe = ["--config_file", str(RECIPES / "zero3.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
    process = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *recipe, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "Greedy exact match on 4 held-out problems" in process.stdout, process.stderr[-3000:]
    AutoModelForCausalLM.from_pretrained(folder / "example")


def test_a_model_that_transformers_splits_is_refused(folder):
    """Accelerate is not told of it: the engine would be taken for DDP."""
    options = {"model_init_kwargs": {"distributed_config": {"fsdp_size": 2}}, "save_strategy": "no"}
    options |= {name: str(folder / "model") for name in ("model", "weak_model")} | {"output_dir": str(folder / "out")}
    with pytest.raises(AssertionError, match=r"`model` was split .*`distributed_config`"):
        launch(folder, "ddp", [options])


def test_a_weak_branch_that_is_not_synchronised_is_caught(folder, single_runs):
    """The checks above would notice a weak model that the engine does not know."""
    options = {"per_device_train_batch_size": 2, "output_dir": str(folder / "control"), "unsynchronised": True}
    ((first, second),) = launch(folder, "ddp", [options | JOINT | {"save_strategy": "no"}], recipe="cpu2")
    (single,) = single_runs["joint"]
    assert np.abs(first["weights"] - second["weights"]).max() > 1e-4
    np.testing.assert_array_equal(first["names"], single["names"])
    assert np.abs(first["weights"] - single["weights"]).max() > 1e-4
