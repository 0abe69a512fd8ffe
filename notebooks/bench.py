"""What training, evaluation and preparation cost, as ratios within one run.

    python notebooks/bench.py                    # on a CPU: steps; on a GPU: training
    python notebooks/bench.py steps              # each form of the model, and each part of a step
    python notebooks/bench.py training           # whole training steps, then `pretrain` itself
    python notebooks/bench.py evaluation         # linear probe, features
    python notebooks/bench.py preparation RAW    # RAW: a folder with PNGs of NIH ChestX-ray14

`--out FILE` writes the figures as JSON. The fast forms run as in training: channels-last, with
autocast if `--amp` says so. The literal form runs as it is defined: float32, the default layout and
allocator, one view after the other. Nothing else may run beside it.

`steps` runs on a CPU. Each form has a process of its own, and the least of several times counts.
`training` measures the most important figures first, writes each as it is found, and leaves out
what would not end within `--limit` seconds. Its step makes both views of uint8 images in host
memory, and changes the weights; the bare step is forward and backward of a two-view ResNet-18.
"""

import argparse
import collections
import functools
import gc
import json
import math
import multiprocessing
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import mlvicx as m

BARE, INLINE, SIDE, NONE = "two-view ResNet-18", "MLVICX, inline", "MLVICX, side", "MLVICX, none"
LITERAL = "literal, float32"
KEPT = "literal, memory kept"  # with `keep_memory`, as all but the literal form have it
FORMS = (BARE, NONE, SIDE, INLINE, LITERAL, KEPT)
FORWARD = ["encoder", "context-bottlenecks", "heads", "losses"]
CAPTURED = "two-view ResNet-18, captured"
EAGER, GRAPH = {"graph": False}, {"graph": True}
VICREG = {"context": "none", "local_weight": 0.0, "final_bn": False}
TRAININGS = {  # settings of `pretrain`, whose default form is side
    "eager": EAGER,
    "eager, counted": EAGER,
    "graph": GRAPH,
    "graph, compiled": dict(GRAPH, compile=True),
    "graph, inline": dict(GRAPH, context="inline"),
    "graph, none": dict(GRAPH, context="none"),
    "graph, VICReg": dict(GRAPH, **VICREG),
    LITERAL: {"literal": True},
}
COUNTED = ("eager, counted", "graph, compiled")  # later, for a profiler slows what follows
EXPECTED = {"pretrain": 45, "graph, compiled": 60, LITERAL: 10}  # seconds; of the others 6
STARTED = time.perf_counter()


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


