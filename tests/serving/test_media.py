"""Addresses of media: what is taken, what is refused, and that nothing stays behind."""

import base64
import contextlib
import os
import urllib.parse
from pathlib import Path

import pytest

from adacm2_jax.errors import UserError
from adacm2_jax.serving.limits import BusyError, Limits, MissingError
from adacm2_jax.serving.media import Media

LIMITS = Limits(upload_total=1000)


@pytest.fixture
def place(tmp_path):
    """An allowed directory with a file, links out of it, and a file outside."""
    allowed = tmp_path / "allowed"
    (allowed / "sub").mkdir(parents=True)
    (allowed / "sub" / "a b.mp4").write_bytes(b"inside")
    (tmp_path / "secret.mp4").write_bytes(b"outside")
    (tmp_path / "allowed-not").mkdir()
    (tmp_path / "allowed-not" / "c.mp4").write_bytes(b"outside")
    (allowed / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (allowed / "up").symlink_to(tmp_path)
    os.mkfifo(allowed / "pipe.mp4")
    return tmp_path


@pytest.fixture
def media(place):
    return Media(place / "state", [str(place / "allowed")], LIMITS)


def test_an_allowed_file_is_named_by_its_address(media, place):
    with contextlib.ExitStack() as stack:
        for address in (
            f"file://{place}/allowed/sub/a%20b.mp4",
            f"file://localhost{place}/allowed/sub/a b.mp4",
            f"file://{place}/allowed/sub/../sub/a%20b.mp4",
        ):
            assert media.resolve(address, stack, "it") == str(place / "allowed/sub/a b.mp4")


@pytest.mark.parametrize(
    "path",
    [
        "secret.mp4",
        "allowed/../secret.mp4",
        "allowed/%2e%2e/secret.mp4",
        "allowed/link.mp4",
        "allowed/up/secret.mp4",
        "allowed-not/c.mp4",
        "allowed",
        "allowed/pipe.mp4",
        "allowed/none.mp4",
        "allowed/sub/a%20b.mp4%00.txt",
        "allowed/" + "x" * 5000,
    ],
)
def test_every_other_file_is_refused_in_the_same_words(media, place, path):
    with contextlib.ExitStack() as stack, pytest.raises(UserError) as caught:
        media.resolve(f"file://{place}/{path}", stack, "it")
    assert str(caught.value) == (
        "it is no video file below a directory that the server allows (--allow)"
    )


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1/a.mp4",
        "https://a.b/c",
        "ftp://a/b",
        "/etc/passwd",
        "concat:a",
        "",
        "file-x",
    ],
)
def test_nothing_is_fetched(media, address):
    with contextlib.ExitStack() as stack, pytest.raises(UserError, match="nothing is fetched"):
        media.resolve(address, stack, "it")


def test_a_file_on_another_host_is_refused(media, place):
    with contextlib.ExitStack() as stack, pytest.raises(UserError, match="no video file below"):
        media.resolve(f"file://host{place}/allowed/sub/a%20b.mp4", stack, "it")


def test_a_data_address_is_a_file_for_as_long_as_the_request(media):
    content = bytes(range(256))
    for kind in ("data:video/mp4;base64,", "data:;base64,", "data:video/mp4;codecs=avc1;base64,"):
        with contextlib.ExitStack() as stack:
            path = Path(media.resolve(kind + base64.b64encode(content).decode(), stack, "it"))
            assert path.read_bytes() == content
        assert not path.exists()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("data:video/mp4;base64,", "empty"),
        ("data:video/mp4;base64,%%%", "not base64"),
        ("data:video/mp4;base64,YQ", "not base64"),
        ("data:video/mp4,abc", "no data address in base64"),
        ("data:" + "x" * 1000, "no data address"),
    ],
)
def test_a_data_address_that_is_none_says_why(media, address, words):
    with contextlib.ExitStack() as stack, pytest.raises(UserError, match=words):
        media.resolve(address, stack, "it")


def keep(media, content: bytes, name: str = "a.mp4"):
    with media.new_file() as path:
        path.write_bytes(content)
        media.reserve(len(content))
        return media.keep(path, name, len(content))


def test_uploads_are_kept_until_they_are_deleted(media):
    upload = keep(media, b"x" * 400)
    with contextlib.ExitStack() as stack:
        assert Path(media.resolve(upload.id, stack, "it")).read_bytes() == b"x" * 400
    assert [each.id for each in media.uploads()] == [upload.id] and media.held == 400
    with pytest.raises(BusyError, match="400 of 1,000"):
        media.reserve(601)
    media.delete(upload.id)
    assert media.held == 0 and not upload.path.exists() and not media.uploads()
    for act in (media.upload, media.delete):
        with pytest.raises(MissingError):
            act(upload.id)


def test_uploads_are_forgotten_in_time_and_at_a_new_start(place, media):
    old = Media(place / "state2", [], Limits(upload_seconds=1e-9))
    upload = keep(old, b"x")
    assert not old.uploads() and not upload.path.exists() and old.held == 0
    left = keep(media, b"y")
    Media(place / "state", [], LIMITS)
    assert not left.path.exists()


def test_without_an_allowed_directory_no_file_is_read(place):
    media = Media(place / "state3", [], LIMITS)
    address = "file://" + urllib.parse.quote(f"{place}/allowed/sub/a b.mp4")
    with contextlib.ExitStack() as stack, pytest.raises(UserError, match="--allow DIR"):
        media.resolve(address, stack, "it")
    with pytest.raises(UserError, match="is no directory"):
        Media(place / "state3", [str(place / "none")], LIMITS)
