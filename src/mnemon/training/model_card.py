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
    base = recipe.model.base["model_type"]
    what = f"a plain decoder of type {base}"
    if recipe.model.lm2 is not None:
        what = f"a decoder of type {base} with an LM2 memory"
        if recipe.model.lm2.memory_layers == []:
            span = recipe.model.lm2.attention_span
            what = f"a decoder of type {base}, restricted to a window of {span} tokens and without memory"
    return [
        "---", "library_name: mnemon", "license: apache-2.0", "---", "",
        f"# {recipe.name}", "",
        f"This is {what}: {summary['parameters']['total']:,} parameters, trained from scratch by mnemon "
        f"{summary['version']} to answer bAbI questions whose facts are hidden in unrelated text (BABILong). "
        "It knows nothing else.", "",
        "```python", "import mnemon", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        "mnemon.register()", 'model = AutoModelForCausalLM.from_pretrained("PATH")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")', "```", "",
        "Prompt: `<context>`, newline, the text, newline, `</context>`, blank line, `Question: ...`, newline, "
        "`Answer:`.", "",
    ]  # fmt: skip


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
