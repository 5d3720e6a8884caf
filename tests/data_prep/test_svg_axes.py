"""Ticks are round, few and inside the axes; a picture is what its pixels say; words cannot become markup."""

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from data_prep.svg_axes import Box, grey_png, image, picture, text, ticks_of


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 980.0, ["0", "200", "400", "600", "800"]),
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.897, 0.935, ["0.90", "0.91", "0.92", "0.93"]),
        (0.0, 16.8, ["0", "5", "10", "15"]),
        (-0.3, 0.3, ["-0.3", "-0.2", "-0.1", "0.0", "0.1", "0.2", "0.3"]),
        (0.0, 13.0, ["0.0", "2.5", "5.0", "7.5", "10.0", "12.5"]),
        (180.0, 240.0, ["180", "190", "200", "210", "220", "230", "240"]),
    ],
)
def test_ticks_are_round_and_as_exact_as_their_step(low, high, labels):
    assert [label for _, label in ticks_of(low, high, 6)] == labels


def test_ticks_are_few_ascending_inside_and_say_their_value(rng):
    for _ in range(500):
        low = rng.normal() * 10.0 ** rng.integers(-6, 7)
        high = low + abs(low) * 10.0 ** rng.uniform(-4, 3)
        most = int(rng.integers(3, 10))
        ticks = ticks_of(low, high, most)
        values = [value for value, _ in ticks]
        assert most / 2.5 - 1 <= len(ticks) <= most + 1
        slack = 1e-6 * (high - low)
        assert all(low - slack <= value <= high + slack for value in values)
        assert (np.diff(values) > 0).all()
        np.testing.assert_allclose([float(label) for _, label in ticks], values, atol=1e-3 * (high - low))
        assert len({label for _, label in ticks}) == len(ticks)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (0.0, np.inf), (np.nan, 1.0)])
def test_a_range_without_room_is_refused(low, high):
    with pytest.raises(ValueError, match="finite low < high"):
        ticks_of(low, high, 5)


@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (300, 2)])
def test_a_png_holds_its_pixels(rng, shape):
    pixels = rng.integers(0, 256, shape).astype(np.uint8)
    read = Image.open(io.BytesIO(grey_png(pixels)))
    assert read.mode == "L"
    np.testing.assert_array_equal(np.asarray(read), pixels)


def test_words_cannot_become_markup(rng):
    evil = "<script>\"&'</script>"
    box = Box(1, 2, 30, 40)
    pixels = rng.integers(0, 256, (2, 3)).astype(np.uint8)
    root = ElementTree.fromstring(picture([text(evil, 1, 2, turn=True), image(pixels, box)], 50, evil))
    assert root.get("aria-label") == evil
    assert [child.tag for child in root] == ["text", "image"]
    assert root[0].text == evil
    assert (box.right, box.bottom) == (31, 42)
