"""The README's pictures: a port beside diffusers in motion, and what ``svdlab parity`` measures of another.

Run ``python docs/make_picture.py``; it writes ``docs/clip.webp`` and ``docs/parity.png``.
"""

from pathlib import Path

import torch
import vl_convert
from PIL import Image

from svdlab.notebook.charts import plot_divergence
from svdlab.notebook.players import difference
from svdlab.parity import capture
from svdlab.parity.compare import MSE_BAR, compare
from svdlab.parity.demo import MISSED
from svdlab.parity.three_way import three_way
from svdlab.samples import sample_picture
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.video import Clip, side_by_side

# One that the usual threshold on the frames, a mean squared error of 1e-3, misses.
BUG = "noise_aug_after_encode"

SCALE = 3  # of a clip's pixels

torch.set_num_threads(1)
clean = three_way("embedded", sample_picture("embedded"), GenerationSettings(num_inference_steps=4, num_frames=6))
reference, truth = clean.traces["reference"], clean.traces["truth"]
pipe = SVDPipeline.from_pretrained("embedded").with_bugs(BUG)
buggy = compare(reference, capture(pipe, replay=reference, preprocess=True), truth)
label = f"a port that noised the latents, not the pixels (mean squared error of its frames: {buggy.frames_mse:.0e})"
chart = plot_divergence(clean, buggy, label, inputs=False)
Path(__file__).with_name("parity.png").write_bytes(vl_convert.vegalite_to_png(chart.spec, scale=1.3))

# Several at once: the sum of what each of them does is below the usual threshold, too.
settings = GenerationSettings(num_inference_steps=25)
clean = three_way("embedded", sample_picture("embedded"), settings)
reference = clean.traces["reference"]
port = capture(SVDPipeline.from_pretrained("embedded").with_bugs(*MISSED), replay=reference, preprocess=True)
error = compare(reference, port, clean.traces["truth"]).frames_mse
assert error < MSE_BAR, error
right, wrong = (trace["frames"][0] for trace in (reference, port))
title, apart = difference(right, wrong, wrong)
clip = side_by_side([Clip.from_tensor(frames, settings.fps) for frames in (right, wrong, apart)])
first, *rest = (
    image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.NEAREST) for image in clip.to_pil()
)
options = {"save_all": True, "append_images": rest, "loop": 0, "duration": round(1000 / clip.fps), "lossless": True}
first.save(Path(__file__).with_name("clip.webp"), **options)
print(f"clip.webp: diffusers, a port with {', '.join(MISSED)} (mean squared error {error:.1e}), {title}")
