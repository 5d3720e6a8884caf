"""What is compared: networks and baselines behind one interface.

A method is given windows in the units of its own contract, with hidden values already replaced by 0, so that no method
can look at what it is asked for. It answers in the same units.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import CheckpointError, ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.store import Store
from eval.cohort import BoolArray, Cohort, WindowRef
from eval.results import ModelKind

ScaledBy = Literal["checkpoint", "dataset"]
Predictions = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """A method by name: small and plain, so that it can be sent to a worker.

    ``model_hash`` identifies weights or, for a baseline, its edition; ``checkpoint`` is the folder of a network,
    ``variant`` what is done to its input, ``input_hash`` identifies its input contract, ``scaled_by`` says whose median
    and IQR scale what it is fed, and ``part`` which piece of its work is meant, where a task divides it.
    """

    name: str
    kind: ModelKind
    model_hash: str
    checkpoint: str = ""
    variant: str = ""
    input_hash: str = ""
    scaled_by: ScaledBy = "checkpoint"
    part: str = ""
    notes: tuple[str, ...] = ()


class Method(Protocol):
    """Something that predicts hidden values, in the units of its `contract`."""

    @property
    def contract(self) -> InputContract: ...

    def fit(self, cohort: Cohort) -> None:
        """Learn from ``train`` and choose settings on ``val``. Networks are already trained and do nothing."""

    def reconstruct(
        self, windows_z: NDArray[np.float32], mask: BoolArray, present: BoolArray, refs: list[WindowRef]
    ) -> Predictions:
        """Predict hidden values.

        Parameters
        ----------
        windows_z : ndarray, shape (B, P, W), float32
            Contract units; 0 where hidden or missing.
        mask : ndarray, shape (B, L), bool
            True = hidden. Equally many tokens are visible in every window of a batch.
        present : ndarray, shape (B, P), bool
            False = missing parcel.

        Returns
        -------
        ndarray, shape (B, P, W)
            Read only where hidden and present.
        """


class Network:
    """A BrainLM, or a published model, as a `Method`, and as a source of attention."""

    def __init__(self, model: Any, device: str = "cpu") -> None:
        self.model = model.to(device)
        self.device = device
        self._cohort: Cohort | None = None

    @property
    def contract(self) -> InputContract:
        contract: InputContract = self.model.contract
        return contract

    def fit(self, cohort: Cohort) -> None:
        """Nothing to learn: zero-shot. The cohort knows which timepoints are kept."""
        self._cohort = cohort

    def _kept(self, refs: list[WindowRef], window_len: int) -> BoolArray:
        if self._cohort is None:
            return np.ones((len(refs), window_len), dtype=bool)
        return np.stack([self._cohort.kept(ref) for ref in refs])

    def _tokens(self, mask: BoolArray, present: BoolArray) -> BoolArray:
        """Return a mask over single parcels as one over the tokens of the model."""
        groups = getattr(self.model, "groups", None)
        if groups is None:
            return mask
        B, P = present.shape
        hidden = np.concatenate([mask.reshape(B, P, -1) | ~present[:, :, None], np.ones((B, 1, mask.shape[1] // P))], 1)
        members = hidden.astype(bool)[:, groups.cpu().numpy()]  # (B, G, g, K); -1 picks the row that was added
        return np.logical_and.reduce(members, axis=2).reshape(B, -1)

    def _tensors(self, *arrays: NDArray[Any]) -> list[Any]:
        import torch

        return [torch.from_numpy(np.ascontiguousarray(array)).to(self.device) for array in arrays]

    def reconstruct(
        self, windows_z: NDArray[np.float32], mask: BoolArray, present: BoolArray, refs: list[WindowRef]
    ) -> Predictions:
        import torch

        with torch.inference_mode():
            kept = self._kept(refs, windows_z.shape[2])
            tensors = self._tensors(windows_z, self._tokens(mask, present), present, kept)
            out: NDArray[np.float32] = self.model.reconstruct(*tensors).cpu().numpy()
        return out

    def parcel_attention(
        self,
        windows_z: NDArray[np.float32],
        mask: BoolArray,
        present: BoolArray,
        part: str,
        layer: int,
        kept: BoolArray | None = None,
    ) -> NDArray[np.float32]:
        """Return (B, P, P): row = attention of a parcel's tokens, NaN where it had none. See `brainlm.model`."""
        import torch

        from brainlm.windows import Windows

        if kept is None:
            kept = np.ones((len(windows_z), windows_z.shape[2]), dtype=bool)
        with torch.inference_mode():
            values, hidden, here, kept_BW = self._tensors(windows_z, mask, present, kept)
            weights = self.model.parcel_attention(Windows.of(values, here, kept_BW), hidden, part=part, layer=layer)
            out: NDArray[np.float32] = weights.cpu().numpy()
        return out


