"""What is read off the encoder: one vector a window.

Nothing is hidden and the tokens are in order, so that an embedding is the same each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainlm.atlas import Atlas
from brainlm.errors import ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.ordering import even_starts
from brainlm.reading import ReadableModel, Statistics, as_recording, evaluating
from brainlm.recording import Recording
from brainlm.windows import Windows, cut_windows

if TYPE_CHECKING:
    from brainlm.model import Encoded


class Embedding(NamedTuple):
    """``cls (B, D)`` and ``pooled (B, D)``, the mean over the other tokens; nothing hidden."""

    cls: Tensor
    pooled: Tensor


class Embeds(ReadableModel, Protocol):
    """A model that embeds windows."""

    def embed_windows(self, windows: Windows, /) -> Embedding: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordingEmbedding:
    """Embeddings of the windows of one recording, in order of time.

    Parameters
    ----------
    cls, pooled : ndarray, shape (N, D), float32
        One row a window: the CLS token, and the mean over the others.
    starts_s : ndarray, shape (N,), float64
        Where each window begins, seconds from the first timepoint.
    num_kept : ndarray, shape (N,), int64
        Kept timepoints of each window.
    num_parcels : int
        Parcels that were seen; the others are missing from the recording, or the contract cannot scale them.
    parcels : ndarray, shape (N, P, D), float32, or None
        Mean over the tokens of each parcel, NaN for parcels that were not seen; None where it was not asked for.
    """

    cls: NDArray[np.float32]
    pooled: NDArray[np.float32]
    starts_s: NDArray[np.float64]
    num_kept: NDArray[np.int64]
    num_parcels: int
    parcels: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.starts_s)

    @property
    def mean_cls(self) -> NDArray[np.float32]:
        """Shape (D,): mean over windows, each with the weight of its kept timepoints."""
        return self._mean(self.cls)

    @property
    def mean_pooled(self) -> NDArray[np.float32]:
        """Shape (D,): mean over windows, each with the weight of its kept timepoints."""
        return self._mean(self.pooled)

    @property
    def mean_parcels(self) -> NDArray[np.float32] | None:
        """Shape (P, D): as `mean_pooled`, parcel by parcel; None where it was not asked for."""
        return None if self.parcels is None else self._mean(self.parcels)

    def _mean(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.average(rows.astype(np.float64), axis=0, weights=self.num_kept).astype(np.float32)


def embed_recording(
    model: Embeds,
    recording: Recording | NDArray[Any],
    *,
    tr_s: float | None = None,
    atlas: Atlas | None = None,
    contract: InputContract | None = None,
    statistics: Statistics = "contract",
    native_tr: bool = False,
    batch_size: int = 8,
    per_parcel: bool = False,
) -> RecordingEmbedding:
    """Embed a recording by windows side by side, nothing hidden.

    The last window is padded where the recording ends; what is padding is not looked at. A window without a kept
    timepoint is left out.

    Parameters
    ----------
    model : BrainLM, PublishedModel, or another with ``contract`` and ``embed_windows``
        Read in evaluation mode, whatever mode it is in.
    recording : Recording, or ndarray of shape (T, P)
        Not centred or scaled: that is done here. Not modified.
    tr_s, atlas, contract, statistics
        What an array is, and how other parcels are scaled: see `brainlm.reading.as_recording`.
    native_tr : bool
        Accept another TR than the model's. A window then spans another time than those it was trained on.
    batch_size : int
        Windows fed at a time. Changes nothing but memory and time.
    per_parcel : bool
        Also give the mean over the tokens of each parcel.

    Raises
    ------
    DataError, ConfigError
        As `brainlm.reading.as_recording` and `brainlm.windows.cut_windows`; ConfigError also if the recording has
        other parcels and the weights are tied to one atlas, or if single parcels are not known to the model.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected at least 1, found {batch_size}")
    if per_parcel and (reason := why_no_parcels(model)):
        raise ConfigError(f"per_parcel: {reason}")
    found, starts, windows = side_by_side(
        model.contract, recording, tr_s=tr_s, atlas=atlas, contract=contract, statistics=statistics, native_tr=native_tr
    )
    cls, pooled, parcels = [], [], []
    with evaluating(model) as device:
        for first in range(0, len(windows), batch_size):
            batch = windows[first : first + batch_size].to(device)
            if per_parcel:
                encoded: Encoded = model.encode_grid(*model.seen(batch))  # type: ignore[attr-defined]
                part = embedding_of(encoded)
                parcels.append(parcel_means(encoded).cpu().numpy())
            else:
                part = model.embed_windows(batch)
            cls.append(part.cls.float().cpu())
            pooled.append(part.pooled.float().cpu())
    if not all(bool(part.isfinite().all()) for part in (*cls, *pooled)):
        raise not_finite(found.recording_id, windows, "embedding")
    return RecordingEmbedding(
        cls=torch.cat(cls).numpy(),
        pooled=torch.cat(pooled).numpy(),
        starts_s=np.array(starts) * found.tr_s,
        num_kept=windows.kept.sum(dim=1).numpy(),
        num_parcels=int(windows.present[0].sum()),
        parcels=np.concatenate(parcels) if per_parcel else None,
    )


