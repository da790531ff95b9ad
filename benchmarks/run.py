"""anidiff-jax and PyTorch diffusers, side by side in one run on this machine, at full size (SD 1.5, v2 adapter, random weights).

    make bench                                                     # the suite of this machine's kind
    python benchmarks/run.py --suite cpu --only forward vae_decode # some cases, float32, 256² × 16 frames
    python benchmarks/run.py --suite gpu                           # sampling: bfloat16, 512² × 16 frames
    python benchmarks/run.py --suite gpu_training                  # updates with checkpointing: bfloat16, 512² × 16 frames
    python benchmarks/run.py --suite gpu_training --size 256       # the same at 256²: compiling takes minutes, so each size is a run
    python benchmarks/run.py --suite gpu_training --only train_lora # one without

Each side of a case runs in a process of its own; the first call, which compiles, is not counted. On a CPU, where both sides do not fit into
memory, processes follow each other, --rounds times. On a GPU, where compiling takes longer than what is measured, the sides compile beside
each other and are then called in turn. Both get the same weights and inputs, and what they compute is compared. Floating-point operations
are counted from our model, for both sides alike, and set against the machine's own peak: the faster of the two sides' products of large
matrices. Results: one JSON a case in benchmarks/results/, and all of a suite as a table in benchmarks/results/<suite>.md. Needs pip install
-e '.[test]'.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.full_size import WORK, Shape, make_model, on_cpu  # noqa: E402

RESULTS = HERE / "results"
GPU = {"dtype": "bfloat16", "sides": ["ours", "theirs", "theirs_compiled"], "repeats": 3, "rounds": 3, "beside": True}
SUITES = {
    "cpu": {
        "sizes": [256], "dtype": "float32", "sides": ["ours", "theirs"], "repeats": 2, "rounds": 2, "beside": False,
        "cases": ["matmul", "forward", "cfg_step", "vae_encode", "vae_decode", "train_full_checkpointing", "train_lora_checkpointing"],
    },
    "gpu": {**GPU, "sizes": [512], "cases": ["matmul", "sample_25", "sample_4", "vae_encode", "vae_decode"]},
    "gpu_training": {**GPU, "sizes": [512], "cases": ["train_lora_checkpointing", "train_full_checkpointing"]},
}  # fmt: skip
NAMES = {"ours": "anidiff-jax", "theirs": "PyTorch diffusers", "theirs_compiled": "the same, torch.compile"}


def measure(side: str, case: str, shape: Shape) -> None:
    """One side of a case, in this process: prints what its first call took, and then, for each number that it is given, that of so many
    calls. What the first call computed goes to a file; of sampling, whose first call is a video of one step, what the last computed."""
    if side == "ours":
        from benchmarks import ours as module

        versions = module.start()
    else:
        from benchmarks import theirs as module

        versions = module.start(side == "theirs_compiled")
    idle, begun = peak_gb(), time.perf_counter()
    made = module.CASES[case](shape)
    run, flops = made if side == "ours" else (made, None)
    prepared, begun = time.perf_counter() - begun, time.perf_counter()
    samples = case.startswith("sample")
    keep = lambda found: np.save(output_of(side, case), np.asarray(found, np.float32))
    keep(run(1) if samples else run())
    said = {"prepare": prepared, "first": time.perf_counter() - begun, "flops": flops, "versions": versions}
    print(json.dumps(said), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            begun = time.perf_counter()
            found = run()
            seconds.append(time.perf_counter() - begun)
            if samples:
                keep(found)
        print(json.dumps({"seconds": seconds, "peak_gb": peak_gb() - idle, "device_gb": module.peak_device_gb()}), flush=True)


def output_of(side: str, case: str) -> Path:
    return WORK / f"{side}-{case}.npy"


def peak_gb() -> float:
    """The most memory that this process has held; Linux's own mark, since getrusage's begins with that of the parent."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


