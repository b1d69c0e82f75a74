"""LoRA on the decoder and a memory beside it, in the two orders a user may put them together."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lm2_cases import llama_config, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

from mnemon.errors import ConfigError
from mnemon.models.base_model import fingerprint
from mnemon.models.modeling_lm2 import LM2ForCausalLM

peft = pytest.importorskip("peft", reason="needs the extra mnemon[peft]")

OPTIONS: dict[str, Any] = {"num_slots": 5, "slot_dim": 12, "num_memory_heads": 3, "segment_length": 7}
INPUT = tokens(2, 20)
ROUTES = ("decoder", "whole model", "library")


def decoder() -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(llama_config())
    return model.eval()


def lora(**options: Any) -> Any:
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)


def build(route: str, **options: Any) -> tuple[LM2ForCausalLM, Any]:
    """Return an LM2 with LoRA on its decoder, and the module that PEFT saves from."""
    base = decoder()
    torch.manual_seed(1)
    if route == "decoder":
        wrapped = peft.get_peft_model(base, lora(**options))
        return LM2ForCausalLM.from_base(wrapped, freeze_base=True, **OPTIONS), wrapped
    if route == "library":
        base.add_adapter(lora(**options))
        return LM2ForCausalLM.from_base(base, freeze_base=True, **OPTIONS), base
    model = LM2ForCausalLM.from_base(base, freeze_base=True, **OPTIONS)
    wrapped = peft.get_peft_model(model, lora(task_type="CAUSAL_LM", **options))
    model.memory.requires_grad_(True)
    return model, wrapped


def train(model: LM2ForCausalLM, steps: int = 3) -> None:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model.train()(INPUT, labels=INPUT).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=INPUT).logits


@pytest.mark.parametrize("route", ROUTES)
def test_lora_and_memory_start_without_changing_a_logit(route: str) -> None:
    plain = LM2ForCausalLM.from_base(decoder(), **OPTIONS)
    assert torch.equal(logits(build(route)[0]), logits(plain))


@pytest.mark.parametrize("route", ROUTES)
def test_only_lora_and_memory_train(route: str) -> None:
    model, _ = build(route)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    reference = fingerprint(model.base)
    train(model)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    memory = {name for name in before if name.startswith("memory.")}
    assert changed == memory | {name for name in before if "lora_" in name}
    assert fingerprint(model.base) == reference == fingerprint(decoder())


def test_grafting_keeps_a_trained_lora() -> None:
    wrapped = peft.get_peft_model(decoder(), lora())
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before = wrapped(input_ids=INPUT).logits
    grafted = logits(LM2ForCausalLM.from_base(wrapped, **OPTIONS))
    assert not torch.equal(before, decoder()(input_ids=INPUT).logits)
    torch.testing.assert_close(grafted, before)


def test_grafting_keeps_a_resized_embedding() -> None:
    base = decoder()
    base.resize_token_embeddings(60)
    before = base.get_input_embeddings().weight.detach().clone()
    model = LM2ForCausalLM.from_base(base, **OPTIONS)
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_lora_and_memory_are_saved_side_by_side_and_come_back_exactly(tmp_path: Path) -> None:
    model, wrapped = build("decoder")
    train(model)
    wrapped.save_pretrained(tmp_path / "lora")
    model.save_adapter(tmp_path / "memory")
    base = peft.PeftModel.from_pretrained(decoder(), tmp_path / "lora")
    assert torch.equal(logits(LM2ForCausalLM.from_adapter(tmp_path / "memory", base)), logits(model))


def test_lora_on_the_whole_model_comes_back_exactly(tmp_path: Path) -> None:
    model, wrapped = build("whole model")
    train(model)
    wrapped.save_pretrained(tmp_path / "lora")
    model.save_adapter(tmp_path / "memory")
    memory = LM2ForCausalLM.from_adapter(tmp_path / "memory", decoder())
    assert torch.equal(logits(peft.PeftModel.from_pretrained(memory, tmp_path / "lora").eval()), logits(model))


@pytest.mark.parametrize("route", ["decoder", "whole model"])
def test_merging_lora_changes_nothing_and_makes_one_ordinary_model(route: str, tmp_path: Path) -> None:
    model, wrapped = build(route)
    train(model)
    before = logits(model)
    wrapped.merge_and_unload()
    torch.testing.assert_close(logits(model), before, atol=2e-5, rtol=1e-5)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(LM2ForCausalLM.from_pretrained(tmp_path)), logits(model))
    with pytest.raises(ConfigError, match="the base has changed since"):
        model.save_adapter(tmp_path / "adapter")


def test_lora_dropout_works_beside_a_frozen_base() -> None:
    model, _ = build("decoder", lora_dropout=0.5)
    train(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_generation_goes_on_from_a_memory_with_lora_on_the_decoder() -> None:
    model, wrapped = build("decoder")
    train(model)
    with torch.no_grad():
        state = model(INPUT[:, :13], use_cache=True).past_key_values.state
        whole = model.generate(INPUT, max_new_tokens=4, do_sample=False)
        resumed = model.generate(INPUT[:, 13:], memory=state, max_new_tokens=4, do_sample=False)
    assert torch.equal(whole[:, 20:], resumed[:, 7:])
    assert wrapped.get_base_model() is model.base


def test_what_peft_would_do_to_the_memory_itself_is_refused(tmp_path: Path) -> None:
    model = LM2ForCausalLM.from_base(decoder(), freeze_base=True, **OPTIONS)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["read_query"]))
    with pytest.raises(ConfigError, match="PEFT layers sit on the memory itself"):
        model.save_adapter(tmp_path)
    saved = LM2ForCausalLM.from_base(decoder(), freeze_base=True, **OPTIONS)
    peft.get_peft_model(saved, lora(modules_to_save=[f"memory.{block}" for block in saved.memory]))
    with pytest.raises(ConfigError, match="leave it out of modules_to_save"):
        logits(saved)


def test_a_decoder_with_a_tuned_prompt_is_refused() -> None:
    wrapped = peft.get_peft_model(decoder(), peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="puts tokens before the prompt"):
        LM2ForCausalLM.from_base(wrapped, **OPTIONS)
