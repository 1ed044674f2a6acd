import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from trl import SFTConfig, TrlParser

from wmss_trl import WMSSConfig
from wmss_trl.cli.score import DrawConfig
from wmss_trl.config import convert_arguments, own_arguments
from wmss_trl.config_checks import CHECKS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixing_lambda": 1.1}, r"`mixing_lambda` must be in \(0, 1\], got 1.1"),
        ({"mixing_lambda": -0.1}, r"`mixing_lambda` must be in \(0, 1\], got -0.1"),
        ({"mixing_lambda": 0.0}, r"got 0.0. At 0 the strong model gets no gradient"),
        ({"mixing_lambda": float("nan")}, r"`mixing_lambda` must be a number, got nan"),
        ({"anchor_weight": 1.0}, r"`anchor_weight` must be in \[0, 1\), got 1.0"),
        ({"difficulty_weight": -0.1}, r"`difficulty_weight` must be a finite number >= 0, got -0.1"),
        ({"consolidation_weight": -1}, r"`consolidation_weight` must be a finite number >= 0, got -1"),
        ({"repair_weight": float("inf")}, r"`repair_weight` must be a finite number >= 0, got inf"),
        (
            {"difficulty_weight": 0, "consolidation_weight": 0, "repair_weight": 0},
            r"`difficulty_weight`, `consolidation_weight`, `repair_weight` are all 0.*`curriculum=False`",
        ),
        ({"curriculum_variant": "v3"}, r"`curriculum_variant` must be one of .* got 'v3'"),
        ({"active_fraction": 0.0}, r"`active_fraction` must be in \(0, 1\], got 0.0"),
        ({"active_fraction": 1.01}, r"`active_fraction` must be in \(0, 1\], got 1.01"),
        ({"sft_epochs": -1}, r"`sft_epochs` must be a whole number >= 0, got -1"),
        ({"sft_epochs": 0.5}, r"`sft_epochs` must be a whole number, got 0.5"),
        ({"scoring_batch_size": 0}, r"`scoring_batch_size` must be >= 1, got 0"),
        ({"label_smoothing_factor": 0.1}, r"`label_smoothing_factor=0.1` cannot be combined"),
        ({"scoring_tokens_per_batch": 0}, r"`scoring_tokens_per_batch` must be >= 1, got 0"),
        ({"scoring_batch_size": 4, "scoring_tokens_per_batch": 99}, r"Both `scoring_batch_size=4` and .*=99` are set"),
        ({"logits_buffer_mb": 0}, r"`logits_buffer_mb` must be >= 1, got 0. Leave it unset"),
        ({"weak_dtype": "bf16"}, r"`weak_dtype` must be one of .*'bfloat16'.* got 'bf16'"),
        ({"weak_dtype": "bfloat16", "train_weak": True}, r"`weak_dtype='bfloat16'` .*`train_weak=True`. Remove one"),
        (
            {"weak_dtype": "auto", "weak_model_init_kwargs": {"dtype": "float32"}},
            r"Both `weak_dtype='auto'` and `weak_model_init_kwargs` .* Remove one",
        ),
        (
            {"weak_dtype": "bfloat16", "weak_model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}},
            r"Both `weak_dtype='bfloat16'` and .*quantization_config",
        ),
        ({"rescore_epochs": 0}, r"`rescore_epochs` must be a whole number >= 1, got 0"),
        ({"rescore_epochs": 1.5}, r"`rescore_epochs` must be a whole number, got 1.5"),
        ({"score_file": "s.parquet"}, r"`score_file='s.parquet'` .* `sft_epochs=1` .* Set `sft_epochs=0`"),
        ({"score_file": "s.parquet", "curriculum": False, "sft_epochs": 0}, r"`score_file=.*`curriculum=False`"),
        ({"packing": True, "packing_strategy": "bfd_split"}, r"`packing_strategy='bfd_split'` cannot .* Use 'bfd'"),
        ({"packing": True, "curriculum_replacement": True}, r"`curriculum_replacement=True` cannot .*`packing=True`"),
        ({"train_sampling_strategy": "batch_rebalance"}, r"`train_sampling_strategy='batch_rebalance'` cannot"),
    ],
)
def test_bad_options_are_refused_with_option_value_and_remedy(make_args, options, message):
    with pytest.raises(ValueError, match=message):
        make_args(**options)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.options)
