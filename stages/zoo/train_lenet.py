"""The training script for LeNet-5, which writes the two files in `stages/data`.

Run `python -m stages.zoo.train_lenet`; it needs scikit-learn, a development dependency. The digits (1,797 pictures of 8x8
from 43 people, UCI "Optical Recognition of Handwritten Digits") are enlarged to 28x28 by bilinear zoom and a border. 1,297
are for training, 500 for tests. The gradients are computed with NumPy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import shift, zoom

from bus.tensors import Array
from stages.zoo.networks import LENET, build, trained

DATA = Path(__file__).parent.parent / "data"
TEST_DIGITS = 500
EPOCHS = 30
BATCH = 32


def pictures(small: Array) -> Array:
    """Enlarges 8x8 pictures with values 0..16 threefold and adds a border of two pixels: 28x28 bytes."""
    large = np.stack([zoom(picture / 16.0, 3, order=1) for picture in small])
    return np.pad(np.round(255 * large.clip(0, 1)).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))[..., None]


def columns(x: Array, size: int) -> Array:
    """Windows of a picture as rows: (n, h, w, c) -> (n, h', w', size * size * c)."""
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
    return windows.transpose(0, 1, 2, 4, 5, 3).reshape(*windows.shape[:3], -1)


def scattered(grad: Array, size: int, channels: int, shape: tuple[int, ...]) -> Array:
    """The gradient of `columns`: adds every window's values to their source pixels."""
    out = np.zeros(shape, np.float32)
    height, width = grad.shape[1:3]
    parts = grad.reshape(*grad.shape[:3], size, size, channels)
    for row in range(size):
        for column in range(size):
            out[:, row : row + height, column : column + width] += parts[:, :, :, row, column]
    return out


