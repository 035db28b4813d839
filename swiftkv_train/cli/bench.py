"""`swiftkv bench`: a command for every benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from swiftkv_train.cli.options import Json, Overrides, RecipeArgument, example

app = typer.Typer(help="Measure this project's parts side by side with what they replace.", no_args_is_help=True)


def _check_output(context: typer.Context, output: Path | None) -> Path | None:
    if output is not None:
        from swiftkv_train.bench import check_output

        check_output(str(context.info_name), output)
    return output


OutputOption = Annotated[
    Path | None,
    typer.Option("--output", callback=_check_output, help="Also write the result to this JSON file."),
]


def _finish(result: dict[str, Any], output: Path | None, as_json: bool, draw: Any = None) -> None:
    """`draw`: one of bench/plots.py's, for a picture beside `output`."""
    from swiftkv_train.bench import finish

    finish(result, output, as_json)
    if draw is not None and output is not None:
        from swiftkv_train.results import plot

        plot(result, draw, output)


@app.command("init", epilog=example("swiftkv bench init recipes/smollm2-135m/quickstart.yaml"))
def init(
    recipe: RecipeArgument, overrides: Overrides = None, output: OutputOption = None, as_json: Json = False
) -> None:
    """Calibrated against copied initialisation on the recipe's held-out text, without training."""
    from swiftkv_train.bench.init import measure

    _finish(measure(recipe, overrides), output, as_json)


@app.command(
    "quality",
    epilog=example(
        "swiftkv bench quality recipes/smollm2-135m/quality/reference.yaml recipes/smollm2-135m/quickstart.yaml"
    ),
)
def quality(
    recipes: Annotated[
        list[str],
        typer.Argument(
            help="Recipe files, the one that the others are compared with first; also key=value for all of them.",
            show_default=False,
        ),
    ],
    runs: Annotated[
        str, typer.Option(help="Directory of their run directories; unfinished ones are gone on from.")
    ] = "outputs/quality",
    points: Annotated[int, typer.Option(min=1, help="Measurements along each run, beside the first.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of every source that are measured on.")] = 4096,
    on: Annotated[str, typer.Option(help="test or held_out: the recipes' sources that are measured on.")] = "test",
    output: OutputOption = None,
    as_json: Json = False,
) -> None:
    """Train variants of a recipe side by side: held-out KL, agreement and perplexity against training tokens."""
    from swiftkv_train.bench.plots import draw_quality
    from swiftkv_train.bench.quality import measure

    _finish(measure(recipes, runs, points, tokens, on), output, as_json, draw_quality)


@app.command("layers", epilog=example("swiftkv bench layers recipes/smollm2-135m/quickstart.yaml --forms 15,22"))
def layers(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    forms: Annotated[
        str | None,
        typer.Option(help="Values of l; lxg: in groups of g; l:a+b+c: of these sizes; separated by commas."),
    ] = None,
    on: Annotated[str, typer.Option(help="test or held_out: the recipe's sources that are measured on.")] = "held_out",
    output: OutputOption = None,
    as_json: Json = False,
) -> None:
    """What forms of a model are predicted to lose (`swiftkv calibrate --layers`) against what they lose, calibrated."""
    from swiftkv_train.bench.layers import measure

    _finish(measure(recipe, overrides, forms, on), output, as_json)


@app.command("step", epilog=example("swiftkv bench step models/smollm2-135m"))
def step(
    model: Annotated[str, typer.Argument(help="Base model.")],
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    sequence_length: Annotated[int, typer.Option(min=8)] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each kind.")] = 5,
    output: OutputOption = None,
    as_json: Json = False,
) -> None:
    """One distillation step against a reference-style step: tokens per second and peak memory."""
    from swiftkv_train.bench.step import measure

    _finish(measure(model, batch_size, sequence_length, repeats), output, as_json)


@app.command(
    "prefill", epilog=example("swiftkv bench prefill outputs/quickstart/checkpoint --base models/smollm2-135m")
)
def prefill(
    checkpoint: Annotated[str, typer.Argument(help="Exported checkpoint.")],
    base: Annotated[str, typer.Option(help="The model it was made from.")],
    lengths: Annotated[str, typer.Option(help="Prompt lengths, separated by commas.")] = "512,1024,2048,4096",
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    output: OutputOption = None,
    as_json: Json = False,
) -> None:
    """Time to first token of a checkpoint over its base's, through `generate`."""
    from swiftkv_train.bench.plots import draw_prefill
    from swiftkv_train.bench.prefill import measure

    _finish(measure(checkpoint, base, lengths, repeats), output, as_json, draw_prefill)


