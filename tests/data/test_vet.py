"""A folder in which videos are broken as they are in the wild: found, named, and never a hang."""

import csv
import json
import shutil
import subprocess

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from anidiff_jax.config import TrainConfig
from anidiff_jax.data import vet
from anidiff_jax.data.loader import Clips, Videos, batches
from anidiff_jax.data.records import read_records
from anidiff_jax.errors import UserError
from anidiff_jax.shapes.clips import write_clips


def ffmpeg(*words):
    subprocess.run([get_ffmpeg_exe(), "-v", "error", "-y", *map(str, words)], check=True)


@pytest.fixture(scope="module")
def wild(tmp_path_factory):
    """Ten good clips, and one of each kind of trouble."""
    folder = tmp_path_factory.mktemp("wild")
    write_clips(folder, 10, seed=1)
    good = next(iter(sorted(folder.glob("*.mp4"))))
    truncated = folder / "truncated.mp4"
    ffmpeg("-i", good, "-c", "copy", "-movflags", "faststart", truncated)
    truncated.write_bytes(truncated.read_bytes()[: truncated.stat().st_size * 2 // 3])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("<html>404</html>")
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", folder / "sound.mp4")
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x64:d=0.2:r=10", folder / "short.mp4")
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=97x55:d=2:r=12", "-pix_fmt", "yuv444p", folder / "odd_size.mp4")
    ffmpeg("-display_rotation", "90", "-i", good, "-c", "copy", folder / "rotated.mp4")
    ffmpeg(
        "-f", "lavfi", "-i", "testsrc=s=64x64:d=2:r=12", "-vf", r"select=not(between(n\,5\,12))", "-fps_mode", "vfr", folder / "uneven.mp4"
    )
    names = ["truncated", "empty", "text", "sound", "short", "odd_size", "rotated", "uneven"]
    with (folder / "clips.csv").open("a", newline="") as file:
        csv.writer(file).writerows([f"caption of {name}", f"{name}.mp4"] for name in names)
    return folder


BROKEN = {"truncated.mp4", "empty.mp4", "text.mp4", "sound.mp4", "short.mp4"}


def settings(folder, output) -> TrainConfig:
    return TrainConfig(
        csv_path=str(folder / "clips.csv"), video_folder=str(folder), output_dir=str(output), sample_n_frames=8, dataloader_num_workers=2
    )


def test_what_is_found(wild, tmp_path, capsys):
    config = settings(wild, tmp_path)
    vet.check_data(read_records(config.csv_path, config.video_folder), config)
    clean = read_records(capsys.readouterr().out.splitlines()[-1], str(wild))
    assert set(clean.names) == {p.name for p in wild.glob("*.mp4")} - BROKEN
    assert "caption of rotated" in clean.captions
    report = json.loads((tmp_path / "data_report.json").read_text())
    assert (report["videos"], report["usable"]) == (18, 13)
    assert {name for name, found in report["of each"].items() if found["problem"]} == BROKEN
    assert (report["of each"]["odd_size.mp4"]["width"], report["of each"]["odd_size.mp4"]["height"]) == (97, 55)
    assert "varies" in report["of each"]["uneven.mp4"]["remark"]
    assert "2 frames, a clip needs 8" in report["of each"]["short.mp4"]["problem"]


def test_training_goes_on_among_them(wild):
    """The same videos without having been checked: left out, and the others are met."""
    config = settings(wild, "")
    records = read_records(config.csv_path, config.video_folder)
    clips = Clips(records, 0, Videos(records, config, lambda caption: np.zeros(1, np.int32)))
    stream = batches(clips, 6, 2)
    seen = {records.names[row] for _ in range(9) for row in next(stream)["row"]}
    assert seen.isdisjoint(BROKEN)
    assert {"odd_size.mp4", "uneven.mp4", "rotated.mp4"} <= seen
    assert {records.names[row] for row in clips.skipped} == BROKEN


def test_a_decoder_that_hangs_or_dies_is_replaced(wild, tmp_path, monkeypatch):
    """The child is a real process; the decoder in it is told to misbehave by the file's name."""
    for name in ("hang.mp4", "crash.mp4", "good.mp4"):
        shutil.copyfile(wild / "odd_size.mp4", tmp_path / name)
    records = vet.Records(tmp_path, ["hang.mp4", "crash.mp4", "good.mp4", "hang.mp4"], [""] * 4)
    monkeypatch.setattr(vet, "_serve", misbehave)
    hang, crash, good, again = vet.vet(records, 8, workers=1, patience=2)
    assert "hangs" in hang.problem
    assert "crashes" in crash.problem
    assert (good.problem, good.frames) == (None, 24)
    assert "hangs" in again.problem


def misbehave(connection, least_frames):
    import os
    import time

    connection.send(None)
    while True:
        path = connection.recv()
        if path.name == "hang.mp4":
            time.sleep(60)
        if path.name == "crash.mp4":
            os.abort()
        connection.send(vet.look_at(path, least_frames))


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "a.txt").write_text("a")
    config = TrainConfig(video_folder=str(tmp_path), output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match="no video of"):
        vet.check_data(read_records(None, str(tmp_path)), config)
