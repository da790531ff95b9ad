"""The LoRA that lies between two motion adapters, by singular values: what full training changed, in a small file.

python convert/extract_lora.py --before ADAPTER --after CHECKPOINT --rank 32 --output my-lora
"""

import argparse
from pathlib import Path

from anidiff_jax.errors import UserError, run_script
from anidiff_jax.weights.hub import HUBS, resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, help="motion modules that were trained on")
    parser.add_argument("--after", required=True, help="motion modules that came of it")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA: more keeps more")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--hub", choices=HUBS, help="where hub ids are looked up; none = the one, then the other")
    args = parser.parse_args()

    from anidiff_jax.weights import files, store
    from anidiff_jax.weights.loras import save_lora
    from anidiff_jax.weights.merge import extract_lora
    from anidiff_jax.weights.sources import motion_source

    if args.rank < 1:
        raise UserError(f"--rank {args.rank} must be at least 1")
    store.must_not_exist(args.output)
    (_, before, _), (_, after, _) = (motion_source(resolve(path, hub=args.hub)) for path in (args.before, args.after))
    lora, share = extract_lora(before, after, args.rank)
    with files.written_whole(args.output) as out:
        header = {
            "kind": "LoRA",
            "made_from": f"{Path(args.after).name} - {Path(args.before).name}",
            "rank": str(args.rank),
            "kept": f"{share:.4f}",
        }
        save_lora(lora, out, alpha=args.rank, dropout=0.0, base=args.before, metadata=header)
    print(f"{args.output}: keeps {100 * share:.1f} % of the difference")


if __name__ == "__main__":
    run_script(main)