@app.command("loss", epilog=example("swiftkv bench loss --vocabulary 49152 --hidden-size 576 --rows 512,2048"))
def loss(
    vocabulary: Annotated[str, typer.Option(help="Sizes of the head, separated by commas.")] = "49152,128256",
    hidden_size: Annotated[str, typer.Option(help="One for all of them, or one for each.")] = "576,2048",
    rows: Annotated[str, typer.Option(help="Numbers of tokens with loss, separated by commas.")] = "512,2048",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    repeats: Annotated[int, typer.Option(min=1, help="Timed turns of each implementation.")] = 5,
    output: OutputOption = None,
    as_json: Json = False,
) -> None:
    """The distillation loss and its gradient against plain, reference-style and Liger-Kernel's: time, peak, error."""
    from swiftkv_train.bench.loss import measure

    _finish(measure(vocabulary, hidden_size, rows, dtype, repeats), output, as_json)


@app.command("startup", epilog=example("swiftkv bench startup recipes/smollm2-135m/quickstart.yaml"))
def startup(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    repeats: Annotated[int, typer.Option(min=1, help="Starts of each kind.")] = 3,
    output: OutputOption = None,
    as_json: Json = False,
) -> None:
    """What a run does to its data before the first step, with an empty and with a filled token cache."""
    from swiftkv_train.bench.startup import measure

    _finish(measure(recipe, overrides, repeats), output, as_json)


@app.command("plan", epilog=example("swiftkv bench plan --models debug,135m"))
def plan(
    models: Annotated[
        str | None,
        typer.Option(help="debug, 135m, 1b, separated by commas; default: those whose size suits the device."),
    ] = None,
    output: OutputOption = None,
    as_json: Json = False,
) -> None:
    """The peak memory that `swiftkv plan` predicts for a training step against that of a real one, by settings."""
    from swiftkv_train.bench.plan import measure

    _finish(measure(models), output, as_json)


@app.command("stream", epilog=example("swiftkv bench stream outputs/quickstart/checkpoint --windows 256,1024"))
def stream(
    model: Annotated[str, typer.Argument(help="Exported checkpoint, or a base model.")],
    windows: Annotated[str, typer.Option(help="Tokens kept beside the sinks, separated by commas.")] = "256,1024,4096",
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that are kept for ever.")] = 4,
    tokens: Annotated[
        int, typer.Option(min=1, help="Length of the stream; a dense cache is measured up to it.")
    ] = 20_000,
    contenders: Annotated[
        str | None,
        typer.Option(
            help="Of re-rotate, re-rotate published, dense, recompute, ours graphed (CUDA), separated by commas; "
            "default: all."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed tokens of each at each length.")] = 30,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens fed at a time between those that are timed.")] = 64,
    long: Annotated[int, typer.Option(min=0, help="Also a run of so many tokens with the first window.")] = 0,
    output: OutputOption = None,
    as_json: Json = False,
) -> None:
    """A token of an endless stream: time and memory against dense, recomputing and re-rotating caches."""
    from swiftkv_train.bench.plots import draw_stream
    from swiftkv_train.bench.stream import measure

    result = measure(model, windows, sinks, tokens, contenders, repeats, chunk, long)
    _finish(result, output, as_json, draw_stream)


@app.command(
    "sinks", epilog=example("swiftkv bench sinks models/smollm2-135m --data speeches=data/demo/speeches.test.jsonl")
)
def sinks(
    model: Annotated[str, typer.Argument(help="Exported checkpoint, or a base model.")],
    data: Annotated[str, typer.Option(help="Text whose longest document is read: NAME=PATH.")],
    kept: Annotated[str, typer.Option(help="Tokens kept, the sinks among them, separated by commas.")] = "128,1024",
    sinks: Annotated[str, typer.Option(help="First tokens that are kept for ever, separated by commas.")] = "0,1,2,4,8",
    tokens: Annotated[int, typer.Option(min=1, help="Of the text, at most.")] = 20_000,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens fed at a time.")] = 128,
    output: OutputOption = None,
    as_json: Json = False,
) -> None:
    """Perplexity along a text longer than the window: sinks + window against no sinks, and against a dense cache."""
    from swiftkv_train.bench.plots import draw_sinks
    from swiftkv_train.bench.sinks import measure

    _finish(measure(model, data, kept, sinks, tokens, chunk), output, as_json, draw_sinks)


