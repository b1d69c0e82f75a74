"""What all sections of a recipe are made of: the base class and the types of their numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mnemon.data.babi import GENERATED_TASKS
from mnemon.data.babilong import parse_length


def _to_tokens(value: Any) -> Any:
    """Return a context length in tokens from an integer or a name such as `4k`."""
    return parse_length(value) if isinstance(value, str) else value


def check_tasks(tasks: Iterable[str]) -> None:
    """Refuse a task that is not one of BABILong's generated ones.

    Raises:
        ValueError: naming the task and the known ones; pydantic turns it into one line with the key.
    """
    for task in tasks:
        if task not in GENERATED_TASKS:
            raise ValueError(f"unknown task {task!r}; known: {', '.join(GENERATED_TASKS)}")


Length = Annotated[int, BeforeValidator(_to_tokens), Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of all recipe sections: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())
