"""What train.py hands on of its arguments. Each time it is stopped at one of its calls, so that nothing is computed."""

import sys
from dataclasses import replace

import numpy as np
import pytest

import train
from anidiff_jax.config import TrainConfig
from anidiff_jax.shapes.clips import write_clips
from anidiff_jax.training import setup
from tests.conftest import words_of

DEVICES, CLIPS = 4, 6


class Reached(Exception):
    """Carries what the call was given."""


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_clips(folder, CLIPS, seed=1)
    return folder


@pytest.fixture(scope="module")
def model(base):
    return setup.load(TrainConfig(model_id_or_path=str(base), sft_type="full"))


@pytest.fixture
def given_to(model, clips, monkeypatch):
    """given_to("data.loader.batches", word, …) → what train.py gives that function of ours, with those words on its command line."""

    def stop(*arguments):
        raise Reached(*arguments)

    def given_to(function: str, *words) -> tuple:
        model_and_data = words_of(model_id_or_path="a/model", sft_type="full", csv_path=clips / "clips.csv", video_folder=clips)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", *model_and_data, *words])
            patch.setattr("anidiff_jax.parallel.set_up_jax", lambda *_: None)  # the compile cache stays the tests' own
            patch.setattr(setup, "load", lambda _: replace(model))
            patch.setattr(f"anidiff_jax.{function}", stop)
            with pytest.raises(Reached) as reached:
                train.main()
        return reached.value.args

    return given_to


@pytest.mark.parametrize(
    ("words", "updates"),
    [
        ("--num_train_epochs 3", 5),  # 18 clips, 4 an update
        ("--num_train_epochs 3 --batch_size 2", 3),
        ("--num_train_epochs 3 --dataset_sample_size 2", 2),
        ("--num_train_epochs 3 --max_steps 7", 7),
        ("--num_train_epochs 3 --max_steps 0", 0),
    ],
)
def test_the_length_of_a_run(given_to, words, updates):
    _, told = given_to("training.state.make_optimizer", "--gradient_accumulation_steps", "1", *words.split())
    assert told == updates


def test_how_many_clips_an_update_sees_and_how_many_threads_read_them(given_to):
    words = ["--batch_size", "3", "--gradient_accumulation_steps", "5", "--dataloader_num_workers", "7"]
    _, size, threads, first, *_ = given_to("data.loader.batches", *words)
    assert (size, threads, first) == (DEVICES * 3 * 5, 7, 0)


def test_an_update_is_split_into_micro_batches(given_to, monkeypatch):
    monkeypatch.setattr("anidiff_jax.data.loader.batches", lambda *_: iter([{"index": np.arange(60)}]))
    _, micro_batches = given_to("parallel.split_batch", "--batch_size", "3", "--gradient_accumulation_steps", "5")
    assert micro_batches == 5


def test_devices_and_processes(given_to):
    assert given_to("parallel.set_up_jax", "--ddp_backend", "mpi", "--deterministic") == ("mpi", True)
    cluster = ["--coordinator_address", "here:1", "--num_processes", "2", "--process_id", "1"]
    assert given_to("parallel.join_cluster", *cluster) == ("here:1", 2, 1)


def test_the_data_are_checked_where_that_is_asked_for(given_to):
    rows, config = given_to("data.vet.check_data", "--check_data", "true", "--output_dir", "there")
    assert (len(rows), config.output_dir) == (CLIPS, "there")


def test_the_moving_average_is_kept_where_it_is_asked_for(given_to):
    for words, kept in ((["--ema_decay", "0.9"], True), ([], False)):
        (state,) = given_to("parallel.replicate", *words)
        assert (state.ema is not None) == kept
