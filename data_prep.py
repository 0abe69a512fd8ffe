"""Raw chest X-ray datasets in, one folder of arrays and tables out; and a demo set drawn by code.

    python data_prep.py demo                                            # phantoms, nothing to download
    python data_prep.py folder --raw DIR --csv labels.csv               # any folder of X-rays
    python data_prep.py nih|chestmnist|rsna|siim|vinbig --raw DIR       # the public datasets
    python data_prep.py verify data/nih

A prepared folder holds `images.npy` (N, S, S) uint8, `labels.csv` (image, patient, split, one 0/1
column a finding, blank = unknown), optionally `masks.npy` (N, S, S) of 0/1 with the column
`has_mask`, and `boxes.csv` in prepared pixels; `rejected.csv` (every image left out, and why),
`hashes.csv` (SHA-256 of each prepared picture, size of its source) and `meta.json`.

It is built in `<out>.partial` and gets its name when it is complete: images are read in parallel,
appended in the order of the list and journalled, so that a run that was killed goes on where it
was and ends in the same bytes.

Sections: 1 one X-ray file, 2 tables and splits, 3 the prepared folder, 4 the datasets,
5 downloads, 6 verify, 7 demo phantoms, 8 command line.
"""

import argparse
import dataclasses
import functools
import hashlib
import http.client
import io
import json
import math
import os
import re
import shutil
import signal
import stat
import struct
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

FORMAT = 1
# ================================================================================================
# 1. One X-ray file
# ================================================================================================
MIN_SIDE = 16  # pixels; less is no X-ray
MAX_PIXELS = 50_000_000  # of one picture; the largest chest detectors give about 20 million
MAX_BYTES = 256 << 20  # of one file
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
DICOM_SUFFIXES = (".dcm", ".dicom")
# Deflated is not among them: it inflates before the sizes inside can be checked.
TRANSFER_SYNTAXES = {
    "1.2.840.10008.1.2": "implicit little endian",
    "1.2.840.10008.1.2.1": "explicit little endian",
    "1.2.840.10008.1.2.4.50": "JPEG baseline",
    "1.2.840.10008.1.2.4.51": "JPEG extended",
    "1.2.840.10008.1.2.4.57": "JPEG lossless",
    "1.2.840.10008.1.2.4.70": "JPEG lossless SV1",
    "1.2.840.10008.1.2.4.80": "JPEG-LS lossless",
    "1.2.840.10008.1.2.4.81": "JPEG-LS near-lossless",
    "1.2.840.10008.1.2.4.90": "JPEG 2000 lossless",
    "1.2.840.10008.1.2.4.91": "JPEG 2000",
    "1.2.840.10008.1.2.5": "RLE lossless",
}
DICOM_TAGS = (
    "Rows Columns SamplesPerPixel PlanarConfiguration NumberOfFrames BitsAllocated BitsStored "
    "HighBit PixelRepresentation PhotometricInterpretation ModalityLUTSequence RescaleSlope "
    "RescaleIntercept VOILUTSequence VOILUTFunction WindowCenter WindowWidth PixelData"
).split()


class PrepError(ValueError):
    """One line for the user: what was looked for, what was found, what to type next."""


def read_xray(source):
    """One X-ray file as an 8-bit gray picture.

    Deeper PNGs and DICOMs are stretched from their darkest to their brightest value; 8-bit values
    stay as they are. Colour becomes luminance, transparency is ignored.

    Args:
        source: path of a PNG, JPEG or DICOM file (told by content, not by name), or an open binary
            stream of a PNG or JPEG.
    Returns: (H, W) uint8, bright = dense.
    Raises: ValueError, with a one-line reason, if the file is missing, damaged, truncated, not an
        X-ray format, below 16 pixels a side or above 50 million pixels. Nothing large is
        allocated before the sizes in the header have been checked.
    """
    try:
        if not isinstance(source, (str, os.PathLike)):
            return _read_picture(source)
        state = os.stat(source)
        if not stat.S_ISREG(state.st_mode) or not 0 < state.st_size <= MAX_BYTES:
            raise ValueError("empty file" if not state.st_size else "not a file, or above 256 MiB")
        with open(source, "rb") as f:
            if f.read(132)[128:] == b"DICM":
                return _read_dicom(os.fspath(source))
            f.seek(0)
            return _read_picture(f)
    except OSError as e:
        raise ValueError(f"cannot be read: {e.strerror or e}") from e


def resize_xray(image, size):
    """The one antialiased downscale: the whole picture onto a square, aspect ratio not kept.

    A box reduction to twice the target or more, then bicubic: within 12 gray levels of a full
    bicubic filter on X-rays, at less than half its time.

    Args:
        image: (H, W) uint8.
        size: S, edge of the result in pixels.
    Returns: (S, S) uint8.
    """
    if image.shape == (size, size):
        return np.ascontiguousarray(image)
    picture = Image.fromarray(image)
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0))


def _check_size(rows, columns):
    """Refuses what is too small to be an X-ray or too large to be decoded safely."""
    if min(rows, columns) < MIN_SIDE or rows * columns > MAX_PIXELS:
        raise ValueError(
            f"{columns} x {rows} pixels; expected sides from {MIN_SIDE} and at most "
            f"{MAX_PIXELS // 10**6} million pixels"
        )


