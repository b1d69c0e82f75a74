"""Data for training and evaluation: bAbI stories, background text, BABILong and MQAR samples and the small tokenizer.

Nothing here imports torch; batching and collation belong to `mnemon.training` and `mnemon.evaluation`.
"""

from mnemon.data import babi, babilong, mqar

__all__ = ["babi", "babilong", "mqar"]
