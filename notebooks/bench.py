"""What training, evaluation and preparation cost, as ratios within one run.

    python notebooks/bench.py                    # each form of the model, and each part of a step
    python notebooks/bench.py evaluation         # linear probe, features
    python notebooks/bench.py preparation RAW    # RAW: a folder with PNGs of NIH ChestX-ray14

`--out FILE` writes the figures as JSON. The fast forms run as in training: channels-last, with
autocast if `--amp` says so. The literal form runs as it is defined: float32, the default layout and
allocator, one view after the other. Each form has a process of its own, and the least of several
times counts. Nothing else may run beside it.
"""

import argparse
import functools
import json
import math
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import mlvicx as m

BARE, INLINE, SIDE, NONE = "two-view ResNet-18", "MLVICX, inline", "MLVICX, side", "MLVICX, none"
LITERAL = "literal, float32"
KEPT = "literal, memory kept"  # with `keep_memory`, as all but the literal form have it
FORMS = (BARE, NONE, SIDE, INLINE, LITERAL, KEPT)
FORWARD = ["encoder", "context-bottlenecks", "heads", "losses"]


class LiteralMLVICX(m.MLVICX):
    """The model by its definition, one view after the other, for comparison."""

    def forward(self, view1, view2):
        z_global, z_local = [], []
        for view in (view1, view2):
            h, maps = self.encoder(view)
            pooled = m.aggregate_literal(maps, self.local_head.convs).flatten(1)
            z_global.append(self.global_head(h))
            z_local.append(self.local_head.mlp(pooled))
        return z_global, z_local


def torchvision_views(images, size):
    """The recipe of RandomViews in torchvision's transforms, image by image, for comparison."""
    crop = v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC)
    first = [crop, v2.RandomHorizontalFlip(), v2.RandomApply([v2.ColorJitter(0.4, 0.4)], 0.8)]
    blur = v2.GaussianBlur(23, (0.1, 2.0))
    view1 = v2.Compose([*first, blur])
    view2 = v2.Compose([*first, v2.RandomApply([blur], 0.1), v2.RandomSolarize(128, 0.2)])
    return [m.normalise(torch.cat([v(x[None]) for x in images]) / 255) for v in (view1, view2)]


