"""`mnemon rules` lists, describes and checks update rules."""

import json

import pytest

from mnemon.cli.app import main
from mnemon.ops import get_rule, list_rules


def test_every_rule_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in list_rules())


def test_the_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules", "--json"]) == 0
    listed = {about["name"]: about for about in json.loads(capsys.readouterr().out)}
    assert tuple(listed) == list_rules()
    assert listed["gla"]["gates"] == [
        {"name": "g", "shape": "[B, T, H, K]", "range": "at most 0", "meaning": "log decay per key channel"}
    ]
    assert listed["gla"]["state_size"] == "K·V"


@pytest.mark.parametrize("name", list_rules())
def test_a_rule_is_described(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rule = get_rule(name)
    assert main(["rules", name]) == 0
    shown = capsys.readouterr().out
    assert rule.equation in shown
    assert rule.source.arxiv in shown
    for declared in (*rule.gates, *rule.parameters, *rule.hyper_parameters):
        assert f" {declared.name} " in shown
    assert main(["rules", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forms"] == list(rule.forms)


def test_a_rule_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules", "linear_attention", "--check"]) == 0
    assert capsys.readouterr().out.count("ok  ") == 11
    assert main(["rules", "linear_attention", "--check", "--json"]) == 0
    assert "causality" in json.loads(capsys.readouterr().out)["checks_passed"]


def test_a_mistake_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules", "mamba"]) == 2
    assert "did you mean 'mamba2'?" in capsys.readouterr().err
    assert main(["rules", "--check"]) == 2
    assert "--check needs the name of a rule" in capsys.readouterr().err
