"""Exports motion modules for other programs, with LoRAs merged where they are given.

python convert/export_motion_adapter.py --input CHECKPOINT --output my-adapter                             # diffusers: a folder
python convert/export_motion_adapter.py --input ADAPTER --lora CHECKPOINT --output my-adapter --dtype float16
python convert/export_motion_adapter.py --input CHECKPOINT --format original --output my-motion.safetensors  # A1111, ComfyUI
"""

import argparse
from pathlib import Path

from anidiff_jax.errors import UserError, run_script
from anidiff_jax.weights.hub import HUBS, resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, help="motion modules of any kind: folder, file, checkpoint of full training, or hub id")
    parser.add_argument("--lora", action="append", default=[], help="LoRA to merge, as path[:scale]; repeatable")
    parser.add_argument("--output", type=Path, required=True, help="folder, or file for the original naming, to write; must not exist")
    parser.add_argument(
        "--format", choices=["diffusers", "original"], default="diffusers", help="diffusers' folder, or the original's file"
    )
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="type of the weights; none = as they are")
    parser.add_argument("--verify", action="store_true", help="load the result in PyTorch diffusers and compare a forward pass")
    parser.add_argument("--model_id_or_path", help="base model in diffusers layout for --verify; none = the embedded one")
    parser.add_argument("--hub", choices=HUBS, help="where hub ids are looked up; none = the one, then the other")
    args = parser.parse_args()

    from anidiff_jax.config import path_and_scale
    from anidiff_jax.weights import files, store
    from anidiff_jax.weights.base import EMBEDDED
    from anidiff_jax.weights.merge import merged_adapter, write_adapter, write_original

    store.must_not_exist(args.output)
    loras = [(resolve(path, hub=args.hub), scale) for path, scale in map(path_and_scale, args.lora)]
    raw, tensors, header = merged_adapter(resolve(args.input, hub=args.hub), loras)
    if args.dtype:
        tensors = {key: tensor.cast(args.dtype) for key, tensor in tensors.items()}
    if args.format == "original":
        if args.output.suffix != ".safetensors" or args.verify:
            raise UserError("the original naming is one file: give --output NAME.safetensors, without --verify")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_original(tensors, args.output, header)
    else:
        with files.written_whole(args.output) as out:
            write_adapter(tensors, raw, out, header)
            if args.verify:
                from anidiff_jax.weights.verify import verify

                base = resolve(args.model_id_or_path, hub=args.hub) if args.model_id_or_path else EMBEDDED
                verify(base, base, out, out)
    print(args.output)


if __name__ == "__main__":
    run_script(main)
