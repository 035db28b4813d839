"""The command `swiftkv`. Each command imports what it needs when it runs, so that help is instant."""

from __future__ import annotations

import math
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from swiftkv_train.allocator import keep_freed_memory
from swiftkv_train.cli.bench import app as bench_app
from swiftkv_train.cli.options import (
    Dtype,
    Json,
    KVBudget,
    Overrides,
    PrefillBudget,
    RecipeArgument,
    example,
    print_json,
    say,
)
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
app.add_typer(bench_app, name="bench")


@app.command(epilog=example("swiftkv fetch smollm2-135m --to models/smollm2-135m"))
def fetch(
    source: Annotated[str, typer.Argument(help="smollm2-135m, debug, a hub id, a model directory, or a .gguf file.")],
    to: Annotated[Path, typer.Option(help="Directory to put the model in.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Directory for the text and chats that come with smollm2-135m and debug."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id.")] = None,
) -> None:
    """Get a model as safetensors, with tokenizer and chat template, checksums verified.

    `debug` is a tiny random model made on the spot, to try the commands with.
    """
    from swiftkv_train.fetch import DATA_DIRECTORIES
    from swiftkv_train.fetch import fetch as run

    if data is not None and source not in DATA_DIRECTORIES:
        raise UserError(f"--data goes with {' and '.join(DATA_DIRECTORIES)}; no data comes with {source}")
    run(source, to, data_dir=data or DATA_DIRECTORIES.get(source), revision=revision, report=say)


@app.command(epilog=example("swiftkv plan recipes/smollm2-135m/quickstart.yaml training.steps=4000 --gpu-memory 24"))
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(min=0.0, help="GiB of one GPU: say whether the run fits; exit 1, and what to change, if not."),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="GPUs, with one process on each.")] = 1,
    device: Annotated[str, typer.Option(help="cuda or cpu, which need not be present.")] = "cuda",
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of context that inference is counted at; default: data.sequence_length."),
    ] = None,
    layers: Annotated[
        Path | None,
        typer.Option(help="What `swiftkv calibrate RECIPE --layers FILE` wrote: also show what every l would lose."),
    ] = None,
    prefill_budget: PrefillBudget = None,
    kv_budget: KVBudget = None,
    as_json: Json = False,
) -> None:
    """Say what a run will train, compute and hold, by part, from the base's config alone: no weights, no GPU."""
    if device not in ("cuda", "cpu"):
        raise UserError(f"--device {device!r} is not known; use cuda or cpu")
    if gpu_memory is not None and device == "cpu":
        raise UserError("--gpu-memory goes with --device cuda")
    if gpu_memory is not None and not math.isfinite(gpu_memory * 2**30):
        raise UserError(f"--gpu-memory {gpu_memory:g} is no size; give the GiB of one GPU")
    _check_budgets(layers, prefill_budget, kv_budget)
    from swiftkv_train.recipe_file import load_recipe

    checked = load_recipe(recipe, overrides)
    from swiftkv_train.plan import plan as run
    from swiftkv_train.plan.report import print_plan, verdict

    limit = None if gpu_memory is None else round(gpu_memory * 2**30)
    result = run(checked, processes=processes, device=device, context=context, gpu_memory=limit)
    if layers is not None:
        from swiftkv_train.plan.layers import read, within_budget

        result["layers"] = read(layers, result)
        if (prefill_budget, kv_budget) != (None, None):
            budget = within_budget(result, result["layers"], prefill_budget, kv_budget)
            result["layers"]["within_budget"] = budget
    if as_json:
        print_json(result)
    else:
        print_plan(result)
        if layers is not None:
            _say_plot(layers)
    if limit is not None:
        if not result["fit"]["fits"]:
            raise RunError(verdict(result))
        say(verdict(result))


def _check_budgets(layers: Path | None, *budgets: float | None) -> None:
    given = [budget for budget in budgets if budget is not None]
    if given and layers is None:
        raise UserError("--prefill-budget and --kv-budget go with --layers: they choose among its forms")
    if wrong := [budget for budget in given if not 0 < budget <= 1]:
        raise UserError(f"a budget is a share of the base's, above 0 and at most 1, not {wrong[0]:g}")


def _say_plot(layers: Path) -> None:
    """Where the tables' plot is; calibrate draws it where matplotlib is installed."""
    plot = layers.with_suffix(".png")
    if plot.exists():
        print(f"plotted in {plot}")


