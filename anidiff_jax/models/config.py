"""diffusers and transformers `config.json` files → frozen settings with one resolved entry a block.

A key that changes the computation in a way that is not built here is an error that names it; nothing is silently ignored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from typing import Any, TypeVar

from anidiff_jax.errors import UserError

T = TypeVar("T")


def understood(parse: Callable[..., T]) -> Callable[..., T]:
    """A reader of a config.json, which is somebody's file: a value of the wrong type, or a count beyond all models, is a UserError."""

    @wraps(parse)
    def parsed(raw: Mapping[str, Any], *args, **named) -> T:
        where = named.get("where") or next((a for a in reversed(args) if isinstance(a, str)), "config.json")
        for key, value in raw.items():
            if "layers" in key and any(isinstance(n, int | float) and n > 1000 for n in _numbers(value)):
                raise UserError(f"{where}: {key}={str(value)[:80]} is more than any model has")
        try:
            config = parse(raw, *args, **named)
        except UserError:
            raise
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise UserError(f"{where} says what makes no model ({type(error).__name__}: {error})") from None
        if wrong := _mistyped(config):
            raise UserError(f"{where} says what makes no model: {wrong}")
        return config

    return parsed


def _numbers(value) -> list:
    return [n for part in value for n in _numbers(part)] if isinstance(value, (list, tuple)) else [value]


def _mistyped(config) -> str:
    """The first setting that is not of its type, "" where there is none."""
    for field in fields(config):
        value = getattr(config, field.name)
        wanted: Any = {int: int, float: (int, float), bool: bool, str: str}.get(field.type if isinstance(field.type, type) else int, object)
        for part in _numbers(value):
            if is_dataclass(part):
                if wrong := _mistyped(part):
                    return wrong
            elif not isinstance(part, wanted) or (isinstance(part, bool) and field.type is not bool):
                return f"{field.name}={str(value)[:80]}"
    return ""


@dataclass(frozen=True)
class BlockConfig:
    """One resolution of the UNet."""

    channels: int
    transformer_depths: tuple[int, ...]  # blocks in the spatial transformer after each resnet; 0 = no transformer
    heads: int  # spatial attention
    motion_depths: tuple[int, ...]  # the same for the motion modules
    motion_heads: int
    resample: bool  # ends in a down- or upsampler


@dataclass(frozen=True)
class UNetConfig:
    in_channels: int
    out_channels: int
    cross_attention_dim: int
    norm_groups: int
    norm_eps: float
    linear_projection: bool
    mid_scale: float
    max_frames: int  # length of the motion modules' position table
    down: tuple[BlockConfig, ...]
    mid: BlockConfig  # one resnet more than depths
    up: tuple[BlockConfig, ...]

    @property
    def has_motion(self) -> bool:
        return any(any(block.motion_depths) for block in (*self.down, self.mid, *self.up))


@dataclass(frozen=True)
class MotionConfig:
    """What a motion adapter adds: transformer depths of every motion module, block by block in the UNet's own order."""

    channels: tuple[int, ...]  # of the down blocks
    down: tuple[tuple[int, ...], ...]
    mid: tuple[int, ...]  # empty: no motion module in the mid block (v1 and v3)
    up: tuple[tuple[int, ...], ...]
    heads: tuple[int, ...]  # per down block
    max_frames: int
    groups: int

    def to_json(self) -> dict[str, Any]:
        """The config.json that diffusers' MotionAdapter reads."""
        depths = [block[0] for block in self.down]
        if any(depth != block[0] for block in self.down for depth in block) or [b[0] for b in self.up] != depths[::-1]:
            raise UserError("a MotionAdapter cannot say that the modules of one block differ in depth: export the whole UNet instead")
        layers, heads = [len(block) for block in self.down], list(self.heads)
        return {
            "_class_name": "MotionAdapter",
            "block_out_channels": list(self.channels),
            "conv_in_channels": None,
            "motion_layers_per_block": _short(layers),
            "motion_max_seq_length": self.max_frames,
            "motion_mid_block_layers_per_block": max(len(self.mid), 1),
            "motion_norm_num_groups": self.groups,
            "motion_num_attention_heads": _short(heads),
            "motion_transformer_layers_per_block": _short(depths),
            "motion_transformer_layers_per_mid_block": _short(list(self.mid) or [1]),
            "use_motion_mid_block": bool(self.mid),
        }


