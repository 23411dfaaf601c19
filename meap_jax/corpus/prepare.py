"""Freezes corpora as token ids, once, in a folder that many runs share.

    python -m meap_jax.corpus.prepare --config=configs/meap_1b.py --config.data.path=/c4 --config.data.prepared=/frozen

`meap_jax.main` does the same by itself where the folder isn't there yet. A folder holds

- tokenizer.json or the like, and manifest.json, which names it and its hash;
- a folder a source: shards of documents (`meap_jax.data.store`), manifest.json with options, counts and hashes;
- in it plans/, one for each way of packing that was asked for (`meap_jax.data.plans`).

A source that isn't there is added, a plan that isn't there too; what is there is never written again. Everything is
made beside its place and renamed when it is complete, and an interrupted source goes on at the shard it was at.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import logging
import os
import platform
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from meap_jax import tokenizers
from meap_jax.corpus.packing import check_skipped, make_plans
from meap_jax.corpus.shards import ShardMaker, check_share, jobs, read_summary, run_here, run_jobs, skips_by_reason
from meap_jax.corpus.sources import TRAIN, Retrieval, Source, TokenIds, open_source
from meap_jax.data.manifest import MANIFEST, check_options, hash_of, read_manifest, write_manifest
from meap_jax.data.prepared import Prepared, open_tokenizer, plan_folder
from meap_jax.data.spec import ChatPlanSpec, ChatSourceSpec, DataSpec, SourceSpec, TextSourceSpec, data_spec
from meap_jax.data.store import MAX_DOCUMENTS, SPLITS, EncodedDocument, completed, index_files, merge_indices
from meap_jax.errors import ConfigError, DataError
from meap_jax.fields import is_path
from meap_jax.paths import is_url
from meap_jax.readers import Skips

# Enough of a source for merges that no longer change, whatever its size. Generated text repeats itself, so it gets
# about as much as the standard library has.
_BPE_CHARACTERS = 50_000_000
_BPE_GENERATED_CHARACTERS = 2_500_000

_log = logging.getLogger("meap_jax.corpus.prepare")  # Not __name__, which is __main__ where this is a command.


def prepare(
    folder: str | os.PathLike[str], spec: DataSpec, *, workers: int | None = None, shard_maker: ShardMaker | None = None
) -> Prepared:
    """Prepares what a config needs in a folder, and opens it; what is there already is used as it is.

    Text is split by document, by a hash of it (see `sources`). Where that leaves a split without one full block, as a
    single book does, the whole source is packed and the share `holdout` of its blocks, at least one, is cut off the end
    for test and again for validation; the plan's manifest has `split_by: block`.

    Args:
      folder: a local folder, or one that is mounted; made with its parents.
      spec: `data_spec` of the run's config.
      workers: processes of this machine that tokenize; default: one a core.
      shard_maker: what makes the shards instead of them, such as `meap_jax.corpus.beam.run_on_beam`.

    Raises:
      ConfigError: impossible options, or a folder that was prepared with others.
      DataError: the sources cannot be read or give too little, the folder is damaged or the disk is full; starting
        again goes on with what is complete.
    """
    folder = _local(folder)
    _check_paths(folder, spec)
    shard_maker = shard_maker or functools.partial(run_here, workers=workers or len(os.sched_getaffinity(0)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = [name for name in os.listdir(folder) if not name.startswith((".", "tokenizer", "tekken"))]
    except OSError as error:
        raise ConfigError(
            f"data.prepared is {folder}, but must be a folder that can be made: {error.strerror}."
        ) from error
    if foreign:
        read_manifest(folder)  # An error where the folder is one of something else.
    try:
        with _alone(folder):
            before = os.listdir(folder)
            try:
                return _prepare(folder, spec, shard_maker)
            except BaseException:
                _remove_what_came(folder, before)
                raise
    except OSError as error:
        raise DataError(f"{folder} can't be completed: {error}. What is complete stays: start again.") from error


def _check_paths(folder: Path, spec: DataSpec) -> None:
    """Stops a config with a source that isn't prepared and has no path, or a path that the folder is in.

    And one whose own tokenizer is in the folder, where it would be written over.
    """
    if is_path(spec.tokenizer) and Path(spec.tokenizer).expanduser().resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"data.prepared is {folder}, but must be another folder than that of data.tokenizer ({spec.tokenizer})."
        )
    for name, source in spec.sources.items():
        if not isinstance(source, TextSourceSpec) or (folder / name).exists():
            continue
        if source.path is None:
            raise ConfigError(
                f"data.sources.{name}.path is not set, and {folder} holds no {name} that was prepared: name a folder "
                "of .txt or .jsonl files, or another data.prepared."
            )
        for field, path in (("path", source.path), ("validation", source.validation)):
            place = Path(path).expanduser()
            if path and place.is_dir() and folder.resolve().is_relative_to(place.resolve()):
                raise ConfigError(
                    f"data.prepared is {folder}, which lies in data.sources.{name}.{field} ({path}) and would "
                    "be read as text: name a folder outside of it."
                )


def _remove_what_came(folder: Path, before: Sequence[str]) -> None:
    """Removes the tokenizer where no source was begun, so that other options can be tried at once; then the folder."""
    with contextlib.suppress(OSError):  # It may be a mount, or in a folder of somebody else.
        came = [folder / name for name in set(os.listdir(folder)) - set(before)]
        if not any(path.is_dir() for path in came):
            for path in sorted(came, key=lambda path: path.name != MANIFEST):  # Where it is, the rest is.
                path.unlink()
        if os.listdir(folder) == [".lock"]:
            (folder / ".lock").unlink()
            folder.rmdir()


def _prepare(folder: Path, spec: DataSpec, shard_maker: ShardMaker) -> Prepared:
    _make_tokenizer(folder, spec)
    tokenizer, tokenizer_hash = open_tokenizer(folder)
    for name, source in spec.sources.items():
        template = ""
        if isinstance(source, ChatSourceSpec):
            # The model learns this template, and is asked in it.
            template = tokenizer.chat_template = _chat_template(folder / name, spec.tokenizer, source, tokenizer)
        if not (folder / name).exists():
            _make_store(folder, name, spec, template, tokenizer_hash, shard_maker)
        check_options(f"data.sources.{name}", folder / name, _options(source, template))
        _check_tokenizer(folder / name, tokenizer_hash)
        for plan in dict.fromkeys((spec.plans[name], spec.epoch_plans.get(name, spec.plans[name]))):
            if not plan_folder(folder / name, plan).exists():
                make_plans(folder / name, plan, source)
            if isinstance(plan, ChatPlanSpec):
                check_skipped(folder / name, plan, spec.max_skipped)
    return Prepared(folder, tokenizer, tokenizer_hash, spec)


def _local(folder: str | os.PathLike[str]) -> Path:
    if is_url(folder) or os.fspath(folder).startswith("gs:/"):
        raise ConfigError(
            f"data.prepared is {folder}, but must be a local folder, or a bucket that is mounted as one (docs/data.md)."
        )
    return Path(folder).expanduser().absolute()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one process at a time write to a folder; those that waited find what it made."""
    while True:
        try:
            lock = (folder / ".lock").open("a")
        except OSError:  # Read-only, and so complete, or what is missing can't be made.
            yield
            return
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.info("waiting for another process that prepares %s", folder)
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:  # A file system without locks.
                pass
            if _is_at(folder / ".lock", lock):
                yield
                return
        # The process that had the lock failed, and removed it with the folder.
        folder.mkdir(parents=True, exist_ok=True)


