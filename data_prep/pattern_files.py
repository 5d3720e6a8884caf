"""The pattern source: recordings found by a template of their paths, such as ``{subject}/func/{task}_clean.nii.gz``.

The Human Connectome Project and UK Biobank are such layouts; their patterns are configs (``hcp_cifti.yaml``,
``ukb_parcels.yaml``). Tables of confounds and warps are found by templates with the same fields, and belong to the
recording that agrees with theirs. Two files of one recording are an error: a wildcard that takes in too much must
show.
"""

from __future__ import annotations

from dataclasses import replace

from brainlm.errors import DataError
from data_prep.input_files import Found, check_pattern, fields_of, file_stamp, find_files, join
from data_prep.packed_entries import PackedEntries
from data_prep.phenotypes import join_subjects, no_participants, read_participants
from data_prep.settings import SourceSettings
from data_prep.source_entry import Source, SourceEntry
from data_prep.words import denoised_by, recording_id_of, space_of


def find_pattern_recordings(settings: SourceSettings, split_column: str | None = None) -> Source:
    """List the recordings that fit ``source.pattern``, with what belongs to them.

    Raises
    ------
    DataError
        If a pattern is wrong or has no ``{subject}``, the folder is absent, or several tables of confounds (or warps)
        fit one recording.
    """
    assert settings.pattern is not None
    check_pattern(settings.pattern)
    own = fields_of(settings.pattern)
    if "subject" not in own:
        raise DataError(f"source.pattern {settings.pattern!r} must have the field {{subject}}")
    found = find_files(settings.path, settings.pattern)
    if not found:
        raise DataError(f"no file under {settings.path} fits source.pattern {settings.pattern!r}")
    confounds = _Beside(settings, "confounds_pattern", own)
    warps = _Beside(settings, "warp", own)
    participants = no_participants("source.participants")
    if settings.participants is not None:
        participants = read_participants(settings.participants, settings, split_column)
    reference_stamp = file_stamp(settings.warp_reference) if settings.warp_reference else ""
    if settings.warp_reference and not reference_stamp:
        raise DataError(f"there is no source.warp_reference {settings.warp_reference}")

    def entry_of(item: Found) -> SourceEntry:
        words = dict.fromkeys(("subject", "session", "task", "run", "site"), "") | item.fields
        words["subject"] = subject = words["subject"].removeprefix("sub-")
        table, warp = confounds.of(item), warps.of(item)
        entry = SourceEntry(
            recording_id=recording_id_of(words),
            subject=subject,
            session=words["session"].removeprefix("ses-"),
            task=words["task"],
            run=words["run"],
            site=words["site"] or participants.site(subject),
            family=participants.family(subject),
            file=join(settings.path, item.path),
            source=item.path,
            space=(settings.space if settings.warp else space_of(item.path) or settings.space) or "",
            tr_s=settings.tr_s,
            tr_from="source.tr_s",
            confounds=join(settings.path, table.path) if table else "",
            mean_fd_mm=participants.mean_fd_mm(subject),
            denoised=denoised_by(item.path) or settings.denoised or "",
            split=participants.split(split_column, subject) if split_column else "",
            file_stamp=item.stamp,
            confounds_stamp=table.stamp if table else "",
        )
        if settings.warp is not None and warp is None:
            entry = replace(entry, refusal=f"native space: there is no warp to the template ({settings.warp})")
        elif warp is not None:
            assert settings.warp_reference is not None
            entry = replace(
                entry,
                warp=join(settings.path, warp.path),
                warp_stamp=warp.stamp,
                warp_reference=settings.warp_reference,
                warp_reference_stamp=reference_stamp,
            )
        return entry

    entries = PackedEntries(map(entry_of, found))
    subjects, notes = join_subjects((entry.subject for entry in entries), participants, settings.allow_unlisted)
    return Source(entries, subjects, {"num_files": len(found)}, notes)


class _Beside:
    """Files that belong to recordings by the fields in their paths."""

    def __init__(self, settings: SourceSettings, setting: str, own: tuple[str, ...]) -> None:
        self.pattern: str | None = getattr(settings, setting)
        self.files: dict[tuple[str, ...], Found] = {}
        if self.pattern is None:
            return
        check_pattern(self.pattern)
        self.fields = fields_of(self.pattern)
        foreign = [name for name in self.fields if name not in own]
        if foreign or "subject" not in self.fields:
            raise DataError(
                f"source.{setting} {self.pattern!r} must have the field {{subject}} and no field that source.pattern "
                f"has not ({', '.join(own)})"
            )
        for item in find_files(settings.path, self.pattern):
            key = tuple(item.fields[name] for name in self.fields)
            if key in self.files:
                raise DataError(
                    f"source.{setting} {self.pattern!r}: two files belong to one recording: {self.files[key].path} and "
                    f"{item.path}"
                )
            self.files[key] = item

    def of(self, item: Found) -> Found | None:
        if self.pattern is None:
            return None
        return self.files.get(tuple(item.fields[name] for name in self.fields))
