"""Devices: the one place that knows of pmap. A step is an ordinary per-device function; only the batch has a device axis."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"

# For the sake of many cores, XLA's scheduler for CPUs starts all that it can at once, and recomputes every layer at the start of
# the backward pass. Without it a training step of full size with gradient checkpointing takes 4.8 GB of temporary memory, not 19.1.
CPU_FLAGS = " --xla_cpu_enable_concurrency_optimized_scheduler=false"


def set_up_jax(ddp_backend: str = "nccl") -> None:
    """Keeps compiled programs in the user's cache folder, and chooses how CPUs talk to each other; call before any computation."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anidiff-jax" / "compiled"
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if jax.__version_info__ < (0, 11):  # an XLA that does not know a flag stops the process
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + CPU_FLAGS
    if ddp_backend in ("gloo", "mpi"):
        jax.config.update("jax_cpu_collectives_implementation", ddp_backend)


def replicate(tree: Any) -> Any:
    """The same arrays on every local device: the form in which a pmapped step takes and gives its state, without copies."""
    return jax.device_put(tree, _over_devices())


def to_devices(batch: Mapping[str, np.ndarray]) -> Any:
    """A batch as `split_batch` gives it, each device's part on that device."""
    return jax.device_put(dict(batch), _over_devices(AXIS))


def _over_devices(*axes: str) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec(*axes))


def on_one_device(tree: Any) -> Any:
    """Replicated arrays as the first device holds them, without a copy, for work that one device does alone."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def data_parallel(update: Callable, devices: Sequence[jax.Device] | None = None) -> Callable:
    """update(state, frozen, batch) → (state, metrics), on every local device; it must pmean over AXIS what it returns.

    The state is donated: do not use it after the call. The batch's leaves lead with the device axis.
    """
    return jax.pmap(update, axis_name=AXIS, in_axes=(None, None, 0), out_axes=(None, None), donate_argnums=(0,), devices=devices)


def split_batch(batch: Mapping[str, np.ndarray], micro_batches: int, devices: int | None = None) -> dict[str, np.ndarray]:
    """(clips, …) → (devices, micro_batches, clips a device and micro-batch, …)."""
    devices = devices or jax.local_device_count()
    return {name: x.reshape(devices, micro_batches, -1, *x.shape[1:]) for name, x in batch.items()}
