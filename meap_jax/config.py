"""Every field of a run: its default, its type, its unit, and the checks that stop an impossible one.

A file in `configs/` calls `base` or `paper`, changes what it is about and returns the result from `get_config()`.
Fields that a user may set but need not are typed placeholders; nothing is a list, since ml_collections can override
neither.
"""

import fnmatch
import math
import re
from collections.abc import Callable
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from meap_jax.errors import ConfigError

OBJECTIVES = ("ntp", "meap", "random_tokens", "token_dropout")
STRATEGIES = ("random", "span", "bernoulli", "shared", "official")
EMBEDDED_SOURCES = ("stdlib", "retrieval")  # Those that need no files; all others stand in data.sources.
PACKINGS = ("concat", "concat_segments", "best_fit")
TOKENIZERS = ("bpe", "mistral", "tekken")
ATTENTIONS = ("auto", "plain", "xla", "splash", "cudnn")
REMATS = ("none", "dots", "full", "offload")
SEEDS = ("init", "data", "mask", "noise")

# What may differ between a run's checkpoint and the config that resumes it. Everything else changes the experiment.
# Where data lies may change, since a fingerprint tells whether it is the same.
MAY_CHANGE_ON_RESUME = (
    "num_steps", "log.*", "eval.*", "checkpoint.*", "mesh.*", "profile.*",
    "data.prepared", "data.path", "data.sources.*.path", "data.sources.*.validation", "data.max_skipped",
)  # fmt: skip

# Sizes of the paper: Table 12 with the swap of layers and heads undone, and the official code's lit_gpt/config.py.
# Steps of 256 x 4,096 tokens, and the parameters they come to with a vocabulary of 32,064 and 2 kv heads.
PAPER_SIZES = {
    "100m": dict(num_layers=12, num_heads=12, embed_dim=768, mlp_dim=2048, num_steps=1_907),  # 122M
    "300m": dict(num_layers=24, num_heads=16, embed_dim=1024, mlp_dim=2736, num_steps=4_768),  # 324M
    "500m": dict(num_layers=24, num_heads=16, embed_dim=1024, mlp_dim=4864, num_steps=10_000),  # 481M
    "1b": dict(num_layers=24, num_heads=32, embed_dim=2048, mlp_dim=5632, num_steps=190_000),  # 1,176M
}


def is_path(tokenizer: str) -> bool:
    """Whether `data.tokenizer` is the path of a tokenizer and not a word; ./NAME is one, NAME isn't."""
    return "/" in tokenizer or tokenizer.endswith((".model", ".json"))


