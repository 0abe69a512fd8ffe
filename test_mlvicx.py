"""Tests of mlvicx.py and data_prep.py, in the order of their sections.

    python -m pytest -q test_mlvicx.py

Each number is compared with a hand-computed value, a slow oracle written here, torchvision or
scikit-learn. Real X-rays are used where the variable MLVICX_XRAYS names a folder of them.
"""

import ast
import contextlib
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tokenize
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from sklearn.metrics import roc_auc_score

import mlvicx as m

HERE = Path(__file__).parent
torch.set_num_threads(2)


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
    assert (config.size, config.batch_size, config.lr, config.epochs) == (224, 64, 0.2, 300)
    assert (config.embedding_dim, config.final_bn, config.context) == (4096, True, "inline")
    assert (config.sim_coeff, config.std_coeff, config.cov_coeff) == (25, 25, 1)
    assert (config.local_weight, config.warmup_epochs, config.init) == (1, 2, "random")
    demo = m.make_config("pretrain", m.PretrainConfig, {"lr": 7.0})
    assert demo.lr == 7.0 and demo.size == m.PRESETS["pretrain", "demo"]["size"]


@pytest.mark.parametrize(
    "flags", ["--size 16", "--epochs 0", "--lr nan", "--crop-min 0", "--labels 2", "--levels 1,1"]
)
def test_a_number_without_sense_is_refused_by_name(flags, capsys):
    name = "classify" if "labels" in flags else "pretrain"
    assert flags.split()[0] in refused(capsys, name, *flags.split())


def test_every_flag_is_in_the_help(capsys):
    for name, (cls, _) in m.COMMANDS.items():
        with pytest.raises(SystemExit):
            m.main([name, "--help"])
        shown = capsys.readouterr().out
        for f in cls.__dataclass_fields__:
            assert f"--{f.replace('_', '-')}" in shown


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
    assert torch.equal(h, maps[-1].mean((2, 3)))
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
            loss = m.literal_loss((z1, z2), (z1, z2)) / 2
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
    x = torch.randn(1, 1, side, side, dtype=torch.float64)
    p = m.pool_matrix(side, like=x)
    resized = F.interpolate(x, size=(64, 64), mode="bilinear", align_corners=False)
    assert torch.allclose(p @ x[0, 0] @ p.T, F.avg_pool2d(resized, 16)[0, 0], atol=1e-12)
    assert torch.allclose(p.sum(1), torch.ones(4, dtype=torch.float64))


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
    assert torch.allclose(model.embed(view2)[0], g2, atol=1e-5)
    assert torch.allclose(model.embed(view1)[1], l1, atol=1e-5)


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
    assert m.parse_levels("4,2") == (2, 4)


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
    parts = [f"{a}_{b}" for a in ("global", "local") for b in ("invariance", "variance", "covariance")]
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
            leaf = z.clone().requires_grad_()
            loss, _ = m.vicreg_loss(leaf, z.flip(0))
            loss.backward()
            assert loss.dtype == torch.float32 and loss.isfinite()
            assert leaf.grad.isfinite().all()
    exact = m.covariance_literal(large.double())
    assert relative(m.covariance_loss(large).double(), exact) < 1e-5


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


def test_cosine_schedule_warms_up_and_ends_at_exactly_the_floor():
    rates = [m.cosine_schedule(i, 100, 10, 0.5) for i in range(100)]
    assert rates[0] == 0.05 and rates[9] == 0.5 and rates[10] == 0.5
    assert rates[-1] == 0.5 * 0.001
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert m.cosine_schedule(54.5, 100, 10, 1.0, floor=0) == pytest.approx(0.5)
    assert m.cosine_schedule(0, 1, 0, 1.0) == 0.001
