"""A histogram is as high as there are values in each bin, and every measure has its own axes."""

import re
from xml.etree import ElementTree

import numpy as np

from data_prep.histogram_plots import FILL, NUM_BINS, histograms_svg


def bars(svg):
    """Return of each histogram the heights of its bars and the places of their borders, in pixels."""
    found = []
    for path in re.findall(rf'<path d="([^"]*)" fill="{FILL}"', svg):
        (left, bottom), steps = re.match(r"M([\d.]+) ([\d.]+)", path).groups(), re.findall(r"V([\d.]+)H([\d.]+)", path)
        heights = float(bottom) - np.array([float(y) for y, _ in steps])
        found.append((heights, np.array([float(left), *(float(x) for _, x in steps)])))
    return found


def test_bars_are_as_high_as_there_are_values(rng):
    measures = {f"measure {n}": rng.gamma(2.0, 10.0**n, size=300) for n in range(-2, 3)}
    svg = histograms_svg(measures, "five measures")
    drawn = bars(svg)
    assert len(drawn) == 5
    for (heights, edges), values in zip(drawn, measures.values()):
        counts, borders = np.histogram(values, NUM_BINS)
        np.testing.assert_allclose(heights / heights.max(), counts / counts.max(), atol=0.002)
        shares = (borders - borders[0]) / np.ptp(borders)
        np.testing.assert_allclose((edges - edges[0]) / np.ptp(edges), shares, atol=0.002)
    root = ElementTree.fromstring(svg)
    words = [element.text for element in root.iter("text")]
    assert set(measures) < set(words)
    assert words.count("Recordings") == 2  # of two rows


def test_labels_below_lie_at_their_values(rng):
    values = rng.normal(50, 10, size=100)
    svg = histograms_svg({"a": values}, "a")
    ((_, edges),) = bars(svg)
    below = re.findall(r'<text x="([\d.]+)"[^>]*text-anchor="middle"[^>]*>([\d.]+)<', svg)
    assert len(below) >= 3
    place = np.interp([float(label) for _, label in below], [values.min(), values.max()], [edges[0], edges[-1]])
    inside = [values.min() <= float(label) <= values.max() for _, label in below]
    np.testing.assert_allclose(np.array([float(x) for x, _ in below])[inside], place[inside], atol=0.2)


def test_counts_are_told_in_whole_recordings():
    svg = histograms_svg({"a": np.array([1.0, 2.0])}, "a")
    assert re.findall(r'text-anchor="end"[^>]*>([^<]*)<', svg) == ["0", "1"]
