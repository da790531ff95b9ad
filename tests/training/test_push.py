"""Pushing to a hub: a small server on the loopback that speaks the calls used, and one that refuses."""

import base64
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from anidiff_jax.arguments import parse
from anidiff_jax.config import TrainConfig
from anidiff_jax.errors import UserError
from anidiff_jax.training.push import Hub, card

TOKEN = "hf_secretsecretsecret"


class Server(ThreadingHTTPServer):
    def __init__(self, refuse: bool):
        super().__init__(("127.0.0.1", 0), Handler)
        self.refuse, self.commits, self.created, self.tokens = refuse, [], [], set()
        self.here = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refuse:
            return self.answer(403, {"error": f"no right to write with {self.headers['Authorization']}"})
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self.answer(200, {"url": f"{self.server.here}/me/motion", "name": "me/motion"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        if self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            files = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
            self.server.commits.append(files)
            return self.answer(200, {"commitUrl": f"{self.server.here}/me/motion/commit/0", "commitOid": "0", "hookOutput": ""})
        return self.answer(404, {"error": self.path})

    def answer(self, code, value):
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    servers = []

    def start(refuse=False):
        server = Server(refuse)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.here)
        return server

    yield start
    for server in servers:
        server.shutdown()


def config(strategy, *more) -> TrainConfig:
    words = ["--push_to_hub", "--hub_model_id", "me/motion", "--hub_private_repo", "--hub_token", TOKEN, "--push_hub_strategy", strategy]
    return parse(TrainConfig, [*words, "--csv_path", "somebody/clips.csv", *more])


@pytest.fixture
def run(tmp_path):
    """A run's folder with two checkpoints, the first of them the best."""
    for step in (5, 10):
        folder = tmp_path / "ad-1" / "checkpoints" / f"iter-{step}"
        (folder / "state").mkdir(parents=True)
        (folder / "state" / "big").write_bytes(b"state")
        (folder / "pytorch_lora_weights.safetensors").write_bytes(b"weights%d" % step)
        (folder / "train_config.json").write_text("{}")
        samples = tmp_path / "ad-1" / "samples" / f"iter-{step}"
        samples.mkdir(parents=True)
        (samples / "a.gif").write_bytes(b"GIF")
    (tmp_path / "ad-1" / "checkpoints" / "best.json").write_text('{"step": 5, "validation_loss": 0.1}')
    return tmp_path / "ad-1" / "checkpoints"


@pytest.mark.parametrize(
    ("strategy", "pushed"),
    [("push_best", [b"weights5"]), ("push_last", [b"weights10"]), ("all_checkpoints", [b"weights5", b"weights10"])],
)
def test_strategies(hub, run, strategy, pushed):
    server = hub()
    pusher = Hub(config(strategy), 12)
    pusher.saved(run / "iter-5", is_best=True)
    pusher.saved(run / "iter-10", is_best=False)
    pusher.finished(run / "iter-10")
    prefixes = ["iter-5/", "iter-10/"] if strategy == "all_checkpoints" else [""]
    assert [commit[prefix + "pytorch_lora_weights.safetensors"] for commit, prefix in zip(server.commits, prefixes, strict=True)] == pushed
    for commit, prefix in zip(server.commits, prefixes, strict=True):
        assert {name.removeprefix(prefix) for name in commit} == {"pytorch_lora_weights.safetensors", "sample.gif", "README.md"}
        assert b"12, of 8 frames" in commit[f"{prefix}README.md"]
    asked = server.created[0]
    assert asked.get("private") or asked["visibility"] == "private"
    assert server.tokens == {f"Bearer {TOKEN}"}


def test_a_refusal_is_a_warning_without_the_token(hub, run, caplog):
    hub(refuse=True)
    with caplog.at_level(logging.DEBUG):
        Hub(config("push_last"), 12).finished(run / "iter-10")
    assert "could not be pushed to me/motion" in caplog.text
    assert TOKEN not in caplog.text


def test_the_token_and_paths_stay_here(run):
    settings = config("push_last", "--model_id_or_path", str(run), "--learning_rate", "1e-3")
    text = card(settings, run / "iter-5", 3, sample=False)
    assert TOKEN not in text + json.dumps(settings.to_json()) + repr(settings)
    assert "somebody" not in text
    assert str(run.parent) not in text
    assert "`learning_rate`: 0.001" in text


def test_what_is_missing_is_said_at_once(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="hub_model_id"):
        TrainConfig(push_to_hub=True)
    with pytest.raises(UserError, match="needs a token"):
        TrainConfig(push_to_hub=True, hub_model_id="me/motion")
