"""One file per update rule: `NAME.py` with a constant `RULE` of that name (docs/adding-a-rule.md)."""
