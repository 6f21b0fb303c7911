"""HTTP as bytes: what no client library would send. Raw HTTP/1.1 and HTTP/2 (prior knowledge)
clients, and a provider that keeps every field it was sent."""

import socket
import ssl
import struct
import subprocess
import threading
import time
from dataclasses import dataclass, field

import hpack
from h2 import config, events
from h2.connection import H2Connection


class Closed(Exception):
    """The other side closed or reset the connection."""


@dataclass
class Answer:
    status: int
    headers: list
    body: bytes
    whole: bool = True

    def header(self, name):
        return next((value for key, value in self.headers if key == name), None)


class Connection:
    """A socket with a buffer; every wait has an end."""

    def __init__(self, port, timeout=20):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.timeout, self.buffer = timeout, b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def send(self, data):
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            # An answer may have come before: reading tells.
            pass

    def more(self):
        """Reads something; raises Closed at the end, TimeoutError when nothing comes."""
        self.socket.settimeout(self.timeout)
        try:
            data = self.socket.recv(65536)
        except ConnectionResetError as error:
            raise Closed("reset") from error
        if not data:
            raise Closed("end")
        self.buffer += data

    def take(self, n):
        while len(self.buffer) < n:
            self.more()
        data, self.buffer = self.buffer[:n], self.buffer[n:]
        return data

    def until(self, mark):
        while mark not in self.buffer:
            self.more()
        data, _, self.buffer = self.buffer.partition(mark)
        return data

    def drain(self):
        """Everything until the other side closes."""
        try:
            while True:
                self.more()
        except Closed:
            data, self.buffer = self.buffer, b""
            return data

    def reset(self):
        """Closes with RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self):
        self.socket.close()


class Http1(Connection):
    def head(self):
        """Status and headers of the next answer; interim ones are skipped."""
        while True:
            lines = self.until(b"\r\n\r\n").split(b"\r\n")
            status = int(lines[0].split(b" ", 2)[1])
            headers = [(k.decode().lower(), v.strip().decode("latin-1")) for k, _, v in (line.partition(b":") for line in lines[1:])]
            if status != 100:
                return status, headers

    def answer(self):
        """The next answer, body included."""
        status, headers = self.head()
        named = dict(headers)
        try:
            if status in (204, 304):
                body = b""
            elif named.get("transfer-encoding") == "chunked":
                body = b"".join(iter(self.chunk, b""))
            elif "content-length" in named:
                body = self.take(int(named["content-length"]))
            else:
                body = self.drain()
        except Closed:
            return Answer(status, headers, self.buffer, False)
        return Answer(status, headers, body)

    def chunk(self):
        size = int(self.until(b"\r\n").split(b";")[0], 16)
        data = self.take(size)
        if size == 0:
            while self.until(b"\r\n"):
                pass
            return b""
        self.take(2)
        return data


def request(method="POST", path="/v1/chat/completions", headers=(), body=b"", length=True, host="keyward"):
    """The bytes of an HTTP/1.1 request."""
    lines = [f"{method} {path} HTTP/1.1".encode("latin-1"), b"host: " + host.encode()]
    lines += [b"%b: %b" % tuple(part if isinstance(part, bytes) else part.encode("latin-1") for part in pair) for pair in headers]
    if length:
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def chunked(body, size=7, extension=b"", trailers=b""):
    """A body in chunks."""
    pieces = [body[i:i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x%b\r\n%b\r\n" % (len(p), extension, p) for p in pieces) + b"0\r\n" + trailers + b"\r\n"


DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS, PADDED = 1, 4, 8


@dataclass
class Stream:
    headers: list = None
    body: bytes = b""
    ended: bool = False
    reset: int = None
    trailers: list = field(default_factory=list)

    @property
    def status(self):
        return int(dict(self.headers)[":status"]) if self.headers else None

    @property
    def over(self):
        return self.ended or self.reset is not None


class Http2(Connection):
    """Sends exactly the frames it is told to."""

    def __init__(self, port, timeout=20):
        super().__init__(port, timeout)
        self.encoder, self.decoder = hpack.Encoder(), hpack.Decoder()
        self.streams, self.next, self.goaway, self.closed = {}, 1, None, False
        self.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        # A large window: answers here are small.
        self.frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 1 << 24))
        self.frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1 << 24))

    def frame(self, kind, flags, stream, payload=b""):
        self.send(len(payload).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + payload)

    def headers(self, headers, end=False, stream=None, flags=END_HEADERS):
        """Sends HEADERS, on a new stream unless one is given; returns the stream."""
        if stream is None:
            stream, self.next = self.next, self.next + 2
            self.streams[stream] = Stream()
        pairs = [tuple(part if isinstance(part, bytes) else part.encode("latin-1") for part in pair) for pair in headers]
        block = self.encoder.encode(pairs, huffman=False)
        first, rest = block[:16384], block[16384:]
        self.frame(HEADERS, (flags if not rest else flags & ~END_HEADERS) | (END_STREAM if end else 0), stream, first)
        while rest:
            piece, rest = rest[:16384], rest[16384:]
            self.frame(CONTINUATION, 0 if rest else END_HEADERS, stream, piece)
        return stream

    def data(self, stream, body=b"", end=False, pad=None):
        if pad is None:
            self.frame(DATA, END_STREAM if end else 0, stream, body)
        else:
            self.frame(DATA, PADDED | (END_STREAM if end else 0), stream, bytes([pad]) + body + bytes(pad))

    def cancel(self, stream, code=8):
        self.frame(RST_STREAM, 0, stream, struct.pack(">I", code))

    def read_frame(self):
        head = self.take(9)
        length, kind, flags, stream = int.from_bytes(head[:3], "big"), head[3], head[4], struct.unpack(">I", head[5:])[0]
        payload = self.take(length)
        if kind == SETTINGS and not flags & 1:
            self.frame(SETTINGS, 1, 0)
        elif kind == PING and not flags & 1:
            self.frame(PING, 1, 0, payload)
        elif kind == GOAWAY:
            self.goaway = struct.unpack(">I", payload[4:8])[0]
        elif kind == HEADERS:
            while not flags & END_HEADERS:
                more = self.take(9)
                flags |= more[4] & END_HEADERS
                payload += self.take(int.from_bytes(more[:3], "big"))
            fields = [(n if isinstance(n, str) else n.decode(), v if isinstance(v, str) else v.decode("latin-1"))
                      for n, v in self.decoder.decode(payload, raw=True)]
            known = self.streams.setdefault(stream, Stream())
            if known.headers is None or dict(known.headers).get(":status", "").startswith("1"):
                known.headers = fields
            else:
                known.trailers = fields
            known.ended |= bool(head[4] & END_STREAM)
        elif kind == DATA:
            known = self.streams.setdefault(stream, Stream())
            known.body += payload
            known.ended |= bool(flags & END_STREAM)
        elif kind == RST_STREAM:
            self.streams.setdefault(stream, Stream()).reset = struct.unpack(">I", payload)[0]

    def wait(self, *streams):
        """Reads until these streams are over; a closed connection ends them all. Gives the streams."""
        end = time.monotonic() + self.timeout
        try:
            while not all(self.streams[s].over for s in streams):
                if time.monotonic() > end:
                    raise TimeoutError(f"streams {[s for s in streams if not self.streams[s].over]} did not end")
                self.read_frame()
        except Closed:
            self.closed = True
        found = [self.streams[s] for s in streams]
        return found[0] if len(found) == 1 else found

    def until_headers(self, stream):
        while self.streams[stream].headers is None and not self.streams[stream].over:
            self.read_frame()
        return self.streams[stream]

    def sync(self):
        """A PING and its answer: everything sent before has been read."""
        self.frame(PING, 0, 0, b"keyward!")
        while True:
            while len(self.buffer) < 9:
                self.more()
            is_answer = self.buffer[3] == PING and self.buffer[4] & 1
            self.read_frame()
            if is_answer:
                return


class Http2Provider:
    """An https provider that speaks HTTP/2 and keeps every field it was sent, trailers included."""

    def __init__(self, directory, host):
        self.certificate, key = directory / "provider.pem", directory / "provider.key"
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=provider",
                        "-addext", f"subjectAltName=DNS:{host}", "-keyout", str(key), "-out", str(self.certificate)], check=True, capture_output=True)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(self.certificate, key)
        self.context.set_alpn_protocols(["h2"])
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port, self.requests = self.listener.getsockname()[1], []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection):
        answer = b'{"id":"chatcmpl-1","object":"chat.completion","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}'
        seen = {}
        try:
            connection = self.context.wrap_socket(connection, server_side=True)
            http = H2Connection(config.H2Configuration(client_side=False, validate_inbound_headers=False, header_encoding="latin-1"))
            http.initiate_connection()
            connection.sendall(http.data_to_send())
            while data := connection.recv(65536):
                for event in http.receive_data(data):
                    if isinstance(event, events.RequestReceived):
                        seen[event.stream_id] = {"headers": list(event.headers), "trailers": [], "body": b""}
                    elif isinstance(event, events.DataReceived):
                        seen[event.stream_id]["body"] += event.data
                        http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    elif isinstance(event, events.TrailersReceived):
                        seen[event.stream_id]["trailers"] = list(event.headers)
                    elif isinstance(event, events.StreamEnded):
                        self.requests.append(seen[event.stream_id])
                        http.send_headers(event.stream_id, [(":status", "200"), ("content-type", "application/json")])
                        http.send_data(event.stream_id, answer, end_stream=True)
                connection.sendall(http.data_to_send())
        except OSError:
            pass

    def close(self):
        self.listener.close()
