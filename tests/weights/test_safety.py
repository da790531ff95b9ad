"""Files that are damaged or not meant well: refused in one line, in little memory, and nothing in them is executed."""

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from anidiff_jax.errors import UserError
from anidiff_jax.models.clip import clip_config
from anidiff_jax.models.config import motion_config, unet_config
from anidiff_jax.models.vae import vae_config
from anidiff_jax.weights.base import EMBEDDED, load_model
from anidiff_jax.weights.kinds import recognise
from anidiff_jax.weights.loras import load_lora
from anidiff_jax.weights.sources import base_source, motion_source
from anidiff_jax.weights.tensors import tensors_of


def refused(path: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        tensors_of(path)
    assert "\n" not in str(error.value)


class Hostile:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt"])
def test_nothing_is_executed(tmp_path, suffix):
    trap = tmp_path / "executed"
    torch.save({"state_dict": {"a": torch.ones(2)}, "more": Hostile(trap)}, tmp_path / f"x{suffix}")
    refused(tmp_path / f"x{suffix}", "never executed")
    (tmp_path / f"y{suffix}").write_bytes(pickle.dumps({"a": Hostile(trap)}))
    refused(tmp_path / f"y{suffix}", "never executed")
    assert not trap.exists()


def test_shapes_beyond_the_file(tmp_path):
    tensor = torch.ones(1).expand(100_000, 100_000)  # 40 GB out of four bytes
    torch.save({"a": tensor}, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", "more than the file holds")
    header = b'{"a":{"dtype":"F32","shape":[100000,100000],"data_offsets":[0,4]}}'
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refused(tmp_path / "x.safetensors", "not a whole safetensors file")


@pytest.mark.parametrize("length", [2**63, 2**40, 200_000_000, 10**6])
def test_headers_beyond_the_file(tmp_path, length):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    refused(tmp_path / "x.safetensors", "not a whole safetensors file")


def test_a_zip_bomb(tmp_path):
    torch.save({"a": torch.zeros(10)}, tmp_path / "good.ckpt")
    with zipfile.ZipFile(tmp_path / "good.ckpt") as good, zipfile.ZipFile(tmp_path / "x.ckpt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in good.infolist():
            bomb.writestr(entry.filename, bytes(200_000_000) if "data/0" in entry.filename else good.read(entry))
    assert (tmp_path / "x.ckpt").stat().st_size < 10**6
    refused(tmp_path / "x.ckpt", "compressed")


def test_an_archive_of_several_disks(tmp_path):
    """zipfile raises when it is asked whether such a file is an archive: found by the fuzzing below."""
    torch.save({"a": torch.ones(2)}, tmp_path / "x.ckpt")
    data = bytearray((tmp_path / "x.ckpt").read_bytes())
    locator = data.rindex(b"PK\x06\x07")
    data[locator + 4] = 1
    (tmp_path / "x.ckpt").write_bytes(data)
    refused(tmp_path / "x.ckpt", "is damaged")


def test_archives_unpack_nothing(tmp_path):
    """An entry that would land elsewhere is refused, and one that is a link makes none."""
    link = zipfile.ZipInfo("x/link")
    link.external_attr = 0o120777 << 16
    for entry in ("../../escaped", link):
        torch.save({"a": torch.ones(2)}, tmp_path / "x.ckpt")
        with zipfile.ZipFile(tmp_path / "x.ckpt", "a") as archive:
            archive.writestr(entry, b"/etc/passwd")
        there = set(tmp_path.parent.rglob("*"))
        if entry is link:
            np.testing.assert_array_equal(tensors_of(tmp_path / "x.ckpt")["a"].read(), [1, 1])
        else:
            refused(tmp_path / "x.ckpt", "escaped")
        assert set(tmp_path.parent.rglob("*")) == there


def test_shards_stay_in_their_folder(tmp_path):
    (tmp_path / "secret.safetensors").write_bytes(save({"a": np.ones(2, np.float32)}))
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(UserError, match="is missing"):
        recognise(folder)


GOOD = {
    "x.safetensors": save({"down_blocks.0.motion_modules.0.proj_in.weight": np.ones((4, 4), np.float32)}),
    "y.safetensors": save({"lora_unet_mid_block.lora_down.weight": np.ones((4, 4)), "lora_unet_mid_block.alpha": np.ones(())}),
}
_buffer = io.BytesIO()
torch.save({"state_dict": {"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": torch.ones(4)}}, _buffer)
GOOD["z.ckpt"] = _buffer.getvalue()


def damaged(data: bytes, at: int, new: bytes, end: int) -> bytes:
    at %= len(data)
    return (data[:at] + new + data[at + len(new) :])[: len(data) - end % len(data)]


@st.composite
def files(draw):
    name = draw(st.sampled_from(sorted(GOOD)))
    kind = draw(st.sampled_from(["damaged", "noise", "header"]))
    if kind == "noise":
        return name, draw(st.binary(max_size=400))
    if kind == "header":  # well formed, of odd names, types and shapes
        keys = draw(st.lists(st.text(max_size=30), max_size=4, unique=True))
        dtype = draw(st.sampled_from([np.float32, np.int64, np.float16, np.uint8]))
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        return "x.safetensors", save({key: np.ones(shape, dtype) for key in keys})
    return name, damaged(GOOD[name], draw(st.integers(0)), draw(st.binary(min_size=1, max_size=12)), draw(st.integers(0, 40)))


def read_all(path: Path) -> None:
    """Every reader either takes a file or refuses it as the user's mistake."""
    for reader in (recognise, motion_source, base_source, lambda p: load_lora(p, {"unet": ["mid_block"]})):
        with contextlib.suppress(UserError):
            reader(path)


def fuzz(tmp_path, examples: int) -> None:
    @settings(max_examples=examples, deadline=5000, database=None, suppress_health_check=list(HealthCheck))
    @given(files())
    def run(file):
        name, data = file
        (tmp_path / name).write_bytes(data)
        read_all(tmp_path / name)

    run()


ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3000) | st.sampled_from([10**9, 10**30]) | st.floats() | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=5), inside, max_size=3), max_leaves=5,
)  # fmt: skip


