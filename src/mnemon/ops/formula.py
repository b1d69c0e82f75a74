"""Sizes and costs as formulas: text that a table can show and a program can evaluate."""

import ast
import operator
from collections.abc import Callable, Mapping

_OPERATIONS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def evaluate(formula: str, values: Mapping[str, float]) -> float:
    """Evaluate a formula of numbers, names, + - * / ** and brackets.

    Args:
        formula: such as "4*K*V + 2*C*(K + V)".
        values: value of each name.

    Returns:
        The result.

    Raises:
        ValueError: if the formula holds anything else or a name without a value.
    """

    def visit(node: ast.expr) -> float:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](visit(node.left), visit(node.right))
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return node.value
        if isinstance(node, ast.Name) and node.id in values:
            return values[node.id]
        raise ValueError(
            f"formula {formula!r}: {ast.unparse(node)!r} is neither arithmetic nor one of {sorted(values)}"
        )

    return visit(ast.parse(formula, mode="eval").body)
