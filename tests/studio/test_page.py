"""The page as people and programs meet it: a server of its own, a real browser, and gradio's client.

STUDIO_SCREENSHOTS=docs/studio python -m pytest tests/studio/test_page.py -n 0 -k fits   # writes the pictures of docs/studio.md anew
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from anidiff_jax.config import TrainConfig
from anidiff_jax.shapes.render import Scene, render
from anidiff_jax.studio import gallery
from anidiff_jax.training.report import Report
from anidiff_jax.video import save_gif
from anidiff_jax.weights.base import EMBEDDED
from tests.conftest import CACHE

pytest.importorskip("gradio_client", reason="gradio is not installed: pip install -e '.[test]'")
from gradio_client import Client, file
from gradio_client.utils import Status

ROOT = Path(__file__).parent.parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SMALL = {"sample_n_frames": 4, "num_inference_steps": 2}
QUEUE = 12


class Studio:
    """A server in a process of its own, with folders of its own."""

    def __init__(self, folder: Path, *words: str):
        self.folder, self.made, self.runs = folder, folder / "made", folder / "runs"
        (folder / "models").mkdir(parents=True)
        shutil.copytree(EMBEDDED / "motion_adapter", folder / "models" / "adapter")
        (folder / "secret.txt").write_text("secret")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, ROOT / "studio.py", "--port", port, "--models", folder / "models", "--runs", self.runs,
                   "--output_path", self.made, "--queue", QUEUE, "--max_upload", "1mb", *words]  # fmt: skip
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(CACHE), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen([str(word) for word in command], stdout=self.log, stderr=self.log, cwd=folder, env=environment)
        for _ in range(600):
            assert self.process.poll() is None, (folder / "log").read_text()
            try:
                urllib.request.urlopen(self.url, timeout=5)
                break
            except urllib.error.HTTPError:  # it asks for a password
                break
            except OSError:
                time.sleep(0.1)

    def close(self):
        self.process.terminate()
        self.process.wait(30)
        self.log.close()

    def client(self, **how) -> Client:
        return Client(self.url, verbose=False, **how)

    def memory(self) -> float:
        """Of the server, in MB."""
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1]) / 1000

    def status(self, path: str) -> int:
        return httpx.get(f"{self.url}{path}", follow_redirects=True).status_code


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    server = Studio(tmp_path_factory.mktemp("studio"))
    a_run(server.runs / "ad-20260101-000000", 60)
    yield server
    server.close()
    if server.process.returncode not in (0, -15):
        print((server.folder / "log").read_text()[-3000:])


def a_run(run: Path, updates: int) -> Report:
    """What a run leaves, written as train.py writes it; its log stays open."""
    import numpy as np

    run.mkdir(parents=True)
    (run / "config.json").write_text('{"seed": 5, "learning_rate": 0.001, "given": ["learning_rate"]}')
    (run / "data.json").write_text(
        f'{{"clips": 50, "held_out": 5, "updates": {updates}, "clips_per_update": 4, "skipped": {{"a.mp4": "empty"}}}}'
    )
    report = Report(run, TrainConfig(), updates, 4)
    rng = np.random.default_rng(0)
    for step in range(1, updates // 2 + 1):
        update(report, step, float(0.1 + 0.2 / step**0.5 + 0.03 * rng.standard_normal()))
        if step % 10 == 0:
            losses = {f"validation_loss_{i}": 0.3 / (i + 1) + 0.1 / step for i in range(3)}
            report.scores(step, {"validation_loss": 0.15 + 0.1 / step, **losses, "motion_degree": 0.02 * step, "temporal_flicker": 0.98})
            a_sample(run, step)
    return report


def a_sample(run: Path, step: int) -> None:
    for thing, color in (("circle", "red"), ("star", "blue"), ("fish", "yellow")):
        video = render(Scene(thing, color, "gray", velocity=(0.001 * step, 0.0)), 8, 64)
        save_gif(video, run / "samples" / f"iter-{step}" / f"a-{color}-{thing}-on-a-gray-background-seed5.gif")


def update(report: Report, step: int, loss: float) -> None:
    """As `report.update`, of an update that takes half a second."""
    report.write({"step": step, "loss": loss, "grad_norm": 0.1, "learning_rate": 1e-4, "seconds": 0.5, "clips_per_second": 8.0})


# Programs


def test_a_video_is_made_through_the_api(studio):
    client = studio.client()
    video, files, record = client.predict(prompt="a blue star", seed=9, **SMALL, output_format=["gif"], api_name="/make")
    assert record["prompt"] == "a blue star"
    assert record["seed"] == 9
    assert record["num_frames"] == 4
    path = video["video"] if isinstance(video, dict) else video
    assert Path(path).read_bytes()[4:8] == b"ftyp"
    assert {Path(name).suffix for name in files} == {".mp4", ".gif", ".json"}
    made = client.predict(api_name="/made")
    assert gallery.entry_of(Path(made[0])).record["seed"] == 9
    _, files = client.predict(prompt="a star", **SMALL, columns="seed", column_values="1,2", api_name="/compare")
    assert {Path(name).suffix for name in files} == {".mp4", ".gif", ".png", ".json"}


def test_what_a_user_does_wrong_is_told_to_programs(studio):
    client = studio.client()
    for changed, message in (
        ({"width": 63}, "width 63 is not a positive multiple"),
        ({"sample_n_frames": 5000}, "more than this studio makes"),
    ):
        with pytest.raises(Exception, match=message):
            client.predict(prompt="a star", **SMALL | changed, api_name="/make")


def test_ten_clients_at_once_are_served_in_order_and_memory_stays(studio):
    studio.client().predict(prompt="a red circle", seed=1, **SMALL, api_name="/make")
    clients = [studio.client() for _ in range(10)]

    def all_at_once(first: int) -> list[int]:
        """The seeds in the order in which they were made."""
        jobs = []
        for i, client in enumerate(clients):
            jobs.append(client.submit(prompt="a red circle", seed=first + i, **SMALL, api_name="/make"))
            deadline = time.monotonic() + 60
            while jobs[-1].status().code < Status.IN_QUEUE:  # a client posts from a thread of its own
                assert time.monotonic() < deadline
                time.sleep(0.01)
        records = [job.result(timeout=120)[2] for job in jobs]
        assert [record["seed"] for record in records] == list(range(first, first + 10))
        newest = gallery.entries(studio.made, most=10)
        return [entry.record["seed"] for entry in reversed(newest)]

    assert all_at_once(100) == list(range(100, 110))
    before = studio.memory()
    assert all_at_once(200) == list(range(200, 210))
    assert studio.memory() < before + 30


def test_a_full_queue_says_so_and_a_cancelled_job_ends(studio):
    clients = [studio.client() for _ in range(QUEUE + 4)]
    long = {"prompt": "a red circle", "sample_n_frames": 16, "num_inference_steps": 150}
    before = set(studio.made.iterdir())
    jobs = [client.submit(**long, seed=i, api_name="/make") for i, client in enumerate(clients)]
    told = []
    deadline = time.monotonic() + 60
    while sum(job.done() for job in jobs) < 3:  # those for whom there is no place
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for job, client in zip(jobs[::-1], clients[::-1], strict=True):  # the last first, so that none of them begins
        if not job.done():
            client.predict(api_name="/cancel")
        try:
            job.result(timeout=60)
        except Exception as error:
            told.append(str(error))
    assert sum("the studio is full: 12 jobs wait already" in message for message in told) == 3
    assert sum("Cancelled; nothing was written" in message for message in told) == QUEUE + 1
    studio.client().predict(prompt="a red circle", **SMALL, api_name="/make")  # and the studio goes on
    assert len([path for path in set(studio.made.iterdir()) - before if path.suffix == ".json"]) == 1


def test_nothing_else_on_the_machine_can_be_read(studio):
    secret = studio.folder / "secret.txt"
    for path in (secret, f"{studio.made}/../secret.txt", "/etc/passwd", studio.folder / "models" / "adapter" / "config.json"):
        assert studio.status(f"/gradio_api/file={path}") == 403, path
    client = studio.client()
    for call in (
        {"api_name": "/make", "prompt": "a star", **SMALL, "lora_1": str(secret)},
        {"api_name": "/make", "prompt": "a star", **SMALL, "model_id_or_path": str(studio.folder)},
        {"api_name": "/make", "prompt": "a star", **SMALL, "more": f"--init_image {secret}"},
        {"api_name": "/describe", "upload": None, "found": "/etc/passwd"},
        {"api_name": "/describe", "upload": None, "found": f"{studio.folder}/models/../secret.txt"},
        {"api_name": "/watch", "run": "/etc"},
        {"api_name": "/compare", "prompt": "a star", **SMALL, "columns": "checkpoint", "column_values": "", "run": str(studio.folder)},
    ):
        with pytest.raises(Exception, match=r"not below the folders|has no place here"):
            client.predict(**call)
    forged = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    answer = httpx.post(f"{studio.url}/gradio_api/call/describe", json={"data": [forged, None]}).json()
    said = httpx.get(f"{studio.url}/gradio_api/call/describe/{answer['event_id']}", timeout=60).text
    assert "event: error" in said
    assert "root:" not in said


def test_uploads_have_a_limit_and_are_looked_at_without_being_run(studio, tmp_path):
    large = tmp_path / "large.safetensors"
    large.write_bytes(bytes(1_100_000))
    with large.open("rb") as data:
        answer = httpx.post(f"{studio.url}/gradio_api/upload", files={"files": data})
    assert answer.status_code == 413
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"down_blocks.0.motion_modules.0": Evil()}))
    with pytest.raises(Exception, match=r"evil.ckpt"):
        studio.client().predict(upload=file(str(tmp_path / "evil.ckpt")), found=None, api_name="/describe")
    assert not (tmp_path / "ran").exists()


def test_a_file_is_told_and_exported_through_the_api(studio):
    client, adapter = studio.client(), str(studio.folder / "models" / "adapter")
    said, targets = client.predict(upload=None, found=adapter, api_name="/describe")
    assert "motion modules" in said
    assert "original" in str(targets)
    result = client.predict(upload=None, found=adapter, target="original (A1111, ComfyUI)", dtype="float16", api_name="/export")
    assert Path(result).stat().st_size > 100_000
    assert [path.name for path in (studio.made / "converted").iterdir()] == ["adapter-original.safetensors"]


def test_other_machines_need_the_password(tmp_path):
    server = Studio(tmp_path / "studio", "--auth", "ann:a-long-password")
    try:
        assert server.status("/config") == 401
        assert httpx.post(f"{server.url}/gradio_api/call/made", json={"data": []}).status_code == 401
        assert server.client(auth=("ann", "a-long-password")).predict(api_name="/made") == []
    finally:
        server.close()


# People


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'")
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def opened(browser, studio, **how):
    """A page on the studio; nothing may be asked of another server, and no script may fail."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **how})
    page = context.new_page()
    elsewhere, failed = [], []
    page.on("request", lambda r: None if r.url.startswith((studio.url, "data:", "blob:")) else elsewhere.append(r.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(studio.url)
    page.get_by_role("button", name="Make", exact=True).wait_for(timeout=60_000)
    page.wait_for_function("document.querySelector('#note')?.innerText.length > 5")
    yield page
    context.close()
    assert elsewhere == []
    assert failed == []


def few_steps(page) -> None:
    """Quicker, where nobody looks at the picture."""
    steps = page.locator("#steps input[type=number]")
    steps.fill("3")
    steps.blur()


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def video_of(page, before: str | None = None) -> str:
    """The address of the video that is shown, another than before, once it plays."""
    page.wait_for_function(
        "before => { const v = document.querySelector('#video video'); return v && v.currentSrc && v.currentSrc !== before"
        " && v.videoWidth > 0 && v.getVideoPlaybackQuality().totalVideoFrames > 3 && v.currentTime > 0.1 }",
        arg=before, timeout=90_000,
    )  # fmt: skip
    return page.evaluate("document.querySelector('#video video').currentSrc")


def test_somebody_makes_videos_and_goes_back_to_one(studio, browser):
    with opened(browser, studio) as page:
        few_steps(page)
        page.locator("#prompt textarea").fill("a green square on a black background")
        button(page, "Make").click()
        first = video_of(page)
        assert page.evaluate("document.querySelector('#video video').videoWidth") == 64
        page.wait_for_function("document.querySelector('#note').innerText.startsWith('Ready')")
        page.locator("#seed input").fill("77")
        button(page, "Make").click()
        second = video_of(page, first)
        pixels = lambda address: httpx.get(address).content
        assert pixels(first) != pixels(second)
        button(page, "New seed").click()
        video_of(page, second)
        assert page.locator("#seed input").input_value() != "77"

        page.locator("#prompt textarea").fill("something else")
        page.wait_for_function("document.querySelectorAll('#gallery .gallery-item, #gallery button.thumbnail-item').length >= 3")
        page.locator("#gallery button.thumbnail-item").nth(1).click()
        page.wait_for_function("!document.querySelector('#load').disabled")
        button(page, "Load these settings").click()
        page.wait_for_function("document.querySelector('textarea').value.startsWith('a green square')")
        assert page.locator("#seed input").input_value() == "77"


def test_a_wrong_size_is_told_on_the_page(studio, browser):
    studio.client().predict(prompt="a red circle", **SMALL, api_name="/make")  # it is the model that knows which sizes there are
    with opened(browser, studio) as page:
        page.locator("#width input").fill("63")
        page.wait_for_function("document.querySelector('#note').innerText.includes('width 63 is not a positive multiple')")
        button(page, "Make").click()
        page.locator(".toast-body").get_by_text("width 63 is not a positive multiple").wait_for()
        page.locator("#width input").fill("40")
        page.wait_for_function("document.querySelector('#note').innerText.includes('size')")  # what will be compiled


def test_cancel_really_stops(studio, browser):
    with opened(browser, studio) as page:
        before = len(list(studio.made.glob("*.json")))
        steps = page.locator("#steps input[type=number]")
        steps.fill("150")
        steps.blur()
        page.locator("#frames input").fill("24")
        button(page, "Make").click()
        page.get_by_text(re.compile(r"step \d+ of 150, \d+ (s|min) left")).first.wait_for(timeout=120_000)
        begun = time.monotonic()
        button(page, "Cancel").first.click()
        page.get_by_text("Stopping at the next step").wait_for()
        steps.fill("2")
        steps.blur()
        page.get_by_text("Cancelled; nothing was written").wait_for()
        button(page, "Make").click()  # the device is free again
        video_of(page)
        assert time.monotonic() - begun < 60
        assert len(list(studio.made.glob("*.json"))) == before + 1


def test_a_run_is_watched_while_it_trains(studio, browser):
    run = studio.runs / "ad-20260102-000000"
    report = a_run(run, 10)
    with opened(browser, studio) as page:
        page.get_by_role("tab", name="Watch").click()
        page.get_by_text("Update 5 of 10").wait_for(timeout=20_000)
        for step, count in ((6, 1), (8, 2), (10, 3)):  # samples come while one looks, and the newest is shown
            a_sample(run, step)
            update(report, step, 0.11)
            page.get_by_text(f"Update {step} of 10").wait_for(timeout=20_000)
            page.get_by_text(f"Samples at update {step}, {count} times").wait_for()
        page.locator("#samples img").first.wait_for()
        page.wait_for_function("document.querySelectorAll('svg.marks, .vega-embed svg, .vega-embed canvas').length >= 1")
        slider = page.locator("#at input[type=range]")
        slider.fill("2")
        page.get_by_text("Samples at update 8").wait_for()
        update(report, 11, 0.11)
        page.get_by_text("Update 11 of 10").wait_for(timeout=20_000)
        assert page.get_by_text("Samples at update 8").is_visible()  # who chose an earlier one keeps it
        page.get_by_role("button", name="Data").click()
        page.get_by_text("videos could not be used").wait_for()
    report.file.close()


@pytest.mark.parametrize(
    ("name", "width", "height", "scheme"),
    [
        ("desktop", 1280, 900, "light"),
        ("phone", 390, 844, "dark"),
        pytest.param("desktop", 1280, 900, "dark", marks=pytest.mark.soak),
        pytest.param("phone", 390, 844, "light", marks=pytest.mark.soak),
    ],
)
def test_each_tab_fits_the_screen(studio, browser, tmp_path, name, width, height, scheme):
    folder = Path(os.environ.get("STUDIO_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    with opened(browser, studio, viewport={"width": width, "height": height}, color_scheme=scheme) as page:
        if "STUDIO_SCREENSHOTS" not in os.environ:
            few_steps(page)
        for tab in ("Make", "Compare", "Watch", "Convert"):
            page.get_by_role("tab", name=tab).click()
            if tab == "Make":
                button(page, "Make").click()
                video_of(page)
                page.wait_for_function("[...document.querySelectorAll('#gallery img')].some(image => image.naturalWidth > 0)")
            elif tab == "Compare":
                button(page, "Compare").click()
                page.wait_for_function("document.querySelector('#compared video')?.currentTime > 0.2", timeout=90_000)
            elif tab == "Watch":
                page.get_by_text("clips a second").wait_for(timeout=20_000)
                page.wait_for_function("[...document.querySelectorAll('#samples img')].some(image => image.naturalWidth > 0)")
                page.wait_for_timeout(1000)
            else:
                page.locator("#found input").fill(str(studio.folder / "models" / "adapter"))
                page.locator("#found input").press("Enter")
                button(page, "What is it?").click()
                page.get_by_text("diffusers").first.wait_for(timeout=30_000)
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, f"{tab} is {wide} pixels wide"
            cut = page.evaluate(
                "() => [...document.querySelectorAll('button:not(.label-wrap)')].filter(b => b.offsetParent && b.innerText.trim()"
                " && b.scrollWidth > b.clientWidth + 2 && getComputedStyle(b).textOverflow !== 'ellipsis').map(b => b.innerText)"
            )
            assert cut == [], f"{tab}: texts of buttons are cut"
            page.screenshot(path=folder / f"{tab.lower()}-{name}-{scheme}.png", full_page=True)


def test_two_people_have_their_own_jobs(studio):
    """One's cancel leaves the other's job alone."""
    one, other = studio.client(), studio.client()
    job = one.submit(prompt="a red circle", sample_n_frames=4, num_inference_steps=100, seed=5, api_name="/make")
    deadline = time.monotonic() + 60
    while not (progress := job.status().progress_data) or "step" not in str(progress[-1].desc):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "Nothing of yours" in other.predict(api_name="/cancel")
    assert job.result(timeout=60)[2]["seed"] == 5
