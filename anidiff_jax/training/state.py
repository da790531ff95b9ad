"""What trains, and how it is updated: the optimizer, its learning rate, and the state that a checkpoint keeps."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from anidiff_jax.config import TrainConfig


@struct.dataclass
class TrainState:
    """Counts updates; `params` holds what trains and nothing else (motion modules, the whole UNet, or adapters).

    ema: a moving average of params, or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any = None

    @classmethod
    def create(cls, params, optimizer: optax.GradientTransformation, ema: bool = False) -> "TrainState":
        return cls(jnp.int32(0), params, optimizer.init(params), jax.tree.map(jnp.copy, params) if ema else None)

    def advance(self, params, opt_state, ema_decay: float = 0.0) -> "TrainState":
        """The next state. The average follows the first updates closely: it forgets no slower than (1 + step) / (10 + step)."""
        ema = self.ema
        if ema is not None:
            decay = jnp.minimum(ema_decay, (1.0 + self.step) / (10.0 + self.step))
            ema = jax.tree.map(lambda mean, new: decay * mean + (1 - decay) * new, ema, params)
        return TrainState(self.step + 1, params, opt_state, ema)

    @property
    def best(self) -> Any:
        """What samples and exports use: the average where there is one."""
        return self.params if self.ema is None else self.ema


def learning_rate(config: TrainConfig, updates: int) -> optax.Schedule:
    """The learning rate at each update, as transformers' schedules of the same names give it."""
    peak = config.learning_rate or 1e-4
    kind = config.lr_scheduler_type
    warmup = 0 if kind == "constant" else min(math.ceil(config.warmup_ratio * updates), updates - 1)  # never all of them at 0

    def rate(update):
        rising = update / max(warmup, 1)
        progress = jnp.clip((update - warmup) / max(updates - warmup, 1), 0, 1)  # of the part after the warm-up
        factor = {
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            "cosine_with_restarts": 0.5 * (1 + jnp.cos(jnp.pi * progress)),  # one cycle, as is usual
            "polynomial": (1 - progress) * (1 - 1e-7 / peak) + 1e-7 / peak,  # power 1, down to 1e-7
            "constant": 1.0,
            "constant_with_warmup": 1.0,
        }[kind]
        return peak * jnp.where(update < warmup, rising, jnp.asarray(factor))

    return rate


def make_optimizer(config: TrainConfig, updates: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter, 2017), after clipping by global norm."""
    adamw = optax.adamw(learning_rate(config, updates), b1=0.9, b2=0.999, eps=1e-8, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)