def peak_bytes(device, reset=False):
    """Peak memory so far, or, after a reset, the memory in use now; NaN where unknown."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return math.nan


def seconds(call, device=None):
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def least_seconds(call, turns=3):
    """Least wall time of a call in some turns, and what it returned last."""
    found, taken = None, []

    def keep():
        nonlocal found
        found = call()

    for _ in range(turns):
        taken.append(seconds(keep))
    return min(taken), found


# ---- forms of the model, parts of a step


def build_form(name, embedding_dim, device):
    """The model of one row of the table."""
    if name in (LITERAL, KEPT):
        return LiteralMLVICX(embedding_dim, context="inline").to(device)
    if name.startswith(BARE):
        model = m.MLVICX(context="none", local=False)
        model.global_head.mlp = nn.Sequential()  # no heads: the loss sees h itself
    else:
        model = m.MLVICX(embedding_dim, context=name.split(", ")[1])
    model = model.to(device, memory_format=torch.channels_last)
    if name.endswith("compiled"):
        return torch.compile(model)
    return model


def measure_form(name, config):
    """Least seconds of forward and backward, and peak memory in MB above the idle process.

    `peak_mb`: in use at once, as CUDA counts it; `resident_mb`: on a CPU, with what is kept.
    """
    device = torch.device(config.device)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    literal = name in (LITERAL, KEPT)
    model = build_form(name, config.embedding_dim, device)
    views = torch.rand(2, config.batch_size, config.size, config.size, device=device)
    views = [m.normalise(view) for view in views]
    amp, covariance = config.amp, m.covariance_loss
    if literal:
        views = [view.contiguous() for view in views]
        amp, covariance = "off", m.covariance_literal

    def step():
        model.zero_grad()
        with m.autocast(device, amp):
            z = model(*views)
        m.mlvicx_loss(*z, covariance=covariance)[0].backward()

    if name != LITERAL:  # whose allocator stays as it is: its peak is that of KEPT
        m.keep_memory(False)
    idle = peak_bytes(device, reset=True)
    step()
    peak = peak_bytes(device) - idle
    if name != LITERAL:
        m.keep_memory()
    taken = [seconds(step, device) for _ in range(config.repeats + 1)]
    resident = peak_bytes(device) - idle
    return {"seconds": min(taken[1:]), "peak_mb": peak / 1e6, "resident_mb": resident / 1e6}


def step_parts(config, device):
    """The parts of a step, as calls by name, and the parameters of the modules."""
    batch, size, amp = config.batch_size, config.size, m.autocast(device, config.amp)
    bare, model, literal = (
        build_form(name, config.embedding_dim, device) for name in (BARE, INLINE, LITERAL)
    )
    still = [build_form(n, config.embedding_dim, device).encoder.eval() for n in (BARE, INLINE)]
    views = torch.randn(2, batch, 3, size, size, device=device)
    images = torch.randint(256, (16 * batch, 256, 256)).byte()
    mapped = np.memmap(tempfile.TemporaryFile(), np.uint8, "w+", shape=tuple(images.shape))
    mapped[:] = images  # read as a prepared set is, from a file
    prepared = SimpleNamespace(images=torch.from_numpy(mapped))
    collate = functools.partial(torchvision_views, size=size)
    theirs = torch.utils.data.DataLoader(images, batch, num_workers=2, collate_fn=collate)
    ours, blocks = m.RandomViews(size), model.encoder.context
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    heads = (model.global_head.mlp, model.local_head.mlp)
    with torch.no_grad(), amp:
        encoded = [model.encoder(view) for view in views]
        (h1, h2), maps = zip(*encoded, strict=True)
        z = model(*views)
    plain = [[x.float().contiguous() for x in level] for level in maps]

    def project_all():
        pooled = [model.local_head.pool(level) for level in maps]
        return m.project(heads[0], h1, h2), m.project(heads[1], *pooled)

    def project_literally():
        for h, level in ((h1, plain[0]), (h2, plain[1])):
            literal.global_head(h.float())
            literal.local_head.mlp(m.aggregate_literal(level, literal.local_head.convs).flatten(1))

    def all_blocks():
        for level in maps:
            for block, x in zip(blocks.values(), level, strict=True):
                block(x)

    forward = {
        "encoder": lambda: [bare.encoder(view) for view in views],
        "context-bottlenecks": all_blocks,
        "heads": project_all,
        "inference, no blocks": lambda: [still[0](view) for view in views],
        "inference": lambda: [still[1](view) for view in views],
    }
    parts = {name: torch.no_grad()(amp(call)) for name, call in forward.items()}
    others = {
        "read": lambda: m.gather_images([prepared], torch.randint(16 * batch, (batch,))),
        "views": lambda: ours(images[:batch].to(device), m.generator("bench")),
        "views, torchvision": lambda: list(theirs),
        "losses": lambda: m.mlvicx_loss(*z),
        "heads, literal": project_literally,
        "losses, literal": lambda: m.mlvicx_loss(*z, covariance=m.covariance_literal),
        "LARS": m.LARS(model.parameters()).step,
    }
    parts.update({name: torch.no_grad()(call) for name, call in others.items()})
    modules = {"backbone": bare, "blocks": blocks}
    modules.update({"global head": model.global_head, "local head": model.local_head})
    return parts, {k: sum(p.numel() for p in v.parameters()) for k, v in modules.items()}


def steps(config):
    """What each form of the model and each part of a step costs. Returns: a dict for JSON."""
    device, _, _ = m.setup(config.device)
    config.device = str(device)
    forms = list(FORMS)
    if device.type == "cuda":
        forms += [f"{name}, compiled" for name in (BARE, SIDE)]
    torch.manual_seed(0)
    parts, parameters = step_parts(config, device)
    # A fork server imports torch once, and forks every process from there.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["mlvicx"])
    rows = {}
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for name in forms:
            rows[name] = pool.submit(measure_form, name, config).result()
    turns = [
        {name: seconds(call, device) for name, call in parts.items()}
        for _ in range(config.repeats + 1)
    ]
    for name in parts:
        rows[name] = {"seconds": min(turn[name] for turn in turns[1:])}
    table = pd.DataFrame(rows).T
    table.loc["views, torchvision", "seconds"] /= 16  # it ran over sixteen batches
    table.loc[LITERAL, "peak_mb"] = table["peak_mb"][KEPT]  # the same model
    t, form, forward = table["seconds"], table["seconds"][forms], table["seconds"][FORWARD].sum()
    table.loc["backward", "seconds"] = t[INLINE] - forward
    table["images_per_second"] = config.batch_size / form
    table["over_resnet"], table["literal_over_it"] = form / t[BARE], t[LITERAL] / form
    table["literal_kept_over_it"] = t[KEPT] / form
    lars, peak, resident = t["LARS"], table["peak_mb"], table["resident_mb"]
    ratios = {
        "whole step with LARS, literal / fast": (t[LITERAL] + lars) / (t[INLINE] + lars),
        "the same, memory kept for both": (t[KEPT] + lars) / (t[INLINE] + lars),
        "peak memory, fast / literal": peak[INLINE] / peak[LITERAL],
        "resident, memory kept for both": resident[INLINE] / resident[KEPT],
        "torchvision's views / ours": t["views, torchvision"] / t["views"],
        "read + views, share of a step": (t["read"] + t["views"]) / (t[INLINE] + lars),
        "training, with blocks / without": t[INLINE] / t[NONE],
        "inference, with blocks / without": t["inference"] / t["inference, no blocks"],
        "backward / forward": t[INLINE] / forward - 1,
    }
    multiply_adds = {}
    for name, part in zip(("backbone", "blocks", "heads"), FORWARD, strict=False):
        with FlopCounterMode(display=False) as counter:
            parts[part]()  # two views, and two operations a multiply-add
        multiply_adds[name] = counter.get_total_flops() // (4 * config.batch_size)
    print("forward and backward of each form, then the parts of a step")
    shown = table.assign(seconds=1000 * table["seconds"]).rename(columns={"seconds": "ms"})
    print(shown.to_string(float_format="{:.4g}".format, na_rep=""))
    rows = json.loads(table.to_json(orient="index", double_precision=15))
    measured = {name: rows.pop(name) for name in forms}
    found = {"ratios": ratios, "parameters": parameters, "multiply_adds": multiply_adds}
    return dict(found, steps=measured, parts=rows)


# ---- evaluation, preparation


def evaluation(config):
    """The linear probe at NIH's size; features of images against bare forward passes."""
    device, _, _ = m.setup("cpu")
    torch.manual_seed(0)
    x, xv = (torch.randn(count, 512).relu() for count in (86524, 8652))
    weight = torch.randn(14, 512) / 20
    bias = torch.linspace(-4, -2, 14)
    y, yv = (torch.rand(len(a), 14).lt((a @ weight.T + bias).sigmoid()).float() for a in (x, xv))
    probe, _ = least_seconds(lambda: m.linear_probe(x, y, xv, yv))
    images, rows = torch.randint(0, 256, (1024, 256, 256)).byte(), torch.arange(1024)
    ready = torch.randn(128, 3, 224, 224).to(memory_format=torch.channels_last)
    encoder = m.Encoder().eval().to(memory_format=torch.channels_last)
    bare, _ = least_seconds(torch.no_grad()(lambda: [encoder(ready) for _ in range(8)]))
    ours, _ = least_seconds(lambda: m.predict(encoder, images, rows, 224))
    return {
        "probe, 86,524 x 512 features, 14 findings, seconds": probe,
        "features of 1,024 images of 256 px seen at 224, seconds": ours,
        "features over bare forward passes": ours / bare,
    }


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


