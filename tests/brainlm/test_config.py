"""Settings are read strictly: every mistake is an error that names the key by its full path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from brainlm.config import Section, build, config_hash, load_config, parse_entry_args, parse_yaml, to_tree, to_yaml
from brainlm.errors import ConfigError

Write = Callable[[str], Path]


@dataclass(frozen=True, kw_only=True)
class Schedule(Section):
    lr: float = 1e-3
    steps: int = 5
    nesterov: bool = False
    kind: Literal["cosine", "flat"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    note: str | None = None

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"optimizer.schedule.lr: expected above 0, found {self.lr}")


@dataclass(frozen=True, kw_only=True)
class Optimizer(Section):
    schedule: Schedule = field(default_factory=Schedule)


@dataclass(frozen=True, kw_only=True)
class Settings(Section):
    out: str
    optimizer: Optimizer = field(default_factory=Optimizer)


def read(*overrides: str) -> Settings:
    return load_config(Settings, None, ["out=here", *overrides])


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*overrides)
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(text: str) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return path

    return to_file


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.schedule.lrr=1", "optimizer.schedule.lrr: unknown key"),
        ("optimiser.schedule.lr=1", "optimiser: unknown key"),
        ("optimizer.schedule.lr=true", "optimizer.schedule.lr: input should be a valid number, found True (bool)"),
        ("optimizer.schedule.steps=true", "optimizer.schedule.steps: input should be a valid integer, found True"),
        ("optimizer.schedule.steps=3.0", "optimizer.schedule.steps: input should be a valid integer, found 3.0"),
        ("optimizer.schedule.steps='3'", "optimizer.schedule.steps: input should be a valid integer, found '3' (str)"),
        ("optimizer.schedule.nesterov=1", "optimizer.schedule.nesterov: input should be a valid boolean, found 1"),
        ("optimizer.schedule.note=3", "optimizer.schedule.note: input should be a valid string, found 3 (int)"),
        ("optimizer.schedule.kind=step", "optimizer.schedule.kind: input should be 'cosine' or 'flat', found 'step'"),
        ("optimizer.schedule.betas=[0.9, true]", "optimizer.schedule.betas.1: input should be a valid number"),
        ("optimizer.schedule.betas=[0.9]", "optimizer.schedule.betas.1: must be given"),
        ("optimizer.schedule=3", "optimizer.schedule: input should be an object, found 3 (int)"),
        ("optimizer.schedule.lr=-1", "optimizer.schedule.lr: expected above 0, found -1.0"),
        ("optimizer.schedule.lr=.nan", "optimizer.schedule.lr: expected above 0, found nan"),
    ],
)
def test_a_mistake_is_refused_with_the_full_path_of_its_key(override: str, message: str) -> None:
    assert message in refusal(override)


def test_all_mistakes_are_listed_at_once() -> None:
    message = refusal("optimizer.schedule.lr=fast", "optimizer.schedule.stepz=1", "colour=red")
    assert message.startswith("settings: 3 setting(s) refused")
    for path in ("optimizer.schedule.lr", "optimizer.schedule.stepz", "colour"):
        assert f"\n  {path}: " in message


def test_a_setting_without_default_must_be_given() -> None:
    with pytest.raises(ConfigError, match="out: must be given"):
        load_config(Settings, None)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "0.0001", "1.0e-4", "+1e-4"])
def test_a_number_in_any_notation_is_a_float(text: str) -> None:
    assert read(f"optimizer.schedule.lr={text}").optimizer.schedule.lr == 1e-4


def test_a_whole_number_is_a_float_where_a_float_is_asked_for() -> None:
    found = read("optimizer.schedule.lr=2").optimizer.schedule.lr
    assert found == 2.0
    assert isinstance(found, float)


def test_a_date_is_text() -> None:
    assert read("optimizer.schedule.note=2024-05-01").optimizer.schedule.note == "2024-05-01"


def test_order_is_defaults_then_file_then_overrides_and_the_last_wins(write: Write) -> None:
    path = write("out: file\noptimizer:\n  schedule: {lr: 0.5, steps: 7}\n")
    found = load_config(Settings, path, ["optimizer.schedule.steps=8", "optimizer.schedule.steps=9"])
    schedule = found.optimizer.schedule
    assert (found.out, schedule.lr, schedule.steps, schedule.kind) == ("file", 0.5, 9, "cosine")


def test_an_override_reaches_into_a_section_that_the_file_leaves_empty(write: Write) -> None:
    path = write("out: file\noptimizer:\n")
    assert load_config(Settings, path, ["optimizer.schedule.steps=9"]).optimizer.schedule.steps == 9


@pytest.mark.parametrize("override", ["out", "=3", "optimizer..steps=3", ".out=3"])
def test_an_override_that_is_no_assignment_is_refused(override: str) -> None:
    assert f"expected section.key=value, found {override!r}" in refusal(override)


def test_an_override_below_a_value_is_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match="'out' is a value, not a section"):
        load_config(Settings, write("out: file\n"), ["out.deeper=1"])


@pytest.mark.parametrize(
    ("text", "line"),
    [("out: a\nout: b\n", 1), ("out: a\noptimizer:\n  schedule: {steps: 1, steps: 1}\n", 3)],
)
def test_a_key_given_twice_is_refused_with_file_and_line(write: Write, text: str, line: int) -> None:
    path = write(text)
    with pytest.raises(ConfigError, match=f"{path}: the key .* is given twice \\(line {line}\\)"):
        load_config(Settings, path)


@pytest.mark.parametrize("text", ["out: [\n", "out: !!python/name:os.system\n"])
def test_text_that_is_not_plain_yaml_is_refused_with_the_file(write: Write, text: str) -> None:
    path = write(text)
    with pytest.raises(ConfigError, match=f"{path} is not valid YAML"):
        load_config(Settings, path)


def test_a_file_that_is_no_mapping_is_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match="expected a mapping of sections, found list"):
        load_config(Settings, write("- out\n"))


def test_an_empty_file_means_defaults(write: Write) -> None:
    assert load_config(Settings, write(""), ["out=x"]) == Settings(out="x")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config file .*nowhere\.yaml: No such file"):
        load_config(Settings, tmp_path / "nowhere.yaml")


def test_a_config_error_is_also_a_value_error() -> None:
    with pytest.raises(ValueError, match="unknown key"):
        read("colour=red")


@pytest.mark.parametrize("note", ["1e5", "2024-05-01", "no", "0x1F", "null", "12", "a: b", "# x", "ä\n", ""])
def test_settings_survive_being_written_and_read(write: Write, note: str) -> None:
    settings = Settings(out="x", optimizer=Optimizer(schedule=Schedule(lr=3e-9, betas=(0.5, 1 / 3), note=note)))
    assert load_config(Settings, write(to_yaml(settings))) == settings
    assert parse_yaml(to_yaml(settings), "text") == to_tree(settings)


def test_settings_are_written_in_the_order_of_their_fields() -> None:
    lines = to_yaml(Settings(out="x")).splitlines()
    assert [line.strip().split(":")[0] for line in lines[:5]] == ["out", "optimizer", "schedule", "lr", "steps"]


def test_hash_of_settings_sees_values_and_not_the_order_of_keys() -> None:
    assert config_hash({"a": 1, "b": {"c": 2, "d": 3}}) == config_hash({"b": {"d": 3, "c": 2}, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})
    assert config_hash(Settings(out="x")) == config_hash(to_tree(Settings(out="x")))
    assert config_hash(Settings(out="x")) != config_hash(Settings(out="y"))


def test_entries_accept_the_launchers_rank_before_their_own_arguments() -> None:
    args = parse_entry_args("text", ["--local_rank=1", "--config", "a.yaml", "--dry-run", "b.c=1", "d=2"])
    assert (args.config, args.dry_run, args.overrides) == ("a.yaml", True, ["b.c=1", "d=2"])


def test_an_entry_may_take_settings_as_flags_too() -> None:
    args = parse_entry_args("text", ["--data", "a", "b", "--out", "c", "--dry-run", "d=2"], {"data": "", "out": ""})
    assert (args.data, args.out, args.overrides) == (["a", "b"], ["c"], ["d=2"])
    assert parse_entry_args("text", [], {"data": ""}).data is None


def test_entries_need_no_arguments() -> None:
    args = parse_entry_args("text", [])
    assert (args.config, args.dry_run, args.overrides) == (None, False, [])


def test_allowed_values_are_shown_as_they_are_written() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Cleaning(Section):
        strategy: Literal["none", "aCompCor"] = "none"

    with pytest.raises(ConfigError, match="strategy: input should be 'none' or 'aCompCor', found '36P'"):
        build(Cleaning, {"strategy": "36P"}, "test")
