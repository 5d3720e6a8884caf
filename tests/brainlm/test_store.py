"""Files appear whole or not at all, on local disk, in memory and on a real S3 server of this machine.

The server is reached through a proxy that goes wrong on purpose (`tests.fault_proxy`).
"""

from __future__ import annotations

import gc
import hashlib
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from brainlm import store as store_module
from brainlm.errors import StoreError
from brainlm.store import Store, sha256_of_file
from tests.fault_proxy import FaultProxy

BUCKET = "recordings"
RETRY_S = "30"  # a test that waits longer has failed
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def s3_through_proxy() -> Iterator[FaultProxy]:
    """An S3 server over HTTP on the loopback interface, with one empty bucket, behind a proxy; ended afterwards."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = FaultProxy(server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        S3FileSystem.clear_instance_cache()
        S3FileSystem().mkdir(BUCKET)
        yield proxy
        S3FileSystem.clear_instance_cache()
    with warnings.catch_warnings():  # s3fs leaves its connections to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    proxy.close()
    server.stop()


@pytest.fixture
def proxy(s3_through_proxy: FaultProxy) -> Iterator[FaultProxy]:
    """The proxy with no faults before and after."""
    s3_through_proxy.log.clear()
    yield s3_through_proxy
    s3_through_proxy.faults.clear()
    s3_through_proxy.only = ""


@pytest.fixture
def s3(proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Store:
    """A folder whose name depends on the test alone: faults fall by names."""
    monkeypatch.setenv("BRAINLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BRAINLM_STORE_RETRY_S", RETRY_S)
    return Store(f"s3://{BUCKET}/{hashlib.md5(request.node.name.encode()).hexdigest()}")


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("BRAINLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BRAINLM_STORE_RETRY_S", RETRY_S)
    name = uuid.uuid4().hex
    if request.param == "s3":
        found: Store = request.getfixturevalue("s3")
        return found
    return Store(str(tmp_path / "data") if request.param == "local" else f"memory://{name}")


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("BRAINLM_CACHE", str(tmp_path / "cache"))
    return Store(f"memory://{uuid.uuid4().hex}")


def test_what_is_written_is_read(store: Store) -> None:
    data = os.urandom(100_000)
    store.write_bytes("shards/a.bin", memoryview(data))
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


def test_files_that_others_write_are_seen_at_once(s3: Store, proxy: FaultProxy) -> None:
    import boto3  # type: ignore[import-untyped]

    store = s3
    store.write_bytes("mine.bin", b"1")
    assert store.names() == ["mine.bin"]  # a client that remembers this listing misses what follows
    prefix = store.root.removeprefix(f"{BUCKET}/")
    other = boto3.client("s3", endpoint_url=proxy.url)
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
    monkeypatch.setattr(remote.fs, "cat_file", lambda *_, **__: pytest.fail("copied a second time"))
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


@pytest.mark.parametrize("part_bytes", [store_module.PART_BYTES, 700])
def test_parts_of_a_file_are_read(store: Store, monkeypatch: pytest.MonkeyPatch, part_bytes: int) -> None:
    monkeypatch.setattr(store_module, "PART_BYTES", part_bytes)
    data = os.urandom(5000)
    store.write_bytes("a.bin", data)
    store.write_bytes("empty.bin", b"")
    assert store.read_bytes("a.bin") == data
    assert store.read_bytes("empty.bin") == store.read_range("a.bin", 7, 7) == b""
    assert store.read_range("a.bin", 100, 4321) == data[100:4321]
    with pytest.raises(StoreError, match=r"a\.bin"):
        store.read_range("a.bin", 4000, 5001)
    with pytest.raises(StoreError, match=r"has 5000 bytes, bytes 5000 to 5001 were asked for|range is not satisfiable"):
        store.read_range("a.bin", 5000, 5001)


@pytest.mark.parametrize("part_bytes", [store_module.PART_BYTES, 700])
def test_a_local_copy_is_there_for_the_length_of_the_block(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part_bytes: int
) -> None:
    monkeypatch.setattr(store_module, "PART_BYTES", part_bytes)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    data = os.urandom(5000)
    store.write_bytes("sub-01/bold.nii.gz", data)
    with store.local_copy("sub-01/bold.nii.gz") as path:
        assert path.name == "bold.nii.gz"  # readers choose by the suffix
        assert path.read_bytes() == data
        assert (str(path) == store.path("sub-01/bold.nii.gz")) is store.is_local
    assert path.exists() is store.is_local
    assert list((tmp_path / "scratch").iterdir()) == []
    with pytest.raises(StoreError, match=r"nothing\.bin"), store.local_copy("nothing.bin"):
        pass


def test_all_files_below_a_folder_are_found(store: Store) -> None:
    for number, name in enumerate(("top.json", "a/b.tar", "a/deep/c.tar", "a/deep/d.tar.tmp")):
        store.write_bytes(name, bytes(number))
    assert {name: info["size"] for name, info in store.find().items()} == {
        "a/b.tar": 1,
        "a/deep/c.tar": 2,
        "top.json": 0,
    }
    assert list(store.find("a")) == ["b.tar", "deep/c.tar"]
    assert list(store.find("a", max_depth=1)) == ["b.tar"]
    assert store.find("nothing") == {}
    assert list(store.find("a", temporary=True)) == ["b.tar", "deep/c.tar", "deep/d.tar.tmp"]
    assert store.names("a/deep") == ["c.tar"]
    assert store.names("a/deep", temporary=True) == ["c.tar", "d.tar.tmp"]


def test_many_files_are_read_as_one_by_one(store: Store) -> None:
    expected = {f"s/{number}.json": os.urandom(100 + number) for number in range(5)}
    for name, data in expected.items():
        store.write_bytes(name, data)
    assert store.read_many(list(expected)) == expected
    assert store.read_many(["s/3.json"]) == {"s/3.json": expected["s/3.json"]}
    assert store.read_many([]) == {}
    with pytest.raises(StoreError, match=r"nothing\.bin"):
        store.read_many(["s/3.json", "nothing.bin"])


def test_when_a_file_was_written_is_known(store: Store) -> None:
    before = time.time()
    store.write_bytes("a.bin", b"1")
    assert before - 2 < store.modified("a.bin").timestamp() < time.time() + 2
    with pytest.raises(StoreError, match=r"nothing\.bin"):
        store.modified("nothing.bin")


FAULTS = ({"reset": 0.25}, {"503": 0.25}, {"500": 0.25}, {"cut": 0.25}, {"short": 0.25}, {"reset": 0.1, "503": 0.1})


@pytest.mark.parametrize("faults", FAULTS, ids=lambda faults: "+".join(faults))
def test_what_fails_now_and_then_is_tried_again(
    s3: Store, proxy: FaultProxy, faults: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PART_BYTES", 2000)
    monkeypatch.setattr(store_module, "FIRST_PAUSE_S", 0.02)
    s3.write_bytes("a/0.bin", b"0")
    proxy.faults |= faults
    random.seed(1)
    state = random.getstate()
    expected = {"0.bin": b"0"}
    for number in range(1, 7):
        expected[f"{number}.bin"] = os.urandom(900 * number)
        s3.write_bytes(f"a/{number}.bin", expected[f"{number}.bin"])
        assert s3.names("a") == sorted(expected)
        assert s3.exists(f"a/{number}.bin")
        assert not s3.exists(f"a/{number}")
        assert s3.size(f"a/{number}.bin") == 900 * number
        assert s3.read_range(f"a/{number}.bin", 3, 100) == expected[f"{number}.bin"][3:100]
        if number % 2:
            s3.remove(f"a/{number - 1}.bin")
            del expected[f"{number - 1}.bin"]
    assert {name: s3.read_bytes(f"a/{name}") for name in s3.names("a")} == expected
    for name, data in expected.items():
        with s3.local_copy(f"a/{name}") as path:
            assert path.read_bytes() == data
        assert s3.local_file(f"a/{name}").read_bytes() == data
    assert s3.read_many([f"a/{name}" for name in expected]) == {f"a/{name}": data for name, data in expected.items()}
    assert list(s3.find("a")) == sorted(expected)
    s3.remove("a")
    assert s3.names() == []
    assert {request.fault for request in proxy.log} == {"", *faults}
    assert random.getstate() == state


def test_a_server_that_is_away_for_a_while_is_waited_for(s3: Store, proxy: FaultProxy) -> None:
    s3.write_bytes("a.bin", b"old")
    results: list[bytes] = []
    with proxy.away():
        thread = threading.Thread(target=lambda: results.append(s3.read_bytes("a.bin")))
        thread.start()
        time.sleep(2)
        assert results == []
    thread.join(timeout=30)
    assert results == [b"old"]


def test_a_server_that_stays_away_is_given_up_in_time(
    s3: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRAINLM_STORE_RETRY_S", "1.5")
    begin = time.monotonic()
    with (
        proxy.away(),
        pytest.raises(StoreError, match=r"tried \d+ times in \d s .BRAINLM_STORE_RETRY_S is 1\.5") as caught,
    ):
        s3.write_bytes("a.bin", b"new")
    assert 0.5 < time.monotonic() - begin < 5
    assert "cannot write s3://recordings/" in str(caught.value)
    assert "EndpointConnectionError" in str(caught.value)


def test_time_to_try_again_that_is_no_number_is_refused(s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINLM_STORE_RETRY_S", "5m")
    with pytest.raises(StoreError, match="BRAINLM_STORE_RETRY_S: expected a number of seconds, found '5m'"):
        s3.names()


def test_what_trying_again_does_not_mend_is_raised_at_once(s3: Store, proxy: FaultProxy) -> None:
    nowhere = Store(f"s3://no-such-bucket-{uuid.uuid4().hex}/x")
    proxy.log.clear()
    begin = time.monotonic()
    with pytest.raises(StoreError, match=r"cannot read s3://.*/a\.bin: it is not there"):
        s3.read_bytes("a.bin")
    with pytest.raises(StoreError, match=r"cannot write s3://no-such-bucket"):
        nowhere.write_bytes("a.bin", b"1")
    assert not nowhere.exists("a.bin")
    proxy.faults["403"] = 1.0
    for forbidden in (lambda: s3.write_bytes("a.bin", b"1"), lambda: s3.exists("a.bin"), lambda: s3.names()):
        with pytest.raises(StoreError, match="access is denied"):
            forbidden()
    assert time.monotonic() - begin < 5
    assert len(proxy.log) <= 10


def test_missing_credentials_are_a_store_error(proxy: FaultProxy) -> None:
    program = "from brainlm.store import Store; Store('s3://recordings/a').read_bytes('b')"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"AWS_ENDPOINT_URL": proxy.url, "AWS_EC2_METADATA_DISABLED": "true", "HOME": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("brainlm.errors.StoreError: cannot read s3://recordings/a/b: NoCredentialsError")


def test_a_large_upload_that_is_given_up_leaves_the_old_object(
    s3: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.write_bytes("a.bin", b"old")
    monkeypatch.setenv("BRAINLM_STORE_RETRY_S", "0.1")
    proxy.faults["503"] = 1.0
    proxy.only = "^PUT .*partNumber=2"
    for name in ("a.bin", "b.bin"):
        with pytest.raises(StoreError, match=rf"cannot write .*{name}"):
            s3.write_bytes(name, bytes(101 * 1024**2))
    assert proxy.count("PUT", "partNumber=1")
    assert s3.names() == ["a.bin"]
    assert s3.read_bytes("a.bin") == b"old"


def test_a_large_upload_whose_last_answer_is_lost_is_whole(s3: Store, proxy: FaultProxy) -> None:
    data = os.urandom(1024**2) * 101
    proxy.faults["cut"] = 0.6
    proxy.only = "^POST .*uploadId="  # done by the server; the same upload can not be finished a second time
    s3.write_bytes("a.bin", data)
    assert any(request.fault == "cut" and request.status == 200 for request in proxy.log)
    assert s3.read_bytes("a.bin") == data


def test_options_of_the_user_stay(s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.config import conf

    monkeypatch.setitem(conf, "s3", {"config_kwargs": {"read_timeout": 7, "max_pool_connections": 3}, "anon": True})
    store = Store(s3.url)
    store.fs.connect()
    found = store.fs.s3.meta.config
    assert (found.read_timeout, found.max_pool_connections, found.connect_timeout) == (7, 3, 10)
    assert found.retries["total_max_attempts"] == 1
    assert store.fs.anon
    assert Store("memory://a").fs.storage_options.keys() <= {"use_listings_cache"}


UNDER_UNSHARE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-ec")


def test_a_full_disk_keeps_the_old_file_and_says_so(tmp_path: Path) -> None:
    program = """