def base() -> ml_collections.ConfigDict:
    """All fields with their defaults; the sizes are those of a toy, the recipe is the paper's."""
    c = ml_collections.ConfigDict()
    c.seed = 0  # Gives the four seeds below.
    c.seeds = ml_collections.ConfigDict({name: placeholder(int) for name in SEEDS})  # Each can be set alone.
    c.num_steps = 1_000  # Optimizer steps.
    c.global_batch_size = 32  # Sequences a step, over all devices and micro-batches.
    c.grad_accum_steps = 1  # Micro-batches a step; the result is that of the whole batch.
    c.seq_len = 128  # Tokens the decoder sees; a block of data has one more.

    c.objective = o = ml_collections.ConfigDict()
    o.name = "meap"  # ntp, meap, or a control: random_tokens in the gaps, token_dropout (a zero embedding).
    o.mask_ratio = 0.15  # Share of input tokens, in [0, 1]; ntp ignores it. Paper: 0.15 in pre-training.
    o.strategy = "random"  # random, span, bernoulli, shared, or official (the released code's 51 masks).
    o.span_length = 5  # Tokens; only "span" reads it. Paper, Table 15: 5 and 50.
    o.mask_id = 32_000  # [MASK]; must be the tokenizer's.

    c.model = m = ml_collections.ConfigDict()
    m.num_layers = 2
    m.num_heads = 4
    m.num_kv_heads = 2  # Divides num_heads. Official code: 2 at every size.
    m.head_dim = 16  # Even, for RoPE.
    m.embed_dim = 64
    m.mlp_dim = 176  # Hidden width of SwiGLU.
    m.vocab_size = 32_064  # Rows of the embedding, padding included.
    m.rope_base = 10_000.0  # 640,000 in the paper's 64K extension.
    m.norm_eps = 1e-5
    m.dtype = "float32"  # Of activations: float32 or bfloat16. Parameters, norms, softmax and loss are always float32.
    m.init = "official"  # official (paper.md's variances) or normal (std 0.02, residual outputs / sqrt(2 layers)).
    m.attention = "auto"  # auto: splash on TPU, cudnn on GPU, else xla; plain: the definition, which holds all scores.
    m.unroll = 1  # Layers a scan step; changes the program, never the state.
    m.remat = "none"  # What the backward pass computes again: none, dots (all but matrix products), full, offload.

    c.loss = ml_collections.ConfigDict()
    c.loss.chunk_size = 2_048  # Positions of a device whose logits exist at a time; 0: all of them.
    c.loss.z_loss = 0.0  # Adds this times log Z squared, in training only; PaLM: 1e-4. Not in the paper.

    c.optimizer = a = ml_collections.ConfigDict()
    a.learning_rate = 4e-4  # Peak.
    a.warmup_fraction = 0.1  # Of num_steps, linear from 0.
    a.final_fraction = 0.1  # Of the peak, reached by cosine at num_steps.
    a.b1 = 0.9
    a.b2 = 0.95
    a.eps = 1e-8
    a.weight_decay = 0.05
    a.decay_on = (
        "all"  # all: as the official code, norms and embeddings too; matrices: what has two dimensions or more.
    )
    a.clip_norm = 1.0  # Global norm of the gradient.
    a.moment_dtype = "float32"  # Of both moments at rest: float32, or bfloat16 for half the memory.

    c.mesh = ml_collections.ConfigDict(dict(data=-1, fsdp=1, tensor=1, context=1))  # One may be -1: what is left.

    c.data = d = ml_collections.ConfigDict()
    d.mixture = "stdlib=1"  # source=weight,...; sources: stdlib, retrieval, and those of data.sources.
    d.path = placeholder(str)  # That of the source text: data.sources.text.path is this very field.
    d.sources = ml_collections.ConfigDict({"text": text_source(d.get_ref("path"))})
    # bpe: trained on the corpus, model.vocab_size ids; mistral: 32,000 pieces + [MASK]; tekken: 131,072 ids + [MASK];
    # or the path of a tokenizer.model (SentencePiece), tokenizer.json (Hugging Face), tekken.json or a folder of one.
    d.tokenizer = "bpe"
    d.prepared = placeholder(str)  # Folder of the frozen corpus; default: data/ in the workdir. Runs can share one.
    d.seed = 0  # Of what is generated; the order of blocks comes from seeds.data.
    d.holdout = 0.02  # Share of text documents in each of validation and test, where a source has none of its own.
    d.max_skipped = 1_000  # Bad records of a source that are passed over and counted; one more stops the preparation.
    # concat: one stream cut into blocks, without a mask between documents (the official code's); concat_segments: the
    # same, but no document sees another; best_fit: whole documents, padded. Retrieval documents always are whole.
    d.packing = "concat"
    d.retrieval = ml_collections.ConfigDict(
        dict(
            num_keys=16,  # Things that a fact can be about.
            num_values=16,  # Words that can be an access code.
            min_facts=2,  # A training document has this many facts ...
            num_facts=8,  # ... to this many, short documents prevailing.
            questions_per_fact=2.5,  # Asked after them, each about one of the facts, which may come up again.
            num_eval_facts=8,  # A held-out document has exactly this many, and asks each of them once.
            max_fillers=2,  # Sentences between facts and questions, 0 to this many.
            num_documents=20_000,  # For training.
            num_eval_documents=500,  # For each of validation and test.
        )
    )

    c.trainable = "*"  # Parameters that train, as globs of their names: layers.attn.*,head. "*": all.
    c.init_from = placeholder(str)  # Workdir of another run: its parameters, with a fresh optimizer and step 0.
    c.checkpoint = ml_collections.ConfigDict(dict(every=1_000, keep=2))  # Steps; how many are kept.
    c.log = ml_collections.ConfigDict(dict(every=10))  # Steps.
    c.eval = ml_collections.ConfigDict(
        dict(every=1_000, max_rows=1_000, tasks="validation,retrieval")
    )  # Steps; rows of each held-out set; names of evaluators.
    c.profile = ml_collections.ConfigDict(
        dict(start=10, num_steps=0)
    )  # First step of a trace for xprof; 0 steps: none.
    return c.lock()  # A misspelt field in a config file is an error, not a new field.


