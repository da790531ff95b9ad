"""Fine-tunes AnimateDiff on captioned clips.

    python train.py                                                        # LoRA on the embedded tiny model and its clips
    python train.py --model_id_or_path SD15 --motion_adapter_id_or_path ADAPTER --csv_path clips.csv --video_folder clips
    python train.py --sft_type full --model_id_or_path SD15 --csv_path clips.csv --video_folder clips
    python train.py run.yaml --max_steps 1000

Every argument: python train.py --help. A run leaves <output_dir>/ad-<time>/{config.json,metrics.jsonl,sanity_check,samples,checkpoints}.
"""

import logging
import math

from anidiff_jax.config import TrainConfig, parse
from anidiff_jax.errors import run_script


def main() -> None:
    config = parse(TrainConfig)

    from anidiff_jax.parallel import data_parallel, on_one_device, replicate, set_up_jax, split_batch, to_devices
    from anidiff_jax.training.report import Report, new_run_folder, start_log

    start_log()
    log = logging.getLogger("anidiff_jax")
    set_up_jax(config.ddp_backend)

    import jax

    from anidiff_jax.data.loader import Clips, batches
    from anidiff_jax.data.records import read_records
    from anidiff_jax.pipeline import AnimateDiffPipeline
    from anidiff_jax.training import setup
    from anidiff_jax.training.checkpoint import save_checkpoint
    from anidiff_jax.training.samples import save_samples, save_sanity_check
    from anidiff_jax.training.state import TrainState, learning_rate, make_optimizer
    from anidiff_jax.training.step import Task, make_update
    from anidiff_jax.weights.tree import merge

    # Data: rows first, since they may be wrong and are cheap to check.
    prompts = config.prompts()
    records = read_records(*setup.data_paths(config)).drawn(config.dataset_sample_size, config.seed)

    # Models: the base and its motion modules, split into what trains and what is frozen.
    model = setup.load(config)
    trained, frozen = setup.split_params(config, model)
    schedule = config.noise().for_base(model.scheduler)
    lora_scale = config.lora_alpha / config.lora_rank if config.sft_type == "lora" else None
    task = Task(model.networks, schedule, config.seed, lora_scale, setup.lora_dtype(config), config.loss_weighting)
    pipeline = AnimateDiffPipeline(model, schedule)
    clips = Clips(records, config, lambda caption: pipeline.tokenize([caption])[0])

    # Length: an update sees `per_update` clips, over all devices and micro-batches.
    devices = jax.local_device_count()
    per_update = devices * config.batch_size * config.gradient_accumulation_steps
    updates = config.max_steps if config.max_steps >= 0 else math.ceil(config.num_train_epochs * len(records) / per_update)

    # The step: one compiled program a run, on every device.
    optimizer = make_optimizer(config, updates)
    rate = learning_rate(config, updates)
    update = data_parallel(make_update(task, optimizer))
    state = replicate(TrainState.create(trained, optimizer))
    frozen = replicate(frozen)
    model.params = {}  # they live in state and frozen now
    del trained

    # The first batch before the run's folder: a folder of unusable videos ends here.
    stream = batches(clips, per_update)
    next_batch = lambda: split_batch(next(stream), config.gradient_accumulation_steps)
    batch = next_batch()
    run = new_run_folder(config)
    count = sum(x.size for x in jax.tree.leaves(state.params))
    log.info("%s: %s training of %.2fM parameters on %d clips", run, config.sft_type, count / 1e6, len(records))
    log.info("%d updates of %d clips: %d devices × batch %d × %d micro-batches", updates, per_update, devices, config.batch_size,
             config.gradient_accumulation_steps)  # fmt: skip

    def sample_and_save(step: int, sample: bool, save: bool) -> dict[str, float]:
        scores = {}
        here, weights = on_one_device(state), on_one_device(frozen)
        if sample:
            lora = here.params if config.sft_type == "lora" else None
            unet = weights["unet"] if lora else merge(weights["unet"], here.params)
            now = pipeline.with_weights({**weights, "unet": unet}, lora, lora_scale or 1.0)
            scores = save_samples(now, prompts, config, run / "samples" / f"iter-{step}")
        if save:
            log.info("saved %s", save_checkpoint(run, here, weights["unet"], model, config))
        return scores

    save_sanity_check(batch, records, run / "sanity_check")
    with Report(run, config, updates, per_update) as report:
        for step in range(1, updates + 1):
            state, metrics = update(state, frozen, to_devices(batch))
            if step < updates:
                batch = next_batch()  # read while the devices work
            report.update(step, float(metrics["loss"]), float(metrics["grad_norm"]), float(rate(step - 1)))  # waits for them

            last = step == updates
            sample = last or step % config.eval_steps == 0
            save = last or step % (config.save_steps or config.eval_steps) == 0
            if sample or save:
                report.scores(step, sample_and_save(step, sample, save))
    if updates == 0:
        sample_and_save(0, True, True)
    if clips.skipped:
        log.warning("%d of %d videos could not be used", len(clips.skipped), len(records))
    print(run / "checkpoints" / f"iter-{updates}")


if __name__ == "__main__":
    run_script(main)
