"""PyTorch diffusers' side of the benchmarks, at its best: scaled dot product attention, channels_last, on GPUs torch.compile too."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AnimateDiffPipeline, AutoencoderKL, DDIMScheduler, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from transformers import CLIPTextModel

from benchmarks.full_size import MODEL, Shape, clips, draws, inputs, training_cases

Run = Callable[..., Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILED = False  # set by `start`


def start(compiled: bool = False) -> dict[str, Any]:
    import diffusers

    global COMPILED
    COMPILED = compiled
    torch.backends.cudnn.benchmark = True
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    return {"torch": torch.__version__, "diffusers": diffusers.__version__, "device": device}


def peak_device_gb() -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else None


def unet_of(shape: Shape) -> UNetMotionModel:
    dtype = getattr(torch, shape.dtype)
    image = UNet2DConditionModel.from_pretrained(MODEL / "unet", torch_dtype=dtype)
    adapter = MotionAdapter.from_pretrained(MODEL / "motion_adapter", torch_dtype=dtype)
    return best(UNetMotionModel.from_unet2d(image, adapter).eval())


def best(network):
    network = network.to(DEVICE)
    if DEVICE == "cuda":
        network = network.to(memory_format=torch.channels_last)
    return torch.compile(network) if COMPILED else network


def given(shape: Shape, batch: int = 1, texts: int = 1):
    """(latents b c f h w, text states of every frame) as diffusers' UNet takes them."""
    x, text = inputs(shape, batch, texts)
    dtype = getattr(torch, shape.dtype)
    latents = torch.tensor(x).permute(0, 4, 1, 2, 3).to(DEVICE, dtype)  # b f h w c -> b c f h w
    return latents, torch.tensor(text).repeat_interleave(shape.frames, 0).to(DEVICE, dtype)


def frames_last(x) -> np.ndarray:
    return x.float().cpu().permute(0, 2, 3, 4, 1).numpy()  # b c f h w -> b f h w c


def matmul(shape: Shape) -> Run:
    side = 4096 if DEVICE == "cpu" else 8192
    x = torch.ones(side, side, dtype=getattr(torch, shape.dtype), device=DEVICE)
    return lambda: float((x @ x)[0, 0])


def forward(shape: Shape) -> Run:
    unet, (x, text) = unet_of(shape), given(shape)
    return lambda: frames_last(no_grad(lambda: unet(x, torch.tensor([500], device=DEVICE), text).sample))


def cfg_step(shape: Shape) -> Run:
    unet, (x, text) = unet_of(shape), given(shape, texts=2)
    scheduler = recipe()
    scheduler.set_timesteps(25)

    def step():
        t = scheduler.timesteps[12].to(DEVICE)
        empty, prompt = unet(torch.cat([x, x]), t, text).sample.chunk(2)
        return scheduler.step(empty + 7.5 * (prompt - empty), t, x).prev_sample

    return lambda: frames_last(no_grad(step))


def recipe() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", steps_offset=1, clip_sample=False, set_alpha_to_one=True,
        timestep_spacing="leading",
    )  # fmt: skip


def sample(shape: Shape, steps: int, guidance: float) -> Run:
    dtype = getattr(torch, shape.dtype)
    adapter = MotionAdapter.from_pretrained(MODEL / "motion_adapter", torch_dtype=dtype)
    pipe = AnimateDiffPipeline.from_pretrained(MODEL, motion_adapter=adapter, torch_dtype=dtype).to(DEVICE)
    pipe.scheduler, latents = recipe(), given(shape)[0]
    pipe.unet, pipe.vae = best(pipe.unet), best(pipe.vae)
    pipe.set_progress_bar_config(disable=True)
    how = {
        "num_frames": shape.frames, "height": shape.size, "width": shape.size, "guidance_scale": guidance, "output_type": "np",
        "decode_chunk_size": max(1, 512**2 // shape.size**2),
    }  # fmt: skip
    return lambda steps=steps: pipe("a red circle moving right", latents=latents, num_inference_steps=steps, **how).frames


def sample_25(shape: Shape) -> Run:
    return sample(shape, 25, 7.5)


def sample_4(shape: Shape) -> Run:
    return sample(shape, 4, 1.0)


def vae_of(shape: Shape) -> AutoencoderKL:
    return best(AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=getattr(torch, shape.dtype)).eval())


