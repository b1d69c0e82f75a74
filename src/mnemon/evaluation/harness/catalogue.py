"""The suites and their tasks: where their data lies, which columns it has, which of their numbers counts.

Nothing is imported from the harness here, so that a wrong name is refused before anything heavy is loaded.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from mnemon.errors import ConfigError
from mnemon.evaluation.harness.subjects import MMLU_SUBJECTS

Kind = str
"""How a metric is averaged: `accuracy`, `score`, `perplexity` or `word_perplexity`."""


@dataclass(frozen=True)
class TaskEntry:
    """One task of a suite.

    Attributes:
        name: its name here, in `--tasks` and in result files.
        data: folder of its files under `--data`.
        split: split that is measured.
        fewshot_split: split that examples come from; None where the task has no examples.
        columns: columns of its data and the kind of each (see `mnemon.evaluation.harness.data`).
        hub: data set on the hub, and its configuration.
        metrics: (name in the harness, kind of average), the one that counts first.
        definition: the harness's definition: folder under its tasks, and task name; None where the task is ours.
        subject: rows of the data that belong to it, by their column `subject`; None for all rows.
        num_fewshot: examples before a question unless another number is asked for.
    """

    name: str
    data: str
    split: str
    columns: dict[str, str]
    hub: tuple[str, str | None]
    metrics: tuple[tuple[str, Kind], ...]
    definition: tuple[str, str] | None = None
    fewshot_split: str | None = None
    subject: str | None = None
    num_fewshot: int = 0


@dataclass(frozen=True)
class Suite:
    """A suite: its tasks, and how it is measured unless told otherwise.

    Attributes:
        context_length: most tokens of a prompt with its answer; None for what the model reads.
        answer_length: most new tokens, where the suite and not the task decides.
    """

    name: str
    title: str
    tasks: tuple[TaskEntry, ...]
    context_length: int | None = None
    answer_length: int | None = None

    def entries(self, names: Sequence[str] | None) -> tuple[TaskEntry, ...]:
        """Return the named tasks in the suite's order, all of them without names.

        Raises:
            ConfigError: a name is unknown (the nearest is suggested), or there is none.
        """
        if names is None:
            return self.tasks
        known = [entry.name for entry in self.tasks]
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"expected some of {', '.join(known)}"
                raise ConfigError(f"unknown task {name!r} of the suite {self.name}; {hint}")
        if not names:
            raise ConfigError(f"no task given; expected some of {', '.join(known)}")
        return tuple(entry for entry in self.tasks if entry.name in names)


_ACCURACY = (("acc", "accuracy"),)
_NORMALISED = (("acc_norm", "accuracy"), ("acc", "accuracy"))


def _mmlu() -> Suite:
    columns = {"question": "text", "choices": "four texts", "answer": "0 to 3", "subject": "text"}
    tasks = tuple(
        TaskEntry(
            name=subject,
            data="mmlu",
            split="test",
            fewshot_split="dev",
            columns=columns,
            hub=("cais/mmlu", "all"),
            metrics=_ACCURACY,
            definition=("mmlu/default", f"mmlu_{subject}"),
            subject=subject,
            num_fewshot=5,
        )
        for subject in MMLU_SUBJECTS
    )
    return Suite("mmlu", "MMLU: questions answered rightly, in percent", tasks)


def _recall() -> Suite:
    value = {"value": "text or texts or nothing"}  # an empty one is dropped by the protocol, and no fault of the file
    keyed = {"text": "text", "key": "text or nothing", **value}
    asked = {"context": "text", "question": "text", "answers": "texts or nothing"}
    hubs = {
        "fda": ("hazyresearch/based-fda", "default"),
        "swde": ("hazyresearch/based-swde-v2", "default"),
        "squad": ("hazyresearch/based-squad", "default"),
        "nq": ("hazyresearch/based_nq_2048", None),
        "triviaqa": ("hazyresearch/based_triviaqa", None),
        "drop": ("hazyresearch/based_drop", None),
    }
    columns = {"fda": keyed, "swde": keyed, "squad": {"text": "text", **value}}
    tasks = tuple(
        TaskEntry(name, name, "validation", columns.get(name, asked), hub, (("contains", "accuracy"),))
        for name, hub in hubs.items()
    )
    title = "Recall-intensive tasks: answers that contain the right text, in percent"
    return Suite("recall", title, tasks, context_length=2048, answer_length=48)


def _commonsense() -> Suite:
    arc = {"question": "text", "choices": "labelled texts", "answerKey": "text"}
    hellaswag = {"ctx_a": "text", "ctx_b": "text or nothing", "activity_label": "text", "endings": "texts"}
    winogrande = {"sentence": "text with _", "option1": "text", "option2": "text", "answer": "1 or 2"}
    lambada_metrics = (("acc", "accuracy"), ("perplexity", "perplexity"))
    word_perplexity = (("word_perplexity", "word_perplexity"),)
    tasks = (
        TaskEntry(
            "wikitext",
            "wikitext",
            "test",
            {"page": "text"},
            ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"),
            word_perplexity,
            ("wikitext", "wikitext"),
        ),
        TaskEntry(
            "lambada",
            "lambada",
            "test",
            {"text": "text"},
            ("cimec/lambada", None),
            lambada_metrics,
            ("lambada", "lambada_standard"),
        ),
        TaskEntry(
            "arc_easy",
            "arc_easy",
            "test",
            arc,
            ("allenai/ai2_arc", "ARC-Easy"),
            _ACCURACY,
            ("arc", "arc_easy"),
            "train",
        ),
        TaskEntry(
            "arc_challenge",
            "arc_challenge",
            "test",
            arc,
            ("allenai/ai2_arc", "ARC-Challenge"),
            _NORMALISED,
            ("arc", "arc_challenge"),
            "train",
        ),
        TaskEntry(
            "hellaswag",
            "hellaswag",
            "validation",
            hellaswag | {"label": "number as text"},
            ("Rowan/hellaswag", None),
            _NORMALISED,
            ("hellaswag", "hellaswag"),
            "train",
        ),
        TaskEntry(
            "piqa",
            "piqa",
            "validation",
            {"goal": "text", "sol1": "text", "sol2": "text", "label": "0 or 1"},
            ("baber/piqa", None),
            _ACCURACY,
            ("piqa", "piqa"),
            "train",
        ),
        TaskEntry(
            "winogrande",
            "winogrande",
            "validation",
            winogrande,
            ("allenai/winogrande", "winogrande_xl"),
            _ACCURACY,
            ("winogrande", "winogrande"),
            "train",
        ),
    )
    return Suite("commonsense", "Language modelling and commonsense", tasks, context_length=2048)


LONGBENCH_GROUPS: dict[str, tuple[str, ...]] = {
    "single document": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "several documents": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "summarization": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "few-shot": ("trec", "triviaqa", "samsum", "lsht"),
    "synthetic": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "code": ("lcc", "repobench-p"),
}
"""LongBench's six groups of tasks."""


def _longbench() -> Suite:
    columns = {"question": "text or nothing", "context": "text", "answers": "texts"}
    classes = columns | {"all_classes": "texts"}
    tasks = tuple(
        TaskEntry(
            name,
            f"longbench_{name}",
            "test",
            classes if name in ("trec", "lsht") else columns,
            ("Xnhyacinth/LongBench", name),
            (("score", "score"),),
            ("longbench", f"longbench_{name}"),
        )
        for names in LONGBENCH_GROUPS.values()
        for name in names
    )
    return Suite("longbench", "LongBench: the benchmark's scores, times 100", tasks)


SUITES: dict[str, Suite] = {suite.name: suite for suite in (_mmlu(), _recall(), _commonsense(), _longbench())}
"""The suites that are measured through the harness, by name."""
