"""Who trains and who tests: groups of recordings go to splits by hash, so that new subjects move nobody."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from brainlm.dataset import SPLITS
from brainlm.errors import DataError
from data_prep.settings import SplitSettings

MAX_LISTED = 5  # how many things a message spells out
KINDS = ("subject", "group", "series")


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitItem:
    """What the split of one recording depends on.

    ``group`` is "" where the recording's own is unknown, ``site`` likewise; ``series_sha256`` may be "" where no other
    recording has the same series; ``given`` is the split that the user's table says, "" = none.
    """

    recording_id: str
    subject: str
    group: str
    series_sha256: str
    site: str = ""
    given: str = ""

    @property
    def joins(self) -> tuple[str, str, str]:
        """Return subject, group and series: recordings that share one of them stay together. "" joins nothing."""
        return self.subject, self.group, self.series_sha256


def find_duplicates(items: Sequence[SplitItem]) -> list[list[str]]:
    """Return the ids of recordings that hold the same series, one sorted list a series."""
    counts = Counter(item.series_sha256 for item in items if item.series_sha256)
    by_series: dict[str, list[str]] = {}
    for item in items:
        if counts[item.series_sha256] > 1:
            by_series.setdefault(item.series_sha256, []).append(item.recording_id)
    return sorted(sorted(ids) for ids in by_series.values())


def unit_hash(seed: int, group: str) -> float:
    """Return a number in [0, 1) that depends on seed and group alone."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


