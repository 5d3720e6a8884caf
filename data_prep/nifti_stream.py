"""Open a 4-D NIfTI image and hand out its volumes, one after the other, in bounded memory.

A header is a claim by whoever wrote the file. It is held against the size of the file before anything of that size is
allocated, against limits of ours, and at the end against the bytes that were really there. Nothing but numbers is read:
header extensions are skipped unseen.

The file is read once, from front to end. A thread decompresses a few volumes ahead while the caller computes with the
last one; both release the interpreter's lock for nearly all of their time.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self, cast

import numpy as np
from isal import igzip, isal_zlib
from numpy.typing import NDArray

from brainlm.errors import DataError

MIB = 2**20
MAX_TIMEPOINTS = 20_000  # 4 h at a TR of 0.72 s; bounds what a worker keeps of one recording
MAX_VOLUME_BYTES = 128 * MIB  # a whole head at 0.8 mm in float64 fits
MAX_VOXELS = 2**25  # of a volume: what is kept a voxel may be larger than the voxel
MAX_OFFSET = 64 * MIB  # header and its extensions
MAX_EXTENSION = 32 * MIB  # the XML of CIFTI for 170,000 grayordinates takes a few
MAX_PADDING = 4096  # bytes after the last volume that are no sign of another image than the header's
MAX_INFLATION = 1032  # deflate: at least 2 bits for at most 258 bytes (zlib's technical details)
AHEAD_VOLUMES, AHEAD_BYTES = 4, 32 * MIB  # decompressed before they are asked for, at most
CHUNK_BYTES = MIB

# sizeof_hdr, magic of a header in the same file as its data, smallest offset of the data
FORMATS = {348: (b"n+1\0", 352), 540: (b"n+2\0\r\n\x1a\n", 544)}
SECONDS_PER_UNIT = {0: 1.0, 8: 1.0, 16: 1e-3, 24: 1e-6}  # by the NIfTI code of the fourth axis' unit; 0 = not said
UNIT_NAMES = {32: "Hz", 40: "ppm", 48: "rad/s"}
CIFTI_INTENTS = range(3000, 3100)
DAMAGE = (EOFError, zlib.error, cast(type[Exception], isal_zlib.error), gzip.BadGzipFile)


@dataclass(frozen=True, kw_only=True)
class NiftiHeader:
    """What the header of a 4-D image says, checked.

    Attributes
    ----------
    shape : tuple of int
        Of a volume: (X, Y, Z).
    num_volumes : int
    dtype : dtype
        Of the stored values, byte order included: integer or float.
    slope, inter : float
        A stored value v stands for ``slope * v + inter``.
    offset : int
        Bytes before the first volume.
    affine : ndarray, shape (4, 4)
        From voxel indices to mm: the sform if set, else the qform, else voxel sizes alone.
    qform_code, sform_code : int
        What the coordinates refer to; 0 = nothing.
    tr_s : float or None
        None where the header has no usable number.
    """

    shape: tuple[int, int, int]
    num_volumes: int
    dtype: np.dtype[Any]
    slope: float
    inter: float
    offset: int
    affine: NDArray[np.float64]
    qform_code: int
    sform_code: int
    tr_s: float | None

    @property
    def num_voxels(self) -> int:
        """Voxels of a volume."""
        return math.prod(self.shape)

    @property
    def volume_bytes(self) -> int:
        """Bytes of a volume as stored."""
        return self.num_voxels * self.dtype.itemsize

    @property
    def is_scaled(self) -> bool:
        """Whether stored values are not the values themselves."""
        return self.slope != 1.0 or self.inter != 0.0


class NiftiStream:
    """A 4-D NIfTI-1 or NIfTI-2 image, compressed or not, opened and its header checked.

    Parameters
    ----------
    path : path
        Whether it is compressed shows in its first bytes, not in its name.

    Raises
    ------
    DataError
        If there is no such file, if it is no 4-D NIfTI image of integers or floats, or if the header announces
        something that cannot be true of a file of this size, or that is larger than the limits of this module.
    """

    header: NiftiHeader

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise DataError(f"there is no file {path.name}")
        self._file_bytes = path.stat().st_size
        with path.open("rb") as file:
            self._compressed = file.read(2) == b"\x1f\x8b"
        self._stream = cast(IO[bytes], igzip.open(path, "rb") if self._compressed else path.open("rb"))
        try:
            self.header = self._read_header()
            self._check_size()
        except BaseException as error:
            self._stream.close()
            if isinstance(error, DAMAGE):
                raise DataError(f"the image cannot be read: {error}") from error
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def volumes(self) -> Generator[NDArray[Any], None, None]:
        """Yield each volume as stored values, flat, first axis fastest. Once only; close it to stop early.

        Raises
        ------
        DataError
            If the data are damaged, end early, or go on after the last volume that the header announces.
        """
        number = self.header.num_volumes
        depth = max(1, min(AHEAD_VOLUMES, AHEAD_BYTES // self.header.volume_bytes))
        # One thread, so that the reads are in order; at most `depth` of them are done or under way.
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nifti")
        try:
            reads: deque[Future[bytes]] = deque(pool.submit(self._read_volume, k) for k in range(min(depth, number)))
            for k in range(number):
                data = reads.popleft().result()
                if k + depth < number:
                    reads.append(pool.submit(self._read_volume, k + depth))
                yield np.frombuffer(data, dtype=self.header.dtype)
        finally:
            pool.shutdown(cancel_futures=True)

    def _read_header(self) -> NiftiHeader:
        import nibabel
        from nibabel.spatialimages import HeaderDataError

        block = self._stream.read(348)
        order = next((o for o in ("<", ">") for size in FORMATS if block[:4] == np.array(size, f"{o}i4").tobytes()), "")
        size = int(np.frombuffer(block[:4], f"{order}i4")[0]) if order else 0
        block += self._stream.read(max(size - 348, 0))
        if not order or len(block) < size:
            raise DataError("not a NIfTI image: it does not begin with a NIfTI header")
        header: Any = (nibabel.Nifti1Header if size == 348 else nibabel.Nifti2Header)(block, order, check=False)
        self._header_bytes = size
        magic, least_offset = FORMATS[size]
        found = bytes(block[344:348] if size == 348 else block[4:12])
        if found != magic:
            hint = ": its voxels lie in another file, and one .nii is expected" if found[:2] == b"ni" else ""
            raise DataError(f"not a NIfTI image in one file: expected the mark {magic!r}, found {found!r}{hint}")
        if int(header["intent_code"]) in CIFTI_INTENTS:
            raise DataError("expected a NIfTI volume image, found CIFTI (grayordinates)")
        shape = _shape(header)
        try:
            dtype = header.get_data_dtype()
        except (HeaderDataError, KeyError) as error:
            raise DataError(f"voxels of an unknown type (code {int(header['datatype'])})") from error
        if dtype.kind not in "iuf":
            raise DataError(f"voxels of type {dtype} are not a signal: expected integers or floats")
        slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
        if slope == 0.0 or not math.isfinite(slope):  # the standard: not scaled
            slope, inter = 1.0, 0.0
        if not math.isfinite(inter):
            raise DataError(f"the header scales the voxels by {slope:g} and adds {inter:g}")
        offset = float(header["vox_offset"])
        if not least_offset <= offset <= MAX_OFFSET or offset % 1:
            raise DataError(
                f"the header says that the voxels begin at byte {offset:g}: expected {least_offset} to {MAX_OFFSET}"
            )
        try:
            with np.errstate(all="ignore"):
                affine = np.asarray(header.get_best_affine(), dtype=np.float64)
        except (HeaderDataError, ValueError) as error:
            raise DataError(f"the header's orientation is not usable: {error}") from error
        return NiftiHeader(
            shape=(shape[0], shape[1], shape[2]),
            num_volumes=shape[3],
            dtype=dtype,
            slope=slope,
            inter=inter,
            offset=int(offset),
            affine=affine,
            qform_code=int(header["qform_code"]),
            sform_code=int(header["sform_code"]),
            tr_s=_repetition_time(header),
        )

    def _check_size(self) -> None:
        """Hold what the header announces against our limits and the file's size, in integers that never overflow."""
        header = self.header
        shape = "x".join(map(str, header.shape))
        if header.num_volumes > MAX_TIMEPOINTS:
            raise DataError(
                f"the header announces {header.num_volumes} volumes: recordings of at most {MAX_TIMEPOINTS} timepoints "
                "are prepared, so that memory stays bounded; cut it in parts"
            )
        if header.volume_bytes > MAX_VOLUME_BYTES or header.num_voxels > MAX_VOXELS:
            raise DataError(
                f"the header announces volumes of {shape} voxels, {header.volume_bytes / MIB:.0f} MiB each: at most "
                f"{MAX_VOXELS} voxels and {MAX_VOLUME_BYTES // MIB} MiB are read"
            )
        announced = header.offset + header.num_volumes * header.volume_bytes
        what = f"the header announces {shape}x{header.num_volumes} voxels of {header.dtype}, {announced} bytes"
        if self._compressed:
            if announced > MAX_INFLATION * self._file_bytes:
                raise DataError(
                    f"{what}, more than a gzip file of {self._file_bytes} bytes can hold: cut off, or no such image"
                )
        elif announced > self._file_bytes:
            last = max(self._file_bytes - header.offset, 0) // header.volume_bytes + 1
            raise DataError(
                f"cut off: the file ends in volume {last} of {header.num_volumes} ({what}; it has {self._file_bytes})"
            )
        elif self._file_bytes > announced + self._max_padding:
            raise DataError(f"{what}, but the file has {self._file_bytes}: it is not what its header says")

    @property
    def _max_padding(self) -> int:
        return min(MAX_PADDING, self.header.volume_bytes - 1)  # a whole volume more is never padding

    def _read_volume(self, index: int) -> bytes:
        """Read the next volume; before the first skip the extensions, after the last look what follows."""
        header, number = self.header, self.header.num_volumes
        try:
            if index == 0:
                self._skip_to_data()
            data = self._stream.read(header.volume_bytes)
            # Reading on to the end of a gzip stream compares its checksum; the limit makes a bomb harmless.
            rest = self._stream.read(self._max_padding + 1) if index == number - 1 else b""
        except DAMAGE as error:
            raise DataError(f"damaged or cut off in volume {index + 1} of {number}: {error}") from error
        if len(data) < header.volume_bytes:
            raise DataError(f"cut off: the file ends in volume {index + 1} of {number}")
        if len(rest) > self._max_padding:
            raise DataError(
                f"data go on after volume {number}, the last that the header announces: it is not what its header says"
            )
        return data

    def _skip_to_data(self) -> None:
        left = self.header.offset - self._header_bytes
        while left > 0:
            skipped = len(self._stream.read(min(left, CHUNK_BYTES)))
            if not skipped:
                raise EOFError("the file ends before the first volume")
            left -= skipped


