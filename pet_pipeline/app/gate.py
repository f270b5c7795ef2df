"""Limits on what each visitor of the page may ask for, in front of Gradio."""

import asyncio
import ipaddress
import re
import time
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import gradio as gr
from gradio_client.utils import strip_invalid_filename_characters, traverse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send


# The parts of Gradio's interface that the page uses; the others stay closed.
USED_ROUTES = {"queue", "cancel", "reset", "heartbeat", "upload", "startup-events"}

MAX_VISITOR_JOBS = 4
LISTEN_SECONDS = 10.0
MAX_REQUEST_BYTES = 2**16

# These bound the uploads in progress, and also the uploaded files that have not been read.
MAX_UPLOADS = 16
MAX_VISITOR_UPLOADS = 4
MAX_UPLOAD_BYTES = 5 * 2**20
UPLOAD_SECONDS = 60.0


def visitor_address(scope: Scope) -> str:
    """Returns the address of the visitor who sent a request, or the /64 network of an IPv6 address."""
    host = scope["client"][0]
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.version == 6 and not address.ipv4_mapped:
            return str(ipaddress.ip_network((address.packed, 64), strict=False))
    return host


def limit_body(receive: Receive, max_bytes: int, seconds: float) -> Receive:
    """Returns a `receive` that raises `HTTPException` if the body of a request is too long or too slow."""
    num_bytes = 0
    ends_at = time.monotonic() + seconds

    async def limited_receive() -> Message:
        nonlocal num_bytes
        try:
            async with asyncio.timeout(ends_at - time.monotonic()):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"The request took longer than {seconds:.0f} s.") from None
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_bytes:
            raise HTTPException(413, f"The request is larger than {max_bytes} bytes.")
        return message

    return limited_receive


