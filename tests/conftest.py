"""What every test needs: no network, one thread, untouched global random state, and the real data where it exists."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch
from hypothesis import settings

# A shared machine may stall at any moment; how long an example takes says nothing about its correctness. The examples
# are the same in every run, so that a red test is red for everyone.
settings.register_profile("mnemon", deadline=None, derandomize=True)
settings.load_profile("mnemon")

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """Use one thread: the tests' tensors are tiny, and results then do not depend on the machine's core count."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests, with the reason, on a machine without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))


@pytest.fixture(autouse=True)
def _restore_global_random_state() -> Iterator[None]:
    """Give every test the global generators as it found them, whatever the one before did."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch_state)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Return the root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder that holds `babi/` and `background/`, or skip: the real files are not part of the project."""
    named = os.environ.get("MNEMON_REAL_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not (folder / "babi").is_dir() or not (folder / "background").is_dir():
        pytest.skip("the real bAbI files and books are not here; set MNEMON_REAL_DATA to the folder that holds them")
    return folder
