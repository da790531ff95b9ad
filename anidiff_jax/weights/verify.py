"""Our networks against PyTorch diffusers' on the same files: for `convert/*.py --verify`, which need the extra `convert`."""

from pathlib import Path

import jax
import numpy as np

from anidiff_jax.errors import UserError
from anidiff_jax.weights.base import load_model

TOLERANCE = 1e-4  # of the largest magnitude of PyTorch's output


def verify(ours: Path, theirs: Path, our_adapter: Path | None = None, their_adapter: Path | None = None) -> float:
    """Runs the text encoder, the VAE and the UNet of both, and prints and returns the largest relative difference.

    ours: anything that load_model takes; theirs: folders in diffusers layout. UserError where they differ by more than rounding.
    """
    try:
        import torch
        from diffusers import AutoencoderKL, MotionAdapter, UNet2DConditionModel, UNetMotionModel
        from transformers import CLIPTextModel
    except ImportError as error:
        raise UserError(f"--verify needs {error.name}: pip install 'anidiff-jax[convert]'") from None

    model = load_model(ours, our_adapter)
    networks, params = model.networks, model.params
    config, rng = networks.unet.config, np.random.default_rng(0)
    frames, side = 2, 2 ** len(config.down)
    sample = rng.standard_normal((1, frames, side, side, config.in_channels), np.float32)
    ids = rng.integers(0, networks.text_encoder.config.vocab_size, (1, networks.text_encoder.config.max_length))
    images = rng.uniform(-1, 1, (1, 4 * networks.vae.config.factor, 4 * networks.vae.config.factor, 3)).astype(np.float32)

    with torch.inference_mode():
        text = CLIPTextModel.from_pretrained(theirs / "text_encoder", dtype=torch.float32).eval()(torch.tensor(ids)).last_hidden_state
        vae = AutoencoderKL.from_pretrained(theirs / "vae", torch_dtype=torch.float32).eval()
        latents = vae.encode(torch.tensor(images).permute(0, 3, 1, 2)).latent_dist.mean
        decoded = vae.decode(latents).sample
        unet = UNet2DConditionModel.from_pretrained(theirs / "unet", torch_dtype=torch.float32).eval()
        x, t = torch.tensor(sample).permute(0, 4, 1, 2, 3), torch.tensor([500])  # b f h w c -> b c f h w
        if their_adapter is not None:
            unet = UNetMotionModel.from_unet2d(unet, MotionAdapter.from_pretrained(their_adapter, torch_dtype=torch.float32)).eval()
            predicted = unet(x, t, text.repeat_interleave(frames, 0)).sample.permute(0, 2, 3, 4, 1)
        else:
            flat = unet(x[0].transpose(0, 1), t, text.repeat_interleave(frames, 0)).sample
            predicted = flat.permute(0, 2, 3, 1)[None]

    jitted = lambda network, **kwargs: jax.jit(lambda p, *x: network.apply({"params": p}, *x, **kwargs))
    channels_last = lambda x: x.permute(0, 2, 3, 1).numpy()
    text_states = text.numpy()
    pairs = {
        "text encoder": (jitted(networks.text_encoder)(params["text_encoder"], ids.astype(np.int32)), text_states),
        "VAE encoder": (jitted(networks.vae, method="encode")(params["vae"], images).mean, channels_last(latents)),
        "VAE decoder": (jitted(networks.vae, method="decode")(params["vae"], channels_last(latents)), channels_last(decoded)),
        "UNet": (jitted(networks.unet)(params["unet"], sample, np.array([500]), text_states), predicted.numpy()),
    }
    worst = 0.0
    for name, (a, b) in pairs.items():
        difference = float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())
        print(f"{name}: largest difference from PyTorch {difference:.1e} of the largest output")
        worst = max(worst, difference)
    if not worst <= TOLERANCE:
        raise UserError(f"the conversion is wrong: outputs differ from PyTorch's by {worst:.1e}, more than {TOLERANCE}")
    return worst
