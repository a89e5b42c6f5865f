//! Enqueues the shards of the command line; prints the seconds that each of them waited.

use libraries::queue::HttpQueue;
use std::{env, time::Instant};
use tokio::task::JoinSet;
use twilight_gateway::queue::Queue;

#[tokio::main]
async fn main() {
    let queue = HttpQueue::new(&env::var("QUEUE").unwrap());
    let start = Instant::now();
    let mut permits = JoinSet::new();
    for argument in env::args().skip(1) {
        let shard = argument.parse().unwrap();
        let permit = queue.enqueue(shard);
        let queue = queue.clone();
        permits.spawn(async move {
            permit.await.unwrap();
            queue.confirm(shard);
            (shard, start.elapsed())
        });
    }
    while let Some(result) = permits.join_next().await {
        let (shard, waited) = result.unwrap();
        println!("{shard} {}", waited.as_secs_f64());
    }
}