def _read_picture(stream):
    """PNG or JPEG stream -> (H, W) uint8."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(stream, formats=("PNG", "JPEG"))
            _check_size(image.height, image.width)
            image.load()
            if image.mode.startswith("I"):  # 16-bit gray
                return _stretch_picture(np.asarray(image))
            return np.array(image if image.mode == "L" else image.convert("L"))
    except UnidentifiedImageError:
        raise ValueError("not a PNG, JPEG or DICOM file") from None
    except Image.DecompressionBombError:
        raise ValueError(f"above {MAX_PIXELS // 10**6} million pixels") from None
    except (OSError, SyntaxError, struct.error, zlib.error, EOFError, IndexError) as e:
        raise ValueError(f"damaged or truncated ({_one_line(e)})") from e


def _one_line(error):
    """The first line of an error's text, or its kind where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _stretch(values):
    """Numbers -> uint8, the smallest to 0 and the largest to 255; constants to 0."""
    values = np.asarray(values, np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite(high - low):
        raise ValueError("pixel values are not finite")
    return _round((values - low) * (255 / (high - low) if high > low else 0))


def _round(values):
    """Half up, with a margin: an inverted picture must not round the other way by an error."""
    return np.floor(values + 0.5 + 1e-6).clip(0, 255).astype(np.uint8)


def _stretch_picture(pixels, levels_to_gray=_stretch):
    """(H, W) integers -> (H, W) uint8 by a table over the levels between the darkest and brightest.

    Row by row, since an index array of the whole picture would take 8 bytes a pixel.
    """
    low, high = int(pixels.min()), int(pixels.max())
    table = levels_to_gray(np.arange(low, high + 1))
    gray = np.empty(pixels.shape, np.uint8)
    for out, row in zip(gray, pixels, strict=True):
        out[:] = table[row.astype(np.intp) - low]
    return gray


def _read_dicom(path):
    """DICOM file -> (H, W) uint8: modality LUT, VOI LUT, MONOCHROME1 inverted, then 8 bits."""
    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            syntax = str(pydicom.filereader.read_file_meta_info(path).TransferSyntaxUID)
            if syntax not in TRANSFER_SYNTAXES:
                raise ValueError(f"DICOM transfer syntax {syntax} is not on the list of safe ones")
            ds = pydicom.dcmread(path, specific_tags=DICOM_TAGS)
            _check_dicom(ds, syntax)
            _quiet_gdcm()
            pixels = ds.pixel_array
            if pixels.shape[:2] != (ds.Rows, ds.Columns):
                raise ValueError(f"decoded to {pixels.shape}, not {(ds.Rows, ds.Columns)}")
            if pixels.ndim == 3:
                return np.array(Image.fromarray(pixels.astype(np.uint8)).convert("L"))
            return _stretch_picture(pixels, functools.partial(_dicom_gray, ds, pixels.dtype))
        # The decoders raise nearly anything on a hostile file: whatever it is, the file is bad.
        except Exception as e:
            raise ValueError(f"DICOM: {_one_line(e)}") from e


def _dicom_gray(ds, dtype, levels):
    """Stored values -> uint8 gray as the header asks."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    values = apply_voi_lut(apply_modality_lut(levels.astype(dtype), ds), ds).astype(np.float64)
    inverted = ds.PhotometricInterpretation == "MONOCHROME1"
    if ds.BitsStored == 8 and values.min() >= 0 and values.max() <= 255:
        return _round(255 - values if inverted else values)
    return _stretch(-values if inverted else values)


def _check_dicom(ds, syntax):
    """Refuses a data set whose sizes are too large or do not fit its pixel data."""
    from pydicom.encaps import generate_frames

    rows, columns, samples, bits = ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.BitsAllocated
    _check_size(rows, columns)
    kinds = {1: ("MONOCHROME1", "MONOCHROME2"), 3: ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT")}
    kind, frames = ds.PhotometricInterpretation, int(ds.get("NumberOfFrames") or 1)
    if kind not in kinds.get(samples, ()) or frames != 1 or bits not in (8, 16)[: 3 - samples]:
        raise ValueError(f"{frames} frame(s), {samples} sample(s) of {bits} bits, {kind}")
    size = rows * columns * samples * bits // 8
    if not ds["PixelData"].is_undefined_length:
        if len(ds.PixelData) < size:
            raise ValueError(f"{len(ds.PixelData)} bytes of pixels, the header says {size}")
        return
    frame = next(generate_frames(ds.PixelData, number_of_frames=1))
    if syntax.endswith(".1.2.5"):
        if _rle_length(frame) > size + 64:
            raise ValueError(f"the RLE stream holds more than the {size} bytes of the header")
    elif _coded_size(frame) != (rows, columns):
        raise ValueError(f"header {(rows, columns)}, compressed stream {_coded_size(frame)}")


def _coded_size(stream):
    """(rows, columns) inside a JPEG, JPEG-LS or JPEG 2000 stream: what a decoder will allocate."""
    start = stream[:1000].find(b"\xff\x4f\xff\x51")
    if start >= 0:
        right, bottom, left, top = struct.unpack_from(">4I", stream, start + 8)
        return bottom - top, right - left
    at = 2
    while stream[at] == 0xFF:
        marker, length = stream[at + 1], struct.unpack_from(">H", stream, at + 2)[0]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return struct.unpack_from(">HH", stream, at + 5)
        at += 2 + length
    raise ValueError("no frame header in the compressed stream")


def _rle_length(frame):
    """Bytes that the segments of a DICOM RLE frame will unpack to."""
    count, *starts = struct.unpack_from("<16I", frame)
    bounds, total = starts[:count] + [len(frame)], 0
    for start, end in zip(bounds, bounds[1:], strict=False):
        while start < end - 1:
            code = frame[start]
            total += 0 if code == 128 else code + 1 if code < 128 else 257 - code
            start += 1 if code == 128 else code + 2 if code < 128 else 2
    return total


def _quiet_gdcm():
    """Keeps the C++ decoder from writing to stderr; its errors come back as exceptions."""
    try:
        import gdcm
    except ImportError:
        return
    for switch in (gdcm.Trace.WarningOff, gdcm.Trace.ErrorOff, gdcm.Trace.DebugOff):
        switch()


# ================================================================================================
# 2. Tables and splits
# ================================================================================================
SPLITS = ("train", "val", "test")
BY_PATIENT = {"train": 0.7, "val": 0.1, "test": 0.2}
BY_IMAGE = {"train": 0.7, "val": 0.15, "test": 0.15}
CARVED = {"val": 0.1, "train": 0.9}


@dataclasses.dataclass
class Listing:
    """What a dataset importer hands over: every image with its labels, before one is read.

    Attributes:
        table: `image, patient, split`, a 0/1 or blank column a finding, `source` (path) and `mask`
            (path, tuple of RLE rows, or None where there is no mask).
        findings: names of the finding columns, in order.
        split_rule: one sentence for meta.json.
        lists: label files, to be hashed.
        rejected: (image, reason) pairs known so far; missing: images without a file.
        boxes: `image, finding, x, y, width, height` in source pixels, or None.
        has_masks: whether masks.npy is written.
        stream: None, or a function (listing, done) -> iterator of (row, picture) for pictures that
            are not files: bytes of a PNG or (H, W) uint8. Rows in `done` may be skipped.
        allow_missing: missing images are listed instead of refused.
    """

    table: pd.DataFrame
    findings: list
    split_rule: str
    lists: list = dataclasses.field(default_factory=list)
    rejected: list = dataclasses.field(default_factory=list)
    missing: list = dataclasses.field(default_factory=list)
    boxes: pd.DataFrame | None = None
    has_masks: bool = False
    stream: object = None
    allow_missing: bool = True

    def attach(self, files, csv, allow_missing=False):
        """Gives every image its file; splits off the missing ones, rejects files without a row.

        Args:
            files: image -> path; csv: the table's path, for the message.
            allow_missing: as above.
        Returns: self.
        """
        source = self.table["image"].map(files)
        listed = set(self.table["image"])
        self.missing = self.table["image"][source.isna()].tolist()
        self.rejected += [(f, f"no row in {Path(csv).name}") for f in files if f not in listed]
        self.table = self.table.assign(source=source)[source.notna()].reset_index(drop=True)
        self.allow_missing = allow_missing
        return self


def hash_split(key, shares):
    """The split that a patient or image falls into: a function of its name alone.

    Args:
        key: str.
        shares: split -> share, summing to 1.
    Returns: a key of `shares`; the same on every machine.
    """
    place = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 16**8
    for split, share in shares.items():
        if place < share:
            return split
        place -= share
    return split


def read_table(path, columns):
    """A CSV as stripped strings; blank where a cell is empty or missing.

    Args:
        path: file, UTF-8 with or without a byte-order mark.
        columns: names that must be there.
    Returns: DataFrame of str.
    Raises: PrepError if the file is missing, is no CSV, or lacks a column.
    """
    path = Path(path)
    if not path.is_file():
        raise PrepError(f"looked for the table {path}: no such file")
    try:
        table = pd.read_csv(
            path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False
        )
    except (ValueError, OSError) as e:  # ParserError and UnicodeDecodeError are ValueErrors
        raise PrepError(f"{path} does not read as a CSV table: {_one_line(e)}") from e
    table.columns = [str(c).strip() for c in table.columns]
    absent = [c for c in columns if c not in table]
    if absent:
        found = ", ".join(table.columns)[:200]
        raise PrepError(f"{path}: expected the columns {', '.join(columns)}; found {found}")
    return table.fillna("").apply(lambda column: column.str.strip())


def unique_rows(table, key, path):
    """One row a key: identical duplicates go, conflicting ones are refused."""
    table = table.drop_duplicates()
    twice = table[key][table[key].duplicated()].tolist()
    if twice:
        raise PrepError(f"{path}: {key} {twice[0]} has conflicting rows ({len(twice)} have)")
    if (table[key] == "").any():
        raise PrepError(f"{path}: {(table[key] == '').sum()} row(s) without {key}")
    return table.reset_index(drop=True)


def numbers(table, columns, path):
    """The named columns as finite floats; PrepError where a cell is none."""
    try:
        values = table[columns].astype(np.float64)
    except ValueError as e:
        raise PrepError(f"{path}: expected numbers in {', '.join(columns)}: {_one_line(e)}") from e
    if not np.isfinite(values.to_numpy()).all():
        raise PrepError(f"{path}: a number in {', '.join(columns)} is not finite")
    return values


def walk_files(root, suffixes):
    """Yields the path of every file below `root` with one of the suffixes, sorted by folder."""
    if not Path(root).is_dir():
        raise PrepError(f"looked for the folder {root}: no such folder; give another --raw")
    for folder, folders, names in os.walk(root):
        folders.sort()
        yield from (os.path.join(folder, n) for n in sorted(names) if n.lower().endswith(suffixes))


def index_files(root, suffixes):
    """Name without suffix -> path, of every file below `root`; the first of a name counts."""
    found = {}
    for path in walk_files(root, suffixes):
        found.setdefault(os.path.splitext(os.path.basename(path))[0], path)
    return found


def rle_decode(text, rows, columns):
    """Mask from relative run lengths, as in the SIIM-ACR tables.

    Args:
        text: "gap length gap length ..."; a gap counts from the end of the run before; pixels are
            numbered down the columns, left to right.
        rows, columns: size of the picture.
    Returns: (rows, columns) bool.
    Raises: ValueError on an odd count, no integer, a negative gap, an empty run, or a run that
        leaves the picture.
    """
    values = [int(v) for v in text.split()]
    if len(values) % 2:
        raise ValueError(f"RLE of {len(values)} numbers; expected pairs of gap and length")
    flat, at = np.zeros(rows * columns, bool), 0
    for gap, length in zip(values[::2], values[1::2], strict=True):
        start, at = at + gap, at + gap + length
        if gap < 0 or length < 1 or at > flat.size:
            raise ValueError(f"RLE run of {length} after a gap of {gap} leaves {rows} x {columns}")
        flat[start:at] = True
    return flat.reshape(columns, rows).T


def check_patients(table):
    """Raises PrepError if a patient is in two splits."""
    pairs = table[["patient", "split"]].drop_duplicates()
    twice = pairs["patient"][pairs["patient"].duplicated()].tolist()
    if twice:
        splits = " and ".join(pairs["split"][pairs["patient"] == twice[0]])
        raise PrepError(
            f"patient {twice[0]} is in two splits, {splits} ({len(twice)} patients are); "
            "give each patient one split"
        )


# ================================================================================================
# 3. The prepared folder
# ================================================================================================
OWN_FILES = set(
    "images.npy masks.npy labels.csv boxes.csv rejected.csv hashes.csv meta.json "
    "plan.json progress.jsonl".split()
)
HEADER = 128  # bytes before the pixels of a .npy file
BATCH = 8  # images a worker takes at a time
CHUNK = 64  # images between two entries of the journal: what a kill can cost


class PreparedWriter:
    """`<out>.partial`, growing row by row; it is renamed to `out` when it is complete.

    Args:
        out: the folder to make.
        size: S; has_masks: whether masks.npy is written beside images.npy.
        plan: options and list of the run; a partial folder with another plan is refused.
        overwrite: start anew, and replace `out` at the end.
    Attributes: notes: one dict an image treated so far, in order: `row`, then `reason` if it was
        rejected, else `sha256`, `height`, `width` and what else the worker found.
    """

    def __init__(self, out, size, has_masks, plan, overwrite=False):
        self.out, self.folder = Path(out), Path(f"{out}.partial")
        self.size, self.notes, self.waiting = size, [], []
        if overwrite and self.folder.is_dir():
            remove_prepared(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journal = open(self.folder / "progress.jsonl", "a+b")
        _lock(self.journal, self.folder)
        before = self.folder / "plan.json"
        if before.exists():
            refuse_changed(json.loads(before.read_text()), plan, self.folder)
        else:
            self.journal.truncate(0)
            replace_text(before, json.dumps(plan, indent=1))
        names = ["images.npy", "masks.npy"] if has_masks else ["images.npy"]
        for name in names:
            (self.folder / name).touch()
        self.arrays = [open(self.folder / name, "r+b") for name in names]
        self._resume()

    def _resume(self):
        """Keeps the entries of the journal whose pixels are on disk, and cuts off the rest."""
        room = min((a.seek(0, 2) - HEADER) // self.size**2 for a in self.arrays)
        self.journal.seek(0)
        kept = good = 0
        for line in self.journal:
            note = json.loads(line) if line.endswith(b"\n") else {"reason": "torn"}
            good += "reason" not in note
            if not line.endswith(b"\n") or good > room:
                break
            kept += len(line)
            self.notes.append(note)
        self.journal.truncate(kept)
        good = sum("reason" not in note for note in self.notes)
        for array in self.arrays:
            array.truncate(HEADER + good * self.size**2)  # a new file starts with 128 zero bytes
            array.seek(0, 2)

    def append(self, results):
        """Takes (note, picture, mask) triples; pictures are (S, S) uint8, None if rejected."""
        self.waiting += results
        if len(self.waiting) >= CHUNK:
            self.flush()

    def flush(self):
        """Writes what waits: pixels first, then the journal, so that no entry lacks its pixels."""
        good = [r for r in self.waiting if "reason" not in r[0]]
        blank = np.zeros((self.size, self.size), np.uint8)
        for k, array in enumerate(self.arrays, 1):
            array.write(b"".join((blank if r[k] is None else r[k]).tobytes() for r in good))
            array.flush()
            os.fsync(array.fileno())
        notes = [r[0] for r in self.waiting]
        self.journal.write("".join(json.dumps(n) + "\n" for n in notes).encode())
        self.journal.flush()
        self.notes += notes
        self.waiting = []

    def close(self):
        """Releases the files; the folder stays as it is and can be gone on with."""
        for f in (*self.arrays, self.journal):
            f.close()

    def finish(self, tables, meta):
        """Writes the tables and meta.json, gives the folder its name.

        Args:
            tables: file name -> DataFrame.
            meta: dict; `images` is the number of rows; the hash of images.npy is added here.
        """
        header = io.BytesIO()
        shape = (meta["images"], self.size, self.size)
        about = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, about)
        assert len(header.getvalue()) == HEADER
        for array in self.arrays:
            array.seek(0)
            array.write(header.getvalue())
            array.flush()
            os.fsync(array.fileno())
        for name, table in tables.items():
            replace_text(self.folder / name, table.to_csv(index=False, lineterminator="\n"))
        meta = meta | {"images_sha256": file_digest(self.folder / "images.npy")}
        self.close()
        replace_text(self.folder / "meta.json", json.dumps(meta, indent=1) + "\n")
        if self.out.exists():
            remove_prepared(self.out)
        os.replace(self.folder, self.out)
        for name in ("progress.jsonl", "plan.json"):
            (self.out / name).unlink()


def replace_text(path, text):
    """Writes a text file whole or not at all."""
    part = path.with_name(path.name + ".tmp")
    with open(part, "w", encoding="utf-8", newline="") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def file_digest(path, kind="sha256"):
    """SHA-256 or MD5 of a file, hex."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def remove_prepared(folder):
    """Deletes a prepared folder, and refuses to delete anything else."""
    foreign = [
        p.name for p in Path(folder).iterdir() if p.name.removesuffix(".tmp") not in OWN_FILES
    ]
    if foreign:
        raise PrepError(
            f"{folder} also holds {sorted(foreign)[0]}; remove it or give another --out"
        )
    shutil.rmtree(folder)


def refuse_changed(old, new, folder):
    """Raises PrepError naming the first option in which two plans differ."""
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            what = "the list of images" if key == "list_sha256" else f"--{key} {old.get(key)}"
            now = "it has changed" if key == "list_sha256" else f"now asked: {new.get(key)}"
            raise PrepError(
                f"{folder} was begun with {what}; {now}; give --overwrite or another --out"
            )


def _lock(file, folder):
    """Refuses a second process on the same folder; the lock dies with its owner."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise PrepError(f"another process is writing {folder}; wait for it to end") from None


def is_finished(out, options, overwrite=False):
    """Whether `out` is complete and was made with the same options.

    Raises: PrepError if it was made with others, or is a folder of something else.
    """
    out, meta = Path(out), Path(out) / "meta.json"
    if overwrite or not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not meta.is_file():
        raise PrepError(
            f"{out} exists and is not a complete prepared folder (no meta.json); give --overwrite "
            "or another --out"
        )
    refuse_changed(json.loads(meta.read_text()).get("options", {}), options, out)
    return True


def prepare_picture(task, size):
    """Reads, resizes and hashes one picture and its mask.

    Args:
        task: (row, source, mask) as in `Listing`.
        size: S.
    Returns: (note, picture, mask): the journal entry and two (S, S) uint8 arrays, None where
        there is none.
    """
    row, source, mask = task
    try:
        if not isinstance(source, np.ndarray):
            source = read_xray(io.BytesIO(source) if isinstance(source, bytes) else source)
        shape, picture = source.shape, resize_xray(source, size)
        if isinstance(mask, tuple):
            parts = [rle_decode(text, *shape) for text in mask]
            mask = functools.reduce(np.logical_or, parts, np.zeros(shape, bool))
        elif mask is not None:
            try:
                mask = read_xray(mask)
            except ValueError as e:
                raise ValueError(f"its mask: {e}") from e
            mask = mask > mask.max() / 2  # 0/255 or 0/1
        if mask is not None:
            mask = (resize_xray(mask.astype(np.uint8) * 255, size) >= 128).astype(np.uint8)
    except ValueError as e:
        return {"row": row, "reason": _one_line(e)}, None, None
    digest = hashlib.sha256(picture.tobytes()).hexdigest()
    return {"row": row, "sha256": digest, "height": shape[0], "width": shape[1]}, picture, mask


def _work(work, batch):
    """One worker's share of a batch."""
    return [work(task) for task in batch]


def _start_worker():
    """Leaves Ctrl-C to the parent, and ends with it even when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def in_order(work, tasks, workers):
    """work(task) for every task, by several processes, results in order and few in flight.

    Args:
        work: picklable function of a task.
        tasks: iterable, read as the work goes on.
        workers: number of processes; 1 works in this one.
    Returns: iterator of lists of results.
    """
    batches = iter(lambda it=iter(tasks): [t for _, t in zip(range(BATCH), it, strict=False)], [])
    if workers == 1:
        yield from (_work(work, batch) for batch in batches)
        return
    # Forking is quicker by a second, and safe only in a process without threads.
    alone = threading.active_count() == 1 and "torch" not in sys.modules
    method = "fork" if alone and sys.platform == "linux" else "spawn"
    pool = ProcessPoolExecutor(workers, get_context(method), _start_worker)
    pending = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_work, work, batch))
            if len(pending) > 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise PrepError(
            "a worker process died (memory, or a decoder); the same command goes on, "
            "--workers 1 shows more"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def write_prepared(listing, out, options, workers=None, overwrite=False, work=prepare_picture):
    """Prepares a listing into the folder `out`; goes on where an earlier run was stopped.

    Args:
        listing: `Listing`.
        out: folder to make; its last part is the name of the set.
        options: dict of plain values, `command` and `size` among them; part of meta.json.
        workers: processes; None takes one a core.
        overwrite: replace a finished or half-finished folder.
        work: (task, size) -> (note, picture, mask).
    Returns: meta, the dict in meta.json.
    Raises: PrepError.
    """
    out, size, table = Path(out), options["size"], listing.table
    if listing.missing and not listing.allow_missing:
        _refuse_missing(listing.missing, len(table) + len(listing.missing), options)
    if not len(table):
        why = f"; first: {listing.rejected[0]}" if listing.rejected else ""
        raise PrepError(f"no image left to prepare under {options.get('raw')}{why}")
    if "patient" in table:
        check_patients(table)
    need, free = len(table) * size**2 * (1 + listing.has_masks), _free_bytes(out)
    if need > free and not Path(f"{out}.partial").exists():
        raise PrepError(f"{out} needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there")
    plan = options | {"list_sha256": _list_sha256(listing)}
    writer = PreparedWriter(out, size, listing.has_masks, plan, overwrite)
    try:
        done = {note["row"] for note in writer.notes}
        if done:
            print(f"{out}: going on after {len(done):,} of {len(table):,} images", flush=True)
        work = functools.partial(work, size=size)
        with Progress(len(table), len(done), str(out)) as progress:
            for results in in_order(work, _tasks(listing, done), workers or os.cpu_count()):
                writer.append(results)
                progress.add(len(results))
            writer.flush()
        tables, meta = _tables(listing, writer.notes, out, options)
        writer.finish(tables, meta)
    finally:
        writer.close()
    left_out = len(tables["rejected.csv"])
    counts = ", ".join(f"{split} {n:,}" for split, n in meta["counts"].items())
    print(f"{out}: {meta['images']:,} images ({counts}); {left_out:,} left out (rejected.csv)")
    return meta


def _refuse_missing(missing, total, options):
    """The one line for images that have no file."""
    raise PrepError(
        f"{len(missing):,} of {total:,} images are not under {options.get('raw')} (first: "
        f"{missing[0]}); complete the download, or give --allow-missing"
    )


def _free_bytes(out):
    """Free space where `out` will be."""
    parent = next(p for p in Path(out).absolute().parents if p.exists())
    return shutil.disk_usage(parent).free


def _list_sha256(listing):
    """Hash of the table: a changed CSV must not be mixed into a half-finished folder."""
    text = listing.table.drop(columns="source", errors="ignore").to_csv(index=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _tasks(listing, done):
    """(row, source, mask) of every picture not yet treated."""
    masks = listing.table["mask"].tolist() if "mask" in listing.table else None
    pairs = listing.stream(listing, done) if listing.stream else enumerate(listing.table["source"])
    for row, source in pairs:
        if row not in done:
            yield row, source, masks[row] if masks else None


def _tables(listing, notes, out, options):
    """The tables and meta.json of a finished run."""
    table, names = listing.table, listing.table["image"].tolist()
    rejected = listing.rejected + [(name, "file not found") for name in listing.missing]
    seen = {note["row"] for note in notes}
    unseen = [name for row, name in enumerate(names) if row not in seen]
    if unseen and not listing.allow_missing:
        _refuse_missing(unseen, len(names), options)
    rejected += [(name, "file not found") for name in unseen]
    rejected += [(names[n["row"]], n["reason"]) for n in notes if "reason" in n]
    good = [note for note in notes if "reason" not in note]
    if not good:
        raise PrepError(f"none of {len(names):,} images could be read; first: {rejected[0]}")
    labels = table.iloc[[note["row"] for note in good]].reset_index(drop=True)
    if "labels" in good[0]:  # drawn, not read: labels come with the pictures
        labels = labels.join(pd.DataFrame([note["labels"] for note in good]))
    columns = ["image", "patient", "split", *listing.findings]
    if listing.has_masks:
        labels["has_mask"] = labels["mask"].notna().astype(int)
        columns.append("has_mask")
    hashes = pd.DataFrame(good)[["sha256", "height", "width"]]
    hashes.insert(0, "image", labels["image"])
    tables = {"labels.csv": labels[columns], "hashes.csv": hashes}
    tables["rejected.csv"] = pd.DataFrame(rejected, columns=["image", "reason"])
    boxes = listing.boxes
    if "boxes" in good[0]:
        rows = [
            (name, *box)
            for name, n in zip(labels["image"], good, strict=True)
            for box in n["boxes"]
        ]
        boxes = pd.DataFrame(rows, columns=["image", "finding", "x", "y", "width", "height"])
    if boxes is not None:
        tables["boxes.csv"] = scale_boxes(boxes, hashes, options["size"])
    counts = labels["split"].value_counts()
    meta = {"format": FORMAT, "name": out.name, "size": options["size"], "images": len(labels)}
    meta |= {"findings": listing.findings}
    meta |= {"counts": {split: int(counts.get(split, 0)) for split in SPLITS}}
    meta |= {"rejected": len(rejected), "split_rule": listing.split_rule, "options": options}
    meta |= {"sources": {Path(p).name: file_digest(p) for p in listing.lists}}
    return tables, meta


def scale_boxes(boxes, sizes, size):
    """Boxes in source pixels -> prepared pixels, clipped to the picture.

    Args:
        boxes: `image, finding, x, y, width, height`; x, y is the upper left corner.
        sizes: `image, height, width` of the sources; boxes of other images are dropped.
        size: S.
    Returns: the boxes with an area inside the picture.
    """
    sizes = sizes.set_index("image")
    boxes = boxes[boxes["image"].isin(sizes.index)].reset_index(drop=True)
    for start, extent, edge in (("x", "width", "width"), ("y", "height", "height")):
        scale = size / sizes[edge].reindex(boxes["image"]).to_numpy()
        begin = (boxes[start] * scale).clip(0, size)
        end = ((boxes[start] + boxes[extent]) * scale).clip(0, size)
        boxes[start], boxes[extent] = begin.round(3), (end - begin).round(3)
    return boxes[(boxes["width"] > 0) & (boxes["height"] > 0)]


class Progress:
    """A bar on a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self, total, start, name):
        self.count, self.total, self.name, self.last = start, total, name, time.monotonic()
        tqdm.monitor_interval = 0  # no thread: workers are forked
        hide = not sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, desc=name, unit="", disable=hide)

    def add(self, count):
        """Counts finished images."""
        self.count += count
        self.bar.update(count)
        if self.bar.disable and time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            print(f"{self.name}: {self.count:,} of {self.total:,}", flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()


# ================================================================================================
# 4. The datasets
# ================================================================================================
RULE_CARVED = "official test set; validation: a tenth of the other patients, by SHA-256 of the id"
RULE_IMAGE = "no official test labels: 70/15/15 by image, by SHA-256 of the id"
NIH_FINDINGS = (
    "Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax "
    "Consolidation Edema Emphysema Fibrosis Pleural_Thickening Hernia"
).split()  # in the order of ChestMNIST's label columns
VINBIG_FINDINGS = (
    "Aortic enlargement,Atelectasis,Calcification,Cardiomegaly,Consolidation,ILD,Infiltration,"
    "Lung Opacity,Nodule/Mass,Other lesion,Pleural effusion,Pleural thickening,Pneumothorax,"
    "Pulmonary fibrosis"
).split(",")
BOX_COLUMNS = ["image", "finding", "x", "y", "width", "height"]


def list_folder(raw, csv=None):
    """Any folder of X-rays with a table: `image`, optional `patient`, `split`, `mask`, findings.

    Args:
        raw: folder with the files, or with `images/` and `masks/`.
        csv: table, inside `raw` or a path; None takes every image, without labels.
    Returns: `Listing`. A column is a finding if its values are 0, 1 or blank; others are ignored
        and named. Rows whose file is missing or outside `raw`, and files without a row, are
        rejected with a reason.
    """
    raw, rejected, lists = Path(raw), [], []
    on_disk = sorted(
        Path(p).relative_to(raw).as_posix()
        for p in walk_files(raw, PICTURE_SUFFIXES + DICOM_SUFFIXES)
    )
    if csv is None:
        table = pd.DataFrame({"image": on_disk}, dtype=str)
    else:
        lists = [raw / csv if (raw / csv).is_file() else Path(csv)]
        table = unique_rows(read_table(lists[0], ["image"]), "image", lists[0])
    if not on_disk or not len(table):
        raise PrepError(f"looked for X-rays under {raw}: {len(on_disk)} files, {len(table)} rows")
    if "patient" not in table:
        table["patient"] = table["image"]
    findings, ignored = _folder_findings(table)
    if ignored:
        print(f"ignored columns (values other than 0, 1, blank): {', '.join(ignored)}")
    if (table["patient"] == "").any():
        raise PrepError(f"{lists[0]}: {(table['patient'] == '').sum()} row(s) without a patient")
    rule = _folder_split(table, lists)
    has_masks, used = "mask" in table, set()
    masks = table["mask"] if has_masks else [""] * len(table)
    table["source"], table["mask"] = None, None
    for row, (name, mask) in enumerate(zip(table["image"], masks, strict=True)):
        try:
            source = _inside(raw, name, "images")
            used.add(source.relative_to(raw).as_posix())
            table.at[row, "mask"] = str(_inside(raw, mask, "masks")) if mask else None
            table.at[row, "source"] = str(source)
        except ValueError as e:
            rejected.append((name, _one_line(e)))
    table = table[table["source"].notna()].reset_index(drop=True)
    spare = [f for f in on_disk if f not in used and not (has_masks and f.startswith("masks/"))]
    rejected += [(name, f"no row in {Path(csv).name}") for name in spare]
    return Listing(table, findings, rule, lists, rejected, has_masks=has_masks)


def _folder_findings(table):
    """Turns 0/1/blank columns into Int64 in place; names of those, names of the ignored ones."""
    values, findings, ignored = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "": pd.NA}, [], []
    for name in [c for c in table if c not in ("image", "patient", "split", "mask")]:
        found = set(table[name])
        if name in ("source", "has_mask") or not found <= values.keys() or found == {""}:
            ignored.append(name)
        else:
            findings.append(name)
            table[name] = table[name].map(values).astype("Int64")
    return findings, ignored


