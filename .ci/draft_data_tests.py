"""Tests of data_prep.py, in the order of its sections."""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import data_prep as dp

SCRIPT = Path(dp.__file__)
XRAYS = Path(os.environ.get("MLVICX_XRAYS", ""))
real = pytest.mark.skipif("MLVICX_XRAYS" not in os.environ, reason="no folder of real X-rays")


def phantom(index, size=64):
    """A picture of its own for every index."""
    return dp.draw_phantom(7, index, size)["image"]


def save(picture, path):
    """Writes a picture in the format of its suffix, folders included; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return path


def write(path, *lines):
    """Writes a table as lines, folders included; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join(map(str, lines)).encode() + b"\n")
    return path


def prep(*args):
    """Runs a preparing command with one process and demands success."""
    assert dp.main([*map(str, args), "--workers", "1"]) == 0


def prep_refused(capsys, *args):
    """The one line with which a command is refused."""
    capsys.readouterr()
    assert dp.main([*map(str, args)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert "Traceback" not in "".join(lines)
    return lines[-1]


def script(*args, **kwargs):
    """Runs `python data_prep.py ...` in a process of its own."""
    call = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(call, capture_output=True, text=True, timeout=120, **kwargs)


def prepared(folder):
    """(images, labels, rejected, meta) of a prepared folder; blank labels are NaN."""
    folder = Path(folder)
    labels = pd.read_csv(folder / "labels.csv", dtype={"image": str, "patient": str})
    rejected = pd.read_csv(folder / "rejected.csv").set_index("image")["reason"].to_dict()
    meta = json.loads((folder / "meta.json").read_text())
    images = np.load(folder / "images.npy")
    assert images.dtype == np.uint8 and images.shape == (len(labels), meta["size"], meta["size"])
    assert meta["images"] == len(labels) and meta["rejected"] == len(rejected)
    return images, labels, rejected, meta


def content(folder):
    """Name -> bytes of every file of a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# ---------------------------------------------------------------- 1. one X-ray file

UID = "1.2.840.10008.1.2"
COMPRESSIONS = {  # ending of the UID -> name in gdcm, largest error of 8-bit gray levels
    "": ("ImplicitVRLittleEndian", 0),
    ".1": ("ExplicitVRLittleEndian", 0),
    ".4.50": ("JPEGBaselineProcess1", 4),
    ".4.51": ("JPEGExtendedProcess2_4", 4),
    ".4.57": ("JPEGLosslessProcess14", 0),
    ".4.70": ("JPEGLosslessProcess14_1", 0),
    ".4.80": ("JPEGLSLossless", 0),
    ".4.81": ("JPEGLSNearLossless", 4),
    ".4.90": ("JPEG2000Lossless", 0),
    ".4.91": ("JPEG2000", 4),
    ".5": ("RLELossless", 0),
}


def save_dicom(pixels, path, bits=None, ending=".1", photometric="MONOCHROME2", **tags):
    """Writes pixels as a DICOM file with the transfer syntax of that ending; returns the path."""
    import gdcm
    from pydicom.dataset import Dataset, FileMetaDataset

    path.parent.mkdir(parents=True, exist_ok=True)
    ds, ds.file_meta = Dataset(), FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = UID + ".1"
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3"
    ds.Rows, ds.Columns, *rest = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (rest or [1])[0], photometric
    if rest:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = 8 * pixels.itemsize
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in tags.items():
        setattr(ds, name, value)
    ds.PixelData = pixels.tobytes()
    ds.save_as(path, enforce_file_format=True)
    if ending != ".1":
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), None
        reader.SetFileName(str(path))
        assert reader.Read()
        kind = getattr(gdcm.TransferSyntax, COMPRESSIONS[ending][0])
        change.SetTransferSyntax(gdcm.TransferSyntax(kind))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        assert f"{UID}{ending}".encode() in path.read_bytes()[:600]
    return path


def test_eight_bit_pictures_come_back_as_they_were_saved(tmp_path):
    picture = phantom(0)
    for name in ("a.png", "b.dcm"):
        saver = save_dicom if name.endswith("dcm") else save
        read = dp.read_xray(saver(picture, tmp_path / name))
        assert read.dtype == np.uint8 and np.array_equal(read, picture)
    lossy = dp.read_xray(save(picture, tmp_path / "c.jpg"))
    assert np.abs(lossy.astype(int) - picture).mean() < 5
    # Told by content, not by name; and from an open stream.
    os.rename(tmp_path / "b.dcm", tmp_path / "b.png")
    assert np.array_equal(dp.read_xray(tmp_path / "b.png"), picture)
    assert np.array_equal(dp.read_xray(io.BytesIO((tmp_path / "a.png").read_bytes())), picture)


def test_sixteen_bit_rgba_and_palette_pngs(tmp_path):
    picture = phantom(1)
    deep = picture.astype(np.uint16) * 200 + 3000
    low, high = int(deep.min()), int(deep.max())
    expected = np.floor((deep - low) * 255.0 / (high - low) + 0.5)
    assert np.array_equal(dp.read_xray(save(deep, tmp_path / "deep.png")), expected)
    rgba = np.dstack([picture, picture, picture, np.full_like(picture, 7)])
    assert np.array_equal(dp.read_xray(save(rgba, tmp_path / "rgba.png")), picture)
    palette = Image.fromarray(255 - picture)  # index -> the opposite gray
    palette.putpalette([255 - k for k in range(256) for _ in range(3)])
    palette.save(tmp_path / "palette.png")
    assert Image.open(tmp_path / "palette.png").mode == "P"
    assert np.array_equal(dp.read_xray(tmp_path / "palette.png"), picture)
    colour = np.zeros((20, 30, 3), np.uint8)
    colour[..., 1] = 200  # luminance of green: 0.587
    assert np.unique(dp.read_xray(save(colour, tmp_path / "green.png"))).tolist() == [117]
    bits = Image.fromarray(picture > 99)
    bits.save(tmp_path / "bits.png")
    assert np.array_equal(dp.read_xray(tmp_path / "bits.png"), (picture > 99) * np.uint8(255))


DEEP = [ending for ending in COMPRESSIONS if ending not in (".4.50", ".4.51")]  # more than 8 bits


@pytest.mark.parametrize(
    "ending,depth", [*itertools.product(COMPRESSIONS, [8]), *itertools.product(DEEP, [12])]
)
def test_every_compression_of_dicom(ending, depth, tmp_path):
    picture = phantom(2)
    if depth == 12:
        deep = picture.astype(np.uint16) * 16 + 5
        low, high = int(picture.min()), int(picture.max())
        picture = np.floor((picture - low) * 255.0 / (high - low) + 0.5)
        path = save_dicom(deep, tmp_path / "a.dcm", bits=12, ending=ending)
    else:
        path = save_dicom(picture, tmp_path / "a.dcm", ending=ending)
    error = np.abs(dp.read_xray(path).astype(int) - picture)
    assert error.max() <= COMPRESSIONS[ending][1]


def test_the_list_of_transfer_syntaxes_is_what_was_tested():
    assert set(dp.TRANSFER_SYNTAXES) == {UID + ending for ending in COMPRESSIONS}


def test_colour_dicom_becomes_luminance(tmp_path):
    colour = np.dstack([phantom(k) for k in range(3)])
    expected = np.asarray(Image.fromarray(colour).convert("L"))
    path = save_dicom(colour, tmp_path / "a.dcm", photometric="RGB")
    assert np.array_equal(dp.read_xray(path), expected)


@pytest.mark.parametrize("bits,kind", [(8, "u1"), (10, "u2"), (12, "i2"), (16, "u2")])
@pytest.mark.parametrize("tags", ["plain", "rescale", "window", "sigmoid", "voi_lut"])
def test_monochrome_1_and_2_of_one_picture_give_identical_bytes(bits, kind, tags, tmp_path):
    from pydicom.dataset import Dataset

    top = 2**bits - 1
    low = -(2 ** (bits - 1)) if kind == "i2" else 0
    pixels = (np.random.default_rng(bits).random((24, 40)) * top).round().astype(int) + low
    opposite = (top + 2 * low - pixels).astype(kind)
    middle, width, pixels = 0.5 * top + low, 0.6 * top, pixels.astype(kind)
    # Every table is symmetric, so that it means the same to a picture and to its negative.
    given = {"RescaleSlope": 0.5, "RescaleIntercept": 3} if tags == "rescale" else {}
    if tags in ("window", "sigmoid"):
        given = {"WindowCenter": middle + 0.5 * (tags == "window"), "WindowWidth": width}
        given |= {"VOILUTFunction": "SIGMOID" if tags == "sigmoid" else "LINEAR"}
    if tags == "voi_lut":
        table = Dataset()
        curve = np.round(65535 * (0.5 - 0.5 * np.cos(np.pi * np.arange(top + 1) / top)))
        half = (top + 1) // 2
        curve[half:] = 65535 - curve[:half][::-1]
        table.LUTDescriptor = [(top + 1) % 65536, low, 16]
        table.LUTData = curve.astype("<u2").tobytes()
        table["LUTData"].VR = "OW"
        given = {"VOILUTSequence": [table]}
    one = save_dicom(opposite, tmp_path / "1.dcm", bits, photometric="MONOCHROME1", **given)
    two = save_dicom(pixels, tmp_path / "2.dcm", bits, **given)
    one, two = dp.read_xray(one), dp.read_xray(two)
    assert np.array_equal(one, two)
    assert np.corrcoef(two.ravel(), pixels.ravel())[0, 1] > 0.9  # bright stays bright


def test_modality_then_voi_then_inversion_by_hand(tmp_path):
    pixels = np.repeat(np.array([[0, 500, 1000, 2000]], np.uint16), 16, 0).repeat(4, 1)
    # Rescaled to 0 1000 2000 4000; a linear window from 1000 to 3000 maps them to 0 0 .5 1 of 4095.
    tags = dict(RescaleSlope=2, RescaleIntercept=0, WindowCenter=2000.5, WindowWidth=2001)
    for photometric, expected in (("MONOCHROME2", [0, 0, 128, 255]), ("MONOCHROME1", [255] * 2)):
        path = save_dicom(pixels, tmp_path / "a.dcm", 12, photometric=photometric, **tags)
        shown = dp.read_xray(path)[0, ::4].tolist()
        expected = expected if photometric[-1] == "2" else [255, 255, 128, 0]
        assert np.abs(np.subtract(shown, expected)).max() <= 1


def test_truncated_files_are_rejected_and_never_half_black(tmp_path):
    picture = phantom(3)
    deep = picture.astype(np.uint16) * 16
    paths = [save(picture, tmp_path / name) for name in ("a.png", "a.jpg")]
    paths += [save(deep, tmp_path / "deep.png")]
    for ending in (".1", ".4.50", ".4.70", ".4.80", ".4.90", ".5"):
        pixels, bits = (picture, 8) if ending == ".4.50" else (deep, 12)
        paths.append(save_dicom(pixels, tmp_path / f"a{ending}.dcm", bits, ending=ending))
    for path in paths:
        whole = path.read_bytes()
        dp.read_xray(path)
        for share in (0.0, 0.05, 0.3, 0.5, 0.7, 0.9, 0.97):
            path.write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(ValueError, match="....."):
                dp.read_xray(path)


@pytest.mark.parametrize("ending", [e for e in COMPRESSIONS if e not in ("", ".1")])
def test_a_stream_that_ends_early_in_a_whole_dicom_file_is_rejected(ending, tmp_path):
    import pydicom
    from pydicom.encaps import encapsulate, generate_frames

    path = save_dicom(phantom(3, 128), tmp_path / "a.dcm", ending=ending)
    ds = pydicom.dcmread(path)
    frame = next(generate_frames(ds.PixelData, number_of_frames=1))
    for share in (0.1, 0.5, 0.9, 0.99, 1):
        ds.PixelData = encapsulate([frame[: int(share * len(frame))]])
        ds.save_as(path)
        with contextlib.nullcontext() if share == 1 else pytest.raises(ValueError, match="....."):
            dp.read_xray(path)


def test_other_files_are_rejected_with_a_reason(tmp_path):
    cases = {
        "zero.png": (b"", "not a PNG"),
        "page.png": (b"<!DOCTYPE html><html><body>404</body></html>", "not a PNG"),
        "text.dcm": (b"not at all a picture " * 30, "not a PNG"),
        "one.png": (np.zeros((1, 1), np.uint8), "1 x 1 pixels"),
        "thin.png": (np.zeros((15, 400), np.uint8), "400 x 15 pixels"),
    }
    for name, (what, reason) in cases.items():
        path = tmp_path / name
        path.write_bytes(what) if isinstance(what, bytes) else save(what, path)
        with pytest.raises(ValueError, match=reason):
            dp.read_xray(path)
    Image.fromarray(phantom(0)).save(tmp_path / "a.gif")
    with pytest.raises(ValueError, match="not a PNG"):  # only the decoders that are needed
        dp.read_xray(tmp_path / "a.gif")
    with pytest.raises(ValueError, match="No such file"):
        dp.read_xray(tmp_path / "nowhere.png")


def test_a_transfer_syntax_that_is_not_on_the_list_is_refused_before_it_is_read(tmp_path):
    path = save_dicom(phantom(0), tmp_path / "a.dcm")
    data = path.read_bytes()
    # Deflated, big endian, JPEG XL, MPEG, JPIP: each as long as the UID that it replaces, or less.
    for other in (".1.99", ".2", ".4.110", ".4.100", ".4.94"):
        uid = (UID + ".1").encode()
        start = data.index(b"\x02\x00\x10\x00UI")
        length = int.from_bytes(data[start + 6 : start + 8], "little")
        new = (UID + other).encode()
        new += b"\0" * (len(new) % 2)
        head = data[:start] + b"\x02\x00\x10\x00UI" + len(new).to_bytes(2, "little") + new
        assert uid in data
        group = head.index(b"\x02\x00\x00\x00UL")  # its length counts the bytes after it
        total = int.from_bytes(head[group + 8 : group + 12], "little") + len(new) - length
        head = head[: group + 8] + total.to_bytes(4, "little") + head[group + 12 :]
        path.write_bytes(head + data[start + 8 + length :])
        with pytest.raises(ValueError, match=re.escape(UID + other)):
            dp.read_xray(path)


def test_lying_dicom_headers_are_refused(tmp_path):
    import pydicom

    picture = phantom(4)
    cases = [(ending, {"Rows": 128}) for ending in (".1", ".4.50", ".4.70", ".4.80", ".4.90", ".5")]
    cases += [(ending, {"Columns": 40}) for ending in (".4.50", ".4.80", ".4.90")]
    cases += [(".1", {"Rows": 60000, "Columns": 60000}), (".1", {"Rows": 4, "Columns": 4})]
    cases += [(".1", {"NumberOfFrames": 2}), (".1", {"BitsAllocated": 32})]
    cases += [(".1", {"SamplesPerPixel": 4}), (".1", {"PixelData": None}), (".1", {"Rows": None})]
    for ending, tags in cases:
        path = save_dicom(picture, tmp_path / "a.dcm", ending=ending)
        ds = pydicom.dcmread(path)
        for name, value in tags.items():
            setattr(ds, name, value)
            if value is None:
                delattr(ds, name)
        ds.save_as(path)
        with pytest.raises(ValueError):
            dp.read_xray(path)


BOMBS = """
import io, resource, sys, zlib
import numpy as np, pydicom
import data_prep as dp
from PIL import Image

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

import gdcm, pydicom.pixels
start = peak()
for path in sys.argv[1:]:
    try:
        dp.read_xray(path)
        print("READ", path)
    except ValueError as e:
        print(dp.one_line(e))
print(peak() - start)
"""


def test_bombs_are_refused_within_one_gigabyte(tmp_path):
    import zlib

    files, head = [], save_dicom(phantom(0), tmp_path / "a.dcm").read_bytes()
    Image.new("1", (20_000, 20_000)).save(tmp_path / "large.png")
    Image.new("L", (20_000, 20_000)).save(tmp_path / "large.jpg")
    files += [tmp_path / "large.png", tmp_path / "large.jpg"]
    # Deflated: two gigabytes of zeros in two megabytes, under a right file meta.
    meta = head[: head.index(b"\x08\x00\x16\x00UI")]
    meta = meta.replace(
        b"UI\x14\x00" + UID.encode() + b".1\0", b"UI\x16\x00" + UID.encode() + b".1.99"
    )
    group = meta.index(b"\x02\x00\x00\x00UL")
    length = len(meta) - group - 12
    meta = meta[: group + 8] + length.to_bytes(4, "little") + meta[group + 12 :]
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    body = block * 128 + packer.flush()
    (tmp_path / "deflated.dcm").write_bytes(meta + body)
    files.append(tmp_path / "deflated.dcm")
    # The data set says 65,535 x 65,535, or the stream inside says more than the data set.
    for ending in (".1", ".4.70", ".4.80", ".4.90", ".5"):
        import pydicom

        path = save_dicom(phantom(0), tmp_path / f"lying{ending}.dcm", ending=ending)
        ds = pydicom.dcmread(path)
        ds.Rows = ds.Columns = 65_535
        ds.save_as(path)
        files.append(path)
    for ending in (".4.50", ".4.70", ".4.80", ".4.90"):
        path = save_dicom(phantom(0), tmp_path / f"inside{ending}.dcm", ending=ending)
        data = path.read_bytes()
        pixels = data.index(b"\xe0\x7f\x10\x00")
        if ending == ".4.90":
            at = data.index(b"\xff\x4f\xff\x51", pixels) + 8
            data = data[:at] + (60_000).to_bytes(4, "big") * 2 + data[at + 8 :]
        else:
            marker = {".4.50": b"\xff\xc0", ".4.70": b"\xff\xc3", ".4.80": b"\xff\xf7"}[ending]
            at = data.index(marker, pixels) + 5
            data = data[:at] + (60_000).to_bytes(2, "big") * 2 + data[at + 4 :]
        path.write_bytes(data)
        files.append(path)
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    call = [sys.executable, "-c", BOMBS, *map(str, files)]
    done = subprocess.run(call, capture_output=True, text=True, env=env, timeout=60)
    *lines, grown = done.stdout.strip().splitlines()
    assert done.returncode == 0 and len(lines) == len(files), done.stderr
    assert not any(line.startswith("READ") for line in lines), lines
    assert "1.99 is not on the list" in lines[2]
    assert float(grown) < 1000


def test_a_file_above_the_cap_is_not_opened(tmp_path):
    with open(tmp_path / "a.png", "wb") as f:
        f.truncate(dp.MAX_BYTES + 1)  # a hole: no disk is used
    with pytest.raises(ValueError, match="256 MiB"):
        dp.read_xray(tmp_path / "a.png")


def test_resize_is_an_antialiased_square(tmp_path):
    stripes = np.tile(np.array([0, 255], np.uint8), (256, 128))  # finer than the result can show
    assert (
        np.ptp(dp.resize_xray(stripes, 64)) <= 2
        and abs(dp.resize_xray(stripes, 64)[9, 9] - 127) < 2
    )
    picture = phantom(5, 256)
    exact = Image.fromarray(picture).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.abs(dp.resize_xray(picture, 64) - np.asarray(exact, float)).mean() < 1
    assert dp.resize_xray(picture[:200], 48).shape == (48, 48)
    assert np.array_equal(dp.resize_xray(picture, 256), picture)


PIXEL_TAGS = (
    "Rows Columns SamplesPerPixel BitsAllocated BitsStored HighBit PixelRepresentation "
    "PhotometricInterpretation RescaleSlope RescaleIntercept WindowCenter WindowWidth"
).split()


def test_a_thousand_damaged_dicom_headers_are_read_right_or_refused(tmp_path):
    import pydicom

    sound = pydicom.dcmread(save_dicom(phantom(0), tmp_path / "sound.dcm"))
    rng, read, equal = np.random.default_rng(0), 0, 0
    sources = [
        save_dicom(phantom(k), tmp_path / f"{k}.dcm", ending=e)
        for k, e in enumerate((".1", "", ".4.70", ".4.90", ".5"))
    ]
    sources = [(path.read_bytes(), dp.read_xray(path)) for path in sources]
    path = tmp_path / "fuzz.dcm"
    for case in range(1000):
        data, right = sources[case % len(sources)]
        data = bytearray(data)
        end = data.index(b"\xe0\x7f\x10\x00") + 8
        for at in rng.integers(128, end, rng.integers(1, 5)):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            picture = dp.read_xray(path)
        except ValueError as e:
            assert str(e).strip()
            continue
        read += 1
        ds = pydicom.dcmread(path)
        assert picture.dtype == np.uint8 and picture.shape == (ds.Rows, ds.Columns)
        # Damage outside the elements of the pixels changes nothing.
        with contextlib.suppress(NotImplementedError):
            if all(ds.get(name) == sound.get(name) for name in PIXEL_TAGS):
                assert np.array_equal(picture, right)
                equal += 1
    assert 50 < equal < read < 1000


# ---------------------------------------------------------------- 2. demo phantoms


def test_a_phantom_is_a_function_of_seed_index_and_site(tmp_path):
    one = dp.draw_phantom(3, 17, 64)
    for other in (dp.draw_phantom(3, 17, 64), dp.draw_phantom(seed=3, index=17, size=64, site="a")):
        assert np.array_equal(one["image"], other["image"])
        assert {k: one[k] for k in ("findings", "boxes", "patient")} == {
            k: other[k] for k in ("findings", "boxes", "patient")
        }
    for other in (dp.draw_phantom(4, 17, 64), dp.draw_phantom(3, 18, 64)):
        assert not np.array_equal(one["image"], other["image"])
    # The same in another process, and for another size the same patient and findings.
    code = (
        "import data_prep as d, hashlib\n"
        "print(hashlib.sha256(d.draw_phantom(3, 17, 64)['image'].tobytes()).hexdigest())"
    )
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent), "PYTHONHASHSEED": "9"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == hashlib.sha256(one["image"].tobytes()).hexdigest()
    large = dp.draw_phantom(3, 17, 256)
    assert large["findings"] == one["findings"] and large["patient"] == one["patient"]
    small = np.asarray(Image.fromarray(large["image"]).resize((64, 64), Image.Resampling.BOX))
    assert np.corrcoef(small.ravel(), one["image"].ravel())[0, 1] > 0.97


def test_labels_masks_and_boxes_of_phantoms_agree():
    seen = dict.fromkeys(dp.PHANTOM_FINDINGS, 0)
    for index in range(200):
        case = dp.draw_phantom(1, index, 64)
        findings, image, mask = case["findings"], case["image"], case["mask"]
        assert image.dtype == mask.dtype == np.uint8 and image.shape == mask.shape == (64, 64)
        assert 30 < image.std() < 100 and set(np.unique(mask)) <= {0, 1}
        assert list(findings) == [*dp.PHANTOM_FINDINGS, "No Finding"]
        shown = [name for name in dp.PHANTOM_FINDINGS if findings[name]]
        assert findings["No Finding"] == int(not shown)
        assert mask.any() <= findings["Pneumothorax"]
        assert sorted(name for name, *_ in case["boxes"]) == sorted(shown) or len(
            case["boxes"]
        ) < len(shown)  # a region may lie outside the picture
        for name, x, y, width, height in case["boxes"]:
            assert findings[name] and 0 <= x < x + width <= 64 and 0 <= y < y + height <= 64
            seen[name] += 1
            if name == "Pneumothorax":
                rows, columns = np.nonzero(mask)
                assert (x, y) == (columns.min(), rows.min())
                assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
    assert min(seen.values()) >= 3


def test_a_finding_changes_the_picture_where_its_box_is(monkeypatch):
    """The same case drawn without the finding differs inside the box more than outside."""
    case_of = dp.phantom_case
    for name in ("Nodule", "Consolidation", "Effusion"):
        index = next(k for k in range(99) if case_of(0, k)[2][name] > 0.5)
        one = dp.draw_phantom(0, index, 128)

        def without(seed, index, site="a", name=name):
            patient, body, severity, rng = case_of(seed, index, site)
            return patient, body, severity | {name: 0.0}, rng

        monkeypatch.setattr(dp, "phantom_case", without)
        two = dp.draw_phantom(0, index, 128)
        monkeypatch.setattr(dp, "phantom_case", case_of)
        change = np.abs(one["image"].astype(float) - two["image"])
        x, y, width, height = next(box[1:] for box in one["boxes"] if box[0] == name)
        inside = np.zeros((128, 128), bool)
        inside[y : y + height, x : x + width] = True
        assert change[inside].mean() > 3 * change[~inside].mean(), name


def test_prevalence_and_images_a_patient_are_as_stated():
    for site, place in dp.PHANTOM_SITES.items():
        cases = [dp.phantom_case(5, k, site) for k in range(4000)]
        rates = np.mean([[v > 0 for v in severity.values()] for _, _, severity, _ in cases], axis=0)
        assert np.abs(rates - place["prevalence"]).max() < 0.03
        patients = [patient for patient, *_ in cases]
        sizes = pd.Series(patients).value_counts()
        assert sizes.between(1, 5).all() and abs(sizes.mean() - 2.5) < 0.1
        runs = [name for name, _ in itertools.groupby(patients)]
        assert len(runs) == len(set(runs))  # consecutive
        bodies = {patient: body["heart"] for patient, body, *_ in cases}
        assert all(body["heart"] == bodies[patient] for patient, body, *_ in cases)


def test_demo_is_split_by_patient_and_its_second_run_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prep("demo", "--count", 150, "--size", 32)
    images, labels, rejected, meta = prepared("data/demo")
    assert len(images) == 150 and not rejected and meta["name"] == "demo"
    assert labels.groupby("patient")["split"].nunique().max() == 1
    assert set(labels["split"]) == {"train", "val", "test"}
    assert [dp.hash_split(p) for p in labels["patient"]] == labels["split"].tolist()
    assert meta["groups"] == {
        "coarse": list(dp.PHANTOM_COARSE),
        "fine": list(dp.PHANTOM_FINE),
    }
    assert set(meta["groups"]["coarse"] + meta["groups"]["fine"]) < set(meta["findings"])
    masks, boxes = np.load("data/demo/masks.npy"), pd.read_csv("data/demo/boxes.csv")
    for k in (0, 77, 149):
        case = dp.draw_phantom(0, k, 32)
        assert np.array_equal(images[k], case["image"]) and np.array_equal(masks[k], case["mask"])
        assert labels.loc[k, list(case["findings"])].to_dict() == case["findings"]
        rows = boxes[boxes["image"] == labels["image"][k]].drop(columns="image")
        assert list(rows.itertuples(index=False, name=None)) == case["boxes"]
    first = content("data/demo")
    stamp = os.stat("data/demo/images.npy").st_mtime_ns
    capsys.readouterr()
    prep("demo", "--count", 150, "--size", 32)
    assert "nothing to do" in capsys.readouterr().out
    assert content("data/demo") == first and os.stat("data/demo/images.npy").st_mtime_ns == stamp
    prep("demo", "--count", 150, "--size", 32, "--out", "again/demo")
    assert content("again/demo") == first
    line = prep_refused(capsys, "demo", "--count", 151, "--size", 32)
    assert "count 150, now asked: 151" in line and "--overwrite" in line
    prep("demo", "--count", 151, "--size", 32, "--overwrite")
    assert len(prepared("data/demo")[0]) == 151


def test_site_b_is_another_hospital(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prep("demo", "--count", 100, "--size", 32)
    prep("demo", "--count", 100, "--size", 32, "--site", "b")
    (a, labels_a, _, _), (b, labels_b, _, _) = prepared("data/demo"), prepared("data/demo-b")
    assert not set(labels_a["patient"]) & set(labels_b["patient"])
    assert not set(labels_a["image"]) & set(labels_b["image"])
    assert abs(a.mean() - b.mean()) > 3 and not (a == b).all(axis=(1, 2)).any()


def test_meta_is_written_last_and_a_folder_without_it_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written, replace = [], os.replace

    def watch(source, target):
        written.append(sorted((p.stat().st_mtime_ns, p.name) for p in Path(source).iterdir()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    prep("demo", "--count", 9, "--size", 32)
    assert written[0][-1][1] == "meta.json"
    assert not Path("data/demo.partial").exists() and not Path("data/demo/progress.jsonl").exists()
    os.remove("data/demo/meta.json")
    assert "incomplete" in prep_refused(capsys, "demo", "--count", 9, "--size", 32)
    prep("demo", "--count", 9, "--size", 32, "--overwrite")
    assert prepared("data/demo")[3]["images"] == 9


# ---------------------------------------------------------------- 3. tables and splits


def test_hash_split_has_the_shares_and_never_changes():
    for shares in (dp.BY_PATIENT, dp.BY_IMAGE, dp.CARVED):
        drawn = pd.Series([dp.hash_split(f"p{k}", shares) for k in range(20_000)])
        rates = drawn.value_counts(normalize=True)
        assert all(abs(rates[split] - share) < 0.01 for split, share in shares.items())
    # By hand: the first 8 digits of the hash, as a share of all.
    for key in ("1", "30805", "a00017"):
        place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
        assert dp.hash_split(key) == ("train" if place < 0.7 else "val" if place < 0.8 else "test")


def test_split_table_completes_only_what_is_missing():
    images = [f"i{k}" for k in range(400)]
    own, rule = dp.split_table(pd.DataFrame({"image": images}))
    assert own["patient"].tolist() == images and "by image" in rule
    assert own["split"].tolist() == [dp.hash_split(i, dp.BY_IMAGE) for i in images]
    table = pd.DataFrame({"image": images, "patient": [f"p{k // 4}" for k in range(400)]})
    by_patient, rule = dp.split_table(table)
    assert "by patient" in rule and by_patient.groupby("patient")["split"].nunique().max() == 1
    given = table.assign(split=["train" if k < 300 else "test" for k in range(400)])
    carved, rule = dp.split_table(given)
    assert (carved["split"][300:] == "test").all() and "test set as given" in rule
    assert set(carved["split"][:300]) == {"train", "val"}
    assert carved.groupby("patient")["split"].nunique().max() == 1
    given.loc[:3, "split"] = "val"
    same, rule = dp.split_table(given)
    assert same["split"].tolist() == given["split"].tolist() and rule == "as given"
    assert table.columns.tolist() == ["image", "patient"]  # the caller's table is left alone


def test_split_table_refuses_what_has_no_sense():
    rows = {"image": ["a", "b", "c"], "patient": ["1", "1", "2"], "split": ["train"] * 3}
    for change, message in (
        ({"image": ["a", "a", "c"]}, "image .'a'. is blank or in conflicting rows"),
        ({"image": ["a", "", "c"]}, "image"),
        ({"patient": ["1", "", "2"]}, "patient"),
        ({"split": ["train", "test", "test"]}, "patient .'1'. is blank or in two splits"),
        ({"split": ["train", "train", "dev"]}, "split .'dev'.; expected train, val or test"),
    ):
        with pytest.raises(dp.PrepError, match=message):
            dp.split_table(pd.DataFrame(rows | change))


def test_read_table_takes_a_byte_order_mark_and_names_a_missing_column(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfimage, value\r\n a ,NA\r\nb, \r\n")
    table = dp.read_table(path, ["image", "value"])
    assert table.to_dict("list") == {"image": ["a", "b"], "value": ["NA", ""]}
    with pytest.raises(dp.PrepError, match="expected the columns .*'other'.*found .*'value'"):
        dp.read_table(path, ["other"])
    with pytest.raises(dp.PrepError, match="could not convert"):
        dp.read_table(path, ["image"], ["value"])
    for data in (b"", b"a,b\n1,2,3\n", b'a,b\n"1,2\n', b"\xff\xfea", b"<html>\n</html>"):
        path.write_bytes(data)
        with pytest.raises(dp.PrepError, match="a.csv"):
            dp.read_table(path, ["image"])


def slow_rle(text, rows, columns):
    """The definition, one pixel at a time: None where it is not valid."""
    values = text.split()
    if len(values) % 2 or not all(re.fullmatch(r"[+-]?\d+", v) for v in values):
        return None
    mask, at = np.zeros((rows, columns), bool), 0
    for gap, length in zip(values[::2], values[1::2], strict=True):
        if int(gap) < 0 or int(length) < 1:
            return None
        at += int(gap)
        for _ in range(int(length)):
            if at >= rows * columns:
                return None
            mask[at % rows, at // rows] = True
            at += 1
    return mask


def test_rle_by_hand():
    # Down the columns of 3 x 4; the second gap counts from the end of the first run.
    mask = dp.rle_decode("1 2 3 1 2 1", 3, 4)
    assert mask.astype(int).tolist() == [[0, 0, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert dp.rle_decode("", 3, 4).sum() == 0 and dp.rle_decode("0 12", 3, 4).all()
    for text in ("1", "1 2 3", "-1 2", "0 0", "0 13", "11 2", "a b", "1.5 2", "99999999999 1"):
        with pytest.raises(ValueError):
            dp.rle_decode(text, 3, 4)


def rle_encode(mask):
    """Relative, column-major run lengths of a mask; "-1" for a blank one."""
    flat = np.concatenate([[0], mask.T.ravel().astype(int), [0]])
    starts, ends = np.flatnonzero(np.diff(flat) == 1), np.flatnonzero(np.diff(flat) == -1)
    gaps = starts - np.concatenate([[0], ends[:-1]])
    return " ".join(f"{gap} {n}" for gap, n in zip(gaps, ends - starts, strict=True)) or "-1"


def test_a_thousand_run_length_texts_are_decoded_right_or_refused():
    rng, valid = np.random.default_rng(0), 0
    for case in range(1000):
        rows, columns = rng.integers(1, 12, 2)
        if case % 2:
            text = rle_encode(rng.random((rows, columns)) < rng.random())
        else:
            text = " ".join(map(str, rng.integers(-1, 9, rng.integers(0, 9))))
        if case % 5 == 0 and text:  # one character damaged
            at = rng.integers(len(text))
            text = text[:at] + rng.choice(list("0123456789 -x.")) + text[at + 1 :]
        right = slow_rle(text, rows, columns)
        if right is None:
            with pytest.raises(ValueError):
                dp.rle_decode(text, rows, columns)
        else:
            valid += 1
            assert np.array_equal(dp.rle_decode(text, rows, columns), right)
    assert 300 < valid < 900


# ---------------------------------------------------------------- 4. the prepared folder


def test_boxes_are_scaled_and_clipped():
    columns = ["image", "finding", *dp.EDGES]
    rows = [
        ("a", "F", 10, 20, 30, 40),
        ("a", "F", -10, 0, 20, 10),  # half outside
        ("a", "G", 90, 190, 50, 50),  # to the edge
        ("a", "G", 100, 0, 5, 5),  # outside
        ("b", "F", 1, 2, 3, 4),
        ("c", "F", 1, 2, 3, 4),  # no such picture
    ]
    sizes = pd.DataFrame({"image": ["a", "b"], "height": [200, 50], "width": [100, 50]})
    boxes = dp.scale_boxes(pd.DataFrame(rows, columns=columns), sizes, 50)
    assert list(boxes.itertuples(index=False, name=None)) == [
        ("a", "F", 5, 5, 15, 10),
        ("a", "F", 0, 0, 5, 2.5),
        ("a", "G", 45, 47.5, 5, 2.5),
        ("b", "F", 1, 2, 3, 4),
    ]


def raw_folder(root, n=12, size=48):
    """A folder of n PNGs with a table: column F holds 0 and 1, two images a patient."""
    for k in range(n):
        save(phantom(k, size), root / "images" / f"i{k:03d}.png")
    rows = [f"i{k:03d}.png,p{k // 2},{k % 2}" for k in range(n)]
    return write(root / "labels.csv", "image,patient,F", *rows).parent


def start_demo(out, *args, **kwargs):
    """A demo preparation of some seconds in a process of its own."""
    call = [sys.executable, str(SCRIPT), "demo", "--count", "900", "--size", "32"]
    call += ["--out", str(out), *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(call, stdout=pipe, stderr=pipe, text=True, **kwargs)


def wait_for_rows(folder, rows):
    """Waits until the journal of a run holds that many rows."""
    for _ in range(3000):
        journal = Path(f"{folder}.partial", "progress.jsonl")
        if journal.exists() and journal.read_bytes().count(b"\n") > rows:
            return
        time.sleep(0.01)
    raise AssertionError("nothing was prepared")


@pytest.fixture(scope="module")
def whole_demo(tmp_path_factory):
    """What an undisturbed preparation of `start_demo` gives, by file name."""
    out = tmp_path_factory.mktemp("whole") / "demo"
    prep("demo", "--count", 900, "--size", 32, "--out", out)
    return content(out)


def test_killed_again_and_again_and_resumed_the_bytes_are_the_same(whole_demo, tmp_path):
    out = tmp_path / "demo"
    for workers, rows in ((2, 100), (1, 300), (2, 550)):
        process = start_demo(out, "--workers", workers)
        wait_for_rows(out, rows)
        process.kill()
        process.communicate()  # ends only when the workers have gone, too
        assert process.returncode == -signal.SIGKILL and not out.exists()
    prep("demo", "--count", 900, "--size", 32, "--out", out)
    assert content(out) == whole_demo


def test_control_c_says_how_to_go_on_and_the_bytes_are_the_same(whole_demo, tmp_path):
    out = tmp_path / "demo"
    process = start_demo(out, "--workers", 2, start_new_session=True)
    wait_for_rows(out, 200)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: workers get it, too
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert errors.strip().splitlines() == ["stopped; the same command goes on from here"]
    kept = Path(f"{out}.partial", "progress.jsonl").read_bytes().count(b"\n")
    assert 200 < kept < 900 and not out.exists()
    prep("demo", "--count", 900, "--size", 32, "--out", out)
    assert content(out) == whole_demo


def test_torn_tails_are_cut_off(whole_demo, tmp_path):
    out, partial = tmp_path / "demo", tmp_path / "demo.partial"
    process = start_demo(out, "--workers", 1)
    wait_for_rows(out, 64)
    process.kill()
    process.communicate()
    for name, tail in (
        ("progress.jsonl", b'{"row": 9999, "sha'),
        ("images.npy", b"x" * 777),
        ("masks.npy", b"y"),
    ):
        with open(partial / name, "ab") as f:
            f.write(tail)
    prep("demo", "--count", 900, "--size", 32, "--out", out)
    assert content(out) == whole_demo


def test_two_workers_give_the_bytes_of_one(whole_demo, tmp_path):
    done = script("demo", "--count", 900, "--size", 32, "--workers", 2, "--out", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("demo: {") and not done.stderr  # no bar
    assert content(tmp_path / "demo") == whole_demo


def test_an_unfinished_folder_is_not_gone_on_with_by_another_plan(tmp_path, capsys):
    raw, out = raw_folder(tmp_path / "raw"), tmp_path / "out"
    args = ("folder", "--raw", raw, "--csv", "labels.csv", "--out", out)
    partial = tmp_path / "out.partial"
    options = {"command": "folder", "size": 32, "raw": str(raw), "csv": "labels.csv"}
    partial.mkdir()
    write(partial / "progress.jsonl", json.dumps(options | {"list": "0" * 64}))
    line = prep_refused(capsys, *args, "--size", 32)
    assert "list 000" in line and "--overwrite" in line
    assert "size 32, now asked: 48" in prep_refused(capsys, *args, "--size", 48)
    prep(*args, "--size", 32, "--overwrite")
    assert len(prepared(out)[0]) == 12 and not partial.exists()


def test_overwrite_removes_prepared_folders_only(tmp_path, capsys):
    raw, out = raw_folder(tmp_path / "raw"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    line = prep_refused(capsys, "folder", "--raw", raw, "--out", out, "--overwrite")
    assert "also holds ['thesis.tex']" in line and (out / "thesis.tex").exists()


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path):
    raw, out = raw_folder(tmp_path / "raw"), tmp_path / "out"
    args = ("folder", "--raw", raw, "--out", out, "--size", 64, "--workers", 1)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # noqa: E731
    done = script(*args, preexec_fn=limit)
    assert done.returncode == 2 and not out.exists()
    assert re.fullmatch("error: .*File too large\\n", done.stderr), done.stderr
    prep(*args)
    prep(*args[:4], tmp_path / "other" / "out", *args[5:])
    assert content(out) == content(tmp_path / "other" / "out")


def test_a_folder_without_the_right_to_write_is_one_line(tmp_path):
    raw_folder(tmp_path / "raw")
    (tmp_path / "closed").mkdir(mode=0o500)
    tmp_path.chmod(0o755)
    code = (  # root may do anything: it becomes somebody else once all is imported
        "import multiprocessing.synchronize, os, sys\nimport data_prep as d\n"
        "from PIL import Image\nImage.init()\n"
        "os.geteuid() or os.setuid(65534)\nsys.exit(d.main(sys.argv[1:]))"
    )
    call = [sys.executable, "-c", code, "folder", "--raw", "raw", "--size", "32", "--workers", "1"]
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    options = dict(capture_output=True, text=True, env=env, cwd=tmp_path)
    done = subprocess.run([*call, "--out", "closed/out"], **options)
    assert done.returncode == 2 and not any((tmp_path / "closed").iterdir())
    assert re.fullmatch("error: .*Permission denied.*\\n", done.stderr), done.stderr
    (tmp_path / "closed").chmod(0o777)
    assert subprocess.run([*call, "--out", "closed/out"], **options).returncode == 0
    assert len(prepared(tmp_path / "closed" / "out")[0]) == 12


def test_the_raw_folder_is_never_written_to(tmp_path, capsys):
    raw = raw_folder(tmp_path / "raw")
    before = sorted((str(p), p.stat().st_mtime_ns) for p in raw.rglob("*"))
    for out in (raw, raw / "out", raw / ".." / "raw" / "x"):
        line = prep_refused(capsys, "folder", "--raw", raw, "--out", out)
        assert "--raw is never written to" in line or "incomplete" in line
    prep("folder", "--raw", raw, "--out", tmp_path / "out")
    assert sorted((str(p), p.stat().st_mtime_ns) for p in raw.rglob("*")) == before


def test_damaged_images_are_named_and_the_good_ones_kept(tmp_path):
    raw = raw_folder(tmp_path / "raw")
    whole = (raw / "images" / "i001.png").read_bytes()
    (raw / "images" / "i001.png").write_bytes(whole[: len(whole) // 2])
    (raw / "images" / "i002.png").write_bytes(b"")
    (raw / "images" / "i003.png").write_bytes(b"<html>not found</html>")
    save(np.zeros((1, 1), np.uint8), raw / "images" / "i004.png")
    os.remove(raw / "images" / "i005.png")
    prep("folder", "--raw", raw, "--csv", "labels.csv", "--out", tmp_path / "out", "--size", 48)
    images, labels, rejected, meta = prepared(tmp_path / "out")
    good = [0, *range(6, 12)]
    assert labels["image"].tolist() == [f"i{k:03d}.png" for k in good]
    assert labels["F"].tolist() == [k % 2 for k in good]
    assert all(np.array_equal(images[n], phantom(k, 48)) for n, k in enumerate(good))
    assert list(rejected) == [f"i{k:03d}.png" for k in range(1, 6)]
    assert "not a PNG" in rejected["i002.png"] and "not a PNG" in rejected["i003.png"]
    assert "1 x 1 pixels" in rejected["i004.png"] and rejected["i005.png"] == "file not found"
    assert sum(meta["counts"].values()) == 7
    hashes = (tmp_path / "out" / "hashes.csv").read_text().splitlines()
    assert hashes[0] == "image,sha256,height,width" and hashes[1].endswith(",48,48")
    digest = hashlib.sha256(phantom(0, 48).tobytes()).hexdigest()
    assert len(hashes) == 8 and hashes[1].split(",")[:2] == ["i000.png", digest]


def test_a_set_without_one_good_image_is_refused_and_leaves_nothing(tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.png").write_bytes(b"")
    line = prep_refused(capsys, "folder", "--raw", raw, "--out", tmp_path / "out")
    assert "none of 1 images could be read" in line and "a.png" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"]


# ---------------------------------------------------------------- 5. the datasets: folder


def test_folder_reads_every_format_and_column(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    raw = tmp_path / "mine"
    for name in ("a.png", "b.jpg", "c.JPEG"):
        save(phantom(ord(name[0])), raw / "images" / name)
    deep = phantom(0).astype(np.uint16) * 255
    save(deep, raw / "images" / "sub" / "d.png")
    save_dicom(deep, raw / "images" / "e.dcm", 16)
    save_dicom(deep, raw / "images" / "f.dicom", 16, ending=".4.90")
    mask = np.zeros((64, 64), np.uint8)
    mask[10:30, 20:50] = 255
    save(mask, raw / "masks" / "a.png")
    save(mask // 255, raw / "masks" / "b.png")
    write(
        raw / "table.csv",
        "image,patient,split,mask,Mass,Edema,note,empty",
        "a.png,1,train,a.png,1,0,hello,",
        "b.jpg,1,train,b.png,0,,there,",
        "c.JPEG,2,val,,0.0,1.0,,",
        "sub/d.png,3,test,,,1,,",
        "e.dcm,4,test,,1,1,x,",
        "images/f.dicom,5,test,gone.png,1,1,x,",
        "../table.csv,6,test,,1,1,x,",
    )
    prep("folder", "--raw", "mine", "--csv", "table.csv", "--size", 64)
    images, labels, rejected, meta = prepared("data/mine")
    assert labels["image"].tolist() == ["a.png", "b.jpg", "c.JPEG", "sub/d.png", "e.dcm"]
    assert labels["patient"].tolist() == ["1", "1", "2", "3", "4"]
    assert labels["split"].tolist() == ["train", "train", "val", "test", "test"]
    assert meta["findings"] == ["Mass", "Edema"] and meta["split_rule"] == "as given"
    text = (tmp_path / "data/mine/labels.csv").read_text().splitlines()
    assert text[2].split(",")[3:5] == ["0", ""] and text[4].split(",")[3:5] == ["", "1"]
    assert "ignored columns, not 0/1/blank: note, empty" in capsys.readouterr().out
    assert np.array_equal(images[0], phantom(ord("a"))) and np.array_equal(images[3], images[4])
    assert labels["has_mask"].tolist() == [1, 1, 0, 0, 0]
    masks = np.load("data/mine/masks.npy")
    assert all(np.array_equal(m, mask // 255) for m in masks[:2]) and not masks[2:].any()
    assert set(rejected) == {"images/f.dicom", "../table.csv"}
    assert rejected["images/f.dicom"].startswith("mask: ")
    assert meta["sources"]["table.csv"] == dp.file_digest(raw / "table.csv")


def test_folder_without_a_table_takes_every_image(tmp_path):
    raw = raw_folder(tmp_path / "raw", n=40)
    save(phantom(0), raw / "masks" / "i000.png")
    prep("folder", "--raw", raw, "--out", tmp_path / "out", "--size", 32)
    _, labels, rejected, meta = prepared(tmp_path / "out")
    assert len(labels) == 40 and meta["findings"] == [] and not rejected
    assert labels["image"][0] == "images/i000.png" and set(labels["split"]) == {*dp.SPLITS}


def test_folder_names_what_it_left_out_and_refuses_what_conflicts(tmp_path, capsys):
    raw = raw_folder(tmp_path / "raw")
    args = ("folder", "--raw", raw, "--csv", "labels.csv", "--size", 32, "--out")
    lines = (raw / "labels.csv").read_text().splitlines()
    # A byte-order mark, a row twice, a missing row, names that leave the folder or have no file.
    escape = ["../secret.png,p9,1", "/etc/passwd,p9,1", "images/../../raw/i001.png,p9,1"]
    write(raw / "labels.csv", "\ufeff" + lines[0], *lines[1:-1], lines[1], *escape)
    save(phantom(0), tmp_path / "secret.png")
    prep(*args, tmp_path / "out")
    _, labels, rejected, _ = prepared(tmp_path / "out")
    assert labels["image"].tolist() == [f"i{k:03d}.png" for k in range(11)]
    reasons = dict.fromkeys((row.split(",")[0] for row in escape), "file not found")
    assert rejected == {"images/i011.png": "no row in the table"} | reasons
    write(raw / "labels.csv", *lines, "i000.png,p0,1")  # the same image with another label
    assert "i000.png" in prep_refused(capsys, *args, tmp_path / "two")
    write(raw / "labels.csv", "image,patient,split", "i000.png,1,train", "i001.png,1,test")
    assert "'1'" in prep_refused(capsys, *args, tmp_path / "two")
    write(raw / "labels.csv", "picture,F", "i000.png,1")
    assert "expected the columns ['image']" in prep_refused(capsys, *args, tmp_path / "two")
    assert not (tmp_path / "two").exists() and not (tmp_path / "two.partial").exists()


# ---------------------------------------------------------------- 5. the datasets: NIH

NIH_ROWS = (  # image, labels, list
    ("00000001_000.png", "Cardiomegaly|Emphysema", "train"),
    ("00000001_001.png", "No Finding", "train"),
    ("00000002_000.png", "Hernia", "train"),
    ("00000003_000.png", "Pleural_Thickening|Infiltration", "test"),
    ("00000003_001.png", "No Finding", "test"),
    ("00030805_000.png", "Mass", "train"),
)
OLD_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)


def raw_nih(root, archives=False, edition="2020", rows=NIH_ROWS, boxes=True, size=96):
    """NIH's files in either layout and edition; official lists without a final newline."""
    tail, header = ("", OLD_HEADER[:-1]) if edition == "2020" else (",", OLD_HEADER)
    lines = []
    for k, (name, labels, _) in enumerate(rows):
        patient, age = int(name[:8]), "058Y" if k % 2 else "58"
        spacing = "0.14300000000000002,0.14300000000000002" if edition == "2020" else "0.143,0.143"
        lines.append(f"{name},{labels},{k},{patient},{age},M,PA,2682,2749,{spacing}")
    name = "Data_Entry_2017_v2020.csv" if edition == "2020" else "Data_Entry_2017.csv"
    write(root / name, header, *lines)
    for split, file in (("train", "train_val_list.txt"), ("test", "test_list.txt")):
        (root / file).write_text("\n".join(name for name, _, s in rows if s == split))
    if boxes:
        write(
            root / "BBox_List_2017.csv",
            "Image Index,Finding Label,Bbox [x,y,w,h],,,",
            f"{rows[0][0]},Cardiomegaly,{size / 4},{size / 8},{size / 2},{size / 4},,,"[:-3],
            f"{rows[3][0]},Infiltrate,0,0,{size},{size},,,"[:-3],
        )
    for k, (name, *_) in enumerate(rows):
        folder = root / f"images_{k % 12 + 1:03d}"
        save(phantom(k, size), folder / "images" / name)
        if archives:
            with tarfile.open(f"{folder}.tar.gz", "w:gz") as tar:
                tar.add(folder / "images", "images")
            shutil.rmtree(folder)
    return root


def check_nih(folder, size=48):
    """A prepared `raw_nih` holds every picture, label, patient, split and box."""
    images, labels, rejected, meta = prepared(folder)
    assert labels["image"].tolist() == [name for name, *_ in NIH_ROWS] and not rejected
    assert labels["patient"].tolist() == ["1", "1", "2", "3", "3", "30805"]
    assert meta["findings"] == dp.NIH_FINDINGS
    for k, (_, found, split) in enumerate(NIH_ROWS):
        assert np.array_equal(images[k], dp.resize_xray(phantom(k, 96), size))
        shown = [f for f in dp.NIH_FINDINGS if labels[f][k] == 1]
        assert sorted(shown) == sorted(set(found.split("|")) - {"No Finding"})
        expected = split
        if split == "train":
            expected = dp.hash_split(labels["patient"][k], dp.CARVED)
        assert labels["split"][k] == expected
    boxes = pd.read_csv(Path(folder) / "boxes.csv")
    assert list(boxes.itertuples(index=False, name=None)) == [
        (NIH_ROWS[0][0], "Cardiomegaly", 12, 6, 24, 12),
        (NIH_ROWS[3][0], "Infiltration", 0, 0, 48, 48),
    ]


@pytest.mark.parametrize("edition", ["2017", "2020"])
@pytest.mark.parametrize("archives", [False, True])
def test_nih_in_both_layouts_and_both_editions(archives, edition, tmp_path):
    raw = raw_nih(tmp_path / "raw", archives, edition)
    before = sorted(raw.rglob("*"))
    prep("nih", "--raw", raw, "--out", tmp_path / "out", "--size", 48)
    check_nih(tmp_path / "out")
    assert sorted(raw.rglob("*")) == before  # nothing was unpacked


def test_both_layouts_of_nih_give_the_same_bytes(tmp_path):
    for kind in (False, True):
        raw = raw_nih(tmp_path / str(kind) / "raw", kind)
        prep("nih", "--raw", raw, "--out", tmp_path / str(kind) / "out", "--size", 32)
    one, two = (content(tmp_path / str(kind) / "out") for kind in (False, True))
    for name in ("images.npy", "labels.csv", "boxes.csv", "hashes.csv"):
        assert one[name] == two[name]


@pytest.mark.parametrize("archives", [False, True])
def test_missing_images_are_an_error_unless_they_are_allowed(archives, tmp_path, capsys):
    raw = raw_nih(tmp_path / "raw", archives)
    gone = raw / ("images_002.tar.gz" if archives else "images_002")
    os.remove(gone) if archives else shutil.rmtree(gone)
    line = prep_refused(capsys, "nih", "--raw", raw, "--out", tmp_path / "out", "--size", 32)
    assert "1 of 6 images have no file, first 00000001_001.png" in line
    assert "--allow-missing" in line and not (tmp_path / "out").exists()
    prep("nih", "--raw", raw, "--out", tmp_path / "out", "--size", 32, "--allow-missing")
    _, labels, rejected, _ = prepared(tmp_path / "out")
    assert rejected == {"00000001_001.png": "file not found"} and len(labels) == 5


def test_validation_of_nih_is_carved_from_train_val_by_patient(tmp_path):
    names = [f"{p:08d}_{k:03d}.png" for p in range(1, 301) for k in range(1 + p % 3)]
    rows = [(n, "Edema", "test" if int(n[:8]) > 240 else "train") for n in names]
    raw = raw_nih(tmp_path / "raw", rows=rows[:6], boxes=False)
    for split, file in (("train", "train_val_list.txt"), ("test", "test_list.txt")):
        (raw / file).write_text("\n".join(name for name, _, s in rows if s == split))
    lines = [f"{n},Edema,0,{int(n[:8])},58,M,PA,1,1,1,1" for n in names]
    write(raw / "Data_Entry_2017_v2020.csv", OLD_HEADER[:-1], *lines)
    table = dp.list_nih(raw, allow_missing=True).table
    assert (table["split"] == "test").tolist() == [int(n[:8]) > 240 for n in names]
    assert table.groupby("patient")["split"].nunique().max() == 1
    assert 0.04 < (table["split"] == "val").sum() / (table["split"] != "test").sum() < 0.17


def test_fault6_an_image_in_both_official_lists_is_refused(tmp_path, capsys):
    raw = raw_nih(tmp_path / "raw")
    test = (raw / "test_list.txt").read_text()
    (raw / "test_list.txt").write_text(test + "\n" + NIH_ROWS[2][0])
    line = prep_refused(capsys, "nih", "--raw", raw, "--out", tmp_path / "out")
    assert "['00000002_000.png'] is in both" in line and "test_list.txt" in line
    # Another image of a patient of the test list is refused, too.
    (raw / "test_list.txt").write_text(test)
    train = (raw / "train_val_list.txt").read_text().replace("00000001_001.png", "00000003_001.png")
    (raw / "train_val_list.txt").write_text(train)
    (raw / "test_list.txt").write_text("00000003_000.png\n00000001_001.png")
    assert "two splits" in prep_refused(capsys, "nih", "--raw", raw, "--out", tmp_path / "out")


def test_fault6_no_prepared_image_is_in_validation_and_test_or_train(tmp_path):
    raw = raw_nih(tmp_path / "raw")
    prep("nih", "--raw", raw, "--out", tmp_path / "out", "--size", 32)
    hashes = pd.read_csv(tmp_path / "out" / "hashes.csv")
    labels = pd.read_csv(tmp_path / "out" / "labels.csv").merge(hashes, on="image")
    for key in ("image", "patient", "sha256"):
        assert labels.groupby(key)["split"].nunique().max() == 1


def test_fault7_splits_are_drawn_over_patients_not_images(tmp_path):
    raw = raw_folder(tmp_path / "raw", n=80, size=32)
    prep("folder", "--raw", raw, "--csv", "labels.csv", "--out", tmp_path / "out", "--size", 32)
    labels = prepared(tmp_path / "out")[1]
    assert labels.groupby("patient")["split"].nunique().max() == 1
    assert labels["patient"].nunique() == 40 and labels["split"].nunique() == 3
    by_image = [dp.hash_split(image) for image in labels["image"]]  # the fault, for comparison
    assert labels.assign(split=by_image).groupby("patient")["split"].nunique().max() > 1


def test_fault7_every_finding_stands_over_its_own_column(tmp_path):
    """One image a finding, in an order that is not that of the columns."""
    names = sorted(dp.NIH_FINDINGS)
    rows = [(f"{k + 1:08d}_000.png", name, "train") for k, name in enumerate(names)]
    raw = raw_nih(tmp_path / "raw", rows=rows, boxes=False, size=32)
    prep("nih", "--raw", raw, "--out", tmp_path / "out", "--size", 32)
    _, labels, _, meta = prepared(tmp_path / "out")
    columns = list(labels.columns)
    assert columns[columns.index("split") + 1 :] == meta["findings"] == dp.NIH_FINDINGS
    for k, name in enumerate(names):
        assert [f for f in dp.NIH_FINDINGS if labels[f][k]] == [name]


def test_members_of_an_archive_that_are_no_listed_file_are_named_and_left(tmp_path):
    raw = raw_nih(tmp_path / "raw", archives=True)
    picture = (save(phantom(50, 96), tmp_path / "p.png")).read_bytes()
    odd = {}
    with tarfile.open(raw / "images_001.tar.gz", "w:gz") as tar:

        def add(name, kind=tarfile.REGTYPE, link=""):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            info.size = len(picture) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(picture) if info.size else None)
            odd[name] = "images_001.tar.gz: not a file of the list, or there twice"

        add("../escape.png")
        add(str(tmp_path / "absolute.png"))
        add("images/../../up.png")
        add("images/soft.png", tarfile.SYMTYPE, "/etc/passwd")
        add(f"images/{NIH_ROWS[1][0]}", tarfile.LNKTYPE, "/etc/passwd")
        add("images/device.png", tarfile.CHRTYPE)
        add("images/pipe.png", tarfile.FIFOTYPE)
        add("images/extra.png")
        add("images", tarfile.DIRTYPE)
        add(f"images/{NIH_ROWS[0][0]}")
        del odd["images"], odd[f"images/{NIH_ROWS[0][0]}"]
        add(f"images/{NIH_ROWS[0][0]}")
    prep("nih", "--raw", raw, "--out", tmp_path / "out", "--size", 48)
    images, labels, rejected, _ = prepared(tmp_path / "out")
    assert rejected == odd
    assert labels["image"].tolist() == [name for name, *_ in NIH_ROWS]
    assert np.array_equal(images[0], dp.resize_xray(phantom(50, 96), 48))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "p.png", "raw"]


