"""What a benchmark is: named work units that leave tables of sums behind, and scores made from those tables.

A unit is (task, method). It writes ``<out>/subjects/<task>--<method>--<hash>.parquet``, one row a recording and
condition; the hash covers the task's version and settings, the data and the method, so a second run computes only what
is missing or has changed, and bootstrap settings can change for free.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainlm.errors import ConfigError, StoreError
from brainlm.intervals import Metric
from brainlm.store import Store
from eval.cohort import Cohort
from eval.models import MethodSpec
from eval.results import Score

FOLDER = "subjects"
Features = Mapping[str, NDArray[Any]]
"""Arrays by name, one row a recording."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a unit runs; nothing here may change a score."""

    batch_size: int = 8
    device: str = "cpu"
    untrained_seed: int = 0
    threads: int = 1
    out: str = ""
    """Results folder."""
    prepared: Mapping[str, Features] = field(default_factory=dict)
    """What the units that this one needs have left, by the name of their method."""


@dataclass(frozen=True, eq=False)
class UnitOutput:
    """What a unit leaves behind.

    ``table`` holds sums, one row a recording (or parcel) and condition; ``validation`` the same of validation
    recordings, where the task chooses its reference baseline by them; ``parcels`` sums per parcel; ``examples`` arrays
    for figures.
    """

    table: pd.DataFrame
    validation: pd.DataFrame | None = None
    parcels: pd.DataFrame | None = None
    examples: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """How a task's table becomes scores: which columns are conditions, and which one is resampled.

    ``not_in_reference`` are conditions that the reference baseline does not have (it holds "" there).
    """

    conditions: tuple[str, ...]
    unit: str = "group"
    metrics: Mapping[str, Metric]
    not_in_reference: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ScoreContext:
    """What scores of one run share."""

    dataset: str
    dataset_hash: str
    split: str
    num_bootstrap: int
    num_exchanges: int
    seed: int
    level: float
    notes: tuple[str, ...] = ()
    seen_left_out: bool = True
    """Whether it is known whom the checkpoints were trained on, and tasks that choose their people leave these out."""


class Task(Protocol):
    """One benchmark. What is not said below has a default that fits a simple one."""

    name: str
    version: int

    def hashed_settings(self) -> dict[str, Any]:
        """Return all settings that change the numbers."""
        return {}

    def why_not(self, cohort: Cohort) -> str:
        """Say what the data set lacks for this task, "" if nothing."""
        return ""

    def baselines(self, cohort: Cohort) -> list[MethodSpec]:
        """List the methods that need no checkpoint."""

    def controls(self, spec: MethodSpec) -> list[MethodSpec]:
        """List what else must be run with a network, e.g. on permuted input."""
        return []

    def compute(self, spec: MethodSpec, cohort: Cohort, runtime: Runtime) -> UnitOutput:
        """Score one method."""

    def parts(self, spec: MethodSpec, cohort: Cohort) -> list[str]:
        """List the pieces that a method's work is divided into, each a unit with ``spec.part``; [""] = in one."""
        return [""]

    def prepared(self, spec: MethodSpec) -> list[MethodSpec]:
        """List what must be computed before by `prepare`, and may be shared with other methods."""
        return []

    def prepare(self, spec: MethodSpec, cohort: Cohort, runtime: Runtime) -> Features:
        """Compute one of `prepared`: ``runtime.prepared[spec.name]`` for the units that need it."""
        raise ConfigError(f"{self.name} prepares nothing, found {spec.name}")

    def warnings(self, spec: MethodSpec, cohort: Cohort) -> list[str]:
        """Say what of a method cannot be computed, though it was asked for."""
        return []

    def left_out(self, cohort: Cohort) -> Mapping[str, int]:
        """Count the recordings that a task which chooses its own leaves out, by reason."""
        return {}

    def hashed_data(self, cohort: Cohort) -> str:
        """Return a hash of what the numbers depend on besides the data set and the settings, "" if nothing."""
        return ""

    def scores(self, outputs: Sequence[tuple[MethodSpec, UnitOutput]], context: ScoreContext) -> list[Score] | None:
        """Make the scores, where they are no functions of sums; None = they are, `groupings` says of which."""
        return None

    def groupings(self, table: pd.DataFrame) -> list[tuple[pd.DataFrame, Grouping]]:
        """Divide the tables of all methods into parts that are resampled alike."""
        return []

    def reference(self) -> str:
        """Name the baseline that every method is compared with: ``auto`` = the best on validation, "" = none."""
        return ""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of work, small and plain."""

    task: str
    spec: MethodSpec
    key: str
    needs: tuple[Unit, ...] = ()
    """Units that must be done before."""
    is_preparation: bool = False
    """It leaves arrays that others need, and no table of results."""

    @property
    def stem(self) -> str:
        what = re.sub(r"[^A-Za-z0-9_.]+", "-", f"{self.spec.name} {self.spec.part}").strip("-")
        return f"{FOLDER}/{self.task}--{what}--{self.key}"

    @property
    def label(self) -> str:
        return f"{self.task}: {self.spec.name}" + (f", {self.spec.part}" if self.spec.part else "")


def is_done(store: Store, unit: Unit) -> bool:
    return store.exists(f"{unit.stem}.parquet")


def write_output(store: Store, unit: Unit, output: UnitOutput) -> None:
    """Write a unit's files, each atomically, the table last: a unit with a table is complete."""
    for name, frame in (("parcels", output.parcels), ("validation", output.validation)):
        if frame is not None:
            store.write_bytes(f"{unit.stem}.{name}.parquet", to_parquet(frame))
    if output.examples:
        store.write_bytes(f"{unit.stem}.examples.npz", to_npz(output.examples))
    store.write_bytes(f"{unit.stem}.parquet", to_parquet(output.table))


