"""anidiff-jax's side of the benchmarks: each case prepares something, and gives a function to time that returns what it computed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anidiff_jax import AnimateDiffPipeline
from anidiff_jax.config import TrainConfig
from anidiff_jax.denoising import Program, Turn, numbers_of, step_of
from anidiff_jax.diffusion import solvers
from anidiff_jax.diffusion.guidance import Guidance
from anidiff_jax.models.flops import count_flops
from anidiff_jax.models.layers import Settings
from anidiff_jax.models.unet import UNet
from anidiff_jax.parallel import data_parallel, replicate, set_up_jax, to_devices
from anidiff_jax.random import purpose
from anidiff_jax.sampling import decode, encode
from anidiff_jax.training import setup
from anidiff_jax.training.state import TrainState, make_optimizer
from anidiff_jax.training.step import denoising_loss, make_update
from benchmarks.full_size import MODEL, Shape, clips, draws, inputs, training_cases

Run = Callable[..., Any]


def start() -> dict[str, Any]:
    """Versions and device; every program is compiled anew."""
    set_up_jax()
    jax.config.update("jax_enable_compilation_cache", False)
    return {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "platform": jax.devices()[0].platform}


def peak_device_gb() -> float | None:
    stats = jax.devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else None


def load(shape: Shape) -> AnimateDiffPipeline:
    return AnimateDiffPipeline.from_pretrained(MODEL, motion_adapter=MODEL / "motion_adapter", dtype=shape.dtype)


def matmul(shape: Shape) -> tuple[Run, float]:
    """The machine's own peak: a product of two square matrices."""
    side = 4096 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((side, side), shape.dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest" if shape.dtype == "float32" else None))
    return lambda: float(product(x, x)[0, 0].block_until_ready()), 2 * side**3


def forward(shape: Shape) -> tuple[Run, float]:
    """One UNet forward."""
    pipe, (x, text) = load(shape), inputs(shape)
    network, params = pipe.model.networks.unet, {"params": pipe.model.params["unet"]}
    compiled = jax.jit(network.apply).lower(params, x, jnp.array([500]), text).compile()
    return lambda: np.asarray(compiled(params, x, jnp.array([500]), text)), forward_flops(shape)


def cfg_step(shape: Shape) -> tuple[Run, float]:
    """One step of ddim with guidance: two forwards as a batch, and the solver."""
    pipe, (x, text) = load(shape), inputs(shape, texts=2)
    table, at = solvers.table(pipe.schedule, "ddim", 25), 12
    turn = Turn(np.int32(at), jax.tree.map(lambda v: v[at], table.rows), np.zeros(1, np.int32), np.zeros(2, np.float32))
    numbers, params = numbers_of(7.5, Guidance()), pipe.model.params["unet"]
    text, step = jnp.asarray(text[None]), step_of(Program(pipe.model.networks.unet), 1)
    return lambda: np.asarray(step(params, {}, numbers, turn, jnp.asarray(x[None]), text, None, None)[0])[0], 2 * forward_flops(shape)


def sample(shape: Shape, steps: int, guidance: float) -> tuple[Run, float]:
    """A whole video, from token ids to frames; or one of so few steps."""
    pipe, (x, _) = load(shape), inputs(shape)
    latents = x.transpose(0, 4, 1, 2, 3)  # b f h w c -> b c f h w
    how = {"num_frames": shape.frames, "height": shape.size, "width": shape.size, "guidance_scale": guidance}
    flops = steps * (2 if guidance > 1 else 1) * forward_flops(shape) + decode_flops(shape)
    return lambda steps=steps: pipe("a red circle moving right", latents=latents, num_inference_steps=steps, **how), flops


def sample_25(shape: Shape) -> tuple[Run, float]:
    """25 steps of ddim with guidance, and decoding."""
    return sample(shape, 25, 7.5)


def sample_4(shape: Shape) -> tuple[Run, float]:
    """4 steps without guidance, and decoding."""
    return sample(shape, 4, 1.0)


def vae_encode(shape: Shape) -> tuple[Run, float]:
    """The frames of a clip → latents."""
    pipe = load(shape)
    frames = clips(shape, 1)[0][0]
    network, params = pipe.model.networks.vae, pipe.model.params["vae"]
    return lambda: np.asarray(encode(network, params, frames)), encode_flops(shape)


def vae_decode(shape: Shape) -> tuple[Run, float]:
    """Latents → the frames of a clip."""
    pipe, (x, _) = load(shape), inputs(shape)
    return lambda: np.asarray(decode(pipe.model.networks.vae, pipe.model.params["vae"], x[0])), decode_flops(shape)


def train(shape: Shape, kind: str, remat: bool, batch: int = 1, cached: bool = True) -> tuple[Run, float]:
    """An optimizer update from latents or from pixels; gives the loss, of draws that `write_draws` wrote down for the other side."""
    config = TrainConfig(
        model_id_or_path=str(MODEL), motion_adapter_id_or_path=str(MODEL / "motion_adapter"), sft_type=kind, gradient_checkpointing=remat,
        sample_size=str(shape.size), sample_n_frames=shape.frames, batch_size=batch, lora_dropout=0.0,
        mixed_precision=shape.dtype != "float32",
        trainable_modules=".*motion_modules.*transformer_blocks.*" if kind == "lora" else ".*motion_modules.*",
    )  # fmt: skip
    model = setup.load(config)
    trained, frozen = setup.split_params(config, model)
    optimizer, task = make_optimizer(config, 1000), setup.task(config, model)
    (x, text), index = inputs(shape, batch, batch), np.arange(batch, dtype=np.uint32)
    clip = {"mean": x / model.networks.vae.config.scaling_factor, "std": np.zeros_like(x), "text": text}
    if not cached:
        clip = dict(zip(("pixels", "ids"), clips(shape, batch), strict=True))
    given = {name: value[None, None] for name, value in {**clip, "index": index}.items()}  # devices micro-batches …
    count = train_flops(task, trained, frozen, x, text) + (0 if cached else batch * encode_flops(shape))
    update = data_parallel(make_update(task, optimizer), jax.local_devices()[:1])
    state, frozen = replicate(TrainState.create(trained, optimizer)), replicate(frozen)
    model.params = {}
    batches = to_devices(given)

    def run():
        nonlocal state
        state, metrics = update(state, frozen, batches)
        return np.asarray(metrics["loss"])

    return run, count


def write_draws(shape: Shape) -> None:
    """What an update draws for its clips, the first of a training run."""
    keys = [jax.random.split(jax.random.fold_in(purpose(TrainConfig.seed, "clip"), i)) for i in range(4)]  # of the latents, of the loss
    split = [jax.random.split(key[1], 3) for key in keys]
    noise = lambda keys: np.stack([jax.random.normal(key, inputs(shape)[0].shape[1:]) for key in keys])
    steps = [int(jax.random.randint(key[0], (), 0, 1000)) for key in split]
    np.savez(draws(shape), timesteps=steps, noise=noise([key[1] for key in split]), posterior=noise([key[0] for key in keys]))


def forward_flops(shape: Shape) -> int:
    """Of one UNet forward."""
    network = _unet()
    side = shape.size // 8
    given = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, shape.frames, side, side, 4), (1, 77, 768))]
    ask = lambda p, x, text: network.apply({"params": p}, x, jnp.array([500]), text)
    return count_flops(ask, _shapes_of(network), *given)


