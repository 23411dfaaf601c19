"""Every field of a config, each in one place: its name, its default, what it means in which unit, and what is valid.

A new field is a line in `FIELDS`. Its default must mean what the code did before the field existed, since configs of
older runs are read with it.
"""

import fnmatch
import re
from collections.abc import Iterable

from meap_jax.checks import (
    ANY,
    DECAY_RATE,
    POSITIVE,
    SEED,
    SHARE,
    Check,
    Field,
    Values,
    above,
    at_least,
    at_most,
    divides,
    one_of,
    rule,
)

STRATEGIES = ("random", "span", "bernoulli", "shared", "official")
TEMPLATES = ("llama3", "vicuna", "alpaca", "chatml", "tokenizer")
TOKENIZERS = ("bpe", "mistral", "tekken")
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # Of a decoder layer.
SEEDS = {"init": "the initial weights", "data": "the order of blocks", "mask": "masks", "noise": "random tokens"}


def numbers(text: str) -> list[int]:
    """Reads a field such as eval.niah.lengths, "4000,8000"."""
    return [int(number) for number in text.split(",")]


def is_path(tokenizer: str) -> bool:
    """Whether `data.tokenizer` is the path of a tokenizer and not a word; ./NAME is one, NAME isn't."""
    return "/" in tokenizer or tokenizer.endswith((".model", ".json"))


def linear_layers(globs: str) -> tuple[str, ...]:
    """Reads `model.lora.targets`, such as "q_proj,v_proj" or "*_proj": the linear layers that are named.

    Raises:
      ValueError: for a glob that names none.
    """
    named: set[str] = set()
    for glob in map(str.strip, globs.split(",")):
        found = fnmatch.filter(LINEAR_LAYERS, glob)
        if not found:
            raise ValueError(glob)
        named.update(found)
    return tuple(name for name in LINEAR_LAYERS if name in named)


def windowed_layers(text: str, num_layers: int) -> tuple[bool, ...]:
    """Reads `model.window_layers`, such as "all" or "0,2,28-47": whether each layer is named.

    Raises:
      ValueError: for anything else, and for a layer that isn't there.
    """
    if text == "all":
        return (True,) * num_layers
    named: set[int] = set()
    for entry in text.split(","):
        first, dash, last = entry.strip().partition("-")
        if not 0 <= int(first) <= int(last if dash else first) < num_layers:
            raise ValueError(text)
        named.update(range(int(first), int(last if dash else first) + 1))
    return tuple(layer in named for layer in range(num_layers))


def roles_of(where: str) -> tuple[str, list[str]]:
    """Reads `objective.where`, such as "only:key,answer": its first word (all, only or never), and the roles."""
    word, _, roles = where.partition(":")
    return word, roles.split(",") if roles else []


def _are_linear_layers(globs: str) -> bool:
    try:
        return bool(linear_layers(globs))
    except ValueError:
        return False


def _are_layers(text: str, of: Values) -> bool:
    try:
        return any(windowed_layers(text, of["model.num_layers"]))
    except ValueError:
        return False


def _last_start(of: Values) -> int:
    return of["num_steps"] - of["profile.num_steps"] + 1


def _official_ratio(of: Values) -> float:
    return (of["seq_len"] - 1) / of["seq_len"]


WORDS = rule(lambda v: 1 <= v <= 64, "from 1 to 64", 0, 65)  # As many as meap_jax.corpus.retrieval has.
WHERE = rule(lambda v: bool(re.fullmatch(r"all|(only|never):\w+(,\w+)*", v)), "all, or only: or never: with roles of "
             "spans, such as only:key,answer", "some", "only:", "never", "only:key,")  # fmt: skip
FLOATS = one_of("float32", "bfloat16")
NUM_DEVICES = rule(lambda v: v >= 1 or v == -1, "a number of devices, or -1 for those that are left", 0, -2)
TOKENIZER = rule(lambda v: v in TOKENIZERS or is_path(v), f"one of {', '.join(TOKENIZERS)}, or a path with a / or the "
                 "ending .model or .json", "llama")  # fmt: skip
TEMPLATE = rule(lambda v: v in TEMPLATES or v.endswith(".jinja"), f"one of {', '.join(TEMPLATES)}, or the path of a "
                ".jinja file", "unheard-of")  # fmt: skip
