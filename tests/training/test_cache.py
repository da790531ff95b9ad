"""The latent cache: training from it is training from the videos; what it was made of is known, and half of it is gone on with."""

import os
import shutil
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from anidiff_jax.config import TrainConfig
from anidiff_jax.data.cache import LatentCache
from anidiff_jax.data.decode import BadVideo
from anidiff_jax.data.loader import Clips, Videos, batches
from anidiff_jax.data.records import read_records
from anidiff_jax.errors import UserError
from anidiff_jax.models.vae import encode_frames
from anidiff_jax.pipeline import AnimateDiffPipeline
from anidiff_jax.shapes.clips import write_clips
from anidiff_jax.text import encode_text
from anidiff_jax.training import encode, setup
from tests.reference import close


@pytest.fixture(scope="module")
def world(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, 6, seed=1)
    (folder / "text.mp4").write_text("no video")
    with (folder / "clips.csv").open("a") as file:
        file.write("broken,text.mp4\n")
    config = TrainConfig(
        model_id_or_path=str(base), sft_type="full", sample_size="16", sample_n_frames=4, sample_stride=2, text_dropout_rate=0.3,
        random_flip=True, csv_path=str(folder / "clips.csv"), video_folder=str(folder),
    )  # fmt: skip
    model = setup.load(config)
    return config, read_records(config.csv_path, config.video_folder), AnimateDiffPipeline(model, config.noise())


def test_it_gives_what_the_videos_give(world, tmp_path, monkeypatch):
    """The same windows, flips and captions, encoded: the distribution of training stays what it was."""
    config, records, pipeline = world
    monkeypatch.setattr("anidiff_jax.training.encode.SHARD", 4)  # two shards
    monkeypatch.setattr("anidiff_jax.data.cache.SHARD", 4)
    cache = encode.fill_cache(tmp_path, records, config, pipeline)
    assert len(list(tmp_path.glob("latents-*.arrayrecord"))) == 2
    videos = Videos(records, config, lambda caption: pipeline.tokenize([caption])[0])
    stream = lambda source: batches(Clips(records, 3, source), 4, 2)
    from_cache, from_videos = stream(cache), stream(videos)
    params, networks = pipeline.model.params, pipeline.model.networks
    posterior = jax.jit(lambda frames: encode_frames(networks.vae, params["vae"], frames))
    for _ in range(4):
        ours, theirs = next(from_cache), next(from_videos)
        np.testing.assert_array_equal(ours["index"], theirs["index"])
        np.testing.assert_array_equal(ours["row"], theirs["row"])
        for i in range(4):
            mean, std = posterior(theirs["pixels"][i])
            close(ours["mean"][i], mean, 1e-5)
            close(ours["std"][i], std, 1e-5)
            close(ours["text"][i], encode_text(networks.text_encoder, params["text_encoder"], theirs["ids"][i][None])[0], 1e-5)
    with pytest.raises(BadVideo, match="cannot be decoded"):
        cache(6, np.random.default_rng(0))


