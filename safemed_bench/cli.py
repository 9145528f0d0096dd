"""The commands. Nothing heavy is imported here: each command imports what it needs.

Results and JSON go to stdout, all else to stderr. Exit codes: 0 ok, 1 internal error, 2 usage or invalid suite,
3 incomplete, 4 gate: regressed, 5 gate: inconclusive (strict), 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .cli_results import register as register_results
from .core.errors import IncompleteError, SafeMedError
from .core.journal import disk_full

if TYPE_CHECKING:
    from .commands.prepare import Request

INTERRUPTED = 130

ClickException: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""What a wrong command line raises. Newer typers carry their own click, so it is found through typer."""

app = typer.Typer(
    name="safemed-bench",
    help="How well does a medical vision-language model hold up when somebody tampers with the picture?",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(
    help="Audit a data folder, or write a generated one.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_app, name="data")

Suites = Annotated[list[str], typer.Argument(metavar="SUITE", help="YAML files or shipped names.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many questions per modality.")]
Model = Annotated[list[str] | None, typer.Option(help="Only this entry; a registered name or path may be named too.")]
Filter = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="modality, question_type or source.")]
Set = Annotated[list[str] | None, typer.Option(metavar="KEY.PATH=VALUE", help="Change one key; the value is YAML.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of everything random.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Batch = Annotated[str | None, typer.Option(metavar="auto|N", help="Questions per forward pass.")]
Workers = Annotated[str | None, typer.Option(metavar="auto|N", help="Processes.")]
Output = Annotated[str | None, typer.Option(help="Folder of the run [default: reports/SUITE].")]
Plugin = Annotated[list[str] | None, typer.Option(metavar="FILE", help="Python file that registers plugins.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never ask the Hugging Face hub.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Tracebacks where something goes wrong.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"safemed-bench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Set the scene for every command: libraries keep quiet, so that stderr is ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@app.command()
def run(
    suites: Suites,
    limit: Limit = None,
    model: Model = None,
    filter: Filter = None,
    set: Set = None,
    seed: Seed = None,
    device: Device = None,
    batch_size: Batch = None,
    workers: Workers = None,
    engine: Annotated[str | None, typer.Option(help="local (processes) or ray (a cluster's actors).")] = None,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster: auto, host:port, ray://host:port.")] = None,
    output: Output = None,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on, or move the old journal aside.")] = True,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Measure again what ended in an error.")] = False,
    fail_on_error: Annotated[float | None, typer.Option(min=0, max=1, help="Share of errors to allow.")] = None,
    plugin: Plugin = None,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure suites; the same command goes on where a stopped run ended."""
    from .commands.measure import run as work

    request = _request(
        limit,
        model,
        filter,
        set,
        plugin,
        offline,
        _flags(seed, device, batch_size, workers, fail_on_error, engine, address),
    )
    work(
        suites,
        request,
        output=output,
        resume=resume,
        retry_errors=retry_errors,
        as_json=json,
        quiet=quiet,
    )


@app.command()
def plan(
    suites: Suites,
    limit: Limit = None,
    model: Model = None,
    filter: Filter = None,
    set: Set = None,
    seed: Seed = None,
    device: Device = None,
    batch_size: Batch = None,
    workers: Workers = None,
    probe: Annotated[
        int | None, typer.Option(min=0, help="Time so many questions of each cell; 0: earlier runs only. [default: 8]")
    ] = None,
    earlier: Annotated[
        list[str] | None, typer.Option(metavar="FOLDER", help="Run whose records tell the time, as --output's do.")
    ] = None,
    budget: Annotated[str | None, typer.Option(metavar="8h", help="Say what is done in this time.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of one worker's hour, in any currency.")] = None,
    output: Output = None,
    plugin: Plugin = None,
    offline: Offline = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Print cells and units of suites, and what of them is done; with a flag of time or cost, what the rest takes."""
    from .commands.plan import Wish
    from .commands.plan import plan as work

    request = _request(limit, model, filter, set, plugin, offline, _flags(seed, device, batch_size, workers))
    work(suites, request, Wish(probe, tuple(earlier or ()), budget, price), output=output, as_json=json)


@app.command()
def validate(
    suites: Suites,
    set: Set = None,
    plugin: Plugin = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say everything that is wrong with suites, with file, line and column."""
    from .commands.measure import validate as work

    work(suites, _request(None, None, None, set, plugin, False, {}), as_json=json)


@app.command("list")
def list_(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND", help="models, attacks, objectives, certifiers, corruptions, datasets or suites."
        ),
    ],
    plugin: Plugin = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """List models, attacks, objectives, certifiers, corruptions, datasets or suites."""
    from .commands.catalogue import list_kind

    _load_plugins(plugin)
    list_kind(kind, as_json=json)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Model, attack, objective, data set or suite.")],
    plugin: Plugin = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show a model's card, what an attack does, or a suite as it resolves."""
    from .commands.catalogue import show as work

    _load_plugins(plugin)
    work(name, as_json=json)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="YAML file, see suites/train/.")],
    set: Set = None,
    plugin: Plugin = None,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on from the last checkpoint.")] = True,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train an entry; the same command goes on from the last checkpoint."""
    _load_plugins(plugin)
    from .training import train as work

    print(work(config, tuple(set or ()), resume=resume, quiet=quiet))


@app.command()
def report(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run or of a training.")],
    latex: Annotated[bool, typer.Option("--latex", help="Print the run's tables as LaTeX, and write nothing.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The same as Markdown.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="The same as CSV.")] = False,
    figures: Annotated[
        bool, typer.Option("--figures", help="Write the run's figures as SVG and PDF, too, into RUN/figures.")
    ] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write the HTML report of a run, or the page of a training, and print where it is. Needs no model."""
    from .commands.report import Format
    from .commands.report import report as work

    asked: dict[Format, bool] = {"latex": latex, "markdown": markdown, "csv": csv}
    work(folder, tables=[name for name, on in asked.items() if on], figures=figures, as_json=json)


register_results(app)


@app.command()
def doctor(json: Json = False, verbose: Verbose = False) -> None:
    """Versions, device, cores, data and disk of this machine."""
    from .commands.doctor import doctor as work

    work(as_json=json)


@data_app.command("check")
def data_check(
    root: Annotated[str, typer.Argument(help="OmniMedVQA folder.")], json: Json = False, verbose: Verbose = False
) -> None:
    """Audit a data folder: counts, chance, blind prior, leakage, duplicates, broken files."""
    from .commands.data import check

    check(root, as_json=json)


@data_app.command("prepare")
def data_prepare(
    name: Annotated[str, typer.Argument(help="phantom")],
    output: Annotated[str, typer.Option(help="Folder to write.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the images.")] = 0,
    images: Annotated[
        str | None, typer.Option(metavar="N|SPLIT=N,...", help="Images per modality; a bare number is of test.")
    ] = None,
    size: Annotated[int, typer.Option(min=32, help="Side of an image, pixels.")] = 64,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes [default: one per core].")] = None,
    verbose: Verbose = False,
) -> None:
    """Write the generated phantom set in OmniMedVQA's own layout."""
    from .commands.data import prepare

    prepare(name, output, seed=seed, images=images, size=size, workers=workers)


def _flags(
    seed: int | None,
    device: str | None,
    batch_size: str | None = None,
    workers: str | None = None,
    fail_on_error: float | None = None,
    engine: str | None = None,
    address: str | None = None,
) -> dict[str, tuple[str, object]]:
    """Suite key -> the flag that sets it, and its value; None leaves the suite's own."""
    return {
        "run.seed": ("--seed", seed),
        "run.device": ("--device", device),
        "run.batch_size": ("--batch-size", batch_size),
        "run.workers": ("--workers", workers),
        "run.fail_on_error": ("--fail-on-error", fail_on_error),
        "run.engine": ("--engine", engine),
        "run.address": ("--address", address),
    }


def _request(
    limit: int | None,
    models: Sequence[str] | None,
    filters: Sequence[str] | None,
    sets: Sequence[str] | None,
    plugins: Sequence[str] | None,
    offline: bool,
    flags: dict[str, tuple[str, object]],
) -> Request:
    from .commands.prepare import Request

    return Request(
        limit, tuple(models or ()), tuple(filters or ()), tuple(sets or ()), tuple(plugins or ()), flags, offline
    )


def _load_plugins(files: Sequence[str] | None) -> None:
    from .core.registry import load_plugin_file

    for file in files or ():
        load_plugin_file(file)


def invoke(arguments: Sequence[str] | None = None) -> int:
    """Run one command; every ending becomes one message on stderr and one exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verbose = not {"--verbose", "-v"}.isdisjoint(arguments)
    try:
        code = app(args=arguments, prog_name="safemed-bench", standalone_mode=False)
    except ClickException as error:
        error.show()
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except SafeMedError as error:
        return _complain(str(error), verbose, error.exit_code)
    except BrokenPipeError:  # the reader of stdout has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if isinstance(error, OSError) and disk_full(error):
            return _complain(_full(error), verbose, IncompleteError.exit_code)
        hint = "" if verbose else " (--verbose shows where)"
        return _complain(f"internal error: {type(error).__name__}: {error}{hint}", verbose, 1)
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _full(error: OSError) -> str:
    where = f" for {error.filename}" if error.filename else ""
    return f"disk full: no room{where}; what was written before is safe. Make room, then run the same command again"


def _complain(message: str, verbose: bool, code: int) -> int:
    if verbose:
        import traceback

        traceback.print_exc()
    print(message, file=sys.stderr)
    return code


def main() -> None:
    """Entry point of `safemed-bench`."""
    sys.exit(invoke())
