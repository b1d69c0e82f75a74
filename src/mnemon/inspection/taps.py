"""Watch or change a method of a module from outside, for as long as a context lasts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


@contextmanager
def calls_through(module: Any, method: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """For the duration of the context, let calls of one object's method go through a function.

    Contexts may be nested; the one entered last is called first. Nothing stays on the object.

    Args:
        module: a module or other object; others of its class are not touched.
        method: name of the method.
        wrapper: called with the method and its arguments; what it returns is what the caller gets.
    """
    before = vars(module).get(method)
    setattr(module, method, partial(wrapper, getattr(module, method)))
    try:
        yield
    finally:
        if before is None:
            delattr(module, method)
        else:
            setattr(module, method, before)
