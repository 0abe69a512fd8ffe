"""What `python mlvicx.py bench` leaves out, measured: evaluation, small images, preparation.

    python notebooks/speed.py evaluation       # results/eval_cpu.json
    python notebooks/speed.py small            # results/small_maps.json
    python notebooks/speed.py preparation RAW  # results/prepare_speed.json

RAW is a folder with PNGs of NIH ChestX-ray14, 1024 px. Ratios within one run; the least of three
turns counts. Nothing else may run beside it.
"""

import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import torch

import mlvicx as m

TURNS = 3
DECODE = """
import sys
from pathlib import Path
import data_prep
from PIL import Image
for path in sorted(Path(sys.argv[1]).glob("*.png")):
    Image.open(path).load()
"""
PREPARE = """
import resource, sys
from pathlib import Path
import data_prep
data_prep.main(sys.argv[1:])
own = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]  # since the exec
print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def seconds(call):
    """Least wall time of a call in some turns, and what it returned last."""
    taken = []
    for _ in range(TURNS):
        start = time.perf_counter()
        found = call()
        taken.append(time.perf_counter() - start)
    return min(taken), found


def evaluation():
    """The linear probe at NIH's size; features of images against bare forward passes."""
    m.keep_memory()  # as every command does
    torch.manual_seed(0)
    x, xv = (torch.randn(count, 512).relu() for count in (86524, 8652))
    weight = torch.randn(14, 512) / 20
    bias = torch.linspace(-4, -2, 14)
    y, yv = (torch.rand(len(a), 14).lt((a @ weight.T + bias).sigmoid()).float() for a in (x, xv))
    probe, _ = seconds(lambda: m.linear_probe(x, y, xv, yv))
    images, rows = torch.randint(0, 256, (1024, 256, 256)).byte(), torch.arange(1024)
    ready = torch.randn(128, 3, 224, 224).to(memory_format=torch.channels_last)
    encoder = m.Encoder().eval().to(memory_format=torch.channels_last)
    bare, _ = seconds(torch.no_grad()(lambda: [encoder(ready) for _ in range(8)]))
    ours, _ = seconds(lambda: m.predict(encoder, images, rows, 224, torch.device("cpu")))
    return {
        "probe, 86,524 x 512 features, 14 findings, seconds": probe,
        "features of 1,024 images of 256 px seen at 224, seconds": ours,
        "features over bare forward passes": ours / bare,
        "processor": m.device_name(torch.device("cpu")),
    }


def small():
    """Seconds of a step of the demo preset, its last stage as matrix products or the library's."""
    found, ours = {}, m.SmallMapConv2d.forward
    for size, amp in itertools.product((32, 48, 64), ("off", "bf16")):
        given = {"data": "demo", "size": size, "batch_size": 64, "amp": amp, "device": "cpu"}
        config = m.make_config("pretrain", m.PretrainConfig, given)
        device, *_ = m.setup(config)
        trainer, taken = m.Trainer(config, device), {"ours": [], "library": []}
        pair = [m.normalise(torch.rand(64, size, size)) for _ in range(2)]
        for _, form in itertools.product(range(TURNS + 1), taken):
            m.SmallMapConv2d.forward = ours if form == "ours" else torch.nn.Conv2d.forward
            taken[form].append(m.timed(lambda t=trainer, p=pair: t.train_step(*p, 1e-3), device))
        row = {form: min(seconds[1:]) for form, seconds in taken.items()}  # the first warms up
        found[f"{size} px, batch 64, amp {amp}"] = row | {"ratio": row["library"] / row["ours"]}
    return found | {"processor": m.device_name(device)}


def copies(files, count, folder):
    """A raw folder for `folder`: `count` PNGs under names of their own, and their table."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for k in range(count):
        shutil.copy(files[k % len(files)], folder / f"{k}.png")
    rows = ["image,patient,F", *(f"{k}.png,{k},{k % 2}" for k in range(count))]
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


def preparation(raw):
    """Preparing to 256 px beside decoding alone, by one worker and by two; peak memory.

    Every preparation is a process of its own, whose time includes the start of Python.
    """
    files, found = sorted(Path(raw).rglob("*.png"))[:40], {}
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "raw", Path(place) / "out"

        def python(code, *words):
            call = [sys.executable, "-c", code, *words]
            return subprocess.run(call, cwd=HERE.parent, check=True, capture_output=True, text=True)

        def prepare(workers):
            words = f"folder --raw {folder} --csv labels.csv --size 256 --out {out} --overwrite"
            done = python(PREPARE, *words.split(), "--workers", str(workers))
            peaks = [round(int(kb) / 1e3) for kb in done.stdout.split()[-2:]]
            return peaks, (out / "images.npy").read_bytes()

        for count in (400, 1600):
            copies(files, count, folder)
            decode, _ = seconds(lambda: python(DECODE, str(folder)))
            (one, (_, a)), (two, (peak, b)) = (seconds(lambda w=w: prepare(w)) for w in (1, 2))
            assert a == b
            found[f"{count} images"] = {
                "seconds": {"decode": decode, "one worker": one, "two workers": two},
                "prepare over decode": one / decode,
                "two workers over one": one / two,
                "peak MB with two workers": dict(zip(("parent", "a worker"), peak, strict=True)),
            }
    return found


if __name__ == "__main__":
    which, *words = sys.argv[1:] or ["nothing"]
    actions = {"evaluation": (evaluation, "eval_cpu.json"), "small": (small, "small_maps.json")}
    actions |= {"preparation": (preparation, "prepare_speed.json")}
    if which not in actions or len(words) != (which == "preparation"):
        sys.exit(f"expected evaluation, small, or preparation RAW; found {sys.argv[1:]}")
    measure, file = actions[which]
    result = {"command": " ".join(["python notebooks/speed.py", which, *["RAW"] * len(words)])}
    result |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    result |= json.loads(json.dumps(measure(*words)), parse_float=lambda x: round(float(x), 3))
    m.store_json(HERE / "results" / file, result)
    print(json.dumps(result, indent=1))
