"""Tiny RMT and ARMT models in float64 for the contract tests, and the slow obvious form of both."""

import functools
from typing import Any

import torch
from families import family
from lm2_cases import SEGMENT, lfm2_config, llama_config
from torch import Tensor, nn
from transformers import PreTrainedConfig

from mnemon.models.configuration_rmt import RMTConfig
from mnemon.models.modeling_rmt import RMTForCausalLM
from mnemon.models.state import ARMTState, RMTState

MEMORY_TOKENS = 3
OPTIONS: dict[str, dict[str, Any]] = {
    "rmt": {"memory": "tokens"},
    "armt": {"memory": "associative", "key_dim": 4, "feature_order": 2},
}
BASES = {"llama": llama_config, "lfm2": lfm2_config, "gpt2": lambda: family("gpt2")}
CASES = [f"{kind}-{base}" for kind in OPTIONS for base in BASES]


def rmt(base_config: PreTrainedConfig, kind: str = "rmt", seed: int = 0, **options: Any) -> RMTForCausalLM:
    """Build a float64 model of either kind.

    Values of associative memories start at zero by design; here they are drawn at random so that the tests see them.
    """
    torch.manual_seed(seed)
    sizes = {"num_memory_tokens": MEMORY_TOKENS, "segment_length": SEGMENT}
    model = RMTForCausalLM(RMTConfig(base_config=base_config, **(OPTIONS[kind] | sizes | options)))
    with torch.no_grad():
        for memory in model.associative_memories:
            memory.value.weight.normal_(std=0.3)
            memory.write_strength.bias.normal_()
    return model.double().eval()


@functools.lru_cache
def case(name: str) -> RMTForCausalLM:
    """Return the model of one of `CASES`."""
    kind, base = name.split("-")
    return rmt(BASES[base](), kind)


def memory_of(state: RMTState | ARMTState) -> list[Tensor]:
    """Return the tensors that are handed from segment to segment."""
    return [state.memory] if isinstance(state, RMTState) else [tensor for held in state.associations for tensor in held]


def reference_logits(model: RMTForCausalLM, ids: Tensor) -> Tensor:
    """Return the logits of token ids [B, T], segment by segment, with plain calls of the library's own decoder."""
    segments = ids.split(model.config.segment_length, dim=1)
    if model.config.is_associative:
        return _reference_associative(model, segments)
    memory, logits = model.memory_tokens.weight.expand(len(ids), -1, -1), []
    count = memory.shape[1]
    for segment in segments:
        frame = torch.cat([memory, model.get_input_embeddings()(segment), memory], dim=1)
        output = model.base(inputs_embeds=frame, output_hidden_states=True, use_cache=False)
        logits.append(output.logits[:, count:-count])
        memory = output.hidden_states[-1][:, -count:]
    return torch.cat(logits, dim=1)


def _reference_associative(model: RMTForCausalLM, segments: tuple[Tensor, ...]) -> Tensor:
    """Return the logits with the equations written out token by token, layer by layer."""
    batch, tokens = len(segments[0]), model.memory_tokens.weight
    wrapped = [
        ReferenceAssociation(block.module, memory, batch, len(tokens))
        for block, memory in zip(model.blocks, model.associative_memories, strict=True)
    ]
    logits = []
    try:
        for segment in segments:
            frame = torch.cat([model.get_input_embeddings()(segment), tokens.expand(batch, -1, -1)], dim=1)
            logits.append(model.base(inputs_embeds=frame, use_cache=False).logits[:, : -len(tokens)])
    finally:
        for association in wrapped:
            association.remove()
    return torch.cat(logits, dim=1)


class ReferenceAssociation:
    """The memory of one block, as the paper writes it: loops over rows, positions and memory tokens."""

    def __init__(self, block: nn.Module, memory: nn.Module, batch: int, count: int) -> None:
        self.memory, self.count = memory, count
        features = 2 * memory.feature_order * memory.key.out_features
        self.matrix = [memory.value.weight.new_zeros(memory.value.out_features, features) for _ in range(batch)]
        self.normaliser = [memory.value.weight.new_zeros(features) for _ in range(batch)]
        self.is_first = True
        self.handles = [
            block.register_forward_pre_hook(self.read, with_kwargs=True),
            block.register_forward_hook(self.write),
        ]

    def features(self, x: Tensor) -> Tensor:
        halves = torch.cat([x.clamp_min(0), (-x).clamp_min(0)])
        width = len(halves)
        products = [
            halves[i] * halves[(i - j) % width] for j in range(1, self.memory.feature_order + 1) for i in range(width)
        ]
        return torch.stack(products)

    def read(self, _: nn.Module, args: tuple, kwargs: dict) -> tuple:
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.is_first:
            return args, kwargs
        rows = []
        for row, (matrix, normaliser) in enumerate(zip(self.matrix, self.normaliser, strict=True)):
            read = []
            for x in hidden[row]:
                feature = self.features(self.memory.query.weight @ x)
                read.append(x + matrix @ feature / (normaliser @ feature + 1e-5))
            rows.append(torch.stack(read))
        changed = torch.stack(rows)
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})

    def write(self, _: nn.Module, args: tuple, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        memory = self.memory
        for row in range(len(hidden)):
            matrix, normaliser = self.matrix[row], self.normaliser[row]
            for token in hidden[row, -self.count :]:
                feature = self.features(memory.key.weight @ token)
                strength = torch.sigmoid(memory.write_strength(token))
                stretch = memory.gate_stretch
                strength = ((1 + 2 * stretch) * strength - stretch).clamp(0, 1)
                known, new = torch.zeros_like(token), 1.0
                if not self.is_first:
                    overlap = normaliser @ feature
                    known = matrix @ feature / (overlap + 1e-5)
                    new = (1 - overlap / (feature @ feature + 1e-5)).clamp(0, 1).detach()
                update = torch.outer(strength * (memory.value.weight @ token - known), feature)
                self.matrix[row] = self.matrix[row] + update
                self.normaliser[row] = self.normaliser[row] + new * feature
        self.is_first = False

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
