"""The section of sample windows: measured series, and what the methods put in the hidden places."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from eval import figures_charts
from eval.report_input import Results, among, headline_ratio, percent, reconstruction_base, strongest, without_ids
from eval.report_page import Artist, Section

MAX_EXAMPLE_PARCELS = 5


def examples_section(results: Results, artist: Artist) -> Section:
    section = Section(title="Sample reconstructions", anchor="examples", more_title="More windows")
    if not results.store.exists("examples.npz"):
        section.absent.append("No sample windows were kept (examples.npz is not there).")
        return section
    with np.load(io.BytesIO(results.store.read_bytes("examples.npz")), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    if not {"truth_z", "mask"} <= set(arrays) or arrays["truth_z"].ndim != 3 or len(arrays["truth_z"]) == 0:
        section.absent.append("examples.npz holds no windows.")
        return section
    truth, mask = arrays["truth_z"], arrays["mask"].astype(bool)
    num_windows, num_parcels, window_len = truth.shape
    patch_len = int(arrays["patch_len"]) if "patch_len" in arrays else window_len * num_parcels // mask.shape[1]
    hidden = np.repeat(mask.reshape(num_windows, num_parcels, -1), patch_len, axis=2)
    tr_s = float(arrays["tr_s"]) if "tr_s" in arrays else results.tr_s or 1.0
    predictions = _match_predictions(results, arrays)
    if not predictions:
        section.absent.append("examples.npz holds no predictions.")
        return section
    parcels = np.atleast_1d(arrays["parcels"]).astype(int) if "parcels" in arrays else np.arange(num_parcels)
    names = _parcel_names(arrays, num_parcels, parcels)
    for window in range(num_windows):
        wanted = [p for p in parcels if np.isfinite(truth[window, p]).all() and hidden[window, p].any()]
        wanted = wanted[:MAX_EXAMPLE_PARCELS]
        if not wanted:
            continue
        figure = figures_charts.draw_example(
            truth[window],
            {model: prediction[window] for model, prediction in predictions.items()},
            hidden[window],
            [int(p) for p in wanted],
            [names[int(p)] for p in wanted],
            results.looks,
            tr_s,
            patch_len,
        )
        ratio = (
            f" {percent(round(float(arrays['mask_ratio']), 3))} of the tokens are hidden."
            if "mask_ratio" in arrays
            else ""
        )
        drawing = artist.show(
            figure,
            f"example-{window + 1}",
            f"Measured and predicted series of {len(wanted)} parcels, window {window + 1}",
            f"Window {window + 1} of {num_windows}.{ratio} Series in units of the recording's own standard deviation; "
            "predictions are drawn only where values were hidden, patch by patch "
            f"({patch_len} timepoints, {patch_len * tr_s:g} s).",
        )
        (section.drawings if not section.drawings else section.more_drawings).append(drawing)
    return section


def _match_predictions(results: Results, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return predictions worth drawing by model: checkpoints, and the strongest baseline that is there."""
    simple = {_simple(model): model for model in results.looks}
    found = {}
    for name, array in arrays.items():
        model = simple.get(_simple(name.removeprefix("prediction_")))
        if name.startswith("prediction_") and model is not None:
            found[model] = array
    kinds = {s.model: s.model_kind for s in results.all_scores}
    ratio = headline_ratio(results)
    here = results.find("reconstruction", "r2", **reconstruction_base(results), mask_ratio=ratio)
    best = strongest(s for s in among(here, "baseline") if s.model in found)
    chosen = [m for m in results.models if m in found][:2] + ([best.model] if best else [])
    chosen += [m for m in found if kinds[m] == "optimum"]
    return {model: found[model] for model in chosen or list(found)[:2]}


def _simple(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.lower())


def _parcel_names(arrays: Mapping[str, Any], num_parcels: int, parcels: np.ndarray) -> dict[int, str]:
    names = {int(p): f"parcel {int(p)}" for p in range(num_parcels)}
    given = [without_ids(str(n)) for n in np.atleast_1d(arrays["names"])] if "names" in arrays else []
    if len(given) == num_parcels:
        names.update(enumerate(given))
    elif len(given) == len(parcels):
        names.update({int(p): name for p, name in zip(parcels, given)})
    return {p: name if len(name) <= 22 else name[:21] + "…" for p, name in names.items()}
