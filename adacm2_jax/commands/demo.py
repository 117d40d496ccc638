"""A page to try a model on: ``adacm2 demo``."""

import argparse
import os
import pathlib
import re
import tempfile
import threading

from adacm2_jax.errors import UserError
from adacm2_jax.runs.load import load
from adacm2_jax.serving.listening import listen


def demo(args: argparse.Namespace) -> int:
    """``adacm2 demo --model RUN``; serves until it is stopped."""
    if not 0 < args.fps <= 30:
        raise UserError(f"--fps {args.fps:g} must be above 0 and at most 30")
    if not 0 < args.port < 65536:
        raise UserError(f"--port {args.port} must be from 1 to 65535")
    if not re.fullmatch(r"[1-9]\d*(kb|mb|gb)", args.max_upload):
        raise UserError(f"--max-upload {args.max_upload} is no size; give one such as 200mb")
    listen(args.host, args.port).close()  # before time is spent
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported
    from adacm2_jax.demo.live import Desk
    from adacm2_jax.demo.page import build, launch
    from adacm2_jax.demo.sample import make_sample

    model = load(
        args.model,
        policy=args.policy or "",
        dtype=args.dtype or "",
        quantize=args.quantize or "",
    )
    desk = Desk(model, 1 / args.fps)
    print("compiling", flush=True)
    desk.prepare()
    with tempfile.TemporaryDirectory(prefix="adacm2-demo-") as directory:
        # Uploads too: they go when the page does.
        os.environ.setdefault("GRADIO_TEMP_DIR", str(pathlib.Path(directory) / "uploads"))
        sample = str(pathlib.Path(directory) / "sample.mp4")
        make_sample(sample)
        page = build(desk, sample)
        launch(page, args.host, args.port, args.max_upload, sample)
        print(f"the page is at http://{args.host}:{args.port}; Ctrl-C ends it", flush=True)
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)
    return 0
