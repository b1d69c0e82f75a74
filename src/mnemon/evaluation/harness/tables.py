"""Tables of the suites in the form of the papers: measured rows first, published ones below, marked as such."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mnemon.evaluation.harness.catalogue import LONGBENCH_GROUPS, SUITES
from mnemon.evaluation.harness.published import PUBLISHED, Published
from mnemon.evaluation.harness.records import (
    RESULTS,
    TABLE,
    Estimate,
    HarnessRun,
    Row,
    estimate,
)
from mnemon.evaluation.harness.subjects import FIELDS, LEVELS
from mnemon.evaluation.sample_scores import SAMPLES, sample_lines
from mnemon.evaluation.tables import Grid
from mnemon.files import atomic_write_json, atomic_write_text

AVERAGE = "Average"
_COMMONSENSE_AVERAGE = ("arc_easy", "arc_challenge", "hellaswag", "lambada", "piqa", "winogrande")


@dataclass(frozen=True)
class Column:
    """One column of a suite's table.

    Attributes:
        name: its key in published rows, and its head unless `head` says otherwise.
        measure: gives the number of a model, or None where it was not measured.
        percent: whether the number is a share, shown in percent.
    """

    name: str
    head: str
    measure: Callable[[HarnessRun, str], Estimate | None]
    percent: bool = True


def columns(run: HarnessRun) -> tuple[Column, ...]:
    """Return the columns of a suite's table; the average last."""
    if run.suite == "mmlu":
        groups = {**FIELDS, **LEVELS, AVERAGE: tuple(entry.name for entry in SUITES["mmlu"].tasks)}
        return tuple(Column(name, name, _pooled(tasks)) for name, tasks in groups.items())
    if run.suite == "longbench":
        every = tuple(task for tasks in LONGBENCH_GROUPS.values() for task in tasks)
        grouped = tuple(Column(name, name, _mean(tasks)) for name, tasks in LONGBENCH_GROUPS.items())
        return (*grouped, Column(AVERAGE, "average", _mean(every)))
    names = [entry.name for entry in SUITES[run.suite].tasks]
    if run.suite == "recall":
        heads = ("FDA", "SWDE", "SQuAD", "NQ", "TriviaQA", "DROP")
        plain = tuple(Column(name, head, _single(name)) for name, head in zip(names, heads, strict=True))
        return (*plain, Column(AVERAGE, "average", _mean(tuple(names), whole=True)))
    return (
        Column("wikitext", "WikiText perplexity", _single("wikitext"), percent=False),
        Column("lambada perplexity", "LAMBADA perplexity", _single("lambada", "perplexity"), percent=False),
        Column("arc_easy", "ARC-e", _single("arc_easy")),
        Column("arc_challenge", "ARC-c", _single("arc_challenge")),
        Column("hellaswag", "HellaSwag", _single("hellaswag")),
        Column("lambada", "LAMBADA", _single("lambada")),
        Column("piqa", "PIQA", _single("piqa")),
        Column("winogrande", "WinoGrande", _single("winogrande")),
        Column(AVERAGE, "average", _mean(_COMMONSENSE_AVERAGE, whole=True)),
    )


def suite_grid(run: HarnessRun) -> Grid:
    """Arrange a suite's table: a line per model, or, as in the LM2 paper, a line per group of MMLU's subjects."""
    used = [column for column in columns(run) if any(column.measure(run, label) for label in run.models)]
    measured = [
        (label, _size(run, label), [_text(column.measure(run, label), column.percent) for column in used])
        for label in run.models
    ]
    published = [
        (f"{row.model}, published", row.size, [_published_text(run.suite, row, column.name) for column in used])
        for row in PUBLISHED[run.suite]
        if any(column.name in row.values for column in used)
    ]
    lines = measured + published
    if run.suite != "mmlu":
        head = ("model", "size", *(column.head for column in used))
        return Grid(head, tuple((name, size, *texts) for name, size, texts in lines))
    head = ("group", "questions", *(f"{name}, {size}" for name, size, _ in lines))
    body = []
    for number, column in enumerate(used):
        count = str(_questions(run, column.name))
        body.append((column.head, count, *(texts[number] for _, _, texts in lines)))
    return Grid(head, tuple(body))


def task_grid(run: HarnessRun) -> Grid:
    """Arrange every number: a line per model, task and metric."""
    lines = []
    for row in run.rows:
        percent = row.kind in ("accuracy", "score")
        found = Estimate(row.value, row.low, row.high, row.stderr)
        stderr = "–" if row.stderr is None else f"{100 * row.stderr:.1f}"
        counts = (row.num_samples, row.num_dropped, row.num_cut, row.num_truncated, row.num_fewshot)
        share = f"{100 * row.forward_seconds / max(row.seconds, 1e-9):.0f} %"
        texts = (*map(str, counts), f"{row.seconds:.1f}", share)
        lines.append((row.model, row.task, row.metric, _text(found, percent), stderr, *texts))
    head = ("model", "task", "metric", "value [95 %]", "stderr", "samples", "dropped", "cut", "truncated", "examples")
    return Grid((*head, "seconds", "in the model"), tuple(lines))


