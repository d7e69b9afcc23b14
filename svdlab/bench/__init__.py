"""Timing and memory of svdlab beside diffusers: ``svdlab bench``."""

# What is timed. Here, as --help names them and waits for no torch.
CASES = ("unet", "growth", "decode", "clip", "generation", "full-generation")
