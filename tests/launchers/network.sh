#!/usr/bin/env bash
# Nodes as network namespaces with addresses of their own: network.sh up N | cut K | mend K | down N
# Node K is llava-node-K with 10.87.0.(K + 1) on a bridge, and nothing else: neither loopback of the others nor a way out.
set -euo pipefail
address() { echo "10.87.0.$(($1 + 1))"; }
case $1 in
    up)
        ip link add llava-bridge type bridge
        ip link set llava-bridge up
        for ((node = 0; node < $2; node++)); do
            ip netns add "llava-node-$node"
            ip link add "llava-$node" type veth peer name eth0 netns "llava-node-$node"
            ip link set "llava-$node" master llava-bridge up
            ip -n "llava-node-$node" link set lo up
            ip -n "llava-node-$node" address add "$(address "$node")/24" dev eth0
            ip -n "llava-node-$node" link set eth0 up
        done
        ;;
    cut) ip link set "llava-$2" down ;;
    mend) ip link set "llava-$2" up ;;
    down)
        for ((node = 0; node < $2; node++)); do
            # by its own name: it goes with the namespace only after the last process in there
            ip link delete "llava-$node" || true
            ip netns delete "llava-node-$node" || true
        done
        ip link delete llava-bridge || true
        ;;
esac