def peak_bytes(reset=False):
    """Peak memory of this process so far, or, after a reset, what is in use; NaN where unknown."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return math.nan


def seconds(call):
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
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


def build_form(name, embedding_dim):
    """The model of one row of the table."""
    if name in (LITERAL, KEPT):
        return LiteralMLVICX(embedding_dim, context="inline")
    if name == BARE:
        model = m.MLVICX(context="none", local=False)
        model.global_head.mlp = nn.Sequential()  # no heads: the loss sees h itself
    else:
        model = m.MLVICX(embedding_dim, context=name.split(", ")[1])
    return model.to(memory_format=torch.channels_last)


def measure_form(name, config):
    """Least seconds of forward and backward, and peak memory in MB above the idle process.

    `peak_mb`: in use at once; `resident_mb`: with what is kept.
    """
    device = torch.device("cpu")
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    literal = name in (LITERAL, KEPT)
    model = build_form(name, config.embedding_dim)
    views = torch.rand(2, config.batch_size, config.size, config.size)
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
    idle = peak_bytes(reset=True)
    step()
    peak = peak_bytes() - idle
    if name != LITERAL:
        m.keep_memory()
    taken = [seconds(step) for _ in range(config.repeats + 1)]
    resident = peak_bytes() - idle
    return {"seconds": min(taken[1:]), "peak_mb": peak / 1e6, "resident_mb": resident / 1e6}


def step_parts(config):
    """The parts of a step, as calls by name, and the parameters of the modules."""
    batch, size = config.batch_size, config.size
    amp = m.autocast(torch.device("cpu"), config.amp)
    bare, model, literal = (
        build_form(name, config.embedding_dim) for name in (BARE, INLINE, LITERAL)
    )
    still = [build_form(name, config.embedding_dim).encoder.eval() for name in (BARE, INLINE)]
    views = torch.randn(2, batch, 3, size, size)
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
        "views": lambda: ours(images[:batch], m.generator("bench")),
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
    m.setup("cpu")
    forms = list(FORMS)
    torch.manual_seed(0)
    parts, parameters = step_parts(config)
    # A fork server imports torch once, and forks every process from there.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["mlvicx"])
    rows = {}
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for name in forms:
            rows[name] = pool.submit(measure_form, name, config).result()
    turns = [
        {name: seconds(call) for name, call in parts.items()} for _ in range(config.repeats + 1)
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
    return dict(found, steps=measured, parts=rows, operators=operators(config))


# ---- whole training steps


class Training:
    """A pre-training on images of noise, step by step as `pretrain` runs it.

    Args: given: settings of `pretrain`, such as context, graph and compile.
    """

    def __init__(self, config, batch, device, literal=False, **given):
        given.update(data="nih", size=config.size, embedding_dim=config.embedding_dim)
        settings = m.make_config("pretrain", m.PretrainConfig, given)
        self.device, self.literal, self.amp = device, literal, m.resolve_amp(device, "auto")
        self.weights = m.select(settings, *m.LOSS_WEIGHTS)
        with device:  # weights are drawn where they are used
            if literal:
                self.model = build_form(LITERAL, config.embedding_dim)
                self.amp, self.weights["covariance"] = "off", m.covariance_literal
            else:
                self.model = m.build_model(settings).to(memory_format=torch.channels_last)
        self.called = m.for_training(self.model, device, compile=settings.compile)
        self.optimizer = m.LARS(self.model.parameters(), settings.lr, settings.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)
        self.random = m.RandomViews(config.size)
        self.images = torch.randint(256, (batch, 256, 256)).byte()
        self.params = self.random.draw(batch, 256, m.generator("bench"))
        self.run = self.step
        if device.type == "cuda":
            self.images = self.images.pin_memory()
            self.params = {name: value.pin_memory() for name, value in self.params.items()}
            if settings.graph and not literal:
                self.run = m.GraphedStep(self.step, self.model, self.optimizer)

    def views(self, images, params):
        """Two views of every image."""
        views = self.random(images.to(self.device, non_blocking=True), params=params)
        if self.literal:
            return [view.contiguous() for view in views]
        return views

    def update(self, views, lr):
        """One update of the weights."""
        model, optimizer, scaler = self.called, self.optimizer, self.scaler
        return m.train_step(model, optimizer, scaler, *views, lr, self.amp, **self.weights)

    def step(self, images, params, lr):
        return self.update(self.views(images, params), lr)

    def __call__(self):
        return self.run(self.images, self.params, 0.1)


def bare_step(config, batch, device, captured):
    """Forward and backward of a two-view ResNet-18 on ready views, as a call."""
    with device:
        model, views = build_form(BARE, 0), torch.rand(2, batch, config.size, config.size)
    views = [m.normalise(view) for view in views]

    def step():
        model.zero_grad()
        with m.autocast(device, "auto"):
            z = model(*views)
        m.mlvicx_loss(*z)[0].backward()

    if not captured:
        return step
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Operators(TorchDispatchMode):
    """Counts operators, but for those that only look at memory in another way.

    Those that would make a CPU wait for a GPU are counted by name as well: numbers read from a
    tensor, sizes that depend on data, tensors made of Python's numbers, copies from other devices.
    """

    LOOKS = "detach view _unsafe_view unsqueeze squeeze select expand transpose permute lift_fresh"
    BLOCKS = ("_local_scalar_dense", "nonzero", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.count, self.blocking = 0, collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        self.count += name not in self.LOOKS.split()
        if name in self.BLOCKS or (name == "_to_copy" and kwargs.get("device") is not None):
            self.blocking[name] += 1
        return func(*args, **kwargs)


def operators(config):
    """What Python asks of the device in a step, counted on a CPU in float32 at batch 2."""
    run, found = Training(config, 2, torch.device("cpu")), {}
    for _ in range(2):  # the first step makes the state of the optimiser as well
        with Operators() as of_views:
            views = run.views(run.images, run.params)
        with Operators() as of_step:
            run.update(views, 0.1)
    for name, counted in (("views", of_views), ("training step", of_step)):
        found[name] = {"operators": counted.count, "blocking": dict(counted.blocking)}
    return found


def count_kernels(call):
    """Kernels and copies of a step on the GPU, and how often the CPU waits for it."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        call()
        torch.cuda.set_sync_debug_mode("default")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    kernels = sum(event.device_type.name == "CUDA" for event in profiler.events())
    return {"kernels": kernels, "waits": sum("synchroniz" in str(w.message) for w in caught)}


