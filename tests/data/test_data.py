"""Rows, clips and batches: what is left out is counted and named, what is drawn is a function of the seed."""

import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image

from anidiff_jax.config import TrainConfig
from anidiff_jax.data.ahead import in_order
from anidiff_jax.data.decode import BadVideo, fit, read_clip, window
from anidiff_jax.data.loader import Clips, Videos, batches
from anidiff_jax.data.records import Records, read_records
from anidiff_jax.data.strings import Strings
from anidiff_jax.errors import UserError
from anidiff_jax.shapes.clips import write_clips
from anidiff_jax.shapes.render import Scene, render
from anidiff_jax.video import save_mp4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, 6, seed=1)
    return folder


def tokenize(caption):
    return np.full(4, len(caption), np.int32)


def clips_of(records, **config):
    settings = TrainConfig(**{"sample_size": 16, "sample_n_frames": 4, "text_dropout_rate": 0.0, **config})
    return Clips(records, settings.seed, Videos(records, settings, tokenize))


def test_csv_formats(folder, tmp_path):
    plain = read_records(str(folder / "clips.csv"), str(folder))
    assert len(plain) == 6
    videoid = tmp_path / "v.csv"
    rows = [f"{name.removesuffix('.mp4')},{caption}" for name, caption in zip(plain.names, plain.captions, strict=True)]
    videoid.write_text("\n".join(["videoid,name", *rows]))
    assert read_records(str(videoid), str(folder)) == plain
    url = tmp_path / "u.csv"
    row = f'1,https://h/a/b/{plain.names[0]},PT1S,x,"a cat, a dog"\n2,{plain.names[1]},PT1S,x,short\n\n3,,PT1S,x,no file\n'
    url.write_text("videoid,contentUrl,duration,page_dir,name,note\n" + row, "utf-8-sig")  # no row has a note
    found = read_records(str(url), str(folder))
    assert (found.names, found.captions) == (plain.names[:2], ["a cat, a dog", "short"])


@pytest.mark.parametrize("columns", ["name,contentUrl", "name,videoid"])
def test_rows_never_lead_out_of_the_folder(folder, tmp_path, caplog, columns):
    shutil.copyfile(next(folder.glob("*.mp4")), tmp_path / "secret.mp4")
    inside = tmp_path / "videos"
    inside.mkdir()
    shutil.copyfile(next(folder.glob("*.mp4")), inside / "a.mp4")
    suffix = ".mp4" if "Url" in columns else ""
    rows = [f"a cat,{place}{suffix}" for place in ("../secret", f"{tmp_path}/secret", "..", "x/../../secret", "a")]
    (tmp_path / "c.csv").write_text("\n".join([columns, *rows]))
    with caplog.at_level(logging.WARNING):
        assert list(read_records(str(tmp_path / "c.csv"), str(inside)).names) == ["a.mp4"]
    assert "4 of 5 rows" in caplog.text
    assert "secret" in caplog.text


def test_captions_beside_the_videos(folder, tmp_path):
    for name in ("b.mp4", "a.mp4", "c.mp4"):
        shutil.copyfile(next(folder.glob("*.mp4")), tmp_path / name)
    with pytest.raises(UserError, match="no video has a"):
        read_records(None, str(tmp_path))
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.txt").write_text("two")
    assert read_records(None, str(tmp_path)) == Records(tmp_path, ["a.mp4", "b.mp4"], ["one", "two"])


