"""How the figures of a report look, and their SVG in a form that follows a page's theme.

Every colour below is also a CSS variable of the page (`THEME`). A figure is drawn once in the light colours; inside the
page each of them is replaced by its variable. No figure knows about files or about records.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

INK, MUTED, RULE, SHADE, PAPER = "#1c1d21", "#6a6e77", "#d8d9de", "#ecebe5", "#fffffd"
SERIES = ("#bf3f0a", "#2563a6", "#14776d", "#7a55b5", "#8a7412", "#b0306e", "#4f7a28", "#3f7f96")
MODEL_COLOURS, BASELINE_COLOURS = (SERIES[0], SERIES[5], SERIES[4]), (SERIES[1], SERIES[2], SERIES[3], *SERIES[6:])
THEME: dict[str, str] = {INK: "ink", MUTED: "muted", RULE: "rule", SHADE: "shade", PAPER: "paper"} | {
    colour: f"series-{i}" for i, colour in enumerate(SERIES)
}


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a model appears in every figure."""

    label: str
    colour: str
    marker: str = "o"
    dashed: bool = False


@contextmanager
def quiet_drawing() -> Iterator[None]:
    """Draw without a display, in the report's style, keeping the plotting libraries' warnings to themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import matplotlib

        style = {
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.8,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "text.color": INK,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
            "grid.color": RULE,
            "grid.linewidth": 0.8,
            "figure.facecolor": PAPER,
            "axes.facecolor": "none",
            "legend.frameon": False,
            "svg.fonttype": "none",
            "svg.hashsalt": "report",
            "axes.unicode_minus": True,
        }
        with matplotlib.rc_context(style):
            yield


def blank_figure(width: float, height: float, **options: Any) -> Any:
    """Return an empty figure of that size in inches, its parts laid out without overlap."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", **options)


def to_svg(figure: Any) -> bytes:
    """Return the figure as an SVG file in the light colours."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, facecolor=PAPER)
    return buffer.getvalue()


def to_png(figure: Any, dpi: int = 180) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None}, facecolor=PAPER)
    return buffer.getvalue()


def inline_svg(svg: bytes, name: str, label: str) -> str:
    """Turn an SVG file of `to_svg` into an element of a page.

    Theme colours become CSS variables, ids get the figure's name in front, so that figures on one page do not share
    any, fonts become the page's, and nothing points outside the page.
    """
    from html import escape

    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    text = re.sub(r'\sid="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r'\s(?:d|transform|x|y)="[^"]*"', _hundredths, text)
    text = re.sub(r"font-family:[^;\"]*;?\s*", "", text)  # the page's own
    text = text.replace("#000000", "var(--ink)").replace("#a6a6a6", "var(--muted)")  # the glass brain's outlines
    for colour, variable in THEME.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"^<svg([^>]*?)\swidth=\"[^\"]*\"", r"<svg\1", text)
    text = re.sub(r"^<svg([^>]*?)\sheight=\"[^\"]*\"", r"<svg\1", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label, quote=True)}"', 1).strip()


def _hundredths(match: re.Match[str]) -> str:
    return re.sub(r"(\d\.\d\d)\d+", r"\1", match[0])  # of a point: what no screen shows


def minus(value: float, digits: int = 3) -> str:
    """Write a number with a true minus sign, and no minus before zeros."""
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "\N{MINUS SIGN}")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))
