"""Images from web addresses, for domains that the operator allows: no other host and no private network can be reached.

A name is resolved once, its addresses are judged, and the connection goes to these; each redirect begins anew.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import SplitResult, urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from serve.errors import ApiError

REDIRECTS = 3
SCHEMES = {"http": 80, "https": 443}


class Fetcher:
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
        connector = aiohttp.TCPConnector(resolver=_Judged(self.private), use_dns_cache=False, force_close=True)
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


class _Judged(AbstractResolver):
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
