"""Generated multi-step arithmetic word problems: a data set that needs no download."""

import operator
from collections.abc import Iterable
from itertools import pairwise
from random import Random

from datasets import Dataset, DatasetDict

_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Emma", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kira", "Leo")
_THINGS = ("apples", "books", "cards", "coins", "marbles", "pencils", "shells", "stamps", "stickers", "tickets")
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
_MAX_FACTOR = 5
_MAX_RESULT = 999
# In a row, before the generator is taken to have run dry
_MAX_REJECTED = 10_000


class _Draft:
    """
    One problem in the making: the sentences of its question and the steps of its solution.

    Every number is at least 2, so that "{number} {things}" is always right in the plural.

    Args:
        rng (`Random`):
            Source of every choice.
        max_number (`int`):
            Largest quantity drawn for the question.
    """

    def __init__(self, rng: Random, max_number: int):
        self.rng = rng
        self.max_number = max_number
        self.story: list[str] = []
        self.steps: list[str] = []
        self.result = 0
        self.largest = 0

    def names(self, count: int) -> list[str]:
        return self.rng.sample(_NAMES, count)

    def things(self, count: int) -> list[str]:
        return self.rng.sample(_THINGS, count)

    def quantity(self) -> int:
        return self.rng.randint(2, self.max_number)

    def factor(self) -> int:
        return self.rng.randint(2, _MAX_FACTOR)

    def operand(self, left: int, operations: str) -> tuple[str, int]:
        """Draws one of the operations and its right operand so that the result is a whole number of at least 2."""
        operands = {
            "+": range(2, self.max_number + 1),
            "-": range(2, min(self.max_number, left - 2) + 1),
            "*": range(2, _MAX_FACTOR + 1),
            "/": [divisor for divisor in range(2, _MAX_FACTOR + 1) if left % divisor == 0 and left > divisor],
        }
        op = self.rng.choice([op for op in operations if operands[op]])
        return op, self.rng.choice(operands[op])

    def step(self, sentence: str, left: int, op: str, right: int) -> int:
        """Adds a step of the solution; `{}` in the sentence stands for "left op right = result"."""
        self.result = _OPERATIONS[op](left, right)
        self.largest = max(self.largest, self.result)
        self.steps.append(sentence.format(f"{left} {op} {right} = {self.result}"))
        return self.result


def _collection(draft: _Draft) -> None:
    """One person's collection changes two to four times."""
    name, friend = draft.names(2)
    (things,) = draft.things(1)
    total = draft.quantity()
    draft.story.append(f"{name} has {total} {things}.")
    for _ in range(draft.rng.randint(2, 4)):
        op, value = draft.operand(total, "+-*/")
        event = draft.rng.choice(
            {
                "+": (f"{name} buys {value} more.", f"{friend} gives {name} {value} more."),
                "-": (f"{name} loses {value} {things}.", f"{name} gives {value} {things} to {friend}."),
                "*": (f"A week later {name} has {value} times as many.",),
                "/": (f"{name} splits them into {value} equal piles and keeps one pile.",),
            }[op]
        )
        draft.story.append(event)
        total = draft.step(f"{name} has {{}} {things}.", total, op, value)
    draft.story.append(f"How many {things} does {name} have now?")


def _shopping(draft: _Draft) -> None:
    """One or two kinds of things are bought; asks for the cost, or for the money that is left."""
    (name,) = draft.names(1)
    bought = draft.things(draft.rng.randint(1, 2))
    # One kind alone would be a single step, so then the question is always about the money left.
    asks_for_rest = len(bought) == 1 or draft.rng.random() < 0.5
    baskets = [(draft.quantity(), thing, draft.factor()) for thing in bought]
    draft.story.extend(f"{name} buys {count} {thing} for {price} dollars each." for count, thing, price in baskets)
    costs = [draft.step(f"The {thing} cost {{}} dollars.", count, "*", price) for count, thing, price in baskets]
    if len(costs) == 2:
        draft.step("Together they cost {} dollars.", costs[0], "+", costs[1])
    if asks_for_rest:
        money = draft.result + draft.quantity()
        draft.story.append(f"{name} had {money} dollars. How many dollars are left?")
        draft.step(f"{name} has {{}} dollars left.", money, "-", draft.result)
    else:
        draft.story.append("How many dollars do they cost together?")


