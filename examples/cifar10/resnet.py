"""Residual networks for images of 32 x 32 pixels.

Source: He et al., Deep Residual Learning for Image Recognition, section 4.2, https://arxiv.org/abs/1512.03385
"""

from __future__ import annotations

from torch import Tensor, nn


def convolution(before: int, channels: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """With batch norm, which makes a bias superfluous."""
    conv = nn.Conv2d(before, channels, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


class Block(nn.Module):
    """Two convolutions and what leads past them; twice the channels go with half the rows and columns."""

    def __init__(self, before: int, channels: int) -> None:
        super().__init__()
        stride = channels // before
        first, second = convolution(before, channels, stride=stride), convolution(channels, channels)
        self.residual = nn.Sequential(first, nn.ReLU(), second)
        self.shortcut = nn.Identity() if stride == 1 else convolution(before, channels, size=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Shape: ``(batch, channels, rows, columns)``."""
        return nn.functional.relu(self.residual(x) + self.shortcut(x))


def resnet(depth: int, classes: int) -> nn.Sequential:
    """A network of ``depth`` layers, 6 n + 2 of them: 8, 14, 20, 32, 44, 56, ...

    Shape: images ``(batch, 3, 32, 32)`` in, logits ``(batch, classes)`` out.

    Raises:
        ValueError: there is no network of this depth.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth {depth} is not 6 n + 2, as 8, 14, 20 or 56 are")
    layers: list[nn.Module] = [convolution(3, 16), nn.ReLU()]
    for before, channels in ((16, 16), (16, 32), (32, 64)):
        layers += [Block(before if number == 0 else channels, channels) for number in range(blocks)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))
