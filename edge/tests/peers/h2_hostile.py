"""A client that keeps to no rule of HTTP/2: h2_hostile.py CA PORT CASE

Says what came back, a line each: `headers STREAM STATUS`, `data STREAM LENGTH`, `end STREAM`, `reset STREAM CODE`,
`goaway CODE`, `closed`, and `blocked` where the other side reads no more.
"""

import socket
import ssl
import struct
import sys
import time

from hpack import Decoder, Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
)

HOST = "shop.tern.test"
PATIENCE = 60
CODES = [
    "NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT", "STREAM_CLOSED",
    "FRAME_SIZE_ERROR", "REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM",
]


def request(*more, method="POST", path="/", authority=HOST, scheme="https"):
    pseudo = [(":method", method), (":scheme", scheme), (":authority", authority), (":path", path)]
    return [(n, v) for n, v in pseudo if v is not None] + [("x-nonce", "bad")] + list(more)


class Peer:
    def __init__(self, ca, port, settings=None):
        context = ssl.create_default_context(cafile=ca)
        context.set_alpn_protocols(["h2"])
        plain = socket.create_connection(("127.0.0.1", port))
        self.socket = context.wrap_socket(plain, server_hostname=HOST)
        self.socket.settimeout(PATIENCE)
        self.encoder, self.decoder = Encoder(), Decoder()
        self.input = b""
        self.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", SettingsFrame(0, settings=settings or {}))

    def send(self, *frames):
        self.socket.sendall(b"".join(f if isinstance(f, bytes) else f.serialize() for f in frames))

    def headers(self, fields, stream=1, end=True):
        flags = ["END_HEADERS"] + (["END_STREAM"] if end else [])
        # Literal, never indexed or in Huffman's code: what is said is what is sent.
        return HeadersFrame(stream, data=self.encoder.encode(fields, huffman=False), flags=flags)

    def receive(self, n):
        while len(self.input) < n:
            try:
                more = self.socket.recv(65536)
            except (ConnectionError, ssl.SSLError):
                more = b""
            if not more:
                return None
            self.input += more
        taken, self.input = self.input[:n], self.input[n:]
        return taken

    def frame(self):
        header = self.receive(9)
        if header is None:
            return None
        frame, length = Frame.parse_frame_header(memoryview(header))
        body = self.receive(length)
        if body is None:
            return None
        frame.parse_body(memoryview(body))
        return frame

    def report(self, frame):
        """Whether its stream goes on."""
        if isinstance(frame, HeadersFrame):
            fields = dict(self.decoder.decode(frame.data))
            print("headers", frame.stream_id, fields.get(":status", "trailers"))
        elif isinstance(frame, DataFrame):
            print("data", frame.stream_id, len(frame.data))
        elif isinstance(frame, RstStreamFrame):
            print("reset", frame.stream_id, CODES[frame.error_code])
            return False
        elif isinstance(frame, GoAwayFrame):
            print("goaway", CODES[frame.error_code])
        if "END_STREAM" in frame.flags:
            print("end", frame.stream_id)
            return False
        return True

    def until_over(self, streams=1):
        """Reads until so many streams have ended, or the connection has."""
        while streams:
            frame = self.frame()
            if frame is None:
                print("closed")
                return
            if not self.report(frame):
                streams -= 1

    def flood(self, bytes, times):
        """Sends without reading, for as long as somebody takes it."""
        self.socket.settimeout(2)
        try:
            for _ in range(times):
                self.socket.sendall(bytes)
        except (TimeoutError, socket.timeout):
            print("blocked")
        except (ConnectionError, ssl.SSLError):
            print("closed")
        else:
            print("taken")


def data(text, stream=1, end=True):
    return DataFrame(stream, data=text, flags=["END_STREAM"] if end else [])


