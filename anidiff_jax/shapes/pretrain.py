"""The two networks that train.py takes as given, trained on rendered pictures and their captions: the VAE and the text encoder."""

import logging
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from anidiff_jax.models.clip import CLIPTextModel
from anidiff_jax.models.init import draw, shapes
from anidiff_jax.models.vae import AutoencoderKL, Posterior
from anidiff_jax.shapes.render import BACKGROUNDS, COLORS, DIRECTIONS, HELD_OUT_MOTIONS, PLACED, THINGS, VERBS, Scene, random_scene, render
from anidiff_jax.shapes.tiny_model import WORDS

log = logging.getLogger(__name__)

KL_WEIGHT = 1e-4  # of the posterior's divergence from the unit Gaussian, a latent value
NARROWER = 20  # times, the posterior's deviation once the autoencoder is trained
FRAMES_A_SCENE = 4
PLACE = 0.7  # length of the vector that a place adds to the text states, in their deviations
_NAMES = " ".join([*COLORS, *THINGS, *BACKGROUNDS, *DIRECTIONS, *VERBS.values()]).split()
OTHER_WORDS = [word for word in WORDS if word not in _NAMES]


def pictures(count: int, seed: int, side: int = 64) -> np.ndarray:
    """uint8 (count, side, side, 3): frames from clips of every motion."""
    rng = np.random.default_rng(seed)
    frames: list[np.ndarray] = []
    while len(frames) < count:
        scene = random_scene(rng, str(rng.choice(["own", "own", *HELD_OUT_MOTIONS])))
        frames += list(render(scene, 24, side)[rng.choice(24, FRAMES_A_SCENE, replace=False)])
    return np.stack(frames[:count])


