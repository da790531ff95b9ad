"""What sample.py loads and asks of the pipeline, as its arguments say. Nothing is computed: test_pipeline.py does."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageSequence

import sample
from anidiff_jax import interactive, loading
from anidiff_jax.arguments import parse
from anidiff_jax.config import PROMPTS, SampleConfig
from anidiff_jax.errors import UserError
from anidiff_jax.grid import axes_of
from anidiff_jax.lora import init_lora
from anidiff_jax.models.layers import Settings
from anidiff_jax.outputs import check_models, record_of, settings_of
from anidiff_jax.pipeline import AnimateDiffPipeline
from anidiff_jax.video import save_frames
from anidiff_jax.weights.base import load_model
from anidiff_jax.weights.loras import save_lora
from anidiff_jax.weights.tree import flatten
from tests import reference
from tests.conftest import words_of

PLAIN = {
    "clip_skip": 0, "prompt_head": "", "prompt_tail": "", "prompt_interpolation": "linear", "init_video": None, "init_image": None,
    "mask_video": None, "init_stride": 1, "strength": 0.8,
    "guidance_rescale": 0.0, "guidance_start": 0.0, "guidance_end": 1.0, "freeu": None, "pag_scale": 0.0, "pag_adaptive_scale": 0.0,
    "pag_layers": "mid_block.*attn1", "context_frames": None, "context_overlap": None, "context_schedule": "uniform", "context_batch": 1,
    "closed_loop": False, "free_noise": "shuffle", "free_init_iterations": 0, "free_init_filter": "butterworth", "free_init_order": 4,
    "free_init_spatial_stop": 0.25, "free_init_temporal_stop": 0.25, "free_init_fast": False,
}  # fmt: skip
CLIP = ["--sample_size", "16", "--sample_n_frames", "3"]


@pytest.fixture
def load(base, adapter):
    """load(word, …) → the pipeline for those words on the command line"""
    models = ["--model_id_or_path", base, "--motion_adapter_id_or_path", adapter]
    return lambda *words: loading.load(parse(SampleConfig, [str(word) for word in (*models, *CLIP, *words)]))


@pytest.fixture(scope="module")
def lora(base, adapter, tmp_path_factory):
    """A checkpoint of LoRA training, with a scale of 2."""
    fresh = init_lora(jax.random.key(0), load_model(base, adapter).params["unet"], r".*motion_modules.*attn1\.to_q", 4)
    folder = tmp_path_factory.mktemp("run") / "iter-3"
    folder.mkdir()
    save_lora(jax.tree.map(lambda x: x + 0.5, fresh), folder, 8, 0.0, "base")
    return folder


@pytest.fixture
def asked(base, tmp_path, monkeypatch, capsys):
    """asked(word, …) → (what each call of the pipeline was given, the files that were printed)"""
    calls = []

    def video(self, prompt, progress, seed, negative_prompt, **settings):
        if "huge" in prompt[0]:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
        for one in zip(prompt, seed, negative_prompt, strict=True):
            calls.append(dict(zip(("prompt", "seed", "negative_prompt"), one, strict=True)) | settings)
        shape = (len(prompt), settings["num_frames"], settings["height"], settings["width"], 3)
        return np.random.default_rng(0).random(shape, np.float32)

    def asked(*words, typed=""):
        calls.clear()
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        monkeypatch.setattr(sys, "argv", ["sample.py", "--output_path", str(tmp_path / "gifs"), *map(str, words)])
        monkeypatch.setattr("anidiff_jax.parallel.set_up_jax", lambda: None)  # the compile cache stays the tests' own
        monkeypatch.setattr(AnimateDiffPipeline, "__call__", video)
        sample.main()
        return list(calls), capsys.readouterr().out.splitlines()

    return asked


def test_the_defaults_of_the_embedded_model(asked):
    (call,), _ = asked("--prompt", "a star")
    assert call == {
        "prompt": "a star", "negative_prompt": "", "num_frames": 8, "height": 64, "width": 64, "num_inference_steps": 25,
        "guidance_scale": 5.0, "seed": 42, "scheduler": "ddim", "eta": 0.0, **PLAIN, "context_frames": 8,
    }  # fmt: skip


def test_what_is_asked_for_and_what_the_file_says(asked, base, tmp_path):
    words = {
        "model_id_or_path": base, "prompt": "a star", "negative_prompt": "a square", "sample_size": "16x24", "sample_n_frames": 4,
        "num_inference_steps": 3, "guidance_scale": 2.5, "seed": 9, "sample_stride": 6, "fps": 5, "beta_end": 0.02,
        "scheduler": "ddim", "eta": 0.5,
    }  # fmt: skip
    more = {
        "guidance_rescale": 0.5, "guidance_start": 0.25, "guidance_end": 0.75, "pag_scale": 2.0, "pag_adaptive_scale": 0.001,
        "pag_layers": "down_blocks.*attn1", "context_frames": 3, "context_overlap": 1, "context_schedule": "static", "context_batch": 2,
        "closed_loop": True, "free_noise": "repeat", "free_init_iterations": 2, "free_init_filter": "box", "free_init_order": 3,
        "free_init_spatial_stop": 0.5, "free_init_temporal_stop": 0.75, "free_init_fast": True, "freeu": "0.9,0.2,1.2,1.4", "clip_skip": 1,
        "prompt_head": "very good", "prompt_tail": "sharp", "prompt_interpolation": "spherical", "init_stride": 2, "strength": 0.5,
    }  # fmt: skip
    words |= more
    (call,), (printed,) = asked(*words_of(**words))
    settings = {
        "negative_prompt": "a square", "num_frames": 4, "height": 16, "width": 24, "num_inference_steps": 3, "guidance_scale": 2.5,
        "seed": 9, "scheduler": "ddim", "eta": 0.5, **more,
    }  # fmt: skip
    given = {"init_video": None, "init_image": None, "mask_video": None}
    assert call == {"prompt": "a star", **settings, **given}
    assert set(PLAIN) == {*more, *given}
    words = {"init_video": "a.mp4", "mask_video": "b.png", "sample_n_frames": 3, "model_id_or_path": base}
    (call,), _ = asked("--prompt", "a star", *words_of(**words))
    assert (call["init_video"], call["mask_video"]) == ("a.mp4", "b.png")
    assert asked("--prompt", "a star", "--init_image", "c.png")[0][0]["init_image"] == "c.png"
    assert printed == str(tmp_path / "gifs" / "a-star-seed9.gif")
    image = Image.open(printed)
    assert (image.size, image.n_frames) == ((24, 16), 4)
    assert sum(page.info["duration"] for page in ImageSequence.Iterator(image)) == 800
    said = json.loads(image.info["comment"])
    said_too = {"prompt": "a star", **settings, "stride": 6, "beta_end": 0.02, "dtype": "float32", "model_id_or_path": str(base)}
    assert said.items() >= said_too.items()
    (call,), (printed,) = asked(*words_of(model_id_or_path=base, prompt="a star", sample_size=16, sample_n_frames=4, preset="lightning"))
    expected = {"scheduler": "euler", "num_inference_steps": 4, "guidance_scale": 1.0}
    assert call.items() >= expected.items()
    assert json.loads(Image.open(printed).info["comment"]).items() >= {**expected, "timestep_spacing": "trailing"}.items()


def test_a_grid_over_prompts_that_travel_and_masks(asked, load, tmp_path, monkeypatch):
    """Each value is checked with the other arguments, not by itself."""
    pipeline = load()
    monkeypatch.setattr(loading, "load", lambda _: pipeline)
    words = [*CLIP, "--sample_n_frames", 20]
    calls, printed = asked(*words, "--grid", 'prompt={0: "a", 16: "b"}|c')
    assert [call["prompt"] for call in calls] == ['{0: "a", 16: "b"}', "c"]
    assert asked("--from_json", printed[-1])[0] == calls
    for name in ("m1.png", "m2.png", "a.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    given = ["--prompt", "a", "--init_image", tmp_path / "a.png", "--grid", f"mask_video={tmp_path}/m1.png,{tmp_path}/m2.png"]
    calls, printed = asked(*words, *given)
    assert [Path(call["mask_video"]).name for call in calls] == ["m1.png", "m2.png"]
    free = ["1,1,1,1", "0.9,0.2,1.2,1.4"]
    assert [call["freeu"] for call in asked(*words, "--prompt", "a", "--grid", f"freeu={'|'.join(free)}")[0]] == free
    assert asked("--from_json", printed[0], "--init_image", "", "--mask_video", "")[0][0]["init_image"] is None
    (call,), _ = asked("--from_json", printed[0], "--init_video", tmp_path / "a.png", "--mask_video", "")
    assert (call["init_image"], call["init_video"]) == (None, str(tmp_path / "a.png"))
    with pytest.raises(UserError, match="a text for frame 16, and the video's 3 frames"):
        asked(*CLIP, "--grid", 'prompt={0: "a", 16: "b"}|c')


def test_prompts(asked, load, tmp_path, monkeypatch):
    pipeline = load()
    monkeypatch.setattr(loading, "load", lambda _: pipeline)
    prompts = lambda *words, **more: [call["prompt"] for call in asked("--model_id_or_path", "a/model", *CLIP, *words, **more)[0]]
    assert prompts() == PROMPTS.read_text().splitlines()
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  \ntwo\n")
    assert prompts("--validation_prompts_path", file) == ["one", "two"]
    assert prompts("--validation_prompts_path", file, "--prompt", "three") == ["three"]
    for end in ("\nfour\n", "exit\nfour\n", ""):  # an empty line, the word, Ctrl-D
        assert prompts("--eval_human", "true", typed="one\ntwo\n" + end) == ["one", "two"]


def test_a_conversation(asked, load, lora, monkeypatch, capsys):
    """What is typed between prompts changes what follows; a mistake is told and changes nothing."""
    pipeline = load()
    monkeypatch.setattr(loading, "load", lambda _: pipeline)
    said = f"""a star