def _folder_split(table, lists):
    """Adds or completes `split` in place; the rule in words."""
    if "split" not in table:
        table["split"] = [hash_split(p, BY_PATIENT) for p in table["patient"]]
        return "70/10/20 by patient, by SHA-256 of the id"
    table["split"] = table["split"].str.lower().replace({"valid": "val", "validation": "val"})
    odd = [s for s in table["split"] if s not in SPLITS]
    if odd:
        raise PrepError(f"{lists[0]}: split {odd[0]!r}; expected train, val or test in every row")
    check_patients(table)
    if {"val"} <= set(table["split"]) or "train" not in set(table["split"]):
        return "as in the column `split`"
    carve_validation(table)
    return "as in the column `split`; validation: a tenth of its training patients, by SHA-256"


def _inside(raw, name, folder):
    """The file that a name in a table stands for; ValueError if it is not there or not in `raw`."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name}: the name leaves the folder")
    for path in (raw / name, raw / folder / name):
        if path.is_file():
            return path
    raise ValueError(f"{name}: file not found")


def carve_validation(table):
    """Moves a tenth of the patients of `train` to `val`, in place, by a hash of their name."""
    train = table["split"] == "train"
    table.loc[train, "split"] = [hash_split(p, CARVED) for p in table["patient"][train]]


def nih_labels(entries, train_val_list, test_list):
    """Labels and official split of NIH ChestX-ray14, validation carved out by patient.

    Args:
        entries: either edition of `Data_Entry_2017*.csv`; train_val_list, test_list: text files.
    Returns: (table, rejected): `image, patient, split` and 14 findings ("No Finding" is the absence
        of all); images that are in neither list.
    Raises: PrepError on an unknown finding, a name or patient that is none, or an image or patient
        in both lists.
    """
    columns = ["Image Index", "Finding Labels", "Patient ID"]
    table = unique_rows(read_table(entries, columns)[columns], columns[0], entries)
    table.columns = ["image", "labels", "patient"]
    for name, labels, patient in table.itertuples(index=False):
        found = labels.split("|")
        odd = set(found) - set(NIH_FINDINGS) - ({"No Finding"} if len(found) == 1 else set())
        if odd or len(set(found)) < len(found):
            raise PrepError(f"{entries}: {name} has the labels {labels!r}; expected known findings")
        number = re.fullmatch(r"(\d{8})_\d{3}\.png", name, re.ASCII)
        if (
            not number
            or not re.fullmatch(r"\d+", patient, re.ASCII)
            or int(patient) != int(number[1])
        ):
            raise PrepError(f"{entries}: image {name!r}, patient {patient!r} do not fit together")
    split = {}
    for part, path in (("train", train_val_list), ("test", test_list)):
        if not Path(path).is_file():
            raise PrepError(f"looked for the list {path}: no such file")
        for name in Path(path).read_text("utf-8-sig", errors="replace").split():
            if split.setdefault(name, part) != part:
                raise PrepError(f"{name} is in both {train_val_list} and {test_list}")
    sets = table["labels"].str.split("|").map(set)
    for finding in NIH_FINDINGS:
        table[finding] = [int(finding in found) for found in sets]
    table["patient"] = [str(int(p)) for p in table["patient"]]
    table["split"] = table["image"].map(split)
    lost = table["image"][table["split"].isna()]
    table = table[table["split"].notna()].drop(columns="labels").reset_index(drop=True)
    check_patients(table)
    carve_validation(table)
    return table, [(name, "in neither official list") for name in lost]


def list_nih(raw, allow_missing=False):
    """NIH ChestX-ray14: Kaggle's folders, or NIH's archives, which are streamed, not unpacked.

    Args:
        raw: folder with `Data_Entry_2017*.csv`, `train_val_list.txt`, `test_list.txt`, optionally
            `BBox_List_2017.csv`, and PNGs at any depth or `images_*.tar.gz`.
        allow_missing: list missing images instead of refusing.
    Returns: `Listing`.
    """
    raw = Path(raw)
    files = {f"{stem}.png": path for stem, path in index_files(raw, (".png",)).items()}
    archives = sorted([*raw.glob("images_*.tar.gz"), *raw.glob("images_*.tgz")])
    entries = sorted(raw.glob("Data_Entry_2017*.csv"))
    if not entries:
        raise PrepError(f"looked for Data_Entry_2017*.csv in {raw}: not there; see --download")
    lists = [entries[-1], raw / "train_val_list.txt", raw / "test_list.txt"]
    table, rejected = nih_labels(*lists)
    boxes = None
    if (raw / "BBox_List_2017.csv").is_file():
        lists.append(raw / "BBox_List_2017.csv")
        boxes = read_table(lists[-1], ["Image Index", "Finding Label"]).iloc[:, :6]
        boxes.columns = BOX_COLUMNS
        boxes["finding"] = boxes["finding"].replace("Infiltrate", "Infiltration")
        boxes[BOX_COLUMNS[2:]] = numbers(boxes, BOX_COLUMNS[2:], lists[-1])
    listing = Listing(table, NIH_FINDINGS, RULE_CARVED, lists, rejected, boxes=boxes)
    if files or not archives:
        return listing.attach(files, lists[0], allow_missing)
    if len(archives) < 12 and len(table) > 100_000 and not allow_missing:
        raise PrepError(f"{len(archives)} of 12 archives in {raw}; see --allow-missing")
    stream = functools.partial(_stream_archives, archives)
    return dataclasses.replace(listing, stream=stream, allow_missing=allow_missing)


def _stream_archives(archives, listing, done):
    """(row, bytes) of every listed PNG in the archives; others are rejected with a reason."""
    rows, seen = {name: row for row, name in enumerate(listing.table["image"])}, set()
    for archive in archives:
        try:
            with tarfile.open(archive, "r|gz") as tar:
                for member in tar:
                    name = member.name.removeprefix("./").removeprefix("images/")
                    reason = None if name in rows else "no row in the label table"
                    if not member.isreg():
                        reason = "not a regular file"
                    elif name in seen or member.size > MAX_BYTES:
                        reason = "twice in the archives, or above 256 MiB"
                    if reason is None:
                        seen.add(name)
                        if rows[name] not in done:
                            yield rows[name], tar.extractfile(member).read()
                    elif not member.isdir():
                        listing.rejected.append((member.name, f"{archive.name}: {reason}"))
        except (tarfile.TarError, EOFError, zlib.error, OSError) as e:
            raise PrepError(f"{archive} is damaged ({_one_line(e)}); download it again") from e


def list_chestmnist(npz):
    """ChestMNIST, NIH images at 28 to 224 px with a split of its own and no patient ids.

    Args:
        npz: the file as published.
    Returns: `Listing` that streams the pictures; every image is its own patient. The split is not
        NIH's: its training part holds official NIH test images.
    """
    tables = []
    try:
        with np.load(npz) as arrays:
            for split in SPLITS:
                labels = arrays[f"{split}_labels"]
                if labels.ndim != 2 or labels.shape[1] != 14 or not np.isin(labels, (0, 1)).all():
                    raise ValueError(f"{split}_labels {labels.shape}; expected (N, 14) of 0 and 1")
                part = pd.DataFrame(labels.astype(int), columns=NIH_FINDINGS)
                names = [f"{split}-{k:05d}" for k in range(len(part))]
                part.insert(0, "image", names)
                tables.append(part.assign(patient=names, split=split))
                with arrays.zip.open(f"{split}_images.npy") as f:
                    if npz_shape(f)[0] != len(labels):
                        raise ValueError(f"{split}: images and labels differ in number")
    except (ValueError, KeyError, OSError, EOFError, IndexError, zipfile.BadZipFile) as e:
        raise PrepError(
            f"{npz} does not read as ChestMNIST ({_one_line(e)}); see --download"
        ) from e
    table = pd.concat(tables, ignore_index=True)
    stream = functools.partial(_stream_npz, npz)
    return Listing(table, NIH_FINDINGS, "ChestMNIST's own, by image", stream=stream)


def npz_shape(file):
    """(N, H, W) from the header of an open .npy of uint8 pictures; ValueError if it is none."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("unknown array format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if len(shape) != 3 or fortran or dtype != np.uint8:
        raise ValueError(f"pictures of {dtype} {shape}; expected uint8 (N, H, W)")
    _check_size(*shape[1:])
    return shape


