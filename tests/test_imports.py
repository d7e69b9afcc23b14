"""What imports what: the contract of pyproject.toml, and that a library user loads only what is used."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import run
from importlinter.cli import lint_imports

import svdlab
from svdlab.errors import SvdlabError, not_installed, requires

ROOT = Path(__file__).parent.parent
HEAVY = "torch click rich diffusers transformers matplotlib IPython ipywidgets papermill pandas pyarrow distributed"


def imported(script: str) -> set[str]:
    """The heavy packages that a process has imported after a script."""
    script += f"\nimport sys; print(*sorted(set({HEAVY!r}.split()) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_import_contract_holds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    failed = lint_imports(config_filename="pyproject.toml", no_cache=True)
    assert not failed, capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "allowed"),
    [
        ("import svdlab", ""),
        ("import svdlab.svd, svdlab.parity, svdlab.samples", ""),
        ("from svdlab import GenerationSettings; GenerationSettings(fps=9)", ""),
        ("import svdlab.cli", "click"),
        ("import svdlab.svd.pipeline", "torch"),
        ("from svdlab import SVDPipeline, GenerationSettings, Trace", "torch"),
        ("import svdlab.parity.compare, svdlab.parity.diagnose", "torch"),
    ],
)
def test_an_import_is_light(script: str, allowed: str) -> None:
    assert imported(script) <= set(allowed.split())


def test_no_help_waits_for_torch() -> None:
    """In one process: what any command's help imports stays imported."""
    script = f"""
import contextlib, io, sys
from svdlab.cli import commands
for name in [None, *commands.list_commands(None)]:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        commands([*([name] if name else []), "--help"], standalone_mode=False, obj={{}})
    assert shown.getvalue().startswith("Usage:"), name
    heavy = {{*{HEAVY!r}.split(), "numpy", "PIL", "av"}} & set(sys.modules)
    assert heavy == {{"click"}}, (name, heavy)
"""
    assert imported(script) == {"click"}


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["nothing", "a count", "a policy"],
)
def test_threads_that_wait_soon_sleep_unless_one_says_otherwise(given: dict[str, str], spins: str | None) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    script = "import svdlab, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**environment, **given})
    assert done.stdout.strip() == str(spins), done.stderr


def test_the_names_of_the_package() -> None:
    from svdlab.parity.trace import Trace
    from svdlab.svd.pipeline import SVDPipeline
    from svdlab.svd.settings import GenerationSettings

    assert (svdlab.Trace, svdlab.SVDPipeline, svdlab.GenerationSettings) == (Trace, SVDPipeline, GenerationSettings)
    assert set(svdlab.__all__) <= set(dir(svdlab))
    with pytest.raises(AttributeError, match="module 'svdlab' has no attribute 'Pipeline'"):
        svdlab.Pipeline  # noqa: B018


def test_what_is_not_installed_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    requires("pandas", "matplotlib")
    assert str(not_installed("dask.config")) == "dask.config is not installed; allowed: pip install 'svdlab[cluster]'"
    for module, extra, arguments in (
        ("pandas", "sweep", ["sweep", "--grid", "fps=7", "--out", "nowhere"]),
        ("distributed", "cluster", ["sweep", "--grid", "fps=7", "--out", "nowhere", "--scheduler", "tcp://x:1"]),
        (
            "matplotlib",
            "notebook",
            ["trace", "--model", "other", "--implementation", "svdlab", "--out", "t.safetensors"],
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            patch.delitem(sys.modules, "svdlab.sweep.cluster", raising=False)
            with pytest.raises(SvdlabError, match=f"{module} is not installed"):
                requires("os", module)
            code, out, err = run(capsys, patch, *arguments)
        assert code == 2 and not out
        assert err == f"error: {module} is not installed; allowed: pip install 'svdlab[{extra}]'\n"


def test_without_any_extra_clips_are_made_and_traces_compared(tmp_path: Path) -> None:
    script = """
import sys
from svdlab import cli
from svdlab.errors import EXTRA_OF

# What torch itself requires is always there.
sys.modules.update(dict.fromkeys(EXTRA_OF.keys() - {"filelock", "jinja2"}))
small = "--num-frames 2 --num-inference-steps 1 --height 32 --width 32".split()
for arguments in (
    ["trace", "--implementation", "svdlab", "--out", "t.safetensors", *small],
    ["generate", SAMPLE, "--out", "clip.mp4", *small],
    ["compare", "t.safetensors", "t.safetensors"],
    ["diagnose", "t.safetensors", "t.safetensors"],
    ["parity", *small],
):
    sys.argv = ["svdlab", *arguments]
    try:
        cli.main()
    except SystemExit as leave:
        print(arguments[0], leave.code)
"""
    sample = ROOT / "svdlab" / "checkpoint" / "sample.png"
    script = script.replace("SAMPLE", repr(str(sample)))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert {"compare 0", "diagnose 0", "parity 2"} <= set(done.stdout.splitlines()), done.stdout + done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"t.safetensors", "clip.mp4"}
    assert "error: diffusers is not installed; allowed: pip install 'svdlab[parity]'" in done.stderr


def test_colab_is_told_to_show_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    import svdlab.notebook

    calls: list[str] = []
    output = SimpleNamespace(enable_custom_widget_manager=lambda: calls.append("enabled"))
    importlib.reload(svdlab.notebook)
    assert not calls
    for name, module in {
        "google": SimpleNamespace(),
        "google.colab": SimpleNamespace(),
        "google.colab.output": output,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    importlib.reload(svdlab.notebook)
    assert calls == ["enabled"]


def test_charts_do_without_a_grammar_that_takes_a_second_to_make() -> None:
    script = """
import sys, svdlab.notebook.charts
assert "jsonschema" in sys.modules and "rfc3987_syntax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
