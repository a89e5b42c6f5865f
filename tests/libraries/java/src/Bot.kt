/** A bot on kord. */

import dev.kord.common.entity.DiscordShard
import dev.kord.common.entity.PresenceStatus
import dev.kord.gateway.DefaultGateway
import dev.kord.gateway.Intents
import dev.kord.gateway.ratelimit.IdentifyRateLimiter
import dev.kord.gateway.start
import kotlinx.coroutines.launch
import kotlinx.coroutines.runBlocking

fun main() = runBlocking {
    val limiter =
        if (Orders.QUEUE.isEmpty()) IdentifyRateLimiter(maxConcurrency = 1)
        else HttpQueue(Orders.QUEUE)
    for (number in Orders.shards()) {
        val gateway = DefaultGateway {
            url = "${Orders.GATEWAY}/?v=10&encoding=json&compress=zlib-stream"
            identifyRateLimiter = limiter
        }
        launch {
            gateway.start(Orders.TOKEN) {
                shard = DiscordShard(number, Orders.COUNT)
                intents = Intents()
            }
        }
    }
}
