"""The command line: what the public names do, without writing Python."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Generator
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="tying",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RESULT, SMALL, PAGE = "result.json", "small.safetensors", "report.html"

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]


class Status(IntEnum):
    """How a command ends. 2, a usage error, is typer's."""

    FAILED = 1
    INTERRUPTED = 130


def main() -> None:
    """Run the command line: the entry point `tying`."""
    app()


@app.callback(invoke_without_command=True)
def about(
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.", is_eager=True)] = False,
) -> None:
    """Make trained PyTorch networks smaller: find weights that can be equal, and store each of them once.

    [bold]Start here[/bold] (no files needed; a small network on handwritten digits, in under three minutes):

        tying compress

    [bold]Then[/bold], with a network of your own:

        tying inspect model.safetensors      what is in it already?
        tying inspect a.pt b.pt              what do two share?
        tying compress task.py --ratio 24    train it 24 times smaller
        tying explain task.py                what does the sharing in it save, and who sees whom?
        tying report tying-out               the page with the pictures, again

    `tying COMMAND --help` says more about each.
    """
    if version:
        from tying import __version__

        typer.echo(f"tying {__version__}")
        raise typer.Exit


TaskFile = Annotated[
    Path | None,
    typer.Argument(
        help="A Python file with model(), fit(), evaluate(), example_inputs(). Without it: scikit-learn's digits.",
        metavar="TASK",
        show_default=False,
    ),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        help="The accuracy that may be lost on the validation split: 0.003 is 0.3 points. The default, 0.003.",
        metavar="F",
        show_default=False,
    ),
]
Ratio = Annotated[
    float | None, typer.Option(help="How many times fewer parameters: 24.", metavar="F", show_default=False)
]
Bytes = Annotated[
    int | None,
    typer.Option("--bytes", help="How many bytes the file may have: 20000.", metavar="N", show_default=False),
]
Epochs = Annotated[
    int | None,
    typer.Option(help="Epochs of each training; the task's own number if left out.", metavar="N", show_default=False),
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same network.", metavar="N")]
Folder = Annotated[
    Path,
    typer.Option(help="The folder for what is made. Run again, an interrupted run goes on from it.", metavar="DIR"),
]


@app.command(no_args_is_help=False)
def compress(
    task: TaskFile = None,
    max_drop: MaxDrop = None,
    ratio: Ratio = None,
    bytes_: Bytes = None,
    seed: Seed = 0,
    epochs: Epochs = None,
    out: Folder = Path("tying-out"),
    as_json: AsJson = False,
) -> None:
    """Train a network, find what can be equal or go, and train the smaller network again.

    Give one of --max-drop, --ratio and --bytes; all else is searched for, and chosen on the validation split.

    In the folder --out you then have:

        small.safetensors    the network, for tying.load
        plan.safetensors     which weights are equal, for tying.TiePlan.load
        result.json          the figures
        report.html          the page with the pictures

    [bold]Examples[/bold]

        tying compress
        tying compress task.py --max-drop 0.005
        tying compress task.py --ratio 24 --out small-24
    """
    budgets = {"--max-drop": max_drop, "--ratio": ratio, "--bytes": bytes_}
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) > 1:
        raise typer.BadParameter(f"expected one of {', '.join(budgets)}, got {' and '.join(given)}: drop one of them.")
    if not given:
        max_drop = 0.003
    with _ending_cleanly(resume=out), _only_json(as_json):
        from tying import compress as run
        from tying.compress import load_task

        result = run(
            load_task(task),
            max_drop=max_drop,
            ratio=ratio,
            bytes_=bytes_,
            seed=seed,
            epochs=epochs,
            out=out,
            progress=True,
        )
        page = _draw(result.data, out / PAGE)
        made = {"network": out / SMALL, "figures": out / RESULT, **({"page": page} if page else {})}
    if as_json:
        _print_json({**json.loads(result.to_json()), "files": {name: str(path) for name, path in made.items()}})
    else:
        typer.echo(str(result.report))
        typer.secho(str(result.data.budget), fg=typer.colors.GREEN if result.kept else typer.colors.YELLOW)
        typer.echo("\n".join(f"{name + ':':<9} {path}" for name, path in made.items()))


