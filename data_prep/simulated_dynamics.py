"""From planted physiology to a linear-Gaussian system in discrete time.

Each network has a neural activity that decays with a time constant of seconds and is coupled to the others, and a
haemodynamic response made of leaky integrators in a row, whose impulse response is a gamma function (Boynton et al., J.
Neurosci. 16, 1996). All of it is one linear stochastic differential equation, sampled exactly at the repetition time:

    dx = F x dt + drive u dt + dW,   x = [neural (K), stage 1 (K), ..., last stage (K)]

so that the Kalman predictor of the sampled system is the optimum and nothing is lost to discretisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from brainlm.config import Section
from brainlm.errors import ConfigError
from data_prep.simulated_atlas import NETWORKS

FloatArray = NDArray[np.float64]
NUM_NETWORKS = len(NETWORKS)

# Couplings of the average subject, as a share of decay: 1 would cancel the decay of the receiving network.
# (from, to, strength); pairs given once in each direction are mutual.
MUTUAL_COUPLINGS = (
    ("Visual", "Somatomotor", 0.15),
    ("Somatomotor", "VentralAttention", 0.15),
    ("VentralAttention", "Frontoparietal", 0.20),
    ("Limbic", "Default", 0.15),
    ("DorsalAttention", "Default", -0.30),
    ("Frontoparietal", "Default", 0.30),
)
DIRECTED_COUPLINGS = (("Visual", "DorsalAttention", 0.30), ("Frontoparietal", "Limbic", -0.15))
AGE_PAIR = ("Frontoparietal", "Default")
AGE_AMPLITUDE_NETWORK = "Somatomotor"
COUPLING_LIMIT = 0.75


@dataclass(frozen=True, kw_only=True)
class DynamicsConfig(Section):
    """Physiology of the average subject, and how much subjects differ."""

    shortest_decay_s: float = 3.0
    """Time constant of the fastest network's neural activity."""
    longest_decay_s: float = 6.0
    """Time constant of the slowest one; the others lie evenly between."""
    num_response_stages: int = 3
    """Leaky integrators in a row."""
    response_peak_s: float = 5.5
    """Time from a brief neural event to the peak of its haemodynamic response."""
    coupling_sd: float = 0.05
    """Standard deviation between subjects of every coupling, as a share of decay."""
    private_share: float = 0.2
    """Mean share of a parcel's variance that is private white noise; parcels have half to one and a half times it."""
    second_loading: float = 0.35
    """Largest weight of a parcel's second network, relative to its own."""
    loading_sd: float = 0.1
    """Standard deviation between subjects of every loading; half of the variance is shared within a family."""

    def __post_init__(self) -> None:
        if not 0 < self.shortest_decay_s <= self.longest_decay_s:
            raise ConfigError("dynamics.shortest_decay_s must be above 0 and at most longest_decay_s")
        if self.num_response_stages < 2 or self.response_peak_s <= 0:
            raise ConfigError("dynamics needs at least 2 response stages and a peak after 0 s")
        if not 0 < self.private_share < 0.6:
            raise ConfigError(f"dynamics.private_share must lie between 0 and 0.6, found {self.private_share}")
        if min(self.coupling_sd, self.second_loading, self.loading_sd) < 0:
            raise ConfigError("dynamics.coupling_sd, second_loading and loading_sd must not be negative")

    @property
    def num_states(self) -> int:
        """States of the system, ``d``."""
        return NUM_NETWORKS * (1 + self.num_response_stages)

    @property
    def stage_s(self) -> float:
        """Time constant of one stage: n stages of tau peak at (n - 1) tau."""
        return self.response_peak_s / (self.num_response_stages - 1)

    @property
    def decays_s(self) -> FloatArray:
        """Neural time constant of each network, shape (K,), not in the order of the networks' list."""
        order = np.argsort(np.arange(NUM_NETWORKS) * 3 % NUM_NETWORKS)
        return np.linspace(self.shortest_decay_s, self.longest_decay_s, NUM_NETWORKS)[order]


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledDynamics:
    """The states of one subject, sampled at the repetition time.

    Parameters
    ----------
    transition, process_cov : ndarray, shape (d, d)
    input_gain : ndarray, shape (d, K)
        Change of the state by a drive of one (per second) of each network's neural activity, held for one timepoint.
    steady_response : ndarray, shape (K,)
        Haemodynamic response of each network to a steady unit drive of its own neural activity.
    """

    transition: FloatArray
    process_cov: FloatArray
    input_gain: FloatArray
    steady_response: FloatArray


def reference_couplings() -> FloatArray:
    """Return the couplings of the average subject, shape (K, K): row = receiving, column = sending network."""
    couplings = np.zeros((NUM_NETWORKS, NUM_NETWORKS))
    for sender, receiver, strength in MUTUAL_COUPLINGS:
        couplings[network_index(receiver), network_index(sender)] = strength
        couplings[network_index(sender), network_index(receiver)] = strength
    for sender, receiver, strength in DIRECTED_COUPLINGS:
        couplings[network_index(receiver), network_index(sender)] = strength
    return couplings


def network_index(name: str) -> int:
    """Return the position of a network in ``NETWORKS``."""
    return NETWORKS.index(name)


def sample_dynamics(
    config: DynamicsConfig, couplings: FloatArray, amplitudes: FloatArray, tr_s: float
) -> SampledDynamics:
    """Sample the coupled networks and their haemodynamic response exactly.

    The process covariance is that of Van Loan, IEEE Trans. Autom. Control 23, 1978.

    Parameters
    ----------
    couplings : ndarray, shape (K, K)
        As a share of decay; row = receiving network.
    amplitudes : ndarray, shape (K,)
        Standard deviation of the neural activity that each network would have on its own.
    tr_s : float
        Repetition time, s.
    """
    from scipy.linalg import expm

    num, d = NUM_NETWORKS, config.num_states
    rates = 1 / config.decays_s
    drift = np.zeros((d, d))
    drift[:num, :num] = np.sqrt(np.outer(rates, rates)) * couplings - np.diag(rates)
    for stage in range(1, config.num_response_stages + 1):
        rows = slice(stage * num, (stage + 1) * num)
        drift[rows, rows] -= np.eye(num) / config.stage_s
        drift[rows, slice((stage - 1) * num, stage * num)] += np.eye(num) / config.stage_s
    diffusion = np.zeros((d, d))
    diffusion[:num, :num] = np.diag(2 * rates * amplitudes**2)

    block = np.zeros((2 * d, 2 * d))
    block[:d, :d], block[:d, d:], block[d:, d:] = -drift, diffusion, drift.T
    power = expm(block * tr_s)
    transition = power[d:, d:].T
    process_cov = transition @ power[:d, d:]
    drive = np.eye(d)[:, :num]
    return SampledDynamics(
        transition=transition,
        process_cov=(process_cov + process_cov.T) / 2,
        input_gain=np.linalg.solve(drift, (transition - np.eye(d)) @ drive),
        steady_response=np.diag(-np.linalg.solve(drift, drive)[-num:]).copy(),
    )
