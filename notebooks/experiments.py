"""The study on real X-rays, its tables and their analysis; and the encoder of notebooks 04 and 05.

    python notebooks/experiments.py nih         # pre-trainings and evaluations, for a GPU
    python notebooks/experiments.py nih-pack    # gathers the results of a study that was stopped
    python notebooks/experiments.py nih-tables  # what they found, as tables, with the analysis
    python notebooks/experiments.py nih-part    # makes the set nih128 from a prepared data/nih

The study needs all of these sets under data/, prepared at 96 px: `nih128`, 9,998 images of NIH
ChestX-ray14 (all of patients 1336 to 3923 but eight images), which `nih-part` makes from data/nih
(`python data_prep.py nih --size 96`), with patients split as in results/nih_split.json; `rsna256`,
1,008 images of RSNA; `kermany`; and `shenzhen`, with its lung masks; and `nihbox256` at 224 px,
with the boxes of radiologists. Each method is pre-trained with several seeds, in parallel processes
(--workers; set OMP_NUM_THREADS=1 for more of them than cores). Each stage is written as it ends and
is not run again, so that a study that was stopped resumes. A stage that fails is reported, and the
others go on.
"""

import argparse
import json
import sys
import time
import traceback
from multiprocessing import get_context
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import mlvicx as m

# The recipe for a small budget, and what each method changes of it; None: nothing is pre-trained.
# The trust coefficients were chosen on validation images in the pilot, after 10 epochs.
RECIPE = {"batch_size": 256, "lr": 0.2, "trust": 0.04, "crop_min": 0.3, "blur": 0.5, "knn_every": 0}
METHODS = {
    "random": None,
    "VICReg": {"context": "none", "local_weight": 0.0, "final_bn": False},
    "VICReg, last BatchNorm": {"context": "none", "local_weight": 0.0},
    "no blocks": {"context": "none", "trust": 0.01},
    "inline": {"context": "inline"},
    "side": {"context": "side"},
}
ABLATIONS = {  # of side, frozen on NIH alone
    "side, level 5 alone": {"context": "side", "levels": (5,)},
    "side, no last BatchNorm": {"context": "side", "final_bn": False},
    "side, crop 0.08": {"context": "side", "crop_min": 0.08},
    "side, crop 0.6": {"context": "side", "crop_min": 0.6},
}
SETTINGS = {**METHODS, **ABLATIONS}
SCRATCH, PIXELS = "from scratch", "16 x 16 pixels"
SHARES = (0.01, 0.1, 0.3, 1)
SETS = {"nih128": [], "rsna256": ["Lung_Opacity"]}  # prepared folder -> findings; []: all
SETS.update(kermany=["Bacterial", "Viral"], shenzhen=["Tuberculosis"])
POINTED = ("side", "VICReg, last BatchNorm", SCRATCH)  # heatmaps, of seed 0
FINE = ("Nodule", "Mass", "Pneumothorax", "Fibrosis")
COARSE = ("Cardiomegaly", "Effusion", "Edema", "Consolidation")
RARE = ("Hernia", "Edema", "Pneumonia")
NO_HERNIA = "without Hernia"  # the mean over the other findings: one test patient has it
# The comparisons named before the runs: first, second, mode. Each with 10 and 100 % of the labels.
DECLARED = [("side", name, "frozen") for name in ("VICReg, last BatchNorm", "inline", "no blocks")]
DECLARED += [("side", "random", "frozen"), ("side", SCRATCH, "finetune")]
CELL = ["set", "mode", "features", "labels", "method"]

# ---------------------------------------------------------------- the stages of the study


def slug(*words):
    """A name for a file."""
    return "-".join(str(word).replace(",", "").replace(" ", "-") for word in words)


def read_set(options, name):
    """A prepared set, with those of its findings that are evaluated."""
    data = m.PreparedData(name, options.data_root)
    chosen = SETS[name] or data.findings
    data.labels = data.labels[:, [data.findings.index(finding) for finding in chosen]]
    data.findings = chosen
    return data