def _is_at(path: Path, file: IO[str]) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


# ----------------------------------------------------------------------------------------------------------- tokenizer


def _make_tokenizer(folder: Path, spec: DataSpec) -> None:
    """Writes the tokenizer's files and the manifest, unless they are there."""
    of_bpe = ("vocab_size", "sources") if spec.tokenizer == "bpe" else ()  # It depends on what it is trained on.
    wanted = {field: dataclasses.asdict(spec)[field] for field in ("tokenizer", *of_bpe)}
    if (folder / MANIFEST).exists():
        check_options("data", folder, wanted)
        return
    tokenizer: tokenizers.Tokenizer
    if spec.tokenizer == "bpe":
        sources = [open_source(name, source) for name, source in spec.sources.items()]
        tokenizer = tokenizers.train_bpe(_training_texts(sources), spec.vocab_size)
    else:
        tokenizer = tokenizers.make(spec.tokenizer)
    if spec.vocab_size < tokenizer.num_tokens:
        raise ConfigError(
            f"model.vocab_size is {spec.vocab_size}, but the tokenizer {spec.tokenizer} has "
            f"{tokenizer.num_tokens} ids: set {tokenizer.vocab_size}."
        )
    files = tokenizer.files()
    for name, content in files.items():
        with completed(folder / name) as partial:
            partial.write_bytes(content)
    ids = ("name", "num_tokens", "vocab_size", "pad_id", "bos_id", "eos_id", "mask_id")
    write_manifest(
        folder,
        {
            "options": wanted,
            "python": platform.python_version(),
            "tokenizer": {field: getattr(tokenizer, field) for field in ids},
            "tokenizer_hash": hash_of(files),
            "files": sorted(files),
        },
    )


