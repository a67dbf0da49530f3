"""Small charts as SVG, by hand: lines over a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 420, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 90, 36, 40
_STEPS = 40
_COLOURS = ("#1b6ca8", "#c8553d", "#4f772d")


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    values: list[float]


@dataclass(frozen=True, slots=True)
class Panel:
    """Values over amounts. Both axes are logarithmic, or, where there is a limit, the lower one only."""

    title: str
    amounts: list[float]
    lines: list[Line]
    linear: bool = False
    """Dashed beside each line: the straight one from its first point to its last, bent by these axes."""
    limit: float | None = None


def write_svg(path: Path, panels: Sequence[Panel]) -> None:
    """Panels two in a row."""
    rows = (len(panels) + 1) // 2
    drawn = [
        f'<g transform="translate({index % 2 * _WIDTH},{index // 2 * _HEIGHT})">{_panel(panel)}</g>'
        for index, panel in enumerate(panels)
    ]
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * _WIDTH}" height="{rows * _HEIGHT}" '
        f'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(drawn)
        + "\n</svg>\n"
    )


def _panel(panel: Panel) -> str:
    values = [value for line in panel.lines for value in line.values]
    logarithmic = panel.limit is None
    low = min(values) / 1.5 if logarithmic else 0.0
    high = max([*values, panel.limit or 0.0]) * (1.5 if logarithmic else 1.1)
    first, last = panel.amounts[0], panel.amounts[-1]

    def x(amount: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * math.log(amount / first) / math.log(last / first)

    def y(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if logarithmic else value / high
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * max(0.0, min(1.0, share))

    out = [f'<text x="{_LEFT}" y="20" font-weight="bold">{escape(panel.title)}</text>']
    out += [_tick_below(x(amount), _short(amount)) for amount in panel.amounts]
    ticks = _decades(low, high) if logarithmic else _even(high)
    out += [_tick_left(y(value), _short(value)) for value in ticks]
    if panel.limit is not None:
        out.append(_path([(x(first), y(panel.limit)), (x(last), y(panel.limit))], "#777", dashed=True))
    for line, colour in zip(panel.lines, _COLOURS, strict=False):
        points = [(x(amount), y(value)) for amount, value in zip(panel.amounts, line.values, strict=True)]
        if panel.linear:
            slope = (line.values[-1] - line.values[0]) / (last - first)
            between = [first * (last / first) ** (step / _STEPS) for step in range(_STEPS + 1)]
            straight = [(x(amount), y(line.values[0] + slope * (amount - first))) for amount in between]
            out.append(_path(straight, colour, dashed=True))
        out.append(_path(points, colour))
        out += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in points]
        px, py = points[-1]
        out.append(f'<text x="{px + 8:.1f}" y="{py + 4:.1f}" fill="{colour}">{escape(line.name)}</text>')
    return "".join(out)


def _path(points: Sequence[tuple[float, float]], colour: str, *, dashed: bool = False) -> str:
    joined = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
    dash = ' stroke-dasharray="4 4" opacity="0.6"' if dashed else ""
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>'


def _tick_below(px: float, text: str) -> str:
    return f'<text x="{px:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{text}</text>'


def _tick_left(py: float, text: str) -> str:
    right = _WIDTH - _RIGHT
    return (
        f'<line x1="{_LEFT}" x2="{right}" y1="{py:.1f}" y2="{py:.1f}" stroke="#ddd"/>'
        f'<text x="{_LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _decades(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20 ... between the two."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in (1, 2, 5) if low <= step * 10.0**power <= high]


def _even(high: float) -> list[float]:
    """About five, at round numbers."""
    power = 10.0 ** math.floor(math.log10(high))
    step = next(power * part for part in (0.1, 0.2, 0.5, 1, 2) if high / (power * part) <= 7)
    return [step * number for number in range(int(high / step) + 1)]


def _short(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e3 else f"{value:.3g}"
