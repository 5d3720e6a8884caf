"""The quality page: whole, small, the same bytes each time, and safe to open whatever the names in it are."""

import base64
import html
import io
import re
import time
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from brainlm.atlas import Atlas
from brainlm.input_contract import InputContract
from data_prep.carpet_plots import LIMIT, STRIP, carpet_svg, choose_recordings, order_by_network, z_scored
from data_prep.parquet_tables import RECORDING_COLUMNS, REJECTED_COLUMNS, table_of
from data_prep.quality_page import QualityReport, quality_page, reason_kind

P = 8
NETWORKS = ("Vis", "Default", "", "Vis", "Default", "Limbic", "", "Vis")


def contract(networks=NETWORKS, uncovered=()):
    atlas = Atlas(
        name="toy", sha256="", labels=np.arange(1, P + 1), parcel_names=tuple(f"parcel{p}" for p in range(P)),
        coords_mm=np.arange(3 * P).reshape(P, 3), networks=networks,
    )  # fmt: skip
    covered = ~np.isin(np.arange(P), uncovered)
    ones = covered.astype(np.float32)
    return InputContract(
        atlas=atlas, covered=covered, median=0 * ones, iqr=ones, tr_s=2.0, window_len=40, patch_len=10,
        flags=("a whole-run filter",),
    )  # fmt: skip


def recordings(count, rng):
    number = np.arange(count)
    blank = table_of([], RECORDING_COLUMNS).reindex(number)
    values = {
        "recording_id": [f"sub-{n:06d}" for n in number],
        "subject": [f"{n // 2:05d}" for n in number],
        "site": [f"site{n % 3}" for n in number],
        "split": np.array(["train", "train", "val", "test"])[number % 4],
        "source_tr_s": np.where(number % 3 == 0, 1.5, 2.0),
        "resampled": number % 3 == 0,
        "num_timepoints": 100 + number % 50,
        "num_kept": 90 + number % 50,
        "duration_s": 2.0 * (90 + number % 50),
        "mean_fd_mm": rng.gamma(2.0, 0.1, count),
        "dvars_z": rng.normal(1.4, 0.1, count),
        "tsnr": np.nan,
        "num_missing_parcels": 0,
        "space": "",
        "denoised": "",
        "cohort": "first",
        "series_sha256": [f"{n:064d}" for n in number],
    }
    return blank.assign(**values)


def rejected(rows):
    blank = dict.fromkeys(REJECTED_COLUMNS, "") | {"addition": 0}
    return table_of([blank | row for row in rows], REJECTED_COLUMNS)


def report(rng, count=12, refused=(), carpets=False, **changes):
    """Return a report, and a list that fills with the ids of which a carpet is asked for."""

    def carpet(recording_id):
        asked.append(recording_id)
        bold = np.random.default_rng(len(recording_id)).normal(size=(80, P)).astype(np.float32)
        bold[:, 3] = np.nan
        keep_mask = np.ones(80, dtype=bool)
        keep_mask[10:14] = False
        return bold, keep_mask

    asked = []
    known = {
        "name": "toy", "recordings": recordings(count, rng), "rejected": rejected(refused), "contract": contract(),
        "duplicates": [], "warnings": [], "carpet": carpet if carpets else None,
    }  # fmt: skip
    return QualityReport(**(known | changes)), asked


def text_of(page):
    return re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.S))


def table_after(page, title):
    """Return the rows, as texts, of the first table below a title."""
    part = page.split(f"<h2>{title}</h2>")[1].split("</table>")[0]
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", part, re.S)]


def test_tables_count_what_the_recordings_say(rng):
    page = quality_page(report(rng)[0])
    table = recordings(12, np.random.default_rng(0))
    for row in table_after(page, "Splits")[1:]:
        part = table[table["split"] == row[0]]
        assert row[1:4] == [str(len(part)), str(part["subject"].nunique()), str(part["num_timepoints"].sum())]
    assert table_after(page, "Repetition times")[1:] == [["1.5", "2", "4", "4", "1"], ["2", "2", "8", "0", "2"]]
    assert "4 of 12 recordings were resampled to 2 s" in page
    sites = table_after(page, "Sites")
    assert [row[0] for row in sites[1:]] == ["site0", "site1", "site2"]
    assert sites[1][1] == "4"
    assert sites[1][6:8] == ["1.5", "4"]
    assert "a whole-run filter" in page


