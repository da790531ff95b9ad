"""What config.json files may say, and what is refused by name."""

import numpy as np
import pytest

from anidiff_jax.errors import UserError
from anidiff_jax.models.clip import clip_config
from anidiff_jax.models.config import fresh_motion_config, motion_config, unet_config
from anidiff_jax.models.vae import vae_config
from tests import reference


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class_embed_type", "timestep"),
        ("addition_embed_type", "text_time"),
        ("resnet_time_scale_shift", "scale_shift"),
        ("only_cross_attention", [True, False]),
        ("flip_sin_to_cos", False),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
        ("a_key_from_the_future", 3),
        ("downsample_padding", 0),
        ("norm_num_groups", 7),
    ],
)
def test_a_unet_key_that_changes_the_computation_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=key if key != "down_block_types" else "AttnDownBlock2D"):
        unet_config({**dict(reference.unet().config), key: value}, None)


def test_vae_and_text_keys_are_refused_too():
    with pytest.raises(UserError, match="act_fn"):
        vae_config({**dict(reference.vae().config), "act_fn": "relu"})
    with pytest.raises(UserError, match="hidden_act"):
        clip_config({"hidden_act": "tanh"})


def shapes(**changes):
    return {k: tuple(v.shape) for k, v in reference.adapter(**changes).state_dict().items()}


def test_structure_comes_from_the_tensors_when_the_config_lies():
    truth = shapes(use_motion_mid_block=False, motion_max_seq_length=24)
    lie = {**dict(reference.adapter().config), "use_motion_mid_block": True, "motion_max_seq_length": 32}
    read = motion_config(lie, truth, 8)
    assert read.mid == ()
    assert read.max_frames == 24
    assert read.to_json()["use_motion_mid_block"] is False


def test_config_survives_the_way_to_json_and_back():
    theirs = reference.adapter(motion_layers_per_block=(1, 2), motion_num_attention_heads=(2, 4), motion_transformer_layers_per_block=2)
    here = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    read = motion_config(dict(theirs.config), here, 8)
    assert motion_config(read.to_json(), here, 8) == read
    said = read.to_json()
    for key, value in theirs.config.items():
        if not key.startswith("_"):
            same = list(value) if isinstance(value, tuple) else value
            assert said[key] == same, key


def test_an_adapter_for_another_model_is_refused():
    other = motion_config({}, shapes(block_out_channels=(16, 64)), 8)
    with pytest.raises(UserError, match="does not fit"):
        unet_config(dict(reference.unet().config), other)


def test_attention_is_chosen_by_shape_and_device(monkeypatch):
    from anidiff_jax.models import attention

    half, full = np.dtype("float16"), np.dtype("float32")
    assert attention.choose((16, 4096, 8, 40), 4096, full) == "chunked"
    assert attention.choose((4096, 16, 8, 40), 16, half) == "xla"
    monkeypatch.setattr(attention.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention, "fused_limit", lambda: 256)
    assert attention.choose((16, 4096, 8, 160), 77, half) == "cudnn"
    assert attention.choose((16, 64, 8, 160), 64, half) == "xla"  # 512 in a row
    assert attention.choose((4096, 16, 8, 40), 16, half) == "packed"
    assert attention.choose((4096, 17, 8, 40), 17, half) == "xla"
    assert attention.choose((6 * 128 * 128, 32, 8, 40), 32, half) == "xla"  # many, but each is short: chunks would be taken one by one
    assert attention.choose((4 * 128 * 128, 16, 8, 40), 16, half) == "xla"  # more than the kernel has places for
    assert attention.choose((4, 4096, 1, 512), 4096, half) == "xla"  # the VAE's one head is too wide for cuDNN
    assert attention.choose((16, 4096, 8, 40), 4096, full) == "chunked"
    monkeypatch.setattr(attention, "fused_limit", lambda: 128)
    assert attention.choose((16, 1024, 8, 160), 77, half) == "xla"


def test_heads_must_divide_channels():
    with pytest.raises(UserError, match="motion_num_attention_heads=3"):
        fresh_motion_config(dict(reference.unet().config), 3, 16)
