"""What stands behind the page: which files may be read, what fields become, what is compiled anew, what a run shows. No browser here."""

import json
import os
import shutil
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

import studio
from anidiff_jax import denoising, sampling, text
from anidiff_jax.arguments import parse
from anidiff_jax.config import SampleConfig, TrainConfig
from anidiff_jax.errors import UserError, run_script
from anidiff_jax.lora import init_lora
from anidiff_jax.studio import gallery
from anidiff_jax.studio.asked import config_of
from anidiff_jax.studio.library import Library
from anidiff_jax.studio.maker import Maker, Stopped
from anidiff_jax.studio.runs import Run, runs_in
from anidiff_jax.studio.settings import Settings
from anidiff_jax.training.report import Report
from anidiff_jax.weights import kinds
from anidiff_jax.weights.base import EMBEDDED
from anidiff_jax.weights.loras import save_lora

ASKED = {
    "prompt": "a red circle", "negative_prompt": "", "model_id_or_path": "embedded", "motion_adapter_id_or_path": "none", "lora_1": "none",
    "lora_2": None, "lora_3": "none", "lora_scale_1": 1.0, "lora_scale_2": 1, "lora_scale_3": 1.0, "sample_n_frames": 2, "height": 32,
    "width": 32, "scheduler": "ddim", "num_inference_steps": 2, "guidance_scale": 4.0, "seed": 3, "closed_loop": False, "fps": 8,
    "output_format": [], "more": "",
}  # fmt: skip
quiet = lambda share, text: None


@pytest.fixture
def settings(tmp_path):
    for name in ("models", "runs", "made"):
        (tmp_path / name).mkdir()
    return Settings((tmp_path / "models",), tmp_path / "runs", tmp_path / "made", max_frames=16, max_side=64, max_steps=50, max_videos=4)


@pytest.fixture
def library(settings):
    return Library(settings.folders)


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studio")
    settings = Settings((folder,), folder / "runs", folder / "made", max_videos=4)
    return Maker(settings, Library(settings.folders))


def a_lora(maker, name, rank=2):
    """A LoRA of the embedded model's motion modules in the studio's folder."""
    import jax

    maker.make(ASKED, "first", quiet)
    lora = init_lora(jax.random.key(1), maker.pipeline.model.params["unet"], ".*motion_modules.*to_q", rank)
    lora = jax.tree.map(lambda x: x + 0.1, lora)
    path = maker.library.folders[0] / name
    path.mkdir(exist_ok=True)
    save_lora(lora, path, alpha=rank, dropout=0.0, base="embedded")
    return path


# Which files may be read


def test_only_what_lies_below_the_chosen_folders_is_read(settings, library, tmp_path, monkeypatch):
    inside, outside = tmp_path / "models" / "a.safetensors", tmp_path / "secret.safetensors"
    inside.write_bytes(b"x")
    outside.write_bytes(b"x")
    (tmp_path / "models" / "way-out").symlink_to(outside)
    assert library.permitted(str(inside), "model") == str(inside)
    assert library.permitted("owner/name", "model") == "owner/name"
    assert library.permitted("embedded", "model") is None
    monkeypatch.setenv("HOME", str(tmp_path))
    assert library.permitted("~/models/a.safetensors", "model") == str(inside)
    escapes = (
        outside,
        tmp_path / "models" / ".." / outside.name,
        tmp_path / "models" / "way-out",
        "/etc/passwd",
        "../x",
        "a/../b",
        "~/.ssh",
    )
    for path in escapes:
        with pytest.raises(UserError, match="is not below the folders of the studio"):
            library.permitted(str(path), "model")
    with pytest.raises(UserError, match="not there any more"):
        library.permitted(str(tmp_path / "models" / "gone.safetensors"), "model")


