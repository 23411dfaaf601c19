"""Splits parameters into those that an optimizer step changes and those that it leaves as they are.

A parameter's name is its path with dots, such as layers.attn.q_proj. Gradients and moments exist for what trains only.
"""

import fnmatch

import jax
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
    for glob in map(str.strip, trainable.split(",")):
        found = fnmatch.filter(flat, glob)
        if not found:
            raise ConfigError(
                f"trainable is {trainable!r}, but {glob!r} matches no parameter: they are {', '.join(flat)}."
            )
        chosen.update(found)
    trained = {name: leaf for name, leaf in flat.items() if name in chosen}
    frozen = {name: leaf for name, leaf in flat.items() if name not in chosen}
    return traverse_util.unflatten_dict(trained, sep="."), traverse_util.unflatten_dict(frozen, sep=".")


def cast(params: Params, dtype: str) -> Params:
    """Gives every parameter a dtype."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


def merge(trained: Params, frozen: Params) -> Params:
    """Joins the two trees that `split` gave."""
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(trained) | traverse_util.flatten_dict(frozen))