def _training_texts(sources: list[Source]) -> Iterator[str]:
    skips = Skips(2**62)  # They are counted when the documents are tokenized.
    for source in sources:
        room = _BPE_GENERATED_CHARACTERS if isinstance(source, Retrieval) else _BPE_CHARACTERS
        for part in source.parts():
            for split, document in source.read(part, skips):
                if isinstance(document, EncodedDocument):
                    raise ConfigError(
                        "data.tokenizer is 'bpe', which is trained on text, but a source holds token ids."
                    )
                if split == TRAIN and room > 0:
                    yield document.text[:room]
                    room -= len(document.text)
            if room <= 0:
                break


def _chat_template(place: Path, name: str, source: ChatSourceSpec, tokenizer: tokenizers.Tokenizer) -> str:
    """The template of a source of conversations, in Jinja.

    Args:
      place: of the store. Once it is there, its own template does where the file that it came from is not.
      name: data.tokenizer, whose own template may be asked for; prepared folders don't keep that.
      source: whose template it is.
      tokenizer: of the prepared folder.

    Raises:
      ConfigError: there is none, or the tokenizer has no special token at the end of its answers.
    """
    from meap_jax.tokenizers import chat  # Jinja is imported by those who chat alone.

    try:
        own = tokenizers.make(name).chat_template if source.template == "tokenizer" and name != "bpe" else ""
        template = chat.template_source(source.template, own)
    except ConfigError:
        if not place.exists():
            raise
        return read_manifest(place).get("chat_template", "")
    if not place.exists():
        try:
            tokenizer.end_of_answer(template)
        except DataError as error:
            raise ConfigError(
                f"sft.template is {source.template!r}, but {error} Those named llama3, vicuna and alpaca suit every "
                "tokenizer."
            ) from error
        if plain := chat.plain_markers(template, tokenizer.special_names):
            _log.warning("sft.template: %s are plain text to the tokenizer", ", ".join(plain))
    return template


# --------------------------------------------------------------------------------------------------------------- store


def _options(source: SourceSpec, template: str) -> dict[str, Any]:
    """What a manifest holds of a source's options: also which text its template was."""
    hash_of_template = {"template_hash": hash_of({"": template.encode()})[:16]} if template else {}
    return dataclasses.asdict(source) | hash_of_template


def _make_store(
    folder: Path, name: str, spec: DataSpec, template: str, tokenizer_hash: str, shard_maker: ShardMaker
) -> None:
    """Tokenizes a source into `folder / name`, by way of `.NAME.partial`."""
    partial = folder / f".{name}.partial"
    source_spec = spec.sources[name]
    path = source_spec.path if isinstance(source_spec, TextSourceSpec) else None
    source = open_source(name, source_spec, template)
    if isinstance(source, TokenIds) and source.tokenizer_hash != tokenizer_hash:
        raise ConfigError(
            f"data.sources.{name}.path is {path!r}, whose tokenizer ({source.tokenizer_hash[:12]}) "
            f"is not that of {folder} ({tokenizer_hash[:12]}): name a source with the same tokenizer, or its text."
        )
    if template and isinstance(source, TokenIds) and source.manifest["chat_template"] != template:
        raise ConfigError(
            f"data.sources.{name}.path is {path!r}, whose template had another content than sft.template has now: "
            "name the files that its conversations came from."
        )
    planned = jobs(source, partial, folder, spec.max_skipped)
    if not planned:
        raise DataError(f"The source {name} has nothing to read in {path}.")
    partial.mkdir(exist_ok=True)
    options = _options(source_spec, template)
    if any(read_summary(job) for job in planned):
        check_options(f"data.sources.{name}", partial, options)
        _check_tokenizer(partial, tokenizer_hash)
    else:
        write_manifest(partial, {"options": options, "tokenizer": tokenizer_hash})
    summaries = run_jobs(planned, shard_maker, name)
    check_share(name, summaries, spec.max_skipped_share)
    _finish_store(partial, folder / name, source_spec, template, tokenizer_hash, summaries)


