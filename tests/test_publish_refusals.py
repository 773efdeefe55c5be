"""What `publish` and `push_to_hub` refuse: folders, results, pictures and repositories that are not what they should be."""

import json
import shutil

import pytest
from hub_client import client_process, command_line
from model_files import UNET, edit_json, tiny_pipeline, write_model
from PIL import Image

from diffusers_cf import InputError
from diffusers_cf.hub.published_results import checked_result
from diffusers_cf.hub.publishing import published_files, push_model
from diffusers_cf.loading import check_model_folder


FACTS = {"modalities": ["flair", "t1"], "class_names": ["healthy", "unhealthy"], "source": "arrays", "size": 8}
FACTS |= {"settings": {"num_inference_steps": 4, "strength": 0.5}}
DICE = {"mean": 0.5, "interval": [0.25, 0.625], "threshold": 0.1}
RESULT = {
    "auprc": 0.625, "ideal_dice": 0.5, "slice_auroc": None, "n_patients": 4, "n_slices": 40,
    "postprocessed": {"auprc": 0.75, "ideal_dice": 0.5, "slice_auroc": 1, "per_patient_dice": DICE},
    "dataset": {"source": "arrays", "split": "test"}, "protocol": {"pixels": "all"}, "command": "c", "commit": "d",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny", FACTS)


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "model")


def publish(client, folder, repo_id, *options):
    return client(command_line, "publish", folder, "--repo-id", repo_id, *options)


def push_from_memory(repo_id, **options):
    """`pipe.push_to_hub`, for the client's process."""
    pipe = tiny_pipeline()
    pipe.preprocessing = options.pop("facts", FACTS)
    pipe.push_to_hub(repo_id, **options)


def test_only_components_and_their_files_are_published(copy):
    other = copy / "secrets"
    other.mkdir()
    for name in ("config.json", "secrets.json", "diffusion_pytorch_model.safetensors"):
        (other / name).write_text("{}")
    (copy / "unet" / "notes.json").write_text("{}")
    names = set(published_files(copy, check_model_folder(copy)))
    assert names == {
        "model_index.json", "preprocessing.json", "checksums.json", "unet/config.json", UNET,
        "class_encoder/config.json", UNET.replace("unet", "class_encoder"), "scheduler/scheduler_config.json",
        "inverse_scheduler/scheduler_config.json",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "preprocessing.json", UNET, "checksums.old.json"])
def test_links_out_of_the_folder_are_not_followed(copy, tmp_path, name):
    outside, target = tmp_path / "outside", copy / name
    if name == "checksums.old.json":  # of a variant that isn't there, so that no check of the model looks at it
        outside.write_text("{}")
    else:
        shutil.move(target, outside)
    target.symlink_to(outside)
    with pytest.raises(InputError, match="leads out of the model folder, refused"):
        push_model(copy, "user/x")


def test_where_the_model_was_loaded_from_is_not_published(copy):
    for name in ("model_index.json", "unet/config.json"):
        edit_json(copy / name, _name_or_path="/srv/me/model")
    files = published_files(copy, check_model_folder(copy))
    assert b"_name_or_path" not in files["model_index.json"] + files["unet/config.json"]
    assert files["scheduler/scheduler_config.json"] == copy / "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": ["flair"]}, "takes 2 channels, but names the modalities flair"),
        ({"class_names": ["healthy", "rust"]}, r"its network knows the classes \['healthy', 'unhealthy'\], not"),
        ({"settings": {"strength": "high"}}, "preprocessing.json holds a value of a wrong type"),
        ({"settings": {"strength": 2.0}}, "strength is 2.0: it must lie in"),
        ({"settings": {"num_inference_steps": 0}}, "num_inference_steps is 0: it must be a whole number, 1 or more"),
        ({"settings": {"num_inference_steps": 7.5}}, "num_inference_steps is 7.5"),
        ({"settings": {"map": "signed"}}, "preprocessing holds no `signs`"),
        ({"settings": {"map": "signed"}, "signs": ["a", "b"]}, "preprocessing holds no `signs`"),
        ({"settings": {"postprocess": "yes"}}, "`postprocess` in its preprocessing.json is neither true nor false"),
        ({"settings": {"threshold": -1}}, "threshold is -1: it must be above 0"),
        ({"paper_threshold": "0.1"}, "preprocessing.json holds a value of a wrong type"),
        ({"evaluation_size": 0}, "size must be at least 1"),
        ({"training": "long"}, "`training` in its preprocessing.json is not a JSON object"),
    ],
)
def test_a_model_that_nobody_could_use_is_not_published(copy, changes, message):
    edit_json(copy / "preprocessing.json", **changes)
    with pytest.raises(InputError, match=message):
        push_model(copy, "user/x")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("dataset", None, "lacks dataset.source"), ("dataset.split", 3, "dataset.split is '3'"),
        ("postprocessed", 1, "lacks postprocessed.auprc"), ("auprc", "0.5", "auprc is '0.5'"),
        ("auprc", float("nan"), "auprc is 'nan'"), ("ideal_dice", 1.5, "ideal_dice is '1.5'"),
        ("postprocessed.per_patient_dice", {"mean": None}, "lacks postprocessed.per_patient_dice.interval"),
        ("postprocessed.per_patient_dice.interval", [0.5], r"interval is '\[0.5\]'"),
        ("postprocessed.per_patient_dice.interval", ["a", "b"], "interval is"), ("protocol", ["all"], "protocol is"),
        ("protocol", {"pixels": 1}, "protocol is"), ("command", None, "command is 'None'"),
        ("n_slices", "many", "n_slices is 'many'"),
    ],
)  # fmt: skip
def test_a_damaged_result_is_named_in_one_line(model, path, value, message):
    result = json.loads(json.dumps(RESULT))
    assert checked_result(result, "R.json") == RESULT
    *parents, key = path.split(".")
    place = result
    for parent in parents:
        place = place[parent]
    place[key] = value
    with pytest.raises(InputError, match=f"R.json: no RESULT.json of evaluate .*{message}") as caught:
        checked_result(result, "R.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="result 1: no RESULT.json of evaluate"):
        push_model(model, "user/x", results=[result])


@pytest.mark.parametrize("content", [b"\xff", b"[1]", b"[" * 10**5, b'{"auprc": '])
def test_a_file_that_is_no_result_is_named_in_one_line(client, model, tmp_path, content):
    (tmp_path / "R.json").write_bytes(content)
    code, _, err = publish(client, model, "user/x", "--scores", tmp_path / "R.json")
    assert code == 2 and f"{tmp_path / 'R.json'}: " in err and len(err.splitlines()) == 1


def test_only_pictures_are_published_and_none_twice(client, copy, model, tmp_path):
    (tmp_path / "a").mkdir()
    good, same, text, cut, other = (tmp_path / name for name in ("p.png", "a/p.png", "t.png", "c.png", "o.jpg"))
    for path in (good, same):
        Image.new("L", (64, 64), 7).save(path)
    text.write_text("no picture")
    cut.write_bytes(good.read_bytes()[:40])
    shutil.copy(good, other)
    for pictures, message in (
        ([good, same], "has the same name"), ([text], "is no PNG picture"), ([cut], "is no PNG picture"),
        ([other], "is no JPEG picture"), ([tmp_path / "none.png"], "must be a .png or .jpg file"),
    ):  # fmt: skip
        for push in (lambda **given: push_model(model, "user/x", **given), lambda **given: client(push_from_memory, "user/x", **given)):  # fmt: skip
            with pytest.raises(InputError, match=message) as caught:
                push(pictures=pictures)
            assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="pictures of these data may not be shown"):
        client(push_from_memory, "user/x", pictures=[good], facts=FACTS | {"source": "brats"})