def weights_of(options, method, seed):
    """The encoder of a method: a file of `pretrain`, or random weights."""
    if SETTINGS.get(method) is None:  # from scratch, too
        return "random"
    return str(options.runs / "encoders" / slug(method, seed) / "encoder.pt")


def pretrain(options, method, seed):
    """Pre-trains on the unlabelled training images; keeps the curve."""
    if SETTINGS[method] is None:
        return {}, {}
    out = Path(weights_of(options, method, seed)).parent
    given = dict(RECIPE, epochs=options.epochs, size=options.size)
    given.update(SETTINGS[method], embedding_dim=options.embedding_dim)
    config = dict(given, data="nih128", data_root=options.data_root, out=str(out), seed=seed)
    config.update(checkpoint_minutes=1000, overwrite=True)
    m.pretrain(m.make_config("pretrain", m.PretrainConfig, config))
    (out / "last.pt").unlink(missing_ok=True)  # a gigabyte
    curve = m.pd.read_csv(out / "metrics.csv").round(4)
    losses = {name: curve[name].tolist() for name in ("loss", "val_loss")}
    return {"settings": given, "last": curve.iloc[-1].to_dict(), **losses}, {}


def on_device(model):
    """A model on the GPU, if there is one, in eval mode."""
    return model.to(m.setup(), memory_format=m.torch.channels_last).eval()


@m.torch.no_grad()
def pooled_features(encoder, data, size):
    """Features of all images of a set: a dict of (N, C): "h", "all levels", "level 1", ..."""
    found = {}
    for images in data.images.split(128):
        images = images.to(next(encoder.parameters()).device)
        h, maps = encoder(m.normalise(m.resize_images(images, size)))
        pooled = [y.mean((2, 3)) for y in maps]
        parts = {"h": h, "all levels": m.torch.cat(pooled, 1)}
        parts.update({f"level {k}": y for k, y in enumerate(pooled, 1)})
        for name, part in parts.items():
            found.setdefault(name, []).append(part.cpu())
    return {name: m.torch.cat(parts) for name, parts in found.items()}


def add_row(rows, ranks, data, scores, **about):
    """Adds a row with the mean test AUROC, and the ranks of the test images, by number of the row.

    AUROC and average precision depend on the order of the scores alone, so that ranks are enough
    to compute them again. Args: scores: of the test images, (n, F). about: the cell.
    """
    test = float(m.mean_auroc(scores, data.labels[data.indices("test")]))
    if not about["features"].startswith("level"):
        orders = [np.unique(column, return_inverse=True)[1] for column in np.asarray(scores).T]
        ranks[str(len(rows))] = np.array(orders, np.uint16).T
    rows.append({"set": data.meta["name"], **about, "test": test})


def probe(data, feature, x, rows, ranks):
    """Adds the rows of a linear probe on the features x (N, C).

    Below all labels there are three subsets of them; one for a level alone.
    """
    y, val, test = data.labels, data.indices("val"), data.indices("test")
    for share in SHARES:
        if feature != "h" and share not in (0.1, 1):
            continue
        repeats = 1 if share == 1 or feature.startswith("level") else 3
        for subset in range(repeats):
            chosen = m.label_subset(data, share, subset)
            weight, bias = m.linear_probe(x[chosen], y[chosen], x[val], y[val])
            about = {"mode": "frozen", "features": feature, "labels": share, "subset": subset}
            about["val"] = float(m.mean_auroc(m.F.linear(x[val], weight, bias), y[val]))
            add_row(rows, ranks, data, m.F.linear(x[test], weight, bias), **about)


def frozen(options, method, seed):
    """Linear probes on h, and on the averaged maps: all together, each alone."""
    rows, ranks = [], {}
    encoder = on_device(m.load_encoder(weights_of(options, method, seed), seed, context="none")[0])
    for name in SETS:
        data = read_set(options, name)
        features = pooled_features(encoder, data, options.size)
        if method in ABLATIONS:
            probe(data, "h", features["h"], rows, ranks)
            break  # after NIH
        if method == "side":  # also without the blocks, which refine the maps alone
            blocks, encoder.context = encoder.context, m.nn.ModuleDict()
            plain = pooled_features(encoder, data, options.size)
            features["plain, all levels"] = plain["all levels"]
            encoder.context = blocks
        for feature, x in features.items():
            probe(data, feature, x, rows, ranks)
    return {"rows": rows}, ranks


