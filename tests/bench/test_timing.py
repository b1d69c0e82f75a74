"""The clock of the benchmarks."""

import platform
import resource

import pytest
import torch

from mnemon.bench.timing import kept_memory


def _faults_of_one_block(megabytes: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(megabytes * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_kept_memory_is_used_again_without_faults_and_given_back_in_the_end() -> None:
    with kept_memory() as allocator:
        assert allocator == "glibc, freed memory kept"
        _faults_of_one_block(64)
        assert _faults_of_one_block(64) < 100
    _faults_of_one_block(64)
    assert _faults_of_one_block(64) > 1000 or _huge_pages()


def _huge_pages() -> bool:
    """Say whether the system backs large blocks with huge pages, of which 64 MiB are few."""
    with open("/sys/kernel/mm/transparent_hugepage/enabled", encoding="utf-8") as file:
        return "[always]" in file.read()
