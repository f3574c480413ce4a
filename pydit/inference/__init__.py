"""Running pipelines: saving and loading them with a pruned transformer, and recording what their transformer is fed."""
