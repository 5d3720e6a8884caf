"""Who a model was trained on, as keyed hashes: who knows an id can look it up, nobody can read a list of ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from brainlm.errors import CheckpointError
from brainlm.subject_hash import keyed_hash

FILE_NAME = "train_subjects.json"


@dataclass(frozen=True)
class TrainSubjects:
    """Keyed hashes of subjects; the key, in hexadecimal, travels with them."""

    key: str
    hashes: frozenset[str] = frozenset()

    @classmethod
    def of(cls, weights_sha256: str, subjects: Iterable[str]) -> TrainSubjects:
        """Hash `subjects` with a key of their own for these weights."""
        key = hashlib.sha256(f"train subjects of {weights_sha256}".encode()).hexdigest()
        return cls(key).with_more(subjects)

    def with_more(self, subjects: Iterable[str]) -> TrainSubjects:
        return TrainSubjects(self.key, self.hashes | {keyed_hash(self.key, subject) for subject in subjects})

    def seen(self, subjects: Iterable[str]) -> set[str]:
        """Return those of `subjects` that are among them."""
        return {subject for subject in subjects if keyed_hash(self.key, subject) in self.hashes}

    def to_json(self) -> dict[str, Any]:
        return {"key": self.key, "subjects": sorted(self.hashes)}

    @classmethod
    def from_json(cls, tree: Any, where: str) -> TrainSubjects:
        try:
            bytes.fromhex(tree["key"])
            return cls(tree["key"], frozenset(tree["subjects"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f'{where} is not what save_checkpoint writes, {{"key": hexadecimal, "subjects": [...]}}: fetch or copy '
                "the checkpoint again"
            ) from error
