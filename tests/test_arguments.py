"""Every argument is read, from a command line and from files, and has a test that it does what it says."""

import ast
import json
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin

import pytest
import yaml

from anidiff_jax.arguments import parse, sections
from anidiff_jax.config import EMBEDDED_PROMPTS, PROMPTS, SampleConfig, TrainConfig
from anidiff_jax.defaults import EMBEDDED_DEFAULTS, PRESETS
from anidiff_jax.diffusion import solvers
from anidiff_jax.errors import UserError
from tests.conftest import words_of

TESTS = Path(__file__).parent
MODELS = "model_id_or_path model_revision motion_adapter_id_or_path motion_adapter_revision"

# Which test fails when train.py does not do what the argument says: a new argument needs a line here, and the test.
TRAINING = {
    "training/test_setup.py::test_each_model_in_its_revision": MODELS,
    "training/test_setup.py::test_fresh_motion_modules": "motion_num_attention_heads motion_max_seq_length seed",
    "training/test_setup.py::test_an_adapter_is_gone_on_with": "motion_adapter_id_or_path motion_max_seq_length",
    "training/test_setup.py::test_norms_and_strength": "motion_norm spatial_norm motion_scale",
    "training/test_setup.py::test_a_lora_that_is_given_is_folded_into_what_is_frozen": "lora",
    "training/test_setup.py::test_parts_in_the_place_of_the_bases": "vae_path text_encoder_path",
    "models/test_norms.py::test_norms": "motion_norm spatial_norm",
    "models/test_norms.py::test_strength": "motion_scale",
    "training/test_setup.py::test_how_the_networks_compute": "enable_xformers_memory_efficient_attention lora_dropout",
    "training/test_setup.py::test_gradient_checkpointing_recomputes": "gradient_checkpointing",
    "training/test_setup.py::test_on_a_cpu_all_is_float32": "mixed_precision lora_dtype",
    "training/test_setup.py::test_mixed_precision": "mixed_precision lora_dtype",
    "training/test_setup.py::test_what_trains": "trainable_modules sft_type",
    "training/test_setup.py::test_adapters_are_of_the_rank_and_drawn_by_the_seed": "lora_rank trainable_modules sft_type seed",
    "training/test_setup.py::test_the_task": (
        "num_train_timesteps beta_start beta_end beta_schedule steps_offset clip_sample seed lora_alpha lora_dtype loss_weighting "
        "snr_gamma noise_offset ema_decay min_timestep max_timestep timestep_bias_begin timestep_bias_multiplier "
        "prediction_type timestep_spacing "
        "set_alpha_to_one rescale_betas_zero_snr"
    ),
    "training/test_setup.py::test_rows": "csv_path video_folder dataset_sample_size validation_csv validation_fraction seed",
    "training/test_setup.py::test_where_clips_come_from": "latent_cache",
    "training/test_cache.py::test_it_gives_what_the_videos_give": "latent_cache",
    "training/test_checkpoint.py::test_a_lora_is_written_as_it_was_asked_for": "lora_rank lora_alpha lora_dropout lora_dtype",
    "training/test_checkpoint.py::test_retention_never_deletes_the_best_or_the_last": "save_total_limit",
    "test_lora.py::test_dropout_leaves_out_the_share_that_is_asked_for": "lora_dropout",
    "data/test_data.py::test_clips_have_the_frames_the_stride_and_the_size_that_are_asked_for": "sample_size sample_n_frames sample_stride",
    "data/test_data.py::test_captions_and_flips": "text_dropout_rate random_flip",
    "data/test_data.py::test_batches_are_a_function_of_the_seed": "seed",
    "data/test_data.py::test_as_many_threads_read_as_are_asked_for": "dataloader_num_workers",
    "data/test_vet.py::test_what_is_found": "check_data",
    "diffusion/test_schedule.py::test_schedules_equal_diffusers": "num_train_timesteps beta_schedule",
    "diffusion/test_solvers.py::test_steps_equal_diffusers": "scheduler timestep_spacing beta_schedule prediction_type",
    "diffusion/test_solvers.py::test_zero_snr": "rescale_betas_zero_snr",
    "diffusion/test_solvers.py::test_clipping": "clip_sample",
    "diffusion/test_solvers.py::test_where_the_last_step_ends": "set_alpha_to_one",
    "diffusion/test_solvers.py::test_eta": "eta",
    "training/test_step.py::test_learning_rates_are_those_of_transformers": "learning_rate lr_scheduler_type warmup_ratio",
    "training/test_step.py::test_gradients_are_scaled_down_to_the_norm": "max_grad_norm",
    "training/test_step.py::test_weights_decay": "weight_decay",
    "training/test_step.py::test_a_clip_counts_by_its_noise": "loss_weighting snr_gamma",
    "training/test_step.py::test_offset_noise": "noise_offset",
    "training/test_step.py::test_the_moving_average": "ema_decay",
    "training/test_step.py::test_noise_follows_from_the_seed": "seed",
    "training/test_step.py::test_timesteps_are_drawn_from_all_that_there_are": "num_train_timesteps min_timestep max_timestep",
    "training/test_step.py::test_steps_from_one_on_may_be_drawn_more_often": "timestep_bias_begin timestep_bias_multiplier",
    "training/test_parity.py::test_three_updates_equal_pytorch": "sft_type lora_alpha learning_rate lr_scheduler_type",
    "training/test_samples.py::test_the_arguments_of_validation_videos": (
        "num_inference_steps guidance_scale sample_size sample_n_frames seed scheduler eta"
    ),
    "training/test_validation.py::test_at_most_so_many_clips_are_validated_on": "validation_clips",
    "test_train.py::test_the_length_of_a_run": "num_train_epochs max_steps batch_size",
    "test_train.py::test_how_many_clips_an_update_sees_and_how_many_threads_read_them": "batch_size dataloader_num_workers",
    "test_train.py::test_an_update_is_split_into_micro_batches": "gradient_accumulation_steps",
    "test_train.py::test_devices_and_processes": "ddp_backend deterministic coordinator_address num_processes process_id",
    "test_train.py::test_the_data_are_checked_where_that_is_asked_for": "check_data",
    "test_train.py::test_the_moving_average_is_kept_where_it_is_asked_for": "ema_decay",
    "test_parallel.py::test_collectives": "ddp_backend",
    "test_parallel.py::test_determinism": "deterministic",
    "training/test_processes.py::test_two_processes_do_what_one_does": "coordinator_address num_processes process_id",
    "training/test_resume.py::test_killed_and_gone_on_with": "resume_from_checkpoint",
    "training/test_resume.py::test_an_earlier_checkpoint_becomes_a_run_of_its_own": "resume_from_checkpoint save_steps",
    "training/test_resume.py::test_the_best_and_the_last_are_kept": "save_total_limit eval_steps",
    "training/test_report.py::test_other_writers_get_the_same": "use_tensorboard use_wandb",
    "training/test_push.py::test_strategies": "push_to_hub hub_model_id hub_private_repo push_hub_strategy hub_token",
    "test_scripts.py::test_the_four_commands": "validation_prompts_path output_dir use_tensorboard export",
    "test_scripts.py::test_a_whole_unet_trains_on_single_frames": "eval_steps save_steps num_train_epochs sample_n_frames",
    "test_scripts.py::test_a_domain_adapter": "trainable_modules sample_n_frames sample_size latent_cache",
    "test_scripts.py::test_every_script_takes_ids_of_modelscope": "hub",
    "test_arguments.py::test_unknown_arguments": "ignore_args_error",
    "test_arguments.py::test_recipes": "preset",
}  # fmt: skip
SAMPLING = {
    "test_sample.py::test_what_is_asked_for_and_what_the_file_says": (
        "prompt negative_prompt sample_size sample_n_frames sample_stride num_inference_steps guidance_scale seed fps output_path "
        "scheduler eta guidance_rescale guidance_start guidance_end freeu pag_scale pag_adaptive_scale pag_layers "
        "context_frames context_overlap context_schedule context_batch closed_loop free_noise "
        "free_init_iterations free_init_filter free_init_order free_init_spatial_stop free_init_temporal_stop free_init_fast "
        "clip_skip prompt_head prompt_tail prompt_interpolation init_video init_image mask_video init_stride strength"
    ),
    "test_text.py::test_layers_are_skipped_for_the_prompt": "clip_skip",
    "test_text.py::test_head_and_tail_stand_around_each_text": "prompt_head prompt_tail",
    "test_text.py::test_along_the_arc": "prompt_interpolation",
    "test_inits.py::test_a_video_is_painted_over_as_in_diffusers": "init_video strength",
    "test_inits.py::test_a_picture_is_a_video_that_stands_still": "init_image",
    "test_inits.py::test_where_the_mask_is_black_the_video_stays": "mask_video",
    "test_inits.py::test_what_is_read": "init_stride",
    "test_sample.py::test_what_it_cost_is_said": "verbose",
    "diffusion/test_free_init.py::test_renoising_equals_diffusers": (
        "free_init_filter free_init_order free_init_spatial_stop free_init_temporal_stop"
    ),
    "diffusion/test_free_init.py::test_videos_equal_diffusers": "free_init_iterations free_init_fast",
    "test_denoising.py::test_windows_are_averaged": "context_frames context_overlap context_schedule context_batch closed_loop",
    "test_denoising.py::test_noise_is_shuffled_as_in_diffusers": "free_noise",
    "test_denoising.py::test_guidance_within_its_interval_only": "guidance_rescale guidance_start guidance_end pag_adaptive_scale",
    "test_denoising.py::test_freeu_equals_diffusers": "freeu",
    "test_denoising.py::test_perturbed_attention_equals_diffusers": "pag_scale pag_adaptive_scale pag_layers",
    "test_sample.py::test_prompts": "validation_prompts_path prompt eval_human",
    "test_sample.py::test_several_videos_of_a_prompt": "num_videos_per_prompt",
    "test_sample.py::test_a_video_is_made_again": "from_json output_format",
    "test_sample.py::test_other_weights_are_refused": "from_json",
    "test_sample.py::test_a_grid": "grid",
    "test_outputs.py::test_every_format_as_the_arguments_say": "output_format fps gif_dither gif_loop mp4_crf webp_quality",
    "test_sample.py::test_how_it_computes": "dtype enable_xformers_memory_efficient_attention",
    "test_sample.py::test_the_noise": (
        "num_train_timesteps beta_start beta_end beta_schedule steps_offset clip_sample timestep_spacing set_alpha_to_one prediction_type "
        "rescale_betas_zero_snr"
    ),
    "test_pipeline.py::test_solvers_equal_diffusers": "scheduler timestep_spacing",
    "test_arguments.py::test_recipes": "preset",
    "test_sample.py::test_the_motion_modules": "motion_num_attention_heads motion_max_seq_length",
    "test_sample.py::test_each_model_in_its_revision": MODELS,
    "test_sample.py::test_what_was_trained_is_sampled": "ckpt_dir sft_type",
    "test_sample.py::test_merging": "merge_lora replace_if_exists",
    "test_sample.py::test_loras_norms_strength_and_parts": (
        "lora motion_norm spatial_norm motion_scale vae_path text_encoder_path"
    ),
    "test_pipeline.py::test_frames_equal_diffusers": "num_inference_steps guidance_scale negative_prompt sample_size sample_n_frames",
    "test_pipeline.py::test_noise_arguments_mean_what_they_mean_in_diffusers": "beta_start beta_end beta_schedule steps_offset clip_sample",
    "test_pipeline.py::test_a_video_depends_on_its_prompt_and_seed_only": "prompt seed",
    "test_scripts.py::test_every_script_takes_ids_of_modelscope": "hub",
    "test_arguments.py::test_unknown_arguments": "ignore_args_error",
}  # fmt: skip


