"""Write the kept memory file of format version 1: `python tests/models/data/make_memory_file.py`.

The file is never written again: a format that can no longer read it needs a migration.
"""

from pathlib import Path

import numpy as np
import torch

from mnemon.layers.memory_bank import WriteStatistics
from mnemon.models.memory_file import MEMORY, StoredDecoder, StoredMemory
from mnemon.typed_files import write_typed


def memory() -> StoredMemory:
    """Return a memory of eleven tokens of which three wait; one block, two slots of width three."""
    bank = torch.arange(6.0).reshape(1, 1, 2, 3)
    keys = torch.arange(8.0).reshape(1, 1, 4, 2).to(torch.bfloat16)
    statistics = WriteStatistics(torch.full((1, 1, 2), -1e30), torch.zeros(1, 1, 2), torch.zeros(1, 1, 2, 3))
    return StoredMemory(
        family="lm2",
        model_class="LM2ForCausalLM",
        fingerprint="0123456789abcdef" * 4,
        tokenizer="fedcba9876543210" * 4,
        tokens_read=(11,),
        decoder=StoredDecoder((8,), ((keys, -keys),), (np.array([[4, 5, 6, 7]]),)),
        pending=((9, 10, 11),),
        bank=bank,
        kept=torch.full_like(bank, 0.5),
        statistics=(statistics,),
    )


if __name__ == "__main__":
    write_typed(Path(__file__).with_name("version-1.memory.safetensors"), memory(), MEMORY)