FOREIGN = {
    "something": {"train.py": b"", "README.md": b"mine"},
    "pipeline": {"model_index.json": b'{"_class_name": "StableDiffusionPipeline"}', "README.md": b"mine"},
    "broken": {"model_index.json": b"{", "README.md": b"mine"},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_repository_with_something_else_is_left_alone(hub, client, model, kind):
    hub.put(f"user/{kind}", FOREIGN[kind])
    code, _, err = publish(client, model, f"user/{kind}")
    assert (
        code == 2 and err.startswith(f"error: user/{kind}: holds something else already (") and "Traceback" not in err
    )
    assert len(err.splitlines()) == 1 and hub.files(f"user/{kind}") == FOREIGN[kind]


def test_a_blank_repository_and_an_earlier_model_are_written_to(hub, client, model):
    hub.put("user/blank", {".gitattributes": b"", "README.md": b"# blank", "LICENSE": b""})
    for options in ([], ["--with-code"], ["--with-code"], []):
        code, _, err = publish(client, model, "user/blank", *options)
        assert code == 0, err
    assert b"CounterfactualDDIMPipeline" in hub.files("user/blank")["README.md"]


def test_a_push_that_was_cut_short_goes_on_where_it_was(hub, client, model):
    hub.objects.clear()
    hub.puts_left = 1
    code, _, err = publish(client, model, "user/cut")
    hub.puts_left = None
    assert code == 2 and "is whole, but could not be pushed to user/cut" in err and "Traceback" not in err
    assert len(hub.objects) == 1 and UNET not in hub.files("user/cut")
    before = len(hub.requests)
    assert publish(client, model, "user/cut")[0] == 0
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests[before:]) == 1


def test_no_token_no_rights_and_no_network_are_said_in_one_line(hub, client, model, tmp_path):
    with client_process(hub.environment(tmp_path) | {"HF_TOKEN": None}) as nobody:
        code, _, err = publish(nobody, model, "user/x")
        assert code == 2 and "`hf auth login` stores a token" in err and len(err.splitlines()) == 1
        assert publish(nobody, model, "user/given", "--token", "hf_given")[0] == 0
    hub.put("user/taken", {"README.md": b"of somebody"})
    hub.forbidden = {"user/taken", "locked"}
    try:
        code, _, err = publish(client, model, "user/taken")
        assert code == 2 and "is whole, but could not be pushed to user/taken" in err and "Traceback" not in err
        assert hub.files("user/taken") == {"README.md": b"of somebody"}
        code, _, err = publish(client, model, "locked/x")
        assert code == 2 and "You don't have the rights to create under locked" in err and len(err.splitlines()) == 1
    finally:
        hub.forbidden = set()
    with client_process(hub.environment(tmp_path) | {"HF_HUB_OFFLINE": "1"}) as offline:
        code, _, err = publish(offline, model, "user/x")
        assert code == 2 and "user/x: no repository to push to" in err and len(err.splitlines()) == 1
    hub.stop()
    try:
        code, _, err = publish(client, model, "user/x")
    finally:
        hub.start()
    assert code == 2 and "user/x: no repository to push to" in err and len(err.splitlines()) == 1
