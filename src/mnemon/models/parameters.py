"""How many parameters a model has, and how many of them one token meets."""

from torch import nn

from mnemon.layers.associative_memory import AssociativeMemory
from mnemon.layers.memory_bank import MemoryBank
from mnemon.layers.memory_layer import MemoryLayer
from mnemon.layers.memory_tokens import MemoryTokens
from mnemon.layers.mixture_of_memories import MixtureOfMemories

_MEMORIES = (MemoryBank, MemoryLayer, MemoryTokens, AssociativeMemory)


def active_parameters(model: nn.Module) -> int:
    """Return how many parameters take part in the computation for one token.

    A memory that a token does not go to costs nothing: of the projections of E memories top_k are active.
    """
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfMemories)]
    total = sum(parameter.numel() for parameter in model.parameters())
    return total - sum(layer.num_idle_parameters() for layer in mixtures)


def count_memory_blocks(model: nn.Module) -> int:
    """Return how many memories a model has, which is how many of its blocks have one."""
    return sum(isinstance(module, MemoryBank | MemoryLayer) for module in model.modules())


def memory_parameters(model: nn.Module) -> int:
    """Return how many parameters are memories: banks, linear memories, memory tokens and associative memories."""
    memories = [module for module in model.modules() if isinstance(module, _MEMORIES)]
    return sum(parameter.numel() for memory in memories for parameter in memory.parameters())
