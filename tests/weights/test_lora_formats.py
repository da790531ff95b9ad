"""LoRAs of every naming: applied, they compute what the weights compute with the adapters' products added in PyTorch."""

import json

import jax
import numpy as np
import pytest
import torch
from diffusers import UNetMotionModel

from anidiff_jax.errors import UserError
from anidiff_jax.lora import joined, merge_lora
from anidiff_jax.pipeline import AnimateDiffPipeline
from anidiff_jax.weights import kinds
from anidiff_jax.weights.base import load_model
from anidiff_jax.weights.kinds import recognise
from anidiff_jax.weights.loras import load_lora
from anidiff_jax.weights.sources import motion_source
from anidiff_jax.weights.tree import flatten
from tests import reference
from tests.weights import foreign

RANK, ALPHA = 3, 2.0


@pytest.fixture(scope="module")
def networks():
    """PyTorch's UNet with motion modules, and text encoder."""
    unet = UNetMotionModel.from_unet2d(reference.unet(), reference.adapter()).eval()
    return unet, reference.text_encoder(reference.vocabulary_size())


@pytest.fixture(scope="module")
def model(base, adapter):
    return load_model(base, adapter)


@pytest.fixture(scope="module")
def layers(networks):
    return foreign.lora_layers(*networks, RANK)


FORMS = {
    "kohya": (lambda layers: foreign.kohya(layers, ALPHA), ALPHA / RANK),
    "diffusers": (foreign.peft_names, 1.0),
    "old diffusers": (foreign.old_diffusers, 1.0),
}


@pytest.mark.parametrize("form", FORMS)
def test_namings(form, model, layers, tmp_path):
    write, scale = FORMS[form]
    path = foreign.save(write(layers), tmp_path / "lora.safetensors")
    assert recognise(path).kind == kinds.LORA
    lora = load_lora(path, model.layers())
    check(lora, layers, scale)


def check(lora, layers, scale):
    found = {"unet": flatten(lora.unet), "text_encoder": flatten(lora.text_encoder)}
    assert sum(map(len, found.values())) == 2 * len(layers)
    for (part, name), (down, up) in layers.items():
        name = name if part == "unet" or name.startswith("text_model.") else f"text_model.{name}"
        a, b = (np.asarray(found[part][f"{name}.lora_{m}.weight"]) for m in "AB")
        np.testing.assert_array_equal(a, down.permute(2, 3, 1, 0) if down.ndim == 4 else down.T, name)
        np.testing.assert_allclose(b, scale * up.reshape(up.shape[:2]).T, rtol=1e-6, err_msg=name)


def test_peft_folders_as_the_reference_implementation_writes_them(model, layers, tmp_path):
    folder = tmp_path / "checkpoint" / "default"
    folder.mkdir(parents=True)
    motion = {key: pair for key, pair in layers.items() if "motion_modules" in key[1]}
    state = {f"base_model.model.{name}.lora_{m}.weight": x for (_, name), pair in motion.items() for m, x in zip("AB", pair, strict=True)}
    foreign.save(state, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}))
    assert recognise(folder.parent).version == "motion LoRA"
    check(load_lora(folder.parent, model.layers()), motion, ALPHA / RANK)


def test_original_motion_loras(model, layers, tmp_path):
    path = foreign.save(foreign.original_motion_lora(layers), tmp_path / "pan.ckpt")
    found = recognise(path)
    assert (found.kind, found.naming, found.version) == (kinds.LORA, "original", "motion LoRA")
    expected = {key: pair for key, pair in layers.items() if "motion_modules" in key[1] and "attn" in key[1]}
    check(load_lora(path, model.layers()), expected, 1.0)


def test_a_lora_beside_another_ones_config_is_itself(model, layers, tmp_path):
    """As one that was exported into its checkpoint's folder: its scale is in its weights."""
    path = foreign.save(foreign.original_motion_lora(layers), tmp_path / "pan.ckpt")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}))
    expected = {key: pair for key, pair in layers.items() if "motion_modules" in key[1] and "attn" in key[1]}
    check(load_lora(path, model.layers()), expected, 1.0)


def test_the_domain_adapter_of_v3_adapts_the_image_network(model, layers, tmp_path):
    state = foreign.domain_adapter(layers)
    path = foreign.save(state, tmp_path / "v3_sd15_adapter.ckpt")
    found = recognise(path)
    assert (found.kind, found.naming, found.version) == (kinds.LORA, "original", "domain adapter")
    assert "adapts image layers" in found.notes
    adapted = {key: pair for key, pair in layers.items() if ".attentions." in key[1] and ".attn" in key[1]}
    assert 2 * len(adapted) == len(state["state_dict"])
    check(load_lora(path, model.layers()), adapted, 1.0)
    with pytest.raises(UserError, match="give it as --lora"):
        motion_source(path)


