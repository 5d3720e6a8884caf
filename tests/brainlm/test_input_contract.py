"""The contract refuses what cannot be fed, survives JSON exactly, and says what differs."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from brainlm.errors import CheckpointError, DataError
from brainlm.input_contract import InputContract
from brainlm.testing import synthetic_atlas


def test_contract_survives_json_exactly(contract: InputContract) -> None:
    contract = replace(
        contract,
        covered=np.array([True, False, True, True, True, True]),
        high_pass_hz=0.01,
        cleaning={"confounds": ["trans_x"], "scrub": None},
        statistics_from="train",
        num_statistics_recordings=3,
        flags=("whole-run filter",),
    )
    again = InputContract.from_json(json.loads(contract.dumps()))
    for name in ("covered", "median", "iqr"):  # float32 to the bit
        np.testing.assert_array_equal(getattr(again, name), getattr(contract, name))
        assert getattr(again, name).dtype == getattr(contract, name).dtype
    assert again.dumps() == contract.dumps()
    assert again.flags == ("whole-run filter",)


def test_only_covered_parcels_that_vary_are_usable(contract: InputContract) -> None:
    iqr = contract.iqr.copy()
    iqr[[0, 2]] = 0
    contract = replace(contract, iqr=iqr, covered=np.array([True, False, False, True, True, True]))
    np.testing.assert_array_equal(contract.usable, [False, False, False, True, True, True])
    assert contract.zero_iqr_parcels == (contract.atlas.parcel_names[0],)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"median": np.zeros(5)}, r"median has shape \(5,\), the atlas has 6 parcels"),
        ({"iqr": np.full(6, np.inf)}, "finite"),
        ({"median": np.full(6, np.nan)}, "finite"),
        ({"iqr": np.full(6, -1.0)}, "must not be negative"),
        ({"tr_s": 0.0}, "tr_s must be above 0"),
        ({"tr_s": float("nan")}, "tr_s must be above 0"),
        ({"patch_len": 7}, "window_len 20 must be a multiple of patch_len 7"),
        ({"patch_len": 0}, "multiple of patch_len 0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(contract: InputContract, changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(contract, **changes)


def test_another_format_is_refused_with_the_file(contract: InputContract) -> None:
    tree = contract.to_json() | {"format_version": 99}
    with pytest.raises(DataError, match="somewhere: expected an input contract of format 1, found 99"):
        InputContract.from_json(tree, "somewhere")


@pytest.mark.parametrize("key", ["atlas", "median", "tr_s"])
def test_an_incomplete_contract_is_refused_naming_what_it_lacks(contract: InputContract, key: str) -> None:
    tree = contract.to_json()
    del tree[key]
    with pytest.raises(DataError, match=f"not a complete input contract: .*{key}"):
        InputContract.from_json(tree)


def test_windows_can_be_exchanged_and_nothing_else_changes(contract: InputContract) -> None:
    longer = contract.with_windows(40, 10)
    assert (longer.window_len, longer.patch_len) == (40, 10)
    assert longer.to_json() | {"window_len": 20, "patch_len": 5} == contract.to_json()


def test_the_same_parcels_with_other_statistics_and_tr_fit(contract: InputContract) -> None:
    other = replace(contract, tr_s=0.8, median=contract.median + 1, low_pass_hz=0.1)
    contract.check_fits(other, ours="the checkpoint", theirs="the data set")


def changed_atlas(contract: InputContract, kind: str) -> InputContract:
    atlas = contract.atlas
    names = list(atlas.parcel_names)
    if kind == "reordered":
        names[1], names[4] = names[4], names[1]
        return replace(contract, atlas=replace(atlas, parcel_names=tuple(names)))
    if kind == "renamed":
        names[3] = "insula"
        return replace(contract, atlas=replace(atlas, parcel_names=tuple(names)))
    if kind == "moved":
        return replace(contract, atlas=replace(atlas, coords_mm=atlas.coords_mm + np.float32(2)))
    return InputContract(
        atlas=synthetic_atlas(8, name="larger"),
        covered=np.ones(8, dtype=bool),
        median=np.zeros(8, dtype=np.float32),
        iqr=np.ones(8, dtype=np.float32),
        tr_s=2.0,
        window_len=20,
        patch_len=5,
    )


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("reordered", ["  - the same parcels in another order: column 1: ", "; column 4: "]),
        ("renamed", ["  - other parcel names: column 3: ", " against insula"]),
        ("moved", ["  - 6 parcels lie elsewhere, ", " by 3.5 mm"]),
        ("other count", ["  - 6 parcels (synthetic) against 8 (larger)"]),
    ],
)
def test_parcels_that_do_not_fit_are_listed_readably(contract: InputContract, kind: str, words: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        contract.check_fits(changed_atlas(contract, kind), ours="checkpoint C", theirs="data set D")
    message = str(caught.value)
    assert message.startswith("data set D does not have the parcels that checkpoint C was made for:\n")
    for part in words:
        assert part in message
    assert message.endswith("or use a checkpoint of this atlas.")


def test_what_can_be_adapted_is_listed(contract: InputContract) -> None:
    assert contract.adaptable_differences(contract) == []
    covered = np.array([False, True, True, True, True, True])
    other = replace(contract, tr_s=0.72, low_pass_hz=0.1, iqr=3 * contract.iqr, covered=covered)
    assert contract.adaptable_differences(other) == [
        "TR 2 s against 0.72 s",
        "low_pass_hz: None against 0.1",
        "amplitude (median ratio of the IQRs): 3",
        "1 parcels of the first are missing in the second",
    ]
