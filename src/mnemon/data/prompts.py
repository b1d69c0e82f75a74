"""The prompt layout of BABILong: instruction, solved examples, answer form, text, question.

Source: "BABILong: Testing the Limits of LLMs with Long Context Reasoning-in-a-Haystack", arXiv 2406.10149. The layout
is that of the benchmark, the wording is our own.
"""

from __future__ import annotations

from dataclasses import dataclass

from mnemon.data.babi.story import check_task


@dataclass(frozen=True)
class TaskPrompt:
    """What is said about one task: what is hidden, how to answer, and examples as (facts and question, answer)."""

    instruction: str
    post_prompt: str
    examples: tuple[tuple[str, str], ...]


def build_prompt(
    task: str, context: str, question: str, *, instruction: bool = True, examples: bool = True, post_prompt: bool = True
) -> str:
    """Return the prompt for one sample.

    With everything switched on, the prompt of qa1 looks like this (instruction and text shortened)::

        Facts about where persons are ... Answer the question from these facts alone. ...

        <example>
        John went to the garden. Mary moved to the office. Where is John?
        Answer: The most recent location of John is garden
        </example>

        Answer with one sentence of this form: The most recent location of PERSON is LOCATION

        <context>
        ... Mary moved to the bathroom. ...
        </context>

        Question: Where is Mary?

    Args:
        task: `"qa1"` ... `"qa20"`.
        context: the text with the hidden facts.
        question: the question.
        instruction: whether to begin with the task's instruction.
        examples: whether to show solved examples.
        post_prompt: whether to say in which form to answer.

    Returns:
        The parts that are switched on, a blank line between them.

    Raises:
        ConfigError: the task is unknown; the message suggests the nearest names.
    """
    prompt = TASK_PROMPTS[check_task(task)]
    parts = []
    if instruction:
        parts.append(f"{prompt.instruction} {_GROUND_RULE}")
    if examples:
        parts += [f"<example>\n{asked}\nAnswer: {answer}\n</example>" for asked, answer in prompt.examples]
    if post_prompt:
        parts.append(prompt.post_prompt)
    parts += [f"<context>\n{context}\n</context>", f"Question: {question}"]
    return "\n\n".join(parts).strip()


_GROUND_RULE = "The facts are hidden in unrelated text. Answer the question from these facts alone."
_LATEST = "Persons move: where a person is follows from the latest fact about it."
_CARRIED = "An object that somebody carries moves along with its holder; one that was put down stays where it is."
_YES_NO = "Answer with one word: yes or no"
_ONE_PLACE = "Answer with one word, the name of the place."

