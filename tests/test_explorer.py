"""`Explorer`: a view computes only what changed and agrees with what `segment` writes; nothing outlasts `close`."""

import base64
import gc
import io
import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from segmentation_files import MODALITIES, SETTINGS, make_pipe, voxels, write_cube

from diffusers_cf.app.explorer import RECENT, Explorer, with_own_schedulers
from diffusers_cf.app.html import slice_html, verdict_html, volume_html
from diffusers_cf.data.geometry import display, to_ras
from diffusers_cf.errors import InputError
from diffusers_cf.segmentation.patient import segment_patient, segmentation_facts


INDEX = 5
STEPS = round(SETTINGS["strength"] * SETTINGS["num_inference_steps"])


@pytest.fixture(scope="module")
def pipe():
    pipe = make_pipe()
    for name, weight in pipe.unet.named_parameters():  # without training, classes would not matter
        if name.endswith("weight") and not weight.any():
            torch.nn.init.normal_(weight, std=0.05)
    return pipe


@pytest.fixture
def open_explorer(pipe, tmp_path):
    """Function that explores a patient in a temporary folder of its own; `change` may edit the scans first."""
    served = tmp_path / "served"
    served.mkdir()

    def open_explorer(change=lambda scans: None, **options):
        folder = TemporaryDirectory(dir=tmp_path)
        scans = write_cube(Path(folder.name, "P_01"), "LPS", "RAS")
        change(scans)
        return Explorer(pipe, segmentation_facts(pipe, "tiny"), folder, scans, served, **options)

    return open_explorer


@pytest.fixture
def explorer(open_explorer):
    return open_explorer()


@pytest.fixture
def settings(explorer):
    return explorer.facts["settings"]


def test_a_slider_costs_only_what_it_changes(explorer, settings, record_calls):
    calls = record_calls(explorer.pipe)

    def cost(index=INDEX, **changed):
        before = len(calls)
        view = explorer.view(index, settings | changed)
        return len(calls) - before, view.heatmap

    grid = settings["num_inference_steps"]
    first, heat = cost()
    assert first == 2 * STEPS  # there and back; a batched pair is one call
    assert cost(threshold=0.5)[0] == 0
    dearer, guided = cost(guidance_scale=5.0)
    assert dearer == STEPS and not np.allclose(guided, heat)
    longer, further = cost(strength=0.5)
    assert longer == 2 * round(0.5 * grid) and not np.allclose(further, heat)
    assert cost(strength=0.3)[0] == round(0.3 * grid)  # on the way of the encoding to 0.5
    assert cost(num_inference_steps=20)[0] == 2 * round(0.2 * 20)
    assert cost(index=INDEX + 1)[0] == 2 * STEPS
    assert cost(guidance_scale=3.0)[0] == STEPS  # back on a slice whose encoding is still there
    assert cost()[0] == 0
    assert cost(index=9)[0] == 2 * STEPS
    for index in range(1, 1 + RECENT):  # only what was viewed last is kept
        cost(index=index, strength=0.1)
    assert cost(index=1, strength=0.1)[0] == 0 and cost(index=9, guidance_scale=3.0)[0] == 2 * STEPS
    with pytest.raises(InputError, match="num_inference_steps"):
        cost(num_inference_steps=7)


def score_of_the_pipeline(explorer, **settings):
    image = torch.from_numpy(explorer.found.images[INDEX - explorer.slices[0]][None])
    heat = explorer.pipe(image, **settings).heatmaps[0].numpy()
    return pytest.approx(heat[(image[0] > 0).any(dim=0).numpy()].mean(), rel=1e-4)


def test_what_depends_on_no_guidance_is_decoded_once(explorer, settings, record_calls):
    calls, chosen = record_calls(explorer.pipe), settings | {"map": "reconstruction"}
    explorer.view(INDEX, chosen)
    assert len(calls) == 3 * STEPS
    explorer.view(INDEX, chosen | {"strength": 0.5})
    longer = 3 * STEPS + 3 * round(0.5 * settings["num_inference_steps"])
    assert len(calls) == longer
    guided = explorer.view(INDEX, chosen | {"guidance_scale": 5.0})  # of a part of the longer encoding
    assert len(calls) == longer + STEPS
    assert guided.score == score_of_the_pipeline(explorer, map="reconstruction", guidance_scale=5.0)


