"""`checkpoints/iter-N`: the training state (Orbax), and what trained as diffusers reads it. Never the frozen base.

A checkpoint is written beside the running updates, under a hidden name that becomes its own when it is whole.
"""

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError

from anidiff_jax.config import TrainConfig
from anidiff_jax.errors import UserError
from anidiff_jax.models.config import is_motion_unet
from anidiff_jax.parallel import is_main
from anidiff_jax.training.push import Hub
from anidiff_jax.training.runs import best_of, steps_in
from anidiff_jax.training.setup import lora_dtype
from anidiff_jax.training.state import TrainState
from anidiff_jax.weights import files
from anidiff_jax.weights.base import Model
from anidiff_jax.weights.hub import public_name
from anidiff_jax.weights.loras import save_lora
from anidiff_jax.weights.tree import Tree, flatten, is_motion, merge, split


class Checkpoints:
    """Writes a run's checkpoints one after the other in a thread of their own; only the main process writes.

    The state is copied to the host first, and the updates go on while it is written. On a CPU the copy would be a second state in
    the memory where the first is, so there the updates wait. An error in writing (a full disk) comes up at the next call; what was
    whole before stays.
    """

    def __init__(self, run: Path, model: Model, config: TrainConfig, hub: Hub):
        self.folder, self.model, self.config, self.hub = run / "checkpoints", model, config, hub
        self._thread = ThreadPoolExecutor(1)
        self._pending: list[Future] = []
        if is_main():
            for half in self.folder.glob(".iter-*"):  # what a kill left of one: gigabytes that nobody would look for
                shutil.rmtree(half, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._thread.shutdown()
        if error[0] is None:
            self.wait()

    def save(self, state: TrainState, frozen_unet: Tree) -> None:
        """Writes the state, which the next update may overwrite once this returns; waits for the save before it."""
        self.wait()
        if is_main():
            folder = self.folder / f"iter-{int(state.step)}"
            self._submit(write_checkpoint, folder, jax.tree.map(np.asarray, state), frozen_unet, self.model, self.config)
            if jax.default_backend() == "cpu":  # what is written is the state itself
                self.wait()

    def settle(self, step: int) -> None:
        """Call when the checkpoint of `step` has been examined: it is pushed where that is wanted, and older ones go."""
        if is_main():
            self._submit(self._settle, step)

    def wait(self) -> None:
        """Returns when all is written; raises what went wrong in writing."""
        pending, self._pending = self._pending, []
        for future in pending:
            try:
                future.result()
            except (OSError, ValueError, SafetensorError) as error:  # Orbax's own error for a full disk is a ValueError
                whole = steps_in(self.folder)
                last = f"the last whole one is iter-{whole[-1]}" if whole else "there is no other"
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                raise UserError(f"a checkpoint could not be written to {self.folder} ({reason}); {last}: make room, then resume") from None

    def _submit(self, *work: Any) -> None:
        self._pending.append(self._thread.submit(*work))

    def _settle(self, step: int) -> None:
        if step not in steps_in(self.folder):  # it could not be written, which `wait` tells
            return
        best = best_of(self.folder.parent)
        self.hub.saved(self.folder / f"iter-{step}", best is not None and best["step"] == step)
        if self.config.save_total_limit is not None:
            kept = {step} | ({best["step"]} if best else set())
            kept |= {n for n in steps_in(self.folder) if self.hub.needs(self.folder / f"iter-{n}")}
            others = [n for n in steps_in(self.folder) if n not in kept]
            for old in others[: max(0, len(others) + len(kept) - self.config.save_total_limit)]:
                shutil.rmtree(self.folder / f"iter-{old}", ignore_errors=True)


def write_checkpoint(folder: Path, state: TrainState, frozen_unet: Tree, model: Model, config: TrainConfig) -> None:
    """Writes a checkpoint; it has its name only when it is whole.

    In it: state/ (to go on training), train_config.json, and one of
        config.json + diffusion_pytorch_model.safetensors      a MotionAdapter, or the UNet where other parts trained too
        pytorch_lora_weights.safetensors + adapter_config.json a LoRA
    The latter hold the moving average where there is one.
    """
    import orbax.checkpoint as ocp

    header = {"trained_by": "anidiff-jax", "base_model": public_name(config.model_id_or_path) or "embedded", "step": str(int(state.step)),
              "motion_norm": config.motion_norm, "spatial_norm": config.spatial_norm}  # fmt: skip
    with files.written_whole(folder) as out:
        with _orbax() as checkpointer:
            checkpointer.save((out / "state").absolute(), ocp.args.PyTreeSave(state))
        if config.sft_type == "lora":
            lora = jax.tree.map(lambda x: x.astype(lora_dtype(config)), state.best)
            save_lora(lora, out, config.lora_alpha, config.lora_dropout, header["base_model"], header)
        else:
            save_unet_part(state.best, frozen_unet, model, out, header)
        files.save_json(config.to_json(), out / "train_config.json")


def _orbax():
    """Orbax for this process alone, since the state is the same in all of them.

    Without compression: weights hardly become smaller, and trying takes their size in memory once more.
    """
    import orbax.checkpoint as ocp

    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process{here}")
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone, use_compression=False)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def restore(checkpoint: Path, state: TrainState) -> TrainState:
    """The state that a checkpoint holds, as NumPy arrays; `state` says what is expected."""
    import orbax.checkpoint as ocp

    like = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray), state)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    try:
        with _orbax() as checkpointer:
            found = checkpointer.restore((checkpoint / "state").absolute(), args=ocp.args.PyTreeRestore(shapes, restore_args=like))
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise UserError(f"{checkpoint} does not hold the state of such a run ({str(error).splitlines()[0][:200]})") from None
    for (path, want), have in zip(jax.tree.leaves_with_path(shapes), jax.tree.leaves(found), strict=True):
        if want.shape != have.shape:
            name = jax.tree_util.keystr(path)
            raise UserError(
                f"{checkpoint}: {name} has shape {list(have.shape)}, this run needs {list(want.shape)}: take the run's own arguments"
            )
    return found


