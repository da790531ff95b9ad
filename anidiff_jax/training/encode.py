"""Makes the latent cache (see `data/cache.py`): decodes, encodes, writes shard after shard.

Shard i holds rows i · SHARD and following; it has its name when it is whole, so an interrupted encoding goes on with those that
are missing. Every process makes its own share of the shards, on all of its devices. Beside a shard stand the sizes of its videos' files:
where one was mended or cut anew since, the shard is made again.
"""

import contextlib
import itertools
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save, save_file

from anidiff_jax.config import TrainConfig
from anidiff_jax.data.ahead import in_order
from anidiff_jax.data.cache import NO_TEXT, SHARD, LatentCache, shard_name, shards_of, sizes_name
from anidiff_jax.data.decode import BadVideo, read_whole
from anidiff_jax.data.records import Records
from anidiff_jax.errors import UserError
from anidiff_jax.models.vae import FRAMES_AT_ONCE, encode_frames
from anidiff_jax.parallel import is_main, on_each_device, replicate, wait_for_all
from anidiff_jax.pipeline import AnimateDiffPipeline
from anidiff_jax.terminal import track
from anidiff_jax.text import encode_text
from anidiff_jax.weights import files
from anidiff_jax.weights.hashes import hash_of

log = logging.getLogger(__name__)

ABANDONED = 3600.0  # seconds without a video written, after which half a shard is nobody's


def fill_cache(folder: Path, records: Records, config: TrainConfig, pipeline: AnimateDiffPipeline) -> LatentCache:
    """Encodes what the cache in `folder` lacks, over all devices and processes, and opens it.

    A cache made from other clips, at another size or with another base model is a UserError that says what differs.
    """
    half = pipeline.dtype != "float32"
    _claim(folder, recipe(records, config, pipeline, half))
    mine = range(jax.process_index(), shards_of(records), jax.process_count())
    _remove_halves(folder)
    missing = [i for i in mine if not _is_there(folder, i, records)]
    rows = [row for i in missing for row in range(i * SHARD, min((i + 1) * SHARD, len(records)))]
    if rows:
        _write(folder, rows, records, _encoded(folder, rows, records, config, pipeline, np.dtype("float16" if half else "float32")))
    wait_for_all("latent cache")
    return LatentCache(folder, records, config)


def recipe(records: Records, config: TrainConfig, pipeline: AnimateDiffPipeline, half: bool) -> dict[str, Any]:
    """What the contents of a cache follow from."""
    return {
        "clips": records.hash,
        "base_model": hash_of(pipeline.model.params["vae"], pipeline.model.params["text_encoder"]),
        "sample_size": f"{config.height}x{config.width}",
        "random_flip": config.random_flip,
        "dtype": "float16" if half else "float32",
    }


def _claim(folder: Path, wanted: dict[str, Any]) -> None:
    """Makes the folder a cache of this recipe, or sees that it is one."""
    path = folder / "cache.json"
    if path.is_file():
        found = files.read_json(path)
        other = [name for name, value in wanted.items() if found.get(name) != value]
        if other:
            said = ", ".join(f"{name} {found.get(name)}" if len(str(found.get(name))) < 20 else f"other {name}" for name in other)
            raise UserError(f"latent_cache {folder} was made with {said}: give another folder, or delete this one")
    elif is_main():
        folder.mkdir(parents=True, exist_ok=True)
        files.save_json(wanted, path)
    wait_for_all("latent cache begun")


def _is_there(folder: Path, i: int, records: Records) -> bool:
    """Whether shard i is whole, and of the files that are there now; a file that is no more counts as it was."""
    if not (folder / shard_name(i)).is_file():
        return False
    path = folder / sizes_name(i)
    then = files.read_json(path)["bytes"] if path.is_file() else []
    names = records.names[i * SHARD : (i + 1) * SHARD]
    changed = [name for name, size in zip(names, then, strict=False) if _size(records.folder / name) not in (None, size)]
    if changed:
        log.info("%s has changed since it was encoded (and %d more): encoding again", changed[0], len(changed) - 1)
    return not changed


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _remove_halves(folder: Path) -> None:
    """What killed runs left of shards. Others may be at work in the same folder: theirs are younger."""
    for half in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            if time.time() - half.stat().st_mtime > ABANDONED:
                half.unlink()


def _write(folder: Path, rows: list[int], records: Records, encoded: Iterable[dict[str, np.ndarray]]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    videos = iter(track(encoded, "encoding", len(rows), is_main()))
    for i, members in itertools.groupby(rows, lambda row: row // SHARD):
        own = list(members)
        sizes = [_size(records.folder / records.names[row]) for row in own]
        aside = folder / f".{shard_name(i)}.{uuid.uuid4().hex}.part"  # two runs may share a folder
        writer = ArrayRecordWriter(str(aside), "group_size:1")
        for _ in own:
            writer.write(save(next(videos)))
        writer.close()
        os.replace(aside, folder / shard_name(i))
        files.save_json({"bytes": sizes}, folder / sizes_name(i))


def _encoded(
    folder: Path, rows: list[int], records: Records, config: TrainConfig, pipeline: AnimateDiffPipeline, dtype
) -> Iterator[dict[str, np.ndarray]]:
    """Each video of `rows` as it is stored."""
    networks, params, devices = pipeline.model.networks, pipeline.model.params, jax.local_device_count()
    encode, vae = on_each_device(lambda vae, _, frames: encode_frames(networks.vae, vae, frames)), replicate(params["vae"])

    def posterior(frames: np.ndarray, way: str = "") -> dict[str, np.ndarray]:
        whole = devices * FRAMES_AT_ONCE
        parts = []
        for start in range(0, len(frames), whole):  # one shape, so one compilation
            part = frames[np.minimum(np.arange(start, start + whole), len(frames) - 1)]
            parts.append(jax.tree.map(np.asarray, encode(vae, None, part.reshape(devices, FRAMES_AT_ONCE, *part.shape[1:]))))
        joined = [np.concatenate([p[i].reshape(whole, *p[i].shape[2:]) for p in parts])[: len(frames)] for i in (0, 1)]
        return {f"{way}mean": joined[0].astype(dtype), f"{way}std": joined[1].astype(dtype)}

    def text(caption: str) -> np.ndarray:
        states = encode_text(networks.text_encoder, params["text_encoder"], pipeline.tokenize([caption]))
        return np.asarray(states[0]).astype(dtype)

    if is_main():
        aside = folder / f".{NO_TEXT}.{uuid.uuid4().hex}.part"
        save_file({"text": text("")}, aside)
        os.replace(aside, folder / NO_TEXT)
    for row, frames in zip(rows, _decoded(rows, records, config), strict=True):
        if isinstance(frames, str):
            yield {"reason": np.frombuffer(frames.encode(), np.uint8)}
        else:
            flipped = posterior(frames[:, :, ::-1], "flipped_") if config.random_flip else {}
            yield {**posterior(frames), **flipped, "text": text(records.captions[row])}


def _decoded(rows: list[int], records: Records, config: TrainConfig) -> Iterator[np.ndarray | str]:
    """All frames of each video, (frames, side, side, 3), or why it cannot be used; a few videos ahead."""

    def decode(row: int) -> np.ndarray | str:
        try:
            return read_whole(records.folder / records.names[row], config.height, config.width)
        except BadVideo as bad:
            return str(bad)

    return in_order(decode, rows, config.dataloader_num_workers)
