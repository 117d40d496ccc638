"""What the tests of data/ share with those of video files."""

from tests.video.conftest import decoded

__all__ = ["decoded"]