def test_an_id_that_is_also_a_path_here_is_a_path(library, tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not below"):
        library.permitted("owner/name", "model")


def test_a_folder_that_was_half_copied_is_looked_at_again(library, settings, adapter):
    copy = shutil.copytree(adapter, settings.models[0] / "adapter")
    weights, then = copy / "diffusion_pytorch_model.safetensors", copy.stat()
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert library.found()[kinds.MOTION] == []
    weights.write_bytes(whole)
    os.utime(copy, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert library.found()[kinds.MOTION] == [str(copy)]


def test_frames_are_listed_too(tmp_path):
    for name in ("a.mp4", "a-frames/0000.png", "a-frames/0001.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.json").write_text('{"prompt": "a", "seed": 1}')
    found = gallery.entry_of(tmp_path / "a.json")
    assert [path.name for path in found.files] == ["a.mp4", "0000.png", "0001.png", "a.json"]
    assert found.shown.name == "a.mp4"


def test_weights_are_found_by_what_they_are(library, settings, base, adapter, maker):
    models = settings.models[0]
    shutil.copytree(base, models / "deep" / "base")
    shutil.copytree(adapter, models / "adapter")
    (models / "elsewhere").symlink_to(EMBEDDED)
    (models / "broken.safetensors").write_bytes(b"nothing")
    (models / "notes.txt").write_text("hello")
    found = Library([models]).found()
    assert [path.removeprefix(str(models)) for path in found[kinds.MOTION]] == ["/adapter"]
    assert [path.removeprefix(str(models)) for path in found[kinds.BASE]] == ["/deep/base"]
    assert found[kinds.LORA] == []
    assert Library([EMBEDDED.parent]).found()[kinds.BASE] == [str(EMBEDDED)]
    assert Library([EMBEDDED.parent]).found()[kinds.MOTION] == [str(EMBEDDED / "motion_adapter")]
    assert str(a_lora(maker, "lora")) in maker.library.found()[kinds.LORA]


# Fields


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"width": 63}, "is not a positive multiple of 4"),
        ({"prompt": "  "}, "there is no prompt"),
        ({"sample_n_frames": 17}, "frames 17 is more than this studio makes \\(16\\)"),
        ({"height": 128}, "height 128 is more"),
        ({"num_inference_steps": 51}, "steps 51 is more"),
        ({"num_inference_steps": 20, "more": "--free_init_iterations 3"}, "steps 60 is more"),
        ({"seed": None}, "seed None must be a whole number"),
        ({"seed": -1}, "seed -1 must be at least 0"),
        ({"seed": 1.5}, "seed 1.5 must be a whole number"),
        ({"scheduler": "best"}, "invalid choice: 'best'"),
        ({"fps": 0}, "fps 0.0 must be above 0"),
        ({"prompt": "0: a\n5: b"}, "text for frame 5"),
        ({"more": "--output_path /tmp"}, "--output_path has no place here"),
        ({"more": "--init_video /etc/passwd"}, "--init_video has no place here"),
        ({"more": "--lora=x"}, "--lora has no place here"),
        ({"more": "run.yaml"}, "must be arguments"),
        ({"more": "--eta 0 -h"}, "-h has no place here"),
        ({"more": "--help"}, "--help has no place here"),
        ({"more": "--pag_layers (a+)+b"}, "--pag_layers has no place here"),
        ({"more": "--num_train_timesteps 3000000000"}, "has no place here"),
        ({"prompt": "x" * 20_001}, "prompt is longer than 20000"),
        ({"prompt": "{0: &a [x,x], 1: [*a,*a]}"}, "it repeats a part of itself"),
        ({"prompt": "{0: " + "[" * 5000}, "cannot be read"),
        ({"prompt": "{0: 2026-99-99}"}, "cannot be read"),
        ({"more": "--pag_scale 'x"}, "cannot be read"),
        ({"more": "--pag_scale x"}, "invalid float"),
        ({"lora_1": "/etc/passwd"}, "is not below"),
        ({"model_id_or_path": "/"}, "is not below"),
    ],
)
def test_what_cannot_be_made_is_told_in_a_line(settings, library, maker, changed, message):
    asked = {**ASKED, **changed}
    before = set(maker.settings.output_path.glob("*"))
    check = lambda: maker.make(asked if config_of(asked, settings, library) else {}, "first", quiet)  # sizes only the model knows
    with pytest.raises(UserError, match=message) as told:
        check()
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 500
    assert set(maker.settings.output_path.glob("*")) == before


