"""Transforms between template spaces: direction, signs, order of steps, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
from scipy.io import savemat

from brainlm.errors import DataError
from data_prep.template_transform import (
    TransformFile,
    check_direction,
    find_transform,
    inverse_points,
    load_transform,
)

FLIP = np.array([-1.0, -1.0, 1.0])  # RAS to LPS and back
DIRECTION = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # LPS: a field with turned axes
SPACING = np.array([9.0, 11.0, 10.0])
ORIGIN = np.array([110.0, -110.0, -100.0])
SIZE = (26, 22, 24)


def affine_text(matrix: np.ndarray, translation: np.ndarray, centre: np.ndarray, kind: str = "AffineTransform") -> str:
    numbers = " ".join(repr(float(v)) for v in [*matrix.ravel(), *translation])
    fixed = " ".join(repr(float(v)) for v in centre)
    return (
        "#Insight Transform File V1.0\n#Transform 0\n"
        f"Transform: {kind}_double_3_3\nParameters: {numbers}\nFixedParameters: {fixed}\n"
    )


@pytest.fixture
def linear(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrix, translation and centre in LPS, as ITK stores them."""
    return np.eye(3) + rng.normal(scale=0.04, size=(3, 3)), rng.normal(scale=3, size=3), rng.normal(scale=20, size=3)


def apply_linear(linear: tuple[np.ndarray, np.ndarray, np.ndarray], ras: np.ndarray) -> np.ndarray:
    matrix, translation, centre = linear
    return np.array([FLIP * (matrix @ (FLIP * point - centre) + translation + centre) for point in ras])


