"""Tests of mlvicx.py and data_prep.py, in the order of their sections.

    python -m pytest -q test_mlvicx.py

Each number is compared with a hand-computed value, a slow oracle written here, torchvision or
scikit-learn. Real X-rays are used where the variable MLVICX_XRAYS names a folder of them.
"""

import ast
import contextlib
import copy
import csv
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import tokenize
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.optim.optimizer import register_optimizer_step_pre_hook

import data_prep as dp
import mlvicx as m

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "notebooks"))
import bench
import experiments

torch.set_num_threads(1)  # the models here are too small for two
if "PYTEST_XDIST_WORKER" in os.environ:  # each process has one core, its notebooks too
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The same for processes that are started here; without xdist, notebooks have all threads."""
    # A shell's background job ignores Ctrl-C, and so would every process that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Every test works in a new folder, and names files relative to it."""
    monkeypatch.chdir(tmp_path)


def words(args):
    """The words of a command that is given in parts, as a shell would split it."""
    return " ".join(map(str, args)).split()


def relative(a, b):
    """Largest difference of two tensors as a share of the size of the second."""
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


def read_json(path):
    """The value of a JSON file."""
    return json.loads(Path(path).read_text())


def write_set(folder, n=48, size=48, seed=0, **columns):
    """A prepared set of smooth noise: brightness carries finding A, texture finding B."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    bright, rough = rng.integers(0, 2, (2, n))
    coarse = torch.from_numpy(rng.random((n, 1, 6, 6)))
    x = F.interpolate(coarse, size=(size, size), mode="bicubic")[:, 0].numpy() * 120
    x += 60 * bright[:, None, None]
    x += 30 * rough[:, None, None] * rng.standard_normal((n, size, size))
    images = x.clip(0, 255).astype(np.uint8)
    np.save(folder / "images.npy", images)
    np.save(folder / "masks.npy", (images > 150).astype(np.uint8))
    table = pd.DataFrame({"image": [f"i{i:04d}" for i in range(n)], "patient": np.arange(n) // 2})
    splits = np.array(["train", "train", "train", "val", "test"])
    table["split"] = splits[table["patient"] % 5]
    table = table.assign(A=bright, B=rough, has_mask=np.arange(n) % 7 > 0, **columns)
    table.to_csv(folder / "labels.csv", index=False)
    meta = {"name": folder.name, "size": size, "images": n, "findings": ["A", "B"]}
    meta["images_sha256"] = f"{seed}-{n}-{size}"
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


SMALL = ["--size", "32", "--embedding-dim", "16", "--batch-size", "8", "--epochs", "2"]


@pytest.fixture()
def place(tmp_path):
    """A working folder that holds the prepared set data/toy."""
    write_set("data/toy")
    return tmp_path


def python(code, *args):
    """Runs code that imports the modules in a process of its own."""
    call = [sys.executable, "-c", code, *words(args)]
    env = os.environ | {"PYTHONPATH": str(HERE)}
    return subprocess.run(call, env=env, capture_output=True, text=True, timeout=120)


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond a size, as on a full disk."""
    old, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (old, most))


def become_nobody(main, args):
    """A command of somebody else than root, who may do anything; reads the working folder."""
    os.chmod(".", 0o755)
    if os.geteuid() == 0:
        os.setuid(65534)
    return main(args)


def in_a_child(work, *args):
    """The exit code of a forked process, which needs no imports anew."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(work(*args))
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(*args):
    """Runs a command in this process and demands success."""
    assert m.main(words(args)) == 0


def refused(*args, main=m.main):
    """The one line with which a command is refused."""
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        assert main(words(args)) == 2
    lines = shown.getvalue().strip().splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert "Traceback" not in "".join(lines)
    return lines[-1]


def spy(monkeypatch, owner, name):
    """A list to which every call of a function adds its arguments."""
    calls, real = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: calls.append(a) or real(*a, **k))
    return calls


def assert_same_bits(one, two):
    """Tensors, or collections of them, are equal; so are their NaNs."""
    torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------- 2. configuration


def test_defaults_are_the_authors_recipe_and_a_preset_yields_to_flags():
    recipe = {"size": 224, "batch_size": 0, "lr": 0.2, "epochs": 300, "warmup_epochs": 2}
    recipe |= {"embedding_dim": 4096, "final_bn": True, "context": "side", "init": "random"}
    recipe |= {"sim_coeff": 25, "std_coeff": 25, "cov_coeff": 1, "local_weight": 1}
    config = vars(m.make_config("pretrain", m.PretrainConfig, {"data": "nih"}))
    assert config | recipe == config
    demo = m.make_config("pretrain", m.PretrainConfig, {"lr": 7.0})
    assert demo.lr == 7.0 and demo.size == m.PRESETS["pretrain", "demo"]["size"]


@pytest.mark.parametrize(
    "command",
    [
        "pretrain --size 16",
        "pretrain --epochs 0",
        "pretrain --lr nan",
        "pretrain --crop-min 0",
        "pretrain --levels 1,1",
        "pretrain --levels 1.5",
        'pretrain --levels "a"',
        "classify --labels 2",
        "segment --batch-size 0",
    ],
)
def test_a_number_without_sense_is_refused_by_name(command):
    assert command.split()[1] in refused(command)


def test_every_flag_is_in_the_help_with_its_defaults(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "999")  # so that no line is wrapped
    for name, (cls, _) in m.COMMANDS.items():
        with pytest.raises(SystemExit):
            m.main([name, "--help"])
        shown = capsys.readouterr().out
        entries = {entry.split()[0].strip(","): entry for entry in shown.split("\n  --")}
        entries["files"] = shown  # which are no flag
        for field, setting in cls.__dataclass_fields__.items():
            text = entries[field.replace("_", "-")]
            if setting.default not in ("", False, ()):
                assert f"(default: {setting.default})" in text, (name, field)
            preset = m.PRESETS.get((name, "demo"), {})
            assert field not in preset or f"(demo: {preset[field]})" in text, (name, field)


def plain_bottleneck(x, block):
    """The definition: both pools through one bottleneck, then a convolution of both statistics."""
    down, up = block.channel.reduce.weight.flatten(1), block.channel.expand.weight.flatten(1)
    gates = [(pool @ down.T).clamp(min=0) @ up.T for pool in (x.mean((2, 3)), x.amax((2, 3)))]
    x = x * sum(gates).sigmoid()[:, :, None, None]
    statistics = torch.stack([x.mean(1), x.amax(1)], 1)
    return x * F.conv2d(statistics, block.spatial.conv.weight, padding=3).sigmoid()


# ---------------------------------------------------------------- 3. context-bottleneck


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_context_bottleneck_is_channel_then_spatial_attention(memory):
    torch.manual_seed(0)
    block = m.ContextBottleneck(6).double()
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    y = block(x.contiguous(memory_format=memory))
    assert torch.allclose(y, plain_bottleneck(x, block), atol=1e-12)


# ---------------------------------------------------------------- 4. encoder


def test_maps_representation_and_parameter_count():
    model = m.MLVICX()
    with torch.no_grad():
        h, maps = model.encoder(torch.randn(2, 1, 224, 224))
    assert h.shape == (2, 512)
    expected = [(64, 112), (64, 56), (128, 28), (256, 14), (512, 7)]
    assert [tuple(x.shape[1:3]) for x in maps] == expected
    for part, millions in ((model, 114.89), (model.encoder.context, 0.35)):
        assert round(sum(p.numel() for p in part.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_without_blocks_or_at_their_side_the_encoder_is_torchvisions(backbone):
    torch.manual_seed(0)
    reference = getattr(torchvision.models, backbone)().eval()
    for context in ("none", "side"):
        encoder = m.Encoder(backbone, context).eval()
        missing = encoder.load_state_dict(reference.state_dict(), strict=False)
        assert all(k.startswith("context.") for k in missing.missing_keys)
        assert missing.unexpected_keys == ["fc.weight", "fc.bias"]
        x = torch.randn(2, 3, 64, 64)
        assert torch.allclose(reference.fc(encoder(x)[0]), reference(x), atol=1e-5)


def test_inline_blocks_feed_the_next_stage_and_side_blocks_do_not():
    x = torch.randn(2, 3, 64, 64)
    for context, feeds in (("inline", True), ("side", False)):
        encoder = m.Encoder(context=context).eval()
        for level in "15":
            before = encoder(x)[0]
            with torch.no_grad():
                encoder.context[level].spatial.conv.weight.add_(0.5)
            assert (not torch.equal(before, encoder(x)[0])) == feeds


def test_side_has_blocks_only_where_they_are_trained():
    side = m.MLVICX(levels=(2, 5), attention="channel", embedding_dim=8)
    assert [conv.in_channels for conv in side.local_head.convs] == [64, 512]
    blocks = [name for name in side.encoder.state_dict() if "context" in name]
    steps = ("channel.reduce.weight", "channel.expand.weight")
    assert blocks == [f"context.{level}.{step}" for level in (2, 5) for step in steps]
    assert set(m.Encoder(context="inline", levels=(2, 5)).context) == set("12345")
    with pytest.raises(ValueError, match="attention"):
        m.ContextBottleneck(8, "neither")


def test_an_image_that_the_network_cannot_take_is_refused():
    for shape in ((2, 2, 64, 64), (2, 3, 16, 64), (3, 64, 64)):
        with pytest.raises(ValueError, match="expected .* got"):
            m.Encoder()(torch.zeros(shape))


# ---------------------------------------------------------------- 5. projectors


@pytest.mark.parametrize("size", [64, 96, 112, 224])
@pytest.mark.parametrize("batch", [3, 20])  # below and above the embedding dimension
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_fast_and_literal_forms_agree_in_loss_and_every_gradient(size, batch, memory):
    torch.manual_seed(size)
    head = m.LocalProjector((4, 4, 6, 8, 10), 8, hidden=5).double()
    maps = []
    for channels, stride in ((4, 2), (4, 4), (6, 8), (8, 16), (10, 32)):
        side = math.ceil(size / stride)
        x = torch.randn(batch, channels, side, side, dtype=torch.float64)
        maps.append(x.contiguous(memory_format=memory).requires_grad_())
    # Biases that feed a BatchNorm, or shift both views alike, have a gradient of zero.
    zero = re.compile(r"convs\.\d\.bias|mlp\.(0|3|6|7)\.bias")
    weights = [p for name, p in head.named_parameters() if not zero.fullmatch(name)]
    results = []
    for form, covariance in (
        (m.aggregate, m.covariance_loss),
        (m.aggregate_literal, m.covariance_literal),
    ):
        noisy = [x + 0.1 * torch.sin(9 * x) for x in maps]
        z1, z2 = (head.mlp(form(x, head.convs).flatten(1)) for x in (maps, noisy))
        loss, _ = m.vicreg_loss(z1, z2, covariance=covariance)
        results.append([loss, *torch.autograd.grad(loss, [*maps, *weights])])
    for fast, literal in zip(*results, strict=True):
        assert relative(fast, literal) < 1e-10


@pytest.mark.parametrize("side", [112, 56, 28, 14, 7, 3, 2, 1, 64, 100])
def test_pool_matrix_is_resize_then_pool(side):
    x = torch.randn(1, 1, side, side + 1, dtype=torch.float64)
    p = m.pool_matrix(side, side + 1, x.dtype, x.device)
    resized = F.interpolate(x, size=(64, 64), mode="bilinear", align_corners=False)
    assert torch.allclose(p @ x.flatten(), F.avg_pool2d(resized, 16).flatten(), atol=1e-12)
    assert torch.allclose(p.sum(1), torch.ones(16, dtype=torch.float64))


def test_last_batchnorm_silences_the_variance_hinge_at_the_start():
    torch.manual_seed(0)
    h = torch.randn(16, 12)
    z = m.projector_mlp(12, 32, final_bn=True)(h)
    assert torch.allclose(z.std(0), torch.tensor(math.sqrt(16 / 15)), atol=1e-3)
    assert m.variance_loss(z) == 0
    bare = m.projector_mlp(12, 32, final_bn=False)
    assert isinstance(bare[-1], torch.nn.Linear) and bare[-1].bias is None
    assert m.variance_loss(bare(h)) > 0.1


def test_fault2_every_parameter_is_built_at_once_and_trained():
    model = m.MLVICX(embedding_dim=8)
    before = dict(model.named_parameters())
    old = {name: p.detach().clone() for name, p in before.items()}
    optimizer = m.LARS(model.parameters(), lr=1.0, trust=1.0)
    views = torch.randn(2, 4, 3, 64, 64)
    for _ in range(2):
        optimizer.zero_grad()
        m.mlvicx_loss(*model(*views))[0].backward()
        optimizer.step()
    assert len(list(model.parameters())) == len(before)
    for name, p in before.items():
        assert p.grad is not None
        assert p.ndim == 1 or not torch.equal(p, old[name]), name


# ---------------------------------------------------------------- 6. model


def test_views_pass_one_after_the_other_so_batchnorm_sees_one_view():
    torch.manual_seed(0)
    model = m.MLVICX(embedding_dim=8)
    view1, view2 = torch.randn(2, 4, 3, 64, 64)
    (g1, g2), (l1, l2) = model(view1, view2)
    assert g1.shape == l1.shape == (4, 8)
    assert torch.allclose(model.global_head(model.encoder(view2)[0]), g2, atol=1e-5)
    assert torch.allclose(model.local_head(model.encoder(view1)[1]), l1, atol=1e-5)
    with pytest.raises(ValueError, match="one shape"):
        model(view1, view2[:2])


def test_vicreg_is_the_model_without_its_additions():
    for weight in (0.0, 0.5):
        given = {"context": "none", "final_bn": False, "embedding_dim": 8, "local_weight": weight}
        model = m.build_model(m.PretrainConfig(**given))
        z, local = model(*torch.randn(2, 4, 3, 64, 64))
        names = {name.split(".")[0] for name in model.state_dict()}
        assert ("local_head" in names) == (len(local) > 0) == (weight > 0)
        if not local:
            total, log = m.mlvicx_loss(z, local)
            assert torch.allclose(total, m.vicreg_loss(*z)[0]) and "loss_local" not in log
    with pytest.raises(ValueError, match="side"):
        m.MLVICX(context="side", local=False)


# ---------------------------------------------------------------- 7. losses


def test_losses_by_hand():
    z1 = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    z2 = torch.tensor([[1.0, 0.0], [2.0, 2.0]])
    assert m.invariance_loss(z1, z2) == (1 + 0 + 0 + 4) / 4
    # Standard deviations of z1: sqrt(2) and sqrt(8), no hinge; of z2: sqrt(0.5), a hinge, sqrt(2).
    # That hinge is averaged over two dimensions and two views.
    variance = (1 - math.sqrt(0.5001)) / 4
    # Covariances: of z1 1 * 2 + 1 * 2 = 4, of z2 0.5 * 1 * 2 = 1; squared, twice, over D = 2.
    by_hand = {"invariance": 1.25, "variance": variance, "covariance": 16 + 1}
    total, parts = m.vicreg_loss(z1, z2, 2, 3, 5)
    assert parts == pytest.approx(by_hand)
    assert total.item() == pytest.approx(2 * 1.25 + 3 * variance + 5 * 17)


@pytest.mark.parametrize("shape", [(5, 30), (30, 5), (7, 7), (2, 3)])
def test_covariance_equals_its_definition_with_gradient(shape):
    z = torch.randn(*shape, dtype=torch.float64).requires_grad_()
    fast, literal = m.covariance_loss(z), m.covariance_literal(z)
    assert relative(fast, literal) < 1e-10
    (a,), (b,) = torch.autograd.grad(fast, z), torch.autograd.grad(literal, z)
    assert relative(a, b) < 1e-10


def test_mlvicx_loss_adds_both_levels_and_logs_every_part():
    z = torch.randn(4, 6, 5).requires_grad_()
    total, log = m.mlvicx_loss((z[0], z[1]), (z[2], z[3]), local_weight=0.5, cov_coeff=2.0)
    one = m.vicreg_loss(z[0], z[1], cov_coeff=2.0)[0]
    two = m.vicreg_loss(z[2], z[3], cov_coeff=2.0)[0]
    assert torch.allclose(total, one + 0.5 * two) and total.requires_grad
    parts = {"loss", "loss_global", "loss_local"}
    for head in ("global", "local"):
        parts |= {f"{head}_invariance", f"{head}_variance", f"{head}_covariance"}
    assert set(log) == parts and not any(value.requires_grad for value in log.values())


def test_losses_refuse_what_has_no_variance_and_name_the_shape():
    for loss in (m.variance_loss, m.covariance_loss, m.covariance_literal):
        with pytest.raises(ValueError, match=r"\(1, 4\)"):
            loss(torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 3\)"):
        m.invariance_loss(torch.zeros(2, 4), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fault9_losses_are_float32_and_finite_in_half_precision(dtype):
    large = (1e4 * torch.randn(8, 64)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        for z in (large, torch.ones(8, 64, dtype=dtype)):
            loss, _ = m.vicreg_loss(z, z.flip(0))
            assert loss.dtype == torch.float32 and loss.isfinite()
        found = m.covariance_loss(large)
    assert relative(found.double(), m.covariance_literal(large.double())) < 1e-5


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("final_bn", [True, False])
def test_a_constant_batch_stays_finite_in_loss_and_gradients(amp, final_bn):
    torch.manual_seed(0)
    model = m.MLVICX(embedding_dim=8, final_bn=final_bn)
    views = torch.full((2, 4, 3, 32, 32), 0.5)
    with m.autocast(torch.device("cpu"), amp):
        z = model(*views)
    loss, parts = m.mlvicx_loss(*z)
    loss.backward()
    assert loss.isfinite() and all(part.isfinite() for part in parts.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------- 8. optimiser and schedule


def slow_lars(p, g, buffer, lr, weight_decay, momentum, trust):
    """One parameter, as the authors' loop does it."""
    if p.ndim > 1:
        g = g + weight_decay * p
        if p.norm() > 0 and g.norm() > 0:
            g = g * (trust * p.norm() / g.norm())
    buffer = momentum * buffer + g
    return p - lr * buffer, buffer


def test_lars_equals_the_plain_loop():
    torch.manual_seed(0)
    shapes = [(4, 3), (3, 2, 2, 2), (5,), (2, 2)]
    params = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
    params[3].data.zero_()
    optimizer = m.LARS(params, lr=0.3, weight_decay=0.1, momentum=0.9, trust=0.02)
    expected = [(p.detach().clone(), 0) for p in params]
    for _ in range(4):
        for k, p in enumerate(params):
            p.grad = torch.randn_like(p) * (k > 0)
            q, buffer = expected[k]
            expected[k] = slow_lars(q, p.grad.clone(), buffer, 0.3, 0.1, 0.9, 0.02)
        optimizer.step()
    for p, (q, _) in zip(params, expected, strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=0)


def test_lars_keeps_the_settings_of_its_groups_and_calls_the_closure():
    """A group's own weight decay and trust, a learning rate that is a tensor."""
    weights = torch.randn(2, 3, 2)
    for lr in (0.3, torch.tensor(0.3)):
        params = [w.clone().requires_grad_() for w in weights]
        groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.5, "trust": 0.1}]
        optimizer = m.LARS(groups, lr=lr, weight_decay=0.0, trust=0.02)

        def closure(params=params):
            for p in params:
                p.grad = 2 * p.detach()
            return 7

        assert optimizer.step(closure) == 7
        for p, w, decay, trust in zip(params, weights, (0.0, 0.5), (0.02, 0.1)):
            expected, _ = slow_lars(w, 2 * w, 0 * w, 0.3, decay, 0.9, trust)
            assert torch.allclose(p, expected, rtol=1e-6)
        for group in optimizer.param_groups:  # a changed rate, as the training step sets it
            group["lr"] = lr * 0
        before = [p.clone() for p in params]
        optimizer.step(closure)
        assert all(map(torch.equal, params, before))


def test_cosine_schedule_warms_up_and_ends_at_exactly_the_floor():
    rates = [m.cosine_schedule(i, 100, 10, 0.5) for i in range(100)]
    assert rates[0] == 0.05 and rates[9] == rates[10] == 0.5 and rates[-1] == 0.5 * 0.001
    assert np.all(np.diff(rates[10:]) < 0)
    assert m.cosine_schedule(54.5, 100, 10, 1.0, floor=0) == pytest.approx(0.5)
    assert m.cosine_schedule(0, 1, 0, 1.0) == m.cosine_schedule(1, 2, 1, 1.0) == 0.001
    for warmup in (0.4, 0.5, 1.5, 2.5, 9.9, 99):  # never above the base, at most half of all
        rates = [m.cosine_schedule(i, 20, warmup, 1.0) for i in range(20)]
        assert max(rates) == 1.0 and rates[-1] == 0.001


# ---------------------------------------------------------------- 9. data and views


def test_generator_is_a_function_of_its_keys():
    keys = [(0, "a", 7), (0, "a", 7), (0, "a", 8), (1, "a", 7), (0, "b", 7)]
    first, same, *others = [m.generator(*key).initial_seed() for key in keys]
    assert first == same and len({first, *others}) == 4


def test_unprepared_and_half_prepared_data_are_refused(place):
    line = refused("pretrain --data none")
    assert "none cannot be used" in line and "toy" in line
    Path("data/empty").mkdir()
    assert "meta.json" in refused("pretrain --data empty")
    half = write_set("data/half")
    np.save(half / "images.npy", np.zeros((7, 48, 48), np.uint8))
    assert "7 images, 48 rows" in refused("pretrain --data half")
    (half / "labels.csv").write_text("image,patient\n")
    assert "prepare" in refused("pretrain --data half")


def test_a_patient_in_two_splits_is_refused(place):
    patient = np.arange(48) // 2
    patient[6] = 0  # of training, and now of validation
    write_set("data/leak", patient=patient)
    with pytest.raises(m.UserError, match="patient 0 is in two splits"):
        m.PreparedData("leak")


def test_normalise_has_the_statistics_of_imagenet():
    x = torch.rand(2, 4, 4)
    found = torchvision.transforms.v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert torch.allclose(m.normalise(x), found(x[:, None].expand(-1, 3, -1, -1)))


def one_image_at_a_time(image, p, size):
    """The same parameters through torchvision's functional operations."""
    x = image[None].float() / 255
    if p["angle"]:
        x = TF.rotate(x, p["angle"], interpolation=TF.InterpolationMode.BILINEAR)
    box = [int(p[k]) for k in ("top", "left", "height", "width")]
    mode = TF.InterpolationMode.BICUBIC
    x = TF.resized_crop(x, *box, [size, size], interpolation=mode, antialias=True).clamp(0, 1)
    x = TF.horizontal_flip(x) if p["flip"] else x
    tones = [(TF.adjust_brightness, p["brightness"]), (TF.adjust_contrast, p["contrast"])]
    for change, value in tones if p["brightness_first"] else tones[::-1]:
        x = change(x, value)
    x = TF.gaussian_blur(x, [23, 23], [p["sigma"]] * 2) if p["blurred"] else x
    x = TF.solarize(x, 128 / 255) if p["solarized"] else x
    return x[0]


@pytest.mark.parametrize("source,size", [(96, 64), (64, 64), (48, 96), (256, 37)])
@pytest.mark.parametrize("rotation", [0.0, 25.0])
def test_views_are_torchvisions_with_the_same_parameters(source, size, rotation):
    images = F.interpolate(torch.rand(16, 1, 12, 12), size=(source, source), mode="bicubic")
    images = (images[:, 0] * 255).clamp(0, 255).byte()
    views = m.RandomViews(size, rotation=rotation, solarize=0.5)
    params = views.draw(16, source, m.generator("same"))
    assert params["blurred"][0].all() and params["solarized"][1].any()
    for view in (0, 1):
        p = {k: v[view] for k, v in params.items()}
        rendered = views.render(images, p)
        for i, image in enumerate(images):
            one = {k: v[i].item() for k, v in p.items()}
            difference = (rendered[i] - one_image_at_a_time(image, one, size)).abs()
            # Solarize jumps at its threshold: a pixel within 1e-5 of it may fall on either side.
            close = difference < 2e-5
            assert close.float().mean() > (0.998 if one["solarized"] else 0.99999)


def test_view_parameters_follow_the_recipe():
    p = m.RandomViews(224).draw(4000, 256, m.generator("law"))
    share = p["height"] * p["width"] / 256**2
    assert 0.075 < share.min() and share.max() <= 1.0
    for start, length in (("top", "height"), ("left", "width")):
        assert (p[start] + p[length]).max() <= 256 and p[start].min() >= 0
    ratio = p["width"] / p["height"]
    assert 0.7 < ratio.min() and ratio.max() < 1.43
    for name, rates in (("flip", [0.5, 0.5]), ("blurred", [1, 0.1]), ("solarized", [0, 0.2])):
        assert np.allclose(p[name].float().mean(1), rates, atol=0.03), name
    changed = (p["brightness"] != 1).float().mean()
    assert abs(changed - 0.8) < 0.02
    for name in ("brightness", "contrast"):
        assert p[name].aminmax() == pytest.approx((0.6, 1.4), abs=0.01)
    assert 0.1 <= p["sigma"].min() and 1.9 < p["sigma"].max() <= 2.0


