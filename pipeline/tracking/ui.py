"""MLflow's UI on this machine with prepared views: `python -m pipeline.tracking ui`, or `make ui`.

The server is MLflow's own, with additions. Its address opens the pre-training runs. An experiment opens with the
columns and charts of its prepared view (`pipeline.tracking.views`), in the mode for model training instead of language
models; other choices of the user are kept. /leaderboard compares all transferred models on one page.
"""

import asyncio
import functools
import json
import logging
import re
import threading
import time
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
FRESH = 10.0  # seconds for which a leaderboard is cached

# MLflow keeps columns and charts in the browser, and opens the shared view of an experiment if the address asks for it.
# The address without a page opens the first of our experiments that has runs. The toolbar of a chart covers its data,
# so it is shown only under the pointer.
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
})();</script>
<style>.js-plotly-plot .modebar {opacity: 0 !important} .js-plotly-plot:hover .modebar {opacity: 1 !important}</style>"""
for _name, _value in {
    "SHARE_TAG": SHARE + VIEW,
    "VIEW": VIEW,
    "START": json.dumps([names.PRETRAIN, names.TRANSFER, names.PREPARE]),
    "WORKFLOW": mlflow_private.WORKFLOW,
    "ASSISTANT": mlflow_private.ASSISTANT,
}.items():
    SCRIPT = re.sub(rf"\b{_name}\b", lambda _, value=_value: value, SCRIPT)  # type: ignore[misc]


def serve(host: str = "127.0.0.1", port: int = 5000, tracking_uri: str | None = None) -> None:
    """Serves the UI until it is stopped. Raises UserError for the address of an MLflow server, which has its own UI."""
    uri = resolve_tracking_uri(tracking_uri)
    if uri.startswith("http"):
        raise UserError(f"{redacted(uri)} is an MLflow server with its own UI: open the address in a browser")
    mlflow_private.use_settings(uri)
    import uvicorn
    from mlflow.server.fastapi_app import app

    print(f"MLflow: http://{host}:{port}  leaderboard: http://{host}:{port}/leaderboard  ({redacted(uri)})", flush=True)
    uvicorn.run(with_pages(app, uri), host=host, port=port, log_level="warning")


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
