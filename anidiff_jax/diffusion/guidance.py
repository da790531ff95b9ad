"""How strongly a video is led by its prompt, and when."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from anidiff_jax.errors import UserError

PAG_LAYERS = "mid_block.*attn1"


@dataclass(frozen=True)
class Guidance:
    """rescale: share of the rescaling. start, end: shares of the steps between which there is guidance at all.

    pag_scale, pag_adaptive_scale, pag_layers: perturbed-attention guidance. freeu: s1, s2, b1, b2, or None.
    Raises UserError for values that mean nothing.
    """

    rescale: float = 0.0
    start: float = 0.0
    end: float = 1.0
    pag_scale: float = 0.0
    pag_adaptive_scale: float = 0.0
    pag_layers: str = PAG_LAYERS
    freeu: Sequence[float] | None = None

    def __post_init__(self):
        if not 0 <= self.rescale <= 1:
            raise UserError(f"guidance_rescale {self.rescale} must be between 0, none, and 1")
        if not 0 <= self.start <= self.end <= 1:
            raise UserError(f"guidance_start {self.start} and guidance_end {self.end} must satisfy 0 <= start <= end <= 1")
        for name in ("pag_scale", "pag_adaptive_scale"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} {getattr(self, name)} must be at least 0")
        if self.freeu is not None and not (len(self.freeu) == 4 and all(value > 0 for value in self.freeu)):
            raise UserError(f"freeu {','.join(map(str, self.freeu))} is not four numbers above 0: give s1,s2,b1,b2, as 0.9,0.2,1.2,1.4")

        try:
            re.compile(self.pag_layers)
        except re.error as error:
            raise UserError(f"pag_layers={self.pag_layers!r} is not a regular expression: {error}") from None

    def perturbed(self, layers: Iterable[str]) -> str:
        """The attentions that are perturbed, "" for none. layers: names of the UNet's. UserError where none of them is meant."""
        if not self.pag_scale:
            return ""
        own = [name.removesuffix(".to_v") for name in layers if re.search(r"(attn1|motion_modules.*attn2)\.to_v$", name)]
        if not any(re.search(self.pag_layers, name) for name in own):
            raise UserError(f"pag_layers={self.pag_layers!r} matches no self-attention: they are called {own[0]}, for example")
        return self.pag_layers

    @property
    def always(self) -> bool:
        return (self.start, self.end) == (0, 1)

    def rows(self, count: int) -> np.ndarray:
        """(count,) bool: which of the network's evaluations are guided. One is where its share of the way has been gone."""
        gone = np.arange(count) / count
        return (gone >= self.start) & (gone < self.end)


def rescaled(guided, prompt, share):
    """The guided prediction (1, …), by this share brought to the deviation of the prompt's (Lin et al., 2023, arXiv:2305.08891, eq. 15)."""
    return guided * (share * prompt.std() / guided.std() + 1 - share)


def perturbed_scale(scale, adaptive, timestep):
    """The scale of perturbed-attention guidance, less by `adaptive` for each timestep from 1000 on, down to none."""
    return jnp.maximum(scale - adaptive * (1000 - timestep), 0)
