"""Headers that lie, bombs, cut files: refused with the reason, in little memory. True ones are read as they are."""

import gzip
import os
import threading
import tracemalloc

import nibabel
import numpy as np
import pytest

from brainlm.errors import DataError
from data_prep.nifti_stream import AHEAD_VOLUMES, MAX_TIMEPOINTS, NiftiStream

SHAPE = (5, 6, 7, 4)
SMALL = 6 * 2**20  # bytes: buffers, whatever a header announces


@pytest.fixture
def voxels(rng):
    return rng.integers(-1000, 30000, SHAPE).astype(np.int16)


def header_of(shape, dtype=np.int16, version=1, order="<", **fields):
    header = (nibabel.Nifti1Header if version == 1 else nibabel.Nifti2Header)(endianness=order)
    header.set_data_dtype(np.dtype(dtype).newbyteorder(order))
    header["dim"] = [len(shape), *shape, *[1] * (7 - len(shape))]
    header["pixdim"][1:5] = 2
    header["magic"] = b"n+1" if version == 1 else b"n+2\0\r\n\x1a\n"
    header["vox_offset"] = 352 if version == 1 else 544
    header["sform_code"] = 4
    header["srow_x"], header["srow_y"], header["srow_z"] = np.diag([2.0, 2.0, 2.0, 1.0])[:3]
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + b"\0" * 4


def write(path, *parts):
    data = b"".join(parts)
    path.write_bytes(gzip.compress(data, 6) if path.suffix == ".gz" else data)
    return path


def read(path):
    with NiftiStream(path) as image:
        return [volume.copy() for volume in image.volumes()]


def refused(path, match):
    """Check that the file is refused with this reason, in little memory."""
    read_nothing(path)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=match):
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < SMALL


def read_nothing(path):
    """Import what reading imports, so that it does not count as memory of the file."""
    with pytest.raises(DataError):
        NiftiStream(path.with_name("absent.nii"))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_volumes_come_as_stored(tmp_path, voxels, version, order, name):
    stored = voxels.astype(voxels.dtype.newbyteorder(order))
    path = write(tmp_path / name, header_of(SHAPE, version=version, order=order), stored.tobytes(order="F"))
    np.testing.assert_array_equal(np.reshape(read(path), voxels.T.shape).T, voxels)
    with NiftiStream(path) as image:
        assert image.header.shape == SHAPE[:3]
        assert image.header.num_volumes == 4
        np.testing.assert_array_equal(image.header.affine, np.diag([2, 2, 2, 1]))


def test_bytes_and_not_the_name_tell_whether_a_file_is_compressed(tmp_path, voxels):
    parts = header_of(SHAPE), voxels.tobytes(order="F")
    packed = write(tmp_path / "a.nii.gz", *parts).rename(tmp_path / "packed.nii")
    plain = write(tmp_path / "a.nii", *parts).rename(tmp_path / "plain.nii.gz")
    for path in (packed, plain):
        np.testing.assert_array_equal(np.reshape(read(path), voxels.T.shape).T, voxels)


def test_axes_of_one_element_after_time_are_dropped(tmp_path, voxels):
    path = write(tmp_path / "a.nii", header_of((*SHAPE, 1, 1)), voxels.tobytes(order="F"))
    assert len(read(path)) == 4


def test_extensions_are_skipped_unseen_whatever_size_they_claim(tmp_path, voxels):
    extension = b"\1\0\0\0" + np.array([2**31 - 16, 4], "<i4").tobytes() + b"cos\nsystem\n" + b"x" * 77
    offset = 348 + len(extension)
    block = header_of(SHAPE, vox_offset=offset)[:348]
    for name in ("a.nii", "a.nii.gz"):
        path = write(tmp_path / name, block, extension, voxels.tobytes(order="F"))
        np.testing.assert_array_equal(np.reshape(read(path), voxels.T.shape).T, voxels)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((32767, 32767, 32767, 32767), r"announces 32767 volumes: recordings of at most 20000 timepoints"),
        ((32767, 32767, 32767, 10), r"volumes of 32767x32767x32767 voxels, 6710\d+ MiB each: at most"),
        ((32767, 32767, 1, 10), r"volumes of 32767x32767x1 voxels, 2048 MiB each"),
        ((4096, 4096, 3, 10), r"volumes of 4096x4096x3 voxels, 96 MiB each: at most 33554432 voxels"),
        ((5, -6, 7, 4), r"found shape \(5, -6, 7, 4\)"),
        ((5, 6, 0, 4), r"found shape \(5, 6, 0, 4\)"),
        ((5, 6, 7, -4), r"found shape \(5, 6, 7, -4\)"),
        ((5, 6, 7), r"4-D image \(x, y, z, time\), found shape \(5, 6, 7\)"),
        ((5, 6, 7, 1), r"found shape \(5, 6, 7, 1\)"),
        ((5, 6, 7, 1, 4), r"found shape \(5, 6, 7, 1, 4\)"),
        ((200, 200, 200, 20000), r"cut off"),
    ],
)
def test_absurd_dimensions_are_refused_before_anything_is_allocated(tmp_path, voxels, name, shape, match):
    refused(write(tmp_path / name, header_of(shape), voxels.tobytes()), match)


