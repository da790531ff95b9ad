"""Trains the embedded model from nothing, in pieces that can be stopped and gone on with; prints settings, times and scores.

    python -m anidiff_jax.shapes.build --work build --output anidiff_jax/shapes/model

Stages, each kept in the work folder when it is done: clips → text encoder, widened → VAE → image model (train.py on single frames, all
parameters) → motion adapter (train.py --sft_type full) → the packed model with its card. Image and motion stage are runs of
train.py, each from the weights of the one before. To train on: add rounds at the end of the lists below, or begin with --start MODEL and
say with --image_rounds_done and --motion_rounds_done how many it has been through.
"""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from anidiff_jax.config import EMBEDDED_PROMPTS
from anidiff_jax.shapes.clips import write_clips
from anidiff_jax.shapes.demo import flags
from anidiff_jax.shapes.render import FRONTS, PLACED
from anidiff_jax.shapes.tiny_model import (
    HEADS,
    MAX_FRAMES,
    SCHEDULER,
    UNET,
    fresh_unet,
    pack,
    text_config,
    tokenizer_folder,
    write_base,
    write_part,
)
from anidiff_jax.weights.files import read_json
from anidiff_jax.weights.store import STEMS

log = logging.getLogger(__name__)
ROOT = Path(__file__).parent.parent.parent
SEED = 7  # of the text encoder and the VAE
CLIPS: dict[str, dict] = {  # folder → what is rendered into it
    "clips": {"count": 3000, "seed": 7},
    "stills": {"count": 5000, "seed": 9, "motion": PLACED, "frames": 2},
    "fronts": {"count": 2500, "seed": 8, "things": tuple(FRONTS)},
    "mixed": {"count": 2000, "seed": 10},
}
TEXT_UPDATES, WIDE_TEXT_UPDATES = 1500, 1500
VAE_UPDATES = 1300
DEVICES = 2  # that a CPU is split into: each works on half of a batch, which keeps two cores busier than one device does
IMAGE_BATCH, MOTION_BATCH = 32, 8  # clips an update
STEADY = "constant_with_warmup"
FRONTS_ONLY = {"clips": "fronts", "lr_scheduler_type": STEADY, "ema_decay": 0.998}
NOISIER = {"clips": "mixed", "timestep_bias_begin": 600, "timestep_bias_multiplier": 3}
# What differs between the runs of train.py. The first two learned colours and backgrounds, hardly outlines: the plain loss of the velocity
# looks at high noise, where these are not decided yet. (When the shipped model was made, the first saw things a third smaller than now,
# and none of the first five words for places in the text encoder.)
IMAGE_ROUNDS: list[dict] = [
    {"max_steps": 2400, "learning_rate": 1.5e-3, "seed": 7},
    {"max_steps": 4800, "learning_rate": 1.5e-3, "seed": 8},
    {"max_steps": 1600, "learning_rate": 1.2e-3, "snr_gamma": 5, "ema_decay": 0.998, "seed": 9},
    {
        "max_steps": 5133,
        "learning_rate": 1.2e-3,
        "lr_scheduler_type": STEADY,
        "snr_gamma": 5,
        "ema_decay": 0.999,
        "seed": 10,
    },
    {"max_steps": 3400, "learning_rate": 1.0e-3, "snr_gamma": 5, "ema_decay": 0.998, "seed": 11},
    # Words for places, first where places are decided, then outlines again.
    {"clips": "stills", "max_steps": 800, "learning_rate": 1e-3, "lr_scheduler_type": STEADY, "ema_decay": 0.995, "seed": 12},
    {"clips": "stills", "max_steps": 1800, "learning_rate": 1e-3, "snr_gamma": 5, "ema_decay": 0.998, "seed": 13},
    {"clips": "stills", "max_steps": 2600, "learning_rate": 8e-4, "snr_gamma": 5, "ema_decay": 0.998, "seed": 14},
]
# The first two learned smoothness, no direction; the third a little of it (inverse_snr then took the velocity's error away at the noisiest
# steps, which it does no more). From the fourth on, noisy steps only and things with a front only: there it came. The last is on all clips
# and all steps. (When the shipped model was made, the first four saw the image model that did not know places.)
MOTION_ROUNDS: list[dict] = [
    {"max_steps": 2600, "learning_rate": 1.5e-3, "ema_decay": 0.998, "seed": 21, "sample_stride": 1},
    {"max_steps": 1200, "learning_rate": 1.5e-3, "ema_decay": 0.998, "seed": 22},
    {**FRONTS_ONLY, "max_steps": 600, "learning_rate": 1.5e-3, "seed": 23, "loss_weighting": "inverse_snr"},
    {**FRONTS_ONLY, "max_steps": 300, "learning_rate": 2e-3, "seed": 24, "min_timestep": 650},
    {**FRONTS_ONLY, "max_steps": 1200, "learning_rate": 1.5e-3, "seed": 25, "min_timestep": 600},
    {"max_steps": 900, "learning_rate": 1.2e-3, "ema_decay": 0.995, "seed": 26},
    {**NOISIER, "max_steps": 1500, "learning_rate": 1.5e-3, "ema_decay": 0.998, "seed": 27},
]
COMMON = {
    "sft_type": "full",
    "gradient_accumulation_steps": 1,
    "eval_steps": 100_000,
    "weight_decay": 0.0,
    "sample_size": 64,
    "sample_stride": 1,
    "guidance_scale": 5,
    "validation_prompts_path": EMBEDDED_PROMPTS,
    "dataloader_num_workers": 2,
}  # fmt: skip
IMAGE = {"trainable_modules": ".*", "sample_n_frames": 1}
MOTION = {
    "sample_n_frames": 8,
    "sample_stride": 2,
    "save_steps": 300,
    "motion_num_attention_heads": HEADS,
    "motion_max_seq_length": MAX_FRAMES,
}


