"""Raw chest X-ray datasets in, one folder of arrays and tables out; and a demo set drawn by code.

    python data_prep.py demo                                         # phantoms, no download
    python data_prep.py folder --raw DIR --csv labels.csv            # any folder of X-rays
    python data_prep.py nih|chestmnist|rsna|siim|vinbig --raw DIR    # the public datasets
    python data_prep.py verify data/nih

A prepared folder holds `images.npy` (N, S, S) uint8, `labels.csv` (image, patient, split, one 0/1
column a finding, blank = unknown), perhaps `masks.npy` (N, S, S) of 0/1 (column `has_mask`) and
`boxes.csv` in prepared pixels; `rejected.csv` (every image and file left out, and why),
`hashes.csv` (SHA-256 of each prepared picture, size of its source) and, written last, `meta.json`.

While it is being made, the folder is called `<out>.partial`: images are read in parallel, appended
in the order of the list and journalled. A preparation that was stopped resumes from the journal and
ends with the same bytes.
"""

import argparse
import contextlib
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
import unicodedata
import urllib.request
import warnings
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import numpy as np
import pandas as pd
from numpy import clip, exp, maximum, sqrt
from PIL import Image, ImageOps, UnidentifiedImageError
from pydicom.misc import is_dicom
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: two preparations of one set are not told apart
    fcntl = None

# ================================================================================================
# 1. One X-ray file
# ================================================================================================
# Of one picture, and of its file; the largest chest detectors give about 20 million pixels.
MIN_SIDE, MAX_PIXELS, MAX_BYTES = 16, 50_000_000, 256 << 20
FORMATS = "PNG JPEG BMP WEBP".split()
ORIENTATION = 0x0112  # number of the EXIF tag
# A line each: little endian, JPEG, JPEG lossless, JPEG-LS, JPEG 2000, RLE. Not deflated, which
# would be inflated before the sizes inside can be checked.
TRANSFER_SYNTAXES = """
1.2.840.10008.1.2 1.2.840.10008.1.2.1
1.2.840.10008.1.2.4.50 1.2.840.10008.1.2.4.51
1.2.840.10008.1.2.4.57 1.2.840.10008.1.2.4.70
1.2.840.10008.1.2.4.80 1.2.840.10008.1.2.4.81
1.2.840.10008.1.2.4.90 1.2.840.10008.1.2.4.91
1.2.840.10008.1.2.5""".split()


class PrepError(ValueError):
    """One line for the user: what was looked for, what was found, what to type next."""


def require(condition, message):
    """Raises PrepError with the message unless the condition holds."""
    if not condition:
        raise PrepError(message)


