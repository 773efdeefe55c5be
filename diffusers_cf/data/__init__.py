"""Data: the slice data set, the strict NIfTI reader, and one module per source of images."""

from diffusers_cf.data.arrays import ArraysSource
from diffusers_cf.data.brats import BratsSource
from diffusers_cf.data.decathlon import DecathlonSource
from diffusers_cf.data.folder import FolderSource
from diffusers_cf.data.phantom import PhantomSource
from diffusers_cf.data.slices import PatientSlices, SliceDataset


SOURCES = {
    "phantom": PhantomSource,
    "brats": BratsSource,
    "decathlon": DecathlonSource,
    "arrays": ArraysSource,
    "folder": FolderSource,
}

__all__ = [
    "SOURCES",
    "ArraysSource",
    "BratsSource",
    "DecathlonSource",
    "FolderSource",
    "PatientSlices",
    "PhantomSource",
    "SliceDataset",
]
