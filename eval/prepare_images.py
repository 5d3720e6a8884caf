"""Images go through ``data_prep/prepare.py`` as the checkpoint's contract says, and are read from its data set.

The data set lies in ``<out>.prepared``, the list of images beside it, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from brainlm.errors import ConfigError, DataError
from brainlm.store import Store
from eval.predict_settings import PredictSettings
from eval.series_files import ENTITY, expand

ROOT = Path(__file__).resolve().parents[1]
IMAGES = (".nii", ".nii.gz")
CONFOUNDS = "_desc-confounds_timeseries.tsv"


def are_images(settings: PredictSettings) -> bool:
    """Say whether the data are images: all of them, or none.

    Raises
    ------
    ConfigError
        If some are and some are not, or settings of the preparation are given for what is not prepared.
    """
    given = (settings.data,) if isinstance(settings.data, str) else settings.data
    is_image = [name.endswith(IMAGES) for name in given]
    if any(is_image) and not all(is_image):
        raise ConfigError("data: images and other files in one call: give them in two")
    if settings.prepare and not any(is_image):
        raise ConfigError("prepare: these settings are for images; a data set or series files are read as they are")
    return any(is_image)


def prepare_images(settings: PredictSettings, folder: str) -> tuple[PredictSettings, list[dict[str, str]]]:
    """Prepare images with a checkpoint's contract.

    Parameters
    ----------
    folder : str
        The checkpoint.

    Returns
    -------
    settings : PredictSettings
        With the data set in place of the images.
    refused : list of dict
        Images that the preparation refused, as rows of the table of rejections.

    Raises
    ------
    DataError
        If the preparation fails; what it said is passed on.
    """
    if settings.native_tr or settings.scaled_by != "checkpoint":
        raise ConfigError("images are prepared with the checkpoint's TR and scale: leave native_tr and scaled_by out")
    given = (settings.data,) if isinstance(settings.data, str) else settings.data
    files = [name if "://" in name else os.path.abspath(name) for name in expand(given)]
    stem = settings.out.removesuffix(".parquet")
    dataset, table = f"{stem}.prepared", f"{stem}.prepared.tsv"  # of one name each time, or it would not go on
    Store(settings.folder).write_bytes(table.rpartition("/")[2], listing(files).encode())
    with tempfile.TemporaryDirectory() as work:
        config = Path(work) / "config.yaml"
        config.write_text(yaml.safe_dump(config_tree(settings, table, files, folder, dataset)))
        entry = ROOT / "data_prep" / "prepare.py"
        done = subprocess.run([sys.executable, str(entry), "--config", str(config)], capture_output=True, text=True)
    if done.returncode:
        raise DataError(
            f"the images could not be prepared as the checkpoint wants them ({settings.out}: prepare.KEY=VALUE sets "
            f"what goes with it, such as prepare.atlas.image):\n{(done.stdout + done.stderr).strip()[-3000:]}"
        )
    return replace(settings, data=dataset, prepare={}, tr_s=None), refusals(dataset)


def config_tree(
    settings: PredictSettings, table: str, files: Sequence[str], folder: str, dataset: str
) -> dict[str, Any]:
    """Return the configuration of the preparation; what the user gave as ``prepare`` comes last."""
    tree: dict[str, Any] = {
        "name": "images",
        "out": dataset,
        "contract": folder,
        "source": {
            "kind": "table",
            "path": table,
            "root": "/",
            "columns": {"recording_id": "recording_id", "subject": "subject", "file": "file"},
        },
        "splits": {"val": 0.0, "test": 1.0},
        "max_refused_fraction": 1.0,
    }
    if any(confounds_of(file) for file in files):
        tree["source"]["columns"]["confounds"] = "confounds"
    if settings.tr_s is not None:
        tree["source"]["tr_s"] = settings.tr_s
    if settings.ray.workers == 0:
        tree["ray"] = {"address": "off"}
    merge(tree, settings.prepare)
    return tree


def merge(tree: dict[str, Any], more: dict[str, Any]) -> None:
    """Put nested mappings into nested mappings, in place."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            merge(tree[key], value)
        else:
            tree[key] = value


def listing(files: Sequence[str]) -> str:
    """Return the table of the images: ids from their names, and the confounds that lie beside them."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(("recording_id", "subject", "file", "confounds"))
    for file in files:
        stem = re.sub(r"\.nii(\.gz)?$", "", file.rpartition("/")[2])
        entities = dict(ENTITY.findall(stem))
        writer.writerow((stem, entities.get("sub", stem), file, confounds_of(file)))
    return text.getvalue()


def confounds_of(file: str) -> str:
    """Return the confounds table of an image that fMRIPrep wrote, "" if there is none."""
    folder, slash, name = file.rpartition("/")
    table = f"{re.split(r'_(?:space|res|desc)-', name)[0]}{CONFOUNDS}"
    return f"{folder}{slash}{table}" if Store(folder or ".").exists(table) else ""


def refusals(dataset: str) -> list[dict[str, str]]:
    """Return the rows of the data set's rejected.parquet that a table of rejections has."""
    import pandas as pd

    store = Store(dataset)
    if not store.exists("rejected.parquet"):
        return []
    table = pd.read_parquet(io.BytesIO(store.read_bytes("rejected.parquet")))
    return [
        {
            "recording_id": str(row["recording_id"]), "subject": str(row.get("subject") or ""), "split": "",
            "source": str(row.get("source") or ""), "reason": str(row["reason"]),
        }
        for row in table.to_dict("records")
    ]  # fmt: skip