def train_vae(vae: AutoencoderKL, updates: int, seed: int, batch: int = 16) -> tuple[dict[str, Any], float]:
    """(parameters, PSNR in dB on pictures not trained on). The latents of the result have mean 0 and deviation 1, channel by channel."""
    images, unseen = pictures(10_000, seed), pictures(512, seed + 1)
    params = draw(shapes(vae), seed)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(_rise_and_fall(2e-3, updates), b2=0.99, weight_decay=1e-4))

    def loss(params, x, key):
        posterior: Any = vae.apply({"params": params}, x, method="encode")
        y = vae.apply({"params": params}, Posterior.sample(posterior, key), method="decode")
        kl = 0.5 * (jnp.square(posterior.mean) + jnp.square(posterior.std) - 1 - 2 * jnp.log(posterior.std))
        return jnp.square(y - x).mean() + KL_WEIGHT * kl.mean()

    @jax.jit
    def update(params, state, x, key):
        value, gradient = jax.value_and_grad(loss)(params, x / 127.5 - 1, key)
        change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state, value

    rng, state = np.random.default_rng(seed), optimizer.init(params)
    step = lambda i, p, s: update(p, s, images[rng.choice(len(images), batch)], jax.random.key(i))
    params = _loop("VAE", step, params, state, updates)

    @jax.jit
    def encode(params, x):
        posterior: Any = vae.apply({"params": params}, x, method="encode")
        return posterior.mean

    decode = jax.jit(lambda params, z: vae.apply({"params": params}, z, method="decode"))
    parts = lambda x: np.split(x, len(x) // 64)
    params = _standardised(params, np.concatenate([encode(params, x / 127.5 - 1) for x in parts(images[:4096])]))
    errors = [jnp.square(jnp.clip(decode(params, encode(params, x / 127.5 - 1)), -1, 1) - (x / 127.5 - 1)).mean() for x in parts(unseen)]
    return params, float(10 * np.log10(4 / np.mean(errors)))


def _standardised(params: dict[str, Any], latents: np.ndarray) -> dict[str, Any]:
    """The same autoencoder with z → (z - mean) / deviation at its middle, folded into the convolutions on both sides of it.

    Its posterior becomes NARROWER: a channel that the picture hardly needs has one as wide as its means or wider, and an image
    model would learn to paint that noise.
    """
    mean, std = latents.mean((0, 1, 2)), latents.std((0, 1, 2))
    quant, post = params["quant_conv"], params["post_quant_conv"]
    shrink = np.concatenate([std, np.ones_like(std)])  # the convolution gives means, then log-variances
    shift = np.concatenate([mean / std, 2 * np.log(std * NARROWER)])
    quant = {"weight": quant["weight"] / shrink, "bias": quant["bias"] / shrink - shift}
    weight = post["weight"]  # (1, 1, latent channels, latent channels)
    post = {"weight": weight * std[:, None], "bias": post["bias"] + mean @ weight[0, 0]}
    return {**params, "quant_conv": quant, "post_quant_conv": post}


def train_text_encoder(encoder: CLIPTextModel, tokenize, updates: int, seed: int, batch: int = 64) -> tuple[dict[str, Any], float]:
    """(parameters, share of unseen captions that are understood): what is drawn must be readable from the last state of a caption.

    CLIP learns that from pictures; here the scene behind a caption is known, and linear classifiers ask for it.
    """
    questions: dict[str, list] = {
        "thing": list(THINGS),
        "color": list(COLORS),
        "background": list(BACKGROUNDS),
        "front": [None, *DIRECTIONS],
    }
    rng = np.random.default_rng(seed)
    width = encoder.config.hidden_size
    fresh = draw(shapes(encoder), seed)
    heads = {name: jnp.asarray(rng.standard_normal((width, len(options)), np.float32) / width) for name, options in questions.items()}
    optimizer = optax.adamw(_rise_and_fall(2e-3, updates), weight_decay=1e-2)

    def examples(count: int):
        scenes = [random_scene(rng) for _ in range(count)]
        ids = tokenize([scene.caption(int(rng.integers(1 << 30))) for scene in scenes])
        return ids, {name: np.array([options.index(getattr(s, name)) for s in scenes]) for name, options in questions.items()}

    def logits(params, ids):
        states: Any = encoder.apply({"params": params["encoder"]}, ids)
        last = states[:, -1]  # padding is the end token, and sees all before it
        return {name: last @ head for name, head in params["heads"].items()}

    @jax.jit
    def update(params, state, ids, answers):
        def loss(params):
            losses = [optax.softmax_cross_entropy_with_integer_labels(v, answers[k]).mean() for k, v in logits(params, ids).items()]
            return jnp.stack(losses).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state, value

    both: dict[str, Any] = {"encoder": fresh, "heads": heads}
    both = _loop("text encoder", lambda i, p, s: update(p, s, *examples(batch)), both, optimizer.init(both), updates)
    ids, answers = examples(512)
    right = [np.asarray(v).argmax(-1) == answers[k] for k, v in jax.jit(logits)(both, ids).items()]
    return both["encoder"], float(np.all(right, axis=0).mean())


def widen_text_encoder(encoder: CLIPTextModel, teacher: dict[str, Any], tokenize, updates: int, seed: int, batch: int = 32):
    """(parameters, errors): the same encoder made to read other words and orders than the training's wordings have, and places.

    A caption as it is trained on keeps its states; a loose one (`loose`) gets at its padding, which is most of what the image model
    looks at, the states that a caption of the same scene has there. Where a caption says a place, a vector is added to them: one for
    left and right, one for up and down. errors: what is left of the differences, as shares of the states' variance.
    """
    rng = np.random.default_rng(seed)
    optimizer = optax.adamw(_rise_and_fall(2e-3, updates), weight_decay=0.0)
    vectors = PLACE * rng.standard_normal((2, encoder.config.hidden_size)).astype(np.float32)

    def examples(count: int):
        scenes = [random_scene(rng, str(rng.choice(["own", PLACED]))) for _ in range(count)]
        wordings = [int(rng.integers(1 << 30)) for _ in scenes]
        captions = [replace(scene, told=False).caption(wording) for scene, wording in zip(scenes, wordings, strict=True)]
        captions[0] = ""  # what guidance steers away from stays too
        said = [
            scene.caption(wording) if rng.random() < 0.5 else loose(scene, rng) for scene, wording in zip(scenes, wordings, strict=True)
        ]
        places = np.array([scene.place if scene.told else (0, 0) for scene in scenes[1:]], np.float32)
        return tokenize(captions), tokenize(said), np.concatenate([np.zeros((1, 2), np.float32), places]) @ vectors

    def differences(params, plain, wide, places):
        states = lambda params, ids: encoder.apply({"params": params}, ids)
        wanted: Any = states(teacher, plain)
        end = plain[:, -1:]
        padding = ((plain == end) & (wide == end))[..., None]
        variance = wanted.var()
        moved = wanted + jnp.sqrt(variance) * places[:, None]
        kept, widened = states(params, plain) - wanted, (states(params, wide) - moved) * padding
        return jnp.square(kept).mean() / variance, jnp.square(widened).mean() / padding.mean() / variance

    @jax.jit
    def update(params, state, *examples):
        value, gradient = jax.value_and_grad(lambda p: sum(differences(p, *examples)))(params)
        change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state, value

    params = _loop("text encoder", lambda i, p, s: update(p, s, *examples(batch)), teacher, optimizer.init(teacher), updates)
    kept, widened = jax.jit(differences)(params, *examples(512))
    return params, {"kept": float(kept), "widened": float(widened)}


def loose(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of the scene in no language: thing and background in either order, other words and plain letters strewn between."""
    pointing = f" {VERBS[scene.thing]} {scene.front}" if scene.front else ""
    subject = str(rng.choice([f"{scene.color} {scene.thing}{pointing}", f"{scene.thing} in {scene.color}{pointing}"]))
    ground = scene.background + str(rng.choice([" background", ""]))
    strewn = lambda: [
        str(rng.choice(OTHER_WORDS)) if rng.random() < 0.85 else "".join(rng.choice([*"abcdefghijklmnopqrstuvwxyz"], rng.integers(2, 6)))
        for _ in range(rng.integers(5))
    ]
    first, second = rng.permutation([subject, ground])
    place = [scene.caption(0, ("",)).strip()]  # "left:", or nothing
    return " ".join([*place, *strewn(), str(first), *strewn(), str(second), *strewn()]).strip()


def _rise_and_fall(peak: float, updates: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, peak, min(100, updates // 10), updates)


def _loop(name: str, step, params, state, updates: int):
    start = time.perf_counter()
    for i in range(updates):
        params, state, loss = step(i, params, state)
        if i % 100 == 0 or i == updates - 1:
            log.info("%s: update %d of %d, loss %.5f, %.0f s", name, i + 1, updates, float(loss), time.perf_counter() - start)
    return params
