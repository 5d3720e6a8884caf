"""Which model of one results folder is compared with which of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from brainlm.errors import ConfigError
from eval.results_folder import ResultsFolder


@dataclass(frozen=True, kw_only=True)
class ModelPair:
    """A model of A, one of B, and why they were put together ("" = they have the same name)."""

    a: str
    b: str
    why: str = ""


def pair_models(a: ResultsFolder, b: ResultsFolder, asked: Sequence[str] = ()) -> list[ModelPair]:
    """Pair models: as asked, then by name, then the one checkpoint that is left in each folder.

    What was made from a checkpoint (untrained, permuted series) goes with it.

    Parameters
    ----------
    asked : sequence of str
        ``NAME_IN_A=NAME_IN_B``.

    Raises
    ------
    ConfigError
        If a name is not there, or asked for twice.
    """
    pairs = [_asked_pair(text, a, b) for text in asked]
    for side in ("a", "b"):
        names = [getattr(pair, side) for pair in pairs]
        if len(set(names)) < len(names):
            raise ConfigError(f"--model: a model of {side.upper()} was given twice; each is compared with one other")
    for pair in tuple(pairs):
        pairs += _companions(pair, a, b, pairs)
    rest_a, rest_b = _left(a, b, pairs)
    pairs += [ModelPair(a=name, b=name) for name in rest_a if name in rest_b]
    rest_a, rest_b = _left(a, b, pairs)
    only_a, only_b = ([name for name, kind in rest.items() if kind == "brainlm"] for rest in (rest_a, rest_b))
    if len(only_a) == len(only_b) == 1:
        pair = ModelPair(
            a=only_a[0], b=only_b[0], why="the only checkpoint of each folder that the other does not name"
        )
        pairs += [pair, *_companions(pair, a, b, [*pairs, pair])]
    return pairs


def _asked_pair(text: str, a: ResultsFolder, b: ResultsFolder) -> ModelPair:
    places = [place for place, letter in enumerate(text) if letter == "="]  # a name may hold one itself
    for place in places:
        if text[:place] in a.models and text[place + 1 :] in b.models:
            return ModelPair(a=text[:place], b=text[place + 1 :], why="as asked")
    raise ConfigError(
        f"--model: expected NAME_IN_A=NAME_IN_B, found {text!r}. A ({a.store.url}) has {', '.join(a.models)}; "
        f"B ({b.store.url}) has {', '.join(b.models)}"
    )


def _companions(pair: ModelPair, a: ResultsFolder, b: ResultsFolder, pairs: Sequence[ModelPair]) -> list[ModelPair]:
    """Return the pairs of what was made from the two checkpoints of a pair, as `eval.planning` names it."""
    rest_a, rest_b = _left(a, b, pairs)
    untrained = f"untrained ({pair.a})", f"untrained ({pair.b})"
    names = [
        untrained,
        *((name, pair.b + name.removeprefix(pair.a)) for name in rest_a if name.startswith(f"{pair.a}, ")),
    ]
    return [ModelPair(a=name, b=other, why=pair.why) for name, other in names if name in rest_a and other in rest_b]


def _left(a: ResultsFolder, b: ResultsFolder, pairs: Sequence[ModelPair]) -> tuple[dict[str, str], dict[str, str]]:
    taken_a, taken_b = {pair.a for pair in pairs}, {pair.b for pair in pairs}
    return (
        {name: kind for name, kind in a.models.items() if name not in taken_a},
        {name: kind for name, kind in b.models.items() if name not in taken_b},
    )