TASK_PROMPTS: dict[str, TaskPrompt] = {
    "qa1": TaskPrompt(
        f"You get facts about the positions of persons. {_LATEST}",
        "Answer with one sentence of this form: The most recent location of PERSON is LOCATION",
        (
            (
                "John went to the garden. Mary moved to the office. Where is John?",
                "The most recent location of John is garden",
            ),
            (
                "Sandra went to the kitchen. Daniel moved to the hallway. Sandra moved to the office. Where is Sandra?",
                "The most recent location of Sandra is office",
            ),
        ),
    ),
    "qa2": TaskPrompt(
        f"You get facts about the positions and actions of persons. {_CARRIED}",
        "Answer with one sentence of this form: The ITEM is in LOCATION",
        (
            ("Mary got the milk there. Mary went to the garden. Where is the milk?", "The milk is in garden"),
            (
                "John moved to the office. John took the apple there. John dropped the apple. John went to the garden. "
                "Where is the apple?",
                "The apple is in office",
            ),
        ),
    ),
    "qa3": TaskPrompt(
        f"You get facts about the positions and actions of persons. {_CARRIED} You are asked where an object was just "
        "before it was brought to a place.",
        "Answer with one sentence of this form: Before the LOCATION1 the ITEM was in the LOCATION2",
        (
            (
                "Mary took the milk. Mary went to the garden. Mary moved to the office. Where was the milk before the "
                "office?",
                "Before the office the milk was in the garden",
            ),
            (
                "John got the football. John went to the hallway. John travelled to the kitchen. John went to the "
                "bedroom. John left the football. Where was the football before the kitchen?",
                "Before the kitchen the football was in the hallway",
            ),
        ),
    ),
    "qa4": TaskPrompt(
        "You get facts about how places lie to each other on the compass.",
        _ONE_PLACE,
        (
            (
                "The office is north of the kitchen. The garden is south of the kitchen. What is north of the kitchen?",
                "office",
            ),
            (
                "The bedroom is west of the hallway. The garden is east of the hallway. What is the hallway west of?",
                "garden",
            ),
        ),
    ),
    "qa5": TaskPrompt(
        "You get facts about persons who move and hand objects to each other. If a question fits several facts, the "
        "latest one counts.",
        "Answer with one word, the name of a person or of an object.",
        (
            ("Mary gave the milk to Bill. Who gave the milk?", "Mary"),
            ("Fred passed the apple to Jeff. Jeff handed the apple to Mary. What did Jeff give to Mary?", "apple"),
        ),
    ),
    "qa6": TaskPrompt(
        f"You get facts about the positions and actions of persons. {_LATEST}",
        _YES_NO,
        (
            ("John went to the garden. John got the apple there. Is John in the garden?", "yes"),
            ("Mary moved to the office. Mary went back to the kitchen. Is Mary in the office?", "no"),
        ),
    ),
    "qa7": TaskPrompt(
        "You get facts about persons who pick up, put down and hand over objects. Count what a person holds.",
        "Answer with one word: none, one, two or three",
        (
            ("Mary got the milk there. Mary took the apple there. How many objects is Mary carrying?", "two"),
            ("John grabbed the football there. John dropped the football. How many objects is John carrying?", "none"),
        ),
    ),
    "qa8": TaskPrompt(
        "You get facts about persons who pick up and put down objects. Tell what a person holds at the end.",
        "Answer with nothing, the name of one object, or the names of several objects separated by a comma.",
        (
            ("Mary got the milk there. Mary took the apple there. What is Mary carrying?", "milk,apple"),
            ("John grabbed the football there. John dropped the football. What is John carrying?", "nothing"),
        ),
    ),
    "qa9": TaskPrompt(
        f"You get facts about where persons are and where they are not. {_LATEST}",
        _YES_NO,
        (
            ("John is in the garden. Is John in the garden?", "yes"),
            ("Mary went to the office. Mary is no longer in the office. Is Mary in the office?", "no"),
        ),
    ),
    "qa10": TaskPrompt(
        "You get facts about where persons are; some facts name two possible places. Only the latest fact about a "
        "person counts. Where it leaves two places open, a question about one of them cannot be decided.",
        "Answer with one word: yes, no or maybe",
        (
            ("Bill is in the park. Is Bill in the office?", "no"),
            ("Julie is either in the school or the cinema. Is Julie in the school?", "maybe"),
            ("Fred went to the kitchen. Is Fred in the kitchen?", "yes"),
        ),
    ),
    "qa11": TaskPrompt(
        f"You get facts about the positions of persons. He and she stand for the person named before. {_LATEST}",
        _ONE_PLACE,
        (
            ("Mary went to the garden. Then she moved to the office. Where is Mary?", "office"),
            ("John moved to the kitchen. Following that he went to the hallway. Where is John?", "hallway"),
        ),
    ),
    "qa12": TaskPrompt(
        f"You get facts about the positions of persons; a fact may name two of them. {_LATEST}",
        _ONE_PLACE,
        (
            ("Mary and John went to the garden. Where is John?", "garden"),
            ("Daniel and Sandra moved to the office. Sandra and Mary went to the kitchen. Where is Daniel?", "office"),
        ),
    ),
    "qa13": TaskPrompt(
        f"You get facts about the positions of persons. They stands for the two persons named before. {_LATEST}",
        _ONE_PLACE,
        (
            ("Mary and John went to the garden. Then they moved to the office. Where is Mary?", "office"),
            (
                "Daniel and Sandra moved to the hallway. Afterwards they went to the kitchen. Where is Daniel?",
                "kitchen",
            ),
        ),
    ),
    "qa14": TaskPrompt(
        "You get facts about where persons were at different times. The times go yesterday, this morning, this "
        "afternoon, this evening; the order of the text says nothing.",
        _ONE_PLACE,
        (
            (
                "Mary went to the park this morning. Yesterday Mary moved to the school. Where was Mary before the "
                "park?",
                "school",
            ),
            (
                "Bill went to the cinema this evening. This afternoon Bill moved to the office. Where was Bill before "
                "the cinema?",
                "office",
            ),
        ),
    ),
    "qa15": TaskPrompt(
        "You get facts about which kind of animal fears which other kind, and about what kind an animal is.",
        "Answer with one word, the kind of animal.",
        (
            ("Mice are afraid of wolves. Gertrude is a mouse. What is gertrude afraid of?", "wolf"),
            ("Cats are afraid of sheep. Winona is a cat. What is winona afraid of?", "sheep"),
        ),
    ),
    "qa16": TaskPrompt(
        "You get facts about the kind and the colour of animals. Animals of one kind have one colour.",
        "Answer with one word, the colour.",
        (
            ("Lily is a swan. Lily is white. Greg is a swan. What color is Greg?", "white"),
            ("Brian is a frog. Julius is a frog. Julius is green. What color is Brian?", "green"),
        ),
    ),
    "qa17": TaskPrompt(
        "You get facts about how shapes lie to each other: above, below, to the left, to the right.",
        _YES_NO,
        (
            (
                "The triangle is above the red square. The red sphere is below the red square. Is the triangle "
                "above the "
                "red sphere?",
                "yes",
            ),
            ("The triangle is to the left of the blue square. Is the blue square to the left of the triangle?", "no"),
        ),
    ),
    "qa18": TaskPrompt(
        "You get facts about which things are bigger than others or fit inside them.",
        _YES_NO,
        (
            (
                "The box fits inside the chest. The chest fits inside the container. Does the box fit in the "
                "container?",
                "yes",
            ),
            ("The suitcase is bigger than the box. Is the box bigger than the suitcase?", "no"),
        ),
    ),
    "qa19": TaskPrompt(
        "You get facts about how places lie to each other on the compass. Find the two steps from one to another.",
        "Answer with two letters out of n, s, e and w, separated by a comma and without a space.",
        (
            (
                "The kitchen is north of the office. The garden is east of the kitchen. How do you go from the "
                "office to "
                "the garden?",
                "n,e",
            ),
            (
                "The office is south of the garden. The bathroom is west of the office. How do you go from the "
                "garden to "
                "the bathroom?",
                "s,w",
            ),
        ),
    ),
    "qa20": TaskPrompt(
        "You get facts about how persons feel, where they go and what they get. Hungry persons want the apple in the "
        "kitchen, thirsty ones the milk there, tired ones the pajamas in the bedroom, bored ones the football in the "
        "garden.",
        "Answer with one word, a feeling or a place.",
        (
            ("Yann is bored. Where will yann go?", "garden"),
            ("Sumit is hungry. Sumit went to the kitchen. Why did sumit go to the kitchen?", "hungry"),
        ),
    ),
}
