"""Tasks of the harness over rows that are there already: its prompts and scores, no data set of its own choosing."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.tasks
import lm_eval.utils
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from mnemon.errors import BackendUnavailable, ConfigError, DataError
from mnemon.evaluation.harness import recall
from mnemon.evaluation.harness.catalogue import Suite, TaskEntry
from mnemon.evaluation.harness.data import DataSource, Rows

_DEFINITIONS = Path(lm_eval.tasks.__file__).parent
_FEWSHOT_SEED = 1234
_SPLITS = ("training_split", "validation_split", "test_split")


@dataclass(frozen=True)
class TaskOptions:
    """How the tasks of a suite are measured.

    Attributes:
        limit: most samples per task; None = all.
        num_fewshot: examples before a question; None = the task's own number.
        context_length: most tokens of a prompt with its answer; None = what the model reads.
        answer_length: most new tokens of the recall tasks.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    context_length: int | None = None
    answer_length: int | None = None


@dataclass(frozen=True)
class PreparedTask:
    """A task of the harness, and what was left out on the way.

    Attributes:
        numbers: for every document of the task its number in the data.
    """

    entry: TaskEntry
    task: Any
    numbers: tuple[int, ...]
    num_fewshot: int
    num_dropped: int = 0
    num_cut: int = 0
    num_not_found: int = 0

    def documents(self) -> list[dict[str, Any]]:
        """Return the documents to be measured, in order."""
        return [dict(document) for document in self.task.task_docs]


def prepare(suite: Suite, entry: TaskEntry, source: DataSource, options: TaskOptions, tokenizer: Any) -> PreparedTask:
    """Build one task over the rows of a source.

    Args:
        suite: the suite, for what its tasks have in common.
        entry: the task.
        source: of the rows.
        options: how it is measured.
        tokenizer: of the model; decides where texts of the recall suite are cut.

    Raises:
        DataError: rows are missing or malformed, or there are fewer than the examples asked for.
        ConfigError: an option does not fit the task.
        BackendUnavailable: the hub, or a package that this task's score needs, is not there.
    """
    rows = source.rows(entry, entry.split)
    shots = entry.num_fewshot if options.num_fewshot is None else options.num_fewshot
    if entry.definition is None:
        return _recall_task(suite, entry, rows, options, tokenizer)
    rows = rows[: options.limit]
    splits = {entry.split: columns_of(entry, rows)}
    if entry.fewshot_split is None:
        shots = 0
    elif shots:
        examples = source.rows(entry, entry.fewshot_split)
        if len(examples) < shots:
            raise DataError(
                f"{entry.name}: expected at least {shots} rows in the split {entry.fewshot_split!r} for the examples, "
                f"got {len(examples)}; give a smaller --num-fewshot"
            )
        splits[entry.fewshot_split] = columns_of(entry, examples)
    overrides: dict[str, Any] = dict.fromkeys(_SPLITS)
    overrides["test_split"] = entry.split
    overrides["fewshot_split"] = entry.fewshot_split if shots else None
    overrides["num_fewshot"] = shots
    overrides["custom_dataset"] = _dataset_maker(splits)
    with at_work():
        task = _harness_task(entry, overrides)
        task.set_fewshot_seed(_FEWSHOT_SEED)
        # The harness processes all documents again whenever it asks for them.
        task.dataset[entry.split] = task.task_docs
        task.set_config("process_docs", None)
    return PreparedTask(entry, task, tuple(range(len(rows))), shots)


def _harness_task(entry: TaskEntry, overrides: dict[str, Any]) -> Any:
    assert entry.definition is not None
    folder, name = entry.definition
    manager = _definitions(folder)
    if name not in manager.all_subtasks:
        raise BackendUnavailable(f"this version of lm_eval has no task {name!r}; install one from 'mnemon[eval]'")
    group = {"group": "mnemon", "task": [{"task": name, **overrides}]}
    try:
        return manager.load([group])["tasks"][name]
    except ImportError as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        raise BackendUnavailable(f"{entry.name}: {first.strip()}; pip install 'mnemon[eval]'") from error


@cache
def _definitions(folder: str) -> Any:
    """Read the harness's definitions in one folder of its tasks; reading all of them takes many seconds."""
    return TaskManager(include_path=str(_DEFINITIONS / folder), include_defaults=False)


def _recall_task(suite: Suite, entry: TaskEntry, rows: Rows, options: TaskOptions, tokenizer: Any) -> PreparedTask:
    context = options.context_length or suite.context_length
    answer = options.answer_length or suite.answer_length
    assert context is not None
    assert answer is not None
    cut = recall.cut_documents(
        entry.name, rows, tokenizer, context_length=context, answer_length=answer, limit=options.limit
    )
    if not cut.documents:
        raise DataError(
            f"{entry.name}: none of {len(rows)} rows is measured (key and value must exceed one character); give others"
        )
    config = {
        "task": entry.name,
        "custom_dataset": _dataset_maker({entry.split: list(cut.documents)}),
        "test_split": entry.split,
        "doc_to_text": partial(recall.prompt, entry.name),
        "doc_to_target": _first_gold,
        "process_results": _mark_recall,
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": answer, "do_sample": False},
        "metric_list": [{"metric": "contains", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
        "metadata": {"version": 1},
    }
    with at_work():
        task = ConfigurableTask(config=config)
    numbers = tuple(int(document["number"]) for document in cut.documents)
    return PreparedTask(entry, task, numbers, 0, cut.num_dropped, cut.num_cut, cut.num_not_found)


def _first_gold(document: dict[str, Any]) -> str:
    return str(document["golds"][0])


def _mark_recall(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"contains": recall.contains(results[0], document["golds"])}


def columns_of(entry: TaskEntry, rows: Rows) -> Rows:
    """Keep the columns that the task reads: others may change their type from row to row."""
    return [{name: row[name] for name in entry.columns} for row in rows]


def _dataset_maker(splits: dict[str, Rows]) -> Callable[..., Any]:
    # A function, not a `partial`: the harness copies and prints its configuration, data and all.
    def make(**_: Any) -> Any:
        return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})

    return make


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """Keep the harness quiet, and quick: it has no switch for its bars, and compiles a template for every document."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "jieba", "datasets")]
    levels = [logger.level for logger in loggers]
    bar, compile_template = lm_eval.api.task.tqdm, lm_eval.utils.env.from_string
    had_bars = datasets.utils.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)
    lm_eval.utils.env.from_string = cache(compile_template)
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"fuzzywuzzy|jieba")  # which LongBench's scores are made with
            yield
    finally:
        lm_eval.api.task.tqdm = bar
        lm_eval.utils.env.from_string = compile_template
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


def check_options(suite: Suite, options: TaskOptions) -> None:
    """Refuse numbers out of range, and examples where no task has any.

    Raises:
        ConfigError: with the reason.
    """
    for name, least in (("limit", 1), ("num_fewshot", 0), ("context_length", 1), ("answer_length", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if options.num_fewshot and not any(entry.fewshot_split for entry in suite.tasks):
        raise ConfigError(f"the suite {suite.name} has no examples to show; leave out --num-fewshot")