class Gate:
    """ASGI middleware in front of Gradio: it limits what each visitor may ask for.

    A visitor is known by the address of the request, because a visitor can invent any number of sessions.
    Behind a proxy, this is the address that the proxy tells, provided that the environment variable
    `FORWARDED_ALLOW_IPS` names the proxy.
    """

    def __init__(self, app: ASGIApp, page: gr.Blocks, folder: Path) -> None:
        self.app = app  # Gradio
        self.page = page
        self.folder = folder  # where uploaded files wait until they are read
        self.listening: list[str] = []  # sessions with an open stream of messages
        self.uploading: list[str] = []  # addresses with an upload in progress
        self.stored: dict[Path, str] = {}  # uploaded files with their visitors, from the oldest to the newest
        self.tasks: set[asyncio.Task] = set()
        self.push_job, page._queue.push = page._queue.push, self.push

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _, is_api, route = scope.get("path", "").partition("/gradio_api/")
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif is_api and route.split("/")[0] not in USED_ROUTES:
            await PlainTextResponse("This page does not have that.", 404)(scope, receive, send)
        elif route == "upload":
            await self.respond_to_upload(scope, receive, send)
        elif route == "queue/data":
            await self.listen(scope, receive, send)
        elif scope["method"] == "POST":
            await self.app(scope, limit_body(receive, MAX_REQUEST_BYTES, UPLOAD_SECONDS), send)
        else:
            await self.app(scope, receive, send)

    async def push(self, body: Any, request: Request, username: str | None) -> tuple[bool, Any, str]:
        """Stands in for `push` of Gradio's queue: puts a job in the queue, and drops it if nobody listens.

        `HTTPException` is raised if the page has no such job, or the visitor has too many jobs already.
        """
        job = self.page.fns.get(body.fn_index)
        if job is None or job.fn is None or len(body.data) != len(job.inputs):
            raise HTTPException(400, "This page has no such job.")
        # One name that is no valid Unicode would make Gradio's statistics fail after each job of any visitor.
        if not re.fullmatch(r"[a-zA-Z0-9-]{1,64}", body.session_hash):
            raise HTTPException(400, "The name of a session must be 1 to 64 letters, digits and hyphens.")
        traverse(body.data, self.check_file, lambda value: isinstance(value, dict) and "path" in value)
        visitor = visitor_address(request.scope)
        queue = self.page._queue
        jobs = [*(line.queue for line in queue.event_queue_per_concurrency_id.values()), *queue.active_jobs]
        events = [event for job in jobs for event in job or ()]
        queue.event_ids_to_events = {event._id: event for event in events}  # others were cancelled twice
        if sum(visitor_address(event.request.scope) == visitor for event in events) >= MAX_VISITOR_JOBS:
            raise HTTPException(
                429, f"{MAX_VISITOR_JOBS} of your requests are waiting already. Wait until one is finished."
            )
        success, event_id, state = await self.push_job(body, request, username)
        if success:
            task = asyncio.create_task(self.drop_unheard(body.session_hash, event_id))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        return success, event_id, state

    def check_file(self, file: dict) -> None:
        """Raises `HTTPException` if a file in the data of a job is no uploaded file."""
        if not any(file["path"] == str(path) for path in self.stored):
            raise HTTPException(400, "The uploaded file does not exist any more. Upload it again.")

    async def drop_unheard(self, session: str, event_id: str) -> None:
        """Drops the jobs of a session that has not listened to one of them in time."""
        await asyncio.sleep(LISTEN_SECONDS)
        queue = self.page._queue
        undelivered = queue.pending_event_ids_session.get(session, ())
        if event_id in undelivered and session not in self.listening:
            await queue.clean_events(session_hash=session)
            queue.pending_event_ids_session.pop(session, None)
            queue.pending_messages_per_session.pop(session, None)

    async def listen(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a session listen to the messages about its jobs."""
        session = Request(scope).query_params.get("session_hash", "")
        self.listening.append(session)
        try:
            await self.app(scope, receive, send)
        finally:
            self.listening.remove(session)

    async def respond_to_upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers an upload instead of Gradio, which would take any number of files at once."""
        visitor = visitor_address(scope)
        visitor_uploads = self.uploading.count(visitor)
        if visitor_uploads >= MAX_VISITOR_UPLOADS or len(self.uploading) >= MAX_UPLOADS:
            response: Response = PlainTextResponse("Too many files are being uploaded. Try again.", 429)
            return await response(scope, receive, send)
        self.uploading.append(visitor)
        try:
            # The form around the file takes some bytes, too.
            limited = limit_body(receive, MAX_UPLOAD_BYTES + 2**12, UPLOAD_SECONDS)
            response = JSONResponse([await self.store_upload(Request(scope, limited))])
        except HTTPException as error:
            response = PlainTextResponse(error.detail, error.status_code)
        except ClientDisconnect:
            return
        finally:
            self.uploading.remove(visitor)
        await response(scope, receive, send)

    async def store_upload(self, request: Request) -> str:
        """Stores the file of an upload where Gradio looks for it, and returns its path.

        The file is removed when it has not been read for a while, or when many newer ones wait. It has a
        folder of its own, because two visitors may upload the same file, and each of them removes theirs.
        """
        async with request.form(max_files=1, max_fields=0) as form:
            file = form.get("files")
            if not isinstance(file, UploadFile):
                raise HTTPException(400, "The upload has no file.")
            content = await file.read()
        if len(content) > MAX_UPLOAD_BYTES:
            raise HTTPException(413, f"The file is larger than {MAX_UPLOAD_BYTES} bytes.")
        visitor = visitor_address(request.scope)
        own = [path for path, owner in self.stored.items() if owner == visitor]
        if len(own) >= MAX_VISITOR_UPLOADS:
            self.remove_upload(own[0])
        elif len(self.stored) >= MAX_UPLOADS:
            self.remove_upload(next(iter(self.stored)))
        name = strip_invalid_filename_characters(Path(file.filename or "").name).lstrip(".") or "image"
        path = Path(mkdtemp(dir=self.folder), name)
        path.write_bytes(content)
        self.stored[path] = visitor
        asyncio.get_running_loop().call_later(UPLOAD_SECONDS, self.remove_upload, path)
        return str(path)

    def remove_upload(self, path: Path) -> None:
        """Removes an uploaded file, if it has not been read, and its folder."""
        if self.stored.pop(path, None):
            path.unlink(missing_ok=True)
            path.parent.rmdir()
