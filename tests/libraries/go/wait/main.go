// A program that asks for shard 3; after a line of input it confirms, and after another it ends.
package main

import (
	"context"
	"fmt"
	"os"
	"time"
)

func main() {
	patience, err := time.ParseDuration(os.Args[1])
	if err != nil {
		panic(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	queue := &HTTPQueue{URL: os.Getenv("QUEUE")}
	fmt.Println(queue.Wait(ctx, 3))
	fmt.Scanln()
	queue.Unlock(3)
	fmt.Scanln()
}
