"""What people are told of errors that are no fault of the program."""

import contextlib
import resource
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory

from adacm2_jax.distributed import explain


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """Lets no file, and no shared memory, of this process grow beyond a kilobyte."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_shared_memory_is_not_called_a_full_disk(tmp_path):
    found = []
    with small_files():
        try:
            # Python forgets what it could not make, and complains where it never knew of it.
            resource_tracker.register("/adacm2_jax_full", "shared_memory")
            SharedMemory("adacm2_jax_full", create=True, size=1 << 20)
        except OSError as error:
            found.append(error)
        try:
            with open(tmp_path / "checkpoint", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError as error:
            found.append(error)
    memory, disk = (str(explain(error)) for error in found)
    assert memory.startswith("no room in the shared memory /dev/shm (")
    assert "--shm-size" in memory and "data.workers" in memory and "disk" not in memory
    assert disk.startswith("no room on the disk (")
    assert explain(ValueError("anything else")) is None
