"""Validation on subjects that are not trained on: the same windows and masks every time.

Censored timepoints are not scored, and visible values there are interpolated between visible kept ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from brainlm.censoring import refill_censored
from brainlm.errors import DataError, TrainingError
from brainlm.input_contract import InputContract
from brainlm.masking import make_mask, mask_generator
from brainlm.ordering import even_starts
from brainlm.scaling import recording_mean, scale
from brainlm.shards import Recordings
from brainlm.tokens import parcel_groups, parcel_mask, present_rows
from brainlm.windows import Windows, own_positions
from train.engine import Engine
from train.pictures import Example
from train.settings import ValidationSettings

_SEED = 0x7A1
LARGEST = 1e15  # its square, summed over a window, is far from the end of float32


@dataclass(frozen=True, eq=False)
class Window:
    """One window of validation.

    ``batch``: the window alone, as a model is fed it; ``mask (L,)``, True = hidden; ``hidden (P, W)``, the values in
    hidden tokens; ``sd (P,)``, of the recording, contract units.
    """

    batch: Windows
    mask: Tensor
    hidden: Tensor
    sd: Tensor


class HeldOut:
    """Fixed windows of the validation split.

    Parameters
    ----------
    reader : Recordings
        Validation recordings; the first `max_recordings` are used.
    contract : InputContract
        Of the data set.
    model_contract : InputContract, optional
        Of the model, where it is another one; None = `contract`.

    Raises
    ------
    DataError
        If a recording holds values that cannot be scored.
    """

    def __init__(
        self,
        reader: Recordings,
        contract: InputContract,
        settings: ValidationSettings,
        patch_parcels: int = 1,
        model_contract: InputContract | None = None,
    ) -> None:
        self.windows: list[Window] = []
        num_patches = contract.window_len // contract.patch_len
        coords_mm = torch.from_numpy(contract.atlas.coords_mm.copy())
        groups = parcel_groups(coords_mm, patch_parcels) if patch_parcels > 1 else None
        empty = recording_mean(contract)
        self.recording_mean = torch.from_numpy(empty)
        self.example: Example | None = None
        own_coords_mm, own_tr_s, usable = own_positions(contract, model_contract)
        for index, entry in enumerate(reader.entries[: settings.max_recordings]):
            series = reader.recording(index)
            present = torch.from_numpy(reader.present(index) & usable)
            kept_T = reader.kept(index, 0, entry.num_timepoints)
            if not kept_T.any():
                continue
            measured = series if kept_T.all() else series[kept_T]
            if not np.abs(measured).max() <= LARGEST:  # nor where one is nan
                raise DataError(
                    f"{entry.recording_id}, of the val split, holds values that are not finite or above {LARGEST:g}: "
                    "prepare the data set again without it"
                )
            sd = measured.std(axis=0) / np.where(contract.usable, contract.iqr, 1.0)  # contract units
            for start in even_starts(entry.num_timepoints, contract.window_len, settings.windows_per_recording):
                window = scale(series[start : start + contract.window_len], contract).T.copy()
                kept = kept_T[start : start + contract.window_len]
                rows_present = present_rows(present[None], groups)[0] > 0
                mask = make_mask(
                    settings.kind, len(rows_present), num_patches, settings.mask_ratio,
                    mask_generator(_SEED, entry.recording_id, start), rows_present,
                )  # fmt: skip
                mask_PK = parcel_mask(mask, len(present), groups)
                refill_censored(window, ~mask_PK.numpy(), kept, empty)
                batch = Windows(
                    values=torch.from_numpy(window)[None],
                    present=present[None],
                    kept=torch.from_numpy(kept)[None],
                    coords_mm=own_coords_mm,
                    tr_s=None if own_tr_s is None else torch.tensor([own_tr_s]),
                    as_is=True,
                )
                hidden = mask_PK.repeat_interleave(contract.patch_len, dim=1)
                self.windows.append(Window(batch, mask, hidden, torch.from_numpy(sd.astype(np.float32))))

    @torch.no_grad()
    def score(self, engine: Engine) -> dict[str, float]:
        """Return ``val_loss`` (contract units) and ``val_r2`` (units of recording-and-parcel SD). All ranks take part.

        R2 = 1 - sum SSE / sum SST over hidden values at kept timepoints, SST about the recording-and-parcel mean.

        Raises
        ------
        TrainingError
            If a prediction is not finite: it must not drop out of the score.
        DataError
            If there is nothing to score.
        """
        model = engine.model.eval()
        sums = [0.0, 0.0, 0.0, 0.0]
        own = self.windows[engine.world.rank :: engine.world.size]
        rounds = math.ceil(len(self.windows) / engine.world.size)  # partitioned weights need every rank in every round
        for number in range(rounds):
            mine = number < len(own)
            held = own[number] if mine else self.windows[0]
            with engine.whole_tokens():
                predicted = model.reconstruct(held.batch.to(engine.device), held.mask[None].to(engine.device))[0].cpu()
            if not mine:
                continue
            window, kept = held.batch.values[0], held.batch.kept[0]
            if held is self.windows[0]:
                self.example = Example(window.numpy(), held.hidden.numpy(), predicted.numpy())
            answered = held.hidden & (held.batch.present[0] & (held.sd > 0))[:, None]
            if not bool(predicted[answered].isfinite().all()):  # also where the truth is censored
                sums[0] = math.nan
            scored = answered & kept
            error = (predicted - window)[scored].double()
            truth = (window - self.recording_mean[:, None])[scored].double()
            unit = held.sd[:, None].expand_as(window)[scored].double()
            sums[0] += float((error / unit).square().sum())
            sums[1] += float((truth / unit).square().sum())
            sums[2] += float(error.square().sum())
            sums[3] += scored.sum().item()
        sse, sst, squared, count = engine.sum_over_ranks(sums)
        model.train()
        if count == 0:
            raise DataError("no hidden value of the validation windows was measured: all are missing or censored")
        if not math.isfinite(sse):
            raise TrainingError("predictions for the validation windows are not finite: the weights are damaged")
        return {"val_loss": squared / count, "val_r2": 1 - sse / sst}


def score_all(held_out: dict[str, HeldOut], engine: Engine) -> dict[str, float]:
    """Return the scores of every data set, named ``val_r2/NAME`` where there are several, and their means."""
    scores = {name: part.score(engine) for name, part in held_out.items()}
    means = {key: sum(s[key] for s in scores.values()) / len(scores) for key in ("val_loss", "val_r2")}
    if len(scores) == 1:
        return means
    return means | {f"{key}/{name}": value for name, own in scores.items() for key, value in own.items()}
