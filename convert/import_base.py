"""Imports a Stable Diffusion model, folder or single file, into an Orbax checkpoint of ours, with its configs and tokenizer.

python convert/import_base.py --model_id_or_path SD15 --output sd15-orbax [--verify]

The result is taken wherever --model_id_or_path is; convert/export_base.py writes it back, bit for bit.
"""

import argparse
from pathlib import Path

from anidiff_jax.errors import UserError, run_script
from anidiff_jax.weights.hub import HUBS, resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_id_or_path", required=True, help="base model of any kind: folder, single file, or hub id")
    parser.add_argument("--model_revision", help="revision on the hub")
    parser.add_argument("--vae_path", help="VAE in its place")
    parser.add_argument("--text_encoder_path", help="text encoder and tokenizer in its place")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--verify", action="store_true", help="compare a forward pass with PyTorch diffusers")
    parser.add_argument("--hub", choices=HUBS, help="where hub ids are looked up; none = the one, then the other")
    args = parser.parse_args()

    from anidiff_jax.weights import files, store
    from anidiff_jax.weights.sources import base_source
    from anidiff_jax.weights.verify import verify
    from anidiff_jax.weights.write_base import import_base

    store.must_not_exist(args.output)
    local = lambda given: None if given is None else resolve(given, hub=args.hub)
    source = base_source(resolve(args.model_id_or_path, args.model_revision, args.hub), local(args.vae_path), local(args.text_encoder_path))
    if args.verify and (source.where.is_file() or args.vae_path or args.text_encoder_path):
        raise UserError("--verify compares with a folder in diffusers layout: make one with convert/export_base.py --verify first")
    with files.written_whole(args.output) as out:
        size = import_base(source, out)
        if args.verify:
            verify(out, source.where)
    print(f"{args.output}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    run_script(main)
