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
torch.set_num_threads(1)  # the models here are too small for two
os.environ["OMP_NUM_THREADS"] = "1"


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
    assert "does not exist" in refused(capsys, "pretrain", "--data", "none")
    assert "toy" in refused(capsys, "pretrain", "--data", "none")
    (place / "data" / "empty").mkdir()
    assert "incomplete" in refused(capsys, "pretrain", "--data", "empty")
    half = write_set(place / "data" / "half")
    np.save(half / "images.npy", np.zeros((7, 48, 48), np.uint8))
    assert "[7, 48]" in refused(capsys, "pretrain", "--data", "half")
    (half / "labels.csv").write_text("image,patient\n")
    assert "prepare" in refused(capsys, "pretrain", "--data", "half")


def test_a_patient_in_two_splits_is_refused(place, capsys):
    write_set(place / "data" / "leak", patient=np.arange(48) % 7)
    assert "patient" in refused(capsys, "pretrain", "--data", "leak")


def test_pooled_sets_are_read_one_after_another(place, capsys):
    sets = [m.PreparedData(p) for p in ("toy", write_set(place / "data" / "more", n=20, seed=1))]
    rows = torch.tensor([0, 50, 47, 67])
    expected = [sets[0].images[0], sets[1].images[2], sets[0].images[47], sets[1].images[19]]
    assert torch.equal(m.gather_images(sets, rows), torch.stack(expected))
    resident = torch.cat([s.images for s in sets])
    assert torch.equal(m.gather_images(sets, rows, resident), torch.stack(expected))
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
    assert "random" in shown and "learned" in shown
    names = {p.name for p in (place / "runs" / "toy").iterdir()}
    assert {"config.json", "metrics.csv", "curves.png", "last.pt", "encoder.pt"} <= names
    table = pd.read_csv("runs/toy/metrics.csv")
    assert table["epoch"].tolist() == [1, 2]
    for head in ("global", "local"):
        for name in ("invariance", "variance", "covariance"):
            assert {f"{head}_{name}", f"val_{head}_{name}"} <= set(table)
        assert table[f"rank_{head}"].gt(1).all() and table[f"std_{head}"].gt(0).all()
    assert table["knn_auroc"].between(0, 1).all()
    weighted = table["loss_global"] + table["loss_local"]
    assert np.allclose(table["loss"], weighted, rtol=1e-5)
    assert run_pretrain("--knn-every", "1") == 0  # finished: it says so and trains nothing
    assert pd.read_csv("runs/toy/metrics.csv").equals(table)


def test_training_never_sees_test_images_or_excluded_ones(place):
    data = m.PreparedData("toy")
    rows, held = m.pretraining_rows([data, data])
    own = torch.cat([rows % 48, held % 48])
    assert not set(own.tolist()) & set(data.indices("test").tolist())
    assert len(rows) == 2 * len(data.indices("train", "val"))
    Path("skip.txt").write_text("i0000\ni0001\n")
    assert len(m.pretraining_rows([data], "skip.txt")[0]) == len(data.indices("train", "val")) - 2


def test_a_change_of_settings_is_refused_and_named(place, capsys):
    assert run_pretrain() == 0
    line = refused(capsys, "pretrain", "--data", "toy", *SMALL, "--out", "runs/toy", "--lr", "9")
    assert "lr" in line and "--overwrite" in line
    assert run_pretrain("--lr", "9", "--overwrite") == 0
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("x")
    assert "not of a run" in refused(capsys, "pretrain", "--data", "toy", *SMALL, "--out", "mine")
    assert (place / "mine" / "thesis.txt").exists()


def test_a_batch_that_the_set_or_batchnorm_cannot_give_is_refused(place, capsys):
    for size in (1, 1000):
        args = ("pretrain", "--data", "toy", *SMALL, "--batch-size", size)
        assert "--batch-size" in refused(capsys, *args)


@pytest.mark.parametrize(
    "stop_at", [3, 5, 6, 9]
)  # middle, last and first step of an epoch, last but one
def test_exact_resume(place, monkeypatch, stop_at):
    assert run_pretrain(out="runs/whole") == 0
    step = m.Trainer.train_step

    def interrupted(self, *args):
        log = step(self, *args)
        if self.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return log

    monkeypatch.setattr(m.Trainer, "train_step", interrupted)
    assert run_pretrain(out="runs/cut") == 130
    monkeypatch.setattr(m.Trainer, "train_step", step)
    assert run_pretrain(out="runs/cut") == 0
    assert_same_run("runs/whole", "runs/cut")


