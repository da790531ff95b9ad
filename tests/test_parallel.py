"""What is said to JAX before it computes."""

import os

import jax
import pytest

from anidiff_jax.parallel import set_up_jax


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
    assert ("--xla_gpu_deterministic_ops=true" in os.environ["XLA_FLAGS"]) == deterministic