@app.command("relay", epilog=example("swiftkv bench relay --batch 1,16 --prefix 1024,4096"))
def relay(
    batch: Annotated[str, typer.Option(help="Rows that share the prefix, separated by commas.")] = "1,2,4,8,16,32,64",
    prefix: Annotated[str, typer.Option(help="Its tokens, separated by commas.")] = "64,256,1024,4096,16384",
    groups: Annotated[
        str, typer.Option(help="Numbers of different prefixes, which rows share evenly, separated by commas.")
    ] = "1,4",
    suffix: Annotated[int, typer.Option(min=1, help="Tokens of its own that every row has.")] = 128,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 9,
    kv_heads: Annotated[int, typer.Option(min=1, help="K/V heads.")] = 3,
    head_dim: Annotated[int, typer.Option(min=1)] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="Timed turns of each.")] = 7,
    model: Annotated[
        str | None,
        typer.Option(help="Also measure a whole model, checkpoint or base: first token and decoding."),
    ] = None,
    model_batch: Annotated[str, typer.Option(help="Its batches.")] = "1,4,16",
    model_prefix: Annotated[int, typer.Option(min=1, help="Its shared tokens.")] = 1024,
    output: OutputOption = None,
    as_json: Json = False,
) -> None:
    """Attention over shared prompts against copies of them and against reading them for each request."""
    from swiftkv_train.bench.plots import draw_relay
    from swiftkv_train.bench.relay import measure

    shape = (suffix, heads, kv_heads, head_dim, dtype)
    result = measure(batch, prefix, groups, *shape, repeats, model, model_batch, model_prefix)
    _finish(result, output, as_json, draw_relay)


@app.command("decode", epilog=example("swiftkv bench decode outputs/quickstart/checkpoint --base models/smollm2-135m"))
def decode(
    checkpoint: Annotated[str, typer.Argument(help="Exported checkpoint.")],
    base: Annotated[str, typer.Option(help="The model it was made from.")],
    batch: Annotated[str, typer.Option(help="Rows, separated by commas.")] = "1,4,16",
    context: Annotated[
        str, typer.Option(help="Tokens before the new one, separated by commas.")
    ] = "512,1024,2048,4096",
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each.")] = 20,
    output: OutputOption = None,
    as_json: Json = False,
) -> None:
    """Time of a generated token: checkpoint and base, each with transformers' cache and with sinks + window."""
    from swiftkv_train.bench.decode import measure
    from swiftkv_train.bench.plots import draw_decode

    _finish(measure(checkpoint, base, batch, context, repeats), output, as_json, draw_decode)


@app.command("serve", epilog=example("swiftkv bench serve outputs/quickstart/checkpoint --clients 1,16 --system 1024"))
def serve(
    model: Annotated[str, typer.Argument(help="Exported checkpoint, or a base model.")],
    clients: Annotated[str, typer.Option(help="Requests that come at once, separated by commas.")] = "1,4,16",
    system: Annotated[int, typer.Option(min=0, help="Tokens of a system message that all begin with.")] = 0,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt behind it.")] = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Timed turns of each.")] = 3,
    output: OutputOption = None,
    as_json: Json = False,
) -> None:
    """Requests that come at once, answered together as `swiftkv serve` does, and one after another."""
    from swiftkv_train.bench.plots import draw_serve
    from swiftkv_train.bench.serve import measure

    _finish(measure(model, clients, system, prompt, tokens, repeats), output, as_json, draw_serve)


@app.command(
    "kv-memory",
    epilog=example("swiftkv bench kv-memory models/smollm2-135m --data articles=data/demo/articles.test.jsonl"),
)
def kv_memory(
    base: Annotated[str, typer.Argument(help="Base model.")],
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(help="Exported checkpoint whose quality to measure as well, with --data; may be repeated."),
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="Text to score: NAME=PATH; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Of each text.")] = 16_384,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens scored in one piece.")] = 512,
    output: OutputOption = None,
    as_json: Json = False,
) -> None:
    """Bytes that the K/V cache allocates by AcrossKV group and storage format, and what a format costs in quality."""
    from swiftkv_train.bench.kv_memory import measure
    from swiftkv_train.bench.plots import draw_kv_memory

    result = measure(base, checkpoint, data, tokens, sequence_length)
    _finish(result, output, as_json, draw_kv_memory)