def pixels(options, method, seed):
    """The baseline: ridge regression on 16 x 16 pixels, its strength chosen on validation."""
    from sklearn.linear_model import Ridge  # here, for it takes a second

    rows, ranks = [], {}
    for name in SETS:
        data = read_set(options, name)
        x, y = m.resize_images(data.images, 16).flatten(1).numpy(), data.labels.numpy()
        val, test = data.indices("val"), data.indices("test")
        for share, subset in [(1, 0)] + [(share, k) for share in SHARES[:3] for k in range(3)]:
            chosen = m.label_subset(data, share, subset).numpy()
            fits = [Ridge(alpha).fit(x[chosen], y[chosen]) for alpha in np.logspace(-2, 4, 7)]
            aurocs = [m.mean_auroc(np.c_[fit.predict(x[val])], y[val]) for fit in fits]
            scores = np.c_[fits[int(np.argmax(aurocs))].predict(x[test])]
            about = {"mode": "frozen", "features": "h", "labels": share, "subset": subset}
            add_row(rows, ranks, data, scores, **about, val=max(aurocs))
    return {"rows": rows}, ranks


class Curve(list):
    """The mean validation AUROC of every epoch: a score for `fit` that keeps its values."""

    def __call__(self, scores, y):
        self.append(float(m.mean_auroc(scores, y)))
        return self[-1]


def fine_tune(options, method, seed, name, share, size):
    """Fine-tunes an encoder and a linear layer on a set, as `classify` does.

    Returns: the model, in eval mode, and of its training: the best validation AUROC, the number of
    epochs, and the best of them.
    """
    data, curve = read_set(options, name), Curve()
    rows, val = m.label_subset(data, share, seed), data.indices("val")

    # The cosine cycles of the learning rate end after 10, 30 and 70 epochs. From scratch, there is
    # one more of them, and a larger learning rate, so that the training converges.
    recipe = {"batch_size": 16, "epochs": 30, "lr": 0.0003, "patience": 10, "size": size}
    if len(rows) > 300:
        recipe["batch_size"] = 64
    if len(rows) > 2000:
        recipe.update(batch_size=256, epochs=10)
    if method == SCRATCH:
        recipe.update(lr=0.001, patience=20, epochs=2 * recipe["epochs"] + 10)
    recipe["epochs"] = min(recipe["epochs"], 2 * options.epochs)
    config = m.make_config("classify", m.ClassifyConfig, recipe)

    encoder = m.load_encoder(weights_of(options, method, seed), seed, context="none")[0]
    m.torch.manual_seed(seed)
    model = on_device(m.Classifier(encoder, len(data.findings)))
    given = (config, model, data.images, data.labels, rows, val, 1.0)
    m.fit(*given, m.masked_bce, curve, (seed, "classify"))
    return model, {"val": max(curve), "epochs": len(curve), "best": curve.index(max(curve)) + 1}


def tune(options, method, seed):
    """Fine-tuning on all sets; lungs by a decoder over the five maps of a frozen encoder."""
    rows, ranks = [], {}
    for share, epochs in ((0.1, 30), (1, 10)):
        about = {"mode": "finetune", "features": "h", "labels": share, "subset": seed}
        for name in SETS:
            model, training = fine_tune(options, method, seed, name, share, options.size)
            data = read_set(options, name)
            scores = m.predict(model, data.images, data.indices("test"), options.size)
            add_row(rows, ranks, data, scores, **about, **training)

        if method != SCRATCH:  # which trains all of it
            about["mode"] = "frozen"
        given = {"data": "shenzhen", "data_root": options.data_root, "size": options.size}
        given.update(weights=weights_of(options, method, seed), context="none", labels=(share,))
        given.update(epochs=min(epochs, 2 * options.epochs), seed=seed, mode=about["mode"])
        given.update(out=str(options.runs / "lungs" / slug(method, seed, share)), overwrite=True)
        test = m.segment(m.make_config("segment", m.SegmentConfig, given))["test"]
        rows.append({"set": "lungs", **about, "test": test["dice_pooled"]["mean"]})
    return {"rows": rows}, ranks


