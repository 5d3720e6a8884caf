"""What the inspection of a data set finds: faults, which must not be, and notes, which a reader should know."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from brainlm.errors import BrainLMError, DataError
from brainlm.store import Store

logger = logging.getLogger(__name__)
T = TypeVar("T")
Kind = Literal["fault", "note"]
MAX_KEPT = 1000  # of one kind of one check; the rest is counted
MAX_CHARACTERS = 600  # of a line: what it says may come from a hostile file
MAX_JSON_MB = 256


@dataclass(frozen=True)
class Finding:
    """One thing that was found, by which check and where."""

    kind: Kind
    check: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}  {self.check:<11}{self.where}: {self.what}"


class Findings:
    """Gathers findings in bounded memory, in the order in which they are made."""

    def __init__(self) -> None:
        self.kept: list[Finding] = []
        self.counts: Counter[tuple[Kind, str]] = Counter()

    def fault(self, check: str, where: object, what: object) -> None:
        self._add("fault", check, where, what)

    def note(self, check: str, where: object, what: object) -> None:
        self._add("note", check, where, what)

    @property
    def num_faults(self) -> int:
        return sum(count for (kind, _), count in self.counts.items() if kind == "fault")

    def guard(self, check: str, where: object, work: Callable[..., T], *args: Any) -> T | None:
        """Return what `work` returns; turn whatever it raises into a fault, because the files may be hostile."""
        try:
            return work(*args)
        except BrainLMError as error:
            self.fault(check, where, error)
        except (Exception, RecursionError) as error:
            logger.debug("%s: %s", check, where, exc_info=True)
            self.fault(check, where, f"cannot be checked, it is not what it must be ({type(error).__name__}: {error})")
        return None

    def lines(self) -> list[str]:
        """Return one line a finding, and how many were left out, faults first."""
        shown = [str(finding) for kind in ("fault", "note") for finding in self.kept if finding.kind == kind]
        left = [
            f"{kind}  {check:<11}and {count - MAX_KEPT} more"
            for (kind, check), count in sorted(self.counts.items())
            if count > MAX_KEPT
        ]
        return shown + left

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(finding) for finding in self.kept]

    def _add(self, kind: Kind, check: str, where: object, what: object) -> None:
        self.counts[kind, check] += 1
        if self.counts[kind, check] <= MAX_KEPT:
            texts = (
                "".join(c if c.isprintable() else "?" for c in str(text))[:MAX_CHARACTERS] for text in (where, what)
            )
            self.kept.append(Finding(kind, check, *texts))


def read_bounded_json(store: Store, name: str) -> Any:
    """Return a JSON file of a size that it can reasonably have."""
    size = store.size(name)
    if size > MAX_JSON_MB * 1024**2:
        raise DataError(f"{store.url_of(name)}: {size} bytes, expected at most {MAX_JSON_MB} MB")
    return store.read_json(name)
