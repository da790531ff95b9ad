"""Three AdamW updates, full and LoRA, against PyTorch: diffusers' UNetMotionModel, torch.optim.AdamW and PEFT, on the same draws."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from peft import LoraConfig

from anidiff_jax.config import TrainConfig
from anidiff_jax.training import setup
from anidiff_jax.training.state import make_optimizer
from anidiff_jax.training.step import denoising_loss
from anidiff_jax.weights.files import to_ours
from anidiff_jax.weights.tree import flatten, is_motion, unflatten
from tests import reference

UPDATES, CLIPS, FRAMES, SIDE = 3, 2, 3, 5
LAYERS = ".*motion_modules.*transformer_blocks.*"  # diffusers cannot run a PEFT LoRA on proj_in and proj_out
SETTINGS = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0.05, "sample_size": "16", "sample_n_frames": FRAMES}


@pytest.fixture(scope="module")
def networks(base, adapter):
    def make(kind, **settings):
        """(ours: config, task, what trains, frozen; theirs: the network, and its parameters that train under our names)"""
        config = TrainConfig(model_id_or_path=str(base), motion_adapter_id_or_path=str(adapter), sft_type=kind, **{**SETTINGS, **settings})
        model = setup.load(config)
        trained, frozen = setup.split_params(config, model)
        unet = UNet2DConditionModel.from_pretrained(base / "unet")
        theirs = UNetMotionModel.from_unet2d(unet, MotionAdapter.from_pretrained(adapter)).eval()
        theirs.requires_grad_(kind == "full")
        if kind == "lora":
            rng = np.random.default_rng(4)
            start = {k: rng.normal(0, 0.1, v.shape).astype(np.float32) for k, v in flatten(trained).items()}  # B too
            trained = unflatten({k: jnp.asarray(v) for k, v in start.items()})
            names = sorted({k.split(".lora_")[0] for k in start})
            theirs.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=names, lora_dropout=0.0))
            for name, p in theirs.named_parameters():
                if ".lora_" in name:
                    p.data = torch.tensor(start[name.replace(".default", "")].T.copy())
        chosen = {k.replace(".default", ""): p for k, p in theirs.named_parameters() if (is_motion(k) if kind == "full" else ".lora_" in k)}
        return config, setup.task(config, model), trained, frozen, theirs, chosen

    return make


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("full", {}),
        ("lora", {"trainable_modules": LAYERS, "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0}),
    ],
)
def test_three_updates_equal_pytorch(networks, kind, settings):
    config, task, trained, frozen, theirs, chosen = networks(kind, **settings)
    assert flatten(trained).keys() == chosen.keys()
    rng = np.random.default_rng(0)
    latents, text = rng.standard_normal((CLIPS, FRAMES, SIDE, SIDE + 1, 4), np.float32), rng.standard_normal((CLIPS, 77, 24), np.float32)
    optimizer = make_optimizer(config, 10)
    adamw = torch.optim.AdamW(chosen.values(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay)

    @jax.jit
    def update(params, state, keys):
        loss, grads = jax.value_and_grad(denoising_loss)(params, frozen, task, latents, text, keys)
        changes, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, changes), state, loss, grads

    params, state = trained, optimizer.init(trained)
    for i in range(UPDATES):
        keys = jax.random.split(jax.random.key(i), CLIPS)
        params, state, loss, grads = update(params, state, keys)
        expected = loss_of(theirs, latents, text, keys)
        adamw.zero_grad()
        expected.backward()
        assert float(loss) == pytest.approx(expected.item(), rel=1e-4)
        for name, gradient in flatten(grads).items():
            norm = np.linalg.norm(theirs_as_ours(name, chosen[name].grad))
            assert norm > 0, name
            assert np.linalg.norm(gradient - theirs_as_ours(name, chosen[name].grad)) <= 1e-4 * norm, (i, name)
        assert torch.nn.utils.clip_grad_norm_(chosen.values(), config.max_grad_norm) > config.max_grad_norm  # clipping takes part
        adamw.step()
    before = flatten(trained)
    ours = np.concatenate([np.ravel(np.asarray(v, np.float64) - before[k]) for k, v in flatten(params).items()])
    change = np.concatenate([np.ravel(theirs_as_ours(k, chosen[k].data).astype(np.float64) - before[k]) for k in flatten(params)])
    assert np.linalg.norm(ours - change) <= 1e-3 * np.linalg.norm(change)


def theirs_as_ours(name, tensor) -> np.ndarray:
    return to_ours(name, tensor.numpy())


def loss_of(unet, latents, text, keys):
    """The loss of the same question in PyTorch."""
    noisy, noises, timesteps = [], [], []
    for clip, key in zip(latents, keys, strict=True):
        for_step, for_noise, _ = jax.random.split(key, 3)
        timesteps.append(int(jax.random.randint(for_step, (), 0, 1000)))
        noises.append(torch.tensor(np.asarray(jax.random.normal(for_noise, clip.shape))))
        noisy.append(reference.ddim().add_noise(torch.tensor(clip), noises[-1], torch.tensor([timesteps[-1]])))
    sample = torch.stack(noisy).permute(0, 4, 1, 2, 3)  # b f h w c -> b c f h w
    states = torch.tensor(text).repeat_interleave(FRAMES, 0)
    predicted = unet(sample, torch.tensor(timesteps), states).sample.permute(0, 2, 3, 4, 1)
    return torch.nn.functional.mse_loss(predicted, torch.stack(noises))