def assign_splits(
    items: Sequence[SplitItem], settings: SplitSettings, placed: Mapping[str, str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """Return the split of each recording, and why some can have none.

    Recordings of one subject, of one group, and with one and the same series are kept together; the smallest name
    among those joined is hashed. Adding subjects moves nobody, unless a new one joins two groups. Whatever is joined to
    a recording of `SplitSettings.test_sites` is in test with it (`notes_on_test_sites` lists it).

    Parameters
    ----------
    items : sequence of SplitItem
        All recordings, those of `placed` included.
    settings : SplitSettings
    placed : mapping, optional
        Splits of recordings that a data set holds already. They stay; new recordings that are joined to them get their
        split. Empty splits are then no error.

    Returns
    -------
    splits : list of str
        train, val or test for each item, "" for one of `reasons`.
    reasons : dict
        Recording id to reason, for new recordings that would join what is in different splits already. Which one of
        several is refused depends on the order of their ids, not on that of `items`.

    Raises
    ------
    DataError
        If a recording has no split in `SplitSettings.column`, or recordings that belong together have different ones;
        if a site of `SplitSettings.test_sites` has no recording; if a split with a share above 0 stays empty, unless
        the column gives the splits.
    """
    placed = placed or {}
    fresh = _Chosen(items, _by_id(items, placed))
    if settings.column is not None:
        _check_given(fresh, settings.column)
    if settings.test_sites and not placed:
        _check_sites(items, settings.test_sites)
    joined = _Joined()
    split_at: dict[int, dict[str, SplitItem]] = {}  # of a joined set: its splits, each with a recording that is there
    for item in items:
        if item.recording_id in placed:
            _merge(joined, split_at, item, placed[item.recording_id])
    reasons: dict[str, str] = {}
    for item in fresh:
        wanted = _wanted(item, settings)
        if placed and (reason := _contradiction(joined, split_at, item, wanted, settings)):
            reasons[item.recording_id] = reason
        else:
            _merge(joined, split_at, item, wanted)
    names: dict[int, str] = {}
    for item in items:
        if item.recording_id not in reasons:
            name = f"group:{item.group}" if item.group else f"subject:{item.subject}"
            root = joined.root(joined.nodes(item)[0])
            names[root] = min(name, names.get(root, name))
    split_of = {
        root: next(iter(split_at[root])) if split_at.get(root) else _by_hash(name, settings)
        for root, name in names.items()
    }
    splits = [
        ""
        if item.recording_id in reasons
        else placed.get(item.recording_id) or split_of[joined.root(joined.nodes(item)[0])]
        for item in items
    ]
    if not placed and settings.column is None:
        _check_none_empty(items, splits, len(names), settings)
    return splits, reasons


def notes_on_test_sites(items: Sequence[SplitItem], settings: SplitSettings) -> list[str]:
    """Say which recordings are in test because something joins them to `SplitSettings.test_sites`, one line or none."""
    if not settings.test_sites:
        return []
    roots = _join(items)
    with_them = {root for item, root in zip(items, roots) if item.site in settings.test_sites}
    pulled = sorted(
        f"{item.recording_id} ({item.site or 'no site'})"
        for item, root in zip(items, roots)
        if root in with_them and item.site not in settings.test_sites
    )
    if not pulled:
        return []
    return [
        f"{len(pulled)} recordings of other sites are in test too, because subject, group or series joins them to "
        f"{', '.join(settings.test_sites)} (splits.test_sites): {_some(pulled)}"
    ]


def leave_one_out_folds(items: Sequence[SplitItem], by: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide recordings into folds of which each can be left out, such as sites.

    Recordings of one subject, of one group, or with equal series are never in two folds: values of `by` that such
    recordings share make one fold, called ``A+B``.

    Parameters
    ----------
    items : sequence of SplitItem
    by : sequence of str
        A value for each item, "" = unknown. A recording of unknown value is in the fold of what it is joined to, else
        in none.

    Returns
    -------
    folds : list of str
        The fold of each item, "" = none; "" for all where there would be fewer than two folds.
    notes : list of str
        Which values were joined and why, and how many recordings are in no fold.
    """
    if len(items) != len(by):
        raise ValueError(f"{len(items)} items but {len(by)} values")
    roots = _join(items)
    value_at: dict[int, str] = {}
    several_at: dict[int, set[str]] = {}
    for root, value in zip(roots, by):
        if value and value_at.setdefault(root, value) != value:
            several_at.setdefault(root, {value_at[root]}).add(value)
    together: dict[str, set[str]] = {value: {value} for value in by if value}
    for values in several_at.values():
        everyone = set().union(*(together[value] for value in values))
        for value in everyone:
            together[value] = everyone
    name_of = {value: "+".join(sorted(everyone)) for value, everyone in together.items()}
    folds = [name_of[value_at[root]] if root in value_at else "" for root in roots]
    notes = []
    for name in sorted({name_of[value] for value, everyone in together.items() if len(everyone) > 1}):
        sets = {root for root in several_at if name_of[value_at[root]] == name}
        first = min(sets)
        example = [f"{i.recording_id} ({v})" for i, root, v in zip(items, roots, by) if root == first and v]
        notes.append(
            f"{name} is one fold: {len(sets)} sets of recordings that belong together (by subject, group or equal "
            f"series) are in several of these, for example {_some(sorted(example))}"
        )
    if len(set(folds) - {""}) < 2:
        return [""] * len(items), notes
    if num_without := folds.count(""):
        notes.append(f"{num_without} recordings of unknown site are in no fold")
    return folds, notes


class _Chosen(Sequence[SplitItem]):
    """Some of the items in an order of their own, none of them held."""

    def __init__(self, items: Sequence[SplitItem], positions: Sequence[int]) -> None:
        self._items, self._positions = items, positions

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> SplitItem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SplitItem]: ...
    def __getitem__(self, index: int | slice) -> SplitItem | Sequence[SplitItem]:
        if isinstance(index, slice):
            return _Chosen(self._items, self._positions[index])
        return self._items[self._positions[index]]


def _by_id(items: Sequence[SplitItem], left_out: Mapping[str, str]) -> list[int]:
    """Return the positions of the items that are not left out, in the order of their ids."""
    ids = [item.recording_id for item in items]
    return sorted((n for n, name in enumerate(ids) if name not in left_out), key=ids.__getitem__)


class _Joined:
    """Sets of subjects, groups and series that recordings have joined (union-find over small integers)."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._number: tuple[dict[str, int], ...] = ({}, {}, {})

    def nodes(self, item: SplitItem) -> list[int]:
        """Return the numbers of the item's subject, group and series, without those that are ""."""
        found = []
        for number, value in zip(self._number, item.joins):
            if value:
                node = number.get(value)
                if node is None:
                    node = number[value] = len(self._parent)
                    self._parent.append(node)
                found.append(node)
        return found

    def root(self, node: int) -> int:
        parent = self._parent
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    def merge(self, nodes: Sequence[int]) -> tuple[int, list[int]]:
        """Make one set of several; return its root, and the roots that are none any more."""
        roots = sorted({self.root(node) for node in nodes})
        for other in roots[1:]:
            self._parent[other] = roots[0]
        return roots[0], roots[1:]


def _join(items: Sequence[SplitItem]) -> list[int]:
    """Return for each item the number of the set of those that it is joined to."""
    joined = _Joined()
    for item in items:
        joined.merge(joined.nodes(item))
    return [joined.root(joined.nodes(item)[0]) for item in items]


def _merge(joined: _Joined, split_at: dict[int, dict[str, SplitItem]], item: SplitItem, split: str) -> None:
    root, gone = joined.merge(joined.nodes(item))
    if split or any(other in split_at for other in gone):
        here = split_at.setdefault(root, {})
        for other in gone:
            for name, example in split_at.pop(other, {}).items():
                here.setdefault(name, example)
        if split:
            here.setdefault(split, item)


def _wanted(item: SplitItem, settings: SplitSettings) -> str:
    if settings.column is not None:
        return item.given
    return "test" if item.site in settings.test_sites else ""


def _contradiction(
    joined: _Joined, split_at: dict[int, dict[str, SplitItem]], item: SplitItem, wanted: str, settings: SplitSettings
) -> str:
    """Return why a new recording has no place, "" if it has one."""
    facts: dict[str, str] = {}
    if wanted:
        source = f"splits.column {settings.column}" if settings.column is not None else "splits.test_sites"
        facts[wanted] = f"{source} puts it in {wanted}"
    kinds = [kind for kind, value in zip(KINDS, item.joins) if value]
    for kind, node in zip(kinds, joined.nodes(item)):
        for split, other in split_at.get(joined.root(node), {}).items():
            facts.setdefault(split, f"its {kind} joins it to {other.recording_id}, which is in {split}")
    if len(facts) < 2:
        return ""
    return f"{', but '.join(facts.values())}: nobody changes the split in a data set, so there is no place for it"


def _by_hash(name: str, settings: SplitSettings) -> str:
    place, fractions = unit_hash(settings.seed, name), settings.fractions
    if place < fractions["test"]:
        return "test"
    return "val" if place < fractions["test"] + fractions["val"] else "train"


def _check_given(items: Sequence[SplitItem], column: str) -> None:
    """Check the splits of items that are in the order of their ids."""
    without = [f"{item.recording_id} ({item.given or 'empty'})" for item in items if item.given not in SPLITS]
    if without:
        raise DataError(
            f"splits.column {column}: expected train, val or test for every recording, {len(without)} have something "
            f"else: {_some(sorted(without))}. Fill the column, or leave these recordings out of the table"
        )
    first: tuple[dict[str, SplitItem], ...] = ({}, {}, {})
    wrong = []
    for item in items:
        for kind, seen, value in zip(KINDS, first, item.joins):
            other = seen.setdefault(value, item)
            if value and other.given != item.given:
                what = f"{kind} {value}" if kind != "series" else "equal series"
                wrong.append(f"{what}: {other.recording_id} in {other.given}, {item.recording_id} in {item.given}")
                break
    if wrong:
        raise DataError(
            f"splits.column {column}: recordings of one subject, of one group (splits.group_by) and with equal series "
            f"must have one split, found {len(wrong)} that do not: {_some(wrong, '; ')}. Correct the column"
        )


def _check_sites(items: Sequence[SplitItem], sites: Sequence[str]) -> None:
    known = {item.site for item in items}
    unknown = [site for site in sites if site not in known]
    if unknown:
        there = _some(sorted(known - {""})) or "none (set source.columns.site)"
        raise DataError(f"splits.test_sites: no recording is from {', '.join(unknown)}; sites are {there}")


def _check_none_empty(
    items: Sequence[SplitItem], splits: Sequence[str], num_groups: int, settings: SplitSettings
) -> None:
    counts = dict.fromkeys(SPLITS, 0) | Counter(splits)
    empty = [split for split in SPLITS if settings.fractions[split] > 0 and counts[split] == 0]
    if not empty:
        return
    subjects = len({item.subject for item in items})
    by = "" if settings.group_by == "subject" else f"by {settings.group_by} and "
    merged = f" (all that is left of {subjects} subjects, joined {by}by equal series)" if num_groups < subjects else ""
    raise DataError(
        f"no recordings in {' and '.join(empty)}: {num_groups} groups{merged} gave "
        f"{', '.join(f'{split} {count}' for split, count in counts.items())} recordings by hash. Add subjects, take "
        "another splits.seed, set the split's fraction to 0, or give the splits (splits.column)"
    )


def _some(lines: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
    return separator.join(lines[:MAX_LISTED]) + more
