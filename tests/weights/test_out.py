"""What is written opens in other programs and comes back with the same bits."""

import re
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import MotionAdapter, StableDiffusionPipeline
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from anidiff_jax.errors import UserError
from anidiff_jax.lora import init_lora
from anidiff_jax.training.checkpoint import save_unet_part
from anidiff_jax.weights.base import load_model
from anidiff_jax.weights.loras import Lora, as_named, load_lora, save_lora
from anidiff_jax.weights.merge import extract_lora, with_lora
from anidiff_jax.weights.sources import base_source, motion_source
from anidiff_jax.weights.tensors import Tensor, metadata_of, tensors_of, write_tensors
from anidiff_jax.weights.tree import flatten
from anidiff_jax.weights.write_base import write_base
from tests import reference
from tests.weights import foreign

ROOT = Path(__file__).parent.parent.parent


def convert(script: str, *words) -> str:
    done = subprocess.run([sys.executable, str(ROOT / "convert" / script), *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_written_tensors_are_read_by_safetensors(tmp_path, dtype):
    rng = np.random.default_rng(0)
    tensors = {
        name: Tensor.of(rng.standard_normal(shape, np.float32)).cast(dtype) for name, shape in {"b": (3, 5), "a": (7,), "c": ()}.items()
    }
    tensors["alpha"] = Tensor.of(np.array(3, np.int64))
    write_tensors(tensors, tmp_path / "x.safetensors", {"made_from": "nothing"})
    theirs = load_torch(tmp_path / "x.safetensors")
    assert theirs.keys() == tensors.keys()
    for name, value in theirs.items():
        assert str(value.dtype).removeprefix("torch.") == tensors[name].dtype
        np.testing.assert_array_equal(value.float().numpy(), np.asarray(tensors[name].read(), np.float32))
    again = tensors_of(tmp_path / "x.safetensors")
    assert all(again[name].read().tobytes() == tensor.read().tobytes() for name, tensor in tensors.items())
    assert metadata_of(tmp_path / "x.safetensors")["made_from"] == "nothing"


def test_a_motion_module_goes_out_in_the_original_naming_and_back(adapter, tmp_path):
    convert("export_motion_adapter.py", "--input", adapter, "--format", "original", "--output", tmp_path / "mm.safetensors")
    assert "v2 motion modules" in convert("inspect.py", tmp_path / "mm.safetensors")
    written = load_torch(tmp_path / "mm.safetensors")
    expected = foreign.original_motion(MotionAdapter.from_pretrained(adapter))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], value) for key, value in expected.items())
    assert metadata_of(tmp_path / "mm.safetensors")["kind"] == "motion modules"
    convert("export_motion_adapter.py", "--input", tmp_path / "mm.safetensors", "--output", tmp_path / "back")
    before, after = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (adapter, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(after[key], value) for key, value in before.items())


@pytest.fixture(scope="module")
def lora(base, adapter):
    """A LoRA of the attentions of the motion modules in which nothing is zero."""
    params = load_model(base, adapter).params["unet"]
    fresh = init_lora(jax.random.key(0), params, ".*motion_modules.*attn.*", 4)
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    return jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), x.shape), fresh)


def names(base, adapter):
    return load_model(base, adapter).layers()


@pytest.mark.parametrize("naming", ["diffusers", "original", "kohya"])
def test_loras_go_out_and_come_back(base, adapter, lora, tmp_path, naming):
    write_tensors(as_named(Lora(unet=lora), naming, tmp_path), tmp_path / "lora.safetensors")
    back = flatten(load_lora(tmp_path / "lora.safetensors", names(base, adapter)).unet)
    assert back.keys() == flatten(lora).keys()
    for key, value in flatten(lora).items():
        np.testing.assert_array_equal(back[key], value, key)


def test_the_scripts_name_what_cannot_be_said(base, adapter, tmp_path):
    params = load_model(base, adapter).params["unet"]
    save_lora(init_lora(jax.random.key(0), params, ".*motion_modules.*ff.*", 2), tmp_path, 4, 0.0, "base")
    with pytest.raises(UserError, match=r"only the attentions.*--trainable_modules"):
        as_named(load_lora(tmp_path, {}), "original", tmp_path)


def test_diffusers_computes_with_an_exported_lora_what_we_do(base, adapter, lora, tmp_path):
    from anidiff_jax.pipeline import AnimateDiffPipeline
    from tests.test_lora import SIZES
    from tests.test_pipeline import NEGATIVE, PROMPT, sample_theirs

    (tmp_path / "in").mkdir()
    save_lora(lora, tmp_path / "in", alpha=8, dropout=0.0, base="base")
    convert("export_lora.py", "--input", tmp_path / "in", "--output", tmp_path / "pytorch_lora_weights.safetensors")
    latents = np.random.default_rng(0).standard_normal((1, 4, 6, 8, 10), np.float32)
    pipe = AnimateDiffPipeline.from_pretrained(base, adapter, lora=tmp_path / "in")
    assert np.abs(pipe(PROMPT, NEGATIVE, latents=latents, **SIZES) - sample_theirs(base, adapter, latents, lora=tmp_path)).max() <= 2e-3


