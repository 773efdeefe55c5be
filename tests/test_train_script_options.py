"""Options of train_counterfactual.py that are refused."""

import pytest

from train_counterfactual import parse_args


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_train_steps": 0}, "--max_train_steps is 0: it must be 1 or more"),
        ({"seed": -1}, "--seed is -1: it must be 0 or more"),
        ({"learning_rate": "nan"}, "--learning_rate is nan: it must be 0 or more"),
        ({"resolution": 12}, "--resolution is 12: it must be a multiple of 8"),
        ({"first_timesteps": 0.0}, "--first_timesteps is 0.0: it must lie in (0, 1]"),
        ({"crop_background": -0.1}, "--crop_background is -0.1: it must lie in [0, 1]"),
        ({"ddpm_num_steps": 50, "validation_steps": 5}, "--ddpm_num_steps is 50: validation needs a multiple of 8"),
        ({"report_to": "paper"}, "--report_to: invalid choice: 'paper'"),
    ],
)
def test_wrong_options(changes, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(["--dataset=data", "--output_dir=out", *(f"--{name}={value}" for name, value in changes.items())])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
