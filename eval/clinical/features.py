"""What recordings are described by, computed once for all folds: connectivity, raw series, embeddings of a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainlm.embedding import embed_recording
from brainlm.ordering import even_starts
from eval.clinical.coordinates import gram_of
from eval.clinical.people import People
from eval.clinical.tangent import covariance
from eval.features import functional_connectivity

Features = Mapping[str, NDArray[Any]]
MAX_CORRELATION = 0.999


def fisher_z(people: People, row: int) -> NDArray[np.float32]:
    """Return the Fisher z of all pairs of parcels, the upper triangle row by row; 0 where a parcel is missing."""
    series = people.standardised(row)[people.kept(row)]
    matrix = functional_connectivity(np.ascontiguousarray(series.T))
    upper = matrix[np.triu_indices(len(matrix), 1)]
    return np.arctanh(np.clip(upper, -MAX_CORRELATION, MAX_CORRELATION)).astype(np.float32)


def connectivity(people: People) -> Features:
    """Return ``fisher_z`` (rows, P (P - 1) / 2), float32, and ``gram``, their inner products."""
    found = np.stack([fisher_z(people, row) for row in range(len(people))])
    return {"fisher_z": found, "gram": gram_of(lambda row: found[row], len(found))}


def covariances(people: People) -> Features:
    """Return ``covariance`` (rows, P, P), float32, of standardised series at kept timepoints, shrunk."""
    found = [covariance(people.standardised(row)[people.kept(row)]).astype(np.float32) for row in range(len(people))]
    return {"covariance": np.stack(found)}


def raw_series(people: People) -> Features:
    """Return ``gram``: inner products of the values of one window in the middle of each recording.

    Timepoints that are censored are 0, the mean.
    """
    window_len = people.cohort.window_len

    def values(row: int) -> NDArray[np.float32]:
        series, kept = people.standardised(row), people.kept(row)
        start = even_starts(len(series), window_len, 1)[0]
        part = slice(start, start + window_len)
        return np.where(kept[part, None], series[part], np.float32(0)).ravel()

    return {"gram": gram_of(values, len(people))}


def embeddings(people: People, model: Any, batch_size: int, per_parcel: bool) -> Features:
    """Return ``cls`` and ``pooled`` (rows, D), float32: means over the windows of a recording, nothing hidden.

    With `per_parcel` also ``parcels`` (rows, P, D), float16, NaN for parcels that the network was not shown, and
    ``parcels_gram``, their inner products, with the mean over all recordings for what was not shown.
    """
    found: dict[str, list[NDArray[Any]]] = {"cls": [], "pooled": []}
    for row in range(len(people)):
        embedded = embed_recording(
            model, people.recording(row), native_tr=True, batch_size=batch_size, per_parcel=per_parcel
        )
        found["cls"].append(embedded.mean_cls)
        found["pooled"].append(embedded.mean_pooled)
        if embedded.mean_parcels is not None:
            found.setdefault("parcels", []).append(embedded.mean_parcels.astype(np.float16))
    arrays = {name: np.stack(rows) for name, rows in found.items()}
    if per_parcel:
        parcels = arrays["parcels"]
        known = np.isfinite(parcels)
        total = np.where(known, parcels, 0).sum(axis=0, dtype=np.float64)
        mean = total / np.maximum(known.sum(axis=0), 1)
        # About the mean of all, so that inner products keep their digits; folds take their own mean off again.
        arrays["parcels_gram"] = gram_of(lambda row: np.nan_to_num(parcels[row] - mean).ravel(), len(parcels))
    return arrays
