"""The command line: `lgaf` and `python -m trainer`."""

from __future__ import annotations

import json
import sys
import traceback
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.common.terminal import echo
from trainer import config_file
from trainer.cli import checkpoint as checkpoint_commands
from trainer.cli import data, network
from trainer.runtime.signals import StopRequest

# Each command imports the modules that need torch, DALI or DeepSpeed itself, so that `lgaf --help` is fast.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train face-recognition networks: LGAF on DALI, DeepSpeed and a model-parallel Partial FC.",
)
app.add_typer(data.app, name="data")
app.add_typer(checkpoint_commands.app, name="checkpoint")


def _show_version(wanted: bool) -> None:
    if wanted:
        echo(f"lgaf {version('lgaf')}")
        raise typer.Exit


def _show_keys(wanted: bool) -> None:
    if wanted:
        from trainer.config import RunConfig

        echo(config_file.help_text(RunConfig))
        raise typer.Exit


@app.callback()
def lgaf(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train face-recognition networks: LGAF on DALI, DeepSpeed and a model-parallel Partial FC."""


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="configuration file (TOML), such as configs/demo.toml")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="change one key; may be given several times"),
    ] = None,
    help_config: Annotated[
        bool,
        typer.Option(
            "--help-config", callback=_show_keys, is_eager=True, help="Show every key of the configuration."
        ),
    ] = False,
) -> None:
    """Train a network, or resume the run in the run directory.

    Works as a single process, under torchrun and under Slurm's srun, whose variables it reads.
    On SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C to any rank, all ranks save and exit with code 75: start it again.
    """
    with StopRequest() as stop:
        from trainer import entrypoints

        entrypoints.train(config, overrides or [], stop)


@app.command("eval")
def evaluate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help=network.NETWORK_HELP,
        ),
    ],
    pairs: Annotated[
        list[Path] | None,
        typer.Option("--pairs", help="verification file (.bin); may be given several times"),
    ] = None,
    suite: Annotated[
        Path | None, typer.Option(help="file of protocols (TOML), such as configs/eval/standard.toml")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="change one key of the suite, such as folder=/data"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="folder for results.json, report.html and plots; by default eval_SUITE"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images embedded at once, per rank")] = 64,
) -> None:
    """Evaluate a trained network with a suite of protocols, or on pairs of faces (flip test, ten folds).

    With --suite, it writes a folder of results and prints tables. With --pairs, it prints JSON and
    writes a folder only with --out. Works as a single process, under torchrun and under Slurm's srun.
    """
    from trainer import entrypoints
    from trainer.evaluation.suite import SuiteConfig, suite_of_pairs
    from trainer.report.tables import show

    if (suite is None) == (not pairs):
        raise ValueError(f"expected --suite or --pairs, found {'neither' if suite is None else 'both'}")
    if suite is None and overrides:
        raise ValueError("--set changes keys of a suite: expected --suite, found --pairs; remove --set")
    config = (
        suite_of_pairs(pairs or [])
        if suite is None
        else config_file.load(SuiteConfig, suite, overrides or [])
    )
    name = "pairs" if suite is None else suite.stem
    folder = out or (suite and Path(f"eval_{name}"))
    results = entrypoints.evaluate(checkpoint, config, name=name, batch_size=batch_size, out=folder)
    if results is not None and suite is None:
        figures = {name: scores.figures for name, tasks in results.items() for scores in tasks.values()}
        echo(json.dumps(figures, indent=2))
    elif results is not None:
        show(results)
        echo(f"Plots and figures are in {folder}")


for _command in (network.export, network.embed, network.compare):
    app.command()(_command)


def main() -> None:
    """Run the command line; print a user's error as one line on standard error and exit with code 1."""
    for entry in entry_points(group="lgaf.commands"):
        app.command(entry.name)(entry.load())
    try:
        _run()
    except SystemExit as ended:
        if "trainer.runtime.ranks" in sys.modules and isinstance(ended.code, int | None):
            from trainer.runtime.ranks import leave

            leave(ended.code or 0)
        raise


def _run() -> None:
    try:
        app()
    except (ValueError, OSError) as error:
        echo(f"lgaf: {error}", err=True)
        sys.exit(1)
    except Exception:
        echo(traceback.format_exc().rstrip(), err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
