"""A run's config: built from the table of fields, checked by it, and compared with the one that a run began with.

A file in `configs/` calls `base` or `paper`, changes what it is about and returns the result from `get_config()`. The
fields are in `meap_jax.fields`.
"""

import copy
import fnmatch
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from meap_jax.checks import Field
from meap_jax.errors import ConfigError
from meap_jax.fields import FIELDS, SOURCE_FIELDS, fields_of

TYPES = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}  # Those of fields, in words.
EMBEDDED_SOURCES = ("stdlib", "retrieval")  # Those that need no files; all others are groups of data.sources.

# Objectives that say nothing of answers and their copies.
WITHOUT_COPIES_OF_ANSWERS = ("mir", "fcm", "dropout")

# What may differ between a run's checkpoint and the config that resumes it. Everything else changes the experiment.
# The path of data may change, since its content is compared by a fingerprint.
MAY_CHANGE_ON_RESUME = (
    "num_steps", "num_epochs", "log.*", "eval.*", "checkpoint.*", "mesh.*", "profile.*",
    "numerics.*", "watchdog.*", "debug.*",
    "data.prepared", "data.path", "data.sources.*.path", "data.sources.*.validation", "data.max_skipped",
    "data.max_skipped_share",
)  # fmt: skip

# Sizes of the paper: Table 12 with the swap of layers and heads undone, and the official code's lit_gpt/config.py.
# Steps of 256 x 4,096 tokens, and the parameters they come to with a vocabulary of 32,064 and 2 kv heads.
PAPER_SIZES = {
    "100m": dict(num_layers=12, num_heads=12, embed_dim=768, mlp_dim=2048, num_steps=1_907),  # 122M
    "300m": dict(num_layers=24, num_heads=16, embed_dim=1024, mlp_dim=2736, num_steps=4_768),  # 324M
    "500m": dict(num_layers=24, num_heads=16, embed_dim=1024, mlp_dim=4864, num_steps=10_000),  # 481M
    "1b": dict(num_layers=24, num_heads=32, embed_dim=2048, mlp_dim=5632, num_steps=190_000),  # 1,176M
}

# Models that the paper fine-tunes, as `meap_jax.convert import` writes them: their config.json's, and the place of
# [MASK], which is a token that Llama 3 reserves, or the first id that the tokenizer leaves free.
HUB_MODELS: dict[str, dict[str, Any]] = {
    "llama3_8b": dict(
        num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, embed_dim=4_096, mlp_dim=14_336,
        vocab_size=128_320, num_tokens=128_256, mask_id=128_002, rope_base=500_000.0,  # It lacks a padding token.
    ),
    "llama32_3b": dict(
        num_layers=28, num_heads=24, num_kv_heads=8, head_dim=128, embed_dim=3_072, mlp_dim=8_192, tie_embeddings=True,
        vocab_size=128_256, num_tokens=128_256, mask_id=128_002, rope_base=500_000.0,
        rope_scaling=dict(
            kind="llama3", factor=32.0, original_seq_len=8_192, low_freq_factor=1.0, high_freq_factor=4.0,
        ),
    ),
    "mistral_7b_v02": dict(
        num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, embed_dim=4_096, mlp_dim=14_336,
        vocab_size=32_064, num_tokens=32_001, mask_id=32_000, rope_base=1_000_000.0,
    ),
    "qwen25_14b": dict(
        num_layers=48, num_heads=40, num_kv_heads=8, head_dim=128, embed_dim=5_120, mlp_dim=13_824, qkv_bias=True,
        vocab_size=152_064, num_tokens=152_064, mask_id=151_665, rope_base=1_000_000.0,
    ),
}  # fmt: skip
# The official code has a template for Llama 3 alone, and the paper names none for the others: Qwen2.5's own form, and
# for Mistral the one that the official code names by default.
TEMPLATE_OF = {"llama3_8b": "llama3", "llama32_3b": "llama3", "mistral_7b_v02": "vicuna", "qwen25_14b": "chatml"}
# Of fine-tuning. The paper contradicts itself.
WEIGHT_DECAYS = {"table_19": 0.05, "section_4_2": 0.01}


