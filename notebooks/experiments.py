"""The runs behind notebook 06 and the tables of the README; started again, it goes on.

    python notebooks/experiments.py variants         # ablations on the demo set: variants.csv
    python notebooks/experiments.py demo             # methods x labels x modes: demo.json
    python notebooks/experiments.py real             # the same on real X-rays: real.json
    python notebooks/experiments.py transfer         # pre-trained without the judged set
    python notebooks/experiments.py floors           # what 16 x 16 pixels alone give: floors.json
    python notebooks/experiments.py supervised       # what all labels give: supervised.json
    python notebooks/experiments.py tables           # all of it as tables: tables.md
    python notebooks/experiments.py failures         # logs that notebook 03 diagnoses

Each run is a command of mlvicx.py; what it finds goes to notebooks/results/, and what is there is
not made again. Several processes may be started together: they share the work. `real` needs
data/kermany, data/shenzhen and data/nih256, prepared by `python data_prep.py folder`.
A pre-training takes three to ten minutes on two cores.
"""

import contextlib
import io
import itertools
import json
import os
import sys
import time
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
        keep = lambda module, inputs, output: maps.append(output.sigmoid())  # noqa: E731
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


if __name__ == "__main__":
    os.chdir(HERE.parent)
    which, *names = sys.argv[1:] or ["nothing"]
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
