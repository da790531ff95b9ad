"""The latent cache: each video's posterior and its caption's text states, computed once, and read from ArrayRecord shards.

All frames are kept, mean and deviation both, so windows and latents are drawn as they are from videos. `training/encode.py` makes it.
"""

import contextlib
import resource
from pathlib import Path

import grain
import numpy as np
from safetensors.numpy import load, load_file

from anidiff_jax.config import TrainConfig
from anidiff_jax.data.decode import BadVideo, window
from anidiff_jax.data.records import Records

SHARD = 64  # videos
NO_TEXT = "empty.safetensors"  # text states of the empty caption


class LatentCache:
    """A source of clips (see `loader.Clips`): mean and std (f, h, w, c), text (tokens, d)."""

    def __init__(self, folder: Path, records: Records, config: TrainConfig):
        self.config = config
        allow_open_files(shards_of(records))
        self.videos = grain.sources.ArrayRecordDataSource([str(folder / shard_name(i)) for i in range(shards_of(records))])
        self.no_text = load_file(folder / NO_TEXT)["text"]

    def __call__(self, row: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A window of the video of this row, as a video itself would be read; BadVideo where it could not be."""
        c, video = self.config, load(self.videos[row])
        if "reason" in video:
            raise BadVideo(video["reason"].tobytes().decode())
        chosen = window(len(video["mean"]), c.sample_n_frames, c.sample_stride, rng)
        way = "flipped_" if c.random_flip and rng.random() < 0.5 else ""
        text = self.no_text if rng.random() < c.text_dropout_rate else video["text"]
        return {"mean": video[f"{way}mean"][chosen], "std": video[f"{way}std"][chosen], "text": text}


def shards_of(records: Records) -> int:
    return -(-len(records) // SHARD)


def shard_name(i: int) -> str:
    return f"latents-{i:05d}.arrayrecord"


def sizes_name(i: int) -> str:
    """The file that says how many bytes a shard's videos had."""
    return f"latents-{i:05d}.json"


def allow_open_files(count: int) -> None:
    """Lets this process hold so many files open, where the system does: a reader keeps each shard's."""
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if least < count + 256:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most if most != resource.RLIM_INFINITY else count + 256, most))
