"""Atlases by name: downloaded once from a server on loopback, checked, and had without network."""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brainlm.errors import ConfigError, DataError, StoreError
from data_prep import atlas_registry
from data_prep.atlas_image import load_atlas
from data_prep.atlas_registry import RECORDS, AtlasFile, AtlasRecord, cache_folder, fetch_atlas, find_record, main
from data_prep.settings import AtlasSettings


class Handler(BaseHTTPRequestHandler):
    """Serve a folder; ``/cut/NAME`` promises all of a file and breaks off in the middle."""

    def __init__(self, server: Files, *args: Any) -> None:
        self.files = server
        super().__init__(*args)

    def do_GET(self) -> None:
        self.files.requests.append(self.path)
        path = self.files.folder / self.path.rsplit("/", 1)[-1]
        if not path.is_file():
            self.send_error(404)
            return
        body = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.path.startswith("/cut/") else body)

    def log_message(self, *_: Any) -> None:
        pass


class Files:
    """A folder behind an HTTP server."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests = folder, list[str]()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(toy) -> Iterator[Files]:
    files = Files(toy.folder)
    yield files
    files.stop()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BRAINLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BRAINLM_ATLASES", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return cache_folder()


@pytest.fixture
def record(toy, server, monkeypatch) -> AtlasRecord:
    """The toy atlas as a record of the registry."""
    made = AtlasRecord(
        name="Toy6",
        image=AtlasFile(
            name="atlas.nii.gz", url=f"{server.url}/atlas.nii.gz", sha256=sha256(toy.folder / "atlas.nii.gz")
        ),
        table=AtlasFile(name="atlas.tsv", url=f"{server.url}/atlas.tsv", sha256=sha256(toy.folder / "atlas.tsv")),
        space="MNI152NLin6Asym",
        num_parcels=6,
        licence="none",
        citation="none",
        how="both files of the example",
    )
    monkeypatch.setattr(atlas_registry, "RECORDS", {made.name: made})
    return made


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_an_atlas_is_downloaded_once_and_had_offline_from_then_on(record, server, own_cache):
    first = load_atlas(AtlasSettings(name="toy6"))
    assert (first.atlas.name, first.atlas.space, first.atlas.num_parcels) == ("Toy6", "MNI152NLin6Asym", 6)
    assert first.atlas.parcel_names[0] == "parcel3"
    assert server.requests == ["/atlas.nii.gz", "/atlas.tsv"]
    assert left_in(own_cache) == ["atlas.nii.gz", "atlas.tsv"]
    server.stop()
    again = load_atlas(AtlasSettings(name="Toy6"))
    assert again.atlas.to_json() == first.atlas.to_json()


def test_a_file_address_serves_too(record, toy):
    image = replace(record.image, url=(toy.folder / "atlas.nii.gz").as_uri())
    assert fetch_atlas(replace(record, image=image)).image.read_bytes() == (toy.folder / "atlas.nii.gz").read_bytes()


def test_a_file_that_is_not_the_one_meant_is_not_kept(record, own_cache, toy):
    wrong = replace(record, image=replace(record.image, sha256="0" * 64))
    with pytest.raises(DataError) as error:
        fetch_atlas(wrong)
    assert "0" * 64 in str(error.value)
    assert sha256(toy.folder / "atlas.nii.gz") in str(error.value)
    assert left_in(own_cache) == []


def test_a_download_that_breaks_off_leaves_nothing_behind(record, server, own_cache):
    cut = replace(record, image=replace(record.image, url=f"{server.url}/cut/atlas.nii.gz"))
    with pytest.raises((DataError, StoreError), match=r"cut or has changed|IncompleteRead"):
        fetch_atlas(cut)
    assert left_in(own_cache) == []
    assert fetch_atlas(record).image.is_file()


def test_a_download_without_end_is_stopped(record, own_cache, monkeypatch):
    monkeypatch.setattr(atlas_registry, "MAX_BYTES", 100)
    with pytest.raises(StoreError, match="larger than 100 bytes"):
        fetch_atlas(record)
    assert left_in(own_cache) == []


def test_a_damaged_cached_file_is_removed_with_both_hashes_told_and_downloaded_again(record, own_cache):
    path = fetch_atlas(record).image
    path.write_bytes(b"rot")
    with pytest.raises(DataError, match="run again to download") as error:
        fetch_atlas(record)
    assert record.image.sha256 in str(error.value)
    assert hashlib.sha256(b"rot").hexdigest() in str(error.value)
    assert not path.exists()
    assert sha256(fetch_atlas(record).image) == record.image.sha256


@pytest.mark.parametrize("path", ["/missing.nii.gz", None])
def test_a_network_error_says_what_to_do_without_network(record, server, path):
    url = f"{server.url}{path}" if path else "http://127.0.0.1:1/atlas.nii.gz"
    with pytest.raises(
        StoreError, match=r"Without network: .*BRAINLM_CACHE.*both files of the example.*BRAINLM_ATLASES"
    ):
        fetch_atlas(replace(record, image=replace(record.image, url=url)))


def test_other_schemes_are_not_followed(record):
    with pytest.raises(ConfigError, match="ftp://somewhere"):
        fetch_atlas(replace(record, image=replace(record.image, url="ftp://somewhere/atlas.nii.gz")))


def test_files_downloaded_by_hand_are_used_before_cache_and_network(record, server, toy, tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    for name in ("atlas.nii.gz", "atlas.tsv"):
        shutil.copy(toy.folder / name, own)
    monkeypatch.setenv("BRAINLM_ATLASES", str(own))
    assert fetch_atlas(record).image == own / "atlas.nii.gz"
    assert server.requests == []
    (own / "atlas.tsv").write_text("index\tname\n")
    with pytest.raises(DataError, match="BRAINLM_ATLASES holds another file"):
        fetch_atlas(record)
    assert (own / "atlas.tsv").exists()  # it is the user's


def test_nothing_is_downloaded_without_a_hash(record, server):
    unknown = replace(record, image=replace(record.image, sha256=None))
    with pytest.raises(StoreError, match=r"no sha256 of atlas.nii.gz is known"):
        fetch_atlas(unknown)
    assert server.requests == []
    nowhere = replace(record, image=AtlasFile(name="atlas.nii.gz"))
    with pytest.raises(StoreError, match=r"no address to download it from\. Instead get both files"):
        fetch_atlas(nowhere)


def test_a_hash_that_the_user_vouches_for_is_kept_beside_the_file(record, server):
    unknown = replace(record, image=replace(record.image, sha256=None))
    fetched = fetch_atlas(unknown, {"atlas.nii.gz": record.image.sha256.upper()})
    assert fetch_atlas(unknown).image == fetched.image
    assert server.requests == ["/atlas.nii.gz", "/atlas.tsv"]
    fetched.image.write_bytes(b"rot")
    with pytest.raises(DataError, match="removed from the cache"):
        fetch_atlas(unknown)


def test_a_file_without_a_known_hash_can_be_given_by_hand(record, toy, monkeypatch):
    unknown = replace(record, image=AtlasFile(name="atlas.nii.gz"))
    monkeypatch.setenv("BRAINLM_ATLASES", str(toy.folder))
    assert fetch_atlas(unknown).image == toy.folder / "atlas.nii.gz"


def test_another_number_of_parcels_than_the_record_says_is_refused(record, monkeypatch):
    monkeypatch.setattr(atlas_registry, "RECORDS", {"Toy6": replace(record, num_parcels=7)})
    with pytest.raises(DataError, match="expected 7 parcels, found 6"):
        load_atlas(AtlasSettings(name="Toy6"))


def test_a_space_that_contradicts_the_registry_is_refused(record):
    with pytest.raises(DataError, match=r"in MNI152NLin6Asym by the registry, atlas\.space says MNI"):
        load_atlas(AtlasSettings(name="Toy6", space="MNI152NLin2009cAsym"))


def test_an_unknown_name_is_answered_with_all_names():
    with pytest.raises(ConfigError, match=re.escape(", ".join(RECORDS))):
        load_atlas(AtlasSettings(name="A42"))


def test_networks_are_taken_from_the_names_of_schaefers_table(toy, tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    schaefer = RECORDS["schaefer200"]
    monkeypatch.setattr(atlas_registry, "RECORDS", {"schaefer200": replace(schaefer, num_parcels=6)})
    monkeypatch.setenv("BRAINLM_ATLASES", str(own))
    shutil.copy(toy.folder / "atlas.nii.gz", own / schaefer.image.name)
    plain = load_atlas(AtlasSettings(name="toy", image=str(toy.folder / "atlas.nii.gz"))).atlas
    ends = ("Vis_1", "SomMot_12", "DorsAttn_Post_1", "SalVentAttn_ParOper_1", "Cont_PFCl_2", "Default_pCunPCC_1")
    lines = [f"{label}\t7Networks_?H_{end}\t120\t18\t131\t0" for label, end in zip(plain.labels, ends, strict=True)]
    sides = np.where(plain.coords_mm[:, 0] < 0, "L", "R")
    table = own / schaefer.table.name
    table.write_text("\n".join(line.replace("?", side) for line, side in zip(lines, sides)) + "\n")
    networks = ("Vis", "SomMot", "DorsAttn", "SalVentAttn", "Cont", "Default")
    assert load_atlas(AtlasSettings(name="Schaefer200")).atlas.networks == networks
    table.write_text(table.read_text().replace("7Networks", "17Networks"))
    with pytest.raises(DataError, match=r"expected names that hold a network .*, found 17Networks_.H_Vis_1"):
        load_atlas(AtlasSettings(name="schaefer200"))


def test_the_program_downloads_and_lists(record, capsys):
    assert main([]) == 0
    assert "Toy6: 6 parcels, MNI152NLin6Asym" in capsys.readouterr().out
    assert main(["toy6"]) == 0
    assert "atlas.nii.gz" in capsys.readouterr().out
    assert main(["other"]) == 1
    assert "there is no atlas 'other'" in capsys.readouterr().err


def test_every_record_can_be_had_or_says_how():
    for name, record in RECORDS.items():
        assert find_record(name.upper()) is record
        assert record.space.startswith("MNI")
        for file in (record.image, record.table):
            if file is not None:
                assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
                assert file.sha256 is None or record.verified.startswith("hashes of")
                assert file.url is None or file.url.startswith("https://")
        assert record.how
        assert record.licence
        assert record.citation


def test_published_a424_has_424_parcels_at_its_published_coordinates(shared_data, tmp_path, monkeypatch):
    shutil.copy(shared_data / "atlases" / "A424+2mm.nii.gz", tmp_path)
    shutil.copy(shared_data / "atlases" / "A424_Coordinates.txt", tmp_path / "A424_Coordinates.dat")
    monkeypatch.setenv("BRAINLM_ATLASES", str(tmp_path))
    atlas = load_atlas(AtlasSettings(name="a424")).atlas
    assert (atlas.name, atlas.num_parcels, atlas.space) == ("A424", 424, "MNI152NLin6Asym")
    table = np.loadtxt(shared_data / "atlases" / "A424_Coordinates.txt")
    np.testing.assert_array_equal(atlas.labels, table[:, 0])
    np.testing.assert_array_equal(atlas.coords_mm, table[:, 1:])
