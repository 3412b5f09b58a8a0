# patchd: make build, make demo and make test are all one needs.
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
export CGO_ENABLED := 0
LDFLAGS := -s -w -X main.version=$(VERSION)
N ?= 40
SEED ?= 1
FUZZTIME ?= 60s

NAME ?= last

.PHONY: build demo demo-pool test test-vm lint bench bench-pool bench-compare fuzz soak deps clean

build: ## a static bin/patchd
	go build -trimpath -ldflags '$(LDFLAGS)' -o bin/patchd ./cmd/patchd

demo: build ## the main job, end to end, on a temporary state directory
	scripts/deps.sh demo
	scripts/demo.sh bin/patchd

demo-pool: build ## three hosts on a real etcd cluster, a rolling apply, a killed coordinator
	go build -trimpath -o bin/etcd ./integration/lab/etcd
	scripts/deps.sh demo
	scripts/demo-pool.sh bin/patchd bin/etcd

deps: ## what the demo and the tests need from Debian and npm
	scripts/deps.sh

test: deps ## everything that must hold; needs root
	scripts/test.sh

test-vm: ## the storage drivers nfs and lvm, in a virtual machine (first run: a minute more)
	scripts/vm.sh

lint: ## gofmt, vet, staticcheck
	scripts/lint.sh

bench: deps ## the measured targets, as ratios to a baseline in the same run: make bench NAME=mine ONLY='put|copy'
	scripts/bench.sh '$(NAME)' '$(ONLY)'

bench-pool: ## the same for many hosts: make bench-pool ONLY='apply|failover'
	scripts/deps.sh bench
	scripts/bench.sh '$(NAME)-pool' '$(ONLY)' TestBenchPool

bench-compare: ## two named runs of the benchmarks: make bench-compare OLD=one NEW=other
	go tool benchstat bench-results/$(OLD).txt bench-results/$(NEW).txt

fuzz: ## each fuzz target for FUZZTIME
	scripts/fuzz.sh $(FUZZTIME)

soak: deps ## random faults: make soak N=300 SEED=7
	PATCHD_SOAK_N=$(N) PATCHD_SOAK_SEED=$(SEED) go test -count=1 -timeout 0 -run 'Soak' -v ./integration/...

clean:
	rm -rf bin