def test_a_truncated_archive_is_refused_and_complete_it_goes_on(tmp_path, capsys):
    raw = raw_nih(tmp_path / "raw", archives=True)
    archive = raw / "images_004.tar.gz"
    whole = archive.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"<html>404</html>"):
        archive.write_bytes(data)
        line = prep_refused(capsys, "nih", "--raw", raw, "--out", tmp_path / "out", "--size", 48)
        assert "images_004.tar.gz: missing, damaged" in line and not (tmp_path / "out").exists()
    archive.write_bytes(whole)
    prep("nih", "--raw", raw, "--out", tmp_path / "out", "--size", 48)
    check_nih(tmp_path / "out")


@pytest.mark.parametrize(
    "row,message",
    [
        ("00000009_000.png,Tumour,0,9,58,M,PA,1,1,1,1", "Tumour"),
        ("00000009_000.png,No Finding|Mass,0,9,58,M,PA,1,1,1,1", "No Finding"),
        ("00000009_000.png,,0,9,58,M,PA,1,1,1,1", "00000009_000.png"),
        ("../../etc/pw.png,Mass,0,9,58,M,PA,1,1,1,1", "../../etc/pw.png"),
        ("00000009_000.png,Mass,0,8,58,M,PA,1,1,1,1", "patient '8'"),
        ("00000002_000.png,Mass,0,2,58,M,PA,1,1,1,1", "conflicting rows"),
    ],
)
def test_a_row_of_nih_that_has_no_sense_is_refused_by_name(row, message, tmp_path, capsys):
    raw = raw_nih(tmp_path / "raw")
    with open(raw / "Data_Entry_2017_v2020.csv", "a") as f:
        f.write(row + "\n")
    (raw / "train_val_list.txt").write_text(
        (raw / "train_val_list.txt").read_text() + "\n00000009_000.png"
    )
    line = prep_refused(capsys, "nih", "--raw", raw, "--out", tmp_path / "out")
    assert message in line and not (tmp_path / "out").exists()


