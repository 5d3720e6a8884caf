"""A hub id is downloaded with the real client, here from a small server on loopback; a local path goes before it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch

from brainlm import hub
from brainlm.checkpoint import FILES, WEIGHTS, load_checkpoint, save_checkpoint, seen_subjects
from brainlm.errors import CheckpointError
from brainlm.input_contract import InputContract
from brainlm.model import BrainLM
from brainlm.testing import small_model

needs_client = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed"
)
SUBJECT = "sub-NDARAA075"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PICKLE = "pytorch_model.bin"


class FakeHub:
    """The endpoints that a download needs: facts of a repository, its tree, and the files of a commit."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.broken = False
        self.asked: list[str] = []
        hub_of_handler = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub_of_handler.answer(self, with_body=True)

            def do_HEAD(self) -> None:
                hub_of_handler.answer(self, with_body=False)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        self.asked.append(path)
        status, headers, body = self.find(path)
        request.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            request.send_header(name, value)
        request.end_headers()
        if with_body:
            request.wfile.write(body)

    def find(self, path: str) -> tuple[int, dict[str, str], bytes]:
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        owner, name, verb, *rest = (*(parts[2:] if is_api else parts), "", "", "")
        repository = f"{owner}/{name}"
        rest = [part for part in rest if part]
        if self.broken:
            return 500, {}, b"{}"
        if repository not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"
        if repository in self.gated:
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "access is restricted"}, b"{}"
        if rest and rest[0] not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b"{}"
        files = self.repositories[repository]
        as_json = {"Content-Type": "application/json"}
        if is_api and verb == "tree":
            rows = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in files.items()
            ]
            return 200, as_json, json.dumps(rows).encode()
        if is_api:
            facts = {
                "id": repository, "modelId": repository, "sha": COMMIT, "private": False, "tags": [], "downloads": 0,
                "likes": 0, "siblings": [{"rfilename": file} for file in files],
            }  # fmt: skip
            return 200, as_json, json.dumps(facts).encode()
        file = "/".join(rest[1:])
        if verb != "resolve" or file not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        data = files[file]
        return 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, data

    def downloaded(self) -> set[str]:
        return {path.split("/resolve/", 1)[1].split("/", 1)[1] for path in self.asked if "/resolve/" in path}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    started = FakeHub()
    yield started
    started.close()


