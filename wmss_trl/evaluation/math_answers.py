"""Final answers of worked solutions: finding them, comparing them, and the accuracy over many."""

import math
import re
from collections.abc import Sequence
from fractions import Fraction

_NUMBER = r"(?<![\d.])[-+−]?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?"
_NUMBER_AND_UNIT = re.compile(rf"[\s$*:=]*({_NUMBER})\s*%?(?:\s+[A-Za-z][A-Za-z ]*)?[.\s$*]*")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}")
_LATEX_NOISE = re.compile(r"\\left|\\right|\\[,!; ]|\\?[$%]|\{,\}|,(?=\d{3}(?!\d))")
# Decimals are often rounded in references; whole numbers never are.
_RELATIVE_TOLERANCE = Fraction(1, 100_000)


def _last_boxed(text: str) -> str | None:
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    start += len(r"\boxed{")
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position].strip()
    return None


def _without_unit(text: str) -> str:
    """Reduces "$42 dollars." to "42" and leaves anything that is not one number, perhaps with words after it."""
    match = _NUMBER_AND_UNIT.fullmatch(text)
    return match[1] if match else text.strip(" $*:.")


def extract_answer(text: str) -> str | None:
    r"""
    Finds the final answer that a worked solution states.

    The first of these that occurs decides, each at its last occurrence: `\boxed{...}`, `#### ...`, "answer is ...",
    any number.

    Args:
        text (`str`):
            Solution, as generated or as given in a data set.

    Returns:
        `str` or `None`: the answer as it stands in the text, or `None` when there is not even a number.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    for marker in ("####", "(?i:answer is)"):
        stated = re.findall(f"{marker}(.*)", text)
        if stated:
            # The sentence ends at a full stop, unless that is a decimal point.
            answer = _without_unit(re.split(r"\.\s", stated[-1])[0])
            if answer:
                return answer
    numbers = re.findall(_NUMBER, text)
    return numbers[-1] if numbers else None


def _normalise(answer: str) -> str:
    answer = _LATEX_NOISE.sub("", answer.replace("−", "-"))
    answer = _LATEX_TEXT.sub(r"\1", answer)
    answer = _LATEX_FRACTION.sub(r"\1/\2", answer)
    return "".join(_without_unit(answer).split()).lower()


def _to_number(normalised: str) -> Fraction | None:
    # Fraction alone would also take "1e999999999", and spend all memory on it.
    if not re.fullmatch(_NUMBER, normalised):
        return None
    numerator, _, denominator = normalised.partition("/")
    try:
        return Fraction(numerator) / Fraction(denominator or 1)
    except (ValueError, ZeroDivisionError):  # too many digits for int, or x/0
        return None


def is_correct(prediction: str | None, reference: str) -> bool:
    r"""
    Compares two final answers, as numbers where both are numbers and else as normalised text.

    `1,000`, `$1000`, `1000%`, `1000.` and `1000 miles` are the same number, and so are `3/4`, `\frac{3}{4}` and
    `0.75`. Whole numbers must agree exactly, others to a relative error of 1e-5.

    Args:
        prediction (`str` or `None`):
            Answer to be judged, see [`extract_answer`]. `None` is never correct.
        reference (`str`):
            Known answer.

    Returns:
        `bool`: whether the answers agree.
    """
    if prediction is None:
        return False
    prediction, reference = _normalise(prediction), _normalise(reference)
    left, right = _to_number(prediction), _to_number(reference)
    if left is None or right is None:
        return prediction == reference
    if left.denominator == right.denominator == 1:
        return left == right
    return abs(left - right) <= _RELATIVE_TOLERANCE * max(abs(left), abs(right))


def accuracy(correct: Sequence[bool]) -> tuple[float, float]:
    """
    Share of correct answers and its standard error.

    Args:
        correct (`Sequence[bool]`):
            Whether each answer is correct, at least one.

    Returns:
        `tuple[float, float]`: mean and binomial standard error, both between 0 and 1.
    """
    if not len(correct):
        raise ValueError("`correct` is empty")
    mean = sum(bool(value) for value in correct) / len(correct)
    return mean, math.sqrt(mean * (1 - mean) / len(correct))
