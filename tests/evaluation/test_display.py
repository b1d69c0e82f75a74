import io
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from rich.console import Console

from mnemon.evaluation import plots, tables
from mnemon.evaluation.comparison import Comparison
from mnemon.evaluation.report import html_report
from mnemon.evaluation.results import BabilongResult
from mnemon.evaluation.run import EvaluationRun, markdown_page

Invent = Callable[..., BabilongResult]


def test_the_terminal_table_names_every_model_task_and_length(four_models: Comparison) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(tables.rich_table(four_models))
    text = console.export_text()
    for word in ("LM2 (knocked out)", "window", "qa1", "qa6", "0k", "4k", "mean", "40 samples", "Wilson"):
        assert word in text
    assert re.search(r"\d+★ \[\d+–\d+\]", text)


def test_the_markdown_table_shows_what_was_measured(invent: Invent) -> None:
    comparison = Comparison([invent("good|er", lambda *_: 1.0), invent("bad", lambda *_: 0.0)])
    lines = tables.accuracy_grid(comparison).markdown().splitlines()
    assert lines[0] == "| length | model | qa1 | qa6 | mean |"
    assert lines[2] == "| 0k | good\\|er | **100★ [91–100]** | **100★ [91–100]** | **100★ [95–100]** |"
    assert lines[3] == "| 0k | bad | 0 [0–9] | 0 [0–9] | 0 [0–5] |"
    assert len(lines) == 2 + 2 * 3


def test_the_page_has_tests_sizes_both_rules_and_the_command(four_models: Comparison) -> None:
    page = markdown_page(EvaluationRun(four_models.results, "mnemon eval x"))
    for text in ("LM2 − plain", "100,000", "substring rule", "`mnemon eval x`", "p (Holm)", "Control, "):
        assert text in page


def test_lengths_say_their_samples_where_these_differ(invent: Invent) -> None:
    full = invent("a", lambda *_: 1.0, lengths=("0k", "1k"))
    cells = [c if c.length == "0k" else replace(c, predictions=c.predictions[:4]) for c in full.cells]
    settings = replace(full.settings, samples_at={"1k": 4})
    comparison = Comparison([replace(full, settings=settings, cells=tuple(cells))])
    lines = tables.accuracy_grid(comparison).markdown().splitlines()
    assert lines[0].startswith("| length (samples) | model |")
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["0k (40)", "1k (4)"]
    page = html_report(EvaluationRun(comparison.results, "x"), comparison, [])
    assert "40 per task and length (1k: 4), seed 0" in page
    assert "<td>1k (4)</td>" in page


def test_a_single_model_has_no_tests_and_no_best(invent: Invent) -> None:
    page = markdown_page(EvaluationRun((invent("alone", lambda *_: 0.5),), "mnemon eval x"))
    assert "Paired" not in page
    assert "★" not in page


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (0.00001, "< 0.0001"),
        (0.0012, "0.0012"),
        (0.032, "0.03"),
        (0.0496, "0.0496"),
        (0.0503, "0.0503"),
        (0.2, "0.20"),
        (1.0, "1.00"),
    ],
)
def test_p_values_have_as_many_digits_as_they_deserve(p: float, text: str) -> None:
    assert tables.p_text(p) == text


def test_every_figure_is_a_png_and_an_svg_of_some_size(four_models: Comparison) -> None:
    drawn = plots.all_plots(four_models)
    assert [plot.name for plot in drawn] == ["accuracy_over_length", "accuracy_by_task", "capabilities"]
    for plot in drawn:
        assert plot.png.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", plot.png[16:24])
        assert width > 800
        assert height > 500
        assert ElementTree.fromstring(plot.svg).tag.endswith("svg")
        assert len(plot.svg) > 10_000


def test_the_same_numbers_give_the_same_bytes(four_models: Comparison) -> None:
    first, second = plots.plot_accuracy_over_length(four_models), plots.plot_accuracy_over_length(four_models)
    assert first == second


def test_groups_without_a_task_are_left_out_and_few_groups_are_bars(invent: Invent) -> None:
    assert list(plots.capability_groups(["qa1", "qa6"])) == ["single-step\nreasoning", "basic\nqueries"]
    assert plots.capability_groups(["qa11"]) == {}
    tasks = ("qa1", "qa3", "qa4", "qa7", "qa10")
    five = Comparison([invent("a", lambda *_: 0.5, tasks=tasks)])
    two = Comparison([invent("a", lambda *_: 0.5)])
    assert plots.plot_capabilities(five).png != plots.plot_capabilities(two).png


def test_the_report_holds_everything_and_loads_nothing(four_models: Comparison) -> None:
    run = EvaluationRun(four_models.results, "mnemon eval <LM2>", {"processor": "Z80"}, "<context>\nMary")
    page = html_report(run, four_models, plots.all_plots(four_models))
    assert page.count("data:image/svg+xml;base64,") == 3
    for text in ("mnemon eval &lt;LM2&gt;", "Z80", "&lt;context&gt;", "Paired tests", "Limits", "LM2 (knocked out)"):
        assert text in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)


def test_labels_cannot_break_the_report(invent: Invent) -> None:
    comparison = Comparison([invent("<script>", lambda *_: 0.5), invent("b", lambda *_: 0.5)])
    page = html_report(EvaluationRun(comparison.results, ""), comparison, [])
    assert "<script>" not in page