def npz_size(npz):
    """Edge of the pictures in a ChestMNIST file; PrepError if there is no such file."""
    try:
        with zipfile.ZipFile(npz) as archive, archive.open("train_images.npy") as f:
            return npz_shape(f)[1]
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as e:
        raise PrepError(f"{npz} is no ChestMNIST file ({_one_line(e)}); see --download") from e


def _stream_npz(npz, listing, done):
    """(row, (H, W) uint8) of every picture, read one by one: the largest file inflates to 6 GB."""
    row = -1
    with zipfile.ZipFile(npz) as archive:
        for split in SPLITS:
            with archive.open(f"{split}_images.npy") as f:
                count, height, width = npz_shape(f)
                for _ in range(count):
                    row, pixels = row + 1, f.read(height * width)
                    if len(pixels) < height * width:
                        raise PrepError(f"{npz} is truncated in {split}_images; download it again")
                    if row not in done:
                        yield row, np.frombuffer(pixels, np.uint8).reshape(height, width)


def rsna_labels(csv):
    """Labels and boxes of the RSNA pneumonia challenge, one row an image.

    Args:
        csv: `stage_2_train_labels.csv`, a row a box.
    Returns: (table, boxes): `image, patient, split, Pneumonia`; boxes in source pixels.
    """
    edges = ["x", "y", "width", "height"]
    rows = read_table(csv, ["patientId", *edges, "Target"]).drop_duplicates()
    rows = rows[["patientId", *edges, "Target"]]
    if not rows["Target"].isin(["0", "1"]).all():
        raise PrepError(f"{csv}: expected 0 or 1 in Target")
    blank = (rows[edges] == "").all(axis=1)
    if (blank == (rows["Target"] == "1")).any():
        raise PrepError(f"{csv}: expected a box in each row with Target 1, and in no other")
    table = unique_rows(rows[["patientId", "Target"]], "patientId", csv)
    table.columns = ["image", "Pneumonia"]
    table["Pneumonia"] = table["Pneumonia"].astype(int)
    table["patient"] = table["image"]
    table["split"] = [hash_split(name, BY_IMAGE) for name in table["image"]]
    boxes = rows[~blank].reset_index(drop=True)
    boxes[edges] = numbers(boxes, edges, csv)
    boxes = boxes.rename(columns={"patientId": "image"}).assign(finding="Pneumonia")
    return table, boxes[BOX_COLUMNS]


