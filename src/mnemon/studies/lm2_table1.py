"""The study `lm2-table1`: LM2 beside what could explain its accuracy as well, on BABILong from 0 to a million tokens.

Every model has the same decoder, data, number of tokens and, within 2 %, of parameters. Models whose memory of the past
grows with it are asked up to 16k tokens, the others at all lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mnemon.evaluation.checkpoints import load_spec
from mnemon.evaluation.compare.published import NOTE, rows_at
from mnemon.evaluation.paired import SIGNIFICANCE
from mnemon.evaluation.results import BabilongResult, result_from_dict
from mnemon.evaluation.retrieval import RetrievalSettings, make_retriever
from mnemon.evaluation.run import EvaluationRun, write_run
from mnemon.evaluation.samples import parse_length
from mnemon.evaluation.suite import evaluate_models
from mnemon.evaluation.tables import Grid, p_text
from mnemon.studies.babilong_questions import suite_options
from mnemon.studies.babilong_tables import (
    Answers,
    accuracy_grid,
    beyond_grid,
    compare_beyond,
    compare_with,
    difference_grid,
    mean_grid,
    model_rows,
    verdicts,
)
from mnemon.studies.equal_size import as_large_as
from mnemon.studies.study import Claim, Json, PlannedRun, Scale, Study, Variant, points_text, state_text
from mnemon.training.recipe import Recipe
from mnemon.training.trainer import wants_cuda

if TYPE_CHECKING:
    from mnemon.evaluation.plots import Plot

LM2 = "LM2"
LABELS = {"plain": "plain", "window": "window", "rmt": "RMT", "armt": "ARMT", "lm2": LM2}
_PLAIN = (LABELS["plain"], LABELS["window"])
_LENGTHS = ("0k", "1k", "2k", "4k", "8k", "16k", "32k", "64k", "128k", "1M")
_FULL_ATTENTION_TO = 16_000
_RANGES = ("near", "far")
"""Up to `_FULL_ATTENTION_TO` tokens, and beyond."""

_RETRIEVAL = RetrievalSettings(kind="bm25", top_k=5, unit="sentence")
_FEWER = {4_000: 0.4, 32_000: 0.2, 64_000: 0.1, 1_000_000: 0.03}
"""From so many tokens on, this share of the samples: each of them costs the more."""


class Lm2Table1(Study):
    """Accuracy over tasks and lengths, as in Table 1 of the paper, with paired tests and the published numbers."""

    name = "lm2-table1"
    title = "LM2 and its controls on BABILong"
    recipe = "babilong-tiny-lm2"
    scales: ClassVar[Mapping[str, Scale]] = {
        "tiny": Scale((), seeds=1, samples=100, lengths=_LENGTHS),
        "small": Scale(
            ("optimisation.max_minutes=null",), seeds=3, samples=100, recipe="babilong-small-lm2", lengths=_LENGTHS
        ),
        "paper": Scale(
            ("evaluation.samples=20",), seeds=1, samples=100, recipe="lm2-1.7b", lengths=_LENGTHS, launched=True
        ),
    }
    equal_parameters = True

    def variants(self, base: Recipe, scale: Scale) -> tuple[Variant, ...]:
        """Return the arms: shipped recipes of the same size, or changes of the one recipe of the paper's size."""
        if scale.launched:
            return _arms_of(base)
        stem = (scale.recipe or self.recipe).removesuffix("lm2")
        return tuple(Variant(arm, "", arm, (), recipe=f"{stem}{arm}") for arm in LABELS)

    def prepare(self, base: Recipe, root: Path) -> tuple[str, ...]:
        """Make sure, before anything is trained, that what the retrieval row needs is there.

        Raises:
            BackendUnavailable: it is not installed.
        """
        make_retriever(_RETRIEVAL)
        return ()

    def lengths(self, recipe: Recipe) -> list[int]:
        """Return the longest length of the training."""
        return [recipe.data.stages[-1].length]

    def tokens_read(self, run: PlannedRun) -> int:
        """Return the tokens of all questions, those put to a row of the same weights included."""
        rows = 2 if run.variant.arm == "lm2" else 1  # what a retriever leaves of a text is little
        cells = sum(_samples(run.samples, length) * parse_length(length) for length in _asked(run))
        return rows * len(run.recipe.data.task_names) * cells

    def measure(self, run: PlannedRun, folder: Path) -> Json:
        """Ask the same questions of every run, of an LM2 a second time with its bank knocked out.

        The plain decoder is asked a second time, at all lengths, with what a retriever finds in place of the text.
        """
        device = "cuda" if wants_cuda(run.recipe.optimisation) else "cpu"
        source = run.variant.recipe or run.recipe.name
        spec = load_spec(LABELS[run.variant.arm], str(folder), device=device, source=source)
        measured: dict[str, list[Json]] = {}
        for retriever in (None, make_retriever(_RETRIEVAL)) if run.variant.arm == "plain" else (None,):
            for name, lengths in _by_range(run.lengths if retriever else _asked(run)).items():
                samples_at = {length: _samples(run.samples, length) for length in lengths}
                options = suite_options(
                    run, lengths, samples_at, controls=run.variant.arm == "lm2", retriever=retriever
                )
                found = evaluate_models([spec], options, cells_folder=folder / "cells").results
                measured.setdefault(name, []).extend(asdict(result) for result in found)
        return {"results": measured}

    def analyse(self, variants: Sequence[Json], measures: Mapping[str, Sequence[Json]]) -> Json:
        """Return rows per model, LM2 with its bank knocked out included, and the tests of LM2 against every other."""
        answers = Answers(_by_seed(measures))
        tests = compare_with(answers, LM2) if LM2 in answers.labels else []
        rows = model_rows(answers)
        trained = max(row["training"]["trained_length"] for row in rows)
        return {
            "tasks": list(answers.tasks),
            "rows": rows,
            "comparisons": tests,
            "beyond": compare_beyond(answers, trained, _pairs(answers.labels)),
        }

    def write(self, root: Path, measures: Mapping[str, Sequence[Json]], results: Json) -> tuple[Path, ...]:
        """Write an evaluation per range of lengths: predictions, tables, every paired test, a report."""
        folders = []
        for compared in zip(*_by_seed(measures), strict=True):
            labels = [result.label for result in compared[0]]
            every = [result for seed in compared for result in seed]
            every.sort(key=lambda result: labels.index(result.label))
            is_near = parse_length(every[0].settings.lengths[0]) <= _FULL_ATTENTION_TO
            folders.append(root / "evaluation" / _RANGES[0 if is_near else 1])
            write_run(folders[-1], EvaluationRun(tuple(every), results["command"], results["machine"]))
        return tuple(folders)

    def body(self, results: Json) -> list[str]:
        """Return what was compared, what was found, the table with published numbers, and the paired tests."""
        tests = results["comparisons"]
        lines = [
            "Accuracy on BABILong (facts of bAbI in unrelated text, arXiv:2406.10149), stories generated, exact words. "
            "All models have the same decoder, source of training samples, curriculum and number of tokens, in as many "
            f"steps as each one's recipe makes of them: {_models_text(results)}.",
            "",
            _model_grid(results).markdown(),
        ]
        if tests:
            lines += ["## What the memory does", "", *verdicts(tests, LM2), ""]
        if results.get("beyond"):
            grid = beyond_grid(results["beyond"])
            lines += ["## Beyond the lengths of training", "", _BEYOND_NOTE, "", grid.markdown()]
        note = (
            "Percent of right answers with 95 % intervals, the same questions for every model. Published models are "
            "much larger: they show the course over length, not a contest."
        )
        table = accuracy_grid(results["rows"], results["tasks"], with_published=True)
        lines += ["## Accuracy", "", note, "", table.markdown(), NOTE, ""]
        if tests:
            lines += ["## Paired tests", "", _TEST_NOTE, "", difference_grid(tests, LM2).markdown()]
        return lines

    def findings(self, results: Json) -> list[str]:
        """Say how models compare beyond the lengths of training, and what is left at the longest."""
        found = [_beyond_sentence(test) for test in results.get("beyond", ())]
        row = next((row for row in results["rows"] if row["label"] == LM2), None)
        if row is None:
            return found
        tasks = results["tasks"]
        for length in [length for length in _GOALS if length in row["cells"]]:
            cell = row["cells"][length]
            first = f"{tasks[0]} {_percent(cell['tasks'][tasks[0]])}"
            published = ", ".join(
                f"{entry.model} {entry.accuracies[tasks[0]]:g}"
                for entry in rows_at(length, tasks)
                if tasks[0] in entry.accuracies
            )
            beside = f" (published on {tasks[0]}: {published})" if published else ""
            found.append(f"LM2 at {length}: {first}, mean over {', '.join(tasks)} {_percent(cell['mean'])}{beside}.")
        return found

    def claims(self, results: Json) -> list[Claim]:
        """Say whether LM2 is ahead of what the paper compares it with, and how far the best fine-tuned model is."""
        tests = [test for test in results.get("beyond", ()) if test["first"] == LM2]
        compared = [test for test in tests if test["second"] in (LABELS["rmt"], *_PLAIN)]
        if not compared:
            return []
        ahead = [test["second"] for test in compared if _is_ahead(test)]
        others = [test["second"] for test in compared if not _is_ahead(test)]
        here = "Holds" if not others else "Holds in part" if ahead else "Not shown"
        here += f": ahead of {', '.join(ahead) or 'none'}"
        here += f"; not shown against {', '.join(others)}." if others else "."
        lead = Claim(_CLAIM, here + _lead_sentence(results.get("comparisons", ())))
        return [lead, *_best_claim(results)]

    def summary(self, results: Json) -> list[str]:
        """Return mean accuracies by length, and the comparisons beyond the lengths of training."""
        rows = results["rows"]
        lengths = list(dict.fromkeys(length for row in rows for length in row["cells"]))
        lines = ["Mean over the tasks in percent, with 95 % intervals.", "", mean_grid(rows, lengths).markdown()]
        if results.get("beyond"):
            lines += [_BEYOND_NOTE, "", beyond_grid(results["beyond"]).markdown()]
        return lines

    def figures(self, results: Json) -> list[Plot]:
        """Draw accuracy over length, a line per model."""
        from mnemon.studies.figures import accuracy_over_length

        return [accuracy_over_length(results["rows"])]