def test_each_augmentation_can_be_removed():
    images = torch.randint(0, 256, (6, 64, 64), dtype=torch.uint8)
    plain = m.normalise(images.float() / 255).repeat(2, 1, 1, 1)
    nothing = {"crop_min": 1, "flip": 0, "jitter": 0, "blur": 0, "solarize": 0}
    strong = {"crop_min": 0.1, "flip": 1, "jitter": 0.4, "blur": 2, "solarize": 1, "rotation": 30}
    for name in (None, *strong):
        settings = {**nothing, name: strong[name]} if name else nothing
        views = torch.cat(m.RandomViews(64, **settings)(images, m.generator(1)))
        difference = (views - plain).abs().max()
        assert difference > 0.1 if name else difference < 1e-5, name
    for same in (True, False):
        views = m.RandomViews(32, identical_views=same)(images, m.generator(0))
        assert torch.equal(*views) == same


# ---------------------------------------------------------------- 10. pre-training


def test_auroc_by_hand_and_as_scikit_learn():
    for scores, labels, expected in (
        ([1, 2, 3, 4], [0, 0, 1, 1], 1),
        ([1, 2, 2, 3], [0, 1, 0, 1], 0.875),  # a tie counts half
        ([5, 5, 5], [0, 1, 1], 0.5),
        ([9, 1, 2], [math.nan, 0, 1], 1),
        ([1, 2], [1, 1], math.nan),
    ):
        assert m.auroc(scores, labels) == pytest.approx(expected, nan_ok=True)
    rng = np.random.default_rng(0)
    scores, labels, weights = (rng.integers(0, top, (20, 60)) for top in (9, 2, 4))
    for k in range(20):
        expected = roc_auc_score(labels[k], scores[k], sample_weight=weights[k])
        assert m.auroc(scores[k], labels[k], weights)[k] == pytest.approx(expected, abs=1e-12)
    mean, *each = m.finding_aurocs([[1, 1], [2, 2], [3, 3]], [[0, 1], [1, 1], [1, 1]])
    assert mean == each[0] == 1 and math.isnan(each[1])


def test_effective_rank_counts_directions():
    torch.manual_seed(0)
    flat = torch.randn(400, 3) @ torch.randn(3, 50)
    assert 2 < m.effective_rank(flat) <= 3
    # Singular values of 3 to 1: shares of 0.75 and 0.25.
    cross = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert m.effective_rank(cross) == pytest.approx(0.75**-0.75 * 0.25**-0.25)
    assert m.effective_rank(torch.ones(9, 4)) == 0


def test_knn_scores_are_neighbour_means():
    train = torch.tensor([[9.0, 1.0], [9.1, 1.0], [10.0, 0.0], [10.0, 0.1]])
    labels = torch.tensor([[1.0], [1.0], [0.0], [math.nan]])
    scores = m.knn_scores(train, labels, torch.tensor([[9.0, 2.0], [11.0, 0.0]]), k=2)
    assert scores[:, 0].tolist() == [1.0, 0.0]


def test_neighbours_of_validation_images_are_training_images(place, monkeypatch):
    seen, data = [], m.PreparedData("toy")

    def predict(encoder, images, rows, *args):
        seen.append(rows.sort().values)
        return data.labels[rows]

    monkeypatch.setattr(m, "predict", predict)
    m.knn_auroc(m.PretrainConfig(), None, data)
    assert all(map(torch.equal, seen, (data.indices("train"), data.indices("val"))))


def run_pretrain(*extra, out="runs/toy"):
    """`pretrain` on the toy set, without the linear probe at its end; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "closing_table", lambda *args: None)
        return m.main(words(["pretrain --data toy", *SMALL, "--out", out, *extra]))


def test_pretraining_writes_its_folder_and_reports_the_probe(place, capsys):
    run("pretrain --data toy --knn-every 1 --out runs/toy", *SMALL)
    shown = capsys.readouterr().out
    number = r"\d+\.\d{3}"
    line = rf"^epoch 1/2  loss {number} \(global {number}, local {number}\)  val {number}  "
    line += rf"k-NN AUROC {number}  \d+ images/s  [\d:]+ left$"
    assert len(re.search(line, shown, re.MULTILINE).group()) <= 120
    for name, weights in (("random", "random"), ("learned", "runs/toy/encoder.pt")):
        probe = read_json(f"runs/toy/probe-{name}/results.json")
        mean = probe["test"]["mean_auroc"]["mean"]
        text = shown.split(f"\n{weights}, frozen: mean and 95 % interval")[1]
        assert re.search(r"\nmean AUROC +(\S+) \[", text)[1] == f"{mean:.3f}"
    table = pd.read_csv("runs/toy/metrics.csv")
    assert table["epoch"].tolist() == [1, 2]
    assert table["lr"][0] == pytest.approx(m.cosine_schedule(2, 6, 6, 0.2 * 8 / 256))
    for head in ("global", "local"):
        for name in ("invariance", "variance", "covariance"):
            assert {f"{head}_{name}", f"val_{head}_{name}"} <= set(table)
        assert table[f"rank_{head}"].gt(1).all() and table[f"std_{head}"].gt(0).all()
    assert table["knn_auroc"].between(0, 1).all()
    assert np.allclose(table["loss"], table["loss_global"] + table["loss_local"], rtol=1e-5)
    assert run_pretrain("--knn-every 1") == 0
    assert "resumes at step 6 of last.pt" in capsys.readouterr().out  # and trains nothing
    assert pd.read_csv("runs/toy/metrics.csv").equals(table)


def test_training_sees_the_training_split_alone_unless_told_otherwise(place):
    data = m.PreparedData("toy")
    for include_val, splits in ((False, ["train"]), (True, ["train", "val"])):
        rows, held = m.pretraining_rows(data, include_val=include_val)
        assert torch.equal(rows, data.indices(*splits))
        assert not torch.equal(held, data.indices("val"))
        assert torch.equal(held.sort().values, data.indices("val"))
    Path("skip.txt").write_text("i0000 \n\ni0001\n")
    assert len(m.pretraining_rows(data, "skip.txt")[0]) == len(data.indices("train")) - 2
    Path("skip.txt").write_text("another name\n")
    with pytest.raises(m.UserError, match="name 0 images"):
        m.pretraining_rows(data, "skip.txt")


def test_a_change_of_settings_is_refused_and_named(trained):
    line = refused("pretrain --data toy --out runs/toy --lr 9", *SMALL)
    assert "lr" in line and "--overwrite" in line
    write("mine/encoder.pt", "of somebody else")
    assert "not of a run" in refused("pretrain --data toy --out mine", *SMALL)
    assert Path("mine/encoder.pt").read_text() == "of somebody else\n"


def test_overwrite_removes_the_files_of_a_run_and_no_others(trained):
    mine = [write(f"runs/toy/{name}", "x") for name in ("thesis.txt", "notes/a", "my-encoder.pt")]
    before = Path("runs/toy/encoder.pt").read_bytes()
    assert run_pretrain("--seed 5 --epochs 1 --overwrite") == 0
    assert Path("runs/toy/encoder.pt").read_bytes() != before
    assert all(path.read_text() == "x\n" for path in mine)


def test_the_automatic_batch_fits_the_device_and_the_images(monkeypatch):
    def choose(wanted, device, world):
        monkeypatch.setattr(m, "processes", lambda: (0, world))
        return m.choose_batch_size(wanted, 1000, device)

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [m.choose_batch_size(0, 1000, d) for d in (cpu, cuda)] == [64, 256]
    assert m.choose_batch_size(0, 39, cpu) == 39
    assert choose(0, cuda, 6) == 252 and choose(128, cpu, 4) == 128
    for wanted, world in ((1, 1), (1001, 1), (64, 3), (0, 600)):
        with pytest.raises(m.UserError, match="--batch-size"):
            choose(wanted, cpu, world)


def test_batches_are_a_function_of_seed_epoch_and_step(place, monkeypatch):
    """Every epoch has all images but for the remainder; processes have parts of the batch."""
    data, views, cpu = m.PreparedData("toy"), m.RandomViews(32), torch.device("cpu")
    given = (data, torch.arange(20, 40), views, m.PretrainConfig(batch_size=6), cpu)
    data.images[:20] = 0  # no training images
    whole = list(m.load_batches(range(6), *given))
    for first in (0, 3):
        images = torch.cat([images for _, images, _ in whole[first : first + 3]])
        assert len(images.unique(dim=0)) == 18
    assert not torch.equal(whole[0][1], whole[3][1])
    assert len({str(params) for _, _, params in whole}) == 6
    # The second of two processes, after a stop at step 5.
    monkeypatch.setattr(m, "processes", lambda: (1, 2))
    ((step, images, params),) = m.load_batches([5], *given)
    assert step == 5 and torch.equal(images, whole[5][1][3:])
    for name, value in params.items():
        assert torch.equal(value, whole[5][2][name][:, 3:])


def interrupt_at(monkeypatch, stop_at, number=signal.SIGTERM):
    """Sends this process a signal during a step; returns the count of steps, a list."""
    step, taken = m.train_step, []

    def interrupted(*args, **kwargs):
        taken.append(1)
        if len(taken) == stop_at:
            os.kill(os.getpid(), number)
        return step(*args, **kwargs)

    monkeypatch.setattr(m, "train_step", interrupted)
    return taken


def test_exact_resume(place, monkeypatch, capsys):
    """After Ctrl-C or SIGTERM in the middle, the last and the first step of an epoch."""
    assert run_pretrain(out="runs/whole") == 0
    for stop_at, steps, number in (
        (2, 2, signal.SIGINT),
        (3, 1, signal.SIGTERM),
        (4, 1, signal.SIGINT),
    ):
        with monkeypatch.context() as patch:
            taken = interrupt_at(patch, steps, number)
            assert run_pretrain(out="runs/cut") == 130
        assert len(taken) == steps  # it stops after the step in hand
        assert f"stopped at step {stop_at}; {m.RESUMES}" in capsys.readouterr().out
        assert m.load_checkpoint("runs/cut/last.pt")["step"] == stop_at
    assert run_pretrain(out="runs/cut") == 0
    assert_same_run("runs/whole", "runs/cut")


def test_checkpoints_come_by_time_and_at_the_end(place, monkeypatch):
    saved, save = [], m.save_training

    def spy(*args):
        saved.append(args[2]["step"])
        return save(*args)

    monkeypatch.setattr(m, "save_training", spy)
    for minutes in (10, 0):
        assert run_pretrain("--epochs 1 --checkpoint-minutes", minutes, out=f"runs/{minutes}") == 0
    assert saved == [3, 1, 2, 3]
    assert_same_run("runs/10", "runs/0")
    # One checkpoint cannot be written; the next one is, and then the run stops.
    Path("runs/0/last.pt.tmp").symlink_to("/dev/full")
    assert run_pretrain("--overwrite --checkpoint-minutes 0", out="runs/0") == 2
    assert m.load_checkpoint("runs/0/last.pt")["step"] == 2


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(monkeypatch):
    sizes, sync = [], os.fsync

    def measured(number):
        sync(number)
        sizes.append(os.fstat(number).st_size)

    monkeypatch.setattr(os, "fsync", measured)
    m.write_json("x.json", {})
    assert sizes == [os.path.getsize("x.json")]


def assert_same_run(a, b):
    """Equal bits in weights, buffers, optimiser, scaler and metrics of two run folders."""
    assert Path(a, "metrics.csv").read_text() == Path(b, "metrics.csv").read_text()
    states = [m.load_checkpoint(Path(folder, "last.pt")) for folder in (a, b)]
    encoders = [m.load_checkpoint(Path(folder, "encoder.pt"))["encoder"] for folder in (a, b)]
    assert len(states[0]["history"]) == states[0]["history"][-1]["epoch"]
    for one, two in (states, encoders):
        assert_same_bits(one, two)


def make_training(**given):
    """All parts of a small training on a CPU, as `pretrain` makes them."""
    given = {"data": "toy", "size": 32, "embedding_dim": 8, "batch_size": 4, **given}
    config = m.make_config("pretrain", m.PretrainConfig, given)
    return m.build_parts(config, torch.device("cpu"))


def test_the_scaler_of_float16_is_part_of_the_state(place):
    views = torch.randn(3, 2, 2, 3, 32, 32)

    def step(parts, pair):
        return m.train_step(*parts.values(), *pair, lr=0.01, amp="fp16")

    one, two = (make_training(amp="fp16") for _ in range(2))
    for pair in views[:2]:
        step(one, pair)
    state = {"step": 2, "history": [], "logs": []}
    m.save_training(place, one, state, m.ThreadPoolExecutor(1), None).result()
    assert two["scaler"].state_dict() != one["scaler"].state_dict()
    assert m.resume(place, two)["step"] == 2
    assert two["scaler"].state_dict() == one["scaler"].state_dict()
    logs = [step(parts, views[2]) for parts in (one, two)]
    assert_same_bits(*logs)


def test_a_skipped_step_of_float16_does_not_spoil_the_mean_gradient_norm(place):
    scaler, plain = (torch.amp.GradScaler("cpu", enabled=on) for on in (True, False))

    def log(loss, norm):
        return {"loss": torch.tensor(loss), "grad_norm": torch.tensor(norm)}

    logs = m.read_logs([log(1.0, math.inf), log(1.0, 3.0)], 2, scaler)
    row = watch(make_training()["model"], torch.arange(8), logs=logs)
    assert (row["loss"], row["grad_norm"]) == (1.0, 3.0)
    with pytest.raises(m.UserError, match="step 2: loss is inf"):
        m.read_logs([log(math.inf, 1.0)], 3, scaler)
    with pytest.raises(m.UserError, match="step 0: grad_norm is inf"):
        m.read_logs([log(1.0, math.inf)], 1, plain)


def test_recording_graphs_leaves_the_model_as_it_was(monkeypatch, capsys):
    """The stand-in runs the model on noise, as recording does, and then fails."""

    def stand_in(model, views):
        model(*views)
        raise RuntimeError("not on this machine")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    model = m.MLVICX(embedding_dim=8)
    before = copy.deepcopy(model.state_dict())
    m.record_graphs(model, 4, 32, "off")
    assert "no CUDA graph, so that steps are slower: not on this" in capsys.readouterr().out
    assert_same_bits(model.state_dict(), before)


def test_a_flipped_bit_or_a_cut_anywhere_is_found_or_harmless():
    content, path = torch.arange(300.0), Path("x.pt")
    m.save_checkpoint(path, x=content)
    good = path.read_bytes()
    inside = good.index(content.numpy().tobytes())
    for k in [*range(0, len(good), len(good) // 80), *range(inside, inside + 1200, 97)]:
        path.write_bytes(good[:k])
        with pytest.raises(m.UserError, match="damaged"):
            m.load_checkpoint(path)
        path.write_bytes(good[:k] + bytes([good[k] ^ 1 << k % 8]) + good[k + 1 :])
        try:
            found = m.load_checkpoint(path)["x"]
        except m.UserError as e:
            assert "damaged" in str(e)
        else:  # names, dates and padding of the archive
            assert torch.equal(found, content) and not inside <= k < inside + 1200


def test_fault8_damaged_checkpoints_are_found_and_the_previous_one_taken(place, capsys):
    assert run_pretrain("--checkpoint-minutes 0") == 0
    reference = Path("runs/toy/metrics.csv").read_text()
    path = Path("runs/toy/last.pt")
    path.write_bytes(path.read_bytes()[:-1])
    assert run_pretrain("--checkpoint-minutes 0") == 0
    assert re.search("last.pt is damaged(?s:.*)of previous.pt", capsys.readouterr().out)
    assert Path("runs/toy/metrics.csv").read_text() == reference
    assert m.load_checkpoint(path)["step"] == 6
    for name in ("last.pt", "previous.pt"):
        Path("runs/toy", name).write_bytes(b"x")
    line = refused("pretrain --data toy --out runs/toy --checkpoint-minutes 0", *SMALL)
    assert "damaged" in line and "--overwrite" in line


def test_files_of_an_earlier_version(trained):
    """Its encoder.pt, with a SHA-256 as comment of the archive, loads; its last.pt is refused."""
    for name in ("encoder.pt", "last.pt"):
        state = m.load_checkpoint(f"runs/toy/{name}")
        del state["format"]
        buffer = io.BytesIO()
        torch.save(state, buffer)
        archive = buffer.getvalue()
        digest = hashlib.sha256(archive).hexdigest().encode()
        with m.replacing(f"runs/toy/{name}") as f:
            f.write(archive[:-2] + len(digest).to_bytes(2, "little") + digest)
    assert m.load_encoder("runs/toy/encoder.pt")[1]["size"] == 32
    line = refused("pretrain --data toy --out runs/toy", *SMALL)
    assert "last.pt is of an earlier version" in line and "--overwrite" in line


class Bomb:
    """A pickle that writes a file when it is loaded."""

    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_a_malicious_pickle_is_refused_and_does_not_run(place):
    m.save_checkpoint("bomb.pt", encoder=Bomb())
    with pytest.raises(m.UserError, match="damaged, or not written"):
        m.load_checkpoint("bomb.pt")
    assert not Path("exploded").exists()


def test_every_file_loads_with_weights_only(trained):
    found = [torch.load(path, weights_only=True) for path in Path("runs").rglob("*.pt")]
    assert {"encoder", "optimizer", "classifier"} <= set().union(*found)


KILLER = """
import os, sys, torch
import mlvicx as m
class Killer:
    def __init__(self, f, left): self.f, self.left = f, left
    def write(self, data):
        data = bytes(data)
        if len(data) > self.left:
            self.f.write(data[: self.left]); self.f.flush(); os._exit(9)
        self.left -= len(data)
        return self.f.write(data)
    def __getattr__(self, name): return getattr(self.f, name)
    def __enter__(self): return self
    def __exit__(self, *e): self.f.close()
if mode == "bytes":
    opened = open
    def dying_open(path, mode):
        f = opened(path, mode)
        return Killer(f, left) if mode == "wb" else f
    m.open = dying_open
else:
    replace, count = os.replace, [0]
    def dying(a, b):
        count[0] += 1
        if mode == "before": os._exit(9)
        if mode == "between" and count[0] == 2: os._exit(9)
        replace(a, b)
        if count[0] == 2: os._exit(9)
    os.replace = dying
m.save_checkpoint("last.pt", "previous.pt", x=torch.full((5000,), 2.0), turn=2)
"""


@pytest.mark.parametrize("mode", ["bytes", "before", "between", "after"])
def test_killed_at_any_byte_the_last_checkpoint_or_the_one_before_loads(mode):
    m.save_checkpoint("last.pt", x=torch.full((5000,), 1.0), turn=1)
    whole = os.path.getsize("last.pt")
    for left in (0, 1, whole // 2, whole - 1) if mode == "bytes" else (0,):
        assert in_a_child(exec, KILLER, {"mode": mode, "left": left}) == 9
        turns = []
        for name in ("last.pt", "previous.pt"):
            with contextlib.suppress(m.UserError):
                turns.append(m.load_checkpoint(name)["turn"])
        assert turns and set(turns) <= {1, 2}


def test_killed_by_the_system_then_exact_resume(place):
    assert run_pretrain(out="runs/whole") == 0
    args = words(["pretrain --data toy --out runs/cut --checkpoint-minutes 0", *SMALL])
    process = subprocess.Popen([sys.executable, HERE / "mlvicx.py", *args])
    while process.poll() is None and not Path("runs/cut/previous.pt").exists():
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert run_pretrain(out="runs/cut") == 0
    assert_same_run("runs/whole", "runs/cut")


def test_pretraining_without_the_right_to_write_is_one_line(trained, capfd):
    Path("runs/toy").chmod(0o555)
    good = Path("runs/toy/last.pt").read_bytes()
    for out in ("runs/toy", "runs/toy/new"):
        args = words(["pretrain --data toy --overwrite --out", out, *SMALL])
        assert in_a_child(become_nobody, m.main, args) == 2
        assert re.fullmatch("error: .*Permission denied.*\n", capfd.readouterr().err)
    assert Path("runs/toy/last.pt").read_bytes() == good
    assert not list(Path("runs/toy").glob("*.tmp"))


def resident_mb():
    """Resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


class Tiny(torch.nn.Module):
    """Stands in for the model, so that two thousand steps of the real loop take seconds."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.BatchNorm1d(8))
        self.encoder.arch = {}

    def forward(self, view1, view2):
        return [self.encoder(view[:, 0, :8, :8].flatten(1)) for view in (view1, view2)], ()


def test_two_thousand_steps_with_no_growth_of_memory_or_open_files(place, monkeypatch):
    write_set("data/many", n=5000, size=32)
    seen, step = [], m.train_step
    monkeypatch.setattr(m, "build_model", lambda config: Tiny())

    def watched(*args, **kwargs):
        seen.append((resident_mb(), len(os.listdir("/proc/self/fd"))))
        return step(*args, **kwargs)

    monkeypatch.setattr(m, "train_step", watched)
    args = dict(data="many", size=32, batch_size=4, epochs=2, embedding_dim=8, knn_every=0)
    m.pretrain(m.PretrainConfig(**args, include_val=True, warmup_epochs=0.1, lr=0.1))
    (memory, files), (memory_end, files_end) = seen[500], seen[1999]
    assert memory_end - memory < 20 and files_end <= files + 2


GROWTH = """
import sys, time, torch
import mlvicx as m
def anonymous():  # MB that are no file's
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024
for folder in sys.argv[1:]:
    before, start = anonymous(), time.process_time()
    data = m.PreparedData(folder)
    print(time.process_time() - start, anonymous() - before, end=" ")
    rows, _ = m.pretraining_rows(data)
    before, most = anonymous(), 0
    for images in m.prefetch(lambda r: data.images[r], rows.split(64)):
        assert images.shape[1:] == (64, 64)
        most = max(most, anonymous() - before)
    print(most)
