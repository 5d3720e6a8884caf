"""The readout "fine-tuned": the encoder itself learns from the training rows of a problem.

That is what `train/finetune.py` does, as another program: each problem is a training run in a folder of its own, by the
settings of the user's configuration. What it wrote there is used again; what it has not ended it goes on with.
"""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainlm.checkpoint import CONFIG, MANIFEST, train_subjects
from brainlm.config import config_hash
from brainlm.errors import ConfigError, DataError, TrainingError
from brainlm.predictor import Predictor
from brainlm.store import Store
from brainlm.targets import Target, label_of
from eval.clinical.people import People
from eval.clinical.problem import Answer, IntArray, Problem, constant_answer, loss
from eval.models import best_predictor

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
Roles = dict[str, IntArray]
ROOT = Path(__file__).resolve().parents[2]
SPLIT, LOG, PREDICTIONS, SCORES, SNAPSHOTS = (
    "split.tsv", "finetune.log", "predictions.parquet", "scores.json", "snapshots"
)  # fmt: skip
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
NUM_LINES = 20  # of a failed run's output that the error repeats


class FineTuned:
    """Fine-tune a checkpoint for each problem.

    Parameters
    ----------
    people : People
    checkpoint : str
        Folder of the encoder that training begins with.
    config : str
        Path of a configuration of `train/finetune.py`. Checkpoint, data set, targets, split, seed and where the run is
        written are set here, and ``encoder.untrained``.
    folder : str
        Where the runs are kept, one folder a problem: any fsspec URL. It holds ids of recordings.
    untrained : bool
        Begin with random weights.
    allow_seen : bool
        Accept people whom the checkpoint was pretrained on. Where it does not say who they were, they are accepted
        anyway, as the evaluation does.
    threads : int
        Of the training program.
    """

    def __init__(
        self,
        people: People,
        checkpoint: str,
        config: str,
        folder: str,
        untrained: bool = False,
        allow_seen: bool = False,
        threads: int = 1,
    ) -> None:
        self.people, self.untrained, self.threads = people, untrained, threads
        self.checkpoint, self.folder = _absolute(checkpoint), _absolute(folder)
        self.config = Path(config).absolute()
        self.allow_seen = allow_seen or train_subjects(self.checkpoint) is None

    def answer(self, problem: Problem) -> Answer:
        """Fine-tune on the training rows, but those that choose the best weights, and answer for the test rows.

        Raises
        ------
        ValueError
            If confounds are to be removed, or values are not those of the data set: training reads these itself.
        TrainingError
            If the training program fails, with the last lines of its output and where all of it is.
        """
        self._check(problem)
        roles, positions = self._roles(problem)
        split = self._split_tsv(roles)
        store = Store(self.folder).sub(self._name(problem, split))
        if not (store.exists(SCORES) and store.exists(PREDICTIONS)):
            store.write_bytes(SPLIT, split)
            self._train(problem, store)
        store.remove(SNAPSHOTS)  # a multiple of the weights, and the run is over
        table = pd.read_parquet(io.BytesIO(store.read_bytes(PREDICTIONS))).set_index("recording_id")
        values, num_unreadable = self._values(problem, table, problem.test, store)
        validated, _ = self._values(problem, table, problem.train[positions], store)
        chosen = f"step {store.read_json(SCORES)['step']}"
        if num_unreadable:
            chosen += f"; {num_unreadable} of {len(values)} cannot be read: the constant answer"
        return Answer(
            cross_validated=False,
            values=values,
            validation_loss=loss(problem.target, problem.y[positions], validated),
            chosen=chosen,
        )

    def _check(self, problem: Problem) -> None:
        if problem.nuisance is not None:
            raise ValueError("fine-tuned: confounds cannot be removed from features that are trained from end to end")
        column = self.people.values(problem.target.column)
        truth, _ = problem.target.encode([column[row] for row in problem.train])
        if not np.allclose(truth, problem.y, atol=1e-5):
            raise ValueError(
                f"fine-tuned: the training rows have other values of {problem.target.column} than the data set, and "
                "training reads those of the data set; targets are permuted by permute_targets of its own settings"
            )

    def _roles(self, problem: Problem) -> tuple[Roles, IntArray]:
        """Return the rows of each role, and which positions of the training rows validate.

        Training refuses classes that none of its rows has. So families of such classes leave the validation rows, and
        test rows of such classes are not in the file: they are answered for by the weights that it exports.
        """
        column = self.people.values(problem.target.column)
        is_regression = problem.is_regression
        for fit, val in problem.inner():
            if not is_regression:
                fitted = set(problem.y[fit].tolist())
                rare = {problem.groups[i] for i in val if float(problem.y[i]) not in fitted}
                val = np.array([i for i in val if problem.groups[i] not in rare], dtype=np.int64)
            if len(val):
                train = np.setdiff1d(np.arange(len(problem.train)), val)
                known = [
                    is_regression or label_of(column[row]) in ("", *problem.target.classes) for row in problem.test
                ]
                test = problem.test[np.array(known, dtype=bool)]
                return {"train": problem.train[train], "val": problem.train[val], "test": test}, val
        raise ValueError(f"fine-tuned: no training rows of {problem.target.column} are left to validate on")

    def _split_tsv(self, roles: Roles) -> bytes:
        rows = [(self.people.members[row].recording_id, role) for role, found in roles.items() for row in found]
        table = pd.DataFrame(sorted(rows), columns=["recording_id", "split"])
        text: str = table.to_csv(sep="\t", index=False, lineterminator="\n")
        return text.encode()

    def _name(self, problem: Problem, split: bytes) -> str:
        """Return the name of the folder: another one for whatever the run depends on."""
        weights = Store(self.checkpoint)
        identity = {
            "overrides": [o for o in self._overrides(problem, "") if not o.startswith("engine.threads")],
            "config": self._config_text(),
            "checkpoint": [str(weights.read_json(name)) for name in (CONFIG, MANIFEST) if weights.exists(name)],
            "data": self.people.source.dataset.content_hash,
            "split": split.decode(),
            "values": [label_of(v) for v in self.people.values(problem.target.column)],
        }
        safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in problem.target.column)
        return f"{safe}-{config_hash(identity)}"

    def _config_text(self) -> str:
        try:
            return self.config.read_text()
        except OSError as error:
            raise ConfigError(f"cannot read the config file {self.config}: {error.strerror}") from error

    def _overrides(self, problem: Problem, split_url: str) -> list[str]:
        """Return what replaces settings of the configuration, whole sections where others of it would be in the way."""
        chosen: dict[str, Any] = {
            "init_from": self.checkpoint,
            "data.dataset": _absolute(self.people.source.dataset.store.url),
            "targets": [_settings_of(problem.target)],
            "forecast_patches": None,
            "permute_targets": False,
            "split": {"file": split_url, "allow_pretraining_subjects": self.allow_seen},
            "encoder.untrained": self.untrained,
            "run.seed": problem.seed,
            "engine.threads": self.threads,
        }
        return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in chosen.items()]

    def _train(self, problem: Problem, store: Store) -> None:
        with _local_folder(store) as out:
            storage = None if store.is_local else store.url
            command = [
                sys.executable, str(ROOT / "train" / "finetune.py"), "--config", str(self.config),
                *self._overrides(problem, store.url_of(SPLIT)),
                f"run.out={json.dumps(str(out), ensure_ascii=False)}", f"run.storage={json.dumps(storage)}",
            ]  # fmt: skip
            log = out / LOG
            with log.open("ab") as file:
                begin = file.tell()
                status = subprocess.run(command, env=self._environment(), stdout=file, stderr=file).returncode
            said = log.read_bytes()
            if storage is not None:
                store.write_bytes(LOG, said)
        lines = said[begin:].decode(errors="replace").splitlines()[-NUM_LINES:]
        ended = store.exists(SCORES) and store.exists(PREDICTIONS)
        if status or not ended:
            why = f"ended with exit status {status}" if status else "stopped before its end; the same command goes on"
            raise TrainingError(
                f"fine-tuning for {problem.target.column} {why}. All it said is in {store.url_of(LOG)}, and last:\n"
                + "\n".join(lines)
            )

    def _environment(self) -> dict[str, str]:
        """Return the variables of one process alone; it notices by LOCAL_RANK that this one is gone, and leaves."""
        kept = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return kept | {"PYTHONPATH": paths, "LOCAL_RANK": "0", "OMP_NUM_THREADS": str(self.threads)}

    def _values(self, problem: Problem, table: pd.DataFrame, rows: IntArray, store: Store) -> tuple[FloatArray, int]:
        """Return the answers for these rows, in their order, and for how many of them there is but the constant one."""
        found = constant_answer(problem, len(rows))
        ids = [self.people.members[row].recording_id for row in rows]
        predicted: dict[str, dict[str, Any]] = {name: dict(table.loc[name]) for name in ids if name in table.index}
        lacking = [row for row, name in zip(rows, ids, strict=True) if name not in predicted]
        predicted |= self._predict_here(lacking, store)
        for i, name in enumerate(ids):
            if name in predicted:
                found[i] = answer_of(problem.target, predicted[name])
        if not np.isfinite(found).all():
            raise TrainingError(f"{store.url}: predictions of {problem.target.column} are not finite")
        return found, sum(name not in predicted for name in ids)

    def _predict_here(self, rows: Sequence[int], store: Store) -> dict[str, dict[str, Any]]:
        """Predict recordings that training was not told of, or could not read, by the weights that it exported."""
        if not rows:
            return {}
        predictor = Predictor.from_pretrained(best_predictor(store.url))
        found: dict[str, dict[str, Any]] = {}
        for row in rows:
            recording = self.people.recording(row)
            try:
                found[recording.recording_id] = dict(predictor.predict(recording, native_tr=True).columns())
            except DataError as error:
                logger.warning("fine-tuned: %s", error)
        return found


