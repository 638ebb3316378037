"""While ``diffusionclip plan`` looks at a request: commands hand it over instead of carrying it out, and problems are collected."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import ConfigError


@dataclass(kw_only=True)
class Planning:
    """What a command asked for, and what stands in the way."""

    requests: list[Any] = field(default_factory=list)
    """``Run`` or ``TuneRun``."""
    problems: list[str] = field(default_factory=list)


_current: ContextVar[Planning | None] = ContextVar("planning", default=None)


@contextmanager
def planning() -> Iterator[Planning]:
    """Commands that are called meanwhile only say what they would do."""
    found = Planning()
    token = _current.set(found)
    try:
        yield found
    finally:
        _current.reset(token)


def only_planned(requests: Sequence[Any]) -> bool:
    """True if requests are not to be carried out, but were handed over."""
    found = _current.get()
    if found is not None:
        found.requests += requests
    return found is not None


def refuse(*problems: str) -> None:
    """Raises ConfigError; while planning, problems are only noted, so that numbers can be told beside them."""
    found = _current.get()
    if found is None:
        raise ConfigError(*problems)
    found.problems += problems
