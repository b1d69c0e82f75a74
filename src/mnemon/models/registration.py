"""Make Hugging Face's Auto classes know our models."""

from transformers import AutoConfig, AutoModelForCausalLM

from mnemon.models.configuration_lm2 import LM2Config
from mnemon.models.configuration_mom import MoMConfig
from mnemon.models.configuration_rmt import RMTConfig
from mnemon.models.modeling_lm2 import LM2ForCausalLM
from mnemon.models.modeling_mom import MoMForCausalLM
from mnemon.models.modeling_rmt import RMTForCausalLM


def register() -> None:
    """Register the library's models with `AutoConfig` and `AutoModelForCausalLM`; calling it again is harmless."""
    kinds = ((LM2Config, LM2ForCausalLM), (MoMConfig, MoMForCausalLM), (RMTConfig, RMTForCausalLM))
    for config, model in kinds:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