def read_output(store: Store, unit: Unit) -> UnitOutput:
    """Read what `write_output` left.

    Raises
    ------
    StoreError
        If a file is damaged, naming the files to remove.
    """
    examples = None
    more: dict[str, pd.DataFrame] = {}
    try:
        for name in ("parcels", "validation"):
            if store.exists(f"{unit.stem}.{name}.parquet"):
                more[name] = pd.read_parquet(io.BytesIO(store.read_bytes(f"{unit.stem}.{name}.parquet")))
        if store.exists(f"{unit.stem}.examples.npz"):
            with np.load(io.BytesIO(store.read_bytes(f"{unit.stem}.examples.npz")), allow_pickle=False) as archive:
                examples = {name: archive[name] for name in archive.files}
        table = pd.read_parquet(io.BytesIO(store.read_bytes(f"{unit.stem}.parquet")))
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:  # pyarrow's errors are ValueErrors
        files = f"{store.url_of(unit.stem)}.*"
        raise StoreError(f"{files} is damaged; remove these files and run again: {error}") from error
    return UnitOutput(table=table, examples=examples or {}, **more)


def together(outputs: Sequence[tuple[MethodSpec, UnitOutput]]) -> list[tuple[MethodSpec, UnitOutput]]:
    """Put the pieces of each method's work together, in the order in which methods first appear."""
    pieces: dict[str, list[tuple[MethodSpec, UnitOutput]]] = {}
    for spec, output in outputs:
        pieces.setdefault(spec.name, []).append((spec, output))
    found = []
    for of_one in pieces.values():
        spec, first = of_one[0]
        if len(of_one) > 1:
            validations = [output.validation for _, output in of_one if output.validation is not None]
            first = replace(
                first,
                table=pd.concat([output.table for _, output in of_one], ignore_index=True),
                validation=pd.concat(validations, ignore_index=True) if validations else None,
            )
        found.append((replace(spec, part=""), first))
    return found


def write_features(store: Store, unit: Unit, features: Features) -> None:
    """Write what a preparation made, and last the list of it: a unit with a list is complete."""
    for name, array in features.items():
        with store.new_file(f"{unit.stem}.{name}.npy") as path, path.open("wb") as file:
            np.save(file, array, allow_pickle=False)
    store.write_bytes(f"{unit.stem}.parquet", to_parquet(pd.DataFrame({"feature": list(features)})))


class StoredFeatures(Mapping[str, NDArray[Any]]):
    """What `write_features` left, read when it is asked for; from a local disk it is mapped, not copied to memory.

    Raises
    ------
    StoreError
        If a file is damaged, naming the files to remove.
    """

    def __init__(self, store: Store, unit: Unit) -> None:
        self.store, self.stem = store, unit.stem
        with self._reading():
            table = pd.read_parquet(io.BytesIO(store.read_bytes(f"{unit.stem}.parquet")))
        self.names = [str(name) for name in table["feature"]]

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self.names:
            raise KeyError(name)
        file = f"{self.stem}.{name}.npy"
        with self._reading():
            if self.store.is_local:
                mapped: NDArray[Any] = np.load(self.store.path(file), mmap_mode="r", allow_pickle=False)
                return mapped
            loaded: NDArray[Any] = np.load(io.BytesIO(self.store.read_bytes(file)), allow_pickle=False)
            return loaded

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, EOFError, OSError) as error:
            files = f"{self.store.url_of(self.stem)}.*"
            raise StoreError(f"{files} is damaged; remove these files and run again: {error}") from error


def to_parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def to_npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()
