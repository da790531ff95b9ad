"""Parameter trees: nested dicts whose paths, joined with ".", are the diffusers keys.

A numeral belongs to the name before it: "to_out.0.weight" is {"to_out.0": {"weight": …}}, as the modules are named.
"""

from collections.abc import Callable, Mapping
from typing import Any

Tree = dict[str, Any]  # nested
Flat = dict[str, Any]  # key → array


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Flat:
    """Nested dict → {"a.b.c": leaf}."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def names_of(key: str) -> list[str]:
    """ "net.0.proj.weight" → ["net.0", "proj", "weight"]."""
    names: list[str] = []
    for part in key.split("."):
        if part.isdecimal() and names:
            names[-1] += f".{part}"
        else:
            names.append(part)
    return names


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """{"a.b.c": leaf} → nested dict."""
    tree: Tree = {}
    for key, value in flat.items():
        *path, leaf = names_of(key)
        node = tree
        for name in path:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


def split(tree: Mapping[str, Any], chosen: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """(leaves whose key is chosen, the rest)."""
    flat = flatten(tree)
    return unflatten({k: v for k, v in flat.items() if chosen(k)}), unflatten({k: v for k, v in flat.items() if not chosen(k)})


def merge(*trees: Mapping[str, Any]) -> Tree:
    """One tree of all leaves; a later tree wins."""
    joined: Flat = {}
    for tree in trees:
        joined.update(flatten(tree))
    return unflatten(joined)


def is_motion(key: str) -> bool:
    """Whether a UNet's parameter belongs to its motion modules."""
    return "motion_modules." in key


def is_buffer(key: str) -> bool:
    """Whether a tensor is stored beside the parameters but never trains."""
    return key.endswith("pos_embed.pe")
