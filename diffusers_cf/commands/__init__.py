"""The commands of `diffusers-cf`, one module each."""
