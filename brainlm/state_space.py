"""Linear-Gaussian state space models and their exact optimal predictors.

The simulated cohort (``data_prep/simulate.py``) is drawn from such models, so for it the best possible reconstruction
and forecast are known: the conditional means below. Letters: ``T`` timepoints, ``P`` parcels, ``d`` states.

    s[0]   ~ N(0, S)                       S the stationary covariance, S = A S A' + Q
    s[t+1] = A s[t] + inputs[t] + w[t]     w ~ N(0, Q)
    y[t]   = C s[t] + e[t]                 e ~ N(0, diag(R))

Updates are in information form, so a step costs O(P d^2 + d^3) and no P x P matrix is ever formed. Smoothing is the
fixed-interval recursion of Durbin and Koopman, *Time Series Analysis by State Space Methods* (2012), section 4.4. It
equals the Rauch-Tung-Striebel smoother and inverts no predicted covariance, so ``process_cov`` may be singular.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainlm.errors import DataError

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# Doubling squares the transition each time: 2^60 steps are beyond any series, whatever the spectral radius below one.
MAX_DOUBLINGS = 60

TRUTH_FILE = "state_space.npz"


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearStateSpace:
    """A stable linear-Gaussian system observed through many parcels.

    Parameters
    ----------
    transition : ndarray, shape (d, d)
        A, per timepoint. Its spectral radius must be below one.
    process_cov : ndarray, shape (d, d)
        Q, symmetric and positive semidefinite.
    loading : ndarray, shape (P, d)
        C, in the units of the series per unit of state.
    noise_var : ndarray, shape (P,)
        R, variance of the private white noise of each parcel, above zero.

    Raises
    ------
    DataError
        If shapes disagree, a value is not finite, the system is unstable, or a covariance is not one.
    """

    transition: FloatArray
    process_cov: FloatArray
    loading: FloatArray
    noise_var: FloatArray

    def __post_init__(self) -> None:
        for name in ("transition", "process_cov", "loading", "noise_var"):
            values = np.array(getattr(self, name), dtype=np.float64)
            if not np.isfinite(values).all():
                raise DataError(f"{name} of a state space model must be finite, found NaN or infinity")
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        d, shapes = self.transition.shape[0], (self.transition.shape, self.process_cov.shape, self.loading.shape)
        if shapes != ((d, d), (d, d), (self.noise_var.size, d)) or self.noise_var.ndim != 1:
            raise DataError(
                "expected transition (d, d), process_cov (d, d), loading (P, d) and noise_var (P,), "
                f"found {shapes[0]}, {shapes[1]}, {shapes[2]} and {self.noise_var.shape}"
            )
        radius = float(np.abs(np.linalg.eigvals(self.transition)).max())
        if radius >= 1:
            raise DataError(f"the system is unstable: transition has spectral radius {radius:.6g}, expected below 1")
        if not np.allclose(self.process_cov, self.process_cov.T, rtol=1e-9, atol=1e-12):
            raise DataError("process_cov must be symmetric")
        eigenvalues = np.linalg.eigvalsh(self.process_cov)
        if eigenvalues[0] < -1e-9 * max(float(eigenvalues[-1]), 1e-300):
            raise DataError(f"process_cov must be positive semidefinite, smallest eigenvalue is {eigenvalues[0]:.3g}")
        if (self.noise_var <= 0).any():
            raise DataError(f"noise_var must be above zero in every parcel, smallest is {self.noise_var.min():.3g}")

    @property
    def num_states(self) -> int:
        """Number of states, ``d``."""
        return int(self.transition.shape[0])

    @property
    def num_parcels(self) -> int:
        """Number of parcels, ``P``."""
        return int(self.loading.shape[0])

    @cached_property
    def stationary_cov(self) -> FloatArray:
        """Stationary covariance of the state without inputs, shape (d, d): the Lyapunov equation, by doubling."""
        power, cov = self.transition, self.process_cov
        for _ in range(MAX_DOUBLINGS):
            step = power @ cov @ power.T
            cov = cov + step
            power = power @ power
            if np.abs(step).max() <= 1e-17 * np.abs(cov).max():
                break
        return (cov + cov.T) / 2

    def marginal_variance(self) -> FloatArray:
        """Return the stationary variance of each parcel, private noise included, shape (P,)."""
        return np.einsum("pi,ij,pj->p", self.loading, self.stationary_cov, self.loading) + self.noise_var

    def covariance(self, lag: int = 0) -> FloatArray:
        """Return the stationary covariance of ``y[t + lag]`` with ``y[t]``, shape (P, P), ``lag`` in timepoints."""
        if lag < 0:
            raise DataError(f"lag must be 0 or more, found {lag}: transpose the covariance at the positive lag instead")
        cov = self.loading @ np.linalg.matrix_power(self.transition, lag) @ self.stationary_cov @ self.loading.T
        return cov + np.diag(self.noise_var) if lag == 0 else cov

    def simulate(self, num_timepoints: int, rng: np.random.Generator, inputs: ArrayLike | None = None) -> FloatArray:
        """Draw one series.

        Parameters
        ----------
        num_timepoints : int
        rng : numpy.random.Generator
            Draws the initial state, then the process noise, then the private noise: systems that differ only in
            ``noise_var`` give the same states from the same seed.
        inputs : ndarray, shape (T, d), optional
            Known addition to the state: row t acts on the state at t + 1.

        Returns
        -------
        bold : ndarray, shape (T, P)
            Starts in the stationary distribution of the system without inputs.
        """
        drive = self._check_inputs(inputs, num_timepoints)
        state = _psd_root(self.stationary_cov) @ rng.standard_normal(self.num_states)
        noise = rng.standard_normal((num_timepoints, self.num_states)) @ _psd_root(self.process_cov).T
        states = np.empty((num_timepoints, self.num_states))
        for t in range(num_timepoints):
            states[t] = state
            state = self.transition @ state + noise[t] + drive[t]
        private = rng.standard_normal((num_timepoints, self.num_parcels)) * np.sqrt(self.noise_var)
        return states @ self.loading.T + private

    def smooth(self, bold: ArrayLike, observed: ArrayLike, inputs: ArrayLike | None = None) -> FloatArray:
        """Compute the expected noise-free series given all observed entries.

        This is the exact optimal reconstruction: of a hidden entry, whose private noise is independent of all that is
        visible, it is the conditional mean.

        Parameters
        ----------
        bold : ndarray, shape (T, P)
            Centred series in the units of ``loading``. Values at unobserved entries are never read and may be NaN.
        observed : ndarray, shape (T, P), bool
            True = visible. Any pattern is allowed.
        inputs : ndarray, shape (T, d), optional
            Known addition to the state: row t acts on the state at t + 1.

        Returns
        -------
        expected : ndarray, shape (T, P)
            E[C s[t] | all observed entries].
        """
        series, visible = self._check_series(bold, observed)
        drive = self._check_inputs(inputs, len(series))
        means, covs, shrinks, innovations, _ = self._filter(series, visible, drive)
        states = np.empty_like(means)
        adjoint = np.zeros(self.num_states)
        for t in reversed(range(len(series))):
            adjoint = shrinks[t] @ (innovations[t] + self.transition.T @ adjoint)
            states[t] = means[t] + covs[t] @ adjoint
        return states @ self.loading.T

    def log_likelihood(
        self, bold: ArrayLike, observed: ArrayLike | None = None, inputs: ArrayLike | None = None
    ) -> float:
        """Compute the log density of the observed entries: which of several systems made a series?

        Parameters
        ----------
        bold, observed, inputs
            As in `smooth`; `observed` None = all.
        """
        everything = np.ones(np.shape(bold), dtype=bool) if observed is None else observed
        series, visible = self._check_series(bold, everything)
        drive = self._check_inputs(inputs, len(series))
        means, covs, shrinks, innovations, _ = self._filter(series, visible, drive)
        error = np.where(visible, series - means @ self.loading.T, 0.0)
        # Woodbury: the covariance of a timepoint is C cov C' + R, and shrink = (I + C' R^-1 C cov)^-1.
        squares = float((error**2 / self.noise_var).sum())
        squares -= float(np.einsum("ti,tij,tjk,tk->", innovations, covs, shrinks, innovations))
        log_det = float((visible * np.log(self.noise_var)).sum()) - float(np.linalg.slogdet(shrinks)[1].sum())
        return -0.5 * (squares + log_det + float(visible.sum()) * np.log(2 * np.pi))

    def forecast(
        self, bold: ArrayLike, horizon: int, inputs: ArrayLike | None = None, observed: ArrayLike | None = None
    ) -> FloatArray:
        """Compute the expected continuation of a series.

        Parameters
        ----------
        bold : ndarray, shape (T, P)
            Centred series in the units of ``loading``.
        horizon : int
            Number of timepoints after the last of ``bold``.
        inputs : ndarray, shape (T + horizon, d), optional
            Known addition to the state: row t acts on the state at t + 1.
        observed : ndarray, shape (T, P), bool, optional
            True = visible; everything by default.

        Returns
        -------
        expected : ndarray, shape (horizon, P)
            E[y[T - 1 + h] | all observed entries], h = 1 ... horizon.
        """
        if horizon < 1:
            raise DataError(f"horizon must be 1 or more, found {horizon}")
        shape = np.shape(bold)
        series, visible = self._check_series(bold, np.ones(shape, dtype=bool) if observed is None else observed)
        drive = self._check_inputs(inputs, len(series) + horizon)
        *_, state = self._filter(series, visible, drive)
        states = np.empty((horizon, self.num_states))
        for h in range(horizon):
            states[h] = state
            state = self.transition @ state + drive[len(series) + h]
        return states @ self.loading.T

    def impulse_response(self, direction: ArrayLike, num_steps: int) -> FloatArray:
        """Compute the change of the series after a change of the state.

        Parameters
        ----------
        direction : ndarray, shape (d,)
            Change of the state at step 0.
        num_steps : int

        Returns
        -------
        response : ndarray, shape (num_steps, P)
            Row k is C A^k ``direction``.
        """
        state = np.asarray(direction, dtype=np.float64)
        if state.shape != (self.num_states,):
            raise DataError(f"direction must have one value a state, ({self.num_states},), found {state.shape}")
        states = np.empty((num_steps, self.num_states))
        for k in range(num_steps):
            states[k] = state
            state = self.transition @ state
        return states @ self.loading.T

    def predictor_response(
        self, parcels: ArrayLike, horizon: int, *, num_observed: int, num_changed: int = 1
    ) -> FloatArray:
        """Compute how the optimal forecast changes when observed values of some parcels are raised by one unit.

        A model that predicts well must answer an in silico perturbation this way, and not with C A^k e: one raised
        value may be private noise, and the optimal predictor knows how far to believe it.

        Parameters
        ----------
        parcels : ndarray of int, shape (n,)
            Parcels whose values are raised.
        horizon : int
            Number of timepoints forecast.
        num_observed : int
            Length of the observed series.
        num_changed : int
            The last ``num_changed`` observed timepoints are raised.

        Returns
        -------
        change : ndarray, shape (horizon, P)
            In the units of the series per unit of change. The forecast is linear, so no series is needed.
        """
        if not 1 <= num_changed <= num_observed:
            raise DataError(f"num_changed must lie in 1 ... num_observed = {num_observed}, found {num_changed}")
        change = np.zeros((num_observed, self.num_parcels))
        change[num_observed - num_changed :, np.asarray(parcels, dtype=np.int64)] = 1.0
        return self.forecast(change, horizon)

    def _filter(
        self, series: FloatArray, visible: BoolArray, drive: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
        """Run the Kalman filter in information form.

        Returns predicted means (T, d) and covariances (T, d, d), the factors (I + information x covariance)^-1
        (T, d, d) and information innovations (T, d) that smoothing needs, and the prediction after the last timepoint.
        """
        num_timepoints, d = len(series), self.num_states
        means, innovations = np.empty((num_timepoints, d)), np.empty((num_timepoints, d))
        covs, shrinks = np.empty((num_timepoints, d, d)), np.empty((num_timepoints, d, d))
        identity, weighted = np.eye(d), self.loading / self.noise_var[:, None]
        mean, cov = np.zeros(d), self.stationary_cov
        information = np.zeros((d, d))
        evidence = np.where(visible, series, 0.0) @ weighted
        for t in range(num_timepoints):
            if t == 0 or (visible[t] != visible[t - 1]).any():
                information = weighted[visible[t]].T @ self.loading[visible[t]]
            shrink = np.linalg.inv(identity + information @ cov)
            innovation = evidence[t] - information @ mean
            means[t], covs[t], shrinks[t], innovations[t] = mean, cov, shrink, innovation
            mean = self.transition @ (mean + cov @ (shrink @ innovation)) + drive[t]
            cov = self.transition @ (cov @ shrink) @ self.transition.T + self.process_cov
            cov = (cov + cov.T) / 2
        return means, covs, shrinks, innovations, mean

    def _check_series(self, bold: ArrayLike, observed: ArrayLike) -> tuple[FloatArray, BoolArray]:
        series, visible = np.asarray(bold, dtype=np.float64), np.asarray(observed)
        if series.ndim != 2 or series.shape[1] != self.num_parcels or visible.shape != series.shape:
            raise DataError(
                f"expected bold and observed of shape (T, {self.num_parcels}), found {series.shape} and {visible.shape}"
            )
        if visible.dtype != np.bool_:
            raise DataError(f"observed must be boolean (True = visible), found {visible.dtype}")
        if not np.isfinite(series[visible]).all():
            raise DataError("bold holds NaN or infinity where observed is True: mark those entries as not observed")
        return series, visible

    def _check_inputs(self, inputs: ArrayLike | None, num_timepoints: int) -> FloatArray:
        if inputs is None:
            return np.zeros((num_timepoints, self.num_states))
        drive = np.asarray(inputs, dtype=np.float64)
        if drive.shape != (num_timepoints, self.num_states):
            raise DataError(f"inputs must have shape {(num_timepoints, self.num_states)}, found {drive.shape}")
        return drive


def _psd_root(cov: FloatArray) -> FloatArray:
    """Return a matrix whose product with its transpose is ``cov``; ``cov`` may be singular."""
    values, vectors = np.linalg.eigh(cov)
    root: FloatArray = vectors * np.sqrt(np.clip(values, 0.0, None))
    return root


@dataclass(frozen=True, kw_only=True, eq=False)
class SimulatedTruth:
    """What was planted in a simulated cohort (``truth/state_space.npz``, written by ``data_prep/simulate.py``).

    Parameters
    ----------
    facts : dict
        The content of ``truth.json``, which explains every field.
    arrays : dict of ndarray
        For S subjects and R recordings: ``transition`` and ``process_cov`` (S, d, d), ``loading`` (S, P, K),
        ``readout`` (K, d), ``noise_var`` and ``baseline`` (S, P), ``recording_subject`` (R,) and, where there is a
        task, ``inputs/<recording_id>`` (T, d).
    """

    facts: dict[str, Any]
    arrays: dict[str, NDArray[Any]]

    @property
    def recordings(self) -> tuple[str, ...]:
        """Recording ids such as ``sub-001_task-rest``, in the order of the cohort."""
        return tuple(self.facts["recordings"])

    @property
    def parcels(self) -> tuple[str, ...]:
        """Parcel names in atlas order."""
        return tuple(self.facts["parcels"])

    @property
    def networks(self) -> tuple[str, ...]:
        """Name of the planted network of each parcel, in atlas order."""
        return tuple(self.facts["networks"])

    @property
    def severity_parcels(self) -> NDArray[np.int64]:
        """Positions of the parcels whose loading moves with severity."""
        return np.asarray(self.facts["severity_parcels"], dtype=np.int64)

    @property
    def tr_s(self) -> float:
        """Repetition time, s."""
        return float(self.facts["tr_s"])

    def system(self, recording_id: str) -> tuple[LinearStateSpace, FloatArray | None]:
        """Return the system that one recording was drawn from.

        Parameters
        ----------
        recording_id : str
            BIDS stem with the entities sub, ses, task and run only.

        Returns
        -------
        system : LinearStateSpace
            In the units of the parcel-mean series: ``bold - baseline`` without motion is a draw from it.
        inputs : ndarray, shape (T, d), or None
            Task drive of the state; None at rest.
        """
        subject = self._subject(recording_id)
        system = LinearStateSpace(
            transition=self.arrays["transition"][subject],
            process_cov=self.arrays["process_cov"][subject],
            loading=self.arrays["loading"][subject] @ self.arrays["readout"],
            noise_var=self.arrays["noise_var"][subject],
        )
        return system, self.arrays.get(f"inputs/{recording_id}")

    def baseline(self, recording_id: str) -> FloatArray:
        """Return the mean of each parcel, shape (P,), in the units of the images."""
        return np.asarray(self.arrays["baseline"][self._subject(recording_id)], dtype=np.float64)

    def _subject(self, recording_id: str) -> int:
        if recording_id not in self.recordings:
            raise DataError(
                f"the simulated cohort has no recording {recording_id!r}; it has {len(self.recordings)}, "
                f"the first is {self.recordings[0]!r}"
            )
        return int(self.arrays["recording_subject"][self.recordings.index(recording_id)])


def load_truth(source: str | Path | bytes | BinaryIO) -> SimulatedTruth:
    """Read what was planted in a simulated cohort.

    Parameters
    ----------
    source : path, bytes or binary file
        The cohort's folder, its ``truth`` folder, the ``.npz`` file itself, or the content of that file.

    Raises
    ------
    DataError
        If there is no such file or it is not one that ``data_prep/simulate.py`` wrote.
    """
    where = str(source) if isinstance(source, str | Path) else "the given bytes"
    if isinstance(source, str | Path):
        folder = Path(source)
        candidates = [folder, folder / TRUTH_FILE, folder / "truth" / TRUTH_FILE]
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            raise DataError(f"no {TRUTH_FILE} at {where}: give the folder that data_prep/simulate.py wrote")
        content = found.read_bytes()
    else:
        content = source if isinstance(source, bytes) else source.read()
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        facts = json.loads(str(arrays.pop("facts")))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{where} is not the truth of a simulated cohort: {error}") from error
    return SimulatedTruth(facts=facts, arrays=arrays)