def side_by_side(
    model_contract: InputContract,
    recording: Recording | NDArray[Any],
    *,
    tr_s: float | None = None,
    atlas: Atlas | None = None,
    contract: InputContract | None = None,
    statistics: Statistics = "contract",
    native_tr: bool = False,
    whole: bool = False,
) -> tuple[Recording, list[int], Windows]:
    """Cut a recording into the windows that answers about it as a whole are averaged over.

    They lie side by side, the last one padded where the recording ends; those without a kept timepoint are left out.
    With `whole` none is padded: as many as fit are spread evenly over the recording.

    Returns
    -------
    recording : Recording
    starts : list of int
        First timepoint of each window.
    windows : Windows

    Raises
    ------
    DataError, ConfigError
        As `embed_recording`.
    """
    found, own = as_recording(
        recording, model_contract, tr_s=tr_s, atlas=atlas, contract=contract, statistics=statistics
    )
    T, W = found.num_timepoints, model_contract.window_len
    if whole and T < W:
        raise DataError(f"{found.recording_id} has {T} timepoints, a window of the model {W}: it is too short")
    every = even_starts(T, W, T // W) if whole else range(0, T, W)
    starts = [start for start in every if found.keep_mask[start : start + W].any()]
    windows = cut_windows(found, model_contract, own_contract=own, starts=starts, native_tr=native_tr)
    if not bool(windows.present.any()):
        raise DataError(f"{found.recording_id}: no parcel that the contract can scale carries signal")
    return found, starts, windows


def not_finite(recording_id: str, windows: Windows, what: str) -> DataError:
    """Return the error of an answer that is not finite, with what is unusual about its windows."""
    largest = float(np.abs(windows.values.numpy()[windows.present.numpy()]).max())
    return DataError(
        f"{recording_id}: the {what} is not finite; in contract units its values reach {largest:.3g}, a "
        "usual recording stays below 10. Compare the units of the series with those that the contract names"
    )


def why_no_parcels(model: Any) -> str:
    """Say why a model has no embedding of single parcels, "" if it has."""
    if not hasattr(model, "encode_grid"):
        return "published models are not asked for single parcels: ask a BrainLM of your own"
    shared = model.config.patch_parcels
    return f"a token of this model holds {shared} parcels, nothing is known of single ones" if shared > 1 else ""


def embedding_of(encoded: Encoded) -> Embedding:
    """Return the CLS token and the mean over the others."""
    tokens = encoded.latent[:, 1:]
    if encoded.valid is None:
        return Embedding(encoded.latent[:, 0], tokens.mean(dim=1))
    valid = encoded.valid[:, 1:, None]
    return Embedding(encoded.latent[:, 0], tokens.masked_fill(~valid, 0).sum(dim=1) / valid.sum(dim=1))


def parcel_means(encoded: Encoded) -> Tensor:
    """Return the mean over the tokens of each parcel: shape (B, P, D), float32, NaN where it has none."""
    tokens_BVD, grid = encoded.latent[:, 1:].float(), encoded.grid
    B, V, D = tokens_BVD.shape
    valid = encoded.ids_keep.new_ones(B, V, dtype=torch.bool) if encoded.valid is None else encoded.valid[:, 1:]
    ids_BV = encoded.ids_keep.masked_fill(~valid, grid.num_tokens)  # padding goes behind the last token
    # Every token is put in its own place and then summed: sums that are scattered on a GPU vary from run to run.
    placed = tokens_BVD.new_zeros(B, grid.num_tokens + 1, D)
    placed.scatter_(1, ids_BV[:, :, None].expand(-1, -1, D), tokens_BVD)
    found = placed.new_zeros(B, grid.num_tokens + 1).scatter_(1, ids_BV, 1.0)
    size = (B, grid.num_rows, grid.num_patches)
    return placed[:, :-1].reshape(*size, D).sum(dim=2) / found[:, :-1].reshape(size).sum(dim=2)[:, :, None]