def test_fields_that_are_loaded_from_a_video_make_it_again(maker):
    lora = a_lora(maker, "again")
    asked = {
        **ASKED, "prompt": "0: a red circle\n1: a (blue:1.2) star", "negative_prompt": "grey -x", "lora_2": str(lora), "lora_scale_2": -0.5,
        "closed_loop": True, "scheduler": "euler", "output_format": ["gif"], "more": "--prompt_tail='--on white' --guidance_rescale=0.5",
        "fps": 6.5,
    }  # fmt: skip
    record = maker.make(asked, "one", quiet)
    entry = gallery.entries(maker.settings.output_path)[0]
    assert entry.files[-1] == record
    assert {path.suffix for path in entry.files} == {".mp4", ".gif", ".json"}
    assert entry.shown.suffix == ".mp4"
    assert Image.open(entry.thumbnail).n_frames == 2
    again = gallery.fields_of(entry.record)
    assert again.keys() == asked.keys()
    assert maker.config(again).to_json() | {"given": ()} == maker.config(asked).to_json() | {"given": ()}
    record = maker.make(again, "one", quiet)
    assert record != entry.files[-1]
    first, second = (json.loads(path.read_text()) for path in (entry.files[-1], record))
    assert first == second
    assert entry.shown.read_bytes() == gallery.entry_of(record).shown.read_bytes()