def point(options, method, seed):
    """The pointing game: whether the maximum of a heatmap lies in a box of its finding.

    The heatmap is that of `gradcam` before its ReLU, for a map may be negative everywhere. Beside
    it, two points that see no image: the centre, and the point that lies in most boxes of the
    finding, chosen on these very boxes. Images of patients whose labels were used are left out.
    """
    size, points = 224, {}
    model, training = fine_tune(options, method, seed, "nih128", 1, size)
    nih, data = read_set(options, "nih128"), m.PreparedData("nihbox256", options.data_root)
    used = np.isin(data.patient, nih.patient[np.isin(nih.split, ["train", "val"])])
    boxes = m.pd.read_csv(data.folder / "boxes.csv")
    boxes = boxes[~boxes["image"].isin(data.names[used])]
    for finding, of_finding in boxes.groupby("finding"):
        areas, hits = [], []
        for name, of_image in of_finding.groupby("image"):
            area = np.zeros((size, size), int)
            for x, y, width, height in of_image.loc[:, "x":].to_numpy() * size / data.size:
                area[round(y) : round(y + height), round(x) : round(x + width)] = 1
            image = data.images[data.names == name].to(model.fc.weight.device)
            last = model.encoder.stages(m.normalise(m.resize_images(image, size)))[-1]
            weight = model.fc.weight[nih.findings.index(finding)]
            heatmap = (weight[:, None, None] * last).sum(1, keepdim=True)
            heatmap = m.F.interpolate(heatmap, size=(size, size), mode="bilinear")
            areas.append(area.ravel())
            hits.append(int(area.flat[int(heatmap.argmax())]))
        inside = np.array(areas)  # (n, H W)
        best, centre = int(inside.sum(0).argmax()), (size + 1) * (size // 2)
        points[finding] = {method: hits, "image centre": inside[:, centre].tolist()}
        points[finding]["best fixed point"] = inside[:, best].tolist()
    return {"points": points, "left_out": int(used.sum()), **training}, {}


# ---------------------------------------------------------------- running them


def run_method(options, method, seed, stages):
    """Runs the stages (functions) of one method and seed, each unless it has been run."""
    for stage in stages:
        name, started = slug(stage.__name__, method, seed), time.time()
        path = options.runs / f"{name}.json"
        if path.exists():
            continue
        try:
            found, ranks = stage(options, method, seed)
        except Exception:  # of one stage; others go on, but not without an encoder
            print(f"{name} failed\n{traceback.format_exc()}", flush=True)
            if stage is pretrain:
                return
            continue
        with m.replacing(path.with_suffix(".npz")) as f:
            np.savez_compressed(f, **ranks)
        unit = {"stage": stage.__name__, "method": method, "seed": seed, **m.provenance()}
        unit.update(seconds=round(time.time() - started, 1), **found)
        m.write_json(path, unit)
        print(f"{time.strftime('%X')} {name}: {unit['seconds']} s", flush=True)
        m.torch.cuda.empty_cache()  # for the other processes


def study(options):
    """Runs all methods in parallel processes, and packs what they found.

    Seed 0 comes first, and the longest of each seed; the ablations come last. Each task has a
    process of its own.
    """
    # Units of other settings are not mixed in: open_run refuses a folder that holds them.
    m.open_run(options.runs, dict(m.select(options, "epochs", "size", "embedding_dim"), kind="nih"))
    tasks = [(options, PIXELS, 0, [pixels])]
    for seed in range(options.seeds):
        for method in [*reversed(METHODS), SCRATCH]:
            stages = {SCRATCH: [tune]}.get(method, [pretrain, frozen, tune])
            if method in POINTED and seed == 0:
                stages = [*stages, point]
            tasks.append((options, method, seed, stages))
    for seed in range(options.ablation_seeds):
        tasks += [(options, method, seed, [pretrain, frozen]) for method in ABLATIONS]
    with get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
        pool.starmap(run_method, tasks, chunksize=1)
    pack(options)


def pack(options):
    """Gathers the units in few files: units.json, a unit a line, and scores-SEED.npz."""
    options.out.mkdir(parents=True, exist_ok=True)
    units = [json.loads(path.read_text()) for path in sorted(options.runs.glob("*-*.json"))]
    (options.out / "units.json").write_text("[\n" + ",\n".join(map(json.dumps, units)) + "\n]\n")
    for seed in range(max(options.seeds, options.ablation_seeds)):
        ranks = {}
        for path in sorted(options.runs.glob(f"*-{seed}.npz")):
            ranks.update({f"{path.stem}|{key}": order for key, order in np.load(path).items()})
        np.savez_compressed(options.out / f"scores-{seed}.npz", **ranks)


def nih_part(options):
    """Makes the set `nih128` from all of NIH, prepared by `data_prep.py nih --size 96`.

    These are the images of patients 1336 to 3923, but for a few that were not at hand; patients are
    in the splits that results/nih_split.json lists, all others in training.
    """
    data, out = m.PreparedData("nih", options.data_root), Path(options.data_root, "nih128")
    rule = json.loads((HERE / "results/nih_split.json").read_text())
    number = data.patient.astype(int)
    kept = (number >= 1336) & (number <= 3923) & ~np.isin(data.names, rule["left_out"])
    table = m.pd.read_csv(data.folder / "labels.csv", dtype={"patient": str})[kept]
    table["split"] = "train"
    for split in ("val", "test"):
        table.loc[np.isin(number[kept], rule[split]), "split"] = split
    out.mkdir()
    np.save(out / "images.npy", data.images.numpy()[kept])
    table.to_csv(out / "labels.csv", index=False)
    meta = dict(data.meta, name="nih128", images=len(table))
    meta["images_sha256"] = m.file_hash(out / "images.npy")
    m.write_json(out / "meta.json", meta)


# ---------------------------------------------------------------- the analysis and the tables


def patient_draws(data, repeats=1000):
    """How often each test image counts when patients are drawn again: (1 + R, n), first once."""
    names, member = np.unique(data.patient[data.indices("test")].astype(str), return_inverse=True)
    drawn = np.random.default_rng(0).integers(0, len(names), (repeats, len(names)))
    times = np.array([np.bincount(row, minlength=len(names)) for row in drawn])
    return np.vstack([np.ones(len(member)), times[:, member]])


def average_precision(order, y, weights):
    """Average precision of one finding: (n,) ranks, (n,) labels, (R, n) weights -> (R,)."""
    falling = np.argsort(-order.astype(int))
    starts = np.unique(-order[falling].astype(int), return_index=True)[1]  # of equal ranks
    counted = np.add.reduceat(weights[:, falling], starts, 1)
    positive = np.add.reduceat((weights * y)[:, falling], starts, 1)
    precision = np.cumsum(positive, 1) / np.maximum(np.cumsum(counted, 1), 1)
    with np.errstate(invalid="ignore"):  # a draw without a positive image
        return (positive * precision).sum(1) / positive.sum(1)


def measures(data, order, weights):
    """What is reported of the test ranks (n, F) of one run: name -> (1 + R,) values."""
    y = data.labels[data.indices("test")].numpy()
    each = m.finding_aurocs(order, y, weights)
    found, column = {"test": each[:, 0]}, {f: k for k, f in enumerate(data.findings)}
    if data.meta["name"] == "kermany":
        found.update({f: each[:, 1 + column[f]] for f in column})
    if data.meta["name"] == "nih128":
        groups = {"fine": FINE, "coarse": COARSE, NO_HERNIA: [f for f in column if f != "Hernia"]}
        for group, members in groups.items():
            found[group] = each[:, [1 + column[f] for f in members]].mean(1)
        for f in RARE:
            found[f] = average_precision(order[:, column[f]], y[:, column[f]], weights)
    return found


def study_cells(options):
    """Runs by cell: (set, mode, features, labels, method) -> {seed: measures of each subset}."""
    ranks, cells = {}, {}
    for path in options.out.glob("scores-*.npz"):
        ranks.update(np.load(path))
    sets = {name: read_set(options, name) for name in SETS}
    weights = {name: patient_draws(data) for name, data in sets.items()}
    for unit in json.loads((options.out / "units.json").read_text()):
        for k, row in enumerate(unit.get("rows", [])):
            run = {"test": np.array([row["test"]])}  # of a level alone, and of lungs
            key = slug(unit["stage"], unit["method"], unit["seed"]) + f"|{k}"
            if key in ranks:
                run = measures(sets[row["set"]], ranks[key], weights[row["set"]])
            if "val" in row:
                run["val"] = np.array([row["val"]])
            cell = tuple({**row, **unit}[name] for name in CELL)
            cells.setdefault(cell, {}).setdefault(unit["seed"], []).append(run)
    return cells


def seed_values(runs, measure="test"):
    """A measure of a cell: (seeds, 1 + R), first as it is; subsets of the labels are averaged."""
    return np.array([np.mean([run[measure] for run in runs[seed]], 0) for seed in sorted(runs)])


def summary_row(cell, measure, each, draws):
    """Mean and std over seeds, and the 95 % interval.

    Args: each: (seeds,) as measured. draws: (R,) means over seeds of bootstrap samples.
    """
    row = dict(zip(CELL, cell, strict=True), measure=measure, mean=round(float(each.mean()), 7))
    row["each"] = each.round(7).tolist()
    if len(each) > 1:
        row["std"] = round(float(each.std(ddof=1)), 7)
    if len(draws):
        row["ci95"] = np.nanquantile(draws, [0.025, 0.975]).round(5).tolist()
    return row


def declared_rows(cells):
    """Paired differences in mean AUROC on NIH: bootstrap over test patients and seeds together.

    They are given once more without Hernia.
    """
    found = []
    for first, second, mode in DECLARED:
        for share, measure in ((0.1, "test"), (1, "test"), (0.1, NO_HERNIA), (1, NO_HERNIA)):
            cell = ("nih128", mode, "h", share)
            ours, theirs = cells.get((*cell, first), {}), cells.get((*cell, second), {})
            both = set(ours) & set(theirs)  # the seeds of both: some may be missing
            if not both:
                continue
            pairs = seed_values({seed: ours[seed] for seed in both}, measure)
            pairs = pairs - seed_values({seed: theirs[seed] for seed in both}, measure)
            chosen = np.random.default_rng(1).integers(0, len(pairs), pairs.shape)
            draws = np.take_along_axis(pairs, chosen, 0)[:, 1:].mean(0)
            name = "paired difference" if measure == "test" else f"paired difference {measure}"
            found.append(summary_row((*cell, f"{first} − {second}"), name, pairs[:, 0], draws))
    return found


def point_rows(units):
    """The pointing game: hit rates, with bootstrap intervals over images."""
    found = {}  # by cell, for the fixed points are the same in every unit
    for unit in units:
        for finding, hits_of in unit.get("points", {}).items():
            for method, hits in hits_of.items():
                cell = ("nihbox256", "finetune", f"{finding} ({len(hits)})", 1, method)
                draws = np.random.default_rng(2).choice(hits, (1000, len(hits))).mean(1)
                found[cell] = summary_row(cell, "pointing game", np.array([np.mean(hits)]), draws)
    return list(found.values())


def text_of(row):
    """A row of the summary as text: mean ± std [interval]."""
    text = f"{row['mean']:.3f}"
    if "std" in row:
        text += f" ± {row['std']:.3f}"
    if "ci95" in row:
        text += " [{:.3f}, {:.3f}]".format(*row["ci95"])
    return text


def markdown(summary):
    """All tables of the study, as lines: a row a method, a column the features and the labels."""
    frame, lines = m.pd.DataFrame(summary), ["# Tables of the study"]
    frame["text"] = [text_of(row) for row in summary]
    share = frame["labels"].map("{:.0%}".format)
    of_h = frame["features"] == "h"  # a table of label fractions; else, one for each of them
    frame["table"] = share.mask(of_h, "h")
    frame["column"] = share.where(of_h, frame["features"])
    for key, part in frame.groupby(["set", "mode", "measure", "table"], sort=False):
        table = part.pivot(index="method", columns="column", values="text").fillna("")
        table = table[part["column"].unique()]
        lines += ["", f"**{', '.join(key)}**", "", "| | " + " | ".join(table.columns) + " |"]
        lines.append("|---" * (len(table.columns) + 1) + "|")
        for method in dict.fromkeys([*METHODS, SCRATCH, PIXELS, *table.index]):
            if method in table.index:
                lines.append(f"| {method} | " + " | ".join(table.loc[method]) + " |")
    return lines


def tables(options):
    """Writes summary.json, a measure of a cell a line, and its tables: tables.md."""
    cells, summary = study_cells(options), []
    for cell, runs in cells.items():
        for measure in runs[min(runs)][0]:
            if measure == "test" or cell[2] == "h":
                values = seed_values(runs, measure)
                summary.append(summary_row(cell, measure, values[:, 0], values[:, 1:].mean(0)))
    summary += declared_rows(cells)
    summary += point_rows(json.loads((options.out / "units.json").read_text()))
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in summary)
    (options.out / "summary.json").write_text(f"[\n{lines}\n]\n")
    (options.out / "tables.md").write_text("\n".join(markdown(summary)) + "\n")


