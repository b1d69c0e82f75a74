"""Files that come in are checked line by line; files that go out are read back, and damaged ones refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnemon.errors import BackendUnavailable, ConfigError, DataError
from mnemon.evaluation.harness import access
from mnemon.evaluation.harness.catalogue import LONGBENCH_GROUPS, SUITES
from mnemon.evaluation.harness.data import DataSource, MissingData, check_folder_option, read_rows
from mnemon.evaluation.harness.published import PUBLISHED
from mnemon.evaluation.harness.records import HarnessSample, estimate, sample_from_dict
from mnemon.evaluation.harness.subjects import FIELDS, LEVELS, MMLU_SUBJECTS
from mnemon.evaluation.sample_scores import read_samples, sample_lines
from mnemon.metrics.intervals import bootstrap_ratio

ARC = {"question": "How much?", "choices": {"text": ["one", "two"], "label": ["A", "B"]}, "answerKey": "A"}


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "line 2: expected a JSON object, got list"),
        ('{"a": NaN}', "line 2: expected finite numbers, got NaN"),
        ('{"a": [1e999]}', "line 2: expected finite numbers, got 1e999"),
        ("{}", "line 2: expected the column 'question' (text), got none"),
        (json.dumps(ARC | {"question": " "}), "line 2: expected text in the column 'question'"),
        (
            json.dumps(ARC | {"choices": {"text": ["one"], "label": []}}),
            "expected labelled texts in the column 'choices'",
        ),
        (json.dumps(ARC | {"answerKey": "C"}), "the answerKey 'C' is not among the labels"),
    ],
)
def test_a_malformed_line_is_refused_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "arc_easy" / "test.jsonl", json.dumps(ARC), line)
    entry = SUITES["commonsense"].entries(["arc_easy"])[0]
    with pytest.raises(DataError) as caught:
        DataSource.parse(str(tmp_path)).rows(entry, "test")
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_subject_is_named(tmp_path: Path) -> None:
    source = DataSource.parse(str(tmp_path))
    with pytest.raises(MissingData, match=r"fda/validation\.jsonl: no such file"):
        source.rows(SUITES["recall"].tasks[0], "validation")
    row = {"question": "Which?", "subject": "virology", "choices": list("abcd"), "answer": 1}
    write(tmp_path / "mmlu" / "test.jsonl", json.dumps(row))
    with pytest.raises(MissingData, match="no row with the subject 'anatomy'"):
        source.rows(SUITES["mmlu"].entries(["anatomy"])[0], "test")
    assert source.rows(SUITES["mmlu"].entries(["virology"])[0], "test") == [row]
    with pytest.raises(MissingData, match="nowhere: no such folder"):
        DataSource.parse("nowhere")
    line = {"ctx_a": "a", "ctx_b": "", "activity_label": "x", "endings": ["a", "b"], "label": "2"}
    path = write(tmp_path / "h.jsonl", json.dumps(line))
    with pytest.raises(DataError, match="label 2 names no ending"):
        read_rows(path, SUITES["commonsense"].entries(["hellaswag"])[0].columns)
    with pytest.raises(ConfigError, match="takes one folder"):
        check_folder_option([Path("a"), Path("b")])


def test_the_hub_is_not_asked_when_it_must_not_be() -> None:
    with pytest.raises(BackendUnavailable, match="HF_HUB_OFFLINE=1; give --data DIR"):
        DataSource.parse(None).rows(SUITES["recall"].tasks[0], "validation")


def test_on_the_hub_the_set_its_configuration_and_the_split_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []
    rows = [{"page": "A page.", "other": 1}]

    def load(name: str, configuration: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((name, configuration, split))
        if not rows:
            raise ConnectionError("no route\nto the hub")
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    source, entry = DataSource.parse(None), SUITES["commonsense"].entries(["wikitext"])[0]
    assert source.rows(entry, "test") == source.rows(entry, "test") == rows
    assert asked == [("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test")], "asked once"
    with pytest.raises(DataError, match="expected the column 'text', got page, other"):
        source.rows(SUITES["commonsense"].entries(["lambada"])[0], "test")
    rows.clear()
    with pytest.raises(BackendUnavailable, match=r"cannot load allenai/ai2_arc from the hub \(no route\); give --data"):
        source.rows(SUITES["commonsense"].entries(["arc_easy"])[0], "test")


def test_without_the_extra_the_command_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    access.require_harness()
    monkeypatch.setattr(access.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'mnemon\[eval\]'"):
        access.require_harness()


def test_every_suite_comes_with_made_samples() -> None:
    source = DataSource.parse("sample")
    for suite in SUITES.values():
        assert source.available(suite) == [entry.name for entry in suite.tasks]
        for entry in suite.tasks:
            if entry.subject is None:
                assert source.rows(entry, entry.split)
    subjects = source.subjects(SUITES["mmlu"].tasks[0])
    for group in (*FIELDS.values(), *LEVELS.values()):
        assert set(subjects) & set(group), "a group without a question"


def test_the_made_samples_are_what_their_script_writes(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    location = importlib.util.spec_from_file_location(
        "samples_script", repository / "scripts" / "make_suite_samples.py"
    )
    assert location is not None
    assert location.loader is not None
    script = importlib.util.module_from_spec(location)
    location.loader.exec_module(script)
    shipped = script.FOLDER
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    script.main()
    written = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.jsonl")}
    assert written == {path.relative_to(shipped): path.read_text() for path in shipped.rglob("*.jsonl")}


def test_a_wrong_task_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown task 'anatomie' of the suite mmlu; did you mean 'anatomy'"):
        SUITES["mmlu"].entries(["anatomie"])
    with pytest.raises(ConfigError, match="no task given"):
        SUITES["recall"].entries([])


def test_the_subjects_are_grouped_as_the_harness_groups_them() -> None:
    import lm_eval.tasks
    import yaml

    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    tags = dict(zip(FIELDS, ("stem", "humanities", "social_sciences", "other"), strict=True))
    for name, subjects in FIELDS.items():
        for subject in subjects:
            assert yaml.safe_load((folder / f"mmlu_{subject}.yaml").read_text())["tag"] == f"mmlu_{tags[name]}_tasks"
    assert len(MMLU_SUBJECTS) == len(set(MMLU_SUBJECTS)) == 57
    assert sorted(subject for subjects in LEVELS.values() for subject in subjects) == list(MMLU_SUBJECTS)


def test_the_groups_of_longbench_are_those_of_the_harness() -> None:
    import lm_eval.tasks
    import yaml

    folder = Path(lm_eval.tasks.__file__).parent / "longbench"
    files = ("single", "multi", "summarization", "fewshot", "synthetic", "code")
    for name, tasks in zip(files, LONGBENCH_GROUPS.values(), strict=True):
        group = yaml.safe_load((folder / f"_longbench_{name}.yaml").read_text())["task"]
        assert sorted(group) == sorted(f"longbench_{task}" for task in tasks)


@pytest.mark.parametrize("suite", ["recall", "commonsense"])
def test_published_averages_are_those_of_their_columns(suite: str) -> None:
    for row in PUBLISHED[suite]:
        parts = [
            value for name, value in row.values.items() if name not in ("Average", "wikitext", "lambada perplexity")
        ]
        assert len(parts) == 6
        assert sum(parts) / 6 == pytest.approx(row.values["Average"], abs=0.02), row


def test_estimates_are_the_means_and_intervals_of_their_kind() -> None:
    right = estimate("accuracy", [[1], [0], [1], [1]])
    assert right.value == 0.75
    assert right.low is not None
    assert right.high is not None
    assert 0 < right.low < 0.75 < right.high < 1
    assert right.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert estimate("perplexity", [[-1.0], [-3.0]]).value == pytest.approx(math.exp(2))
    assert estimate("word_perplexity", [[-10.0, 5], [-2.0, 1]]).value == pytest.approx(math.exp(2))
    for kind in ("score", "perplexity", "word_perplexity"):
        assert estimate(kind, [[-1.0, 2.0]]).low is None, "one sample has no interval"
    assert math.isfinite(estimate("perplexity", [[-1e6], [-1e6]]).value)


def test_the_bootstrap_of_a_ratio_is_that_of_a_mean_for_equal_denominators() -> None:
    values = np.array([1.0, 4.0, 2.0, 8.0])
    found = bootstrap_ratio(values, np.full(4, 2.0))
    assert found.mean == values.mean() / 2
    assert found.low < found.mean < found.high
    exact = bootstrap_ratio(2 * values, values)
    assert (exact.low, exact.mean, exact.high) == (2.0, 2.0, 2.0)
    for wrong in (values[:1], values[:3]):
        with pytest.raises(ConfigError, match="at least two units"):
            bootstrap_ratio(wrong, values[:1])


SAMPLE = HarnessSample("LM2", "recall", "fda", "fda-00001", 1.0, "contains", "ab", {"contains": [1.0]}, "a lämp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": math.nan}, "line 2: expected finite numbers, got NaN"),
        ({"score": "good"}, "line 2: expected a number under 'score', got 'good'"),
        ({"score": True}, "expected a number under 'score'"),
        ({"mark": 1}, "line 2: unknown field 'mark'"),
        ({"task": None, "id": None}, "line 2: a field is missing"),
        ({}, "line 2: the sample fda-00001 of LM2 stands there a second time"),
    ],
)
def test_damaged_sample_lines_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(sample_lines([SAMPLE]))
    assert read_samples(path, sample_from_dict) == (SAMPLE,)
    value = json.loads(sample_lines([SAMPLE])) | change
    value = {name: item for name, item in value.items() if item is not None}
    path.write_text(sample_lines([SAMPLE]) + json.dumps(value) + "\n")
    with pytest.raises(DataError) as caught:
        read_samples(path, sample_from_dict)
    assert message in str(caught.value)


def test_nan_is_never_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        sample_lines([replace(SAMPLE, score=math.nan)])
