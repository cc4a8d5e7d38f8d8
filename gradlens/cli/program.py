"""The program: its commands, and how errors in them become one line and an exit status."""

import sys
import warnings
from typing import Annotated

import typer
import typer.core

from gradlens.cli.custody import prune, seal, share
from gradlens.cli.detect import detect
from gradlens.cli.ingest import ingest
from gradlens.cli.inspect import inspect
from gradlens.cli.installation import EXTRA_OF, doctor, list_names
from gradlens.cli.investigate import investigate
from gradlens.cli.localize import localize
from gradlens.cli.notebook import notebook
from gradlens.cli.output import safe, say
from gradlens.cli.replay import replay
from gradlens.cli.report import report
from gradlens.cli.simulate import demo, simulate
from gradlens.cli.verify import verify
from gradlens.errors import InputError, Stopped
from gradlens.interruption import stoppable

UsageFault: type[Exception] = typer.BadParameter.__mro__[2]  # the base class of all usage errors

typer.core.HAS_RICH = False  # with Rich, help pages print "\[required]" and take a third of a second longer

app = typer.Typer(
    help="Finds the clients that poison a federated model, and shows where they gave themselves away.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command, example in (
    (demo, "gradlens demo --workers 2"),
    (simulate, "gradlens simulate scenario.toml -o runs/first --set seed=3 --set rounds=10"),
    (inspect, "gradlens inspect runs/demo/0a1b2c3d4e5f"),
    (investigate, "gradlens investigate runs/demo/0a1b2c3d4e5f -o case.html"),
    (detect, "gradlens detect runs/demo/0a1b2c3d4e5f -d final_bias -d layer_norms --csv"),
    (localize, "gradlens localize runs/demo --csv > localized.csv"),
    (report, "gradlens report runs/demo -o reports/demo.html"),
    (notebook, "gradlens notebook runs/demo/0a1b2c3d4e5f -o first.ipynb"),
    (replay, "gradlens replay runs/demo/0a1b2c3d4e5f -d panel --clean-rounds 10 --fpr 0.02"),
    (verify, "gradlens verify runs/demo/0a1b2c3d4e5f --head 5d41402a..."),
    (seal, "gradlens seal runs/first --key examiner.pem"),
    (share, "gradlens share runs/first -o copies/first --names names.csv"),
    (prune, "gradlens prune runs/first --keep sketch --yes"),
    (ingest, "gradlens ingest checkpoints -o runs/first --pattern 'round_{round}/client_{client}'"),
    (doctor, "gradlens doctor"),
):
    app.command(epilog=f"Example: {example}")(command)
app.command("list", epilog="Example: gradlens list detectors")(list_names)


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Prints the version, or the help page if no command is given."""
    if version:
        from gradlens import __version__

        say(f"gradlens {__version__}")
    elif context.invoked_subcommand is None:
        say(*context.get_help().splitlines())


options.__doc__ = app.info.help


def main() -> None:
    """Runs the command line and exits with its status; an error is one line on standard error."""
    warnings.showwarning = _warn
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(_status())


def _status() -> int:
    """Runs the command and returns its exit status."""
    try:
        with stoppable():
            status = app(standalone_mode=False)
    except InputError as error:
        return _fail(str(error))
    except UsageFault as error:
        return _fail(str(error.format_message()), " (gradlens --help shows what there is)")  # type: ignore[attr-defined]
    except ModuleNotFoundError as error:
        return _fail(_missing(error))
    except Stopped as error:
        _fail(f"interrupted; {error.left}")
        return 128 + error.args[0]
    except BrokenPipeError:  # whoever reads the output has closed it, as `head` does
        sys.stderr.close()
        return 0
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except MemoryError:
        return _fail("memory ran out; fewer workers need less")
    return status if isinstance(status, int) else 0


def _missing(error: ModuleNotFoundError) -> str:
    name = (error.name or "").partition(".")[0]
    extra = EXTRA_OF.get(name)
    install = f": pip install 'gradlens-forensics[{extra}]'" if extra else ""
    return f"this needs the package {name}, which is not installed{install}"


def _fail(message: str, hint: str = "") -> int:
    print(f"gradlens: {safe(' '.join(message.split()))}{hint}", file=sys.stderr)
    return 2


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(f"gradlens: warning: {safe(' '.join(str(message).split()))}", file=sys.stderr)
