"""What a config.json of transformers says of a decoder, in the fields of `model.*`, and back.

Read are the spellings of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`,
`dtype`); what a file leaves out is what transformers 5 takes for it (configuration_llama.py, _mistral.py, _qwen2.py).
Written is the older spelling, which both read.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from meap_jax.errors import ConfigError, DataError
from meap_jax.fields import windowed_layers
from meap_jax.model.config import ModelConfig

_EVERY_FAMILY = dict(
    vocab_size=32_000, hidden_size=4_096, num_hidden_layers=32, num_attention_heads=32, head_dim=None,
    rms_norm_eps=1e-6, tie_word_embeddings=False,
)  # fmt: skip
# Names of `model_type`, and what fields mean that a file leaves out.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": dict(intermediate_size=11_008, num_key_value_heads=None, max_position_embeddings=2_048),
    "mistral": dict(
        intermediate_size=14_336, num_key_value_heads=8, max_position_embeddings=131_072, sliding_window=4_096
    ),
    "qwen2": dict(
        vocab_size=151_936, intermediate_size=22_016, num_key_value_heads=32, max_position_embeddings=32_768,
        use_sliding_window=False, sliding_window=4_096, max_window_layers=28, layer_types=None,
    ),
}  # fmt: skip
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# Fields that this decoder has at one value only.
_FIXED = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, attention_dropout=0, use_mrope=False)
# Fields that say nothing about what the decoder computes.
_HARMLESS = frozenset(
    "architectures auto_map bos_token_id chunk_size_feed_forward diversity_penalty do_sample dtype eos_token_id "
    "finetuning_task id2label initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length "
    "min_length model_type num_beams output_attentions output_hidden_states pad_token_id prefix pretraining_tp "
    "problem_type repetition_penalty return_dict rope_theta rope_scaling rope_parameters temperature "
    "original_max_position_embeddings partial_rotary_factor tokenizer_class top_k top_p torch_dtype torchscript "
    "transformers_version typical_p use_bfloat16 use_cache".split()
)
DTYPES = {"float32": "float32", "float16": "bfloat16", "bfloat16": "bfloat16"}  # Of weights: the compute dtype.


class FromHub(NamedTuple):
    """What a config.json says."""

    family: str
    model: dict[str, Any]  # Fields of `model.*`; vocab_size as the file has it.
    seq_len: int  # The longest text.


def read(content: Mapping[str, Any], ignore: Collection[str] = ()) -> FromHub:
    """Reads a config.json.

    Args:
      content: of the file.
      ignore: fields that are not looked at.

    Raises:
      DataError: naming an architecture or a field that this decoder doesn't have, or a value that can't be.
    """
    family = str(content.get("model_type"))
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise DataError(f"config.json has model_type {family!r}, but this decoder knows {known}.")
    architectures = content.get("architectures") or [_ARCHITECTURES[family]]
    if architectures != [_ARCHITECTURES[family]]:
        raise DataError(f"config.json has architectures {architectures}, but must have [{_ARCHITECTURES[family]!r}].")
    f = {**_EVERY_FAMILY, **FAMILIES[family], **{key: value for key, value in content.items() if key not in ignore}}
    unknown = f.keys() - _EVERY_FAMILY.keys() - FAMILIES[family].keys() - _FIXED.keys() - _HARMLESS
    unknown = {name for name in unknown if not name.startswith("_")}
    if unknown:
        raise DataError(
            f"config.json has {', '.join(sorted(unknown))}, which may change what a {family} model computes and is not "
            "known here: if it does not, name it with --ignore."
        )
    for name, value in _FIXED.items():
        if (f.get(name) or value) != value:
            raise DataError(f"config.json has {name} {f[name]!r}, but this decoder has {value!r} only.")

    def number(name: str, low: int = 1) -> Any:
        value = f[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < math.inf:
            raise DataError(f"config.json has {name} {value!r}, but must have a number of {low} or more.")
        return value

    for name in ("num_key_value_heads", "head_dim"):
        if f[name] is None:
            quotient = number("hidden_size") // number("num_attention_heads")
            f[name] = quotient if name == "head_dim" else f["num_attention_heads"]
    window, layers = _window(family, f, number)
    base, scaling = _rope(f, number)
    model = dict(
        num_layers=number("num_hidden_layers"),
        num_heads=number("num_attention_heads"),
        num_kv_heads=number("num_key_value_heads"),
        head_dim=number("head_dim"),
        embed_dim=number("hidden_size"),
        mlp_dim=number("intermediate_size"),
        vocab_size=number("vocab_size"),
        rope_base=base,
        rope_scaling=scaling,
        norm_eps=number("rms_norm_eps", 0),
        tie_embeddings=bool(f["tie_word_embeddings"]),
        qkv_bias=family == "qwen2",
        window=window,
        window_layers=layers,
    )
    return FromHub(family, model, number("max_position_embeddings"))


def _window(family: str, f: Mapping[str, Any], number: Any) -> tuple[int, str]:
    """The window of attention, 0 for none, and the layers that have it, as in `model.window_layers`."""
    size = f.get("sliding_window")
    if family == "llama" or size is None or (family == "qwen2" and not f["use_sliding_window"]):
        return 0, "all"
    size = number("sliding_window")
    if family == "mistral":
        return size, "all"
    types = f["layer_types"]
    if types is None:
        first = f["max_window_layers"]
        types = ["full_attention" if i < first else "sliding_attention" for i in range(f["num_hidden_layers"])]
    if len(types) != f["num_hidden_layers"] or not {*types} <= {"full_attention", "sliding_attention"}:
        raise DataError(f"config.json has layer_types {types}, but must name full or sliding attention for each layer.")
    layers = [i for i, kind in enumerate(types) if kind == "sliding_attention"]
    if not layers:
        return 0, "all"
    return size, "all" if len(layers) == len(types) else ",".join(map(str, layers))


def _rope(f: Mapping[str, Any], number: Any) -> tuple[float, dict[str, Any]]:
    """The base of RoPE, and the fields of `model.rope_scaling` that are not at their defaults."""
    params = dict(f.get("rope_scaling") or f.get("rope_parameters") or {})
    kind = params.pop("rope_type", None) or params.pop("type", None) or "default"
    params.pop("type", None)
    base = params.pop("rope_theta", None) or f.get("rope_theta") or 10_000.0
    partial = params.pop("partial_rotary_factor", None) or f.get("partial_rotary_factor") or 1
    if partial != 1:
        raise DataError(f"config.json has partial_rotary_factor {partial}, but this decoder turns whole heads only.")
    original = params.pop("original_max_position_embeddings", None)
    original = f.get("original_max_position_embeddings") or original or number("max_position_embeddings")
    known = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    }
    if kind not in known:
        raise DataError(f"config.json scales RoPE by {kind!r}, but this decoder knows {', '.join(known)}.")
    given = {name: value for name, value in params.items() if value is not None}
    if unknown := given.keys() - {*known[kind]}:
        raise DataError(
            f"config.json has {', '.join(sorted(unknown))} for RoPE of the kind {kind!r}, which is unknown."
        )
    needed = {"default": (), "linear": ("factor",), "yarn": ("factor",)}.get(kind, known[kind])
    if missing := [name for name in needed if name not in given]:
        raise DataError(f"config.json scales RoPE by {kind!r} without {', '.join(missing)}.")
    if bad := {name: value for name, value in given.items() if not isinstance(value, int | float)}:
        raise DataError(f"config.json has {bad} for RoPE, but must have numbers.")
    if kind == "default":
        return float(base), {"kind": "none"}
    scale, all_dim = (given.pop(name, None) for name in ("mscale", "mscale_all_dim"))
    if kind == "yarn" and not given.get("attention_factor") and scale and all_dim and given["factor"] > 1:
        log = math.log(given["factor"])
        given["attention_factor"] = (0.1 * scale * log + 1) / (0.1 * all_dim * log + 1)
    if kind != "linear":
        given["original_seq_len"] = int(original)
    numbers = {
        name: value if name in ("truncate", "original_seq_len") else float(value) for name, value in given.items()
    }
    return float(base), {"kind": kind, **numbers}


def write(model: ModelConfig, seq_len: int, num_rows: int, dtype: str, family: str | None = None) -> dict[str, Any]:
    """Makes a config.json, without the ids of special tokens.

    Args:
      model: the decoder.
      seq_len: the longest text.
      num_rows: of the embedding that goes with it.
      dtype: of the weights.
      family: that it was imported as; default: the first one that can express it.

    Raises:
      ConfigError: no family, or not this one, can express the decoder.
    """
    reasons = {name: _why_not(name, model) for name in FAMILIES}
    able = [name for name in ([family] if family else FAMILIES) if not reasons[name]]
    if not able:
        why = "; ".join(f"{name} has no {reasons[name]}" for name in ([family] if family else FAMILIES))
        raise ConfigError(f"the model can't be written for transformers: {why}.")
    family = able[0]
    content: dict[str, Any] = dict(
        architectures=[_ARCHITECTURES[family]],
        model_type=family,
        vocab_size=num_rows,
        hidden_size=model.embed_dim,
        intermediate_size=model.mlp_dim,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        hidden_act="silu",
        max_position_embeddings=seq_len,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        rope_theta=model.rope_base,
        rope_scaling=_rope_scaling(model),
        attention_dropout=0.0,
        initializer_range=0.02,
        use_cache=True,
        torch_dtype=dtype,
    )
    if family == "llama":
        content |= dict(attention_bias=False, mlp_bias=False)
    else:
        content["sliding_window"] = model.window or None
    if family == "qwen2":
        types = ["sliding_attention" if has else "full_attention" for has in model.has_window]
        content |= dict(use_sliding_window=model.window > 0, max_window_layers=model.num_layers, layer_types=types)
    return content


def _why_not(family: str, model: ModelConfig) -> str:
    """What of a decoder a family lacks, in words; "" if nothing."""
    if model.qkv_bias != (family == "qwen2"):
        return "biases of q, k and v" if model.qkv_bias else "q, k and v without biases"
    if family == "llama" and model.window:
        return "window"
    if family == "llama" and model.embed_dim % model.num_heads:
        return f"width of {model.embed_dim} with {model.num_heads} heads"
    if family == "mistral" and not all(windowed_layers(model.window_layers, model.num_layers)):
        return "window in some layers only"
    return ""


def _rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    s = model.rope_scaling
    if s.kind == "none":
        return None
    content: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind != "linear":
        content["original_max_position_embeddings"] = s.original_seq_len
    if s.kind == "llama3":
        content |= dict(low_freq_factor=s.low_freq_factor, high_freq_factor=s.high_freq_factor)
    if s.kind == "yarn":
        content |= dict(beta_fast=s.beta_fast, beta_slow=s.beta_slow, truncate=s.truncate)
        content |= {"attention_factor": s.attention_factor} if s.attention_factor else {}
    return content
