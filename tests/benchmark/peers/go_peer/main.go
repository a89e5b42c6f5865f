// A gateway queue as small as net/http allows.
package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"
)

func main() {
	window, err := time.ParseDuration(os.Getenv("WINDOW_SECONDS") + "s")
	if err != nil {
		panic(err)
	}
	keys, err := strconv.Atoi(os.Getenv("MAX_CONCURRENCY"))
	if err != nil {
		keys = 1
	}
	lanes := make([]chan struct{}, keys)
	for key := range lanes {
		lanes[key] = make(chan struct{})
		go release(lanes[key], window)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Getenv("PORT"))
	if err != nil {
		panic(err)
	}
	fmt.Printf("Running on http://%v\n", listener.Addr())
	http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		shard, _ := strconv.Atoi(r.URL.Query().Get("shard"))
		if len(lanes) > 0 {
			select {
			case lanes[shard%len(lanes)] <- struct{}{}:
			case <-r.Context().Done():
				return
			}
		}
		w.Header().Set("content-type", "application/json")
		fmt.Fprint(w, `{"message": "You're free to connect now! :)"}`)
	}))
}

// release lets one request pass per window.
func release(lane <-chan struct{}, window time.Duration) {
	for range lane {
		time.Sleep(window)
	}
}