def stage(done: Path, make: Callable[[Path], object]) -> Path:
    """Runs `make` with a folder to fill, unless `done` exists; it appears under that name only when it is whole."""
    if not done.exists():
        part = done.with_name(f".{done.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        start = time.perf_counter()
        said = make(part)
        entry = {"stage": done.name, "seconds": round(time.perf_counter() - start), **(said if isinstance(said, dict) else {})}
        (part / "stage.json").write_text(json.dumps(entry) + "\n")
        part.rename(done)
        print(json.dumps(entry), flush=True)
    return done


def make_text_encoder(out: Path) -> dict:
    from anidiff_jax.shapes.pretrain import train_text_encoder

    encoder, tokenize = text_encoder()
    params, understood = train_text_encoder(encoder, tokenize, TEXT_UPDATES, SEED)
    write_part(params, text_config(), out, STEMS["text_encoder"])
    return {"updates": TEXT_UPDATES, "unseen captions understood": understood}


def make_wide_text_encoder(work: Path, out: Path) -> dict:
    from anidiff_jax.models.init import shapes
    from anidiff_jax.shapes.pretrain import widen_text_encoder
    from anidiff_jax.weights.files import load
    from anidiff_jax.weights.sources import NAMES
    from anidiff_jax.weights.store import tensors_in

    encoder, tokenize = text_encoder()
    tensors = NAMES["text_encoder"](tensors_in(work / "text_encoder", STEMS["text_encoder"]), work)
    teacher, _ = load(shapes(encoder), tensors, lambda _: "float32", work)
    params, left = widen_text_encoder(encoder, teacher, tokenize, WIDE_TEXT_UPDATES, SEED)
    write_part(params, text_config(), out, STEMS["text_encoder"])
    return {"updates": WIDE_TEXT_UPDATES, **left}


def text_encoder():
    """(network, captions → token ids)"""
    from anidiff_jax.models.clip import CLIPTextModel, clip_config
    from anidiff_jax.weights.base import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder())
    tokenize = lambda captions: np.array(tokenizer(captions, padding="max_length", max_length=77)["input_ids"], np.int32)
    return CLIPTextModel(clip_config(text_config())), tokenize


