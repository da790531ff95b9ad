"""What a run leaves to look at."""

import json
import math
import struct
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from anidiff_jax.config import TrainConfig
from anidiff_jax.data.loader import Timed
from anidiff_jax.errors import UserError
from anidiff_jax.training.report import Report
from anidiff_jax.training.summary import cost_of, write_report


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    return tmp_path


def fill(run, **settings) -> Report:
    config = TrainConfig(seed=7, **settings)
    with Report(run, config, 4, clips_per_update=2) as report:
        for step in range(1, 5):
            report.update(step, 1 / step, 0.5, 1e-3)
            if step % 2 == 0:
                report.scores(step, {"validation_loss": 2 / step, "validation_loss_0": 1 / step, "motion_degree": 0.25})
    for step in (2, 4):
        (run / "checkpoints" / f"iter-{step}").mkdir(parents=True)
    for step in (2, 4):
        (run / "samples" / f"iter-{step}").mkdir(parents=True)
    write_report(run, config, cost_of(report.entries, 10**12, waited=3.0))
    return report


def test_curves_cost_samples_and_settings(run):
    fill(run)
    page = (run / "report.md").read_text()
    assert "| updates | 4 |" in page
    assert "TFLOP/s" in page
    assert "0.50000 at update 4" in page
    assert page.index("samples/iter-2/") < page.index("samples/iter-4/")
    assert "| seed | 7 |" in page
    width, height = Image.open(run / "curves.png").size
    assert width > 3 * height  # three panels side by side


def test_updates_that_came_to_nothing_are_named_and_end_a_run_where_they_are_many(run, caplog):
    with Report(run, TrainConfig(), 40, clips_per_update=2) as report:
        for step in range(1, 31):  # nine in a row, one that is finite, ten in a row
            lost = step in range(11, 20) or step > 20
            if step == 30:
                with pytest.raises(UserError, match="updates 21 to 30 are not finite"):
                    report.update(step, math.nan, math.nan, 1e-3)
            else:
                report.update(step, math.nan if lost else 0.5, math.inf if lost else 0.5, 1e-3)
    assert [record.args[0] for record in caplog.records if "left out" in record.msg] == [*range(11, 20), *range(21, 31)]
    write_report(run, TrainConfig(), cost_of(report.entries, 10**12, waited=0.0))
    assert "30, 19 of them left out" in (run / "report.md").read_text()


def test_what_a_run_costs(monkeypatch):
    """Each figure from entries that are known: the first update took 8 s more, to compile."""
    entries = [{"step": i, "seconds": s, "clips_per_second": 6 / s} for i, s in enumerate((10.0, 1.0, 2.0, 30.0), 1)]
    device = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 3 * 10**9})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert cost_of(entries, 4 * 10**12, waited=3.25) == {
        "updates": 4,
        "compiling": "8.0 s",
        "an update": "2.000 s (median)",
        "clips": "3.00 a second",
        "UNet": "4.000 TFLOP an update, 2.000 TFLOP/s",
        "waiting for data": "3.2 s in all, partly while the devices worked",
        "all updates": "43 s",
        "peak memory of a device": "3.00 GB",
    }
    device.memory_stats = lambda: None  # a CPU: the process itself
    spent = np.ones(200 * 2**20, np.uint8)
    gigabytes = float(cost_of(entries, 1, 0)["peak memory of the process"].split()[0])
    assert spent.nbytes / 1e9 < gigabytes < 1000


def test_waiting_for_data_is_measured(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("anidiff_jax.data.loader.time.perf_counter", lambda: clock[0])

    def slow():
        for i in range(2):
            clock[0] += 2
            yield i

    stream = Timed(slow())
    assert next(stream) == 0
    clock[0] += 5  # the devices work: no waiting
    assert next(stream) == 1
    assert stream.seconds == 4


def test_other_writers_get_the_same(run):
    fill(run, use_tensorboard=True, use_wandb=True)
    expected = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = scalars(next((run / "tensorboard").glob("events.*")).read_bytes())
    for entry in expected:
        for name, value in entry.items():
            assert found[entry["step"], name] == pytest.approx(value), (entry["step"], name)
    (offline,) = (run / "wandb").glob("offline-run-*/*.wandb")
    assert b"validation_loss" in offline.read_bytes()


def scalars(data: bytes) -> dict:
    """(step, name) → value of a TensorBoard file: records of length, checksum, protobuf, checksum."""
    found = {}
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        found.update({(event.step, value.tag): value.simple_value for value in event.summary.value})
        data = data[16 + length :]
    return found


def test_a_missing_writer_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="use_tensorboard needs the package tensorboardX"):
        TrainConfig(use_tensorboard=True)
    with pytest.raises(UserError, match="use_wandb needs the package wandb"):
        TrainConfig(use_wandb=True)
