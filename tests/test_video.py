"""Files: the right colours, the right length, never over another."""

import json

import numpy as np
import pytest
from PIL import Image, ImageSequence

from anidiff_jax.shapes.render import Scene, render
from anidiff_jax.sheets import contact_sheet, grid_gif
from anidiff_jax.video import free_path, save_gif, to_uint8


def test_gif_keeps_colours_length_and_settings(tmp_path):
    frames = render(Scene("circle", "blue", "white", size=0.2, velocity=(0.0, -0.02)), 16, 64)
    save_gif(frames / 255.0, tmp_path / "a.gif", 8, {"prompt": "ein Kreis, größer", "seed": 3})
    image = Image.open(tmp_path / "a.gif")
    assert json.loads(image.info["comment"]) == {"prompt": "ein Kreis, größer", "seed": 3}
    durations = [page.info["duration"] for page in ImageSequence.Iterator(image)]
    assert len(durations) == 16
    assert sum(durations) == 2000
    shown = np.stack([np.asarray(page.convert("RGB")) for page in ImageSequence.Iterator(image)])
    assert np.abs(shown.astype(int) - frames).mean() < 1
    still = np.repeat(frames[:1], 4, 0)
    save_gif(still, tmp_path / "still.gif")
    pages = [np.asarray(p.convert("RGB")) for p in ImageSequence.Iterator(Image.open(tmp_path / "still.gif"))]
    assert all((page == pages[0]).all() for page in pages)  # nothing flickers


def test_files_are_never_replaced(tmp_path):
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    first = free_path(tmp_path, "A cat, / and: a dog?", 7)
    assert first.name == "a-cat-and-a-dog-seed7.gif"
    save_gif(frames, first)
    assert free_path(tmp_path, "A cat, / and: a dog?", 7).name == "a-cat-and-a-dog-seed7-2.gif"
    with pytest.raises(FileExistsError):
        save_gif(frames, first)
    assert [p.name for p in tmp_path.iterdir()] == [first.name]


def test_rounding_not_truncation():
    np.testing.assert_array_equal(to_uint8(np.array([[[[0.0, 0.999, 1.2]]]])), [[[[0, 255, 255]]]])


def test_sheet_and_grid_show_every_video(tmp_path):
    videos = np.zeros((3, 5, 16, 16, 3), np.uint8)
    videos[0, :, ..., 0] = videos[1, :, ..., 1] = videos[2, :, ..., 2] = 255
    videos[:, np.arange(5), 0, np.arange(5)] = 128  # equal frames would become one
    contact_sheet(videos, ["red", "grün", "blue " * 50], tmp_path / "sheet.png", most_frames=4)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    height = len(sheet) // 3
    for i in range(3):
        row = sheet[i * height : (i + 1) * height]
        assert ((row == videos[i, 0, 9, 9]).all(-1)).sum() == 4 * (16 * 16 - 1)
    grid_gif(videos, tmp_path / "grid.gif", columns=2)
    gif = Image.open(tmp_path / "grid.gif")
    assert gif.n_frames == 5
    assert gif.size == (2 * 18, 2 * 18)
    picture = np.asarray(gif.convert("RGB"))
    assert [tuple(picture[y, x]) for y, x in ((10, 10), (10, 28), (28, 10), (28, 28))] == [
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
    ]  # fmt: skip
    grid_gif(videos, tmp_path / "grid.gif")  # may be written again
