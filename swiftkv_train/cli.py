"""The command `swiftkv`. Each command imports what it needs when it runs, so that help is instant."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from swiftkv_train.allocator import keep_freed_memory
from swiftkv_train.errors import RunError, UserError

app = typer.Typer(
    help="Rewrite, distil, export, measure and serve Llama checkpoints in SwiftKV form.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
# Newer versions of typer carry click within them; this finds its class in either place.
UsageError: Any = typer.BadParameter.__bases__[0]
bench_app = typer.Typer(help="Measure this project's parts side by side with what they replace.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

RecipeArgument = Annotated[str, typer.Argument(help="Recipe file.", show_default=False)]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045  (typer on Python 3.10 wants it spelt so)
    typer.Argument(help="key=value overrides, for instance training.steps=200.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def _example(command: str) -> str:
    return f"Example: `{command}`"


def _print_json(result: Any) -> None:
    from swiftkv_train.results import to_json

    print(to_json(result, "--json"))


@app.command(epilog=_example("swiftkv fetch smollm2-135m --to models/smollm2-135m"))
def fetch(
    source: Annotated[str, typer.Argument(help="smollm2-135m, debug, a hub id, a model directory, or a .gguf file.")],
    to: Annotated[Path, typer.Option(help="Directory to put the model in.")],
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Directory for the text and chats that come with smollm2-135m and debug."),
    ] = None,
    revision: Annotated[Optional[str], typer.Option(help="Revision of a hub id.")] = None,  # noqa: UP045
) -> None:
    """Get a model as safetensors, with tokenizer and chat template, checksums verified.

    `debug` is a tiny random model made on the spot, to try the commands with.
    """
    from swiftkv_train.fetch import DATA_DIRECTORIES
    from swiftkv_train.fetch import fetch as run

    if data is not None and source not in DATA_DIRECTORIES:
        raise UserError(f"--data goes with {' and '.join(DATA_DIRECTORIES)}; no data comes with {source}")
    run(source, to, data_dir=data or DATA_DIRECTORIES.get(source), revision=revision, report=_say)


@app.command(epilog=_example("swiftkv plan recipes/smollm2-135m/quickstart.yaml training.steps=4000 --gpu-memory 24"))
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu_memory: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.0, help="GiB of one GPU: say whether the run fits; exit 1, and what to change, if not."),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="GPUs, with one process on each.")] = 1,
    device: Annotated[str, typer.Option(help="cuda or cpu, which need not be present.")] = "cuda",
    context: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Tokens of context that inference is counted at; default: data.sequence_length."),
    ] = None,
    layers: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="What `swiftkv calibrate RECIPE --layers FILE` wrote: also show what every l would lose."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a run will train, compute and hold, by part, from the base's config alone: no weights, no GPU."""
    if device not in ("cuda", "cpu"):
        raise UserError(f"--device {device!r} is not known; use cuda or cpu")
    if gpu_memory is not None and device == "cpu":
        raise UserError("--gpu-memory goes with --device cuda")
    if gpu_memory is not None and not math.isfinite(gpu_memory * 2**30):
        raise UserError(f"--gpu-memory {gpu_memory:g} is no size; give the GiB of one GPU")
    from swiftkv_train.recipe import load_recipe

    checked = load_recipe(recipe, overrides)
    from swiftkv_train.plan import plan as run
    from swiftkv_train.plan.report import print_plan, verdict

    limit = None if gpu_memory is None else round(gpu_memory * 2**30)
    result = run(checked, processes=processes, device=device, context=context, gpu_memory=limit)
    if layers is not None:
        from swiftkv_train.plan.layers import read

        result["layers"] = read(layers, result)
    if as_json:
        _print_json(result)
    else:
        print_plan(result)
    if limit is not None:
        if not result["fit"]["fits"]:
            raise RunError(verdict(result))
        _say(verdict(result))


