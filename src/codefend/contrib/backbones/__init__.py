"""Diffusion models of `diffusers` as purifiers, and their fine-tuning on pairs."""
