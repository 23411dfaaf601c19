"""Adapters that were trained here, loaded by PEFT onto transformers' model of the base, or merged: the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from etils import epath

from hub_folders import NUM_IDS, content_of, write_adapted, write_model
from meap_jax.export import export_model
from meap_jax.model.visibility import causal

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("family, targets", [("llama", "*_proj"), ("qwen2", "q_proj,k_proj,o_proj")])
def test_logits_of_peft_and_of_the_merged_export_are_ours(tmp_path, family, targets):
    write_model(tmp_path / "hub", content_of(family), dtype=np.float32)
    ours = write_adapted(tmp_path / "run", tmp_path / "hub", rank=4, alpha=6.0, targets=targets)
    for way in ("peft", "merge"):
        export_model(epath.Path(tmp_path / "run"), epath.Path(tmp_path / way), adapter=way)
    tokens = np.random.default_rng(0).integers(3, NUM_IDS, (8, 24), np.int32)
    inputs = jnp.asarray(tokens)
    with jax.set_mesh(ours.model.mesh):
        expected = jax.jit(ours.model.definition.apply)(ours.params, inputs, causal(inputs))[..., :NUM_IDS]

    def load(name):
        path = str(tmp_path / name)
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")

    adapted = peft.PeftModel.from_pretrained(load("hub"), str(tmp_path / "peft"))
    for model in (adapted, load("merge"), adapted.merge_and_unload()):
        with torch.no_grad():
            found = model.eval()(input_ids=torch.tensor(tokens).long()).logits[..., :NUM_IDS].numpy()
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    with torch.no_grad():
        plain = load("hub").eval()(input_ids=torch.tensor(tokens).long()).logits[..., :NUM_IDS].numpy()
    assert np.abs(plain - expected).max() > 1e-2 * np.abs(expected).max()