def text_source(path: Any = None) -> ml_collections.ConfigDict:
    """Fields of a source of text, with their defaults; `add_source` gives a config one more of them."""
    s = ml_collections.ConfigDict()
    # A file, a folder or a glob of .txt, .jsonl or .parquet (.jsonl also with .gz or .zst), local or a bucket's; a
    # dataset of TFDS, as tfds:c4/en; or a source that was prepared elsewhere, as prepared:/data/frozen/c4/text.
    s.path = placeholder(str) if path is None else path
    s.validation = ""  # The like for documents to hold out, half of them for test; empty: data.holdout of `path`.
    s.field = "text"  # Where a record has its text; dots go deeper.
    s.where = ""  # field=value: takes only such records, as meta.redpajama_set_name=RedPajamaGithub.
    s.max_tokens = 0  # The first documents that hold so many are the training data; 0: all.
    s.epochs = 0.0  # A run that would take more passes than this is refused; 0: any number.
    s.long_from = 0  # Tokens; with keep_shorter the length-upsampling of Fu et al., https://arxiv.org/abs/2402.10171.
    s.keep_shorter = 1.0  # Share of the shorter documents that stay, drawn from data.seed.
    return s


def add_source(c: ml_collections.ConfigDict, name: str, path: Any = None, **fields: Any) -> None:
    """Gives a config one more source of text, whose name the mixture can then use; `path` may be a reference."""
    if unknown := ", ".join(sorted(fields.keys() - text_source().keys())):
        raise ConfigError(f"add_source of {name} was given {unknown}, but sources have {', '.join(text_source())}.")
    with c.unlocked():
        c.data.sources[name] = text_source(path)
    c.data.sources[name].update(fields)


def paper(size: str, objective: str) -> ml_collections.ConfigDict:
    """Pre-training as in section 4.1 and Table 11 of the paper; `size` is a key of `PAPER_SIZES`."""
    c = base()
    shape = dict(PAPER_SIZES[size])
    c.num_steps = shape.pop("num_steps")
    c.model.update(shape)
    c.model.head_dim = c.model.embed_dim // c.model.num_heads
    c.model.dtype = "bfloat16"
    c.model.remat = "dots"
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


def seed_of(config: ml_collections.ConfigDict, name: str) -> int:
    """The seed for one use ("init", "data", "mask" or "noise"): its own if set, else the run's."""
    own = config.seeds[name]
    return config.seed if own is None else own


def mixture(config: ml_collections.ConfigDict) -> dict[str, float]:
    """`data.mixture` as {source: weight}, in the order written."""
    weights: dict[str, float] = {}
    for part in config.data.mixture.split(","):
        name, _, weight = part.strip().partition("=")
        if name in weights:
            raise ConfigError(f"data.mixture is {config.data.mixture!r}, but must name {name} once.")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = -1.0
        known = dict.fromkeys([*EMBEDDED_SOURCES, *config.data.sources])
        if name not in known or not 0 < weights[name] < math.inf:
            raise ConfigError(
                f"data.mixture is {config.data.mixture!r}, but {part.strip()!r} is not source=weight with a positive "
                f"weight and a source among {', '.join(known)}."
            )
    return weights


def has_segments(config: ml_collections.ConfigDict) -> bool:
    """Whether a row can hold several documents that don't see each other, or padding."""
    return config.data.packing != "concat" or "retrieval" in mixture(config)


