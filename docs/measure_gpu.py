"""Everything that docs/performance.md says of a GPU, in about ten minutes on one that is lent or rented.

python docs/measure_gpu.py --out gpu.json
python docs/make_performance.py --gpu gpu.json

Each part is in the file as soon as it is done, or its error in its place, so that a GPU that is taken away leaves what
was measured; run again, it goes on with what is missing. ``--quick`` runs all of it at tiny sizes on any device, and
measures nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from svdlab.bench.cases import Bench, Plan
from svdlab.bench.timing import gemm_throughput, machine
from svdlab.files import write_json
from svdlab.parity.three_way import three_way
from svdlab.samples import sample_picture
from svdlab.svd.memory import GIB, simulate
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.workloads import unet_inputs

DTYPES = ("float32", "float16", "bfloat16")
FRAMES = (14, 25)  # of svd and svd_xt
SMALL = {"height": 32, "width": 32}
Rows = list[dict[str, Any]]


class Measurement:
    """The parts, each a method that gives rows for the file.

    Args:
        device: where.
        quick: tiny networks and sizes.
    """

    def __init__(self, device: str, quick: bool):
        self.device, self.quick = device, quick

    def parts(self) -> dict[str, Callable[[], Rows]]:
        """What would be missed most comes first."""
        return {
            "parity": self.parity,
            "full_size_parity": self.full_size_parity,
            "generation": functools.partial(self.generation, FRAMES, compile=False),
            "step": self.step,
            "kernels": self.kernels,
            "generation_compiled": functools.partial(self.generation, FRAMES[:1], compile=True),
        }

    def parity(self) -> Rows:
        """svdlab against diffusers on the embedded checkpoint, measured by float64."""
        size = {**SMALL, "num_inference_steps": 1, "num_frames": 2} if self.quick else {"num_inference_steps": 25}
        rows = []
        for dtype in DTYPES:
            settings = GenerationSettings(dtype=dtype, **size)
            found = three_way("embedded", sample_picture("embedded"), settings, device=self.device)
            rows.append({"dtype": dtype, "verdict": found.verdict, "ratio": found.worst.ratio, "at": found.worst.name})
        return rows

    def full_size_parity(self) -> Rows:
        """One pass of the published UNet with random weights: its distance from float64 over diffusers' own."""
        rows = []
        for dtype in DTYPES:
            runner = self._bench()  # float64 is made of its networks, which nobody else may get then
            settings = runner.settings("unet", dtype, **({} if self.quick else {"height": 320, "width": 576}))
            inputs = unet_inputs(runner.configs, settings, self._random(dtype))
            own, reference = runner.networks("unet", dtype)
            with torch.no_grad():
                candidate, result = (network(*inputs).sample.double() for network in (own, reference))
                truth = reference.double()(*(tensor.double() for tensor in inputs)).sample
            floor, distance = ((x - truth).norm() / truth.norm() for x in (result, candidate))
            rows.append({"dtype": dtype, **_size(settings), "floor": float(floor), "ratio": float(distance / floor)})
        return rows

    def generation(self, frames: tuple[int, ...], compile: bool) -> Rows:
        """Whole generations in float16, both in turns, and the peak that was simulated beside the one measured."""
        runner = self._bench(compile)
        rows = []
        for number in (3,) if self.quick else frames:
            runner.given = {"num_frames": number, **(SMALL if self.quick else {})}
            settings = runner.settings("full-generation", "float16")
            row = runner.run("full-generation", "float16").to_dict(self._peak("float16"))
            simulation = simulate(runner.configs, settings, "cuda")
            names = ("image_encoder", "vae_encode", "unet_batched", "decode_exact")
            simulated = max(simulation.footprint(name).activations for name in names)
            rows.append({**row, "simulated_peak_gib": simulated / GIB})
        return rows

    def step(self) -> Rows:
        """One denoising step of the full-size UNet, eager and compiled."""
        runner = self._bench(compile=True)
        return [runner.run("unet", dtype).to_dict(self._peak(dtype)) for dtype in DTYPES]

    def kernels(self) -> Rows:
        """How many kernels a denoising step launches; on a CPU, how many operators it calls."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.startswith("cuda") else [])]
        _, _, calls = self._bench().work("unet", "float16")
        rows = []
        for name, call in calls.items():
            with torch.no_grad():
                call()  # what a first pass prepares is no part of a step
                with profile(activities=activities) as profiled:
                    call()
            place = DeviceType.CUDA if self.device.startswith("cuda") else DeviceType.CPU
            rows.append({"name": name, "kernels": sum(event.device_type == place for event in profiled.events())})
        return rows

    def _bench(self, compile: bool = False) -> Bench:
        plan = Plan.quick() if self.quick else Plan.for_device("cuda")
        return Bench(plan, "embedded", self.device, pairs=1, compile=compile, given={}, progress=not self.quick)

    @functools.cache  # noqa: B019 - there is one of it
    def _peak(self, dtype: str) -> float:
        return gemm_throughput(getattr(torch, dtype), self.device, self.quick)

    def _random(self, dtype: str) -> Callable[..., torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return lambda *shape: torch.randn(shape, generator=generator).to(self.device, getattr(torch, dtype))


def _size(settings: GenerationSettings) -> dict[str, int | None]:
    return {name: getattr(settings, name) for name in ("height", "width", "num_frames")}


def main() -> None:
    """Run what is missing in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    about = {"machine": machine(given.device), "quick": given.quick}
    found = json.loads(given.out.read_text()) if given.out.exists() else {**about, "parts": {}, "errors": {}}
    if {name: found[name] for name in about} != about:
        parser.error(f"{given.out}: measured on {found['machine']}, allowed: a file of this machine, or a new one")
    for name, part in Measurement(given.device, given.quick).parts().items():
        if name in found["parts"]:
            continue
        print(name, flush=True)
        try:
            found["parts"][name] = part()
            found["errors"].pop(name, None)
        except Exception:  # one part that fails on an unknown device must not cost the others
            found["errors"][name] = traceback.format_exc()
        write_json(str(given.out), found)
    raise SystemExit(1 if found["errors"] else 0)


if __name__ == "__main__":
    main()
