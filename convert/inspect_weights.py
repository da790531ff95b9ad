"""Says what a file or folder of weights is, and which argument takes it.

python convert/inspect_weights.py FILE_OR_FOLDER …
"""

import argparse
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from anidiff_jax.errors import run_script
from anidiff_jax.weights.hub import HUBS, resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", help="files, folders or hub ids")
    parser.add_argument("--hub", choices=HUBS, help="where hub ids are looked up; none = the one, then the other")
    args = parser.parse_args()

    for path in args.paths:
        print(describe(resolve(path, hub=args.hub)))


def describe(path: Path) -> str:
    """What lies at a path, in lines."""
    from anidiff_jax.weights.kinds import norms_note, recognise
    from anidiff_jax.weights.sources import ARGUMENTS

    found = recognise(path)
    lines = [str(path), f"  kind        {' '.join(filter(None, [found.version, found.kind]))}"]
    if found.naming:
        lines.append(f"  naming      {found.naming}")
    tensors = found.tensors or tensors_of_parts(path)
    if tensors:
        sizes = Counter[str]()
        for tensor in tensors.values():
            sizes[tensor.dtype] += int(np.prod(tensor.shape, dtype=np.int64))
        lines.append(f"  parameters  {sum(sizes.values()) / 1e6:.2f}M in {len(tensors)} tensors, {', '.join(sizes)}")
        blocks = Counter(".".join(key.removeprefix("module.").split(".")[:2]) for key in tensors)
        shown = [f"{name} ({count})" for name, count in blocks.most_common(8)]
        lines.append(f"  structure   {', '.join(shown)}{', …' if len(blocks) > 8 else ''}")
    if fits := what_fits(found.kind, tensors):
        lines.append(f"  fits        {fits}")
    lines += [f"  note        {note}" for note in (*found.notes, *norms_note(found.norms))]
    taken = f"give it as {ARGUMENTS[found.kind]}" if found.supported and found.kind in ARGUMENTS else "not supported"
    return "\n".join([*lines, f"  use         {taken}"])


def tensors_of_parts(path: Path) -> dict:
    """Those of a base model in diffusers layout, each under its part's name."""
    from anidiff_jax.weights.store import STEMS, tensors_in

    parts = [part for part in STEMS if (path / part).is_dir()]
    return {f"{part}.{key}": tensor for part in parts for key, tensor in tensors_in(path / part, STEMS[part]).items()}


def what_fits(kind: str, tensors: Mapping) -> str:
    """With which models it works together, as the widths of its layers say: "" where they say nothing."""
    from anidiff_jax.weights import kinds

    width = next((t.shape[-1] for k, t in tensors.items() if re.search(r"attn2.to_k.*weight$", k) and not k.endswith("up.weight")
                  and ".lora_B." not in k and "motion_modules" not in k), None)  # fmt: skip
    if kind == kinds.MOTION:
        widths = dict.fromkeys(t.shape[0] for k, t in tensors.items() if "down_blocks" in k and k.endswith("proj_in.weight"))
        said = ", ".join(map(str, widths))
        return f"base models whose levels are {said} wide{', as those of Stable Diffusion 1.x and 2.x' * (said == '320, 640, 1280')}"
    if width is None or kind == kinds.TEXT:
        return ""
    family = {768: " (Stable Diffusion 1.x)", 1024: " (Stable Diffusion 2.x)", 2048: " (Stable Diffusion XL)"}.get(width, "")
    return f"{'text encoders' if kind in (kinds.BASE, kinds.UNET) else 'base models with text states'} {width} wide{family}"


if __name__ == "__main__":
    run_script(main)
