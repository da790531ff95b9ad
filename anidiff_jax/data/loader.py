"""Records → an endless stream of batches, read ahead by threads; every clip a function of the seed and its place in the stream."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from anidiff_jax.config import TrainConfig
from anidiff_jax.data.decode import BadVideo, fit, read_clip, window
from anidiff_jax.data.records import Records
from anidiff_jax.errors import UserError

log = logging.getLogger(__name__)


class Videos:
    """A source of clips: a window of each video as it is read from its file."""

    def __init__(self, records: Records, config: TrainConfig, tokenize: Callable[[str], np.ndarray]):
        self.records, self.config, self.tokenize = records, config, tokenize
        self._lock = threading.Lock()  # one tokenizer, many threads

    def __call__(self, row: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """pixels uint8 (f, H, W, 3) and ids (tokens,); BadVideo where there are none."""
        c = self.config
        frames = read_clip(self.records.folder / self.records.names[row], lambda n: window(n, c.sample_n_frames, c.sample_stride, rng))
        frames = fit(frames, c.height, c.width)
        if c.random_flip and rng.random() < 0.5:
            frames = frames[:, :, ::-1]
        caption = "" if rng.random() < c.text_dropout_rate else self.records.captions[row]
        with self._lock:
            ids = self.tokenize(caption)
        return {"pixels": np.ascontiguousarray(frames), "ids": ids}


class Clips:
    """Turns places in the stream into clips of a source (Videos, or a LatentCache); remembers the videos it cannot use, and
    says so once for each."""

    def __init__(self, records: Records, seed: int, source: Callable[[int, np.random.Generator], dict[str, np.ndarray]]):
        self.records, self.seed, self.source = records, seed, source
        self.skipped: dict[int, str] = {}  # row → why
        self._lock = threading.Lock()

    def __call__(self, index: int, row: int) -> dict[str, Any]:
        """What the source gives for place `index` of the stream, and index and row.

        Where the video of `row` cannot be used, that of another row takes its place, which one follows from the seed and
        the place alone. So the stream is a function of the seed and the place, whatever was met before.
        """
        if clip := self._read(index, row):
            return clip
        count = len(self.records)
        other = int(np.random.default_rng((self.seed, index, 1)).integers(count))
        for step in range(count):
            if clip := self._read(index, (other + step) % count):
                return clip
        raise UserError(f"no video of {self.records.folder} can be used; {self.records.names[row]}, for one: {self.skipped[row]}")

    def _read(self, index: int, row: int) -> dict[str, Any] | None:
        if row in self.skipped:
            return None
        try:
            clip = self.source(row, np.random.default_rng((self.seed, index)))
        except BadVideo as bad:
            with self._lock:
                if row not in self.skipped:
                    self.skipped[row] = str(bad)
                    log.warning("left out %s: %s", self.records.names[row], bad)
            return None
        return {**clip, "index": np.uint32(index), "row": np.int32(row)}


def batches(
    clips: Clips, size: int, threads: int = 1, first: int = 0, process: int = 0, processes: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of every update's `size` clips, endlessly, from update `first` (0 is the first) on.

    The rows are shuffled anew in every pass over them. What an update sees follows from the seed and its number.
    """
    mine = size // processes
    rows = grain.MapDataset.range(len(clips.records)).shuffle(seed=clips.seed).repeat()

    def clip(place: int):  # among this process's own
        index = place // mine * size + process * mine + place % mine
        return clips(index, int(rows[index]))

    stream = grain.MapDataset.range(first * mine, sys.maxsize).map(clip)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=mine + threads)
    return iter(stream.to_iter_dataset(options).batch(mine, drop_remainder=True))


class Timed:
    """An iterator that knows how many seconds it let its user wait."""

    def __init__(self, stream: Iterator):
        self.stream, self.seconds = stream, 0.0

    def __iter__(self):
        return self

    def __next__(self):
        start = time.perf_counter()
        item = next(self.stream)
        self.seconds += time.perf_counter() - start
        return item