# Requests: fields, and the DATA frames after them.
REQUESTS = {
    "length-short": (request(("content-length", "10")), [b"hello"]),
    "length-long": (request(("content-length", "2")), [b"hello"]),
    "length-long-later": (request(("content-length", "5")), [b"hello", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"]),
    "length-of-none": (request(("content-length", "5")), []),
    "length-plus": (request(("content-length", "+5")), [b"hello"]),
    "length-list": (request(("content-length", "5, 5")), [b"hello"]),
    "length-twice": (request(("content-length", "5"), ("content-length", "6")), [b"hello"]),
    "length-huge": (request(("content-length", "18446744073709551621")), [b"hello"]),
    "connection": (request(("connection", "keep-alive")), []),
    "transfer-encoding": (request(("transfer-encoding", "chunked")), [b"0\r\n\r\n"]),
    "upgrade": (request(("upgrade", "h2c")), []),
    "keep-alive": (request(("keep-alive", "5")), []),
    "proxy-connection": (request(("proxy-connection", "close")), []),
    "te": (request(("te", "gzip")), []),
    "uppercase": (request(("X-Upper", "1")), []),
    "name-space": (request(("x y", "1")), []),
    "name-colon": (request(("x:y", "1")), []),
    "name-crlf": (request(("x\r\ny", "1")), []),
    "name-empty": (request(("", "1")), []),
    "value-crlf": (request(("x-a", "1\r\nX-Injected: 2")), []),
    "value-lf": (request(("x-a", "1\nX-Injected: 2")), []),
    "value-cr": (request(("x-a", "1\r2")), []),
    "value-nul": (request(("x-a", "1\x002")), []),
    "cookie-crlf": (request(("cookie", "a=1"), ("cookie", "b\r\nX-Injected: 2")), []),
    "path-space": (request(path="/ HTTP/1.1"), []),
    "path-crlf": (request(path="/ HTTP/1.1\r\nX-Injected: 2"), []),
    "path-tab": (request(path="/\tb"), []),
    "path-del": (request(path="/\x7f"), []),
    "path-nul": (request(path="/\x00"), []),
    "path-empty": (request(path=""), []),
    "path-none": (request(path=None), []),
    "path-relative": (request(path="b"), []),
    "path-star": (request(path="*b"), []),
    "path-star-get": (request(path="*", method="GET"), []),
    "path-absolute": (request(path="http://other.example/"), []),
    "path-double": (request(path="//other.example/"), []),
    "method-space": (request(method="GET / HTTP/1.1\r\nHost: x\r\n\r\nPOST"), []),
    "method-empty": (request(method=""), []),
    "method-none": (request(method=None), []),
    "scheme-none": (request(scheme=None), []),
    "scheme-bad": (request(scheme="https://other.example/?"), []),
    "authority-space": (request(authority="shop.tern.test x"), []),
    "authority-crlf": (request(authority="shop.tern.test\r\nX-Injected: 2"), []),
    "authority-user": (request(authority="user@shop.tern.test"), []),
    "authority-path": (request(authority="shop.tern.test/b"), []),
    "authority-none": (request(authority=None), []),
    "host-other": (request(("host", "other.example")), []),
    "host-twice": (request(("host", HOST), ("host", HOST)), []),
    "pseudo-late": (request()[:-1][:3] + [("x-nonce", "bad"), (":path", "/")], []),
    "pseudo-twice": (request()[:4] + [(":path", "/b"), ("x-nonce", "bad")], []),
    "pseudo-unknown": (request()[:4] + [(":foo", "b"), ("x-nonce", "bad")], []),
    "pseudo-status": (request()[:4] + [(":status", "200"), ("x-nonce", "bad")], []),
    "connect": ([(":method", "CONNECT"), (":authority", HOST + ":443")], []),
    "protocol-get": (request()[:4] + [(":protocol", "websocket"), ("x-nonce", "bad")], []),
    "protocol-crlf": ([(":method", "CONNECT"), (":protocol", "a\r\nX-Injected: 2")] + request()[1:], []),
    "protocol-smuggles": ([(":method", "CONNECT"), (":protocol", "a\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n")] + request()[1:], []),
    "protocol-h2c": ([(":method", "CONNECT"), (":protocol", "h2c")] + request()[1:], []),
}


def one_request(peer, fields, contents):
    frames = [peer.headers(fields, end=not contents)]
    frames += [data(c, end=n + 1 == len(contents)) for n, c in enumerate(contents)]
    peer.send(*frames)
    peer.until_over()


def trailers_pseudo(peer):
    peer.send(peer.headers(request(), end=False), data(b"hello", end=False), peer.headers([(":path", "/b")]))
    peer.until_over()


def trailers_framing(peer):
    """Trailers that would frame or route, were they headers; they are left out."""
    late = [("content-length", "3"), ("x-forwarded-for", "1.2.3.4"), ("host", "other.example"), ("x-late", "1")]
    peer.send(peer.headers(request(), end=False), data(b"hello", end=False), peer.headers(late))
    peer.until_over()


def trailers_crlf(peer):
    peer.send(peer.headers(request(), end=False), data(b"hello", end=False), peer.headers([("x-a", "1\r\nX-Injected: 2")]))
    peer.until_over()


def data_after_end(peer):
    peer.send(peer.headers(request(), end=False), data(b"hello"), data(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
    peer.until_over(2)


def data_before_headers(peer):
    peer.send(data(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
    peer.until_over()


def even_stream(peer):
    peer.send(peer.headers(request(), stream=2))
    peer.until_over()


def padding_too_long(peer):
    peer.send(peer.headers(request(), end=False), struct.pack(">BHBBL", 0, 5, 0, 9, 1) + b"\x09pads")
    peer.until_over()


def settings_on_stream(peer):
    peer.send(struct.pack(">BHBBL", 0, 0, 4, 0, 1))
    peer.until_over()


def window_overflow(peer):
    peer.send(peer.headers(request(method="GET", path="/big")), struct.pack(">BHBBLL", 0, 4, 8, 0, 1, 2**31 - 1))
    peer.until_over()


def push(peer):
    peer.send(struct.pack(">BHBBLL", 0, 4, 5, 4, 1, 2))
    peer.until_over()


def bad_hpack(peer):
    peer.send(HeadersFrame(1, data=b"\xff\xff\xff\xff\xff\xff", flags=["END_HEADERS", "END_STREAM"]))
    peer.until_over()


def hpack_bomb(peer):
    """A field of 4 KB in the table, and thousands of references of a byte each to it."""
    first = peer.encoder.encode(request(("x-bomb", "x" * 3900)), huffman=False)
    peer.send(HeadersFrame(1, data=first + b"\xbe" * 12000, flags=["END_HEADERS", "END_STREAM"]))
    peer.until_over()


def rapid_reset(peer):
    frames = []
    for n in range(2000):
        stream = 2 * n + 1
        frames += [peer.headers(request(), stream=stream), RstStreamFrame(stream, error_code=8)]
    try:
        peer.send(*frames)
    except (ConnectionError, ssl.SSLError):
        pass
    while (frame := peer.frame()) is not None:
        if isinstance(frame, GoAwayFrame):
            peer.report(frame)
    print("closed")


def continuation_flood(peer):
    field = Encoder().encode([("x-a", "x" * 8000)], huffman=False)
    try:
        peer.send(HeadersFrame(1, data=peer.encoder.encode(request(), huffman=False), flags=["END_STREAM"]))
        for _ in range(10_000):
            peer.send(ContinuationFrame(1, data=field))
    except (ConnectionError, ssl.SSLError):
        pass
    peer.until_over()


def continuation_empty_flood(peer):
    try:
        peer.send(HeadersFrame(1, data=peer.encoder.encode(request(), huffman=False), flags=["END_STREAM"]))
        for _ in range(2_000):
            peer.send(ContinuationFrame(1, data=b"").serialize() * 100)
    except (ConnectionError, ssl.SSLError):
        pass
    peer.until_over()


def ping_flood(peer):
    peer.flood(PingFrame(0, opaque_data=b"12345678").serialize() * 1000, 4000)


def settings_flood(peer):
    peer.flood(SettingsFrame(0, settings={3: 100}).serialize() * 1000, 4000)


def empty_data_flood(peer):
    peer.send(peer.headers(request(), end=False))
    peer.flood(data(b"", end=False).serialize() * 1000, 1000)


CASES = {
    f.__name__.replace("_", "-"): f
    for f in [
        trailers_pseudo, trailers_framing, trailers_crlf, data_after_end, data_before_headers, even_stream,
        padding_too_long, settings_on_stream, window_overflow, push, bad_hpack, hpack_bomb, rapid_reset,
        continuation_flood, continuation_empty_flood, ping_flood, settings_flood, empty_data_flood,
    ]
}


def window_zero(ca, port):
    """A reader that opens no window: its answer does not come, and it does not wait for ever."""
    peer = Peer(ca, port, {4: 0})
    peer.send(peer.headers(request(method="GET", path="/big")))
    peer.until_over()


def long_path(ca, port):
    """Beyond what some parsers take, within what a head may be."""
    peer = Peer(ca, port)
    fields = request(method="GET", path="/" + "a" * 100_000)
    block = peer.encoder.encode(fields, huffman=False)
    parts = [block[at:at + 16_000] for at in range(0, len(block), 16_000)]
    peer.send(HeadersFrame(1, data=parts[0], flags=["END_STREAM"]))
    for n, part in enumerate(parts[1:], 2):
        peer.send(ContinuationFrame(1, data=part, flags=["END_HEADERS"] if n == len(parts) else []))
    peer.until_over()


def main():
    ca, port, case = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if case == "window-zero":
        return window_zero(ca, port)
    if case == "long-path":
        return long_path(ca, port)
    peer = Peer(ca, port)
    if case in REQUESTS:
        one_request(peer, *REQUESTS[case])
    else:
        CASES[case](peer)


main()
