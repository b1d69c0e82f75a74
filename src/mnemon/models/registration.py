"""Make Hugging Face's Auto classes know our models."""

from transformers import AutoConfig, AutoModelForCausalLM

from mnemon.models.configuration_lm2 import LM2Config
from mnemon.models.configuration_mom import MoMConfig
from mnemon.models.modeling_lm2 import LM2ForCausalLM
from mnemon.models.modeling_mom import MoMForCausalLM


def register() -> None:
    """Register the library's models with `AutoConfig` and `AutoModelForCausalLM`; calling it again is harmless."""
    for config, model in ((LM2Config, LM2ForCausalLM), (MoMConfig, MoMForCausalLM)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
