"""Is a written checkpoint right? One with code is loaded in a clean process for its logits, another read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from swiftkv_models import LlamaSwiftKVForCausalLM, SharedPrefix, SinkWindowCache
from swiftkv_train.errors import RunError
from swiftkv_train.loading import one_line

PREFIX_TOKENS, WINDOW, SINKS = 8, 9, 2  # small, so that the probe's few tokens leave the window
# Runs where neither this project nor Triton must be importable: the checkpoint has to bring everything itself.
PROBE = """
import json, sys
sys.modules.update(dict.fromkeys(("swiftkv_models", "swiftkv_kernels", "swiftkv_train", "triton")))
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
directory, output = sys.argv[1:3]
threads, prefix_tokens, window, sinks = map(int, sys.argv[3:])
torch.set_num_threads(threads)
model, info = AutoModelForCausalLM.from_pretrained(
    directory, trust_remote_code=True, dtype="auto", output_loading_info=True
)
problems = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info.get(kind) or ()]
if problems:
    sys.exit(f"{len(problems)} tensors do not fit the checkpoint's own code, the first is {problems[0]}")
ids = torch.tensor(json.loads(sys.stdin.read()))
with torch.no_grad():
    full = model(ids, use_cache=False).logits
    prefill = model(ids, use_cache=True, logits_to_keep=1)
    generated = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    stream = model(ids, past_key_values=model.sink_window_cache(window=window, attention_sinks=sinks)).logits
    class Words:  # stands for a tokenizer: the probe has token ids, no text
        def __call__(self, ids, **_):
            return {"input_ids": ids}
    prefix = model.shared_prefix(Words(), ids[0, :prefix_tokens])
    relay_cache = model.sink_window_cache(window=ids.shape[1], prefixes=prefix, input_ids=ids)
    if relay_cache.shared_rows != 2:  # of three, so that they share it on any device
        sys.exit("rows that begin with a shared prefix do not share it")
    relay = model(ids, past_key_values=relay_cache).logits[:, prefix_tokens:]
    both = model.sink_window_cache(window=window, prefixes=prefix, input_ids=ids)
    model.generate(ids, past_key_values=both, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    optimized = model.optimize_for_cpu()(ids, use_cache=False).logits
stored = sum(t.numel() for layer in prefill.past_key_values.layers if layer.keys is not None
             for t in (layer.keys, layer.values))
save_file({"full": full.float().contiguous(), "prefill": prefill.logits.float().contiguous(),
           "stream": stream.float().contiguous(), "relay": relay.float().contiguous(),
           "optimized": optimized.float().contiguous(),
           "generated": generated, "stored": torch.tensor(stored)}, output)
"""


def check_stored(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises RunError unless the weights that `directory` holds are exactly `tensors`."""
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        stored |= load_file(file)
    if odd := sorted(stored.keys() ^ tensors.keys()):
        raise RunError(f"the exported checkpoint is not the run's: {odd[0]} is on one side only")
    for name, tensor in tensors.items():
        if stored[name].dtype != tensor.dtype or not torch.equal(stored[name], tensor.cpu()):
            raise RunError(f"the exported checkpoint is not the run's: {name} differs")


@torch.no_grad()
def check_in_clean_process(directory: Path, model: LlamaSwiftKVForCausalLM) -> float:
    """Largest difference between the logits of `directory`, loaded alone, and of `model`; relative to their spread.

    In plain attention, optimised for a CPU, in a skipping prefill, with a shared prefix, in a stream past its window.

    Raises:
        RunError: it does not load, its logits differ, or its prefill or cache are not SwiftKV's.
    """
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (3, min(24, vocabulary)), generator=torch.Generator().manual_seed(0))
    ids[1, :PREFIX_TOKENS] = ids[0, :PREFIX_TOKENS]
    ids[2, 0] = (ids[0, 0] + 1) % vocabulary  # a row without the prefix
    numbers = torch.get_num_threads(), PREFIX_TOKENS, WINDOW, SINKS
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "logits.safetensors"
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        result = subprocess.run(
            [sys.executable, "-c", PROBE, str(directory.resolve()), str(output), *map(str, numbers)],
            input=json.dumps(ids.tolist()),
            capture_output=True,
            text=True,
            cwd=scratch,
            env=environment,
            check=False,
        )
        if result.returncode != 0:
            reason = result.stderr.strip().splitlines()[-1:] or ["no message"]
            raise RunError(f"the exported checkpoint does not load by itself: {one_line(ValueError(reason[0]))}")
        found = load_file(output)
    device = model.device
    expected = model(ids.to(device), use_cache=False).logits.float().cpu()
    spread = float(expected.std())
    stream = SinkWindowCache(model.config, window=WINDOW, attention_sinks=SINKS)
    streamed = model(ids.to(device), past_key_values=stream).logits
    prefix = SharedPrefix.from_ids(model, ids[0, :PREFIX_TOKENS])
    relay = SinkWindowCache(model.config, window=ids.shape[1], prefixes=prefix, input_ids=ids)
    relayed = model(ids.to(device), past_key_values=relay).logits[:, PREFIX_TOKENS:]
    differences = {
        name: float((found[name] - wanted.float().cpu()).abs().max()) / spread
        for name, wanted in (
            ("full", expected),
            ("optimized", expected),
            ("prefill", expected[:, -1:]),
            ("relay", relayed),
            ("stream", streamed),
        )
    }
    # Both sides compute in the checkpoint's dtype; only the order of sums may differ (another attention path).
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2}.get(model.dtype, 1e-1)
    worst = max(differences, key=lambda name: differences[name])
    if not differences[worst] <= tolerance:
        raise RunError(f"the exported checkpoint's logits ({worst}) differ by {differences[worst]:.2g} of their spread")
    config = model.config
    leader = model.model.layers[config.num_key_value_layers].self_attn
    per_layer = ids.numel() * (leader.k_proj_swiftkv.out_features + leader.v_proj_swiftkv.out_features)
    if int(found["stored"]) != per_layer * config.num_cached_layers:
        raise RunError("the exported checkpoint's cache does not hold one K/V per group")
    return differences[worst]
