"""What training costs, as ratios within one run.

    python notebooks/bench.py                 # on a GPU if there is one, else on a CPU
    python notebooks/bench.py --device cpu

`--out FILE` writes the figures as JSON. The fast forms run as in training: channels-last, with
autocast if `--amp` says so. The literal form runs as it is defined: float32, the default layout and
allocator, one view after the other. Nothing else may run beside it.

On a CPU, forward and backward of each form are measured in a process of its own, then the parts of a
step; the least of several times counts. On a GPU, whole training steps are measured, then `pretrain`
itself. Such a step makes two views of uint8 images in host memory, and changes the weights; the bare
two-view ResNet-18 and the literal form run forward and backward alone. The most important figures
come first, each is written as it is found, and what would not end within `--limit` seconds is left
out.
"""

import argparse
import functools
import gc
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

STARTED = time.perf_counter()
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import numpy as np
import pandas as pd
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import mlvicx as m

BARE, INLINE, SIDE, NONE = "two-view ResNet-18", "MLVICX, inline", "MLVICX, side", "MLVICX, none"
LITERAL, CAPTURED = "literal, float32", "two-view ResNet-18, captured"
KEPT = "literal, memory kept"  # with `keep_memory`, as all but the literal form have it
FORMS = [BARE, NONE, SIDE, INLINE, LITERAL, KEPT]
FORWARD = ["encoder", "context-bottlenecks", "heads", "losses"]
TRAINING = {  # forms of the training step, as settings of `pretrain`; the default is side
    "eager": {"graph": False},
    "graph": {},
    "graph, inline": {"context": "inline"},
    "graph, none": {"context": "none"},
    "graph, VICReg": {"context": "none", "local_weight": 0.0, "final_bn": False},
    "graph, compiled": {"compile": True},
}
EXPECTED = {"pretrain": 40, "graph, compiled": 50, LITERAL: 15}  # seconds; of the others 5
COUNTED = ("eager", "graph, compiled")  # late, for the profiler may slow what follows it


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
        return float("nan")


def seconds(call):
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# ---- forms of the model, parts of a step


def build_form(name, embedding_dim):
    """The model of one row of the table."""
    if name in (LITERAL, KEPT):
        return LiteralMLVICX(embedding_dim, context="inline")
    if name.startswith(BARE):
        model = m.MLVICX(context="none", local=False)
        model.global_head.mlp = torch.nn.Sequential()  # no heads: the loss sees h itself
    else:
        model = m.MLVICX(embedding_dim, context=name.split(", ")[1])
    return model.to(memory_format=torch.channels_last)


def form_step(name, config, batch, device, amp):
    """Forward and backward of one form on ready views, as a call."""
    covariance = m.covariance_loss
    with device:
        model = build_form(name, config.embedding_dim)
        views = torch.rand(2, batch, config.size, config.size)
    views = [m.normalise(view) for view in views]
    if name in (LITERAL, KEPT):
        views = [view.contiguous() for view in views]
        amp, covariance = "off", m.covariance_literal

    def step():
        model.zero_grad()
        with m.autocast(device, amp):
            z = model(*views)
        m.mlvicx_loss(*z, covariance=covariance)[0].backward()

    return step


def measure_form(name, config):
    """Least seconds of forward and backward, and peak memory in MB above the idle process.

    `peak_mb`: in use at once; `resident_mb`: with what is kept.
    """
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    step = form_step(name, config, config.batch_size, torch.device("cpu"), config.amp)
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


def step_parts(config, device):
    """The parts of a step, as calls by name, and the parameters of the modules."""
    batch, size = config.batch_size, config.size
    amp = m.autocast(device, config.amp)
    bare, model = (build_form(name, config.embedding_dim) for name in (BARE, INLINE))
    still = [build_form(name, config.embedding_dim).encoder.eval() for name in (BARE, INLINE)]
    views = torch.randn(2, batch, 3, size, size)
    images = torch.randint(256, (16 * batch, 256, 256)).byte()
    collate = functools.partial(torchvision_views, size=size)
    theirs = torch.utils.data.DataLoader(images, batch, num_workers=2, collate_fn=collate)
    ours, blocks = m.RandomViews(size), model.encoder.context
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with torch.no_grad(), amp:
        encoded = [model.encoder(view) for view in views]
        h, maps = zip(*encoded, strict=True)
        z = model(*views)

    def project_all():
        m.project(model.global_head.mlp, torch.cat(h))
        m.project(model.local_head.mlp, torch.cat([model.local_head.pool(view) for view in maps]))

    def all_blocks():
        for view in maps:
            for block, x in zip(blocks.values(), view, strict=True):
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
        "read": lambda: images[16 * torch.arange(batch)],
        "views": lambda: ours(images[:batch], m.generator("bench")),
        "views, torchvision": lambda: list(theirs),
        "losses": lambda: m.mlvicx_loss(*z),
        "LARS": m.LARS(model.parameters()).step,
    }
    parts.update({name: torch.no_grad()(call) for name, call in others.items()})
    modules = {"backbone": bare, "blocks": blocks}
    modules.update({"global head": model.global_head, "local head": model.local_head})
    return parts, {k: sum(p.numel() for p in v.parameters()) for k, v in modules.items()}


