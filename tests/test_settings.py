"""Which settings are in use: those given, those of the model, the paper's."""

import pytest

from diffusers_cf.settings import settings_in_use


@pytest.mark.parametrize(
    ("name", "given", "threshold"),
    [
        (None, {}, 0.1),
        (None, {"map": None, "strength": 0.3}, 0.1),
        (None, {"map": "forward"}, None),
        (None, {"map": "forward", "threshold": 0.3}, 0.3),
        ("paper", {}, 0.2),
        ("paper", {"map": "counterfactual"}, 0.2),
        ("paper", {"map": "reconstruction"}, None),
    ],
)
def test_a_threshold_goes_with_its_map(name, given, threshold):
    facts = {"settings": {"map": "reconstruction", "threshold": 0.1}, "paper_threshold": 0.2}
    assert settings_in_use(facts, given, name)["threshold"] == threshold
    for unnamed in ({"threshold": 0.1}, {"threshold": 0.1, "map": None}):  # has the map of the paper
        assert settings_in_use({"settings": unnamed}, {"map": "counterfactual"})["threshold"] == 0.1
        assert settings_in_use({"settings": unnamed}, {"map": "signed"})["threshold"] is None
