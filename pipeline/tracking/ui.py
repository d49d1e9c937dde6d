"""MLflow's UI on this machine with prepared views: `python -m pipeline.tracking ui`, or `make ui`.

The server is MLflow's own, with additions. Its address opens the pre-training runs. An experiment opens with the
columns and charts of its prepared view (`pipeline.tracking.views`), in the mode for model training instead of language
models; other choices of the user are kept. /leaderboard compares all transferred models on one page.
"""

import asyncio
import errno
import functools
import hashlib
import http.client
import json
import logging
import re
import socket
import threading
import time
import urllib.request
import warnings
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pipeline.credentials import redacted
from pipeline.errors import UserError
from pipeline.tracking import mlflow_private, names
from pipeline.tracking.leaderboard import leaderboard
from pipeline.tracking.pages import leaderboard_page, text_page
from pipeline.tracking.server import resolve_tracking_uri
from pipeline.tracking.views import SHARE, VIEW

logger = logging.getLogger(__name__)
Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]
DATABASE = "x-tracking-database"  # header of our pages that identifies the database
ANSWER = 10.0  # seconds to wait for the page of a UI that is already running
FRESH = 10.0  # seconds for which a leaderboard is cached

# MLflow keeps columns and charts in the browser, and opens the shared view of an experiment if the address asks for it.
# The address without a page opens the first of our experiments that has runs. The toolbar of a chart covers its data,
# so it is shown only under the pointer. Titles of columns are longer than the columns are wide, so they may be broken
# after `_` and `/`.
SCRIPT = """<script>(() => {
  if (!localStorage.getItem("WORKFLOW")) localStorage.setItem("WORKFLOW", '"machine_learning"');
  if (!localStorage.getItem("ASSISTANT")) localStorage.setItem("ASSISTANT", "true");
  const api = path => fetch(`ajax-api/2.0/mlflow/${path}`);
  const isStart = () => ["", "#", "#/"].includes(location.hash);
  const start = async () => {
    for (const name of START) {
      const answer = await api(`experiments/get-by-name?experiment_name=${name}`);
      if (!answer.ok) continue;
      const id = (await answer.json()).experiment.experiment_id;
      if (isStart()) location.replace(`#/experiments/${id}/runs?viewStateShareKey=VIEW`);
      return;
    }
  };
  const open = async () => {
    const [, id, query] = location.hash.match(/^#\\/experiments\\/(\\d+)(?:\\/runs)?\\/?(?:\\?(.*))?$/) || [];
    const asked = new URLSearchParams(query || "");
    if (!id || ["viewStateShareKey", "orderByKey", "searchFilter", "isComparingRuns"].some(key => asked.has(key))) return;
    const answer = await api(`experiments/get?experiment_id=${id}`);
    if (!answer.ok) return;
    const tags = (await answer.json()).experiment.tags || [];
    if (!tags.some(tag => tag.key === "SHARE_TAG")) return;
    if (!new RegExp(`^#/experiments/${id}(/runs)?/?([?].*)?$`).test(location.hash)) return;
    asked.set("viewStateShareKey", "VIEW");
    location.replace(`#/experiments/${id}/runs?${asked}`);
  };
  addEventListener("hashchange", open);
  const push = history.pushState, replace = history.replaceState;
  history.pushState = function (...all) { push.apply(this, all); open(); };
  history.replaceState = function (...all) { replace.apply(this, all); open(); };
  if (isStart()) start(); else open();
  new MutationObserver(() => document.querySelectorAll('COLUMN_TITLE').forEach(title => {
    const texts = document.createTreeWalker(title, NodeFilter.SHOW_TEXT);
    for (let text; (text = texts.nextNode());)
      if (!text.data.includes("\\u200b")) text.data = text.data.replace(/[_/](?=\\w)/g, "$&\\u200b");
  })).observe(document.documentElement, {childList: true, subtree: true});
})();</script>
<style>.js-plotly-plot .modebar {opacity: 0 !important} .js-plotly-plot:hover .modebar {opacity: 1 !important}
.ag-header-cell:has(COLUMN_TITLE) {padding-right: 0}
COLUMN_TITLE {display: block; white-space: normal; overflow-wrap: anywhere; font-size: 11px; line-height: 1.2;
letter-spacing: -0.4px}
COLUMN_TITLE:only-child {margin-right: -12px}</style>"""
for _name, _value in {
    "SHARE_TAG": SHARE + VIEW,
    "VIEW": VIEW,
    "START": json.dumps([names.PRETRAIN, names.TRANSFER, names.PREPARE]),
    "WORKFLOW": mlflow_private.WORKFLOW,
    "ASSISTANT": mlflow_private.ASSISTANT,
    "COLUMN_TITLE": mlflow_private.COLUMN_TITLE,
}.items():
    SCRIPT = re.sub(rf"\b{_name}\b", lambda _, value=_value: value, SCRIPT)  # type: ignore[misc]


