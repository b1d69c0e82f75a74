"""The model card (`README.md`) of a trained model, written from its recipe and summary, never by hand."""

from __future__ import annotations

from typing import Any

from mnemon.training.recipe import Recipe


def model_card(recipe: Recipe, summary: dict[str, Any]) -> str:
    """Return the model card as Markdown.

    Args:
        recipe: resolved recipe of the run.
        summary: as `mnemon.training.run.summarise` returns it, with `validation` where it was measured.
    """
    return "\n".join([*_head(recipe, summary), *_facts(recipe, summary), *_stages(summary), *_accuracy(summary), ""])


def _head(recipe: Recipe, summary: dict[str, Any]) -> list[str]:
    trained = "trained" if recipe.model.from_base else "trained from scratch"
    ability = "to answer bAbI questions whose facts are hidden in unrelated text (BABILong)."
    if not recipe.model.from_base:
        ability += " It knows nothing else."
    licence = [] if recipe.model.from_base else ["license: apache-2.0"]  # a pretrained decoder brings its own
    load = 'AutoModelForCausalLM.from_pretrained("PATH")'
    imports = ["import mnemon", "from transformers import AutoModelForCausalLM, AutoTokenizer", "", "mnemon.register()"]
    if recipe.model.freeze_base:
        load = 'mnemon.LM2ForCausalLM.from_adapter("PATH")'
        imports = ["import mnemon", "from transformers import AutoTokenizer", ""]
    return [
        "---", "library_name: mnemon", *licence, "---", "",
        f"# {recipe.name}", "",
        f"This is {_what(recipe, summary)}, {trained} by mnemon {summary['version']} {ability}", "",
        "```python", *imports, f"model = {load}", 'tokenizer = AutoTokenizer.from_pretrained("PATH")', "```", "",
        "Prompt: `<context>`, newline, the text, newline, `</context>`, blank line, `Question: ...`, newline, "
        "`Answer:`.", "",
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
    if model.lm2 is not None:
        what = f"a {base} with an LM2 memory"
        if model.lm2.memory_layers == []:
            what = f"a {base}, restricted to a window of {model.lm2.attention_span} tokens and without memory"
    return f"{what}: {counts['total']:,} parameters"


def _facts(recipe: Recipe, summary: dict[str, Any]) -> list[str]:
    parameters, machine = summary["parameters"], summary["machine"]
    rows = {
        "tasks": ", ".join(recipe.data.tasks),
        "background": recipe.data.background,
        "context lengths trained (tokens)": f"{', '.join(map(str, recipe.data.lengths))}; reached "
        f"{summary['trained_length']}",
        "parameters": f"{parameters['total']:,} (embedding {parameters['embedding']:,}, "
        f"memory {parameters['memory']:,})",
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


def _accuracy(summary: dict[str, Any]) -> list[str]:
    table = summary.get("validation") or {}
    if not table:
        return []
    tasks = list(next(iter(table.values())))
    rows = [
        f"| {length} | " + " | ".join(f"{100 * row[task]['right'] / row[task]['asked']:.0f}" for task in tasks) + " |"
        for length, row in table.items()
    ]
    asked = next(iter(next(iter(table.values())).values()))["asked"]
    return [
        "## Accuracy on held-out samples (%)",
        "",
        f"{asked} samples per cell: test stories in test background, whole answer right under greedy decoding.",
        "",
        "| length | " + " | ".join(tasks) + " |",
        "| --- |" + " --- |" * len(tasks),
        *rows,
        "",
    ]


def _percentages(accuracy: dict[str, float]) -> str:
    return ", ".join(f"{task} {100 * value:.0f} %" for task, value in accuracy.items())
