"""Where and with what a measurement was made: machine, threads and versions, for the record beside every number."""

import importlib.metadata
import os
import platform
from pathlib import Path

_PACKAGES = ("mnemon", "torch", "transformers", "tokenizers", "numpy", "scipy")


def describe_machine(device: str = "cpu") -> dict[str, str]:
    """Name the processor, the threads in use, the device and the versions of the packages that matter.

    Args:
        device: torch device that the models run on.

    Returns:
        Names and values in the order a reader wants them.
    """
    import torch

    facts = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed as a package"
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
