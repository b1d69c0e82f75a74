"""What a comparison says, apart from how it looks: sections of tables, figures and notes; and its Markdown."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mnemon.evaluation.plots import Plot
from mnemon.evaluation.tables import Grid

FORMAT = "mnemon-comparison-1"


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: what it shows.
        grid: every number with its interval.
        narrow: fewer intervals, for a terminal or a printed page; None if the grid itself is narrow enough.
        note: how to read it.
    """

    title: str
    grid: Grid
    narrow: Grid | None = None
    note: str = ""


@dataclass(frozen=True)
class Section:
    """Tables and figures about one suite.

    Attributes:
        lead: sentences to read first.
        notes: sentences to read last.
    """

    title: str
    tables: tuple[Table, ...]
    plots: tuple[Plot, ...] = ()
    lead: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """A whole comparison.

    Attributes:
        runs: the folders compared, as they were given.
        command: the command line that made it.
        values: everything as plain values, by section, for JSON.
    """

    title: str
    sections: tuple[Section, ...]
    runs: tuple[str, ...]
    command: str
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def plots(self) -> tuple[Plot, ...]:
        """Figures of all sections."""
        return tuple(plot for section in self.sections for plot in section.plots)

    def value(self) -> dict[str, Any]:
        """Give the content of `comparison.json`."""
        return {"format": FORMAT, "command": self.command, "runs": list(self.runs), **self.values}


def markdown(document: Document, *, figures: bool = False) -> str:
    """Write a document as Markdown.

    Args:
        document: what to write.
        figures: refer to the figures as PNG files beside it.
    """
    parts = [f"# {document.title}\n"]
    for section in document.sections:
        parts.append(f"## {section.title}\n")
        if section.lead:
            parts.append("".join(f"- {sentence}\n" for sentence in section.lead))
        for table in section.tables:
            parts.append(f"**{table.title}.** {table.note}\n".replace(".** \n", ".**\n"))
            parts.append(table.grid.markdown())
        if figures:
            parts += [f"![{plot.title}]({plot.name}.png)\n" for plot in section.plots]
        if section.notes:
            parts.append("".join(f"- {note}\n" for note in section.notes))
    parts.append(f"Runs: {', '.join(f'`{name}`' for name in document.runs)}. Command: `{document.command}`\n")
    return "\n".join(parts)