def test_a_name_that_is_not_in_utf_8_is_left_out(folder, tmp_path, caplog):
    video = next(folder.glob("*.mp4"))
    shutil.copyfile(video, tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_text("one")
    for ending in (b".mp4", b".txt"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9" + ending)).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert list(read_records(None, str(tmp_path)).names) == ["a.mp4"]
    assert "2 names in" in caplog.text
    assert r"'caf\udce9.mp4'" in caplog.text


def test_rows_without_a_file_are_counted(folder, tmp_path, caplog):
    path = tmp_path / "c.csv"
    path.write_text((folder / "clips.csv").read_text() + "gone,gone.mp4\nlost,lost.mp4\n")
    with caplog.at_level(logging.WARNING):
        assert len(read_records(str(path), str(folder))) == 6
    assert "2 of 8 rows" in caplog.text
    assert "gone.mp4" in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a red circle,x.mp4\n", "must name the columns name,contentUrl"),
        ("", "must name the columns"),
        ("name,contentUrl\n", "it has no rows"),
        ("name,contentUrl\nx,y.mp4\n", "none of its 1 videos lies in"),
        (b"name,contentUrl\n\xff\xfe\n", "cannot be read as csv"),
        ('name,contentUrl\nx,y.mp4\n"wow a cat,z.mp4\nx,y.mp4\n', "line 3 cannot be read as csv .unexpected end of data"),
        ('name,contentUrl\n"wow a cat,y.mp4\n"one, two",y.mp4\n', "line 2 cannot be read as csv"),
    ],
)
def test_an_unusable_csv_is_an_error_at_once(folder, tmp_path, text, words):
    path = tmp_path / "c.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words):
        read_records(str(path), str(folder))


def test_exactly_n_rows_are_drawn(folder):
    records = read_records(str(folder / "clips.csv"), str(folder))
    drawn = records.drawn(3, seed=5)
    assert len(drawn) == 3
    assert drawn == records.drawn(3, seed=5)
    assert any(records.drawn(3, seed=s) != drawn for s in range(10))
    assert len(records.drawn(100, seed=5)) == 6


def test_window():
    rng = np.random.default_rng(0)
    for _ in range(20):
        chosen = window(100, 16, 4, rng)
        assert set(np.diff(chosen)) == {4}
        assert chosen[0] >= 0
        assert chosen[-1] <= 99
    spread = window(24, 16, 4, rng)  # shorter than 61 frames: all of it
    assert (spread[0], spread[-1]) == (0, 23)
    assert len({tuple(window(70, 16, 4, np.random.default_rng(s))) for s in range(100)}) == 10
    with pytest.raises(BadVideo, match="has 15 frames, a clip needs 16"):
        window(15, 16, 4, rng)


def test_clips_have_the_frames_the_stride_and_the_size_that_are_asked_for(tmp_path):
    """The video's frames say which they are: frame i has the grey 5 · i."""
    grey = np.arange(50, dtype=np.uint8)[:, None, None, None] * 5
    save_mp4(np.broadcast_to(grey, (50, 32, 64, 3)), tmp_path / "a.mp4")
    for frames, stride, size in ((4, 3, "16x24"), (6, 5, "24"), (5, 1, "16")):
        clips = clips_of(Records(tmp_path, ["a.mp4"], ["a"]), sample_n_frames=frames, sample_stride=stride, sample_size=size)
        starts = set()
        for i in range(8):
            pixels = clips(i, 0)["pixels"]
            height, width = (int(side) for side in (size.split("x") * 2)[:2])
            assert pixels.shape == (frames, height, width, 3)
            chosen = np.round(pixels.mean((1, 2, 3)) / 5)
            assert set(np.diff(chosen)) == {stride}
            starts.add(chosen[0])
        assert len(starts) > 1


@pytest.mark.parametrize("threads", [1, 3])
def test_as_many_threads_read_as_are_asked_for(threads):
    """Each reader waits for others to be there: only so many come."""
    here, most, lock, meet = 0, 0, threading.Lock(), threading.Event()

    def source(row, rng):
        nonlocal here, most
        with lock:
            here += 1
            most = max(most, here)
            if here > threads:
                meet.set()
        meet.wait(0.2)
        with lock:
            here -= 1
        return {"pixels": np.zeros(1)}

    next(batches(Clips(Records(None, ["a"] * 8, [""] * 8), 0, source), 8, threads))
    assert most == threads


