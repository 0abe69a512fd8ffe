"""MLVICX: multi-level variance-covariance exploration for chest X-rays, in one file.

Two random views of an X-ray go through one ResNet. Context-bottleneck blocks (channel, then
spatial attention) refine its feature maps at five levels (the stem and four stages). A *global*
embedding is projected from the pooled last map, a *local* (multi-level) one from the five refined
maps. A VICReg loss on each trains the encoder, L = L_G + lambda * L_L: the embeddings of two views
agree (invariance), no dimension is constant (variance), no two say the same (covariance).
Paper: Singh, Gorade, Mishra, arXiv:2403.11504, IEEE JBHI 28(12), 2024.

    python mlvicx.py pretrain                 # demo X-rays, drawn on first use; minutes on a CPU
    python mlvicx.py classify --weights runs/demo/encoder.pt --labels 0.01,0.1,1
    python mlvicx.py segment  --weights runs/demo/encoder.pt

The file is read from top to bottom: settings (2), context-bottleneck (3), encoder (4),
projectors (5), model (6), losses (7), optimiser (8), data and views (9), pre-training (10: run
folders, devices, quality of features, the training itself), evaluation (11), command line (12).

Letters in shapes: B images in a batch, C channels (C_k of level k), H x W pixels, D embedding
dimensions, K levels, N images in a set (n of them chosen), S side of the stored images, F findings
(labels of disease), R bootstrap draws. "split" is train, val or test. "Needs:" names what must be
copied along with a part. `*_literal` is a definition, for reading and tests; training uses the fast
form. `# Deviation:` marks each difference from the authors' code; RESULTS.md lists the same ones.
"""
# ---------------------------------------------------------------- 1. imports and constants

import argparse
import contextlib
import copy
import ctypes
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import re
import signal
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from tqdm import tqdm

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ARCHITECTURE = ("backbone", "context", "attention")  # settings of the encoder
LEVELS = (1, 2, 3, 4, 5)  # 1: the stem; 2 to 5: layer1 to layer4 of the ResNet


class UserError(ValueError):
    """A request that cannot be met; its message is the one line that the user reads."""


def require(condition, message):
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


# ---------------------------------------------------------------- 2. configuration
# One dataclass for each command. Every flag of the command line is a field here; the comment behind
# it is the help that `--help` shows, so it must be there. Defaults of the commands stand here and
# nowhere else; PRESETS adapts them to a dataset.


def parse_numbers(text):
    """A list of numbers on the command line: "0.01,0.1,1" -> (0.01, 0.1, 1)."""
    numbers = tuple(json.loads(f"[{text}]"))
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise ValueError(text)
    return numbers


@dataclass(frozen=True)
class RunConfig:
    """Settings that all runs have in common."""

    data: str = "demo"  # prepared dataset: a name under --data-root, or a path
    data_root: str = "data"  # folder that holds the prepared datasets
    out: str = ""  # run folder; without it, a folder below runs/ that is named after the run
    size: int = 224  # side of the images that the network sees, in pixels
    batch_size: int = 64  # images in a step, over all processes
    seed: int = 0  # decides initialisation, order, views and label subsets
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps (mps is untried)
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"  # mixed precision; auto: on CUDA alone
    backbone: Literal["resnet18", "resnet34", "resnet50"] = "resnet18"  # encoder
    context: Literal["inline", "side", "none"] = "side"  # blocks beside the ResNet, in it, none
    attention: Literal["both", "channel", "spatial"] = "both"  # steps of a context-bottleneck
    overwrite: bool = False  # replace the files of an earlier run in the run folder


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Settings of `pretrain`; the defaults are the authors' recipe, where their code has one.

    One is not: the authors' context-bottlenecks are part of the ResNet, `--context inline`.
    """

    include_val: bool = False  # train on the validation images too, as the paper does
    exclude_ids: str = ""  # text file of image names to leave out, one a line
    batch_size: int = 0  # images in a step, over all processes; 0: 256 on CUDA, else 64
    epochs: int = 300  # passes over the training images
    lr: float = 0.2  # base learning rate for a batch of 256; scaled with the batch
    warmup_epochs: float = 2.0  # epochs of linear warm-up
    weight_decay: float = 1e-6  # weight decay of LARS, the optimiser
    trust: float = 0.001  # trust coefficient of LARS: step of a layer relative to its norm
    init: Literal["random", "imagenet"] = "random"  # initial weights of the encoder
    levels: tuple = LEVELS  # levels that feed the multi-level head
    embedding_dim: int = 4096  # width of both projectors
    final_bn: bool = True  # end the projectors in BatchNorm (authors); no: as VICReg
    local_weight: float = 1.0  # lambda of L_G + lambda L_L; 0, with none and --no-final-bn: VICReg
    sim_coeff: float = 25.0  # weight of the invariance term
    std_coeff: float = 25.0  # weight of the variance term
    cov_coeff: float = 1.0  # weight of the covariance term
    crop_min: float = 0.08  # smallest crop, as a fraction of the area; 1: no crops
    flip: float = 0.5  # probability of a horizontal flip
    jitter: float = 0.4  # strength of brightness and contrast changes; 0: none
    blur: float = 2.0  # largest blur sigma, in pixels; 0: no blur
    solarize: float = 0.2  # probability of solarizing view 2
    rotation: float = 0.0  # largest rotation, in degrees
    identical_views: bool = False  # give both branches the same view
    knn_every: int = 5  # epochs between k-NN evaluations on validation labels; 0: never
    checkpoint_minutes: float = 10.0  # minutes between checkpoints, beside those at stops
    compile: bool = False  # compile the context-bottlenecks, for a minute; then faster on CUDA
    graph: bool = True  # record forward and backward pass as CUDA graphs; on one GPU alone
    deterministic: bool = False  # bit-exact resume on CUDA too, at some cost in speed


@dataclass(frozen=True)
class EvalConfig(RunConfig):
    """Settings that `classify` and `segment` share; fine-tuning follows the authors' code."""

    weights: str = "random"  # random, imagenet or encoder files; several, with commas
    mode: Literal["frozen", "finetune"] = "frozen"  # train the head alone, or everything
    labels: tuple = (1.0,)  # fractions of the training patients whose labels are used
    seeds: int = 1  # repetitions, each with its own label subset and random weights
    epochs: int = 300  # most passes over the labelled images
    patience: int = 10  # epochs without a better validation score before stopping
    lr: float = 0.0003  # AdamW learning rate


@dataclass(frozen=True)
class ClassifyConfig(EvalConfig):
    """Settings of `classify`."""

    findings: str = ""  # findings to evaluate, joined by commas; without it, all


@dataclass(frozen=True)
class SegmentConfig(EvalConfig):
    """Settings of `segment`."""

    batch_size: int = 16  # images in a step
    lr: float = 0.001  # AdamW learning rate


@dataclass(frozen=True)
class PredictConfig:
    """Settings of `predict`."""

    files: tuple = ()  # X-ray files (PNG, JPEG, DICOM), or folders of them
    weights: str = "classifier.pt"  # classifier.pt of a `classify` run
    out: str = "predictions.csv"  # CSV file to write
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps (mps is untried)
    overwrite: bool = False  # replace the CSV file if it exists


@dataclass(frozen=True)
class ExportConfig:
    """Settings of `export`."""

    weights: str = "encoder.pt"  # encoder.pt of a `pretrain` run
    out: str = "resnet.pth"  # file to write
    drop_context: bool = False  # write the backbone without its inline blocks all the same


# Defaults that suit a dataset better, by command and name of its folder; the demo has few images
# and steps, hence large steps (trust) and mild views. A flag that is given wins.
PRESETS = {
    ("pretrain", "demo"): {
        "size": 64,
        "batch_size": 64,
        "epochs": 4,
        "lr": 0.008,
        "trust": 1.0,
        "warmup_epochs": 0.5,
        "embedding_dim": 512,
        "crop_min": 0.6,
        "jitter": 0.2,
        "blur": 0.0,
        "solarize": 0.0,
    },
    ("classify", "demo"): {"size": 64, "epochs": 20, "patience": 5},
    ("segment", "demo"): {"size": 128, "epochs": 20, "patience": 5},
}
# Smallest and largest value of numbers; those that are not listed must not be negative.
LIMITS = {
    "size": (32, 4096),
    "epochs": (1, math.inf),
    "seeds": (1, math.inf),
    "patience": (1, math.inf),
    "embedding_dim": (2, math.inf),
    "levels": (1, 5),
    "labels": (1e-9, 1),
    "crop_min": (1e-9, 1),
    "flip": (0, 1),
    "jitter": (0, 1),
    "solarize": (0, 1),
}


def make_config(command, cls, given):
    """Settings of one command: the defaults, then the preset of the dataset, then what is given.

    Args: command: "pretrain", ... cls: its configuration class. given: dict of fields.
    Returns: an instance of cls. Raises: UserError for a number outside of its limits.
    """
    dataset = Path(given.get("data", "demo")).name
    preset = PRESETS.get((command, dataset), {})
    config = cls(**dict(preset, **given))
    for name, value in asdict(config).items():
        if isinstance(value, (int, float, tuple)):
            numbers = np.ravel(value)  # one number becomes a list
            low, high = LIMITS.get(name, (0, sys.float_info.max))
            distinct = 0 < len(numbers) == len(set(numbers))  # not empty, none twice
            whole = name != "levels" or numbers.dtype == int
            valid = distinct and whole and all((numbers >= low) & (numbers <= high))
            flag = "--" + name.replace("_", "-")
            require(valid, f"{flag}: expected distinct numbers, {low:g} to {high:g}, found {value}")
    return config


def select(config, *names):
    """Some settings of a configuration, as keyword arguments."""
    return {name: getattr(config, name) for name in names}


# ---------------------------------------------------------------- 3. context-bottleneck


class ChannelAttention(nn.Module):
    """Scales every channel by what its global average and its global maximum say about it.

    Args: channels: C >= 2; the hidden layer has half as many. Input and output: (B, C, H, W).
    Source: authors' code (the channel step of CBAM, an attention block, arXiv:1807.06521).
    """

    def __init__(self, channels):
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.expand = nn.Conv2d(channels // 2, channels, 1, bias=False)

    def forward(self, x):
        # A sum has a faster backward pass than a mean. `amax` would split the gradient between
        # equal values; the pool and `max` do not: the pool is faster on a CPU, `max` on CUDA.
        positions = x.shape[2] * x.shape[3]
        average = x.sum((2, 3)) / positions  # (B, C, H, W) -> (B, C)
        if x.is_cuda:
            pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H W, C)
            largest = pixels.max(1).values
        else:
            largest = F.adaptive_max_pool2d(x, 1).flatten(1)

        # gate = sigmoid(mlp(average) + mlp(largest)) with one MLP, C -> C / 2 -> C, of 1x1
        # convolutions. Its second layer is linear, so that the two may be added before it.
        pooled = torch.stack([average, largest])  # (2, B, C)
        hidden = F.relu(F.linear(pooled, self.reduce.weight.flatten(1)))
        gate = F.linear(hidden.sum(0), self.expand.weight.flatten(1))  # (B, C)
        return x * gate.sigmoid()[:, :, None, None]