def one_line(error):
    """An error's text on one line, or its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def read_xray(path):
    """One X-ray file as an 8-bit gray picture, turned as its EXIF tag says.

    8-bit values stay as they are, deeper ones are stretched from the darkest to the brightest.
    Colour becomes luminance, transparency is ignored, the padding of a DICOM becomes black.

    Args: path: of a PNG, JPEG, BMP, WEBP or DICOM file, told by content, not by name.
    Returns: (H, W) uint8.
    Raises: ValueError, with a one-line reason, if the file is missing, damaged, of another format,
        of one value everywhere, below 16 pixels a side or above 50 million. Sizes are checked
        before they are allocated.
    """
    gray = read_gray(path)
    require(gray.min() < gray.max(), f"all pixels have one value, {gray.max()} of 255")
    return gray


def read_gray(path):
    """As `read_xray`, but the picture may have one value everywhere, as a blank mask does."""
    try:
        with warnings.catch_warnings(action="ignore"):
            require(os.path.getsize(path) <= MAX_BYTES, "a file above 256 MiB")
            if is_dicom(path):
                return _read_dicom(path)
            return _read_picture(path)
    except UnidentifiedImageError as e:
        raise ValueError("not a PNG, JPEG, BMP, WEBP or DICOM file") from e
    except Exception as e:  # decoders raise nearly anything on a hostile file
        raise ValueError(one_line(e)) from e


def resize_xray(image, size):
    """The one antialiased downscale: the whole picture onto a square, aspect ratio not kept.

    Args: image: (H, W) uint8; size: S, edge of the result in pixels.
    Returns: (S, S) uint8.
    """
    # Area averaging by the largest whole factor, then bicubic for the rest: a tenth of the time of
    # a bicubic filter alone, and on X-rays within a mean of 0.5 gray levels of it.
    return np.asarray(Image.fromarray(image).resize((size, size), Image.BICUBIC, reducing_gap=1.0))


def _check_size(rows, columns):
    """Refuses what is too small to be an X-ray or too large to be decoded safely."""
    fits = min(rows, columns) >= MIN_SIDE and rows * columns <= MAX_PIXELS
    require(fits, f"{columns} x {rows} pixels; at least 16 a side, at most 50 million")


def _read_picture(path):
    """A file in one of FORMATS -> (H, W) uint8."""
    with Image.open(path, formats=FORMATS) as image:
        _check_size(image.height, image.width)
        # Pillow would read the high bytes of these alone.
        deep = image.format == "PNG" and image.tile[0][3] in ("RGB;16B", "RGBA;16B", "LA;16B")
        require(not deep, "a PNG of 16 bits with colour or transparency")
        if image.mode.startswith("I"):  # 16-bit gray
            gray = _stretch(np.asarray(image))
        else:
            gray = np.asarray(image.convert("L"))
        shown = Image.fromarray(gray)
        with contextlib.suppress(Exception):  # no EXIF data, or damaged ones
            shown.getexif()[ORIENTATION] = image.getexif()[ORIENTATION]
    return np.array(ImageOps.exif_transpose(shown))


def _stretch(pixels, ds=None):
    """(H, W) integers -> uint8, from the darkest to the brightest; `ds`: the DICOM they are of."""
    low = int(pixels.min())
    levels = np.arange(low, int(pixels.max()) + 1)  # the work is done on a table of these
    values, keep, invert = levels.astype(np.float64), False, False
    if ds is not None:
        values = _display(levels, ds).astype(np.float64)
        keep = ds.BitsStored == 8 and not ds.PixelRepresentation and np.allclose(values, levels)
        invert = ds.PhotometricInterpretation == "MONOCHROME1"
    if not keep:
        values = (values - values.min()) * (255 / (np.ptp(values) or 1))
    if invert:
        values = 255 - values
    require(np.isfinite(values).all(), "pixel values are not finite")
    # Half up, with a margin: an inverted picture must not round the other way by an error.
    table = np.floor(values + 0.5 + 1e-6).clip(0, 255).astype(np.uint8)
    return table[np.subtract(pixels, low, dtype=np.intp)]


def _read_dicom(path):
    """DICOM file -> (H, W) uint8: modality LUT, VOI LUT, MONOCHROME1 inverted, then 8 bits."""
    import gdcm
    import pydicom

    gdcm.Trace.WarningOff()  # its errors come back as exceptions
    gdcm.Trace.ErrorOff()
    syntax = pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID")
    require(syntax in TRANSFER_SYNTAXES, f"DICOM transfer syntax {syntax} is not on the list")
    ds = pydicom.dcmread(path)
    _check_pixel_data(ds, syntax)
    pixels = ds.pixel_array
    first = _number(ds, "PixelPaddingValue")
    if first is None:
        return _stretch(pixels, ds)

    # Pixels that are no picture. Compared as 16 bits, also where the pixels have 8: files write
    # 65535 for -1 and the reverse, but no such value stands for a pixel of 8 bits.
    last = _number(ds, "PixelPaddingRangeLimit", first)
    ends = np.array([first, last], np.int64).astype(pixels.dtype.kind + "2")
    padding = (pixels >= ends.min()) & (pixels <= ends.max())
    require(not padding.all(), "every pixel is padding")
    gray = _stretch(np.where(padding, pixels[~padding].min(), pixels), ds)
    gray[padding] = 0
    return gray


def _check_pixel_data(ds, syntax):
    """Refuses sizes that are too large, or do not fit the pixel data, before a decoder starts."""
    from pydicom.encaps import generate_frames

    header, depth = (ds.Rows, ds.Columns), (ds.SamplesPerPixel, ds.BitsAllocated)
    _check_size(*header)
    gray = ds.PhotometricInterpretation in ("MONOCHROME1", "MONOCHROME2")
    known = gray and depth in ((1, 8), (1, 16)) and _number(ds, "NumberOfFrames", 1) <= 1
    text = f"DICOM of colour, of several frames, of high bits, or of (samples, bits) = {depth}"
    require(known and ds.get("HighBit", 0) < ds.BitsStored, text)
    if not ds["PixelData"].is_undefined_length:  # not compressed: pydicom compares the sizes
        return
    size, coded = math.prod(header + depth) // 8, header
    stream = next(generate_frames(ds.PixelData, number_of_frames=1))
    # RLE carries no size of its own: what it can unpack to is bounded by its length.
    if not syntax.endswith("2.5"):
        coded = _coded_size(stream)
        require(b"\xff\xd9" in stream[-64:], "the compressed stream ends early")
    fits = coded == header and len(stream) <= 2 * size + 4096
    require(fits, f"header {header}, compressed stream {coded}")


def _coded_size(stream):
    """(rows, columns) inside a JPEG, JPEG-LS or JPEG 2000 stream: what a decoder will allocate."""
    start = stream[:1000].find(b"\xff\x4f\xff\x51")
    if start >= 0:
        right, bottom, left, top = np.frombuffer(stream, ">u4", 4, start + 8).tolist()
        return bottom - top, right - left
    at, frames = 2, {0xF7, *range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
    while stream[at] == 0xFF:
        if stream[at + 1] in frames:
            return tuple(np.frombuffer(stream, ">u2", 2, at + 5).tolist())
        at += 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    raise ValueError("no frame header in the compressed stream")


def _number(ds, name, default=None):
    """The first value of a DICOM tag; `default` where the tag is absent or empty."""
    if name not in ds or ds[name].is_empty:
        return default
    return float(np.ravel(ds[name].value)[0])


def _display(levels, ds):
    """Stored values -> values to be shown: modality LUT or slope, then VOI LUT or window."""
    from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

    ds.RescaleSlope = _number(ds, "RescaleSlope", 1)
    ds.RescaleIntercept = _number(ds, "RescaleIntercept", 0)
    values = apply_modality_lut(levels, ds)
    if ds.get("VOILUTSequence"):
        return apply_voi(np.rint(values).astype(np.int64), ds)
    if _number(ds, "WindowCenter") is None or not _number(ds, "WindowWidth"):
        return values
    ds.VOILUTFunction = ds.get("VOILUTFunction") or "LINEAR"
    ds.RescaleSlope = 1  # pydicom would invert the window for a negative slope
    return apply_windowing(values, ds)


# ================================================================================================
# 2. Demo phantoms: thickness maps summed along the beam, then a film-like response
# ================================================================================================
PHANTOM_COARSE = ("Cardiomegaly", "Effusion", "Consolidation")
PHANTOM_FINE = ("Nodule", "Pneumothorax", "Fibrosis")
PHANTOM_FINDINGS = PHANTOM_COARSE + PHANTOM_FINE
# One entry a hospital. `dark` is the optical depth shown as middle gray, `slope` the contrast of
# the film around it; the prevalence is in the order of PHANTOM_FINDINGS (Fibrosis is the rare one).
PHANTOM_SITES = {
    "a": SimpleNamespace(code=0, fat=0.06, dark=1.45, slope=1.9, scatter=0.10, noise=0.028),
    "b": SimpleNamespace(code=1, fat=0.13, dark=1.20, slope=1.5, scatter=0.18, noise=0.045),
}
PREVALENCE = {
    "a": (0.13, 0.21, 0.17, 0.17, 0.11, 0.04),
    "b": (0.20, 0.25, 0.09, 0.10, 0.06, 0.08),
}
# Range of each measure of a patient, in half image widths where it is a length.
BUILD = dict(
    width=(0.62, 0.80),
    apex=(-0.80, -0.68),
    heart=(0.37, 0.49),  # the healthy cardiothoracic ratio
    tilt=(0.2, 0.7),
    bone=(0.7, 1.3),
    spacing=(0.125, 0.15),  # of the ribs, as is the slope
    slope=(0.14, 0.34),
    breast=(-0.35, 0.35),  # none below 0
    vessels=(0.06, 0.11),
)
# Images of 16 consecutive patients, 40 in all, shuffled block by block: a patient owns 1 to 5
# indices in a row, and any index finds its patient without a history.
IMAGES_PER_PATIENT = [int(digit) for digit in "1111222223333455"]


def phantom_case(seed, index, site="a"):
    """Whom an image shows and with what.

    Args: as for `draw_phantom`.
    Returns: patient; body, measures that stay the same from one image of a patient to the next;
        severity a finding, 0 without it; and the Generator to draw the image with.
    """
    place, size = PHANTOM_SITES[site], sum(IMAGES_PER_PATIENT)
    block = index // size
    rng = np.random.default_rng([seed, place.code, 0, block])
    ends = np.cumsum(rng.permutation(IMAGES_PER_PATIENT))
    number = block * len(IMAGES_PER_PATIENT) + np.searchsorted(ends, index % size, "right")

    rng = np.random.default_rng([seed, place.code, 1, number])
    body = SimpleNamespace(**{name: rng.uniform(*limits) for name, limits in BUILD.items()})
    body.fat = place.fat + rng.exponential(0.06)
    risk = rng.standard_normal(7)  # findings of a patient persist, and by the last go together

    rng = np.random.default_rng([seed, place.code, 2, index])
    today = math.sqrt(1 - 0.35**2 - 0.6**2) * rng.standard_normal(6)
    normal = 0.35 * risk[6] + 0.6 * risk[:6] + today
    severity = {}
    for name, value, share in zip(PHANTOM_FINDINGS, normal, PREVALENCE[site], strict=True):
        # The tail of a normal is uniform in (0, 1): below the share the finding is there, and
        # deeper is worse.
        tail = math.erfc(value / math.sqrt(2)) / 2
        severity[name] = max(0, 1 - tail / share)
    return f"{site}{number:05d}", body, severity, rng


def phantom_findings(severity):
    """Severity a finding -> 0 or 1 a finding, `No Finding` included."""
    findings = {name: int(value > 0) for name, value in severity.items()}
    findings["No Finding"] = int(not any(findings.values()))
    return findings


def _ramp(distance, width=0.03):
    """A soft step from 0 to 1 around distance 0."""
    return clip(distance / width + 0.5, 0, 1)


def _ball(x, y, x0, y0, a, b, tilt=0.0):
    """Thickness, 1 at the centre, of an ellipsoid with half axes a and b."""
    c, s = math.cos(tilt), math.sin(tilt)
    u = (c * (x - x0) + s * (y - y0)) / a
    v = (c * (y - y0) - s * (x - x0)) / b
    return sqrt(maximum(1 - u * u - v * v, 0))


def _smooth(image, sigma):
    """Gaussian blur with sigma in half image widths; by FFT, so that no thread count matters."""
    size = len(image)
    fx, fy = np.fft.rfftfreq(size, 2 / size), np.fft.fftfreq(size, 2 / size)
    gx = exp(-2 * (np.pi * sigma * fx) ** 2).astype(np.float32)
    gy = exp(-2 * (np.pi * sigma * fy) ** 2).astype(np.float32)
    return np.fft.irfft2(np.fft.rfft2(image) * gx * gy[:, None], s=image.shape)


def _texture(rng, size, fine, coarse):
    """Band-passed noise of unit variance, structures between the two lengths."""
    white = rng.standard_normal((size, size), dtype=np.float32)
    band = _smooth(white, fine) - _smooth(white, coarse)
    return band / band.std()


def _pose(rng, size):
    """Pixel grid in patient coordinates (x to the image right, y down) and the way back."""
    turn = rng.uniform(0.96, 1.22) * exp(1j * rng.normal(0, 0.05))
    shift = rng.normal(0, 0.06) + 1j * rng.normal(0.04, 0.06)

    def to_pixel(points):
        spot = (turn * points + shift + 1 + 1j) * size / 2
        return clip([spot.imag, spot.real], 0, size - 1).astype(int)

    centre = (np.arange(size) + 0.5) * 2 / size - 1
    grid = (centre + 1j * centre[:, None] - shift) / turn
    return grid.real.astype(np.float32), grid.imag.astype(np.float32), to_pixel


def _vessels(rng, size, to_pixel):
    """Bronchovascular tree: curved branches that fan out from both hila, splatted as points."""
    trunks, twigs, t = 26, 120, np.linspace(0, 1, 80)
    angle = rng.uniform(-1.4, 1.5, (trunks, 1)) + rng.normal(0, 0.7, (trunks, 1)) * t
    step = rng.uniform(0.3, 0.75, (trunks, 1)) / t.size * exp(1j * angle)
    path = 0.17 - 0.1j + np.cumsum(step, 1)

    # A twig leaves its trunk at a knot, in another direction.
    parent = rng.integers(trunks, size=(twigs, 1))
    knot = rng.integers(8, 60, size=(twigs, 1))
    bend = angle[parent, knot] + rng.normal(0, 0.8, (twigs, 1))
    reach = rng.uniform(0.08, 0.3, (twigs, 1)) * t
    path = np.concatenate([path, path[parent, knot] + reach * exp(1j * bend)])

    mirrored = np.append(np.arange(trunks), parent) % 2 == 0
    path[mirrored] = -path[mirrored].conj()
    weight = np.repeat((1.4, 0.3), (trunks, twigs))[:, None] * (1 - 0.85 * t)
    row, column = to_pixel(path)
    image = np.bincount((row * size + column).ravel(), weight.ravel(), size**2)
    image = image.reshape(size, size).astype(np.float32)
    return _smooth(image * (size / 128) ** 2, 0.013)


def _bones(body, x, y, cage, turn):
    """Optical depth of ribs, spine, clavicles and shoulder blades."""
    r = abs(x) / body.width
    bone, inside = np.zeros_like(x), _ramp(1.04 - cage, 0.1)
    # Equal ribs repeat down the image, so one folded coordinate draws them all.
    back = y - body.slope * r**2.2 + 0.08 * r
    front = y + 0.50 * r - 0.12 * r**4
    for curve, reach, amount in ((back, 2 * r, 0.16), (front, 5 * r - 1.9, 0.09)):
        fold = abs((curve / body.spacing) % 1 - 0.5) * body.spacing
        rim = 1 + 0.3 * _ramp(0.006 - abs(fold - 0.018), 0.012)  # the cortex is denser
        bone += amount * rim * _ramp(0.026 - fold, 0.014) * inside * clip(reach, 0, 1)

    side = abs(x - 0.5 * turn)
    bend = y - (body.apex + 0.17 - 0.20 * side + 0.035 * np.sin(9 * side))
    spine = sqrt(clip(1 - (x / 0.095) ** 2, 0, 1))
    clavicle = sqrt(clip(1 - (bend / 0.034) ** 2, 0, 1)) * _ramp(0.36 - abs(side - 0.45))
    scapula = _ball(abs(x), y, body.width + 0.03, -0.34, 0.09, 0.30, 0.25)
    bone += 0.45 * spine + 0.30 * clavicle + 0.16 * _ramp(scapula - 0.2, 0.3)
    return bone * body.bone


def _anatomy(rng, body, x, y, enlarged):
    """Maps of one patient at one breath: `lung` in [0, 1], optical depths `soft`, `solid`."""
    r = abs(x) / body.width
    rise = maximum(0.22 - y, 0) / (0.22 - body.apex)
    cage = r**2.4 + rise**2.3  # 0 on the axis of the rib cage, 1 on the inner chest wall
    # The level of the diaphragm, and how far a turned patient throws the mediastinum sideways.
    breath, turn = rng.normal(0.36, 0.10), rng.normal(0, 0.05)
    domes = breath + rng.normal(0, 0.055, 2) + (0.0, 0.04)  # the patient's right is higher
    floor = np.where(x > 0, domes[1], domes[0]) + 0.85 * abs(r - 0.45) ** 2.2
    inner = 0.10 + 0.12 * _ramp(y - breath + 0.18, 0.4) + 0.2 * _ramp(rise - 0.92, 0.25)
    lung = _ramp(1 - cage, 0.09) * _ramp(floor - y) * _ramp(abs(x - turn) - inner, 0.05)

    # Heart, great vessels and aortic knob. A deep breath makes the same heart look narrow.
    a = body.width * (body.heart + 0.15 * enlarged - 0.15 * (breath - 0.36))
    heart = _ball(x, y, 0.32 * a + turn, breath - 0.45 * a, a, 0.76 * a, body.tilt)
    root = _ball(x, y, 0.10 * a + turn, breath - 0.95 * a, 0.62 * a, 1.05 * a, 0.15)
    knob = _ball(x, y, 0.09 + turn, body.apex + 0.38, 0.085, 0.11)
    for part in (heart, root, knob):
        lung = lung * (1 - 0.92 * _ramp(part - 0.25, 0.5))

    belly = _ramp(y - floor - 0.06, 0.25) * _ramp(1.1 - cage, 0.3)
    trachea = _ramp(0.045 - abs(x - turn), 0.03) * _ramp(-0.2 - y, 0.1)
    bubble = rng.random() * _ball(x, y, 0.3, domes[1] + 0.16, 0.14, 0.07)
    breast = max(0, body.breast) * _ball(abs(x), y, 0.4, 0.22, 0.3, 0.24)
    bones = _bones(body, x, y, cage, turn) * (1 - 0.6 * belly)
    solid = 0.25 * (heart + knob) - 0.25 * trachea - 0.5 * bubble + bones

    half = body.width + 0.3 + body.fat
    trunk = sqrt(maximum(1 - (x / half) ** 2, 0.05))
    trunk *= 0.75 + 0.9 * body.fat + 0.25 * _ramp(y - 0.2, 1.2)
    soft = 1.9 * trunk + breast + 0.4 * belly
    return SimpleNamespace(cage=cage, breath=breath, lung=lung, heart=heart, soft=soft, solid=solid)


def _seat(rng, lung, to_pixel):
    """Row and column of a random point well inside the lung."""
    x, y = rng.uniform(-0.75, 0.75, (2, 400))
    spots = to_pixel(x + 1j * y)
    return tuple(spots[:, np.argmax(lung[*spots] > 0.9)])


def _disease(rng, noise, body, x, y, at, grade, to_pixel):
    """Lung left, added depth, share of vessels left, and the region of each finding shown."""
    lung, regions = at.lung, {"Cardiomegaly": at.heart > 0}
    extra = air = np.zeros_like(x)
    sides = (x > 0) == (rng.random((2, 1, 1)) < 0.5)

    if "Effusion" in grade:
        level = at.breath + 0.39 - 0.55 * grade["Effusion"] - 0.20 * at.cage  # the meniscus
        fluid = lung * sides[0] * _ramp(y - level, 0.06)
        regions["Effusion"] = fluid > 0.5
        extra = extra + 0.35 * fluid
        lung = lung * (1 - 0.9 * _ramp(fluid - 0.4, 0.6))

    if "Fibrosis" in grade:
        where = lung * _ramp(y - at.breath + 0.45, 0.5) * (0.4 + 0.6 * at.cage)
        # The zero lines of a random field make a net.
        net = exp(-((_texture(noise, len(x), 0.03, 0.08) / 0.4) ** 2)) - 0.25
        extra = extra + (0.42 + 0.38 * grade["Fibrosis"]) * where * net
        regions["Fibrosis"] = where > 0.3

    if "Consolidation" in grade:
        seat = _seat(rng, lung, to_pixel)
        a, b = rng.uniform(0.18, 0.34, 2)
        cloud = lung * exp(-(((x - x[seat]) / a) ** 2) - ((y - y[seat]) / b) ** 2)
        regions["Consolidation"] = cloud > 0.4
        cloud = cloud * clip(1 + 0.45 * _texture(noise, len(x), 0.05, 0.3), 0, 2)
        extra = extra + (0.18 + 0.50 * grade["Consolidation"]) * cloud

    if "Nodule" in grade:
        seat, radius = _seat(rng, lung, to_pixel), rng.uniform(0.048, 0.078)
        ball = _ball(x, y, x[seat], y[seat], radius, radius * rng.uniform(0.85, 1.15))
        regions["Nodule"] = ball > 0
        extra = extra + (0.65 + 0.40 * grade["Nodule"]) * ball**0.7

    if "Pneumothorax" in grade:
        # Air collects at the top and the side; the lung falls back towards its hilum.
        gap = clip(0.9 - 0.9 * (y - body.apex), 0, 1)
        rim = at.cage - 1 + (0.30 + 0.35 * grade["Pneumothorax"]) * gap
        air = lung * sides[1] * _ramp(rim, 0.05)
        regions["Pneumothorax"] = air > 0.5
        edge = lung * sides[1] * _ramp(0.035 - abs(rim), 0.04)
        extra = extra + 0.28 * edge - 0.20 * air

    return lung, extra, 1 - air, regions


def _outline(x, y, body):
    """1 inside the outline of neck, shoulders and trunk."""
    wall = body.width + 0.07 + body.fat + 0.2 * exp(-(((y + 0.5) / 0.28) ** 2))
    shoulder = body.apex - 0.22 + 0.5 * maximum(abs(x) - 0.26, 0) ** 1.2
    neck = _ramp(0.24 + 0.3 * body.fat - abs(x), 0.05)
    return _ramp(wall - abs(x), 0.05) * maximum(_ramp(y - shoulder, 0.05), neck)


def _expose(rng, noise, depth, place):
    """Uint8 image of an optical depth: scatter, photon noise, film curve, side marker."""
    size = len(depth)
    primary = exp(-depth)
    haze = _smooth(primary * (depth > 0.05), 0.25)  # air scatters nothing
    signal = primary + rng.uniform(0.5, 1.5) * place.scatter * haze
    grain = _texture(noise, size, 0.006, 0.1) * place.noise * rng.uniform(0.6, 1.4)
    tilt = np.linspace(-1, 1, size, dtype=np.float32) * rng.normal(0, 0.08)
    film = -np.log(signal) + grain * sqrt(np.minimum(0.3 / signal, 4)) + tilt
    slope = place.slope * rng.uniform(0.85, 1.2)
    dark = place.dark + rng.normal(0, 0.15)
    image = 255 / (1 + exp(-slope * (film - dark)))

    # The letter L on the patient's left; `unit` is the width of its strokes.
    row, column = (rng.uniform((0.04, 0.84), (0.14, 0.93)) * size).astype(int)
    unit = math.ceil(size / 128)
    image[row : row + 6 * unit, column : column + unit] = 235
    image[row + 5 * unit : row + 6 * unit, column : column + 4 * unit] = 235
    return image.round().astype(np.uint8)


def draw_phantom(seed, index, size=128, site="a"):
    """One chest X-ray phantom with its labels, drawn from (seed, index, site) alone.

    Args:
        seed, index: non-negative integers; site: a key of PHANTOM_SITES.
        size: edge S of the image in pixels; fine findings need 64 or more.
    Returns: dict: `image` (S, S) uint8; `mask` (S, S) uint8, 1 in the pneumothorax; `findings`
        name -> 0 or 1; `boxes` [(finding, x, y, width, height)] in pixels; `patient` str.
    """
    place = PHANTOM_SITES[site]
    patient, body, severity, rng = phantom_case(seed, index, site)
    # A stream of its own for the grain: the rest is the same at every `size`.
    noise = np.random.default_rng([seed, place.code, 3, index])
    grade = {name: 0.25 + 0.75 * s for name, s in severity.items() if s > 0}  # none is invisible
    x, y, to_pixel = _pose(rng, size)
    at = _anatomy(rng, body, x, y, grade.get("Cardiomegaly", 0))
    tree = body.vessels * _vessels(rng, size, to_pixel)
    lung, extra, vessels, regions = _disease(rng, noise, body, x, y, at, grade, to_pixel)
    depth = at.soft * (1 - 0.58 * lung) + at.solid + tree * vessels * (0.15 + lung) + extra
    image = _expose(rng, noise, maximum(depth, 0) * _outline(x, y, body), place)

    boxes = []
    for name in grade:
        if regions[name].any():
            left, top, right, bottom = Image.fromarray(regions[name]).getbbox()
            boxes.append((name, left, top, right - left, bottom - top))
    mask = regions.get("Pneumothorax", np.zeros((size, size))).astype(np.uint8)
    findings = phantom_findings(severity)
    return dict(image=image, mask=mask, findings=findings, boxes=boxes, patient=patient)


# ================================================================================================
# 3. Tables and splits
# ================================================================================================
SPLITS = ("train", "val", "test")
BY_PATIENT = {"train": 0.7, "val": 0.1, "test": 0.2}
BY_IMAGE = {"train": 0.7, "val": 0.15, "test": 0.15}
CARVED = {"val": 0.1, "train": 0.9}
EDGES = ["x", "y", "width", "height"]
BOX = ["image", "finding", *EDGES]  # x, y is the upper left corner
GRID = 1024  # pixels a side of all pictures of NIH, RSNA and SIIM, where their tables count them
# Endings that a table may leave out.
PICTURES = re.compile(r"\.(png|jpe?g|jfif|bmp|webp|dcm|dicom)$", re.IGNORECASE)


@dataclass
class Listing:
    """What a dataset importer hands over: every image with its labels, before one is read.

    `split_table` completes the columns `patient` and `split`; `rule` says how, in words. `columns`
    are those of labels.csv.
    """

    table: pd.DataFrame  # image, perhaps patient and split, a column of 0, 1 or blank a finding
    findings: list  # names of the finding columns, in order
    lists: list = field(default_factory=list)  # label files, to be hashed
    rejected: list = field(default_factory=list)  # (image, reason) pairs known so far
    allow_missing: bool = True  # missing images are listed instead of refused
    boxes: pd.DataFrame | None = None  # columns BOX, in source pixels
    box_side: int | None = None  # boxes are in pixels of such a square, whatever the file's size
    masks: list | None = None  # one a row: path, tuple of RLE texts (of GRID pixels a side), None
    sources: object = ()  # pairs of row and file, (H, W) uint8 or draw_phantom's arguments
    size: int = 256  # S, unless another is asked for
    extra: dict = field(default_factory=dict)  # for meta.json

    def __post_init__(self):
        self.table, self.rule = split_table(self.table)
        self.columns = ["image", "patient", "split", *self.findings]
        if self.masks:
            self.table["has_mask"] = [int(mask is not None) for mask in self.masks]
            self.columns.append("has_mask")

    def attach(self, files, kind=""):
        """Gives every image its one file, of which `kind` is the usual ending; returns self."""
        self.sources, lost = [], []
        for row, name in enumerate(self.table["image"]):
            found = files.find(name, kind)
            if len(found) == 1:
                (file,) = found
                require(file in files.spare, f"two images of the table are one file, {file}")
                self.sources.append((row, files.spare.pop(file)))
            elif found:
                lost.append((name, f"several files: {found}"))
            else:
                lost.append((name, "file not found"))
        if lost and not self.allow_missing:
            text = f"{len(lost):,} of {len(self.table):,} images have no file, first "
            text += f"{', '.join(lost[0])}; complete --raw (archives unpacked)"
            raise PrepError(f"{text}, or give --allow-missing")

        # Every other file below the folder is named, too.
        lists = [os.path.abspath(path) for path in self.lists]
        for name, path in files.spare.items():
            if os.path.abspath(path) not in lists:
                self.rejected.append((name, "no row in the table"))
        self.rejected += lost
        return self


class Files:
    """The files below a folder, links included: name relative to it -> path."""

    def __init__(self, root):
        self.paths, self.by_ending = {}, {}
        for path in sorted(list_files(root)):
            name = os.fsencode(Path(path).relative_to(root).as_posix())
            name = name.decode(errors="backslashreplace")
            self.paths[name] = path
            ending = plain(name)
            while ending:
                self.by_ending.setdefault(ending, []).append(name)
                if ending.startswith("masks/"):  # a mask is never an image
                    break
                ending = ending.partition("/")[2]
        self.spare = dict(self.paths)  # those that no image has taken yet

    def find(self, name, kind=""):
        """Names of the files that a table may mean by a name: one, if all is well.

        The name may lack folders or the ending, begin with `./`, have another form of Unicode.
        """
        for exact in (name, f"images/{name}"):
            if exact in self.paths:
                return [exact]
        found = self.by_ending.get(plain(name), [])
        return [file for file in found if file.lower().endswith(kind)] or found


def list_files(folder, above=()):
    """Paths of all files below a folder; links to folders are followed, but not in a circle."""
    place, paths = os.path.realpath(folder), []
    if place in above:
        return []
    for entry in os.scandir(folder):
        if entry.is_dir():
            paths += list_files(entry.path, (*above, place))
        else:
            paths.append(entry.path)
    return paths


def plain(name):
    """A file's name with `/`, without `./` and picture endings, in one form of Unicode."""
    name = unicodedata.normalize("NFC", name.replace("\\", "/"))
    return PICTURES.sub("", PurePosixPath(name).as_posix())


