"""All bots of a server: the default bot, and those of ``BOTS_FILE``, which can change."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from itertools import count

import structlog
import trio
from prometheus_client.metrics_core import GaugeMetricFamily
from structlog.contextvars import bound_contextvars

from gateway_queue.bots_file import DEFAULT_BOT, read_bots
from gateway_queue.discord.api import Api
from gateway_queue.observing import gauges
from gateway_queue.observing.metrics import Metrics
from gateway_queue.service import Links, Service
from gateway_queue.settings import BadSetting, Settings

GOLDEN_RATIO = 0.618034
"""The fractional parts of its multiples are spread evenly, however many there are."""

log = structlog.stdlib.get_logger(__name__)


class Bots:
    """The services of all bots, by name.

    Args:
      settings: of the server, and of the default bot.
      refuse_token: called if Discord rejects the default bot's token.
    """

    default: Service
    _links: Links
    _nursery: trio.Nursery

    def __init__(self, settings: Settings, refuse_token: Callable[[], None]) -> None:
        self._settings = settings
        self.are_several = settings.bots_file is not None
        """Whether metrics, logs and ``/status`` name the bot."""
        self.metrics = Metrics(by_bot=self.are_several)
        self.metrics.watch(self._gauges)
        self._numbers = count()
        self._refuse_token = refuse_token
        self._named: dict[str, Service] = {}
        # Bots that were removed from the file, until a bot with that name cannot release early.
        self._removed: dict[str, tuple[Service, trio.CancelScope]] = {}

    def get(self, name: str) -> Service | None:
        """Return the service of a bot, None if there is no such bot."""
        return self.default if name == DEFAULT_BOT else self._named.get(name)

    def services(self) -> dict[str, Service]:
        """Return all services by name, the default bot's first."""
        return {DEFAULT_BOT: self.default, **self._named}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve tickets until cancelled.

        Raises:
          BadSetting: the file with the bots is wrong.
        """
        wanted = read_bots(self._settings)
        async with trio.open_nursery() as self._nursery:
            try:
                self._links = self._open_links()
                self.default = self._service(DEFAULT_BOT, self._settings, self._refuse_token)
                # Even without a token, so that every server has this metric.
                self.default.metrics.expect_discord_requests()
                await self._nursery.start(self.default.run)
                for name, settings in wanted.items():
                    await self._add(name, settings)
                if self.are_several:
                    log.info("read BOTS_FILE", added=len(wanted), changed=0, removed=0)
                    await self._nursery.start(self._read_on_signal)
                task_status.started()
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await self._links.discord.close()

    async def close(self) -> None:
        """Release no more tickets, and return when the answers being written are complete."""
        async with trio.open_nursery() as nursery:
            for service in self.services().values():
                nursery.start_soon(service.queue.close)

    def _open_links(self) -> Links:
        if self._settings.redis_url is None:
            return Links(Api(), None)
        # Not at the top: most servers do not use Redis, and the import takes long.
        from gateway_queue.store.redis import Link  # noqa: PLC0415

        redis = Link(
            self._settings.redis_url,
            count_error=self.metrics.store_errors.inc,
            observe_round_trip=self.metrics.redis_round_trip.observe,
        )
        self._nursery.start_soon(redis.run)
        return Links(Api(), redis)

    def _service(self, name: str, settings: Settings, refuse_token: Callable[[], None]) -> Service:
        return Service(
            settings,
            self._links,
            self.metrics.of(name),
            refuse_token=refuse_token,
            phase=1 - next(self._numbers) * GOLDEN_RATIO % 1,
        )

    def _gauges(self) -> Iterable[GaugeMetricFamily]:
        yield gauges.build_info()
        yield from gauges.merged(
            (service.labels, gauges.gauges(service.queue, service.not_ready))
            for service in self.services().values()
        )

    # --- the file has changed ---------------------------------------------------------------------

    async def _read_on_signal(self, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGHUP) as signals:
            task_status.started()
            async for _ in signals:
                await self._read_again()

    async def _read_again(self) -> None:
        try:
            wanted = await trio.to_thread.run_sync(read_bots, self._settings)
        except BadSetting as error:
            log.warning("BOTS_FILE has a mistake: no bot was changed", reason=str(error))
            return
        removed = self._named.keys() - wanted.keys()
        changed = {
            name
            for name, service in self._named.items()
            if name in wanted and service.settings != wanted[name]
        }
        added = [name for name in wanted if name not in self._named]
        for name in removed:
            self._remove(name)
        for name in changed:
            with bound_contextvars(bot=name):
                self._named[name].change(wanted[name])
        for name in added:
            await self._add(name, wanted[name])
        self._named = {name: self._named[name] for name in wanted}  # in the order of the file
        log.info("read BOTS_FILE", added=len(added), changed=len(changed), removed=len(removed))

    async def _add(self, name: str, settings: Settings) -> None:
        if name not in self._removed:
            service = self._service(name, settings, _log_bad_token)
            await self._nursery.start(service.run)
        else:
            service, stopping = self._removed.pop(name)
            stopping.cancel()
            with bound_contextvars(bot=name):
                service.change(settings)
        self._named[name] = service

    def _remove(self, name: str) -> None:
        service, stopping = self._named.pop(name), trio.CancelScope()
        self._removed[name] = service, stopping
        service.queue.dismiss()
        self._nursery.start_soon(self._stop_later, name, service, stopping)

    async def _stop_later(self, name: str, service: Service, stopping: trio.CancelScope) -> None:
        """Keep the windows of a removed bot for as long as its shards may identify."""
        rules = service.queue.store.rules
        with stopping:
            await trio.sleep(rules.confirm_seconds + rules.unconfirmed_window)
            del self._removed[name]
            service.stop()
            self.metrics.forget(name)


def _log_bad_token() -> None:
    log.error("Discord rejected this token (401 Unauthorized): correct it and send SIGHUP")
