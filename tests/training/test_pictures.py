"""loss.png and layers.png, read back as images."""

import io
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import colors, image

from nextllm_jax.config import ModelConfig
from nextllm_jax.model import layer_norms
from nextllm_jax.training import pictures
from nextllm_jax.training.pictures import draw_layers, draw_losses

PLACES = layer_norms.places(ModelConfig(num_layers=2))


def pixels(png):
    """The RGB values of a PNG, from 0 to 255."""
    return np.round(255 * image.imread(io.BytesIO(png))[..., :3]).astype(int)


def share(picture, color):
    """The fraction of the pixels of a picture that have a color."""
    return float((np.abs(picture - np.round(255 * np.array(colors.to_rgb(color)))) <= 2).all(-1).mean())


def test_the_loss_has_a_curve_for_each_split():
    train = [{"split": "train", "step": step, "loss": 8 / step} for step in range(1, 50)]
    validation = [{"split": "validation", "step": step, "loss": 9 / step} for step in range(10, 50, 10)]
    nothing = [{"split": "train", "step": 50, "loss": None}]
    drawn = [pixels(draw_losses(records)) for records in (nothing, train, validation, train + validation)]
    assert {picture.shape for picture in drawn} == {(600, 960, 3)}
    ink = [int((picture < 230).any(-1).sum()) for picture in drawn]
    assert ink[0] < min(ink[1:3])
    assert ink[3] > max(ink[1:3])


def records(*, num_steps=40, gradient=lambda step, row: 1.0, activation=lambda step, row: 1.0):
    return [
        {
            "split": "train",
            "step": step,
            "gradient_norms": [gradient(step, row) for row in range(len(PLACES))],
            "activation_rms": [activation(step, row) for row in range(len(PLACES) - 1)],
        }
        for step in range(10, 10 * num_steps + 1, 10)
    ]


def test_values_that_are_not_finite_and_zeros_have_their_own_colors():
    healthy = pixels(draw_layers(records(), PLACES))
    bad, zero = pictures._NOT_FINITE, pictures._ZERO
    # A quarter of the steps, in one of the rows of the two heat maps.
    diverged = pixels(draw_layers(records(gradient=lambda step, row: None if step > 300 and row == 3 else 1.0), PLACES))
    frozen = pixels(draw_layers(records(gradient=lambda step, row: 0.0 if step > 300 and row == 3 else 1.0), PLACES))
    cells = 0.25 / len(PLACES) / 2
    assert share(diverged, bad) - share(healthy, bad) == pytest.approx(0.6 * cells, rel=0.3)
    assert share(frozen, zero) - share(healthy, zero) == pytest.approx(0.6 * cells, rel=0.3)
    assert share(frozen, bad) == share(healthy, bad)


@pytest.mark.parametrize(("factor", "end"), [(1e6, "yellow"), (1e-6, "purple")])
def test_a_layer_that_explodes_or_vanishes_differs_from_the_others(factor, end):
    changed = records(activation=lambda step, row: factor if step > 200 and row == 2 else 1.0)
    color = colors.to_rgb({"yellow": "#fde725", "purple": "#440154"}[end])
    healthy, unusual = (pixels(draw_layers(each, PLACES)) for each in (records(), changed))
    left = [picture[:, : picture.shape[1] * 2 // 5] for picture in (healthy, unusual)]
    assert share(left[1], color) > 0.03
    assert abs(share(left[0], color) - share(left[1], color)) > 0.03


def test_one_bad_step_of_a_long_run_is_visible():
    bad = pictures._NOT_FINITE
    long = records(num_steps=5000, gradient=lambda step, row: None if step == 33_330 else 1.0)
    assert share(pixels(draw_layers(long, PLACES)), bad) > share(pixels(draw_layers(records(), PLACES)), bad)


def test_records_without_norms_and_a_run_without_records_are_drawn():
    old = [{"split": "train", "step": 5, "loss": 2.0}, {"split": "validation", "step": 5, "loss": 2.0}]
    assert np.array_equal(pixels(draw_layers(old, PLACES)), pixels(draw_layers([], PLACES)))
    assert np.array_equal(pixels(draw_layers([*old, *records()], PLACES)), pixels(draw_layers(records(), PLACES)))
    assert math.prod(pixels(draw_layers(records(num_steps=1), PLACES)).shape)


@pytest.mark.parametrize("backend", ["nonsense", "module://matplotlib_inline.backend_inline"])
def test_pictures_do_not_depend_on_the_backend_of_a_notebook(backend):
    code = "from nextllm_jax.training.pictures import *; print(len(draw_losses([])), len(draw_layers([], ['head'])))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "MPLBACKEND": backend}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert all(int(size) > 1000 for size in done.stdout.split())