ID = Check(
    lambda value, of: 0 <= value < of["model.vocab_size"],
    lambda of: f"an id below model.vocab_size ({of['model.vocab_size']})",
    wrong=(-1, 2**30),
)
LAYERS = Check(
    _are_layers,
    lambda of: f"all, or layers from 0 to {of['model.num_layers'] - 1} such as 0,2-3",
    wrong=("", "some", "0,99", "1-"),
)
TARGETS = rule(_are_linear_layers, f"globs of {', '.join(LINEAR_LAYERS)}", "", "q_proj,head")
NUMBERS = rule(lambda v: bool(re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", v)), "whole numbers from 1 on, such as 1,5,10", "",
               "0,1", "1-3")  # fmt: skip
COUNTS = rule(lambda v: bool(re.fullmatch(r"\d+(,\d+)*", v)), "whole numbers from 0 on, such as 0,1,8", "", "-1", "1-3")
PERCENTS = rule(lambda v: bool(re.fullmatch(r"(\d\d?|100)(,(\d\d?|100))*", v)), "whole numbers from 0 to 100, such as "
                "0,50,100", "", "101", "-1")  # fmt: skip
DIVIDES_BATCH = Check(
    lambda value, of: not value or of["global_batch_size"] % value == 0,
    lambda of: f"0 or a divisor of global_batch_size ({of['global_batch_size']})",
    wrong=(3,),
)
NEEDS_EPOCHS = Check(
    lambda value, of: value > 0 or of["num_epochs"] > 0,
    lambda of: "1 or more where num_epochs is 0",
    wrong=(0,),
)
ENDS_BY_NUM_STEPS = Check(
    lambda value, of: not of["profile.num_steps"] or value <= _last_start(of),
    lambda of: f"at most {_last_start(of)}, so that profile.num_steps ({of['profile.num_steps']}) end by num_steps",
    wrong=(10_000,), given={"profile.num_steps": 3},
)  # fmt: skip
SPARES_THE_LAST = Check(
    lambda value, of: of["objective.strategy"] != "official" or value <= _official_ratio(of),
    lambda of: f"at most {_official_ratio(of):.4g} with objective.strategy=official, which never masks the last "
               "position",
    wrong=(1.0,), given={"objective.strategy": "official"},
)  # fmt: skip
BEHIND_RAMP_BEGIN = Check(
    lambda value, of: value > of["objective.ramp_begin"],
    lambda of: f"above objective.ramp_begin ({of['objective.ramp_begin']})",
    wrong=(0.2,), given={"objective.ramp_begin": 0.5},
)  # fmt: skip
DRAWN_IN_EACH_STEP = Check(
    lambda value, of: of["objective.strategy"] != "official" and of["sft.masks"] != "static",
    lambda _: "unset with objective.strategy=official and with sft.masks=static, whose masks are made for one ratio",
    wrong=(0.05,), given={"objective.strategy": "official"},
)  # fmt: skip
NOT_WITH_FIXED_MASKS = Check(
    lambda value, of: not value or DRAWN_IN_EACH_STEP.is_valid(value, of),
    lambda _: "False with objective.strategy=official and with sft.masks=static, whose masks are made for one ratio",
    wrong=(True,), given={"sft.masks": "static"},
)  # fmt: skip
NEEDS_LONG_FROM = Check(
    lambda value, of: value == 1 or of["long_from"] > 0,
    lambda _: "1 unless long_from says below what length",
    wrong=(0.1,),
)

# fmt: off
FIELDS: dict[str, Field] = {
    "seed": Field(0, "Of the whole run; each of the seeds below that is set takes its place for one use.", SEED,
        below=ANY),
    **{f"seeds.{name}": Field(int, f"Of {use}.", SEED, below=ANY) for name, use in SEEDS.items()},
    "num_steps": Field(1_000, "Optimizer steps.", at_least(1)),
    "num_epochs": Field(0.0, "Passes over the training data, from which num_steps is computed; 0: num_steps counts.",
        at_least(0)),
    "global_batch_size": Field(32, "Sequences a step, over all devices and micro-batches.", at_least(1)),
    "grad_accum_steps": Field(1, "Micro-batches a step; the result is that of the whole batch.",
        at_least(1), divides("global_batch_size")),
    "seq_len": Field(128, "Tokens that the decoder sees; a block of data has one more.", at_least(2)),
    "trainable": Field("*", "Parameters that train, as globs of their names: layers.attn.*,head. *: all."),
    "frozen_dtype": Field("float32", "Of parameters that don't train; int4 and nf4: weights of linear layers in 4 "
        "bits, by the package qwix, and others in bfloat16.", one_of("float32", "bfloat16", "int4", "nf4")),
    "init_from": Field(str, "Workdir of another run: its parameters, with a fresh optimizer and step 0."),

    "model.num_layers": Field(2, "Layers.", at_least(1), below=2**16),
    "model.num_heads": Field(4, "Query heads.", at_least(1)),
    "model.num_kv_heads": Field(2, "Heads of keys and values. Official code: 2 at every size.",
        at_least(1), divides("model.num_heads")),
    "model.head_dim": Field(16, "Width of a head.",
        at_least(1), rule(lambda v: v % 2 == 0, "even, for RoPE turns pairs", 7)),
    "model.embed_dim": Field(64, "Width of the embedding and of the residual stream.", at_least(1)),
    "model.mlp_dim": Field(176, "Hidden width of SwiGLU.", at_least(1)),
    "model.vocab_size": Field(32_064, "Rows of the embedding, padding included.", at_least(1)),
    "model.num_tokens": Field(0, "Ids that the loss is about; rows from there on are padding that no probability goes "
        "to. 0: all rows count, as in the official code.", at_least(0), at_most("model.vocab_size")),
    "model.rope_base": Field(10_000.0, "Base of RoPE's wavelengths; 640,000 in the paper's 64K extension.", POSITIVE),
    "model.rope_scaling.kind": Field("none", "How RoPE's angles are changed for texts longer than those of "
        "pre-training: linear, llama3 or yarn, as transformers names and computes them.",
        one_of("none", "linear", "llama3", "yarn")),
    "model.rope_scaling.factor": Field(1.0, "Angles are divided by it: all (linear), or those that turn slowly.",
        at_least(1)),
    "model.rope_scaling.original_seq_len": Field(8_192, "Of pre-training, in tokens; llama3 and yarn.", at_least(1)),
    "model.rope_scaling.low_freq_factor": Field(1.0, "llama3: angles that turn less often than this in "
        "original_seq_len are divided by the factor, ...", POSITIVE),
    "model.rope_scaling.high_freq_factor": Field(4.0, "... and those that turn more often than this stay.",
        POSITIVE, above("model.rope_scaling.low_freq_factor")),
    "model.rope_scaling.beta_slow": Field(1.0, "The same for yarn: below so many turns, ...", POSITIVE),
    "model.rope_scaling.beta_fast": Field(32.0, "... and above so many.",
        POSITIVE, above("model.rope_scaling.beta_slow")),
    "model.rope_scaling.attention_factor": Field(0.0, "yarn: multiplies cosines and sines; 0: 0.1 ln(factor) + 1, as "
        "its paper says.", at_least(0)),
    "model.rope_scaling.truncate": Field(True, "yarn: rounds the bounds between slow and fast to whole dimensions."),
    "model.norm_eps": Field(1e-5, "Added to the mean square in RMSNorm.", POSITIVE),
    "model.tie_embeddings": Field(False, "The head is the embedding, transposed, and no parameter of its own."),
    "model.qkv_bias": Field(False, "Adds a bias to queries, keys and values, as Qwen2 does."),
    "model.window": Field(0, "Positions that a query sees, its own and those just before it; 0: all before it.",
        at_least(0)),
    "model.window_layers": Field("all", "Layers that have the window: all, or numbers and ranges, 0,2,28-47.", LAYERS),
    "model.dtype": Field("float32", "Of activations. Norms, softmax and loss are always computed in float32.", FLOATS),
    "model.init": Field("official", "Variances: official (paper.md's) or normal (0.02^2, residual outputs / 2 layers).",
        one_of("official", "normal")),
    "model.lora.rank": Field(0, "Of the adapter of each linear layer that targets names, which adds alpha / rank * "
        "(x A) B to x W (https://arxiv.org/abs/2106.09685); 0: no adapters. trainable='*lora*' trains them alone.",
        at_least(0)),
    "model.lora.alpha": Field(16.0, "Divided by the rank it multiplies what adapters add.", POSITIVE),
    "model.lora.targets": Field("*_proj", "Linear layers that have an adapter, as globs: q_proj,v_proj. *_proj: all.",
        TARGETS),
    "model.attention": Field("auto", "auto: splash on TPU, cudnn on GPU, else xla; plain: the definition, which holds "
        "all scores.", one_of("auto", "plain", "xla", "splash", "cudnn")),
    "model.unroll": Field(1, "Layers a scan step; changes the program, never the state.", at_least(1)),
    "model.remat": Field("none", "What the backward pass computes again: nothing (none), all but matrix products "
        "(dots), a whole layer (full), or that from inputs in the host's memory (offload).",
        one_of("none", "dots", "full", "offload")),

    "objective.name": Field("meap", "One of meap_jax.objective.OBJECTIVES: ntp, meap, mir (ntp plus masked_weight "
        "times meap), or a control: random_tokens in the masks' place, token_dropout (a zero embedding there), fcm (no "
        "attention to it) or dropout (of hidden states)."),
    "objective.strategy": Field("random", "How masks are drawn; official: the released code's 51 masks.",
        one_of(*STRATEGIES)),
    "objective.mask_ratio": Field(0.15, "Share of input tokens; ntp ignores it. Paper: 0.15 in pre-training.",
        SHARE, SPARES_THE_LAST),
    "objective.ramp_from": Field(float, "Share of input tokens up to ramp_begin; from there to ramp_end it goes in a "
        "straight line to mask_ratio, up or down. Unset: it is mask_ratio all along.", SHARE, DRAWN_IN_EACH_STEP),
    "objective.ramp_begin": Field(0.0, "Share of num_steps.", SHARE),
    "objective.ramp_end": Field(1.0, "Share of num_steps.", SHARE, BEHIND_RAMP_BEGIN),
    "objective.ratio_per_row": Field(False, "Each row draws its ratio from 0 to that of the step; MIR: to 0.5.",
        NOT_WITH_FIXED_MASKS),
    "objective.masked_weight": Field(0.4, "Of the loss on masked inputs, beside 1 on clean ones; only mir reads it.",
        at_least(0)),
    "objective.where": Field("all", "Tokens that may be masked: all; only:ROLE,ROLE: those in spans of these roles, as "
        "data knows them; never:ROLE,ROLE: all others. Ratios are of those that may.", WHERE),
    "objective.span_length": Field(5, "Tokens; only span reads it. Paper, Table 15: 5 and 50.", at_least(1)),
    "objective.mask_id": Field(32_000, "[MASK]; must be the tokenizer's.", ID),
    "loss.chunk_size": Field(2_048, "Positions of a device whose logits exist at a time; 0: all.", at_least(0)),
    "loss.z_loss": Field(0.0, "Adds this times log Z squared in training; PaLM: 1e-4. Not in the paper.", at_least(0)),

    "sft.template": Field("llama3", "How a conversation becomes text: llama3 (with the official code's system prompt), "
        "vicuna, alpaca, chatml; tokenizer: its own; or the path of a .jinja file.", TEMPLATE),
    "sft.system": Field(str, "System prompt of conversations that have none; unset: the template's own, if any."),
    "sft.turns": Field("all", "all: a sample is a conversation, with loss on every answer; each: a turn without what "
        "was said before, as in the official code.", one_of("all", "each")),
    "sft.too_long": Field("truncate", "What becomes of a sample longer than a block: truncate: it loses tokens at its "
        "beginning, behind bos; skip: it is left out, and counts for data.max_skipped.", one_of("truncate", "skip")),
    "sft.arrangement": Field("none", "Where the copy of a sample is whose answers MEAP masks: separate: a row of its "
        "own (official code); shared_prefix: the same result, the prompt computed once; concat: behind the clean "
        "answer, which it sees (the paper's text); none: there are no copies.",
        one_of("none", "separate", "shared_prefix", "concat")),
    "sft.epoch_of": Field("own", "Arrangement whose rows make an epoch, so that NTP can take as many steps, and so as "
        "much time, as MEAP; own: sft.arrangement.", one_of("own", "separate", "shared_prefix", "concat")),
    "sft.longer_than": Field(50, "Only answers of more tokens are masked, their end not counted.", at_least(0)),
    "sft.loss": Field("answers_and_masked", "answers_and_masked: all of the clean answers, and what is masked in the "
        "copy; masked: the latter alone where there is a copy. The paper has both.",
        one_of("answers_and_masked", "masked")),
    "sft.positions": Field("run_on", "RoPE's positions in the copy of concat: run_on behind the clean answer, or "
        "restart where that starts.", one_of("run_on", "restart")),
    "sft.masks": Field("fresh", "fresh: drawn anew in each step; static: once for each answer, as in the official "
        "code.", one_of("fresh", "static")),
    "sft.packed": Field(True, "A row holds as many samples as it has room for; else one, as in the official code."),
    "sft.rows_per_mean": Field(0, "0: the loss is a mean over all targets of a step; N: over each N rows, and then "
        "over those means, as the official code's over micro-batches.", at_least(0), DIVIDES_BATCH),

    "optimizer.learning_rate": Field(4e-4, "Peak.", POSITIVE),
    "optimizer.warmup_fraction": Field(0.1, "Of num_steps, linear from 0.", SHARE),
    "optimizer.final_fraction": Field(0.1, "Of the peak, reached by cosine at num_steps.", SHARE),
    "optimizer.b1": Field(0.9, "Decay rate of AdamW's first moment.", DECAY_RATE),
    "optimizer.b2": Field(0.95, "Decay rate of its second moment.", DECAY_RATE),
    "optimizer.eps": Field(1e-8, "Added to the root of its second moment.", POSITIVE),
    "optimizer.weight_decay": Field(0.05, "Times the learning rate, as in AdamW.", at_least(0)),
    "optimizer.decay_on": Field("all", "all: as the official code, norms and embeddings too; matrices: what has two "
        "dimensions or more.", one_of("all", "matrices")),
    "optimizer.clip_norm": Field(1.0, "Global norm of the gradient; inf: it is not clipped.",
        rule(lambda v: v > 0, "positive", 0.0, -1.0)),
    "optimizer.moment_dtype": Field("float32", "Of both moments between steps; bfloat16: half the memory.", FLOATS),
    "optimizer.param_dtype": Field("float32", "Of parameters that train, between steps; bfloat16: each update is "
        "rounded, and there is no float32 copy.", FLOATS),
    "optimizer.rounding": Field("stochastic", "Of updates to bfloat16 parameters: stochastic, right in the mean; "
        "nearest, which loses those below 1/512 of their parameter.", one_of("stochastic", "nearest")),

    "mesh.data": Field(-1, "Devices over which rows are split. One axis may be -1: what is left.", NUM_DEVICES),
    "mesh.fsdp": Field(1, "Devices over which rows are split, and parameters with their moments.", NUM_DEVICES),
    "mesh.tensor": Field(1, "Devices over which heads, hidden widths and the vocabulary are split.", NUM_DEVICES),
    "mesh.context": Field(1, "Devices over which a sequence is split.", NUM_DEVICES),

    "data.mixture": Field("stdlib=1", "source=weight,...; sources: stdlib, retrieval, and those of data.sources."),
    "data.path": Field(str, "Files of the source named text; the same field as data.sources.text.path."),
    "data.tokenizer": Field("bpe", "bpe: trained on the corpus, model.vocab_size ids; mistral: 32,000 pieces + [MASK]; "
        "tekken: 131,072 ids + [MASK]; or the path of a tokenizer.model (SentencePiece), tokenizer.json (Hugging "
        "Face), tekken.json or a folder of one.", TOKENIZER),
    "data.prepared": Field(str, "Folder of the frozen corpus; default: data/ in the workdir. Runs can share one."),
    "data.seed": Field(0, "Of what is generated; the order of blocks comes from seeds.data.", SEED,
        below=ANY),
    "data.holdout": Field(0.02, "Share of text documents in each of validation and test, where a source has none of "
        "its own.", rule(lambda v: 0 < v < 0.5, "in (0, 0.5)", 0.0, 0.5)),
    "data.max_skipped": Field(1_000, "Bad records of a source that are passed over; one more stops the preparation.",
        at_least(0), below=ANY),
    "data.max_skipped_share": Field(0.1, "Share of a source's records that may be bad; more than that, and more than "
        "ten, stop the preparation. 1: any share.", SHARE),
    "data.packing": Field("concat", "concat: one stream cut into blocks, without a mask between documents (the "
        "official code's); concat_segments: the same, but no document sees another; best_fit: whole documents, padded. "
        "Retrieval documents and conversations always are whole.", one_of("concat", "concat_segments", "best_fit")),

    "data.retrieval.num_keys": Field(16, "Things that a fact can be about.", WORDS),
    "data.retrieval.num_values": Field(16, "Words that can be an access code.", WORDS),
    "data.retrieval.num_facts": Field(8, "Facts of a training document at most, short documents prevailing.",
        at_least(1), at_most("data.retrieval.num_keys", "data.retrieval.num_values")),
    "data.retrieval.min_facts": Field(2, "Facts of a training document at least.",
        at_least(1), at_most("data.retrieval.num_facts")),
    "data.retrieval.questions_per_fact": Field(2.5, "Questions for each fact of a training document, each about a "
        "fact drawn anew.", POSITIVE),
    "data.retrieval.num_eval_facts": Field(8, "Facts of a held-out document, which asks each of them once.",
        at_least(1), at_most("data.retrieval.num_keys", "data.retrieval.num_values")),
    "data.retrieval.max_fillers": Field(2, "Sentences between facts and questions, 0 to this many.", at_least(0)),
    "data.retrieval.num_documents": Field(20_000, "Documents for training.", at_least(1)),
    "data.retrieval.num_eval_documents": Field(500, "Documents for each of validation and test.", at_least(1)),

    "checkpoint.every": Field(1_000, "Steps between checkpoints; 0: one at the end of each epoch.",
        at_least(0), NEEDS_EPOCHS),
    "checkpoint.keep": Field(2, "Checkpoints that are kept, the newest ones.", at_least(1)),
    "checkpoint.keep_every": Field(0, "Steps: checkpoints at its multiples are kept too; 0: none.", at_least(0)),
    "checkpoint.keep_best": Field(0, "So many with the lowest validation loss are kept too, of those at whose step "
        "it was measured.", at_least(0)),
    "checkpoint.export": Field("none", "What is written beside each checkpoint, as export/STEP in the workdir: merge: "
        "the model as transformers loads it; peft: its adapters alone, as PEFT loads them; none.",
        one_of("none", "merge", "peft")),
    "numerics.max_skipped": Field(10, "Steps in a row whose loss or gradient is not finite, and whose update is "
        "skipped; one more stops the run.", at_least(0)),
    "numerics.spike": Field(0.0, "A loss is a spike if it is above the median of the last ones by so many times their "
        "median absolute deviation; 0: it is not looked for.", at_least(0)),
    "numerics.spike_window": Field(100, "How many last ones.", at_least(10)),
    "numerics.max_rewinds": Field(0, "After so many spikes at most the run goes back to its last checkpoint and "
        "leaves out the data that it has read since; 0: spikes are logged alone.", at_least(0)),
    "numerics.check_replicas": Field(0, "Steps between comparisons, by checksums, of what several devices hold; 0: "
        "none.", at_least(0)),
    "watchdog.times_median": Field(20.0, "A step hangs if it takes so many times the median step ...",
        rule(lambda v: v > 1, "above 1", 1.0)),
    "watchdog.least_seconds": Field(600.0, "... and more seconds than this: stacks are written, and the run ends. 0: "
        "nothing is watched.", at_least(0)),
    "watchdog.other_seconds": Field(7_200.0, "Compilation, an evaluation or a save hangs if it takes longer.",
        POSITIVE),
    "debug.check_determinism": Field(False, "Takes each step twice and stops the run where the results differ in a "
        "bit."),
    "log.every": Field(10, "Steps between records.", at_least(1)),
    "eval.every": Field(1_000, "Steps between evaluations; 0: at the end of each epoch.", at_least(0), NEEDS_EPOCHS),
    "eval.max_rows": Field(1_000, "Rows of each held-out set.", at_least(1)),
    "eval.tasks": Field("validation,retrieval", "Evaluators that are run, by their names in evals.EVALUATORS."),
    "eval.batch_size": Field(8, "Prompts at a time, for tasks that generate or score.", at_least(1)),
    "eval.seq_len": Field(0, "Tokens of a prompt and its answer at most, for tasks that generate or score; above "
        "seq_len a model is asked for more than it was trained on. 0: seq_len.", at_least(0)),
    "eval.chat": Field(False, "Puts each prompt into the model's chat template, as the message of a user."),
    "eval.seed": Field(0, "Of the questions that a task generates or draws.", SEED, below=ANY),
    "eval.facts.counts": Field("2,4,7,10,13,16", "Facts of a document, each number for itself.", NUMBERS),
    "eval.facts.fillers": Field("0,1", "Sentences between the facts and the questions of a document.", COUNTS),
    "eval.facts.documents": Field(30, "With each number of facts and of fillers.", at_least(1)),
    "eval.niah.haystack": Field(str, "Text that needles are put into, as in data.path; unset: Python's documentation."),
    "eval.niah.needles": Field(str, "A .jsonl with needle, question and answer in each line; unset: built-in ones."),
    "eval.niah.prompt": Field(str, "A file with {context} and {question} in it; unset: a built-in prompt."),
    "eval.niah.lengths": Field("4000,8000,12000,16000,20000,24000,28000,32000", "Tokens of a prompt and of the room "
        "for its answer. Paper, Figure 3.", NUMBERS),
    "eval.niah.depths": Field("0,10,20,30,40,50,60,70,80,90,100", "Where the needle is, in % of the context.",
        PERCENTS),
    "eval.niah.trials": Field(5, "Needles, each at another place of the haystack, in each cell.", at_least(1)),
    "eval.ruler.tasks": Field("niah_single_1,niah_multikey_2,niah_multikey_3,vt,cwe,fwe", "Tasks of RULER; these need "
        "no text. Over eval.niah.haystack: niah_single_2, niah_single_3, niah_multikey_1, niah_multivalue, "
        "niah_multiquery."),
    "eval.ruler.prompts": Field(str, "A .json with the prompt of tasks, as docs/evals.md says; unset: built-in ones."),
    "eval.ruler.lengths": Field("4096,8192,16384,32768", "As eval.niah.lengths; the first is the base of the effective "
        "length.", NUMBERS),
    "eval.ruler.trials": Field(100, "Prompts of each task and length. RULER: 500.", at_least(1)),
    "eval.mdqa.path": Field(str, "A .jsonl or .jsonl.gz of lost-in-the-middle: with k documents, or its oracle file."),
    "eval.mdqa.mode": Field("documents", "documents: the gold one among others; oracle: it alone; closed_book: none.",
        one_of("documents", "oracle", "closed_book")),
    "eval.mdqa.num_documents": Field(20, "Documents of a context that is built from the oracle file.", at_least(2)),
    "eval.mdqa.positions": Field("1,5,10,15,20", "Of the gold document, from 1; built from the oracle file.", NUMBERS),
    "eval.mdqa.prompt": Field(str, "A file with {search_results} and {question} in it, as lost-in-the-middle's; unset: "
        "built-in ones."),
    "eval.mdqa.max_questions": Field(0, "The first so many; 0: all.", at_least(0)),
    "eval.kv.path": Field(str, "A .jsonl or .jsonl.gz of lost-in-the-middle's key-value retrieval; unset: generated."),
    "eval.kv.num_keys": Field(75, "Pairs of a generated context.", at_least(1)),
    "eval.kv.positions": Field("1,25,50,75", "Of the pair that is asked for, from 1.", NUMBERS),
    "eval.kv.prompt": Field(str, "A file with {formatted_kv_records} and {key} in it; unset: a built-in one."),
    "eval.kv.max_questions": Field(500, "The first so many of the file, or generated.", at_least(1)),
    "eval.mneedle.needles": Field(str, "A .json of NeedleBench's form; unset: built-in chains."),
    "eval.mneedle.prompt": Field(str, "A file with {context} and {question} in it; unset: a built-in prompt."),
    "eval.mneedle.lengths": Field("8000,12000,16000,20000,24000,28000,32000", "As eval.niah.lengths. Paper, Figure 4.",
        NUMBERS),
    "eval.mneedle.depths": Field("0,10,21,31,42,52,63,73,84,94,100", "Of the first needle, in % of the context.",
        PERCENTS),
    "eval.mneedle.counts": Field("2,3,4,5", "Needles that answer a question together.", NUMBERS),
    "eval.mneedle.spacing": Field(10.0, "% of the context between a needle and the next one.", POSITIVE),
    "eval.mneedle.buffer": Field(600, "Tokens of a prompt that are left free for its answer and for needles.",
        at_least(1)),
    "eval.mneedle.trials": Field(5, "Chains of needles for each cell and number of needles.", at_least(1)),
    "eval.commonsense.tasks": Field("arc_challenge,arc_easy,boolq,piqa,hellaswag,winogrande,openbookqa", "Tasks of "
        "lm-eval. These are the paper's."),
    "eval.commonsense.include_path": Field(str, "Folder with more task files of lm-eval, for data on this machine."),
    "eval.commonsense.bos": Field("auto", "Whether a request begins with the begin of a document: auto: as the model's "
        "other prompts do.", one_of("auto", "yes", "no")),
    "eval.commonsense.too_long": Field("truncate", "What becomes of a request longer than seq_len: truncate: its left "
        "end is cut off; skip: it is not scored.", one_of("truncate", "skip")),
    "eval.commonsense.limit": Field(0, "The first so many documents of each task; 0: all.", at_least(0)),
    "eval.summaries.path": Field(str, "name=FILE,...: .jsonl files of documents with summaries, such as "
        "xsum=/data/xsum.jsonl."),
    "eval.summaries.document": Field("document", "Field of a record that is summarized."),
    "eval.summaries.summary": Field("summary", "Field of a record that is the reference."),
    "eval.summaries.num_documents": Field(100, "Drawn from each file, by eval.seed. Paper: 100.", at_least(1)),
    "eval.summaries.max_new_tokens": Field(128, "Of a summary.", at_least(1)),
    "eval.summaries.judge_url": Field(str, "Of an OpenAI-compatible endpoint, such as http://localhost:8000/v1; unset: "
        "no judge. The key comes from the environment, OPENAI_API_KEY."),
    "eval.summaries.judge_model": Field("", "Name of the judge at that endpoint."),
    "eval.summaries.judge_budget": Field(1_000, "Requests to the judge at most, retries included.", at_least(0)),
    "profile.num_steps": Field(0, "Steps of a trace for xprof; 0: no trace.", at_least(0)),
    "profile.start": Field(10, "First step of the trace.", at_least(1), ENDS_BY_NUM_STEPS),
}

SOURCE_FIELDS: dict[str, Field] = {  # Of each group data.sources.NAME.
    "path": Field(str, "A file, a folder or a glob of .txt, .jsonl or .parquet (.jsonl also with .gz or .zst), local "
        "or a bucket's; a dataset of TFDS, as tfds:c4/en; or a source that was prepared elsewhere, as "
        "prepared:/data/frozen/c4/text."),
    "validation": Field("", "Files, as in path, to hold out, half of them for test; empty: data.holdout of path."),
    "format": Field("text", "text; or chat: each record is a conversation, as Alpaca (instruction, input, output), "
        "ShareGPT (conversations) or OpenAI (messages) have them.", one_of("text", "chat")),
    "field": Field("text", "Where a record has its text; dots go deeper."),
    "where": Field("", "field=value: takes only such records, as meta.redpajama_set_name=RedPajamaGithub.",
        rule(lambda v: not v or "=" in v, "empty or field=value", "novalue")),
    "max_tokens": Field(0, "The first documents that hold so many are the training data; 0: all.", at_least(0),
        below=ANY),
    "epochs": Field(0.0, "A run that would take more passes than this is refused; 0: any number.", at_least(0)),
    "long_from": Field(0, "Tokens; with keep_shorter the length-upsampling of Fu et al., "
        "https://arxiv.org/abs/2402.10171.", at_least(0)),
    "keep_shorter": Field(1.0, "Share of the shorter documents that stay, drawn from data.seed.",
        SHARE, NEEDS_LONG_FROM),
}
# fmt: on


def fields_of(sources: Iterable[str]) -> dict[str, Field]:
    """Returns all fields of a config that has these groups in `data.sources`."""
    return FIELDS | {f"data.sources.{name}.{key}": field for name in sources for key, field in SOURCE_FIELDS.items()}
