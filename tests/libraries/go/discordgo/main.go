// A bot on discordgo.
package main

import (
	"context"
	"log"
	"time"

	"github.com/bwmarrin/discordgo"

	"libraries/fleet"
)

func main() {
	orders := fleet.Read()
	discordgo.EndpointGateway = orders.API + "/gateway"
	queue := &HTTPQueue{URL: orders.Queue}
	for _, shard := range orders.Shards {
		session, err := discordgo.New("Bot " + orders.Token)
		if err != nil {
			panic(err)
		}
		session.ShardID, session.ShardCount = shard, orders.Count
		go start(queue, session)
	}
	select {}
}

func start(queue *HTTPQueue, session *discordgo.Session) {
	for {
		var err error
		if queue.URL == "" {
			err = session.Open()
		} else {
			err = Open(context.Background(), queue, session)
		}
		if err == nil {
			return
		}
		log.Print(err)
		time.Sleep(time.Second)
	}
}
