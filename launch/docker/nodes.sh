#!/usr/bin/env bash
# Containers as nodes of a hostfile launch.
#   launch/docker/nodes.sh cluster SHARED    this host's node, on its GPUs; the same command on every host of the cluster
#   launch/docker/nodes.sh trial N SHARED    N nodes without GPUs on this machine, node1 to nodeN in a network of their own
#   launch/docker/nodes.sh stop              removes the nodes that this script started here
# SHARED is a folder that all hosts see at the same path:
#   keys/id_ed25519   nodes log in with it: ssh-keygen -t ed25519 -N '' -f SHARED/keys/id_ed25519
#   data/ models/     read only in the nodes
#   outputs/          runs; put the hostfile there
# Then, on any host with a node (in a trial: node1):
#   docker exec -it fw-node launch/stage1.sh outputs/hosts
# FW_IMAGE names the image (default fw-train), FW_DOCKER_ARGS adds arguments to docker run.
set -euo pipefail

image=${FW_IMAGE:-fw-train}

fail() {
    echo "nodes.sh: $*" >&2
    exit 2
}

usage() {
    sed -n '2,5p' "$0" >&2
    exit 2
}

mounts() { # SHARED
    [[ $1 = /* && $1 != *[:[:space:]]* ]] || fail "SHARED must be an absolute path without blanks and colons, not '$1'"
    [ -r "$1/keys/id_ed25519" ] || fail "no $1/keys/id_ed25519; make it: mkdir -p -m 700 $1/keys && ssh-keygen -t ed25519 -N '' -f $1/keys/id_ed25519"
    mkdir -p "$1/data" "$1/models" "$1/outputs"
    volumes=(--volume "$1/keys:/run/secrets/fw_ssh:ro" --volume "$1/data:/opt/fw_train/data:ro"
        --volume "$1/models:/opt/fw_train/models:ro" --volume "$1/outputs:/opt/fw_train/outputs")
}

start() { # NAME ARGUMENTS...
    local name=$1
    shift
    # shellcheck disable=SC2086  # FW_DOCKER_ARGS is a list of words
    docker run --detach --name "$name" --label fw-node --restart unless-stopped "${volumes[@]}" "$@" ${FW_DOCKER_ARGS:-} "$image" node \
        > /dev/null
}

case ${1:-} in
cluster)
    [ $# = 2 ] || usage
    mounts "$2"
    # host network and ipc: NCCL's full speed, and shared memory as large as the host's for loaders and NCCL; memlock: RDMA pins memory.
    devices=()
    [ ! -e /dev/infiniband ] || devices=(--device /dev/infiniband --cap-add IPC_LOCK)
    start fw-node --gpus all --network host --ipc host --ulimit memlock=-1 --ulimit stack=67108864 --ulimit nofile=1048576 \
        "${devices[@]}"
    ;;
trial)
    [[ $# = 3 && $2 =~ ^[1-9][0-9]?$ ]] || usage
    mounts "$3"
    docker network create --label fw-node fw-nodes > /dev/null
    for ((number = 1; number <= $2; number++)); do
        name=fw-node
        [ "$number" = 1 ] || name=fw-node$number
        start "$name" --network fw-nodes --hostname "node$number" --network-alias "node$number" --shm-size 1g
        echo "node$number slots=1"
    done > "$3/outputs/hosts"
    ;;
stop)
    [ $# = 1 ] || usage
    nodes=$(docker ps --all --quiet --filter label=fw-node)
    # shellcheck disable=SC2086  # one word a container
    [ -z "$nodes" ] || docker rm --force $nodes
    docker network prune --force --filter label=fw-node
    ;;
*) usage ;;
esac