@app.command(epilog=_example("swiftkv prepare recipes/smollm2-135m/quickstart.yaml"))
def prepare(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Generate and tokenise all that a recipe reads into data.cache_dir, on a machine without a GPU if you like.

    Training then starts at once, from the same files or, where the cache was copied to, without them.
    """
    from swiftkv_train.recipe import load_recipe

    checked = load_recipe(recipe, overrides)
    from swiftkv_train.data.prepare import prepare as run

    result = run(checked)
    if as_json:
        _print_json(result)


@app.command(epilog=_example("swiftkv calibrate recipes/smollm2-135m/quickstart.yaml"))
def calibrate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    layers: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Instead, predict from the calibration's tokens what every l and every grouping would lose: tables, "
            "this JSON file and a plot beside it."
        ),
    ] = None,
) -> None:
    """Rewrite and calibrate only: the closed-form start, its fit per layer and its held-out quality, to export."""
    if layers is not None:
        from swiftkv_train.recipe import load_recipe

        checked = load_recipe(recipe, overrides)
        from swiftkv_train.plan.layers import check, write

        check(layers)
        from swiftkv_train.layer_choice import predict
        from swiftkv_train.plan.report import print_layers

        result = predict(checked)
        write(result, layers)
        print_layers(result)
        return
    raise typer.Exit(_distil(recipe, overrides, calibrate_only=True))


@app.command(epilog=_example("swiftkv distill recipes/smollm2-135m/quickstart.yaml training.steps=200"))
def distill(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in training.output_dir, or begin it where there is none yet."),
    ] = False,
    allow_changed: Annotated[
        bool,
        typer.Option("--allow-changed", help="With --resume: even if the recipe, the data or the base has changed."),
    ] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,  # deepspeed's; LOCAL_RANK is what counts
) -> None:
    """Rewrite a base model, calibrate its tail and distil the base back into it.

    `accelerate launch -m swiftkv_train.distill RECIPE` or `deepspeed --module swiftkv_train.distill RECIPE` does the
    same on several processes.
    """
    if allow_changed and not resume:
        raise UserError("--allow-changed goes with --resume")
    raise typer.Exit(_distil(recipe, overrides, resume=resume, allow_changed=allow_changed))


def _distil(recipe: str, overrides: list[str] | None, **options: bool) -> int:
    from swiftkv_train.recipe import load_recipe
    from swiftkv_train.stopping import Stop, Stopped

    checked = load_recipe(recipe, overrides)  # before torch is loaded: a typing error answers at once
    with Stop().watching() as stop:
        try:
            from swiftkv_train.distill import distill as run

            return run(checked, stop=stop, **options)
        except Stopped:  # while the libraries were loading
            _say("stopped     before the first step; there is nothing to save")
            return stop.status


@app.command(epilog=_example("swiftkv runs outputs"))
def runs(
    directory: Annotated[Path, typer.Argument(help="Where to look, at any depth.")] = Path("outputs"),
    as_json: Json = False,
) -> None:
    """List the runs below a directory: what each is doing, how far it is, its last loss and held-out KL."""
    from swiftkv_train.runs import list_runs, print_runs, to_json

    found = list_runs(directory)
    if as_json:
        _print_json(to_json(found))
    else:
        print_runs(found, directory)


@app.command(epilog=_example("swiftkv export outputs/quickstart/run --to outputs/quickstart/checkpoint"))
def export(
    run: Annotated[Path, typer.Argument(help="Run directory of `swiftkv distill`.")],
    to: Annotated[Path, typer.Option(help="Directory to make.")],
    format: Annotated[
        str, typer.Option(help="hf: stands alone with transformers; arctic: for ArcticInference.")
    ] = "hf",
) -> None:
    """Write a run's last checkpoint as a model that needs nothing of this project, checked before it gets its name.

    hf is loaded in a clean process, where its logits must be the run's; arctic's tensors are read back.
    """
    if format not in ("hf", "arctic"):
        raise UserError(f"--format {format!r} is not known; use hf or arctic")
    from swiftkv_train.export import export as write

    write(run, to, format=format, report=_say)


@app.command(
    epilog=_example(
        "swiftkv evaluate outputs/quickstart/checkpoint --base models/smollm2-135m --report outputs/quickstart/report"
    )
)
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Exported checkpoint.")],
    base: Annotated[str, typer.Option(help="The model it was made from.")],
    report: Annotated[Path, typer.Option(help="Directory for report.json, report.md and plots.")],
    data: Annotated[Optional[list[str]], typer.Option(help="Held-out NAME=PATH; default: the recipe's.")] = None,  # noqa: UP045
    tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens per source.")] = 16_384,
    gate: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="FIGURE=LIMIT, for instance kl=0.2; exit 1 beyond it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what the rewrite cost and gained: held-out KL, agreement, perplexity, first token, K/V bytes, answers."""
    from swiftkv_train.evaluate import evaluate as run

    result = run(checkpoint, base=base, report_dir=report, data=data, tokens=tokens, gates=gate)
    if as_json:
        _print_json(result)
    else:
        from swiftkv_train.evaluate.summary import print_summary

        print_summary(result)


@app.command(epilog=_example("swiftkv serve outputs/quickstart/checkpoint --port 8000"))
def serve(
    checkpoint: Annotated[str, typer.Argument(help="Exported checkpoint, or a base model.")],
    host: Annotated[str, typer.Option(help="Address to listen on; loopback unless you say so.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    api_key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(envvar="SWIFTKV_API_KEY", help="Key that clients must send."),
    ] = None,
    model_name: Annotated[Optional[str], typer.Option(help="Name in the API; default: the directory's.")] = None,  # noqa: UP045
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are answered 429.")] = 64,
) -> None:
    """Serve a checkpoint with an OpenAI-compatible API."""
    if api_key is None:
        api_key = os.environ.get("SWIFTKV_API_KEY")  # typer takes an empty one for none
    from swiftkv_train.serve import run_server

    run_server(checkpoint, host=host, port=port, api_key=api_key, served_model_name=model_name, max_queue=max_queue)


@app.command(epilog=_example('swiftkv chat outputs/quickstart/checkpoint --prompt "Why is the sky blue?"'))
def chat(
    checkpoint: Annotated[str, typer.Argument(help="Exported checkpoint, or a base model.")],
    prompt: Annotated[Optional[str], typer.Option(help="Answer this one message and end.")] = None,  # noqa: UP045
    system: Annotated[Optional[str], typer.Option(help="System message.")] = None,  # noqa: UP045
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the most likely token each time.")] = 0.0,
    window: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=1,
            help="Keep the system message (or the first 4 tokens) and so many last tokens: a conversation without end.",
        ),
    ] = None,
) -> None:
    """Talk to a checkpoint in the terminal."""
    from swiftkv_train.chat import chat as run

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "window": window}
    run(checkpoint, prompt=prompt, system=system, **options)