class SpatialAttention(nn.Module):
    """Scales every position by a 7x7 convolution of the mean and the maximum over channels.

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
    Input and output: (B, C, H, W). Sequential runs the steps in the order in which they are set.
    Needs: ChannelAttention, SpatialAttention. Source: abstract of the paper; authors' code.
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


class Encoder(nn.Module):
    """A torchvision ResNet that returns its representation and the refined maps of five levels.

    Args:
        backbone: "resnet18", "resnet34" or "resnet50"; weights keep torchvision's names.
        context: "side": a plain ResNet, whose maps are refined on their way to the multi-level
            head. "inline" (authors' code): each refined map feeds the next stage, so that the
            blocks are part of the encoder. "none": no blocks.
        attention: steps of each block, see ContextBottleneck.
        levels: those of 1 to 5 that get a block under "side"; "inline" has all five.
    Input: (B, 3, H, W), or (B, 1, H, W) gray, repeated; H, W >= 32.
    Returns: h (B, C5) and a list of five maps: at 224 px (B, 64, 112, 112), (B, 64, 56, 56),
        (B, 128, 28, 28), (B, 256, 14, 14), (B, 512, 7, 7) for ResNet-18.
    Needs: ContextBottleneck, LEVELS. Source: authors' code (inline); abstract of the paper (side).
    """

    def __init__(self, backbone="resnet18", context="side", attention="both", levels=LEVELS):
        super().__init__()
        if context not in ("inline", "side", "none"):
            raise ValueError(f"expected context inline, side or none, got {context!r}")
        resnet = getattr(torchvision.models, backbone)(weights=None)
        for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"):
            setattr(self, name, getattr(resnet, name))
        width = resnet.fc.in_features  # 512 for ResNet-18
        self.channels = (64, width // 8, width // 4, width // 2, width)
        # Saved with the weights: Encoder(**arch) builds the same network.
        self.arch = {"backbone": backbone, "context": context, "attention": attention}
        self.arch["levels"] = list(levels)
        self.context = nn.ModuleDict()
        for level in {"inline": LEVELS, "side": levels, "none": ()}[context]:
            self.context[str(level)] = ContextBottleneck(self.channels[level - 1], attention)

    def stages(self, x):
        """(B, 3, H, W) -> five maps, each as the next stage sees it; h averages the last."""
        if x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < 32:
            raise ValueError(f"expected (B, 1 or 3, >=32, >=32), got {tuple(x.shape)}")
        x = F.relu(self.bn1(self.conv1(x.expand(-1, 3, -1, -1))), inplace=True)
        maps = []
        for level in LEVELS:
            if level == 2:
                x = F.max_pool2d(x, 3, 2, 1)
            if level > 1:
                x = getattr(self, f"layer{level - 1}")(x)
            if self.arch["context"] == "inline":
                x = self.context[str(level)](x)
            maps.append(x)
        return maps

    def refine(self, maps):
        """The maps of `stages` through the blocks that sit beside the ResNet, if there are any."""
        refined = list(maps)
        if self.arch["context"] == "side":
            for level, block in self.context.items():
                refined[int(level) - 1] = block(maps[int(level) - 1])
        return refined

    def forward(self, x):
        maps = self.stages(x)
        return maps[-1].mean((2, 3)), self.refine(maps)  # (B, C5, H, W) -> (B, C5)


# ---------------------------------------------------------------- 5. projectors


def projector_mlp(inputs, width, final_bn=True):
    """Three linear layers to a `width`-dimensional embedding: (B, inputs) -> (B, width).

    Args: final_bn: end in BatchNorm (authors' code). What leaves it has a standard deviation of
        sqrt(B / (B - 1)) > 1, so that `variance_loss` is zero until a BatchNorm weight falls below
        1 or, in a collapse, what enters it is constant. False: end in a linear layer without bias;
        `variance_loss` acts from the start.
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


def project(mlp, x):
    """(2 B, inputs), the rows of view 1 and then those of view 2 -> their two embeddings (B, D).

    A linear layer treats all rows alike, so both views go through it at once and its weights are
    read once. BatchNorm takes one view at a time: its statistics are those of a single view.
    """
    for layer in mlp:
        if isinstance(layer, (nn.Linear, nn.ReLU)):
            x = layer(x)
        else:
            x = torch.cat([layer(view) for view in x.chunk(2)])
    return x.chunk(2)


class GlobalProjector(nn.Module):
    """h (B, C5) -> z_global (B, D). Needs: projector_mlp. Source: authors' code."""

    def __init__(self, channels=512, embedding_dim=4096, final_bn=True):
        super().__init__()
        self.mlp = projector_mlp(channels, embedding_dim, final_bn)

    def forward(self, h):
        return self.mlp(h)


def aggregate_literal(maps, convs):
    """The multi-level map by its definition: resize, 1x1 convolution, sum, average pool.

    Args: maps: K tensors (B, C_k, H_k, W_k). convs: K 1x1 convolutions C_k -> C.
    Returns: (B, C, 4, 4). Source: authors' code.
    """
    total = 0
    for x, conv in zip(maps, convs, strict=True):
        x = F.interpolate(x, size=(64, 64), mode="bilinear", align_corners=False)
        total = total + conv(x)  # (B, C_k, 64, 64) -> (B, C, 64, 64)
    return F.adaptive_avg_pool2d(total, 4)


@functools.lru_cache(64)
@torch.inference_mode(False)  # one that is kept from inference mode could not be trained with
def pool_matrix(height, width, dtype, device):
    """(16, H W): the weight of every pixel of a map in every cell of the 4 x 4 grid.

    Along one axis, resizing to 64 and pooling to 4 are linear: applied to the unit vectors, they
    give the columns of their matrix (4, side). The weights of both axes are multiplied. It is kept
    for the next call; after torch.export, call pool_matrix.cache_clear().
    """
    axes = []
    for side in (height, width):
        unit_vectors = torch.eye(side, dtype=torch.float64)[None]  # (1, side, side)
        resized = F.interpolate(unit_vectors, size=64, mode="linear", align_corners=False)
        axes.append(F.adaptive_avg_pool1d(resized, 4)[0].T)  # (1, side, 64) -> (4, side)
    rows, columns = axes
    weights = rows[:, None, :, None] * columns[:, None]  # (4, 1, H, 1) * (4, 1, W)
    return weights.reshape(16, -1).to(device, dtype)  # (4, 4, H, W) -> (16, H W)


def aggregate(maps, convs):
    """`aggregate_literal`, but every map is pooled first: 16 positions to convolve, not 4096.

    All steps are linear and act on different axes, so their order may change (the bias passes, for
    the weights of a cell sum to 1). Args, Returns: as `aggregate_literal`. Needs: pool_matrix.
    """
    # Deviation: maps are pooled before their convolutions; same value and gradients, less work.
    total = 0
    for x, conv in zip(maps, convs, strict=True):
        weights = pool_matrix(*x.shape[2:], x.dtype, x.device)  # (16, H W)
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, C_k, H, W) -> (B, H W, C_k)
        pooled = torch.bmm(weights.expand(len(x), -1, -1), pixels)  # (B, 16, C_k)
        # A 1x1 convolution is a linear layer on the channels.
        total = total + F.linear(pooled, conv.weight.flatten(1), conv.bias)  # (B, 16, C)
    return total.transpose(1, 2).unflatten(2, (4, 4))  # (B, C, 4, 4)


class LocalProjector(nn.Module):
    """Embeds the maps of several levels together: K maps -> z_local (B, D).

    On its own: head = LocalProjector((64, 128)); loss, _ = vicreg_loss(head(maps1), head(maps2)).
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
        with context "none" and final_bn False, this is VICReg. levels: those of 1 to 5 whose maps
        feed that head. encoder: backbone, context, attention of Encoder.
    Input: view1, view2 (B, 3, H, W).
    Returns: (z_global1, z_global2), (z_local1, z_local2), each (B, D); the second is () without
        the multi-level head.
    Needs: Encoder, GlobalProjector, LocalProjector, project, LEVELS.
    """

    def __init__(self, embedding_dim=4096, final_bn=True, local=True, levels=LEVELS, **encoder):
        super().__init__()
        self.encoder = Encoder(levels=levels, **encoder)
        self.levels = tuple(levels)
        if self.encoder.arch["context"] == "side" and not local:
            raise ValueError("context side needs the local head, which trains its blocks; use none")
        self.global_head = GlobalProjector(self.encoder.channels[-1], embedding_dim, final_bn)
        self.local_head = None
        if local:
            channels = [self.encoder.channels[level - 1] for level in levels]
            self.local_head = LocalProjector(channels, embedding_dim, final_bn)

    def forward(self, view1, view2):
        if view1.shape != view2.shape:
            raise ValueError("expected two views of one shape")
        # One pass for each view: BatchNorm sees the statistics of a single view.
        maps1, maps2 = self.encoder.stages(view1), self.encoder.stages(view2)
        h = torch.cat([maps1[-1], maps2[-1]]).mean((2, 3))  # (2 B, C5)
        z_global = project(self.global_head.mlp, h)
        if self.local_head is None:
            return z_global, ()

        # Blocks and pooling treat every image by itself: both views go through them together.
        maps = [torch.cat(pair) for pair in zip(maps1, maps2)]  # (2 B, C_k, H_k, W_k)
        maps = self.encoder.refine(maps)
        pooled = self.local_head.pool([maps[level - 1] for level in self.levels])  # (2 B, ...)
        return z_global, project(self.local_head.mlp, pooled)


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
    """The covariance term by its definition, from the D x D covariance matrix.

    Args: z: (B, D) embeddings of one view. Call it outside of autocast, whose products are rounded.
    Returns: scalar tensor, sum over i != j of cov_ij^2, divided by D.
    Needs: _centred. Source: VICReg (arXiv:2105.04906), eq. 3 and 4.
    """
    zc = _centred(z)
    cov = zc.T @ zc / (len(zc) - 1)  # (D, D)
    diagonal = cov.diagonal()
    return (cov.square().sum() - diagonal.square().sum()) / z.shape[1]


def covariance_loss(z):
    """`covariance_literal` exactly, from the smaller of two matrices.

    The squares of all elements of zc.T @ zc (D, D) and of zc @ zc.T (B, B) have the same sum.

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

    Args: z1, z2: (B, D) embeddings of the two views. sim_coeff, std_coeff, cov_coeff: weights of
        the terms (MLVICX: alpha, beta, gamma). covariance: that term, or `covariance_literal`.
    Returns: the loss, and its parts {"invariance", "variance", "covariance"}, unweighted, with
        gradient.
    Needs: invariance_loss, variance_loss, covariance_loss. Source: VICReg, eq. 6; authors' code
        (variance averaged over the two views, covariance summed).
    """
    invariance = invariance_loss(z1, z2)
    variance = (variance_loss(z1) + variance_loss(z2)) / 2
    redundancy = covariance(z1) + covariance(z2)
    total = sim_coeff * invariance + std_coeff * variance + cov_coeff * redundancy
    return total, {"invariance": invariance, "variance": variance, "covariance": redundancy}


def mlvicx_loss(z_global, z_local=(), local_weight=1.0, **coefficients):
    """L = L_G + lambda * L_L.

    Args: z_global: the pair of (B, D) global embeddings. z_local: the multi-level pair, or ().
        local_weight: lambda. coefficients: of `vicreg_loss`.
    Returns: the loss, and a dict of detached scalars: "loss", "loss_global", "loss_local" and every
        part as "global_invariance", ...
    Needs: vicreg_loss. Source: summary of the paper; authors' code (lambda = 1).
    """
    loss_global, parts = vicreg_loss(*z_global, **coefficients)  # L_G
    log = {f"global_{name}": value.detach() for name, value in parts.items()}
    log["loss_global"] = loss_global.detach()
    total = loss_global

    if len(z_local) > 0:
        loss_local, parts = vicreg_loss(*z_local, **coefficients)  # L_L
        for name, value in parts.items():
            log[f"local_{name}"] = value.detach()
        log["loss_local"] = loss_local.detach()
        total = total + local_weight * loss_local

    log["loss"] = total.detach()
    return total, log


class GatherLayer(torch.autograd.Function):
    """The tensors of all processes, joined; their gradients are summed over the processes."""

    @staticmethod
    def forward(ctx, z):
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # it is not ours to change
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(z):
    """Embeddings of all W processes in rank order, with gradient: (B / W, D) -> (B, D).

    Call it on every embedding before the loss when processes share a batch in equal parts: variance
    and covariance are statistics of the whole batch. The backward pass sums W equal gradients, and
    the average of DistributedDataParallel divides by W. Without a process group it returns z.
    Needs: GatherLayer. Source: VICReg's code (FullGatherLayer).
    """
    if not dist.is_initialized():
        return z
    return GatherLayer.apply(z.contiguous())


# ---------------------------------------------------------------- 8. optimiser and schedule


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled, layer by layer, to the norm of the weights.

    Args: params: parameters, or groups of them; those of one dimension or none get neither weight
        decay nor scaling. trust: the step of a layer over the norm of its weights, at lr 1 and
        without momentum. A layer is not scaled where its weights, or its gradient with the weight
        decay, are all zero. A gradient of zeros still shrinks a layer, by lr * trust a step; a
        gradient of None leaves it as it is.
    Source: LARS (arXiv:1708.03888); authors' code (weight decay 1e-6).
    """

    def __init__(self, params, lr=0.2, weight_decay=1e-6, momentum=0.9, trust=0.001):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust}
        super().__init__(params, defaults)

    def step(self, closure=None):
        """One update from the gradients, which it changes. Returns: what the closure returns."""
        loss = closure() if closure else None
        for group in self.param_groups:
            self.update(group)
        return loss

    @torch.no_grad()
    def update(self, group):
        """The update of one group; `_foreach` operations work on lists of tensors at once."""
        params = [p for p in group["params"] if p.grad is not None]
        layers = [p for p in params if p.ndim > 1]
        if layers:
            grads = [p.grad for p in layers]
            torch._foreach_add_(grads, layers, alpha=group["weight_decay"])  # weight decay
            p_norm = torch.stack(torch._foreach_norm(layers))
            g_norm = torch.stack(torch._foreach_norm(grads))
            ratio = group["trust"] * p_norm / g_norm
            ratio = ratio.masked_fill(torch.minimum(p_norm, g_norm) == 0, 1.0)
            torch._foreach_mul_(grads, list(ratio.unbind()))  # scaling

        momenta = []
        for p in params:
            if p not in self.state:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta.append(self.state[p]["momentum_buffer"])
        if params:
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, [p.grad for p in params])
            torch._foreach_sub_(params, torch._foreach_mul(momenta, group["lr"]))


def cosine_schedule(step, total, warmup, base, floor=0.001):
    """Learning rate of one step: linear warm-up, then a cosine to exactly `floor * base`.

    Args: step: 0 ... total - 1; the last has the floor itself. warmup: steps of warm-up, less
        than half of all; the first has base / warmup. floor: as a fraction of `base`.
    Source: VICReg (arXiv:2105.04906), section 4.2; authors' code.
    """
    # Deviation: the warm-up starts at base / warmup, not at 0, and the cosine ends at the floor.
    warmup = min(round(warmup), (total - 1) // 2)
    if step < warmup:
        return base * (step + 1) / warmup
    if total == 1:
        return base * floor
    progress = min((step - warmup) / max(total - 1 - warmup, 1), 1)  # from 0 to 1
    cosine = 0.5 * (1 + math.cos(math.pi * progress))  # from 1 to 0
    return base * (floor + (1 - floor) * cosine)


# ---------------------------------------------------------------- 9. prepared data and views


def generator(*keys):
    """A CPU random generator that is a function of its keys alone, as in (seed, "views", step).

    Args: keys: Python's own numbers and texts, of which `repr` is taken.
    """
    digest = hashlib.sha256(repr(keys).encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1
    return torch.Generator().manual_seed(seed)


def is_in(values, wanted):
    """Which of the values (n,) are among the wanted ones: (n,) bool tensor."""
    return torch.from_numpy(pd.Index(values).isin(wanted))


class PreparedData:
    """A folder that data_prep.py has written: images on disk, labels in memory.

    labels.csv: image, patient, split, a column for each finding, has_mask if there are masks.
    Args: data: name under `root`, or a path.
    Attributes: images, masks (or None): uint8 (N, S, S) tensors over a memory map; labels: float32
        (N, F), NaN where unknown; findings: F names; patient, split, names: (N,) arrays; has_mask:
        bool tensor (N,), if there are masks; meta: dict of meta.json; size: S; origin: the command
        of data_prep.py, "nih", "folder", ...
    Raises: UserError if the folder is missing or incomplete, or a patient is in two splits.
    """

    def __init__(self, data, root="data"):
        self.folder = Path(root) / data
        if Path(data).is_dir() and not self.folder.is_dir():
            self.folder = Path(data)
        try:
            self._read()
        except (ValueError, KeyError, OSError, EOFError) as e:
            known = sorted(path.parent.name for path in Path(root).glob("*/meta.json"))
            text = f"{self.folder} cannot be used as prepared data ({e}); prepared: {known}"
            raise UserError(f"{text}; next: python data_prep.py --help") from e

    def _read(self):
        self.meta = json.loads((self.folder / "meta.json").read_text())
        self.findings = list(self.meta["findings"])
        self.origin = self.meta.get("options", {}).get("command", self.meta["name"])
        table = pd.read_csv(
            self.folder / "labels.csv",
            dtype={"image": str, "patient": str},
            keep_default_na=False,  # a patient may be called NA ...
            na_values=[""],  # ... and what is unknown is blank
        )
        self.labels = torch.from_numpy(table[self.findings].to_numpy(np.float32, copy=True))
        self.names, self.patient, self.split = table[["image", "patient", "split"]].to_numpy().T
        self.images, self.masks = self._map("images.npy"), None
        self.size = self.images.shape[1]
        if "has_mask" in table:
            self.masks = self._map("masks.npy")
            self.has_mask = torch.from_numpy(table["has_mask"].to_numpy() == 1)

        if not 0 < len(table) == len(self.images) == self.meta["images"]:
            raise ValueError(f"{len(self.images)} images, {len(table)} rows of labels.csv")
        splits = table.groupby("patient", dropna=False)["split"].nunique()
        if splits.max() > 1:
            raise ValueError(f"patient {splits.idxmax()} is in two splits")

    def _map(self, name):
        """A uint8 tensor over the file, copy-on-write: nothing is read yet, nothing is written."""
        return torch.from_numpy(np.load(self.folder / name, mmap_mode="c"))

    def indices(self, *splits):
        """Rows of the named splits, in file order: (n,) int64 tensor."""
        return is_in(self.split, splits).nonzero().flatten()

    def sha256(self):
        """Hash of the images (as meta.json has it), labels and masks."""
        digest = hashlib.sha256(self.meta["images_sha256"].encode())
        digest.update((self.folder / "labels.csv").read_bytes())
        if self.masks is not None:
            digest.update(self.masks.numpy())
        return digest.hexdigest()


def prefetch(load, items):
    """Yields load(item) for every item; a thread is always one item ahead of the caller."""
    with ThreadPoolExecutor(1) as pool:
        waiting = []
        for item in items:
            waiting.append(pool.submit(load, item))
            if len(waiting) == 2:
                yield waiting.pop(0).result()
        for last in waiting:
            yield last.result()


def resize_matrix(start, length, source, size, flip=None):
    """Crop and antialiased bicubic resize along one axis, as one matrix for each image.

    Every output pixel is a weighted mean of the source pixels around it; row i of the matrix holds
    the weights of output pixel i. So rows @ image @ columns.T crops and resizes both axes. Pixel i
    has its centre at i + 0.5. Four pixels to two: row 0 is about (0.46, 0.46, 0.12, -0.04).
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
    widest = int(4 * max(1, source / size)) + 2  # pixels under the widest kernel, and rounding
    taps = torch.arange(widest, device=start.device)
    pixel = first[..., None] + taps  # (B, size, T), the T source pixels under the kernel

    # Cubic kernel of the distance x, zero beyond 2 and beyond the crop.
    x = ((pixel + 0.5 - center[..., None]) / stretch[..., None]).abs()
    near = (1.5 * x - 2.5) * x * x + 1  # 0 <= x < 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2  # 1 <= x < 2
    inside = (x < 2) & (pixel < last[..., None])
    weight = torch.where(x < 1, near, far) * inside
    weight = weight / weight.sum(-1, keepdim=True)

    # From T weights at their pixels to a row over all source pixels (beyond them, weights are 0).
    index = (pixel + start[:, None, None]).clamp(max=source - 1).long()
    matrix = weight.new_zeros(len(start), size, source)
    return matrix.scatter_add_(2, index, weight)


def resize_images(images, size):
    """Whole images, antialiased bicubic: uint8 (B, S, S) -> float32 (B, size, size) in [0, 1]."""
    # Deviation: whole images are resized as crops are, bicubic; the authors' are bilinear.
    x = images[:, None].float() / 255
    if x.shape[-1] != size:
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)
        x = x.clamp(0, 1)
    return x[:, 0]