@pytest.fixture
def points(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(-60, 60, size=(200, 3))


@pytest.fixture
def shifts(rng: np.random.Generator) -> np.ndarray:
    """Smooth shifts in LPS millimetres, shape (*SIZE, 3), at the voxels of the field."""
    phase = rng.uniform(0, 6, size=(3, 3))
    voxel = np.stack(np.meshgrid(*[np.arange(n) for n in SIZE], indexing="ij"), axis=-1)
    return np.stack([4 * np.sin(voxel / 8 + phase[axis]).sum(axis=-1) for axis in range(3)], axis=-1)


def voxels_ras() -> np.ndarray:
    voxel = np.stack(np.meshgrid(*[np.arange(n) for n in SIZE], indexing="ij"), axis=-1).reshape(-1, 3)
    return FLIP * (voxel @ (DIRECTION * SPACING).T + ORIGIN)


def write_field(path: Path, shifts: np.ndarray) -> Path:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = FLIP[:, None] * (DIRECTION * SPACING), FLIP * ORIGIN
    image = nibabel.Nifti1Image(shifts[..., None, :].astype(np.float32), affine)
    image.header.set_intent("vector")
    nibabel.save(image, path)
    return path


def write_composite(path: Path, parts: list, spelling: str = "Transform") -> Path:
    """Write ITK's .h5: a part is the linear triple, or the shifts of a field."""
    with h5py.File(path, "w") as file:
        group = file.create_group("TransformGroup")
        group.create_group("0")["TransformType"] = [b"CompositeTransform_double_3_3"]
        for number, part in enumerate(parts, 1):
            one = group.create_group(str(number))
            if isinstance(part, tuple):
                kind, fixed = b"AffineTransform_double_3_3", part[2]
                parameters = np.concatenate([part[0].ravel(), part[1]])
            else:
                kind = b"DisplacementFieldTransform_double_3_3"
                fixed = np.concatenate([SIZE, ORIGIN, SPACING, DIRECTION.ravel()])
                parameters = part.transpose(2, 1, 0, 3).ravel()  # vector fastest, then x, y, z
            one["TransformType"] = [kind]
            one[f"{spelling}Parameters"], one[f"{spelling}FixedParameters"] = parameters, fixed
    return path


def test_an_affine_turns_millimetres_to_the_right_into_itks_to_the_left(tmp_path):
    """What stands 4 mm further right in the images than in the atlas: the atlas point of an image point lies left."""
    path = tmp_path / "shift.txt"
    path.write_text(affine_text(np.eye(3), np.array([4.0, 1.0, -2.0]), np.zeros(3)))
    moved = load_transform(path)(np.array([[14.0, 20.0, 30.0]]))
    np.testing.assert_allclose(moved, [[10.0, 19.0, 28.0]])


@pytest.mark.parametrize("form", ["txt", "tfm", "offset", "mat", "h5", "old h5"])
def test_an_affine_reads_alike_from_every_form(tmp_path, linear, points, form):
    path = tmp_path / f"affine.{form.split()[-1] if form != 'offset' else 'txt'}"
    if form == "mat":
        parameters = np.concatenate([linear[0].ravel(), linear[1]])[:, None]
        savemat(path, {"AffineTransform_double_3_3": parameters, "fixed": linear[2][:, None]}, format="4")
    elif "h5" in form:
        write_composite(path, [linear], spelling="Tranform" if form == "old h5" else "Transform")
    else:
        path.write_text(
            affine_text(*linear, kind="MatrixOffsetTransformBase" if form == "offset" else "AffineTransform")
        )
    np.testing.assert_allclose(load_transform(path)(points), apply_linear(linear, points), atol=1e-9)


@pytest.mark.parametrize("form", ["field.nii.gz", "field.nii", "field.h5"])
def test_a_field_moves_its_own_voxels_by_exactly_their_shift(tmp_path, shifts, form):
    path = tmp_path / form
    write_composite(path, [shifts]) if form.endswith("h5") else write_field(path, shifts)
    ras = voxels_ras()
    np.testing.assert_allclose(load_transform(path)(ras), ras + FLIP * shifts.reshape(-1, 3), atol=1e-4)


def test_a_field_is_linear_between_voxels_and_ends_at_its_edge(tmp_path, shifts):
    transform = load_transform(write_field(tmp_path / "f.nii", shifts))
    corners = voxels_ras().reshape(*SIZE, 3)[4:6, 7:9, 9:11].reshape(-1, 3)
    middle = corners.mean(axis=0, keepdims=True)
    expected = middle + FLIP * shifts[4:6, 7:9, 9:11].reshape(-1, 3).mean(axis=0)
    np.testing.assert_allclose(transform(middle), expected, atol=1e-4)
    far = np.array([[300.0, 0.0, 0.0], [0.0, -400.0, 0.0]])
    np.testing.assert_array_equal(transform(far), far)


def test_a_composite_applies_its_last_transform_first(tmp_path, linear, shifts, points):
    field = load_transform(write_field(tmp_path / "f.nii.gz", shifts))
    found = load_transform(write_composite(tmp_path / "c.h5", [linear, shifts]))(points)
    np.testing.assert_allclose(found, apply_linear(linear, field(points)), atol=1e-4)
    other = load_transform(write_composite(tmp_path / "d.h5", [shifts, linear]))(points)
    np.testing.assert_allclose(other, field(apply_linear(linear, points)), atol=1e-4)
    assert np.abs(found - other).max() > 0.1


def test_more_than_nine_steps_keep_their_order(tmp_path, rng):
    parts = [(np.eye(3) + rng.normal(scale=0.02, size=(3, 3)), rng.normal(size=3), np.zeros(3)) for _ in range(12)]
    start = np.array([[10.0, 20.0, 30.0]])
    expected = start
    for part in parts[::-1]:
        expected = apply_linear(part, expected)
    np.testing.assert_allclose(load_transform(write_composite(tmp_path / "c.h5", parts))(start), expected, atol=1e-9)


def test_another_implementation_agrees(tmp_path, linear, shifts, points):
    manip = pytest.importorskip("nitransforms.manip", reason="nitransforms, the second opinion, is not installed")
    path = write_composite(tmp_path / "c.h5", [linear, shifts])
    theirs = manip.TransformChain.from_filename(path, fmt="itk")
    on_voxels = voxels_ras().reshape(*SIZE, 3)[8:18, 8:14, 8:16].reshape(-1, 3)
    np.testing.assert_allclose(load_transform(path)(on_voxels), theirs.map(on_voxels), atol=1e-3)
    # Between voxels theirs is a cubic spline, ITK's and ours linear.
    np.testing.assert_allclose(load_transform(path)(points), theirs.map(points), atol=0.2)


def test_a_text_composite_applies_its_last_transform_first(tmp_path, rng):
    parts = [(np.eye(3) + rng.normal(scale=0.05, size=(3, 3)), rng.normal(size=3), np.zeros(3)) for _ in range(2)]
    one, two = (affine_text(*part).split("\n", 2)[2] for part in parts)
    head = "#Insight Transform File V1.0\n#Transform 0\nTransform: CompositeTransform_double_3_3\n"
    (tmp_path / "c.tfm").write_text(f"{head}#Transform 1\n{one}#Transform 2\n{two}")
    start = rng.uniform(-50, 50, (5, 3))
    expected = apply_linear(parts[0], apply_linear(parts[1], start))
    np.testing.assert_allclose(load_transform(tmp_path / "c.tfm")(start), expected, atol=1e-9)


def test_inverse_points_are_taken_back(tmp_path, linear, shifts, points):
    transform = load_transform(write_composite(tmp_path / "c.h5", [linear, shifts]))
    np.testing.assert_allclose(transform(inverse_points(transform, points)), points, atol=0.11)


def test_a_point_without_an_inverse_is_not_made_up():
    def flattens(mm: np.ndarray) -> np.ndarray:
        return np.clip(mm, 0.0, 10.0)

    found = inverse_points(flattens, np.array([[5.0, 5.0, 5.0], [-5.0, 5.0, 5.0]]))
    np.testing.assert_allclose(found[0], 5.0)
    assert np.isnan(found[1]).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpl-MNI152NLin2009cAsym_from-MNI152NLin6Asym_mode-image_xfm.h5", None),
        ("from-MNI152NLin6Asym_to-MNI152NLin2009cAsym_mode-image_xfm.h5", None),
        ("my_warp.nii.gz", None),
        (
            "tpl-MNI152NLin6Asym_from-MNI152NLin2009cAsym_mode-image_xfm.h5",
            "by its name it brings them from MNI152NLin2009",
        ),
        ("from-MNI152NLin6Asym_to-T1w_mode-image_xfm.h5", "to T1w"),
        ("from-MNI152NLin6Asym_to-MNI152NLin2009cAsym_mode-points_xfm.h5", "this one is mode-points"),
    ],
)
def test_a_name_that_leads_the_wrong_way_is_refused(name: str, message: str | None) -> None:
    arguments = (f"/somewhere/{name}", "MNI152NLin2009cAsym", "MNI152NLin6Asym")
    if message is None:
        check_direction(*arguments)
    else:
        with pytest.raises(DataError, match=message):
            check_direction(*arguments)


