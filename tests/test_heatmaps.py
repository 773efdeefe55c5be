"""The maps that compare reference and counterfactual."""

import pytest
import torch

from diffusers_cf.maps import heatmap, signed_heatmap


REFERENCE = torch.tensor([[[[1.0, 0.2]], [[0.5, 0.5]]]])
COUNTERFACTUAL = torch.tensor([[[[0.6, 0.4]], [[0.7, 0.5]]]])


def test_the_absolute_map_is_the_mean_of_absolute_differences():
    torch.testing.assert_close(heatmap("counterfactual", REFERENCE, COUNTERFACTUAL), torch.tensor([[[0.3, 0.1]]]))


def test_the_signed_map_counts_changes_of_the_expected_sign_alone():
    # channel 0 is brighter in disease, channel 1 darker: (0.4 + 0.2) / 2, and (-0.2 + 0) / 2 which is cut
    expected = torch.tensor([[[0.3, 0.0]]])
    torch.testing.assert_close(signed_heatmap(REFERENCE, COUNTERFACTUAL, [1, -1]), expected)
    torch.testing.assert_close(heatmap("signed", REFERENCE, COUNTERFACTUAL, [1, -1]), expected)


@pytest.mark.parametrize("signs", [None, [], [1]])
def test_the_signed_map_needs_a_sign_for_each_channel_before_anything_is_computed(pipe, images, record_calls, signs):
    pipe.preprocessing, calls = {"signs": signs}, record_calls(pipe)
    with pytest.raises(ValueError, match="signs"):
        pipe(images, map="signed", num_inference_steps=10)
    assert calls == []
