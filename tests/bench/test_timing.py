"""The clock of the benchmarks."""

import ctypes
import platform
import resource

import pytest

from mnemon.bench.timing import kept_memory


def _faults() -> int:
    """Fill a block of 64 MiB, and count the pages that had to be found for it."""
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    library.free.argtypes = [ctypes.c_void_p]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = library.malloc(ctypes.c_size_t(64 * 2**20))
    ctypes.memset(block, 1, 64 * 2**20)
    library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_kept_memory_is_used_again_and_given_back_in_the_end() -> None:
    given_back = _faults()
    with kept_memory() as allocator:
        assert allocator == "glibc, freed memory kept"
        _faults()
        assert _faults() < given_back / 100
    assert _faults() > given_back / 2
