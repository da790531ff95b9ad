"""train.py and sample.py as a user runs them: the commands of the reference document, what they leave, and what they refuse."""

import io
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import MotionAdapter, UNet2DConditionModel
from PIL import Image, ImageSequence
from safetensors.numpy import load_file

from anidiff_jax.errors import run_script
from anidiff_jax.outputs import settings_of
from anidiff_jax.shapes.clips import write_clips
from anidiff_jax.weights.sources import CLIP_TOKENIZER
from tests import reference
from tests.weights import foreign

ROOT = Path(__file__).parent.parent
TRAIN = ["--sample_size=16", "--sample_n_frames=4", "--sample_stride=1", "--num_inference_steps=2", "--max_steps=2"]
SAMPLE = ["--sample_size=16", "--sample_n_frames=4", "--num_inference_steps=2"]


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_clips(folder, 6, seed=1)
    return folder


@pytest.fixture
def script(monkeypatch, capsys):
    """script("train.py", …) → (exit code, printed lines, standard error)"""

    def run(name, *arguments, typed=""):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        code = 0
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\n  \na blue star moving up\n")
    return path


def data(clips):
    return ["--csv_path", clips / "clips.csv", "--video_folder", clips]


def test_three_files_make_a_video(script, hub, tmp_path):
    """What people own: a base in one file, original motion modules, a kohya LoRA. They make what the same makes in diffusers' forms."""
    parts = foreign.sd_parts()
    sd = foreign.write_sd_folder(tmp_path, parts)
    motion = reference.adapter(block_out_channels=(32, 64), motion_num_attention_heads=8, motion_max_seq_length=32)
    motion.save_pretrained(tmp_path / "adapter")
    layers = foreign.lora_layers(parts[0], parts[2])
    base = foreign.save(foreign.single_file(parts), tmp_path / "base.safetensors")
    mm = foreign.save({"state_dict": foreign.original_motion(motion)}, tmp_path / "mm.ckpt")
    style = foreign.save(foreign.kohya(layers, 3.0), tmp_path / "style.safetensors")
    foreign.save(foreign.peft_names(layers), tmp_path / "pytorch_lora_weights.safetensors")
    hub("hf").repos[CLIP_TOKENIZER, "main"] = {path.name: path.read_bytes() for path in (sd / "tokenizer").iterdir()}

    videos = []
    for model, adapter, lora in ((base, mm, style), (sd, tmp_path / "adapter", tmp_path / "pytorch_lora_weights.safetensors")):
        files = ["--model_id_or_path", model, "--motion_adapter_id_or_path", adapter, "--lora", f"{lora}:0.7"]
        code, printed, err = script("sample.py", *files, *SAMPLE, "--prompt", "a red circle", "--output_path", tmp_path / "out")
        assert code == 0, err
        videos.append(Path(printed[-1]))
        assert Image.open(videos[-1]).n_frames == 4
        assert ("trained with other norms" in err) == (adapter == mm)
    one, other = ([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(Image.open(path))] for path in videos)
    assert np.array_equal(one, other)
    assert np.std(one) > 0
    hashes = [settings_of(path)["hashes"] for path in videos]  # they are of the weights, whatever form those are in
    assert hashes[0] == hashes[1]
    assert hashes[0].keys() == {"unet", "motion_modules", "vae", "text_encoder", "lora_1"}