def answer_of(target: Target, predicted: dict[str, Any]) -> FloatArray:
    """Return what columns of ``predictions.parquet`` say, in the numbers of a target that was fitted to other rows.

    The standardised value of a regression, or probabilities, 0 of a class that training did not know.
    """
    if target.kind == "classification":
        columns = [f"probability_{target.column}_{label}" for label in target.classes]
        return np.array([float(predicted.get(column, 0.0)) for column in columns])
    t = target.transformed([float(predicted[f"predicted_{target.column}"])])
    return (t - target.mean) / target.sd


def _settings_of(target: Target) -> dict[str, Any]:
    """Return the settings that a target was fitted by."""
    if target.kind == "regression":
        return {"column": target.column, "kind": target.kind, "transform": target.transform}
    is_balanced = not np.allclose(target.weights, 1.0)  # where all are 1 the two are the same
    weights = "balanced" if is_balanced else None
    return {"column": target.column, "kind": target.kind, "class_weights": weights}


def _absolute(url: str) -> str:
    store = Store(url)
    return store.path() if store.is_local else store.url


@contextmanager
def _local_folder(store: Store) -> Iterator[Path]:
    """Give the folder itself where it is local, else a temporary one for metrics and log."""
    if store.is_local:
        yield Path(store.path())
        return
    with tempfile.TemporaryDirectory(prefix="brainlm-") as folder:
        yield Path(folder)
