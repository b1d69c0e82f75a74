"""Write the made samples of the evaluation suites, `src/mnemon/data/suite_samples/`.

    python scripts/make_suite_samples.py

A few invented rows per task, in the columns of the real data sets and copied from none of them: enough to try a suite
out, and for the tests, without a network. The same bytes come out every time.
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "src" / "mnemon" / "data" / "suite_samples"
SUBJECTS = {
    "high_school_mathematics": "number",
    "college_mathematics": "product",
    "elementary_mathematics": "number",
    "philosophy": "opposite",
    "high_school_world_history": "order",
    "professional_law": "rule",
    "high_school_geography": "colour",
    "sociology": "opposite",
    "professional_medicine": "rule",
    "global_facts": "colour",
}
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple")
OPPOSITES = (
    ("hot", "cold"),
    ("high", "low"),
    ("early", "late"),
    ("loud", "quiet"),
    ("wide", "narrow"),
    ("full", "empty"),
)
NAMES = ("Ada", "Bruno", "Clara", "David", "Elena", "Felix", "Greta", "Hugo")
THINGS = ("lamp", "violin", "basket", "kettle", "ladder", "mirror", "anchor", "blanket")
PLACES = ("harbour", "mill", "library", "orchard", "station", "workshop", "cellar", "bakery")
TRADES = ("baker", "gardener", "tailor", "printer", "sailor", "weaver", "miller", "potter")
FILLER = (
    "The morning was grey and the road was wet.",
    "Nobody in the village remembered a colder spring.",
    "A cart went by, loaded with hay, and the dog barked at it.",
    "The river had risen in the night and carried branches past the bridge.",
    "Somebody had left a window open, and the curtain moved in the wind.",
    "It was the season in which the apples are sorted and packed.",
)


def write(task: str, split: str, rows: Iterable[dict[str, Any]]) -> None:
    """Write one split of a task."""
    path = FOLDER / task / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def text(rng: random.Random, sentences: int) -> str:
    """Return some sentences in which nothing is to be found."""
    return " ".join(rng.choice(FILLER) for _ in range(sentences))


def question(rng: random.Random, kind: str) -> tuple[str, list[str]]:
    """Return a question and four choices, the right one first."""
    if kind in ("number", "product"):
        a, b = rng.randint(2, 12), rng.randint(2, 12)
        right = a + b if kind == "number" else a * b
        return f"How much is {a} {'plus' if kind == 'number' else 'times'} {b}?", [
            str(right + step) for step in (0, 1, -1, 3)
        ]
    if kind == "opposite":
        word, other = rng.choice(OPPOSITES)
        wrong = rng.sample([pair[1] for pair in OPPOSITES if pair[1] != other], 3)
        return f"Which word means the opposite of {word}?", [other, *wrong]
    if kind == "order":
        first, second, third, fourth = rng.sample(NAMES, 4)
        return (
            f"{first} reigned before {second}, {second} before {third}, {third} before {fourth}. Who reigned last?",
            [fourth, first, second, third],
        )
    if kind == "rule":
        trade, *wrong = rng.sample(TRADES, 4)
        return f"Every guest but the {trade} has to sign the book. Who does not have to sign?", [
            f"The {name}" for name in (trade, *wrong)
        ]
    colour, *wrong = rng.sample(COLOURS, 4)
    return f"On this map the {rng.choice(PLACES)} is {colour}. Which colour does it have?", [colour, *wrong]


def mmlu(rng: random.Random, per_subject: int) -> list[dict[str, Any]]:
    """Return rows of MMLU, some of every subject above."""
    rows = []
    for subject, kind in SUBJECTS.items():
        for _ in range(per_subject):
            asked, choices = question(rng, kind)
            right = choices[0]
            rng.shuffle(choices)
            rows.append({"question": asked, "subject": subject, "choices": choices, "answer": choices.index(right)})
    return rows


def keyed(rng: random.Random, sentences: int, key: str, value: str) -> str:
    """Hide `Key: value.` in a text, which ends with the key once more."""
    before, after = text(rng, sentences), text(rng, sentences)
    return f"{before} {key.capitalize()}: {value}. {after} {key}:"


def recall(rng: random.Random) -> None:
    """Write the six recall tasks, with two rows that the protocol drops."""
    rows = [("device name", "Clearview lamp 4"), ("applicant", "Northfield Works"), ("grade", "B")]
    write("fda", "validation", ({"text": keyed(rng, 4, k, v), "key": k, "value": v} for k, v in rows))
    pages = [("director", "Elena Marsh"), ("opening hours", "9 to 5"), ("publisher", "Hillside Press")]
    write(
        "swde",
        "validation",
        (
            {
                "text": f"{keyed(rng, 3, k, v)[: -len(k) - 1].strip()} Summary of information above... {k}:",
                "key": k,
                "value": v,
            }
            for k, v in pages
        ),
    )
    squad, asked = [], []
    for name, thing, place in zip(NAMES[:3], THINGS, PLACES, strict=False):
        fact = f"{name} put the {thing} into the {place}."
        story = f"{text(rng, 3)} {fact} {text(rng, 2)}"
        squad.append({"text": f"{story} The {thing} was put into the", "value": place})
        asked.append(
            {"context": story, "question": f"The {thing} was put into the", "answers": [place, f"the {place}"]}
        )
    write("squad", "validation", squad)
    write("nq", "validation", asked)
    write("triviaqa", "validation", ({**row, "context": f"[DOC] [PAR] {row['context']}"} for row in asked))
    counts = []
    for name, number in zip(NAMES[:3], (14, 3, 27), strict=True):
        story = f"{text(rng, 2)} {name} sold {number} baskets on Monday. {text(rng, 2)}"
        counts.append({"context": story, "question": f"The number of baskets {name} sold is", "answers": [str(number)]})
    write("drop", "validation", counts)


def commonsense(rng: random.Random) -> None:
    """Write the seven tasks of language modelling and commonsense."""
    write("wikitext", "test", ({"page": f" = Page {n} = \n\n {text(rng, 8)} \n"} for n in range(3)))
    names = NAMES[:4]
    write(
        "lambada",
        "test",
        (
            {"text": f"{text(rng, 2)} {name} locked the {place} and left, and the key went with {name}"}
            for name, place in zip(names, PLACES, strict=False)
        ),
    )
    for task in ("arc_easy", "arc_challenge"):
        rows = []
        for kind in ("number", "opposite", "order", "colour"):
            asked, choices = question(rng, kind)
            right = choices[0]
            rng.shuffle(choices)
            rows.append(
                {
                    "question": asked,
                    "choices": {"text": choices, "label": ["A", "B", "C", "D"]},
                    "answerKey": "ABCD"[choices.index(right)],
                }
            )
        write(task, "test", rows)
        write(task, "train", rows[::-1])
    rows = []
    for name, thing in zip(names, THINGS, strict=False):
        endings = [
            "puts it on the table and wipes it with a cloth.",
            "sings until the roof has gone to sleep.",
            f"is eaten by the {thing}.",
            "paints the sea with its own water.",
        ]
        right = endings[0]
        rng.shuffle(endings)
        rows.append(
            {
                "activity_label": "Cleaning",
                "ctx_a": f"{name} takes the dusty {thing} from the shelf.",
                "ctx_b": name,
                "endings": endings,
                "label": str(endings.index(right)),
            }
        )
    write("hellaswag", "validation", rows)
    goals = [
        ("keep bread fresh", "put it into a box with a lid", "put it into a bucket of water", 0),
        ("dry a wet coat", "fold it into a drawer", "hang it near the stove", 1),
        ("light a dark cellar", "take a lamp along", "take a pillow along", 0),
        ("reach a high shelf", "stand on a carpet", "stand on a ladder", 1),
    ]
    write(
        "piqa", "validation", ({"goal": f"To {g},", "sol1": a, "sol2": b, "label": right} for g, a, b, right in goals)
    )
    sentences = [
        ("Hugo lent Felix a lamp because _ had lost his own.", "Hugo", "Felix", "2"),
        ("Hugo lent Felix a lamp because _ had two of them.", "Hugo", "Felix", "1"),
        ("Greta asked Clara for the way because _ was a stranger here.", "Greta", "Clara", "1"),
        ("Greta asked Clara for the way because _ had lived here for years.", "Greta", "Clara", "2"),
    ]
    write(
        "winogrande",
        "validation",
        ({"sentence": s, "option1": a, "option2": b, "answer": right} for s, a, b, right in sentences),
    )


def longbench(rng: random.Random) -> None:
    """Write all tasks of LongBench, with texts that are short."""
    english = ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa")
    for task in english:
        rows = []
        for name, place in zip(NAMES[:2], rng.sample(PLACES, 2), strict=True):
            story = f"{text(rng, 6)} {name} waited at the {place}. {text(rng, 6)}"
            rows.append({"question": f"Where did {name} wait?", "context": story, "answers": [f"At the {place}"]})
        write(f"longbench_{task}", "test", rows)
    for task in ("gov_report", "qmsum", "multi_news", "samsum"):
        rows = [
            {"question": "What happened?", "context": f"{text(rng, 8)} The bridge was closed.", "answers": [answer]}
            for answer in ("The bridge was closed after the river rose.", "The river rose and the bridge was closed.")
        ]
        write(f"longbench_{task}", "test", rows)
    chinese = ("multifieldqa_zh", "dureader", "vcsum")
    for task in chinese:
        rows = [
            {"question": "灯在哪里？", "context": f"早上下雨了。灯在{place}。河水很高。", "answers": [f"灯在{place}"]}
            for place in ("厨房", "花园")
        ]
        write(f"longbench_{task}", "test", rows)
    kinds = ["Number", "Place", "Person"]
    for task, wanted in (("trec", "Place"), ("lsht", "Number")):
        rows = [
            {
                "question": f"Question: where is the {thing}?\nType:",
                "context": "Question: who came?\nType: Person\nQuestion: how many came?\nType: Number",
                "answers": [wanted],
                "all_classes": kinds,
            }
            for thing in THINGS[:2]
        ]
        write(f"longbench_{task}", "test", rows)
    rows = [
        {
            "question": "",
            "context": " ".join(f"Paragraph {n + 1}: {FILLER[n % k]}" for n in range(4)),
            "answers": [str(k)],
        }
        for k in (2, 3)
    ]
    write("longbench_passage_count", "test", rows)
    for task, word, answer in (
        ("passage_retrieval_en", "Paragraph", "Paragraph 2"),
        ("passage_retrieval_zh", "段落", "段落2"),
    ):
        context = " ".join(f"{word}{'' if word == '段落' else ' '}{n + 1}: {FILLER[n]}" for n in range(3))
        rows = [{"question": f"{FILLER[1]}{end}", "context": context, "answers": [answer]} for end in ("", " Which?")]
        write(f"longbench_{task}", "test", rows)
    for task, asked in (("lcc", ""), ("repobench-p", "def total(prices):\n")):
        rows = [
            {
                "question": asked,
                "context": f"def double(x):\n    return 2 * x\n\n\ndef {name}(prices):\n",
                "answers": ["    return sum(prices)"],
            }
            for name in ("total", "bill")
        ]
        write(f"longbench_{task}", "test", rows)


def main() -> None:
    """Write everything."""
    rng = random.Random(20260101)
    write("mmlu", "dev", mmlu(rng, 5))
    write("mmlu", "test", mmlu(rng, 2))
    recall(rng)
    commonsense(rng)
    longbench(rng)


if __name__ == "__main__":
    main()