def pooled(x: Array) -> tuple[Array, Array]:
    """2x2 max-pool, and the mask of the maxima, in which equal maxima share the weight 1."""
    n, h, w, c = x.shape
    blocks = x.reshape(n, h // 2, 2, w // 2, 2, c)
    top = blocks.max(axis=(2, 4), keepdims=True)
    return top[:, :, 0, :, 0], (blocks == top) / np.maximum((blocks == top).sum(axis=(2, 4), keepdims=True), 1)


class LeNet:
    """Weights, forward pass and gradients."""

    def __init__(self, rng: np.random.Generator) -> None:
        shapes = {"conv_1": (25, 6), "conv_2": (150, 16), "fc_1": (400, 120), "fc_2": (120, 84), "fc_3": (84, 10)}
        self.weights: dict[str, Array] = {}
        for name, shape in shapes.items():
            spread = np.sqrt(2.0 / shape[0])
            self.weights[f"{name}/kernel"] = rng.standard_normal(shape).astype(np.float32) * np.float32(spread)
            self.weights[f"{name}/bias"] = np.zeros(shape[1], np.float32)

    def forward(self, x: Array) -> tuple[Array, dict[str, Any]]:
        """Logits of pictures (n, 28, 28, 1), and the intermediate values that `gradients` reads."""
        w = self.weights
        kept: dict[str, Any] = {}
        for conv, pad in (("conv_1", 2), ("conv_2", 0)):
            padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
            cols = columns(padded, 5)
            y = np.maximum(cols @ w[f"{conv}/kernel"] + w[f"{conv}/bias"], 0)
            x, mask = pooled(y)
            kept[conv] = (cols, y, mask, padded.shape)
        flat = x.reshape(len(x), -1)
        for dense in ("fc_1", "fc_2", "fc_3"):
            y = flat @ w[f"{dense}/kernel"] + w[f"{dense}/bias"]
            if dense != "fc_3":
                y = np.maximum(y, 0)
            kept[dense] = (flat, y)
            flat = y
        kept["pooled"] = x.shape
        return flat, kept

    def gradients(self, grad: Array, kept: dict[str, Any]) -> dict[str, Array]:
        """The gradient of every weight, from the gradient of the logits."""
        w, found = self.weights, {}
        for dense in ("fc_3", "fc_2", "fc_1"):
            flat, y = kept[dense]
            if dense != "fc_3":
                grad = grad * (y > 0)
            found[f"{dense}/kernel"], found[f"{dense}/bias"] = flat.T @ grad, grad.sum(0)
            grad = grad @ w[f"{dense}/kernel"].T
        grad = grad.reshape(kept["pooled"])
        for conv, channels in (("conv_2", 6), ("conv_1", 1)):
            cols, y, mask, shape = kept[conv]
            grad = (grad[:, :, None, :, None] * mask).reshape(y.shape) * (y > 0)
            found[f"{conv}/kernel"] = np.einsum("nhwk,nhwf->kf", cols, grad, optimize=True)
            found[f"{conv}/bias"] = grad.sum((0, 1, 2))
            if conv == "conv_2":
                grad = scattered(grad @ w[f"{conv}/kernel"].T, 5, channels, shape)
        return found

    def exported(self) -> dict[str, Array]:
        """The weights in the format's shapes: filters first, outputs first."""
        w = {name: value for name, value in self.weights.items() if name.endswith("bias")}
        w["conv_1/kernel"] = self.weights["conv_1/kernel"].T.reshape(6, 5, 5, 1)
        w["conv_2/kernel"] = self.weights["conv_2/kernel"].T.reshape(16, 5, 5, 6)
        for dense in ("fc_1", "fc_2", "fc_3"):
            w[f"{dense}/kernel"] = self.weights[f"{dense}/kernel"].T
        return w


def train(x: Array, labels: Array, seed: int) -> LeNet:
    """Trains with Adam on the cross-entropy; each picture is shifted by up to two pixels."""
    rng = np.random.default_rng(seed)
    net = LeNet(rng)
    moments = {name: [np.zeros_like(value), np.zeros_like(value)] for name, value in net.weights.items()}
    step = 0
    for epoch in range(EPOCHS):
        rate = 2e-3 * 0.5 * (1 + np.cos(np.pi * epoch / EPOCHS))
        order = rng.permutation(len(x))
        right = 0
        for start in range(0, len(x), BATCH):
            chosen = order[start : start + BATCH]
            batch = np.stack([shift(x[i], (*rng.integers(-2, 3, 2), 0), order=0) for i in chosen])
            logits, kept = net.forward(batch)
            right += int((logits.argmax(1) == labels[chosen]).sum())
            odds = np.exp(logits - logits.max(1, keepdims=True))
            odds /= odds.sum(1, keepdims=True)
            odds[np.arange(len(chosen)), labels[chosen]] -= 1
            step += 1
            for name, grad in net.gradients(odds / len(chosen), kept).items():
                mean, square = moments[name]
                mean += 0.1 * (grad - mean)
                square += 0.001 * (grad**2 - square)
                scaled = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
                net.weights[name] -= (rate * scaled).astype(np.float32)
        print(f"epoch {epoch + 1:2d}: {right / len(x):.1%} of the training digits")
    return net


def main() -> None:
    """Trains, reports, writes `lenet.tflite` and `digits.npz`."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = pictures(data.images), data.target.astype(np.uint8)
    order = np.random.default_rng(LENET.seed).permutation(len(images))
    test, rest = order[:TEST_DIGITS], order[TEST_DIGITS:]
    net = train(images[rest].astype(np.float32) / 255, labels[rest], LENET.seed)
    logits, _ = net.forward(images[test].astype(np.float32) / 255)
    print(f"held out: {(logits.argmax(1) == labels[test]).mean():.1%} of {TEST_DIGITS} digits")
    (DATA / "lenet.tflite").write_bytes(build(LENET, trained(net.exported(), LENET)).to_bytes())
    np.savez_compressed(DATA / "digits.npz", images=images[test], labels=labels[test])


if __name__ == "__main__":
    main()
