"""An HTTP/3 client by aioquic: `http3.py CA HOST PORT REQUEST...`, all requests at once on one connection.

A request is JSON: {"method", "path", "headers": {}, "size": bytes of content, "pause": wait for the reply's head before the
content's end, "trailers": {}}. Prints one JSON line for each, in their order: {"status", "headers", "body", "length", "sha256",
"trailers", "reset"}.
"""

import asyncio
import hashlib
import json
import sys

from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import StopSendingReceived, StreamReset


class Reply:
    def __init__(self):
        self.headers = []
        self.body = b""
        self.trailers = {}
        self.reset = None
        self.stopped = None
        self.head = asyncio.Event()
        self.end = asyncio.Event()


class Client(QuicConnectionProtocol):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.http = H3Connection(self._quic)
        self.replies = {}

    def quic_event_received(self, event):
        if isinstance(event, StreamReset) and event.stream_id in self.replies:
            reply = self.replies[event.stream_id]
            reply.reset = event.error_code
            reply.head.set()
            reply.end.set()
        if isinstance(event, StopSendingReceived) and event.stream_id in self.replies:
            self.replies[event.stream_id].stopped = event.error_code
        for event in self.http.handle_event(event):
            reply = self.replies.get(event.stream_id)
            if reply is None:
                continue
            if isinstance(event, HeadersReceived):
                headers = {n.decode(): v.decode() for n, v in event.headers}
                if reply.headers and int(reply.headers[-1][":status"]) >= 200:
                    reply.trailers = headers
                else:
                    reply.headers.append(headers)
                    if int(headers[":status"]) >= 200:
                        reply.head.set()
            elif isinstance(event, DataReceived):
                reply.body += event.data
            if event.stream_ended:
                reply.end.set()

    async def request(self, host, port, request):
        stream = self._quic.get_next_available_stream_id()
        reply = self.replies[stream] = Reply()
        headers = [
            (b":method", request.get("method", "GET").encode()),
            (b":scheme", b"https"),
            (b":authority", f"{host}:{port}".encode()),
            (b":path", request.get("path", "/").encode()),
        ]
        headers += [(n.encode(), v.encode()) for n, v in request.get("headers", {}).items()]
        size = request.get("size")
        self.http.send_headers(stream, headers, end_stream=size is None)
        if size is not None:
            content = bytes(n % 251 for n in range(size))
            trailers = [(n.encode(), v.encode()) for n, v in request.get("trailers", {}).items()]
            self.http.send_data(stream, content, end_stream=not trailers and not request.get("pause"))
            if request.get("pause"):
                self.transmit()
                await reply.head.wait()
                self.http.send_data(stream, b"the rest", end_stream=True)
            elif trailers:
                self.http.send_headers(stream, trailers, end_stream=True)
        self.transmit()
        await asyncio.wait_for(reply.end.wait(), 30)
        return {
            "status": int(reply.headers[-1][":status"]) if reply.headers else 0,
            "interim": [int(h[":status"]) for h in reply.headers[:-1]],
            "headers": reply.headers[-1] if reply.headers else {},
            "body": reply.body[:4096].decode("latin-1"),
            "length": len(reply.body),
            "sha256": hashlib.sha256(reply.body).hexdigest(),
            "trailers": reply.trailers,
            "reset": reply.reset,
            "stopped": reply.stopped,
        }


async def main(ca, host, port, requests):
    configuration = QuicConfiguration(is_client=True, alpn_protocols=H3_ALPN, server_name=host)
    configuration.load_verify_locations(ca)
    async with connect("127.0.0.1", port, configuration=configuration, create_protocol=Client) as client:
        replies = await asyncio.gather(*[client.request(host, port, r) for r in requests])
        for reply in replies:
            print(json.dumps(reply))


asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), [json.loads(r) for r in sys.argv[4:]]))
