"""The published BrainLM checkpoints: load them, or convert them to safetensors and give them an input contract.

::

    python -m brainlm.official SRC DST
    python -m brainlm.official SRC DST --contract DATASET [--gain G]
    python -m brainlm.official SRC DST --contract DATASET --gain estimate [--data DATASET]

The first copies a published folder (``config.json`` with ``pytorch_model.bin`` or ``model.safetensors``) as
safetensors in the same layout, which `load_official` reads again. With a contract, the folder also says what the model
is fed, and `brainlm.published.PublishedModel` reads it: windows, masks and embeddings as with a model of ours. It does
not become a `BrainLM`, and nothing could make it one: that is another architecture, whose layers, positions and tokens
have no place for these weights.

The scale of the input was never published, and no median or IQR with the weights. Statistics are those of the data set
that is named, times a gain: given, or where hidden values of its train split are predicted best.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from brainlm import input_contract
from brainlm.checkpoint import CONFIG, MANIFEST, WEIGHTS
from brainlm.config import build
from brainlm.errors import BrainLMError, CheckpointError, ConfigError
from brainlm.official_13m import NystromBrainLM
from brainlm.official_config import LayerSizes, NystromConfig, VitMaeConfig
from brainlm.official_vitmae import VitMaeBrainLM, VitMaeFineTuned
from brainlm.store import Store, sha256_of_file

if TYPE_CHECKING:
    from brainlm.input_contract import InputContract
    from brainlm.official_contract import Gain

FORMAT_VERSION = 1
PICKLED_WEIGHTS = "pytorch_model.bin"
MODEL_TYPE_13M, MODEL_TYPE_VIT = "brainlm_mae", "vit_mae"  # of the published configurations
HEAD = "mlp_pred_head."  # prefix of the weights that only a fine-tuned model has
SIGNAL = "signal_embedding_projection."  # in the names of weights that only the 13M family has
IMAGE = "patch_embeddings."  # in the names of weights that only the others have
LFS_POINTER = b"version https://git-lfs"  # how the file begins where a clone did not fetch the weights
NUM_NAMED = 5  # keys named in an error

OfficialModel = NystromBrainLM | VitMaeBrainLM | VitMaeFineTuned
LayerSizesT = TypeVar("LayerSizesT", bound=LayerSizes)


def load_official(folder: str) -> OfficialModel:
    """Load a published checkpoint, in float32 and evaluation mode.

    Parameters
    ----------
    folder : str
        Any fsspec URL of a folder with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``; the first
        of the two is read if both are there.

    Returns
    -------
    module
        Called with ``signal_vectors, xyz_vectors, noise`` (13M family) or ``pixel_values, noise`` (the others).

    Raises
    ------
    CheckpointError
        If the folder is no published checkpoint, or a weight is missing, unexpected or of another shape; the message
        names it and guesses the cause. A pickle that holds more than tensors is refused.
    """
    tree, state, source = _read(Store(folder))
    model = _build(tree, state, f"{folder}/{CONFIG}")
    _check(model, state, source)
    # copies: the file may be mapped, and must not be needed any more
    copies = {name: value.to(torch.float32, copy=True) for name, value in state.items()}
    model.load_state_dict(copies, assign=True)
    return model.eval()


def convert(source: str, target: str, contract: InputContract | None = None, gain: Gain | None = None) -> int:
    """Copy a published folder as safetensors and configuration; return the number of values.

    The weights keep their type. The folder is checked as `load_official` checks it before anything is written.

    Parameters
    ----------
    source, target : str
        Any fsspec URLs.
    contract : InputContract, optional
        Of the data that the model is to be fed: `brainlm.published.PublishedModel` then reads the folder. None writes
        weights and configuration alone.
    gain : Gain, optional
        Factor on the units of `contract`; None = 1, marked as not estimated.
    """
    from safetensors.torch import save

    from brainlm.official_contract import Gain, published_contract

    tree, state, where = _read(Store(source))
    model = _build(tree, state, f"{source}/{CONFIG}")
    _check(model, state, where)
    gain = gain or Gain()
    fed = None if contract is None else published_contract(contract, model.config, gain, contract.atlas.name)
    source_sha256 = sha256_of_file(Store(source).local_file(_weights_name(Store(source))))
    store = Store(target)
    store.remove(CONFIG)  # until it is back, the folder counts as unfinished
    store.remove(input_contract.FILE_NAME)  # of an earlier conversion
    store.remove(MANIFEST)
    # clones: a pickle may hold views of one storage, which safetensors refuses
    copies = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    data = save(copies, metadata={"format": "pt"})
    store.write_bytes(WEIGHTS, data)
    if fed is not None:
        store.write_bytes(input_contract.FILE_NAME, fed.dumps().encode())
        manifest = {
            "format_version": FORMAT_VERSION,
            "source": Store(source).url,
            "source_sha256": source_sha256,
            "weights_sha256": hashlib.sha256(data).hexdigest(),
            "gain": gain.value,
            "gain_source": gain.source,
            "gain_note": gain.note,
        }
        store.write_json(MANIFEST, manifest)
    store.write_json(CONFIG, tree)  # last, so a folder that has one is complete
    return sum(value.numel() for value in state.values())


def estimate_gain(source: str, contract: InputContract, data: str) -> Gain:
    """Find the gain at which a published model predicts hidden values of a data set's train split best.

    Raises
    ------
    ConfigError
        If the model is fine-tuned (it has no decoder), or no gain is better than the mean.
    """
    from brainlm.contract_distance import measure_distance, read_recordings
    from brainlm.dataset import open_dataset
    from brainlm.official_contract import Gain, published_contract
    from brainlm.published import PublishedModel

    dataset, network = open_dataset(data), load_official(source)
    contract.check_fits(dataset.contract, ours="the contract", theirs=f"the data set {dataset.name}")
    model = PublishedModel(network, published_contract(contract, network.config, Gain(), contract.atlas.name))
    found = measure_distance(model.to("cuda" if torch.cuda.is_available() else "cpu"), read_recordings(dataset))
    if found.r2_at_gain <= 0 or found.gain_at_edge:
        raise ConfigError(
            f"--gain estimate: the best gain in the train split of {dataset.name} is {found.gain:.4g}, with an R2 of "
            f"{found.r2_at_gain:.3g}; that is no optimum. Check the preparation (atlas, TR, filter), or give a number"
        )
    note = (
        f"R2 {found.r2_at_gain:.3f} against {found.r2_at_1:.3f} at gain 1, on {found.num_windows} windows of the train "
        f"split of {dataset.name}"
    )
    return Gain(value=found.gain, source="estimated", note=note)


def _weights_name(store: Store) -> str:
    """Return the name of the weights in a published folder, "" if there are none."""
    return next((name for name in (WEIGHTS, PICKLED_WEIGHTS) if store.exists(name)), "")


def _read(store: Store) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Return the configuration, the weights, and the address of the weights."""
    weights = _weights_name(store)
    if not weights or not store.exists(CONFIG):
        lacking = CONFIG if weights else f"{WEIGHTS} or {PICKLED_WEIGHTS}"
        nested = [name for name in store.names() if store.exists(f"{name}/{CONFIG}")]
        hint = f": wrong folder? Did you mean {' or '.join(store.url_of(name) for name in nested)}?" if nested else ""
        raise CheckpointError(f"{store.url} holds no published checkpoint (no {lacking}){hint}")
    tree = store.read_json(CONFIG)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{store.url_of(CONFIG)}: expected a mapping, found {type(tree).__name__}")
    path, source = store.local_file(weights), store.url_of(weights)
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise CheckpointError(
                f"{source} is a Git LFS pointer, not the weights: run 'git lfs pull' where it is from"
            )
    if weights == WEIGHTS:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return tree, load_file(path), source
        except SafetensorError as error:
            raise CheckpointError(f"{source} cannot be read: {error}") from error
    from pickle import UnpicklingError

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(
            f"{source} is refused: it holds more than tensors, and reading it could run code ({error})"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{source} cannot be read: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{source}: expected a mapping of names to tensors, found another structure")
    return tree, dict(state), source


def _build(tree: dict[str, Any], state: dict[str, Tensor], where: str) -> OfficialModel:
    """Return the model of a configuration on the meta device; the weights tell a fine-tuned model."""
    with torch.device("meta"):
        if tree.get("model_type") == MODEL_TYPE_13M:
            return NystromBrainLM(_settings(NystromConfig, tree, where))
        if tree.get("model_type") == MODEL_TYPE_VIT:
            config = _settings(VitMaeConfig, tree, where)
            fine_tuned = any(name.startswith(HEAD) for name in state)
            return VitMaeFineTuned(config) if fine_tuned else VitMaeBrainLM(config)
    raise CheckpointError(
        f"{where}: expected model_type {MODEL_TYPE_13M!r} (13M family) or {MODEL_TYPE_VIT!r} (111M, 650M), "
        f"found {tree.get('model_type')!r}; BrainLM.from_pretrained reads checkpoints of our own"
    )


def _settings(cls: type[LayerSizesT], tree: dict[str, Any], where: str) -> LayerSizesT:
    """Read the fields that matter; a published configuration holds many more."""
    try:
        return build(cls, {field.name: tree[field.name] for field in fields(cls) if field.name in tree}, where)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _check(model: OfficialModel, state: dict[str, Tensor], source: str) -> None:
    """Raise unless the weights are exactly those of the model."""
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    if missing or unexpected:
        parts = [
            f"{len(names)} {word} ({', '.join(names[:NUM_NAMED])}{', ...' if len(names) > NUM_NAMED else ''})"
            for word, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        cause = _guess_cause(model, expected, state, missing, unexpected)
        raise CheckpointError(f"{source} does not fit its {CONFIG}: {' and '.join(parts)}: {cause}")
    for name, value in expected.items():
        if state[name].shape != value.shape:
            raise CheckpointError(
                f"{source} does not fit its {CONFIG}: {name} has shape {tuple(state[name].shape)}, expected "
                f"{tuple(value.shape)}: weights and configuration are of models of different sizes (wrong subfolder?)"
            )


def _guess_cause(
    model: OfficialModel, expected: dict[str, Tensor], state: dict[str, Tensor], missing: list[str], extra: list[str]
) -> str:
    """Say in words what most likely makes the names differ."""
    is_13m = isinstance(model, NystromBrainLM)
    if any((IMAGE if is_13m else SIGNAL) in name for name in extra):
        weights, config = ("111M or 650M", "13M") if is_13m else ("13M", "111M or 650M")
        return f"wrong family: weights of the {weights} kind beside a configuration of the {config} kind"
    if is_13m and any(name.startswith(HEAD) for name in extra):
        return "wrong family: published fine-tuned models are of the 111M or 650M kind"
    for name in extra:
        for known in expected:
            if name.endswith(f".{known}"):
                prefix = name.removesuffix(known)
                return f"names begin with {prefix!r}: the model was saved inside another; remove the prefix"
            if known.endswith(f".{name}"):
                prefix = known.removesuffix(name)
                return f"names lack {prefix!r}: a part of a model was saved alone"
    if len(missing) == len(expected):
        return "wrong subfolder or family: not one weight of a published BrainLM is there"
    if not extra and missing == [name for name in expected if name.startswith("decoder.")]:
        return "an encoder without decoder or prediction head: wrong subfolder, or the head is in another file"
    if all(_is_layer(name) for name in missing + extra):
        return "weights and configuration differ in their number of layers: wrong subfolder?"
    return "wrong subfolder, or a damaged or edited copy"


def _is_layer(name: str) -> bool:
    return ".layer." in name or "_layers." in name


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m brainlm.official", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SRC", help="published folder, any fsspec URL")
    parser.add_argument("target", metavar="DST", help="folder to write")
    parser.add_argument(
        "--contract",
        metavar="DATASET",
        help="data set, checkpoint or input_contract.json whose atlas and statistics the model is to be fed",
    )
    parser.add_argument("--gain", metavar="G", help="factor on the units of the contract (default 1), or 'estimate'")
    parser.add_argument("--data", metavar="DATASET", help="data set to estimate the gain from (default: --contract)")
    args = parser.parse_args(argv)
    try:
        from brainlm.official_contract import read_contract

        if args.contract is None and (args.gain or args.data):
            raise ConfigError("--gain and --data belong to an input contract: give --contract, too")
        if args.data and args.gain != "estimate":
            raise ConfigError("--data is read only to estimate the gain: give --gain estimate, too")
        contract = None if args.contract is None else read_contract(args.contract)
        gain = None if contract is None else _gain(args.gain, args.source, contract, args.data or args.contract)
        num_values = convert(args.source, args.target, contract, gain)
    except BrainLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.target}: {num_values:,} values in {WEIGHTS}, and {CONFIG}")
    if gain is not None:
        print(f"{args.target}: {input_contract.FILE_NAME}; {gain.flag()}")
    return 0


def _gain(text: str | None, source: str, contract: InputContract, data: str) -> Gain:
    from brainlm.official_contract import Gain

    if text is None:
        return Gain()
    if text == "estimate":
        return estimate_gain(source, contract, data)
    try:
        return Gain(value=float(text), source="given")
    except ValueError as error:
        raise ConfigError(f"--gain: expected a number above 0 or 'estimate', found {text!r}") from error


if __name__ == "__main__":
    sys.exit(main())
