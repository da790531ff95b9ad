"""What is said to JAX before it computes, and where arrays lie."""

import os

import jax
import jax.numpy as jnp
import pytest

from anidiff_jax.errors import UserError
from anidiff_jax.parallel import HEARTBEAT, join_cluster, replicate, set_up_jax


@pytest.fixture
def told(monkeypatch):
    """What jax.config is told."""
    told = {}
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    monkeypatch.setenv("XLA_FLAGS", "--one")
    return told


@pytest.mark.parametrize(("backend", "collectives"), [("nccl", None), ("gloo", "gloo"), ("mpi", "mpi")])
def test_collectives(told, backend, collectives):
    set_up_jax(backend)
    assert told.get("jax_cpu_collectives_implementation") == collectives


@pytest.mark.parametrize("deterministic", [True, False])
def test_determinism(told, deterministic):
    set_up_jax(deterministic=deterministic)
    assert os.environ["XLA_FLAGS"].startswith("--one ")
    assert ("--xla_gpu_exclude_nondeterministic_ops=true" in os.environ["XLA_FLAGS"]) == deterministic


LAUNCHERS = {
    "nobody": ({}, False),
    "Slurm, a step of two": ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, True),
    "Slurm, a step of one": ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}, False),
    "Slurm, a shell in an allocation of two": ({"SLURM_NTASKS": "2"}, False),
    "Open MPI": ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    "Open MPI, one": ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
    "Kubernetes, an indexed job": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
    "TPUs in an indexed job": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0", "TPU_WORKER_HOSTNAMES": "a,b"}, True),
    "Kubernetes, a pod": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    "a TPU pod": ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    "a TPU": ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "1"}, False),
    "slices of TPUs": ({"MEGASCALE_NUM_SLICES": "2"}, True),
}


@pytest.fixture
def joined(monkeypatch):
    """What jax.distributed is told, call by call; no launcher is around."""
    for environment, _ in LAUNCHERS.values():
        for name in environment:
            monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr("anidiff_jax.parallel.find_spec", lambda name: object())  # the package that asks Kubernetes
    monkeypatch.setattr(jax.distributed, "initialize", lambda *words, **settings: calls.append((words, settings)))
    return calls


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_processes_find_each_other(joined, monkeypatch, launcher):
    environment, several = LAUNCHERS[launcher]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    join_cluster(None, None, None)
    assert [words for words, _ in joined] == ([(None, None, None, None)] if several else [])
    assert all(set(settings.values()) == {HEARTBEAT} for _, settings in joined)
    assert HEARTBEAT < 60


def test_a_pod_of_a_job_does_not_train_as_if_it_were_alone(joined, monkeypatch):
    monkeypatch.setattr("anidiff_jax.parallel.find_spec", lambda name: None)
    for name, value in LAUNCHERS["Kubernetes, an indexed job"][0].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"pip install 'jax\[k8s\]'"):
        join_cluster(None, None, None)
    join_cluster("localhost:1", 1, 0)
    assert len(joined) == 1
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")  # by which JAX goes there
    join_cluster(None, None, None)
    assert len(joined) == 2


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"}, [*range(8)]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": "4,6", "SLURM_GPUS_ON_NODE": "8"}, [0, 1]),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "CUDA_VISIBLE_DEVICES": "0,1,2"}, [0, 1, 2]),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "SLURM_STEP_TASKS_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8", "JAX_LOCAL_DEVICE_IDS": "3"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, None),
        ({}, None),
    ],
)
def test_a_process_that_is_alone_on_its_machine_takes_all_of_its_gpus(joined, monkeypatch, environment, gpus):
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    join_cluster("here:1", 2, 0)
    assert joined[0][0] == ("here:1", 2, 0, gpus)


def test_processes_are_told_of_each_other(joined):
    join_cluster("here:1", 2, 0)
    assert [words for words, _ in joined] == [("here:1", 2, 0, None)]
    with pytest.raises(UserError, match="go together"):
        join_cluster("here:1", 2, None)


def test_what_lies_on_every_device_is_not_held_twice_on_one():
    x = jax.device_put(jnp.ones(1000), jax.local_devices()[0])
    everywhere = replicate({"x": x})["x"]
    assert len(everywhere.addressable_shards) == jax.local_device_count()
    assert everywhere.addressable_data(0).unsafe_buffer_pointer() == x.unsafe_buffer_pointer()
