"""Settings as frozen dataclasses whose values pydantic checks."""

from __future__ import annotations

import functools
from typing import Annotated, TypeVar

import pydantic
from pydantic import ConfigDict, Field
from typing_extensions import dataclass_transform

T = TypeVar("T")
Count = Annotated[int, Field(ge=1)]


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
    if finding["type"] == "value_error":  # raised by a check of our own, which names everything
        return str(finding["ctx"]["error"])
    if finding["type"] == "unexpected_keyword_argument":
        return f"there is no setting {field}"
    return f"{field}: {message[0].lower()}{message[1:]}, got {finding['input']!r}"