def test_the_four_commands(script, base, adapter, clips, tmp_path):
    out, gifs = tmp_path / "output", tmp_path / "generated"
    validation = ["--validation_prompts_path", prompts(tmp_path)]
    full = f"--model_id_or_path {base} --sft_type full --lr_scheduler_type constant --trainable_modules .*motion_modules.* --batch_size 2"
    full += " --eval_steps 100 --gradient_accumulation_steps 2 --motion_num_attention_heads 2"
    code, printed, _ = script("train.py", *full.split(), *data(clips), *TRAIN, *validation, "--output_dir", out / "full",
                              "--use_tensorboard", "true")  # fmt: skip
    assert code == 0
    checkpoint = Path(printed[-1])
    assert checkpoint.name == "iter-2"
    run = checkpoint.parent.parent
    left = {"config.json", "data.json", "metrics.jsonl", "sanity_check", "samples", "checkpoints", "curves.png", "report.md", "tensorboard"}
    assert {p.name for p in run.iterdir()} == left
    assert "| an update |" in (run / "report.md").read_text()
    assert "samples/iter-2/sheet.png" in (run / "report.md").read_text()
    assert min(Image.open(run / "curves.png").size) > 200
    assert list((run / "tensorboard").glob("events.*"))
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    *updates, scores = log
    assert [entry["step"] for entry in log] == [1, 2, 2]
    assert all(entry["learning_rate"] == pytest.approx(1e-4) and 0 < entry["loss"] < 10 for entry in updates)
    assert 0 < scores["temporal_flicker"] < 1
    assert 0 < scores["motion_degree"] < 1
    samples = run / "samples" / "iter-2"
    assert json.loads((samples / "scores.json").read_text())["prompts"].keys() == {"a red circle", "a blue star moving up"}
    assert Image.open(samples / "sheet.png").size[0] >= 4 * 16
    assert len(list((run / "samples" / "iter-2").glob("*.gif"))) == 2
    assert Image.open(next((run / "sanity_check").glob("*.gif"))).n_frames == 4
    # diffusers opens the checkpoint; its motion modules have moved away from zero, and no frozen weight is in it.
    trained = MotionAdapter.from_pretrained(checkpoint).state_dict()
    assert all(np.abs(v.numpy()).max() > 0 for k, v in trained.items() if k.endswith("proj_out.weight"))
    assert all("motion_modules" in key for key in load_file(checkpoint / "diffusion_pytorch_model.safetensors"))

    infer = ["--model_id_or_path", base, "--sft_type", "full", "--ckpt_dir", checkpoint, "--eval_human", "true"]
    code, printed, _ = script("sample.py", *infer, *SAMPLE, "--output_path", gifs, typed="a red circle\na star\nexit\n")
    assert code == 0
    assert len(list(gifs.glob("*.gif"))) == 2

    models = f"--model_id_or_path {base} --motion_adapter_id_or_path {adapter} --sft_type lora"
    lora = f"{models} --lr_scheduler_type constant --trainable_modules .*motion_modules.* --batch_size 1"
    lora += " --eval_steps 200 --dataset_sample_size 10000 --gradient_accumulation_steps 2 --export all"
    code, printed, _ = script("train.py", *lora.split(), *data(clips), *TRAIN, *validation, "--output_dir", out / "lora")
    assert code == 0
    checkpoint = Path(printed[-1])
    weights = load_file(checkpoint / "pytorch_lora_weights.safetensors")
    assert all(".lora_A." in key or ".lora_B." in key for key in weights)
    assert all(np.abs(v).max() > 0 for v in weights.values())
    assert json.loads((checkpoint / "adapter_config.json").read_text())["lora_alpha"] == 32
    exported = checkpoint.parent.parent / "export"
    folder = {k: v.numpy() for k, v in MotionAdapter.from_pretrained(exported / "motion-adapter").state_dict().items()}
    original = load_file(exported / "motion-module.safetensors")
    key = "mid_block.motion_modules.0.{}transformer_blocks.0.{}.to_q.weight"
    np.testing.assert_array_equal(
        original[key.format("temporal_transformer.", "attention_blocks.1")], folded := folder[key.format("", "attn2")]
    )
    assert (folded != load_file(adapter / "diffusion_pytorch_model.safetensors")[key.format("", "attn2")]).any()

    infer = f"{models} --ckpt_dir {checkpoint}".split()
    code, printed, _ = script("sample.py", *infer, "--eval_human", "true", *SAMPLE, "--output_path", gifs, typed="a red circle\n")
    assert code == 0
    code, merged, _ = script("sample.py", *infer, "--merge_lora", "true", *validation, *SAMPLE, "--output_path", gifs)
    assert code == 0
    assert merged[0] == str(checkpoint) + "-merged"
    first, second = (np.stack(frames_of(path)) for path in (printed[-1], merged[1]))
    assert np.abs(first - second).max() <= 8  # the same frames, unmerged and merged, but for their palettes
    code, _, error = script("sample.py", *infer, "--merge_lora", "true", *SAMPLE)
    assert code == 2
    assert "replace_if_exists" in error
    unmerged, folded = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (adapter, Path(merged[0])))
    assert unmerged.keys() == folded.keys()
    assert any((unmerged[key] != folded[key]).any() for key in folded)


