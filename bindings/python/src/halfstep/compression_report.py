# SPDX-License-Identifier: Apache-2.0
# A page that shows what compression did.
"""Compression as one HTML file without scripts: a table, and a small plot for each layer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape

from .compression import CompressedLayer, CompressionStats

_WIDTH, _HEIGHT = 240, 130
_LEFT, _TOP, _RIGHT, _BOTTOM = 44, 10, 8, 24

_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em; color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
figure { display: inline-block; margin: 0 1em 1em 0; }
figcaption { max-width: 240px; overflow-wrap: anywhere; font-size: 12px; }
svg { background: #fafafa; }
svg text { font-size: 10px; fill: #555; }
.curve { fill: none; stroke: #1668b3; stroke-width: 1.5; }
.chosen { stroke: #c0392b; stroke-dasharray: 3 2; }
"""


def _plot(points: Sequence[tuple[float, float]], chosen: float | None) -> str:
    """An SVG of values over ratios, with a line at the chosen ratio."""
    low, high = min(value for _, value in points), max(value for _, value in points)
    spread = high - low or 1.0

    def place(ratio: float, value: float) -> str:
        x = _LEFT + ratio * (_WIDTH - _LEFT - _RIGHT)
        y = _TOP + (high - value) / spread * (_HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    line = " ".join(place(*point) for point in points)
    bottom = _HEIGHT - _BOTTOM
    parts = [
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img">',
        f'<text x="2" y="{_TOP + 8}">{high:.3g}</text>',
        f'<text x="2" y="{bottom}">{low:.3g}</text>',
        f'<text x="{_LEFT}" y="{_HEIGHT - 8}">0</text>',
        f'<text x="{_WIDTH - _RIGHT - 6}" y="{_HEIGHT - 8}">1</text>',
        f'<polyline class="curve" points="{line}"/>',
    ]
    if chosen is not None:
        x = place(min(chosen, 1.0), low).split(",")[0]
        parts.append(f'<line class="chosen" x1="{x}" x2="{x}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x}" y="{_HEIGHT - 8}">{chosen:.3f}</text>')
    return "".join([*parts, "</svg>"])


def _row(layer: CompressedLayer) -> str:
    size = "" if layer.rank is None else f"{layer.rank} of {layer.maximum_rank}"
    noise = "" if layer.noise is None else f"{layer.noise[1]:.3g} ({layer.noise[0]:.3g})"
    cells = [
        escape(layer.name),
        escape(layer.op_type),
        size,
        f"{layer.macs[0]:,}",
        f"{layer.macs[1]:,}",
        f"{layer.macs[1] / max(layer.macs[0], 1):.3f}",
        f"{layer.parameters[0]:,}",
        f"{layer.parameters[1]:,}",
        noise,
    ]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def write_html(
    path: str | os.PathLike[str],
    stats: CompressionStats,
    *,
    curves: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    curve_label: str = "error",
    scores: tuple[float, float] | None = None,
    title: str = "Compression",
) -> None:
    """Write what compression did as one HTML file; it appears whole or not at all.

    Parameters
    ----------
    path : path
        The file.
    stats : CompressionStats
        From `ModelCompressor.compress`.
    curves : mapping, optional
        ``{layer: [(ratio, value), ...]}``: what ratios do to each layer, as
        `ModelCompressor.ratio_curves` gives, or scores of the network. By layer or weight name.
    curve_label : str
        What the values are.
    scores : (float, float), optional
        Score of the network before and after.
    title : str
        Heading.
    """
    head = "layer operator size macs after ratio weights after noise(plain)".split()
    lines = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f"<p>Multiply-accumulates {stats.macs[0]:,} before, {stats.macs[1]:,} after"
        f" ({stats.mac_ratio:.4f}); weights {stats.parameters[0]:,} before,"
        f" {stats.parameters[1]:,} after ({stats.memory_ratio:.4f}).</p>",
    ]
    if scores is not None:
        lines.append(f"<p>Score {scores[0]:.6f} before, {scores[1]:.6f} after.</p>")
    lines.append("<table><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>")
    lines += [_row(layer) for layer in stats.layers]
    lines.append("</table>")
    if curves:
        lines.append(f"<h2>{escape(curve_label)} by ratio</h2>")
        for layer in stats.layers:
            points = curves.get(layer.name, curves.get(layer.weight, ()))
            if not points:
                continue
            chosen = None if layer.rank is None else layer.macs[1] / max(layer.macs[0], 1)
            lines.append(
                f"<figure>{_plot(points, chosen)}"
                f"<figcaption>{escape(layer.name)}</figcaption></figure>"
            )
    if stats.refusals:
        lines.append("<h2>Layers that stay</h2><ul>")
        lines += [f"<li>{escape(reason)}</li>" for reason in stats.refusals.values()]
        lines.append("</ul>")
    lines.append("</body></html>\n")
    temporary = f"{os.fspath(path)}.part"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write("\n".join(lines))
    os.replace(temporary, path)
