"""An encoder with a head: predicts properties of whoever was recorded, in their own units.

`train/finetune.py` makes them; `Predictor.from_pretrained` reads what it has written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from brainlm.embedding import not_finite, side_by_side
from brainlm.errors import ConfigError
from brainlm.heads import Head, HeadConfig
from brainlm.input_contract import InputContract
from brainlm.model import BrainLM, Loss
from brainlm.reading import evaluating
from brainlm.recording import Recording
from brainlm.targets import Target
from brainlm.windows import Windows

if TYPE_CHECKING:
    from brainlm.published import PublishedModel
    from brainlm.train_subjects import TrainSubjects


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is predicted of one recording.

    Parameters
    ----------
    values : dict
        By column: a number in the column's own units, or the most probable class.
    probabilities : dict of dict
        By column of a classification: the probability of each class.
    num_windows, num_kept, num_parcels : int
        What it rests on: windows, kept timepoints, parcels that were seen.
    """

    values: dict[str, float | str]
    probabilities: dict[str, dict[str, float]]
    num_windows: int
    num_kept: int
    num_parcels: int

    def columns(self) -> dict[str, float | str]:
        """Return what tables hold: ``predicted_COLUMN``, and ``probability_COLUMN_CLASS`` of a classification."""
        found: dict[str, float | str] = {f"predicted_{column}": value for column, value in self.values.items()}
        for column, shares in self.probabilities.items():
            found |= {f"probability_{column}_{label}": p for label, p in shares.items()}
        return found


