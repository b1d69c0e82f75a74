"""From finished runs to one document: models named and grouped, suites compared, tables and figures made."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mnemon.errors import ConfigError
from mnemon.evaluation import plots, tables
from mnemon.evaluation.compare import figures
from mnemon.evaluation.compare.curves import TrainingCurve, read_recipe, recipe_digest
from mnemon.evaluation.compare.document import Document, Section, Table
from mnemon.evaluation.compare.entries import Entry, final_labels
from mnemon.evaluation.compare.published import NOTE as PUBLISHED_NOTE
from mnemon.evaluation.compare.published import rows_at
from mnemon.evaluation.compare.runs import ScoreRun, Source
from mnemon.evaluation.compare.suites import (
    SuiteComparison,
    SuiteScores,
    by_model,
    suite_caption,
    suite_grid,
    suite_tests,
)
from mnemon.evaluation.comparison import Comparison
from mnemon.evaluation.controls import KNOCKED_OUT
from mnemon.evaluation.results import BabilongResult, Rule
from mnemon.evaluation.retrieval import RetrievalSettings
from mnemon.evaluation.run import EvaluationRun
from mnemon.evaluation.statistics import Correction
from mnemon.evaluation.tables import Grid, TableRow, length_text, strong, table_rows

_MANY_TASKS = 20


@dataclass(frozen=True)
class CompareOptions:
    """How to compare.

    Attributes:
        correction: for the number of tests, "holm" or "bh".
        baseline: label that all others are tested against; None tests every pair.
        rule: how BABILong answers are marked; None takes the runs' own.
        published: put published BABILong rows beside the measured ones.
        tasks: compare these tasks only; None compares all.
        lengths: compare these lengths of BABILong only; None compares all.
        separate_seeds: keep training seeds of one recipe apart.
        with_figures: draw figures; without them a comparison is quicker.
    """

    correction: Correction = "holm"
    baseline: str | None = None
    rule: Rule | None = None
    published: bool = False
    tasks: tuple[str, ...] | None = None
    lengths: tuple[str, ...] | None = None
    separate_seeds: bool = False
    with_figures: bool = True


def compare(sources: Sequence[Source], options: CompareOptions, command: str = "") -> Document:
    """Compare finished runs.

    Args:
        sources: what was read, at least one.
        options: how to compare.
        command: command line for the record.

    Returns:
        The document, with a section per suite.

    Raises:
        ConfigError: if there is nothing to compare, labels clash, or samples differ.
    """
    parts: list[tuple[Section, dict[str, Any]]] = []
    if any(isinstance(source.content, EvaluationRun) for source in sources):
        parts.append(_babilong(sources, options))
    for suite in dict.fromkeys(sample.suite for _, run in _score_runs(sources) for sample in run.samples):
        parts.append(_suite(suite, sources, options))
    if any(isinstance(source.content, TrainingCurve) for source in sources):
        parts.append(_training(sources, options))
    if not parts:
        raise ConfigError("nothing to compare; name at least one folder of a finished run")
    if options.published and not any(isinstance(source.content, EvaluationRun) for source in sources):
        raise ConfigError("published numbers are those of BABILong, and none of the runs is; leave out --published")
    values = {"sections": [{"title": section.title, **value} for section, value in parts]}
    names = tuple(source.name for source in sources)
    return Document("Comparison of runs", tuple(section for section, _ in parts), names, command, values)


def _babilong(sources: Sequence[Source], options: CompareOptions) -> tuple[Section, dict[str, Any]]:
    entries, results = [], []
    for source in sources:
        if isinstance(source.content, EvaluationRun):
            for result in source.content.results:
                entries.append(_babilong_entry(source, source.content, result))
                results.append(_chosen(result, options))
    labels = final_labels(entries, separate_seeds=options.separate_seeds)
    named = [replace(result, label=label) for result, label in zip(results, labels, strict=True)]
    comparison = Comparison(
        sorted(named, key=lambda result: labels.index(result.label)),
        options.rule,
        correction=options.correction,
        baseline=options.baseline,
        over_lengths=len(results[0].settings.lengths) > 1,
    )
    note = tables.caption(comparison) + _over_lengths_note(comparison)
    main = Table(
        tables.title(comparison),
        babilong_grid(comparison, published=options.published),
        babilong_grid(comparison, published=options.published, all_intervals=False),
        f"{note} {PUBLISHED_NOTE}" if options.published else note,
    )
    found = [main]
    if len(comparison.labels) > 1:
        note = "All tasks of a length together, on the same samples; differences in percentage points, 95 % intervals."
        tests = tables.test_grid(comparison)
        found.append(Table("Paired tests", tests, _columns(tests, 0, 1, 2, -1), note))
    if tables.has_retrieval(comparison):
        found.append(Table("Retrieval", tables.retrieval_grid(comparison), note=tables.RETRIEVAL_NOTE))
    models = tables.model_grid(comparison)
    found.append(Table("Models", models, _columns(models, 0, 1, 2, 4, 5, 7)))
    section = Section(
        "BABILong",
        tuple(found),
        tuple(plots.all_plots(comparison) if options.with_figures else ()),
        tuple(_headlines(comparison)),
        tuple(comparison.notes()),
    )
    return section, _babilong_value(comparison)


def babilong_grid(comparison: Comparison, *, published: bool = False, all_intervals: bool = True) -> Grid:
    """Arrange accuracies in the form of the LM2 paper's table 1: lengths, models, tasks, average.

    Args:
        comparison: the models.
        published: put published rows under the measured ones of every length.
        all_intervals: write every interval, not those of the averages alone.
    """
    tasks = comparison.settings.tasks
    lines: list[tuple[str, ...]] = []
    for length in comparison.lengths:
        name = length_text(comparison, length)
        lines += [
            (name, row.label, *_texts(row, all_intervals)) for row in table_rows(comparison) if row.length == length
        ]
        for published_row in rows_at(length, tasks) if published and length is not None else ():
            numbers = [published_row.accuracies.get(task) for task in tasks] + [published_row.mean(tasks)]
            texts = ("–" if number is None else f"{number:.0f}" for number in numbers)
            lines.append((name, f"{published_row.model} (published)", *texts))
    average = "average" if all_intervals else "average [95 %]"
    return Grid((tables.length_head(comparison), "model", *tasks, average), tuple(lines))


def _columns(grid: Grid, *numbers: int) -> Grid:
    """Keep some columns, for a narrow page."""
    return Grid(
        tuple(grid.head[number] for number in numbers),
        tuple(tuple(line[number] for number in numbers) for line in grid.lines),
        grid.num_names,
    )


def _texts(row: TableRow, all_intervals: bool) -> list[str]:
    last = len(row.cells) - 1
    texts = [cell.text(interval=all_intervals or index == last) for index, cell in enumerate(row.cells)]
    return [strong(text) if cell.best else text for text, cell in zip(texts, row.cells, strict=True)]


def _babilong_entry(source: Source, run: EvaluationRun, result: BabilongResult) -> Entry:
    model = result.model
    is_one_of_several = sum(other.label == result.label for other in run.results) > 1
    options = ", ".join(f"{key}={value}" for key, value in result.generate_kwargs.items())
    kind = (
        *(model.role, model.model_type, model.num_parameters, model.num_memory_parameters, options),
        *(str(model.retrieval), recipe_digest(read_recipe(model.source)) if model.source else ""),
    )
    return Entry(
        result.label,
        source.name,
        source.prefix,
        is_alone=len(run.results) == 1,
        recipe=result.label if is_one_of_several else str(model.training.get("name", "")),
        seed=model.training.get("seed"),
        variant=_variant(result),
        kind=kind,
    )


def _variant(result: BabilongResult) -> str:
    """Say how a row differs from the plain row of its model, as `mnemon eval` labels it."""
    if result.model.retrieval:
        return f" ({RetrievalSettings(**result.model.retrieval).name})"
    return KNOCKED_OUT if result.model.role == "knocked_out" else ""


def _chosen(result: BabilongResult, options: CompareOptions) -> BabilongResult:
    """Keep the tasks and lengths asked for."""
    settings = result.settings
    for name, wanted, held in (
        ("task", options.tasks, settings.tasks),
        ("length", options.lengths, settings.lengths),
    ):
        if missing := [item for item in wanted or () if item not in held]:
            raise ConfigError(f"{result.label!r} was not measured at the {name} {missing[0]}; it has {', '.join(held)}")
    tasks = tuple(task for task in settings.tasks if options.tasks is None or task in options.tasks)
    lengths = tuple(length for length in settings.lengths if options.lengths is None or length in options.lengths)
    samples_at = {length: count for length, count in settings.samples_at.items() if length in lengths}
    return replace(
        result,
        settings=replace(settings, tasks=tasks, lengths=lengths, samples_at=samples_at),
        cells=tuple(cell for cell in result.cells if cell.task in tasks and cell.length in lengths),
    )


def _headlines(comparison: Comparison) -> list[str]:
    """Say for every length, and for all together, which model is best and whether that is more than luck."""
    if len(comparison.labels) < 2:
        return []
    sentences = []
    for length in comparison.lengths:
        best = comparison.best(length)
        place = "All lengths" if length is None else f"At {length}"
        if best is None:
            sentences.append(f"{place}: several models share the highest accuracy.")
            continue
        rival = "every other model" if comparison.baseline is None else f"the baseline {comparison.baseline}"
        sure = f"significantly better than {rival}" if best.significant else f"not significantly better than {rival}"
        if best.label == comparison.baseline:
            sure = "the baseline itself"
        mean = 100 * comparison.accuracy(best.label, length).mean
        sentences.append(f"{place}: {best.label} is best with {mean:.0f} %, {sure}.")
    return sentences


def _over_lengths_note(comparison: Comparison) -> str:
    return f" “{tables.ALL_LENGTHS}”: every length with the same weight." if comparison.over_lengths else ""


def _babilong_value(comparison: Comparison) -> dict[str, Any]:
    rows = [
        {
            "model": label,
            "seeds": comparison.num_seeds(label),
            "length": length,
            "task": task,
            "accuracy": asdict(comparison.accuracy(label, length, task)),
            "spread_over_seeds": comparison.spread(label, length, task),
            "is_best": (best := comparison.best(length, task)) is not None and best.label == label,
            "is_significant": label in comparison.stars(length, task),
        }
        for length in comparison.lengths
        for label in comparison.labels
        for task in (*comparison.settings.tasks, None)
    ]
    return {
        "rule": comparison.rule,
        "correction": comparison.correction,
        "baseline": comparison.baseline,
        "settings": asdict(comparison.settings),
        "rows": rows,
        "tests": [asdict(test) for test in comparison.tests],
    }


def _score_runs(sources: Sequence[Source]) -> list[tuple[Source, ScoreRun]]:
    return [(source, source.content) for source in sources if isinstance(source.content, ScoreRun)]


def _suite(suite: str, sources: Sequence[Source], options: CompareOptions) -> tuple[Section, dict[str, Any]]:
    entries, members, rows = [], [], []
    for source, run in _score_runs(sources):
        models = {model: samples for (name, model), samples in by_model(run.samples).items() if name == suite}
        for model, samples in models.items():
            entries.append(_score_entry(source, model, run.facts.get(model, {}), is_alone=len(models) == 1))
            members.append(samples)
        rows += [row for row in run.rows if suite == "perplexity" and row.get("memory_blocks") is not None]
    labels = final_labels(entries, separate_seeds=options.separate_seeds)
    named = [SuiteScores(label, samples) for label, samples in zip(labels, members, strict=True)]
    comparison = SuiteComparison(
        suite, named, tasks=options.tasks, correction=options.correction, baseline=options.baseline
    )
    found = [Table(f"{suite}: scores", suite_grid(comparison), note=suite_caption(comparison))]
    if len(comparison.paired.labels) > 1:
        averages = suite_tests(comparison, averages_only=True) if len(comparison.tasks) > _MANY_TASKS else None
        found.append(Table(f"{suite}: paired tests", suite_tests(comparison), averages, "On the same samples."))
    is_drawn = options.with_figures and len(comparison.tasks) <= _MANY_TASKS
    drawn = [figures.plot_suite(comparison)] if is_drawn else []
    if options.with_figures and len({row["memory_blocks"] for row in rows}) > 1:
        drawn.append(figures.plot_blocks(rows))
    return Section(f"Suite {suite}", tuple(found), tuple(drawn)), _suite_value(comparison)


def _score_entry(source: Source, model: str, facts: Any, *, is_alone: bool) -> Entry:
    role = str(facts.get("role", ""))
    place = str(facts.get("source") or "")
    digest = recipe_digest(read_recipe(place)) if place else ""
    return Entry(
        model,
        source.name,
        source.prefix,
        is_alone=is_alone,
        recipe=str(facts.get("recipe") or ""),
        seed=facts.get("training_seed"),
        variant=KNOCKED_OUT if role == "knocked_out" else "",
        kind=(role, facts.get("parameters"), digest),
    )


def _suite_value(comparison: SuiteComparison) -> dict[str, Any]:
    paired = comparison.paired
    rows = [
        {
            "model": label,
            "seeds": paired.num_seeds(label),
            "task": column,
            "unit": comparison.unit(column),
            "value": asdict(comparison.shown(label, column)),
            "is_best": paired.leader(column) == label,
            "is_significant": label in paired.stars(column),
        }
        for label in paired.labels
        for column in comparison.columns
    ]
    tests = [{**asdict(test), "task": test.column} for test in paired.tests]
    return {"suite": comparison.suite, "correction": comparison.correction, "rows": rows, "tests": tests}


def _training(sources: Sequence[Source], options: CompareOptions) -> tuple[Section, dict[str, Any]]:
    entries, curves = [], []
    for source in sources:
        curve = source.content
        if isinstance(curve, TrainingCurve):
            kind = (curve.parameters, curve.recipe)
            label = curve.name or source.name
            entries.append(Entry(label, source.name, source.prefix, True, curve.name, curve.seed, "", kind))
            curves.append(curve)
    labels = final_labels(entries, separate_seeds=options.separate_seeds)
    named = list(zip(labels, curves, strict=True))
    lines = []
    for label, curve in named:
        minutes = "–" if curve.minutes is None else f"{curve.minutes:.1f}"
        numbers = ["–" if number is None else f"{number:,}" for number in (curve.parameters, curve.memory_blocks)]
        seed = "–" if curve.seed is None else str(curve.seed)
        lines.append((label, seed, *numbers, f"{curve.tokens[-1]:,}", minutes, f"{curve.final_loss:.3f}"))
    head = ("model", "seed", "parameters", "blocks with memory", "tokens", "minutes", "final loss")
    note = "Final loss: mean over the last tenth of the log, in nats per token that counts."
    drawn = [figures.plot_losses(named)] if options.with_figures else []
    is_text = all(curve.kind == "text" for curve in curves)
    if (
        options.with_figures
        and is_text
        and len({curve.memory_blocks for curve in curves if curve.memory_blocks is not None}) > 1
    ):
        drawn.append(figures.plot_perplexities([item for item in named if item[1].memory_blocks is not None]))
    rows = [
        {"model": label, "seed": curve.seed, "tokens": curve.tokens[-1], "final_loss": curve.final_loss}
        for label, curve in named
    ]
    table = Table("Training runs", Grid(head, tuple(lines)), note=note)
    return Section("Training", (table,), tuple(drawn)), {"rows": rows}
