"""Live pages: Server-Sent Events that say "something changed"; the page then asks for its rows again.

One stream a browser (static/stream-worker.js shares it between tabs: HTTP/1.1 gives a browser six connections to a
host). It carries no data of any study, so what it shows is decided where the rows are read. It ends with the sign-in.
"""

import asyncio
from collections.abc import AsyncIterator

from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse

from reading_queue.auth import SESSION_COOKIE, Person, person_of, require
from storage.vocabulary import COUNTY_ROLES

router = APIRouter()
_KEEP_ALIVE_S = 15.0  # below the idle limits of proxies; also how soon an ended sign-in is noticed
_GATHER_S = 0.25  # a study's arrival is many events: tell once


@router.get("/stream")
async def stream(request: Request, person: Person = Depends(require())) -> StreamingResponse:
    """`event: changed` whenever a study, case or report changed (county: of the own hospital)."""
    prefix = f"{person.site_id} " if person.role in COUNTY_ROLES else ""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(request, prefix), headers=headers, media_type="text/event-stream")


async def _events(request: Request, prefix: str) -> AsyncIterator[str]:
    state = request.app.state
    token = request.cookies.get(SESSION_COOKIE)
    async with state.hub.waiter(prefix) as changed:
        yield "retry: 2000\nevent: ready\ndata: \n\n"
        clock = asyncio.get_running_loop().time
        check_at = clock() + _KEEP_ALIVE_S
        while not await request.is_disconnected():
            try:
                await asyncio.wait_for(changed.wait(), max(0.0, check_at - clock()))
                await asyncio.sleep(_GATHER_S)
                changed.clear()
                answer = "event: changed\ndata: \n\n"
            except TimeoutError:
                answer = ": keep-alive\n\n"
            if clock() >= check_at:  # by the clock: on a busy day there is always news
                if await asyncio.to_thread(person_of, state.database, token) is None:
                    yield "event: signed-out\ndata: \n\n"
                    return
                check_at = clock() + _KEEP_ALIVE_S
            yield answer
