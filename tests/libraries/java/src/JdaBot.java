import java.util.EnumSet;
import net.dv8tion.jda.api.requests.GatewayIntent;
import net.dv8tion.jda.api.requests.RestConfig;
import net.dv8tion.jda.api.sharding.DefaultShardManagerBuilder;

/** A bot on JDA. */
final class JdaBot {
    public static void main(String[] arguments) {
        DefaultShardManagerBuilder builder =
                DefaultShardManagerBuilder.createLight(
                                Orders.TOKEN, EnumSet.noneOf(GatewayIntent.class))
                        .setRestConfig(new RestConfig().setBaseUrl(Orders.API + "/"))
                        .setShardsTotal(Orders.COUNT)
                        .setShards(Orders.shards());
        if (!Orders.QUEUE.isEmpty()) {
            builder.setSessionController(new AskingController(Orders.QUEUE));
        }
        builder.build();
    }

    private JdaBot() {}
}