def split_table(table):
    """Completes the columns `patient` and `split`.

    Without a patient every image is its own; without a split it is drawn; without validation
    images a tenth of the training patients become it.

    Args: table: `image`, perhaps `patient` and `split`.
    Returns: (table, rule): the completed copy, and how it is split in words.
    Raises: PrepError on a blank, an image twice, an unknown split, or a patient in two splits.
    """
    unit, shares = "image", BY_IMAGE
    if "patient" in table:
        unit, shares = "patient", BY_PATIENT
    table, rule = table.assign(patient=table[unit]), "as given"
    if "split" not in table:
        rule = f"{shares} by {unit}, by SHA-256 of the id"
        if unit == "image":
            rule += "; a patient with several images may be in several splits"
        table["split"] = [hash_split(key, shares) for key in table[unit]]
    elif "val" not in set(table["split"]):
        rule = "test set as given; validation: a tenth of the other patients, by SHA-256 of the id"
        drawn = [hash_split(key, CARVED) for key in table["patient"]]
        table["split"] = table["split"].mask(table["split"] == "train", drawn)

    pairs = table.drop_duplicates(["patient", "split"])
    for names, kind in ((table["image"], "conflicting rows"), (pairs["patient"], "two splits")):
        odd = names[names.duplicated() | (names == "")].tolist()
        require(not odd, f"{names.name} {odd[:1]} is blank or in {kind}; {len(odd)} are")
    odd = table["split"][~table["split"].isin(SPLITS)].tolist()
    require(not odd, f"split {odd[:1]}; expected train, val or test")
    return table, rule


