"""A split that is given as a table of its own, beside the data set."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from brainlm.errors import ConfigError
from brainlm.members import Member
from brainlm.store import Store
from brainlm.targets import label_of
from train.finetune_settings import SplitSettings

KEYS = ("recording_id", "subject")
MAX_NAMED = 5


@dataclass(frozen=True, eq=False)
class SplitFile:
    """A split as it was read: the role of each recording, or of each subject, as text; "" = left out."""

    url: str
    key: str
    """What rows are of: ``recording_id`` or ``subject``."""
    role_of: dict[str, str]
    sha256: str

    def of(self, member: Member) -> str | None:
        """Return the role of a recording, None where the file does not list it."""
        return self.role_of.get(getattr(member, self.key))

    def check_known(self, members: Sequence[Member]) -> None:
        """Raise `ConfigError` that names who is in the file and not in the data set."""
        unknown = sorted(self.role_of.keys() - {getattr(member, self.key) for member in members})
        if unknown:
            more = f" and {len(unknown) - MAX_NAMED} more" if len(unknown) > MAX_NAMED else ""
            raise ConfigError(
                f"split.file={self.url}: the data set has no {self.key} {', '.join(unknown[:MAX_NAMED])}{more}"
            )


def read_split_file(url: str, sha256: str | None = None) -> SplitFile:
    """Read a table with ``recording_id`` (or else ``subject``) and ``split``.

    Parameters
    ----------
    url : str
        Of a .tsv, .csv or .parquet, at any fsspec URL.
    sha256 : str or None
        What its bytes must have, where that is known.

    Raises
    ------
    ConfigError
        If the file is not such a table, gives somebody two roles, or has other bytes.
    StoreError
        If it cannot be read.
    """
    where = f"split.file={url}"
    folder, slash, name = url.rpartition("/")
    data = Store(folder or slash or ".").read_bytes(name)
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256:
        raise ConfigError(
            f"{where}: expected the sha256 {sha256[:12]}..., found {found[:12]}...: the file is another one than the "
            "run began with. Put it back, or choose another run.out"
        )
    try:
        table = _table(name, data)
    except (ValueError, OSError) as error:  # pandas' and pyarrow's parser errors are ValueErrors
        raise ConfigError(f"{where} cannot be read as a table: {error}") from error
    key = next((key for key in KEYS if key in table.columns), None)
    if key is None or "split" not in table.columns:
        raise ConfigError(
            f"{where}: expected the columns {' or '.join(KEYS)}, and split; found {', '.join(map(str, table.columns))}"
        )
    role_of: dict[str, str] = {}
    for who, value in zip(table[key], table["split"], strict=True):
        role, name = label_of(value), str(who).strip()
        if role_of.setdefault(name, role) != role:
            raise ConfigError(f"{where}: {key} {name} is given {role_of[name]!r} and {role!r}")
    return SplitFile(url, key, role_of, found)


def with_sha256(settings: SplitSettings) -> SplitSettings:
    """Return the settings with the hash of their file, which a run goes on with alone."""
    if settings.file is None:
        return settings
    return replace(settings, file_sha256=read_split_file(settings.file, settings.file_sha256).sha256)


def _table(name: str, data: bytes) -> pd.DataFrame:
    if name.endswith(".parquet"):
        return pd.read_parquet(io.BytesIO(data))
    separator = "\t" if name.endswith(".tsv") else ","
    # As text: 007 is no number, and somebody may be called NA.
    return pd.read_csv(io.BytesIO(data), sep=separator, dtype=str, keep_default_na=False, index_col=False)