def test_the_gallery_passes_over_what_it_cannot_read(tmp_path):
    (tmp_path / "half.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "other.json").write_text('{"prompt": "x", "seed": 1}')  # without a video
    assert gallery.entries(tmp_path) == []
    assert gallery.entries(tmp_path / "none") == []
    for name, value in (
        ("init_video", "a.mp4"),
        ("vae_path", "vae"),
        ("pag_layers", "x"),
        ("grid", ["seed=1,2"]),
        ("motion_norm", "joint"),
    ):
        asked = {"prompt": "x", "seed": 1, "height": 64, "width": 64, name: value}
        if name == "motion_norm":  # as it is by default
            assert gallery.fields_of(asked)["more"] == ""
            continue
        with pytest.raises(UserError, match=f"made with {name}"):
            gallery.fields_of(asked)


# What is compiled anew


def test_what_the_note_says_of_compiling_is_so(maker, monkeypatch):
    lora = a_lora(maker, "noted")
    used, step_of = {}, denoising.step_of
    monkeypatch.setattr(denoising, "step_of", lambda *of: used.setdefault(of, step_of(*of)))
    functions = lambda: [*used.values(), sampling.decode, text.encode_text]
    programs = lambda: sum(function._cache_size() for function in functions())
    maker.make(ASKED, "one", quiet)
    changes = [
        {"seed": 4}, {"prompt": "a blue star on a black background", "negative_prompt": "grey"}, {"guidance_scale": 2.5},
        {"num_inference_steps": 4}, {"fps": 4, "output_format": ["gif"]}, {"guidance_scale": 1.0}, {"width": 40}, {"width": 40, "seed": 9},
        {"lora_1": str(lora)}, {"lora_1": str(lora), "lora_scale_1": 0.3}, {"lora_1": str(lora), "lora_scale_1": 0.0},
        {"prompt": "red " * 100}, {"prompt": "blue " * 110}, {},
    ]  # fmt: skip
    seen = set()
    for changed in changes:
        asked = {**ASKED, **changed}
        if changed.get("lora_1"):
            maker._pipeline(maker.config(asked))  # read it, so that the note is about compiling alone
        before, said = programs(), maker.note(asked)
        maker.make(asked, "one", quiet)
        compiled = programs() > before
        assert said.startswith("Compiles first" if compiled else "Ready"), (changed, said)
        seen.add(compiled)
    assert seen == {True, False}
    assert "frames" in maker.note({**ASKED, "sample_n_frames": 5})
    assert maker.note({**ASKED, "motion_adapter_id_or_path": "owner/name"}).startswith("Loads the model first")
    assert maker.note({**ASKED, "width": 63}).startswith("⚠ width 63 is not")
    other = maker.library.folders[0] / "adapter"  # other weights of the same shape run through the same programs
    shutil.copytree(EMBEDDED / "motion_adapter", other)
    before = programs()
    maker.make({**ASKED, "motion_adapter_id_or_path": str(other)}, "one", quiet)
    assert programs() == before


# Jobs


def test_a_job_that_is_cancelled_ends_at_its_next_step_and_leaves_nothing(maker):
    before = set(maker.settings.output_path.iterdir())
    steps = []

    def progress(share, said):
        steps.append(said)
        if said.startswith("step 2"):
            assert maker.cancel("mine")

    with pytest.raises(Stopped):
        maker.make({**ASKED, "num_inference_steps": 50}, "mine", progress)
    assert len(steps) < 8
    assert "s left" in steps[-1]
    assert set(maker.settings.output_path.iterdir()) == before
    assert not maker.cancel("mine")
    assert not maker.cancel("another")


def test_a_job_that_waits_is_cancelled_too(maker):
    entered, go = threading.Event(), threading.Event()
    ended = []

    def hold(share, said):
        entered.set()
        go.wait(30)

    def wait():
        try:
            maker.make(ASKED, "second", quiet)
        except Stopped:
            ended.append("stopped")

    first = threading.Thread(target=maker.make, args=(ASKED, "first", hold))
    first.start()
    assert entered.wait(30)
    second = threading.Thread(target=wait)
    second.start()
    while not maker.cancel("second"):
        time.sleep(0.01)
    go.set()
    first.join(60)
    second.join(60)
    assert ended == ["stopped"]


@pytest.mark.parametrize(
    ("columns", "rows", "count"),
    [(("seed", "1,2,3"), ("", ""), 3), (("scheduler", "ddim,euler"), ("lora_scale_1", "0, 1"), 4), (("prompt", "a|b"), ("", ""), 2)],
)
def test_comparing_makes_one_video_of_all(maker, columns, rows, count):
    lora = a_lora(maker, "compared")
    said = []
    record = maker.compare({**ASKED, "lora_1": str(lora)}, columns, rows, None, "one", lambda share, text: said.append((share, text)))
    entry = gallery.entry_of(record)
    key = (
        "compared" if "lora_scale_1" in (columns[0], rows[0]) else "grid"
    )  # sample.py has no such argument, and takes the record all the same
    assert entry.record[key] == [f"{name}={text}" for name, text in (columns, rows) if name]
    assert len(parse(SampleConfig, ["--from_json", str(record)]).grid) == (key == "grid")
    assert any(f"of {count}: step 1 of 2" in text for _, text in said)
    shares = [share for share, _ in said]
    assert shares == sorted(shares)
    import imageio.v3 as iio

    across = 2 if rows[0] else count
    video = iio.imread(entry.shown)
    assert len(video) == 2
    assert abs(video.shape[2] - across * 34) <= 2


def test_checkpoints_of_a_run_are_compared(maker, monkeypatch):
    run = maker.settings.runs / "ad-1"
    lora = a_lora(maker, "trained")
    for step in (2, 10):
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "checkpoints" / f"iter-{step}").symlink_to(lora)
    labels = [label for label, _ in maker._axis(maker.config(ASKED), ASKED, "checkpoint", "", str(run))]
    assert labels == ["update 2", "update 10"]
    asked, made = {**ASKED, "lora_1": str(lora)}, []
    with monkeypatch.context() as patch:
        patch.setattr(maker, "_video", lambda config, job, progress: made.append(config.loras()) or np.zeros((2, 32, 32, 3)))
        maker.compare(asked, ("checkpoint", "2,10"), ("lora_scale_1", "0.5,1"), str(run), "one", quiet)
    trained = [(str(run / "checkpoints" / f"iter-{step}"), 1.0) for step in (2, 10)]
    assert made == [[(str(lora), scale), checkpoint] for scale in (0.5, 1.0) for checkpoint in trained]
    record = maker.compare(ASKED, ("checkpoint", "10"), ("seed", "1,2"), str(run), "one", quiet)
    assert gallery.entry_of(record)


