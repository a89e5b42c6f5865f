// A bot on disgo.
package main

import (
	"context"

	"github.com/disgoorg/disgo/gateway"
	"github.com/disgoorg/disgo/sharding"

	"libraries/fleet"
)

func main() {
	orders := fleet.Read()
	options := []sharding.ConfigOpt{
		sharding.WithShardIDs(orders.Shards...),
		sharding.WithShardCount(orders.Count),
		sharding.WithGatewayConfigOpts(
			gateway.WithURL(orders.Gateway),
			gateway.WithCompression(gateway.CompressionZlibStream), // the stand-in has no zstd
		),
	}
	if orders.Queue != "" {
		options = append(options, sharding.WithIdentifyRateLimiter(&HTTPQueue{URL: orders.Queue}))
	}
	ignore := func(gateway.Gateway, gateway.EventType, int, gateway.EventData) {}
	sharding.New(orders.Token, ignore, options...).Open(context.Background())
	select {}
}
