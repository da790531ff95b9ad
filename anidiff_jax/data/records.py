"""A csv, or a folder with a caption beside each video → paths and captions."""

import csv
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anidiff_jax.errors import UserError, read_text

log = logging.getLogger(__name__)

VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi")


@dataclass(frozen=True)
class Records:
    """Row i is the video `folder / names[i]` with the caption `captions[i]`."""

    folder: Path
    names: list[str]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def drawn(self, count: int | None, seed: int) -> "Records":
        """`count` rows drawn by the seed, in their order; all where there are no more."""
        if count is None or count >= len(self):
            if count is not None and count > len(self):
                log.warning("dataset_sample_size %d is more than the %d usable rows: all are taken", count, len(self))
            return self
        rows = sorted(np.random.default_rng(seed).choice(len(self), count, replace=False))
        return Records(self.folder, [self.names[i] for i in rows], [self.captions[i] for i in rows])


def read_records(csv_path: str | None, video_folder: str | None) -> Records:
    """The usable rows of a csv (`name,contentUrl` or `videoid,name`), or the captioned videos of a folder.

    Rows whose file is not in the folder are counted and named in the log. No usable row at all is a UserError, as is a
    csv without the columns.
    """
    if video_folder is None:
        raise UserError("no training data: give --video_folder, and --csv_path or a .txt caption beside each video")
    folder = Path(video_folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"video_folder {folder} is not a folder")
    present = {entry.name for entry in os.scandir(folder)}  # one listing, however many rows
    rows = _from_captions(folder, present) if csv_path is None else _from_csv(Path(csv_path).expanduser())
    usable = [(name, caption) for name, caption in rows if name in present]
    missing = [name for name, _ in rows if name not in present]
    where = csv_path or folder
    if not usable:
        reason = f"none of its {len(rows)} videos lies in {folder} (the first: {missing[0]})" if missing else "it has no rows"
        raise UserError(f"{where} gives no usable clip: {reason}")
    if missing:
        log.warning("%d of %d rows of %s have no file in %s, the first: %s", len(missing), len(rows), where, folder, missing[0])
    return Records(folder, [name for name, _ in usable], [caption for _, caption in usable])


def _from_csv(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise UserError(f"csv_path {path} does not exist")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = set(reader.fieldnames or ())
            if {"name", "contentUrl"} <= columns:
                used, row_of = ("name", "contentUrl"), lambda row: (row["contentUrl"].rstrip("/").rsplit("/", 1)[-1], row["name"])
            elif {"name", "videoid"} <= columns:
                used, row_of = ("name", "videoid"), lambda row: (f"{row['videoid']}.mp4", row["name"])
            else:
                found = ",".join(reader.fieldnames or ())[:80]
                raise UserError(f"csv_path {path}: its first line must name the columns name,contentUrl (or videoid,name); it is {found!r}")
            rows = list(reader)
            whole = [row_of(row) for row in rows if row[used[0]] is not None and row[used[1]]]
            if len(whole) < len(rows):
                log.warning("%d of %d rows of %s lack %s or %s", len(rows) - len(whole), len(rows), path, *used)
            return whole
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"csv_path {path} cannot be read as csv in UTF-8: {error}") from None


def _from_captions(folder: Path, present: set[str]) -> list[tuple[str, str]]:
    videos = sorted(name for name in present if name.lower().endswith(VIDEOS))
    captioned = [(name, Path(name).with_suffix(".txt").name) for name in videos]
    bare = [name for name, text in captioned if text not in present]
    if bare and len(bare) == len(videos):
        raise UserError(f"video_folder {folder}: no video has a .txt caption beside it; write them, or give --csv_path")
    if bare:
        log.warning("%d of %d videos in %s have no .txt caption, the first: %s", len(bare), len(videos), folder, bare[0])
    return [(name, read_text(folder / text).strip()) for name, text in captioned if text in present]
