"""Imports motion modules of any kind into an Orbax checkpoint of ours.

python convert/import_motion_adapter.py --motion_adapter_id_or_path ADAPTER --output adapter-orbax [--verify --model_id_or_path SD15]

The result is taken wherever --motion_adapter_id_or_path is; convert/export_motion_adapter.py writes it back, bit for bit.
"""

import argparse
from pathlib import Path

from anidiff_jax.errors import run_script
from anidiff_jax.weights.hub import HUBS, resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--motion_adapter_id_or_path", required=True, help="folder in diffusers layout, .safetensors file, or hub id")
    parser.add_argument("--motion_adapter_revision", help="revision on the hub")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--verify", action="store_true", help="compare a forward pass with PyTorch diffusers")
    parser.add_argument("--model_id_or_path", help="base model in diffusers layout for --verify; none = the embedded one")
    parser.add_argument("--hub", choices=HUBS, help="where hub ids are looked up; none = the one, then the other")
    args = parser.parse_args()

    from anidiff_jax.weights import files, store
    from anidiff_jax.weights.base import EMBEDDED
    from anidiff_jax.weights.sources import motion_source

    store.must_not_exist(args.output)
    source = resolve(args.motion_adapter_id_or_path, args.motion_adapter_revision, args.hub)
    config, tensors, _ = motion_source(source)
    with files.written_whole(args.output) as out:
        size = store.write_component(tensors, config, out)
        if args.verify:
            from anidiff_jax.weights.verify import verify

            base = resolve(args.model_id_or_path, hub=args.hub) if args.model_id_or_path else EMBEDDED
            verify(base, base, out, source)
    print(f"{args.output}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    run_script(main)
