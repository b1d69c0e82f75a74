"""Make Hugging Face's Auto classes know our models."""

from transformers import AutoConfig, AutoModelForCausalLM

from mnemon.models.configuration_lm2 import LM2Config
from mnemon.models.modeling_lm2 import LM2ForCausalLM


def register() -> None:
    """Register the library's models with `AutoConfig` and `AutoModelForCausalLM`; calling it again is harmless."""
    AutoConfig.register(LM2Config.model_type, LM2Config, exist_ok=True)
    AutoModelForCausalLM.register(LM2Config, LM2ForCausalLM, exist_ok=True)
