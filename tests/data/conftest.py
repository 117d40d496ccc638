"""What the tests of data/ share with those of videos."""

from tests.video.conftest import decoded

__all__ = ["decoded"]
