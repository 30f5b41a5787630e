"""Activations: every way of writing one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def relu_inplace(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True)


def relu_positional(x: Tensor) -> Tensor:
    return F.relu(x, True)


def relu_keyword(x: Tensor) -> Tensor:
    return F.relu(input=x)


def relu_method(x: Tensor) -> Tensor:
    return x.relu()


def relu_method_inplace(x: Tensor) -> Tensor:
    return x.relu_()


def relu6_inplace(x: Tensor) -> Tensor:
    return F.relu6(x, inplace=True)


def leaky_relu_inplace(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2, inplace=True)


rectify = F.relu


def relu_alias(x: Tensor) -> Tensor:
    return rectify(x)


class CallableReLU:
    """An object that is called and is no module."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.relu(x)


class DoubledReLU(nn.ReLU):
    """A subclass of an activation whose forward does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class PlainReLUSubclass(nn.ReLU):
    """A subclass of an activation that changes nothing but the name."""


ACTIVATIONS: dict[str, Callable[[], Any]] = {
    "ReLU": nn.ReLU,
    "ReLU(inplace)": lambda: nn.ReLU(inplace=True),
    "ReLU6": nn.ReLU6,
    "ReLU6(inplace)": lambda: nn.ReLU6(inplace=True),
    "LeakyReLU": lambda: nn.LeakyReLU(0.1),
    "LeakyReLU(inplace)": lambda: nn.LeakyReLU(0.1, inplace=True),
    "Sequential(ReLU)": lambda: nn.Sequential(nn.ReLU()),
    "DoubledReLU": DoubledReLU,
    "PlainReLUSubclass": PlainReLUSubclass,
    "PReLU": nn.PReLU,
    "GELU": nn.GELU,
    "Tanh": nn.Tanh,
    "F.relu": lambda: F.relu,
    "F.relu(inplace=True)": lambda: relu_inplace,
    "F.relu(x, True)": lambda: relu_positional,
    "F.relu(input=x)": lambda: relu_keyword,
    "torch.relu": lambda: torch.relu,
    "torch.relu_": lambda: torch.relu_,
    "x.relu()": lambda: relu_method,
    "x.relu_()": lambda: relu_method_inplace,
    "F.relu6": lambda: F.relu6,
    "F.relu6(inplace=True)": lambda: relu6_inplace,
    "F.leaky_relu": lambda: F.leaky_relu,
    "F.leaky_relu(inplace=True)": lambda: leaky_relu_inplace,
    "partial(F.leaky_relu)": lambda: functools.partial(F.leaky_relu, negative_slope=0.3),
    "partial(F.relu, inplace=True)": lambda: functools.partial(F.relu, inplace=True),
    "F.leaky_relu_": lambda: F.leaky_relu_,
    "Tensor.relu": lambda: Tensor.relu,
    "alias of F.relu": lambda: relu_alias,
    "callable object": CallableReLU,
    "F.gelu": lambda: F.gelu,
}