def list_rsna(raw, allow_missing=False):
    """RSNA pneumonia 2018: `stage_2_train_labels.csv`, `stage_2_train_images/*.dcm` -> Listing."""
    csv = Path(raw) / "stage_2_train_labels.csv"
    table, boxes = rsna_labels(csv)
    files = index_files(Path(raw) / "stage_2_train_images", DICOM_SUFFIXES)
    listing = Listing(table, ["Pneumonia"], RULE_IMAGE, [csv], boxes=boxes)
    return listing.attach(files, csv, allow_missing)


def siim_labels(csv):
    """Labels and RLE masks of the SIIM-ACR pneumothorax challenge, one row an image.

    Args:
        csv: `train-rle.csv` or `stage_2_train.csv`, a row a region.
    Returns: table `image, patient, split, Pneumothorax, mask`; mask is a tuple of RLE texts, to be
        united; () where there is no pneumothorax.
    """
    rows = read_table(csv, ["ImageId", "EncodedPixels"])
    regions = {}
    for name, text in zip(rows["ImageId"], rows["EncodedPixels"], strict=True):
        if not name or not text:
            raise PrepError(f"{csv}: a row without ImageId or EncodedPixels")
        regions.setdefault(name, set()).add(text)
    for name, texts in regions.items():
        if "-1" in texts and len(texts) > 1:
            raise PrepError(f"{csv}: {name} has conflicting rows, -1 and a region")
    table = pd.DataFrame({"image": list(regions)}, dtype=str)
    table["patient"] = table["image"]
    table["split"] = [hash_split(name, BY_IMAGE) for name in table["image"]]
    table["mask"] = [tuple(sorted(texts - {"-1"})) for texts in regions.values()]
    table["Pneumothorax"] = table["mask"].map(len).clip(upper=1)
    return table


def list_siim(raw, allow_missing=False):
    """SIIM-ACR pneumothorax 2019: RLE table and DICOMs at any depth under `raw` -> Listing."""
    found = [Path(raw) / name for name in ("train-rle.csv", "stage_2_train.csv")]
    csv = next((path for path in found if path.is_file()), found[0])
    listing = Listing(siim_labels(csv), ["Pneumothorax"], RULE_IMAGE, [csv], has_masks=True)
    return listing.attach(index_files(raw, DICOM_SUFFIXES), csv, allow_missing)


def vinbig_labels(csv, readers="majority"):
    """Labels and boxes of VinBigData's Kaggle table, several readers an image.

    Args:
        csv: `train.csv`, a row a reader and box.
        readers: a finding is present if `any` reader, or the `majority` of them, drew it.
    Returns: (table, boxes): 14 findings; every reader's boxes of the findings that are present.
    """
    edges = ["x_min", "y_min", "x_max", "y_max"]
    rows = read_table(csv, ["image_id", "class_name", "rad_id", *edges])
    odd = set(rows["class_name"]) - {*VINBIG_FINDINGS, "No finding"}
    if odd or (rows[["image_id", "rad_id"]] == "").any(axis=None):
        raise PrepError(f"{csv}: unknown class {sorted(odd)[:1]}, or a row without image or reader")
    count = rows.groupby("image_id", sort=False)["rad_id"].nunique()
    votes = rows.groupby(["image_id", "class_name"])["rad_id"].nunique().unstack(fill_value=0)
    share = votes.reindex(index=count.index, columns=VINBIG_FINDINGS, fill_value=0)
    return _vinbig_table(
        share.div(count, axis=0), rows[rows["class_name"] != "No finding"], readers, csv
    )


def physionet_labels(csv, boxes_csv, readers="majority"):
    """Labels and boxes of one part of VinDr-CXR as PhysioNet publishes it.

    Args:
        csv: `image_labels_train.csv` or `image_labels_test.csv`, a row a reader (train).
        boxes_csv: `annotations_train.csv` or `annotations_test.csv`; may be missing.
        readers: as in `vinbig_labels`; the test part is a consensus.
    Returns: (table, boxes).
    """
    rows = read_table(csv, ["image_id"]).rename(columns={"Other disease": "Other diseases"})
    findings = [c for c in rows if c not in ("image_id", "rad_id", "rad_ID", "No finding")]
    rows[findings] = numbers(rows, findings, csv)
    if not rows[findings].isin([0, 1]).all(axis=None) or (rows["image_id"] == "").any():
        raise PrepError(f"{csv}: expected 0 or 1 in every finding, and an image_id in every row")
    edges = ["image_id", "class_name", "x_min", "y_min", "x_max", "y_max"]
    boxes = pd.DataFrame(columns=edges)
    if Path(boxes_csv).is_file():
        boxes = read_table(boxes_csv, edges)
        boxes["class_name"] = boxes["class_name"].replace("Other disease", "Other diseases")
        boxes = boxes[boxes["class_name"].isin(findings)]
    share = rows.groupby("image_id", sort=False)[findings].mean()
    return _vinbig_table(share, boxes, readers, boxes_csv)


def _vinbig_table(share, boxes, readers, path):
    """Share of readers an image and finding -> 0/1 table, and the boxes of what is present."""
    present = share > (0.5 if readers == "majority" else 0)
    findings = list(present.columns)
    table = present.astype(int).reset_index().rename(columns={"image_id": "image"})
    table["patient"] = table["image"]
    edges = ["x_min", "y_min", "x_max", "y_max"]
    corner = numbers(boxes, edges, path).to_numpy()
    out = pd.DataFrame(corner, columns=BOX_COLUMNS[2:])
    out[["width", "height"]] -= out[["x", "y"]].to_numpy()
    out.insert(0, "finding", boxes["class_name"].to_numpy())
    out.insert(0, "image", boxes["image_id"].to_numpy())
    if ((out["width"] < 0) | (out["height"] < 0)).any():
        raise PrepError(f"{path}: a box ends before it begins")
    flat = present.stack()
    keep = [bool(flat.get(pair, False)) for pair in zip(out["image"], out["finding"], strict=True)]
    return table[["image", "patient", *findings]], out[keep].reset_index(drop=True)


def list_vinbig(raw, readers="majority", allow_missing=False):
    """VinBigData / VinDr-CXR: Kaggle's `train.csv`, `train/*.dicom`, or PhysioNet's folders.

    Args:
        raw: folder of either.
        readers: `any` or `majority`; allow_missing: list missing images instead of refusing.
    Returns: `Listing`; PhysioNet's test set is kept, Kaggle's images are split by image.
    """
    raw, rule, split = Path(raw), RULE_IMAGE, {}
    if (raw / "train.csv").is_file():
        lists = [raw / "train.csv"]
        table, boxes = vinbig_labels(lists[0], readers)
        table["split"] = [hash_split(name, BY_IMAGE) for name in table["image"]]
        files = index_files(raw / "train", DICOM_SUFFIXES)
    else:
        notes, parts, files = raw / "annotations", [], {}
        lists = [notes / f"image_labels_{split}.csv" for split in ("train", "test")]
        if not lists[0].is_file():
            raise PrepError(f"looked for train.csv (Kaggle) or {lists[0]} (PhysioNet): neither")
        for csv, split in zip(lists, ("train", "test"), strict=True):
            table, boxes = physionet_labels(csv, notes / f"annotations_{split}.csv", readers)
            parts.append((table.assign(split=split), boxes))
            files |= index_files(raw / split, DICOM_SUFFIXES)
        lists += [p for p in sorted(notes.glob("annotations_*.csv"))]
        table = pd.concat([p[0] for p in parts], ignore_index=True)
        boxes = pd.concat([p[1] for p in parts], ignore_index=True)
        check_patients(table)
        carve_validation(table)
        rule = RULE_CARVED
    findings = [c for c in table if c not in ("image", "patient", "split")]
    listing = Listing(table, findings, f"{rule}; labels by {readers}", lists, boxes=boxes)
    return listing.attach(files, lists[0], allow_missing)


