"""Painting over videos and pictures, against diffusers, and against a loop written with its scheduler where it has none."""

import diffusers
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from diffusers import MotionAdapter
from diffusers.pipelines.animatediff import pipeline_animatediff_video2video as module
from PIL import Image

from anidiff_jax.denoising import Kept, Program, denoise, numbers_of
from anidiff_jax.diffusion import solvers
from anidiff_jax.diffusion.guidance import Guidance
from anidiff_jax.diffusion.schedule import NoiseSchedule
from anidiff_jax.errors import UserError
from anidiff_jax.inits import mask_of, picture_of, video_of
from anidiff_jax.video import save_frames, save_gif, save_mp4
from tests import reference
from tests.test_denoising import TEXT, Toy, toy

PROMPT, NEGATIVE = "a red circle moving right on a white background", "a blue star"
SIZES = {"num_inference_steps": 5, "guidance_scale": 7.5}


@pytest.fixture(scope="module")
def frames():
    """Smooth colours that move, uint8 (6, 32, 40, 3)."""
    f, y, x = np.meshgrid(np.arange(6), np.arange(32), np.arange(40), indexing="ij")
    waves = [np.sin(x / 9 + f / 2), np.cos(y / 7 - f / 3), np.sin((x + y) / 11)]
    return np.uint8(np.stack(waves, -1) * 100 + 128)


@pytest.mark.parametrize(("scheduler", "strength"), [("ddim", 0.6), ("dpmpp_2m", 1.0)])
def test_a_video_is_painted_over_as_in_diffusers(base, adapter, pipe, frames, monkeypatch, scheduler, strength):
    """diffusers draws from the VAE's posterior; here it takes its middle, as we do."""
    noise = np.random.default_rng(0).standard_normal((1, 4, 6, 8, 10), np.float32)
    theirs = diffusers.AnimateDiffVideoToVideoPipeline.from_pretrained(base, motion_adapter=MotionAdapter.from_pretrained(adapter))
    theirs.scheduler = reference.scheduler(scheduler)
    theirs.set_progress_bar_config(disable=True)
    monkeypatch.setattr(module, "retrieve_latents", lambda output, *_, **__: output.latent_dist.mode())
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.tensor(noise).transpose(1, 2))  # b c f h w -> b f c h w
    images = [Image.fromarray(frame) for frame in frames]
    expected = theirs(images, PROMPT, 32, 40, negative_prompt=NEGATIVE, strength=strength, output_type="np", **SIZES).frames
    how = {"num_frames": 6, "height": 32, "width": 40, "latents": noise, "scheduler": scheduler, "strength": strength}
    ours = pipe(PROMPT, NEGATIVE, init_video=frames, **how, **SIZES)
    assert expected.std() > 0.02
    assert np.abs(ours - expected).max() <= 2e-3


def test_a_picture_is_a_video_that_stands_still(pipe, frames, tmp_path):
    Image.fromarray(frames[2]).save(tmp_path / "a.png")
    sizes = {"num_frames": 3, "height": 32, "width": 40, "num_inference_steps": 4, "strength": 0.5}
    ours = pipe(PROMPT, init_image=tmp_path / "a.png", **sizes)
    np.testing.assert_array_equal(ours, pipe(PROMPT, init_video=frames[[2, 2, 2]], **sizes))
    assert np.abs(ours - pipe(PROMPT, init_image=frames[5], **sizes)).max() > 0.01


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmpp_2m", "heun"])
def test_where_the_mask_is_black_the_video_stays(scheduler):
    """As diffusers paints pictures anew: after each step, what stays is what it was, as noisy as the next step expects."""
    rng = np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, 6, 2, 3, 2)).astype(np.float32)
    mask = (rng.random((6, 2, 3, 1)) < 0.5).astype(np.float32)
    begin, steps = 2, 6
    table = solvers.table(NoiseSchedule(), scheduler, steps, begin=begin)
    kept = Kept(clean[None], noise[None], mask[None])
    guided = np.ones(len(table.rows.timestep), bool)
    start = table.asked.noised(clean, noise)[None]
    ours = denoise(Program(Toy()), {}, {}, start, TEXT[None], table, numbers_of(3.0, Guidance()), guided, kept=kept)[0]

    theirs = reference.scheduler(scheduler)
    theirs.set_timesteps(steps)
    timesteps = theirs.timesteps[begin * theirs.order :]
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(begin * theirs.order)
    batched = lambda x: torch.tensor(x)[None]
    x = theirs.add_noise(batched(clean), batched(noise), timesteps[:1])
    for i, timestep in enumerate(timesteps):
        seen = theirs.scale_model_input(x, timestep)[0].numpy()
        empty, prompt = (toy(seen, float(timestep), text) for text in TEXT)
        x = theirs.step(batched(np.float32(empty + 3 * (prompt - empty))), timestep, x).prev_sample
        there = batched(clean)
        if i < len(timesteps) - 1 and scheduler in ("euler", "heun"):
            there = there + theirs.sigmas[begin * theirs.order + i + 1] * batched(noise)
        elif i < len(timesteps) - 1:
            there = theirs.add_noise(there, batched(noise), timesteps[i + 1 : i + 2])
        x = batched(mask) * x + (1 - batched(mask)) * there
    reference.close(ours, x[0], 1e-4)
    np.testing.assert_allclose(np.asarray(ours) * (1 - mask), clean * (1 - mask), atol=1e-6)


