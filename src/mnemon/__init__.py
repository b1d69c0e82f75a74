"""Memory for language models: gated memory slots grafted onto Hugging Face decoders.

The public names below are resolved on first use, so that `import mnemon` stays cheap: it loads neither torch nor
transformers. Touching a model or configuration class also registers the library's models with the `Auto*` classes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnemon import data, evaluation, models, ops, training
    from mnemon.models.configuration_lm2 import LM2Config
    from mnemon.models.configuration_mom import MoMConfig
    from mnemon.models.configuration_rmt import RMTConfig
    from mnemon.models.modeling_lm2 import LM2ForCausalLM
    from mnemon.models.modeling_mom import MoMForCausalLM
    from mnemon.models.modeling_rmt import RMTForCausalLM
    from mnemon.models.state import MemoryState

__version__ = "0.1.0"

__all__ = [
    "LM2Config",
    "LM2ForCausalLM",
    "MemoryState",
    "MoMConfig",
    "MoMForCausalLM",
    "RMTConfig",
    "RMTForCausalLM",
    "__version__",
    "data",
    "evaluation",
    "models",
    "ops",
    "register",
    "training",
]

# Public class -> module that defines it; these need torch and transformers.
_MODEL_NAMES = {
    "LM2Config": "mnemon.models.configuration_lm2",
    "LM2ForCausalLM": "mnemon.models.modeling_lm2",
    "MemoryState": "mnemon.models.state",
    "MoMConfig": "mnemon.models.configuration_mom",
    "MoMForCausalLM": "mnemon.models.modeling_mom",
    "RMTConfig": "mnemon.models.configuration_rmt",
    "RMTForCausalLM": "mnemon.models.modeling_rmt",
}
_SUBPACKAGES = ("data", "evaluation", "models", "ops", "training")


def register() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` know the library's models; calling it again changes nothing."""
    from mnemon.models.registration import register as register_models

    register_models()


def __getattr__(name: str) -> Any:
    """Resolve a public name on first access (PEP 562)."""
    if name in _MODEL_NAMES:
        register()
        value = getattr(import_module(_MODEL_NAMES[name]), name)
        globals()[name] = value
        return value
    if name in _SUBPACKAGES:
        return import_module(f"mnemon.{name}")
    raise AttributeError(f"module 'mnemon' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, including those not resolved yet."""
    return sorted({*globals(), *__all__})
