"""GIFs that let the user see what goes in and what comes out."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from anidiff_jax.config import TrainConfig
from anidiff_jax.data.records import Records
from anidiff_jax.pipeline import AnimateDiffPipeline
from anidiff_jax.sampling import decode
from anidiff_jax.scores import general_scores
from anidiff_jax.sheets import contact_sheet
from anidiff_jax.video import free_path, save_gif, slug
from anidiff_jax.weights.files import save_json, written_whole
from anidiff_jax.weights.tree import Tree

FPS = 8


def save_sanity_check(
    batch: Mapping[str, np.ndarray], records: Records, pipeline: AnimateDiffPipeline, vae: Tree, folder: Path, most: int = 8
) -> None:
    """The first clips of a split batch as the network gets them, named by their captions; cached latents are decoded by the VAE."""
    network = pipeline.model.networks.vae
    frames = batch["pixels"] if "pixels" in batch else batch["mean"]
    clips = frames.reshape(-1, *frames.shape[3:])  # devices micro-batches clips f h w c -> (…) f h w c
    for i, (clip, row) in enumerate(list(zip(clips, batch["row"].flat, strict=True))[:most]):
        caption, name = records.captions[row], records.names[row]
        pixels = clip if "pixels" in batch else decode(network, vae, (clip - network.config.shift_factor) * network.config.scaling_factor)
        save_gif(pixels, folder / f"{i}-{slug(caption)}.gif", FPS, {"caption": caption, "video": name})


def save_samples(pipeline: AnimateDiffPipeline, prompts: Sequence[str], config: TrainConfig, folder: Path) -> dict[str, float]:
    """A GIF for each prompt, with the run's seed, and all of them as a contact sheet; returns the mean of their general scores."""
    settings = config.sampling()
    videos = [pipeline(prompt, **settings)[0] for prompt in prompts]
    scores = [general_scores(video) for video in videos]
    with written_whole(folder) as out:
        for prompt, video in zip(prompts, videos, strict=True):
            save_gif(video, free_path(out, prompt, config.seed), FPS, {"prompt": prompt, **settings})
        save_json({"prompts": dict(zip(prompts, scores, strict=True)), **settings}, out / "scores.json")
        contact_sheet(videos, prompts, out / "sheet.png")
    return {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}