_CLAIM = (
    "LM2-1.7B is ahead of RMT and of the decoder without memory on BABILong at every length (LM2, Table 1); its lead "
    "over RMT shrinks from 30 points at 1K to 0.1 at 128K"
)
_LEADS = ("1k", "128k")
_BEST = {"4k": 98.1, "128k": 96.9, "1M": 93.4}
_BEST_TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")
"""What ARMT-137M answers of these tasks by length, in percent (BABILong leaderboard, arXiv:2406.10149)."""

_GOALS = ("16k", "128k", "1M")
"""Lengths that a report names."""

_BEYOND_NOTE = (
    "Mean accuracy in percent over the lengths beyond the longest training text at which both models were asked, every "
    "length weighing the same, and the difference in points: crossed bootstrap over seeds and questions (McNemar's "
    "test for one seed and one length), Holm-corrected over the lines; bold: below 0.05."
)
_TEST_NOTE = (
    "Differences in percentage points over all tasks of a length, on the same questions. With one training seed: exact "
    "McNemar test and paired bootstrap; with several: crossed bootstrap over seeds and questions. Holm-corrected over "
    "all lines; bold: below 0.05. One seed says nothing about another one."
)


def _lead_sentence(tests: Sequence[Json]) -> str:
    """Say how far LM2 is ahead of RMT at the lengths that the paper's claim names."""
    leads = {test["length"]: test for test in tests if test["against"] == LABELS["rmt"]}
    shown = [f"{points_text(leads[length])} at {length}" for length in _LEADS if length in leads]
    return f" The lead over RMT in points: {', '.join(shown)}." if shown else ""