def encode_flops(shape: Shape) -> int:
    """Of the VAE, over the frames of a clip."""
    return _vae_flops(shape, (1, shape.size, shape.size, 3), "encode")


def decode_flops(shape: Shape) -> int:
    return _vae_flops(shape, (1, shape.size // 8, shape.size // 8, 4), "decode")


def _vae_flops(shape: Shape, given: tuple[int, ...], method: str) -> int:
    from anidiff_jax.models.vae import AutoencoderKL, vae_config
    from benchmarks.full_size import VAE

    network = AutoencoderKL(vae_config(VAE), Settings(fast=False))
    ask = lambda p, x: network.apply({"params": p}, x, method=method)
    return shape.frames * count_flops(ask, _shapes_of(network), jax.ShapeDtypeStruct(given, jnp.float32))


def train_flops(task, trained, frozen, x, text) -> int:
    """What an update needs: forward and backward, without what gradient checkpointing repeats."""
    from dataclasses import replace

    plain = replace(task, networks=replace(task.networks, unet=_unet()))
    keys = jax.ShapeDtypeStruct((len(x),), jax.random.key(0).dtype)
    loss = lambda trained, unet, keys: denoising_loss(trained, {"unet": unet}, plain, jnp.asarray(x), jnp.asarray(text), keys)
    return count_flops(jax.grad(loss), trained, frozen["unet"], keys)


def _unet() -> UNet:
    from anidiff_jax.models.config import fresh_motion_config, unet_config
    from benchmarks.full_size import UNET

    return UNet(unet_config(UNET, fresh_motion_config(UNET, heads=8, max_frames=32)), Settings(fast=False))


def _shapes_of(network):
    from anidiff_jax.models.init import shapes

    return shapes(network)


CASES: dict[str, Callable[[Shape], tuple[Run, float]]] = {
    "matmul": matmul,
    "forward": forward,
    "cfg_step": cfg_step,
    "vae_encode": vae_encode,
    "vae_decode": vae_decode,
    "sample_25": sample_25,
    "sample_4": sample_4,
} | training_cases(train)
