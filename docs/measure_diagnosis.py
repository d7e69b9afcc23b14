"""The figures under "Measured" in docs/diagnosis.md: bugs planted in diffusers by the tests' plants, and diagnosed.

OMP_NUM_THREADS=2 python docs/measure_diagnosis.py port
OMP_NUM_THREADS=1 python docs/measure_diagnosis.py stacks --count 100 --seed 11
OMP_NUM_THREADS=1 python docs/measure_diagnosis.py inside --count 40 --seed 12
OMP_NUM_THREADS=1 python docs/measure_diagnosis.py clean --count 60
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
torch.set_grad_enabled(False)
threads = torch.get_num_threads()

import test_diagnose as tests  # noqa: E402 - it sets one thread

from svdlab.parity.bugs import BUGS  # noqa: E402
from svdlab.parity.trace import Trace  # noqa: E402
from svdlab.samples import sample_photo  # noqa: E402
from svdlab.svd.checkpoint import checkpoint_path  # noqa: E402
from svdlab.svd.random_checkpoint import write_random_checkpoint  # noqa: E402
from svdlab.svd.settings import GenerationSettings  # noqa: E402

torch.set_num_threads(threads)


def port() -> None:
    """All of it, without taps, the frames alone, one prediction alone; with the command's limit of time."""
    _port(checkpoint_path("embedded"), tests.SETTINGS.replace(num_frames=8, num_inference_steps=4), whole_only=False)


def others() -> None:
    """The port's bugs with every tap on two other checkpoints: deeper, and with another VAE."""
    down, up = "CrossAttnDownBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"
    deep = dict(
        block_out_channels=(32, 64, 64),
        down_block_types=(down, down, "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", up, up),
        num_attention_heads=(2, 4, 8),
        layers_per_block=2,
    )
    vae = dict(block_out_channels=(64, 32), down_block_types=("DownEncoderBlock2D",) * 2)
    settings = tests.SETTINGS.replace(num_inference_steps=2, fps=12, max_guidance_scale=4.0)
    for options in ({"unet": deep, "image_encoder": dict(num_hidden_layers=3)}, {"vae": vae}):
        with tempfile.TemporaryDirectory() as folder:
            _port(write_random_checkpoint(folder, seed=31, **options), settings, whole_only=True)


def _port(folder: Path, settings: GenerationSettings, whole_only: bool) -> None:
    bench = tests.Bench(folder, sample_photo().resize((64, 64)), settings, taps=("*",))
    whole = bench.candidate(*sorted(tests.PORT, key=lambda name: list(BUGS).index(name.split(":")[0])))
    wanted = {name.split(":")[0] for name in tests.PORT}
    parts = {"every tap": tuple(whole), "no taps": whole.probes, "frames": ("frames",), "one": ("noise_pred.000",)}
    for words, names in itertools.islice(parts.items(), 1 if whole_only else None):
        candidate = Trace({n: whole[n] for n in names}, whole.settings, "port", dtype=whole.dtype)
        began = time.monotonic()
        found = bench.diagnose(candidate, seconds=None if whole_only else 40)
        seconds, named = time.monotonic() - began, set(found.named)
        print(
            f"{words}: {found.verdict}, {len(named & wanted)} of {len(wanted)} names, {len(named - wanted)} false, "
            f"wrong {', '.join(stage.stage for stage in found.wrong)}; {seconds:.0f} s on {threads} threads",
            flush=True,
        )


def stacks(count: int, seed: int, inside: bool) -> None:
    """Random stacks in different stages, or inside the UNet at 32x32, without taps."""
    settings = tests.SETTINGS.replace(height=32, width=32) if inside else tests.SETTINGS
    drawn = tests._stacks(count, range(2, 4 if inside else 9), "predict_noise" if inside else "", seed)
    with tempfile.TemporaryDirectory() as folder:
        bench = tests.Bench(write_random_checkpoint(folder), sample_photo(), settings)
        whole, false, seconds = 0, 0, []
        for stack in drawn:
            began = time.monotonic()
            try:
                named, text = tests._named(bench, stack)
            except AssertionError as error:
                named, text, false = False, f"false: {error}", false + 1
            seconds.append(time.monotonic() - began)
            whole += named
            if not named:
                print(text, flush=True)
    print(f"{whole} of {count} whole, {false} false; {sum(seconds) / count:.0f} s each, at most {max(seconds):.0f}")


def clean(count: int, seed: int) -> None:
    """svdlab itself as the candidate, in three dtypes."""
    dtypes, accused = itertools.cycle(["float32", "bfloat16", "float16"]), 0
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(folder)
        for i, change, dtype in zip(range(count), itertools.cycle(tests.CLEAN), dtypes, strict=False):
            changes = {"height": 32, "width": 32, **change, "seed": seed + i, "dtype": dtype}
            bench = tests.Bench(Path(folder), sample_photo(), tests.SETTINGS.replace(**changes))
            found = bench.diagnose(tests.capture(bench.pipe, replay=bench.reference, preprocess=True))
            accused += bool(found.wrong)
    print(f"{accused} of {count} accused")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("port", "others", "stacks", "inside", "clean"))
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=11)
    given = parser.parse_args()
    if given.what in ("port", "others"):
        {"port": port, "others": others}[given.what]()
    elif given.what == "clean":
        clean(given.count, given.seed)
    else:
        stacks(given.count, given.seed, given.what == "inside")
