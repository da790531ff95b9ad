"""Where a case's time goes, by kind of layer and by phase, from XLA's own profile of one call.

    python benchmarks/profiling.py forward
    python benchmarks/profiling.py train_full_checkpointing --size 256

Every operation of the compiled program carries the path of the module that asked for it, and is counted under that; what the backward
pass computes a second time (gradient checkpointing) is a phase of its own. Results in benchmarks/results/profile-cpu-<case>-<size>.json,
all as a table in profile-cpu.md. CPU only: a GPU's own profiler says more. Needs pip install -e '.[test]'.
"""

import argparse
import collections
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.full_size import Shape, make_model  # noqa: E402
from benchmarks.run import RESULTS, machine  # noqa: E402

KINDS = {  # the first that is found in an operation's path
    "convolutions": r"/(conv\w*|downsamplers\.\d|upsamplers\.\d)/",
    "norms": r"/(\w*norm\w*)/",
    "feed-forward": r"/ff/",
    "attention's projections": r"/(to_[qkv]|to_out\.0)/",
    "attention over time": r"motion_modules.*/attn\d/",
    "attention over space and text": r"/attn\d/",
    "projections in and out": r"/proj_(in|out)/",
}
CONTAINERS = re.compile(r"^(while|call|conditional|async)")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?(?:metadata=\{[^}]*op_name=\"([^\"]*)\")", re.M)


def profile(case: str, shape: Shape) -> dict:
    """{seconds of a call, {phase: {kind: {"products": share, "other": share}}}} of our side of a case; shares of the operations' sum."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder}/hlo --xla_dump_hlo_as_text"
        import jax

        from benchmarks import ours

        ours.start()
        run, _ = ours.CASES[case](shape)
        run()
        with jax.profiler.trace(folder):
            begun = time.perf_counter()
            run()
            seconds = time.perf_counter() - begun
        trace = next(Path(folder).rglob("*.xplane.pb"))
        times = operation_times(jax.profiler.ProfileData.from_file(str(trace)))
        module = max(times, key=lambda m: sum(times[m].values()))
        text = "".join(p.read_text() for p in Path(folder, "hlo").glob(f"*.{module}.*after_optimizations.txt"))
    paths = dict(INSTRUCTION.findall(text))
    total, shares = sum(times[module].values()), collections.Counter()
    for operation, spent in times[module].items():
        shares[(*place(paths.get(operation, "")), "products" if operation.startswith("ynn") else "other")] += spent / total
    return {"case": case, "shape": vars(shape), "seconds": seconds, "program": sum(times[module].values()) / 1e9,
            "shares": [[*key, round(share, 4)] for key, share in shares.most_common()]}  # fmt: skip


def operation_times(data) -> dict[str, collections.Counter]:
    """{module: nanoseconds of each operation, all its calls}; loops are what is in them."""
    times: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                told = dict(event.stats)
                if "hlo_op" in told and not CONTAINERS.match(told["hlo_op"]):
                    times[told["hlo_module"]][told["hlo_op"]] += event.duration_ns
    return times


def place(path: str) -> tuple[str, str]:
    """(phase, kind) of an operation by its path, as in jit(f)/transpose(jvp(UNet))/mid_block/resnets.0/conv1/dot_general."""
    phase = "again" if "rematted" in path else "backward" if "transpose(" in path else "forward"
    return phase, next((kind for kind, pattern in KINDS.items() if re.search(pattern, path)), "other")


def table() -> str:
    lines = [f"{machine()}; `python benchmarks/profiling.py CASE`: seconds of one call: in products of matrices + in all else", ""]
    for path in sorted(RESULTS.glob("profile-cpu-*.json")):
        found = json.loads(path.read_text())
        cells: dict[str, dict] = collections.defaultdict(collections.Counter)
        for phase, kind, what, share in found["shares"]:
            cells[kind][phase, what] += share * found["seconds"]
        phases = [p for p in ("forward", "again", "backward") if any(key[0] == p for c in cells.values() for key in c)]
        lines += [f"**{found['case']}, {found['shape']['size']}²: {found['seconds']:.1f} s**", "", f"| | {' | '.join(phases)} | together |"]
        lines += ["|" + "---|" * (len(phases) + 2)]
        everything = sum(cells.values(), collections.Counter())
        for kind, cell in [*sorted(cells.items(), key=lambda item: -sum(item[1].values())), ("together", everything)]:
            two = lambda keys, cell=cell: f"{sum(cell[p, 'products'] for p in keys):.1f} + {sum(cell[p, 'other'] for p in keys):.1f}"
            lines += [f"| {kind} | {' | '.join(two([p]) for p in phases)} | {two(phases)} |"]
        lines += [""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--frames", type=int, default=16)
    args = parser.parse_args()
    make_model()
    found = {**profile(args.case, Shape(args.size, args.frames)), "machine": machine()}
    (RESULTS / f"profile-cpu-{args.case}-{args.size}.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "profile-cpu.md").write_text(table())
    print(table())


if __name__ == "__main__":
    main()
