"""A run that is killed and gone on with ends where one ends that was never interrupted, bit for bit."""

import json
import logging
import shutil
import signal
import time

import numpy as np
import pytest

from anidiff_jax import AnimateDiffPipeline
from anidiff_jax.arguments import parse
from anidiff_jax.config import TrainConfig
from anidiff_jax.data.records import Records
from anidiff_jax.errors import UserError
from anidiff_jax.scores import general_scores
from anidiff_jax.training.runs import DATA, LOG, best_of, find_checkpoint, read_log, run_folder, steps_in, tell_changes, write_log
from anidiff_jax.weights.files import save_json
from anidiff_jax.weights.tree import flatten
from tests.training.runs import cut_short, finish, log_of, same_ends, short_run, start, state_of, wait_for

UPDATES = 7


@pytest.fixture(scope="module")
def command(base, adapter, tmp_path_factory):
    return short_run(base, adapter, tmp_path_factory.mktemp("videos"), UPDATES)


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    return finish(start(*command, "--output_dir", tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize("updates", [3, 6])
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


@pytest.mark.soak
@pytest.mark.parametrize("moment", np.random.default_rng(0).uniform(0, 1, 20).round(3))
def test_killed_at_any_moment(command, whole, tmp_path, moment):
    """From the first log entry on, over the time that a whole run takes from there."""
    process = start(*command, "--save_steps", "1", "--output_dir", tmp_path)
    run = wait_for(process, tmp_path, lambda run: steps_in(run / "checkpoints"))
    time.sleep(8 * moment)
    process.kill()
    process.wait()
    same_ends(finish(start("--resume_from_checkpoint", run)), whole)
    assert not list((run / "checkpoints").glob(".*"))  # nothing half written stays


def test_asked_to_end_it_saves_first(command, whole, tmp_path):
    process = start(*command, "--output_dir", tmp_path, "--save_steps", "100")
    run = wait_for(process, tmp_path, lambda run: (run / LOG).exists() and (run / LOG).read_text())
    process.send_signal(signal.SIGTERM)
    assert 1 <= int(cut_short(process, run).name[5:]) < UPDATES
    same_ends(finish(start("--resume_from_checkpoint", run)), whole)


def test_what_goes_wrong_in_validation_costs_no_checkpoint(command, tmp_path):
    process = start(*command, "--output_dir", tmp_path, "--save_steps", "3")
    run = wait_for(process, tmp_path, lambda run: True)
    (run / "samples").write_text("in the way")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2, err
    assert steps_in(run / "checkpoints") == [3]


def test_what_was_saved_and_not_examined_is_examined_first(whole, tmp_path):
    """As when a cluster asks to end at an update that is to be examined, and loses patience while it is."""
    run = tmp_path / whole.parent.parent.name
    shutil.copytree(whole.parent.parent, run)
    shutil.rmtree(run / "samples" / whole.name)
    write_log(run, [entry for entry in read_log(run) if entry["step"] < UPDATES or "loss" in entry])
    same_ends(finish(start("--resume_from_checkpoint", run)), whole)
    assert (run / "samples" / whole.name / "sheet.png").exists()


def test_samples_are_made_with_the_moving_average(whole, base, adapter):
    """What a checkpoint exports is the average: it gives the run's samples, and what was last updated does not."""
    told = json.loads((whole.parent.parent / "samples" / whole.name / "scores.json").read_text())
    prompts = told.pop("prompts")
    pipeline = AnimateDiffPipeline.from_pretrained(base, motion_adapter=adapter)
    pipeline.load_lora(whole)
    prompt, scores = next(iter(prompts.items()))
    assert general_scores(pipeline(prompt, **told)[0]) == pytest.approx(scores, rel=1e-4)
    averaged = pipeline.joined_lora("unet")
    size = lambda state, part: sum(float(np.abs(x).sum()) for name, x in state.items() if part in name and "lora_B" in name)
    exported, state = size(flatten(averaged), ""), state_of(whole)
    assert exported == pytest.approx(4 * size(state, "ema"), rel=1e-3)  # lora_alpha / lora_rank
    assert exported != pytest.approx(4 * size(state, "params"), rel=0.01)


def test_an_earlier_checkpoint_becomes_a_run_of_its_own(whole, tmp_path):
    run = whole.parent.parent
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    branch = finish(start("--resume_from_checkpoint", run / "checkpoints" / "iter-4", "--output_dir", tmp_path))
    assert branch.parent.parent.parent == tmp_path
    same_ends(branch, whole)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_the_best_and_the_last_are_kept(command, tmp_path):
    last = finish(start(*command, "--output_dir", tmp_path, "--save_total_limit", "2", "--save_steps", "1", "--eval_steps", "1"))
    losses = {entry["step"]: entry["validation_loss"] for entry in log_of(last.parent.parent) if "validation_loss" in entry}
    assert len(losses) == UPDATES
    best = best_of(last.parent.parent)["step"]
    assert best == min(losses, key=losses.get)
    assert set(steps_in(last.parent)) == {best, UPDATES} | ({UPDATES - 1} if best == UPDATES else set())


def test_what_cannot_be_gone_on_with(whole, tmp_path):
    with pytest.raises(UserError, match="no run in"):
        find_checkpoint("latest", str(tmp_path))
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(str(tmp_path), "")
    assert read_log(tmp_path) == []
    process = start("--resume_from_checkpoint", whole, "--lora_rank", "2", "--output_dir", tmp_path, "--max_steps", "9")
    _, err = process.communicate()
    assert process.returncode == 2
    assert "has shape" in err
    assert "take the run's own arguments" in err


def test_a_checkpoint_is_known_by_any_way_to_it(tmp_path, monkeypatch):
    """A link to it, or a path from inside the run; under another name it does not say which update it is."""
    checkpoint = tmp_path / "ad-1" / "checkpoints" / "iter-4"
    (checkpoint / "state").mkdir(parents=True)
    (tmp_path / "best").symlink_to(checkpoint)
    assert find_checkpoint(str(tmp_path / "best"), "") == checkpoint
    for inside, way in ((checkpoint, "."), (checkpoint.parent, "iter-4"), (checkpoint.parent.parent, ".")):
        monkeypatch.chdir(inside)
        assert find_checkpoint(way, "") == checkpoint
    copy = checkpoint.rename(tmp_path / "good one")
    with pytest.raises(UserError, match="give it that name back"):
        find_checkpoint(str(copy), "")


def test_a_checkpoint_that_was_copied_out_of_its_run_begins_another(tmp_path):
    checkpoint = tmp_path / "home" / "project" / "iter-4"
    (checkpoint / "state").mkdir(parents=True)
    run = run_folder(TrainConfig(output_dir=str(tmp_path / "out")), checkpoint)
    assert run.parent == tmp_path / "out"
    assert read_log(run) == []
    assert [path.name for path in (tmp_path / "home").rglob("*")] == ["project", "iter-4", "state"]


def test_a_run_that_goes_on_otherwise_says_so(tmp_path, caplog):
    run = tmp_path / "ad-1"
    checkpoint = run / "checkpoints" / "iter-4"
    (checkpoint / "state").mkdir(parents=True)
    rows = lambda *names: Records(tmp_path, names, [""] * len(names))
    save_json({"clips": 2, "held_out": 1, "clips_per_update": 16, "clips_hash": rows("a", "b").hash}, run / DATA)
    (run / "config.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        tell_changes(checkpoint, rows("a", "b"), 16, True)
        assert caplog.text == ""
        tell_changes(checkpoint, rows("a", "b"), 8, True)
        tell_changes(checkpoint, rows("a", "c"), 16, False)
        assert "held out" not in caplog.text
        tell_changes(checkpoint, rows("a"), 16, True)
    assert [message.split(":")[0] for message in caplog.messages[:3]] == [
        "8 clips an update, not 16", "other clips or captions", "1 clips, not 2",
    ]  # fmt: skip
    assert "held out for validation" in caplog.messages[3]


def test_latest_is_what_it_was_when_the_run_began(tmp_path):
    """The arguments of the run that is found may name another output_dir, and another run may become the newest meanwhile."""
    checkpoint = tmp_path / "ad-1" / "checkpoints" / "iter-4"
    (checkpoint / "state").mkdir(parents=True)
    save_json({"given": ["output_dir"], "output_dir": "elsewhere"}, checkpoint / "train_config.json")
    config = parse(TrainConfig, ["--resume_from_checkpoint", "latest", "--output_dir", str(tmp_path)])
    assert (config.resume_from_checkpoint, config.output_dir) == (str(checkpoint), str(tmp_path))