def _comparison(draft: _Draft) -> None:
    """Two or three people's counts are given relative to each other; asks for their sum."""
    people = draft.names(draft.rng.randint(2, 3))
    (things,) = draft.things(1)
    counts = [draft.quantity()]
    draft.story.append(f"{people[0]} has {counts[0]} {things}.")
    for other, name in pairwise(people):
        op, value = draft.operand(counts[-1], "+-*")
        if op == "*":
            draft.story.append(f"{name} has {value} times as many {things} as {other}.")
        else:
            draft.story.append(f"{name} has {value} {'more' if op == '+' else 'fewer'} {things} than {other}.")
        counts.append(draft.step(f"{name} has {{}} {things}.", counts[-1], op, value))
    draft.story.append(f"How many {things} do they have together?")
    total = counts[0]
    for name, count in zip(people[1:], counts[1:], strict=True):
        total = draft.step(f"With {name} that makes {{}} {things}.", total, "+", count)


def _packing(draft: _Draft) -> None:
    """Boxes are unpacked, the contents changed once or twice, then perhaps shared."""
    (name,) = draft.names(1)
    (things,) = draft.things(1)
    boxes, per_box = draft.quantity(), draft.factor()
    draft.story.append(f"{name} opens {boxes} boxes with {per_box} {things} in each.")
    total = draft.step(f"The boxes hold {{}} {things}.", boxes, "*", per_box)
    for _ in range(draft.rng.randint(1, 2)):
        op, value = draft.operand(total, "+-/")
        if op == "+":
            draft.story.append(f"{name} finds {value} loose {things}.")
            total = draft.step(f"With the loose ones there are {{}} {things}.", total, op, value)
        elif op == "-":
            draft.story.append(f"{name} gives {value} {things} away.")
            total = draft.step(f"After the gift there are {{}} {things}.", total, op, value)
        else:
            draft.story.append(
                f"All are shared equally among {value} children. How many {things} does each child get?"
            )
            draft.step(f"Each child gets {{}} {things}.", total, op, value)
            return
    draft.story.append(f"How many {things} are there now?")


_TEMPLATES = (_collection, _shopping, _comparison, _packing)


def generate_problems(
    num_problems: int, seed: int = 0, *, max_number: int = 20, exclude: Iterable[str] = ()
) -> Dataset:
    """
    Generates word problems of two to four steps over `+`, `-`, `*` and exact `/`.

    The same arguments give the same problems on every platform. Every intermediate result is a whole number between 2
    and 999, and no question occurs twice.

    Args:
        num_problems (`int`):
            Number of problems.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the generator.
        max_number (`int`, *optional*, defaults to `20`):
            Largest quantity drawn for a question, between 2 and 100. Factors, divisors and prices stay between 2 and
            5.
        exclude (`Iterable[str]`, *optional*):
            Questions that must not occur, such as those of a test set.

    Returns:
        `Dataset` with the string columns `question`, `solution` (its steps, then `#### answer`) and `answer`.

    Raises:
        ValueError: If `max_number` is out of range or too small for so many different problems.
    """
    if not 2 <= max_number <= 100:
        raise ValueError(f"`max_number` must be between 2 and 100, got {max_number}")
    rng = Random(seed)
    seen = set(exclude)
    problems: list[dict[str, str]] = []
    rejected = 0
    while len(problems) < num_problems:
        draft = _Draft(rng, max_number)
        rng.choice(_TEMPLATES)(draft)
        question = " ".join(draft.story)
        if question in seen or draft.largest > _MAX_RESULT:
            rejected += 1
            if rejected == _MAX_REJECTED:
                raise ValueError(
                    f"Found only {len(problems)} of `num_problems={num_problems}` different problems with "
                    f"`max_number={max_number}`. Ask for fewer, or raise `max_number`."
                )
            continue
        rejected = 0
        seen.add(question)
        answer = str(draft.result)
        problems.append(
            {"question": question, "solution": " ".join(draft.steps) + f" #### {answer}", "answer": answer}
        )
    return Dataset.from_list(problems)


def arithmetic_dataset(num_train: int, num_test: int, seed: int = 0, *, max_number: int = 20) -> DatasetDict:
    """
    Generates a train and a test split without a common question.

    The test split depends only on `num_test`, `seed` and `max_number`: more training data leaves it unchanged.

    Args:
        num_train (`int`):
            Number of training problems.
        num_test (`int`):
            Number of test problems.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the generator.
        max_number (`int`, *optional*, defaults to `20`):
            Largest quantity drawn for a question, see [`generate_problems`].

    Returns:
        `DatasetDict` with the splits `train` and `test`.
    """
    problems = generate_problems(num_test + num_train, seed, max_number=max_number)
    return DatasetDict(
        train=problems.select(range(num_test, num_test + num_train)), test=problems.select(range(num_test))
    )
