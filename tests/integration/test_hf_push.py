"""`convert_to_hf --push`: an export on a hub, of which a stand-in on this machine plays the part."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from oryx_megatron.hf.folders import open_export

ROOT = Path(__file__).resolve().parents[2]


class Hub(ThreadingHTTPServer):
    """Repositories in memory; what a client of huggingface_hub asks of them to make, list and commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits = 0
        self.token = "secret"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: object, **headers: str) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(text)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.answer(401, {"error": "Invalid credentials"})
        parts = self.path.partition("?")[0].split("/")
        repo = "/".join(parts[3:5])
        if repo not in self.server.repos:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        files = self.server.repos[repo]
        if "tree" in parts:
            return self.answer(200, [{"type": "file", "oid": "0", "size": len(f), "path": p} for p, f in files.items()])
        info = {"id": repo, "sha": "0" * 40, "siblings": [{"rfilename": path} for path in files], "private": False}
        return self.answer(200, info | {"tags": [], "downloads": 0, "likes": 0})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.answer(401, {"error": "Invalid credentials"})
        here = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            fields = json.loads(body)
            repo = f"{fields['organization']}/{fields['name']}" if fields.get("organization") else fields["name"]
            if repo in self.server.repos:
                return self.answer(409, {"url": f"{here}/{repo}", "error": "You already created this model repo"})
            self.server.repos[repo] = {}
            return self.answer(200, {"url": f"{here}/{repo}", "id": repo})
        parts = self.path.partition("?")[0].split("/")
        repo = "/".join(parts[3:5])
        if "preupload" in parts:
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self.answer(
                200,
                {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for p in paths]},
            )
        if "commit" in parts:
            files = self.server.repos[repo]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "deletedFile":
                    del files[value["path"]]
            self.server.commits += 1
            return self.answer(200, {"commitUrl": f"{here}/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40})
        return self.answer(404, {"error": f"the stand-in does not know {self.path}"})


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def convert(hub: Hub, home: Path, *arguments: object, token: str | None = "secret") -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_DISABLE_XET": "1", **({} if token is None else {"HF_TOKEN": token})}
    command = [sys.executable, str(ROOT / "tools" / "convert_to_hf.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)


def test_an_export_is_pushed_and_replaced(hub: Hub, hf_project: Path, tmp_path: Path) -> None:
    """All files of the export in one commit; what an earlier one had besides goes, what is no export stays."""
    source = hf_project.parent / "shared tp2"
    done = convert(hub, tmp_path, source, tmp_path / "hf", "--push", "me/tiny")
    assert done.returncode == 0, done.stderr
    assert f"pushed: http://127.0.0.1:{hub.server_port}/me/tiny/commit/" in done.stdout
    written = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert hub.repos["me/tiny"] == written
    (tmp_path / "back").mkdir()
    for name, content in hub.repos["me/tiny"].items():
        (tmp_path / "back" / name).write_bytes(content)
    assert open_export(tmp_path / "back").model.name == "shared-tp2"

    again = convert(hub, tmp_path, source, tmp_path / "two", "--push", "me/tiny")
    assert (again.returncode, hub.commits) == (2, 1)
    assert "--push me/tiny: this repository holds an export; replace it with --overwrite" in again.stderr
    assert not (tmp_path / "two").exists()  # it is said before the work
    hub.repos["me/tiny"]["model-00001-of-00002.safetensors"] = b"old"
    again = convert(hub, tmp_path, source, tmp_path / "two", "--push", "me/tiny", "--overwrite", "--no-tokenizer")
    assert again.returncode == 0, again.stderr
    assert set(hub.repos["me/tiny"]) == {path.name for path in (tmp_path / "two").iterdir()}

    hub.repos["me/other"] = {"data.csv": b"1,2"}
    refused = convert(hub, tmp_path, source, tmp_path / "three", "--push", "me/other", "--overwrite")
    assert refused.returncode == 2
    assert "--push me/other: this repository holds files that are no export; choose another name" in refused.stderr
    assert hub.repos["me/other"] == {"data.csv": b"1,2"}


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("me/tiny", "wrong", "--push me/tiny: the hub does not know you; run `hf auth login`, or set HF_TOKEN"),
        ("a name/with blanks", "secret", "--push a name/with blanks: "),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    repo: str, token: str, message: str, hub: Hub, hf_project: Path, tmp_path: Path
) -> None:
    done = convert(hub, tmp_path, hf_project.parent / "shared tp2", tmp_path / "hf", "--push", repo, token=token)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert message in line
    assert not (tmp_path / "hf").exists()
    assert not hub.repos