# ================================================================================================
# 5. Downloads
# ================================================================================================
NIH_URL = "https://nihcc.box.com/shared/static/"
NIH_ARCHIVES = (
    "vfk49d74nhbxq3nqjg0900w5nvkorp5c i28rlmbvmfjbl8p2n3ril0pptcmcu9d1 "
    "f1t00wrtdk94satdfb9olcolqx20z2jp 0aowwzs5lhjrceb3qp67ahp0rd1l1etg "
    "v5e3goj22zr6h8tzualxfsqlqaygfbsn asi7ikud9jwnkrnkj99jnpfkjdes7l6l "
    "jn1b4mw4n6lnh74ovmcjb8y48h8xj07n tvpxmn7qyrgl0w8wfh9kqfjskv6nmm1j "
    "upyy3ml7qdumlgk2rfcvlb9k6gvqq2pj l6nilvfa9cg3s28tqv1qc1olm3gnz54p "
    "hhq8fkdgvcari67vfhs7ppg2w6ni4jze ioqwiy20ihqwyr8pf4c24eazhh281pbu"
).split()
# A mirror: NIH's own folder of lists has no direct links.
NIH_LISTS_URL = (
    "https://huggingface.co/datasets/alkzar90/NIH-Chest-X-ray-dataset/resolve/main/data/"
)
NIH_LISTS = "Data_Entry_2017_v2020.csv train_val_list.txt test_list.txt BBox_List_2017.csv".split()
CHESTMNIST_URL = "https://zenodo.org/records/10519652/files/"
CHESTMNIST_FILES = {
    28: ("chestmnist.npz", "02c8a6516a18b556561a56cbdd36c4a8"),
    64: ("chestmnist_64.npz", "9de6cd0b934ebb5b7426cfba5efbae16"),
    128: ("chestmnist_128.npz", "db107e5590b27930b62dbaf558aebee3"),
    224: ("chestmnist_224.npz", "45bd33e6f06c3e8cdb481c74a89152aa"),
}


def download(url, path, md5=None, attempts=5):
    """Fetches a file; a broken transfer is gone on with, a whole file is not fetched again.

    Args:
        url, path: from and to; `<path>.part` holds what has come so far.
        md5: hex digest to check, or None: then the size the server states.
        attempts: connections before giving up.
    Returns: path.
    Raises: PrepError.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have, total, why = 0, None, "no answer"
    for _ in range(0 if path.exists() else attempts):
        have = part.stat().st_size if part.exists() else 0
        try:
            have, total = _fetch(url, part, have)
            why = f"{have:,} of {total:,} bytes came"
        except (OSError, ValueError, TypeError, http.client.HTTPException) as e:
            why = _one_line(e)
        if have == total:
            break
    if path.exists():
        return path
    if have != total:
        raise PrepError(f"{url}: {why}; the same command goes on with the transfer")
    if md5 and file_digest(part, "md5") != md5:
        part.unlink()
        raise PrepError(f"{url} is not the published file (its MD5 differs); start again")
    os.replace(part, path)
    return path


def _fetch(url, part, have):
    """One connection: appends to `part` from byte `have`; (bytes there now, bytes expected)."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        reply = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as e:
        if e.code == 416:  # nothing after `have`: the part is the whole file, or no part of it
            total = int(e.headers["Content-Range"].rpartition("/")[2])
            if have > total:
                part.unlink()
            return have, total
        raise
    with reply:
        have = have if reply.status == 206 else 0
        total = have + int(reply.headers["Content-Length"])
        with open(part, "ab" if have else "wb") as f, Progress(total, have, part.name) as progress:
            while block := reply.read(1 << 20):
                f.write(block)
                have += len(block)
                progress.add(len(block))
    return have, total


# ================================================================================================
# 6. Verify
# ================================================================================================
# Positives in the complete sets, (train + val, test) where the test set is official.
KNOWN_COUNTS = {
    "nih": {
        "images": (86524, 25596), "No Finding": (50500, 9861), "Atelectasis": (8280, 3279),
        "Cardiomegaly": (1707, 1069), "Consolidation": (2852, 1815), "Edema": (1378, 925),
        "Effusion": (8659, 4658), "Emphysema": (1423, 1093), "Fibrosis": (1251, 435),
        "Hernia": (141, 86), "Infiltration": (13782, 6112), "Mass": (4034, 1748),
        "Nodule": (4708, 1623), "Pleural_Thickening": (2242, 1143), "Pneumonia": (876, 555),
        "Pneumothorax": (2637, 2665),
    },
    "chestmnist": {"images": (78468 + 11219, 22433)},
    "rsna": {"images": (26684,), "Pneumonia": (6012,)},
    "siim": {"images": (12047,), "Pneumothorax": (2669,)},
    "vinbig any": dict(
        zip(
            ["images", *VINBIG_FINDINGS, "No Finding"],
            [(n,) for n in (15000, 3067, 186, 452, 2300, 353, 386, 613, 1322, 826, 1134, 1032,
                            1981, 96, 1617, 10606)],
            strict=True,
        )
    ),
    "vinbig majority": dict(
        zip(
            ["images", *VINBIG_FINDINGS],
            [(n,) for n in (15000, 2346, 62, 177, 1817, 121, 152, 245, 547, 405, 362, 634, 882,
                            58, 1017)],
            strict=True,
        )
    ),
}  # fmt: skip


def verify(folder):
    """Checks a prepared folder against its own hashes and counts, and prints what is in it.

    Args:
        folder: prepared folder.
    Returns: list of problems, one line each: changed bytes, wrong counts, a patient in two splits,
        one picture in two splits. Duplicates within a split and blank pictures are only printed.
    Raises: PrepError if the folder is not a complete prepared folder.
    """
    folder, problems = Path(folder), []
    try:
        meta = json.loads((folder / "meta.json").read_text())
        tables = [read_table(folder / f"{name}.csv", ["image"]) for name in ("labels", "hashes")]
        labels = tables[0].join(tables[1][["sha256"]])
        shape = (meta["images"], meta["size"], meta["size"])
        digests, blank, whole = _hash_rows(folder / "images.npy", shape)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise PrepError(f"{folder} is no complete prepared folder: {_one_line(e)}") from e
    if {len(labels), len(tables[1]), len(digests)} != {meta["images"]}:
        problems.append(f"{len(labels)} rows, {len(digests)} pictures, meta.json: {meta['images']}")
        return problems
    if whole != meta["images_sha256"]:
        changed = labels["image"][labels["sha256"] != digests].tolist()
        problems.append(f"images.npy has changed; pictures concerned: {changed[:3] or 'none'}")
    if dict(labels["split"].value_counts()) != {k: v for k, v in meta["counts"].items() if v}:
        problems.append(f"labels.csv has other split sizes than meta.json: {meta['counts']}")
    try:
        check_patients(labels)
    except PrepError as e:
        problems.append(str(e))
    print(f"{len(blank)} blank pictures: {[labels['image'][row] for row in blank[:10]]}")
    for _, same in labels.assign(digest=digests).groupby("digest"):
        if len(same) > 1:
            names = " = ".join(
                f"{i} ({s})" for i, s in zip(same["image"], same["split"], strict=True)
            )
            print(f"one picture: {names}")
            if same["split"].nunique() > 1:
                problems.append(f"one picture in two splits: {names}")
    print(count_table(labels, meta).to_string())
    return problems


def _hash_rows(path, shape):
    """SHA-256 of every picture, rows of constant pictures, SHA-256 of the file; in little memory."""
    digests, blank, whole = [], [], hashlib.sha256()
    with open(path, "rb") as f:
        whole.update(f.read(HEADER))
        while pixels := f.read(shape[1] * shape[2]):
            whole.update(pixels)
            if pixels.count(pixels[0]) == len(pixels):
                blank.append(len(digests))
            digests.append(hashlib.sha256(pixels).hexdigest())
    return digests, blank, whole.hexdigest()


def count_table(labels, meta):
    """Positives a finding and split, beside the published counts of the complete set.

    Args:
        labels: labels.csv as strings; meta: dict of meta.json.
    Returns: DataFrame, a row a finding; `known` is blank where nothing is published.
    """
    positive = labels[meta["findings"]].isin(["1", "1.0"])
    rows = {"images": positive.any(axis=1) | True, "No Finding": ~positive.any(axis=1)}
    rows |= {finding: positive[finding] for finding in meta["findings"]}
    command, readers = meta["options"]["command"], meta["options"].get("readers")
    known = KNOWN_COUNTS.get(f"{command} {readers}" if readers else command, {})
    table = pd.DataFrame(
        {
            split: {name: row[labels["split"] == split].sum() for name, row in rows.items()}
            for split in SPLITS
        }
    )
    table["all"] = table.sum(axis=1)
    table["known"] = [" + test ".join(map(str, known.get(name, ()))) for name in rows]
    return table


# ================================================================================================
# 7. Demo phantoms
# ================================================================================================

# ================================================================================================
# 7. Demo phantoms: thickness maps summed along the beam, then a film-like response
# ================================================================================================
PHANTOM_COARSE = ("Cardiomegaly", "Effusion", "Consolidation")
PHANTOM_FINE = ("Nodule", "Pneumothorax", "Fibrosis")
PHANTOM_FINDINGS = PHANTOM_COARSE + PHANTOM_FINE
# One entry a hospital. `prevalence` is in the order of PHANTOM_FINDINGS (Fibrosis is the rare one),
# `dark` the optical depth shown as middle gray, `slope` the contrast of the film around it.
PHANTOM_SITES = {
    "a": dict(code=0, prevalence=(0.13, 0.21, 0.17, 0.17, 0.11, 0.04), fat=0.06,
              dark=1.45, slope=1.9, scatter=0.10, noise=0.028),
    "b": dict(code=1, prevalence=(0.20, 0.25, 0.09, 0.10, 0.06, 0.08), fat=0.13,
              dark=1.20, slope=1.5, scatter=0.18, noise=0.045),
}  # fmt: skip
# Range of each measure of a patient. Lengths are in half image widths; `heart` is the healthy
# cardiothoracic ratio, `spacing` and `slope` belong to the ribs, a negative `breast` means none.
BUILD = dict(
    width=(0.62, 0.80), apex=(-0.80, -0.68), heart=(0.37, 0.49), tilt=(0.2, 0.7), bone=(0.7, 1.3),
    spacing=(0.125, 0.15), slope=(0.14, 0.34), breast=(-0.35, 0.35), vessels=(0.06, 0.11),
)  # fmt: skip
# Images of 16 consecutive patients, 40 in all, shuffled block by block: any index finds its
# patient without a history.
IMAGES_PER_PATIENT = (1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 5, 5)


def patient_of(seed, index, site="a"):
    """Number of the patient to whom image `index` belongs.

    Args:
        seed, index: non-negative integers.
        site: a key of PHANTOM_SITES.
    Returns: int; a patient owns 1 to 5 consecutive indices, 2.5 on average.
    """
    block, place = divmod(index, sum(IMAGES_PER_PATIENT))
    rng = np.random.default_rng([seed, PHANTOM_SITES[site]["code"], 0, block])
    ends = np.cumsum(rng.permutation(IMAGES_PER_PATIENT))
    return block * len(IMAGES_PER_PATIENT) + int(np.searchsorted(ends, place, side="right"))


def phantom_patient(seed, patient, site="a"):
    """What stays the same from one image of a patient to the next: build and proneness to disease.

    Args:
        seed, patient: non-negative integers.
        site: a key of PHANTOM_SITES.
    Returns: dict: the measures of BUILD, `fat`, and `risk`, (7,) standard normals: one a finding,
        and a last one shared by all findings.
    """
    place = PHANTOM_SITES[site]
    rng = np.random.default_rng([seed, place["code"], 1, patient])
    body = {name: rng.uniform(*limits) for name, limits in BUILD.items()}
    return body | dict(fat=place["fat"] + rng.exponential(0.06), risk=rng.standard_normal(7))


