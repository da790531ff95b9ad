"""Fine-tunes AnimateDiff on captioned clips.

    python train.py                                                        # LoRA on the embedded tiny model and its clips
    python train.py --model_id_or_path SD15 --motion_adapter_id_or_path ADAPTER --csv_path clips.csv --video_folder clips
    python train.py --sft_type full --model_id_or_path SD15 --csv_path clips.csv --video_folder clips
    python train.py run.yaml --max_steps 1000
    python train.py --resume_from_checkpoint output/ad-…                   # go on where it ended

Every argument: python train.py --help. A run leaves <output_dir>/ad-<time>/: its settings, log, samples, checkpoints.
"""

import logging
import math
import sys
from pathlib import Path

from anidiff_jax.arguments import parse
from anidiff_jax.config import TrainConfig
from anidiff_jax.errors import run_script

CUT_SHORT = 143  # exit code of a run that SIGTERM ended: 128 + 15, as shells have it


def main() -> None:
    config = parse(TrainConfig)

    from anidiff_jax import parallel
    from anidiff_jax.terminal import start_log
    from anidiff_jax.training.report import Report, save_data_report

    parallel.set_up_jax(config.ddp_backend, config.deterministic)
    parallel.join_cluster(config.coordinator_address, config.num_processes, config.process_id)
    start_log()
    log = logging.getLogger("anidiff_jax")

    import jax

    from anidiff_jax.data.loader import Clips, Timed, batches
    from anidiff_jax.data.vet import check_data
    from anidiff_jax.pipeline import AnimateDiffPipeline
    from anidiff_jax.training import setup
    from anidiff_jax.training.checkpoint import Checkpoints, restore
    from anidiff_jax.training.export import export
    from anidiff_jax.training.push import Hub
    from anidiff_jax.training.runs import find_checkpoint, run_folder, tell_changes
    from anidiff_jax.training.samples import save_samples, save_sanity_check
    from anidiff_jax.training.state import TrainState, learning_rate, make_optimizer
    from anidiff_jax.training.step import make_update
    from anidiff_jax.training.stop import Stop
    from anidiff_jax.training.summary import cost_of, flops_of_update, write_report
    from anidiff_jax.training.validation import Validation
    from anidiff_jax.weights.tree import merge

    # Data: rows first, since they may be wrong and are cheap to check.
    prompts = config.prompts()
    if config.check_data:
        if parallel.is_main():
            check_data(setup.all_records(config), config)
        return parallel.wait_for_all("checked")
    records, held_out = setup.records(config)

    # Models: the base and its motion modules, split into what trains and what is frozen.
    model = setup.load(config)
    trained, frozen = setup.split_params(config, model)
    task = setup.task(config, model)
    pipeline = AnimateDiffPipeline(model, task.schedule)
    clips = Clips(records, config.seed, setup.source(config, records, pipeline))
    validation = Validation(config, held_out, pipeline, task) if held_out and parallel.is_main() else None

    # Length: an update sees `per_update` clips, over all devices and micro-batches.
    devices = jax.device_count()
    per_update = devices * config.batch_size * config.gradient_accumulation_steps
    updates = config.max_steps if config.max_steps >= 0 else math.ceil(config.num_train_epochs * len(records) / per_update)

    # The step: one compiled program a run, on every device.
    optimizer = make_optimizer(config, updates)
    rate = learning_rate(config, updates)
    update = parallel.data_parallel(make_update(task, optimizer))
    state = TrainState.create(trained, optimizer, config.ema_decay > 0)
    checkpoint = find_checkpoint(config.resume_from_checkpoint, config.output_dir) if config.resume_from_checkpoint else None
    state = parallel.replicate(restore(checkpoint, state) if checkpoint else state)
    done = int(state.step)
    frozen = parallel.replicate(frozen)
    model.params = {}  # they live in state and frozen now
    del trained

    # The first batch before the run's folder: a folder of unusable videos ends here.
    stream = Timed(batches(clips, per_update, config.dataloader_num_workers, done, jax.process_index(), jax.process_count()))
    next_batch = lambda: parallel.split_batch(next(stream), config.gradient_accumulation_steps)
    batch = next_batch()
    if checkpoint:
        tell_changes(checkpoint, records, per_update, bool(config.validation_fraction))
    run = run_folder(config, checkpoint) if parallel.is_main() else Path(config.output_dir)  # the others write nothing
    count = sum(x.size for x in jax.tree.leaves(state.params))
    log.info("%s: %s training of %.2fM parameters on %d clips", run, config.sft_type, count / 1e6, len(records))
    log.info("%d updates of %d clips: %d devices × batch %d × %d micro-batches", updates, per_update, devices, config.batch_size,
             config.gradient_accumulation_steps)  # fmt: skip

    tell_data = lambda: save_data_report(run, clips, len(held_out or ()), updates, per_update)

    def examine(step: int) -> None:
        """What tells how it goes: the loss on clips that never train, and videos."""
        here, weights = parallel.on_one_device(state), parallel.on_one_device(frozen)
        losses = validation(state.best, frozen) if validation else {}
        lora = here.best if config.sft_type == "lora" else None
        unet = weights["unet"] if lora else merge(weights["unet"], here.best)
        now = pipeline.with_weights({**weights, "unet": unet}, lora, task.lora_scale or 1.0)
        tell_data()
        report.scores(step, {**losses, **save_samples(now, prompts, config, run / "samples" / f"iter-{step}")})

    hub = Hub(config, len(records))
    if parallel.is_main():
        tell_data()
    if checkpoint is None and parallel.is_main():
        save_sanity_check(batch, records, pipeline, parallel.on_one_device(frozen)["vae"], run / "sanity_check")
    with Report(run, config, updates, per_update, done) as report, Checkpoints(run, model, config, hub) as checkpoints, Stop() as stop:
        save = lambda: checkpoints.save(parallel.on_one_device(state), parallel.on_one_device(frozen)["unet"])
        to_examine = lambda step: parallel.is_main() and (step == updates or step % config.eval_steps == 0)
        to_save = lambda step: step == updates or step % (config.save_steps or config.eval_steps) == 0
        if checkpoint and to_examine(done) and done not in report.scored:  # it was saved, and killed before it was examined
            examine(done)
        if checkpoint:
            checkpoints.settle(done)
        for step in range(done + 1, updates + 1):
            state, metrics = update(state, frozen, parallel.to_devices(batch))
            if step < updates:
                batch = next_batch()  # read while the devices work
            report.update(step, float(metrics["loss"]), float(metrics["grad_norm"]), float(rate(step - 1)))  # waits for them

            if stop.asked(step) and step < updates:  # what is to be examined now, the run that goes on will examine first
                save()
                break
            if to_save(step):  # before anything else that may go wrong
                save()
            if to_examine(step):
                examine(step)
            if to_save(step):
                checkpoints.settle(step)
        if updates == 0 and parallel.is_main():
            save()
            examine(0)
            checkpoints.settle(0)
    if int(state.step) < updates:
        log.warning("asked to end (SIGTERM): saved at update %d, go on with --resume_from_checkpoint %s", int(state.step), run)
        if parallel.is_main():
            hub.wait()
            write_report(run, config, {})
        parallel.wait_for_all("saved")
        sys.exit(CUT_SHORT)
    if clips.skipped:
        log.warning("%d of %d videos could not be used", len(clips.skipped), len(records))
    if parallel.is_main():
        last_saved = run / "checkpoints" / f"iter-{int(state.step)}"
        hub.finished(last_saved)
        export(last_saved, config)
        flops = flops_of_update(task, state.params, parallel.on_one_device(frozen), config, per_update)
        log.info("%s", write_report(run, config, cost_of(report.entries, flops, stream.seconds)))
    parallel.wait_for_all("the end")  # a process that leaves would take the others with it
    if parallel.is_main():
        print(last_saved)


if __name__ == "__main__":
    run_script(main)
