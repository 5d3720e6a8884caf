"""What is hidden has no influence, whoever is asked and however: neither directly nor through censored timepoints.

At censored timepoints a series holds values that were interpolated from both sides. A visible one beside a hidden patch
would give the hidden values away. The windows here set that trap: their hidden values differ, and so do the visible
values that were interpolated from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from brainlm.censoring import refill_censored
from brainlm.contract_distance import measure_distance
from brainlm.errors import ConfigError, DataError
from brainlm.model import BrainLM
from brainlm.published import PublishedModel
from brainlm.recording import Recording
from brainlm.windows import Windows, cut_windows, pad_windows
from tests.brainlm.published_models import fine_tuned, nystrom, vit
from tests.brainlm.test_published import published
from tests.brainlm.test_reconstruction import PATCH, K, P, W, model_of, noise

Pair = tuple[Windows, Windows]


def trap(model: BrainLM | PublishedModel, hidden_PW: Tensor, censored: list[int]) -> Pair:
    """Return two windows that differ in hidden values, and in visible ones that were interpolated from these."""
    parcels, length = hidden_PW.shape
    values = torch.randn(1, parcels, length, generator=torch.Generator().manual_seed(7))
    kept = torch.ones(1, length, dtype=torch.bool)
    kept[0, censored] = False
    found = []
    for shift in (0.0, 5.0):
        series = torch.where(hidden_PW[None], values + shift, values)
        refill_censored(series[0].numpy(), np.ones((parcels, length), dtype=bool), kept[0].numpy())
        found.append(Windows(values=series, present=torch.ones(1, parcels, dtype=torch.bool), kept=kept))
    one, two = found
    visible = ~hidden_PW & ~kept[0]
    assert not torch.equal(one.values[0][visible], two.values[0][visible])  # the trap is set
    assert torch.equal(one.values[0][~hidden_PW & kept[0]], two.values[0][~hidden_PW & kept[0]])
    return one, two


def ours(**sizes: Any) -> tuple[BrainLM, Tensor, Pair]:
    model = model_of(**sizes)
    mask = torch.zeros(model.num_rows, K, dtype=torch.bool)
    mask[:, 1] = True
    mask[0, 3] = True
    mask_BL = mask.flatten()[None]
    return model, mask_BL, trap(model, model.hidden_values(mask_BL)[0], [4, 11, 14])


WAYS: dict[str, Callable[[BrainLM, Windows, Tensor], Tensor]] = {
    "encode": lambda model, windows, mask: model.encode(windows, mask).latent,
    "reconstruct": lambda model, windows, mask: model.reconstruct(windows, mask).nan_to_num(),
    "encoder attention": lambda model, windows, mask: model.attention(windows, mask)[0].weights,
    "decoder attention": lambda model, windows, mask: model.attention(windows, mask, part="decoder")[0].weights,
    "parcel attention": lambda model, windows, mask: model.parcel_attention(windows, mask).nan_to_num(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", [{"decoder": "cross"}, {"decoder": "full"}, {"patch_parcels": 3}], ids=str)
def test_hidden_values_tell_nothing_through_censored_timepoints(way: str, sizes: dict[str, Any]) -> None:
    if way == "parcel attention" and "patch_parcels" in sizes:
        pytest.skip("a grouped model has no attention between parcels")
    model, mask, (one, two) = ours(**sizes)
    assert torch.equal(WAYS[way](model, one, mask), WAYS[way](model, two, mask))
    shown = Windows.of(one.values, one.present, one.kept)
    louder = replace(shown, values=one.values + 1.0)
    assert not torch.equal(WAYS[way](model, one, mask), WAYS[way](model, louder, mask))


@pytest.mark.parametrize("decoder", ["cross", "full"])
def test_the_loss_sees_hidden_values_as_targets_alone(decoder: str) -> None:
    """The loss is that of a model which was shown what is visible, and no more."""
    model, mask, (one, two) = ours(decoder=decoder)
    shown = one.as_seen(model.hidden_values(mask))
    assert torch.equal(shown.values[0, 1, 5:10], one.values[0, 1, 5:10])
    from_windows, from_values = model(one, mask), model(shown.values, mask, kept_BW=shown.kept)
    assert torch.equal(from_windows.sum, from_values.sum)
    assert not torch.equal(model(two, mask).sum, from_windows.sum)  # other targets


@pytest.mark.parametrize("kind", ["13M", "ViT, end", "ViT, own tokens"])
def test_published_models_are_told_nothing_either(kind: str) -> None:
    model = published(nystrom() if kind == "13M" else vit())
    num_patches = model.config.num_patches
    if kind == "ViT, own tokens":
        mask = torch.zeros(1, model.num_tokens, dtype=torch.bool)
        mask[:, model.token_of_value()[0, 100]] = True
    else:
        mask = torch.zeros(1, model.num_parcels, num_patches, dtype=torch.bool)
        mask[:, :, num_patches - 1] = True
        mask = mask.flatten(1)
    hidden = model.hidden_values(mask)[0]
    timepoints = torch.nonzero(hidden.any(dim=0))[:, 0]
    first = int(timepoints[0])
    one, two = trap(model, hidden, [first - 3, first - 1])
    assert torch.equal(model.reconstruct(one, mask).nan_to_num(), model.reconstruct(two, mask).nan_to_num())


def test_what_is_interpolated_anew_is_what_the_recording_shows() -> None:
    """With nothing hidden, windows cut from a recording stay as they were cut."""
    model = model_of()
    keep = np.ones(50, dtype=bool)
    keep[[0, 7, 8, 31]] = False
    bold = np.random.default_rng(2).normal(100, 5, (50, P)).astype(np.float32)
    recording = Recording(recording_id="sub-1", subject="1", bold=bold, tr_s=2.0, keep_mask=keep)
    windows = cut_windows(recording, model.contract)
    again = windows.as_seen(torch.zeros_like(windows.values, dtype=torch.bool))
    used = model.token_grid(windows).attendable.view(-1, P, K).repeat_interleave(PATCH, dim=2)
    assert torch.equal(again.values[used], windows.values[used])


class Spy:
    """A model that remembers what it was fed first."""

    def __init__(self, model: PublishedModel) -> None:
        self.model, self.contract, self.draw_mask = model, model.contract, model.draw_mask
        self.hidden_values = model.hidden_values
        self.fed: list[Tensor] = []

    def reconstruct(self, *fed: Tensor) -> Tensor:
        self.fed = self.fed or list(fed)
        return self.model.reconstruct(*fed)


@pytest.mark.parametrize("make", [nystrom, vit])
def test_the_gain_is_not_estimated_from_what_leaks(make: Callable[..., Any]) -> None:
    """Two recordings of equal means differ in two hidden values, of which one lies beside a censored visible one."""
    model = published(make())
    length = model.window_len
    keep = np.ones(length, dtype=bool)
    keep[np.arange(3, length, 4)] = False
    bold = np.random.default_rng(1).normal(0, 1, (length, model.num_parcels)).astype(np.float32)

    def fed(series: np.ndarray) -> list[Tensor]:
        spy = Spy(model)
        recording = Recording(recording_id="sub-1", subject="1", bold=series, tr_s=0.735, keep_mask=keep)
        measure_distance(spy, [recording], num_windows=1)
        return spy.fed

    values, mask = fed(bold)[:2]
    hidden = model.hidden_values(mask)[0].numpy()
    beside = hidden[:, 1:] & ~hidden[:, :-1] & keep[1:] & ~keep[:-1]  # censored and visible, then hidden and kept
    parcel, timepoint = np.argwhere(beside)[0] + (0, 1)
    other = next(t for t in np.flatnonzero(hidden[parcel] & keep) if t != timepoint)
    changed = bold.copy()
    changed[timepoint, parcel] += 8
    changed[other, parcel] -= 8
    again = fed(changed)[0]
    visible = torch.from_numpy(~hidden)[None]
    difference = (again - values).abs() / values.std()
    assert float(difference[visible].max()) < 1e-4  # the recording's mean is subtracted
    assert float(difference.max()) > 1


def test_the_distance_is_of_some_windows() -> None:
    model = published(vit())
    bold = np.random.default_rng(1).normal(0, 1, (200, model.num_parcels)).astype(np.float32)
    recording = Recording(recording_id="sub-1", subject="1", bold=bold, tr_s=0.735)
    for sizes in ({"num_windows": 0}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match="must be at least 1"):
            measure_distance(model, [recording], **sizes)


# ---------------------------------------------------------------------- masks


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_masks_of_zeros_and_ones_are_read_as_false_and_true(dtype: torch.dtype) -> None:
    model, mask, (windows, _) = ours()
    for way in WAYS.values():
        assert torch.equal(way(model, windows, mask.to(dtype)), way(model, windows, mask))
        assert torch.equal(way(model, windows, mask.to(dtype).numpy()), way(model, windows, mask))
    assert torch.equal(model(windows, mask.to(dtype)).sum, model(windows, mask).sum)
    assert torch.equal(model.hidden_values(mask.to(dtype)), model.hidden_values(mask))


@pytest.mark.parametrize("wrong", [torch.full((1, P * K), 2), torch.full((1, P * K), 0.5), [[True] * P * K]])
def test_other_values_are_no_mask(wrong: Any) -> None:
    model, _, (windows, _) = ours()
    for ask in (*WAYS.values(), lambda model, windows, mask: model(windows, mask).sum):
        with pytest.raises(DataError, match="mask: expected"):
            ask(model, windows, wrong)


def test_single_windows_arrays_and_numbers_of_layers_are_taken() -> None:
    model, values = model_of(), noise(1)
    mask = torch.zeros(P * K, dtype=torch.bool)
    mask[:5] = True
    expected = model.attention(values, mask[None], layers=(-1,), heads=(1,))[0].weights
    for given in (values[0], values[0].numpy(), values.numpy().astype(np.float64)):
        assert torch.equal(model.attention(given, mask, layers=-1, heads=1)[0].weights, expected)
    assert torch.equal(model.embed_windows(values.numpy()).cls, model.embed_windows(values).cls)


# ---------------------------------------------------------------------- few parcels, nothing to score, other modes


def test_a_whole_window_of_few_parcels_is_rebuilt() -> None:
    """Only tokens that carry signal are divided, so that each part leaves some of them visible."""
    model, values = model_of(), noise(1)
    present = torch.zeros(1, P, dtype=torch.bool)
    present[0, 3] = True
    for seed in range(20):
        whole = model.reconstruct(values, present_BP=present, num_parts=2, seed=seed)
        assert torch.equal(whole.isfinite(), present[:, :, None].expand(-1, -1, W))


def test_the_mean_loss_of_nothing_is_zero() -> None:
    model, values = model_of(), noise(1)
    nothing_kept = torch.ones(1, W, dtype=torch.bool)
    nothing_kept[:, 5:10] = False
    mask = torch.zeros(1, P, K, dtype=torch.bool)
    mask[:, :, 1] = True
    loss = model(values, mask.flatten(1), kept_BW=nothing_kept)
    assert (loss.num_values.item(), loss.mean.item()) == (0, 0.0)


@pytest.mark.parametrize("make", [nystrom, vit])
def test_published_models_rebuild_whole_windows_and_read_in_evaluation_mode(make: Callable[..., Any]) -> None:
    model = published(make(hidden_dropout_prob=0.5))
    size = (1, model.num_parcels, model.window_len)
    values = torch.randn(size, generator=torch.Generator().manual_seed(1))
    whole = model.reconstruct(values.numpy()[0], num_parts=2, seed=3)
    assert whole.shape == size
    assert bool(whole.isfinite().all())
    model.train()
    assert torch.equal(model.reconstruct(values, num_parts=2, seed=3), whole)
    assert model.network.training
    for ask in (model.attention, model.parcel_attention):
        with pytest.raises(ConfigError, match="attention is not read from published models"):
            ask(values)
    with pytest.raises(ConfigError, match="no decoder"):
        published(fine_tuned()).reconstruct(values)


def test_windows_of_unknown_starts_make_the_joint_ones_unknown() -> None:
    model = model_of()
    known = Windows.of(noise(2))
    parts = [replace(known, starts=(0, 20)), known]
    assert pad_windows(parts, model.contract).starts == ()
    assert pad_windows(parts[:1], model.contract).starts == (0, 20)


def test_series_in_other_units_are_not_embedded_silently() -> None:
    model = model_of()
    bold = np.random.default_rng(0).normal(0, 1, (W, P)).astype(np.float32) * 1e30
    with pytest.raises(DataError, match="the embedding is not finite; in contract units its values reach"):
        model.embed(bold, tr_s=2.0)


def test_an_untrained_twin_takes_nobody_s_random_numbers() -> None:
    model = model_of()
    state = torch.get_rng_state()
    BrainLM.untrained_like(model, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