def normalise(x):
    """Gray (B, H, W) in [0, 1] -> (B, 3, H, W) with ImageNet's mean and standard deviation.

    Needs: IMAGENET_MEAN, IMAGENET_STD.
    """
    channels = [(x - mean) / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD)]
    x = torch.stack(channels, -1)  # (B, H, W, 3)
    return x.permute(0, 3, 1, 2)  # channels-last memory, as the encoder takes it


def rotate(x, angle):
    """Rotates images (B, S, S) by (B,) degrees, counter-clockwise, bilinear, black outside."""
    angle = angle.deg2rad().to(x)
    cos, sin, zero = angle.cos(), angle.sin(), 0 * angle
    rows = [torch.stack(row, 1) for row in ([cos, -sin, zero], [sin, cos, zero])]
    x = x[:, None]  # (B, 1, H, W)
    grid = F.affine_grid(torch.stack(rows, 1), x.shape, align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)[:, 0]


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
    """Two random views of every image: VICReg's recipe, in which they differ, on gray images.

    In this order: rotation; crop, flip and antialiased bicubic resize, which are one pair of small
    matrices, rows @ image @ columns.T; brightness and contrast (probability 0.8, in random order);
    blur (23 taps; always on view 1, with probability 0.1 on view 2); solarize (view 2). Parameters
    are drawn on the CPU: they depend on the generator and the number of images, not on pixels.

    Args: size: side of the views. crop_min: smallest fraction of the area. flip, solarize:
        probabilities. jitter: strength, at most 1. blur: largest sigma in pixels (smallest 0.1).
        rotation: largest angle in degrees. identical_views: view 2 is view 1.
    Call: (images (B, S, S) uint8, rng, or params of `draw`) -> view1, view2 (B, 3, size, size);
        outside of autocast, whose products are rounded.
    Needs: resize_matrix, blur_matrix, rotate, normalise. Source: authors' code (from VICReg).
    """

    # Deviation: one gray channel, without hue, saturation and grayscale, which change nothing.
    # Deviation: the blur has 23 taps at every size; the authors' has fewer below 220 px.

    size: int
    crop_min: float = 0.08
    flip: float = 0.5
    jitter: float = 0.4
    blur: float = 2.0
    solarize: float = 0.2
    rotation: float = 0.0
    identical_views: bool = False

    def draw(self, batch, source, rng):
        """Parameters of both views.

        Args: batch: B. source: side of the images in pixels.
        Returns: a dict of (2, B) tensors; row 0 belongs to view 1, row 1 to view 2.
        """

        def uniform(low, high, *shape):
            return low + (high - low) * torch.rand(2, batch, *shape, generator=rng)

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

    def render(self, images, p):
        """One view: (B, S, S) images and (B,) parameters -> (B, size, size) in [0, 1]."""
        # Geometry.
        x, source = images.float() / 255, images.shape[-1]
        if self.rotation > 0:
            x = rotate(x, p["angle"])
        rows = resize_matrix(p["top"], p["height"], source, self.size)
        columns = resize_matrix(p["left"], p["width"], source, self.size, p["flip"])
        x = (rows @ x @ columns.mT).clamp_(0, 1)  # (B, S, S) -> (B, size, size)

        # Contrast mixes with the mean of the image. Brightness comes before it or after it; at the
        # other time its factor is 1.
        first = p["brightness_first"][:, None, None]
        brightness = p["brightness"][:, None, None]
        contrast = p["contrast"][:, None, None]
        x = x.mul_(brightness.masked_fill(~first, 1)).clamp_(0, 1)
        mean = x.mean((1, 2), keepdim=True)
        x = torch.addcmul((1 - contrast) * mean, x, contrast).clamp_(0, 1)
        x = x.mul_(brightness.masked_fill(first, 1)).clamp_(0, 1)

        # Blur, then solarize: bright pixels are inverted.
        if self.blur > 0:
            sigma = p["sigma"].masked_fill(~p["blurred"], 0.01)  # so small that nothing is blurred
            blur = blur_matrix(sigma, self.size)
            x = blur @ x @ blur.mT
        bright = p["solarized"][:, None, None] & (x >= 128 / 255)
        return torch.where(bright, 1 - x, x)

    def __call__(self, images, rng=None, params=None):
        if params is None:
            params = self.draw(len(images), images.shape[-1], rng)
        on_device = {}
        for name, value in params.items():  # those of view 1, then those of view 2
            on_device[name] = value.to(images.device, non_blocking=True).flatten()  # (2 B,)
        views = self.render(images.repeat(2, 1, 1), on_device)  # (2 B, size, size)
        view1, view2 = normalise(views).chunk(2)
        return view1, view2


