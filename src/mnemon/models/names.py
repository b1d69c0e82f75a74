"""What a MODEL argument means: a local folder, a checkpoint shipped with the library, or a hub name."""

from importlib import resources
from pathlib import Path

from mnemon.errors import CheckpointError

MODEL_CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"


def shipped_checkpoints() -> dict[str, Path]:
    """Return the checkpoints that come with the library, by name."""
    root = Path(str(resources.files("mnemon"))) / "checkpoints"
    return {path.parent.name: path.parent for path in sorted(root.glob(f"*/{MODEL_CONFIG}"))}


def is_adapter(folder: str | Path) -> bool:
    """Say whether a folder holds an adapter and no whole model."""
    path = Path(folder)
    return (path / ADAPTER_CONFIG).is_file() and not (path / MODEL_CONFIG).is_file()


def resolve(name: str) -> str:
    """Turn a MODEL argument into a folder, a shipped checkpoint's folder, or a hub name.

    Raises:
        CheckpointError: for a folder with neither a model nor an adapter, or a name that is neither a folder nor a hub
            name.
    """
    folder = Path(name).expanduser()
    if name.strip() and folder.is_dir():
        if not (folder / MODEL_CONFIG).is_file() and not is_adapter(folder):
            raise CheckpointError(
                f"{name} is a folder without {MODEL_CONFIG} or {ADAPTER_CONFIG}; expected a saved model or adapter"
            )
        return str(folder)
    shipped = shipped_checkpoints()
    if name in shipped:
        return str(shipped[name])
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip()
    if looks_local or "/" not in name:
        known = ", ".join(shipped) or "none"
        raise CheckpointError(
            f"no model {name!r}: expected a folder, a hub name (owner/model) or a shipped checkpoint ({known})"
        )
    return name
