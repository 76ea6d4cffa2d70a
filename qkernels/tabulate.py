"""Tables of results: what stands in a cell, and rows of cells as text."""

import statistics


def spread(values):
    """(mean, sample standard deviation); None where there are no values, or one."""
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def columns(rows):
    """Lines of text, the cells of a column below one another."""
    return ["  ".join(row).rstrip() for row in _padded(rows)]


def markdown(headers, rows):
    """The lines of a Markdown table that is one as plain text too."""
    return ["| " + " | ".join(row) + " |" for row in _padded([headers, ["---"] * len(headers), *rows])]


def _padded(rows):
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    return [[cell.ljust(width) for cell, width in zip(row, widths)] for row in rows]
