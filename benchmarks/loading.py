"""Clips a second that the loader gives, from videos and from a latent cache, with one thread and with two.

    python benchmarks/loading.py

Videos are ten seconds of H.264 in 512² and 256², which ffmpeg renders here; clips are 16 frames at stride 4, cut to 256². The cache holds
random numbers of the size of Stable Diffusion 1.5's latents. Results in benchmarks/results/loading-cpu.json and .md.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.full_size import WORK  # noqa: E402
from benchmarks.run import RESULTS, machine  # noqa: E402

VIDEOS, CLIPS, FRAMES = 16, 64, 300


def render(side: int) -> Path:
    """A folder of videos with captions."""
    folder = WORK / f"loading-{side}"
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(VIDEOS):
        path = folder / f"{i}.mp4"
        if not path.exists():
            source = f"testsrc2=size={side}x{side}:rate=30:duration=10,rotate={0.1 * i}"
            made = ["-f", "lavfi", "-i", source, "-pix_fmt", "yuv420p", "-c:v", "libx264", str(path)]
            subprocess.run([get_ffmpeg_exe(), "-y", "-v", "error", *made], check=True)
            path.with_suffix(".txt").write_text("a test picture that turns")
    return folder


def random_cache(folder: Path) -> Path:
    """Records as `training/encode.py` writes them, of 256²."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from safetensors.numpy import save, save_file

    from anidiff_jax.data.cache import NO_TEXT, shard_name

    folder.mkdir(parents=True, exist_ok=True)
    rng, half = np.random.default_rng(0), np.float16
    text = rng.standard_normal((77, 768)).astype(half)
    writer = ArrayRecordWriter(str(folder / shard_name(0)), "group_size:1")
    for _ in range(VIDEOS):
        mean = rng.standard_normal((FRAMES, 32, 32, 4)).astype(half)
        writer.write(save({"mean": mean, "std": np.abs(mean), "text": text}))
    writer.close()
    save_file({"text": text}, folder / NO_TEXT)
    return folder


def clips_per_second(records, source, threads: int) -> float:
    from anidiff_jax.data.loader import Clips, batches

    stream = batches(Clips(records, 0, source), 4, threads)
    for _ in range(2):
        next(stream)
    begun = time.perf_counter()
    for _ in range(CLIPS // 4):
        next(stream)
    taken = time.perf_counter() - begun
    stream.close()
    return CLIPS / taken


def main() -> None:
    from anidiff_jax.config import TrainConfig
    from anidiff_jax.data.cache import LatentCache
    from anidiff_jax.data.loader import Videos
    from anidiff_jax.data.records import read_records

    ids, rows = np.zeros(77, np.int32), []
    for threads in (1, 2):
        config = TrainConfig(dataloader_num_workers=threads)
        for side in (512, 256):
            records = read_records(None, str(render(side)))
            found = clips_per_second(records, Videos(records, config, lambda caption: ids), threads)
            rows.append({"from": f"videos of {side}²", "threads": threads, "clips_per_second": round(found, 2)})
        cached = LatentCache(random_cache(WORK / "loading-cache"), records, config)
        rows.append({"from": "latent cache", "threads": threads, "clips_per_second": round(clips_per_second(records, cached, threads), 2)})
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "loading-cpu.json").write_text(json.dumps({"machine": machine(), "load": os.getloadavg()[0], "rows": rows}, indent=2) + "\n")
    lines = [
        f"{machine()}; `python benchmarks/loading.py`; clips of 16 frames, 256²",
        "",
        "| from | threads | clips a second |",
        "|---|---|---|",
    ]
    lines += [f"| {row['from']} | {row['threads']} | {row['clips_per_second']} |" for row in rows]
    (RESULTS / "loading-cpu.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
