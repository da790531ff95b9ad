"""Runs of train.py as processes of their own, and what they leave."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from anidiff_jax.shapes.clips import write_clips
from anidiff_jax.training.runs import LOG, find_checkpoint
from tests import QUICKLY
from tests.conftest import CACHE

ROOT = Path(__file__).parent.parent.parent


def short_run(base: Path, adapter: Path, clips: Path, updates: int) -> list[str]:
    """The words of a short LoRA run with everything on that a checkpoint must keep; one of its videos cannot be read."""
    write_clips(clips, 7, seed=1)
    sorted(clips.glob("*.mp4"))[3].write_bytes(b"")
    words = f"""--model_id_or_path {base} --motion_adapter_id_or_path {adapter} --csv_path {clips}/clips.csv --video_folder {clips}
        --sample_size 16 --sample_n_frames 3 --sample_stride 1 --num_inference_steps 1 --guidance_scale 1 --batch_size 2
        --gradient_accumulation_steps 2 --max_steps {updates} --eval_steps 3 --save_steps 2 --ema_decay 0.9 --validation_fraction 0.3
        --validation_clips 2 --trainable_modules mid_block.*motion_modules.* --learning_rate 1e-3"""
    return words.split()


def start(*words, devices: int = 1) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices} {QUICKLY}"
    cache = {"JAX_COMPILATION_CACHE_DIR": str(CACHE), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = {**os.environ, **cache, "XLA_FLAGS": flags}
    line = [sys.executable, str(ROOT / "train.py"), *map(str, words)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen) -> Path:
    """The checkpoint that a run ends with."""
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return Path(out.splitlines()[-1])


def cut_short(process: subprocess.Popen, run: Path) -> Path:
    """The checkpoint that a run which SIGTERM ends leaves."""
    out, err = process.communicate(timeout=400)
    assert process.returncode == 143, err
    assert "iter-" not in out
    return find_checkpoint(str(run), "")


def wait_for(process: subprocess.Popen, output: Path, ready) -> Path:
    """The run's folder below `output`, once `ready(run)`."""
    for _ in range(4000):
        runs = list(output.glob("ad-*"))
        if runs and ready(runs[0]):
            return runs[0]
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError("the run does not get there")


def state_of(checkpoint: Path) -> dict[str, np.ndarray]:
    tree = ocp.PyTreeCheckpointer().restore((checkpoint / "state").absolute())
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def log_of(run: Path) -> list[dict]:
    """The entries of a run's log, without what the clock says."""
    entries = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
    return [{k: v for k, v in entry.items() if "second" not in k} for entry in entries]


def same_ends(checkpoint: Path, other: Path) -> None:
    """Two runs end with the same bits and the same log."""
    ours, theirs = state_of(checkpoint), state_of(other)
    assert ours.keys() == theirs.keys()
    assert any("ema" in name for name in ours)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    assert log_of(checkpoint.parent.parent) == log_of(other.parent.parent)
