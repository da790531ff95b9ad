"""What was chosen by measurement, measured: forms of attention, convolution, norm, adapter, dropout, checkpointing at the shapes of SD 1.5.

    python benchmarks/choices.py                        # some minutes; float32 on a CPU, bfloat16 on a GPU
    python benchmarks/choices.py --only attention norm  # some groups

Each form computes the same of the same input; seconds of one call and of one with gradients (the least of --repeats, on a GPU of ten calls
through ten; on a machine that does nothing else), and the temporary memory of the compiled gradient. A star marks what the project takes on
this device. Results in benchmarks/results/choices-<device>.json and .md; of all that is not starred, they are the record of what lost.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from anidiff_jax.models import attention, convolution, layers  # noqa: E402
from anidiff_jax.models.layers import Dense, GroupNorm, Settings  # noqa: E402
from anidiff_jax.models.motion import MotionModule  # noqa: E402
from anidiff_jax.parallel import set_up_jax  # noqa: E402
from anidiff_jax.random import quick  # noqa: E402
from benchmarks.run import RESULTS, machine  # noqa: E402


@dataclass(frozen=True)
class Case:
    """Forms that compute the same (where `alike`) of `given`, arrays of these shapes; `taken` is the one that the project takes."""

    group: str
    what: str
    given: dict[str, tuple[int, ...]]
    forms: dict[str, Callable]
    taken: str
    alike: bool = True


def attentions(dtype: str, frames: int) -> Iterator[Case]:
    """Spatial self-attention at 512² and 256², to the text, and over time."""
    shapes = [(f"{s} positions, heads of {d}", frames, s, s, d) for s, d in ((4096, 40), (1024, 80), (1024, 40), (256, 160), (64, 160))]
    shapes += [(f"{s} positions to 77 tokens, heads of {d}", 1, frames * s, 77, d) for s, d in ((4096, 40), (1024, 80))]
    shapes += [(f"16 frames at {n} positions, heads of {d}", n, 16, 16, d) for n, d in ((4096, 40), (1024, 80), (256, 160))]
    kinds = ["xla", "chunked"] + (["cudnn", "packed"] if attention.fused_limit() else [])
    for what, batch, queries, keys, d in shapes:
        given = {"q": (batch, queries, 8, d), "k": (batch, keys, 8, d), "v": (batch, keys, 8, d)}
        large = 8 * batch * queries * keys * 4 > 4e9  # logits that would not fit
        over = batch > 1000 and "chunked"  # a loop over thousands of products of 16
        without = {over, "xla" if large else "", "packed" if queries * 8 > attention.PACKED_LENGTH else ""}
        forms = {k: lambda q, k_, v, kind=k: attention.attend(q, k_, v, kind) for k in kinds if k not in without}
        yield Case("attention", what, given, forms, attention.choose(given["q"], keys, jnp.dtype(dtype)))


def convolutions(dtype: str, frames: int) -> Iterator[Case]:
    """3×3 and 1×1 at the UNet's levels, and 3×3 of doubled images, of the UNet and of the VAE."""

    def channels_first(x, weight):
        numbers = ("NCHW", "OIHW", "NCHW")
        y = jax.lax.conv_general_dilated(
            x.transpose(0, 3, 1, 2), weight.transpose(3, 2, 0, 1), (1, 1), "SAME", dimension_numbers=numbers, precision=precision(dtype)
        )
        return y.transpose(0, 2, 3, 1)

    plain = lambda x, weight: convolution.plain(x, weight, 1, ((1, 1), (1, 1)), precision(dtype))
    for side, inputs, outputs in ((64, 320, 320), (32, 320, 320), (32, 960, 320), (16, 640, 640), (8, 1280, 1280), (4, 1280, 1280)):
        forms: dict[str, Callable] = {"xla": plain, "xla, channels first": channels_first, "patches": convolution.patches}
        if dtype == "float32":
            forms["winograd"] = convolution.winograd
        given = {"x": (frames, side, side, inputs), "weight": (3, 3, inputs, outputs)}
        taken = convolution.choose(side, side, inputs, outputs, jnp.dtype(dtype))
        yield Case("convolution", f"{frames} frames of {side}², {inputs} → {outputs}", given, forms, taken)
    of_one = lambda x, weight: convolution.plain(x, weight, 1, ((0, 0), (0, 0)), precision(dtype))
    product = lambda x, weight: convolution.convolve(x, weight, 1, ((0, 0), (0, 0)), precision(dtype))
    for side, inputs, outputs in ((32, 960, 320), (32, 320, 320), (16, 1920, 640), (8, 2560, 1280)):
        given = {"x": (frames, side, side, inputs), "weight": (1, 1, inputs, outputs)}
        what = f"1×1, {frames} frames of {side}², {inputs} → {outputs}"
        yield Case("convolution", what, given, {"xla": of_one, "product": product}, "product")
    phases = lambda x, weight: convolution.phases(x, weight, precision(dtype))
    whole = lambda x, weight: convolution.of_doubled(x, weight, (2 * x.shape[1], 2 * x.shape[2]), precision(dtype))
    for count, side, c in ((frames, 4, 1280), (frames, 8, 1280), (frames, 16, 640), (4, 32, 512), (4, 64, 512), (4, 128, 256)):
        given = {"x": (count, side, side, c), "weight": (3, 3, c, c)}
        taken = "phases" if convolution.in_phases(side, side, jnp.dtype(dtype)) else "doubled first"
        yield Case("convolution", f"doubled, {count} frames of {side}² × {c}", given, {"doubled first": whole, "phases": phases}, taken)


