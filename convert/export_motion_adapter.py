"""Exports a motion adapter as a folder that diffusers' MotionAdapter.from_pretrained loads, with a LoRA merged where one is given.

python convert/export_motion_adapter.py --input CHECKPOINT --output my-adapter                       # of full training
python convert/export_motion_adapter.py --input ADAPTER --lora CHECKPOINT --output my-adapter        # of LoRA training
python convert/export_motion_adapter.py --input adapter-orbax --output my-adapter --verify --model_id_or_path SD15
"""

import argparse
from pathlib import Path

from anidiff_jax.errors import run_script
from anidiff_jax.weights.hub import HUBS, resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, help="adapter: imported, in diffusers layout, a checkpoint of full training, or hub id")
    parser.add_argument("--lora", type=Path, help="checkpoint of LoRA training to merge into it")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="type of the weights; none = as they are")
    parser.add_argument("--verify", action="store_true", help="load the result in PyTorch diffusers and compare a forward pass")
    parser.add_argument("--model_id_or_path", help="base model in diffusers layout for --verify; none = the embedded one")
    parser.add_argument("--hub", choices=HUBS, default="huggingface", help="where hub ids are looked up")
    args = parser.parse_args()

    import jax

    from anidiff_jax.weights import files, store
    from anidiff_jax.weights.base import EMBEDDED
    from anidiff_jax.weights.merge import merged_adapter, write_adapter

    store.must_not_exist(args.output)
    raw, params, header = merged_adapter(resolve(args.input, hub=args.hub), args.lora)
    if args.dtype:
        params = jax.tree.map(lambda x: x.astype(args.dtype), params)
    with files.written_whole(args.output) as out:
        write_adapter(params, raw, out, header)
        if args.verify:
            from anidiff_jax.weights.verify import verify

            base = resolve(args.model_id_or_path, hub=args.hub) if args.model_id_or_path else EMBEDDED
            verify(base, base, out, out)
    print(args.output)


if __name__ == "__main__":
    run_script(main)
