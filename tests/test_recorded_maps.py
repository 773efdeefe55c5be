"""The shipped model makes the maps that it made before the code around it was rewritten."""

import numpy as np
from record_maps import RECORDED, shipped_maps


def test_the_shipped_model_makes_the_recorded_maps():
    found = shipped_maps()
    with np.load(RECORDED) as recorded:
        assert sorted(recorded.files) == sorted(found)
        for name in recorded.files:
            np.testing.assert_allclose(found[name], recorded[name], rtol=0, atol=1e-5, err_msg=name)
            assert np.abs(recorded[name]).max() > 0.01, name
