"""Sources of data: what a card says about them, whether their images may be shown, and under which licence."""

from collections.abc import Mapping
from typing import NamedTuple

from diffusers_cf.errors import InputError


class Source(NamedTuple):
    """A source of data.

    Attributes:
        words: what it is.
        terms: more about its licence, in words.
        may_be_passed_on: whether its images may be, and pictures of them be shown.
        licence: the one licence under which they may, by its id on the Hub; None where the source does not say it.
        medical: whether its images are known to be scans of patients, or look like some.
    """

    words: str
    terms: str = ""
    may_be_passed_on: bool = True
    licence: str | None = None
    medical: bool = True


SOURCES = {
    "phantom": Source(
        "Phantoms: the anatomy of the ICBM 2009a template, warped for each patient, with invented disease.",
        "No patient stands behind them. The template: copyright McConnell Brain Imaging Centre, Montreal Neurological"
        " Institute, McGill University; see <https://nist.mni.mcgill.ca/icbm-152-nonlinear-atlases-2009/> for its terms.",
    ),
    "decathlon": Source("Medical Segmentation Decathlon (CC-BY-SA 4.0).", licence="cc-by-sa-4.0"),
    "brats": Source(
        "BraTS, under its own terms: the scans are not passed on.",
        "The scans are to be had from the organisers, under their terms.",
        may_be_passed_on=False,
    ),
}
OWN_DATA = Source("Data of the publisher's own.", medical=False)


def source_of(facts: Mapping) -> Source:
    """The source that preprocessing.json of a data set or model names; the publisher's own data, where it is unknown."""
    name = facts.get("source")
    return SOURCES.get(name, OWN_DATA) if isinstance(name, str) else OWN_DATA


def licence_of_data(where: str, facts: Mapping, given: str | None) -> str | None:
    """The licence of the data, by its id on the Hub: what the source says, else what is given.

    Raises:
        InputError: they contradict each other; the message is about `where`.
    """
    source = source_of(facts)
    if source.licence and given not in (None, source.licence):
        raise InputError(f"{where}: {source.words} Its licence is {source.licence} for copies too, not {given}")
    return given or source.licence
