"""Shows two models the same sequences, clean and masked, and measures the attention at the gaps."""

import functools
import hashlib
import logging
import platform
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Bool, Float32, Int32

from meap_jax import __version__
from meap_jax.analysis import contrasts, sequences
from meap_jax.analysis.attention import QUANTITIES, masked_key_statistics
from meap_jax.errors import ConfigError
from meap_jax.models import OpenModel, StoredModel, open_model, open_stored_model

_log = logging.getLogger("meap_jax.analysis")

CHOICES = {
    "unit": "a sequence; t tests and intervals (95 %) are of paired differences over sequences",
    "scope": "these figures speak of these two models on such sequences: with one model of each objective, from one "
    "seed, they say nothing of the objectives",
    "queries": "all that see the key, gaps or not; causal, and within its window where a layer has one",
    "quantities": QUANTITIES,
    "first_token": "with: as the model computes; without: no key, the other weights of a query divided by their sum",
    "layers": "the mean over those of --layers, and each one",
    "heads": "the mean over all of a layer, and each one's relative change of the mean over sequences",
    "variance": "of a population: the sum of squares is divided by the number",
    "relative": "the mean difference over the mean of the base; the score decay is its negative",
    "p_holm": "corrected for the rows of a table (contrasts, with and without the first token)",
    "gaps": "drawn without replacement, never the first token or the last",
}


def measure(
    opened: OpenModel,
    clean: Int32[np.ndarray, "S T"],
    masked: Int32[np.ndarray, "S T"],
    gaps: Bool[np.ndarray, "S T"],
) -> dict[str, dict[str, Float32[np.ndarray, "S L H 2"]]]:
    """The numbers of `attention.QUANTITIES` of one model on both inputs, {"clean" and "masked": {name: array}}."""
    model = opened.model
    program = functools.partial(masked_key_statistics, opened.params, definition=model.definition)
    with jax.set_mesh(model.mesh):
        return {
            given: sequences.in_batches(program, model.mesh, tokens, gaps)
            for given, tokens in (("clean", clean), ("masked", masked))
        }


def analyse(
    folders: Mapping[str, epath.Path],
    *,
    seq_len: int,
    num_sequences: int,
    text: str | None = None,
    mask_ratio: float = 0.15,
    seed: int = 0,
    layers: str = "all",
    mesh: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The analysis of masked keys on all of the 2 x 2 of model and input.

    Args:
      folders: {"ntp" and "meap": absolute workdir of a run, or of an imported model}.
      seq_len: tokens of a sequence, its begin of document included.
      num_sequences: at least 2.
      text: files; default: the English that CPython carries.
      mask_ratio: share of the positions but the first.
      seed: of the gaps.
      layers: over which means go: "all", or numbers from 0 on, "0,3".
      mesh: sizes of its axes, in place of the configs'.

    Returns:
      {"setting": what was measured how, and the results of `contrasts.summarize`}, of JSON's types.

    Raises:
      ConfigError, DataError: models that don't go together, or a setting or a text that can't be.
    """
    if num_sequences < 2:
        raise ConfigError(
            f"--num_sequences is {num_sequences}, but must be at least 2: sequences are what is tested over."
        )
    stored = {name: open_stored_model(folder, mesh=mesh) for name, folder in folders.items()}
    for name, own in stored.items():
        check_model(own, f"--{name}", folders[name], seq_len)
    check_pair(stored, folders)
    chosen = parse_layers(layers, stored["ntp"].model.definition.config.num_layers)
    tokenizer = stored["ntp"].tokenizer
    clean = sequences.cut_sequences(sequences.texts_of(text), tokenizer, seq_len, num_sequences)
    masked, gaps = sequences.draw_masks(clean, mask_ratio, tokenizer.mask_id, seed)
    cells = {}
    for name, folder in folders.items():  # One after the other: only one model's parameters are held.
        for given, quantities in measure(open_model(folder, mesh=mesh), clean, masked, gaps).items():
            cells[f"{name}_{given}"] = quantities
        _log.info("%s: %d sequences of %d tokens, clean and masked", folder, num_sequences, seq_len)
    setting = {
        "models": {name: about(own, folders[name]) for name, own in stored.items()},
        "seq_len": seq_len,
        "num_sequences": num_sequences,
        "text": text or f"the documentation of Python {platform.python_version()}",
        "tokens_sha256": hashlib.sha256(clean.tobytes()).hexdigest(),
        "mask_ratio": mask_ratio,
        "gaps_a_sequence": int(gaps[0].sum()),
        "seed": seed,
        "layers": chosen,
        "choices": CHOICES,
        "versions": {"meap_jax": __version__, "jax": jax.__version__, "python": platform.python_version()},
    }
    return {"setting": setting, **contrasts.summarize(cells, chosen)}


def about(stored: StoredModel, folder: epath.Path) -> dict[str, Any]:
    """What a record says of a model."""
    config = stored.model.config
    known = {"workdir": str(folder), "step": stored.step, "model": config.model.to_dict()}
    if "imported" in stored.meta:
        return known | {"imported": stored.meta["imported"]}
    objective = config.objective.to_dict()
    return known | {"objective": objective, "seed": config.seed, "trained_seq_len": config.seq_len}


def check_model(stored: StoredModel, flag: str, folder: epath.Path, seq_len: int) -> None:
    """Stops what can't be measured on one model.

    Raises:
      ConfigError: a mesh that splits sequences, or sequences that are too short or longer than the model's.
    """
    context, longest = stored.model.mesh.shape["context"], stored.model.config.seq_len
    if context > 1:
        raise ConfigError(
            f"mesh.context is {context}, but attention is looked at on whole sequences: give --mesh=context=1,data=-1."
        )
    if not sequences.SHORTEST <= seq_len <= longest:
        raise ConfigError(
            f"--seq_len is {seq_len}, but must be from {sequences.SHORTEST} to the {longest} of the model of {flag}, "
            f"{folder}."
        )


def check_pair(stored: Mapping[str, StoredModel], folders: Mapping[str, epath.Path]) -> None:
    """Stops models that can't be shown the same sequences and compared layer by layer; warns of swapped ones.

    Raises:
      ConfigError: naming what differs.
    """
    ntp, meap = stored["ntp"], stored["meap"]
    if ntp.meta["tokenizer"] != meap.meta["tokenizer"]:
        raise ConfigError(
            f"--ntp is {folders['ntp']} and --meap is {folders['meap']}, but their tokenizers differ: both models must "
            "read the same tokens."
        )
    for field in ("num_layers", "num_heads"):
        sizes = [getattr(own.model.definition.config, field) for own in (ntp, meap)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"model.{field} is {sizes[0]} in {folders['ntp']} and {sizes[1]} in {folders['meap']}, but must be the "
                "same: layers and heads are compared one by one."
            )
    for name, own in stored.items():
        trained = own.model.config.objective.name
        if "imported" not in own.meta and trained != name:
            _log.warning("--%s is %s, a run of the objective %s", name, folders[name], trained)


def parse_layers(text: str, num_layers: int) -> list[int]:
    """The numbers of layers in "all" or "0,3".

    Raises:
      ConfigError: for anything else, or a layer that isn't there or comes twice.
    """
    if text == "all":
        return list(range(num_layers))
    words = text.split(",")
    numbers = [int(word) for word in words if word.isascii() and word.isdigit()]
    if len(numbers) < len(words) or len(set(numbers)) < len(numbers) or max(numbers) >= num_layers:
        raise ConfigError(
            f"--layers is {text!r}, but must be all, or different numbers from 0 to {num_layers - 1}, such as 0,1."
        )
    return numbers
