"""Logits of a model by every way through it that a checkpoint promises: `python -P probe.py DIRECTORY OUTPUT THREADS`.

Runs on both sides of `check_in_clean_process`: in this project, and as a script where neither it nor Triton can be
imported, so that the checkpoint has to bring everything itself. Hence nothing of the project is imported here.
"""

import json
import sys
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, DynamicCache

PREFIX_TOKENS, WINDOW, SINKS = 8, 9, 2  # small, so that the probe's few tokens leave the window
SINGLE = 3  # last tokens, fed one by one


class _Words:
    """Stands for a tokenizer: the probe has token ids, no text."""

    def __call__(self, ids: Any, **_: Any) -> dict[str, Any]:
        return {"input_ids": ids}


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits [3, .., V] of ids [3, T], by the name of the way; of streams and prefixes a chunk and single tokens.

    Two of the rows begin with the same prefix: they share it, or have copies of it, whatever would pay.
    """

    def fed(cache: Any) -> torch.Tensor:
        parts = [ids[:, :-SINGLE], *ids[:, -SINGLE:].split(1, dim=1)]
        return torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1)

    stream = {"window": WINDOW, "attention_sinks": SINKS}
    behind = {"prefixes": model.shared_prefix(_Words(), ids[0, :PREFIX_TOKENS]), "input_ids": ids}
    kinds = {"relay": ids.shape[1], "relay in a stream": WINDOW}
    caches: dict[str, Any] = {}
    module = sys.modules[type(model.sink_window_cache(**stream)).__module__]
    for how, pays in ((", copied", False), ("", True)):
        with patch.object(module, "sharing_pays", lambda *_, pays=pays: pays):
            caches |= {name + how: model.sink_window_cache(window=window, **behind) for name, window in kinds.items()}
    if [cache.shared_rows for cache in caches.values()] != [0, 0, 2, 2]:
        raise RuntimeError("rows that begin with a shared prefix do not share it, or do not have copies of it")
    return {
        "full": model(ids, use_cache=False).logits,
        "prefill": model(ids, use_cache=True, logits_to_keep=1).logits,
        "decoding": fed(DynamicCache(config=model.config)),
        "stream": fed(model.sink_window_cache(**stream)),
        "8-bit stream": fed(model.sink_window_cache(**stream, quantization="int8")),
        **{name: fed(cache)[:, PREFIX_TOKENS:] for name, cache in caches.items()},
    }


@torch.no_grad()
def stored_numbers(model: Any, ids: torch.Tensor) -> int:
    """How many numbers of K and V a cache holds after them."""
    layers = model(ids, use_cache=True, logits_to_keep=1).past_key_values.layers
    return sum(tensor.numel() for layer in layers if layer.keys is not None for tensor in (layer.keys, layer.values))


def main(directory: str, output: str, threads: str) -> None:
    """Token ids come as JSON on standard input."""
    from safetensors.torch import save_file

    torch.set_num_threads(int(threads))
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype="auto", output_loading_info=True
    )
    model, info = loaded
    problems = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info.get(kind) or ()]
    if problems:
        sys.exit(f"{len(problems)} tensors do not fit the checkpoint's own code, the first is {problems[0]}")
    ids = torch.tensor(json.loads(sys.stdin.read()))
    found = logits_of(model, ids)
    stored = stored_numbers(model, ids)
    model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)  # it can
    with torch.no_grad():
        found["optimized"] = model.optimize_for_cpu()(ids, use_cache=False).logits
    tensors = {name: logits.float().contiguous() for name, logits in found.items()}
    save_file({**tensors, "stored": torch.tensor(stored)}, output)


if __name__ == "__main__":
    blocked: Any = dict.fromkeys(("swiftkv_models", "swiftkv_kernels", "swiftkv_train", "triton"))
    sys.modules.update(blocked)
    main(*sys.argv[1:])