def norms(dtype: str, frames: int) -> Iterator[Case]:
    """GroupNorm over each frame: sums per channel first, or of the grouped array."""
    for side, c in ((64, 320), (32, 320), (16, 640)):

        def ours(x, weight, bias, c=c):
            return GroupNorm(32, 1e-5, Settings(dtype=dtype)).apply({"params": {"weight": weight, "bias": bias}}, x)

        def grouped(x, weight, bias, c=c):
            y = x.astype(jnp.float32).reshape(*x.shape[:-1], 32, c // 32)
            y = (y - y.mean((1, 2, 4), keepdims=True)) * jax.lax.rsqrt(y.var((1, 2, 4), keepdims=True) + 1e-5)
            return (y.reshape(x.shape) * weight + bias).astype(dtype)

        given = {"x": (frames, side, side, c), "weight": (c,), "bias": (c,)}
        yield Case("norm", f"{frames} frames of {side}² × {c}", given, {"per channel": ours, "grouped": grouped}, "per channel")


def adapters(dtype: str, frames: int) -> Iterator[Case]:
    """A linear layer with a LoRA of rank 8: beside the layer, or merged into the weight first, in every call."""
    for rows, c in ((frames * 4096, 320), (frames * 1024, 320), (frames * 64, 1280)):
        dense = Dense(c, Settings(dtype=dtype), use_bias=False)

        def beside(x, weight, a, b, dense=dense):
            return dense.apply({"params": {"weight": weight}, "lora": {"lora_A": {"weight": a}, "lora_B": {"weight": b}}}, x)

        def merged(x, weight, a, b, dense=dense):
            return dense.apply({"params": {"weight": weight + jnp.matmul(a, b, precision=precision(dtype))}}, x)

        given = {"x": (rows, c), "weight": (c, c), "a": (c, 8), "b": (8, c)}
        forms = {"in the layer": beside, "merged in the step": merged}
        yield Case("adapter", f"{rows} rows of {c}", given, forms, "in the layer")


def dropouts(dtype: str, frames: int) -> Iterator[Case]:
    """Dropout on the input of an adapter: JAX's own keys, XLA's generator, keys that hash."""
    for rows, c in ((frames * 1024, 320), (frames * 4096, 1280)):

        def drop(x, key):
            return jnp.where(layers.chosen(key, 0.95, x.shape), x / 0.95, 0).astype(x.dtype)

        kinds = {"threefry": lambda key: key, "rbg": of_xla, "hashed": quick}
        forms = {name: lambda x, kind=kind, drop=drop: drop(x, kind(jax.random.key(0))) for name, kind in kinds.items()}
        yield Case("dropout", f"{rows} rows of {c}", {"x": (rows, c)}, forms, "hashed", alike=False)


def of_xla(key):
    return jax.random.wrap_key_data(jnp.tile(jax.random.key_data(key), 2), impl="rbg")


def checkpointing(dtype: str, frames: int) -> Iterator[Case]:
    """What of a motion module is kept for the backward pass."""
    names = jax.checkpoint_policies.save_only_these_names
    for side, c in ((32, 320), (16, 640)):
        shapes = (1, frames, side, side, c)
        forms: dict[str, Callable] = {}
        kept = {"all": None, "nothing": names(), "linear layers": names(layers.PROJECTED)}
        for name, policy in kept.items():
            module = MotionModule(1, 8, 32, 32, Settings(dtype=dtype, remat=name == "linear layers"))
            params = module.init(jax.random.key(0), jnp.zeros(shapes))["params"]
            params = jax.tree.map(lambda x: jax.random.normal(jax.random.key(2), x.shape) * 0.05, params)
            run = lambda x, params=params, module=module: module.apply({"params": params}, x)
            forms[name] = run if policy is None else jax.checkpoint(run, policy=policy)
        taken = "linear layers" if jax.default_backend() == "cpu" else "nothing"
        yield Case("checkpointing", f"motion module, {frames} frames of {side}² × {c}", {"x": shapes}, forms, taken)


GROUPS = {
    "attention": attentions,
    "convolution": convolutions,
    "norm": norms,
    "adapter": adapters,
    "dropout": dropouts,
    "checkpointing": checkpointing,
}


def precision(dtype: str) -> str | None:
    return "highest" if dtype == "float32" else None


def measure(case: Case, dtype: str, repeats: int) -> dict[str, Any]:
    """{form: seconds, with gradients, megabytes, difference from the taken one}; all forms are compiled first, beside each other."""
    keys = jax.random.split(jax.random.key(1), len(case.given))
    given = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, case.given.values(), strict=True)]

    def programs(form):
        loss = lambda *a: jnp.square(form(*a).astype(jnp.float32)).mean()
        return [jax.jit(f).lower(*given).compile() for f in (form, jax.grad(loss, argnums=tuple(range(len(given)))))]

    with ThreadPoolExecutor() as pool:
        compiled = dict(zip(case.forms, pool.map(programs, case.forms.values()), strict=True))
    found = {
        name: {
            "seconds": least(forward, given, repeats),
            "with_gradients": least(gradient, given, repeats),
            "megabytes": gradient.memory_analysis().temp_size_in_bytes / 1e6,
        }
        for name, (forward, gradient) in compiled.items()
    }
    outputs = {name: forward(*given).astype(jnp.float32) for name, (forward, _) in compiled.items()} if case.alike else {}
    for name, y in outputs.items():
        found[name]["difference"] = float(jnp.abs(y - outputs[case.taken]).max() / jnp.abs(outputs[case.taken]).max())
    return found


