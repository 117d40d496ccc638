"""The page, in Gradio: what a visitor sees and does. What is shown comes from ``live.py``."""

import contextlib
import html
from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np

from adacm2_jax.demo import show
from adacm2_jax.demo.live import MOST_TEXT, Desk, Live
from adacm2_jax.demo.sample import QUESTION
from adacm2_jax.errors import UserError, reason

_HEAD = """<div style="max-width:1160px">
<h1 style="margin:0">What is remembered of a long video</h1>
<p style="margin:.3em 0 0">Ask before the video, or while it is read. A question that is there
before the start has a memory of its own, which its attention chooses; any other is answered from
the open memory, which keeps what is new. Both have a constant size, however long the video is.</p>
</div>"""


def build(desk: Desk, sample: str) -> gr.Blocks:
    """The page.

    Args:
      desk: with the model.
      sample: path of the video that comes with the page.
    """
    with gr.Blocks(title="AdaCM²", analytics_enabled=False) as page:
        live = gr.State(None)  # of each visitor; Gradio drops it an hour after the page was closed
        gr.HTML(_HEAD)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                with gr.Tabs():
                    with gr.Tab("Video"):
                        video = gr.Video(
                            label="A video", sources=["upload"], elem_id="video", height=260
                        )
                        with gr.Row():
                            take = gr.Button("Take the sample", elem_id="sample")
                            start = gr.Button("Read it", variant="primary", elem_id="start")
                    with gr.Tab("Webcam", id="webcam"):
                        camera = gr.Image(
                            label="A webcam",
                            sources=["webcam"],
                            streaming=True,
                            type="numpy",
                            elem_id="camera",
                            height=260,
                        )
                        anew = gr.Button("Forget, and begin anew", elem_id="anew")
            with gr.Column(scale=3, min_width=360):
                question = gr.Textbox(
                    label="Question",
                    placeholder=QUESTION,
                    max_length=MOST_TEXT,
                    elem_id="question",
                )
                ask = gr.Button("Ask now", elem_id="ask")
                answers = gr.HTML(show.answers(None), elem_id="answers")
        panel = gr.HTML(show.memory(None), elem_id="panel")

        page.load(lambda: Live(desk), outputs=live, show_progress="hidden")
        take.click(lambda: (sample, QUESTION), outputs=[video, question], show_progress="hidden")
        one_at_a_time: dict[str, Any] = dict(
            concurrency_limit=1, show_progress="hidden", outputs=[answers, panel]
        )
        start.click(_read, inputs=[live, video, question], trigger_mode="once", **one_at_a_time)
        gr.on([ask.click, question.submit], _ask, inputs=[live, question], **one_at_a_time)
        anew.click(_begin, inputs=[live, question], **one_at_a_time)
        camera.stream(
            _take,
            inputs=[live, camera, question],
            stream_every=desk.seconds_per_frame,
            time_limit=None,
            **one_at_a_time,
        )
    return page


def launch(page: gr.Blocks, host: str, port: int, upload: str, sample: str) -> None:
    """Serves the page and returns; ``page.close()`` ends it.

    Args:
      page: of :func:`build`.
      host: the address to listen on.
      port: likewise.
      upload: the largest file that is taken, such as ``200mb``.
      sample: a file that the page may give to visitors.

    Raises:
      UserError: if the port is taken.
    """
    try:
        page.queue(max_size=32).launch(
            server_name=host,
            server_port=port,
            share=False,
            max_file_size=upload,
            allowed_paths=[sample],
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            enable_monitoring=False,
            footer_links=[],
            theme=gr.themes.Base(
                primary_hue="teal",
                neutral_hue="slate",
                font=["system-ui", "sans-serif"],
                font_mono=["ui-monospace", "monospace"],
            ),
        )
    except OSError as error:
        raise UserError(f"--port {port} cannot be listened on ({reason(error)})") from None


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What a visitor can mend is shown on the page."""
    try:
        yield
    except UserError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from None


def _drawn(live: Live) -> tuple[str, str]:
    view = live.view()
    return show.answers(view), show.memory(view)


def _begin(live: Live, question: str) -> tuple[str, str]:
    with _told():
        live.begin(question or "", "webcam")
        return _drawn(live)


def _read(live: Live, video: str | None, question: str) -> Iterator[tuple[str, str]]:
    with _told():
        if not video:
            raise UserError("there is no video; upload one, or take the sample")
        live.begin(question or "")
        for _ in live.read(video):
            yield _drawn(live)
        for known in live.known:
            yield from _answered(live, known)


def _take(live: Live, picture: np.ndarray | None, question: str) -> Any:
    """A picture of the webcam; the first one begins the stream, with the question that is there."""
    with _told():
        if picture is None:
            return gr.skip(), gr.skip()
        if live.source != "webcam":
            live.begin(question or "", "webcam")
        live.push(picture[None])
        return _drawn(live)


def _ask(live: Live, question: str) -> Iterator[tuple[str, str]]:
    with _told():
        yield from _answered(live, question or "")


def _answered(live: Live, question: str) -> Iterator[tuple[str, str]]:
    live.ask(question)
    yield _drawn(live)
    live.measure()
    yield _drawn(live)
