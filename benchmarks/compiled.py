"""What XLA makes of our programs for an NVIDIA H100, told by its compiler alone: no GPU is needed, nothing runs, and nothing is timed.

    pip install 'jax-cuda13-plugin[with-cuda]'     # of jax's own version; 4 GB
    python benchmarks/compiled.py                  # some minutes
    python benchmarks/compiled.py --only lora_256 full_512

Full size (SD 1.5, v2 adapter), bfloat16, 16 frames. Of each program: what stays on the device (weights, optimizer's state, inputs), the
temporary memory, their sum; how many kernels there are, and how many bytes they read and write, which is what layers that are no products
cost. What a GPU would change: convolutions get a workspace, and products whichever of two libraries is faster there.
Results: benchmarks/results/compiled-h100.json and .md.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
# Which of XLA's own products are good can only be found by running them: without, it takes cuBLAS's.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_triton_gemm=false"

import jax
import jax.numpy as jnp
from jax.experimental import topologies

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from anidiff_jax.config import TrainConfig  # noqa: E402
from anidiff_jax.denoising import Program, Turn, numbers_of, one_step  # noqa: E402
from anidiff_jax.diffusion import solvers  # noqa: E402
from anidiff_jax.diffusion.guidance import Guidance  # noqa: E402
from anidiff_jax.diffusion.schedule import NoiseSchedule  # noqa: E402
from anidiff_jax.lora import init_lora  # noqa: E402
from anidiff_jax.models import attention  # noqa: E402
from anidiff_jax.models.clip import CLIPTextModel, clip_config  # noqa: E402
from anidiff_jax.models.config import fresh_motion_config, unet_config  # noqa: E402
from anidiff_jax.models.flops import count_flops  # noqa: E402
from anidiff_jax.models.init import shapes  # noqa: E402
from anidiff_jax.models.layers import Settings  # noqa: E402
from anidiff_jax.models.networks import Networks  # noqa: E402
from anidiff_jax.models.unet import UNet  # noqa: E402
from anidiff_jax.models.vae import AutoencoderKL, vae_config  # noqa: E402
from anidiff_jax.parallel import AXIS, set_up_jax  # noqa: E402
from anidiff_jax.sampling import decode, encode  # noqa: E402
from anidiff_jax.training import setup  # noqa: E402
from anidiff_jax.training.state import TrainState, make_optimizer  # noqa: E402
from anidiff_jax.training.step import make_update  # noqa: E402
from anidiff_jax.weights.base import Model  # noqa: E402
from benchmarks.full_size import TEXT, UNET, VAE  # noqa: E402
from benchmarks.run import RESULTS  # noqa: E402

FRAMES = 16
PRODUCTS, MEMORY = 600e12, 3e12  # operations and bytes a second of an H100 in bfloat16, as far as programs reach them
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
Asked = tuple[Callable, tuple[Any, ...], int | None]  # a program, what it takes (shapes), which of these it may overwrite


def pretend() -> None:
    """Our code, and JAX's for cuDNN, ask which device there is: from now on an H100."""
    from jax._src.cudnn import fused_attention_stablehlo

    jax.default_backend = lambda: "gpu"
    attention.fused_limit = lambda: 256
    fused_attention_stablehlo.check_compute_capability = lambda least: float(least) <= 9.0


def networks(settings: Settings) -> Networks:
    motion = fresh_motion_config(UNET, heads=8, max_frames=32)
    plain = Settings(dtype="bfloat16")
    return Networks(
        CLIPTextModel(clip_config(TEXT), plain), AutoencoderKL(vae_config(VAE), plain), UNet(unet_config(UNET, motion), settings)
    )


def weights(network, dtype: str = "bfloat16"):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes(network))


