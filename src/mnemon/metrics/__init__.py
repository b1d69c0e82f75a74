"""What a model's outputs are worth: recall, perplexity and their intervals.

One home for the numbers that training measures at its end and `mnemon eval` measures later, so that both are the same.
"""
