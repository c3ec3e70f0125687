"""Settings as frozen dataclasses whose values pydantic checks."""

from __future__ import annotations

import functools
from typing import Annotated, TypeVar

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field
from typing_extensions import dataclass_transform

T = TypeVar("T")

NO_NUMBER = "true and false are no numbers"


def _number(x: object) -> object:
    if isinstance(x, bool):  # which pydantic takes for 0 and 1
        raise ValueError(NO_NUMBER)
    return x


Whole = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number)]
Count = Annotated[Whole, Field(ge=1)]


@dataclass_transform(frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass that refuses fields it does not have and values that are not of their types.

    Numbers of numpy are numbers; what is not finite is none. What is wrong is said in one line of a ValueError, which
    names the fields, their values and what is expected.
    """
    config = ConfigDict(extra="forbid", allow_inf_nan=False)
    cls = pydantic.dataclasses.dataclass(cls, frozen=True, config=config)
    check = cls.__init__

    @functools.wraps(check)
    def explain(self, *values, **named) -> None:
        try:
            check(self, *values, **named)
        except pydantic.ValidationError as error:
            raise ValueError("; ".join(map(_finding, error.errors()))) from None

    cls.__init__ = explain
    return cls


def _finding(finding: dict) -> str:
    """Say which field has which wrong value."""
    field, message = ".".join(map(str, finding["loc"])), finding["msg"]
    if finding["type"] == "value_error":  # raised by a check of our own, which names everything but a single field
        error = str(finding["ctx"]["error"])
        return f"{field}: {error}, got {finding['input']!r}" if error == NO_NUMBER else error
    if finding["type"] == "unexpected_keyword_argument":
        return f"there is no setting {field}"
    return f"{field}: {message[0].lower()}{message[1:]}, got {finding['input']!r}"
