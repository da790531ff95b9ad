"""What a video starts from besides noise: another video, a picture, and a mask of what is painted anew.

All are treated as training treats clips: the largest central part that has the asked shape is cut out and resized to it. Of a video,
frames are taken from its first one on, `stride` apart. A place of the latents is painted anew where at least half of its pixels in the
mask are white.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from anidiff_jax.data.decode import BadVideo, fit, read_clip
from anidiff_jax.errors import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")  # that Pillow reads, moving ones too


def video_of(name: str, given: Any, num_frames: int, height: int, width: int, stride: int = 1) -> np.ndarray:
    """The frames of an init_video → uint8 (f, height, width, 3). given: a path, or (n, h, w, 3). name: of the argument, for errors."""
    places = np.arange(num_frames) * stride

    def choose(length: int) -> np.ndarray:
        if places[-1] >= length:
            apart = "" if stride == 1 else f", {stride} apart,"
            raise UserError(
                f"{name} has {length} frames, and {num_frames} frames{apart} need {places[-1] + 1}: ask for fewer frames, or nearer ones"
            )
        return places

    if not isinstance(given, str | Path):
        frames = _as_uint8(name, given, 4)
        return fit(frames[choose(len(frames))], height, width)
    path = Path(given).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        return np.concatenate([fit(_pictures(name, files[i], lambda n: np.arange(1)), height, width) for i in choose(len(files))])
    if not path.is_file():
        raise UserError(f"{name} {path} does not exist: give a video, or a folder of pictures")
    if path.suffix.lower() in PICTURES:
        return fit(_pictures(name, path, choose), height, width)
    try:
        return fit(read_clip(path, choose), height, width)
    except BadVideo as error:
        raise UserError(f"{name} {path} cannot be used: {error}") from None


def picture_of(name: str, given: Any, num_frames: int, height: int, width: int) -> np.ndarray:
    """An init_image, as often as there are frames → uint8 (f, height, width, 3). given: a path, or (h, w, 3)."""
    if isinstance(given, str | Path):
        path = Path(given).expanduser()
        if not path.is_file():
            raise UserError(f"{name} {path} does not exist: give a picture")
        picture = _pictures(name, path, lambda n: np.arange(1))
    else:
        picture = _as_uint8(name, given, 3)[None]
    return np.repeat(fit(picture, height, width), num_frames, axis=0)


def mask_of(given: Any, num_frames: int, height: int, width: int, stride: int, side: int) -> np.ndarray:
    """A mask_video → float32 (f, height / side, width / side, 1), 1 where it is painted anew. given: a path, (f, h, w), or (h, w)."""
    name = "mask_video"
    if isinstance(given, str | Path):
        path = Path(given).expanduser()
        still = path.suffix.lower() in PICTURES and path.is_file() and _length(name, path) == 1
        read = picture_of(name, path, num_frames, height, width) if still else video_of(name, path, num_frames, height, width, stride)
    else:
        grey = np.asarray(given)
        if grey.dtype == np.uint8 and grey.max(initial=0) <= 1:
            grey = grey * np.uint8(255)  # zeros and ones
        if grey.ndim not in (2, 3) or grey.shape[-1] == 3:
            raise UserError(f"{name} has shape {grey.shape}: give (frames, height, width), or (height, width)")
        coloured = np.repeat(grey[..., None], 3, axis=-1)
        how = (name, coloured, num_frames, height, width)
        read = picture_of(*how) if grey.ndim == 2 else video_of(*how, stride)
    white = read.astype(np.float32).mean(-1) >= 127.5
    parts = white.reshape(num_frames, height // side, side, width // side, side)  # f (h side) (w side) -> f h side w side
    return (parts.mean((2, 4)) >= 0.5).astype(np.float32)[..., None]


def _as_rgb(page: Image.Image) -> np.ndarray:
    """uint8 (h, w, 3): turned as its camera says, what is transparent black, 16 bits brought to 8."""
    page = ImageOps.exif_transpose(page)
    if page.mode.startswith("I"):
        grey = np.asarray(page, np.float32)
        page = Image.fromarray(np.clip(grey / (257 if grey.max() > 255 else 1), 0, 255).round().astype(np.uint8))
    if page.has_transparency_data:
        clear = page.convert("RGBA")
        page = Image.alpha_composite(Image.new("RGBA", clear.size, (0, 0, 0, 255)), clear)
    return np.asarray(page.convert("RGB"))


def hash_of(given: str | Path) -> str:
    """Of a file, or of all files in a folder and their names: by which a video that was made from it can be made again."""
    path, digest = Path(given).expanduser(), hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.name.encode() if path.is_dir() else b"")
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def _as_uint8(name: str, given: Any, axes: int) -> np.ndarray:
    array = np.asarray(given)
    if array.ndim != axes or array.shape[-1] != 3 or 0 in array.shape:
        wanted = "(frames, height, width, 3)" if axes == 4 else "(height, width, 3)"
        raise UserError(f"{name} has shape {array.shape}: give {wanted}")
    if array.dtype == np.uint8:
        return array
    return np.round(np.clip(array.astype(np.float32), 0, 1) * 255).astype(np.uint8)


def _length(name: str, path: Path) -> int:
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1)
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{name} {path} cannot be read: {str(error).splitlines()[0]}") from None


def _pictures(name: str, path: Path, choose) -> np.ndarray:
    """Frames of a picture that may move, uint8 (f, h, w, 3)."""
    chosen = list(choose(_length(name, path)))
    try:
        with Image.open(path) as image:
            kept = {i: _as_rgb(page) for i, page in enumerate(ImageSequence.Iterator(image)) if i in chosen}
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's kinds for damage
        raise UserError(f"{name} {path} cannot be read: {str(error).splitlines()[0]}") from None
    return np.stack([kept[i] for i in chosen])