@app.command()
def inspect(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="A .safetensors file, or a state dict saved by torch.save; several to compare them.", metavar="FILE"
        ),
    ],
    support: Annotated[
        float,
        typer.Option(
            help="Of one file: a group is zero if its norm is at most this part of the largest. Several: not used.",
            metavar="F",
        ),
    ] = 0.05,
    tolerance: Annotated[
        float,
        typer.Option(
            help="Two inputs, or weights of one name, are alike if their distance is at most this part of the norm.",
            metavar="F",
        ),
    ] = 0.05,
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint could give, or what several share.

    One: what is zero or nearly equal, and what tying it would save.

    Several: what is equal bit for bit, how far apart the rest is, and what one file for all would save.

    Nothing is trained, changed or run: a pickle that wants to run code is refused.

    [bold]Examples[/bold]

        tying inspect model.safetensors
        tying inspect checkpoint.pt --tolerance 0.01 --json
        tying inspect a.safetensors b.safetensors
    """
    with _ending_cleanly(), _only_json(as_json):
        from tying import inspect as look

        found = look(*files, support=support, tolerance=tolerance)
    typer.echo(found.to_json() if as_json else str(found))


@app.command()
def measure(
    file: Annotated[Path, typer.Argument(help="A network that tying saved: small.safetensors.", metavar="FILE")],
    task: Annotated[
        Path | None,
        typer.Option(
            help="The task it was made from. Without it: scikit-learn's digits.", metavar="TASK", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a small network beside the dense one.

    Parameters, bytes, operations and time of both, and what the small one gets right on the test split.

    [bold]Examples[/bold]

        tying measure tying-out/small.safetensors
        tying measure small-24/small.safetensors --task task.py --json
    """
    with _ending_cleanly(), _only_json(as_json):
        from tying import load
        from tying import measure as take
        from tying.compress import load_task

        judge = load_task(task)
        dense = judge.model()
        small = load(file, dense)
        report = take(small, like=dense, example_inputs=judge.example_inputs(), path=file)
        # the dense network is not trained: only the small one is asked
        asked = take(small, evaluate=lambda network: judge.evaluate(network, "test"), latency=False)
        report = replace(report, model=replace(report.model, accuracy=asked.model.accuracy))
    typer.echo(report.to_json() if as_json else str(report))


@app.command()
def report(
    result: Annotated[
        Path, typer.Argument(help="The result.json of compress, or the folder it is in.", metavar="RESULT")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The page. Without it: report.html beside the result.", metavar="FILE", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw the page of a result again.

    It is one HTML file with the pictures inside, and asks nothing of any network: send it, or keep it.

    [bold]Examples[/bold]

        tying report tying-out
        tying report tying-out/result.json --out page.html
    """
    with _ending_cleanly(), _only_json(as_json):
        from tying import report as draw

        folder = result if result.is_dir() else result.parent
        page = draw(result, out if out is not None else folder / PAGE)
    if as_json:
        _print_json({"page": str(page)})
    else:
        typer.echo(f"page: {page}")


@app.command()
def explain(
    model: Annotated[
        Path,
        typer.Argument(help="A Python file with model() and example_inputs(), as a task has them.", metavar="MODEL"),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where to draw who sees whom: a name that ends with .png, .svg or .pdf. Without it: no picture.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    shifts: Annotated[
        int, typer.Option(help="Measure equivariance for shifts of the input by 1 to this; 0: not.", metavar="N", min=0)
    ] = 4,
    as_json: AsJson = False,
) -> None:
    """Say what the sharing inside a network saves.

    Each layer that shares beside the locally connected and the dense layer of the same map: values, operations, bytes.

    Who sees whom: the inputs that a place of a layer sees, and the places that an input reaches. And how far the output
    of each layer moves along when the input is shifted: strides, pooling and padding break it.

    [bold]Examples[/bold]

        tying explain task.py
        tying explain lenet.py --out fields.png
        tying explain lenet.py --shifts 8 --json
    """
    with _ending_cleanly(), _only_json(as_json):
        from tying import explain as say
        from tying.explain import check_place, load_example

        if out is not None:
            check_place(out)
        explanation = say(*load_example(model), shifts=shifts)
    if not as_json:
        typer.echo(str(explanation))
    drawn = None
    if out is not None and not explanation.can_be_drawn:
        typer.secho("no picture: there is nothing to draw", err=True, fg=typer.colors.YELLOW)
    elif out is not None:
        with _ending_cleanly(), _only_json(as_json):
            drawn = explanation.draw(out)
    if as_json:
        _print_json({**json.loads(explanation.to_json()), "files": {} if drawn is None else {"picture": str(drawn)}})
    elif drawn is not None:
        typer.echo(f"\npicture: {drawn}")


def _draw(data: Any, path: Path) -> Path | None:
    """Draw the page, or say what is missing: the network is there, with or without its page."""
    from tying import TyingError
    from tying import report as draw

    try:
        return draw(data, path)
    except TyingError as error:
        typer.secho(f"no page: {_one_line(error)}", err=True, fg=typer.colors.YELLOW)
        return None


@contextlib.contextmanager
def _ending_cleanly(resume: Path | None = None) -> Generator[None]:
    """Turn errors into one line and an exit status; an interruption into how to go on."""
    from tying import TyingError

    try:
        yield
    except BrokenPipeError:
        raise
    except (TyingError, OSError) as error:
        typer.secho(f"error: {_one_line(error)}", err=True, fg=typer.colors.RED)
        raise typer.Exit(Status.FAILED) from error
    except KeyboardInterrupt:
        message = "stopped."
        if resume is not None:
            again = shlex.join(["tying", *sys.argv[1:]])
            message = f"stopped. What is done is kept in {resume}; to go on, run again: {again}"
        typer.secho(f"\n{message}", err=True, fg=typer.colors.YELLOW)
        raise typer.Exit(Status.INTERRUPTED) from None


@contextlib.contextmanager
def _only_json(as_json: bool) -> Generator[None]:
    """What a task or a library prints goes to standard error while standard output belongs to the JSON."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2, allow_nan=False))


if __name__ == "__main__":
    main()
