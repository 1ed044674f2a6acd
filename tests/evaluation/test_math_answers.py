import math

import numpy as np
import pytest

from wmss_trl.evaluation.math_answers import accuracy, extract_answer, is_correct


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"First \boxed{1}, then \boxed{\frac{3}{x^{2}}}. #### 7 The answer is 8.", r"\frac{3}{x^{2}}"),
        (r"An open \boxed{4", "4"),
        ("The answer is 8. #### 7", "7"),
        ("#### 6\nNo, it is\n#### 1,007 apples.", "1,007"),
        ("####\n5", "5"),
        ("The answer is 8. There are 3 left", "8"),
        ("The final answer is: $42 dollars.", "42"),
        ("The Answer is **7**.", "7"),
        ("The answer is 0.25", "0.25"),
        ("The answer is 3/4 of a pie", "3/4"),
        ("The answer is (C)", "(C)"),
        ("The answer is 2x + 3.", "2x + 3"),
        ("The answer is\n12", "12"),
        ("5 - 3 = 2 and 1,234.5.", "1,234.5"),
        ("x = -5", "-5"),
        ("20-5", "5"),
        ("no number", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("1,000", "1000"),
        ("$1000", "1000.00"),
        (r"\$5", "5"),
        ("50%", "50"),
        (r"50\%", "50"),
        ("18.", "18"),
        ("18 apples", "18"),
        (r"18\text{ cm}", "18"),
        ("3/4", "0.75"),
        ("3 / 4", "0.75"),
        (r"\frac{3}{4}", "3/4"),
        (r"-\dfrac{3}{4}", "-.75"),
        ("−5", "-5"),
        ("+5", "5"),
        ("007", "7"),
        ("1.8333333333", "1.83333"),
        (r"\left( x + 1 \right)", "(x+1)"),
        (r"\text{Evelyn}", "evelyn"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_same_answer(prediction: str, reference: str) -> None:
    assert is_correct(prediction, reference)
    assert is_correct(reference, prediction)


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        (None, "1"),
        ("", "1"),
        ("1", "-1"),
        ("1000001", "1000000"),
        ("0.33", "1/3"),
        ("1/0", "1"),
        ("50%", "0.5"),
        ("x", "y"),
        ("5 or 6", "5"),
        ("1e999999999", "1"),
    ],
)
def test_different_answer(prediction: str | None, reference: str) -> None:
    assert not is_correct(prediction, reference)


def test_accuracy() -> None:
    correct = [True, False, True, True] * 25
    mean, error = accuracy(correct)
    assert mean == 0.75
    assert math.isclose(error, np.std(correct) / math.sqrt(100))
    assert accuracy([True]) == (1.0, 0.0)
    with pytest.raises(ValueError, match="empty"):
        accuracy([])
