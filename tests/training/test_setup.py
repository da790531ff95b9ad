"""From arguments to models, rows and the task: each argument arrives where it is used."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anidiff_jax.arguments import parse
from anidiff_jax.config import TrainConfig
from anidiff_jax.data.loader import Videos
from anidiff_jax.errors import UserError
from anidiff_jax.lora import init_lora, merge_lora
from anidiff_jax.models.layers import Settings
from anidiff_jax.shapes.clips import write_clips
from anidiff_jax.training import setup
from anidiff_jax.weights.base import EMBEDDED_CLIPS
from anidiff_jax.weights.loras import save_lora
from anidiff_jax.weights.tree import flatten
from tests import reference
from tests.conftest import words_of

CLIP = ["--sample_size", "16", "--sample_n_frames", "3"]
TABLE = "mid_block.motion_modules.0.transformer_blocks.0.pos_embed.pe"


@pytest.fixture
def full(base):
    """full(word, …) → the config of full training with those words on the command line."""
    return lambda *words: parse(TrainConfig, ["--model_id_or_path", str(base), "--sft_type", "full", *CLIP, *words])


@pytest.fixture
def lora(base, adapter):
    models = ["--model_id_or_path", str(base), "--motion_adapter_id_or_path", str(adapter)]
    return lambda *words: parse(TrainConfig, [*models, *CLIP, *words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, 6, seed=1)
    return folder


@pytest.fixture(scope="module")
def model(base, adapter):
    return setup.load(TrainConfig(model_id_or_path=str(base), motion_adapter_id_or_path=str(adapter), sample_n_frames=3))


@pytest.fixture
def told(monkeypatch):
    """told(config) → what `load` tells `load_model`, which reads no file."""
    monkeypatch.setattr(setup, "load_model", lambda *models, **how: how)
    monkeypatch.setattr(setup, "check_size", lambda *_: None)
    return setup.load


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_fresh_motion_modules(full):
    shape = lambda model: (model.motion.heads, model.motion.max_frames, flatten(model.params["unet"])[TABLE].shape[1])
    model = setup.load(full())
    assert shape(model) == ((8, 8), 32, 32)
    other = setup.load(full("--motion_num_attention_heads", "4", "--motion_max_seq_length", "40", "--seed", "7"))
    assert shape(other) == ((4, 4), 40, 40)
    assert not same(setup.split_params(full(), model)[0], setup.split_params(full(), other)[0])  # drawn by the seed


def test_an_adapter_is_gone_on_with(full, adapter):
    model = setup.load(full("--motion_adapter_id_or_path", str(adapter)))
    assert (model.motion.heads, model.motion.max_frames) == ((2, 2), 24)
    with pytest.raises(UserError, match="motion_max_seq_length 32 conflicts with the motion adapter, which has 24"):
        setup.load(full("--motion_adapter_id_or_path", str(adapter), "--motion_max_seq_length", "32"))


def test_a_lora_of_the_image_model_needs_no_adapter(base):
    words = ["--model_id_or_path", str(base), *CLIP, "--trainable_modules", r".*\.attentions\..*attn1\.to_q"]
    config = parse(TrainConfig, words)
    model = setup.load(config)
    assert model.motion is None
    assert len(flatten(setup.split_params(config, model)[0])) == 2 * 4


def test_each_model_in_its_revision(told, base, monkeypatch):
    asked = {}
    monkeypatch.setattr(setup, "resolve", lambda name, revision=None, *_, **__: asked.update({name: revision}) or base)
    models = {"model_id_or_path": "a/model", "motion_adapter_id_or_path": "an/adapter"}
    told(parse(TrainConfig, words_of(**models, model_revision="v1", motion_adapter_revision="v2")))
    assert asked == {"a/model": "v1", "an/adapter": "v2"}


def test_how_the_networks_compute(lora, full, told, model):
    assert told(lora())["settings"] == Settings(lora_dropout=0.05)
    networks = model.networks
    assert networks.unet.settings == networks.vae.settings == networks.text_encoder.settings == Settings(lora_dropout=0.05)
    words = words_of(gradient_checkpointing=True, enable_xformers_memory_efficient_attention=False, lora_dropout=0.25)
    assert told(lora(*words))["settings"] == Settings(remat=True, attention="xla", lora_dropout=0.25)
    assert told(full(*words))["settings"].lora_dropout == 0  # the parameters themselves train


def test_norms_and_strength(lora, told):
    words = words_of(motion_norm="per_frame", spatial_norm="joint", motion_scale=0.5)
    assert told(lora(*words))["settings"] == Settings(lora_dropout=0.05, motion_norm="per_frame", spatial_norm="joint", motion_scale=0.5)


def test_a_lora_that_is_given_is_folded_into_what_is_frozen(lora, model, tmp_path):
    params = model.params["unet"]
    style = jax.tree.map(lambda x: x + 0.5, init_lora(jax.random.key(0), params, r".*\.attentions\..*attn1\.to_q", 2))
    save_lora(style, tmp_path, 2, 0.0, "base")
    folded = flatten(setup.load(lora("--lora", f"{tmp_path}:0.25", "--lora", f"{tmp_path}:0.5")).params["unet"])
    wanted = flatten(merge_lora(params, style, 0.75))
    for key, value in folded.items():
        np.testing.assert_allclose(value, wanted[key], rtol=1e-5, atol=1e-6, err_msg=key)


def test_parts_in_the_place_of_the_bases(lora, model, base, tmp_path):
    for part, name in ((reference.vae(seed=9), "vae"), (reference.text_encoder(reference.vocabulary_size(), seed=9), "text_encoder")):
        part.save_pretrained(tmp_path / name)
    other = setup.load(lora("--vae_path", str(tmp_path / "vae"), "--text_encoder_path", str(tmp_path / "text_encoder")))
    assert not same(other.params["vae"], model.params["vae"])
    assert not same(other.params["text_encoder"], model.params["text_encoder"])
    assert same(other.params["unet"], model.params["unet"])


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradient_checkpointing_recomputes(lora, checkpointing):
    unet = setup.load(lora("--gradient_checkpointing", str(checkpointing))).networks.unet
    x, t, text = jnp.zeros((1, 3, 4, 4, 4)), jnp.zeros(1, int), jnp.zeros((1, 7, 24))
    program = jax.make_jaxpr(lambda key: unet.init(key, x, t, text))(jax.random.key(0))
    assert ("remat" in str(program)) == checkpointing


def test_on_a_cpu_all_is_float32(lora, told, caplog):
    with caplog.at_level(logging.INFO):
        assert told(lora("--mixed_precision", "false"))["dtype"] == "float32"
        assert caplog.text == ""
        assert told(lora())["dtype"] == setup.lora_dtype(lora("--lora_dtype", "AUTO")) == "float32"
    assert "a CPU is slower in bfloat16" in caplog.text


def test_mixed_precision(lora, full, adapter, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    types = lambda tree: {str(x.dtype) for x in jax.tree.leaves(tree)}
    for config in (lora(), full("--motion_adapter_id_or_path", str(adapter))):
        model = setup.load(config)
        trained, frozen = setup.split_params(config, model)
        assert (types(trained), types(frozen), model.networks.unet.settings.dtype) == ({"float32"}, {"bfloat16"}, "bfloat16")
    assert setup.compute_dtype(lora("--mixed_precision", "false")) == "float32"
    kinds = {kind: setup.lora_dtype(lora("--lora_dtype", kind)) for kind in ("AUTO", "bf16", "fp16", "fp32")}
    assert kinds == {"AUTO": "bfloat16", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    assert setup.lora_dtype(lora("--lora_dtype", "AUTO", "--mixed_precision", "false")) == "float32"


def test_what_trains(full):
    motion = setup.load(full())
    keys = lambda pattern: set(flatten(setup.split_params(full("--trainable_modules", pattern), motion)[0]))
    every = flatten(motion.params["unet"])
    assert keys(".*") == {key for key in every if not key.endswith("pos_embed.pe")}
    assert keys(".*motion_modules.*") == {key for key in keys(".*") if "motion_modules" in key}
    assert keys(r".*attn1\.to_q\.weight") == {key for key in every if key.endswith("attn1.to_q.weight")}
    for pattern in ("motion_modules", r".*pos_embed\.pe"):  # no full match; a buffer
        with pytest.raises(UserError, match="matches no parameter of the UNet; names look like conv_in"):
            keys(pattern)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_weights_are_held_once(full, lora, model, kind):
    """What trains and what is frozen are the model's own arrays, each in one of the two."""
    trained, frozen = setup.split_params({"full": full, "lora": lora}[kind](), model)
    here = [id(x) for x in jax.tree.leaves(model.params)]
    parts = [id(x) for x in jax.tree.leaves(([] if kind == "lora" else trained, frozen))]
    assert sorted(parts) == sorted(here)