def phantom_severity(body, rng, prevalence):
    """Which findings an image shows and how strongly: one Gaussian threshold a finding.

    Args:
        body: from `phantom_patient`; its `risk` makes findings persist and go together.
        rng: numpy Generator of the image.
        prevalence: (6,) probabilities in the order of PHANTOM_FINDINGS.
    Returns: dict name -> 0.0 if absent, else severity, uniform in (0, 1].
    """
    *own, shared = body["risk"]
    severity, chance = {}, rng.standard_normal(len(own))
    for name, risk, luck, p in zip(PHANTOM_FINDINGS, own, chance, prevalence, strict=True):
        z = 0.35 * shared + 0.6 * risk + math.sqrt(1 - 0.35**2 - 0.6**2) * luck
        # The tail of a normal is uniform in (0, 1): below p the finding is there, deeper is worse.
        severity[name] = max(0.0, 1 - math.erfc(z / math.sqrt(2)) / (2 * p))
    return severity


def _ramp(distance, width=0.03):
    """A soft step from 0 to 1 around distance 0."""
    return np.clip(distance / width + 0.5, 0, 1)


def _ball(x, y, x0, y0, a, b, tilt=0.0):
    """Thickness, 1 at the centre, of an ellipsoid with half axes a and b."""
    c, s = math.cos(tilt), math.sin(tilt)
    u, v = (c * (x - x0) + s * (y - y0)) / a, (c * (y - y0) - s * (x - x0)) / b
    return np.sqrt(np.maximum(1 - u * u - v * v, 0))


def _smooth(image, sigma):
    """Gaussian blur with sigma in half image widths; by FFT, so that no thread count matters."""
    size = len(image)
    fx, fy = np.fft.rfftfreq(size, 2 / size), np.fft.fftfreq(size, 2 / size)
    gx, gy = (np.exp(-2 * (np.pi * sigma * f) ** 2).astype(np.float32) for f in (fx, fy))
    return np.fft.irfft2(np.fft.rfft2(image) * gx * gy[:, None], s=image.shape)


def _texture(rng, size, fine, coarse):
    """Band-passed noise of unit variance, structures between the two lengths."""
    white = rng.standard_normal((size, size), dtype=np.float32)
    band = _smooth(white, fine) - _smooth(white, coarse)
    return band / band.std()


def _bones(x, y, cage, body, turn):
    """Thickness of spine, ribs and clavicles."""
    r, bone = np.abs(x) / body["width"], np.zeros_like(x)
    inside = _ramp(1.04 - cage, 0.1)
    # Equal ribs repeat down the image, so one folded coordinate draws them all.
    back = y - body["slope"] * r**2.2 + 0.08 * r
    front = y + 0.50 * r - 0.12 * r**4
    for curve, reach, amount in ((back, 2 * r, 0.16), (front, 5 * r - 1.9, 0.09)):
        fold = np.abs((curve / body["spacing"]) % 1 - 0.5) * body["spacing"]
        rim = 1 + 0.3 * _ramp(0.006 - np.abs(fold - 0.018), 0.012)  # the cortex is denser
        bone += amount * rim * _ramp(0.026 - fold, 0.014) * inside * np.clip(reach, 0, 1)
    spine = np.sqrt(np.clip(1 - (x / 0.095) ** 2, 0, 1))
    side = np.abs(x - 0.5 * turn)
    bend = y - (body["apex"] + 0.17 - 0.20 * side + 0.035 * np.sin(9 * side))
    clavicle = np.sqrt(np.clip(1 - (bend / 0.034) ** 2, 0, 1)) * _ramp(0.36 - np.abs(side - 0.45))
    scapula = _ball(np.abs(x), y, body["width"] + 0.03, -0.34, 0.09, 0.30, 0.25)
    bone += 0.45 * spine + 0.30 * clavicle + 0.16 * _ramp(scapula - 0.2, 0.3)
    return bone * body["bone"]


def _pose(rng, size):
    """Pixel grid in patient coordinates (x to the image right, y down) and the way back."""
    turn = rng.uniform(0.96, 1.22) * np.exp(1j * rng.normal(0, 0.05))
    shift = rng.normal(0, 0.06) + 1j * rng.normal(0.04, 0.06)

    def to_pixel(points):
        spot = (turn * points + shift + 1 + 1j) * size / 2
        return np.clip([spot.imag, spot.real], 0, size - 1).astype(int)

    centre = (np.arange(size) + 0.5) * 2 / size - 1
    grid = (centre + 1j * centre[:, None] - shift) / turn
    return grid.real.astype(np.float32), grid.imag.astype(np.float32), to_pixel


def _vessels(rng, size, to_pixel):
    """Bronchovascular tree: curved branches that fan out from both hila, splatted as points."""
    trunks, twigs, t = 26, 120, np.linspace(0, 1, 80)
    angle = rng.uniform(-1.4, 1.5, (trunks, 1)) + rng.normal(0, 0.7, (trunks, 1)) * t
    step = rng.uniform(0.3, 0.75, (trunks, 1)) / t.size * np.exp(1j * angle)
    path = 0.17 - 0.1j + np.cumsum(step, 1)
    parent, knot = rng.integers(trunks, size=(twigs, 1)), rng.integers(8, 60, size=(twigs, 1))
    bend = angle[parent, knot] + rng.normal(0, 0.8, (twigs, 1))
    reach = rng.uniform(0.08, 0.3, (twigs, 1)) * t
    path = np.concatenate([path, path[parent, knot] + reach * np.exp(1j * bend)])
    mirrored = np.append(np.arange(trunks), parent) % 2 == 0
    path[mirrored] = -path[mirrored].conj()
    weight = np.repeat((1.4, 0.3), (trunks, twigs))[:, None] * (1 - 0.85 * t)
    row, column = to_pixel(path)
    image = np.bincount((row * size + column).ravel(), weight.ravel(), size**2)
    return _smooth(image.reshape(size, size).astype(np.float32) * (size / 128) ** 2, 0.013)


def _anatomy(rng, body, x, y, enlarged):
    """Maps of one patient at one breath: `lung` in [0, 1], optical depths `soft`, `solid`."""
    r, rise = np.abs(x) / body["width"], np.maximum(0.22 - y, 0) / (0.22 - body["apex"])
    cage = r**2.4 + rise**2.3  # 0 on the axis of the rib cage, 1 on the inner chest wall
    # The level of the diaphragm, and how far a turned patient throws the mediastinum sideways.
    breath, turn = rng.normal(0.36, 0.10), rng.normal(0, 0.05)
    domes = breath + rng.normal(0, 0.055, 2) + (0.0, 0.04)  # the patient's right is higher
    floor = np.where(x > 0, domes[1], domes[0]) + 0.85 * np.abs(r - 0.45) ** 2.2
    inner = 0.10 + 0.12 * _ramp(y - breath + 0.18, 0.4) + 0.2 * _ramp(rise - 0.92, 0.25)
    lung = _ramp(1 - cage, 0.09) * _ramp(floor - y) * _ramp(np.abs(x - turn) - inner, 0.05)
    # A deep breath makes the same heart look narrow.
    a = body["width"] * (body["heart"] + 0.15 * enlarged - 0.15 * (breath - 0.36))
    heart = _ball(x, y, 0.32 * a + turn, breath - 0.45 * a, a, 0.76 * a, body["tilt"])
    root = _ball(x, y, 0.10 * a + turn, breath - 0.95 * a, 0.62 * a, 1.05 * a, 0.15)
    knob = _ball(x, y, 0.09 + turn, body["apex"] + 0.38, 0.085, 0.11)
    for part in (heart, root, knob):
        lung = lung * (1 - 0.92 * _ramp(part - 0.25, 0.5))
    belly = _ramp(y - floor - 0.06, 0.25) * _ramp(1.1 - cage, 0.3)
    trachea = _ramp(0.045 - np.abs(x - turn), 0.03) * _ramp(-0.2 - y, 0.1)
    bubble = rng.random() * _ball(x, y, 0.3, domes[1] + 0.16, 0.14, 0.07)
    breast = max(0, body["breast"]) * _ball(np.abs(x), y, 0.4, 0.22, 0.3, 0.24)
    bones = _bones(x, y, cage, body, turn) * (1 - 0.6 * belly)
    solid = 0.25 * (heart + knob) - 0.25 * trachea - 0.5 * bubble + bones
    trunk = np.sqrt(np.maximum(1 - (x / (body["width"] + 0.3 + body["fat"])) ** 2, 0.05))
    trunk *= 0.75 + 0.9 * body["fat"] + 0.25 * _ramp(y - 0.2, 1.2)
    soft = 1.9 * trunk + breast + 0.4 * belly
    return dict(cage=cage, breath=breath, lung=lung, heart=heart, soft=soft, solid=solid)


def _seat(rng, lung, to_pixel):
    """Row and column of a random point well inside the lung."""
    x, y = rng.uniform(-0.75, 0.75, (2, 400))
    row, column = to_pixel(x + 1j * y)
    first = np.argmax(lung[row, column] > 0.9)
    return row[first], column[first]


def _disease(rng, noise, body, x, y, at, grade, to_pixel):
    """Lung left, added depth, share of vessels left, and the region of each finding shown."""
    lung, regions = at["lung"], {"Cardiomegaly": at["heart"] > 0}
    extra = air = np.zeros_like(x)
    sides = (x > 0) == (rng.random((2, 1, 1)) < 0.5)
    if "Effusion" in grade:
        level = at["breath"] + 0.39 - 0.55 * grade["Effusion"] - 0.20 * at["cage"]  # the meniscus
        fluid = lung * sides[0] * _ramp(y - level, 0.06)
        regions["Effusion"] = fluid > 0.5
        extra, lung = extra + 0.35 * fluid, lung * (1 - 0.9 * _ramp(fluid - 0.4, 0.6))
    if "Fibrosis" in grade:
        where = lung * _ramp(y - at["breath"] + 0.45, 0.5) * (0.4 + 0.6 * at["cage"])
        # The zero lines of a random field make a net.
        net = np.exp(-((_texture(noise, len(x), 0.03, 0.08) / 0.4) ** 2)) - 0.25
        extra = extra + (0.42 + 0.38 * grade["Fibrosis"]) * where * net
        regions["Fibrosis"] = where > 0.3
    if "Consolidation" in grade:
        seat, (a, b) = _seat(rng, lung, to_pixel), rng.uniform(0.18, 0.34, 2)
        cloud = lung * np.exp(-(((x - x[seat]) / a) ** 2) - ((y - y[seat]) / b) ** 2)
        regions["Consolidation"] = cloud > 0.4
        cloud = cloud * np.clip(1 + 0.45 * _texture(noise, len(x), 0.05, 0.3), 0, 2)
        extra = extra + (0.18 + 0.50 * grade["Consolidation"]) * cloud
    if "Nodule" in grade:
        seat, radius = _seat(rng, lung, to_pixel), rng.uniform(0.048, 0.078)
        ball = _ball(x, y, x[seat], y[seat], radius, radius * rng.uniform(0.85, 1.15))
        regions["Nodule"] = ball > 0
        extra = extra + (0.65 + 0.40 * grade["Nodule"]) * ball**0.7
    if "Pneumothorax" in grade:
        # Air collects at the top and the side; the lung falls back towards its hilum.
        gap = np.clip(0.9 - 0.9 * (y - body["apex"]), 0, 1)
        rim = at["cage"] - 1 + (0.30 + 0.35 * grade["Pneumothorax"]) * gap
        air = lung * sides[1] * _ramp(rim, 0.05)
        regions["Pneumothorax"] = air > 0.5
        extra = extra + 0.28 * lung * sides[1] * _ramp(0.035 - np.abs(rim), 0.04) - 0.20 * air
    return lung, extra, 1 - air, regions


