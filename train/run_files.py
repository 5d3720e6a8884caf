"""What a training run is known by: config.yaml, manifest.json and done.json.

They are in ``run.storage``, so that the run can go on from a host that has never seen it, and again in ``run.out`` for
whoever looks there. Without ``run.storage`` that is one place. Rank zero alone reads and writes them.
"""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import IO, Any

from torch import nn

from brainlm.config import to_tree, to_yaml
from brainlm.errors import ConfigError
from brainlm.provenance import git_commit, versions
from brainlm.store import Store
from brainlm.world import World
from train.engine import deepspeed_dict
from train.settings import TrainSettings

CONFIG, MANIFEST, DONE = "config.yaml", "manifest.json", "done.json"
# Settings that a run may go on with changed: they touch the weights by rounding at most, and what dropout leaves out.
MAY_CHANGE = {
    "run.out", "run.max_hours", "run.max_skipped", "run.log_every", "run.snapshot_every", "run.keep_snapshots",
    "engine.threads", "engine.timeout_s", "engine.zero_stage", "data.micro_batch_size",
    "run.keep_best", "engine.activation_checkpointing", "engine.offload_optimizer", "engine.compile",
    "split.file",  # wherever it lies now: its sha256 may not
}  # fmt: skip
# What hosts may differ in: where they keep their metrics, and what reads no tensor of another rank.
MAY_DIFFER = {"config.run.out", "versions.python", "versions.brainlm", "versions.safetensors"}


def describe(settings: TrainSettings, module: nn.Module, world: World) -> dict[str, Any]:
    """Return what the manifest says of model, machine and settings."""
    counts = [(p.numel(), p.requires_grad) for p in module.parameters()]
    num_trained = sum(count for count, is_trained in counts if is_trained)
    return {
        "git_commit": git_commit(),
        "num_parameters": sum(count for count, _ in counts),
        "world_size": world.size,
        "versions": versions("torch", "numpy", "deepspeed", "safetensors"),
        "deepspeed": deepspeed_dict(settings, world.size, num_trained),
        "config": to_tree(settings),
    }


def check_same_on_all_ranks(told: list[tuple[str, dict[str, Any]]]) -> None:
    """Raise `ConfigError` that lists what differs, if ranks were started with other settings, data or code.

    Parameters
    ----------
    told : list
        Host and manifest of each rank, in their order. A git commit that one does not know ("") is none that differs.
    """
    first_host, first = told[0][0], flat(told[0][1])
    differs = []
    for rank, (host, manifest) in enumerate(told):
        ours = flat(manifest)
        for key in sorted(first.keys() | ours.keys()):
            theirs, mine = first.get(key), ours.get(key)
            unknown = key == "git_commit" and not (theirs and mine)
            if key not in MAY_DIFFER and theirs != mine and not unknown:
                differs.append(f"  {key}: {theirs!r} on rank 0 ({first_host}), {mine!r} on rank {rank} ({host})")
    if differs:
        raise ConfigError("ranks must be started with the same settings, data set and code:\n" + "\n".join(differs))


def lock_folder(folder: Path) -> IO[str]:
    """Keep other training runs of this host out of a folder for as long as the returned file is open.

    Raises
    ------
    ConfigError
        If another process trains there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(
            f"another process is training in {folder}: wait for it, end it, or choose another run.out"
        ) from error
    return file


def places(settings: TrainSettings) -> list[Store]:
    """Return where the files are; the first place counts."""
    run = settings.run
    return [Store(url) for url in dict.fromkeys((run.storage or run.out, run.out))]


def read_done(settings: TrainSettings) -> dict[str, Any] | None:
    """Return what done.json says; None if the run is not done."""
    home = places(settings)[0]
    done: dict[str, Any] | None = home.read_json(DONE) if home.exists(DONE) else None
    return done


def write_done(settings: TrainSettings, done: dict[str, Any]) -> None:
    for place in places(settings):
        place.write_json(DONE, done)


def write_run_files(settings: TrainSettings, manifest: dict[str, Any]) -> None:
    """Write config.yaml and manifest.json before step 0; those of a run that goes on stay as they are."""
    found = [place for place in places(settings) if place.exists(MANIFEST)]
    first = {name: found[0].read_bytes(name) for name in (CONFIG, MANIFEST)} if found else {}
    for place in places(settings):
        if not place.exists(MANIFEST):
            place.write_bytes(CONFIG, first.get(CONFIG) or to_yaml(settings).encode())
            place.write_bytes(MANIFEST, first.get(MANIFEST) or json.dumps(manifest, indent=1).encode())


def check_same_run(settings: TrainSettings, data_hash: str) -> None:
    """Raise `ConfigError` that lists what differs, if a run with other settings or data is there."""
    for place in places(settings):
        if place.exists(MANIFEST):
            _check_same_run(settings, data_hash, place)


def _check_same_run(settings: TrainSettings, data_hash: str, place: Store) -> None:
    manifest = place.read_json(MANIFEST)
    theirs, ours = flat(manifest["config"]), flat(to_tree(settings))
    differs = [
        f"  {key}: {theirs.get(key)!r} there, {ours.get(key)!r} here"
        for key in sorted(theirs.keys() | ours.keys())
        if key not in MAY_CHANGE and theirs.get(key) != ours.get(key)
    ]
    if manifest["data_hash"] != data_hash:
        differs.append(f"  data set content: {manifest['data_hash'][:12]} there, {data_hash[:12]} here")
    if differs:
        key = "run.out" if place.url == str(Store(settings.run.out).url) else "run.storage"
        raise ConfigError(
            f"{place.url} belongs to a run with other settings; choose another {key}, or remove it:\n"
            + "\n".join(differs)
        )


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by their dotted paths."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in flat(sub, f"{prefix}.{name}" if prefix else name).items()}