@app.command(epilog=example("swiftkv prepare recipes/smollm2-135m/quickstart.yaml"))
def prepare(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Generate and tokenise all that a recipe reads into data.cache_dir, on a machine without a GPU if you like.

    Training then starts at once, from the same files or, where the cache was copied to, without them.
    """
    from swiftkv_train.recipe_file import load_recipe

    checked = load_recipe(recipe, overrides)
    from swiftkv_train.data.prepare import prepare as run

    result = run(checked)
    if as_json:
        print_json(result)


@app.command(epilog=example("swiftkv calibrate recipes/smollm2-135m/quickstart.yaml"))
def calibrate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    layers: Annotated[
        Path | None,
        typer.Option(
            help="Instead, predict from the calibration's tokens what every l and every grouping would lose: tables, "
            "this JSON file and a plot beside it."
        ),
    ] = None,
    prefill_budget: PrefillBudget = None,
    kv_budget: KVBudget = None,
) -> None:
    """Rewrite and calibrate only: the closed-form start, its fit per layer and its held-out quality, to export."""
    _check_budgets(layers, prefill_budget, kv_budget)
    if layers is not None:
        from swiftkv_train.recipe_file import load_recipe

        checked = load_recipe(recipe, overrides)
        from swiftkv_train.plan.layers import check, within_budget, write

        check(layers)
        from swiftkv_train.layer_choice import predict
        from swiftkv_train.plan.report import print_budget, print_layers

        result = predict(checked)
        write(result, layers)
        print_layers(result)
        if (prefill_budget, kv_budget) != (None, None):
            print_budget(within_budget(result, result, prefill_budget, kv_budget))
        _say_plot(layers)
        return
    raise typer.Exit(_distil(recipe, overrides, calibrate_only=True))


@app.command(epilog=example("swiftkv distill recipes/smollm2-135m/quickstart.yaml training.steps=200"))
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
    from swiftkv_train.recipe_file import load_recipe
    from swiftkv_train.stopping import Stop, Stopped

    checked = load_recipe(recipe, overrides)  # before torch is loaded: a typing error answers at once
    with Stop().watching() as stop:
        try:
            from swiftkv_train.distill import distill as run

            return run(checked, stop=stop, **options)
        except Stopped:  # while the libraries were loading
            say("stopped     before the first step; there is nothing to save")
            return stop.status


@app.command(epilog=example("swiftkv runs outputs"))
def runs(
    directory: Annotated[Path, typer.Argument(help="Where to look, at any depth.")] = Path("outputs"),
    as_json: Json = False,
) -> None:
    """List the runs below a directory: what each is doing, how far it is, its last loss and held-out KL."""
    from swiftkv_train.runs import list_runs, print_runs, to_json

    found = list_runs(directory)
    if as_json:
        print_json(to_json(found))
    else:
        print_runs(found, directory)


@app.command(epilog=example("swiftkv export outputs/quickstart/run --to outputs/quickstart/checkpoint"))
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

    write(run, to, format=format, report=say)


@app.command(
    epilog=example(
        "swiftkv evaluate outputs/quickstart/checkpoint --base models/smollm2-135m --report outputs/quickstart/report"
    )
)
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Exported checkpoint.")],
    base: Annotated[str, typer.Option(help="The model it was made from.")],
    report: Annotated[Path, typer.Option(help="Directory for report.json, report.md and plots.")],
    data: Annotated[list[str] | None, typer.Option(help="Held-out NAME=PATH; default: the recipe's.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens per source.")] = 16_384,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            help="FIGURE=LIMIT, for instance kl=0.2; exit 1 beyond it: of each --data, else of all kinds trained on."
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Also a task of lm-evaluation-harness (extra `tasks`), or its YAML file; may be repeated.",
        ),
    ] = None,
    task_limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions of each task.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what the rewrite cost and gained: held-out KL, agreement, perplexity, first token, K/V bytes, answers."""
    from swiftkv_train.evaluate import evaluate as run

    result = run(
        checkpoint,
        base=base,
        report_dir=report,
        data=data,
        tokens=tokens,
        gates=gate,
        tasks=tasks,
        task_limit=task_limit,
    )
    if as_json:
        print_json(result)
    else:
        from swiftkv_train.evaluate.summary import print_summary

        print_summary(result)


@app.command(epilog=example("swiftkv serve outputs/quickstart/checkpoint --port 8000"))
def serve(
    checkpoint: Annotated[str, typer.Argument(help="Exported checkpoint, or a base model.")],
    host: Annotated[str, typer.Option(help="Address to listen on; loopback unless you say so.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="SWIFTKV_API_KEY", help="Key that clients must send."),
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="Name in the API; default: the directory's.")] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Requests that are answered at once, each with K/V of its own in memory.")
    ] = 8,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are answered 429.")] = 64,
    context_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most tokens of a prompt and its answer, and of the K/V kept for later requests; default: the model's "
            "own, which may need much memory.",
        ),
    ] = None,
    max_output_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of an answer; default: 4096.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Keep the system message (if no longer than this; or the first 4 tokens) and so many last tokens of a "
            "conversation, which may then go on without end in fixed memory. Both must fit the model's context.",
        ),
    ] = None,
    dtype: Dtype = "auto",
    reuse: Annotated[
        bool, typer.Option(help="Keep the K/V of prompts and answers for later requests that begin alike.")
    ] = True,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin whose web pages may use the server, like http://localhost:3000; may be repeated."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No line about every request on standard error.")] = False,
) -> None:
    """Serve a checkpoint with an OpenAI-compatible API; requests that come together are answered together."""
    if api_key is None:
        api_key = os.environ.get("SWIFTKV_API_KEY")  # typer takes an empty one for none
    from swiftkv_train.serve import run_server

    run_server(
        checkpoint,
        host=host,
        port=port,
        api_key=api_key,
        served_model_name=model_name,
        max_batch=max_batch,
        max_queue=max_queue,
        context_length=context_length,
        dtype=dtype,
        max_output_tokens=max_output_tokens,
        reuse=reuse,
        window=window,
        cors_origins=cors_origin or (),
        quiet=quiet,
    )


