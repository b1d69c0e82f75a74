"""What the registry says about rules, as data and as a Markdown table; the command line and the documents print it."""

from collections.abc import Sequence
from typing import Any

from mnemon.ops.rule import UpdateRule

_SHAPES = {"head": "[B, T, H]", "key": "[B, T, H, K]", "value": "[B, T, H, V]", "slot": "[B, T, H, J]"}
_RANGES = {"log_decay": "at most 0", "unit": "0 to 1", "positive": "0 or more", "real": "any"}


def describe(rule: UpdateRule) -> dict[str, Any]:
    """Return everything a rule declares, ready for JSON.

    Formulas are in K, V (key and value width per head), J (slots), C (tokens in a chunk) and hyper-parameters.
    """
    return {
        "name": rule.name,
        "equation": rule.equation,
        "paper": rule.source.title,
        "arxiv": rule.source.arxiv,
        "place": rule.source.equation,
        "forms": list(rule.forms),
        "state_size": pretty(rule.state_size),
        "recurrent_flops": pretty(rule.recurrent_flops),
        "chunkwise_flops": pretty(rule.chunkwise_flops),
        "chunk_size": rule.chunk_size,
        "unit_keys": rule.unit_keys,
        "equal_widths": rule.equal_widths,
        "gates": [
            {"name": gate.name, "shape": _SHAPES[gate.per], "range": _RANGES[gate.kind], "meaning": gate.meaning}
            for gate in rule.gates
        ],
        "parameters": [
            {"name": spec.name, "shape": f"[{', '.join(spec.axes)}]", "meaning": spec.meaning}
            for spec in rule.parameters
        ],
        "hyper_parameters": [
            {
                "name": setting.name,
                "default": setting.default,
                "choices": None if setting.choices is None else list(setting.choices),
                "minimum": setting.minimum,
                "meaning": setting.meaning,
            }
            for setting in rule.hyper_parameters
        ],
    }


def pretty(formula: str) -> str:
    """Write a formula for people: "4*K*V" becomes "4·K·V"."""
    return formula.replace("*", "·")


def markdown_table(rules: Sequence[UpdateRule]) -> str:
    """Return a table with a row per rule, in Markdown."""
    lines = [
        "| Rule | Recurrence | Gates | State per head | FLOPs per token and head | Forms | Paper |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for rule in rules:
        about = describe(rule)
        gates = ", ".join(f"`{gate['name']}` {gate['shape']}" for gate in about["gates"]) or "none"
        paper = f"[{about['paper']}](https://arxiv.org/abs/{about['arxiv']}), {about['place']}"
        cells = (
            f"`{rule.name}`",
            about["equation"].replace("|", "\\|"),
            gates,
            about["state_size"],
            about["recurrent_flops"],
            ", ".join(about["forms"]),
            paper,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
