import pytest

from tests.port import checkpoints


@pytest.fixture(scope="session")
def tensors():
    return checkpoints.hugging_face_tensors(checkpoints.config())


@pytest.fixture(scope="session")
def hugging_face(tensors, tmp_path_factory):
    """An InstructBLIP in three shards."""
    directory = tmp_path_factory.mktemp("source") / "blip"
    return checkpoints.write_safetensors(directory, checkpoints.config(), tensors, shards=3)
