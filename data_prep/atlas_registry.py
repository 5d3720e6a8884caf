"""Atlases by name: where their files come from, and what proves that they are the files meant.

::

    $BRAINLM_ATLASES        a folder of files that were downloaded by hand; looked at first
    $BRAINLM_CACHE/atlases  what was downloaded here (default ~/.cache/brainlm/atlases)

Nothing is downloaded without a sha256 to hold it against: an atlas that changes silently gives other parcels under the
same names. Where the project knows no hash of the public file, the user gives one, once; it stays beside the file::

    python data_prep/atlas_registry.py                            lists the atlases
    python data_prep/atlas_registry.py A424                       downloads one, for machines without network
    python data_prep/atlas_registry.py schaefer400 --sha256 FILE=HASH [FILE=HASH ...]

All names, spaces and citations are the authors'; none of the files is distributed with this project.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from brainlm.errors import BrainLMError, ConfigError, DataError, StoreError
from brainlm.store import sha256_of_file

MAX_BYTES = 100_000_000
TIMEOUT_S = 60.0
SCHEMES = ("https://", "http://", "file://")
HASH_SUFFIX = ".sha256"

_CBIG = (
    "https://raw.githubusercontent.com/ThomasYeoLab/CBIG/v0.14.3-Update_Yeo2011_Schaefer2018_labelname/"
    "stable_projects/brain_parcellation/Schaefer2018_LocalGlobal/Parcellations/MNI/"
)
_BRAINLM = "https://raw.githubusercontent.com/vandijklab/BrainLM/"
_ABIDE = "https://raw.githubusercontent.com/preprocessed-connectomes-project/abide/"


@dataclass(frozen=True, kw_only=True)
class AtlasFile:
    """A public file.

    Attributes
    ----------
    name : str
        Its name in the cache, or in the folder of ``$BRAINLM_ATLASES``.
    url : str or None
        None where it lies inside an archive, or where no stable address is known.
    sha256 : str or None
        None where the project knows none; then it must be given, or the file be put in place by hand.
    """

    name: str
    url: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class AtlasRecord:
    """An atlas that can be had by name.

    Attributes
    ----------
    name : str
    image : AtlasFile
    table : AtlasFile or None
        Names, coordinates or both.
    header : tuple of str or None
        Columns of a table that has no header line.
    coords_columns : tuple of str or None
        Columns of the table with coordinates.
    hemisphere_column : str or None
    network_pattern : str or None
        Regular expression over a parcel's name in the table; its group is the network. Every name must match.
    space : str
        BIDS name of the template space.
    num_parcels : int
        What the image must hold.
    licence, citation : str
    how : str
        Where to get the files by hand.
    verified : str
        What the hashes are of.
    """

    name: str
    image: AtlasFile
    table: AtlasFile | None = None
    header: tuple[str, ...] | None = None
    coords_columns: tuple[str, str, str] | None = None
    hemisphere_column: str | None = None
    network_pattern: str | None = None
    space: str
    num_parcels: int
    licence: str
    citation: str
    how: str
    verified: str = "no hash known"


def _schaefer(num_parcels: int) -> AtlasRecord:
    stem = f"Schaefer2018_{num_parcels}Parcels_7Networks_order"
    image, table = f"{stem}_FSLMNI152_2mm.nii.gz", f"{stem}.txt"
    return AtlasRecord(
        name=f"schaefer{num_parcels}",
        image=AtlasFile(name=image, url=_CBIG + image),
        table=AtlasFile(name=table, url=_CBIG + table),
        hemisphere_column="name",
        network_pattern=r"7Networks_[LR]H_([A-Za-z]+)_.+",  # 7Networks_LH_Vis_1, 7Networks_RH_Default_PFCv_2
        space="MNI152NLin6Asym",
        num_parcels=num_parcels,
        licence="MIT",
        citation="Schaefer et al. 2018, Cerebral Cortex 28; 7 networks of Yeo et al. 2011",
        # Releases before v0.14.3 name some parcels wrongly, by CBIG's own note on the update of 2019-09-16.
        how=f"{image} and {table} of CBIG's release v0.14.3: {_CBIG}",
    )


RECORDS: Mapping[str, AtlasRecord] = {
    record.name: record
    for record in (
        AtlasRecord(
            name="A424",
            image=AtlasFile(
                name="A424+2mm.nii.gz",
                url=f"{_BRAINLM}f65e5acdfeb4ab06bad4f10663250eedfcbe20be/toolkit/atlases/A424%2B2mm.nii.gz",
                sha256="8478d7516a2bbf295989835d5033d03e4283143a2955c90428f634951702501b",
            ),
            table=AtlasFile(
                name="A424_Coordinates.dat",
                url=f"{_BRAINLM}f0fc77ac95966e2ad848a49bbf297215f161e499/toolkit/atlases/A424_Coordinates.dat",
                sha256="cdad8f8859c211b1400211ebbad455dedcc4399ac14fd614354fb71b110c892c",
            ),
            header=("index", "x_mm", "y_mm", "z_mm"),
            coords_columns=("x_mm", "y_mm", "z_mm"),
            space="MNI152NLin6Asym",
            num_parcels=424,
            licence="Apache-2.0 (as distributed with BrainLM's toolkit; its upstream is GPL-3.0)",
            citation="Nemati et al. 2020, iScience 23; Ortega Caro et al. 2024, BrainLM, ICLR",
            # A424.nii.gz beside it lacks label 120.
            how="A424+2mm.nii.gz and A424_Coordinates.dat of github.com/vandijklab/BrainLM, folder toolkit/atlases",
            verified="hashes of the copies that the project is tested with",
        ),
        _schaefer(200),
        _schaefer(400),
        AtlasRecord(
            name="aal116",
            image=AtlasFile(name="AAL.nii"),
            table=AtlasFile(name="AAL.xml"),
            hemisphere_column="name",
            space="MNIColin27",
            num_parcels=116,
            licence="free for research, see gin.cnrs.fr; not to be redistributed here",
            citation="Tzourio-Mazoyer et al. 2002, NeuroImage 15",
            how="AAL.nii and AAL.xml in aal/atlas of https://www.gin.cnrs.fr/AAL_files/aal_for_SPM12.tar.gz",
        ),
        AtlasRecord(
            name="cc200",
            image=AtlasFile(
                name="CC200.nii.gz",
                url=f"{_ABIDE}d341c7991cf93f3e2afbd184b127ab2ec7321ed9/preprocessing/resources/abide_rois/CC200.nii.gz",
            ),
            space="MNI152NLin6Asym",
            num_parcels=200,
            licence="as the Preprocessed Connectomes Project gives it",
            citation="Craddock et al. 2012, Human Brain Mapping 33",
            how="preprocessing/resources/abide_rois/CC200.nii.gz of github.com/preprocessed-connectomes-project/abide",
        ),
        AtlasRecord(
            name="glasser360",
            image=AtlasFile(name="MMP_in_MNI_corr.nii.gz", url="https://ndownloader.figshare.com/files/5594363"),
            space="MNI152NLin2009aAsym",
            num_parcels=360,
            licence="terms of the Human Connectome Project and of figshare item 3501911",
            citation="Glasser et al. 2016, Nature 536; projected on MNI2009a by A. Horn (2016), figshare 3501911",
            how="MMP_in_MNI_corr.nii.gz of figshare item 3501911 (HCP-MMP1.0 projected on MNI2009a GM, volumetric)",
        ),
        AtlasRecord(
            name="yeo7",
            image=AtlasFile(name="Yeo2011_7Networks_MNI152_FreeSurferConformed1mm_LiberalMask.nii.gz"),
            table=AtlasFile(name="Yeo2011_7Networks_ColorLUT.txt"),
            space="MNI152NLin6Asym",
            num_parcels=7,
            licence="as FreeSurfer's download page gives it",
            citation="Yeo et al. 2011, Journal of Neurophysiology 106",
            how="the image of that name and Yeo2011_7Networks_ColorLUT.txt in Yeo_JNeurophysiol11_MNI152.zip, "
            "surfer.nmr.mgh.harvard.edu/fswiki/CorticalParcellation_Yeo2011",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class FetchedAtlas:
    """An atlas' files on local disk; ``table`` is None where it has none."""

    record: AtlasRecord
    image: Path
    table: Path | None = field(default=None)


