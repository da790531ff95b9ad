"""What sampling leaves: each format holds the frames and what they were made with, and no file takes another's place."""

import json
import subprocess

import imageio.v3 as iio
import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageSequence

from anidiff_jax import outputs
from anidiff_jax.config import SampleConfig
from anidiff_jax.errors import UserError
from anidiff_jax.outputs import SUFFIXES, prepare, save_grid, save_video, settings_of
from anidiff_jax.video import save_frames, save_mp4, save_webp

RECORD = {"prompt": "größer; a=b # 'c' \"d\" \\ 猫\nnew", "seed": 3, "guidance_scale": 7.5, "lora": ["a:0.5"], "hashes": {"unet": "ab"}}


def smooth(frames=6, height=32, width=48) -> np.ndarray:
    """A slow gradient that changes from frame to frame, uint8."""
    t, y, x = np.mgrid[:frames, :height, :width]
    return np.stack([60 + 3 * x, 60 + 4 * y, 60 + 20 * t + x], -1).astype(np.uint8)


def pages(path):
    return [(np.asarray(page.convert("RGB")), page.info["duration"]) for page in ImageSequence.Iterator(Image.open(path))]


def blocks(frames) -> np.ndarray:
    """Means of eight by eight pixels."""
    f, h, w, _ = frames.shape
    return frames.reshape(f, h // 8, 8, w // 8, 8, 3).mean((2, 4))


@pytest.fixture
def config(tmp_path):
    """config(name=value, …) of sample.py that writes into the test's folder"""
    return lambda **changes: SampleConfig(output_path=str(tmp_path / "out"), **changes)


def test_every_format_as_the_arguments_say(config, tmp_path):
    frames = smooth()
    most = config(output_format=["gif", "mp4", "webp", "png", "sheet", "gif"], fps=12.5, gif_loop=3, webp_quality=100, mp4_crf=8)
    prepare(most)
    paths = save_video(frames, most, RECORD)
    stem = "größer-a-b-c-d-猫-new-seed3"
    assert [path.name for path in paths] == [stem + SUFFIXES[kind] for kind in ("gif", "mp4", "webp", "png", "sheet")]
    assert {path.name for path in paths} | {f"{stem}.json"} == {path.name for path in (tmp_path / "out").iterdir()}
    gif, mp4, webp, folder, sheet = paths

    shown = pages(gif)
    assert sum(duration for _, duration in shown) == 480
    assert np.abs(np.stack([page for page, _ in shown]).astype(int) - frames).mean() < 8  # thousands of colours in 256
    assert Image.open(gif).info["loop"] == 2  # plays once, and twice again
    np.testing.assert_array_equal(np.stack([page for page, _ in pages(webp)]), frames)
    assert [duration for _, duration in pages(webp)] == [80] * 6
    assert Image.open(webp).info["loop"] == 3
    assert iio.immeta(mp4)["fps"] == 12.5
    assert np.abs(iio.imread(mp4).astype(int) - frames).max() <= 6
    np.testing.assert_array_equal([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())], frames)
    assert Image.open(sheet).size[0] == 6 * 50

    plain = config(output_format=["gif", "mp4", "webp"], gif_dither="none", gif_loop=1, webp_quality=20, mp4_crf=40)
    worse = save_video(frames, plain, RECORD)
    assert [path.name for path in worse] == [f"{stem}-2{suffix}" for suffix in (".gif", ".mp4", ".webp")]
    assert "loop" not in Image.open(worse[0]).info
    assert worse[0].read_bytes() != gif.read_bytes()
    still = save_video(frames, config(gif_dither="none"), RECORD)[0]
    off = [np.abs(blocks(np.stack([page for page, _ in pages(path)])) - blocks(frames)).mean() for path in (gif, still)]
    assert off[0] < 0.7 * off[1]  # dots, whose colours are right from afar
    assert worse[1].stat().st_size < mp4.stat().st_size
    assert worse[2].stat().st_size < webp.stat().st_size


def test_settings_come_back_out_of_every_file(config, tmp_path):
    every = config(output_format=["gif", "mp4", "webp", "png", "sheet"])
    paths = save_video(smooth(3), every, RECORD)
    paths += save_grid([smooth(3)] * 2, ["a", "b"], 2, "grid-a", every, RECORD)
    beside = sorted((tmp_path / "out").glob("*.json"))
    assert len(beside) == 2
    frame = next(path for path in paths if path.is_dir()) / "0001.png"
    for path in [*paths, *beside, frame]:
        assert settings_of(path) == RECORD, path
    renamed = paths[1].rename(tmp_path / "a.gif")  # it is looked into, whatever it is called
    assert settings_of(renamed) == RECORD