def _check_output(context: typer.Context, output: Path | None) -> Path | None:
    if output is not None:
        from swiftkv_train.bench import check_output

        check_output(str(context.info_name), output)
    return output


OutputOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--output", callback=_check_output, help="Also write the result to this JSON file."),
]


def _finish_bench(result: dict[str, Any], output: Path | None, as_json: bool, draw: Any = None) -> None:
    """`draw`: one of bench/plots.py's, for a picture beside `output`."""
    from swiftkv_train.bench import finish

    finish(result, output, as_json)
    if draw is not None and output is not None:
        from swiftkv_train.bench.plots import plot

        plot(result, draw, output)


@bench_app.command("init", epilog=_example("swiftkv bench init recipes/smollm2-135m/quickstart.yaml"))
def bench_init(
    recipe: RecipeArgument, overrides: Overrides = None, output: OutputOption = None, as_json: Json = False
) -> None:
    """Calibrated against copied initialisation on the recipe's held-out text, without training."""
    from swiftkv_train.bench.init import measure

    _finish_bench(measure(recipe, overrides), output, as_json)


@bench_app.command(
    "quality",
    epilog=_example(
        "swiftkv bench quality recipes/smollm2-135m/quality/reference.yaml recipes/smollm2-135m/quickstart.yaml"
    ),
)
def bench_quality(
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

    _finish_bench(measure(recipes, runs, points, tokens, on), output, as_json, draw_quality)


@bench_app.command("layers", epilog=_example("swiftkv bench layers recipes/smollm2-135m/quickstart.yaml --forms 15,22"))
def bench_layers(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    forms: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Values of l; lxg: in groups of g; l:a+b+c: of these sizes; separated by commas."),
    ] = None,
    output: OutputOption = None,
    as_json: Json = False,
) -> None:
    """What forms of a model are predicted to lose (`swiftkv calibrate --layers`) against what they lose, calibrated."""
    from swiftkv_train.bench.layers import measure

    _finish_bench(measure(recipe, overrides, forms), output, as_json)


