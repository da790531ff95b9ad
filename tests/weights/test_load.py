"""Folders in diffusers layout: every form is read, and what is wrong is named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from anidiff_jax.errors import UserError
from anidiff_jax.weights.base import load_model
from anidiff_jax.weights.hub import wanted
from anidiff_jax.weights.tree import flatten, names_of, unflatten
from tests import reference

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(base, tmp_path):
    return shutil.copytree(base, tmp_path / "copy")


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def weights(model):
    return {f"{part}.{key}": np.asarray(value) for part, tree in model.params.items() for key, value in flatten(tree).items()}


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], key)


def test_names():
    key = "up_blocks.1.motion_modules.0.transformer_blocks.0.ff.net.0.proj.weight"
    assert names_of(key) == ["up_blocks.1", "motion_modules.0", "transformer_blocks.0", "ff", "net.0", "proj", "weight"]
    assert flatten(unflatten({key: 1})) == {key: 1}


def test_every_tensor_is_read(base, adapter):
    model = load_model(base, adapter)
    assert model.motion.heads == (2, 2)
    from diffusers import MotionAdapter

    expected = MotionAdapter.from_pretrained(adapter).state_dict()
    ours = flatten(model.params["unet"])
    for key, value in expected.items():
        ours_back = np.asarray(ours[key])
        np.testing.assert_array_equal(ours_back.T if value.ndim == 2 else ours_back, value.numpy(), key)


def test_sharded_and_variant_files(base, tmp_path):
    expected = weights(load_model(base))
    sharded = reference.write_base(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((sharded / "unet").glob("*.safetensors"))) > 1
    same(weights(load_model(sharded)), expected)
    variant = reference.write_base(tmp_path / "variant", variant="fp16")
    assert (variant / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    same(weights(load_model(variant)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(base, tmp_path, dtype):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(base / "unet").to(dtype)
    folder = reference.write_base(tmp_path, unet_model=unet)
    stored = load_model(folder, dtype=None)
    name = str(dtype).removeprefix("torch.")
    assert {str(x.dtype) for x in flatten(stored.params["unet"]).values()} == {name}
    wide = load_model(folder)
    for key, value in flatten(wide.params["unet"]).items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, np.asarray(flatten(stored.params["unet"])[key], np.float32))


def test_old_names_of_vae_and_text_encoder(copy, base):
    expected = weights(load_model(base))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename_vae(tensors):
        for key in list(tensors):
            for new, name in old.items():
                if "attentions" in key and f".{new}." in key:
                    tensors[key.replace(f".{new}.", f".{name}.")] = tensors.pop(key)

    rewrite(copy / "vae/diffusion_pytorch_model.safetensors", rename_vae)
    assert any("query" in key for key in load_file(copy / "vae/diffusion_pytorch_model.safetensors"))

    def rename_text(tensors):
        other = {k.removeprefix("text_model.") if k.startswith("text_model.") else f"text_model.{k}": v for k, v in tensors.items()}
        tensors.clear()
        tensors.update(other, **{"text_model.embeddings.position_ids": np.arange(77)[None]})

    rewrite(copy / "text_encoder/model.safetensors", rename_text)
    same(weights(load_model(copy)), expected)


def test_a_video_unet_brings_its_own_motion_modules(base, adapter, copy):
    from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel

    both = UNetMotionModel.from_unet2d(UNet2DConditionModel.from_pretrained(base / "unet"), MotionAdapter.from_pretrained(adapter))
    shutil.rmtree(copy / "unet")
    both.save_pretrained(copy / "unet")
    same(weights(load_model(copy)), weights(load_model(base, adapter)))
    with pytest.raises(UserError, match="video UNet: give it as --sft_type full --ckpt_dir"):
        load_model(base, copy / "unet")


def test_a_bare_adapter_file_takes_its_heads_from_the_user(base, adapter):
    file = adapter / "diffusion_pytorch_model.safetensors"
    assert load_model(base, file, motion_heads=4).motion.heads == (4, 4)
    with pytest.raises(UserError, match="conflicts with the motion adapter, which has 2"):
        load_model(base, adapter, motion_heads=4)
    with pytest.raises(UserError, match="conflicts with the motion adapter, which has 24"):
        load_model(base, adapter, motion_frames=32)


def test_what_the_hub_is_asked_for():
    here = ["model_index.json", "v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "README.md", "safety_checker/model.safetensors"]
    here += ["tokenizer/vocab.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"]
    here += ["vae/diffusion_pytorch_model.fp16.safetensors"]
    for variant in ("", ".fp16", ".non_ema"):
        here += [f"unet/diffusion_pytorch_model{variant}.safetensors", f"unet/diffusion_pytorch_model{variant}.bin"]
    assert wanted(here) == [
        "model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors",
    ]  # fmt: skip
    old = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.bin",
           "text_encoder/pytorch_model.bin", "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin"]  # fmt: skip
    assert wanted(old) == sorted({*old} - {"unet/diffusion_pytorch_model.fp16.bin", "vae/diffusion_pytorch_model.bin"})
    adapter = ["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "motion.ckpt"]
    assert wanted(adapter) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_what_is_wrong_is_named(copy, adapter, tmp_path):
    def refused(words, base=copy, adapter=None):
        with pytest.raises(UserError) as error:
            load_model(base, adapter)
        assert words in str(error.value)
        assert "\n" not in str(error.value)

    original = (copy / UNET).read_bytes()
    rewrite(copy / UNET, lambda t: t.pop("conv_in.bias"))
    refused("lacks conv_in.bias")
    (copy / UNET).write_bytes(original)
    rewrite(copy / UNET, lambda t: t.update(stray=np.zeros(2, np.float32)))
    refused("holds unexpected stray")
    (copy / UNET).write_bytes(original)
    rewrite(copy / UNET, lambda t: t.update({"conv_in.weight": np.zeros((16, 5, 3, 3), np.float32)}))
    refused("conv_in.weight has shape [16, 5, 3, 3], expected [16, 4, 3, 3]")
    (copy / UNET).write_bytes(original[: len(original) // 2])
    refused("is not a whole safetensors file")
    (copy / UNET).write_bytes(original)
    config = json.loads((copy / "unet/config.json").read_text())
    (copy / "unet/config.json").write_text(json.dumps({**config, "class_embed_type": "timestep"}))
    refused("class_embed_type='timestep'")
    (copy / "unet/config.json").write_text("{")
    refused("is not valid JSON")
    (tmp_path / "empty").mkdir()
    refused("is no model", base=tmp_path / "empty")
    refused("does not exist", base=tmp_path / "none")
    (copy / "unet/config.json").write_text(json.dumps(config))
    refused("is no model", adapter=tmp_path / "empty")
    refused("is diffusers VAE: give it as --vae_path", adapter=copy / "vae")
    shutil.rmtree(copy / "vae")
    refused("holds no vae: give one with --vae_path")


def test_sampling_needs_no_torch_and_nothing_of_training(base, adapter, tmp_path):
    """sample.py, where importing them fails: for want of them in the one case, for the time that they take in the other."""
    code = """
import runpy, sys
for name in ("torch", "diffusers", "grain", "orbax", "optax", "decord", "matplotlib"):
    sys.modules[name] = None
sys.argv = ["sample.py", *sys.argv[1:]]
runpy.run_path("sample.py", run_name="__main__")
"""
    words = ["--model_id_or_path", base, "--motion_adapter_id_or_path", adapter, "--prompt", "a red circle", "--output_path", tmp_path]
    words += ["--sample_size", 16, "--sample_n_frames", 2, "--num_inference_steps", 1]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).suffix == ".gif"
