"""Processes that decode photos: so many at a time, each ended when a photo takes too much of it."""

import asyncio
import json
import logging
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import addressvlm
from addressvlm import InputError
from addressvlm.image_decode_worker import DecodedImage
from serve.errors import ApiError

COMMAND = (sys.executable, "-m", "addressvlm.image_decode_worker")
PATIENCE = 6  # times its CPU seconds that a photo may take by the clock, and as long again that it may wait for its turn
logger = logging.getLogger("ray.serve")


class DecodePool:
    """Up to `processes` of them, started when they are needed.

    Args:
        cpu_s: CPU seconds for one photo.
        command: what to run, see `addressvlm.image_decode_worker`.
    """

    def __init__(self, processes: int, cpu_s: int, max_megapixels: float, command: Sequence[str] = COMMAND) -> None:
        self.cpu_s, self.max_megapixels, self.command = cpu_s, max_megapixels, command
        self.turns = asyncio.Semaphore(processes)
        self.idle: list[Process] = []

    async def decode(self, data: bytes, side: int) -> DecodedImage:
        """The pixels of an encoded photo, see `addressvlm.image_decode_worker.decode_image`.

        Raises:
            InputError: it is no photo that can be used, or decoding it takes too long.
            ApiError: 503 no process is free in time, or none can be had.
        """
        try:
            async with asyncio.timeout(PATIENCE * self.cpu_s):
                await self.turns.acquire()
        except TimeoutError:
            raise _busy() from None
        try:
            async with asyncio.timeout(PATIENCE * self.cpu_s):
                return await self._decode(data, side)
        except (TimeoutError, asyncio.IncompleteReadError):
            raise InputError("The image takes too long to decode: send it smaller, or as a plain JPEG.") from None
        except OSError as error:
            logger.error("a decoder can't be used: %r", error)
            raise _busy() from None
        finally:
            self.turns.release()

    async def _decode(self, data: bytes, side: int) -> DecodedImage:
        self.idle = [process for process in self.idle if process.returncode is None]
        process = self.idle.pop() if self.idle else await self._start()
        try:
            found = await self._ask(process, data, side)
        except BaseException:
            await _end(process)
            raise
        self.idle.append(process)
        if isinstance(found, str):
            raise InputError(found)
        return found

    async def _ask(self, process: Process, data: bytes, side: int) -> DecodedImage | str:
        if process.stdin is None or process.stdout is None:
            raise OSError("the process has no pipes")
        asked = {"bytes": len(data), "max_megapixels": self.max_megapixels, "side": side, "cpu_s": self.cpu_s}
        process.stdin.write(json.dumps(asked).encode() + b"\n")
        process.stdin.write(data)
        await process.stdin.drain()
        told = json.loads(await process.stdout.readuntil(b"\n"))
        if "refused" in told:
            return str(told["refused"])
        width, height = told["width"], told["height"]
        return DecodedImage(width, height, await process.stdout.readexactly(3 * width * height))

    async def _start(self) -> Process:
        ours = str(Path(addressvlm.__file__).parents[1])
        path = os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))
        environment = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": path}  # no keys, nothing else that is secret
        return await asyncio.create_subprocess_exec(*self.command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment)

    def kill(self) -> None:
        """End the processes that wait for work."""
        for process in self.idle:
            with suppress(ProcessLookupError):
                process.kill()

    async def close(self) -> None:
        """The same, and wait until they have ended."""
        self.kill()
        while self.idle:
            await self.idle.pop().wait()


def _busy() -> ApiError:
    return ApiError(503, "The service is busy: try again in a moment.", code="overloaded")


async def _end(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()
