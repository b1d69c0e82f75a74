"""The LaTeX form compiles: a checker of its syntax stands in for the compiler, which few machines have."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemon.evaluation.compare.document import Document, Section, Table
from mnemon.evaluation.compare.latex import escape, latex
from mnemon.evaluation.tables import Grid

COMMANDS = set(
    "documentclass usepackage setlength tabcolsep begin end section noindent texttt centering small caption label "
    "toprule midrule bottomrule endhead textbf textbackslash textasciitilde textasciicircum textless textgreater "
    "textbar textquotedbl textasciigrave ldots star pm times geq leq".split()
)
ENVIRONMENTS = {"document", "table", "tabular", "longtable"}


def check_syntax(text: str) -> None:
    """Fail on what LaTeX would stumble over: braces, maths, environments, unknown commands, bare special characters."""
    depth, maths, open_environments, position = 0, False, [], 0
    while position < len(text):
        character = text[position]
        if character == "\\":
            command = re.match(r"\\([A-Za-z]+)", text[position:])
            if command is None:
                assert text[position + 1] in "\\&%$#_{}", f"odd command {text[position : position + 9]!r}"
                position += 2
                continue
            assert command.group(1) in COMMANDS, f"unknown command {command.group()}"
            if command.group(1) in ("begin", "end"):
                name = re.match(r"\\(?:begin|end)\{(\w+)\}", text[position:])
                assert name is not None
                assert name.group(1) in ENVIRONMENTS
                if command.group(1) == "begin":
                    open_environments.append(name.group(1))
                else:
                    assert open_environments.pop() == name.group(1)
            position += command.end()
            continue
        if character == "$":
            maths = not maths
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            assert depth >= 0, "a brace is closed that was not opened"
        elif character in "_^":
            assert maths, f"{character} outside maths: {text[max(0, position - 20) : position + 20]!r}"
        elif character == "&":
            assert open_environments[-1] in ("tabular", "longtable")
        assert character not in "#%", f"bare {character}"
        assert character == "\n" or " " <= character <= "~" or "À" <= character <= "ſ", f"{character!r} has no glyph"
        position += 1
    assert (depth, maths, open_environments) == (0, False, [])


def check_columns(text: str) -> None:
    for columns, body in re.findall(r"\\begin\{(?:tabular|longtable)\}\{([lr]+)\}(.*?)\\end\{(?:tab|long)", text, re.S):
        for row in re.findall(r"^(.*) \\\\$", body, re.M):
            assert len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1, row


def document(*texts: str, lines: int = 3) -> Document:
    grid = Grid(("length", "model", *texts), tuple((f"{n // 2}k", texts[0], *texts) for n in range(lines)))
    return Document("A & B", (Section(texts[0], (Table(texts[0], grid, note=texts[0]),)),), ("run",), f"x {texts[0]}")


def test_a_table_has_rules_groups_and_bold_numbers() -> None:
    text = latex(document("**93★ [86–97]**", "5 ± 1"))
    check_syntax(text)
    check_columns(text)
    assert r"\textbf{93$^{\star}$ {[}86--97{]}}" in text
    assert text.count(r"\midrule") == 2  # under the head, and between 0k and 1k
    assert r"\begin{tabular}{llrr}" in text


def test_a_long_table_breaks_over_pages() -> None:
    text = latex(document("x", lines=60))
    check_syntax(text)
    assert r"\begin{longtable}" in text
    assert r"\begin{table}" not in text


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a_b & 50 %", r"a\_b \& 50 \%"),
        (r"C:\x{y}", r"C:\textbackslash{}x\{y\}"),
        ("Zoë – 3 × 4 ≥ 2", r"Zoë -- 3 $\times$ 4 $\geq$ 2"),
        ("漢", "{[}U+6F22{]}"),
        ("ﬁ", "fi"),
        ("~^$#", r"\textasciitilde{}\textasciicircum{}\$\#"),
    ],
)
def test_special_characters_are_written_so_that_they_are_printed(text: str, written: str) -> None:
    assert escape(text) == written


@settings(max_examples=40)
@given(st.text(max_size=30))
def test_any_text_can_stand_in_any_place(text: str) -> None:
    written = latex(document(text or "x", "**bold**"))
    check_syntax(written)
    check_columns(written)


@pytest.mark.parametrize("bad", ["{", "a_b", "\\unknown", "50 %", r"\begin{table}", "$x", "★"])
def test_the_checker_sees_what_would_not_compile(bad: str) -> None:
    with pytest.raises(AssertionError):
        check_syntax(bad)
