"""Adapters go out merged into the weights, or alone under the names and in the shapes of PEFT."""

import json

import numpy as np
import pytest
from etils import epath

from hub_folders import content_of, read_tensors, write_adapted, write_model
from meap_jax.convert import command, export_model
from meap_jax.errors import ConfigError
from meap_jax.models import read_config, write_config

RANK, ALPHA = 4, 6.0
SHAPES = {  # Outputs and inputs of the linear layers of `hub_folders.BASE`.
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds `hub`, a model, and `run`, adapters trained on it."""
    folder = tmp_path_factory.mktemp("adapter")
    write_model(folder / "hub", content_of("llama"), dtype=np.float32)
    write_adapted(folder / "run", folder / "hub", rank=RANK, alpha=ALPHA)
    command(["convert", "export", f"--workdir={folder / 'run'}", f"--out={folder / 'merged'}"])
    words = ["--adapter=peft", "--base=some/model", f"--workdir={folder / 'run'}", f"--out={folder / 'adapter'}"]
    command(["convert", "export", *words])
    return folder


def test_adapters_alone_have_the_names_and_shapes_of_peft_and_no_weight_of_the_base(folder):
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md"
    }  # fmt: skip
    found = {name: x.shape for name, x in read_tensors(folder / "adapter").items()}
    assert found == {
        f"base_model.model.model.layers.{i}.{name}.lora_{part}.weight": (RANK, n) if part == "A" else (m, RANK)
        for i in range(3)
        for name, (m, n) in SHAPES.items()
        for part in "AB"
    }
    said = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (said["peft_type"], said["task_type"], said["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert (said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (RANK, ALPHA, "some/model")
    assert sorted(said["target_modules"]) == sorted(name.split(".")[1] for name in SHAPES)


def test_merged_weights_are_those_of_the_base_and_the_products_of_the_adapters(folder):
    base, adapter, merged = (read_tensors(folder / name) for name in ("hub", "adapter", "merged"))
    assert merged.keys() == base.keys()
    for name, found in merged.items():
        pair = [f"base_model.model.{name.removesuffix('weight')}lora_{part}.weight" for part in "BA"]
        if pair[0] in adapter:
            b, a = (adapter[part].astype(np.float64) for part in pair)
            np.testing.assert_allclose(found, base[name] + ALPHA / RANK * b @ a, atol=1e-6)
            assert np.abs(found - base[name]).max() > 0.1
        elif "norm" in name:
            np.testing.assert_array_equal(found, base[name])


def test_adapters_that_are_not_all_or_not_there_are_not_written_alone(folder, tmp_path):
    config = read_config(epath.Path(folder / "run"))
    for name, changes, said in (
        ("more", {"trainable": "*lora*,head"}, "trainable is '\\*lora\\*,head', which trained head too"),
        ("none", {"trainable": "*", "model.lora.rank": 0}, "the model has no adapters: its model.lora.rank is 0"),
    ):
        (tmp_path / name).mkdir()
        for part in ("checkpoints", "tokenizer"):
            (tmp_path / name / part).symlink_to(folder / "run" / part)
        config.update_from_flattened_dict(changes)
        write_config(epath.Path(tmp_path / name), config)
        with pytest.raises(ConfigError, match=said):
            export_model(epath.Path(tmp_path / name), epath.Path(tmp_path / "out"), adapter="peft")
    assert not (tmp_path / "out").exists()