# Keys that may only say what we compute; a missing key says so. `None` in a config means the same as missing.
_UNET_FIXED = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "downsample_padding": (1,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlockCrossAttnMotion"),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
# Read below, or without effect on what is computed here (softmax is in float32 always, so upcast_attention is as well).
_UNET_READ = {
    "addition_embed_type_num_heads", "addition_time_embed_dim", "attention_head_dim", "block_out_channels", "cross_attention_dim",
    "down_block_types", "in_channels", "layers_per_block", "mid_block_layers", "mid_block_scale_factor",
    "motion_max_seq_length", "motion_num_attention_heads", "norm_eps", "norm_num_groups", "num_attention_heads", "out_channels",
    "projection_class_embeddings_input_dim", "reverse_motion_num_attention_heads", "reverse_temporal_transformer_layers_per_block",
    "reverse_transformer_layers_per_block", "sample_size", "temporal_transformer_layers_per_block",
    "temporal_transformer_layers_per_mid_block", "transformer_layers_per_block", "transformer_layers_per_mid_block", "up_block_types",
    "upcast_attention", "use_linear_projection", "use_motion_mid_block",
}  # fmt: skip
_BLOCKS = {
    "CrossAttnDownBlock2D": True, "CrossAttnDownBlockMotion": True, "DownBlock2D": False, "DownBlockMotion": False,
    "CrossAttnUpBlock2D": True, "CrossAttnUpBlockMotion": True, "UpBlock2D": False, "UpBlockMotion": False,
}  # fmt: skip
_MOTION_READ = {
    "block_out_channels", "conv_in_channels", "motion_layers_per_block", "motion_max_seq_length", "motion_mid_block_layers_per_block",
    "motion_norm_num_groups", "motion_num_attention_heads", "motion_transformer_layers_per_block",
    "motion_transformer_layers_per_mid_block", "use_motion_mid_block",
    "motion_activation_fn", "motion_attention_bias", "motion_cross_attention_dim",  # legacy, never read by diffusers either
}  # fmt: skip


def is_motion_unet(raw: Mapping[str, Any]) -> bool:
    """Whether a UNet's config.json is that of UNetMotionModel, whose file holds the motion modules too."""
    kinds = raw.get("down_block_types")
    return (
        any("Motion" in str(kind) for kind in (kinds if isinstance(kinds, (list, tuple)) else ()))
        or raw.get("_class_name") == "UNetMotionModel"
    )


@understood
def unet_config(raw: Mapping[str, Any], motion: MotionConfig | None, where: str = "unet/config.json") -> UNetConfig:
    """Resolves a UNet2DConditionModel or UNetMotionModel config, with the motion modules of `motion` (None: an image model)."""
    check_keys(raw, _UNET_FIXED, _UNET_READ, where)
    get = getter(raw)
    channels = tuple(get("block_out_channels", (320, 640, 1280, 1280)))
    count = len(channels)
    down_types = get("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
    up_types = get("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    for kind in (*down_types, *up_types):
        if kind not in _BLOCKS:
            raise UserError(f"{where}: block type {kind!r} is not supported (known: {', '.join(_BLOCKS)})")
    if len(down_types) != count or len(up_types) != count:
        raise UserError(
            f"{where}: block_out_channels has {count} entries, down_block_types {len(down_types)}, up_block_types {len(up_types)}"
        )
    cross_dims = set(_per_block(get("cross_attention_dim", 1280), count, "cross_attention_dim", where))
    if len(cross_dims) > 1:
        raise UserError(f"{where}: cross_attention_dim {raw['cross_attention_dim']} differs between blocks, which is not supported")

    layers = _per_block(get("layers_per_block", 2), count, "layers_per_block", where)
    up_layers = [n + 1 for n in reversed(layers)]
    heads = _per_block(get("num_attention_heads", None) or get("attention_head_dim", 8), count, "attention_head_dim", where)
    depths = _per_block(get("transformer_layers_per_block", 1), count, "transformer_layers_per_block", where)
    up_depths = get("reverse_transformer_layers_per_block", None)
    up_depths = list(reversed(depths)) if up_depths is None else _per_block(up_depths, count, "reverse_transformer_layers_per_block", where)
    mid_depths = get("transformer_layers_per_mid_block", None)
    if mid_depths is None:
        mid_depths = depths[-1] if isinstance(depths[-1], int) else 1
    mid_layers = get("mid_block_layers", 1)

    still = MotionConfig(channels, tuple((0,) * n for n in layers), (), tuple((0,) * n for n in up_layers), (1,) * count, 0, 0)
    m = motion or still
    if m.channels != channels or [len(b) for b in m.down] != layers or [len(b) for b in m.up] != up_layers:
        raise UserError(
            f"{where}: the motion adapter does not fit this model: its blocks have {m.channels} channels and "
            f"{[len(b) for b in m.down]} layers, the model's {channels} and {layers}; take an adapter made for this kind of model"
        )

    def block(i, cross, depth, motion_depths, resample):
        spatial = _per_block(depth, len(motion_depths), "transformer_layers_per_block", where) if cross else [0] * len(motion_depths)
        return BlockConfig(channels[i], tuple(spatial), heads[i], tuple(motion_depths), m.heads[i], resample)

    groups = get("norm_num_groups", 32)
    for width, head_count, motion_heads in zip(channels, heads, m.heads, strict=True):
        for name, parts in (("norm_num_groups", groups), ("attention_head_dim", head_count), ("motion_num_attention_heads", motion_heads)):
            if width % parts:
                raise UserError(f"{where}: {name} {parts} does not divide the {width} channels of a block")
    last = count - 1
    return UNetConfig(
        in_channels=get("in_channels", 4),
        out_channels=get("out_channels", 4),
        cross_attention_dim=cross_dims.pop(),
        norm_groups=groups,
        norm_eps=get("norm_eps", 1e-5),
        linear_projection=get("use_linear_projection", False),
        mid_scale=get("mid_block_scale_factor", 1.0),
        max_frames=m.max_frames,
        down=tuple(block(i, _BLOCKS[down_types[i]], depths[i], m.down[i], i < last) for i in range(count)),
        mid=block(last, True, mid_depths, m.mid or (0,) * mid_layers, False),
        up=tuple(block(last - i, _BLOCKS[up_types[i]], up_depths[i], m.up[i], i < last) for i in range(count)),
    )


@understood
def motion_config(raw: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], groups: int, where: str = "motion adapter") -> MotionConfig:
    """The structure of a motion adapter, read off its tensors' shapes; from its config.json only the heads, which no shape tells.

    Re-uploaded configs are often wrong about the mid block and the length of the position table; tensors are not.
    raw: config.json of a MotionAdapter or a UNetMotionModel ({} for a bare file). groups: the UNet's, which diffusers uses here too.
    """
    if not is_motion_unet(raw):
        check_keys(raw, {}, _MOTION_READ, where)
    if raw.get("conv_in_channels"):
        raise UserError(f"{where}: conv_in_channels={raw['conv_in_channels']} (a PIA adapter, with its own first layer) is not supported")
    depth: dict[tuple[str, int], int] = {}  # (block, module) → transformer blocks in it
    channels: dict[str, int] = {}
    lengths = set()
    for key, shape in shapes.items():
        parts = key.split(".")
        if "motion_modules" not in parts:
            continue
        at = parts.index("motion_modules")
        block, module = ".".join(parts[:at]), int(parts[at + 1])
        depth.setdefault((block, module), 0)
        if parts[at + 2] == "norm":
            channels[block] = shape[0]
        if parts[at + 2] == "transformer_blocks":
            depth[block, module] = max(depth[block, module], int(parts[at + 3]) + 1)
        if parts[-1] == "pe":
            lengths.add(shape[1])
    if not depth or len(lengths) != 1:
        raise UserError(f"{where}: holds no motion modules with one position table, so it is not a motion adapter")

    def blocks(prefix):
        count = len({block for block, _ in depth if block.startswith(prefix)})
        names = [prefix if prefix == "mid_block" else f"{prefix}.{i}" for i in range(count)]
        return names, tuple(tuple(n for (block, _), n in sorted(depth.items()) if block == name) for name in names)

    names, down = blocks("down_blocks")
    _, up = blocks("up_blocks")
    _, mid = blocks("mid_block")
    if not names or len(up) != len(down):
        raise UserError(f"{where}: {len(down)} down blocks and {len(up)} up blocks hold motion modules: an incomplete adapter")
    heads = raw.get("motion_num_attention_heads") or 8
    return MotionConfig(
        channels=tuple(channels.get(name, 0) for name in names),
        down=down,
        mid=mid[0] if mid else (),
        up=up,
        heads=tuple(_per_block(heads, len(names), "motion_num_attention_heads", where)),
        max_frames=lengths.pop(),
        groups=groups,
    )


@understood
def fresh_motion_config(raw_unet: Mapping[str, Any], heads: int, max_frames: int, mid_block: bool = True) -> MotionConfig:
    """Motion modules to train from nothing in this UNet: one transformer block each, the structure of v2."""
    get = getter(raw_unet)
    channels = tuple(get("block_out_channels", (320, 640, 1280, 1280)))
    layers = _per_block(get("layers_per_block", 2), len(channels), "layers_per_block", "unet/config.json")
    for width in channels:
        if width % heads:
            raise UserError(f"motion_num_attention_heads={heads} does not divide the {width} channels of a block of the model")
    return MotionConfig(
        channels=channels,
        down=tuple((1,) * n for n in layers),
        mid=(1,) * get("mid_block_layers", 1) if mid_block else (),
        up=tuple((1,) * (n + 1) for n in reversed(layers)),
        heads=(heads,) * len(channels),
        max_frames=max_frames,
        groups=get("norm_num_groups", 32),
    )


def getter(raw):
    """raw.get, but a key that is null counts as missing."""
    return lambda key, default: default if raw.get(key) is None else raw[key]


def _short(values: list):
    return values[0] if len(set(values)) == 1 else values


def _per_block(value, count: int, key: str, where: str) -> list:
    """An int for all, or one entry each."""
    values = [value] * count if isinstance(value, int) else list(value)
    if len(values) != count:
        raise UserError(f"{where}: {key} has {len(values)} entries where {count} are needed")
    return values


def check_keys(raw: Mapping[str, Any], fixed: Mapping[str, tuple], read: set[str], where: str) -> None:
    """A UserError for a key that would change the computation in a way that is not built."""
    for key, value in raw.items():
        if key.startswith("_") or key in read or value is None:
            continue
        if key not in fixed:
            raise UserError(f"{where}: unknown key {key}={value!r}: it may change what the model computes, so it is refused")
        values = value if isinstance(value, (list, tuple)) else [value]
        if any(v not in fixed[key] for v in values):
            raise UserError(f"{where}: {key}={value!r} is not supported (only {', '.join(map(repr, fixed[key]))})")
