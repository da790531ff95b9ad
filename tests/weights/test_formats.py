"""Every kind of file that people have: read, it is the model that PyTorch has in memory."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

from anidiff_jax.errors import UserError
from anidiff_jax.models.layers import Settings
from anidiff_jax.weights import kinds
from anidiff_jax.weights.base import load_model
from anidiff_jax.weights.kinds import recognise
from anidiff_jax.weights.sources import base_source, motion_source
from anidiff_jax.weights.tensors import tensors_of
from anidiff_jax.weights.tree import flatten
from tests import reference
from tests.weights import foreign
from tests.weights.test_load import same, weights


@pytest.fixture(scope="module")
def parts():
    return foreign.sd_parts()


@pytest.fixture(scope="module")
def sd(parts, tmp_path_factory):
    """The same model in diffusers layout."""
    return foreign.write_sd_folder(tmp_path_factory.mktemp("sd"), parts)


def test_the_names_of_single_files_are_those_that_diffusers_knows(parts):
    """Holds the table that writes the files of these tests, not ours, to diffusers."""
    unet, vae, _ = parts
    state = foreign.single_file(parts)
    theirs = convert_ldm_unet_checkpoint(dict(state), unet.config)
    assert theirs.keys() == unet.state_dict().keys()
    assert all(torch.equal(theirs[k], v) for k, v in unet.state_dict().items())
    theirs = convert_ldm_vae_checkpoint(dict(state), vae.config)
    assert all(torch.equal(theirs[k].reshape(v.shape), v) for k, v in vae.state_dict().items())


@pytest.mark.parametrize(("suffix", "ema"), [(".safetensors", False), (".ckpt", True)])
def test_single_files(parts, sd, tmp_path, suffix, ema):
    path = foreign.save(foreign.single_file(parts, ema), tmp_path / f"base{suffix}")
    found = recognise(path)
    assert (found.kind, found.naming, found.version) == (kinds.BASE, "LDM", "Stable Diffusion 1.x")
    assert any("EMA" in note for note in found.notes) == ema
    source = base_source(path)
    source.tokenizer = sd / "tokenizer"
    model, like = load_model(source), load_model(sd)
    same(weights(model), weights(like))
    assert (model.networks.unet.config, model.networks.vae.config) == (like.networks.unet.config, like.networks.vae.config)
    assert model.networks.text_encoder.config.heads == like.networks.text_encoder.config.heads


def test_what_a_single_file_lacks_is_asked_for_and_taken(parts, sd, tmp_path):
    path = foreign.save(foreign.single_file(parts, vae=False, text=False), tmp_path / "unet-only.safetensors")
    with pytest.raises(UserError, match="holds no vae: give one with --vae_path"):
        base_source(path)
    with pytest.raises(UserError, match="--text_encoder_path"):
        base_source(path, vae=sd)
    same(weights(load_model(base_source(path, vae=sd / "vae", text_encoder=sd))), weights(load_model(sd)))
    autoencoder = {k.removeprefix("first_stage_model."): v for k, v in foreign.single_file(parts).items() if k.startswith("first_stage")}
    autoencoder["loss.discriminator.main.0.weight"] = torch.ones(2, 2)
    alone = foreign.save(autoencoder, tmp_path / "vae.ckpt")
    assert recognise(alone).kind == kinds.VAE
    same(weights(load_model(base_source(path, vae=alone, text_encoder=sd))), weights(load_model(sd)))


def motion_is(model, path):
    """A file's motion modules are those of diffusers' adapter, bit for bit."""
    expected = {k: v.numpy() for k, v in model.state_dict().items()}
    raw, tensors, _ = motion_source(path)
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(tensors[key].read(), value, key)
    return raw


FORMS = {
    "raw": lambda state: state,
    "wrapped": lambda state: {"state_dict": state, "animatediff_config": {"motion_module_type": "Vanilla"}, "epoch": 3},
    "distributed": lambda state: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mid", [True, False])
def test_original_motion_modules(base, tmp_path, form, mid):
    model = reference.adapter(use_motion_mid_block=mid, motion_max_seq_length=32)
    path = foreign.save(FORMS[form](foreign.original_motion(model)), tmp_path / "mm.ckpt")
    found = recognise(path)
    assert (found.kind, found.naming, found.version) == (kinds.MOTION, "original", "v2" if mid else "v3")
    motion_is(model, path)


def test_what_the_original_trainer_saves_is_a_whole_unet(base, tmp_path, caplog):
    """Its motion modules are taken, under the names that several processes give them."""
    model = reference.adapter(motion_max_seq_length=32)
    image = {f"module.{k}": v for k, v in reference.unet().state_dict().items()}
    state = {"epoch": 3, "global_step": 7, "state_dict": {**image, **FORMS["distributed"](foreign.original_motion(model))["state_dict"]}}
    path = foreign.save(state, tmp_path / "checkpoint.ckpt")
    assert (recognise(path).kind, recognise(path).version) == (kinds.MOTION, "v2")
    with caplog.at_level(logging.INFO):
        motion_is(model, path)
    assert f"a whole UNet: its {len(image)} tensors beside the motion modules are not used" in caplog.text
    with pytest.raises(UserError, match="is a file, and a checkpoint a folder"):
        kinds.kind_of_checkpoint(path)


def test_parameters_and_text_encoders_are_read(base, tmp_path):
    """A pickle of what a script trained holds nn.Parameters; a text encoder's config.json names it otherwise than diffusers' do."""
    state = {name: torch.nn.Parameter(value) for name, value in reference.unet().state_dict().items()}
    torch.save(state, tmp_path / "unet.pt")
    name, value = next(iter(state.items()))
    np.testing.assert_array_equal(tensors_of(tmp_path / "unet.pt")[name].read(), value.detach().numpy())
    assert recognise(base / "text_encoder").kind == kinds.TEXT
    shutil.copytree(base / "text_encoder", tmp_path / "text")
    said = json.loads((tmp_path / "text" / "config.json").read_text())
    (tmp_path / "text" / "config.json").write_text(json.dumps({**said, "architectures": None}))
    assert recognise(tmp_path / "text").kind == kinds.TEXT


@pytest.mark.parametrize(
    ("part", "other", "kind"), [("unet", "adapter", "motion modules"), ("vae", "unet", "UNet"), ("text_encoder", "vae", "VAE")]
)
def test_a_part_of_another_kind_is_refused(base, adapter, part, other, kind):
    with pytest.raises(UserError, match=f"is diffusers .*{kind}: give it as --"):
        base_source(base, **{part: adapter if other == "adapter" else base / other})


def test_position_tables(base, tmp_path):
    """A trained one is kept, a longer one too, two that differ are refused, and none means the sinusoids."""
    model = reference.adapter(motion_max_seq_length=40)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("pe"):
                buffer.add_(torch.randn(buffer.shape))
    state = foreign.original_motion(model)
    motion_is(model, foreign.save(state, tmp_path / "long.safetensors"))
    key = next(k for k in state if k.endswith("attention_blocks.1.pos_encoder.pe"))
    with pytest.raises(UserError, match="position tables"):
        motion_source(foreign.save({**state, key: state[key] + 1}, tmp_path / "two.safetensors"))
    plain = reference.adapter(use_motion_mid_block=False, motion_max_seq_length=32)
    without = {k: v for k, v in foreign.original_motion(plain).items() if not k.endswith("pe")}
    path = foreign.save(without, tmp_path / "lcm.safetensors")
    assert recognise(path).version == "AnimateLCM"
    _, tensors, _ = motion_source(path)
    for name, buffer in plain.state_dict().items():
        np.testing.assert_allclose(tensors[name].read(), buffer.numpy(), rtol=1e-5, atol=1e-5, err_msg=name)


def test_v1_is_told_by_its_short_table(tmp_path):
    model = reference.adapter(use_motion_mid_block=False, motion_max_seq_length=24)
    path = foreign.save(foreign.original_motion(model), tmp_path / "mm.ckpt")
    found = recognise(path)
    assert found.version == "v1"
    assert found.norms == {"motion_norm": "per_frame", "spatial_norm": "joint"}


def test_norms_that_a_file_was_not_trained_with_are_said(base, tmp_path, caplog):
    model = reference.adapter()
    path = foreign.save(foreign.original_motion(model), tmp_path / "mm.safetensors")
    with caplog.at_level("INFO"):
        load_model(base, path, motion_heads=2)
    assert "--motion_norm per_frame computes them so" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        load_model(base, path, motion_heads=2, settings=Settings(motion_norm="per_frame"))
        load_model(base, reference.write_adapter(tmp_path, model))
    assert "norm" not in caplog.text


def test_folders_with_pickles(parts, sd, tmp_path):
    import shutil

    from safetensors.torch import load_file

    folder = shutil.copytree(sd, tmp_path / "sd")
    for part, stem, name in (("unet", "diffusion_pytorch_model", "diffusion_pytorch_model"), ("text_encoder", "model", "pytorch_model")):
        file = folder / part / f"{stem}.safetensors"
        torch.save(load_file(file), folder / part / f"{name}.bin")
        file.unlink()
    same(weights(load_model(folder)), weights(load_model(sd)))


def test_values_of_every_type_are_those_that_torch_reads(tmp_path):
    values = torch.arange(-6, 6, dtype=torch.float32).reshape(3, 4) / 4
    kinds = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64)
    kinds += (torch.bool, torch.uint16)
    state = {str(kind): values.to(kind) for kind in kinds} | {"one": torch.tensor(3.0), "none": torch.ones(0, 2)}
    path = foreign.save(state, tmp_path / "x.safetensors")
    read = tensors_of(path)
    assert read.keys() == state.keys()
    for key, value in state.items():
        ours = read[key].read()
        assert (ours.shape, str(ours.dtype)) == (read[key].shape, read[key].dtype), key
        assert f"torch.{ours.dtype}" == str(value.dtype)
        assert (ours.astype(np.float64) == value.double().numpy()).all(), key
    for kind, size in (("C64", 16), ("F4", 1)):
        header = json.dumps({"a.scale": {"dtype": kind, "shape": [2], "data_offsets": [0, size]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
        with pytest.raises(UserError, match=rf"x\.safetensors: a\.scale is of the type {kind.lower()}"):
            tensors_of(path)["a.scale"].read()


def test_what_is_not_read_is_named(tmp_path, adapter, base):
    some = torch.ones(4, 4)
    for key, name in {
        "control_model.input_hint_block.0.weight": "ControlNet",
        "down_blocks.0.temporal_attentions.0.norm.weight": "HotShot-XL",
        "emb_params": "textual inversion",
        "lora_unet_down_blocks_0_attentions_0_proj_in.hada_w1_a": "LoHa",
        "conditioner.embedders.0.transformer.x": "Stable Diffusion XL",
        "cond_stage_model.model.transformer.resblocks.0.x": "nothing",
    }.items():
        path = foreign.save({key: some}, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=name):
            base_source(path)
    with pytest.raises(UserError, match=r"motion modules.*--motion_adapter_id_or_path"):
        base_source(adapter)
    with pytest.raises(UserError, match=r"base model.*--model_id_or_path"):
        motion_source(base)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_pia_is_named(tmp_path, prefix):
    """As a MotionAdapter with its own first layer, and in the original naming."""
    model = reference.adapter()
    for state in (model.state_dict(), foreign.original_motion(model)):
        state = {f"{prefix}{key}": value for key, value in state.items()} | {f"{prefix}conv_in.weight": torch.ones(16, 9, 3, 3)}
        path = foreign.save(state, tmp_path / f"{len(state)}.safetensors")
        assert (recognise(path).version, recognise(path).supported) == ("PIA", False)
        with pytest.raises(UserError, match=r"PIA.*not supported"):
            motion_source(path)


def test_stable_diffusion_xl_is_named(tmp_path):
    text = torch.ones(4, 2048)  # its text states
    states = {
        "kohya": {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 8)},
        "kohya's": {"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": text},
        "diffusers": {"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.lora_A.weight": text},
        "unet": {"add_embedding.linear_1.weight": torch.ones(4, 4), "conv_in.weight": torch.ones(4, 4)},
    }
    for name, state in states.items():
        found = recognise(foreign.save(state, tmp_path / f"{name}.safetensors"))
        assert (found.version, found.supported) == ("Stable Diffusion XL", False)
    for name in states:
        with pytest.raises(UserError, match=r"Stable Diffusion XL.*not supported"):
            motion_source(tmp_path / f"{name}.safetensors")
    (tmp_path / "sd" / "unet").mkdir(parents=True)
    (tmp_path / "sd" / "unet" / "config.json").write_text('{"cross_attention_dim": 2048}')
    with pytest.raises(UserError, match="Stable Diffusion XL"):
        base_source(tmp_path / "sd")


def test_every_tensor_is_used_once_or_named(parts, sd, tmp_path, caplog):
    """Two that are the same layer under two names are an error; what is no weight is told."""
    state = foreign.single_file(parts)
    twice = {**state, "model.diffusion_model.conv_in.weight": state["model.diffusion_model.input_blocks.0.0.weight"] + 1}
    with pytest.raises(UserError, match="are the same layer"):
        base_source(foreign.save(twice, tmp_path / "a.safetensors"))
    key, value = next(iter(reference.adapter().state_dict().items()))
    for name in (f"module.{key}", key.replace("motion_modules.0.", "motion_modules.0.temporal_transformer.")):
        path = foreign.save({**reference.adapter().state_dict(), name: value + 1}, tmp_path / "b.safetensors")
        with pytest.raises(UserError, match=r"are the same layer|more than one tensor"):
            motion_source(path)
    state["first_stage_model.loss.logvar"] = torch.ones(3)
    notes = " ".join(recognise(foreign.save(state, tmp_path / "c.safetensors")).notes)
    assert "4 tensors that are no weights are not used" in notes  # two of the schedule, position_ids, and the VAE's trainer's
    with caplog.at_level("INFO"):
        recognise(foreign.save({"state_dict": foreign.original_motion(reference.adapter()), "epoch": 3, "optimizer": {"a": [value]}},
                               tmp_path / "d.ckpt"))  # fmt: skip
    assert "beside its weights it holds optimizer, which is not used" in caplog.text
    assert "epoch" not in caplog.text


def test_loaded_models_compute_the_same(parts, sd, tmp_path):
    """A single file and an original motion module → a video, as diffusers makes it from its own formats."""
    import jax
    from diffusers import UNetMotionModel

    model = reference.adapter(block_out_channels=(32, 64), motion_num_attention_heads=8, motion_norm_num_groups=32)
    single = foreign.save(foreign.single_file(parts), tmp_path / "sd.ckpt")
    motion = foreign.save(foreign.original_motion(model), tmp_path / "mm.safetensors")
    ours = load_model(base_source(single, text_encoder=sd), motion)
    x = np.random.default_rng(0).standard_normal((1, 5, 6, 8, 4), np.float32)
    text = np.random.default_rng(1).standard_normal((1, 7, 128), np.float32)
    got = jax.jit(lambda p: ours.networks.unet.apply({"params": p}, x, np.array([7]), text))(ours.params["unet"])
    theirs = UNetMotionModel.from_unet2d(parts[0], model).eval()
    with torch.inference_mode():
        states = torch.tensor(text).repeat_interleave(5, 0)
        want = theirs(torch.tensor(x).permute(0, 4, 1, 2, 3), 7, states).sample.permute(0, 2, 3, 4, 1)
    reference.close(got, want)
    assert flatten(ours.params["unet"])


@pytest.mark.parametrize(("mid", "version"), [(True, "v2"), (False, "SDXL beta")])
def test_three_blocks_are_not_always_xl(tmp_path, mid, version):
    model = reference.adapter(block_out_channels=(16, 32, 32), use_motion_mid_block=mid)
    assert recognise(reference.write_adapter(tmp_path, model)).version == version
