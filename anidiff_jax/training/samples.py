"""GIFs that let the user see what goes in and what comes out."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from anidiff_jax.config import TrainConfig
from anidiff_jax.data.records import Records
from anidiff_jax.pipeline import AnimateDiffPipeline
from anidiff_jax.video import free_path, save_gif, slug

FPS = 8


def save_sanity_check(batch: Mapping[str, np.ndarray], records: Records, folder: Path, most: int = 8) -> None:
    """The first clips of a split batch as the network gets them, named by their captions."""
    clips = batch["pixels"].reshape(-1, *batch["pixels"].shape[3:])  # devices micro-batches clips f h w c -> (…) f h w c
    for i, (pixels, row) in enumerate(list(zip(clips, batch["row"].flat, strict=True))[:most]):
        caption, name = records.captions[row], records.names[row]
        save_gif(pixels, folder / f"{i}-{slug(caption)}.gif", FPS, {"caption": caption, "video": name})


def save_samples(pipeline: AnimateDiffPipeline, prompts: Sequence[str], config: TrainConfig, folder: Path) -> None:
    """A GIF for each prompt, with the run's seed."""
    settings = config.sampling()
    for prompt in prompts:
        (video,) = pipeline(prompt, **settings)
        save_gif(video, free_path(folder, prompt, config.seed), FPS, {"prompt": prompt, **settings})