class Predictor(nn.Module):
    """Encoder, head and targets.

    Parameters
    ----------
    encoder : BrainLM or PublishedModel
        Its decoder is not used.
    head : HeadConfig
    targets : sequence of Target
        Fitted.

    Raises
    ------
    ConfigError
        If two targets are of one column, or the encoder cannot be pooled as the head wants.
    """

    def __init__(self, encoder: BrainLM | PublishedModel, head: HeadConfig, targets: Sequence[Target]) -> None:
        super().__init__()
        columns = [target.column for target in targets]
        if not columns or len(set(columns)) < len(columns):
            raise ConfigError(f"targets: expected at least one, each column once, found {columns}")
        if head.pooling == "attentive" and not isinstance(encoder, BrainLM):
            raise ConfigError("head.pooling=attentive: published models give no single tokens; take cls or mean")
        self.encoder = encoder
        self.targets = tuple(targets)
        self.head = Head(head, width_of(encoder), sum(target.num_outputs for target in targets))
        self.manifest: dict[str, Any] = {}
        self.weights_sha256 = ""
        self.train_subjects: TrainSubjects | None = getattr(encoder, "train_subjects", None)
        """Who encoder and head were trained on."""
        self.knows_pretraining = isinstance(encoder, BrainLM)
        """False: `train_subjects` has those of the head alone, whoever the encoder was pretrained on."""

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str, revision: str | None = None) -> Predictor:
        """Load a predictor that `save_pretrained` has written, in float32 and evaluation mode."""
        from brainlm.predictor_checkpoint import load_predictor

        return load_predictor(path_or_hub_id, revision)

    def save_pretrained(self, folder: str) -> str:
        """Write encoder, head and targets to one folder; return what identifies them. No pickle."""
        from brainlm.predictor_checkpoint import save_predictor

        return save_predictor(folder, self, self.manifest, self.train_subjects)

    @property
    def contract(self) -> InputContract:
        """What it must be fed."""
        return self.encoder.contract

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def columns_of(self, number: int) -> slice:
        """Return which outputs of the head belong to a target."""
        first = sum(target.num_outputs for target in self.targets[:number])
        return slice(first, first + self.targets[number].num_outputs)

    def features(self, windows: Windows) -> Tensor:
        """Return what the head reads of each window, (B, D): nothing hidden; gradients flow."""
        if self.head.query is not None:
            assert isinstance(self.encoder, BrainLM)
            encoded = self.encoder.encode_grid(*self.encoder.seen(windows))
            valid = None if encoded.valid is None else encoded.valid[:, 1:]
            return self.head.pool(encoded.latent[:, 1:], valid)
        found = self.encoder.embed_windows(windows)
        return found.cls if self.head.config.pooling == "cls" else found.pooled

    def outputs(self, windows: Windows) -> Tensor:
        """Return outputs of the head, (B, O), float32: standardised values, logits over the classes' shares."""
        out: Tensor = self.head(self.features(windows))
        return out

    def forward(self, windows: Windows, wanted_BT: Tensor, known_BT: Tensor) -> Loss:
        """Return the loss over the known targets, in units of that of the best constant answers.

        ``sum`` and ``target_sum`` (of the constant answers) are over windows and targets, ``num_values`` their count.

        Parameters
        ----------
        windows : Windows
        wanted_BT : Tensor, shape (B, T), float32
            From `Target.encode`, one column a target.
        known_BT : Tensor, shape (B, T), bool
            False = missing: adds nothing.
        """
        outputs = self.outputs(windows)
        total, constant = outputs.new_zeros(()), outputs.new_zeros(())
        for number, target in enumerate(self.targets):
            own, wanted, missing = outputs[:, self.columns_of(number)], wanted_BT[:, number], ~known_BT[:, number]
            total = total + target.loss(own, wanted).masked_fill(missing, 0.0).sum()
            constant = constant + target.loss(torch.zeros_like(own), wanted).masked_fill(missing, 0.0).sum()
        return Loss(total, constant, known_BT.sum())

    def answers(self, windows: Windows, num_kept: NDArray[np.int64], batch_size: int = 8) -> list[NDArray[np.float64]]:
        """Return, for each target, what its outputs say of a recording: means over windows, weighted by `num_kept`.

        Standardised value of a regression, shape (1,); probabilities of a classification, shape (C,). No gradients.
        """
        rows: list[list[Tensor]] = [[] for _ in self.targets]
        with evaluating(self) as device:
            for first in range(0, len(windows), batch_size):
                outputs = self.outputs(windows[first : first + batch_size].to(device))
                for number, target in enumerate(self.targets):
                    rows[number].append(target.answers(outputs[:, self.columns_of(number)]).double().cpu())
        return [np.average(torch.cat(found).numpy(), axis=0, weights=num_kept) for found in rows]

    def predict(self, recording: Recording | NDArray[Any], *, batch_size: int = 8, **options: Any) -> Prediction:
        """Predict from a recording, by whole windows spread evenly over it, nothing hidden.

        Parameters
        ----------
        recording : Recording, or ndarray of shape (T, P)
            Not centred or scaled: that is done here. Not modified.
        batch_size : int
            Windows fed at a time.
        **options
            ``tr_s``, ``atlas``, ``contract``, ``statistics``, ``native_tr``: as `brainlm.embedding.embed_recording`.

        Raises
        ------
        DataError, ConfigError
            As `brainlm.embedding.embed_recording`; DataError also if the recording is shorter than a window: the head
            was trained on none that was.
        """
        found, _, windows = side_by_side(self.contract, recording, whole=True, **options)
        num_kept = windows.kept.sum(dim=1).numpy()
        answers = self.answers(windows, num_kept, batch_size)
        if not all(np.isfinite(answer).all() for answer in answers):
            raise not_finite(found.recording_id, windows, "prediction")
        values: dict[str, float | str] = {}
        probabilities: dict[str, dict[str, float]] = {}
        for target, answer in zip(self.targets, answers, strict=True):
            if target.kind == "regression":
                values[target.column] = target.original(float(answer[0]))
            else:
                values[target.column] = target.classes[int(answer.argmax())]
                probabilities[target.column] = dict(zip(target.classes, answer.tolist(), strict=True))
        return Prediction(
            values=values, probabilities=probabilities, num_windows=len(windows), num_kept=int(num_kept.sum()),
            num_parcels=int(windows.present[0].sum()),
        )  # fmt: skip


def width_of(encoder: Any) -> int:
    """Return the width of an encoder's tokens."""
    return int(encoder.config.width if isinstance(encoder, BrainLM) else encoder.network.config.hidden_size)
