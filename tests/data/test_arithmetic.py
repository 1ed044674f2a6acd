import re
from fractions import Fraction

import pytest

from wmss_trl.data import arithmetic
from wmss_trl.data.arithmetic import arithmetic_dataset, generate_problems

STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def evaluate(left: str, op: str, right: str) -> Fraction:
    left, right = Fraction(left), Fraction(right)
    return {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[op]


@pytest.mark.parametrize("max_number", [2, 20, 100])
def test_every_step_and_answer_is_right(max_number: int) -> None:
    for problem in generate_problems(500, seed=1, max_number=max_number):
        steps = STEP.findall(problem["solution"])
        assert 2 <= len(steps) <= 4
        assert problem["solution"].count("=") == len(steps)
        for left, op, right, result in steps:
            assert evaluate(left, op, right) == int(result)
            assert 2 <= int(result) < 1000
        assert problem["answer"] == steps[-1][3]
        assert problem["solution"].endswith(f" #### {problem['answer']}")


def test_operands_come_from_the_question_or_an_earlier_step() -> None:
    for problem in generate_problems(500, seed=2):
        known = set(re.findall(r"\d+", problem["question"]))
        given = set(known)
        for left, _, right, result in STEP.findall(problem["solution"]):
            assert {left, right} <= known
            known.add(result)
            given -= {left, right}
        assert not given, "a number of the question is never used"


def test_all_operations_and_step_counts_occur() -> None:
    steps = [STEP.findall(solution) for solution in generate_problems(500)["solution"]]
    assert {len(problem) for problem in steps} == {2, 3, 4}
    assert {op for problem in steps for _, op, _, _ in problem} == set("+-*/")


def test_problems_are_the_same_everywhere() -> None:
    first = generate_problems(1, seed=0)[0]
    assert first == {
        "question": "Gina opens 10 boxes with 5 apples in each. Gina gives 17 apples away. Gina gives 20 apples away. "
        "How many apples are there now?",
        "solution": "The boxes hold 10 * 5 = 50 apples. After the gift there are 50 - 17 = 33 apples. "
        "After the gift there are 33 - 20 = 13 apples. #### 13",
        "answer": "13",
    }
    assert generate_problems(50, seed=3).to_list() == generate_problems(50, seed=3).to_list()
    assert generate_problems(50, seed=3).to_list() != generate_problems(50, seed=4).to_list()


def test_questions_are_unique_and_exclusions_hold() -> None:
    # With so few numbers to draw, repeats are common unless they are prevented.
    problems = generate_problems(3000, max_number=2)
    assert len(set(problems["question"])) == 3000
    others = generate_problems(1000, max_number=2, exclude=problems["question"])
    assert not set(others["question"]) & set(problems["question"])


def test_splits_are_disjoint_and_the_test_split_is_stable() -> None:
    splits = arithmetic_dataset(2000, 500, seed=5, max_number=3)
    assert (len(splits["train"]), len(splits["test"])) == (2000, 500)
    assert len(set(splits["train"]["question"]) | set(splits["test"]["question"])) == 2500
    assert arithmetic_dataset(10, 500, seed=5, max_number=3)["test"].to_list() == splits["test"].to_list()


def test_max_number_is_checked() -> None:
    with pytest.raises(ValueError, match="max_number"):
        generate_problems(1, max_number=1)


def test_running_out_of_problems_is_an_error(monkeypatch):
    def template(draft):
        draft.story.append(f"{draft.rng.choice(['Ada', 'Ben'])} adds 2 and 3.")
        draft.step("{}", 2, "+", 3)

    monkeypatch.setattr(arithmetic, "_TEMPLATES", (template,))
    assert len(generate_problems(2)) == 2
    with pytest.raises(ValueError, match=r"only 2 of `num_problems=3` different problems with `max_number=20`"):
        generate_problems(3)
