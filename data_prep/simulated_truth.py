"""What is planted: a linear-Gaussian system for every subject, with the effects of age, severity and task in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainlm.config import Section
from brainlm.errors import ConfigError
from brainlm.state_space import LinearStateSpace, SimulatedTruth
from data_prep.simulated_atlas import NETWORKS, SimulatedAtlas
from data_prep.simulated_dynamics import (
    AGE_AMPLITUDE_NETWORK,
    AGE_PAIR,
    COUPLING_LIMIT,
    NUM_NETWORKS,
    DynamicsConfig,
    network_index,
    reference_couplings,
    sample_dynamics,
)

FloatArray = NDArray[np.float64]
SEVERITY_FROM, SEVERITY_TO = "Limbic", "VentralAttention"
TASK_NETWORK = "Visual"
FIELDS = {
    "transition": "(subjects, d, d): A, the state from one timepoint to the next",
    "process_cov": "(subjects, d, d): Q, covariance of the process noise of one timepoint",
    "loading": "(subjects, parcels, networks): image units per unit of haemodynamic response; C = loading @ readout",
    "readout": "(networks, d): the haemodynamic response of each network, in the average subject's standard deviations",
    "noise_var": "(subjects, parcels): R, private white noise and the mean of the voxels' noise and rounding, units^2",
    "baseline": "(subjects, parcels): mean of the parcel, image units",
    "recording_subject": "(recordings,): row of the subject in the arrays above",
    "inputs/<recording_id>": "(T, d): task drive; row t acts on the state at t + 1; only recordings with a task",
    "facts": "the content of truth.json as text",
}


@dataclass(frozen=True, kw_only=True)
class EffectsConfig(Section):
    """How strongly age, severity and the task act."""

    age_coupling: float = 0.15
    """Fall of the coupling between Frontoparietal and Default per standard deviation of age, as a share of decay."""
    age_amplitude: float = 0.15
    """Fall of the logarithm of the Somatomotor amplitude per standard deviation of age."""
    severity_shift: float = 0.6
    """Share of the loading that moves from Limbic to VentralAttention at the largest severity."""
    severity_parcel_share: float = 0.5
    """Share of the Limbic parcels that move."""
    task_amplitude: float = 3.0
    """Steady response of the Visual network to the task, in standard deviations of its response at rest."""

    def __post_init__(self) -> None:
        if not 0 <= self.severity_shift <= 1 or not 0 < self.severity_parcel_share <= 1:
            raise ConfigError(
                "effects.severity_shift must lie in 0 ... 1 and severity_parcel_share above 0 and up to 1"
            )


def plant_truth(
    *,
    atlas: SimulatedAtlas,
    dynamics: DynamicsConfig,
    effects: EffectsConfig,
    tr_s: float,
    signal_percent: float,
    block_s: float,
    baseline: FloatArray,
    voxel_noise_var: FloatArray,
    subjects: list[dict[str, Any]],
    recordings: list[tuple[str, int, str, int]],
    stream: Callable[..., np.random.Generator],
    age_range: tuple[float, float],
    largest_severity: float,
) -> SimulatedTruth:
    """Make the system of every subject, in the units of the parcel-mean series.

    Parameters
    ----------
    baseline : ndarray, shape (P,)
        Mean image in each parcel, before gain and offset.
    voxel_noise_var : ndarray, shape (P,)
        Variance that the voxels' own noise leaves in the parcel mean.
    subjects : list of dict
        Columns of ``participants.tsv``, with ``gain`` and ``offset`` of the site.
    recordings : list of tuple
        (recording id, row of its subject, task, number of timepoints).
    stream : callable
        Gives the random generator for a purpose.
    """
    average = sample_dynamics(dynamics, reference_couplings(), np.ones(NUM_NETWORKS), tr_s)
    readout = np.zeros((NUM_NETWORKS, dynamics.num_states))
    readout[:, -NUM_NETWORKS:] = np.eye(NUM_NETWORKS)
    spread = LinearStateSpace(
        transition=average.transition,
        process_cov=average.process_cov,
        loading=readout,
        noise_var=np.ones(NUM_NETWORKS),
    )
    response_sd = np.sqrt(spread.marginal_variance() - 1)
    readout /= response_sd[:, None]
    response_corr = readout @ spread.stationary_cov @ readout.T
    group_loading, private = _group_loadings(atlas, dynamics, response_corr, stream("loadings"))
    limbic = np.flatnonzero(atlas.network_ids == network_index(SEVERITY_FROM))
    num_moved = max(1, round(effects.severity_parcel_share * len(limbic)))
    moved = np.sort(stream("severity parcels").choice(limbic, num_moved, replace=False))

    arrays: dict[str, list[FloatArray]] = {
        name: [] for name in ("transition", "process_cov", "loading", "noise_var", "baseline")
    }
    age_mean, age_sd = sum(age_range) / 2, (age_range[1] - age_range[0]) / np.sqrt(12)
    for subject in subjects:
        rng = stream("subject", subject["participant_id"])
        age_z = (subject["age"] - age_mean) / age_sd
        couplings = reference_couplings()
        couplings += (couplings != 0) * dynamics.coupling_sd * rng.standard_normal(couplings.shape)
        first, second = (network_index(name) for name in AGE_PAIR)
        for row, column in ((first, second), (second, first)):
            changed = couplings[row, column] - effects.age_coupling * age_z
            couplings[row, column] = np.clip(changed, -COUPLING_LIMIT, COUPLING_LIMIT)
        amplitudes = np.ones(NUM_NETWORKS)
        amplitudes[network_index(AGE_AMPLITUDE_NETWORK)] = np.exp(-effects.age_amplitude * age_z)
        sampled = sample_dynamics(dynamics, couplings, amplitudes, tr_s)

        family = stream("family", subject["family_id"]).standard_normal(group_loading.shape)
        own = rng.standard_normal(group_loading.shape)
        loading = group_loading + dynamics.loading_sd * (family + own) / np.sqrt(2)
        shift = effects.severity_shift * subject["severity"] / largest_severity
        loading[moved, network_index(SEVERITY_TO)] += shift * loading[moved, network_index(SEVERITY_FROM)]
        loading[moved, network_index(SEVERITY_FROM)] *= 1 - shift

        unit = subject["gain"] * baseline * signal_percent / 100
        arrays["transition"].append(sampled.transition)
        arrays["process_cov"].append(sampled.process_cov)
        arrays["loading"].append(unit[:, None] * loading)
        arrays["noise_var"].append(unit**2 * private + voxel_noise_var)
        arrays["baseline"].append(subject["gain"] * baseline + subject["offset"])

    stacked: dict[str, NDArray[Any]] = {name: np.stack(values) for name, values in arrays.items()}
    stacked["readout"] = readout
    stacked["recording_subject"] = np.array([row for _, row, _, _ in recordings], dtype=np.int64)
    target = network_index(TASK_NETWORK)
    drive = (
        average.input_gain[:, target] * effects.task_amplitude * response_sd[target] / average.steady_response[target]
    )
    for recording_id, _, task, num_timepoints in recordings:
        if task != "rest":
            is_on = block_is_on(num_timepoints, tr_s, block_s)
            # About its mean, so that the series stays centred.
            stacked[f"inputs/{recording_id}"] = (is_on - is_on.mean())[:, None] * drive
    facts = _facts(atlas, dynamics, effects, tr_s, [row[0] for row in recordings], moved)
    return SimulatedTruth(facts=facts, arrays=stacked)


def block_length(tr_s: float, block_s: float) -> int:
    """Return the number of timepoints in a task block."""
    return max(1, round(block_s / tr_s))


def block_is_on(num_timepoints: int, tr_s: float, block_s: float) -> NDArray[np.bool_]:
    """Return when the task is on, shape (T,): blocks of rest and task in turn, rest first."""
    return np.arange(num_timepoints) // block_length(tr_s, block_s) % 2 == 1


def _group_loadings(
    atlas: SimulatedAtlas, dynamics: DynamicsConfig, response_corr: FloatArray, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Draw the average subject's loadings (P, K) and private variances (P,), of unit variance together."""
    rows = np.arange(atlas.num_parcels)
    second = (atlas.network_ids + rng.integers(1, NUM_NETWORKS, len(rows))) % NUM_NETWORKS
    loading = np.zeros((len(rows), NUM_NETWORKS))
    loading[rows, atlas.network_ids] = 1.0
    loading[rows, second] = rng.uniform(-1, 1, len(rows)) * dynamics.second_loading
    private = dynamics.private_share * rng.uniform(0.5, 1.5, len(rows))
    shared = np.einsum("pi,ij,pj->p", loading, response_corr, loading)
    return loading * np.sqrt((1 - private) / shared)[:, None], private


