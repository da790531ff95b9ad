"""Loading from ModelScope: a small server on the loopback that speaks the calls used."""

import sys

import pytest

from anidiff_jax.errors import UserError
from anidiff_jax.weights.hub import resolve, wanted
from tests.hubs import TOKEN


@pytest.fixture
def modelscope(hub, base, monkeypatch):
    """Two revisions of a base model, among files that nothing reads."""
    monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS", 1)  # it would wait between them
    server = hub("modelscope")
    files = {path.relative_to(base).as_posix(): path.read_bytes() for path in base.rglob("*") if path.is_file()}
    others = {"README.md": b"#", "unet/diffusion_pytorch_model.bin": b"pickle", "v1-5-pruned.safetensors": b"a copy"}
    files["tokenizer/more/notes.json"] = b"{}"
    server.repos["me/base", "master"] = {**files, **others}
    server.repos["me/base", "v2"] = {**files, **others, "model_index.json": b"{}"}
    return server


def test_only_what_is_read_is_downloaded_and_once(modelscope):
    there = modelscope.repos["me/base", "master"]
    folder = resolve("me/base", hub="modelscope")
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == set(wanted(there))
    assert sorted(modelscope.fetched) == wanted(there)
    assert all((folder / name).read_bytes() == there[name] for name in wanted(there))
    assert resolve("me/base", hub="modelscope") == folder
    assert len(modelscope.fetched) == len(wanted(there))


def test_revisions(modelscope):
    assert (resolve("me/base", "v2", "modelscope") / "model_index.json").read_bytes() == b"{}"
    assert (resolve("me/base", hub="modelscope") / "model_index.json").read_bytes() != b"{}"


def test_offline_an_earlier_download_is_taken(modelscope, monkeypatch):
    folder = resolve("me/base", hub="modelscope")
    with monkeypatch.context() as busy:
        busy.setattr(modelscope.RequestHandlerClass, "do_GET", lambda self: self.answer(503, {}))
        assert resolve("me/base", hub="modelscope") == folder
    modelscope.shutdown()
    modelscope.server_close()
    assert resolve("me/base", hub="modelscope") == folder
    for repo, revision in (("me/base", "v2"), ("me/other", None)):
        with pytest.raises(UserError, match=f"^{repo} is not a local folder, and no hub gave it .modelscope: .") as error:
            resolve(repo, revision, "modelscope")
        assert "\n" not in str(error.value)


def test_not_told_which_hub_both_are_asked_in_turn(modelscope, hub):
    first, files = hub("hf"), modelscope.repos["me/base", "master"]
    assert (resolve("me/base") / "model_index.json").is_file()
    assert sorted(modelscope.fetched) == wanted(files)
    first.repos["me/base", "main"] = files
    folder = resolve("me/base")
    assert sorted(first.fetched) == wanted(files)
    assert all((folder / name).read_bytes() == files[name] for name in wanted(files))
    assert resolve("me/base") == folder
    assert sorted(first.fetched) == wanted(files)  # once
    with pytest.raises(UserError, match=r"no hub gave it \(hf: .*; modelscope: .*\)"):
        resolve("me/none")


def test_what_the_hub_refuses_is_one_line_without_the_token(modelscope, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    for repo, revision in (("me/none", None), ("me/base", "v3")):
        with pytest.raises(UserError, match=f"^{repo} .* does not exist for Bearer …") as error:
            resolve(repo, revision, "modelscope")
        assert "\n" not in str(error.value)
    modelscope.lost = {"vae/config.json"}
    with pytest.raises(UserError, match=r"^me/base .* vae/config.json is gone"):
        resolve("me/base", hub="modelscope")


def test_no_such_hub_and_no_package(monkeypatch):
    with pytest.raises(UserError, match="hub='github' is not one of hf, modelscope"):
        resolve(".", hub="github")
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    assert resolve(".", hub="modelscope").is_dir()
    with pytest.raises(UserError, match="pip install modelscope-hub"):
        resolve("me/base", hub="modelscope")
