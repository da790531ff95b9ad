"""Prompts → text states, against diffusers, and where it has none, against the same written in PyTorch."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline as Theirs
from diffusers import MotionAdapter, UNetMotionModel
from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin

from anidiff_jax.errors import UserError
from anidiff_jax.options import Options
from anidiff_jax.prompts import as_text, between, joined_lines, mixed, travel_of, weighted
from anidiff_jax.text import emphasised, text_states
from tests import reference

PROMPT, NEGATIVE = "a red circle moving right on a white background", "a blue star"


@pytest.fixture(scope="module")
def theirs(base, adapter):
    return Theirs.from_pretrained(base, motion_adapter=MotionAdapter.from_pretrained(adapter))


@pytest.fixture(scope="module")
def states(pipe):
    """states(prompt, negative, frames, option=…) → text states of one video"""

    def states(prompt, negative=None, frames=6, **options):
        encoder, params = pipe.model.networks.text_encoder, pipe.model.params["text_encoder"]
        negatives = None if negative is None else [negative]
        (made,) = text_states(encoder, params, {}, pipe.model.tokenizer, [prompt], negatives, frames, Options(**options))
        return made

    return states


def encode(theirs, ids, skip=0):
    """Token ids between the marks → (77, d), by transformers."""
    tokenizer = theirs.tokenizer
    row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    row += [tokenizer.pad_token_id] * (77 - len(row))
    with torch.no_grad():
        return theirs.text_encoder(torch.tensor([row]))[0][0]


def ids_of(theirs, text):
    return theirs.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_plain_prompts_equal_diffusers(theirs, states):
    with torch.no_grad():
        prompt, negative = theirs.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    reference.close(states(PROMPT, NEGATIVE), torch.cat([negative, prompt]), 1e-5)
    reference.close(states(PROMPT), prompt, 1e-5)


def test_layers_are_skipped_for_the_prompt(theirs, states):
    """As diffusers means it; its own does not find the last norm in transformers 5."""
    encoder = theirs.text_encoder
    ids = theirs.tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = encoder.final_layer_norm(encoder(ids, output_hidden_states=True).hidden_states[-2])
    ours = states(PROMPT, NEGATIVE, clip_skip=1)
    reference.close(ours[1:], expected, 1e-5)
    np.testing.assert_array_equal(ours[0], states(PROMPT, NEGATIVE)[0])


def test_long_prompts_go_through_in_chunks(theirs, states):
    text = "a red circle, a blue star, " * 20
    ids = ids_of(theirs, text)
    assert 150 < len(ids) <= 225
    expected = torch.cat([encode(theirs, ids[i : i + 75]) for i in (0, 75, 150)])
    negative = torch.cat([encode(theirs, ids_of(theirs, NEGATIVE)), encode(theirs, []), encode(theirs, [])])
    reference.close(states(text, NEGATIVE), torch.stack([negative, expected]), 1e-5)
    assert states(PROMPT, text).shape == (2, 231, 24)  # the prompt with empty chunks


def test_a_word_that_weighs_more(theirs, states):
    """States times weights, then times what brings their mean back."""
    parts = [("a ", 1.0), ("red", 1.5), (" circle ", 1.0), ("moving", 1.1 * 1.1), (" right", 1 / 1.1)]
    ids = [ids_of(theirs, text) for text, _ in parts]
    plain = encode(theirs, list(itertools.chain(*ids)))
    weights = torch.ones(77)
    weights[1 : 1 + sum(map(len, ids))] = torch.tensor([weight for own, (_, weight) in zip(ids, parts, strict=True) for _ in own])
    moved = plain * weights[:, None]
    expected = moved * (plain.mean() / moved.mean())
    reference.close(states("a (red:1.5) circle ((moving))[ right]")[0], expected, 1e-5)
    assert (states("a (red:1.5) circle")[0] - states("a red circle")[0]).std() > 0.01
    np.testing.assert_array_equal(states("a (red:1) circle"), states("a red circle"))


def test_weights_act_in_their_chunk_and_never_tear(states):
    """Whatever is beside it, a chunk is as it is alone; and a mean that weights turn round is not brought back."""
    many = ", ".join(["a red circle"] * 30)
    np.testing.assert_allclose(states("a (red:1.5) circle", many)[1, :77], states("a (red:1.5) circle")[0], rtol=1e-6)
    ones = np.ones((2, 4), np.float32)
    for weights in ([1, -1], [1, -3], [1, -0.9]):  # means of 0, of the other sign, and next to 0
        np.testing.assert_array_equal(emphasised(ones, np.float32(weights)), ones * np.float32(weights)[:, None])
    np.testing.assert_allclose(emphasised(ones, np.float32([1, 2])), np.float32([[2 / 3] * 4, [4 / 3] * 4]), rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a (red:1.3) cat", [("a ", 1), ("red", 1.3), (" cat", 1)]),
        ("((x)) y", [("x", 1.21), (" y", 1)]),
        ("(a (b:2) c)", [("a ", 1.1), ("b", 2.2), (" c", 1.1)]),
        ("[z]", [("z", 1 / 1.1)]),
        (r"\(q\) a: b", [("(q) a: b", 1)]),
        ("(unclosed", [("(unclosed", 1)]),
        ("a ) ] b", [("a ) ] b", 1)]),
        ("([a)]", [("(", 1), ("a)", 1 / 1.1)]),
        ("(w: 0)", [("w", 0)]),
        ("(w:-0.5)", [("w", -0.5)]),
        ("(a: b)", [("a: b", 1.1)]),
        ("", [("", 1)]),
    ],
)
def test_how_weights_are_written(text, parts):
    found = weighted(text)
    assert [part for part, _ in found] == [part for part, _ in parts]
    np.testing.assert_allclose([weight for _, weight in found], [weight for _, weight in parts])


def test_how_prompts_travel():
    travel = {0: 'a "calm" sea: blue', 8: "a storm"}
    for written in ('{0: "a \\"calm\\" sea: blue", 8: "a storm"}', '0: a "calm" sea: blue\n8: a storm', travel, as_text(travel)):
        assert travel_of(written) == travel
    assert travel_of({8: "b", 0: "a"}) == {0: "a", 8: "b"}
    for plain in ("16:9 picture", "{red|blue} cat", "3: the film", "a: b", "", "{a} cat {b}", "{a: b}"):
        assert travel_of(plain) == {0: plain}
        assert as_text(travel_of(plain)) == plain
    assert travel_of(' {0: "a", 4: "b"} ') == travel_of("0:a\n\n4:b\n") == {0: "a", 4: "b"}
    lines = ["one", "0: a", "8:b", "0: c", "4: d", "two", "16: nine"]
    assert joined_lines(lines) == ["one", '{0: "a", 8: "b"}', '{0: "c", 4: "d"}', "two", "16: nine"]
    with pytest.raises(UserError, match="prompt line '8: c' follows one for frame 16"):
        joined_lines(["0: a", "16: b", "8: c"])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({4: "a"}, "must begin at frame 0"),
        ('{1: "a", 16: "b"}', "must begin at frame 0"),
        ({0: 3}, "does not say a text for each frame"),
        ("{0: a, b: c}", "does not say a text for each frame"),
        ("{0: 'a", "cannot be read"),
        ("0: a\n2: b\n2: c", "the frames of a prompt that travels must rise; they are 0, 2, 2"),
        ({0: "a", 6: "b"}, "a text for frame 6, and the video's 6 frames are 0 to 5"),
    ],
)
def test_mistakes_in_prompts_are_told(states, prompt, message):
    with pytest.raises(UserError) as error:
        states(prompt)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_travel_equals_diffusers(theirs, states):
    """diffusers goes straight from text to text, with free noise on; its last text stays, as ours does."""
    prompt = {0: PROMPT, 2: "a yellow square", 5: "a green triangle moving left"}
    free = type("Free", (AnimateDiffFreeNoiseMixin,), {})()
    free.encode_prompt = theirs.encode_prompt
    free._lerp = AnimateDiffFreeNoiseMixin._lerp.__get__(free)
    free._free_noise_prompt_interpolation_callback = free._lerp
    with torch.no_grad():
        expected, _ = free._encode_prompt_free_noise(prompt, 8, "cpu", 1, True, NEGATIVE)
    ours = states(prompt, NEGATIVE, frames=8)
    reference.close(ours, expected.unflatten(0, (2, 8)), 1e-5)
    assert (ours[1, 0] != ours[1, 1]).any()


def test_along_the_arc():
    a, b = (np.random.default_rng(i).standard_normal((3, 5)) for i in (0, 1))
    a[0] = 2 * b[0]  # the same way: straight
    angle = np.arccos(((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).clip(-1, 1))[1:, None]
    expected = (np.sin(0.7 * angle) * a[1:] + np.sin(0.3 * angle) * b[1:]) / np.sin(angle)
    ours = mixed(a, b, 0.3, "spherical")
    np.testing.assert_allclose(ours[1:], expected, rtol=1e-5)
    np.testing.assert_allclose(ours[0], 1.7 * b[0], rtol=1e-5)
    assert not np.allclose(ours, mixed(a, b, 0.3, "linear"), rtol=0.01)


def test_a_loop_travels_back():
    assert between([0, 4], 8, True) == [(0, 1, i / 4) for i in range(4)] + [(1, 0, i / 4) for i in range(4)]
    assert between([0, 4], 6, False)[4:] == [(1, 1, 0.0)] * 2


def test_head_and_tail_stand_around_each_text(states):
    around = {"prompt_head": "very good", "prompt_tail": "sharp"}
    written = {0: "very good, a red circle, sharp", 3: "very good, a star, sharp"}
    np.testing.assert_array_equal(states({0: "a red circle", 3: "a star"}, **around), states(written))
    np.testing.assert_array_equal(states("a star", prompt_tail="sharp"), states("a star, sharp"))


def test_the_network_takes_a_text_for_each_frame(base, adapter, pipe):
    """diffusers is given the text of every frame anyway."""
    unet = UNetMotionModel.from_unet2d(reference.unet(), reference.adapter()).eval()
    rng = np.random.default_rng(0)
    sample, text = rng.standard_normal((2, 3, 7, 5, 4), np.float32), rng.standard_normal((2, 3, 9, 24), np.float32)
    with torch.no_grad():
        channels_first = torch.tensor(sample).permute(0, 4, 1, 2, 3)  # b f h w c -> b c f h w
        expected = unet(channels_first, torch.tensor([500, 20]), torch.tensor(text).flatten(0, 1)).sample.permute(0, 2, 3, 4, 1)
    ours = pipe.model.networks.unet.apply({"params": pipe.model.params["unet"]}, sample, np.array([500, 20]), text)
    reference.close(ours, expected, 1e-4)


def test_a_video_that_travels(pipe):
    """Its first frame's text is the first one, and with one text alone it is as without travel."""
    sizes = {"num_frames": 4, "height": 32, "width": 32, "num_inference_steps": 2}
    plain = pipe(PROMPT, **sizes)
    np.testing.assert_array_equal(pipe({0: PROMPT}, **sizes), plain)
    np.testing.assert_allclose(pipe({0: PROMPT, 3: PROMPT}, **sizes), plain, atol=1e-4)
    moved = np.abs(pipe({0: PROMPT, 3: NEGATIVE}, **sizes) - plain).mean((0, 2, 3, 4))
    assert moved[3] > moved[0]