def test_nih_keeps_going_over_harmless_rows_and_names_unlisted_images(tmp_path):
    raw = raw_nih(tmp_path / "raw")
    path = raw / "Data_Entry_2017_v2020.csv"
    lines = path.read_text().splitlines()
    extra = "00000009_000.png,Mass,0,9,58,M,PA,1,1,1,1"
    write(path, "\ufeff" + lines[0], *lines[1:], lines[2], extra)  # a mark, a row twice
    prep("nih", "--raw", raw, "--out", tmp_path / "out", "--size", 32)
    _, labels, rejected, _ = prepared(tmp_path / "out")
    assert labels["image"].tolist() == [name for name, *_ in NIH_ROWS]
    assert rejected == {"00000009_000.png": "in neither official list"}


def test_a_missing_list_is_named(tmp_path, capsys):
    raw = raw_nih(tmp_path / "raw")
    for name in ("test_list.txt", "Data_Entry_2017_v2020.csv"):
        os.remove(raw / name)
        assert name in prep_refused(capsys, "nih", "--raw", raw, "--out", tmp_path / "out")
    line = prep_refused(capsys, "nih", "--raw", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert "nowhere" in line
    assert "--raw" in prep_refused(capsys, "nih", "--out", tmp_path / "out")


# ---------------------------------------------------------------- 5. the datasets: ChestMNIST


def raw_chestmnist(path, size=28, counts=(20, 6, 8), compress=True, seed=0):
    """An .npz with the arrays, dtypes and label order of the published one; its arrays."""
    rng, arrays = np.random.default_rng(seed), {}
    for split, n in zip(dp.SPLITS, counts, strict=True):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, size, size), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 2, (n, 14), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    (np.savez_compressed if compress else np.savez)(path, **arrays)
    return arrays


