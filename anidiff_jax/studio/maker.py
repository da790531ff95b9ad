"""The studio's one worker: the model that is loaded, the programs that are compiled, and videos made one job after the other."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from anidiff_jax import grid, outputs
from anidiff_jax.config import SampleConfig, path_and_scale
from anidiff_jax.denoising import step_of
from anidiff_jax.diffusion.schedule import NoiseSchedule
from anidiff_jax.errors import UserError
from anidiff_jax.loading import check, load
from anidiff_jax.pipeline import AnimateDiffPipeline
from anidiff_jax.prompts import check_travel
from anidiff_jax.sampling import plan_of, tables_of
from anidiff_jax.sheets import side_by_side
from anidiff_jax.studio.asked import check_length, check_limits, config_of
from anidiff_jax.studio.gallery import write_thumbnail
from anidiff_jax.studio.library import Library
from anidiff_jax.studio.runs import duration
from anidiff_jax.studio.settings import Settings
from anidiff_jax.text import tokens_of, whole_texts
from anidiff_jax.training.runs import steps_in
from anidiff_jax.video import to_uint8
from anidiff_jax.weights.loras import Lora, file_of
from anidiff_jax.weights.tree import flatten

Progress = Callable[[float, str], None]
Cell = tuple[str, Callable[[SampleConfig], SampleConfig]]  # what stands above a video, and what differs for it
PROGRAMS = 32  # that are kept; with the next one all are let go of
AXES = ("seed", "scheduler", "guidance_scale", "num_inference_steps", "lora_scale_1", "checkpoint", "prompt")
# Arguments of which another value is another pipeline.
LOADED = ("model_id_or_path", "motion_adapter_id_or_path", "motion_norm", "spatial_norm", "motion_scale", *NoiseSchedule.names())


class Stopped(Exception):
    """The job was cancelled."""


@dataclass(eq=False)
class Job:
    """A place in the row of those who wait for the device; the first in it has it."""

    session: str
    stopped: bool = False

    def go_on(self) -> None:
        if self.stopped:
            raise Stopped


@dataclass
class Maker:
    """Makes what is asked for, one job at a time and in order. `cancel(session)` ends a session's jobs, a running one at its next step."""

    settings: Settings
    library: Library
    pipeline: AnimateDiffPipeline | None = None
    compiled: list[dict[str, Any]] = field(default_factory=list)  # what each compiled program is for, see `aspects`
    _loaded: Any = None
    _loras: dict[tuple[str, int], Lora] = field(default_factory=dict)
    _row: list[Job] = field(default_factory=list)
    _moved: threading.Condition = field(default_factory=threading.Condition)

    def config(self, asked: Mapping[str, Any]) -> SampleConfig:
        """The arguments that a page's fields say; UserError in a line."""
        return config_of(asked, self.settings, self.library)

    def make(self, asked: Mapping[str, Any], session: str, progress: Progress) -> Path:
        """A video → the JSON beside it. UserError where it cannot be made, Stopped where it was cancelled."""
        config = self.config(asked)
        with self._job(session, progress) as job:
            video = self._video(config, job, progress)
            return _shown(outputs.save_video(video, config, outputs.record_of(config, self._pipeline(config))), video, config)

    def compare(
        self, asked: Mapping[str, Any], columns: tuple[str, str], rows: tuple[str, str], run: str | None, session: str, progress: Progress
    ) -> Path:
        """Videos over one list of values or two, side by side and in step → the JSON beside them.

        columns, rows: a name of AXES, and its values with commas between them; rows may be ("", "").
        """
        config = self.config(asked)
        axes = [self._axis(config, asked, name, text, run) for name, text in (columns, rows) if name]
        if len(axes) == 2 and columns[0] == rows[0]:
            raise UserError(f"columns and rows are both {columns[0]}: choose two that differ, or one")
        if not axes:
            raise UserError("there is nothing to compare: choose what differs from column to column")
        self._check_count(math.prod(map(len, axes)))
        cells = []
        for row in axes[1] if len(axes) == 2 else [("", lambda cell: cell)]:
            for column in axes[0]:
                cell = row[1](column[1](config))
                check_limits(cell, self.settings)
                check_travel(cell.prompt or "", cell.sample_n_frames)
                cells.append((f"{column[0]}\n{row[0]}".strip(), cell))
        with self._job(session, progress) as job:
            videos, record = [], dict[str, Any]()
            for i, (_, cell) in enumerate(cells):
                part = lambda share, text, i=i: progress((i + share) / len(cells), f"video {i + 1} of {len(cells)}: {text}")
                videos.append(to_uint8(self._video(cell, job, part)))
                record = record or outputs.record_of(cell, self._pipeline(cell))  # of the first
            compared = [f"{name}={text}" for name, text in (columns, rows) if name]
            own = {"checkpoint", "lora_scale_1"} & {columns[0], rows[0]}  # no arguments of sample.py: it makes the first video again
            record["compared" if own else "grid"] = compared
            across = len(axes[0]) if len(axes) == 2 or len(axes[0]) <= grid.IN_A_ROW else None
            name = f"compared-{'-'.join(name for name, _ in (columns, rows) if name)}"
            labels = [label for label, _ in cells]
            return _shown(outputs.save_grid(videos, labels, across, name, config, record), side_by_side(videos, across), config)

    def cancel(self, session: str) -> bool:
        """Whether there was a job to end."""
        with self._moved:
            own = [job for job in self._row if job.session == session]
            for job in own:
                job.stopped = True
            self._moved.notify_all()
        return own != []

    def note(self, asked: Mapping[str, Any]) -> str:
        """What has to happen before the first step: what is wrong, what is loaded, what is compiled; in a line."""
        try:
            config = self.config(asked)
            pipeline, loaded, there, compiled = self.pipeline, self._loaded, dict(self._loras), list(self.compiled)  # a job may change them
            if pipeline is None or loaded != _loading(config):
                return "Loads the model first" + (", and compiles." if pipeline is None else ", and may compile.")
            check(pipeline, config)
            loras = [(there.get(_lora_key(lora)), lora[1]) for lora in config.loras()]
            if any(lora is None for lora, _ in loras):
                return "Loads a LoRA first, and compiles."
            own = aspects(pipeline, config, [(lora, scale) for lora, scale in loras if lora is not None])
        except UserError as error:
            return f"⚠ {error}"
        if own in compiled:
            return "Ready: nothing has to be compiled."
        nearest = min(compiled, key=lambda other: sum(own[name] != other[name] for name in own), default=dict.fromkeys(own))
        return f"Compiles first, since this differs from what was made before: {', '.join(n for n in own if own[n] != nearest[n])}."

    @contextmanager
    def _job(self, session: str, progress: Progress) -> Iterator[Job]:
        """The device, when all who asked before have let go of it. UserError where too many wait already."""
        job = Job(session)
        with self._moved:
            if len(self._row) > self.settings.queue:
                raise UserError(f"the studio is full: {len(self._row) - 1} jobs wait already; try again in a while")
            self._row.append(job)
        try:
            with self._moved:
                while self._row[0] is not job and not job.stopped:
                    progress(0.0, f"waiting, {self._row.index(job)} before this one")
                    self._moved.wait(1.0)
            job.go_on()
            yield job
        finally:
            with self._moved:
                self._row.remove(job)
                self._moved.notify_all()

    def _video(self, config: SampleConfig, job: Job, progress: Progress) -> np.ndarray:
        """The frames (f, h, w, 3)."""
        job.go_on()
        progress(0.0, "loading")
        pipeline = self._pipeline(config)
        check(pipeline, config)
        own = aspects(pipeline, config, pipeline.loras)
        if own not in self.compiled and len(self.compiled) >= PROGRAMS:
            self._forget()
        progress(0.0, "first step" if own in self.compiled else "compiling, first step")
        ends: list[float] = []

        def step(done: int, of: int) -> None:
            job.go_on()
            ends.append(time.perf_counter())
            left = f", {duration((of - done) * (ends[-1] - ends[0]) / (done - 1))} left" if done > 1 else ""
            progress(done / of, f"step {done} of {of}{left}" if done < of else "decoding")

        video = pipeline(config.prompt or "", config.negative_prompt, **config.sampling(), progress=step)[0]
        job.go_on()
        if own not in self.compiled:
            self.compiled.append(own)
        return video

    def _forget(self) -> None:
        """Lets go of all compiled programs; those on disk stay."""
        self.compiled = []
        step_of.cache_clear()
        jax.clear_caches()

    def _pipeline(self, config: SampleConfig) -> AnimateDiffPipeline:
        """The one for these arguments; only one model is in memory at a time."""
        if self.pipeline is None or self._loaded != _loading(config):
            self.pipeline, self._loras = None, {}  # before the other one is read; programs stay, for one of the same shape
            self.pipeline = load(config.but(lora=[]))
            self._loaded = _loading(config)
        pipeline = self.pipeline
        wanted = [(_lora_key(lora), lora) for lora in config.loras()]
        self._loras = {key: lora for key, lora in self._loras.items() if key in {key for key, _ in wanted} or len(self._loras) < 8}
        for key, (path, _) in wanted:
            if key not in self._loras:
                pipeline.loras = []
                pipeline.load_lora(path)
                self._loras[key] = pipeline.loras[0][0]
        pipeline.loras = [(self._loras[key], scale) for key, (_, scale) in wanted]
        return pipeline

    def _check_count(self, videos: int) -> None:
        if videos > self.settings.max_videos:
            raise UserError(f"{videos} videos are more than this studio compares at once ({self.settings.max_videos}): take fewer values")

    def _axis(self, config: SampleConfig, asked: Mapping[str, Any], name: str, text: str, run: str | None) -> list[Cell]:
        """(label, changed arguments) of each value."""
        if name not in AXES:
            raise UserError(f"{name} cannot be compared: choose one of {', '.join(AXES)}")
        check_length(text, name)
        self._check_count(len(text.split("|" if name in grid.TEXTS else ",")))  # before each is looked at
        if name == "checkpoint":
            return self._checkpoints(config, text, run)
        if name == "lora_scale_1":
            if self.library.permitted(asked["lora_1"], "LoRA") is None:
                raise UserError("there is no LoRA 1 whose scale could differ: choose one on the Make tab")
            path = path_and_scale(config.lora[0])[0]
            scaled = lambda scale, cell: cell.but(lora=[f"{path}:{scale}", *cell.lora[1:]])
            return [(f"LoRA scale {scale:g}", partial(scaled, scale)) for scale in map(_number, text.split(","))]
        axis = grid.axes_of(config.but(grid=[f"{name}={text}"]), [])[0]
        label = lambda value: grid.label(config.but(**{axis.name: value}), [axis])
        return [(label(value), partial(SampleConfig.but, **{axis.name: value})) for value in axis.values]

    def _checkpoints(self, config: SampleConfig, text: str, run: str | None) -> list[Cell]:
        from anidiff_jax.weights.kinds import kind_of_checkpoint

        if not run:
            raise UserError("choose the run whose checkpoints are compared")
        folder = Path(self.library.permitted(run, "run") or "") / "checkpoints"
        there = steps_in(folder)
        chosen = [int(_number(word)) for word in text.split(",")] if text.strip() else there
        if missing := [step for step in chosen if step not in there]:
            raise UserError(f"{run} has no checkpoint of update {missing[0]}; it has {', '.join(map(str, there)) or 'none'}")
        if not chosen:
            raise UserError(f"{run} has no checkpoint yet")
        cells: list[Cell] = []
        for path in (folder / f"iter-{step}" for step in chosen):
            kind = kind_of_checkpoint(path)
            if kind == "unet":
                raise UserError(f"{path} is a UNet that trained as a whole: use sample.py --sft_type full --ckpt_dir")
            adapted = lambda path, cell: cell.but(lora=[*cell.lora, f"{path}:1.0"])
            replaced = lambda path, cell: cell.but(motion_adapter_id_or_path=str(path))
            cells.append((f"update {path.name[5:]}", partial(adapted if kind == "lora" else replaced, path)))
        return cells


