"""A run that is killed and gone on with ends where one ends that was never interrupted, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from anidiff_jax.errors import UserError
from anidiff_jax.shapes.clips import write_clips
from anidiff_jax.training.runs import LOG, find_checkpoint, log_until, steps_in
from tests.conftest import CACHE

ROOT = Path(__file__).parent.parent.parent
UPDATES = 7


@pytest.fixture(scope="module")
def command(base, adapter, tmp_path_factory):
    """The words of a short LoRA run with everything on that a checkpoint must keep."""
    clips = tmp_path_factory.mktemp("videos")
    write_clips(clips, 7, seed=1)
    sorted(clips.glob("*.mp4"))[3].write_bytes(b"")  # one cannot be read: its place in the stream is taken by another
    words = f"""--model_id_or_path {base} --motion_adapter_id_or_path {adapter} --csv_path {clips}/clips.csv --video_folder {clips}
        --sample_size 16 --sample_n_frames 3 --sample_stride 1 --num_inference_steps 1 --guidance_scale 1 --batch_size 2
        --gradient_accumulation_steps 2 --max_steps {UPDATES} --eval_steps 3 --save_steps 2 --ema_decay 0.9 --validation_fraction 0.3
        --validation_clips 2 --trainable_modules mid_block.*motion_modules.* --learning_rate 1e-3"""
    return words.split()


def start(*words) -> subprocess.Popen:
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(CACHE)}
    line = [sys.executable, str(ROOT / "train.py"), *map(str, words)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process) -> Path:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return Path(out.splitlines()[-1])


def state_of(checkpoint: Path) -> dict[str, np.ndarray]:
    tree = ocp.PyTreeCheckpointer().restore((checkpoint / "state").absolute())
    flat, _ = __import__("jax").tree_util.tree_flatten_with_path(tree)
    return {str(path): np.asarray(leaf) for path, leaf in flat}


def log_of(run: Path) -> list[dict]:
    entries = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
    return [{k: v for k, v in entry.items() if "second" not in k} for entry in entries]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> Path:
    return finish(start(*command, "--output_dir", tmp_path_factory.mktemp("whole")))


def wait_for(process, output: Path, ready) -> Path:
    """The run's folder, once `ready(run)`."""
    for _ in range(1500):
        runs = list(output.glob("ad-*"))
        if runs and ready(runs[0]):
            return runs[0]
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    raise AssertionError("the run does not get there")


def same_ends(checkpoint: Path, whole: Path) -> None:
    ours, theirs = state_of(checkpoint), state_of(whole)
    assert ours.keys() == theirs.keys()
    assert any("ema" in name for name in ours)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    assert log_of(checkpoint.parent.parent) == log_of(whole.parent.parent)


@pytest.mark.parametrize("updates", [3, 5])
def test_killed_and_gone_on_with(command, whole, tmp_path, updates):
    process = start(*command, "--output_dir", tmp_path)
    logged = lambda run: (run / LOG).exists() and len((run / LOG).read_text().splitlines()) >= updates and steps_in(run / "checkpoints")
    run = wait_for(process, tmp_path, logged)
    process.kill()
    process.wait()
    with (run / LOG).open("a") as log:
        log.write('{"step": 5, "lo')  # as a kill in the middle of a line leaves it
    checkpoint = finish(start("--resume_from_checkpoint", "latest", "--output_dir", tmp_path))  # its other arguments are the run's
    assert checkpoint.parent.parent == run
    same_ends(checkpoint, whole)
    assert not list((run / "checkpoints").glob(".iter*"))


def test_asked_to_end_it_saves_first(command, whole, tmp_path):
    process = start(*command, "--output_dir", tmp_path, "--save_steps", "100")
    run = wait_for(process, tmp_path, lambda run: (run / LOG).exists() and (run / LOG).read_text())
    process.send_signal(signal.SIGTERM)
    stopped = finish(process)
    assert 1 <= int(stopped.name[5:]) < UPDATES
    assert find_checkpoint(str(run), "") == stopped
    same_ends(finish(start("--resume_from_checkpoint", run)), whole)


def test_an_earlier_checkpoint_becomes_a_run_of_its_own(command, whole, tmp_path):
    run = whole.parent.parent
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    branch = finish(start("--resume_from_checkpoint", run / "checkpoints" / "iter-4", "--output_dir", tmp_path))
    assert branch.parent.parent.parent == tmp_path
    same_ends(branch, whole)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_the_best_and_the_last_are_kept(command, tmp_path):
    last = finish(start(*command, "--output_dir", tmp_path, "--save_total_limit", "2", "--save_steps", "1", "--eval_steps", "1"))
    run = last.parent.parent
    losses = {entry["step"]: entry["validation_loss"] for entry in log_of(run) if "validation_loss" in entry}
    assert len(losses) == UPDATES
    best = json.loads((last.parent / "best.json").read_text())
    assert best["step"] == min(losses, key=losses.get)
    assert set(steps_in(last.parent)) <= {best["step"], UPDATES, UPDATES - 1}
    assert {best["step"], UPDATES} <= set(steps_in(last.parent))


def test_what_cannot_be_gone_on_with(command, whole, tmp_path):
    with pytest.raises(UserError, match="no run in"):
        find_checkpoint("latest", str(tmp_path))
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(str(tmp_path), "")
    assert log_until(tmp_path, 3) == []
    process = start("--resume_from_checkpoint", whole, "--lora_rank", "2", "--output_dir", tmp_path, "--max_steps", "9")
    _, err = process.communicate()
    assert process.returncode == 2
    assert "has shape" in err
    assert "leave out what you changed" in err
