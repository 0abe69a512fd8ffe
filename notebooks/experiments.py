"""The runs behind notebook 06 and the tables of the README; started again, it goes on.

    python notebooks/experiments.py pretrain                 # every variant below, 3 or 1 seeds
    python notebooks/experiments.py pretrain reference side  # these alone
    python notebooks/experiments.py evaluate                 # three pre-trainings a method, judged

Each run is a command of mlvicx.py on the demo set. `pretrain` adds a row to results/variants.csv
for every pre-training and share of labels, `evaluate` an entry to results/demo.json for every cell
of a table. On two cores a pre-training takes about three minutes; two processes share the work.
"""

import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import mlvicx as m  # noqa: E402

RESULTS = HERE / "results"
COMMON = "--amp bf16 --knn-every 1"  # bf16 halves the time on a CPU that has it
VICREG = "--context none --local-weight 0"
REPEATED = {  # three pre-trainings each
    "random": None,
    "reference": "",
    "VICReg": f"{VICREG} --no-final-bn",
    "VICReg, last BatchNorm": VICREG,
    "no blocks": "--context none",
    "channel alone": "--attention channel",
    "spatial alone": "--attention spatial",
    "blocks at the side": "--context side",
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
    "no crop": "--crop-min 1",
    "crop from 0.08": "--crop-min 0.08",
    "blur 2": "--blur 2",
    "rotation 15": "--rotation 15",
    "solarize 0.2": "--solarize 0.2",
}
SHARES = (0.01, 0.1, 0.3, 1)
METHODS = ("random", "VICReg", "VICReg, last BatchNorm", "reference")


def folder(name, seed):
    return Path("runs") / "variants" / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def command(words):
    """Runs one command of mlvicx.py from its words."""
    given = vars(m.build_parser().parse_args(words))
    cls, run = m.COMMANDS[given["command"]]
    return run(m.make_config(given.pop("command"), cls, given))


def variant_rows(name, flags, seed):
    """Pre-trains one variant with one seed and probes it: a row for every share of labels."""
    out, metrics = folder(name, seed), {}
    weights = "random"
    if flags is not None:
        command(f"pretrain {COMMON} {flags} --seed {seed} --out {out}".split())
        weights = f"{out}/encoder.pt"
        last = m.pd.read_csv(out / "metrics.csv").iloc[-1]
        metrics = {k: last.get(k) for k in ("rank_global", "rank_local", "knn_auroc", "val_loss")}
    groups = m.PreparedData("demo").meta["groups"]
    for share in SHARES:
        words = f"classify --weights {weights} --labels {share} --seed {seed} --out {out}-{share}"
        found = command([*words.split(), "--overwrite"])["test"]
        auroc = {k: v["auroc"]["mean"] for k, v in found["per_finding"].items()}
        precision = {f"AP {k}": v["average_precision"] for k, v in found["per_finding"].items()}
        means = {g: sum(auroc[k] for k in names) / len(names) for g, names in groups.items()}
        row = {"variant": name, "flags": flags or "", "seed": seed, "labels": share}
        yield row | {"mean": found["mean_auroc"]["mean"]} | means | auroc | precision | metrics


def pretrain_variants(names):
    """Appends the rows that results/variants.csv lacks; seed 0 of every variant comes first."""
    path, known = RESULTS / "variants.csv", REPEATED | ONCE
    for seed in range(3):
        for name in names or known:
            done = m.pd.read_csv(path) if path.exists() else m.pd.DataFrame(columns=["variant"])
            here = done[done.variant == name]
            if name in ONCE and seed or len(here) and (here.seed == seed).any():
                continue
            try:
                table = m.pd.DataFrame(variant_rows(name, known[name], seed))
            except m.UserError as e:
                print(f"left to another process: {e}")
                continue
            table["knn_auroc"] = table.get("knn_auroc")
            columns = done.columns if len(done.columns) > 1 else table.columns
            text = (
                table.reindex(columns=columns)
                .round(5)
                .to_csv(index=False, header=not path.exists())
            )
            with open(path, "a") as f:
                f.write(text)


def evaluate():
    """Adds to results/demo.json what it lacks: frozen and fine-tuned, every share of labels."""
    path = RESULTS / "demo.json"
    jobs = [("classify", mode, share) for share in SHARES for mode in ("frozen", "finetune")]
    jobs += [("segment", mode, 0.1) for mode in ("frozen", "finetune")]
    for task, mode, share in jobs:
        for name in METHODS:
            weights = ",".join(f"{folder(name, s)}/encoder.pt" for s in range(3))
            weights = "random --seeds 3" if name == "random" else weights
            words = f"{task} --weights {weights} --mode {mode} --labels {share:g} --amp bf16"
            kept = json.loads(path.read_text()) if path.exists() else []
            if words in [entry["command"] for entry in kept]:
                continue
            out = folder(f"{task} {mode} {share:g} {name}", "all")
            found = command([*words.split(), "--out", str(out)])
            kept.append({"method": name, "command": words} | found)
            with m.replacing(path) as f:
                f.write(json.dumps(kept, indent=1).encode())


if __name__ == "__main__":
    os.chdir(HERE.parent)
    which, *names = sys.argv[1:] or ["nothing"]
    unknown = set(names) - set(REPEATED | ONCE)
    if which not in ("pretrain", "evaluate") or unknown:
        sys.exit(f"expected pretrain [VARIANT ...] or evaluate, found {which} {sorted(unknown)}")
    pretrain_variants(names) if which == "pretrain" else evaluate()