def array(*shape: int, dtype="float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def sampling_step(size: int, guided: bool = True, dtype: str = "bfloat16", attention: str = "auto") -> Asked:
    """A step of ddim with guidance, or without."""
    unet, side = networks(Settings(dtype=dtype, attention=attention)).unet, size // 8
    row = jax.tree.map(lambda v: v[0], solvers.table(NoiseSchedule(), "ddim", 25).rows)
    turn = Turn(array(dtype="int32"), row, array(1, dtype="int32"), array(2))
    given = (weights(unet, dtype), numbers_of(7.5, Guidance()), turn, array(1, FRAMES, side, side, 4), array(1 + guided, 77, 768))

    def step(params, numbers, turn, state, text):
        return one_step(Program(unet), {"params": params}, numbers, turn, state, text, None, None)

    return step, given, 3


def decoding(size: int) -> Asked:
    vae = networks(Settings()).vae
    return partial(decode, vae), (weights(vae), array(FRAMES, size // 8, size // 8, 4)), None


def encoding(size: int) -> Asked:
    vae = networks(Settings()).vae
    return partial(encode, vae), (weights(vae), array(FRAMES, size, size, 3, dtype="uint8")), None


def training(kind: str, size: int, remat: bool = True, clips: int = 1, cached: bool = True) -> Asked:
    """An update as train.py makes it with its own defaults (rank, dropout): from the latent cache, or from pixels."""
    config = TrainConfig(
        model_id_or_path="", sft_type=kind, sample_size=str(size), sample_n_frames=FRAMES, batch_size=clips, gradient_checkpointing=remat,
        trainable_modules=".*motion_modules.*transformer_blocks.*" if kind == "lora" else ".*motion_modules.*",
    )  # fmt: skip
    dropout = config.lora_dropout if kind == "lora" else 0.0
    nets = networks(Settings(dtype="bfloat16", remat=remat, lora_dropout=dropout))
    params = {"unet": weights(nets.unet), "vae": weights(nets.vae), "text_encoder": weights(nets.text_encoder)}
    model = Model(nets, params, None, None, {}, {})
    if kind == "lora":
        trained = jax.eval_shape(lambda: init_lora(jax.random.key(0), params["unet"], config.trainable_modules, config.lora_rank))
        frozen = params
    else:
        trained, frozen = setup.split_params(config, model)
        trained = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32"), trained)
    optimizer = make_optimizer(config, 1000)
    update = jax.vmap(make_update(setup.task(config, model), optimizer), in_axes=(None, None, 0), out_axes=None, axis_name=AXIS)
    side = size // 8
    batch = {"mean": array(1, 1, clips, FRAMES, side, side, 4, dtype="float16"), "text": array(1, 1, clips, 77, 768, dtype="float16")}
    batch["std"] = batch["mean"]
    if not cached:
        batch = {"pixels": array(1, 1, clips, FRAMES, size, size, 3, dtype="uint8"), "ids": array(1, 1, clips, 77, dtype="int32")}
    batch["index"] = array(1, 1, clips, dtype="uint32")
    state = jax.eval_shape(lambda p: TrainState.create(p, optimizer), trained)
    return update, (state, frozen, batch), 0


PROGRAMS: dict[str, Callable[[], Asked]] = {
    "guidance_step_256": partial(sampling_step, 256),
    "guidance_step_512": partial(sampling_step, 512),
    "step_512": partial(sampling_step, 512, guided=False),
    "guidance_step_512_float32": partial(sampling_step, 512, dtype="float32"),
    "guidance_step_512_unfused": partial(sampling_step, 512, attention="xla"),
    "decode_512": partial(decoding, 512),
    "encode_256": partial(encoding, 256),
    "lora_256": partial(training, "lora", 256),
    "lora_256_kept": partial(training, "lora", 256, remat=False),
    "lora_256_4_clips": partial(training, "lora", 256, clips=4),
    "lora_256_pixels": partial(training, "lora", 256, cached=False),
    "lora_512": partial(training, "lora", 512),
    "lora_512_kept": partial(training, "lora", 512, remat=False),
    "full_256": partial(training, "full", 256),
    "full_256_kept": partial(training, "full", 256, remat=False),
    "full_256_4_clips": partial(training, "full", 256, clips=4),
    "full_512": partial(training, "full", 512),
}


def compiled(asked: Asked, device, keep: Path | None = None) -> dict[str, Any]:
    """Figures of a program, in bytes and seconds. keep: a file for the compiled program's text."""
    function, given, overwritten = asked
    there = jax.sharding.SingleDeviceSharding(device)
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=there), given)
    begun = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=() if overwritten is None else overwritten).lower(*given)
    traced = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()
    memory, text = program.memory_analysis(), program.as_text()
    if keep:
        keep.write_text(text)
    kernels = kernels_of(text)
    return {
        "flops": flops_of(function, given), "stays": memory.argument_size_in_bytes, "temporary": memory.temp_size_in_bytes,
        "peak": memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "kernels": sum(count for count, _ in kernels.values()), "moved": sum(size for _, size in kernels.values()),
        "kinds": {kind: kernels[kind] for kind in sorted(kernels, key=lambda kind: -kernels[kind][1])},
        "trace": traced - begun, "compile": done - traced,
    }  # fmt: skip


def flops_of(function: Callable, given: tuple[Any, ...]) -> int:
    """Those that gradient checkpointing repeats too; counted without the fused kernel, whose operations are not seen."""
    fused, attention.fused_limit = attention.fused_limit, lambda: 0
    try:
        return count_flops(lambda *given: function(*given), *given)  # another function: JAX would take the trace that it has
    finally:
        attention.fused_limit = fused


BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


