"""PyTorch's train step as a worker of `train_step`.

transformers' LlamaForCausalLM with SDPA attention and torch's fused AdamW, as someone who uses them well would run
them: the fastest AdamW that torch has, no cache of keys and values, no copy of the logits but the loss's own.
"""

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import transformers


def build(spec: dict[str, Any]) -> tuple[dict[str, Any], Mapping[str, Callable]]:
    """The step of a config of ours.

    Args:
      spec: `config` (a run's config as a dict), `compiled` (whether torch.compile is used), `on_gpu` (else on the CPU).

    Returns:
      What `about` says, and the commands: `steps(n)` takes one step that does not count and n that do, and returns
      seconds a step; `matmul(n)` returns the
      seconds of an [n, n] float32 product.
    """
    config, model_config = spec["config"], spec["config"]["model"]
    on_gpu = spec["on_gpu"]
    device = torch.device("cuda" if on_gpu else "cpu")
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    torch.manual_seed(0)

    model = transformers.LlamaForCausalLM(llama_config(config)).to(device)
    model.train()
    if model_config["remat"] != "none":
        model.gradient_checkpointing_enable()
    o = config["optimizer"]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=o["learning_rate"],
        betas=(o["b1"], o["b2"]),
        eps=o["eps"],
        weight_decay=o["weight_decay"],
        fused=True,
    )
    shape = (config["global_batch_size"], config["seq_len"] + 1)
    tokens = torch.randint(0, model_config["vocab_size"], shape, device=device)
    # As ours: parameters and loss in float32, activations in the model's dtype.
    low = model_config["dtype"] == "bfloat16"
    precision = torch.autocast(device.type, torch.bfloat16) if low else contextlib.nullcontext()

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    if spec["compiled"]:
        loss_of = torch.compile(loss_of)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with precision:
            loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o["clip_norm"])
        optimizer.step()
        return loss.detach()

    def steps(num: int) -> float:
        step()
        _wait(device)
        began = time.perf_counter()
        for _ in range(num):
            step()
        _wait(device)
        return (time.perf_counter() - began) / num

    about = {
        "engine": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": None if on_gpu else threads,
        "parameters": sum(p.numel() for p in model.parameters()),
        "first_loss": float(step()),
    }
    return about, {"steps": steps, "matmul": lambda size: matmul(size, device)}


def llama_config(config: dict[str, Any]) -> transformers.LlamaConfig:
    """Our decoder in transformers' words."""
    m = config["model"]
    return transformers.LlamaConfig(
        vocab_size=m["vocab_size"],
        hidden_size=m["embed_dim"],
        intermediate_size=m["mlp_dim"],
        num_hidden_layers=m["num_layers"],
        num_attention_heads=m["num_heads"],
        num_key_value_heads=m["num_kv_heads"],
        head_dim=m["head_dim"],
        max_position_embeddings=config["seq_len"],
        rms_norm_eps=m["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": m["rope_base"]},
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )


def matmul(size: int, device: torch.device) -> float:
    """Seconds of a [size, size] float32 matrix product."""
    x = torch.ones(size, size, device=device)
    x @ x
    _wait(device)
    began = time.perf_counter()
    for _ in range(3):
        x @ x
    _wait(device)
    return (time.perf_counter() - began) / 3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
