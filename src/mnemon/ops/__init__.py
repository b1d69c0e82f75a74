"""Update rules of linear memories: pure functions of tensors.

    rule = get_rule("gated_delta_net")
    output, state = rule(q, k, v, g=g, beta=beta, state=state)

`docs/rules.md` has the rules and their contract, `docs/adding-a-rule.md` how to write another.
"""

from mnemon.ops.forms import FormChoice, choose_form
from mnemon.ops.registry import get_rule, list_rules, register_rule
from mnemon.ops.rule import UpdateRule

__all__ = ["FormChoice", "UpdateRule", "choose_form", "get_rule", "list_rules", "register_rule"]
