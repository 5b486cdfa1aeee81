"""Photos before the model: fetched if that is allowed, decoded in a sandbox, and shrunk to the model's input size."""

import asyncio
import base64
import binascii
import ipaddress
import json
import logging
import os
import re
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import aiohttp
import numpy as np
from aiohttp.abc import AbstractResolver, ResolveResult
from ray import serve

import addressvlm
from addressvlm import InputError
from addressvlm.image_decode_worker import MAX_SIDE, DecodedImage
from serve.errors import LOGGING_CONFIG, ApiError, overloaded, return_user_errors
from serve.metrics import MetricsReplica, ServiceMetrics
from serve.settings import ServiceSettings

MAX_REDIRECTS = 3
DEFAULT_PORTS = {"http": 80, "https": 443}
WORKER_COMMAND = (sys.executable, "-m", "addressvlm.image_decode_worker")
WALL_TIME_FACTOR = 6  # a photo may wait for a process, and then take, this many times its CPU seconds
_DATA_URL = re.compile(r"data:[^,;]*(?:;[^,;]*)*?;base64,", re.IGNORECASE)
_WEB_ADDRESS = re.compile(r"\s*(?:[a-z][a-z0-9+.-]*://|file:)", re.IGNORECASE)
logger = logging.getLogger("ray.serve")


class Images:
    """Encoded photo in, pixels out."""

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings, self.metrics = settings, ServiceMetrics()
        self.decode_pool = DecodePool(settings.image_processes, settings.decode_s, settings.max_megapixels)
        self.fetcher = ImageFetcher(settings.image_domains, settings.private_addresses, settings.max_body_mb, settings.fetch_s)

    async def read(self, source: bytes | str, side: int = MAX_SIDE) -> np.ndarray:
        """Pixels of a photo given as bytes, base64, a data URL or a web address, uint8 (height, width, 3).

        The photo is shrunk for a model with inputs of `side` pixels, see `addressvlm.image_decode_worker.decode_image`.

        Raises:
            InputError: it is no photo that can be used.
            ApiError: 400 its web address is not allowed or returns no image; 503 overloaded.
        """
        if isinstance(source, bytes):
            data = source
        elif not _WEB_ADDRESS.match(source[:64]):
            data = decode_base64(source)
        elif self.settings.image_domains:
            data = await self.fetcher.fetch(source.strip())
        else:
            raise InputError(
                "Images are not fetched from web addresses: send the image itself as a data URL (data:image/jpeg;base64,…)."
            )
        with self.metrics.time("addressvlm_decode_seconds"):
            image = await self.decode_pool.decode(data, side)
        return np.frombuffer(image.rgb, np.uint8).reshape(image.height, image.width, 3)


@serve.deployment(name="Images", logging_config=LOGGING_CONFIG)
class ImagesDeployment(Images, MetricsReplica):
    """`Images` as a deployment."""

    read = return_user_errors(Images.read)

    def __del__(self) -> None:
        self.decode_pool.kill()


def decode_base64(text: str) -> bytes:
    """The bytes of an image given as base64 or as a data URL. InputError: it is neither."""
    header = _DATA_URL.match(text[:256])
    if header is None and text[:5].lower() == "data:":
        raise InputError("The data URL is not base64: write it as data:image/jpeg;base64,….")
    try:
        return base64.b64decode(re.sub(r"\s+", "", text[header.end() if header else 0 :]), validate=True)
    except (binascii.Error, ValueError):
        raise InputError("The image is not valid base64: encode the file's bytes, with the padding.") from None


class DecodePool:
    """Processes that decode photos; one that uses too much time or memory is ended.

    Args:
        processes: at most this many, started on demand.
        cpu_s: CPU seconds for one photo.
        command: the worker, see `addressvlm.image_decode_worker`.
    """

    def __init__(self, processes: int, cpu_s: int, max_megapixels: float, command: Sequence[str] = WORKER_COMMAND) -> None:
        self.cpu_s, self.max_megapixels, self.command = cpu_s, max_megapixels, command
        self.slots = asyncio.Semaphore(processes)
        self.idle: list[Process] = []

    async def decode(self, data: bytes, side: int) -> DecodedImage:
        """The pixels of an encoded photo, see `addressvlm.image_decode_worker.decode_image`.

        Raises:
            InputError: it is no photo that can be used, or decoding takes too long.
            ApiError: 503 no process is free in time, or none can be started.
        """
        try:
            async with asyncio.timeout(WALL_TIME_FACTOR * self.cpu_s):
                await self.slots.acquire()
        except TimeoutError:
            raise overloaded() from None
        try:
            async with asyncio.timeout(WALL_TIME_FACTOR * self.cpu_s):
                return await self._decode(data, side)
        except asyncio.IncompleteReadError:  # the kernel ended the process: its CPU time or memory was used up
            raise InputError("The image takes too long to decode: send it smaller, or as a plain JPEG.") from None
        except OSError as error:  # also TimeoutError: the machine gave the process too little time
            logger.error("a decoding process can't be used: %r", error)
            raise overloaded() from None
        finally:
            self.slots.release()

    async def _decode(self, data: bytes, side: int) -> DecodedImage:
        self.idle = [process for process in self.idle if process.returncode is None]
        process = self.idle.pop() if self.idle else await self._start()
        request = {"bytes": len(data), "max_megapixels": self.max_megapixels, "side": side, "cpu_s": self.cpu_s}
        try:
            if process.stdin is None or process.stdout is None:
                raise OSError("the process has no pipes")
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.write(data)
            await process.stdin.drain()
            response = json.loads(await process.stdout.readuntil(b"\n"))
            refused, width, height = (response.get(key, 0) for key in ("refused", "width", "height"))
            rgb = await process.stdout.readexactly(3 * width * height)
        except BaseException:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        self.idle.append(process)
        if refused:
            raise InputError(refused)
        return DecodedImage(width, height, rgb)

    async def _start(self) -> Process:
        package = str(Path(addressvlm.__file__).parents[1])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        environment = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": path}  # no keys or other secrets
        return await asyncio.create_subprocess_exec(*self.command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment)

    def kill(self) -> None:
        """End the idle processes."""
        for process in self.idle:
            with suppress(ProcessLookupError):
                process.kill()

    async def close(self) -> None:
        """End the idle processes and wait for that."""
        self.kill()
        while self.idle:
            await self.idle.pop().wait()


