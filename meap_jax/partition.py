"""Which parameters train: names that an optimizer step changes, and the rest, which it leaves as they are.

A parameter's name is its path with dots, such as layers.attn.q_proj. Gradients and moments exist for what trains only.
"""

import fnmatch

from flax import traverse_util

from meap_jax.errors import ConfigError
from meap_jax.model.decoder import Params


def split(params: Params, trainable: str) -> tuple[Params, Params]:
    """Divides parameters into those that train and those that don't.

    Args:
      params: nested dicts; the leaves may be anything.
      trainable: globs of names, such as "layers.attn.*,head"; "*" is all.

    Returns:
      Two trees of nested dicts that have no leaf in common; `merge` joins them again.

    Raises:
      ConfigError: a glob that no name matches.
    """
    flat = traverse_util.flatten_dict(params, sep=".")
    chosen: set[str] = set()
    for glob in trainable.split(","):
        found = fnmatch.filter(flat, glob.strip())
        if not found:
            raise ConfigError(
                f"trainable is {trainable!r}, but {glob.strip()!r} matches no parameter: they are {', '.join(flat)}."
            )
        chosen.update(found)
    parts = ({name: leaf for name, leaf in flat.items() if (name in chosen) == trains} for trains in (True, False))
    trained, frozen = (traverse_util.unflatten_dict(part, sep=".") for part in parts)
    return trained, frozen


def merge(trained: Params, frozen: Params) -> Params:
    """All parameters, from the two parts that `split` gave."""
    flat = (traverse_util.flatten_dict(part, sep=".") for part in (trained, frozen))
    return traverse_util.unflatten_dict({name: leaf for part in flat for name, leaf in part.items()}, sep=".")
