"""Pictures and videos for tests, the conformance kit's: noise over gradients, so that every patch differs."""

from mm_core.testing import frames, picture

__all__ = ["frames", "picture"]