def hash_split(key, shares=BY_PATIENT):
    """The split that a patient or image falls into: a function of its name alone.

    Args: key: str; shares: split -> share, summing to 1.
    Returns: a key of `shares`; the same on every machine.
    """
    place = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 16**8
    for split, share in shares.items():
        place -= share
        if place < 0:
            break
    return split


@contextlib.contextmanager
def reading(path):
    """Whatever a parser or decompressor raises on a bad file, as one line."""
    try:
        yield
    except Exception as e:
        what = f"looked for the table or archive {path}: missing, damaged or of another kind"
        raise PrepError(f"{what} ({one_line(e)}); repair it, or download it again") from e


def read_table(path, columns, numeric=()):
    """A CSV (UTF-8, perhaps with a byte-order mark) as stripped strings, "" where there is nothing.

    Args:
        path: file; columns: names that must be there; a dict names them anew and drops the others.
        numeric: columns, by their new names, that are read as floats, NaN for "".
    Raises: PrepError if it is no CSV, lacks a column, or a number is none.
    """
    # pandas only warns of too long a row
    with reading(path), warnings.catch_warnings(action="error"):
        table = pd.read_csv(path, dtype=str, na_filter=False, encoding="utf-8-sig", index_col=False)
        table = table.rename(columns=str.strip).apply(lambda column: column.str.strip())
        found = f"expected the columns {[*columns]}, found {list(table)[:20]}"
        require(set(columns) <= set(table) and table.columns.is_unique, found)
        if isinstance(columns, dict):
            table = table[[*columns]].rename(columns=columns)
        for name in numeric:
            table[name] = table[name].replace("", "nan").astype(float)
        return table


