"""Pushing to a hub: a small server on the loopback that speaks the calls used, and one that refuses."""

import json
import logging
import sys

import pytest

from anidiff_jax.arguments import parse
from anidiff_jax.config import TrainConfig
from anidiff_jax.errors import UserError
from anidiff_jax.training.push import Hub, card
from anidiff_jax.training.runs import write_log
from anidiff_jax.weights.hub import HUBS
from tests.hubs import TOKEN


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
    write_log(tmp_path / "ad-1", [{"step": step, "validation_loss": step / 50} for step in (5, 10)])
    return tmp_path / "ad-1" / "checkpoints"


@pytest.mark.parametrize("name", HUBS)
@pytest.mark.parametrize(
    ("strategy", "pushed"),
    [("push_best", {"": 5}), ("push_last", {"": 10}), ("all_checkpoints", {"iter-5/": 5, "iter-10/": 10})],
)
def test_strategies(hub, run, name, strategy, pushed):
    server = hub(name)
    pusher = Hub(config(strategy, "--hub", name), 12)
    pusher.saved(run / "iter-5", is_best=True)
    pusher.saved(run / "iter-10", is_best=False)
    pusher.finished(run / "iter-10")
    there = dict(server.uploads)
    assert len(there) == len(server.uploads) == 3 * len(pushed)
    for prefix, step in pushed.items():
        assert there[f"{prefix}pytorch_lora_weights.safetensors"] == b"weights%d" % step
        assert there[f"{prefix}sample.gif"] == b"GIF"
        assert b"12, of 8 frames" in there[f"{prefix}README.md"]
    assert server.private == {"me/motion": True}
    assert server.tokens == {f"Bearer {TOKEN}"}


def test_a_public_repository(hub, run):
    server = hub("modelscope")
    Hub(config("push_last", "--hub", "modelscope", "--hub_private_repo", "false"), 12).finished(run / "iter-10")
    assert server.private == {"me/motion": False}
    assert server.license == "Other"  # ours to push, not to license


@pytest.mark.parametrize(
    ("name", "refuses", "reason"),
    [
        ("hf", {"refuse": "/"}, "403 Forbidden"),
        ("modelscope", {"refuse": "/"}, "no right to write with Bearer …"),
        # A busy server: its package tries again, and would write into a log of its own what was answered.
        ("modelscope", {"refuse": "/commit/", "code": 503}, "no right to write with Bearer …"),
    ],
)
def test_a_refusal_is_a_warning_without_the_token(hub, run, name, refuses, reason, caplog, monkeypatch):
    hub(name, **refuses)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(logging.getLogger("modelscope_hub"), "handlers", [caplog.handler])
    with caplog.at_level(logging.DEBUG):
        Hub(config("push_last", "--hub", name), 12).finished(run / "iter-10")
    assert "could not be pushed to me/motion: " in caplog.text
    assert reason in caplog.text
    assert TOKEN not in caplog.text


def test_the_token_and_paths_stay_here(run):
    places = [word for name in ("model_id_or_path", "vae_path", "text_encoder_path") for word in (f"--{name}", str(run))]
    settings = config("push_last", *places, "--lora", f"{run}:0.5", "--lora", "owner/style", "--learning_rate", "1e-3")
    text = card(settings, run / "iter-5", 3, sample=False)
    assert TOKEN not in text + json.dumps(settings.to_json()) + repr(settings)
    assert "somebody" not in text
    assert str(run.parent) not in text
    assert "`learning_rate`: 0.001" in text
    assert f"`vae_path`: {run.name}" in text
    assert f"`lora`: ['{run.name}:0.5', 'owner/style:1']" in text


def test_what_is_missing_is_said_at_once(monkeypatch, hub):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="hub_model_id"):
        TrainConfig(push_to_hub=True)
    with pytest.raises(UserError, match="needs a token: set HF_TOKEN"):
        TrainConfig(push_to_hub=True, hub_model_id="me/motion")
    with pytest.raises(UserError, match="needs a token: set MODELSCOPE_API_TOKEN"):
        TrainConfig(push_to_hub=True, hub_model_id="me/motion", hub="modelscope")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    TrainConfig(push_to_hub=True, hub_model_id="me/motion", hub="modelscope")
    with pytest.raises(UserError, match="owner/name"):
        TrainConfig(push_to_hub=True, hub_model_id="motion", hub="modelscope")
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(UserError, match="pip install modelscope-hub"):
        TrainConfig(push_to_hub=True, hub_model_id="me/motion", hub="modelscope")


@pytest.mark.parametrize("name", HUBS)
def test_the_token_of_the_environment_or_of_a_login(hub, run, name, monkeypatch):
    server = hub(name)
    if name == "hf":
        monkeypatch.setenv("HF_TOKEN", "hf_another")
    else:
        from modelscope_hub import HubConfig

        HubConfig().save_token("hf_another")
    words = ["--push_to_hub", "--hub_model_id", "me/motion", "--push_hub_strategy", "push_last", "--hub", name]
    Hub(parse(TrainConfig, words), 1).finished(run / "iter-10")
    assert server.tokens == {"Bearer hf_another"}