def test_the_forward_map_is_what_the_pipeline_makes(explorer, settings, record_calls):
    calls, chosen = record_calls(explorer.pipe), settings | {"map": "forward"}
    for _ in range(2):
        view = explorer.view(INDEX, chosen)
        assert len(calls) == STEPS and view.heatmap.any()
    explorer.view(INDEX, chosen | {"guidance_scale": 6.0})
    assert len(calls) == 2 * STEPS and view.score == score_of_the_pipeline(explorer, map="forward")


def test_a_view_shows_what_segment_writes(explorer, settings, pipe, tmp_path):
    segment_patient(pipe, explorer.scans, tmp_path, patient="P", progress=False)
    written = {}
    for name in ("heatmap", "mask", "counterfactual_flair", "counterfactual_t1"):
        image = nib.load(tmp_path / "P" / f"{name}.nii.gz")
        written[name] = display(to_ras(np.asanyarray(image.dataobj), image.affine))[INDEX]
    explorer._crop = (slice(None), slice(None))
    view = explorer.view(INDEX, settings)
    np.testing.assert_allclose(view.heatmap, written["heatmap"], atol=1e-5)
    assert (view.mask == (written["mask"] > 0)).mean() > 0.99 and view.mask.any() and not view.mask.all()
    for channel, modality in enumerate(MODALITIES):
        shown = view.counterfactuals[channel] * explorer._scales[channel]
        np.testing.assert_allclose(shown, written[f"counterfactual_{modality}"], atol=1e-3 * explorer._scales[channel])
    assert view.score == score_of_the_pipeline(explorer) and not view.of_volume


def test_the_whole_volume_is_that_of_segment(explorer, settings, pipe, tmp_path):
    changed = {"guidance_scale": 4.0, "threshold": 0.1}
    chosen = settings | changed
    files = explorer.segment(chosen, print)
    report = segment_patient(pipe, explorer.scans, tmp_path, patient="P", progress=False, **changed)
    for name in ("heatmap", "mask"):
        ours, theirs = getattr(files, name), tmp_path / "P" / f"{name}.nii.gz"
        assert nib.load(ours).header == nib.load(theirs).header
        np.testing.assert_array_equal(voxels(ours), voxels(theirs))
    assert files.report["lesion_volume_ml"] == report["lesion_volume_ml"] > 0 and files.lesion_slices
    assert explorer.view(INDEX, chosen).of_volume and not explorer.view(INDEX, settings).of_volume
    assert explorer.segment(settings, print).mask != files.mask and not files.mask.exists()
    assert f"Patient: unhealthy</b> · {report['lesion_volume_ml']:.1f} ml" in volume_html(files)
    assert "Patient: healthy" in volume_html(replace(files, lesion_slices=[]))


@pytest.mark.parametrize(("kind", "walks"), [("forward", 1), ("counterfactual", 2), ("reconstruction", 3)])
def test_progress_counts_the_steps_of_each_map(explorer, settings, kind, walks):
    shares = []
    explorer.segment(settings | {"map": kind, "threshold": 0.1}, shares.append)
    np.testing.assert_allclose(shares, np.arange(1, walks * STEPS + 1) / (walks * STEPS))


def test_the_verdict_is_that_of_the_mask(explorer, settings):
    for threshold in (None, 0):
        view = explorer.view(INDEX, settings | {"threshold": threshold})
        assert view.mask is None and "No verdict" in verdict_html(view, threshold)
        assert "no mask" in slice_html(view, 0, MODALITIES, "1 = p99", "counterfactual")
        with pytest.raises(InputError, match="no threshold"):
            explorer.segment(settings | {"threshold": threshold}, print)
    assert "Slice: healthy" in verdict_html(explorer.view(INDEX, settings | {"threshold": 9.0}), 9.0)
    view = explorer.view(INDEX, settings | {"threshold": 1e-6})
    area = view.mask.sum() * np.prod(view.pixel_mm) / 100
    assert f"Slice: unhealthy</b> · {area:.1f} cm²" in verdict_html(view, 1e-6)
    looks = {}
    for convention in ("radiological", "neurological"):
        page = slice_html(view, 0, MODALITIES, "1 = p99", "student", convention)
        found = re.findall('src="data:image/png;base64,([^"]*)"', page)
        looks[convention] = [np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))) for picture in found]
        assert f'<span class="cf-left">{"R" if convention == "radiological" else "L"}<' in page and convention in page
    assert len(found) == 6
    assert all(np.array_equal(a, b[:, ::-1]) for a, b in zip(*looks.values(), strict=True))
    assert not all(map(np.array_equal, *looks.values()))
    assert "<b>" not in slice_html(view, 0, ["<b>", "t1"], "1 = p99", "student")