def test_page_is_whole_and_has_the_same_bytes_each_time(rng):
    page = quality_page(report(np.random.default_rng(5), carpets=True)[0])
    assert page == quality_page(report(np.random.default_rng(5), carpets=True)[0])
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "http" not in page
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(pictures) == 1 + 4  # the histograms and four carpets
    for picture in pictures:
        ElementTree.fromstring(picture)
    for picture in re.findall(r"base64,([^\"]*)", page):
        image = Image.open(io.BytesIO(base64.b64decode(picture)))
        image.load()
        assert image.info == {}


def test_names_and_reasons_cannot_run_anything(rng):
    evil = "<script>alert(1)</script>"
    refused = [{"recording_id": evil, "stage": evil, "reason": f"bad {evil} \"'"}]
    given, _ = report(rng, refused=refused, carpets=True, name=evil, warnings=[evil], duplicates=[[evil, "b"]])
    given.recordings["site"] = evil
    given.recordings["recording_id"] = [f'"><img src=x onerror=alert({n})>' for n in range(len(given.recordings))]
    page = quality_page(given)
    assert "<script" not in page
    assert "<img src=x" not in page
    assert page.count("&lt;script&gt;") >= 6


def test_refusals_are_grouped_by_reason_and_each_is_listed(rng):
    refused = [
        {"recording_id": f"sub-{n}", "subject": str(n), "source": f"ts/sub-{n}.npy", "stage": "length",
         "reason": f"too short: {n} timepoints, a window needs 200"}
        for n in range(100, 130)
    ]  # fmt: skip
    refused.append({"recording_id": "x", "stage": "read", "reason": "/data/x.npy is not a readable .npy"})
    page = quality_page(report(rng, refused=refused)[0])
    assert "<summary>30 length: too short: # timepoints, a window needs #</summary>" in page
    assert "<summary>1 read: … is not a readable .npy</summary>" in page
    for row in refused:
        assert f"<li>{row['recording_id']}: {row['reason']}</li>" in page
    assert table_after(page, "Refused")[1:] == [["length", "30"], ["read", "1"]]


@pytest.mark.parametrize(
    ("reason", "names", "kind"),
    [
        ("too short: 55 timepoints, a window needs 200", (), "too short: # timepoints, a window needs #"),
        ("sub-01: no TR (set source.tr_s)", ("sub-01", "01"), "…: no TR (set source.tr_s)"),
        ("table 12 has no column a", ("a", "12"), "table # has no column …"),
        ("a/b/c.nii.gz ended after 1.5e6 bytes", ("", "1"), "… ended after # bytes"),
    ],
)
def test_like_reasons_are_of_one_kind(reason, names, kind):
    assert reason_kind(reason, *names) == kind


def test_worst_and_median_recordings_are_drawn_once_each(rng):
    given, asked = report(rng, count=21, carpets=True)
    page = quality_page(given)
    by_fd = given.recordings.sort_values("mean_fd_mm")["recording_id"].tolist()
    assert asked == [*by_fd[:-4:-1], by_fd[10]]
    assert f"{by_fd[-1]}: worst by mean framewise displacement" in page
    assert "80 timepoints, 4 censored, 1 parcels missing" in page


def test_dvars_ranks_where_motion_is_mostly_unknown_and_says_so(rng):
    given, asked = report(rng, count=20, carpets=True)
    given.recordings.loc[:10, "mean_fd_mm"] = np.nan
    page = quality_page(given)
    assert asked[0] == given.recordings.sort_values("dvars_z")["recording_id"].iloc[-1]
    assert "by DVARS (mean framewise displacement is not known)" in page


