"""Gaussian data, for which the best prediction of the noise has a closed form."""

import torch


STD = 0.2  # the data lie well inside [-1, 1], where normalisation changes nothing
ALPHAS = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)  # the noise schedule, written out


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact_epsilon(sample, timestep):
    """The best prediction of the noise in a sample of N(0, STD^2) data at a timestep."""
    alpha = ALPHAS[int(timestep)].to(sample.dtype)
    return (1 - alpha).sqrt() * sample / (alpha * STD**2 + 1 - alpha)
