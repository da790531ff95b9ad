"""A csv, or a folder with a caption beside each video → paths and captions."""

import csv
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from anidiff_jax.data.strings import Strings
from anidiff_jax.errors import UserError, read_text

log = logging.getLogger(__name__)

VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi")


@dataclass(frozen=True)
class Records:
    """Row i is the video `folder / names[i]` with the caption `captions[i]`."""

    folder: Path
    names: Sequence[str]
    captions: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    @cached_property  # of millions it takes seconds
    def hash(self) -> str:
        """Of all names and captions, in hex."""
        rows = hashlib.sha256()
        for name, caption in zip(self.names, self.captions, strict=True):
            rows.update(f"{name}\0{caption}\0".encode())
        return rows.hexdigest()

    def drawn(self, count: int | None, seed: int) -> "Records":
        """`count` rows drawn by the seed, in their order; all where there are no more."""
        if count is None or count >= len(self):
            if count is not None and count > len(self):
                log.warning("dataset_sample_size %d is more than the %d usable rows: all are taken", count, len(self))
            return self
        return self._rows(np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False)))

    def parted(self, fraction: float, seed: int) -> tuple["Records", "Records"]:
        """(the rest, a share of the rows drawn by the seed): at least one row in each."""
        if len(self) < 2:
            raise UserError(f"validation_fraction {fraction}: {len(self)} row cannot be parted; give more clips, or a --validation_csv")
        count = min(max(1, round(fraction * len(self))), len(self) - 1)
        mixed = np.random.default_rng((seed, 2)).permutation(len(self))
        return self._rows(np.sort(mixed[count:])), self._rows(np.sort(mixed[:count]))

    def _rows(self, rows: Iterable[int]) -> "Records":
        names, captions = Strings(), Strings()
        for i in rows:
            names.append(self.names[i])
            captions.append(self.captions[i])
        return Records(self.folder, names, captions)


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
    listed = {entry.name for entry in os.scandir(folder)}  # one listing, however many rows
    present = {name for name in listed if name.isascii() or _is_unicode(name)}
    if strange := sorted(listed - present):
        log.warning("%d names in %s are not in UTF-8 and are left out, the first: %r", len(strange), folder, strange[0])
    names, captions = Strings(), Strings()
    rows, missing, first_missing = 0, 0, ""
    for name, caption in _from_captions(folder, present) if csv_path is None else _from_csv(Path(csv_path).expanduser()):
        rows += 1
        if name in present:
            names.append(name)
            captions.append(caption)
        else:
            missing, first_missing = missing + 1, first_missing or name
    where = csv_path or folder
    if not names:
        reason = f"none of its {rows} videos lies in {folder} (the first: {first_missing})" if missing else "it has no rows"
        raise UserError(f"{where} gives no usable clip: {reason}")
    if missing:
        log.warning("%d of %d rows of %s have no file in %s, the first: %s", missing, rows, where, folder, first_missing)
    return Records(folder, names, captions)


def _name_of(url: str) -> str:
    """The file's name at the end of a URL or a path, of Windows too."""
    return url.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def _is_unicode(name: str) -> bool:
    """False for a file name of other bytes, which Python holds with half characters."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _from_csv(path: Path) -> Iterator[tuple[str, str]]:
    """(file name, caption) of each row, read as they are asked for: the csv may have millions."""
    if not path.is_file():
        raise UserError(f"csv_path {path} does not exist")
    line = 1  # where the row begins that is being read
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)  # else a stray quote would take all that follows into one caption
            columns = next(reader, [])
            file_column = next((name for name in ("contentUrl", "videoid") if name in columns), None)
            if "name" not in columns or file_column is None:
                found = ",".join(columns)[:80]
                raise UserError(f"csv_path {path}: its first line must name the columns name,contentUrl (or videoid,name); it is {found!r}")
            caption_at, file_at = columns.index("name"), columns.index(file_column)
            rows = lacking = 0
            line = reader.line_num + 1
            for row in reader:
                line = reader.line_num + 1
                if not row:
                    continue
                rows += 1
                if len(row) <= max(caption_at, file_at) or not row[file_at]:
                    lacking += 1
                    continue
                yield _name_of(row[file_at]) if file_column == "contentUrl" else f"{row[file_at]}.mp4", row[caption_at]
            if lacking:
                log.warning("%d of %d rows of %s lack name or %s", lacking, rows, path, file_column)
    except UnicodeDecodeError as error:
        raise UserError(f"csv_path {path} cannot be read as csv in UTF-8: {error}") from None
    except csv.Error as error:
        raise UserError(
            f"csv_path {path}, line {line} cannot be read as csv ({error}): a quote inside a quoted caption is written twice"
        ) from None


def _from_captions(folder: Path, present: set[str]) -> list[tuple[str, str]]:
    videos = sorted(name for name in present if name.lower().endswith(VIDEOS))
    captioned = [(name, Path(name).with_suffix(".txt").name) for name in videos]
    bare = [name for name, text in captioned if text not in present]
    if bare and len(bare) == len(videos):
        raise UserError(f"video_folder {folder}: no video has a .txt caption beside it; write them, or give --csv_path")
    if bare:
        log.warning("%d of %d videos in %s have no .txt caption, the first: %s", len(bare), len(videos), folder, bare[0])
    return [(name, read_text(folder / text).strip()) for name, text in captioned if text in present]