def test_a_base_with_a_lora_merged_opens_in_diffusers(tmp_path):
    parts = foreign.sd_parts()
    sd = foreign.write_sd_folder(tmp_path, parts)
    layers = foreign.lora_layers(parts[0], parts[2])
    path = foreign.save(foreign.kohya(layers, 2.0), tmp_path / "style.safetensors")
    single = foreign.save(foreign.single_file(parts), tmp_path / "sd.safetensors")
    words = ["--text_encoder_path", sd, "--lora", f"{path}:0.5", "--output", tmp_path / "out", "--verify"]
    assert "largest difference" in convert("export_base.py", "--input", single, *words)
    said = metadata_of(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert said["merged_loras"] == "style.safetensors:0.5"
    assert (said["made_from"], said["text_encoder"]) == ("sd.safetensors", "sd")
    shown = convert("inspect_weights.py", tmp_path / "out", path)
    assert re.search(r"parameters .*M in \d+ tensors, float32", shown)
    assert "fits        text encoders 128 wide" in shown
    assert "fits        base models with text states 128 wide" in shown
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    changed = {"unet": pipe.unet.state_dict(), "text_encoder": pipe.text_encoder.state_dict()}
    for (part, name), (down, up) in layers.items():
        before = parts[0 if part == "unet" else 2].state_dict()[f"{name}.weight"]
        want = before + 0.5 * 2 / 3 * (up.flatten(1) @ down.flatten(1)).reshape(before.shape)
        torch.testing.assert_close(changed[part][f"{name}.weight"], want, rtol=1e-5, atol=1e-6)


def test_a_lora_is_extracted_from_a_difference(adapter, lora, tmp_path):
    """Of a difference that is a LoRA of rank 4 nothing is lost at rank 4, and something at rank 2."""
    _, before, _ = motion_source(adapter)
    after = with_lora(before, lora, 1.0, tmp_path)
    found, share = extract_lora(before, after, 4)
    assert share > 0.999
    for key, tensor in with_lora(before, found, 1.0, tmp_path).items():
        np.testing.assert_allclose(tensor.read(), after[key].read(), rtol=1e-4, atol=1e-4, err_msg=key)
    _, less = extract_lora(before, after, 2)
    assert 0.2 < less < 0.95
    wide, _ = extract_lora(before, after, 64)  # more than the narrow layers have: what is read again is as strong
    (tmp_path / "wide").mkdir()
    save_lora(wide, tmp_path / "wide", alpha=64, dropout=0.0, base="")
    for key, tensor in with_lora(before, load_lora(tmp_path / "wide", {}).unet, 1.0, tmp_path).items():
        np.testing.assert_allclose(tensor.read(), after[key].read(), rtol=1e-4, atol=1e-4, err_msg=key)
    other = reference.write_adapter(tmp_path, reference.adapter(use_motion_mid_block=False))
    with pytest.raises(UserError, match="differ in structure"):
        extract_lora(before, motion_source(other)[1], 4)


def test_a_video_unet_is_no_base_model(base, adapter, tmp_path):
    model, trained = load_model(base, adapter), tmp_path / "iter-3"
    trained.mkdir()
    save_unet_part(model.params["unet"], {}, model, trained, {})
    source = base_source(base, unet=tmp_path / "iter-3")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"holds motion modules too.*export_motion_adapter"):
        write_base(source, tmp_path / "out")


ORIGINAL = "write_original(motion_source(a)[1], b); write_tensors(motion_source(b)[1], c)"
ORBAX = "store.GROUP = 2**24; store.write_component(motion_source(a)[1], {}, b); write_tensors(store.tensors_in(b), c)"


@pytest.mark.parametrize(("both_ways", "limit"), [(ORIGINAL, 0.3), (ORBAX, 0.6)])
def test_conversion_needs_little_memory(tmp_path, both_ways, limit):
    """Peak memory grows by far less than the file: 1.3 times it is what a user would bear."""
    names = [f"down_blocks.0.motion_modules.{i}.transformer_blocks.0.ff.net.2.weight" for i in range(40)]
    draw = np.random.default_rng(0).standard_normal
    write_tensors(
        {name: Tensor((1024, 1024), "float32", lambda: draw((1024, 1024), np.float32)) for name in names}, tmp_path / "a.safetensors"
    )
    code = """
import resource, sys
from pathlib import Path
import jax, orbax.checkpoint
from anidiff_jax.weights import store
from anidiff_jax.weights.merge import write_original
from anidiff_jax.weights.sources import base_source, motion_source
from anidiff_jax.weights.tensors import write_tensors
a, b, c = map(Path, sys.argv[1:])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
idle = peak()
BOTH_WAYS
print(peak() - idle)
""".replace("BOTH_WAYS", both_ways)
    words = [tmp_path / f"{name}.safetensors" for name in "abc"]
    grown = int(subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True).stdout)
    size = words[0].stat().st_size
    assert size > 160e6
    assert grown < limit * size
    before, after = tensors_of(words[0]), tensors_of(words[2])
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name].read(), after[name].read()) for name in names)


def test_what_is_written_has_its_name_when_it_is_whole(tmp_path):
    def fail():
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_tensors({"a": Tensor((4,), "float32", fail)}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_files_are_streamed(tmp_path):
    """When a tensor is read, those before it are gone."""
    earlier: list[weakref.ref] = []

    def read():
        assert all(array() is None for array in earlier)
        array = np.ones((4, 4), np.float32)
        earlier.append(weakref.ref(array))
        return array

    write_tensors({f"t{i}": Tensor((4, 4), "float32", read) for i in range(3)}, tmp_path / "x.safetensors")
    assert len(earlier) == 3
