"""The runs behind notebook 06 and the tables of the README; started again, it goes on.

    python notebooks/experiments.py variants         # ablations on the demo set: variants.csv
    python notebooks/experiments.py demo             # methods x labels x modes: demo.json
    python notebooks/experiments.py real             # the same on real X-rays: real.json
    python notebooks/experiments.py transfer         # pre-trained without the judged set
    python notebooks/experiments.py floors           # what 16 x 16 pixels alone give: floors.json
    python notebooks/experiments.py supervised       # what all labels give: supervised.json
    python notebooks/experiments.py tables           # all of it as tables: tables.md
    python notebooks/experiments.py failures         # logs that notebook 03 diagnoses
    python notebooks/experiments.py nih              # the study on real X-rays, for a GPU
    python notebooks/experiments.py nih-tables       # its results as tables, and their analysis

Each run is a command of mlvicx.py; what it finds goes to notebooks/results/, and what is there is
not made again. Several processes may be started together: they share the work. `real` needs
data/kermany, data/shenzhen and data/nih256, prepared by `python data_prep.py folder`.
A pre-training takes three to ten minutes on two cores.

The study `nih` reads four sets under data/, prepared at 96 px: `nih128`, 9,998 images of NIH
ChestX-ray14 (all of patients 1336 to 3923 but eight images), which `nih-part` makes from data/nih
(`python data_prep.py nih --size 96`), with patients split as in results/nih_split.json; `rsna256`,
1,008 images of RSNA; `kermany`; `shenzhen`, with its lung masks; and for the heatmaps `nihbox256`,
the NIH images that have boxes, with boxes.csv. A unit is a pre-training, or one kind of evaluation
of one encoder. Units run in parallel processes (--workers), those that matter most first; a unit
that is done is not run again; at the end, or after --minutes, they are packed into --out.
"""

import argparse
import contextlib
import gc
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import mlvicx as m

RESULTS, RUNS = HERE / "results", Path("runs/experiments")
COMMON = "--amp bf16 --knn-every 1"  # bf16 halves the time on a CPU that has it
VICREG = "--context none --local-weight 0"
RANDOM = {"random": "--context inline", "random, no blocks": "--context none"}
METHODS = RANDOM | {
    "VICReg": f"{VICREG} --no-final-bn",
    "VICReg, last BatchNorm": VICREG,
    "MLVICX": "--context inline",
    "MLVICX, side": "--context side",
}
# The ablations keep the recipe at which the sweep began; the preset has since become another.
ABLATION = "--jitter 0.2 --context inline"
REPEATED = {  # three pre-trainings each
    "random": None,
    "reference": "",
    "VICReg": f"{VICREG} --no-final-bn",
    "VICReg, last BatchNorm": VICREG,
    "no blocks": "--context none",
    "channel alone": "--attention channel",
    "spatial alone": "--attention spatial",
    "blocks at the side": "--context side",
    "side, jitter 0.4": "--context side --jitter 0.4",
    "level 5 alone": "--levels 5",
    "blocks, lambda 0": "--local-weight 0",
    "identical views": "--identical-views",
    "no variance": "--std-coeff 0",
    "no covariance": "--cov-coeff 0",
    "no last BatchNorm": "--no-final-bn",
}
ONCE = {  # one pre-training each
    "lambda 0.25": "--local-weight 0.25",
    "lambda 4": "--local-weight 4",
    "alpha 5": "--sim-coeff 5",
    "alpha 125": "--sim-coeff 125",
    "beta 5": "--std-coeff 5",
    "beta 125": "--std-coeff 125",
    "gamma 0.2": "--cov-coeff 0.2",
    "gamma 5": "--cov-coeff 5",
    "no jitter": "--jitter 0",
    "jitter 0.4": "--jitter 0.4",
    "jitter 0.6": "--jitter 0.6",
    "no crop": "--crop-min 1",
    "crop from 0.08": "--crop-min 0.08",
    "blur 2": "--blur 2",
    "rotation 15": "--rotation 15",
    "solarize 0.2": "--solarize 0.2",
}
SHARES = (0.01, 0.1, 0.3, 1)
COLUMNS = [*itertools.product(("frozen", "finetune"), SHARES)]
# Epochs of fine-tuning, and of a decoder, by share of labels: few images need more of them.
EPOCHS = {"classify": {0.01: 12, 0.1: 10, 0.3: 6, 1: 4}, "segment": {0.1: 40, 0.3: 20, 1: 12}}
# The demo preset's rates for real X-rays, with milder crops than the authors'.
REAL = "--size 64 --epochs 3 --lr 0.008 --trust 1 --warmup-epochs 0.5 --embedding-dim 512"
REAL += " --crop-min 0.5 --jitter 0.4 --blur 0 --solarize 0"
TASKS = {  # what is judged: command, flags, shares of labels
    "demo": ("classify", "--data demo", SHARES),
    "kermany": ("classify", "--data kermany --findings Bacterial,Viral --size 64", SHARES),
    "shenzhen": ("classify", "--data shenzhen --size 64", SHARES[1:]),
    "nih256": ("classify", "--data nih256 --findings Pneumonia --size 64", SHARES[1:]),
    "lungs": ("segment", "--data shenzhen --size 64", SHARES[1:]),
}
# Sets to pre-train on, their flags, the tasks judged with the result, the methods compared.
STUDIES = {
    "demo": ("demo", "", ("demo",), METHODS),
    "real": (
        "kermany,shenzhen,nih256",
        REAL,
        ("kermany", "shenzhen", "nih256", "lungs"),
        ("random", "VICReg", "VICReg, last BatchNorm", "MLVICX"),
    ),
    "transfer": ("kermany,nih256", REAL, ("shenzhen",), ("MLVICX",)),
}

# Runs of notebook 03, by name of the log: images, and what differs from the demo preset.
SMALL = "--size 32 --embedding-dim 64 --batch-size 32 --context side --lr 0.016 --knn-every 0"
FAILURES = {
    "gentle": (320, "--epochs 3"),
    "strong_views": (320, "--epochs 3 --crop-min 0.02 --jitter 1 --blur 4 --solarize 1"),
    "few_images": (32, "--epochs 40 --lr 0.02 --crop-min 0.95 --jitter 0.05"),
}


def command(words):
    """Runs one command of mlvicx.py from its words."""
    given = vars(m.build_parser().parse_args(words.split()))
    cls, run = m.COMMANDS[given["command"]]
    return run(m.make_config(given.pop("command"), cls, given))


def folder(*names):
    """Run folder of one job."""
    return RUNS / "-".join(str(name).replace(", ", "-").replace(" ", "-") for name in names)


def pretrained(study, method, flags, seed):
    """Pre-trains once and for all; returns the encoder file."""
    data, common = STUDIES[study][:2]
    out = folder(study, method, seed)
    if not (out / "done").exists():
        command(f"pretrain --data {data} {common} {COMMON} {flags} --seed {seed} --out {out}")
        (out / "done").touch()
    return f"{out}/encoder.pt"


