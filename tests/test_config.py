import pytest
from trl import TrlParser

from wmss_trl import WMSSConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixing_lambda": 1.1}, r"`mixing_lambda` must be in \(0, 1\], got 1.1"),
        ({"mixing_lambda": -0.1}, r"`mixing_lambda` must be in \(0, 1\], got -0.1"),
        ({"mixing_lambda": 0.0}, r"got 0.0. At 0 the strong model gets no gradient"),
        ({"mixing_lambda": float("nan")}, r"`mixing_lambda` must be in \(0, 1\], got nan"),
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
        ({"sft_epochs": 0.5}, r"`sft_epochs` must be a whole number >= 0, got 0.5"),
        ({"scoring_batch_size": 0}, r"`scoring_batch_size` must be >= 1, got 0"),
        ({"label_smoothing_factor": 0.1}, r"`label_smoothing_factor=0.1` cannot be combined"),
        ({"scoring_tokens_per_batch": 0}, r"`scoring_tokens_per_batch` must be >= 1, got 0"),
        ({"scoring_batch_size": 4, "scoring_tokens_per_batch": 99}, r"Both `scoring_batch_size=4` and .*=99` are set"),
        ({"rescore_epochs": 0}, r"`rescore_epochs` must be a whole number >= 1, got 0"),
        ({"rescore_epochs": 1.5}, r"`rescore_epochs` must be a whole number >= 1, got 1.5"),
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