def _outline(x, y, body):
    """1 inside the outline of neck, shoulders and trunk."""
    wall = body["width"] + 0.07 + body["fat"] + 0.2 * np.exp(-(((y + 0.5) / 0.28) ** 2))
    shoulder = body["apex"] - 0.22 + 0.5 * np.maximum(np.abs(x) - 0.26, 0) ** 1.2
    neck = _ramp(0.24 + 0.3 * body["fat"] - np.abs(x), 0.05)
    return _ramp(wall - np.abs(x), 0.05) * np.maximum(_ramp(y - shoulder, 0.05), neck)


def _expose(rng, noise, depth, place):
    """Uint8 image of an optical depth: scatter, photon noise, film curve, side marker."""
    primary = np.exp(-depth)
    haze = _smooth(primary * (depth > 0.05), 0.25)  # air scatters nothing
    signal = primary + rng.uniform(0.5, 1.5) * place["scatter"] * haze
    grain = _texture(noise, len(depth), 0.006, 0.1) * place["noise"] * rng.uniform(0.6, 1.4)
    tilt = np.linspace(-1, 1, len(depth), dtype=np.float32) * rng.normal(0, 0.08)
    film = -np.log(signal) + grain * np.sqrt(np.minimum(0.3 / signal, 4)) + tilt
    slope, dark = place["slope"] * rng.uniform(0.85, 1.2), place["dark"] + rng.normal(0, 0.15)
    image = 255 / (1 + np.exp(-slope * (film - dark)))
    row, column = (rng.uniform((0.04, 0.84), (0.14, 0.93)) * len(depth)).astype(int)
    unit = math.ceil(len(depth) / 128)  # stroke of the letter L on the patient's left
    image[row : row + 6 * unit, column : column + unit] = 235
    image[row + 5 * unit : row + 6 * unit, column : column + 4 * unit] = 235
    return image.round().astype(np.uint8)


def _box(region):
    """Smallest (x, y, width, height) in pixels around the True pixels."""
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y


def draw_phantom(seed, index, size=128, site="a"):
    """One chest X-ray phantom with its labels, drawn from (seed, index, site) alone.

    Args:
        seed, index: non-negative integers.
        size: edge S of the image in pixels; fine findings need 64 or more.
        site: a key of PHANTOM_SITES.
    Returns: dict: `image` (S, S) uint8; `mask` (S, S) uint8, 1 in the pneumothorax; `findings`
        name -> 0 or 1, `No Finding` included; `boxes` list of (finding, x, y, width, height) in
        pixels; `patient` str.
    """
    place, number = PHANTOM_SITES[site], patient_of(seed, index, site)
    body, patient = phantom_patient(seed, number, site), f"{site}{number:05d}"
    # Two streams: the first is the same at every `size`, so that a size changes only the grain.
    rng, noise = (np.random.default_rng([seed, place["code"], k, index]) for k in (2, 3))
    severity = phantom_severity(body, rng, place["prevalence"])
    grade = {name: 0.25 + 0.75 * s for name, s in severity.items() if s > 0}  # none is invisible
    x, y, to_pixel = _pose(rng, size)
    at = _anatomy(rng, body, x, y, grade.get("Cardiomegaly", 0))
    tree = body["vessels"] * _vessels(rng, size, to_pixel)
    lung, extra, vessels, regions = _disease(rng, noise, body, x, y, at, grade, to_pixel)
    depth = at["soft"] * (1 - 0.58 * lung) + at["solid"] + tree * vessels * (0.15 + lung) + extra
    image = _expose(rng, noise, np.maximum(depth, 0) * _outline(x, y, body), place)
    boxes = [(name, *_box(regions[name])) for name in grade if regions[name].any()]
    mask = regions.get("Pneumothorax", np.zeros((size, size))).astype(np.uint8)
    findings = {name: int(name in grade) for name in PHANTOM_FINDINGS}
    findings["No Finding"] = int(not grade)
    return dict(image=image, mask=mask, findings=findings, boxes=boxes, patient=patient)


def prepare_phantom(task, size):
    """As `prepare_picture`, for a picture that is drawn: labels and boxes come with it."""
    row, (seed, index, site), _ = task
    drawn = draw_phantom(seed, index, size, site)
    picture, patient = drawn["image"], drawn["patient"]
    labels = {"patient": patient, "split": hash_split(patient, BY_PATIENT)} | drawn["findings"]
    note = {"row": row, "sha256": hashlib.sha256(picture.tobytes()).hexdigest()}
    note |= {"height": size, "width": size, "labels": labels, "boxes": drawn["boxes"]}
    return note, picture, drawn["mask"]


def list_demo(seed=0, count=4000, site="a"):
    """The phantoms of one hospital; their labels are known when they are drawn -> Listing."""
    table = pd.DataFrame({"image": [f"phantom-{site}-{k:05d}" for k in range(count)]}, dtype=str)
    table["source"] = [(seed, k, site) for k in range(count)]
    table["mask"] = "drawn"
    rule = "70/10/20 by patient, by SHA-256 of the id"
    return Listing(table, [*PHANTOM_FINDINGS, "No Finding"], rule, has_masks=True)


# ================================================================================================
# 8. Command line
# ================================================================================================
class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others."""

    def error(self, message):
        raise PrepError(f"{message}; see: {self.prog} --help")


def build_parser():
    """The command line: one sub-command a dataset, and `verify`."""
    parser = Parser(prog="python data_prep.py", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text, size=256, raw="folder of the raw files, never written to", gaps=True):
        sub = commands.add_parser(name, help=text, description=text)
        add = sub.add_argument
        if raw:
            add("--raw", required=name == "folder", help=raw)
        add("--out", help="folder to make (default: data/NAME)")
        add("--size", type=int, default=size, help=f"edge S in pixels (default: {size})")
        add("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
        add("--overwrite", action="store_true", help="replace what --out holds")
        if gaps:
            add("--allow-missing", action="store_true", help="list missing images, do not refuse")
        return add

    add = command("demo", "phantoms drawn by code, with masks and boxes", 128, None, False)
    add("--site", choices=("a", "b"), default="a", help="hospital; b differs (default: a)")
    add("--count", type=int, default=4000, help="images (default: 4000)")
    add("--seed", type=int, default=0, help="default: 0")
    add = command("folder", "any folder of PNG, JPEG or DICOM files", gaps=False)
    add("--csv", help="table in --raw or a path: image, [patient], [split], [mask], 0/1 findings")
    add = command("nih", "NIH ChestX-ray14: Kaggle's folders or NIH's archives")
    add("--download", action="store_true", help="fetch 45 GB to downloads/nih beside --out")
    add = command("chestmnist", "NIH at low resolution", None, "the .npz file", False)
    add("--download", action="store_true", help="fetch --size 28, 64 (default), 128 or 224")
    command("rsna", "RSNA pneumonia 2018")
    command("siim", "SIIM-ACR pneumothorax 2019, with masks")
    add = command("vinbig", "VinBigData (Kaggle) or VinDr-CXR (PhysioNet)")
    text = "a finding counts if any reader, or the majority, saw it (default: majority)"
    add("--readers", choices=("any", "majority"), default="majority", help=text)
    sub = commands.add_parser("verify", help="hashes, counts, splits, blanks and duplicates")
    sub.add_argument("folder", help="prepared folder")
    return parser


def make_listing(args, out):
    """The listing that a command asks for, downloads included."""
    name, raw = args.command, getattr(args, "raw", None)
    if name == "demo":
        return list_demo(args.seed, args.count, args.site)
    if name in ("nih", "chestmnist") and args.download:
        if raw:
            raise PrepError("--download has a folder of its own; give it or --raw, not both")
        raw = out.parent / "downloads" / name
        if name == "chestmnist":
            file, md5 = CHESTMNIST_FILES[args.size]
            raw = download(f"{CHESTMNIST_URL}{file}?download=1", raw / file, md5)
        else:
            for file in NIH_LISTS:
                download(NIH_LISTS_URL + file, raw / file)
            for k, key in enumerate(NIH_ARCHIVES, 1):
                download(f"{NIH_URL}{key}.gz", raw / f"images_{k:03d}.tar.gz")
    if raw is None:
        raise PrepError(f"{name} needs --raw; see: python data_prep.py {name} --help")
    if out.absolute().resolve().is_relative_to(Path(raw).resolve()):
        raise PrepError(f"--out {out} lies inside --raw {raw}, which is never written to")
    if name == "folder":
        return list_folder(raw, args.csv)
    if name == "chestmnist":
        return list_chestmnist(raw)
    if name == "vinbig":
        return list_vinbig(raw, args.readers, args.allow_missing)
    return {"nih": list_nih, "rsna": list_rsna, "siim": list_siim}[name](raw, args.allow_missing)


def prepare(args):
    """Runs one preparing command."""
    raw = getattr(args, "raw", None)
    name = Path(raw).name if args.command == "folder" else args.command
    name += "-b" if getattr(args, "site", "a") == "b" else ""
    out = Path(args.out or f"data/{name}")
    if args.command == "chestmnist" and not args.size:
        args.size = npz_size(raw) if raw else 64
    if args.command == "chestmnist" and args.download and args.size not in CHESTMNIST_FILES:
        raise PrepError(
            f"--size {args.size}: published are {', '.join(map(str, CHESTMNIST_FILES))}"
        )
    if not MIN_SIDE <= args.size <= 4096 or args.workers < 1 or getattr(args, "count", 1) < 1:
        raise PrepError(f"expected --size from {MIN_SIDE} to 4096, --workers and --count from 1")
    keys = "command raw size csv readers site count seed".split()
    options = {k: getattr(args, k) for k in keys if hasattr(args, k)}
    if is_finished(out, options, args.overwrite):
        print(f"{out} is finished; nothing to do")
        return
    listing = make_listing(args, out)
    work = prepare_phantom if args.command == "demo" else prepare_picture
    write_prepared(listing, out, options, args.workers, args.overwrite, work)


def main(argv=None):
    """The command line.

    Args:
        argv: list of str; None takes those of the process.
    Returns: exit code: 0, 2 after an error (one line on stderr), 130 after Ctrl-C.
    """
    try:
        args = build_parser().parse_args(argv)
        if args.command != "verify":
            prepare(args)
            return 0
        problems = verify(args.folder)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise PrepError(f"{args.folder}: {problems[0]}{more}")
        print(f"{args.folder}: sound")
    except (PrepError, OSError) as e:
        print(f"error: {_one_line(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
