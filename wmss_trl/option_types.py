"""Types of the options of a configuration. Nobody else checks what comes from Python code or a YAML file."""

import os
import types
from collections.abc import Mapping
from numbers import Real
from typing import Any, get_args, get_origin

import numpy as np


def check_option_types(args: Any, cls: type) -> None:
    """
    Check the options that a dataclass declares itself against its annotations, and give each its annotated type. A
    whole number may be written as `1.0` and a truth value as `0` or `1`. A path may be a `Path`.

    Args:
        args:
            Instance of the dataclass `cls` or of a subclass.
        cls (`type`):
            Dataclass whose own options are checked, not those that it inherits.

    Raises:
        ValueError: If a value is of another type, or NaN; the message names the option, the value and the default.
    """
    for option, annotation in cls.__annotations__.items():  # not those of the fields, which HfArgumentParser rewrites
        value = getattr(args, option)
        accepted = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
        # A function is annotated as the string that stands for it on the command line
        if (value is None and type(None) in accepted) or (option == "lambda_schedule" and callable(value)):
            continue
        expected, fits, convert = _KINDS[get_origin(accepted[0]) or accepted[0]]
        if not fits(value):
            optional = " or None" if type(None) in accepted else ""
            raise ValueError(
                f"`{option}` must be {expected}{optional}, got {value!r}. Set it to one, or leave it unset for the "
                f"default, {getattr(cls, option)!r}."
            )
        setattr(args, option, convert(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and value == value  # which NaN is not


# What a value must be, how to tell, and how to give it the annotated type
_KINDS = {
    bool: ("True or False", lambda value: isinstance(value, (Real, np.bool_)) and value in (False, True), bool),
    int: ("a whole number", lambda value: _is_number(value) and value % 1 == 0, int),
    float: ("a number", _is_number, float),
    str: ("a string", lambda value: isinstance(value, (str, os.PathLike)), os.fspath),
    dict: ("a dictionary or a JSON object", lambda value: isinstance(value, Mapping), lambda value: value),
}