/seed 7
/steps 3
/neg grey, dim
/again
/again
/seed x
/steps
/nonsense
/lora none.safetensors:0.5
/lora {lora}:0.5
a moon
/neg
/lora none
/size 24x16
/again
/help
/settings
"""
    calls, printed = asked("--model_id_or_path", "a/model", *CLIP, "--eval_human", typed="/again\n" + said)
    seen = [(c["prompt"], c["seed"], c["num_inference_steps"], c["negative_prompt"], c["height"]) for c in calls]
    assert seen == [
        ("a star", 42, 25, "", 16),
        ("a star", 7, 3, "grey, dim", 16),  # with what was changed
        ("a star", 8, 3, "grey, dim", 16),  # nothing was changed: another seed
        ("a moon", 8, 3, "grey, dim", 16),
        ("a moon", 8, 3, "", 24),
    ]
    records = [settings_of(path) for path in printed]
    assert [record["lora"] for record in records] == [[], [], [], [f"{lora}:0.5"], []]
    assert ["lora_1" in record["hashes"] for record in records] == [False, False, False, True, False]


def test_no_lora_leaves_what_is_in_the_weights(load, lora):
    """A merged checkpoint, or one of full training, stays; what is recorded still names it."""
    for words, left in (((), None), (("--merge_lora", "true"), str(lora)), (("--sft_type", "full"), str(lora))):
        given = ["--motion_adapter_id_or_path", "an/adapter", "--ckpt_dir", str(lora), *words]
        pipe = load()
        pipe.loras = [object()]
        session = interactive.Session(parse(SampleConfig, given), pipe)
        session.answer("/lora none")
        assert session.config.ckpt_dir == left
        assert pipe.loras == []


def test_a_conversation_goes_on_where_memory_was_too_small(asked):
    calls, printed = asked("--eval_human", typed="a huge star\na moon\n")
    assert [call["prompt"] for call in calls] == ["a moon"]
    assert len(printed) == 1


def test_mistakes_in_a_conversation(load):
    session = interactive.Session(parse(SampleConfig, []), load())
    for line, message in {
        "/again": "there was none yet",
        "/seed x": "invalid int value: 'x'",
        "/steps": "it is 25",
        "/steps 0": "must be at least 1",
        "/nonsense 1": "there are /seed, /neg",
        "/lora": "needs a path",
        "/lora none.safetensors:0.5": "none.safetensors",
    }.items():
        before = session.config
        with pytest.raises(UserError, match=message):
            session.answer(line)
        assert session.config == before
        assert session.pipeline.loras == []


def test_the_strip_of_frames():
    """Eight frames of two colours, upper and lower half: each character has the one above the other, and the row fits the terminal."""
    video = np.zeros((9, 2, 4, 3), np.float32)
    video[:, 0, :, 0] = video[:, 1, :, 2] = 1
    (row,) = interactive.strip(video, 40).split("\n")
    frames = row.split(" ")
    assert frames == ["\x1b[38;2;255;0;0;48;2;0;0;255m▀" * 4 + "\x1b[0m"] * 8


def test_how_it_computes(load, monkeypatch):
    types = lambda pipeline: {str(x.dtype) for x in jax.tree.leaves(pipeline.model.params)}
    half = load("--dtype", "bfloat16", "--enable_xformers_memory_efficient_attention", "false")
    assert types(half) == {"bfloat16"}
    assert half.model.networks.unet.settings == half.model.networks.vae.settings == Settings(dtype="bfloat16", attention="xla")
    told = {}
    monkeypatch.setattr(AnimateDiffPipeline, "from_pretrained", lambda *models, **how: told.update(how) or half)
    usual = lambda *words: load(*words) and (told["dtype"], told["attention"])
    assert usual() == ("float32", "auto")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert usual() == ("bfloat16", "auto")
    assert usual("--dtype", "float32") == ("float32", "auto")


def test_the_noise(load):
    noise = {
        "num_train_timesteps": 500, "beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "scaled_linear", "steps_offset": 2,
        "clip_sample": True, "timestep_spacing": "trailing", "set_alpha_to_one": False, "rescale_betas_zero_snr": True,
    }  # fmt: skip
    pipeline = load(*words_of(**noise))
    assert vars(pipeline.schedule) == {**noise, "prediction_type": "epsilon"}  # as the base's scheduler_config.json says
    assert load("--prediction_type", "v_prediction").schedule.prediction_type == "v_prediction"


def test_the_motion_modules(load, adapter):
    bare = ["--motion_adapter_id_or_path", adapter / "diffusion_pytorch_model.safetensors"]
    assert load(*bare, "--motion_num_attention_heads", "4").model.motion.heads == (4, 4)
    with pytest.raises(UserError, match="motion_max_seq_length 32 conflicts"):
        load("--motion_max_seq_length", "32")


def test_each_model_in_its_revision(load, base, adapter, lora, monkeypatch, tmp_path):
    asked, known = set(), {"a/model": base, "an/adapter": adapter}

    def resolve(name, revision=None, *_, **__):
        if name not in known:
            return Path(name)
        asked.add((name, revision))
        return known[name]

    monkeypatch.setattr("anidiff_jax.pipeline.resolve", resolve)
    monkeypatch.setattr("anidiff_jax.weights.merge.resolve", resolve)
    models = ["--model_id_or_path", "a/model", "--motion_adapter_id_or_path", "an/adapter"]
    checkpoint = shutil.copytree(lora, tmp_path / "iter-3")
    load(*models, "--model_revision", "v1", "--motion_adapter_revision", "v2", "--ckpt_dir", checkpoint, "--merge_lora", "true")
    assert asked == {("a/model", "v1"), ("an/adapter", "v2")}


def test_what_was_trained_is_sampled(load, lora, tmp_path):
    plain = load()
    assert plain.loras == []
    ((adapter, scale),) = load("--ckpt_dir", lora).loras
    assert scale == 1
    assert all((np.asarray(x) != 0).all() for x in flatten(adapter.unet).values())
    trained = reference.write_adapter(tmp_path, reference.adapter(seed=5))
    full = load("--ckpt_dir", trained, "--sft_type", "full")
    key = "mid_block.motion_modules.0.proj_in.weight"
    weights = [np.asarray(flatten(pipeline.model.params["unet"])[key]) for pipeline in (plain, full)]
    np.testing.assert_array_equal(weights[1].T, reference.adapter(seed=5).state_dict()[key].numpy())
    assert (weights[0] != weights[1]).any()
    with pytest.raises(UserError, match="holds a LoRA: give --sft_type lora"):
        load("--ckpt_dir", lora, "--sft_type", "full")
    with pytest.raises(UserError, match="holds no LoRA: give --sft_type full"):
        load("--ckpt_dir", trained)


def test_loras_norms_strength_and_parts(load, lora, base, tmp_path):
    reference.vae(seed=9).save_pretrained(tmp_path / "vae")
    reference.text_encoder(reference.vocabulary_size(), seed=9).save_pretrained(tmp_path / "text_encoder")
    words = words_of(motion_norm="per_frame", spatial_norm="joint", motion_scale=0.5, vae_path=tmp_path / "vae")
    words += words_of(text_encoder_path=tmp_path / "text_encoder", lora=f"{lora}:0.25")
    pipeline, plain = load(*words, "--lora", lora), load()
    assert [scale for _, scale in pipeline.loras] == [0.25, 1.0]
    settings = pipeline.model.networks.unet.settings
    assert (settings.motion_norm, settings.spatial_norm, settings.motion_scale) == ("per_frame", "joint", 0.5)
    for part in ("vae", "text_encoder"):
        ours, own = (jax.tree.leaves(x.model.params[part]) for x in (pipeline, plain))
        assert any((a != b).any() for a, b in zip(ours, own, strict=True))


def test_values_of_a_grid_and_of_commands_are_checked_with_the_others_that_were_given():
    """Not with those of the embedded model, or of formats that are not written."""
    config = parse(SampleConfig, ["--model_id_or_path", "sd", "--sample_n_frames", "32", "--context_frames", "16", "--prompt", "a"])
    (axis,) = axes_of(config.but(grid=["context_overlap=4,8"]), ["a"])
    assert axis.values == (4, 8)
    session = interactive.Session(parse(SampleConfig, ["--output_format", "mp4"]), None)
    assert session.answer("/fps 60") is None
    assert session.config.fps == 60


def test_merging(load, lora, tmp_path, capsys, monkeypatch):
    checkpoint = shutil.copytree(lora, tmp_path / "iter-3")
    words = ["--ckpt_dir", checkpoint, "--merge_lora", "true"]
    merged = load(*words)
    folder = tmp_path / "iter-3-merged"
    assert capsys.readouterr().out == f"{folder}\n"
    assert merged.loras == []
    of = lambda pipeline: flatten(pipeline.model.params["unet"])
    folded, again, plain = of(merged), of(load("--motion_adapter_id_or_path", folder)), of(load())
    for key, value in folded.items():
        np.testing.assert_allclose(value, again[key], rtol=1e-5, atol=1e-6, err_msg=key)
        assert bool(jnp.any(value != plain[key])) == (key.endswith("attn1.to_q.weight") and "motion_modules" in key), key
    with pytest.raises(UserError, match="merge_lora needs --sft_type lora and --ckpt_dir"):
        load("--merge_lora", "true")
    with pytest.raises(UserError, match="merge_lora needs --motion_adapter_id_or_path"):
        loading.load(parse(SampleConfig, ["--model_id_or_path", "sd", "--ckpt_dir", str(lora), "--merge_lora", "true"]))
    monkeypatch.setattr(AnimateDiffPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded first"))
    with pytest.raises(UserError, match="give --replace_if_exists true"):
        load(*words)
    monkeypatch.setattr(AnimateDiffPipeline, "from_pretrained", lambda *_, **__: merged)  # it need not be read again
    before = (folder / "config.json").stat().st_mtime_ns
    with pytest.raises(UserError, match="give --replace_if_exists true"):
        load(*words)
    assert (folder / "config.json").stat().st_mtime_ns == before
    load(*words, "--replace_if_exists", "true")
    assert (folder / "config.json").stat().st_mtime_ns > before


SMALL = ["--sample_size", "16", "--sample_n_frames", "4", "--num_inference_steps", "2"]


@pytest.fixture
def sampled(base, adapter, tmp_path, monkeypatch, capsys):
    """sampled(word, …) → (the files that were printed, the log), from the tiny base itself"""

    def sampled(*words, models=True):
        given = ["--model_id_or_path", base, "--motion_adapter_id_or_path", adapter, *SMALL] if models else []
        monkeypatch.setattr(sys, "argv", ["sample.py", "--output_path", str(tmp_path / "out"), *map(str, [*given, *words])])
        monkeypatch.setattr("anidiff_jax.parallel.set_up_jax", lambda: None)
        sample.main()
        out, err = capsys.readouterr()
        return [Path(line) for line in out.splitlines()], err

    return sampled


def test_several_videos_of_a_prompt(asked):
    calls, printed = asked("--prompt", "a star", "--seed", 5, "--num_videos_per_prompt", 3)
    assert [call["seed"] for call in calls] == [5, 6, 7]
    assert [Path(path).name for path in printed] == [f"a-star-seed{seed}.gif" for seed in (5, 6, 7)]
    assert [settings_of(path)["seed"] for path in printed] == [5, 6, 7]


def test_a_video_is_made_again(sampled, lora, tmp_path):
    """From any file that holds its settings, bit for bit; what is given besides changes it."""
    words = ["--prompt", "a star, größer", "--negative_prompt", "a = b", "--lora", f"{lora}:0.3", "--guidance_scale", 3, "--fps", 5]
    words += ["--beta_end", 0.02, "--output_format", "gif", "mp4", "png", "--num_videos_per_prompt", 2, "--validation_prompts_path", "none"]
    made, _ = sampled(*words)
    gif, mp4, folder = made[3:]  # of the second
    again, log = sampled("--from_json", mp4, "--output_path", tmp_path / "again", models=False)
    assert [path.name for path in again] == [path.name for path in (gif, mp4, folder)]
    assert log == ""
    for path, other in ((gif, again[0]), (mp4, again[1]), (folder / "0003.png", again[2] / "0003.png")):
        assert path.read_bytes() == other.read_bytes()
    assert gif.with_suffix(".json").read_bytes() == again[0].with_suffix(".json").read_bytes()

    elsewhere = ["--output_path", tmp_path / "elsewhere", "--output_format", "gif"]
    (other,), log = sampled("--from_json", folder, *elsewhere, "--seed=9", "--lora", f"{lora}:0.6", models=False)
    assert other.name == "a-star-größer-seed9.gif"
    assert log == ""  # the LoRA is the same, only stronger
    changed = {"seed": 9, "lora": [f"{lora}:0.6"], "output_format": ["gif"]}
    assert settings_of(other) == {**settings_of(gif), **changed}
    recipe = parse(SampleConfig, ["--from_json", str(other), "--preset", "lightning", "--guidance_scale", "2"])
    assert (recipe.scheduler, recipe.num_inference_steps, recipe.guidance_scale, recipe.seed) == ("euler", 4, 2.0, 9)
    assert parse(SampleConfig, ["--from_json", str(other), "--model_id_or_path", "SD"]).prediction_type is None
    prompts = parse(SampleConfig, ["--from_json", str(other), "--validation_prompts_path", "prompts.txt"])
    assert (prompts.prompt, prompts.validation_prompts_path, prompts.fps) == (None, "prompts.txt", 5)


def test_a_video_that_was_painted_over_is_made_again(sampled, tmp_path):
    """From the same file alone."""
    colours = np.random.default_rng(0).integers(0, 255, (2, 20, 16, 16, 3), np.uint8)
    save_frames(colours[0, :4], tmp_path / "first")
    Image.fromarray(colours[0, 0]).save(tmp_path / "mask.png")
    words = ["--init_video", tmp_path / "first", "--mask_video", tmp_path / "mask.png", "--strength", "0.5", "--output_format", "png"]
    (made,), _ = sampled("--prompt", "a star", *words)
    (again,), log = sampled("--from_json", made, "--output_path", tmp_path / "again", models=False)
    assert log == ""
    assert (made / "0003.png").read_bytes() == (again / "0003.png").read_bytes()
    Image.fromarray(colours[1, 0]).save(tmp_path / "first" / "0000.png")
    with pytest.raises(UserError, match="was made from another init_video"):
        sampled("--from_json", made, models=False)


def test_what_it_cost_is_said(sampled):
    _, log = sampled("--prompt", "a star", "--verbose")
    assert re.search(r"^\d+\.\d s in all: .* s compiling, first step done after .* s, 2 steps of .* s, .* s decoding", log)
    assert float(re.search(r"peak memory of the process (\S+) GB", log)[1]) > 0.1


def test_videos_of_all_devices(sampled, tmp_path):
    """Four at a time here, and the last two; each is that which it is alone, and the names are in order."""
    many, _ = sampled("--prompt", "a star", "--num_videos_per_prompt", 6, "--seed", 3, "--output_format", "png")
    assert [path.name for path in many] == [f"a-star-seed{seed}-frames" for seed in range(3, 9)]
    (alone,), _ = sampled("--prompt", "a star", "--seed", 8, "--output_path", tmp_path / "alone", "--output_format", "png")
    pixels = [np.asarray(Image.open(folder / "0003.png"), int) for folder in (many[-1], alone, many[0])]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1
    assert np.abs(pixels[0] - pixels[2]).max() > 10


def test_only_what_is_alike_is_made_together():
    config = parse(SampleConfig, ["--prompt", "a"])
    changes = [{}, {"seed": 1}, {"prompt": "b", "negative_prompt": "c"}, {"guidance_scale": 2.0}, {"seed": 4}, {"seed": 5}]
    configs = [config.but(**change) for change in changes]
    assert sample.together(configs, 2) == [[0, 1], [2, 4], [3], [5, 5]]
    assert sample.together(configs, 1) == [[i] for i in range(6)]
    assert sample.together(configs, 8) == [[0, 1, 2, 4, 5], [3]]


def test_a_video_of_another_scheduler_is_made_again(sampled, tmp_path):
    words = ["--prompt", "a star", "--preset", "lcm", "--prediction_type", "v_prediction", "--num_inference_steps", 3]
    (gif,), _ = sampled(*words)
    (again,), log = sampled("--from_json", gif, "--output_path", tmp_path / "again", models=False)
    assert gif.read_bytes() == again.read_bytes()
    assert log == ""
    assert settings_of(gif)["scheduler"] == "lcm"


def test_a_sample_of_training_does_not_pass_for_one_of_ours(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"prompt": "a star", "seed": 3}))
    with pytest.raises(UserError, match="does not say which model made it"):
        parse(SampleConfig, ["--from_json", str(tmp_path / "a.json")])
    assert parse(SampleConfig, ["--from_json", str(tmp_path / "a.json"), "--ckpt_dir", "iter-2"]).seed == 3


@pytest.fixture
def noted(load, tmp_path):
    """noted(word, …) → a JSON as a video of the pipeline for those words would have it, and the pipeline"""

    def noted(*words):
        pipeline = load(*words)
        config = parse(SampleConfig, ["--prompt", "a star", *CLIP, *map(str, words)])
        (tmp_path / "a.json").write_text(json.dumps(record_of(config, pipeline)))
        return tmp_path / "a.json", pipeline

    return noted


def again(*words):
    """The pipeline for those words, as sample.py checks it."""
    config = parse(SampleConfig, [str(word) for word in words])
    pipeline = loading.load(config)
    check_models(config, record_of(config, pipeline))
    return pipeline


def test_a_merged_lora_is_merged_again(noted, lora, adapter, base, tmp_path):
    checkpoint = shutil.copytree(lora, tmp_path / "iter-3")
    models = ["--model_id_or_path", base, "--motion_adapter_id_or_path", adapter]
    path, merged = noted(*models, "--ckpt_dir", checkpoint, "--merge_lora", "true", "--lora", lora)
    assert list(merged.hashes)[4:] == ["lora_1", "lora_2"]
    shutil.rmtree(tmp_path / "iter-3-merged")
    repeated = again("--from_json", path)
    assert repeated.hashes == merged.hashes
    assert not (tmp_path / "iter-3-merged").exists()
    ours, theirs = (flatten(pipeline.model.params["unet"]) for pipeline in (repeated, merged))
    assert all((ours[key] == theirs[key]).all() for key in theirs)


def test_other_weights_are_refused(noted, lora, adapter, base, tmp_path, caplog):
    own = reference.write_adapter(tmp_path / "own", reference.adapter(seed=5))
    models = ["--model_id_or_path", base, "--motion_adapter_id_or_path", own]
    path, _ = noted(*models, "--lora", lora)
    again("--from_json", path)
    reference.write_adapter(tmp_path / "moved", reference.adapter(seed=5))
    reference.write_adapter(tmp_path / "own", reference.adapter(seed=6))
    wanted = (
        r"a\.json was made with other weights of the motion modules: \w{16} then, \w{16} now; say with --motion_adapter_id_or_path where"
    )
    with pytest.raises(UserError, match=wanted) as error:
        again("--from_json", path)
    assert "\n" not in str(error.value)
    again("--from_json", path, "--motion_adapter_id_or_path", tmp_path / "moved" / "adapter")
    assert caplog.text == ""
    again("--from_json", path, "--motion_adapter_id_or_path", adapter)
    assert "motion modules" in caplog.text
    assert "the video will be another" in caplog.text

    record = json.loads(path.read_text()) | {"hashes": None}
    path.write_text(json.dumps(record))
    again("--from_json", path)
    assert "holds no hashes of weights" in caplog.text


def test_a_grid(asked, load, tmp_path, monkeypatch):
    pipeline = load()
    monkeypatch.setattr(loading, "load", lambda _: pipeline)
    calls, printed = asked("--prompt", "a star", *CLIP, "--grid", "seed=1,2,3", "guidance_scale=4,8.5", "--negative_prompt", "x")
    assert [(call["guidance_scale"], call["seed"]) for call in calls] == [(g, seed) for g in (4, 8.5) for seed in (1, 2, 3)]
    assert {call["negative_prompt"] for call in calls} == {"x"}
    *single, gif, png = map(Path, printed)
    assert [path.name for path in (gif, png)] == [f"grid-a-star-seed-guidance_scale{suffix}" for suffix in (".gif", ".png")]
    assert [(settings_of(path)["guidance_scale"], settings_of(path)["seed"]) for path in single] == [
        (g, s) for g in (4, 8.5) for s in (1, 2, 3)
    ]
    assert Image.open(gif).n_frames == 3
    assert Image.open(gif).size == Image.open(png).size
    assert settings_of(png)["grid"] == ["seed=1,2,3", "guidance_scale=4.0,8.5"]
    again, _ = asked("--from_json", png)
    assert again == calls
    assert [call["seed"] for call in asked("--from_json", gif, "--grid", "seed=7,8")[0]] == [7, 8]
    assert [(call["guidance_scale"], call["seed"]) for call in asked("--from_json", gif, "--seed", "7")[0]] == [(4, 7), (8.5, 7)]

    file = tmp_path / "prompts.txt"
    file.write_text("one, two\nthree | four\n")
    calls, printed = asked("--validation_prompts_path", file, *CLIP, "--grid", "prompt")
    assert [call["prompt"] for call in calls] == ["one, two", "three | four"]
    assert Path(printed[-1]).name == "grid-prompt-seed42.png"
    assert [call["prompt"] for call in asked("--from_json", printed[-1])[0]] == ["one, two", "three | four"]
    calls, printed = asked("--prompt", "a star", *CLIP, "--grid", "negative_prompt=|a, b", "--num_videos_per_prompt", 2)
    assert [(call["negative_prompt"], call["seed"]) for call in calls] == [("", 42), ("a, b", 42), ("", 43), ("a, b", 43)]
    assert sum("grid-" in path for path in printed) == 4
    two_prompts, _ = asked(*CLIP, "--grid", "seed=1,2", "--validation_prompts_path", file)
    assert [(call["prompt"], call["seed"]) for call in two_prompts] == [(p, s) for p in ("one, two", "three | four") for s in (1, 2)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid", "sed=1,2"], "there is no argument sed; give NAME=VALUE,VALUE where NAME is one of clip_skip, closed_loop"),
        (["--grid", "sample_size=16,32"], "sample_size is the same for all videos of a run"),
        (["--grid", "seed=1,x"], "grid seed=1,x: argument --seed: invalid int value: 'x'"),
        (["--grid", "num_inference_steps=0,2"], "num_inference_steps 0 must be at least 1"),
        (["--grid", "seed=1", "prompt=a|b", "guidance_scale=2"], "grid has 3 lists"),
        (["--grid", "seed=1", "seed=2"], "grid names seed twice"),
        (["--grid", "seed=1,2", "--num_videos_per_prompt", "2"], "both say which seeds"),
        (["--grid", "prompt", "--eval_human"], "grid prompt needs to know all prompts"),
        (["--sample_n_frames", "4", "--grid", "prompt=a|{0: b, 4: c}"], "the prompt has a text for frame 4"),
        (["--output_format", "avi"], "invalid choice: 'avi'"),
        (["--from_json", "none.json"], "none.json is no file"),
    ],
)
def test_mistakes_about_what_is_made(asked, words, message):
    with pytest.raises(UserError) as error:
        asked(*words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
