"""From an option to an explainer."""

from mnemon.errors import ConfigError
from mnemon.inspection.explain.explainer import Explainer

BUILT_IN = "built-in"


def explainer_from_option(name: str = BUILT_IN, model: str | None = None, device: str = "cpu") -> Explainer:
    """Return the explainer that a user asks for.

    Args:
        name: "built-in" (no model, no network); the address of an OpenAI-compatible endpoint, beginning with http:// or
            https://; or the folder or name of a causal language model.
        model: name of the model at the endpoint; for an endpoint only.
        device: where a model of this machine runs.

    Raises:
        ConfigError: the two do not fit together, or the address is none.
        BackendUnavailable: an endpoint without the package `openai`.
        CheckpointError: there is no such model.
    """
    is_endpoint = name.startswith(("http://", "https://"))
    if is_endpoint and not model:
        raise ConfigError(f"which model of {name.split('?')[0]}? add --explainer-model NAME")
    if model and not is_endpoint:
        raise ConfigError(f"--explainer-model is for an endpoint (http://...), and the explainer is {name!r}; drop it")
    if name == BUILT_IN:
        from mnemon.inspection.explain.patterns import PatternExplainer

        return PatternExplainer()
    if is_endpoint:
        from mnemon.inspection.explain.endpoint import EndpointExplainer

        assert model
        return EndpointExplainer(name, model)
    from mnemon.inspection.explain.local import LocalExplainer

    return LocalExplainer(name, device=device)
