"""Files appear whole or not at all, on local disk, in memory and on a real S3 server of this machine."""

from __future__ import annotations

import gc
import hashlib
import os
import pickle
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from brainlm.errors import StoreError
from brainlm.store import Store, sha256_of_file

BUCKET = "recordings"


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """Address of an S3 server over HTTP on the loopback interface, with one empty bucket; ended afterwards."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        S3FileSystem.clear_instance_cache()
        S3FileSystem().mkdir(BUCKET)
        yield f"http://{host}:{port}"
        S3FileSystem.clear_instance_cache()
    with warnings.catch_warnings():  # s3fs leaves its connections to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    server.stop()


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("BRAINLM_CACHE", str(tmp_path / "cache"))
    name = uuid.uuid4().hex
    if request.param == "s3":
        request.getfixturevalue("s3_endpoint")
        return Store(f"s3://{BUCKET}/{name}")
    return Store(str(tmp_path / "data") if request.param == "local" else f"memory://{name}")


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("BRAINLM_CACHE", str(tmp_path / "cache"))
    return Store(f"memory://{uuid.uuid4().hex}")


def test_what_is_written_is_read(store: Store) -> None:
    data = os.urandom(100_000)
    store.write_bytes("shards/a.bin", data)
    store.write_json("dataset.json", {"counts": [1, 2], "name": "ä"})
    assert store.read_bytes("shards/a.bin") == data
    assert store.size("shards/a.bin") == len(data)
    assert store.read_json("dataset.json") == {"counts": [1, 2], "name": "ä"}
    assert store.local_file("shards/a.bin").read_bytes() == data


def test_folders_list_what_is_directly_in_them(store: Store) -> None:
    for name in ("top.json", "shards/b.tar", "shards/a.tar", "shards/deep/c.tar"):
        store.write_bytes(name, b"x")
    assert store.names() == ["shards", "top.json"]
    assert store.names("shards") == store.sub("shards").names() == ["a.tar", "b.tar", "deep"]
    assert store.names("nothing") == []


def test_a_file_exists_from_writing_to_removing(store: Store) -> None:
    assert not store.exists("a/b.bin")
    store.remove("a/b.bin")  # nothing there: nothing happens
    store.write_bytes("a/b.bin", b"old")
    store.write_bytes("a/b.bin", b"newer")
    assert store.exists("a/b.bin")
    assert store.exists("a")
    assert store.read_bytes("a/b.bin") == b"newer"
    store.remove("a")
    assert not store.exists("a/b.bin")


def test_a_missing_file_is_a_store_error_with_its_url(store: Store) -> None:
    for read in (store.read_bytes, store.size, store.local_file, store.read_json):
        with pytest.raises(StoreError, match=r"nothing\.bin") as caught:
            read("nothing.bin")
        assert str(store.url_of("nothing.bin")) in str(caught.value)
        assert isinstance(caught.value, OSError)


def test_a_worker_gets_the_same_store(store: Store) -> None:
    store.write_bytes("a.bin", b"1")
    again = pickle.loads(pickle.dumps(store))
    assert again.url == store.url
    assert again.read_bytes("a.bin") == b"1"


def test_files_that_others_write_are_seen_at_once(s3_endpoint: str) -> None:
    import boto3  # type: ignore[import-untyped]

    store = Store(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    store.write_bytes("mine.bin", b"1")
    assert store.names() == ["mine.bin"]  # a client that remembers this listing misses what follows
    prefix = store.root.removeprefix(f"{BUCKET}/")
    other = boto3.client("s3", endpoint_url=s3_endpoint)
    other.put_object(Bucket=BUCKET, Key=f"{prefix}/theirs.bin", Body=b"22")
    other.put_object(Bucket=BUCKET, Key=f"{prefix}/mine.bin", Body=b"333")
    assert store.exists("theirs.bin")
    assert store.size("theirs.bin") == 2
    assert store.size("mine.bin") == 3
    assert store.names() == ["mine.bin", "theirs.bin"]
    other.delete_object(Bucket=BUCKET, Key=f"{prefix}/theirs.bin")
    assert not store.exists("theirs.bin")
    other.close()


def test_writing_leaves_no_temporary_file(tmp_path: Path) -> None:
    Store(tmp_path).write_bytes("a/b.bin", b"1")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["a", "a/b.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    store = Store(tmp_path)
    store.write_bytes("a.bin", b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"brainlm.store.os.{step}", fail)
    with pytest.raises(StoreError, match=r"cannot write .*a\.bin: .*No space left on device"):
        store.write_bytes("a.bin", b"new and longer")
    monkeypatch.undo()
    assert store.names() == ["a.bin"]
    assert store.read_bytes("a.bin") == b"old"


def test_a_local_file_is_used_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINLM_CACHE", str(tmp_path / "cache"))
    store = Store(tmp_path / "data")
    store.write_bytes("a.bin", b"1")
    assert store.local_file("a.bin") == tmp_path / "data" / "a.bin"
    assert not (tmp_path / "cache").exists()


def test_a_remote_file_is_copied_once(remote: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    remote.write_bytes("a.bin", b"1234")
    first = remote.local_file("a.bin")
    monkeypatch.setattr(remote.fs, "get_file", lambda *_: pytest.fail("copied a second time"))
    assert remote.local_file("a.bin") == first
    assert first.read_bytes() == b"1234"


def test_a_file_with_other_bytes_is_another_file_in_the_cache(remote: Store) -> None:
    found = []
    for data in (b"1111", b"2222"):  # the same length
        remote.write_bytes("a.bin", data)
        found.append(remote.local_file("a.bin", hashlib.sha256(data).hexdigest()).read_bytes())
    assert found == [b"1111", b"2222"]


def test_bytes_that_do_not_have_their_sha256_are_refused_and_not_kept(remote: Store, tmp_path: Path) -> None:
    remote.write_bytes("a.bin", b"1234")
    with pytest.raises(StoreError, match=r"a\.bin: its bytes do not have the recorded sha256 03ac674216f3"):
        remote.local_file("a.bin", hashlib.sha256(b"1234").hexdigest().replace("e15c", "0000"))
    assert list((tmp_path / "cache" / "files").iterdir()) == []
    assert remote.local_file("a.bin", hashlib.sha256(b"1234").hexdigest()).read_bytes() == b"1234"


def test_the_cache_is_bounded_and_the_longest_unused_go_first(
    remote: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRAINLM_CACHE_GB", str(2500 / 1024**3))
    cached = {}
    for age, name in enumerate("abc"):
        remote.write_bytes(name, os.urandom(1000))
        cached[name] = remote.local_file(name)
        os.utime(cached[name], (1000 + age, 1000 + age))
        if name == "b":
            cached["a"] = remote.local_file("a")  # used again: now the newest
    left = {path.name for path in (tmp_path / "cache" / "files").iterdir()}
    assert left == {cached["a"].name, cached["c"].name}
    assert remote.local_file("b").read_bytes() == remote.read_bytes("b")


def test_a_file_larger_than_the_cache_is_still_given(remote: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINLM_CACHE_GB", str(10 / 1024**3))
    remote.write_bytes("a.bin", bytes(1000))
    assert remote.local_file("a.bin").stat().st_size == 1000


def test_files_that_another_process_removes_from_the_cache_do_no_harm(remote: Store, tmp_path: Path) -> None:
    remote.write_bytes("a.bin", b"1")
    folder = tmp_path / "cache" / "files"
    folder.mkdir(parents=True)
    (folder / "gone").symlink_to(folder / "removed")  # listed, but not there any more when it is looked at
    assert remote.local_file("a.bin").read_bytes() == b"1"


def test_a_name_that_is_no_storage_is_refused() -> None:
    with pytest.raises(StoreError, match="cannot open storage 'nowhere://x'"):
        Store("nowhere://x")


@pytest.mark.parametrize(("url", "local"), [("memory://", False), ("memory://a/", False), ("/", True), ("a/", True)])
def test_a_slash_at_the_end_changes_nothing(url: str, local: bool) -> None:
    assert Store(url).is_local is local


def test_text_that_is_not_json_is_refused_with_its_url(tmp_path: Path) -> None:
    Store(tmp_path).write_bytes("a.json", b"{")
    with pytest.raises(StoreError, match=r"a\.json is not valid JSON"):
        Store(tmp_path).read_json("a.json")


def test_not_a_number_is_never_written_as_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Store(tmp_path).write_json("a.json", {"loss": float("nan")})
    assert Store(tmp_path).names() == []


def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1234")
    assert sha256_of_file(tmp_path / "a") == hashlib.sha256(b"1234").hexdigest()
