"""Explain slots and memories in words, simulate them from these words, and score the simulation.

`activations` and `record` say how active units were on a text; `run.explain` has an `explainer` put them into words;
`choose.explainer_from_option` gives the explainer a user names; `delphi` writes activations for EleutherAI's delphi.
"""