def aspects(pipeline: AnimateDiffPipeline, config: SampleConfig, loras: list[tuple[Lora, float]]) -> dict[str, Any]:
    """What decides which programs a video needs, by name: where all of it is as before, nothing is compiled."""
    tables = tables_of(pipeline.schedule, config, config.scheduler, config.num_inference_steps, config.eta)
    size = (config.sample_n_frames, config.height, config.width)
    plan = plan_of(pipeline.model, config, size, tables, config.guidance_scale, pipeline.defaults["sample_n_frames"])
    encoder, texts = pipeline.model.networks.text_encoder, whole_texts(config.prompt or "", config)
    led = config.guidance_scale > 1
    lengths = [
        len(tokens_of(pipeline.model.tokenizer, encoder.config.max_length, text)[0])
        for text in [*texts.values(), *([config.negative_prompt] if led else [])]
    ]
    guided = np.concatenate([plan.guidance.rows(len(table.rows.timestep)) for table in plan.tables])
    shapes = lambda tree: {key: x.shape for key, x in flatten(tree).items()}
    rows = [jax.tree.map(lambda x: x[0], table.rows) for table in plan.tables]
    return {
        "model": pipeline.model.networks,
        "size": size[1:],
        "frames": size[0],
        "scheduler": [(jax.tree.map(np.shape, row), table.draws) for row, table in zip(rows, plan.tables, strict=True)],
        "length of the prompt": max(lengths),
        "a prompt that travels": len(texts) > 1,
        "guidance": (led, sorted({*map(bool, guided)})),
        "LoRAs": [(shapes(lora.unet), shapes(lora.text_encoder)) for lora, scale in loras if scale],
        "other settings": (plan.program, plan.context, plan.program.window and config.free_noise, config.clip_skip, len(plan.tables) > 1),
    }


def _loading(config: SampleConfig) -> tuple:
    return tuple(getattr(config, name) for name in LOADED)


def _lora_key(lora: tuple[str, float]) -> tuple[str, int]:
    """A LoRA's path, and when its file was changed."""
    path = Path(lora[0]).expanduser()
    return lora[0], file_of(path).stat().st_mtime_ns if path.exists() else 0


def _shown(paths: list[Path], video, config: SampleConfig) -> Path:
    """The JSON beside what was written, with a thumbnail for the gallery."""
    record = next(beside for path in paths if (beside := path.with_suffix(".json")).exists())
    write_thumbnail(video, record, config.fps)
    return record


def _number(word: str) -> float:
    try:
        if math.isfinite(number := float(word)):
            return number
        raise ValueError
    except ValueError:
        raise UserError(f"{word.strip()!r} is not a number") from None
