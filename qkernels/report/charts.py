"""Plots as inline SVG: they take the page's colours, light or dark, and scale to a phone."""

import math
from html import escape

COLOURS = 8
WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 38


def line_chart(series, xlabel, ylabel, title):
    """An SVG of series [(colour, dashed, [(x, y), ...])]; points that are not finite are left out."""
    series = [(c, dashed, [p for p in points if _finite(*p)]) for c, dashed, points in series]
    points = [p for _, _, line in series for p in line]
    if not points:
        return ""
    x, y = (_Axis(min(v), max(v)) for v in zip(*points, strict=True))
    parts = [_frame(x, y, xlabel, ylabel)]
    for colour, dashed, line in series:
        path = " ".join(
            f"{x.at(a, LEFT, WIDTH - RIGHT):.1f},{y.at(b, HEIGHT - BOTTOM, TOP):.1f}" for a, b in line
        )
        style = f'style="stroke:var(--c{colour % COLOURS})"' + (' stroke-dasharray="4 3"' if dashed else "")
        if len(line) == 1:
            cx, cy = path.split(",")
            parts.append(f'<circle cx="{cx}" cy="{cy}" r="3" style="fill:var(--c{colour % COLOURS})"/>')
        parts.append(f'<polyline class="line" {style} points="{path}"/>')
    return _svg(parts, HEIGHT, title)


def dot_chart(rows, xlabel, title):
    """An SVG of rows [(label, colour, values)]: a dot per value, a tick at their mean, a bar of one deviation."""
    rows = [(label, c, [v for v in values if _finite(v)]) for label, c, values in rows]
    values = [v for _, _, row in rows for v in row]
    if not values:
        return ""
    line, left = 26, 10
    height = TOP + 2 * line * len(rows) + BOTTOM
    x = _Axis(min(values), max(values))
    parts = [_ticks_below(x, left, height)]
    for i, (label, colour, row) in enumerate(rows):
        y = TOP + 2 * line * i + 1.5 * line
        parts.append(f'<text x="{left}" y="{y - line * 0.6:.1f}">{escape(label)}</text>')
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        fill = f'style="fill:var(--c{colour % COLOURS});stroke:var(--c{colour % COLOURS})"'
        if len(row) > 1:
            mean = sum(row) / len(row)
            deviation = math.sqrt(sum((v - mean) ** 2 for v in row) / (len(row) - 1))
            ends = [min(max(mean + s * deviation, x.low), x.high) for s in (-1, 1)]
            a, b, m = (x.at(v, left, WIDTH - RIGHT) for v in (*ends, mean))
            parts.append(
                f'<rect x="{a:.1f}" y="{y - 4}" width="{b - a:.1f}" height="8" {fill} opacity="0.3"/>'
            )
            parts.append(
                f'<line x1="{m:.1f}" x2="{m:.1f}" y1="{y - 8}" y2="{y + 8}" {fill} stroke-width="2"/>'
            )
        for v in row:
            parts.append(f'<circle cx="{x.at(v, left, WIDTH - RIGHT):.1f}" cy="{y}" r="4" {fill}/>')
    middle = (left + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="name" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(xlabel)}</text>'
    )
    return _svg(parts, height, title)


class _Axis:
    """A range with a margin and its round ticks."""

    def __init__(self, low, high):
        margin = 0.04 * (high - low) or 0.5 * abs(high) or 1.0
        self.low, self.high = low - margin, high + margin
        rough = (self.high - self.low) / 5
        power = 10 ** math.floor(math.log10(rough))
        self.step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)

    def at(self, value, start, end):
        return start + (value - self.low) / (self.high - self.low) * (end - start)

    def ticks(self):
        first, last = math.ceil(self.low / self.step), math.floor(self.high / self.step)
        decimals = max(0, -math.floor(math.log10(self.step)))
        big = max(abs(self.low), abs(self.high)) >= 1e5 or decimals > 4
        for i in range(first, last + 1):
            yield i * self.step, f"{i * self.step:.1e}" if big else f"{i * self.step:.{decimals}f}"


def _frame(x, y, xlabel, ylabel):
    parts = [_ticks_below(x, LEFT, HEIGHT)]
    for value, text in y.ticks():
        at = y.at(value, HEIGHT - BOTTOM, TOP)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    middle, centre = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="name" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(xlabel)}</text>'
    )
    parts.append(
        f'<text class="name" transform="translate(11 {centre}) rotate(-90)" text-anchor="middle">'
        f"{escape(ylabel)}</text>"
    )
    return "".join(parts)


def _ticks_below(x, left, height):
    parts = []
    for value, text in x.ticks():
        at = x.at(value, left, WIDTH - RIGHT)
        parts.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>'
            f'<text x="{at:.1f}" y="{height - BOTTOM + 14}" text-anchor="middle">{text}</text>'
        )
    return "".join(parts)


def _svg(parts, height, title):
    size = f"0 0 {WIDTH} {height}"
    return f'<svg viewBox="{size}" role="img" aria-label="{escape(title, quote=True)}">{"".join(parts)}</svg>'


def number(value):
    """Four digits; nothing for None."""
    return "" if value is None else f"{value:.3f}" if 0.1 <= abs(value) < 1000 else f"{value:.3g}"


def log10(value):
    """None where there is no logarithm."""
    return math.log10(value) if value and value > 0 else None


def _finite(*values):
    return all(v is not None and math.isfinite(v) for v in values)