def _check_tokenizer(store_folder: Path, tokenizer_hash: str) -> None:
    """Stops where a source was made with another tokenizer than that of its folder."""
    made_with = read_manifest(store_folder)["tokenizer"]
    if made_with != tokenizer_hash:
        raise DataError(
            f"{store_folder} was made with another tokenizer ({made_with[:12]}) than that of {store_folder.parent} "
            f"({tokenizer_hash[:12]}): delete it to make it again."
        )


def _finish_store(
    partial: Path, place: Path, source: SourceSpec, template: str, tokenizer_hash: str, summaries: list[dict[str, Any]]
) -> None:
    """Joins the shards' indices, counts, and puts the store in its place."""
    name = place.name
    num_tokens = read_manifest(place.parent)["tokenizer"]["num_tokens"]
    largest = max(summary["largest_id"] for summary in summaries)
    assert largest < num_tokens, "tokenizers give ids of their own, and sources of ids are checked"
    num_documents = sum(summary["documents"] for summary in summaries)
    if num_documents > MAX_DOCUMENTS:
        raise DataError(f"The source {name} has {num_documents:,} documents, more than {MAX_DOCUMENTS:,}: divide it.")
    merge_indices(partial, len(summaries))
    index = np.load(partial / "index.npy", mmap_mode="r")
    skipped = sum((Counter(summary["skipped"]) for summary in summaries), Counter())
    if skipped:
        _log.warning("%s: %d bad records passed over: %s", name, skipped.total(), skips_by_reason(skipped, summaries))
    if not len(index):
        shutil.rmtree(partial)  # Another `field` or `where` can be tried at once.
        where = f" in records with {source.where}" if isinstance(source, TextSourceSpec) and source.where else ""
        reason = f": {skips_by_reason(skipped, summaries)}" if skipped else ", only blank space or nothing at all."
        what = "conversation" if isinstance(source, ChatSourceSpec) else "text"
        raise DataError(f"The source {name} holds no {what}{where}{reason}")
    by_split = {split: int(np.count_nonzero(index["split"] == i)) for i, split in enumerate(SPLITS)}
    shards = [{key: summary[key] for key in ("documents", "tokens", "bytes", "sha256")} for summary in summaries]
    manifest: dict[str, Any] = {
        "options": _options(source, template),
        **({"chat_template": template} if template else {}),
        "tokenizer": tokenizer_hash,
        "num_tokens": num_tokens,
        "fingerprint": hash_of({str(i): shard["sha256"].encode() for i, shard in enumerate(shards)}),
        "documents": by_split,
        "tokens": sum(shard["tokens"] for shard in shards),
        "skipped": dict(skipped),
        "files": {path.name: path.stat().st_size for path in index_files(partial)},
        "shards": shards,
    }
    write_manifest(partial, manifest)
    partial.rename(place)
    # Only now, since it all has to be there for a process that is killed up to here and starts again.
    for pattern in ("?????.json", "?????.index.npy", "?????.spans.*.npy", "*.partial"):
        for path in place.glob(pattern):
            path.unlink(missing_ok=True)
    _log.info("tokenized %s: %s documents, %d tokens", name, by_split, manifest["tokens"])


# ------------------------------------------------------------------------------------------------------------- command


def command(argv: list[str], shard_maker: ShardMaker | None = None) -> None:
    """Prepares the data of a config with a `shard_maker`, and prints a line of JSON a source with its counts.

    Raises:
      ConfigError, DataError: as `prepare`, and without `data.prepared`.
    """
    from meap_jax import cli  # Here, since workers import this module and need no JAX.

    config, _ = cli.parse_config(argv)
    if config.data.prepared is None:
        raise ConfigError("data.prepared is not set: name the folder to make, such as --config.data.prepared=/data/c4.")
    prepared = prepare(config.data.prepared, data_spec(config), shard_maker=shard_maker)
    for name in prepared.sources:
        print(json.dumps({"source": name, **prepared.counts(name)}))


if __name__ == "__main__":
    from meap_jax import cli

    cli.run_command(command)
