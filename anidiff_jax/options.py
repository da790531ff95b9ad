"""How a video is asked for: keywords of the pipeline's call that are arguments of sample.py too, described and checked in one place."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from anidiff_jax.errors import UserError


def arg(default, help: str, **metadata):
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class Options:
    """What a video may be asked for with, besides its prompt, size, steps and seed. Raises UserError for values that mean nothing.

    From Python, init_video, init_image and mask_video may be arrays as well: (frames, height, width, 3) and (height, width, 3), and
    (frames, height, width) or (height, width), uint8 or in [0, 1]; freeu may be a sequence of numbers.
    """

    clip_skip: int = arg(0, "last layers of the text encoder that the prompt leaves out; 1 is what others call clip skip 2")
    prompt_head: str = arg("", "stands before every prompt, and before each text of one that travels")
    prompt_tail: str = arg("", "stands after them")
    prompt_interpolation: Literal["linear", "spherical"] = arg("linear", "from one text of a prompt that travels to the next")
    init_video: str | None = arg(None, "video that is painted anew: a file, or a folder of pictures; its middle is cut to the size")
    init_image: str | None = arg(None, "a picture instead, which every frame starts from")
    mask_video: str | None = arg(None, "video or picture; only where it is white, init_video or init_image is painted anew")
    init_stride: int = arg(1, "distance of the frames that are taken of init_video and mask_video")
    strength: float = arg(
        0.8,
        "share of the steps that init_video or init_image is painted over with, above 0: little = almost as it is, 1 = hardly a hint left",
    )
    guidance_rescale: float = arg(0.0, "share by which guidance is brought back to the deviation of a video without it; 0.7, say")
    guidance_start: float = arg(0.0, "share of the steps before which there is no guidance, at half the cost")
    guidance_end: float = arg(1.0, "share of the steps after which there is none")
    freeu: str | None = arg(None, "FreeU's factors s1,s2,b1,b2, as 0.9,0.2,1.2,1.4: less of the skips' lowest waves, more from below")
    pag_scale: float = arg(0.0, "perturbed-attention guidance, for clearer shapes; 3, say; costs half more")
    pag_adaptive_scale: float = arg(0.0, "with pag_scale: so much less of it for every timestep that is gone")
    pag_layers: str = arg("mid_block.*attn1", "with pag_scale: regular expression, found in the names of self-attentions to perturb")
    context_frames: int | None = arg(
        None, "longer videos are made in windows of so many frames; none = those longer than the motion modules know, 16 (embedded: 8)"
    )
    context_overlap: int | None = arg(None, "frames that a window shares with the next; none = a quarter of it, in a closed loop half")
    context_schedule: Literal["uniform", "static"] = arg("uniform", "windows move from step to step, so that no seam stays; or stay")
    context_batch: int = arg(1, "windows that are computed at once: more is faster on a GPU, and takes more memory")
    closed_loop: bool = arg(False, "windows go on from the last frame to the first, so that the video is a loop without a seam")
    free_noise: Literal["shuffle", "repeat", "mirror", "none"] = arg(
        "shuffle",
        "noise of the frames after the first window: the first's in another order, again, back and forth, or their own",
    )
    free_init_iterations: int = arg(0, "FreeInit: sample so many times, each from the low frequencies of the last video; 3, say; 0 = once")
    free_init_filter: Literal["butterworth", "gaussian", "ideal", "box"] = arg("butterworth", "what FreeInit keeps of the last video")
    free_init_order: int = arg(4, "of the butterworth filter: higher is nearer to ideal")
    free_init_spatial_stop: float = arg(0.25, "where the filter ends in space, as a share of the highest frequency")
    free_init_temporal_stop: float = arg(0.25, "the same in time")
    free_init_fast: bool = arg(False, "fewer steps in FreeInit's first iterations")

    def __post_init__(self):
        for name in ("init_video", "init_image", "mask_video"):
            if isinstance(getattr(self, name), str) and not getattr(self, name):  # --init_video "" takes away what a file says
                object.__setattr__(self, name, None)
        for name in ("clip_skip", "init_stride"):
            if getattr(self, name) < (least := int(name == "init_stride")):
                raise UserError(f"{name} {getattr(self, name)} must be at least {least}")
        if self.prompt_interpolation not in ("linear", "spherical"):
            raise UserError(f"prompt_interpolation={self.prompt_interpolation!r} is not one of linear, spherical")
        if self.init_video is not None and self.init_image is not None:
            raise UserError("init_video and init_image both say what to start from: give one")
        if self.mask_video is not None and not self.has_init:
            raise UserError("mask_video says where to paint anew: give --init_video or --init_image, what is to be painted over, as well")
        if not 0 < self.strength <= 1:
            raise UserError(f"strength {self.strength} must be above 0 and at most 1")
        if self.has_init and self.free_init_iterations > 1:
            raise UserError("free_init_iterations makes its own start: leave it out with init_video and init_image")
        for name in ("guidance", "context", "free_init"):
            getattr(self, name)  # checks what it holds

    @property
    def has_init(self) -> bool:
        return self.init_video is not None or self.init_image is not None

    @property
    def guidance(self):
        from anidiff_jax.diffusion.guidance import Guidance

        rescale, start, end = self.guidance_rescale, self.guidance_start, self.guidance_end
        return Guidance(rescale, start, end, self.pag_scale, self.pag_adaptive_scale, self.pag_layers, self.free_factors)

    @property
    def free_factors(self) -> tuple[float, ...] | None:
        """The numbers in `freeu`."""
        given: str | Sequence[float] | None = self.freeu
        if given is None:
            return None
        try:
            return tuple(float(word) for word in (given.split(",") if isinstance(given, str) else given))
        except ValueError:
            raise UserError(f"freeu {given} is not numbers with commas between them") from None

    @property
    def context(self):
        from anidiff_jax.diffusion.windows import FREE_NOISE, Context

        if self.free_noise not in FREE_NOISE:
            raise UserError(f"free_noise={self.free_noise!r} is not one of {', '.join(FREE_NOISE)}")
        return Context(self.context_frames, self.context_overlap, self.context_schedule, self.context_batch, self.closed_loop)

    @property
    def free_init(self):
        from anidiff_jax.diffusion.free_init import FreeInit

        return FreeInit(**{f.name: getattr(self, f"free_init_{f.name}") for f in fields(FreeInit)})

    def options(self) -> dict[str, Any]:
        """Keywords of the pipeline's call."""
        return {f.name: getattr(self, f.name) for f in fields(Options)}
