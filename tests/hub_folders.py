"""Folders as the hub has them: a config.json, safetensors of random weights, and a tokenizer."""

import json

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from etils import epath

from meap_jax import partition
from meap_jax.checkpoint import save_params
from meap_jax.config import train_adapters
from meap_jax.hf import config as hf_config
from meap_jax.hf.weights import hub_tensors
from meap_jax.hub import open_hub_model
from meap_jax.model.config import ModelConfig
from meap_jax.models import OpenModel, define_model, save_tokenizer, write_config
from tiny_runs import tiny_config
from tokenizer_kinds import llama
from tokenizers import Tokenizer, processors

TOKENIZER = Tokenizer.from_str(llama(False))
NUM_IDS = TOKENIZER.get_vocab_size()
BASE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def write_tokenizer(folder, added=(), **config):
    """A tokenizer of Llama's kind, with more special tokens."""
    tokenizer = Tokenizer.from_str(llama(False))
    tokenizer.add_special_tokens(list(added))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(bos_token="<s>", eos_token="</s>", tokenizer_class="PreTrainedTokenizerFast", add_bos_token=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(names | config))


def content_of(family, rows=NUM_IDS + 3, **changes):
    """A config.json of a small model."""
    return dict(model_type=family, vocab_size=rows, **BASE) | changes


def tensors_of(content, dtype=np.float32, seed=0):
    """Random weights of every tensor that a config.json asks for."""
    found = hf_config.read(content)
    config = tiny_config()
    config.model.update(found.model)
    rng = np.random.default_rng(seed)
    wanted = hub_tensors(ModelConfig.of(config.model, "cpu"), content["vocab_size"])
    return {
        tensor.name: (rng.normal(1.0 if "norm" in tensor.name else 0.0, 0.2, tensor.shape)).astype(dtype)
        for tensor in wanted
    }


def write_model(folder, content, tensors=None, dtype=ml_dtypes.bfloat16, num_files=1, added=()):
    """A whole folder; returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors_of(content, dtype) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(content))
    write_tokenizer(folder, added)
    names = sorted(tensors)
    if num_files == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return tensors
    where = {}
    for i in range(num_files):
        file = f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        inside = names[i::num_files]
        safetensors.numpy.save_file({name: tensors[name] for name in inside}, folder / file)
        where |= dict.fromkeys(inside, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tensors


def read_tensors(folder):
    """All tensors of a folder, by the package safetensors alone."""
    return {
        name: array
        for file in folder.glob("*.safetensors")
        for name, array in safetensors.numpy.load_file(file).items()
    }


def write_adapted(folder, hub, *, dtype="float32", **lora):
    """A workdir as of a run that trained adapters on the model in the folder `hub`; returns the model."""
    opened = open_hub_model(hub)
    config = opened.model.config
    train_adapters(config, **lora)
    config.model.dtype = dtype
    model = define_model(config)
    rng = np.random.default_rng(1)
    drawn = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), model.definition.shapes())
    params = jax.device_put(partition.merge(drawn, opened.params), model.definition.shardings(model.mesh))
    folder.mkdir()
    write_config(epath.Path(folder), config)
    meta = {"config": config.to_dict(), "fingerprint": "", "tokenizer": save_tokenizer(folder, opened.tokenizer)}
    save_params(epath.Path(folder), params, meta, step=4)
    return OpenModel(model, params, opened.tokenizer, 4, meta)