# ---------------------------------------------------------------- 10. pre-training
# ---- files and run folders

CHECKPOINT_FORMAT = 2
# What commands write into a run folder (unit: one encoder, seed and label fraction); --overwrite
# removes these files and no others.
OWN_FILES = "metrics.csv last.pt previous.pt encoder.pt results.json classifier.pt unit-*.npy"
RESUMES = "the same command resumes there, without --overwrite"
STOPPED = "stopped; start again with --overwrite, and a lower --lr or --amp off"


@contextlib.contextmanager
def replacing(path, previous=None):
    """Opens a temporary file, which takes the place of `path` as a whole, or not at all.

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
    except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError on a full disk
        raise OSError(f"{path} could not be written: {e}") from e
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """A JSON file, written as a whole or not at all."""
    with replacing(path) as f:
        f.write(json.dumps(value, indent=1).encode())


def save_checkpoint(path, previous=None, **state):
    """Writes tensors and plain values so that a kill at any instant leaves a whole file.

    Args: previous: name under which the old file stays.
    """
    with replacing(path, previous) as f:
        torch.save(dict(state, format=CHECKPOINT_FORMAT), f)


def load_checkpoint(path):
    """Reads what `save_checkpoint` wrote, after checking its CRC; runs no pickled code.

    Raises: UserError if the file is missing, damaged, or not one of ours.
    """
    require(Path(path).is_file(), f"looked for a weight file at {path}: there is none")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # the name of the first member whose CRC differs
        require(damaged is None, f"the CRC of {damaged} differs")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a damaged or hostile archive makes the readers raise
        reason = str(e).partition("\n")[0]
        raise UserError(f"{path} is damaged, or not written by this program: {reason}") from e


def save_training(folder, parts, state, writer, written):
    """Has a thread write last.pt of a pre-training; the one before stays as previous.pt.

    The state is copied first, so that the training goes on while the copy is written.
    Args: parts: dict of model, optimizer, scaler. state: dict of step (how many were taken),
        history (rows of metrics.csv), logs (of the steps of this epoch). writer: pool of one
        thread. written: what this function returned the last time.
    Returns: a future, whose result() waits for the file and raises what went wrong.
    Raises: what went wrong the last time.
    """
    saved = {name: part.state_dict() for name, part in parts.items()}
    saved = copy.deepcopy(dict(saved, **state))
    newest = writer.submit(save_checkpoint, folder / "last.pt", folder / "previous.pt", **saved)
    if written:
        written.result()  # which must not keep the newest state from being written
    return newest


def resume(folder, parts):
    """Puts the newest whole checkpoint of a run folder, if there is one, into the parts.

    Returns: the state, see `save_training`.
    Raises: UserError if all checkpoints are damaged, or of an earlier version.
    """
    there = [path for path in (folder / "last.pt", folder / "previous.pt") if path.exists()]
    for path in there:
        try:
            found = load_checkpoint(path)
        except UserError as e:
            print(e)  # and the checkpoint before it is tried
            continue
        text = f"{path} is of an earlier version of this program; --overwrite starts again"
        require(found.get("format") == CHECKPOINT_FORMAT, text)
        for name, part in parts.items():
            part.load_state_dict(found[name])
        if processes()[0] == 0:
            print(f"{folder}: resumes at step {found['step']} of {path.name}")
        return {name: found[name] for name in ("step", "history", "logs")}
    require(not there, f"{folder}: all checkpoints are damaged; give --overwrite to start again")
    return {"step": 0, "history": [], "logs": []}


def provenance():
    """Command, versions and machine, for config.json and results.json."""
    machine = platform.platform()
    if torch.cuda.is_available():
        machine += ", " + torch.cuda.get_device_name()
    return {"command": sys.argv, "torch": torch.__version__, "machine": machine}


def file_hash(path):
    """The SHA-256 of a file; of what is none ("random", "imagenet"), its name."""
    if not Path(path).is_file():
        return path
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def run_settings(config, data, **more):
    """What decides the outcome of a run, and must not change when it is resumed: plain values."""
    settings = dict(asdict(config), **more, data_sha256=data.sha256())
    settings["kind"] = type(config).__name__  # two commands may have the same settings
    for name in ("out", "overwrite", "device", "data_root", "checkpoint_minutes"):
        settings.pop(name, None)
    if settings.get("exclude_ids"):
        settings["exclude_ids"] = file_hash(settings["exclude_ids"])
    return json.loads(json.dumps(settings))  # tuples become lists, as in config.json


def open_run(folder, settings, overwrite=False):
    """Makes a run folder, or opens one that holds the same run: its config.json says which.

    Raises: UserError if it holds another run, or files that are not of a run. What another command
        has written is never replaced: it may be the encoder that this one evaluates.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record, found = folder / "config.json", settings
    own = [path for pattern in OWN_FILES.split() for path in folder.glob(pattern)]
    if record.exists():
        try:
            found = json.loads(record.read_text())["settings"]
            ours = found["kind"] == settings["kind"]
        except (ValueError, LookupError, TypeError):  # a file of another program
            ours = False
        require(ours, f"{record} is not of a run of this command; give another --out")
    else:
        require(not own, f"{own} are not of a run, but would be replaced; give another --out")
    if overwrite:
        for path in own:
            path.unlink()
        found = settings

    for name, value in settings.items():
        text = f"{folder} holds a run with {name} = {found.get(name)}, now {value}"
        advice = "give --overwrite to start again, or another --out"
        require(found.get(name) == value, f"{text}; {advice}")
    if overwrite or not record.exists():
        write_json(record, dict(provenance(), settings=settings))


# ---- device and processes


