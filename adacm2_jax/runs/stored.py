"""One array of an Orbax tree, to be read in parts."""

import os

import tensorstore as ts
from etils import epath


def open_array(directory: epath.Path, path: str) -> ts.TensorStore:
    """One array. What is stored in a single chunk stays in a cache while its layers are read."""
    place = os.fspath(directory).rstrip("/")
    base: dict = {"driver": "file", "path": place}
    if "://" in place:
        base = ts.KvStore.Spec(place).to_json()
    if (directory / "manifest.ocdbt").exists():
        store: dict = {"driver": "ocdbt", "base": base, "path": f"{path}/"}
    else:
        store = base | {"path": f"{base['path'].rstrip('/')}/{path}/"}
    spec = {"driver": "zarr", "kvstore": store}
    array = ts.open(spec, open=True, read=True).result()
    chunk = array.chunk_layout.read_chunk.shape
    if chunk and chunk[0] == 1:
        return array
    cache = ts.Context({"cache_pool": {"total_bytes_limit": 4 << 30}})
    return ts.open(spec, open=True, read=True, context=cache).result()
