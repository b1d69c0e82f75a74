"""What a bank recorder must find, computed token by token from the equations, and a tokenizer for made-up ids."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from lm2_cases import VOCABULARY
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mnemon.layers.memory_bank import MemoryBank
from mnemon.models.modeling_lm2 import LM2ForCausalLM


def word_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token i is the word "wi"."""
    model = Tokenizer(WordLevel({f"w{index}": index for index in range(size)}, unk_token="w0"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="w0")


@dataclass
class Seen:
    """What the equations give for one block: named and shaped as in `BankBlock`, all slots, a column per token."""

    read: np.ndarray
    read_after: np.ndarray
    write: np.ndarray
    output_gate: np.ndarray
    input_gate: np.ndarray
    forget_gate: np.ndarray
    change: np.ndarray
    kept: np.ndarray


def by_definition(model: LM2ForCausalLM, ids: Tensor) -> list[Seen]:
    """Read a text [T] and compute what its banks did from what stood before and after the norms of a Llama's blocks."""
    length, layers = model.config.segment_length, model.base.model.layers
    inputs, residuals = ([[] for _ in layers] for _ in range(2))
    hooks = []
    for index, layer in enumerate(layers):
        hooks.append(
            layer.input_layernorm.register_forward_hook(lambda _, __, out, i=index: inputs[i].append(out[0].detach()))
        )
        hooks.append(
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda _, args, i=index: residuals[i].append(args[0][0].detach())
            )
        )
    with torch.no_grad():
        model(input_ids=ids[None], use_cache=True)
    for hook in hooks:
        hook.remove()
    # Cut into segments, however many of them a call of the decoder took.
    inputs, residuals = ([torch.cat(parts).split(length) for parts in seen] for seen in (inputs, residuals))
    blocks, is_depth = [int(name) for name in model.memory], model.config.flow == "depth"
    banks = [model.initial_memory.double()] * (1 if is_depth else len(blocks))
    found = [{name: [] for name in Seen.__annotations__} for _ in blocks]
    for segment in range(len(inputs[0])):
        start, held = list(banks), [1.0] * len(banks)
        is_complete = len(inputs[0][segment]) == length
        for order, (block, bank) in enumerate(zip(blocks, model.banks, strict=True)):
            layer, take = 0 if is_depth else order, found[order]
            x, residual = inputs[block][segment], residuals[block][segment]
            weights, gate = _read(bank, x, start[layer])
            share, content = _write(bank, residual, start[layer])
            take["read"].append(weights)
            take["output_gate"].append(gate)
            take["write"].append(share)
            nothing = torch.full_like(banks[layer][:, 0], math.nan)
            gates, change = (nothing, nothing), nothing
            if is_complete:
                banks[layer], gates, change, forget = _update(bank, content, banks[layer])
                held[layer] = held[layer] * forget
            for name, value in zip(("input_gate", "forget_gate"), gates, strict=True):
                take[name].append(value[None])
            take["change"].append(change[None])
        for order, (block, bank) in enumerate(zip(blocks, model.banks, strict=True)):
            layer = 0 if is_depth else order
            after = _read(bank, inputs[block][segment], banks[layer])[0]
            found[order]["read_after"].append(after if is_complete else torch.full_like(after, math.nan))
            kept = (held[layer] * start[layer]).norm(dim=-1) / start[layer].norm(dim=-1)
            found[order]["kept"].append((kept if is_complete else torch.full_like(kept, math.nan))[None])
    return [Seen(**{name: torch.cat(parts).numpy() for name, parts in block.items()}) for block in found]


def _heads(bank: MemoryBank, x: Tensor) -> Tensor:
    return x.view(len(x), bank.num_heads, -1).transpose(0, 1)


def _rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


@torch.no_grad()
def _read(bank: MemoryBank, x: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Return read weights, mean over heads, [T, J], and the mean output gate [T]."""
    slots = _rms(slots)
    queries, keys, values = (
        _heads(bank, found) for found in (bank.read_query(x), bank.read_key(slots), bank.read_value(slots))
    )
    scores = queries @ keys.transpose(1, 2) / math.sqrt(queries.shape[-1])
    if bank.read_top_k is not None and bank.read_top_k < scores.shape[-1]:
        ranks = scores.argsort(dim=-1, descending=True).argsort(dim=-1)
        scores = scores.masked_fill(ranks >= bank.read_top_k, -math.inf)
    weights = scores.softmax(dim=-1)
    retrieved = (weights @ values).transpose(0, 1).flatten(1)
    return weights.mean(dim=0), bank.output_gate(retrieved).sigmoid().mean(dim=-1)


@torch.no_grad()
def _write(bank: MemoryBank, residual: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's share of every slot's write attention, mean over heads, [T, J], and the content [J, W]."""
    y = _rms(residual) * bank.write_norm
    queries = _heads(bank, bank.write_query(_rms(slots)) + bank.slot_key)
    keys, values = _heads(bank, bank.write_key(y)), _heads(bank, bank.write_value(y))
    scores = queries @ keys.transpose(1, 2) / math.sqrt(queries.shape[-1])
    scores = scores + bank.recency_slope[:, None, None] * torch.arange(len(y))
    shares = scores.softmax(dim=-1)
    return shares.mean(dim=0).T, (shares @ values).transpose(0, 1).flatten(1)


@torch.no_grad()
def _update(bank: MemoryBank, content: Tensor, slots: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    """Return the new slots, the mean gates, the relative change and the forget gate itself."""

    def squashed(x: Tensor) -> Tensor:
        return ((1 + 2 * bank.gate_stretch) * x.sigmoid() - bank.gate_stretch).clamp(0, 1)

    write = squashed(bank.input_gate(content))
    forget = squashed(bank.forget_gate(content) + bank.forget_gate_bank(_rms(slots)))
    new = write * content.tanh() + forget * slots
    change = (new - slots).norm(dim=-1) / new.norm(dim=-1)
    return new, (write.mean(dim=-1), forget.mean(dim=-1)), change, forget