def test_applied_and_merged_they_equal_pytorch(networks, model, layers, tmp_path):
    """One LoRA on everything, convolutions among it, and another on motion modules, with scales, in either order."""
    unet, text_encoder = networks
    other = {key: pair for key, pair in foreign.lora_layers(unet, text_encoder, 2, seed=9).items() if "motion_modules" in key[1]}
    paths = [
        (foreign.save(foreign.kohya(layers, ALPHA), tmp_path / "a.safetensors"), 0.7 * ALPHA / RANK, 0.7),
        (foreign.save(foreign.peft_names(other), tmp_path / "b.safetensors"), -0.4, -0.4),
    ]
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 6, 4), np.float32)
    ids = np.random.default_rng(1).integers(0, 50, (1, 77))
    weights = {"unet": unet.state_dict(), "text_encoder": text_encoder.state_dict()}
    before = {part: {k: v.clone() for k, v in state.items()} for part, state in weights.items()}
    for pairs, (_, scale, _) in zip((layers, other), paths, strict=True):
        for (part, name), (down, up) in pairs.items():
            weight = weights[part][f"{name}.weight"]
            weight += scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    with torch.inference_mode():
        text = text_encoder(torch.tensor(ids)).last_hidden_state
        want = unet(torch.tensor(x).permute(0, 4, 1, 2, 3), 7, text.repeat_interleave(3, 0)).sample.permute(0, 2, 3, 4, 1)
    for part, network in (("unet", unet), ("text_encoder", text_encoder)):
        network.load_state_dict(before[part])

    pipe = AnimateDiffPipeline(model, None)
    net = model.networks
    run = jax.jit(lambda params, lora, text: net.unet.apply({"params": params, "lora": lora}, x, np.array([7]), text))
    read = jax.jit(lambda params, lora: net.text_encoder.apply({"params": params, "lora": lora}, ids))
    for order in (paths, paths[::-1]):
        pipe.loras = []
        for path, _, scale in order:
            pipe.load_lora(path, scale)
        text_states = read(model.params["text_encoder"], pipe.joined_lora("text_encoder"))
        reference.close(text_states, text)
        reference.close(run(model.params["unet"], pipe.joined_lora("unet"), text_states), want)
    merged = merge_lora(model.params["unet"], pipe.joined_lora("unet"), 1.0)
    reference.close(run(merged, {}, text_states), want)
    pipe.loras = [(lora, 0.0) for lora, _ in pipe.loras]
    assert pipe.joined_lora("unet") == {}  # nothing is computed for a scale of zero


def test_diffusers_reads_the_same_kohya_file_so(base, layers, tmp_path):
    """The reference's own loader, on layers that it can adapt."""
    from diffusers import StableDiffusionPipeline

    spatial = {k: v for k, v in layers.items() if "motion_modules" not in k[1] and "proj" not in k[1].rsplit(".", 1)[-1]}
    path = foreign.save(foreign.kohya(spatial, ALPHA), tmp_path / "lora.safetensors")
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(path)
    pipe.fuse_lora()
    theirs = {k.replace(".base_layer", ""): v for k, v in pipe.unet.state_dict().items() if "lora" not in k}
    image = load_model(base)
    ours = merge_lora(image.params["unet"], joined([(load_lora(path, image.layers()).unet, 1.0)]), 1.0)
    changed = 0
    for key, value in flatten(ours).items():
        want = theirs[key].detach().numpy()
        want = want.transpose(2, 3, 1, 0) if want.ndim == 4 else want.T if want.ndim == 2 else want
        np.testing.assert_allclose(value, want, rtol=1e-4, atol=1e-5, err_msg=key)
        changed += not np.allclose(value, flatten(image.params["unet"])[key])
    assert changed > 5


def test_what_is_no_plain_lora_is_refused_by_name(model, layers, tmp_path):
    state = foreign.kohya(layers, ALPHA)
    stem = next(iter(state)).removesuffix(".lora_down.weight")
    for key, name in {f"{stem}.dora_scale": "DoRA", f"{stem}.hada_w1_a": "LoHa", f"{stem}.lokr_w1": "LoKr"}.items():
        with pytest.raises(UserError, match=name):
            load_lora(foreign.save({**state, key: torch.ones(3)}, tmp_path / "x.safetensors"), model.layers())
    first = next(pair for (part, name), pair in layers.items() if part == "unet" and "attn1.to_q" in name)
    name = next(name for part, name in layers if part == "unet" and "attn1.to_q" in name)
    twice = {f"unet.{name}.lora_{m}.weight": x.clone() for m, x in zip("AB", first, strict=True)}
    for damaged, why in (
        ({k: v for k, v in state.items() if k != f"{stem}.lora_up.weight"}, "lacks one"),
        ({**state, "lora_unet_nowhere.lora_down.weight": torch.ones(3, 3)}, "this model lacks"),
        ({**state, "something.else": torch.ones(3)}, "belongs to no LoRA"),
        ({**state, **twice}, "twice"),
    ):
        with pytest.raises(UserError, match=why):
            load_lora(foreign.save(damaged, tmp_path / "x.safetensors"), model.layers())
