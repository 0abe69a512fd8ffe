"""Tests of mlvicx.py and data_prep.py, in the order of their sections.

    python -m pytest -q test_mlvicx.py

Each number is compared with a hand-computed value, a slow oracle written here, torchvision or
scikit-learn. Real X-rays are used where the variable MLVICX_XRAYS names a folder of them.
"""

import ast
import contextlib
import csv
import gzip
import hashlib
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
import time
import tokenize
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

import data_prep as dp
import mlvicx as m

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "notebooks"))
import bench
import experiments

torch.set_num_threads(1)  # the models here are too small for two


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The same for the processes that are started here; the notebooks have every thread again."""
    # A shell's background job ignores Ctrl-C, and so would every process that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def relative(a, b):
    """Largest difference of two tensors as a share of the size of the second."""
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


def write_set(folder, n=48, size=48, seed=0, name=None, findings=("A", "B"), **columns):
    """A prepared set of smooth noise: brightness carries finding A, texture finding B."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (n, len(findings)))
    coarse = torch.from_numpy(rng.random((n, 1, 6, 6)))
    x = F.interpolate(coarse, size=(size, size), mode="bicubic")[:, 0].numpy() * 120
    x += 60 * labels[:, :1, None] + 30 * labels[:, 1:2, None] * rng.standard_normal((n, size, size))
    images = x.clip(0, 255).astype(np.uint8)
    np.save(folder / "images.npy", images)
    masks = (images > 150).astype(np.uint8)
    np.save(folder / "masks.npy", masks)
    patient = np.arange(n) // 2
    split = np.array(["train", "train", "train", "val", "test"])[patient % 5]
    table = pd.DataFrame({"image": [f"i{i:04d}" for i in range(n)], "patient": patient})
    table["split"] = split
    table[list(findings)] = labels
    table["has_mask"] = 1
    table.assign(**columns).to_csv(folder / "labels.csv", index=False)
    meta = {"format": 1, "name": name or folder.name, "size": size, "images": n}
    meta |= {"findings": list(findings), "images_sha256": f"{seed}-{n}-{size}"}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


SMALL = ["--size", "32", "--embedding-dim", "16", "--batch-size", "8", "--epochs", "2"]


@pytest.fixture()
def place(tmp_path, monkeypatch):
    """A working folder that holds the prepared set data/toy."""
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "data" / "toy")
    return tmp_path


def command(*args, timeout=300, **kwargs):
    """Runs `python mlvicx.py ...` in a process of its own."""
    call = [sys.executable, str(HERE / "mlvicx.py"), *map(str, args)]
    return subprocess.run(call, capture_output=True, text=True, timeout=timeout, **kwargs)


