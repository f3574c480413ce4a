"""Images with captions as training batches: folders and tar shards, aspect buckets, cached latents and embeddings."""

from pydit.data.batches import TIMESTEPS, CachedDataset
from pydit.data.cache import build_cache
from pydit.data.samples import Sample, Skipped, read_samples

__all__ = ["TIMESTEPS", "CachedDataset", "Sample", "Skipped", "build_cache", "read_samples"]