def _positions(path: Path, shifts: np.ndarray) -> Path:
    positions = (FLIP * voxels_ras()).reshape(*SIZE, 3)
    return write_field(path / "f.nii", shifts + positions)


def _spm(path: Path, shifts: np.ndarray) -> Path:
    write_field(path / "f.nii", shifts)
    image = nibabel.load(path / "f.nii")
    image.header.set_intent("vector", name="Mapping")
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header), path / "y.nii")
    return path / "y.nii"


def _fsl(path: Path, shifts: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(shifts.astype(np.float32), np.eye(4)), path / "warp.nii.gz")
    return path / "warp.nii.gz"


def _text(path: Path, text: str) -> Path:
    (path / "t.txt").write_text(text)
    return path / "t.txt"


def _holes(path: Path, shifts: np.ndarray) -> Path:
    return write_field(path / "f.nii", np.where(shifts > 9, np.nan, shifts))


def _huge(path: Path, shifts: np.ndarray) -> Path:
    write_composite(path / "h.h5", [shifts])
    with h5py.File(path / "h.h5", "a") as file:
        file["TransformGroup/1/TransformFixedParameters"][:3] = 1e5
    return path / "h.h5"


def _cut(path: Path, shifts: np.ndarray) -> Path:
    write_composite(path / "h.h5", [shifts])
    (path / "h.h5").write_bytes((path / "h.h5").read_bytes()[:50_000])
    return path / "h.h5"


MIRROR = affine_text(np.diag([-1.0, 1, 1]), np.zeros(3), np.zeros(3))
FAR = affine_text(np.eye(3), np.array([0.0, 80.0, 0.0]), np.zeros(3))
EULER = affine_text(np.eye(3), np.zeros(3), np.zeros(3), kind="Euler3DTransform")
FLAT = affine_text(np.diag([1.0, 0, 1]), np.zeros(3), np.zeros(3))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_positions, "moves the brain by"),
        (_spm, "field of positions"),
        (_fsl, r"shape \(X, Y, Z, 1, 3\), found \(26, 22, 24, 3\)"),
        (_holes, "not finite"),
        (_huge, "not believable"),
        (_cut, "not a readable ITK transform"),
        (lambda path, _: _text(path, MIRROR), "mirrors"),
        (lambda path, _: _text(path, FAR), "moves the brain by 80 mm"),
        (lambda path, _: _text(path, EULER), "Euler3DTransform_double_3_3"),
        (lambda path, _: _text(path, FLAT), "not usable"),
        (lambda path, _: _text(path, "1 0 0 0\n0 1 0 0\n"), "begins with '#Insight"),
        (lambda path, _: _text(path, MIRROR + MIRROR.split("\n", 1)[1]), "one CompositeTransform, found 2"),
        (lambda path, _: path / "none.lta", "expected a transform"),
    ],
)
def test_what_is_no_transform_between_templates_is_refused(
    tmp_path: Path, shifts: np.ndarray, write: Callable[[Path, np.ndarray], Path], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_transform(write(tmp_path, shifts))


def test_a_transform_that_changes_while_the_work_goes_on_is_refused(tmp_path):
    path = tmp_path / "shift.txt"
    path.write_text(affine_text(np.eye(3), np.array([4.0, 0, 0]), np.zeros(3)))
    travelling = find_transform(str(path), "MNI152NLin2009cAsym", "MNI152NLin6Asym")
    assert travelling == TransformFile(str(path), travelling.sha256)
    np.testing.assert_allclose(travelling.load()(np.zeros((1, 3))), [[-4.0, 0, 0]])
    path.write_text(affine_text(np.eye(3), np.array([5.0, 0, 0]), np.zeros(3)))
    with pytest.raises(DataError, match="has changed"):
        travelling.load()


def test_a_missing_transform_names_its_setting(tmp_path):
    with pytest.raises(DataError, match=r"atlas\.transforms\.MNI152NLin2009cAsym"):
        find_transform(str(tmp_path / "none.h5"), "MNI152NLin2009cAsym", "MNI152NLin6Asym")
