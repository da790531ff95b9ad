"""Shared models and compiled functions, so that the run compiles little; a compile cache that outlives the run."""

import gc
import os
import threading
from pathlib import Path

from tests import QUICKLY

# Four devices; and programs that are compiled quickly rather than well, since most are run once on tiny shapes.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4 {QUICKLY}"

import jax
import pytest

gc.set_threshold(5_000, 20, 100)  # what JAX traces lives on: to look through it again and again takes a twentieth of the run

CACHE = Path(__file__).parent.parent / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def words_of(**values) -> list[str]:
    """Arguments as the words of a command line."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion folder written by diffusers, that is not the embedded one."""
    from tests import reference

    return reference.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapter(tmp_path_factory) -> Path:
    """A tiny motion adapter for `base`, written by diffusers."""
    from tests import reference

    return reference.write_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def pipe(base, adapter):
    """Those two, loaded."""
    import anidiff_jax

    return anidiff_jax.AnimateDiffPipeline.from_pretrained(base, motion_adapter=adapter, dtype="float32")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hub("modelscope") → a server on the loopback, which everything that asks this hub now reaches, without anyone's own login."""
    from tests import hubs

    servers = []

    def start(name, **refuses):
        server = hubs.Server(hubs.ModelScope if name == "modelscope" else hubs.HuggingFace, **refuses)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        if name == "modelscope":
            monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.here)
        else:
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.here)
            address = server.here + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
        return server

    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
