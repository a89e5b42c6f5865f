import java.util.Arrays;

/** What a process of a fleet is to do, from the environment. */
final class Orders {
    static final String API = System.getenv("API");
    static final String GATEWAY = System.getenv("GATEWAY");
    static final String TOKEN = System.getenv("TOKEN");
    static final String QUEUE = System.getenv("QUEUE");
    static final int COUNT = Integer.parseInt(System.getenv("SHARD_COUNT"));

    static int[] shards() {
        String[] numbers = System.getenv("SHARDS").replaceAll("[\\[\\] ]", "").split(",");
        return Arrays.stream(numbers).mapToInt(Integer::parseInt).toArray();
    }

    private Orders() {}
}
