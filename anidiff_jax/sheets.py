"""Many videos in one picture: a contact sheet (PNG, a row of frames a video) and a grid (all of them at once: GIF, or PNG of a frame)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from anidiff_jax.video import save_gif, save_png, to_uint8

LABEL = 14  # pixels above a row of a contact sheet
GAP = 2
MOST_LINES = 8  # of text above a tile of a grid


def contact_sheet(
    videos, labels: Sequence[str], path: Path, most_frames: int = 8, settings: Mapping[str, Any] | None = None, replace: bool = True
) -> None:
    """Writes videos, each (frames, h, w, 3), as rows of at most `most_frames` evenly chosen frames under their labels."""
    rows = [to_uint8(v)[np.linspace(0, len(v) - 1, min(most_frames, len(v))).round().astype(int)] for v in videos]
    h, w = rows[0].shape[1:3]
    width = max(len(row) for row in rows) * (w + GAP)
    sheet = Image.new("RGB", (width, len(rows) * (h + LABEL + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = i * (h + LABEL + GAP)
        draw.text((1, top + 1), _fitting(label, width - 2, font), fill="black", font=font)
        for j, frame in enumerate(row):
            sheet.paste(Image.fromarray(frame), (j * (w + GAP), top + LABEL))
    save_png(sheet, path, settings, replace)


def grid_gif(
    videos,
    path: Path,
    fps: float = 8,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    replace: bool = True,
    **how: Any,
) -> None:
    """Writes videos of one shape, each (frames, h, w, 3), side by side as one GIF; how: as `save_gif` takes it."""
    save_gif(side_by_side(videos, columns, labels), path, fps, settings, replace, **how)


def grid_png(
    videos,
    path: Path,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    replace: bool = True,
) -> None:
    """Writes the middle frames of videos of one shape, each (frames, h, w, 3), side by side."""
    middle = [video[len(video) // 2][None] for video in videos]
    save_png(Image.fromarray(side_by_side(middle, columns, labels)[0]), path, settings, replace)


def side_by_side(videos, columns: int | None = None, labels: Sequence[str] | None = None) -> np.ndarray:
    """Videos of one shape, each (frames, h, w, 3), row after row and each under its label → one, (frames, H, W, 3) uint8.

    columns: how many stand in a row; None makes about a square.
    """
    tiles = np.stack([to_uint8(v) for v in videos])
    if labels is not None:
        heads = _heads(labels, tiles.shape[3])
        tiles = np.concatenate([np.broadcast_to(heads[:, None], (*tiles.shape[:2], *heads.shape[1:])), tiles], 2)
    tiles = np.pad(tiles, ((0, 0), (0, 0), (GAP, 0), (GAP, 0), (0, 0)), constant_values=255)
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    blank = np.full_like(tiles[:1], 255)
    tiles = np.concatenate([tiles, *[blank] * (-len(tiles) % columns)])
    n, f, h, w, _ = tiles.shape
    picture = tiles.reshape(n // columns, columns, f, h, w, 3).transpose(2, 0, 3, 1, 4, 5)  # (r c) f h w 3 -> f r h c w 3
    return picture.reshape(f, n // columns * h, columns * w, 3)


def _heads(labels: Sequence[str], width: int) -> np.ndarray:
    """(labels, h, width, 3) uint8: each label in as many lines as it takes, all as high as the highest."""
    font = ImageFont.load_default(size=min(max(9, width // 20), 20))  # in pixels
    texts = [[line for part in label.split("\n") for line in _wrapped(part, width - 2, font)][:MOST_LINES] for label in labels]
    line_height = math.ceil(sum(font.getmetrics())) if isinstance(font, ImageFont.FreeTypeFont) else LABEL - 2
    heads = []
    for lines in texts:
        head = Image.new("RGB", (width, line_height * max(map(len, texts)) + 2 * GAP), "white")
        for i, line in enumerate(lines):
            ImageDraw.Draw(head).text((1, i * line_height + GAP), line, fill="black", font=font)
        heads.append(np.asarray(head))
    return np.stack(heads)


def _wrapped(text: str, width: int, font) -> list[str]:
    """Text in lines that are no wider than so many pixels, parted between words; a word that is wider is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _fitting(longer, width, font) == _printable(longer):
            lines[-1] = longer
        else:
            lines.append(word)
    return [_fitting(line, width, font) for line in lines if line]


def _fitting(label: str, width: int, font) -> str:
    """As much of a label as is no wider than so many pixels."""
    label = _printable(label)[: max(0, width)]  # no letter is narrower than a pixel
    while label and font.getlength(label) > width:
        label = label[:-1]
    return label


def _printable(label: str) -> str:
    return label.encode("latin-1", "replace").decode("latin-1")  # the built-in font knows no more
