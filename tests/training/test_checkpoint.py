"""Writing beside the updates: what goes wrong comes up, and leaves what was whole before."""

import errno
import json
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from anidiff_jax.config import TrainConfig
from anidiff_jax.errors import UserError
from anidiff_jax.pipeline import AnimateDiffPipeline
from anidiff_jax.training import checkpoint
from anidiff_jax.training.push import Hub
from anidiff_jax.training.runs import best_of, read_log, steps_in, write_log
from anidiff_jax.training.state import TrainState
from anidiff_jax.weights.base import EMBEDDED
from anidiff_jax.weights.loras import load_lora
from anidiff_jax.weights.tree import flatten, is_motion, merge, split


@pytest.fixture
def write(monkeypatch):
    """Stands in for the files: writes a folder, or fails as a full disk does."""
    full = []

    def write_checkpoint(folder, state, *_):
        with checkpoint.files.written_whole(folder) as out:
            (out / "state").write_text(str(state.params["x"]))
            if full:
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_checkpoint", write_checkpoint)
    return full


def state(step: int) -> TrainState:
    return TrainState(jnp.int32(step), {"x": jnp.float32(step)}, ())


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_full_disk_leaves_the_last_good_one(write, tmp_path, monkeypatch, backend):
    config = TrainConfig()
    with checkpoint.Checkpoints(tmp_path, None, config, Hub(config, 1)) as checkpoints:
        checkpoints.save(state(2), {})
        checkpoints.wait()
        write.append("full")
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        if backend == "gpu":
            checkpoints.save(state(4), {})  # comes up at the next call, while a CPU waits for the file
        with pytest.raises(UserError, match=r"No space left on device\); the last whole one is iter-2: make room, then resume"):
            checkpoints.save(state(6), {})
    assert steps_in(tmp_path / "checkpoints") == [2]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iter-2"]


def test_what_was_saved_is_what_was_then(write, tmp_path):
    """The updates overwrite the state once it is written."""
    config = TrainConfig()
    with checkpoint.Checkpoints(tmp_path, None, config, Hub(config, 1)) as checkpoints:
        for step in (1, 2, 3):
            now = state(step)
            checkpoints.save(now, {})
            now.params["x"].delete()  # as donation does
    assert [(tmp_path / "checkpoints" / f"iter-{i}" / "state").read_text() for i in (1, 2, 3)] == ["1.0", "2.0", "3.0"]


def test_what_a_kill_left_half_written_is_removed(write, tmp_path):
    folder, config = tmp_path / "checkpoints", TrainConfig()
    for half in (".iter-4.x1y2", ".iter-2.old.z3"):
        (folder / half / "state").mkdir(parents=True)
    (folder / "iter-2" / "state").mkdir(parents=True)
    with checkpoint.Checkpoints(tmp_path, None, config, Hub(config, 1)):
        assert [path.name for path in folder.iterdir()] == ["iter-2"]


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(1, [3, 6]), (2, [3, 6]), (3, [3, 5, 6]), (None, [1, 2, 3, 4, 5, 6])],
)
def test_retention_never_deletes_the_best_or_the_last(write, tmp_path, limit, kept):
    config = TrainConfig(save_total_limit=limit)
    losses = [0.5, 0.4, 0.1, 0.3, None, 0.2]
    with checkpoint.Checkpoints(tmp_path, None, config, Hub(config, 1)) as checkpoints:
        for step, loss in enumerate(losses, 1):
            checkpoints.wait()
            checkpoints.save(state(step), {})
            write_log(tmp_path, [*read_log(tmp_path), {"step": step} if loss is None else {"step": step, "validation_loss": loss}])
            checkpoints.settle(step)
    assert steps_in(tmp_path / "checkpoints") == kept
    assert best_of(tmp_path) == {"step": 3, "validation_loss": 0.1}


def test_what_a_slow_hub_has_not_got_yet_is_kept(write, tmp_path, monkeypatch):
    config = TrainConfig(save_total_limit=1, push_to_hub=True, hub_model_id="me/it", hub_token="t", push_hub_strategy="all_checkpoints")
    busy, got = threading.Event(), []

    def push(self, path, prefix):
        busy.wait(60)
        got.append((path.name, path.is_dir()))

    monkeypatch.setattr(Hub, "_push", push)
    hub, folder = Hub(config, 1), tmp_path / "checkpoints"
    with checkpoint.Checkpoints(tmp_path, None, config, hub) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(state(step), {})
            checkpoints.settle(step)
        checkpoints.wait()
        assert steps_in(folder) == [1, 2, 3]
        busy.set()
        hub._thread.submit(lambda: None).result()  # the pushes before it are done
        checkpoints.save(state(4), {})
        checkpoints.settle(4)
    hub.finished(folder / "iter-4")
    assert got == [(f"iter-{i}", True) for i in (1, 2, 3, 4)]
    assert steps_in(folder) == [4]


@pytest.mark.parametrize(("dtype", "stored"), [("fp32", "float32"), ("fp16", "float16")])
def test_a_lora_is_written_as_it_was_asked_for(tmp_path, dtype, stored):
    config = TrainConfig(model_id_or_path="a/model", lora_rank=3, lora_alpha=12, lora_dropout=0.2, lora_dtype=dtype)
    layer = {"lora_A": {"weight": jnp.ones((5, 3))}, "lora_B": {"weight": jnp.ones((3, 5))}}
    checkpoint.write_checkpoint(tmp_path / "iter-2", TrainState(jnp.int32(2), {"to_q": layer}, ()), {}, None, config)
    said = json.loads((tmp_path / "iter-2" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["lora_dropout"], said["base_model_name_or_path"]) == (3, 12, 0.2, "a/model")
    assert {str(x.dtype) for x in load_file(tmp_path / "iter-2" / "pytorch_lora_weights.safetensors").values()} == {stored}
    assert float(load_lora(tmp_path / "iter-2", {}).unet["to_q"]["lora_B"]["weight"][0, 0]) == 4


def test_what_is_written_is_made_on_the_host(tmp_path, monkeypatch):
    """The frozen part of a UNet is on the device, in half precision: there it would become float32 while the next update runs."""
    written = {}
    monkeypatch.setattr(checkpoint.files, "save", lambda tree, *_: written.update(flatten(tree)))
    model = SimpleNamespace(motion=None, unet_json={})
    checkpoint.save_unet_part({"a": {"weight": np.ones(2, np.float32)}}, {"b": {"weight": jnp.ones(2, "bfloat16")}}, model, tmp_path, {})
    assert [(type(x), str(x.dtype)) for x in written.values()] == 2 * [(np.ndarray, "float32")]


def test_a_unet_that_trained_as_a_whole_brings_its_motion_modules(tmp_path, caplog):
    """Its own adapter would come with the embedded model; it would come from --motion_adapter_id_or_path, too, if that was left in."""
    model = AnimateDiffPipeline.from_pretrained().model
    motion, image = split(model.params["unet"], is_motion)
    trained = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.01), motion)
    folder = tmp_path / "iter-2"
    folder.mkdir()
    checkpoint.save_unet_part(merge(image, trained), {}, model, folder, {})
    for adapter in (None, EMBEDDED / "motion_adapter"):
        with caplog.at_level("INFO"):
            pipe = AnimateDiffPipeline.from_pretrained(motion_adapter=adapter, unet=folder)
        found = flatten(split(pipe.model.params["unet"], is_motion)[0])
        for key, value in flatten(trained).items():
            np.testing.assert_array_equal(found[key], value)
        assert "not those of" in caplog.text