def serve(host: str = "127.0.0.1", port: int = 5000, tracking_uri: str | None = None) -> None:
    """Serves the UI until it is stopped. Returns at once if it is already running with this database.

    Raises UserError for the address of an MLflow server, which has its own UI, and for a port in use."""
    uri = resolve_tracking_uri(tracking_uri)
    if uri.startswith("http"):
        raise UserError(
            f"{redacted(uri)} is an MLflow server with its own UI: open the address in a browser; "
            "python jobs/compare.py writes the leaderboard"
        )
    here = f"MLflow: http://{host}:{port}  leaderboard: http://{host}:{port}/leaderboard  ({redacted(uri)})"
    if _is_running(host, port, uri):
        print(f"already running. {here}", flush=True)
        return
    mlflow_private.use_settings(uri)
    import uvicorn

    with warnings.catch_warnings():  # MLflow uses a deprecated module of Starlette
        warnings.simplefilter("ignore")
        from mlflow.server.fastapi_app import app

    print(here, flush=True)
    uvicorn.run(with_pages(app, uri), host=host, port=port, log_level="warning")


def _is_running(host: str, port: int, uri: str) -> bool:
    """Whether this UI already serves the database at this address. Raises UserError if something else does."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn does
            probe.bind((host, port))
        return False
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) != errno.EADDRINUSE:
            raise UserError(f"--host {host} --port {port}: cannot listen there ({error})") from error
    shown = (
        "127.0.0.1" if host in ("0.0.0.0", "") else "[::1]" if host == "::" else f"[{host}]" if ":" in host else host
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://{shown}:{port}/", timeout=ANSWER) as answer:
            served = answer.headers.get(DATABASE)
    except (OSError, http.client.HTTPException):
        served = None
    if served == _digest(uri):
        return True
    by = "the UI of another database" if served else "another program"
    raise UserError(f"port {port} is in use by {by}; choose another: python -m pipeline.tracking ui --port {port + 1}")


def _digest(uri: str) -> str:
    """Identifies a database without naming it."""
    return hashlib.sha256(uri.encode()).hexdigest()[:16]


def with_pages(app: App, uri: str) -> App:
    """MLflow's application with the script in its page and with /leaderboard.
    Requests pass MLflow's own checks first."""
    page = functools.partial(_cached_leaderboard, uri, {}, threading.Lock())
    # The first leaderboard imports PyTorch to count FLOPs, which takes seconds, so it is computed in advance.
    threading.Thread(target=page, name="leaderboard", daemon=True).start()

    async def serve_request(scope: Message, receive: Any, send: Any) -> None:
        path = scope.get("path", "").rstrip("/")
        if scope["type"] != "http" or scope.get("method") != "GET" or path not in ("", "/index.html", "/leaderboard"):
            await app(scope, receive, send)
            return
        # Ask for an uncompressed, uncached page, so that it can be changed.
        headers = [
            (name, value)
            for name, value in scope["headers"]
            if name not in (b"accept-encoding", b"if-none-match", b"if-modified-since", b"range")
        ]
        status, sent, body = await _call(app, {**scope, "headers": headers, "path": "/", "raw_path": b"/"}, receive)
        if status == 200 and path == "/leaderboard":
            sent, body = [(b"content-type", b"text/html; charset=utf-8")], await asyncio.to_thread(page)
        elif status == 200:
            body = body.replace(b"<head>", b"<head>" + SCRIPT.encode(), 1)
        kept = [(n, v) for n, v in sent if n.lower() not in (b"content-length", b"etag", b"last-modified")]
        kept += [(b"content-length", str(len(body)).encode()), (b"cache-control", b"no-store")]
        kept += [(DATABASE.encode(), _digest(uri).encode())]
        await send({"type": "http.response.start", "status": status, "headers": kept})
        await send({"type": "http.response.body", "body": body})

    return serve_request


async def _call(app: App, scope: Message, receive: Any) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """(status, headers, body) of the application's response."""
    start: Message = {}
    parts: list[bytes] = []

    async def collect(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await app(scope, receive, collect)
    return start["status"], list(start.get("headers", [])), b"".join(parts)


def _cached_leaderboard(uri: str, kept: dict[str, Any], lock: threading.Lock) -> bytes:
    with lock:
        if time.monotonic() - kept.get("made", -FRESH) >= FRESH:
            try:
                kept["page"] = leaderboard_page(leaderboard(uri=uri), inside="/").encode()
            except UserError as error:
                kept["page"] = text_page("Leaderboard", str(error)).encode()
            kept["made"] = time.monotonic()
        return kept["page"]
