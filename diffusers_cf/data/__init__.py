"""Data: the slice data set, the NIfTI reader, and the sources of images."""

from diffusers_cf.data.arrays import ArraysSource
from diffusers_cf.data.folder import FolderSource
from diffusers_cf.data.phantom import PhantomSource
from diffusers_cf.data.scans import BratsSource, DecathlonSource
from diffusers_cf.data.slices import PatientSlices, SliceDataset
from diffusers_cf.data.source import Source


SOURCES = {source.name: source for source in (PhantomSource, BratsSource, DecathlonSource, ArraysSource, FolderSource)}

__all__ = [
    "SOURCES",
    "ArraysSource",
    "BratsSource",
    "DecathlonSource",
    "FolderSource",
    "PatientSlices",
    "PhantomSource",
    "SliceDataset",
    "Source",
]
