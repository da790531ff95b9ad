"""Says what a file or folder of weights is, and which argument takes it.

python convert/inspect_weights.py FILE_OR_FOLDER …
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np

from anidiff_jax.errors import run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", help="files, folders or hub ids")
    args = parser.parse_args()

    from anidiff_jax.weights.hub import resolve

    for path in args.paths:
        print(describe(resolve(path)))


def describe(path: Path) -> str:
    """What lies at a path, in lines."""
    from anidiff_jax.weights.kinds import recognise
    from anidiff_jax.weights.sources import ARGUMENTS

    found = recognise(path)
    lines = [str(path), f"  kind        {' '.join(filter(None, [found.version, found.kind]))}"]
    if found.naming:
        lines.append(f"  naming      {found.naming}")
    if found.tensors:
        sizes = Counter[str]()
        for tensor in found.tensors.values():
            sizes[tensor.dtype] += int(np.prod(tensor.shape, dtype=np.int64))
        lines.append(f"  parameters  {sum(sizes.values()) / 1e6:.2f}M in {len(found.tensors)} tensors, {', '.join(sizes)}")
        blocks = Counter(".".join(key.removeprefix("module.").split(".")[:2]) for key in found.tensors)
        shown = [f"{name} ({count})" for name, count in blocks.most_common(8)]
        lines.append(f"  structure   {', '.join(shown)}{', …' if len(blocks) > 8 else ''}")
    lines += [f"  note        {note}" for note in found.notes]
    taken = f"give it as {ARGUMENTS[found.kind]}" if found.supported and found.kind in ARGUMENTS else "not supported"
    return "\n".join([*lines, f"  use         {taken}"])


if __name__ == "__main__":
    run_script(main)
