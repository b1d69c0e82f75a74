"""Tables in the form of the LM2 paper: length x model x task, mean accuracy in percent with its 95 % interval.

The same rows go to the terminal (rich) and to Markdown. Bold is the best model of a column; a star means that it beats
every other model there by the Holm-corrected paired test.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from mnemon.evaluation.comparison import SIGNIFICANCE, Comparison, PairwiseTest
from mnemon.evaluation.results import EvaluationSettings, RetrievalCounts, Rule
from mnemon.evaluation.statistics import CORRECTIONS
from mnemon.metrics.intervals import Interval, wilson_interval

NAME_COLUMNS = 2
ALL_LENGTHS = "all"
RULE_NAMES: dict[Rule, str] = {"exact": "exact words", "official": "the benchmark's substring rule"}


@dataclass(frozen=True)
class Grid:
    """A table as text, for Markdown and HTML alike; two stars around a text mean bold.

    Attributes:
        head: column names.
        lines: one tuple of texts per line.
        num_names: so many columns at the left are names; the others are numbers.
    """

    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    num_names: int = NAME_COLUMNS

    def grouped(self) -> list[tuple[bool, tuple[str, ...]]]:
        """Give every line, its first name left out where the line before has it, and whether a rule goes before it.

        There are groups where two columns are names and a first name is repeated.
        """
        firsts = [line[0] for line in self.lines]
        has_groups = self.num_names > 1 and any(left == right for left, right in itertools.pairwise(firsts))
        lines = []
        for index, line in enumerate(self.lines):
            repeats = has_groups and index > 0 and line[0] == firsts[index - 1]
            lines.append((has_groups and index > 0 and not repeats, ("", *line[1:]) if repeats else line))
        return lines

    def markdown(self) -> str:
        """Write the table as Markdown, numbers aligned to the right."""
        rule = ["---" if index < self.num_names else "---:" for index in range(len(self.head))]
        rows = [self.head, rule, *([text.replace("|", "\\|") for text in line] for line in self.lines)]
        return "".join(f"| {' | '.join(row)} |\n" for row in rows)


@dataclass(frozen=True)
class TableCell:
    """One number of the table and how to stress it."""

    accuracy: Interval
    best: bool = False
    significant: bool = False
    spread: float | None = None

    def text(self, *, interval: bool = True) -> str:
        """Write "93 [86-97]", in percent, with a star if significantly best; "93±2 [86-97]" over training seeds."""
        star = "" if self.spread is None else f"±{100 * self.spread:.0f}"
        star += "★" if self.significant else ""
        low, mean, high = (
            f"{100 * value:.0f}" for value in (self.accuracy.low, self.accuracy.mean, self.accuracy.high)
        )
        return f"{mean}{star} [{low}–{high}]" if interval else f"{mean}{star}"


@dataclass(frozen=True)
class TableRow:
    """One model at one length: its cells per task, the mean over all tasks last."""

    length: str | None
    label: str
    cells: tuple[TableCell, ...]


def table_rows(comparison: Comparison) -> list[TableRow]:
    """Arrange a comparison as rows, lengths outermost, the mean over the tasks as last column."""
    columns: list[str | None] = [*comparison.settings.tasks, None]
    rows = []
    for length in comparison.lengths:
        best = {task: comparison.best(length, task) for task in columns}
        stars = {task: comparison.stars(length, task) for task in columns}
        for label in comparison.labels:
            cells = []
            for task in columns:
                leader = best[task]
                leads = leader is not None and leader.label == label
                spread = comparison.spread(label, length, task)
                cells.append(TableCell(comparison.accuracy(label, length, task), leads, label in stars[task], spread))
            rows.append(TableRow(length, label, tuple(cells)))
    return rows


def rich_table(comparison: Comparison) -> Table:
    """Build the table for the terminal.

    Args:
        comparison: models on the same samples.

    Returns:
        A table to print with rich; intervals stand beside the means only, so that it fits a terminal.
    """
    table = Table(title=title(comparison), caption=caption(comparison), box=box.SIMPLE_HEAD, title_style="bold")
    table.add_column(length_head(comparison))
    table.add_column("model")
    for task in comparison.settings.tasks:
        table.add_column(task, justify="right")
    table.add_column("mean [95 %]", justify="right", no_wrap=True)
    previous: str | None = ""
    for row in table_rows(comparison):
        if previous != "" and row.length != previous:
            table.add_section()
        texts = [cell.text(interval=index == len(row.cells) - 1) for index, cell in enumerate(row.cells)]
        styled = [
            f"[bold]{text}[/]" if cell.best else text for text, cell in zip(_escape(texts), row.cells, strict=True)
        ]
        table.add_row(length_text(comparison, row.length) if row.length != previous else "", row.label, *styled)
        previous = row.length
    return table


def accuracy_grid(comparison: Comparison) -> Grid:
    """Arrange the accuracy table, every number with its interval."""
    lines = []
    for row in table_rows(comparison):
        texts = [strong(cell.text()) if cell.best else cell.text() for cell in row.cells]
        lines.append((length_text(comparison, row.length), row.label, *texts))
    return Grid((length_head(comparison), "model", *comparison.settings.tasks, "mean"), tuple(lines))


def model_grid(comparison: Comparison) -> Grid:
    """Arrange one line per model and training seed: role, parameters, share of the memory, training, speed."""
    lines = []
    for result in comparison.results:
        info = result.model
        seconds = sum(cell.seconds for cell in result.cells)
        tokens = sum(cell.prompt_tokens + cell.new_tokens for cell in result.cells)
        speed = f"{tokens / seconds:,.0f}" if seconds else "–"
        trained = [_count(info.training.get(key)) for key in ("tokens", "trained_length", "seed")]
        active = info.num_parameters if info.num_active_parameters is None else info.num_active_parameters
        sizes = [f"{info.num_parameters:,}", f"{active:,}", f"{info.num_memory_parameters:,}"]
        lines.append((result.label, info.role.replace("_", " "), *sizes, *trained, speed))
    sizes_head = ("parameters", "active for a token", "of them memory")
    head = ("model", "role", *sizes_head, "training tokens", "trained length", "training seed", "read, tokens/s")
    return Grid(head, tuple(lines))


def test_grid(comparison: Comparison) -> Grid:
    """Arrange the paired tests over all tasks together, one line per length and pair of models."""
    corrected = f"p ({CORRECTIONS[comparison.correction]})"
    head = ("length", "models", "difference (points)", "only first right", "only second right", "p", corrected)
    return Grid(head, tuple(_test_line(test) for test in comparison.tests if test.task is None))


def tests_note(comparison: Comparison) -> str:
    """Say how the paired tests over all tasks of a length were made."""
    several = _has_seeds(comparison)
    method = (
        "crossed bootstrap over training seeds and samples, where both models have one seed exact McNemar and bootstrap"
        if several
        else "exact McNemar, bootstrap"
    )
    return (
        "Paired tests on the same samples, all tasks of a length together; differences in percentage points with 95 % "
        f"intervals ({method}); {CORRECTIONS[comparison.correction]}'s correction over all lines of this table; bold: "
        f"below {SIGNIFICANCE}."
    )


RETRIEVAL_NOTE = (
    "What the retriever found: tokens of a text that were read, and recall, the mean share of a question's supporting "
    "facts that stand whole in them, with its 95 % Wilson interval over questions."
)


def has_retrieval(comparison: Comparison) -> bool:
    """Tell whether some model read only what a retriever found."""
    return any(result.model.retrieval for result in comparison.results)


def retrieval_grid(comparison: Comparison) -> Grid:
    """Arrange what was retrieved: one line per length and model, recall by task and over all."""
    settings, lines = comparison.settings, []
    for length in settings.lengths:
        for name, result in zip(comparison.names, comparison.results, strict=True):
            if not result.model.retrieval:
                continue
            cells = [result.cell(task, length) for task in settings.tasks]
            counts = [cell.retrieval for cell in cells if cell.retrieval is not None]
            asked = sum(len(cell.predictions) for cell in cells)
            recalls = [_recall_text([cell.retrieval]) for cell in cells]
            read = f"{sum(count.text_tokens for count in counts) / asked:,.0f}"
            seconds = f"{sum(count.seconds for count in counts) / asked:.3f}"
            lines.append((length, name, *recalls, _recall_text(counts, interval=True), read, seconds))
    last = ("recall [95 %]", "tokens read", "seconds per text")
    return Grid(("length", "model", *settings.tasks, *last), tuple(lines))


def rules_grid(comparison: Comparison) -> Grid:
    """Arrange mean accuracies by both scoring rules side by side, since published numbers use the official one."""
    rules: tuple[Rule, Rule] = ("exact", "official")
    by_rule = {rule: Comparison(comparison.results, rule) for rule in rules}
    lines = []
    for label in comparison.labels:
        for rule in rules:
            means = [
                f"{100 * by_rule[rule].accuracy(label, length).mean:.1f}" for length in comparison.settings.lengths
            ]
            lines.append((label, RULE_NAMES[rule], *means))
    return Grid(("model", "rule", *comparison.settings.lengths), tuple(lines))


def title(comparison: Comparison) -> str:
    """Name the table."""
    return f"BABILong accuracy in percent ({RULE_NAMES[comparison.rule]})"


def length_head(comparison: Comparison) -> str:
    """Name the column of lengths; it says the number of samples where that is not the same for all."""
    return "length (samples)" if comparison.settings.samples_at else "length"


def length_text(comparison: Comparison, length: str | None) -> str:
    """Write a length, with its samples per task in brackets where they are not the same for all lengths."""
    settings = comparison.settings
    if length is None:
        return ALL_LENGTHS
    return f"{length} ({settings.samples_for(length)})" if settings.samples_at else length


def samples_text(settings: EvaluationSettings) -> str:
    """Say how many samples were asked, for example "32 per task and length (8k: 6, 16k: 4)"."""
    others = ", ".join(f"{length}: {count}" for length, count in settings.samples_at.items())
    return f"{settings.num_samples} per task and length" + (f" ({others})" if others else "")


def caption(comparison: Comparison) -> str:
    """Say how to read the table: samples, intervals, stars, the level of guessing."""
    per_cell = {len(cell.predictions) for cell in comparison.results[0].cells}
    counts = "–".join(str(n) for n in sorted({min(per_cell), max(per_cell)}))
    where = " (in brackets)" if comparison.settings.samples_at else ""
    several = _has_seeds(comparison)
    text = f"{counts} samples per task and length{where}, the same for every model; "
    seeds = {label: comparison.num_seeds(label) for label in comparison.labels}
    if not several:
        text += "95 % Wilson intervals."
    elif len(set(seeds.values())) == 1:
        text += (
            f"{seeds[comparison.labels[0]]} training seeds of each, ± is the standard deviation over them; 95 % "
            "intervals cover the choice of seeds and samples (crossed bootstrap)."
        )
    else:
        listing = ", ".join(f"{label} {count}" for label, count in seeds.items())
        text += (
            f"95 % Wilson intervals. Training seeds: {listing}; ± is the standard deviation over seeds; an interval "
            "of several seeds covers the choice of seeds and samples (crossed bootstrap)."
        )
    if len(comparison.labels) > 1:
        method = "McNemar, with several seeds crossed bootstrap" if several else "McNemar"
        rival = "every other model" if comparison.baseline is None else f"the baseline {comparison.baseline}"
        correction = CORRECTIONS[comparison.correction]
        text += f" Bold: best. ★: better than {rival} ({method}, {correction}-corrected p < {SIGNIFICANCE})."
    level = comparison.majority_level()
    return text if level is None else f"{text} Always the most frequent answer: {100 * level:.0f} % on average."


def _has_seeds(comparison: Comparison) -> bool:
    return any(comparison.num_seeds(label) > 1 for label in comparison.labels)


def p_text(p_value: float) -> str:
    """Write a p value with as many digits as it deserves; one near 0.05 with enough to say on which side it is."""
    if p_value < 0.0001:
        return "< 0.0001"
    is_near = f"{p_value:.2f}" == f"{SIGNIFICANCE:.2f}"
    return f"{p_value:.4f}" if p_value < 0.01 or is_near else f"{p_value:.2f}"


def _recall_text(counts: Sequence[RetrievalCounts | None], *, interval: bool = False) -> str:
    known = [(count.recall, count.num_known) for count in counts if count is not None and count.recall is not None]
    total = sum(number for _, number in known)
    if not total:
        return "–"
    recall = wilson_interval(min(total, sum(share * number for share, number in known if share)), total)
    return TableCell(recall).text(interval=interval)


def _test_line(test: PairwiseTest) -> tuple[str, ...]:
    change = test.result.difference
    low, mean, high = (f"{100 * value:+.1f}" for value in (change.low, change.mean, change.high))
    corrected = p_text(test.corrected_p)
    return (
        test.length or ALL_LENGTHS,
        f"{test.first} − {test.second}",
        f"{mean} [{low}, {high}]",
        _count(test.result.only_first),
        _count(test.result.only_second),
        p_text(test.result.p_value),
        strong(corrected) if test.corrected_p < SIGNIFICANCE else corrected,
    )


def strong(text: str) -> str:
    """Mark a text of a grid as bold."""
    return f"**{text}**"


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "–" if value is None else str(value)


def _escape(texts: Sequence[str]) -> list[str]:
    return [text.replace("[", "\\[") for text in texts]
