"""The table of sessions: what is admitted, what is saved, what is taken over from disk."""

import json
import struct
import time

import jax
import jax.numpy as jnp
import pytest

from adacm2_jax.errors import UserError
from adacm2_jax.memory.slots import novelty
from adacm2_jax.serving import sizes
from adacm2_jax.serving.limits import BusyError, StorageError
from adacm2_jax.serving.operations import Act
from tests.inference.test_session import CONFIG, OTHER, frames
from tests.serving.conftest import ROWS
from tests.serving.test_engine import on_table, open_session, push
from tests.small import QUESTION, quick_compilation


@pytest.fixture(scope="module", autouse=True)
def quick(compiled_once):
    with quick_compilation():
        yield


def test_a_memory_whose_pass_cannot_be_afforded_is_refused_before_it_is_made(start):
    engine = start(session_bytes=1 << 20)
    made = on_table(engine, lambda table: table.most)
    # 3 rows of (capacity + 5)² float32 in 2**20 bytes: a capacity of 290 at most.
    with pytest.raises(UserError, match=r"open_tokens is 512: .*at most 256.*--session-bytes"):
        on_table(engine, lambda table: table.open((QUESTION,), 1.0, 257))
    with pytest.raises(UserError, match=r"open_tokens is 65,536: .*51,5\d\d,\d\d\d,\d\d\d bytes"):
        on_table(engine, lambda table: table.open((QUESTION,), 1.0, 60000))
    assert on_table(engine, lambda table: table.most) == made
    assert on_table(engine, lambda table: table.open((QUESTION,), 1.0, 256).id)


def test_what_a_pass_needs_is_what_the_comparison_takes_when_compiled(model, start):
    session = on_table(start(), lambda table: table.open((), 1.0, 512)).session
    layer = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((ROWS, *leaf.shape[2:]), leaf.dtype),
        session.state.open.memory.replace(length=jnp.zeros((1, 1), jnp.int32)),
    )
    taken = jax.jit(novelty).lower(layer).compile().memory_analysis().temp_size_in_bytes
    told = sizes.pass_bytes(session.shape[2], 0, ROWS)
    assert told <= taken <= 1.2 * told  # the keys come in addition


def test_an_open_memory_is_rounded_up_so_that_there_are_few_programs(start):
    engine, plain = start(), 2 * CONFIG.vision.tokens_per_frame

    def opened(tokens):
        made = on_table(engine, lambda table: table.open((), 1.0, tokens))
        kept = made.session.state.open.memory.key.shape[-2] - CONFIG.vision.tokens_per_frame
        assert made.describe()["open_tokens"] == kept
        return kept

    assert [opened(tokens) for tokens in (0, plain, 17, 32, 33)] == [plain, plain, 32, 32, 64]


def test_a_session_that_cannot_be_saved_keeps_no_other_from_it(start, tmp_path, size, caplog):
    engine = start(session_bytes=3 * size + 10, save_seconds=0.01, idle_seconds=1e9)
    names = [open_session(engine) for _ in range(3)]
    taken = tmp_path / "sessions" / f"{names[0]}.session"
    taken.mkdir()  # no file can be there
    for name in names:
        push(engine, name, frames(3))
    deadline = time.monotonic() + 30
    files = [tmp_path / "sessions" / f"{name}.session" for name in names[1:]]
    while not all(file.is_file() for file in files) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(file.is_file() for file in files)
    time.sleep(2.5)  # it is not tried again every second
    said = [line for line in caplog.messages if line.startswith(f"session {names[0]} is not saved")]
    assert len(said) == 1
    assert open_session(engine)  # the first could make no room, the second did
    on_device = on_table(engine, lambda table: [bool(each.session) for each in table.named()])
    assert on_device == [True, False, True, True]
    for act, words in (("close", "cannot be removed"), ("save", "cannot be saved [(]Is a dir")):
        asked = Act(lambda table, entry, act=act: getattr(table, act)(entry))
        with pytest.raises(StorageError, match=words) as caught:
            engine.submit(names[0], asked).done.result(60)
        assert str(tmp_path) not in str(caught.value)
    assert push(engine, names[0], frames(1)) == 4  # it is still there
    push(engine, names[2], frames(2))
    engine.stop()
    assert engine.unsaved == [names[0]] and engine.failed is None
    taken.rmdir()
    again = start()
    assert on_table(again, lambda table: table.get(names[2]).seen) == 5


def test_a_budget_that_only_unsaved_sessions_fill_says_so(start, tmp_path, size):
    engine = start(session_bytes=size + 10)
    name = open_session(engine)
    (tmp_path / "sessions" / f"{name}.session").mkdir()
    with pytest.raises(BusyError, match="1 more cannot be saved"):
        open_session(engine)
    (tmp_path / "sessions" / f"{name}.session").rmdir()


def saved_file(start, tmp_path, questions=(QUESTION,)):
    """A server's directory with one session, after its end; and what was said of that session."""
    engine = start("before")
    made = on_table(engine, lambda table: table.open(questions, 1.0, 20))
    push(engine, made.id, frames(4))
    engine.submit(made.id, Act(lambda table, entry: table.save(entry))).done.result(60)
    described = on_table(engine, lambda table: table.get(made.id).describe())
    engine.stop()
    return tmp_path / "before" / f"{made.id}.session", described


def test_a_saved_session_is_described_after_a_restart_as_before(start, tmp_path):
    _, described = saved_file(start, tmp_path, (QUESTION, OTHER))
    (found,) = on_table(start("before"), lambda table: [each.describe() for each in table.named()])
    assert found.pop("on_device") is False and described.pop("on_device") is True
    assert found == described and found["bound"] >= found["kept"] > 0


def test_no_file_keeps_a_server_from_starting(start, tmp_path):
    path, described = saved_file(start, tmp_path)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    about = header["__metadata__"]["adacm2"]
    changes = [
        about.replace('"seen": 4', '"seen": 1e400'),
        about.replace('"kept": ', '"kept": 1e400, "was": '),
        about.replace('"seconds_per_frame": 1.0', '"seconds_per_frame": 1e400'),
        about.replace('"capacity": 32', '"capacity": 900000'),
        about.replace('"questions": [', '"questions": [7, '),
        about.replace('"questions": [', '"questions": null, "were": ['),
        "[" * 100_000,
    ]
    assert about not in changes
    headers = [json.dumps(header | {"__metadata__": {"adacm2": text}}).encode() for text in changes]
    for number, text in enumerate([*headers, b'{"a":' * 100_000]):
        damaged = tmp_path / "before" / f"s-{number:016d}.session"
        damaged.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    again = start("before", session_bytes=1 << 30)
    found = on_table(again, lambda table: [each.id for each in table.named()])
    assert found == [described["id"]]
