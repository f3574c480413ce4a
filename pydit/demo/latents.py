"""The latent space of the demo: a linear code of 4x4-pixel patches that the VAE is then trained to speak.

The eight leading principal components of the patches are fixed before any training. So the transformer can be trained
without waiting for the VAE; the encoder learns to reproduce this code and the decoder to undo it. The code drops a
little of the patches' variance; the decoder recovers most of that from its neighbourhood, as only a few shapes exist.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pydit.demo import world
from pydit.demo.render import SIZE

PATCH = 4
SIDE = SIZE // PATCH


@dataclass(frozen=True)
class LatentBasis:
    """``mean`` [48], ``directions`` [48, Z], ``scale`` [Z]: code = (patch - mean) @ directions / scale."""

    mean: torch.Tensor
    directions: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def fit(cls, channels: int, *, seed: int = 1, images: int = 16384) -> LatentBasis:
        """Principal components of the patches of rendered training images.

        Weak components are scaled by a quarter of the strongest one's deviation at least, so that they are not
        blown up to the weight of the strong ones in the training loss.
        """
        generator = torch.Generator().manual_seed(seed)
        indices = world.sample_indices(images, split="train", generator=generator)
        patches = _patches(world.sample_images(indices, generator)).flatten(0, 1)
        mean = patches.mean(0)
        covariance = (patches - mean).T @ (patches - mean) / len(patches)
        directions = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :channels].contiguous()
        deviation = ((patches - mean) @ directions).std(0)
        return cls(mean, directions, deviation.clamp(min=0.25 * float(deviation[0])))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, 48, 48] -> latents [N, Z, 12, 12]."""
        code = (_patches(images) - self.mean) @ self.directions / self.scale
        return code.view(len(images), SIDE, SIDE, -1).permute(0, 3, 1, 2)

    def tensors(self) -> dict[str, torch.Tensor]:
        """For a safetensors file."""
        return {"mean": self.mean, "directions": self.directions, "scale": self.scale}


def _patches(images: torch.Tensor) -> torch.Tensor:
    """[N, 3, 48, 48] -> [N, 144, 48]."""
    tiles = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5)
    return tiles.reshape(len(images), SIDE * SIDE, 3 * PATCH * PATCH)