def read_findings(table, chosen, uncertain):
    """Turns finding columns into "0", "1" or "" in place; returns their names.

    Args:
        chosen: their names, "A,B"; None takes every column that has no other use.
        uncertain: what -1 becomes: "blank", "0" or "1".
    Raises: PrepError on a column with another value, or none.
    """
    columns = [c for c in table if c not in ("image", "patient", "split", "mask", "has_mask")]
    if chosen:
        columns = [name.strip() for name in chosen.split(",")]
    meaning = {"true": "1", "false": "0", "nan": "", "-1": uncertain.replace("blank", "")}
    for name in columns:
        require(name in table, f"no column {name!r}; there are {list(table)}")
        values = table[name].str.lower().str.removesuffix(".0").replace(meaning)
        odd = table[name][~values.isin(["0", "1", ""])].tolist()
        held = f"column {name!r} holds {odd[:1] or 'nothing'}, a finding 0, 1, blank or -1"
        require((values != "").any() and not odd, f"{held}; choose with --findings A,B")
        table[name] = values
    return columns


def add_patients(table, lists, path):
    """Completes a table by the column `patient` of a file `image,patient`, if one is given."""
    if path is None:
        return table, lists
    known = read_table(path, {"image": "image", "patient": "patient"}).drop_duplicates()
    table = table.merge(known, "left", "image")
    lost = table["image"][table["patient"].isna()].tolist()
    require(not lost, f"{path}: no row for {len(lost)} images, first {lost[:1]}")
    return table, [*lists, path]


def rle_decode(text, rows, columns):
    """Mask from relative run lengths, as in the SIIM-ACR tables.

    Args:
        text: "gap length gap length ..."; a gap counts from the end of the run before; pixels are
            numbered down the columns, left to right.
        rows, columns: size of the picture.
    Returns: (rows, columns) bool.
    Raises: ValueError on no pairs of integers, or a run that is empty or leaves the picture.
    """
    values, flat, at = [int(v) for v in text.split()], np.zeros(rows * columns, bool), 0
    for gap, length in zip(values[::2], values[1::2], strict=True):
        start = at + gap
        at = start + length
        fits = gap >= 0 and length >= 1 and at <= flat.size
        require(fits, f"RLE run of {length} after a gap of {gap} leaves {rows} x {columns}")
        flat[start:at] = True
    return flat.reshape(columns, rows).T


# ================================================================================================
# 4. The prepared folder
# ================================================================================================
# Bytes before the pixels of a .npy file; images written at a time; all that a folder may hold.
HEADER, BATCH = 128, 64
FILES = """images.npy masks.npy labels.csv boxes.csv rejected.csv hashes.csv meta.json
progress.jsonl""".split()


def file_digest(path, kind="sha256"):
    """SHA-256 or MD5 of a file, hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, kind).hexdigest()


def check_own(folder):
    """Raises PrepError unless a folder, which is to be removed, holds prepared files alone."""
    foreign = {path.name for path in folder.iterdir()}.difference(FILES)
    own = not foreign and not folder.is_symlink()
    require(own, f"{folder} is a link or also holds {[*foreign][:1]}; give another --out")


def refuse_changed(old, new, folder):
    """Raises PrepError naming the first option in which two plans differ."""
    for key, value in new.items():
        change = f"{key} {old.get(key)}, now asked: {value}; give --overwrite or another --out"
        require(old.get(key, value) == value, f"{folder} was made with {change}")


def prepare_picture(task, size):
    """Reads or draws, resizes and hashes one picture and its mask.

    Args: task: (row, source, mask) as in `Listing`; size: S.
    Returns: (note, picture, mask): the journal entry and the bytes of two (S, S) uint8 arrays,
        blank without a mask, none at all for a rejected picture.
    """
    row, source, mask = task
    note, stage, shrunk = {"row": row}, "", bytes(size * size)
    try:
        if isinstance(source, dict):
            drawn = draw_phantom(size=size, **source)
            source, mask, note["boxes"] = drawn["image"], drawn["mask"], drawn["boxes"]
        elif not isinstance(source, np.ndarray):
            source = read_xray(source)
        picture = resize_xray(source, size)
        require(np.ptp(picture) > 0, "all pixels have one value")
        stage = "mask: "
        if isinstance(mask, str):
            mask = read_gray(mask)
        elif isinstance(mask, tuple):
            # The union of the regions; the text "" is a blank mask, for an image without one.
            mask = np.any([rle_decode(text, GRID, GRID) for text in ("", *mask)], axis=0)
        if mask is not None:  # of 0/1 or 0/255
            shrunk = resize_xray(np.uint8(255) * (mask > mask.max() / 2), size) // 128
    except ValueError as e:
        return {"row": row, "reason": stage + one_line(e)}, b"", b""
    note["sha256"] = hashlib.sha256(picture).hexdigest()
    note["height"], note["width"] = source.shape
    return note, bytes(picture), bytes(shrunk)


def usable_cores():
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _start_worker():
    """Leaves Ctrl-C to the parent, and ends with it even when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()


@contextlib.contextmanager
def _worker_pool(workers):
    """The `map` of processes that import this module alone, started anew on every system."""
    # A new process imports the main module of the old one, which may be mlvicx.py with torch.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker)
    main, sys.modules["__main__"] = sys.modules["__main__"], sys.modules[__name__]
    try:
        yield functools.partial(pool.map, chunksize=4)
    finally:
        pool.shutdown(cancel_futures=True)
        sys.modules["__main__"] = main


def _in_batches(tasks, size, workers):
    """Lists of prepared pictures, in the order of the tasks, which are read one batch ahead."""
    running, run = [], map  # one worker is this process
    with contextlib.ExitStack() as stack:
        if workers > 1:
            run = stack.enter_context(_worker_pool(workers))
        for batch in iter(lambda: list(itertools.islice(tasks, BATCH)), []):
            finished, running = running, run(prepare_picture, batch, itertools.repeat(size))
            yield list(finished)
        yield list(running)


def _resume(journal, arrays, plan, size):
    """The notes of an earlier run of the same plan; cuts off what came after the last of them."""
    journal.seek(0)
    lines = [line for line in journal if line.endswith(b"\n")]  # the last may be torn
    journal.truncate(sum(map(len, lines)))
    notes = [json.loads(line) for line in lines]
    if notes:
        refuse_changed(notes.pop(0), plan, Path(journal.name).parent)
    else:
        journal.write(json.dumps(plan).encode() + b"\n")
    end = HEADER + sum("reason" not in note for note in notes) * size**2
    for array in arrays:
        array.truncate(end)
    return notes


def _prepare_pictures(listing, folder, names, plan, size, workers, overwrite):
    """Appends every picture of a listing to the files `names`, journal first; all its notes."""
    total = len(listing.table)
    with contextlib.ExitStack() as stack:
        journal, *arrays = [stack.enter_context(open(folder / name, "a+b")) for name in names]
        try:
            if fcntl:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrepError(f"{folder} is being written by another process; wait for it") from None
        if overwrite:
            journal.truncate(0)  # now that nobody else writes; the arrays follow the journal
        notes = _resume(journal, arrays, plan, size)
        done = {note["row"] for note in notes}
        masks = listing.masks or [None] * total
        tasks = ((row, source, masks[row]) for row, source in listing.sources if row not in done)
        bar = stack.enter_context(tqdm(total=total, initial=len(notes), disable=None))
        batches = contextlib.closing(_in_batches(tasks, size, workers))
        for batch in stack.enter_context(batches):
            for index, array in enumerate(arrays, 1):
                array.write(b"".join(prepared[index] for prepared in batch))
                array.flush()
                os.fsync(array.fileno())  # before the notes on these pixels
            for note, *_ in batch:
                journal.write(json.dumps(note).encode() + b"\n")
                notes.append(note)
            journal.flush()
            bar.update(len(batch))
            if bar.disable and len(notes) % 1000 < len(batch):
                print(f"{folder}: {len(notes):,} of {total:,}", flush=True)
    return notes


