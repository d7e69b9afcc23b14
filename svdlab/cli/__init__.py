"""The command line: ``svdlab COMMAND``. Exit 0 is fine, 1 means that the answer is no, 2 bad input.

One file per group of commands, and nothing but argument handling in them.
"""

from __future__ import annotations

import importlib
import keyword
import sys
from typing import NoReturn

import click

from svdlab.errors import EXTRA_OF, SvdlabError, not_installed

# Where each command is defined and what it does in a few words: neither --help nor one command imports the others.
_COMMANDS = {
    "bench": ("svdlab.cli.bench", "time svdlab against diffusers"),
    "bundle": ("svdlab.cli.bundle", "one stage or module in plain files, for a port's unit tests"),
    "compare": ("svdlab.cli.parity", "the verdict on two traces, and where they part"),
    "demo": ("svdlab.cli.demo", "a port with six bugs, diagnosed"),
    "diagnose": ("svdlab.cli.parity", "name the bugs that explain a port's trace"),
    "evaluate": ("svdlab.cli.training", "measure a checkpoint of moving shapes"),
    "generate": ("svdlab.cli.generate", "one clip from one image"),
    "import": ("svdlab.cli.importing", "a port's own files into a trace"),
    "kernels": ("svdlab.cli.kernels", "which fast kernels this machine runs, and why not the others"),
    "memory": ("svdlab.cli.memory", "what a generation takes, without a GPU"),
    "parity": ("svdlab.cli.parity", "svdlab against diffusers, measured by float64"),
    "ranges": ("svdlab.cli.ranges", "where float16, bfloat16 or float8 would overflow"),
    "report": ("svdlab.cli.report", "run the notebooks into pages"),
    "sweep": ("svdlab.cli.sweep", "a clip at every point of a grid"),
    "sweep-compare": ("svdlab.cli.sweep", "two sweeps, point by point"),
    "trace": ("svdlab.cli.parity", "every intermediate tensor in one file"),
    "train-tiny": ("svdlab.cli.training", "train the embedded checkpoint"),
    "weights": ("svdlab.cli.weights", "which weights a port loaded wrong"),
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _ = _COMMANDS[cmd_name]
        name = cmd_name.replace("-", "_") + "_" * keyword.iskeyword(cmd_name)
        return getattr(importlib.import_module(module), name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in _COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="svdlab")
def commands() -> None:
    """Stable Video Diffusion, its parity with diffusers, and what explains a difference."""


def main() -> None:
    """The console script."""
    try:
        commands(standalone_mode=False)
    except SvdlabError as error:
        _refuse(error)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA_OF:
            raise
        _refuse(not_installed(error.name or ""))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)


def _refuse(error: SvdlabError) -> NoReturn:
    click.echo(f"error: {error}", err=True)
    sys.exit(2)
