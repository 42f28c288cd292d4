"""Loading a repository by name from a fake Hub."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import pytest

from cenacle.model.synth import synth

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "circle/tiny"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = synth(tmp_path_factory.mktemp("hub") / "tiny", family="qwen3_moe").path
    (folder / "pytorch_model.bin").write_bytes(b"never to be downloads")
    (folder / "model-99999.safetensors").write_bytes(b"not named by the index")
    downloads = []

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            path = unquote(urlparse(self.path).path)
            files = sorted(p.name for p in folder.iterdir())
            if path.startswith(f"/api/models/{REPO}/revision/") or path == f"/api/models/{REPO}":
                info = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                return self.send(json.dumps(info).encode(), body, "application/json")
            if path.startswith(f"/api/models/{REPO}/tree/"):
                tree = [
                    {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": f}
                    for f in files
                ]
                return self.send(json.dumps(tree).encode(), body, "application/json")
            name = path.rsplit("/", 1)[-1]
            if path == f"/{REPO}/resolve/{COMMIT}/{name}" and name in files:
                if body:
                    downloads.append(name)
                return self.send((folder / name).read_bytes(), body, "application/octet-stream")
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()

        def send(self, data, body, kind):
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", downloads
    server.shutdown()
    server.server_close()


def cenacle(hub_url, home, *arguments):
    env = {**os.environ, "HF_ENDPOINT": hub_url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-m", "cenacle", *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_repository_by_name(hub, tmp_path):
    url, downloads = hub
    ran = cenacle(
        url, tmp_path, "generate", "-m", REPO, "-p", "hi", "--max-tokens", "4", "--json", "-n", "2"
    )
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout.splitlines()[-1])
    assert len(answer["tokens"]) == 4
    assert answer["nodes"] == 2
    weights = [file for file in downloads if file.endswith(".safetensors")]
    assert weights == ["model.safetensors"]
    assert "not named by the index" not in ran.stderr
    assert "pytorch_model.bin" not in downloads
    before = len(downloads)
    assert cenacle(url, tmp_path, "inspect", "-m", REPO, "--json").returncode == 0
    assert len(downloads) == before, "the second time everything is in the cache"


def test_missing_repository(hub, tmp_path):
    ran = cenacle(hub[0], tmp_path, "inspect", "-m", "circle/none")
    assert ran.returncode == 3
    assert "circle/none" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_unreachable_hub(tmp_path):
    ran = cenacle("http://127.0.0.1:9", tmp_path, "inspect", "-m", "circle/none")
    assert ran.returncode == 3
    assert "Traceback" not in ran.stderr
