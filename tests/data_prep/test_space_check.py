"""What lies in the template space passes, stripped or not, whole or cut; what only claims to does not."""

import nibabel
import numpy as np
import pytest

from brainlm.errors import DataError
from data_prep.atlas_image import load_atlas
from data_prep.parcellate import parcellate
from data_prep.settings import AtlasSettings, CheckSettings

# 4 mm grid and an ellipsoid of the size and place of the MNI brain.
SHAPE = (46, 55, 46)
AFFINE = np.array([[-4.0, 0, 0, 90], [0, 4.0, 0, -126], [0, 0, 4.0, -72], [0, 0, 0, 1.0]])
CENTRE_MM, HALF_MM = np.array([0.0, -18.0, 8.0]), np.array([68.0, 86.0, 62.0])

# Brings the raw scan in pumi_raw_bold_5mm near to MNI: rigid and three scales, found by maximising the correlation of
# its bright voxels (above 0.2 of the 98th percentile) with nilearn's MNI152 brain mask by Nelder-Mead.
PUMI_IN_MNI = np.array(
    [[-5.55, 0.07, -0.13, 124.33], [0.08, 5.35, -0.14, -126.14], [-0.13, 0.14, 5.54, -57.03], [0, 0, 0, 1.0]]
)


def run(path, atlas, **checks):
    settings = CheckSettings(**checks)
    return parcellate(path, atlas, space="MNI152NLin6Asym", tr_s=2.0, tr_from="the test", checks=settings)


def radius(affine=AFFINE, shape=SHAPE):
    """Return for each voxel its distance from the centre in units of the brain's size."""
    mm = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    return np.sqrt((((mm - CENTRE_MM) / HALF_MM) ** 2).sum(axis=-1))


