"""A comparison as a LaTeX document with booktabs tables; every text is escaped, so that it compiles."""

import re
import unicodedata

from mnemon.evaluation.compare.document import Document, Table
from mnemon.evaluation.tables import Grid

_MOST_LINES = 34

_HEAD = r"""\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage{booktabs}
\usepackage{longtable}
\usepackage[margin=15mm,landscape]{geometry}
\setlength{\tabcolsep}{4pt}
\begin{document}
"""

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    "[": "{[}",  # a bracket after the end of a line would be read as an option of it
    "]": "{]}",
    "*": "{*}",  # the same of a star
    "★": r"$^{\star}$",
    "±": r"$\pm$",
    "−": r"$-$",
    "×": r"$\times$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "“": "``",
    "”": "''",
    "‘": "`",
    "’": "'",
    "\u00a0": "~",
    "\n": " ",
    "\t": " ",
}


def latex(document: Document) -> str:
    """Write every table of a document; the packages it needs stand in its head.

    Args:
        document: what to write; of tables that have one, the narrow form.

    Returns:
        A complete LaTeX document.
    """
    parts = [_HEAD]
    for section in document.sections:
        parts.append(f"\\section*{{{escape(section.title)}}}\n")
        for number, table in enumerate(section.tables, start=1):
            parts.append(_table(table, f"tab:{_slug(section.title)}-{number}"))
    parts.append(f"\\noindent\\texttt{{{escape(document.command)}}}\n\\end{{document}}\n")
    return "\n".join(parts)


def escape(text: str) -> str:
    """Write a text so that LaTeX prints it: special characters as commands, unknown scripts as their code points."""
    return "".join(_SPECIAL.get(character) or _plain(character) for character in text)


def _plain(character: str) -> str:
    if " " <= character <= "~" or "À" <= character <= "ſ":  # what T1 fonts hold
        return character
    simple = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    printable = "".join(_SPECIAL.get(letter, letter) for letter in simple if letter.isprintable())
    return printable or f"{{[}}U+{ord(character):04X}{{]}}"


def _table(table: Table, label: str) -> str:
    grid = table.narrow or table.grid
    caption = f"\\caption{{{escape(f'{table.title}. {table.note}'.strip())}}}\\label{{{label}}}"
    columns = "l" * grid.num_names + "r" * (len(grid.head) - grid.num_names)
    head = f"{_line(grid.head)}\n\\midrule\n"
    body = _body(grid)
    if len(grid.lines) > _MOST_LINES:
        return (
            f"\\begin{{longtable}}{{{columns}}}\n{caption}\\\\\n\\toprule\n{head}\\endhead\n"
            f"{body}\\bottomrule\n\\end{{longtable}}\n"
        )
    return (
        f"\\begin{{table}}[htbp]\n\\centering\\small\n{caption}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n"
        f"{head}{body}\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
    )


def _body(grid: Grid) -> str:
    """Write the lines, a rule between groups and a group's name once."""
    return "".join(("\\midrule\n" if starts else "") + _line(line) + "\n" for starts, line in grid.grouped())


def _line(texts: tuple[str, ...]) -> str:
    return " & ".join(_cell(text) for text in texts) + r" \\"


def _cell(text: str) -> str:
    bold = re.fullmatch(r"\*\*(.+)\*\*", text)
    return f"\\textbf{{{escape(bold.group(1))}}}" if bold else escape(text)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