def jobs(study):
    """Every job that a table lacks, as (function without arguments, name), pre-trainings first."""
    modes = ("frozen",) if study == "transfer" else ("frozen", "finetune")
    tasks, methods = STUDIES[study][2:]
    cells = [
        (task, mode, share, method)
        for mode, task in itertools.product(modes, tasks)
        for share, method in itertools.product(TASKS[task][2], methods)
    ]
    known = finished(study)
    cells = [cell for cell in cells if cell not in known]
    for seed in range(3):
        for method in dict.fromkeys(cell[-1] for cell in cells if cell[-1] not in RANDOM):
            yield lambda a=(method, METHODS[method], seed): pretrained(study, *a), (method, seed)
    for cell in cells:
        yield lambda cell=cell: judge(study, *cell), cell


def judge(study, task, mode, share, method):
    """One cell of a table: three pre-trainings, or three random initialisations."""
    out, (verb, flags, _) = folder(study, task, mode, share, method), TASKS[task]
    if (task, mode, share, method) in finished(study):
        return
    made = [folder(study, method, seed) for seed in range(3)]
    if method not in RANDOM and not all((p / "done").exists() for p in made):
        raise m.UserError("its pre-trainings are not finished")
    words = f"{verb} {flags} --mode {mode} --labels {share:g} --amp bf16 "
    words += "--seeds 3 " * (study == "demo" and mode == "frozen")  # three subsets of the labels
    words += "--weights "
    if method in RANDOM:
        words += f"random,random,random {RANDOM[method]}"
    else:
        words += ",".join(f"{p}/encoder.pt" for p in made)
    if mode == "finetune" or verb == "segment":
        words += f" --epochs {EPOCHS[verb][share]}"
    found = command(f"{words} --out {out}")
    entry = {"study": study, "task": task, "method": method, "command": words} | found
    entry["task"] = task
    if verb == "classify":
        entry["groups"] = group_means(out, m.PreparedData(flags.split()[1]))
    m.write_json(out / "entry.json", entry)


def group_means(out, data):
    """Test AUROC, mean over coarse and over fine findings: mean, std, and value of each encoder."""
    y, found, groups = data.labels[data.indices("test")], {}, data.meta.get("groups", {})
    units = sorted(out.glob("unit-*.npy")) if groups else []
    runs = [m.finding_aurocs(np.load(path), y)[1:] for path in units]
    for group, names in groups.items():
        means = [np.mean([run[data.findings.index(name)] for name in names]) for run in runs]
        each = np.reshape(means, (3, -1)).mean(1)  # over the subsets of an encoder
        found[group] = {"mean": np.mean(each), "std": np.std(each, ddof=1), "each": each.tolist()}
    return found


def table(study):
    """Does every job of a table that is not done, then writes results/<study>.json."""
    left = [*jobs(study)]
    while left:
        todo, left = left, []
        for job, name in todo:
            try:
                job()
            except m.UserError as e:  # another process is at it, or has to come first
                print(*name, "waits:", e)
                left.append((job, name))
            collect(study)
        time.sleep(5 * bool(left))


def finished(study):
    """The cells in results/<study>.json and in run folders, by task, mode, share and method."""
    path = RESULTS / f"{study}.json"
    cells = json.loads(path.read_text()) if path.exists() else []
    cells += [json.loads(p.read_text()) for p in RUNS.glob(f"{study}-*/entry.json")]
    return {(c["task"], c["mode"], c["labels"], c["method"]): c for c in cells}


def collect(study):
    """Gathers the finished cells, one a line."""
    cells = finished(study)
    lines = [json.dumps(cells[key]) for key in sorted(cells, key=lambda k: str(folder(*k)))]
    with m.replacing(RESULTS / f"{study}.json") as f:
        f.write(("[\n" + ",\n".join(lines) + "\n]\n").encode())


def variant_rows(name, flags, seed):
    """Pre-trains one variant with one seed and probes it: a row for every share of labels."""
    out, metrics = folder("variant", name, seed), {}
    weights = "random"
    if flags is not None:
        command(f"pretrain {COMMON} {ABLATION} {flags} --seed {seed} --out {out}")
        weights = f"{out}/encoder.pt"
        last = m.pd.read_csv(out / "metrics.csv").iloc[-1]
        metrics = {k: last.get(k) for k in ("rank_global", "rank_local", "knn_auroc", "val_loss")}
    groups = m.PreparedData("demo").meta["groups"]
    for share in SHARES:
        words = f"classify --weights {weights} --labels {share} --seed {seed} --out {out}-{share}"
        found = command(f"{words} --overwrite")["test"]
        auroc = {k: v["auroc"]["mean"] for k, v in found["per_finding"].items()}
        precision = {f"AP {k}": v["average_precision"] for k, v in found["per_finding"].items()}
        means = {g: sum(auroc[k] for k in names) / len(names) for g, names in groups.items()}
        row = {"variant": name, "flags": flags or "", "seed": seed, "labels": share}
        yield row | {"mean": found["mean_auroc"]["mean"]} | means | auroc | precision | metrics


def variants(names):
    """Appends the rows that results/variants.csv lacks; seed 0 of every variant comes first."""
    path, known = RESULTS / "variants.csv", REPEATED | ONCE
    for seed in range(3):
        for name in names or known:
            done = m.pd.read_csv(path)
            if name in ONCE and seed or ((done.variant == name) & (done.seed == seed)).any():
                continue
            try:
                rows = m.pd.DataFrame(variant_rows(name, known[name], seed))
            except m.UserError as e:
                print(f"left to another process: {e}")
                continue
            rows = rows.reindex(columns=done.columns).round(5)
            with open(path, "a") as f:
                f.write(rows.to_csv(index=False, header=False))


def floors():
    """Test AUROC of a ridge on 16 x 16 pixels, and Dice of the mean mask, on the same splits."""
    from sklearn.linear_model import Ridge  # here, for it takes a second

    found = {}
    for task, (verb, flags, _) in TASKS.items():
        words = flags.split()
        data = m.PreparedData(words[1])
        train, val, test = (data.indices(s) for s in ("train", "val", "test"))
        if verb == "segment":
            train, val, test = (r[m.torch.from_numpy(data.has_mask[r])] for r in (train, val, test))
            mean = data.masks[train].float().mean(0)
            levels = np.arange(0.05, 1, 0.05)
            best = max(levels, key=lambda t: dices(mean > t, data.masks[val])[0])
            names = ("dice_all", "dice_positive", "dice_pooled", "dice_blank", "iou_pooled")
            found[task] = dict(zip(names, dices(mean > best, data.masks[test]), strict=True))
            continue
        small = m.resize_images(data.images, 16).flatten(1).numpy()
        names = words[3].split(",") if "--findings" in words else data.findings
        found[task] = {}
        for name in names:
            y = data.labels[:, data.findings.index(name)].numpy()
            fits = [Ridge(alpha).fit(small[train], y[train]) for alpha in 10.0 ** np.arange(-2, 4)]
            best = max(fits, key=lambda f: m.auroc(f.predict(small[val]), y[val]))
            found[task][name] = m.auroc(best.predict(small[test]), y[test])
        groups = {"mean AUROC": names}
        groups |= {f"mean of {g}": members for g, members in data.meta.get("groups", {}).items()}
        means = {g: np.mean([found[task][n] for n in members]) for g, members in groups.items()}
        found[task] |= means
    m.write_json(RESULTS / "floors.json", found)