def time_steps(call, batch, device, repeats):
    """What a step costs: in all when they follow each other, and alone in Python."""

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    def several():
        for _ in range(repeats):
            call()
        wait()

    taken, host = seconds(several) / repeats, []
    for _ in range(3):
        host.append(seconds(call))
        wait()
    row = {"ms": 1e3 * taken, "host_ms": 1e3 * min(host), "images_per_second": batch / taken}
    return dict(row, hours_of_300_epochs=300 * 86524 * taken / batch / 3600)


def measure_training(config, batch, name, device):
    """One row: a form of the step at one batch size."""
    torch.manual_seed(0)
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started, repeats = time.perf_counter(), config.repeats
    if name in (BARE, CAPTURED):
        call = bare_step(config, batch, device, name == CAPTURED)
    else:
        call = Training(config, batch, device, **TRAININGS[name])
    warm_up = 6
    if name == LITERAL or device.type == "cpu":
        warm_up, repeats = 1, 2
    for _ in range(warm_up):  # in which a graph is recorded as well
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - started
    row = dict(time_steps(call, batch, device, repeats), seconds_until_warm=first)
    if device.type == "cuda":
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if name.startswith("graph"):
            row["graph_in_use"] = call.run.graph is not None
        if name in COUNTED:
            row.update(count_kernels(call))
    return row


def measure_pretrain(config, batch, device):
    """`pretrain` as a user runs it, two epochs on a prepared set of noise."""
    count, rng = config.images, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "noise"
        folder.mkdir()
        np.save(folder / "images.npy", rng.integers(0, 256, (count, 256, 256), np.uint8))
        table = pd.DataFrame({"image": range(count), "patient": range(count), "split": "train"})
        table.loc[::20, "split"] = "val"
        table.to_csv(folder / "labels.csv", index=False)
        meta = {"name": "noise", "size": 256, "images": count, "findings": []}
        m.write_json(folder / "meta.json", dict(meta, images_sha256="noise"))
        words = f"--data {folder} --out {place}/run --epochs 2 --knn-every 0 --device {device}"
        words += f" --size {config.size} --embedding-dim {config.embedding_dim}"
        call = [sys.executable, "mlvicx.py", "pretrain", *words.split(), "--batch-size", str(batch)]
        started = time.perf_counter()
        done = subprocess.run(call, cwd=HERE.parent, capture_output=True, text=True)
        taken = time.perf_counter() - started
    rates = [int(rate) for rate in re.findall(r"(\d+) images/s", done.stdout)]
    if len(rates) < 2:
        raise RuntimeError(done.stdout[-500:] + done.stderr[-500:])
    # A line counts from the start: the first has the start-up, the second the time of both epochs.
    second = 1 / (2 / rates[1] - 1 / rates[0])
    row = {"images_per_second_printed": rates, "images_per_second_of_epoch_2": second}
    return dict(row, seconds_of_the_command=taken)


