"""Timing and memory of svdlab beside diffusers: ``svdlab bench``."""