def _best_claim(results: Json) -> list[Claim]:
    """Say what LM2 answers of the tasks and at the lengths of the best model that was fine-tuned on each task."""
    cells = next(row["cells"] for row in results["rows"] if row["label"] == LM2)
    tasks = [task for task in _BEST_TASKS if task in results["tasks"]]
    lengths = [length for length in _BEST if length in cells]
    if not (tasks and lengths):
        return []
    shares = {task: [100 * cells[length]["tasks"][task]["mean"] for length in lengths] for task in tasks}
    means = [sum(column) / len(tasks) for column in zip(*shares.values(), strict=True)]
    said = ", ".join(f"{value} at {length}" for length, value in _BEST.items())
    paper = f"ARMT-137M, fine-tuned on each task: mean of qa1 to qa5 in percent {said} (BABILong, arXiv:2406.10149)"
    missing = [task for task in _BEST_TASKS if task not in tasks]
    reached = not missing and all(mean >= _BEST[length] for mean, length in zip(means, lengths, strict=True))
    here = ", ".join(f"{mean:.1f} at {length}" for mean, length in zip(means, lengths, strict=True))
    alone = ", ".join(f"{task} {'/'.join(f'{share:.0f}' for share in shares[task])}" for task in tasks)
    untrained = f"; {', '.join(missing)} were not among its tasks" if missing else ""
    verdict = f"{'Reached' if reached else 'Not reached'}: one LM2 for {len(results['tasks'])} tasks"
    return [Claim(paper, f"{verdict}, {here} ({alone}{untrained}).")]


def _is_ahead(test: Json) -> bool:
    return bool(test["corrected_p"] < SIGNIFICANCE and test["difference"]["mean"] > 0)


def _beyond_sentence(test: Json) -> str:
    sure = test["corrected_p"] < SIGNIFICANCE
    verdict = "is ahead of" if _is_ahead(test) else "is behind" if sure else "cannot be told from"
    lengths = test["lengths"]
    return (
        f"{test['first']} {verdict} {test['second']} from {lengths[0]} to {lengths[-1]} tokens, in points: "
        f"{points_text(test)}, p {p_text(test['corrected_p'])}, {len(test['by_seed'])} seed(s)."
    )