def refused(capsys, *args):
    """The one line with which a command is refused."""
    assert m.main([*map(str, args)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert "Traceback" not in "".join(lines)
    return lines[-1]


# ---------------------------------------------------------------- 2. configuration


def test_defaults_are_the_authors_recipe_and_a_preset_yields_to_flags():
    config = m.make_config("pretrain", m.PretrainConfig, {"data": "nih"})
    assert (config.size, config.batch_size, config.lr, config.epochs) == (224, 0, 0.2, 300)
    assert (config.embedding_dim, config.final_bn, config.context) == (4096, True, "side")
    assert (config.sim_coeff, config.std_coeff, config.cov_coeff) == (25, 25, 1)
    assert (config.local_weight, config.warmup_epochs, config.init) == (1, 2, "random")
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
def test_a_number_without_sense_is_refused_by_name(command, capsys):
    assert command.split()[1] in refused(capsys, *command.split())


def test_every_flag_is_in_the_help(capsys):
    for name, (cls, _) in m.COMMANDS.items():
        with pytest.raises(SystemExit):
            m.main([name, "--help"])
        shown = capsys.readouterr().out
        for f in cls.__dataclass_fields__:
            assert f.replace("_", "-") in shown


# ---------------------------------------------------------------- 3. context-bottleneck


def slow_bottleneck(x, block):
    """The definition with loops: one image, one channel, one pixel at a time."""
    out = torch.empty_like(x)
    w1, w2 = block.channel.reduce.weight[:, :, 0, 0], block.channel.expand.weight[:, :, 0, 0]
    kernel = block.spatial.conv.weight[0]
    for b, image in enumerate(x):
        pools = [
            torch.stack([c.sum() / c.numel() for c in image]),
            torch.stack([c.max() for c in image]),
        ]
        gate = sum(w2 @ (w1 @ pool).clamp(min=0) for pool in pools)
        scaled = torch.stack([c / (1 + math.exp(-g)) for c, g in zip(image, gate, strict=True)])
        stats = F.pad(torch.stack([scaled.mean(0), scaled.max(0).values]), (3, 3, 3, 3))
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                score = (stats[:, i : i + 7, j : j + 7] * kernel).sum()
                out[b, :, i, j] = scaled[:, i, j] / (1 + math.exp(-score))
    return out


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_context_bottleneck_is_channel_then_spatial_attention(memory):
    torch.manual_seed(0)
    block = m.ContextBottleneck(6).double()
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    y = block(x.contiguous(memory_format=memory))
    assert torch.allclose(y, slow_bottleneck(x, block.requires_grad_(False)), atol=1e-12)


def test_attention_steps_can_be_taken_alone():
    names = {a: set(m.ContextBottleneck(8, a).state_dict()) for a in ("channel", "spatial", "both")}
    assert names["channel"] == {"channel.reduce.weight", "channel.expand.weight"}
    assert names["spatial"] == {"spatial.conv.weight"}
    assert names["both"] == names["channel"] | names["spatial"]
    with pytest.raises(ValueError, match="attention"):
        m.ContextBottleneck(8, "neither")


# ---------------------------------------------------------------- 4. encoder


def test_maps_representation_and_parameter_count():
    model = m.MLVICX()
    with torch.no_grad():
        h, maps = model.encoder(torch.randn(2, 1, 224, 224))
    assert h.shape == (2, 512)
    expected = [(64, 112), (64, 56), (128, 28), (256, 14), (512, 7)]
    assert [tuple(x.shape[1:3]) for x in maps] == expected
    inline = m.Encoder(context="inline")
    with torch.no_grad():
        pooled, refined = inline(torch.randn(2, 3, 64, 64))
    assert torch.equal(pooled, refined[-1].mean((2, 3)))
    count = lambda part: sum(p.numel() for p in part.parameters()) / 1e6  # noqa: E731
    assert round(count(model), 1) == 114.9
    assert round(count(model.encoder.context), 2) == 0.35
    assert round(count(model.global_head), 1) == 35.7
    assert round(count(model.local_head.mlp), 1) == 67.1
    assert round(count(model.local_head.convs), 2) == 0.53


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
        before = encoder(x)[0]
        with torch.no_grad():
            encoder.context["1"].spatial.conv.weight.add_(0.5)
        assert (not torch.equal(before, encoder(x)[0])) == feeds


def test_side_has_blocks_only_where_they_are_trained():
    assert set(m.Encoder(context="side", levels=(2, 5)).context) == {"2", "5"}
    assert set(m.Encoder(context="inline", levels=(2, 5)).context) == set("12345")


def test_an_image_that_the_network_cannot_take_is_refused():
    for shape in ((2, 2, 64, 64), (2, 3, 16, 64), (3, 64, 64)):
        with pytest.raises(ValueError, match="expected .* got"):
            m.Encoder()(torch.zeros(shape))


# ---------------------------------------------------------------- 5. projectors


@pytest.mark.parametrize("size", [64, 96, 112, 224])
@pytest.mark.parametrize("batch", [3, 20])  # below and above the embedding dimension
def test_fast_and_literal_forms_agree_in_loss_and_every_gradient(size, batch):
    torch.manual_seed(size)
    dim = 8
    maps = [
        torch.randn(batch, c, -(-size // s), -(-size // s), dtype=torch.float64)
        for c, s in ((4, 2), (4, 4), (6, 8), (8, 16), (10, 32))
    ]
    head = m.LocalProjector((4, 4, 6, 8, 10), dim, hidden=5).double()
    results = []
    for form in (m.aggregate, m.aggregate_literal):
        head.zero_grad()
        leaves = [x.clone().requires_grad_() for x in maps]
        noisy = [x + 0.1 * torch.sin(9 * x) for x in leaves]
        z1, z2 = (head.mlp(form(x, head.convs).flatten(1)) for x in (leaves, noisy))
        if form is m.aggregate:
            loss = m.vicreg_loss(z1, z2)[0]
        else:
            loss = m.vicreg_loss(z1, z2, covariance=m.covariance_literal)[0]
        loss.backward()
        grads = {k: p.grad.clone() for k, p in head.named_parameters()}
        results.append((loss.detach(), grads | {f"map{i}": x.grad for i, x in enumerate(leaves)}))
    (loss, grads), (expected, reference) = results
    assert relative(loss, expected) < 1e-10
    scale = max(float(g.norm()) for g in reference.values())
    for name, g in reference.items():
        # A bias that feeds a BatchNorm, or shifts both views alike, has a gradient of zero.
        zero = re.fullmatch(r"convs\.\d\.bias|mlp\.(0|3|6|7)\.bias", name)
        difference = (grads[name] - g).norm() / (scale if zero else g.norm())
        assert difference < 1e-10, name


@pytest.mark.parametrize("side", [112, 56, 28, 14, 7, 3, 2, 1, 64, 100])
def test_pool_matrix_is_resize_then_pool(side):
    x = torch.randn(1, 1, side, side + 1, dtype=torch.float64)
    p = m.pool_matrix(side, side + 1, x.dtype, x.device)
    resized = F.interpolate(x, size=(64, 64), mode="bilinear", align_corners=False)
    assert torch.allclose(p @ x.flatten(), F.avg_pool2d(resized, 16).flatten(), atol=1e-12)
    assert torch.allclose(p.sum(1), torch.ones(16, dtype=torch.float64))


def test_aggregate_agrees_in_both_memory_layouts():
    maps = [torch.randn(2, 4, s, s) for s in (16, 8)]
    convs = [torch.nn.Conv2d(4, 3, 1) for _ in maps]
    plain = m.aggregate_literal(maps, convs)
    last = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    assert torch.allclose(m.aggregate(maps, convs), plain, atol=1e-5)
    assert torch.allclose(m.aggregate(last, convs), plain, atol=1e-5)


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
    before = {id(p) for p in model.parameters()}
    optimizer = m.LARS(model.parameters(), lr=1.0, trust=1.0)
    old = {k: p.detach().clone() for k, p in model.named_parameters()}
    views = torch.randn(2, 4, 3, 64, 64)
    for _ in range(2):
        optimizer.zero_grad()
        m.mlvicx_loss(*model(*views))[0].backward()
        optimizer.step()
    assert {id(p) for p in model.parameters()} == before
    assert all(p.grad is not None for p in model.parameters())
    same = [k for k, p in model.named_parameters() if torch.equal(p, old[k]) and p.ndim > 1]
    assert same == []
    again = m.MLVICX(embedding_dim=8)
    again.load_state_dict(model.state_dict(), strict=True)


# ---------------------------------------------------------------- 6. model


def test_views_pass_one_after_the_other_so_batchnorm_sees_one_view():
    torch.manual_seed(0)
    model = m.MLVICX(embedding_dim=8)
    view1, view2 = torch.randn(2, 4, 3, 64, 64)
    (g1, g2), (l1, l2) = model(view1, view2)
    assert g1.shape == l1.shape == (4, 8)
    model.eval()
    model.train()
    assert torch.allclose(model.global_head(model.encoder(view2)[0]), g2, atol=1e-5)
    assert torch.allclose(model.local_head(model.encoder(view1)[1]), l1, atol=1e-5)


def test_vicreg_is_the_model_without_its_additions():
    model = m.MLVICX(context="none", final_bn=False, embedding_dim=8, local=False)
    names = {k.split(".")[0] for k in model.state_dict()}
    assert names == {"encoder", "global_head"}
    z, local = model(*torch.randn(2, 4, 3, 64, 64))
    assert local is None
    total, log = m.mlvicx_loss(z, None)
    assert torch.allclose(total, m.vicreg_loss(*z)[0]) and "loss_local" not in log
    with pytest.raises(ValueError, match="side"):
        m.MLVICX(context="side", local=False)


def test_levels_choose_the_maps_of_the_local_head():
    model = m.MLVICX(levels=(2, 4), embedding_dim=8)
    assert [c.in_channels for c in model.local_head.convs] == [64, 256]
    assert m.parse_numbers("4,2") == (4, 2)


# ---------------------------------------------------------------- 7. losses


def test_losses_by_hand():
    z1 = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    z2 = torch.tensor([[1.0, 0.0], [2.0, 2.0]])
    assert m.invariance_loss(z1, z2) == (1 + 0 + 0 + 4) / 4
    # Standard deviations sqrt(2) and sqrt(8): no hinge; of z2 sqrt(0.5) and sqrt(2).
    assert m.variance_loss(z1) == 0
    assert m.variance_loss(z2).item() == pytest.approx((1 - math.sqrt(0.5001)) / 2, abs=1e-6)
    # Covariance of z1: 1 * 2 + 1 * 2 = 4, squared, twice, over D = 2.
    assert m.covariance_loss(z1).item() == pytest.approx(16, rel=1e-6)
    total, parts = m.vicreg_loss(z1, z2, 2, 3, 5)
    expected = 2 * 1.25 + 3 * parts["variance"] + 5 * parts["covariance"]
    assert total.item() == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("shape", [(5, 30), (30, 5), (7, 7), (2, 3)])
def test_covariance_equals_its_definition_with_gradient(shape):
    z = torch.randn(*shape, dtype=torch.float64)
    values = []
    for form in (m.covariance_loss, m.covariance_literal):
        leaf = z.clone().requires_grad_()
        value = form(leaf)
        value.backward()
        values.append((value.detach(), leaf.grad))
    assert relative(values[0][0], values[1][0]) < 1e-10
    assert relative(values[0][1], values[1][1]) < 1e-10
    loop, zc = 0.0, z - z.mean(0)
    for i in range(shape[1]):
        for j in range(shape[1]):
            loop += (i != j) * (float(zc[:, i] @ zc[:, j]) / (shape[0] - 1)) ** 2
    assert float(values[0][0]) == pytest.approx(loop / shape[1], rel=1e-10)


def test_mlvicx_loss_adds_both_levels_and_logs_every_part():
    z = torch.randn(4, 6, 5)
    total, log = m.mlvicx_loss((z[0], z[1]), (z[2], z[3]), local_weight=0.5, cov_coeff=2.0)
    one = m.vicreg_loss(z[0], z[1], cov_coeff=2.0)[0]
    two = m.vicreg_loss(z[2], z[3], cov_coeff=2.0)[0]
    assert torch.allclose(total, one + 0.5 * two)
    parts = [
        f"{a}_{b}" for a in ("global", "local") for b in ("invariance", "variance", "covariance")
    ]
    assert set(log) == {"loss", "loss_global", "loss_local", *parts}


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
    exact = m.covariance_literal(large.double())
    assert relative(m.covariance_loss(large).double(), exact) < 1e-5


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
    expected = [(p.detach().clone(), torch.zeros_like(p)) for p in params]
    for _ in range(4):
        grads = [torch.randn_like(p) for p in params]
        grads[0].zero_()
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        both = zip(expected, grads, strict=True)
        expected = [slow_lars(p, g, b, 0.3, 0.1, 0.9, 0.02) for (p, b), g in both]
    for p, (q, _) in zip(params, expected, strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=0)


def test_lars_keeps_the_settings_of_its_groups_and_calls_the_closure():
    """A group's own weight decay, trust in the state, a learning rate that is a tensor."""
    weights = [torch.randn(3, 2) for _ in range(2)]
    found = []
    for lr in (0.3, torch.tensor(0.3)):
        params = [w.clone().requires_grad_() for w in weights]
        groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.5, "trust": 0.1}]
        optimizer = m.LARS(groups, lr=lr, weight_decay=0.0, trust=0.02)

        def closure(optimizer=optimizer, params=params):
            optimizer.zero_grad()
            loss = sum(p.square().sum() for p in params)
            loss.backward()
            return loss

        loss = sum(w.square().sum() for w in weights)
        assert torch.allclose(optimizer.step(closure), loss)
        for p, w, decay, trust in zip(params, weights, (0.0, 0.5), (0.02, 0.1), strict=True):
            expected, _ = slow_lars(w, 2 * w, 0 * w, 0.3, decay, 0.9, trust)
            assert torch.allclose(p, expected, rtol=1e-6)
        for group in optimizer.param_groups:  # as the training step sets it
            group["lr"] = lr * 0
        before = [p.clone() for p in params]
        optimizer.step(closure)
        assert all(map(torch.equal, params, before))  # a changed rate changes the next step
        saved = optimizer.state_dict()["param_groups"]
        assert [group["trust"] for group in saved] == [0.02, 0.1]
        found.append(params)
    assert all(map(torch.equal, *found))


def test_cosine_schedule_warms_up_and_ends_at_exactly_the_floor():
    rates = [m.cosine_schedule(i, 100, 10, 0.5) for i in range(100)]
    assert rates[0] == 0.05 and rates[9] == 0.5 and rates[10] == 0.5
    assert rates[-1] == 0.5 * 0.001
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert m.cosine_schedule(54.5, 100, 10, 1.0, floor=0) == pytest.approx(0.5)
    assert m.cosine_schedule(0, 1, 0, 1.0) == 0.001
    for warmup in (0.4, 0.5, 1.5, 2.5, 9.9):  # never above the base
        assert max(m.cosine_schedule(i, 100, warmup, 1.0) for i in range(100)) == 1.0
    short = [m.cosine_schedule(i, 6, 10, 1.0) for i in range(6)]  # a warm-up longer than the run
    assert short[2] == 1.0 and short[-1] == 0.001


# ---------------------------------------------------------------- 9. data and views


def test_generator_is_a_function_of_its_keys():
    draw = lambda *keys: torch.rand(3, generator=m.generator(*keys))  # noqa: E731
    assert torch.equal(draw(0, "views", 7), draw(0, "views", 7))
    assert not torch.equal(draw(0, "views", 7), draw(0, "views", 8))
    assert not torch.equal(draw(0, "views", 7), draw(1, "views", 7))


def test_prepared_data_reads_what_was_written(place):
    data = m.PreparedData("toy")
    assert data.images.shape == (48, 48, 48) and data.images.dtype == torch.uint8
    assert data.labels.shape == (48, 2) and data.findings == ["A", "B"]
    assert data.masks.shape == data.images.shape and data.has_mask.all()
    sizes = [len(data.indices(s)) for s in ("train", "val", "test")]
    assert sum(sizes) == 48 and min(sizes) > 0
    assert torch.equal(data.indices("train", "val", "test"), torch.arange(48))


def test_unprepared_and_half_prepared_data_are_refused(place, capsys):
    assert "none is missing" in refused(capsys, "pretrain", "--data", "none")
    assert "toy" in refused(capsys, "pretrain", "--data", "none")
    (place / "data" / "empty").mkdir()
    assert "meta.json" in refused(capsys, "pretrain", "--data", "empty")
    half = write_set(place / "data" / "half")
    np.save(half / "images.npy", np.zeros((7, 48, 48), np.uint8))
    assert "[7, 48]" in refused(capsys, "pretrain", "--data", "half")
    (half / "labels.csv").write_text("image,patient\n")
    assert "prepare" in refused(capsys, "pretrain", "--data", "half")


def test_a_patient_in_two_splits_is_refused(place, capsys):
    write_set(place / "data" / "leak", patient=np.arange(48) % 7)
    assert "patient" in refused(capsys, "pretrain", "--data", "leak")


def test_ids_that_look_like_nothing_are_text_and_blank_labels_unknown(place):
    table = pd.read_csv("data/toy/labels.csv", dtype=str)
    table["patient"] = table["patient"].replace({"0": "NA", "1": "None", "2": "nan"})
    table.loc[1, ["image", "A"]] = ["null", ""]
    table.to_csv("data/toy/labels.csv", index=False)
    data = m.PreparedData("toy")
    assert data.patient[:6].tolist() == ["NA", "NA", "None", "None", "nan", "nan"]
    assert data.names[1] == "null" and data.labels.isnan().nonzero().tolist() == [[1, 0]]
    assert torch.equal(m.label_subset(data, 1.0), data.indices("train"))


def test_pooled_sets_are_read_one_after_another(place, capsys):
    sets = [m.PreparedData(p) for p in ("toy", write_set(place / "data" / "more", n=20, seed=1))]
    rows = torch.tensor([0, 50, 47, 67])
    expected = [sets[0].images[0], sets[1].images[2], sets[0].images[47], sets[1].images[19]]
    assert torch.equal(m.gather_images(sets, rows), torch.stack(expected))
    write_set(place / "data" / "large", size=64)
    assert "size" in refused(capsys, "pretrain", "--data", "toy,large")


def test_prefetch_keeps_order_and_passes_errors_on():
    assert list(m.prefetch(lambda i: i * i, range(7))) == [i * i for i in range(7)]
    with pytest.raises(ZeroDivisionError):
        list(m.prefetch(lambda i: 1 / i, [1, 0]))


@pytest.mark.parametrize("source,size", [(256, 224), (128, 64), (64, 64), (48, 96), (256, 37)])
def test_resize_matrix_is_torchvisions_antialiased_crop_resize(source, size):
    x = torch.rand(1, source, source, generator=m.generator("crop"))
    rng = np.random.default_rng(0)
    for _ in range(12):
        height, width = rng.integers(2, source + 1, 2).tolist()
        top = int(rng.integers(0, source - height + 1))
        left = int(rng.integers(0, source - width + 1))
        crop = [torch.tensor([float(v)]) for v in (top, height, left, width)]
        rows = m.resize_matrix(crop[0], crop[1], source, size)
        cols = m.resize_matrix(crop[2], crop[3], source, size, flip=torch.tensor([True]))
        mode = TF.InterpolationMode.BICUBIC
        box = (top, left, height, width)
        expected = TF.resized_crop(x, *box, [size, size], interpolation=mode, antialias=True)
        assert (rows @ x @ cols.mT - expected.flip(2)).abs().max() < 1e-5


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


@pytest.mark.parametrize("rotation", [0.0, 25.0])
def test_views_are_torchvisions_with_the_same_parameters(rotation):
    images = (F.interpolate(torch.rand(16, 1, 12, 12), size=(96, 96), mode="bicubic") * 255)[:, 0]
    images = images.clamp(0, 255).byte()
    views = m.RandomViews(64, rotation=rotation, solarize=0.5)
    params = views.draw(16, 96, m.generator("same"))
    assert params["blurred"][0].all() and params["solarized"][1].any()
    for view in (0, 1):
        p = {k: v[view] for k, v in params.items()}
        rendered = views.render(images, p)
        for i, image in enumerate(images):
            one = {k: v[i].item() for k, v in p.items()}
            difference = (rendered[i] - one_image_at_a_time(image, one, 64)).abs()
            # Solarize jumps at its threshold: a pixel within 1e-5 of it may fall on either side.
            close = difference < 2e-5
            assert close.float().mean() > (0.999 if one["solarized"] else 0.99999)


def test_view_parameters_follow_the_recipe():
    p = m.RandomViews(224).draw(4000, 256, m.generator("law"))
    share = p["height"] * p["width"] / 256**2
    assert 0.075 < share.min() and share.max() <= 1.0
    assert ((p["top"] + p["height"]) <= 256).all() and (p["top"] >= 0).all()
    ratio = p["width"] / p["height"]
    assert 0.7 < ratio.min() and ratio.max() < 1.43
    rate = lambda name: [round(float(v), 1) for v in p[name].float().mean(1)]  # noqa: E731
    assert rate("flip") == [0.5, 0.5]
    assert rate("blurred") == [1.0, 0.1]
    assert rate("solarized") == [0.0, 0.2]
    changed = (p["brightness"] != 1).float().mean()
    assert abs(changed - 0.8) < 0.02 and abs(p["brightness"] - 1).max() <= 0.4
    assert 0.1 <= p["sigma"].min() and p["sigma"].max() <= 2.0


def test_each_augmentation_can_be_removed():
    images = torch.randint(0, 256, (6, 64, 64), dtype=torch.uint8)
    nothing = dict(crop_min=1, flip=0, jitter=0, blur=0, solarize=0)
    view1, view2 = m.RandomViews(64, **nothing)(images, m.generator(0))
    plain = m.normalise(images.float() / 255)
    assert torch.allclose(view1, plain, atol=1e-5) and torch.allclose(view2, plain, atol=1e-5)
    strong = dict(crop_min=0.1, flip=1, jitter=0.4, blur=2.0, solarize=1, rotation=30)
    for name, value in strong.items():
        _, changed = m.RandomViews(64, **(nothing | {name: value}))(images, m.generator(1))
        if name == "blur":
            changed, _ = m.RandomViews(64, **(nothing | {name: value}))(images, m.generator(1))
        assert (changed - plain).abs().max() > 0.1, name


def test_identical_views_are_identical_and_others_are_not():
    images = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    same = m.RandomViews(32, identical_views=True)(images, m.generator(0))
    assert torch.equal(*same)
    assert not torch.equal(*m.RandomViews(32)(images, m.generator(0)))


def test_slices_of_the_parameters_give_slices_of_the_views():
    images = torch.randint(0, 256, (6, 64, 64), dtype=torch.uint8)
    views = m.RandomViews(32)
    whole = views(images, m.generator(5))
    params = {k: v[:, 2:4] for k, v in views.draw(6, 64, m.generator(5)).items()}
    part = views(images[2:4], params=params)
    assert torch.allclose(part[0], whole[0][2:4]) and torch.allclose(part[1], whole[1][2:4])


# ---------------------------------------------------------------- 10. pre-training


def test_auroc_by_hand_and_as_scikit_learn():
    nan = math.nan
    assert m.auroc(np.array([1, 2, 3, 4]), np.array([0, 0, 1, 1.0])) == 1
    assert m.auroc(np.array([1, 2, 2, 3]), np.array([0, 1, 0, 1.0])) == 0.875  # a tie counts half
    assert m.auroc(np.array([5, 5, 5]), np.array([0, 1, 1.0])) == 0.5
    assert math.isnan(m.auroc(np.array([1, 2]), np.array([1, 1.0])))
    assert m.auroc(np.array([9, 1, 2]), np.array([nan, 0, 1.0])) == 1
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, labels = rng.integers(0, 9, 60), rng.integers(0, 2, 60).astype(float)
        weights = rng.integers(0, 4, 60)
        expected = roc_auc_score(labels, scores, sample_weight=weights)
        assert m.auroc(scores, labels, weights) == pytest.approx(expected, abs=1e-12)
    several = np.random.default_rng(3).integers(0, 3, (4, len(labels)))
    one_by_one = [m.auroc(scores, labels, weights) for weights in several]
    assert m.auroc(scores, labels, several).tolist() == one_by_one
    both = m.finding_aurocs([[1, 1], [2, 2], [3, 3]], [[0, 1], [1, 1], [1, 1.0]])
    assert both[0] == both[1] == 1 and math.isnan(both[2])


def test_effective_rank_counts_directions():
    torch.manual_seed(0)
    flat = torch.randn(400, 3) @ torch.randn(3, 50)
    assert 2 < m.effective_rank(flat) <= 3
    assert m.effective_rank(torch.randn(500, 20)) > 18
    assert m.effective_rank(torch.ones(9, 4)) == 0


def test_knn_scores_are_neighbour_means():
    train = torch.tensor([[0.0, 1.0], [0.1, 1.0], [1.0, 0.0], [1.0, 0.1]])
    labels = torch.tensor([[1.0], [1.0], [0.0], [math.nan]])
    scores = m.knn_scores(train, labels, torch.tensor([[0.0, 2.0], [2.0, 0.0]]), k=2)
    assert scores[:, 0].tolist() == [1.0, 0.0]


def run_pretrain(*extra, out="runs/toy"):
    """`pretrain` on the toy set in this process; returns its exit code."""
    return m.main(["pretrain", "--data", "toy", *SMALL, "--out", out, *extra])


def test_pretraining_writes_its_folder_and_reports_the_probe(place, capsys):
    assert run_pretrain("--knn-every", "1") == 0
    shown = capsys.readouterr().out
    number = r"\d+\.\d{3}"
    line = rf"^epoch 1/2  loss {number} \(global {number}, local {number}\)  val {number}  "
    line += rf"k-NN AUROC {number}  \d+ images/s  \d+ h \d\d min left$"
    assert len(re.search(line, shown, re.MULTILINE).group()) <= 120
    mean = []
    for weights in ("random", "runs/toy/encoder.pt"):
        table = shown[shown.index(f"\n{weights}, frozen: mean and 95 % interval") :]
        mean.append(re.search(r"\nmean AUROC +(\d\.\d{3}) \[", table).group(1))
    for weights, value in zip(("random", "runs/toy/encoder.pt"), mean, strict=True):
        out = f"runs/probe-{len(weights)}"
        probe = evaluate("classify", "--weights", weights, "--out", out)
        assert probe["test"]["mean_auroc"]["mean"] == pytest.approx(float(value), abs=6e-4)
    names = {p.name for p in (place / "runs" / "toy").iterdir()}
    assert {"config.json", "metrics.csv", "last.pt", "encoder.pt"} <= names
    table = pd.read_csv("runs/toy/metrics.csv")
    assert table["epoch"].tolist() == [1, 2]
    for head in ("global", "local"):
        for name in ("invariance", "variance", "covariance"):
            assert {f"{head}_{name}", f"val_{head}_{name}"} <= set(table)
        assert table[f"rank_{head}"].gt(1).all() and table[f"std_{head}"].gt(0).all()
    assert table["knn_auroc"].between(0, 1).all()
    weighted = table["loss_global"] + table["loss_local"]
    assert np.allclose(table["loss"], weighted, rtol=1e-5)
    assert run_pretrain("--knn-every", "1") == 0
    assert "resumes at step 6 of last.pt" in capsys.readouterr().out  # and trains nothing
    assert pd.read_csv("runs/toy/metrics.csv").equals(table)


def test_training_sees_the_training_split_alone_unless_told_otherwise(place):
    data = m.PreparedData("toy")
    for include_val, splits in ((False, ["train"]), (True, ["train", "val"])):
        rows, held = m.pretraining_rows([data, data], include_val=include_val)
        expected = data.indices(*splits)
        assert torch.equal(rows, torch.cat([expected, expected + 48]))
        assert set((held % 48).tolist()) == set(data.indices("val").tolist())
    Path("skip.txt").write_text("i0000\ni0001\n")
    assert len(m.pretraining_rows([data], "skip.txt")[0]) == len(data.indices("train")) - 2
    Path("skip.txt").write_text("another name\n")
    with pytest.raises(m.UserError, match="another name"):
        m.pretraining_rows([data], "skip.txt")


def test_a_change_of_settings_is_refused_and_named(place, capsys):
    assert run_pretrain() == 0
    line = refused(capsys, "pretrain", "--data", "toy", *SMALL, "--out", "runs/toy", "--lr", "9")
    assert "lr" in line and "--overwrite" in line
    assert run_pretrain("--lr", "0.1", "--overwrite") == 0
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("x")
    Path("mine/encoder.pt").write_text("of somebody else")
    assert "not of a run" in refused(capsys, "pretrain", "--data", "toy", *SMALL, "--out", "mine")
    assert Path("mine/encoder.pt").read_text() == "of somebody else"


def test_overwrite_removes_the_files_of_a_run_and_no_others(place):
    assert run_pretrain() == 0
    Path("runs/toy/notes").mkdir()
    for name in ("thesis.txt", "notes/more.txt", "my-encoder.pt"):
        Path("runs/toy", name).write_text("mine")
    before = Path("runs/toy/encoder.pt").read_bytes()
    assert run_pretrain("--seed", "5", "--overwrite") == 0
    assert Path("runs/toy/encoder.pt").read_bytes() != before
    for name in ("thesis.txt", "notes/more.txt", "my-encoder.pt"):
        assert Path("runs/toy", name).read_text() == "mine"


def test_the_automatic_batch_fits_the_device_and_the_images():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [m.choose_batch_size(0, 1000, d) for d in (cpu, cuda)] == [64, 256]
    assert m.choose_batch_size(0, 39, cpu) == 39
    assert m.choose_batch_size(0, 1000, cuda, world=6) == 252
    assert m.choose_batch_size(128, 1000, cpu, world=4) == 128
    for wanted, world in ((1, 1), (1001, 1), (64, 3), (0, 600)):
        with pytest.raises(m.UserError, match="--batch-size"):
            m.choose_batch_size(wanted, 1000, cpu, world)


def test_the_batch_that_was_chosen_is_recorded(place):
    args = ["pretrain", "--data", "toy", "--size", "32", "--embedding-dim", "8", "--epochs", "1"]
    assert m.main([*args, "--out", "runs/auto"]) == 0
    settings = json.loads(Path("runs/auto/config.json").read_text())["settings"]
    assert settings["batch_size"] == len(m.PreparedData("toy").indices("train"))


def test_a_batch_that_the_set_or_batchnorm_cannot_give_is_refused(place, capsys):
    for size in (1, 1000):
        args = ("pretrain", "--data", "toy", *SMALL, "--batch-size", size)
        assert "--batch-size" in refused(capsys, *args)


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


def test_exact_resume(place, monkeypatch):
    assert run_pretrain(out="runs/whole") == 0
    for stop_at in (2, 3, 4):  # middle, last and first step of an epoch
        with monkeypatch.context() as patch:
            taken = interrupt_at(patch, stop_at)
            assert run_pretrain(out=f"runs/cut-{stop_at}") == 130
            assert len(taken) == stop_at  # it stops after the step in hand
        assert run_pretrain(out=f"runs/cut-{stop_at}") == 0
        assert_same_run("runs/whole", f"runs/cut-{stop_at}")


def test_checkpoints_come_by_time_and_at_the_end(place, monkeypatch):
    saved, save = [], m.save_training

    def spy(folder, parts, state):
        saved.append(state["step"])
        save(folder, parts, state)

    monkeypatch.setattr(m, "save_training", spy)
    assert run_pretrain(out="runs/rare") == 0
    assert run_pretrain("--checkpoint-minutes", "0", out="runs/often") == 0
    assert saved == [6, *range(1, 7)]
    assert_same_run("runs/rare", "runs/often")


def assert_same_run(a, b):
    """Equal bits in weights, buffers, optimiser state and metrics of two run folders."""
    assert Path(a, "metrics.csv").read_text() == Path(b, "metrics.csv").read_text()
    one, two = (m.load_checkpoint(Path(p) / "last.pt") for p in (a, b))
    assert (one["step"], one["history"]) == (two["step"], two["history"])
    assert pd.read_csv(Path(b, "metrics.csv"))["epoch"].tolist() == list(
        range(1, len(one["history"]) + 1)
    )
    assert one["scaler"] == two["scaler"]
    assert any("running_mean" in k for k in one["model"])
    for k, v in one["model"].items():
        assert torch.equal(v, two["model"][k]), k
    moments = [s["optimizer"]["state"] for s in (one, two)]
    for k, v in moments[0].items():
        assert torch.equal(v["momentum_buffer"], moments[1][k]["momentum_buffer"]), k
    encoders = [m.load_checkpoint(Path(p) / "encoder.pt")["encoder"] for p in (a, b)]
    assert all(torch.equal(v, encoders[1][k]) for k, v in encoders[0].items())


def make_training(**given):
    """Model, and all parts of a small training on a CPU, as `pretrain` makes them."""
    given = {"data": "toy", "size": 32, "embedding_dim": 8, "batch_size": 4, **given}
    config = m.make_config("pretrain", m.PretrainConfig, given)
    parts = m.build_parts(config, torch.device("cpu"))
    return parts["model"], parts


def test_the_scaler_of_float16_is_part_of_the_state(place):
    views = torch.randn(3, 2, 2, 3, 32, 32)
    step = lambda parts, pair: m.train_step(  # noqa: E731
        *parts.values(), *pair, lr=0.01, amp="fp16"
    )
    _, one = make_training(amp="fp16")
    for pair in views[:2]:
        step(one, pair)
    m.save_training(place, one, {"step": 2, "history": [], "logs": []})
    _, two = make_training(amp="fp16")
    assert two["scaler"].state_dict() != one["scaler"].state_dict()
    assert m.resume(place, two)["step"] == 2
    assert two["scaler"].state_dict() == one["scaler"].state_dict()
    logs = [step(parts, views[2]) for parts in (one, two)]
    for name, value in logs[0].items():
        assert torch.allclose(value, logs[1][name], rtol=0, atol=0, equal_nan=True), name


def test_a_skipped_step_of_float16_does_not_spoil_the_mean_gradient_norm(place):
    scaler, plain = (torch.amp.GradScaler("cpu", enabled=on) for on in (True, False))
    log = {"loss": torch.ones(()), "grad_norm": torch.tensor(math.inf)}
    logs = m.read_logs([log, {**log, "grad_norm": torch.tensor(3.0)}], 2, scaler)
    row = watch(make_training()[0], torch.arange(8), logs=logs)
    assert (row["loss"], row["grad_norm"]) == (1.0, 3.0)
    with pytest.raises(m.UserError, match="step 2: loss is inf"):
        m.read_logs([{**log, "loss": torch.tensor(math.inf)}], 3, scaler)
    with pytest.raises(m.UserError, match="step 0: grad_norm is inf"):
        m.read_logs([log], 1, plain)


class FakeGraph:
    """Stands for a CUDA graph on a CPU: a replay repeats the recorded step, or does nothing."""

    works = True

    def replay(self):
        if self.works:
            with torch.enable_grad():
                log = self.step()
            for name, value in log.items():
                self.log[name].copy_(value)


@pytest.mark.parametrize("works", [True, False])
def test_a_graphed_step_is_the_step(place, monkeypatch, works, capsys):
    """Same weights and logs after every step, with other inputs and another learning rate."""

    @contextlib.contextmanager
    def record(graph, capture_error_mode):
        state = {name: tensor.clone() for name, tensor in graphed.model.state_dict().items()}
        momenta = [s["momentum_buffer"] for s in graphed.optimizer.state.values()]
        before = [momentum.clone() for momentum in momenta]
        yield
        graph.log, graph.step = graphed.log, lambda: graphed.step(*graphed.inputs)
        graphed.model.load_state_dict(state)  # recording executes nothing
        torch._foreach_copy_(momenta, before)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(FakeGraph, "works", works)
    views, images = m.RandomViews(32), m.PreparedData("toy").images
    runs = []
    for wrap in (False, True):
        _, parts = make_training()

        def step(images, params, lr, parts=parts):
            return m.train_step(*parts.values(), *views(images, params=params), lr)

        if wrap:
            step = graphed = m.GraphedStep(step, parts["model"], parts["optimizer"])
        logs = []
        for i in range(6):
            params = views.draw(4, 48, m.generator(i))
            log = step(images[4 * i : 4 * i + 4], params, 0.001 * (i + 1))
            logs.append({name: float(value) for name, value in log.items()})
        runs.append((logs, parts["model"].state_dict()))
    assert (graphed.graph is not None) == works
    assert ("it is not used" in capsys.readouterr().out) != works
    assert runs[0][0] == runs[1][0]
    for name, tensor in runs[0][1].items():
        assert torch.equal(tensor, runs[1][1][name]), name


def test_a_flipped_bit_or_a_cut_anywhere_is_found_or_harmless(place):
    m.save_checkpoint("x.pt", x=torch.arange(300.0))
    good = Path("x.pt").read_bytes()
    content = torch.arange(300.0).numpy().tobytes()
    inside = good.index(content)
    assert m.load_checkpoint("x.pt")["x"].equal(torch.arange(300.0))
    places = [*range(0, len(good), len(good) // 80), *range(inside, inside + len(content), 97)]
    for k in places:
        Path("x.pt").write_bytes(good[:k])
        with pytest.raises(m.UserError, match="damaged"):
            m.load_checkpoint("x.pt")
        flipped = bytearray(good)
        flipped[k] ^= 1 << k % 8
        Path("x.pt").write_bytes(bytes(flipped))
        if inside <= k < inside + len(content):
            with pytest.raises(m.UserError, match="damaged"):
                m.load_checkpoint("x.pt")
        else:  # names, dates and padding of the archive
            with contextlib.suppress(m.UserError):
                assert m.load_checkpoint("x.pt")["x"].equal(torch.arange(300.0))


def test_fault8_damaged_checkpoints_are_found_and_the_previous_one_taken(place, capsys):
    assert run_pretrain("--checkpoint-minutes", "0") == 0
    reference = Path("runs/toy/metrics.csv").read_text()
    good = Path("runs/toy/last.pt").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 3] ^= 1
    for damaged in (b"", good[: len(good) // 2], good[:-1], bytes(flipped)):
        Path("runs/toy/last.pt").write_bytes(damaged)
        with pytest.raises(m.UserError, match="damaged"):
            m.load_checkpoint("runs/toy/last.pt")
        previous = Path("runs/toy/previous.pt").read_bytes()
        assert run_pretrain("--checkpoint-minutes", "0") == 0
        assert re.search("of previous.pt .*last.pt is damaged", capsys.readouterr().out)
        assert Path("runs/toy/metrics.csv").read_text() == reference
        assert m.load_checkpoint("runs/toy/last.pt")["step"] == 6
        Path("runs/toy/previous.pt").write_bytes(previous)
    Path("runs/toy/last.pt").write_bytes(b"x")
    Path("runs/toy/previous.pt").write_bytes(b"y")
    line = refused(capsys, "pretrain", "--data", "toy", *SMALL, "--out", "runs/toy")
    assert "damaged" in line and "--overwrite" in line


def test_files_of_an_earlier_version(place, capsys):
    """Its encoder.pt, with a SHA-256 as comment of the archive, loads; its last.pt is refused."""
    assert run_pretrain() == 0
    for name in ("encoder.pt", "last.pt"):
        state = m.load_checkpoint(f"runs/toy/{name}")
        del state["format"]
        buffer = io.BytesIO()
        torch.save(state, buffer)
        archive = buffer.getvalue()
        digest = hashlib.sha256(archive).hexdigest().encode()
        old = archive[:-2] + len(digest).to_bytes(2, "little") + digest
        Path("runs/toy", name).write_bytes(old)
    assert m.load_encoder("runs/toy/encoder.pt")[1]["size"] == 32
    line = refused(capsys, "pretrain", "--data", "toy", *SMALL, "--out", "runs/toy")
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


def test_every_file_loads_with_weights_only(place):
    assert run_pretrain("--checkpoint-minutes", "0") == 0
    for name in ("last.pt", "previous.pt", "encoder.pt"):
        torch.load(Path("runs/toy") / name, weights_only=True)


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
mode, left, name = sys.argv[1], int(sys.argv[2]), sys.argv[3]
state = {"x": torch.full((5000,), 2.0), "turn": 2}
if mode == "bytes":
    opened = open
    kills = lambda path, *a: Killer(opened(path, *a), left)
    m.open = lambda path, *a: (kills if a[:1] == ("wb",) else opened)(path, *a)
if mode in ("before", "between", "after"):
    replace, count = os.replace, [0]
    def dying(a, b):
        count[0] += 1
        if mode == "before": os._exit(9)
        if mode == "between" and count[0] == 2: os._exit(9)
        replace(a, b)
        if count[0] == 2: os._exit(9)
    os.replace = dying
if mode == "naive":
    with Killer(open(name, "w+b"), left) as f: torch.save(state, f)
else:
    m.save_checkpoint(name, os.path.dirname(name) + "/previous.pt", **state)
"""


@pytest.mark.parametrize("mode", ["bytes", "before", "between", "after", "naive"])
def test_killed_at_any_byte_the_last_checkpoint_or_the_one_before_loads(place, mode):
    folder = Path("run")
    folder.mkdir()
    m.save_checkpoint(folder / "last.pt", x=torch.full((5000,), 1.0), turn=1)
    whole = (folder / "last.pt").stat().st_size
    if mode == "naive":  # its file has no format number
        torch.save({"x": torch.full((5000,), 2.0), "turn": 2}, "plain.pt")
        whole = Path("plain.pt").stat().st_size
    for left in (0, 1, whole // 2, whole - 1) if mode in ("bytes", "naive") else (0,):
        if (child := os.fork()) == 0:  # a process to be killed, without imports anew
            sys.argv = ["killer", mode, str(left), "run/last.pt"]
            try:
                exec(KILLER, {})
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        turns = []
        for path in (folder / "last.pt", folder / "previous.pt"):
            with contextlib.suppress(m.UserError):
                turns.append(m.load_checkpoint(path)["turn"])
        if mode == "naive":  # the control: an in-place save loses everything
            assert turns == []
        else:
            assert turns and set(turns) <= {1, 2}


def test_sigkill_at_random_moments_then_exact_resume(place):
    args = ["pretrain", "--data", "toy", *SMALL, "--epochs", "4"]
    assert m.main([*args, "--out", "runs/whole"]) == 0
    rng = np.random.default_rng(0)
    call = [sys.executable, str(HERE / "mlvicx.py"), *args, "--out", "runs/cut"]
    killed, log = 0, Path("runs/cut/metrics.csv")
    for _ in range(3):
        before = log.exists() and log.stat().st_mtime_ns
        process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (log.exists() and log.stat().st_mtime_ns) == before:
            time.sleep(0.05)
        time.sleep(float(rng.random()))
        killed += process.poll() is None
        process.kill()
        process.wait()
    assert killed >= 2
    assert m.main([*args, "--out", "runs/cut"]) == 0
    assert_same_run("runs/whole", "runs/cut")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_control_c_saves_at_the_step_and_says_how_to_go_on(place, number):
    args = ["pretrain", "--data", "toy", *SMALL, "--epochs", "500", "--out", "runs/c"]
    args += ["--checkpoint-minutes", "0"]
    call = [sys.executable, str(HERE / "mlvicx.py"), *args]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not Path("runs/c/last.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command resumes there" in out
    step = int(re.search(r"stopped at step (\d+)", out).group(1))
    assert m.load_checkpoint("runs/c/last.pt")["step"] == step


def test_pretraining_without_the_right_to_write_is_one_line(place):
    Path("runs/closed").mkdir(parents=True, mode=0o500)
    place.chmod(0o755)
    code = (  # root may do anything: it becomes somebody else once all is imported
        "import os, sys\nimport mlvicx as m\n"
        "os.geteuid() or os.setuid(65534)\nsys.exit(m.main(sys.argv[1:]))"
    )
    call = [sys.executable, "-c", code, "pretrain", "--data", "toy", *SMALL]
    env = os.environ | {"PYTHONPATH": str(HERE)}
    options = dict(capture_output=True, text=True, env=env)
    done = subprocess.run([*call, "--out", "runs/closed/run"], **options)
    assert done.returncode == 2 and not any(Path("runs/closed").iterdir())
    assert re.fullmatch("error: .*Permission denied.*\n", done.stderr), done.stderr
    assert m.main(["pretrain", "--data", "toy", *SMALL, "--out", "runs/open"]) == 0
    good = Path("runs/open/last.pt").read_bytes()
    Path("runs/open").chmod(0o555)
    done = subprocess.run([*call, "--epochs", "9", "--overwrite", "--out", "runs/open"], **options)
    assert done.returncode == 2 and re.fullmatch("error: .*\n", done.stderr), done.stderr
    assert Path("runs/open/last.pt").read_bytes() == good
    assert not list(Path("runs/open").glob("*.tmp"))


def resident_mb():
    """Resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


class Tiny(torch.nn.Module):
    """Stands in for the model, so that two thousand steps of the real loop take seconds."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Sequential(
            torch.nn.Linear(64, 8, bias=False), torch.nn.BatchNorm1d(8)
        )
        self.encoder, self.layer.arch = self.layer, {}

    def forward(self, view1, view2):
        z = [self.layer(v[:, 0, :8, :8].flatten(1)) for v in (view1, view2)]
        return z, None


def test_two_thousand_steps_with_no_growth_of_memory_or_open_files(place, monkeypatch):
    write_set(place / "data" / "many", n=5000, size=32)
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
    rows, _ = m.pretraining_rows([data])
    before, most = anonymous(), 0
    for images in m.prefetch(lambda r: m.gather_images([data], r), rows.split(64)):
        assert images.shape[1:] == (64, 64)
        most = max(most, anonymous() - before)
    print(most)
"""


def test_a_set_of_112120_images_opens_at_once_and_an_epoch_of_it_takes_no_more_memory(tmp_path):
    for n in (1120, 112120):
        folder = tmp_path / str(n)
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
    call = [sys.executable, "-c", GROWTH, str(tmp_path / "1120"), str(tmp_path / "112120")]
    env = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (_, _, small), (seconds, opened, large) = np.loadtxt(io.StringIO(done.stdout))
    assert seconds < 2 and opened < 200  # seconds of CPU, MB
    assert large - small < 20  # MB over an epoch, of 460 MB of images


def test_no_room_leaves_the_checkpoint_and_no_temporary_file(place):
    m.save_checkpoint("last.pt", turn=1)
    code = (
        "import resource, signal, sys, torch, mlvicx as m\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "try: m.save_checkpoint('last.pt', 'previous.pt', x=torch.zeros(9999))\n"
        "except (OSError, RuntimeError): sys.exit(7)\n"
    )
    env = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert m.load_checkpoint("last.pt")["turn"] == 1
    assert not list(Path().glob("*.tmp"))


def test_a_device_without_room_and_missing_folders_are_one_line(place, capsys):
    m.save_checkpoint("last.pt", turn=1)
    Path("last.pt.tmp").symlink_to("/dev/full")  # what is written goes to a device without room
    with pytest.raises(OSError, match="last.pt could not be written: .*No space left"):
        m.save_checkpoint("last.pt", "previous.pt", x=torch.zeros(9999))
    assert m.load_checkpoint("last.pt")["turn"] == 1
    assert not os.path.lexists("last.pt.tmp") and not Path("previous.pt").exists()
    with pytest.raises(OSError, match="absent/last.pt could not be written"):
        m.save_checkpoint("absent/last.pt")
    small = ("pretrain", "--data", "toy", *SMALL)
    assert "absent.txt" in refused(capsys, *small, "--exclude-ids", "absent.txt")
    assert "absent" in refused(capsys, *small, "--data-root", "absent")
    assert "last.pt" in refused(capsys, *small, "--out", "last.pt/run")  # below a file


def test_a_full_disk_is_one_line(place):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # noqa: E731
    done = command("pretrain", "--data", "toy", *SMALL, "--out", "runs/full", preexec_fn=limit)
    assert done.returncode == 2, done.stderr
    assert len(re.findall("^error: ", done.stderr, re.M)) == 1 and "Traceback" not in done.stderr
    assert not list(Path("runs/full").glob("*.tmp"))


def test_a_second_process_on_one_run_folder_is_refused(place, capsys):
    run = (Path("runs/one"), {"seed": 0})
    with m.open_run(*run), pytest.raises(m.UserError, match="another process"):
        with m.open_run(*run):
            pass
    with m.open_run(*run):  # the lock is the system's: it holds between processes
        done = command("pretrain", "--data", "toy", *SMALL, "--out", "runs/one")
    assert done.returncode == 2 and "another process" in done.stderr
    with m.open_run(*run):  # a dead owner leaves no lock behind
        pass


def test_a_checkpoint_of_another_architecture_names_the_key(place, capsys):
    assert run_pretrain() == 0
    state = m.load_checkpoint("runs/toy/encoder.pt")
    arch = state["arch"] | {"backbone": "resnet34"}
    m.save_checkpoint("odd.pt", encoder=state["encoder"], arch=arch)
    line = refused(capsys, "classify", "--data", "toy", "--size", "32", "--weights", "odd.pt")
    assert "layer1.2.conv1.weight" in line


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_part(place, monkeypatch, capsys):
    assert run_pretrain("--epochs", "1", out="runs/bad") == 0
    good = Path("runs/bad/last.pt").read_bytes()
    variance = m.variance_loss
    monkeypatch.setattr(m, "variance_loss", lambda z: variance(z) * math.nan)
    shutil.copytree("runs/bad", "runs/worse")
    settings = json.loads(Path("runs/worse/config.json").read_text())
    settings["settings"]["epochs"] = 2
    Path("runs/worse/config.json").write_text(json.dumps(settings))
    line = refused(capsys, "pretrain", "--data", "toy", *SMALL, "--out", "runs/worse")
    assert "step 3: global_variance is nan" in line
    assert Path("runs/worse/last.pt").read_bytes() == good


def watch(model, rows, logs=({"loss": 1.0},), step=50, **given):
    """The row of metrics.csv at the end of an epoch, after 50 steps."""
    data = m.PreparedData("toy")
    config = m.PretrainConfig(**{"size": 32, "embedding_dim": 16, "epochs": 1, **given})
    state = {"step": step, "history": [], "logs": list(logs)}
    parts = {"model": model, "optimizer": m.LARS(model.parameters())}
    m.finish_epoch(config, parts, state, 1.0, [data] * 2, rows, m.RandomViews(32), Path())
    return state["history"][0]


def test_weights_that_diverge_in_the_last_step_stop_the_run(place):
    model, _ = make_training()
    model.global_head.mlp[0].weight.data.fill_(math.nan)
    with pytest.raises(m.UserError, match="val_loss is nan; stopped"):
        watch(model, m.PreparedData("toy").indices("val"))


def test_collapse_warning_fires_on_a_constant_encoder_and_not_on_a_healthy_one(place):
    model, _ = make_training(embedding_dim=16)
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


def test_the_first_epochs_of_a_healthy_run_raise_no_alarm(place, capsys):
    """The running statistics of BatchNorm are young, and the embeddings in eval mode are small."""
    args = ("--epochs", "8", "--batch-size", "16", "--trust", "0.001", "--embedding-dim", "64")
    assert run_pretrain(*args) == 0
    assert "collapsed" not in capsys.readouterr().out


def test_a_set_without_labels_does_not_hide_the_neighbours_of_another(place, monkeypatch):
    scores = iter([math.nan, 0.75, math.nan, math.nan])
    monkeypatch.setattr(m, "knn_auroc", lambda *args, **kwargs: next(scores))
    model, _ = make_training()
    assert watch(model, torch.arange(8))["knn_auroc"] == 0.75
    assert "knn_auroc" not in watch(model, torch.arange(8))


def test_the_validation_loss_is_that_of_all_its_images_together(place, monkeypatch):
    """Not a mean over chunks, whose covariance depends on their size."""
    model, _ = make_training()
    data, views, rows = m.PreparedData("toy"), m.RandomViews(32), torch.arange(48)
    found = m.validation_metrics(model, [data], rows, views, seed=3, cov_coeff=2.0)
    model.eval()
    with torch.no_grad():
        z = model(*views(data.images, m.generator(3, "val", 0)))
    expected = m.mlvicx_loss(*z, cov_coeff=2.0)[1]
    for name, value in expected.items():
        assert found[f"val_{name}"] == pytest.approx(float(value), rel=1e-4)
    assert found["rank_local"] == pytest.approx(m.effective_rank(z[1][0]), rel=1e-3)
    monkeypatch.setattr(m, "VALIDATION_IMAGES", 20)
    fewer = m.validation_metrics(model, [data], rows, views, seed=3, cov_coeff=2.0)
    again = m.validation_metrics(model, [data], rows[:20], views, seed=3, cov_coeff=2.0)
    assert fewer == again != found and m.validation_metrics(model, [data], rows[:1], views) == {}


def test_imagenet_weights_without_network_are_one_clear_line(place, monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    args = ("pretrain", "--data", "toy", *SMALL, "--init", "imagenet")
    assert "ImageNet" in refused(capsys, *args)
    assert m.main([*args[:-1], "random"]) == 0  # the refusal left no run folder behind


def test_imagenet_weights_are_torchvisions(place, monkeypatch):
    theirs = torchvision.models.resnet18()
    enum = torchvision.models.ResNet18_Weights
    monkeypatch.setattr(enum, "get_state_dict", lambda *a, **k: theirs.state_dict())
    model = m.build_model(m.PretrainConfig(init="imagenet", embedding_dim=8))
    encoder, origin = m.load_encoder("imagenet")
    for found in (model.encoder.state_dict(), encoder.state_dict()):
        assert {k for k in theirs.state_dict() if k not in found} == {"fc.weight", "fc.bias"}
        assert all(torch.equal(found[k], v) for k, v in theirs.state_dict().items() if k in found)
    assert encoder.arch["context"] == "none" and not origin


def test_a_local_weight_of_zero_builds_no_local_head():
    given = dict(embedding_dim=8, context="none")
    heads = [m.build_model(m.PretrainConfig(**given, local_weight=w)) for w in (0.0, 0.5)]
    assert not any("local_head" in name for name, _ in heads[0].named_parameters())
    assert any("local_head" in name for name, _ in heads[1].named_parameters())


def test_the_channel_maximum_of_cuda_is_that_of_the_pool(monkeypatch):
    """Equal maxima, which are common in bf16, do not share the gradient in either form."""
    torch.manual_seed(0)
    block, x = m.ChannelAttention(8), torch.randn(2, 8, 5, 5).round().requires_grad_()
    found = []
    for on_cuda in (False, True):
        monkeypatch.setattr(torch.Tensor, "is_cuda", on_cuda)
        y = block(x)
        found.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][1].sum((2, 3)), found[1][1].sum((2, 3)), rtol=1e-4)
    alone = torch.autograd.grad(block(x).sum(), x)[0]
    monkeypatch.setattr(F, "adaptive_max_pool2d", None)  # it is not used there
    assert torch.equal(torch.autograd.grad(block(x).sum(), x)[0], alone)


def test_a_compiled_run_is_the_run(place, monkeypatch):
    assert run_pretrain("--epochs", "1", out="runs/plain") == 0
    compiled, compile = [], torch.compile
    monkeypatch.setattr(  # the program as a graph, run without a C++ compiler
        torch,
        "compile",
        lambda f, **given: compiled.append(f) or compile(f, backend="aot_eager", **given),
    )
    assert run_pretrain("--epochs", "1", "--compile", out="runs/compiled") == 0
    a, b = (pd.read_csv(f"runs/{name}/metrics.csv") for name in ("plain", "compiled"))
    assert len(compiled) == 5 and list(a) == list(b)
    assert np.allclose(a, b, rtol=1e-3, equal_nan=True)
    states = [m.load_checkpoint(f"runs/{name}/encoder.pt") for name in ("plain", "compiled")]
    assert states[0]["encoder"].keys() == states[1]["encoder"].keys()


DDP = """
import sys, torch, torch.distributed as dist
import mlvicx as m
rank, mode, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
torch.manual_seed(0)
model = m.MLVICX(embedding_dim=8).double().eval()
views = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
ddp = torch.nn.parallel.DistributedDataParallel(model)
pairs = ddp(*views[:, 2 * rank : 2 * rank + 2])
if mode == "plain":
    gather = lambda z: torch.cat([z if r == rank else o for r, o in enumerate(others(z))])
    def others(z):
        out = [torch.empty_like(z) for _ in range(2)]
        dist.all_gather(out, z.detach())
        return out
else:
    gather = m.gather
loss, _ = m.mlvicx_loss(*[tuple(gather(z) for z in pair) for pair in pairs])
loss.backward()
grads = {k: p.grad for k, p in model.named_parameters()}
torch.save({"loss": loss.detach(), "grads": grads}, f"{path}/{mode}{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_give_the_loss_and_gradient_of_one(tmp_path):
    torch.manual_seed(0)
    model = m.MLVICX(embedding_dim=8).double().eval()
    views = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
    expected, _ = m.mlvicx_loss(*model(*views))
    expected.backward()
    worst = {}
    for mode in ("gradient", "plain"):
        (tmp_path / "store").unlink(missing_ok=True)
        calls = [[sys.executable, "-c", DDP, str(r), mode, str(tmp_path)] for r in (0, 1)]
        env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
        running = [subprocess.Popen(c, env=env, stderr=subprocess.PIPE) for c in calls]
        assert all(p.wait(120) == 0 for p in running), running[0].stderr.read()
        found = [torch.load(tmp_path / f"{mode}{r}.pt", weights_only=True) for r in (0, 1)]
        for result in found:
            assert relative(result["loss"], expected.detach()) < 1e-10
        pairs = [(found[0]["grads"][k], p.grad) for k, p in model.named_parameters()]
        scale = max(float(g.norm()) for _, g in pairs)
        # Biases that shift both views alike have a true gradient of zero: compared to the largest.
        worst[mode] = max(float((a - b).norm() / max(b.norm(), 1e-3 * scale)) for a, b in pairs)
    assert worst["gradient"] < 1e-10
    assert worst["plain"] > 1e-3  # the control: a gather without gradient is wrong


DDP_STEP = """
import sys, torch, torch.distributed as dist
import mlvicx as m
rank, path = int(sys.argv[1]), sys.argv[2]
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
torch.manual_seed(0)
model = m.MLVICX(embedding_dim=8).double().to(device)
views = torch.randn(2, 8, 3, 32, 32, dtype=torch.float64)[:, 4 * rank : 4 * rank + 4].to(device)
called, optimizer = m.for_training(model, device, 2), m.LARS(model.parameters())
scaler = torch.amp.GradScaler(device.type, enabled=False)
log = m.train_step(called, optimizer, scaler, *views, 0.1)
torch.save({"loss": log["loss"].cpu(), "weights": list(model.cpu().parameters())}, f"{path}/{rank}")
dist.destroy_process_group()
"""


class Halves(torch.nn.Module):
    """What two processes compute on a CPU: each has the statistics of its part of the batch."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, view1, view2):
        parts = [self.model(*half) for half in zip(view1.chunk(2), view2.chunk(2), strict=True)]
        joined = [torch.cat(z) for pairs in zip(*parts, strict=True) for z in zip(*pairs)]
        return joined[:2], joined[2:]


def test_a_training_step_of_two_processes_is_that_of_one(tmp_path):
    """On a CPU with BatchNorm per process; on CUDA with SyncBatchNorm, as one process has it."""
    calls = [[sys.executable, "-c", DDP_STEP, str(rank), str(tmp_path)] for rank in (0, 1)]
    env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen(call, env=env, stderr=subprocess.PIPE) for call in calls]
    assert all(p.wait(120) == 0 for p in running), running[0].stderr.read()
    torch.manual_seed(0)
    model = m.MLVICX(embedding_dim=8).double()
    before = [p.detach().clone() for p in model.parameters()]
    views = torch.randn(2, 8, 3, 32, 32, dtype=torch.float64)
    called = model if torch.cuda.is_available() else Halves(model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    log = m.train_step(called, m.LARS(model.parameters()), scaler, *views, 0.1)
    for rank in (0, 1):
        found = torch.load(tmp_path / str(rank), weights_only=True)
        assert relative(found["loss"], log["loss"]) < 1e-10
        for a, b, start in zip(found["weights"], model.parameters(), before, strict=True):
            assert (a - b).norm() <= 1e-6 * (b - start).norm() + 1e-12


def test_torchrun_trains_with_two_processes(place):
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    call += ["--master-port", "29611", str(HERE / "mlvicx.py"), "pretrain", "--data", "toy", *SMALL]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(pd.read_csv("runs/toy/metrics.csv")) == 2
    # Stopped by a signal to the launcher, long before the epoch ends, and resumed: the same bits.
    long = ["--epochs", "1", "--batch-size", "4", "--checkpoint-minutes", "9"]
    whole = [*call, *long, "--out", "runs/whole2"]
    assert subprocess.run(whole, capture_output=True, timeout=300, env=env).returncode == 0
    cut = [*call, *long, "--out", "runs/cut2"]
    process = subprocess.Popen(
        cut, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True
    )
    for line in process.stdout:
        if "batch_size" in line:  # the training begins
            break
    process.terminate()
    process.communicate(timeout=60)
    assert 0 < m.load_checkpoint("runs/cut2/last.pt")["step"] < 7
    assert subprocess.run(cut, capture_output=True, timeout=300, env=env).returncode == 0
    assert_same_run("runs/whole2", "runs/cut2")


# ---------------------------------------------------------------- 11. evaluation


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A working folder with a toy set and an encoder that was pre-trained on it for two epochs."""
    place = tmp_path_factory.mktemp("trained")
    write_set(place / "data" / "toy", n=80, name="toy")
    with contextlib.chdir(place):
        assert run_pretrain() == 0
    return place


def unit(folder, index, seed):
    """What an evaluation has kept of one encoder and seed."""
    (path,) = Path(folder).glob(f"unit-*-{index}-{seed}-*.npy")
    return np.load(path)


def evaluate(*args):
    """An evaluation command on the toy set with its encoder; returns results.json."""
    name, *rest = map(str, args)
    rest += [] if "--weights" in rest else ["--weights", "runs/toy/encoder.pt"]
    out = rest[rest.index("--out") + 1]
    assert m.main([name, "--data", "toy", "--size", "32", *rest]) == 0
    return json.loads(Path(out, "results.json").read_text())


def test_label_subsets_are_nested_by_patient_and_the_same_for_everyone(trained):
    data = m.PreparedData("toy", trained / "data")
    small, large = (set(m.label_subset(data, f).tolist()) for f in (0.1, 0.3))
    assert small < large < set(m.label_subset(data, 1.0).tolist())
    assert large == set(m.label_subset(data, 0.3).tolist())
    assert small != set(m.label_subset(data, 0.1, seed=1).tolist())


def test_fault7_label_subsets_never_cut_through_a_patient(trained):
    data = m.PreparedData("toy", trained / "data")
    rows = m.label_subset(data, 0.2)
    inside = set(data.patient[rows].tolist())
    outside = set(data.patient[data.indices("train")].tolist()) - inside
    train = data.indices("train")
    whole = train[torch.tensor([p in inside for p in data.patient[train].tolist()])]
    assert torch.equal(rows, whole) and len(inside & outside) == 0 and outside


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
    xs = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    for f in range(2):
        reference = LogisticRegression(C=1 / (0.01 * 300), tol=1e-9, max_iter=1000)
        expected = reference.fit(xs, y[:, f].numpy()).decision_function(xs)
        assert np.allclose(F.linear(x, weight, bias)[:, f].numpy(), expected, atol=2e-2)


def test_linear_probe_leaves_out_unknown_labels_and_survives_one_class():
    torch.manual_seed(0)
    x = torch.randn(60, 4)
    y = torch.stack([(x[:, 0] > 0).float(), torch.ones(60)], 1)
    y[::2, 0] = math.nan
    weight, bias = m.linear_probe(x, y, x, y)
    assert weight.isfinite().all() and bias.isfinite().all()
    known = torch.where(y[:, 0].isnan(), 1 - (x[:, 0] > 0).float(), y[:, 0])
    assert m.auroc(F.linear(x, weight, bias)[1::2, 0].numpy(), known[1::2].numpy()) > 0.95


def test_frozen_results_have_their_definition(trained, monkeypatch):
    monkeypatch.chdir(trained)
    r = evaluate("classify", "--seeds", "2", "--out", "runs/c1")
    assert {"task", "data", "weights", "mode", "labels", "seeds", "test"} <= set(r)
    assert set(r["test"]["mean_auroc"]) == {"mean", "std", "ci95"}
    assert r["test"]["defined_findings"] == 2
    data = m.PreparedData("toy")
    for name, one in r["test"]["per_finding"].items():
        y = data.labels[data.indices("test"), data.findings.index(name)]
        assert (one["positives"], one["n"]) == (int(y.sum()), len(y))
    assert {"settings", "provenance"} <= set(r) and r["labels"] == 1.0
    assert torch.load("runs/c1/classifier.pt", weights_only=True)["findings"] == ["A", "B"]
    scores = [unit("runs/c1", 0, seed) for seed in (0, 1)]
    for f, one in enumerate(r["test"]["per_finding"].values()):
        y = data.labels[data.indices("test"), f].numpy()
        for key, metric in (
            ("average_precision", average_precision_score),
            ("auroc", roc_auc_score),
        ):
            found = one[key]["mean"] if key == "auroc" else one[key]
            assert found == pytest.approx(np.mean([metric(y, s[:, f]) for s in scores]))
    monkeypatch.setattr(m, "linear_probe", None)  # nothing is computed again
    again = evaluate("classify", "--seeds", "2", "--out", "runs/c1")
    assert again["test"] == r["test"]


def test_several_label_fractions_in_one_run_are_those_of_runs_apart(trained, monkeypatch, tmp_path):
    monkeypatch.chdir(trained)
    both = evaluate("classify", "--labels", "0.2,1", "--seeds", "2", "--out", tmp_path / "both")
    assert both["labels"] == [0.2, 1.0] and list(both["test"]) == ["0.2", "1"]
    for fraction in ("0.2", "1"):
        args = ("--labels", fraction, "--seeds", "2", "--out", tmp_path / fraction)
        assert evaluate("classify", *args)["test"] == both["test"][fraction]


@pytest.mark.parametrize("mode", ["frozen", "finetune"])
def test_new_weights_or_labels_under_an_old_path_never_get_old_results(
    trained, monkeypatch, tmp_path, capsys, mode
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "data", "data")
    weights = Path("runs/toy/encoder.pt")
    weights.parent.mkdir(parents=True)
    shutil.copy(trained / weights, weights)
    calls, subset = [], m.label_subset
    monkeypatch.setattr(m, "label_subset", lambda *a: calls.append(a) or subset(*a))
    args = ("classify", "--epochs", "1", "--mode", mode, "--out", "runs/c")
    first = evaluate(*args)["test"]
    assert evaluate(*args)["test"] == first and len(calls) == 1  # read back
    state = m.load_checkpoint(weights)
    state["encoder"] = m.Encoder(**state["arch"]).state_dict()
    m.save_checkpoint(weights, **state)
    second = evaluate(*args)["test"]
    assert len(calls) == 2 and second != first
    table = pd.read_csv("data/toy/labels.csv")
    table["A"] = table["B"]
    table.to_csv("data/toy/labels.csv", index=False)
    line = refused(capsys, *args, "--data", "toy", "--size", 32, "--weights", weights)
    assert "data_sha256" in line and "--overwrite" in line
    assert evaluate(*args, "--overwrite")["test"] != second and len(calls) == 3


def test_encoders_with_equal_parameters_but_another_form_do_not_share_features(
    trained, monkeypatch, tmp_path
):
    monkeypatch.chdir(trained)
    scores = []
    for context in ("side", "inline"):
        state = m.load_checkpoint("runs/toy/encoder.pt")
        state["arch"]["context"] = context
        m.save_checkpoint(tmp_path / f"{context}.pt", **state)
    both = f"{tmp_path}/side.pt,{tmp_path}/inline.pt"
    evaluate("classify", "--weights", both, "--out", tmp_path / "both")
    scores = [unit(tmp_path / "both", index, 0) for index in (0, 1)]
    assert np.abs(scores[0] - scores[1]).max() > 1e-3


def test_scores_that_are_not_finite_stop_the_command(trained, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(trained)
    encoder = m.Encoder()
    encoder.layer4[1].bn2.weight.data.fill_(math.nan)
    m.save_checkpoint(tmp_path / "nan.pt", encoder=encoder.state_dict(), arch=encoder.arch)
    args = ["--data", "toy", "--size", "32", "--weights", tmp_path / "nan.pt", "--epochs", "1"]
    for command in ("classify", "segment"):
        for mode in ("frozen", "finetune"):
            out = tmp_path / f"{command}-{mode}"
            line = refused(capsys, command, *args, "--mode", mode, "--out", out)
            assert "not finite" in line
            assert not list(out.glob("unit*")) and not (out / "results.json").exists()


def test_the_default_run_folder_names_the_weights(trained, monkeypatch):
    monkeypatch.chdir(trained)
    for weights in ("random", "runs/toy/encoder.pt", "random,runs/toy/encoder.pt"):
        assert m.main(["classify", "--data", "toy", "--size", "32", "--weights", weights]) == 0
    for name in ("random", "toy", "random+toy"):
        assert Path(f"runs/toy-classify-frozen-{name}-1/results.json").exists()


def test_features_of_an_encoder_are_computed_once(trained, monkeypatch, tmp_path):
    monkeypatch.chdir(trained)
    before = {p for p in trained.rglob("*")}
    predict, calls = m.predict, []
    monkeypatch.setattr(m, "predict", lambda *a, **k: calls.append(a) or predict(*a, **k))
    evaluate("classify", "--labels", "0.2,0.5,1", "--seeds", "2", "--out", tmp_path / "table")
    assert len(calls) == 1 and len(calls[0][2]) == 80
    assert {p for p in trained.rglob("*")} == before  # nothing is left elsewhere


def test_fault1_an_evaluation_starts_from_the_command_line(trained):
    args = ["classify", "--data", "toy", "--size", "32", "--weights", "runs/toy/encoder.pt"]
    done = command(*args, "--out", "runs/line", cwd=trained)
    assert done.returncode == 0, done.stderr
    assert "mean AUROC" in done.stdout


def test_fault3_the_blocks_that_were_trained_go_downstream(trained):
    encoder, _ = m.load_encoder(trained / "runs" / "toy" / "encoder.pt")
    state = m.load_checkpoint(trained / "runs" / "toy" / "last.pt")["model"]
    blocks = [k for k in state if k.startswith("encoder.context.")]
    assert len(blocks) == 15
    for key in blocks:
        assert torch.equal(encoder.state_dict()[key.removeprefix("encoder.")], state[key])


def test_fault4_a_file_that_fails_to_load_is_an_error(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    Path("broken.pt").write_bytes(b"PK nonsense")
    for path, word in (("broken.pt", "damaged"), ("absent.pt", "none")):
        args = ("classify", "--data", "toy", "--size", "32", "--weights", path, "--out", "runs/no")
        assert word in refused(capsys, *args)
    assert "expected a file like encoder.pt" in refused(
        capsys, "classify", "--data", "toy", "--weights", "runs/toy/last.pt", "--out", "runs/no"
    )


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_fault5_frozen_is_frozen_every_parameter_and_buffer(trained, monkeypatch, task):
    monkeypatch.chdir(trained)
    kept = []
    load = m.load_encoder

    def spy(*args, **kwargs):
        encoder, origin = load(*args, **kwargs)
        kept.append((encoder, {k: v.clone() for k, v in encoder.state_dict().items()}))
        return encoder, origin

    monkeypatch.setattr(m, "load_encoder", spy)
    # A classifier uses blocks where they feed its representation; a decoder uses them always.
    weights = {"classify": ("random", "--context", "inline"), "segment": ("runs/toy/encoder.pt",)}
    args = (task, "--epochs", "1", "--weights", *weights[task])
    evaluate(*args, "--out", f"runs/frozen-{task}")
    encoder, before = kept[-1]
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    evaluate(*args, "--mode", "finetune", "--out", f"runs/tuned-{task}")
    encoder, before = kept[-1]
    moved = [k for k, v in encoder.state_dict().items() if not torch.equal(v, before[k])]
    assert {"conv1.weight", "bn1.running_mean", "layer4.1.conv2.weight"} <= set(moved)
    blocks = [k for k in before if k.startswith("context.")]
    assert blocks and set(blocks) <= set(moved)


def test_fault6_validation_is_whole_and_never_flipped(trained):
    data = m.PreparedData("toy", trained / "data")
    val, encoder = data.indices("val"), m.Encoder("resnet18", "none")
    whole = m.predict(encoder, data.images, val, 32, batch_size=5)
    assert len(whole) == len(val) and len(val) % 5
    again = m.predict(encoder, data.images, val, 32, batch_size=5)
    assert torch.equal(whole, again)
    plain = encoder.eval()(m.normalise(m.resize_images(data.images[val], 32)))[0]
    assert torch.allclose(whole, plain, atol=1e-4)


def test_a_single_labelled_image_is_refused_and_an_odd_one_is_kept(trained, monkeypatch):
    monkeypatch.chdir(trained)
    data = m.PreparedData("toy")
    config = m.ClassifyConfig(size=32, epochs=1, batch_size=2, lr=1e-3, patience=1, amp="off")
    given = (config, m.Classifier(m.Encoder(), 2), data.images, data.labels)
    rest = (data.indices("val"), 1.0, m.masked_bce, m.mean_auroc, ("one",))
    with pytest.raises(m.UserError, match="--labels"):
        m.fit(*given, torch.arange(1), *rest)
    m.fit(*given, torch.arange(5), *rest)  # 2 + 3, for BatchNorm on 1 x 1 maps


def test_fault7_scores_stand_under_the_name_of_their_own_label(trained, monkeypatch):
    monkeypatch.chdir(trained)
    data = m.PreparedData("toy")
    swapped = pd.read_csv("data/toy/labels.csv")[
        ["image", "B", "patient", "has_mask", "split", "A"]
    ]
    shutil.copytree("data/toy", "data/swapped", dirs_exist_ok=True)
    swapped.to_csv("data/swapped/labels.csv", index=False)
    other = m.PreparedData("swapped")
    assert other.findings == data.findings and torch.equal(other.labels, data.labels)
    one = evaluate("classify", "--findings", "B", "--out", "runs/b")["test"]["per_finding"]
    both = evaluate("classify", "--findings", "B,A", "--out", "runs/ba")["test"]["per_finding"]
    assert list(one) == ["B"] and list(both) == ["B", "A"]
    assert one["B"]["positives"] == both["B"]["positives"]
    assert one["B"]["auroc"]["mean"] == pytest.approx(both["B"]["auroc"]["mean"], abs=0.15)


def test_an_unknown_finding_is_refused(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    args = ("classify", "--data", "toy", "--size", "32", "--findings", "Gout", "--out", "runs/g")
    assert "Gout" in refused(capsys, *args)


def test_a_finding_with_one_class_is_undefined_and_counted(trained, monkeypatch):
    monkeypatch.chdir(trained)
    if not Path("data/one").exists():
        shutil.copytree("data/toy", "data/one")
        pd.read_csv("data/one/labels.csv").assign(B=0).to_csv("data/one/labels.csv", index=False)
    args = ["classify", "--data", "one", "--size", "32", "--out", "runs/one"]
    assert m.main(args) == 0
    test = json.loads(Path("runs/one/results.json").read_text())["test"]
    assert test["defined_findings"] == 1
    assert test["per_finding"]["B"]["auroc"]["mean"] is None
    assert test["mean_auroc"]["mean"] == test["per_finding"]["A"]["auroc"]["mean"]


def test_dice_by_hand():
    truth = torch.zeros(4, 2, 2)
    truth[0, 0] = 1  # two pixels
    truth[1, 0, 0] = 1
    predicted = torch.zeros(4, 2, 2)
    predicted[0, 0, 0] = 1  # half of it: Dice 2 / 3
    predicted[2, 1, 1] = 1  # a false alarm: 0; image 1 is missed: 0; image 3 is empty twice: 1
    counts = m.mask_counts(predicted, truth).numpy()
    assert counts.tolist() == [[1, 1, 2], [0, 0, 1], [0, 1, 0], [0, 0, 0]]
    every, positive, pooled, blank, iou = m.dice_metrics(counts)
    assert every == pytest.approx((2 / 3 + 0 + 0 + 1) / 4)
    assert positive == pytest.approx(1 / 3)
    assert pooled == pytest.approx(2 / 5) and iou == pytest.approx(1 / 4)
    assert blank == 0.5
    twice = m.dice_metrics(counts, np.array([2, 0, 0, 0]))
    assert twice[:3] == pytest.approx([2 / 3] * 3) and twice[3] == 0
    assert m.dice_metrics(counts, np.array([[2, 0, 0, 0], [1, 1, 1, 1]]))[0] == pytest.approx(twice)


def test_interval_is_a_bootstrap_over_patients():
    runs = [np.arange(10.0), np.arange(10.0) + 1]
    mean = lambda run, w: ((run * w).sum(-1) / w.sum(-1))[..., None]  # noqa: E731
    one = m.interval(runs, np.arange(10), mean)[0]
    assert one["mean"] == 5.0 and one["std"] == pytest.approx(math.sqrt(0.5))
    assert one["ci95"][1] - one["ci95"][0] == pytest.approx(
        2 * 1.96 * 2.87 / math.sqrt(10), rel=0.1
    )
    together = m.interval(runs, np.repeat([0, 1], 5), mean)[0]
    assert together["ci95"] == [2.5, 7.5]  # two patients: both, or one of them twice
    assert m.interval(runs[:1], np.arange(10), mean)[0]["std"] is None
    pairs = [np.full(10, v) for v in (0.0, 4.0, 1.0, 5.0)]  # two encoders, two runs of each
    assert m.interval(pairs, np.arange(10), mean, 2)[0]["std"] == pytest.approx(math.sqrt(0.5))


def test_several_initialisations_are_judged_on_the_same_labels(trained, monkeypatch, tmp_path):
    monkeypatch.chdir(trained)
    rows, subset = [], m.label_subset
    monkeypatch.setattr(m, "label_subset", lambda *a: rows.append(subset(*a)) or rows[-1])
    both = evaluate(
        "classify", "--weights", "random,random", "--labels", 0.5, "--out", tmp_path / "two"
    )
    assert torch.equal(*rows)
    scores = [unit(tmp_path / "two", i, 0) for i in (0, 1)]
    assert not np.array_equal(*scores)
    single = evaluate("classify", "--weights", "random", "--labels", 0.5, "--out", tmp_path / "one")
    assert np.array_equal(scores[0], unit(tmp_path / "one", 0, 0))
    assert single["test"]["mean_auroc"]["std"] is None and both["test"]["mean_auroc"]["std"] > 0


def test_segment_results_have_their_definition(trained, monkeypatch):
    monkeypatch.chdir(trained)
    r = evaluate("segment", "--epochs", "2", "--mode", "finetune", "--out", "runs/s1")
    names = {"dice_all", "dice_positive", "dice_pooled", "dice_blank", "iou_pooled"}
    assert set(r["test"]) == names
    assert all(set(v) == {"mean", "std", "ci95"} for v in r["test"].values())
    assert r["test"]["dice_all"]["mean"] > r["test"]["dice_blank"]["mean"]


def test_segment_chooses_by_the_pooled_dice_of_validation():
    masks = torch.zeros(3, 8, 8, dtype=torch.uint8)
    masks[0, :4], masks[1, :1] = 1, 1
    logits = 9.0 * masks - 4
    logits[1] = -4  # the small one is missed, and one pixel found where there is none
    logits[2, 0, 0] = 4
    assert m.pooled_dice(logits, masks) == pytest.approx(2 * 32 / (33 + 40))
    assert m.pooled_dice(logits, masks, threshold=0.999) == 0
    assert m.pooled_dice(logits[1:2], 0 * masks[1:2]) == 1  # nothing to find and nothing found


@pytest.mark.parametrize("mode", ["frozen", "finetune"])
@pytest.mark.parametrize("task", ["classify", "segment"])
def test_the_labels_and_masks_of_the_test_set_decide_nothing(trained, monkeypatch, task, mode):
    """Strength, epoch and threshold come from validation: other test labels, the same outputs."""
    monkeypatch.chdir(trained)
    if not Path("data/other").exists():
        shutil.copytree("data/toy", "data/other")
        table = pd.read_csv("data/other/labels.csv")
        test = (table["split"] == "test").to_numpy()
        table.loc[test, ["A", "B"]] = 1 - table.loc[test, ["A", "B"]]
        table.to_csv("data/other/labels.csv", index=False)
        masks = np.load("data/other/masks.npy")
        masks[test] = 1 - masks[test]
        np.save("data/other/masks.npy", masks)
    states, predict = {}, m.predict
    for name in ("toy", "other"):
        seen = states[name] = []
        monkeypatch.setattr(m, "predict", lambda *a, **k: seen.append(predict(*a, **k)) or seen[-1])
        args = [task, "--data", name, "--size", "32", "--mode", mode, "--epochs", "2"]
        args += ["--weights", "runs/toy/encoder.pt", "--out", f"runs/{task}-{mode}-{name}"]
        assert m.main(args) == 0
        found = torch.from_numpy(unit(args[-1], 0, 0))
        if task == "classify":
            seen[:] = [found]
    assert len(states["toy"]) == len(states["other"]) > 0
    assert all(map(torch.equal, states["toy"], states["other"]))
    results = [json.loads(Path(f"runs/{task}-{mode}-{n}/results.json").read_text()) for n in states]
    assert results[0]["test"] != results[1]["test"]


def test_the_strength_of_the_probe_is_the_best_on_validation():
    torch.manual_seed(0)
    x, x_val = torch.randn(60, 30), torch.randn(400, 30)
    truth = lambda z: (z[:, :1] > 0).float()  # noqa: E731
    y, strengths, chosen = truth(x), (30.0, 1.0, 1e-4), set()
    y[::5] = 1 - y[::5]  # noise, which weak regularisation learns by heart
    for given in ((x_val, truth(x_val)), (x, y)):  # asks for the signal, or for noise by heart
        fits = [m.linear_probe(x, y, *given, strengths=(s,)) for s in strengths]
        scores = [
            m.auroc((given[0] @ w.T + b).numpy()[:, 0], given[1].numpy()[:, 0]) for w, b in fits
        ]
        weight, _ = m.linear_probe(x, y, *given, strengths=strengths)
        chosen.add(int(np.argmax(scores)))
        nearest = np.argmin([float((weight - w).norm()) for w, _ in fits])
        assert nearest == np.argmax(scores)
    assert len(chosen) == 2


def test_fine_tuning_ends_with_the_weights_of_its_best_epoch(trained):
    data = m.PreparedData("toy", trained / "data")
    model = m.Classifier(m.Encoder(context="none"), 2)
    scores, states, val = iter([0.6, 0.9, 0.7, 0.8, 0.99]), [], data.indices("val")

    def score(logits, labels):
        assert logits.shape == labels.shape and torch.equal(labels, data.labels[val])
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        return next(scores)

    config = m.ClassifyConfig(size=32, epochs=9, batch_size=8, lr=1e-3, patience=2, amp="off")
    given = (config, model, data.images, data.labels, torch.arange(8), val, 1.0)
    m.fit(*given, m.masked_bce, score, ("best",))
    assert len(states) == 4  # two epochs without a better score
    assert all(torch.equal(v, states[1][k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "flags",
    [
        "--backbone resnet50 --context none",
        "--context side --levels 2,5 --attention channel",
        "--context inline",
    ],
)
def test_every_encoder_that_pretrain_writes_can_be_judged(place, flags):
    assert run_pretrain(*flags.split(), "--epochs", "1") == 0
    for task, mode, name in (
        ("classify", "finetune", "mean_auroc"),
        ("segment", "frozen", "dice_pooled"),
    ):
        r = evaluate(task, "--mode", mode, "--epochs", "1", "--out", f"runs/{task}")
        assert 0 <= r["test"][name]["mean"] <= 1


def test_predict_gives_the_models_probabilities_of_every_kind_of_file(place, capsys):
    rng, raw = np.random.default_rng(0), place / "raw"
    raw.mkdir()
    for k in range(40):
        image = np.kron(rng.integers(1, 255, (8, 8)), np.ones((9, 9))).astype(np.uint8)
        image[:9, :9], image[-9:, -9:] = 0, 255  # what DICOM files are stretched to
        Image.fromarray(image).save(raw / f"i{k:02d}.png")
    rows = [f"i{k:02d}.png,{k % 2}" for k in range(40)]
    write(raw / "labels.csv", "image,F", *rows)
    prep("folder", "--raw", raw, "--csv", "labels.csv", "--out", "data/mine", "--size", 64)
    args = ["classify", "--data", "mine", "--size", "32", "--out", "runs/mine"]
    assert m.main(args) == 0
    new = place / "new"
    new.mkdir()
    shutil.copy(raw / "i00.png", new / "a.png")
    picture = np.asarray(Image.open(raw / "i01.png"))
    Image.fromarray(picture).save(new / "b.jpg", quality=100)
    save_dicom(picture, new / "c.dcm")
    shutil.copy(new / "c.dcm", new / "e")  # found by what it holds
    (new / "d.png").write_bytes((raw / "i02.png").read_bytes()[:200])
    capsys.readouterr()
    args = ["predict", "new", "--weights", "runs/mine/classifier.pt"]
    assert m.main([*args, "--out", "scores.csv"]) == 0
    assert "d.png" in capsys.readouterr().err
    found = pd.read_csv("scores.csv", index_col="image")["F"]
    found.index = found.index.str.removeprefix("new/")
    assert list(found.index) == ["a.png", "b.jpg", "c.dcm", "e"] and found["e"] == found["c.dcm"]
    data, state = m.PreparedData("mine"), m.load_checkpoint("runs/mine/classifier.pt")
    model = m.Classifier(m.Encoder(**state["arch"]), 1)
    model.load_state_dict(state["classifier"])
    rows = torch.tensor([list(data.names).index(f"i0{k}.png") for k in (0, 1, 1)])
    expected = m.predict(model, data.images, rows, 32).sigmoid()[:, 0]
    assert np.allclose(found[["a.png", "c.dcm"]], expected[[0, 2]], atol=1e-5)
    assert abs(found["b.jpg"] - expected[1]) < 0.05 and expected.std() > 1e-4
    # Files by name, one of them of no text encoding; what is there is not replaced unasked.
    odd = os.fsdecode(b"new/M\xfcller.png")
    shutil.copy("new/a.png", odd)
    files = ["predict", odd, "new/c.dcm", "--weights", "runs/mine/classifier.pt"]
    assert "scores.csv exists" in refused(capsys, *files, "--out", "scores.csv")
    assert m.main([*files, "--out", "scores.csv", "--overwrite"]) == 0
    again = pd.read_csv("scores.csv", index_col="image", encoding_errors="surrogateescape")["F"]
    assert dict(again) == {odd: found["a.png"], "new/c.dcm": found["c.dcm"]}
    assert "absent.png" in refused(capsys, "predict", "absent.png", *args[2:])


@pytest.mark.parametrize("mode", ["frozen", "finetune"])
def test_a_finding_that_training_shows_in_one_class_is_undefined(trained, monkeypatch, mode):
    monkeypatch.chdir(trained)
    if not Path("data/rare").exists():
        shutil.copytree("data/toy", "data/rare")
        table = pd.read_csv("data/rare/labels.csv")
        table.loc[table["split"] == "train", "A"] = 0
        table.to_csv("data/rare/labels.csv", index=False)
    args = ("--data", "rare", "--mode", mode, "--epochs", "1", "--out", f"runs/rare-{mode}")
    test = evaluate("classify", *args)["test"]
    assert test["per_finding"]["A"]["auroc"]["mean"] is None
    assert test["per_finding"]["A"]["average_precision"] is None
    assert test["defined_findings"] == 1
    assert test["mean_auroc"]["mean"] == test["per_finding"]["B"]["auroc"]["mean"]


def test_validation_images_of_one_class_cannot_choose(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    shutil.copytree("data/toy", "data/single")
    table = pd.read_csv("data/single/labels.csv")
    table.loc[table["split"] == "val", ["A", "B"]] = 1
    table.to_csv("data/single/labels.csv", index=False)
    args = ("classify", "--data", "single", "--size", 32, "--out", "runs/single")
    assert "both classes in the validation images" in refused(capsys, *args)


def test_segment_without_masks_is_refused(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    if not Path("data/bare").exists():
        shutil.copytree("data/toy", "data/bare")
        Path("data/bare/masks.npy").unlink()
    assert "masks.npy" in refused(capsys, "segment", "--data", "bare", "--out", "runs/m")


def test_image_and_mask_move_together():
    images = torch.zeros(8, 64, 64, dtype=torch.uint8)
    images[:, 10:30, 12:40] = 255
    masks = (images > 0).to(torch.uint8)
    for size in (64, 40):
        views = m.RandomViews(size, crop_min=0.7, jitter=0, blur=0, solarize=0, rotation=15)
        x, moved = m.augment(images, masks, views, m.generator("move"))
        assert x.shape == moved.shape == (8, size, size) and set(moved.unique().tolist()) == {0, 1}
        assert ((x > 0.5).float() - moved).abs().mean() < 0.01
    labels = torch.rand(8, 3)
    alone, same = m.augment(images, labels, views, m.generator("move"))
    assert same is labels and torch.equal(alone, x)
    where = [tuple(mask.nonzero().float().mean(0).tolist()) for mask in moved]
    assert len(set(where)) == 8  # they did move, each in its own way


@pytest.mark.parametrize("source, size", [(128, 48), (256, 64), (64, 96), (96, 96)])
def test_masks_and_images_have_the_same_geometry(source, size):
    """Centres of mass coincide to a tenth of a source pixel, in evaluation and in training."""
    rng = np.random.default_rng(0)
    images = torch.zeros(300, source, source, dtype=torch.uint8)
    corners = rng.integers(0, source // 2, (300, 2))
    sides = rng.integers(source // 8, source // 2, (300, 2))
    for image, (top, left), (height, width) in zip(images, corners, sides, strict=True):
        image[top : top + height, left : left + width] = 255
    masks = (images > 0).to(torch.uint8)
    where = (torch.arange(size) + 0.5) * source / size
    exact = torch.from_numpy(corners + sides / 2).T

    def shift(x):  # mean distance of the centres of mass, in source pixels
        centre = torch.stack([x.sum(2) @ where, x.sum(1) @ where]) / x.sum((1, 2))
        return (centre - exact).mean(1).abs().max()

    views = m.RandomViews(size, crop_min=1, flip=0, jitter=0, blur=0, solarize=0)
    x, mask = m.augment(images, masks, views, m.generator("still"))
    assert shift(x) < 0.1 and shift(mask) < 0.1
    assert shift(m.resize_images(images, size)) < 0.1
    assert shift((m.resize_images(255 * masks, size) > 0.5).float()) < 0.1
    if size < source:  # the control: torch's default samples at the corners of cells
        assert shift(F.interpolate(masks[:, None].float(), size)[:, 0]) > 0.5


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
    x, kept = torch.randn(2, 3, 64, 64), []
    cam = m.gradcam(model, x, 1)
    assert cam.shape == (2, 64, 64) and 0 <= cam.min() and cam.max() <= 1 and not cam.requires_grad
    pooled = model.encoder.context["5"] if context == "inline" else model.encoder.layer4
    pooled.register_forward_hook(lambda module, inputs, output: kept.append(output))
    grad = torch.autograd.grad(model(x)[:, 1].sum(), kept[0])[0]
    expected = F.relu((grad.mean((2, 3), keepdim=True) * kept[0]).sum(1, keepdim=True)).detach()
    expected = F.interpolate(expected, size=64, mode="bilinear", align_corners=False)[:, 0]
    assert expected.amax((1, 2)).gt(0).all()
    assert torch.allclose(cam, expected / expected.amax((1, 2), keepdim=True), atol=1e-4)


def test_overlap_of_pretraining_and_test_pictures_is_said(capsys):
    for seen, judged, warns in (
        (["nih"], "rsna", True), (["chestmnist"], "siim", True), (["nih"], "chestmnist", True),
        (["rsna"], "siim", True), (["siim"], "nih", True), (["vinbig"], "nih", False),
        (["chestmnist"], "nih", True), (["nih"], "nih", False), (["nih"], "vinbig", False),
        (["demo"], "siim", False),
    ):  # fmt: skip
        m.warn_overlap(seen, judged)
        assert ("warning" in capsys.readouterr().err) == warns


def test_overlap_is_found_whatever_the_folders_are_called(place, capsys):
    for name, command in (("toy", "nih"), ("mine", "rsna")):
        if name != "toy":
            write_set(place / "data" / name)
        path = Path("data", name, "meta.json")
        meta = json.loads(path.read_text()) | {"options": {"command": command}}
        path.write_text(json.dumps(meta))
    assert run_pretrain("--epochs", "1") == 0
    given = ["--size", "32", "--weights", "runs/toy/encoder.pt", "--epochs", "1"]
    for verb in ("classify", "segment"):
        assert m.main([verb, "--data", "toy", *given]) == 0
        assert "warning" not in capsys.readouterr().err
        assert m.main([verb, "--data", "mine", *given]) == 0
        assert "rsna holds NIH images, as nih does" in capsys.readouterr().err


# ---------------------------------------------------------------- 12. command line


def test_export_fits_torchvision_and_refuses_to_drop_blocks_silently(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    assert run_pretrain("--context", "inline", "--epochs", "1", out="runs/inline") == 0
    args = ["export", "--weights", "runs/inline/encoder.pt", "--out", "plain.pth"]
    assert "--drop-context" in refused(capsys, *args)
    assert m.main([*args, "--drop-context"]) == 0
    missing = torchvision.models.resnet18().load_state_dict(
        torch.load("plain.pth", weights_only=True), strict=False
    )
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    assert "exists" in refused(capsys, *args, "--drop-context")
    assert m.main(["export", "--weights", "runs/toy/encoder.pt", "--out", "side.pth"]) == 0
    plain = torchvision.models.resnet18().eval()
    plain.load_state_dict(torch.load("side.pth", weights_only=True), strict=False)
    plain.fc = torch.nn.Identity()
    encoder, x = m.load_encoder("runs/toy/encoder.pt")[0].eval(), torch.randn(2, 3, 64, 64)
    assert torch.allclose(plain(x), encoder(x)[0], atol=1e-5)


@pytest.mark.parametrize("error", [TypeError, AttributeError])  # Windows; another C library
def test_memory_is_kept_where_glibc_is_and_elsewhere_nothing_happens(error, monkeypatch):
    calls = []

    class Library:
        def mallopt(self, option, value):
            calls.append((option, value))

    monkeypatch.setattr(m.ctypes, "CDLL", lambda name: Library())
    m.keep_memory()
    assert calls == [(-3, 1 << 17), (-4, 0), (-1, -1)]

    def missing(name):
        raise error

    monkeypatch.setattr(m.ctypes, "CDLL", missing)
    m.keep_memory()
    assert len(calls) == 3


def test_literal_model_of_the_bench_equals_the_fast_one():
    torch.manual_seed(0)
    fast, literal = (form(8, context="inline").double() for form in (m.MLVICX, bench.LiteralMLVICX))
    literal.load_state_dict(fast.state_dict())
    views = torch.randn(2, 6, 3, 64, 64, dtype=torch.float64)
    definition, _ = m.mlvicx_loss(*literal(*views), covariance=m.covariance_literal)
    loss, _ = m.mlvicx_loss(*fast(*views))
    assert relative(definition.detach(), loss.detach()) < 1e-10


def test_what_torchrun_sets_alone_does_not_matter_and_evaluation_refuses_torchrun(
    place, monkeypatch, capsys
):
    monkeypatch.setenv("RANK", "3")
    assert run_pretrain("--epochs", "1") == 0
    assert "runs/toy/encoder.pt, frozen: mean" in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    line = refused(capsys, "classify", "--data", "toy", "--size", 32)
    assert "one process" in line and "torchrun" in line


def test_wrong_commands_are_one_line(place, capsys):
    assert "--help" in refused(capsys, "pretrain", "--no-such-flag")
    assert "--help" in refused(capsys, "dance")
    for device in ("abacus", "cuda:99", "mps:7"):
        assert "--device" in refused(capsys, "pretrain", "--data", "toy", "--device", device)
    assert "there is none" in refused(capsys, "export", "--weights", "absent.pt")


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


@pytest.mark.parametrize(
    "kind,depths",
    [(0, (1, 2, 4, 8, 16)), (2, (8, 16)), (3, (1, 2, 4, 8)), (4, (8, 16)), (6, (8, 16))],
)
def test_every_depth_and_colour_type_of_png_gives_its_full_range(kind, depths, tmp_path):
    for depth in depths:
        top = 2 ** min(depth, 8) - 1
        gray = scene().astype(int) * top // 255
        samples = gray * 16 + 3 if depth == 16 else gray  # twelve bits in sixteen
        samples = np.repeat(samples[..., None], {2: 3, 6: 3}.get(kind, 1), 2)
        if kind in (4, 6):  # an alpha channel, which is ignored
            noise = np.random.default_rng(1).integers(0, 2**depth, gray.shape)
            samples = np.dstack([samples, noise])
        palette = b""
        if kind == 3:
            samples = top - samples
            palette = b"".join(bytes([k * 255 // top] * 3) for k in range(top, -1, -1))
        save_png(tmp_path / "a.png", samples, depth, kind, palette)
        read = dp.read_xray(tmp_path / "a.png")
        assert read.dtype == np.uint8 and np.array_equal(read, gray * 255 // top), depth
    if kind == 2:
        for depth, level in ((8, 200), (16, 200 * 257)):
            samples = np.zeros((20, 20, 3), int)
            samples[0], samples[2:, :, 1] = 2**depth - 1, level
            save_png(tmp_path / "a.png", samples, depth, kind)
            # Luminance of green: 0.587.
            assert np.unique(dp.read_xray(tmp_path / "a.png")).tolist() == [0, 117, 255]


STORED = {  # EXIF orientation -> how a picture is stored that is to be shown as `a`
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a),  # to be turned clockwise
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_pictures_are_turned_as_their_exif_data_say(orientation, tmp_path):
    exif, right = Image.Exif(), scene()
    exif[0x112] = orientation
    stored = STORED[orientation](right)
    for name, pixels in (("a.png", stored), ("a.webp", stored), ("b.png", stored.astype("u2") * 9)):
        options = {"lossless": True} if name == "a.webp" else {}
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / name, exif=exif, **options)
        assert np.array_equal(dp.read_xray(tmp_path / name), right), name
    smooth = phantom(0)[:40]
    path = tmp_path / "a.jpg"
    Image.fromarray(np.ascontiguousarray(STORED[orientation](smooth))).save(path, exif=exif)
    assert np.abs(dp.read_xray(path).astype(int) - smooth).mean() < 5
    data = bytearray(path.read_bytes())  # damaged EXIF data do not cost the picture
    at = data.index(b"Exif") + 6
    data[at : at + 4] = b"????"
    path.write_bytes(data)
    assert dp.read_xray(path).shape == STORED[orientation](smooth).shape


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
    "WindowWidth": (["", 65535], [0, -1]),
    "VOILUTFunction": (["", "LINEAR", "LINEAR_EXACT"], ["CUBIC"]),
    "VOILUTSequence": ([[]], []),
    "ModalityLUTSequence": ([[]], []),
    "PixelPaddingValue": (["", 0, 2047], []),
    "PixelPaddingRangeLimit": (["", 0, 2047], []),
    "NumberOfFrames": (["", 0, 1], [2**31 - 1]),
    "PresentationLUTShape": (["", "IDENTITY"], []),
    "HighBit": ([11], []),
    "PhotometricInterpretation": ([], ["", "PALETTE COLOR"]),
    "BitsStored": ([16], [0, 17]),
    "SamplesPerPixel": ([], [0, 2]),
}


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", TAGS)
def test_optional_tags_of_dicom_leave_the_scene_or_are_refused(name, signed, photometric, tmp_path):
    import pydicom

    path, (same, refused_values) = tmp_path / "a.dcm", TAGS[name]
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
        with pytest.raises(ValueError, match="....."):
            dp.read_xray(path)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("window", [False, True])
def test_padding_of_dicom_is_black_and_the_rest_is_stretched_by_itself(
    window, photometric, tmp_path
):
    import pydicom

    path, right = tmp_path / "a.dcm", scene()
    right[:8] = 0
    for signed, fill, first, last in (
        (False, 65535, 65535, ""),
        (False, 65000, 65535, 60000),
        (False, 65000, 60000, 65535),
        (True, -32768, -32768, -32768),
        (True, -2000, -2000, ""),
    ):
        tags = dict(PixelPaddingValue=first, PixelPaddingRangeLimit=last, BitsStored=16)
        for ending in ("", ".1", ".4.70"):
            scene_dicom(path, signed, photometric, window, fill, ending, **tags)
            assert np.array_equal(dp.read_xray(path), right), (signed, fill, ending)
    ds = pydicom.dcmread(path)
    ds["PixelPaddingValue"] = pydicom.DataElement("PixelPaddingValue", "US", 2**16 - 2000)
    ds.save_as(path)  # the signed value, written as an unsigned one
    assert np.array_equal(dp.read_xray(path), right)
    pixels = np.minimum(scene(), 250)
    pixels[:8] = 255
    save_dicom(pixels, path, PixelPaddingValue=255)
    assert np.array_equal(dp.read_xray(path), np.where(pixels == 255, 0, pixels))
    save_dicom(np.full_like(pixels, 255), path, PixelPaddingValue=255)
    with pytest.raises(ValueError, match="every pixel is padding"):
        dp.read_xray(path)


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
    reason = "....." if ending == ".5" else "ends early"  # whatever the decoder takes
    for share in (0.1, 0.5, 0.9, 0.99, 1):
        ds.PixelData = encapsulate([frame[: int(share * len(frame))]])
        ds.save_as(path)
        with contextlib.nullcontext() if share == 1 else pytest.raises(ValueError, match=reason):
            dp.read_xray(path)


def test_other_files_are_rejected_with_a_reason(tmp_path):
    cases = {
        "zero.png": (b"", "not a PNG"),
        "page.png": (b"<!DOCTYPE html><html><body>404</body></html>", "not a PNG"),
        "text.dcm": (b"not at all a picture " * 30, "not a PNG"),
        "one.png": (np.zeros((1, 1), np.uint8), "1 x 1 pixels"),
        "thin.png": (np.zeros((15, 400), np.uint8), "400 x 15 pixels"),
        "white.png": (np.full((20, 20), 255, np.uint8), "one value"),
        "black.dcm": (np.full((20, 20), 9, np.uint16), "one value"),
        "deep.tif": (phantom(0).astype(np.uint16), "TIFF file of mode I;16"),
    }
    for name, (what, reason) in cases.items():
        path = tmp_path / name
        if isinstance(what, bytes):
            path.write_bytes(what)
        else:
            (save_dicom if name.endswith("dcm") else save)(what, path)
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


# ---------------------------------------------------------------- data_prep 2. demo phantoms


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
        assert np.abs(rates - place.prevalence).max() < 0.03
        patients = [patient for patient, *_ in cases]
        sizes = pd.Series(patients).value_counts()
        assert sizes.between(1, 5).all() and abs(sizes.mean() - 2.5) < 0.1
        runs = [name for name, _ in itertools.groupby(patients)]
        assert len(runs) == len(set(runs))  # consecutive
        bodies = {patient: body.heart for patient, body, *_ in cases}
        assert all(body.heart == bodies[patient] for patient, body, *_ in cases)


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


# ---------------------------------------------------------------- data_prep 3. tables and splits


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


# ---------------------------------------------------------------- data_prep 4. the prepared folder


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


COUNT = 2000  # enough that a signal comes before the end, on a machine that stalls for a second


def start_demo(out, *args, **kwargs):
    """A demo preparation of some seconds in a process of its own."""
    call = [sys.executable, str(SCRIPT), "demo", "--count", str(COUNT), "--size", "32"]
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
    prep("demo", "--count", COUNT, "--size", 32, "--out", out)
    return content(out)


def test_killed_again_and_again_and_resumed_the_bytes_are_the_same(whole_demo, tmp_path):
    out = tmp_path / "demo"
    for workers, rows in ((2, 100), (1, 300), (2, 550)):
        process = start_demo(out, "--workers", workers)
        wait_for_rows(out, rows)
        process.kill()
        process.communicate()  # ends only when the workers have gone, too
        assert process.returncode == -signal.SIGKILL and not out.exists()
    prep("demo", "--count", COUNT, "--size", 32, "--out", out)
    assert content(out) == whole_demo


def test_control_c_says_how_to_go_on_and_the_bytes_are_the_same(whole_demo, tmp_path):
    out = tmp_path / "demo"
    process = start_demo(out, "--workers", 2, start_new_session=True)
    wait_for_rows(out, 200)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: workers get it, too
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert errors.strip().splitlines() == ["stopped; the same command resumes from here"]
    kept = Path(f"{out}.partial", "progress.jsonl").read_bytes().count(b"\n")
    assert 200 < kept < COUNT and not out.exists()
    prep("demo", "--count", COUNT, "--size", 32, "--out", out)
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
    prep("demo", "--count", COUNT, "--size", 32, "--out", out)
    assert content(out) == whole_demo


def test_a_second_preparation_of_one_folder_is_refused(tmp_path, capsys):
    process = start_demo(tmp_path / "demo")
    wait_for_rows(tmp_path / "demo", 100)
    try:
        line = prep_refused(capsys, "demo", "--count", 9, "--out", tmp_path / "demo")
    finally:
        process.kill()
        process.communicate()
    assert "another process" in line


def test_workers_hold_no_torch_and_are_at_most_eight(tmp_path, monkeypatch):
    """As when mlvicx.py, which imports torch, draws the demo set."""
    write(
        tmp_path / "torch.py", "import os", "with open('log', 'a') as f:", "    f.write('torch ')"
    )
    lines = ["import torch, data_prep, sys", "if __name__ == '__main__':"]
    lines += ["    sys.exit(data_prep.main(sys.argv[1:]))"]
    main = write(tmp_path / "main.py", *lines)
    call = [sys.executable, main, "demo", "--count", 130, "--size", 32, "--out", "out"]
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    options = dict(capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120)
    done = subprocess.run([*map(str, call), "--workers", "2"], **options)
    assert done.returncode == 0 and (tmp_path / "log").read_text() == "torch "
    assert done.stdout.splitlines()[-1].startswith("out: {") and not done.stderr  # no bar
    for cores, workers in (({0, 3, 5}, 3), (set(range(192)), 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: cores)
        assert dp.parse(["demo"]).workers == workers


def test_preparing_needs_nothing_that_windows_and_macos_lack(tmp_path, monkeypatch):
    """No fcntl, no affinity, and processes that are spawned, not forked."""
    prep("demo", "--count", 130, "--size", 32, "--out", tmp_path / "one" / "demo")
    monkeypatch.setattr(dp, "fcntl", None)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "fork")
    args = ["demo", "--count", "130", "--size", "32", "--out", str(tmp_path / "two" / "demo")]
    assert dp.usable_cores() == os.cpu_count() and dp.main([*args, "--workers", "2"]) == 0
    assert content(tmp_path / "one" / "demo") == content(tmp_path / "two" / "demo")


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


# ---------------------------------------------------- data_prep 5. the datasets: folder


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
        "image,patient,split,mask,Mass,Edema,note,Sex",
        "a.png,1,train,a.png,1,0,hello,0",
        "b.jpg,1,train,b.png,0,,there,1",
        "c.JPEG,2,val,,0.0,1.0,,",
        "sub/d.png,3,test,,,1,,",
        "e.dcm,4,test,,1,1,x,",
        "images/f.dicom,5,test,gone.png,1,1,x,",
        "../table.csv,6,test,,1,1,x,",
    )
    args = ("folder", "--raw", "mine", "--csv", "table.csv", "--size", 64)
    assert "column 'note' holds ['hello']" in prep_refused(capsys, *args)
    prep(*args, "--findings", "Mass, Edema")
    images, labels, rejected, meta = prepared("data/mine")
    assert labels["image"].tolist() == ["a.png", "b.jpg", "c.JPEG", "sub/d.png", "e.dcm"]
    assert labels["patient"].tolist() == ["1", "1", "2", "3", "4"]
    assert labels["split"].tolist() == ["train", "train", "val", "test", "test"]
    assert meta["findings"] == ["Mass", "Edema"] and meta["split_rule"] == "as given"
    text = (tmp_path / "data/mine/labels.csv").read_text().splitlines()
    assert text[2].split(",")[3:5] == ["0", ""] and text[4].split(",")[3:5] == ["", "1"]
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
    assert len(labels) == 40 and meta["findings"] == []
    assert rejected["masks/i000.png"] == "no row in the table"
    assert rejected["labels.csv"].startswith("not a PNG") and len(rejected) == 2
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


def listed(raw, out, table):
    """Images and rejected files of a prepared folder, which must be all that are below `raw`."""
    labels = pd.read_csv(out / "labels.csv", dtype=str, keep_default_na=False)
    rejected = pd.read_csv(out / "rejected.csv", dtype=str).set_index("image")["reason"]
    named = {*rejected.index, *labels["image"], table}
    lost = [name for name in dp.Files(raw).paths if not {name, name.partition(".")[0]} & named]
    assert not lost
    return labels["image"].tolist(), rejected.to_dict()


def test_files_are_found_by_content_and_every_one_is_listed(tmp_path):
    raw, args = tmp_path / "raw", ("--size", 32, "--out", tmp_path / "out")
    for name in ("a.png", "b.tif", "c.bmp", "d.webp", "e.jpeg", "g.PNG"):
        save(phantom(0), raw / name)
    os.rename(raw / "e.jpeg", raw / "e.jfif")
    os.rename(save_dicom(phantom(1), raw / "h.dcm"), raw / "h")
    (raw / "i.dcm.gz").write_bytes(
        gzip.compress(save_dicom(phantom(2), raw / "i.dcm").read_bytes())
    )
    os.rename(raw / "i.dcm", raw / "1.2.840.10008")
    good = sorted(path.name for path in raw.iterdir())
    bad = {"README": b"words", "cut.dcm.gz": gzip.compress(bytes(99))[:-9], "deep.tif": b"II*\0"}
    bad.update({"._a.png": b"\0\5\x16\7", "odd.bin": b"\x1f\x8b"})
    for name, data in bad.items():
        (raw / name).write_bytes(data)
    (raw / "broken.png").symlink_to("nowhere.png")
    for name in ("notes.txt", "sub/more.pdf"):
        write(raw / name, "words")
    Path(os.fsdecode(os.fsencode(raw) + b"/M\xfcller.png")).write_bytes(
        (raw / "a.png").read_bytes()
    )
    prep("folder", "--raw", raw, *args)
    images, rejected = listed(raw, tmp_path / "out", None)
    assert images == sorted([*good, "M\\xfcller.png"])
    assert set(rejected) == {*bad, "broken.png", "notes.txt", "sub/more.pdf"}
    # The same with a table, and as the folder of another data set.
    write(raw / "labels.csv", "image,F", "a,1", "h,0", "i,1", "1.2.840.10008,0")
    prep("folder", "--raw", raw, "--csv", "labels.csv", *args, "--overwrite")
    assert listed(raw, tmp_path / "out", "labels.csv")[0] == ["a", "h", "i", "1.2.840.10008"]
    header = "patientId,x,y,width,height,Target"
    write(raw / "stage_2_train_labels.csv", header, "h,,,,,0", "1.2.840.10008,,,,,0")
    prep("rsna", "--raw", raw, *args, "--overwrite")
    images, _ = listed(raw, tmp_path / "out", "stage_2_train_labels.csv")
    assert images == ["h", "1.2.840.10008"]


def test_linked_folders_are_followed_but_not_in_a_circle(tmp_path):
    raw_folder(tmp_path / "real", n=4)
    link = tmp_path / "link"
    link.mkdir()
    (link / "images").symlink_to("../real/images")
    (tmp_path / "real" / "images" / "back").symlink_to("..")
    prep("folder", "--raw", link, "--out", tmp_path / "out", "--size", 32)
    assert len(prepared(tmp_path / "out")[0]) == 4
    raw = raw_nih(tmp_path / "nih")
    os.rename(raw / "images_001", tmp_path / "elsewhere")
    (raw / "images_001").symlink_to("../elsewhere")
    prep("nih", "--raw", raw, "--out", tmp_path / "nih_out", "--size", 48)
    check_nih(tmp_path / "nih_out")


def test_labels_that_are_uncertain_or_spelled_out(tmp_path, capsys):
    raw = raw_folder(tmp_path / "raw", n=8)
    cells = ["1", "0", "", "-1", "True", "FALSE", "nan", "-1.0"]
    rows = [f"i{k:03d}.png,{cell},{k % 2},{3 * k}" for k, cell in enumerate(cells)]
    write(raw / "labels.csv", "image,Edema,Sex,Age", *rows)
    args = ("folder", "--raw", raw, "--csv", "labels.csv", "--size", 32, "--out", tmp_path / "out")
    line = prep_refused(capsys, *args)
    assert "column 'Age' holds ['3']" in line and "--findings" in line
    assert "no column 'Oedema'" in prep_refused(capsys, *args, "--findings", "Oedema")
    for flags, shown in (((), ["", ""]), (("0",), ["0", "0"]), (("1",), ["1", "1"])):
        flags = ("--uncertain", *flags) if flags else ()
        prep(*args, "--findings", "Edema", "--overwrite", *flags)
        table = pd.read_csv(tmp_path / "out" / "labels.csv", dtype=str, keep_default_na=False)
        assert [c for c in table if c not in ("image", "patient", "split")] == ["Edema"]
        assert table["Edema"].tolist() == ["1", "0", "", shown[0], "1", "0", "", shown[1]]
    write(raw / "labels.csv", "image,Edema", *[row.split(",")[0] + "," for row in rows])
    assert "column 'Edema' holds nothing" in prep_refused(capsys, *args, "--overwrite")


def test_ids_that_look_like_missing_values_stay_themselves(tmp_path):
    raw, ids = raw_folder(tmp_path / "raw", n=12), ["NA", "None", "nan", "null", "007", "N/A"]
    rows = [f"i{k:03d}.png,{ids[k // 2]},{k % 2}" for k in range(12)]
    write(raw / "labels.csv", "image,patient,F", *rows)
    prep("folder", "--raw", raw, "--csv", "labels.csv", "--size", 32, "--out", tmp_path / "out")
    lines = (tmp_path / "out" / "labels.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines[1:]] == np.repeat(ids, 2).tolist()
    assert dp.verify(tmp_path / "out") == []


def test_names_in_another_form_are_found_where_they_mean_one_file(tmp_path, capsys):
    raw, args = tmp_path / "raw", ("--size", 32, "--out", tmp_path / "out")
    for name in ("a.png", "b.png", "e\u0301t\u00e9.png", "x/d.png", "y/d.png", "z/e.dcm.png"):
        save(phantom(len(name)), raw / "images" / name)
    names = ["./a.png", "b", "\u00e9te\u0301", "d", "x\\d", "e.dcm", "../a.png"]
    write(raw / "labels.csv", "image,F", *[f"{name},{k % 2}" for k, name in enumerate(names)])
    prep("folder", "--raw", raw, "--csv", "labels.csv", *args)
    _, labels, rejected, _ = prepared(tmp_path / "out")
    assert labels["image"].tolist() == [names[k] for k in (0, 1, 2, 4)]
    assert rejected["d"] == "several files: ['images/x/d.png', 'images/y/d.png']"
    write(raw / "labels.csv", "image,F", "a,1", "a.png,1")
    line = prep_refused(capsys, "folder", "--raw", raw, "--csv", "labels.csv", *args, "--overwrite")
    assert "two images of the table are one file, images/a.png" in line
    write(raw / "labels.csv", "image,F", "q1,1", "q2,0")
    line = prep_refused(capsys, "folder", "--raw", raw, "--csv", "labels.csv", *args, "--overwrite")
    assert "none of 2 images has a file: the table names ['q1'], a file" in line
    assert "images/a.png" in line


def test_boxes_beside_the_table_of_a_folder_are_scaled(tmp_path, capsys):
    raw = raw_folder(tmp_path / "raw", n=4, size=64)
    args = ("folder", "--raw", raw, "--csv", "labels.csv", "--size", 32, "--out", tmp_path / "out")
    header = "image,finding,x,y,width,height,reader"
    write(raw / "boxes.csv", header, "i001.png,F,10,20,30,40,R1", "i003.png,F,0,0,64,64,R2")
    prep(*args)
    boxes = pd.read_csv(tmp_path / "out" / "boxes.csv")
    expected = [["i001.png", "F", 5, 10, 15, 20], ["i003.png", "F", 0, 0, 32, 32]]
    assert boxes.values.tolist() == expected and list(boxes) == dp.BOX
    for row in ("i009.png,F,1,2,3,4,R", "i001.png,F,1,2,,4,R"):
        write(raw / "boxes.csv", header, row)
        assert "boxes.csv: a box without" in prep_refused(capsys, *args, "--overwrite")


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


def test_a_truncated_archive_is_refused_and_complete_it_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dp, "BATCH", 1)  # what came before the fault is kept
    raw = raw_nih(tmp_path / "raw", archives=True)
    prep("nih", "--raw", raw, "--out", tmp_path / "whole" / "out", "--size", 48)
    archive = raw / "images_004.tar.gz"
    whole = archive.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"<html>404</html>"):
        archive.write_bytes(data)
        line = prep_refused(
            capsys, "nih", "--raw", raw, "--out", tmp_path / "out", "--size", 48, "--workers", 1
        )
        assert "images_004.tar.gz: missing, damaged" in line and not (tmp_path / "out").exists()
        journal = (tmp_path / "out.partial" / "progress.jsonl").read_text()
        assert len(journal.splitlines()) == 1 + 2  # the plan and two pictures
    archive.write_bytes(whole)
    prep("nih", "--raw", raw, "--out", tmp_path / "out", "--size", 48)
    check_nih(tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole" / "out")


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


# ---------------------------------------------------- data_prep 5. the datasets: ChestMNIST


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


# ---------------------------------------------------- data_prep 5. the datasets: RSNA and SIIM


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
    assert labels["image"].tolist() == [f"id-{k:03d}" for k in range(30)]
    assert rejected == {
        "stage_2_test_images/id-900.dcm": "no row in the table",
        "stage_2_detailed_class_info.csv": "no row in the table",
    }
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
    assert rejected["stage_2_train_images/stray.dcm"] == "no row in the table"
    assert rejected["../id-001"] == "file not found" and len(rejected) == 4
    shutil.copytree(raw / "stage_2_train_images", raw / "copy")
    assert "id-000, several files: ['copy/id" in prep_refused(capsys, *args, tmp_path / "two")


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
    assert [*rejected.values()] == ["no row in the table"] and "1.2.6.1.1.dcm" in [*rejected][0]
    assert labels["split"].tolist() == [dp.hash_split(i, dp.BY_IMAGE) for i in labels["image"]]
    expected = [blobs(k)[0] for k in range(6)]
    expected[0], expected[1] = np.zeros((64, 64)), np.logical_or(*blobs(1))
    assert np.array_equal(masks, np.array(expected, np.uint8))
    assert np.logical_and(*blobs(1)).any()  # the rows do overlap: a sum would be another mask
    assert all(np.abs(images[k].astype(int) - phantom(k)).mean() < 2 for k in range(6))
    assert meta["findings"] == ["Pneumothorax"]


@pytest.mark.parametrize("command,make", [("rsna", raw_rsna), ("siim", raw_siim)])
def test_a_table_of_patients_makes_the_split_one_by_patient(command, make, tmp_path, capsys):
    raw, out = make(tmp_path / "raw", n=16), tmp_path / "out"
    args = (command, "--raw", raw, "--size", 64, "--out", out)
    prep(*args)
    _, labels, _, meta = prepared(out)
    assert "a patient with several images may be in several splits" in meta["split_rule"]
    rows = [f"{name},p{k // 4}" for k, name in enumerate(labels["image"])]
    table = write(tmp_path / "who.csv", "image,patient", *rows, "elsewhere,p9")
    prep(*args, "--patients", table, "--overwrite")
    _, labels, _, meta = prepared(out)
    assert labels["patient"].tolist() == [f"p{k // 4}" for k in range(len(rows))]
    assert labels["split"].tolist() == [dp.hash_split(p) for p in labels["patient"]]
    assert "by patient" in meta["split_rule"] and "who.csv" in meta["sources"]
    write(table, "image,patient", *rows[1:])
    line = prep_refused(capsys, *args, "--patients", table, "--overwrite")
    assert "no row for 1 images" in line and rows[0].split(",")[0] in line


def test_siim_rows_without_sense_are_named(tmp_path, capsys):
    raw = raw_siim(tmp_path / "raw")
    path, args = raw / "train-rle.csv", ("siim", "--raw", raw, "--size", 64, "--out")
    lines = path.read_text().splitlines()
    for row in ("1.2.0.1.1, 1 5", "1.2.2.1.1,-1", "1.2.3.1.1,"):
        write(path, *lines, row)
        line = prep_refused(capsys, *args, tmp_path / "out")
        assert row[:9] in line and "has a blank, or both -1 and a region" in line
    write(path, *lines, "../1.2.0.1.1,-1")
    assert "first ../1.2.0.1.1" in prep_refused(capsys, *args, tmp_path / "out")
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


# ---------------------------------------------------- data_prep 5. the datasets: VinBig

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
    assert labels["image"].tolist() == list(VINBIG_VOTES)
    assert rejected == {"test/hidden.dicom": "no row in the table"}
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


def raw_physionet(root, n=8):
    """PhysioNet's files: a column a finding, three readers in train and a consensus in test."""
    findings = [*dp.VINBIG_FINDINGS[:9], "Other lesion", "COPD", "Pneumonia"]
    for split, other, readers in (("train", "Other diseases", 3), ("test", "Other disease", 1)):
        labels = [
            ",".join(["image_id", *["rad_id"] * (readers > 1), *findings, other, "No finding"])
        ]
        boxes = ["image_id,rad_id,class_name,x_min,y_min,x_max,y_max"]
        for k in range(n):
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
def test_vindr_of_physionet_has_image_labels_and_the_official_test_set(readers, tmp_path, capsys):
    raw = raw_physionet(tmp_path / "raw")
    args = ("vinbig", "--raw", raw, "--size", 32, "--readers", readers)
    prep(*args, "--out", tmp_path / "out")
    dp.verify(tmp_path / "out")
    shown = capsys.readouterr().out  # Kaggle's counts are of other findings
    assert "COPD" in shown and not re.search("\\b(15000|3067|2346)\\b", shown)
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
    # A byte-order mark and a reader's row twice cost nothing.
    path.write_text("\ufeff" + sound + sound.splitlines()[4] + "\n")
    prep("vinbig", "--raw", raw, "--out", tmp_path / "sound", "--size", 32)
    assert prepared(tmp_path / "sound")[1]["Cardiomegaly"].tolist() == [0, 0, 1, 0, 0]
    os.remove(path)
    assert "annotations_train.csv" in prep_refused(capsys, *args)
    raw = raw_physionet(tmp_path / "physionet")
    labels = raw / "annotations" / "image_labels_test.csv"
    labels.write_text(labels.read_text().replace("test3,0", "test3,2"))
    line = prep_refused(capsys, "vinbig", "--raw", raw, "--out", tmp_path / "out")
    assert "expected 0 or 1 in every finding" in line


# ---------------------------------------------------- data_prep 5. the datasets: fuzz


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


# ---------------------------------------------------------------- data_prep 6. downloads


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
    with pytest.raises(dp.PrepError, match="496 of 1,000 bytes came; the same command resumes"):
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
    assert dp.NIH_ARCHIVES[11] in line and "the same command resumes" in line
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


# ---------------------------------------------------------------- data_prep 7. verify


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
    table = {line[:20].strip(): line[20:].split() for line in lines[1:]}
    labels = prepared(tmp_path / "nih")[1]
    for name, chosen in (("images", labels), ("Hernia", labels[labels["Hernia"] == 1])):
        counts = [(chosen["split"] == split).sum() for split in dp.SPLITS]
        assert table[name] == [*map(str, counts), str(len(chosen))]
    assert len(table) == 15


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


def test_verify_finds_one_picture_under_two_names(tmp_path, capsys):
    raw = tmp_path / "raw"
    for k in range(6):
        save(phantom(k), raw / f"{k}.png")
    shutil.copy(raw / "0.png", raw / "same.png")
    shutil.copy(raw / "1.png", raw / "twin.png")
    rows = ["0.png,train", "1.png,train", "2.png,val", "3.png,test", "4.png,train", "5.png,test"]
    table = raw / "labels.csv"
    write(table, "image,split", *rows, "same.png,train", "twin.png,train")
    args = ("folder", "--raw", raw, "--csv", "labels.csv", "--size", 64, "--out", tmp_path / "out")
    prep(*args)
    capsys.readouterr()
    assert dp.main(["verify", str(tmp_path / "out")]) == 0  # within one split: only said
    said = capsys.readouterr().out
    assert "one picture under several names: 0.png (train), same.png (train)" in said
    rewrite(raw, "labels.csv", lambda text: text.replace("same.png,train", "same.png,test"))
    prep(*args, "--overwrite")
    line = prep_refused(capsys, "verify", tmp_path / "out")
    assert "one picture in two splits: 0.png (train), same.png (test) (1 problem(s))" in line


# ---------------------------------------------------------------- data_prep 8. command line


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
        (["folder", "--raw", "nowhere"], "No such file or directory: 'nowhere'"),
        (["verify"], "folder"),
    ):
        assert message in prep_refused(capsys, *args), args
    assert not list(tmp_path.iterdir())


def test_every_option_of_every_preparation_is_in_its_help(capsys):
    options = {
        "demo": "--site --count --seed",
        "folder": "--raw --csv --findings --uncertain",
        "nih": "--raw --allow-missing --download",
        "chestmnist": "--raw --download",
        "rsna": "--raw --patients --allow-missing",
        "siim": "--raw --patients --allow-missing",
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


# ---------------------------------------------------------------- data_prep 9. load


def many_nih(root, archives):
    """NIH's files of twelve patients."""
    names = [f"{k:08d}_000.png" for k in range(1, 13)]
    rows = [(n, "Mass" if k % 2 else "No Finding", "train") for k, n in enumerate(names)]
    return raw_nih(root, archives, rows=rows, boxes=False, size=48)


def raw_npz(root):
    """ChestMNIST's file in a folder; the file."""
    raw_chestmnist(root / "chestmnist_64.npz", 64)
    return root / "chestmnist_64.npz"


@pytest.mark.parametrize(
    "command,make,flags",
    [
        ("nih", lambda root: many_nih(root, False), []),
        ("nih", lambda root: many_nih(root, True), []),
        ("chestmnist", raw_npz, []),
        ("rsna", lambda root: raw_rsna(root, n=16), []),
        ("siim", lambda root: raw_siim(root, True, n=16), []),
        ("siim", lambda root: raw_siim(root, False, "stage_2_train.csv", n=16), []),
        ("vinbig", raw_vinbig, ["--readers", "any"]),
        ("vinbig", lambda root: raw_physionet(root, n=12), []),
        ("folder", lambda root: raw_folder(root, n=24), ["--csv", "labels.csv"]),
    ],
)
def test_every_prepared_dataset_can_be_trained_on(command, make, flags, tmp_path):
    raw, out, run = make(tmp_path / "raw"), tmp_path / "data" / command, tmp_path / "run"
    prep(command, "--raw", raw, "--out", out, "--size", 48, *flags)
    assert dp.main(["verify", str(out)]) == 0 or command == "vinbig"
    size = 4 if (prepared(out)[1]["split"] == "train").sum() >= 4 else 2
    small = ["--batch-size", size, "--epochs", 1, "--size", 32, "--embedding-dim", 8]
    args = ["pretrain", "--data", out, "--out", run, "--device", "cpu", *small]
    assert m.main([*map(str, args)]) == 0
    assert (run / "encoder.pt").is_file()
    losses = pd.read_csv(run / "metrics.csv")["loss"]
    assert len(losses) and np.isfinite(losses).all()


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


# ---------------------------------------------------------------- data_prep 10. real files


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
    if readers == "any":
        assert (table[dp.VINBIG_FINDINGS].sum(axis=1) == 0).sum() == 10_606
    rows = pd.read_csv(tmp_path / "train.csv")
    none = rows["class_name"] == "No finding"
    assert len(rows) == 67_914 and rows["rad_id"].nunique() == 17
    assert (rows.groupby("image_id")["rad_id"].nunique() == 3).all()
    assert rows["x_min"].isna().eq(none).all()
    assert set(rows["image_id"][none]).isdisjoint(rows["image_id"][~none])
    assert rows["image_id"][none].nunique() == 10_606


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


# ---------------------------------------------------------------- the text


def sources():
    return {p.name: p.read_text() for p in (HERE / "mlvicx.py", HERE / "data_prep.py")}


def test_components_can_be_lifted_out():
    text = (HERE / "mlvicx.py").read_text()
    tree = {
        n.name: ast.get_source_segment(text, n) for n in ast.parse(text).body if hasattr(n, "name")
    }
    head = (
        "import math, torch, torchvision\nimport torch.nn.functional as F\nfrom torch import nn\n"
        "import functools\n"
    )
    head += "from dataclasses import dataclass\nLEVELS = (1, 2, 3, 4, 5)\n"
    head += "IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)\n"
    parts = {
        "ContextBottleneck": "ContextBottleneck(4)(torch.randn(2, 4, 5, 5))",
        "LocalProjector": "LocalProjector((4,), 8, hidden=4)([torch.randn(2, 4, 5, 5)])",
        "Encoder": "Encoder()(torch.randn(2, 3, 32, 32))",
        "MLVICX": "MLVICX(embedding_dim=8)(*torch.randn(2, 2, 3, 32, 32))",
        "vicreg_loss": "vicreg_loss(*torch.randn(2, 4, 8))",
        "LARS": "LARS([nn.Parameter(torch.ones(2, 2))]).step()",
        "Segmenter": "Segmenter(Encoder(), frozen=True)(torch.randn(2, 3, 32, 32))",
        "RandomViews": "RandomViews(8)(torch.ones(2, 9, 9).byte(), torch.Generator())",
        "resize_matrix": "resize_matrix(torch.zeros(1), torch.ones(1) * 9, 9, 5)",
    }
    for name, use in parts.items():
        needed, queue = [], [name]
        while queue:
            part = queue.pop()
            needed.insert(0, part)
            doc = re.search(r"Needs: ([\w, ]+)", tree[part])
            queue += doc.group(1).split(", ") if doc else []
        order = [n for n in tree if n in needed]
        decorated = {"RandomViews": "@dataclass\n"}
        exec(head + "\n".join(decorated.get(n, "") + tree[n] for n in order) + "\n" + use, {})


def test_readme_lists_exactly_the_deviations():
    tags = []
    for line in (HERE / "mlvicx.py").read_text().splitlines():
        if line.strip().startswith("# Deviation:"):
            tags.append(line.split("# Deviation:")[1].strip())
    readme = (HERE / "README.md").read_text()
    section = readme.split("## Differences from the authors' code")[1].split("\n## ")[0]
    listed = re.findall(r"^- \*\*(.+?)\*\*", section, re.M)
    assert sorted(listed) == sorted(tags) and len(tags) >= 5


def test_readme_names_only_tests_that_exist():
    named = set(re.findall(r"`(test_\w+)`", (HERE / "README.md").read_text()))
    assert len(named) >= 5 and named <= set(globals())
    faults = {name[:11] for name in globals() if name.startswith("test_fault")}
    assert faults == {f"test_fault{k}" for k in range(1, 10)}


def spread(values):
    """Mean ± standard deviation, as the tables give it."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def table_rows(text, title):
    """The cells of the first table after a title: first cell of each row -> the others."""
    lines = text.split(title)[1].split("\n|---")[1].split("\n\n")[0].splitlines()[1:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in rows}


def test_the_tables_of_the_study_are_those_of_its_logs():
    results = HERE / "notebooks" / "results"
    text = (results / "RESULTS.md").read_text()
    summary = json.loads((results / "nih" / "summary.json").read_text())
    made = set(experiments.markdown(summary))
    quoted = []
    for line in text.split("## The study")[1].split("\n## ")[0].splitlines():
        if line.startswith("| ") and re.search(r"\d\.\d{3}", line):
            quoted.append(line)
    assert len(quoted) > 50 and set(quoted) <= made

    # The summary is that of the units: subsets of the labels averaged, then seeds.
    found = {}
    for unit in json.loads((results / "nih" / "units.json").read_text()):
        for row in unit.get("rows", []):
            cell = tuple({**row, **unit}[name] for name in experiments.CELL)
            found.setdefault(cell, {}).setdefault(unit["seed"], []).append(row["test"])
    index = {}
    for row in summary:
        if row["measure"] == "test":
            index[tuple(row[name] for name in experiments.CELL)] = row
    assert set(index) == set(found) and len(found) > 100
    for cell, seeds in found.items():
        each = [np.mean(seeds[seed]) for seed in sorted(seeds)]
        assert np.allclose(index[cell]["each"], each, atol=2e-5), cell
        assert len(each) == 1 or abs(np.std(each, ddof=1) - index[cell]["std"]) < 2e-5


def test_the_other_tables_are_those_of_their_logs():
    results = HERE / "notebooks" / "results"
    text = (results / "RESULTS.md").read_text()
    # The pilot: test AUROC of three pre-trainings, and fine-tuning from another list.
    pilot = json.loads((results / "nih" / "pilot.json").read_text())
    shown = table_rows(text, "## The pilot")
    columns = [("nih@1", 0), ("nih@1", 15), ("rsna@1", 0), ("lungs shenzhen->montgomery@0.3", 0)]
    for name, cells in shown.items():
        runs = [r["tasks"] for r in pilot["runs"] if (r["stage"], r["method"]) == ("final", name)]
        tuned = [
            r["rsna_finetuned_test"]
            for r in pilot["final_validation_all_labels"]
            if r["method"] == name
        ]
        expected = [spread([run[task]["test"][k] for run in runs]) for task, k in columns if runs]
        assert [cell for cell in cells if cell] == [*expected, spread(tuned)], name
    assert len(shown) == 7
    # The phantoms.
    log = pd.read_csv(results / "variants.csv")
    shown = table_rows(text, "## Phantoms")
    for name, (flags, *cells) in shown.items():
        runs = log[log["variant"] == name]
        assert flags.strip("`") == "".join(runs["flags"].fillna("").unique())
        for share, cell in zip((0.1, 1), cells, strict=True):
            assert cell == spread(runs[runs["labels"] == share]["mean"]), name
    assert len(shown) == 14
    # The cost on a GPU.
    steps = json.loads((results / "logs" / "bench_h200.json").read_text())["training"]
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


NIH_ROWS_OF_THE_README = {  # row -> method in the log
    "baseline: ridge regression, 16x16 pixels": "16 x 16 pixels",
    "random weights": "random",
    "VICReg": "VICReg",
    "VICReg, last BatchNorm": "VICReg, last BatchNorm",
    "MLVICX, no blocks": "no blocks",
    "MLVICX, inline": "inline",
    "MLVICX, side (default)": "side",
}


def test_the_results_of_the_readme_are_those_of_the_study():
    text = (HERE / "README.md").read_text()
    folder = HERE / "notebooks" / "results" / "nih"
    frame = []
    for unit in json.loads((folder / "units.json").read_text()):
        for row in unit.get("rows", []):
            if row["features"] == "h" and row["mode"] == "frozen":
                frame.append(dict(row, method=unit["method"], seed=unit["seed"]))
    keys = ["method", "set", "labels", "seed"]
    seeds = pd.DataFrame(frame).groupby(keys)["test"].mean()  # over subsets of the labels
    cells = [("nih128", share) for share in (0.01, 0.1, 0.3, 1)]
    cells += [("rsna256", share) for share in (0.1, 1)]
    for row, method in NIH_ROWS_OF_THE_README.items():
        expected = []
        for cell in cells:
            values = seeds[method, *cell]
            expected.append(f"{values.mean():.3f}")
            if len(values) > 1:
                expected[-1] += f"±{values.std():.3f}"
        line = next(x for x in text.splitlines() if x.startswith(f"{row} |"))
        assert line.split(" | ")[1:] == expected, row


def test_the_findings_of_the_readme_are_the_declared_comparisons():
    text = " ".join((HERE / "README.md").read_text().split())
    log = json.loads((HERE / "notebooks" / "results" / "nih" / "summary.json").read_text())
    lines = {
        "over random weights: ": "side − random",
        "that keeps the last BatchNorm**: ": "side − VICReg, last BatchNorm",
        "side over none: ": "side − no blocks",
        "side over inline: ": "side − inline",
    }
    for line, method in lines.items():
        found = []
        for row in log:
            if row["measure"] == "paired difference" and row["method"] == method:
                numbers = (row["mean"], *row["ci95"])
                found.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(*numbers))
        assert len(found) == 2 and line + " and ".join(found) in text


def test_the_speeds_of_the_readme_are_those_of_the_logs():
    text, results = (HERE / "README.md").read_text(), HERE / "notebooks" / "results"
    log = (results / "logs" / "first_run.txt").read_text().splitlines()
    means = [line for line in log if line.startswith("mean AUROC")]
    assert len(means) == 2 and "```\n" + "\n".join(means) + "\n```" in text
    (images,) = [int(n) for n in re.findall(r"'train': (\d+)", "".join(log))]
    assert f"the {images:,} training images" in " ".join(text.split())
    speeds = [int(n) for n in re.findall(r"(\d+) images/s", "".join(log))]
    minutes = 78_468 / np.mean(speeds) / 60  # an epoch of ChestMNIST
    assert 16 < minutes < 25 and "an epoch takes 20 minutes" in " ".join(text.split())
    bench, compiled, dicom = (
        json.loads((results / "logs" / f"{name}.json").read_text())
        for name in ("bench_h200", "steps_h200", "dicom_speed")
    )
    rows = [compiled["training"]["batch 256, graph, blocks compiled"]]
    rows += [bench["training"][f"batch {batch}, graph"] for batch in (256, 64)]
    section = " ".join(text.split("## Quick start")[1].split("\n## ")[0].split())
    for row in rows:
        assert f"{row['images/s']:,.0f} images/s" in section
        assert f"{row['hours of 300 epochs']:.1f} h" in section
    assert f"after {rows[0]['seconds of the first step, with compiling']:.0f} s" in section
    whole = bench["training"]["batch 256, pretrain"]["images/s, epoch 2"]
    assert f"{whole:,.0f} images/s in its second epoch" in section
    peak = bench["training"]["batch 256, eager"]["peak GB"]
    assert f"about {peak:.0f} GB" in section

    png = json.loads((results / "prepare_speed.json").read_text())["1600 images"]["seconds"]
    per_image = {
        "NIH": png["two workers"] / 1600,
        "RSNA": dicom["rsna"]["two workers"] / 1000,
        "SIIM": dicom["siim"]["two workers"] / 1000,
    }
    for name, seconds in per_image.items():
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
        names = {True: "yes", False: "no"}
        if name == "batch_size":
            assert value == 0 and default == "256 on CUDA, else 64"
        elif isinstance(value, bool):
            assert default == names[value] == demo
        elif isinstance(value, str):
            assert (default, demo) == (value, preset.get(name, value))
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert float(demo) == preset.get(name, value)
            assert name == "batch_size" or float(default) == value
    assert len(rows) == 10


def test_the_readme_is_short():
    assert len((HERE / "README.md").read_text().split()) <= 1800


def readme_blocks(language):
    """The fenced blocks of README.md in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (HERE / "README.md").read_text(), re.M | re.S)


def test_every_python_block_of_the_readme_runs(capsys):
    blocks = readme_blocks("python")
    for block in blocks:
        exec(block, {})
    assert blocks and "loss" in capsys.readouterr().out


@pytest.fixture(scope="module")
def raw_downloads(tmp_path_factory):
    """Small raw folders in the real layouts, where the README's commands look for them."""
    root = tmp_path_factory.mktemp("readme")
    names = [f"{k + 1:08d}_000.png" for k in range(80)]
    labels = ["Cardiomegaly|Effusion", "No Finding", "Nodule", "Infiltration"]
    splits = ["test" if k >= 68 else "train" for k in range(80)]
    cycled = [labels[k % 4] for k in range(80)]
    raw_nih(root / "raw" / "nih", rows=list(zip(names, cycled, splits, strict=True)))
    raw_physionet(root / "raw" / "vinbig", n=40)
    raw_rsna(root / "raw" / "rsna", n=40)
    raw_siim(root / "raw" / "siim", n=40)
    raw_folder(root / "raw" / "mine", n=80)
    raw_chestmnist(root / "chest.npz", 64)
    data = root / "data"
    prep("chestmnist", "--raw", root / "chest.npz", "--out", data / "chestmnist", "--size", 64)
    prep("demo", "--count", 64, "--size", 64, "--out", data / "demo")
    return root


def readme_commands():
    """The lines that a shell would run, loops unrolled."""
    stubs = "".join(f'{name}() {{ echo {name} "$@"; }}\n' for name in ("pip", "python", "torchrun"))
    script = stubs + "".join(readme_blocks("bash"))
    return subprocess.check_output(["bash", "-eu", "-c", script], text=True).splitlines()


def test_every_command_of_the_readme_runs(raw_downloads, monkeypatch):
    monkeypatch.chdir(raw_downloads)
    exempt = re.compile("^pip install|--download|^python -m pytest|^python notebooks/")
    lines = [line for line in readme_commands() if not exempt.search(line)]
    assert len(lines) >= 20 and all(re.match("(python|torchrun) ", line) for line in lines)
    for line in lines:
        line = line.replace("0.01,0.1,", "")  # of few images
        start, *words = line.split()
        if start == "torchrun":
            line = line.replace("--nproc-per-node 8", "--nproc-per-node 2")
            small = f"{line} --batch-size 16 --epochs 1 --embedding-dim 8 --size 64"
            call = [sys.executable, "-m", "torch.distributed.run"]
            call += small.replace("mlvicx.py", str(HERE / "mlvicx.py")).split()[1:]
            assert subprocess.run(call, capture_output=True, timeout=600).returncode == 0, line
            continue
        program, *args = words
        if args[0] == "pretrain":  # without a compiler, which --compile needs on a CPU
            args = [word for word in args if word != "--compile"]
            args += ["--batch-size", "16", "--embedding-dim", "8"]
        if args[0] in ("classify", "segment"):
            args += ["--batch-size", "8"]
        if args[0] in ("pretrain", "classify", "segment"):
            args += ["--epochs", "1", "--size", "64"]
        assert {"mlvicx.py": m, "data_prep.py": dp}[program].main(args) == 0, line


def test_the_bench_measures_every_form_and_part(tmp_path, capsys):
    words = "--device cpu --size 64 --batch-size 2 --embedding-dim 8 --repeats 1"
    bench.main([*words.split(), "--out", str(tmp_path / "runs" / "bench.json")])
    found = json.loads((tmp_path / "runs" / "bench.json").read_text())
    assert list(found["steps"]) == list(bench.FORMS)
    assert all(row["seconds"] > 0 for row in found["steps"].values())
    assert found["parameters"]["backbone"] == 11176512
    assert set(found["parts"]) >= {"read", "views", "encoder", "context-bottlenecks", "LARS"}
    assert min(found["ratios"].values()) > 0 and min(found["multiply_adds"].values()) > 0
    counts = found["operators"]
    assert 0 < counts["views"] < counts["training step"] and counts["blocking"] == []


def test_the_bench_counts_operators_and_those_that_make_python_wait():
    x, mask = torch.zeros(2, 2), torch.tensor([True, False])
    with bench.Operators() as counted:
        x.T.reshape(4)[None].add_(1).mul_(2)  # a copy, and two operators that compute
    assert counted.count == 3 and counted.blocking == ()
    with bench.Operators() as counted:
        float(x.sum()), x[mask], mask.nonzero(), torch.tensor([1.0]), x[x.long()[0]]
    assert counted.blocking == ("_local_scalar_dense", "index", "nonzero", "lift_fresh")


def test_the_bench_measures_whole_steps_and_pretrain(tmp_path, monkeypatch):
    pairs = bench.plan(4, 2, cuda=False)
    assert len(set(pairs)) == len(pairs) and set(pairs) < set(bench.plan(4, 2, cuda=True))
    pairs.remove((2, bench.LITERAL))  # which takes long
    monkeypatch.setattr(bench, "plan", lambda *_: pairs)
    out, given = tmp_path / "bench.json", {"size": 32, "embedding_dim": 8, "images": 20}
    config = SimpleNamespace(batches=(4, 2), limit=math.inf, out=str(out), **given)
    found = bench.training(config, torch.device("cpu"))["training"]
    assert json.loads(out.read_text())["training"] == found
    assert list(found) == [f"batch {batch}, {name}" for batch, name in pairs]
    assert all(min(row.values()) > 0 for row in found.values())


def test_the_module_is_written_plainly():
    """What STYLE asks of it: no idiom that a student would have to decode, no long function."""
    tree = ast.parse((HERE / "mlvicx.py").read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.NamedExpr), f"walrus in line {node.lineno}"
        union = isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.BitOr)
        flags = union and isinstance(getattr(node, "left", None), ast.Attribute)  # of fcntl
        assert flags or not union, f"| in line {node.lineno}"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            lists = (node.left, node.right)
            assert not any(isinstance(x, (ast.List, ast.ListComp)) for x in lists), node.lineno
        if isinstance(node, (ast.Call, ast.IfExp)):
            inside = [x for child in ast.iter_child_nodes(node) for x in ast.walk(child)]
            choices = [x.lineno for x in inside if isinstance(x, ast.IfExp)]
            assert not choices, f"conditional expression within another in lines {choices}"
        if isinstance(node, ast.FunctionDef):
            inner = [x for x in ast.walk(node) if isinstance(x, ast.FunctionDef)][1:]
            assert len(inner) <= 1, f"{node.name} holds {len(inner)} functions"
            assert node.end_lineno - node.lineno < 60, f"{node.name} is long"
            outer = [x for x in ast.walk(node) if isinstance(x, (ast.Nonlocal, ast.Global))]
            assert not outer, f"{node.name} changes an outer variable"


def test_the_text_keeps_its_form():
    for name, text in sources().items():
        assert max(map(len, text.splitlines())) <= 100, name
        tree = ast.parse(text)
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_":
                assert ast.get_docstring(node), f"{name}: {node.name}"
        comments = [t.string for t in tokenize.generate_tokens(io.StringIO(text).readline)]
        assert not [c for c in comments if re.search(r"\b(TODO|FIXME)\b", c)]