@pytest.mark.parametrize("when", ["first step", "last step"])
def test_what_is_closed_stops_and_leaves_nothing(explorer, settings, when, tmp_path):
    steps = []

    def leave(share):
        steps.append(share)
        if when == "first step" or share == 1:
            explorer.close()

    with pytest.raises(InputError if when == "first step" else OSError):
        explorer.segment(settings, leave)
    assert len(steps) == (1 if when == "first step" else 2 * STEPS)
    assert [path.name for path in tmp_path.iterdir()] == ["served"] and not list((tmp_path / "served").iterdir())


@pytest.mark.parametrize("kind", ["counterfactual", "reconstruction", "forward", "delta", "whole volume"])
def test_stop_ends_at_the_next_step_and_another_call_starts_anew(explorer, settings, monkeypatch, kind):
    """A view that was stopped is computed again as a whole, with the same result."""

    def compute():
        if kind == "whole volume":
            return voxels(explorer.segment(settings | {"threshold": 0.1}, lambda share: None).mask)
        return explorer.view(INDEX, settings | {"map": kind}).heatmap

    taken, predict = [], explorer.pipe.predict_noise
    whole = (compute(), explorer._encodings.clear(), explorer._nulls.clear(), explorer._maps.clear())[0]
    calls, limit = [], None

    def predict_and_stop(self, *given):
        calls.append(given)
        if len(calls) == limit:
            explorer.stop()
        return predict(*given)

    monkeypatch.setattr(type(explorer.pipe), "predict_noise", predict_and_stop)
    for limit in range(1, 4 * STEPS):
        calls.clear()
        try:
            taken.append(compute())
            break
        except InputError as error:
            assert str(error) == "stopped" and len(calls) == limit
    np.testing.assert_array_equal(taken[0], whole)
    assert limit > STEPS


def test_an_explorer_that_is_dropped_leaves_nothing(open_explorer, tmp_path):
    explorer = open_explorer()
    explorer.segment(explorer.facts["settings"], print)
    with pytest.warns(ResourceWarning):
        del explorer
        gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == ["served"] and not list((tmp_path / "served").iterdir())


def test_decompressed_files_and_their_voxels_have_a_limit(open_explorer, explorer):
    with pytest.raises(InputError, match="limit is 1000"):
        open_explorer(max_bytes=1000)
    voxels_in_memory = explorer.volumes.volume[0].nbytes  # float32; int16 in the file
    open_explorer(max_bytes=voxels_in_memory)
    with pytest.raises(InputError, match=f"P_01_flair.nii.gz: 9984 voxels .* the limit is {9984 - 1}$"):
        open_explorer(max_bytes=voxels_in_memory - 1)


def test_only_heatmap_and_mask_are_served(explorer, settings, tmp_path):
    for _ in range(2):  # a second run replaces the first
        files = explorer.segment(settings, print)
        assert {path for path in (tmp_path / "served").rglob("*") if path.is_file()} == {files.heatmap, files.mask}
        assert len(files.mask.parent.name) >= 32 and list(explorer.scans.parent.iterdir()) == [explorer.scans]


def test_two_users_of_a_model_have_a_grid_each(pipe):
    other = with_own_schedulers(pipe)
    assert other.unet is pipe.unet and other.preprocessing is pipe.preprocessing
    pipe.scheduler.set_timesteps(10)
    other.scheduler.set_timesteps(20)
    assert len(pipe.scheduler.timesteps) == 10 and len(other.scheduler.timesteps) == 20


def test_it_begins_where_the_expert_saw_most(open_explorer, explorer, settings):
    def add_seg(scans):
        scan = nib.load(scans / "P_01_flair.nii.gz")
        seg = np.zeros(scan.shape, np.uint8)
        seg[4:6, 4:6, 3] = seg[4:9, 4:9, 2] = 1
        nib.save(nib.Nifti1Image(seg, scan.affine), scans / "P_01_seg.nii.gz")

    assert explorer.first_slice == 6
    with_seg = open_explorer(add_seg)
    assert with_seg.first_slice == 2 and with_seg.view(2, settings).reference.sum() == 25
