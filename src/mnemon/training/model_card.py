"""The model card (`README.md`) of a trained model, written from its recipe and summary, never by hand."""

from __future__ import annotations

from typing import Any

from mnemon.training.data_sections import BabilongData, MqarData, TextData
from mnemon.training.recipe import Recipe

_ABILITIES = {
    "babilong": "to answer bAbI questions whose facts are hidden in unrelated text (BABILong).",
    "mqar": "to recall the values of keys that it has seen (multi-query associative recall).",
    "text": "to predict the next token of a text.",
}
_INPUTS = {
    "babilong": "Prompt: `<context>`, newline, the text, newline, `</context>`, blank line, `Question: ...`, newline, "
    "`Answer:`.",
    "mqar": "Its input are token ids without any text, as `mnemon.data.mqar` makes them; there is no tokenizer.",
    "text": "Its input is any text; documents end with the end-of-text token.",
}
_TITLES = {
    "babilong": "Accuracy on held-out samples (%)",
    "mqar": "Queries answered rightly on held-out samples (%)",
    "text": "Perplexity of held-out text",
}
_MEASURES = {
    "babilong": "test stories in test background, whole answer right under greedy decoding.",
    "mqar": "the likeliest token at a query is its value; 95 % Wilson intervals over samples.",
    "text": "windows of the longest length, cut into blocks of every length; 95 % bootstrap intervals over windows.",
}


def model_card(recipe: Recipe, summary: dict[str, Any]) -> str:
    """Return the model card as Markdown.

    Args:
        recipe: resolved recipe of the run.
        summary: as `mnemon.training.run.summarise` returns it, with `validation` where it was measured.
    """
    return "\n".join(
        [
            *_head(recipe, summary),
            *_facts(recipe, summary),
            *_stages(summary),
            *_accuracy(recipe.data.kind, summary),
            "",
        ]
    )


def _head(recipe: Recipe, summary: dict[str, Any]) -> list[str]:
    trained = "trained" if recipe.model.from_base else "trained from scratch"
    ability = _ABILITIES[recipe.data.kind]
    if not recipe.model.from_base:
        ability += " It knows nothing else."
    licence = [] if recipe.model.from_base else ["license: apache-2.0"]  # a pretrained decoder brings its own
    load = 'AutoModelForCausalLM.from_pretrained("PATH")'
    names = ["AutoModelForCausalLM"] if recipe.tokenizer is None else ["AutoModelForCausalLM", "AutoTokenizer"]
    imports = ["import mnemon", f"from transformers import {', '.join(names)}", "", "mnemon.register()"]
    if recipe.model.freeze_base:
        load = 'mnemon.LM2ForCausalLM.from_adapter("PATH")'
        imports = ["import mnemon", "from transformers import AutoTokenizer", ""]
    tokenizer = [] if recipe.tokenizer is None else ['tokenizer = AutoTokenizer.from_pretrained("PATH")']
    return [
        "---", "library_name: mnemon", *licence, "---", "",
        f"# {recipe.name}", "",
        f"This is {_what(recipe, summary)}, {trained} by mnemon {summary['version']} {ability}", "",
        "```python", *imports, f"model = {load}", *tokenizer, "```", "",
        _INPUTS[recipe.data.kind], "",
    ]  # fmt: skip


def _what(recipe: Recipe, summary: dict[str, Any]) -> str:
    """Say what kind of model it is and how large."""
    model, counts = recipe.model, summary["parameters"]
    if model.freeze_base:
        return (
            f"an LM2 memory for the pretrained decoder {model.from_base}, whose {counts['total'] - counts['memory']:,} "
            f"parameters are not part of it and did not change: {counts['memory']:,} parameters"
        )
    base = f"decoder of type {model.base['model_type']}" if model.base else f"pretrained decoder ({model.from_base})"
    what = f"a plain {base}"
    if model.mom is not None:
        rule, types = model.mom.rule, set(model.mom.layer_types or ["mom"])
        mixture = f"{model.mom.num_memories} memories of the rule {rule}, {model.mom.top_k} of them per token"
        mixture += ", and a shared one" if model.mom.shared_memory else ""
        memories = mixture if "mom" in types else f"a single memory of the rule {rule}"
        base += f" with {memories}, in the place of {'some of its' if len(types) > 1 else 'its'} attention"
        what = f"a {base}"
    if model.lm2 is not None:
        what = f"a {base} {'and' if model.mom else 'with'} an LM2 memory"
        if model.lm2.memory_layers == []:
            what = f"a {base}, restricted to a window of {model.lm2.attention_span} tokens and without memory"
    if model.rmt is not None:
        tokens = f"{model.rmt.num_memory_tokens} memory tokens per segment of {model.rmt.segment_length}"
        if model.rmt.memory == "associative":
            tokens += ", written to an associative memory in every block (ARMT)"
        what = f"a {base} with {tokens}{'' if model.rmt.memory == 'associative' else ' (RMT)'}"
    active = f", {counts['active']:,} of them active for one token" if counts["active"] < counts["total"] else ""
    return f"{what}: {counts['total']:,} parameters{active}"


