"""Two processes of two devices do what one process of four does; when one dies, the other ends."""

import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from tests.training.runs import cut_short, finish, log_of, short_run, start, state_of, wait_for


@pytest.fixture(scope="module")
def command(base, adapter, tmp_path_factory):
    return [*short_run(base, adapter, tmp_path_factory.mktemp("videos"), 4), "--ddp_backend", "gloo"]


def start_two(*words):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    cluster = lambda i: ["--coordinator_address", address, "--num_processes", "2", "--process_id", i]
    return [start(*words, *cluster(i), devices=2) for i in (0, 1)]


def test_two_processes_do_what_one_does(command, tmp_path):
    one = finish(start(*command, "--output_dir", tmp_path / "one", devices=4))
    first, second = start_two(*command, "--output_dir", tmp_path / "two")
    two = finish(first)
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    assert "iter-" not in out
    assert "updates of" not in err
    assert len(list((tmp_path / "two").iterdir())) == 1  # only process 0 writes
    ours, theirs = state_of(two), state_of(one)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=2e-3, atol=2e-6, err_msg=name)
    for a, b in zip(log_of(two.parent.parent), log_of(one.parent.parent), strict=True):
        assert a.keys() == b.keys()
        assert a["step"] == b["step"]
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_when_one_dies_the_other_ends(command, tmp_path):
    first, second = start_two(*command, "--output_dir", tmp_path, "--max_steps", "100000")
    wait_for(first, tmp_path, lambda run: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") > 2)
    second.kill()
    second.wait()
    clock = time.monotonic()
    _, err = first.communicate(timeout=90)
    assert time.monotonic() - clock < 60
    assert first.returncode != 0, err


def test_when_one_is_asked_to_end_both_do(command, tmp_path):
    """A cluster may take one machine back: all save at the same update."""
    processes = start_two(*command, "--output_dir", tmp_path, "--max_steps", "100000", "--save_steps", "100000")
    begun = lambda run: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") > 2
    run = wait_for(processes[0], tmp_path, begun)
    processes[1].send_signal(signal.SIGTERM)
    checkpoint = cut_short(processes[0], run)
    _, err = processes[1].communicate(timeout=60)
    assert processes[1].returncode == 143, err
    assert int(checkpoint.name[5:]) == log_of(checkpoint.parent.parent)[-1]["step"]
    assert state_of(checkpoint)


def test_processes_that_see_other_clips_end(command, tmp_path):
    """As where the videos were copied to each machine, and one lacks some."""
    clips = Path(command[command.index("--video_folder") + 1])
    shutil.copytree(clips, tmp_path / "copy")
    sorted((tmp_path / "copy").glob("*.mp4"))[0].unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        cluster = ["--coordinator_address", f"127.0.0.1:{free.getsockname()[1]}", "--num_processes", "2"]
    folders = (clips, tmp_path / "copy")
    both = [start(*command, "--video_folder", folder, *cluster, "--process_id", i, devices=1) for i, folder in enumerate(folders)]
    for process in both:
        _, err = process.communicate(timeout=90)
        assert process.returncode == 2, err
        assert "do not see the same clips (7, 6 rows)" in err
