"""Training of what train.py takes as given: the VAE's standardised latents, the text encoder's loose captions."""

import jax
import numpy as np

from anidiff_jax.models.clip import CLIPTextModel, clip_config
from anidiff_jax.models.init import draw, shapes
from anidiff_jax.models.vae import AutoencoderKL, vae_config
from anidiff_jax.shapes.pretrain import NARROWER, _standardised, loose, pictures, widen_text_encoder
from anidiff_jax.shapes.render import HELD_OUT_WORDINGS, PLACED, random_scene
from anidiff_jax.shapes.tiny_model import VAE, text_config, tokenizer_folder
from anidiff_jax.weights.base import load_tokenizer


def test_loose_captions_say_what_is_drawn_in_no_wording_that_is_held_out():
    rng = np.random.default_rng(0)
    seen = set()
    for i in range(300):
        scene = random_scene(rng, "own" if i % 2 else PLACED)
        caption = loose(scene, rng)
        words = caption.split()
        assert {scene.color, scene.thing, *scene.background.split(), *([scene.front] if scene.front else [])} <= set(words)
        assert caption not in {scene.caption(i, HELD_OUT_WORDINGS) for i in range(3)}
        assert caption.startswith(scene.caption(0, ("",)))  # the place, if any
        seen.add(words.index(scene.thing) < words.index(scene.background.split()[0]))
    assert seen == {True, False}


def test_widening_brings_loose_captions_nearer():
    encoder, tokenizer = CLIPTextModel(clip_config(text_config())), load_tokenizer(tokenizer_folder())
    tokenize = lambda captions: np.array(tokenizer(captions, padding="max_length", max_length=77)["input_ids"], np.int32)
    teacher = draw(shapes(encoder), 0)
    _, before = widen_text_encoder(encoder, teacher, tokenize, 1, seed=0, batch=4)
    _, after = widen_text_encoder(encoder, teacher, tokenize, 20, seed=0, batch=4)
    assert after["widened"] < 0.8 * before["widened"]


def test_standardised_latents_decode_to_the_same_pictures():
    vae = AutoencoderKL(vae_config(VAE))
    params = draw(shapes(vae), 0)
    x = pictures(8, 0) / 127.5 - 1
    encode = jax.jit(lambda p: tuple(vae.apply({"params": p}, x, method="encode")))
    decode = jax.jit(lambda p, z: vae.apply({"params": p}, z, method="decode"))
    mean, std = map(np.asarray, encode(params))
    new = _standardised(params, mean)
    new_mean, new_std = map(np.asarray, encode(new))
    np.testing.assert_allclose(new_mean.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(new_mean.std((0, 1, 2)), 1, rtol=1e-4)
    np.testing.assert_allclose(new_std * mean.std((0, 1, 2)) * NARROWER, std, rtol=1e-3)
    np.testing.assert_allclose(decode(new, new_mean), decode(params, mean), rtol=1e-3, atol=1e-3)
