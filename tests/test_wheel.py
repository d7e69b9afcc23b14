"""What pip installs outside a clone: the package, the checkpoint and the notebooks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from svdlab.report.shipped import shipped_notebooks

ROOT = Path(__file__).parent.parent
# What a build reads, and none of what earlier ones left.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "svdlab", "notebooks", "docs")
CHECK = """
from svdlab import SVDPipeline
import svdlab
assert svdlab.__file__.startswith({target!r}), svdlab.__file__
SVDPipeline.from_pretrained("embedded")
"""


def test_a_wheel_carries_checkpoint_and_notebooks(tmp_path: Path) -> None:
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    target, work = tmp_path / "installed", tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def run(*arguments: str) -> str:
        done = subprocess.run([sys.executable, *arguments], cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(tmp_path))
    run("-c", CHECK.format(target=str(target)))
    command = "from svdlab.cli import main; main()"
    run("-c", command, "notebooks", "copies")
    for kind in ("*.py", "*.js", "*.css"):
        files = {str(p.relative_to(ROOT)) for p in (ROOT / "svdlab").rglob(kind)}
        assert {str(p.relative_to(target)) for p in (target / "svdlab").rglob(kind)} == files != set()
    assert {p.name for p in (target / "svdlab/writers").iterdir()} == {
        p.name for p in (ROOT / "docs/writers").iterdir()
    }
    copies = sorted((work / "copies").iterdir())
    originals = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert [p.read_bytes() for p in copies] == [p.read_bytes() for p in originals] != []
    assert [p.name for p in copies] == [p.name for p in originals] == [p.name for p in shipped_notebooks()]