def check_extensions(path: Path) -> None:
    """Refuse extensions that are larger than any, or than the file: nibabel allocates what they claim.

    Parameters
    ----------
    path : path
        Of a NIfTI file, not compressed; anything else passes, and is left to its reader.
    """
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(544)
        order = next((o for o in "<>" for size in FORMATS if start[:4] == np.array(size, f"{o}i4").tobytes()), "")
        if not order:
            return
        size = struct.unpack(f"{order}i", start[:4])[0]
        flag = start[size : size + 4]
        if len(flag) < 4 or not flag[0]:
            return
        offset = struct.unpack_from(f"{order}q", start, 168)[0] if size == 540 else 0
        if size == 348:
            vox_offset = struct.unpack_from(f"{order}f", start, 108)[0]
            offset = int(vox_offset) if math.isfinite(vox_offset) else -1
        if not 0 <= offset <= MAX_OFFSET:
            raise DataError(f"the header says that the data begin at byte {offset}: expected at most {MAX_OFFSET}")
        at = size + 4
        while at + 8 <= (offset or num_bytes):
            file.seek(at)
            head = file.read(8)
            if len(head) < 8:
                return
            extension, code = struct.unpack(f"{order}2i", head)
            if not 8 <= extension <= min(MAX_EXTENSION, num_bytes - at):
                raise DataError(
                    f"an extension of the header (code {code}) claims {extension} bytes at byte {at}: expected 8 to "
                    f"{MAX_EXTENSION}, and no more than the {num_bytes} bytes of the file"
                )
            at += extension


def _shape(header: Any) -> tuple[int, ...]:
    """Return (X, Y, Z, T); further axes may have one element."""
    dims = [int(d) for d in header["dim"]]
    if not 1 <= dims[0] <= 7:
        raise DataError(f"expected a 4-D image (x, y, z, time), found {dims[0]} axes in the header")
    shape = tuple(dims[1 : 1 + dims[0]])
    if min(shape) < 1:
        raise DataError(f"expected a 4-D image (x, y, z, time), found shape {shape} in the header")
    while len(shape) > 4 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 4 or shape[3] < 2:
        raise DataError(f"expected a 4-D image (x, y, z, time), found shape {shape}")
    return shape


def _repetition_time(header: Any) -> float | None:
    unit = int(header["xyzt_units"]) & 0x38
    if unit not in SECONDS_PER_UNIT:
        raise DataError(f"the header's fourth axis is in {UNIT_NAMES.get(unit, f'unit {unit}')}, not in seconds")
    tr_s = float(header["pixdim"][4]) * SECONDS_PER_UNIT[unit]
    return tr_s if math.isfinite(tr_s) and tr_s > 0 else None
