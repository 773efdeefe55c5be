"""The page of `diffusers-cf app`."""