def save_unet_part(trained: Tree, frozen_unet: Tree, model: Model, out: Path, header: dict[str, str]) -> None:
    """The motion adapter, where nothing else trained; else the whole UNet."""
    whole = merge(frozen_unet, trained)
    if model.motion is not None and all(is_motion(key) for key in flatten(trained)):
        weights, config = split(whole, is_motion)[0], model.motion.to_json()
    else:
        weights, config = whole, unet_json(model)
    weights = jax.tree.map(lambda x: np.asarray(x).astype("float32", copy=False), weights)  # on the host: the device trains
    files.save_json(config, out / "config.json")
    files.save(weights, out / files.WEIGHTS, header)


def unet_json(model: Model) -> dict[str, Any]:
    """config.json of the UNet with the motion modules that it holds: UNet2DConditionModel, or UNetMotionModel."""
    raw = dict(model.unet_json)
    if model.motion is None or is_motion_unet(raw):
        return raw
    adapter = model.motion.to_json()
    keep = ("act_fn", "block_out_channels", "cross_attention_dim", "in_channels", "layers_per_block",
            "mid_block_scale_factor", "norm_eps", "norm_num_groups", "out_channels", "sample_size", "transformer_layers_per_block",
            "reverse_transformer_layers_per_block", "use_linear_projection")  # fmt: skip
    return {
        **{key: raw[key] for key in keep if key in raw},
        "_class_name": "UNetMotionModel",
        "down_block_types": [kind.replace("2D", "Motion") for kind in raw["down_block_types"]],
        "up_block_types": [kind.replace("2D", "Motion") for kind in raw["up_block_types"]],
        "num_attention_heads": raw.get("num_attention_heads") or raw.get("attention_head_dim") or 8,
        "motion_max_seq_length": adapter["motion_max_seq_length"],
        "motion_num_attention_heads": adapter["motion_num_attention_heads"],
        "temporal_transformer_layers_per_block": adapter["motion_transformer_layers_per_block"],
        "temporal_transformer_layers_per_mid_block": adapter["motion_transformer_layers_per_mid_block"],
        "use_motion_mid_block": adapter["use_motion_mid_block"],
    }