def make_vae(out: Path) -> dict:
    from anidiff_jax.models.vae import AutoencoderKL, vae_config
    from anidiff_jax.shapes.pretrain import train_vae
    from anidiff_jax.shapes.tiny_model import VAE

    params, psnr = train_vae(AutoencoderKL(vae_config(VAE)), VAE_UPDATES, SEED)
    write_part(params, VAE, out, STEMS["vae"])
    return {"updates": VAE_UPDATES, "PSNR in dB": round(psnr, 2)}


def train(base: Path, work: Path, batch: int, settings: dict, out: Path) -> dict:
    """One run of train.py on the clips that the settings name; its last checkpoint becomes `out`/checkpoint."""
    name = settings.get("clips", "clips")
    clips = stage(work / name, lambda out: {**CLIPS[name], "csv": write_clips(out, **CLIPS[name]).name})
    given = {key: value for key, value in settings.items() if key != "clips"}
    data = {"csv_path": clips / "clips.csv", "video_folder": clips, "latent_cache": work / f"{name}-latents"}
    run = {"model_id_or_path": base, "output_dir": out / "run", "batch_size": batch // DEVICES}
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"}
    words = [sys.executable, "train.py", *map(str, flags({**run, **data, **COMMON, **given}))]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True, env=environment)
    Path(done.stdout.splitlines()[-1]).rename(out / "checkpoint")
    return {name: str(value) for name, value in settings.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build"), help="folder for clips and stages; what is in it is gone on with")
    parser.add_argument("--output", type=Path, required=True, help="the model in diffusers layout, float16; replaced if it exists")
    parser.add_argument("--start", type=Path, help="a model made so before, to train on: its text encoder and VAE stay as they are")
    parser.add_argument("--image_rounds_done", type=int, default=0, help="with --start: rounds of the image model that it has been through")
    parser.add_argument("--motion_rounds_done", type=int, default=0, help="with --start: the same of its motion modules")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("jax").setLevel(logging.WARNING)
    work = args.work.resolve()

    adapter: Path | None = None
    if args.start:
        text, vae, unet, adapter = (args.start / name for name in ("text_encoder", "vae", "unet", "motion_adapter"))
    else:
        stage(work / "text_encoder", make_text_encoder)
        text = stage(work / "wide_text_encoder", partial(make_wide_text_encoder, work))
        vae = stage(work / "vae", make_vae)
        unet = stage(work / "fresh_unet", lambda out: write_part(fresh_unet(SEED), UNET, out, STEMS["unet"]))
    scheduler = read_json(args.start / "scheduler" / "scheduler_config.json") if args.start else SCHEDULER
    base = stage(work / "base-0", partial(write_base, text_encoder=text, vae=vae, unet=unet, scheduler=scheduler))
    for i, settings in list(enumerate(IMAGE_ROUNDS))[args.image_rounds_done :]:
        unet = stage(work / f"image-{i}", partial(train, base, work, IMAGE_BATCH, {**IMAGE, **settings})) / "checkpoint"
        base = stage(work / f"base-{i + 1}", partial(write_base, text_encoder=text, vae=vae, unet=unet, scheduler=scheduler))
    for i, settings in list(enumerate(MOTION_ROUNDS))[args.motion_rounds_done :]:
        going_on = {"motion_adapter_id_or_path": adapter} if adapter else {}
        adapter = stage(work / f"motion-{i}", partial(train, base, work, MOTION_BATCH, {**MOTION, **settings, **going_on})) / "checkpoint"
    if adapter:
        pack(args.output, base, adapter)
    print(args.output)


if __name__ == "__main__":
    main()
