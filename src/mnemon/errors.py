"""Exception types of the library.

Everything a user can get wrong raises a subclass of `MnemonError`, whose message is one line that says what was
expected, what arrived and what to do. The command line prints that line and exits with code 2. `assert` is for our own
invariants only.
"""


class MnemonError(Exception):
    """Base of every error the library raises on purpose."""


class ConfigError(MnemonError, ValueError):
    """A configuration, recipe or command-line value is unknown, out of range or inconsistent."""


class ShapeError(MnemonError, ValueError):
    """A tensor has the wrong shape, dtype or range (for example a token id outside the vocabulary)."""


class StateError(MnemonError, ValueError):
    """A memory state or cache does not belong to this model, batch or call."""


class DataError(MnemonError, ValueError):
    """A data file is missing, empty, truncated or malformed; the message names the file and the line."""


class CheckpointError(MnemonError, ValueError):
    """A checkpoint is missing, has missing, extra or mis-shaped tensors, or does not fit the configuration."""


class RunError(MnemonError, RuntimeError):
    """A run could not go on (non-finite loss, full disk); what was saved before stays valid."""


class BackendUnavailable(MnemonError, RuntimeError):
    """An explicitly requested backend or optional dependency is not available on this machine."""


class PeerError(MnemonError, RuntimeError):
    """A process had to stop because another process of the same run failed, which reports the reason itself."""
