"""`mnemon rules`: the update rules of linear memories, what each declares, and whether it keeps the contract."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemon.cli.options import JsonOption
from mnemon.errors import ConfigError

if TYPE_CHECKING:
    from mnemon.ops import UpdateRule


def rules(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A rule, for its details; none lists all.", show_default=False),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Run the contract's checks on the rule NAME (seconds to a minute).")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """List the update rules of linear memories, or describe one: `mnemon rules gated_delta_net`."""
    if check and name is None:
        raise ConfigError("--check needs the name of a rule; `mnemon rules` lists them")

    from mnemon.ops import get_rule, list_rules
    from mnemon.ops.description import describe

    if name is None:
        described = [describe(get_rule(known)) for known in list_rules()]
        if json_output:
            print(json.dumps(described, ensure_ascii=False))
        else:
            _print_table(described)
        return
    rule = get_rule(name)
    passed = _check(rule, show=not json_output) if check else None
    about = describe(rule)
    if json_output:
        print(json.dumps(about if passed is None else about | {"checks_passed": passed}, ensure_ascii=False))
    elif passed is None:
        _print_details(about)


def _check(rule: "UpdateRule", show: bool) -> list[str]:
    """Run every check with every variant of the settings; the first fault raises. Return the names of the checks."""
    from rich.console import Console

    from mnemon.ops.checks import CHECKS, variants

    console = Console(stderr=True)
    names = []
    for check in CHECKS:
        sentence = (check.__doc__ or check.__name__).splitlines()[0]
        with console.status(sentence):
            for options in variants(rule):
                check(rule, options)
        names.append(check.__name__.removeprefix("check_"))
        if show:
            print(f"ok  {sentence}")
    return names


def _print_table(described: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("rule", "recurrence", "state per head", "FLOPs per token, head", "forms", "paper"):
        table.add_column(column, no_wrap=column == "rule", overflow="fold")
    for about in described:
        forms = ", ".join(about["forms"])
        paper = f"arXiv:{about['arxiv']}"
        table.add_row(about["name"], about["equation"], about["state_size"], about["recurrent_flops"], forms, paper)
    console = Console()
    console.print(table, markup=False)
    console.print("K, V: key and value width per head; J: slots. Details: mnemon rules NAME", style="dim")


def _print_details(about: dict[str, Any]) -> None:
    print(f"{about['name']}: {about['equation']}")
    print(f"  paper      {about['paper']}, arXiv:{about['arxiv']}, {about['place']}")
    print(f"  forms      {', '.join(about['forms'])}")
    print(f"  state      {about['state_size']} numbers per head, whatever the number of tokens")
    print(f"  cost       {about['recurrent_flops']} FLOPs per token and head, recurrent")
    if about["chunkwise_flops"]:
        print(f"             {about['chunkwise_flops']}, chunkwise (C = {about['chunk_size']} tokens in a chunk)")
    for gate in about["gates"]:
        print(f"  gate       {gate['name']} {gate['shape']}, {gate['range']}: {gate['meaning']}")
    for parameter in about["parameters"]:
        print(f"  parameter  {parameter['name']} {parameter['shape']}: {parameter['meaning']}")
    for setting in about["hyper_parameters"]:
        choices = f", one of {', '.join(setting['choices'])}" if setting["choices"] else ""
        print(f"  setting    {setting['name']} = {setting['default']}{choices}: {setting['meaning']}")
    if about["unit_keys"]:
        print("  keys       of norm 1 at most; the layer normalises them")
    if about["equal_widths"]:
        print("  widths     keys and values have the same width, K = V")
