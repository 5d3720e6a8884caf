"""Predictors by name: what each baseline and each readout learns from, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from brainlm.errors import ConfigError
from eval.clinical.attentive import AttentiveProbe
from eval.clinical.coordinates import FeatureCoordinates, GramCoordinates
from eval.clinical.folds import Fold
from eval.clinical.gcn import GCN
from eval.clinical.linear import Linear
from eval.clinical.lstm import ClinicalLSTM
from eval.clinical.mlp import MLPOnComponents
from eval.clinical.people import People
from eval.clinical.problem import Answer, FloatArray, Predictor, Problem, constant_answer, loss
from eval.clinical.settings import ClinicalSettings
from eval.clinical.support_vectors import SupportVectors
from eval.clinical.tangent import tangent_coordinates

Prepared = Mapping[str, Mapping[str, NDArray[Any]]]
CONNECTIVITY, COVARIANCES, RAW_SERIES = "connectivity", "covariances", "raw series"
NEEDED = {
    "FC, linear": CONNECTIVITY,
    "FC, SVR": CONNECTIVITY,
    "FC, MLP": CONNECTIVITY,
    "GCN": CONNECTIVITY,
    "FC tangent, linear": COVARIANCES,
    "raw series, SVR": RAW_SERIES,
}
END_TO_END = ("LSTM", "GCN", "fine-tuned")
"""They learn from series or graphs: there are no columns that confounds could be removed from."""
RAW_COMPONENTS = 100


class Constant:
    """The mean, or the shares of the classes."""

    def answer(self, problem: Problem) -> Answer:
        return Answer(
            values=constant_answer(problem, len(problem.test)),
            validation_loss=loss(problem.target, problem.y, constant_answer(problem, len(problem.y))),
        )


def baseline_predictor(
    name: str, people: People, fold: Fold, prepared: Prepared, settings: ClinicalSettings, device: str
) -> Predictor:
    """Return a baseline.

    Parameters
    ----------
    name : str
        Of `eval.clinical.settings.BASELINES`.
    fold : Fold
        What may be fitted without targets is fitted on its training rows.
    prepared : mapping
        Features, by the name of their preparation.
    """
    if name == "LSTM":
        return ClinicalLSTM(people, settings.fit, device=device)
    arrays = prepared[NEEDED[name]]
    if name == "FC tangent, linear":
        return Linear(tangent_coordinates(arrays["covariance"], fold.train, fold.test))
    if name == "GCN":
        return GCN(arrays["fisher_z"], people.cohort.num_parcels, settings.fit, device=device)
    coordinates = GramCoordinates(arrays["gram"])
    if name == "FC, linear":
        return Linear(coordinates)
    if name == "FC, MLP":
        return MLPOnComponents(coordinates, settings.fit, device=device)
    if name == "FC, SVR":
        return SupportVectors(coordinates)
    if name == "raw series, SVR":
        return SupportVectors(coordinates, num_components=RAW_COMPONENTS)
    raise ConfigError(f"clinical.baselines: no baseline is called {name!r}")


def readout_predictor(
    readout: str, arrays: Mapping[str, NDArray[Any]], settings: ClinicalSettings, device: str
) -> Predictor:
    """Return a readout of embeddings: ``linear``, ``SVR``, ``parcels`` or ``attentive``."""
    if readout == "attentive":
        return AttentiveProbe(arrays["parcels"], settings.fit, device=device)
    if readout == "parcels":
        return Linear(GramCoordinates(arrays["parcels_gram"]))
    coordinates = FeatureCoordinates(arrays[settings.embedding])
    return Linear(coordinates) if readout == "linear" else SupportVectors(coordinates)


def confounds_predictor(confounds: FloatArray) -> Predictor:
    """Return a linear model of the confounds alone."""
    return Linear(FeatureCoordinates(confounds)) if confounds.shape[1] else Constant()
