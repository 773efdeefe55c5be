"""Look for the same person in two slice data sets: the best match of any slice pair of each pair of patients.

    python benchmarks/overlap.py MSD.npz TCGA.npz --output overlap.json

Both are files for `prepare --source arrays` with FLAIR first. A match is the highest normalised cross-correlation of
two high-pass filtered slices over all shifts, in-plane rotations of 0, +-5 and +-10 degrees, and mirroring. Images of
one person agree in their folds; images of two people agree in the outline alone, which the filter removes.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from diffusers_cf.arguments import ArgumentParser, run_command
from diffusers_cf.files import write_json
from diffusers_cf.provenance import command_line, package_commit


SIDE, BLUR = 64, 2.0  # pixels of the compared images, and of the low-pass filter that is taken off
ANGLES, SLICES_OF_FIRST = (-10, -5, 0, 5, 10), 4


def high_pass(images: np.ndarray) -> torch.Tensor:
    """Return slices `(N, 128, 128)` at 64 x 64 pixels without their low frequencies and outline, of unit norm."""
    small = images.reshape(len(images), SIDE, 2, SIDE, 2).mean(axis=(2, 4), dtype=np.float32)
    inside = ndimage.binary_erosion(small > 0, np.ones((1, 5, 5)))
    share = ndimage.gaussian_filter(inside.astype(np.float32), (0, BLUR, BLUR))
    mean = ndimage.gaussian_filter(small * inside, (0, BLUR, BLUR)) / np.maximum(share, 1e-3)
    fine = np.where(inside, small - mean, 0)
    fine /= np.maximum(np.sqrt((fine**2).sum(axis=(1, 2), keepdims=True)), 1e-6)
    return torch.from_numpy(fine.astype(np.float32))


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """Return `count` rows evenly spread over the middle half of a patient's slices."""
    return rows[np.linspace(len(rows) / 4, 3 * len(rows) / 4, count).astype(int)]


def best_matches(first: dict, second: dict) -> dict[str, dict[str, float]]:
    """Return the best match of each patient of `second` with each of `first`."""
    spectra = torch.fft.rfft2(high_pass(second["images"][:, 0]))
    found = {}
    for patient in np.unique(first["patient"]):
        chosen = spread(np.flatnonzero(first["patient"] == patient), SLICES_OF_FIRST)
        best = torch.zeros(len(spectra))
        for angle, mirrored in itertools.product(ANGLES, (False, True)):
            turned = ndimage.rotate(first["images"][chosen, 0], angle, (1, 2), reshape=False, order=1)
            for image in torch.fft.rfft2(high_pass(turned[..., ::-1] if mirrored else turned)):
                best = torch.maximum(best, torch.fft.irfft2(spectra * image.conj()).amax(dim=(1, 2)))
        found[str(patient)] = {str(o): best[second["patient"] == o].max().item() for o in np.unique(second["patient"])}
    return found


def main(args: argparse.Namespace) -> None:
    """Write every pair's match, and the pairs that stand out among those of both their patients."""
    first, second = (dict(np.load(path)) for path in args.files)
    matches = best_matches(first, second)
    table = np.array([list(row.values()) for row in matches.values()])
    names = list(matches), list(next(iter(matches.values())))
    centred = table - np.median(table, axis=0) - np.median(table, axis=1, keepdims=True) + np.median(table)
    z = centred / (1.4826 * np.median(np.abs(centred)))
    order = np.argsort(z, axis=None)[::-1][:10]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, z.shape), strict=True)]
    top = [{"pair": [names[0][i], names[1][j]], "match": float(table[i, j]), "z": float(z[i, j])} for i, j in pairs]
    write_json(
        {"command": command_line(), "commit": package_commit(), "top": top, "matches": matches}, Path(args.output)
    )
    print("\n".join(f"{' '.join(row['pair'])}: {row['match']:.3f}, z {row['z']:.1f}" for row in top))


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs=2, metavar="FILE.npz", help="two files of slices")
    parser.add_argument("--output", required=True, metavar="RESULT.json", help="file for the matches")
    raise SystemExit(run_command(lambda: main(parser.parse_args())))