def least(function: Callable, given: list, repeats: int) -> float:
    """Seconds of a call; on a GPU of ten that are sent at once, so that sending them is not what is measured."""
    jax.block_until_ready(function(*given))
    calls, seconds = 1 if jax.default_backend() == "cpu" else 10, []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready([function(*given) for _ in range(calls)][-1])
        seconds.append((time.perf_counter() - begun) / calls)
    return min(seconds)


def table(result: dict) -> str:
    lines = [f"{result['machine']}; jax {result['jax']}; {result['dtype']}; `python benchmarks/choices.py`", ""]
    lines += ["| | form | ms | with gradients | temporary MB | difference |", "|" + "---|" * 6]
    for case in result["cases"]:
        for i, (name, f) in enumerate(case["forms"].items()):
            said = f"**{name}** *" if name == case["taken"] else name
            differs = f"{f['difference']:.0e}" if "difference" in f else ""
            lines.append(
                f"| {case['group'] + ': ' + case['what'] if i == 0 else ''} | {said} | {1e3 * f['seconds']:.3g} "
                f"| {1e3 * f['with_gradients']:.3g} | {f['megabytes']:.0f} | {differs} |"
            )
    return "\n".join([*lines, "", "\\* what the project takes on this device.", *([result["note"]] if "note" in result else []), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=GROUPS)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    set_up_jax()
    kind = jax.default_backend()
    dtype, frames = ("float32", 4) if kind == "cpu" else ("bfloat16", 16)
    path = RESULTS / f"choices-{kind}.json"
    known = json.loads(path.read_text())["cases"] if path.exists() and args.only else []
    cases = [case for case in known if case["group"] not in args.only]
    device = machine() if kind == "cpu" else jax.devices()[0].device_kind
    for group in args.only or GROUPS:
        for case in GROUPS[group](dtype, frames):
            forms = measure(case, dtype, args.repeats)
            cases.append({"group": case.group, "what": case.what, "taken": case.taken, "forms": forms})
            print(case.group, case.what, {name: f"{1e3 * f['seconds']:.3g} ms" for name, f in forms.items()}, flush=True)
    load = round(os.getloadavg()[0], 1)
    result = {"machine": device, "jax": jax.__version__, "dtype": dtype, "frames": frames, "load": load, "cases": cases}
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
