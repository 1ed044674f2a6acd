"""How the weight of the strong model in the mixed logits changes over the weak-driven training."""

import math
from collections.abc import Callable
from importlib import import_module

LAMBDA_SCHEDULES = ("constant", "linear", "cosine", "crossover")

LambdaSchedule = Callable[[float], float]


def make_lambda_schedule(schedule: str | LambdaSchedule, start: float, end: float | None = None) -> LambdaSchedule:
    """
    Function from progress to `mixing_lambda`.

    Args:
        schedule (`str` or `Callable[[float], float]`):
            `"constant"`, `"linear"`, `"cosine"`, `"crossover"`, or a function of the progress, itself or as
            `"package.module:name"`.
        start (`float`):
            Value at the first weak-driven step.
        end (`float`, *optional*):
            Value at the last one.

    Returns:
        `Callable[[float], float]`: takes the share of the weak-driven steps that are done, 0 at the first and 1 at the
        last one. Raises a `ValueError` if `mixing_lambda` would not be in (0, 1].

    Raises:
        ValueError: If there is no such function.
    """
    if schedule == "linear":
        function = lambda progress: start + (end - start) * progress  # noqa: E731
    elif schedule == "cosine":
        function = lambda progress: end + (start - end) * (1 + math.cos(math.pi * progress)) / 2  # noqa: E731
    elif schedule == "constant":
        function = lambda progress: start  # noqa: E731
    elif schedule == "crossover":
        return Crossover()
    else:
        function = schedule if callable(schedule) else _import(schedule)

    def checked(progress: float) -> float:
        value = float(function(progress))
        if not 0 < value <= 1:
            raise ValueError(
                f"`lambda_schedule={schedule_name(schedule)!r}` gave {value} at progress {progress:.4g}, but "
                "`mixing_lambda` must be in (0, 1]."
            )
        return value

    return checked


class Crossover:
    """
    The schedule "crossover": `mixing_lambda` as it was measured at the start of the epoch.

    Attributes:
        measured (`tuple[int, float]`, *optional*):
            The epoch and its value.
    """

    def __init__(self):
        self.measured: tuple[int, float] | None = None

    def __call__(self, progress: float) -> float:
        _, value = self.measured
        return value


def crossover_lambda(strong_norm: float, weak_norm: float) -> float:
    """
    Mixing weight above which the strong branch dominates the update: `1 / (1 + sqrt(a))` with `a = (||z_strong|| /
    ||z_weak||)^2`, a heuristic of paper v2.

    Args:
        strong_norm, weak_norm (`float`):
            Norms of the centered logits, as in [`~wmss_trl.losses.MixedLossOutput`].

    Returns:
        `float`: the crossover, in (0, 1).
    """
    return weak_norm / (weak_norm + strong_norm)


def schedule_name(schedule: str | LambdaSchedule) -> str:
    """Name of a schedule for logs and checkpoints."""
    if isinstance(schedule, str):
        return schedule
    return f"{schedule.__module__}:{getattr(schedule, '__qualname__', type(schedule).__qualname__)}"


def _import(path: str) -> LambdaSchedule:
    module, _, name = path.partition(":")
    try:
        function = getattr(import_module(module), name) if name else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`lambda_schedule={path!r}` cannot be imported: {error}.") from error
    if not callable(function):
        raise ValueError(
            f"`lambda_schedule` must be one of {list(LAMBDA_SCHEDULES)} or a function `package.module:name` of the "
            f"training progress, got {path!r}."
        )
    return function