def steps(config, device):
    """What each form of the model and each part of a step costs. Returns: a dict for JSON."""
    torch.manual_seed(0)
    parts, parameters = step_parts(config, device)
    # A fork server imports torch once, and forks every process from there.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlvicx"])
    rows = {}
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for name in FORMS:
            rows[name] = pool.submit(measure_form, name, config).result()
    for name, call in parts.items():
        rows[name] = {"seconds": min(seconds(call) for _ in range(config.repeats + 1))}
    table = pd.DataFrame(rows).T
    table.loc["views, torchvision", "seconds"] /= 16  # it ran over sixteen batches
    table.loc[LITERAL, "peak_mb"] = table["peak_mb"][KEPT]  # the same model
    t = table["seconds"]
    form, forward = t[FORMS], t[FORWARD].sum()
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
    print(table.to_string(float_format="{:.4g}".format, na_rep=""))
    rows = json.loads(table.to_json(orient="index", double_precision=15))
    measured = {name: rows.pop(name) for name in FORMS}
    found = {"ratios": ratios, "parameters": parameters, "multiply_adds": multiply_adds}
    return dict(found, steps=measured, parts=rows, operators=operators(config))


# ---- whole training steps


def whole_step(config, batch, device, name):
    """A step of `pretrain` on images of noise, as a call without arguments."""
    given = dict(TRAINING[name], data="nih", batch_size=batch)
    given.update(size=config.size, embedding_dim=config.embedding_dim)
    settings = m.make_config("pretrain", m.PretrainConfig, given)
    amp, weights = m.resolve_amp(device, "auto"), m.select(settings, *m.LOSS_WEIGHTS)
    with device:  # the weights are drawn where they are used
        model = m.build_model(settings).to(memory_format=torch.channels_last)
    called = m.for_training(settings, model, device)
    optimizer = m.LARS(model.parameters())
    scaler, views = torch.amp.GradScaler(device.type, enabled=False), m.RandomViews(config.size)
    images = torch.randint(256, (batch, 256, 256)).byte()
    params = views.draw(batch, 256, m.generator("bench"))

    if device.type == "cuda":
        images = images.pin_memory()
        params = {key: value.pin_memory() for key, value in params.items()}

    def step():
        pair = views(images.to(device, non_blocking=True), params=params)
        return m.train_step(called, optimizer, scaler, *pair, 0.1, amp, **weights)

    return step


