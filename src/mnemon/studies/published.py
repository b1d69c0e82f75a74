"""Published numbers of other tasks than BABILong, to stand beside measured ones and marked as such."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

import yaml


@functools.cache
def published() -> dict[str, Any]:
    """Return all published numbers as `published.yaml` has them."""
    text = (resources.files("mnemon") / "studies" / "published.yaml").read_text(encoding="utf-8")
    value: dict[str, Any] = yaml.safe_load(text)
    return value