import os
from brainlm.errors import StoreError
from brainlm.store import Store
store = Store("small")
store.write_bytes("a.bin", b"old")
for name in ("a.bin", "new/b.bin"):
    try:
        store.write_bytes(name, bytes(10**6))
    except StoreError as error:
        print(error)
print(store.read_bytes("a.bin"), [name for _, _, files in os.walk("small") for name in files])
"""
    (tmp_path / "small").mkdir()
    mount = [*UNDER_UNSHARE, 'mount -t tmpfs -o size=256k tmpfs small; exec "$0" "$@"']
    try:
        possible = subprocess.run([*mount, "true"], cwd=tmp_path, capture_output=True, timeout=60).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("a small file system cannot be mounted here (unshare --user --mount)")
    done = subprocess.run(
        [*mount, sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    for line, name in zip(lines, ("a.bin", "new/b.bin")):
        assert f"cannot write small/{name}: the disk is full (" in line
        assert "No space left on device" in line
    assert lines[2] == "b'old' ['a.bin']"


def test_what_a_killed_writer_leaves_is_not_listed_and_is_taken_over(tmp_path: Path) -> None:
    program = "from brainlm.store import Store\nwhile True: Store('.').write_bytes('a.bin', bytes(50_000_000))"
    temporary = tmp_path / "a.bin.tmp"
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as writer:
        for _ in range(20):  # until it is caught in the middle
            deadline = time.monotonic() + 30
            while not temporary.exists() and time.monotonic() < deadline:
                time.sleep(0.001)
            writer.send_signal(signal.SIGSTOP)
            time.sleep(0.05)
            if temporary.exists():
                break
            writer.send_signal(signal.SIGCONT)
        writer.kill()
    assert temporary.exists()
    store = Store(tmp_path)
    assert set(store.names()) <= {"a.bin"}
    store.write_bytes("a.bin", b"1234")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert store.read_bytes("a.bin") == b"1234"


@pytest.mark.parametrize("locks", [True, False])
def test_writers_of_one_file_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool) -> None:
    if not locks:  # as on network file systems that are mounted without

        def refuse(*_: object) -> None:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr("brainlm.store.fcntl.flock", refuse)
    store = Store(tmp_path)
    store.write_bytes("a.bin", bytes(200_000))
    errors: list[Exception] = []

    def write(number: int) -> None:
        try:
            for _ in range(15):
                store.write_bytes("a.bin", bytes([number]) * (200_000 + number))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        data = store.read_bytes("a.bin")
        assert len(set(data)) == 1
        assert len(data) == 200_000 + data[0]
        seen.add(data[0])
    assert errors == []
    assert len(seen) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"] or not locks


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


def test_a_large_file_appears_when_it_is_whole_and_leaves_nothing_when_it_fails(store: Store) -> None:
    store.write_bytes("a/large", b"old")
    with store.new_file("a/large") as path:
        path.write_bytes(b"new")
        assert store.read_bytes("a/large") == b"old"
    assert store.read_bytes("a/large") == b"new"

    def half() -> None:
        with store.new_file("a/large") as path:
            path.write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert store.read_bytes("a/large") == b"new"
    assert store.names("a", temporary=True) == ["large"]
