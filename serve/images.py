"""Photos before the model: fetched where that is allowed, decoded, and shrunk to the model's size."""

import asyncio
import base64
import binascii
import ipaddress
import re
import socket
from collections.abc import Sequence
from urllib.parse import SplitResult, urljoin, urlsplit

import aiohttp
import numpy as np
from aiohttp.abc import AbstractResolver, ResolveResult
from prometheus_client.core import Metric
from ray import serve

from addressvlm import InputError
from addressvlm.image_decode_worker import LONGEST_SIDE
from serve.decode_pool import DecodePool
from serve.errors import QUIET, ApiError, refusals_told
from serve.metrics import ServiceMetrics
from serve.settings import ServiceSettings

REDIRECTS = 3
SCHEMES = {"http": 80, "https": 443}


class ImageFetcher:
    """Fetches images.

    Args:
        domains: hosts, `.example.org` for all below it, each with a port where it is not the scheme's.
        private: whether they may have addresses that are not global.
        max_mb, timeout_s: bounds of one image, redirects included.
    """

    def __init__(self, domains: Sequence[str], private: bool, max_mb: float, timeout_s: float) -> None:
        self.domains = [domain.lower() for domain in domains]
        self.private, self.max_mb, self.timeout_s = private, max_mb, timeout_s

    async def get(self, url: str) -> bytes:
        """The body that a URL leads to.

        Raises:
            ApiError: 400 the address is not allowed, answers anything but an image's bytes, or too many or too slowly.
        """
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._follow(url)
        except TimeoutError:
            raise _refusal(f"The image's server took more than {self.timeout_s:g} s: send the image itself.") from None
        except (aiohttp.ClientError, OSError, UnicodeError, ValueError) as error:
            if isinstance(error.__cause__ or error.__context__, _PrivateError) or isinstance(error, _PrivateError):
                raise _refusal("The image's address is in a private network: send the image itself.") from None
            raise _refusal(f"The image could not be fetched ({type(error).__name__}): send the image itself.") from None

    async def _follow(self, url: str) -> bytes:
        connector = aiohttp.TCPConnector(resolver=_CheckedResolver(self.private), use_dns_cache=False, force_close=True)
        async with aiohttp.ClientSession(
            connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False
        ) as session:
            for _ in range(REDIRECTS + 1):
                self._check(url)
                headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "addressvlm"}
                async with session.get(url, headers=headers, allow_redirects=False) as response:
                    if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
                        url = urljoin(url, response.headers["Location"])
                        continue
                    if response.status != 200:
                        raise _refusal(f"The image's server answered {response.status}: check the address.")
                    return await self._body(response)
        raise _refusal(f"The image's address redirects more than {REDIRECTS} times: give the last one.")

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        limit = int(self.max_mb * 1e6)
        body = bytearray()
        async for chunk in response.content.iter_chunked(1 << 16):
            body += chunk
            if len(body) > limit:
                raise _refusal(f"The image is larger than {self.max_mb:g} MB: send a smaller one.")
        return bytes(body)

    def _check(self, url: str) -> None:
        """Judge scheme, host and port against the domains that are allowed."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise _refusal("The image's address can't be read: write it as https://host/path.") from None
        if parts.scheme not in SCHEMES or not parts.hostname:
            raise _refusal("Images are fetched by http and https only: send the image itself as a data URL.")
        if parts.username is not None or parts.password is not None:
            raise _refusal("The image's address holds a user name or password: leave them out.")
        if not any(_matches(domain, parts, port) for domain in self.domains):
            raise _refusal("Images are not fetched from this host: send the image itself as a data URL.")


class _PrivateError(OSError):
    """A name leads into a network that is not public."""


class _CheckedResolver(AbstractResolver):
    """Resolves a name once; all of its addresses must be global."""

    def __init__(self, private: bool) -> None:
        self.private = private

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys((kind, place[0]) for kind, _, _, _, place in found))
        if not self.private and not all(is_global(str(address)) for _, address in addresses):
            raise _PrivateError(f"{host} is not public")
        return [
            ResolveResult(hostname=host, host=str(address), port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST)
            for kind, address in addresses
        ]

    async def close(self) -> None:
        """Nothing is kept."""


def is_global(address: str) -> bool:
    """Whether an IP address is a public host's; what IPv6 wraps (mapped, 6to4, Teredo, NAT64) is judged by what is inside."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    inside: list[ipaddress.IPv4Address | None] = []
    if isinstance(ip, ipaddress.IPv6Address):
        inside = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            inside.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    wrapped = [one for one in inside if one is not None]
    return (all(one.is_global for one in wrapped) and (bool(ip.is_global) or bool(wrapped))) and not ip.is_multicast


def _matches(domain: str, parts: SplitResult, port: int | None) -> bool:
    name, _, allowed = domain.partition(":")
    host = (parts.hostname or "").lower()
    same = host.endswith(name) and host != name if name.startswith(".") else host == name
    return same and (port or SCHEMES[parts.scheme]) == (int(allowed) if allowed else SCHEMES[parts.scheme])


def _refusal(message: str) -> ApiError:
    return ApiError(400, message, code="image_not_fetched")


_DATA_URL = re.compile(r"data:[^,;]*(?:;[^,;]*)*?;base64,", re.IGNORECASE)
_WEB = re.compile(r"\s*(?:[a-z][a-z0-9+.-]*://|file:)", re.IGNORECASE)


class Images:
    """Encoded photo in, pixels out."""

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings, self.records = settings, ServiceMetrics()
        self.decoders = DecodePool(settings.image_processes, settings.decode_s, settings.max_megapixels)
        self.fetcher = ImageFetcher(settings.image_domains, settings.private_addresses, settings.max_body_mb, settings.fetch_s)

    async def read(self, source: bytes | str, side: int = LONGEST_SIDE) -> np.ndarray:
        """Pixels of a photo given by its bytes, as base64, as a data URL or as a web address, uint8 (height, width, 3).

        Raises:
            InputError: it is no photo that can be used.
            ApiError: its web address is not allowed, or gave nothing.
        """
        data = await self._bytes(source) if isinstance(source, str) else source
        with self.records.time("addressvlm_decode_seconds"):
            found = await self.decoders.decode(data, side)
        return np.frombuffer(found.rgb, np.uint8).reshape(found.height, found.width, 3)

    async def _bytes(self, text: str) -> bytes:
        if not _WEB.match(text[:64]):
            return bytes_of(text)
        if not self.settings.image_domains:
            raise InputError(
                "Images are not fetched from web addresses: send the image itself as a data URL (data:image/jpeg;base64,…)."
            )
        return await self.fetcher.get(text.strip())


@serve.deployment(name="Images", logging_config=QUIET)
class ImagesDeployment(Images):
    """The same as a deployment."""

    read = refusals_told(Images.read)

    async def collect(self) -> tuple[str, list[Metric]]:
        """What was counted here, for `/metrics`."""
        return str(serve.get_replica_context().replica_tag), self.records.collect()

    def __del__(self) -> None:
        self.decoders.kill()


def bytes_of(text: str) -> bytes:
    """The bytes of an image given as base64 or as a data URL.

    Raises:
        InputError: it is neither.
    """
    header = _DATA_URL.match(text[:256])
    if header is None and text[:5].lower() == "data:":
        raise InputError("The data URL is not base64: write it as data:image/jpeg;base64,….")
    try:
        return base64.b64decode(re.sub(r"\s+", "", text[header.end() if header else 0 :]), validate=True)
    except (binascii.Error, ValueError):
        raise InputError("The image is not valid base64: encode the file's bytes, with the padding.") from None