@pytest.mark.parametrize("number", [-3, 0, 8, 30000])
def test_absurd_number_of_axes_is_refused(tmp_path, voxels, number):
    block = bytearray(header_of(SHAPE))
    block[40:42] = np.array(number, "<i2").tobytes()
    refused(write(tmp_path / "a.nii", block, voxels.tobytes()), f"found {number} axes")


@pytest.mark.parametrize("shape", [(2**62, 2**62, 4, 2**62), (2**31, 2**31, 4, 2), (2, 2, 2, 2**61)])
def test_products_beyond_64_bits_are_refused(tmp_path, voxels, shape):
    refused(write(tmp_path / "a.nii.gz", header_of(shape, version=2), voxels.tobytes()), "announces")


def test_longest_recording_is_read_and_a_longer_one_refused(tmp_path):
    for number in (MAX_TIMEPOINTS, MAX_TIMEPOINTS + 1):
        data = np.zeros((2, 2, 2, number), np.uint8).tobytes()
        path = write(tmp_path / f"{number}.nii.gz", header_of((2, 2, 2, number), np.uint8), data)
        if number > MAX_TIMEPOINTS:
            refused(path, "20001 volumes: recordings of at most 20000 timepoints .* memory stays bounded")
        else:
            with NiftiStream(path) as image:
                assert sum(1 for _ in image.volumes()) == number


@pytest.mark.parametrize("offset", [0, 348, -352, 352.5, 1e9, 3e38, np.nan, np.inf])
def test_absurd_offset_of_the_voxels_is_refused(tmp_path, voxels, offset):
    path = write(tmp_path / "a.nii.gz", header_of(SHAPE, vox_offset=offset), voxels.tobytes())
    refused(path, r"voxels begin at byte .*: expected 352 to \d+")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_offset_beyond_the_file_is_refused(tmp_path, voxels, name):
    block = header_of(SHAPE, vox_offset=60 * 2**20)
    refused(write(tmp_path / name, block, voxels.tobytes()), "cut off")
    # Enough bytes for a gzip file of this size, but they are not there.
    noise = np.random.default_rng(0).bytes(70000)
    refused(write(tmp_path / "b.nii.gz", block, noise), "cut off in volume 1 of 4: the file ends before")


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128, [("R", "u1"), ("G", "u1"), ("B", "u1")]])
def test_voxels_that_are_no_signal_are_refused(tmp_path, voxels, dtype):
    refused(write(tmp_path / "a.nii", header_of(SHAPE, dtype), voxels.tobytes() * 8), "not a signal")


@pytest.mark.parametrize("code", [0, 1, 3, 9999])
def test_voxels_of_an_unknown_type_are_refused(tmp_path, voxels, code):
    refused(write(tmp_path / "a.nii", header_of(SHAPE, datatype=code), voxels.tobytes()), "voxels of")


def test_infinite_intercept_is_refused(tmp_path, voxels):
    block = header_of(SHAPE, scl_slope=1, scl_inter=np.inf)
    refused(write(tmp_path / "a.nii", block, voxels.tobytes()), "scales the voxels by 1 and adds inf")


def test_other_kinds_of_files_are_named(tmp_path, voxels):
    data = voxels.tobytes()
    refused(write(tmp_path / "pair.nii", header_of(SHAPE, magic=b"ni1"), data), "lie in another file")
    refused(write(tmp_path / "analyze.nii", header_of(SHAPE, magic=b""), data), "NIfTI image in one file")
    refused(write(tmp_path / "cifti.nii", header_of(SHAPE, version=2, intent_code=3002), data), "CIFTI")
    refused(write(tmp_path / "empty.nii"), "not a NIfTI image")
    refused(write(tmp_path / "short.nii", header_of(SHAPE)[:200]), "not a NIfTI image")
    refused(write(tmp_path / "two.nii", header_of(SHAPE, version=2)[:400]), "not a NIfTI image")
    (tmp_path / "garbage.nii.gz").write_bytes(b"\x1f\x8b" + bytes(range(200)))
    refused(tmp_path / "garbage.nii.gz", "cannot be read")
    os.mkfifo(tmp_path / "pipe.nii")
    refused(tmp_path / "pipe.nii", "no file")  # and nobody waits for a writer


