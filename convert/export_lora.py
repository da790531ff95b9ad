"""Exports a LoRA in the naming that another program reads.

python convert/export_lora.py --input output/ad-…/checkpoints/iter-N --format original --output my-motion-lora.safetensors
"""

import argparse
from pathlib import Path

from anidiff_jax.errors import run_script
from anidiff_jax.weights.hub import HUBS, resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, help="LoRA of any kind: checkpoint, folder, file or hub id")
    parser.add_argument("--format", choices=["diffusers", "original", "kohya"], default="diffusers",
                        help="diffusers and PEFT; the original's motion LoRAs (attentions only); A1111's and ComfyUI's")  # fmt: skip
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="type of the weights")
    parser.add_argument("--model_id_or_path", help="base model: needed where the input is named as kohya does")
    parser.add_argument("--motion_adapter_id_or_path", help="motion modules: needed where a LoRA named so adapts them")
    parser.add_argument("--output", type=Path, required=True, help="file to write; must not exist")
    parser.add_argument("--hub", choices=HUBS, help="where hub ids are looked up; none = the one, then the other")
    args = parser.parse_args()

    from anidiff_jax.weights import store
    from anidiff_jax.weights.loras import as_named, load_lora
    from anidiff_jax.weights.merge import layers_of
    from anidiff_jax.weights.sources import base_source, motion_source
    from anidiff_jax.weights.tensors import write_tensors

    store.must_not_exist(args.output)
    layers: dict[str, list[str]] = {"unet": [], "text_encoder": []}
    if args.model_id_or_path:
        base = base_source(resolve(args.model_id_or_path, hub=args.hub))
        layers = {part: layers_of(base.named(part)) for part in layers}
    if args.motion_adapter_id_or_path:
        layers["unet"] += layers_of(motion_source(resolve(args.motion_adapter_id_or_path, hub=args.hub))[1])
    source = resolve(args.input, hub=args.hub)
    tensors = {key: tensor.cast(args.dtype) for key, tensor in as_named(load_lora(source, layers), args.format, source).items()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    header = {"kind": "LoRA", "made_from": source.name, "naming": args.format, "scale": "alpha / rank is multiplied into the weights"}
    write_tensors(tensors, args.output, header)
    print(f"{args.output}: {len(tensors)} tensors")


if __name__ == "__main__":
    run_script(main)
