"""Records → an endless stream of batches, read ahead by threads; every clip a function of the seed and its place in the stream."""

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from anidiff_jax.config import TrainConfig
from anidiff_jax.data.decode import BadVideo, read_clip, square, window
from anidiff_jax.data.records import Records
from anidiff_jax.errors import UserError

log = logging.getLogger(__name__)


class Clips:
    """Turns row numbers into clips; remembers the videos it had to leave out, and says so once for each."""

    def __init__(self, records: Records, config: TrainConfig, tokenize: Callable[[str], np.ndarray]):
        self.records, self.config, self.tokenize = records, config, tokenize
        self.skipped: dict[int, str] = {}  # row → why
        self._lock = threading.Lock()  # one tokenizer, one count, many threads

    def __call__(self, index: int, row: int) -> dict[str, Any] | None:
        """Clip at place `index` of the stream: pixels uint8 (f, side, side, 3), ids (tokens,), index; None for a bad video."""
        if row in self.skipped:
            return None
        c = self.config
        rng = np.random.default_rng((c.seed, index))
        name, caption = self.records.names[row], self.records.captions[row]
        try:
            frames = read_clip(self.records.folder / name, lambda n: window(n, c.sample_n_frames, c.sample_stride, rng))
        except BadVideo as bad:
            self._skip(row, name, str(bad))
            return None
        frames = square(frames, c.sample_size)
        if c.random_flip and rng.random() < 0.5:
            frames = frames[:, :, ::-1]
        if rng.random() < c.text_dropout_rate:
            caption = ""
        with self._lock:
            ids = self.tokenize(caption)
        return {"pixels": np.ascontiguousarray(frames), "ids": ids, "index": np.uint32(index), "row": np.int32(row)}

    def _skip(self, row: int, name: str, reason: str) -> None:
        with self._lock:
            if row not in self.skipped:
                self.skipped[row] = reason
                log.warning("left out %s: %s", name, reason)
            if len(self.skipped) == len(self.records):
                raise UserError(f"no video of {self.records.folder} can be used; {name}, for one: {reason}")


def batches(clips: Clips, size: int) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of `size` clips; the rows are shuffled anew in every pass over them."""
    config = clips.config
    rows = grain.MapDataset.range(len(clips.records)).shuffle(seed=config.seed).repeat()
    stream = rows.map_with_index(lambda index, row: clips(index, int(row)))
    options = grain.ReadOptions(num_threads=config.dataloader_num_workers, prefetch_buffer_size=size + config.dataloader_num_workers)
    return iter(stream.to_iter_dataset(options).batch(size, drop_remainder=True))
