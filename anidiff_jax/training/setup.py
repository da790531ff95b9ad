"""From arguments to what the loop needs: the model, and its parameters split into what trains and what is frozen."""

import logging
from pathlib import Path

import jax

from anidiff_jax.config import TrainConfig
from anidiff_jax.data.cache import LatentCache
from anidiff_jax.data.loader import Videos
from anidiff_jax.data.records import Records, read_records
from anidiff_jax.diffusion import solvers
from anidiff_jax.errors import UserError
from anidiff_jax.lora import init_lora, linear_layers, matches
from anidiff_jax.models.config import fresh_motion_config, is_motion_unet, unet_config
from anidiff_jax.models.init import shapes
from anidiff_jax.models.layers import Settings
from anidiff_jax.models.unet import UNet
from anidiff_jax.parallel import in_all
from anidiff_jax.pipeline import AnimateDiffPipeline
from anidiff_jax.random import purpose
from anidiff_jax.sampling import check_size
from anidiff_jax.training.encode import fill_cache
from anidiff_jax.training.step import Task
from anidiff_jax.weights.base import EMBEDDED, EMBEDDED_CLIPS, Model, load_model
from anidiff_jax.weights.hub import resolve
from anidiff_jax.weights.sources import base_source
from anidiff_jax.weights.tree import Tree, flatten, is_buffer, is_motion, split

log = logging.getLogger(__name__)

LORA_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def load(config: TrainConfig) -> Model:
    """The base model, with the adapter that was given, or fresh motion modules where full training is to make them.

    Frozen weights are in the compute type, once; what full training trains is in float32.
    """
    base = EMBEDDED if config.model_id_or_path is None else resolve(config.model_id_or_path, config.model_revision, config.hub)
    adapter: Path | None = None
    if config.motion_adapter_id_or_path is not None:
        adapter = resolve(config.motion_adapter_id_or_path, config.motion_adapter_revision, config.hub)
    elif config.embedded and config.sft_type == "lora":
        adapter = EMBEDDED / "motion_adapter"

    fresh = False
    local = lambda given: None if given is None else resolve(given, hub=config.hub)
    source = base_source(base, local(config.vae_path), local(config.text_encoder_path))
    if adapter is None:
        raw = source.configs["unet"]
        if not is_motion_unet(raw) and config.sample_n_frames > 1 and _touches_motion(config, raw):
            if config.sft_type == "lora":
                raise UserError(
                    "lora on motion modules needs the motion adapter to adapt: give --motion_adapter_id_or_path, "
                    "or --sft_type full to train one from nothing"
                )
            fresh = True

    dtype = compute_dtype(config)
    if config.mixed_precision and dtype == "float32":
        log.info("mixed_precision: a CPU is slower in bfloat16, so float32 is used")
    trains = matches(config.trainable_modules)
    model = load_model(
        source,
        adapter,
        fresh_motion=fresh,
        motion_heads=config.said("motion_num_attention_heads"),
        motion_frames=config.said("motion_max_seq_length"),
        settings=Settings(
            dtype=dtype,
            attention=config.attention,
            remat=config.gradient_checkpointing,
            lora_dropout=config.lora_dropout if config.sft_type == "lora" else 0.0,
            motion_norm=config.motion_norm,
            spatial_norm=config.spatial_norm,
            motion_scale=config.motion_scale,
        ),
        dtype=dtype,
        keep_float32=(lambda key: trains(key) and not is_buffer(key)) if config.sft_type == "full" else (lambda key: False),
        seed=config.seed,
    )
    check_size(model, config.sample_n_frames, config.height, config.width)
    if config.lora:
        pipeline = AnimateDiffPipeline(model, config.noise())
        for path, scale in config.loras():
            pipeline.load_lora(path, scale, config.hub)
        pipeline.merge_lora()
    return model