def test_every_script_takes_ids_of_modelscope(script, hub, base, adapter, clips, tmp_path):
    server = hub("modelscope")
    for name, folder in (("me/base", base), ("me/adapter", adapter)):
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        server.repos[name, "master"] = files
    ids = ["--hub", "modelscope", "--model_id_or_path", "me/base", "--motion_adapter_id_or_path", "me/adapter"]
    short = ["--max_steps", "1", "--num_inference_steps", "1", "--validation_prompts_path", prompts(tmp_path)]
    push = ["--push_to_hub", "true", "--hub_model_id", "me/motion", "--hub_token", "ms-secret"]
    code, printed, error = script("train.py", *ids, *data(clips), *TRAIN, *short, *push, "--output_dir", tmp_path)
    assert code == 0, error
    checkpoint = Path(printed[-1])
    assert json.loads((checkpoint / "train_config.json").read_text())["hub"] == "modelscope"
    weights = (checkpoint / "pytorch_lora_weights.safetensors").read_bytes()
    assert dict(server.uploads)["pytorch_lora_weights.safetensors"] == weights
    assert not any(b"ms-secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())

    lora = ["--ckpt_dir", checkpoint, "--merge_lora", "true", "--prompt", "a star", "--output_path", tmp_path]
    code, printed, error = script("sample.py", *ids, *SAMPLE, *lora)
    assert code == 0, error
    for name, *words in (
        ("import_base", *ids[2:4]),
        ("import_motion_adapter", *ids[4:]),
        ("export_motion_adapter", "--input", "me/adapter", "--lora", checkpoint),
    ):
        code, _, error = script(f"convert/{name}.py", *ids[:2], *words, "--output", tmp_path / name)
        assert code == 0, error
    merged, exported = (load_file(folder / "diffusion_pytorch_model.safetensors")
                        for folder in (Path(f"{checkpoint}-merged"), tmp_path / "export_motion_adapter"))  # fmt: skip
    assert merged.keys() == exported.keys()
    assert all((merged[key] == exported[key]).all() for key in merged)


def frames_of(path):
    image = Image.open(path)
    frames = []
    for i in range(image.n_frames):
        image.seek(i)
        frames.append(np.asarray(image.convert("RGB"), int))
    return frames


def test_a_whole_unet_trains_on_single_frames(script, base, clips, tmp_path):
    images = ["--sft_type", "full", "--trainable_modules", ".*", "--sample_n_frames", "1", "--sample_size", "16", "--num_train_epochs", "1",
              "--gradient_accumulation_steps", "1", "--num_inference_steps", "1", "--eval_steps", "1", "--sample_stride", "1",
              "--validation_prompts_path", prompts(tmp_path)]  # fmt: skip
    code, printed, _ = script(
        "train.py", "--model_id_or_path", base, *data(clips), *images, "--output_dir", tmp_path, "--warmup_ratio", "0"
    )
    assert code == 0
    last = Path(printed[-1])
    assert last.name == "iter-2"  # 6 clips, 4 an update
    assert {path.name for path in last.parent.glob("iter-*")} == {"iter-1", "iter-2"}  # saved when it is evaluated
    assert {path.name for path in (last.parent.parent / "samples").iterdir()} == {"iter-1", "iter-2"}
    trained = UNet2DConditionModel.from_pretrained(last).state_dict()
    before = UNet2DConditionModel.from_pretrained(base / "unet").state_dict()
    assert sum((trained[key] != before[key]).any().item() for key in before) > 0.9 * len(before)

    # The whole UNet is sampled, not the base's, and not only its motion modules.
    whole = ["--model_id_or_path", base, "--sft_type", "full", "--ckpt_dir", printed[-1], "--prompt", "a star", "--output_path", tmp_path]
    code, printed, _ = script("sample.py", *whole, *SAMPLE)
    assert code == 0
    code, plain, _ = script("sample.py", "--model_id_or_path", base, "--prompt", "a star", "--output_path", tmp_path, *SAMPLE)
    assert np.abs(np.stack(frames_of(printed[-1])) - np.stack(frames_of(plain[-1]))).max() > 0


def test_a_domain_adapter(script, base, clips, tmp_path):
    """A LoRA on the spatial attentions: single frames that are not square, from cached latents and text, and no motion modules."""
    pattern = r".*\.attentions\..*attn[12]\.to_[qkv]"
    words = ["--trainable_modules", pattern, "--lora_rank", "2", "--sample_n_frames", "1", "--sample_size", "16x24", "--sample_stride", "1",
             "--max_steps", "2", "--warmup_ratio", "0", "--gradient_accumulation_steps", "1", "--num_inference_steps", "1",
             "--guidance_scale", "1", "--latent_cache", tmp_path / "cache", "--validation_prompts_path", prompts(tmp_path)]  # fmt: skip
    code, printed, error = script("train.py", "--model_id_or_path", base, *data(clips), *words, "--output_dir", tmp_path / "out")
    assert code == 0, error
    checkpoint = Path(printed[-1])
    run = checkpoint.parent.parent
    weights = load_file(checkpoint / "pytorch_lora_weights.safetensors")
    assert weights
    assert all(".attentions." in key and np.abs(value).max() > 0 for key, value in weights.items())
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        "cache.json", "empty.safetensors", "latents-00000.arrayrecord", "latents-00000.json",
    }  # fmt: skip
    for folder in ("samples/iter-2", "sanity_check"):  # what comes out, and what goes in
        assert {Image.open(path).size for path in (run / folder).glob("*.gif")} == {(24, 16)}
    report = (run / "report.md").read_text()
    assert all(f"| {figure}" in report for figure in ("compiling |", "clips |", "UNet |", "waiting for data |", "peak memory of "))


