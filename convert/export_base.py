"""Exports a base model as a folder in diffusers layout: imported, from a single file, with LoRAs merged, with a trained UNet.

python convert/export_base.py --input sd15-orbax --output SD15                                        # back, bit for bit
python convert/export_base.py --input base.safetensors --text_encoder_path SD15 --lora style.safetensors:0.7 --output SD15-style
python convert/export_base.py --input SD15 --unet CHECKPOINT --output SD15-trained --dtype float16     # an image model that trained
"""

import argparse
from pathlib import Path

from anidiff_jax.errors import run_script
from anidiff_jax.weights.hub import HUBS, resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, help="base model of any kind: folder, what import_base.py wrote, single file, or hub id")
    parser.add_argument("--vae_path", help="VAE in its place")
    parser.add_argument("--text_encoder_path", help="text encoder and tokenizer in its place")
    parser.add_argument("--unet", type=Path, help="checkpoint whose UNet, trained as a whole, takes its place")
    parser.add_argument("--lora", action="append", default=[], help="LoRA to merge, as path[:scale]; repeatable")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="type of the weights; none = as they are")
    parser.add_argument("--verify", action="store_true", help="load the result in PyTorch diffusers and compare a forward pass")
    parser.add_argument("--hub", choices=HUBS, help="where hub ids are looked up; none = the one, then the other")
    args = parser.parse_args()

    from anidiff_jax.config import path_and_scale
    from anidiff_jax.weights import files, store
    from anidiff_jax.weights.sources import base_source
    from anidiff_jax.weights.write_base import with_loras, write_base

    store.must_not_exist(args.output)
    local = lambda given: None if given is None else resolve(given, hub=args.hub)
    source = base_source(resolve(args.input, hub=args.hub), local(args.vae_path), local(args.text_encoder_path), args.unet)
    source = with_loras(source, [(resolve(path, hub=args.hub), scale) for path, scale in map(path_and_scale, args.lora)])
    with files.written_whole(args.output) as out:
        write_base(source, out, args.dtype, header(args))
        if args.verify:
            from anidiff_jax.weights.verify import verify

            verify(out, out)
    print(args.output)


def header(args: argparse.Namespace) -> dict[str, str]:
    """What the files say of themselves: what they are, and what they were made from."""
    from anidiff_jax.weights.hub import public_name

    said = {"kind": "base model", "made_from": public_name(args.input)}
    said |= {"vae": public_name(args.vae_path), "text_encoder": public_name(args.text_encoder_path)}
    said |= {"unet": args.unet and args.unet.name, "merged_loras": ", ".join(Path(lora).name for lora in args.lora)}
    return {name: value for name, value in said.items() if value}


if __name__ == "__main__":
    run_script(main)
