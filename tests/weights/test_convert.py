"""import → export returns every tensor bit for bit, in the types it came in; --verify compares with PyTorch."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel
from safetensors.torch import load_file

from tests import reference

ROOT = Path(__file__).parent.parent.parent


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(ROOT / "convert" / script), run_name="__main__")


def same_bits(a: Path, b: Path) -> None:
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.dtype == second[key].dtype, key
        assert torch.equal(value.view(torch.uint8), second[key].view(torch.uint8)), key


def test_base_round_trip(tmp_path, monkeypatch, capsys):
    mixed = reference.write_base(tmp_path, unet_model=reference.unet().to(torch.bfloat16))
    run(monkeypatch, "import_base.py", "--model_id_or_path", mixed, "--output", tmp_path / "ours", "--verify")
    run(monkeypatch, "export_base.py", "--input", tmp_path / "ours", "--output", tmp_path / "back", "--verify")
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        same_bits(mixed / f"{name}.safetensors", tmp_path / "back" / f"{name}.safetensors")
    assert capsys.readouterr().out.count("UNet: largest difference") == 2
    UNet2DConditionModel.from_pretrained(tmp_path / "back" / "unet")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_adapter_round_trip(base, tmp_path, monkeypatch, capsys, dtype):
    source = reference.write_adapter(tmp_path, reference.adapter(use_motion_mid_block=False).to(dtype))
    verify = ("--verify", "--model_id_or_path", base)
    run(monkeypatch, "import_motion_adapter.py", "--motion_adapter_id_or_path", source, "--output", tmp_path / "ours", *verify)
    run(monkeypatch, "export_motion_adapter.py", "--input", tmp_path / "ours", "--output", tmp_path / "back", *verify)
    same_bits(source / "diffusion_pytorch_model.safetensors", tmp_path / "back" / "diffusion_pytorch_model.safetensors")
    assert dict(MotionAdapter.load_config(tmp_path / "back")).items() >= {"use_motion_mid_block": False}.items()
    assert MotionAdapter.from_pretrained(tmp_path / "back").config.motion_num_attention_heads == 2


def test_a_wrong_conversion_is_seen(base, adapter, tmp_path):
    from anidiff_jax.errors import UserError
    from anidiff_jax.weights.verify import verify

    other = reference.write_adapter(tmp_path, reference.adapter(seed=5))
    with pytest.raises(UserError, match="the conversion is wrong"):
        verify(base, base, other, adapter)


def test_an_existing_folder_is_left_alone(adapter, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "import_motion_adapter.py", "--motion_adapter_id_or_path", adapter, "--output", tmp_path / "mine")
    assert stop.value.code == 2
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "mine"


def test_half_written_never_looks_whole(tmp_path):
    from anidiff_jax.weights.files import written_whole

    def fail():
        with written_whole(tmp_path / "out") as folder:
            (folder / "part").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
    with written_whole(tmp_path / "out") as folder:
        np.save(folder / "a.npy", np.ones(1))
    with written_whole(tmp_path / "out") as folder:  # replaces it in one move
        (folder / "b").write_text("x")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b"]
    assert len(list(tmp_path.iterdir())) == 1
