"""Windows with what is to be predicted from them: batches for training, recordings for validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainlm.censoring import refill_censored
from brainlm.embedding import side_by_side
from brainlm.errors import DataError, TrainingError
from brainlm.loader import WindowBatch, WindowLoader
from brainlm.masking import MaskKind
from brainlm.predictor import Predictor
from brainlm.shards import Recordings
from brainlm.targets import Target
from train.engine import Engine


@dataclass(frozen=True)
class TargetBatch(WindowBatch):
    """One micro-batch of one rank, nothing hidden. ``wanted (B, T)``, ``known (B, T)``: see `Target.encode`."""

    wanted: Tensor | None = None
    known: Tensor | None = None

    def inputs(self) -> dict[str, Any]:
        """Return what `brainlm.predictor.Predictor` is called with."""
        return {"windows": self.as_windows(), "wanted_BT": self.wanted, "known_BT": self.known}

    @property
    def num_scored_values(self) -> int:
        """Targets that are known."""
        assert self.known is not None
        return int(self.known.sum())


def encode_all(targets: Sequence[Target], columns: Sequence[Sequence[object]]) -> tuple[Tensor, Tensor]:
    """Return what is to be predicted, (N, T), and which of it is known, from the values of each target."""
    found = [target.encode(values) for target, values in zip(targets, columns, strict=True)]
    wanted = np.stack([wanted for wanted, _ in found], axis=1)
    known = np.stack([known for _, known in found], axis=1)
    return torch.from_numpy(wanted), torch.from_numpy(known)


class TargetLoader(WindowLoader):
    """Training windows as `WindowLoader` draws them, nothing hidden, with the targets of their recordings.

    Parameters
    ----------
    wanted, known : Tensor, shape (N, T)
        One row a recording of the reader.
    """

    def __init__(self, reader: Recordings, *arguments: Any, wanted: Tensor, known: Tensor, **options: Any) -> None:
        super().__init__(reader, *arguments, **options)
        self._wanted, self._known = wanted, known

    def _batch(self, step: int, first: int, rows: NDArray[np.int64], kind: MaskKind, ratio: float) -> TargetBatch:
        windows, W = self.windows(rows), self.contract.window_len
        visible = np.ones((windows.shape[1], W // self.contract.patch_len), dtype=bool)
        presents, kepts = [], []
        for i, (recording, start) in enumerate(rows.tolist()):
            kept = self.reader.kept(recording, start, W)
            if not kept.all():
                refill_censored(windows[i].numpy(), visible, kept, self._mean_z)
            presents.append(torch.from_numpy(self.reader.present(recording) & self._usable))
            kepts.append(torch.from_numpy(kept))
        recordings = torch.from_numpy(rows[:, 0].copy())
        return TargetBatch(
            windows=windows,
            mask=torch.zeros(len(rows), 0, dtype=torch.bool),
            present=torch.stack(presents),
            ids_decoded=None,
            kept=torch.stack(kepts),
            groups=self._groups,
            coords_mm=self._coords_mm,
            tr_s=None if self._tr_s is None else torch.full((len(windows),), self._tr_s),
            wanted=self._wanted[recordings],
            known=self._known[recordings],
        )


class HeldOutTargets:
    """Validation recordings, predicted as `Predictor.predict` does: means over whole windows.

    Parameters
    ----------
    reader : Recordings
    wanted, known : Tensor, shape (N, T)
        One row a recording of the reader.
    """

    def __init__(self, reader: Recordings, wanted: Tensor, known: Tensor, max_recordings: int | None = None) -> None:
        chosen = torch.nonzero(known.any(dim=1))[:, 0].tolist()
        if max_recordings is not None and len(chosen) > max_recordings:  # spread over all of them
            chosen = [chosen[i * len(chosen) // max_recordings] for i in range(max_recordings)]
        if not chosen:
            raise DataError("no validation recording has a known target")
        self._reader, self._chosen, self._wanted, self._known = reader, chosen, wanted, known

    def __len__(self) -> int:
        return len(self._chosen)

    def score(self, engine: Engine) -> dict[str, float]:
        """Return ``val_loss`` and ``val_r2``: means over targets. All ranks take part.

        The loss is in units of that of the best constant answer over the training subjects; ``val_r2`` is the share
        that is explained of the loss of that answer over these subjects: R2 of a regression about the training mean,
        McFadden's R2 of a classification. Where there are several targets each has its own, ``val_r2/COLUMN``.

        Raises
        ------
        TrainingError
            If a prediction is not finite.
        """
        predictor = engine.module
        assert isinstance(predictor, Predictor)
        num = len(predictor.targets)
        sums = np.zeros((3, num))  # loss, loss of the constant answer, count
        for number in self._chosen[engine.world.rank :: engine.world.size]:
            _, _, windows = side_by_side(
                predictor.contract, self._reader.as_recording(number), native_tr=True, whole=True
            )
            answers = predictor.answers(windows, windows.kept.sum(dim=1).numpy())
            for t, (target, answer) in enumerate(zip(predictor.targets, answers, strict=True)):
                if self._known[number, t]:
                    wanted = self._wanted[number, t : t + 1]
                    nothing = torch.zeros(1, target.num_outputs)
                    sums[0, t] += answer_loss(target, answer, wanted)
                    sums[1, t] += float(target.loss(nothing, wanted))
                    sums[2, t] += 1
        loss, constant, count = np.array(engine.sum_over_ranks(sums.flatten().tolist())).reshape(3, num)
        if not np.isfinite(loss).all():
            raise TrainingError("predictions for the validation subjects are not finite: the weights are damaged")
        known = count > 0
        r2 = np.where(known, 1 - loss / np.where(known, constant, 1.0), math.nan)
        losses = np.where(known, loss / np.maximum(count, 1), math.nan)
        scores = {"val_loss": float(losses[known].mean()), "val_r2": float(r2[known].mean())}
        if num > 1:
            for target, own in zip(predictor.targets, r2.tolist(), strict=True):
                if math.isfinite(own):
                    scores[f"val_r2/{target.column}"] = own
        return scores


def answer_loss(target: Target, answer: NDArray[np.float64], wanted: Tensor) -> float:
    """Return the loss of an answer that was averaged over the windows of a recording."""
    if target.kind == "regression":
        return float(target.loss(torch.from_numpy(answer)[None], wanted.double()))
    # logits over the shares whose softmax is this answer
    logits = torch.from_numpy(answer).clamp(min=1e-12).log() - torch.tensor(target.shares, dtype=torch.float64).log()
    return float(target.loss(logits[None], wanted))
