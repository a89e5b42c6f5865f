//! A bot on twilight.

use libraries::queue::HttpQueue;
use std::env;
use twilight_gateway::{
    ConfigBuilder, Event, EventTypeFlags, Intents, Shard, ShardId, StreamExt,
    queue::{InMemoryQueue, Queue},
};

#[tokio::main]
async fn main() {
    let queue = variable("QUEUE");
    if queue.is_empty() {
        run(InMemoryQueue::default(), |_| ()).await;
    } else {
        let queue = HttpQueue::new(&queue);
        run(queue.clone(), move |shard| queue.confirm(shard)).await;
    }
}

/// Runs all shards, for ever.
async fn run<Q, F>(queue: Q, ready: F)
where
    Q: Queue + Clone + Send + Sync + Unpin + 'static,
    F: Fn(u32) + Clone + Send + 'static,
{
    let shards: Vec<u32> = serde_json::from_str(&variable("SHARDS")).unwrap();
    let count = variable("SHARD_COUNT").parse().unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for number in shards {
        let config = ConfigBuilder::new(variable("TOKEN"), Intents::empty())
            .proxy_url(variable("GATEWAY"))
            .queue(queue.clone())
            .build();
        let shard = Shard::with_config(ShardId::new(number, count), config);
        tasks.spawn(follow(shard, ready.clone()));
    }
    tasks.join_all().await;
}

async fn follow<Q: Queue + Unpin>(mut shard: Shard<Q>, ready: impl Fn(u32)) {
    while let Some(event) = shard.next_event(EventTypeFlags::READY).await {
        match event {
            Ok(Event::Ready(_)) => ready(shard.id().number()),
            Ok(_) => {}
            Err(error) => eprintln!("{error:?}"),
        }
    }
}

fn variable(name: &str) -> String {
    env::var(name).unwrap()
}
