"""What ``eval/predict.py`` is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from eval.table_settings import TableSettings


@dataclass(frozen=True, kw_only=True)
class PredictSettings(TableSettings):
    """Which recordings are predicted from by which fine-tuned checkpoint."""

    KIND: ClassVar[str] = "predict"
    HOW: ClassVar[tuple[str, ...]] = ("prepare",)

    prepare: dict[str, Any] = field(default_factory=dict)
    """For images: settings of ``data_prep/prepare.py`` that go with ``contract=CHECKPOINT``, such as
    ``prepare.atlas.image=FILE`` or ``prepare.clean.strategy=24P``."""