@pytest.mark.parametrize(("kind", "table"), [(TrainConfig, TRAINING), (SampleConfig, SAMPLING)])
def test_every_argument_has_a_test(kind, table):
    assert {name for names in table.values() for name in names.split()} == {f.name for f in fields(kind) if f.init}
    for place in table:
        file, name = place.split("::")
        assert name in {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}, place


def another_value(f):
    """A value that the argument may have and that is not its default."""
    chosen = {
        "beta_end": 0.5, "sample_size": "16x24", "min_timestep": 1, "timestep_bias_begin": 2, "hub_model_id": "owner/name",
        "validation_fraction": 0.0, "loss_weighting": "none",  # they exclude validation_csv and snr_gamma
        "context_overlap": 1,
        "freeu": "0.9,0.2,1.2,1.4",
        "eta": 0.0,  # another scheduler than ddim excludes it
        "free_init_iterations": 1,  # init_video excludes more of them, and init_image
        "output_format": ["webp", "gif"], "grid": ["seed=1,2", "guidance_scale=3"],
    }  # fmt: skip
    kinds = {"int": 3, "float": 0.25, "bool": not f.default, "str": "a text"}
    if f.name in chosen:
        return chosen[f.name]
    if f.type == list[str]:
        return ["one", "another:0.5"]
    plain = f.type
    if get_origin(plain) in (UnionType, Union):  # of int | None
        plain = get_args(plain)[0]
    if get_origin(plain) is Literal:
        return next(value for value in get_args(plain) if value != f.default)
    return kinds[plain.__name__]


