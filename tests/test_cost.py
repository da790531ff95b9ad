"""What a step costs, in figures that do not depend on the machine: a change that makes it dearer fails here.

The figures are of the embedded model's networks on a CPU, with the tests' own XLA flags. After a change that is meant to be dearer or
cheaper: python -m tests.test_cost, which prints them anew.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anidiff_jax import AnimateDiffPipeline
from anidiff_jax.config import TrainConfig
from anidiff_jax.denoising import Program, Turn, numbers_of, step_of
from anidiff_jax.diffusion import solvers
from anidiff_jax.diffusion.guidance import Guidance
from anidiff_jax.diffusion.schedule import NoiseSchedule
from anidiff_jax.models.flops import count_flops
from anidiff_jax.models.layers import Settings
from anidiff_jax.models.unet import UNet
from anidiff_jax.parallel import data_parallel, replicate, split_batch, to_devices
from anidiff_jax.training import setup
from anidiff_jax.training.state import TrainState, make_optimizer
from anidiff_jax.training.step import make_update
from tests import conftest  # its flags, when this is run by itself

FRAMES, SIDE = 8, 64
# gigaflops and megabytes of temporary memory, as XLA says of the compiled step
SAMPLING = (7.10, 10.4)
LORA = (0.0407, 2.20)  # of the tests' own tiny networks
FULL = (9.04, 147.6)
SLACK = 1.1


@pytest.fixture(scope="module")
def compilations():
    """compilations() → how many programs have been compiled, or fetched, so far"""
    seen = []
    listen = lambda event, duration_secs, **_: seen.append(event) if event.endswith("backend_compile_duration") else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: len(seen)


def sampling_step():
    pipe = AnimateDiffPipeline.from_pretrained()
    shape = (FRAMES, SIDE // pipe.model.networks.vae.config.factor, SIDE // pipe.model.networks.vae.config.factor)
    latents = jnp.zeros((1, 1, *shape, pipe.model.networks.vae.config.latent_channels))
    row = jax.tree.map(lambda x: x[0], solvers.table(NoiseSchedule(), "ddim", 25).rows)
    turn = Turn(np.int32(0), row, np.zeros(1, np.int32), np.zeros(2, np.float32))
    text = jnp.zeros((1, 2, 77, pipe.model.networks.unet.config.cross_attention_dim))
    numbers = numbers_of(5.0, Guidance())
    program = Program(pipe.model.networks.unet)
    return step_of(program, 1).lower(pipe.model.params["unet"], {}, numbers, turn, latents, text, None, None).compile()


def training(kind: str, base=None, adapter=None, side: int = SIDE, frames: int = FRAMES):
    """(update, state, frozen, batch) of the embedded model, or of others."""
    models = {name: str(path) for name, path in (("model_id_or_path", base), ("motion_adapter_id_or_path", adapter)) if path}
    config = TrainConfig(sft_type=kind, sample_size=str(side), sample_n_frames=frames, lora_dropout=0.0, **models)
    model = setup.load(config)
    trained, frozen = setup.split_params(config, model)
    optimizer = make_optimizer(config, 10)
    devices = jax.local_device_count()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (devices, frames, side, side, 3), np.uint8)
    batch = {"pixels": pixels, "ids": np.zeros((devices, 77), np.int32), "index": np.arange(devices, dtype=np.uint32)}
    update = data_parallel(make_update(setup.task(config, model), optimizer))
    return update, replicate(TrainState.create(trained, optimizer)), replicate(frozen), to_devices(split_batch(batch, 1))


def figures(compiled) -> tuple[float, float]:
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return analysis["flops"] / 1e9, compiled.memory_analysis().temp_size_in_bytes / 1e6


def no_dearer(compiled, known) -> None:
    for now, before, what in zip(figures(compiled), known, ("GFLOP", "MB of temporary memory"), strict=True):
        assert before / SLACK / SLACK <= now <= SLACK * before, f"{now:.2f} {what}, known are {before}"


def test_a_step_of_sampling():
    no_dearer(sampling_step(), SAMPLING)


def test_updates_compile_once_copy_nothing_and_are_no_dearer(base, adapter, compilations):
    update, state, frozen, batch = training("lora", base, adapter, 16, 3)
    compiled = update.lower(state, frozen, batch).compile()
    no_dearer(compiled, LORA)
    first = lambda tree: [x.addressable_data(0) for x in jax.tree.leaves(tree)]
    state, _ = update(state, frozen, batch)
    before, weights = compilations(), [x.unsafe_buffer_pointer() for x in first(frozen)]
    for _ in range(2):
        state, metrics = update(state, frozen, batch)
    jax.block_until_ready(metrics)
    assert compilations() == before
    assert weights == [x.unsafe_buffer_pointer() for x in first(frozen)]
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves((state, frozen)))


def test_gradient_checkpointing_repeats_little(pipe):
    """The feed-forward's wide layer and the attention itself; on a CPU, 1.11 at full size."""
    unet, params = pipe.model.networks.unet, jax.eval_shape(lambda: pipe.model.params["unet"])
    latents = jax.ShapeDtypeStruct((1, FRAMES, 8, 8, unet.config.in_channels), jnp.float32)
    text = jax.ShapeDtypeStruct((1, 77, unet.config.cross_attention_dim), jnp.float32)

    def count(remat):
        network = UNet(unet.config, Settings(remat=remat))
        loss = lambda params, x, text: network.apply({"params": params}, x, jnp.array([500]), text).sum()
        return count_flops(jax.grad(loss), params, latents, text)

    assert 1.0 < count(True) / count(False) < 1.2


@pytest.mark.soak
def test_full_updates_are_no_dearer():
    update, *given = training("full")  # of the embedded model
    no_dearer(update.lower(*given).compile(), FULL)


def test_other_prompts_seeds_steps_and_strengths_compile_nothing(pipe, compilations):
    sizes = {"num_frames": 4, "height": 32, "width": 32}
    video = lambda prompt, **how: pipe(prompt, **sizes, **{"num_inference_steps": 2, "guidance_scale": 5.0, **how})
    video("a star", guidance_rescale=0.5)
    video("a star", init_image=np.zeros((9, 9, 3)), guidance_rescale=0.5, strength=0.5)
    before = compilations()
    video("a red circle, " * 3, guidance_rescale=0.1, seed=7, num_inference_steps=5)
    video("a (star:1.2)", guidance_rescale=0.2, negative_prompt="grey", guidance_scale=3.0)
    video("a star", init_image=np.ones((9, 9, 3)), guidance_rescale=0.3, strength=1.0, num_inference_steps=3)
    assert compilations() == before


def test_little_goes_to_the_device_in_a_step(pipe, monkeypatch):
    """Weights, text and latents lie there; numbers of a few hundred bytes are sent."""
    sent = []

    def watched(program, videos):
        def step(*given):
            sent.append(sum(np.asarray(x).nbytes for x in jax.tree.leaves(given) if not isinstance(x, jax.Array)))
            return given[4], 0

        return step

    monkeypatch.setattr("anidiff_jax.denoising.step_of", watched)
    pipe("a star", num_frames=4, height=32, width=32, num_inference_steps=3)
    assert len(sent) == 3
    assert max(sent) < 500


if __name__ == "__main__":
    print(conftest.CACHE)
    print("SAMPLING", figures(sampling_step()))
    update, *given = training("full")
    print("FULL", figures(update.lower(*given).compile()))
    print("LORA is told by the test that fails")
