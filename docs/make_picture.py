"""The README's picture: what ``svdlab parity`` measures for svdlab, and for a port that has one bug.

Run ``python docs/make_picture.py``; it writes ``docs/parity.png``.
"""

from pathlib import Path

import torch
import vl_convert

from svdlab.notebook.charts import plot_divergence
from svdlab.parity import capture
from svdlab.parity.compare import compare
from svdlab.parity.three_way import three_way
from svdlab.samples import sample_picture
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.settings import GenerationSettings

# One that the usual threshold on the frames, a mean squared error of 1e-3, misses.
BUG = "noise_aug_after_encode"

torch.set_num_threads(1)
clean = three_way("embedded", sample_picture("embedded"), GenerationSettings(num_inference_steps=4, num_frames=6))
reference, truth = clean.traces["reference"], clean.traces["truth"]
pipe = SVDPipeline.from_pretrained("embedded").with_bugs(BUG)
buggy = compare(reference, capture(pipe, replay=reference, preprocess=True), truth)
label = f"a port that noised the latents, not the pixels (mean squared error of its frames: {buggy.frames_mse:.0e})"
chart = plot_divergence(clean, buggy, label, inputs=False)
Path(__file__).with_name("parity.png").write_bytes(vl_convert.vegalite_to_png(chart.spec, scale=1.3))
