"""Samples videos from prompts: GIF, MP4, WebP, PNG, and grids of them.

    python sample.py --prompt "a red circle moving right on a white background"      # the embedded tiny model
    python sample.py --ckpt_dir output/ad-…/checkpoints/iter-100                      # a LoRA trained on it
    python sample.py --model_id_or_path SD15 --motion_adapter_id_or_path ADAPTER --eval_human true
    python sample.py --model_id_or_path SD15 --sft_type full --ckpt_dir CHECKPOINT
    python sample.py --model_id_or_path SD15 --motion_adapter_id_or_path ADAPTER --ckpt_dir CHECKPOINT --merge_lora true
    python sample.py --prompt "a blue star" --output_format gif mp4 --num_videos_per_prompt 4
    python sample.py --prompt "a blue star" --grid seed=1,2,3 guidance_scale=2,5
    python sample.py --from_json generated/a-blue-star-seed42.mp4                     # the same video again

Every argument: python sample.py --help.
"""

import itertools
import sys
from collections.abc import Iterator
from typing import Any

from anidiff_jax import grid, interactive, outputs
from anidiff_jax.arguments import parse
from anidiff_jax.config import SampleConfig
from anidiff_jax.errors import UserError, memory_told, run_script
from anidiff_jax.prompts import check_travel


def main() -> None:
    config = parse(SampleConfig)
    prompts = [] if config.eval_human else [config.prompt] if config.prompt is not None else config.prompts()

    from anidiff_jax.loading import load
    from anidiff_jax.parallel import set_up_jax
    from anidiff_jax.terminal import start_log

    set_up_jax()
    start_log()
    outputs.prepare(config)
    axes = grid.axes_of(config, prompts)
    if any(axis.name == "prompt" for axis in axes):
        prompts = [axis.values[0] for axis in axes if axis.name == "prompt"]
    for prompt in prompts:
        check_cells(config.but(prompt=prompt), axes)
    pipeline = load(config)
    if config.from_json is not None:
        outputs.check_models(config, outputs.record_of(config, pipeline))
    if config.eval_human:
        for asked in interactive.requests(config, pipeline):
            try:
                with memory_told():
                    interactive.show(make(pipeline, [asked], axes))
            except UserError as error:  # told, and asked again
                print(f"error: {error}", file=sys.stderr)
            except KeyboardInterrupt:  # Ctrl-C ends the video, Ctrl-D the conversation
                print("stopped", file=sys.stderr)
    else:
        make(pipeline, [config.but(prompt=prompt) for prompt in prompts], axes)


def check_cells(config: SampleConfig, axes) -> None:
    """A UserError where a prompt of any video of the grid travels further than its frames."""
    for cell in grid.cells(config, axes) if axes else [config]:
        check_travel(cell.prompt or "", cell.sample_n_frames)


def make(pipeline, configs: list[SampleConfig], axes):
    """All videos of the prompts, and grids of them; returns the frames of the last video."""
    for config in configs:
        check_cells(config, axes)
    asked = [config.but(seed=config.seed + i, num_videos_per_prompt=1) for config in configs for i in range(config.num_videos_per_prompt)]
    cells = [grid.cells(config, axes) if axes else [config] for config in asked]
    videos = sample(pipeline, list(itertools.chain(*cells)))
    for config, own in zip(asked, cells, strict=True):
        made = list(itertools.islice(videos, len(own)))
        if axes:
            labels = [grid.label(cell, axes) for cell in own]
            record = outputs.record_of(config.but(grid=[str(axis) for axis in axes]), pipeline)
            for path in outputs.save_grid(made, labels, grid.columns_of(axes), grid.name_of(config, axes), config, record):
                print(path, flush=True)
    return made[-1]


def sample(pipeline, configs: list[SampleConfig]) -> Iterator[Any]:
    """The frames (f, h, w, 3) of each video, which is saved; as many at a time as there are devices."""
    import jax

    from anidiff_jax.progress import Steps
    from anidiff_jax.terminal import console

    made: dict[int, Any] = {}
    groups = iter(together(configs, jax.local_device_count()))
    for i, config in enumerate(configs):
        if i not in made:
            group = next(groups)
            asked, left = [configs[k] for k in group], len(configs) - i - len(set(group))
            what = f"{len(set(group))} videos" if len(group) > 1 else "a video"
            each = {"negative_prompt": [one.negative_prompt for one in asked], "seed": [one.seed for one in asked]}
            with Steps(f"sampling {what}" + (f", {left} to go" if left > 0 else ""), console) as steps:
                videos = pipeline([one.prompt for one in asked], **config.sampling() | each, progress=steps.step)
            if config.verbose:
                console.print(steps.cost(), highlight=False, soft_wrap=True)
            made |= dict(zip(group, videos, strict=True))
        video = made.pop(i)
        for path in outputs.save_video(video, config, outputs.record_of(config, pipeline)):
            print(path, flush=True)
        yield video


def together(configs: list[SampleConfig], most: int) -> list[list[int]]:
    """Numbers of videos that are made at once, as many as there are devices: those that differ in prompt, negative prompt and seed only.

    Where some are left over, the last one again and again, so that nothing is compiled for fewer devices.
    """
    alike: dict[str, list[int]] = {}
    for i, config in enumerate(configs):
        alike.setdefault(repr({name: value for name, value in config.sampling().items() if name != "seed"}), []).append(i)
    groups = []
    for members in alike.values():
        members += members[-1:] * (-len(members) % most if len(members) > most else 0)
        groups += [members[i : i + most] for i in range(0, len(members), most)]
    return sorted(groups)


if __name__ == "__main__":
    run_script(main)
