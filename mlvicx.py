"""MLVICX: multi-level variance-covariance exploration for chest X-rays, in one file.

Two random views of an X-ray go through one ResNet. Context-bottleneck blocks (channel, then
spatial attention) refine the maps of five levels. A *global* embedding comes from the pooled last
map, a *multi-level* (local) one from all five maps; a VICReg loss on each trains the encoder:
L = L_G + lambda * L_L. Paper: Singh, Gorade, Mishra, arXiv:2403.11504, IEEE JBHI 28(12), 2024.

    python mlvicx.py pretrain                 # demo X-rays, drawn on first use; minutes on a CPU
    python mlvicx.py classify --weights runs/demo/encoder.pt --labels 0.1
    python mlvicx.py segment  --weights runs/demo/encoder.pt
    python mlvicx.py bench                    # what each part costs

Read top to bottom: blocks (3), encoder (4), projectors (5), model (6), losses (7), optimiser (8),
data and views (9), pre-training (10), evaluation (11), command line (12). Letters in shapes:
B images, C channels, H x W pixels, D embedding dimensions, K levels, S source size, F findings.
`# Deviation:` marks each difference from the authors' code; README.md lists the same.
"""
# ---------------------------------------------------------------- 1. imports and constants

import argparse
import contextlib
import ctypes
import dataclasses
import hashlib
import io
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import product, repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
import torch.utils.checkpoint
import torchvision
from matplotlib.figure import Figure
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no flock: two processes on one run folder go unnoticed there
    fcntl = None

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEVELS = (1, 2, 3, 4, 5)
XRAY_SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
STOPPED = "stopped, the last good checkpoint is kept; lower --lr or use --amp off"


class UserError(ValueError):
    """A request that cannot be met; the message is the one line that the user reads."""


def require(condition, message):
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


# ---------------------------------------------------------------- 2. configuration


def _option(default, help, *choices, **extra):
    """A dataclass field that carries its own command-line help."""
    extra |= {"choices": choices} if choices else {}
    return field(default=default, metadata={"help": help, **extra})


def parse_levels(text):
    """Levels "1,3,5" -> (1, 3, 5); ValueError unless they are distinct numbers from 1 to 5."""
    levels = tuple(sorted({int(part) for part in text.split(",")}))
    if len(levels) < len(text.split(",")) or not set(levels) <= set(LEVELS):
        raise ValueError(f"expected distinct levels among 1,2,3,4,5, found {text!r}")
    return levels


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run has in common."""

    data: str = _option("demo", "prepared set: a name under --data-root or a path")
    data_root: str = _option("data", "where prepared sets live")
    out: str = _option("", "run folder (default: runs/<data>...)")
    size: int = _option(224, "side of the images that the network sees, in pixels")
    batch_size: int = _option(64, "images a step, over all processes")
    seed: int = _option(0, "decides initialisation, order, views and label subsets")
    device: str = _option("auto", "auto, cpu, cuda or cuda:N")
    amp: str = _option("auto", "auto: bf16 on CUDA, off on a CPU", "auto", "off", "bf16", "fp16")
    backbone: str = _option("resnet18", "encoder", "resnet18", "resnet34", "resnet50")
    context: str = _option("inline", "where the blocks sit", "inline", "side", "none")
    attention: str = _option("both", "steps of a block", "both", "channel", "spatial")
    overwrite: bool = _option(False, "start again in a run folder that holds another run")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """`pretrain`: the defaults are the recipe of the authors' code; PRESETS adapt it by dataset."""

    data: str = _option("demo", "prepared set, or several joined by commas and pooled")
    exclude_ids: str = _option("", "file of image names to leave out, one a line")
    epochs: int = _option(300, "passes over the train and validation images")
    lr: float = _option(0.2, "base learning rate for a batch of 256; scaled with the batch")
    warmup_epochs: float = _option(2.0, "epochs of linear warm-up")
    weight_decay: float = _option(1e-6, "LARS weight decay")
    trust: float = _option(0.001, "LARS trust coefficient: step of a layer, as a share of its norm")
    init: str = _option("random", "initial weights of the encoder", "random", "imagenet")
    levels: tuple = _option(LEVELS, "levels that feed the multi-level head", type=parse_levels)
    embedding_dim: int = _option(4096, "width of both projectors")
    final_bn: bool = _option(True, "end the projectors in BatchNorm (authors); no: as VICReg")
    local_weight: float = _option(1.0, "lambda of L = L_G + lambda L_L; 0 builds no local head")
    sim_coeff: float = _option(25.0, "weight of the invariance term")
    std_coeff: float = _option(25.0, "weight of the variance term")
    cov_coeff: float = _option(1.0, "weight of the covariance term")
    crop_min: float = _option(0.08, "smallest crop, as a share of the area; 1 removes crops")
    flip: float = _option(0.5, "probability of a horizontal flip")
    jitter: float = _option(0.4, "strength of brightness and contrast changes; 0 removes them")
    blur: float = _option(2.0, "largest blur sigma, in pixels; 0 removes blur")
    solarize: float = _option(0.2, "probability of solarizing view 2")
    rotation: float = _option(0.0, "largest rotation, in degrees")
    identical_views: bool = _option(False, "give both branches the same view")
    knn_every: int = _option(5, "epochs between k-NN evaluations on validation labels; 0: never")
    compile: bool = _option(False, "torch.compile the model")
    deterministic: bool = _option(False, "bit-exact resume on CUDA too, at some cost in speed")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(RunConfig):
    """What `classify` and `segment` share; fine-tuning follows the authors' code."""

    weights: str = _option("random", "random, imagenet or encoder files; several, with commas")
    mode: str = _option("frozen", "train the head alone, or everything", "frozen", "finetune")
    labels: float = _option(1.0, "share of the training patients whose labels are used")
    seeds: int = _option(1, "repetitions, each with its own subset of labels and random weights")
    epochs: int = _option(300, "most passes over the labelled images")
    patience: int = _option(10, "epochs without a better validation score before stopping")
    lr: float = _option(0.0003, "AdamW learning rate")


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(EvalConfig):
    """`classify`: linear probe on frozen features, or fine-tuning; `--predict` uses the result."""

    predict: str = _option("", "folder of X-rays to score with --weights .../classifier.pt")
    findings: str = _option("", "findings to judge, joined by commas (default: all)")


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(EvalConfig):
    """`segment`: U-Net decoder on the five refined maps."""

    batch_size: int = _option(16, "images a step")
    lr: float = _option(0.001, "AdamW learning rate")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """`export`: the backbone as a plain torchvision state dict."""

    weights: str = _option("", "encoder.pt of a pre-training")
    out: str = _option("resnet.pth", "file to write")
    drop_context: bool = _option(False, "write the backbone without its inline blocks all the same")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """`bench`: what each part costs, as ratios within one run."""

    size: int = _option(224, "image side in pixels")
    batch_size: int = _option(32, "images a step")
    embedding_dim: int = _option(4096, "width of both projectors")
    repeats: int = _option(3, "measurements of each part; the least disturbed counts")
    device: str = _option("auto", "auto, cpu, cuda or cuda:N")
    amp: str = _option("off", "precision of the fast form", "off", "bf16", "fp16")
    out: str = _option("", "JSON file to write")


# Values that suit a dataset better than the defaults; a flag on the command line wins over both.
PRESETS = {
    ("pretrain", "demo"): {"size": 64, "epochs": 4, "lr": 0.008, "trust": 1.0}
    | {"warmup_epochs": 0.5, "embedding_dim": 512, "crop_min": 0.6}
    | {"jitter": 0.2, "blur": 0.0, "solarize": 0.0, "context": "side"},
    ("classify", "demo"): {"size": 64, "epochs": 20, "patience": 5},
    ("segment", "demo"): {"size": 128, "epochs": 20, "patience": 5},
}
LOWEST = {"size": 32, "labels": 1e-9, "crop_min": 1e-9, "embedding_dim": 2, "batch_size": 2}
LOWEST |= dict.fromkeys(("epochs", "seeds", "repeats", "patience"), 1)
HIGHEST = {"size": 4096} | dict.fromkeys(("labels", "crop_min", "flip", "jitter", "solarize"), 1)


def make_config(command, cls, given):
    """Defaults of `cls`, preset of the dataset, what the user gave; UserError for odd numbers."""
    preset = PRESETS.get((command, Path(given.get("data", "demo")).name), {})
    config = cls(**preset | given)
    for name, value in asdict(config).items():
        low, high = LOWEST.get(name, 0), HIGHEST.get(name, sys.float_info.max)
        if isinstance(value, (int, float)) and not low <= value <= high:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: expected a number from {low:g} to {high:g}, found {value}")
    return config


# ---------------------------------------------------------------- 3. context-bottleneck