def base() -> ml_collections.ConfigDict:
    """Makes a config of all fields with their defaults: the sizes of a toy, the paper's recipe."""
    c = _with_defaults({})
    add_source(c, "text", c.data.get_ref("path"))
    return c.lock()  # A misspelt field in a config file is an error, not a new field.


def read_back(fields: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Makes a config from the nested dict that a run wrote; fields that its version lacked get their defaults.

    Raises:
      ConfigError: it has fields that this version doesn't know, or isn't such a dict.
    """
    try:
        config = _with_defaults(fields)
        unknown = flatten(config).keys() - fields_of(config.data.sources).keys()
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise ConfigError("holds no config of a run: what should be a group of fields is something else.") from error
    if unknown:
        raise ConfigError(f"was written by a version that has {', '.join(sorted(unknown))}: use that version.")
    return config


def _with_defaults(fields: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Makes a config of these fields, nested, and the defaults of all others."""
    nested: dict[str, Any] = copy.deepcopy(dict(fields))
    sources = nested.setdefault("data", {}).setdefault("sources", {})
    for name, field in fields_of(sources).items():
        *groups, last = name.split(".")
        functools.reduce(lambda group, key: group.setdefault(key, {}), groups, nested).setdefault(last, _initial(field))
    return ml_collections.ConfigDict(nested)


def _initial(field: Field) -> Any:
    """The value of a field until it is set; ml_collections can override neither None nor a list."""
    return placeholder(field.default) if isinstance(field.default, type) else field.default


def add_source(c: ml_collections.ConfigDict, name: str, path: Any = None, **fields: Any) -> None:
    """Adds a source of text to a config, whose name the mixture can then use; `path` may be a reference."""
    if unknown := ", ".join(sorted(fields.keys() - SOURCE_FIELDS.keys())):
        known = ", ".join(sorted(SOURCE_FIELDS))
        raise ConfigError(f"add_source of {name} was given {unknown}, but sources have {known}.")
    defaults = {key: _initial(field) for key, field in SOURCE_FIELDS.items()}
    with c.unlocked():
        c.data.sources[name] = defaults if path is None else defaults | {"path": path}
    c.data.sources[name].update(fields)


def train_adapters(c: ml_collections.ConfigDict, rank: int = 16, alpha: float = 32.0, targets: str = "*_proj") -> None:
    """Makes a config train low-rank adapters alone: its `model.lora`, and `trainable`."""
    c.model.lora.update(dict(rank=rank, alpha=alpha, targets=targets))
    c.trainable = "*lora*"


def paper(size: str, objective: str) -> ml_collections.ConfigDict:
    """Makes the config of pre-training in section 4.1 and Table 11 of the paper; `size` is a key of `PAPER_SIZES`."""
    c = base()
    shape = dict(PAPER_SIZES[size])
    c.num_steps = shape.pop("num_steps")
    c.model.update(shape | dict(dtype="bfloat16", remat="dots"))
    c.model.head_dim = c.model.embed_dim // c.model.num_heads
    c.seed = 3407
    c.seq_len = 4096
    c.global_batch_size = 256
    c.grad_accum_steps = 4
    c.objective.name = objective
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.data.mixture = "text=1"
    c.data.tokenizer = "mistral"
    c.data.holdout = 0.001
    c.eval.every = 1_000
    c.eval.max_rows = 1_024
    c.checkpoint.every = 1_000
    return c


def fine_tuning(model: str, objective: str, weight_decay: str = "table_19") -> ml_collections.ConfigDict:
    """Makes the config of fine-tuning in section 4.2 and Table 19 of the paper, on conversations in `data.path`.

    Rows of 4,096 tokens hold many samples: 16 of them about as many of Alpaca's as the paper's batch of 512 samples.

    Args:
      model: a key of `HUB_MODELS`; `init_from` names the folder that `meap_jax.convert import` wrote.
      objective: meap, with a row of its own for each copy as in the official code, or ntp.
      weight_decay: a key of `WEIGHT_DECAYS`.
    """
    c = base()
    shape = dict(HUB_MODELS[model])
    c.objective.update(dict(name=objective, mask_ratio=0.10, mask_id=shape.pop("mask_id")))
    c.model.update(shape | dict(dtype="bfloat16", remat="full"))
    c.init_from = f"models/{model}"
    c.seed = 3407
    c.seq_len, c.global_batch_size = 4_096, 16
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.optimizer.update(dict(learning_rate=2e-5, final_fraction=0.0, weight_decay=WEIGHT_DECAYS[weight_decay]))
    c.data.update(dict(mixture="text=1", tokenizer=c.get_ref("init_from") + "/tokenizer", holdout=0.005))
    c.data.sources.text.format = "chat"
    c.sft.template = TEMPLATE_OF[model]
    c.sft.arrangement = "separate" if objective == "meap" else "none"
    c.num_epochs = 2.0 if objective == "meap" else 4.0  # Table 8.
    c.eval.every = c.checkpoint.every = 0  # At the end of each epoch.
    c.log.every = 10
    return c


def seed_of(config: ml_collections.ConfigDict, name: str) -> int:
    """The seed for one use ("init", "data", "mask" or "noise"): its own if set, else the run's."""
    return config.seed if config.seeds[name] is None else config.seeds[name]


def mixture(config: ml_collections.ConfigDict) -> dict[str, float]:
    """Parses `data.mixture` into {name of a source: weight}, in the order written."""
    weights: dict[str, float] = {}
    for entry in config.data.mixture.split(","):
        name, _, weight = entry.strip().partition("=")
        if name in weights:
            raise ConfigError(f"data.mixture is {config.data.mixture!r}, but must name {name} once.")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = -1.0
        known = dict.fromkeys([*EMBEDDED_SOURCES, *config.data.sources])
        if name not in known or not 0 < weights[name] < math.inf:
            raise ConfigError(
                f"data.mixture is {config.data.mixture!r}, but {entry.strip()!r} is not source=weight with a positive "
                f"weight and a source among {', '.join(known)}."
            )
    return weights


def is_due(config: ml_collections.ConfigDict, every: int, step: int) -> bool:
    """Whether something is due after a step: each `every` steps, or with 0 at the end of each epoch; and at the end."""
    if step == config.num_steps:
        return True
    if every:
        return step % every == 0
    epoch = config.num_steps / config.num_epochs  # In steps.
    return step == round(round(step / epoch) * epoch)


def flatten(config: ml_collections.ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """Flattens nested fields to {"model.num_layers": 2, ...}."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict | ml_collections.ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def changed_on_resume(old: Mapping[str, Any], new: ml_collections.ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Finds fields in which a resumed run may not differ but does: {name: (checkpoint's value, config's value)}."""
    a, b = flatten(_with_defaults(old)), flatten(new)
    return {
        name: (a.get(name), b.get(name))
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name) and not any(fnmatch.fnmatchcase(name, free) for free in MAY_CHANGE_ON_RESUME)
    }


def check(config: ml_collections.ConfigDict, *, needs_data: bool = True) -> None:
    """Checks that a config can work, before anything is compiled.

    Args:
      config: of a run.
      needs_data: False where none is read, so that a config may leave `data.path` to be set.

    Raises:
      ConfigError: naming the first bad field, its value and what would be valid.
    """
    _check_fields(FIELDS, flatten(config))
    if (tokens := config.global_batch_size * (config.seq_len + 1)) >= 2**31:
        raise ConfigError(
            f"global_batch_size is {config.global_batch_size:,}, but a step of rows of {config.seq_len:,} tokens must "
            f"have fewer than 2^31 (these are {tokens:,})."
        )
    if sum(size == -1 for size in config.mesh.values()) > 1:
        raise ConfigError(f"mesh is {config.mesh.to_dict()}, but only one axis may be -1.")
    for name in config.data.sources:
        _check_source(config, name, needs_data)
    _check_chat(config)


def _check_fields(fields: Mapping[str, Field], values: Mapping[str, Any], group: str = "") -> None:
    """Runs the checks of a table of fields; `group` is put before their names in the error."""
    for name, field in fields.items():
        if name not in values:
            raise ConfigError(f"the config lacks the field {group}{name}: make it by meap_jax.config.base().")
        value = values[name]
        if value is None and isinstance(field.default, type):
            continue
        wanted = _wanted(field, value) or next(
            (check.expected(values) for check in field.checks if not check.is_valid(value, values)), None
        )
        if wanted is not None:
            raise ConfigError(f"{group}{name} is {shown(value)}, but must be {wanted}.")


def _wanted(field: Field, value: Any) -> str | None:
    """What a value must be in place of what it is, "a whole number"; None where its type and size are right."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number if field.type is float else type(value) is field.type):
        return TYPES[field.type]
    return f"below {field.below:,}" if field.type is int and value >= field.below else None


def shown(value: Any) -> str:
    """A value as a message shows it, on one line and not too long for one."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python doesn't write numbers of thousands of digits.
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:60]}... ({len(text):,} characters)"