def load_network(spec: MethodSpec, untrained_seed: int, device: str, dataset: InputContract) -> Network:
    """Load a checkpoint, or a network like it with fresh weights, as `spec.kind` says.

    Parameters
    ----------
    dataset : InputContract
        Of the data that are scored: its median and IQR are used where `spec.scaled_by` says so.
    """
    model = open_model(spec.checkpoint)
    if spec.scaled_by == "dataset":
        model.contract = replace(
            model.contract, median=dataset.median, iqr=dataset.iqr, statistics_from=dataset.statistics_from
        )
    if spec.kind == "untrained":
        model = type(model).untrained_like(model, untrained_seed)
    return Network(model, device)


def open_model(folder: str) -> Any:
    """Load a checkpoint of our own, or a published one that ``python -m brainlm.official`` has converted."""
    from brainlm.checkpoint import CONFIG, MODEL_TYPE
    from brainlm.model import BrainLM
    from brainlm.published import PublishedModel

    tree = Store(folder).read_json(CONFIG)
    if isinstance(tree, dict) and tree.get("model_type") == MODEL_TYPE:
        return BrainLM.from_pretrained(folder)
    return PublishedModel.from_pretrained(folder)


def why_not(model: Any) -> dict[str, str]:
    """Say, task by task, why a model cannot be scored on it."""
    from brainlm.model import BrainLM

    if isinstance(model, BrainLM):
        shared = model.config.patch_parcels
        return {"networks": f"a token holds {shared} parcels: nothing is known of single ones"} if shared > 1 else {}
    found = {"reconstruction": model.why_not("random"), "forecasting": model.why_not("future")}
    found["networks"] = "published models are not asked for attention: their tokens are mixed by a convolution as well"
    if model.config.family != "13M":
        found["networks"] = "a token holds several parcels: nothing is known of single ones"
    return {task: reason for task, reason in found.items() if reason}


@dataclass(frozen=True, kw_only=True, eq=False)
class CheckpointInfo:
    """What is known of a checkpoint before any work is done.

    `name` is what tables call it; `refusals` says by task why it is not scored there.
    """

    name: str
    folder: str
    weights_sha256: str
    num_parameters: int
    config: dict[str, Any]
    manifest: dict[str, Any]
    contract: InputContract
    window_len: int
    patch_len: int
    num_seen_subjects: int = 0
    patch_parcels: int = 1
    refusals: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def newest_checkpoint(folder: str) -> str:
    """Return `folder` if it is a checkpoint, else the newest complete one of the training run in it.

    A checkpoint on the Hugging Face hub (``owner/name``, where no such local folder exists) is downloaded.

    Raises
    ------
    CheckpointError
        If there is none.
    """
    from brainlm import hub
    from brainlm.checkpoint import CONFIG, FILES

    folder = hub.local_folder(folder, FILES) if hub.is_hub_id(folder) else folder
    store = Store(folder)
    if store.exists(CONFIG):  # written last: a folder that has one is complete
        return folder
    steps = []
    for name in store.names("checkpoints"):
        number = name.removeprefix("step-")
        if name.startswith("step-") and number.isdigit():
            steps.append((int(number), name))
    if not steps:  # fine-tuning keeps the best ones alone
        named = ((re.fullmatch(r"best-step-(\d+)", name), name) for name in store.names("checkpoints"))
        steps = [(int(match[1]), name) for match, name in named if match]
    for _, name in sorted(steps, reverse=True):
        if store.exists(f"checkpoints/{name}/{CONFIG}"):
            return store.url_of(f"checkpoints/{name}")
    raise CheckpointError(
        f"{folder} holds no complete checkpoint, and no checkpoints/step-N of a training run: "
        "give the folder that train/pretrain.py wrote"
    )