def all_records(config: TrainConfig) -> Records:
    """Every row there is; of the embedded clips where the embedded model trains and nothing else is given."""
    table, folder = config.csv_path, config.video_folder
    if config.embedded and table is None and folder is None:
        table, folder = str(EMBEDDED_CLIPS / "clips.csv"), str(EMBEDDED_CLIPS)
    return read_records(table, folder)


def records(config: TrainConfig) -> tuple[Records, Records | None]:
    """(rows that train, rows that validate), the same in all processes: else a UserError."""
    rows = all_records(config)
    seen = in_all([len(rows), int(rows.hash[:8], 16)])
    if (seen != seen[0]).any():
        raise UserError(
            f"the processes of this run do not see the same clips ({', '.join(map(str, seen[:, 0]))} rows): "
            "--csv_path and --video_folder must hold the same on every machine"
        )
    rows = rows.drawn(config.dataset_sample_size, config.seed)
    if config.validation_csv is not None:
        return rows, read_records(config.validation_csv, str(rows.folder))
    if config.validation_fraction:
        return rows.parted(config.validation_fraction, config.seed)
    return rows, None


def source(config: TrainConfig, records: Records, pipeline: AnimateDiffPipeline) -> Videos | LatentCache:
    """Where clips come from: the videos, or their latents, which are encoded first where the cache lacks them."""
    if config.latent_cache is None:
        return Videos(records, config, lambda caption: pipeline.tokenize([caption])[0])
    return fill_cache(Path(config.latent_cache).expanduser(), records, config, pipeline)


def task(config: TrainConfig, model: Model) -> Task:
    """What is computed, as the arguments say."""
    schedule = config.noise(model.scheduler)
    solvers.table(schedule, config.scheduler, config.num_inference_steps, config.eta)  # what validation cannot do is told now
    return Task(
        model.networks,
        schedule,
        config.seed,
        lora_scale=config.lora_alpha / config.lora_rank if config.sft_type == "lora" else None,
        lora_dtype=lora_dtype(config),
        loss_weighting=config.loss_weighting,
        snr_gamma=config.snr_gamma,
        timesteps=config.timesteps,
        timestep_bias=config.timestep_bias,
        noise_offset=config.noise_offset,
        ema_decay=config.ema_decay,
    )


def compute_dtype(config: TrainConfig) -> str:
    return "bfloat16" if config.mixed_precision and jax.default_backend() != "cpu" else "float32"


def lora_dtype(config: TrainConfig) -> str:
    """The type in which adapters are used and saved. What the optimizer updates is float32 whatever this says."""
    return LORA_DTYPES.get(config.lora_dtype) or compute_dtype(config)


def split_params(config: TrainConfig, model: Model) -> tuple[Tree, dict[str, Tree]]:
    """(what trains, what is frozen): for full a part of the UNet's tree, for lora fresh adapters beside all of it.

    No copy is made, and the step donates what trains: afterwards the model's own `params` must not be used.
    """
    unet = model.params["unet"]
    if config.sft_type == "lora":
        trained = init_lora(purpose(config.seed, "lora"), unet, config.trainable_modules, config.lora_rank)
        frozen_unet = unet
    else:
        trains = matches(config.trainable_modules)
        trained, frozen_unet = split(unet, lambda key: trains(key) and not is_buffer(key))
        if not trained:
            some = ", ".join(list(flatten(unet))[:3])
            raise UserError(f"trainable_modules={config.trainable_modules!r} matches no parameter of the UNet; names look like {some}")
    return trained, {**model.params, "unet": frozen_unet}


def _touches_motion(config: TrainConfig, raw: dict) -> bool:
    """Whether the pattern would train motion modules, were there any."""
    motion = fresh_motion_config(raw, 1, config.motion_max_seq_length)
    names = split(shapes(UNet(unet_config(raw, motion))), is_motion)[0]
    chosen = matches(config.trainable_modules)
    return any(map(chosen, linear_layers(names) if config.sft_type == "lora" else flatten(names)))