def folders(tmp_path) -> tuple[Path, Path]:
    """(a whole model, a LoRA of PEFT), each with its settings in JSON files."""
    model, lora = tmp_path / "model", tmp_path / "lora"
    if not model.exists():
        shutil.copytree(EMBEDDED, model)
        lora.mkdir()
        pair = {f"base_model.model.mid_block.lora_{m}.weight": np.ones((2, 2), np.float32) for m in "AB"}
        (lora / "adapter_model.safetensors").write_bytes(save(pair))
        said = {"r": 2, "lora_alpha": 2, "alpha_pattern": {"mid_block": 3}, "use_rslora": False, "use_dora": False}
        (lora / "adapter_config.json").write_text(json.dumps(said))
    return model, lora


def fuzz_settings(tmp_path, examples: int) -> None:
    """Other values in the JSON files that lie beside weights."""
    model, lora = folders(tmp_path)
    good = {path: path.read_text() for folder in (model, lora) for path in folder.rglob("*.json") if "tokenizer" not in path.parts}

    def configs() -> None:
        source = base_source(model)
        clip_config(source.configs["text_encoder"])
        vae_config(source.configs["vae"])
        unet_config(source.configs["unet"], None)

    def motion() -> None:
        raw, tensors, _ = motion_source(model / "motion_adapter")
        motion_config(raw, {key: tensor.shape for key, tensor in tensors.items()}, 32)

    readers = {model: (lambda: recognise(model), configs, motion), lora: (lambda: recognise(lora), lambda: load_lora(lora, {}))}

    @settings(max_examples=examples, deadline=5000, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(sorted(good)), st.data())
    def run(path, data):
        said = json.loads(good[path])
        for key in data.draw(st.lists(st.sampled_from(sorted(said)), min_size=1, max_size=2)):
            said[key] = data.draw(ODD)
        try:
            path.write_text(json.dumps(said if data.draw(st.integers(0, 9)) else data.draw(ODD)))
            for reader in readers[lora if lora in path.parents else model]:
                with contextlib.suppress(UserError):
                    reader()
        finally:
            path.write_text(good[path])

    run()


def test_damaged_files_are_refused(tmp_path):
    fuzz(tmp_path, 60)


def test_damaged_settings_are_refused(tmp_path):
    """Among those that fuzzing found: a list where a number belongs, and a number of layers over which memory ends."""
    fuzz_settings(tmp_path, 40)
    model, lora = folders(tmp_path)
    wrong = {"unet layers_per_block": 10**9, "unet cross_attention_dim": {}, "unet block_out_channels": 1.5, "vae in_channels": "4",
             "text_encoder hidden_size": [8], "unet norm_num_groups": 0}  # fmt: skip
    for name, value in wrong.items():
        part, key = name.split()
        said = json.loads((EMBEDDED / part / "config.json").read_text())
        (model / part / "config.json").write_text(json.dumps({**said, key: value}))
        with pytest.raises(UserError, match=r"makes no model|more than any model|entries where"):
            load_model(model)
        shutil.copyfile(EMBEDDED / part / "config.json", model / part / "config.json")
    hangs = {"r": 2, "lora_alpha": 2, "alpha_pattern": {"((a+)+)+b": 3}}
    (lora / "adapter_config.json").write_text(json.dumps(hangs))
    with pytest.raises(UserError, match="names no layers"):
        load_lora(lora, {})
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": ["x"]}')
    with pytest.raises(UserError, match="names no files"):
        base_source(model)


@pytest.mark.soak
def test_damaged_files_are_refused_for_long(tmp_path):
    """For SOAK_MINUTES, ten when nothing is said: other files each time."""
    end, tried = time.monotonic() + 60 * float(os.environ.get("SOAK_MINUTES", "10")), 0
    while time.monotonic() < end:
        fuzz(tmp_path, 500)
        fuzz_settings(tmp_path, 50)
        tried += 550
    print(f"{tried} damaged files")