def test_config_files_and_the_command_line(script, base, clips, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model_id_or_path: {base}\ncsv_path: {clips / 'clips.csv'}\nvideo_folder: {clips}\nmax_steps: 7\nlearning_rate: 1.0e-3\n"
    )
    from anidiff_jax.arguments import parse
    from anidiff_jax.config import TrainConfig

    config = parse(TrainConfig, [str(path), "--max_steps", "3"])
    assert (config.max_steps, config.learning_rate, config.sample_size, config.model_id_or_path) == (3, 1e-3, "256", str(base))
    (tmp_path / "run.json").write_text(json.dumps({"mixed_precision": False, "lora_rank": 4, "csv_path": None}))
    config = parse(TrainConfig, [str(tmp_path / "run.json")])
    assert (config.mixed_precision, config.lora_rank, config.sample_size, config.guidance_scale) == (False, 4, "64", 5.0)
    (tmp_path / "ad-1" / "checkpoints" / "iter-3" / "state").mkdir(parents=True)
    (tmp_path / "ad-1" / "checkpoints" / "iter-3" / "train_config.json").write_text('{"lora_rank": 4, "seed": 9, "given": ["lora_rank"]}')
    for words in (["--resume_from_checkpoint", "latest"], ["--resume-from-checkpoint=latest"]):  # the run's own arguments
        config = parse(TrainConfig, [*words, "--output-dir", str(tmp_path), "--max_steps", "3"])
        assert (config.lora_rank, config.seed, config.max_steps) == (4, 42, 3)
    assert parse(TrainConfig, ["--gradient_checkpointing", "--mixed_precision", "false"]).gradient_checkpointing is True


def test_every_argument_and_default_of_the_reference():
    """The lists in the reference document, as they stand there."""
    from anidiff_jax.config import SampleConfig, TrainConfig

    shared = {
        "motion_adapter_id_or_path": None, "motion_adapter_revision": None, "model_id_or_path": None, "model_revision": None,
        "sft_type": "lora", "seed": 42, "ignore_args_error": False, "validation_prompts_path": None,
        "enable_xformers_memory_efficient_attention": True, "num_inference_steps": 25, "guidance_scale": 8.0, "sample_size": "256",
        "sample_stride": 4, "sample_n_frames": 16, "motion_num_attention_heads": 8, "motion_max_seq_length": 32,
        "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear", "steps_offset": 1,
        "clip_sample": False,
    }  # fmt: skip
    train = {
        "dataset_sample_size": None, "output_dir": "output", "ddp_backend": "nccl", "lora_rank": 8, "lora_alpha": 32,
        "lora_dropout": 0.05, "lora_dtype": "fp32", "gradient_checkpointing": False, "batch_size": 1, "num_train_epochs": 1,
        "max_steps": -1, "learning_rate": None, "weight_decay": 0.01, "gradient_accumulation_steps": 16, "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine", "warmup_ratio": 0.05, "eval_steps": 50, "save_steps": None, "dataloader_num_workers": 1,
        "push_to_hub": False, "hub_model_id": None, "hub_private_repo": False, "push_hub_strategy": "push_best", "hub_token": None,
        "text_dropout_rate": 0.1, "trainable_modules": ".*motion_modules.*", "mixed_precision": True, "csv_path": None,
        "video_folder": None, "use_wandb": False,
    }  # fmt: skip
    sample = {"ckpt_dir": None, "eval_human": False, "merge_lora": False, "replace_if_exists": False, "output_path": "./generated"}
    for config, expected in ((TrainConfig(), {**shared, **train}), (SampleConfig(), {**shared, **sample})):
        for name, value in expected.items():
            assert getattr(config, name) == value, name


