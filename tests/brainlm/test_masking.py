"""Masks: True = hidden. Counts are exact, missing parcels are hidden besides, chance comes from the generator alone."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from brainlm.errors import ConfigError
from brainlm.masking import MaskKind, complementary_masks, make_mask, mask_generator

P, K = 12, 10
PRESENT = torch.tensor([True, False, True, True, True, True, False, True, True, True, True, True])
KINDS = get_args(MaskKind)


def grid(kind: MaskKind, ratio: float = 0.75, seed: int = 0, present: Tensor | None = None) -> Tensor:
    """Shape (parcels, patches)."""
    mask = make_mask(kind, P, K, ratio, mask_generator(seed), present)
    assert mask.shape == (P * K,)
    assert mask.dtype == torch.bool
    return mask.view(P, K)


@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 0.75, 0.9, 0.999])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("present", [None, PRESENT], ids=["all present", "two missing"])
def test_the_number_hidden_is_exact(kind: MaskKind, ratio: float, present: Tensor | None) -> None:
    mask = grid(kind, ratio, present=present)
    num_parcels = P if present is None else int(present.sum())
    chosen_from = {"random": num_parcels * K, "parcels": num_parcels}.get(kind, K)
    count = min(max(round(ratio * chosen_from), 1), chosen_from - 1)
    tokens_each = num_parcels * K // chosen_from
    here = mask if present is None else mask[present]
    assert int(here.sum()) == count * tokens_each  # True = hidden
    if present is not None:
        assert mask[~present].all()


def test_future_hides_the_last_patches_of_every_parcel() -> None:
    mask = grid("future", 0.3)
    assert not mask[:, :7].any()
    assert mask[:, 7:].all()


def test_time_blocks_hide_the_same_patches_for_every_parcel() -> None:
    mask = grid("time_blocks", 0.4)
    assert torch.equal(mask, mask[:1].expand(P, K))
    assert int(mask[0].sum()) == 4
    assert len({tuple(grid("time_blocks", 0.4, seed)[0].tolist()) for seed in range(20)}) > 10


def test_parcels_are_hidden_for_the_whole_window() -> None:
    mask = grid("parcels", 0.25, present=PRESENT)
    assert ((mask.sum(dim=1) == 0) | (mask.sum(dim=1) == K)).all()
    assert int(mask[PRESENT].all(dim=1).sum()) == 2  # a quarter of 10, rounded to even


def test_every_token_is_hidden_equally_often_at_random() -> None:
    counts = torch.stack([grid("random", 0.5, seed) for seed in range(400)]).float().mean(dim=0)
    assert (counts - 0.5).abs().max() < 0.12  # 4.8 standard errors


@pytest.mark.parametrize("kind", ["random", "parcels", "time_blocks"])
def test_masks_depend_on_the_generator_and_not_on_global_chance(kind: MaskKind) -> None:
    torch.manual_seed(0)
    first = grid(kind, 0.5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(grid(kind, 0.5), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert any(not torch.equal(grid(kind, 0.5, seed), first) for seed in range(1, 4))


def draw(*arguments: int | str) -> tuple[int, ...]:
    seed, *position = arguments
    assert isinstance(seed, int)
    return tuple(torch.randint(2**31, (4,), generator=mask_generator(seed, *position)).tolist())


def test_a_generator_belongs_to_its_seed_and_position() -> None:
    positions: list[tuple[int | str, ...]] = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    positions += [(0, "sub-01", 1), (0, "sub-10", 1), (0, "sub-01", 2), (1, "sub-01", 1)]
    drawn = [draw(*position) for position in positions]
    assert len(set(drawn)) == len(positions)
    assert drawn == [draw(*position) for position in positions]


@pytest.mark.parametrize("num_parts", [2, 3, 4, 7])
@pytest.mark.parametrize("present", [None, PRESENT], ids=["all present", "two missing"])
def test_complementary_masks_hide_every_token_exactly_once(num_parts: int, present: Tensor | None) -> None:
    here = torch.ones(P, dtype=torch.bool) if present is None else present
    seen = torch.stack([here.repeat_interleave(K), torch.ones(P * K, dtype=torch.bool)])
    masks = complementary_masks(seen, num_parts, mask_generator(0))
    assert masks.shape == (num_parts, 2, P * K)
    assert (masks.sum(dim=0) == 1).all()
    for tokens in (seen, ~seen):
        sizes = (masks & tokens).sum(dim=2)  # (num_parts, 2)
        assert int((sizes.amax(0) - sizes.amin(0)).max()) <= 1


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_ratio_that_hides_nothing_or_everything_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match="mask_ratio: expected a fraction between 0 and 1"):
        grid("random", ratio)


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="expected one of random, future, parcels, time_blocks, found 'diagonal'"):
        grid("diagonal")  # type: ignore[arg-type]


def test_a_mask_with_nothing_to_choose_from_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 2 things to choose from, found 1"):
        make_mask("future", P, 1, 0.5, mask_generator(0))
    with pytest.raises(ConfigError, match="found 0"):
        grid("random", present=torch.zeros(P, dtype=torch.bool))
    with pytest.raises(ConfigError, match="num_parts: expected at least 2, found 1"):
        complementary_masks(torch.ones(1, P * K, dtype=torch.bool), 1, mask_generator(0))
