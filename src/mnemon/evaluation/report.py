"""One self-contained HTML page of an evaluation: nothing is loaded from anywhere, figures are inside.

Only the page is made here; numbers come from the comparison, tables from `tables`, figures from `plots`.
"""

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from mnemon.evaluation import tables
from mnemon.evaluation.comparison import Comparison
from mnemon.evaluation.diagnostics import memory_grid, memory_notes
from mnemon.evaluation.plots import Plot
from mnemon.evaluation.tables import NAME_COLUMNS, Grid

if TYPE_CHECKING:
    from mnemon.evaluation.run import EvaluationRun

_MAX_EXAMPLES = 8

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #667085; --paper: #ffffff; --card: #f6f7f9;
  --line: #e3e6eb; --tint: 0, 114, 178; --right: #00795a; --wrong: #b34a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf0; --soft: #98a2b3; --paper: #14171c; --card: #1d2128;
  --line: #2f3540; --tint: 86, 180, 233; --right: #4fd1a5; --wrong: #ff9c5b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .7rem; }
p, ul { margin: .5rem 0; }
.soft { color: var(--soft); }
.lead { font-size: 1.08rem; max-width: 46rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { padding: .34rem .7rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
td.number, th.number { text-align: right; }
tr.first td { border-top: 2px solid var(--line); }
td small { color: var(--soft); font-size: .8em; margin-left: .25em; }
td.best { font-weight: 700; }
td.text { white-space: normal; }
figure { margin: 1rem 0; background: #ffffff; border: 1px solid var(--line); border-radius: 10px; padding: .8rem; }
figure img { display: block; width: 100%; max-width: 52rem; height: auto; margin: 0 auto; }
figure.narrow img { max-width: 34rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto;
  font: .85rem/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
"""


def html_report(run: "EvaluationRun", comparison: Comparison, plots: Sequence[Plot]) -> str:
    """Write the page.

    Args:
        run: results, command and machine.
        comparison: the same results with their tests.
        plots: figures to put inside.

    Returns:
        A complete HTML document without any reference to another file or host.
    """
    sections = [
        _head(comparison),
        section("Accuracy", f'<p class="soft">{escape(tables.caption(comparison))}</p>' + _accuracy_table(comparison)),
        "".join(figure(plot) for plot in plots),
        section("Models and controls", grid_table(tables.model_grid(comparison)) + bullet_list(comparison.notes())),
        section("Examples", _examples(comparison)),
    ]
    if len(comparison.labels) > 1:
        note = f'<p class="soft">{escape(tables.tests_note(comparison))}</p>'
        sections.append(section("Paired tests", note + grid_table(tables.test_grid(comparison))))
    if tables.has_retrieval(comparison):
        found = f'<p class="soft">{escape(tables.RETRIEVAL_NOTE)}</p>' + grid_table(tables.retrieval_grid(comparison))
        sections.append(section("What the retriever found", found))
    if run.diagnostics:
        memory = grid_table(memory_grid(run.diagnostics)) + bullet_list(memory_notes())
        sections.append(section("What the memories do", memory))
    sections += [
        section("Both scoring rules", grid_table(tables.rules_grid(comparison))),
        section("How it was made", _making(run, comparison)),
        section("Limits", bullet_list(_limits(comparison))),
    ]
    return html_page("BABILong evaluation", sections)


def html_page(title: str, sections: Sequence[str]) -> str:
    """Put sections on one page that loads nothing, for dark and light screens."""
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(sections))


def _head(comparison: Comparison) -> str:
    settings = comparison.settings
    tasks, models = ", ".join(settings.tasks), escape(" · ".join(comparison.labels))
    text = (
        f"{models}<br>answering {tasks} with the facts hidden in {settings.lengths[0]} to {settings.lengths[-1]} "
        f"tokens of unrelated text; {comparison.num_samples_evaluated:,} questions per model."
    )
    return f'<h1>BABILong evaluation</h1>\n<p class="lead">{text}</p>\n{bullet_list(_headlines(comparison), "lead")}'


def _headlines(comparison: Comparison) -> list[str]:
    """Say per length, in one sentence, which model is best and whether that is more than luck."""
    sentences = []
    for length in comparison.settings.lengths:
        best = comparison.best(length)
        if best is None:
            continue
        mean = 100 * comparison.accuracy(best.label, length).mean
        sure = (
            "significantly better than every other model" if best.significant else "not significantly better than all"
        )
        sentences.append(f"{length}: {best.label} is best with {mean:.0f} %, {sure}.")
    return sentences


def _accuracy_table(comparison: Comparison) -> str:
    head = _cells("th", [tables.length_head(comparison), "model", *comparison.settings.tasks, "mean"])
    lines: list[str] = []
    previous: str | None = ""
    for row in tables.table_rows(comparison):
        shown = tables.length_text(comparison, row.length) if row.length != previous else ""
        cells = [f"<td>{escape(shown)}</td><td>{escape(row.label)}</td>"]
        for cell in row.cells:
            number, interval = cell.text().split(" ", 1)
            # The tint makes the course over lengths visible at a glance; the number stays the message.
            tint = f"background: rgba(var(--tint), {0.32 * cell.accuracy.mean:.2f})"
            best = " best" if cell.best else ""
            cells.append(f'<td class="number{best}" style="{tint}">{number}<small>{escape(interval)}</small></td>')
        lines.append(f"<tr{' class=first' if row.length != previous else ''}>{''.join(cells)}</tr>")
        previous = row.length
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _examples(comparison: Comparison) -> str:
    """Show questions on which the models disagree, at the longest length first, one per task in turn."""
    rule = comparison.rule
    chosen: list[tuple[str, ...]] = []
    for length in reversed(comparison.settings.lengths):
        for task in comparison.settings.tasks:
            answers = [result.cell(task, length).predictions for result in comparison.results]
            marks = [result.cell(task, length).marks(rule) for result in comparison.results]
            differing = [i for i in range(len(answers[0])) if len({m[i] for m in marks}) > 1]
            index = differing[0] if differing else 0
            texts = [_answer(a[index].output, m[index]) for a, m in zip(answers, marks, strict=True)]
            first = answers[0][index]
            chosen.append((escape(first.sample_id), escape(first.question), escape(first.target), *texts))
    head = _cells("th", ["sample", "question", "right answer", *comparison.names], numbers=False)
    rows = "".join(
        f"<tr>{''.join(f'<td class=text>{text}</td>' for text in line)}</tr>" for line in chosen[:_MAX_EXAMPLES]
    )
    note = (
        '<p class="soft">Where the models disagree, such a question is shown. Every answer is in predictions.jsonl.</p>'
    )
    return f'{note}<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _answer(output: str, right: bool) -> str:
    text = escape(" ".join(output.split())[:80]) or "<i>nothing</i>"
    return f'<span class="{"right" if right else "wrong"}">{"✓" if right else "✗"} {text}</span>'


def _making(run: "EvaluationRun", comparison: Comparison) -> str:
    settings = comparison.settings
    facts = {
        "samples": f"{tables.samples_text(settings)}, seed {settings.seed}, {settings.split} split",
        "stories": settings.stories,
        "background": settings.background,
        "prompt layout": settings.layout,
        "decoding": f"greedy, at most {settings.max_new_tokens} new tokens",
        "headline rule": tables.RULE_NAMES[comparison.rule],
        **{
            f"model {name}": _origin(result.model.source, result.generate_kwargs)
            for name, result in zip(comparison.names, comparison.results, strict=True)
        },
        **run.machine,
    }
    listing = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    prompt = (
        f"<p>A prompt as the models read it:</p><pre>{escape(run.example_prompt)}</pre>" if run.example_prompt else ""
    )
    return f"<pre>{escape(run.command)}</pre><dl>{listing}</dl>{prompt}"


def _origin(source: str, generate_kwargs: dict[str, object]) -> str:
    options = ", ".join(f"{key}={value}" for key, value in generate_kwargs.items())
    return f"{source or 'given in memory'}{f' with {options}' if options else ''}"


def _limits(comparison: Comparison) -> list[str]:
    limits = [
        "The intervals and tests cover the choice of samples only where a model is one checkpoint of one training run; "
        "another seed may train differently.",
        "Samples are cut to their length with the first model's tokenizer; another tokenizer counts the same text "
        "differently.",
        "Models trained on these tasks are measured on what they were trained for, not on other skills.",
    ]
    if "qa7" in comparison.settings.tasks:
        limits.append("The official rule marks every correct answer “none” of qa7 as wrong (“one” is a part of it).")
    return limits


def figure(plot: Plot) -> str:
    """Put a figure into the page itself."""
    data = base64.b64encode(plot.svg).decode()
    kind = ' class="narrow"' if plot.name == "capabilities" else ""
    return f'<figure{kind}><img alt="{escape(plot.title)}" src="data:image/svg+xml;base64,{data}"></figure>\n'


def section(heading: str, body: str) -> str:
    """Put a heading above a part of the page."""
    return f"<section><h2>{escape(heading)}</h2>\n{body}</section>\n"


def bullet_list(items: Iterable[str], kind: str = "") -> str:
    """Write sentences as a list; nothing for none."""
    lines = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f'<ul class="{kind}">{lines}</ul>' if lines else ""


def grid_table(grid: Grid) -> str:
    """Write a table, intervals small and groups set apart."""
    rows = []
    for is_first, line in grid.grouped():
        texts = [_marked(text, index < grid.num_names) for index, text in enumerate(line)]
        cells = _cells("td", texts, raw=True, num_names=grid.num_names)
        rows.append(f"<tr{' class=first' if is_first else ''}>{cells}</tr>")
    head = _cells("th", grid.head, num_names=grid.num_names)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _marked(text: str, is_name: bool) -> str:
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text))
    return text if is_name else re.sub(r" (\[[^\]]*\])", r"<small>\1</small>", text)


def _cells(
    kind: str, texts: Sequence[str], *, numbers: bool = True, raw: bool = False, num_names: int = NAME_COLUMNS
) -> str:
    parts = []
    for index, text in enumerate(texts):
        style = ' class="number"' if numbers and index >= num_names else ""
        parts.append(f"<{kind}{style}>{text if raw else escape(text)}</{kind}>")
    return "".join(parts)
