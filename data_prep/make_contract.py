"""The input contract of a data set: made from its own train recordings, or taken over from a checkpoint."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pandas as pd

from brainlm import input_contract
from brainlm.config import to_tree
from brainlm.errors import ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.store import Store
from data_prep.atlas_image import AtlasImage, load_atlas, series_atlas
from data_prep.clean import leak_flags
from data_prep.contract_statistics import compute_statistics
from data_prep.held_dataset import HeldDataset
from data_prep.resample import SAME_TR, future_s
from data_prep.settings import PrepareSettings, WindowSettings
from data_prep.stored_table import Table
from data_prep.work import Workers

FACTS = ["num_timepoints", "num_kept", "source_tr_s", "resampled", "denoised"]
ORDER = (
    "parcel means; dummy scans dropped; confounds, trend and frequencies outside of the pass band removed in one "
    "projection fitted on kept timepoints; censored timepoints interpolated; resampled"
)


WITHDRAWN = "were withdrawn since median and IQR were computed; they are among them, and nowhere else"


def read_contract(url: str) -> InputContract:
    """Read the input contract of a checkpoint or of a data set."""
    store = Store(url)
    if not store.exists(input_contract.FILE_NAME):
        raise ConfigError(
            f"contract: there is no {input_contract.FILE_NAME} in {url}; expected the folder of a checkpoint or a "
            "data set"
        )
    return InputContract.from_json(store.read_json(input_contract.FILE_NAME), store.url_of(input_contract.FILE_NAME))


def with_contract(settings: PrepareSettings, given: InputContract | None) -> PrepareSettings:
    """Return the settings with filter, TR and windows of a given contract, which the settings must not contradict.

    Confounds stay those of the settings: how a scan must be cleaned depends on how it was acquired and preprocessed.
    """
    if given is None:
        return settings
    theirs = {
        "clean.high_pass_hz": given.high_pass_hz,
        "clean.low_pass_hz": given.low_pass_hz,
        "target_tr_s": given.tr_s,
    }
    ours = {
        "clean.high_pass_hz": settings.clean.high_pass_hz,
        "clean.low_pass_hz": settings.clean.low_pass_hz,
        "target_tr_s": settings.target_tr_s,
    }
    against = [
        f"{name}: {ours[name]:g} here, {theirs[name]} in the contract"
        for name in theirs
        if ours[name] is not None and ours[name] != theirs[name]
    ]
    if against:
        raise ConfigError(f"settings contradict the contract {settings.contract}: {'; '.join(against)}. Leave them out")
    clean = replace(
        settings.clean,
        high_pass_hz=given.high_pass_hz,
        low_pass_hz=given.low_pass_hz,
        detrend=settings.clean.detrend or bool(given.cleaning.get("detrend")),
    )
    windows = WindowSettings(window_len=given.window_len, patch_len=given.patch_len)
    if settings.windows not in (windows, WindowSettings()):
        raise ConfigError(
            f"settings contradict the contract {settings.contract}: windows of {settings.windows.window_len} in "
            f"patches of {settings.windows.patch_len} here, {given.window_len} in {given.patch_len} there. Leave "
            "them out"
        )
    return replace(settings, clean=clean, target_tr_s=given.tr_s, windows=windows)


def choose_atlas(settings: PrepareSettings, given: InputContract | None) -> AtlasImage:
    """Return the atlas of the settings, which must fit the given contract, or else that of the contract.

    Raises
    ------
    ConfigError
        If the two atlases do not have the same parcels in the same order, listing the differences.
    """
    if settings.atlas is None:
        assert given is not None
        return series_atlas(given.atlas)
    atlas = load_atlas(settings.atlas)
    if given is not None and (found := given.atlas.differences(atlas.atlas)):
        listed = "\n".join(f"  - {line}" for line in found)
        raise ConfigError(f"the atlas {settings.atlas.name} does not have the contract's parcels:\n{listed}")
    return atlas


def common_tr_s(settings: PrepareSettings, table: Table) -> float:
    """Return the TR of the data set: the target, else the one of all recordings, else the longest of theirs."""
    if settings.target_tr_s is not None:
        return settings.target_tr_s
    counts = Counter(table["source_tr_s"].tolist())
    tr_s = float(counts.most_common(1)[0][0])
    if any(abs(other - tr_s) > SAME_TR * tr_s for other in counts):
        return float(max(counts))
    return tr_s


def make_contract(
    settings: PrepareSettings,
    atlas: AtlasImage,
    staging: Store,
    table: Table,
    tr_s: float,
    given: InputContract | None,
    run: Workers,
) -> tuple[InputContract, list[str]]:
    """Freeze what a model must be fed; return the contract and what a reader should know about its statistics.

    Statistics come from the train recordings alone, or from `given`; the cohort's own are then compared with them.
    """
    own = settings.statistics != "contract" and (given is None or settings.statistics == "cohort")
    is_train = (table["split"] == "train").to_numpy(dtype=bool)
    if own and not is_train.any():
        raise DataError("no recordings to train on, so there is nothing to compute median and IQR from")
    measured = table[["recording_id", "subject"]]
    measured = measured[is_train] if is_train.any() else measured
    who = f"{len(measured)} {'train ' if is_train.any() else ''}recordings ({measured['subject'].nunique()} subjects)"
    covered, median, iqr = compute_statistics(staging, measured["recording_id"].tolist(), atlas.atlas.num_parcels, run)
    facts = table[FACTS]
    contract = InputContract(
        atlas=atlas.atlas,
        covered=covered,
        median=median,
        iqr=iqr,
        tr_s=tr_s,
        window_len=settings.windows.window_len,
        patch_len=settings.windows.patch_len,
        high_pass_hz=settings.clean.high_pass_hz,
        low_pass_hz=settings.clean.low_pass_hz,
        cleaning=cleaning_tree(settings, facts),
        statistics_from=f"all kept timepoints of the {who} of {settings.name}",
        num_statistics_recordings=len(measured),
        flags=contract_flags(settings, facts, tr_s),
    )
    if own or given is None:
        return contract, []
    notes = [f"against the contract: {line}" for line in given.adaptable_differences(contract)]
    ours, theirs = contract.cleaning, given.cleaning
    notes += [
        f"cleaning differs from the contract's: {name} {ours.get(name)} here, {theirs.get(name)} there"
        for name in ("strategy", "confounds", "global_signal")
        if ours.get(name) != theirs.get(name)
    ]
    adopted = replace(
        contract,
        covered=given.covered,
        median=given.median,
        iqr=given.iqr,
        statistics_from=f"the contract of {settings.contract}: {given.statistics_from}",
        num_statistics_recordings=given.num_statistics_recordings,
    )
    return adopted, notes


def cleaning_tree(settings: PrepareSettings, table: pd.DataFrame) -> dict[str, Any]:
    """Return what was done to the series, for the contract."""
    return {
        **to_tree(settings.clean),
        "order": ORDER,
        "resampled_from_tr_s": sorted(set(table.loc[table["resampled"], "source_tr_s"].tolist())),
        "denoised_before": sorted(set(table["denoised"].tolist()) - {""}),
        "min_parcel_coverage": settings.checks.min_parcel_coverage,
    }


def contract_flags(settings: PrepareSettings, table: pd.DataFrame, tr_s: float) -> tuple[str, ...]:
    """List what every score on the data set must show, most of all how the future leaks into the past."""
    flags = list(leak_flags(settings.clean))
    resampled_from = set(table.loc[table["resampled"], "source_tr_s"].tolist())
    if resampled_from:
        reach_s = max(future_s(value, tr_s) for value in resampled_from)
        flags.append(f"resampled with a symmetric kernel: a timepoint depends on up to {reach_s:.1f} s after it")
    for name in sorted(set(table["denoised"].tolist()) - {""}):
        flags.append(f"denoised with {name} before: fitted over whole runs, each timepoint depends on later ones")
    num_censored = int((table["num_timepoints"] - table["num_kept"]).sum())
    if num_censored:
        share = num_censored / int(table["num_timepoints"].sum())
        flags.append(f"{share:.1%} of the timepoints are censored: interpolated, neither trained on nor scored")
    return tuple(flags)


def frozen_contract(held: HeldDataset, settings: PrepareSettings, table: Table) -> InputContract:
    """Return a data set's contract after recordings were added: same statistics, facts of old and new recordings."""
    both = pd.concat([held.recordings[FACTS], table[FACTS]], ignore_index=True)
    kept = tuple(flag for flag in held.contract.flags if flag.endswith(WITHDRAWN))
    facts = cleaning_tree(settings, both)
    return replace(
        held.contract,
        flags=(*contract_flags(settings, both, held.contract.tr_s), *kept),
        cleaning=held.contract.cleaning | {name: facts[name] for name in ("resampled_from_tr_s", "denoised_before")},
    )