def test_each_check_names_its_options(make_args, check):
    options = check.options.split()
    assert set(options) <= vars(make_args()).keys()
    assert all(f"`{option}" in check.message for option in options)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("mixing_lambda", "0.5", "a number, got '0.5'. Set it to one, or leave it unset for the default, 0.5"),
        ("mixing_lambda", None, "a number, got None"),
        ("mixing_lambda", True, "a number, got True"),
        ("final_mixing_lambda", [0.5], r"a number or None, got \[0.5\]"),
        ("difficulty_weight", "0.8", "a number or None, got '0.8'"),
        ("active_fraction", float("nan"), "a number, got nan"),
        ("sft_epochs", None, "a whole number, got None. Set it to one, or leave it unset for the default, 1"),
        ("sft_epochs", 1.5, "a whole number, got 1.5"),
        ("sft_epochs", "1", "a whole number, got '1'"),
        ("sft_epochs", float("nan"), "a whole number, got nan"),
        ("sft_epochs", float("inf"), "a whole number, got inf"),
        ("sft_epochs", True, "a whole number, got True"),
        ("rescore_epochs", "2", "a whole number, got '2'"),
        ("logits_buffer_mb", 0.5, "a whole number or None, got 0.5"),
        ("scoring_batch_size", "8", "a whole number or None, got '8'"),
        ("scoring_tokens_per_batch", 8.5, "a whole number or None, got 8.5"),
        ("curriculum", "no", "True or False, got 'no'. Set it to one, or leave it unset for the default, True"),
        ("train_weak", "yes", "True or False, got 'yes'"),
        ("plot_curriculum", "no", "True or False or None, got 'no'"),
        ("curriculum_replacement", 2, "True or False, got 2"),
        ("weak_refresh", True, "a string, got True"),
        ("curriculum_variant", None, "a string, got None"),
        ("lambda_schedule", 0.5, "a string, got 0.5"),
        ("weak_cache", True, "a string or None, got True"),
        ("score_file", 5, "a string or None, got 5"),
        ("weak_model_name_or_path", 5, "a string or None, got 5"),
        ("weak_model_init_kwargs", "bfloat16", "a dictionary or a JSON object or None, got 'bfloat16'"),
        ("weak_model_init_kwargs", ["dtype"], "a dictionary or a JSON object or None, got"),
    ],
)
def test_options_of_a_wrong_type_are_refused_with_option_value_and_remedy(make_args, option, value, message):
    with pytest.raises(ValueError, match=f"`{option}` must be {message}"):
        make_args(**{option: value})


def test_values_that_stand_for_the_right_type_are_accepted(make_args):
    args = make_args(
        sft_epochs=2.0,
        rescore_epochs=np.int64(2),
        mixing_lambda=1,
        active_fraction=np.float32(0.5),
        curriculum=1,
        train_weak=np.False_,
        score_cache_dir=Path("scores"),
        weak_model_init_kwargs='{"dtype": "bfloat16"}',
        lambda_schedule=linear_in_progress,
    )
    assert (args.sft_epochs, type(args.sft_epochs), type(args.rescore_epochs)) == (2, int, int)
    assert (args.mixing_lambda, args.active_fraction) == (1, 0.5)
    assert args.curriculum is True
    assert args.train_weak is False
    assert args.score_cache_dir == "scores"
    assert args.weak_model_init_kwargs == {"dtype": "bfloat16"}
    assert args.lambda_schedule is linear_in_progress
    assert json.loads(args.to_json_string())["score_cache_dir"] == "scores"


def weights_of(args):
    return args.difficulty_weight, args.consolidation_weight, args.repair_weight


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0.1, 0.8, 0.1)),
        ({"curriculum_variant": "v1"}, (0.1, 0.8, 0.1)),
        ({"curriculum_variant": "v2"}, (0.8, 0.1, 0.1)),
        ({"curriculum_variant": "v2", "consolidation_weight": 0.8}, (0.8, 0.8, 0.1)),  # another variant's default
        ({"curriculum_variant": "v2", "difficulty_weight": 0, "repair_weight": 0.3}, (0, 0.1, 0.3)),
        ({"curriculum_variant": "released", "difficulty_weight": 0.8}, (0.8, 0.8, 0.1)),
    ],
)
def test_a_variant_brings_the_weights_that_are_not_set(make_args, options, expected):
    args = make_args(**options)
    assert weights_of(args) == expected
    assert weights_of(DrawConfig(args.output_dir, **options)) == expected
    copies = [
        copy.deepcopy(args),
        own_arguments(args),
        dataclasses.replace(args, seed=7),
        convert_arguments(args, WMSSConfig),
        WMSSConfig(**{name: value for name, value in args.to_dict().items() if not name.endswith("_token")}),
    ]
    assert [weights_of(made) for made in copies] == [expected] * len(copies)
    assert args.to_dict()["difficulty_weight"] == expected[0]


def test_a_copy_with_another_variant_keeps_the_weights(make_args):
    args = dataclasses.replace(make_args(difficulty_weight=0.3), curriculum_variant="v2")
    assert weights_of(args) == (0.3, 0.8, 0.1)


def test_arguments_of_another_class_get_the_weights_of_the_variant(make_args):
    args = convert_arguments(make_args(cls=SFTConfig), WMSSConfig, curriculum_variant="v2", repair_weight=0.2)
    assert weights_of(args) == (0.8, 0.1, 0.2)


