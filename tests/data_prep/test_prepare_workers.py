"""The same data set by one worker and by two, on local disk and on object storage, readable by others."""

import gc
import json
import warnings
from pathlib import Path

import fsspec
import numpy as np
import pytest

from brainlm.dataset import SPLITS, open_dataset
from brainlm.ray_session import ray_session
from data_prep import inspect_dataset


@pytest.fixture(scope="module")
def two_workers():
    with ray_session("local", num_cpus=2) as ray:
        yield ray


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """URL of a bucket on a real HTTP server of this machine."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("BRAINLM_CACHE", str(tmp_path / "cache"))
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    type(fs).clear_instance_cache()
    fs = fsspec.filesystem("s3")
    fs.mkdir("cohorts")
    yield "s3://cohorts/toy"
    type(fs).clear_instance_cache()
    del fs
    with warnings.catch_warnings():  # s3fs leaves its connections to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    server.stop()


def test_one_worker_and_two_write_the_same_bytes(toy, rng, tree_bytes):
    tree = toy.settings(toy.write_bids(rng), clean={"confounds": ["trans_x", "rot_z"]}, target_tr_s=1.5)
    written = []
    for num_cpus in (1, 2):
        changed = tree | {"out": str(toy.folder / f"by{num_cpus}"), "ray": {"num_cpus": num_cpus}}
        assert toy.prepare(changed) == 0
        written.append(tree_bytes(Path(changed["out"])))
    assert written[0] == written[1]
    in_process = tree | {"out": str(toy.folder / "by0")}
    assert toy.prepare(in_process) == 0
    assert tree_bytes(Path(in_process["out"])) == written[0]


def test_small_memory_and_other_shards_leave_the_statistics_as_they_are(toy, rng, monkeypatch):
    from data_prep import contract_statistics

    path = toy.write_table(rng)
    tree = toy.settings(path)
    assert toy.prepare(tree) == 0
    whole = open_dataset(tree["out"]).contract
    monkeypatch.setattr(contract_statistics, "RECORDINGS_PER_TASK", 2)
    monkeypatch.setattr(contract_statistics, "TASKS", 1)
    monkeypatch.setattr(contract_statistics, "PARCELS_AT_ONCE", 3)
    again = tree | {"out": str(toy.folder / "again"), "shards": {"recordings_per_shard": 3}}
    assert toy.prepare(again) == 0
    parts = open_dataset(again["out"]).contract
    np.testing.assert_array_equal(parts.median, whole.median)
    np.testing.assert_array_equal(parts.iqr, whole.iqr)


def test_ray_workers_refuse_and_prepare_like_this_process(toy, rng, two_workers):
    assert two_workers.is_initialized()
    path = toy.write_table(rng, num_subjects=8)
    np.save(path.parent / "ts" / "S_007.npy", rng.normal(size=(60, 5)))
    changed = toy.settings(path, ray={"num_cpus": 2}, max_refused_fraction=0.2)
    assert toy.prepare(changed) == 0
    manifest = open_dataset(changed["out"]).manifest
    assert manifest["num_refused"] == 1
    assert sum(part["recordings"] for part in manifest["counts"].values()) == 7


def test_object_storage_holds_the_same_data_set(toy, rng, bucket, tree_bytes):
    path = toy.write_table(rng)
    local = toy.settings(path)
    assert toy.prepare(local) == 0
    assert toy.prepare(local | {"out": bucket}) == 0
    here, there = open_dataset(local["out"]), open_dataset(bucket)
    assert there.content_hash == here.content_hash
    for split in SPLITS:
        for index in range(len(here.split(split))):
            np.testing.assert_array_equal(there.split(split).recording(index), here.split(split).recording(index))
    assert inspect_dataset.main([bucket]) == 0
    fs = fsspec.filesystem("s3")
    for name, data in tree_bytes(Path(local["out"])).items():
        assert fs.cat_file(f"cohorts/toy/{name}") == data
    assert toy.prepare(local | {"out": bucket}) == 0
    assert not fs.exists("cohorts/toy/staging")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_shards_are_plain_webdataset(toy, rng):
    import webdataset

    path = toy.write_table(rng)
    tree = toy.settings(path, shards={"dtype": "float16", "recordings_per_shard": 2})
    assert toy.prepare(tree) == 0
    tars = sorted(str(tar) for tar in (Path(tree["out"]) / "shards").glob("*.tar"))
    seen = 0
    for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode():
        original = np.load(path.parent / "ts" / f"{sample['__key__']}.npy")
        centred = original - original.mean(axis=0, dtype=np.float64)
        series = sample["npy"].astype(np.float32) * sample["json"]["scale"]
        np.testing.assert_allclose(series, centred, rtol=2**-10, atol=np.abs(centred).max() * 2**-24)
        seen += 1
    gc.collect()
    assert seen == 6


def test_real_raw_scans_are_refused_with_the_reason_while_the_rest_goes_on(shared_data, toy, rng):
    painted = next((shared_data / "semireal_painted_mni4mm").glob("*_bold.nii.gz"))
    scans = [shared_data / "pumi_raw_bold_5mm" / "sub-001_task-rest_bold.nii.gz"]
    scans += [shared_data / "nitime_examples" / name for name in ("fmri1.nii.gz", "fmri2.nii.gz")]
    rows = ["participant_id\tfile", f"painted\t{painted}", *(f"raw{i}\t{scan}" for i, scan in enumerate(scans))]
    (toy.folder / "scans.tsv").write_text("\n".join(rows) + "\n")
    tree = {
        "name": "scans",
        "out": str(toy.folder / "dataset"),
        "source": {"kind": "table", "path": str(toy.folder / "scans.tsv")},
        "atlas": {"image": str(shared_data / "atlases" / "A424+2mm.nii.gz"), "name": "A424"},
        "splits": {"val": 0.0, "test": 0.0},
        "max_refused_fraction": 0.8,
        "ray": {"address": "off"},
    }
    from data_prep.parquet_tables import read_parquet

    assert toy.prepare(tree) == 0
    dataset = open_dataset(tree["out"])
    assert 404 in dataset.split("train").entries[0].missing_parcels
    assert not dataset.contract.covered[404]
    rejected = read_parquet(dataset.store, "rejected.parquet").set_index("recording_id")["reason"]
    assert rejected.index.tolist() == ["sub-raw0", "sub-raw1", "sub-raw2"]
    assert rejected.str.contains("native space").all()
    claimed = tree | {"out": str(toy.folder / "claimed")}
    claimed["source"] = claimed["source"] | {"space": "MNI152NLin6Asym"}
    assert toy.prepare(claimed) == 0
    reasons = read_parquet(open_dataset(claimed["out"]).store, "rejected.parquet")["reason"].tolist()
    assert all("template" in reason or "too short" in reason for reason in reasons), reasons


def test_abide_becomes_a_data_set_with_its_known_duplicate(shared_data, toy):
    import yaml

    config = Path(__file__).parents[2] / "data_prep" / "configs" / "abide_cc200.yaml"
    tree = yaml.safe_load(config.read_text()) | {"out": str(toy.folder / "dataset"), "ray": {"address": "off"}}
    tree["source"]["path"] = str(shared_data / "abide_cc200" / "participants.tsv")
    tree["atlas"]["image"] = str(shared_data / "atlases" / "cc200_atlas_2mm.nii.gz")
    assert toy.prepare(tree) == 0
    manifest = json.loads((toy.folder / "dataset" / "dataset.json").read_text())
    assert manifest["num_refused"] == 0
    assert sum(part["recordings"] for part in manifest["counts"].values()) == 167
    assert manifest["duplicates"] == [["UM_1_0050279", "UM_1_0050286"]]
    assert inspect_dataset.main([str(toy.folder / "dataset")]) == 0