def write_prepared(listing, out, options, size, workers, overwrite):
    """Prepares a listing into the folder `out`; resumes where an earlier run was stopped.

    Args:
        listing: `Listing`; out: folder to make; its last part is the name of the set.
        options: dict of plain values, `command` among them, for meta.json.
        size: S; None takes that of the listing; workers: processes.
        overwrite: start anew, even where a run was stopped.
    Raises: PrepError.
    """
    out, folder, size = Path(out), Path(f"{out}.partial"), size or listing.size
    listed = repr((listing.table.to_csv(), listing.masks or None)).encode()
    plan = dict(options, list=hashlib.sha256(listed).hexdigest())
    names = ["progress.jsonl", "images.npy"]
    if listing.masks:
        names.append("masks.npy")
    folder.mkdir(parents=True, exist_ok=True)
    notes = _prepare_pictures(listing, folder, names, plan, size, workers, overwrite)
    good = [note for note in notes if "reason" not in note]
    image = listing.table["image"]
    rejected = [*listing.rejected]
    rejected += [(image[note["row"]], note["reason"]) for note in notes if "reason" in note]
    if not good:  # nothing to resume from
        shutil.rmtree(folder)
        named = f"the table names {image[:1].tolist()}, left out: {rejected[:1]}"
        raise PrepError(f"none of {len(image)} images could be read: {named}")

    tables = _tables(listing, good, size)
    labels = tables["labels.csv"]
    tables["rejected.csv"] = pd.DataFrame(sorted(rejected), columns=["image", "reason"])
    for name, table in tables.items():
        table.to_csv(folder / name, index=False, lineterminator="\n")
    for name in names[1:]:
        with open(folder / name, "r+b") as f:
            about = dict(descr="|u1", fortran_order=False, shape=(len(labels), size, size))
            np.lib.format.write_array_header_1_0(f, about)  # HEADER bytes
    counts = {split: int((labels["split"] == split).sum()) for split in SPLITS}
    meta = dict(name=out.name, size=size, images=len(labels), findings=listing.findings)
    meta.update(counts=counts, rejected=len(rejected), split_rule=listing.rule, **listing.extra)
    meta.update(options=options, sources={Path(p).name: file_digest(p) for p in listing.lists})
    meta["images_sha256"] = file_digest(folder / "images.npy")
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))

    if out.exists():
        check_own(out)  # again: files may have come meanwhile
        shutil.rmtree(out)
    os.replace(folder, out)
    (out / "progress.jsonl").unlink()
    print(f"{out.name}: {counts}; {len(rejected):,} left out (rejected.csv)")


def _tables(listing, good, size):
    """The tables of the prepared pictures by file name; `good`: the notes on these."""
    boxes = listing.boxes
    good = pd.DataFrame(good).join(listing.table[listing.columns], on="row")
    sizes = good[["image", "sha256", "height", "width"]]
    tables = {"labels.csv": good[listing.columns], "hashes.csv": sizes}
    if "boxes" in good:  # drawn: boxes come with the pictures
        drawn = good[["image", "boxes"]].to_numpy()
        boxes = pd.DataFrame([(name, *box) for name, found in drawn for box in found], columns=BOX)
    if boxes is not None:
        if listing.box_side:
            sizes = sizes.assign(height=listing.box_side, width=listing.box_side)
        tables["boxes.csv"] = scale_boxes(boxes, sizes, size)
    return tables


def scale_boxes(boxes, sizes, size):
    """Boxes in source pixels -> prepared pixels, clipped to the picture.

    Args:
        boxes: the columns BOX; size: S.
        sizes: `image, height, width` of the sources; boxes of other images are dropped.
    Returns: the boxes with an area inside the picture.
    """
    boxes = boxes.merge(sizes, on="image", suffixes=("", " of source"))
    for start, extent in (("x", "width"), ("y", "height")):
        scale = size / boxes[f"{extent} of source"]
        end = ((boxes[start] + boxes[extent]) * scale).clip(0, size)
        boxes[start] = (boxes[start] * scale).clip(0, size).round(3)
        boxes[extent] = (end - boxes[start]).round(3)
    return boxes.loc[(boxes[["width", "height"]] > 0).all(axis=1), BOX]


# ================================================================================================
# 5. The datasets
# ================================================================================================
# In the order of ChestMNIST's label columns.
NIH_FINDINGS = """Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax
Consolidation Edema Emphysema Fibrosis Pleural_Thickening Hernia""".split()
VINBIG_FINDINGS = """Aortic enlargement,Atelectasis,Calcification,Cardiomegaly,Consolidation,ILD,
Infiltration,Lung Opacity,Nodule/Mass,Other lesion,Pleural effusion,Pleural thickening,Pneumothorax,
Pulmonary fibrosis""".replace("\n", "").split(",")


def list_demo(site="a", count=4000, seed=0):
    """Phantoms drawn by code, with masks and boxes; they are drawn when they are prepared."""
    rows, sources = [], []
    for index in range(count):
        patient, _, severity, _ = phantom_case(seed, index, site)
        name = f"phantom-{site}-{index:05d}"
        rows.append(dict(phantom_findings(severity), image=name, patient=patient))
        sources.append((index, dict(seed=seed, index=index, site=site)))
    extra = {"groups": {"coarse": PHANTOM_COARSE, "fine": PHANTOM_FINE}}
    findings, masks = [*PHANTOM_FINDINGS, "No Finding"], ["drawn" for _ in rows]
    return Listing(pd.DataFrame(rows), findings, masks=masks, sources=sources, extra=extra)


def list_folder(raw=None, csv=None, findings=None, uncertain="blank"):
    """Any folder of X-rays with a table: `image`, optional `patient`, `split`, `mask`, findings.

    Args:
        raw: folder with the files, or with `images/` and `masks/`.
        csv: table, inside `raw` or a path; None takes every image, without labels. Beside it there
            may be a `boxes.csv` with the columns BOX, in pixels of the files.
        findings, uncertain: as `chosen` and `uncertain` of `read_findings`.
    Returns: `Listing`. Rows without a file inside `raw`, and files without a row, are rejected.
    """
    files, lists, boxes = Files(raw), [], None
    names = [name for name in files.paths if "/masks/" not in f"/{name}"]
    require(names, f"looked for X-rays in {raw}: found 0 X-rays")
    table = pd.DataFrame({"image": names})
    if csv:
        lists = [Path(raw, csv)]
        if not lists[0].is_file():
            lists = [Path(csv)]
        table = read_table(lists[0], ["image"]).drop_duplicates(ignore_index=True)
        path = lists[0].with_name("boxes.csv")
        if path.is_file():
            lists.append(path)
            boxes = read_table(path, BOX, EDGES)
            known = boxes["image"].isin(table["image"]) & boxes[EDGES].notna().all(axis=1)
            require(known.all(), f"{path}: a box without numbers, or of an image not in the table")
    masks = []
    for name in table.get("mask", []):
        path = None
        if name:
            found = files.find("masks/" + name.removeprefix("masks/"))
            path = f"{name}: {found}"  # not one file: no such path, so that it is rejected
            if len(found) == 1:
                path = files.paths[found[0]]
                files.spare.pop(found[0], None)
        masks.append(path)
    columns = read_findings(table, findings, uncertain)
    return Listing(table, columns, lists, masks=masks, boxes=boxes).attach(files)


def list_nih(raw=None, allow_missing=False):
    """NIH ChestX-ray14, its archives unpacked.

    Args:
        raw: folder with either edition of `Data_Entry_2017*.csv`, `train_val_list.txt`,
            `test_list.txt`, perhaps `BBox_List_2017.csv`, and images at any depth, of any size.
        allow_missing: list missing images instead of refusing.
    Returns: `Listing`, 14 findings ("No Finding" is the absence of all).
    Raises: PrepError on an unknown finding, an odd name or patient, or an image in both lists.
    """
    raw = Path(raw)
    entries = [raw / "Data_Entry_2017_v2020.csv", *sorted(raw.glob("Data_Entry_2017*.csv"))][-1]
    lists = [entries, raw / "train_val_list.txt", raw / "test_list.txt"]
    columns = {"Image Index": "image", "Finding Labels": "labels", "Patient ID": "patient"}
    table = read_table(entries, columns).drop_duplicates(ignore_index=True)
    sets = [set(labels.split("|")) for labels in table.pop("labels")]
    for name, patient, found in zip(table["image"], table["patient"], sets, strict=True):
        fits = re.fullmatch(r"[0-9]{8}_[0-9]{3}\.png", name) and name[:8] == patient.zfill(8)
        fits = fits and (found == {"No Finding"} or found <= set(NIH_FINDINGS))
        require(fits, f"{entries}: image {name!r}, patient {patient!r}, labels {found}")
    for finding in NIH_FINDINGS:
        table[finding] = [int(finding in found) for found in sets]
    table["patient"] = table["patient"].str.lstrip("0")

    train, test = (path.read_text("utf-8-sig").split() for path in lists[1:])
    both = sorted(set(train) & set(test))
    require(not both, f"{both[:1]} is in both {lists[1]} and {lists[2]}")
    splits = dict.fromkeys(train, "train")
    splits.update(dict.fromkeys(test, "test"))
    table["split"] = table["image"].map(splits)
    lost = [(name, "in neither official list") for name in table["image"][table["split"].isna()]]
    listing = Listing(table.dropna(ignore_index=True), NIH_FINDINGS, lists, lost, allow_missing)
    if (raw / "BBox_List_2017.csv").is_file():
        lists.append(raw / "BBox_List_2017.csv")
        names = dict(zip("Image Index,Finding Label,Bbox [x,y,w,h]".split(","), BOX))
        listing.boxes = read_table(lists[-1], names, EDGES).replace("Infiltrate", "Infiltration")
        listing.box_side = GRID
    return listing.attach(Files(raw), ".png")


