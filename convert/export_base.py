"""Exports a base model that convert/import_base.py imported as a folder in diffusers layout, bit for bit.

python convert/export_base.py --input sd15-orbax --output SD15 [--verify]
"""

import argparse
import shutil
from pathlib import Path

from anidiff_jax.errors import run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, required=True, help="folder that import_base.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--verify", action="store_true", help="load the result in PyTorch diffusers and compare a forward pass")
    args = parser.parse_args()

    from anidiff_jax.weights import files, store

    store.must_not_exist(args.output)
    source = store.base_folder(args.input)
    with files.written_whole(args.output) as out:
        for part, stem in store.STEMS.items():
            (out / part).mkdir()
            shutil.copyfile(source / part / "config.json", out / part / "config.json")
            tensors = {key: files.to_ours(key, t.read()) for key, t in store.tensors_in(source / part, stem).items()}
            files.save(tensors, out / part / f"{stem}.safetensors")
        store.copy_rest(source, out)
        if args.verify:
            from anidiff_jax.weights.verify import verify

            verify(source, out)
    print(args.output)


if __name__ == "__main__":
    run_script(main)