def compare(rows, batch):
    """Adds to the rows of a batch size how they compare with the bare step and the literal form."""
    of_batch = {name: row for name, row in rows.items() if name.startswith(f"batch {batch}, ")}
    for key, other in (("over_bare", BARE), ("over_captured", CAPTURED), ("literal_over", LITERAL)):
        base = of_batch.get(f"batch {batch}, {other}", {}).get("ms")
        for row in of_batch.values():
            if base and "ms" in row:
                row[key] = row["ms"] / base
                if other == LITERAL:
                    row[key] = base / row["ms"]


def training(config):
    """What a training step costs, whole and form by form. Returns: a dict for JSON."""
    device, _, _ = m.setup(config.device)
    torch.backends.cudnn.benchmark = True
    large, small = config.batches
    plan = [(b, name) for b in (large, small) for name in (BARE, CAPTURED, "graph", "eager")]
    plan += [(large, "pretrain"), (large, "eager, counted"), (small, "eager, counted")]
    plan += [(large, "graph, compiled"), (small, LITERAL), (large, "graph, inline")]
    plan += [(large, "graph, none"), (large, "graph, VICReg"), (small, "graph, compiled")]
    plan += [(small, "graph, inline"), (small, "graph, none"), (small, "graph, VICReg")]
    rows, found = {}, {"device": str(device), "training": {}}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name()
    else:  # without graphs, and without the minute in which blocks are compiled
        plan = [(b, name) for b, name in plan if "graph" not in name and name != CAPTURED]
    for batch, name in plan:
        key, row = f"batch {batch}, {name}", {"left_out": f"--limit {config.limit}"}
        if time.perf_counter() - STARTED + EXPECTED.get(name, 6) < config.limit:
            try:
                if name == "pretrain":
                    row = measure_pretrain(config, batch, device)
                else:
                    row = measure_training(config, batch, name, device)
            except RuntimeError as e:  # one form that fails takes no other with it
                row = {"failed": str(e)[-1000:]}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        rows[key] = row
        compare(rows, batch)
        row = {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}
        print(f"[{time.perf_counter() - STARTED:5.1f} s] {key}: {json.dumps(row)}", flush=True)
        found["training"] = rows
        save(config, found)
    print(pd.DataFrame(rows).T.to_string(float_format="{:.4g}".format, na_rep=""))
    return found


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


def save(config, found):
    """Writes to `--out` what was found, and under which circumstances. Returns: both."""
    result = {"command": sys.argv[1:], "threads": torch.get_num_threads()}
    result.update(provenance=m.provenance(), config=vars(config))
    result.update(found)
    if config.out:
        m.write_json(config.out, result)
    return result


def main(argv=None):
    """Measures one thing, prints it and writes it to `--out`. Returns: what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", default="", choices=["", *MEASURES])
    parser.add_argument("raw", nargs="?", default="", help="folder with PNGs, for preparation")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32, help="of steps")
    parser.add_argument("--batches", type=int, nargs=2, default=(256, 64), help="of training")
    parser.add_argument("--embedding-dim", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=0, help="of a step; 0: 3, 20 on a GPU")
    parser.add_argument("--images", type=int, default=20000, help="that pretrain trains on")
    parser.add_argument("--limit", type=float, default=150, help="seconds that training may take")
    parser.add_argument("--device", default="auto", help="of training")
    parser.add_argument("--amp", default="off", choices=("off", "bf16", "fp16"), help="of steps")
    parser.add_argument("--out", default="", help="JSON file to write")
    config = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    config.what = config.what or {True: "training", False: "steps"}[on_gpu]
    config.repeats = config.repeats or {True: 20, False: 3}[on_gpu]
    if config.out:  # before minutes of measuring
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    result = save(config, MEASURES[config.what](config))
    print(json.dumps(result, indent=1))
    return result


MEASURES = {"steps": steps, "training": training}
MEASURES.update(evaluation=evaluation, preparation=preparation)

if __name__ == "__main__":
    main()