@pytest.fixture
def fake(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The running server without repositories, and a client with an empty cache that is told to ask it."""
    server.repositories, server.gated, server.broken, server.asked = {}, set(), False, []
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    if importlib.util.find_spec("huggingface_hub"):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "download", partial(hub.download, endpoint=server.url))
    return server


@pytest.fixture
def model(contract: InputContract) -> BrainLM:
    return small_model(contract)


@pytest.fixture
def repository(fake: FakeHub, model: BrainLM, tmp_path: Path) -> str:
    """A repository with a checkpoint, and a pickle beside it."""
    save_checkpoint(str(tmp_path / "saved"), model, {"step": 7}, [SUBJECT])
    files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    fake.repositories["lab/brain-model"] = files | {
        PICKLE: b"\x80\x04.",
        ".gitattributes": b"",
        "old/config.json": b"{}",
    }
    return "lab/brain-model"


@pytest.mark.parametrize("text", ["lab/model", "runs/demo", "a_b/c.d-e", "vandijklab/brainlm", "1lab/2"])
def test_owner_and_name_read_as_a_hub_id(text: str) -> None:
    assert hub.is_hub_id(text)


@pytest.mark.parametrize(
    "text",
    ["model", "/lab/model", "./lab/model", "../model", "~/model", "lab/model/", "a/b/c", "s3://lab/model",
     "memory://a/b", "C:\\lab/model", "lab /model", "lab/model\n", "lab/..", "", "/"],
)  # fmt: skip
def test_paths_and_urls_do_not_read_as_a_hub_id(text: str) -> None:
    assert not hub.is_hub_id(text)


@needs_client
def test_a_hub_id_is_downloaded_and_loads_bit_for_bit(fake: FakeHub, repository: str, model: BrainLM) -> None:
    again = load_checkpoint(repository)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert again.manifest == {"step": 7}
    assert seen_subjects(repository, [SUBJECT, "sub-2"]) == {SUBJECT}
    assert fake.downloaded() == set(FILES)  # neither the pickle nor anything else


@needs_client
def test_what_was_downloaded_loads_again_without_network(fake: FakeHub, repository: str) -> None:
    first = load_checkpoint(repository).weights_sha256
    fake.asked.clear()
    fake.broken = True
    assert load_checkpoint(repository).weights_sha256 == first
    assert fake.downloaded() == set()


@needs_client
def test_a_revision_is_asked_for(fake: FakeHub, repository: str) -> None:
    assert load_checkpoint(repository, revision=COMMIT).manifest == {"step": 7}
    with pytest.raises(CheckpointError, match=r"has no revision 'v9': give a branch, tag or commit"):
        load_checkpoint(repository, revision="v9")


@needs_client
def test_from_pretrained_takes_a_hub_id_from_the_environment_s_hub(fake: FakeHub, repository: str) -> None:
    code = f"from brainlm import BrainLM; print(BrainLM.from_pretrained({repository!r}).weights_sha256)"
    env = os.environ | {
        "HF_ENDPOINT": fake.url, "HF_HOME": str(Path.cwd() / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip
    env = {name: value for name, value in env.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == hashlib.sha256(fake.repositories[repository][WEIGHTS]).hexdigest()


@needs_client
def test_a_local_folder_goes_before_a_hub_id(fake: FakeHub, repository: str, contract: InputContract) -> None:
    local = save_checkpoint(repository, small_model(contract, seed=1), {"step": 8}, [])
    assert load_checkpoint(repository).weights_sha256 == local
    assert fake.asked == []
    with pytest.raises(CheckpointError, match=r"revision='main' was given, but .* is a local path"):
        load_checkpoint(repository, revision="main")


def test_an_empty_local_folder_is_not_looked_for_on_the_hub(fake: FakeHub) -> None:
    Path("runs/demo").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"holds no finished checkpoint .*a local path goes before"):
        load_checkpoint("runs/demo")
    assert fake.asked == []


@needs_client
def test_a_typo_names_the_folder_and_the_repository(fake: FakeHub) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint("runs/demo")
    message = str(caught.value)
    assert f"there is no folder {Path('runs/demo').absolute()}" in message
    assert f"no repository runs/demo on {fake.url}" in message
    assert "hf auth login" in message


@needs_client
def test_a_gated_repository_says_where_to_ask(fake: FakeHub, repository: str) -> None:
    fake.gated.add(repository)
    with pytest.raises(CheckpointError, match=rf"ask on its page {fake.url}/{repository}, then log in"):
        load_checkpoint(repository)


@needs_client
def test_a_failing_hub_is_named(fake: FakeHub, repository: str) -> None:
    fake.broken = True
    with pytest.raises(CheckpointError, match=rf"could not be fetched from {fake.url}: .*500") as caught:
        load_checkpoint(repository)
    assert "HF_ENDPOINT" in str(caught.value)


@needs_client
def test_without_network_the_message_says_so(fake: FakeHub, repository: str) -> None:
    nowhere = "http://127.0.0.1:9"  # the discard port: nobody listens
    with pytest.raises(CheckpointError, match=r"lab/other could not be fetched from http://127\.0\.0\.1:9: .*Connect"):
        hub.download("lab/other", FILES, endpoint=nowhere)


@needs_client
def test_a_repository_without_our_files_is_refused(fake: FakeHub) -> None:
    fake.repositories["lab/other"] = {"vitmae/config.json": b"{}", PICKLE: b"\x80\x04."}
    with pytest.raises(CheckpointError, match=r"holds no checkpoint of ours \(none of config\.json.*brainlm\.official"):
        load_checkpoint("lab/other")
    assert fake.downloaded() == set()


@needs_client
def test_a_published_model_on_the_hub_is_refused_by_name(fake: FakeHub) -> None:
    fake.repositories["lab/official"] = {"config.json": b'{"model_type": "vit_mae"}', PICKLE: b"\x80\x04."}
    with pytest.raises(CheckpointError, match=r"brainlm\.official\.load_official"):
        load_checkpoint("lab/official")
    assert fake.downloaded() == {"config.json"}


def test_without_the_client_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"there is no folder .*/runs/demo, .*pip install huggingface_hub"):
        load_checkpoint("runs/demo")


@pytest.mark.parametrize("path", ["./runs/demo", "/no/such/folder", "runs/pretrain/checkpoints/step-7"])
def test_a_path_that_is_no_hub_id_is_never_looked_for_there(fake: FakeHub, path: str) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        load_checkpoint(path)
    assert fake.asked == []


def test_a_revision_of_a_url_is_refused() -> None:
    with pytest.raises(CheckpointError, match="is a path or URL: only repositories on the hub have revisions"):
        load_checkpoint("memory://a/b", revision="main")


def test_the_library_does_not_import_the_client() -> None:
    code = "import sys, brainlm.hub, brainlm.model_card; print({'huggingface_hub', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "set()", done.stderr
