"""A published BrainLM under the interface of our own: windows in contract units, our masks, embeddings, gradients.

`PublishedModel.from_pretrained` reads a folder that ``python -m brainlm.official SRC DST --contract DATASET`` wrote.
What the two families can be asked:

* **13M** (and 5M): a token is one parcel x 20 timepoints, numbered as ours, so any mask of ours is honoured. Tokens
  stay in atlas order. The order matters, because a convolution runs along the tokens; the published code shuffles them
  anew for every window, and gives another embedding every time.
* **111M, 650M**: a token is 16 (14) parcels, neighbours in the order of y, x 16 (14) timepoints of an image with
  margins. A parcel or a patch of ours cannot be hidden alone. Masks that hide the end of the window for every parcel
  are honoured, and masks over the model's own tokens (`PublishedModel.token_of_value`).

Dimension letters: `B` windows, `P` parcels, `W` timepoints, `K` patches in time, `L` tokens of ours, `N` of the model's
own tokens, `D` width. Masks: True = hidden.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from brainlm import hub, input_contract
from brainlm.checkpoint import CONFIG, MANIFEST, WEIGHTS
from brainlm.embedding import Embedding, RecordingEmbedding, embed_recording
from brainlm.errors import CheckpointError, ConfigError, DataError
from brainlm.forecast import Forecast, forecast_recording
from brainlm.input_contract import InputContract
from brainlm.masking import MaskKind, make_mask
from brainlm.official import MODEL_TYPE_13M, MODEL_TYPE_VIT, OfficialModel, load_official
from brainlm.official_13m import NystromBrainLM
from brainlm.official_config import NystromConfig
from brainlm.official_contract import WINDOW_LEN, num_published_parcels
from brainlm.official_layers import by_num_visible
from brainlm.official_vitmae import VitMaeBrainLM, VitMaeFineTuned
from brainlm.published_image import ImageLayout
from brainlm.reading import evaluating
from brainlm.reconstruction import check_decoder, reconstruct_whole
from brainlm.recording import Recording
from brainlm.scaling import recording_mean
from brainlm.store import Store, sha256_of_file
from brainlm.tokens import as_mask
from brainlm.windows import Windows, as_windows

SAME_PLACE_MM = 1.0
UNTRAINED_STD = 0.02  # of CLS and mask tokens without training, as published (initializer_range)
FILES = (CONFIG, WEIGHTS, input_contract.FILE_NAME, MANIFEST)

Family = Literal["13M", "ViT-MAE"]
End = Literal["patches", "pixels"]


@dataclass(frozen=True, kw_only=True)
class PublishedConfig:
    """Sizes under the names of `brainlm.model.ModelConfig`, and the published configuration as it is read."""

    family: Family
    window_len: int
    patch_len: int
    patch_parcels: int = 1
    """Of masks of ours. The tokens of the model itself may be others: `PublishedModel.token_of_value`."""
    published: dict[str, Any] = field(default_factory=dict)

    @property
    def num_patches(self) -> int:
        """Patches of one parcel in one window."""
        return self.window_len // self.patch_len


class PublishedModel(nn.Module):
    """A published model with the input contract of a data set.

    Parameters
    ----------
    network : NystromBrainLM, VitMaeBrainLM or VitMaeFineTuned
        As `brainlm.official.load_official` returns it.
    contract : InputContract
        As `brainlm.official_contract.published_contract` returns it: its units are the model's input.
    manifest : mapping, optional
        Where the weights come from.

    Raises
    ------
    CheckpointError
        If the contract does not have the number of parcels or the window of the network.
    """

    coords_mm: Tensor
    usable: Tensor

    def __init__(
        self,
        network: OfficialModel,
        contract: InputContract,
        manifest: dict[str, Any] | None = None,
        weights_sha256: str = "",
    ) -> None:
        super().__init__()
        self.network = network
        self.contract = contract
        self.manifest = dict(manifest or {})
        self.weights_sha256 = weights_sha256
        is_13m = isinstance(network, NystromBrainLM)
        config = network.config
        num_parcels = num_published_parcels(config)
        if contract.atlas.num_parcels != num_parcels:
            raise CheckpointError(
                f"the input contract has {contract.atlas.num_parcels} parcels, the published model has {num_parcels}"
            )
        if isinstance(network, NystromBrainLM):
            wanted = (network.config.num_timepoints_per_voxel, network.config.timepoint_patching_size)
        else:
            wanted = (WINDOW_LEN, contract.patch_len)
        if (contract.window_len, contract.patch_len) != wanted:
            raise CheckpointError(
                f"the input contract has windows of {contract.window_len} timepoints in patches of "
                f"{contract.patch_len}, the published model takes {wanted[0]} in patches of {wanted[1]}: write the "
                "folder with python -m brainlm.official"
            )
        self.config = PublishedConfig(
            family="13M" if is_13m else "ViT-MAE",
            window_len=contract.window_len,
            patch_len=contract.patch_len,
            published=dict(vars(config)),
        )
        coords_mm = torch.from_numpy(contract.atlas.coords_mm.copy())
        self.layout = None if isinstance(config, NystromConfig) else ImageLayout(config, coords_mm, contract.window_len)
        self.register_buffer("coords_mm", coords_mm, persistent=False)
        self.register_buffer("usable", torch.from_numpy(contract.usable), persistent=False)

    @classmethod
    def from_pretrained(cls, folder: str, revision: str | None = None) -> PublishedModel:
        """Load a converted folder, in float32 and evaluation mode.

        Parameters
        ----------
        folder : str
            A folder (path or fsspec URL), or ``owner/name`` on the Hugging Face hub, that
            ``python -m brainlm.official SRC DST --contract ...`` wrote.
        revision : str, optional
            Branch, tag or commit on the hub.

        Raises
        ------
        CheckpointError
            If it holds no input contract, or its weights are not those that were written.
        """
        folder = hub.local_folder(str(folder), FILES, revision)
        store = Store(folder)
        if not (store.exists(CONFIG) and store.exists(input_contract.FILE_NAME) and store.exists(MANIFEST)):
            raise CheckpointError(
                f"{folder} is not a published checkpoint with an input contract: write one with "
                f"python -m brainlm.official {folder} TARGET --contract DATASET"
            )
        manifest = store.read_json(MANIFEST)
        sha256 = sha256_of_file(store.local_file(WEIGHTS)) if store.exists(WEIGHTS) else ""
        if not isinstance(manifest, dict) or sha256 != manifest.get("weights_sha256"):
            raise CheckpointError(f"{store.url_of(WEIGHTS)} is damaged: its sha256 is not the one in {MANIFEST}")
        tree = store.read_json(input_contract.FILE_NAME)
        contract = InputContract.from_json(tree, store.url_of(input_contract.FILE_NAME))
        return cls(load_official(folder), contract, manifest, sha256).eval()

    def save_pretrained(
        self,
        folder: str,
        facts: dict[str, Any],
        weights: dict[str, Tensor] | None = None,
        beside: Callable[[str], dict[str, bytes]] | None = None,
    ) -> str:
        """Write what `from_pretrained` reads, in float32; return the sha256 of the weights.

        Parameters
        ----------
        facts : mapping
            Of what was changed since they were published; for the manifest.
        weights : mapping, optional
            By the names of this module's `state_dict`; None takes its own.
        beside : callable, optional
            Gives further files, from the sha256 of the weights; they are written before the folder counts as finished.
        """
        from safetensors.torch import save

        is_13m = isinstance(self.network, NystromBrainLM)
        prefix = "network."
        state = {**self.state_dict(), **(weights or {})}
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        data = save({name: value.detach().float().cpu().clone().contiguous() for name, value in own.items()})
        sha256 = hashlib.sha256(data).hexdigest()
        store = Store(folder)
        store.remove(CONFIG)  # until it is back, the folder counts as unfinished
        store.write_bytes(WEIGHTS, data)
        store.write_bytes(input_contract.FILE_NAME, self.contract.dumps().encode())
        store.write_json(MANIFEST, {**self.manifest, **facts, "weights_sha256": sha256})
        for name, content in (beside(sha256) if beside is not None else {}).items():
            store.write_bytes(name, content)
        model_type = MODEL_TYPE_13M if is_13m else MODEL_TYPE_VIT
        store.write_json(CONFIG, {**self.config.published, "model_type": model_type})
        return sha256

    @classmethod
    def untrained_like(cls, model: PublishedModel, seed: int) -> PublishedModel:
        """Return the same sizes and contract with fresh weights, in evaluation mode: the control of probes.

        Positions, which are not trained, are kept; matrices are Xavier-uniform with zero biases, as published.
        """
        network = copy.deepcopy(model.network)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, value in network.named_parameters():
                if not value.requires_grad:
                    continue
                fresh = torch.zeros(value.shape)
                if name.endswith(("cls_token", "mask_token")):
                    fresh.normal_(std=UNTRAINED_STD, generator=generator)
                elif value.ndim > 1:
                    shape = (len(fresh), -1) if "projection" in name else fresh.shape
                    nn.init.xavier_uniform_(fresh.view(shape), generator=generator)
                elif name.endswith("weight"):
                    fresh.fill_(1.0)  # of a LayerNorm
                value.copy_(fresh)
        return cls(network, model.contract, {"untrained_seed": seed}).eval()

    # ------------------------------------------------------------------ what it is

    @property
    def num_parcels(self) -> int:
        return self.contract.atlas.num_parcels

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def window_len(self) -> int:
        return self.config.window_len

    @property
    def patch_len(self) -> int:
        return self.config.patch_len

    @property
    def num_tokens(self) -> int:
        """Tokens of the model's own, N: of the 13M family the same as ours, else the whole grid, margins included."""
        return self.num_parcels * self.config.num_patches if self.layout is None else self.layout.num_tokens

    def token_of_value(self) -> Tensor:
        """Return which of the model's own tokens each value of a window lies in: shape (P, W), int64."""
        if self.layout is not None:
            return self.layout.token_of_value()
        timepoints = torch.arange(self.window_len, device=self.coords_mm.device)
        parcels = torch.arange(self.num_parcels, device=self.coords_mm.device)
        return parcels[:, None] * self.config.num_patches + timepoints // self.patch_len

    def hidden_values(self, mask: Tensor) -> Tensor:
        """Return which values lie in masked tokens, ours (B, L) or the model's own (B, N): shape (B, P, W), bool."""
        if mask.ndim == 2 and mask.shape[1] == self.num_tokens:
            return mask[:, self.token_of_value()]
        return self._our_mask(mask).repeat_interleave(self.patch_len, dim=2)

    def why_not(self, kind: MaskKind) -> str:
        """Say why masks of a kind (`brainlm.masking.make_mask`) cannot be honoured; "" = they can."""
        if isinstance(self.network, VitMaeFineTuned):
            return "a fine-tuned model has no decoder"
        return "" if kind == "future" or self.layout is None else self.layout.why_not_single

    def draw_mask(self, generator: torch.Generator, present_P: Tensor | None = None) -> Tensor:
        """Draw a mask such as the model was trained with, over its own tokens: shape (N,), bool."""
        published = self.network.config
        ratio = published.mask_ratio if 0 < published.mask_ratio < 1 else 0.5
        if self.layout is not None:
            return self.layout.draw_mask(ratio, generator)
        usable = self.usable.cpu() if present_P is None else present_P.cpu() & self.usable.cpu()
        return make_mask("random", self.num_parcels, self.config.num_patches, ratio, generator, usable)

    # ------------------------------------------------------------------ reading

    @torch.no_grad()
    def reconstruct(
        self,
        windows: Windows | Tensor | NDArray[Any],
        mask: Tensor | NDArray[Any] | None = None,
        present_BP: Tensor | None = None,
        kept_BW: Tensor | None = None,
        *,
        end: End | None = None,
        num_parts: int = 4,
        seed: int = 0,
    ) -> Tensor:
        """Predict hidden values, in contract units.

        Parameters
        ----------
        windows : Windows, or Tensor or ndarray of shape (B, P, W) or (P, W)
            Contract units. Hidden values and those of missing parcels are never looked at. A Tensor is taken as it is;
            of the others visible values at censored timepoints are interpolated anew, between values that are visible
            and kept, and parcels with visible values that are not finite count as missing.
        mask : Tensor, shape (B, L) or (B, N), bool, optional
            True = hidden. Over our tokens (one parcel x `patch_len` timepoints), or over the model's own. Windows may
            differ in how many they hide. None: every value is rebuilt, a part of the model's own tokens at a time, as
            `num_parts` and `seed` of `brainlm.reconstruction.reconstruct_whole` say.
        present_BP : Tensor, shape (B, P), bool, optional
            False = missing parcel: not seen (13M) or fed as 0 (the others), and never scored.
        kept_BW : Tensor, shape (B, W), bool, optional
            False = censored timepoint. Patches of ours without a kept timepoint are not seen (others: fed as 0).
        end : {"patches", "pixels"}, optional
            ViT-MAE: how the end of a window is hidden where it is not at the edge of a patch. ``patches`` hides more
            than asked, whole patch columns; ``pixels`` sets the rest to 0, as ``predict_last_pixel`` does. None: as the
            weights were trained, ``pixels`` for ``predict_last_pixel``; for all others, what is read off visible
            patches was never trained.

        Returns
        -------
        Tensor, shape (B, P, W), float32
            NaN wherever a value was visible or its parcel is missing.

        Raises
        ------
        DataError
            If the mask cannot be honoured, or nothing is visible.
        ConfigError
            If the model is fine-tuned: it has no decoder.
        """
        check_decoder(self.manifest)
        if isinstance(self.network, VitMaeFineTuned):
            raise ConfigError("a fine-tuned published model has no decoder: it cannot reconstruct, only predict")
        found = self._checked(windows, present_BP, kept_BW)
        if mask is None:
            attendable = torch.ones(len(found), self.num_tokens, dtype=torch.bool, device=found.values.device)
            if self.layout is None:
                attendable &= self._present(found).repeat_interleave(self.config.num_patches, dim=1)
            attendable &= ~self._unmeasured_tokens(found)
            return reconstruct_whole(self, found, attendable, num_parts, seed)
        mask = as_mask(mask, found.values.device)
        if mask.ndim == 1 and len(found) == 1:
            mask = mask[None]
        wanted = self.hidden_values(mask)
        if wanted.shape != found.values.shape:
            raise DataError(f"a mask of {len(wanted)} windows beside {len(found)} windows")
        if not isinstance(windows, Tensor):
            ignored = wanted | ~found.kept[:, None, :]
            found = found.with_present(found.present & (found.values.isfinite() | ignored).all(dim=2))
            found = found.as_seen(wanted, torch.from_numpy(recording_mean(self.contract)))
        present = self._present(found)
        with evaluating(self):
            if isinstance(self.network, NystromBrainLM):
                predicted = self._reconstruct_tokens(self.network, found, self._our_mask(mask), present)
            elif mask.shape[1] == self.num_tokens:
                predicted = self._reconstruct_image(self.network, found, wanted, mask)
            else:
                predicted = torch.empty_like(found.values)
                whole = self.network.config.train_mode != "predict_last_pixel" if end is None else end == "patches"
                num_hidden = self._layout.timepoints_at_end(self._our_mask(mask), present)
                for count in num_hidden.unique().tolist():
                    rows = torch.nonzero(num_hidden == count)[:, 0]
                    hidden, zeroed = self._layout.hide_end(count, whole_patches=whole)
                    part, tokens = _pick(found, rows), hidden.expand(len(rows), -1)
                    predicted[rows] = self._reconstruct_image(self.network, part, wanted[rows], tokens, zeroed)
        return predicted.float().masked_fill(~(wanted & present[:, :, None]), float("nan"))

    def embed(self, recording: Recording | NDArray[Any], **options: Any) -> RecordingEmbedding:
        """Embed a recording, one row a window, nothing hidden. See `brainlm.embedding.embed_recording`."""
        return embed_recording(self, recording, **options)

    def forecast(self, recording: Recording | NDArray[Any], horizon_s: float, **options: Any) -> Forecast:
        """Forecast what follows a recording, in its own units. See `brainlm.forecast.forecast_recording`."""
        return forecast_recording(self, recording, horizon_s, **options)

    def attention(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse: raise ConfigError that says why."""
        several = "" if self.layout is None else ", whose tokens hold several parcels each"
        raise ConfigError(f"attention is not read from published models{several}: ask a BrainLM of your own")

    parcel_attention = attention

    def embed_windows(self, windows: Windows | Tensor | NDArray[Any]) -> Embedding:
        """Return the embedding of whole windows; gradients flow. Nothing is hidden and the order of tokens is fixed.

        Missing parcels are fed as 0, as in training. Tokens that hold no kept timepoint are left out. In training mode
        dropout is on, in evaluation mode the same windows give the same embedding.

        Returns
        -------
        Embedding
            ``cls (B, D)`` and ``pooled (B, D)``, the mean over all tokens that are fed; in the ViT-MAE family those of
            the margins are among them, as in training.
        """
        found = self._checked(windows)
        values, unmeasured = self._fed(found), self._unmeasured_tokens(found)
        cls = values.new_empty(len(values), 0)
        pooled = cls
        for rows in by_num_visible(unmeasured):
            part: Embedding
            if isinstance(self.network, NystromBrainLM):
                part = self.network.embed(values[rows], self._xyz(len(rows)), unmeasured[rows])
            else:
                part = self.network.embed(self._layout.image(values[rows]), unmeasured[rows])
            if cls.shape[1] == 0:
                cls, pooled = (x.new_zeros(len(values), x.shape[1]) for x in part)
            cls, pooled = cls.index_copy(0, rows, part.cls), pooled.index_copy(0, rows, part.pooled)
        return Embedding(cls, pooled)

    def predict(self, windows: Windows | Tensor | NDArray[Any]) -> Tensor:
        """Return what a fine-tuned model predicts from whole windows, (B,): nothing hidden, the order fixed.

        The published code hides ``mask_ratio`` of the tokens at random here too (``network(pixel_values, noise)``).

        Raises
        ------
        ConfigError
            If the model is not a fine-tuned one.
        """
        if not isinstance(self.network, VitMaeFineTuned):
            raise ConfigError("this published model has no prediction head: only fine-tuned ones (mlp_pred_head) do")
        found = self._checked(windows)
        values, unmeasured = self._fed(found), self._unmeasured_tokens(found)
        out = values.new_zeros(len(values))
        for rows in by_num_visible(unmeasured):
            pred = self.network.predict(self._layout.image(values[rows]), unmeasured[rows])
            out = out.index_copy(0, rows, pred[:, 0].to(out.dtype))
        return out

    # ------------------------------------------------------------------ parts

    def _reconstruct_tokens(
        self, network: NystromBrainLM, windows: Windows, mask_BPK: Tensor, present: Tensor
    ) -> Tensor:
        """Predict all values of a model whose tokens are ours; missing and unmeasured tokens are hidden besides."""
        hidden = (mask_BPK | ~present[:, :, None]).flatten(1) | self._unmeasured_tokens(windows)
        hidden_values = hidden.unflatten(1, (self.num_parcels, -1)).repeat_interleave(self.patch_len, dim=2)
        values = self._fed(windows).masked_fill(hidden_values, 0.0)
        out = torch.empty_like(values)
        for rows in by_num_visible(hidden):
            out[rows] = network.reconstruct(values[rows], self._xyz(len(rows)), hidden[rows]).to(out.dtype)
        return out

    def _reconstruct_image(
        self, network: VitMaeBrainLM, windows: Windows, wanted: Tensor, mask_BN: Tensor, zeroed: range = range(0)
    ) -> Tensor:
        """Predict all values of an image model from the tokens that are not hidden; unmeasured ones are hidden too."""
        values = self._fed(windows).masked_fill(wanted, 0.0)
        hidden = mask_BN | self._unmeasured_tokens(windows)
        out = torch.empty_like(values)
        for rows in by_num_visible(hidden):
            predicted = network.reconstruct(self._layout.image(values[rows]), hidden[rows], zeroed)
            out[rows] = self._layout.parcels(predicted).to(out.dtype)
        return out

    def _our_mask(self, mask: Tensor) -> Tensor:
        """Return a mask over our tokens as (B, P, K)."""
        P, K = self.num_parcels, self.config.num_patches
        if mask.ndim != 2 or mask.shape[1] != P * K:
            own = "" if self.layout is None else f", or (windows, {self.num_tokens}) over its own tokens"
            raise DataError(f"mask of shape {tuple(mask.shape)}, expected (windows, {P * K}){own}")
        return mask.unflatten(1, (P, K))

    def _checked(
        self,
        given: Windows | Tensor | NDArray[Any],
        present_BP: Tensor | None = None,
        kept_BW: Tensor | None = None,
    ) -> Windows:
        """Return Windows of the contract's parcels and length. Their TR has no place: positions count patches."""
        windows = as_windows(given, present_BP, kept_BW)
        if not isinstance(given, Tensor):
            windows = windows.to(self.coords_mm.device)
        P, W = windows.values.shape[1:]
        if (self.num_parcels, self.window_len) != (P, W):
            raise DataError(
                f"windows of {P} parcels x {W} timepoints, a published model takes {self.num_parcels} x "
                f"{self.window_len} and nothing else"
            )
        if windows.coords_mm is not None:
            shift_mm = (windows.coords_mm - self.coords_mm).norm(dim=-1).max()
            if not float(shift_mm) <= SAME_PLACE_MM:
                raise DataError(
                    f"windows whose parcels lie up to {float(shift_mm):.1f} mm from those of the contract: a published "
                    "model knows no others"
                )
        return windows

    def _present(self, windows: Windows) -> Tensor:
        return windows.present & self.usable

    def _kept_patches(self, windows: Windows) -> Tensor:
        """Return which patches in time hold a kept timepoint, (B, K): what the others hold is nobody's business."""
        return windows.kept.unflatten(1, (-1, self.patch_len)).any(dim=2)

    def _fed(self, windows: Windows) -> Tensor:
        """Return the values with 0 for missing parcels and for patches without a kept timepoint."""
        kept = self._kept_patches(windows).repeat_interleave(self.patch_len, dim=1)
        return windows.values.masked_fill(~(self._present(windows)[:, :, None] & kept[:, None]), 0.0)

    def _unmeasured_tokens(self, windows: Windows) -> Tensor:
        """Return which of the model's own tokens hold values of the window, but none in a kept patch: (B, N)."""
        kept = self._kept_patches(windows)
        if self.layout is None:
            return ~kept.repeat(1, self.num_parcels)
        return self.layout.tokens_without(kept.repeat_interleave(self.patch_len, dim=1))

    def _xyz(self, num_windows: int) -> Tensor:
        return self.coords_mm.expand(num_windows, -1, -1)

    @property
    def _layout(self) -> ImageLayout:
        assert self.layout is not None
        return self.layout


def _pick(windows: Windows, rows: Tensor) -> Windows:
    return Windows.of(windows.values[rows], windows.present[rows], windows.kept[rows])


def is_published(folder: str) -> bool:
    """Say whether a folder's configuration is one of a published model."""
    store = Store(folder)
    tree = store.read_json(CONFIG) if store.exists(CONFIG) else None
    return isinstance(tree, dict) and tree.get("model_type") in (MODEL_TYPE_13M, MODEL_TYPE_VIT)