def test_adapters_are_of_the_rank_and_drawn_by_the_seed(lora, model):
    def fresh(*words):
        return flatten(setup.split_params(lora("--trainable_modules", r".*attn1\.to_q", *words), model)[0])

    ranks = {x.shape[1] if ".lora_A." in key else x.shape[0] for key, x in fresh("--lora_rank", "3").items()}
    assert ranks == {3}
    assert all(".attn1.to_q.lora_" in key for key in fresh())
    assert same(fresh(), fresh())
    assert not same(fresh(), fresh("--seed", "7"))


def test_the_task(lora, full, model):
    model = replace(model, scheduler={"prediction_type": "v_prediction", "beta_start": 0.5})  # only what it predicts is taken of it
    noise = {"num_train_timesteps": 500, "beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "scaled_linear", "steps_offset": 2}
    words = words_of(**noise, noise_offset=0.1, ema_decay=0.9, seed=3, loss_weighting="inverse_snr", lora_alpha=6, lora_rank=4)
    config = lora(*words, "--clip_sample", "--lora_dtype", "bf16")
    task = setup.task(config, model)
    unsaid = {"timestep_spacing": "leading", "set_alpha_to_one": True, "rescale_betas_zero_snr": False}
    assert vars(task.schedule) == {**noise, **unsaid, "clip_sample": True, "prediction_type": "v_prediction"}
    said = {"timestep_spacing": "trailing", "set_alpha_to_one": False, "rescale_betas_zero_snr": True, "prediction_type": "epsilon"}
    assert vars(setup.task(lora(*words_of(**said, scheduler="euler")), model).schedule).items() >= said.items()
    with pytest.raises(UserError, match="nothing of the video is left"):  # which ddim could do with the base's own velocities
        setup.task(lora("--rescale_betas_zero_snr", "--timestep_spacing", "trailing"), replace(model, scheduler={}))
    assert (task.noise_offset, task.ema_decay, task.seed, task.loss_weighting, task.snr_gamma) == (0.1, 0.9, 3, "inverse_snr", None)
    assert (task.lora_scale, task.lora_dtype) == (1.5, "bfloat16")
    assert setup.task(lora("--snr_gamma", "5"), model).snr_gamma == 5
    assert task.timesteps == (0, 500)
    assert setup.task(lora("--min_timestep", "600", "--max_timestep", "900"), model).timesteps == (600, 900)
    assert task.timestep_bias is None
    assert setup.task(lora("--timestep_bias_begin", "600", "--timestep_bias_multiplier", "4"), model).timestep_bias == (600, 4)
    assert setup.task(full(), model).lora_scale is None


def test_rows(full, folder):
    given = lambda *words: full("--csv_path", str(folder / "clips.csv"), "--video_folder", str(folder), *words)
    rows = lambda *words: setup.records(given(*words))
    names = lambda *words: list(rows(*words)[0].names)
    assert len(names()) == 6
    assert rows()[1] is None
    assert len(names("--dataset_sample_size", "3")) == 3
    assert names("--dataset_sample_size", "3") == names("--dataset_sample_size", "3")
    assert len({tuple(names("--dataset_sample_size", "3", "--seed", str(seed))) for seed in range(5)}) > 1
    train, held_out = rows("--validation_fraction", "0.5")
    assert (len(train), len(held_out)) == (3, 3)
    assert not {*train.names} & {*held_out.names}
    other = folder / "other.csv"
    other.write_text(f"name,contentUrl\na star,{names()[2]}\n")
    assert list(rows("--validation_csv", str(other))[1].captions) == ["a star"]
    with pytest.raises(UserError, match="no training data: give --video_folder"):
        setup.records(full())
    assert setup.records(TrainConfig())[0].folder == EMBEDDED_CLIPS
    with pytest.raises(UserError, match="no video has a"):  # the folder alone: captions beside its videos
        setup.records(full("--video_folder", str(folder)))


def test_where_clips_come_from(full, folder, monkeypatch):
    config = full("--csv_path", str(folder / "clips.csv"), "--video_folder", str(folder))
    rows, _ = setup.records(config)
    pipeline = SimpleNamespace(tokenize=lambda captions: [[len(captions[0])]])
    assert isinstance(setup.source(config, rows, pipeline), Videos)
    monkeypatch.setattr(setup, "fill_cache", lambda place, *_: place)
    assert setup.source(full("--latent_cache", str(folder / "cache")), rows, pipeline) == folder / "cache"