def data_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What the data of a run depends on, as plain values: what `meap_jax.corpus.prepare.prepare` is given.

    `sources` holds what documents come from, `plans` how they are packed, by the name of the source.
    """
    d = config.data
    sources: dict[str, dict[str, Any]] = {}
    plans: dict[str, dict[str, Any]] = {}
    for name in mixture(config):
        plans[name] = {"max_tokens": 0, "long_from": 0, "keep_shorter": 1.0, "packing": d.packing}
        if name == "retrieval":
            sources[name] = {"kind": name, "seed": d.seed, **d.retrieval.to_dict()}
            plans[name]["packing"] = "best_fit"
        elif name == "stdlib":
            sources[name] = {"kind": name, "holdout": d.holdout}
        else:
            fields = d.sources[name].to_dict()
            plans[name] |= {field: fields[field] for field in ("max_tokens", "long_from", "keep_shorter")}
            read = {field: fields[field] for field in ("path", "validation", "field", "where")}
            sources[name] = {"kind": "text", "holdout": d.holdout, **read}
        plans[name] |= {"seq_len": config.seq_len, "seed": d.seed}
    return {
        "tokenizer": d.tokenizer,
        "vocab_size": config.model.vocab_size,
        "sources": sources,
        "plans": plans,
        "max_skipped": d.max_skipped,
    }


def flatten(config: ml_collections.ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """Nested fields as {"model.num_layers": 2, ...}."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict | ml_collections.ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def read_back(fields: dict[str, Any]) -> ml_collections.ConfigDict:
    """A config from the nested dict that a run wrote.

    Fields that its version did not have yet get their defaults, which do what that version did.

    Raises:
      ConfigError: it has fields that this version doesn't know.
    """
    known = flatten(base())
    unknown = {n for n in flatten(fields).keys() - known.keys() if not n.startswith("data.sources.")}
    if unknown:
        raise ConfigError(f"was written by a version that has {', '.join(sorted(unknown))}: use that version.")
    config = ml_collections.ConfigDict(fields)
    config.update_from_flattened_dict({n: v for n, v in known.items() if n not in flatten(fields)})
    return config