def run_python(code, *words):
    """Runs Python code in a process of its own, whose time includes the start of Python."""
    call = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(call, cwd=HERE.parent, check=True, capture_output=True, text=True)


def preparation(config):
    """Preparing to 256 px beside decoding alone, by one worker and by two; peak memory."""
    files, found = sorted(Path(config.raw).rglob("*.png"))[:40], {}
    for count in (400, 1600):
        with tempfile.TemporaryDirectory() as place:
            folder, out = Path(place) / "raw", Path(place) / "out"
            folder.mkdir()
            for k in range(count):
                shutil.copy(files[k % len(files)], folder / f"{k}.png")
            rows = ["image,patient,F", *(f"{k}.png,{k},{k % 2}" for k in range(count))]
            (folder / "labels.csv").write_text("\n".join(rows) + "\n")
            words = f"folder --raw {folder} --csv labels.csv --size 256 --out {out} --overwrite"
            words = [*words.split(), "--workers"]
            decode, _ = least_seconds(lambda folder=folder: run_python(DECODE, folder))
            one, _ = least_seconds(lambda words=words: run_python(PREPARE, *words, 1))
            alone = (out / "images.npy").read_bytes()
            two, done = least_seconds(lambda words=words: run_python(PREPARE, *words, 2))
            assert (out / "images.npy").read_bytes() == alone
        peaks = [round(int(kb) / 1e3) for kb in done.stdout.split()[-2:]]
        found[f"{count} images"] = {
            "seconds": {"decode": decode, "one worker": one, "two workers": two},
            "prepare over decode": one / decode,
            "two workers over one": one / two,
            "peak MB with two workers": dict(zip(("parent", "a worker"), peaks, strict=True)),
        }
    return found


def main(argv=None):
    """Measures one thing, prints it and writes it to `--out`. Returns: what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", default="steps", choices=MEASURES)
    parser.add_argument("raw", nargs="?", default="", help="folder with PNGs, for preparation")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--embedding-dim", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3, help="the least disturbed counts")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", default="off", choices=("off", "bf16", "fp16"))
    parser.add_argument("--out", default="", help="JSON file to write")
    config = parser.parse_args(argv)
    if config.out:  # before minutes of measuring
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    result = {"command": sys.argv[1:], "threads": torch.get_num_threads()}
    result.update(provenance=m.provenance(), config=vars(config))
    result.update(MEASURES[config.what](config))
    print(json.dumps(result, indent=1))
    if config.out:
        m.write_json(config.out, result)
    return result


MEASURES = {"steps": steps, "evaluation": evaluation, "preparation": preparation}

if __name__ == "__main__":
    main()
