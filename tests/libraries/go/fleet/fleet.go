// Package fleet reads what a process of a fleet is to do.
package fleet

import (
	"encoding/json"
	"os"
	"strconv"
)

// Orders come from the environment.
type Orders struct {
	API, Gateway, Token, Queue string
	Shards                     []int
	Count                      int
}

// Read panics if a variable is missing.
func Read() Orders {
	orders := Orders{
		API:     os.Getenv("API"),
		Gateway: os.Getenv("GATEWAY"),
		Token:   os.Getenv("TOKEN"),
		Queue:   os.Getenv("QUEUE"),
	}
	if err := json.Unmarshal([]byte(os.Getenv("SHARDS")), &orders.Shards); err != nil {
		panic(err)
	}
	count, err := strconv.Atoi(os.Getenv("SHARD_COUNT"))
	if err != nil {
		panic(err)
	}
	orders.Count = count
	return orders
}
