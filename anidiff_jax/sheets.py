"""Many videos in one picture: a contact sheet (PNG, a row of frames a video) and a grid (GIF, all of them moving at once)."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from anidiff_jax.video import save_gif, to_uint8, written_aside

LABEL = 14  # pixels above a row
GAP = 2


def contact_sheet(videos, labels: Sequence[str], path: Path, most_frames: int = 8) -> None:
    """Writes videos, each (frames, h, w, 3), as rows of at most `most_frames` evenly chosen frames under their labels; overwrites."""
    rows = [to_uint8(v)[np.linspace(0, len(v) - 1, min(most_frames, len(v))).round().astype(int)] for v in videos]
    h, w = rows[0].shape[1:3]
    width = max(len(row) for row in rows) * (w + GAP)
    sheet = Image.new("RGB", (width, len(rows) * (h + LABEL + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = i * (h + LABEL + GAP)
        draw.text((1, top + 1), _fitting(label, width - 2, draw, font), fill="black", font=font)
        for j, frame in enumerate(row):
            sheet.paste(Image.fromarray(frame), (j * (w + GAP), top + LABEL))
    with written_aside(path, replace=True) as part:
        sheet.save(part, "PNG")


def grid_gif(videos, path: Path, fps: float = 8, columns: int | None = None) -> None:
    """Writes videos of one shape, each (frames, h, w, 3), side by side as one GIF; overwrites."""
    tiles = np.pad(np.stack([to_uint8(v) for v in videos]), ((0, 0), (0, 0), (GAP, 0), (GAP, 0), (0, 0)), constant_values=255)
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    blank = np.full_like(tiles[:1], 255)
    tiles = np.concatenate([tiles, *[blank] * (-len(tiles) % columns)])
    n, f, h, w, _ = tiles.shape
    picture = tiles.reshape(n // columns, columns, f, h, w, 3).transpose(2, 0, 3, 1, 4, 5)  # (r c) f h w 3 -> f r h c w 3
    save_gif(picture.reshape(f, n // columns * h, columns * w, 3), path, fps, replace=True)


def _fitting(label: str, width: int, draw: ImageDraw.ImageDraw, font) -> str:
    label = label.encode("latin-1", "replace").decode("latin-1")  # the built-in font knows no more
    while label and draw.textlength(label, font=font) > width:
        label = label[:-1]
    return label
