"""Imports a Stable Diffusion folder in diffusers layout into an Orbax checkpoint of ours, with its configs and tokenizer.

python convert/import_base.py --model_id_or_path SD15 --output sd15-orbax [--verify]

The result is taken wherever --model_id_or_path is; convert/export_base.py writes it back, bit for bit.
"""

import argparse
from pathlib import Path

from anidiff_jax.errors import run_script
from anidiff_jax.weights.hub import HUBS, resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_id_or_path", required=True, help="folder in diffusers layout, or hub id")
    parser.add_argument("--model_revision", help="revision on the hub")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--verify", action="store_true", help="compare a forward pass with PyTorch diffusers")
    parser.add_argument("--hub", choices=HUBS, help="where hub ids are looked up; none = the one, then the other")
    args = parser.parse_args()

    from anidiff_jax.weights import files, store

    store.must_not_exist(args.output)
    source = store.base_folder(resolve(args.model_id_or_path, args.model_revision, args.hub))
    size = 0
    with files.written_whole(args.output) as out:
        for part, stem in store.STEMS.items():
            size += store.write_component(store.tensors_in(source / part, stem), files.read_json(source / part / "config.json"), out / part)
        store.copy_rest(source, out)
        if args.verify:
            from anidiff_jax.weights.verify import verify

            verify(out, source)
    print(f"{args.output}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    run_script(main)
