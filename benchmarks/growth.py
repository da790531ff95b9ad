"""How cost grows with frames, resolution, videos, context length and LoRA rank, on the embedded model: docs/growth.png.

    python benchmarks/growth.py          # five minutes on 2 cores

Seconds are the median of a step of sampling with guidance, or of an update of LoRA training; memory is XLA's own count of the compiled
program's temporaries, without weights. Writes benchmarks/results/growth.json.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from anidiff_jax import AnimateDiffPipeline  # noqa: E402
from anidiff_jax.config import TrainConfig  # noqa: E402
from anidiff_jax.denoising import Program, Turn, numbers_of, step_of  # noqa: E402
from anidiff_jax.diffusion import solvers  # noqa: E402
from anidiff_jax.diffusion.guidance import Guidance  # noqa: E402
from anidiff_jax.diffusion.windows import Context  # noqa: E402
from anidiff_jax.parallel import data_parallel, replicate, set_up_jax, split_batch, to_devices  # noqa: E402
from anidiff_jax.training import setup  # noqa: E402
from anidiff_jax.training.state import TrainState, make_optimizer  # noqa: E402
from anidiff_jax.training.step import make_update  # noqa: E402

Point = tuple[float, float]  # seconds, megabytes
REPEATS = 5


def timed(run: Callable) -> float:
    run()
    seconds = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def sampling(pipe: AnimateDiffPipeline, frames: int = 8, side: int = 64, window: int = 0) -> Point:
    """A step with guidance."""
    network, vae = pipe.model.networks.unet, pipe.model.networks.vae.config
    row = jax.tree.map(lambda x: x[0], solvers.table(pipe.schedule, "ddim", 25).rows)
    starts = Context(window).starts(frames, window, 1)[0] if window else np.zeros(1, np.int32)
    turn = Turn(np.int32(0), row, starts, np.zeros(2, np.float32))
    text = jnp.ones((1, 2, 77, network.config.cross_attention_dim))
    shape = (1, 1, frames, side // vae.factor, side // vae.factor, vae.latent_channels)
    program = step_of(Program(network, window=window), 1)
    given = lambda: (pipe.model.params["unet"], {}, numbers_of(5.0, Guidance()), turn, jnp.ones(shape), text, None, None)
    compiled = program.lower(*given()).compile()
    return timed(lambda: compiled(*given())), compiled.memory_analysis().temp_size_in_bytes / 1e6


def training(clips: int = 1, rank: int = 8, frames: int = 8, side: int = 64) -> Point:
    """An update of LoRA training on so many clips, encoding included."""
    config = TrainConfig(sample_size=str(side), sample_n_frames=frames, lora_rank=rank, lora_dropout=0.0)
    model = setup.load(config)
    trained, frozen = setup.split_params(config, model)
    optimizer = make_optimizer(config, 10)
    pixels = np.random.default_rng(0).integers(0, 256, (clips, frames, side, side, 3), np.uint8)
    batch = {"pixels": pixels, "ids": np.zeros((clips, 77), np.int32), "index": np.arange(clips, dtype=np.uint32)}
    update = data_parallel(make_update(setup.task(config, model), optimizer))
    state, frozen, batch = replicate(TrainState.create(trained, optimizer)), replicate(frozen), to_devices(split_batch(batch, 1))
    compiled = update.lower(state, frozen, batch).compile()

    def run():
        nonlocal state
        state, metrics = update(state, frozen, batch)
        return metrics

    return timed(run), compiled.memory_analysis().temp_size_in_bytes / 1e6


def plot(found: dict[str, dict[str, Point]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(found), figsize=(3.2 * len(found), 5.5), layout="constrained")
    for column, (name, points) in enumerate(found.items()):
        xs = [int(x) for x in points]
        for axis, which, label in ((axes[0][column], 0, "seconds"), (axes[1][column], 1, "MB")):
            axis.plot(xs, [point[which] for point in points.values()], marker="o")
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.set_ylabel(label)
        axes[0][column].set_title(name.split(", ")[0], fontsize="medium")
        axes[1][column].set_xlabel(name.split(", ")[1])
    figure.savefig(HERE.parent / "docs" / "growth.png", dpi=100)


def main() -> None:
    set_up_jax()
    pipe = AnimateDiffPipeline.from_pretrained()
    each = lambda measure, values: {str(value): measure(value) for value in values}
    found = {
        "a step of sampling, frames": each(lambda n: sampling(pipe, frames=n), (2, 4, 8, 16, 32)),
        "a step of sampling, pixels a side": each(lambda n: sampling(pipe, side=n), (32, 64, 96, 128)),
        "a step of sampling, frames in windows of 8": each(lambda n: sampling(pipe, frames=n, window=8), (16, 32, 64, 128, 256)),
        "64 frames in windows, frames of a window": each(lambda n: sampling(pipe, frames=64, window=n), (4, 8, 16, 32)),
        "an update of LoRA, clips": each(lambda n: training(clips=n), (1, 2, 4, 8)),
        "an update of LoRA, rank": each(lambda n: training(rank=n), (1, 4, 16, 64)),
    }
    (HERE / "results" / "growth.json").write_text(json.dumps(found, indent=2) + "\n")
    plot(found)
    for name, points in found.items():
        print(name, {x: (round(s, 3), round(m, 1)) for x, (s, m) in points.items()})


if __name__ == "__main__":
    main()