@pytest.fixture
def brain_atlas(tmp_path, rng):
    """Return an atlas with parcels in the outer third of the brain, with gaps, as cortex has."""
    where = (radius() < 1.0) & (radius() > 0.65) & (rng.random(SHAPE) < 0.7)
    labels = np.where(where, 1 + np.indices(SHAPE)[1] // 8, 0)
    image = nibabel.Nifti1Image(labels.astype(np.int16), AFFINE)
    image.header["sform_code"] = 4
    nibabel.save(image, tmp_path / "atlas.nii.gz")
    return load_atlas(AtlasSettings(image=str(tmp_path / "atlas.nii.gz"), name="shell"))


def head(rng, stripped=False):
    """Return a volume: brain, a dark rim, a dimmer scalp, and air."""
    r = radius()
    volume = np.select([r < 1.0, r < 1.06, r < 1.12], [800.0, 100.0, 250.0], 20.0) + 20 * rng.random(SHAPE)
    return np.where(r < 1.0, volume, 0) if stripped else volume


def write(path, volume, affine=AFFINE, times=(1.0, 1.01)):
    series = np.stack([volume * time for time in times], axis=-1)
    image = nibabel.Nifti1Image(series.astype(np.float32), affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header["pixdim"][4] = 2.0
    image.set_sform(affine, code=4)
    nibabel.save(image, path)
    return path


def moved_by(mm, affine=AFFINE):
    moved = affine.copy()
    moved[:3, 3] += mm
    return moved


@pytest.mark.parametrize("stripped", [True, False])
@pytest.mark.parametrize("rows", [slice(None), slice(12, None), slice(0, 32), slice(12, 34)])
def test_normalised_head_passes_stripped_or_not_whole_or_cut(tmp_path, brain_atlas, rng, stripped, rows):
    volume = head(rng, stripped) * np.linspace(1, 3, SHAPE[1])[:, None]  # with a field of bias
    affine = AFFINE.copy()
    affine[:3, 3] += affine[:3, 2] * (rows.start or 0)
    run(write(tmp_path / "a.nii", volume[:, :, rows], affine), brain_atlas)


@pytest.mark.parametrize("stripped", [True, False])
@pytest.mark.parametrize("mm", [(0, 20, 0), (0, 0, 20), (0, -10, 14), (12, -12, 12)])
def test_head_that_lies_elsewhere_is_refused_whatever_it_claims(tmp_path, brain_atlas, rng, stripped, mm):
    path = write(tmp_path / "a.nii", head(rng, stripped), moved_by(mm))
    with pytest.raises(DataError, match=r"whatever its header or name claims: the brain fits the atlas 0\.\d+"):
        run(path, brain_atlas, max_outside_brain=0.9)


def test_image_without_contrast_cannot_be_judged_and_passes(tmp_path, brain_atlas, rng):
    noise = rng.normal(size=SHAPE)  # such as per cent change, over the whole field of view
    run(write(tmp_path / "a.nii", noise), brain_atlas, max_outside_brain=0.9)


def test_atlas_of_a_part_of_the_brain_does_not_judge(tmp_path, rng):
    """Where signal drops out at the front, an atlas of the front fits better if moved back."""
    labels = ((radius() < 0.98) & (np.indices(SHAPE)[1] > 29)).astype(np.int16)
    image = nibabel.Nifti1Image(labels, AFFINE)
    image.header["sform_code"] = 4
    nibabel.save(image, tmp_path / "part.nii.gz")
    part = load_atlas(AtlasSettings(image=str(tmp_path / "part.nii.gz"), name="part"))
    volume = head(rng, stripped=True)
    volume[:, 39:] = 0
    run(write(tmp_path / "a.nii", volume), part)


BAD_AFFINES = {
    "not finite": np.diag([2.0, np.nan, 2.0, 1.0]),
    "flat": np.diag([2.0, 2.0, 0.0, 1.0]),
    "huge voxels": np.diag([3e38, 3e38, 3e38, 1.0]),
    "tiny voxels": np.diag([1e-30, 1e-30, 1e-30, 1.0]),
    "two equal axes": np.array([[2.0, 2, 0, 0], [0, 0.001, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]]),
    "far away": np.array([[2.0, 0, 0, 1e30], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("affine", BAD_AFFINES.values(), ids=BAD_AFFINES.keys())
def test_unusable_affine_is_refused(tmp_path, brain_atlas, rng, affine):
    path = write(tmp_path / "a.nii", head(rng))
    data = bytearray(path.read_bytes())
    data[280:328] = affine[:3].astype("<f4").tobytes()
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"affine is not usable .*expected voxels of 0.1 to 100 mm"):
        run(path, brain_atlas)


ATLASES = ["A424+2mm", "cc200_atlas_2mm", "aal116", "schaefer400_7n", "glasser360", "yeo7_liberal_2mm"]


@pytest.mark.parametrize("name", ATLASES)
def test_real_raw_scan_is_refused_with_an_edited_header_and_passes_once_normalised(shared_data, tmp_path, name):
    atlas = load_atlas(AtlasSettings(image=str(shared_data / "atlases" / f"{name}.nii.gz"), name="real"))
    raw = nibabel.load(shared_data / "pumi_raw_bold_5mm" / "sub-001_task-rest_bold.nii.gz")
    volumes = np.asarray(raw.dataobj[..., :2], dtype=np.float32)

    def with_affine(affine):
        image = nibabel.Nifti1Image(volumes, affine)
        image.header.set_xyzt_units("mm", "sec")
        image.header["pixdim"][4] = 2.0
        image.set_sform(affine, code=4)
        nibabel.save(image, tmp_path / "a.nii")
        return tmp_path / "a.nii"

    with pytest.raises(DataError, match="not in a template space"):
        run(with_affine(raw.affine), atlas)
    run(with_affine(PUMI_IN_MNI), atlas)
    for mm in ((0, 0, 20), (0, -15, 0)):
        with pytest.raises(DataError, match="not in a template space"):
            run(with_affine(moved_by(mm, PUMI_IN_MNI)), atlas)


@pytest.mark.parametrize("name", ATLASES)
def test_real_normalised_images_pass_whole_or_cut(shared_data, tmp_path, name):
    atlas = load_atlas(AtlasSettings(image=str(shared_data / "atlases" / f"{name}.nii.gz"), name="real"))
    template = nibabel.load(shared_data / "pumi_raw_bold_5mm" / "MNI152_T1_5mm_brain.nii.gz")
    painted = nibabel.load(next((shared_data / "semireal_painted_mni4mm").glob("*_bold.nii.gz")))
    for image, volume in ((template, template.dataobj), (painted, painted.dataobj[..., 0])):
        volume = np.asarray(volume, dtype=np.float32)
        run(write(tmp_path / "whole.nii", volume, image.affine), atlas)
        start = volume.shape[2] // 3
        affine = image.affine.copy()
        affine[:3, 3] += affine[:3, 2] * start
        run(write(tmp_path / "top.nii", volume[:, :, start:], affine), atlas, min_parcels=0.3)
        run(write(tmp_path / "low.nii", volume[:, :, : 2 * start], image.affine), atlas, min_parcels=0.3)
