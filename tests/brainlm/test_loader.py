"""A batch is a pure function of data set, settings and step, whatever the ranks, micro-batches and threads."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brainlm.dataset import Dataset
from brainlm.errors import ConfigError, DataError
from brainlm.loader import MaskSettings, WindowBatch, WindowLoader
from brainlm.masking import MaskKind
from brainlm.model import BrainLM
from brainlm.scaling import scale
from brainlm.shards import StoredDtype
from brainlm.testing import small_model, write_synthetic_dataset

MISSING = {"sub-train001_task-rest": (3, 7)}
BATCH = 8
MASKS = MaskSettings(ratios=(0.5, 0.75, 0.9), num_decoded=20)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    url = str(tmp_path_factory.mktemp("data"))
    return write_synthetic_dataset(url, num_subjects={"train": 6}, num_parcels=10, missing=MISSING, dtype="float16")


def loader(dataset: Dataset, masks: MaskSettings = MASKS, **changes: Any) -> WindowLoader:
    settings = {"batch_size": BATCH, "windows_per_recording": 4, "seed": 3} | changes
    return WindowLoader(dataset.split("train"), dataset.contract, masks, **settings)


def joined(batches: list[WindowBatch]) -> list[torch.Tensor]:
    assert all(batch.ids_decoded is not None for batch in batches)
    names = ("windows", "mask", "present", "ids_decoded", "kept")
    return [torch.cat([getattr(batch, name) for batch in batches]) for name in names]


def assert_same(found: list[WindowBatch], expected: list[WindowBatch]) -> None:
    for one, other in zip(joined(found), joined(expected), strict=True):
        assert torch.equal(one, other)


def test_a_batch_depends_on_its_step_alone(dataset: Dataset) -> None:
    first = loader(dataset)
    in_order = [first.batches_at(step) for step in range(7)]  # over more than two epochs
    assert first.steps_per_epoch == 3
    torch.manual_seed(99)
    for step in (5, 0, 6, 2):  # another loader, another order, another global state
        assert_same(loader(dataset).batches_at(step), in_order[step])
    windows = [joined(batch)[0] for batch in in_order]
    assert not any(torch.equal(windows[i], windows[j]) for i in range(7) for j in range(i))


def test_another_seed_gives_other_windows_and_masks(dataset: Dataset) -> None:
    one, other = (joined(loader(dataset, seed=seed).batches_at(0)) for seed in (3, 4))
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_together_have_the_batch_of_one(dataset: Dataset, world_size: int) -> None:
    for step in (0, 4):
        parts = [loader(dataset, rank=r, world_size=world_size).batches_at(step) for r in range(world_size)]
        assert_same([batch for part in parts for batch in part], loader(dataset).batches_at(step))


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_together_are_the_batch(dataset: Dataset, micro_batches: int) -> None:
    found = loader(dataset, rank=1, world_size=2, micro_batches=micro_batches).batches_at(1)
    assert [len(batch.windows) for batch in found] == [BATCH // 2 // micro_batches] * micro_batches
    assert_same(found, loader(dataset, rank=1, world_size=2).batches_at(1))


def test_values_are_the_scaled_slices_of_their_recordings(dataset: Dataset) -> None:
    source, contract = dataset.split("train"), dataset.contract
    it = loader(dataset)
    (batch,) = it.batches_at(2)
    for i, (recording, start) in enumerate(it.rows_at(2)):
        bold = source.recording(recording)[start : start + contract.window_len]
        expected = (bold - contract.median) / contract.iqr
        np.testing.assert_allclose(batch.windows[i].numpy(), expected.T, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(batch.present[i].numpy(), source.present(recording))
    assert batch.windows.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_batch_is_scaled_as_the_library_scales_bit_by_bit(tmp_path: Path, dtype: StoredDtype) -> None:
    data = write_synthetic_dataset(
        str(tmp_path), num_subjects={"train": 4}, num_parcels=9, missing=MISSING, dtype=dtype
    )
    covered = np.arange(9) != 5
    data = replace(data, contract=replace(data.contract, covered=covered, iqr=np.where(np.arange(9) == 7, 0, 1.7)))
    it = loader(data)
    (batch,) = it.batches_at(1)
    for i, (recording, start) in enumerate(it.rows_at(1)):
        expected = scale(it.reader.window(recording, start, 40), data.contract).T
        np.testing.assert_array_equal(batch.windows[i].numpy(), expected)
        assert not expected[[5, 7]].any()
        assert not batch.present[i, [5, 7]].any()


def test_a_contract_of_another_atlas_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    other = write_synthetic_dataset(str(tmp_path), num_subjects={"train": 3}, num_parcels=12)
    with pytest.raises(DataError, match="recordings of 10 parcels, the contract has 12"):
        loader(replace(dataset, contract=other.contract))


CENSORED = {"sub-train000_task-rest": ((0, 7), (19, 22)), "sub-train002_task-rest": ((30, 45),)}


@pytest.fixture(scope="module")
def censored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset]:
    """The same data, interpolated at censored timepoints and with nonsense there."""
    settings: dict[str, Any] = {
        "num_subjects": {"train": 6},
        "num_parcels": 10,
        "missing": MISSING,
        "censored": CENSORED,
    }
    folder = tmp_path_factory.mktemp("censored")
    return (
        write_synthetic_dataset(str(folder / "interpolated"), **settings),
        write_synthetic_dataset(str(folder / "nonsense"), **settings, censored_fill=1e4),
    )


def test_stored_values_at_censored_timepoints_change_neither_what_is_seen_nor_the_loss(
    censored: tuple[Dataset, Dataset],
) -> None:
    model = small_model(censored[0].contract)
    num_censored = 0
    for step in range(6):
        (one,), (other,) = (loader(dataset).batches_at(step) for dataset in censored)
        for name in ("mask", "present", "ids_decoded", "kept"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        hidden = one.mask.view(BATCH, 10, 4).repeat_interleave(10, dim=2)
        assert torch.equal(one.windows[~hidden], other.windows[~hidden])
        free = hidden & one.present[:, :, None] & ~one.kept[:, None, :]
        assert (other.windows[free] > 1e3).all()  # the nonsense is really there
        num_censored += int(free.sum())
        for ids in (one.ids_decoded, None):
            with torch.no_grad():
                losses = [model(b.windows, b.mask, b.present, ids, b.kept) for b in (one, other)]
            assert all(torch.equal(a, b) for a, b in zip(*losses))
            assert replace(one, ids_decoded=ids).num_scored_values == int(losses[0].num_values)
    assert num_censored > 500


def test_kept_says_which_timepoints_of_the_recording_are_censored(censored: tuple[Dataset, Dataset]) -> None:
    it = loader(censored[0])
    seen = set()
    for step in range(6):
        (batch,) = it.batches_at(step)
        for (recording, start), kept in zip(it.rows_at(step).tolist(), batch.kept):
            ranges = CENSORED.get(it.reader.entries[recording].recording_id, ())
            expected = [not any(a <= start + t < b for a, b in ranges) for t in range(40)]
            assert kept.tolist() == expected
            seen.add(all(expected))
    assert seen == {True, False}


def test_censoring_changes_neither_the_order_of_windows_nor_their_masks(
    censored: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    whole = write_synthetic_dataset(str(tmp_path), num_subjects={"train": 6}, num_parcels=10, missing=MISSING)
    for step in range(4):
        one, other = loader(whole), loader(censored[0])
        np.testing.assert_array_equal(one.rows_at(step), other.rows_at(step))
        (a,), (b,) = one.batches_at(step), other.batches_at(step)
        assert torch.equal(a.mask, b.mask)
        assert a.ids_decoded is not None
        assert b.ids_decoded is not None
        assert torch.equal(a.ids_decoded, b.ids_decoded)
        assert a.kept.all()


def test_an_epoch_has_every_recording_equally_often(dataset: Dataset) -> None:
    it = loader(dataset)
    for epoch in (0, 1):
        rows = np.concatenate([it.rows_at(3 * epoch + step) for step in range(3)])
        np.testing.assert_array_equal(np.bincount(rows[:, 0]), [4] * 6)


def test_a_remainder_that_makes_no_batch_is_left_for_another_epoch(dataset: Dataset) -> None:
    it = loader(dataset, batch_size=10)
    assert it.steps_per_epoch == 2
    assert [len(it.rows_at(step)) for step in range(5)] == [10] * 5


@pytest.mark.parametrize("kind", ["random", "future", "parcels", "time_blocks"])
def test_missing_parcels_are_hidden_and_never_decoded(dataset: Dataset, kind: MaskKind) -> None:
    (batch,) = loader(dataset, replace(MASKS, kind=kind, num_decoded=4), batch_size=24).batches_at(0)
    assert batch.ids_decoded is not None
    absent = ~batch.present.repeat_interleave(4, dim=1)
    assert int((~batch.present).sum()) == 4 * 2  # four windows of the recording that lacks two
    assert batch.mask[absent].all()
    assert batch.mask.gather(1, batch.ids_decoded).all()
    assert not absent.gather(1, batch.ids_decoded).any()


def test_one_ratio_is_drawn_per_step_and_all_are_used(dataset: Dataset) -> None:
    complete = replace(MASKS, num_decoded=None)
    it = loader(dataset, complete)
    seen = set()
    for step in range(20):
        (batch,) = it.batches_at(step)
        assert batch.ids_decoded is None
        hidden = batch.mask.view(BATCH, 10, 4)
        ratios = {
            round((int(hidden[i].sum()) - 4 * int(absent)) / (40 - 4 * int(absent)), 2)
            for i, absent in enumerate((~batch.present).sum(dim=1))
        }
        assert max(ratios) - min(ratios) <= 0.02  # of 40 tokens and of 32
        seen.add(min((0.5, 0.75, 0.9), key=lambda r: abs(r - min(ratios))))
    assert seen == {0.5, 0.75, 0.9}


def test_one_kind_of_mask_is_drawn_per_step_and_all_are_used(dataset: Dataset) -> None:
    one = loader(dataset, MaskSettings(kind=("future", "parcels"), ratios=(0.5,)))
    num_parcels = dataset.contract.atlas.num_parcels
    seen = set()
    for step in range(12):
        ((batch,), (again,)) = one.batches_at(step), loader(dataset, one.masks).batches_at(step)
        assert torch.equal(batch.mask, again.mask)
        grid = batch.mask.view(BATCH, num_parcels, -1)
        present = batch.present
        whole_parcels = bool((grid == grid[:, :, :1]).all())
        same_times = all(bool((grid[i][present[i]] == grid[i][present[i]][0]).all()) for i in range(BATCH))
        assert whole_parcels != same_times
        seen.add(whole_parcels)
    assert seen == {True, False}
    with pytest.raises(ConfigError, match=r"masks.kind: expected at least one"):
        MaskSettings(kind=())


def test_parcels_that_share_tokens_are_hidden_together_in_training(dataset: Dataset) -> None:
    one = loader(dataset, MaskSettings(ratios=(0.5,), num_decoded=3), patch_parcels=4)
    (batch,) = one.batches_at(0)
    model = small_model(dataset.contract)
    model = BrainLM(replace(model.config, patch_parcels=4), dataset.contract)
    assert batch.mask.shape == (BATCH, model.num_rows * model.config.num_patches)
    assert batch.groups is not None
    assert model.groups is not None
    assert torch.equal(batch.groups, model.groups)
    loss = model(batch.windows, batch.mask, batch.present, batch.ids_decoded, batch.kept)
    assert batch.num_scored_values == int(loss.num_values) > 0
    whole = model(batch.windows, batch.mask, batch.present, None, batch.kept)
    assert replace(batch, ids_decoded=None).num_scored_values == int(whole.num_values)


def test_reading_ahead_gives_the_same_batches(dataset: Dataset) -> None:
    for prefetch in (1, 4):
        found = list(loader(dataset).iterate(2, 6, prefetch))
        assert len(found) == 4
        for step, batches in enumerate(found, 2):
            assert_same(batches, loader(dataset).batches_at(step))


def test_reading_raises_the_readers_error_after_the_good_batches(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = loader(dataset)
    real = it.batches_at

    def fail_at_three(step: int) -> list[WindowBatch]:
        if step == 3:
            raise DataError("shard is gone")
        return real(step)

    monkeypatch.setattr(it, "batches_at", fail_at_three)
    steps = it.iterate(1, 9)
    assert len([next(steps), next(steps)]) == 2
    with pytest.raises(DataError, match="shard is gone"):
        next(steps)


def test_waiting_for_data_is_counted_and_other_work_is_not(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = loader(dataset), loader(dataset)
    batches = fast.batches_at(0)

    def read_slowly(step: int) -> list[WindowBatch]:
        time.sleep(0.05)
        return batches

    monkeypatch.setattr(slow, "batches_at", read_slowly)
    monkeypatch.setattr(fast, "batches_at", lambda step: batches)
    assert len(list(slow.iterate(0, 4))) == 4
    assert slow.data_wait_s > 0.15
    for _ in fast.iterate(0, 4):
        time.sleep(0.05)
    assert fast.data_wait_s < slow.data_wait_s


def test_a_loop_that_stops_early_ends_its_thread(dataset: Dataset) -> None:
    steps = loader(dataset).iterate(0, 1000)
    next(steps)
    assert any(thread.name == "brainlm-loader" for thread in threading.enumerate())
    steps.close()  # type: ignore[attr-defined]
    assert not any(thread.name == "brainlm-loader" for thread in threading.enumerate())


def test_closing_does_not_wait_for_an_error_that_nobody_will_read(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = loader(dataset)
    real, failed = it.batches_at, threading.Event()

    def fail_at_two(step: int) -> list[WindowBatch]:
        if step == 2:
            failed.set()
            raise DataError("shard is gone")
        return real(step)

    monkeypatch.setattr(it, "batches_at", fail_at_two)
    steps = it.iterate(0, 9, prefetch=1)
    next(steps)
    assert failed.wait(timeout=5)  # step 1 fills the queue, the error has no place in it
    started = time.perf_counter()
    steps.close()  # type: ignore[attr-defined]
    assert time.perf_counter() - started < 5
    assert not any(thread.name == "brainlm-loader" for thread in threading.enumerate())


def test_closing_leaves_a_read_that_hangs_behind(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brainlm.read_ahead.CLOSE_WITHIN_S", 0.1)
    it = loader(dataset)
    real, answer = it.batches_at, threading.Event()

    def hang_at_one(step: int) -> list[WindowBatch]:
        if step == 1:
            answer.wait(timeout=30)
        return real(step)

    monkeypatch.setattr(it, "batches_at", hang_at_one)
    steps = it.iterate(0, 9)
    next(steps)
    started = time.perf_counter()
    steps.close()  # type: ignore[attr-defined]
    assert time.perf_counter() - started < 5
    answer.set()
    for thread in threading.enumerate():
        if thread.name == "brainlm-loader":
            thread.join(timeout=5)
            assert not thread.is_alive()


def test_a_batch_stays_where_it_is_on_a_cpu(dataset: Dataset) -> None:
    (batch,) = loader(dataset).batches_at(0)
    assert batch.to(torch.device("cpu")) is batch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 3}, "batch_size=8 must be a multiple of 3 ranks x 1 micro-batches"),
        ({"world_size": 2, "micro_batches": 3}, "must be a multiple of 2 ranks x 3 micro-batches"),
        ({"batch_size": 25}, "6 recordings x 4 windows make no batch of 25"),
    ],
)
def test_a_batch_that_cannot_be_made_is_refused(dataset: Dataset, changes: dict, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        loader(dataset, **changes)


@pytest.mark.parametrize("ratios", [(), (0.0,), (0.5, 1.0)])
def test_ratios_that_hide_nothing_or_everything_are_refused(ratios: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"masks\.ratios: expected fractions between 0 and 1"):
        MaskSettings(ratios=ratios)


def test_decoding_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"masks\.num_decoded: expected at least 1, found 0"):
        MaskSettings(num_decoded=0)


def test_a_recording_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    short = write_synthetic_dataset(str(tmp_path), num_subjects={"train": 3}, num_timepoints=30)
    with pytest.raises(DataError, match="has 30 timepoints, a window needs 40"):
        loader(short).batches_at(0)
