"""The page of `diffusers-cf app`: one `Explorer` and one temporary folder per browser session."""