def notebook_run(data, runs, model=None):
    """The pre-training of notebook 02, section 2.4, which notebooks 04 and 05 use as well.

    Args: data: PreparedData. runs: folder of the runs. model: the MLVICX of notebook 02; None: it
        is read back, or trained here in the same way. Returns: path of the encoder.
    """
    path = runs / f"notebook-02-{data.meta['images_sha256'][:12]}.pt"
    if model is None and path.exists():
        return path
    if model is None:
        m.torch.manual_seed(0)
        model = m.MLVICX(embedding_dim=256, context="side").to(memory_format=m.torch.channels_last)
        views = m.RandomViews(48, crop_min=0.6, jitter=0.4, blur=0.0, solarize=0.0)
        parts = model, m.LARS(model.parameters(), trust=1.0), m.torch.amp.GradScaler(enabled=False)
        batches = data.indices("train")[:1024].split(32)
        for step in range(64):
            images = data.images[batches[step % len(batches)]]
            rate = m.cosine_schedule(step, total=64, warmup=16, base=0.012)
            m.train_step(*parts, *views(images, m.generator(0, "views", step)), rate)
    runs.mkdir(exist_ok=True)
    about = {"arch": model.encoder.arch, "size": 48, "data": [data.origin]}
    m.save_checkpoint(path, encoder=model.encoder.state_dict(), **about)
    return path


def main(words):
    """Reads the command and its flags, and runs it."""
    actions = {"nih": study, "nih-pack": pack, "nih-tables": tables, "nih-part": nih_part}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("command", choices=[*actions])
    add("--data-root", default="data", help="folder of the prepared sets")
    add("--runs", type=Path, default=Path("runs/nih"), help="folder of the runs")
    add("--out", type=Path, default=Path("runs/nih-packed"), help="folder of the results")
    add("--epochs", type=int, default=36, help="of pre-training; fine-tuning: at most twice that")
    add("--size", type=int, default=64, help="of the images, in pixels")
    add("--embedding-dim", type=int, default=4096, help="of pre-training")
    add("--seeds", type=int, default=3, help="pre-trainings of each method")
    add("--ablation-seeds", type=int, default=2, help="pre-trainings of each ablation")
    add("--workers", type=int, default=1, help="processes")
    options = parser.parse_args(words)
    actions[options.command](options)


if __name__ == "__main__":
    main(sys.argv[1:])
