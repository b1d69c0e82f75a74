"""bAbI (Weston et al. 2015, arXiv 1502.05698): reader of all twenty tasks, generator and oracle for qa1-qa10.

>>> story = generate("qa1", 1, seed=0)[0]
>>> solve(story, story.questions[0]) == story.questions[0].answer
True
"""

from mnemon.data.babi.final import final_questions
from mnemon.data.babi.generator import generate
from mnemon.data.babi.reader import format_stories, read
from mnemon.data.babi.solver import solve
from mnemon.data.babi.story import GENERATED_TASKS, TASKS, Question, Statement, Story

__all__ = [
    "GENERATED_TASKS",
    "TASKS",
    "Question",
    "Statement",
    "Story",
    "final_questions",
    "format_stories",
    "generate",
    "read",
    "solve",
]