def supervised():
    """What labels alone can do on the demo set, larger and longer: results/supervised.json."""
    words = "classify --data demo --mode finetune --weights random --context none --size 128 "
    words += "--epochs 30 --patience 10 --lr 0.001 --amp bf16"
    found = command(f"{words} --out {folder('supervised')}")
    m.write_json(RESULTS / "supervised.json", {"command": words} | found)


def failures():
    """Writes the metrics.csv of small runs, one healthy and others not, to results/logs/."""
    data = m.PreparedData("demo")
    for name, (count, flags) in FAILURES.items():
        out, kept = folder("failure", name), data.indices("train")[:count]
        out.parent.mkdir(parents=True, exist_ok=True)
        ids = out.with_suffix(".txt")
        ids.write_text("\n".join(np.delete(data.names, kept)))
        command(f"pretrain {SMALL} {flags} --exclude-ids {ids} --out {out}")
        (RESULTS / "logs" / f"{name}.csv").write_bytes((out / "metrics.csv").read_bytes())


def notebook_run(folder, runs):
    """The run of notebook 03, for 04 and 05: finished, `pretrain` has nothing left to do.

    Args: folder: prepared set; runs: where the run folder lies. Returns: the run folder.
    """
    data, quiet = m.PreparedData(folder), io.StringIO()
    run, kept = runs / f"notebook-{data.meta['name']}", data.indices("train")[:1500]
    ids = run.with_suffix(".txt")
    runs.mkdir(exist_ok=True)
    ids.write_text("\n".join(np.delete(data.names, kept)))
    given = {"data": str(folder), "out": str(run), "exclude_ids": str(ids), "size": 48, "epochs": 3}
    given |= {"batch_size": 64, "lr": 0.016, "trust": 1.0, "warmup_epochs": 0.5, "knn_every": 3}
    given |= {"embedding_dim": 256, "crop_min": 0.6, "jitter": 0.4, "blur": 0.0, "solarize": 0.0}
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        config = m.make_config("pretrain", m.PretrainConfig, given | {"context": "side"})
        return m.pretrain(config)


def spatial_maps(encoder, images):
    """Spatial attention of every context-bottleneck: (B, 3, H, W) -> list of (B, 1, H_k, W_k)."""
    maps, hooks = [], []
    for block in encoder.context.values():
        keep = lambda module, inputs, output: maps.append(output.sigmoid())
        hooks.append(block.spatial.conv.register_forward_hook(keep))
    encoder(images)
    for hook in hooks:
        hook.remove()
    return maps


def tables():
    """Writes results/tables.md: the cells of every study as one table, from which README quotes."""
    floor, out = json.loads((RESULTS / "floors.json").read_text()), []
    for path in (RESULTS / f"{study}.json" for study in STUDIES):
        cells = json.loads(path.read_text()) if path.exists() else []
        for task in dict.fromkeys(cell["task"] for cell in cells):
            here = [cell for cell in cells if cell["task"] == task]
            for name, read in measures(here[0]).items():
                head, line, *rows = grid(here, read)
                title = f"**{path.stem}, {task}: {name}**, floor {floor[task][name]:.3f}"
                out += [f"| {title} |" + " |" * len(COLUMNS), *rows]
    with m.replacing(RESULTS / "tables.md") as f:
        f.write(("# Tables\n\n" + "\n".join([head, line, *out]) + "\n").encode())


def measures(cell):
    """What a cell reports: name -> function of a cell that gives {"mean", "std"}."""
    if cell["test"].get("mean_auroc") is None:
        return {
            k: lambda c, k=k: c["test"][k] for k in ("dice_all", "dice_positive", "dice_pooled")
        }
    names = [*cell["test"]["per_finding"]]
    if len(names) <= 2:
        return {k: lambda c, k=k: c["test"]["per_finding"][k]["auroc"] for k in names}
    groups = {f"mean of {g}": lambda c, g=g: c["groups"][g] for g in cell["groups"]}
    return {"mean AUROC": lambda c: c["test"]["mean_auroc"]} | groups