def test_the_table_of_arguments_is_up_to_date():
    from anidiff_jax.arguments import as_markdown

    assert (ROOT / "docs" / "arguments.md").read_text() == as_markdown(), "python -m anidiff_jax.arguments > docs/arguments.md"


MISTAKES = {
    "unknown argument": (["--gradient_acumulation_steps", "2"], "did you mean --gradient_accumulation_steps?"),
    "no number": (["--batch_size", "two"], "--batch_size"),
    "out of range": (["--batch_size", "0"], "batch_size 0 must be at least 1"),
    "no such choice": (["--sft_type", "half"], "invalid choice: 'half'"),
    "no regular expression": (["--trainable_modules", "*motion"], "is not a regular expression"),
    "matches nothing": (["--trainable_modules", "motion"], "matches no Linear layer of the UNet; names look like"),
    "size": (["--sample_size", "30"], "is not a positive multiple of 4"),
    "frames": (["--sample_n_frames", "40"], "40 frames are more than the motion modules know (24"),
    "conflict with the adapter": (["--motion_num_attention_heads", "4"], "motion_num_attention_heads 4 conflicts"),
    "backend": (["--ddp_backend", "hccl"], "ddp_backend hccl"),
    "no prompts file": (["--validation_prompts_path", "none.txt"], "none.txt does not exist"),
    "no config file": (["none.yaml"], "config file none.yaml does not exist"),
    "no videos": (["--video_folder", "none"], "video_folder none is not a folder"),
    "hub": (["--push_to_hub", "true"], "push_to_hub needs --hub_model_id owner/name"),
    "two weightings": (["--snr_gamma", "5", "--loss_weighting", "inverse_snr"], "goes without loss_weighting"),
    "no timesteps": (["--min_timestep", "600", "--max_timestep", "600"], "must satisfy"),
    "two validations": (["--validation_fraction", "0.1", "--validation_csv", "a.csv"], "give one"),
    "half a cluster": (["--num_processes", "2"], "coordinator_address, num_processes and process_id go together"),
    "nothing to go on with": (["--resume_from_checkpoint", "latest"], "has a checkpoint; leave the argument out"),
    "no size": (["--sample_size", "16x"], "is not a size: give pixels"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(script, base, adapter, clips, tmp_path, case):
    arguments, words = MISTAKES[case]
    good = ["--model_id_or_path", base, "--motion_adapter_id_or_path", adapter, *data(clips), *TRAIN, "--output_dir", tmp_path / "out"]
    files_first = arguments if arguments[0].endswith(".yaml") else []
    code, _, error = script("train.py", *files_first, *good, *(arguments if not files_first else []))
    assert code == 2
    lines = error.strip().splitlines()
    assert words in lines[-1]
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_mistakes_about_models(script, base, clips, tmp_path):
    code, _, error = script("train.py", "--model_id_or_path", base, *data(clips), *TRAIN)
    assert code == 2
    assert "lora on motion modules needs the motion adapter" in error
    code, _, error = script("train.py", "--model_id_or_path", clips, *data(clips), "--sft_type", "full")
    assert code == 2
    assert "is no model" in error
    code, _, error = script("sample.py", "--model_id_or_path", "./nowhere")
    assert code == 2
    assert "./nowhere does not exist here" in error
    code, _, error = script("sample.py", "--ckpt_dir", tmp_path)
    assert code == 2
    assert "is not a checkpoint" in error


def test_notebooks_may_ignore_unknown_arguments(caplog):
    from anidiff_jax.arguments import parse
    from anidiff_jax.config import SampleConfig

    assert parse(SampleConfig, ["--f", "kernel.json", "--ignore_args_error", "true"]).seed == 42
    assert "unknown argument --f" in caplog.text


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")])
def test_too_little_memory_is_told_in_a_line(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 2
    assert re.fullmatch(r"error: out of memory \(.+\): smaller are --sample_size, .+\n", capsys.readouterr().err)
    with pytest.raises(RuntimeError, match="another"):
        run_script(lambda: (_ for _ in ()).throw(RuntimeError("another")))
