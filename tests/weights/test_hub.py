"""Loading from hubs: small servers on the loopback that speak the calls used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from anidiff_jax.errors import UserError
from anidiff_jax.weights.base import load_tokenizer
from anidiff_jax.weights.hub import in_a_line, resolve, wanted
from anidiff_jax.weights.sources import CLIP_TOKENIZER, base_source, tokenizer_of
from tests import reference
from tests.hubs import TOKEN
from tests.weights import foreign


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


@pytest.mark.parametrize("name", ["hf", "modelscope"])
def test_one_file_of_a_repository(hub, name):
    """As the original motion modules and most LoRAs lie on hubs: several of them in a repository."""
    server = hub(name)
    server.repos["me/many", "main" if name == "hf" else "master"] = {"v2/mm.safetensors": b"one", "mm3.ckpt": b"two", "big.ckpt": b"!"}
    for file, content in (("v2/mm.safetensors", b"one"), ("mm3.ckpt", b"two")):
        assert resolve(f"me/many/{file}", hub=name).read_bytes() == content
    assert server.fetched == ["v2/mm.safetensors", "mm3.ckpt"]
    saved = {"default/adapter_config.json": b"{}", "default/adapter_model.safetensors": b"three"}  # by PEFT: the scale lies beside
    server.repos["me/many", "main" if name == "hf" else "master"] |= saved
    lora = resolve("me/many/default/adapter_model.safetensors", hub=name)
    assert (lora.read_bytes(), lora.with_name("adapter_config.json").read_bytes()) == (b"three", b"{}")
    assert resolve("me/many", hub=name).joinpath("default", "adapter_config.json").is_file()
    with pytest.raises(UserError, match=r"^me/many/mm4.ckpt is not a local"):
        resolve("me/many/mm4.ckpt", hub=name)
    for given in ("me/many/more", "me/../many/mm.ckpt"):
        with pytest.raises(UserError, match="not a hub id"):
            resolve(given, hub=name)


def test_a_single_file_takes_its_tokenizer_from_the_hub(hub, tmp_path):
    server, made = hub("hf"), reference.tokenizer(tmp_path / "made")
    made.save_pretrained(tmp_path / "clip")
    files = {path.name: path.read_bytes() for path in (tmp_path / "clip").iterdir()}
    server.repos[CLIP_TOKENIZER, "main"] = {**files, "model.safetensors": b"not wanted"}
    path = foreign.save(foreign.single_file(foreign.sd_parts()), tmp_path / "base.safetensors")
    tokenizer = load_tokenizer(tokenizer_of(base_source(path)))
    assert tokenizer("a red circle")["input_ids"] == made("a red circle")["input_ids"]
    assert "model.safetensors" not in server.fetched
    del server.repos[CLIP_TOKENIZER, "main"]
    assert load_tokenizer(tokenizer_of(base_source(path))).vocab_size == made.vocab_size  # from the earlier download


@pytest.mark.parametrize("name", ["hf", "modelscope"])
def test_a_broken_off_download_is_gone_on_with(hub, name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)  # else less than 10 MB begins anew
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_CHUNK_SIZE", 1024)
    server, data = hub(name), bytes(range(256)) * 400
    server.repos["me/one", "main" if name == "hf" else "master"] = {"mm.safetensors": data}
    server.cut = len(data) // 2
    assert resolve("me/one/mm.safetensors", hub=name).read_bytes() == data
    first, second = server.ranges
    assert (first, second.split("-")[0]) == ("", f"bytes={len(data) // 2}")


def test_a_mirror_and_offline_mode_by_the_usual_variables(hub, base, tmp_path):
    """In processes of their own, since the hub's package reads its variables when it is imported."""
    server = hub("hf")
    files = {p.relative_to(base).as_posix(): p.read_bytes() for p in base.rglob("*") if p.is_file()}
    server.repos["me/base", "main"] = files | {"README.md": b"#", "unet/diffusion_pytorch_model.bin": b"pickle"}
    quickly = "import time; time.sleep = lambda seconds: None"  # between attempts at a hub that is gone
    code = f"{quickly}; import sys; from anidiff_jax.weights.hub import resolve; print(resolve(sys.argv[1], hub='hf'))"

    def ask(repo, **variables):
        known = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        where = {**known, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.here, "HF_TOKEN": TOKEN, **variables}
        return subprocess.run([sys.executable, "-c", code, repo], env=where, capture_output=True, text=True)

    folder = Path(ask("me/base").stdout.strip())
    assert folder.is_relative_to(tmp_path / "home")
    assert (folder / "unet" / "config.json").is_file()
    asked = len(server.fetched)
    assert asked
    again = ask("me/base", HF_HUB_OFFLINE="1")
    assert Path(again.stdout.strip()) == folder, again.stderr
    assert len(server.fetched) == asked
    missing = ask("me/other", HF_HUB_OFFLINE="1")
    assert missing.returncode != 0
    assert "UserError: me/other is not a local folder, and no hub gave it (hf: " in missing.stderr
    assert TOKEN not in missing.stderr
    assert "404" in ask("me/other").stderr.splitlines()[-1]  # and not that traffic is disabled
    server.shutdown()
    server.server_close()
    again = ask("me/base")
    assert Path(again.stdout.strip()) == folder, again.stderr
    (folder / "unet" / "config.json").unlink()
    broken = ask("me/base")
    assert "UserError: me/base is not a local folder, and no hub gave it (hf: " in broken.stderr


def test_a_reason_is_one_line_that_says_it():
    gated = Exception("403 Client Error. (Request ID: Root=1)\n\nCannot access gated repo for url https://hub/x.\nAsk for access.")
    assert in_a_line(gated, None) == "Cannot access gated repo for url https://hub/x. Ask for access."
    assert in_a_line(Exception("no such file\nTraceback"), None) == "no such file"
    assert in_a_line(TimeoutError(), None) == "TimeoutError"


@pytest.mark.parametrize("name", ["hf", "modelscope"])
def test_a_repository_of_single_files_says_which(hub, name):
    server = hub(name)
    files = {f"mm{i}.ckpt": b"1" for i in range(4)} | {"README.md": b"#", "config.json": b"{}"}
    server.repos["me/many", "main" if name == "hf" else "master"] = files
    with pytest.raises(UserError, match=r"single files: give one of me/many/mm0.ckpt, me/many/mm1.ckpt, me/many/mm2.ckpt and 1 more"):
        resolve("me/many", hub=name)
    with pytest.raises(UserError, match=r"models/sd15.safetensors does not exist here"):
        resolve("models/sd15.safetensors")


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