def _facts(recipe: Recipe, summary: dict[str, Any]) -> list[str]:
    parameters, machine = summary["parameters"], summary["machine"]
    rows = {
        **_data_facts(recipe.data, summary["trained_length"]),
        "parameters": f"{parameters['total']:,} (active for one token {parameters['active']:,}, embedding "
        f"{parameters['embedding']:,}, memory {parameters['memory']:,})",
        "tokens seen": f"{summary['tokens']:,} in {summary['steps']:,} steps",
        "time": f"{summary['minutes']} minutes at {summary['tokens_per_second']:,} tokens per second",
        "machine": f"{machine['device']}, {machine['threads']} threads, {machine['platform']}",
        "seed": str(recipe.seed),
        "versions": f"mnemon {summary['version']}, torch {summary['torch']}, transformers {summary['transformers']}",
        "stopped because": summary["stop_reason"],
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    more = "The whole recipe is in `recipe.yaml`, the course of the training in `training_log.jsonl`."
    return ["## Training", "", "| | |", "| --- | --- |", *lines, "", more, ""]


def _data_facts(data: BabilongData | MqarData | TextData, reached: int) -> dict[str, str]:
    if isinstance(data, MqarData):
        slices = ", ".join(f"{part.name} in {part.length} tokens (weight {part.weight:g})" for part in data.slices)
        order = "one after the other" if data.in_stages else "mixed"
        fillers = "any tokens" if data.random_non_queries else "zeros"
        return {"samples": f"{slices}; {order}", "vocabulary": f"{data.vocab_size:,} ids", "fillers": fillers}
    if isinstance(data, TextData):
        return {"text": data.background, "block length trained (tokens)": str(data.length)}
    return {
        "tasks": ", ".join(data.tasks),
        "background": data.background,
        "context lengths trained (tokens)": f"{', '.join(map(str, data.lengths))}; reached {reached}",
    }


def _stages(summary: dict[str, Any]) -> list[str]:
    if not summary["stages"]:
        return []
    rows = [
        f"| {stage['length']} | {stage['tokens']:,} | {_percentages(stage['accuracy'])} | {stage['reason']} |"
        for stage in summary["stages"]
    ]
    return [
        "## Curriculum",
        "",
        "| length | tokens | accuracy at its end | ended by |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
    ]


def _accuracy(kind: str, summary: dict[str, Any]) -> list[str]:
    table = summary.get("validation") or {}
    if not table:
        return []
    tasks = list(dict.fromkeys(task for row in table.values() for task in row))
    rows = [
        f"| {length} | " + " | ".join(cell_text(row[task]) if task in row else "" for task in tasks) + " |"
        for length, row in table.items()
    ]
    cell = next(iter(next(iter(table.values())).values()))
    return [
        f"## {_TITLES[kind]}",
        "",
        f"{cell.get('samples', cell.get('asked'))} samples per cell: {_MEASURES[kind]}",
        "",
        "| length | " + " | ".join(tasks) + " |",
        "| --- |" + " --- |" * len(tasks),
        *rows,
        "",
    ]


def cell_text(cell: dict[str, Any]) -> str:
    """Write one held-out result: percent, with its interval where there is one, or perplexity and bits per byte."""
    if "perplexity" in cell:
        mean, low, high = (f"{cell['perplexity'][key]:.1f}" for key in ("mean", "low", "high"))
        return f"{mean} [{low}–{high}], {cell['bits_per_byte']:.3f} bits per byte"
    percent = f"{100 * cell['right'] / cell['asked']:.0f}"
    if "accuracy" not in cell:
        return percent
    return f"{percent} [{100 * cell['accuracy']['low']:.0f}–{100 * cell['accuracy']['high']:.0f}]"


def _percentages(accuracy: dict[str, float]) -> str:
    return ", ".join(f"{task} {100 * value:.0f} %" for task, value in accuracy.items())
