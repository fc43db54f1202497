"""Kinds of fields, and what every section is."""

import re
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator


def _named(pattern: str, words: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{text!r} cannot be a name: use {words}")
        return text

    return AfterValidator(check)


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
RunName = Annotated[
    str, _named("[A-Za-z0-9][A-Za-z0-9._-]*", "letters, digits, `.`, `_` and `-`, first a letter or a digit")
]
MetricName = Annotated[str, _named("[a-z][a-z0-9_]*", "small letters, digits and `_`, first a letter")]


class Section(BaseModel):
    """A frozen group of settings; an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _a_switch_is_no_number(cls, value: Any, info: Any) -> Any:
        """Python counts true as 1, so that `steps = true` would be one step."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError(f"must not be a switch; got {value}")
        return value