def test_more_than_a_gzip_file_can_hold_is_refused_before_reading(tmp_path):
    block = header_of((64, 64, 64, 500))
    path = write(tmp_path / "a.nii.gz", block, b"\0" * 100_000)
    refused(path, rf"262\d+ bytes, more than a gzip file of {path.stat().st_size} bytes can hold: cut off")


def test_the_most_compressible_image_there_is_is_read(tmp_path):
    shape = (64, 64, 64, 20)
    path = write(tmp_path / "a.nii.gz", header_of(shape, np.uint8), bytes(64**3 * 20))
    assert 64**3 * 20 / path.stat().st_size > 950
    assert len(read(path)) == 20


def test_gzip_bomb_behind_the_voxels_is_not_unpacked(tmp_path, voxels):
    path = write(tmp_path / "a.nii.gz", header_of(SHAPE), voxels.tobytes(), bytes(300 * 2**20))
    refused(path, "data go on after volume 4, the last that the header announces")


def test_gzip_bomb_in_place_of_extensions_is_not_kept(tmp_path, voxels):
    offset = 50 * 2**20
    path = write(tmp_path / "a.nii.gz", header_of(SHAPE, vox_offset=offset), bytes(offset - 352), voxels.tobytes()[:-1])
    refused(path, "cut off: the file ends in volume 4 of 4")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_one_volume_more_than_the_header_says_is_refused_and_padding_is_not(tmp_path, voxels, name):
    short = header_of((*SHAPE[:3], 3))
    data = voxels.tobytes(order="F")
    refused(write(tmp_path / name, short, data), "not what its header says")
    if name == "a.nii":  # the size of the file tells without reading it
        with pytest.raises(DataError, match="but the file has 2032"):
            NiftiStream(tmp_path / name)
    assert len(read(write(tmp_path / name, header_of(SHAPE), data, bytes(100)))) == 4


@pytest.mark.parametrize("position", [-8, -6, -3, -1])
def test_wrong_checksum_at_the_end_is_damage(tmp_path, rng, position):
    path = write(tmp_path / "a.nii.gz", header_of((40, 40, 40, 4)), rng.bytes(40**3 * 8))
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    refused(path, "damaged or cut off in volume 4 of 4")


def test_several_gzip_members_are_one_image(tmp_path, voxels):
    data = header_of(SHAPE) + voxels.tobytes(order="F")
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(data[:500]) + gzip.compress(data[500:]))
    np.testing.assert_array_equal(np.reshape(read(path), voxels.T.shape).T, voxels)


def test_stopping_early_leaves_no_thread(tmp_path, voxels):
    path = write(tmp_path / "a.nii.gz", header_of(SHAPE), voxels.tobytes(order="F"))
    with NiftiStream(path) as image:
        volumes = image.volumes()
        next(volumes)
        assert any(thread.name.startswith("nifti") for thread in threading.enumerate())
        volumes.close()
    assert not any(thread.name.startswith("nifti") for thread in threading.enumerate())


def test_memory_holds_a_few_volumes_whatever_their_number(tmp_path, rng):
    volume = rng.integers(0, 9, (64, 64, 32)).astype(np.int16)
    path = write(tmp_path / "a.nii.gz", header_of((64, 64, 32, 60)), volume.tobytes() * 60)
    with NiftiStream(path) as image:
        tracemalloc.start()
        for _ in image.volumes():
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < (AHEAD_VOLUMES + 2) * volume.nbytes + 500_000


def test_any_header_is_read_or_refused(tmp_path, voxels, rng):
    """Random bytes in a header: never another error than ours."""
    outcomes = []
    for version, size in ((1, 348), (2, 540)):
        block = header_of(SHAPE, version=version)
        for _ in range(300):
            damaged = bytearray(block)
            for position in rng.integers(0, size, rng.integers(1, 20)):
                damaged[position] = rng.integers(0, 256)
            path = write(tmp_path / "a.nii", damaged, voxels.tobytes(order="F"))
            try:
                outcomes.append(len(read(path)) > 0)
            except DataError:
                outcomes.append(False)
    assert 20 < sum(outcomes) < 580
