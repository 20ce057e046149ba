"""Gradio for this machine alone: import it from here, before anything else imports it.

Only this machine reaches a page: it listens on 127.0.0.1, `Guard` answers no other name and no page
of another site, and what is not needed of Gradio's paths is closed. Nothing is loaded from the
network, and no file is given out.
"""

import atexit
import contextlib
import os
import shutil
import socket
import tempfile

# Gradio looks at its variables when it is imported and later. They could share the page with the
# world, show it to the network, or let it give out files.
for _name in [name for name in os.environ if name.startswith("GRADIO_")]:
    del os.environ[_name]
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

# What is sent lies in a folder that nobody else may enter, and that goes with the process.
FOLDER = tempfile.mkdtemp(prefix="search-")
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
os.environ["GRADIO_TEMP_DIR"] = FOLDER

try:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse
except ImportError:
    raise ValueError("search.py serve needs Gradio: pip install -r requirements-app.txt") from None

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")  # of this machine, as a browser on it says
MOST_BYTES = 20 * 2**20  # of a file that is sent
MOST_SENT = MOST_BYTES + 2**20  # bytes of a request: a file and what is around it

THEME = gr.themes.Default(  # its own fonts come from Google
    primary_hue="blue",
    neutral_hue="zinc",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(  # darker on light, lighter on dark: its own grey is hard to read
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_title_text_color="*neutral_600",
    block_title_text_color_dark="*neutral_300",
    block_label_text_color="*neutral_600",
    block_label_text_color_dark="*neutral_300",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
)


def only_sent(upload):
    """Make a component for files refuse an address in a file's place, which Gradio would fetch.

    Not a class of its own: Gradio writes a file beside the source of each.
    """
    move = upload.async_move_resource_to_block_cache

    async def move_file(url_or_file_path):
        if "://" in str(url_or_file_path):
            raise gr.Error("an address is not fetched: send the file itself", print_exception=False)
        return await move(url_or_file_path)

    upload.async_move_resource_to_block_cache = move_file
    return upload


# ------------------------------------------------------------------ the server

OPEN = (  # paths that a browser and gradio_client need
    "/config",
    "/theme.css",
    "/favicon.ico",
    "/manifest.json",
    "/assets/",
    "/static/",
    "/svelte/",
    "/gradio_api/info",
    "/gradio_api/app_id",
    "/gradio_api/startup-events",
    "/gradio_api/queue/",
    "/gradio_api/call/",
    "/gradio_api/cancel",
    "/gradio_api/reset",
    "/gradio_api/heartbeat/",
    "/gradio_api/upload",
)

# What a page may load: from here alone, whatever it holds.
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class Guard:
    """ASGI middleware that lets through what the page needs.

    Gradio takes requests for any name of this machine, which pages of other sites may give
    themselves, and lets other sites send, though not read. Its other paths fetch addresses, run
    ffmpeg, give out files.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        status, problem = refusal(scope)
        if problem is not None:
            await PlainTextResponse(problem, status)(scope, receive, send)
            return

        left = MOST_SENT

        async def limited():
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            return message if left >= 0 else {"type": "http.disconnect"}

        async def with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"].append((b"content-security-policy", POLICY.encode()))
            await send(message)

        await self.app(scope, limited, with_policy)


def refusal(scope):
    """(status, reason) of an ASGI request that is not answered; (None, None) of others."""
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    host, origin = headers.get("host", ""), headers.get("origin")
    name, _, _ = host.partition(":")
    if scope["type"] != "http" or name not in NAMES:
        return 403, "only for this machine"
    if origin is not None and origin != f"http://{host}":
        return 403, "only for its own page"
    path = scope["path"]
    if path != "/" and not path.startswith(OPEN):
        return 404, "no such page"
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MOST_SENT:
        return 413, f"more than {MOST_BYTES // 2**20} MB"
    return None, None


@contextlib.contextmanager
def served(blocks_of, port, **settings):
    """Serves the Blocks that `blocks_of` makes until the `with` block ends; gives the address.

    settings: more of Gradio's, for `launch`. Raises ValueError for a port that is not free.
    """
    try:
        socket.create_server((HOST, port)).close()
    except OSError as error:
        raise ValueError(f"--port {port}: not free ({error.strerror}); name another one") from None
    # Gradio asks its own server whether it has started; a proxy would not find it.
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(NAMES)
    blocks = blocks_of()
    try:
        blocks.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            inbrowser=False,
            inline=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            max_file_size=MOST_BYTES,
            allowed_paths=[],
            enable_monitoring=False,
            mcp_server=False,
            pwa=False,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            theme=THEME,
            app_kwargs={"middleware": [Middleware(Guard)], "openapi_url": None},
            **settings,
        )
        yield f"http://{HOST}:{port}"
    finally:
        blocks.close(verbose=False)
