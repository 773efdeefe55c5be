"""A patient's scans, the mask that a threshold makes, and the preview."""

import nibabel as nib
import numpy as np
import pytest
from data_files import SPACING_MM, brain, write_brats
from matplotlib import colors
from PIL import Image
from segmentation_files import make_pipe, voxels

from diffusers_cf.data.geometry import display, to_ras, undisplay
from diffusers_cf.data.slices import PatientSlices
from diffusers_cf.evaluation.postprocessing import PostProcessing, remove_small_components
from diffusers_cf.plots import EXPERT, FOUND, plot_cohort, plot_slices
from diffusers_cf.segmentation import volumes as volumes_module
from diffusers_cf.segmentation.patient import segment_patient
from diffusers_cf.segmentation.volumes import (
    PatientVolumes,
    SliceMaps,
    heat_volume,
    lesion_mask,
    most_suspicious,
    read_volumes,
)


@pytest.mark.parametrize("voxels_per_pixel", [1, 2])
def test_the_mask_is_that_of_the_postprocessing_of_evaluation(voxels_per_pixel):
    rng = np.random.default_rng(0)
    images = rng.uniform(0.2, 1, (6, 1, 40, 40)).astype(np.float32)
    images[:, :, :4] = 0
    heat = np.zeros((6, 40, 40), dtype=np.float32)
    heat[1:4, 10:20, 10:20] = heat[4:, 30:34, 30:34] = heat[:, 2:8, 20:30] = 1
    scan = undisplay(images[:, 0].repeat(voxels_per_pixel, 1).repeat(voxels_per_pixel, 2))
    spacing_mm = np.array([6.0 / voxels_per_pixel, 6.0 / voxels_per_pixel, 3.0])
    volumes = PatientVolumes("P", scan[None], None, spacing_mm, {})
    maps = SliceMaps(PatientSlices("P", images, np.zeros(6), np.arange(6)), heat, 0 * images)
    config = {"preprocessing": {"size": 40, "field_mm": 240.0}, "threshold": 0.5, "postprocessed": True}
    mask = lesion_mask(volumes, maps, heat_volume(volumes, maps, heat, 240.0), config)
    expected = remove_small_components(PostProcessing().apply(heat, images) >= 0.5)
    # the filter leaves 2 slices of 2 x 2 of the small block, which is too small a component
    assert expected[2, 15, 15] and not expected[4:, 30:34, 30:34].any()
    expected = expected.repeat(voxels_per_pixel, 1).repeat(voxels_per_pixel, 2)
    # on a finer grid the outline is smooth, so corners may differ
    assert (display(mask) != expected).sum() <= (0 if voxels_per_pixel == 1 else 0.03 * expected.sum())
    assert not display(mask)[4:, 30 * voxels_per_pixel :].any()


def test_one_slice_is_as_bright_as_it_is_in_its_patient():
    images = np.random.default_rng(0).normal(1, 0.1, (6, 1, 16, 16)).clip(0.1).astype(np.float32)
    images[1] += 1.0  # bright throughout: a slice alone would be its own measure
    volumes = PatientVolumes("P", undisplay(images[:, 0])[None], None, np.array([15.0, 15.0, 3.0]), {})
    chain = PostProcessing(1, clear_rim=False, bright_channel=0)
    config = {"preprocessing": {"size": 16, "field_mm": 240.0}, "threshold": 0.3, "postprocessed": chain.as_setting}

    def mask_of(rows, patient=None):
        found = PatientSlices("P", images[rows], np.zeros(len(rows)), np.arange(len(rows)))
        part = PatientVolumes("P", volumes.volume[..., rows], None, volumes.spacing_mm, {})
        heat = np.ones((len(rows), 16, 16), np.float32)
        heat_of_volume = heat_volume(part, SliceMaps(found, heat, None), heat, 240.0)
        return display(lesion_mask(part, SliceMaps(found, heat, None), heat_of_volume, config, patient))

    whole = mask_of([*range(6)])
    assert whole[0].mean() < 0.2 and whole[1].mean() > 0.6
    np.testing.assert_array_equal(mask_of([1], images), whole[1:2])
    assert mask_of([1]).mean() < 0.2


def test_ids_are_rounded_as_in_preparing_a_data_set(tmp_path):
    patient = write_brats(tmp_path, "P_01")
    files = {name: patient / f"P_01_{name}.nii.gz" for name in ("flair", "seg")}
    stored = nib.load(files["seg"])
    # what a header's scaling and resampling leave: 1e-4 is the id 0, 0.9999 the id 1
    noisy = np.where(stored.get_fdata() > 0, 0.9999, 1e-4).astype(np.float32)
    nib.save(nib.Nifti1Image(noisy, stored.affine), files["seg"])
    np.testing.assert_array_equal(read_volumes("P_01", files).seg, brain(0)[1] > 0)