def changed_on_resume(old: dict, new: ml_collections.ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Fields in which a resumed run may not differ but does: {name: (checkpoint's value, config's value)}."""
    a, b = flatten(old), flatten(new)
    return {
        name: (a.get(name), b.get(name))
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name) and not any(fnmatch.fnmatchcase(name, free) for free in MAY_CHANGE_ON_RESUME)
    }


def check(config: ml_collections.ConfigDict, *, needs_data: bool = True) -> None:
    """Stops a config that cannot work, before anything is compiled.

    Args:
      config: of a run.
      needs_data: False where none is read, so that a config may leave `data.path` to be set.

    Raises:
      ConfigError: naming the first bad field, its value and what would be valid.
    """
    flat = flatten(config)

    def require(name: str, valid: Callable[[Any], bool], expected: str) -> None:
        if not valid(flat[name]):
            raise ConfigError(f"{name} is {flat[name]!r}, but must be {expected}.")

    positive = (
        "num_steps global_batch_size grad_accum_steps seq_len objective.span_length model.num_layers model.num_heads "
        "model.num_kv_heads model.head_dim model.embed_dim model.mlp_dim model.vocab_size model.unroll "
        "checkpoint.every checkpoint.keep log.every eval.every eval.max_rows profile.start data.retrieval.num_keys "
        "data.retrieval.num_values data.retrieval.min_facts data.retrieval.num_facts "
        "data.retrieval.num_eval_facts data.retrieval.num_documents data.retrieval.num_eval_documents"
    )
    for name in positive.split():
        require(name, lambda v: v >= 1, "at least 1")
    for name in ("seed", *(f"seeds.{s}" for s in SEEDS), "data.seed"):
        require(name, lambda v: v is None or 0 <= v < 2**32, "in [0, 2^32)")
    for name, choices in (
        ("objective.name", OBJECTIVES),
        ("objective.strategy", STRATEGIES),
        ("model.dtype", ("float32", "bfloat16")),
        ("model.init", ("official", "normal")),
        ("model.attention", ATTENTIONS),
        ("model.remat", REMATS),
        ("optimizer.decay_on", ("all", "matrices")),
        ("optimizer.moment_dtype", ("float32", "bfloat16")),
        ("data.packing", PACKINGS),
    ):
        require(name, choices.__contains__, f"one of {', '.join(choices)}")
    expected = f"one of {', '.join(TOKENIZERS)}, or a path with a / or the ending .model or .json"
    require("data.tokenizer", lambda v: v in TOKENIZERS or is_path(v), expected)

    require("objective.mask_ratio", lambda v: 0 <= v <= 1, "in [0, 1]")
    if config.objective.strategy == "official":
        most = (config.seq_len - 1) / config.seq_len
        expected = f"at most {most:.4g} with objective.strategy=official, which never masks the last position"
        require("objective.mask_ratio", lambda v: v <= most, expected)
    require(
        "objective.mask_id",
        lambda v: 0 <= v < config.model.vocab_size,
        f"an id below model.vocab_size ({config.model.vocab_size})",
    )
    require(
        "model.num_kv_heads",
        lambda v: config.model.num_heads % v == 0,
        f"a divisor of model.num_heads ({config.model.num_heads})",
    )
    require("model.head_dim", lambda v: v % 2 == 0, "even, for RoPE turns pairs")
    require("model.rope_base", lambda v: 0 < v < math.inf, "positive")
    require("model.norm_eps", lambda v: 0 < v < math.inf, "positive")
    require(
        "grad_accum_steps",
        lambda v: config.global_batch_size % v == 0,
        f"a divisor of global_batch_size ({config.global_batch_size})",
    )
    require("seq_len", lambda v: v >= 2, "at least 2")
    require("loss.chunk_size", lambda v: v >= 0, "0 or more")
    require("loss.z_loss", lambda v: 0 <= v < math.inf, "0 or more")
    require("optimizer.learning_rate", lambda v: 0 < v < math.inf, "positive")
    require("optimizer.weight_decay", lambda v: 0 <= v < math.inf, "0 or more")
    require("optimizer.clip_norm", lambda v: v > 0, "positive")
    require("optimizer.eps", lambda v: 0 < v < math.inf, "positive")
    for name in ("optimizer.warmup_fraction", "optimizer.final_fraction"):
        require(name, lambda v: 0 <= v <= 1, "in [0, 1]")
    for name in ("optimizer.b1", "optimizer.b2"):
        require(name, lambda v: 0 <= v < 1, "in [0, 1)")
    require("profile.num_steps", lambda v: v >= 0, "0 or more")
    most = config.num_steps - config.profile.num_steps + 1
    expected = f"at most {most}, so that profile.num_steps ({config.profile.num_steps}) end by num_steps"
    require("profile.start", lambda v: config.profile.num_steps == 0 or v <= most, expected)
    require("data.max_skipped", lambda v: v >= 0, "0 or more")
    require("data.holdout", lambda v: 0 < v < 0.5, "in (0, 0.5)")
    require("data.retrieval.max_fillers", lambda v: v >= 0, "0 or more")
    require("data.retrieval.questions_per_fact", lambda v: 0 < v < math.inf, "positive")
    for axis in ("data", "fsdp", "tensor", "context"):
        require(f"mesh.{axis}", lambda v: v >= 1 or v == -1, "a number of devices, or -1 for those that are left")
    if sum(size == -1 for size in config.mesh.values()) > 1:
        raise ConfigError(f"mesh is {config.mesh.to_dict()}, but only one axis may be -1.")
    for name in config.data.sources:
        _check_source(config, name, needs_data)


def _is_data_path(config: ml_collections.ConfigDict, name: str) -> bool:
    """Whether a source's path is data.path itself; of a config that was read back, which has no references, text's."""
    try:
        return config.data.sources[name].get_ref("path") is config.data.get_ref("path")
    except ValueError:  # A plain None has no reference.
        return name == "text"


def _check_source(config: ml_collections.ConfigDict, name: str, needs_data: bool) -> None:
    """One group of data.sources."""
    source, group = config.data.sources[name], f"data.sources.{name}"
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
    for field, valid, expected in (
        ("epochs", source.epochs >= 0, "0 or more"),
        ("max_tokens", source.max_tokens >= 0, "0 or more"),
        ("long_from", source.long_from >= 0, "0 or more"),
        ("keep_shorter", 0 <= source.keep_shorter <= 1, "in [0, 1]"),
        ("keep_shorter", source.keep_shorter == 1 or source.long_from > 0, "1 unless long_from says below what length"),
        ("where", not source.where or "=" in source.where, "empty or field=value"),
    ):
        if not valid:
            raise ConfigError(f"{group}.{field} is {source[field]!r}, but must be {expected}.")
