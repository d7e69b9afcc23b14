"""The command line: ``svdlab COMMAND``.

Exit codes, which are given here and nowhere else but for the answer itself:

- 0: the answer is yes, or what was asked for is done;
- 1: the answer is no: a divergence, a failed notebook, a point that failed;
- 2: bad input, or an environment that cannot do it: a full disk, a missing device, too little memory; one line says so;
- 70: a bug of svdlab's own; one line, and the traceback with ``svdlab --debug COMMAND``;
- 130: interrupted.

One file per group of commands, and nothing but argument handling in them.
"""

from __future__ import annotations

import importlib
import keyword
import os
import sys
import traceback
from typing import Any, NoReturn

import click

from svdlab.errors import EXTRA_OF, SvdlabError, not_installed, printable

# Where each command is defined and what it does in a few words: neither --help nor one command imports the others.
_COMMANDS = {
    "bench": ("svdlab.cli.bench", "time svdlab against diffusers"),
    "bundle": ("svdlab.cli.bundle", "one stage or module in plain files, for a port's unit tests"),
    "compare": ("svdlab.cli.parity", "the verdict on two traces, and where they part"),
    "convert": ("svdlab.cli.convert", "a checkpoint into a single file or a folder"),
    "demo": ("svdlab.cli.demo", "a port with six bugs, diagnosed"),
    "diagnose": ("svdlab.cli.parity", "name the bugs that explain a port's trace"),
    "evaluate": ("svdlab.cli.training", "measure a checkpoint of moving shapes"),
    "frontier": ("svdlab.cli.frontier", "what speed costs: seconds against noise ratio"),
    "generate": ("svdlab.cli.generate", "one clip from one image"),
    "import": ("svdlab.cli.importing", "a port's own files into a trace"),
    "kernels": ("svdlab.cli.kernels", "which fast kernels this machine runs, and why not the others"),
    "memory": ("svdlab.cli.memory", "what a generation takes, without a GPU"),
    "notebooks": ("svdlab.cli.notebooks", "copy the notebooks into a folder"),
    "parity": ("svdlab.cli.parity", "svdlab against diffusers, measured by float64"),
    "ranges": ("svdlab.cli.ranges", "where float16, bfloat16 or float8 would overflow"),
    "report": ("svdlab.cli.report", "run the notebooks into pages"),
    "sweep": ("svdlab.cli.sweep", "a clip at every point of a grid"),
    "sweep-compare": ("svdlab.cli.sweep", "two sweeps, point by point"),
    "sweep-export": ("svdlab.cli.sweep", "a sweep's clips and heat maps as one page, or as a GIF"),
    "trace": ("svdlab.cli.parity", "every intermediate tensor in one file"),
    "train-tiny": ("svdlab.cli.training", "train the embedded checkpoint"),
    "weights": ("svdlab.cli.weights", "which weights a port loaded wrong"),
}

# What torch says, in exceptions of several types, where memory or a device is missing.
_NO_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory")
_NO_DEVICE = ("Torch not compiled with", "Found no NVIDIA driver", "No CUDA GPUs are available", "invalid device")
# Characters of an error's line.
_LONGEST = 2000
_CLOSED = SvdlabError("the output was closed before its end")


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _ = _COMMANDS[cmd_name]
        name = cmd_name.replace("-", "_") + "_" * keyword.iskeyword(cmd_name)
        return getattr(importlib.import_module(module), name)

    def invoke(self, ctx: click.Context) -> Any:
        """Where the output is closed early, click and rich leave with 1, which means "no" here."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _CLOSED from None
        except SystemExit as leave:
            raise _CLOSED if isinstance(leave.__context__, BrokenPipeError) else leave from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in _COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="svdlab")
@click.option("--debug", is_flag=True, help="Print the traceback of an error, too.")
@click.pass_obj
def commands(flags: dict[str, bool], debug: bool) -> None:
    """Stable Video Diffusion, its parity with diffusers, and what explains a difference."""
    flags["debug"] = debug


def main() -> None:
    """The console script."""
    flags = {"debug": False}
    try:
        try:
            commands(standalone_mode=False, obj=flags)
        finally:
            _flush()
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _leave(130, "interrupted")
    except Exception as error:
        if flags["debug"]:
            traceback.print_exc()
        if isinstance(error, SvdlabError):
            _leave(2, f"error: {error}")
        if reason := _environment(error):
            _leave(2, f"error: {reason}")
        _leave(
            70,
            f"svdlab: internal error: {type(error).__name__}: {error} "
            f"({'' if flags['debug'] else 'run again with svdlab --debug for the traceback, and '}please report it)",
        )


def _flush() -> None:
    """Write what is printed so far: a full disk or a closed pipe behind it shows here, not after the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        # Else Python tries it once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _environment(error: BaseException) -> str:
    """What the machine lacks, where an exception says that; else the empty text."""
    text = str(error)
    if isinstance(error, ModuleNotFoundError):
        known = (error.name or "").partition(".")[0] in EXTRA_OF
        return str(not_installed(error.name or "")) if known else ""
    if isinstance(error, BrokenPipeError):
        return str(_CLOSED)
    if isinstance(error, OSError):
        return ": ".join(str(part) for part in (error.filename, error.strerror or text) if part)
    # torch and safetensors say with other types that memory, a device or the disk is missing.
    kind = type(error).__name__
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or any(sign in text for sign in _NO_MEMORY):
        return f"out of memory ({text or kind})"
    if any(sign in text for sign in _NO_DEVICE):
        return f"the device cannot be used ({text})"
    if kind == "SafetensorError" and "(os error " in text:
        return text
    return ""


def _leave(code: int, text: str) -> NoReturn:
    """One printable line on standard error, also where names from a file are in it, and the exit code."""
    line = printable(" ".join(text.split()))
    click.echo(line if len(line) <= _LONGEST else f"{line[:_LONGEST]}...", err=True)
    sys.exit(code)
