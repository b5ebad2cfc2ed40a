"""Inception as FID uses it (Heusel et al., 2017): torchvision's blocks with the differences of the
TensorFlow network of 2015 that the published statistics come from.

Average pools do not count the padding, the last block pools by maximum, and pictures are resized
bilinearly as TensorFlow 1 did, without antialiasing and without half-pixel centres.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.inception import (
    BasicConv2d,
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
)

SIDE, DIMENSIONS = 299, 2048
average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)


class _A(InceptionA):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [*super()._forward(x)[:-1], self.branch_pool(average(x))]


class _C(InceptionC):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [*super()._forward(x)[:-1], self.branch_pool(average(x))]


class _E(InceptionE):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [*super()._forward(x)[:-1], self.branch_pool(average(x))]


class _Last(InceptionE):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [*super()._forward(x)[:-1], self.branch_pool(maximum(x))]


def network() -> nn.Sequential:
    """Pictures `b 3 299 299` in -1..1 to features `b 2048`; random values, to be filled."""
    shrink = partial(nn.MaxPool2d, kernel_size=3, stride=2)
    layers: dict[str, nn.Module] = {
        "conv_1a": BasicConv2d(3, 32, kernel_size=3, stride=2),
        "conv_2a": BasicConv2d(32, 32, kernel_size=3),
        "conv_2b": BasicConv2d(32, 64, kernel_size=3, padding=1),
        "pool_1": shrink(),
        "conv_3b": BasicConv2d(64, 80, kernel_size=1),
        "conv_4a": BasicConv2d(80, 192, kernel_size=3),
        "pool_2": shrink(),
        "mixed_5b": _A(192, pool_features=32),
        "mixed_5c": _A(256, pool_features=64),
        "mixed_5d": _A(288, pool_features=64),
        "mixed_6a": InceptionB(288),
        "mixed_6b": _C(768, channels_7x7=128),
        "mixed_6c": _C(768, channels_7x7=160),
        "mixed_6d": _C(768, channels_7x7=160),
        "mixed_6e": _C(768, channels_7x7=192),
        "mixed_7a": InceptionD(768),
        "mixed_7b": _E(1280),
        "mixed_7c": _Last(2048),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
    }
    return nn.Sequential(OrderedDict(layers))


def prepare(images: Tensor) -> Tensor:
    """Pictures `b 3 h w` in 0..255 as the network takes them: resized to 299, in -1..127/128."""
    return (resize(images, SIDE) - 128) / 128


def resize(x: Tensor, side: int) -> Tensor:
    """Bilinear as in TensorFlow 1: output pixel i lies at input i * length / side."""
    for axis in (2, 3):
        length = x.shape[axis]
        place = torch.arange(side, device=x.device) * (length / side)
        low = place.long()
        high = (low + 1).clamp(max=length - 1)
        part = (place - low).to(x).view(-1, *[1] * (3 - axis))
        x = torch.lerp(x.index_select(axis, low), x.index_select(axis, high), part)
    return x
