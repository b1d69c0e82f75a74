"""Whether the harness is there at all."""

import importlib.util

from mnemon.errors import BackendUnavailable


def require_harness() -> None:
    """Check that lm-evaluation-harness is installed, without importing it.

    Raises:
        BackendUnavailable: it is not; the message says how to install it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise BackendUnavailable("this suite needs lm-evaluation-harness: pip install 'mnemon[eval]'")
