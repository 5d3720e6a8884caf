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
    """Return ``fisher_z`` (rows, P (P - 1) / 2), float32, and ``gram``, inner products.

    In these a pair with a missing parcel has the mean of the recordings that have it, not 0: who lacks a parcel would
    else differ from all others first of all.
    """
    P = people.cohort.num_parcels
    found = np.empty((len(people), P * (P - 1) // 2), dtype=np.float32)
    for row in range(len(people)):
        found[row] = fisher_z(people, row)
    return {"fisher_z": found, "gram": centred_gram(found, found.dtype.type(0))}


def centred_gram(rows: NDArray[np.floating], missing: np.floating[Any]) -> NDArray[np.float64]:
    """Return inner products about the mean of all rows, which is also taken where a value is `missing`, 0 or NaN.

    Inner products keep their digits so; folds take the mean of their training rows off again, where nothing is missing.
    """

    def known(row: int) -> NDArray[np.bool_]:
        return np.isfinite(rows[row]) if np.isnan(missing) else rows[row] != missing

    total, num = np.zeros(rows.shape[1:]), np.zeros(rows.shape[1:])
    for row in range(len(rows)):
        here = known(row)
        total += np.where(here, rows[row], 0)
        num += here
    mean = total / np.maximum(num, 1)
    return gram_of(lambda row: np.where(known(row), rows[row] - mean, 0.0).ravel(), len(rows))


def covariances(people: People) -> Features:
    """Return ``covariance`` (rows, P, P), float32, of standardised series at kept timepoints, shrunk.

    A parcel without signal has variance 1 and no covariance.
    """
    P = people.cohort.num_parcels
    found = np.tile(np.eye(P, dtype=np.float32), (len(people), 1, 1))
    for row in range(len(people)):
        series = people.standardised(row)[people.kept(row)]
        here = np.flatnonzero(series.any(axis=0))
        found[row][np.ix_(here, here)] = covariance(series[:, here])
    return {"covariance": found}


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
    arrays: dict[str, NDArray[Any]] = {}
    for row in range(len(people)):
        embedded = embed_recording(
            model, people.recording(row), native_tr=True, batch_size=batch_size, per_parcel=per_parcel
        )
        found: dict[str, NDArray[Any]] = {"cls": embedded.mean_cls, "pooled": embedded.mean_pooled}
        if embedded.mean_parcels is not None:
            found["parcels"] = embedded.mean_parcels.astype(np.float16)
        for name, values in found.items():
            if row == 0:
                arrays[name] = np.empty((len(people), *values.shape), dtype=values.dtype)
            arrays[name][row] = values
    if per_parcel:
        arrays["parcels_gram"] = centred_gram(arrays["parcels"], np.float16("nan"))
    return arrays