class Side:
    """A process that measures one side of a case."""

    def __init__(self, side: str, case: str, shape: Shape):
        self.name, self.found = f"{case}, {shape.size}², {side}", {"seconds": []}
        words = ["--side", side, "--only", case, "--size", shape.size, "--frames", shape.frames, "--dtype", shape.dtype]
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # a GPU is not ours alone
        self.process = subprocess.Popen(
            [sys.executable, __file__, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE.parent,
            env=environment,
        )  # fmt: skip

    def hear(self) -> bool:
        """Waits for what the process says next; False where it has ended."""
        assert self.process.stdout is not None
        said = next((json.loads(line) for line in self.process.stdout if line.startswith("{")), None)
        if said is None:
            print(f"{self.name}: failed with {self.process.wait()}", flush=True)
            return False
        if new := said.pop("seconds", []):
            print(f"{self.name}:", " ".join(f"{s:.3f}" for s in new), "s", flush=True)
        else:
            print(f"{self.name}: ready after {said['prepare'] + said['first']:.0f} s", flush=True)
        self.found |= {**said, "seconds": self.found["seconds"] + new}
        return True

    def call(self, times: int) -> bool:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and says nothing more
            print(times, file=self.process.stdin, flush=True)
        return self.hear()

    def end(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def side_by_side(case: str, shape: Shape, suite: dict, rounds: int) -> Iterator[dict]:
    """The sides of a case, called in turn: after each round what is known of it, so that a run that is cut short leaves something."""
    found: dict[str, list[dict]] = {side: [] for side in suite["sides"]}
    for side in suite["sides"]:
        output_of(side, case).unlink(missing_ok=True)
    if suite["beside"]:
        started = {name: Side(name, case, shape) for name in found}
        try:
            sides = {name: side for name, side in started.items() if side.hear()}
            for _ in range(rounds):
                sides = {name: side for name, side in sides.items() if side.call(suite["repeats"])}
                found |= {name: [side.found] for name, side in sides.items()}
                yield summary(case, shape, found)
        finally:
            for side in started.values():
                side.end()
        return
    for _ in range(rounds):
        for name in found:
            side = Side(name, case, shape)
            if side.hear() and side.call(suite["repeats"]):
                found[name].append(side.found)
            side.end()
        yield summary(case, shape, found)


def summary(case: str, shape: Shape, found: dict[str, list[dict]]) -> dict:
    result = {"case": case, "shape": vars(shape), "load": round(os.getloadavg()[0], 1), "sides": {}, "versions": {}}
    flops = next((run["flops"] for run in found["ours"] if run["flops"]), None)
    for side, runs in found.items():
        if not runs:
            continue
        seconds = sorted(s for run in runs for s in run["seconds"])
        median = statistics.median(seconds)
        memory = max(run["device_gb"] or run["peak_gb"] for run in runs)
        result["versions"] |= runs[0]["versions"]
        result["sides"][side] = {
            "seconds": median, "least": seconds[0], "most": seconds[-1], "prepare": min(run["prepare"] for run in runs),
            "first": min(run["first"] for run in runs), "memory_gb": memory, "tflops": flops / median / 1e12 if flops else None,
        }  # fmt: skip
    result["flops"] = flops
    if case != "matmul" and {"ours", "theirs"} <= result["sides"].keys():
        ours, theirs = (np.load(output_of(side, case)) for side in ("ours", "theirs"))
        result["difference"] = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    return result


def table(suite: str) -> str:
    """All results of a suite as Markdown."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"bench-{suite}-[!o]*.json"))]
    order = {case: i for i, case in enumerate(SUITES[suite]["cases"])}
    results.sort(key=lambda r: (r["shape"]["size"], order.get(r["case"], 99)))
    if not results:
        return ""
    products = [json.loads(path.read_text()) for path in RESULTS.glob(f"bench-{suite.split('_')[0]}-matmul-*.json")]
    peak = max((s["tflops"] for r in products for s in r["sides"].values()), default=None)
    machines, versions = sorted({r["machine"] for r in results}), {k: v for r in results for k, v in r["versions"].items()}
    said = ", ".join(f"{k} {v}" for k, v in versions.items() if k not in ("device", "platform"))
    short = lambda seconds: f"{seconds:.3g}" if seconds < 999.5 else f"{seconds:.0f}"
    words = "with `--rounds`, `--repeats`, `--size` and `--only` as README says"
    how = f"`python benchmarks/run.py --suite {suite}`, {words}; {SUITES[suite]['dtype']}, 16 frames."
    lines = [f"{'; '.join(machines)}; {said}", "", how, ""]
    lines += ["| case | | seconds (median) | least–most | memory | first call | TFLOP/s | of the peak | speed | difference |"]
    lines += ["|" + "---|" * 10]
    for r in results:
        for side, s in r["sides"].items():
            others = [other["seconds"] for name, other in r["sides"].items() if name != "ours"]
            speed = f"**{min(others) / s['seconds']:.2f}**" if side == "ours" and others else ""
            of_peak = f"{100 * s['tflops'] / peak:.0f} %" if s["tflops"] and peak else ""
            rate = f"{s['tflops']:.3g}" if s["tflops"] else ""
            different = f"{r['difference']:.0e}" if side == "ours" and "difference" in r else ""
            name = f"{r['case']}, {r['shape']['size']}²" if side == "ours" else ""
            lines.append(
                f"| {name} | {NAMES[side]} | {short(s['seconds'])} | {short(s['least'])}–{short(s['most'])} | {s['memory_gb']:.1f} GB "
                f"| {s['first'] + s['prepare']:.0f} s | {rate} | {of_peak} | {speed} | {different} |"
            )
    lines += [
        "", "Memory: the process's highest mark above what its libraries take; on a GPU the device's.",
        "First call: loading, compiling and the call itself (for a video, one of one step), on a GPU beside others. Speed: the",
        "faster of PyTorch's medians through ours. Difference: the largest, of the largest value; of training, of the first loss.",
        "Of the VAE, ours holds the whole pipeline in memory, PyTorch's side the VAE alone. Operations are those of plain",
        "convolutions: where ours does fewer (Winograd's, and of doubled images), it passes the peak.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, help="not given: that of this machine")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="some cases, those outside the suite too")
    parser.add_argument("--rounds", type=int, help="alternations of the sides; not given: the suite's")
    parser.add_argument("--repeats", type=int, help="calls of each side in a round, after the first; not given: the suite's")
    parser.add_argument("--size", type=int, help="pixels a side; not given: the suite's sizes")
    for name, of in (("side", str), ("frames", int), ("dtype", str)):
        parser.add_argument(f"--{name}", type=of, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        measure(args.side, args.only[0], Shape(args.size, args.frames, args.dtype))
        return
    make_model()
    suite = args.suite or ("gpu" if has_gpu() else "cpu")
    settings = SUITES[suite] | ({"repeats": args.repeats} if args.repeats else {})
    sizes = [args.size] if args.size else settings["sizes"]
    RESULTS.mkdir(exist_ok=True)
    cases = args.only or settings["cases"]
    shapes = [Shape(size, args.frames or 16, args.dtype or settings["dtype"]) for size in sizes]
    if any(case.startswith("train") for case in cases):
        for shape in shapes:
            on_cpu(f"from benchmarks.ours import Shape, write_draws; write_draws({shape!r})")
    for shape in shapes:
        for case in cases:
            for result in side_by_side(case, shape, settings, args.rounds or settings["rounds"]):
                if result["sides"]:
                    other = "".join(f"-{value}" for value in (args.frames, args.dtype) if value)
                    name = f"bench-{suite}{'-other' if other else ''}-{result['case']}-{shape.size}{other}.json"
                    result["machine"] = "; ".join([result["versions"]["device"]] * (suite != "cpu") + [machine()])
                    (RESULTS / name).write_text(json.dumps(result, indent=2) + "\n")
                    (RESULTS / f"{suite}.md").write_text(table(suite))
    print(table(suite))


def has_gpu() -> bool:
    """Asked in a process of its own, which lets go of the device."""
    ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(ask, stdout=subprocess.PIPE, text=True).stdout.strip() == "gpu"


def machine() -> str:
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores, {names[0] if names else platform.processor()}"


if __name__ == "__main__":
    main()
