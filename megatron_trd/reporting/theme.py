"""Colours of charts and page, and charts as SVG that follows the page from light to dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS: Mapping[str, tuple[str, str]] = {
    "ink": ("#1d232b", "#e8ebf0"),
    "muted": ("#5d6776", "#9aa5b4"),
    "line": ("#dfe3e9", "#2c333d"),
    "paper": ("#fdfdfe", "#12161b"),
    "card": ("#f4f6f9", "#1a1f27"),
    "blue": ("#2b66cf", "#78a8ff"),
    "orange": ("#cf5f04", "#ff9d52"),
    "green": ("#13805d", "#4fcfa4"),
    "pink": ("#a8378f", "#e58ad3"),
    "gold": ("#8a6a00", "#dcb84c"),
    "teal": ("#0f7f93", "#56c8dc"),
}
"""Name -> what charts are drawn with, and its counterpart on a dark page. The page's CSS knows them as variables."""
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
SERIES = tuple(LIGHT[name] for name in ("blue", "orange", "green", "pink", "gold", "teal"))
RIGHT, WRONG = LIGHT["green"], LIGHT["orange"]
_NAME_OF = {light: name for name, light in LIGHT.items()}
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": LIGHT["muted"],
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=SERIES),
    "axes.labelcolor": LIGHT["ink"],
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": LIGHT["ink"],
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["muted"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
}


@contextmanager
def style() -> Iterator[None]:
    """Draw and save what belongs to a report inside."""
    with mpl.rc_context(_STYLE):
        yield


def panels(num: int, columns: int, *, width: float = 10.4, height: float = 2.6) -> tuple[Figure, list[Axes]]:
    """Return a figure of `num` charts in rows of `columns`; sizes in inches, the height of one row."""
    rows = -(-num // columns)
    figure = Figure(figsize=(width, height * rows))
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(num)]
    return figure, axes


def write_png(figure: Figure, path: Path) -> None:
    """Write a chart as a picture on white."""
    with style():
        figure.savefig(path, format="png", dpi=160, facecolor="white")


def to_svg(figure: Figure, name: str) -> str:
    """Return a chart as an inline SVG element whose colours are CSS variables; `name` makes its ids its own."""
    buffer = io.StringIO()
    with style(), mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    width, height = (72 * inches for inches in figure.get_size_inches())  # in points, matplotlib's unit
    tag = f'<svg role="img" viewBox="0 0 {width:g} {height:g}" style="max-width: {width:g}pt">'
    body = buffer.getvalue().partition("<svg")[2].partition(">")[2]
    body = re.sub(r"<(metadata|style).*?</\1>", "", body, flags=re.DOTALL)  # a style would hold for the whole page
    body = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", body)  # figure_1, axes_1, ...: the same in every chart
    body = re.sub(r"font-family: [^;\"]+", "font-family: inherit", body)
    return tag + re.sub(r"#[0-9a-f]{6}\b", lambda found: _variable(found[0]), body)


def _variable(colour: str) -> str:
    return f"var(--{_NAME_OF[colour]})" if colour in _NAME_OF else colour