@bench_app.command("step", epilog=_example("swiftkv bench step models/smollm2-135m"))
def bench_step(
    model: Annotated[str, typer.Argument(help="Base model.")],
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    sequence_length: Annotated[int, typer.Option(min=8)] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each kind.")] = 5,
    output: OutputOption = None,
    as_json: Json = False,
) -> None:
    """One distillation step against a reference-style step: tokens per second and peak memory."""
    from swiftkv_train.bench.step import measure

    _finish_bench(measure(model, batch_size, sequence_length, repeats), output, as_json)


@bench_app.command(
    "prefill", epilog=_example("swiftkv bench prefill outputs/quickstart/checkpoint --base models/smollm2-135m")
)
def bench_prefill(
    checkpoint: Annotated[str, typer.Argument(help="Exported checkpoint.")],
    base: Annotated[str, typer.Option(help="The model it was made from.")],
    lengths: Annotated[str, typer.Option(help="Prompt lengths, separated by commas.")] = "512,1024,2048,4096",
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    output: OutputOption = None,
    as_json: Json = False,
) -> None:
    """Time to first token of a checkpoint over its base's, through `generate`."""
    from swiftkv_train.bench.prefill import measure

    _finish_bench(measure(checkpoint, base, lengths, repeats), output, as_json)


@bench_app.command("loss", epilog=_example("swiftkv bench loss --vocabulary 49152 --hidden-size 576 --rows 512,2048"))
def bench_loss(
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

    _finish_bench(measure(vocabulary, hidden_size, rows, dtype, repeats), output, as_json)


@bench_app.command("startup", epilog=_example("swiftkv bench startup recipes/smollm2-135m/quickstart.yaml"))
def bench_startup(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    repeats: Annotated[int, typer.Option(min=1, help="Starts of each kind.")] = 3,
    output: OutputOption = None,
    as_json: Json = False,
) -> None:
    """What a run does to its data before the first step, with an empty and with a filled token cache."""
    from swiftkv_train.bench.startup import measure

    _finish_bench(measure(recipe, overrides, repeats), output, as_json)


@bench_app.command("plan", epilog=_example("swiftkv bench plan --models debug,135m"))
def bench_plan(
    models: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="debug, 135m, 1b, separated by commas; default: those whose size suits the device."),
    ] = None,
    output: OutputOption = None,
    as_json: Json = False,
) -> None:
    """The peak memory that `swiftkv plan` predicts for a training step against that of a real one, by settings."""
    from swiftkv_train.bench.plan import measure

    _finish_bench(measure(models), output, as_json)