def _is_data_path(config: ml_collections.ConfigDict, name: str) -> bool:
    """Whether a source's path is data.path itself: a reference to it, or text's in a config that was read back."""
    try:
        return config.data.sources[name].get_ref("path") is config.data.get_ref("path")
    except ValueError:  # A plain None has no reference.
        return name == "text"


def _check_chat(config: ml_collections.ConfigDict) -> None:
    """Checks that fine-tuning has conversations alone, and that masks have copies to fall in."""
    chats = [name for name in mixture(config) if config.data.sources.get(name, {}).get("format") == "chat"]
    arrangement, objective = config.sft.arrangement, config.objective
    if not chats and arrangement != "none":
        raise ConfigError(
            f"sft.arrangement is {arrangement!r}, but no source of data.mixture ({config.data.mixture}) has "
            "the format chat, and other documents have no answers to copy: set it to none."
        )
    others = [name for name in mixture(config) if name not in chats]
    if chats and others:
        raise ConfigError(
            f"data.mixture is {config.data.mixture!r}, but {', '.join(others)} has no conversations: rows of both "
            "can't be in one batch; name sources with the format chat alone."
        )
    if chats and objective.name != "ntp" and objective.mask_ratio > 0 and arrangement == "none":
        raise ConfigError(
            f"sft.arrangement is 'none', but objective.name is {objective.name!r}, whose masks fall in copies of "
            "answers: set it to separate, shared_prefix or concat."
        )
    if chats and objective.name in WITHOUT_COPIES_OF_ANSWERS:
        raise ConfigError(
            f"objective.name is {objective.name!r}, but fine-tuning on conversations has copies of answers with "
            f"masks: train on other documents, or set another objective than {', '.join(WITHOUT_COPIES_OF_ANSWERS)}."
        )
    if chats and objective.where != "all":
        raise ConfigError(
            f"objective.where is {objective.where!r}, but masks of conversations fall in copies of answers: leave it "
            "out."
        )
    for name in chats:
        source = config.data.sources[name]
        for field in ("field", "max_tokens", "long_from"):
            if source[field] != SOURCE_FIELDS[field].default:
                raise ConfigError(
                    f"data.sources.{name}.{field} is {source[field]!r}, but a source of conversations is read whole: "
                    "leave it out."
                )
    if chats and objective.strategy == "official":
        raise ConfigError(
            "objective.strategy is 'official', but that is the official code's of pre-training: for its fine-tuning "
            "set objective.strategy=random and sft.masks=static."
        )
    if chats and config.sft.masks == "static" and objective.strategy != "random":
        raise ConfigError(
            f"objective.strategy is {objective.strategy!r}, but masks of sft.masks=static are drawn at random: set it "
            "to random."
        )


def _check_source(config: ml_collections.ConfigDict, name: str, needs_data: bool) -> None:
    """Checks one group of data.sources."""
    source, group = config.data.sources[name], f"data.sources.{name}"
    _check_fields(SOURCE_FIELDS, source, f"{group}.")
    path = "data.path" if _is_data_path(config, name) else f"{group}.path"
    if name in EMBEDDED_SOURCES or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name == "tokenizer":
        raise ConfigError(f"{group} is a source named {name!r}, but a name is letters, digits, _ and -, and not taken.")
    is_read = name in mixture(config)
    readers = [other for other in mixture(config) if other in config.data.sources and _is_data_path(config, other)]
    if not is_read and source.path is not None and not (path == "data.path" and readers):
        raise ConfigError(
            f"{path} is {source.path!r}, but data.mixture is {config.data.mixture!r}, which does not read it: "
            f"set data.mixture, such as --config.data.mixture={name}=1."
        )
    if needs_data and is_read and source.path is None and config.data.prepared is None:
        raise ConfigError(
            f"{path} is not set: name a folder of .txt or .jsonl files, such as --config.{path}=/data/books."
        )
