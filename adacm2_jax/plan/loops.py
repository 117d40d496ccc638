"""What the loops of our programs are, in people's words."""

from adacm2_jax.plan.hlo import Loop, Program

#: Parts of the path that a loop was traced from → what it walks over; the first match counts.
_NAMES = (
    ("/vision/while", "ViT blocks"),
    ("frame_projection", "Q-Former layers (keys and values)"),
    ("cross_attention/while", "frames"),
    ("/qformer/groups/while", "Q-Former layers"),
    ("/qformer/while/", "frames"),  # policy merge: the layers are inside
    ("/qformer/while", "Q-Former layers"),
    ("/llm/while", "LLM layers"),
)


def loop_name(loop: Loop, program: Program) -> str:
    """Such as ``LLM layers (backward)``, or the loop's path where it is none of ours."""
    inner = loop.parents[-1].op_name if loop.parents else ""
    path = loop.op_name
    if not path.endswith("while"):
        if "/llm/" in path:
            return "pieces of a matrix product"
        return path.rsplit("/", 1)[-1] or loop.name
    own = path.removeprefix(inner) if inner and path.startswith(inner) else path
    for part, name in _NAMES:
        if part in own:
            return name + (" (backward)" if "transpose(" in path else "")
    inside = [other for other in program.loops if loop in other.parents]
    if any("AdaCM2.read" in other.op_name for other in inside) and "shard_map" in own:
        return "chunks of frames"
    if any("llm" in other.op_name for other in inside):
        return "answer tokens" if "train_step" not in path else "parts of the batch"
    if "map" in own or "shard_map" in path:
        return "Q-Former layers (memory)"
    return path


def loop_path(loops: tuple[Loop, ...], program: Program) -> str:
    """Names and trip counts, outermost first; ``no loop`` where there is none."""
    named = [
        f"{loop_name(loop, program)} × {'?' if loop.trip_count is None else loop.trip_count}"
        for loop in loops
    ]
    return " > ".join(named) or "no loop"


def frame_loops(program: Program) -> tuple[Loop, ...]:
    """The loops that run once a frame or chunk of frames, and all inside them."""
    ours = [
        loop
        for loop in program.loops
        if loop_name(loop, program) in ("chunks of frames", "frames", "ViT blocks")
    ]
    return tuple(
        loop for loop in program.loops if any(each in (*loop.parents, loop) for each in ours)
    )