def vae_encode(shape: Shape) -> Run:
    vae = vae_of(shape)
    x = (torch.tensor(clips(shape, 1)[0][0]).permute(0, 3, 1, 2) / 127.5 - 1).to(DEVICE, getattr(torch, shape.dtype))
    part = lambda p: vae.encode(p).latent_dist.mode().float().cpu() * vae.config.scaling_factor
    return lambda: torch.cat([no_grad(lambda p=p: part(p)) for p in x.split(4)]).permute(0, 2, 3, 1).numpy()


def vae_decode(shape: Shape) -> Run:
    vae, (x, _) = vae_of(shape), given(shape)
    z = x[0].transpose(0, 1) / vae.config.scaling_factor  # c f h w -> f c h w
    part = lambda p: (vae.decode(p).sample.float() / 2 + 0.5).clamp(0, 1).cpu()
    return lambda: torch.cat([no_grad(lambda p=p: part(p)) for p in z.split(4)]).permute(0, 2, 3, 1).numpy()


def train(shape: Shape, kind: str, remat: bool, batch: int = 1, cached: bool = True) -> Run:
    """AdamW on what trains, in float32; the rest in the shape's type, and autocast where that is bfloat16."""
    from peft import LoraConfig

    unet = unet_of(shape)
    unet.requires_grad_(False)
    if kind == "full":
        for name, p in unet.named_parameters():
            if "motion_modules" in name:
                p.data = p.data.float()
                p.requires_grad_(True)
    else:
        layers = r".*motion_modules.*transformer_blocks.*\.(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)"
        unet.add_adapter(LoraConfig(r=8, lora_alpha=32, target_modules=layers, lora_dropout=0.0))
    if remat:
        unet.enable_gradient_checkpointing()
    unet.train()
    chosen = [p for p in unet.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(chosen, lr=1e-4, weight_decay=0.01, fused=DEVICE == "cuda")
    drawn = {name: x[:batch] for name, x in np.load(draws(shape)).items()}
    channels = lambda x: torch.tensor(x).permute(0, 4, 1, 2, 3).to(DEVICE)  # b f h w c -> b c f h w
    timesteps, noise, posterior = torch.tensor(drawn["timesteps"], device=DEVICE), channels(drawn["noise"]), channels(drawn["posterior"])
    known = given(shape, batch, batch)
    clip = (lambda: known) if cached else encoder(shape, batch, posterior)

    def update():
        latents, text = clip()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=shape.dtype == "bfloat16"):
            predicted = unet(recipe().add_noise(latents.float(), noise, timesteps).to(latents.dtype), timesteps, text).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), noise)
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        adamw.step()
        return np.asarray(loss.item(), np.float32)

    return update


def encoder(shape: Shape, batch: int, noise) -> Callable:
    """() → what `given` gives, of a clip's pixels and tokens, with `noise` in the VAE's posterior."""
    vae, (pixels, ids) = vae_of(shape), clips(shape, batch)
    dtype = getattr(torch, shape.dtype)
    text_encoder = best(CLIPTextModel.from_pretrained(MODEL / "text_encoder", torch_dtype=dtype).eval())

    @torch.no_grad()  # not inference_mode, of which nothing may be trained on
    def encode():
        frames = torch.tensor(pixels).flatten(0, 1).permute(0, 3, 1, 2).to(DEVICE) / 127.5 - 1  # b f h w c -> (b f) c h w
        found = [vae.encode(part.to(dtype)).latent_dist for part in frames.split(4)]
        mean, std = (
            torch.cat([getattr(p, name) for p in found]).float().unflatten(0, (batch, -1)).transpose(1, 2) for name in ("mean", "std")
        )
        text = text_encoder(torch.tensor(ids, dtype=torch.long, device=DEVICE)).last_hidden_state
        return ((mean + std * noise) * vae.config.scaling_factor).to(dtype), text.repeat_interleave(shape.frames, 0)

    return encode


def no_grad(run):
    with torch.inference_mode():
        return run()


CASES: dict[str, Callable[[Shape], Run]] = {
    "matmul": matmul,
    "forward": forward,
    "cfg_step": cfg_step,
    "vae_encode": vae_encode,
    "vae_decode": vae_decode,
    "sample_25": sample_25,
    "sample_4": sample_4,
} | training_cases(train)
