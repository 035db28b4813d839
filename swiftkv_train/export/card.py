"""The model card of an exported checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swiftkv_models import LlamaSwiftKVConfig

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
HF_USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)  # it reads the model's config too
```

`generate` skips the tail for prompt tokens by itself; on a CPU, `model.optimize_for_cpu()` before it makes tokens come
faster. The files beside the weights are all the code it needs, also for these caches:

```python
inputs = tokenizer(SYSTEM_PROMPT + "...", add_special_tokens=False, return_tensors="pt")
# Text without end in a fixed memory: the first 4 tokens and the last 1,020 (attention sinks). The rest is forgotten.
cache = model.sink_window_cache(window=1020, attention_sinks=4)
model.generate(**inputs, past_key_values=cache, max_new_tokens=100)
# A prompt that many requests begin with, prefilled once and kept once (relay attention); the two go together.
prefix = model.shared_prefix(tokenizer, SYSTEM_PROMPT)
cache = model.sink_window_cache(window=1020, prefixes=prefix, **inputs)
model.generate(**inputs, past_key_values=cache, max_new_tokens=100)
```"""
ARCTIC_USAGE = """For vLLM with the plugin ArcticInference, which brings the model's code. None lies here, so
transformers does not load it.

```bash
pip install 'arctic-inference[vllm]'
ARCTIC_INFERENCE_ENABLED=1 vllm serve PATH
```"""


def model_card(config: LlamaSwiftKVConfig, provenance: dict[str, Any], format: str) -> str:
    """README.md of a checkpoint of format `hf` or `arctic`: what it is, how to load it, what was measured on it."""
    base = provenance["base"]
    first, layers, groups = config.num_key_value_layers, config.num_hidden_layers, config.tail_groups
    cached = config.num_cached_layers / layers
    rows = [
        (name, quality["kl"], quality["agreement"], quality["base_perplexity"], quality["student_perplexity"])
        for name, quality in (provenance["held_out"] or {}).items()
        if None not in quality.values()  # figures that were not finite
    ]
    if all(len(group) == 1 for group in groups):
        sharing = "every tail layer has a K/V of its own"
    elif config.key_value_groups is None:
        sharing = f"groups of {config.key_value_group_size} tail layers share one K/V"
    else:
        sharing = f"tail layers share one K/V in groups of {', '.join(str(len(group)) for group in groups)}"
    return f"""---
library_name: {"transformers" if format == "hf" else "vllm"}
pipeline_tag: text-generation
tags: [swiftkv]
---
# {Path(base).name} in SwiftKV form

{base} rewritten so that prompt tokens run through {first} of its {layers} layers only: the K/V of the other
{layers - first} come from the output of layer {first - 1} (SingleInputKV), and {sharing} (AcrossKV). The cache holds
{cached:.1%} of the base's bytes. The tail's Q/K/V projections and their norm were distilled from the base for
{provenance["step"]} steps; everything else is the base's, whose licence holds.

{HF_USAGE if format == "hf" else ARCTIC_USAGE}

## Measured on held-out text

{figures_block(rows)}

KL is in nats per token, KL(base || this model); agreement is the share of tokens on which both put the same one first.
Made with swiftkv-train; the whole recipe is in `swiftkv.json`. Method: SwiftKV, arXiv 2410.03960.
"""


def figures_block(rows: list[tuple[str, float, float, float, float]]) -> str:
    """The table between two markers, so that a later evaluation can put its own in place."""
    lines = [
        BEGIN,
        "| text | KL | agreement | perplexity, base | perplexity, this | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name, kl, agreement, base, student in rows:
        lines.append(f"| {name} | {kl:.3f} | {agreement:.1%} | {base:.2f} | {student:.2f} | {student / base:.3f} |")
    if not rows:
        lines.append("| not measured | | | | | |")
    return "\n".join([*lines, END])


def replace_figures(card: str, rows: list[tuple[str, float, float, float, float]]) -> str:
    """`card` with its table replaced; unchanged when the markers are gone."""
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    return before + figures_block(rows) + after if begin and end else card