def list_chestmnist(raw=None):
    """ChestMNIST, NIH images at 28 to 224 px; --raw is the .npz.

    Args: raw: the .npz file as published.
    Returns: `Listing` that streams the pictures; without patient ids every image is its own. The
        split is not NIH's: its training part holds official NIH test images.
    """
    with reading(raw), np.load(raw) as arrays:
        tables = [pd.DataFrame(arrays[f"{s}_labels"], columns=NIH_FINDINGS) for s in SPLITS]
        table = pd.concat(tables, keys=SPLITS, names=["split", "image"]).astype(int).reset_index()
        require(table[NIH_FINDINGS].isin([0, 1]).all(axis=None), "labels other than 0 and 1")
        size = arrays["val_images"].shape[1]
    table["image"] = table["split"] + table["image"].map("-{:05d}".format)
    listing = Listing(table, NIH_FINDINGS, sources=enumerate(_read_npz(raw)), size=size)
    listing.rule += " with ChestMNIST, by image"
    return listing


def _read_npz(npz):
    """Every picture, (H, W) uint8, in the order of SPLITS; a split, at most 4 GB, is in memory."""
    with reading(npz), np.load(npz) as arrays:
        for split in SPLITS:
            pictures = arrays[f"{split}_images"]
            _check_size(*pictures.shape[1:])
            right = pictures.dtype == np.uint8 and len(pictures) == len(arrays[f"{split}_labels"])
            require(right, f"{split}: expected uint8 pictures, one a row of labels")
            yield from pictures


def list_rsna(raw=None, patients=None, allow_missing=False):
    """RSNA pneumonia 2018, boxes: `stage_2_train_labels.csv`, `stage_2_train_images/*.dcm`.

    These are NIH's pictures, several of one patient, under other names: a split by image is not one
    by patient, unless `patients`, a table `image,patient`, says who is who.
    """
    csv = Path(raw, "stage_2_train_labels.csv")
    names = {"patientId": "image", "Target": "Pneumonia", **{edge: edge for edge in EDGES}}
    rows = read_table(csv, names, EDGES).drop_duplicates().assign(finding="Pneumonia")
    edges = rows[EDGES].notna().sum(axis=1)
    fits = (rows["Pneumonia"] == edges.map({0: "0", 4: "1"})).all()
    require(fits, f"{csv}: expected a box in every row of Target 1 and in none of Target 0")
    table = rows[["image", "Pneumonia"]].drop_duplicates(ignore_index=True)
    table, lists = add_patients(table.astype({"Pneumonia": int}), [csv], patients)
    boxes = rows.loc[edges == 4, BOX]
    listing = Listing(table, ["Pneumonia"], lists, [], allow_missing, boxes, GRID)
    return listing.attach(Files(raw), ".dcm")


def list_siim(raw=None, patients=None, allow_missing=False):
    """SIIM-ACR pneumothorax 2019, masks: table of RLE, a row a region, and DICOMs at any depth.

    NIH's pictures, too: `patients` is as in `list_rsna`.
    """
    csv = [Path(raw, "train-rle.csv"), *Path(raw).glob("stage_2_train.csv")][-1]
    rows = read_table(csv, ["ImageId", "EncodedPixels"]).drop_duplicates()
    texts = rows.groupby("ImageId", sort=False)["EncodedPixels"].agg(tuple)
    odd = [name for name, row in texts.items() if row != ("-1",) and {"", "-1"} & set(row)]
    require(not odd, f"{csv}: image {odd[:1]} has a blank, or both -1 and a region")
    masks = [tuple(t for t in row if t != "-1") for row in texts]
    table = pd.DataFrame({"image": texts.index, "Pneumothorax": [int(bool(m)) for m in masks]})
    table, lists = add_patients(table, [csv], patients)
    listing = Listing(table, ["Pneumothorax"], lists, masks=masks, allow_missing=allow_missing)
    return listing.attach(Files(raw), ".dcm")


def list_vinbig(raw=None, readers="majority", allow_missing=False):
    """VinBigData (Kaggle's `train.csv`) or VinDr-CXR (PhysioNet's `annotations/`), *.dicom.

    Args:
        readers: a finding is present if `any` reader, or the `majority` of them, saw it.
        raw, allow_missing: as for `list_nih`.
    Returns: `Listing`, with all boxes of the findings that are present. PhysioNet's test set is
        kept; Kaggle's images are split by image. Boxes are in pixels of the published files: with
        copies of another size they are wrong, labels are not.
    """
    units = ["image"]
    lists = [Path(raw, "train.csv")]
    names = dict(zip("image_id class_name x_min y_min x_max y_max".split(), BOX))
    if lists[0].is_file():  # a row a reader and box
        boxes = read_table(lists[0], {**names, "rad_id": "reader"}, EDGES)
        odd = {*boxes["finding"]} - {*VINBIG_FINDINGS, "No finding"}
        require(not odd, f"{lists[0]}: unknown classes {odd}")
        seen = pd.get_dummies(boxes.set_index(["image", "reader"])["finding"], dtype=float)
        seen = seen.groupby(level=[0, 1], sort=False).max()
        seen = seen.reindex(columns=VINBIG_FINDINGS, fill_value=0)
    else:  # a row a reader (one in test), a column a finding
        units, lists, seen, boxes = ["image", "split"], [], [], []
        other = {"image_id": "image", "Other disease": "Other diseases"}
        for split in ("train", "test"):
            for kind in ("image_labels", "annotations"):
                lists.append(Path(raw, "annotations", f"{kind}_{split}.csv"))
            rows = read_table(lists[-2], ["image_id"]).rename(columns=other).assign(split=split)
            seen.append(rows.set_index(units))
            boxes.append(read_table(lists[-1], names, EDGES).replace({"finding": other}))
        seen = pd.concat(seen).drop(columns=["rad_id", "No finding"]).astype(float)
        require(seen.isin([0, 1]).all(axis=None), f"{lists[::2]}: expected 0 or 1 in every finding")
        boxes = pd.concat(boxes)

    # Of the readers of an image, the share that saw a finding.
    share = seen.groupby(level=units, sort=False).mean()
    least = {"any": 0, "majority": 0.5}[readers]
    table = (share > least).astype(int).reset_index()
    present = table.melt("image", [*share], "finding", "present")
    boxes[["width", "height"]] -= boxes[["x", "y"]].to_numpy()
    boxes = boxes.merge(present[present["present"] == 1])
    listing = Listing(table, [*share], lists, boxes=boxes, allow_missing=allow_missing)
    listing.rule += f"; labels by {readers} of the readers"
    return listing.attach(Files(raw), ".dicom")


# ================================================================================================
# 6. Downloads
# ================================================================================================
NIH_URL = "https://nihcc.box.com/shared/static/{}.gz"
NIH_ARCHIVES = """vfk49d74nhbxq3nqjg0900w5nvkorp5c i28rlmbvmfjbl8p2n3ril0pptcmcu9d1
f1t00wrtdk94satdfb9olcolqx20z2jp 0aowwzs5lhjrceb3qp67ahp0rd1l1etg v5e3goj22zr6h8tzualxfsqlqaygfbsn
asi7ikud9jwnkrnkj99jnpfkjdes7l6l jn1b4mw4n6lnh74ovmcjb8y48h8xj07n tvpxmn7qyrgl0w8wfh9kqfjskv6nmm1j
upyy3ml7qdumlgk2rfcvlb9k6gvqq2pj l6nilvfa9cg3s28tqv1qc1olm3gnz54p hhq8fkdgvcari67vfhs7ppg2w6ni4jze
ioqwiy20ihqwyr8pf4c24eazhh281pbu""".split()
# A mirror: NIH's own folder has no direct links to its lists.
LISTS_URL = "https://huggingface.co/datasets/alkzar90/NIH-Chest-X-ray-dataset/resolve/main/data/{}"
NIH_LISTS = "Data_Entry_2017_v2020.csv train_val_list.txt test_list.txt BBox_List_2017.csv".split()
CHESTMNIST_URL = "https://zenodo.org/records/10519652/files/{}?download=1"
CHESTMNIST_FILES = {
    28: ("chestmnist.npz", "02c8a6516a18b556561a56cbdd36c4a8"),
    64: ("chestmnist_64.npz", "9de6cd0b934ebb5b7426cfba5efbae16"),
    128: ("chestmnist_128.npz", "db107e5590b27930b62dbaf558aebee3"),
    224: ("chestmnist_224.npz", "45bd33e6f06c3e8cdb481c74a89152aa"),
}