def _facts(
    atlas: SimulatedAtlas,
    dynamics: DynamicsConfig,
    effects: EffectsConfig,
    tr_s: float,
    recordings: list[str],
    moved: NDArray[np.int64],
) -> dict[str, Any]:
    return {
        "description": "What was planted in this simulated cohort. Read it with brainlm.state_space.load_truth.",
        "model": "s[t+1] = A s[t] + inputs[t] + w, w ~ N(0, Q); parcel mean - baseline = C s + e, e ~ N(0, diag(R)), "
        "once the six motion parameters are regressed out",
        "fields": FIELDS,
        "tr_s": tr_s,
        "network_names": list(NETWORKS),
        "state": f"neural activity of the {NUM_NETWORKS} networks, then {dynamics.num_response_stages} response stages",
        "response_peak_s": dynamics.response_peak_s,
        "age_effect": {
            "text": f"Per standard deviation of age, the mutual coupling of {AGE_PAIR[0]} and {AGE_PAIR[1]} falls by "
            f"{effects.age_coupling:g} of decay and the log amplitude of {AGE_AMPLITUDE_NETWORK} by "
            f"{effects.age_amplitude:g}.",
            "coupled_networks": list(AGE_PAIR),
            "amplitude_network": AGE_AMPLITUDE_NETWORK,
        },
        "severity_effect": {
            "text": f"In the severity parcels a share of the loading, up to {effects.severity_shift:g} at the largest "
            f"severity and proportional to it, moves from {SEVERITY_FROM} to {SEVERITY_TO}.",
            "from": SEVERITY_FROM,
            "to": SEVERITY_TO,
        },
        "task_effect": {
            "text": f"Blocks drive {TASK_NETWORK}, and through its coupling DorsalAttention.",
            "network": TASK_NETWORK,
        },
        "recordings": recordings,
        "parcels": list(atlas.names),
        "networks": list(atlas.networks),
        "severity_parcels": moved.tolist(),
    }
