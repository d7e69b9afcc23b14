"""svdlab: a workbench for Stable Video Diffusion parity."""
