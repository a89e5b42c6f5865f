//! twilight-gateway-queue's own queue behind hyper. Its window is always 5 s.

use http_body_util::Full;
use hyper::{
    Request, Response,
    body::{Bytes, Incoming},
    header::CONTENT_TYPE,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use std::{convert::Infallible, env};
use tokio::net::TcpListener;
use twilight_gateway_queue::{InMemoryQueue, LIMIT_PERIOD, Queue};

#[tokio::main]
async fn main() {
    let keys = env::var("MAX_CONCURRENCY").map_or(1, |keys| keys.parse().unwrap());
    let queue = InMemoryQueue::new(keys, u32::MAX, LIMIT_PERIOD, u32::MAX);
    let port: u16 = env::var("PORT").unwrap().parse().unwrap();
    let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    println!("Running on http://{}", listener.local_addr().unwrap());
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let queue = queue.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| answer(&queue, request));
            _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn answer(
    queue: &InMemoryQueue,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let query = request.uri().query().unwrap_or_default();
    let shard = query.strip_prefix("shard=").and_then(|shard| shard.parse().ok());
    _ = queue.enqueue(shard.unwrap_or_default()).await;
    let message = r#"{"message": "You're free to connect now! :)"}"#;
    let response = Response::builder().header(CONTENT_TYPE, "application/json");
    Ok(response.body(Full::from(message)).unwrap())
}