def best_predictor(folder: str) -> str:
    """Return `folder` if it holds a predictor, else the best one of the fine-tuning run in it.

    Raises
    ------
    CheckpointError
        If there is none.
    """
    from brainlm import hub
    from brainlm.predictor_checkpoint import FILES, is_predictor

    folder = hub.local_folder(folder, FILES) if hub.is_hub_id(folder) else folder
    store = Store(folder)
    if is_predictor(folder) or store.exists("config.json"):
        return folder  # without a head, `Predictor.from_pretrained` says what is missing
    steps = [(int(m[1]), name) for name in store.names("checkpoints") if (m := re.fullmatch(r"best-step-(\d+)", name))]
    for _, name in sorted(steps, reverse=True):
        if is_predictor(store.url_of(f"checkpoints/{name}")):
            return store.url_of(f"checkpoints/{name}")
    raise CheckpointError(
        f"{folder} holds no predictor, and no checkpoints/best-step-N of a fine-tuning run: give the folder that "
        "train/finetune.py wrote"
    )


def describe_checkpoints(
    folders: tuple[str, ...], cohort_subjects: list[str], allow_seen: bool
) -> list[CheckpointInfo]:
    """Load every checkpoint once and check that it may be compared.

    Parameters
    ----------
    folders : tuple of str
        As configured.
    cohort_subjects : list of str
        Subjects of the split to be scored.
    allow_seen : bool
        Accept subjects that a checkpoint was trained on.
    """
    import dataclasses

    from brainlm.checkpoint import seen_subjects
    from brainlm.model import BrainLM

    found: list[CheckpointInfo] = []
    for given in folders:
        folder = newest_checkpoint(given)
        model = open_model(folder)
        ours = isinstance(model, BrainLM)
        seen = seen_subjects(folder, cohort_subjects) if ours else set()
        if seen and not allow_seen:
            raise DataError(
                f"{folder} was trained on {len(seen)} of the {len(set(cohort_subjects))} subjects to be scored: their "
                "scores say nothing about new people. Use a split it never saw, or set allow_seen_subjects=true "
                "(every score is then marked)"
            )
        found.append(
            CheckpointInfo(
                name=_display_name(folder),
                folder=folder,
                weights_sha256=model.weights_sha256,
                num_parameters=sum(p.numel() for p in model.parameters()),
                config=dataclasses.asdict(model.config),
                manifest=dict(model.manifest),
                contract=model.contract,
                window_len=model.config.window_len,
                patch_len=model.config.patch_len,
                num_seen_subjects=len(seen),
                patch_parcels=model.config.patch_parcels,
                refusals=why_not(model),
                notes=() if ours else model.contract.flags,
            )
        )
    names = [info.name for info in found]
    if len(set(names)) < len(names):  # two checkpoints of one training run
        found = [replace(info, name=f"{info.name} {info.folder.rstrip('/').rsplit('/', 1)[-1]}") for info in found]
    names = [info.name for info in found]
    if len(set(names)) < len(names):
        found = [replace(info, name=f"{info.name} ({info.weights_sha256[:8]})") for info in found]
    if len({info.name for info in found}) < len(found):
        raise ConfigError("checkpoints: the same checkpoint is listed twice")
    shapes = {(info.window_len, info.patch_len, info.patch_parcels) for info in found}
    if len(shapes) > 1:
        raise ConfigError(
            "the checkpoints differ in timepoints of a window, timepoints of a patch, or parcels of a token, "
            f"{sorted(shapes)}: their masks cannot be the same, so evaluate them into separate results folders"
        )
    return found


def _display_name(folder: str) -> str:
    parts = folder.rstrip("/").split("/")
    if len(parts) >= 3 and parts[-2] == "checkpoints":
        return f"BrainLM {parts[-3]}"
    return f"BrainLM {parts[-1]}"