@bench_app.command("stream", epilog=_example("swiftkv bench stream outputs/quickstart/checkpoint --windows 256,1024"))
def bench_stream(
    model: Annotated[str, typer.Argument(help="Exported checkpoint, or a base model.")],
    windows: Annotated[str, typer.Option(help="Tokens kept beside the sinks, separated by commas.")] = "256,1024,4096",
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that are kept for ever.")] = 4,
    tokens: Annotated[
        int, typer.Option(min=1, help="Length of the stream; a dense cache is measured up to it.")
    ] = 20_000,
    contenders: Annotated[
        Optional[str],  # noqa: UP045
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
    _finish_bench(result, output, as_json, draw_stream)


@bench_app.command("relay", epilog=_example("swiftkv bench relay --batch 1,16 --prefix 1024,4096"))
def bench_relay(
    batch: Annotated[str, typer.Option(help="Rows that share the prefix, separated by commas.")] = "1,2,4,8,16,32,64",
    prefix: Annotated[str, typer.Option(help="Its tokens, separated by commas.")] = "64,256,1024,4096,16384",
    suffix: Annotated[int, typer.Option(min=1, help="Tokens of its own that every row has.")] = 128,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 9,
    kv_heads: Annotated[int, typer.Option(min=1, help="K/V heads.")] = 3,
    head_dim: Annotated[int, typer.Option(min=1)] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="Timed turns of each.")] = 7,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Also measure a whole model, checkpoint or base: first token and decoding."),
    ] = None,
    model_batch: Annotated[str, typer.Option(help="Its batches.")] = "1,4,16",
    model_prefix: Annotated[int, typer.Option(min=1, help="Its shared tokens.")] = 1024,
    output: OutputOption = None,
    as_json: Json = False,
) -> None:
    """Attention over a shared prompt against copies of it and against reading it for each request."""
    from swiftkv_train.bench.plots import draw_relay
    from swiftkv_train.bench.relay import measure

    result = measure(batch, prefix, suffix, heads, kv_heads, head_dim, dtype, repeats, model, model_batch, model_prefix)
    _finish_bench(result, output, as_json, draw_relay)


@bench_app.command(
    "decode", epilog=_example("swiftkv bench decode outputs/quickstart/checkpoint --base models/smollm2-135m")
)
def bench_decode(
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

    _finish_bench(measure(checkpoint, base, batch, context, repeats), output, as_json, draw_decode)


@bench_app.command(
    "kv-memory",
    epilog=_example("swiftkv bench kv-memory models/smollm2-135m --data articles=data/demo/articles.test.jsonl"),
)
def bench_kv_memory(
    base: Annotated[str, typer.Argument(help="Base model.")],
    checkpoint: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Exported checkpoint whose quality to measure as well, with --data."),
    ] = None,
    data: Annotated[Optional[list[str]], typer.Option(help="Text to score: NAME=PATH.")] = None,  # noqa: UP045
    tokens: Annotated[int, typer.Option(min=2, help="Of each text.")] = 16_384,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens scored in one piece.")] = 512,
    output: OutputOption = None,
    as_json: Json = False,
) -> None:
    """Bytes that the K/V cache allocates by AcrossKV group and storage format, and what a format costs in quality."""
    from swiftkv_train.bench.kv_memory import measure
    from swiftkv_train.bench.plots import draw_kv_memory

    result = measure(base, checkpoint, data, tokens, sequence_length)
    _finish_bench(result, output, as_json, draw_kv_memory)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(*prefix: str) -> None:
    """Entry point. A user's mistake becomes one line and status 2, a failure one line and status 1."""
    keep_freed_memory()
    try:
        status = app(args=[*prefix, *sys.argv[1:]], prog_name="swiftkv", standalone_mode=False)
    except UsageError as error:
        message = " ".join(error.format_message().split())
        if type(error).__name__ != "NoArgsIsHelpError":  # whose help has been shown
            command = error.ctx.command_path if error.ctx else "swiftkv"
            _say(f"error: {message} (see `{command} --help`)")
        raise SystemExit(2) from None
    except (UserError, RunError) as error:
        _say(f"error: {error}")
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which may not be loaded
            raise
        _say(
            "error: the GPU's memory is full; a run takes less with a smaller training.micro_batch_size or with "
            "training.gradient_checkpointing=true, and `swiftkv plan RECIPE --gpu-memory GIB` says what fits"
        )
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        _say("interrupted")
        raise SystemExit(130) from None
    except (OSError, UnicodeError) as error:  # the last net, for what no command has put in words of its own
        file = getattr(error, "filename", None)
        reason = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
        _say(f"error: {reason if file is None else f'{file}: {reason}'}")
        raise SystemExit(2 if isinstance(error, PermissionError) else 1) from None
    raise SystemExit(status)


if __name__ == "__main__":
    main()
