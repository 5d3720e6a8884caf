"""What a page is made of: numbered sections, drawings saved on the way, and the order of methods in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from brainlm.store import Store
from eval import figures
from eval.figures import Look
from eval.figures_charts import Estimate
from eval.report_input import Results
from eval.report_tables import Table
from eval.results import Score

PAGES = Path(__file__).with_name("pages")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure as the page shows it."""

    svg: str
    caption: str


@dataclass(kw_only=True)
class Section:
    """One numbered part of the page; ``more_*`` are folded away."""

    title: str
    anchor: str
    absent: list[str] = field(default_factory=list)
    paragraphs: list[str] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    more_drawings: list[Drawing] = field(default_factory=list)
    more_tables: list[Table] = field(default_factory=list)
    more_title: str = "Further metrics"

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing but the reason why."""
        return not (self.paragraphs or self.drawings or self.tables or self.more_drawings or self.more_tables)


@dataclass(frozen=True, kw_only=True)
class Artist:
    """Saves a figure into ``figures/`` and returns it for the page."""

    store: Store

    def show(self, figure: Any, name: str, label: str, caption: str) -> Drawing:
        svg = figures.to_svg(figure)
        self.store.write_bytes(f"figures/{name}.svg", svg)
        self.store.write_bytes(f"figures/{name}.png", figures.to_png(figure))
        return Drawing(svg=figures.inline_svg(svg, name, label), caption=caption)


def estimate(score: Score) -> Estimate:
    """Return a score as a figure draws it."""
    return Estimate(value=score.value, low=score.ci_low, high=score.ci_high)


def ordered_looks(results: Results, scores: Sequence[Score]) -> dict[str, Look]:
    """Return the look of every scored model: the checkpoints first, then by kind, the better first."""
    order = ("brainlm", "untrained", "baseline", "control", "optimum")
    mean: dict[str, list[float]] = {}
    for score in scores:
        mean.setdefault(score.model, []).append(score.value)
    kinds = {s.model: s.model_kind for s in scores}
    ranked = sorted(
        mean, key=lambda m: (order.index(kinds[m]), -float(np.mean(mean[m])) if kinds[m] != "brainlm" else 0)
    )
    return {model: results.looks[model] for model in ranked}


def render_page(name: str, **values: Any) -> str:
    """Fill one of the pages in ``eval/pages``; what is filled in is escaped, and a missing value is an error."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["svg"] = Markup  # made by eval.figures, which escapes what it is given
    return environment.get_template(name).render(**values)
