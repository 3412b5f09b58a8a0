// Command etcd is one node of a real etcd cluster: etcd's own server in a
// process that tests can stop, kill and start again. It takes its name, data
// folder, client URL, peer URL and the initial cluster, says "ready" on standard
// output, and ends on SIGTERM.
package main

import (
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"syscall"

	"go.etcd.io/etcd/server/v3/embed"
)

func main() {
	if len(os.Args) != 6 {
		fmt.Fprintln(os.Stderr, "usage: etcd NAME DIR CLIENT-URL PEER-URL CLUSTER")
		os.Exit(2)
	}
	if err := serve(os.Args[1], os.Args[2], os.Args[3], os.Args[4], os.Args[5]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serve(name, dir, client, peer, cluster string) error {
	c, err1 := url.Parse(client)
	p, err2 := url.Parse(peer)
	if err1 != nil || err2 != nil {
		return fmt.Errorf("%w %w", err1, err2)
	}
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir, cfg.InitialCluster = name, dir, cluster
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{*c}, []url.URL{*c}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{*p}, []url.URL{*p}
	cfg.TickMs, cfg.ElectionMs = 50, 500
	cfg.LogLevel = "warn"
	etcd, err := embed.StartEtcd(cfg)
	if err != nil {
		return err
	}
	defer etcd.Close()
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM, syscall.SIGINT)
	for ready := etcd.Server.ReadyNotify(); ; {
		select {
		case <-ready:
			fmt.Println("ready")
			ready = nil
		case err := <-etcd.Err():
			return err
		case <-end:
			return nil
		}
	}
}