@pytest.mark.parametrize("kind", [TrainConfig, SampleConfig])
def test_command_lines_and_files_say_the_same(kind, tmp_path):
    values = {
        f.name: another_value(f) for f in fields(kind) if f.init and f.name not in ("resume_from_checkpoint", "from_json", "init_image")
    }  # they would be read
    if kind is SampleConfig:
        values["sft_type"] = "lora"  # as merging wants it
    (tmp_path / "run.json").write_text(json.dumps(values))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    each = [(name, value) for name, given in values.items() for value in (given if isinstance(given, list) else [given])]
    written = [(name, str(value).lower() if isinstance(value, bool) else value) for name, value in each]
    found = {
        "words": parse(kind, [word for name, value in written for word in words_of(**{name: value})]),
        "words with =": parse(kind, [f"--{name.replace('_', '-')}={value}" for name, value in written]),
        "bare": parse(kind, [f"--{name}" if value == "true" else f"--{name}={value}" for name, value in written]),
        "json": parse(kind, [str(tmp_path / "run.json")]),
        "yaml": parse(kind, [str(tmp_path / "run.yaml")]),
    }
    for way, config in found.items():
        assert {name: getattr(config, name) for name in values} == values, way
        assert config.given == set(values), way


@pytest.mark.parametrize("kind", [TrainConfig, SampleConfig])
def test_the_embedded_model_changes_what_is_not_given(kind):
    own = {name: value for name, value in EMBEDDED_DEFAULTS.items() if hasattr(kind, name)}
    assert len(own) >= 4
    values = lambda *words: {name: getattr(parse(kind, [*words]), name) for name in own}
    assert values() == own
    assert values("--model_id_or_path", "a/model") == {name: getattr(kind, name) for name in own}
    assert values("--sample_n_frames", "5", "--guidance_scale", "8") == {**own, "sample_n_frames": 5, "guidance_scale": 8.0}


