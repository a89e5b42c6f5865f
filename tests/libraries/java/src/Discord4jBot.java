import discord4j.core.DiscordClientBuilder;
import discord4j.core.shard.GatewayBootstrap;
import discord4j.core.shard.ShardingStrategy;
import discord4j.gateway.GatewayOptions;
import discord4j.gateway.intent.IntentSet;
import discord4j.rest.request.RouterOptions;

/** A bot on Discord4J. */
final class Discord4jBot {
    public static void main(String[] arguments) {
        GatewayBootstrap<GatewayOptions> bot =
                DiscordClientBuilder.create(Orders.TOKEN)
                        .setExtraOptions(Discord4jBot::atStandIn)
                        .build()
                        .gateway()
                        .setEnabledIntents(IntentSet.none())
                        .setSharding(
                                ShardingStrategy.builder()
                                        .count(Orders.COUNT)
                                        .indices(Orders.shards())
                                        .build());
        if (!Orders.QUEUE.isEmpty()) {
            bot.setShardCoordinator(new AskingCoordinator(Orders.QUEUE));
        }
        bot.login().flatMap(client -> client.onDisconnect()).block();
    }

    private static RouterOptions atStandIn(RouterOptions options) {
        return new RouterOptions(
                options.getToken(),
                options.getReactorResources(),
                options.getExchangeStrategies(),
                options.getResponseTransformers(),
                options.getGlobalRateLimiter(),
                options.getRequestQueueFactory(),
                Orders.API);
    }

    private Discord4jBot() {}
}
