"""anidiff-jax and PyTorch diffusers, side by side in one run on this machine, at full size (SD 1.5, v2 adapter, random weights).

    make bench                                                     # the suite of this machine's kind
    python benchmarks/run.py --suite cpu --only forward vae_decode # some cases, float32, 256² × 16 frames
    python benchmarks/run.py --suite gpu                           # bfloat16, 256² and 512² × 16 frames; ten minutes on an H100

Each side of a case runs in a process of its own, the sides alternating, --rounds times; the first call of a process is not counted. Both
get the same weights and inputs, and what they compute is compared. Floating-point operations are counted from our model, for both sides
alike, and set against the machine's own peak: the faster of the two sides' products of large matrices. Results: one JSON a case in
benchmarks/results/, and all of a suite as a table in benchmarks/results/<suite>.md. Needs pip install -e '.[test]'.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.full_size import WORK, Shape, make_model  # noqa: E402

RESULTS = HERE / "results"
SUITES = {
    "cpu": {
        "sizes": [256], "dtype": "float32", "sides": ["ours", "theirs"], "repeats": 2,
        "cases": ["matmul", "forward", "cfg_step", "vae_encode", "vae_decode", "train_full_checkpointing", "train_lora_checkpointing"],
    },
    "gpu": {
        "sizes": [256, 512], "dtype": "bfloat16", "sides": ["ours", "theirs", "theirs_compiled"], "repeats": 5,
        "cases": ["matmul", "forward", "sample_25", "sample_4", "vae_encode", "vae_decode", "train_lora", "train_lora_checkpointing",
                  "train_full", "train_full_checkpointing", "train_lora_4"],
    },
}  # fmt: skip
NAMES = {"ours": "anidiff-jax", "theirs": "PyTorch diffusers", "theirs_compiled": "the same, torch.compile"}


def measure(side: str, case: str, shape: Shape, repeats: int) -> dict:
    """One side of one case in this process: {seconds of each call, first call, peaks, operations}; what it computed goes to a file."""
    if side == "ours":
        from benchmarks import ours as module

        versions = module.start()
        idle, begun = peak_gb(), time.perf_counter()
        run, flops = module.CASES[case](shape)
    else:
        from benchmarks import theirs as module

        versions, flops = module.start(side == "theirs_compiled"), None
        idle, begun = peak_gb(), time.perf_counter()
        run = module.CASES[case](shape)
    prepared, seconds = time.perf_counter() - begun, []
    for i in range(repeats + 1):
        begun = time.perf_counter()
        output = run()
        seconds.append(time.perf_counter() - begun)
        if i == 0:
            np.save(WORK / f"{side}.npy", np.asarray(output, np.float32))
    return {
        "prepare": prepared, "first": seconds[0], "seconds": seconds[1:], "peak_gb": peak_gb() - idle, "flops": flops,
        "device_gb": module.peak_device_gb(), "versions": versions,
    }  # fmt: skip


def peak_gb() -> float:
    """The most memory that this process has held; Linux's own mark, since getrusage's begins with that of the parent."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def side_by_side(case: str, shape: Shape, suite: dict, rounds: int) -> dict:
    """The sides of a case, alternating."""
    found: dict[str, list[dict]] = {side: [] for side in suite["sides"]}
    for _ in range(rounds):
        for side in found:
            words = ["--side", side, "--case", case, "--size", shape.size, "--frames", shape.frames, "--dtype", shape.dtype]
            words += ["--repeats", suite["repeats"]]
            done = subprocess.run([sys.executable, __file__, *map(str, words)], stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
            if done.returncode:
                print(f"{case}: {side} failed with {done.returncode}", flush=True)
                continue
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{case}, {shape.size}², {side}:", " ".join(f"{s:.3f}" for s in found[side][-1]["seconds"]), "s", flush=True)
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
    outputs = {side: np.load(WORK / f"{side}.npy") for side in result["sides"]}
    if case != "matmul" and {"ours", "theirs"} <= outputs.keys():
        ours, theirs = outputs["ours"], outputs["theirs"]
        result["difference"] = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    return result


def table(suite: str) -> str:
    """All results of a suite as Markdown."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"bench-{suite}-[!o]*.json"))]
    order = {case: i for i, case in enumerate(SUITES[suite]["cases"])}
    results.sort(key=lambda r: (r["shape"]["size"], order.get(r["case"], 99)))
    if not results:
        return ""
    peak = max((s["tflops"] for r in results if r["case"] == "matmul" for s in r["sides"].values()), default=None)
    machines, versions = sorted({r["machine"] for r in results}), {k: v for r in results for k, v in r["versions"].items()}
    said = ", ".join(f"{k} {v}" for k, v in versions.items() if k not in ("device", "platform"))
    lines = [f"{'; '.join(machines)}; {said}", "", f"`python benchmarks/run.py --suite {suite}`; {SUITES[suite]['dtype']}, 16 frames.", ""]
    lines += ["| case | | seconds (median) | least–most | memory | first call | TFLOP/s | of the peak | speed | difference |"]
    lines += ["|" + "---|" * 10]
    for r in results:
        for side, s in r["sides"].items():
            speed = f"**{r['sides']['theirs']['seconds'] / s['seconds']:.2f}**" if side == "ours" and "theirs" in r["sides"] else ""
            of_peak = f"{100 * s['tflops'] / peak:.0f} %" if s["tflops"] and peak else ""
            rate = f"{s['tflops']:.3g}" if s["tflops"] else ""
            different = f"{r['difference']:.0e}" if side == "ours" and "difference" in r else ""
            name = f"{r['case']}, {r['shape']['size']}²" if side == "ours" else ""
            lines.append(
                f"| {name} | {NAMES[side]} | {s['seconds']:.3g} | {s['least']:.3g}–{s['most']:.3g} | {s['memory_gb']:.1f} GB "
                f"| {s['first'] + s['prepare']:.0f} s | {rate} | {of_peak} | {speed} | {different} |"
            )
    lines += [
        "", "Memory: the process's highest mark above what its libraries take (on a GPU the device's). First call: loading, compiling",
        "and the call itself. Speed: PyTorch's median through ours. Difference: the largest, of the largest value; of training, of the",
        "first loss. Of the VAE, ours holds the whole pipeline in memory, PyTorch's side the VAE alone.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, help="not given: that of this machine")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="some cases, those outside the suite too")
    parser.add_argument("--rounds", type=int, default=2, help="alternations of the sides")
    for name, of in (("side", str), ("case", str), ("size", int), ("frames", int), ("dtype", str), ("repeats", int)):
        parser.add_argument(f"--{name}", type=of, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.case, Shape(args.size, args.frames, args.dtype), args.repeats)))
        return
    make_model()
    suite = args.suite or ("gpu" if has_gpu() else "cpu")
    settings = SUITES[suite]
    sizes = [args.size] if args.size else settings["sizes"]
    RESULTS.mkdir(exist_ok=True)
    for size in sizes:
        for case in args.only or settings["cases"]:
            shape = Shape(size, args.frames or 16, args.dtype or settings["dtype"])
            result = {**side_by_side(case, shape, settings, args.rounds), "machine": machine()}
            if result["sides"]:
                other = "".join(f"-{value}" for value in (args.frames, args.dtype) if value)
                (RESULTS / f"bench-{suite}{'-other' if other else ''}-{case}-{size}{other}.json").write_text(
                    json.dumps(result, indent=2) + "\n"
                )
    text = table(suite)
    (RESULTS / f"{suite}.md").write_text(text)
    print(text)


def has_gpu() -> bool:
    """Asked in a process of its own, which lets go of the device."""
    ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(ask, stdout=subprocess.PIPE, text=True).stdout.strip() == "gpu"


def machine() -> str:
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores, {names[0] if names else platform.processor()}"


if __name__ == "__main__":
    main()