class ChannelAttention(nn.Module):
    """Scales every channel by what its global average and its global maximum say about it.

    Args: channels: C; the shared bottleneck has C / 2.
    Input and output: (B, C, H, W).
    Source: authors' code (the channel step of CBAM, arXiv:1807.06521, with reduction 2).
    """

    def __init__(self, channels):
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.expand = nn.Conv2d(channels // 2, channels, 1, bias=False)

    def forward(self, x):
        # Same as x.mean((2, 3)) and x.amax((2, 3)), whose backward passes are slower.
        positions = x.shape[2] * x.shape[3]
        average = x.sum((2, 3)) / positions  # (B, C, H, W) -> (B, C)
        if torch.are_deterministic_algorithms_enabled():  # on CUDA, the pool's backward is not
            largest = x.flatten(2).max(2).values
        else:
            largest = F.adaptive_max_pool2d(x, 1).flatten(1)

        # Both go through one bottleneck C -> C / 2 -> C (1x1 convolutions of a single position).
        # The second layer is linear, so that the two results may be added before it.
        pooled = torch.stack([average, largest])  # (2, B, C)
        hidden = F.relu(F.linear(pooled, self.reduce.weight.flatten(1)))
        gate = F.linear(hidden.sum(0), self.expand.weight.flatten(1)).sigmoid()  # (B, C)
        return x * gate[:, :, None, None]


class SpatialAttention(nn.Module):
    """Scales every position by what the mean and the maximum over channels say around it.

    Input and output: (B, C, H, W). `attention_map` returns the (B, 1, H, W) scale alone.
    Source: authors' code (the spatial step of CBAM, arXiv:1807.06521).
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def attention_map(self, x):
        x = x.permute(0, 2, 3, 1)  # in channels-last memory, the channels lie side by side
        average = x.sum(3) / x.shape[3]  # (B, H, W, C) -> (B, H, W)
        largest = x.max(3).values
        pooled = torch.stack([average, largest], 1)  # (B, 2, H, W)
        return self.conv(pooled).sigmoid()

    def forward(self, x):
        return x * self.attention_map(x)


class ContextBottleneck(nn.Sequential):
    """Channel attention, then spatial attention; no residual, no normalisation.

    Args: channels: C of the map. attention: "both", or one step alone: "channel", "spatial".
    Input and output: (B, C, H, W).
    Needs: ChannelAttention, SpatialAttention. Source: summary of the paper; authors' code.
    """

    def __init__(self, channels, attention="both"):
        super().__init__()
        if attention not in ("both", "channel", "spatial"):
            raise ValueError(f"expected attention both, channel or spatial, got {attention!r}")
        if attention != "spatial":
            self.channel = ChannelAttention(channels)
        if attention != "channel":
            self.spatial = SpatialAttention()


# ---------------------------------------------------------------- 4. encoder


class SmallMapConv2d(nn.Conv2d):
    """On a CPU, a small map is convolved as one matrix product, which is faster there.

    Args: as torch.nn.Conv2d; square, neither dilated nor grouped.
    Input, Returns: (B, C, H, W) -> (B, C', H', W').
    """

    def forward(self, x):
        if x.device.type != "cpu" or x.shape[2] * x.shape[3] > 64:
            return super().forward(x)
        k, step, pad = self.kernel_size[0], self.stride[0], self.padding[0]
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, pad, pad, pad, pad))
        x = x.unfold(1, k, step).unfold(2, k, step)  # (B, H', W', C, k, k)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (C', k * k * C)
        x = F.linear(x.permute(0, 1, 2, 4, 5, 3).flatten(3), weight, self.bias)
        return x.permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """A torchvision ResNet that returns its representation and the refined maps of five levels.

    Args:
        backbone: "resnet18", "resnet34" or "resnet50"; weights keep torchvision's names.
        context: "side": a plain ResNet, whose maps are refined on their way to the multi-level
            head. "inline" (authors' code): each refined map feeds the next stage, so that the
            blocks are part of the encoder. "none": no blocks.
        attention: steps of each block, see ContextBottleneck.
        levels: levels that get a block under "side"; "inline" has all five.
    Input: (B, 3, H, W), or (B, 1, H, W) gray, repeated; H, W >= 32.
    Returns: h (B, C5) and a list of five maps: at 224 px (B, 64, 112, 112), (B, 64, 56, 56),
        (B, 128, 28, 28), (B, 256, 14, 14), (B, 512, 7, 7) for ResNet-18.
    Needs: ContextBottleneck, SmallMapConv2d. Source: authors' code (inline); summary (side).
    """

    def __init__(self, backbone="resnet18", context="inline", attention="both", levels=LEVELS):
        super().__init__()
        if context not in ("inline", "side", "none"):
            raise ValueError(f"expected context inline, side or none, got {context!r}")
        resnet = getattr(torchvision.models, backbone)(weights=None)
        for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"):
            setattr(self, name, getattr(resnet, name))
        for conv in self.layer4.modules():
            if isinstance(conv, nn.Conv2d):  # the same parameters under the same names
                conv.__class__ = SmallMapConv2d
        width = resnet.fc.in_features  # 512 for ResNet-18
        self.channels = (64, width // 8, width // 4, width // 2, width)
        self.arch = {
            "backbone": backbone,
            "context": context,
            "attention": attention,
            "levels": list(levels),
        }
        with_block = {"inline": LEVELS, "side": levels, "none": ()}[context]
        self.context = nn.ModuleDict()
        for level in with_block:
            block = ContextBottleneck(self.channels[level - 1], attention)
            self.context[str(level)] = block

    def stage(self, level, x):
        """The ResNet's own map of one level, from the map below it (level 1: from the image)."""
        if level == 1:
            return F.relu(self.bn1(self.conv1(x)), inplace=True)
        if level == 2:
            return self.layer1(F.max_pool2d(x, 3, 2, 1))
        return getattr(self, f"layer{level - 1}")(x)

    def refine(self, level, x):
        """The map of one level after its context-bottleneck, or as it is where there is none."""
        if str(level) not in self.context:
            return x
        block = self.context[str(level)]
        # The inner results of a block are computed again in the backward pass, not kept for it.
        return torch.utils.checkpoint.checkpoint(
            block, x, use_reentrant=False, preserve_rng_state=False
        )

    def features(self, x):
        """(B, 3, H, W) -> the last map (B, C5, H / 32, W / 32), and the five refined maps."""
        if x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < 32:
            raise ValueError(f"expected (B, 1 or 3, >=32, >=32), got {tuple(x.shape)}")
        x = x.expand(-1, 3, -1, -1)
        refined_maps = []
        for level in LEVELS:
            x = self.stage(level, x)
            refined = self.refine(level, x)
            refined_maps.append(refined)
            if self.arch["context"] == "inline":
                x = refined  # the next stage sees the refined map
        return x, refined_maps

    def forward(self, x):
        last, maps = self.features(x)
        return last.mean((2, 3)), maps  # (B, C5, H, W) -> (B, C5)

    def backbone_state(self):
        """State dict of the ResNet alone, under torchvision's names."""
        state = self.state_dict()
        return {name: state[name] for name in state if not name.startswith("context.")}


# ---------------------------------------------------------------- 5. projectors


def projector_mlp(inputs, width, final_bn=True):
    """Three linear layers to a `width`-dimensional embedding: (B, inputs) -> (B, width).

    Args: final_bn: end in BatchNorm (authors' code). What leaves it has a standard deviation of
        sqrt(B / (B - 1)) > 1, so that the variance hinge is zero until a BatchNorm weight falls
        below 1. False: end in a bias-free linear layer; the hinge acts from the start.
    Source: authors' code; VICReg (arXiv:2105.04906), section 4.2.
    """
    layers = [
        nn.Linear(inputs, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=final_bn),
    ]
    if final_bn:
        layers.append(nn.BatchNorm1d(width))
    return nn.Sequential(*layers)


def project(mlp, x1, x2):
    """Two views (B, inputs) -> two embeddings (B, D): mlp(x1), mlp(x2), but faster.

    A linear layer treats all rows alike, so both views go through it at once and its weights are
    read once. BatchNorm takes one view at a time: its statistics are those of a single view.
    """
    for layer in mlp:
        if isinstance(layer, nn.Linear):
            x1, x2 = layer(torch.cat([x1, x2])).chunk(2)
        else:
            x1, x2 = layer(x1), layer(x2)
    return x1, x2


class GlobalProjector(nn.Module):
    """h (B, C5) -> z_global (B, D). Needs: projector_mlp. Source: authors' code."""

    def __init__(self, channels=512, embedding_dim=4096, final_bn=True):
        super().__init__()
        self.mlp = projector_mlp(channels, embedding_dim, final_bn)

    def forward(self, h):
        return self.mlp(h)


def aggregate_literal(maps, convs, resolution=64, grid=4):
    """The multi-level map by its definition: resize, 1x1 convolution, sum, average pool.

    Args: maps: K tensors (B, C_k, H_k, W_k). convs: K 1x1 convolutions C_k -> C. resolution: side
        to which every map is resized (bilinear). grid: side of the pooled result.
    Returns: (B, C, grid, grid). Source: authors' code.
    """
    total = 0
    for x, conv in zip(maps, convs, strict=True):
        x = F.interpolate(x, size=(resolution, resolution), mode="bilinear", align_corners=False)
        total = total + conv(x)  # (B, C_k, 64, 64) -> (B, C, 64, 64)
    return F.adaptive_avg_pool2d(total, grid)


def pool_matrix(side, resolution=64, grid=4, like=None):
    """(grid, side) matrix of one axis: bilinear resize from `side` to `resolution`, then pooling.

    Resizing and pooling are linear: applied to the unit vectors, they give their own matrix.
    """
    unit_vectors = torch.eye(side, dtype=like.dtype, device=like.device)
    resized = F.interpolate(unit_vectors[None], size=resolution, mode="linear", align_corners=False)
    return F.adaptive_avg_pool1d(resized, grid)[0].T  # (1, side, 64) -> (1, side, 4) -> (4, side)


def aggregate(maps, convs, resolution=64, grid=4):
    """`aggregate_literal` exactly, but every map is pooled before its convolution.

    All steps are linear, and they act on different axes, so their order may change. The 1x1
    convolution then has 16 positions to work on, not 4096.
    Args, Returns: as `aggregate_literal`. Needs: pool_matrix.
    """
    # Deviation: maps are pooled before their convolutions; same value and gradients, less work.
    total = 0
    for x, conv in zip(maps, convs, strict=True):
        rows = pool_matrix(x.shape[2], resolution, grid, like=x)  # (4, H)
        columns = pool_matrix(x.shape[3], resolution, grid, like=x)  # (4, W)
        # The weight of every pixel (H x W) in every cell of the grid (4 x 4).
        weights = torch.kron(rows, columns).expand(len(x), -1, -1)  # (B, 16, H W)
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, C_k, H, W) -> (B, H W, C_k)
        pooled = torch.bmm(weights, pixels)  # (B, 16, C_k)
        # A 1x1 convolution is a linear layer on the channels.
        total = total + F.linear(pooled, conv.weight.flatten(1), conv.bias)  # (B, 16, C)
    return total.transpose(1, 2).unflatten(2, (grid, grid))  # (B, C, 4, 4)


class LocalProjector(nn.Module):
    """Embeds the maps of several levels together: K maps -> z_local (B, D).

    Args: channels: C_k of the maps. hidden: channels of the common map, which is pooled to 4 x 4.
    Needs: aggregate, projector_mlp. Source: authors' code.
    """

    def __init__(
        self, channels=(64, 64, 128, 256, 512), embedding_dim=4096, final_bn=True, hidden=512
    ):
        super().__init__()
        # Deviation: the 1x1 convolutions exist before the optimiser does, so that they are trained.
        # The authors' code creates them in the first forward pass.
        self.convs = nn.ModuleList(nn.Conv2d(c, hidden, 1) for c in channels)
        self.mlp = projector_mlp(hidden * 16, embedding_dim, final_bn)

    def pool(self, maps):
        """K maps -> (B, hidden * 16), the input of the MLP."""
        return aggregate(maps, self.convs).flatten(1)

    def forward(self, maps):
        return self.mlp(self.pool(maps))


# ---------------------------------------------------------------- 6. model


class MLVICX(nn.Module):
    """Encoder and both projectors; two views in, embeddings out.

    Args: embedding_dim, final_bn: see projector_mlp. local: build the multi-level head; without,
        with context "none" and final_bn False, this is VICReg. levels: levels whose maps feed that
        head. encoder: backbone, context, attention of Encoder.
    Input: view1, view2 (B, 3, H, W).
    Returns: (z_global1, z_global2), (z_local1, z_local2), each (B, D); the second is None without
        the multi-level head.
    Needs: Encoder, GlobalProjector, LocalProjector, project.
    """

    def __init__(self, embedding_dim=4096, final_bn=True, local=True, levels=LEVELS, **encoder):
        super().__init__()
        self.encoder = Encoder(levels=levels, **encoder)
        self.levels = tuple(levels)
        if self.encoder.arch["context"] == "side" and not local:
            raise ValueError("context side needs the local head: nothing else trains the blocks")
        self.global_head = GlobalProjector(self.encoder.channels[-1], embedding_dim, final_bn)
        self.local_head = None
        if local:
            channels = [self.encoder.channels[level - 1] for level in levels]
            self.local_head = LocalProjector(channels, embedding_dim, final_bn)

    def represent(self, view):
        """What the two projectors take: h (B, C5), and all maps pooled to one vector (or None)."""
        h, maps = self.encoder(view)
        if self.local_head is None:
            return h, None
        chosen = [maps[level - 1] for level in self.levels]
        return h, self.local_head.pool(chosen)

    def forward(self, view1, view2):
        # One pass a view, not one over both: BatchNorm sees the statistics of a single view. The
        # maps are pooled at once, so that those of view 1 need not be kept while view 2 is encoded.
        h1, pooled1 = self.represent(view1)
        h2, pooled2 = self.represent(view2)
        z_global = project(self.global_head.mlp, h1, h2)
        if self.local_head is None:
            return z_global, None
        z_local = project(self.local_head.mlp, pooled1, pooled2)
        return z_global, z_local


# ---------------------------------------------------------------- 7. losses


def _centred(z):
    """Embeddings (B, D) minus their mean over the batch, in float32 at least."""
    if z.ndim != 2 or len(z) < 2:
        raise ValueError(f"expected (B >= 2, D) embeddings, got {tuple(z.shape)}")
    if z.dtype != torch.float64:
        z = z.float()
    return z - z.mean(0)


def invariance_loss(z1, z2):
    """Mean squared distance between the embeddings of two views.

    Args: z1, z2: (B, D), any float dtype; computed in float32 (float64 stays).
    Returns: scalar tensor. Raises: ValueError if the shapes differ.
    Source: VICReg (arXiv:2105.04906), eq. 5, averaged over D too (authors' code).
    """
    if z1.shape != z2.shape:
        raise ValueError(f"expected two equal shapes, got {tuple(z1.shape)}, {tuple(z2.shape)}")
    if z1.dtype != torch.float64:
        z1, z2 = z1.float(), z2.float()
    return F.mse_loss(z1, z2)


def variance_loss(z, gamma=1.0, eps=1e-4):
    """Hinge that keeps the standard deviation of every embedding dimension above `gamma`.

    Args:
        z: (B, D) embeddings of one view, any float dtype; computed in float32 (float64 stays).
        gamma: target standard deviation, in embedding units.
        eps: added to the variance, so that the root has a gradient at zero.
    Returns: scalar tensor in [0, gamma].
    Raises: ValueError if B < 2 or z is not 2-D; the message holds the shape received.
    Needs: _centred. Source: VICReg (arXiv:2105.04906), eq. 1.
    """
    zc = _centred(z)
    variance = zc.square().sum(0) / (len(zc) - 1)  # (B, D) -> (D,), unbiased
    std = (variance + eps).sqrt()
    return F.relu(gamma - std).mean()


def covariance_literal(z):
    """The covariance term by its definition: the D x D matrix, squared, minus its diagonal.

    Args: z: (B, D) embeddings of one view.
    Returns: scalar tensor, sum over i != j of cov_ij^2, divided by D.
    Needs: _centred. Source: VICReg (arXiv:2105.04906), eq. 3 and 4.
    """
    zc = _centred(z)
    cov = zc.T @ zc / (len(zc) - 1)  # (D, D)
    return (cov.square().sum() - cov.diagonal().square().sum()) / z.shape[1]


def covariance_loss(z):
    """`covariance_literal` exactly, from the smaller of two matrices: ||zc' zc|| = ||zc zc'||.

    Args: z: (B, D) embeddings of one view, any float dtype; computed in float32 (float64 stays).
    Returns: scalar tensor. Raises: ValueError if B < 2 or z is not 2-D.
    Needs: _centred. Source: VICReg (arXiv:2105.04906), eq. 3 and 4.
    """
    # Deviation: the smaller Gram matrix, in float32, in place of the masked D x D matrix.
    with torch.autocast(z.device.type, enabled=False):
        zc = _centred(z) / math.sqrt(len(z) - 1)
        if len(zc) < zc.shape[1]:
            gram = zc @ zc.T  # (B, B)
        else:
            gram = zc.T @ zc  # (D, D)
        variance = zc.square().sum(0)  # (D,), the diagonal of the covariance matrix
        return (gram.square().sum() - variance.square().sum()) / zc.shape[1]


def vicreg_loss(z1, z2, sim_coeff=25.0, std_coeff=25.0, cov_coeff=1.0, covariance=covariance_loss):
    """Invariance, variance and covariance of one pair of embeddings.

    Args: z1, z2: (B, D) embeddings of the two views. sim_coeff, std_coeff, cov_coeff: alpha, beta,
        gamma of the paper. covariance: form of that term; `covariance_literal` for comparison.
    Returns: the loss, and its parts {"invariance", "variance", "covariance"}, unweighted.
    Needs: invariance_loss, variance_loss, covariance_loss. Source: VICReg, eq. 6; authors' code
        (variance averaged over the two views, covariance summed).
    """
    invariance = invariance_loss(z1, z2)
    variance = (variance_loss(z1) + variance_loss(z2)) / 2
    redundancy = covariance(z1) + covariance(z2)
    total = sim_coeff * invariance + std_coeff * variance + cov_coeff * redundancy
    return total, {"invariance": invariance, "variance": variance, "covariance": redundancy}


def mlvicx_loss(z_global, z_local=None, local_weight=1.0, **coefficients):
    """L = L_G + lambda * L_L.

    Args: z_global: the pair of (B, D) global embeddings. z_local: the multi-level pair, or None.
        local_weight: lambda. coefficients: of `vicreg_loss`.
    Returns: the loss, and a dict of detached scalars: "loss", "loss_global", "loss_local" and every
        part as "global_invariance", ...
    Needs: vicreg_loss. Source: summary of the paper; authors' code (lambda = 1).
    """
    total, parts = vicreg_loss(*z_global, **coefficients)  # L_G
    log = {f"global_{name}": value.detach() for name, value in parts.items()}
    log["loss_global"] = total.detach()

    if z_local is not None:
        loss_local, parts = vicreg_loss(*z_local, **coefficients)  # L_L
        for name, value in parts.items():
            log[f"local_{name}"] = value.detach()
        log["loss_local"] = loss_local.detach()
        total = total + local_weight * loss_local

    log["loss"] = total.detach()
    return total, log


def gather(z):
    """All processes' embeddings in rank order, with gradient: (B / N, D) -> (B, D).

    Call it on every embedding before the loss when several processes share a batch: variance and
    covariance are statistics of the whole batch, and without this each process has another loss.
    The backward pass sums N equal gradients, and DDP's average over the processes divides by N.
    With one process it returns z. Source: VICReg's code (FullGatherLayer).
    """
    if not dist.is_initialized():
        return z
    return torch.cat(dist.nn.functional.all_gather(z))


# ---------------------------------------------------------------- 8. optimiser and schedule


class LARS(torch.optim.SGD):
    """SGD with momentum whose step is scaled, layer by layer, to the norm of the weights.

    Args: params: parameters; those of one dimension get neither weight decay nor adaptation.
        lr, weight_decay, momentum, trust: as in the paper.
    Source: arXiv:1708.03888; authors' code (momentum 0.9, trust 0.001, weight decay 1e-6).
    """

    def __init__(self, params, lr=0.2, weight_decay=1e-6, momentum=0.9, trust=0.001):
        super().__init__(params, lr=lr, momentum=momentum, foreach=True)
        self.weight_decay, self.trust = weight_decay, trust

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients, which it changes. `_foreach` works on lists of tensors."""
        layers = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim > 1 and p.grad is not None:
                    layers.append(p)
        if layers:
            grads = [p.grad for p in layers]
            torch._foreach_add_(grads, layers, alpha=self.weight_decay)
            p_norm = torch.stack(torch._foreach_norm(layers))
            g_norm = torch.stack(torch._foreach_norm(grads))
            usable = (p_norm > 0) & (g_norm > 0)
            ratio = torch.where(usable, self.trust * p_norm / g_norm, 1.0)
            torch._foreach_mul_(grads, list(ratio.unbind()))
        super().step()


def cosine_schedule(step, total, warmup, base, floor=0.001):
    """Learning rate of one step: linear warm-up, then a cosine to exactly `floor * base`.

    Args: step: 0 ... total - 1; the last has the floor itself. warmup: steps of warm-up, at most
        half of all; the first has base / warmup. floor: as a fraction of `base`.
    Source: VICReg (arXiv:2105.04906), section 4.2; authors' code.
    """
    warmup = min(warmup, total // 2)
    if step < warmup:
        return base * (step + 1) / warmup
    if total == 1:
        return base * floor
    progress = min((step - warmup) / max(total - 1 - warmup, 1), 1)  # from 0 to 1
    cosine = 0.5 * (1 + math.cos(math.pi * progress))  # from 1 to 0
    return base * (floor + (1 - floor) * cosine)


# ---------------------------------------------------------------- 9. prepared data and views


def generator(*keys):
    """A CPU random generator that is a function of its keys alone: (seed, "views", step)."""
    digest = hashlib.sha256(repr(keys).encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1
    return torch.Generator().manual_seed(seed)


class PreparedData:
    """A folder that data_prep.py has written: images on disk, labels in memory.

    Args: data: name under `root`, or a path.
    Attributes: images, masks (or None): uint8 (N, S, S) tensors over a memory map; labels: float32
        (N, F), NaN where unknown; findings: F names; patient, split, names: (N,) arrays; has_mask:
        (N,) bool; meta: dict of meta.json; size: S; origin: the command that prepared it.
    Raises: UserError if the folder is missing or incomplete, or a patient is in two splits.
    """

    def __init__(self, data, root="data"):
        self.folder = Path(data)
        if not self.folder.is_dir():
            self.folder = Path(root) / data
        self._require_meta(root)
        try:
            self._read()
        except (ValueError, KeyError, OSError) as e:
            raise UserError(f"{self.folder} is not prepared data ({e}); prepare it again") from e

    def _require_meta(self, root):
        """Refuses a folder without meta.json, which is written last."""
        if (self.folder / "meta.json").is_file():
            return
        state = "does not exist"
        if self.folder.is_dir():
            state = "is incomplete (no meta.json)"
        known = ", ".join(sorted(path.parent.name for path in Path(root).glob("*/meta.json")))
        raise UserError(
            f"looked for prepared data in {self.folder}: it {state}; prepared under {root}: "
            f"{known or 'nothing'}; next: python data_prep.py --help"
        )

    def _read(self):
        self.meta = json.loads((self.folder / "meta.json").read_text())
        table = pd.read_csv(self.folder / "labels.csv", dtype={"image": str, "patient": str})
        self.images = self._map("images.npy")
        self.size = self.images.shape[1]
        self.findings = list(self.meta["findings"])
        self.origin = self.meta.get("options", {}).get("command", self.meta["name"])
        self.labels = torch.from_numpy(table[self.findings].to_numpy(np.float32, copy=True))
        self.names = table["image"].to_numpy()
        self.patient = table["patient"].to_numpy()
        self.split = table["split"].to_numpy()
        self.masks = None
        self.has_mask = np.zeros(len(table), bool)
        if "has_mask" in table:
            self.masks = self._map("masks.npy")
            self.has_mask = (table["has_mask"] == 1).to_numpy()

        counts = {len(self.images), len(table), self.meta["images"]}
        if len(counts) > 1 or len(table) == 0:
            raise ValueError(f"images, rows and meta.json count {sorted(counts)}")
        pairs = table[["patient", "split"]].drop_duplicates()
        twice = pairs["patient"][pairs["patient"].duplicated()]
        if len(twice):
            raise ValueError(f"patient {twice.iloc[0]} is in two splits")

    def _map(self, name):
        """A uint8 tensor over the file, copy-on-write: nothing is read yet, nothing is written."""
        return torch.from_numpy(np.load(self.folder / name, mmap_mode="c"))

    def indices(self, *splits):
        """Rows of the named splits, in file order: (n,) int64 tensor."""
        return torch.from_numpy(np.flatnonzero(np.isin(self.split, splits)))

    def boxes(self):
        """boxes.csv as a table, in prepared pixels; None where the dataset has none."""
        path = self.folder / "boxes.csv"
        if not path.exists():
            return None
        return pd.read_csv(path, dtype={"image": str})


def gather_images(sets, rows, resident=None):
    """Images of pooled datasets, whose rows (B,) are counted one set after another: (B, S, S)."""
    if resident is not None:
        return resident[rows.to(resident.device)]
    pool = torch.utils.data.ConcatDataset([data.images for data in sets])
    return torch.stack([pool[row] for row in rows.tolist()])


def prefetch(load, items):
    """Yields load(item) for every item; a thread loads the next one while the caller works."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            started = pool.submit(load, item)
            if waiting is not None:
                yield waiting.result()
            waiting = started
        if waiting is not None:
            yield waiting.result()


def resize_matrix(start, length, source, size, flip=None):
    """Crop and antialiased bicubic resize along one axis, as one matrix an image.

    Every output pixel is a weighted mean of the source pixels around it. Row i of the matrix holds
    the weights of output pixel i, so A @ image @ B.T crops and resizes both axes.
    Args: start, length: (B,) first pixel and number of pixels of the crop. source: pixels of the
        uncropped axis. size: pixels of the result. flip: (B,) bool, mirror the result; or None.
    Returns: float32 (B, size, source), rows summing to 1.
    Source: torchvision's antialiased resize (cubic with a = -0.5), which it equals to 1e-5.
    """
    # Where the centre of each output pixel lies, in pixels of the crop.
    scale = (length / size)[:, None]  # (B, 1), source pixels for one output pixel
    out = torch.arange(size, device=start.device)
    if flip is not None:
        out = torch.where(flip[:, None], size - 1 - out, out)
    center = (out + 0.5) * scale  # (B, size)

    # The kernel reaches two pixels to each side; when shrinking, it is stretched (antialiasing).
    stretch = scale.clamp(min=1)
    first = (center - 2 * stretch + 0.5).floor().clamp(min=0)
    last = torch.minimum((center + 2 * stretch + 0.5).floor(), length[:, None])
    taps = torch.arange(int(4 * max(1, source / size)) + 2, device=start.device)
    pixel = first[..., None] + taps  # (B, size, T), the source pixels under the kernel

    # Cubic kernel of the distance x, zero beyond 2 and beyond the crop.
    x = ((pixel + 0.5 - center[..., None]) / stretch[..., None]).abs()
    near = (1.5 * x - 2.5) * x * x + 1  # 0 <= x < 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2  # 1 <= x < 2
    inside = (x < 2) & (pixel < last[..., None])
    weight = torch.where(x < 1, near, far) * inside
    weight = weight / weight.sum(-1, keepdim=True)

    # From T weights at their pixels to a row over all source pixels.
    index = (pixel + start[:, None, None]).clamp(max=source - 1).long()
    matrix = weight.new_zeros(len(start), size, source)
    return matrix.scatter_add_(2, index, weight)


def resize_images(images, size):
    """Whole images, antialiased bicubic: uint8 (B, S, S) -> float32 (B, size, size) in [0, 1]."""
    x = images.float() / 255
    source = x.shape[-1]
    if source == size:
        return x
    start = torch.zeros(1, device=x.device)
    length = torch.full((1,), source, device=x.device)
    matrix = resize_matrix(start, length, source, size)[0]
    return (matrix @ x @ matrix.T).clamp(0, 1)


def normalise(x):
    """Gray (B, H, W) in [0, 1] -> (B, 3, H, W) with ImageNet's mean and standard deviation."""
    mean = x.new_tensor(IMAGENET_MEAN)
    std = x.new_tensor(IMAGENET_STD)
    x = (x[..., None] - mean) / std  # (B, H, W) -> (B, H, W, 3)
    return x.permute(0, 3, 1, 2)  # channels-last memory, as the encoder takes it


def warp(x, angle, scale=1.0, shift=(0.0, 0.0)):
    """Rotates, scales and shifts images (B, H, W), bilinear; black comes in from outside.

    Args: angle: (B,) degrees, counter-clockwise. scale: number or (B,). shift: x and y, each a
        number or (B,), as a fraction of the side.
    """
    cos = angle.deg2rad().cos() / scale
    sin = angle.deg2rad().sin() / scale
    dx = torch.zeros_like(angle) + 2 * shift[0] / scale
    dy = torch.zeros_like(angle) + 2 * shift[1] / scale
    theta = torch.stack([cos, -sin, dx, sin, cos, dy], 1).unflatten(1, (2, 3)).to(x)
    grid = F.affine_grid(theta, [len(x), 1, *x.shape[1:]], align_corners=False)
    return F.grid_sample(x[:, None], grid, align_corners=False)[:, 0]


def blur_matrix(sigma, size, taps=23):
    """Gaussian blur along one axis, edges reflected: sigma (B,) in pixels -> (B, size, size)."""
    reach = min(taps, 2 * size - 1) // 2
    offset = torch.arange(-reach, reach + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)  # (B, taps)
    # The blur of every unit vector is the matrix.
    unit_vectors = torch.eye(size, device=sigma.device)[:, None]  # (size, 1, size)
    padded = F.pad(unit_vectors, (reach, reach), mode="reflect")
    return F.conv1d(padded, kernel[:, None]).permute(1, 2, 0)  # (size, B, size) -> (B, size, size)


@dataclass
class RandomViews:
    """Two random views of every image: VICReg's asymmetric recipe on gray images, batched.

    In this order: rotation; crop, flip and antialiased bicubic resize, which are one pair of small
    matrices, A x B'; brightness and contrast (probability 0.8, in random order); blur (23 taps;
    always on view 1, with probability 0.1 on view 2); solarize (view 2). Parameters are drawn for
    each image on the CPU, so that they depend on the generator alone.

    Args: size: side of the views. crop_min: smallest fraction of the area. flip, solarize:
        probabilities. jitter: strength, at most 1. blur: largest sigma in pixels (smallest 0.1).
        rotation: largest angle in degrees. identical_views: view 2 is view 1.
    Call: (images (B, S, S) uint8, generator) -> view1, view2 (B, 3, size, size) normalised.
    Needs: resize_matrix, blur_matrix, warp, normalise. Source: authors' code (from VICReg).
    """

    # Deviation: one gray channel, without hue, saturation and grayscale, which change nothing.

    size: int
    crop_min: float = 0.08
    flip: float = 0.5
    jitter: float = 0.4
    blur: float = 2.0
    solarize: float = 0.2
    rotation: float = 0.0
    identical_views: bool = False

    def draw(self, batch, source, generator):
        """Parameters of both views, from the generator alone.

        Args: batch: B. source: side of the images in pixels.
        Returns: a dict of (2, B) tensors; row 0 belongs to view 1, row 1 to view 2.
        """

        def uniform(low, high, *shape):
            return low + (high - low) * torch.rand(2, batch, *shape, generator=generator)

        # Crop: ten attempts at a random area and aspect ratio, as in torchvision.
        area = source**2 * uniform(self.crop_min, 1, 10)  # (2, B, 10)
        ratio = uniform(math.log(3 / 4), math.log(4 / 3), 10).exp()
        width = (area * ratio).sqrt().round()
        height = (area / ratio).sqrt().round()
        # The first attempt that fits into the image is taken; if none fits, the whole image.
        fits = (width > 0) & (width <= source) & (height > 0) & (height <= source)
        first = fits.float().argmax(-1, keepdim=True)  # (2, B, 1), index of the first that fits
        none_fits = ~fits.any(-1)
        width = width.gather(-1, first)[..., 0].masked_fill(none_fits, source)  # (2, B)
        height = height.gather(-1, first)[..., 0].masked_fill(none_fits, source)

        jittered = uniform(0, 1) < 0.8
        low, high = 1 - self.jitter, 1 + self.jitter
        blur_probability = torch.tensor([[1.0], [0.1]])  # of view 1, of view 2
        solarize_probability = torch.tensor([[0.0], [self.solarize]])
        params = {
            "top": (uniform(0, 1) * (source - height + 1)).floor(),
            "left": (uniform(0, 1) * (source - width + 1)).floor(),
            "height": height,
            "width": width,
            "flip": uniform(0, 1) < self.flip,
            "angle": uniform(-self.rotation, self.rotation),
            "brightness": torch.where(jittered, uniform(low, high), 1.0),
            "contrast": torch.where(jittered, uniform(low, high), 1.0),
            "brightness_first": uniform(0, 1) < 0.5,
            "blurred": (uniform(0, 1) < blur_probability) & (self.blur > 0),
            "sigma": uniform(0.1, max(self.blur, 0.1)),
            "solarized": uniform(0, 1) < solarize_probability,
        }
        if self.identical_views:
            params = {name: value[:1].expand(2, -1) for name, value in params.items()}
        return params

    def render(self, images, params):
        """One view: (B, S, S) images and (B,) parameters -> (B, size, size) in [0, 1]."""
        # Read on the CPU, where the parameters are: asking the GPU would wait for it.
        rotated = bool(params["angle"].any())
        blurred = params["blurred"].nonzero()[:, 0]  # images to be blurred
        p = {name: v.to(images.device, non_blocking=True) for name, v in params.items()}

        # Geometry.
        x, source = images.float() / 255, images.shape[-1]
        if rotated:
            x = warp(x, p["angle"])
        rows = resize_matrix(p["top"], p["height"], source, self.size)
        columns = resize_matrix(p["left"], p["width"], source, self.size, p["flip"])
        x = (rows @ x @ columns.mT).clamp_(0, 1)  # (B, S, S) -> (B, size, size)

        # Brightness multiplies; contrast mixes with the mean of the image.
        first = p["brightness_first"][:, None, None]
        brightness = p["brightness"][:, None, None]
        contrast = p["contrast"][:, None, None]
        x = x.mul_(torch.where(first, brightness, 1.0)).clamp_(0, 1)
        mean = x.mean((1, 2), keepdim=True)
        x = torch.addcmul((1 - contrast) * mean, x, contrast).clamp_(0, 1)
        x = x.mul_(torch.where(first, 1.0, brightness)).clamp_(0, 1)

        # Blur, then solarize: bright pixels are inverted.
        if len(blurred):
            blurred = blurred.to(x.device, non_blocking=True)
            blur = blur_matrix(p["sigma"][blurred], self.size)
            x[blurred] = blur @ x[blurred] @ blur.mT
        bright = p["solarized"][:, None, None] & (x >= 128 / 255)
        return torch.where(bright, 1 - x, x)

    def __call__(self, images, generator=None, params=None):
        if params is None:
            params = self.draw(len(images), images.shape[-1], generator)
        params1 = {name: value[0] for name, value in params.items()}
        params2 = {name: value[1] for name, value in params.items()}
        view1 = normalise(self.render(images, params1))
        view2 = normalise(self.render(images, params2))
        return view1, view2


# ---------------------------------------------------------------- 10. pre-training


@contextlib.contextmanager
def replacing(path, previous=None):
    """A temporary file that takes the place of `path` as a whole, or not at all.

    Order: write, flush, fsync, rename; with `previous` the old file stays under that name.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as e:
        raise OSError(f"{path} could not be written: {e}") from e
    finally:
        temporary.unlink(missing_ok=True)


def store(path, save, *args, **options):
    """`save(file, *args, **options)` into a file that appears as a whole, or not at all."""
    with replacing(path) as f:
        save(f, *args, **options)


def store_json(path, value):
    """A JSON file, as a whole or not at all."""
    with replacing(path) as f:
        f.write(json.dumps(value, indent=1).encode())


def _zip_comment(archive):
    """The end of a zip archive: the length of its comment, and as comment the archive's SHA-256."""
    digest = hashlib.sha256(archive).hexdigest().encode()
    return len(digest).to_bytes(2, "little") + digest


def save_checkpoint(path, state, keep_previous=False):
    """Writes tensors and plain values so that a kill at any instant leaves a whole file.

    The SHA-256 of the archive stands in its zip comment, which torch.load ignores. With
    `keep_previous` the old file stays as previous.pt.
    """
    buffer, path = io.BytesIO(), Path(path)
    torch.save(state, buffer)
    archive = buffer.getbuffer()  # ends in the length of an empty comment: two zero bytes
    with replacing(path, path.with_name("previous.pt") if keep_previous else None) as f:
        f.write(archive[:-2])
        f.write(_zip_comment(archive))


def load_checkpoint(path):
    """Reads what `save_checkpoint` wrote, after checking its hash; runs no pickled code.

    Raises: UserError if the file is missing, damaged, or not one of ours.
    """
    require(Path(path).is_file(), f"looked for a weight file at {path}: there is none")
    found = Path(path).read_bytes()
    archive = found[:-66] + b"\0\0"
    sound = found[-66:] == _zip_comment(archive)
    require(sound, f"{path} is damaged, or not written by this program: SHA-256 differs")
    try:
        return torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a hostile archive makes the reader raise
        raise UserError(f"{path} does not load: {str(e).splitlines()[0]}") from e


def load_weights(module, state, path):
    """`load_state_dict` that must fit; raises UserError naming the file and the first key."""
    try:
        module.load_state_dict(state)
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(f"{path} is of another architecture: {reason}") from e


LOSS_WEIGHTS = ("local_weight", "sim_coeff", "std_coeff", "cov_coeff")


def select(config, *names):
    """Some settings of a configuration, as keyword arguments."""
    return {name: getattr(config, name) for name in names}


def device_name(device):
    """What a log calls the device: the name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, IndexError):
        return Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].splitlines()[0]
    return platform.processor() or "cpu"


@contextlib.contextmanager
def open_run(config, default, datasets, device):
    """Makes or reopens a run folder, locked against a second process; yields its path.

    A folder that holds a run with other settings is refused until `overwrite`. config.json keeps
    the settings, data hashes, versions and command.
    """
    folder = Path(config.out or Path("runs") / default)
    free = ("out", "overwrite", "device", "data_root")  # do not change what is computed
    settings = {k: v for k, v in asdict(config).items() if k not in free}
    settings["data_sha256"] = [d.meta["images_sha256"] for d in datasets]
    settings, record = json.loads(json.dumps(settings)), folder / "config.json"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another process; give another --out") from None
        own = ("lock", record.name, f"{record.name}.tmp")
        ours = [p for p in folder.iterdir() if p.name not in own]
        if record.exists() and not config.overwrite:
            found = json.loads(record.read_text())["settings"]
            for key, value in settings.items():
                text = f"{folder} holds a run with {key} = {found.get(key)}, now {value}; give "
                text += "--overwrite to start again, or another --out"
                require(found.get(key) == value, text)
        else:
            foreign = ours and not record.exists()
            require(not foreign, f"{folder} holds files that are not of a run; give another --out")
            for path in ours:
                path.unlink()
            about = {m.__name__: m.__version__ for m in (torch, torchvision, np)}
            about |= {"settings": settings, "command": sys.argv, "machine": platform.platform()}
            about |= {"device": device_name(device)}
            store_json(record, about)
        yield folder


def keep_memory(keep=True):
    """Tells glibc to keep what is freed for the next step, or to return it; without glibc, nothing.

    Pages that go back to the system are zeroed when they return, a quarter of a CPU step.
    """
    with contextlib.suppress(AttributeError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD: every tensor is a block of its own ...
        libc.mallopt(-4, 0 if keep else 1 << 16)  # M_MMAP_MAX: ... as long as there may be any
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: none


def setup(config, keep=True):
    """Device and process group of a run: (device, rank, world size)."""
    if keep:
        keep_memory()
    torch.set_flush_denormal(True)  # momenta that decay to denormals make a CPU ten times slower
    name, cuda = config.device, torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    known = name == "cpu" or cuda and name.split(":")[0] == "cuda"
    require(known, f"--device {name}: PyTorch has no such device here; use --device cpu")
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo" if name == "cpu" else "nccl")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(name)
    several = dist.is_initialized()
    return torch.device(name), *((dist.get_rank(), dist.get_world_size()) if several else (0, 1))


def autocast(device, amp):
    """The autocast context of `--amp`: bf16 on CUDA unless told otherwise."""
    amp = {"cuda": "bf16"}.get(device.type, "off") if amp == "auto" else amp
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def any_process(flag, device):
    """Whether the flag is set in one process at least."""
    flag = torch.tensor(float(flag), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def auroc(scores, labels, weights=None):
    """Area under the ROC curve, ties counted half.

    Args:
        scores: (n,) array. labels: (n,) array of 0, 1, NaN (unknown, left out).
        weights: (n,) or (R, n) array, how often each case counts.
    Returns: a number, or R of them; NaN if one class is missing.
    """
    known = np.isfinite(labels)
    scores, labels = np.asarray(scores)[known], np.asarray(labels)[known]
    weights = np.ones(len(labels)) if weights is None else weights[..., known]
    order = np.argsort(scores)
    labels, weights = labels[order], weights[..., order]
    _, starts = np.unique(scores[order], return_index=True)  # one group a distinct score, ascending
    positive, negative = (np.add.reduceat(weights * y, starts, -1) for y in (labels, 1 - labels))
    below = np.cumsum(negative, -1) - negative
    with np.errstate(invalid="ignore"):
        pairs = positive.sum(-1) * negative.sum(-1)
        return (positive * (below + negative / 2)).sum(-1) / pairs


def finding_aurocs(scores, labels, weights=None):
    """AUROC of every finding, and first of all their mean over those with both classes.

    Args: scores, labels: (n, F) arrays or tensors. weights: as in `auroc`.
    Returns: (1 + F,) or (R, 1 + F) array with NaN for undefined.
    """
    pairs = zip(np.asarray(scores).T, np.asarray(labels).T, strict=True)
    each = np.stack([auroc(s, y, weights) for s, y in pairs], -1)
    defined = ~np.isnan(each)
    with np.errstate(invalid="ignore"):
        mean = each.sum(-1, keepdims=True, where=defined) / defined.sum(-1, keepdims=True)
    return np.concatenate([mean, each], -1)


@torch.no_grad()
def predict(model, images, rows, size, device, amp="auto", batch_size=128):
    """Output of a model in eval mode for whole images, on the CPU in float32.

    Args: images: uint8 (N, S, S). rows: (n,) int64 rows of it. size: side the network sees.
    Returns: (n, ...); of an Encoder its representation (n, C5).
    """
    training, out = model.training, []
    model.eval()
    for batch in prefetch(lambda r: images[r], rows.split(batch_size)):
        with autocast(device, amp):
            y = model(normalise(resize_images(batch.to(device), size)))
        out.append((y[0] if isinstance(y, tuple) else y).float().cpu())
    model.train(training)
    return torch.cat(out)


def knn_scores(train, labels, test, k=20):
    """Mean label of the k nearest training features by cosine: (n, C), (n, F), (m, C) -> (m, F)."""
    centre = train.mean(0)
    similarity = F.normalize(test - centre) @ F.normalize(train - centre).T
    return labels[similarity.topk(min(k, len(train))).indices].nanmean(1)  # (m, k, F) -> (m, F)


def knn_auroc(encoder, data, config, device):
    """Mean k-NN AUROC on the validation labels of one set, from at most 2,000 training images."""
    train, val = data.indices("train"), data.indices("val")
    if not (data.findings and len(val) and len(train)):
        return math.nan
    train = train[torch.randperm(len(train), generator=generator(config.seed, "knn"))[:2000]]
    x, y = (predict(encoder, data.images, r, config.size, device, config.amp) for r in (train, val))
    return finding_aurocs(knn_scores(x, data.labels[train], y), data.labels[val])[0]


def effective_rank(z):
    """exp(entropy of the normalised singular values) of centred embeddings (B, D); 0 if constant.

    Source: RankMe (arXiv:2210.02885).
    """
    zc = _centred(z.double())
    p = torch.linalg.eigvalsh(zc @ zc.T if len(zc) < zc.shape[1] else zc.T @ zc).clamp(min=0).sqrt()
    if p.sum() <= 1e-6 * math.sqrt(zc.numel()):
        return 0.0
    return float(torch.special.entr(p / p.sum()).sum().exp())


def collapse_warning(row):
    """The line that says which embedding has collapsed, judged by a row of metrics.csv; or None."""
    for head in ("global", "local"):
        std, rank = row.get(f"std_{head}", 1.0), row.get(f"rank_{head}", math.inf)
        if std < 0.01 or rank < 2:
            found = f"the {head} embedding has collapsed (std {std:.3g}, effective rank {rank:.3g})"
            return f"warning: {found}: raise --std-coeff, lower --lr or weaken the views"


@torch.no_grad()
def monitor(model, sets, rows, views, config, device, epoch):
    """Health on validation images: loss on fixed views, std and rank of both embeddings, k-NN.

    Args: rows: pooled rows of validation images. Returns: dict of floats for metrics.csv.
    """
    model.eval()
    row, logs, embedded = {}, [], []
    size = min(config.batch_size, len(rows))
    batches = rows.unfold(0, size, size)[: max(1, 512 // size)] if size > 1 else ()  # whole ones
    for i, batch in enumerate(batches):
        images = gather_images(sets, batch).to(device)
        pair = views(images, generator(config.seed, "val", i))
        with autocast(device, config.amp):
            embeddings = model(*pair)
        logs.append(mlvicx_loss(*embeddings, **select(config, *LOSS_WEIGHTS))[1])
        embedded.append([z[0].float().cpu() for z in embeddings if z])
    for key in logs[0] if logs else ():
        row[f"val_{key}"] = float(torch.stack([log[key] for log in logs]).mean())
        require(math.isfinite(row[f"val_{key}"]), f"epoch {epoch}: val_{key} diverged; {STOPPED}")
    for head, z in zip(("global", "local"), map(torch.cat, zip(*embedded)), strict=False):
        row |= {f"std_{head}": float(z.std(0).mean()), f"rank_{head}": effective_rank(z)}
    if config.knn_every and (epoch % config.knn_every == 0 or epoch == config.epochs):
        scores = [knn_auroc(model.encoder, s, config, device) for s in sets]
        if scores := [score for score in scores if math.isfinite(score)]:  # sets with labels
            row["knn_auroc"] = float(np.mean(scores))
    model.train()
    return row


def imagenet_state(backbone):
    """torchvision's ImageNet weights of a ResNet, without the classifier; needs network once."""
    weights = torchvision.models.get_model_weights(backbone).DEFAULT
    try:
        state = weights.get_state_dict(progress=False)
    except (OSError, RuntimeError) as e:
        raise UserError(f"no ImageNet weights for {backbone} ({e}); use random ones") from e
    return {k: v for k, v in state.items() if not k.startswith("fc.")}


def build_model(config):
    """The model of a pre-training configuration, initialised from its seed alone."""
    torch.manual_seed(config.seed)
    names = ("backbone", "context", "attention", "levels", "embedding_dim", "final_bn")
    try:
        model = MLVICX(**select(config, *names), local=config.local_weight > 0)
    except ValueError as e:
        raise UserError(str(e)) from e
    if config.init == "imagenet":
        model.encoder.load_state_dict(imagenet_state(config.backbone), strict=False)
    return model


def open_sets(config):
    """The prepared sets of `--data a,b`; the demo set is drawn on first use."""
    names, demo = config.data.split(","), Path(config.data_root) / "demo"
    if "demo" in names and not demo.exists():
        import data_prep

        failed = data_prep.main(["demo", "--out", str(demo)])
        require(not failed, "the demo set could not be made; see the line above")
    sets = [PreparedData(name, config.data_root) for name in names]
    sizes = {s.meta["name"]: s.size for s in sets}
    require(len(set(sizes.values())) == 1, f"pooled sets differ in size: {sizes}")
    return sets


def pretraining_rows(sets, exclude_ids=""):
    """Rows of the pooled sets: train and validation images to train on, validation to watch."""
    lines = Path(exclude_ids).read_text().splitlines() if exclude_ids else []
    banned = [line.strip() for line in lines if line.strip()]
    named = any(np.isin(s.names, banned).any() for s in sets)
    text = f"{exclude_ids}: expected names of labels.csv, one a line; found {banned[:1]}"
    require(named or not banned, f"{text}, and no line that names an image")
    train, val, start = [], [], 0
    for data in sets:
        rows = data.indices("train", "val")
        keep = torch.from_numpy(~np.isin(data.names[rows], banned))
        train.append(rows[keep] + start)
        val.append(data.indices("val") + start)
        start += len(data.images)
    val = torch.cat(val)
    return torch.cat(train), val[torch.randperm(len(val), generator=generator("monitor"))]


@contextlib.contextmanager
def stop_signals():
    """Yields a list that Ctrl-C and SIGTERM fill, for the loop to read between steps."""
    caught = []
    with contextlib.ExitStack() as stack:
        for name in (signal.SIGINT, signal.SIGTERM):
            old = signal.signal(name, lambda number, frame: caught.append(number))
            stack.callback(signal.signal, name, old)
        yield caught


class FiniteWatch:
    """Stops a run on a number that is not finite, without waiting for the device at each step."""

    def __init__(self):
        self.reader, self.queue = ThreadPoolExecutor(1), deque()

    def push(self, step, log):
        """Takes the scalars of a step; looks at those of earlier steps that have arrived."""
        values = torch.stack([v.float() for v in log.values()])
        self.queue.append((step, list(log), self.reader.submit(values.tolist)))
        self.check(wait=not values.is_cuda)

    def check(self, wait=True):
        """Raises UserError for the first number that is not finite."""
        while self.queue and (wait or self.queue[0][2].done()):
            step, names, values = self.queue.popleft()
            for name, value in zip(names, values.result(), strict=True):
                require(math.isfinite(value), f"step {step}: {name} is {value}; {STOPPED}")


class Trainer:
    """Everything that a pre-training step changes, and the step itself."""

    def __init__(self, config, device, world=1):
        self.config, self.device = config, device
        self.step, self.sums, self.history = 0, {}, []
        self.model = build_model(config).to(device, memory_format=torch.channels_last)
        if world > 1 and device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.optimizer = LARS(self.model.parameters(), **select(config, "weight_decay", "trust"))
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.call = torch.compile(self.model) if config.compile else self.model
        self.call = nn.parallel.DistributedDataParallel(self.call) if world > 1 else self.call

    def train_step(self, view1, view2, lr):
        """One update; returns what is logged, as scalars on the device."""
        with autocast(self.device, self.config.amp):
            pairs = self.call(view1, view2)
        pairs = [pair and tuple(gather(z) for z in pair) for pair in pairs]
        loss, log = mlvicx_loss(*pairs, **select(self.config, *LOSS_WEIGHTS))
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self.model.parameters()]
        log["grad_norm"] = torch.stack(torch._foreach_norm(grads)).norm()
        self.optimizer.param_groups[0]["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.sums = {k: v + self.sums.get(k, 0) for k, v in log.items()}
        if self.config.amp == "fp16":
            del log["grad_norm"]  # infinite where the scaler skips a step, which is its business
        return log

    def save(self, folder):
        """Writes last.pt, tensors and plain values: training goes on from it with the same bits."""
        state = {k: getattr(self, k).state_dict() for k in ("model", "optimizer", "scaler")}
        state |= select(self, "step", "sums", "history")
        save_checkpoint(folder / "last.pt", state, keep_previous=True)

    def restore(self, folder):
        """Goes on from the newest whole checkpoint of a run folder, if it holds any.

        Raises: UserError if all checkpoints are damaged, or they are of another model.
        """
        damage = []
        for path in (p for p in (folder / "last.pt", folder / "previous.pt") if p.exists()):
            try:
                state = load_checkpoint(path)
            except UserError as e:
                damage.append(str(e))
                continue
            load_weights(self.model, state["model"], path)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.history = state["step"], state["history"]
            self.sums = {k: v.to(self.device) for k, v in state["sums"].items()}
            reason = f" ({damage[0]})" if damage else ""
            print(f"{folder}: at step {self.step} of {path.name}{reason}")
            return
        require(not damage, "; ".join(damage) + "; give --overwrite to start again")

    def finish_epoch(self, lr, steps, sets, held, views, folder):
        """Monitor, history, encoder.pt, last.pt, metrics.csv: in this order no kill loses any."""
        config, encoder, epoch = self.config, self.model.encoder, self.step // steps
        row = {"epoch": epoch, "step": self.step, "lr": lr}
        row |= {k: float(v) / steps for k, v in self.sums.items()}
        row |= monitor(self.model, sets, held, views, config, self.device, epoch)
        self.history, self.sums = [*self.history, row], {}
        about = {"arch": encoder.arch, "size": config.size, "data": [s.origin for s in sets]}
        save_checkpoint(folder / "encoder.pt", {"encoder": encoder.state_dict()} | about)
        self.save(folder)
        log_epochs(folder, self.history)
        names = [k for k in row if k.startswith(("loss", "global_", "local_"))]
        names += [k for k in ("val_loss", "rank_global", "rank_local", "knn_auroc") if k in row]
        line = "  ".join(f"{name} {row[name]:.3f}" for name in names)
        tqdm.write(f"epoch {epoch}/{config.epochs}  {line}")
        if warning := collapse_warning(row):
            tqdm.write(warning)


def log_epochs(folder, history):
    """Rewrites metrics.csv and curves.png from the history that the checkpoint holds."""
    table = pd.DataFrame(history)
    store(folder / "metrics.csv", table.to_csv, index=False)
    figure = Figure(figsize=(12, 3))
    figure.subplots_adjust(0.04, 0.16, 0.99, 0.9, 0.2)
    panels = {"loss": "loss", "embedding std": "std", "effective rank": "rank", "k-NN AUROC": "knn"}
    for axis, (title, prefix) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        axis.set(title=title, xlabel="epoch")
        for name in table.filter(regex=f"^(?:val_)?{prefix}"):
            axis.plot("epoch", name, ".-", data=table.dropna(subset=name), label=name)
        if axis.lines:
            axis.legend(fontsize=6)
    store(folder / "curves.png", figure.savefig, dpi=100)


def pretrain(config):
    """Trains an encoder without labels; writes metrics.csv, curves.png, last.pt and encoder.pt.

    Args: config: PretrainConfig. On a run folder that was stopped, it goes on where that stopped.
    Returns: the run folder.
    Raises: UserError; KeyboardInterrupt once a stop signal has been obeyed.
    Source: authors' code for the recipe.
    """
    device, rank, world = setup(config)
    if config.deterministic:  # what it asks of cuBLAS
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    if rank > 0:
        dist.barrier()  # until the first process has drawn the demo set
    sets = open_sets(config)
    if world > 1 and rank == 0:
        dist.barrier()
    rows, held = pretraining_rows(sets, config.exclude_ids)
    if config.exclude_ids and rank == 0:
        print(f"{len(rows):,} images to train on, without those that {config.exclude_ids} names")
    batch, share = config.batch_size, config.batch_size // world
    possible = 2 * world <= batch <= len(rows) and batch % world == 0
    require(possible, f"--batch-size {batch}: expected 2 to {len(rows)}, in {world} equal shares")
    steps = len(rows) // batch  # an epoch leaves out a remainder, another one each time
    total, mine = config.epochs * steps, slice(rank * share, (rank + 1) * share)
    views = RandomViews(**select(config, *(f.name for f in dataclasses.fields(RandomViews))))
    cuda, resident = device.type == "cuda", None
    if cuda and sum(s.images.numel() for s in sets) < torch.cuda.mem_get_info(device)[0] / 2:
        resident = torch.cat([s.images.to(device) for s in sets])

    @lru_cache(2)
    def order(epoch):
        return torch.randperm(len(rows), generator=generator(config.seed, "order", epoch))

    def load(step):
        chosen = order(step // steps)[step % steps * batch :][:batch][mine]
        images = gather_images(sets, rows[chosen], resident)
        params = views.draw(batch, sets[0].size, generator(config.seed, "views", step))
        images = images.pin_memory() if cuda and resident is None else images
        return step, images, {k: v[:, mine] for k, v in params.items()}

    default = "-".join(s.folder.name for s in sets)
    folder, watch = Path(config.out or Path("runs") / default), FiniteWatch()
    trainer = Trainer(config, device, world)  # before there is a folder that it may not fit
    owner = open_run(config, default, sets, device) if rank == 0 else contextlib.nullcontext()
    with owner, stop_signals() as stop:
        if world > 1:
            dist.barrier()
        trainer.restore(folder)
        if rank == 0 and trainer.history:  # a kill may have come between last.pt and metrics.csv
            log_epochs(folder, trainer.history)
        if trainer.step == total:
            print(f"{folder}: finished; --overwrite starts again")
        bar = tqdm(total=total, initial=trainer.step, disable=not sys.stderr.isatty(), unit="step")
        for step, images, params in prefetch(load, range(trainer.step, total)):
            lr = config.lr * batch / 256
            lr = cosine_schedule(step, total, config.warmup_epochs * steps, lr)
            view1, view2 = views(images.to(device, non_blocking=True), params=params)
            watch.push(step, trainer.train_step(view1, view2, lr))
            bar.update()
            at_end, stopped = trainer.step % steps == 0, bool(stop)
            if at_end or stopped and world == 1:
                watch.check()
            if at_end and rank == 0:
                trainer.finish_epoch(lr, steps, sets, held, views, folder)
            if world > 1:  # a signal reaches the processes at different steps: they stop together
                stopped = at_end and any_process(stopped, device)
            if stopped:
                if not at_end:
                    trainer.save(folder)
                print(f"stopped at step {trainer.step}; the same command goes on from there")
                raise KeyboardInterrupt
    return folder


# ---------------------------------------------------------------- 11. evaluation


def load_encoder(weights, config, seed=0):
    """The encoder that `--weights` names: "random", "imagenet", or a file of `pretrain`.

    Returns: encoder, and what the file says of its origin ({} for the first two).
    Raises: UserError naming the key that does not fit.
    """
    if weights == "random":
        torch.manual_seed(seed)
        return Encoder(**select(config, "backbone", "context", "attention")), {}
    if weights == "imagenet":  # without blocks: random inline ones would spoil its features
        encoder = Encoder(config.backbone, "none")
        encoder.load_state_dict(imagenet_state(config.backbone))
        return encoder, {}
    # Deviation: a file that does not fit is an error; context-bottlenecks go along downstream.
    # The authors' code goes on with a random encoder, and drops the blocks.
    state = load_checkpoint(weights)
    held = f"{weights} holds {sorted(state)}, not an encoder; expected an encoder.pt"
    require({"encoder", "arch"} <= set(state), held)
    encoder = Encoder(**state["arch"])
    load_weights(encoder, state["encoder"], weights)
    return encoder, state


def label_subset(data, fraction, seed=0):
    """Training rows whose labels are used: the first patients in an order that depends on `seed`.

    Subsets are nested, and the same for every method.
    """
    # Deviation: label subsets are drawn by patient, not by image.
    rows = data.indices("train")
    drawn = {p: hashlib.sha256(f"{seed}:{p}".encode()).digest() for p in data.patient[rows]}
    patients = sorted(drawn, key=drawn.get)
    chosen = patients[: math.ceil(fraction * len(patients))]
    return rows[torch.from_numpy(np.isin(data.patient[rows], chosen))]


def masked_bce(logits, labels):
    """Binary cross-entropy over the known labels: (B, F), (B, F) with NaN -> (F,) means."""
    known = torch.isfinite(labels)
    loss = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
    return (loss * known).sum(0) / known.sum(0).clamp(min=1)


def linear_probe(x, y, x_val, y_val, strengths=(1.0, 0.1, 1e-2, 1e-3, 1e-4)):
    """Logistic regression on frozen features; the L2 strength with the best validation mean AUROC.

    Args:
        x, x_val: (n, C) float32 features. y, y_val: (n, F) labels of 0, 1, NaN.
        strengths: L2 penalties on standardised features, strongest first; warm starts.
    Returns: weight (F, C) and bias (F,) for the features as they come.
    Source: linear evaluation protocol, solved by L-BFGS instead of the authors' AdamW.
    """
    # Deviation: the linear probe is solved to its optimum by L-BFGS, not by AdamW.
    mean, std = x.mean(0), x.std(0, correction=0)
    std = std.clamp(min=1e-3 * float(std.mean()) + 1e-12)
    xs, xv = (x - mean) / std, (x_val - mean) / std
    weight = torch.zeros(y.shape[1], x.shape[1], requires_grad=True)
    bias = torch.zeros(y.shape[1], requires_grad=True)
    best, kept = -math.inf, None
    for strength in strengths:
        solver = torch.optim.LBFGS([weight, bias], max_iter=40, line_search_fn="strong_wolfe")

        def closure(solver=solver, strength=strength):
            solver.zero_grad()
            loss = masked_bce(F.linear(xs, weight, bias), y).sum()
            loss = loss + strength / 2 * weight.square().sum()
            loss.backward()
            return loss

        solver.step(closure)
        score = finding_aurocs(F.linear(xv, weight, bias).detach(), y_val)[0]
        if kept is None or score > best:
            best, kept = score, (weight.detach() / std, bias.detach().clone())
    return kept[0], kept[1] - kept[0] @ mean


class Classifier(nn.Module):
    """An encoder and a linear layer: (B, 3, H, W) -> (B, F) logits. Needs: Encoder."""

    def __init__(self, encoder, findings):
        super().__init__()
        self.encoder, self.fc = encoder, nn.Linear(encoder.channels[-1], findings)

    def forward(self, x):
        return self.fc(self.encoder(x)[0])


class UNetDecoder(nn.Module):
    """U-Net decoder over the five refined maps: K maps -> (B, H, W) logits.

    Args:
        channels: C_k of the maps, finest first. widths: channels after each of the four steps up.
    Source: ours, after U-Net (arXiv:1505.04597); the authors' code has no segmentation.
    """

    def __init__(self, channels=(64, 64, 128, 256, 512), widths=(256, 128, 64, 32)):
        super().__init__()
        below, self.blocks = channels[-1], nn.ModuleList()
        for skip, width in zip(channels[-2::-1], widths, strict=True):
            layers = [torchvision.ops.Conv2dNormActivation(c, width) for c in (below + skip, width)]
            self.blocks.append(nn.Sequential(*layers))
            below = width
        self.head = nn.Conv2d(below, 1, 1)

    def forward(self, maps, size):
        x = maps[-1]
        for skip, block in zip(maps[-2::-1], self.blocks, strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear")
            x = block(torch.cat([x, skip], 1))  # (B, C + C_k, H_k, W_k) -> (B, width, H_k, W_k)
        return F.interpolate(self.head(x), size=size, mode="bilinear")[:, 0]


class Segmenter(nn.Module):
    """Encoder and decoder: (B, 3, H, W) -> (B, H, W) logits. Needs: UNetDecoder.

    Args: frozen: the encoder stays in eval mode and without gradient, whatever `train()` says.
    """

    # Deviation: frozen is frozen, BatchNorm statistics too.

    def __init__(self, encoder, frozen):
        super().__init__()
        self.encoder, self.frozen = encoder.requires_grad_(not frozen), frozen
        self.decoder = UNetDecoder(encoder.channels)

    def train(self, mode=True):
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def forward(self, x):
        return self.decoder(self.encoder(x)[1], x.shape[2:])


def segmentation_loss(logits, mask):
    """BCE + soft Dice of the whole batch: (B, H, W) logits and 0/1 masks -> scalar."""
    p = logits.sigmoid()
    dice = (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, mask) + 1 - dice


def augment(images, target, size, rng):
    """Random flip and rotation up to 15 degrees; with masks, also scale and shift, of both alike.

    Args: images: uint8 (B, S, S). target: uint8 masks (B, S, S); another target stays as it is.
    Returns: float (B, size, size) images, and masks of the same shape or the target.
    """
    u = torch.rand(5, len(images), generator=rng)
    flipped, move = u[0][:, None, None] < 0.5, {"angle": 30 * u[1] - 15}
    x = resize_images(images, size)
    if target is not None and target.ndim == 3:
        move |= {"scale": 0.9 + 0.2 * u[2], "shift": 0.1 * u[3:] - 0.05}
        target = F.interpolate(target[:, None].float(), size=size)[:, 0]
        target = (warp(torch.where(flipped, target.flip(2), target), **move) > 0.5).float()
    return warp(torch.where(flipped, x.flip(2), x), **move), target


def fit(model, images, targets, loss, score, rows, config, key):
    """AdamW with warm restarts until the validation score stops rising; ends with the best weights.

    Args:
        images, targets: of the whole set. rows: those to train on.
        loss: (logits, targets) -> tensor, averaged. score: () -> validation score, to be raised.
    Source: authors' code (weight decay 0, clip 1.0, T0 = 10 doubling, floor 1e-6, patience 10).
    """
    # Deviation: no image is dropped, and validation images are never flipped.
    found = f"training needs two labelled images, found {len(rows)}; give more --labels"
    require(len(rows) > 1, found)  # BatchNorm needs two
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 10, 2, eta_min=1e-6)
    best, kept, stale = -math.inf, None, 0
    for epoch in tqdm(range(config.epochs), disable=not sys.stderr.isatty(), leave=False):
        model.train()
        order = rows[torch.randperm(len(rows), generator=generator(*key, "order", epoch))]
        parts = min(round(len(order) / config.batch_size), len(order) // 2)
        batches = order.tensor_split(max(1, parts))
        for i, batch in enumerate(batches):
            schedule.step(epoch + i / len(batches))
            rng = generator(*key, "augment", epoch, i)
            x, target = augment(images[batch], targets[batch], config.size, rng)
            with autocast(device, config.amp):
                logits = model(normalise(x.to(device)))
            optimizer.zero_grad()
            loss(logits.float(), target.to(device)).mean().backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        value = score()
        if kept is None or value > best:
            best, stale = value, 0
            kept = {k: v.clone() for k, v in model.state_dict().items()}
        elif (stale := stale + 1) >= config.patience:
            break
    model.load_state_dict(kept)


def cached_features(encoder, data, config, device, cache):
    """Frozen features (N, C5) of a whole set, computed once and kept in the folder `cache`."""
    sha = hashlib.sha256(repr((data.meta["images_sha256"], config.size, config.amp)).encode())
    for name, value in encoder.state_dict().items():
        sha.update(name.encode() + value.cpu().numpy().tobytes())
    path = cache / f"{sha.hexdigest()[:32]}.npy"
    if not path.exists():
        cache.mkdir(exist_ok=True)
        rows = torch.arange(len(data.images))
        x = predict(encoder, data.images, rows, config.size, device, config.amp)
        store(path, np.save, x.numpy())
    return torch.from_numpy(np.load(path))


def interval(runs, patients, metric, encoders=1, repeats=1000):
    """Mean and std over runs; 95 % bootstrap interval over test patients of the mean over runs.

    With several encoders, the std is that of their means over the runs of each.

    Args:
        runs: one array a run. patients: (n,). metric: (run, weights (..., n)) -> (..., M) numbers,
            where the weights say how often each image counts. encoders: runs of one encoder stand
            together. repeats: draws, in fifties.
    Returns: M dicts {"mean", "std", "ci95"}; None where undefined.
    """
    names, member = np.unique(patients.astype(str), return_inverse=True)
    values = np.array([metric(run, np.ones(len(member))) for run in runs])  # (R, M)
    draws, rng = [], np.random.default_rng(0)
    for _ in range(repeats // 50):
        drawn = rng.integers(0, len(names), (50, len(names)))
        counts = np.array([np.bincount(row, minlength=len(names)) for row in drawn])[:, member]
        draws.append(np.mean([metric(run, counts) for run in runs], axis=0))  # (50, M)
    low, high = pd.DataFrame(np.concatenate(draws)).quantile([0.025, 0.975]).to_numpy()
    repeated = values.reshape(encoders, -1, values.shape[1]).mean(1) if encoders > 1 else values
    std = repeated.std(0, ddof=1) if len(runs) > 1 else np.full(values.shape[1], np.nan)
    table = np.array([values.mean(0), std, low, high]).T.astype(object)  # (M, 4)
    table[pd.isna(table)] = None
    return [{"mean": mean, "std": std, "ci95": ci95} for mean, std, *ci95 in table]


def evaluate(config, task, data, device, unit, summary):
    """Runs `unit` for each of the weights and seeds, and writes the summary as results.json.

    Every result is kept as it comes: a stopped command reads back what it has. "random" more than
    once is as many initialisations, judged on the same labels, as several pre-trainings are.
    Args: unit: (encoder on the device, seed, folder) -> array.
        summary: (arrays, folder, number of encoders) -> dict.
    Returns: the dict of results.json.
    """
    for split in ("train", "val", "test"):
        found = len(data.indices(split))
        require(found, f"{data.folder} has no {split} images; prepare it with a {split} split")
    encoders = config.weights.split(",")
    for weights in encoders:
        load_encoder(weights, config)  # a file that does not fit leaves no run folder behind
    name, runs = f"{data.folder.name}-{task}-{config.mode}-{config.labels:g}", []
    seeds = range(config.seed, config.seed + config.seeds)
    with open_run(config, name, [data], device) as folder:
        for (i, weights), seed in product(enumerate(encoders), seeds):
            path = folder / f"unit-{i}-{seed}.npy"
            if not path.exists():
                encoder, origin = load_encoder(weights, config, seed + i * config.seeds)
                warn_overlap(origin.get("data", ()), data.origin)
                torch.manual_seed(seed)
                encoder = encoder.to(device, memory_format=torch.channels_last)
                store(path, np.save, unit(encoder, seed, folder))
            runs.append(np.load(path))
        about = select(config, "data", "weights", "mode", "labels", "seeds")
        results = {"task": task} | about | {"test": summary(runs, folder, len(encoders))}
        store_json(folder / "results.json", results)
    shown = results["test"] | results["test"].get("per_finding", {})
    for name in (name for name in shown if name != "per_finding"):
        print(f"{name:20} {json.dumps(shown[name])}")
    print(f"written: {folder / 'results.json'}")
    return results


def warn_overlap(seen, judged):
    """Says where weights may have seen the test pictures, unlabelled, in their pre-training."""
    of_nih = {"nih", "chestmnist", "rsna", "siim"}  # whose pictures are NIH's
    for name in sorted(of_nih & set(seen) - {judged}) if judged in of_nih else ():
        text = f"{judged} holds NIH images, as {name} does: these weights may have seen its test"
        print(f"warning: {text} pictures, unlabelled", file=sys.stderr)


def classify(config):
    """Multi-label classification with a frozen or a fine-tuned encoder.

    Frozen: logistic regression on cached features. Fine-tuned: everything, with flips and rotations
    up to 15 degrees. Strength or epoch is chosen on validation mean AUROC; test is read once.
    Args: config: ClassifyConfig. Returns: the dict of results.json.
    """
    if config.predict:
        return predict_folder(config)
    device, data = setup(config)[0], open_sets(config)[0]
    names = config.findings.split(",") if config.findings else data.findings
    known = names and set(names) <= set(data.findings)
    require(known, f"--findings {config.findings}: {data.folder} has {data.findings}")
    labels = data.labels[:, [data.findings.index(name) for name in names]]
    val, test = data.indices("val"), data.indices("test")

    def unit(encoder, seed, folder):
        rows = label_subset(data, config.labels, seed)
        model = Classifier(encoder, len(names)).to(device)
        whole = {"size": config.size, "device": device, "amp": config.amp}
        logits = partial(predict, model, data.images, **whole)

        def score():
            return finding_aurocs(logits(val), labels[val])[0]

        if config.mode == "frozen":
            x = cached_features(encoder, data, config, device, folder.parent / "features")
            weight, bias = linear_probe(x[rows], labels[rows], x[val], labels[val])
            model.fc.weight.data, model.fc.bias.data = weight.to(device), bias.to(device)
            scores = F.linear(x[test], weight, bias)
        else:
            fit(model, data.images, labels, masked_bce, score, rows, config, (seed, "classify"))
            scores = logits(test)
        about = {"arch": encoder.arch, "findings": names, "size": config.size}
        about["prepared_size"] = data.size
        save_checkpoint(folder / "classifier.pt", {"classifier": model.state_dict()} | about)
        return scores.numpy()

    def summary(runs, folder, encoders):
        from sklearn.metrics import average_precision_score  # here, for it takes a second

        y, per = labels[test].numpy(), {}
        patients, score = data.patient[test], lambda r, w: finding_aurocs(r, y, w)
        mean, *each = interval(runs, patients, score, encoders)
        for f, (name, value) in enumerate(zip(names, each, strict=True)):
            known = np.isfinite(y[:, f])
            n, positives = int(known.sum()), int(y[known, f].sum())
            ap = [average_precision_score(y[known, f], r[known, f]) for r in runs if positives]
            per[name] = {"auroc": value, "average_precision": float(np.mean(ap)) if ap else None}
            per[name] |= {"positives": positives, "n": n, "prevalence": positives / max(n, 1)}
        table = pd.json_normalize([{"finding": name} | row for name, row in per.items()])
        store(folder / "per_class.csv", table.to_csv, index=False)
        store(folder / "roc.png", roc_figure(runs[0], y, names).savefig, dpi=100)
        defined = sum(value["mean"] is not None for value in each)
        return {"mean_auroc": mean, "defined_findings": defined, "per_finding": per}

    return evaluate(config, "classify", data, device, unit, summary)


def roc_figure(scores, y, names):
    """ROC curves of one run: (n, F) scores and labels."""
    from sklearn.metrics import RocCurveDisplay  # here, for it takes a second

    axis = (figure := Figure(figsize=(5, 5), layout="constrained")).subplots()
    for name, s, label in zip(names, scores.T, y.T, strict=True):
        known = np.isfinite(label)
        if len(set(label[known])) == 2:
            RocCurveDisplay.from_predictions(label[known], s[known], name=name, ax=axis)
    return figure


def mask_counts(predicted, mask):
    """Pixels of intersection, prediction and truth of every image: two (B, H, W) -> (B, 3)."""
    both = predicted.bool() & mask.bool()
    return torch.stack([v.bool().sum((1, 2)) for v in (both, predicted, mask)], 1)


def dice_metrics(counts, weights=None):
    """Dice in its meanings, from the `mask_counts` (n, 3) of images that count `weights` times.

    Args: weights: (n,) or (R, n) array.
    Returns: (5,) or (R, 5) array: Dice of all images (empty and empty = 1); of images with a mask;
        of all pixels pooled; of predicting nothing, over all images; pooled intersection over
        union.
    """
    w = np.ones(len(counts)) if weights is None else weights
    both, predicted, true = counts.T.astype(float)
    total, some, one = predicted + true, true > 0, np.ones(len(counts))
    dice = np.where(total > 0, 2 * both / np.maximum(total, 1), 1.0)
    shares = [(dice, one), (dice * some, some), (2 * both, total), (~some, one)]
    shares += [(both, total - both)]
    with np.errstate(invalid="ignore"):
        return np.stack([(w * part).sum(-1) / (w * whole).sum(-1) for part, whole in shares], -1)


def segment(config):
    """Segmentation with a U-Net decoder on a frozen or a fine-tuned encoder.

    Loss: BCE + Dice. Epoch and threshold are chosen on the pooled validation Dice (that of all
    images is highest for blank masks, until a model is good); test is read once. Only images with
    `has_mask` are used.
    Args: config: SegmentConfig. Returns: the dict of results.json.
    """
    device, data = setup(config)[0], open_sets(config)[0]
    require(data.masks is not None, f"{data.folder} has no masks.npy; segment needs masks")

    def masked(rows):
        return rows[torch.from_numpy(data.has_mask[rows])]

    val, test = masked(data.indices("val")), masked(data.indices("test"))

    def unit(encoder, seed, folder):
        rows = masked(label_subset(data, config.labels, seed))
        model = Segmenter(encoder, config.mode == "frozen").to(device)

        def probabilities(part):
            return predict(model, data.images, part, config.size, device, config.amp).sigmoid()

        def counts(part, *thresholds):  # (n,) rows -> (T, n, 3), some images at a time
            out = []
            for rows in part.split(64):
                p = probabilities(rows)
                mask = F.interpolate(data.masks[rows][:, None].float(), size=config.size)[:, 0]
                out.append(torch.stack([mask_counts(p > t, mask) for t in thresholds]))
            return torch.cat(out, 1).numpy()

        def pooled(counts):  # nothing to find and nothing found: 1
            return np.nan_to_num(dice_metrics(counts)[2], nan=1.0)

        def score():
            return pooled(counts(val, 0.5)[0])

        key = (seed, "segment")
        fit(model, data.images, data.masks, segmentation_loss, score, rows, config, key)
        levels = np.arange(0.05, 1, 0.05)
        threshold = levels[np.argmax([pooled(c) for c in counts(val, *levels)])]
        result = counts(test, threshold)[0]
        dice = 2 * result[:, 0] / np.maximum(result[:, 1:].sum(1), 1)
        order = [i for i in np.argsort(-dice, kind="stable") if result[i, 2]]
        if order:
            picked = test[[order[0], order[len(order) // 2], order[-1]]]
            figure = masks_figure(data, picked, probabilities(picked) > threshold)
            store(folder / "masks.png", figure.savefig, dpi=100)
        return result

    def summary(runs, folder, encoders):
        names = ("dice_all", "dice_positive", "dice_pooled", "dice_blank", "iou_pooled")
        found = interval(runs, data.patient[test], dice_metrics, encoders)
        return dict(zip(names, found, strict=True))

    return evaluate(config, "segment", data, device, unit, summary)


def masks_figure(data, rows, predicted):
    """Image, truth and prediction of the best, the median and the worst case."""
    axes = (figure := Figure(figsize=(6, 6), layout="constrained")).subplots(3, 3)
    for line, label, row, p in zip(axes, ("best", "median", "worst"), rows, predicted, strict=True):
        line[0].set_title(f"{label}: image, truth, prediction", fontsize=8, loc="left")
        for axis, picture in zip(line, (data.images[row], data.masks[row], p), strict=True):
            axis.imshow(picture, cmap="gray")
            axis.set_axis_off()
    return figure


@torch.no_grad()
def gradcam(model, images, finding):
    """Where the logit of a finding comes from: Grad-CAM on the last map, the one that is pooled.

    The logit is linear in the pooled map, so that the gradient which weighs the channels is a row
    of the linear layer, and nothing needs to be differentiated.
    Args: model: Classifier, in eval mode. images: (B, 3, H, W). finding: column of the logits.
    Returns: (B, H, W) in [0, 1]. Source: arXiv:1610.02391.
    """
    x, encoder = images.expand(-1, 3, -1, -1), model.encoder
    x = encoder.features(x)[0]
    cam = F.relu((model.fc.weight[finding][:, None, None] * x).sum(1, keepdim=True))
    cam = F.interpolate(cam, size=images.shape[2:], mode="bilinear")[:, 0]
    return cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)


@torch.no_grad()
def spatial_maps(encoder, images):
    """Spatial attention of every context-bottleneck: (B, 3, H, W) -> list of (B, 1, H_k, W_k)."""
    convs, maps = [m.conv for m in encoder.modules() if isinstance(m, SpatialAttention)], []
    hooks = [c.register_forward_hook(lambda m, x, y: maps.append(y.sigmoid())) for c in convs]
    encoder(images)
    for hook in hooks:
        hook.remove()
    return maps


def predict_folder(config):
    """Probabilities of every X-ray under `--predict` by a classifier.pt; writes a CSV."""
    from data_prep import read_xray, resize_xray

    device, state = setup(config)[0], load_checkpoint(config.weights)
    known = {"classifier", "prepared_size"} <= set(state)
    require(known, f"{config.weights} is not a classifier.pt of `classify`")
    model = Classifier(Encoder(**state["arch"]), len(state["findings"])).to(device)
    load_weights(model, state["classifier"], config.weights)
    root, out, table = Path(config.predict), Path(config.out or "predictions.csv"), {}
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in XRAY_SUFFIXES)
    require(paths, f"no X-ray files ({' '.join(XRAY_SUFFIXES)}) under {root}")
    require(config.overwrite or not out.exists(), f"{out} exists; give another --out")
    for path in tqdm(paths, disable=not sys.stderr.isatty()):
        try:
            image = torch.tensor(resize_xray(read_xray(path), state["prepared_size"]))[None]
        except ValueError as e:
            print(f"left out {path}: {e}", file=sys.stderr)
        else:
            logits = predict(model, image, torch.tensor([0]), state["size"], device, config.amp)
            table[str(path.relative_to(root))] = logits[0].sigmoid().tolist()
    require(table, f"none of the {len(paths)} files under {root} could be read")
    frame = pd.DataFrame.from_dict(table, "index", columns=state["findings"])
    store(out, frame.to_csv, index_label="image")
    print(f"written: {out} ({len(table)} of {len(paths)} images)")


# ---------------------------------------------------------------- 12. command line


def closing_table(config, folder):
    """Test AUROC of a linear probe on frozen features: random weights and those just learned."""
    device, *_ = setup(config)
    weights = {"random": "random", "learned": folder / "encoder.pt"}
    place = {"device": device, "memory_format": torch.channels_last}
    encoders = {k: load_encoder(w, config, config.seed)[0].to(**place) for k, w in weights.items()}
    for data in open_sets(config):
        splits, columns = [data.indices(s) for s in ("train", "val", "test")], {}
        if not data.findings or not all(map(len, splits)):
            continue
        y = [data.labels[s] for s in splits]
        for name, encoder in encoders.items():
            x = [predict(encoder, data.images, s, config.size, device, config.amp) for s in splits]
            weight, bias = linear_probe(x[0], y[0], x[1], y[1])
            columns[name] = finding_aurocs(F.linear(x[2], weight, bias), y[2])
        table = pd.DataFrame(columns, index=["mean", *data.findings])
        for group, names in data.meta.get("groups", {}).items():
            table.loc[f"mean of {group}"] = table.loc[names].mean()
        print(f"\n{data.meta['name']}: test AUROC of a linear probe on frozen features, all labels")
        print(table.to_string(float_format="{:.3f}".format))


def export(config):
    """Writes the backbone as a state dict that torchvision's ResNet takes (all but fc).

    Raises: UserError for inline blocks without --drop-context: they are part of the function.
    """
    encoder, _ = load_encoder(config.weights, config)
    if encoder.arch["context"] == "inline" and not config.drop_context:
        reason = "has inline context-bottlenecks, without which a ResNet computes other features"
        raise UserError(f"{config.weights} {reason}; --drop-context writes it all the same")
    if Path(config.out).exists():
        raise UserError(f"{config.out} exists; give another --out")
    with replacing(config.out) as f:
        torch.save(encoder.backbone_state(), f)
    print(f"written: {config.out} ({encoder.arch['backbone']}, torchvision names, without fc)")


class LiteralMLVICX(MLVICX):
    """The model by its definition, one view after the other, for comparison."""

    def forward(self, view1, view2):
        z_global, z_local = [], []
        for view in (view1, view2):
            h, maps = self.encoder(view)
            flat = aggregate_literal(maps, self.local_head.convs).flatten(1)
            z_global.append(self.global_head(h))
            z_local.append(self.local_head.mlp(flat))
        return z_global, z_local


def torchvision_views(images, size):
    """The recipe of RandomViews in torchvision's transforms, image by image, for comparison."""
    first = [v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC)]
    first += [v2.RandomHorizontalFlip(), v2.RandomApply([v2.ColorJitter(0.4, 0.4)], 0.8)]
    blur = v2.GaussianBlur(23, (0.1, 2.0))
    view1 = v2.Compose([*first, blur])
    view2 = v2.Compose([*first, v2.RandomApply([blur], 0.1), v2.RandomSolarize(128, 0.2)])
    return [normalise(torch.cat([v(x[None]) for x in images]) / 255) for v in (view1, view2)]


def _peak_bytes(device, reset=False):
    """Peak memory so far, or, after a reset, the memory in use now; NaN where unknown."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return math.nan


BARE, FAST, LITERAL = "two-view ResNet-18", "MLVICX, inline", "literal, float32"
KEPT = "literal, memory kept"  # with `keep_memory`, as all but the literal form have it
FORMS = (BARE, "MLVICX, none", "MLVICX, side", FAST, LITERAL, KEPT)
FORWARD = ["encoder", "context-bottlenecks", "heads", "losses"]


def build_form(name, config, device):
    """The model of one row of the bench."""
    if name in (LITERAL, KEPT):
        return LiteralMLVICX(config.embedding_dim).to(device)
    if name.startswith(BARE):
        model = MLVICX(context="none", local=False)
        model.global_head.mlp = nn.Sequential()  # no heads: the loss sees h itself
    else:
        model = MLVICX(config.embedding_dim, context=name.split(", ")[1])
    model = model.to(device, memory_format=torch.channels_last)
    return torch.compile(model) if name.endswith("compiled") else model


def timed(call, device):
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure_form(name, config):
    """Least seconds of forward and backward, and peak memory in MB above the idle process.

    `peak_mb`: in use at once, as CUDA counts it; `resident_mb`: on a CPU, with what is kept.
    """
    device, literal = setup(config, keep=False)[0], name in (LITERAL, KEPT)
    torch.manual_seed(0)
    model = build_form(name, config, device)
    views = torch.rand(2, config.batch_size, config.size, config.size, device=device)
    views = [v.contiguous() if literal else v for v in map(normalise, views)]
    covariance = covariance_literal if literal else covariance_loss

    def step():
        model.zero_grad()
        with autocast(device, "off" if literal else config.amp):
            z = model(*views)
        mlvicx_loss(*z, covariance=covariance)[0].backward()

    if name != LITERAL:  # whose allocator stays as it is: its peak is that of KEPT
        keep_memory(False)
    idle = _peak_bytes(device, reset=True)
    step()
    peak = math.nan if name == LITERAL else _peak_bytes(device) - idle
    if name != LITERAL:
        keep_memory()
    _, *seconds = [timed(step, device) for _ in range(config.repeats + 1)]
    resident = _peak_bytes(device) - idle
    return {"seconds": min(seconds), "peak_mb": peak / 1e6, "resident_mb": resident / 1e6}


def bench_parts(config, device):
    """The parts of a step, as calls by name, and the parameters of the modules."""
    batch, size, amp = config.batch_size, config.size, autocast(device, config.amp)
    bare, model, literal = (build_form(name, config, device) for name in (BARE, FAST, LITERAL))
    still = [build_form(name, config, device).encoder.eval() for name in (BARE, FAST)]
    views = torch.randn(2, batch, 3, size, size, device=device)
    images = torch.randint(256, (16 * batch, 256, 256)).byte()
    mapped = np.memmap(tempfile.TemporaryFile(), np.uint8, "w+", shape=tuple(images.shape))
    mapped[:] = images  # read as a prepared set is, from a file
    prepared = SimpleNamespace(images=torch.from_numpy(mapped))
    theirs = {"num_workers": 2, "collate_fn": partial(torchvision_views, size=size)}
    theirs = torch.utils.data.DataLoader(images, batch, **theirs)
    ours, blocks = RandomViews(size), model.encoder.context
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with torch.no_grad(), amp:
        encoded = [model.encoder(view) for view in views]
        z = model.embed(*[model.pool(*e) for e in encoded])
    plain = [(h.float(), [x.float().contiguous() for x in maps]) for h, maps in encoded]
    parts = {
        "read": lambda: gather_images([prepared], torch.randint(16 * batch, (batch,))),
        "views": lambda: ours(images[:batch].to(device), generator("bench")),
        "views, torchvision": lambda: list(theirs),
        "encoder": lambda: [bare.encoder(view) for view in views],
        "context-bottlenecks": lambda: [
            block(x) for _, maps in encoded for block, x in zip(blocks.values(), maps, strict=True)
        ],
        "heads": lambda: model.embed(*[model.pool(*e) for e in encoded]),
        "losses": lambda: mlvicx_loss(*z),
        "heads, literal": lambda: literal.embed(*[literal.pool(*e) for e in plain]),
        "losses, literal": lambda: mlvicx_loss(*z, covariance=covariance_literal),
        "inference, no blocks": lambda: [still[0](view) for view in views],
        "inference": lambda: [still[1](view) for view in views],
        "LARS": LARS(model.parameters()).step,
    }
    fast = (*FORWARD, "inference, no blocks", "inference")
    parts |= {name: torch.no_grad()(amp(parts[name])) for name in fast}
    parts |= {name: torch.no_grad()(parts[name]) for name in ("heads, literal", "losses, literal")}
    modules = {"backbone": bare, "blocks": blocks}
    modules |= {"global head": model.global_head, "local head": model.local_head}
    return parts, {k: sum(p.numel() for p in v.parameters()) for k, v in modules.items()}


def bench(config):
    """What each form of the model and each part of a step costs, as ratios within one run.

    The fast forms run as in training: channels-last, with autocast if `--amp` says so. The literal
    form runs as it is defined: float32, the default layout and allocator, one view after the other.
    Each form has a process of its own, and the least of several times counts.
    Args: config: BenchConfig. Returns: the dict that `--out` writes as JSON.
    """
    device, *_ = setup(config)
    if config.out:  # before minutes of measuring
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    forms = [*FORMS, *(f"{name}, compiled" for name in (BARE, FAST) if device.type == "cuda")]
    torch.manual_seed(0)
    parts, parameters = bench_parts(config, device)
    # A fork server imports torch once, and forks every process from there.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["mlvicx"])
    apart = {"mp_context": context, "max_tasks_per_child": 1}
    with ProcessPoolExecutor(1, **apart) as pool:
        rows = dict(zip(forms, pool.map(measure_form, forms, repeat(config)), strict=True))
    turns = [
        {k: timed(call, device) for k, call in parts.items()} for _ in range(config.repeats + 1)
    ]
    rows |= {name: {"seconds": min(turn[name] for turn in turns[1:])} for name in parts}
    table = pd.DataFrame(rows).T
    table.loc["views, torchvision", "seconds"] /= 16  # it ran over sixteen batches
    table.loc[LITERAL, "peak_mb"] = table["peak_mb"][KEPT]  # the same model
    t, form, forward = table["seconds"], table["seconds"][forms], table["seconds"][FORWARD].sum()
    table.loc["backward", "seconds"] = t[FAST] - forward
    table["images_per_second"], table["over_resnet"] = config.batch_size / form, form / t[BARE]
    table["literal_over_it"] = t[LITERAL] / form
    ratios = {
        "whole step with LARS, literal / fast": (t[LITERAL] + t["LARS"]) / (t[FAST] + t["LARS"]),
        "the same, memory kept for both": (t[KEPT] + t["LARS"]) / (t[FAST] + t["LARS"]),
        "peak memory, fast / literal": table["peak_mb"][FAST] / table["peak_mb"][LITERAL],
        "resident, memory kept for both": table["resident_mb"][FAST] / table["resident_mb"][KEPT],
        "torchvision's views / ours": t["views, torchvision"] / t["views"],
        "read + views, share of a step": (t["read"] + t["views"]) / (t[FAST] + t["LARS"]),
        "training, with blocks / without": t[FAST] / t["MLVICX, none"],
        "inference, with blocks / without": t["inference"] / t["inference, no blocks"],
        "backward / forward": t[FAST] / forward - 1,
    }
    multiply_adds = {}
    for name, part in zip(("backbone", "blocks", "heads"), FORWARD, strict=False):
        with FlopCounterMode(display=False) as counter:
            parts[part]()  # two views, and two operations a multiply-add
        multiply_adds[name] = counter.get_total_flops() // (4 * config.batch_size)
    result = {"ratios": ratios, "parameters": parameters, "multiply_adds": multiply_adds}
    print("forward and backward of each form, then the parts of a step")
    shown = table.assign(seconds=1000 * table["seconds"]).rename(columns={"seconds": "ms"})
    print(shown.to_string(float_format="{:.4g}".format, na_rep=""))
    print(json.dumps(result, indent=1))
    about = {"torch": torch.__version__, "device": device_name(device)}
    result |= {"config": asdict(config), "threads": torch.get_num_threads()} | about
    rows = json.loads(table.to_json(orient="index", double_precision=15))
    result |= {"steps": {name: rows.pop(name) for name in forms}, "parts": rows}
    if config.out:
        store_json(config.out, result)
    return result


COMMANDS = {"pretrain": (PretrainConfig, pretrain), "classify": (ClassifyConfig, classify)}
COMMANDS |= {"segment": (SegmentConfig, segment), "export": (ExportConfig, export)}
COMMANDS |= {"bench": (BenchConfig, bench)}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; argparse would print the usage as well."""

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def build_parser():
    """A sub-command for each configuration class; flags, types and help come from its fields."""
    parser = _Parser(prog="mlvicx.py", description="MLVICX on chest X-rays; see README.md")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (cls, run) in COMMANDS.items():
        text = run.__doc__.splitlines()[0]
        sub = commands.add_parser(name, help=text, description=text)
        for f in dataclasses.fields(cls):
            shown = f" (default: {f.default})" if f.default not in ("", False) else ""
            boolean, plain = {"action": argparse.BooleanOptionalAction}, {"type": type(f.default)}
            about = (boolean if isinstance(f.default, bool) else plain) | dict(f.metadata)
            about |= {"default": argparse.SUPPRESS, "help": about["help"] + shown}
            sub.add_argument(f"--{f.name.replace('_', '-')}", **about)
    return parser


def main(argv=None):
    """Runs one command; a request that cannot be met prints one line and gives exit code 2."""
    try:
        given = vars(build_parser().parse_args(argv))
        command = given.pop("command")
        cls, run = COMMANDS[command]
        config = make_config(command, cls, given)
        result = run(config)
        if command == "pretrain" and os.environ.get("RANK", "0") == "0":
            closing_table(config, result)
        return 0
    except (UserError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