def notes(run: HarnessRun) -> list[str]:
    """Say in sentences what a reader of the table must know."""
    settings = run.settings
    measured, known = len(settings["tasks"]), settings["tasks_in_suite"]
    found = [f"Data: {settings['data']}. The same samples for every model; 95 % intervals (Wilson, or bootstrap)."]
    if settings["data"].startswith("made samples"):
        found.append("These samples are made up to try the suite out; their numbers say nothing about a benchmark.")
    if measured < known:
        found.append(
            f"{measured} of {known} tasks were measured: an average shown is over these, and not the benchmark's."
        )
    if settings["limit"] is not None:
        found.append(f"At most {settings['limit']} samples per task.")
    dropped = {row.task: row.num_dropped for row in run.rows if row.num_dropped}
    if dropped:
        listing = ", ".join(f"{task} {count}" for task, count in dropped.items())
        found.append(f"Documents the protocol does not measure (key or value of one character or none): {listing}.")
    truncated = {f"{row.model} on {row.task}": row.num_truncated for row in run.rows if row.num_truncated}
    if truncated:
        found.append(f"Requests that lost their beginning to fit the context: {_listing(truncated)}.")
    if run.suite == "mmlu":
        found.append(
            "Groups pool their questions. The LM2 paper names neither the subjects of High School to General Knowledge "
            "(here: by the subject's name) nor the number of examples."
        )
    if run.suite == "longbench":
        found.append("The published averages come from another scorer than the harness's.")
    sources = sorted({row.source for row in PUBLISHED[run.suite]})
    found.append(f"Published numbers: {', '.join(sources)}; measured by their authors, with no interval given.")
    for label, facts in run.models.items():
        found.append(_model_line(label, facts))
    return found


def suite_page(run: HarnessRun) -> str:
    """Write the tables of a run as Markdown without headings."""
    listed = "".join(f"- {note}\n" for note in notes(run))
    parts = [
        f"**{SUITES[run.suite].title}**\n",
        suite_grid(run).markdown(),
        listed,
        "Every task:\n",
        task_grid(run).markdown(),
        f"Command: `{run.command}`\n",
    ]
    return "\n".join(parts)


def write_suite(folder: Path, run: HarnessRun) -> None:
    """Write `samples.jsonl`, `table.md` and `results.json`, each complete or not at all; the results last.

    Raises:
        RunError: if the disk is full or the place is not writable.
    """
    atomic_write_text(folder / SAMPLES, sample_lines(run.samples))
    atomic_write_text(folder / TABLE, suite_page(run))
    atomic_write_json(folder / RESULTS, run.value())


def _single(task: str, metric: str | None = None) -> Callable[[HarnessRun, str], Estimate | None]:
    def measure(run: HarnessRun, model: str) -> Estimate | None:
        row = run.row(model, task, metric)
        return None if row is None else Estimate(row.value, row.low, row.high, row.stderr)

    return measure


def _mean(tasks: tuple[str, ...], *, whole: bool = False) -> Callable[[HarnessRun, str], Estimate | None]:
    """Average tasks with equal weights; with `whole`, only if all of them were measured."""

    def measure(run: HarnessRun, model: str) -> Estimate | None:
        rows = [row for row in (run.row(model, task) for task in tasks) if row is not None]
        if not rows or (whole and len(rows) < len(tasks)):
            return None
        return Estimate(sum(row.value for row in rows) / len(rows))

    return measure


def _pooled(tasks: tuple[str, ...]) -> Callable[[HarnessRun, str], Estimate | None]:
    """Count the questions of several tasks together."""

    def measure(run: HarnessRun, model: str) -> Estimate | None:
        marks = [[sample.score] for sample in run.samples if sample.model == model and sample.task in tasks]
        return estimate("accuracy", marks) if marks else None

    return measure


def _questions(run: HarnessRun, group: str) -> int:
    tasks = {**FIELDS, **LEVELS}.get(group)
    first = next(iter(run.models))
    rows: Sequence[Row] = [row for row in run.rows if row.model == first and (tasks is None or row.task in tasks)]
    return sum(row.num_samples for row in rows)


def _size(run: HarnessRun, label: str) -> str:
    facts = run.models[label]
    tokens = facts.get("tokens_trained")
    size = _short(int(facts["parameters"]))
    return size if tokens is None else f"{size}, {_short(int(tokens))} tokens"


def _short(number: int) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return str(number)


def _text(found: Estimate | None, percent: bool) -> str:
    if found is None:
        return "–"
    value, low, high = (_number(number, percent) for number in (found.value, found.low, found.high))
    return value if found.low is None else f"{value} [{low}–{high}]"


def _number(number: float | None, percent: bool) -> str:
    if number is None:
        return ""
    if percent:
        return f"{100 * number:.1f}"
    return f"{number:.2f}" if number < 1e4 else f"{number:.2e}"


def _published_text(suite: str, row: Published, column: str) -> str:
    digits = 1 if suite == "mmlu" else 2
    return f"{row.values[column]:.{digits}f}" if column in row.values else "–"


def _listing(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _model_line(label: str, facts: object) -> str:
    assert isinstance(facts, dict)
    parts = [f"{label}: {facts['parameters']:,} parameters"]
    if facts["active_parameters"] is not None and facts["active_parameters"] < facts["parameters"]:
        parts.append(f"{facts['active_parameters']:,} of them active for one token")
    if facts["tokens_trained"] is not None:
        parts.append(f"trained on {facts['tokens_trained']:,} tokens (seed {facts['training_seed']})")
    length = facts["context_length"]
    parts.append("contexts of any length" if length is None else f"contexts of at most {length:,} tokens")
    return f"{', '.join(parts)}; weights {facts['weights']}."