def test_settings_of_any_length_come_back_out_of_a_video(tmp_path):
    """A word of a command line may be 128 KB at most."""
    settings = {"prompt": "a = b; # c \\ d 'e' \"f\" 海" * 8000, "seed": 3}
    save_mp4(np.zeros((2, 16, 16, 3)), tmp_path / "a.mp4", settings=settings)
    assert settings_of(tmp_path / "a.mp4") == settings


def test_files_without_settings_are_told(tmp_path):
    save_mp4(smooth(2), tmp_path / "a.mp4")
    save_webp(smooth(2), tmp_path / "a.webp")
    save_frames(smooth(2), tmp_path / "frames")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.gif", comment="made by hand")
    (tmp_path / "a.json").write_text('{"seed": 3}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.webp").write_bytes((tmp_path / "a.webp").read_bytes()[:40])
    for name in ("a.mp4", "a.webp", "frames", "a.gif", "a.json", "broken.webp"):
        with pytest.raises(UserError, match="holds no settings of a video"):
            settings_of(tmp_path / name)
    for name in ("none.gif", "empty"):
        with pytest.raises(UserError, match=f"{name} is no file"):
            settings_of(tmp_path / name)


def test_mp4_is_what_every_player_knows(tmp_path):
    """H.264 in yuv420p, an odd size made even, and a frame rate that is no round number."""
    frames = smooth(5, 31, 45)
    save_mp4(frames, tmp_path / "a.mp4", fps=24000 / 1001)
    said = subprocess.run([get_ffmpeg_exe(), "-i", tmp_path / "a.mp4"], capture_output=True, text=True).stderr
    assert "h264" in said
    assert "yuv420p(tv, smpte170m" in said
    assert "46x32" in said
    assert "23.98 fps" in said
    read = iio.imread(tmp_path / "a.mp4").astype(int)
    assert read.shape == (5, 32, 46, 3)
    assert np.abs(read[:, :31, :45] - frames).max() <= 8
    red = np.broadcast_to(np.uint8([200, 30, 30]), (3, 32, 32, 3))
    save_mp4(red, tmp_path / "red.mp4")
    assert np.abs(iio.imread(tmp_path / "red.mp4").astype(int) - red).max() <= 3


def test_nothing_is_written_over(config, tmp_path, monkeypatch):
    every = config(output_format=["gif", "png"])
    folder = prepare(every)
    first = save_video(smooth(2), every, {"prompt": "a", "seed": 1})
    (folder / "a-seed1-2-frames").mkdir()  # only one of the names is taken
    (folder / "a-seed1-3.json").symlink_to("nowhere")
    assert [path.name for path in save_video(smooth(3), every, {"prompt": "a", "seed": 1})] == ["a-seed1-4.gif", "a-seed1-4-frames"]
    assert len(pages(first[0])) == 2
    for writer in (save_mp4, save_webp):
        with pytest.raises(FileExistsError):
            writer(smooth(2), first[0])
    with pytest.raises(FileExistsError):
        save_frames(smooth(2), first[1])

    free = outputs.free_name
    names = iter(["a-seed1", free(folder, "b", [".json"])])  # another process was faster with the first
    monkeypatch.setattr(outputs, "free_name", lambda *_: next(names))
    assert save_video(smooth(2), config(), {"prompt": "a", "seed": 1})[0].name == "b.gif"


def test_what_goes_wrong_leaves_nothing_half(config, tmp_path, monkeypatch):
    folder = prepare(config())
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: "false")
    with pytest.raises(UserError, match=r"a-seed1.mp4 could not be written: ffmpeg says"):
        save_video(smooth(2), config(output_format=["mp4"]), {"prompt": "a", "seed": 1})
    assert list(folder.iterdir()) == []

    def none():
        raise RuntimeError("No ffmpeg exe could be found.\nInstall ffmpeg")

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", none)
    with pytest.raises(UserError, match="mp4 needs ffmpeg, which is not here"):
        prepare(config(output_format=["mp4"]))
    prepare(config())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fps": 60.0}, "at most 50, the fastest that viewers play a GIF"),
        ({"mp4_crf": 52}, "mp4_crf 52 must be between 0 and 51"),
        ({"webp_quality": -1}, "webp_quality -1 must be between 0 and 100"),
        ({"gif_loop": -1}, "gif_loop -1 must be between 0"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt 0 must be at least 1"),
        ({"num_videos_per_prompt": 2, "seed": 2**32 - 1}, r"must be at most 2\*\*32"),
    ],
)
def test_mistakes_are_told(changes, words):
    with pytest.raises(UserError, match=words):
        SampleConfig(**changes)
    assert SampleConfig(fps=60.0, output_format=["mp4"]).fps == 60


def test_the_json_is_for_people_too(config, tmp_path):
    save_video(smooth(2), config(), {"prompt": "größer", "seed": 1})
    assert (tmp_path / "out" / "größer-seed1.json").read_text("utf-8") == json.dumps(
        {"prompt": "größer", "seed": 1}, indent=2, ensure_ascii=False
    ) + "\n"
