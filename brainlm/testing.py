"""Small synthetic data sets and models for tests, written through the same shards and contract as real ones."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from brainlm import input_contract
from brainlm.atlas import Atlas
from brainlm.censoring import Ranges, kept_timepoints, refill_censored
from brainlm.dataset import FORMAT_VERSION, MANIFEST, Dataset, open_dataset
from brainlm.input_contract import InputContract
from brainlm.scaling import centre, robust_statistics
from brainlm.shards import ShardEntry, StoredDtype, encode_shard, shard_name, write_shard
from brainlm.state_space import TRUTH_FILE, LinearStateSpace
from brainlm.store import Store

if TYPE_CHECKING:
    from brainlm.model import BrainLM

DEFAULT_SUBJECTS: Mapping[str, int] = {"train": 12, "val": 3, "test": 4}


def synthetic_atlas(num_parcels: int = 24, num_networks: int = 3, seed: int = 0, name: str = "synthetic") -> Atlas:
    """Return an atlas of mirrored pairs whose networks interleave in space: position says nothing about them.

    Labels have gaps and go beyond 127.
    """
    rng = np.random.default_rng(seed)
    half = rng.uniform((8, -90, -40), (65, 65, 70), size=((num_parcels + 1) // 2, 3))
    coords_mm = np.concatenate([half, half * (-1, 1, 1)])[:num_parcels]
    networks = rng.permutation(np.arange(num_parcels) % max(num_networks, 1))
    labels = 3 * np.arange(num_parcels) + 100
    return Atlas(
        name=name,
        sha256=hashlib.sha256(coords_mm.tobytes()).hexdigest(),
        labels=labels,
        parcel_names=tuple(f"parcel-{label}" for label in labels),
        coords_mm=coords_mm,
        networks=tuple(f"network-{i}" for i in networks) if num_networks else None,
        space="MNI152NLin2009cAsym",
    )


def synthetic_system(atlas: Atlas, seed: int = 0, phi: float = 0.9, noise: float = 0.5) -> LinearStateSpace:
    """Return a system of one AR(1) state a network, read by its parcels with weights near 1, plus private noise.

    Each state has variance 1; `noise` is the variance of the private noise.
    """
    rng = np.random.default_rng([seed, 1])
    names = sorted(set(atlas.networks or ("",)))
    member = np.array([[n == name for name in names] for n in atlas.networks or ("",) * atlas.num_parcels])
    loading = member * rng.uniform(0.7, 1.3, size=(atlas.num_parcels, 1)) + rng.normal(0, 0.05, member.shape)
    identity = np.eye(len(names))
    return LinearStateSpace(
        transition=phi * identity,
        process_cov=(1 - phi**2) * identity,
        loading=loading,
        noise_var=np.full(atlas.num_parcels, noise),
    )


def write_synthetic_dataset(
    url: str,
    *,
    num_subjects: Mapping[str, int] = DEFAULT_SUBJECTS,
    num_timepoints: int = 60,
    window_len: int = 40,
    patch_len: int = 10,
    tr_s: float = 2.0,
    atlas: Atlas | None = None,
    num_parcels: int = 24,
    num_networks: int = 3,
    missing: Mapping[str, tuple[int, ...]] | None = None,
    censored: Mapping[str, Ranges] | None = None,
    censored_fill: float | None = None,
    gain_sd: float = 0.3,
    dtype: StoredDtype = "float32",
    recordings_per_shard: int = 64,
    with_truth: bool = False,
    seed: int = 0,
    phi: float = 0.9,
    noise: float = 0.5,
) -> Dataset:
    """Write a finished data set of low-rank, spatially correlated AR(1) series with planted networks.

    Parameters
    ----------
    url : str
        Any fsspec URL.
    num_subjects : mapping
        Subjects per split, one recording each, named ``sub-<split><number>_task-rest``.
    missing : mapping, optional
        Columns without signal, by recording id.
    censored : mapping, optional
        Ranges [start, stop) of timepoints that are not kept, by recording id. Series are centred on the others, which
        alone enter the statistics, and interpolated between them.
    censored_fill : float, optional
        Store this instead of interpolated values: nothing may depend on it.
    gain_sd : float
        Standard deviation of the logarithm of each subject's gain: recordings are not equally loud.
    with_truth : bool
        Also write ``truth/state_space.npz``, as `brainlm.state_space.load_truth` reads it.
    """
    store = Store(url)
    atlas = atlas or synthetic_atlas(num_parcels, num_networks, seed)
    system = synthetic_system(atlas, seed, phi, noise)
    rng = np.random.default_rng([seed, 2])
    missing, censored = missing or {}, censored or {}
    measured: list[NDArray[np.float32]] = []
    series: dict[str, list[tuple[ShardEntry, Any]]] = {}
    gains: dict[str, float] = {}
    for split, count in num_subjects.items():
        series[split] = []
        for number in range(count):
            subject = f"sub-{split}{number:03d}"
            recording_id = f"{subject}_task-rest"
            gains[recording_id] = float(np.exp(gain_sd * rng.standard_normal()))
            series_TP = gains[recording_id] * system.simulate(num_timepoints, rng)
            keep_mask = kept_timepoints(censored.get(recording_id, ()), num_timepoints)
            bold = centre(series_TP.astype(np.float32), keep_mask)
            if split == "train":
                measured.append(bold[keep_mask])
            refill_censored(bold.T, np.ones((atlas.num_parcels, 1), dtype=bool), keep_mask)
            if censored_fill is not None:
                bold[~keep_mask] = censored_fill
            entry = ShardEntry(
                recording_id=recording_id,
                subject=subject,
                tr_s=tr_s,
                num_timepoints=num_timepoints,
                num_parcels=atlas.num_parcels,
                dtype=dtype,
                scale=1.0,
                offset=0,
                missing_parcels=missing.get(recording_id, ()),
                censored=censored.get(recording_id, ()),
                task="rest",
            )
            series[split].append((entry, bold))
    median, iqr = robust_statistics(np.concatenate(measured))
    contract = InputContract(
        atlas=atlas,
        covered=np.ones(atlas.num_parcels, dtype=bool),
        median=median,
        iqr=iqr,
        tr_s=tr_s,
        window_len=window_len,
        patch_len=patch_len,
        statistics_from="train split of the synthetic data set",
        num_statistics_recordings=len(series["train"]),
    )
    shards: dict[str, list[dict[str, Any]]] = {}
    for split, recordings in series.items():
        shards[split] = []
        for number, first in enumerate(range(0, len(recordings), recordings_per_shard)):
            part = encode_shard(recordings[first : first + recordings_per_shard], dtype)
            shards[split].append(write_shard(store, shard_name(split, number), *part))
    if with_truth:
        _write_truth(store, system, atlas, gains, tr_s)
    store.write_bytes(input_contract.FILE_NAME, contract.dumps().encode())
    content = [row["sha256"] for rows in shards.values() for row in rows] + [contract.dumps()]
    store.write_json(
        MANIFEST,
        {
            "format_version": FORMAT_VERSION,
            "name": "synthetic",
            "content_hash": hashlib.sha256("".join(content).encode()).hexdigest(),
            "atlas": {"name": atlas.name, "sha256": atlas.sha256},
            "counts": {split: {"recordings": len(rows), "subjects": len(rows)} for split, rows in series.items()},
            "shards": shards,
            "warnings": [],
        },
    )
    return open_dataset(url)


def small_model(contract: InputContract, seed: int = 0, patch_parcels: int = 1) -> BrainLM:
    """Return an untrained model of a few thousand weights for windows of the contract, in evaluation mode."""
    import torch

    from brainlm.model import BrainLM, ModelConfig

    config = ModelConfig(
        width=32,
        mlp_width=64,
        decoder_width=32,
        decoder_mlp_width=64,
        window_len=contract.window_len,
        patch_len=contract.patch_len,
        patch_parcels=patch_parcels,
    )
    model = BrainLM(config, contract)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.eval()


def _write_truth(store: Store, system: LinearStateSpace, atlas: Atlas, gains: Mapping[str, float], tr_s: float) -> None:
    recordings, scale = list(gains), np.array(list(gains.values()))
    facts = {
        "recordings": recordings,
        "parcels": list(atlas.parcel_names),
        "networks": list(atlas.networks or ()),
        "severity_parcels": [],
        "tr_s": tr_s,
    }
    buffer = io.BytesIO()
    np.savez(
        buffer,
        facts=json.dumps(facts),
        transition=np.repeat(system.transition[None], len(recordings), axis=0),
        process_cov=np.repeat(system.process_cov[None], len(recordings), axis=0),
        loading=scale[:, None, None] * system.loading,
        readout=np.eye(system.num_states),
        noise_var=scale[:, None] ** 2 * system.noise_var,
        baseline=np.zeros((len(recordings), atlas.num_parcels)),
        recording_subject=np.arange(len(recordings)),
    )
    store.write_bytes(f"truth/{TRUTH_FILE}", buffer.getvalue())