def test_the_variant_of_a_recipe_brings_its_weights(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "output_dir: run\nbf16: false\nuse_cpu: true\ncurriculum_variant: v2\nconsolidation_weight: 0.8\n"
    )
    for cls in (WMSSConfig, DrawConfig):
        (args,) = TrlParser(cls).parse_args_and_config(["--config", str(tmp_path / "run.yaml"), "--repair_weight=0"])
        assert weights_of(args) == (0.8, 0.8, 0)


def linear_in_progress(progress):
    return 0.5 + progress / 4


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dft"},
        {"loss_type": "dft", "mixing_lambda": 1.0},
        {"packing": True, "packing_strategy": "bfd_split", "curriculum": False},
        {"packing": True, "packing_strategy": "wrapped", "curriculum_replacement": True},
        {"packing": True},
        {"train_sampling_strategy": "batch_rebalance", "curriculum": False},
        {"train_sampling_strategy": "group_by_length"},
        {"anchor_weight": 0.0, "active_fraction": 1.0, "sft_epochs": 0},
    ],
)
def test_combinations_that_work_are_accepted(make_args, options):
    args = make_args(**options)
    assert {option: getattr(args, option) for option in options} == options


def test_a_run_without_a_weak_driven_epoch_warns(make_args, recwarn):
    make_args(num_train_epochs=3, sft_epochs=2)
    make_args(num_train_epochs=1, sft_epochs=1, max_steps=100)  # epochs do not end this run
    make_args(num_train_epochs=1, sft_epochs=1, mixing_lambda=1.0, curriculum=False)  # plain SFT, as asked for
    assert not [warning for warning in recwarn if "weak-driven" in str(warning.message)]
    with pytest.warns(UserWarning, match="`sft_epochs=3` with `num_train_epochs=3` leaves no weak-driven epoch"):
        make_args(num_train_epochs=3, sft_epochs=3)


def test_options_come_from_yaml_and_the_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "output_dir: run\nbf16: false\nuse_cpu: true\nmixing_lambda: 0.42\nactive_fraction: 0.5\n"
        "weak_model_init_kwargs: {dtype: bfloat16}\n"
    )
    (args,) = TrlParser(WMSSConfig).parse_args_and_config(
        ["--config", str(tmp_path / "run.yaml"), "--mixing_lambda", "0.5", "--curriculum", "false"]
    )
    assert (args.mixing_lambda, args.active_fraction, args.curriculum) == (0.5, 0.5, False)
    assert args.weak_model_init_kwargs == {"dtype": "bfloat16"}


def test_every_option_of_the_command_line_gets_its_type(tmp_path):
    """What a shell or a quoted YAML value gives is a string, which the parser converts."""
    (tmp_path / "run.yaml").write_text(
        "output_dir: run\nbf16: false\nuse_cpu: true\ncurriculum: 'no'\nsft_epochs: '2'\nmixing_lambda: 5e-1\n"
    )
    given = {
        "anchor_weight": "0.25",
        "lambda_schedule": "linear",
        "final_mixing_lambda": "1",
        "weak_refresh": "epoch",
        "weak_refresh_device": "same",
        "weak_dtype": "bfloat16",
        "plot_curriculum": "no",
        "rescore_epochs": "2",
        "scoring_batch_size": "4",
        "logits_buffer_mb": "64",
        "train_weak": "false",
        "weak_model_init_kwargs": '{"revision": "main"}',
        "difficulty_weight": "0.3",
    }
    command_line = [f"--{option}={value}" for option, value in given.items()]
    (args,) = TrlParser(WMSSConfig).parse_args_and_config(["--config", str(tmp_path / "run.yaml"), *command_line])
    expected = {
        "curriculum": False,
        "sft_epochs": 2,
        "mixing_lambda": 0.5,
        "anchor_weight": 0.25,
        "lambda_schedule": "linear",
        "final_mixing_lambda": 1.0,
        "weak_refresh": "epoch",
        "weak_refresh_device": "same",
        "weak_dtype": "bfloat16",
        "plot_curriculum": False,
        "rescore_epochs": 2,
        "scoring_batch_size": 4,
        "logits_buffer_mb": 64,
        "train_weak": False,
        "weak_model_init_kwargs": {"revision": "main"},
        "difficulty_weight": 0.3,
    }
    assert {option: getattr(args, option) for option in expected} == expected
    (tmp_path / "run.yaml").write_text("output_dir: run\nbf16: false\nuse_cpu: true\nsft_epochs: 1.5\n")
    with pytest.raises(ValueError, match=r"`sft_epochs` must be a whole number, got 1.5"):
        TrlParser(WMSSConfig).parse_args_and_config(["--config", str(tmp_path / "run.yaml")])