@pytest.mark.parametrize("size", [28, 64, 128, 224])
def test_chestmnist_keeps_pictures_labels_and_splits(size, tmp_path):
    arrays = raw_chestmnist(tmp_path / "raw.npz", size)
    prep("chestmnist", "--raw", tmp_path / "raw.npz", "--out", tmp_path / "out")
    images, labels, rejected, meta = prepared(tmp_path / "out")
    assert meta["size"] == size and not rejected and "ChestMNIST" in meta["split_rule"]
    assert np.array_equal(images, np.concatenate([arrays[f"{s}_images"] for s in dp.SPLITS]))
    assert labels["split"].tolist() == ["train"] * 20 + ["val"] * 6 + ["test"] * 8
    order = (
        "Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax "
        "Consolidation Edema Emphysema Fibrosis Pleural_Thickening Hernia"
    ).split()
    expected = np.concatenate([arrays[f"{s}_labels"] for s in dp.SPLITS])
    assert np.array_equal(labels[order], expected)
    prep("chestmnist", "--raw", tmp_path / "raw.npz", "--out", tmp_path / "small", "--size", 32)
    assert prepared(tmp_path / "small")[0].shape == (34, 32, 32)


def test_chestmnist_files_that_are_none_are_refused(tmp_path, capsys):
    raw = tmp_path / "raw.npz"
    args = ("chestmnist", "--raw", raw, "--out", tmp_path / "out")
    arrays = raw_chestmnist(raw)
    whole = raw.read_bytes()
    for data in (b"", whole[: len(whole) // 2], b"<html>404</html>"):
        raw.write_bytes(data)
        assert "raw.npz" in prep_refused(capsys, *args)
    for change in (
        {"val_labels": arrays["val_labels"][:, :3]},
        {"train_images": arrays["train_images"][:, :4, :4]},
        {"train_images": arrays["train_images"].astype(object)},
        {"train_images": arrays["train_images"].astype(np.float32)},
        {"train_images": arrays["train_images"][:5]},
        {"train_labels": arrays["train_labels"] + 1},
    ):
        np.savez(raw, **arrays | change)
        assert "raw.npz" in prep_refused(capsys, *args), change
    np.savez(raw, **{k: v for k, v in arrays.items() if k != "test_images"})
    assert "raw.npz" in prep_refused(capsys, *args)
    assert "raw.npz" in prep_refused(capsys, *args[:2], tmp_path / "no" / "raw.npz", *args[3:])
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- 5. the datasets: RSNA and SIIM


def raw_rsna(root, n=30, size=64):
    """RSNA's files: every third image positive, one with two boxes; both CSVs repeat rows."""
    rows, classes = [], []
    for k in range(n):
        save_dicom(phantom(k, size), root / "stage_2_train_images" / f"id-{k:03d}.dcm")
        rows += [f"id-{k:03d},4.0,8.0,16.0,32.0,1"] if k % 3 == 0 else [f"id-{k:03d},,,,,0"]
        classes += [f"id-{k:03d},{'Lung Opacity' if k % 3 == 0 else 'Normal'}"] * (1 + k % 2)
    rows.insert(1, "id-000,40.0,8.0,16.0,16.0,1")
    write(root / "stage_2_train_labels.csv", "patientId,x,y,width,height,Target", *rows)
    write(root / "stage_2_detailed_class_info.csv", "patientId,class", *classes)
    save_dicom(phantom(0), root / "stage_2_test_images" / "id-900.dcm")  # without public labels
    return root


def test_rsna_is_one_row_an_image_with_its_boxes_and_its_own_split(tmp_path):
    raw = raw_rsna(tmp_path / "raw")
    path = raw / "stage_2_train_labels.csv"
    path.write_text(path.read_text() + "id-003,4.0,8.0,16.0,32.0,1\nid-001,,,,,0\n")  # again
    prep("rsna", "--raw", raw, "--out", tmp_path / "out", "--size", 32)
    images, labels, rejected, meta = prepared(tmp_path / "out")
    assert labels["image"].tolist() == [f"id-{k:03d}" for k in range(30)] and not rejected
    assert labels["Pneumonia"].tolist() == [int(k % 3 == 0) for k in range(30)]
    assert labels["split"].tolist() == [dp.hash_split(i, dp.BY_IMAGE) for i in labels["image"]]
    assert meta["findings"] == ["Pneumonia"] and str(dp.BY_IMAGE) in meta["split_rule"]
    assert all(np.array_equal(images[k], dp.resize_xray(phantom(k), 32)) for k in (0, 29))
    boxes = pd.read_csv(tmp_path / "out" / "boxes.csv")
    expected = [(f"id-{k:03d}", "Pneumonia", 2, 4, 8, 16) for k in range(0, 30, 3)]
    expected.insert(1, ("id-000", "Pneumonia", 20, 4, 8, 8))
    assert list(boxes.itertuples(index=False, name=None)) == expected


def test_rows_of_rsna_without_sense_are_refused_and_missing_images_counted(tmp_path, capsys):
    raw = raw_rsna(tmp_path / "raw", n=6, size=32)
    path, args = raw / "stage_2_train_labels.csv", ("rsna", "--raw", raw, "--size", 32, "--out")
    sound = path.read_text()
    for row, message in (
        ("id-001,1,2,3,4,0", "Target"),
        ("id-001,1,2,3,,1", "Target"),
        ("id-001,,,,,1", "Target"),
        ("id-001,1,2,3,4,1", "conflicting"),
        ("id-001,a,2,3,4,1", "could not convert"),
        ("id-001,1,2,3,4,2", "Target"),
        (",,,,,0", "blank"),
    ):
        path.write_text(sound + row + "\n")
        assert message in prep_refused(capsys, *args, tmp_path / "out"), row
    path.write_text("\ufeff" + sound + "../id-001,,,,,0\n")
    assert "first ../id-001" in prep_refused(capsys, *args, tmp_path / "out")
    save_dicom(phantom(9), raw / "stage_2_train_images" / "stray.dcm")
    prep(*args, tmp_path / "out", "--allow-missing")
    _, labels, rejected, _ = prepared(tmp_path / "out")
    assert len(labels) == 6
    assert rejected == {"stray": "no row in the table", "../id-001": "file not found"}


def blobs(k, size=64):
    """Two overlapping rectangles of their own for every k."""
    one, two = np.zeros((2, size, size), bool)
    one[5 + k : 30, 10:20] = True
    two[20:50, 15 : 25 + k] = True
    return one, two


def raw_siim(root, nested=True, name="train-rle.csv", n=6):
    """SIIM's files: image 0 without a region, 1 of two rows that overlap, the others of one row."""
    rows = ["ImageId, EncodedPixels"]
    for k in range(n + 1):
        folder = root / "dicom-images-train" if nested else root / "stage_2_images"
        folder = folder / f"1.2.{k}" / f"1.2.{k}.1" if nested else folder
        save_dicom(phantom(k), folder / f"1.2.{k}.1.1.dcm", ending=".4.50")
        one, two = blobs(k)
        texts = {0: ["-1"], 1: [rle_encode(one), rle_encode(two)], n: []}.get(k, [rle_encode(one)])
        rows += [f"1.2.{k}.1.1, {text}" for text in texts]
    write(root / name, *rows)
    return root


@pytest.mark.parametrize("name", ["train-rle.csv", "stage_2_train.csv"])
@pytest.mark.parametrize("nested", [True, False])
def test_siim_in_both_layouts_and_under_both_names(nested, name, tmp_path):
    raw = raw_siim(tmp_path / "raw", nested, name)
    prep("siim", "--raw", raw, "--out", tmp_path / "out", "--size", 64)
    images, labels, rejected, meta = prepared(tmp_path / "out")
    masks = np.load(tmp_path / "out" / "masks.npy")
    assert labels["image"].tolist() == [f"1.2.{k}.1.1" for k in range(6)]
    assert labels["Pneumothorax"].tolist() == [0, 1, 1, 1, 1, 1]
    assert labels["has_mask"].tolist() == [1] * 6  # a blank mask is a mask
    assert rejected == {"1.2.6.1.1": "no row in the table"}
    assert labels["split"].tolist() == [dp.hash_split(i, dp.BY_IMAGE) for i in labels["image"]]
    expected = [blobs(k)[0] for k in range(6)]
    expected[0], expected[1] = np.zeros((64, 64)), np.logical_or(*blobs(1))
    assert np.array_equal(masks, np.array(expected, np.uint8))
    assert np.logical_and(*blobs(1)).any()  # the rows do overlap: a sum would be another mask
    assert all(np.abs(images[k].astype(int) - phantom(k)).mean() < 2 for k in range(6))
    assert meta["findings"] == ["Pneumothorax"]


def test_siim_rows_without_sense_are_named(tmp_path, capsys):
    raw = raw_siim(tmp_path / "raw")
    path, args = raw / "train-rle.csv", ("siim", "--raw", raw, "--size", 64, "--out")
    lines = path.read_text().splitlines()
    for row in ("1.2.0.1.1, 1 5", "1.2.2.1.1,-1", "1.2.3.1.1,"):
        write(path, *lines, row)
        line = prep_refused(capsys, *args, tmp_path / "out")
        assert row[:9] in line and "has a blank, or both -1 and a region" in line
    # A region that leaves its picture costs that image alone; a row twice costs nothing.
    write(path, "\ufeff" + lines[0], *lines[1:], lines[-1], "1.2.6.1.1,4090 7")
    prep(*args, tmp_path / "out")
    _, labels, rejected, _ = prepared(tmp_path / "out")
    assert len(labels) == 6 and list(rejected) == ["1.2.6.1.1"]
    assert re.match("mask: RLE run of 7 .* leaves 64 x 64", rejected["1.2.6.1.1"])


def test_a_mask_is_shrunk_by_half_coverage(tmp_path):
    from functools import partial

    mask = np.zeros((64, 64), bool)
    mask[16:48, 8:24] = True
    work = partial(dp.prepare_picture, size=32)
    note, _, small = work((0, phantom(0), (rle_encode(mask),)))
    assert "reason" not in note
    assert np.array_equal(np.frombuffer(small, np.uint8).reshape(32, 32), mask[::2, ::2])


# ---------------------------------------------------------------- 5. the datasets: VinBig

VINBIG_VOTES = {  # image -> finding of each of three readers
    "none": ("No finding", "No finding", "No finding"),
    "one": ("Cardiomegaly", "No finding", "No finding"),
    "two": ("Cardiomegaly", "Cardiomegaly", "No finding"),
    "mixed": ("ILD", "Nodule/Mass", "ILD"),
    "all": ("Pleural effusion", "Pleural effusion", "Pleural effusion"),
}
DEPTHS = (  # bits, MONOCHROME, ending of the transfer syntax: one an image
    (16, 2, ".1"),
    (12, 1, ".4.90"),
    (14, 2, ".4.90"),
    (12, 1, ""),
    (16, 1, ".4.70"),
)


def raw_vinbig(root):
    """Kaggle's files: three readers an image, mixed depths, compressions and polarities."""
    rows = ["image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max"]
    for k, (name, votes) in enumerate(VINBIG_VOTES.items()):
        bits, monochrome, ending = DEPTHS[k]
        pixels = phantom(k).astype(np.uint16) << (bits - 8)
        pixels = 2**bits - 1 - pixels if monochrome == 1 else pixels
        save_dicom(
            pixels.astype(np.uint16),
            root / "train" / f"{name}.dicom",
            bits,
            ending,
            f"MONOCHROME{monochrome}",
        )
        for reader, finding in enumerate(votes):
            number = [*dp.VINBIG_FINDINGS, "No finding"].index(finding)
            box = ",,," if number == 14 else f"{8 + reader},16,40,48"
            rows.append(f"{name},{finding},{number},R{reader + k},{box}")
    rows.append(rows[-1].replace("40,48", "60,60"))  # one reader, a second box of the finding
    write(root / "train.csv", *rows)
    save_dicom(phantom(9), root / "test" / "hidden.dicom")
    return root


@pytest.mark.parametrize("readers", ["any", "majority"])
def test_vinbig_of_kaggle_by_any_reader_or_the_majority(readers, tmp_path):
    raw = raw_vinbig(tmp_path / "raw")
    flags = ["--readers", "any"] if readers == "any" else []  # majority is the default
    prep("vinbig", "--raw", raw, "--out", tmp_path / "out", "--size", 64, *flags)
    images, labels, rejected, meta = prepared(tmp_path / "out")
    assert labels["image"].tolist() == list(VINBIG_VOTES) and not rejected
    assert meta["findings"] == dp.VINBIG_FINDINGS and readers in meta["split_rule"]
    need = 1 if readers == "any" else 2
    for k, (name, votes) in enumerate(VINBIG_VOTES.items()):
        for finding in dp.VINBIG_FINDINGS:
            assert labels[finding][k] == int(votes.count(finding) >= need), (name, finding)
        picture = phantom(k).astype(float)
        low, high = picture.min(), picture.max()
        expected = (picture - low) * 255 / (high - low)
        assert np.abs(images[k] - expected).max() <= 1, name  # whatever depth and polarity
    boxes = pd.read_csv(tmp_path / "out" / "boxes.csv")
    found = boxes.groupby("image")["finding"].agg(list).to_dict()
    expected = {"two": ["Cardiomegaly"] * 2, "mixed": ["ILD"] * 2, "all": ["Pleural effusion"] * 4}
    if readers == "any":
        expected |= {"one": ["Cardiomegaly"], "mixed": ["ILD", "Nodule/Mass", "ILD"]}
    assert found == expected
    row = boxes[boxes["image"] == "two"].iloc[1]
    assert row[dp.EDGES].tolist() == [9, 16, 31, 32]


def raw_physionet(root):
    """PhysioNet's files: a column a finding, three readers in train and a consensus in test."""
    findings = [*dp.VINBIG_FINDINGS[:9], "Other lesion", "COPD", "Pneumonia"]
    for split, other, readers in (("train", "Other diseases", 3), ("test", "Other disease", 1)):
        labels = [
            ",".join(["image_id", *["rad_id"] * (readers > 1), *findings, other, "No finding"])
        ]
        boxes = ["image_id,rad_id,class_name,x_min,y_min,x_max,y_max"]
        for k in range(8):
            name = f"{split}{k}"
            save_dicom(phantom(k), root / split / f"{name}.dicom", ending=".4.90")
            for reader in range(readers):
                # COPD by every reader of odd images, Pneumonia by one reader of image 2,
                # the other disease by two of image 4.
                votes = dict.fromkeys(findings, 0) | {"COPD": k % 2}
                votes["Pneumonia"] = int(k == 2 and reader == 0)
                votes[other] = int(k == 4 and reader < 2)
                votes["No finding"] = int(not any(votes.values()))
                who = [f"R{reader}"] * (readers > 1)
                labels.append(",".join([name, *who, *map(str, votes.values())]))
                for finding in [f for f, v in votes.items() if v]:
                    box = ",,," if finding == "No finding" else "8,8,24,40"
                    boxes.append(f"{name},R{reader},{finding},{box}")
        write(root / "annotations" / f"image_labels_{split}.csv", *labels)
        write(root / "annotations" / f"annotations_{split}.csv", *boxes)
    return root


@pytest.mark.parametrize("readers", ["any", "majority"])
def test_vindr_of_physionet_has_image_labels_and_the_official_test_set(readers, tmp_path):
    raw = raw_physionet(tmp_path / "raw")
    args = ("vinbig", "--raw", raw, "--size", 32, "--readers", readers)
    prep(*args, "--out", tmp_path / "out")
    _, labels, rejected, meta = prepared(tmp_path / "out")
    names = [f"{split}{k}" for split in ("train", "test") for k in range(8)]
    assert labels["image"].tolist() == names and not rejected
    assert (labels["split"] == "test").tolist() == [False] * 8 + [True] * 8
    assert set(labels["split"][:8]) <= {"train", "val"}
    assert "Other diseases" in meta["findings"] and "Other disease" not in meta["findings"]
    assert not {"No finding", "rad_id", "image_id"} & set(meta["findings"])
    assert labels["COPD"].tolist() == [k % 2 for k in range(8)] * 2
    pneumonia = [int(readers == "any" and k == 2) for k in range(8)]
    assert labels["Pneumonia"].tolist() == pneumonia + [int(k == 2) for k in range(8)]
    assert labels["Other diseases"].tolist() == [int(k == 4) for k in range(8)] * 2
    boxes = pd.read_csv(tmp_path / "out" / "boxes.csv")
    assert boxes[boxes["finding"] == "Other diseases"]["image"].tolist() == ["train4"] * 2 + [
        "test4"
    ]
    assert boxes[dp.EDGES].drop_duplicates().values.tolist() == [[4, 4, 8, 16]]
    assert len(meta["sources"]) == 4


def test_vinbig_rows_without_sense_are_refused(tmp_path, capsys):
    raw = raw_vinbig(tmp_path / "raw")
    path, args = raw / "train.csv", ("vinbig", "--raw", raw, "--out", tmp_path / "out")
    sound = path.read_text()
    for row, message in (
        ("none,Tumour,3,R1,1,2,3,4", "unknown classes {'Tumour'}"),
        ("none,ILD,3,R1,1,2,x,4", "could not convert"),
        ("../none,ILD,3,R1,1,2,3,4", "first ../none"),
        (",ILD,3,R1,1,2,3,4", "blank"),
    ):
        path.write_text(sound + row + "\n")
        assert message in prep_refused(capsys, *args), row
    os.remove(path)
    assert "annotations_train.csv" in prep_refused(capsys, *args)
    raw = raw_physionet(tmp_path / "physionet")
    labels = raw / "annotations" / "image_labels_test.csv"
    labels.write_text(labels.read_text().replace("test3,0", "test3,2"))
    line = prep_refused(capsys, "vinbig", "--raw", raw, "--out", tmp_path / "out")
    assert "expected 0 or 1 in every finding" in line


# ---------------------------------------------------------------- 5. the datasets: fuzz


def damaged(text, rng):
    """The text with one to three characters changed, inserted or removed."""
    for _ in range(rng.integers(1, 4)):
        at = rng.integers(len(text))
        new = rng.choice(list('0123456789,|. -"abR\n\r;/_')) if rng.random() < 0.8 else ""
        text = text[:at] + new + text[at + rng.integers(2) :]
    return text


def rows_of(text, *columns):
    """The named columns of a CSV as stripped strings, by the standard library."""
    header, *rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    places = [[name.strip() for name in header].index(column) for column in columns]
    rows = [row + [""] * len(header) for row in rows]
    return [tuple(row[place].strip() for place in places) for row in rows]


def nih_by_hand(text, listing):
    """Whether a listing of NIH says what the rows say."""
    expected = {}
    for name, found, patient in rows_of(text, "Image Index", "Finding Labels", "Patient ID"):
        expected[name] = (patient.lstrip("0"), set(found.split("|")) - {"No Finding"})
    listed = {
        row["image"]: (row["patient"], {f for f in dp.NIH_FINDINGS if row[f]})
        for row in listing.table.to_dict("records")
    }
    lost = {name for name, reason in listing.rejected if reason != "file not found"}
    return listed == {k: v for k, v in expected.items() if k not in lost}


def rsna_by_hand(text, listing):
    """Whether a listing of RSNA says what the rows say."""
    rows = rows_of(text, "patientId", "x", "y", "width", "height", "Target")
    boxes = [(name, *map(float, edges)) for name, *edges, t in dict.fromkeys(rows) if t == "1"]
    listed = listing.boxes.drop(columns="finding").itertuples(index=False, name=None)
    labels = {name: int(target) for name, *_, target in rows}
    return dict(listing.table[["image", "Pneumonia"]].values.tolist()) == labels and (
        sorted(listed) == sorted(set(boxes))
    )


def vinbig_by_hand(text, listing):
    """Whether a listing of VinBig says what the rows say."""
    readers, votes = {}, {}
    for name, finding, reader in rows_of(text, "image_id", "class_name", "rad_id"):
        readers.setdefault(name, set()).add(reader)
        votes.setdefault((name, finding), set()).add(reader)
    return all(
        row[f] == int(2 * len(votes.get((row["image"], f), ())) > len(readers[row["image"]]))
        for row in listing.table.to_dict("records")
        for f in dp.VINBIG_FINDINGS
    ) and set(listing.table["image"]) == set(readers)


@pytest.mark.parametrize(
    "make,name,importer,right",
    [
        (raw_nih, "Data_Entry_2017_v2020.csv", dp.list_nih, nih_by_hand),
        (raw_rsna, "stage_2_train_labels.csv", dp.list_rsna, rsna_by_hand),
        (raw_vinbig, "train.csv", dp.list_vinbig, vinbig_by_hand),
    ],
)
def test_a_thousand_damaged_tables_are_read_right_or_refused(make, name, importer, right, tmp_path):
    raw = make(tmp_path / "raw")
    for path in [*raw.rglob("*.png"), *raw.rglob("*.dcm"), *raw.rglob("*.dicom")]:
        os.remove(path)
    text, rng, read = (raw / name).read_text(), np.random.default_rng(0), 0
    text = "\n".join(text.splitlines()[:9]) + "\n"
    write(raw / name, text)
    assert right(text, importer(raw, allow_missing=True))
    for case in range(1000):
        bad = damaged(text, rng)
        (raw / name).write_bytes(bad.encode())
        try:
            listing = importer(raw, allow_missing=True)
        except dp.PrepError as e:
            assert name in str(e) or re.search("image|patient|split", str(e)), case
            continue
        read += 1
        assert right(bad, listing), bad
    assert 50 < read < 950


# ---------------------------------------------------------------- 6. downloads


@pytest.fixture()
def server(monkeypatch):
    """A local server of `files`: name -> bytes; `faults` are used up, one a request."""

    class Handler(BaseHTTPRequestHandler):
        files, faults, asked = {}, [], []

        def do_GET(self):
            name, start = self.path.lstrip("/").partition("?")[0], 0
            Handler.asked.append((name, self.headers["Range"]))
            fault = Handler.faults.pop(0) if Handler.faults else None
            data = Handler.files.get(name)
            if data is None or fault == "error":
                return self.send_error(404 if data is None else 503)
            if self.headers["Range"] and fault != "no range":
                start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
            if start >= len(data):
                return self.send_error(416)
            self.send_response(206 if self.headers["Range"] and fault != "no range" else 200)
            if fault != "no length":
                self.send_header("Content-Length", len(data) - start)
            self.end_headers()
            end = start + fault if isinstance(fault, int) else len(data)
            self.wfile.write(data[start:end])  # and hangs up

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("no_proxy", "*")
    Handler.url = f"http://127.0.0.1:{http.server_port}/{{}}"
    yield Handler
    http.shutdown()
    http.server_close()


def test_a_broken_transfer_is_gone_on_with(server, tmp_path):
    data = np.random.default_rng(0).bytes(300_000)
    server.files, server.faults = {"a": data}, [100_000, "error", 50_000, None]
    path = dp.download(server.url.format("a"), tmp_path / "sub" / "a")
    assert path.read_bytes() == data and not Path(f"{path}.part").exists()
    starts = [int(range_[6:-1]) for _, range_ in server.asked]
    assert starts[0] == 0 and starts[1] == starts[2] == 99_999 and starts[3] == 149_998
    server.asked.clear()
    assert dp.download(server.url.format("a"), path) == path and not server.asked  # not again
    # From one run to the next, and after a transfer that was whole but for its new name.
    for size in (123_456, 300_000):
        other = tmp_path / f"b{size}"
        Path(f"{other}.part").write_bytes(data[:size])
        server.asked.clear()
        assert dp.download(server.url.format("a"), other).read_bytes() == data
        assert server.asked == [("a", f"bytes={size - 1}-")]
    # A server that cannot go on starts again, and nothing is doubled.
    Path(tmp_path / "c.part").write_bytes(data[:77])
    server.faults = ["no range"]
    assert dp.download(server.url.format("a"), tmp_path / "c").read_bytes() == data


def test_a_transfer_of_the_wrong_size_is_refused_and_kept_for_later(server, tmp_path):
    server.files, server.faults = {"a": bytes(1000)}, [100] * 5
    with pytest.raises(dp.PrepError, match="496 of 1,000 bytes came; the same command goes on"):
        dp.download(server.url.format("a"), tmp_path / "a")
    assert not (tmp_path / "a").exists() and (tmp_path / "a.part").stat().st_size == 496
    assert dp.download(server.url.format("a"), tmp_path / "a").stat().st_size == 1000
    with pytest.raises(dp.PrepError, match="404"):
        dp.download(server.url.format("b"), tmp_path / "b")
    server.faults = ["no length"] * 5
    with pytest.raises(dp.PrepError):
        dp.download(server.url.format("a"), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_chestmnist_is_downloaded_and_a_wrong_file_refused(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    raw_chestmnist(tmp_path / "right.npz", 64)
    right = (tmp_path / "right.npz").read_bytes()
    monkeypatch.setattr(dp, "CHESTMNIST_URL", server.url + "?download=1")
    args = ("chestmnist", "--download", "--size", 64, "--out", tmp_path / "data" / "chestmnist")
    server.files = {"chestmnist_64.npz": right}
    line = prep_refused(capsys, *args)
    assert "MD5" in line and not (tmp_path / "data" / "chestmnist").exists()
    assert not list((tmp_path / "data").rglob("*.npz*"))  # neither the file nor a part of it
    files = dict(dp.CHESTMNIST_FILES)
    files[64] = ("chestmnist_64.npz", hashlib.md5(right).hexdigest())
    monkeypatch.setattr(dp, "CHESTMNIST_FILES", files)
    prep(*args)
    assert prepared(tmp_path / "data" / "chestmnist")[0].shape == (34, 64, 64)
    assert "published are [28, 64, 128, 224]" in prep_refused(
        capsys, "chestmnist", "--download", "--size", 100, "--out", tmp_path / "x"
    )


def test_the_published_digests_are_those_of_the_medmnist_package():
    assert dp.CHESTMNIST_FILES == {
        28: ("chestmnist.npz", "02c8a6516a18b556561a56cbdd36c4a8"),
        64: ("chestmnist_64.npz", "9de6cd0b934ebb5b7426cfba5efbae16"),
        128: ("chestmnist_128.npz", "db107e5590b27930b62dbaf558aebee3"),
        224: ("chestmnist_224.npz", "45bd33e6f06c3e8cdb481c74a89152aa"),
    }
    assert len(set(dp.NIH_ARCHIVES)) == 12
    assert dp.NIH_ARCHIVES[0] == "vfk49d74nhbxq3nqjg0900w5nvkorp5c"
    assert dp.NIH_ARCHIVES[-1] == "ioqwiy20ihqwyr8pf4c24eazhh281pbu"


def test_nih_is_downloaded_whole_and_goes_on_after_a_break(server, tmp_path, monkeypatch, capsys):
    rows = [(f"{k:08d}_000.png", "Mass", "test" if k > 9 else "train") for k in range(1, 13)]
    source = raw_nih(tmp_path / "source", archives=True, rows=rows, size=48)
    server.files = {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()}
    for k, key in enumerate(dp.NIH_ARCHIVES, 1):
        server.files[f"{key}.gz"] = server.files.pop(f"images_{k:03d}.tar.gz")
    monkeypatch.setattr(dp, "NIH_URL", server.url.replace("{}", "{}.gz"))
    monkeypatch.setattr(dp, "LISTS_URL", server.url)
    args = ("nih", "--download", "--size", 32, "--out", tmp_path / "data" / "nih")
    last = server.files.pop(f"{dp.NIH_ARCHIVES[11]}.gz")
    line = prep_refused(capsys, *args)
    assert dp.NIH_ARCHIVES[11] in line and "the same command goes on" in line
    server.files[f"{dp.NIH_ARCHIVES[11]}.gz"] = last
    server.asked.clear()
    prep(*args)
    assert [name for name, _ in server.asked] == [f"{dp.NIH_ARCHIVES[11]}.gz"]
    assert prepared(tmp_path / "data" / "nih")[1]["image"].tolist() == [name for name, *_ in rows]


def test_nothing_is_fetched_without_being_asked(tmp_path, monkeypatch, capsys):
    asked = []

    def fetch(request, **kwargs):
        asked.append(request)
        raise OSError("no network here")

    monkeypatch.setattr(dp.urllib.request, "urlopen", fetch)
    monkeypatch.chdir(tmp_path)
    for name in dp.COMMANDS:
        if name != "demo":
            assert "--raw" in prep_refused(capsys, name)
    raw_nih(tmp_path / "raw")
    os.remove(tmp_path / "raw" / "images_001" / "images" / NIH_ROWS[0][0])
    assert "complete --raw" in prep_refused(capsys, "nih", "--raw", "raw", "--out", "out")
    assert not asked
    assert "no network here" in prep_refused(capsys, "nih", "--download", "--out", "out") and asked


# ---------------------------------------------------------------- 7. verify


def rewrite(folder, name, change):
    """Replaces a file of a prepared folder by change(its text)."""
    path = Path(folder) / name
    path.write_text(change(path.read_text()))


def test_verify_finds_nothing_in_a_sound_folder_and_prints_its_counts(tmp_path, capsys):
    raw = raw_nih(tmp_path / "raw")
    prep("nih", "--raw", raw, "--out", tmp_path / "nih", "--size", 48)
    capsys.readouterr()
    assert dp.main(["verify", str(tmp_path / "nih")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "0 blank pictures []"
    table = {line[:20].strip(): line[20:].split() for line in lines[2:]}
    labels = prepared(tmp_path / "nih")[1]
    for name, known in (("images", "86524+25596"), ("Hernia", "141+86"), ("(all 0)", "50500+9861")):
        chosen = labels
        if name == "Hernia":
            chosen = labels[labels["Hernia"] == 1]
        if name == "(all 0)":
            chosen = labels[labels[dp.NIH_FINDINGS].sum(axis=1) == 0]
        counts = [(chosen["split"] == split).sum() for split in dp.SPLITS]
        assert table[name] == [*map(str, counts), str(len(chosen)), known]
    assert len(table) == 16


def test_verify_finds_a_changed_byte_and_changed_splits(tmp_path, capsys):
    raw = raw_folder(tmp_path / "raw", n=40)
    args = ("folder", "--raw", raw, "--csv", "labels.csv", "--size", 32, "--out", tmp_path / "out")
    prep(*args)
    assert dp.main(["verify", str(tmp_path / "out")]) == 0
    with open(tmp_path / "out" / "images.npy", "r+b") as f:
        f.seek(128 + 7 * 32 * 32 + 500)
        byte = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([byte ^ 1]))
    line = prep_refused(capsys, "verify", tmp_path / "out")
    assert "images.npy is not what was prepared" in line and "i007.png" in line
    prep(*args, "--overwrite")
    rewrite(tmp_path / "out", "labels.csv", lambda text: text.replace(",test,", ",val,"))
    assert "other splits than meta.json" in prep_refused(capsys, "verify", tmp_path / "out")
    prep(*args, "--overwrite")
    rewrite(tmp_path / "out", "labels.csv", lambda text: text[: text.rstrip().rindex("\n") + 1])
    assert "39 rows" in prep_refused(capsys, "verify", tmp_path / "out")
    os.remove(tmp_path / "out" / "meta.json")
    assert "meta.json" in prep_refused(capsys, "verify", tmp_path / "out")
    assert "nowhere" in prep_refused(capsys, "verify", tmp_path / "nowhere")


def test_verify_finds_a_patient_in_two_splits(tmp_path, capsys):
    raw = raw_folder(tmp_path / "raw")
    prep("folder", "--raw", raw, "--csv", "labels.csv", "--size", 32, "--out", tmp_path / "out")
    rewrite(
        tmp_path / "out",
        "labels.csv",
        lambda text: (
            re.sub(r"(i000.png,p0),\w+", r"\1,val", text)
            .replace("i001.png,p0,val", "i001.png,p0,test")
            .replace("i001.png,p0,train", "i001.png,p0,test")
        ),
    )
    assert "'p0'" in prep_refused(capsys, "verify", tmp_path / "out")


def test_verify_finds_one_picture_under_two_names_and_blank_pictures(tmp_path, capsys):
    raw = tmp_path / "raw"
    for k in range(6):
        save(phantom(k), raw / f"{k}.png")
    shutil.copy(raw / "0.png", raw / "same.png")
    shutil.copy(raw / "1.png", raw / "twin.png")
    save(np.full((64, 64), 9, np.uint8), raw / "blank.png")
    rows = ["0.png,train", "1.png,train", "2.png,val", "3.png,test", "4.png,train", "5.png,test"]
    table = raw / "labels.csv"
    write(table, "image,split", *rows, "same.png,train", "twin.png,train", "blank.png,train")
    args = ("folder", "--raw", raw, "--csv", "labels.csv", "--size", 64, "--out", tmp_path / "out")
    prep(*args)
    capsys.readouterr()
    assert dp.main(["verify", str(tmp_path / "out")]) == 0  # within one split: only said
    said = capsys.readouterr().out
    assert "one picture under several names: 0.png (train), same.png (train)" in said
    assert "1 blank pictures ['blank.png']" in said
    rewrite(raw, "labels.csv", lambda text: text.replace("same.png,train", "same.png,test"))
    prep(*args, "--overwrite")
    line = prep_refused(capsys, "verify", tmp_path / "out")
    assert "one picture in two splits: 0.png (train), same.png (test) (1 problem(s))" in line


# ---------------------------------------------------------------- 8. command line


def test_data_commands_that_are_wrong_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for args, message in (
        ([], "required"),
        (["mimic"], "invalid choice"),
        (["demo", "--sise", "3"], "--sise"),
        (["demo", "--size", "x"], "--size"),
        (["demo", "--size", "8"], "--size from 16"),
        (["demo", "--count", "0"], "--count from 1"),
        (["demo", "--workers", "0"], "--workers"),
        (["nih", "--raw", "nowhere"], "nowhere"),
        (["vinbig", "--readers", "most"], "invalid choice"),
        (["folder", "--raw", "."], "--out outside it"),
        (["folder", "--raw", "nowhere"], "found 0 X-rays"),
        (["verify"], "folder"),
    ):
        assert message in prep_refused(capsys, *args), args
    assert not list(tmp_path.iterdir())


def test_every_option_of_every_preparation_is_in_its_help(capsys):
    options = {
        "demo": "--site --count --seed",
        "folder": "--raw --csv",
        "nih": "--raw --allow-missing --download",
        "chestmnist": "--raw --download",
        "rsna": "--raw --allow-missing",
        "siim": "--raw --allow-missing",
        "vinbig": "--raw --readers --allow-missing",
        "verify": "folder",
    }
    for name in (None, *options):
        with pytest.raises(SystemExit) as stop:
            dp.main([name, "--help"] if name else ["--help"])
        shown = capsys.readouterr().out
        assert stop.value.code == 0
        common = "" if name in (None, "verify") else "--out --size --workers --overwrite "
        for option in (common + options[name]).split() if name else options:
            assert option in shown, (name, option)


# ---------------------------------------------------------------- 9. load

LOAD = """
import resource, sys
import data_prep as dp
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert dp.main(sys.argv[1:]) == 0
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024)
"""


def test_a_hundred_thousand_images_are_prepared_within_400_megabytes(tmp_path):
    """The pictures alone, at 28 px and as read from the disk, are 78 MB; the tables the rest."""
    counts = (70_000, 10_000, 20_000)
    arrays = raw_chestmnist(tmp_path / "raw.npz", counts=counts, compress=False)
    call = [sys.executable, "-c", LOAD, "chestmnist", "--raw", str(tmp_path / "raw.npz")]
    call += ["--out", str(tmp_path / "out"), "--workers", "1"]
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run(call, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 400
    images = np.load(tmp_path / "out" / "images.npy", mmap_mode="r")
    assert images.shape == (100_000, 28, 28)
    for start, split in zip((0, 70_000, 80_000), dp.SPLITS, strict=True):
        assert np.array_equal(images[start : start + 5000], arrays[f"{split}_images"][:5000])


# ---------------------------------------------------------------- 10. real files


@real
def test_real_nih_files_are_prepared_with_right_labels_and_the_official_split(tmp_path):
    raw = XRAYS / "nih_raw"
    prep("nih", "--raw", raw, "--out", tmp_path / "out", "--size", 64, "--allow-missing")
    images, labels, rejected, meta = prepared(tmp_path / "out")
    files = {path.name: path for path in raw.rglob("*.png")}
    assert len(labels) == len(files) == 40 and set(labels["image"]) == set(files)
    assert len(rejected) == 112_080 and set(rejected.values()) == {"file not found"}
    with open(raw / "Data_Entry_2017_v2020.csv", newline="") as f:
        found = {
            row["Image Index"]: set(row["Finding Labels"].split("|")) for row in csv.DictReader(f)
        }
    test = set((raw / "test_list.txt").read_text().split())
    for k, row in labels.iterrows():
        shown = {f for f in dp.NIH_FINDINGS if row[f]} or {"No Finding"}
        assert shown == found[row["image"]] and int(row["patient"]) == int(row["image"][:8])
        assert (row["split"] == "test") == (row["image"] in test)
        picture = np.asarray(Image.open(files[row["image"]]).convert("L"))
        assert np.array_equal(images[k], dp.resize_xray(picture, 64))
    assert labels["split"].nunique() > 1
    assert dp.main(["verify", str(tmp_path / "out")]) == 0


@real
def test_real_tables_of_nih_give_every_published_count(tmp_path):
    listing = dp.list_nih(XRAYS / "nih_raw", allow_missing=True)
    table, test = listing.table, listing.table["split"] == "test"
    assert (len(table), (~test).sum(), test.sum()) == (112_120, 86_524, 25_596)
    patients = [table.loc[rows, "patient"].nunique() for rows in (test | ~test, ~test, test)]
    assert patients == [30_805, 28_008, 2_797]
    published = (
        "Atelectasis 11559/8280/3279, Cardiomegaly 2776/1707/1069, Consolidation 4667/2852/1815, "
        "Edema 2303/1378/925, Effusion 13317/8659/4658, Emphysema 2516/1423/1093, "
        "Fibrosis 1686/1251/435, Hernia 227/141/86, Infiltration 19894/13782/6112, "
        "Mass 5782/4034/1748, Nodule 6331/4708/1623, Pleural_Thickening 3385/2242/1143, "
        "Pneumonia 1431/876/555, Pneumothorax 5302/2637/2665, No Finding 60361/50500/9861"
    )
    table = table.assign(**{"No Finding": (table[dp.NIH_FINDINGS].sum(axis=1) == 0).astype(int)})
    for entry in published.split(", "):
        name, counts = entry.rsplit(" ", 1)
        values = table[name]
        assert f"{values.sum()}/{values[~test].sum()}/{values[test].sum()}" == counts, name
    assert len(listing.boxes) == 984 and set(listing.boxes["finding"]) < set(dp.NIH_FINDINGS)
    # What `verify` prints beside the counts of a set is the same.
    known = [name.split("+") for name in dp.KNOWN_COUNTS["nih"].split()]
    shown = [[86_524, 25_596]]
    shown += [
        [table[f][~test].sum(), table[f][test].sum()] for f in ["No Finding", *dp.NIH_FINDINGS]
    ]
    assert [[int(n) for n in pair] for pair in known] == shown


@real
def test_the_real_old_edition_of_nih_reads(tmp_path):
    shutil.copy(XRAYS / "labels" / "Data_Entry_2017.head.csv", tmp_path / "Data_Entry_2017.csv")
    for name in ("train_val_list.txt", "test_list.txt"):
        shutil.copy(XRAYS / "nih_raw" / name, tmp_path)
    old = dp.list_nih(tmp_path, allow_missing=True).table
    new = dp.list_nih(XRAYS / "nih_raw", allow_missing=True).table
    both = old.merge(new, on="image", suffixes=("", " new"))
    assert len(both) == len(old) == 16
    columns = ["patient", "split", *dp.NIH_FINDINGS]
    assert (both[columns].values == both[[f"{c} new" for c in columns]].values).mean() > 0.97


@real
def test_real_tables_of_rsna_give_every_published_count():
    with open(XRAYS / "labels" / "stage_2_train_labels.csv") as f:
        assert sum(1 for _ in f) == 30_228
    listing = dp.list_rsna(XRAYS / "labels", allow_missing=True)
    assert len(listing.table) == 26_684 and listing.table["Pneumonia"].sum() == 6012
    assert len(listing.boxes) == 9555 and listing.boxes["image"].value_counts().max() == 4
    assert listing.boxes["image"].nunique() == 6012
    assert dp.KNOWN_COUNTS["rsna"] == f"{26_684} {26_684 - 6012} {6012}"
    shares = listing.table["split"].value_counts(normalize=True)
    assert abs(shares["train"] - 0.7) < 0.01 and abs(shares["test"] - 0.15) < 0.01


@real
def test_real_tables_of_siim_give_every_published_count():
    listing = dp.list_siim(XRAYS / "siim_raw", allow_missing=True)
    rows = [max(1, len(texts)) for texts in listing.masks]
    assert (sum(rows), len(listing.table)) == (12_954, 12_047)
    assert listing.table["Pneumothorax"].sum() == 2669
    several = [texts for texts in listing.masks if len(texts) > 1]
    assert len(several) == 624 and max(rows) == 10
    overlaps = 0
    for texts in several:
        parts = [dp.rle_decode(text, 1024, 1024) for text in texts]
        overlaps += np.any(parts, axis=0).sum() < sum(part.sum() for part in parts)
    assert overlaps == 183


@real
def test_real_files_of_siim_equal_an_independent_decoding(tmp_path):
    raw = XRAYS / "siim_raw"
    prep("siim", "--raw", raw, "--out", tmp_path / "out", "--size", 1024, "--allow-missing")
    images, labels, _, _ = prepared(tmp_path / "out")
    masks = np.load(tmp_path / "out" / "masks.npy")
    assert len(labels) == 3 and masks.any(axis=(1, 2)).sum() == labels["Pneumothorax"].sum() > 0
    for k, name in enumerate(labels["image"]):
        right = np.asarray(Image.open(raw / "decoded_check" / "images" / f"{name}.png"))
        mask = np.asarray(Image.open(raw / "decoded_check" / "masks" / f"{name}.png")) > 0
        assert np.array_equal(masks[k], mask)
        for size in (1024, 256):
            error = dp.resize_xray(images[k], size).astype(int) - dp.resize_xray(right, size)
            assert np.abs(error).max() <= 1


@real
@pytest.mark.parametrize("readers", ["any", "majority"])
def test_real_tables_of_vinbig_give_every_published_count(readers, tmp_path):
    shutil.copy(XRAYS / "labels" / "vinbigdata-train.csv", tmp_path / "train.csv")
    table = dp.list_vinbig(tmp_path, readers, allow_missing=True).table
    published = (
        "3067/2346, 186/62, 452/177, 2300/1817, 353/121, 386/152, 613/245, 1322/547, 826/405, "
        "1134/362, 1032/634, 1981/882, 96/58, 1617/1017"
    )
    counts = [int(pair.split("/")[readers == "majority"]) for pair in published.split(", ")]
    assert table[dp.VINBIG_FINDINGS].sum().tolist() == counts and len(table) == 15_000
    known = dp.KNOWN_COUNTS[f"vinbig {readers}"].split()
    assert list(map(int, [known[0], *known[2:]])) == [15_000, *counts]
    if readers == "any":
        assert (table[dp.VINBIG_FINDINGS].sum(axis=1) == 0).sum() == 10_606 == int(known[1])


@real
def test_other_real_dicom_files_read():
    import pydicom

    for path in (XRAYS / "dicom_other").iterdir():
        ds, picture = pydicom.dcmread(path), dp.read_xray(path)
        pixels = ds.pixel_array
        if ds.PhotometricInterpretation == "MONOCHROME1":  # as its tag says
            pixels = 255 - pixels
        assert np.array_equal(picture, pixels) and picture.std() > 20


@real
@pytest.mark.parametrize("name,count", [("kermany", 5216), ("shenzhen", 662), ("nih256", 1000)])
def test_real_folders_are_prepared(name, count, tmp_path):
    raw = XRAYS / name
    prep("folder", "--raw", raw, "--csv", "labels.csv", "--out", tmp_path / "out", "--size", 64)
    images, labels, rejected, meta = prepared(tmp_path / "out")
    given = pd.read_csv(raw / "labels.csv", dtype=str, keep_default_na=False)
    assert len(images) == count and not rejected and meta["split_rule"] == "as given"
    for column in ("image", "patient", "split"):
        assert labels[column].tolist() == given[column].tolist()
    others = [c for c in given if c not in ("image", "patient", "split", "mask")]
    assert meta["findings"] == others
    assert np.array_equal(labels[others], given[others].astype(int))
    for k in (0, count - 1):
        path = next(raw.glob(f"images/{given['image'][k]}"))
        assert np.array_equal(images[k], dp.resize_xray(dp.read_xray(path), 64))
    if name == "shenzhen":
        masks = np.load(tmp_path / "out" / "masks.npy")
        assert labels["has_mask"].sum() == (given["mask"] != "").sum() == 566
        shares = masks[labels["has_mask"] == 1].mean(axis=(1, 2))
        assert 0.05 < shares.min() and shares.max() < 0.6
        assert not masks[labels["has_mask"] == 0].any()