@pytest.mark.parametrize(
    ("columns", "rows", "run", "message"),
    [
        (("seed", "1,2,3"), ("fps", "2"), None, "fps cannot be compared"),
        (("seed", "1,2,3,4,5"), ("", ""), None, "5 videos are more than this studio compares at once"),
        (("seed", "1,2,3"), ("scheduler", "ddim,euler"), None, "6 videos are more than this studio compares at once"),
        (("lora_scale_1", "0," * 9000), ("", ""), None, "9001 videos are more than this studio compares at once"),
        (("prompt", "a|{0: b, 2: c}"), ("", ""), None, "the prompt has a text for frame 2"),
        (("seed", "1,x"), ("", ""), None, "invalid int value"),
        (("seed", "1"), ("seed", "2"), None, "both seed"),
        (("lora_scale_1", "1"), ("", ""), None, "there is no LoRA 1"),
        (("guidance_scale", "nan"), ("", ""), None, "is not a number to compute with"),
        (("checkpoint", "nan"), ("", ""), "runs", "is not a number"),
        (("checkpoint", ""), ("", ""), None, "choose the run"),
        (("checkpoint", ""), ("", ""), "/etc", "not below"),
        (("num_inference_steps", "5,999"), ("", ""), None, "steps 999 is more"),
        (("", ""), ("", ""), None, "nothing to compare"),
    ],
)
def test_what_cannot_be_compared_is_told(maker, columns, rows, run, message):
    run = str(maker.settings.runs / "ad-1") if run == "runs" else run
    with pytest.raises(UserError, match=message):
        maker.compare(ASKED, columns, rows, run, "one", quiet)


# Runs


def test_a_run_is_read_while_it_trains(tmp_path):
    run = tmp_path / "ad-7"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({**TrainConfig(seed=5).to_json(), "given": ["seed"]}))
    data = {"clips": 9, "held_out": 2, "updates": 40, "clips_per_update": 4, "skipped": {"a.mp4": "empty"}}
    (run / "data.json").write_text(json.dumps(data))
    with Report(run, TrainConfig(), 40, 4) as report:
        for step in range(1, 31):
            report.update(step, 1 / step, 0.1, 1e-4)
        report.scores(30, {"validation_loss": 0.5, "validation_loss_0": 0.25, "motion_degree": 0.1})
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 31, "lo')  # as a reader may meet it
    seen = Run.read(run)
    assert runs_in(tmp_path) == [str(run)]
    assert "Update 30 of 40" in seen.status()
    assert "training" in seen.status()
    assert " s left" in seen.status()
    losses = seen.losses()
    assert [row for row in losses if row[0] == 30] == [
        (30, 1 / 30, "each"),
        (30, pytest.approx(np.mean([1 / s for s in range(11, 31)])), "mean of 20"),
    ]
    assert seen.validation() == [(30, 0.5, "mean"), (30, 0.25, "0")]
    assert seen.scores() == [(30, 0.1, "motion degree")]
    assert "9 clips, 2 held out" in seen.data_report()
    assert "`a.mp4`: empty" in seen.data_report()
    assert seen.settings()[0] == ("seed", "5", "given")
    assert seen.cost()
    (run / "report.md").write_text("# ad-7\n\n## Cost\n\n| | |\n|---|---|\n| updates | 30 |\n\n## Samples\n")
    assert Run.read(run).state() == "stopped"  # at 30 of 40
    assert Run.read(run).cost() == [("updates", "30")]
    os.utime(run / "report.md", (1, 1))  # and was gone on with since
    assert Run.read(run).state() == "training"
    assert len(Run.read(run).cost()) == 3
    (run / "data.json").write_text(json.dumps({**data, "updates": 30}))
    os.utime(run / "report.md")
    assert Run.read(run).state() == "finished"


# Starting it


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "give --auth user:password"),
        (["--host", "0.0.0.0", "--auth", "ann"], "auth must be user:password"),
        (["--models", "/no/such/folder"], "is no folder"),
        (["--max_upload", "many"], "is not a size"),
        (["--queue", "0"], "queue 0 must be at least 1"),
    ],
)
def test_a_wrong_start_ends_with_a_line(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["studio.py", *words])
    with pytest.raises(SystemExit) as ended:
        run_script(studio.main)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_loopback_needs_no_password():
    assert Settings(host="localhost").private
    assert Settings(host="::1").private
    assert not Settings(host="example.org", auth="a:b").private
    assert Settings(host="0.0.0.0", auth="ann:a:b").login == ("ann", "a:b")
