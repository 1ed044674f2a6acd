import numpy as np
import pytest

from wmss_trl.baselines.comparison import Result
from wmss_trl.baselines.report import best_sft, format_table, format_verdict, paired_difference

METRICS = {"nll": 1.0, "entropy": 2.0, "mixed_nll": 3.0, "amplification": 4.0}


def run(wmss, sft, temperature, slow_sft=0, num_problems=100):
    """Results with so many problems solved; the solved ones come first, so that rows are paired."""
    solved = {"WMSS": wmss, "SFT, lr x 0.5": slow_sft, "SFT, lr x 1": sft, "temperature only": temperature}
    return [Result(name, np.arange(num_problems) < number, METRICS) for name, number in solved.items()]


def test_difference_of_one_seed_is_paired_by_problem():
    mean, error = paired_difference([run(50, 40, 0)], "WMSS", "SFT, lr x 1")
    difference = np.array([1] * 10 + [0] * 90)
    assert mean == pytest.approx(10)
    assert error == pytest.approx(100 * difference.std(ddof=1) / 10)


def test_difference_of_several_seeds_is_paired_by_seed():
    runs = [run(50, 40, 0), run(70, 68, 0), run(30, 24, 0)]
    mean, error = paired_difference(runs, "WMSS", "SFT, lr x 1")
    assert mean == pytest.approx(6)
    assert error == pytest.approx(4 / np.sqrt(3))


def test_the_baseline_is_sft_at_its_best_learning_rate():
    assert best_sft([run(50, 40, 0, slow_sft=45)]) == "SFT, lr x 0.5"


@pytest.mark.parametrize(
    ("solved", "sentence"),
    [
        ((40, 60, 20), "WMSS is worse than continued SFT"),
        ((60, 59, 20), "neither a gain nor a loss is shown"),
        ((60, 40, 59), "not shown to come from the weak model"),
        ((60, 40, 40), "better than continued SFT (SFT, lr x 1) and than the control without a weak model"),
    ],
)
def test_the_last_sentence_says_what_the_numbers_say(solved, sentence):
    assert sentence in format_verdict([run(*solved)]).splitlines()[-1]


def test_table_averages_over_seeds():
    row = format_table([run(50, 40, 0), run(60, 40, 0)]).splitlines()[2]
    assert row == "| WMSS | 55.0 ± 5.0 | 1.000 | 2.000 | 3.000 | 4.00 |"
