"""The commands that read what was measured: compare, gate, leaderboard. Nothing heavy is imported here."""

from __future__ import annotations

import os
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Tracebacks where something goes wrong.")]
Models = Annotated[
    list[str] | None, typer.Option("--model", metavar="M|M=N", help="Only this entry; M=N where names differ.")
]

Root = Annotated[str, typer.Option("--root", metavar="DIR", help="Folder of all boards.")]
board_app = typer.Typer(
    help="Put a run on a leaderboard, check the entries, build the pages.", no_args_is_help=True, rich_markup_mode=None
)


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command()(compare)
    app.command()(gate)
    app.add_typer(board_app, name="leaderboard")


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Run folder, a file in one, a leaderboard entry or a board.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same; a difference is B - A.")],
    model: Models = None,
    condition: Annotated[list[str] | None, typer.Option(help="Only this condition, such as worst@linf:4/255.")] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="CHECK", help="Compare although prompt, extraction, objectives or certificates differ."),
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compare two measurements question by question: difference, interval, exact McNemar, Holm."""
    from .commands.gate import compare as work

    work(a, b, models=model or (), conditions=condition or (), allow=allow or (), as_json=json)


def gate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder of the candidate.")],
    baseline: Annotated[str, typer.Option(metavar="B", help="Run folder, leaderboard entry or board to hold it to.")],
    model: Models = None,
    suite: Annotated[
        str | None, typer.Option(metavar="SUITE", help="Take the rules from this suite [default: the run's].")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Inconclusive ends with exit code 5.")] = False,
    markdown: Annotated[str | None, typer.Option(metavar="FILE", help="Write the summary as Markdown.")] = None,
    junit: Annotated[str | None, typer.Option(metavar="FILE", help="Write JUnit XML.")] = None,
    github: Annotated[
        bool | None,
        typer.Option("--github/--no-github", help="Annotations on stderr [default: inside GitHub Actions]."),
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Fail where a run is less robust than its baseline: 0 pass, 4 regressed, 5 inconclusive (--strict)."""
    from .commands.gate import gate as work

    code = work(
        run,
        baseline,
        models=model or (),
        suite=suite,
        strict=strict,
        markdown=markdown,
        junit=junit,
        github=os.environ.get("GITHUB_ACTIONS") == "true" if github is None else github,
        as_json=json,
    )
    if code:
        raise typer.Exit(code)


@board_app.command("add")
def board_add(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, complete, of a whole suite.")],
    model: Annotated[list[str] | None, typer.Option(help="Only this entry [default: all of the run].")] = None,
    adaptive: Annotated[
        str, typer.Option(metavar="TEXT", help="The attack that was adapted to the entry; defences must state one.")
    ] = "",
    replace: Annotated[bool, typer.Option("--replace", help="In place of an entry of that name.")] = False,
    reproduces: Annotated[
        bool, typer.Option("--reproduces", help="A second measurement, with another seed, of entries on the board.")
    ] = False,
    standard: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Of a new board: what its entries are attacked with at the least, safemed-attack or pgd "
            "[default: safemed-attack].",
        ),
    ] = "",
    root: Root = "leaderboards",
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Put the models of a run on the board of their suite and data."""
    from .commands.leaderboard import add as work

    work(
        run,
        root,
        model or (),
        adaptive=adaptive,
        replace=replace,
        reproduces=reproduces,
        standard=standard,
        as_json=json,
    )


@board_app.command("check")
def board_check(root: Root = "leaderboards", json: Json = False, verbose: Verbose = False) -> None:
    """Make every number of every entry again from its records."""
    from .commands.leaderboard import check as work

    work(root, as_json=json)


@board_app.command("build")
def board_build(root: Root = "leaderboards", json: Json = False, verbose: Verbose = False) -> None:
    """Write README.md and index.html of all boards."""
    from .commands.leaderboard import build as work

    work(root, as_json=json)
