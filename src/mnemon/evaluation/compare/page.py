"""A comparison as one HTML page that loads nothing: tables, figures inside, dark and light."""

from html import escape

from mnemon.evaluation.compare.document import Document, Section, Table
from mnemon.evaluation.report import bullet_list, figure, grid_table, html_page, section

_MOST_COLUMNS = 8


def page(document: Document) -> str:
    """Write the page.

    Args:
        document: what to write.

    Returns:
        A complete HTML document without any reference to another file or host.
    """
    runs = " · ".join(escape(name) for name in document.runs)
    head = f'<h1>{escape(document.title)}</h1>\n<p class="lead">{runs}</p>'
    made = section("How it was made", f"<pre>{escape(document.command)}</pre>")
    return html_page(document.title, [head, *map(_section, document.sections), made])


def _tables(table: Table) -> str:
    """Write a table; one that a page cannot hold in its narrow form, the whole of it folded below."""
    if table.narrow is None or len(table.grid.head) <= _MOST_COLUMNS:
        return grid_table(table.grid)
    whole = grid_table(table.grid)
    return f"{grid_table(table.narrow)}<details><summary>all columns and intervals</summary>{whole}</details>"


def _section(part: Section) -> str:
    bodies = [bullet_list(part.lead, "lead")]
    for table in part.tables:
        note = f'<p class="soft">{escape(table.note)}</p>' if table.note else ""
        bodies.append(f"<h3>{escape(table.title)}</h3>{note}{_tables(table)}")
        if table is part.tables[0]:
            bodies += [figure(plot) for plot in part.plots]
    bodies.append(bullet_list(part.notes))
    return section(part.title, "\n".join(bodies))