def find_record(name: str) -> AtlasRecord:
    """Return the atlas of this name, in any case.

    Raises
    ------
    ConfigError
        With all names that there are.
    """
    for known, record in RECORDS.items():
        if known.lower() == name.lower():
            return record
    raise ConfigError(f"there is no atlas {name!r} in the registry ({', '.join(RECORDS)}): give atlas.image")


def fetch_atlas(record: AtlasRecord, given_sha256: Mapping[str, str] | None = None) -> FetchedAtlas:
    """Return the files of an atlas, from the user's folder, the cache, or the network.

    Parameters
    ----------
    given_sha256 : mapping of str to str, optional
        File name -> sha256 that the user vouches for, where the record has none.

    Raises
    ------
    DataError
        If a file is not the one that its sha256 stands for; a downloaded one is removed.
    StoreError
        If a file is not here and cannot be downloaded, with what to do.
    """
    given = given_sha256 or {}
    image = _fetch(record, record.image, given.get(record.image.name))
    table = None if record.table is None else _fetch(record, record.table, given.get(record.table.name))
    return FetchedAtlas(record=record, image=image, table=table)


def cache_folder() -> Path:
    """Return the folder that atlases are downloaded to."""
    root = os.environ.get("BRAINLM_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "brainlm") / "atlases"


def _fetch(record: AtlasRecord, file: AtlasFile, given: str | None) -> Path:
    own = os.environ.get("BRAINLM_ATLASES")
    if own and (path := Path(own) / file.name).is_file():
        _check(path, file.sha256 or given, "$BRAINLM_ATLASES holds another file of this name: replace it, or unset it")
        return path
    path = cache_folder() / file.name
    pinned = path.with_name(path.name + HASH_SUFFIX)
    expected = file.sha256 or given or (pinned.read_text().strip() if pinned.is_file() else None)
    if path.is_file() and expected:
        try:
            _check(path, expected, "it was removed from the cache; run again to download it")
        except DataError:
            path.unlink()
            raise
        return path
    by_hand = f"get {record.how}; put it into a folder and set BRAINLM_ATLASES to that, or give atlas.image"
    if file.url is None:
        raise StoreError(f"atlas {record.name}: {file.name} has no address to download it from. Instead {by_hand}")
    if expected is None:
        raise StoreError(
            f"atlas {record.name}: no sha256 of {file.name} is known here, and nothing is downloaded without one. Run "
            f"python data_prep/atlas_registry.py {record.name} --sha256 {file.name}=HASH with a hash that you trust of "
            f"{file.url}; or {by_hand}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    _download(record, file.url, path, expected, by_hand)
    if file.sha256 is None:
        pinned.write_text(f"{expected}\n")
    return path


def _check(path: Path, expected: str | None, advice: str) -> None:
    if expected is not None and (found := sha256_of_file(path)) != expected.lower():
        raise DataError(f"{path}: expected sha256 {expected}, found {found}: {advice}")


def _download(record: AtlasRecord, url: str, path: Path, expected: str, by_hand: str) -> None:
    """Write the file under its name only when all of it is there and its hash is right."""
    if not url.startswith(SCHEMES):
        raise ConfigError(f"atlas {record.name}: {url}: expected an address that begins with {', '.join(SCHEMES)}")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            digest, num_bytes = hashlib.sha256(), 0
            try:
                with urlopen(url, timeout=TIMEOUT_S) as stream:
                    while block := stream.read(1 << 20):
                        num_bytes += len(block)
                        if num_bytes > MAX_BYTES:
                            raise OSError(f"it is larger than {MAX_BYTES} bytes")
                        digest.update(block)
                        out.write(block)
            except (URLError, HTTPException, OSError, ValueError) as error:
                raise StoreError(
                    f"atlas {record.name}: cannot download {url} ({error}). Without network: run python "
                    f"data_prep/atlas_registry.py {record.name} where there is one, with BRAINLM_CACHE on a disk that "
                    f"both see; or {by_hand}"
                ) from error
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != expected.lower():
            raise DataError(
                f"atlas {record.name}: {url}: expected sha256 {expected}, found {digest.hexdigest()} in {num_bytes} "
                f"bytes: the file was cut or has changed, and was not kept. Instead {by_hand}"
            )
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    """List the atlases, or download some."""
    parser = argparse.ArgumentParser(description="List the atlases that are known by name, or download them.")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--sha256", nargs="+", default=[], metavar="FILE=HASH", help="hashes you vouch for")
    arguments = parser.parse_args(argv)
    given = dict(pair.partition("=")[::2] for pair in arguments.sha256)
    try:
        for record in [find_record(name) for name in arguments.names]:
            fetched = fetch_atlas(record, given)
            print(f"{record.name}: {fetched.image}" + (f", {fetched.table}" if fetched.table else ""))
    except BrainLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not arguments.names:
        for record in RECORDS.values():
            print(f"{record.name}: {record.num_parcels} parcels, {record.space}. {record.citation}. {record.licence}.")
            print(f"    {record.how} ({record.verified})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