@app.command(epilog=example('swiftkv chat outputs/quickstart/checkpoint --prompt "Why is the sky blue?"'))
def chat(
    checkpoint: Annotated[str, typer.Argument(help="Exported checkpoint, or a base model.")],
    prompt: Annotated[str | None, typer.Option(help="Answer this one message and end.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the most likely token each time.")] = 0.0,
    window: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Keep the system message (or the first 4 tokens) and so many last tokens: a conversation without end.",
        ),
    ] = None,
    dtype: Dtype = "auto",
) -> None:
    """Talk to a checkpoint in the terminal. Ctrl-C ends an answer, Ctrl-D the conversation."""
    from swiftkv_train.chat import chat as run

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "window": window}
    run(checkpoint, prompt=prompt, system=system, dtype=dtype, **options)


def main(*prefix: str) -> None:
    """Entry point. A user's mistake becomes one line and status 2, a failure one line and status 1."""
    keep_freed_memory()
    try:
        status = app(args=[*prefix, *sys.argv[1:]], prog_name="swiftkv", standalone_mode=False)
    except UsageError as error:
        message = " ".join(error.format_message().split())
        if type(error).__name__ != "NoArgsIsHelpError":  # whose help has been shown
            command = error.ctx.command_path if error.ctx else "swiftkv"
            say(f"error: {message} (see `{command} --help`)")
        raise SystemExit(2) from None
    except (UserError, RunError) as error:
        say(f"error: {error}")
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
    except RuntimeError as error:
        if asked := re.search(r"DefaultCPUAllocator: .* allocate (\d+) bytes", str(error)):
            say(
                f"error: there is no memory for another {int(asked[1]) / 2**30:,.1f} GiB; lower what asks for it "
                "(--window, training.micro_batch_size, data.sequence_length)"
            )
            raise SystemExit(1) from None
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which may not be loaded
            raise
        say(
            "error: the GPU's memory is full; a run takes less with a smaller training.micro_batch_size or with "
            "training.gradient_checkpointing=true, and `swiftkv plan RECIPE --gpu-memory GIB` says what fits"
        )
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        say("interrupted")
        raise SystemExit(130) from None
    except (OSError, UnicodeError) as error:  # the last net, for what no command has put in words of its own
        file = getattr(error, "filename", None)
        reason = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
        say(f"error: {reason if file is None else f'{file}: {reason}'}")
        raise SystemExit(2 if isinstance(error, PermissionError) else 1) from None
    raise SystemExit(status)