def captured(call):
    """The same call as a CUDA graph."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # algorithms are chosen before anything is recorded
        call()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure_step(config, batch, name, device):
    """What one form of the step costs at one batch size. Returns: a dict."""
    torch.manual_seed(0)
    torch.compiler.reset()
    wait, warm_up, repeats = torch.cpu.synchronize, 1, 2
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        wait, warm_up, repeats = torch.cuda.synchronize, 5, 12
    if name in TRAINING:
        call = original = whole_step(config, batch, device, name)
    else:
        call = original = form_step(name, config, batch, device, "auto")
    if name == CAPTURED:
        call = captured(original)
    for _ in range(warm_up):  # in which a graph is recorded as well
        call()
    wait()

    # Steps that follow each other; then what one of them keeps Python busy.
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    taken = (time.perf_counter() - started) / repeats
    row = {"ms": 1e3 * taken, "host ms": 1e3 * seconds(call), "images/s": batch / taken}
    row["hours of 300 epochs"] = 300 * 86524 / 3600 * taken / batch
    wait()
    if device.type == "cuda":
        row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    if name in COUNTED and device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            call()
            wait()
        row["kernels"] = sum(e.device_type.name == "CUDA" for e in profiler.events())
    return row


def measure_pretrain(config, batch, device):
    """`pretrain` as a user runs it: two epochs of a prepared set of noise. Returns: a dict."""
    count, noise = config.images, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        np.save(f"{place}/images.npy", noise.integers(0, 256, (count, 256, 256), np.uint8))
        table = pd.DataFrame({"image": range(count), "patient": range(count), "split": "train"})
        table.loc[::20, "split"] = "val"
        table.to_csv(f"{place}/labels.csv", index=False)
        meta = {"name": "noise", "size": 256, "images": count, "findings": []}
        m.write_json(f"{place}/meta.json", dict(meta, images_sha256="noise"))
        words = f"--data {place} --out {place}/run --epochs 2 --knn-every 0 --batch-size {batch}"
        words += f" --device {device} --size {config.size} --embedding-dim {config.embedding_dim}"
        call, started = [sys.executable, "mlvicx.py", "pretrain", *words.split()], time.time()
        done = subprocess.run(call, cwd=HERE.parent, stdout=subprocess.PIPE, text=True, check=True)
        taken = time.time() - started
    rates = [int(rate) for rate in re.findall(r"(\d+) images/s", done.stdout)]
    # Each line counts from the start of the training, so the first has its warm-up in it.
    second = 1 / max(2 / rates[1] - 1 / rates[0], 1e-9)
    row = dict(zip(("images/s, epoch 1", "images/s, both epochs"), rates, strict=True))
    return dict(row, **{"images/s, epoch 2": second, "seconds of the command": taken})


def plan(large, small, cuda):
    """What `training` measures, in this order: pairs of a batch size and the name of a row."""
    main, forms = (BARE, CAPTURED, "graph"), ("graph, inline", "graph, none", "graph, VICReg")
    pairs = [(batch, name) for batch in (large, small) for name in main]
    pairs += [(large, "pretrain"), (small, "eager"), (large, "eager"), (small, LITERAL)]
    pairs += [(large, "graph, compiled"), *((large, name) for name in forms)]
    pairs += [(small, "graph, compiled"), *((small, name) for name in forms)]
    return [(b, name) for b, name in pairs if cuda or name in (BARE, "eager", LITERAL, "pretrain")]


def training(config, device):
    """What a training step costs, whole and form by form. Returns: a dict for JSON."""
    torch.backends.cudnn.benchmark = True
    cuda, rows = device.type == "cuda", {}
    found = {"device": torch.cuda.get_device_name() if cuda else "CPU", "training": rows}
    for batch, name in plan(*config.batches, cuda):
        now = time.perf_counter() - STARTED
        if now + EXPECTED.get(name, 5) > config.limit:
            continue
        try:
            if name == "pretrain":
                row = measure_pretrain(config, batch, device)
            else:
                row = measure_step(config, batch, name, device)
        except (RuntimeError, subprocess.CalledProcessError) as e:  # which spares the others
            row = {"failed": str(e)[-1000:]}
        for other in (BARE, CAPTURED, "graph"):
            base = rows.get(f"batch {batch}, {other}", {})
            if "ms" in row and "ms" in base:
                row[f"over {other}"] = row["ms"] / base["ms"]
        rows[f"batch {batch}, {name}"] = row
        print(f"batch {batch}, {name}, begun after {now:.0f} s:")
        print(pd.DataFrame([row]).to_string(index=False, float_format="{:.4g}".format), flush=True)
        save(config, found)
        gc.collect()
        torch.cuda.empty_cache()
    return found


# ---- what Python asks of the device


class Operators(TorchDispatchMode):
    """Counts operators, except those that only look at memory in another way.

    Those that make Python wait for a GPU are listed: a number is read from a tensor, a size depends
    on data, a tensor is made of Python's numbers and must be copied.
    """

    count, blocking = 0, ()
    LOOKS = "detach view _unsafe_view unsqueeze squeeze select expand transpose permute lift_fresh"
    LOOKS += " t slice split unbind"
    BLOCKS = "_local_scalar_dense nonzero masked_select lift_fresh"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, indices = func.overloadpacket.__name__, ()
        if name in ("index", "index_put_"):
            indices = [index for index in args[1] if index is not None]
        masked = any(index.dtype == torch.bool for index in indices)
        self.count += name not in self.LOOKS.split()
        if masked or name in self.BLOCKS.split():
            self.blocking += (name,)
        return func(*args, **(kwargs or {}))


def operators(config):
    """Operators of the second training step on a CPU, which has the state of the optimiser."""
    model = build_form(SIDE, config.embedding_dim)
    optimizer, scaler = m.LARS(model.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    random, images = m.RandomViews(config.size), torch.randint(256, (2, 256, 256)).byte()
    params = random.draw(2, 256, m.generator("bench"))
    for _ in range(2):
        with Operators() as in_views:
            views = random(images, params=params)
        with Operators() as in_step:
            m.train_step(model, optimizer, scaler, *views, 0.1)
    found = {"views": in_views.count, "training step": in_step.count}
    return dict(found, blocking=in_views.blocking + in_step.blocking)


def save(config, found):
    """Writes to `--out` what was found, and under which circumstances. Returns: both."""
    about = {"command": sys.argv[1:], "threads": torch.get_num_threads()}
    result = dict(about, provenance=m.provenance(), config=vars(config), **found)
    if config.out:
        m.write_json(config.out, result)
    return result


def main(argv=None):
    """Measures, prints the figures and writes them to `--out`. Returns: what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32, help="on a CPU")
    parser.add_argument("--batches", type=int, nargs=2, default=(256, 64), help="on a GPU")
    parser.add_argument("--embedding-dim", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3, help="on a CPU; the least time counts")
    parser.add_argument("--images", type=int, default=20000, help="of pretrain, on a GPU")
    parser.add_argument("--limit", type=float, default=140, help="seconds, on a GPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", default="off", choices=("off", "bf16", "fp16"), help="on a CPU")
    parser.add_argument("--out", default="", help="JSON file to write")
    config = parser.parse_args(argv)
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)  # before minutes of measuring
    device = m.setup(config.device)
    measure = training if device.type == "cuda" else steps
    result = save(config, measure(config, device))
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
