"""What the tests of data/ share."""

from __future__ import annotations

import pytest

from adacm2_jax.video.decoder import Decoder


@pytest.fixture
def decoded(monkeypatch):
    """Counts the frames that decoders put out."""
    counts = [0]
    original = Decoder._decode

    def counting(self):
        for stamped in original(self):
            counts[0] += 1
            yield stamped

    monkeypatch.setattr(Decoder, "_decode", counting)
    return counts
