"""What `--export` writes of each kind of run: the sums of weights, in the forms that other programs open, with what they were made from."""

import numpy as np
import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel
from safetensors.numpy import load_file

from anidiff_jax.config import TrainConfig
from anidiff_jax.training.export import export
from anidiff_jax.weights.loras import save_lora
from anidiff_jax.weights.tensors import metadata_of
from anidiff_jax.weights.tree import unflatten
from tests import reference
from tests.weights import foreign

IMAGE, MOTION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.motion_modules.0.transformer_blocks.0.attn1.to_q"
ALPHA, RANK = 6, 3


@pytest.fixture
def run(base, adapter, tmp_path):
    """run(layers, **arguments) → (what export wrote, the matrices): of a run that trained a LoRA on these layers."""
    checkpoint = tmp_path / "run" / "checkpoints" / "iter-7"
    checkpoint.mkdir(parents=True)
    widths = {key.removesuffix(".weight"): value.shape[0] for model in (reference.unet(), reference.adapter())
              for key, value in model.state_dict().items() if key.endswith("to_q.weight")}  # fmt: skip

    def start(layers, **arguments):
        rng = np.random.default_rng(0)
        pairs = {layer: [rng.standard_normal(shape, np.float32) / 8 for shape in ((widths[layer], RANK), (RANK, widths[layer]))]
                 for layer in layers}  # fmt: skip
        flat = {f"{layer}.lora_{m}.weight": x for layer, pair in pairs.items() for m, x in zip("AB", pair, strict=True)}
        save_lora(unflatten(flat), checkpoint, ALPHA, 0.0, "base")
        given = {"model_id_or_path": str(base), "motion_adapter_id_or_path": str(adapter), "export": "diffusers", **arguments}
        return export(checkpoint, TrainConfig(**given)), pairs

    start.checkpoint = checkpoint
    return start


def delta(pair, scale):
    a, b = pair
    return torch.tensor((a @ b).T * scale)


def test_a_lora_of_the_image_model_is_merged_into_its_base_with_those_that_were_folded_in(run, base, tmp_path):
    layers = foreign.lora_layers(reference.unet(), torch.nn.Module(), 2)
    style = {key: pair for key, pair in layers.items() if key[1] == IMAGE}
    motion = {("unet", MOTION): next(iter(style.values()))}
    given = [f"{foreign.save(foreign.peft_names(style), tmp_path / 'style.safetensors')}:-0.5",
             f"{foreign.save(foreign.peft_names(motion), tmp_path / 'pan.safetensors')}:0.3"]  # fmt: skip
    (written,), pairs = run([IMAGE], lora=given)
    assert written == tmp_path / "run" / "export" / "base"
    got, before = UNet2DConditionModel.from_pretrained(written / "unet").state_dict(), reference.unet().state_dict()
    down, up = style["unet", IMAGE]
    want = before[f"{IMAGE}.weight"] - 0.5 * up @ down + delta(pairs[IMAGE], ALPHA / RANK)
    torch.testing.assert_close(got.pop(f"{IMAGE}.weight"), want, rtol=2e-3, atol=2e-3)
    assert all(torch.equal(value, before[key].half().float()) for key, value in got.items())
    said = metadata_of(written / "unet" / "diffusion_pytorch_model.safetensors")
    assert (said["trained_by"], said["base_model"], said["checkpoint"]) == ("anidiff-jax", base.name, "iter-7")


def test_a_lora_of_motion_modules_is_merged_with_those_that_were_folded_in(run, adapter, tmp_path):
    layers = {("unet", MOTION): (torch.randn(2, 32) / 8, torch.randn(32, 2) / 8)}
    width = reference.adapter().state_dict()[f"{MOTION}.weight"].shape[0]
    layers = {key: (down[:, :width], up[:width]) for key, (down, up) in layers.items()}
    path = foreign.save({k: v.contiguous() for k, v in foreign.peft_names(layers).items()}, tmp_path / "pan.safetensors")
    written, pairs = run([MOTION], lora=[f"{path}:0.5"], export="all", motion_norm="per_frame")
    assert [place.name for place in written] == ["motion-adapter", "motion-module.safetensors"]
    down, up = layers["unet", MOTION]
    want = reference.adapter().state_dict()[f"{MOTION}.weight"] + 0.5 * up @ down + delta(pairs[MOTION], ALPHA / RANK)
    got = MotionAdapter.from_pretrained(written[0]).state_dict()[f"{MOTION}.weight"]
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
    assert load_file(written[1]).keys() == foreign.original_motion(reference.adapter()).keys()
    for file in (written[0] / "diffusion_pytorch_model.safetensors", written[1]):
        said = metadata_of(file)
        assert said["merged_loras"] == "pan.safetensors:0.5, iter-7:1"
        assert (said["made_from"], said["motion_norm"], said["version"]) == (adapter.name, "per_frame", "v2")


@pytest.mark.parametrize(("layers", "form", "why"), [([IMAGE, MOTION], "all", "holds layers of motion modules and of the image model"),
                                                     ([IMAGE], "original", "has no form")])  # fmt: skip
def test_what_has_no_such_form_is_a_warning(run, caplog, tmp_path, layers, form, why):
    assert run(layers, export=form)[0] == []
    assert why in caplog.text
    assert not (tmp_path / "run" / "export").exists()


def test_a_unet_that_trained_as_a_whole_takes_the_bases_place(run, base, tmp_path):
    trained = reference.unet(seed=8)
    trained.save_pretrained(run.checkpoint)
    (written,) = export(run.checkpoint, TrainConfig(model_id_or_path=str(base), export="all"))
    got = UNet2DConditionModel.from_pretrained(written / "unet").state_dict()
    assert all(torch.equal(got[key], value.half().float()) for key, value in trained.state_dict().items())
    assert load_file(written / "vae" / "diffusion_pytorch_model.safetensors").keys() == reference.vae().state_dict().keys()
