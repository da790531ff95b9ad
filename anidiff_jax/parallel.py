"""Devices: the one place that knows of pmap. A step is an ordinary per-device function; only the batch has a device axis."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from anidiff_jax.errors import UserError

AXIS = "data"
HEARTBEAT = 30  # seconds without a sign of life, after which a process counts as dead

# For the sake of many cores, XLA's scheduler for CPUs starts all that it can at once, and recomputes every layer at the start of
# the backward pass. Without it a training step of full size with gradient checkpointing takes 4.8 GB of temporary memory, not 19.1.
CPU_FLAGS = " --xla_cpu_enable_concurrency_optimized_scheduler=false"

# Not xla_gpu_deterministic_ops, which turns autotuning off too: without that, on an H100 four steps of some 100 ms did not end in 80 s.
GPU_DETERMINISTIC = " --xla_gpu_exclude_nondeterministic_ops=true"


def set_up_jax(ddp_backend: str = "nccl", deterministic: bool = False) -> None:
    """Keeps compiled programs in the user's cache folder, and chooses how CPUs talk to each other; call before any computation.

    deterministic: GPUs give the same bits every time, at some cost. Which kernels those are is measured when a program is compiled,
    and kept in the cache: another machine, or a cache that was emptied, may take others, with other rounding.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anidiff-jax" / "compiled"
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # a start fetches some twenty small ones
    if jax.__version_info__ < (0, 13):  # known up to 0.12; an XLA that does not know a flag stops the process
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + CPU_FLAGS
    if deterministic:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + GPU_DETERMINISTIC
    if ddp_backend in ("gloo", "mpi"):
        jax.config.update("jax_cpu_collectives_implementation", ddp_backend)


def join_cluster(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the processes of a run, where there are several; call after `set_up_jax` and before any computation.

    Given by the three arguments, or found: Slurm, Open MPI, Kubernetes and TPU pods say in the environment how many they are.
    A process that dies, or ends with an error, ends the others within HEARTBEAT seconds or so.
    """
    given = [value is not None for value in (coordinator_address, num_processes, process_id)]
    if any(given) and not all(given):
        raise UserError("coordinator_address, num_processes and process_id go together: give all three, or none to find them")
    if not any(given) and not _several():
        return
    if not any(given) and _job_of_kubernetes() and not _told_otherwise() and find_spec("kubernetes") is None:
        raise UserError(
            "this pod is one of a Job, and may have others beside it, which it finds with pip install 'jax[k8s]'; or give "
            "--coordinator_address, --num_processes and --process_id (of a pod alone: localhost:1234, 1 and 0)"
        )
    try:
        jax.distributed.initialize(
            coordinator_address, num_processes, process_id, _own_gpus(),
            heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of this run do not find each other: {str(error).splitlines()[0][:200]}") from None


def _several() -> bool:
    """Whether a launcher says that this process is one of many."""
    said = os.environ.get
    counts = [said("OMPI_COMM_WORLD_SIZE"), said("SLURM_NTASKS") if said("SLURM_STEP_ID") else None]
    pod = len(said("TPU_WORKER_HOSTNAMES", "").split(",")) > 1 or said("MEGASCALE_NUM_SLICES", "1") != "1"
    return pod or _job_of_kubernetes() or any(count is not None and int(count) > 1 for count in counts)


def _job_of_kubernetes() -> bool:
    return os.environ.get("KUBERNETES_SERVICE_HOST") is not None and os.environ.get("JOB_COMPLETION_INDEX") is not None


def _told_otherwise() -> bool:
    """Whether JAX finds the processes of a pod without asking Kubernetes: those of a TPU slice, or a launcher's in it."""
    return any(name in os.environ for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_ID"))


def _own_gpus() -> list[int] | None:
    """All GPUs that a launcher gives, where it starts one process a machine; None leaves it to JAX, which takes one a process."""
    said = os.environ.get
    beside = said("OMPI_COMM_WORLD_LOCAL_SIZE") or said("SLURM_STEP_TASKS_PER_NODE") or ""  # mpirun inside of a step of Slurm's goes first
    visible, there = said("CUDA_VISIBLE_DEVICES"), len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    count = len(visible.split(",")) if visible else int(said("SLURM_GPUS_ON_NODE", there))
    return list(range(count)) if re.fullmatch(r"1(\(x\d+\))?", beside) and count and not said("JAX_LOCAL_DEVICE_IDS") else None


def is_main() -> bool:
    """Whether this process writes logs, samples and checkpoints."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(what)


def in_all(numbers: Sequence[int]) -> np.ndarray:
    """What each process gives, below 2³²: (processes, numbers)."""
    if jax.process_count() == 1:
        return np.array([numbers], np.uint32)
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(np.array(numbers, np.uint32)))


def replicate(tree: Any) -> Any:
    """The same arrays on every local device: the form in which a pmapped step takes and gives its state, without copies."""
    return jax.device_put(tree, _over_devices())


def to_devices(tree: Any) -> Any:
    """Arrays whose leading axis is the local devices', as of a batch that `split_batch` gives: each part on its device."""
    return jax.device_put(tree, _over_devices(AXIS))


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


def on_each_device(function: Callable) -> Callable:
    """function(a, b, batch) → arrays, on this process's devices, each for its own part of the batch; nothing passes between them."""
    return jax.pmap(function, in_axes=(None, None, 0), devices=jax.local_devices())


def split_batch(batch: Mapping[str, np.ndarray], micro_batches: int, devices: int | None = None) -> dict[str, np.ndarray]:
    """(clips, …) → (devices, micro_batches, clips a device and micro-batch, …)."""
    devices = devices or jax.local_device_count()
    return {name: x.reshape(devices, micro_batches, -1, *x.shape[1:]) for name, x in batch.items()}