def _percent(interval: Mapping[str, float]) -> str:
    low, mean, high = (f"{100 * interval[end]:.0f}" for end in ("low", "mean", "high"))
    return f"{mean} % [{low}–{high}]"


def _pairs(labels: Sequence[str]) -> list[tuple[str, str]]:
    """Return which models are compared beyond the lengths of training: LM2 with all, then RMT with both plain ones."""
    pairs = [(LM2, other) for other in labels if other != LM2] if LM2 in labels else []
    rmt = LABELS["rmt"]
    return pairs + [(rmt, other) for other in _PLAIN if {rmt, other} <= set(labels)]


def _arms_of(base: Recipe) -> tuple[Variant, ...]:
    """Return the arms as changes of an LM2 recipe; feed-forward layers make up for the memory's parameters."""
    assert base.model.lm2 is not None
    segment = base.model.lm2.segment_length
    tokens = f"segment_length: {segment}, num_memory_tokens: 16"
    kinds = {
        "plain": ("model.kind=plain", "model.lm2=null"),
        "window": (f"model.lm2={{segment_length: {segment}, attention_span: {segment}, memory_layers: []}}",),
        "rmt": ("model.kind=rmt", "model.lm2=null", f"model.rmt={{{tokens}}}"),
        "armt": ("model.kind=rmt", "model.lm2=null", f"model.rmt={{{tokens}, memory: associative}}"),
        "lm2": (),
    }
    return tuple(Variant(arm, "", arm, changes and as_large_as(base, changes)) for arm, changes in kinds.items())


def _asked(run: PlannedRun) -> tuple[str, ...]:
    if run.variant.arm != "plain":
        return run.lengths
    return tuple(length for length in run.lengths if parse_length(length) <= _FULL_ATTENTION_TO)


def _by_range(lengths: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the lengths of either range; a range without any is left out."""
    near = tuple(length for length in lengths if parse_length(length) <= _FULL_ATTENTION_TO)
    far = tuple(length for length in lengths if length not in near)
    return {name: part for name, part in zip(_RANGES, (near, far), strict=True) if part}


def _samples(samples: int, length: str) -> int:
    """Return the samples of a cell."""
    share = next((share for tokens, share in reversed(_FEWER.items()) if parse_length(length) >= tokens), 1.0)
    return max(1, round(share * samples))


def _by_seed(measures: Mapping[str, Sequence[Json]]) -> list[list[list[BabilongResult]]]:
    """Return per seed and range of lengths the results of all models."""
    seeds = range(len(next(iter(measures.values()))))
    found = []
    for seed in seeds:
        ranges: dict[str, list[BabilongResult]] = {}
        for runs in measures.values():
            for name, results in runs[seed]["results"].items():
                ranges.setdefault(name, []).extend(result_from_dict(value) for value in results)
        found.append([ranges[name] for name in _RANGES if name in ranges])
    return found


def _models_text(results: Json) -> str:
    """Say what each model of a table sees of a text."""
    labels = {row["label"] for row in results["rows"]}
    plain = LABELS["plain"]
    said = {
        plain: f"*{plain}* sees every earlier token and is asked up to {_FULL_ATTENTION_TO // 1000}k tokens",
        LABELS["window"]: "*window* sees only the tokens within LM2's attention span",
        LABELS["rmt"]: "*RMT* carries memory tokens from segment to segment",
        LABELS["armt"]: "*ARMT* carries associative memories that its memory tokens write",
        f"{plain} ({_RETRIEVAL.name})": f"*{plain} ({_RETRIEVAL.name})* reads only what BM25 found for the question",
        LM2: f"*{LM2}* carries its bank; *knocked out* is the same LM2 without what the bank says",
    }
    return ", ".join(text for label, text in said.items() if label in labels)


def _model_grid(results: Json) -> Grid:
    """Return the table of models; what shares weights with another row is marked by its role."""
    own = {LABELS[variant["arm"]]: variant for variant in results["variants"]}
    lines = []
    for row in results["rows"]:
        variant = own.get(row["label"])
        lines.append(
            (
                row["label"],
                row["role"],
                f"{row['parameters']:,}",
                f"{row['memory']:,}",
                "–" if variant is None else state_text(variant),
                f"{row['training']['tokens']:,}",
                f"{row['training']['steps']:,}",
                f"{row['training']['trained_length']:,}",
                "–" if variant is None else f"{sum(variant['minutes']):.0f}",
            )
        )
    facts_head = ("model", "role", "parameters", "of them memory", "state, bytes")
    return Grid((*facts_head, "training tokens", "steps", "longest", "minutes"), tuple(lines))
