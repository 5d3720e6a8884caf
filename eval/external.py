"""Baselines and tasks that are not in this repository: a class named ``package.module:Class`` in the settings."""

from __future__ import annotations

import importlib
from typing import Any

from brainlm.errors import ConfigError
from eval.models import MethodSpec


def is_external(name: str) -> bool:
    return ":" in name


def external_class(path: str) -> Any:
    """Import a class that has a `name` and a `version`.

    Raises
    ------
    ConfigError
        If it cannot be imported, or lacks them.
    """
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{path!r} cannot be imported ({error}). Expected package.module:Class, installed or on "
            "PYTHONPATH, where the work runs too"
        ) from error
    if not isinstance(getattr(found, "name", None), str) or not isinstance(getattr(found, "version", None), int):
        raise ConfigError(f"{path} must have a `name` (str) and a `version` (int), raised with every change")
    return found


def external_spec(path: str) -> MethodSpec:
    """Describe such a baseline; its results are computed again when its name, version or path changes."""
    found = external_class(path)
    return MethodSpec(name=found.name, kind="baseline", model_hash=f"{found.name} v{found.version}", variant=path)