def test_few_recordings_and_equal_series_are_not_drawn_twice(rng):
    table = recordings(5, rng)
    ids = table["recording_id"].tolist()
    _, chosen = choose_recordings(table, [ids[:3], ids[3:]])
    assert len({recording.recording_id for recording in chosen}) == len(chosen) == 2
    assert len(choose_recordings(recordings(1, rng), [])[1]) == 1
    table["mean_fd_mm"] = table["dvars_z"] = np.nan
    assert choose_recordings(table, []) == ("", [])


def test_parcels_of_a_network_are_neighbours():
    order, names = order_by_network(NETWORKS, P)
    assert order.tolist() == [0, 3, 7, 1, 4, 5, 2, 6]
    assert names == ["Vis"] * 3 + ["Default"] * 2 + ["Limbic"] + ["no network"] * 2
    assert order_by_network(None, 3)[0].tolist() == [0, 1, 2]


def test_censored_timepoints_do_not_set_the_grey_scale(rng):
    bold = (100 + 5 * rng.normal(size=(60, P))).astype(np.float32)
    keep_mask = np.ones(60, dtype=bool)
    keep_mask[5:9] = False
    kept = z_scored(bold, keep_mask)[keep_mask]
    np.testing.assert_allclose(kept.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(kept.std(axis=0), 1, rtol=1e-5)
    spoilt = bold.copy()
    spoilt[5:9] = 1e6
    np.testing.assert_array_equal(z_scored(spoilt, keep_mask)[keep_mask], kept)
    assert z_scored(np.ones((9, 2), dtype=np.float32), np.ones(9, dtype=bool)).any() == np.False_


def greys(svg):
    """Return the pixels of the one picture in an SVG, rows of parcels by columns of time."""
    (encoded,) = re.findall(r"base64,([^\"]*)", svg)
    picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert picture.mode == "L"
    return np.asarray(picture).astype(float)


def runs_in_red(svg, num_timepoints):
    """Return first and last timepoint, not included, of each red bar."""
    bars = re.findall(rf"M([\d.]+) {STRIP.top}v{STRIP.height}h([\d.]+)v-{STRIP.height}z", svg)
    scale = num_timepoints / STRIP.width
    return [[(float(x) - STRIP.left) * scale, (float(x) + float(w) - STRIP.left) * scale] for x, w in bars]


def test_a_pixel_of_a_carpet_is_a_parcel_at_a_time(rng):
    bold = rng.normal(size=(60, P)).astype(np.float32)
    bold[:, 3] = np.nan
    keep_mask = np.arange(60) < 50
    pixels = greys(carpet_svg(bold, keep_mask, 2.0, NETWORKS, "a"))
    expected = z_scored(bold[:, [0, 7, 1, 4, 5, 2, 6]], keep_mask).T.clip(-LIMIT, LIMIT)
    np.testing.assert_allclose(pixels / 255 * 2 * LIMIT - LIMIT, expected, atol=0.1)  # 32 greys


def test_red_marks_lie_where_timepoints_are_censored(rng):
    bold = rng.normal(size=(200, P)).astype(np.float32)
    keep_mask = np.ones(200, dtype=bool)
    keep_mask[[0, 1, 77, 150, *range(160, 200)]] = False
    drawn = carpet_svg(bold, keep_mask, 2.0, None, "a")
    np.testing.assert_allclose(runs_in_red(drawn, 200), [[0, 2], [77, 78], [150, 151], [160, 200]], atol=0.05)
    assert ">censored<" in drawn
    everything = carpet_svg(bold, np.ones(200, dtype=bool), 2.0, None, "a")
    assert runs_in_red(everything, 200) == []
    assert "censored" not in everything


def test_a_network_is_named_beside_its_parcels_and_divided_from_the_next(rng):
    drawn = carpet_svg(rng.normal(size=(60, P)).astype(np.float32), np.ones(60, dtype=bool), 2.0, NETWORKS, "a")
    names = [html.unescape(name) for name in re.findall(r"text-anchor=\"end\"[^>]*>(.*?)<", drawn)]
    assert names == ["Vis", "Default", "Limbic", "no network"]
    assert len(re.findall(r"M126 [\d.]+h720", drawn)) == 3
    assert ">Parcels<" in carpet_svg(np.ones((60, P), dtype=np.float32), np.ones(60, dtype=bool), 2.0, None, "a")


def test_recordings_without_any_parcel_or_with_one_timepoint_are_drawn(rng):
    nothing = np.full((60, P), np.nan, dtype=np.float32)
    assert "base64" not in carpet_svg(nothing, np.ones(60, dtype=bool), 2.0, NETWORKS, "a")
    assert greys(carpet_svg(np.ones((1, P), dtype=np.float32), np.ones(1, dtype=bool), 2.0, None, "a")).shape == (P, 1)


def test_a_long_recording_in_a_fine_atlas_gives_a_small_picture(rng):
    bold = rng.normal(size=(9000, 700)).astype(np.float32)
    assert len(carpet_svg(bold, np.ones(9000, dtype=bool), 0.5, None, "a")) < 260_000


def test_worst_covered_parcels_are_listed_first(rng):
    coverage = np.array([1, 0.5, 1, 0.02, 0.9, 1, 1, 1], dtype=np.float32)
    page = quality_page(report(rng, parcel_coverage=coverage, contract=contract(uncovered=(3,)))[0])
    assert "Covered by no train recording: parcel3" in page
    assert table_after(page, "Parcels")[1:] == [
        ["parcel3", "Vis", "2.0%"],
        ["parcel1", "Default", "50.0%"],
        ["parcel4", "Default", "90.0%"],
    ]


def test_many_recordings_and_refusals_give_a_small_page_quickly(rng):
    refused = [
        {"recording_id": f"r{n:06d}", "subject": str(n), "stage": "read", "reason": f"{'x' * (n % 97)} {n}: broken"}
        for n in range(20_000)
    ]
    duplicates = [[f"a{n}", f"b{n}"] for n in range(5000)]
    warnings = [f"equal series under several ids: {', '.join(ids)}" for ids in duplicates]
    given, _ = report(rng, count=30_000, carpets=True, refused=refused, duplicates=duplicates, warnings=warnings)
    given.recordings["site"] = [f"site{n % 1000}" for n in range(30_000)]
    began = time.perf_counter()
    page = quality_page(given)
    assert time.perf_counter() - began < 60  # 2 where nothing else runs
    assert len(page) < 2_000_000
    assert "other reasons" in page
    assert "see rejected.parquet" in page
    assert "and 4800 more" in page


def test_columns_that_an_older_data_set_lacks_are_unknown(rng):
    given, _ = report(rng)
    new = ["num_kept", "duration_s", "tsnr", "mean_coverage", "num_constant_parcels", "denoised", "cohort"]
    older = QualityReport(**{**vars(given), "recordings": given.recordings.drop(columns=new)})
    assert "Temporal signal-to-noise ratio (images): unknown for all 12 recordings" in quality_page(older)


def test_what_was_done_before_is_shown_where_it_is_known(rng):
    given, _ = report(rng)
    assert "What was done before" not in quality_page(given)
    given.recordings["denoised"] = ["FIX"] * 5 + [""] * 7
    assert table_after(quality_page(given), "What was done before")[1:] == [["-", "7"], ["FIX", "5"]]


@pytest.mark.parametrize("value", [0.1, -3.0, 1e-12])
def test_values_that_differ_by_rounding_alone_are_told_as_one(rng, value):
    given, _ = report(rng)
    given.recordings["dvars_z"] = np.where(np.arange(12) < 6, value, np.nextafter(value, np.inf))
    assert given.recordings["dvars_z"].nunique() == 2
    assert re.search(rf"DVARS[^:]*: {value:g} in every recording", text_of(quality_page(given)))