def kernels_of(text: str) -> dict[str, tuple[int, int]]:
    """Kind of kernel → (how many, bytes that they read and write), of a compiled program; the body of a loop counts once."""
    sizes: dict[str, int] = {}
    found: Counter = Counter()
    moved: Counter = Counter()
    free = {"parameter", "bitcast", "get-tuple-element", "tuple", "constant", "while", "call"}
    called = [line for line in text.splitlines() if " while(" in line or " call(" in line]
    bodies = set(re.findall(r"(?:body|condition|to_apply)=%([\w.\-]+)", "\n".join(called)))
    for block in text.split("\n\n"):
        head = block.lstrip().split(" ", 2)
        if head[0] != "ENTRY" and head[0].lstrip("%") not in bodies:
            continue
        for line in block.splitlines():
            parts = re.match(r"\s+(?:ROOT )?%(\S+) = (.*?) ([a-z\-]+)\((.*)$", line)
            if not parts:
                continue
            name, kind, operation, rest = parts.groups()
            sizes[name] = size_of(kind)
            if operation in free:
                continue
            read = sum(sizes.get(other, 0) for other in re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
            group = kind_of(operation, name, rest)
            found[group] += 1
            moved[group] += read + sizes[name]
    return {kind: (found[kind], moved[kind]) for kind in found}


def kind_of(operation: str, name: str, rest: str) -> str:
    if "__cudnn$conv" in rest:
        return "convolution"
    if "fmha" in rest:
        return "fused attention"
    if "__cublas" in rest or "gemm" in name:
        return "product"
    if "transpose" in name or "copy" in name:
        return "transpose"
    return "other" if operation == "fusion" else operation


def size_of(kind: str) -> int:
    """Bytes of a type, or of all in a tuple of types."""
    arrays = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", kind)
    return sum(BYTES.get(name, 0) * math.prod(map(int, filter(None, dims.split(",")))) for name, dims in arrays)


def table(results: dict[str, Any]) -> str:
    heads = ["program", "stays", "temporary", "peak", "kernels", "TFLOP", "moved", "of that not by products", "on paper", "compile"]
    lines = [
        f"Compiled for an {results['device']} by jax {results['jax']}, not run: `python benchmarks/compiled.py`; bfloat16, 16 frames.",
        "",
    ]
    lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, r in results["programs"].items():
        products = sum(r["kinds"].get(kind, (0, 0))[1] for kind in ("product", "convolution", "fused attention"))
        other = r["moved"] - products
        stays, temporary, peak, moved, rest = (f"{n / 1e9:.1f} GB" for n in (r["stays"], r["temporary"], r["peak"], r["moved"], other))
        untold = any(word in name for word in ("decode", "encode", "pixels", "float32"))
        seconds = "" if untold else f"{1000 * (r['flops'] / PRODUCTS + other / MEMORY):.0f} ms"
        cells = [name, stays, temporary, peak, r["kernels"], f"{r['flops'] / 1e12:.1f}", moved, rest, seconds, f"{r['compile']:.0f} s"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for version in sorted({r["jax"] for r in results["programs"].values()} - {results["jax"]}):
        earlier = [name for name, r in results["programs"].items() if r["jax"] == version]
        lines += ["", f"Compiled by jax {version}, of earlier code: {', '.join(earlier)}."]
    speeds = f"products at {PRODUCTS / 1e12:.0f} TFLOP/s and all else at {MEMORY / 1e12:.0f} TB/s"
    lines += [
        "", "Stays: weights, state and inputs. TFLOP: what checkpointing repeats too. Moved: read and written by all kernels. On",
        f"paper: with {speeds}; not told of float32, and of programs that loop over",
        "frames, whose kernels and bytes are those of one turn. Compile: on two CPU cores that did other things too.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="PROGRAM", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the compiled programs' text there")
    args = parser.parse_args()
    set_up_jax()
    jax.config.update("jax_enable_compilation_cache", False)
    device = topologies.get_topology_desc("1x1x1", "cuda", target_config=H100, topology="1x1x1").devices[0]
    pretend()
    path = RESULTS / "compiled-h100.json"
    results = json.loads(path.read_text()) if path.exists() else {"programs": {}}
    results |= {"device": device.device_kind, "jax": jax.__version__}
    for name in args.only:
        results["programs"][name] = r = {"jax": jax.__version__} | compiled(
            PROGRAMS[name](), device, args.keep and args.keep / f"{name}.hlo"
        )
        print(f"{name}: {r['peak'] / 1e9:.2f} GB, {r['temporary'] / 1e9:.2f} of it temporary; compiled in {r['compile']:.0f} s", flush=True)
        results["programs"] = {n: results["programs"][n] for n in PROGRAMS if n in results["programs"]}
        path.write_text(json.dumps(results, indent=2) + "\n")
    text = table(results)
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
