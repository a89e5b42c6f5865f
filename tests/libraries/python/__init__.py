"""Libraries in Python."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.harness import installed
from tests.libraries import Script, recipe
from tests.libraries.building import Project

DISCORD_PY = Script(
    "discord.py",
    (sys.executable, "-c"),
    "import discord",
    """
import json, os, yarl
discord.http.Route.BASE = os.environ["API"]
discord.gateway.DiscordWebSocket.DEFAULT_GATEWAY = yarl.URL(os.environ["GATEWAY"])
shards, count = json.loads(os.environ["SHARDS"]), int(os.environ["SHARD_COUNT"])
bot = discord.AutoShardedClient(
    intents=discord.Intents.none(), shard_ids=shards, shard_count=count
)
bot.run(os.environ["TOKEN"])
""",
)
HIKARI = Script(
    "hikari",
    (sys.executable, "-c"),
    "import hikari",
    """
import json, os
shards, count = json.loads(os.environ["SHARDS"]), int(os.environ["SHARD_COUNT"])
bot = hikari.GatewayBot(os.environ["TOKEN"], rest_url=os.environ["API"])
bot.run(shard_ids=shards, shard_count=count, check_for_updates=False)
""",
)

FORKS = Project(
    Path(__file__).parent,
    commands=[
        (
            *(installed("pip"), "--disable-pip-version-check", "--quiet", "install"),
            *(
                "--require-hashes",
                "--no-deps",
                "--upgrade",
                f"--target={name}",
                f"--requirement={name}.txt",
            ),
        )
        for name in ("py-cord", "disnake", "nextcord")
    ],
    recipes={},
    variables={},
)
"""Each has a folder of its own: py-cord's module has the same name as that of discord.py."""

FORK_START = """
import asyncio, json, os
discord.http.Route.BASE = discord.http.Route.API_BASE_URL = os.environ["API"]
shards, count = json.loads(os.environ["SHARDS"]), int(os.environ["SHARD_COUNT"])
asyncio.set_event_loop(asyncio.new_event_loop())
bot = discord.AutoShardedClient(
    intents=discord.Intents.none(), shard_ids=shards, shard_count=count
)
bot.run(os.environ["TOKEN"])
"""


@dataclass(frozen=True)
class Fork:
    """A fork of discord.py: the same recipe, with another module."""

    name: str
    module: str
    folder: Path = FORKS.copy

    def command(self, port: int | None, *, confirm: bool) -> Sequence[str]:
        folder = FORKS.build() / self.name
        head = DISCORD_PY.without_recipe
        if port is not None:
            head = recipe(DISCORD_PY.name, port, confirm=confirm)
        code = (head + FORK_START).replace("import discord ", f"import {self.module} as discord ")
        code = code.replace("import discord\n", f"import {self.module} as discord\n")
        return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"]


PY_CORD = Fork("py-cord", "discord")
DISNAKE = Fork("disnake", "disnake")
NEXTCORD = Fork("nextcord", "nextcord")