def grid(cells, read):
    """Lines of a table: a row a method, a column a mode and share of labels."""
    heads = [
        f"{'fine-tuned' if mode == 'finetune' else mode} {share:.0%}" for mode, share in COLUMNS
    ]
    lines = ["| method | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for method in METHODS:
        row = {(c["mode"], c["labels"]): read(c) for c in cells if c["method"] == method}
        texts = [f"{row[k]['mean']:.3f} ± {row[k]['std']:.3f}" if k in row else "" for k in COLUMNS]
        lines += [f"| {method} | " + " | ".join(texts) + " |"] * bool(row)
    return lines


def dices(mask, masks):
    """The five numbers of `dice_metrics` for one mask given to every image."""
    return m.dice_metrics(m.mask_counts(mask.expand(len(masks), -1, -1), masks).numpy())


# ---------------------------------------------------------------- the study on NIH

# The recipe for a small budget, and what each method changes of it; None: nothing is pre-trained.
RECIPE = {"batch_size": 256, "lr": 0.2, "trust": 0.04, "crop_min": 0.3, "blur": 0.5}
COMPARED = {
    "inline": {"context": "inline"},
    "side": {"context": "side"},
    "no blocks": {"context": "none", "trust": 0.01},
    "VICReg, last BatchNorm": {"context": "none", "local_weight": 0.0},
    "VICReg": {"context": "none", "local_weight": 0.0, "final_bn": False},
    "random": None,
}
ABLATED = {  # one pre-training each
    "side, level 5 alone": {"context": "side", "levels": (5,)},
    "side, no last BatchNorm": {"context": "side", "final_bn": False},
    "side, crops from 0.08": {"context": "side", "crop_min": 0.08},
    "side, crops from 0.6": {"context": "side", "crop_min": 0.6},
    "no blocks, trust 0.04": {"context": "none"},
    "inline, lambda 0": {"context": "inline", "local_weight": 0.0},
}
PIXELS = "16 x 16 pixels"
SCRATCH = {"from scratch, lr 0.001": 0.001, "from scratch, lr 0.0003": 0.0003}
JUDGED = {  # prepared folder -> findings
    "nih128": [],  # all
    "rsna256": ["Lung_Opacity"],
    "kermany": ["Bacterial", "Viral"],
    "shenzhen": ["Tuberculosis"],
}
# Fine-tuning by set and label fraction: images in a step, most epochs, patience.
FINETUNED = {
    ("nih128", 1): (256, 20, 4),
    ("nih128", 0.1): (64, 20, 4),
    ("rsna256", 1): (64, 20, 4),
    ("rsna256", 0.1): (16, 20, 4),
}
SEGMENTED = {1: (32, 20, 5), 0.1: (16, 30, 8)}
POINTED = ("side", "VICReg, last BatchNorm", "inline", "from scratch, lr 0.001")


def study_tasks(seeds=3):
    """All units of the study as (stage, method, seed), what matters most first."""
    groups = [
        (["pretrain"], COMPARED, seeds),
        (["frozen"], COMPARED, seeds),
        (["pretrain"], ABLATED, 1),
        (["finetune"], [*SCRATCH][:1], seeds),
        (["finetune", "levels"], COMPARED, seeds),
        (["frozen"], ABLATED, 1),
        (["segment"], COMPARED, seeds),
        (["pointing"], POINTED, 1),
        (["finetune"], [*SCRATCH][1:], seeds),
    ]
    tasks = []
    for stages, methods, repeats in groups:
        for seed in range(repeats):
            for method in methods:
                tasks += [(stage, method, seed) for stage in stages]
    return tasks + [("pixels", PIXELS, 0)]


def device():
    """The GPU, if there is one."""
    return m.torch.device("cuda" if m.torch.cuda.is_available() else "cpu")


def judged_set(options, name):
    """A prepared set, and the findings that are evaluated on it."""
    data = m.PreparedData(name, options.data_root)
    return data, JUDGED[name] or data.findings


def encoder_folder(options, method, seed):
    """Where an encoder lies: encoder.pt, and plain.pt without blocks that do not change h."""
    if method in SCRATCH:
        method = "random"
    return options.runs / "encoders" / slug(method, seed)


def slug(*words):
    """A name for a file."""
    return "-".join(str(word).replace(",", "").replace(" ", "-") for word in words)


def effective_rank(z):
    """`mlvicx.effective_rank` from the smaller matrix z z' (B, B): ten times faster on one core."""
    zc = z.double() - z.double().mean(0)
    singular = m.torch.linalg.eigvalsh(zc @ zc.T).clamp(min=0).sqrt()
    if singular.sum() <= 1e-6 * math.sqrt(zc.numel()):
        return 0.0
    return float(m.torch.special.entr(singular / singular.sum()).sum().exp())


def study_pretrain(options, method, seed):
    """Pre-trains on the unlabelled training images, or draws random weights; keeps the curve."""
    run, found = encoder_folder(options, method, seed), {}
    changes = (COMPARED | ABLATED)[method]
    if changes is None:
        run.mkdir(parents=True, exist_ok=True)
        encoder, _ = m.load_encoder("random", seed, context="none")
        state = {"encoder": encoder.state_dict(), "arch": encoder.arch}
        m.torch.save(state, run / "encoder.pt")
    else:
        given = dict(RECIPE, **changes, data="nih128", data_root=options.data_root, seed=seed)
        given.update(epochs=options.epochs, embedding_dim=options.embedding_dim, out=str(run))
        given.update(size=options.size, knn_every=0, checkpoint_minutes=1000, overwrite=True)
        images = int((m.PreparedData("nih128", options.data_root).split == "train").sum())
        given["batch_size"] = min(given["batch_size"], images)
        m.effective_rank = effective_rank  # else, epochs of a few seconds would wait for it
        m.pretrain(m.make_config("pretrain", m.PretrainConfig, given))
        (run / "last.pt").unlink(missing_ok=True)  # a gigabyte
        curve = m.pd.read_csv(run / "metrics.csv")
        found = {"settings": given, "last": curve.iloc[-1].to_dict()}
        for name in ("loss", "val_loss"):
            found[name] = curve[name].round(4).tolist()
        state = m.torch.load(run / "encoder.pt", map_location="cpu", weights_only=True)
    if state["arch"]["context"] == "side":  # the blocks refine maps, of which h is not made
        state["arch"]["context"] = "none"
        names = [name for name in state["encoder"] if not name.startswith("context.")]
        state["encoder"] = {name: state["encoder"][name] for name in names}
    m.torch.save(state, run / "plain.pt")
    return found, {}


class PooledMaps(m.nn.Module):
    """The representation and the average of every map: (B, 3, H, W) -> (B, 512 + 1024)."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        h, maps = self.encoder(x)
        return m.torch.cat([h] + [y.mean((2, 3)) for y in maps], 1)


def pooled_features(path, data, size):
    """Features of all images of a set: a dict of (N, C): "h", "level 1", ..., "all levels"."""
    encoder, _ = m.load_encoder(str(path))
    model = PooledMaps(encoder).to(device(), memory_format=m.torch.channels_last)
    x = m.predict(model, data.images, m.torch.arange(len(data.images)), size, "off")
    h, *levels = x.split([encoder.channels[-1], *encoder.channels], 1)
    features = {"h": h, "all levels": m.torch.cat(levels, 1)}
    for level, y in enumerate(levels, 1):
        features[f"level {level}"] = y
    return features


def score_row(data, names, val_scores, test_scores, **about):
    """A row of the log from the scores of validation and test images; and the test ranks.

    AUROC and average precision depend on the order of the scores alone, so that ranks are enough
    to compute them again. Returns: dict; uint16 (n, F).
    """
    from sklearn.metrics import average_precision_score  # here, for it takes a second

    columns = [data.findings.index(name) for name in names]
    y_val, y = (data.labels[data.indices(split)][:, columns] for split in ("val", "test"))
    test_scores, ranks = np.asarray(test_scores), []
    mean, *each = m.finding_aurocs(test_scores, y)
    row = dict(about, val=round(float(m.finding_aurocs(val_scores, y_val)[0]), 5))
    row.update(test=round(float(mean), 5), per_finding={})
    for f, name in enumerate(names):
        ranks.append(np.unique(test_scores[:, f], return_inverse=True)[1])
        precision = math.nan
        if y[:, f].any():
            precision = average_precision_score(y[:, f], test_scores[:, f])
        row["per_finding"][name] = [round(float(each[f]), 5), round(float(precision), 5)]
    return row, np.array(ranks, np.uint16).T


def probe_rows(data, names, features, fractions, rows, ranks):
    """Adds the rows of a linear probe on features {name: (N, C)}, at each fraction of labels.

    Below all labels there are three subsets of them; one for a level alone.
    """
    y = data.labels[:, [data.findings.index(name) for name in names]]
    val, test = data.indices("val"), data.indices("test")
    for (feature, x), fraction in itertools.product(features.items(), fractions):
        several = fraction < 1 and not feature.startswith("level")
        for subset in range(1 + 2 * several):
            chosen = m.label_subset(data, fraction, subset)
            weight, bias = m.linear_probe(x[chosen], y[chosen], x[val], y[val])
            scores = m.F.linear(x, weight, bias)
            about = {"set": data.meta["name"], "mode": "frozen", "features": feature}
            about.update(labels=fraction, subset=subset)
            row, order = score_row(data, names, scores[val], scores[test], **about)
            rows.append(row)
            if feature in ("h", "all levels"):
                ranks[score_key(row)] = order


def score_key(row):
    """The name of a row's ranks, within its unit."""
    return "|".join(
        [row["set"], row["mode"], row["features"], f"{row['labels']:g}", f"{row['subset']}"]
    )


def study_frozen(options, method, seed):
    """Linear probes on h: all sets, all fractions of labels."""
    rows, ranks = [], {}
    for name in JUDGED:
        data, findings = judged_set(options, name)
        features = pooled_features(
            encoder_folder(options, method, seed) / "plain.pt", data, options.size
        )
        probe_rows(data, findings, {"h": features["h"]}, SHARES, rows, ranks)
    return {"rows": rows}, ranks


def study_levels(options, method, seed):
    """Linear probes on the averaged maps: all together, each alone; side: refined, and plain."""
    rows, ranks, folder = [], {}, encoder_folder(options, method, seed)
    for name in JUDGED:
        data, findings = judged_set(options, name)
        features = pooled_features(folder / "encoder.pt", data, options.size)
        features.pop("h")
        if method == "side":
            plain = pooled_features(folder / "plain.pt", data, options.size)
            features["plain, all levels"] = plain["all levels"]
        probe_rows(data, findings, features, (1, 0.1), rows, ranks)
    return {"rows": rows}, ranks


def study_pixels(options, method, seed):
    """The baseline: ridge regression on 16 x 16 pixels, its strength chosen on validation."""
    from sklearn.linear_model import Ridge

    rows, ranks = [], {}
    for (name, fraction), subset in itertools.product(itertools.product(JUDGED, SHARES), range(3)):
        if fraction == 1 and subset:
            continue
        data, findings = judged_set(options, name)
        x = m.resize_images(data.images, 16).flatten(1).numpy()
        chosen, scores = m.label_subset(data, fraction, subset).numpy(), []
        val = data.indices("val")
        for finding in findings:
            y = data.labels[:, data.findings.index(finding)].numpy()
            fits = [Ridge(alpha).fit(x[chosen], y[chosen]) for alpha in 10.0 ** np.arange(-2, 5)]
            best = max(fits, key=lambda fit: m.auroc(fit.predict(x[val]), y[val]))
            scores.append(best.predict(x))
        scores = np.array(scores).T
        about = {"set": name, "mode": "frozen", "features": "h", "labels": fraction}
        parts = scores[val], scores[data.indices("test")]
        row, order = score_row(data, findings, *parts, **about, subset=subset)
        rows.append(row)
        ranks[score_key(row)] = order
    return {"rows": rows}, ranks


def finetuned(options, method, seed, name, fraction, recipe, size):
    """Fine-tunes an encoder; returns the set, the classifier, scores of validation and test."""
    batch, epochs, patience = recipe
    lr = 0.0003
    if method in SCRATCH:
        epochs, patience, lr = 2 * epochs, 10, SCRATCH[method]
    if options.trial:
        epochs = patience = 1
    out = options.runs / "evaluations" / slug(method, seed, name, fraction, size)
    given = {"data": name, "data_root": options.data_root, "mode": "finetune", "size": size}
    given.update(weights=f"{encoder_folder(options, method, seed)}/plain.pt", labels=(fraction,))
    given.update(seed=seed, epochs=epochs, patience=patience, batch_size=batch, lr=lr)
    given.update(out=str(out), overwrite=True, findings=",".join(JUDGED[name]))
    m.classify(m.make_config("classify", m.ClassifyConfig, given))
    data, findings = judged_set(options, name)
    model, _ = m.load_module(f"{out}/classifier.pt", "classifier")
    model = model.to(device(), memory_format=m.torch.channels_last).eval()
    scores = [m.predict(model, data.images, data.indices(s), size) for s in ("val", "test")]
    (out / "classifier.pt").unlink()
    return given, data, findings, model, scores


def study_finetune(options, method, seed):
    """Fine-tuning on NIH and RSNA with 10 and 100 % of the labels."""
    rows, ranks = [], {}
    for (name, fraction), recipe in FINETUNED.items():
        given, data, findings, _, scores = finetuned(
            options, method, seed, name, fraction, recipe, options.size
        )
        about = {"set": name, "mode": "finetune", "features": "h", "labels": fraction}
        row, order = score_row(data, findings, *scores, **about, subset=seed)
        row["settings"] = {k: given[k] for k in ("epochs", "patience", "batch_size", "lr")}
        rows.append(row)
        ranks[score_key(row)] = order
    return {"rows": rows}, ranks


def study_segment(options, method, seed):
    """Lungs by a decoder over the five maps of a frozen encoder."""
    found = []
    for fraction, (batch, epochs, patience) in SEGMENTED.items():
        if options.trial:
            epochs = patience = 1
        out = options.runs / "evaluations" / slug(method, seed, "lungs", fraction)
        given = {
            "data": "shenzhen",
            "data_root": options.data_root,
            "size": options.size,
            "seed": seed,
        }
        given.update(weights=f"{encoder_folder(options, method, seed)}/encoder.pt", epochs=epochs)
        given.update(labels=(fraction,), patience=patience, batch_size=batch, out=str(out))
        config = m.make_config("segment", m.SegmentConfig, dict(given, overwrite=True))
        test = m.segment(config)["test"]
        found.append({"labels": fraction, "epochs": epochs, "batch_size": batch, "test": test})
    return {"dice": found}, {}


def study_pointing(options, method, seed):
    """Is the peak of Grad-CAM in a radiologist's box? Fine-tuned on NIH at 224 px.

    Patients that are in nih128 are left out. Beside the hits: of the centre, of the one point that
    hits most often for a finding, and the mean area of the boxes, which a random point hits.
    """
    recipe = ("nih128", 1, (128, 10, 3), 224)
    given, nih, findings, model, scores = finetuned(options, method, seed, *recipe)
    row, _ = score_row(nih, findings, *scores)
    data = m.PreparedData("nihbox256", options.data_root)
    boxes = m.pd.read_csv(data.folder / "boxes.csv", dtype={"image": str})
    unseen = ~np.isin(data.patient.astype(str), nih.patient.astype(str))
    position = {name: i for i, name in enumerate(data.names) if unseen[i]}
    centres, found = np.arange(data.size) + 0.5, {}
    for finding, group in boxes[boxes["image"].isin(position)].groupby("finding"):
        names = [*dict.fromkeys(group["image"])]
        inside = np.zeros((len(names), data.size, data.size), bool)  # pixels of the boxes
        for box in group.itertuples():
            across = (centres >= box.x) & (centres <= box.x + box.width)
            down = (centres >= box.y) & (centres <= box.y + box.height)
            inside[names.index(box.image)] |= down[:, None] & across
        peaks = []
        for rows in m.torch.tensor([position[name] for name in names]).split(32):
            x = m.normalise(m.resize_images(data.images[rows].to(device()), given["size"]))
            cam = m.gradcam(model, x, nih.findings.index(finding))
            peaks += cam.flatten(1).argmax(1).tolist()
        y, x = np.divmod(np.array(peaks), given["size"])
        scale = data.size / given["size"]
        y, x = (((axis + 0.5) * scale).astype(int) for axis in (y, x))  # in pixels of the boxes
        hit = inside[range(len(names)), y, x]
        share = inside.mean(0)
        found[finding] = {"n": len(names), "hits": int(hit.sum()), "area": float(share.mean())}
        middle = data.size // 2
        found[finding].update(centre=float(share[middle, middle]), best_point=float(share.max()))
    settings = {k: given[k] for k in ("size", "epochs", "patience", "batch_size", "lr")}
    return {"pointing": found, "nih": row, "settings": settings}, {}


def needed_unit(options, stage, method, seed):
    """The log of the unit that has to come first, or None."""
    if stage in ("pixels", "pretrain"):
        return None
    if method in SCRATCH:
        method = "random"
    return options.runs / f"{slug('pretrain', method, seed)}.json"


def next_unit(options, tasks, taken):
    """The first unit that no process has taken and that can start; None if all are taken."""
    while not all(taken):
        with taken.get_lock():
            for index, task in enumerate(tasks):
                needed = needed_unit(options, *task)
                ready = needed is None or needed.exists() or needed.with_suffix(".failed").exists()
                if ready and not taken[index]:
                    taken[index] = 1
                    return task
        time.sleep(0.5)
    return None


def study_unit(options, stage, method, seed):
    """Runs one unit unless it is there; what it finds is written as a whole at its end."""
    actions = {"pretrain": study_pretrain, "frozen": study_frozen, "levels": study_levels}
    actions.update(
        pixels=study_pixels, finetune=study_finetune, segment=study_segment, pointing=study_pointing
    )
    path = options.runs / f"{slug(stage, method, seed)}.json"
    needed = needed_unit(options, stage, method, seed)
    if needed is not None and not needed.exists():  # it has failed
        return
    if path.exists():
        return
    started = time.time()
    try:
        found, ranks = actions[stage](options, method, seed)
    except Exception:  # noqa: BLE001 (it is written down, and the next unit is run)
        path.with_suffix(".failed").write_text(traceback.format_exc())
        print(
            f"failed: {path.stem}: {traceback.format_exc()[-300:]}", file=sys.__stdout__, flush=True
        )
        return
    if ranks:
        with m.replacing(path.with_suffix(".npz")) as f:
            np.savez_compressed(f, **ranks)
    unit = {"stage": stage, "method": method, "seed": seed, "trial": options.trial}
    unit.update(device="CPU", torch=m.torch.__version__, processes=options.workers)
    if m.torch.cuda.is_available():
        unit["device"] = m.torch.cuda.get_device_name()
    unit.update(seconds=round(time.time() - started, 1), started=round(started), **found)
    m.write_json(path, unit)
    print(
        f"{time.strftime('%X')} {path.stem}: {unit['seconds']} s", file=sys.__stdout__, flush=True
    )


def study_worker(options, number, tasks, taken):
    """Takes the next unit until there is none."""
    m.torch.set_num_threads(options.threads)
    log = open(options.runs / f"worker-{number}.log", "a", buffering=1)  # noqa: SIM115
    sys.stdout = sys.stderr = log
    task = next_unit(options, tasks, taken)
    while task is not None:
        study_unit(options, *task)
        gc.collect()
        if m.torch.cuda.is_available():
            m.torch.cuda.empty_cache()
        task = next_unit(options, tasks, taken)


def stop_once(number, frame):
    """Ends the program at the first SIGTERM; a second one does not disturb the packing."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def study(options):
    """Runs the units in parallel processes, at most so many minutes, and packs what they found."""
    options.runs.mkdir(parents=True, exist_ok=True)
    for path in options.runs.glob("*.failed"):
        path.unlink()
    signal.signal(signal.SIGTERM, stop_once)
    spawn = multiprocessing.get_context("spawn")
    tasks, processes = study_tasks(options.seeds), []
    if options.only:
        tasks = [task for task in tasks if task[0] in options.only.split(",")]
    taken = spawn.Array("b", len(tasks))
    deadline = time.monotonic() + 60 * options.minutes
    try:
        for number in range(min(options.workers, len(tasks))):
            given = (options, number, tasks, taken)
            processes.append(spawn.Process(target=study_worker, args=given))
            processes[-1].start()
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
        study_pack(options)


def study_pack(options):
    """Gathers the units in few files: units.json, a unit a line, and scores-SEED.npz."""
    options.out.mkdir(parents=True, exist_ok=True)
    paths = sorted(options.runs.glob("*.json"))
    lines = [json.dumps(json.loads(path.read_text())) for path in paths]
    (options.out / "units.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    for seed in range(3):
        ranks = {}
        for path in sorted(options.runs.glob(f"*-{seed}.npz")):
            with np.load(path) as unit:
                ranks.update({f"{path.stem}|{key}": unit[key] for key in unit.files})
        np.savez_compressed(options.out / f"scores-{seed}.npz", **ranks)
    failed = sorted(options.runs.glob("*.failed"))
    (options.out / "failed.txt").write_text("\n".join(f"{p.stem}\n{p.read_text()}" for p in failed))
    print(
        f"{options.out}: {len(paths)} units of {len(study_tasks(options.seeds))}, {len(failed)} failed"
    )


FINE = ("Nodule", "Mass", "Pneumothorax", "Fibrosis")
COARSE = ("Cardiomegaly", "Effusion", "Edema", "Consolidation")
RARE = ("Hernia", "Edema", "Pneumonia")
# The comparisons named before the runs: first, second, mode. Each with 10 and 100 % of the labels.
DECLARED = [
    ("side", "VICReg, last BatchNorm", "frozen"),
    ("side", "inline", "frozen"),
    ("side", "no blocks", "frozen"),
    ("side", "random", "frozen"),
    ("side", "from scratch", "finetune"),
]
CELL = ["set", "mode", "features", "labels", "method"]


def study_rows(options):
    """Every row of the units as one table, and the units themselves."""
    units, rows = json.loads((options.out / "units.json").read_text()), []
    for unit in units:
        about = {name: unit[name] for name in ("stage", "method", "seed")}
        for row in unit.get("rows", []):
            rows.append(dict(about, **row))
    frame = m.pd.DataFrame(rows)
    # The learning rate from scratch is chosen on validation, over both fractions and sets.
    scratch = frame[frame["method"].isin(SCRATCH)]
    best = scratch.groupby("method")["val"].mean().idxmax()
    frame["method"] = frame["method"].replace(best, "from scratch")
    return frame[~frame["method"].isin(SCRATCH)], units, best


def study_draws(options, frame, best, repeats=1000):
    """AUROC of bootstrap samples of test patients: {cell and seed: (R, 1 + F)}.

    The same samples for every method of a set, so that differences between methods are paired.
    Subsets of the labels are averaged.
    """
    draws, ranks = {}, {}
    for seed in range(3):
        with np.load(options.out / f"scores-{seed}.npz") as packed:
            ranks.update({key: packed[key] for key in packed.files})
    for name in JUDGED:
        data, findings = judged_set(options, name)
        test = data.indices("test")
        y = data.labels[test][:, [data.findings.index(f) for f in findings]].numpy()
        names, member = np.unique(data.patient[test].astype(str), return_inverse=True)
        rng = np.random.default_rng(0)
        samples = rng.integers(0, len(names), (repeats, len(names)))
        weights = np.array([np.bincount(s, minlength=len(names)) for s in samples])[:, member]
        weights[0] = 1  # the first is what was measured
        kept = frame[(frame["set"] == name) & frame["features"].isin(["h", "all levels"])]
        for cell, part in kept.groupby([*CELL, "seed"]):
            runs = []
            for row in part.to_dict("records"):
                method = best if row["method"] == "from scratch" else row["method"]
                order = ranks[slug(row["stage"], method, row["seed"]) + "|" + score_key(row)]
                parts = [m.finding_aurocs(order, y, w) for w in np.array_split(weights, 20)]
                runs.append(np.concatenate(parts))
            draws[cell] = np.mean(runs, 0)
    return draws


def declared_analysis(draws, seeds):
    """Paired differences in mean AUROC on NIH: bootstrap over test patients and seeds."""
    found = []
    for (first, second, mode), labels in itertools.product(DECLARED, (0.1, 1)):
        cells = [("nih128", mode, "h", labels, method) for method in (first, second)]
        if any((*cell, seed) not in draws for cell in cells for seed in range(seeds)):
            continue
        pairs = []
        for seed in range(seeds):
            a, b = (draws[*cell, seed][:, 0] for cell in cells)
            pairs.append(a - b)
        pairs = np.array(pairs)  # (seeds, R)
        chosen = np.random.default_rng(1).integers(0, seeds, (seeds, pairs.shape[1]))
        chosen[:, 0] = range(seeds)
        differences = np.take_along_axis(pairs, chosen, 0).mean(0)
        low, high = np.quantile(differences[1:], [0.025, 0.975])
        entry = {"first": first, "second": second, "mode": mode, "labels": labels}
        entry.update(difference=differences[0], ci95=[low, high], real=bool(low > 0 or high < 0))
        found.append(dict(entry, each=pairs[:, 0].tolist()))
    return found


def cell_intervals(draws, findings):
    """Mean, std over seeds, and 95 % interval over test patients of every cell."""
    found, seeds = [], {}
    for (*cell, _), values in draws.items():
        seeds.setdefault(tuple(cell), []).append(values)
    for cell, values in seeds.items():
        groups = {"mean": [0]}
        if cell[0] == "nih128":
            for name, members in (("fine", FINE), ("coarse", COARSE)):
                groups[name] = [1 + findings.index(f) for f in members]
            groups.update({f: [1 + findings.index(f)] for f in RARE})
        entry = dict(zip(CELL, cell, strict=True), seeds=len(values))
        for name, columns in groups.items():
            each = np.array([value[:, columns].mean(1) for value in values])  # (seeds, R)
            std = None
            if len(each) > 1:
                std = each[:, 0].std(ddof=1)
            ci95 = np.nanquantile(each.mean(0)[1:], [0.025, 0.975]).tolist()
            entry[name] = {"mean": each[:, 0].mean(), "std": std, "ci95": ci95}
        found.append(entry)
    return found


def precision_intervals(options, frame, best, repeats=1000):
    """Average precision of rare findings, all labels, with intervals over test images."""
    from sklearn.metrics import average_precision_score

    data, findings = judged_set(options, "nih128")
    y, found = data.labels[data.indices("test")].double().numpy(), []
    rng, ranks = np.random.default_rng(0), {}
    for seed in range(3):
        with np.load(options.out / f"scores-{seed}.npz") as packed:
            ranks.update({key: packed[key] for key in packed.files if "|nih128|" in key})
    kept = frame[(frame["set"] == "nih128") & (frame["features"] == "h") & (frame["labels"] == 1)]
    samples = rng.integers(0, len(y), (repeats, len(y)))
    samples[0] = range(len(y))
    for (mode, method), part in kept.groupby(["mode", "method"]):
        if method in ABLATED or method == PIXELS:
            continue
        entry = {"mode": mode, "method": method}
        for finding in RARE:
            f, runs = findings.index(finding), []
            for row in part.to_dict("records"):
                name = best if method == "from scratch" else method
                order = ranks[slug(row["stage"], name, row["seed"]) + "|" + score_key(row)][:, f]
                known = [(y[s, f], order[s]) for s in samples]
                runs.append(
                    [average_precision_score(a, b) if a.any() else np.nan for a, b in known]
                )
            each = np.mean(runs, 0)
            low, high = np.nanquantile(each[1:], [0.025, 0.975])
            entry[finding] = {"mean": each[0], "ci95": [low, high], "prevalence": y[:, f].mean()}
        found.append(entry)
    return found


def text_of(values):
    """Mean ± standard deviation of some numbers, or the one number."""
    values = np.asarray(values, float)
    if len(values) == 0:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"


def table_lines(title, columns, rows):
    """Lines of one table. Args: columns: heads. rows: label -> cells."""
    lines = ["", f"### {title}", "| | " + " | ".join(columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for label, cells in rows.items():
        if any(cells):
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def auroc_tables(frame):
    """Tables of mean test AUROC: mean ± std over seeds."""
    lines = []
    frame = frame.assign(fine=np.nan, coarse=np.nan)
    for name, members in (("fine", FINE), ("coarse", COARSE)):
        values = [np.mean([p[f][0] for f in members if f in p]) for p in frame["per_finding"]]
        frame[name] = values
    frame = frame.assign(**{f: [p.get(f, [np.nan])[0] for p in frame["per_finding"]] for f in RARE})
    means = frame.groupby([*CELL, "seed"])[["val", "test", "fine", "coarse", *RARE]].mean()

    def cells(keys, method, column="test"):
        found = []
        for key in keys:
            values = []
            if (*key, method) in means.index:
                values = means.loc[(*key, method), column]
            found.append(text_of(values))
        return found

    methods = [*COMPARED, "from scratch", PIXELS]
    heads = [f"frozen {s:.0%}" for s in SHARES] + ["fine-tuned 10%", "fine-tuned 100%"]
    for name in JUDGED:
        keys = [(name, "frozen", "h", share) for share in SHARES]
        keys += [(name, "finetune", "h", share) for share in (0.1, 1)]
        rows = {method: cells(keys, method) for method in methods}
        lines += table_lines(f"{name}: mean test AUROC", heads, rows)
    features = ["h", "all levels", *(f"level {k}" for k in range(1, 6)), "plain, all levels"]
    for name, share in itertools.product(JUDGED, (1, 0.1)):
        keys = [(name, "frozen", feature, share) for feature in features]
        rows = {method: cells(keys, method) for method in COMPARED}
        lines += table_lines(f"{name}: probes on levels, {share:.0%} of the labels", features, rows)
    groups = ["fine", "coarse", *RARE]
    for mode, feature in (("frozen", "h"), ("frozen", "all levels"), ("finetune", "h")):
        rows = {}
        for method in methods:
            key = ("nih128", mode, feature, 1)
            rows[method] = [cells([key], method, group)[0] for group in groups]
        lines += table_lines(f"nih128: {mode}, {feature}, all labels: groups", groups, rows)
    heads = [
        f"{n} {s:.0%}, {c}"
        for n in ("nih128", "rsna256")
        for s in (0.1, 1)
        for c in ("val", "test")
    ]
    rows = {}
    for method in [*COMPARED, *ABLATED]:
        found = []
        for name, share in itertools.product(("nih128", "rsna256"), (0.1, 1)):
            key = (name, "frozen", "h", share)
            found += [cells([key], method, column)[0] for column in ("val", "test")]
        rows[method] = found
    return lines + table_lines("Variants, frozen: validation and test", heads, rows)


def other_tables(units, analysis):
    """Tables of lungs, of heatmaps and of the declared comparisons."""
    rows, heads = {}, ["10 %", "100 %"]
    for method in COMPARED:
        found = []
        for share in (0.1, 1):
            dice = []
            for unit in units:
                if unit["stage"] == "segment" and unit["method"] == method:
                    dice += [
                        d["test"]["dice_pooled"]["mean"]
                        for d in unit["dice"]
                        if d["labels"] == share
                    ]
            found.append(text_of(dice))
        rows[method] = found
    lines = table_lines("shenzhen: pooled Dice of the lungs, frozen encoder", heads, rows)

    rows, fixed = {}, {}
    for unit in units:
        if unit["stage"] != "pointing":
            continue
        points = unit["pointing"]
        n = sum(p["n"] for p in points.values())
        names = sorted(points)
        rows[unit["method"]] = [f"{points[f]['hits'] / points[f]['n']:.2f}" for f in names]
        rows[unit["method"]].append(f"{sum(p['hits'] for p in points.values()) / n:.2f}")
        for name in ("centre", "best_point", "area"):
            fixed[name] = [f"{points[f][name]:.2f}" for f in names]
            fixed[name].append(f"{sum(p[name] * p['n'] for p in points.values()) / n:.2f}")
        heads = [f"{f} (n {points[f]['n']})" for f in names] + [f"all (n {n})"]
    lines += table_lines("nihbox256: peak of Grad-CAM in a box", heads, dict(rows, **fixed))

    rows = {}
    for entry in analysis["declared"]:
        low, high = entry["ci95"]
        label = f"{entry['first']} − {entry['second']}, {entry['mode']}, {entry['labels']:.0%}"
        each = ", ".join(f"{d:+.3f}" for d in entry["each"])
        verdict = "real" if entry["real"] else "not shown"
        rows[label] = [f"{entry['difference']:+.4f}", f"[{low:+.4f}, {high:+.4f}]", each, verdict]
    heads = ["difference", "95 % interval", "each seed", "by the declared analysis"]
    lines += table_lines("nih128: declared comparisons, mean test AUROC", heads, rows)

    rows = {}
    for entry in analysis["precision"]:
        found = []
        for finding in RARE:
            low, high = entry[finding]["ci95"]
            found.append(f"{entry[finding]['mean']:.3f} [{low:.3f}, {high:.3f}]")
        rows[f"{entry['method']}, {entry['mode']}"] = found
    return lines + table_lines("nih128: average precision, all labels", RARE, rows)


def study_tables(options):
    """The packed results as tables, and the declared analysis: nih_analysis.json, nih_tables.md."""
    frame, units, best = study_rows(options)
    draws = study_draws(options, frame, best)
    analysis = {"from scratch": best, "declared": declared_analysis(draws, options.seeds)}
    findings = judged_set(options, "nih128")[1]
    analysis["precision"] = precision_intervals(options, frame, best)
    analysis["intervals"] = cell_intervals(draws, findings)
    m.write_json(options.out / "nih_analysis.json", analysis)
    lines = ["# NIH: tables", *auroc_tables(frame), *other_tables(units, analysis)]
    (options.out / "nih_tables.md").write_text("\n".join(lines) + "\n")


def study_part(options):
    """Makes the set `nih128` from all of NIH, prepared by `data_prep.py nih --size 96`.

    These are the images of patients 1336 to 3923, but for a few that were not at hand; patients are
    in the splits that results/nih_split.json lists, all others in training.
    """
    data, out = m.PreparedData("nih", options.data_root), Path(options.data_root, "nih128")
    rule, number = json.loads((RESULTS / "nih_split.json").read_text()), data.patient.astype(int)
    kept = (number >= 1336) & (number <= 3923) & ~np.isin(data.names, rule["left_out"])
    table = m.pd.read_csv(data.folder / "labels.csv", dtype={"patient": str})[kept]
    table["split"] = "train"
    for split in ("val", "test"):
        table.loc[np.isin(number[kept], rule[split]), "split"] = split
    out.mkdir()
    np.save(out / "images.npy", data.images.numpy()[kept])
    table.to_csv(out / "labels.csv", index=False)
    digest = hashlib.sha256((out / "images.npy").read_bytes()).hexdigest()
    meta = dict(data.meta, name="nih128", images=len(table), images_sha256=digest)
    m.write_json(out / "meta.json", meta)


def study_options(words):
    """The flags of the study."""
    parser = argparse.ArgumentParser(prog="experiments.py nih")
    parser.add_argument("--data-root", default="data", help="folder of the prepared sets")
    parser.add_argument("--runs", type=Path, default=Path("runs/nih"), help="folder of the units")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/nih-packed"), help="folder of the results"
    )
    parser.add_argument("--epochs", type=int, default=50, help="of pre-training")
    parser.add_argument("--size", type=int, default=64, help="of the images, in pixels")
    parser.add_argument("--embedding-dim", type=int, default=4096, help="of pre-training")
    parser.add_argument("--seeds", type=int, default=3, help="pre-trainings of each method")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument(
        "--minutes", type=float, default=10000, help="then stop, and pack the results"
    )
    parser.add_argument("--only", default="", help="stages, joined by commas")
    parser.add_argument("--trial", action="store_true", help="one epoch of every fine-tuning")
    return parser.parse_args(words)


if __name__ == "__main__":
    os.chdir(HERE.parent)
    which, *names = sys.argv[1:] or ["nothing"]
    studies = {
        "nih": study,
        "nih-pack": study_pack,
        "nih-tables": study_tables,
        "nih-part": study_part,
    }
    if which in studies:
        sys.exit(studies[which](study_options(names)))
    actions = {
        "floors": floors,
        "supervised": supervised,
        "tables": tables,
        "failures": failures,
        "variants": lambda: variants(names),
    }
    actions |= {study: lambda: table(which) for study in STUDIES}
    unknown = set(names) - set(REPEATED | ONCE)
    if which not in actions or unknown:
        sys.exit(f"expected one of {[*actions]}, and names of variants; found {sys.argv[1:]}")
    actions[which]()
