"""Settings: frozen dataclasses filled from one YAML file and dotted overrides, read strictly.

Every section is a frozen, keyword-only dataclass that inherits from `Section` and stands beside the code that reads
it. Order: defaults < file < ``section.key=value``. An unknown key or a value of the wrong type is a `ConfigError`
that names the full path of the key. ``1e-4`` is a number here, although plain YAML 1.1 reads it as a string, and
``true`` is never taken for the number 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from brainlm.errors import ConfigError

SettingsT = TypeVar("SettingsT")

FLOAT_1_2 = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
# on, off, yes and no are text, as in ``ray.address=off``.
BOOL_1_2 = ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


class Section:
    """Base of every settings dataclass: no conversion between types, no unknown keys."""

    __pydantic_config__: ClassVar[Any] = {"strict": True, "extra": "forbid"}


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text, reading ``1e-4`` as the number and ``off`` as the word it is.

    Raises
    ------
    ConfigError
        If the text is not valid YAML or gives a key twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Safe loader with YAML 1.2 floats, dates left as text, and no duplicate keys."""

        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [rule for rule in rules if rule[0] not in ("tag:yaml.org,2002:timestamp", BOOL_1_2[0])]
            for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise ConfigError(f"{where}: the key {key!r} is given twice (line {node.start_mark.line + 1})")
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(*FLOAT_1_2)
    Loader.add_implicit_resolver(*BOOL_1_2)
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from error


def set_dotted(tree: dict[str, Any], override: str) -> None:
    """Put one ``section.key=value`` into a nested mapping, in place. The value is read as YAML."""
    path, equals, value = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"expected section.key=value, found {override!r}")
    node = tree
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{override!r}: {key!r} is a value, not a section")
        node = child
    node[keys[-1]] = parse_yaml(value, f"override {override!r}")


def build(cls: type[SettingsT], tree: Any, where: str) -> SettingsT:
    """Make the dataclass `cls` from a nested mapping, strictly.

    Raises
    ------
    ConfigError
        One error that lists every offending key with its full dotted path.
    """
    from pydantic import TypeAdapter, ValidationError

    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: expected a mapping of sections, found {type(tree).__name__}")
    try:
        # Through JSON: there a strict reader still takes lists for tuples and mappings for sections, and nothing else.
        return TypeAdapter(cls).validate_json(json.dumps(tree))
    except ValidationError as error:
        lines = [f"{where}: {len(error.errors())} setting(s) refused"]
        for item in error.errors():
            path = ".".join(str(part) for part in item["loc"]) or "(top level)"
            if item["type"] == "unexpected_keyword_argument":
                lines.append(f"  {path}: unknown key")
            elif item["type"] == "missing_argument" or item["type"] == "missing":
                lines.append(f"  {path}: must be given")
            elif item["type"] == "value_error":
                lines.append(f"  {path}: {item['ctx']['error']}")
            else:
                found = item["input"]
                message = item["msg"][:1].lower() + item["msg"][1:]  # the rest may hold values, whose case counts
                lines.append(f"  {path}: {message}, found {found!r} ({type(found).__name__})")
        raise ConfigError("\n".join(lines)) from error
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def load_config(cls: type[SettingsT], path: str | Path | None, overrides: list[str] | None = None) -> SettingsT:
    """Read settings: defaults of `cls` < YAML file < dotted overrides.

    Parameters
    ----------
    cls : type
        A frozen dataclass whose sections inherit from `Section`.
    path : path or None
        YAML file; None uses the defaults alone.
    overrides : list of str
        ``section.key=value``, later ones win.
    """
    tree: Any = {}
    where = "settings"
    if path is not None:
        where = str(path)
        try:
            text = Path(path).read_text()
        except OSError as error:
            raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error
        tree = parse_yaml(text, where)
        if tree is None:
            tree = {}
        if not isinstance(tree, dict):
            raise ConfigError(f"{where}: expected a mapping of sections, found {type(tree).__name__}")
    for override in overrides or []:
        set_dotted(tree, override)
    return build(cls, tree, where)


def to_tree(config: Any) -> dict[str, Any]:
    """Return a settings dataclass as plain nested mappings (tuples become lists), ready for YAML or JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: Any) -> str:
    """Return a settings dataclass as YAML text, in the order of its fields."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Safe dumper that quotes text which `parse_yaml` would read as a number."""

    Dumper.add_implicit_resolver(*FLOAT_1_2)
    return yaml.dump(to_tree(config), Dumper=Dumper, sort_keys=False, width=120)


def config_hash(tree: Any) -> str:
    """Return 16 hex digits that identify a nested mapping (or settings dataclass), whatever the order of its keys."""
    import hashlib

    if dataclasses.is_dataclass(tree):
        tree = to_tree(tree)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def parse_entry_args(
    description: str, argv: list[str] | None, flags: Mapping[str, str] | None = None
) -> argparse.Namespace:
    """Parse what every entry takes: ``--config PATH``, ``--dry-run`` and dotted overrides.

    ``--local_rank`` is what the DeepSpeed launcher puts before our arguments; it is accepted and not used, because
    the rank is read from the environment.

    Parameters
    ----------
    flags : mapping, optional
        Name -> help of settings that this entry also takes as ``--name VALUE [VALUE ...]``. Overrides that follow the
        values are among them: an entry divides them.

    Returns
    -------
    argparse.Namespace
        ``config`` (str or None), ``dry_run`` (bool), ``overrides`` (list of str), and each flag (list of str or None).
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="PATH", help="YAML file with the settings")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved settings and what would be done; do nothing"
    )
    for name, text in (flags or {}).items():
        parser.add_argument(f"--{name}", nargs="+", metavar="VALUE", help=text)
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file"
    )
    return parser.parse_args(argv)
