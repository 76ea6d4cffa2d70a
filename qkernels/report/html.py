"""HTML pieces; all text is escaped here."""

import base64
from html import escape

from . import charts
from .style import CSS


def document(title, parts):
    """A whole page that needs no other file."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def table(headers, rows, kind, caption="", above=()):
    """A table and a line below it. A cell is text or (text, class); the first of a row is its name.

    kind: "cards" turns rows into cards on a narrow screen, "matrix" scrolls sideways under a fixed first column.
    above: (text, columns) of a header row over the headers.
    """
    top = "".join(f'<th colspan="{n}" scope="colgroup">{escape(text)}</th>' for text, n in above)
    heads = "".join(f'<th scope="col"{_kind(rows, i)}>{escape(name)}</th>' for i, name in enumerate(headers))
    body = []
    for row in rows:
        cells = [f'<th scope="row">{escape(row[0])}</th>']
        for name, cell in zip(headers[1:], row[1:], strict=True):
            text, style = cell if isinstance(cell, tuple) else (cell, "")
            style = f' class="{style}"' if style else ""
            cells.append(f'<td data-label="{escape(name, quote=True)}"{style}>{escape(text)}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    note = f"<p>{escape(caption)}</p>" if caption else ""
    top = f"<tr>{top}</tr>" if top else ""
    return (
        f'<div class="scroll"><table class="{kind}"><thead>{top}<tr>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>{note}"
    )


def _kind(rows, column):
    return (
        ' class="text"' if any(isinstance(r[column], tuple) and r[column][1] == "text" for r in rows) else ""
    )


def figure(content, caption):
    """A plot or picture under its name; nothing where there is none."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{content}</figure>" if content else ""


def picture(path, text):
    """An image file as part of the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(text, quote=True)}" src="data:image/png;base64,{data}">'


def legend(entries):
    """(colour, text) of the lines."""
    items = "".join(
        f'<li><i style="background:var(--c{i % charts.COLOURS})"></i>{escape(text)}</li>'
        for i, text in entries
    )
    return f'<ul class="legend">{items}</ul>'
