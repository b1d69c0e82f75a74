"""Data for training and evaluation: bAbI stories, background text, BABILong samples and the small tokenizer.

Nothing here imports torch; batching and collation belong to `mnemon.training` and `mnemon.evaluation`.
"""

from mnemon.data import babi, babilong

__all__ = ["babi", "babilong"]
