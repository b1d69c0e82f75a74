"""Suites of EleutherAI's lm-evaluation-harness: its task definitions, our models, local or hub data.

Only `language_model`, `tasks` and `runner` import it, so that everything else works without the extra `mnemon[eval]`.
"""
