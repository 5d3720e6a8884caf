"""Subjects by keyed hash: who knows or guesses an id can look it up, and nobody can read a list of ids."""

from __future__ import annotations

import hashlib
import hmac


def keyed_hash(key: str, subject: str) -> str:
    """Return the HMAC-SHA256 of a subject; `key` is in hexadecimal and travels with the hashes."""
    return hmac.new(bytes.fromhex(key), subject.encode(), hashlib.sha256).hexdigest()