@pytest.mark.parametrize("kind", [TrainConfig, SampleConfig])
@pytest.mark.parametrize("preset", PRESETS)
def test_recipes(kind, preset, tmp_path):
    """A preset changes what is not given, also what the embedded model would."""
    recipe = PRESETS[preset]
    values = lambda *words: {name: getattr(parse(kind, [*words]), name) for name in recipe}
    for model in ([], ["--model_id_or_path", "a/model"]):
        assert values(*model, "--preset", preset) == recipe
    assert values("--num_inference_steps", "9", "--preset", preset, "--scheduler", "ddim") == {
        **recipe, "num_inference_steps": 9, "scheduler": "ddim",
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(f"preset: {preset}\nguidance_scale: 3.5\n")
    assert values(str(tmp_path / "run.yaml")) == {**recipe, "guidance_scale": 3.5}


def test_names_are_those_that_are_built():
    choices = {f.name: get_args(f.type) for f in fields(SampleConfig)}
    assert choices["scheduler"] == tuple(solvers.SOLVERS)
    assert get_args(choices["preset"][0]) == tuple(PRESETS)


@pytest.mark.parametrize("kind", [TrainConfig, SampleConfig])
def test_what_a_scheduler_cannot_do_is_told_at_once(kind):
    for words, message in (
        ("--scheduler lcm --num_inference_steps 60", "num_inference_steps=60 is too many for scheduler='lcm'"),
        ("--scheduler euler --eta 0.5", "eta=0.5 is for scheduler='ddim' alone"),
        ("--rescale_betas_zero_snr --timestep_spacing trailing --prediction_type epsilon", "nothing of the video is left at timestep 999"),
        ("--scheduler magic", "invalid choice: 'magic'"),
    ):
        with pytest.raises(UserError) as error:
            parse(kind, words.split())
        assert message in str(error.value)
    parse(kind, ["--rescale_betas_zero_snr", "--timestep_spacing", "trailing"])  # the base may predict the velocity


@pytest.mark.parametrize("kind", [TrainConfig, SampleConfig])
def test_help_is_grouped_and_names_every_argument(kind, capsys):
    with pytest.raises(SystemExit) as end:
        parse(kind, ["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    places = [text.index(f"\n{title}:\n") for title in sections(kind)]
    assert len(places) > 3
    assert places == sorted(places)
    for members, start, end in zip(sections(kind).values(), places, [*places[1:], len(text)], strict=True):
        for f in members:
            assert f"\n  --{f.name}" in text[start:end], f.name


def test_a_run_that_was_gone_on_with_can_be_run_again(tmp_path):
    """Its config.json begins another run, and does not go on with the first."""
    config = TrainConfig(resume_from_checkpoint="output/ad-1", seed=5, hub_token="secret")
    object.__setattr__(config, "given", frozenset({"resume_from_checkpoint", "seed", "hub_token"}))
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    again = parse(TrainConfig, [str(tmp_path / "config.json")])
    assert (again.resume_from_checkpoint, again.seed, again.hub_token) == (None, 5, None)


def test_other_names():
    config = parse(TrainConfig, ["--lora_dropout_p", "0.3"])
    assert (config.lora_dropout, config.given) == (0.3, {"lora_dropout"})


@pytest.mark.parametrize("kind", [TrainConfig, SampleConfig])
def test_unknown_arguments(kind, caplog):
    words = ["--guidance_scal", "3", "--seed", "5"]
    with pytest.raises(UserError, match=r"unknown argument --guidance_scal: did you mean --guidance_scale\?"):
        parse(kind, words)
    assert parse(kind, [*words, "--ignore_args_error", "true"]).seed == 5
    assert "unknown argument --guidance_scal: did you mean --guidance_scale?; ignored" in caplog.text


def test_prompts_ship_with_the_package():
    config = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["anidiff_jax"]
    shipped = {path for pattern in config for path in (TESTS.parent / "anidiff_jax").glob(pattern)}
    for kind in (TrainConfig, SampleConfig):
        for model, path in ((None, EMBEDDED_PROMPTS), ("a/model", PROMPTS)):
            assert path in shipped
            assert kind(model_id_or_path=model).prompts() == [line for line in path.read_text().splitlines() if line.strip()]


def test_a_list_on_the_command_line_takes_the_place_of_a_files(tmp_path):
    (tmp_path / "run.yaml").write_text("output_format: [gif, webp]\nlora: [one, two]\nseed: 3\n")
    config = parse(SampleConfig, [str(tmp_path / "run.yaml"), "--output_format", "mp4", "--lora=three:0.5"])
    assert (config.output_format, config.lora, config.seed) == (["mp4"], ["three:0.5"], 3)
    assert parse(SampleConfig, [str(tmp_path / "run.yaml"), "--seed", "4"]).output_format == ["gif", "webp"]


def test_a_record_of_a_video_is_no_settings_file(tmp_path):
    (tmp_path / "a.json").write_text('{"prompt": "a star", "seed": 1, "made_by": "anidiff-jax"}')
    with pytest.raises(UserError, match="--from_json"):
        parse(SampleConfig, [str(tmp_path / "a.json")])


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_waits_for_nothing_heavy(script):
    """It comes within a second: JAX, PyTorch and the rest are imported once there is something to do."""
    look = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    print("HEAVY", sorted({"jax", "flax", "torch", "optax", "orbax", "decord", "matplotlib"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", look, str(TESTS.parent / script)], capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr
    assert "--model_id_or_path" in done.stdout
    assert done.stdout.splitlines()[-1] == "HEAVY []"
