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

from swiftkv_models import LlamaSwiftKVForCausalLM
from swiftkv_train.errors import RunError
from swiftkv_train.export import probe
from swiftkv_train.loading import one_line

# Of the logits' spread: bf16's rounding by other operators, through 30 layers 0.07 (root mean square), other weights 1.
ANOTHER_WAY = 0.2
QUANTISED = 0.1  # of the logits' spread: a K or V that lies between two of 256 steps may go to either


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

    In plain attention, optimised for a CPU, in a skipping prefill, and decoding: plainly, with a shared prefix, in a
    stream past its window, in 8 bits too, and in a stream behind a prefix.

    Raises:
        RunError: it does not load, its logits differ, or its prefill or cache are not SwiftKV's.
    """
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (3, min(24, vocabulary)), generator=torch.Generator().manual_seed(0))
    ids[1, : probe.PREFIX_TOKENS] = ids[0, : probe.PREFIX_TOKENS]
    ids[2, 0] = (ids[0, 0] + 1) % vocabulary  # a row without the prefix
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "logits.safetensors"
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        arguments = [probe.__file__, str(directory.resolve()), str(output), str(torch.get_num_threads())]
        result = subprocess.run(
            [sys.executable, "-P", *arguments],  # -P: what lies beside the script is not for it
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
    wanted = {name: logits.float().cpu() for name, logits in probe.logits_of(model, ids.to(model.device)).items()}
    spread = float(wanted["full"].std())
    differences = {name: float((found[name] - logits).abs().max()) / spread for name, logits in wanted.items()}
    for name, part in (("optimized", slice(None)), ("prefill", slice(-1, None)), ("decoding", slice(None))):
        apart = float((found[name] - wanted["full"][:, part]).square().mean().sqrt()) / spread
        if not apart <= ANOTHER_WAY:
            raise RunError(f"the exported checkpoint's logits ({name}) are not those of all tokens at once")
    # Both sides compute in the checkpoint's dtype; only the order of sums may differ (another attention path).
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2}.get(model.dtype, 1e-1)
    quantised = differences.pop("8-bit stream")
    worst = max(differences, key=lambda name: differences[name])
    if not differences[worst] <= tolerance:
        raise RunError(f"the exported checkpoint's logits ({worst}) differ by {differences[worst]:.2g} of their spread")
    if not quantised <= max(tolerance, QUANTISED):
        raise RunError(f"the exported checkpoint's logits (8-bit stream) differ by {quantised:.2g} of their spread")
    config = model.config
    leader = model.model.layers[config.num_key_value_layers].self_attn
    per_layer = ids.numel() * (leader.k_proj_swiftkv.out_features + leader.v_proj_swiftkv.out_features)
    if int(found["stored"]) != per_layer * config.num_cached_layers:
        raise RunError("the exported checkpoint's cache does not hold one K/V per group")
    return differences[worst]