def test_an_interrupted_encoding_goes_on(world, tmp_path, monkeypatch):
    config, records, pipeline = world
    monkeypatch.setattr("anidiff_jax.training.encode.SHARD", 2)
    monkeypatch.setattr("anidiff_jax.data.cache.SHARD", 2)
    whole = encode.fill_cache(tmp_path / "whole", records, config, pipeline)
    decode, seen = encode.read_whole, []

    def stops(path, height, width):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(path.name)
        return decode(path, height, width)

    monkeypatch.setattr(encode, "read_whole", stops)
    with pytest.raises(KeyboardInterrupt):
        encode.fill_cache(tmp_path / "part", records, config, pipeline)
    done = sorted(p.name for p in (tmp_path / "part").glob("latents-*.arrayrecord"))
    assert 1 <= len(done) < 4
    again = []
    monkeypatch.setattr(encode, "read_whole", lambda path, *size: (again.append(path.name), decode(path, *size))[1])
    part = encode.fill_cache(tmp_path / "part", records, config, pipeline)
    assert len(again) == 7 - 2 * len(done)
    for row in range(6):
        a, b = (cache(row, np.random.default_rng(row)) for cache in (whole, part))
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_processes_share_the_encoding(world, tmp_path, monkeypatch):
    """Of two, the first makes shards 0 and 2, the second 1 and 3; together they are the cache."""
    config, records, pipeline = world
    monkeypatch.setattr("anidiff_jax.training.encode.SHARD", 2)
    monkeypatch.setattr("anidiff_jax.data.cache.SHARD", 2)
    with monkeypatch.context() as patch:
        patch.setattr(encode, "wait_for_all", lambda what: None)
        patch.setattr(encode, "LatentCache", lambda *_: None)
        patch.setattr(jax, "process_count", lambda: 2)
        for process, made in ((0, {0, 2}), (1, {0, 1, 2, 3})):
            patch.setattr(jax, "process_index", lambda process=process: process)
            encode.fill_cache(tmp_path, records, config, pipeline)
            assert {path.name for path in tmp_path.glob("latents-*.arrayrecord")} == {f"latents-{i:05d}.arrayrecord" for i in made}
    cache = LatentCache(tmp_path, records, replace(config, text_dropout_rate=0.0))
    params, network = pipeline.model.params["text_encoder"], pipeline.model.networks.text_encoder
    for row in range(6):
        states = encode_text(network, params, pipeline.tokenize([records.captions[row]]))[0]
        close(cache(row, np.random.default_rng(0))["text"], states, 1e-5)


def test_a_mended_video_is_encoded_again(world, tmp_path, monkeypatch):
    """And one that was cut anew under its old name; one that is no more stays as it was."""
    config, records, pipeline = world
    monkeypatch.setattr(encode, "SHARD", 2)
    monkeypatch.setattr("anidiff_jax.data.cache.SHARD", 2)
    videos = tmp_path / "videos"
    shutil.copytree(records.folder, videos)
    records = replace(records, folder=videos)
    config = replace(config, text_dropout_rate=0.0)
    cache = encode.fill_cache(tmp_path / "cache", records, config, pipeline)
    with pytest.raises(BadVideo):
        cache(6, np.random.default_rng(0))
    before = cache(0, np.random.default_rng(0))
    shutil.copy(videos / records.names[1], videos / records.names[6])
    (videos / records.names[0]).unlink()
    decode, again = encode.read_whole, []
    monkeypatch.setattr(encode, "read_whole", lambda path, *size: (again.append(path.name), decode(path, *size))[1])
    cache = encode.fill_cache(tmp_path / "cache", records, config, pipeline)
    assert again == [records.names[6]]  # the last shard holds but one
    np.testing.assert_array_equal(cache(6, np.random.default_rng(0))["mean"], cache(1, np.random.default_rng(0))["mean"])
    np.testing.assert_array_equal(cache(0, np.random.default_rng(0))["mean"], before["mean"])


def test_halves_of_shards_are_removed_when_nobody_writes_them(world, tmp_path):
    config, records, pipeline = world
    folder = tmp_path / "cache"
    folder.mkdir()
    ours, others = folder / ".latents-00000.arrayrecord.a.part", folder / ".latents-00000.arrayrecord.b.part"
    for path, age in ((ours, 7200), (others, 60)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    encode.fill_cache(folder, records.drawn(2, 0), config, pipeline)
    assert not ours.exists()
    assert others.exists()
    assert not [path for path in folder.glob(".*") if path != others]


@pytest.mark.parametrize("change", [{"sample_size": "32"}, {"random_flip": False}, {"dataset_sample_size": 3}])
def test_another_recipe_is_refused(world, tmp_path, change):
    config, records, pipeline = world
    encode.fill_cache(tmp_path, records.drawn(2, 0), config, pipeline)
    other = replace(config, **change)
    rows = records.drawn(other.dataset_sample_size or 2, 0)
    with pytest.raises(UserError, match="give another folder, or delete this one"):
        encode.fill_cache(tmp_path, rows, other, pipeline)