def test_preview(tmp_path, monkeypatch):
    drawn, patient = {}, write_brats(tmp_path / "data", "P_01", "LPS")

    def plot(*args, **options):
        drawn.update(options, images=args[1:4])
        plot_slices(*args, **options)

    monkeypatch.setattr(volumes_module, "plot_slices", plot)
    segment_patient(make_pipe(), patient, tmp_path / "out", progress=False)
    with Image.open(tmp_path / "out" / "P_01" / "preview.png") as picture:
        assert picture.format == "PNG" and picture.height > 6 * 100
    images, counterfactuals, heatmaps = drawn["images"]
    outside = (images == 0).all(axis=1)
    assert not heatmaps[outside].any() and not counterfactuals.swapaxes(0, 1)[:, outside].any()
    affine = nib.load(patient / "P_01_seg.nii.gz").affine
    seg = to_ras(voxels(patient / "P_01_seg.nii.gz"), affine)
    mask = to_ras(voxels(tmp_path / "out" / "P_01" / "mask.nii.gz"), affine)
    rows = [int(name.split()[-1]) for name in drawn["row_names"]]
    areas = mask.sum(axis=(0, 1))
    assert areas[rows[0]] >= 0.9 * areas.max()
    voxel_pixels = SPACING_MM[0] * SPACING_MM[1] / (240 / 128) ** 2
    for name, volume in (("masks", mask), ("references", seg)):
        expected = volume[..., rows].sum(axis=(0, 1)) * voxel_pixels
        np.testing.assert_allclose(drawn[name].sum(axis=(1, 2)), expected, rtol=0.1, atol=10)


@pytest.mark.parametrize(("convention", "left", "right"), [("radiological", "R", "L"), ("neurological", "L", "R")])
def test_pictures_show_and_name_the_patients_sides(tmp_path, monkeypatch, convention, left, right):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    images = np.zeros((2, 1, 8, 8))
    images[..., 2:4, 1:3] = 1  # at the patient's left
    maps = {"masks": images[:, 0], "references": images[:, 0]}
    plot_slices(tmp_path / "picture.png", images, images, images[:, 0], **maps, convention=convention)
    *pictures, _ = figures[0].axes  # the last one is the colour bar
    assert len(pictures) == 8 and f"{convention}: " in figures[0].get_suptitle()
    for axes in pictures:
        assert axes.get_xlim()[0] < axes.get_xlim()[1]
        places = {text.get_text(): text.get_position()[0] for text in axes.texts}
        assert places.keys() == {"L", "R"} and places[left] < 0.1 and places[right] > 0.9
        for picture in axes.images:
            assert (picture.get_array()[2, :4].any(), picture.get_array()[2, 4:].any()) == (left == "L", left == "R")
    outlines = {colors.to_hex(lines.get_edgecolor()[0]): lines for lines in pictures[3].collections}
    assert outlines.keys() == {FOUND.lower(), EXPERT.lower()}
    assert all((lines.get_paths()[0].vertices[:, 0].mean() < 4) == (left == "L") for lines in outlines.values())


def test_a_cohort_is_drawn_largest_lesion_first(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    plot_cohort(tmp_path / "c.png", ["a", "b", "c"], [1.0, 3.0, 2.0], {"Dice": [0.1, None, 0.2], "AUPRC": [None] * 3})
    volumes, scores = figures[0].axes
    assert [bar.get_height() for bar in volumes.patches] == [3, 2, 1]
    assert [label.get_text() for label in scores.get_xticklabels()] == ["b", "c", "a"]
    (dots,) = scores.lines
    np.testing.assert_array_equal(dots.get_ydata(), [np.nan, 0.2, 0.1])


def test_the_preview_shows_the_most_suspicious_slices_at_a_distance():
    heatmaps, masks = np.zeros((60, 4, 4)), np.zeros((60, 4, 4))
    heatmaps[20:26] = 1  # heat alone counts less than any mask
    masks[40, :2], masks[41, :3], masks[50, 0, 0] = 1, 1, 1
    assert most_suspicious(heatmaps, masks, count=3) == [41, 50, 25]  # 40 is too near to 41
    assert most_suspicious(heatmaps[:2], masks[:2], count=3) == [1, 0]