"""


def test_a_set_of_112120_images_opens_at_once_and_an_epoch_of_it_takes_no_more_memory():
    for n in (1120, 112120):
        folder = Path(str(n))
        folder.mkdir()
        images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (n, 64, 64))
        images[:: n // 100] = np.random.default_rng(0).integers(0, 256, (64, 64))  # the rest: holes
        table = pd.DataFrame({"image": [f"{k:08d}_000.png" for k in range(n)]})
        table["patient"] = np.arange(n) // 4
        table["split"] = np.where(table["patient"] % 5 == 4, "test", "train")
        table[[f"finding {f}" for f in range(14)]] = 0
        table.to_csv(folder / "labels.csv", index=False)
        meta = {"name": "large", "images": n, "findings": list(table.columns[3:])}
        (folder / "meta.json").write_text(json.dumps(meta | {"images_sha256": ""}))
    done = python(GROWTH, "1120 112120")
    assert done.returncode == 0, done.stderr
    (_, _, small), (seconds, opened, large) = np.loadtxt(io.StringIO(done.stdout))
    assert seconds < 2 and opened < 200  # seconds of CPU, MB
    assert large - small < 20  # MB over an epoch, of 460 MB of images


def test_a_device_without_room_and_missing_folders_are_one_line(place):
    m.save_checkpoint("last.pt", turn=1)
    Path("last.pt.tmp").symlink_to("/dev/full")  # what is written goes to a device without room
    with pytest.raises(OSError, match="last.pt could not be written: .*No space left"):
        m.save_checkpoint("last.pt", "previous.pt", x=torch.zeros(9999))
    assert m.load_checkpoint("last.pt")["turn"] == 1
    assert not os.path.lexists("last.pt.tmp") and not Path("previous.pt").exists()
    with pytest.raises(OSError, match="absent/last.pt could not be written"):
        m.save_checkpoint("absent/last.pt")
    for flags, word in (
        ("--exclude-ids absent.txt", "absent.txt"),
        ("--exclude-ids last.pt", "utf-8"),
        ("--data-root absent", "absent"),
        ("--out last.pt/run", "last.pt"),  # below a file
    ):
        assert word in refused("pretrain --data toy", *SMALL, flags)


def test_a_full_disk_is_one_line(place):
    with full_disk(300_000):
        refused("pretrain --data toy --out runs/full", *SMALL)
    assert not list(Path("runs/full").glob("*.tmp"))


def test_a_config_of_another_program_stays(place):
    path = write(Path("runs/mine/config.json"), '{"settings": [1]}')
    line = refused("pretrain --data toy --out runs/mine --overwrite", *SMALL)
    assert "not of a run" in line and read_json(path) == {"settings": [1]}


def test_a_run_folder_belongs_to_one_command(place):
    data, given = m.PreparedData("toy"), {"epochs": 1, "lr": 0.1, "batch_size": 8, "size": 32}
    folder, (one, two) = Path("runs/one"), (m.ClassifyConfig(**given), m.SegmentConfig(**given))
    m.open_run(folder, m.run_settings(one, data))
    encoder = write("runs/one/encoder.pt")
    for overwrite in (False, True):
        with pytest.raises(m.UserError, match="not of a run of this command"):
            m.open_run(folder, m.run_settings(two, data), overwrite)
    assert encoder.exists()


def test_a_prepared_set_comes_before_a_folder_of_its_name(place):
    Path("toy").mkdir()
    assert len(m.PreparedData("toy").images) == 48


def test_the_validation_loss_of_training_images_is_called_so(place, capsys):
    assert run_pretrain("--include-val --epochs 1") == 0
    assert "  val (trained on) " in capsys.readouterr().out


def test_a_checkpoint_of_another_architecture_names_the_key(trained):
    state = m.load_checkpoint("runs/toy/encoder.pt")
    arch = state["arch"] | {"backbone": "resnet34"}
    m.save_checkpoint("odd.pt", encoder=state["encoder"], arch=arch)
    line = refused("classify --data toy --size 32 --weights odd.pt")
    assert "layer1.2.conv1.weight" in line


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_part(place, monkeypatch):
    variance, calls = m.variance_loss, itertools.count()

    def diverging(z):  # four times a step, in the third step for the first time
        return variance(z) * (math.nan if next(calls) >= 8 else 1)

    monkeypatch.setattr(m, "variance_loss", diverging)
    args = ("pretrain --data toy --out runs/bad --checkpoint-minutes 0", *SMALL)
    assert "step 2: global_variance is nan" in refused(*args)
    assert m.load_checkpoint("runs/bad/last.pt")["step"] == 2


def watch(model, rows, logs=({"loss": 0.0},), step=50, **given):
    """The row of metrics.csv at the end of an epoch, after 50 steps."""
    data = m.PreparedData("toy")
    config = m.PretrainConfig(**{"size": 32, "embedding_dim": 16, "epochs": 1, **given})
    state = {"step": step, "history": [], "logs": list(logs)}
    parts = {"model": model, "optimizer": m.LARS(model.parameters())}
    m.finish_epoch(config, parts, state, 1.0, data, rows, m.RandomViews(32), Path())
    return state["history"][0]


def test_weights_that_diverge_in_the_last_step_stop_the_run(place):
    model = make_training()["model"]
    model.global_head.mlp[0].weight.data.fill_(math.nan)
    with pytest.raises(m.UserError, match="val_loss is nan; stopped"):
        watch(model, m.PreparedData("toy").indices("val"))


def test_collapse_warning_fires_on_a_constant_encoder_and_not_on_a_healthy_one(place):
    model = make_training(embedding_dim=16)["model"]
    data, views = m.PreparedData("toy"), m.RandomViews(32)
    with torch.no_grad():  # running statistics as after some steps of training
        for step in range(30):
            model(*views(data.images[:32], m.generator(step)))
    assert m.collapse_warning(watch(model, torch.arange(48))) is None
    with torch.no_grad():
        model.encoder.bn1.weight.zero_()
        model.encoder.conv1.weight.zero_()
    assert "collapsed" in m.collapse_warning(watch(model, torch.arange(48)))
    assert m.collapse_warning(watch(model, torch.arange(48), step=49)) is None
    assert "local" in m.collapse_warning({"rank_local": 1.5})


def test_the_first_epochs_of_a_healthy_run_raise_no_alarm(place, capsys):
    """The running statistics of BatchNorm are young, and the embeddings in eval mode are small."""
    assert run_pretrain("--epochs 3 --batch-size 0 --trust 0.001 --embedding-dim 64") == 0
    assert "collapsed" not in capsys.readouterr().out


def test_the_validation_loss_is_that_of_all_its_images_together(place, monkeypatch):
    """Not a mean over chunks, whose covariance depends on their size."""
    model = make_training()["model"]
    data, views = m.PreparedData("toy"), m.RandomViews(32)
    config = m.PretrainConfig(seed=3, cov_coeff=2.0)

    def found(rows):
        return m.validation_metrics(config, model, data, rows, views)

    whole = found(torch.arange(48))
    model.eval()
    with torch.no_grad():
        z = model(*views(data.images, m.generator(3, "val", 0)))
    for name, value in m.mlvicx_loss(*z, cov_coeff=2.0)[1].items():
        assert whole[f"val_{name}"] == pytest.approx(float(value), rel=1e-4)
    assert whole["rank_local"] == pytest.approx(m.effective_rank(z[1][0]), rel=1e-3)
    monkeypatch.setattr(m, "VALIDATION_IMAGES", 20)
    assert found(torch.arange(48)) == found(torch.arange(20)) != whole
    assert found(torch.arange(1)) == {}


def test_imagenet_weights_without_network_are_one_clear_line(place, monkeypatch):
    offline = "torchvision.models._api.load_state_dict_from_url"
    monkeypatch.setattr(offline, lambda *args, **kwargs: os.stat("no route to host"))
    args = ("pretrain --data toy --out runs/toy --init imagenet", *SMALL)
    assert "ImageNet" in refused(*args)
    assert not Path("runs").exists()


def test_imagenet_weights_are_torchvisions(monkeypatch):
    theirs = torchvision.models.resnet18().state_dict()
    enum = torchvision.models.ResNet18_Weights
    monkeypatch.setattr(enum, "get_state_dict", lambda *args, **kwargs: theirs)
    model = m.build_model(m.PretrainConfig(init="imagenet", embedding_dim=8))
    encoder, origin = m.load_encoder("imagenet")
    for found in (model.encoder.state_dict(), encoder.state_dict()):
        for name, value in theirs.items():
            assert name.startswith("fc.") or torch.equal(found[name], value)
    assert encoder.arch["context"] == "none" and not origin


def test_the_channel_maximum_of_cuda_is_that_of_the_pool(monkeypatch):
    """Equal maxima, which are common in bf16, do not share the gradient in either form."""
    torch.manual_seed(0)
    block, x = m.ChannelAttention(8), torch.randn(2, 8, 5, 5).round().requires_grad_()
    found = []
    for on_cuda in (False, True):
        monkeypatch.setattr(torch.Tensor, "is_cuda", on_cuda)
        y = block(x)
        found.append((y, torch.autograd.grad(y.square().sum(), x)[0].sum((2, 3))))
        monkeypatch.setattr(F, "adaptive_max_pool2d", None)  # it is not used on CUDA
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-4)


def test_a_compiled_run_is_the_run(place, monkeypatch):
    assert run_pretrain("--epochs 1", out="runs/plain") == 0
    compiled, compile = [], torch.compile
    monkeypatch.setattr(  # the program as a graph, run without a C++ compiler
        torch,
        "compile",
        lambda f, **given: compiled.append(f) or compile(f, backend="aot_eager", **given),
    )
    assert run_pretrain("--epochs 1 --compile", out="runs/compiled") == 0
    a, b = (pd.read_csv(f"runs/{name}/metrics.csv") for name in ("plain", "compiled"))
    assert len(compiled) == 5 and list(a) == list(b)
    assert np.allclose(a, b, rtol=1e-3, equal_nan=True)
    states = [m.load_checkpoint(f"runs/{name}/encoder.pt") for name in ("plain", "compiled")]
    assert states[0]["encoder"].keys() == states[1]["encoder"].keys()


DDP_STEP = """
import os, sys, torch, torch.distributed as dist
import mlvicx as m
rank, store = int(sys.argv[1]), f"file://{os.getcwd()}/store"
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
torch.manual_seed(0)
model = m.MLVICX(embedding_dim=8).double().to(device)
views = torch.randn(2, 8, 3, 32, 32, dtype=torch.float64)[:, 4 * rank : 4 * rank + 4].to(device)
config = m.make_config("pretrain", m.PretrainConfig, {})
called, optimizer = m.for_training(config, model, device), m.LARS(model.parameters())
scaler = torch.amp.GradScaler(device.type, enabled=False)
log = m.train_step(called, optimizer, scaler, *views, 0.1)
logged = torch.stack([log["loss"], log["grad_norm"]])
torch.save([logged.cpu(), *model.cpu().parameters()], f"{rank}.pt")
dist.destroy_process_group()
"""


class Halves(torch.nn.Module):
    """What two processes compute on a CPU: each has the statistics of its part of the batch."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, view1, view2):
        one, two = (self.model(*half) for half in zip(view1.chunk(2), view2.chunk(2)))
        joined = [torch.cat(halves) for halves in zip(one[0] + one[1], two[0] + two[1])]
        return joined[:2], joined[2:]