def test_a_part_of_a_video_is_painted_anew(pipe, frames):
    mask = np.zeros((32, 40), np.uint8)
    mask[:, 20:] = 255
    sizes = {"num_frames": 6, "height": 32, "width": 40, "num_inference_steps": 4, "strength": 1.0}
    painted = pipe(PROMPT, init_video=frames, mask_video=mask, **sizes)
    whole = pipe(PROMPT, init_video=frames, mask_video=np.zeros((6, 32, 40)), **sizes)
    np.testing.assert_allclose(painted[0, :, :, :20], frames[:, :, :20] / 255, atol=1e-6)
    np.testing.assert_allclose(whole[0], frames / 255, atol=1e-6)
    assert np.abs(painted - whole)[:, :, :, 20:].mean() > 0.02
    all_anew = pipe(PROMPT, init_video=frames, mask_video=np.ones((6, 32, 40)), **sizes)
    np.testing.assert_allclose(all_anew, pipe(PROMPT, init_video=frames, **sizes), atol=1e-5)


def test_what_is_read(frames, tmp_path):
    """Every second frame, of every kind of file; larger ones are cut in the middle and made smaller."""
    save_mp4(frames, tmp_path / "a.mp4", crf=1)
    save_gif(frames, tmp_path / "a.gif")
    save_frames(frames, tmp_path / "pictures")
    iio.imwrite(tmp_path / "a.webp", frames, lossless=True)
    for name, error in (("a.mp4", 12), ("a.gif", 30), ("pictures", 0), ("a.webp", 0)):
        read = video_of("init_video", tmp_path / name, 3, 32, 40, 2)
        assert np.abs(read.astype(int) - frames[::2]).mean() <= error, name
    large = frames.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_allclose(video_of("init_video", large / 255, 6, 32, 32)[..., :], frames[:, :, 4:36], atol=25)
    Image.fromarray(frames[1]).save(tmp_path / "one.png")
    np.testing.assert_array_equal(picture_of("init_image", tmp_path / "one.png", 2, 32, 40), frames[[1, 1]])


def test_pictures_as_cameras_and_painters_make_them(tmp_path):
    """Turned, transparent, of 16 bits."""
    colours = np.random.default_rng(0).integers(0, 255, (4, 8, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # of Exif: a quarter turn
    Image.fromarray(colours).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(picture_of("init_image", tmp_path / "turned.png", 1, 8, 4)[0], np.rot90(colours, -1))
    clear = np.full((4, 8, 4), 255, np.uint8)
    clear[:, 4:, 3] = 0  # white, but transparent
    Image.fromarray(clear).save(tmp_path / "clear.png")
    np.testing.assert_array_equal(mask_of(tmp_path / "clear.png", 1, 4, 8, 1, 4)[0, 0, :, 0], [1, 0])
    Image.fromarray(np.full((4, 8), 40000, np.uint16)).save(tmp_path / "deep.png")
    assert picture_of("init_image", tmp_path / "deep.png", 1, 4, 8).mean() == pytest.approx(40000 / 257, abs=1)


def test_the_mask_of_latents(tmp_path):
    """Of four by four pixels, at least half must be white."""
    mask = np.zeros((8, 12), np.uint8)
    mask[:2, :4] = 255  # half of the first place
    mask[4:, 8:11] = 255
    mask[0, 4:] = 255
    expected = np.array([[1, 0, 0], [0, 0, 1]], np.float32)[..., None]
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask).save(tmp_path / "moving.gif", save_all=True, append_images=[Image.fromarray(255 - mask)])
    for given in (mask, mask / 255, mask // 255, np.stack([mask] * 2), tmp_path / "mask.png"):
        np.testing.assert_array_equal(mask_of(given, 2, 8, 12, 1, 4), [expected] * 2)
    moving = mask_of(tmp_path / "moving.gif", 2, 8, 12, 1, 4)
    np.testing.assert_array_equal(moving[0], expected)
    assert moving[1, 0, 1] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_video": "none.mp4"}, "init_video none.mp4 does not exist"),
        ({"init_image": "none.png"}, "init_image none.png does not exist"),
        ({"init_video": "text.mp4"}, "cannot be used: it cannot be decoded"),
        ({"init_image": "text.png"}, "cannot be read"),
        ({"init_video": np.zeros((3, 8, 8, 3))}, "init_video has 3 frames, and 6 frames need 6: ask for fewer frames"),
        ({"init_video": np.zeros((6, 8, 8, 3)), "init_stride": 2}, "6 frames, 2 apart, need 11"),
        ({"init_video": np.zeros((6, 8, 8))}, "init_video has shape (6, 8, 8): give (frames, height, width, 3)"),
        ({"init_image": np.zeros((8, 8, 4))}, "init_image has shape (8, 8, 4): give (height, width, 3)"),
        ({"init_image": "a.png", "init_video": "a.mp4"}, "both say what to start from"),
        ({"mask_video": np.zeros((8, 8))}, "mask_video says where to paint anew: give --init_video or --init_image"),
        ({"init_image": np.zeros((8, 8, 3)), "mask_video": np.zeros(8)}, "mask_video has shape (8,)"),
        ({"init_image": np.zeros((8, 8, 3)), "mask_video": np.zeros((8, 8, 3))}, "mask_video has shape (8, 8, 3)"),
        ({"init_image": np.zeros((8, 8, 3)), "strength": 0.0}, "strength 0.0 must be above 0"),
        ({"init_image": np.zeros((8, 8, 3)), "strength": 0.1}, "strength 0.1 of 5 steps is less than one step"),
        ({"init_image": np.zeros((8, 8, 3)), "free_init_iterations": 2}, "free_init_iterations makes its own start"),
    ],
)
def test_mistakes_are_told(pipe, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("text.mp4", "text.png"):
        (tmp_path / name).write_text("no picture")
    with pytest.raises(UserError) as error:
        pipe(PROMPT, num_frames=6, height=32, width=40, num_inference_steps=5, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
