"""The command line: ``svdlab COMMAND``. Exit 0 is fine, 1 means that the answer is no, 2 bad input.

One file per group of commands, and nothing but argument handling in them.
"""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

import click

from svdlab.errors import EXTRA_OF, SvdlabError, not_installed

# Where a command is defined, so that asking for one does not import the others.
_COMMANDS = {
    "generate": "svdlab.cli.generate",
    "parity": "svdlab.cli.parity",
    "trace": "svdlab.cli.parity",
    "compare": "svdlab.cli.parity",
    "diagnose": "svdlab.cli.parity",
    "report": "svdlab.cli.report",
    "sweep": "svdlab.cli.sweep",
    "sweep-compare": "svdlab.cli.sweep",
    "memory": "svdlab.cli.memory",
    "bench": "svdlab.cli.bench",
    "train-tiny": "svdlab.cli.training",
    "evaluate": "svdlab.cli.training",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        return getattr(importlib.import_module(_COMMANDS[cmd_name]), cmd_name.replace("-", "_"))


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