def test_a_training_step_of_two_processes_is_that_of_one():
    """On a CPU with BatchNorm per process; on CUDA with SyncBatchNorm, as one process has it."""
    env = os.environ | {"PYTHONPATH": str(HERE)}
    calls = [[sys.executable, "-c", DDP_STEP, str(rank)] for rank in (0, 1)]
    running = [subprocess.Popen(call, env=env, stderr=subprocess.PIPE) for call in calls]
    assert all(p.wait(120) == 0 for p in running), running[0].stderr.read()
    torch.manual_seed(0)
    model = m.MLVICX(embedding_dim=8).double()
    before = [p.detach().clone() for p in model.parameters()]
    views = torch.randn(2, 8, 3, 32, 32, dtype=torch.float64)
    called = model if torch.cuda.is_available() else Halves(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # it changes neither log nor step
    log = m.train_step(called, m.LARS(model.parameters()), scaler, *views, 0.1)
    for rank in (0, 1):
        logged, *weights = torch.load(f"{rank}.pt", weights_only=True)
        assert relative(logged, torch.stack([log["loss"], log["grad_norm"]])) < 1e-10
        for a, b, start in zip(weights, model.parameters(), before, strict=True):
            assert (a - b).norm() <= 1e-6 * (b - start).norm() + 1e-12


def test_torchrun_trains_with_two_processes(place):
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    call.append(HERE / "mlvicx.py")
    call += words(["pretrain --data toy", *SMALL, "--epochs 1 --batch-size 4 --out"])
    assert subprocess.run([*call, "runs/whole"], timeout=300).returncode == 0
    assert len(pd.read_csv("runs/whole/metrics.csv")) == 1
    # Stopped by a signal to the launcher, long before the epoch ends, and resumed: the same bits.
    process = subprocess.Popen([*call, "runs/cut"], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "batch_size" in line:  # the training begins
            break
    process.terminate()
    process.communicate(timeout=60)
    assert 0 < m.load_checkpoint("runs/cut/last.pt")["step"] < 7
    assert subprocess.run([*call, "runs/cut"], timeout=300).returncode == 0
    assert_same_run("runs/whole", "runs/cut")


# ---------------------------------------------------------------- 11. evaluation


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    """A folder with a toy set and an encoder that was pre-trained on it for two epochs."""
    place = tmp_path_factory.mktemp("trained")
    with contextlib.chdir(place):
        write_set("data/toy", n=80)
        run("pretrain --data toy --out runs/toy", *SMALL)
    return place


@pytest.fixture()
def trained(trained_once, tmp_path):
    """A copy of it, the working folder of a test."""
    shutil.copytree(trained_once / "data", "data")
    shutil.copytree(trained_once / "runs", "runs", copy_function=os.link)
    return tmp_path


def unit(folder, index, seed):
    """What an evaluation has kept of one encoder and seed."""
    (path,) = Path(folder).glob(f"unit-*-{index}-{seed}.npy")
    return np.load(path)


def evaluate(*args):
    """An evaluation command on the toy set with its encoder; returns results.json."""
    name, *rest = words(args)
    rest = words([f"--weights runs/toy/encoder.pt --out runs/{name}", *rest])
    run(name, "--data toy --size 32", *rest)
    out = rest[len(rest) - rest[::-1].index("--out")]  # of two the last one counts
    return read_json(f"{out}/results.json")


def test_label_subsets_are_nested_by_patient_and_the_same_for_everyone(trained):
    data = m.PreparedData("toy")
    small, large = (set(m.label_subset(data, f).tolist()) for f in (0.1, 0.3))
    assert small < large < set(m.label_subset(data, 1.0).tolist())
    assert large == set(m.label_subset(data, 0.3).tolist())
    assert small != set(m.label_subset(data, 0.1, seed=1).tolist())


def test_fault7_label_subsets_never_cut_through_a_patient(trained):
    data = m.PreparedData("toy")
    inside, train = m.label_subset(data, 0.2).tolist(), data.indices("train").tolist()
    chosen = set(data.patient[inside])
    assert inside == [row for row in train if data.patient[row] in chosen] != train
    assert len(chosen) == 5  # of 24, rounded up


def test_masked_bce_by_hand():
    logits = torch.tensor([[0.0, 2.0], [0.0, -1.0]])
    labels = torch.tensor([[1.0, math.nan], [0.0, 0.0]])
    expected = [math.log(2), math.log(1 + math.exp(-1))]
    assert m.masked_bce(logits, labels).tolist() == pytest.approx(expected, rel=1e-6)


def test_linear_probe_is_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    torch.manual_seed(0)
    x = torch.randn(300, 6) * torch.tensor([1, 2, 3, 4, 5, 6.0]) + 3
    y = ((x @ torch.randn(6, 2)) + torch.randn(300, 2) * 3 > 5).float()
    weight, bias = m.linear_probe(x, y, x, y, strengths=(0.01,))
    scaled = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    reference = LogisticRegression(C=1 / (0.01 * 300), tol=1e-9, max_iter=1000)
    for scores, labels in zip(F.linear(x, weight, bias).T, y.T):
        expected = reference.fit(scaled, labels.numpy()).decision_function(scaled)
        assert np.allclose(scores.numpy(), expected, atol=2e-2)


def test_linear_probe_leaves_out_unknown_labels_and_survives_one_class():
    torch.manual_seed(0)
    x = torch.randn(60, 4)
    truth = (x[:, 0] > 0).float()
    x[:, 1] = 5.1  # says nothing
    y = torch.stack([truth, torch.ones(60)], 1)
    y[::2, 0] = math.nan
    weight, bias = m.linear_probe(x, y, x, y)
    assert weight.isfinite().all() and bias.isfinite().all()
    assert m.auroc(F.linear(x, weight, bias)[:, 0].numpy(), truth.numpy()) > 0.9


def test_frozen_results_have_their_definition(trained, monkeypatch):
    """Also: features are computed once an encoder, and what is finished is read back."""
    calls = spy(monkeypatch, m, "predict")
    args = "classify --seeds 2 --labels 0.2,1 --out runs/c1"
    r = evaluate(args)
    assert len(calls) == 1 and len(calls[0][2]) == 80
    assert {"task", "data", "weights", "mode", "settings", "provenance"} <= set(r)
    assert torch.load("runs/c1/classifier.pt", weights_only=True)["findings"] == ["A", "B"]
    test, data = r["test"]["1"], m.PreparedData("toy")
    assert set(test["mean_auroc"]) == {"mean", "std", "ci95"} and test["defined_findings"] == 2
    runs = [np.load(path) for path in Path("runs/c1").glob("unit-1-*.npy")]
    for f, one in enumerate(test["per_finding"].values()):
        y = data.labels[data.indices("test"), f].numpy()
        assert (one["positives"], one["n"], len(runs)) == (int(y.sum()), len(y), 2)
        aurocs = [roc_auc_score(y, run[:, f]) for run in runs]
        precisions = [average_precision_score(y, run[:, f]) for run in runs]
        assert one["auroc"]["mean"] == pytest.approx(np.mean(aurocs))
        assert one["average_precision"] == pytest.approx(np.mean(precisions))
    alone = evaluate("classify --seeds 2 --labels 0.2 --out runs/c2")["test"]
    assert alone == r["test"]["0.2"]  # fractions are evaluated as in runs of their own
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(np, "save", lambda f, x: 1 / 0)  # a kill while a unit is written
        evaluate("classify --out runs/c3")
    assert not list(Path("runs/c3").glob("unit*"))
    monkeypatch.setattr(m, "linear_probe", None)  # nothing is computed again
    assert evaluate(args)["test"] == r["test"]


@pytest.mark.parametrize("mode", ["frozen", "finetune"])
def test_new_weights_or_labels_under_an_old_path_never_get_old_results(trained, monkeypatch, mode):
    calls, weights = spy(monkeypatch, m, "label_subset"), "runs/toy/encoder.pt"
    args = ("classify --epochs 1 --out runs/c --mode", mode)
    first = evaluate(*args)["test"]
    assert evaluate(*args)["test"] == first and len(calls) == 1  # read back
    state = m.load_checkpoint(weights)
    state["encoder"] = m.Encoder(**state["arch"]).state_dict()
    m.save_checkpoint(weights, **state)
    given = (*args, "--data toy --size 32 --weights", weights)
    assert "weights_sha256" in refused(*given) and len(calls) == 1
    second = evaluate(*args, "--overwrite")["test"]
    assert second != first
    table = pd.read_csv("data/toy/labels.csv")
    table.assign(A=table["B"]).to_csv("data/toy/labels.csv", index=False)
    line = refused(*given)
    assert "data_sha256" in line and "--overwrite" in line
    assert evaluate(*args, "--overwrite")["test"] != second and len(calls) == 3


def test_bf16_is_for_cards_that_compute_in_it(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for computes, expected in ((False, "fp16"), (True, "bf16")):  # fp16: T4, V100
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, c=computes: c or including_emulation,
        )
        assert m.resolve_amp(cuda, "auto") == expected
        assert m.resolve_amp(cpu, "auto") == "off"


def test_results_of_another_precision_are_not_read_back(trained, monkeypatch):
    args = "classify --data toy --size 32 --weights runs/toy/encoder.pt --out runs/c"
    run(args)
    monkeypatch.setattr(m, "resolve_amp", lambda *_: "bf16")  # as on a GPU
    assert "amp = off, now bf16" in refused(args)
    assert "amp = off, now bf16" in refused("pretrain --data toy --out runs/toy", *SMALL)


def test_fine_tuning_in_float16_scales_the_loss(trained, monkeypatch):
    calls = spy(monkeypatch, torch.amp.GradScaler, "scale")
    evaluate("classify --mode finetune --epochs 1 --amp fp16 --out runs/c")
    evaluate("classify --mode finetune --epochs 1 --out runs/d")
    scaled = [scaler.is_enabled() for scaler, _ in calls]
    half = len(scaled) // 2
    assert scaled == [True] * half + [False] * half and half > 0


def test_scores_that_are_not_finite_stop_the_command(trained):
    encoder = m.Encoder()
    encoder.layer4[1].bn2.weight.data.fill_(math.nan)
    m.save_checkpoint("nan.pt", encoder=encoder.state_dict(), arch=encoder.arch)
    for name in ("classify", "classify --mode finetune", "segment --mode finetune"):
        args = "--data toy --size 32 --weights nan.pt --epochs 1 --overwrite --out"
        assert "not finite" in refused(name, args, name[:3])
        assert [path.name for path in Path(name[:3]).iterdir()] == ["config.json"]


def test_fault1_an_evaluation_starts_from_the_command_line_in_its_default_folder(trained):
    args = words(["classify --data toy --size 32 --weights runs/toy/encoder.pt,random"])
    call = [sys.executable, HERE / "mlvicx.py", *args]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "mean AUROC" in done.stdout
    assert Path("runs/toy-classify-frozen-toy+random-1/results.json").exists()


def test_fault3_the_blocks_that_were_trained_go_downstream(trained):
    encoder = m.load_encoder("runs/toy/encoder.pt")[0].state_dict()
    state = m.load_checkpoint("runs/toy/last.pt")["model"]
    blocks = [name for name in encoder if name.startswith("context.")]
    assert len(blocks) == 15
    assert all(torch.equal(encoder[name], state[f"encoder.{name}"]) for name in blocks)


def test_fault4_a_file_that_fails_to_load_is_an_error(trained):
    Path("broken.pt").write_bytes(b"PK nonsense")
    torch.save(5, "five.pt")
    for path, word in (
        ("broken.pt", "damaged"),
        ("absent.pt", "none"),
        ("runs/toy/last.pt", "not a file like encoder.pt"),
        ("five.pt", "not a file like encoder.pt"),
    ):
        assert word in refused("classify --data toy --size 32 --weights", path)


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_fault5_frozen_is_frozen_every_parameter_and_buffer(trained, monkeypatch, task):
    kept, load = [], m.load_encoder

    def spy(*args, **kwargs):
        encoder, origin = load(*args, **kwargs)
        kept.append((encoder, {k: v.clone() for k, v in encoder.state_dict().items()}))
        return encoder, origin

    monkeypatch.setattr(m, "load_encoder", spy)
    # A classifier uses blocks where they feed its representation; a decoder uses them always.
    weights = "random --context inline" if task == "classify" else "runs/toy/encoder.pt"
    for mode in ("frozen", "finetune"):
        evaluate(task, "--epochs 1 --mode", mode, "--weights", weights, "--out", mode)
        encoder, before = kept[-1]
        moved = {k for k, v in encoder.state_dict().items() if not torch.equal(v, before[k])}
        if mode == "frozen":
            assert not moved
    expected = {k for k in before if k.startswith("context.")}
    assert expected and moved >= expected | {"conv1.weight", "bn1.running_mean"}
    assert not m.Segmenter(encoder, frozen=True).encoder.training


def test_fault6_validation_is_whole_and_never_flipped(trained):
    data = m.PreparedData("toy")
    val, encoder = data.indices("val"), m.Encoder("resnet18", "none")
    whole = m.predict(encoder, data.images, val, 32, batch_size=5)
    assert len(whole) == len(val) and len(val) % 5
    plain = encoder(m.normalise(m.resize_images(data.images[val], 32)))[0]  # it is in eval mode
    assert torch.allclose(whole, plain, atol=1e-4)


def test_a_single_labelled_image_is_refused_and_an_odd_one_is_kept(trained):
    data = m.PreparedData("toy")
    config = m.ClassifyConfig(size=32, epochs=1, batch_size=2)
    given = (config, m.Classifier(m.Encoder(), 2), data.images, data.labels)
    rest = (data.indices("val"), 1.0, m.masked_bce, m.mean_auroc, ("one",))
    with pytest.raises(m.UserError, match="--labels"):
        m.fit(*given, torch.arange(1), *rest)
    m.fit(*given, torch.arange(5), *rest)  # 2 + 3, for BatchNorm on 1 x 1 maps


def test_fault7_scores_stand_under_the_name_of_their_own_label(trained):
    table, labels = pd.read_csv("data/toy/labels.csv"), m.PreparedData("toy").labels
    table[table.columns[::-1]].to_csv("data/toy/labels.csv", index=False)
    data = m.PreparedData("toy")
    assert data.findings == ["A", "B"] and torch.equal(data.labels, labels)
    before = data.sha256()
    data.masks.zero_()
    assert data.sha256() != before
    one = evaluate("classify --findings B --out runs/b")["test"]["per_finding"]
    both = evaluate("classify --findings B,A --out runs/ba")["test"]["per_finding"]
    assert list(one) == ["B"] and list(both) == ["B", "A"]
    assert one["B"]["positives"] == both["B"]["positives"] == table["B"][data.split == "test"].sum()
    assert one["B"]["auroc"]["mean"] == pytest.approx(both["B"]["auroc"]["mean"], abs=0.15)


def test_dice_by_hand():
    truth, predicted = torch.zeros(2, 4, 2, 2)
    truth[0, 0] = 1  # two pixels, half of which are found: Dice 2 / 3
    predicted[0, 0, 0] = 1
    truth[1, 0, 0] = 1  # missed: 0
    predicted[2, 1, 1] = 1  # a false alarm: 0; image 3 is empty twice: 1
    counts = m.mask_counts(predicted, truth)
    assert counts.tolist() == [[1, 1, 2], [0, 0, 1], [0, 1, 0], [0, 0, 0]]
    once = [(2 / 3 + 0 + 0 + 1) / 4, 1 / 3, 2 / 5, 0.5, 1 / 4]  # in the order of DICE_NAMES
    first_twice = [2 / 3, 2 / 3, 2 / 3, 0, 1 / 2]
    assert m.dice_metrics(counts) == pytest.approx(once)
    # Logits of 0 are 0.5 in all 16 pixels, of which three are true.
    loss = m.segmentation_loss(0 * truth, truth)
    assert loss.item() == pytest.approx(math.log(2) + 1 - (3 + 1) / (8 + 3 + 1))
    both = m.dice_metrics(counts, np.array([[2, 0, 0, 0], [1, 1, 1, 1]]))
    assert both == pytest.approx(np.array([first_twice, once]))


def test_interval_is_a_bootstrap_over_patients():
    def mean(run, weights):
        return ((run * weights).sum(-1) / weights.sum(-1))[..., None]

    runs = [np.arange(10.0), np.arange(10.0) + 1]
    (one,) = m.interval(runs, np.arange(10), mean)
    assert one["mean"] == 5.0 and one["std"] == pytest.approx(math.sqrt(0.5))
    assert np.ptp(one["ci95"]) == pytest.approx(2 * 1.96 * 2.87 / math.sqrt(10), rel=0.1)
    (together,) = m.interval(runs, np.repeat([0, 1], 5), mean)
    assert together["ci95"] == [2.5, 7.5]  # two patients: both, or one of them twice
    assert m.interval(runs[:1], np.arange(10), mean)[0]["std"] is None
    pairs = [np.full(10, value) for value in (0.0, 4.0, 1.0, 5.0)]  # two encoders, two runs of each
    assert m.interval(pairs, np.arange(10), mean, 2)[0]["std"] == pytest.approx(math.sqrt(0.5))


def test_several_initialisations_are_judged_on_the_same_labels(trained, monkeypatch):
    rows, subset = [], m.label_subset
    monkeypatch.setattr(m, "label_subset", lambda *a: rows.append(subset(*a)) or rows[-1])
    both = evaluate("classify --labels 0.5 --seeds 2 --weights random,random --out runs/two")
    assert torch.equal(*rows[::2])
    scores = [unit("runs/two", index, 0) for index in (0, 1)]
    assert not np.array_equal(*scores)
    single = evaluate("classify --labels 0.5 --weights random --out runs/one")
    assert np.array_equal(scores[0], unit("runs/one", 0, 0))
    assert single["test"]["mean_auroc"]["std"] is None and both["test"]["mean_auroc"]["std"] > 0


def test_segment_chooses_by_the_pooled_dice_of_validation():
    masks = torch.zeros(3, 8, 8, dtype=torch.uint8)
    masks[0, :4], masks[1, :1] = 1, 1
    logits = 9.0 * masks - 4
    logits[1], logits[2, 0, 0] = -4, 4  # the small one is missed, and a pixel found where none is
    assert m.pooled_dice(logits, masks) == pytest.approx(2 * 32 / (33 + 40))
    assert m.pooled_dice(logits, masks, threshold=0.999) == 0
    assert m.pooled_dice(logits[1:2], 0 * masks[1:2]) == 1  # nothing to find and nothing found


@pytest.mark.parametrize("mode", ["frozen", "finetune"])
@pytest.mark.parametrize("task", ["classify", "segment"])
def test_the_labels_and_masks_of_the_test_set_decide_nothing(trained, monkeypatch, task, mode):
    """Strength, epoch and threshold come from validation: other test labels, the same outputs."""
    outputs, tests, predict = [], [], m.predict

    def spy(*args, **kwargs):
        outputs.append(predict(*args, **kwargs))
        return outputs[-1]

    monkeypatch.setattr(m, "predict", spy)
    for out in ("one", "two"):
        r = evaluate(task, "--epochs 3 --lr 0.01 --mode", mode, "--out", out)
        tests.append(r["test"])
        if task == "classify":  # its scores, with a frozen encoder not of `predict`
            outputs.append(torch.from_numpy(unit(out, 0, 0)))
        table, masks = pd.read_csv("data/toy/labels.csv"), np.load("data/toy/masks.npy")
        of_test = (table["split"] == "test").to_numpy()
        table.loc[of_test, ["A", "B"]] = 1 - table.loc[of_test, ["A", "B"]]
        table.to_csv("data/toy/labels.csv", index=False)
        masks[of_test | ~table["has_mask"]] ^= 1  # nor do those that are unknown
        np.save("data/toy/masks.npy", masks)
    half = len(outputs) // 2
    assert all(map(torch.equal, outputs[:half], outputs[half:])) and tests[0] != tests[1]
    if task == "segment":
        assert set(tests[0]) == set(m.DICE_NAMES)
        assert len(outputs[-1]) == (of_test & table["has_mask"]).sum()


def test_segment_takes_the_threshold_with_the_best_validation_dice(trained, monkeypatch):
    def dice(logits, masks, threshold=0.5):
        return -abs(threshold - 0.3)

    def counts(logits, masks, threshold):
        assert threshold == pytest.approx(0.3)
        return np.ones((len(masks), 3))

    monkeypatch.setattr(m, "pooled_dice", dice)
    monkeypatch.setattr(m, "segmentation_counts", counts)
    evaluate("segment --epochs 1")


def test_the_strength_of_the_probe_is_the_best_on_validation():
    torch.manual_seed(0)
    x, x_val = torch.randn(60, 30), torch.randn(400, 30)
    y, y_val = (x[:, :1] > 0).float(), (x_val[:, :1] > 0).float()
    y[::5] = 1 - y[::5]  # noise, which weak regularisation learns by heart
    strengths, chosen = (30.0, 1.0, 1e-4), set()
    for given in ((x_val, y_val), (x, y)):  # asks for the signal, or for noise by heart
        fits = [m.linear_probe(x, y, *given, strengths=(s,)) for s in strengths]
        scores = [m.mean_auroc(F.linear(given[0], *fit), given[1]) for fit in fits]
        weight, _ = m.linear_probe(x, y, *given, strengths=strengths)
        nearest = np.argmin([float((weight - w).norm()) for w, _ in fits])
        assert nearest == np.argmax(scores)
        chosen.add(nearest)
    assert len(chosen) == 2


def test_fine_tuning_ends_with_the_weights_of_its_best_epoch(trained, monkeypatch):
    data, seen = m.PreparedData("toy"), spy(monkeypatch, m, "augment")
    model, val = m.Classifier(m.Encoder(context="none"), 2), data.indices("val")
    scores, states, rates = iter([0.6, 0.9, 0.9, 0.8]), [], []

    def score(logits, labels):
        assert logits.shape == labels.shape and torch.equal(labels, data.labels[val])
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        return next(scores)

    config = m.ClassifyConfig(size=32, epochs=9, batch_size=8, patience=2)
    given = (config, model, data.images, data.labels, torch.arange(16), val, 1.0)

    def before_step(optimizer, *_):
        (group,) = optimizer.param_groups
        rates.append(group["lr"])
        assert not group["weight_decay"]
        assert torch.nn.utils.get_total_norm([p.grad for p in group["params"]]) <= 1.001

    with register_optimizer_step_pre_hook(before_step):
        m.fit(*given, m.masked_bce, score, ("best",))
    # Four epochs, two of them without a better score. Every batch has its augmentation and a lower
    # rate than the one before; the second epoch has another order, and all see whole images.
    assert len(rates) == len({rng.initial_seed() for *_, rng in seen}) == 8
    assert rates == sorted(set(rates), reverse=True)
    assert not torch.equal(seen[0][1], seen[2][1]) and seen[0][2].crop_min == 1
    assert_same_bits(dict(model.state_dict()), states[1])


@pytest.mark.parametrize(
    "flags",
    [
        "--backbone resnet50 --context none",
        "--context side --levels 2,5 --attention channel",
        "--context inline",
    ],
)
def test_every_encoder_that_pretrain_writes_can_be_judged(place, flags):
    assert run_pretrain(flags, "--epochs 1") == 0
    for args, name in (
        ("classify --mode finetune", "mean_auroc"),
        ("segment --mode frozen", "dice_pooled"),
    ):
        r = evaluate(args, f"--epochs 1 --out runs/{name}")
        assert 0 <= r["test"][name]["mean"] <= 1
    context = m.load_checkpoint("runs/mean_auroc/classifier.pt")["arch"]["context"]
    assert (context == "inline") == ("inline" in flags)  # those are a part of the encoder


def test_predict_gives_the_models_probabilities_of_every_kind_of_file(capsys):
    torch.manual_seed(0)
    model = m.Classifier(m.Encoder(), 2)
    about = {"arch": model.encoder.arch, "findings": ["F", "G"], "size": 32, "prepared_size": 64}
    about["learned"] = [True, False]
    m.save_checkpoint("classifier.pt", classifier=model.state_dict(), **about)
    one, two = phantom(1, 72), phantom(2, 72)
    save(one, "new/a.png")
    Image.fromarray(two).save("new/b.jpg", quality=100)
    shutil.copy(save_dicom(two, Path("new/c.dcm")), "new/e")  # found by what it holds
    Path("new/d.png").write_bytes(Path("new/a.png").read_bytes()[:200])
    run("predict new --weights classifier.pt --out scores.csv")
    assert "d.png" in capsys.readouterr().err
    found = pd.read_csv("scores.csv", index_col="image").squeeze(1)
    images = torch.tensor(np.array([dp.resize_xray(image, 64) for image in (one, two)]))
    expected = m.predict(model, images, torch.arange(2), 32).sigmoid()[:, 0].tolist()
    first, second = (pytest.approx(value, abs=1e-5) for value in expected)
    assert found.pop("new/b.jpg") == pytest.approx(expected[1], abs=0.05)
    assert dict(found) == {"new/a.png": first, "new/c.dcm": second, "new/e": second}
    assert abs(expected[0] - expected[1]) > 1e-4
    # Files by name, one of them of no text encoding; what is there is not replaced unasked.
    odd = os.fsdecode(b"new/M\xfcller.png")
    shutil.copy("new/a.png", odd)
    args = ("predict", odd, "new/c.dcm --weights classifier.pt --out scores.csv")
    assert "scores.csv exists" in refused(*args)
    run(*args, "--overwrite")
    again = pd.read_csv("scores.csv", index_col="image", encoding_errors="surrogateescape")["F"]
    assert dict(again) == {odd: first, "new/c.dcm": second}
    assert "absent.png" in refused("predict absent.png --weights classifier.pt --out x")


@pytest.mark.parametrize("mode", ["frozen", "finetune"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_finding_that_training_shows_in_one_class_is_undefined(trained, split, mode):
    """So is one of which the test images show one class; it is left out of the mean."""
    table = pd.read_csv("data/toy/labels.csv")
    table.loc[table["split"] == split, "A"] = 0
    table.to_csv("data/toy/labels.csv", index=False)
    test = evaluate("classify --epochs 1 --mode", mode)["test"]
    assert test["per_finding"]["A"]["auroc"]["mean"] is None
    assert test["per_finding"]["A"]["average_precision"] is None
    assert test["defined_findings"] == 1
    assert test["mean_auroc"]["mean"] == test["per_finding"]["B"]["auroc"]["mean"]


def test_a_finding_that_one_run_could_not_learn_is_undefined_in_all():
    labels = np.tile([[0.0], [1.0]], (4, 2))
    one, two = labels.copy(), labels.copy()
    one[:, 0], two[:, 0] = -labels[:, 0], np.nan
    found = m.classification_results([one, two], labels, np.arange(8), ["A", "B"], 1)
    assert found["per_finding"]["A"]["auroc"]["mean"] is None
    assert found["mean_auroc"]["mean"] == found["defined_findings"] == 1


def test_weights_that_change_meanwhile_stop_the_evaluation(trained, monkeypatch):
    hashes = itertools.count()
    monkeypatch.setattr(m, "file_hash", lambda path: next(hashes))
    line = refused("classify --data toy --size 32 --weights runs/toy/encoder.pt")
    assert "has changed since the start" in line


def test_validation_images_of_one_class_cannot_choose(trained):
    table = pd.read_csv("data/toy/labels.csv")
    table.loc[table["split"] == "val", ["A", "B"]] = 1
    table.to_csv("data/toy/labels.csv", index=False)
    line = refused("classify --data toy --size 32 --out runs/single")
    assert "both classes in the validation images" in line


def test_image_and_mask_move_together():
    images = torch.zeros(8, 64, 64, dtype=torch.uint8)
    images[:, 10:30, 12:40] = 255
    for size in (64, 40):
        views = m.RandomViews(size, crop_min=0.7, jitter=0, blur=0, solarize=0, rotation=15)
        x, moved = m.augment(images, images // 255, views, m.generator("move"))
        assert x.shape == moved.shape == (8, size, size) and set(moved.unique().tolist()) == {0, 1}
        assert ((x > 0.5).float() - moved).abs().mean() < 0.01
    labels = torch.rand(8, 3)
    alone, same = m.augment(images, labels, views, m.generator("move"))
    assert same is labels and torch.equal(alone, x)
    assert len(moved.unique(dim=0)) == 8  # they did move, each in its own way


@pytest.mark.parametrize("source, size", [(128, 48), (256, 64), (64, 96), (96, 96)])
def test_masks_and_images_have_the_same_geometry(source, size):
    """Centres of mass coincide to a tenth of a source pixel, in evaluation and in training."""
    torch.manual_seed(0)
    top, left, height, width = torch.randint(source // 8, source // 2, (4, 300, 1))
    pixel = torch.arange(source)
    rows = (pixel >= top) & (pixel < top + height)  # (300, S)
    columns = (pixel >= left) & (pixel < left + width)
    masks = (rows[:, :, None] & columns[:, None]).byte()
    exact = torch.stack([top + height / 2, left + width / 2])[..., 0]
    where = (torch.arange(size) + 0.5) * source / size

    def shift(x):  # mean distance of the centres of mass, in source pixels
        centre = torch.stack([x.sum(2) @ where, x.sum(1) @ where]) / x.sum((1, 2))
        return (centre - exact).mean(1).abs().max()

    views = m.RandomViews(size, crop_min=1, flip=0, jitter=0, blur=0, solarize=0)
    trained = m.augment(255 * masks, masks, views, m.generator("still"))
    resized = m.resize_images(255 * masks, size)
    for x in (*trained, resized, (resized > 0.5).float()):
        assert shift(x) < 0.1 and 0 <= x.min() <= x.max() <= 1
    counts = m.segmentation_counts(9 * resized - 4.5, masks)  # the masks as their own prediction
    assert (counts == counts[:, :1]).all()


def test_the_decoder_reaches_every_map_and_the_image_size():
    model = m.Segmenter(m.Encoder(), frozen=False)
    kept = []
    for block in model.encoder.context.values():
        block.register_forward_hook(lambda module, inputs, output: kept.append(output))
    out = model(torch.randn(2, 3, 48, 48))
    assert out.shape == (2, 48, 48)
    for grad in torch.autograd.grad(out.sum(), kept[-5:]):
        assert grad.abs().sum() > 0


@pytest.mark.parametrize("context", ["inline", "side", "none"])
def test_gradcam_is_its_definition_by_gradients(context):
    torch.manual_seed(0)
    model = m.Classifier(m.Encoder(context=context), 3).eval()
    x = torch.randn(2, 3, 64, 64)
    cam = m.gradcam(model, x, 1)
    assert cam.shape == (2, 64, 64) and 0 <= cam.min() and cam.max() <= 1 and not cam.requires_grad
    last = model.encoder.stages(x)[-1]
    (grad,) = torch.autograd.grad(model.fc(last.mean((2, 3)))[:, 1].sum(), last)
    expected = F.relu((grad.mean((2, 3), keepdim=True) * last).sum(1, keepdim=True)).detach()
    expected = F.interpolate(expected, size=64, mode="bilinear", align_corners=False)[:, 0]
    assert expected.amax((1, 2)).gt(0).all()
    assert torch.allclose(cam, expected / expected.amax((1, 2), keepdim=True), atol=1e-4)


def test_overlap_is_found_whatever_the_folders_are_called(place, capsys):
    write_set("data/mine")
    for name, origin in (("toy", "nih"), ("mine", "rsna")):
        meta = read_json(f"data/{name}/meta.json") | {"options": {"command": origin}}
        Path("data", name, "meta.json").write_text(json.dumps(meta))
    assert run_pretrain("--epochs 1") == 0
    for name, warning in (("toy", ""), ("mine", "rsna holds NIH images, as nih does")):
        evaluate("classify --data", name, "--out", name)
        found = capsys.readouterr().err
        assert warning in found and bool(warning) == ("warning" in found)
    m.warn_overlap(["nih"], "vinbig")
    assert not capsys.readouterr().err
    m.warn_overlap(["chestmnist"], "siim")
    assert "warning" in capsys.readouterr().err


# ---------------------------------------------------------------- 12. command line


def test_export_fits_torchvision_and_refuses_to_drop_blocks_silently(trained):
    encoder = m.Encoder(context="inline")
    m.save_checkpoint("inline.pt", encoder=encoder.state_dict(), arch=encoder.arch)
    args = "export --weights inline.pt --out plain.pth"
    assert "--drop-context" in refused(args)
    run(args, "--drop-context")
    assert "exists" in refused(args, "--drop-context")
    run("export --weights runs/toy/encoder.pt --out side.pth")
    plain = torchvision.models.resnet18().eval()
    for name in ("plain.pth", "side.pth"):
        missing = plain.load_state_dict(torch.load(name, weights_only=True), strict=False)
        assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    plain.fc = torch.nn.Identity()
    encoder, x = m.load_encoder("runs/toy/encoder.pt")[0].eval(), torch.randn(2, 3, 64, 64)
    assert torch.allclose(plain(x), encoder(x)[0], atol=1e-5)


def test_memory_is_kept_where_glibc_is_and_elsewhere_nothing_happens(monkeypatch):
    calls = []
    library = SimpleNamespace(mallopt=lambda *given: calls.append(given))
    monkeypatch.setattr(m.ctypes, "CDLL", lambda name: library)
    m.keep_memory()
    assert calls == [(-3, 1 << 17), (-4, 0), (-1, -1)]
    # TypeError as on Windows; AttributeError of another C library.
    for missing in (len, lambda name: name.mallopt):
        monkeypatch.setattr(m.ctypes, "CDLL", missing)
        m.keep_memory()


def test_literal_model_of_the_bench_equals_the_fast_one():
    torch.manual_seed(0)
    fast, literal = (form(8, context="inline").double() for form in (m.MLVICX, bench.LiteralMLVICX))
    literal.load_state_dict(fast.state_dict())
    views = torch.randn(2, 6, 3, 64, 64, dtype=torch.float64)
    definition, _ = m.mlvicx_loss(*literal(*views), covariance=m.covariance_literal)
    loss, _ = m.mlvicx_loss(*fast(*views))
    assert relative(definition.detach(), loss.detach()) < 1e-10


def test_what_torchrun_sets_alone_does_not_matter_and_evaluation_refuses_torchrun(
    place, monkeypatch
):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(dp, "main", lambda args: args[2:] != ["r/demo"])
    m.draw_demo(m.PretrainConfig(data_root="r"))
    assert run_pretrain("--epochs 1") == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    line = refused("classify --data toy --size 32")
    assert "one process" in line and "torchrun" in line


def test_wrong_commands_are_one_line(trained):
    for command, word in (
        ("pretrain --no-such-flag", "--help"),
        ("dance", "--help"),
        ("pretrain --data toy --device abacus", "--device"),
        ("pretrain --data toy --device cuda:99", "--device"),
        ("pretrain --data toy --device mps:7", "--device"),
        ("export --weights absent.pt", "there is none"),
        ("classify --data toy --findings Gout", "Gout"),
    ):
        assert word in refused(command)
    shutil.copytree("data/toy", "data/bare")
    table = pd.read_csv("data/bare/labels.csv").drop(columns="has_mask")
    table.to_csv("data/bare/labels.csv", index=False)
    assert "no masks.npy" in refused("segment --data bare")
    table.replace("test", "val").to_csv("data/bare/labels.csv")
    assert "no test images" in refused("segment --data bare")
    Path("data/toy/masks.npy").unlink()
    assert "masks.npy" in refused("segment --data toy")


SCRIPT = Path(dp.__file__)
XRAYS = Path(os.environ.get("MLVICX_XRAYS", ""))
real = pytest.mark.skipif("MLVICX_XRAYS" not in os.environ, reason="no folder of real X-rays")


def phantom(index, size=64):
    """A picture of its own for every index."""
    return dp.draw_phantom(7, index, size)["image"]


def save(picture, path):
    """Writes a picture in the format of its suffix, folders included; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return path


def write(path, *lines):
    """Writes a table as lines, folders included; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join(map(str, lines)).encode() + b"\n")
    return path


def prep(*args):
    """Runs a preparing command with one process and demands success."""
    assert dp.main([*words(args), "--workers", "1"]) == 0


def prep_refused(*args):
    """The one line with which a preparing command is refused."""
    return refused(*args, main=dp.main)


def prepared(folder):
    """(images, labels, rejected, meta) of a prepared folder, which the training can read."""
    data = m.PreparedData(folder)
    labels = pd.read_csv(f"{folder}/labels.csv", dtype={"image": str, "patient": str})
    rejected = pd.read_csv(f"{folder}/rejected.csv").set_index("image")["reason"].to_dict()
    images, meta = data.images.numpy(), data.meta
    assert images.dtype == np.uint8 and images.shape == (len(labels), meta["size"], meta["size"])
    assert meta["images"] == len(labels) and meta["rejected"] == len(rejected)
    return images, labels, rejected, meta


def content(folder):
    """Name -> bytes of every file of a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# ---------------------------------------------------------------- data_prep 1. one X-ray file

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

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds, ds.file_meta = Dataset(), FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = UID + ".1"
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3"
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, photometric
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


def unreadable(path, reason="....."):
    """Demands that a file is refused, with a reason."""
    with pytest.raises(ValueError, match=reason):
        dp.read_xray(path)


def test_eight_bit_pictures_come_back_as_they_were_saved():
    picture = phantom(0)
    for path in (save(picture, "a.png"), save_dicom(picture.astype("u2"), "b.dcm", 8)):
        read = dp.read_xray(path)
        assert read.dtype == np.uint8 and np.array_equal(read, picture)
    lossy = dp.read_xray(save(picture, "c.jpg"))
    assert np.abs(lossy.astype(int) - picture).mean() < 5
    os.rename("b.dcm", "b.png")  # told by content, not by name
    assert np.array_equal(dp.read_xray("b.png"), picture)


def scene(rows=40, columns=56):
    """A picture of every gray level, without symmetry."""
    levels = np.arange(rows * columns) % 256
    return np.random.default_rng(0).permutation(levels).reshape(rows, columns).astype(np.uint8)


def save_png(path, samples, depth, kind, palette=b""):
    """Writes (H, W, C) samples as a PNG of any depth and colour type, as its standard says."""
    rows, columns, _ = samples.shape
    flat = samples.reshape(rows, -1)
    if depth < 8:
        bits = flat[:, :, None] >> np.arange(depth)[::-1] & 1
        lines = np.packbits(bits.reshape(rows, -1).astype(np.uint8), axis=1)
    else:
        lines = flat.astype(f">u{depth // 8}")
    header = struct.pack(">IIBBBBB", columns, rows, depth, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines))
    data = b"\x89PNG\r\n\x1a\n"
    for name, chunk in ((b"IHDR", header), (b"PLTE", palette), (b"IDAT", body), (b"IEND", b"")):
        if chunk or name == b"IEND":
            data += struct.pack(">I", len(chunk)) + name + chunk
            data += struct.pack(">I", zlib.crc32(name + chunk))
    path.write_bytes(data)


def test_every_depth_and_colour_type_of_png_gives_its_full_range():
    for kind, depths in (
        (0, (1, 2, 4, 8, 16)),  # gray
        (2, (8, 16)),  # colour
        (3, (1, 2, 4, 8)),  # palette
        (4, (8, 16)),  # gray and alpha, which is ignored
        (6, (8, 16)),  # colour and alpha
    ):
        for depth in depths:
            top = 2 ** min(depth, 8) - 1
            gray = scene().astype(int) * top // 255
            samples = gray * 16 + 3 if depth == 16 else gray  # twelve bits in sixteen
            palette = b""
            if kind == 3:
                samples = top - samples
                palette = b"".join(bytes([k * 255 // top] * 3) for k in range(top, -1, -1))
            channels = [samples] * (3 if kind in (2, 6) else 1)
            if kind in (4, 6):
                channels.append(np.random.default_rng(1).integers(0, 2**depth, gray.shape))
            save_png(Path("a.png"), np.dstack(channels), depth, kind, palette)
            if depth == 16 and kind:
                unreadable("a.png", "16 bits with colour or transparency")
                continue
            read = dp.read_xray("a.png")
            assert read.dtype == np.uint8 and np.array_equal(read, gray * 255 // top), (kind, depth)
    samples = np.zeros((20, 20, 3), int)
    samples[0], samples[2:, :, 1] = 255, 200
    save_png(Path("a.png"), samples, 8, 2)
    # Luminance of green: 0.587.
    assert np.unique(dp.read_xray("a.png")).tolist() == [0, 117, 255]


STORED = {  # EXIF orientation -> how a picture is stored that is to be shown upright
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_90",  # to be turned clockwise
    7: "TRANSVERSE",
    8: "ROTATE_270",
}


@pytest.mark.parametrize("orientation", STORED)
def test_pictures_are_turned_as_their_exif_data_say(orientation):
    exif, right, smooth = Image.Exif(), scene(), phantom(0)[:40]
    exif[0x112], turn = orientation, Image.Transpose[STORED[orientation]]
    for name, pixels in (("a.png", right), ("a.webp", right), ("b.png", right.astype("u2") * 9)):
        Image.fromarray(pixels).transpose(turn).save(name, exif=exif, lossless=True)
        assert np.array_equal(dp.read_xray(name), right), name
    stored = Image.fromarray(smooth).transpose(turn)
    stored.save("a.jpg", exif=exif)
    assert np.abs(dp.read_xray("a.jpg").astype(int) - smooth).mean() < 5
    head, tail = Path("a.jpg").read_bytes().split(b"Exif\0\0")
    Path("a.jpg").write_bytes(head + b"Exif\0\0????" + tail[4:])
    assert dp.read_xray("a.jpg").shape == np.asarray(stored).shape  # damage does not cost a picture


DEEP = [ending for ending in COMPRESSIONS if ending not in (".4.50", ".4.51")]  # more than 8 bits


@pytest.mark.parametrize(
    "ending,depth", [*itertools.product(COMPRESSIONS, [8]), *itertools.product(DEEP, [12])]
)
def test_every_compression_of_dicom(ending, depth):
    picture = phantom(2)
    if depth == 12:
        deep = picture.astype(np.uint16) * 16 + 5
        low, high = int(picture.min()), int(picture.max())
        picture = np.floor((picture - low) * 255.0 / (high - low) + 0.5)
        path = save_dicom(deep, "a.dcm", bits=12, ending=ending)
    else:
        path = save_dicom(picture, "a.dcm", ending=ending)
    error = np.abs(dp.read_xray(path).astype(int) - picture)
    assert error.max() <= COMPRESSIONS[ending][1]


def test_the_list_of_transfer_syntaxes_is_what_was_tested():
    assert set(dp.TRANSFER_SYNTAXES) == {UID + ending for ending in COMPRESSIONS}


@pytest.mark.parametrize("bits,kind", [(8, "u1"), (8, "i1"), (12, "i2"), (16, "u2")])
@pytest.mark.parametrize("tags", ["plain", "LINEAR", "SIGMOID", "voi_lut"])
def test_monochrome_1_and_2_of_one_picture_give_identical_bytes(bits, kind, tags):
    from pydicom.dataset import Dataset

    top = 2**bits - 1
    low = -(2 ** (bits - 1)) if kind[0] == "i" else 0
    pixels = np.random.default_rng(bits).integers(low, low + top + 1, (24, 40))
    # Every table is symmetric, so that it means the same to a picture and to its negative.
    given = {}
    if tags.isupper():
        middle = low + 0.5 * top + 0.5 * (tags == "LINEAR")
        given = {"WindowCenter": middle, "WindowWidth": 0.6 * top, "VOILUTFunction": tags}
    if tags == "voi_lut":
        table = Dataset()
        table.LUTDescriptor = [(top + 1) % 65536, low, 16]
        table.LUTData = np.arange(top + 1).clip(top // 4, top - top // 4).astype("<u2").tobytes()
        table["LUTData"].VR = "OW"
        given = {"VOILUTSequence": [table]}
    opposite = (top + 2 * low - pixels).astype(kind)
    one = dp.read_xray(save_dicom(opposite, "1.dcm", bits, photometric="MONOCHROME1", **given))
    two = dp.read_xray(save_dicom(pixels.astype(kind), "2.dcm", bits, **given))
    assert np.array_equal(one, two)
    assert np.corrcoef(two.ravel(), pixels.ravel())[0, 1] > 0.9  # bright stays bright


def scene_dicom(path, signed, photometric, window=False, fill=None, ending=".1", **tags):
    """`scene` in 12 bits, away from their ends, as a DICOM file; its first rows hold `fill`."""
    shift, levels = -2048 * signed, scene().astype(int)
    if photometric == "MONOCHROME1":
        levels = 255 - levels
    pixels = levels * 10 + 100 + shift
    if fill is not None:
        pixels[:8] = fill
    if window:  # of all the scene
        tags = {"WindowCenter": 1375.5 + shift, "WindowWidth": 2551, **tags}
    pixels = pixels.astype("<i2" if signed else "<u2")
    return save_dicom(pixels, path, 12, ending, photometric, **tags)


TAGS = {  # optional tag -> its values that show the same scene, and those that are refused by name
    "RescaleSlope": (["", 1, 1e-6, 1e9], [0]),
    "RescaleIntercept": (["", 0, -32768, 1e9], []),
    "WindowCenter": (["", 0, 32767], []),
    "WindowWidth": (["", 0, 65535], [-1]),
    "VOILUTFunction": (["", "LINEAR", "LINEAR_EXACT"], ["CUBIC"]),
    "VOILUTSequence": ([[]], []),
    "ModalityLUTSequence": ([[]], []),
    "PixelPaddingValue": (["", 0, 2047], []),
    "PixelPaddingRangeLimit": (["", 0, 2047], []),
    "NumberOfFrames": (["", 0, 1], [2**31 - 1]),
    "HighBit": ([11], [15]),
    "PhotometricInterpretation": ([], ["", "PALETTE COLOR"]),
    "BitsStored": ([16], [0, 17]),
    "SamplesPerPixel": ([], [0, 2]),
}


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", TAGS)
def test_optional_tags_of_dicom_leave_the_scene_or_are_refused(name, signed, photometric):
    import pydicom

    path, (same, refused_values) = Path("a.dcm"), TAGS[name]
    tags, window = {}, name[:7] != "Rescale"
    if name[:6] == "Window":  # so wide that its place does not matter
        tags, window = {"WindowCenter": 100, "WindowWidth": 10**6}, False
    for value in same:
        for ending in ("", ".1"):
            given = {**tags, name: value}
            scene_dicom(path, signed, photometric, window, ending=ending, **given)
            assert np.array_equal(dp.read_xray(path), scene()), (value, ending)
    for value in refused_values:
        ds = pydicom.dcmread(scene_dicom(path, signed, photometric, True))
        setattr(ds, name, value)
        ds.save_as(path)
        unreadable(path)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("window", [False, True])
def test_padding_of_dicom_is_black_and_the_rest_is_stretched_by_itself(window, photometric):
    import pydicom

    path, right = Path("a.dcm"), scene()
    right[:8] = 0
    for signed, fill, first, last in (
        (False, 65535, 65535, ""),
        (False, 65000, 65535, 60000),
        (False, 65000, 60000, 65535),
        (True, -32768, -32768, -32768),
        (True, -2000, -2000, ""),
    ):
        tags = dict(PixelPaddingValue=first, PixelPaddingRangeLimit=last, BitsStored=16)
        for ending in ("", ".1", ".4.90", ".4.70"):
            scene_dicom(path, signed, photometric, window, fill, ending, **tags)
            assert np.array_equal(dp.read_xray(path), right), (signed, fill, ending)
    ds = pydicom.dcmread(path)
    ds["PixelPaddingValue"] = pydicom.DataElement("PixelPaddingValue", "US", 2**16 - 2000)
    ds.save_as(path)  # the signed value, written as an unsigned one
    assert np.array_equal(dp.read_xray(path), right)
    pixels = right.clip(1)  # of 8 bits
    for value in (1, 255, 65535):
        save_dicom(pixels, path, PixelPaddingValue=value)
        assert np.array_equal(dp.read_xray(path), np.where(pixels == value, 0, pixels))
    save_dicom(np.full_like(pixels, 255), path, PixelPaddingValue=255)
    unreadable(path, "every pixel is padding")


def test_modality_then_voi_then_inversion_by_hand():
    pixels = np.repeat(np.array([[0, 500, 1000, 2000]], np.uint16), 16, 0).repeat(4, 1)
    # Rescaled to 100 1100 2100 4100; a linear window from 1100 to 3100 maps them to 0 0 .5 1.
    tags = dict(RescaleSlope=2, RescaleIntercept=100, WindowCenter=2100.5, WindowWidth=2001)
    for photometric, expected in (
        ("MONOCHROME2", [0, 0, 128, 255]),
        ("MONOCHROME1", [0, 0, 128, 255]),
    ):
        path = save_dicom(pixels, "a.dcm", 12, photometric=photometric, **tags)
        assert np.abs(np.subtract(dp.read_xray(path)[0, ::4], expected, dtype=int)).max() <= 1
        tags |= dict(RescaleSlope=-2, RescaleIntercept=4100)  # the same, the other way round


def test_truncated_files_are_rejected_and_never_half_black():
    picture = phantom(3)
    deep = picture.astype(np.uint16) * 16
    paths = [save(picture, "a.png"), save(picture, "a.jpg"), save(deep, "deep.png")]
    paths.append(save_dicom(picture, "a.4.50.dcm", ending=".4.50"))
    for ending in (".1", ".4.70", ".4.80", ".4.90", ".5"):
        paths.append(save_dicom(deep, f"a{ending}.dcm", 12, ending=ending))
    for path in paths:
        whole = path.read_bytes()
        dp.read_xray(path)
        for share in (0.0, 0.05, 0.3, 0.5, 0.7, 0.9, 0.97):
            path.write_bytes(whole[: int(share * len(whole))])
            unreadable(path)


@pytest.mark.parametrize("ending", [e for e in COMPRESSIONS if e not in ("", ".1")])
def test_a_stream_that_ends_early_in_a_whole_dicom_file_is_rejected(ending):
    import pydicom
    from pydicom.encaps import encapsulate, generate_frames

    path = save_dicom(phantom(3, 128), "a.dcm", ending=ending)
    ds = pydicom.dcmread(path)
    frame = next(generate_frames(ds.PixelData, number_of_frames=1))
    reason = "....." if ending == ".5" else "ends early"  # whatever the decoder takes
    for share in (0.1, 0.5, 0.9, 0.99, 1):
        ds.PixelData = encapsulate([frame[: int(share * len(frame))]])
        ds.save_as(path)
        if share < 1:
            unreadable(path, reason)
    dp.read_xray(path)  # the whole stream


def test_other_files_are_rejected_with_a_reason():
    with open("large.png", "wb") as f:
        f.truncate(dp.MAX_BYTES + 1)  # a hole: no disk is used
    for name, what, reason in (
        ("large.png", None, "256 MiB"),
        ("nowhere.png", None, "No such file"),
        ("zero.png", b"", "not a PNG"),
        ("page.png", b"<!DOCTYPE html><html><body>404</body></html>", "not a PNG"),
        ("text.dcm", b"not at all a picture " * 30, "not a PNG"),
        ("one.png", np.zeros((1, 1), np.uint8), "1 x 1 pixels"),
        ("thin.png", np.zeros((15, 400), np.uint8), "400 x 15 pixels"),
        ("white.png", np.full((20, 20), 255, np.uint8), "one value"),
        ("black.dcm", np.full((20, 20), 9, np.uint16), "one value"),
        ("a.gif", phantom(0), "not a PNG"),  # only the decoders that are needed
    ):
        if isinstance(what, bytes):
            Path(name).write_bytes(what)
        elif name.endswith("dcm"):
            save_dicom(what, name)
        elif what is not None:
            save(what, name)
        unreadable(name, reason)


def test_a_transfer_syntax_that_is_not_on_the_list_is_refused_before_it_is_read():
    for ending, other in (
        (".1", ".2"),  # big endian
        (".4.50", ".1.99"),  # deflated
        (".4.50", ".4.94"),  # JPIP
    ):
        path = save_dicom(phantom(0), "a.dcm", ending=ending)
        whole = path.read_bytes()
        path.write_bytes(whole.replace((UID + ending).encode(), (UID + other).encode()))
        unreadable(path, re.escape(UID + other))


def test_lying_dicom_headers_are_refused():
    import pydicom

    cases = [(ending, {"Rows": 128}) for ending in (".1", ".4.50", ".4.70", ".4.80", ".4.90", ".5")]
    cases += [(ending, {"Columns": 40}) for ending in (".4.50", ".4.80", ".4.90")]
    for tags in (
        {"Rows": 60000, "Columns": 60000},
        {"Rows": 4, "Columns": 4},
        {"NumberOfFrames": 2},
        {"BitsAllocated": 32},
        {"SamplesPerPixel": 4},
        {"PixelData": None},
        {"Rows": None},
    ):
        cases.append((".1", tags))
    for ending, tags in cases:
        path = save_dicom(phantom(4), "a.dcm", ending=ending)
        ds = pydicom.dcmread(path)
        for name, value in tags.items():
            setattr(ds, name, value)
            if value is None:
                delattr(ds, name)
        ds.save_as(path)
        unreadable(path)


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


def test_bombs_are_refused_within_one_gigabyte():
    files = ["large.png", "large.jpg", "deflated.dcm"]
    Image.new("1", (20_000, 20_000)).save(files[0])
    Image.new("L", (20_000, 20_000)).save(files[1])
    # Deflated: two gigabytes of zeros in two megabytes, under a right file meta.
    head = save_dicom(phantom(0), "a.dcm", ending=".4.50").read_bytes()
    meta = head[: head.index(b"\x08\x00\x16\x00UI")].replace(b"1.2.4.50", b"1.2.1.99")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    Path(files[2]).write_bytes(meta + block * 128 + packer.flush())
    # The stream inside says more than the data set, or the data set itself 60,000 x 60,000.
    large = (60_000).to_bytes(2, "big") * 2
    for ending, marker, skip, size in (
        (".4.50", b"\xff\xc0", 5, large),
        (".4.70", b"\xff\xc3", 5, large),
        (".4.80", b"\xff\xf7", 5, large),
        (".4.90", b"\xff\x4f\xff\x51", 8, (60_000).to_bytes(4, "big") * 2),
    ):
        files.append(save_dicom(phantom(0), f"inside{ending}.dcm", ending=ending))
        data = files[-1].read_bytes()
        at = data.index(marker, data.index(b"\xe0\x7f\x10\x00")) + skip
        files[-1].write_bytes(data[:at] + size + data[at + len(size) :])
    for ending in (".1", ".5"):
        files.append(save_dicom(phantom(0), f"a{ending}.dcm", ending=ending))
        data = files[-1].read_bytes()
        for tag in (b"\x28\x00\x10\x00US\x02\x00", b"\x28\x00\x11\x00US\x02\x00"):
            data = data.replace(tag + b"\x40\x00", tag + b"\x60\xea")
        files[-1].write_bytes(data)
    done = python(BOMBS, *files)
    *lines, grown = done.stdout.strip().splitlines()
    assert done.returncode == 0 and len(lines) == len(files), done.stderr
    assert not any(line.startswith("READ") for line in lines), lines
    assert "1.99 is not on the list" in lines[2] and "60000 x 60000" in lines[-1]
    assert float(grown) < 1000


def test_resize_is_an_antialiased_square():
    stripes = np.tile(np.array([0, 255], np.uint8), (256, 128))  # finer than the result can show
    assert np.abs(dp.resize_xray(stripes, 64).astype(int) - 127).max() <= 2
    picture = phantom(5, 256)
    exact = Image.fromarray(picture).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.abs(dp.resize_xray(picture, 64) - np.asarray(exact, float)).mean() < 1
    assert dp.resize_xray(picture[:200], 48).shape == (48, 48)
    assert np.array_equal(dp.resize_xray(picture, 256), picture)


PIXEL_TAGS = (
    "Rows Columns SamplesPerPixel BitsAllocated BitsStored HighBit PixelRepresentation "
    "PhotometricInterpretation RescaleSlope RescaleIntercept WindowCenter WindowWidth"
).split()


def test_a_thousand_damaged_dicom_headers_are_read_right_or_refused():
    import pydicom

    sound = pydicom.dcmread(save_dicom(phantom(0), "sound.dcm"))
    rng, read, equal = np.random.default_rng(0), 0, 0
    sources = [
        save_dicom(phantom(k), f"{k}.dcm", ending=e)
        for k, e in enumerate((".1", "", ".4.70", ".4.90", ".5"))
    ]
    sources = [(path.read_bytes(), dp.read_xray(path)) for path in sources]
    path = Path("fuzz.dcm")
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


# ---------------------------------------------------------------- data_prep 2. demo phantoms


def test_a_phantom_is_a_function_of_seed_index_and_site():
    one = dp.draw_phantom(3, 17, 64)
    for other in (dp.draw_phantom(4, 17, 64), dp.draw_phantom(3, 18, 64)):
        assert not np.array_equal(one["image"], other["image"])
    # The same in another process, and for another size the same patient and findings.
    done = python("import data_prep as d; print(d.draw_phantom(3, 17, 64)['image'].tolist())")
    assert json.loads(done.stdout) == one["image"].tolist()
    large = dp.draw_phantom(3, 17, 256)
    assert large["findings"] == one["findings"] and large["patient"] == one["patient"]
    small = np.asarray(Image.fromarray(large["image"]).resize((64, 64), Image.Resampling.BOX))
    assert np.corrcoef(small.ravel(), one["image"].ravel())[0, 1] > 0.97


def test_labels_masks_and_boxes_of_phantoms_agree():
    seen = dict.fromkeys(dp.PHANTOM_FINDINGS, 0)
    for index in range(200):
        case = dp.draw_phantom(1, index, 64)
        findings, image, mask = case["findings"], case["image"], case["mask"]
        assert 30 < image.std() < 100 and set(np.unique(mask)) <= {0, 1}
        shown = [name for name in dp.PHANTOM_FINDINGS if findings[name]]
        assert findings["No Finding"] == int(not shown)
        assert mask.any() <= findings["Pneumothorax"]
        # A region may lie outside of the picture.
        assert {name for name, *_ in case["boxes"]} <= set(shown)
        for name, x, y, width, height in case["boxes"]:
            assert 0 <= x < x + width <= 64 and 0 <= y < y + height <= 64
            seen[name] += 1
            if name == "Pneumothorax":
                assert Image.fromarray(mask).getbbox() == (x, y, x + width, y + height)
    assert min(seen.values()) >= 3


def test_a_finding_changes_the_picture_where_its_box_is(monkeypatch):
    """The same case drawn without the finding differs inside the box more than outside."""
    case_of = dp.phantom_case
    for name in ("Nodule", "Consolidation", "Effusion"):
        index = next(k for k in range(99) if case_of(0, k)[2][name] > 0.5)
        one = dp.draw_phantom(0, index, 128)
        patient, body, severity, rng = case_of(0, index)
        with monkeypatch.context() as patch:
            case = (patient, body, severity | {name: 0.0}, rng)
            patch.setattr(dp, "phantom_case", lambda *args, case=case: case)
            two = dp.draw_phantom(0, index, 128)
        change = np.abs(one["image"].astype(float) - two["image"])
        (box,) = [box[1:] for box in one["boxes"] if box[0] == name]
        inside = np.zeros((128, 128), bool)
        inside[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = True
        assert change[inside].mean() > 3 * change[~inside].mean()


def test_prevalence_and_images_a_patient_are_as_stated():
    for site, shares in dp.PREVALENCE.items():
        cases = [dp.phantom_case(5, k, site) for k in range(4000)]
        findings = pd.DataFrame([dp.phantom_findings(severity) for _, _, severity, _ in cases])
        rates = findings[[*dp.PHANTOM_FINDINGS]].mean()
        assert np.allclose(rates, shares, atol=0.03)
        patients = [(patient, body.heart) for patient, body, *_ in cases]
        sizes = [len([*group]) for _, group in itertools.groupby(patients)]  # consecutive
        assert len(sizes) == len(set(patients)) == len({name for name, _ in patients})
        assert set(sizes) == {1, 2, 3, 4, 5} and abs(np.mean(sizes) - 2.5) < 0.1


def test_demo_is_split_by_patient_and_its_second_run_does_nothing(capsys):
    prep("demo --count 150 --size 32")
    images, labels, rejected, meta = prepared("data/demo")
    assert not rejected and meta["name"] == "demo"
    assert [dp.hash_split(patient) for patient in labels["patient"]] == labels["split"].tolist()
    assert set(meta["groups"]["coarse"] + meta["groups"]["fine"]) < set(meta["findings"])
    masks, boxes = np.load("data/demo/masks.npy"), pd.read_csv("data/demo/boxes.csv")
    for k in (0, 77, 149):
        case = dp.draw_phantom(0, k, 32)
        assert np.array_equal(images[k], case["image"]) and np.array_equal(masks[k], case["mask"])
        assert labels.loc[k, list(case["findings"])].to_dict() == case["findings"]
        rows = boxes[boxes["image"] == labels["image"][k]].drop(columns="image")
        assert list(rows.itertuples(index=False, name=None)) == case["boxes"]
    stamp = os.stat("data/demo/images.npy").st_mtime_ns
    prep("demo --count 150 --size 32")
    assert "nothing to do" in capsys.readouterr().out
    assert os.stat("data/demo/images.npy").st_mtime_ns == stamp
    line = prep_refused("demo --count 151 --size 32")
    assert "count 150, now asked: 151" in line and "--overwrite" in line
    prep("demo --count 151 --size 32 --overwrite")
    assert len(prepared("data/demo")[0]) == 151


# ---------------------------------------------------------------- data_prep 3. tables and splits


def test_hash_split_has_the_shares_and_never_changes():
    for shares in (dp.BY_PATIENT, dp.BY_IMAGE, dp.CARVED):
        drawn = pd.Series([dp.hash_split(f"p{k}", shares) for k in range(20_000)])
        rates = drawn.value_counts(normalize=True)
        assert all(abs(rates[split] - share) < 0.01 for split, share in shares.items())
    drawn = [dp.hash_split(key) for key in ("1", "2", "30805", "a00017", "24")]
    assert drawn == ["train", "test", "train", "test", "val"]
    assert dp.hash_split("8", dp.CARVED) == "train"  # with a tenth of validation, not more


def test_split_table_completes_only_what_is_missing():
    images = [f"i{k}" for k in range(400)]
    own, rule = dp.split_table(pd.DataFrame({"image": images}))
    assert own["patient"].tolist() == images and "by image" in rule
    assert own["split"].tolist() == [dp.hash_split(i, dp.BY_IMAGE) for i in images]
    table = pd.DataFrame({"image": images, "patient": [f"p{k // 4}" for k in range(400)]})
    given = table.assign(split=["train" if k < 300 else "test" for k in range(400)])
    for before, words, splits in (
        (table, "by patient", {"train", "val", "test"}),
        (given, "test set as given", {"train", "val"}),
    ):
        found, rule = dp.split_table(before)
        assert words in rule and set(found["split"][:300]) == splits
        assert found.groupby("patient")["split"].nunique().max() == 1
    assert (found["split"][300:] == "test").all() and "split" not in table
    given.loc[:3, "split"] = "val"
    same, rule = dp.split_table(given)
    assert same.equals(given) and rule == "as given"


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


def test_read_table_takes_a_byte_order_mark_and_names_a_missing_column():
    path = Path("a.csv")
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
    return " ".join(f"{gap} {n}" for gap, n in zip(gaps, ends - starts)) or "-1"


def test_a_thousand_run_length_texts_are_decoded_right_or_refused():
    rng, read = np.random.default_rng(0), 0
    for case in range(1000):
        rows, columns = rng.integers(1, 12, 2)
        mask = rng.random((rows, columns)) < rng.random()
        text = rle_encode(mask).replace("-1", "")
        assert np.array_equal(dp.rle_decode(text, rows, columns), mask)
        at = rng.integers(len(text) + 1)  # one character damaged
        text = text[:at] + rng.choice(list("0123456789 -x.")) + text[at + 1 :]
        with contextlib.suppress(ValueError):
            found = dp.rle_decode(text, rows, columns)
            assert found.sum() == sum(map(int, text.split()[1::2]))
            read += 1
    assert 100 < read < 900


# ---------------------------------------------------------------- data_prep 4. the prepared folder


def test_boxes_are_scaled_and_clipped():
    boxes = pd.DataFrame(
        [
            ("a", "F", 10, 20, 30, 40, [5, 5, 15, 10]),
            ("a", "F", -10, 0, 20, 10, [0, 0, 5, 2.5]),  # half outside
            ("a", "G", 90, 190, 50, 50, [45, 47.5, 5, 2.5]),  # to the edge
            ("a", "G", 100, 0, 5, 5, None),  # outside
            ("b", "F", 1, 2, 3, 4, [1, 2, 3, 4]),
            ("c", "F", 1, 2, 3, 4, None),  # no such picture
        ],
        columns=[*dp.BOX, "expected"],
    )
    expected = boxes.pop("expected").dropna().tolist()
    sizes = pd.DataFrame({"image": ["a", "b"], "height": [200, 50], "width": [100, 50]})
    found = dp.scale_boxes(boxes, sizes, 50)
    assert found[dp.EDGES].values.tolist() == expected and found["image"].tolist() == [*"aaab"]


def raw_folder(root, n=12, size=48):
    """A folder of n PNGs with a table: column F holds 0 and 1, two images a patient."""
    for k in range(n):
        save(phantom(k, size), f"{root}/images/i{k:03d}.png")
    rows = [f"i{k:03d}.png,p{k // 2},{k % 2}" for k in range(n)]
    return write(f"{root}/labels.csv", "image,patient,F", *rows).parent


COUNT = 1200  # enough that a signal comes before the end, on a machine that stalls for a second


def start_demo(*args):
    """A demo preparation of some seconds in a process of its own."""
    call = words(["demo --size 32 --out demo --count", COUNT, *args])
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, SCRIPT, *call], stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def wait_for_rows(rows):
    """Waits until the journal of `start_demo` holds that many rows."""
    journal = Path("demo.partial/progress.jsonl")
    for _ in range(3000):
        if journal.exists() and journal.read_bytes().count(b"\n") > rows:
            return
        time.sleep(0.01)
    raise AssertionError("nothing was prepared")


def test_killed_again_and_again_and_resumed_the_bytes_are_the_same():
    for workers, rows, number in (
        (2, 100, signal.SIGKILL),
        (1, 300, signal.SIGKILL),
        (2, 550, signal.SIGINT),  # as a terminal sends it: to the workers, too
    ):
        process = start_demo("--workers", workers)
        wait_for_rows(rows)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
        _, errors = process.communicate(timeout=30)  # ends only when the workers have gone, too
        assert not Path("demo").exists()
    assert process.returncode == 130, errors
    assert errors.strip() == "stopped; the same command resumes from here, with --overwrite anew"
    prep("demo --size 32 --out demo --count", COUNT)
    prep("demo --size 32 --out whole/demo --count", COUNT)
    assert content("demo") == content("whole/demo")


def test_torn_tails_are_cut_off(monkeypatch):
    done, prepare = itertools.count(), dp.prepare_picture

    def stopped(*args):
        if next(done) in (100, 115):
            raise KeyboardInterrupt
        return prepare(*args)

    args = words(["demo --count 130 --size 32 --workers 1 --out out"])
    sizes = []
    with monkeypatch.context() as patch:
        patch.setattr(dp, "prepare_picture", stopped)
        patch.setattr(dp, "BATCH", 4)  # so few that they stay in a buffer if it is not flushed
        patch.setattr(os, "fsync", lambda number: sizes.append(os.fstat(number).st_size))
        assert dp.main(args) == 130
        # What the journal names is on the disk before it is named.
        assert sizes[-2:] == [dp.HEADER + 100 * 32 * 32] * 2
        for name in ("progress.jsonl", "images.npy", "masks.npy"):
            with open(f"out.partial/{name}", "ab") as f:
                f.write(b'{"row": 9, "sha')
        assert dp.main(args) == 130  # goes on, and is stopped again
        assert sizes[-1] == dp.HEADER + 112 * 32 * 32
    assert dp.main(args) == 0
    prep("demo --count 130 --size 32 --out whole/out")
    assert content("out") == content("whole/out")


def test_a_second_preparation_of_one_folder_is_refused():
    process = start_demo()
    wait_for_rows(100)
    try:
        line = prep_refused("demo --count 9 --out demo --overwrite")
    finally:
        process.kill()
        process.communicate()
    assert "another process" in line


def test_workers_hold_no_torch_and_are_at_most_eight(monkeypatch):
    """As when mlvicx.py, which imports torch, draws the demo set."""
    write("torch.py", "open('log', 'a').write('torch ')")
    lines = ["import torch, data_prep, sys", "if __name__ == '__main__':"]
    write("main.py", *lines, "    sys.exit(data_prep.main(sys.argv[1:]))")
    call = [sys.executable, "main.py", *words(["demo --count 130 --size 32 --out out --workers 2"])]
    env = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and Path("log").read_text() == "torch "
    assert done.stdout.splitlines()[-1].startswith("out: {") and not done.stderr  # no bar
    for cores, workers in (({0, 3, 5}, 3), (set(range(192)), 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: cores)
        assert dp.parse(["demo"]).workers == workers
    assert dp.parse(["nih"]).size == 256


def test_preparing_needs_nothing_that_windows_and_macos_lack(monkeypatch):
    """No fcntl, no affinity, and processes that are spawned, not forked."""
    prep("demo --count 130 --size 32 --out one/demo")
    monkeypatch.setattr(dp, "fcntl", None)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "fork")
    args = ["demo", "--count", "130", "--size", "32", "--out", "two/demo"]
    assert dp.usable_cores() == os.cpu_count() and dp.main([*args, "--workers", "2"]) == 0
    assert content("one/demo") == content("two/demo")


def test_an_unfinished_folder_is_not_gone_on_with_by_another_plan():
    raw_folder("raw")
    args = "folder --raw raw --csv labels.csv --out out --size"
    plan = {"command": "folder", "size": 32, "raw": "raw", "csv": "labels.csv", "list": "0" * 64}
    write("out.partial/progress.jsonl", json.dumps(plan))
    line = prep_refused(args, 32)
    assert "list 000" in line and "--overwrite" in line
    assert "size 32, now asked: 48" in prep_refused(args, 48)
    prep(args, "32 --overwrite")
    assert len(prepared("out")[0]) == 12 and not Path("out.partial").exists()


def test_overwrite_removes_prepared_folders_only():
    raw_folder("raw")
    work = write("out/images/0.png", "years of work")
    args = "folder --raw raw --out out --overwrite"
    assert "incomplete (no meta.json)" in prep_refused(args)
    write("out/meta.json", "{}")
    assert "also holds ['images']" in prep_refused(args) and work.exists()


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(monkeypatch):
    raw_folder("raw")
    write("raw/images/a.png", "no picture")
    monkeypatch.setattr(dp, "BATCH", 4)  # the third of four does not fit
    args = "folder --raw raw --size 64 --workers 1 --out"
    with full_disk(40_000):
        assert "File too large" in prep_refused(args, "out")
    assert not Path("out").exists()
    prep(args, "out")
    prep(args, "other/out")
    assert content("out") == content("other/out")


def test_preparing_without_the_right_to_write_is_one_line(capfd):
    raw_folder("raw")
    Path("closed").mkdir(mode=0o500)
    args = words(["folder --raw raw --size 32 --workers 1 --out closed/out"])
    assert in_a_child(become_nobody, dp.main, args) == 2 and not os.listdir("closed")
    assert re.fullmatch("error: .*Permission denied.*\n", capfd.readouterr().err)
    Path("closed").chmod(0o777)
    assert in_a_child(become_nobody, dp.main, args) == 0
    assert len(prepared("closed/out")[0]) == 12


def test_the_raw_folder_is_never_written_to():
    raw = raw_folder("raw")
    before = sorted((str(p), p.stat().st_mtime_ns) for p in raw.rglob("*"))
    for out in (raw, Path("raw/out"), Path("raw/../raw/x")):
        line = prep_refused("folder --raw raw --out", out)
        assert "--raw is never written to" in line or "incomplete" in line
    prep("folder --raw raw --out out")
    assert sorted((str(p), p.stat().st_mtime_ns) for p in raw.rglob("*")) == before


def test_damaged_images_are_named_and_the_good_ones_kept():
    raw_folder("raw")
    whole = Path("raw/images/i001.png").read_bytes()
    bad = {
        "i001.png": (whole[: len(whole) // 2], "truncated"),
        "i002.png": (b"", "not a PNG"),
        "i003.png": (b"<html>not found</html>", "not a PNG"),
        "i004.png": (save(np.zeros((1, 1), np.uint8), "dot.png").read_bytes(), "1 x 1 pixels"),
        "i005.png": (None, "file not found"),
    }
    for name, (data, _) in bad.items():
        path = Path("raw/images", name)
        path.unlink()
        if data is not None:
            path.write_bytes(data)
    prep("folder --raw raw --csv labels.csv --size 48 --out out")
    images, labels, rejected, meta = prepared("out")
    assert list(rejected) == list(bad)
    assert all(reason in rejected[name] for name, (_, reason) in bad.items())
    good = [0, *range(6, 12)]
    assert labels["image"].tolist() == [f"i{k:03d}.png" for k in good]
    assert labels["F"].tolist() == [k % 2 for k in good]
    assert all(np.array_equal(images[n], phantom(k, 48)) for n, k in enumerate(good))
    assert pd.read_csv("out/hashes.csv")[["height", "width"]].values.tolist() == [[48, 48]] * 7


def test_a_set_without_one_good_image_is_refused_and_leaves_nothing():
    write("raw/a.png", "words")
    line = prep_refused("folder --raw raw --out out")
    assert "none of 1 images could be read" in line and "a.png" in line
    assert os.listdir() == ["raw"]


# ---------------------------------------------------- data_prep 5. the datasets: folder


def test_folder_reads_every_format_and_column():
    for name in ("a.png", "b.jpg", "c.JPEG"):
        save(phantom(ord(name[0])), f"mine/images/{name}")
    deep = phantom(0).astype(np.uint16) * 255
    save(deep, "mine/images/sub/d.png")
    save_dicom(deep, "mine/images/e.dcm", 16)
    save_dicom(deep, "mine/images/f.dicom", 16, ending=".4.90")
    mask = np.zeros((64, 64), np.uint8)
    mask[10:30, 20:50] = 255
    save(mask, "mine/masks/a.png")
    save(mask // 255, "mine/masks/b.png")
    twice = {"masks/c.png", "masks/c.bmp"}
    for name in twice:
        save(mask, f"mine/{name}")
    table = write(
        "mine/table.csv",
        "image,patient,split,mask,Mass,Edema,width,row",
        "a.png,1,train,a.png,1,0,hello,0",
        "b.jpg,1,train,masks/b.png,0,,there,1",
        "c.JPEG,2,val,,0.0,1.0,,",
        "sub/d.png,3,test,,,1,,",
        "e.dcm,4,test,,1,1,x,",
        "images/f.dicom,5,test,c,1,1,x,",  # of two files
        "../table.csv,6,test,,1,1,x,",
    )
    args = "folder --raw mine --csv table.csv --size 64 --out data/mine"
    assert "column 'width' holds ['hello']" in prep_refused(args)
    prep(args, "--findings Mass,Edema")
    images, _, rejected, meta = prepared("data/mine")
    assert meta["findings"] == ["Mass", "Edema"] and meta["split_rule"] == "as given"
    assert Path("data/mine/labels.csv").read_text().splitlines() == [
        "image,patient,split,Mass,Edema,has_mask",
        "a.png,1,train,1,0,1",
        "b.jpg,1,train,0,,1",
        "c.JPEG,2,val,0,1,0",
        "sub/d.png,3,test,,1,0",
        "e.dcm,4,test,1,1,0",
    ]
    assert np.array_equal(images[0], phantom(ord("a"))) and np.array_equal(images[3], images[4])
    masks = np.load("data/mine/masks.npy")
    assert all(np.array_equal(found, mask // 255) for found in masks[:2]) and not masks[2:].any()
    assert set(rejected) == {"images/f.dicom", "../table.csv", *twice}
    assert rejected["images/f.dicom"].startswith("mask: ")
    assert meta["sources"]["table.csv"] == dp.file_digest(table)


def test_folder_names_what_it_left_out_and_refuses_what_conflicts():
    raw_folder("raw")
    args = "folder --raw raw --csv labels.csv --size 32 --out"
    lines = Path("raw/labels.csv").read_text().splitlines()
    # A byte-order mark, a row twice, a missing row, names that leave the folder or have no file.
    escape = ["../secret.png,p9,1", "/etc/passwd,p9,1", "images/../../raw/i001.png,p9,1"]
    write("raw/labels.csv", "\ufeff" + lines[0], *lines[1:-1], lines[1], *escape)
    save(phantom(0), "secret.png")
    prep(args, "out")
    _, labels, rejected, _ = prepared("out")
    assert labels["image"].tolist() == [f"i{k:03d}.png" for k in range(11)]
    reasons = dict.fromkeys((row.split(",")[0] for row in escape), "file not found")
    assert rejected == {"images/i011.png": "no row in the table"} | reasons
    write("raw/labels.csv", *lines, "i000.png,p0,1")  # the same image with another label
    assert "i000.png" in prep_refused(args, "two")
    write("raw/labels.csv", "image,patient,split", "i000.png,1,train", "i001.png,1,test")
    assert "'1'" in prep_refused(args, "two")
    write("raw/labels.csv", "picture,F", "i000.png,1")
    assert "expected the columns ['image']" in prep_refused(args, "two")
    assert not Path("two").exists() and not Path("two.partial").exists()


def test_files_are_found_by_content_and_every_one_is_listed():
    for name in ("a.png", "c.bmp", "d.webp", "e.jpeg", "g.PNG"):
        save(phantom(0), f"raw/{name}")
    os.rename("raw/e.jpeg", "raw/e.jfif")
    os.rename(save_dicom(phantom(1), "raw/h.dcm"), "raw/h")
    os.rename(save_dicom(phantom(2), "raw/i.dcm"), "raw/1.2.840.10008")
    good = os.listdir("raw")
    bad = {"README": b"words", "deep.tif": b"II*\0", "._a.png": b"\0\5\x16\7", "odd.bin": b"\x1f"}
    for name, data in bad.items():
        Path("raw", name).write_bytes(data)
    Path("raw/broken.png").symlink_to("nowhere.png")
    save(phantom(0), "raw/masks/a.png")  # a mask is never an image
    write("raw/sub/more.pdf", "words")
    shutil.copy("raw/a.png", os.fsdecode(b"raw/M\xfcller.png"))
    prep("folder --raw raw --size 32 --out out")
    _, labels, rejected, meta = prepared("out")
    assert meta["findings"] == [] and set(labels["image"]) == {*good, "M\\xfcller.png"}
    assert set(rejected) == {*bad, "broken.png", "sub/more.pdf", "masks/a.png"}
    # The same with a table.
    names = ["a", "h", "1.2.840.10008"]
    write("raw/labels.csv", "image,F", *[f"{name},{k % 2}" for k, name in enumerate(names)])
    prep("folder --raw raw --csv labels.csv --size 32 --out out --overwrite")
    _, labels, more, _ = prepared("out")
    assert labels["image"].tolist() == names
    assert set(more) == {*rejected, *good, "M\\xfcller.png"} - {"a.png", "h", names[2]}


def test_linked_folders_are_followed_but_not_in_a_circle():
    raw_folder("real", n=4)
    link = Path("link")
    link.mkdir()
    (link / "images").symlink_to("../real/images")
    Path("real/images/back").symlink_to("..")
    prep("folder --raw link --out out --size 32")
    assert len(prepared("out")[0]) == 4
    raw = raw_nih("nih")
    os.rename(raw / "images_001", "elsewhere")
    (raw / "images_001").symlink_to("../elsewhere")
    prep("nih --raw nih --out nih_out --size 48")
    check_nih("nih_out")


def test_labels_that_are_uncertain_or_spelled_out():
    raw_folder("raw", n=8)
    cells = ["1", "0", "", "-1", "True", "FALSE", "nan", "-1.0"]
    rows = [f"i{k:03d}.png,{cell},{k % 2},{3 * k}" for k, cell in enumerate(cells)]
    write("raw/labels.csv", "image,Edema,Sex,Age", *rows)
    args = "folder --raw raw --csv labels.csv --size 32 --out out --overwrite"
    line = prep_refused(args)
    assert "column 'Age' holds ['3']" in line and "--findings" in line
    assert "no column 'Oedema'" in prep_refused(args, "--findings Oedema")
    for flag, shown in (("", ""), ("--uncertain 0", "0"), ("--uncertain 1", "1")):
        prep(args, "--findings Edema", flag)
        table = pd.read_csv("out/labels.csv", dtype=str, keep_default_na=False)
        assert list(table) == ["image", "patient", "split", "Edema"]
        assert table["Edema"].tolist() == ["1", "0", "", shown, "1", "0", "", shown]
    write("raw/labels.csv", "image,Edema", *[row.split(",")[0] + "," for row in rows])
    assert "column 'Edema' holds nothing" in prep_refused(args)


def test_ids_that_look_like_missing_values_stay_themselves():
    raw_folder("raw")
    ids = ["NA", "None", "nan", "null", "007", "N/A"]
    cells = ["", *"01" * 5, "1"]
    rows = [f"i{k:03d}.png,{ids[k // 2]},{cells[k]}" for k in range(12)]
    write("raw/labels.csv", "image,patient,F", *rows)
    prep("folder --raw raw --csv labels.csv --size 32 --out out")
    data = m.PreparedData("out")
    assert data.patient.tolist() == np.repeat(ids, 2).tolist()
    assert data.labels.isnan().nonzero().tolist() == [[0, 0]]  # blank, and so unknown
    assert torch.equal(m.label_subset(data, 1.0), data.indices("train"))
    assert dp.verify("out") == []


def test_names_in_another_form_are_found_where_they_mean_one_file():
    args = "folder --raw raw --csv labels.csv --size 32 --out out --overwrite"
    for name in ("a.png", "b.png", "e\u0301t\u00e9.png", "x/d.png", "y/d.png", "z/e.dcm.png"):
        save(phantom(len(name)), f"raw/images/{name}")
    names = ["./a.png", "b", "\u00e9te\u0301", "d", "x\\d", "e.dcm", "../a.png"]
    write("raw/labels.csv", "image,F", *[f"{name},{k % 2}" for k, name in enumerate(names)])
    prep(args)
    _, labels, rejected, _ = prepared("out")
    assert labels["image"].tolist() == [names[k] for k in (0, 1, 2, 4)]
    assert rejected["d"] == "several files: ['images/x/d.png', 'images/y/d.png']"
    for found, other, message in (
        ("a,1", "a.png,1", "two images of the table are one file, images/a.png"),
        ("q1,1", "q2,0", "none of 2 images could be read: the table names ['q1'], left out: [('im"),
    ):
        write("raw/labels.csv", "image,F", found, other)
        assert message in prep_refused(args)


def test_boxes_beside_the_table_of_a_folder_are_scaled():
    raw_folder("raw", n=4, size=64)
    save(phantom(1, 64)[:32], "raw/images/i001.png")
    args = "folder --raw raw --csv labels.csv --size 32 --out out"
    header = "image,finding,x,y,width,height,reader"
    write("raw/boxes.csv", header, "i001.png,F,10,20,30,40,R1", "i003.png,F,0,0,64,64,R2")
    prep(args)
    boxes = pd.read_csv("out/boxes.csv")
    expected = [["i001.png", "F", 5, 20, 15, 12], ["i003.png", "F", 0, 0, 32, 32]]
    assert boxes.values.tolist() == expected and list(boxes) == dp.BOX
    assert "boxes.csv" in prepared("out")[3]["sources"]
    for row in ("i009.png,F,1,2,3,4,R", "i001.png,F,1,2,,4,R"):
        write("raw/boxes.csv", header, row)
        assert "boxes.csv: a box without" in prep_refused(args, "--overwrite")


# ---------------------------------------------------- data_prep 5. the datasets: NIH

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
    root, old = Path(root), edition == "2017"
    lines = [OLD_HEADER if old else OLD_HEADER[:-1]]  # of which the last comma is gone
    for k, (name, labels, _) in enumerate(rows):
        age = "058Y" if k % 2 else "58"
        patient = name[:8].lstrip("0" * (not old))
        lines.append(f"{name},{labels},{k},{patient},{age},M,PA,2682,2749,0.143,0.143")
    name = "Data_Entry_2017.csv" if old else "Data_Entry_2017_v2020.csv"
    write(root / name, *lines)
    for split, file in (("train", "train_val_list.txt"), ("test", "test_list.txt")):
        (root / file).write_text("\n".join(name for name, _, s in rows if s == split))
    if boxes:
        write(
            root / "BBox_List_2017.csv",
            "Image Index,Finding Label,Bbox [x,y,w,h],,,",
            f"{rows[0][0]},Cardiomegaly,256,128,512,256",  # of 1024, whatever the files' size
            f"{rows[3][0]},Infiltrate,0,0,1024,1024",
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
        shown = {f for f in dp.NIH_FINDINGS if labels[f][k] == 1} or {"No Finding"}
        assert shown == set(found.split("|"))
        assert (labels["split"][k] == "test") == (split == "test")
    boxes = pd.read_csv(f"{folder}/boxes.csv").values.tolist()
    assert boxes == [
        [NIH_ROWS[0][0], "Cardiomegaly", 12, 6, 24, 12],
        [NIH_ROWS[3][0], "Infiltration", 0, 0, 48, 48],
    ]


def refused_rows(path, args, *cases):
    """Adds one row at a time to a table; each has to be refused with its message."""
    sound = path.read_text()
    for row, message in cases:
        path.write_text(sound + row + "\n")
        assert message in prep_refused(args), row
    path.write_text(sound)


@pytest.mark.parametrize("edition", ["2017", "2020"])
def test_nih_in_both_editions(edition):
    raw_nih("raw", edition=edition)
    prep("nih --raw raw --out out --size 48")
    check_nih("out")


def test_missing_images_are_an_error_unless_they_are_allowed():
    raw_nih("raw")
    os.rename("raw/images_002", "images_002")
    line = prep_refused("nih --raw raw --out out --size 32")
    assert "1 of 6 images have no file, first 00000001_001.png" in line
    assert "--allow-missing" in line and not Path("out").exists()
    prep("nih --raw raw --out out --size 32 --allow-missing")
    _, labels, rejected, _ = prepared("out")
    assert rejected == {"00000001_001.png": "file not found"} and len(labels) == 5


def test_fault6_an_image_in_both_official_lists_is_refused():
    raw_nih("raw")
    with open("raw/test_list.txt", "a") as f:
        f.write("\n00000002_000.png")
    line = prep_refused("nih --raw raw --out out")
    assert "['00000002_000.png'] is in both" in line and "test_list.txt" in line
    # Another image of a patient of the test list is refused, too.
    for name, image in (
        ("train_val_list.txt", "00000003_001.png"),
        ("test_list.txt", "00000003_000.png"),
    ):
        Path("raw", name).write_text(image)
    assert "two splits" in prep_refused("nih --raw raw --out out")


def test_rows_of_nih_that_have_no_sense_are_refused_by_name():
    raw = raw_nih("raw")
    with open("raw/train_val_list.txt", "a") as f:
        f.write("\n00000009_000.png")
    refused_rows(
        raw / "Data_Entry_2017_v2020.csv",
        "nih --raw raw --out out",
        ("00000009_000.png,Tumour,0,9", "Tumour"),
        ("00000009_000.png,No Finding|Mass,0,9", "No Finding"),
        ("00000009_000.png,,0,9", "00000009_000.png"),
        ("../../etc/pw.png,Mass,0,9", "../../etc/pw.png"),
        ("00000009_000.png,Mass,0,8", "patient '8'"),
        ("00000002_000.png,Mass,0,2", "conflicting rows"),
    )
    assert not Path("out").exists()


def test_nih_keeps_going_over_harmless_rows_and_names_unlisted_images():
    raw_nih("raw")
    path = Path("raw/Data_Entry_2017_v2020.csv")
    lines = path.read_text().splitlines()
    extra = "00000009_000.png,Mass,0,9,58,M,PA,1,1,1,1"
    write(path, "\ufeff" + lines[0], *lines[1:], lines[2], extra)  # a mark, a row twice
    prep("nih --raw raw --out out --size 32")
    _, labels, rejected, _ = prepared("out")
    assert labels["image"].tolist() == [name for name, *_ in NIH_ROWS]
    assert rejected == {"00000009_000.png": "in neither official list"}


def test_a_missing_list_is_named():
    raw = raw_nih("raw")
    for name in ("test_list.txt", "Data_Entry_2017_v2020.csv"):
        os.remove(raw / name)
        assert name in prep_refused("nih --raw raw --out out")
    assert "nowhere" in prep_refused("nih --raw nowhere --out out")
    assert "--raw" in prep_refused("nih --out out")


# ---------------------------------------------------- data_prep 5. the datasets: ChestMNIST


def raw_chestmnist(path, size=28, counts=(20, 6, 8)):
    """An .npz with the arrays, dtypes and label order of the published one; its arrays."""
    rng, arrays = np.random.default_rng(0), {}
    for split, n in zip(dp.SPLITS, counts):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, size, size), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 2, (n, 14), dtype=np.uint8)
    np.savez_compressed(path, **arrays)
    return arrays


@pytest.mark.parametrize("size", [28, 64])
def test_chestmnist_keeps_pictures_labels_and_splits(size):
    arrays = raw_chestmnist("raw.npz", size)
    prep("chestmnist --raw raw.npz --out out")
    images, labels, rejected, meta = prepared("out")
    assert meta["size"] == size and not rejected
    assert np.array_equal(images, np.concatenate([arrays[f"{s}_images"] for s in dp.SPLITS]))
    assert labels["split"].tolist() == ["train"] * 20 + ["val"] * 6 + ["test"] * 8
    order = (
        "Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax "
        "Consolidation Edema Emphysema Fibrosis Pleural_Thickening Hernia"
    ).split()
    expected = np.concatenate([arrays[f"{s}_labels"] for s in dp.SPLITS])
    assert np.array_equal(labels[order], expected)
    prep("chestmnist --raw raw.npz --out small --size 32")
    assert prepared("small")[0].shape == (34, 32, 32)


def test_chestmnist_files_that_are_none_are_refused():
    arrays, raw = raw_chestmnist("raw.npz"), Path("raw.npz")
    whole = raw.read_bytes()
    bad = [b"", whole[: len(whole) // 2], b"<html>404</html>"]
    images, labels = arrays["train_images"], arrays["train_labels"]
    for change in (
        {"train_labels": labels[:, :3]},
        {"train_labels": labels + 1},
        {"train_images": images[:, :4, :4]},
        {"train_images": images.astype(object)},
        {"train_images": images.astype(np.float32)},
        {"train_images": images[:5]},
    ):
        np.savez(raw, **arrays | change)
        bad.append(raw.read_bytes())
    del arrays["test_images"]
    np.savez(raw, **arrays)
    for data in (*bad, raw.read_bytes()):
        raw.write_bytes(data)
        assert "raw.npz" in prep_refused("chestmnist --raw raw.npz --out out")
    raw.unlink()
    assert "raw.npz" in prep_refused("chestmnist --raw raw.npz --out out")
    assert not Path("out").exists()


# ---------------------------------------------------- data_prep 5. the datasets: RSNA and SIIM


def raw_rsna(root, n=30, size=64):
    """RSNA's files: every third image positive, one with two boxes; both CSVs repeat rows."""
    root, rows, classes = Path(root), [], []
    for k in range(n):
        save_dicom(phantom(k, size), root / "stage_2_train_images" / f"id-{k:03d}.dcm")
        rows += [f"id-{k:03d},64.0,128.0,256.0,512.0,1"] if k % 3 == 0 else [f"id-{k:03d},,,,,0"]
        classes += [f"id-{k:03d},{'Lung Opacity' if k % 3 == 0 else 'Normal'}"] * (1 + k % 2)
    rows.insert(1, "id-000,640.0,128.0,256.0,256.0,1")
    write(root / "stage_2_train_labels.csv", "patientId,x,y,width,height,Target", *rows)
    write(root / "stage_2_detailed_class_info.csv", "patientId,class", *classes)
    save_dicom(phantom(0), root / "stage_2_test_images" / "id-900.dcm")  # without public labels
    return root


def test_rsna_is_one_row_an_image_with_its_boxes_and_its_own_split():
    raw_rsna("raw")
    with open("raw/stage_2_train_labels.csv", "a") as f:
        f.write("id-003,64.0,128.0,256.0,512.0,1\nid-001,,,,,0\n")  # again
    prep("rsna --raw raw --out out --size 32")
    images, labels, rejected, meta = prepared("out")
    assert labels["image"].tolist() == [f"id-{k:03d}" for k in range(30)]
    others = ("stage_2_test_images/id-900.dcm", "stage_2_detailed_class_info.csv")
    assert rejected == dict.fromkeys(others, "no row in the table")
    assert labels["Pneumonia"].tolist() == [int(k % 3 == 0) for k in range(30)]
    assert labels["split"].tolist() == [dp.hash_split(i, dp.BY_IMAGE) for i in labels["image"]]
    assert "'val': 0.15, 'test': 0.15" in meta["split_rule"]
    assert all(np.array_equal(images[k], dp.resize_xray(phantom(k), 32)) for k in (0, 29))
    expected = [[f"id-{k:03d}", "Pneumonia", 2, 4, 8, 16] for k in range(0, 30, 3)]
    expected.insert(1, ["id-000", "Pneumonia", 20, 4, 8, 8])
    assert pd.read_csv("out/boxes.csv").values.tolist() == expected


def test_rows_of_rsna_without_sense_are_refused_and_missing_images_counted():
    path = raw_rsna("raw", n=6, size=32) / "stage_2_train_labels.csv"
    args = "rsna --raw raw --size 32 --out out"
    refused_rows(
        path,
        args,
        ("id-001,1,2,3,4,0", "Target"),
        ("id-001,1,2,3,,1", "Target"),
        ("id-001,,,,,1", "Target"),
        ("id-001,1,2,3,4,1", "conflicting"),
        ("id-001,a,2,3,4,1", "could not convert"),
        ("id-001,1,2,3,4,2", "Target"),
        (",,,,,0", "blank"),
        ("../id-001,,,,,0", "first ../id-001"),
    )
    path.write_text("\ufeff" + path.read_text() + "../id-001,,,,,0\n")
    save_dicom(phantom(9), "raw/stage_2_train_images/stray.dcm")
    prep(args, "--allow-missing")
    _, labels, rejected, _ = prepared("out")
    assert len(labels) == 6
    assert rejected["stage_2_train_images/stray.dcm"] == "no row in the table"
    assert rejected["../id-001"] == "file not found" and len(rejected) == 4
    shutil.copytree("raw/stage_2_train_images", "raw/copy")
    line = prep_refused(args, "--overwrite")
    assert "id-000, several files: ['copy/id" in line


def blobs(k, size=64):
    """Two overlapping rectangles of their own for every k."""
    one, two = np.zeros((2, size, size), bool)
    one[5 + k : 30, 10:20] = True
    two[20:50, 15 : 25 + k] = True
    return one, two


def raw_siim(root, nested=True, name="train-rle.csv", n=6):
    """SIIM's files: image 0 without a region, 1 of two rows that overlap, the others of one row."""
    root, rows = Path(root), ["ImageId, EncodedPixels"]
    for k in range(n + 1):
        folder = root / "dicom-images-train" if nested else root / "stage_2_images"
        folder = folder / f"1.2.{k}" / f"1.2.{k}.1" if nested else folder
        save_dicom(phantom(k), folder / f"1.2.{k}.1.1.dcm", ending=".4.50")
        one, two = np.kron(blobs(k), np.ones((16, 16)))  # tables count 1024 pixels a side
        texts = {0: ["-1"], 1: [rle_encode(one), rle_encode(two)], n: []}.get(k, [rle_encode(one)])
        rows += [f"1.2.{k}.1.1, {text}" for text in texts]
    write(root / name, *rows)
    return root


@pytest.mark.parametrize("nested,name", [(True, "train-rle.csv"), (False, "stage_2_train.csv")])
def test_siim_in_both_layouts_and_under_both_names(nested, name):
    raw_siim("raw", nested, name)
    prep("siim --raw raw --out out --size 64")
    images, labels, rejected, _ = prepared("out")
    assert labels["image"].tolist() == [f"1.2.{k}.1.1" for k in range(6)]
    assert labels["Pneumothorax"].tolist() == [0, 1, 1, 1, 1, 1]
    assert labels["has_mask"].tolist() == [1] * 6  # a blank mask is a mask
    ((file, reason),) = rejected.items()
    assert file.endswith("1.2.6.1.1.dcm") and reason == "no row in the table"
    assert labels["split"].tolist() == [dp.hash_split(i, dp.BY_IMAGE) for i in labels["image"]]
    masks = [blobs(k)[0] for k in range(6)]
    masks[0], masks[1] = np.zeros((64, 64)), np.logical_or(*blobs(1))  # of two rows, a union
    assert np.array_equal(np.load("out/masks.npy"), np.array(masks, np.uint8))
    assert all(np.abs(images[k].astype(int) - phantom(k)).mean() < 2 for k in range(6))


@pytest.mark.parametrize("command,make", [("rsna", raw_rsna), ("siim", raw_siim)])
def test_a_table_of_patients_makes_the_split_one_by_patient(command, make):
    make("raw", n=16)
    args = (command, "--raw raw --size 64 --out out --overwrite")
    prep(*args)
    _, labels, _, meta = prepared("out")
    assert "a patient with several images may be in several splits" in meta["split_rule"]
    rows = [f"{name},p{k // 4}" for k, name in enumerate(labels["image"])]
    write("who.csv", "image,patient", *rows, "elsewhere,p9")
    prep(*args, "--patients who.csv")
    _, labels, _, meta = prepared("out")
    assert labels["patient"].tolist() == [f"p{k // 4}" for k in range(len(rows))]
    assert labels["split"].tolist() == [dp.hash_split(p) for p in labels["patient"]]
    assert "by patient" in meta["split_rule"] and "who.csv" in meta["sources"]
    write("who.csv", "image,patient", *rows[1:])
    line = prep_refused(*args, "--patients who.csv")
    assert "no row for 1 images" in line and labels["image"][0] in line


def test_siim_rows_without_sense_are_named():
    path, args = raw_siim("raw") / "train-rle.csv", "siim --raw raw --size 64 --out out"
    refused_rows(
        path,
        args,
        ("1.2.0.1.1, 1 5", "['1.2.0.1.1'] has a blank, or both -1 and a region"),
        ("1.2.2.1.1,-1", "['1.2.2.1.1'] has a blank, or both -1 and a region"),
        ("1.2.3.1.1,", "['1.2.3.1.1'] has a blank, or both -1 and a region"),
        ("../1.2.0.1.1,-1", "first ../1.2.0.1.1"),
    )
    # A region that leaves its picture costs that image alone; a row twice costs nothing.
    text = path.read_text()
    path.write_text("\ufeff" + text + text.splitlines()[-1] + "\n1.2.6.1.1,1048570 7\n")
    prep(args)
    _, labels, rejected, _ = prepared("out")
    assert len(labels) == 6 and list(rejected) == ["1.2.6.1.1"]
    assert re.match("mask: RLE run of 7 .* leaves 1024 x 1024", rejected["1.2.6.1.1"])


def test_a_mask_is_shrunk_by_half_coverage():
    mask = np.zeros((64, 64), bool)
    mask[16:49, 8:23] = True
    mask[49, 8] = True  # a quarter of the pixels of its cell more
    _, _, small = dp.prepare_picture(
        (0, phantom(0), (rle_encode(np.kron(mask, np.ones((16, 16)))),)), 32
    )
    covered = mask.reshape(32, 2, 32, 2).mean((1, 3))
    assert np.array_equal(np.frombuffer(small, np.uint8).reshape(32, 32), covered >= 0.5)


# ---------------------------------------------------- data_prep 5. the datasets: VinBig

VINBIG_VOTES = {  # image -> finding of each of three readers
    "none": ("No finding", "No finding", "No finding"),
    "one": ("Cardiomegaly", "No finding", "No finding"),
    "two": ("Cardiomegaly", "Cardiomegaly", "No finding"),
    "mixed": ("ILD", "Nodule/Mass", "ILD"),
    "all": ("Pleural effusion", "Pleural effusion", "Pleural effusion"),
}
DEPTHS = (  # of each image
    (16, "MONOCHROME2", ".1"),
    (12, "MONOCHROME1", ".4.90"),
    (14, "MONOCHROME2", ".4.90"),
    (12, "MONOCHROME1", ""),
    (16, "MONOCHROME1", ".4.70"),
)


def raw_vinbig(root, suffixes=("",)):
    """Three readers an image, mixed depths, compressions and polarities; a copy a suffix."""
    rows = ["image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max"]
    for k, (suffix, name) in enumerate(itertools.product(suffixes, VINBIG_VOTES)):
        votes, name = VINBIG_VOTES[name], name + suffix
        bits, monochrome, ending = DEPTHS[k % len(DEPTHS)]
        pixels = phantom(k).astype(np.uint16) << (bits - 8)
        if monochrome == "MONOCHROME1":
            pixels = np.uint16(2**bits - 1) - pixels
        save_dicom(pixels, f"{root}/train/{name}.dicom", bits, ending, monochrome)
        for reader, finding in enumerate(votes):
            box = ",,," if finding == "No finding" else f"{8 + reader},16,40,48"
            rows.append(f"{name},{finding},0,R{reader + k},{box}")
    rows.append(rows[-1].replace("40,48", "60,60"))  # one reader, a second box of the finding
    save_dicom(phantom(9), f"{root}/test/hidden.dicom")
    return write(f"{root}/train.csv", *rows).parent


@pytest.mark.parametrize("readers", ["any", "majority"])
def test_vinbig_by_any_reader_or_the_majority(readers):
    raw_vinbig("raw")
    flags = "--readers any" if readers == "any" else ""  # majority is the default
    prep("vinbig --raw raw --out out --size 64", flags)
    images, labels, rejected, meta = prepared("out")
    assert labels["image"].tolist() == list(VINBIG_VOTES)
    assert rejected == {"test/hidden.dicom": "no row in the table"}
    assert meta["findings"] == dp.VINBIG_FINDINGS and readers in meta["split_rule"]
    need = 1 if readers == "any" else 2
    for k, votes in enumerate(VINBIG_VOTES.values()):
        for finding in dp.VINBIG_FINDINGS:
            assert labels[finding][k] == int(votes.count(finding) >= need)
        picture = phantom(k).astype(float)
        expected = (picture - picture.min()) * 255 / np.ptp(picture)
        assert np.abs(images[k] - expected).max() <= 1  # whatever depth and polarity
    boxes = pd.read_csv("out/boxes.csv")
    expected = {"two": ["Cardiomegaly"] * 2, "mixed": ["ILD"] * 2, "all": ["Pleural effusion"] * 4}
    if readers == "any":
        expected |= {"one": ["Cardiomegaly"], "mixed": ["ILD", "Nodule/Mass", "ILD"]}
    assert boxes.groupby("image")["finding"].agg(list).to_dict() == expected
    assert boxes[dp.EDGES][boxes["image"] == "two"].values.tolist()[1] == [9, 16, 31, 32]


def raw_physionet(root, n=8):
    """PhysioNet's files: three readers in train, a consensus in test.

    COPD by every reader of odd images, Pneumonia by one reader of image 2, the other disease by two
    of image 4.
    """
    findings = [*dp.VINBIG_FINDINGS[:9], "Other lesion", "COPD", "Pneumonia"]
    for split, other, readers in (("train", "Other diseases", 3), ("test", "Other disease", 1)):
        labels, boxes = [], []
        for k, reader in itertools.product(range(n), range(readers)):
            name = f"{split}{k}"
            save_dicom(phantom(k), f"{root}/{split}/{name}.dicom", ending=".4.90")
            votes = dict.fromkeys(findings, 0) | {"COPD": k % 2}
            votes["Pneumonia"] = int(k == 2 and reader == 0)
            votes[other] = int(k == 4 and reader < 2)
            votes["No finding"] = int(not any(votes.values()))
            labels.append({"image_id": name, "rad_id": f"R{reader}"} | votes)
            for finding in [f for f, seen in votes.items() if seen]:
                box = ",,," if finding == "No finding" else "8,8,24,40"
                boxes.append(f"{name},R{reader},{finding},{box}")
        header = "image_id,rad_id,class_name,x_min,y_min,x_max,y_max"
        write(f"{root}/annotations/annotations_{split}.csv", header, *boxes)
        table = pd.DataFrame(labels)
        if readers == 1:
            del table["rad_id"]
        table.to_csv(f"{root}/annotations/image_labels_{split}.csv", index=False)
    return Path(root)


@pytest.mark.parametrize("readers", ["any", "majority"])
def test_vindr_of_physionet_has_image_labels_and_the_official_test_set(readers):
    raw_physionet("raw")
    prep("vinbig --raw raw --out out --size 32 --readers", readers)
    _, labels, rejected, meta = prepared("out")
    names = [f"{split}{k}" for split in ("train", "test") for k in range(8)]
    assert labels["image"].tolist() == names and not rejected
    assert (labels["split"] == "test").tolist() == [False] * 8 + [True] * 8
    assert not {"Other disease", "No finding", "rad_id", "image_id"} & set(meta["findings"])
    assert labels["COPD"].tolist() == [k % 2 for k in range(8)] * 2
    pneumonia = [int(readers == "any" and k == 2) for k in range(8)]
    assert labels["Pneumonia"].tolist() == pneumonia + [int(k == 2) for k in range(8)]
    assert labels["Other diseases"].tolist() == [int(k == 4) for k in range(8)] * 2
    boxes = pd.read_csv("out/boxes.csv")
    others = boxes["image"][boxes["finding"] == "Other diseases"].tolist()
    assert others == ["train4", "train4", "test4"]
    assert boxes[dp.EDGES].drop_duplicates().values.tolist() == [[4, 4, 8, 16]]


def test_vinbig_rows_without_sense_are_refused():
    path, args = raw_vinbig("raw") / "train.csv", "vinbig --raw raw --out out --size 32"
    refused_rows(
        path,
        args,
        ("none,Tumour,3,R1,1,2,3,4", "unknown classes {'Tumour'}"),
        ("none,ILD,3,R1,1,2,x,4", "could not convert"),
        ("../none,ILD,3,R1,1,2,3,4", "first ../none"),
        (",ILD,3,R1,1,2,3,4", "blank"),
    )
    # A byte-order mark and a reader's row twice cost nothing.
    sound = path.read_text()
    path.write_text("\ufeff" + sound + sound.splitlines()[4] + "\n")
    prep(args)
    assert prepared("out")[1]["Cardiomegaly"].tolist() == [0, 0, 1, 0, 0]
    path.unlink()
    assert "image_labels_train.csv" in prep_refused(args, "--overwrite")
    labels = raw_physionet("raw") / "annotations" / "image_labels_test.csv"
    labels.write_text(labels.read_text().replace("test3,0", "test3,2"))
    assert "expected 0 or 1 in every finding" in prep_refused(args, "--overwrite")


# ---------------------------------------------------- data_prep 5. the datasets: fuzz


def damaged(text, rng):
    """The text with one to three characters changed, inserted or removed."""
    for _ in range(rng.integers(1, 4)):
        at = rng.integers(len(text))
        new = rng.choice(list('0123456789,|. -"abR\n\r;/_')) if rng.random() < 0.8 else ""
        text = text[:at] + new + text[at + rng.integers(2) :]
    return text


def test_a_thousand_damaged_tables_are_read_right_or_refused():
    raw = raw_nih("raw", boxes=False, size=32)
    path, rng, read = raw / "Data_Entry_2017_v2020.csv", np.random.default_rng(0), 0
    sound = path.read_text()
    for case in range(1000):
        text = damaged(sound, rng) if case else sound
        path.write_bytes(text.encode())
        try:
            listing = dp.list_nih(raw, allow_missing=True)
        except dp.PrepError as e:
            assert path.name in str(e) or re.search("image|patient|split", str(e)), case
            continue
        read += 1
        header, *rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
        expected = {}
        for row in rows:
            cells = [*map(str.strip, row), *[""] * len(header)]
            row = {name.strip(): cell for name, cell in zip(header, cells, strict=False)}
            found = set(row["Finding Labels"].split("|")) - {"No Finding"}
            expected[row["Image Index"]] = (row["Patient ID"].lstrip("0"), found)
        for name, _ in listing.rejected:
            expected.pop(name, None)
        for row in listing.table.to_dict("records"):
            shown = {f for f in dp.NIH_FINDINGS if row[f]}
            assert expected.pop(row["image"]) == (row["patient"], shown), text
        assert not expected, text
    assert 50 < read < 950


# ---------------------------------------------------------------- data_prep 6. downloads


@pytest.fixture()
def server(monkeypatch):
    """A local server of `files`: name -> bytes; `faults` are used up, one a request."""

    class Handler(BaseHTTPRequestHandler):
        files, faults, asked = {}, [], []

        def do_GET(self):
            asked, start = self.headers["Range"], 0
            Handler.asked.append(asked)
            fault = Handler.faults.pop(0) if Handler.faults else None
            data = Handler.files.get(self.path.lstrip("/").partition("?")[0])
            if data is None or fault == "error":
                return self.send_error(404 if data is None else 503)
            if fault != "no range":
                start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(data):
                return self.send_error(416)
            self.send_response(200 if fault == "no range" else 206)
            if fault != "no length":
                self.send_header("Content-Length", len(data) - start)
            self.end_headers()
            end = start + fault if isinstance(fault, int) else len(data)
            self.wfile.write(data[start:end])  # and hangs up

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    Handler.url = f"http://127.0.0.1:{http.server_port}/{{}}"
    yield Handler
    http.shutdown()
    http.server_close()


def test_a_broken_transfer_is_gone_on_with(server):
    data = np.random.default_rng(0).bytes(300_000)
    server.files, server.faults = {"a": data}, [100_000, "error", 50_000, None]
    url = server.url.format("a")
    path = dp.download(url, "sub/a")
    assert path.read_bytes() == data and not Path("sub/a.part").exists()
    assert server.asked == [f"bytes={start}-" for start in (0, 99_999, 99_999, 149_998)]
    server.asked.clear()
    assert dp.download(url, path) == path and not server.asked  # not again
    # From one run to the next, and after a transfer that was whole but for its new name.
    for size in (123_456, 300_000):
        Path(f"b{size}.part").write_bytes(data[:size])
        assert dp.download(url, f"b{size}").read_bytes() == data
        assert server.asked.pop() == f"bytes={size - 1}-"
    # A server that cannot go on starts again, and nothing is doubled.
    Path("c.part").write_bytes(data[:77])
    server.faults = ["no range"]
    assert dp.download(url, "c").read_bytes() == data


def test_a_transfer_of_the_wrong_size_is_refused_and_kept_for_later(server):
    server.files, server.faults = {"a": bytes(1000)}, [100] * 5
    url = server.url.format("a")
    with pytest.raises(dp.PrepError, match="496 of 1,000 bytes came; the same command resumes"):
        dp.download(url, "a")
    assert not Path("a").exists() and Path("a.part").stat().st_size == 496
    assert dp.download(url, "a").stat().st_size == 1000
    with pytest.raises(dp.PrepError, match="404"):
        dp.download(server.url.format("b"), "b")
    server.faults = ["no length"] * 5
    with pytest.raises(dp.PrepError):
        dp.download(url, "c")
    assert not Path("c").exists()


def test_chestmnist_is_downloaded_and_a_wrong_file_refused(server, monkeypatch):
    raw_chestmnist("right.npz", 64)
    right = Path("right.npz").read_bytes()
    monkeypatch.setattr(dp, "CHESTMNIST_URL", server.url + "?download=1")
    server.files = {"chestmnist_64.npz": right}
    assert "MD5" in prep_refused("chestmnist --download --size 64")
    assert not list(Path("data").rglob("*.np*"))  # neither the file nor a part of it
    file = ("chestmnist_64.npz", hashlib.md5(right).hexdigest())
    monkeypatch.setitem(dp.CHESTMNIST_FILES, 64, file)
    prep("chestmnist --download")
    assert prepared("data/chestmnist")[0].shape == (34, 64, 64)
    assert "[28, 64, 128, 224]" in prep_refused("chestmnist --download --size 100 --out x")


def test_nih_is_downloaded_whole_and_goes_on_after_a_break(monkeypatch):
    rows = [(f"{k:08d}_000.png", "Mass", "test" if k > 9 else "train") for k in range(1, 13)]
    raw_nih("source", archives=True, rows=rows, size=48)
    published = {dp.LISTS_URL.format(name): name for name in dp.NIH_LISTS}
    for k, key in enumerate(dp.NIH_ARCHIVES, 1):
        published[dp.NIH_URL.format(key)] = f"images_{k:03d}.tar.gz"
    urls = list(published)
    last = published.pop(urls[-1])

    def download(url, path):
        if url not in published:
            raise dp.PrepError(url)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(f"source/{published[url]}", path)
        return path

    monkeypatch.setattr(dp, "download", download)
    assert urls[-1] in prep_refused("nih --download --size 32")
    published[urls[-1]] = last
    prep("nih --download --size 32")
    assert prepared("data/nih")[1]["image"].tolist() == [name for name, *_ in rows]


def test_an_archive_that_is_damaged_or_leaves_its_folder_is_refused(monkeypatch):
    monkeypatch.setattr(dp, "download", lambda url, path: path)  # all has come
    archive = raw_nih("data/downloads/nih", archives=True) / "images_001.tar.gz"
    whole = archive.read_bytes()
    bad = [whole[: len(whole) // 2], b"", b"<html>404</html>"]
    for name, kind in (
        ("../escape.png", tarfile.REGTYPE),
        ("images/../../up.png", tarfile.REGTYPE),
        ("images/soft.png", tarfile.SYMTYPE),
        ("images/hard.png", tarfile.LNKTYPE),
        ("images/device.png", tarfile.CHRTYPE),
        ("images/pipe.png", tarfile.FIFOTYPE),
    ):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "../../../secret"
        with tarfile.open(archive, "w:gz") as tar:
            tar.addfile(info)
        bad.append(archive.read_bytes())
    before = sorted(Path().rglob("*"))
    for data in bad:
        archive.write_bytes(data)
        assert "images_001.tar.gz: missing, damaged" in prep_refused("nih --download")
        shutil.rmtree(archive.parent / "images", ignore_errors=True)
    assert sorted(Path().rglob("*")) == before


def test_nothing_is_fetched_without_being_asked(tmp_path, monkeypatch):
    asked = []

    def fetch(request, **kwargs):
        asked.append(request)
        raise OSError("no network here")

    monkeypatch.setattr(dp.urllib.request, "urlopen", fetch)
    for name in dp.COMMANDS:
        if name != "demo":
            assert "--raw" in prep_refused(name)
    raw_nih("raw")
    os.remove(tmp_path / "raw" / "images_001" / "images" / NIH_ROWS[0][0])
    assert "complete --raw" in prep_refused("nih --raw raw --out out")
    assert not asked
    assert "no network here" in prep_refused("nih --download --out out") and asked


# ---------------------------------------------------------------- data_prep 7. verify


def test_verify_finds_nothing_in_a_sound_folder_and_prints_its_counts(capsys):
    raw_nih("raw")
    prep("nih --raw raw --out nih --size 48")
    capsys.readouterr()
    assert dp.main(["verify", "nih"]) == 0
    table = {}
    for line in capsys.readouterr().out.splitlines()[1:]:
        table[line[:20].strip()] = [int(count) for count in line[20:].split()]
    assert len(table) == 15 and table["images"][2:] == [2, 6] and sum(table["Hernia"]) == 2


def test_verify_finds_a_changed_byte_and_changed_splits():
    raw_folder("raw", n=40)
    prep("folder --raw raw --csv labels.csv --size 32 --out sound")
    assert dp.main(["verify", "sound"]) == 0

    def flip(data):
        at = 128 + 7 * 32 * 32 + 500
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    for name, change, message in (
        ("images.npy", flip, "not what was prepared, or not in order: ['i007.png']"),
        ("images.npy", lambda data: data + b"x", "not what was prepared"),
        ("labels.csv", lambda text: b"".join(sorted(text.splitlines(True))[::-1]), "not in order"),
        ("labels.csv", lambda text: text.replace(b",test,", b",val,"), "other splits"),
        ("labels.csv", lambda text: text[: text.rstrip().rindex(b"\n") + 1], "39 rows"),
        ("meta.json", lambda text: b"", "Expecting value"),
    ):
        shutil.copytree("sound", "out", dirs_exist_ok=True)
        Path("out", name).write_bytes(change(Path("out", name).read_bytes()))
        assert message in prep_refused("verify out")
    assert "nowhere" in prep_refused("verify nowhere")


def test_verify_finds_a_patient_in_two_splits():
    raw_folder("raw")
    prep("folder --raw raw --csv labels.csv --size 32 --out out")
    table = pd.read_csv("out/labels.csv")
    table.loc[:1, "split"] = ["val", "test"]
    table.to_csv("out/labels.csv", index=False)
    assert "'p0'" in prep_refused("verify out")


def test_verify_finds_one_picture_in_two_splits():
    for k, name in enumerate(("0", "1", "2", "3", "0-again", "1-again")):
        save(phantom(k % 4), f"raw/{name}.png")
    rows = ["0.png,train", "1.png,train", "2.png,val", "3.png,test", "1-again.png,train"]
    args = "folder --raw raw --csv labels.csv --size 64 --out out --overwrite"
    write("raw/labels.csv", "image,split", *rows, "0-again.png,train")
    prep(args)
    assert dp.main(["verify", "out"]) == 0  # within one split
    write("raw/labels.csv", "image,split", *rows, "0-again.png,test")
    prep(args)
    message = "one picture in two splits: 0.png (train), 0-again.png (test)"
    assert message in prep_refused("verify out")


# ---------------------------------------------------------------- data_prep 8. command line


def test_data_commands_that_are_wrong_are_one_line():
    for args, message in (
        ("", "required"),
        ("mimic", "invalid choice"),
        ("demo --sise 3", "--sise"),
        ("demo --size x", "--size"),
        ("demo --size 8", "--size from 16"),
        ("demo --count 0", "--count from 1"),
        ("demo --workers 0", "--workers"),
        ("nih --raw nowhere", "nowhere"),
        ("vinbig --readers most", "invalid choice"),
        ("folder --raw .", "--out outside it"),
        ("folder --raw nowhere", "No such file or directory: 'nowhere'"),
        ("verify", "folder"),
    ):
        assert message in prep_refused(args), args
    assert not os.listdir()


# ---------------------------------------------------------------- data_prep 9. load


LOAD = """
import resource, sys
import data_prep as dp
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert dp.main(sys.argv[1:]) == 0
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024)
"""


def test_a_hundred_thousand_images_are_prepared_within_400_megabytes():
    """The pictures alone, at 28 px and as read from the disk, are 78 MB; the tables the rest."""
    arrays = raw_chestmnist("raw.npz", counts=(70_000, 10_000, 20_000))
    done = python(LOAD, "chestmnist --raw raw.npz --out out --workers 1")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 400
    images = np.load("out/images.npy", mmap_mode="r")
    assert images.shape == (100_000, 28, 28)
    for start, split in zip((0, 70_000, 80_000), dp.SPLITS):
        assert np.array_equal(images[start : start + 5000], arrays[f"{split}_images"][:5000])


# ---------------------------------------------------------------- data_prep 10. real files


@real
def test_real_nih_files_are_prepared_with_right_labels_and_the_official_split():
    raw = XRAYS / "nih_raw"
    prep("nih --raw", raw, "--out out --size 64 --allow-missing")
    images, labels, rejected, _ = prepared("out")
    assert len(labels) == 40 and len(rejected) == 112_080
    given = pd.read_csv(raw / "Data_Entry_2017_v2020.csv", index_col="Image Index")
    test = set((raw / "test_list.txt").read_text().split())
    for k, row in labels.iterrows():
        shown = {f for f in dp.NIH_FINDINGS if row[f]} or {"No Finding"}
        assert shown == set(given.loc[row["image"], "Finding Labels"].split("|"))
        assert int(row["patient"]) == int(row["image"][:8])
        assert (row["split"] == "test") == (row["image"] in test)
        (path,) = raw.rglob(row["image"])
        picture = np.asarray(Image.open(path).convert("L"))
        assert np.array_equal(images[k], dp.resize_xray(picture, 64))
    assert dp.main(["verify", "out"]) == 0


@real
def test_real_tables_of_nih_give_every_published_count():
    listing = dp.list_nih(XRAYS / "nih_raw", allow_missing=True)
    table, test = listing.table, listing.table["split"] == "test"
    assert (len(table), test.sum(), table["patient"].nunique()) == (112_120, 25_596, 30_805)
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


@real
def test_real_tables_of_rsna_give_every_published_count():
    listing = dp.list_rsna(XRAYS / "labels", allow_missing=True)
    assert len(listing.table) == 26_684 and listing.table["Pneumonia"].sum() == 6012
    assert len(listing.boxes) == 9555 and listing.boxes["image"].nunique() == 6012


@real
def test_real_tables_of_siim_give_every_published_count():
    listing = dp.list_siim(XRAYS / "siim_raw", allow_missing=True)
    assert sum(max(1, len(texts)) for texts in listing.masks) == 12_954
    assert len(listing.table) == 12_047 and listing.table["Pneumothorax"].sum() == 2669


@real
def test_real_files_of_siim_equal_an_independent_decoding():
    raw = XRAYS / "siim_raw"
    prep("siim --raw", raw, "--out out --size 1024 --allow-missing")
    images, labels, _, _ = prepared("out")
    masks = np.load("out/masks.npy")
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
def test_real_tables_of_vinbig_give_every_published_count(readers):
    shutil.copy(XRAYS / "labels" / "vinbigdata-train.csv", "train.csv")
    table = dp.list_vinbig(".", readers, allow_missing=True).table
    published = (
        "3067/2346, 186/62, 452/177, 2300/1817, 353/121, 386/152, 613/245, 1322/547, 826/405, "
        "1134/362, 1032/634, 1981/882, 96/58, 1617/1017"
    )
    counts = [int(pair.split("/")[readers == "majority"]) for pair in published.split(", ")]
    assert table[dp.VINBIG_FINDINGS].sum().tolist() == counts and len(table) == 15_000


@real
def test_other_real_dicom_files_read():
    import pydicom

    for path in (XRAYS / "dicom_other").iterdir():
        ds, picture = pydicom.dcmread(path), dp.read_xray(path)
        pixels = ds.pixel_array
        if ds.PhotometricInterpretation == "MONOCHROME1":  # as its tag says
            pixels = 255 - pixels
        assert np.array_equal(picture, pixels) and picture.std() > 20


# ---------------------------------------------------------------- the text


def test_components_can_be_lifted_out():
    text = (HERE / "mlvicx.py").read_text()
    source = {}
    for node in ast.parse(text).body:
        if hasattr(node, "name"):
            source[node.name] = ast.unparse(node)
        elif isinstance(node, ast.Assign):
            source[node.targets[0].id] = ast.unparse(node)
    head = """
import functools, math, torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
"""
    uses = (
        "ContextBottleneck(4)(torch.randn(2, 4, 5, 5))",
        "LocalProjector((4,), 8, hidden=4)([torch.randn(2, 4, 5, 5)])",
        "vicreg_loss(*torch.randn(2, 4, 8))",
        "LARS([nn.Parameter(torch.ones(2, 2))]).step()",
        "Encoder()(torch.randn(2, 3, 32, 32))",
        "MLVICX(embedding_dim=8)(*torch.randn(2, 2, 3, 32, 32))",
        "Segmenter(Encoder(), frozen=True)(torch.randn(2, 3, 32, 32))",
        "RandomViews(8)(torch.ones(2, 9, 9).byte(), torch.Generator())",
        "resize_matrix(torch.zeros(1), torch.ones(1) * 9, 9, 5)",
        "linear_probe(*torch.eye(8).chunk(4), (1.0,))",
        "pooled_dice(torch.ones(1, 4, 4), torch.ones(1, 8, 8).byte())",
        "effective_rank(torch.eye(3))",
    )
    sections = re.split("(?=# -{60,} )", text)
    for number, use in zip((3, 5, 7, 8), uses):  # a whole section, as README.md says
        exec(head + sections[number] + use, {})
    head += "import torchvision, numpy as np\nfrom dataclasses import dataclass"
    for use in uses:
        needed, queue = set(), [use.partition("(")[0]]
        while queue:
            needed.add(queue[-1])
            for needs in re.findall(r"Needs: ([\w, ]+)", source[queue.pop()]):
                queue += needs.split(", ")
        exec("\n".join([head, *(source[name] for name in source if name in needed), use]), {})


RESULTS = HERE / "notebooks" / "results"


def test_the_deviations_are_listed_exactly():
    tags = re.findall("# Deviation: (.+)", (HERE / "mlvicx.py").read_text())
    section = (RESULTS / "RESULTS.md").read_text().split("## Differences from the authors' code")[1]
    listed = re.findall(r"^- \*\*(.+?)\*\*", section, re.M)
    assert sorted(listed) == sorted(tags) and len(tags) >= 5


def test_readme_names_only_tests_that_exist():
    text = (HERE / "README.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) >= 5 and named <= set(globals()) and len(text.split()) <= 1800


def spread(values):
    """Mean ± standard deviation, as the tables give it."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def table_rows(text, title):
    """The cells of the first table after a title: first cell of each row -> the others."""
    lines = text.split(title)[1].split("\n|---")[1].split("\n\n")[0].splitlines()[1:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in rows}


def test_the_tables_of_the_study_are_those_of_its_logs():
    text = (RESULTS / "RESULTS.md").read_text()
    summary = read_json(RESULTS / "nih" / "summary.json")
    section = text.split("## The study")[1].split("\n## ")[0]
    quoted = re.findall(r"^\| .*\d\.\d{3}.*", section, re.M)
    assert len(quoted) > 50 and set(quoted) <= set(experiments.markdown(summary))

    # The summary is that of the units: subsets of the labels averaged, then seeds.
    rows = []
    for unit in read_json(RESULTS / "nih" / "units.json"):
        rows += [row | unit for row in unit.get("rows", [])]
    seeds = pd.DataFrame(rows).groupby([*experiments.CELL, "seed"])["test"].mean()
    found = seeds.groupby(experiments.CELL).agg(list).to_dict()
    tests = [row for row in summary if row["measure"] == "test"]
    index = {tuple(row[name] for name in experiments.CELL): row for row in tests}
    assert set(index) == set(found) and len(found) > 100
    for cell, each in found.items():
        assert np.allclose(index[cell]["each"], each, atol=2e-5), cell
        assert len(each) == 1 or abs(np.std(each, ddof=1) - index[cell]["std"]) < 2e-5


def test_the_other_tables_are_those_of_their_logs():
    text = (RESULTS / "RESULTS.md").read_text()
    # The pilot: test AUROC of three pre-trainings, and fine-tuning from another list.
    pilot = read_json(RESULTS / "nih" / "pilot.json")
    shown = table_rows(text, "## The pilot")
    columns = [("nih@1", 0), ("nih@1", 15), ("rsna@1", 0), ("lungs shenzhen->montgomery@0.3", 0)]
    for name, cells in shown.items():
        runs = [r["tasks"] for r in pilot["runs"] if (r["stage"], r["method"]) == ("final", name)]
        rows = [r for r in pilot["final_validation_all_labels"] if r["method"] == name]
        tuned = [row["rsna_finetuned_test"] for row in rows]
        expected = [spread([run[task]["test"][k] for run in runs]) for task, k in columns if runs]
        assert [cell for cell in cells if cell] == [*expected, spread(tuned)], name
    assert len(shown) == 7
    # The phantoms.
    log = pd.read_csv(RESULTS / "variants.csv")
    shown = table_rows(text, "## Phantoms")
    for name, (flags, *cells) in shown.items():
        runs = log[log["variant"] == name]
        assert flags.strip("`") == "".join(runs["flags"].fillna("").unique())
        for share, cell in zip((0.1, 1), cells, strict=True):
            assert cell == spread(runs[runs["labels"] == share]["mean"]), name
    assert len(shown) == 14
    # The cost on a GPU.
    steps = read_json(RESULTS / "logs" / "bench_h200.json")["training"]
    shown = table_rows(text, "## Cost on a GPU")
    for name, cells in shown.items():
        row = steps[name]
        numbers = [f"{row['ms']:.1f}", f"{row['images/s']:,.0f}"]
        assert cells == [*numbers, f"{row['hours of 300 epochs']:.1f}", f"{row['peak GB']:.1f}"]
    assert len(shown) > 10


def test_average_precision_of_ranks_is_scikit_learns():
    rng = np.random.default_rng(0)
    order, y = rng.integers(0, 40, 60), rng.integers(0, 2, 60)  # some are equal
    weights = np.stack([np.ones(60), rng.integers(0, 3, 60)])
    found = experiments.average_precision(order, y, weights)
    for value, row in zip(found, weights, strict=True):
        expected = average_precision_score(y, order, sample_weight=row)
        assert math.isclose(value, expected)


def test_the_results_of_the_readme_are_those_of_the_study():
    names = {  # method in the log -> row
        "16 x 16 pixels": "16x16 pixels, ridge regression",
        "random": "random weights",
        "no blocks": "MLVICX, no blocks",
        "inline": "MLVICX, inline",
        "side": "MLVICX, side (default)",
    }
    cells = [("nih128", "frozen", share) for share in (0.01, 0.1, 0.3, 1)]
    cells += [("nih128", "finetune", share) for share in (0.1, 1)]
    cells += [("rsna256", "frozen", share) for share in (0.1, 1)]
    expected = {}
    for row in read_json(RESULTS / "nih" / "summary.json"):
        if (row["features"], row["measure"]) == ("h", "test"):
            values = expected.setdefault(names.get(row["method"], row["method"]), {})
            text = f"{np.mean(row['each']):.3f}"
            if len(row["each"]) > 1:
                text += f"±{np.std(row['each'], ddof=1):.3f}"
            values[row["set"], row["mode"], row["labels"]] = text
    lines = (HERE / "README.md").read_text().splitlines()
    for name in (*names.values(), "VICReg", "VICReg, last BatchNorm", "from scratch"):
        line = next(x for x in lines if x.startswith(f"{name} |"))
        assert line.split(" | ")[1:] == [expected[name].get(cell, "–") for cell in cells], name


def test_the_findings_of_the_readme_are_the_declared_comparisons():
    text = " ".join((HERE / "README.md").read_text().split())
    found = {}
    for row in read_json(RESULTS / "nih" / "summary.json"):
        if "paired difference" in row["measure"]:
            numbers = "{:+.3f} [{:+.3f}, {:+.3f}]".format(row["mean"], *row["ci95"])
            found.setdefault(row["method"], []).append(numbers)
    for line, method in (
        ("over random weights: ", "side − random"),
        ("over training from scratch: ", "side − from scratch"),
        ("as MLVICX's do**: ", "side − VICReg, last BatchNorm"),
        ("side over none: ", "side − no blocks"),
        ("side over inline: ", "side − inline"),
    ):
        assert len(found[method]) == 4 and line + " and ".join(found[method][:2]) in text
    assert found["side − inline"][3] in text  # without Hernia, all labels


def test_notebooks_02_04_and_05_have_one_pretraining():
    """What notebook 02 shows is what `notebook_run` does for whoever starts at 04 or 05."""
    code = inspect.getsource(experiments.notebook_run)
    cells = read_json(HERE / "notebooks" / "02_the_method.ipynb")["cells"]
    (shown,) = ["".join(c["source"]) for c in cells if "m.MLVICX(" in "".join(c["source"])]
    calls = re.compile(r"(?:MLVICX|RandomViews|LARS|schedule|seed|:\d+\].split|range)\(.*?\)")
    assert calls.findall(code) == calls.findall(shown) and len(calls.findall(code)) == 7


def test_the_speeds_of_the_readme_are_those_of_the_logs():
    text = (HERE / "README.md").read_text()
    log = (RESULTS / "logs" / "first_run.txt").read_text().splitlines()
    means = [line for line in log if line.startswith("mean AUROC")]
    assert len(means) == 2 and "```\n" + "\n".join(means) + "\n```" in text
    speeds = [int(n) for n in re.findall(r"(\d+) images/s", "".join(log))]
    minutes = 78_468 / np.mean(speeds) / 60  # an epoch of ChestMNIST
    assert f"an epoch takes {minutes:.0f} minutes" in " ".join(text.split())
    bench = read_json(RESULTS / "logs" / "bench_h200.json")["training"]
    compiled = read_json(RESULTS / "logs" / "steps_h200.json")["training"]
    rows = [compiled["batch 256, graph, blocks compiled"]]
    rows += [bench[f"batch {batch}, graph"] for batch in (256, 64)]
    section = " ".join(text.split("## Quick start")[1].split("\n## ")[0].split())
    for row in rows:
        assert f"{row['images/s']:,.0f} images/s" in section
        assert f"{row['hours of 300 epochs']:.1f} h" in section
    whole = bench["batch 256, pretrain"]["images/s, both epochs"]
    assert f"loading: {whole:,.0f} images/s" in section
    assert f"about {bench['batch 256, eager']['peak GB']:.0f} GB" in section

    png = read_json(RESULTS / "prepare_speed.json")["1600 images"]["seconds"]["two workers"]
    dicom = read_json(RESULTS / "logs" / "dicom_speed.json")  # milliseconds
    for name, seconds in (
        ("NIH", png / 1600),
        ("RSNA", dicom["rsna"]["two workers"] / 1000),
        ("SIIM", dicom["siim"]["two workers"] / 1000),
    ):
        line = next(x for x in text.splitlines() if x.startswith(f"[{name}]("))
        images = int(re.search(r"\), ([\d,]+) ", line).group(1).replace(",", ""))
        size = images * 256**2 * (1 + (name == "SIIM")) / 1e9  # SIIM has masks
        assert line.endswith(f"{size:.2f} GB | {images * seconds / 60:.0f} min")


def test_the_flags_of_the_readme_have_their_defaults():
    text, preset = (HERE / "README.md").read_text(), m.PRESETS["pretrain", "demo"]
    rows = re.findall(r"^`--([\w-]+)`.* \| (.+) \| (.+) \| (.+)$", text, re.M)
    for flag, _, default, demo in rows:
        name = flag.replace("-", "_")
        value = getattr(m.PretrainConfig(), name)
        values = {"batch_size": "256 on CUDA, else 64"}.get(name, value), preset.get(name, value)
        shown = [str(v).removesuffix(".0").replace("False", "no") for v in values]
        assert [default, demo] == shown, flag
    assert len(rows) == 10


def readme_blocks(language):
    """The fenced blocks of README.md in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (HERE / "README.md").read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def readme_folders(tmp_path_factory):
    """Small raw folders in the real layouts, where the README's commands look for them."""
    root = tmp_path_factory.mktemp("readme")
    labels, rows = ("Cardiomegaly|Effusion", "No Finding", "Nodule", "Infiltration"), []
    for k in range(80):
        split = "test" if k >= 68 else "train"
        rows.append((f"{k + 1:08d}_000.png", labels[k % 4], split))
    with contextlib.chdir(root):
        raw_nih("raw/nih", rows=rows)
        raw_vinbig("raw/vinbig", [f"-{k}" for k in range(16)])
        raw_rsna("raw/rsna", n=40)
        raw_siim("raw/siim", n=40)
        raw_folder("raw/mine", n=80)
        raw_chestmnist("chest.npz", 64)
        prep("chestmnist --raw chest.npz --out data/chestmnist --size 64")
        prep("demo --count 64 --size 64")
    return root


def test_every_python_block_of_the_readme_runs(capsys):
    blocks = readme_blocks("python")
    for block in blocks:
        exec(block, {})
    assert blocks and "loss" in capsys.readouterr().out


def readme_commands():
    """The lines that a shell would run, loops unrolled."""
    stubs = "".join(f'{name}() {{ echo {name} "$@"; }}\n' for name in ("pip", "python", "torchrun"))
    script = stubs + "".join(readme_blocks("bash"))
    return subprocess.check_output(["bash", "-eu", "-c", script], text=True).splitlines()


def test_every_command_of_the_readme_runs(readme_folders, monkeypatch):
    monkeypatch.chdir(readme_folders)
    exempt = re.compile("^pip install|--download|^python -m pytest|^python notebooks/")
    lines = [line for line in readme_commands() if not exempt.search(line)]
    assert len(lines) >= 20 and all(re.match("(python|torchrun) ", line) for line in lines)
    small = {
        "pretrain": "--batch-size 16 --embedding-dim 8 --epochs 1 --size 32",
        "classify": "--batch-size 8 --epochs 1 --size 32",
        "segment": "--batch-size 8 --epochs 1 --size 32",
    }
    for line in lines:
        # Of few images, and without a compiler, which --compile needs on a CPU.
        start, *rest = line.replace("0.01,0.1,", "").replace("--compile", "").split()
        if start == "torchrun":
            line = line.replace("--nproc-per-node 8", "--nproc-per-node 2")
            line = line.replace("mlvicx.py", str(HERE / "mlvicx.py"))
            call = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            call += words([line, small["pretrain"]])[1:]
            assert subprocess.run(call, capture_output=True, timeout=600).returncode == 0, line
            continue
        program, name, *_ = rest
        args = words([*rest[1:], small.get(name, "")])
        assert {"mlvicx.py": m, "data_prep.py": dp}[program].main(args) == 0, line


def test_the_bench_measures_every_form_and_part():
    words = "--device cpu --size 64 --batch-size 2 --embedding-dim 8 --repeats 1"
    bench.main([*words.split(), "--out", "runs/bench.json"])
    found = read_json("runs/bench.json")
    assert list(found["steps"]) == list(bench.FORMS)
    assert all(row["seconds"] > 0 for row in found["steps"].values())
    assert found["parameters"]["backbone"] == 11176512
    assert set(found["parts"]) >= {"read", "views", "encoder", "context-bottlenecks", "LARS"}
    assert min(found["ratios"].values()) > 0 and min(found["multiply_adds"].values()) > 0
    counts = found["operators"]
    assert 0 < counts["views"] < counts["training step"] and counts["blocking"] == []


def test_the_bench_measures_whole_steps_and_pretrain(monkeypatch):
    pairs = bench.plan(4, 2, cuda=False)
    assert len(set(pairs)) == len(pairs) and set(pairs) < set(bench.plan(4, 2, cuda=True))
    pairs.remove((2, bench.LITERAL))  # which takes long
    monkeypatch.setattr(bench, "plan", lambda *_: pairs)
    out, given = Path("bench.json"), {"size": 32, "embedding_dim": 8, "images": 20}
    config = SimpleNamespace(batches=(4, 2), limit=math.inf, out=str(out), **given)
    found = bench.training(config, torch.device("cpu"))["training"]
    assert json.loads(out.read_text())["training"] == found
    assert list(found) == [f"batch {batch}, {name}" for batch, name in pairs]
    assert all(min(row.values()) > 0 for row in found.values())


@pytest.mark.parametrize("name, most, a_line", [("mlvicx", 16580, 11), ("data_prep", 12000, 12)])
def test_the_code_stays_small(name, most, a_line):
    """Python's own tokens, without comments and docstrings; no function is longer than a page."""
    text = (HERE / f"{name}.py").read_text()
    found = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.string.strip()]
    words = [t for t in found if t.string[0] != "#" and t.line.lstrip()[:3] != '"""']
    lines = {line for t in words for line in range(t.start[0], t.end[0] + 1)}
    assert len(words) <= most and len(words) <= a_line * len(lines)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
