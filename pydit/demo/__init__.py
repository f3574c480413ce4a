"""A small text-to-image world with an exact verifier, a trained teacher for it, and the whole method run on both."""
