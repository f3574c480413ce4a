"""Fixtures of the demo's tests."""

import pytest

from pydit.demo.latents import LatentBasis


@pytest.fixture(autouse=True)
def basis_of_few_images(monkeypatch):
    """A latent basis from 512 images in place of 16,384, seconds for each start of a training; no test asks which."""
    fit = LatentBasis.fit
    monkeypatch.setattr(LatentBasis, "fit", lambda channels, images=512: fit(channels, images=images))