def assert_same_run(a, b):
    """Equal bits in weights, buffers, optimiser state and metrics of two run folders."""
    assert Path(a, "metrics.csv").read_text() == Path(b, "metrics.csv").read_text()
    one, two = (m.load_checkpoint(Path(p) / "last.pt") for p in (a, b))
    assert one["step"] == two["step"]
    for k, v in one["model"].items():
        assert torch.equal(v, two["model"][k]), k
    moments = [s["optimizer"]["state"] for s in (one, two)]
    assert all(torch.equal(v["momentum"], moments[1][k]["momentum"]) for k, v in moments[0].items())
    encoders = [m.load_checkpoint(Path(p) / "encoder.pt")["encoder"] for p in (a, b)]
    assert all(torch.equal(v, encoders[1][k]) for k, v in encoders[0].items())


def test_damaged_checkpoints_are_found_and_the_previous_one_taken(place, capsys):
    assert run_pretrain() == 0
    reference = Path("runs/toy/metrics.csv").read_text()
    good = Path("runs/toy/last.pt").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 3] ^= 1
    for damaged in (b"", good[: len(good) // 2], good[:-1], bytes(flipped)):
        Path("runs/toy/last.pt").write_bytes(damaged)
        with pytest.raises(m.UserError, match="SHA-256"):
            m.load_checkpoint("runs/toy/last.pt")
        previous = Path("runs/toy/previous.pt").read_bytes()
        assert run_pretrain() == 0
        assert "previous.pt" in capsys.readouterr().out
        assert Path("runs/toy/metrics.csv").read_text() == reference
        assert m.load_checkpoint("runs/toy/last.pt")["step"] == 10
        Path("runs/toy/previous.pt").write_bytes(previous)
    Path("runs/toy/last.pt").write_bytes(b"x")
    Path("runs/toy/previous.pt").write_bytes(b"y")
    line = refused(capsys, "pretrain", "--data", "toy", *SMALL, "--out", "runs/toy")
    assert "damaged" in line and "--overwrite" in line


class Bomb:
    """A pickle that writes a file when it is loaded."""

    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_a_malicious_pickle_is_refused_and_does_not_run(place):
    m.save_checkpoint("bomb.pt", {"encoder": Bomb()})
    with pytest.raises(m.UserError, match="does not load"):
        m.load_checkpoint("bomb.pt")
    assert not Path("exploded").exists()


def test_every_file_loads_with_weights_only(place):
    assert run_pretrain() == 0
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
    m.open = lambda path, *a: (kills if a[:1] == ("w+b",) else opened)(path, *a)
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
    with Killer(open(name, "w+b"), left // 2) as f: torch.save(state, f)
else:
    m.save_checkpoint(name, state, keep_previous=True)
"""


@pytest.mark.parametrize("mode", ["bytes", "before", "between", "after", "naive"])
def test_killed_at_any_byte_the_last_checkpoint_or_the_one_before_loads(place, mode):
    folder = Path("run")
    folder.mkdir()
    m.save_checkpoint(folder / "last.pt", {"x": torch.full((5000,), 1.0), "turn": 1})
    whole = (folder / "last.pt").stat().st_size
    for left in (0, 1, whole // 2, whole - 1) if mode in ("bytes", "naive") else (0,):
        call = [sys.executable, "-c", KILLER, mode, str(left), "run/last.pt"]
        done = subprocess.run(call, env=os.environ | {"PYTHONPATH": str(HERE)}, capture_output=True)
        assert done.returncode == 9, done.stderr
        turns = []
        for path in (folder / "last.pt", folder / "previous.pt"):
            with contextlib.suppress(m.UserError):
                turns.append(m.load_checkpoint(path)["turn"])
        if mode == "naive":  # the control: an in-place save loses everything
            assert turns == []
        else:
            assert turns and set(turns) <= {1, 2}


def test_sigkill_at_random_moments_then_exact_resume(place):
    args = ["pretrain", "--data", "toy", *SMALL, "--epochs", "6"]
    assert m.main([*args, "--out", "runs/whole"]) == 0
    rng = np.random.default_rng(0)
    call = [sys.executable, str(HERE / "mlvicx.py"), *args, "--out", "runs/cut"]
    killed = 0
    for _ in range(3):
        process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        start = time.time()
        while not Path("runs/cut/metrics.csv").exists() and time.time() - start < 120:
            time.sleep(0.05)
        time.sleep(float(rng.random()))
        killed += process.poll() is None
        process.kill()
        process.wait()
    assert killed
    assert m.main([*args, "--out", "runs/cut"]) == 0
    assert_same_run("runs/whole", "runs/cut")


def test_no_room_leaves_the_checkpoint_and_no_temporary_file(place):
    m.save_checkpoint("last.pt", {"turn": 1})
    code = (
        "import resource, signal, sys, torch, mlvicx as m\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "try: m.save_checkpoint('last.pt', {'x': torch.zeros(9999)}, keep_previous=True)\n"
        "except (OSError, RuntimeError): sys.exit(7)\n"
    )
    env = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert m.load_checkpoint("last.pt") == {"turn": 1}
    assert not list(Path().glob("*.tmp"))


def test_a_full_disk_is_one_line(place):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # noqa: E731
    done = command("pretrain", "--data", "toy", *SMALL, "--out", "runs/full", preexec_fn=limit)
    assert done.returncode == 2, done.stderr
    assert len(re.findall("^error: ", done.stderr, re.M)) == 1 and "Traceback" not in done.stderr
    assert not list(Path("runs/full").glob("*.tmp"))


def test_a_second_process_on_one_run_folder_is_refused(place, capsys):
    config = m.make_config("pretrain", m.PretrainConfig, {"data": "toy", "out": "runs/one"})
    sets = [m.PreparedData("toy")]
    with m.open_run(config, "toy", sets), pytest.raises(m.UserError, match="another process"):
        with m.open_run(config, "toy", sets):
            pass
    with m.open_run(config, "toy", sets):  # a dead owner leaves no lock behind
        pass


def test_a_checkpoint_of_another_architecture_names_the_key(place, capsys):
    assert run_pretrain() == 0
    state = m.load_checkpoint("runs/toy/encoder.pt")
    m.save_checkpoint("odd.pt", state | {"arch": state["arch"] | {"backbone": "resnet34"}})
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
    assert "step 5: global_variance is nan" in line
    assert Path("runs/worse/last.pt").read_bytes() == good


def test_collapse_warning_fires_on_a_constant_encoder_and_not_on_a_healthy_one(place):
    config = m.make_config(
        "pretrain", m.PretrainConfig, dict(data="toy", size=32, embedding_dim=16, batch_size=8)
    )
    data, views = m.PreparedData("toy"), m.RandomViews(32)
    model = m.build_model(config)
    with torch.no_grad():  # running statistics as after some steps of training
        for step in range(30):
            model(*views(data.images[:32], m.generator(step)))

    def watch():
        return m.monitor(model, [data], torch.arange(48), views, config, torch.device("cpu"), 1)

    assert m.collapse_warning(watch()) is None
    with torch.no_grad():
        model.encoder.bn1.weight.zero_()
        model.encoder.conv1.weight.zero_()
    assert "collapsed" in m.collapse_warning(watch())


def test_imagenet_weights_without_network_are_one_clear_line(place, monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    args = ("pretrain", "--data", "toy", *SMALL, "--init", "imagenet")
    assert "ImageNet" in refused(capsys, *args)


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


def test_torchrun_trains_with_two_processes(place):
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    call += ["--master-port", "29611", str(HERE / "mlvicx.py"), "pretrain", "--data", "toy", *SMALL]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(pd.read_csv("runs/toy/metrics.csv")) == 2


# ---------------------------------------------------------------- 11. evaluation


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A working folder with a toy set and an encoder that was pre-trained on it for two epochs."""
    place = tmp_path_factory.mktemp("trained")
    write_set(place / "data" / "toy", n=80, name="toy")
    with contextlib.chdir(place):
        assert run_pretrain() == 0
    return place


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
        assert one["prevalence"] == pytest.approx(float(y.mean()))
    names = {p.name for p in Path("runs/c1").iterdir()}
    assert {"results.json", "per_class.csv", "roc.png", "classifier.pt"} <= names
    stamp = Path("runs/c1/unit-0-0.npy").stat().st_mtime_ns
    assert evaluate("classify", "--seeds", "2", "--out", "runs/c1") == r
    assert Path("runs/c1/unit-0-0.npy").stat().st_mtime_ns == stamp  # nothing was computed again


def test_features_of_an_encoder_are_computed_once(trained, monkeypatch):
    monkeypatch.chdir(trained)
    evaluate("classify", "--labels", "0.5", "--out", "runs/c2")
    monkeypatch.setattr(m, "predict", lambda *a, **k: pytest.fail("features were computed again"))
    evaluate("classify", "--labels", "0.3", "--seeds", "2", "--out", "runs/c3")


def test_fault3_the_blocks_that_were_trained_go_downstream(trained):
    encoder, _ = m.load_encoder(trained / "runs" / "toy" / "encoder.pt", None)
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
    assert "not an encoder" in refused(
        capsys, "classify", "--data", "toy", "--weights", "runs/toy/last.pt", "--out", "runs/no"
    )


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_fault5_frozen_is_frozen_every_parameter_and_buffer(trained, monkeypatch, task):
    monkeypatch.chdir(trained)
    kept = []
    load = m.load_encoder

    def spy(*args):
        encoder, origin = load(*args)
        kept.append((encoder, {k: v.clone() for k, v in encoder.state_dict().items()}))
        return encoder, origin

    monkeypatch.setattr(m, "load_encoder", spy)
    evaluate(task, "--epochs", "1", "--out", f"runs/frozen-{task}")
    encoder, before = kept[-1]
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    evaluate(task, "--epochs", "1", "--mode", "finetune", "--out", f"runs/tuned-{task}")
    encoder, before = kept[-1]
    moved = [k for k, v in encoder.state_dict().items() if not torch.equal(v, before[k])]
    assert {"conv1.weight", "bn1.running_mean", "layer4.1.conv2.weight"} <= set(moved)


def test_fault6_validation_is_whole_and_never_flipped(trained):
    data = m.PreparedData("toy", trained / "data")
    val, cpu = data.indices("val"), torch.device("cpu")
    encoder = m.Encoder("resnet18", "none")
    whole = m.predict(encoder, data.images, val, 32, cpu, batch_size=5)
    assert len(whole) == len(val) and len(val) % 5
    again = m.predict(encoder, data.images, val, 32, cpu, batch_size=5)
    assert torch.equal(whole, again)
    plain = encoder.eval()(m.normalise(m.resize_images(data.images[val], 32)))[0]
    assert torch.allclose(whole, plain, atol=1e-4)


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


def test_interval_is_a_bootstrap_over_patients():
    runs = [np.arange(10.0), np.arange(10.0) + 1]
    mean = lambda run, w: np.array([(run * w).sum() / w.sum()])  # noqa: E731
    one = m.interval(runs, np.arange(10), mean)[0]
    assert one["mean"] == 5.0 and one["std"] == pytest.approx(math.sqrt(0.5))
    assert one["ci95"][1] - one["ci95"][0] == pytest.approx(
        2 * 1.96 * 2.87 / math.sqrt(10), rel=0.1
    )
    together = m.interval(runs, np.repeat([0, 1], 5), mean)[0]
    assert together["ci95"] == [2.5, 7.5]  # two patients: both, or one of them twice
    assert m.interval(runs[:1], np.arange(10), mean)[0]["std"] is None


def test_segment_results_and_threshold_free_of_test(trained, monkeypatch):
    monkeypatch.chdir(trained)
    r = evaluate("segment", "--epochs", "2", "--mode", "finetune", "--out", "runs/s1")
    names = {"dice_all", "dice_positive", "dice_pooled", "dice_blank", "iou_pooled"}
    assert set(r["test"]) == names
    assert all(set(v) == {"mean", "std", "ci95"} for v in r["test"].values())
    assert r["test"]["dice_all"]["mean"] > r["test"]["dice_blank"]["mean"]
    assert Path("runs/s1/masks.png").exists()


def test_segment_without_masks_is_refused(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    if not Path("data/bare").exists():
        shutil.copytree("data/toy", "data/bare")
        Path("data/bare/masks.npy").unlink()
    assert "masks.npy" in refused(capsys, "segment", "--data", "bare", "--out", "runs/m")


def test_image_and_mask_move_together():
    images = torch.zeros(8, 64, 64, dtype=torch.uint8)
    images[:, 10:30, 12:40] = 255
    x, mask = m.augment(images, (images > 0).to(torch.uint8), 64, m.generator("move"))
    assert x.shape == mask.shape == (8, 64, 64)
    assert ((x > 0.5).float() - mask).abs().mean() < 0.01
    assert (mask - (images > 0).float()).abs().mean() > 0.02  # they did move
    alone, none = m.augment(images, None, 32, m.generator("move"))
    assert none is None and alone.shape == (8, 32, 32)


def test_decoder_reaches_every_map_and_the_image_size():
    maps = [torch.randn(2, c, s, s, requires_grad=True) for c, s in ((64, 24), (64, 12), (128, 6))]
    maps += [torch.randn(2, c, s, s, requires_grad=True) for c, s in ((256, 3), (512, 2))]
    out = m.UNetDecoder()(maps, 48)
    assert out.shape == (2, 48, 48)
    out.sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in maps)


def test_gradcam_of_a_pooled_linear_classifier_is_its_weighted_map():
    torch.manual_seed(0)
    for context in ("inline", "side"):
        model = m.Classifier(m.Encoder(context=context), 3).eval()
        x = torch.randn(2, 3, 64, 64)
        cam = m.gradcam(model, x, 1)
        _, maps = model.encoder(x)
        last = maps[-1] if context == "inline" else None
        assert cam.shape == (2, 64, 64) and 0 <= cam.min() and cam.max() <= 1
        if last is not None:
            expected = F.relu((model.fc.weight[1][:, None, None] * last).sum(1))
            shrunk = F.interpolate(expected[:, None], size=64, mode="bilinear", align_corners=False)
            shrunk = shrunk[:, 0] / shrunk.amax((2, 3)).clamp(min=1e-12)[..., None]
            assert torch.allclose(cam, shrunk, atol=1e-4)


def test_spatial_maps_are_one_a_level():
    maps = m.spatial_maps(m.Encoder().eval(), torch.randn(2, 3, 64, 64))
    assert [tuple(x.shape) for x in maps] == [(2, 1, s, s) for s in (32, 16, 8, 4, 2)]
    assert all(0 < x.min() and x.max() < 1 for x in maps)


def test_overlap_of_pretraining_and_test_pictures_is_said(capsys):
    for seen, judged, warns in (
        (["nih"], "rsna", True), (["chestmnist"], "siim", True), (["nih"], "chestmnist", True),
        (["chestmnist"], "nih", True), (["nih"], "nih", False), (["nih"], "vinbig", False),
        (["demo"], "siim", False),
    ):  # fmt: skip
        m.warn_overlap(seen, judged)
        assert ("warning" in capsys.readouterr().err) == warns


# ---------------------------------------------------------------- 12. command line


def test_export_fits_torchvision_and_refuses_to_drop_blocks_silently(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    args = ["export", "--weights", "runs/toy/encoder.pt", "--out", "plain.pth"]
    assert "--drop-context" in refused(capsys, *args)
    assert m.main([*args, "--drop-context"]) == 0
    missing = torchvision.models.resnet18().load_state_dict(
        torch.load("plain.pth", weights_only=True), strict=False
    )
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    assert "exists" in refused(capsys, *args, "--drop-context")
    assert run_pretrain("--context", "side", "--epochs", "1", out="runs/side") == 0
    assert m.main(["export", "--weights", "runs/side/encoder.pt", "--out", "side.pth"]) == 0


def test_bench_measures_every_variant(place):
    args = ["bench", "--size", "32", "--batch-size", "4", "--embedding-dim", "8", "--repeats", "1"]
    assert m.main([*args, "--out", "bench.json"]) == 0
    result = json.loads(Path("bench.json").read_text())
    assert len(result["steps"]) == 5
    assert all(row["seconds"] > 0 for row in result["steps"].values())
    assert result["parameters"]["backbone"] == 11176512
    assert set(result["parts"]) >= {"read", "views", "encoder", "context-bottlenecks", "LARS"}
    assert min(result["ratios"].values()) > 0 and min(result["multiply_adds"].values()) > 0


def test_literal_model_of_the_bench_equals_the_fast_one():
    torch.manual_seed(0)
    fast, literal = m.MLVICX(embedding_dim=8).double(), m.LiteralMLVICX(embedding_dim=8).double()
    literal.load_state_dict(fast.state_dict())
    views = torch.randn(2, 6, 3, 64, 64, dtype=torch.float64)
    definition, loss = m.literal_loss(*literal(*views)), m.mlvicx_loss(*fast(*views))[0]
    assert relative(definition.detach(), loss.detach()) < 1e-10


def test_wrong_commands_are_one_line(place, capsys):
    assert "--help" in refused(capsys, "pretrain", "--no-such-flag")
    assert "--help" in refused(capsys, "dance")
    assert "--device" in refused(capsys, "pretrain", "--data", "toy", "--device", "abacus")
    assert "there is none" in refused(capsys, "export", "--weights", "absent.pt")


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
        "UNetDecoder": "UNetDecoder((4, 4), (4,))([torch.randn(2, 4, s, s) for s in (4, 2)], 8)",
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
    listed = re.findall(r"^- `(.+?)`", section, re.M)
    assert sorted(listed) == sorted(tags) and len(tags) >= 5


def test_the_text_keeps_its_form():
    for name, text in sources().items():
        assert max(map(len, text.splitlines())) <= 100, name
        tree = ast.parse(text)
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_":
                assert ast.get_docstring(node), f"{name}: {node.name}"
        comments = [t.string for t in tokenize.generate_tokens(io.StringIO(text).readline)]
        assert not [c for c in comments if re.search(r"\b(TODO|FIXME)\b", c)]