def test_frames_are_those_of_the_video(tmp_path):
    true = render(Scene("square", "red", "white", size=0.2, velocity=(0.02, 0.0)), 24, 64)
    save_mp4(true, tmp_path / "a.mp4")
    frames = read_clip(tmp_path / "a.mp4", lambda n: np.array([0, n // 2, n - 1]))
    assert np.abs(frames.astype(int) - true[[0, 12, 23]]).mean() < 4
    wide = np.concatenate([true, np.zeros_like(true[:, :, :32])], 2)  # 64 × 96
    np.testing.assert_array_equal(fit(wide, 64, 64), wide[:, :, 16:80])
    np.testing.assert_array_equal(fit(wide, 32, 96), wide[:, 16:48])
    assert fit(wide, 32, 48).shape == (24, 32, 48, 3)
    assert np.abs(fit(wide, 32, 48)[0, :, :, 0].mean() - wide[0, :, :, 0].mean()) < 2


def test_bad_videos_are_left_out_counted_and_named(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    names = sorted(p.name for p in tmp_path.glob("*.mp4"))
    (tmp_path / names[0]).write_bytes((tmp_path / names[0]).read_bytes()[:900])
    (tmp_path / names[1]).write_bytes(b"")
    (tmp_path / names[2]).write_text("<html>not found</html>")
    save_mp4(np.zeros((2, 64, 64, 3), np.uint8), tmp_path / names[3], replace=True)
    clips = clips_of(read_records(str(tmp_path / "clips.csv"), str(tmp_path)))
    with caplog.at_level(logging.WARNING):
        stream = batches(clips, 2)
        seen = {int(row) for _ in range(6) for row in next(stream)["row"]}
    assert seen == {4, 5}
    assert set(clips.skipped) == {0, 1, 2, 3}
    assert all(name in caplog.text for name in names[:4])
    assert "2 frames" in clips.skipped[3]


def test_damage_of_every_kind_is_a_bad_video(folder, tmp_path):
    """Truncated behind a header in front, garbled frames, a picture with the name of a video."""
    good = next(folder.glob("*.mp4"))
    front = tmp_path / "front.mp4"
    subprocess.run([get_ffmpeg_exe(), "-v", "error", "-i", good, "-c", "copy", "-movflags", "faststart", front], check=True)
    read_clip(front, lambda n: np.arange(n))
    whole = front.read_bytes()
    front.write_bytes(whole[: len(whole) * 2 // 3])
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    (tmp_path / "picture.png").rename(tmp_path / "picture.mp4")
    subprocess.run([get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", "sine=d=1", tmp_path / "sound.mp4"], check=True)
    for name in ("front.mp4", "picture.mp4", "sound.mp4"):
        with pytest.raises(BadVideo):
            read_clip(tmp_path / name, lambda n: window(n, 16, 1, np.random.default_rng(0)))


def test_a_reader_that_finds_no_frames_is_a_bad_video(folder, monkeypatch):
    """decord says so by an assertion of its own."""
    from anidiff_jax.data import decode

    def no_frames(path, choose):
        raise AssertionError("Invalid frame count: 0")

    monkeypatch.setattr(decode, "_with_decord", no_frames)
    with pytest.raises(BadVideo, match="Invalid frame count"):
        read_clip(next(folder.glob("*.mp4")), lambda n: np.arange(n))


def test_a_disk_that_fails_is_not_the_videos_fault(folder, tmp_path, monkeypatch):
    """It would be left out for good, as would all others; the run ends with one line, and can be gone on with."""
    from anidiff_jax.data import decode

    def fails(path, choose):
        raise RuntimeError("cannot open the file")

    def stale(self, *_, **__):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))

    monkeypatch.setattr(decode, "_with_decord", fails)
    with pytest.raises(BadVideo):
        read_clip(tmp_path / "missing.mp4", lambda n: np.arange(n))
    monkeypatch.setattr(Path, "open", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        read_clip(next(folder.glob("*.mp4")), lambda n: np.arange(n))


@pytest.mark.parametrize("reader", ["decord", "imageio"])
def test_parts_of_a_video_are_all_of_it(folder, monkeypatch, reader):
    """As many frames at a time as there is memory for, from one reading of the file."""
    from anidiff_jax.data import decode

    good = next(folder.glob("*.mp4"))
    whole = read_clip(good, lambda n: np.arange(n))
    if reader == "imageio":
        monkeypatch.setattr(decode, "decord", None)
    monkeypatch.setattr(decode, "BYTES_AT_ONCE", 5 * whole[0].nbytes)
    parts = list(decode.read_parts(good))
    assert max(map(len, parts)) == 5
    np.testing.assert_allclose(np.concatenate(parts).astype(int), whole, atol=3 * (reader == "imageio"))


def test_the_other_reader_gives_the_same_frames(folder, monkeypatch):
    from anidiff_jax.data import decode

    good = next(folder.glob("*.mp4"))
    chosen = lambda n: np.array([0, n // 2, n - 1])
    expected = read_clip(good, chosen)
    monkeypatch.setattr(decode, "decord", None)
    np.testing.assert_allclose(read_clip(good, chosen).astype(int), expected, atol=3)
    with pytest.raises(BadVideo):
        read_clip(folder / "clips.csv", chosen)


def test_a_video_that_hangs_the_decoder_is_named(folder, monkeypatch, caplog):
    """While it hangs, once; a video that is read in time is not named, neither is one that fails."""
    from anidiff_jax.data import decode

    records, release = read_records(str(folder / "clips.csv"), str(folder)), threading.Event()
    real, hangs = decode._with_decord, folder / records.names[2]

    def decoder(path, choose):
        if path == hangs:
            assert release.wait(30)
        return real(path, choose)

    monkeypatch.setattr(decode, "_with_decord", decoder)
    said = lambda: [record.getMessage() for record in caplog.records if "silent" in record.getMessage()]
    clips = clips_of(records)
    with pytest.raises(BadVideo):
        read_clip(folder / "clips.csv", lambda n: np.arange(n))
    clips(0, 0)
    monkeypatch.setattr(decode, "PATIENCE", 1.0)
    thread = threading.Thread(target=clips, args=(1, 2))
    thread.start()
    for _ in range(200):
        if said():
            break
        time.sleep(0.05)
    assert thread.is_alive()
    release.set()
    thread.join()
    (line,) = said()
    assert line.startswith(f"{hangs}: its decoder has been silent for 1 s")
    assert "--check_data true" in line
    assert not clips.skipped


def test_a_folder_of_bad_videos_is_an_error_not_a_hang(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="no video of"):
        next(batches(clips_of(Records(tmp_path, ["a.mp4", "b.mp4"], ["", ""])), 2))


def test_batches_are_a_function_of_the_seed(folder):
    records = read_records(str(folder / "clips.csv"), str(folder))

    def run(threads, seed=3, count=4, **config):
        stream = batches(clips_of(records, seed=seed, **config), 3, threads)
        return [next(stream) for _ in range(count)]

    one, four = run(1), run(4)
    for a, b in zip(one, four, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    rows = np.concatenate([batch["row"] for batch in one])
    assert set(rows[:6]) == set(rows[6:]) == set(range(6))  # every pass sees every clip
    assert list(rows[:6]) != list(rows[6:])
    assert list(np.concatenate([batch["index"] for batch in one])) == list(range(12))
    assert any((a["pixels"] != b["pixels"]).any() for a, b in zip(one, run(1, seed=4), strict=True))


def test_updates_follow_from_the_seed_and_their_number(folder, tmp_path):
    """Gone on with in the middle, or shared by processes: the same clips, with one video in three unusable."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    records = read_records(str(tmp_path / "clips.csv"), str(tmp_path))
    for name in records.names[:2]:
        (tmp_path / name).write_bytes(b"")
    fields = lambda batch: [batch[name] for name in ("index", "row", "pixels")]
    stream = batches(clips_of(records), 4)
    whole = [fields(next(stream)) for _ in range(6)]
    assert all(set(row) <= {2, 3, 4, 5} for _, row, _ in whole)
    later = batches(clips_of(records), 4, 2, first=3)
    shares = [batches(clips_of(records), 4, 1, 0, process, 2) for process in (0, 1)]
    for i, expected in enumerate(whole):
        shared = [np.concatenate(parts) for parts in zip(*(fields(next(share)) for share in shares), strict=True)]
        for a, b in zip(shared, expected, strict=True):
            np.testing.assert_array_equal(a, b)
        if i >= 3:
            for a, b in zip(fields(next(later)), expected, strict=True):
                np.testing.assert_array_equal(a, b)


def test_a_validation_share(folder):
    records = read_records(str(folder / "clips.csv"), str(folder))
    rest, share = records.parted(0.3, seed=1)
    assert (len(rest), len(share)) == (4, 2)
    assert {*rest.names, *share.names} == {*records.names}
    assert records.parted(0.3, seed=1)[1] == share
    assert len(records.parted(0.01, seed=1)[1]) == len(records.parted(0.99, seed=1)[0]) == 1
    with pytest.raises(UserError, match="cannot be parted"):
        Records(folder, ["a.mp4"], ["a"]).parted(0.5, 1)


def test_strings():
    texts = ["", "a", "zwölf Boxkämpfer", "東京", "x" * 1000]
    packed = Strings(texts)
    assert list(packed) == texts
    assert packed == texts
    assert packed[-1] == texts[-1]
    assert packed[1:4] == texts[1:4]
    with pytest.raises(IndexError):
        packed[5]


def test_captions_and_flips(folder):
    records = read_records(str(folder / "clips.csv"), str(folder))
    never, always = clips_of(records, random_flip=False), clips_of(records, random_flip=True)
    flipped = [(never(i, 0)["pixels"][:, :, ::-1] == always(i, 0)["pixels"]).all() for i in range(20)]
    kept = [(never(i, 0)["pixels"] == always(i, 0)["pixels"]).all() for i in range(20)]
    assert 4 < sum(flipped) < 16
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    dropped = [clips_of(records, text_dropout_rate=0.5)(i, 0)["ids"][0] == 0 for i in range(40)]
    assert 10 < sum(dropped) < 30
    assert not any(never(i, 0)["ids"][0] == 0 for i in range(10))


@pytest.mark.soak
def test_ten_million_rows(tmp_path):
    """In a process of its own, so that its memory can be measured: less than a minute, less than 4 GB."""
    names = [f"{i}.mp4" for i in range(1000)]
    for name in names:
        (tmp_path / name).touch()
    with (tmp_path / "clips.csv").open("w") as file:
        file.write("name,contentUrl\n")
        for i in range(10_000_000):
            file.write(f"a caption of about sixty letters as they are found on the web {i},https://host/path/{names[i % 1000]}\n")
    program = f"""
import resource, time
start = time.monotonic()
from anidiff_jax.data.records import read_records
records = read_records({str(tmp_path / "clips.csv")!r}, {str(tmp_path)!r})
print(len(records), time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, records.captions[9_999_999][-7:])
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) == 10_000_000
    assert float(out[1]) < 60
    assert float(out[2]) < 4
    assert out[3] == "9999999"


def test_work_is_done_in_order_and_not_far_ahead():
    begun = []
    results = in_order(lambda i: begun.append(i) or i * i, range(1000), 3)
    assert next(results) == 0
    assert len(begun) <= 5
    assert list(results) == [i * i for i in range(1, 1000)]