class ImageFetcher:
    """Fetches images from allowed hosts.

    Args:
        domains: hosts, or `.example.org` for all below it; each with `:port` if it is not the scheme's default.
        private: whether they may have addresses in private networks.
        max_mb, timeout_s: limits for one image, redirects included.
    """

    def __init__(self, domains: Sequence[str], private: bool, max_mb: float, timeout_s: float) -> None:
        self.domains = [domain.lower() for domain in domains]
        self.private, self.max_mb, self.timeout_s = private, max_mb, timeout_s

    async def fetch(self, url: str) -> bytes:
        """The body at a URL. ApiError: 400 it is not allowed, or its server answers with an error, too much or too late."""
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._follow_redirects(url)
        except TimeoutError:
            raise _not_fetched(f"The image's server took more than {self.timeout_s:g} s: send the image itself.") from None
        except (aiohttp.ClientError, OSError, UnicodeError, ValueError) as error:
            if any(isinstance(e, PrivateAddressError) for e in (error, error.__cause__, error.__context__)):
                raise _not_fetched("The image's address is in a private network: send the image itself.") from None
            raise _not_fetched(f"The image could not be fetched ({type(error).__name__}): send the image itself.") from None

    async def _follow_redirects(self, url: str) -> bytes:
        connector = aiohttp.TCPConnector(resolver=CheckedResolver(self.private), use_dns_cache=False, force_close=True)
        async with aiohttp.ClientSession(
            connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False
        ) as session:
            for _ in range(MAX_REDIRECTS + 1):
                self.check_url(url)
                headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "addressvlm"}
                async with session.get(url, headers=headers, allow_redirects=False) as response:
                    if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
                        url = urljoin(url, response.headers["Location"])
                        continue
                    if response.status != 200:
                        raise _not_fetched(f"The image's server answered {response.status}: check the address.")
                    return await self._read_body(response)
        raise _not_fetched(f"The image's address redirects more than {MAX_REDIRECTS} times: give the last one.")

    async def _read_body(self, response: aiohttp.ClientResponse) -> bytes:
        limit = int(self.max_mb * 1e6)
        body = bytearray()
        async for chunk in response.content.iter_chunked(1 << 16):
            body += chunk
            if len(body) > limit:
                raise _not_fetched(f"The image is larger than {self.max_mb:g} MB: send a smaller one.")
        return bytes(body)

    def check_url(self, url: str) -> None:
        """Check scheme, host and port against the allowed domains. ApiError: 400 not allowed."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise _not_fetched("The image's address can't be read: write it as https://host/path.") from None
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
            raise _not_fetched("Images are fetched by http and https only: send the image itself as a data URL.")
        if parts.username is not None or parts.password is not None:
            raise _not_fetched("The image's address holds a user name or password: leave them out.")
        host, default = parts.hostname, DEFAULT_PORTS[parts.scheme]
        for domain in self.domains:
            name, _, allowed_port = domain.partition(":")
            same = host.endswith(name) and host != name if name.startswith(".") else host == name
            if same and (port or default) == int(allowed_port or default):
                return
        raise _not_fetched("Images are not fetched from this host: send the image itself as a data URL.")


class PrivateAddressError(OSError):
    """A host name resolves to an address that is not public."""


class CheckedResolver(AbstractResolver):
    """Resolves a host name once; unless `private`, all of its addresses must be public."""

    def __init__(self, private: bool) -> None:
        self.private = private

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys((kind, endpoint[0]) for kind, _, _, _, endpoint in infos))
        if not self.private and not all(is_public(str(address)) for _, address in addresses):
            raise PrivateAddressError(f"{host} is not public")
        return [
            ResolveResult(hostname=host, host=str(address), port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST)
            for kind, address in addresses
        ]

    async def close(self) -> None:
        """Nothing to close."""


def is_public(address: str) -> bool:
    """Whether an IP address is a public host's; IPv4 addresses inside IPv6 (mapped, 6to4, Teredo, NAT64) must be public."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    embedded: list[ipaddress.IPv4Address] = []
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = [inner for inner in (ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())) if inner is not None]
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            embedded.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    return all(one.is_global for one in embedded or [ip]) and not ip.is_multicast


def _not_fetched(message: str) -> ApiError:
    return ApiError(400, message, code="image_not_fetched")