def keep_memory(keep=True):
    """Tells the C library to keep what is freed for the next step, or to return it (glibc alone).

    Pages that go back to the system are zeroed when they return: on two CPU cores, a training step
    at batch 16 then takes 3.5 s; with memory that is kept, 2.0 s.
    """
    with contextlib.suppress(AttributeError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        blocks = 0 if keep else 1 << 16
        libc.mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD: large tensors get blocks of their own ...
        libc.mallopt(-4, blocks)  # M_MMAP_MAX: ... of which there may be none, or many
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: none


def setup(name="auto", deterministic=False):
    """Prepares PyTorch for a run, and joins the other processes of torchrun; returns the device."""
    keep_memory()
    torch.set_flush_denormal(True)  # momenta that decay to denormals make a CPU ten times slower
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = False
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = "cuda:" + os.environ.get("LOCAL_RANK", "0")  # torchrun: a GPU for each process
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:  # AssertionError: PyTorch without CUDA
        reason = str(e).partition("\n")[0]
        raise UserError(f"--device {name} cannot be used ({reason}); try --device cpu") from e
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group({"cuda": "nccl"}.get(device.type, "gloo"))
    return device


def processes():
    """Rank of this process and number of processes: 0 and 1 without torchrun."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def resolve_amp(device, amp):
    """The precision that `--amp` means on this device: "bf16", "fp16" or "off"."""
    if amp != "auto":
        return amp
    if device.type != "cuda":
        return "off"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp16"


def autocast(device, amp, **options):
    """The autocast context of `--amp`."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(resolve_amp(device, amp))
    return torch.autocast(device.type, dtype, enabled=dtype is not None, **options)


def wait_for_all():
    """Waits until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def any_process(flag, device):
    """Whether the flag is set in one process at least; the same answer in all of them."""
    flag = torch.tensor(float(flag), device=device)
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


@contextlib.contextmanager
def stop_signals():
    """Yields a list that Ctrl-C and SIGTERM fill, for the training loop to read between steps."""
    caught, old = [], {}
    for number in (signal.SIGINT, signal.SIGTERM):
        old[number] = signal.signal(number, lambda *_: caught.append(True))
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# ---- how good are the features?


def auroc(scores, labels, weights=None):
    """Area under the ROC curve: how often a positive case scores higher than a negative one.

    Ties count half. Scores 1, 2, 3 with labels 0, 1, 0: the positive case is above one of the two
    negative ones, so the area is 0.5.
    Args: scores: (n,) array, compared in float32; NaN where there is none. labels: (n,) array of
        0, 1, NaN (unknown). Cases whose score is not finite or whose label is neither 0 nor 1 are
        left out. weights: (n,) or (R, n) NumPy array, how often each case counts.
    Returns: a number, or R of them; NaN if one class is missing. All pairs are in memory.
    """
    scores, labels = np.asarray(scores, np.float32), np.asarray(labels)
    if weights is None:
        weights = np.ones(len(labels))
    known = np.isfinite(scores)
    positive = known & (labels == 1)
    negative = known & (labels == 0)
    # 1 for each pair in which the positive case scores higher, 0.5 where both are equal.
    higher = np.heaviside(scores[positive, None] - scores[negative], np.float32(0.5))  # (P, N)
    p = weights[..., positive].astype(np.float32)
    n = weights[..., negative].astype(np.float32)
    won = ((p @ higher) * n).sum(-1, dtype=float)
    pairs = p.sum(-1, dtype=float) * n.sum(-1, dtype=float)
    with np.errstate(invalid="ignore"):  # 0 / 0 = NaN: one class is missing
        return won / pairs


def finding_aurocs(scores, labels, weights=None):
    """AUROC of every finding, and first of all their mean over those with both classes.

    With weights, each draw has its own mean: where a draw has no positive case of a rare finding,
    it averages the other findings. So the mean and its interval may depend on few patients.
    Args: scores, labels: (n, F) arrays or tensors. weights: as in `auroc`.
    Returns: (1 + F,) or (R, 1 + F) array with NaN for undefined. Needs: auroc.
    """
    columns = zip(np.asarray(scores).T, np.asarray(labels).T, strict=True)
    areas = [auroc(s, y, weights) for s, y in columns]
    each = np.stack(areas, -1)
    defined = ~np.isnan(each)
    with np.errstate(invalid="ignore"):
        count = defined.sum(-1, keepdims=True)
        mean = each.sum(-1, keepdims=True, where=defined) / count
    return np.concatenate([mean, each], -1)


def mean_auroc(scores, labels):
    """Mean AUROC over the findings that have both classes: (n, F), (n, F) -> a number.

    Needs: finding_aurocs.
    """
    return finding_aurocs(scores, labels)[0]


@torch.no_grad()
def predict(model, images, rows, size, amp="auto", batch_size=128):
    """Outputs of a model for whole images, in float32 on the CPU; the model is left in eval mode.

    Args: images: uint8 (N, S, S). rows: (n,) int64 rows of it. size: side the network sees.
    Returns: (n, ...); of an Encoder its representation (n, C5).
    Raises: UserError if one of them is not finite.
    Needs: prefetch, normalise, resize_images, autocast, resolve_amp, require, UserError.
    """
    device = next(model.parameters()).device
    model.eval()
    outputs = []
    for batch in prefetch(lambda chosen: images[chosen], rows.split(batch_size)):
        x = normalise(resize_images(batch.to(device), size))
        with autocast(device, amp):
            y = model(x)
        if isinstance(y, tuple):
            y = y[0]  # an Encoder returns h and its maps
        outputs.append(y.float().cpu())
    outputs = torch.cat(outputs)
    text = "outputs of the model are not finite; train with a lower --lr or use --amp off"
    require(outputs.isfinite().all(), text)
    return outputs


def knn_scores(train, labels, test, k=20):
    """Mean label of the k nearest training features by cosine: (n, C), (n, F), (m, C) -> (m, F)."""
    centre = train.mean(0)
    similarity = F.normalize(test - centre) @ F.normalize(train - centre).T  # (m, n)
    nearest = similarity.topk(min(k, len(train))).indices
    return labels[nearest].nanmean(1).nan_to_num(0.5)  # (m, k, F) -> (m, F)


def knn_auroc(config, encoder, data):
    """Mean k-NN AUROC on validation labels, from at most 2,000 images of each split, as a dict.

    It is empty for a dataset without labels, or without one of the splits.
    """
    features, labels = [], []
    for split in ("train", "val"):
        rows = data.indices(split)
        if not data.findings or not len(rows):
            return {}
        order = torch.randperm(len(rows), generator=generator(config.seed, "knn"))
        rows = rows[order[:2000]]
        features.append(predict(encoder, data.images, rows, config.size, config.amp))
        labels.append(data.labels[rows])
    scores = knn_scores(features[0], labels[0], features[1])
    return {"knn_auroc": float(mean_auroc(scores, labels[1]))}


def effective_rank(z):
    """exp(entropy of the normalised singular values) of centred embeddings (B, D).

    It is 0 if they are constant, up to a spread of 1e-6.
    Needs: _centred. Source: RankMe (arXiv:2210.02885).
    """
    zc = _centred(z.double())
    # The squares of the singular values are the eigenvalues of a (B, B) matrix, found faster.
    singular = torch.linalg.eigvalsh(zc @ zc.T).clamp(min=0).sqrt()
    if singular.sum() <= 1e-6 * math.sqrt(zc.numel()):  # rounding noise
        return 0.0
    p = singular / singular.sum()
    return float(torch.special.entr(p).sum().exp())


def collapse_warning(row):
    """The line that says which embedding has collapsed, from a row of metrics.csv; or None.

    Before step 50, the running statistics of BatchNorm are too young to say so.
    """
    for head in ("global", "local"):
        std, rank = row.get(f"std_{head}", 1.0), row.get(f"rank_{head}", math.inf)
        if row.get("step", 50) >= 50 and (std < 0.01 or rank < 2):
            found = f"the {head} embedding has collapsed (std {std:.3g}, effective rank {rank:.3g})"
            return f"warning: {found}: raise --std-coeff, lower --lr or weaken the views"


# ---- data and model of a run


def draw_demo(config):
    """Draws the demo set if `--data` names it and it is not there; the first process does."""
    demo = Path(config.data_root) / "demo"
    wanted = config.data == "demo" and processes()[0] == 0
    if wanted and not (demo / "meta.json").exists():
        import data_prep

        failed = data_prep.main(["demo", "--out", str(demo)])
        require(not failed, "the demo set could not be made; see the line above")


def pretraining_rows(data, exclude_ids="", include_val=False):
    """Rows of the images to train on; and of those for validation metrics, in random order.

    Args: exclude_ids: file of image names to leave out of training. include_val: train on the
        validation images too.
    """
    rows, val = data.indices("train"), data.indices("val")
    if include_val:
        rows = data.indices("train", "val")
    if exclude_ids:
        lines = Path(exclude_ids).read_text("utf-8-sig").splitlines()
        banned = is_in(data.names, [line.strip() for line in lines])
        found = f"{exclude_ids}: {len(lines)} lines, which name {int(banned.sum())} images"
        require(banned.any(), f"{found}; expected names of labels.csv, one a line")
        print(found)
        rows = rows[~banned[rows]]
    require(len(rows) > 1, f"{data.folder} has no two images to train on; prepare more of them")
    return rows, val[torch.randperm(len(val), generator=generator("monitor"))]


def choose_batch_size(wanted, images, device):
    """The batch of `--batch-size`; 0: 256 on CUDA, 64 elsewhere, never more than the images."""
    _, world = processes()
    if wanted == 0:
        wanted = min({"cuda": 256}.get(device.type, 64), images)
        wanted -= wanted % world
    possible = 2 * world <= wanted <= images and wanted % world == 0
    expected = f"expected 2 to {images}, the training images, in {world} equal parts"
    require(possible, f"--batch-size {wanted}: {expected}")
    return wanted


def load_batches(steps, data, rows, views, config, device):
    """Yields the batches of some steps: number of the step, images, parameters of their views.

    The order of an epoch depends on (seed, epoch) alone, the views on (seed, step): a run that was
    stopped resumes with the batches that it would have had. A thread loads one batch ahead.
    Args: rows: of the images to train on.
    Yields: step, images (B / world, S, S) uint8, dict of (2, B / world) parameters.
    """
    rank, world = processes()

    def load(step):
        epoch, step_in_epoch = divmod(step, len(rows) // config.batch_size)
        order = torch.randperm(len(rows), generator=generator(config.seed, "order", epoch))
        batch = rows[order].split(config.batch_size)[step_in_epoch]
        params = views.draw(len(batch), data.size, generator(config.seed, "views", step))

        mine = torch.arange(len(batch)).chunk(world)[rank]  # the part of this process
        images = data.images[batch[mine]]
        params = {name: value[:, mine] for name, value in params.items()}
        if device.type == "cuda":  # pinned memory is copied while the GPU computes
            torch.cuda.set_device(device)  # of this thread
            images = images.pin_memory()
            params = {name: value.pin_memory() for name, value in params.items()}
        return step, images, params

    return prefetch(load, steps)


def build_model(config):
    """The model of a pre-training configuration, initialised from its seed alone."""
    torch.manual_seed(config.seed)
    names = (*ARCHITECTURE, "levels", "embedding_dim", "final_bn")
    try:
        model = MLVICX(**select(config, *names), local=config.local_weight > 0)
    except ValueError as e:
        raise UserError(str(e)) from e
    if config.init == "imagenet":
        pretrained, _ = load_encoder("imagenet", backbone=config.backbone)
        model.encoder.load_state_dict(pretrained.state_dict(), strict=False)  # it has no blocks
    return model


def build_parts(config, device):
    """Model, optimiser (whose lr `train_step` sets) and scaler of a pre-training, by name."""
    model = build_model(config).to(device, memory_format=torch.channels_last)
    optimizer = LARS(model.parameters(), **select(config, "weight_decay", "trust"))
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    return {"model": model, "optimizer": optimizer, "scaler": scaler}


# ---- training

LOSS_WEIGHTS = ("local_weight", "sim_coeff", "std_coeff", "cov_coeff")
READ_EVERY = 5  # steps between readings of the log, on CUDA
VIEW_SETTINGS = tuple(f.name for f in fields(RandomViews))
VALIDATION_IMAGES = 512  # at most; the covariance term depends on the number of images


def train_step(model, optimizer, scaler, view1, view2, lr, amp="off", **loss_weights):
    """One update of the weights from two views of a batch.

    Args: model: MLVICX, or its DistributedDataParallel. view1, view2: (B, 3, H, W). lr: learning
        rate of this step. loss_weights: of `mlvicx_loss`.
    Returns: what is logged: a dict of scalar tensors on the device.
    """
    # Forward pass: embeddings of both views, from all processes.
    with autocast(view1.device, amp):
        z_global, z_local = model(view1, view2)
    z_global = [gather(z) for z in z_global]
    z_local = [gather(z) for z in z_local]
    loss, log = mlvicx_loss(z_global, z_local, **loss_weights)

    # Backward pass. In float16 the loss is scaled up, so that small gradients do not become zero.
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    log["grad_norm"] = torch.stack(torch._foreach_norm(grads)).norm()

    # Update.
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.step(optimizer)
    scaler.update()
    return log


def record_graphs(model, batch_size, size, amp):
    """Records forward and backward pass of a model as CUDA graphs; its calls then replay them.

    A pass launches thousands of kernels, for which Python needs longer than the GPU does; a replay
    is one launch. It computes the same, and is taken in train mode alone.
    Args: model: MLVICX on a GPU, in train mode. batch_size, size: of all views to come.
    """
    # PyTorch warns of weights that were recorded on another stream, which does no harm here.
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
    before = copy.deepcopy(model.state_dict())
    device = next(model.parameters()).device
    view = normalise(torch.rand(batch_size, size, size, device=device))
    try:
        with autocast(device, amp, cache_enabled=False):
            torch.cuda.make_graphed_callables(model, (view, view.clone()))
    except RuntimeError as e:
        print(f"no CUDA graph, so that steps are slower: {e}")
    model.load_state_dict(before)  # recording runs the model: BatchNorm has seen the noise


def for_training(config, model, device):
    """The model as the training step calls it: compiled, in step with other processes, or recorded.

    SyncBatchNorm replaces BatchNorm in the model, if it is on several GPUs.
    """
    torch.backends.cudnn.benchmark = not config.deterministic  # all batches are equally large
    if config.compile:  # the blocks, whose passes over the maps are then few
        for block in model.encoder.context.values():
            block.compile(dynamic=False)
    cuda = device.type == "cuda"
    if not dist.is_initialized():
        if cuda and config.graph and not config.deterministic:
            record_graphs(model, config.batch_size, config.size, config.amp)
        return model
    if cuda:  # on a CPU, every process has the statistics of its own part of the batch
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(
        model, broadcast_buffers=not cuda, gradient_as_bucket_view=True
    )


def read_logs(pending, step, scaler):
    """Numbers that the last steps before `step` have logged; reading them waits for the device.

    Args: pending: what `train_step` has returned. Returns: the same with floats.
    Raises: UserError naming step and part of a number that is not finite.
    """
    rows = []
    for number, log in enumerate(pending, step - len(pending)):
        values = torch.stack([value.float() for value in log.values()]).tolist()
        rows.append(dict(zip(log, values)))
        for name, value in rows[-1].items():
            # The scaler of float16 skips a step whose gradient is infinite.
            valid = math.isfinite(value) or (name == "grad_norm" and scaler.is_enabled())
            require(valid, f"step {number}: {name} is {value}; {STOPPED}")
    return rows


@torch.no_grad()
def validation_metrics(config, model, data, rows, views):
    """Loss of validation images on fixed views; standard deviation and rank of both embeddings.

    The images are embedded in chunks, but the loss is computed once, over all of them.
    Returns: dict of floats for metrics.csv; empty with fewer than four images.
    """
    rows, chunks = rows[:VALIDATION_IMAGES], []
    if len(rows) < 4:  # of which no rank can be told
        return {}
    device = next(model.parameters()).device
    model.eval()
    for i, chunk in enumerate(rows.split(64)):
        view1, view2 = views(data.images[chunk].to(device), generator(config.seed, "val", i))
        with autocast(device, config.amp):
            z_global, z_local = model(view1, view2)
        chunks.append(torch.stack([*z_global, *z_local]).float())  # (2 or 4, chunk, D)

    pairs = torch.cat(chunks, 1).split(2)  # (2 or 4, n, D) -> the global pair, the local pair
    _, log = mlvicx_loss(*pairs, **select(config, *LOSS_WEIGHTS))
    row = {f"val_{name}": float(value) for name, value in log.items()}
    require(math.isfinite(row["val_loss"]), f"val_loss is {row['val_loss']}; {STOPPED}")
    for head, (z1, _) in zip(("global", "local"), pairs):
        row[f"std_{head}"] = float(z1.std(0).mean())
        row[f"rank_{head}"] = effective_rank(z1.cpu())
    return row


@torch.compiler.set_stance("force_eager")  # batches of other sizes would be compiled anew
def finish_epoch(config, parts, state, seconds, data, val_rows, views, folder):
    """Evaluates the model at the end of an epoch, writes encoder.pt and metrics.csv, reports.

    The first process does; in all of them, the logs of the epoch are then dropped.
    Args: parts, state: see `save_training`; the history gets a new row. seconds: of a step.
    """
    logs, state["logs"] = state["logs"], []
    if processes()[0] > 0:
        return
    model, epoch = parts["model"], len(state["history"]) + 1
    row = {"epoch": epoch, "step": state["step"]}
    row["lr"] = parts["optimizer"].param_groups[0]["lr"]  # of the last step
    logs = pd.DataFrame(logs).replace(math.inf, math.nan)  # inf: a step of fp16, skipped
    row.update(logs.mean().to_dict())
    row.update(validation_metrics(config, model, data, val_rows, views))
    if config.knn_every and (epoch % config.knn_every == 0 or epoch == config.epochs):
        row.update(knn_auroc(config, model.encoder, data))
    model.train()

    state["history"].append(row)
    about = {"arch": model.encoder.arch, "size": config.size, "data": [data.origin]}
    save_checkpoint(folder / "encoder.pt", encoder=model.encoder.state_dict(), **about)
    with replacing(folder / "metrics.csv") as f:
        pd.DataFrame(state["history"]).to_csv(f, index=False)

    text = f"epoch {epoch}/{config.epochs}  loss {row['loss']:.3f}"
    if "loss_local" in row:
        text += f" (global {row['loss_global']:.3f}, local {row['loss_local']:.3f})"
    val = "val"
    if config.include_val:
        val = "val (trained on)"
    for name, shown in (("val_loss", val), ("knn_auroc", "k-NN AUROC")):
        if name in row:
            text += f"  {shown} {row[name]:.3f}"
    steps_left = (config.epochs / epoch - 1) * state["step"]
    left = tqdm.format_interval(steps_left * seconds)
    tqdm.write(f"{text}  {config.batch_size / seconds:.0f} images/s  {left} left")
    warning = collapse_warning(row)
    if warning:
        tqdm.write(warning)


def open_training(config, data, images, parts):
    """Makes or opens the run folder of a pre-training, and resumes what it holds.

    Args: images: how many are trained on. parts: see `save_training`.
    Returns: the path of the folder, and the state.
    """
    folder = Path(config.out or f"runs/{data.folder.name}")
    first = processes()[0] == 0
    if first:
        open_run(folder, run_settings(config, data, images=images), config.overwrite)
    wait_for_all()  # until the folder is there, and all processes hear stop signals
    if first:
        about = dict(select(config, "batch_size", "amp"), images=images)
        print(f"{folder}: {about}", flush=True)
    return folder, resume(folder, parts)


def pretrain(config):
    """Trains an encoder without labels; writes metrics.csv, last.pt and encoder.pt.

    A run that was stopped is resumed. Args: config: PretrainConfig. Returns: the run folder.
    Raises: UserError; KeyboardInterrupt after a stop signal. Source: authors' code.
    """
    # Data. torchrun starts a process for each GPU; the first one (rank 0) writes the files.
    device, first = setup(config.device, config.deterministic), processes()[0] == 0
    draw_demo(config)
    wait_for_all()
    data = PreparedData(config.data, config.data_root)
    rows, val_rows = pretraining_rows(data, config.exclude_ids, config.include_val)
    batch_size = choose_batch_size(config.batch_size, len(rows), device)
    config = replace(config, batch_size=batch_size, amp=resolve_amp(device, config.amp))
    views = RandomViews(**select(config, *VIEW_SETTINGS))
    epoch_steps = len(rows) // batch_size  # a remainder is left out, other images each epoch
    total_steps, warmup_steps = config.epochs * epoch_steps, config.warmup_epochs * epoch_steps

    # Model, optimiser and run folder.
    parts, weights = build_parts(config, device), select(config, *LOSS_WEIGHTS)
    model, optimizer, scaler = parts.values()
    model = for_training(config, model, device)
    with stop_signals() as signals, ThreadPoolExecutor(1) as writer:
        folder, state = open_training(config, data, len(rows), parts)
        pending, written, started, saved = [], None, time.monotonic(), time.monotonic()
        steps = range(state["step"], total_steps)
        bar = tqdm(steps, initial=steps.start, total=total_steps, disable=not first or None)
        for i, images, params in load_batches(bar, data, rows, views, config, device):
            # One step: two views of every image, and one update of the weights.
            lr = cosine_schedule(i, total_steps, warmup_steps, config.lr * batch_size / 256)
            pair = views(images.to(device, non_blocking=True), params=params)
            pending.append(train_step(model, optimizer, scaler, *pair, lr, config.amp, **weights))
            state["step"] = i + 1

            # The rest waits for the GPU, and for other processes, which get here at the same steps.
            epoch_ends = state["step"] % epoch_steps == 0
            if device.type == "cuda" and not epoch_ends and state["step"] % READ_EVERY > 0:
                continue
            state["logs"] += read_logs(pending, state["step"], scaler)
            pending = []
            stopped = any_process(bool(signals), device)  # Ctrl-C or SIGTERM

            # End of an epoch: evaluate, write, report.
            if epoch_ends:
                seconds = (time.monotonic() - started) / (state["step"] - steps.start)
                finish_epoch(config, parts, state, seconds, data, val_rows, views, folder)

            # Checkpoint: now and then, at the end, and before the run stops.
            due = time.monotonic() - saved > 60 * config.checkpoint_minutes
            if first and (due or stopped or state["step"] == total_steps):
                written = save_training(folder, parts, state, writer, written)
                saved = time.monotonic()
            if stopped:
                break
    if written:
        written.result()  # raises what went wrong with the last checkpoint
    wait_for_all()  # torchrun ends all processes when one ends; the first may still write
    if signals or state["step"] < total_steps:
        raise KeyboardInterrupt(f"stopped at step {state['step']}; {RESUMES}")
    return folder


# ---------------------------------------------------------------- 11. evaluation
# ---- encoders and labels


def load_module(path, name):
    """The "encoder" or the "classifier" of a weight file, and all that the file holds.

    Raises: UserError if the file holds no such module, or naming the key that does not fit.
    """
    # Deviation: a file that does not fit is an error; context-bottlenecks are kept in evaluation.
    # The authors' code goes on with a random encoder, and drops the blocks.
    state = load_checkpoint(path)
    try:
        module = Encoder(**state["arch"])
        if name == "classifier":
            module = Classifier(module, len(state["findings"]))
        module.load_state_dict(state[name])
    except Exception as e:  # whatever the file of another program makes them raise
        reason = " ".join(str(e).split())[:300]
        text = f"{path} is not a file like {name}.pt, or of another architecture"
        raise UserError(f"{text} ({type(e).__name__}: {reason})") from e
    return module, state


def load_encoder(weights, seed=0, backbone="resnet18", context="side", attention="both"):
    """The encoder that `--weights` names: "random", "imagenet", or a file of `pretrain`.

    Args: seed, context, attention: of random weights (PyTorch's own seed is set). backbone: of the
        first two.
    Returns: encoder, and what the file says of its origin ({} for the first two).
    """
    if weights == "random":
        torch.manual_seed(seed)
        return Encoder(backbone, context, attention), {}
    if weights == "imagenet":  # without blocks: random inline ones would spoil its features
        encoder = Encoder(backbone, "none")
        try:  # torchvision downloads them once
            resnet = torchvision.models.get_model(backbone, weights="DEFAULT")
        except (OSError, RuntimeError) as e:
            raise UserError(f"no ImageNet weights for {backbone} ({e}); use random ones") from e
        encoder.load_state_dict(resnet.state_dict(), strict=False)  # all but its classifier
        return encoder, {}
    return load_module(weights, "encoder")


def label_subset(data, fraction, seed=0):
    """Training rows whose labels are used: the first patients in an order that depends on `seed`.

    Subsets are nested, and the same for every method. Needs: is_in.
    """
    # Deviation: label subsets are drawn by patient, not by image.
    rows = data.indices("train")
    patients = data.patient[rows.numpy()]
    order = {p: hashlib.sha256(f"{seed}:{p}".encode()).digest() for p in patients}
    count = math.ceil(round(fraction * len(order), 6))
    chosen = sorted(order, key=order.get)[:count]
    return rows[is_in(patients, chosen)]


def warn_overlap(seen, evaluated):
    """Says where weights may have seen the test images, unlabelled, in their pre-training.

    Args: seen: origins of the images of pre-training, if it is known. evaluated: origin of the set.
    """
    of_nih = {"nih", "chestmnist", "rsna", "siim"}  # whose images are NIH's
    if seen and evaluated not in seen and {evaluated, *seen} <= of_nih:
        text = f"{evaluated} holds NIH images, as {seen[0]} does"
        print(f"warning: {text}: these weights may have seen its test images", file=sys.stderr)


# ---- classification models


class Classifier(nn.Module):
    """An encoder and a linear layer: (B, 3, H, W) -> (B, F) logits. Needs: Encoder.

    Blocks beside the ResNet (context "side") do not touch h, and get no gradient.
    """

    def __init__(self, encoder, findings):
        super().__init__()
        self.encoder, self.fc = encoder, nn.Linear(encoder.channels[-1], findings)

    def forward(self, x):
        h, _ = self.encoder(x)
        return self.fc(h)


def masked_bce(logits, labels):
    """Binary cross-entropy over the known labels: (B, F), (B, F) with NaN -> (F,) means."""
    known = torch.isfinite(labels)
    loss = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
    return (loss * known).sum(0) / known.sum(0).clamp(min=1)


def linear_probe(x, y, x_val, y_val, strengths=(1.0, 0.1, 1e-2, 1e-3, 1e-4)):
    """Logistic regression on frozen features; the L2 strength with the best validation mean AUROC.

    Minimises, for every finding, the mean cross-entropy of the known labels + strength / 2 |w|^2 on
    standardised features (in scikit-learn, C = 1 / (strength n)).
    Args:
        x, x_val: (n, C) features. y, y_val: (n, F) labels of 0, 1, NaN. All float32 on the CPU.
        strengths: strongest first; each starts from the one before; at most 40 iterations.
    Returns: weight (F, C) and bias (F,) for the features as they come. Without both classes of any
        finding in y_val, the strongest is taken.
    Needs: masked_bce, mean_auroc. Source: authors' code.
    """
    # Deviation: the linear probe has an L2 penalty and is solved by L-BFGS, not by AdamW.
    mean, std = x.mean(0), x.std(0, correction=0)
    std = std.clamp(min=1e-3 * float(std.mean()) + 1e-12)
    x, x_val = (x - mean) / std, (x_val - mean) / std
    weight = torch.zeros(y.shape[1], x.shape[1], requires_grad=True)
    bias = torch.zeros(y.shape[1], requires_grad=True)
    fits = []
    for strength in strengths:
        solver = torch.optim.LBFGS([weight, bias], max_iter=40, line_search_fn="strong_wolfe")

        def closure(solver=solver, strength=strength):  # the loss; defaults are those of this round
            solver.zero_grad()
            loss = masked_bce(F.linear(x, weight, bias), y).sum()
            loss = loss + strength / 2 * weight.square().sum()
            loss.backward()
            return loss

        solver.step(closure)
        with torch.no_grad():
            score = mean_auroc(F.linear(x_val, weight, bias), y_val)
            fits.append((score, weight / std, bias.clone()))
    _, weight, bias = max(fits, key=lambda fit: fit[0])
    return weight, bias - weight @ mean


# ---- segmentation models


class Segmenter(nn.Module):
    """Encoder, and a U-Net decoder over its five refined maps: (B, 3, H, W) -> (B, H, W) logits.

    Args: encoder: it is not copied. frozen: it stays in eval mode and without gradient, whatever
        `train()` says.
    Needs: Encoder. Source: ours, after U-Net (arXiv:1505.04597); the authors have no segmentation.
    """

    # Deviation: a frozen encoder keeps its BatchNorm statistics.

    def __init__(self, encoder, frozen):
        super().__init__()
        self.encoder = encoder.requires_grad_(not frozen)
        self.frozen = frozen
        self.blocks = nn.ModuleList()
        below = encoder.channels[-1]
        finer = encoder.channels[-2::-1]  # channels of the levels 4, 3, 2, 1
        for skip, width in zip(finer, (256, 128, 64, 32)):
            block = nn.Sequential(
                torchvision.ops.Conv2dNormActivation(below + skip, width),
                torchvision.ops.Conv2dNormActivation(width, width),
            )
            self.blocks.append(block)
            below = width
        self.head = nn.Conv2d(below, 1, 1)
        self.train()  # the encoder too, unless it is frozen

    def train(self, mode=True):
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def forward(self, images):
        _, maps = self.encoder(images)
        x = maps[-1]
        for skip, block in zip(maps[-2::-1], self.blocks):
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear")
            x = block(torch.cat([x, skip], 1))  # (B, C + C_k, H_k, W_k) -> (B, width, H_k, W_k)
        logits = self.head(x)  # (B, 1, H_1, W_1)
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear")[:, 0]


def segmentation_loss(logits, mask):
    """BCE + soft Dice of the whole batch: (B, H, W) logits and 0/1 masks, float32 -> scalar."""
    p = logits.sigmoid()
    both = (p * mask).sum()
    dice = (2 * both + 1) / (p.sum() + mask.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, mask) + 1 - dice


def mask_counts(predicted, mask):
    """Pixels of intersection, prediction and truth: two (B, H, W), bool or 0/1 -> (B, 3)."""
    predicted, mask = predicted.bool(), mask.bool()
    parts = (predicted & mask, predicted, mask)
    return torch.stack([part.sum((1, 2)) for part in parts], 1)


def segmentation_counts(logits, masks, threshold=0.5):
    """`mask_counts` of logits (n, size, size), with 0/1 masks (n, S, S) resized as images are.

    Needs: mask_counts, resize_images.
    """
    truth = resize_images(255 * masks, logits.shape[-1]) > 0.5
    return mask_counts(logits.sigmoid() > threshold, truth).numpy()


DICE_NAMES = ("dice_all", "dice_positive", "dice_pooled", "dice_blank", "iou_pooled")


def dice_metrics(counts, weights=None):
    """Five scores of overlap from the `mask_counts` (n, 3) of images that count `weights` times.

    Args: counts: array or tensor. weights: (n,) or (R, n) array.
    Returns: (5,) or (R, 5) array, as DICE_NAMES: Dice of all images (empty and empty = 1); of
        images with a mask; of all pixels pooled; of predicting nothing, over all images; pooled
        intersection over union. NaN where there is nothing to divide by.
    """
    if weights is None:
        weights = np.ones(len(counts))
    both, predicted, true = np.asarray(counts, float).T
    total, has_mask = predicted + true, true > 0
    every = np.ones(len(counts))
    dice = np.where(total > 0, 2 * both / np.maximum(total, 1), 1.0)  # of each image
    # In the order of DICE_NAMES.
    parts = [dice, dice * has_mask, 2 * both, ~has_mask, both]
    wholes = [every, has_mask, total, every, total - both]
    with np.errstate(invalid="ignore"):
        return (weights @ np.transpose(parts)) / (weights @ np.transpose(wholes))


def pooled_dice(logits, masks, threshold=0.5):
    """Pooled Dice; 1 where there is nothing to find and nothing found.

    Needs: segmentation_counts, dice_metrics.
    """
    counts = segmentation_counts(logits, masks, threshold)
    return np.nan_to_num(dice_metrics(counts)[2], nan=1.0)


# ---- fine-tuning


def augment(images, target, views, rng):
    """One random view of every image; masks get the same crop, flip and rotation.

    Args: images: uint8 (B, S, S). target: 0/1 masks, the same; another target stays as it is.
        views: RandomViews that only crop, flip and rotate.
    Returns: float (B, size, size) images, and 0/1 masks (B, size, size) or the target.
    """
    params = views.draw(len(images), images.shape[-1], rng)
    params = {name: value[0].to(images.device) for name, value in params.items()}
    x = views.render(images, params)
    if target.shape == images.shape:
        target = (views.render(255 * target, params) > 0.5).float()
    return x, target


def fit(config, model, images, targets, rows, val, crop_min, loss, score, key):
    """AdamW with warm restarts until the validation score stops rising; ends with the best weights.

    Args:
        config: epochs, batch_size, lr, patience, size and amp are used.
        images, targets: of the whole dataset. rows: those to train on. val: those that choose.
        crop_min: smallest crop; images are also flipped, and rotated by up to 15 degrees.
        loss: (logits, targets) -> tensor, averaged. score: (logits, targets) -> finite number, of
            all validation images. key: tuple of plain values that decides order and augmentation.
    Needs: RandomViews, augment, generator, predict and what these need.
    Source: authors' code (weight decay 0, clip 1.0, T0 = 10 doubling, floor 1e-6, patience 10).
    """
    # Deviation: no image is dropped, and validation images are never flipped.
    # Deviation: the warm restarts advance with every batch, not with every epoch.
    found = f"training needs two labelled images, found {len(rows)}; give more --labels"
    require(len(rows) > 1, found)  # BatchNorm needs two
    parameters = [p for p in model.parameters() if p.requires_grad]
    device, size, amp = parameters[0].device, config.size, config.amp
    views = RandomViews(size, crop_min, jitter=0, blur=0, solarize=0, rotation=15)
    optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 10, 2, eta_min=1e-6)
    scaler = torch.amp.GradScaler(device.type, enabled=resolve_amp(device, amp) == "fp16")
    best, best_state, stale = -math.inf, None, 0
    for epoch in tqdm(range(config.epochs), disable=None, leave=False):
        # Train on all rows once, in parts of nearly equal size.
        model.train()
        order = rows[torch.randperm(len(rows), generator=generator(*key, "order", epoch))]
        parts = max(1, min(round(len(order) / config.batch_size), len(order) // 2))
        batches = prefetch(lambda batch: (images[batch], targets[batch]), order.tensor_split(parts))
        for i, (x, target) in enumerate(batches):
            schedule.step(epoch + i / parts)
            rng = generator(*key, "augment", epoch, i)
            x, target = augment(x.to(device), target.to(device), views, rng)
            with autocast(device, amp):
                logits = model(normalise(x))
            optimizer.zero_grad()
            scaler.scale(loss(logits.float(), target).mean()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            scaler.step(optimizer)
            scaler.update()

        # Keep the weights of the best epoch.
        value = score(predict(model, images, val, size, amp), targets[val])
        stale += 1
        if best_state is None or value > best:
            best, stale = value, 0
            best_state = copy.deepcopy(model.state_dict())
        if stale >= config.patience:
            break
    model.load_state_dict(best_state)


# ---- an evaluation: encoders x seeds x label fractions


def prepare_evaluation(config, task):
    """What `classify` and `segment` need, checked before any work.

    Returns: the configuration with the precision that "auto" means, dataset, device, run folder,
        and the settings of the run, with architecture and SHA-256 of every encoder.
    """
    require(config.batch_size > 0, "--batch-size: expected 1 or more, found 0")
    device, names, encoders, hashes = setup(config.device), [], [], []
    draw_demo(config)
    data = PreparedData(config.data, config.data_root)
    for split in ("train", "val", "test"):
        text = f"{data.folder} has no {split} images; prepare it with a {split} split"
        require(len(data.indices(split)), text)
    for weights in config.weights.split(","):
        hashes.append(file_hash(weights))
        # Loaded here too, so that a file that does not fit is refused before any work.
        encoder, about = load_encoder(weights, **select(config, *ARCHITECTURE))
        encoders.append(encoder.arch)
        warn_overlap(about.get("data", ()), data.origin)
        names.append(Path(weights).parent.name or weights)
    fractions = ",".join(f"{fraction:g}" for fraction in config.labels)
    words = [data.folder.name, task, config.mode, "+".join(names), fractions]
    config = replace(config, amp=resolve_amp(device, config.amp))
    settings = run_settings(config, data, encoders=encoders, weights_sha256=hashes)
    return config, data, device, Path(config.out or "runs/" + "-".join(words)), settings


def run_units(config, data, device, folder, settings, run_unit):
    """Runs a unit for each encoder of --weights, each seed and each label fraction.

    What a unit finds is kept in a file, unit-FRACTION-ENCODER-SEED.npy, so that a command that was
    stopped reads it back. Other settings, data or weights are refused by `open_run`. Every encoder
    gets the same label subsets; each "random" is another one.
    Args: run_unit: function (encoder, source, rows, seed) -> array, where `source` tells encoders
        apart and `rows` are the training rows whose labels may be used.
    Returns: label fraction -> list of arrays, in the order of weights and seeds.
    Raises: UserError if a weight file changes meanwhile, as during its training.
    """
    open_run(folder, settings, config.overwrite)
    results = {fraction: [] for fraction in config.labels}
    for index, weights in enumerate(config.weights.split(",")):
        for seed in range(config.seed, config.seed + config.seeds):
            encoder_seed = seed + index * config.seeds
            source = weights
            if source == "random":
                source = f"random{encoder_seed}"
            for fraction in config.labels:
                path = folder / f"unit-{fraction:g}-{index}-{seed}.npy"
                if not path.exists():
                    encoder, _ = load_encoder(
                        weights, encoder_seed, **select(config, *ARCHITECTURE)
                    )
                    same = file_hash(weights) == settings["weights_sha256"][index]
                    require(same, f"{weights} has changed since the start; run this again")
                    encoder = encoder.to(device, memory_format=torch.channels_last)
                    torch.manual_seed(seed)
                    found = run_unit(encoder, source, label_subset(data, fraction, seed), seed)
                    with replacing(path) as f:
                        np.save(f, found)
                results[fraction].append(np.load(path))
    return results


def interval(runs, patients, metric, encoders=1, repeats=1000):
    """Mean and std over runs; 95 % bootstrap interval over test patients of the mean over runs.

    With several encoders, the std is that of the means of each: of two with three seeds each, the
    std of two numbers.
    Args:
        runs: an array for each. patients: (n,). metric: (run, weights (..., n)) -> (..., M)
            numbers, where the weights say how often each image counts. encoders: how many there
            are; `runs` has those of the first, then of the second, ... repeats: R, draws.
    Returns: M dicts {"mean", "std", "ci95"}; None where undefined. Draws in which a number is
        undefined, as without a positive image, do not count.
    """
    # Every draw takes as many patients as there are, with replacement.
    names, member = np.unique(patients.astype(str), return_inverse=True)
    drawn = np.random.default_rng(0).integers(0, len(names), (repeats, len(names)))
    times = np.array([np.bincount(row, minlength=len(names)) for row in drawn])
    weights = np.vstack([np.ones(len(member)), times[:, member]])  # (1 + R, n), first as they are
    scores = np.array([metric(run, weights) for run in runs])  # (runs, 1 + R, M)
    draws = pd.DataFrame(scores[:, 1:].mean(0))
    low, high = draws.quantile([0.025, 0.975]).to_numpy()
    values = scores[:, 0]
    groups = encoders if encoders > 1 else len(runs)  # of one encoder, every run by itself
    of_groups = values.reshape(groups, -1, values.shape[1]).mean(1)
    std = pd.DataFrame(of_groups).std()  # NaN of one
    table = np.array([values.mean(0), std, low, high]).T  # (M, 4)
    table = table.astype(object)
    table[pd.isna(table)] = None
    return [{"mean": mean, "std": std, "ci95": ci95} for mean, std, *ci95 in table]


def write_results(folder, task, config, settings, val, tests):
    """Writes results.json and prints its intervals.

    Args: settings: of the run. val: rows that chose the recipe. tests: fraction -> its results.
    The results of one fraction stand under "test"; of several, under "test" and their fractions.
    Returns: the dict written.
    """
    results = dict(select(config, "data", "weights", "mode", "labels", "seeds"), task=task)
    results["test"] = {f"{fraction:g}": test for fraction, test in tests.items()}
    if len(tests) == 1:
        fraction = config.labels[0]
        results.update(labels=fraction, test=tests[fraction])
    results.update(settings=settings, provenance=provenance())
    write_json(folder / "results.json", results)

    table = pd.DataFrame()
    for fraction, test in tests.items():
        shown = test
        if task == "classify":
            shown = {name: row["auroc"] for name, row in test["per_finding"].items()}
            shown = {"mean AUROC": test["mean_auroc"], **shown}
        for name, value in shown.items():
            text = "undefined"
            if value["mean"] is not None:
                text = "{:.3f} [{:.3f}, {:.3f}]".format(value["mean"], *value["ci95"])
            table.loc[name, f"{100 * fraction:g} % of the labels"] = text
    print(f"\n{config.weights}, {config.mode}: mean and 95 % interval on the test images;")
    print(f"epoch, strength and threshold are chosen on all {len(val)} validation images")
    print(table.to_string())
    print(f"written: {folder / 'results.json'}")
    return results


# ---- classification


def choose_findings(data, findings):
    """Names of the findings to evaluate, and their labels (N, F). Args: findings: "A,B" or ""."""
    names = data.findings
    if findings:
        names = list(dict.fromkeys(findings.split(",")))  # none twice
    known = names and set(names) <= set(data.findings)
    require(known, f"{data.folder} has the findings {data.findings}; wanted: {findings or 'any'}")
    labels = data.labels[:, [data.findings.index(name) for name in names]]
    of_val = labels[data.indices("val")]
    text = "no finding has both classes in the validation images, which choose the recipe"
    defined = not np.isnan(mean_auroc(0 * of_val, of_val))  # whatever the scores
    require(defined, f"{text}; prepare more of them")
    return names, labels


def classification_results(runs, labels, patients, names, encoders):
    """The "test" part of results.json. Args: runs: scores (n, F) of every encoder and seed.

    A finding that one of the runs could not learn, whose scores are NaN, is undefined in all.
    """
    from sklearn.metrics import average_precision_score  # here, for it takes a second

    def metric(run, weights):
        return finding_aurocs(run, labels, weights)

    runs = np.array(runs)  # (runs, n, F)
    runs[:, :, np.isnan(runs).any((0, 1))] = np.nan
    mean, *each = interval(runs, patients, metric, encoders)
    per_finding = {}
    for f, name in enumerate(names):
        known = np.isfinite(labels[:, f])
        y, precision = labels[known, f], None
        if each[f]["mean"] is not None:
            areas = [average_precision_score(y, run[known, f]) for run in runs]
            precision = float(np.mean(areas))
        entry = {"auroc": each[f], "average_precision": precision}
        per_finding[name] = dict(entry, positives=int(y.sum()), n=len(y))
    defined = sum(value["mean"] is not None for value in each)
    return {"mean_auroc": mean, "defined_findings": defined, "per_finding": per_finding}


def classify(config):
    """Multi-label classification with a frozen or a fine-tuned encoder.

    Frozen: logistic regression on features. Fine-tuned: everything, with flips and rotations up to
    15 degrees. Strength or epoch is chosen on validation mean AUROC; test is read once.
    classifier.pt, for `predict`, is the last one trained.
    Args: config: ClassifyConfig. Returns: the dict of results.json.
    """
    run = prepare_evaluation(config, "classify")
    config, data, device, folder, settings = run
    names, labels = choose_findings(data, config.findings)
    val, test = data.indices("val"), data.indices("test")
    features = {}  # of the last encoder, of all images

    def run_unit(encoder, source, rows, seed):
        if encoder.arch["context"] == "side":  # blocks that do not touch h, which is used alone
            encoder.context = nn.ModuleDict()
            encoder.arch["context"] = "none"
        model = Classifier(encoder, len(names)).to(device)
        if config.mode == "frozen":
            if source not in features:
                features.clear()
                every = torch.arange(len(labels))
                features[source] = predict(encoder, data.images, every, config.size, config.amp)
            x = features[source]
            weight, bias = linear_probe(x[rows], labels[rows], x[val], labels[val])
            model.fc.load_state_dict({"weight": weight, "bias": bias})
            scores = F.linear(x[test], weight, bias)
        else:
            fitted = (model, data.images, labels, rows, val, 1.0)
            fit(config, *fitted, masked_bce, mean_auroc, (seed, "classify"))
            scores = predict(model, data.images, test, config.size, config.amp)

        # A finding of which the training labels show one class alone has no classifier.
        given = labels[rows]
        learned = (given == 1).any(0) & (given == 0).any(0)
        about = {"arch": encoder.arch, "findings": names, "learned": learned.tolist()}
        about.update(size=config.size, prepared_size=data.size)
        save_checkpoint(folder / "classifier.pt", classifier=model.state_dict(), **about)
        return scores.masked_fill(~learned, math.nan).numpy()

    tests, patients = {}, data.patient[test.numpy()]
    y = labels[test].numpy()
    encoders = len(settings["encoders"])
    for fraction, runs in run_units(*run, run_unit).items():
        tests[fraction] = classification_results(runs, y, patients, names, encoders)
    return write_results(folder, "classify", config, settings, val, tests)


# ---- segmentation


def segment(config):
    """Segmentation with a U-Net decoder on a frozen or a fine-tuned encoder.

    Loss: BCE + Dice. Epoch and threshold are chosen on the pooled validation Dice (that of all
    images is highest for blank masks, until a model is good); test is read once. Only images with
    `has_mask` are used.
    Args: config: SegmentConfig. Returns: the dict of results.json.
    """
    run = prepare_evaluation(config, "segment")
    config, data, device, folder, settings = run
    require(data.masks is not None, f"{data.folder} has no masks.npy; segment needs masks")
    masked = {}
    for split in ("train", "val", "test"):
        rows = data.indices(split)
        masked[split] = rows[data.has_mask[rows]]
        require(len(masked[split]), f"{data.folder} has no mask of a {split} image")
    val, test = masked["val"], masked["test"]

    def run_unit(encoder, source, rows, seed):
        model = Segmenter(encoder, config.mode == "frozen").to(device)
        rows = rows[data.has_mask[rows]]
        given = (model, data.images, data.masks, rows, val, 0.8)
        fit(config, *given, segmentation_loss, pooled_dice, (seed, "segment"))
        logits = predict(model, data.images, val, config.size, config.amp)
        thresholds = np.arange(0.05, 1, 0.05)
        dices = [pooled_dice(logits, data.masks[val], threshold) for threshold in thresholds]
        logits = predict(model, data.images, test, config.size, config.amp)
        return segmentation_counts(logits, data.masks[test], thresholds[np.argmax(dices)])

    patients, tests = data.patient[test.numpy()], {}
    encoders = len(settings["encoders"])
    for fraction, runs in run_units(*run, run_unit).items():
        found = interval(runs, patients, dice_metrics, encoders)
        tests[fraction] = dict(zip(DICE_NAMES, found))
    return write_results(folder, "segment", config, settings, val, tests)


# ---- heatmaps


@torch.no_grad()
def gradcam(model, images, finding):
    """Where the logit of a finding comes from: Grad-CAM on the last map, the one that is pooled.

    The logit is linear in the pooled map, so that the gradient which weighs the channels is a row
    of the linear layer, and nothing needs to be differentiated.
    Args: model: Classifier, in eval mode. images: (B, 3, H, W). finding: column of the logits.
    Returns: (B, H, W) in [0, 1]. Source: arXiv:1610.02391.
    """
    last = model.encoder.stages(images)[-1]
    weight = model.fc.weight[finding][:, None, None]
    cam = F.relu((weight * last).sum(1, keepdim=True))  # (B, C5, h, w) -> (B, 1, h, w)
    cam = F.interpolate(cam, size=images.shape[2:], mode="bilinear")[:, 0]
    return cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)


# ---- prediction and export


def predict_files(config):
    """Probabilities of the findings for X-ray files and folders, by a classifier.pt; writes a CSV.

    Args: config: PredictConfig. A file that cannot be read is named and left out.
    """
    from data_prep import list_files, read_xray, resize_xray

    model, state = load_module(config.weights, "classifier")
    model = model.to(setup(config.device))
    writable = config.overwrite or not Path(config.out).exists()
    require(writable, f"{config.out} exists; give another --out")
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for path in map(Path, config.files):
        require(path.exists(), f"looked for X-rays at {path}: there is nothing")
        paths += sorted(list_files(path)) if path.is_dir() else [path]

    table = {}
    for path in tqdm(paths, disable=None):
        try:
            image = torch.tensor(resize_xray(read_xray(path), state["prepared_size"]))
        except ValueError as e:
            print(f"left out {path}: {e}", file=sys.stderr)
            continue
        logits = predict(model, image[None], torch.tensor([0]), state["size"], "off")
        table[str(path)] = logits[0].sigmoid().tolist()
    require(table, f"none of {len(paths)} files could be read; PNG, JPEG and DICOM can")
    frame = pd.DataFrame.from_dict(table, "index", columns=state["findings"])
    # Only findings that have a classifier; files of an earlier version do not say which.
    frame = frame.loc[:, state.get("learned", slice(None))]
    with replacing(config.out) as f:
        frame.to_csv(f, index_label="image", errors="surrogateescape")
    print(f"written: {config.out} ({len(table)} of {len(paths)} images)")


def export(config):
    """Writes the backbone as a state dict that torchvision's ResNet takes (all but fc).

    Raises: UserError for inline blocks without --drop-context: they are part of the function.
    """
    encoder, _ = load_encoder(config.weights)
    allowed = encoder.arch["context"] != "inline" or config.drop_context
    text = "has inline context-bottlenecks, without which a ResNet computes other features"
    require(allowed, f"{config.weights} {text}; --drop-context writes it all the same")
    require(not Path(config.out).exists(), f"{config.out} exists; give another --out")
    encoder.context = nn.ModuleDict()
    with replacing(config.out) as f:
        torch.save(encoder.state_dict(), f)
    print(f"written: {config.out} ({encoder.arch['backbone']}, torchvision names, without fc)")


# ---------------------------------------------------------------- 12. command line


def closing_table(config, folder):
    """Prints what a linear probe gives on a random encoder, and on the one just trained."""
    names = ("data", "data_root", "size", "seed", "device", "amp", *ARCHITECTURE)
    given = select(config, *names)
    try:
        for name, weights in (("random", "random"), ("learned", f"{folder}/encoder.pt")):
            given.update(weights=weights, out=f"{folder}/probe-{name}", overwrite=True)
            classify(make_config("classify", ClassifyConfig, given))
    except UserError as e:  # a set without labels, say
        print(f"no linear probe: {e}")


COMMANDS = {
    "pretrain": (PretrainConfig, pretrain),
    "classify": (ClassifyConfig, classify),
    "segment": (SegmentConfig, segment),
    "predict": (PredictConfig, predict_files),
    "export": (ExportConfig, export),
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; argparse would print the usage as well."""

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


@functools.cache  # reading the source takes a tenth of a second
def field_help(cls):
    """Name of every field of a configuration class -> the comment behind it."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        lines = re.findall(r"^    (\w+): .* # (.*)$", inspect.getsource(base), re.MULTILINE)
        found.update(lines)
    return found


def add_flag(parser, setting, text, preset):
    """Adds the flag of one field of a configuration class. Args: text: its help."""
    name, default = setting.name, setting.default
    if name == "files":
        parser.add_argument(name, nargs="+", help=text)
        return
    if default != "" and default is not False:
        text += f" (default: {default})"
    if name in preset:
        text += f" (demo: {preset[name]})"
    options = {"type": setting.type}
    if setting.type is bool:
        options = {"action": argparse.BooleanOptionalAction}
    elif setting.type is tuple:
        options = {"type": parse_numbers}
    elif get_args(setting.type):
        options = {"choices": get_args(setting.type)}
    flag = "--" + name.replace("_", "-")
    parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **options)


def build_parser():
    """A sub-command for each configuration class."""
    parser = Parser(prog="mlvicx.py", description="MLVICX on chest X-rays; see README.md")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, (cls, run) in COMMANDS.items():
        summary = run.__doc__.splitlines()[0]
        sub = commands.add_parser(command, help=summary, description=summary)
        texts, preset = field_help(cls), PRESETS.get((command, "demo"), {})
        for setting in fields(cls):
            add_flag(sub, setting, texts[setting.name], preset)
    return parser


def main(argv=None):
    """Runs one command; a request that cannot be met prints one line and gives exit code 2."""
    try:
        given = vars(build_parser().parse_args(argv))
        command = given.pop("command")
        cls, run = COMMANDS[command]
        allowed = command == "pretrain" or not dist.is_torchelastic_launched()
        require(allowed, f"{command} runs in one process; start it with python, not with torchrun")
        config = make_config(command, cls, given)
        result = run(config)
        if command == "pretrain" and processes()[0] == 0:
            closing_table(config, result)
        # Only here: after an error in one process, it would wait for the others.
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except (UserError, OSError, UnicodeError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(str(e) or "stopped")
        return 130


if __name__ == "__main__":
    sys.exit(main())
