"""Which subjects a head is trained on, validated on and tested on."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from brainlm.errors import ConfigError
from brainlm.folds import fold_of_group, in_order
from brainlm.input_contract import InputContract
from brainlm.members import Member, Members
from brainlm.store import Store
from brainlm.train_subjects import TrainSubjects
from train.finetune_settings import SplitSettings
from train.split_file import read_split_file

ROLES = ("train", "val", "test")
SPLIT = "split.parquet"


@dataclass(frozen=True, eq=False)
class SubjectSplit:
    """Recordings by role, and what was left out.

    ``num_pretraining_subjects``: those that the checkpoint was pretrained on, or their families, among all roles; None
    where it does not say whom it was trained on.
    """

    roles: dict[str, list[Member]]
    num_pretraining_subjects: int | None
    left_out: dict[str, str] = field(default_factory=dict)
    """Reason by recording id."""

    def num_subjects(self, role: str) -> int:
        return len({member.subject for member in self.roles[role]})


def split_subjects(
    source: Members, settings: SplitSettings, pretrained_on: TrainSubjects | None, contract: InputContract
) -> SubjectSplit:
    """Divide the recordings of a data set.

    Parameters
    ----------
    pretrained_on : TrainSubjects or None
        Of the checkpoint; None = it does not say.
    contract : InputContract
        Of the checkpoint: recordings that it cannot be fed are left out.

    Raises
    ------
    ConfigError
        If the checkpoint was pretrained on subjects of a given split or on their families, or may have been, and the
        settings do not allow it; if a given split divides subjects or families; if a role stays empty.
    """
    left_out: dict[str, str] = {}
    members = []
    for member in source.all:
        if reason := source.why_unreadable(member, contract):
            left_out[member.recording_id] = reason
        else:
            members.append(member)
    groups_seen = set() if pretrained_on is None else source.groups_seen(pretrained_on)
    if pretrained_on is None and not settings.allow_pretraining_subjects:
        raise ConfigError(
            "the checkpoint does not say whom it was pretrained on: its scores on these subjects may be too high. Set "
            "split.allow_pretraining_subjects=true to go on; every result then shows it"
        )
    where = f"split.of={settings.of}"
    if settings.column is not None:
        where = f"split.column={settings.column}"
        role_of = _given(where, source.values(settings.column, members), members, left_out)
    elif settings.file is not None:
        where = f"split.file={settings.file}"
        file = read_split_file(settings.file, settings.file_sha256)
        file.check_known(source.all)
        left_out |= {member.recording_id: f"not in {where}" for member in members if file.of(member) is None}
        members = [member for member in members if file.of(member) is not None]
        role_of = _given(where, [file.of(member) for member in members], members, left_out)
    elif settings.of == "dataset":
        role_of = {member.recording_id: member.split for member in members}
    else:
        if not settings.allow_pretraining_subjects:
            for member in members:
                if member.group in groups_seen:
                    left_out[member.recording_id] = "the checkpoint was pretrained on this subject, or on its family"
        role_of = _new([m for m in members if m.recording_id not in left_out], settings)
    members = [member for member in members if member.recording_id in role_of]
    roles = {role: [m for m in members if role_of[m.recording_id] == role] for role in ROLES}
    found = {member.subject for member in members if member.group in groups_seen}
    if found and not settings.allow_pretraining_subjects:
        raise ConfigError(
            f"{where}: the checkpoint was pretrained on {len(found)} of the {len({m.subject for m in members})} "
            "subjects, by their ids, or on their families: its scores would be too high for new ones. Take "
            "split.of=unseen, or set split.allow_pretraining_subjects=true; every result then shows it"
        )
    _check_undivided(members, role_of)
    empty = [role for role in ROLES if not roles[role]]
    if empty:
        counts = ", ".join(f"{role} {len({m.subject for m in roles[role]})}" for role in ROLES)
        why = f"; {len(left_out)} recordings were left out ({next(iter(left_out.values()))})" if left_out else ""
        raise ConfigError(f"no subjects in {' and '.join(empty)} (subjects: {counts}){why}")
    return SubjectSplit(roles, None if pretrained_on is None else len(found), left_out)


def write_split(store: Store, source: Members, split: SubjectSplit) -> None:
    """Write who has which role: one row a recording, those that were left out with the reason."""
    import pandas as pd

    role_of = {member.recording_id: role for role, members in split.roles.items() for member in members}
    rows = [
        {
            "recording_id": member.recording_id, "subject": member.subject, "group": member.group,
            "split": role_of.get(member.recording_id, ""), "left_out": split.left_out.get(member.recording_id, ""),
        }
        for member in source.all
    ]  # fmt: skip
    buffer = io.BytesIO()
    pd.DataFrame(rows).to_parquet(buffer)
    store.write_bytes(SPLIT, buffer.getvalue())


def _given(where: str, values: Sequence[Any], members: Sequence[Member], left_out: dict[str, str]) -> dict[str, str]:
    """Return the roles that a column or file gives to recordings; who is given none is left out."""
    role_of = {}
    for member, value in zip(members, values, strict=True):
        role = "" if value is None else str(value).strip()
        if not role:
            left_out[member.recording_id] = f"{where} is empty"
        elif role not in ROLES:
            raise ConfigError(f"{where}: expected train, val, test or nothing, found {role!r}")
        else:
            role_of[member.recording_id] = role
    return role_of


def _new(members: Sequence[Member], settings: SplitSettings) -> dict[str, str]:
    """Divide groups in the order of their hashes; with fractions, at the group in which a share of subjects ends."""
    subjects: dict[str, set[str]] = {}
    for member in members:
        subjects.setdefault(member.group, set()).add(member.subject)
    role_of_group = {}
    if settings.folds is not None:
        test, val = settings.fold, (settings.fold + 1) % settings.folds
        for group, part in fold_of_group(subjects, settings.folds, settings.seed).items():
            role_of_group[group] = "test" if part == test else "val" if part == val else "train"
    else:
        total, before = sum(map(len, subjects.values())), 0
        for group in in_order(subjects, settings.seed):
            middle = (before + len(subjects[group]) / 2) / total
            share = settings.fractions["test"]
            role_of_group[group] = (
                "test" if middle < share else "val" if middle < share + settings.fractions["val"] else "train"
            )
            before += len(subjects[group])
    return {member.recording_id: role_of_group[member.group] for member in members}


def _check_undivided(members: Sequence[Member], role_of: dict[str, str]) -> None:
    first: dict[str, Member] = {}
    for member in members:
        other = first.setdefault(member.group, member)
        if role_of[other.recording_id] != role_of[member.recording_id]:
            raise ConfigError(
                f"the split divides what belongs together (a subject, a family, or equal series): {other.recording_id} "
                f"is in {role_of[other.recording_id]}, {member.recording_id} in {role_of[member.recording_id]}"
            )
