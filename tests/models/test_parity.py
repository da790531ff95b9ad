"""Our networks against PyTorch diffusers and transformers, fp32, on random weights in which nothing is zero or one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNetMotionModel

from anidiff_jax.models import layers
from anidiff_jax.models.clip import CLIPTextModel, clip_config
from anidiff_jax.models.config import motion_config, unet_config
from anidiff_jax.models.init import draw, shapes
from anidiff_jax.models.layers import Settings
from anidiff_jax.models.unet import UNet
from anidiff_jax.models.vae import AutoencoderKL, encode_frames, vae_config
from anidiff_jax.sampling import decode, encode
from anidiff_jax.weights.files import to_ours
from anidiff_jax.weights.tree import flatten, is_buffer, is_motion, merge, split, unflatten
from tests import reference
from tests.reference import close


def ours(model: torch.nn.Module):
    """The parameters of a PyTorch model (and the position tables, which are buffers) as our tree."""
    return unflatten({k: jnp.asarray(to_ours(k, v.detach().numpy())) for k, v in model.state_dict().items() if "position_ids" not in k})


def build(unet, adapter=None, **settings):
    """(diffusers' network, ours, our parameters)"""
    motion = None
    if adapter is not None:
        shapes = {k: v.shape for k, v in adapter.state_dict().items()}
        motion = motion_config(dict(adapter.config), shapes, unet.config.norm_num_groups)
        theirs = UNetMotionModel.from_unet2d(unet, adapter).eval()
    else:
        theirs = unet
    network = UNet(unet_config(dict(unet.config), motion), Settings(**settings))
    return theirs, network, ours(theirs)


def inputs(b, f, h, w, text=24, seed=0):
    rng = np.random.default_rng(seed)
    sample = rng.standard_normal((b, f, h, w, 4), np.float32)
    return sample, np.array([3, 981][:b], np.int32), rng.standard_normal((b, 7, text), np.float32)


def run_theirs(model, sample, timesteps, text, motion=True):
    x, t, e = torch.tensor(sample), torch.tensor(timesteps), torch.tensor(text)
    if motion:
        e = e.repeat_interleave(sample.shape[1], 0)  # the pipeline repeats the text for every frame
        return model(x.permute(0, 4, 1, 2, 3), t, e).sample.permute(0, 2, 3, 4, 1)  # b f h w c <-> b c f h w
    b, f = sample.shape[:2]
    y = model(x.flatten(0, 1).permute(0, 3, 1, 2), t.repeat_interleave(f), e.repeat_interleave(f, 0)).sample
    return y.permute(0, 2, 3, 1).unflatten(0, (b, f))


def test_unet_in_bfloat16():
    """As near to PyTorch's float32 as PyTorch's own bfloat16."""
    theirs, network, params = build(reference.unet(), reference.adapter(), dtype="bfloat16")
    sample, timesteps, text = inputs(1, 3, 6, 8)
    half = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    found = jax.jit(lambda p: network.apply({"params": p}, sample, timesteps, text))(half)
    with torch.inference_mode():
        exact = run_theirs(theirs, sample, timesteps, text).numpy()
        rounded = UNetMotionModel.from_config(theirs.config).to(torch.bfloat16).eval()
        rounded.load_state_dict(theirs.state_dict())
        x, e = (torch.tensor(v).bfloat16() for v in (sample, text))
        own = rounded(x.permute(0, 4, 1, 2, 3), torch.tensor(timesteps), e.repeat_interleave(3, 0)).sample.permute(0, 2, 3, 4, 1).float()
    away = lambda y: float(np.linalg.norm(np.asarray(y, np.float32) - exact) / np.linalg.norm(exact))
    assert 1e-4 < away(found) < 1.5 * away(own) < 0.1


CASES = {
    "v2, odd frames": ({}, {}, (2, 5, 8, 8)),
    "v3, no mid motion, odd sizes": ({}, {"use_motion_mid_block": False}, (1, 3, 7, 9)),
    "SD 2: linear projection, heads a block": (
        {"use_linear_projection": True, "attention_head_dim": (2, 4), "upcast_attention": True},
        {"motion_num_attention_heads": 4},
        (2, 2, 6, 4),
    ),
    "several transformer layers, asymmetric blocks": (
        {"transformer_layers_per_block": (2, 1), "layers_per_block": (1, 2), "mid_block_scale_factor": 1.3},
        {"motion_layers_per_block": (1, 2), "motion_transformer_layers_per_block": 2, "motion_transformer_layers_per_mid_block": 3},
        (1, 4, 5, 6),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_unet_with_motion(case):
    unet_changes, motion_changes, shape = CASES[case]
    theirs, network, params = build(reference.unet(**unet_changes), reference.adapter(**motion_changes))
    x = inputs(*shape)
    with torch.no_grad():
        expected = run_theirs(theirs, *x)
    close(jax.jit(network.apply)({"params": params}, *x), expected)


def test_unet_without_motion():
    theirs, network, params = build(reference.unet(transformer_layers_per_block=2))
    x = inputs(2, 3, 8, 6)
    with torch.no_grad():
        expected = run_theirs(theirs, *x, motion=False)
    assert not network.config.has_motion
    close(jax.jit(network.apply)({"params": params}, *x), expected)


@pytest.mark.parametrize("settings", [{}, {"attention": "chunked", "remat": True}], ids=["plain", "chunked and remat"])
def test_gradients_of_every_motion_parameter(settings, monkeypatch):
    if settings:
        monkeypatch.setattr(layers, "ROWS_AT_ONCE", 24)  # the feed-forward in chunks, as arrays of full size are on a CPU
    theirs, network, params = build(reference.unet(), reference.adapter(), **settings)
    x = inputs(2, 5, 6, 8)
    weights = np.random.default_rng(9).standard_normal(x[0].shape, np.float32)
    (run_theirs(theirs, *x) * torch.tensor(weights)).sum().backward()
    expected = {k: to_ours(k, p.grad.numpy()) for k, p in theirs.named_parameters() if is_motion(k)}

    motion, image = split(params, lambda key: is_motion(key) and not is_buffer(key))
    scalar = lambda motion: (network.apply({"params": merge(image, motion)}, *x) * weights).sum()
    gradients = flatten(jax.jit(jax.grad(scalar))(motion))
    assert gradients.keys() == expected.keys()
    assert len(expected) == 7 * 26
    for key, gradient in gradients.items():
        close(gradient, expected[key])


UNUSUAL = {"layers_per_block": 2, "mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False}


@pytest.mark.parametrize(("changes", "side"), [({}, (16, 24)), (UNUSUAL, (12, 20))])
def test_vae(changes, side):
    theirs = reference.vae(**changes)
    network, params = AutoencoderKL(vae_config(dict(theirs.config))), {"params": ours(theirs)}
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, *side, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(torch.tensor(images).permute(0, 3, 1, 2)).latent_dist
        latents = 3 * torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
        decoded = theirs.decode(latents).sample
    encoded = jax.jit(lambda p, x: network.apply(p, x, method="encode"))(params, images)
    close(encoded.mean, posterior.mean.permute(0, 2, 3, 1))
    close(encoded.std, posterior.std.permute(0, 2, 3, 1))
    ours_decoded = jax.jit(lambda p, z: network.apply(p, z, method="decode"))(params, latents.permute(0, 2, 3, 1).numpy())
    close(ours_decoded, decoded.permute(0, 2, 3, 1))


def test_latents_are_scaled_and_shifted_as_the_vae_says():
    theirs = reference.vae(scaling_factor=0.3, shift_factor=0.2)
    network, params = AutoencoderKL(vae_config(dict(theirs.config))), ours(theirs)
    frames = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    with torch.no_grad():
        latents = (theirs.encode(torch.tensor(frames).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean - 0.2) * 0.3
        decoded = (theirs.decode(latents / 0.3 + 0.2).sample / 2 + 0.5).clamp(0, 1)
    found = encode(network, params, frames)
    close(found, latents.permute(0, 2, 3, 1))
    close(decode(network, params, found), decoded.permute(0, 2, 3, 1))


@pytest.mark.parametrize(("side", "turns"), [(256, 2), (512, 2), (768, 8)])
def test_large_frames_are_encoded_one_by_one(side, turns):
    """The encoder's memory grows with the pixels: of eight frames, four at a time up to 512²."""
    network = AutoencoderKL(vae_config(dict(reference.vae().config)))
    frames = jax.ShapeDtypeStruct((8, side, side, 3), np.uint8)
    assert f"length={turns}\n" in str(jax.make_jaxpr(lambda p, x: encode_frames(network, p, x).mean)(shapes(network), frames))


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_text_encoder(act):
    theirs = reference.text_encoder(50, hidden_act=act)
    network, params = CLIPTextModel(clip_config(theirs.config.to_dict())), ours(theirs)
    if "text_model" not in params:
        params = {"text_model": params}
    ids = np.random.default_rng(0).integers(0, 50, (3, 77)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), output_hidden_states=True)
    close(network.apply({"params": params}, ids), expected.last_hidden_state)
    norm = getattr(theirs, "text_model", theirs).final_layer_norm
    with torch.no_grad():
        skipped = norm(expected.hidden_states[-2])
    close(network.apply({"params": params}, ids, 1), skipped)


def test_fresh_motion_modules_leave_the_image_model_as_it_is():
    _, network, params = build(reference.unet(), reference.adapter())
    _, image_network, image = build(reference.unet())
    fresh, _ = split(draw(shapes(network), 0), is_motion)
    x = inputs(1, 4, 8, 8)
    with_motion = jax.jit(network.apply)({"params": merge(image, fresh)}, *x)
    close(with_motion, jax.jit(image_network.apply)({"params": image}, *x), 1e-6)  # compiled apart, so rounded apart
    table = "mid_block.motion_modules.0.transformer_blocks.0.pos_embed.pe"
    close(flatten(fresh)[table], flatten(params)[table], 1e-6)