def download(url, path, md5=None):
    """Fetches a file; a broken transfer is resumed, a whole file is not fetched again.

    Args:
        url, path: from and to; `<path>.part` holds what has come so far.
        md5: hex digest to check beside the size that the server states.
    Returns: path.
    Raises: PrepError.
    """
    path, part = Path(path), Path(f"{path}.part")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    for _ in range(5):
        # From one byte back: a server refuses to send nothing after a whole file.
        have = max(part.stat().st_size - 1, 0)
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
            with urllib.request.urlopen(request, timeout=60) as reply, open(part, "ab") as f:
                if reply.status != 206:  # the whole file comes
                    have = 0
                f.truncate(have)
                total = have + int(reply.headers["Content-Length"])
                with tqdm.wrapattr(reply, "read", total, initial=have, disable=None) as body:
                    shutil.copyfileobj(body, f)
            why = f"{part.stat().st_size:,} of {total:,} bytes came"
            if part.stat().st_size == total:
                break
        except Exception as e:
            why = one_line(e)
    else:
        raise PrepError(f"{url}: {why}; the same command resumes the transfer")
    if md5 and file_digest(part, "md5") != md5:
        part.unlink()
        raise PrepError(f"{url} is not the published file (its MD5 differs); start again")
    return part.rename(path)


def fetch(command, folder, size):
    """Downloads and unpacks NIH, or downloads ChestMNIST at a size; what to give as --raw."""
    if command == "chestmnist":
        file, md5 = CHESTMNIST_FILES.get(size or 64, ("", ""))
        require(file, f"--size {size}; published are {[*CHESTMNIST_FILES]}")
        return download(CHESTMNIST_URL.format(file), folder / file, md5)
    for file in NIH_LISTS:
        download(LISTS_URL.format(file), folder / file)
    for k, key in enumerate(NIH_ARCHIVES, 1):
        archive = download(NIH_URL.format(key), folder / f"images_{k:03d}.tar.gz")
        with reading(archive), tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")  # refuses what would leave the folder
    return folder


# ================================================================================================
# 7. Verify
# ================================================================================================
def verify(folder):
    """Checks a prepared folder against its own hashes and counts, and prints what is in it.

    Args: folder: prepared folder.
    Returns: list of problems, one line each: changed pictures, another order, wrong counts, one
        picture in two splits. The values of labels, masks and boxes are not checked.
    Raises: PrepError or OSError if the folder is incomplete, or a patient is in two splits.
    """
    folder = Path(folder)
    problems = []
    meta = json.loads((folder / "meta.json").read_text())
    labels = read_table(folder / "labels.csv", ["image", "patient", "split", *meta["findings"]])
    hashes = read_table(folder / "hashes.csv", ["image", "sha256"])
    images, names, splits = np.load(folder / "images.npy", "r"), labels["image"], labels["split"]
    if {len(labels), len(hashes), len(images)} != {meta["images"]}:
        return [f"{len(labels)} rows, {len(images)} pictures; meta.json says {meta['images']}"]
    split_table(labels)  # refuses a patient in two splits
    digests = np.array([hashlib.sha256(image).hexdigest() for image in images])
    changed = names[labels.merge(hashes, "left", "image")["sha256"] != digests].tolist()
    if changed or file_digest(folder / "images.npy") != meta["images_sha256"]:
        problems.append(f"images.npy is not what was prepared, or not in order: {changed[:5]}")
    if any((splits == split).sum() != count for split, count in meta["counts"].items()):
        problems.append(f"labels.csv has other splits than meta.json: {meta['counts']}")
    for rows in labels.groupby(digests).indices.values():
        if splits[rows].nunique() > 1:
            same = ", ".join(f"{names[row]} ({splits[row]})" for row in rows)
            problems.append(f"one picture in two splits: {same}")

    positive = labels[meta["findings"]] == "1"
    positive.insert(0, "images", True)
    table = positive.groupby(splits).sum().reindex(SPLITS, fill_value=0).T
    print(table.assign(all=table.sum(axis=1)).to_string())
    return problems


# ================================================================================================
# 8. Command line
# ================================================================================================
IMPORTERS = list_demo, list_folder, list_nih, list_chestmnist, list_rsna, list_siim, list_vinbig
COMMANDS = {importer.__name__.removeprefix("list_"): importer for importer in IMPORTERS}
HELP = {
    "out": "folder to make (default: data/COMMAND)",
    "size": "edge S in pixels (default: 256; demo 128; chestmnist its own)",
    "workers": "processes (default: one a core, at most 8)",
    "overwrite": "start anew, replace what --out holds",
    "raw": "folder of the raw files, unpacked, or ChestMNIST's .npz; never written to",
    "csv": "table in --raw or elsewhere: image, [patient], [split], [mask], findings",
    "findings": "A,B: the columns of the table that are findings (default: all others)",
    "uncertain": "what the label -1 becomes (default: blank)",
    "patients": "table image,patient: split by patient (default: by image)",
    "allow_missing": "list missing images, do not refuse",
    "download": "fetch the files to downloads/ beside --out",
    "readers": "who must have seen a finding (default: majority)",
    "site": "hospital (default: a)",
    "count": "images (default: 4000)",
    "seed": "(default: 0)",
}
CHOICES = {"uncertain": ("blank", "0", "1"), "readers": ("majority", "any"), "site": ("a", "b")}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others."""

    def error(self, message):
        """Raises PrepError instead of printing the usage."""
        raise PrepError(f"{message}; see: {self.prog} --help")


def parse(argv):
    """Command line -> namespace; the options of a command are the arguments of its importer."""
    parser = Parser(prog="python data_prep.py", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, importer in COMMANDS.items():
        text = importer.__doc__.partition("\n")[0]
        sub = commands.add_parser(name, help=text, description=text)
        size = {"demo": 128, "chestmnist": None}.get(name, 256)
        defaults = dict(out=None, size=size, workers=min(8, usable_cores()), overwrite=False)
        for option, parameter in inspect.signature(importer).parameters.items():
            defaults[option] = parameter.default
        if name in ("nih", "chestmnist"):
            defaults["download"] = False
        for option, default in defaults.items():
            kind = {"choices": CHOICES.get(option)}
            if default is False:
                kind = {"action": "store_true"}
            elif option in ("size", "workers", "count", "seed"):
                kind = {"type": int}
            flag = f"--{option.replace('_', '-')}"
            sub.add_argument(flag, default=default, help=HELP[option], **kind)
    sub = commands.add_parser("verify", help="hashes, counts, splits and duplicates")
    sub.add_argument("folder", help="prepared folder")
    return parser.parse_args(argv)


def prepare(command, out, size, workers, overwrite, download=False, **given):
    """Runs one preparing command; `given`: the arguments of its importer."""
    out = Path(out or f"data/{command}")
    sound = MIN_SIDE <= (size or 256) <= 4096 and workers > 0 and given.get("count", 1) > 0
    require(sound, "expected --size from 16 to 4096, --workers and --count from 1")
    options = dict(given, command=command, size=size)
    options.pop("allow_missing", None)
    if out.exists():
        meta = out / "meta.json"
        require(meta.is_file(), f"{out} is incomplete (no meta.json); give another --out")
        if not overwrite:
            refuse_changed(json.loads(meta.read_text())["options"], options, out)
            print(f"{out} is finished; nothing to do (after a change of its files: --overwrite)")
            return
        check_own(out)
    if download:
        given["raw"] = fetch(command, out.parent / "downloads" / command, size)
    if "raw" in given:
        outside = given["raw"] and not out.resolve().is_relative_to(Path(given["raw"]).resolve())
        require(outside, "give --raw DIR, and --out outside it: --raw is never written to")
    listing = COMMANDS[command](**given)
    write_prepared(listing, out, options, size, workers, overwrite)


def main(argv=None):
    """The command line.

    Args: argv: list of str; None takes those of the process.
    Returns: exit code: 0, 2 after an error (one line on stderr), 130 after Ctrl-C.
    """
    try:
        args = parse(argv)
        if args.command == "verify":
            problems = verify(args.folder)
            require(not problems, f"{args.folder}: {problems[:1]}, {len(problems)} problem(s)")
        else:
            prepare(**vars(args))
    except (ValueError, OSError, BrokenExecutor) as e:
        print(f"error: {one_line(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command resumes from here, with --overwrite anew", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
