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
    monkeypatch.setattr(jax.distributed, "initialize", lambda *words, **settings: calls.append((words, settings)))
    return calls


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_processes_find_each_other(joined, monkeypatch, launcher):
    environment, several = LAUNCHERS[launcher]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    join_cluster(None, None, None)
    assert joined == ([((None, None, None), {"heartbeat_timeout_seconds": HEARTBEAT})] if several else [])
    assert HEARTBEAT < 60


def test_processes_are_told_of_each_other(joined):
    join_cluster("here:1", 2, 0)
    assert [words for words, _ in joined] == [("here:1", 2, 0)]
    with pytest.raises(UserError, match="go together"):
        join_cluster("here:1", 2, None)


def test_what_lies_on_every_device_is_not_held_twice_on_one():
    x = jax.device_put(jnp.ones(1000), jax.local_devices()[0])
    everywhere = replicate({"x": x})["x"]
    assert len(everywhere.addressable_shards) == jax.local_device_count()
    assert everywhere.addressable_data(0).unsafe_buffer_pointer() == x.unsafe_buffer_pointer()
